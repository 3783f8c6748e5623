"""Memory of a GPU: the forecast of DiT-XL/2, its advice, and running out of memory."""

import gc
import re

import pytest
import torch
from helpers.commands import call
from helpers.gpu import DEVICE, half_precision, make_trainer
from helpers.tiny_files import write_images

import sample_ddp
import train
from autoencoder import Autoencoder
from benchmarks.harness import Bench
from benchmarks.sampling_cases import random_vae
from benchmarks.training_cases import make_batch, random_dit
from finetune import METHODS, select, store_frozen
from runtime.device import DTYPES
from training import memory
from training.step import draw_step_noise, sample_posterior

pytestmark = pytest.mark.usefixtures("cuda_only")
GIB = 2**30


@pytest.fixture(autouse=True)
def all_memory():
    """Give the memory back that a test leaves or takes away."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def limit(gib):
    """Let this process allocate so much of the GPU's memory."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.mem_get_info()[1]))


class Step:
    """A training step of DiT-XL/2 and its forecast. size: side of the latents; vae: encode images of 8 * size pixels."""

    def __init__(self, size: int, half: str, checkpointing: bool = False, compiled: bool = False, vae: bool = False):
        self.bench, self.size, self.vae = Bench("cuda", half=half), size, None
        self.model = random_dit(self.bench, "DiT-XL/2", size)
        self.model.grad_checkpointing = checkpointing
        parameters = select(self.model, METHODS["finediffusion"])
        store_frozen(self.model, DTYPES[half])
        trainer = make_trainer(self.model, half)
        activations, encoding = memory.activation_bytes(self.model, trainer.accelerator.autocast), 0
        if vae:
            self.vae = Autoencoder(random_vae(self.bench).to(DTYPES[half]), 1.0)
            encoding = memory.encoder_bytes(self.vae.vae, 8 * size)
        own_vae = self.vae and self.vae.vae
        self.forecast = memory.forecast(self.model, parameters, activations, own_vae, encoding)
        self.trainer = trainer
        if compiled:
            self.model.compile_blocks()
        torch.cuda.empty_cache()  # train.py builds the model on the CPU

    def says(self, images: int, gib: float) -> str:
        """Return the sentence about a GPU with so much memory."""
        return memory.describe_forecast(self.forecast, images, int(gib * GIB))

    def run(self, images: int, steps: int = 2) -> tuple[int, int]:
        """Return the largest memory allocated and reserved in the last of some steps."""
        moments, _, labels, pictures = make_batch(self.bench, images, self.size, 8 * self.size if self.vae else None)
        x = (pictures if self.vae else moments).to(DEVICE)
        noise = draw_step_noise(0, 0, images, (4, self.size, self.size), True, 0.1, 0.0, DEVICE)
        for _ in range(steps):
            torch.cuda.reset_peak_memory_stats()
            self.trainer.step(Latents(x, noise, self.vae), labels, noise)
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


class Latents:
    """Latents that are encoded when a part of them is asked for, as in train.py."""

    def __init__(self, x, noise, autoencoder):
        self.x, self.noise, self.autoencoder = x, noise, autoencoder

    def to(self, *place, **options):
        return self

    def __getitem__(self, rows):
        return sample_posterior(self.x[rows], self.noise["flip"][rows], self.noise["posterior"][rows], self.autoencoder)


@pytest.fixture
def make_step():
    """make_step(...) -> Step, whose memory is free again after the test, even if it fails and its frames stay."""
    made = []

    def make(*sizes, **options):
        made.append(Step(*sizes, **options))
        return made[-1]

    yield make
    for step in made:
        vars(step.trainer).clear()
        vars(step).clear()


CASES = {
    "256 pixels": (64, dict(size=32)),
    "512 pixels": (16, dict(size=64)),
    "256 pixels, float32": (16, dict(size=32, half="no")),
    "checkpointing": (64, dict(size=32, checkpointing=True)),
    "autoencoder at 256": (64, dict(size=32, vae=True)),
    "autoencoder at 512": (16, dict(size=64, vae=True)),
    "compiled": (64, dict(size=32, compiled=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_forecast(make_step, case, record_property):
    """A step takes the forecast memory within 5%, and what is reserved fits what is called enough.

    It takes up to 20% less if compiled, and with checkpointing up to 10% more: gradients count beside so few activations.
    """
    images, options = CASES[case]
    step = make_step(**{"half": half_precision()} | options)
    need = sum(step.forecast.need(images).values())
    allocated, reserved = step.run(images, steps=3 if options.get("compiled") else 2)
    gib = [round(size / GIB, 2) for size in (need, allocated, reserved)]
    record_property("memory", f"{case}: forecast {gib[0]}, allocated {gib[1]}, reserved {gib[2]} GiB")
    least, most = 0.8 if options.get("compiled") else 0.95, 1.1 if options.get("checkpointing") else 1.05
    assert least <= allocated / need <= most
    enough = next(gib for gib in range(4, 200) if "too much" not in step.says(images, gib))
    assert reserved + memory.CONTEXT <= enough * GIB


def test_advice(make_step):
    """The --micro-batch that a GPU of 24 GiB is advised runs there; half as many images more are called too much."""
    step = make_step(64, half_precision())
    advised = int(re.search(r"--micro-batch (\d+)", step.says(64, 24))[1])
    assert "too much" in step.says(advised + advised // 2 + 1, 24) and "too much" not in step.says(advised, 24)
    limit(24 - memory.CONTEXT / GIB)
    step.run(advised)


# ---- out of memory -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "pets", 256)


def train_flags(images, folder, batch, *more, vae="none", size=64):
    words = "--model DiT-Ti/2 --resume none --num-workers 0 --max-steps 2 --no-compile --data-path".split()
    sizes = ["--vae", vae, "--image-size", size, "--global-batch-size", batch]
    return [*words, images, "--results-dir", folder, *sizes, *more]


def outcome(main, *flags):
    result = call(main, *flags)
    return result.code, result.err.strip().split("\n")[-1]


def test_out_of_memory_in_a_step(images, tmp_path):
    limit(0.5)
    code, sentence = outcome(
        train.main, *train_flags(images, tmp_path, 20, "--mixed-precision", "no", "--micro-batch", 20)
    )
    assert code == 2 and "memory is full" in sentence and "--micro-batch 10" in sentence


def test_out_of_memory_in_the_autoencoder(images, tmp_path):
    """The images of a part are encoded together, and where this fails the sentence is the same."""
    folder = tmp_path / "vae"
    random_vae(Bench("cpu")).save_pretrained(folder)
    limit(1.0)
    flags = train_flags(images, tmp_path, 20, "--mixed-precision", "no", "--micro-batch", 20, vae=folder, size=256)
    code, sentence = outcome(train.main, *flags)
    assert code == 2 and "memory is full" in sentence and "--micro-batch" in sentence


def test_out_of_memory_in_the_preview(images, tmp_path, monkeypatch):
    """A preview that fails leaves the state, and the run ends well."""
    save_preview = train.save_preview

    def cramped(*arguments):
        gc.collect()
        torch.cuda.empty_cache()
        limit(0.001)
        return save_preview(*arguments)

    monkeypatch.setattr(train, "save_preview", cramped)
    code, error = outcome(train.main, *train_flags(images, tmp_path, 2, "--experiment", "run"))
    assert code == 0, error
    assert list(tmp_path.glob("run/states/*")) and "preview of step 2 failed" in (tmp_path / "run/log.txt").read_text()


def test_out_of_memory_in_sample_ddp(images, tmp_path):
    code, error = outcome(train.main, *train_flags(images, tmp_path, 2, "--experiment", "run", "--preview-images", 0))
    assert code == 0, error
    gc.collect()
    torch.cuda.empty_cache()
    limit(0.15 + torch.cuda.memory_reserved() / GIB)  # parts of segments that other tests leave in use
    flags = [
        "--ckpt",
        tmp_path / "run/adapters/0000002.safetensors",
        "--sample-dir",
        tmp_path,
        "--num-sampling-steps",
        2,
    ]
    code, sentence = outcome(sample_ddp.main, *flags, "--num-fid-samples", 256, "--per-proc-batch-size", 256)
    assert code == 2 and "memory is full" in sentence and "--per-proc-batch-size" in sentence
