"""ScanNet: millimetres, smaller than their image."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.scannet import ScanNet
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.scannet import IMAGE, SHAPE, list_of_paths, write_scannet


def reader(root: Path, files: Path | None = None) -> ScanNet:
    return ScanNet(name="scannet", root=str(root), split="all", files=files and str(files), index_root=None)


def test_every_pixel(tmp_path: Path) -> None:
    truths = write_scannet(tmp_path)
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.METRIC, depth_step=0.001)
    sample = source.read(0)
    assert sample["image"].shape[:2] == IMAGE and sample["disparity"].shape == SHAPE


def test_a_list_names_numbers_whatever_their_padding(tmp_path: Path) -> None:
    write_scannet(tmp_path / "tree")
    (tmp_path / "list.txt").write_text(list_of_paths())
    source = reader(tmp_path / "tree", tmp_path / "list.txt")
    assert {source.row(i).image for i in range(len(source))} == {
        "scene0406_02/color/000300.jpg",
        "scene0088_02/color/1100.jpg",
    }


def test_bad_files_and_half_pairs_are_told(tmp_path: Path) -> None:
    write_scannet(tmp_path)
    save_picture(tmp_path / "scene0406_02/color/000400.jpg", picture(*IMAGE, number=0))
    (tmp_path / "scene0406_02/color/000300.jpg").unlink()
    source = reader(tmp_path)
    assert reasons(source) == {
        "scannet/scene0406_02/color/000400.jpg": "an image without a label",
        "scannet/scene0406_02/depth/000300.png": "a label without an image",
    }
    label = tmp_path / source.row(0).label
    cv2.imwrite(str(label), np.full(SHAPE, 80, np.uint8))
    with pytest.raises(DecodeError, match="it holds uint8, wanted uint16"):
        source.read(0)
    label.write_bytes(label.read_bytes()[:60])
    with pytest.raises(DecodeError, match=r"depth/1100\.png: damaged"):
        source.read(0)
