"""Fine-tune a DiT to a fine-grained hierarchy of classes.

    torchrun --nproc_per_node=8 train.py --data-path inat/train_mini --resume DiT-XL-2-256x256.pt

Also as plain `python train.py` and under `accelerate launch`, on GPUs or a CPU. Everything random in a step (data
order, flips, label drops, timesteps, noise) is drawn for the whole global batch from (seed, step); each process takes
its rows. So a run that is continued, or one on another number of processes, sees the same numbers.
"""

import argparse
import json
import math
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from tqdm import tqdm

import checkpoint
from autoencoder import load_autoencoder
from data import ImageData, LatentData, StepBatches, check_counts
from diffusion import create_diffusion
from finetune import EMA, METHODS, select
from hierarchy import Hierarchy
from models import DiT_models
from runtime import check_gpu, run_command
from sampling import sample_latents
from steps import backward, drawn, latents_of, learning_rate_factor

PREVIEW = dict(seed=0, cfg_scale=4.0, steps=50, sampler="ddim")  # the grid at each checkpoint
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data-path", help="folder of images, see data.py")
    add("--latents", help="folder that tools.encode_latents wrote, instead of --data-path")
    add("--hierarchy", help="inat2021, vegfru, a .json file or a folder; default: the data's own")
    add("--results-dir", default="results")
    add("--experiment", help="name of the run's folder; the same command again continues the run")
    add(
        "--resume",
        help="weights or adapter to start from, state or run folder to continue, or none; default: DiT's own",
    )
    add("--model", choices=list(DiT_models), default="DiT-XL/2")
    add("--image-size", type=int, default=256)
    add("--num-classes", type=int, help="checked against the hierarchy")
    add("--num-super-classes", type=int, help="checked against the hierarchy")
    add("--vae", default="mse", help="ema, mse, a local folder, or none (pixels)")
    add("--method", choices=list(METHODS), default="finediffusion")
    add("--embedder", choices=["tiered", "null"], help="default: the method's")
    add("--class-dropout-prob", type=float, default=0.1)
    add(
        "--table-init",
        choices=["normal", "mean"],
        default="normal",
        help="new class rows: N(0, std^2), or that around the mean of the base's rows",
    )
    add("--table-std", type=float, default=0.02)
    add("--lr", type=float, help="default: the method's")
    add("--table-lr", type=float, help="learning rate of the class table; default: --lr")
    add("--lr-schedule", choices=["constant", "cosine"], default="constant")
    add("--clip-grad", type=float, help="largest gradient norm; default: not clipped")
    add("--ema-decay", type=float, default=0.9999)
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror images at random")
    add("--epochs", type=int, default=100)
    add("--max-steps", type=int, help="instead of --epochs")
    add("--global-batch-size", type=int, default=256)
    add("--grad-accum", type=int, default=1, help="parts into which a process cuts its batch")
    add("--global-seed", type=int, default=0)
    add("--num-workers", type=int, default=4)
    add("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
    add("--adapter-dtype", choices=list(DTYPES), default="fp32", help="how adapters are stored")
    add("--compile", action="store_true", help="torch.compile every block")
    add("--log-every", type=int, default=100)
    add("--ckpt-every", type=int, default=50_000)
    add("--preview-images", type=int, default=16, help="in the grid of samples at each checkpoint; 0 for none")
    add("--dry-run", action="store_true", help="print the settings and parameter counts as JSON, and stop")
    return parser.parse_args()


def check_settings(args):
    positive = "image_size epochs max_steps global_batch_size grad_accum log_every ckpt_every lr table_lr clip_grad"
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a number above 0: change it.")
    for name in ("table_std", "num_workers", "preview_images"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected 0 or more: change it.")
    for name in ("lr", "table_lr", "table_std", "clip_grad"):
        if getattr(args, name) is not None and math.isinf(getattr(args, name)):
            raise ValueError(f"--{name.replace('_', '-')} is inf, expected a finite number: change it.")
    if args.mixed_precision == "fp16" and not args.dry_run and not torch.accelerator.is_available():
        raise ValueError("--mixed-precision is fp16, expected a GPU for it and found none: choose bf16 or no.")
    if not 0 <= args.ema_decay < 1:
        raise ValueError(f"--ema-decay is {args.ema_decay}, expected 0 or more and below 1: change it.")
    if not args.dry_run and (args.data_path is None) == (args.latents is None):
        raise ValueError("Expected one of --data-path and --latents, found both or neither: pass one.")


def describe(args, hierarchy, autoencoder):
    """What a model is, and where it came from: the description that adapters and states carry."""
    method = METHODS[args.method]
    return {
        "model": args.model,
        "image_size": args.image_size,
        "latent_size": autoencoder.latent_size(args.image_size),
        "channels": autoencoder.channels,
        "vae": args.vae,
        "method": args.method,
        "embedder": args.embedder or method.embedder,
        "hierarchy": hierarchy,
        "base": None,
        "step": 0,
    }


def dry_run(args):
    """One JSON object: every setting and what would be trained. Opens no data and allocates no weights."""
    hierarchy = Hierarchy.load(args.hierarchy or "inat2021")
    check_counts(hierarchy, args.num_classes, args.num_super_classes)
    downscale, channels = (1, 3) if args.vae == "none" else (8, 4)  # Stable Diffusion's
    if args.image_size % downscale:
        raise ValueError(f"--image-size is {args.image_size}, expected a multiple of {downscale}: change it.")
    description = {
        "model": args.model,
        "latent_size": args.image_size // downscale,
        "channels": channels,
        "hierarchy": hierarchy,
        "method": args.method,
        "embedder": args.embedder or METHODS[args.method].embedder,
    }
    with torch.device("meta"):
        model = checkpoint.build(description, args.class_dropout_prob, counts_only=True)
    trained = select(model, METHODS[args.method])
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in trained.values())
    settings = vars(args) | {
        "lr": args.lr or METHODS[args.method].lr,
        "embedder": description["embedder"],
        "num_classes": hierarchy.num_classes,
        "num_super_classes": hierarchy.num_super_classes,
        "total_params": total,
        "trainable_params": count,
        "trainable_percent": round(100 * count / total, 4),
    }
    print(json.dumps(settings, indent=1))


# ---- where a run starts, and where it is kept ----------------------------------------------------


def starting_file(args):
    """Path of the weights that a new run starts from, or None for none."""
    if args.resume == "none":
        return None
    default = f"DiT-XL-2-{args.image_size}x{args.image_size}.pt"
    if args.resume is None and (args.model != "DiT-XL/2" or default not in checkpoint.DIT_FILES):
        raise ValueError(
            f"There is no published {args.model} of {args.image_size} pixels to start from: pass --resume FILE, or "
            "--resume none to start from random weights."
        )
    return checkpoint.find(args.resume or default)


def run_folder(args, accelerator):
    """(folder, state to continue from or None)."""
    resume = Path(args.resume) if args.resume else None
    if resume and resume.is_dir():
        folder, state = resume, newest_state(resume)
        if state is None:
            raise ValueError(f"{resume} has no training state, expected a run folder of ours: check the path.")
        return folder, state
    if resume and resume.parent.name == "states":
        return resume.parent.parent, resume
    root = Path(args.results_dir)
    if args.experiment:
        folder = root / args.experiment
        return folder, newest_state(folder)
    name = f"{args.model.replace('/', '-')}-{args.method}"
    taken = [int(path.name[:3]) for path in root.glob("[0-9][0-9][0-9]-*")]
    number = max(taken, default=-1) + 1
    accelerator.wait_for_everyone()  # before anyone makes the folder
    return root / f"{number:03d}-{name}", None


def newest_state(folder):
    states = sorted(folder.glob("states/*.safetensors"))
    return states[-1] if states else None


# ---- the run -------------------------------------------------------------------------------------


def write_checkpoint(args, folder, model, ema, optimizer, description, autoencoder):
    """The adapter, the state to continue from, and a grid of samples from fixed noise."""
    name, dtype = f"{description['step']:07d}", DTYPES[args.adapter_dtype]
    checkpoint.save_adapter(folder / f"adapters/{name}.safetensors", ema.average, model, description, dtype)
    checkpoint.save_state(folder / f"states/{name}.safetensors", ema.parameters, ema.average, optimizer, description)
    count = min(args.preview_images, model.y_embedder.num_classes)
    if not count:
        return
    labels = np.linspace(0, model.y_embedder.num_classes - 1, count).round().astype(int)
    ema.swap()
    model.eval()
    images = autoencoder.decode(sample_latents(model, labels, range(count), **PREVIEW)).clamp(-1, 1)
    model.train()
    ema.swap()
    (folder / "samples").mkdir(exist_ok=True)
    save_image(images, folder / f"samples/{name}.png", nrow=4, normalize=True, value_range=(-1, 1))


def open_data(args, autoencoder):
    """(dataset, hierarchy) of --latents or --data-path, checked against the flags."""
    hierarchy = Hierarchy.load(args.hierarchy) if args.hierarchy else None
    if args.latents:
        data = LatentData(args.latents, hierarchy)
        data.check(autoencoder, args.image_size, args.flip)
        hierarchy = hierarchy or data.hierarchy
    else:
        hierarchy = hierarchy or Hierarchy.from_folder(args.data_path)
        data = ImageData(args.data_path, hierarchy, args.image_size)
    check_counts(hierarchy, args.num_classes, args.num_super_classes)
    return data, hierarchy


def make_optimizer(args, parameters):
    """AdamW over the trained parameters, the class table in a group of its own."""
    lr = args.lr or METHODS[args.method].lr
    table = [p for name, p in parameters.items() if name == checkpoint.TABLE]
    others = [p for name, p in parameters.items() if name != checkpoint.TABLE]
    groups = [{"params": others, "base_lr": lr}, {"params": table, "base_lr": args.table_lr or lr}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0, fused=True)


def train(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=not torch.accelerator.is_available())
    device, main = accelerator.device, accelerator.is_main_process
    rank, world = accelerator.process_index, accelerator.num_processes
    check_gpu(device)
    autoencoder = load_autoencoder(args.vae, device)
    data, hierarchy = open_data(args, autoencoder)
    batches = StepBatches(len(data), args.global_batch_size, args.global_seed, rank, world)
    steps = batches.max_steps = args.max_steps or args.epochs * batches.steps_per_epoch

    description = describe(args, hierarchy, autoencoder)
    torch.manual_seed(args.global_seed)
    model = checkpoint.build(description, args.class_dropout_prob)
    folder, state = run_folder(args, accelerator)
    parameters = select(model, METHODS[args.method])
    if state:
        description["base"] = checkpoint.load_base_of(state, model, description)
    else:
        table = args.table_init, args.table_std, args.global_seed
        with accelerator.local_main_process_first():  # one process a node downloads
            path = starting_file(args)
        description["base"] = checkpoint.start(model, parameters, path, hierarchy, *table)
    model.to(device)
    ema = EMA(parameters, args.ema_decay)
    optimizer = make_optimizer(args, parameters)
    if state:
        description["step"] = checkpoint.load_state(state, parameters, ema.average, optimizer)["step"]
    if args.compile:
        for block in model.blocks:
            block.compile()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    wrapped.train()

    batches.start_step = description["step"]
    loader = DataLoader(data, batch_sampler=batches, num_workers=args.num_workers, pin_memory=device.type == "cuda")
    shape = (autoencoder.channels, model.input_size, model.input_size)
    mine = slice(rank * args.global_batch_size // world, (rank + 1) * args.global_batch_size // world)
    diffusion = create_diffusion("")
    log = Log(folder, description["step"], steps, device, main)
    log.begin(args, f"{args.model}, {args.method}, {sum(p.numel() for p in parameters.values()):,} trained parameters, "
                    f"{len(data):,} images, {hierarchy!r}, {world} process{'es' * (world > 1)}")  # fmt: skip
    for step, (x, y) in enumerate(log.over(loader), start=description["step"]):
        r = drawn(args.global_seed, step, args.global_batch_size, shape, args.flip, args.class_dropout_prob, device)
        r = {name: values[mine] for name, values in r.items()}
        y = y.to(device, non_blocking=True)
        latents = latents_of(x.to(device, non_blocking=True), r["flip"], r["posterior"], autoencoder)
        factor = learning_rate_factor(args.lr_schedule, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        log.add(backward(accelerator, wrapped, diffusion, latents, y, r, args.grad_accum))
        if args.clip_grad:
            accelerator.clip_grad_norm_(parameters.values(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        description["step"] = step + 1
        last = step + 1 == steps
        if (step + 1) % args.log_every == 0 or last:
            log.write(accelerator, step + 1, lr=optimizer.param_groups[0]["lr"])
        if (step + 1) % args.ckpt_every == 0 or last:
            if main:
                write_checkpoint(args, folder, model, ema, optimizer, description, autoencoder)
            accelerator.wait_for_everyone()
    log.end(folder / f"adapters/{description['step']:07d}.safetensors")
    accelerator.end_training()


class Log:
    """Progress bar, `log.txt` and `metrics.jsonl` of a run, written by the main process alone.

    Losses are summed on the device: the device is waited for only when a row is written.
    """

    def __init__(self, folder, start, steps, device, main):
        self.folder, self.main = folder, main
        if main:
            folder.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not main)
        self.sums = {name: torch.zeros((), device=device) for name in ("loss", "mse", "vb")}
        self.last, self.since = start, time.time()

    def begin(self, args, text):
        if self.main:
            (self.folder / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n")
            self.say(f"{self.folder}: {text}")

    def say(self, text):
        """A line for a person, above the bar and in log.txt."""
        tqdm.write(text)
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def over(self, loader):
        """The loader's batches; the bar ends with them, also where one cannot be read, before that is said."""
        with self.bar:
            yield from loader

    def add(self, losses):
        for name, total in self.sums.items():
            total += losses[name]
        self.bar.update()

    def write(self, accelerator, step, **extra):
        count = step - self.last
        means = accelerator.reduce(torch.stack(list(self.sums.values())), "mean") / count
        row = {"step": step, **dict(zip(self.sums, means.tolist()))}
        row |= {"steps_per_s": count / (time.time() - self.since), **extra}
        if self.main:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            losses = "  ".join(f"{name} {row[name]:.4f}" for name in self.sums)
            self.say(f"step {step:7d}  {losses}  {row['steps_per_s']:.2f} steps/s")
            self.bar.set_postfix(loss=f"{row['loss']:.4f}")
        for total in self.sums.values():
            total.zero_()
        self.last, self.since = step, time.time()

    def end(self, path):
        if self.main:
            print(path)


def main():
    args = parse_args()
    check_settings(args)
    dry_run(args) if args.dry_run else train(args)


if __name__ == "__main__":
    run_command(main)
