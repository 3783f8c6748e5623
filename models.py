"""DiT (arXiv 2212.09748) with affine LayerNorms and a tiered class table: the model of FineDiffusion.

FineDiffusion is arXiv 2402.18331. Shapes: N images, C latent channels, H x W latent pixels, T = (H / p) * (W / p)
tokens of width D, p the patch size.
"""

import math
from functools import partial

import torch
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from tiered_embedder import TieredEmbedder

NORM_EPS = 1e-6
FREQUENCIES = 256  # width of the sinusoidal timestep features


def sinusoids(position, dim, sin_first=False):
    """Sines and cosines of `position` (M,) at dim/2 frequencies from 1 down to 1/10000 -> (M, dim), same dtype.

    "Attention is all you need", section 3.5; DiT puts the cosines first for timesteps, the sines first for places.
    """
    assert dim % 2 == 0
    half = torch.arange(dim // 2, dtype=position.dtype, device=position.device) / (dim // 2)
    angle = position[:, None] * torch.exp(-math.log(10000) * half)
    parts = (angle.sin(), angle.cos()) if sin_first else (angle.cos(), angle.sin())
    return torch.cat(parts, dim=1)


def sincos_2d(dim, grid_size):
    """Fixed position embedding of a square grid, row by row: (1, grid_size**2, dim); the first half of dim is x, then y."""
    line = torch.arange(grid_size, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    halves = [sinusoids(axis.flatten(), dim // 2, sin_first=True) for axis in (x, y)]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


class NormAndModulate(torch.autograd.Function):
    """norm(x) * (1 + scale) + shift, x: (N, T, D); of this size only the normalised x is kept for the backward pass.

    Autograd would keep x as well, a seventh more memory. `checkpoint` would not either, but takes 5% of a training step
    of a DiT-S/4 and 15% of a DiT-S/8 longer, on a CPU at batches of 4 and 2.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, shift, scale, eps):
        normal, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)  # rstd: (N, T, 1)
        scale = 1 + scale
        factor = weight * scale  # the output is factor * normal + (bias * scale + shift)
        ctx.save_for_backward(normal, rstd, weight, bias, scale, factor)
        return torch.addcmul(torch.addcmul(shift, bias, scale), normal, factor)

    @staticmethod
    def backward(ctx, grad):
        normal, rstd, weight, bias, scale, factor = ctx.saved_tensors
        # rstd times the gradient of a norm whose input has mean 0 and deviation 1 already
        of_norm, width = torch.ops.aten.native_layer_norm_backward, normal.shape[-1:]
        mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        to_x, _, _ = of_norm(grad * factor, normal, width, mean, one, None, None, [True, False, False])
        to_factor, to_shift = (grad * normal).sum(1, keepdim=True), grad.sum(1, keepdim=True)
        to_weight, to_bias = (to_factor * scale).sum((0, 1)), (to_shift * scale).sum((0, 1))
        return to_x * rstd, to_weight, to_bias, to_shift, torch.addcmul(to_factor * weight, to_shift, bias), None


def norm_and_modulate(norm, x, shift, scale):
    """norm(x) * (1 + scale) + shift; x: (N, T, D); shift, scale: (N, 1, D)."""
    if torch.is_grad_enabled() and scale.requires_grad:
        return NormAndModulate.apply(x, norm.weight, norm.bias, shift, scale, norm.eps)
    return torch.addcmul(shift, norm(x), 1 + scale)


def modulation(layer, c, parts):
    """The condition (N, D) -> `parts` tensors (N, 1, D), float32 also where `layer` computes in half precision.

    They are added to 1 and to a float32 residual stream: half precision there costs more than it saves.
    """
    return layer(c).float().unsqueeze(1).chunk(parts, dim=-1)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,), fractions allowed -> (N, D)."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        return self.mlp(sinusoids(t.float(), FREQUENCIES).to(self.mlp[0].weight.dtype))


class DiTBlock(nn.Module):
    """Attention and MLP, each with its input shifted and scaled and its output gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.mlp = Mlp(
            in_features=hidden_size,
            hidden_features=int(hidden_size * mlp_ratio),
            act_layer=partial(nn.GELU, approximate="tanh"),
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        """x: (N, T, D) tokens; c: (N, D) condition -> (N, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(self.adaLN_modulation, c, 6)
        x = x + gate_a * self.attn(norm_and_modulate(self.norm1, x, shift_a, scale_a))
        return x + gate_m * self.mlp(norm_and_modulate(self.norm2, x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens (N, T, D) -> patches of the prediction (N, T, p * p * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = modulation(self.adaLN_modulation, c, 2)
        return self.linear(norm_and_modulate(self.norm_final, x, shift, scale))


class DiT(nn.Module):
    """Diffusion transformer conditioned on a timestep and a row of the tiered class table.

    `input_size`: side of the (latent) image, divisible by `patch_size`. `num_super_classes=1` makes it a plain DiT,
    its superclass row the null class. `parents`, `null_row`: see `TieredEmbedder`. `learn_sigma` doubles the output
    channels: the noise, then the interpolation of the variance (arXiv 2102.09672, eq. 15).
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        num_super_classes=1,
        learn_sigma=True,
        parents=None,
        null_row=False,
    ):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"The model's input is {input_size} pixels wide, expected a multiple of its patch size "
                f"{patch_size}: choose another image size or model."
            )
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.learn_sigma = learn_sigma
        self.grad_checkpointing = False  # True: in training a block keeps its input alone and is computed twice

        self.x_embedder = PatchEmbed(
            img_size=input_size, patch_size=patch_size, in_chans=in_channels, embed_dim=hidden_size
        )
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = TieredEmbedder(
            num_classes, num_super_classes, hidden_size, class_dropout_prob, parents, null_row
        )
        grid = input_size // patch_size
        self.pos_embed = nn.Parameter(sincos_2d(hidden_size, grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """DiT's start: every block the identity, the prediction zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj  # a convolution that acts as a linear layer on patches
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zero = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
        for layer in (*zero, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def compile_blocks(self, **options):
        """torch.compile, with its `options`, of a block: all blocks share one graph."""
        for block in self.blocks:
            block.compile(**options)

    def unpatchify(self, x):
        """(N, T, p * p * out_channels) -> (N, out_channels, H, W)."""
        n, tokens, _ = x.shape
        p, g = self.patch_size, math.isqrt(tokens)
        x = x.view(n, g, g, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, self.out_channels, g * p, g * p)

    def forward(self, x, t, y, force_drop_ids=None):
        """x: (N, C, H, W); t: (N,) timesteps in 0..999; y: (N,) rows of the class table -> (N, out_channels, H, W).

        In training mode labels drop to their superclasses at random, or where `force_drop_ids` (N,) is 1; to the null
        row where it is 2.
        """
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training, force_drop_ids)
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=3):
        """Guided forward for sampling (arXiv 2402.18331, eq. 1): eps(x|p) + cfg_scale * (eps(x|c) - eps(x|p)).

        x, t, y: (2N, ...); y holds N classes c, then the N rows p that guide them (their superclasses, or the null
        class); the second half of x is not looked at. Both halves of the result carry the guided noise in the first
        `cfg_channels` channels (3 as in the official code, or "all") and their own prediction in the others.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        k = self.in_channels if cfg_channels == "all" else cfg_channels
        e_class, e_guide = out[:, :k].chunk(2)
        guided = e_guide + cfg_scale * (e_class - e_guide)
        return torch.cat([torch.cat([guided, guided]), out[:, k:]], dim=1)


# name: (depth, hidden_size, num_heads); "Ti" is the quick start's, the others are DiT's
SIZES = {
    "XL": (28, 1152, 16),
    "L": (24, 1024, 16),
    "B": (12, 768, 12),
    "S": (12, 384, 6),
    "Ti": (4, 256, 4),
}


def _preset(depth, hidden_size, num_heads, patch_size):
    return partial(DiT, depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)


DiT_models = {
    f"DiT-{size}/{patch}": _preset(*shape, patch)
    for size, shape in SIZES.items()
    for patch in ((2,) if size == "Ti" else (2, 4, 8))
}
