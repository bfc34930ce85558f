"""A map survives its files, and known points give depth back."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from depthany.data.files import read_depth
from depthany.inference.depth_map import DepthMap, Space, load_map


@pytest.fixture
def depth_map() -> DepthMap:
    rng = np.random.default_rng(0)
    disparity = rng.uniform(-2, 9, (12, 15)).astype(np.float32)
    return DepthMap(disparity, rng.random((12, 15)) > 0.2)


FLOATS = (".npy", ".npz", ".exr", ".pfm", ".tiff")


@pytest.mark.parametrize("space", ["disparity", "depth", "metric"])
@pytest.mark.parametrize("suffix", [*FLOATS, ".png"])
def test_what_is_saved_is_loaded(depth_map: DepthMap, suffix: str, space: Space, tmp_path: Path) -> None:
    saved = replace(depth_map, space=space)
    low, high = saved.save(tmp_path / f"a{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    loaded = load_map(tmp_path / f"a{suffix}", space=space if suffix in (".npy", ".pfm") else "disparity")
    assert loaded.space == space and loaded.near_is_large == (space == "disparity")
    assert (loaded.valid == saved.valid).all() and loaded.values.dtype == np.float32
    valid = saved.valid
    assert (low, high) == (saved.values[valid].min(), saved.values[valid].max())
    half_a_code = (high - low) / 131068 * 1.01 + 1e-6
    assert np.abs(loaded.values - saved.values)[valid].max() <= (half_a_code if suffix == ".png" else 0)


@pytest.mark.parametrize("suffix", FLOATS)
def test_the_files_are_those_that_others_read(depth_map: DepthMap, suffix: str, tmp_path: Path) -> None:
    depth_map.save(tmp_path / f"a{suffix}")
    values = read_depth(tmp_path / f"a{suffix}", key="disparity" if suffix == ".npz" else None)
    assert values.dtype == np.float32 and (np.isnan(values) == ~depth_map.valid).all()
    assert (values[depth_map.valid] == depth_map.values[depth_map.valid]).all()
    if suffix in (".tiff", ".pfm"):  # cv2 has no OpenEXR
        seen = cv2.imread(str(tmp_path / f"a{suffix}"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(seen, values, equal_nan=True)


def test_png16_has_16_bits_and_an_npz_the_confidence(depth_map: DepthMap, tmp_path: Path) -> None:
    depth_map.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode.startswith("I;16")
    sure = replace(depth_map, confidence=np.linspace(0, 1, 180, dtype=np.float32).reshape(12, 15))
    sure.save(tmp_path / "a.npz")
    assert (load_map(tmp_path / "a.npz").confidence == sure.confidence).all()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (arrays["valid"] == sure.valid).all() and str(arrays["space"]) == "disparity"


@pytest.mark.parametrize("share_valid", [0.0, 1.0])
def test_png16_of_constant_and_of_empty_maps(share_valid: float, tmp_path: Path) -> None:
    valid = np.full((3, 4), bool(share_valid))
    DepthMap(np.full((3, 4), 2.5, np.float32), valid).save(tmp_path / "a.png")
    loaded = load_map(tmp_path / "a.png")
    assert (loaded.valid == valid).all() and (loaded.disparity[valid] == 2.5).all()


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # says Pillow, too
def test_files_that_do_not_fit_are_refused(depth_map: DepthMap, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jpg: .*\.npy, \.npz, \.png, \.exr, \.pfm, \.tiff"):
        depth_map.save(tmp_path / "a.jpg")
    assert list(tmp_path.iterdir()) == []
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="text chunk"):
        load_map(tmp_path / "plain.png")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for suffix in FLOATS:
        damaged = tmp_path / f"a{suffix}"
        depth_map.save(damaged)
        damaged.write_bytes(damaged.read_bytes()[:90])
        with pytest.raises(ValueError, match=rf"a\{suffix}: not a map"):
            load_map(damaged)
    with pytest.raises(ValueError, match=r"objects\.npy: not a map .*pickle"):
        load_map(tmp_path / "objects.npy")
    with pytest.raises(ValueError, match="same shape"):
        DepthMap(np.zeros((3, 4), np.float32), np.ones((4, 3), bool))
    with pytest.raises(ValueError, match="space is disparity, depth, metric, not 'inverse'"):
        DepthMap(np.zeros((3, 4), np.float32), np.ones((3, 4), bool), "inverse")  # type: ignore[arg-type]


def test_points_give_the_depth_back() -> None:
    rng = np.random.default_rng(1)
    depth_m = rng.uniform(1, 50, (20, 30))
    disparity = ((1 / depth_m - 0.01) / 0.2).astype(np.float32)  # scale 0.2, shift 0.01
    depth_map = DepthMap(disparity, np.ones((20, 30), bool))
    points = np.stack([rng.integers(0, 20, 25), rng.integers(0, 30, 25)], axis=1)
    scale, shift = depth_map.fit_scale_shift(points, depth_m[points[:, 0], points[:, 1]])
    assert (scale, shift) == pytest.approx((0.2, 0.01), rel=1e-4)
    assert np.allclose(depth_map.to_depth(scale, shift), depth_m, rtol=1e-3)


def test_a_metric_map_is_depth_and_an_affine_one_needs_points() -> None:
    depth_m = np.random.default_rng(2).uniform(1, 50, (6, 8)).astype(np.float32)
    metric = DepthMap(depth_m, np.ones((6, 8), bool), "metric")
    assert (metric.to_depth() == depth_m).all() and np.allclose(metric.disparity, 1 / depth_m)
    affine = DepthMap((depth_m - 3) / 2, np.ones((6, 8), bool), "depth")
    points = np.array([[0, 0], [5, 7], [2, 3]])
    scale, shift = affine.fit_scale_shift(points, depth_m[points[:, 0], points[:, 1]])
    assert (scale, shift) == pytest.approx((2, 3), rel=1e-4)
    assert np.allclose(affine.to_depth(scale, shift), depth_m, rtol=1e-4)
    for relative in (affine, replace(affine, space="disparity")):
        with pytest.raises(ValueError, match="needs scale and shift"):
            relative.to_depth()
    with pytest.raises(ValueError, match="no disparity"):
        _ = affine.disparity


def test_points_in_space_project_back_to_their_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    valid, photo = rng.random((9, 14)) > 0.3, rng.integers(0, 256, (9, 14, 3), np.uint8)
    depth = DepthMap(rng.uniform(1, 20, (9, 14)).astype(np.float32), valid, "metric")
    cloud = depth.to_point_cloud(fov_deg=90, colors=photo)  # a focal length of 7 px
    x, y, z = cloud.points.T
    assert np.allclose(7 * x / z + 7, np.nonzero(valid)[1] + 0.5, atol=1e-4)  # x right
    assert np.allclose(7 * y / z + 4.5, np.nonzero(valid)[0] + 0.5, atol=1e-4)  # y down
    assert np.array_equal(z, depth.values[valid]) and np.array_equal(cloud.colors, photo[valid])
    assert np.array_equal(depth.to_point_cloud(focal_px=7).points, cloud.points)
    cloud.save_ply(tmp_path / "a.ply")
    header, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n", 1)
    assert f"element vertex {valid.sum()}".encode() in header and len(body) == 15 * len(cloud)
    first = np.frombuffer(body[:12], "<f4"), np.frombuffer(body[12:15], np.uint8)
    assert np.array_equal(first[0], cloud.points[0]) and np.array_equal(first[1], photo[valid][0])
    sky = DepthMap(np.array([[-1.0, 1.0]], np.float32), np.ones((1, 2), bool))
    assert len(sky.to_point_cloud(focal_px=1, scale=1, shift=0)) == 1  # what is infinitely far is left out
    for wrong, message in (({}, "either"), ({"focal_px": 1, "fov_deg": 2}, "either"), ({"fov_deg": 180}, "180")):
        with pytest.raises(ValueError, match=message):
            depth.to_point_cloud(**wrong)


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
        ([[0, 0], [2, 1]], [1.0, 2.0], "contradict the map"),
        ([[0, 0], [2, 2]], [1.0, 2.0], "invalid pixel"),
        ([[0, 0], [1, 1]], [1.0], "row and column"),
    ],
)
def test_bad_points_are_named(points: list, depths_m: list, message: str) -> None:
    disparity = np.array([[1, 1, 1], [2, 3, 4], [5, 6, 7]], np.float32)
    depth_map = DepthMap(disparity, np.arange(9).reshape(3, 3) < 8)
    with pytest.raises(ValueError, match=message):
        depth_map.fit_scale_shift(np.array(points), np.array(depths_m))
