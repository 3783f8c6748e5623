"""Set up a training run: processes, data, model, optimizer, and the state that it resumes from."""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from autoencoder import Autoencoder, load_autoencoder
from checkpoint.description import Base, ModelDescription
from checkpoint.download import find_starting_weights
from checkpoint.loading import TABLE, build_model, init_from
from dataset.images import ImageData
from dataset.latents import LatentData
from finetune import EMA, METHODS, ROWS, adamw, count_parameters, freeze_other_rows, select, store_frozen
from hierarchy import Hierarchy
from hierarchy.hierarchy import check_counts
from models import DiT
from runtime.device import (
    DTYPES,
    compute_deterministically,
    describe_computation,
    resolve_compile,
    resolve_precision,
    set_tf32,
)
from runtime.files import Lock, atomic_write
from runtime.private import ddp_exchanged_bytes
from runtime.processes import ask_main, run_on_main, start_processes
from training import memory
from training.average import choose_warmup, describe_average
from training.batches import StepBatches
from training.extension import extend
from training.folder import lock_run_dir, move_aside, resolve_run_dir, write_launch
from training.logger import MetricLogger
from training.state import (
    DECISIVE_FLAGS,
    check_same_run,
    choose_state,
    load_run_base,
    load_state,
    saved_precision,
)
from training.step import DIFFUSION, GuardedOptimizer


@dataclass
class Run:
    """The parts of a training run.

    accelerator  the processes, the precision, the trackers
    folder       results/NAME
    lock         keeps other launches out of the folder
    data         images or cached latents
    labels       with --extend: the model's label of each label of the data, int64, on the device; None otherwise
    batches      the rows of every step, and this process's share of them
    autoencoder  pixels to latents and back
    description  what adapters and states say of the model, as of the first step
    model        the DiT; its frozen weights may be in half precision
    wrapped      the model as DDP calls it
    parameters   the trained ones, by name
    frozen       the model's other tensors, by name
    ema          averages of the trained parameters
    optimizer    AdamW, prepared by accelerate
    update       the optimizer's step with a guard against non-finite gradients
    passes       forward passes in which a process works through its share of a batch
    logger       the training log
    step         optimizer steps so far
    """

    accelerator: Accelerator
    folder: Path
    lock: Lock
    data: ImageData | LatentData
    labels: torch.Tensor | None
    batches: StepBatches
    autoencoder: Autoencoder
    description: ModelDescription
    model: DiT
    wrapped: nn.Module
    parameters: dict[str, nn.Parameter]
    frozen: dict[str, torch.Tensor]
    ema: EMA
    optimizer: AcceleratedOptimizer
    update: GuardedOptimizer
    passes: int
    logger: MetricLogger
    step: int


def begin(args: argparse.Namespace) -> Run:
    """Set up a run at the step where it starts or resumes.

    Called by all processes. Raises ValueError for flags that do not fit the data, the weights or the run's state.
    """
    # Set up processes and find the run's folder:
    accelerator, folder, states, precision = start_accelerator(args)
    half = DTYPES[precision]

    # Set up data:
    autoencoder = load_autoencoder(args.vae, accelerator.device, half)
    data, hierarchy = open_data(args, autoencoder, accelerator)
    batches = order_batches(args, data, accelerator)

    # Build the model, on its base weights or from the newest state:
    path, tensors, saved = choose_state(accelerator, states)
    warmup = choose_warmup(args, batches.max_steps, saved)
    description = describe(
        args,
        hierarchy,
        autoencoder.latent_size(args.image_size),
        autoencoder.channels,
        fingerprint=data.fingerprint,
        precision=precision,
        max_steps=batches.max_steps,
        encoder=autoencoder.encoder_digest(),
        warmup=warmup,
    )
    labels = None
    if args.extend:
        description, labels = extend(description, args)
        labels = labels.to(accelerator.device)
    model, parameters, description, note = load_model(args, accelerator, description, path, saved, half)
    ema = EMA(parameters, args.ema_decay, warmup)
    optimizer = adamw(parameters, args.lr, args.table_lr, args.lora_lr)

    # From here on the folder is ours:
    lock = run_on_main(accelerator, lock_run_dir, folder)
    if not args.experiment:
        run_on_main(accelerator, write_launch, folder)
    batches.start_step = description.step
    frozen = {name: t for name, t in model.state_dict().items() if name not in parameters}
    open_row = None
    if path:
        open_row = load_state(path, tensors, saved, parameters, frozen, ema.average, optimizer)
        if accelerator.scaler and saved.scaler:
            accelerator.scaler.load_state_dict(saved.scaler)
        if saved.settings.get("global_batch_size") != args.global_batch_size:
            open_row = None  # it has the losses of another number of images per step
    average = describe_average(args.ema_decay, warmup, batches.max_steps)
    notes = [ask_main(accelerator, lambda: move_aside(folder, description.step)), note, average]

    # Start the log:
    stop = args.on_nonfinite == "stop"
    logger = MetricLogger(accelerator, folder, batches, data, open_row, stop, args.max_bad_images)
    compiled = resolve_compile(args.compile, accelerator.device, batches.max_steps - description.step)
    settings = vars(args) | {"mixed_precision": precision, "compile": compiled}
    log_run_summary(settings, logger, parameters, description)
    passes, memory_note = memory.split_batch(args, accelerator, batches.local_batch, model, parameters, autoencoder)
    for text in filter(None, [memory_note, *notes]):
        logger.log(text)

    # Compile, and wrap for several processes:
    if compiled:
        model.compile_blocks()
        DIFFUSION.compile_losses()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.num_processes > 1:
        exchanged = ddp_exchanged_bytes(wrapped)
        logger.log(f"gradients exchanged in a step: {exchanged / 1e6:.1f} MB")
    update = GuardedOptimizer(accelerator, optimizer, parameters.values(), args.clip_grad, sticky=stop)
    return Run(
        accelerator,
        folder,
        lock,
        data,
        labels,
        batches,
        autoencoder,
        description,
        model,
        wrapped,
        parameters,
        frozen,
        ema,
        optimizer,
        update,
        passes,
        logger,
        description.step,
    )


# ---- processes -----------------------------------------------------------------------------------


def start_accelerator(args: argparse.Namespace) -> tuple[Accelerator, Path, list[Path], str]:
    """Return the accelerator, the run's folder, its states from new to old, and the precision in use."""
    process = start_processes()
    default_name = f"{args.model.replace('/', '-')}-{args.method}"
    place = args.results_dir, args.experiment, args.resume, default_name
    folder, states = ask_main(process, lambda: resolve_run_dir(*place))  # others may see a stale listing
    wanted = args.mixed_precision
    if wanted == "auto":
        wanted = ask_main(process, lambda: saved_precision(states))
    precision = resolve_precision(wanted, process.device)
    if precision != wanted != "auto" and process.is_main_process:
        print(f"{torch.cuda.get_device_name()} does not compute in {wanted}: using {precision}.")
    set_tf32(True)
    if args.deterministic:
        compute_deterministically()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.accelerator.is_available(),
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"The launch is for {accelerator.distributed_type.value}, expected plain data parallelism, in which the full "
            "DiT-XL/2 fits a GPU of 32 GB: launch with torchrun."
        )
    return accelerator, folder, states, precision


# ---- data ----------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace) -> tuple[ImageData | LatentData, Hierarchy]:
    """Open --latents or --data-path, and return it with its hierarchy, whose counts must be those of the flags."""
    hierarchy = Hierarchy.load(args.hierarchy) if args.hierarchy else None
    data = LatentData(args.latents, hierarchy) if args.latents else None
    hierarchy = hierarchy or (data.hierarchy if data else Hierarchy.from_folder(args.data_path, allow_flat=True))
    check_counts(hierarchy, args.num_classes, args.num_super_classes)
    return data or ImageData(args.data_path, hierarchy, args.image_size), hierarchy


def open_data(
    args: argparse.Namespace, autoencoder: Autoencoder, accelerator: Accelerator
) -> tuple[ImageData | LatentData, Hierarchy]:
    """Open --latents or --data-path and check it against the flags."""
    data, hierarchy = load_data(args)
    if args.latents:
        data.check_settings(autoencoder, args.image_size, args.flip)
        data.verify(accelerator.process_index, accelerator.num_processes)
    return data, hierarchy


def order_batches(args: argparse.Namespace, data: ImageData | LatentData, accelerator: Accelerator) -> StepBatches:
    """Return the sampler of this process's rows, to the last step of the run."""
    place = accelerator.process_index, accelerator.num_processes
    batches = StepBatches(len(data), args.global_batch_size, args.global_seed, *place)
    batches.max_steps = args.max_steps or args.epochs * batches.steps_per_epoch
    return batches


# ---- model ---------------------------------------------------------------------------------------


def describe(
    args: argparse.Namespace,
    hierarchy: Hierarchy,
    latent_size: int,
    channels: int,
    fingerprint: str | None = None,
    precision: str | None = None,
    max_steps: int | None = None,
    encoder: str | None = None,
    warmup: int | None = None,
) -> ModelDescription:
    """Return the description of a run that has not begun.

    fingerprint  of the data
    precision    the one in use, if it is not --mixed-precision
    max_steps    length of the run, which decides the learning rates of a cosine schedule
    encoder      digest of the autoencoder's encoder
    warmup       the one of the EMA, if it is not --ema-warmup
    """
    settings = {name: getattr(args, name) for name in DECISIVE_FLAGS}
    settings |= {} if warmup is None else {"ema_warmup": warmup}
    settings |= {"max_steps": max_steps} if args.lr_schedule == "cosine" else {}
    lora = "lora" in METHODS[args.method].trains
    embedder = args.embedder or METHODS[args.method].embedder
    settings |= {"lora_lr": args.lora_lr} if lora else {}
    settings |= {"train": args.train} if args.extend else {}
    return ModelDescription(
        model=args.model,
        image_size=args.image_size,
        latent_size=latent_size,
        channels=channels,
        vae=args.vae,
        method=args.method,
        embedder=embedder,
        null_row=args.null_prob > 0,
        lora_rank=args.lora_rank if lora else None,
        lora_targets=" ".join(sorted(set(args.lora_targets))) if lora else None,
        hierarchy=hierarchy.keep(*args.tiers or () if embedder != "null" else ()),
        data=fingerprint,
        encoder=encoder,
        settings=settings | {"mixed_precision": precision or args.mixed_precision},
    )


def load_model(
    args: argparse.Namespace,
    accelerator: Accelerator,
    description: ModelDescription,
    path: Path | None,
    saved: ModelDescription | None,
    half: torch.dtype,
) -> tuple[DiT, dict[str, nn.Parameter], ModelDescription, str]:
    """Build the model on the device, with the base weights of the state at `path` or of a new run.

    half: the type of the frozen weights. Returns the model, its trained parameters, the description with base and step,
    and a note for the log: the state, or the rows of the class table of a new run.
    """
    torch.manual_seed(
        saved.settings.get("global_seed", args.global_seed) if saved else args.global_seed
    )  # of frozen weights without a base
    model = build_model(description, args.class_dropout_prob)
    parameters = select(model, ROWS if description.patch_rows else METHODS[args.method])
    if path:
        check_same_run(path, saved, description, args.allow_changes)
        load_run_base(path, saved, model, args.resume)
        description, note = replace(description, base=saved.base, step=saved.step), f"resuming from {path}"
    else:
        base, note = start_from_base(args, accelerator, model, parameters, description)
        description = replace(description, base=base)
    store_frozen(model, half)
    model.to(accelerator.device).train()
    if description.patch_rows:
        freeze_other_rows(parameters[TABLE], description.patch_rows)
    model.grad_checkpointing = args.grad_checkpointing
    return model, parameters, description, note


def start_from_base(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: DiT,
    parameters: dict[str, nn.Parameter],
    description: ModelDescription,
) -> tuple[Base | None, str]:
    """Fill the model of a new run from --resume; return its base and a sentence about the class table."""
    table = args.table_init, args.table_std, args.global_seed
    with accelerator.local_main_process_first():  # one process a node downloads
        weights = find_starting_weights(args.resume, args.model, args.image_size)
        return init_from(model, parameters, weights, description, *table)


# ---- log -----------------------------------------------------------------------------------------


def log_run_summary(
    settings: dict,
    logger: MetricLogger,
    parameters: dict[str, nn.Parameter],
    description: ModelDescription,
):
    """Log a description of the run, write args.json, and start the trackers.

    settings: every flag with its value.
    """
    accelerator, data = logger.accelerator, logger.data
    text = json.dumps(settings, indent=1) + "\n"
    run_on_main(accelerator, atomic_write, logger.folder / "args.json", lambda part: part.write_text(text))
    count, world = count_parameters(parameters, description.patch_rows), accelerator.num_processes
    logger.log(
        f"{logger.folder}: {settings['model']}, {settings['method']}, {count:,} trained parameters, {len(data):,} images, "
        f"{description.hierarchy!r}, {world} process{'es' * (world > 1)} on "
        + describe_computation(accelerator.device, settings["mixed_precision"], settings["compile"])
    )
    for warning in data.warnings:
        logger.log(warning)
    if accelerator.log_with:
        lists = {name: " ".join(value) for name, value in settings.items() if isinstance(value, list)}
        settings = {name: value for name, value in (settings | lists).items() if value is not None}
        run = {"name": logger.folder.name, "resume": "allow"}
        options = {"wandb": run | {"id": logger.folder.name}, "trackio": run | {"embed": False}}
        accelerator.init_trackers("finediffusion", settings, options)
