"""MegaDepth in miniature: depth of any scale, ordinal maps under the same key, outliers, grey and `.JPG` images."""

from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 24)
PREFIX = "phoenix/S6/zl548/MegaDepth_v1"


def h5(path: Path, values: np.ndarray, *, key: str = "depth") -> None:
    """One array, compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=values, compression="gzip")


def write_megadepth(root: Path, *, outliers: bool) -> dict[str, Truth]:
    """Two scenes, two reconstructions; one picture is grey, one `.JPG`, one PNG; 0 is no depth.

    Args:
        root: of the tree.
        outliers: put a depth 1000 times the median into each map; it is what a percentile has to take out.
    """
    truths, number = {}, 0
    for scene in ("0015", "0162"):
        for dense, suffix in (("dense0", ".jpg"), ("dense1", ".JPG" if scene == "0162" else ".png")):
            folder = root / PREFIX / scene / dense
            depth = scene_depth(*SHAPE, number=number, near=0.01 if number else 300.0)
            stored = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
            holes = np.zeros(SHAPE, bool)
            holes[6:9, 6:9] = True
            stored[holes] = 0
            if outliers:
                stored[7, 7] = 1000 * np.median(stored[stored > 0])
            image = picture(*SHAPE, number=number)
            path = folder / "imgs" / f"{number}_o{suffix}"
            if number == 0:
                image = image[..., :1].repeat(3, axis=2)
                path.parent.mkdir(parents=True)
                Image.fromarray(image[..., 0]).save(path, quality=97)
            else:
                save_picture(path, image)
            h5(folder / "depths" / f"{number}_o.h5", stored)
            truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
            number += 1
    return truths


def write_ordinal(root: Path) -> dict[str, str]:
    """Maps that hold no depth, with images; returns why each is left out, by label."""
    folder = root / PREFIX / "0162" / "dense0"
    classes = np.zeros(SHAPE, np.float32)
    classes[:6], classes[6:] = 1, 2
    negative = scene_depth(*SHAPE, number=0).clip(max=50).astype(np.float32)
    negative[0, 0] = -1
    maps = {
        "negative": (negative, "an ordinal map (values below 0), no depth"),
        "levels": (classes, "an ordinal map (fewer than 10 levels), no depth"),
        "nothing": (np.zeros(SHAPE, np.float32), "no depth in it"),
    }
    for name, (values, _) in maps.items():
        save_picture(folder / "imgs" / f"{name}.jpg", picture(*SHAPE, number=0))
        h5(folder / "depths" / f"{name}.h5", values)
    return {f"{PREFIX}/0162/dense0/depths/{name}.h5": reason for name, (_, reason) in maps.items()}
