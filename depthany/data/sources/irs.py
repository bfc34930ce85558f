"""IRS (Indoor Robotics Stereo) in its original files."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import ClassVar, Literal

import numpy as np

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label, read_list
from depthany.types import DepthKind, Quantity


class Irs(Raw):
    """`<class>/<scene>/l_00001.png` with `d_00001.exr`, the disparity of the left view in pixels, in the channel G.

    Depth is 480 px * 0.1 m / disparity. A disparity of 0 is infinitely far (sky); what is not finite is invalid. A
    label whose size is not the image's, or that reaches the width of the image, is refused: at least one such frame is
    in the official lists (blackjack2015/IRS issue 3).

    Args:
        name: of the source, the first part of every key.
        root: the folder that holds Home, Office, Restaurant and Store; for a split also the lists of HKBU-HPML/IRS.
        split: all, or the frames of `lists/irs_train.list` or `lists/irs_test.list` under the root.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "irs"
    layout: ClassVar[str] = "{Home,Office,Restaurant,Store}/<scene>/l_00001.png and d_00001.exr"
    splits: ClassVar[tuple[str, ...]] = ("all", "train", "test")
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 48.0  # focal length in pixels times baseline in metres

    def __init__(self, *, name: str, root: str, split: Literal["all", "train", "test"], index_root: str | None) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)

    def scan(self) -> Iterator[Row]:
        """Pairs left view and disparity by the digits as they stand, padded or not."""
        listed = None
        if self.split != "all":
            listed = {_tail(row[0]) for row in read_list(self.root / "lists" / f"irs_{self.split}.list")}
        for folder, names in self.walk():
            paths = [f"{folder}/{name}" for name in names]
            for frame, image, label in self.pairs(
                self.named(paths, r"l_(\d+)\.png"), self.named(paths, r"d_(\d+)\.exr")
            ):
                if listed is None or _tail(image) in listed:
                    yield Row(image, image, label, {"scene": PurePosixPath(folder).name, "frame": frame})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """The stored disparity in pixels."""
        values = self.values(row.label, channel="G")
        if values.shape != image_shape:
            raise self.damaged(row.label, f"the disparity is {values.shape}, the image {image_shape}")
        finite = values[np.isfinite(values)]
        if finite.size and not (finite.min() >= 0 and finite.max() < image_shape[1]):
            raise self.damaged(row.label, f"disparities from {finite.min()} to {finite.max()} px are not of this image")
        return as_label(values, kind=self.kind, quantity=Quantity.DISPARITY, sky=0.0)


def _tail(path: str) -> str:
    """Class, scene and file: the lists begin with different folders in different letters."""
    return "/".join(PurePosixPath(path).parts[-3:]).lower()
