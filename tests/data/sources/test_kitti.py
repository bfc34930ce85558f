"""KITTI: 256 steps to the metre, and lists in three forms."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.kitti import Kitti
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.kitti import (
    DRIVES,
    FRAMES,
    SHAPES,
    image_path,
    label_path,
    list_of_drives,
    list_of_paths,
    save_depth,
    write_kitti,
)


def reader(root: Path, files: Path | None = None) -> Kitti:
    return Kitti(name="kitti", root=str(root), split="all", files=files and str(files), index_root=None)


def images(source: Kitti) -> set[str]:
    return {source.row(i).image for i in range(len(source))}


@pytest.mark.parametrize("apart", [False, True])
def test_every_pixel(tmp_path: Path, apart: bool) -> None:
    truths = write_kitti(tmp_path, apart=apart)
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.METRIC, depth_step=1 / 256)
    assert len(source) == 6 and {source.read(i)["disparity"].shape for i in range(6)} == set(SHAPES)
    assert all((source.read(i)["disparity"][10, 0]) == 1.0 for i in range(6))  # raw 256 is a metre
    assert {source.row(i).extra["frame"] for i in range(6)} >= {f"{DRIVES[1]} 2 {FRAMES[0]}"}
    assert set(reasons(source).values()) == {"an image without a label"} and len(reasons(source)) == 2


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("prefix", ["", "/mnt/somewhere/else/"])
def test_a_list_of_paths_is_followed(tmp_path: Path, apart: bool, prefix: str) -> None:
    truths = write_kitti(tmp_path / "tree", apart=apart)
    (tmp_path / "eigen.txt").write_text(list_of_paths(prefix))
    source = reader(tmp_path / "tree", tmp_path / "eigen.txt")
    left = {path: truth for path, truth in truths.items() if "image_02" in path}
    assert_reads(source, left, kind=DepthKind.METRIC, depth_step=1 / 256)
    none = f"{prefix}{image_path(DRIVES[0], 2, FRAMES[1])}".lstrip("/")
    assert reasons(source) == {f"kitti/{none}": "the list names no label for it"}  # the 45 of 697


def test_a_list_of_drives_is_followed(tmp_path: Path) -> None:
    truths = write_kitti(tmp_path / "tree")
    (tmp_path / "test_files.txt").write_text(list_of_drives())
    source = reader(tmp_path / "tree", tmp_path / "test_files.txt")
    right = image_path(DRIVES[0], 3, FRAMES[0])
    assert images(source) == {path for path in truths if "image_02" in path} | {right}
    assert reasons(source) == {f"kitti/{image_path(DRIVES[0], 2, FRAMES[1])}": "an image without a label"}


def test_what_the_list_names_and_is_missing_is_told(tmp_path: Path) -> None:
    write_kitti(tmp_path / "tree")
    (tmp_path / "eigen.txt").write_text(list_of_paths())
    gone = image_path(DRIVES[1], 2, FRAMES[0])
    (tmp_path / "tree" / gone).unlink()
    (tmp_path / "tree" / label_path(DRIVES[1], 2, FRAMES[1])).unlink()
    found = reasons(reader(tmp_path / "tree", tmp_path / "eigen.txt"))
    assert found[f"kitti/{gone}"] == "it is in the list, but not under root"
    assert found[f"kitti/{image_path(DRIVES[1], 2, FRAMES[1])}"] == "an image without a label"


def test_another_list_is_another_identity(tmp_path: Path) -> None:
    write_kitti(tmp_path / "tree")
    path = tmp_path / "list.txt"
    path.write_text(list_of_paths())
    first = reader(tmp_path / "tree", path).identity()
    assert first != reader(tmp_path / "tree").identity()
    path.write_text(list_of_drives())
    assert len(reader(tmp_path / "tree", path)) == 4 and reader(tmp_path / "tree", path).identity() != first


def test_two_lists_of_one_root_live_side_by_side(tmp_path: Path) -> None:
    """A run trains on one list and validates on another, in worker processes."""
    write_kitti(tmp_path / "tree")
    (tmp_path / "a.txt").write_text(list_of_paths())
    (tmp_path / "b.txt").write_text(list_of_drives())
    copies = []
    for files in (None, tmp_path / "a.txt", tmp_path / "b.txt"):
        copies.append(pickle.dumps(reader(tmp_path / "tree", files)))
    assert [len(pickle.loads(copy)) for copy in copies] == [6, 3, 4]


def test_a_wrong_list_is_told(tmp_path: Path) -> None:
    write_kitti(tmp_path / "tree")
    path = tmp_path / "list.txt"
    path.write_text("bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579\n")
    with pytest.raises(ValueError, match=r"files=\S+list.txt has the line 'bathroom/rgb\S+ .*names no image of kitti"):
        len(reader(tmp_path / "tree", path))
    path.write_text("image 0\n")
    with pytest.raises(ValueError, match="has the line 'image 0'"):
        len(reader(tmp_path / "tree", path))
    with pytest.raises(ValueError, match=r"files=\S+nothing.txt is no file; give the list of frames, or null for all"):
        reader(tmp_path / "tree", tmp_path / "nothing.txt").prepare()


def test_wrong_labels_are_refused(tmp_path: Path) -> None:
    write_kitti(tmp_path)
    source = reader(tmp_path)
    path = tmp_path / source.row(0).label
    cv2.imwrite(str(path), np.full(SHAPES[0], 200, np.uint8))
    with pytest.raises(DecodeError, match=r"\d{10}\.png: it holds uint8, wanted uint16; fetch"):
        source.read(0)
    save_depth(path, np.full(SHAPES[0], 200))
    with pytest.raises(DecodeError, match="no value is above 255: these were 8 bits once"):
        source.read(0)
    save_depth(path, np.full((9, 24), 2000))
    with pytest.raises(DecodeError, match=r"it is \(9, 24\), wanted \(18, 48\)"):
        source.read(0)
    save_depth(path, np.zeros(SHAPES[0]))
    with pytest.raises(DecodeError, match="no pixel has a valid value"):
        source.read(0)


def test_one_frame_in_two_files_is_used_once(tmp_path: Path) -> None:
    truths = write_kitti(tmp_path)
    twin = image_path(DRIVES[0], 2, FRAMES[0], "jpg")
    save_picture(tmp_path / twin, picture(*SHAPES[0], number=0))
    source = reader(tmp_path)
    assert len(source) == len(truths)
    assert reasons(source)[f"kitti/{twin[:-3]}png"] == f"{twin} is the same frame and is used"


def test_real_frames(tmp_path: Path, real_root: Path) -> None:
    """Files of the dataset itself, put where its archives have them."""
    drive = "2011_09_30_drive_0027_sync"
    for part, target in (
        ("rgb", f"2011_09_30/{drive}/image_02/data"),
        ("depth", f"{drive}/proj_depth/groundtruth/image_02"),
    ):
        (tmp_path / target).parent.mkdir(parents=True)
        (tmp_path / target).symlink_to(real_root / "labelled" / "kitti_depth" / part)
    source = reader(tmp_path)
    assert len(source) == 3
    for i in range(3):
        sample = source.read(i)
        stored = cv2.imread(str(tmp_path / source.row(i).label), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(sample["valid"], stored > 0)
        metres = 1 / sample["disparity"][sample["valid"]]
        np.testing.assert_allclose(metres, stored[stored > 0] / 256, rtol=1e-6)
        assert 0.1 < sample["valid"].mean() < 0.3 and metres.min() > 2 and metres.max() < 90
