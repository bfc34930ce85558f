"""Pictures of maps and tensors.

Legend: H W pixels. Pictures are uint8 RGB.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib import colormaps

from depthany.inference.depth_map import DepthMap

INVALID_GREY = 48
WHITE = 255


@cache
def color_table(cmap: str) -> np.ndarray:
    """Returns matplotlib's colour map `cmap` as (256, 3) uint8.

    Raises:
        ValueError: matplotlib has no such map.
    """
    if cmap not in colormaps:
        raise ValueError(f"no colour map {cmap!r}; matplotlib has, e.g., Spectral_r, gray, inferno")
    colors = colormaps[cmap].resampled(256)(np.arange(256))[:, :3]
    return np.floor(colors * 255 + 1e-6).astype(np.uint8)  # the margin keeps grey i at i


def colorize(
    values: np.ndarray,
    *,
    cmap: str = "Spectral_r",
    valid: np.ndarray | None = None,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """Colours a map between its minimum and maximum, as Depth-Anything-V2 `run.py` does.

    Args:
        values: (H, W) float, any range; what is not finite counts as invalid.
        cmap: Name of a matplotlib colour map.
        valid: (H, W) bool; other pixels become dark grey. None: all.
        low: The value of the first colour; None: the smallest valid value.
        high: The value of the last colour; None: the largest valid value.

    Returns:
        (H, W, 3) uint8. A constant map gets the first colour everywhere.
    """
    values = np.asarray(values, dtype=np.float32)
    known = np.isfinite(values) if valid is None else np.isfinite(values) & valid
    picture = np.full((*values.shape, 3), INVALID_GREY, dtype=np.uint8)
    if not known.any():
        return picture
    filled = np.where(known, values, values[known][0]).astype(np.float64)
    low = filled.min() if low is None else low
    high = filled.max() if high is None else high
    span = high - low if high > low else 1.0
    index = (((filled - low) / span).clip(0, 1) * 255).astype(np.uint8)
    return np.where(known[..., None], color_table(cmap)[index], picture)


def paint(
    depth: DepthMap, *, cmap: str = "Spectral_r", low: float | None = None, high: float | None = None
) -> np.ndarray:
    """Colours a map, (H, W, 3) uint8, with the last colour for what is nearest, whatever the map's `space`.

    Args:
        depth: The map.
        cmap: Name of a matplotlib colour map.
        low: The smallest value that is told apart; None: the smallest valid one.
        high: The largest value that is told apart; None: the largest valid one.
    """
    if not depth.near_is_large:
        cmap = cmap.removesuffix("_r") if cmap.endswith("_r") else f"{cmap}_r"
    return colorize(depth.values, cmap=cmap, valid=depth.valid, low=low, high=high)


def side_by_side(images: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """Joins pictures from left to right with white bars of `gap` pixels, tops aligned.

    Args:
        images: At least one picture, (H, W, 3) uint8; heights may differ, the rest is white.
        gap: Width of a bar in pixels, 0 or more.

    Returns:
        (largest H, sum of W and bars, 3) uint8.
    """
    height = max(image.shape[0] for image in images)
    width = sum(image.shape[1] for image in images) + gap * (len(images) - 1)
    canvas = np.full((height, width, 3), WHITE, dtype=np.uint8)
    left = 0
    for image in images:
        canvas[: image.shape[0], left : left + image.shape[1]] = image
        left += image.shape[1] + gap
    return canvas
