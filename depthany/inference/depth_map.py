"""A predicted map that knows what it means, and its files.

Legend: H W pixels, N points.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PNG_KEY = "depthany"  # name of the PNG text chunk
PNG_MAX = 65535  # codes 1..65535 span the range, 0 is invalid


@dataclass(frozen=True)
class DepthMap:
    """A relative disparity: affine-invariant, so neither its scale nor its shift means anything.

    Depth needs a scale and a shift from outside: `fit_scale_shift`, then `to_depth`.
    """

    disparity: np.ndarray  # (H, W) float32, larger is nearer
    valid: np.ndarray  # (H, W) bool
    space: Literal["disparity"] = "disparity"
    near_is_large: Literal[True] = True

    def __post_init__(self) -> None:
        if self.disparity.ndim != 2 or self.disparity.shape != self.valid.shape:
            raise ValueError(
                f"a depth map is (H, W) with a mask of the same shape; "
                f"got {self.disparity.shape} and {self.valid.shape}"
            )

    def to_depth(self, scale: float, shift: float) -> np.ndarray:
        """Depth 1 / (scale * disparity + shift).

        Args:
            scale: In 1/m per unit of the map.
            shift: In 1/m.

        Returns:
            (H, W) float32 in metres; inf where the aligned disparity is not positive, NaN where
            the map is invalid.
        """
        aligned = scale * self.disparity.astype(np.float64) + shift
        far = ~(aligned > 0)
        depth_m = np.where(far, np.inf, 1.0 / np.where(far, 1.0, aligned))
        return np.where(self.valid, depth_m, np.nan).astype(np.float32)

    def fit_scale_shift(self, points: np.ndarray, depths_m: np.ndarray) -> tuple[float, float]:
        """Least squares of scale * disparity + shift against 1 / depth.

        Args:
            points: (N, 2) row and column in pixels, N >= 2; rounded to the nearest pixel.
            depths_m: (N,) known depths in metres, positive.

        Returns:
            Scale and shift for `to_depth`. A negative scale: the points contradict the map.

        Raises:
            ValueError: Too few points, points outside the map or on invalid pixels, depths that
                are not positive, or one disparity at all points.
        """
        points, depths_m = np.asarray(points), np.asarray(depths_m, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != 2 or depths_m.shape != points.shape[:1]:
            raise ValueError(
                f"points must be (N, 2) row and column, depths_m (N,); got {points.shape} and {depths_m.shape}"
            )
        if len(points) < 2:
            raise ValueError("scale and shift need at least 2 points")
        if not (np.isfinite(depths_m) & (depths_m > 0)).all():
            raise ValueError("depths_m must be positive and finite")
        rows, columns = np.rint(points).astype(int).T
        height, width = self.disparity.shape
        if not ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)).all():
            raise ValueError(f"points must be (row, column) inside the {height} x {width} map")
        if not self.valid[rows, columns].all():
            raise ValueError("a point lies on an invalid pixel of the map; leave it out")
        disparity = self.disparity[rows, columns].astype(np.float64)
        if np.ptp(disparity) == 0:
            raise ValueError("the map has one value at all points; give points at other depths")
        design = np.stack([disparity, np.ones_like(disparity)], axis=1)
        scale, shift = np.linalg.lstsq(design, 1.0 / depths_m, rcond=None)[0]
        return float(scale), float(shift)

    def value_range(self) -> tuple[float, float]:
        """Smallest and largest valid disparity; (0, 0) without a valid pixel."""
        if not self.valid.any():
            return 0.0, 0.0
        return float(self.disparity[self.valid].min()), float(self.disparity[self.valid].max())

    def save(self, path: Path) -> tuple[float, float]:
        """Writes the map beside `path` and moves it into place; the suffix chooses the format.

        `.npy`: float32, NaN where invalid. `.npz`: `disparity`, `valid`, `space`,
        `near_is_large`. `.png`: 16 bit, 0 where invalid, otherwise
        disparity = low + (code - 1) / 65534 * (high - low), with low and high in the text chunk
        `depthany` (JSON); `load_png16` reads it back.

        Returns:
            The range of the map: smallest and largest valid disparity.

        Raises:
            ValueError: Another suffix.
        """
        writers = {".npy": self._write_npy, ".npz": self._write_npz, ".png": self._write_png16}
        if path.suffix not in writers:
            raise ValueError(f"{path}: a map is saved as {', '.join(writers)}")
        _write_atomically(path, writers[path.suffix])
        return self.value_range()

    def _write_npy(self, file: BinaryIO) -> None:
        np.save(file, np.where(self.valid, self.disparity, np.nan).astype(np.float32))

    def _write_npz(self, file: BinaryIO) -> None:
        np.savez_compressed(
            file,
            disparity=self.disparity,
            valid=self.valid,
            space=np.array(self.space),
            near_is_large=np.array(self.near_is_large),
        )

    def _write_png16(self, file: BinaryIO) -> None:
        low, high = self.value_range()
        filled = np.where(self.valid, self.disparity, low).astype(np.float64)
        fraction = (filled - low) / (high - low if high > low else 1.0)
        codes = np.where(self.valid, 1 + np.rint(fraction * (PNG_MAX - 1)), 0).astype(np.uint16)
        meaning = {
            "space": self.space,
            "near_is_large": self.near_is_large,
            "low": low,
            "high": high,
            "invalid": 0,
        }
        text = PngInfo()
        text.add_text(PNG_KEY, json.dumps(meaning))
        Image.fromarray(codes).save(file, format="png", pnginfo=text)


def load_png16(path: Path) -> DepthMap:
    """Reads a map that `DepthMap.save` wrote as PNG; exact to (high - low) / 131068.

    Raises:
        ValueError: The file has no `depthany` text chunk, or is not a 16-bit disparity.
    """
    with Image.open(path) as image:
        codes, text = np.asarray(image), getattr(image, "text", {}).get(PNG_KEY)
    if text is None:
        raise ValueError(f"{path}: no text chunk {PNG_KEY!r}, so the range of the map is unknown")
    meaning = json.loads(text)
    if meaning["space"] != "disparity" or codes.ndim != 2:
        raise ValueError(f"{path}: not a 16-bit disparity map")
    valid = codes > 0
    fraction = (codes.astype(np.float64) - 1) / (PNG_MAX - 1)
    disparity = meaning["low"] + fraction * (meaning["high"] - meaning["low"])
    return DepthMap(np.where(valid, disparity, 0).astype(np.float32), valid)


def _write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            write(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
