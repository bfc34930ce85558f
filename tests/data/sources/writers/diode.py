"""DIODE in miniature: a trailing axis, float masks, a depth of 0 where the mask is 1."""

from pathlib import Path

import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 24)
STEMS = {
    "val/indoors/scene_00019/scan_00183": "00019_00183_indoors_000_010",
    "val/outdoor/scene_00022/scan_00193": "00022_00193_outdoor_000_010",
    "train/outdoor/scene_00000/scan_00003": "00000_00003_outdoor_200_020",
}


def write_diode(root: Path) -> dict[str, Truth]:
    """One image of each place in val, and one in train."""
    truths = {}
    for number, (folder, stem) in enumerate(STEMS.items()):
        depth = scene_depth(*SHAPE, number=number, near=0.9 if "indoors" in folder else 7.0)
        mask = np.isfinite(depth)  # the sky is masked out
        mask[12:14, 3:9] = False
        stored = np.where(mask, depth, 17.0)  # a value where there is no measurement
        stored[15, 2] = 0  # and none where the mask claims one
        image = picture(*SHAPE, number=number)
        path = root / folder / f"{stem}.png"
        save_picture(path, image)
        np.save(path.with_name(f"{stem}_depth.npy"), stored[..., None].astype(np.float32))
        np.save(path.with_name(f"{stem}_depth_mask.npy"), mask.astype(np.float64))
        holes = ~mask
        holes[15, 2] = True
        truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
    return truths
