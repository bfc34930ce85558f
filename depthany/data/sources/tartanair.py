"""TartanAir, versions 1 and 2, in their original files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import cv2
import numpy as np

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind

CAMERAS = [
    f"{side}_{view}" for side in ("lcam", "rcam") for view in ("front", "back", "left", "right", "top", "bottom")
]


class _TartanAir(Raw):
    """What both versions share: trajectories of image and depth folders, far values, and 80 / depth in pixels."""

    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 80.0  # focal length of 320 px times baseline of 0.25 m
    trajectory: ClassVar[re.Pattern[str]]  # the end of a trajectory's path; its group is the environment
    folders: ClassVar[Mapping[str, str]]  # of images, with the folder of their labels
    names: ClassVar[tuple[str, str]]  # patterns of image and label; the group is what pairs them

    def __init__(
        self, *, name: str, root: str, split: str, sky_above: float, exclude: Sequence[str], index_root: str | None
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)
        self.options = {"sky_above": sky_above, "exclude": sorted(exclude)}

    def scan(self) -> Iterator[Row]:
        parts = [*self.folders, *self.folders.values()]
        for folder, files in self.siblings(*parts, without={"flow", "seg_left", "image_right", "depth_right"}):
            if (match := self.trajectory.search(folder)) is None:
                continue
            if match[1] in self.options["exclude"]:
                self.skip(folder, f"environment {match[1]} is in `exclude`")
                continue
            for images, labels in zip(files[: len(self.folders)], files[len(self.folders) :], strict=True):
                found = (self.named(paths, name) for paths, name in zip((images, labels), self.names, strict=True))
                for frame, image, label in self.pairs(*found):
                    yield Row(image, image, label, {"scene": match[1], "frame": frame})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        values = self.depth(row)
        if values.shape != image_shape:
            raise self.damaged(row.label, f"the depth is {values.shape}, the image {image_shape}")
        return as_label(values, kind=self.kind, factor=self.factor, sky_above=self.options["sky_above"], invalid=[0])

    def depth(self, row: Row) -> np.ndarray:
        """(h, w) metres."""
        raise NotImplementedError


class TartanAir(_TartanAir):
    """`<environment>/<Easy|Hard>/P000/image_left/000000_left.png` with `depth_left/000000_left_depth.npy`, metres.

    Planar depth. The sky is a far sphere of no constant distance: what is farther than `sky_above` counts as sky. The
    environment folder may be doubled, as some archives unpack.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the environments.
        split: all; there is no official split.
        sky_above: metres from which on a value is sky. 1000 tells them apart in the real frames that were looked at.
        exclude: environments to leave out. The invisible dome of `amusement` spoils its sky.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "tartanair"
    layout: ClassVar[str] = (
        "<environment>/{Easy,Hard}/P000/image_left/000000_left.png and "
        "<environment>/{Easy,Hard}/P000/depth_left/000000_left_depth.npy"
    )
    trajectory: ClassVar[re.Pattern[str]] = re.compile(r"(?:^|/)([^/]+)/(?:Easy|Hard)/P\d{3}$")
    folders: ClassVar[Mapping[str, str]] = {"image_left": "depth_left"}
    names: ClassVar[tuple[str, str]] = (r"(\d{6})_left\.png", r"(\d{6})_left_depth\.npy")

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all"],
        sky_above: float,
        exclude: Sequence[str],
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, sky_above=sky_above, exclude=exclude, index_root=index_root)

    def depth(self, row: Row) -> np.ndarray:
        """float32, or float16: the official page says 16 bits."""
        values = self.values(row.label)
        if values.dtype.kind != "f":
            raise self.damaged(row.label, f"it holds {values.dtype}, wanted float32 or float16")
        return values


class TartanAirV2(_TartanAir):
    """`<environment>/Data_<easy|hard>/P000/image_lcam_front/000000_lcam_front.png` with `depth_lcam_front/…_depth.png`.

    The four 8-bit channels of a depth pixel, in the order blue, green, red, alpha, are one little-endian float32 in
    metres: planar depth. Every camera that is there is read.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the environments.
        split: all; there is no official split.
        sky_above: metres from which on a value is sky.
        exclude: environments to leave out.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "tartanair_v2"
    layout: ClassVar[str] = (
        "<environment>/Data_{easy,hard}/P000/image_lcam_front/000000_lcam_front.png and "
        "<environment>/Data_{easy,hard}/P000/depth_lcam_front/000000_lcam_front_depth.png"
    )
    trajectory: ClassVar[re.Pattern[str]] = re.compile(r"(?:^|/)([^/]+)/Data_\w+/P\d{3,4}$")
    folders: ClassVar[Mapping[str, str]] = {f"image_{camera}": f"depth_{camera}" for camera in CAMERAS}
    names: ClassVar[tuple[str, str]] = (r"(\d{6}_[lr]cam_[a-z]+)\.png", r"(\d{6}_[lr]cam_[a-z]+)_depth\.png")

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all"],
        sky_above: float,
        exclude: Sequence[str],
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, sky_above=sky_above, exclude=exclude, index_root=index_root)

    def depth(self, row: Row) -> np.ndarray:
        """Unpacks the bytes; cv2 hands them out in the order of the format."""
        stored = np.frombuffer(self.content(row.label), np.uint8)
        pixels = cv2.imdecode(stored, cv2.IMREAD_UNCHANGED) if stored.size else None
        if pixels is None:
            raise self.damaged(row.label, "damaged or not a PNG")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 4:
            raise self.damaged(row.label, f"{pixels.dtype} {pixels.shape}, wanted four channels of 8 bits")
        return np.ascontiguousarray(pixels).view("<f4")[..., 0]
