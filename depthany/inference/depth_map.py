"""A predicted map that knows what it means.

Legend: H W pixels, N points.
"""

from dataclasses import dataclass
from math import radians, tan
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from depthany.inference.map_files import read_map, write_map
from depthany.inference.point_cloud import PointCloud

Space = Literal["disparity", "depth", "metric"]


@dataclass(frozen=True)
class DepthMap:
    """Values with their meaning.

    `space` disparity: affine-invariant disparity, larger is nearer; neither its scale nor its shift means anything.
    depth: affine-invariant depth, larger is farther. metric: depth along the optical axis in metres. Relative maps
    become metric by a scale and a shift from outside: `fit_scale_shift`, then `to_depth`.
    """

    values: np.ndarray  # (H, W) float32
    valid: np.ndarray  # (H, W) bool
    space: Space = "disparity"
    confidence: np.ndarray | None = None  # (H, W) float32 in [0, 1], larger is surer; None: not asked for

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape != self.valid.shape:
            raise ValueError(
                f"a depth map is (H, W) with a mask of the same shape; got {self.values.shape} and {self.valid.shape}"
            )
        if self.confidence is not None and self.confidence.shape != self.values.shape:
            raise ValueError(f"the confidence is {self.confidence.shape}, the map {self.values.shape}")
        if self.space not in get_args(Space):
            raise ValueError(f"space is {', '.join(get_args(Space))}, not {self.space!r}")

    def __repr__(self) -> str:
        low, high = self.value_range()
        height, width = self.values.shape
        return f"DepthMap({height} x {width}, {self.space}, {low:.4g} to {high:.4g}, {self.valid.mean():.1%} valid)"

    @property
    def near_is_large(self) -> bool:
        """Whether larger values are nearer."""
        return self.space == "disparity"

    @property
    def disparity(self) -> np.ndarray:
        """(H, W) float32, larger is nearer: the values of a disparity map, 1 / metres of a metric one.

        Raises:
            ValueError: The map is affine-invariant depth, whose inverse means nothing without scale and shift.
        """
        if self.space == "disparity":
            return self.values
        if self.space == "metric":
            return (1.0 / np.maximum(self.values, np.float32(1e-6))).astype(np.float32)
        raise ValueError("an affine-invariant depth has no disparity: fit_scale_shift, then to_depth")

    def to_depth(self, scale: float | None = None, shift: float | None = None) -> np.ndarray:
        """Depth in metres: 1 / (scale * disparity + shift), or scale * depth + shift.

        Args:
            scale: In 1/m (of a disparity) or m (of a depth) per unit of the map. A metric map needs none.
            shift: In 1/m or m.

        Returns:
            (H, W) float32; NaN where the map is invalid. Where the aligned value is not positive: inf of a disparity,
            NaN of a depth.

        Raises:
            ValueError: A relative map without scale and shift.
        """
        if scale is None or shift is None:
            if self.space != "metric":
                raise ValueError(f"a relative {self.space} needs scale and shift; fit_scale_shift finds them")
            scale, shift = 1.0 if scale is None else scale, 0.0 if shift is None else shift
        aligned = scale * self.values.astype(np.float64) + shift
        behind = ~(aligned > 0)
        if self.near_is_large:
            depth_m = np.where(behind, np.inf, 1.0 / np.where(behind, 1.0, aligned))
        else:
            depth_m = np.where(behind, np.nan, aligned)
        return np.where(self.valid, depth_m, np.nan).astype(np.float32)

    def fit_scale_shift(self, points: np.ndarray, depths_m: np.ndarray) -> tuple[float, float]:
        """Least squares of scale * values + shift against 1 / depth, or against depth where the map is one.

        Args:
            points: (N, 2) row and column in pixels, N >= 2; rounded to the nearest pixel.
            depths_m: (N,) known depths in metres, positive.

        Returns:
            Scale and shift for `to_depth`; the scale is positive.

        Raises:
            ValueError: Too few points, points outside the map or on invalid pixels, depths that
                are not positive, one value at all points, or points that contradict the map.
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
        height, width = self.values.shape
        if not ((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)).all():
            raise ValueError(f"points must be (row, column) inside the {height} x {width} map")
        if not self.valid[rows, columns].all():
            raise ValueError("a point lies on an invalid pixel of the map; leave it out")
        values = self.values[rows, columns].astype(np.float64)
        if np.ptp(values) == 0:
            raise ValueError("the map has one value at all points; give points at other depths")
        design = np.stack([values, np.ones_like(values)], axis=1)
        target = 1.0 / depths_m if self.near_is_large else depths_m
        scale, shift = np.linalg.lstsq(design, target, rcond=None)[0]
        if scale <= 0:
            raise ValueError(
                "the points contradict the map: where it says near, they are far; are they (row, column), in metres?"
            )
        return float(scale), float(shift)

    def to_point_cloud(
        self,
        *,
        focal_px: float | None = None,
        fov_deg: float | None = None,
        scale: float | None = None,
        shift: float | None = None,
        colors: np.ndarray | None = None,
    ) -> PointCloud:
        """The pixels of finite depth as points of a pinhole camera that looks at the centre of the map.

        Args:
            focal_px: Focal length in pixels of the map.
            fov_deg: Or the horizontal field of view in degrees.
            scale: As in `to_depth`.
            shift: As in `to_depth`.
            colors: (H, W, 3) uint8 RGB, the photo; None: points without colour.

        Raises:
            ValueError: Not exactly one of focal_px and fov_deg, or out of range; a photo of another size; as in
                `to_depth`.
        """
        height, width = self.values.shape
        if (focal_px is None) == (fov_deg is None):
            raise ValueError("give either focal_px (pixels) or fov_deg (horizontal, degrees)")
        if fov_deg is not None:
            if not 0 < fov_deg < 180:
                raise ValueError(f"fov_deg={fov_deg}: a field of view lies between 0 and 180 degrees")
            focal_px = width / 2 / tan(radians(fov_deg) / 2)
        if focal_px is None or not focal_px > 0:
            raise ValueError(f"focal_px={focal_px}: give the focal length in pixels, above 0")
        if colors is not None and (colors.shape != (height, width, 3) or colors.dtype != np.uint8):
            raise ValueError(
                f"colors are {tuple(colors.shape)} {colors.dtype}, the map is {self.values.shape}: give its photo, "
                "(H, W, 3) uint8"
            )
        depth_m = self.to_depth(scale, shift)
        rows, columns = np.nonzero(np.isfinite(depth_m))
        z = depth_m[rows, columns].astype(np.float64)
        x, y = (columns + 0.5 - width / 2) * z / focal_px, (rows + 0.5 - height / 2) * z / focal_px
        points = np.stack([x, y, z], axis=1).astype(np.float32)
        return PointCloud(points, None if colors is None else colors[rows, columns])

    def value_range(self) -> tuple[float, float]:
        """Smallest and largest valid value; (0, 0) without a valid pixel."""
        if not self.valid.any():
            return 0.0, 0.0
        return float(self.values[self.valid].min()), float(self.values[self.valid].max())

    def save(self, path: Path | str) -> tuple[float, float]:
        """Writes the map beside `path` and moves it into place; the suffix chooses the format, see `write_map`.

        Invalid pixels are NaN, in a 16-bit PNG 0. `load_map` reads all of them back; the confidence is kept in an npz.

        Returns:
            The range of the map: smallest and largest valid value.

        Raises:
            ValueError: Another suffix than npy, npz, png, exr, pfm and tiff.
        """
        values = np.where(self.valid, self.values, np.float32(np.nan)).astype(np.float32)
        more = {} if self.confidence is None else {"confidence": self.confidence.astype(np.float32)}
        write_map(Path(path), values, {"space": self.space, "near_is_large": self.near_is_large}, more)
        return self.value_range()


def load_map(path: Path | str, *, space: Space = "disparity") -> DepthMap:
    """Reads a map that `DepthMap.save` wrote: exact, but for PNG, which is exact to (high - low) / 131068.

    Args:
        path: With the suffix it was saved with.
        space: What the values of an npy or PFM are; the other formats say it themselves.

    Raises:
        ValueError: Not such a file; it is named.
    """
    values, meaning, more = read_map(Path(path))
    valid = ~np.isnan(values)
    values = np.where(valid, values, np.float32(0))
    try:
        return DepthMap(values, valid, meaning.get("space", space), more.get("confidence"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
