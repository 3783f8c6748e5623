"""Faster forward passes for sampling: the same results, the same names of parameters, recorded launches."""

import pytest
import torch
from helpers.tiny_models import awake, tiny_dit
from torch.testing import assert_close

from finetune import add_lora, store_frozen
from guidance import Guidance
from sampling import speed
from sampling.samplers import sample_keyed
from sampling.speed import GRAPHED_TOKENS, Graphs, fuse_gelu, linear_gelu, speed_up


@pytest.fixture
def dit():
    return awake(tiny_dit()).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def inputs(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.full((count,), 300), torch.arange(count) % 7


def products(model):
    """Return how many linear layers and matrix products a forward pass has."""
    with torch.profiler.profile(acc_events=True) as profile:
        model(*inputs(3))
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::linear", "aten::addmm"))


def test_joint_modulations_are_one_product(dit):
    expected, before = dit(*inputs(3)), products(dit)
    names = set(dit.state_dict())
    dit.join_modulations()
    assert_close(dit(*inputs(3)), expected, rtol=1e-4, atol=1e-5)
    assert products(dit) == before - 2 * 2  # one instead of three, each a linear layer and a product
    gone = {
        f"{part}.adaLN_modulation.1.{name}"
        for part in ("blocks.0", "blocks.1", "final_layer")
        for name in ("weight", "bias")
    }
    assert names - set(dit.state_dict()) == gone


def test_gelu_in_the_product(dit):
    """The parameters keep their names, so that guidance may swap them; an adapted layer stays as it is."""
    expected, names = dit(*inputs(3)), list(dit.state_dict())
    fuse_gelu(dit)
    assert_close(dit(*inputs(3)), expected, rtol=1e-5, atol=1e-6)
    assert list(dit.state_dict()) == names and type(dit.blocks[0].mlp.act) is torch.nn.Identity
    dit.blocks[0].mlp.fc1.bias.data = dit.blocks[0].mlp.fc1.bias + 1  # as `guidance.swapped` does
    assert (dit(*inputs(3)) - expected).abs().max() > 1e-2
    adapted = awake(tiny_dit()).eval()
    add_lora(adapted, 2, ["mlp"])
    expected = adapted(*inputs(3))
    fuse_gelu(adapted)
    assert adapted(*inputs(3)).equal(expected) and type(adapted.blocks[0].mlp.act) is torch.nn.GELU


def test_the_operation_has_the_shape_and_type_of_its_results():
    """torch.compile relies on it."""
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    torch.library.opcheck(linear_gelu, (x, weight, bias), test_utils=["test_schema", "test_faketensor"])


class Replayed:
    """A CUDA graph for a CPU."""

    def __init__(self, forward, held, out):
        self.forward, self.held, self.out = forward, held, out

    def replay(self):
        self.out.copy_(self.forward(*self.held))


def test_launches_are_recorded_for_each_shape_and_table(dit, monkeypatch):
    recorded = []

    def record(self, *arguments):
        recorded.append(len(arguments[0]))
        held = [argument.clone() for argument in arguments]
        out = torch.empty_like(self.forward(*held))
        return Replayed(self.forward, held, out), held, out

    monkeypatch.setattr(Graphs, "record", record)
    expected = {count: dit(*inputs(count)) for count in (2, 3)}
    table, tokens = dit.y_embedder.embedding_table.weight, dit.pos_embed.shape[1]
    dit.forward = Graphs(dit.forward, table, tokens)
    for count in (2, 3, 2, 3):
        assert dit(*inputs(count)).equal(expected[count])
    assert recorded == [2, 3]
    own, table.data = table.data, torch.zeros_like(table)
    assert not dit(*inputs(2)).equal(expected[2]) and recorded == [2, 3, 2]
    table.data = own
    assert dit(*inputs(2)).equal(expected[2])
    monkeypatch.setattr(speed, "GRAPHED_TOKENS", 3 * tokens - 1)
    assert dit(*inputs(3)).equal(expected[3]) and dit(*inputs(4)).shape == (4, 8, 8, 8) and recorded == [2, 3, 2]
    assert GRAPHED_TOKENS == 16 * 256  # 8 guided images of 256 pixels


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_cpu_computes_as_before(half, dit):
    """Also with biases in half precision: autocast rounds them in any case."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half is not None):
        expected = dit(*inputs(3))
        if half:
            store_frozen(dit, half)
            assert dit.blocks[0].mlp.fc1.bias.dtype == dit.final_layer.linear.bias.dtype == half
            assert dit.blocks[0].norm1.bias.dtype == dit.pos_embed.dtype == torch.float32
        speed_up(dit, half, compiled=False, swaps=False)
        assert dit(*inputs(3)).equal(expected) and dit.joint_modulation is None and "forward" not in vars(dit)


def test_a_batch_is_filled_up(dit):
    seen = []
    dit.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    options = dict(guidance=Guidance(scale=2.0), sampler="ddpm", steps=3)
    alone = sample_keyed(dit, [3, 1], [(0, 0), (0, 1)], **options)
    filled = sample_keyed(dit, [3, 1], [(0, 0), (0, 1)], fill=5, **options)
    assert_close(filled, alone, rtol=1e-4, atol=1e-5)
    assert seen == [4] * 3 + [10] * 3
