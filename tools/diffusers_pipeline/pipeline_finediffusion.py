"""The diffusers pipeline of an exported folder: class labels to images, with superclass guidance.

Shapes: N images, latents (N, C, h, w).
"""

import difflib
import inspect
import math
from collections.abc import Sequence
from itertools import accumulate, repeat

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from guidance import Guidance, guided

KINDS = ("superclass", "null", "chain", "none")


class FineDiffusionPipeline(DiffusionPipeline):
    """Sample images of classes given by id or name.

    transformer: FineDiffusionTransformer, whose config has the class names
    vae: None for a model of pixels
    scheduler: DDPM, DDIM, or another diffusers scheduler for noise prediction
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(self, transformer: ModelMixin, vae: AutoencoderKL, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 4.0,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
        guidance: str = "superclass",
        parent_scale: float = 1.0,
        guidance_interval: tuple[int, int] = (0, 999),
        guidance_channels: int | str = 3,
        guide: str | None = None,
        scales: dict[str, float] | None = None,
        intervals: dict[str, tuple[int, int]] | None = None,
        eta: float = 0.0,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image per class label.

        class_labels    one or a list of N: ids, names, or parts of a name that fit only one class; or names of nodes of a rank
        guidance_scale  w, 0 or more
        num_inference_steps     1..1000
        generator       one `torch.Generator`, or a list of N, one per image
        guidance        "superclass" (arXiv 2402.18331, eq. 1; for a plain DiT the null class), "none", or with a null row
                        "null" (arXiv 2207.12598) and "chain": e_0 + parent_scale (e_p - e_0) + guidance_scale (e_c - e_p)
        parent_scale    chain: scale of the superclass, 0 or more
        guidance_interval       first and last timestep with guidance, in 0..999
        guidance_channels       3 guides the first three channels, as in the official code; or "all"
        guide           "superclass": a finer rank of the model in place of the superclass
        scales          "chain": {rank: scale of the step down to it}, in place of the two scales; a rank that is left out has 1
        intervals       "chain": {rank: first and last guided timestep}; others have guidance_interval
        eta             DDIM: 0..1
        latents         (N, C, h, w), the initial noise, standard normal
        output_type     "pil", "np" (N, H, W, 3) or "pt" (N, 3, H, W) in 0..1, or "latent"
        return_dict     False returns a tuple

        Raises ValueError if an argument is out of its range.
        """
        many = hasattr(class_labels, "__len__") and not isinstance(class_labels, str)
        labels = [self.label_of(query) for query in (class_labels if many else [class_labels])]
        device, config = self._execution_device, self.transformer.config
        shape = (len(labels), config.in_channels, config.input_size, config.input_size)
        interval = tuple(guidance_interval)
        guide = Guidance(
            guidance,
            guidance_scale,
            parent_scale,
            interval,
            guidance_channels,
            tier=self.place(guide, "guide") if guide else 0,
            scales=self.by_step(scales, 1.0, "scales"),
            intervals=self.by_step(intervals, interval, "intervals"),
        )
        check_guide(guide, self.transformer)
        if isinstance(generator, list) and len(generator) != len(labels):
            raise ValueError(f"Found {len(generator)} generators for {len(labels)} images, expected one or as many.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}.")

        x = self.denoise(latents.to(device, torch.float32), labels, guide, num_inference_steps, generator, eta)
        if self.vae is not None and output_type != "latent":
            x = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
        images = self.image_processor.postprocess(x, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(
        self,
        x: torch.Tensor,
        labels: list[int],
        guide: Guidance,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
    ) -> torch.Tensor:
        """Turn noise x (N, C, h, w) into latents (N, C, h, w) of `labels` with the scheduler."""
        model, keys = self.transformer, None  # keys: only guidances outside KINDS draw random numbers
        predict = guided(model, torch.tensor(labels, device=x.device), guide, keys)
        scheduler, model_timesteps = respace(self.scheduler, steps)
        learned = isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
        accepted = inspect.signature(scheduler.step).parameters
        options = {name: v for name, v in (("generator", generator), ("eta", eta)) if name in accepted}
        x = x * scheduler.init_noise_sigma
        for model_t, t in zip(self.progress_bar(model_timesteps), scheduler.timesteps):
            # half-precision weights compute in half precision, except for what autocast keeps in float32
            with torch.autocast(x.device.type, model.dtype, enabled=model.dtype != torch.float32):
                out = predict(scheduler.scale_model_input(x, t), model_t.to(x.device).expand(len(x))).float()
            out = out if learned else out[:, : x.shape[1]]  # keep the noise, drop the variance
            x = scheduler.step(out, t, x, **options).prev_sample
        return x

    def place(self, rank: str, argument: str) -> int:
        """Return the place of a rank among superclass, further ranks and classes. Raises ValueError if there is none."""
        ranks = ["superclass", *(self.transformer.config.ranks or {})]
        if rank in ("species", "class") and rank not in ranks and argument != "guide":
            return len(ranks)
        if rank not in ranks:
            raise ValueError(f"{argument} names rank {rank!r}, expected one of {', '.join(ranks)}.")
        return ranks.index(rank)

    def by_step(self, values: dict | None, other: object, argument: str) -> tuple | None:
        """Return {rank: value} as a tuple for the steps of a chain; None stays None. other: value of ranks left out."""
        places = {self.place(rank, argument): value for rank, value in (values or {}).items()}
        steps = range(len(self.transformer.config.ranks or {}) + 2)
        return tuple(places.get(step, other) for step in steps) if places else None

    def label_of(self, query: int | str) -> int:
        """Return the row of the class table for an id, a name, a part of a name, or the name of a node above the classes.

        Raises ValueError if no class fits, or several do.
        """
        names, config = self.transformer.config.id2label, self.transformer.config
        nodes = [
            *config.id2superclass.values(),
            *(n for each in (config.ranks or {}).values() for n in dict.fromkeys(each)),
        ]
        if not isinstance(query, str):
            if not 0 <= int(query) < len(names):
                raise ValueError(f"Class {query} is out of range, expected 0..{len(names) - 1}.")
            return int(query)
        wanted = plain(query)
        known = {label: plain(name) for label, name in names.items()}
        rows = {plain(name): row for row, name in enumerate(nodes, start=len(names))}
        if wanted in rows and wanted not in known.values():
            return rows[wanted]
        for fits in (wanted.__eq__, lambda name: name.endswith(f" {wanted}"), lambda name: wanted in name):
            found = [label for label, name in known.items() if fits(name)]
            if len(found) == 1:
                return int(found[0])
            if found:
                several = ", ".join(names[label] for label in found[:4])
                raise ValueError(
                    f"{query!r} fits {len(found)} classes ({several}), expected one: write more of the name."
                )
        near = difflib.get_close_matches(wanted, known.values(), n=3, cutoff=0.3) or list(known.values())[:3]
        raise ValueError(
            f"No class is called {query!r}: choose one of transformer.config.id2label, such as {', '.join(near)}."
        )


def plain(name: str) -> str:
    """Return a name in lower case, with single spaces for underscores and spaces."""
    return " ".join(name.lower().replace("_", " ").split())


def check_guide(guide: Guidance, model: ModelMixin):
    """Raise ValueError if a setting is out of its range, or needs a null row that the model lacks."""
    if guide.kind not in KINDS:
        raise ValueError(f"guidance is {guide.kind!r}, expected one of {', '.join(KINDS)}.")
    needs_null = guide.kind == "null" or guide.kind == "chain" and guide.step_scales(model.y_embedder.tiers)[0] != 1
    if needs_null and not model.y_embedder.has_null:
        raise ValueError(f"guidance is {guide.kind!r}, which needs a null row, and the model has none.")
    scales = [("guidance_scale", guide.scale), ("parent_scale", guide.parent_scale)]
    for name, scale in scales + [("scales", scale) for scale in guide.scales or ()]:
        if not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{name} is {scale}, expected a finite number, 0 or more.")
    for name, interval in [("guidance_interval", guide.interval)] + [
        ("intervals", each) for each in guide.intervals or ()
    ]:
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 999:
            raise ValueError(f"{name} is {interval}, expected two timesteps in 0..999, the lower one first.")
    if guide.channels not in (3, "all"):
        raise ValueError(f'guidance_channels is {guide.channels!r}, expected 3 or "all".')


def respace(scheduler, steps: int):
    """Return a scheduler that is ready to step, and the timesteps (steps,) to pass to the model.

    DDPM and DDIM with "linspace" spacing become a process of only `steps` timesteps, with the alpha_bar of the
    timesteps kept, as in DiT's code (diffusion/respace.py). On the full process diffusers' DDIM always steps back by
    1000 // steps, whatever its timesteps are, and both schedulers subtract float32 values of alpha_bar. Only DDPM uses
    the learned variance.

    Raises ValueError if `steps` is not in 1..1000.
    """
    config = scheduler.config
    total = config.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"num_inference_steps is {steps}, expected 1..{total}.")
    if isinstance(scheduler, DDPMScheduler | DDIMScheduler) and config.timestep_spacing == "linspace":
        stride = (total - 1) / max(steps - 1, 1)
        # add the strides one by one, as DiT does: if a place ends in .5, the last bits of the sum decide the rounding
        # a single step starts from pure noise, at the last timestep
        places = accumulate(repeat(stride, steps - 1), initial=0.0 if steps > 1 else total - 1)
        kept = torch.tensor([round(place) for place in places])
        alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)[kept]
        scheduler = type(scheduler).from_config(config, num_train_timesteps=steps)
        scheduler.alphas_cumprod = alphas_cumprod
        scheduler.set_timesteps(steps)
        return scheduler, kept.flip(0)
    if not isinstance(scheduler, DDPMScheduler):  # DPM-Solver would split off 3 channels as the noise
        scheduler = type(scheduler).from_config(config, variance_type=None)
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps
