"""ETH3D in miniature: raw floats called .JPG, mostly inf, a turned photograph, undistorted images beside."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (24, 36)
SCENES = {"courtyard": ("DSC_0286", "DSC_0287"), "relief": ("DSC_0427",)}
TURNED = "DSC_0287"


def write_eth3d(root: Path, *, marigold: bool = False) -> dict[str, Truth]:
    """Two scenes; the JPEG of one frame says that it has to be turned by 90 degrees, its depth lies as the pixels do.

    Args:
        root: of the tree.
        marigold: in its folders rgb and depth/<scene>_dslr_depth, instead of together.
    """
    truths, number = {}, 0
    for scene, frames in SCENES.items():
        colour, deep = (root / "rgb", root / "depth" / f"{scene}_dslr_depth") if marigold else (root, root)
        for frame in frames:
            depth = scene_depth(*SHAPE, number=number, near=4.0)
            holes = np.ones(SHAPE, bool)
            holes[::2, ::2] = False
            stored = np.where(holes, np.inf, depth)
            assert np.isinf(stored).mean() > 0.5
            image = picture(*SHAPE, number=number)
            path = colour / scene / "images" / "dslr_images" / f"{frame}.JPG"
            save_picture(path, image)
            label = deep / scene / "ground_truth_depth" / "dslr_images" / f"{frame}.JPG"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_bytes(stored.astype("<f4").tobytes())
            save_picture(colour / scene / "images" / "dslr_images_undistorted" / f"{frame}.JPG", 255 - image)
            if frame == TURNED:
                exif = Image.Exif()
                exif[0x0112] = 6  # the top of the picture is at the right of the stored pixels: turn it clockwise
                Image.fromarray(image).save(path, quality=97, exif=exif)
                image, depth, holes = (np.rot90(array, -1) for array in (image, depth, holes))
            truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
            number += 1
    return truths
