import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from depthany.geometry.alignment import scale_and_shift


def draw():
    rng = torch.Generator().manual_seed(0)
    pred = torch.randn(3, 6, 7, generator=rng, dtype=torch.float64)
    target = torch.randn(3, 6, 7, generator=rng, dtype=torch.float64)
    return pred, target, torch.rand(3, 6, 7, generator=rng) > 0.3


def test_agrees_with_numpy():
    pred, target, valid = draw()
    scale, shift = scale_and_shift(pred, target, valid)
    for b in range(3):
        p, t = pred[b][valid[b]].numpy(), target[b][valid[b]].numpy()
        solution = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)[0]
        assert_close(torch.stack([scale[b], shift[b]]), torch.from_numpy(solution))


@pytest.mark.parametrize(("a", "b"), [(2.0, 3.0), (-0.5, 100.0), (1e-4, 1.0)])
def test_recovers_scale_and_shift(a, b):
    pred, _, valid = draw()
    scale, shift = scale_and_shift(pred, a * pred + b, valid)
    assert_close(scale, torch.full_like(scale, a))
    assert_close(shift, torch.full_like(shift, b))


def test_survives_a_large_offset_in_float32():
    pred, target, valid = draw()
    exact, _ = scale_and_shift(pred, target, valid)
    scale, _ = scale_and_shift(pred.float() + 1000, target.float(), valid)
    assert_close(scale.double(), exact, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 3.3, -1e4])
def test_constant_prediction_gives_the_best_constant(constant):
    _, target, valid = draw()
    target = target.float()
    scale, shift = scale_and_shift(torch.full_like(target, constant), target, valid)
    assert not scale.any()
    expected = torch.stack([t[v].mean() for t, v in zip(target, valid, strict=True)])
    assert_close(shift, expected)


def test_empty_mask_and_hidden_nan():
    pred, target, valid = draw()
    pred, target = torch.where(valid, pred, torch.nan), torch.where(valid, target, torch.inf)
    pred.requires_grad_()
    valid[1] = False
    scale, shift = scale_and_shift(pred, target, valid)
    assert scale[1] == 0 and shift[1] == 0
    (scale + shift).sum().backward()
    assert pred.grad.isfinite().all() and not pred.grad[~valid].any()


def test_gradients():
    pred, target, valid = draw()
    assert gradcheck(lambda p: scale_and_shift(p, target, valid), pred.requires_grad_())
