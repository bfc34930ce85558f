import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from depthany.losses.feature_alignment import FeatureAlignment, feature_alignment
from depthany.types import DepthOutput, Target

B, C, H, W = 3, 8, 4, 5
PSEUDO = torch.tensor([True, False, True])


def draw():
    rng = torch.Generator().manual_seed(0)
    frozen = torch.randn(B, C, H, W, generator=rng, dtype=torch.float64)
    features = frozen + 0.6 * torch.randn(B, C, H, W, generator=rng, dtype=torch.float64)
    return features, frozen


def run(term, features, frozen, pseudo=PSEUDO):
    disparity = torch.zeros(B, 8, 8)
    target = Target(disparity, disparity.bool(), pseudo, frozen)
    return term(DepthOutput(disparity, features), target)


@pytest.mark.parametrize("margin", [0.85, 1.0])
def test_equal_to_slow_loop_over_all_patches(margin):
    features, frozen = draw()
    value = feature_alignment(features, frozen, margin=margin)
    for b in range(B):
        total = 0.0
        for i in range(H):
            for j in range(W):
                f, g = features[b, :, i, j], frozen[b, :, i, j]
                cosine = (f @ g / (f.norm() * g.norm())).item()
                total += 0 if cosine > margin else 1 - cosine
        assert_close(value[b].item(), total / (H * W))


def test_zero_at_equality_invariant_to_length_and_bounded():
    features, frozen = draw()
    zero = torch.zeros(B, dtype=torch.float64)
    assert_close(feature_alignment(3 * frozen, frozen, margin=1.0), zero, rtol=0, atol=1e-12)
    assert_close(feature_alignment(-frozen, frozen, margin=0.85), zero + 2)
    assert_close(
        feature_alignment(3 * features, 0.1 * frozen, margin=0.85),
        feature_alignment(features, frozen, margin=0.85),
    )


def test_patches_within_the_margin_get_no_gradient():
    features, frozen = draw()
    features.requires_grad_()
    feature_alignment(features, frozen, margin=0.85).sum().backward()
    within = torch.cosine_similarity(features, frozen, dim=1) > 0.85
    assert within.any() and not within.all()
    touched = features.grad.abs().sum(1) > 0
    assert touched.equal(~within)


def test_gradients_and_finite_gradient_for_zero_and_equal_features():
    features, frozen = draw()
    features.requires_grad_()
    assert gradcheck(lambda f: feature_alignment(f, frozen, margin=0.85), features)
    for start in (torch.zeros_like(frozen), frozen.clone()):
        start.requires_grad_()
        feature_alignment(start, frozen, margin=1.0).sum().backward()
        assert start.grad.isfinite().all()


def test_only_pseudo_labelled_images():
    features, frozen = draw()
    value = run(FeatureAlignment(weight=1.0, margin=0.85), features.requires_grad_(), frozen)
    value.sum().backward()
    assert (value > 0).equal(PSEUDO)
    assert not features.grad[1].any()


def test_full_precision_under_autocast():
    features, frozen = draw()
    features = features.bfloat16()
    term = FeatureAlignment(weight=1.0, margin=0.85)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = run(term, features, frozen.float())
    assert value.dtype == torch.float32
    assert_close(value, run(term, features.float(), frozen.float()), rtol=0, atol=0)


def test_missing_or_unequal_features_are_explained():
    features, frozen = draw()
    term = FeatureAlignment(weight=1.0, margin=0.85)
    with pytest.raises(ValueError, match=r"loss\.feature\.weight=0.*task\.feature_encoder"):
        run(term, features, None)
    with pytest.raises(ValueError, match="same size"):
        run(term, features, frozen[:, :4])
    with pytest.raises(ValueError, match="margin"):
        FeatureAlignment(weight=1.0, margin=1.5)
