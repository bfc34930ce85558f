import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from depthany.geometry.cameras import ray_norms
from depthany.geometry.disparity import normalise, to_disparity
from depthany.types import Quantity

PLAIN = dict(scale=1.0, factor=1.0, invalid=(), sky=None, sky_above=None, rays=None)


def convert(values, quantity=Quantity.DEPTH, **options):
    values = torch.as_tensor(values)
    if values.ndim == 1:
        values = values[None]
    return [x[0].tolist() for x in to_disparity(values, quantity=quantity, **(PLAIN | options))]


def test_depth():
    disparity, valid, sky = convert([1.0, 2.0, 0.0, -1.0, math.nan, math.inf, -math.inf])
    assert disparity == [1, 0.5, 0, 0, 0, 0, 0]
    assert valid == [True, True] + 5 * [False]
    assert not any(sky)


def test_disparity_keeps_zero_unless_listed():
    values = [0.0, 2.0, -1.0, math.inf, math.nan]
    disparity, valid, sky = convert(values, Quantity.DISPARITY, scale=0.5, factor=3.0)
    assert disparity == [0, 3, 0, 0, 0]
    assert valid == [True, True, False, False, False]
    assert not any(sky)
    assert convert(values, Quantity.DISPARITY, invalid=(0,))[1] == [False, True] + 3 * [False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.float16])
def test_arithmetic_is_in_float32(dtype):
    values = torch.tensor([[200, 3]]).to(dtype)
    disparity, valid, _ = to_disparity(values, quantity=Quantity.DEPTH, **(PLAIN | {"scale": 0.01, "factor": 1000.0}))
    assert disparity.dtype == torch.float32 and valid.all()
    assert_close(disparity, torch.tensor([[500.0, 1000 / 0.03]]))


def test_numpy_arrays_of_any_layout():
    values = np.frombuffer(np.array([[2, 4]], dtype=">u2").tobytes(), dtype=">u2").reshape(1, 2)
    disparity, _, _ = to_disparity(values, quantity=Quantity.DEPTH, **PLAIN)
    assert disparity.tolist() == [[0.5, 0.25]]


def test_sky_code_is_valid_with_zero_disparity():
    values = torch.tensor([100, 65535, 0], dtype=torch.int32)  # Virtual KITTI 2: centimetres
    disparity, valid, sky = convert(values, scale=0.01, sky=65535)
    assert disparity == [1, 0, 0]
    assert valid == [True, True, False]
    assert sky == [False, True, False]


def test_infinity_is_sky_only_on_demand():
    values = [1.0, math.inf, 1e5]
    assert convert(values, sky_above=1e4)[2] == [False, False, True]
    assert convert(values, sky_above=1e4)[1] == [True, False, True]
    disparity, valid, sky = convert(values, sky=math.inf)
    assert sky == [False, True, False] and valid == [True, True, True] and disparity[1] == 0
    assert convert([1.0, math.nan], sky=math.nan)[2] == [False, True]


def test_codes_are_compared_before_scaling_and_sky_above_after():
    values = [50.0, 100.0, 200.0]
    _, valid, sky = convert(values, scale=0.1, sky_above=10.0, invalid=(200.0, math.nan))
    assert valid == [True, True, False]  # an invalid code wins over sky_above
    assert sky == [False, True, False]


def test_a_plane_seen_as_distance_has_one_disparity():
    rays = ray_norms(6, 8, 10.0, 4.0, 3.0)
    disparity, valid, _ = to_disparity(5 * rays, quantity=Quantity.DISTANCE, **(PLAIN | {"rays": rays}))
    assert valid.all()
    assert_close(disparity, torch.full((6, 8), 0.2))


def test_ray_norms_of_hypersim():
    rays = ray_norms(768, 1024, 886.81, 512, 384)
    x = np.linspace(-0.5 * 1024 + 0.5, 0.5 * 1024 - 0.5, 1024)[None]
    y = np.linspace(-0.5 * 768 + 0.5, 0.5 * 768 - 0.5, 768)[:, None]
    expected = np.sqrt(x**2 + y**2 + 886.81**2) / 886.81
    assert_close(rays, torch.from_numpy(expected).float())
    assert_close(rays, rays.flip(0, 1))
    assert rays.min() >= 1


def test_depth_and_disparity_round_trip():
    depth = torch.rand(5, 4) + 0.1
    disparity, _, _ = to_disparity(depth, quantity=Quantity.DEPTH, **PLAIN)
    back, _, _ = to_disparity(disparity, quantity=Quantity.DEPTH, **PLAIN)
    assert_close(back, depth)


@pytest.mark.parametrize(
    ("quantity", "options", "word"),
    [
        (Quantity.DEPTH, {"scale": 0.0}, "scale"),
        (Quantity.DEPTH, {"factor": math.inf}, "factor"),
        (Quantity.DEPTH, {"rays": torch.ones(1, 2)}, "rays"),
        (Quantity.DISTANCE, {}, "rays"),
        (Quantity.DISTANCE, {"rays": torch.ones(2, 2)}, "rays"),
        (Quantity.DISPARITY, {"sky_above": 1.0}, "sky_above"),
        (Quantity.DEPTH, {"sky": 0.0, "invalid": (0.0,)}, "sky"),
        (Quantity.DEPTH, {"sky": math.nan, "invalid": (math.nan,)}, "sky"),
    ],
)
def test_contradictions_are_named(quantity, options, word):
    with pytest.raises(ValueError, match=word):
        convert([1.0, 2.0], quantity, **options)


@pytest.mark.parametrize("factor", [1e-3, 48.0, 80.0, 1e4])
def test_the_target_forgets_the_factor_but_not_the_kind_of_depth(factor):
    """1 / t and 80 / t are one target; the distance along the ray, read as depth, is another."""
    rays = ray_norms(24, 32, 25.0, 16.0, 12.0)
    planar = 2 + torch.rand(24, 32)

    def target(values, **options):
        return normalise(*(m[None] for m in to_disparity(values, **(PLAIN | options))[:2]))

    right = target(planar, quantity=Quantity.DEPTH)
    assert_close(target(planar, quantity=Quantity.DEPTH, factor=factor), right, rtol=0, atol=1e-6)
    assert_close(target(planar * rays, quantity=Quantity.DISTANCE, rays=rays, factor=factor), right, rtol=0, atol=2e-6)
    wrong = target(planar * rays, quantity=Quantity.DEPTH, factor=factor)
    assert (wrong - right).abs().mean() > 0.05


def test_normalise_spans_zero_to_one_and_forgets_the_factor():
    depth = 1 + 9 * torch.rand(3, 8, 8)
    valid = torch.rand(3, 8, 8) > 0.3
    one = normalise(torch.where(valid, 1 / depth, torch.nan), valid)
    assert_close(one, normalise(80 / depth, valid))
    assert_close(one[1], normalise(1 / depth[1], valid[1]))
    assert_close(one.amax((1, 2)), torch.ones(3), rtol=0, atol=0)
    assert_close(one.amin((1, 2)), torch.zeros(3), rtol=0, atol=0)
    assert not one[~valid].any()


@pytest.mark.parametrize("num_valid", [0, 1, 12])
def test_normalise_of_empty_single_and_constant_is_zero(num_valid):
    valid = (torch.arange(12) < num_valid).view(1, 3, 4)
    assert not normalise(torch.full((1, 3, 4), 7.0), valid).any()
