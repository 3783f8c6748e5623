"""Parts of a training step: random draws."""

import torch

from training import step
from training.step import DRAWN_TOGETHER, draw_normal, draw_step_noise


def test_noise_drawn_in_parts_is_that_drawn_at_once():
    shape = (5, 4, 8, 8)
    whole, parts = (draw_normal(shape, n, torch.Generator().manual_seed(3), "cpu") for n in (5 * 256, 64))
    assert whole.equal(torch.randn(shape, generator=torch.Generator().manual_seed(3))) and parts.equal(whole)


def test_a_gpu_draws_so_few_numbers_at_once_that_its_model_does_not_matter(monkeypatch):
    """A V100 runs 640 blocks of 256 threads together, an A10 432: more numbers at once, and a thread draws several."""
    sizes = []
    monkeypatch.setattr(step, "draw_normal", lambda shape, together, **options: sizes.append((shape, together)))
    monkeypatch.setattr(torch, "Generator", lambda device: torch._C.Generator())
    for name in ("randint", "rand"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, f=real, generator, device: f(*args, generator=generator))
    draw_step_noise(0, 0, 256, (4, 32, 32), True, 0.1, 0.0, "cuda")
    draw_step_noise(0, 0, 256, (4, 32, 32), True, 0.1, 0.0, "cpu")
    assert sizes == 2 * [((256, 4, 32, 32), DRAWN_TOGETHER)] + 2 * [((256, 4, 32, 32), 256 * 4096)]
    assert DRAWN_TOGETHER <= 256 * 432
