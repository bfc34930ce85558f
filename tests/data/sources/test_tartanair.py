"""TartanAir: 80 / depth, and a far sphere that is sky."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthany.data.files import DecodeError
from depthany.data.sources.tartanair import TartanAir, TartanAirV2
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.tartanair import SHAPE, write_tartanair, write_tartanair_v2

OPTIONS = {"name": "tartanair", "split": "all", "sky_above": 1000.0, "exclude": ["amusement"], "index_root": None}


def v1(root: Path, **options: object) -> TartanAir:
    return TartanAir(root=str(root), **OPTIONS | options)  # type: ignore[arg-type]


def v2(root: Path) -> TartanAirV2:
    return TartanAirV2(root=str(root), **OPTIONS)  # type: ignore[arg-type]


def test_every_pixel(tmp_path: Path) -> None:
    truths = write_tartanair(tmp_path)
    source = v1(tmp_path)
    assert all(truth.sky.any() for truth in truths.values())
    assert_reads(source, truths, kind=DepthKind.METRIC)
    assert {source.row(i).extra["scene"] for i in range(len(source))} == {"hospital", "ocean"}
    assert set(reasons(source).values()) == {"environment amusement is in `exclude`"}
    assert len(v1(tmp_path, exclude=[])) == len(truths) + 2


def test_every_pixel_of_version_2(tmp_path: Path) -> None:
    assert_reads(v2(tmp_path), write_tartanair_v2(tmp_path), kind=DepthKind.METRIC)


def test_the_order_of_the_channels_matters(tmp_path: Path) -> None:
    """The negative control: bytes in Pillow's order are other numbers."""
    truths = write_tartanair_v2(tmp_path)
    source = v2(tmp_path)
    label = tmp_path / source.row(0).label
    Image.fromarray(np.asarray(Image.open(label))[..., [2, 1, 0, 3]], "RGBA").save(label)
    with pytest.raises(AssertionError):
        assert_reads(source, truths, kind=DepthKind.METRIC)


def test_a_higher_threshold_takes_the_near_skies_for_surfaces(tmp_path: Path) -> None:
    truths = write_tartanair(tmp_path)
    source = v1(tmp_path, sky_above=5000.0)
    shares = [source.read(i)["sky"].any() for i in range(len(source))]
    assert 0 < sum(shares) < len(truths)


def test_half_floats_are_fine_and_whole_numbers_are_not(tmp_path: Path) -> None:
    write_tartanair(tmp_path)
    source = v1(tmp_path)
    path = tmp_path / source.row(0).label
    before = source.read(0)
    np.save(path, np.load(path).astype(np.float16))
    np.testing.assert_allclose(source.read(0)["disparity"], before["disparity"], rtol=1e-3)
    np.save(path, np.ones(SHAPE, np.uint16))
    with pytest.raises(DecodeError, match=r"_depth\.npy: it holds uint16, wanted float32 or float16"):
        source.read(0)
    np.save(path, np.ones((9, 12), np.float32))
    with pytest.raises(DecodeError, match=r"the depth is \(9, 12\), the image \(18, 24\)"):
        source.read(0)


@pytest.mark.parametrize("content", [b"", b"\x89PNG cut"])
def test_a_damaged_packed_file_is_told(tmp_path: Path, content: bytes) -> None:
    write_tartanair_v2(tmp_path)
    source = v2(tmp_path)
    (tmp_path / source.row(0).label).write_bytes(content)
    with pytest.raises(DecodeError, match=r"_depth\.png: damaged or not a PNG; fetch"):
        source.read(0)


def test_a_plain_depth_picture_is_no_packed_one(tmp_path: Path) -> None:
    write_tartanair_v2(tmp_path)
    source = v2(tmp_path)
    save_picture(tmp_path / source.row(0).label, picture(*SHAPE, number=0))
    with pytest.raises(DecodeError, match=r"wanted four channels of 8 bits"):
        source.read(0)


def test_real_frames(tmp_path: Path, real_root: Path) -> None:
    """Files of the dataset itself, put where its archive has them."""
    trajectory = tmp_path / "hospital" / "Easy" / "P000"
    trajectory.mkdir(parents=True)
    for part in ("image_left", "depth_left"):
        (trajectory / part).symlink_to(real_root / "labelled" / "tartanair" / part)
    source = v1(tmp_path)
    assert len(source) == 8
    skies = 0
    for i in range(8):
        sample = source.read(i)
        stored = np.load(tmp_path / source.row(i).label)
        assert sample["disparity"].shape == (480, 640) and sample["valid"].all()
        np.testing.assert_array_equal(sample["sky"], stored >= 1000)
        near = ~sample["sky"]
        np.testing.assert_allclose(80 / sample["disparity"][near], stored[near], rtol=1e-6)
        assert stored[near].max() < 40
        skies += sample["sky"].any()
    assert skies >= 2
