"""BlendedMVS in miniature: PFM bottom-up, big-endian once, an empty map, masked images and half pairs."""

import struct
from pathlib import Path

import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SCENES = ("000000000000000000000000", "5b7a3890fc8fcf6781e2593a")  # the second is one of the validation scenes
SHAPE = (18, 24)


def pfm(values: np.ndarray, *, big_endian: bool = False, scale: float = 1.0) -> bytes:
    """float32, rows bottom-up; the sign of the scale is the byte order."""
    height, width = values.shape
    header = f"Pf\n{width} {height}\n{scale if big_endian else -scale}\n".encode()
    numbers = values[::-1].astype(np.float64).ravel()
    return header + struct.pack(f"{'>' if big_endian else '<'}{numbers.size}f", *numbers)


def write_blendedmvs(root: Path) -> dict[str, Truth]:
    """Two scenes of two frames each, the second wrapped in a folder of its own name; returns the truth by image."""
    truths = {}
    for number, scene in enumerate(SCENES):
        folder = root / scene if number == 0 else root / scene / scene
        for frame in range(2):
            depth = scene_depth(*SHAPE, number=2 * number + frame, near=0.25 if number else 40.0)
            stored = np.where(np.isfinite(depth), depth, 0)
            holes = np.zeros(SHAPE, bool)
            holes[3, 2:5] = True
            stored[3, 2], stored[3, 3], stored[3, 4] = 0, np.nan, -1
            image = picture(*SHAPE, number=2 * number + frame)
            path = folder / "blended_images" / f"{frame:08d}.jpg"
            save_picture(path, image)
            save_picture(
                path.with_name(f"{frame:08d}_masked.jpg"), np.where(holes[..., None], 0, image).astype(np.uint8)
            )
            label = folder / "rendered_depth_maps" / f"{frame:08d}.pfm"
            label.parent.mkdir(parents=True, exist_ok=True)
            # The magnitude of the scale says nothing in this set.
            label.write_bytes(pfm(stored, big_endian=bool(frame), scale=2.0 if frame else 1.0))
            truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
        cams = folder / "cams"
        cams.mkdir()
        (cams / "00000000_cam.txt").write_text("extrinsic\n1 0 0 0\n\nintrinsic\n1 0 0\n\n0.1 0.01 128 9\n")
        (cams / "pair.txt").write_text("2\n")
    return truths


def write_traps(root: Path) -> None:
    """An image without depth, a depth without image, and what only looks like a scene."""
    scene = root / SCENES[0]
    save_picture(scene / "blended_images" / "00000007.jpg", picture(*SHAPE, number=0))
    (scene / "rendered_depth_maps" / "00000008.pfm").write_bytes(pfm(np.ones(SHAPE)))
    save_picture(root / "not_a_scene" / "blended_images" / "00000000.jpg", picture(*SHAPE, number=0))
