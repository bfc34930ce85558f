"""Extracted DDAD in miniature: sparse metres in npy, 0 for none, in 32 and 64 bits."""

from pathlib import Path

import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 28)
NAMES = ("000000", "scene 150/15616458296936490", "scene 151/15616458296936490")


def write_ddad(root: Path) -> dict[str, Truth]:
    """Three frames, one directly under the root; two scenes share a name."""
    truths = {}
    for number, name in enumerate(NAMES):
        depth = scene_depth(*SHAPE, number=number, near=20.0)
        holes = np.ones(SHAPE, bool)
        holes[5::3, ::4] = False
        stored = np.where(holes | ~np.isfinite(depth), 0, depth)
        image = picture(*SHAPE, number=number)
        path = root / f"{name}_rgb.png"
        save_picture(path, image)
        np.save(root / f"{name}_depth.npy", stored.astype(np.float64 if number == 2 else np.float32))
        truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
    return truths
