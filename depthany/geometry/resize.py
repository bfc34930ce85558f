"""Sizes and resampling of images and labels before they are tensors (numpy and OpenCV).

Legend: H W pixels before, h w after, S side of a training view. Pixel centres lie at half integers, for images and
labels alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import numpy as np

from depthany.types import IMAGENET_MEAN, IMAGENET_STD

MAX_INPUT_PIXELS = 4_000_000  # the short side is bounded from below, so a thin strip would grow without bound


class Crop(NamedTuple):
    """A square of an image, in the image's own pixels, that becomes a training view, flipped or not."""

    height: int  # of the image
    width: int
    top: int
    left: int
    side: int
    flip: bool


def lower_bound_size(height: int, width: int, *, size: int, multiple: int) -> tuple[int, int]:
    """(h, w) of the official rule: short side at least `size`, aspect ratio kept up to rounding.

    Each side is rounded to the nearest multiple, ties to even as numpy does, and up where it would
    fall below `size`. DepthAnything/Depth-Anything-V2, depth_anything_v2/util/transform.py, Resize
    with "lower_bound".
    """
    scale = max(size / height, size / width)

    def constrain(side: float) -> int:
        rounded = int(np.round(side / multiple)) * multiple
        return rounded if rounded >= size else int(np.ceil(side / multiple)) * multiple

    return constrain(scale * height), constrain(scale * width)


def fit_size(height: int, width: int, *, size: int, multiple: int, max_pixels: int) -> tuple[int, int]:
    """(h, w) of the official rule, or of the same shape within a budget where that has more than `max_pixels`.

    Beyond the budget both sides shrink by one factor and are rounded down to multiples; neither falls below one
    multiple, and then the other takes what the budget leaves: only for such strips the aspect ratio changes much.

    Raises:
        ValueError: the budget is smaller than one multiple squared.
    """
    if max_pixels < multiple**2:
        raise ValueError(f"a budget of {max_pixels} pixels is less than one patch of {multiple} x {multiple}")
    h, w = lower_bound_size(height, width, size=size, multiple=multiple)
    if h * w <= max_pixels:
        return h, w
    long_first = h > w
    short, long = sorted((h, w))
    factor = (max_pixels / (h * w)) ** 0.5
    short = max(int(short * factor) // multiple, 1) * multiple
    long = min(int(long * factor), max_pixels // short) // multiple * multiple
    return (long, short) if long_first else (short, long)


def resize_image(image: np.ndarray, size: tuple[int, int], *, antialias: bool) -> np.ndarray:
    """Image (H, W, 3) uint8 or floating -> (h, w, 3) of the same dtype.

    OpenCV's bicubic is the official rule (on a float image in [0, 1]; it may overshoot). It does
    not low-pass: `antialias` averages areas instead where no side grows.
    """
    h, w = size
    height, width = image.shape[:2]
    if (h, w) == (height, width):
        return image
    shrinks = h <= height and w <= width
    mode = cv2.INTER_AREA if antialias and shrinks else cv2.INTER_CUBIC
    return cv2.resize(image, (w, h), interpolation=mode)


def resize_label(
    disparity: np.ndarray, valid: np.ndarray, sky: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest neighbour for disparity float32, valid and sky bool, each (H, W) -> (h, w).

    All three take the same source pixel, the one that holds the new pixel's centre, so that no
    value is invented at an edge and the label stays on the image (cv2.INTER_NEAREST takes the pixel
    of the corner instead).
    """
    if size == disparity.shape:
        return disparity, valid, sky
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, disparity.shape, strict=True)
    )

    pick = np.ix_(rows, columns)
    return disparity[pick], valid[pick], sky[pick]


def crop_image(image: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The view (S, S, 3) of an image (H, W, 3), of the same dtype: only what is seen is resized, bicubic.

    The same as cutting a window out of the resized image, but that the window starts at a whole pixel of the image, and
    that two pixels beyond a cut are taken for copies of the last one, as they are beyond the image's own border.
    """
    square = image[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    if crop.flip and crop.side < size:  # whichever is smaller is flipped
        square = cv2.flip(square, 1)
    view = resize_image(square, (size, size), antialias=False)
    if crop.flip and crop.side >= size:
        view = cv2.flip(view, 1)
    return np.ascontiguousarray(view)


def crop_pixels(shape: tuple[int, ...], crop: Crop, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (S,) and columns (S,) of a label (h, w) that a view shows: the pixel under each new centre.

    The label has the image's field of view and any size. Stored labels and those made online are cut by this alone.
    """

    def under(old: int, whole: int, start: int) -> np.ndarray:
        return ((2 * np.arange(size) + 1) * crop.side + 2 * size * start) * old // (2 * size * whole)

    columns = under(shape[1], crop.width, crop.left)
    return under(shape[0], crop.height, crop.top), columns[::-1].copy() if crop.flip else columns


def network_input(image: np.ndarray, *, size: int, multiple: int, max_pixels: int) -> np.ndarray:
    """The whole image (H, W, 3) uint8 as a network wants it: (h, w, 3) float32, resized, ImageNet-normalised.

    Depth-Anything-V2, `depth_anything_v2/dpt.py` (`infer_image`) and `util/transform.py`.

    Raises:
        ValueError: the input would have more than `max_pixels`.
    """
    height, width = image.shape[:2]
    h, w = lower_bound_size(height, width, size=size, multiple=multiple)
    if h * w > max_pixels:
        raise ValueError(f"a {width} x {height} image becomes a {w} x {h} network input, above {max_pixels} pixels")
    return normalised(image, (h, w), antialias=False)


def normalised(image: np.ndarray, size: tuple[int, int], *, antialias: bool) -> np.ndarray:
    """The whole image (H, W, 3) uint8, resized and ImageNet-normalised: (h, w, 3) float32.

    Without `antialias` within 2e-6 of the official code, which divides by 255 first and computes in float64.
    """
    h, w = size
    with _without_ipp():
        pixels = resize_image(image.astype(np.float32), (h, w), antialias=antialias)
    rows = pixels.reshape(h, 3 * w)  # whole rows at a time: NumPy is slow on a last axis of 3
    rows -= np.tile(np.array(IMAGENET_MEAN, np.float32) * 255, w)
    rows /= np.tile(np.array(IMAGENET_STD, np.float32) * 255, w)
    return pixels


@contextmanager
def _without_ipp() -> Iterator[None]:
    """OpenCV's own kernels, in this thread: IPP's cubic one of float32 misses the float64 result by up to 2e-4."""
    used = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    try:
        yield
    finally:
        cv2.ipp.setUseIPP(used)
