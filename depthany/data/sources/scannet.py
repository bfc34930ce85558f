"""ScanNet frames, exported from its .sens streams."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Row, as_label
from depthany.types import DepthKind


class ScanNet(Matched):
    """`scene0406_02/color/000300.jpg` with `scene0406_02/depth/000300.png`: 16 bits, millimetres, planar, 0 is none.

    Colour is 1296x968 and depth 640x480, so the label is smaller than the image. Frame numbers may be padded or not.

    Args:
        name: of the source, the first part of every key.
        root: a folder above the scenes.
        split: all; the subsets in use are lists.
        files: the list, such as Marigold's scannet_val_sampled_list_800_1.txt; null: every frame under root.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "scannet"
    layout: ClassVar[str] = "scene0406_02/color/000300.jpg and scene0406_02/depth/000300.png"
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    scale: ClassVar[float] = 0.001  # metres per stored one
    parts: Mapping[str, str] = {
        "image": r"(scene\d{4}_\d\d)/color/(\d+)\.jpg",
        "label": r"(scene\d{4}_\d\d)/depth/(\d+)\.png",
    }

    def __init__(
        self, *, name: str, root: str, split: Literal["all"], files: str | None, index_root: str | None
    ) -> None:
        super().__init__(name=name, root=root, split=split, files=files, index_root=index_root)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        values = self.values(row.label, dtype="uint16")
        return as_label(values, kind=self.kind, scale=self.scale, factor=self.factor, invalid=[0])
