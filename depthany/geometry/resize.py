"""Sizes and resampling of images and labels before they are tensors (numpy and OpenCV).

Legend: H W pixels before, h w after. Pixel centres lie at half integers, for images and labels
alike.
"""

import cv2
import numpy as np


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
