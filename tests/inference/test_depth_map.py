"""A map survives its files, and known points give depth back."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthany.inference.depth_map import DepthMap, load_png16


@pytest.fixture
def depth_map() -> DepthMap:
    rng = np.random.default_rng(0)
    disparity = rng.uniform(-2, 9, (12, 15)).astype(np.float32)
    return DepthMap(disparity, rng.random((12, 15)) > 0.2)


def test_npy_and_npz_are_exact(depth_map: DepthMap, tmp_path: Path) -> None:
    depth_map.save(tmp_path / "a.npy")
    loaded = np.load(tmp_path / "a.npy")
    assert loaded.dtype == np.float32
    assert (np.isnan(loaded) == ~depth_map.valid).all()
    assert (loaded[depth_map.valid] == depth_map.disparity[depth_map.valid]).all()
    depth_map.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (arrays["disparity"] == depth_map.disparity).all()
        assert (arrays["valid"] == depth_map.valid).all()
        assert str(arrays["space"]) == "disparity" and bool(arrays["near_is_large"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npz"]


def test_png16_is_exact_to_half_a_code(depth_map: DepthMap, tmp_path: Path) -> None:
    low, high = depth_map.save(tmp_path / "a.png")
    valid = depth_map.valid
    assert (low, high) == (depth_map.disparity[valid].min(), depth_map.disparity[valid].max())
    loaded = load_png16(tmp_path / "a.png")
    assert (loaded.valid == valid).all()
    error = np.abs(loaded.disparity - depth_map.disparity)[valid].max()
    assert error <= (high - low) / 131068 * 1.01 + 1e-6
    assert Image.open(tmp_path / "a.png").mode.startswith("I;16")


@pytest.mark.parametrize("share_valid", [0.0, 1.0])
def test_png16_of_constant_and_of_empty_maps(share_valid: float, tmp_path: Path) -> None:
    valid = np.full((3, 4), bool(share_valid))
    DepthMap(np.full((3, 4), 2.5, np.float32), valid).save(tmp_path / "a.png")
    loaded = load_png16(tmp_path / "a.png")
    assert (loaded.valid == valid).all() and (loaded.disparity[valid] == 2.5).all()


def test_files_that_do_not_fit_are_refused(depth_map: DepthMap, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.npy, \.npz, \.png"):
        depth_map.save(tmp_path / "a.exr")
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="text chunk"):
        load_png16(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="same shape"):
        DepthMap(np.zeros((3, 4), np.float32), np.ones((4, 3), bool))


def test_points_give_the_depth_back() -> None:
    rng = np.random.default_rng(1)
    depth_m = rng.uniform(1, 50, (20, 30))
    disparity = ((1 / depth_m - 0.01) / 0.2).astype(np.float32)  # scale 0.2, shift 0.01
    depth_map = DepthMap(disparity, np.ones((20, 30), bool))
    points = np.stack([rng.integers(0, 20, 25), rng.integers(0, 30, 25)], axis=1)
    scale, shift = depth_map.fit_scale_shift(points, depth_m[points[:, 0], points[:, 1]])
    assert (scale, shift) == pytest.approx((0.2, 0.01), rel=1e-4)
    assert np.allclose(depth_map.to_depth(scale, shift), depth_m, rtol=1e-3)


def test_depth_is_infinite_behind_the_horizon_and_nan_where_invalid() -> None:
    valid = np.array([[True, True, True, False]])
    depth_map = DepthMap(np.array([[-1, 0, 2, 2]], np.float32), valid)
    depth_m = depth_map.to_depth(0.5, 0.0)
    assert depth_m[0, :3].tolist() == [np.inf, np.inf, 1.0] and np.isnan(depth_m[0, 3])


@pytest.mark.parametrize(
    ("points", "depths_m", "message"),
    [
        ([[0, 0]], [1.0], "at least 2"),
        ([[0, 0], [9, 0]], [1.0, 2.0], "inside"),
        ([[0, 0], [1, 1]], [1.0, 0.0], "positive"),
        ([[0, 0], [0, 1]], [1.0, 2.0], "one value"),
        ([[0, 0], [2, 2]], [1.0, 2.0], "invalid pixel"),
        ([[0, 0], [1, 1]], [1.0], "row and column"),
    ],
)
def test_bad_points_are_named(points: list, depths_m: list, message: str) -> None:
    disparity = np.array([[1, 1, 1], [2, 3, 4], [5, 6, 7]], np.float32)
    depth_map = DepthMap(disparity, np.arange(9).reshape(3, 3) < 8)
    with pytest.raises(ValueError, match=message):
        depth_map.fit_scale_shift(np.array(points), np.array(depths_m))
