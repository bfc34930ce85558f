"""KITTI in miniature: 256 steps to the metre, few pixels with depth, two sizes of image, and the lists in use."""

from pathlib import Path

import cv2
import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

DRIVES = ("2011_09_26_drive_0002_sync", "2011_10_03_drive_0047_sync")
SHAPES = ((18, 48), (17, 46))
FRAMES = (69, 75)  # the second of the first drive has no depth


def image_path(drive: str, camera: int, frame: int, suffix: str = "png") -> str:
    return f"{drive[:10]}/{drive}/image_0{camera}/data/{frame:010d}.{suffix}"


def label_path(drive: str, camera: int, frame: int) -> str:
    return f"{drive}/proj_depth/groundtruth/image_0{camera}/{frame:010d}.png"


def save_depth(path: Path, stored: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), stored.astype(np.uint16))


def write_kitti(root: Path, *, apart: bool = False) -> dict[str, Truth]:
    """Two drives, two cameras, two frames; one image is a JPEG, one has no depth.

    Args:
        root: of the tree.
        apart: raw data and annotated depth in folders of their own, the latter in train and val.
    """
    truths, number = {}, 0
    for drive, shape in zip(DRIVES, SHAPES, strict=True):
        raw, deep = (root / "raw_data", root / "data_depth_annotated" / "val") if apart else (root, root)
        for camera in (2, 3):
            for frame in FRAMES:
                depth = scene_depth(*shape, number=number, near=8.0)
                holes = np.ones(shape, bool)
                holes[shape[0] // 3 :: 2, ::3] = False  # sparse, and nothing in the top third
                depth[10, 0], holes[10, 0] = 1.0, False
                stored = np.where(holes | ~np.isfinite(depth), 0, np.rint(depth * 256))
                assert stored[10, 0] == 256  # a metre
                suffix = "jpg" if (drive, camera, frame) == (DRIVES[1], 3, FRAMES[1]) else "png"
                path = raw / image_path(drive, camera, frame, suffix)
                image = picture(*shape, number=number)
                save_picture(path, image)
                number += 1
                if (drive, frame) == (DRIVES[0], FRAMES[1]):
                    continue
                save_depth(deep / label_path(drive, camera, frame), stored)
                beside = deep / label_path(drive, camera, frame).replace("groundtruth", "velodyne_raw")
                save_depth(beside, np.where(stored > 0, 999, 0))
                truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
        save_picture(raw / drive[:10] / drive / "image_00" / "data" / f"{FRAMES[0]:010d}.png", image)
    return truths


def list_of_paths(prefix: str = "") -> str:
    """As in Depth Anything: image, depth or None, focal length; no newline at the end."""
    lines = []
    for drive in DRIVES:
        for frame in FRAMES:
            none = (drive, frame) == (DRIVES[0], FRAMES[1])
            label = "None" if none else f"{prefix}{label_path(drive, 2, frame)}"
            lines.append(f"{prefix}{image_path(drive, 2, frame)} {label} 721.5377")
    return "\n".join(lines)


def list_of_drives() -> str:
    """As in monodepth2: drive, number (padded in some lists), side."""
    lines = [f"{drive[:10]}/{drive} {frame} l" for drive in DRIVES for frame in FRAMES]
    return "\n".join([*lines, f"{DRIVES[0][:10]}/{DRIVES[0]} {FRAMES[0]:010d} r", ""])
