"""iBims-1 in miniature: 65535 steps to 50 m, and two masks, in 1 bit and in 8."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 24)
NAMES = ("corridor_01", "livingroom_07")


def write_ibims(root: Path) -> dict[str, Truth]:
    """Two images; the masks of the first have one bit, those of the second hold 0 and 1 in eight."""
    base, truths = root / "ibims1_core_raw", {}
    for number, name in enumerate(NAMES):
        depth = scene_depth(*SHAPE, number=number, near=1.1)
        stored = np.rint(np.where(np.isfinite(depth), depth, 0) * 65535 / 50)
        stored[16, 4], depth[16, 4] = 65535, 50.0  # the farthest value is one
        masks = {"mask_invalid": np.ones(SHAPE, bool), "mask_transp": np.ones(SHAPE, bool)}
        masks["mask_invalid"][10:12, 2:9] = masks["mask_transp"][11:14, 6:12] = False
        image = picture(*SHAPE, number=number)
        path = base / "rgb" / f"{name}.png"
        save_picture(path, image)
        (base / "depth").mkdir(exist_ok=True)
        assert cv2.imwrite(str(base / "depth" / f"{name}.png"), stored.astype(np.uint16))
        for part, mask in masks.items():
            (base / part).mkdir(exist_ok=True)
            Image.fromarray(mask if number == 0 else mask.astype(np.uint8)).save(base / part / f"{name}.png")
        holes = ~(masks["mask_invalid"] & masks["mask_transp"])
        truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
    (base / "imagelist.txt").write_text("\n".join(NAMES))
    return truths
