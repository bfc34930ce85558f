"""DIML in miniature: millimetres in 16 bits, scenes with blanks and dots, labels of changing suffix and smaller."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 24)
CONFIDENCES = (0, 128, 200, 255)  # of the quarters of a map, from the left


def _save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def _sample(number: int, *, far: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Depth in metres, what is stored, the holes, and the picture, which is twice as large."""
    depth = scene_depth(*SHAPE, number=number, near=far)
    stored = np.rint(np.where(np.isfinite(depth), depth, 0) * 1000)
    holes = np.zeros(SHAPE, bool)
    holes[3, 3:5] = True
    stored[3, 3], stored[3, 4] = 65501, 65535
    return depth, stored.astype(np.uint16), holes, picture(36, 48, number=number)


def write_diml_indoor(root: Path, *, sample: bool = False) -> dict[str, Truth]:
    """Two scenes, two frames each; the second frame's name begins like the first's.

    Args:
        root: of the tree.
        sample: the layout of the sample release, not that of the full one.
    """
    truths, number = {}, 0
    for scene, ending in (("16. Billiard Hall", "ud"), ("1. Bedroom", "depth_filled")):
        base = root / "HR" / scene if sample else root / "indoor" / scene / "20170101" / "batch 1"
        colour, label = ("color", "depth_filled") if sample else ("col", "up_png")
        for frame in ("in_k_01", "in_k_01_b"):
            depth, stored, holes, image = _sample(number, far=0.7)
            path = base / colour / f"{frame}_c.png"
            save_picture(path, image)
            _save(base / label / f"{frame}_{'depth_filled' if sample else ending}.png", stored)
            truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
            number += 1
    return truths


def write_diml_outdoor(root: Path, *, min_confidence: float, sample: bool = False) -> dict[str, Truth]:
    """Two drives of one frame; the confidence rises from left to right.

    Args:
        root: of the tree.
        min_confidence: above which a pixel counts.
        sample: the layout of the sample release, not that of the full one.
    """
    confidence = np.repeat(CONFIDENCES, SHAPE[1] // 4)[None].repeat(SHAPE[0], axis=0).astype(np.uint8)
    truths = {}
    for number, drive in enumerate(["HR"] if sample else ["170721_C0", "160628_A1"]):
        base = root / drive if sample else root / "outdoor" / drive / "0001"
        depth, stored, holes, image = _sample(number, far=5.0)
        parts = ("outleft", "depthmap", "confidencemap") if sample else ("left", "depth", "conf")
        names = ["7.png"] * 3 if sample else [f"7_{part}.png" for part in parts]
        path, label, conf = (base / part / name for part, name in zip(parts, names, strict=True))
        save_picture(path, image)
        _save(label, stored)
        _save(conf, confidence)
        if not sample:
            save_picture(base / "right" / "7_right.png", image)
        holes |= confidence / 255 <= min_confidence
        truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
    return truths
