"""KITTI raw images with the annotated depth of the depth benchmark."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Row, as_label
from depthany.types import DepthKind

DRIVE = r"(\d{4}_\d\d_\d\d_drive_\d{4}_sync)"


class Kitti(Matched):
    """`<date>/<drive>/image_02/data/0000000005.png` with `<drive>/proj_depth/groundtruth/image_02/0000000005.png`.

    16 bits, 256 steps to the metre, planar depth of accumulated LiDAR, 0 is none: most pixels have no depth. The
    folders train and val of data_depth_annotated may stay or be merged. Lists of Depth Anything and ZoeDepth (paths;
    `None` where there is no depth) and of monodepth2 (drive, number, l or r) are understood.

    Args:
        name: of the source, the first part of every key.
        root: a folder above the raw images and the annotated depth.
        split: all; the splits in use are lists.
        files: the list, such as kitti_eigen_test_files_with_gt.txt: 697 frames, 652 of them with annotated depth;
            null: every frame of both colour cameras that has depth.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "kitti"
    layout: ClassVar[str] = (
        "<date>/<drive>/image_02/data/0000000005.png and <drive>/proj_depth/groundtruth/image_02/0000000005.png"
    )
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    scale: ClassVar[float] = 1 / 256  # metres per stored one
    parts: Mapping[str, str] = {
        "image": rf"{DRIVE}/image_0([23])/data/(\d{{10}})\.(?:png|jpg)",
        "label": rf"{DRIVE}/proj_depth/groundtruth/image_0([23])/(\d{{10}})\.png",
    }
    without: ClassVar[frozenset[str]] = frozenset({"image_00", "image_01", "velodyne_points", "velodyne_raw", "oxts"})

    def __init__(
        self, *, name: str, root: str, split: Literal["all"], files: str | None, index_root: str | None
    ) -> None:
        super().__init__(name=name, root=root, split=split, files=files, index_root=index_root)

    def frame(self, columns: list[str]) -> str:
        """Of a path, or of drive, number and side."""
        if len(columns) == 3 and columns[2] in ("l", "r"):
            camera = 2 if columns[2] == "l" else 3
            columns = [f"{columns[0]}/image_0{camera}/data/{columns[1].zfill(10)}.png"]
        return super().frame(columns)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        values = self.sized(row.label, image_shape, dtype="uint16")
        if 0 < values.max() <= 255:  # a whole street within a metre: the authors' own devkit refuses it
            raise self.damaged(row.label, "no value is above 255: these were 8 bits once")
        return as_label(values, kind=self.kind, scale=self.scale, factor=self.factor, invalid=[0])
