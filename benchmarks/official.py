"""The official code (github.com/FineDiffusion/FineDiffusion), imported from a folder, and one step of its scripts.

The folder is neither changed nor copied. Its modules have the names of ours, which are set aside during the import. Its
`models.py` imports the desktop toolkit's `turtle` without using it; if Python lacks that module, an empty one takes its
place. Its superclasses are hard-coded for 10,000 classes: labels are below 10,000 and there are always 11 superclasses.
Its training runs in DistributedDataParallel, which on one device costs time and changes no result, so it is left out.
"""

import copy
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from autoencoder import SD_SCALE
from finetune import METHODS, select

MODULES = ("models", "diffusion", "download", "train")
NEEDED = ("models.py", "diffusion/__init__.py", "download.py", "train.py")


def load(folder: str | os.PathLike) -> SimpleNamespace:
    """Return DiT, create_diffusion and update_ema of the official code; raise ValueError if a file is missing."""
    folder = Path(folder).resolve()
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"--reference is {folder}, which has no {', '.join(missing)}: expected a checkout of the official FineDiffusion."
        )
    ours = set_aside(MODULES)
    settings = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        import_turtle()
        models, diffusion, train = (importlib.import_module(name) for name in ("models", "diffusion", "train"))
    finally:
        sys.path.remove(str(folder))
        set_aside(MODULES)
        sys.modules.update(ours)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, sys.dont_write_bytecode = settings
    return SimpleNamespace(DiT=models.DiT, create_diffusion=diffusion.create_diffusion, update_ema=train.update_ema)


def set_aside(names: Sequence[str]) -> dict[str, ModuleType]:
    """Remove modules and their submodules from sys.modules; return {name: module}."""
    found = [name for name in sys.modules if name.split(".")[0] in names]
    return {name: sys.modules.pop(name) for name in found}


def import_turtle():
    """Import turtle, or an empty module of that name if Python lacks it."""
    try:
        import turtle  # noqa: F401
    except ImportError:
        sys.modules["turtle"] = ModuleType("turtle")
        sys.modules["turtle"].shape = None


# ---- model and training --------------------------------------------------------------------------


def same_size(official: SimpleNamespace, model: nn.Module) -> nn.Module:
    """Return a new official model with the sizes of ours, on its device."""
    with model.pos_embed.device:
        return official.DiT(
            input_size=model.input_size,
            patch_size=model.patch_size,
            hidden_size=model.pos_embed.shape[-1],
            depth=len(model.blocks),
            num_heads=model.blocks[0].attn.num_heads,
            num_classes=model.y_embedder.num_classes,
            num_super_classes=model.y_embedder.num_super_classes,
        )


def twin(official: SimpleNamespace, model: nn.Module) -> nn.Module:
    """Return the official model with the weights of ours."""
    theirs = same_size(official, model)
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def training(official: SimpleNamespace, model: nn.Module, vae: nn.Module | None = None) -> Callable:
    """Return step(x, y) -> loss (a float), one step of the official train.py.

    x: latents (N, C, h, w), or with a `vae` images; y: labels (N,)
    """
    select(model, METHODS["finediffusion"])  # the same parameter names as ours
    device = model.pos_embed.device
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    diffusion = official.create_diffusion(timestep_respacing="")
    model.train()

    def step(x, y):
        x, y = x.to(device), y.to(device, copy=True)  # the official code writes to its labels
        if vae is not None:
            with torch.no_grad():
                x = vae.encode(x).latent_dist.sample().mul_(SD_SCALE)
        t = torch.randint(0, diffusion.num_timesteps, (len(x),), device=device)
        loss = diffusion.training_losses(model, x, t, dict(y=y))["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        official.update_ema(ema, model)
        return loss.item()

    return step


def draw_step_noise(
    seed: int, shape: tuple[int, ...], device: torch.device, dropout: float = 0.1
) -> dict[str, torch.Tensor]:
    """Draw what `step` draws for latents of shape (N, C, h, w) after torch.manual_seed(seed).

    Returns the dict of `training.step.draw_step_noise`.
    """
    torch.manual_seed(seed)
    t = torch.randint(0, 1000, shape[:1], device=device)
    noise = torch.randn(shape, device=device)
    drop = (torch.rand(shape[:1], device=device) < dropout).long()
    return {"t": t, "noise": noise, "drop": drop, "flip": drop > 1, "posterior": torch.zeros_like(noise)}


# ---- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    official: SimpleNamespace,
    model: nn.Module,
    labels: torch.Tensor,
    rows: torch.Tensor,
    steps: int,
    scale: float,
    vae: nn.Module | None = None,
) -> torch.Tensor:
    """Sample latents (N, C, h, w), or images with a `vae`, as the official sample.py does, its noise included.

    labels (N,) are guided by the class table's `rows` (N,)
    """
    device, size = model.pos_embed.device, model.pos_embed.shape[1]
    size = round(size**0.5) * model.patch_size
    z = torch.randn(len(labels), model.in_channels, size, size, device=device)
    z = torch.cat([z, z])
    samples = official.create_diffusion(str(steps)).p_sample_loop(
        model.forward_with_cfg,
        z.shape,
        z,
        clip_denoised=False,
        model_kwargs=dict(y=torch.cat([labels, rows]), cfg_scale=scale),
        progress=False,
        device=device,
    )
    samples, _ = samples.chunk(2)
    return samples if vae is None else vae.decode(samples / SD_SCALE).sample
