"""Virtual KITTI 2 in miniature: 16-bit centimetres, 65535 for the sky, two scenes, variants and cameras."""

from pathlib import Path

import cv2
import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 48)


def write_vkitti2(root: Path, *, apart: bool = False) -> dict[str, Truth]:
    """Two scenes, two variants, two cameras, one frame each.

    Args:
        root: of the tree.
        apart: images and depth in folders named like the archives, instead of together.
    """
    truths, number = {}, 0
    for scene in ("Scene01", "Scene20"):
        for variant in ("15-deg-left", "fog"):
            for camera in (0, 1):
                depth = scene_depth(*SHAPE, number=number, near=8.0)
                stored = np.where(np.isfinite(depth), np.rint(depth * 100), 65535)
                depth[12, 0], depth[12, 1] = 80.0, 80.01  # neighbours that 8 bits would merge
                stored[12, 0], stored[12, 1] = 8000, 8001
                image = picture(*SHAPE, number=number)
                frames = Path(scene, variant, "frames")
                rgb, deep = ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth") if apart else (".", ".")
                path = root / rgb / frames / "rgb" / f"Camera_{camera}" / "rgb_00007.jpg"
                save_picture(path, image)
                label = root / deep / frames / "depth" / f"Camera_{camera}" / "depth_00007.png"
                label.parent.mkdir(parents=True)
                assert cv2.imwrite(str(label), stored.astype(np.uint16))
                truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=True)
                number += 1
            (root / scene / variant).mkdir(parents=True, exist_ok=True)
            (root / scene / variant / "intrinsic.txt").write_text("frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]\n")
    return truths
