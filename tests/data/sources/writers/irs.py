"""IRS in miniature: disparity in the channel G of an EXR, normals and right views beside it."""

from pathlib import Path

import numpy as np
import OpenEXR

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth

SHAPE = (18, 24)
FRAMES = ("00001", "00002", "321")  # padded as in today's lists, and as in older ones


def exr(path: Path, **channels: np.ndarray) -> None:
    """One-channel planes under their names; float16 is stored as half."""
    OpenEXR.File({"type": OpenEXR.scanlineimage}, {name: plane for name, plane in channels.items()}).write(str(path))


def write_irs(root: Path, *, dtype: type = np.float32) -> dict[str, Truth]:
    """One scene of three frames; a disparity of 0 is infinitely far, inf and NaN are no measurement."""
    folder = root / "Home" / "RoyalRoom"
    folder.mkdir(parents=True)
    truths = {}
    for number, frame in enumerate(FRAMES):
        disparity = 48 / scene_depth(*SHAPE, number=number, near=5.0)
        holes = np.zeros(SHAPE, bool)
        holes[9, 3:5] = True
        stored = disparity.copy()
        stored[9, 3], stored[9, 4] = np.inf, np.nan
        image = picture(*SHAPE, number=number)
        alpha = np.full((*SHAPE, 1), 0 if number else 255, np.uint8)  # some pictures carry one: it says nothing
        path = folder / f"l_{frame}.png"
        save_picture(path, np.concatenate([image, alpha], axis=2) if number else image)
        save_picture(folder / f"r_{frame}.png", image[:, ::-1])
        exr(folder / f"d_{frame}.exr", G=stored.astype(dtype))
        exr(folder / f"n_{frame}.exr", **{name: np.full(SHAPE, 0.5, np.float32) for name in "RGB"})
        sky = (disparity == 0) & ~holes
        truths[str(path.relative_to(root))] = Truth(disparity, ~holes, sky, image)
    return truths


def write_lists(root: Path) -> None:
    """As in HKBU-HPML/IRS: left, right, disparity, normals; the prefix is not that of the folder."""
    (root / "lists").mkdir()
    for split, frames in (("train", FRAMES[:2]), ("test", FRAMES[2:])):
        lines = [
            "IRSDataset/home/RoyalRoom/"
            + " IRSDataset/home/RoyalRoom/".join(
                f"{kind}_{frame}.{suffix}" for kind, suffix in (("l", "png"), ("r", "png"), ("d", "exr"), ("n", "exr"))
            )
            for frame in frames
        ]
        (root / "lists" / f"irs_{split}.list").write_text("\n".join(lines))
