"""KITTI raw in miniature: images, laser scans as float32 points, and the calibration of each date."""

from pathlib import Path

import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth
from tests.data.sources.writers.kitti import DRIVES, FRAMES, SHAPES, image_path

TURN = np.array([[0.01, -0.99995, 0.0], [0.0, 0.0, -1.0], [0.99995, 0.01, 0.0]])  # laser (forward, left, up) to camera
SHIFT = np.array([-0.02, -0.07, -0.33])
UPRIGHT = np.array([[0.9999, 0.01, 0.0], [-0.01, 0.9999, 0.0], [0.0, 0.0, 1.0]])


def camera(shape: tuple[int, int]) -> np.ndarray:
    focal = 0.9 * shape[1]
    return np.array([[focal, 0, shape[1] / 2, 4.4], [0, focal, shape[0] / 2, 0.2], [0, 0, 1, 0.003]])


def calibration(shape: tuple[int, int]) -> tuple[str, str]:
    """calib_cam_to_cam.txt and calib_velo_to_cam.txt of a date."""

    def line(name: str, values: np.ndarray) -> str:
        return f"{name}: {' '.join(f'{value:.16e}' for value in values.ravel())}\n"

    cameras = "calib_time: 09-Jan-2012 13:57:47\n" + line("R_rect_00", UPRIGHT) + line("P_rect_02", camera(shape))
    return cameras, "calib_time: 15-Mar-2012 11:37:16\n" + line("R", TURN) + line("T", SHIFT)


def to_points(depth: np.ndarray) -> np.ndarray:
    """(N, 3) points in front of the laser whose pixels, counted from 1, have this planar depth; NaN has none."""
    rows, columns = np.nonzero(np.isfinite(depth))
    z = depth[rows, columns]
    rigid = np.concatenate([UPRIGHT @ TURN, (UPRIGHT @ SHIFT)[:, None]], axis=1)
    projection = camera(depth.shape) @ np.concatenate([rigid, [[0, 0, 0, 1]]])
    seen = np.stack([(columns + 1) * z, (rows + 1) * z, z]) - projection[:, 3:]
    return np.linalg.solve(projection[:, :3], seen).T


def write_kitti_raw(root: Path) -> dict[str, Truth]:
    """Two drives of two dates with two frames each; the second frame of the first drive has no scan.

    Every scan also holds points that do not count: behind the scanner, outside the image, and behind nearer ones.
    """
    truths, number = {}, 0
    for drive, shape in zip(DRIVES, SHAPES, strict=True):
        for name, text in zip(("calib_cam_to_cam.txt", "calib_velo_to_cam.txt"), calibration(shape), strict=True):
            (root / drive[:10]).mkdir(parents=True, exist_ok=True)
            (root / drive[:10] / name).write_text(text)
        for frame in FRAMES:
            depth = scene_depth(*shape, number=number, near=8.0)
            holes = np.ones(shape, bool)
            holes[shape[0] // 3 :: 2, ::3] = False
            holes |= ~np.isfinite(depth)
            image = picture(*shape, number=number)
            path = image_path(drive, 2, frame)
            save_picture(root / path, image)
            number += 1
            if (drive, frame) == (DRIVES[0], FRAMES[1]):
                continue
            measured = to_points(np.where(holes, np.nan, depth))
            behind = to_points(np.where(holes, np.nan, depth + 9.0))[::2]
            others = np.array([[-9.0, 0.1, 0.2], [5.0, 60.0, 0.0], [5.0, 0.0, 30.0]])
            points = np.concatenate([behind, measured, others])
            scan = root / drive[:10] / drive / "velodyne_points" / "data" / f"{frame:010d}.bin"
            scan.parent.mkdir(parents=True, exist_ok=True)
            np.concatenate([points, np.full((len(points), 1), 0.3)], axis=1).astype("<f4").tofile(scan)
            truths[path] = truth(depth, image, factor=1, sky=False, invalid=holes)
    return truths
