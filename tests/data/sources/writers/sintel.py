"""MPI Sintel in miniature: .dpt with its tag, two passes, a far sky, previews beside."""

import struct
from pathlib import Path

import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 42)
SCENES = ("alley_1", "market_2")
SKY = (8.0e4, 1.0e10)


def dpt(values: np.ndarray, *, tag: bytes = struct.pack("<f", 202021.25)) -> bytes:
    """Tag, width, height, rows from the top."""
    height, width = values.shape
    return tag + struct.pack("<ii", width, height) + struct.pack(f"<{values.size}f", *values.ravel().tolist())


def write_sintel(root: Path, *, apart: bool = False) -> dict[str, Truth]:
    """Two scenes, two frames from 0001, both passes.

    Args:
        root: of the tree.
        apart: in folders named like the archives.
    """
    images = root / "MPI-Sintel-training_images" if apart else root
    depths = root / "MPI-Sintel-depth-training-20150305" if apart else root
    truths, number = {}, 0
    for scene in SCENES:
        for frame in (1, 2):
            depth = scene_depth(*SHAPE, number=number, near=2.0)
            label = depths / "training" / "depth" / scene / f"frame_{frame:04d}.dpt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_bytes(dpt(np.where(np.isfinite(depth), depth, SKY[number % 2])))
            for shade, part in enumerate(("clean", "final")):
                image = picture(*SHAPE, number=number + 4 * shade)
                path = images / "training" / part / scene / f"frame_{frame:04d}.png"
                save_picture(path, image)
                truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=True)
            save_picture(depths / "training" / "depth_viz" / scene / f"frame_{frame:04d}.png", image)
            camera = depths / "training" / "camdata_left" / scene / f"frame_{frame:04d}.cam"
            camera.parent.mkdir(parents=True, exist_ok=True)
            camera.write_bytes(struct.pack("<f21d", 202021.25, *range(21)))
            number += 1
    return truths
