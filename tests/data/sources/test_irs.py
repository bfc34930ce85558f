"""IRS: disparity in pixels from the channel G, 48 / depth."""

from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.irs import Irs
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.irs import FRAMES, SHAPE, exr, write_irs, write_lists


def reader(root: Path, split: str = "all") -> Irs:
    return Irs(name="irs", root=str(root), split=split, index_root=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-6), (np.float16, 1e-3)])
def test_every_pixel(tmp_path: Path, dtype: type, rtol: float) -> None:
    truths = write_irs(tmp_path, dtype=dtype)
    assert all(truth.sky.any() for truth in truths.values())
    save_picture(tmp_path / "Home" / "RoyalRoom" / "l_00009.png", picture(*SHAPE, number=0))
    exr(tmp_path / "Home" / "RoyalRoom" / "d_00008.exr", G=np.ones(SHAPE, np.float32))
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.METRIC, rtol=rtol)
    assert reasons(source) == {
        "irs/Home/RoyalRoom/l_00009.png": "an image without a label",
        "irs/Home/RoyalRoom/d_00008.exr": "a label without an image",
    }


def test_splits_are_the_official_lists(tmp_path: Path) -> None:
    write_irs(tmp_path)
    with pytest.raises(ValueError, match=r"lists/irs_train\.list is missing"):
        len(reader(tmp_path, "train"))
    write_lists(tmp_path)
    assert {reader(tmp_path, "train").row(i).extra["frame"] for i in range(2)} == set(FRAMES[:2])
    assert [reader(tmp_path, "test").row(i).extra["frame"] for i in range(1)] == [FRAMES[2]]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"G": np.ones((9, 12), np.float32)}, r"the disparity is \(9, 12\), the image \(18, 24\)"),
        ({"G": np.full(SHAPE, 24, np.float32)}, r"disparities from 24\.0 to 24\.0 px are not of this image"),
        ({"G": np.full(SHAPE, -1, np.float32)}, r"disparities from -1\.0"),
        ({"Y": np.ones(SHAPE, np.float32)}, r"holds \['Y'\]"),
    ],
    ids=["half size", "as wide as the image", "negative", "other channel"],
)
def test_wrong_frames_are_refused(tmp_path: Path, channels: dict[str, np.ndarray], message: str) -> None:
    write_irs(tmp_path)
    exr(tmp_path / "Home" / "RoyalRoom" / "d_00001.exr", **channels)
    with pytest.raises(DecodeError, match=rf"d_00001\.exr: {message}"):
        reader(tmp_path).read(0)
