"""One's own files: every row means what its columns say, and wrong rows are named."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from depthany.data.files import DecodeError, read_depth
from depthany.data.sources.index_csv import IndexCsv
from depthany.types import DepthKind, DepthSample

HEADER = "image,depth,dataset,kind,scale_to_metres,invalid,scale_to_pixels,decode,note,fx,cx,cy"
METRES = {  # smallest and largest depth a set may show, README beside the data
    "kitti_depth": (1, 100),
    "ddad_style": (1, 250),
    "nyuv2": (0.3, 10.5),
    "sunrgbd": (0.5, 10),
    "tartanair": (0.1, 1000),
    "7scenes": (0.3, 10),
    "box_close_range": (0.1, 1.7),
    "ycb_video": (0.2, 6),
    "dexnet_primesense": (0.3, 2),
    "cleargrasp": (0.1, 5),
    "arkit_lidar": (0.1, 10),
    "hololens": (0.1, 15),
}


def check(sample: DepthSample) -> None:
    """The contract of a labelled sample."""
    image, disparity, valid, sky = (sample[k] for k in ("image", "disparity", "valid", "sky"))
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert disparity.dtype == np.float32 and valid.dtype == sky.dtype == np.bool_
    assert disparity.shape == valid.shape == sky.shape
    assert np.isfinite(disparity).all() and (disparity >= 0).all() and valid.any()
    assert not (sky & ~valid).any() and not disparity[~valid | sky].any()


def source(real_root: Path, *include: str) -> IndexCsv:
    return IndexCsv(root=real_root, index="index.csv", include=include, exclude=(), name="real")


def depth(sample: DepthSample) -> np.ndarray:
    return 1 / sample["disparity"][sample["valid"] & ~sample["sky"]]


def test_all_real_pairs_have_their_unit(real_root: Path) -> None:
    pairs = source(real_root)
    pairs.prepare()
    assert len(pairs) == 80
    assert len({pairs.key(i) for i in range(80)}) == 80
    assert len({pairs.group(i) for i in range(80)}) == 23
    for i in range(80):
        sample = pairs.read(i)
        check(sample)
        assert sample["key"] == pairs.key(i) and sample["key"].startswith(pairs.group(i) + "/")
        if pairs.group(i) in METRES:
            low, high = METRES[pairs.group(i)]
            assert sample["kind"] is DepthKind.METRIC
            assert low <= depth(sample).min() and depth(sample).max() <= high, sample["key"]


def test_kitti_keeps_metres_and_holes(real_root: Path) -> None:
    sample = source(real_root, "kitti_depth").read(0)
    assert 20 < depth(sample).max() < 100
    assert 0.1 < sample["valid"].mean() < 0.3
    assert not sample["valid"][: len(sample["valid"]) // 4].any()


def test_sun_rgbd_bits_are_rotated(real_root: Path) -> None:
    sample = source(real_root, "sunrgbd").read(0)
    assert depth(sample).min() > 0.5 and depth(sample).max() < 10  # eight times that if read plainly


def test_label_keeps_its_own_size(real_root: Path) -> None:
    sample = source(real_root, "arkit_lidar").read(0)
    assert sample["image"].shape[:2] == (1440, 1920)
    assert sample["disparity"].shape == (192, 256)


def test_middlebury_offset_makes_disparity_proportional_to_inverse_depth(real_root: Path) -> None:
    pairs = source(real_root, "middlebury_2014")
    sample = pairs.read(0)
    stored = read_depth(real_root / "labelled/middlebury/2014/trainingQ/Motorcycle/disp0GT.pfm")
    valid = np.isfinite(stored)
    assert sample["kind"] is DepthKind.SCALE
    assert_array_equal(sample["valid"], valid)
    assert_allclose(sample["disparity"][valid], stored[valid] + 32.778, rtol=1e-6)
    metres = 0.193001 * 999.421 / sample["disparity"][valid]
    assert metres.min() > 1.5 and metres.max() < 6  # a garage


def test_nan_is_a_hole(real_root: Path) -> None:
    pairs = source(real_root, "cleargrasp")
    (index,) = [i for i in range(len(pairs)) if "000000080" in pairs.key(i)]
    sample = pairs.read(index)
    check(sample)
    stored = read_depth(next(real_root.glob("labelled/cleargrasp/**/000000080-*.exr")))
    assert stored.dtype == np.float16 and np.isnan(stored).any()
    assert_array_equal(sample["valid"], np.isfinite(stored) & (stored > 0))


def test_far_background_is_sky(real_root: Path) -> None:
    pairs = source(real_root, "tartanair")
    samples = [pairs.read(i) for i in range(len(pairs))]
    with_sky = [s for s in samples if s["sky"].any()]
    assert {s["key"].split("/")[-1][:6] for s in with_sky} >= {"000180", "000188"}
    assert all(s["valid"].all() and depth(s).max() < 1000 for s in samples)


def test_datasets_can_be_chosen(real_root: Path) -> None:
    chosen = source(real_root, "nyuv2", "redwood")
    assert {chosen.group(i) for i in range(len(chosen))} == {"nyuv2", "redwood"}
    rest = IndexCsv(root=real_root, index="index.csv", include=(), exclude=["nyuv2", "redwood"], name="rest")
    assert len(chosen) + len(rest) == 80
    with pytest.raises(ValueError, match="nyu_v2"):
        source(real_root, "nyu_v2").prepare()


def written(folder: Path, *rows: str, header: str = HEADER) -> IndexCsv:
    (folder / "mine.csv").write_text("\n".join([header, *rows]) + "\n")
    return IndexCsv(root=folder, index="mine.csv", include=(), exclude=(), name="mine")


def photo(folder: Path, width: int = 40, height: int = 30) -> None:
    Image.new("RGB", (width, height), "teal").save(folder / "a.png")


def test_a_plane_along_the_rays_becomes_a_constant_depth(tmp_path: Path) -> None:
    photo(tmp_path, 40, 30)
    x, y = np.meshgrid(np.arange(20) + 0.5 - 9, np.arange(15) + 0.5 - 7)  # half the image's size
    np.save(tmp_path / "d.npy", 4 * np.sqrt(x**2 + y**2 + 15**2) / 15)
    sample = written(tmp_path, "a.png,d.npy,x,distance,0.5,none,,,,30,18,14").read(0)
    assert sample["kind"] is DepthKind.METRIC
    assert_allclose(depth(sample), 2, rtol=1e-5)


def test_invalid_codes_sky_and_kind(tmp_path: Path) -> None:
    photo(tmp_path)
    values = np.array([[0, 5, 4000], [np.nan, np.inf, 7]], np.float32)
    np.save(tmp_path / "d.npy", values)
    row = "a.png,d.npy,x,depth,,7;nan;values above 2e3 are sky,,,,,,"
    sample = written(tmp_path, row).read(0)
    check(sample)
    assert sample["kind"] is DepthKind.SCALE
    assert_array_equal(sample["valid"], [[0, 1, 1], [0, 0, 0]])
    assert_array_equal(sample["sky"], [[0, 0, 1], [0, 0, 0]])
    assert sample["disparity"][0, 1] == np.float32(0.2)


def test_unknown_offset_makes_a_disparity_affine(tmp_path: Path) -> None:
    photo(tmp_path)
    np.save(tmp_path / "d.npy", np.array([[0, 8.0]]))
    row = "a.png,d.npy,x,disparity,,0,0.5,,has doffs,,,"
    assert written(tmp_path, row).read(0)["kind"] is DepthKind.AFFINE
    (tmp_path / "calib.txt").write_text("baseline=1\ndoffs=3.5\n")
    sample = written(tmp_path, row).read(0)
    assert sample["kind"] is DepthKind.SCALE
    assert_array_equal(sample["disparity"], [[0, 7.5]])
    assert_array_equal(sample["valid"], [[False, True]])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.png,d.npy,x,depth,1,0,,rotate left,,,,", "decode is 'rotate left'"),
        ("a.png,d.npy,x,height,1,0,,,,,,", "kind is 'height'"),
        ("a.png,d.npy,x,depth,0,0,,,,,,", "scale_to_metres is '0'"),
        ("a.png,d.npy,x,depth,1,zero,,,,,,", "invalid is 'zero'"),
        ("a.png,d.npy,x,depth,1,,,,,,,", "invalid is ''"),
        ("a.png,d.npy,x,distance,1,0,,,,,,", "focal_px or fx"),
        ("a.png,d.npy,x,disparity,1,0,,,,,,", "scale_to_pixels"),
        ("a.png,d.npy,x,disparity,,values above 9 are sky,,,,,,", "large disparities"),
        (",d.npy,x,depth,1,0,,,,,,", "image is empty"),
        ("a.png,e.npy,x,depth,1,0,,,,,,", "same as in row 2"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        written(tmp_path, "a.png,d.npy,x,depth,1,0,,,,,,", row).check()
    assert "mine.csv, row 3" in str(caught.value)


def test_a_wrong_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv is missing"):
        IndexCsv(root=tmp_path, index="none.csv", include=(), exclude=(), name="x").check()
    with pytest.raises(ValueError, match="no column invalid"):
        written(tmp_path, header=HEADER.replace("invalid,", "")).check()
    with pytest.raises(ValueError, match="no rows"):
        written(tmp_path).check()
    latin = written(tmp_path, "caf\u00e9.png,d.npy,x,depth,1,0,,,,,,")
    latin.index.write_text(latin.index.read_text(encoding="utf-8"), encoding="latin-1")
    with pytest.raises(ValueError, match=r"mine\.csv is no CSV file in UTF-8"):
        latin.check()
    pairs = written(tmp_path, "a.png,d.npy,x,depth,1,0,,,,,,")
    with pytest.raises(ValueError, match=r"2 of 2 files are missing, first .*a\.png"):
        pairs.prepare()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    photo(tmp_path)
    (tmp_path / "d.npy").write_bytes(b"nothing")
    pairs = written(tmp_path, "a.png,d.npy,x,depth,1,0,,,,,,")
    with pytest.raises(DecodeError, match=r"d\.npy"):
        pairs.read(0)
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(DecodeError, match=r"a\.png"):
        pairs.read(0)
    photo(tmp_path)
    np.save(tmp_path / "d.npy", np.ones((2, 2), np.float32))
    with pytest.raises(DecodeError, match=r"d\.npy.*16 bits"):
        written(tmp_path, "a.png,d.npy,x,depth,1,0,,rotate the 16 bits right by 3,,,,").read(0)
