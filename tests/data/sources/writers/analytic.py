"""A scene whose depth is known in closed form, and the comparison of a reader with it.

A tilted floor, a wall and a sphere. Writers encode what this gives; readers must give it back.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from depthany.types import DepthKind, DepthSample, Skip

FOCAL = 0.9  # in widths of the image


class Truth(NamedTuple):
    """What a reader must return for one sample."""

    disparity: np.ndarray  # (h, w) float64, of the reader's factor; what it holds where invalid or sky does not count
    valid: np.ndarray  # (h, w) bool
    sky: np.ndarray  # (h, w) bool
    image: np.ndarray  # (H, W, 3) uint8


def scene_depth(height: int, width: int, *, number: int, near: float = 1.0) -> np.ndarray:
    """Planar depth (h, w) float64, unlike itself when flipped; inf above the wall, in the corner on the right.

    Args:
        height: in pixels.
        width: in pixels.
        number: of the frame: the sphere moves.
        near: roughly the distance of the nearest point; the scene scales with it.
    """
    x = ((np.arange(width) + 0.5) / width - 0.5) / FOCAL
    y = ((np.arange(height) + 0.5) - height / 2) / width / FOCAL
    x, y = np.meshgrid(x, y)
    depth = np.where(y > 0.02 + 0.1 * x, 1.5 / np.maximum(y + 0.05 * x, 1e-3), np.inf)  # a floor that leans
    wall = 9.0 / (1 - 0.4 * x)
    depth = np.minimum(depth, np.where(y > -0.1 + 0.3 * x, wall, np.inf))
    centre, radius = np.array([0.5 - 0.12 * number, -0.05, 2.5]), 0.5
    b = x * centre[0] + y * centre[1] + centre[2]
    a = x**2 + y**2 + 1
    root = b**2 - a * (centre @ centre - radius**2)
    sphere = (b - np.sqrt(np.maximum(root, 0))) / a
    return near / 2 * np.where(root > 0, np.minimum(sphere, depth), depth)


def picture(height: int, width: int, *, number: int) -> np.ndarray:
    """(H, W, 3) uint8: a smooth one that JPEG keeps, of another colour for every number, alike in no corner."""
    rows, columns = np.meshgrid(np.linspace(0, 90, height), np.linspace(0, 70, width), indexing="ij")
    return np.stack([40 + rows, 50 + columns, np.full_like(rows, 20 + 25 * (number % 9))], axis=-1).astype(np.uint8)


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """PNG or JPEG by the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 97} if path.suffix.lower() in (".jpg", ".jpeg") else {}))


def truth(
    depth: np.ndarray, image: np.ndarray, *, factor: float, sky: bool, invalid: np.ndarray | None = None
) -> Truth:
    """Of a planar depth.

    Args:
        depth: (h, w) planar, inf where there is nothing.
        image: of the sample.
        factor: disparity = factor / depth.
        sky: whether inf is sky in this dataset; else it is no measurement.
        invalid: (h, w) bool, further pixels without a measurement.
    """
    finite = np.isfinite(depth)
    invalid = np.zeros_like(finite) if invalid is None else invalid
    with np.errstate(divide="ignore", invalid="ignore"):
        disparity = np.where(finite & (depth > 0), factor / depth, 0)
    return Truth(disparity, (finite | sky) & ~invalid, ~finite & sky & ~invalid, image)


class Reader(Protocol):
    """What is compared."""

    @property
    def skipped(self) -> Sequence[Skip]: ...
    def __len__(self) -> int: ...
    def row(self, index: int) -> Any: ...
    def key(self, index: int) -> str: ...
    def read(self, index: int) -> DepthSample: ...


def assert_reads(
    source: Reader,
    truths: Mapping[str, Truth],
    *,
    kind: DepthKind,
    rtol: float = 1e-6,
    depth_step: float = 0.0,
    disparity_step: float = 0.0,
    factor: float = 1.0,
) -> None:
    """Every sample is there, once, and every pixel of it is the analytic one.

    Args:
        source: the reader.
        truths: by path of the image.
        kind: of every sample.
        rtol: largest relative error.
        depth_step: the depth of one step of an integer encoding: half of it is allowed.
        disparity_step: likewise, of a disparity.
        factor: of the disparity.
    """
    found = {source.row(i).image: i for i in range(len(source))}
    assert found.keys() == truths.keys()
    assert len({source.key(i) for i in range(len(source))}) == len(truths)
    for path, expected in truths.items():
        sample = source.read(found[path])
        assert sample["kind"] == kind and sample["key"] == source.key(found[path])
        assert sample["image"].dtype == np.uint8 and sample["image"].shape == expected.image.shape, path
        assert np.abs(sample["image"].astype(int) - expected.image).max() <= 8, path
        assert sample["disparity"].dtype == np.float32
        np.testing.assert_array_equal(sample["valid"], expected.valid, err_msg=path)
        np.testing.assert_array_equal(sample["sky"], expected.sky, err_msg=path)
        measured = expected.valid & ~expected.sky
        assert not sample["disparity"][~measured].any()
        got, wanted = sample["disparity"].astype(np.float64)[measured], expected.disparity[measured]
        error = np.abs(got - wanted)
        if depth_step:
            error, wanted = np.abs(factor / got - factor / wanted), factor / wanted
        worst = (error - (depth_step + disparity_step) / 2 - rtol * wanted).max()
        assert worst <= 0, f"{path}: {worst} above the tolerance"


def reasons(source: Reader) -> dict[str, str]:
    """What was left out, and why."""
    return {skip.key: skip.reason for skip in source.skipped}
