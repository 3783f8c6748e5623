"""DiT: outputs of the official code, presets and shapes, initialization, labels, guidance, compilation."""

import json

import pytest
import torch
from helpers.tiny_models import GOLDEN, awake, golden, tiny_dit
from torch.testing import assert_close

from guidance import Guidance, guided
from models import NORM_EPS, DiT, DiT_models, NormAndModulate, norm_and_modulate
from sampling.samplers import sample_latents_official

SHAPES = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
# DiT (arXiv 2212.09748), table 1: depth, width, heads; Ti is the quick start's
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "Ti": (4, 256, 4)}
NAMES = [f"DiT-{size}/{patch}" for size in "S B L XL".split() for patch in (2, 4, 8)] + ["DiT-Ti/2"]
TABLE = "y_embedder.embedding_table.weight"


def near(ours, theirs):
    """Assert that two tensors agree within 1e-5 of the largest value."""
    assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def load(name):
    """Return a model with the random weights of the official code's, and the recorded inputs and outputs of that."""
    tensors, metadata = golden(name)
    sizes = {key.removeprefix("cfg/"): value for key, value in metadata.items() if key.startswith("cfg/")}
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    if name == "finediffusion":
        sizes["parents"] = tensors["superclass_labels"] - sizes["num_classes"]
        state[TABLE] = torch.randn(10011, 32, generator=torch.Generator().manual_seed(44)) * 0.5
    model = DiT(**sizes).eval()
    assert_close(model.pos_embed, state["pos_embed"])
    absent, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == [] and all(".norm" in key for key in absent) and bool(absent) == (name == "plain_dit")
    return model, tensors


@pytest.fixture(scope="module")
def plain():
    return load("plain_dit")


@pytest.fixture(scope="module")
def fine():
    return load("finediffusion")


@pytest.fixture(autouse=True)
def seed_and_no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ---- outputs of the official code ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "fine"])
def test_forward_passes_match_the_official_code(name, request):
    model, data = request.getfixturevalue(name)
    near(model(data["x"], data["t"], data["y"]), data["out"])
    near(model.forward_with_cfg(data["xx"], data["tt"], data["yy"], 4.0), data["out_cfg4"])


def test_superclass_rows_match_the_official_code(fine):
    model, data = fine
    assert model.y_embedder.superclass_rows(torch.arange(10000)).equal(data["superclass_labels"])
    assert model.y_embedder.superclass_rows(data["yy"][:3]).equal(data["yy"][3:])


def test_ten_sampling_steps_match_the_official_code(fine):
    model, data = fine
    near(sample_latents_official(model, data["yy"][:3], seed=0, cfg_scale=4.0, steps=10), data["sample10_seed0"])


@pytest.mark.parametrize(
    "name, size", [("DiT-XL/2", 32), ("DiT-XL/2-512", 64), ("DiT-S/8", 32), ("DiT-B/4", 32)], ids=lambda x: str(x)
)
def test_state_dict_has_the_official_names_and_shapes(name, size):
    with torch.device("meta"):
        model = DiT_models[name.removesuffix("-512")](input_size=size, num_classes=10000, num_super_classes=11)
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]["shapes"]
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name]["total"]


# ---- presets, shapes, initialization -------------------------------------------------------------


def test_presets_have_the_published_sizes():
    assert sorted(DiT_models) == sorted(NAMES)
    for name in NAMES:
        with torch.device("meta"):
            model = DiT_models[name](input_size=32)
        size, patch = name.removeprefix("DiT-").split("/")
        depth, width, heads = SIZES[size]
        assert (len(model.blocks), model.blocks[0].attn.num_heads, model.patch_size) == (depth, heads, int(patch))
        assert model.pos_embed.shape == (1, (32 // int(patch)) ** 2, width)
        assert model.y_embedder.embedding_table.weight.shape == (1001, width)


@pytest.mark.parametrize("sizes", [{}, dict(in_channels=3, patch_size=4), dict(learn_sigma=False, input_size=6)])
def test_a_new_model_predicts_zero(sizes):
    model = tiny_dit(**sizes)
    x = torch.randn(3, model.in_channels, model.input_size, model.input_size)
    out = model(x, torch.tensor([0, 500, 999]), torch.tensor([0, 4, 6]))
    channels = model.in_channels * (2 if model.learn_sigma else 1)
    assert out.shape == (3, channels, *x.shape[2:]) and (out == 0).all()
    tokens = torch.randn(3, 5, 32)
    assert all(block(tokens, torch.randn(3, 32)).equal(tokens) for block in model.blocks)


def test_unpatchify_restores_the_image():
    model, p = tiny_dit(patch_size=4, input_size=12), 4
    image = torch.randn(2, model.out_channels, 12, 12)
    corners = [(row, column) for row in range(0, 12, p) for column in range(0, 12, p)]
    patches = [image[:, :, row : row + p, column : column + p] for row, column in corners]
    tokens = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], dim=1)
    assert model.unpatchify(tokens).equal(image)


def test_tokens_are_in_the_order_of_unpatchify():
    """Change one patch: only its own token changes."""
    model = tiny_dit()
    x, changed = torch.zeros(2, 1, 4, 8, 8).unbind()
    changed[:, :, 2:4, 6:8] = 1.0
    moved = (model.x_embedder(changed) - model.x_embedder(x)).abs().sum(-1) > 0
    assert moved.flatten().nonzero().tolist() == [[1 * 4 + 3]]


def test_the_residual_stream_is_contiguous():
    """Each norm and each sum of every block would otherwise work on transposed tokens."""
    model, (x, t) = awake(tiny_dit()).eval(), inputs()
    layouts = []
    for part in (*model.blocks, model.final_layer):
        part.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    model(x, t, torch.tensor([0, 1, 4, 5]))
    assert layouts == [True] * 3


def test_an_input_size_that_the_patch_size_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="is 9 pixels wide, expected a multiple of its patch size 2"):
        tiny_dit(input_size=9)


# ---- labels --------------------------------------------------------------------------------------


def inputs(count=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.linspace(0, 999, count).long()


def test_dropped_labels_become_their_superclasses():
    model, (x, t), y = awake(tiny_dit()), inputs(), torch.tensor([0, 1, 4, 5])
    drop = torch.tensor([1, 0, 1, 1])
    for mode in (model.train(), model.eval()):
        out = mode(x, t, y, force_drop_ids=drop)
        assert out.equal(model.eval()(x, t, torch.tensor([5, 1, 6, 5])))
        assert not out.equal(model(x, t, y))


def test_labels_are_dropped_only_in_training():
    model, (x, t), y = awake(tiny_dit(class_dropout_prob=1.0)), inputs(), torch.tensor([0, 1, 4, 2])
    kept, dropped = model.eval()(x, t, y), model.train()(x, t, y)
    assert dropped.equal(model.eval()(x, t, torch.tensor([5, 6, 6, 5]))) and not dropped.equal(kept)


# ---- guidance ------------------------------------------------------------------------------------


def superclass_guidance(model, labels, scale, channels=3):
    return guided(model, labels, Guidance("superclass", scale, channels=channels), [()] * len(labels))


@pytest.mark.parametrize("channels", [3, "all"])
def test_a_single_superclass_gives_classifier_free_guidance(plain, channels):
    (model, _), (x, t), y = plain, inputs(), torch.tensor([0, 3, 4, 4])
    null = torch.full((4,), 5)
    with_class, without = model(x, t, y), model(x, t, null)
    expected, k = with_class.clone(), 4 if channels == "all" else channels
    expected[:, :k] = without[:, :k] + 2.5 * (with_class[:, :k] - without[:, :k])
    out = superclass_guidance(model, y, 2.5, channels)(x, t)
    near(out, expected)
    assert (out - with_class).abs().max() > 1e-2


def test_the_superclass_guides_the_class():
    model, (x, t), y = awake(tiny_dit()).eval(), inputs(), torch.tensor([0, 1, 2, 3])
    with_class, without = model(x, t, y), model(x, t, torch.tensor([5, 6, 5, 6]))
    near(superclass_guidance(model, y, 4.0)(x, t)[:, :3], without[:, :3] + 4 * (with_class - without)[:, :3])
    near(superclass_guidance(model, y, 0.0)(x, t)[:, :3], without[:, :3])


def test_scale_one_needs_no_second_forward_pass():
    model, (x, t), y = awake(tiny_dit()).eval(), inputs(), torch.tensor([0, 1, 2, 3])
    sizes = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    assert superclass_guidance(model, y, 1)(x, t).equal(model(x, t, y))
    assert sizes == [4, 4]  # not 8


def test_three_or_all_channels_are_guided():
    model, (x, t), y = awake(tiny_dit()).eval(), inputs(), torch.tensor([0, 1, 2, 3])
    few, every, own = (superclass_guidance(model, y, s, c)(x, t) for s, c in ((4, 3), (4, "all"), (1, 3)))
    assert few[:, :3].equal(every[:, :3]) and not few[:, :3].equal(own[:, :3])
    near(few[:, 3], own[:, 3])
    assert (every[:, 3] - own[:, 3]).abs().max() > 1e-2
    near(few[:, 4:], own[:, 4:])
    near(every[:, 4:], own[:, 4:])


def test_guided_forward_ignores_the_second_half():
    model, (x, t), y = awake(tiny_dit()).eval(), inputs(), torch.tensor([0, 3, 5, 6])
    out = model.forward_with_cfg(x, t.clamp(max=0), y, 4.0)
    other = model.forward_with_cfg(torch.cat([x[:2], -x[2:]]), t.clamp(max=0), y, 4.0)
    assert out.shape == (4, 8, 8, 8) and out.equal(other)
    assert out[:2, :3].equal(out[2:, :3]) and not out[:2, 3:].equal(out[2:, 3:])


# ---- adaptive norms, compilation -----------------------------------------------------------------


def test_norm_and_modulate():
    """Compare the hand-written backward pass with numerical derivatives and with autograd on the formula."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (5,), (5,), (2, 1, 5), (2, 1, 5)]  # x, weight, bias, shift, scale
    x, weight, bias, shift, scale = values = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]
    norm = torch.nn.LayerNorm(5, NORM_EPS).double()
    norm.weight, norm.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())
    plain = norm_and_modulate(norm, x, shift, scale)  # without gradients, as in sampling
    with torch.enable_grad():
        trained = norm_and_modulate(norm, x, shift, scale)
        assert "NormAndModulate" in trained.grad_fn.name()
        assert torch.autograd.gradcheck(lambda *v: NormAndModulate.apply(*v, NORM_EPS), values)
        formula = torch.nn.functional.layer_norm(x, (5,), weight, bias, NORM_EPS) * (1 + scale) + shift
        parameters = [x, norm.weight, norm.bias, shift, scale]
        for ours, autograd in zip(
            torch.autograd.grad(trained.square().sum(), parameters), torch.autograd.grad(formula.square().sum(), values)
        ):
            assert_close(ours, autograd)
    assert_close(trained, formula)
    assert_close(plain, formula)


@pytest.mark.parametrize("loss", [lambda out, x: out.square().sum(), lambda out, x: out.sum() + x.pow(3).sum()])
def test_the_fused_norm_is_not_differentiated_twice(loss):
    """Also if the gradient of the output is constant and x has another path to the loss."""
    x = torch.randn(2, 3, 5, requires_grad=True)
    norm, shift, scale = torch.nn.LayerNorm(5), torch.zeros(2, 1, 5), torch.zeros(2, 1, 5, requires_grad=True)
    with torch.enable_grad():
        out = norm_and_modulate(norm, x, shift, scale)
        with pytest.raises(RuntimeError, match="differentiable once only, expected create_graph=False"):
            torch.autograd.grad(loss(out, x), x, create_graph=True)


def test_all_blocks_share_one_graph():
    graphs, model, (x, t), y = [], awake(tiny_dit(depth=4)), inputs(), torch.tensor([0, 3])
    expected = model.eval()(x[:2], t[:2], y)
    model.compile_blocks(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert model(x[:2], t[:2], y).equal(expected) and len(graphs) == 2  # the other one is the final layer's
    torch.compiler.reset()
