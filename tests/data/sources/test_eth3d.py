"""ETH3D: floats called .JPG, of the size that the image has, where inf is no sky."""

from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.eth3d import Eth3d
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.eth3d import SHAPE, TURNED, write_eth3d


def reader(root: Path) -> Eth3d:
    return Eth3d(name="eth3d", root=str(root), split="all", index_root=None)


@pytest.mark.parametrize("marigold", [False, True])
def test_every_pixel(tmp_path: Path, marigold: bool) -> None:
    truths = write_eth3d(tmp_path, marigold=marigold)
    source = reader(tmp_path)
    assert not any(truth.sky.any() for truth in truths.values())
    assert_reads(source, truths, kind=DepthKind.METRIC)
    turned = [i for i in range(len(source)) if TURNED in source.row(i).image]
    assert [source.read(i)["disparity"].shape for i in turned] == [SHAPE[::-1]]
    assert reasons(source) == {}


@pytest.mark.parametrize("size", [SHAPE[0] * SHAPE[1] * 4 - 4, SHAPE[0] * SHAPE[1] * 2, 0])
def test_a_file_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    write_eth3d(tmp_path)
    source = reader(tmp_path)
    (tmp_path / source.row(0).label).write_bytes(b"\0" * size)
    with pytest.raises(
        DecodeError, match=rf"DSC_0286\.JPG: {size} bytes, wanted the 3456 of 36x24 float32 values; fetch"
    ):
        source.read(0)


def test_a_map_of_nothing_is_refused(tmp_path: Path) -> None:
    write_eth3d(tmp_path)
    source = reader(tmp_path)
    (tmp_path / source.row(0).label).write_bytes(np.full(SHAPE, np.inf, "<f4").tobytes())
    with pytest.raises(DecodeError, match="no pixel has a valid value"):
        source.read(0)


def test_half_pairs_are_named(tmp_path: Path) -> None:
    write_eth3d(tmp_path)
    save_picture(tmp_path / "relief/images/dslr_images/DSC_0999.JPG", picture(*SHAPE, number=0))
    (tmp_path / "courtyard/images/dslr_images/DSC_0286.JPG").unlink()
    assert reasons(reader(tmp_path)) == {
        "eth3d/relief/images/dslr_images/DSC_0999.JPG": "an image without a label",
        "eth3d/courtyard/ground_truth_depth/dslr_images/DSC_0286.JPG": "a label without an image",
    }
