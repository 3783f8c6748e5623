"""Fine-tuning methods: trained parameters and the effect of a step; DiffFit's gammas; the moving average."""

import copy
import json

import pytest
import torch
from helpers.tiny_models import GOLDEN, awake, described, tiny_dit
from torch.testing import assert_close

from checkpoint.loading import TABLE, build_model
from diffusion import create_diffusion
from finetune import (
    EMA,
    LORA_LAYERS,
    METHODS,
    add_gammas,
    add_lora,
    default_warmup,
    fold_gammas,
    fold_lora,
    kind_of,
    merge_lora,
    select,
    store_frozen,
)
from hierarchy import Hierarchy

SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())


def meta_xl(method, hierarchy="inat2021", latent_size=32):
    sizes = dict(model="DiT-XL/2", latent_size=latent_size, channels=4)
    description = described(Hierarchy.load(hierarchy), method, **sizes)
    with torch.device("meta"):
        return build_model(description, counts_only=True)


def method_model(method, seed=0):
    """Return a tiny DiT as the method needs it, without zeros in its parameters, and the parameters that it trains."""
    torch.manual_seed(seed)
    null = METHODS[method].embedder == "null"
    model = tiny_dit(num_super_classes=1, parents=None) if null else tiny_dit()
    add_gammas(model, METHODS[method].gammas)
    if "lora" in METHODS[method].trains:
        add_lora(model, 2, ["all"])
    return awake(model, seed), select(model, METHODS[method])


def count(parameters):
    return sum(p.numel() for p in parameters.values())


# ---- DiT-XL/2 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, trained, total",
    [
        ("finediffusion", 12_153_632, 685_640_480),
        ("full", 685_202_720, None),
        ("bitfit", 12_010_784, None),
        ("difffit", 12_142_168, None),
        # BitFit, the norms of 28 blocks (4D each), and the gammas of 14 blocks (3D + D + D + D); D = 1152
        ("difffit-orig", 12_010_784 + 28 * 4 * 1152 + 14 * 6 * 1152, None),
    ],
)
def test_trained_parameters_on_inaturalist(method, trained, total):
    model = meta_xl(method)
    chosen = select(model, METHODS[method])
    assert count(chosen) == trained
    assert count({name: p for name, p in model.named_parameters() if p.requires_grad}) == trained
    assert total in (None, count(dict(model.named_parameters())))
    assert chosen[TABLE].shape == ((10011 if METHODS[method].embedder == "tiered" else 10001), 1152)


def test_trained_parameters_on_vegfru():
    assert count(select(meta_xl("finediffusion", "vegfru"), METHODS["finediffusion"])) == 986_144


@pytest.mark.parametrize("rank, trained", [(8, 1_149_696), (16, 2_181_888)])
def test_low_rank_updates_as_difffit_counts_them(rank, trained):
    """A table of 102 rows and updates of qkv: the rows of LoRA in DiffFit's comparison."""
    cars = Hierarchy([str(i) for i in range(101)], ["null"], [0] * 101)
    with torch.device("meta"):
        model = build_model(
            described(cars, "lora", model="DiT-XL/2", latent_size=32, lora_rank=rank, lora_targets="qkv")
        )
    assert count(select(model, METHODS["lora"])) == trained


@pytest.mark.parametrize("name, latent_size", [("DiT-XL/2", 32), ("DiT-XL/2-512", 64)])
def test_finediffusion_trains_the_official_parameters(name, latent_size):
    chosen = select(meta_xl("finediffusion", latent_size=latent_size), METHODS["finediffusion"])
    assert sorted(chosen) == sorted(SHAPES[name]["trainable"]) and count(chosen) == SHAPES[name]["trainable_count"]


def test_gammas_of_dit_xl():
    scalar, vector = (
        {n: tuple(p.shape) for n, p in meta_xl(method).named_parameters() if kind_of(n) == "gamma"}
        for method in ("difffit", "difffit-orig")
    )
    assert scalar == {f"blocks.{i}.gamma_{part}": () for i in range(28) for part in ("attn", "mlp")}
    widths = {"qkv": 3 * 1152, "proj": 1152, "attn": 1152, "mlp": 1152}
    assert vector == {f"blocks.{i}.gamma_{part}": (width,) for i in range(14) for part, width in widths.items()}


# ---- effect of a step ----------------------------------------------------------------------------


def train_step(model, labels):
    """Make one AdamW step on every parameter that gets a gradient: `requires_grad` alone decides which."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(5)
    x, noise = torch.randn(2, len(labels), 4, 8, 8, generator=generator)
    t = torch.linspace(1, 900, len(labels)).long()
    inputs = {"y": labels, "force_drop_ids": torch.zeros(len(labels))}
    create_diffusion("").training_losses(model.train(), x, t, inputs, noise)["loss"].mean().backward()
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_exactly_the_trained_parameters(method):
    model, chosen = method_model(method)
    before = copy.deepcopy(model.state_dict())
    train_step(model, torch.arange(model.y_embedder.embedding_table.num_embeddings))  # every row
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == set(chosen)
    assert (model.state_dict()[TABLE] != before[TABLE]).any(1).all()


def test_table_rows_without_images_stay():
    model, _ = method_model("finediffusion")
    before = model.state_dict()[TABLE].clone()
    train_step(model, torch.tensor([1, 1, 3, 6]))
    changed = (model.state_dict()[TABLE] != before).any(1)
    assert changed.nonzero().flatten().tolist() == [1, 3, 6]


@pytest.mark.parametrize("method", METHODS)
def test_a_new_selection_replaces_the_old_one(method):
    model, chosen = method_model(method)
    select(model, METHODS["bitfit"])
    again = select(model, METHODS[method])
    assert again.keys() == chosen.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(again[name] is p for name, p in model.named_parameters() if name in again)


def test_a_method_without_matching_parameters_is_refused():
    with pytest.raises(AssertionError, match="gamma"):
        select(tiny_dit(), METHODS["difffit"])


# ---- low-rank updates ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["none", "scalar", "vector"])
@pytest.mark.parametrize("targets", LORA_LAYERS)
def test_low_rank_updates_change_nothing_at_first_and_merge_exactly(targets, form):
    model = tiny_dit()
    add_gammas(model, form)
    awake(model)
    expected = forward(model)
    add_lora(model, 3, [targets])
    assert forward(model).equal(expected)
    awake(model, 1)
    adapted, shapes = forward(model), {name: p.shape for name, p in tiny_dit().state_dict().items()}
    assert (adapted - expected).abs().mean() > 1e-3
    plain = tiny_dit()  # has neither updates nor factors
    merged = [fold_gammas(fold_lora(model.state_dict())), fold_lora(fold_gammas(model.state_dict()))]
    for tensors in merged:
        assert {name: t.shape for name, t in tensors.items()} == shapes
        plain.load_state_dict(tensors)
        assert_close(forward(plain), adapted, atol=1e-5, rtol=1e-5)
    merge_lora(model)
    assert_close(forward(model), adapted, atol=1e-5, rtol=1e-5)
    assert not any(kind_of(name) == "lora" for name in model.state_dict())


def test_low_rank_update_against_its_formula():
    model = awake(tiny_dit())
    add_lora(model, 3, ["mlp"])
    layer = awake(model, 1).blocks[0].mlp.fc1
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    expected = x @ (layer.weight + layer.lora_B @ layer.lora_A).T + layer.bias
    assert_close(layer(x), expected)
    assert isinstance(model.blocks[1].attn.qkv, torch.nn.Linear) and not hasattr(model.blocks[1].attn.qkv, "lora_A")


# ---- DiffFit's gammas ----------------------------------------------------------------------------


def forward(model):
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x, torch.tensor([0, 9, 500, 999]), torch.tensor([0, 1, 4, 2]))


@pytest.mark.parametrize("form", ["scalar", "vector"])
def test_gammas_of_one_change_nothing(form):
    model = awake(tiny_dit())
    expected = forward(model)
    add_gammas(model, form)
    assert forward(model).equal(expected)
    assert all((p == 1).all() for name, p in model.named_parameters() if kind_of(name) == "gamma")


def scale_(linear, gamma):
    linear.weight.mul_(gamma.reshape(-1, 1))
    linear.bias.mul_(gamma)


@pytest.mark.parametrize("form", ["scalar", "vector"])
@torch.no_grad()
def test_gammas_scale_the_output_of_their_layer(form):
    """Fold each gamma into the linear layer whose output it scales: weight and bias are multiplied by it."""
    folded, model = awake(tiny_dit()), awake(tiny_dit())
    folded.load_state_dict(model.state_dict())
    plain = forward(model)
    add_gammas(model, form)
    generator = torch.Generator().manual_seed(2)
    for block, scaled in zip(model.blocks, folded.blocks):
        layers = {"qkv": scaled.attn.qkv, "proj": scaled.attn.proj, "attn": scaled.attn.proj, "mlp": scaled.mlp.fc2}
        for name, layer in layers.items():
            if (gamma := getattr(block, f"gamma_{name}", None)) is not None:
                gamma.copy_(1 + 0.5 * torch.randn(gamma.shape, generator=generator))
                scale_(layer, gamma)
    out = forward(model)
    assert_close(out, forward(folded), rtol=1e-4, atol=1e-5)
    assert (out - plain).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["scalar", "vector"])
@torch.no_grad()
def test_a_copy_of_the_model_owns_its_gammas(form):
    model = tiny_dit()
    add_gammas(model, form)
    copied = copy.deepcopy(awake(model))
    expected = forward(model)
    assert copied.state_dict().keys() == model.state_dict().keys() and forward(copied).equal(expected)
    for name, p in model.named_parameters():
        if kind_of(name) == "gamma":
            p.zero_()
    assert forward(copied).equal(expected) and not forward(model).equal(expected)
    copied.load_state_dict(model.state_dict(), assign=True)  # other tensors in the place of the parameters
    assert forward(copied).equal(forward(model))


@pytest.mark.parametrize("form", ["scalar", "vector"])
def test_a_compiled_model_applies_its_gammas_after_one_without(form):
    """Blocks share graphs, but one with factors does not use the graph of one without. "vector" has both in one model."""
    graphs = []

    def backend(graph, _):  # the same for all models: graphs are shared only within a backend
        graphs.append(graph)
        return graph.forward

    try:
        for seed, used in enumerate(("none", form, form)):
            model = tiny_dit(depth=16)
            add_gammas(model, used)
            expected = forward(awake(model, seed))
            model.compile_blocks(backend=backend)
            assert forward(model).equal(expected)
        assert len(graphs) == 3  # two of blocks, and the final layer's
    finally:
        torch.compiler.reset()


# ---- the moving average --------------------------------------------------------------------------


def test_the_average_follows_its_formula():
    model, chosen = method_model("finediffusion")
    ema, expected = EMA(chosen, 0.9), {name: p.detach().double() for name, p in chosen.items()}
    for step in range(5):
        awake(model, seed=step)
        ema.update(step)
        expected = {name: 0.9 * average + 0.1 * chosen[name].detach() for name, average in expected.items()}
    assert ema.average.keys() == chosen.keys()
    for name, average in ema.average.items():
        assert average.dtype == torch.float32 and not average.requires_grad
        assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay, follows", [(0.0, True), (1.0, False)])
def test_decays_of_0_and_1(decay, follows):
    model, chosen = method_model("bitfit")
    ema, first = EMA(chosen, decay), {name: p.detach().clone() for name, p in chosen.items()}
    awake(model, seed=1)
    ema.update(0)
    assert all(ema.average[name].equal(p if follows else first[name]) for name, p in chosen.items())


def test_warmup_raises_the_decay_to_its_limit():
    _, chosen = method_model("bitfit")
    warm, cold = EMA(chosen, 0.9999, warmup=10), EMA(chosen, 0.9999)
    assert [warm.decay_at(k) for k in (0, 1, 90)] == [0.1, 2 / 11, 0.91] and warm.decay_at(10**6) == 0.9999
    assert cold.decay_at(0) == 0.9999


@pytest.mark.parametrize("steps", [30, 300, 2_300, 29_955])
def test_the_average_of_a_short_run_lags_by_at_most_5_percent(steps):
    """The worst case: parameters that move at a constant speed from the first step to the last."""
    position = torch.nn.Parameter(torch.zeros(1))
    ema = EMA({"p": position}, 0.9999, default_warmup(0.9999, steps))
    for step in range(steps):
        position.data.fill_((step + 1) / steps)
        ema.update(step)
    assert ema.average["p"].item() > 0.95


def test_long_runs_do_not_warm_up():
    assert [default_warmup(0.9999, steps) for steps in (29_955, 29_956, 195_300)] == [25, 0, 0]
    assert [default_warmup(decay, 800) for decay in (0.99, 0.0, 0.9999)] == [0, 0, 25]


def test_only_frozen_matrices_are_stored_in_half_precision():
    model, chosen = method_model("finediffusion")
    store_frozen(model, torch.bfloat16)
    kinds = {name: (kind_of(name), p.dtype) for name, p in model.named_parameters()}
    assert {kind for kind, dtype in kinds.values() if dtype == torch.bfloat16} == {"matrix"}
    assert all(dtype == torch.float32 for kind, dtype in kinds.values() if kind != "matrix")
    assert all(p.dtype == torch.float32 for p in chosen.values())
    full, _ = method_model("full")
    store_frozen(full, torch.bfloat16)
    assert {p.dtype for p in full.parameters()} == {torch.float32}  # full fine-tuning trains all matrices


def test_swapping_twice_is_the_identity():
    model, chosen = method_model("finediffusion")
    ema = EMA(chosen, 0.9)
    awake(model, seed=1)
    now = copy.deepcopy(model.state_dict())
    averages = copy.deepcopy(ema.average)
    ema.swap()
    swapped = model.state_dict()
    assert all(value.equal(averages.get(name, now[name])) for name, value in swapped.items())
    assert all(ema.average[name].equal(now[name]) and not ema.average[name].equal(averages[name]) for name in averages)
    ema.swap()
    assert all(value.equal(now[name]) for name, value in model.state_dict().items())
    assert all(ema.average[name].equal(averages[name]) for name in averages)
