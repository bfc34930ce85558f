import torch
from torch.testing import assert_close

from depthany.geometry.disparity import normalise
from depthany.metrics.affine import affine_invariant_depth
from depthany.metrics.baselines import MeanMap, constant_map, row_ramp


def test_row_ramp_grows_downwards_and_beats_the_constant_on_a_floor():
    ramp = row_ramp(5, 3)
    assert ramp[:, 0].tolist() == [0, 0.25, 0.5, 0.75, 1] and ramp.shape == (5, 3)
    assert_close(ramp, ramp[:, :1].expand(5, 3))
    floor = 0.1 + row_ramp(12, 12)[None]
    valid = torch.ones_like(floor, dtype=torch.bool)
    errors = [
        affine_invariant_depth(p[None], floor, valid, min_disparity=None)["abs_rel"].item()
        for p in (row_ramp(12, 12), constant_map(12, 12))
    ]
    assert errors[0] < 1e-5 < errors[1]


def test_mean_map_is_the_mean_over_valid_pixels():
    disparity = torch.rand(4, 8, 8)
    valid = torch.rand(4, 8, 8) > 0.4
    valid[:, 0, 0] = False
    mean = MeanMap(size=8)
    mean.update(disparity[:1], valid[:1])
    mean.update(torch.where(valid, disparity, torch.nan)[1:], valid[1:])
    normalised = normalise(disparity, valid)
    count = valid.sum(0)
    expected = torch.where(count > 0, normalised.sum(0) / count.clamp(min=1), 0.0)
    assert_close(mean.map(), expected)
    assert mean.map()[0, 0] == 0


def test_mean_map_accepts_any_size():
    mean = MeanMap(size=4)
    for size in ((8, 12), (30, 7), (4, 4)):
        mean.update(row_ramp(*size)[None], torch.ones(1, *size, dtype=torch.bool))
    ramp = mean.map()
    assert ramp.shape == (4, 4)
    assert (ramp[1:] > ramp[:-1]).all() and ramp.min() >= 0 and ramp.max() <= 1
