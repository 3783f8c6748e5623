"""Adapters on their base, and training states: what comes back is what was there, bit for bit."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.tiny_models import PETS, TinyDiT, golden, lora_fields, refusal, same

from checkpoint.description import Base, ModelDescription
from checkpoint.format import is_adapter, read_weights, save_adapter
from checkpoint.loading import build_model, init_from, load_adapted, load_full_weights
from diffusion import create_diffusion
from finetune import EMA, METHODS, fold_lora, kind_of, select
from hierarchy import Hierarchy
from models import DiT_models
from runtime.files import sha256
from training.state import DECISIVE_FLAGS, check_same_run, latest_valid_state, load_run_base, load_state, save_state

KEPT = {"terms": torch.arange(24.0).view(2, 4, 3), "norms": torch.ones(2)}
VETS = Hierarchy(PETS.classes, PETS.superclasses, [0, 0, 0, 1, 1], "vets")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(DiT_models, "tiny", TinyDiT)
    monkeypatch.setitem(DiT_models, "wide", partial(TinyDiT, hidden_size=64))


@pytest.fixture
def plain(tmp_path):
    """A plain DiT as DiT is published: 5 classes and the null class, no LayerNorm affine."""
    state = {key.removeprefix("state/"): value for key, value in golden("plain_dit")[0].items() if "state/" in key}
    torch.save(state, tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


class Run:
    """A fine-tune from the weights at `path`; after that its numbers depend on the step alone."""

    def __init__(self, method, path=None, embedder=None, model="tiny", seed=0, **lora):
        self.description = ModelDescription(
            model=model,
            image_size=64,
            latent_size=8,
            channels=4,
            vae="mse",
            method=method,
            embedder=embedder or METHODS[method].embedder,
            hierarchy=PETS,
            data="abc",
            settings=dict.fromkeys(DECISIVE_FLAGS) | {"ema_warmup": 0},
            **lora_fields(method, **lora),
        )
        torch.manual_seed(seed)
        self.model = build_model(self.description)
        self.chosen = select(self.model, METHODS[method])
        if path:
            self.change(base=init_from(self.model, self.chosen, path, self.description)[0])
        self.ema = EMA(self.chosen, 0.5)
        self.optimizer = torch.optim.AdamW(self.chosen.values(), lr=1e-2, weight_decay=0, fused=True)

    def change(self, **changes):
        self.description = replace(self.description, **changes)

    def steps(self, count):
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.description.step)
            x, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
            t = torch.randint(0, 1000, (5,), generator=generator)
            inputs = {"y": torch.arange(5), "force_drop_ids": torch.tensor([0, 0, 1, 1, 0])}
            losses = create_diffusion("").training_losses(self.model.train(), x, t, inputs, noise)
            self.optimizer.zero_grad()
            losses["loss"].mean().backward()
            self.optimizer.step()
            self.ema.update(self.description.step)
            self.change(step=self.description.step + 1)
        return self

    def averaged(self):
        return self.model.state_dict() | self.ema.average

    def save(self, path, **options):
        save_adapter(path, self.ema.average, self.model, self.description, **options)
        return path

    def frozen(self):
        return {name: t for name, t in self.model.state_dict().items() if name not in self.chosen}

    def save_state(self, path):
        save_state(path, self.chosen, self.frozen(), self.ema.average, self.optimizer, KEPT, self.description)
        return path

    def go_on_from(self, path):
        _, tensors, saved = latest_valid_state([path])
        check_same_run(path, saved, self.description, allow_changes=False)
        load_run_base(path, saved, self.model)
        assert same(self.load(path, tensors, saved), KEPT)
        self.change(base=saved.base, step=saved.step)
        return self

    def load(self, path, tensors, saved):
        return load_state(path, tensors, saved, self.chosen, self.frozen(), self.ema.average, self.optimizer)

    def everything(self):
        """All tensors that the next step depends on, or that it writes."""
        moments = {
            f"{key}/{name}": value for name, p in self.chosen.items() for key, value in self.optimizer.state[p].items()
        }
        averages = {f"average/{name}": value for name, value in self.ema.average.items()}
        return copy.deepcopy(self.model.state_dict() | averages | moments)


# ---- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_base_and_adapter_are_the_average_model(method, plain, tmp_path):
    run = Run(method, plain).steps(2)
    path = run.save(tmp_path / "adapter.safetensors")
    model, description = load_adapted(path)
    assert not model.training and same(model.state_dict(), run.averaged())
    assert not same(run.averaged(), run.model.state_dict())
    assert description.step == 2 and description.hierarchy == PETS and description.hierarchy.classes == PETS.classes
    assert description.base == Base(str(plain), sha256(plain))
    assert read_weights(path)[0].keys() == run.chosen.keys() == description.trained
    assert is_adapter(path) and not is_adapter(plain) and not is_adapter(tmp_path) and not is_adapter(None)


@pytest.mark.parametrize("method", ["finediffusion", "difffit"])
def test_without_a_base_an_adapter_is_the_whole_model(method, tmp_path):
    run = Run(method).steps(1)
    path = run.save(tmp_path / "whole.safetensors")
    assert same(load_adapted(path)[0].state_dict(), run.averaged()) and same(load_full_weights(path)[0], run.averaged())
    with refusal("whole.safetensors holds a complete model, expected no --base"):
        load_adapted(path, base=path)


@pytest.mark.parametrize("rank, targets, original", [(2, "attn", True), (3, "all", False), (2, "mlp", False)])
def test_a_fine_tune_of_low_rank_updates(rank, targets, original, plain, tmp_path):
    """Updates that are trained on keep the original base. Those of another rank or layer become a part of the base."""
    first = Run("lora", plain, targets="attn").steps(2)
    path = first.save(tmp_path / "first.safetensors")
    second = Run("lora", path, rank=rank, targets=targets)
    assert second.description.base.path == str(plain if original else path)
    expected = fold_lora(first.averaged())
    start = fold_lora(second.model.state_dict())
    assert all((start[name] - expected[name]).abs().max() < 1e-6 for name in expected)
    second.steps(2)
    model, _ = load_adapted(second.save(tmp_path / "second.safetensors"))
    assert same(model.state_dict(), second.averaged())
    third = Run("finediffusion", tmp_path / "second.safetensors", embedder="null").steps(1)
    model, _ = load_adapted(third.save(tmp_path / "third.safetensors"))
    assert same(model.state_dict(), third.averaged())
    state = third.save_state(tmp_path / "0000001.safetensors")
    again = Run("finediffusion", embedder="null").go_on_from(state)
    assert same(again.everything(), third.everything())


def test_half_precision_adapters(plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    path = run.save(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    assert same(read_weights(path)[0], {name: average.bfloat16() for name, average in run.ema.average.items()})
    halved = {name: average.bfloat16().float() for name, average in run.ema.average.items()}
    assert same(load_adapted(path)[0].state_dict(), run.averaged() | halved)


def test_a_fine_tune_of_a_fine_tune(plain, tmp_path):
    first = Run("finediffusion", plain).steps(1)
    path = first.save(tmp_path / "first.safetensors")
    again = Run("finediffusion", path)
    assert same(again.model.state_dict(), first.averaged()) and again.description.base == first.description.base
    # BitFit leaves the norms that the first one trained: its base is the first adapter, on the DiT
    second = Run("bitfit", path, embedder="tiered").steps(1)
    assert second.description.base == Base(str(path), sha256(path))
    for run in (again.steps(1), second):
        last = run.save(tmp_path / "last.safetensors")
        assert same(load_adapted(last)[0].state_dict(), run.averaged()) and same(
            load_full_weights(last)[0], run.averaged()
        )


def test_the_base_is_the_same_file_wherever_it_is(plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    path, moved = run.save(tmp_path / "adapter.safetensors"), tmp_path / "moved.pt"
    plain.rename(moved)
    with refusal("adapter.safetensors needs its base dit.pt, but there is no .*dit.pt", "--base"):
        load_adapted(path)
    with refusal("but there is no .*absent.pt"):
        load_adapted(path, tmp_path / "absent.pt")
    assert same(load_adapted(path, moved)[0].state_dict(), run.averaged())
    tensors = torch.load(moved, weights_only=True)
    tensors["final_layer.linear.bias"][0] += 1e-6
    torch.save(tensors, moved)
    with refusal("moved.pt is not the base of", r"adapter.safetensors \(SHA-256", "file it was trained from"):
        load_adapted(path, moved)


def test_an_adapter_of_another_model(plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    path = run.save(tmp_path / "adapter.safetensors")
    with refusal("adapter.safetensors does not fit this model", "of another shape", r"\(32\), here \(64\)|32,\), here"):
        Run("finediffusion", path, model="wide")
    with refusal("does not fit this model", "unexpected blocks.0.gamma_attn"):
        Run("finediffusion", Run("difffit", plain).save(tmp_path / "difffit.safetensors"))
    run.change(model="wide")
    with refusal("adapter.safetensors does not fit this model", "of another shape"):
        load_adapted(run.save(path))


def test_files_of_another_kind(plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    adapter, state = run.save(tmp_path / "adapter.safetensors"), run.save_state(tmp_path / "state.safetensors")
    assert not is_adapter(state)
    for path in (plain, state):
        with refusal(f"{path.name} is not an adapter, expected one that train.py wrote"):
            load_adapted(path)
    with refusal("adapter.safetensors is not a training state, expected one that train.py wrote"):
        latest_valid_state([adapter])
    with refusal("state.safetensors is a training state, expected weights or an adapter"):
        Run("finediffusion", state)
    with refusal("adapter.safetensors is not a training state of this model and method"):
        run.load(adapter, *read_weights(adapter))


# ---- training states --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["finediffusion", "full", "difffit-orig"])
def test_a_training_that_is_continued_is_the_training(method, plain, tmp_path):
    run = Run(method, plain).steps(2)
    path = run.save_state(tmp_path / "state.safetensors")
    before = run.everything()
    other = Run(method, seed=1).go_on_from(path)
    assert other.description == run.description and same(other.everything(), before)
    run.steps(1), other.steps(1)
    assert same(other.everything(), run.everything()) and not same(run.everything(), before)
    other.save_state(path)  # the file it was read from
    assert same(Run(method, seed=1).go_on_from(path).everything(), run.everything())


def test_a_state_holds_what_is_trained_alone(plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    tensors, _ = read_weights(run.save_state(tmp_path / "state.safetensors"))
    kinds = {kind: {n.removeprefix(kind) for n in tensors if n.startswith(kind)} for kind in ("now/", "average/")}
    assert kinds == {"now/": set(run.chosen), "average/": set(run.chosen)} and len(tensors) == 4 * len(run.chosen) + 2
    assert not any(kind_of(name) in ("matrix", "fixed") for name in kinds["now/"])


@pytest.mark.parametrize("other", [dict(method="bitfit", embedder="tiered"), dict(model="wide"), dict(embedder="null")])
def test_states_of_another_run(other, plain, tmp_path):
    path = Run("finediffusion", plain).steps(1).save_state(tmp_path / "state.safetensors")
    run = Run(**{"method": "finediffusion"} | other).steps(1)
    before = run.everything()
    with refusal("state.safetensors is not a training state of this model and method: resume with the settings"):
        run.load(path, *read_weights(path))
    assert same(run.everything(), before)


@pytest.mark.parametrize(
    "key, value",
    [("model", "wide"), ("image_size", 32), ("method", "bitfit"), ("embedder", "null"), ("hierarchy", VETS)],
)
def test_settings_that_a_state_was_not_begun_with(key, value, plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    _, _, saved = latest_valid_state([run.save_state(tmp_path / "state.safetensors")])
    check_same_run("here.safetensors", saved, replace(run.description, step=0), allow_changes=False)
    flag = f"--{key.replace('_', '-')}"
    for allow in (False, True):
        with refusal(f"here.safetensors was started with {flag}", "resume with the settings it was started"):
            check_same_run("here.safetensors", saved, replace(run.description, **{key: value}), allow)


def test_changes_that_decide_the_numbers_need_a_flag(plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    _, _, saved = latest_valid_state([run.save_state(tmp_path / "state.safetensors")])
    now = replace(run.description, data="other", settings=run.description.settings | {"lr": 0.5})
    with refusal(r"was started with --lr None \(now 0.5\), other images or labels: resume", "--allow-changes"):
        check_same_run("here.safetensors", saved, now, allow_changes=False)
    check_same_run("here.safetensors", saved, now, allow_changes=True)


def test_a_model_to_train_or_to_sample_from_needs_the_map_of_parents(tmp_path):
    run = Run("finediffusion")
    unknown = replace(run.description, hierarchy=Hierarchy(PETS.classes, PETS.superclasses, None, "pets"))
    with refusal("pets has the names of classes and superclasses, but not"):
        build_model(unknown)
    sizes = {name: p.shape for name, p in run.model.named_parameters()}
    assert {name: p.shape for name, p in build_model(unknown, counts_only=True).named_parameters()} == sizes


def test_a_state_whose_base_is_another_file_now(plain, tmp_path):
    run = Run("finediffusion", plain).steps(1)
    path = run.save_state(tmp_path / "state.safetensors")
    plain.write_bytes(b"")
    with refusal("dit.pt is not the base of", "state.safetensors"):
        Run("finediffusion").go_on_from(path)
