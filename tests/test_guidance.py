"""Guidance: the formulas, the number of forward passes, drawn rows, swapped weights, models that lack a row."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import awake, refusal, tiny_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import guidance
from finetune import add_gammas
from guidance import FORMULAS, GUIDANCES, Guidance, check_guidance, draw_other, guided, hash_integer, swapped

LABELS = torch.tensor([0, 1, 4, 2])
PARENT_ROWS, NULL = torch.tensor([5, 6, 6, 5]), 7
KEYS = [(0, k) for k in range(4)]
TABLE = "y_embedder.embedding_table.weight"
PASSES = {"chain": [12]} | {kind: [4, 4] for kind in ("autoguidance", "domain")}  # batch of each pass; others [8]


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    return awake(tiny_dit(null_row=True), std=0.05).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weak():
    """Return the biases, norms and class table of another model: {name: tensor}."""
    model = awake(tiny_dit(null_row=True), seed=1, std=0.05).eval()
    return {name: p.data for name, p in model.named_parameters() if p.ndim == 1 or name == TABLE}


@pytest.fixture(scope="module")
def make(weak):
    """Return make(kind, ...), which makes a Guidance with the other weights that it needs."""
    others = {"autoguidance": weak, "domain": weak | {TABLE: weak[TABLE][-1:]}}
    return lambda kind, *scales, **options: Guidance(kind, *scales, other_weights=others.get(kind), **options)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def at(timestep, count=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.full((count,), timestep)


def near(ours, theirs):
    """Assert that two tensors agree within 1e-5 of the largest value: the same sums in another order."""
    assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


class Counted:
    """Record the batch size of every forward pass of a model inside a `with` block."""

    def __init__(self, model):
        self.sizes = []
        self.hook = model.register_forward_pre_hook(lambda _, inputs: self.sizes.append(len(inputs[0])))

    def __enter__(self):
        return self.sizes

    def __exit__(self, *_):
        self.hook.remove()


# ---- the formulas --------------------------------------------------------------------------------


def predictions(model, x, t, weak):
    """Return the predictions in the formulas, each computed in its own forward pass."""
    e = {"c": model(x, t, LABELS), "p": model(x, t, PARENT_ROWS), "0": model(x, t, torch.full((4,), NULL))}
    other = awake(tiny_dit(null_row=True), std=0.05).eval()
    other.load_state_dict(model.state_dict())
    other.load_state_dict(weak, strict=False)
    return e | {"weak": other(x, t, LABELS), "base": other(x, t, torch.full((4,), NULL))}


WRITTEN_OUT = {
    "superclass": lambda e, w, _: e["p"] + w * (e["c"] - e["p"]),
    "null": lambda e, w, _: e["0"] + w * (e["c"] - e["0"]),
    "chain": lambda e, w, v: e["0"] + v * (e["p"] - e["0"]) + w * (e["c"] - e["p"]),
    "autoguidance": lambda e, w, _: e["weak"] + w * (e["c"] - e["weak"]),
    "domain": lambda e, w, _: e["base"] + w * (e["c"] - e["base"]),
}


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_each_formula_matches_its_definition(kind, make, dit, weak):
    x, t = at(400)
    e = predictions(dit, x, t, weak)
    expected = WRITTEN_OUT[kind](e, 2.5, 1.5)
    out = guided(dit, LABELS, make(kind, 2.5, 1.5), KEYS)(x, t)
    near(out[:, :3], expected[:, :3])
    near(out[:, 3:], e["c"][:, 3:])
    every = guided(dit, LABELS, make(kind, 2.5, 1.5, channels="all"), KEYS)(x, t)
    near(every[:, :4], expected[:, :4])
    near(every[:, 4:], e["c"][:, 4:])
    others = [WRITTEN_OUT[name](e, 2.5, 1.5) for name in WRITTEN_OUT if name != kind]
    assert all((expected - other).abs().max() > 1e-2 for other in others)  # the formulas differ on these inputs


@pytest.mark.parametrize("kind, table", [("random-class", range(5)), ("wrong-superclass", (5, 6))])
def test_the_controls_use_a_row_other_than_the_images_own(kind, table, make, dit):
    x, t = at(400)
    e_c = dit(x, t, LABELS)
    out = guided(dit, LABELS, make(kind, 2.0, channels="all"), KEYS)(x, t)
    for i in range(4):
        rows = [row for row in table if row not in (LABELS[i], PARENT_ROWS[i])]
        candidates = [2 * e_c[i] - dit(x[i : i + 1], t[:1], torch.tensor([row]))[0] for row in rows]
        assert any((out[i, :4] - candidate[:4]).abs().max() < 1e-4 for candidate in candidates)


def test_the_chain_contains_superclass_and_null_guidance(make, dit):
    x, t = at(700)
    chain = {wp: guided(dit, LABELS, make("chain", 3.0, wp), KEYS)(x, t) for wp in (1.0, 3.0, 1.0001, 2.9999)}
    for wp, kind, close in ((1.0, "superclass", 1.0001), (3.0, "null", 2.9999)):
        assert chain[wp].equal(guided(dit, LABELS, make(kind, 3.0), KEYS)(x, t))
        assert_close(chain[close], chain[wp], rtol=0, atol=2e-3)  # continuous there
    assert not chain[1.0].equal(chain[3.0])


def test_superclass_and_null_guidance_are_the_same_for_a_plain_dit():
    plain = awake(tiny_dit(num_super_classes=1, parents=None), std=0.05).eval()
    x, t = at(300)
    out = [guided(plain, LABELS, Guidance(kind, 2.0), KEYS)(x, t) for kind in ("superclass", "null")]
    assert out[0].equal(out[1])


# ---- scale 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GUIDANCES)
def test_scale_1_is_exactly_the_prediction_for_the_class(kind, make, dit):
    for timestep in (0, 500, 999):
        x, t = at(timestep)
        with Counted(dit) as sizes:
            for channels in (3, "all"):
                out = guided(dit, LABELS, make(kind, 1.0, 1.0, channels=channels), KEYS)(x, t)
                assert out.equal(dit(x, t, LABELS))
        assert sizes == [4] * 4
    assert kind == "none" or not guided(dit, LABELS, make(kind, 1.5, 1.0), KEYS)(x, t).equal(out)


def test_a_chain_with_a_single_scale_of_1_is_guided(make, dit):
    x, t = at(500)
    e_c = dit(x, t, LABELS)
    assert not guided(dit, LABELS, make("chain", 1.0, 2.0), KEYS)(x, t).equal(e_c)
    assert not guided(dit, LABELS, make("chain", 2.0, 1.0), KEYS)(x, t).equal(e_c)


@given(st.sampled_from(sorted(WRITTEN_OUT)), st.floats(0, 10), st.floats(0, 10), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_weights_of_a_formula_sum_to_1(kind, w, v, seed):
    """Every formula is a weighted sum of predictions: e_c has the weight w, and all weights sum to 1."""
    numbers = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = {"class": 0, 0: 1, "null": 2, "base null": 3}
    scales = Guidance(kind, w, v).step_scales(1)

    def eps(*kinds, other=False):
        return [values[4 if other and name == "class" else rows[name]] for name in kinds]

    values = numbers
    own, first = FORMULAS[kind](eps, scales)
    assert own.equal(numbers[0])
    values = numbers + torch.tensor([1.0, 0, 0, 0, 0]).view(5, 1)  # only e_c changes
    second = FORMULAS[kind](eps, scales)[1]
    assert_close(second - first, torch.full((3,), w, dtype=torch.float64), rtol=0, atol=1e-9)
    values = numbers + 7  # all change
    assert_close(FORMULAS[kind](eps, scales)[1] - first, torch.full((3,), 7.0).double(), rtol=0, atol=1e-9)


SCALE = st.floats(0, 10)


@given(SCALE, SCALE, st.integers(0, 2**32))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_chain_with_any_scales(w, v, seed):
    """Bit for bit superclass guidance at w_p = 1 and null guidance at w_p = w_c, otherwise the sum of its two steps."""
    numbers = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)).double()
    e = dict(zip(("class", 0, "null"), numbers))

    def eps(*kinds):
        return [e[kind] for kind in kinds]

    def pushed(kind, *scales):
        return FORMULAS[kind](eps, Guidance(kind, *scales).step_scales(1))[1]

    assert pushed("chain", w, 1).equal(pushed("superclass", w, v)) and pushed("chain", w, w).equal(pushed("null", w, v))
    steps = v * (e[0] - e["null"]) + w * (e["class"] - e[0])
    assert_close(pushed("chain", w, v) - e["null"], steps, rtol=0, atol=1e-12)


@given(st.sampled_from(sorted(FORMULAS)), SCALE, SCALE, st.sampled_from((3, "all")), st.integers(0, 999))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_guided_model_is_linear_in_the_scale(make, dit, kind, w, v, channels, timestep):
    x, t = at(timestep)
    count = 4 if channels == "all" else channels

    def predicted(scale):
        with torch.no_grad():
            return guided(dit, LABELS, make(kind, scale, v, channels=channels), KEYS)(x, t)

    zero, one, out = (predicted(scale) for scale in (0.0, 1.0, w))
    with torch.no_grad():
        own = dit(x, t, LABELS)
    # the class's prediction up to the order of sums, since the batch sizes differ
    assert_close(out[:, count:], own[:, count:], rtol=0, atol=1e-5 * own.abs().max().item())
    line = zero + w * (one - zero)
    assert_close(out, line, rtol=0, atol=2e-5 * (1 + w) * max(line.abs().max().item(), one.abs().max().item()))


# ---- forward passes, the interval ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in GUIDANCES if kind != "none"])
def test_one_forward_pass_per_image_outside_the_interval(kind, make, dit):
    """Inside the interval, both ends included, there are two forward passes per image (three for a chain)."""
    f = guided(dit, LABELS, make(kind, 2.0, 3.0, interval=(200, 600)), KEYS)
    full = guided(dit, LABELS, make(kind, 2.0, 3.0), KEYS)
    for timestep in (0, 199, 200, 400, 600, 601, 999):
        x, t = at(timestep)
        with Counted(dit) as sizes:
            out = f(x, t)
        if 200 <= timestep <= 600:
            assert sizes == PASSES.get(kind, [8]) and out.equal(full(x, t))
        else:
            assert sizes == [4] and out.equal(dit(x, t, LABELS))


def test_a_chain_skips_terms_that_cancel(make, dit):
    for scales, size in (((2.0, 1.0), 8), ((2.0, 2.0), 8), ((2.0, 3.0), 12), ((1.0, 1.0), 4)):
        with Counted(dit) as sizes:
            guided(dit, LABELS, make("chain", *scales), KEYS)(*at(0))
        assert sizes == [size]


# ---- drawn rows ----------------------------------------------------------------------------------


@given(st.integers(2, 10_000), st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_drawn_row_is_never_the_images_own(count, data):
    own, key = data.draw(st.integers(0, count - 1)), data.draw(st.tuples(st.integers(0), st.integers(0)))
    drawn = draw_other(own, count, key)
    assert 0 <= drawn < count and drawn != own and drawn == draw_other(own, count, key)


def test_drawn_rows_and_their_hash_stay_the_same_in_every_release():
    assert hash_integer("guide 0 7") == 215080140321709733166225495963700394160
    assert draw_other(0, 11, (0, 7)) == 1 and draw_other(10, 11, (0, 7)) == 0


def test_drawn_rows_are_uniform():
    drawn = torch.tensor([draw_other(3, 11, (0, k)) for k in range(5000)])
    counts = drawn.bincount(minlength=11)
    assert counts[3] == 0
    assert abs(counts[counts > 0] - 500).max() < 4 * 500**0.5


def test_an_image_draws_the_same_row_in_every_batch(make, dit):
    x, t = at(100)
    together = guided(dit, LABELS, make("random-class", 2.0), KEYS)(x, t)
    for i in range(4):
        alone = guided(dit, LABELS[i : i + 1], make("random-class", 2.0), KEYS[i : i + 1])(x[i : i + 1], t[:1])
        near(alone[0], together[i])
    moved = guided(dit, LABELS, make("random-class", 2.0), [(1, k) for k in range(4)])(x, t)
    assert (moved - together).abs().flatten(1).max(1).values.max() > 1e-2


# ---- other weights -------------------------------------------------------------------------------


def test_swapped_weights_are_restored_even_after_an_error(dit, weak):
    before = {name: (p.data_ptr(), p.shape, p.clone()) for name, p in dit.named_parameters()}
    pairs = [(dit.get_parameter(name), tensor) for name, tensor in (weak | {TABLE: weak[TABLE][-1:]}).items()]
    with pytest.raises(KeyError), swapped(pairs):
        assert all(p.data_ptr() == tensor.data_ptr() for p, tensor in pairs)
        raise KeyError
    for name, p in dit.named_parameters():
        pointer, shape, values = before[name]
        assert (p.data_ptr(), p.shape) == (pointer, shape) and p.equal(values)


def test_swapping_copies_nothing(make, dit):
    held = make("domain", 2.0).other_weights
    f = guided(dit, LABELS, make("domain", 2.0), KEYS)
    seen = []
    hook = dit.blocks[0].mlp.fc1.register_forward_pre_hook(
        lambda module, _: seen.append(module.bias.data_ptr() == held["blocks.0.mlp.fc1.bias"].data_ptr())
    )
    f(*at(0))
    hook.remove()
    assert seen == [False, True]


def test_difffits_gammas_are_swapped_too():
    model = awake(tiny_dit(), std=0.05).eval().requires_grad_(False)
    add_gammas(model, "scalar")
    gammas = {name: p for name, p in model.named_parameters() if "gamma_" in name}
    assert len(gammas) == 4
    x, t = at(500)
    with swapped([(p, torch.tensor(2.0)) for p in gammas.values()]):
        inside = model(x, t, LABELS)
    own = model(x, t, LABELS)
    for p in gammas.values():
        p.fill_(2.0)
    assert inside.equal(model(x, t, LABELS)) and not inside.equal(own)


# ---- models that lack a row ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["null", "chain"])
def test_null_guidance_needs_a_null_row(kind):
    for model in (tiny_dit(null_row=True), tiny_dit(num_super_classes=1, parents=None)):
        check_guidance(Guidance(kind, 2.0), model.y_embedder)
    with refusal(f"--guidance is {kind}, but the model has no null row: train it with --null-prob"):
        check_guidance(Guidance(kind, 2.0, 3.0), tiny_dit().y_embedder)
    check_guidance(Guidance("chain", 2.0, 1.0), tiny_dit().y_embedder)  # superclass guidance


def test_controls_need_a_second_row_to_draw():
    single = tiny_dit(num_super_classes=1, parents=None).y_embedder
    with refusal("--guidance is wrong-superclass, but the model has a single superclass: choose another guidance"):
        check_guidance(Guidance("wrong-superclass", 2.0), single)
    alone = tiny_dit(num_classes=1, num_super_classes=1, parents=None).y_embedder
    with refusal("--guidance is random-class, but the model has a single class: choose another guidance"):
        check_guidance(Guidance("random-class", 2.0), alone)
    check_guidance(Guidance("random-class", 2.0), single)


@pytest.mark.parametrize("kind", ["autoguidance", "domain"])
def test_other_weights_are_required(kind, dit):
    with pytest.raises(AssertionError, match="other weights"):
        check_guidance(Guidance(kind, 2.0), dit.y_embedder)


def test_defaults_are_the_papers():
    assert Guidance() == Guidance("superclass", 4.0, 1.0, (0, 999), 3, None)
    assert replace(Guidance(), scale=1.0).idle and not Guidance().idle
    assert set(FORMULAS) | {"none"} == set(guidance.GUIDANCES)
