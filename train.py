"""Fine-tune a DiT to a fine-grained hierarchy of classes.

    torchrun --nproc_per_node=8 train.py --data-path inat/train_mini --resume DiT-XL-2-256x256.pt

Also runs as plain `python train.py` and under `accelerate launch`, on GPUs or a CPU. All randomness of a step (data
order, flips, label drops, timesteps, noise) is drawn for the whole global batch from (seed, step), and each process
takes its rows. So a resumed run, or one on another number of processes, sees the same numbers. SIGTERM, SIGUSR1 and
SIGUSR2 save a state and exit with code 75: the same command resumes from it.
"""

import runtime.quick_help  # noqa: F401, I001 - first: --help does not wait for the imports below
import argparse
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image

from checkpoint.format import save_adapter
from dataset.images import collate
from runtime.cli import run_command
from runtime.device import DTYPES, explain_full_memory
from runtime.files import atomic_write
from runtime.processes import ask_main, keep_process_group, run_on_main
from runtime.signals import Signals, ignore_signals
from runtime.text import one_line
from sampling import sample_latents
from training import memory
from training.dry_run import dry_run
from training.options import check_settings, parse_args, resolve_defaults
from training.setup import Run, begin
from training.state import delete_old_states, save_state
from training.step import DIFFUSION, draw_step_noise, forward_backward, learning_rate_factor, sample_posterior

PREVIEW = dict(seed=0, cfg_scale=4.0, steps=50, sampler="ddim")  # the grid at each checkpoint
EARLY_STEPS, EARLY_SECONDS, MEASURED_STEPS = 500, 600, 10  # when the first state is saved, see early_step


def train_step(args: argparse.Namespace, run: Run, step: int, x: torch.Tensor, y: torch.Tensor, shown: torch.Tensor):
    """Forward, backward and update on one batch.

    x      images (n, 3, H, W), or cached moments (n, F, 2C, h, w)
    y      labels (n,)
    shown  dataset rows (n,) of the images in x: others than planned where images could not be read
    """
    device, batches = run.accelerator.device, run.batches
    size = run.model.input_size

    # Draw timesteps, noise, label drops and flips for the global batch, and take this process's rows:
    chances = args.flip, args.class_dropout_prob, args.null_prob
    shape = (run.model.in_channels, size, size)
    noise = draw_step_noise(
        args.global_seed, step, args.global_batch_size, shape, *chances, device, run.model.y_embedder.tiers
    )
    noise = {name: values[batches.local_slice] for name, values in noise.items()}

    # Move the batch to the device, and prepare to map images to latents (m, C, h, w):
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    y = y if run.labels is None else run.labels[y]

    def latents(rows: slice) -> torch.Tensor:
        return sample_posterior(x[rows], noise["flip"][rows], noise["posterior"][rows], run.autoencoder)

    # Set the learning rate:
    factor = learning_rate_factor(args.lr_schedule, step, batches.max_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor

    # Compute losses and gradients:
    images = -(-batches.local_batch // run.passes)
    with explain_full_memory(images, memory.advice(images // 2)):
        terms = forward_backward(run.accelerator, run.wrapped, DIFFUSION, latents, y, noise, run.passes)

    # Update the weights and their EMA:
    run.logger.add_step(terms, run.update.step(), batches.rows(step)[batches.local_slice], shown)
    run.ema.update(step)


# ---- checkpoints ---------------------------------------------------------------------------------


def adapter_path(run: Run) -> Path:
    return run.folder / f"adapters/{run.step:07d}.safetensors"


def save_checkpoint(args: argparse.Namespace, run: Run, adapter: bool):
    """Save the training state, and with `adapter` the adapter before it and a preview after it; called by all processes.

    The losses so far are checked first: nothing is written of a run with non-finite losses.
    """
    begun = time.perf_counter()
    run.logger.guard.gather()
    description, scaler = replace(run.description, step=run.step), run.accelerator.scaler

    def write():
        if adapter:
            dtype = DTYPES[args.adapter_dtype]
            save_adapter(adapter_path(run), run.ema.average, run.model, description, dtype)
        # after the adapter, so that a step with a state has its adapter:
        path = run.folder / f"states/{run.step:07d}.safetensors"
        epoch, scale = run.step // run.batches.steps_per_epoch, scaler.state_dict() if scaler else None
        state = replace(description, epoch=epoch, scaler=scale)
        save_state(path, run.parameters, run.frozen, run.ema.average, run.optimizer, run.logger.guard.open_row, state)
        delete_old_states(path, args.keep_states)
        if adapter and args.preview_images:
            try:
                save_preview(args, run)
            except (RuntimeError, OSError) as error:  # out of memory, a full disk: the state is safe
                run.logger.log_on_main(
                    f"The preview of step {run.step} failed ({one_line(error)}): training continues without it."
                )

    run_on_main(run.accelerator, write)
    run.logger.exclude_time(time.perf_counter() - begun)


def save_preview(args: argparse.Namespace, run: Run):
    """Save a grid of samples of the EMA model, from fixed noise."""
    model = run.model
    labels = range(model.y_embedder.num_classes) if run.labels is None else run.labels.tolist()
    count = min(args.preview_images, len(labels))
    labels = [labels[i] for i in np.linspace(0, len(labels) - 1, count).round().astype(int)]
    run.ema.swap()
    model.eval()
    try:
        with run.accelerator.autocast():
            latents = sample_latents(model, labels, range(count), **PREVIEW)
            images = torch.cat([run.autoencoder.decode(each).clamp(-1, 1).cpu() for each in latents.split(1)])
    finally:
        model.train()
        run.ema.swap()
    grid = make_grid(images, nrow=4, normalize=True, value_range=(-1, 1))
    atomic_write(run.folder / f"samples/{run.step:07d}.png", lambda part: save_image(grid, part, format="png"))
    run.logger.log_images(grid, run.step)


def early_step(run: Run, begun: float) -> int:
    """Return the step of the first state, at most EARLY_STEPS after the start and about EARLY_SECONDS after it.

    A state this early shows a broken results folder before much is lost. `begun`: time.perf_counter() at the start.
    Called by all processes MEASURED_STEPS after the start; the main process decides.
    """

    def steps_in_time():
        if run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return int(EARLY_SECONDS * MEASURED_STEPS / max(time.perf_counter() - begun, 1e-9))

    steps = ask_main(run.accelerator, steps_in_time)
    return run.batches.start_step + max(MEASURED_STEPS, min(EARLY_STEPS, steps))


# ---- the run -------------------------------------------------------------------------------------


def train(args: argparse.Namespace):
    """Train until --max-steps or --epochs, or until a signal."""
    run = begin(args)
    accelerator, batches, logger = run.accelerator, run.batches, run.logger

    # Set up the loader and the signals:
    loader = DataLoader(
        run.data,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
    )
    signals = Signals(accelerator.num_processes)
    begun, early = time.perf_counter(), None

    # Train, log and save:
    with closing(logger.iterate(loader)) as steps:
        for step, (x, y, shown) in enumerate(steps, start=batches.start_step):
            train_step(args, run, step, x, y, shown)
            run.step = step + 1
            last, code = run.step == batches.max_steps, signals.agreed()
            if run.step % args.log_every == 0 or last:
                logger.write_row(run.step, lr=run.optimizer.param_groups[0]["lr"])
            if run.step == batches.start_step + MEASURED_STEPS:
                early = early_step(run, begun)
            if run.step % args.ckpt_every == 0 or last:
                save_checkpoint(args, run, adapter=True)
            elif run.step == early:
                save_checkpoint(args, run, adapter=False)
            if code and not last:
                save_checkpoint(args, run, adapter=False)
                logger.log(f"signal received, state of step {run.step} saved; {how_to_resume(args, run)}")
                raise SystemExit(code)
    signals.release()

    # Finish: an earlier start may have received a signal at this very step and saved no adapter
    if not ask_main(accelerator, adapter_path(run).is_file):
        save_checkpoint(args, run, adapter=True)
    accelerator.print(adapter_path(run))
    keep_process_group()
    accelerator.end_training()


def how_to_resume(args: argparse.Namespace, run: Run) -> str:
    """Return which command resumes the run."""
    if args.experiment or args.resume and Path(args.resume).is_dir():
        return "run the same command to resume"
    return f"run the same command with --resume {run.folder} to resume"


def main():
    args = parse_args(__doc__.split("\n")[0])
    check_settings(args)
    resolve_defaults(args)
    dry_run(args) if args.dry_run else train(args)


if __name__ == "__main__":
    run_command(main)
