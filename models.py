"""The model of FineDiffusion (arXiv 2402.18331): DiT (arXiv 2212.09748) with a tiered class table and affine LayerNorms.

The file has the order and the names of DiT's models.py. Three things differ. The label embedder has a row for each class
and superclass (tiered_embedder.py). The LayerNorms have a weight and a bias, which fine-tuning trains. A norm and its
modulation are one operation, which needs less memory in training.

Shapes: N images, C latent channels, H x W latent pixels, p the patch size, T = (H / p) * (W / p) tokens of width D.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.vision_transformer import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from tiered_embedder import TieredEmbedder

NORM_EPS = 1e-6
FREQUENCY_EMBEDDING_SIZE = 256  # width of the sinusoidal timestep embedding

# ---- adaptive LayerNorm (adaLN) ------------------------------------------------------------------


class NormAndModulate(torch.autograd.Function):
    """norm(x) * (1 + scale) + shift for x (N, T, D), with a backward pass that needs less memory.

    Of the tensors as large as x, only the normalized x is kept for the backward pass. Autograd would also keep x: a
    seventh more memory. `checkpoint` would keep less too, but on a CPU it makes a training step 5% slower for a DiT-S/4
    (batch of 4) and 15% slower for a DiT-S/8 (batch of 2).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, shift, scale, eps):
        """x: (N, T, D); weight, bias: (D,); shift, scale: (N, 1, D) -> (N, T, D)."""
        normal, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)  # (N, T, D), rstd: (N, T, 1)
        scale = 1 + scale
        factor = weight * scale  # (N, 1, D); the output is factor * normal + (bias * scale + shift)
        ctx.save_for_backward(normal, rstd, weight, bias, scale, factor)
        return torch.addcmul(torch.addcmul(shift, bias, scale), normal, factor)

    @staticmethod
    def backward(ctx, grad):
        """grad: (N, T, D) -> the gradients of x, weight, bias, shift and scale; none for eps."""
        # Second derivatives would be wrong: the saved tensors are constants for autograd. PyTorch's once_differentiable
        # would still let autograd.grad(..., inputs) return them.
        if torch.is_grad_enabled():
            raise RuntimeError("NormAndModulate is differentiable once only, expected create_graph=False.")
        normal, rstd, weight, bias, scale, factor = ctx.saved_tensors
        # x: rstd times the backward pass of a LayerNorm whose input already has mean 0 and standard deviation 1
        norm_backward, width = torch.ops.aten.native_layer_norm_backward, normal.shape[-1:]
        mean, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        to_x, _, _ = norm_backward(grad * factor, normal, width, mean, one, None, None, [True, False, False])
        # the others are sums over the tokens: (N, T, D) -> (N, 1, D), and for weight and bias over the images: (D,)
        to_factor, to_shift = (grad * normal).sum(1, keepdim=True), grad.sum(1, keepdim=True)
        to_weight, to_bias = (to_factor * scale).sum((0, 1)), (to_shift * scale).sum((0, 1))
        return to_x * rstd, to_weight, to_bias, to_shift, torch.addcmul(to_factor * weight, to_shift, bias), None


def norm_and_modulate(norm: nn.LayerNorm, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return norm(x) * (1 + scale) + shift for x (N, T, D), shift and scale (N, 1, D), as (N, T, D)."""
    if torch.is_grad_enabled() and scale.requires_grad:
        return NormAndModulate.apply(x, norm.weight, norm.bias, shift, scale, norm.eps)
    return torch.addcmul(shift, norm(x), 1 + scale)


def modulation_chunks(layer: nn.Module, c: torch.Tensor, chunks: int) -> tuple[torch.Tensor, ...]:
    """Return the shifts, scales and gates that `layer` computes from the condition c (N, D): `chunks` tensors (N, 1, D).

    They are float32 even if the layer computes in half precision: they are combined with a float32 residual stream, where
    half precision costs more than it saves.
    """
    return layer(c).float().unsqueeze(1).chunk(chunks, dim=-1)  # (N, chunks * D) -> chunks x (N, 1, D)


# ---- embedding layers for timesteps; for class labels see tiered_embedder.py ---------------------


def sinusoidal_embedding(position: torch.Tensor, dim: int, sin_first: bool = False) -> torch.Tensor:
    """Return sines and cosines of `position` (M,) at dim/2 frequencies from 1 down to 1/10000, as (M, dim).

    "Attention is all you need" (arXiv 1706.03762), section 3.5. DiT puts the cosines first for timesteps and the sines
    first for positions. The result has the dtype of `position`.
    """
    assert dim % 2 == 0
    half = torch.arange(dim // 2, dtype=position.dtype, device=position.device) / (dim // 2)
    angle = position[:, None] * torch.exp(-math.log(10000) * half)  # (M, dim / 2)
    parts = (angle.sin(), angle.cos()) if sin_first else (angle.cos(), angle.sin())
    return torch.cat(parts, dim=1)


class TimestepEmbedder(nn.Module):
    """Embed timesteps (N,) as vectors (N, D): a sinusoidal embedding, then an MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """t: (N,) timesteps, which may be fractional -> (N, D)."""
        t_freq = sinusoidal_embedding(t.float(), FREQUENCY_EMBEDDING_SIZE)  # (N,) -> (N, 256)
        return self.mlp(t_freq.to(self.mlp[0].weight.dtype))


# ---- the core model ------------------------------------------------------------------------------


def times(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Return x, or x * factor if there is a factor."""
    return x if factor is None else x * factor


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (arXiv 2212.09748, section 3.2).

    The condition shifts and scales the input of the attention and of the MLP, and gates their outputs.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
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
        # DiffFit's factors of the two branches, see finetune.py
        self.register_parameter("gamma_attn", None)
        self.register_parameter("gamma_mlp", None)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: (N, T, D) tokens; c: (N, D) condition -> (N, T, D)."""
        chunks = modulation_chunks(self.adaLN_modulation, c, 6)  # six of (N, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chunks
        x = x + gate_msa * times(self.attn(norm_and_modulate(self.norm1, x, shift_msa, scale_msa)), self.gamma_attn)
        return x + gate_mlp * times(self.mlp(norm_and_modulate(self.norm2, x, shift_mlp, scale_mlp)), self.gamma_mlp)


class FinalLayer(nn.Module):
    """Project tokens (N, T, D) to the patches of the prediction (N, T, p * p * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """x: (N, T, D) tokens; c: (N, D) condition -> (N, T, p * p * out_channels)."""
        shift, scale = modulation_chunks(self.adaLN_modulation, c, 2)  # two of (N, 1, D)
        return self.linear(norm_and_modulate(self.norm_final, x, shift, scale))


class JointModulation(nn.Module):
    """The modulation layers of several parts as one matrix product; copies the parameters of `layers`."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.register_buffer("weight", torch.cat([layer.weight.detach() for layer in layers]))
        self.register_buffer("bias", torch.cat([layer.bias.detach() for layer in layers]))

    def forward(self, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """c: (N, D) condition -> (N, out_features) of each layer."""
        return F.linear(F.silu(c), self.weight, self.bias).split(self.sizes, dim=-1)


class DiT(nn.Module):
    """Diffusion transformer, conditioned on a timestep and on a row of the tiered class table.

    input_size          side of the (latent) image, H = W, a multiple of `patch_size`
    patch_size          p
    in_channels         C: 4 for Stable Diffusion's latents, 3 for pixels
    hidden_size         width D of a token
    depth               number of blocks
    num_heads           attention heads per block; they divide `hidden_size`
    mlp_ratio           hidden width of a block's MLP, in units of D
    class_dropout_prob  probability in 0..1 of replacing a label by an ancestor in training, the superclass if it is the only one
    num_classes         number of classes
    num_super_classes   number of superclasses; 1 makes it a plain DiT, whose null class is the superclass row
    learn_sigma         predict 2C channels instead of C: the noise, then the interpolation between the smallest and the
                        largest variance (arXiv 2102.09672, eq. 15)
    parents, null_row, ranks, path  see `TieredEmbedder`

    Raises ValueError if the patch size does not divide the input size, or as `TieredEmbedder` does.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        num_super_classes: int = 1,
        learn_sigma: bool = True,
        parents: torch.Tensor | Sequence[int] | None = None,
        null_row: bool = False,
        ranks: Sequence[int] = (),
        path: bool = False,
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
        self.grad_checkpointing = False  # if True, training keeps only the blocks' inputs and computes each block twice

        # Embedders of the three inputs, and the fixed position embedding
        self.x_embedder = PatchEmbed(
            img_size=input_size, patch_size=patch_size, in_chans=in_channels, embed_dim=hidden_size
        )
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = TieredEmbedder(
            num_classes, num_super_classes, hidden_size, class_dropout_prob, parents, null_row, ranks, path
        )
        pos_embed = get_2d_sincos_pos_embed(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)  # (1, T, D)

        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.joint_modulation = None  # see join_modulations
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Initialize all parameters as DiT does: every block is the identity and the prediction is zero."""
        # Linear layers: Xavier uniform weights, biases 0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # Patch embedding: a convolution, initialized as the linear layer on patches that it is
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(patch.bias)

        # Class table and timestep MLP
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

        # adaLN-Zero: the modulation layers and the output layer are 0
        modulations = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def compile_blocks(self, **options) -> None:
        """Compile the blocks and the final layer with `torch.compile` and its `options`; all blocks share one graph."""
        for part in (*self.blocks, self.final_layer):
            part.compile(**options)

    def join_modulations(self) -> None:
        """Compute the modulations of all layers by one matrix product, in place: for small batches without gradients.

        The parameters of these layers leave the state dict.
        """
        parts = (*self.blocks, self.final_layer)
        self.joint_modulation = JointModulation([part.adaLN_modulation[1] for part in parts])
        for part in parts:
            part.adaLN_modulation = nn.Identity()  # the part receives its modulation in place of the condition

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """Turn patches (N, T, p * p * out_channels) into images (N, out_channels, H, W)."""
        n, tokens, _ = x.shape
        p, g = self.patch_size, math.isqrt(tokens)  # g x g patches
        x = x.view(n, g, g, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, self.out_channels, g * p, g * p)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, force_drop_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise and, with `learn_sigma`, the variance: (N, out_channels, H, W).

        x               (N, C, H, W) noisy latents
        t               (N,) timesteps in 0..999
        y               (N,) rows of the class table. In training mode, labels are replaced by ancestors at random
        force_drop_ids  (N,): decides which labels are replaced instead of chance, see `TieredEmbedder.token_drop`
        """
        # The patch embedding stores tokens channel by channel, and every sum below would keep that layout.
        x = self.x_embedder(x).contiguous() + self.pos_embed  # (N, C, H, W) -> (N, T, D)
        t = self.t_embedder(t)  # (N,) -> (N, D)
        y = self.y_embedder(y, self.training, force_drop_ids)  # (N,) -> (N, D)
        c = t + y  # (N, D)
        *conditions, c = [c] * (len(self.blocks) + 1) if self.joint_modulation is None else self.joint_modulation(c)
        for block, condition in zip(self.blocks, conditions):  # (N, T, D)
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, condition, use_reentrant=False)
            else:
                x = block(x, condition)
        x = self.final_layer(x, c)  # (N, T, D) -> (N, T, p * p * out_channels)
        return self.unpatchify(x)  # (N, out_channels, H, W)

    def forward_with_cfg(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, cfg_scale: float, cfg_channels: int | str = 3
    ) -> torch.Tensor:
        """Predict guided noise for a doubled batch, as DiT's sample.py does: (2N, out_channels, H, W).

        arXiv 2402.18331, equation 1: eps(x | p) + cfg_scale * (eps(x | c) - eps(x | p)), where c is the class and p its
        superclass. For all other guidances, see guidance.py.

        x             (2N, C, H, W); the second half is ignored and replaced by the first
        t             (2N,) timesteps in 0..999
        y             (2N,) rows of the class table: N classes c, then the N rows p that guide them, which are their
                      superclasses or the null class
        cfg_scale     1 is no guidance
        cfg_channels  how many of the first channels are guided: 3 as in the official code, or "all" C. Both halves of the
                      result have the same guided channels and keep their own prediction in the others
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        k = self.in_channels if cfg_channels == "all" else cfg_channels
        e_class, e_super = out[:, :k].chunk(2)  # two of (N, k, H, W)
        guided = e_super + cfg_scale * (e_class - e_super)
        return torch.cat([torch.cat([guided, guided]), out[:, k:]], dim=1)


# ---- sine/cosine position embedding --------------------------------------------------------------


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int) -> torch.Tensor:
    """Return the fixed position embedding of a square grid of patches, row by row: float32 (1, grid_size**2, embed_dim).

    The first half of `embed_dim`, a multiple of 4, encodes the column x of the patch, the second half its row y.
    """
    line = torch.arange(grid_size, dtype=torch.float64)
    y, x = torch.meshgrid(line, line, indexing="ij")
    halves = [sinusoidal_embedding(axis.flatten(), embed_dim // 2, sin_first=True) for axis in (x, y)]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


# ---- DiT configurations --------------------------------------------------------------------------

# (depth, hidden_size, num_heads); "Ti" is the quick start's, the others are from arXiv 2212.09748, table 1
SIZES = {
    "XL": (28, 1152, 16),
    "L": (24, 1024, 16),
    "B": (12, 768, 12),
    "S": (12, 384, 6),
    "Ti": (4, 256, 4),
}


def _preset(depth, hidden_size, num_heads, patch_size):
    return partial(DiT, depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)


# "DiT-XL/2" and the like -> a function that makes the model, with the arguments of DiT
DiT_models = {
    f"DiT-{size}/{patch}": _preset(*shape, patch)
    for size, shape in SIZES.items()
    for patch in ((2,) if size == "Ti" else (2, 4, 8))
}
