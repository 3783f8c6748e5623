"""The training command: dry run, files of a run, trained parameters, resumed runs, starting weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_files import tree, write_images
from helpers.tiny_runs import DEFAULT_AVERAGE, SPEEDS, TINY
from PIL import Image

import train
from checkpoint.description import Base
from checkpoint.format import read_weights
from checkpoint.loading import TABLE, load_adapted, sha256
from tools import encode_latents
from training.folder import resolve_run_dir
from training.step import draw_step_noise

ROOT = Path(train.__file__).parent
ROW = set("step loss mse vb loss_q1 loss_q2 loss_q3 loss_q4 grad_norm lr skipped_steps".split())
ROW |= set(SPEEDS)
VAE = ["--vae", str(ROOT / "examples/glyphs/vae"), "--image-size", "64", "--resume", "none"]


@pytest.fixture(scope="module")
def run(command, images, base, tmp_path_factory):
    """run(name, *flags) -> the folder of a run of two steps from `base` on `images`."""
    root = tmp_path_factory.mktemp("runs")

    def run(name, *flags, data=("--data-path", images), tiny=TINY):
        start = ["--resume", base, "--results-dir", root, "--experiment", name, "--max-steps", 2]
        result = command(train.main, *tiny, *data, *start, *flags)
        assert result.code == 0, result.err
        assert result.out.endswith("safetensors\n") and Path(result.out.split("\n")[-2]).is_file()
        return root / name

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.PREVIEW, "steps", 2)
        yield run


def last(folder, kind="states"):
    return max(folder.glob(f"{kind}/*.safetensors"))


def state_of(folder):
    return read_weights(last(folder))[0]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder):
    return (folder / "log.txt").read_text()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the dry run ---------------------------------------------------------------------------------

PLAIN, TIERED = 685_628_960, 685_640_480  # all parameters, with 1 null row or 11 superclass rows


@pytest.mark.parametrize(
    "flags, total, trained",
    [
        ("--method full", PLAIN, 685_202_720),
        ("--method bitfit", PLAIN, 12_010_784),
        ("--method difffit", PLAIN + 2 * 28, 12_142_168),
        # BitFit's, 56 affine LayerNorms of the blocks, and 6 x 1152 gammas in each of 14 blocks
        ("--method difffit-orig", PLAIN + 14 * 6 * 1152, 12_010_784 + 56 * 2 * 1152 + 14 * 6 * 1152),
        ("", TIERED, 12_153_632),
        ("--image-size 512", 686_525_216, 12_153_632),
        ("--hierarchy vegfru", TIERED - (10_011 - 317) * 1152, 986_144),
        ("--method bitfit --embedder tiered", TIERED, 12_010_784 + 10 * 1152),
        ("--null-prob 0.1", TIERED + 1152, 12_153_632 + 1152),
        # each block's qkv: 1152 -> 3456; proj: 1152 -> 1152; fc1 and fc2: 1152 <-> 4608; modulation: 1152 -> 6912
        ("--method lora --lora-targets qkv", PLAIN + 28 * 8 * 4608, 10_001 * 1152 + 28 * 8 * 4608),
        (
            "--method finediffusion+lora --lora-rank 4",
            TIERED + 28 * 4 * (4608 + 2304 + 2 * 5760 + 8064),
            12_153_632 + 28 * 4 * (4608 + 2304 + 2 * 5760 + 8064),
        ),
    ],
)
def test_dry_run_counts_without_data(flags, total, trained, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command(train.main, "--dry-run", *flags.split())
    assert (result.code, result.err, tree(tmp_path)) == (0, "", {})
    settings = json.loads(result.out)
    assert (settings["total_params"], settings["trainable_params"]) == (total, trained)
    assert settings["trainable_percent"] == pytest.approx(100 * trained / total, abs=1e-4)
    assert settings["lr"] == settings["table_lr"] == (1e-3 if "orig" in flags else 1e-4)
    assert settings["num_classes"] == (292 if "vegfru" in flags else 10_000)
    null = ("full", "bitfit", "difffit", "difffit-orig", "lora")
    assert settings["embedder"] == ("null" if settings["method"] in null and "tiered" not in flags else "tiered")
    flags = {"data_path", "ema_decay", "flip", "global_batch_size", "image_size", "method", "num_super_classes", "vae"}
    assert flags <= settings.keys()


# ---- what a run writes ---------------------------------------------------------------------------


def test_files_of_a_run(command, images, base, tmp_path, run):
    for number in (0, 1):
        result = command(
            train.main,
            *TINY,
            *("--data-path", images, "--resume", base, "--results-dir", tmp_path),
            *("--epochs", 1, "--log-every", 2, "--ckpt-every", 3),
        )
        assert result.code == 0, result.err
        folder = tmp_path / f"00{number}-DiT-Ti-2-finediffusion"
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        numbered = {
            f"{kind}/000000{step}.{suffix}"
            for step in (3, 5)
            for kind, suffix in (("adapters", "safetensors"), ("states", "safetensors"), ("samples", "png"))
        }
        assert files == numbered | {"args.json", "log.txt", "metrics.jsonl"}
    assert [row["step"] for row in metrics(folder)] == [2, 4, 5]  # 20 images in batches of 4: an epoch is 5 steps
    for row in metrics(folder):
        assert row.keys() == ROW and row["lr"] == 1e-3 and row["skipped_steps"] == 0
        assert row["images_per_s"] == pytest.approx(4 * row["steps_per_s"]) and row["memory_gb"] > 0.1
        assert row["grad_norm"] > 0
        assert row["loss"] == pytest.approx(row["mse"] + row["vb"], rel=1e-5) and row["mse"] > 0
    lines = (folder / "log.txt").read_text().splitlines()
    assert len(lines) == 7 and "finediffusion, 23,064 trained parameters, 20 images, Hierarchy(pets: 5 / 2)" in lines[0]
    assert "memory: about " in lines[1]
    assert json.loads((folder / "args.json").read_text())["epochs"] == 1
    with Image.open(folder / "samples/0000005.png") as grid:
        assert grid.size == (4 * 10 + 2, 2 * 10 + 2)  # five classes of 8 pixels in rows of four
    shutil.rmtree(tmp_path / "000-DiT-Ti-2-finediffusion")
    folder, states = resolve_run_dir(tmp_path, None, None, "DiT-Ti-2-full")
    assert (folder.name, states) == ("002-DiT-Ti-2-full", [])  # a number is not used twice


def start_of(base, name, shape, method):
    """Return the starting value of a parameter of a new run; None for the class table."""
    if name in base:
        return base[name] if base[name].shape == shape else None
    if "lora" in name:
        return torch.zeros(shape) if name.endswith("lora_B") else None
    assert ".norm" in name or "gamma_" in name and method.startswith("difffit")
    return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)


def test_null_prob_trains_a_null_row(run):
    folder = run("null-row", "--null-prob", 0.5, "--lr", 0.1)
    model, description = load_adapted(last(folder, "adapters"))
    assert description.null_row and model.y_embedder.has_null
    moved = state_of(folder)[f"exp_avg/{TABLE}"].abs().sum(1)
    assert len(moved) == 5 + 2 + 1 and moved[-1] > 0


TRAINED = {
    "finediffusion": lambda name: name.endswith("bias") or ".norm" in name,
    "full": lambda name: ".norm" not in name and name != "pos_embed",
    "bitfit": lambda name: name.endswith("bias") and ".norm" not in name,
    "difffit": lambda name: name.endswith("bias") or ".norm" in name or "gamma" in name,
    "difffit-orig": lambda name: (
        "norm_final" not in name and (name.endswith("bias") or "norm" in name or "gamma" in name)
    ),
    "lora": lambda name: "lora" in name,
    "finediffusion+lora": lambda name: name.endswith("bias") or ".norm" in name or "lora" in name,
}


@pytest.mark.parametrize("method", TRAINED)
def test_a_method_changes_exactly_its_parameters(method, run, base):
    folder = run(method, "--method", method)
    model, description = load_adapted(last(folder, "adapters"))
    weights, start, averages = model.state_dict(), torch.load(base), state_of(folder)
    moved = set()
    for name, tensor in weights.items():
        before = start_of(start, name, tensor.shape, method)
        assert before is not None or name == TABLE or name.endswith("lora_A")
        if before is None or not torch.equal(tensor, before):
            moved.add(name)
    assert moved == {name for name in weights if TRAINED[method](name) or name == TABLE}
    assert len(weights[TABLE]) == 5 + (2 if method.startswith("finediffusion") else 1)
    assert description.step == 2 and description.trained == moved
    assert description.base == Base(str(base), sha256(base))
    # base + adapter is the EMA model, bit for bit
    averages = {n.removeprefix("average/"): t for n, t in averages.items() if n.startswith("average/")}
    assert averages.keys() == moved and all(torch.equal(weights[name], averages[name]) for name in moved)


def test_the_ema_is_updated_at_every_step(run):
    folder = run("average", "--max-steps", 3, "--ckpt-every", 1, "--lr", 0.1)
    first, *later = (read_weights(path)[0] for path in sorted(folder.glob("states/*")))
    average = {name: tensor for name, tensor in first.items() if name.startswith("average/")}
    assert len(later) == 2
    for state in later:
        for name in average:
            average[name] = 0.5 * average[name] + 0.5 * state[name.replace("average/", "now/")]
            assert torch.allclose(state[name], average[name], rtol=1e-5, atol=1e-7)


def test_a_short_run_warms_its_average_up_and_a_resumed_one_does_as_before(run):
    """The default depends on the length of a new run; a longer run that resumes keeps the one of its state."""
    flags = "--ema-decay", 0.9, "--preview-images", 0
    folder = run("warm", "--max-steps", 3, *flags, tiny=DEFAULT_AVERAGE)
    assert read_weights(last(folder))[1].settings["ema_warmup"] == 25
    assert "at most (1 + k) / (25 + k) at step k; without this limit it would keep 73% of the s" in log(folder)
    first = state_of(folder)
    state = state_of(run("warm", "--max-steps", 4, *flags, tiny=DEFAULT_AVERAGE))
    decay = 4 / 28  # of step 3
    for name in [name for name in first if name.startswith("average/")]:
        expected = decay * first[name] + (1 - decay) * state[name.replace("average/", "now/")]
        assert torch.allclose(state[name], expected, rtol=1e-5, atol=1e-7)
    cold = run("cold", "--max-steps", 3, *flags, "--ema-warmup", 0, tiny=DEFAULT_AVERAGE)
    assert "EMA: decay 0.9, which keeps 73% of the starting weights after 3 steps: for better" in log(cold)
    branch = run("branch", "--max-steps", 3, *flags, "--resume", cold, tiny=DEFAULT_AVERAGE)
    assert same(state_of(branch), state_of(cold)) and read_weights(last(branch))[1].settings["ema_warmup"] == 0


def test_random_draws_depend_on_seed_and_step_alone():
    def draw(seed, step, flip=True, dropout=0.1, null=0.0):
        return draw_step_noise(seed, step, 2000, (1, 2, 2), flip, dropout, null, "cpu")

    assert same(draw(0, 3), draw(0, 3))
    for other in (draw(1, 3), draw(0, 4), draw(3, 0)):
        assert not any(torch.equal(draw(0, 3)[name], other[name]) for name in other)
    r = draw(0, 3)
    assert r["t"].min() == 0 and r["t"].max() == 999 and not torch.equal(r["noise"], r["posterior"])
    assert r["flip"].float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert r["drop"].float().mean().item() == pytest.approx(0.1, abs=0.03) and r["drop"].max() == 1
    with_null = draw(0, 3, null=0.2)
    assert (with_null["drop"] == 2).float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert torch.equal(with_null["drop"] == 1, r["drop"] == 1) and torch.equal(with_null["noise"], r["noise"])
    assert not draw(0, 3, flip=False)["flip"].any() and (draw(0, 3, dropout=1, null=0.5)["drop"] == 1).all()


def test_class_folders_without_superclasses_share_a_null_class(run, images):
    folder = run("flat", "--lr", 0.1, "--preview-images", 0, data=("--data-path", images / "dogs"))
    model, description = load_adapted(last(folder, "adapters"))
    assert description.hierarchy.superclasses == ("null",) and description.hierarchy.num_classes == 3
    moved = state_of(folder)[f"exp_avg/{TABLE}"].abs().sum(1)
    assert len(moved) == 3 + 1 and model.y_embedder.superclass_rows(torch.arange(3)).tolist() == [3, 3, 3]
    assert "have no superclasses, so one null class takes their place: to add superclasses, arrange" in log(folder)


# ---- equal results another way -------------------------------------------------------------------


def test_a_resumed_run_equals_the_uninterrupted_one(run):
    unbroken = state_of(run("unbroken", "--max-steps", 7))  # beyond the end of an epoch
    stopped = run("stopped", "--max-steps", 3)
    assert not same(state_of(stopped), unbroken)
    for name, source in (("folder", stopped), ("state", stopped / "states/0000003.safetensors")):
        assert same(state_of(run(name, "--max-steps", 7, "--resume", source)), unbroken)  # a branch
    run("stopped", "--max-steps", 7)  # the same command
    assert same(state_of(stopped), unbroken)
    assert [row["step"] for row in metrics(stopped)] == [3, 7]
    run("stopped", "--max-steps", 7)  # nothing left to do
    assert same(state_of(stopped), unbroken) and len(metrics(stopped)) == 2


def test_random_weights_depend_on_the_seed_alone(run):
    flags = "--resume", "none", "--method", "bitfit"
    unbroken = run("random", *flags)
    torch.manual_seed(123)  # other draws of the process do not matter
    run("random-stopped", *flags, "--max-steps", 1)
    stopped = run("random-stopped", *flags)
    assert same(state_of(stopped), state_of(unbroken))
    whole = [load_adapted(last(folder, "adapters"))[0].state_dict() for folder in (unbroken, stopped)]
    assert same(*whole)
    other = run("random-other", *flags, "--global-seed", 1)
    assert not torch.equal(
        read_weights(last(other, "adapters"))[0]["blocks.0.attn.qkv.weight"], whole[0]["blocks.0.attn.qkv.weight"]
    )


def assert_same_losses(a, b, rel):
    assert len(metrics(a)) == len(metrics(b)) > 0
    for left, right in zip(metrics(a), metrics(b)):
        assert left["step"] == right["step"]
        assert [left[k] for k in ("loss", "mse", "vb")] == pytest.approx(
            [right[k] for k in ("loss", "mse", "vb")], rel=rel
        )


def test_cached_latents_give_the_losses_of_the_autoencoder(run, command, images64, tmp_path):
    result = command(
        encode_latents.main, "--data-path", images64, "--out", tmp_path / "latents", *VAE[:4], "--num-workers", 0
    )
    assert result.code == 0, result.err
    flags = *VAE, "--method", "full", "--max-steps", 4, "--log-every", 1
    looped = run("looped", *flags, data=("--data-path", images64))
    cached = run("cached", *flags, data=("--latents", tmp_path / "latents"))
    assert_same_losses(cached, looped, 1e-3)
    other = run("other", *flags, "--global-seed", 1, data=("--latents", tmp_path / "latents"))
    with pytest.raises(AssertionError):  # the comparison detects another seed
        assert_same_losses(other, looped, 1e-3)


# ---- where a run starts --------------------------------------------------------------------------

STILL = "--lr", "1e-30"  # changes nothing: the loaded weights are written back


def test_starts_from_an_official_checkpoint(run, official):
    folder = run("official", "--resume", official, *STILL, "--table-init", "keep")
    weights, record = (
        load_adapted(last(folder, "adapters"))[0].state_dict(),
        torch.load(official, weights_only=False),
    )
    assert same(weights, record["ema"])  # its class table too, which it does not describe


def test_starts_from_an_adapter(run, adapter, base, tmp_path):
    folder = run("adapted", "--resume", adapter, *STILL)
    before, after = read_weights(adapter), read_weights(last(folder, "adapters"))
    assert same(before[0], after[0]) and before[1].base == after[1].base
    # other classes: a new table, N(0, std^2); the rest is the adapter's
    fewer = write_images(tmp_path / "fewer", 8, {"birds": ("crow", "wren"), "fish": ("carp",)})
    folder = run("fewer", "--resume", adapter, *STILL, "--table-std", 3, data=("--data-path", fewer))
    tensors, description = read_weights(last(folder, "adapters"))
    table = tensors.pop(TABLE)
    assert table.shape == (5, 256) and table.std().item() == pytest.approx(3, rel=0.1)
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert description.hierarchy.superclasses == ("birds", "fish")
