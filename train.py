"""Fine-tune a DiT to a fine-grained hierarchy of classes.

    torchrun --nproc_per_node=8 train.py --data-path inat/train_mini --resume DiT-XL-2-256x256.pt

Also as plain `python train.py` and under `accelerate launch`, on GPUs or a CPU. Everything random in a step (data
order, flips, label drops, timesteps, noise) is drawn for the whole global batch from (seed, step); each process takes
its rows. So a run that is continued, or one on another number of processes, sees the same numbers. SIGTERM, SIGUSR1 and
SIGUSR2 save and leave with code 75: the same command goes on from there.
"""

import json
import time
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image

from autoencoder import load_autoencoder
from checkpoint.download import find_starting_weights
from checkpoint.format import save_adapter
from checkpoint.loading import build_model, init_from
from dataset.images import ImageData, collate
from dataset.latents import LatentData
from diffusion import create_diffusion
from finetune import EMA, METHODS, adamw, select, store_frozen
from hierarchy import Hierarchy
from hierarchy.hierarchy import check_counts
from runtime.cli import run_command
from runtime.device import DTYPES, check_gpu, resolve_precision
from runtime.files import atomic_write
from runtime.processes import attempt_store, keep_process_group, run_on_main
from runtime.signals import Signals
from sampling.samplers import sample_latents
from training import memory
from training.batches import StepBatches
from training.logger import Watch
from training.options import check_settings, parse_args
from training.state import (
    DECISIVE_FLAGS,
    check_same_run,
    delete_old_states,
    latest_valid_state,
    load_base_of,
    load_state,
    lock_run_dir,
    resolve_run_dir,
    save_state,
)
from training.step import GuardedOptimizer, backward, draw_step_noise, learning_rate_factor, sample_posterior

DIFFUSION = create_diffusion("")
PREVIEW = dict(seed=0, cfg_scale=4.0, steps=50, sampler="ddim")  # the grid at each checkpoint


def describe(args, hierarchy, autoencoder, data):
    """What a model is, and where it came from: the description that adapters and states carry."""
    method = METHODS[args.method]
    args.lr = args.lr or method.lr
    args.table_lr = args.table_lr or args.lr
    return {
        "model": args.model,
        "image_size": args.image_size,
        "latent_size": autoencoder.latent_size(args.image_size),
        "channels": autoencoder.channels,
        "vae": args.vae,
        "method": args.method,
        "embedder": args.embedder or method.embedder,
        "null_row": args.null_prob > 0,
        "hierarchy": hierarchy,
        "data": data.fingerprint,
        "settings": {name: getattr(args, name) for name in DECISIVE_FLAGS},
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
        "null_row": args.null_prob > 0,
    }
    with torch.device("meta"):
        model = build_model(description, args.class_dropout_prob, counts_only=True)
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


# ---- the run -------------------------------------------------------------------------------------


def adapter_path(run):
    return run.folder / f"adapters/{run.description['step']:07d}.safetensors"


def write_adapter(args, run):
    """The adapter, and a grid of samples of it from fixed noise."""
    model, step = run.model, run.description["step"]
    count = min(args.preview_images, model.y_embedder.num_classes)
    if count:
        labels = np.linspace(0, model.y_embedder.num_classes - 1, count).round().astype(int)
        run.ema.swap()
        model.eval()
        with run.accelerator.autocast():
            images = run.autoencoder.decode(sample_latents(model, labels, range(count), **PREVIEW)).clamp(-1, 1)
        model.train()
        run.ema.swap()
        grid = make_grid(images.cpu(), nrow=4, normalize=True, value_range=(-1, 1))
        atomic_write(run.folder / f"samples/{step:07d}.png", lambda part: save_image(grid, part, format="png"))
        run.watch.picture(grid, step)
    save_adapter(adapter_path(run), run.ema.average, model, run.description, DTYPES[args.adapter_dtype])


def open_data(args, autoencoder, process):
    """(dataset, hierarchy) of --latents or --data-path, checked against the flags."""
    hierarchy = Hierarchy.load(args.hierarchy) if args.hierarchy else None
    if args.latents:
        data = LatentData(args.latents, hierarchy)
        data.check(autoencoder, args.image_size, args.flip)
        data.verify(process.process_index, process.num_processes)
        hierarchy = hierarchy or data.hierarchy
    else:
        hierarchy = hierarchy or Hierarchy.from_folder(args.data_path)
        data = ImageData(args.data_path, hierarchy, args.image_size)
    check_counts(hierarchy, args.num_classes, args.num_super_classes)
    return data, hierarchy


def start_processes(args):
    """(accelerator, folder of the run, its states from new to old); says where the precision is not the one asked for."""
    on_cpu = not torch.accelerator.is_available()
    process = PartialState(cpu=on_cpu, **attempt_store())
    check_gpu(process.device)
    default_name = f"{args.model.replace('/', '-')}-{args.method}"
    folder, states = resolve_run_dir(args.results_dir, args.experiment, args.resume, default_name)
    process.wait_for_everyone()  # before anyone makes the folder
    precision = resolve_precision(args.mixed_precision, process.device)
    if precision != args.mixed_precision and process.is_main_process:
        print(f"{torch.cuda.get_device_name()} computes no {args.mixed_precision}: {precision} is used.")
    args.mixed_precision = precision
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=on_cpu,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"The launch is for {accelerator.distributed_type.value}, expected plain data parallelism, in which the full "
            "DiT-XL/2 fits a GPU of 32 GB: launch with torchrun."
        )
    return accelerator, folder, states


def begin(args):
    """All parts of a run, at the step where it starts or goes on."""
    accelerator, folder, states = start_processes(args)
    device, main = accelerator.device, accelerator.is_main_process
    half = DTYPES[args.mixed_precision]
    autoencoder = load_autoencoder(args.vae, device, half)
    data, hierarchy = open_data(args, autoencoder, accelerator)
    batches = StepBatches(
        len(data), args.global_batch_size, args.global_seed, accelerator.process_index, accelerator.num_processes
    )
    batches.max_steps = args.max_steps or args.epochs * batches.steps_per_epoch
    description = describe(args, hierarchy, autoencoder, data)

    path, tensors, saved = latest_valid_state(states, print if main else lambda text: None)
    torch.manual_seed(args.global_seed)
    model = build_model(description, args.class_dropout_prob)
    parameters = select(model, METHODS[args.method])
    if path:
        check_same_run(path, saved, description, args.allow_changes)
        description |= {key: saved[key] for key in ("base", "step")}
        load_base_of(path, saved, model, args.resume)
    else:
        table = args.table_init, args.table_std, args.global_seed
        with accelerator.local_main_process_first():  # one process a node downloads
            weights = find_starting_weights(args.resume, args.model, args.image_size)
            description["base"] = init_from(model, parameters, weights, hierarchy, *table)
    store_frozen(model, half)
    model.to(device).train()
    model.grad_checkpointing = args.grad_checkpointing
    ema = EMA(parameters, args.ema_decay, args.ema_warmup)
    optimizer = adamw(parameters, args.lr, args.table_lr)

    lock = run_on_main(accelerator, lock_run_dir, folder)
    batches.start_step = description["step"]
    stop = args.on_nonfinite == "stop"
    kept = load_state(path, tensors, saved, parameters, ema.average, optimizer) if path else None
    if path and accelerator.scaler and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])
    watch = Watch(accelerator, folder, batches, data, kept, stop, args.max_bad_images)
    parts = args.grad_accum if not args.micro_batch else -(-batches.share // args.micro_batch)
    log_run_summary(args, watch, model, parameters, hierarchy, -(-batches.share // parts), autoencoder)
    if args.compile:
        model.compile_blocks()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.num_processes > 1:
        exchanged = wrapped._get_ddp_logging_data()["total_parameter_size_bytes"]
        watch.say(f"gradients exchanged in a step: {exchanged / 1e6:.1f} MB")
    update = GuardedOptimizer(accelerator, optimizer, parameters.values(), args.clip_grad, sticky=stop)
    return SimpleNamespace(
        accelerator=accelerator,
        folder=folder,
        lock=lock,
        data=data,
        batches=batches,
        autoencoder=autoencoder,
        description=description,
        model=model,
        wrapped=wrapped,
        parameters=parameters,
        ema=ema,
        optimizer=optimizer,
        update=update,
        parts=parts,
        watch=watch,
    )


def log_run_summary(args, watch, model, parameters, hierarchy, images, autoencoder):
    """What the run is and what memory it takes, before the first step."""
    accelerator, data = watch.accelerator, watch.data
    text = json.dumps(vars(args), indent=1) + "\n"
    run_on_main(accelerator, atomic_write, watch.folder / "args.json", lambda part: part.write_text(text))
    count, world = sum(p.numel() for p in parameters.values()), accelerator.num_processes
    watch.say(
        f"{watch.folder}: {args.model}, {args.method}, {count:,} trained parameters, {len(data):,} images, {hierarchy!r}, "
        f"{world} process{'es' * (world > 1)}"
    )
    for warning in data.warnings:
        watch.say(warning)
    per_image, per_pass = memory.activation_bytes(model, accelerator.autocast)
    need = memory.forecast_bytes(model, parameters, per_image, per_pass, images, autoencoder.vae)
    gpu = accelerator.device.type == "cuda"
    watch.say(memory.describe(need, per_image, images, torch.cuda.mem_get_info()[1] if gpu else None))
    if accelerator.log_with:
        settings = {name: value for name, value in vars(args).items() if value is not None}
        names = {"wandb": {"name": watch.folder.name, "id": watch.folder.name, "resume": "allow"}}
        accelerator.init_trackers("finediffusion", settings, names)


def one_step(args, run, step, x, y, shown):
    """Forward, backward and update of one batch."""
    device, batches = run.accelerator.device, run.batches
    size = run.model.input_size
    shape = (run.model.in_channels, size, size)
    chances = args.flip, args.class_dropout_prob, args.null_prob
    r = draw_step_noise(args.global_seed, step, args.global_batch_size, shape, *chances, device)
    r = {name: values[batches.mine] for name, values in r.items()}
    x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
    latents = sample_posterior(x, r["flip"], r["posterior"], run.autoencoder)
    factor = learning_rate_factor(args.lr_schedule, step, batches.max_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    try:
        terms = backward(run.accelerator, run.wrapped, DIFFUSION, latents, y, r, run.parts)
    except torch.OutOfMemoryError as error:
        images = -(-batches.share // run.parts)
        raise ValueError(
            f"The GPU's memory is full with {images} images in a pass ({str(error).split('. ')[0]}), expected room: "
            f"{memory.advice(images // 2)}."
        ) from None
    run.watch.add(terms, run.update.step(), batches.rows(step)[batches.mine], shown)
    run.ema.update(step)


def save(args, run, adapter):
    """Write the training state and maybe the adapter; called by all processes.

    The losses so far are looked at first: nothing is written of a run that went wrong.
    """
    begun = time.perf_counter()
    run.watch.collect()
    description, scaler, step = run.description, run.accelerator.scaler, run.description["step"]
    state = {"scaler": scaler.state_dict() if scaler else None, "epoch": step // run.batches.steps_per_epoch}

    def write():
        if adapter:
            write_adapter(args, run)
        path = run.folder / f"states/{step:07d}.safetensors"  # the last to be written: what has a state has its adapter
        save_state(path, run.parameters, run.ema.average, run.optimizer, run.watch.kept, description | state)
        delete_old_states(path, args.keep_states)

    run_on_main(run.accelerator, write)
    run.watch.pause(time.perf_counter() - begun)


def train(args):
    run = begin(args)
    accelerator, batches, watch = run.accelerator, run.batches, run.watch
    loader = DataLoader(
        run.data,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=Signals.leave_to_parent,
    )
    signals = Signals(accelerator.num_processes)
    with closing(watch.over(loader)) as steps:
        for step, (x, y, shown) in enumerate(steps, start=batches.start_step):
            one_step(args, run, step, x, y, shown)
            run.description["step"] = step + 1
            last, code = step + 1 == batches.max_steps, signals.agreed()
            if (step + 1) % args.log_every == 0 or last:
                watch.write(step + 1, lr=run.optimizer.param_groups[0]["lr"])
            if (step + 1) % args.ckpt_every == 0 or last:
                save(args, run, adapter=True)
            if code and not last:
                save(args, run, adapter=False)
                watch.say(f"asked to leave: the state of step {step + 1} is saved, the same command goes on from it")
                raise SystemExit(code)
    signals.release()
    path = adapter_path(run)
    if not path.is_file():  # an earlier start was asked to leave at this very step
        save(args, run, adapter=True)
    accelerator.print(path)
    keep_process_group()
    accelerator.end_training()


def main():
    args = parse_args(__doc__.split("\n")[0])
    check_settings(args)
    dry_run(args) if args.dry_run else train(args)


if __name__ == "__main__":
    run_command(main)
