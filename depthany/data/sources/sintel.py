"""MPI Sintel, the training part, in its original files."""

import re
import struct
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind

PASSES = ("clean", "final")
PATH = re.compile(r"(?:.*/)?training/(clean|final|depth)/([^/]+)/frame_(\d{4})\.(?:png|dpt)")


class Sintel(Raw):
    """`training/final/<scene>/frame_0001.png` with `training/depth/<scene>/frame_0001.dpt`, planar depth.

    A .dpt is the tag PIEH, width and height as int32 and float32 rows from the top, all little-endian. The unit is not
    confirmed to be metres, so depth is taken as known up to scale. The sky is no code, but very far. The archives of
    images and of depth may be unpacked into one folder or side by side.

    Args:
        name: of the source, the first part of every key.
        root: the folder with `training`, or with the unpacked archives.
        split: all; depth is public for the training part alone.
        passes: clean, final or both; most evaluations take final.
        sky_above: stored depth from which on a pixel is sky; null: none is.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "sintel"
    layout: ClassVar[str] = "training/final/<scene>/frame_0001.png and training/depth/<scene>/frame_0001.dpt"
    kind: ClassVar[DepthKind] = DepthKind.SCALE
    factor: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all"],
        passes: Sequence[Literal["clean", "final"]],
        sky_above: float | None,
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)
        if not passes or not set(passes) <= set(PASSES):
            raise ValueError(f"source {name}: passes={list(passes)}; give clean, final, or both")
        self.options = {"passes": sorted(set(passes)), "sky_above": sky_above}

    def scan(self) -> Iterator[Row]:
        """Pairs each pass with the depth by scene and number."""
        found: dict[str, dict[str, str]] = {part: {} for part in (*PASSES, "depth")}
        for folder, names in self.walk(without={"depth_viz", "camdata_left", "flow", "albedo", "test"}):
            for match in filter(None, (PATH.fullmatch(f"{folder}/{name}") for name in names)):
                found[match[1]][f"{match[2]} {match[3]}"] = match[0]
        for part in self.options["passes"]:
            for frame, image, label in self.pairs(found[part], found["depth"]):
                yield Row(image, image, label, {"frame": frame, "pass": part})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / depth."""
        data = self.content(row.label)
        if data[:4] != b"PIEH" or len(data) < 12:
            raise self.damaged(row.label, "it does not begin with PIEH (202021.25), so it is no .dpt")
        width, height = struct.unpack("<ii", data[4:12])
        if (height, width) != image_shape:
            raise self.damaged(row.label, f"the depth is {(height, width)}, the image {image_shape}")
        if len(data) != 12 + 4 * width * height:
            raise self.damaged(row.label, f"{len(data)} bytes, wanted {12 + 4 * width * height}")
        values = np.frombuffer(data, "<f4", offset=12).reshape(height, width)
        return as_label(values, kind=self.kind, factor=self.factor, sky_above=self.options["sky_above"])
