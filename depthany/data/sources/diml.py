"""DIML/CVL RGB-D, indoor and outdoor, in the files of the full release and of the samples."""

from collections.abc import Collection, Iterator
from pathlib import PurePosixPath
from typing import ClassVar, Literal

import numpy as np

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind

HIGHEST_MM = 65500  # larger raw values are no depth: Metric3D, training/mono/datasets/diml_dataset.py


class _Diml(Raw):
    """What both parts share: 16-bit PNG in millimetres, and folders side by side."""

    splits: ClassVar[tuple[str, ...]] = ("all", "train", "val")
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    scale: ClassVar[float] = 0.001  # metres per stored one
    held_out: ClassVar[str]  # the folder that is split=val
    parts: ClassVar[tuple[str, ...]]  # the folders that lie side by side: of the full release, then of the samples

    def groups(self) -> Iterator[list[list[str]]]:
        """The files of the folders side by side, of the split."""
        count = len(self.parts) // 2
        for folder, files in self.siblings(*self.parts):
            held_out = self.held_out in PurePosixPath(folder).parts
            if self.split == "all" or held_out == (self.split == "val"):
                yield files[:count]
                yield files[count:]

    def depth(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """(h, w) uint16 millimetres, and where they are a depth."""
        values = self.values(row.label, dtype="uint16")
        return values, (values > 0) & (values <= HIGHEST_MM)


class DimlIndoor(_Diml):
    """`<scene>/<date>/<batch>/col/<name>_c.png` with `up_png/<name>_<any>.png`: millimetres, planar depth, 0 is none.

    In the samples `<scene>/color/<name>_c.png` with `depth_filled/<name>_depth_filled.png`. Scenes have names such as
    "16. Billiard Hall". What follows the name of a label is not fixed.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the scenes, or one above; HR and LR hold the same frames, so give one of them.
        split: all; there is no official split: val is "16. Billiard Hall", train the others.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "diml_indoor"
    layout: ClassVar[str] = "<scene>/<date>/<batch>/col/<name>_c.png and <scene>/<date>/<batch>/up_png/<name>_*.png"
    held_out: ClassVar[str] = "16. Billiard Hall"
    parts: ClassVar[tuple[str, ...]] = ("col", "up_png", "color", "depth_filled")

    def __init__(self, *, name: str, root: str, split: Literal["all", "train", "val"], index_root: str | None) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)

    def scan(self) -> Iterator[Row]:
        """Pairs by the longest name of an image that a label begins with."""
        for images, labels in self.groups():
            by_name = self.named(images, r"(.+)_c\.png")
            by_stem: dict[str, str] = {}
            for stem, path in self.named(labels, r"(.+)\.png").items():
                name = _name_in(stem, by_name)
                if name in by_stem:
                    self.skip(path, f"{PurePosixPath(by_stem[name]).name} is a label of the same image and is used")
                else:
                    by_stem[name] = path
            for _, image, label in self.pairs(by_name, by_stem):
                yield Row(image, image, label, {})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres; colour and depth may have different sizes."""
        values, mask = self.depth(row)
        return as_label(values, kind=self.kind, scale=self.scale, factor=self.factor, mask=mask)


class DimlOutdoor(_Diml):
    """`<drive>/<batch>/left/<name>_left.png` with `depth/<name>_depth.png` and `conf/<name>_conf.png`.

    In the samples `outleft/<name>.png`, `depthmap/<name>.png`, `confidencemap/<name>.png`. Millimetres, planar depth
    from stereo, 0 is none; sky and thin structures have a low confidence, and are invalid.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the drives, or one above; HR and LR hold the same frames, so give one of them.
        split: all; there is no official split: val is the drive 170721_C0, train the others.
        min_confidence: pixels count above it, in [0, 1]. 0.6 in nndepth, 0.9 in the authors' technical report.
        sky_masks: masks of the sky, which the labels do not know: a folder, or "beside": `<root>/.depthany/sky`, where
            `python -m depthany.sky` puts them; null: none.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "diml_outdoor"
    layout: ClassVar[str] = "<drive>/<batch>/left/<name>_left.png, …/depth/<name>_depth.png, …/conf/<name>_conf.png"
    held_out: ClassVar[str] = "170721_C0"
    parts: ClassVar[tuple[str, ...]] = ("left", "depth", "conf", "outleft", "depthmap", "confidencemap")

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all", "train", "val"],
        min_confidence: float,
        sky_masks: str | None,
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root, sky_masks=sky_masks)
        if not 0 <= min_confidence < 1:
            raise ValueError(f"source {name}: min_confidence={min_confidence}; give a number from 0 to below 1")
        self.options = {"min_confidence": min_confidence}

    def scan(self) -> Iterator[Row]:
        """Matches left view, depth and confidence by name."""
        for files in self.groups():
            endings = ("_left", "_depth", "_conf")
            images, labels, masks = (
                self.named(paths, rf"(.+?)(?:{ending})?\.png") for paths, ending in zip(files, endings, strict=True)
            )
            for stem, image, label in self.pairs(images, labels):
                if stem in masks:
                    yield Row(image, image, label, {"confidence": masks[stem]})
                else:
                    self.skip(image, "there is no confidence map for it")

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres where the confidence is high enough."""
        values, mask = self.depth(row)
        confidence = self.values(row.extra["confidence"], dtype="uint8")
        if confidence.shape != values.shape:
            raise self.damaged(row.extra["confidence"], f"it is {confidence.shape}, the depth {values.shape}")
        mask &= confidence / 255 > self.options["min_confidence"]
        return as_label(values, kind=self.kind, scale=self.scale, factor=self.factor, mask=mask)


def _name_in(stem: str, names: Collection[str]) -> str:
    """The longest of the names that the stem begins with, up to an underscore; the stem itself if there is none."""
    name = stem
    while name and name not in names:
        name = name.rpartition("_")[0]
    return name or stem
