import pytest
import torch
from torch import nn
from torch.testing import assert_close

from depthany.losses.affine_invariant import AffineInvariant
from depthany.losses.feature_alignment import FeatureAlignment
from depthany.losses.gradient_matching import GradientMatching
from depthany.losses.total import WeightedSum
from depthany.types import DepthOutput, Target

B, H, W = 3, 16, 20


class Raises(nn.Module):
    per_pixel = True

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, output, target):
        raise RuntimeError("computed")


def draw():
    rng = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=rng)

    output = DepthOutput(rand(B, H, W), rand(B, 6, 2, 2) - 0.5)
    pseudo = torch.tensor([False, True, True])
    target = Target(rand(B, H, W), rand(B, H, W) > 0.2, pseudo, rand(B, 6, 2, 2) - 0.5)
    return output, target


def terms():
    return {
        "ssi": AffineInvariant(weight=1.0, alignment="median", trim=0.0, drop=0.1),
        "gradient": GradientMatching(weight=2.0, scales=4, alignment="median"),
        "feature": FeatureAlignment(weight=0.5, margin=0.85),
    }


def cutmix():
    box = torch.zeros(B, H, W, dtype=torch.bool)
    box[1, 4:10, 5:15] = True  # image 0 has no CutMix, image 2 is pasted over
    box[2] = True
    return box


def test_total_is_the_weighted_sum_of_the_unweighted_parts():
    output, target = draw()
    total, parts = WeightedSum(terms=terms())(output, target, None)
    assert set(parts) == {"ssi", "gradient", "feature"}
    assert_close(total, parts["ssi"] + 2 * parts["gradient"] + 0.5 * parts["feature"])
    for name, term in terms().items():
        assert_close(parts[name], term(output, target))


@pytest.mark.parametrize("off", [Raises(0.0), None])
def test_a_term_that_is_off_is_not_computed(off):
    output, target = draw()
    _, parts = WeightedSum(terms=terms() | {"gradient": off})(output, target, None)
    assert set(parts) == {"ssi", "feature"}
    with pytest.raises(RuntimeError, match="computed"):
        WeightedSum(terms={"gradient": Raises(1.0)})(output, target, None)


def test_nothing_to_compute_is_an_error():
    with pytest.raises(ValueError, match="weight above 0"):
        WeightedSum(terms={"ssi": None, "gradient": Raises(0.0)})


def test_regions_equal_each_region_on_its_own():
    output, target = draw()
    box = cutmix()
    total, parts = WeightedSum(terms=terms())(output, target, [box, ~box])
    for name in ("ssi", "gradient"):
        term, expected = terms()[name], torch.zeros(B)
        for b in range(B):
            one = DepthOutput(output.disparity[b : b + 1], output.features[b : b + 1])
            for region in (box[b : b + 1], ~box[b : b + 1]):
                alone = Target(
                    target.disparity[b : b + 1],
                    target.valid[b : b + 1] & region,
                    target.pseudo[b : b + 1],
                )
                expected[b] += region.float().mean() * term(one, alone)[0]
        assert_close(parts[name], expected)
    assert_close(parts["feature"], terms()["feature"](output, target))
    assert_close(total, parts["ssi"] + 2 * parts["gradient"] + 0.5 * parts["feature"])


def test_images_without_a_box_are_as_without_regions():
    output, target = draw()
    box = cutmix()
    with_regions, _ = WeightedSum(terms=terms())(output, target, [box, ~box])
    plain, _ = WeightedSum(terms=terms())(output, target, None)
    assert_close(with_regions[[0, 2]], plain[[0, 2]])
    assert not torch.isclose(with_regions[1], plain[1])


def test_each_region_has_an_alignment_of_its_own():
    output, target = draw()
    box = cutmix()
    pasted = torch.where(box, 3 * output.disparity + 7, output.disparity)
    loss = WeightedSum(terms={"ssi": terms()["ssi"], "gradient": terms()["gradient"]})
    one, _ = loss(output, target, [box, ~box])
    other, _ = loss(output._replace(disparity=pasted), target, [box, ~box])
    assert_close(one, other)


def test_padding_gives_zero_and_zero_gradient():
    output, target = draw()
    target.valid[0] = False
    pred = output.disparity.requires_grad_()
    box = cutmix()
    for regions in (None, [box, ~box]):
        loss = WeightedSum(terms={"ssi": terms()["ssi"], "gradient": terms()["gradient"]})
        total, _ = loss(output, target, regions)
        (gradient,) = torch.autograd.grad(total.sum(), pred)
        assert total[0] == 0 and not gradient[0].any() and gradient.isfinite().all()
