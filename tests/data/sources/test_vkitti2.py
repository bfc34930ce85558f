"""Virtual KITTI 2: centimetres, and a sky that is no surface."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.vkitti2 import VirtualKitti2
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.vkitti2 import SHAPE, write_vkitti2


def reader(root: Path, split: str = "all", cameras: tuple[int, ...] = (0, 1)) -> VirtualKitti2:
    return VirtualKitti2(name="vk", root=str(root), split=split, cameras=cameras, index_root=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("apart", [False, True])
def test_every_pixel(tmp_path: Path, apart: bool) -> None:
    truths = write_vkitti2(tmp_path, apart=apart)
    assert all(truth.sky.any() for truth in truths.values())
    assert_reads(reader(tmp_path), truths, kind=DepthKind.METRIC, depth_step=0.01)


def test_eight_bits_are_refused(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    source = reader(tmp_path)
    cv2.imwrite(str(tmp_path / source.row(0).label), np.full(SHAPE, 80, np.uint8))
    with pytest.raises(DecodeError, match=r"depth_00007\.png: it holds uint8, wanted uint16"):
        source.read(0)


def test_cameras_and_splits(tmp_path: Path) -> None:
    truths = write_vkitti2(tmp_path)
    left = reader(tmp_path, cameras=(0,))
    assert {left.row(i).image for i in range(len(left))} == {path for path in truths if "Camera_0" in path}
    val, train = reader(tmp_path, "val"), reader(tmp_path, "train")
    assert {val.row(i).extra["scene"] for i in range(len(val))} == {"Scene01"}
    assert len(val) + len(train) == len(truths)


def test_half_pairs_are_named(tmp_path: Path) -> None:
    write_vkitti2(tmp_path)
    save_picture(tmp_path / "Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg", picture(*SHAPE, number=0))
    (tmp_path / "Scene20/fog/frames/rgb/Camera_1/rgb_00007.jpg").unlink()
    assert reasons(reader(tmp_path)) == {
        "vk/Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg": "an image without a label",
        "vk/Scene20/fog/frames/depth/Camera_1/depth_00007.png": "a label without an image",
    }
