"""HRWSI in miniature: a relative disparity with a mask, 0 being legal, and names of free text."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth

SHAPE = (18, 24)
STEMS = {"train": "102684_LookInStereoDotComDSCF0486", "val": "7 a.b c"}


def write_hrwsi(root: Path) -> dict[str, Truth]:
    """One image in each folder; the stored disparity runs from 0 to 255, or to 65535 in val."""
    truths = {}
    for number, (split, stem) in enumerate(STEMS.items()):
        disparity = 1 / scene_depth(*SHAPE, number=number)  # the sky is 0, the farthest
        dtype = np.uint8 if split == "train" else np.uint16
        stored = disparity / disparity.max() * np.iinfo(dtype).max
        mask = np.ones(SHAPE, bool)
        mask[5:8, 2:9] = False
        image = picture(36, 48, number=number)  # twice the size of the label
        path = root / split / "imgs" / f"{stem}.jpg"
        save_picture(path, image)
        for folder, values in (("gts", np.rint(stored).astype(dtype)), ("valid_masks", mask.astype(np.uint8) * 255)):
            (root / split / folder).mkdir()
            Image.fromarray(values).save(root / split / folder / f"{stem}.png")
        truths[str(path.relative_to(root))] = Truth(stored, mask, np.zeros(SHAPE, bool), image)
    return truths


def write_traps(root: Path) -> None:
    """An image without disparity, and one without mask."""
    for stem in ("alone", "unmasked"):
        save_picture(root / "train" / "imgs" / f"{stem}.jpg", picture(*SHAPE, number=0))
    save_picture(root / "train" / "gts" / "unmasked.png", picture(*SHAPE, number=0)[..., 0])
