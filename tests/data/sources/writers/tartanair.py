"""TartanAir in miniature: skies of different distances, a doubled folder, and the files of other modalities beside."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 24)


def _depth(number: int) -> tuple[np.ndarray, np.ndarray]:
    """The planar depth, inf where the sky is, and what is stored: the distance of the sky changes."""
    depth = scene_depth(*SHAPE, number=number, near=3.0)
    return depth, np.where(np.isfinite(depth), depth, (10_000, 2_600, 1_000)[number % 3])


def write_tartanair(root: Path) -> dict[str, Truth]:
    """Two environments, Easy and Hard; one unpacked into a doubled folder; and `amusement`."""
    truths, number = {}, 0
    for environment in ("hospital", "ocean/ocean", "amusement"):
        for level in ("Easy", "Hard"):
            folder = root / environment / level / "P003"
            depth, stored = _depth(number)
            holes = np.zeros(SHAPE, bool)
            holes[17, :3] = True
            stored[17, 0], stored[17, 1], stored[17, 2] = 0, np.nan, np.inf
            image = picture(*SHAPE, number=number)
            path = folder / "image_left" / "000000_left.png"
            save_picture(path, image)
            save_picture(folder / "image_right" / "000000_right.png", image)
            for part, array in {
                "depth_left/000000_left_depth": stored.astype(np.float32),
                "depth_right/000000_right_depth": stored.astype(np.float32),
                "seg_left/000000_left_seg": np.zeros(SHAPE, np.uint8),
                "flow/000000_000001_flow": np.zeros((*SHAPE, 2), np.float32),
            }.items():
                (folder / part).parent.mkdir(exist_ok=True)
                np.save(folder / f"{part}.npy", array)
            (folder / "pose_left.txt").write_text("0 0 0 0 0 0 1\n")
            (folder / "image_left" / "._000000_left.png").write_bytes(b"leavings of another system")
            if environment != "amusement":
                truths[str(path.relative_to(root))] = truth(depth, image, factor=80, sky=True, invalid=holes)
            number += 1
    return truths


def write_tartanair_v2(root: Path) -> dict[str, Truth]:
    """Two cameras; the bytes of a float32 are the blue, green, red and alpha of a PNG."""
    truths = {}
    for number, camera in enumerate(("lcam_front", "rcam_back")):
        folder = root / "ArchVizTinyHouseDay" / "Data_easy" / "P0000"
        depth, stored = _depth(number)
        image = picture(*SHAPE, number=number)
        path = folder / f"image_{camera}" / f"000000_{camera}.png"
        save_picture(path, image)
        blue_green_red_alpha = stored.astype("<f4").view(np.uint8).reshape(*SHAPE, 4)
        label = folder / f"depth_{camera}" / f"000000_{camera}_depth.png"
        label.parent.mkdir()
        Image.fromarray(blue_green_red_alpha[..., [2, 1, 0, 3]], "RGBA").save(label)
        truths[str(path.relative_to(root))] = truth(depth, image, factor=80, sky=True)
    return truths
