"""KITTI raw: points of a laser scan in the image, by the calibration of the date."""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.kitti_raw import KittiRaw
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, reasons
from tests.data.sources.writers.kitti import DRIVES, FRAMES, image_path, list_of_drives
from tests.data.sources.writers.kitti_raw import write_kitti_raw


def reader(root: Path, files: Path | None = None, depth: Literal["camera", "laser"] = "camera") -> KittiRaw:
    return KittiRaw(name="raw", root=str(root), split="all", files=files and str(files), depth=depth, index_root=None)


def test_every_pixel(tmp_path: Path) -> None:
    truths = write_kitti_raw(tmp_path)
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.METRIC, rtol=2e-6)  # of points in float32, turned twice
    assert set(reasons(source).values()) == {"an image without a label"}


def test_the_forward_coordinate_is_another_depth(tmp_path: Path) -> None:
    write_kitti_raw(tmp_path)
    planar, forward = reader(tmp_path).read(0), reader(tmp_path, depth="laser").read(0)
    valid = planar["valid"]
    more = 1 / forward["disparity"][valid] - 1 / planar["disparity"][valid]
    assert np.array_equal(valid, forward["valid"]) and 0.1 < np.median(more) < 0.6  # the laser is behind the camera


def test_a_list_of_drives_names_the_frames(tmp_path: Path) -> None:
    truths = write_kitti_raw(tmp_path / "tree")
    (tmp_path / "test_files.txt").write_text("\n".join(list_of_drives().splitlines()[1:-1]))  # without the right camera
    source = reader(tmp_path / "tree", tmp_path / "test_files.txt")
    assert {source.row(i).image for i in range(len(source))} == truths.keys() - {image_path(DRIVES[0], 2, FRAMES[0])}
    (tmp_path / "test_files.txt").write_text(list_of_drives())
    with pytest.raises(ValueError, match=r"has the line '.* r', which names no image of kitti_raw"):
        reader(tmp_path / "tree", tmp_path / "test_files.txt").prepare()


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    write_kitti_raw(tmp_path)
    (tmp_path / DRIVES[1][:10] / "calib_velo_to_cam.txt").unlink()
    source = reader(tmp_path)
    assert (
        sum("calib_velo_to_cam.txt is missing: fetch the calibration" in why for why in reasons(source).values()) == 2
    )
    scan = tmp_path / source.row(0).label
    scan.write_bytes(scan.read_bytes()[:-3])
    with pytest.raises(DecodeError, match=r"\.bin: \d+ bytes are no whole number of points of four float32; fetch"):
        source.read(0)
    (tmp_path / DRIVES[0][:10] / "calib_cam_to_cam.txt").write_text("calib_time: now\n")
    with pytest.raises(DecodeError, match=r"calib_cam_to_cam\.txt: no calibration of KITTI"):
        write_scan_again(scan)
        reader(tmp_path).read(0)


def write_scan_again(scan: Path) -> None:
    np.array([[5, 0, 0, 0.3]], "<f4").tofile(scan)
