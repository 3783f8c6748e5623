"""Faster forward passes for sampling on a GPU: fewer, larger operations, and launches that are recorded once.

Everything here computes what the model computes, but for rounding. A CPU uses none of it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models import DiT

GRAPHED_TOKENS = 4096  # of a forward pass: with more, a GPU takes longer for it than the CPU needs to launch it

# ---- the MLP: GELU as a part of the matrix product -----------------------------------------------


@torch.library.custom_op("finediffusion::linear_gelu", mutates_args=())
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return GELU(x W^T + b) in its tanh form, (..., out_features), for x (..., in_features).

    cuBLASLt applies GELU to the results before it writes them. As an operation of its own it would read and write a tensor
    four times as large as x: a third of the bytes that a compiled block moves outside its matrix products.
    """
    if not x.is_cuda:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    out = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], -1)


@linear_gelu.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


class GeluLinear(nn.Linear):
    """A linear layer followed by GELU; takes over the parameters of `layer`."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features), in the type of the weight."""
        return linear_gelu(x.to(self.weight.dtype), self.weight, self.bias)


def fuse_gelu(model: DiT) -> None:
    """Let the first matrix product of each MLP apply GELU, unless the layer is adapted."""
    for block in model.blocks:
        if type(block.mlp.fc1) is nn.Linear:
            block.mlp.fc1, block.mlp.act = GeluLinear(block.mlp.fc1), nn.Identity()


# ---- CUDA graphs ---------------------------------------------------------------------------------


class Graphs:
    """A forward pass whose launches are recorded once for each shape and replayed: one launch instead of hundreds.

    forward  f(x, t, y) -> (N, 2C, h, w), which neither waits for the GPU nor changes its weights' place
    table    the class table, whose address tells apart the weights of autoguidance and domain guidance

    The result is overwritten by the next call with the same shape. Passes of more than GRAPHED_TOKENS are not recorded.
    """

    def __init__(self, forward, table: nn.Parameter, tokens: int):
        self.forward, self.table, self.tokens = forward, table, tokens
        self.recorded = {}  # (shape, address of the table) -> graph, inputs, output

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if len(x) * self.tokens > GRAPHED_TOKENS:
            return self.forward(x, t, y)
        key = x.shape, self.table.data_ptr()
        if key not in self.recorded:
            self.recorded[key] = self.record(x, t, y)
        graph, inputs, out = self.recorded[key]
        for held, given in zip(inputs, (x, t, y)):
            held.copy_(given)
        graph.replay()
        return out

    def record(self, *arguments: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        """Return a graph of the forward pass, the tensors that it reads and the one that it writes."""
        inputs, side = [argument.clone() for argument in arguments], torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up: compile, choose kernels, allocate workspaces
            for _ in range(2):
                self.forward(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.forward(*inputs)
        return graph, inputs, out


# ---- all of it -----------------------------------------------------------------------------------


def speed_up(model: DiT, half: torch.dtype | None, compiled: bool, swaps: bool) -> None:
    """Prepare a model on its device, in evaluation mode and without gradients, for many forward passes of a sampler.

    half      half-precision type of the computation, in which the frozen weights are stored, or None
    compiled  compile the model
    swaps     the guidance exchanges weights, see `guidance.swapped`
    """
    gpu = model.pos_embed.is_cuda
    if gpu and not swaps:
        model.join_modulations()
    if gpu and half:
        fuse_gelu(model)
    if compiled:
        model.compile_blocks()
    if gpu:
        tokens = model.pos_embed.shape[1]
        model.forward = Graphs(model.forward, model.y_embedder.embedding_table.weight, tokens)
