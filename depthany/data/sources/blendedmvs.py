"""BlendedMVS, BlendedMVS+ and BlendedMVS++ (together BlendedMVG) in their original files."""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind


class BlendedMvs(Raw):
    """`<scene>/blended_images/00000000.jpg` with `<scene>/rendered_depth_maps/00000000.pfm`, planar depth.

    The scale is that of each reconstruction. 0, negative and NaN are no surface. Images with the background blacked
    out (`_masked.jpg`) are not used. A scene is a folder of 24 hexadecimal digits, at any depth below the root: the
    archives of the high resolution wrap each in folders of the same name.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the scenes; those of all three releases may lie together.
        split: all, or the split of the first release: its 7 validation scenes, or every other scene.
        sky_masks: masks of the sky, which the labels do not know: a folder, or "beside": `<root>/.depthany/sky`, where
            `python -m depthany.sky` puts them; null: none.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "blendedmvs"
    layout: ClassVar[str] = "<scene>/blended_images/00000000.jpg and <scene>/rendered_depth_maps/00000000.pfm"
    splits: ClassVar[tuple[str, ...]] = ("all", "train", "val")
    kind: ClassVar[DepthKind] = DepthKind.SCALE
    factor: ClassVar[float] = 1.0
    validation: ClassVar[frozenset[str]] = frozenset(  # YoYo000/BlendedMVS, validation_list.txt
        {
            "5b7a3890fc8fcf6781e2593a",
            "5c189f2326173c3a09ed7ef3",
            "5b950c71608de421b1e7318f",
            "5a6400933d809f1d8200af15",
            "59d2657f82ca7774b1ec081d",
            "5ba19a8a360c7c30c1c169df",
            "59817e4a1bd4b175e7038d19",
        }
    )

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all", "train", "val"],
        sky_masks: str | None,
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root, sky_masks=sky_masks)

    def scan(self) -> Iterator[Row]:
        """Pairs the frames of every scene by their eight digits."""
        for folder, (images, depths) in self.siblings("blended_images", "rendered_depth_maps"):
            scene = PurePosixPath(folder).name
            if not re.fullmatch(r"[0-9a-f]{24}", scene):
                continue
            if self.split != "all" and (scene in self.validation) != (self.split == "val"):
                continue
            for frame, image, depth in self.pairs(
                self.named(images, r"(\d{8})\.jpg"), self.named(depths, r"(\d{8})\.pfm")
            ):
                yield Row(image, image, depth, {"scene": scene, "frame": frame})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / depth."""
        return as_label(self.values(row.label, dtype="float32"), kind=self.kind, factor=self.factor, invalid=[0])
