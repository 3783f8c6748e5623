"""What a run says of itself: progress bar, log.txt, metrics.jsonl and trackers, and when its numbers stop being numbers.

The device is waited for only when a row is written. Until then each step leaves its images' losses on the device; a row
is computed from the losses of all processes, in float64, and so is the same however a run was cut into pieces.
"""

import json
import math
import resource
import time
from datetime import datetime

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from runtime.files import append_text, atomic_write
from runtime.processes import run_on_main
from runtime.text import shorten
from training.step import NUM_TIMESTEPS

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # --report-to: the package that has it
NOTHING = {"terms": torch.zeros(0), "norms": torch.zeros(0)}
LEAST_SCALE = 1.0  # fp16: a gradient scale below this means that every step overflows


def memory_gb(device):
    """Most memory that this process ever took, on the GPU or, without one, of the machine: GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Watch:
    """Every process has one; the main process writes.

    `batches`, `data`: which images are in a step, and their names. `kept`: what a training state has of the row of
    metrics that was begun. `stop`: at a loss or gradient that is not finite, or else pass over it. `most_unreadable`:
    so many images may be replaced by others before the run stops.
    """

    def __init__(self, accelerator, folder, batches, data, kept=None, stop=True, most_unreadable=0):
        self.accelerator, self.folder, self.batches, self.data = accelerator, folder, batches, data
        self.main, self.stop, self.most_unreadable = accelerator.is_main_process, stop, most_unreadable
        self.terms, self.norms = [], []  # of steps on the device: (4, n) and scalars, see steps.backward
        self.kept = kept or NOTHING  # of earlier steps of this row: (S, 4, B), (S,)
        self.first = batches.start_step - len(self.kept["norms"])  # the step that kept begins with
        self.replaced = set()  # numbers of images that this process could not read, since the last row
        self.unreadable = set()  # of all processes, ever
        self.paused = 0.0
        self.since = time.perf_counter()
        self.timed = batches.start_step
        run_on_main(accelerator, self.trim)

    def trim(self):
        """Take rows from metrics.jsonl that were written after the state from which the run goes on."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            good = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.first]
            if good != lines:
                atomic_write(path, lambda part: part.write_text("".join(good)))

    def say(self, text):
        """A line for a person, above the bar and in log.txt; called by all processes."""
        run_on_main(self.accelerator, self.note, text)

    def note(self, text):
        self.folder.mkdir(parents=True, exist_ok=True)
        tqdm.write(text)
        append_text(self.folder / "log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def over(self, loader):
        """The loader's batches; the bar begins with them, bar and workers end with them, before an error is said.

        The workers are deaf to SIGTERM (`Signals.leave_to_parent`), with which Python would end them, and wait for them,
        when it exits itself.
        """
        batches = iter(loader)
        steps = dict(total=self.batches.max_steps, initial=self.batches.start_step, unit="step")
        try:
            with tqdm(**steps, disable=not self.main) as self.bar:
                yield from batches
        finally:
            if loader.num_workers:
                batches._shutdown_workers()

    def add(self, terms, norm, asked, shown):
        """A step's (4, n) losses of this process and its gradient norm, left on the device.

        `asked`, `shown`: numbers of its images (n,), and of those that stand for them where they could not be read.
        """
        self.terms.append(terms)
        self.norms.append(norm.reshape(()))
        self.replaced.update(asked[asked != shown].tolist())
        self.bar.update()

    def collect(self):
        """Bring the losses of all processes together; called by all of them at the same step.

        ValueError where a loss or the gradient is not finite and the run is to stop there.
        """
        if not self.terms:
            return
        mine = torch.stack(self.terms)[None]  # (1, S, 4, n)
        terms = self.accelerator.gather(mine).cpu()  # (world, S, 4, n): ranks hold consecutive rows of the global batch
        terms = terms.permute(1, 2, 0, 3).flatten(2)  # (S, 4, B)
        norms = self.accelerator.gather(torch.stack(self.norms).float()[None]).cpu()  # (world, S), all rows alike
        norms = norms.amax(0)  # unless a process alone went wrong: NaN and infinity remain
        begun = len(self.kept["norms"])
        self.kept = {
            "terms": torch.cat([self.kept["terms"].reshape(-1, *terms.shape[1:]), terms]),
            "norms": torch.cat([self.kept["norms"], norms]),
        }
        self.terms, self.norms = [], []
        for row in range(begun, begun + len(norms)):
            self.check(row)

    def check(self, row):
        losses, norm, scaler = self.kept["terms"][row], self.kept["norms"][row], self.accelerator.scaler
        scale = scaler.get_scale() if scaler else math.inf
        bad_images = (~losses.isfinite()).any(0)
        overflow = scaler is not None and not bad_images.any()  # fp16: the scaler passed over it and halved its scale
        if norm.isfinite() and not bad_images.any() or overflow and scale >= LEAST_SCALE:
            return
        step = self.first + row
        what = "the loss" if bad_images.any() else "the gradient"
        which = bad_images.nonzero().flatten().tolist() or list(range(losses.shape[1]))
        rows = self.batches.rows(step)
        images = shorten(f"{self.data.name(rows[i])} at timestep {int(losses[3, i])}" for i in which)
        text = f"At step {step + 1} {what} is not finite (images {images})"
        if self.stop:
            raise ValueError(
                f"{text}, expected numbers: look at these images, lower --lr, pass --clip-grad 1 or another "
                "--mixed-precision and run the same command again, which goes on from the last state, or pass "
                "--on-nonfinite skip."
            )
        self.say(f"{text}: the step is passed over.")

    def check_images(self):
        """Name the images that were replaced since the last row; ValueError where too many ever were."""
        new = sorted(set(gather_object(sorted(self.replaced))) - self.unreadable)
        self.replaced.clear()
        if not new:
            return
        self.unreadable |= set(new)
        names = shorten(self.data.name(i) for i in new)
        if len(self.unreadable) > self.most_unreadable:
            raise ValueError(
                f"{len(self.unreadable)} images could not be read ({names}), expected at most {self.most_unreadable}: look for "
                "them with python -m tools.check_data, or raise --max-bad-images."
            )
        self.say(
            f"{len(self.unreadable)} images so far could not be read, and others of their classes were shown: {names}"
        )

    def write(self, step, **extra):
        """A row of metrics for the steps since the last; called by all processes at the same step."""
        self.collect()
        self.check_images()
        terms, norms = self.kept["terms"].double(), self.kept["norms"].double()
        finite = terms.isfinite().flatten(1).all(1)
        loss, mse, vb, t = terms[finite].unbind(1)
        row = {"step": step, "loss": mean(loss), "mse": mean(mse), "vb": mean(vb)}
        quartile = t.long() * 4 // NUM_TIMESTEPS
        row |= {f"loss_q{q + 1}": mean(loss[quartile == q]) for q in range(4)}
        row |= {"grad_norm": mean(norms[norms.isfinite()]), **extra}
        row["skipped_steps"] = int((~(finite & norms.isfinite())).sum())
        took = time.perf_counter() - self.since - self.paused
        rate = (step - self.timed) / max(took, 1e-9)
        row |= {
            "steps_per_s": rate,
            "images_per_s": rate * terms.shape[2],
            "memory_gb": memory_gb(self.accelerator.device),
        }
        losses = "  ".join(f"{name} {format_number(row[name])}" for name in ("loss", "mse", "vb", "grad_norm"))

        def record():
            append_text(self.folder / "metrics.jsonl", json.dumps(row) + "\n")
            self.note(f"step {step:7d}  {losses}  {rate:.2f} steps/s  {row['images_per_s']:.1f} images/s")

        run_on_main(self.accelerator, record)
        self.bar.set_postfix(loss=format_number(row["loss"]))
        self.accelerator.log({name: value for name, value in row.items() if value is not None}, step=step)
        self.kept = NOTHING
        self.first = self.timed = step
        self.since, self.paused = time.perf_counter(), 0.0

    def pause(self, seconds):
        """So much time went into other than training, and does not count in the rates."""
        self.paused += seconds

    def picture(self, image, step):
        """A grid (3, H, W) in [0, 1] for the trackers."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": image[None]}, step=step)
            elif tracker.name == "wandb":
                tracker.log_images({"samples": [image.permute(1, 2, 0).numpy()]}, step=step)


def mean(values):
    """Of a float64 tensor; None (JSON null) of none."""
    return values.mean().item() if values.numel() else None


def format_number(value):
    return "-" if value is None else f"{value:.4f}"
