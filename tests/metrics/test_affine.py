import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from depthany.metrics.affine import DepthScores, affine_invariant_depth

B, H, W = 3, 9, 11


def draw():
    rng = torch.Generator().manual_seed(0)
    truth = 1 / (1 + 9 * torch.rand(B, H, W, generator=rng, dtype=torch.float64))
    pred = truth + 0.1 * torch.rand(B, H, W, generator=rng, dtype=torch.float64)
    return pred, truth, torch.rand(B, H, W, generator=rng) > 0.3


def slow(pred, truth, valid, cap):
    """One image with numpy."""
    keep = valid.numpy() & (truth.numpy() > 0)
    if cap is not None:
        keep &= truth.numpy() >= cap
    p, t = pred.numpy()[keep], truth.numpy()[keep]
    solution = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)[0]
    fitted = p * solution[0] + solution[1]
    if solution[0] < 0:
        fitted = np.full_like(p, t.mean())
    depth, true_depth = 1 / np.maximum(fitted, t.min()), 1 / t
    ratio = np.maximum(depth / true_depth, true_depth / depth)
    return (abs(depth - true_depth) / true_depth).mean(), (ratio < 1.25).mean(), solution[0] < 0


@pytest.mark.parametrize("cap", [None, 0.2])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_to_numpy(cap, sign):
    pred, truth, valid = draw()
    scores = affine_invariant_depth(sign * pred, truth, valid, min_disparity=cap)
    for b in range(B):
        abs_rel, delta1, negative = slow(sign * pred[b], truth[b], valid[b], cap)
        assert_close(scores["abs_rel"][b].item(), float(abs_rel))
        assert_close(scores["delta1"][b].item(), float(delta1))
        assert scores["negative_scale"][b].item() == negative == (sign < 0)


def test_perfect_up_to_scale_and_shift_in_any_unit():
    _, truth, valid = draw()
    scores = affine_invariant_depth(80 * truth.float() + 3, truth.float(), valid, min_disparity=None)
    assert_close(scores["abs_rel"], torch.zeros(B), rtol=0, atol=1e-4)
    assert scores["delta1"].tolist() == [1, 1, 1]
    assert scores["scored"].all() and not scores["negative_scale"].any()


def test_invariant_to_scale_and_shift():
    pred, truth, valid = draw()
    one = affine_invariant_depth(pred, truth, valid, min_disparity=None)
    other = affine_invariant_depth(5 * pred - 2, 80 * truth, valid, min_disparity=None)
    for name in one:
        assert_close(one[name], other[name])


def test_an_inverted_prediction_scores_like_a_constant():
    _, truth, valid = draw()
    inverted = affine_invariant_depth(-truth, truth, valid, min_disparity=None)
    constant = affine_invariant_depth(torch.ones_like(truth), truth, valid, min_disparity=None)
    assert inverted["negative_scale"].all() and not constant["negative_scale"].any()
    for name in ("abs_rel", "delta1"):
        assert_close(inverted[name], constant[name])


def test_the_aligned_prediction_is_floored_at_the_farthest_truth():
    pred, truth, valid = draw()
    valid[:] = True
    pred = truth.clone()
    pred[:, 0, 0] = -50  # aligned far below zero: would be a negative depth
    truth[:, 0, 0] = truth.amin((1, 2))
    scores = affine_invariant_depth(pred, truth, valid, min_disparity=None)
    assert scores["abs_rel"].isfinite().all()
    for b in range(B):
        assert_close(scores["abs_rel"][b].item(), float(slow(pred[b], truth[b], valid[b], None)[0]))


def test_invalid_pixels_and_zero_disparity_do_not_count():
    pred, truth, valid = draw()
    clean = affine_invariant_depth(pred, truth, valid, min_disparity=None)
    pred, truth = torch.where(valid, pred, torch.nan), torch.where(valid, truth, torch.nan)
    hidden = affine_invariant_depth(pred, truth, valid, min_disparity=None)
    zero = affine_invariant_depth(
        pred.nan_to_num(1.0), truth.nan_to_num(0.0), torch.ones_like(valid), min_disparity=None
    )
    for name in clean:
        assert_close(clean[name], hidden[name])
        assert_close(clean[name], zero[name])


@pytest.mark.parametrize("num_valid", [0, 9, 10])
def test_too_few_pixels_are_not_scored(num_valid):
    pred, truth, _ = draw()
    valid = (torch.arange(H * W) < num_valid).view(1, H, W).expand(B, H, W)
    scores = affine_invariant_depth(pred, truth, valid, min_disparity=None)
    assert (scores["scored"] == (num_valid >= 10)).all()
    for name in ("abs_rel", "delta1", "negative_scale"):
        assert scores[name].isfinite().equal(scores["scored"])


def test_the_score_is_the_mean_over_images_by_source():
    pred, truth, valid = draw()
    valid[2] = False
    pred[1] = -pred[1]
    scores = affine_invariant_depth(pred, truth, valid, min_disparity=None)
    metric = DepthScores(sources=["indoor", "outdoor", "unseen"])
    metric.update(["indoor", "outdoor", "outdoor"], scores)
    metric.update(["indoor"], {name: value[1:2] for name, value in scores.items()})
    result = metric.compute()
    assert_close(result["indoor"]["abs_rel"], scores["abs_rel"][:2].mean().item())
    assert result["indoor"]["negative_scale"] == 0.5
    assert result["indoor"]["num_images"] == 2 and result["indoor"]["num_unscored"] == 0
    assert_close(result["outdoor"]["delta1"], scores["delta1"][1].item())
    assert result["outdoor"]["num_images"] == result["outdoor"]["num_unscored"] == 1
    assert result["unseen"]["num_images"] == 0 and math.isnan(result["unseen"]["abs_rel"])
    metric.reset()
    assert not metric.num_images.any()
    with pytest.raises(ValueError, match="known: indoor"):
        metric.update(["street", "indoor", "indoor"], scores)


def test_every_state_is_summed_over_ranks():
    metric = DepthScores(sources=["a"])
    assert {f.__name__ for f in metric._reductions.values()} == {"dim_zero_sum"}


def test_one_prediction_serves_every_image():
    pred, truth, valid = draw()
    one = affine_invariant_depth(pred[:1], truth, valid, min_disparity=None)
    each = affine_invariant_depth(pred[:1].expand(B, H, W), truth, valid, min_disparity=None)
    for name in one:
        assert_close(one[name], each[name])
