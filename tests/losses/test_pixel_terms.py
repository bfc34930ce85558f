"""Laws of the terms that compare maps: the data term and gradient matching."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from depthany.geometry.disparity import normalise
from depthany.losses.affine_invariant import (
    AffineInvariant,
    affine_invariant,
    aligned,
    kept_mask,
    normalise_median_mad,
)
from depthany.losses.gradient_matching import GradientMatching, gradient_matching
from depthany.types import DepthOutput, Target

B, H, W = 3, 17, 20
ALIGNMENTS = ["median", "least_squares"]
ALL = [(name, alignment) for name in ("data", "data_trimmed", "gradient") for alignment in ALIGNMENTS]
every_term = pytest.mark.parametrize(("name", "alignment"), ALL)


def loss(name, alignment, pred, target, valid):
    if name == "gradient":
        return gradient_matching(pred, target, valid, num_scales=4, alignment=alignment)
    trim = torch.full((len(pred),), 0.2) if name == "data_trimmed" else None
    return affine_invariant(pred, target, valid, alignment=alignment, trim=trim)


def draw(dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    target = torch.rand(B, H, W, generator=rng, dtype=dtype)
    pred = target + 0.3 * torch.rand(B, H, W, generator=rng, dtype=dtype)
    return pred, target, torch.rand(B, H, W, generator=rng) > 0.3


@every_term
def test_zero_and_finite_gradient_at_equality(name, alignment):
    _, target, valid = draw()
    pred = (2 * target + 5).requires_grad_()
    value = loss(name, alignment, pred, target, valid)
    value.sum().backward()
    assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    assert pred.grad.isfinite().all()


@every_term
def test_invariant_to_positive_scale_and_shift_of_either_map(name, alignment):
    pred, target, valid = draw()
    value = loss(name, alignment, pred, target, valid)
    assert (value > 0).all()
    assert_close(loss(name, alignment, 7 * pred + 3, target, valid), value)
    assert_close(loss(name, alignment, pred, 0.1 * target - 2, valid), value)
    assert_close(loss(name, alignment, -pred, target, valid).gt(value), torch.ones(B).bool())


@every_term
def test_the_factor_of_the_label_does_not_matter(name, alignment):
    pred, target, valid = draw()
    depth = 1 + 10 * target
    one, eighty = (normalise(factor / depth, valid) for factor in (1, 80))
    assert_close(loss(name, alignment, pred, one, valid), loss(name, alignment, pred, eighty, valid))


@every_term
def test_empty_mask_gives_zero_and_zero_gradient(name, alignment):
    pred, target, valid = draw()
    valid[1] = False
    value = loss(name, alignment, pred.requires_grad_(), target, valid)
    value.sum().backward()
    assert value[1] == 0 and value[0] > 0
    assert not pred.grad[1].any() and pred.grad.isfinite().all()


@every_term
def test_nan_behind_the_mask_reaches_neither_value_nor_gradient(name, alignment):
    pred, target, valid = draw()
    clean = loss(name, alignment, pred, target, valid)
    pred.requires_grad_()
    hidden = torch.where(valid, pred, torch.nan), torch.where(valid, target, torch.inf)
    value = loss(name, alignment, *hidden, valid)
    value.sum().backward()
    assert_close(value, clean)
    assert pred.grad.isfinite().all() and not pred.grad[~valid].any()


@every_term
def test_a_prediction_that_is_not_finite_shows(name, alignment):
    pred, target, valid = draw()
    pred[0, 0, 0] = torch.nan
    valid[0, 0, 0] = True
    assert loss(name, alignment, pred, target, valid).isnan().tolist() == [True, False, False]


@every_term
@pytest.mark.parametrize("constant", [0.0, 1.0, -300.0])
def test_constant_prediction_has_finite_value_and_gradient(name, alignment, constant):
    _, target, valid = draw(torch.float32)
    pred = torch.full_like(target, constant, requires_grad=True)
    value = loss(name, alignment, pred, target, valid)
    value.sum().backward()
    assert value.isfinite().all() and pred.grad.isfinite().all()


@every_term
def test_constant_target_has_finite_value_and_gradient(name, alignment):
    pred, target, valid = draw(torch.float32)
    pred.requires_grad_()
    value = loss(name, alignment, pred, torch.full_like(target, 0.4), valid)
    value.sum().backward()
    assert value.isfinite().all() and pred.grad.isfinite().all()


@every_term
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients(name, alignment, sign):
    pred, target, valid = (x[:2, :6, :7] for x in draw())
    pred = (sign * pred).requires_grad_()
    assert gradcheck(lambda p: loss(name, alignment, p, target, valid), pred)


@pytest.mark.parametrize("name", ["data", "gradient"])
def test_the_gradient_turns_an_inverted_prediction_round(name):
    _, target, valid = draw(torch.float32)
    pred = (-target).requires_grad_()
    optimizer = torch.optim.Adam([pred], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(name, "least_squares", pred, target, valid).sum()
        value.backward()
        optimizer.step()
    assert value < 0.2 * loss(name, "least_squares", -target, target, valid).sum()


def median_mad_loop(values):
    median = sorted(values)[(len(values) - 1) // 2]
    mad = sum(abs(v - median) for v in values) / len(values)
    return [(v - median) / mad for v in values]


def least_squares_loop(pred, target):
    n = len(pred)
    a, b = sum(p * p for p in pred), sum(pred)
    c, d = sum(p * t for p, t in zip(pred, target, strict=True)), sum(target)
    scale = (n * c - b * d) / (n * a - b * b)
    return [scale * p + (d - scale * b) / n for p in pred]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("share", [None, 0.1])
def test_data_term_equals_slow_loop(alignment, share):
    pred, target, valid = draw()
    trim = None if share is None else torch.full((B,), share)
    value = affine_invariant(pred, target, valid, alignment=alignment, trim=trim)
    for b in range(B):
        where = [(i, j) for i in range(H) for j in range(W) if valid[b, i, j]]
        p = [pred[b, i, j].item() for i, j in where]
        t = median_mad_loop([target[b, i, j].item() for i, j in where])
        p = median_mad_loop(p) if alignment == "median" else least_squares_loop(p, t)
        residuals = sorted(abs(x - y) for x, y in zip(p, t, strict=True))
        kept = residuals[: len(residuals) - round((share or 0) * len(residuals))]
        assert_close(value[b].item(), sum(kept) / len(kept))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_gradient_term_equals_slow_loop_with_strides_1_2_4_8(alignment):
    pred, target, valid = draw()
    p, t = aligned(pred, target, valid, alignment)
    residual = p - t
    value = gradient_matching(pred, target, valid, num_scales=4, alignment=alignment)
    for b in range(B):
        total = 0.0
        for stride in (1, 2, 4, 8):
            pixels = [(i, j) for i in range(0, H, stride) for j in range(0, W, stride) if valid[b, i, j]]
            differences = 0.0
            for i, j in pixels:
                for k, m in ((i + stride, j), (i, j + stride)):
                    if (k, m) in pixels:
                        differences += abs((residual[b, k, m] - residual[b, i, j]).item())
            total += differences / max(len(pixels), 1)
        assert_close(value[b].item(), total)


def test_median_mad_of_a_masked_map():
    pred, _, valid = draw()
    normalised = normalise_median_mad(pred, valid)
    for n, v in zip(normalised, valid, strict=True):
        assert n[v].median() == 0
        assert_close(n[v].abs().mean(), torch.tensor(1.0, dtype=n.dtype))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_kept_mask_leaves_out_the_share_with_the_largest_error(alignment):
    _, target, _ = draw()
    valid = torch.ones(B, H, W, dtype=torch.bool)
    pred = target.clone()
    pred[:, 5, :3] += 2
    kept = kept_mask(pred, target, valid, alignment, 3 / (H * W))
    assert not kept[:, 5, :3].any() and (kept.sum((1, 2)) == H * W - 3).all()
    assert kept_mask(pred, target, valid, alignment, torch.zeros(B)).equal(valid)


def as_types(pred, target, valid, pseudo):
    features = torch.zeros(len(pred), 1, 1, 1)
    return DepthOutput(pred, features), Target(target, valid, torch.tensor(pseudo))


def test_labelled_images_are_trimmed_and_pseudo_labelled_ones_dropped():
    pred, target, valid = draw()
    term = AffineInvariant(weight=1.0, alignment="median", trim=0.2, drop=0.1)
    value = term(*as_types(pred, target, valid, [False, True, False]))
    share = torch.tensor([0.2, 0.1, 0.2])
    assert_close(value, affine_invariant(pred, target, valid, alignment="median", trim=share))
    untrimmed = AffineInvariant(weight=1.0, alignment="median", trim=0.0, drop=0.1)
    value = untrimmed(*as_types(pred, target, valid, [False, True, False]))
    full = affine_invariant(pred, target, valid, alignment="median", trim=None)
    assert_close(value[[0, 2]], full[[0, 2]])
    assert value[1] < full[1]


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_full_precision_under_autocast_and_for_half_predictions(alignment):
    pred, target, valid = draw(torch.float32)
    terms = [
        AffineInvariant(weight=1.0, alignment=alignment, trim=0.0, drop=0.1),
        GradientMatching(weight=2.0, scales=4, alignment=alignment),
    ]
    for term in terms:
        rounded = pred.bfloat16().float()
        plain = term(*as_types(rounded, target, valid, [False, True, True]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = term(*as_types(pred.bfloat16(), target, valid, [False, True, True]))
        assert cast.dtype == torch.float32
        assert_close(cast, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: AffineInvariant(weight=-1.0, alignment="median", trim=0.0, drop=0.0), "weight"),
        (lambda: AffineInvariant(weight=1.0, alignment="mean", trim=0.0, drop=0.0), "alignment"),
        (lambda: AffineInvariant(weight=1.0, alignment="median", trim=1.0, drop=0.0), "trim"),
        (lambda: AffineInvariant(weight=1.0, alignment="median", trim=0.0, drop=-0.1), "drop"),
        (lambda: GradientMatching(weight=1.0, scales=0, alignment="median"), "scales"),
        (lambda: GradientMatching(weight=1.0, scales=4, alignment="mean"), "alignment"),
    ],
)
def test_impossible_options_are_named(build, word):
    with pytest.raises(ValueError, match=word):
        build()
