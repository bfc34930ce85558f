"""Points in space and their file.

Legend: N points.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class PointCloud:
    """Points in the camera's axes: x right, y down, z forward, in metres."""

    points: np.ndarray  # (N, 3) float32
    colors: np.ndarray | None = None  # (N, 3) uint8 RGB

    def __len__(self) -> int:
        return len(self.points)

    def save_ply(self, path: Path | str) -> None:
        """Writes binary little-endian PLY beside `path` and moves it into place."""
        path = Path(path)
        layout = [(axis, "<f4") for axis in "xyz"]
        properties = [f"property float {axis}" for axis in "xyz"]
        if self.colors is not None:
            layout += [(name, "u1") for name in ("red", "green", "blue")]
            properties += [f"property uchar {name}" for name in ("red", "green", "blue")]
        rows = np.empty(len(self), dtype=layout)
        columns = [*self.points.T, *(() if self.colors is None else self.colors.T)]
        for (name, _), column in zip(layout, columns, strict=True):
            rows[name] = column
        header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(self)}", *properties, "end_header\n"]
        beside = path.with_name(f".{path.name}.part")
        try:
            beside.write_bytes("\n".join(header).encode() + rows.tobytes())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
