"""ScanNet in miniature: millimetres, colour larger than depth, numbers padded and not."""

from pathlib import Path

import cv2
import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE, IMAGE = (12, 16), (24, 32)
FRAMES = {"scene0406_02": ("000000", "000300"), "scene0088_02": ("1100",)}


def write_scannet(root: Path) -> dict[str, Truth]:
    """Two scenes; the authors' exporter does not pad the numbers, as in the second."""
    truths, number = {}, 0
    for scene, frames in FRAMES.items():
        for frame in frames:
            depth = scene_depth(*SHAPE, number=number, near=0.8)
            holes = np.zeros(SHAPE, bool)
            holes[8, :5] = True
            stored = np.where(holes | ~np.isfinite(depth), 0, np.rint(depth * 1000))
            image = picture(*IMAGE, number=number)
            path = root / scene / "color" / f"{frame}.jpg"
            save_picture(path, image)
            label = root / scene / "depth" / f"{frame}.png"
            label.parent.mkdir(exist_ok=True)
            assert cv2.imwrite(str(label), stored.astype(np.uint16))
            (root / scene / "pose").mkdir(exist_ok=True)
            (root / scene / "pose" / f"{frame}.txt").write_text("1 0 0 0\n")
            truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
            number += 1
    return truths


def list_of_paths() -> str:
    """As in Marigold, padded."""
    frames = [("scene0406_02", "000300"), ("scene0088_02", "001100")]
    return "".join(f"{scene}/color/{n}.jpg {scene}/depth/{n}.png\n" for scene, n in frames)
