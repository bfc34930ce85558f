"""NYU Depth v2: exported frames, and the labelled file with its reversed axes and numbers from 1."""

from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.nyuv2 import FILE, NyuV2, NyuV2Labelled, mat_numbers
from depthany.data.sources.packed import Packed
from depthany.data.sources.raw import Row
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, reasons
from tests.data.sources.writers.nyuv2 import (
    COUNT,
    SPLITS,
    list_of_paths,
    mat5_array,
    write_labelled,
    write_nyuv2,
    write_splits,
)


def exported(root: Path, files: Path | None = None) -> NyuV2:
    return NyuV2(name="nyu", root=str(root), split="all", files=files and str(files), index_root=None)


class Numbered:
    """All samples lie in one file: for the comparison, the number stands for the path of the image."""

    def __init__(self, source: NyuV2Labelled) -> None:
        self.source, self.skipped, self.key, self.read = source, source.skipped, source.key, source.read

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int) -> Row:
        row = self.source.row(index)
        return row._replace(image=row.key)


def labelled(root: Path, split: str = "all", depth: str = "raw") -> NyuV2Labelled:
    options = {"name": "nyu", "root": str(root), "split": split, "depth": depth, "index_root": None}
    return NyuV2Labelled(**options)  # type: ignore[arg-type]


def test_every_pixel_of_the_export(tmp_path: Path) -> None:
    truths = write_nyuv2(tmp_path)
    assert_reads(exported(tmp_path), truths, kind=DepthKind.METRIC, depth_step=0.001)


def test_a_list_with_leading_slashes_is_followed(tmp_path: Path) -> None:
    write_nyuv2(tmp_path / "official_splits" / "test")
    (tmp_path / "list.txt").write_text(list_of_paths())
    source = exported(tmp_path, tmp_path / "list.txt")
    assert {source.row(i).extra["frame"] for i in range(len(source))} == {"bathroom 45", "study_room 272"}
    assert reasons(source) == {}


def test_eight_bits_are_refused(tmp_path: Path) -> None:
    write_nyuv2(tmp_path)
    source = exported(tmp_path)
    cv2.imwrite(str(tmp_path / source.row(0).label), np.full((18, 24), 80, np.uint8))
    with pytest.raises(DecodeError, match=r"sync_depth_00045\.png: it holds uint8, wanted uint16"):
        source.read(0)


@pytest.mark.parametrize("depth", ["raw", "filled"])
def test_every_pixel_of_the_labelled_file(tmp_path: Path, depth: str) -> None:
    truths = write_labelled(tmp_path, depth=depth)
    source = labelled(tmp_path, depth=depth)
    assert_reads(Numbered(source), truths, kind=DepthKind.METRIC)
    assert all(source.read(i)["valid"].all() for i in range(COUNT)) == (depth == "filled")
    assert source.data(0) == b""  # the picture is computed: a packed copy encodes it


def test_a_packed_copy_of_the_labelled_file_gives_the_same(tmp_path: Path) -> None:
    write_labelled(tmp_path, depth="raw")
    source = labelled(tmp_path)
    packed = Packed(source=source, root=str(tmp_path / "shards"), samples_per_shard=3, short_side=None)
    packed.prepare()
    packed.open()
    for i in range(COUNT):
        one, other = source.read(i), packed.read(i)
        assert all(np.array_equal(one[name], other[name]) for name in one)  # type: ignore[literal-required]


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("order", ["<", ">"])
def test_splits_count_from_one(tmp_path: Path, compressed: bool, order: str) -> None:
    write_labelled(tmp_path, depth="raw")
    write_splits(tmp_path, compressed=compressed, order=order)
    whole = labelled(tmp_path)
    for split, numbers in SPLITS.items():
        source = labelled(tmp_path, split)
        assert [source.row(i).extra["number"] for i in range(len(source))] == list(numbers)
        for i, number in enumerate(numbers):
            np.testing.assert_array_equal(source.read(i)["disparity"], whole.read(number - 1)["disparity"])


def test_a_split_beyond_the_file_is_named(tmp_path: Path) -> None:
    write_labelled(tmp_path, depth="raw")
    write_splits(tmp_path)
    with h5py.File(tmp_path / FILE, "r+") as file:
        images = file["images"][:3]
        del file["images"]
        file["images"] = images
    assert reasons(labelled(tmp_path, "test")) == {f"nyu/{FILE} 4": "splits.mat names it, but there are 3"}


def test_bad_labelled_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no samples in root=\S+, wanted nyu_depth_v2_labeled\.mat"):
        len(labelled(tmp_path))
    write_labelled(tmp_path, depth="raw")
    with pytest.raises(ValueError, match=r"split=test needs splits\.mat beside .*or set split=all"):
        len(labelled(tmp_path, "test"))
    (tmp_path / "splits.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(DecodeError, match=r"splits\.mat: damaged or not a MATLAB file of version 5.*; fetch"):
        len(labelled(tmp_path, "test"))
    source = labelled(tmp_path)
    assert len(source) == COUNT
    with h5py.File(tmp_path / FILE, "r+") as file:
        del file["rawDepths"]
    with pytest.raises(
        DecodeError, match=rf"{FILE}: damaged or no labelled file of NYU Depth v2: .*rawDepths.*; fetch"
    ):
        source.read(0)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:900])
    with pytest.raises(DecodeError, match=rf"{FILE}: damaged or no labelled file"):
        source.read(0)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 1, 3, 2)], ids=["as it is", "width and height exchanged"])
def test_axes_that_do_not_fit_are_refused(tmp_path: Path, axes: tuple[int, ...]) -> None:
    write_labelled(tmp_path, depth="raw")
    with h5py.File(tmp_path / FILE, "r+") as file:
        images = np.transpose(file["images"][:], axes)
        del file["images"]
        file["images"] = images
    if axes == (0, 1, 2, 3):
        assert labelled(tmp_path).read(0)["valid"].any()
    else:
        with pytest.raises(DecodeError, match=r"a depth is float32 \(18, 24\), wanted float32 \(24, 18\)"):
            labelled(tmp_path).read(0)


def test_numbers_of_a_matlab_file() -> None:
    header = b"MATLAB 5.0".ljust(124) + b"\0\1IM"
    some = header + mat5_array("a", np.array([7]), order="<") + mat5_array("trainNdxs", np.arange(1, 200), order="<")
    np.testing.assert_array_equal(mat_numbers(some, "trainNdxs"), np.arange(1, 200))
    np.testing.assert_array_equal(mat_numbers(some, "a"), [7])
    with pytest.raises(DecodeError, match="it holds no numbers named testNdxs"):
        mat_numbers(some, "testNdxs")
    with pytest.raises(DecodeError, match="cut short"):
        mat_numbers(some[:-9], "trainNdxs")


def test_real_frames(tmp_path: Path, real_root: Path) -> None:
    """Files of the dataset itself, in a scene of their own."""
    (tmp_path / "basement").symlink_to(real_root / "labelled" / "nyuv2" / "sync")
    source = exported(tmp_path)
    assert len(source) == 3
    for i in range(3):
        sample = source.read(i)
        metres = 1 / sample["disparity"][sample["valid"]]
        assert sample["disparity"].shape == (480, 640) and 0.5 < sample["valid"].mean() < 1
        assert metres.min() > 0.3 and metres.max() < 10
