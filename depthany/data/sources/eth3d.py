"""ETH3D, the high-resolution multi-view training scenes, in their original files."""

from collections.abc import Mapping
from io import BytesIO
from typing import ClassVar, Literal

import numpy as np
from PIL import Image, ImageOps

from depthany.data.labels import Label
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Row, as_label
from depthany.types import DepthKind

ORIENTATION = 0x0112  # the EXIF tag


class Eth3d(Matched):
    """`<scene>/images/dslr_images/DSC_0001.JPG` with `<scene>/ground_truth_depth/dslr_images/DSC_0001.JPG`.

    The label is no JPEG: little-endian float32 without a header, as many as the image has pixels, in metres, planar.
    inf is no measurement (most pixels), not the sky. It fits the distorted originals alone, so undistorted images are
    not read. Where EXIF turns an image upright, the label is turned alike.

    Args:
        name: of the source, the first part of every key.
        root: a folder above the unpacked archives <scene>_dslr_jpg and <scene>_dslr_depth.
        split: all 13 scenes, 454 images.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "eth3d"
    layout: ClassVar[str] = (
        "<scene>/images/dslr_images/DSC_0001.JPG and <scene>/ground_truth_depth/dslr_images/DSC_0001.JPG"
    )
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    parts: Mapping[str, str] = {
        "image": r"([^/]+)/images/dslr_images/([^/]+)\.JPG",
        "label": r"([^/]+)/ground_truth_depth/dslr_images/([^/]+)\.JPG",
    }
    without: ClassVar[frozenset[str]] = frozenset({"dslr_images_undistorted"})

    def __init__(self, *, name: str, root: str, split: Literal["all"], index_root: str | None) -> None:
        super().__init__(name=name, root=root, split=split, files=None, index_root=index_root)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        data = self.content(row.label)
        with Image.open(BytesIO(self.content(row.image))) as picture:
            (width, height), orientation = picture.size, picture.getexif().get(ORIENTATION, 1)
        if len(data) != 4 * width * height:
            raise self.damaged(
                row.label, f"{len(data)} bytes, wanted the {4 * width * height} of {width}x{height} float32 values"
            )
        values = np.frombuffer(data, "<f4").reshape(height, width)
        if orientation != 1:
            depth = Image.fromarray(values)
            depth.getexif()[ORIENTATION] = orientation
            values = np.asarray(ImageOps.exif_transpose(depth))
        return as_label(values, kind=self.kind, factor=self.factor, invalid=[np.inf])
