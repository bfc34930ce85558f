"""NYU Depth v2: the frames that BTS, ZoeDepth and Depth Anything export, and the authors' labelled file."""

import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import ClassVar, Literal

import h5py
import numpy as np

from depthany.data.files import DecodeError
from depthany.data.labels import Label
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind

FILE, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
ARRAYS = {"raw": "rawDepths", "filled": "depths"}
MAT_COMPRESSED, MAT_MATRIX = 15, 14
MAT_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


class NyuV2(Matched):
    """`<scene>/rgb_00045.jpg` with `<scene>/sync_depth_00045.png`: 16 bits, millimetres, planar depth, 0 is none.

    Args:
        name: of the source, the first part of every key.
        root: a folder above the scenes, such as official_splits/test.
        split: all; the splits in use are lists.
        files: the list, such as nyudepthv2_test_files_with_gt.txt (654 frames); null: every frame under root.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "nyuv2"
    layout: ClassVar[str] = "<scene>/rgb_00045.jpg and <scene>/sync_depth_00045.png"
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    scale: ClassVar[float] = 0.001  # metres per stored one
    parts: Mapping[str, str] = {
        "image": r"([^/]+)/rgb_(\d{5})\.(?:jpg|png)",
        "label": r"([^/]+)/sync_depth_(\d{5})\.png",
    }

    def __init__(
        self, *, name: str, root: str, split: Literal["all"], files: str | None, index_root: str | None
    ) -> None:
        super().__init__(name=name, root=root, split=split, files=files, index_root=index_root)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        values = self.sized(row.label, image_shape, dtype="uint16")
        return as_label(values, kind=self.kind, scale=self.scale, factor=self.factor, invalid=[0])


class NyuV2Labelled(Raw):
    """`nyu_depth_v2_labeled.mat`, 1449 frames in MATLAB 7.3 (HDF5), float32 metres, planar depth, 0 is none.

    MATLAB's axes come reversed: an image is stored as (3, width, height). A sample is named by its number in the file,
    from 1, as in `splits.mat`.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the file, and with `splits.mat` of the authors for a split.
        split: all (1449 frames), or the official train (795) or test (654).
        depth: raw is what the sensor measured, with holes, which results are reported on; filled is in-painted.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "nyuv2_labelled"
    layout: ClassVar[str] = f"{FILE}, and {SPLITS} for a split"
    splits: ClassVar[tuple[str, ...]] = ("all", "train", "test")
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all", "train", "test"],
        depth: Literal["raw", "filled"],
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)
        self.options = {"depth": depth}

    def scan(self) -> Iterator[Row]:
        """One row for each number of the split."""
        for folder, names in self.walk():
            if FILE not in names:
                continue
            path, splits = (f"{folder}/{name}" if folder else name for name in (FILE, SPLITS))
            with self._open(path) as file:
                count = len(file["images"])
            numbers = range(1, count + 1)
            if self.split != "all":
                if SPLITS not in names:
                    raise ValueError(
                        f"source {self.name}: split={self.split} needs {SPLITS} beside {FILE}: put the authors' file "
                        "there, or set split=all"
                    )
                try:
                    numbers = mat_numbers(self.content(splits), f"{self.split}Ndxs").astype(int).tolist()
                except DecodeError as err:
                    raise self.damaged(splits, err) from err
            for number in numbers:
                if 1 <= number <= count:
                    yield Row(f"{number:04d}", path, path, {"number": number})
                else:
                    self.skip(f"{path} {number}", f"{SPLITS} names it, but there are {count}")

    def image(self, row: Row) -> np.ndarray:
        """(480, 640, 3) uint8 RGB."""
        pixels = self._frame(row, "images")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise self.damaged(row.image, f"an image is {pixels.dtype} {pixels.shape}, wanted uint8 (h, w, 3)")
        return pixels

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        values = self._frame(row, ARRAYS[self.options["depth"]])
        if values.dtype.kind != "f" or values.shape != image_shape:
            raise self.damaged(row.label, f"a depth is {values.dtype} {values.shape}, wanted float32 {image_shape}")
        return as_label(values, kind=self.kind, factor=self.factor, invalid=[0])

    def _frame(self, row: Row, array: str) -> np.ndarray:
        """One frame of an array, its axes in order."""
        with self._open(row.image) as file:
            return np.ascontiguousarray(file[array][row.extra["number"] - 1].T)

    @contextmanager
    def _open(self, path: str) -> Iterator[h5py.File]:
        """The file, for this process alone; what goes wrong in it names it."""
        try:
            with h5py.File(self.root / path, "r", locking=False) as file:
                yield file
        except (OSError, LookupError, ValueError) as err:
            raise self.damaged(path, f"damaged or no labelled file of NYU Depth v2: {err}") from err


def mat_numbers(data: bytes, name: str) -> np.ndarray:
    """A numeric array of a MATLAB file of version 5 to 7.2, flat.

    Args:
        data: the bytes of the file.
        name: of the array.

    Raises:
        DecodeError: damaged, or no such array.
    """
    try:
        order = {b"IM": "<", b"MI": ">"}[data[126:128]]
        for kind, content in _elements(data[128:], order):
            if kind == MAT_COMPRESSED:
                kind, content = next(_elements(zlib.decompress(content), order))
            parts = list(islice(_elements(content, order), 4)) if kind == MAT_MATRIX else []
            if len(parts) == 4 and parts[2][1] == name.encode():  # flags, shape, name, numbers
                return np.frombuffer(parts[3][1], f"{order}{MAT_NUMBERS[parts[3][0]]}")
    except (LookupError, ValueError, StopIteration, struct.error, zlib.error) as err:
        raise DecodeError(f"damaged or not a MATLAB file of version 5: {err}"[:200]) from err
    raise DecodeError(f"it holds no numbers named {name}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, content) of the elements one after the other (MAT-File Format, version 5, table 1-1)."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # up to four bytes stand in the tag itself
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise ValueError("cut short")
        yield kind, data[start : start + size]
        at = start + size
        at += 0 if kind == MAT_COMPRESSED else -at % 8
