"""The official code (github.com/FineDiffusion/FineDiffusion), imported from a folder, and one step of what its scripts do.

Nothing in the folder is changed or copied. Its modules have the names of ours: they are imported while ours are put
aside. `models.py` there imports the desktop toolkit's `turtle`, of which it uses nothing: where Python comes without,
an empty module stands for it. The superclasses are written into its code for 10,000 classes: labels are below 10,000
and there are always 11 superclasses. Its training runs in DistributedDataParallel, which on one device adds time and no
number: here it goes without.
"""

import copy
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from autoencoder import SD_SCALE
from finetune import METHODS, select

MODULES = ("models", "diffusion", "download", "train")
NEEDED = ("models.py", "diffusion/__init__.py", "download.py", "train.py")


def load(folder):
    """What the bench uses of the official code: DiT, create_diffusion, update_ema. ValueError where it is not there."""
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


def set_aside(names):
    """Take the modules of these names, and what is below them, out of sys.modules: {name: module}."""
    found = [name for name in sys.modules if name.split(".")[0] in names]
    return {name: sys.modules.pop(name) for name in found}


def import_turtle():
    try:
        import turtle  # noqa: F401
    except ImportError:
        sys.modules["turtle"] = ModuleType("turtle")
        sys.modules["turtle"].shape = None


def as_large(official, model):
    """The official model of the sizes of ours, on its device, newly initialised."""
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


def twin(official, model):
    """The official model with the weights of ours."""
    theirs = as_large(official, model)
    theirs.load_state_dict(model.state_dict())
    return theirs.eval()


def training(official, model, vae=None):
    """step(x, y) -> the loss as a number: one round of its train.py, x latents, or images where there is a `vae`."""
    select(model, METHODS["finediffusion"])  # the same parameters by the same names
    device = model.pos_embed.device
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    diffusion = official.create_diffusion(timestep_respacing="")
    model.train()

    def step(x, y):
        x, y = x.to(device), y.to(device, copy=True)  # it writes into its labels
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


def stream(seed, shape, device, dropout=0.1):
    """What `step` draws for latents (N, C, h, w) after torch.manual_seed(seed), in the form of `steps.drawn`."""
    torch.manual_seed(seed)
    t = torch.randint(0, 1000, shape[:1], device=device)
    noise = torch.randn(shape, device=device)
    drop = (torch.rand(shape[:1], device=device) < dropout).long()
    return {"t": t, "noise": noise, "drop": drop, "flip": drop > 1, "posterior": torch.zeros_like(noise)}


@torch.no_grad()
def sample(official, model, labels, rows, steps, scale, vae=None):
    """Latents (N, C, h, w), or images with a `vae`, of `labels` (N,) guided by `rows` (N,): its sample.py, from its noise on."""
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
