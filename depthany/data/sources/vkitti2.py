"""Virtual KITTI 2 in its original files."""

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind

PATH = re.compile(r"(?:.*/)?(Scene\d\d/[^/]+)/frames/(rgb|depth)/Camera_(\d)/(?:rgb|depth)_(\d{5})\.(?:jpg|png)")


class VirtualKitti2(Raw):
    """`Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg` with `depth/…/depth_00000.png`: 16 bits, centimetres, planar.

    65535 is sky. The archives of images and of depth may be unpacked into one folder or side by side.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the scenes, or with the unpacked archives.
        split: all, or the split of Marigold: val is Scene01, train the others.
        cameras: 0 is the left camera, which alone the published lists use; 1 the right one.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "vkitti2"
    layout: ClassVar[str] = (
        "Scene01/clone/frames/rgb/Camera_0/rgb_00000.jpg and Scene01/clone/frames/depth/Camera_0/depth_00000.png"
    )
    splits: ClassVar[tuple[str, ...]] = ("all", "train", "val")
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    scale: ClassVar[float] = 0.01  # metres per stored one
    sky: ClassVar[float] = 65535

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all", "train", "val"],
        cameras: Sequence[int],
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)
        self.options = {"cameras": sorted(cameras)}

    def scan(self) -> Iterator[Row]:
        """Pairs frames by scene, variant, camera and number."""
        found: dict[str, dict[str, str]] = {"rgb": {}, "depth": {}}
        for folder, names in self.walk(without={"classSegmentation", "instanceSegmentation", "forwardFlow"}):
            for match in filter(None, (PATH.fullmatch(f"{folder}/{name}") for name in names)):
                scene, part, camera, frame = match.groups()
                wanted = self.split == "all" or scene.startswith("Scene01") == (self.split == "val")
                if wanted and int(camera) in self.options["cameras"]:
                    found[part][f"{scene}/Camera_{camera}/{frame}"] = match[0]
        for stem, image, depth in self.pairs(found["rgb"], found["depth"]):
            scene, variant, camera, frame = stem.split("/")
            yield Row(image, image, depth, {"scene": scene, "variant": variant, "camera": camera, "frame": frame})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        values = self.values(row.label, dtype="uint16")
        return as_label(values, kind=self.kind, scale=self.scale, factor=self.factor, invalid=[0], sky=self.sky)
