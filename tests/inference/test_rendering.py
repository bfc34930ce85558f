"""Pictures of maps: the colours are the official ones, and no map breaks them."""

import matplotlib
import numpy as np
import pytest

from depthany.inference.depth_map import DepthMap
from depthany.inference.rendering import INVALID_GREY, colorize, paint, side_by_side


def test_colours_are_those_of_the_official_script() -> None:
    values = np.random.default_rng(0).normal(size=(13, 17)).astype(np.float32)
    scaled = ((values - values.min()) / (values.max() - values.min()) * 255.0).astype(np.uint8)
    official = (matplotlib.colormaps["Spectral_r"](scaled)[:, :, :3] * 255).astype(np.uint8)
    difference = colorize(values).astype(int) - official
    # float32 and float64 may fall on two sides of a bin's edge
    assert abs(difference).max() <= 5 and (difference == 0).mean() > 0.99


def test_grey_is_the_index_and_affine_changes_leave_the_picture() -> None:
    ramp = np.arange(256, dtype=np.float32).reshape(16, 16)
    grey = colorize(ramp, cmap="gray")
    assert (grey == np.arange(256).reshape(16, 16, 1)).all()
    assert (colorize(4 * ramp - 32, cmap="gray") == grey).all()


@pytest.mark.parametrize("value", [0.0, -3.0, 1e30])
def test_a_constant_map_has_one_colour(value: float) -> None:
    picture = colorize(np.full((4, 5), value, dtype=np.float32))
    assert (picture == picture[0, 0]).all()


def test_invalid_pixels_are_grey_and_do_not_set_the_range() -> None:
    values = np.array([[0.0, 1.0, 1e9, np.nan, np.inf]], dtype=np.float32)
    picture = colorize(values, valid=np.array([[True, True, False, True, True]]))
    assert (picture[0, 2:] == INVALID_GREY).all()
    assert (picture[0, :2] == colorize(values[:, :2])[0]).all()
    assert (colorize(np.full((2, 2), np.nan)) == INVALID_GREY).all()


def test_a_given_range_clips() -> None:
    values = np.array([[-5.0, 0.0, 1.0, 7.0]])
    picture = colorize(values, cmap="gray", low=0.0, high=1.0)
    assert picture[0, :, 0].tolist() == [0, 0, 255, 255]


def test_side_by_side_keeps_every_pixel() -> None:
    left, right = np.zeros((4, 3, 3), np.uint8), np.full((6, 2, 3), 7, np.uint8)
    joined = side_by_side([left, right], gap=5)
    assert joined.shape == (6, 10, 3)
    assert (joined[:4, :3] == left).all() and (joined[:, 8:] == right).all()
    assert (joined[:, 3:8] == 255).all() and (joined[4:, :3] == 255).all()


def test_near_has_one_colour_whatever_the_map_holds() -> None:
    values, valid = np.array([[1.0, 2.0, 4.0]], np.float32), np.ones((1, 3), bool)
    for cmap, far, near in (("gray", 0, 255), ("gray_r", 255, 0)):
        assert paint(DepthMap(values, valid), cmap=cmap)[0, [0, 2], 0].tolist() == [far, near]
        assert paint(DepthMap(values, valid, "metric"), cmap=cmap)[0, [0, 2], 0].tolist() == [near, far]
