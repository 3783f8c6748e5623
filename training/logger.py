"""Training log: progress bar, log.txt, metrics.jsonl and trackers; stops or skips on non-finite losses.

Steps leave their losses on the device. Only when a row of metrics or a checkpoint is due are they gathered from all
processes, which waits for the device. A row is computed from them in float64, so it does not depend on where a run was
interrupted.

Shapes: S steps of a row, B images of the global batch, n images of this process. The four terms of an image are its
loss, mse, vb and timestep, see `training.step.forward_backward`.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.images import ImageData
from dataset.latents import LatentData
from runtime.files import append_text, atomic_write
from runtime.private import shutdown_workers
from runtime.processes import run_on_main
from runtime.progress import progress_bar
from runtime.text import shorten
from training.batches import StepBatches
from training.step import NUM_TIMESTEPS

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # value of --report-to: its package
EMPTY_ROW = {"terms": torch.zeros(0), "norms": torch.zeros(0)}
MIN_SCALE = 1.0  # fp16: a smaller gradient scale means that every step overflows


class MetricLogger:
    """Write the log and the metrics of a run. Every process has one, and the main process writes.

    accelerator     the processes and the trackers
    folder          the run's folder
    batches         which images a step has
    data            names of the images
    open_row        losses of the row of metrics that a training state was saved within, see `LossGuard`
    stop            raise at a non-finite loss or gradient, or else skip the step
    max_bad_images  unreadable images that may be replaced before the run stops
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        batches: StepBatches,
        data: ImageData | LatentData,
        open_row: dict[str, torch.Tensor] | None = None,
        stop: bool = True,
        max_bad_images: int = 0,
    ):
        self.accelerator, self.folder, self.batches, self.data = accelerator, folder, batches, data
        self.guard = LossGuard(accelerator, batches, data, self.log, open_row, stop)
        self.bad_images = BadImages(accelerator, data, self.log, max_bad_images)
        self.start_timer(batches.start_step)
        run_on_main(accelerator, self.remove_later_rows)

    def remove_later_rows(self):
        """Remove rows of metrics.jsonl that were written after the state that the run resumes from."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            start = self.guard.row_start
            earlier = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            if earlier != lines:
                atomic_write(path, lambda part: part.write_text("".join(earlier)))

    # ---- text and images -------------------------------------------------------------------------

    def log(self, text: str):
        """Log a line above the progress bar and in log.txt; called by all processes."""
        run_on_main(self.accelerator, self.log_on_main, text)

    def log_on_main(self, text: str):
        """Log a line; called by the main process alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tqdm.write(text)
        append_text(self.folder / "log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def log_images(self, image: torch.Tensor, step: int):
        """Send a grid (3, H, W) in [0, 1] to the trackers; called by the main process."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": image[None]}, step=step)
            elif tracker.name == "wandb":
                tracker.log_images({"samples": [image.permute(1, 2, 0).numpy()]}, step=step)
            elif tracker.name == "trackio":
                pixels = importlib.import_module("trackio").Image(to_uint8(image))
                tracker.log({"samples": pixels}, step=step)

    # ---- steps -----------------------------------------------------------------------------------

    def iterate(self, loader: DataLoader) -> Iterator:
        """Yield the loader's batches under a progress bar; close bar and workers before any error is printed.

        The workers ignore SIGTERM (see `runtime.signals`). Python would send it at exit and wait for them forever.
        """
        batches = iter(loader)
        steps = dict(total=self.batches.max_steps, initial=self.batches.start_step, unit="step")
        try:
            with progress_bar(**steps, disable=not self.accelerator.is_main_process) as self.bar:
                yield from batches
        finally:
            if loader.num_workers:
                shutdown_workers(batches)

    def add_step(self, terms: torch.Tensor, norm: torch.Tensor, requested: torch.Tensor, shown: torch.Tensor):
        """Add a step of this process; terms and norm stay on the device.

        terms      (4, n)
        norm       scalar, the gradient's norm
        requested  dataset rows (n,) of the images of this step
        shown      dataset rows (n,) of the images that were trained on; they differ if images are unreadable
        """
        self.guard.add_step(terms, norm)
        self.bad_images.add_step(requested, shown)
        self.bar.update()

    def write_row(self, step: int, **extra: float):
        """Write a row of metrics for the steps since the last row; called by all processes at the same step.

        extra: further metrics. Raises ValueError at a non-finite loss or gradient, or if too many images are unreadable.
        """
        self.guard.gather()
        self.bad_images.report()
        terms, norms = self.guard.open_row["terms"].double(), self.guard.open_row["norms"].double()
        finite, finite_norms = terms.isfinite().flatten(1).all(1), norms.isfinite()  # (S,)
        row = {"step": step, **mean_losses(terms[finite]), "grad_norm": mean(norms[finite_norms]), **extra}
        row["skipped_steps"] = int((~(finite & finite_norms)).sum())
        seconds = time.perf_counter() - self.timer_start - self.excluded_seconds
        rate = (step - self.timed_from) / max(seconds, 1e-9)
        row |= {"steps_per_s": rate, "images_per_s": rate * terms.shape[2]}
        row["memory_gb"] = peak_memory_gb(self.accelerator.device)
        losses = "  ".join(f"{name} {format_number(row[name])}" for name in ("loss", "mse", "vb", "grad_norm"))

        def write():
            append_text(self.folder / "metrics.jsonl", json.dumps(row) + "\n")
            self.log_on_main(f"step {step:7d}  {losses}  {rate:.2f} steps/s  {row['images_per_s']:.1f} images/s")

        run_on_main(self.accelerator, write)
        self.bar.set_postfix(loss=format_number(row["loss"]), refresh=False)
        known = {name: value for name, value in row.items() if value is not None and name != "step"}
        self.accelerator.log(known, step=step)
        self.guard.start_row(step)
        self.start_timer(step)

    def start_timer(self, step: int):
        """Measure rates from this step on."""
        self.timer_start, self.timed_from, self.excluded_seconds = time.perf_counter(), step, 0.0

    def exclude_time(self, seconds: float):
        """Leave time that was not spent on training steps out of the rates."""
        self.excluded_seconds += seconds


class LossGuard:
    """Gather losses and gradient norms of all processes, and stop or skip on non-finite ones.

    open_row   those of the steps since the last row of metrics, on the CPU: {"terms": (S, 4, B), "norms": (S,)}
    row_start  step at which that row begins
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batches: StepBatches,
        data: ImageData | LatentData,
        log: Callable[[str], None],
        open_row: dict[str, torch.Tensor] | None = None,
        stop: bool = True,
    ):
        self.accelerator, self.batches, self.data, self.log, self.stop = accelerator, batches, data, log, stop
        self.new_terms, self.new_norms = [], []  # of this process, on the device: (4, n) and scalars
        self.open_row = open_row or EMPTY_ROW
        self.row_start = batches.start_step - len(self.open_row["norms"])

    def add_step(self, terms: torch.Tensor, norm: torch.Tensor):
        """Add terms (4, n) and the gradient's norm, a scalar."""
        self.new_terms.append(terms)
        self.new_norms.append(norm.reshape(()))

    def start_row(self, step: int):
        """Start an empty row at this step."""
        self.open_row, self.row_start = EMPTY_ROW, step

    def gather(self):
        """Move the new steps to `open_row` and check them; called by all processes at the same step.

        Raises ValueError at a non-finite loss or gradient if the run is to stop there.
        """
        if not self.new_terms:
            return
        terms = torch.stack(self.new_terms)[None]  # (1, S, 4, n)
        terms = self.accelerator.gather(terms).cpu()  # (processes, S, 4, n)
        terms = terms.permute(1, 2, 0, 3).flatten(2)  # (S, 4, B): ranks hold consecutive images of the global batch
        norms = self.accelerator.gather(torch.stack(self.new_norms).float()[None]).cpu()  # (processes, S), equal rows
        norms = norms.amax(0)  # (S,): NaN or infinity of a single process remains
        checked = len(self.open_row["norms"])
        self.open_row = {
            "terms": torch.cat([self.open_row["terms"].reshape(-1, *terms.shape[1:]), terms]),
            "norms": torch.cat([self.open_row["norms"], norms]),
        }
        self.new_terms, self.new_norms = [], []
        for index in range(checked, checked + len(norms)):
            self.check_step(index)

    def check_step(self, index: int):
        """Raise ValueError, or log that the step was skipped, if step `index` of the open row is non-finite."""
        terms, norm, scaler = self.open_row["terms"][index], self.open_row["norms"][index], self.accelerator.scaler
        bad_images = (~terms.isfinite()).any(0)  # (B,)
        if norm.isfinite() and not bad_images.any():
            return
        scale = scaler.get_scale() if scaler is not None else 0.0
        if not bad_images.any() and scale >= MIN_SCALE:
            return  # fp16: an overflow; the scaler has skipped the step and halved its scale
        step = self.row_start + index
        what = "loss" if bad_images.any() else "gradient"
        columns = bad_images.nonzero().flatten().tolist() or range(terms.shape[1])
        rows = self.batches.rows(step)
        images = shorten(f"{self.data.paths[rows[i]]} at timestep {int(terms[3, i])}" for i in columns)
        text = f"At step {step + 1} the {what} is non-finite (images {images})"
        if self.stop:
            raise ValueError(
                f"{text}, expected finite numbers: check these images, lower --lr, pass --clip-grad 1 or another "
                "--mixed-precision and run the same command again to resume from the last state, or pass "
                "--on-nonfinite skip."
            )
        self.log(f"{text}: the step was skipped.")


class BadImages:
    """Name the unreadable images, which the data replaced by others of their classes, and stop at too many of them.

    limit: number of images that may be replaced.
    """

    def __init__(self, accelerator: Accelerator, data: ImageData | LatentData, log: Callable[[str], None], limit: int):
        self.accelerator, self.data, self.log, self.limit = accelerator, data, log, limit
        self.new = set()  # dataset rows, found by this process since the last report
        self.reported = set()  # dataset rows, found by any process

    def add_step(self, requested: torch.Tensor, shown: torch.Tensor):
        """Add the dataset rows (n,) of a step's images, and those (n,) of the images that were trained on."""
        self.new.update(requested[requested != shown].tolist())

    def report(self):
        """Log the images that were replaced since the last report; called by all processes at the same step.

        Raises ValueError if more than `limit` images have been replaced in all.
        """
        new = sorted(set(gather_object(sorted(self.new))) - self.reported)
        self.new.clear()
        if not new:
            return
        self.reported |= set(new)
        names, count = shorten(self.data.paths[i] for i in new), len(self.reported)
        if count > self.limit:
            raise ValueError(
                f"{count} images could not be read ({names}), expected at most {self.limit}: find them with "
                "python -m tools.check_data, or raise --max-bad-images."
            )
        self.log(f"Unreadable images were replaced by others of their classes: {names} ({count} so far)")


# ---- metrics -------------------------------------------------------------------------------------


def mean_losses(terms: torch.Tensor) -> dict[str, float | None]:
    """Return the mean loss, mse and vb of terms (S, 4, B), and the mean loss of each quarter of the timesteps."""
    loss, mse, vb, t = terms.unbind(1)
    quarter = t.long() * 4 // NUM_TIMESTEPS
    quarters = {f"loss_q{q + 1}": mean(loss[quarter == q]) for q in range(4)}
    return {"loss": mean(loss), "mse": mean(mse), "vb": mean(vb), **quarters}


def to_uint8(image: torch.Tensor) -> np.ndarray:
    """Convert an image (3, H, W) in [0, 1] to uint8 (H, W, 3)."""
    return image.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()


def mean(values: torch.Tensor) -> float | None:
    """Return the mean, or None (null in JSON) of an empty tensor."""
    return values.mean().item() if values.numel() else None


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory of this process in GB: GPU memory, or resident memory without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
