"""Hypersim in miniature: half-float distances along the ray, standard and tilted cameras, NaN, HDR colour."""

import csv
from pathlib import Path

import h5py
import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 24)
STANDARD = [0.5773502886, 0, 0, 0, 0.4330127165, 0, 0, 0, -1]  # M_cam_from_uv of most scenes
TILTED = [0.59211003, 0, -0.0355266, 0, 0.44294548, 0.3543565, 0, 0.03175839, -1.02556463]  # of ai_021_002
SCENES = {"ai_001_001": STANDARD, "ai_021_002": TILTED, "ai_099_001": None}  # the last is not in the CSV file
CAMERAS = ("cam_00", "cam_01")


def ray_lengths(matrix: list[float] | None, height: int, width: int) -> np.ndarray:
    """Length of each pixel's ray at depth 1, pixel by pixel, by the definition of the authors' notebook."""
    rows = np.reshape(STANDARD if matrix is None else matrix, (3, 3))
    lengths = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            u, v = -1 + (2 * j + 1) / width, 1 - (2 * i + 1) / height
            ray = [row[0] * u + row[1] * v + row[2] for row in rows]
            lengths[i, j] = sum(part**2 for part in ray) ** 0.5 / -ray[2]
    return lengths


def h5(path: Path, values: np.ndarray) -> None:
    """The one array of a file of the set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset", data=values, compression="gzip")


def write_hypersim(root: Path, *, own_cameras: bool = True, exposure: float | None = None) -> dict[str, Truth]:
    """Three scenes, two cameras, two frames each.

    Args:
        root: of the tree.
        own_cameras: render with the cameras of SCENES; else all with the standard one.
        exposure: write HDR colour, this many times the picture, and return its paths instead of the preview's.
    """
    truths, number = {}, 0
    for scene, matrix in SCENES.items():
        for camera in CAMERAS:
            for frame in (0, 53):
                depth = scene_depth(*SHAPE, number=number)
                distance = depth * ray_lengths(matrix if own_cameras else None, *SHAPE)
                stored = np.where(np.isfinite(distance), distance, np.nan).astype(np.float16)
                image = picture(*SHAPE, number=number)
                base = root / scene / "images" / f"scene_{camera}"
                geometry = base.with_name(f"{base.name}_geometry_hdf5") / f"frame.{frame:04d}"
                preview = base.with_name(f"{base.name}_final_preview") / f"frame.{frame:04d}"
                path = preview.with_name(f"{preview.name}.tonemap.jpg")
                save_picture(path, image)
                save_picture(preview.with_name(f"{preview.name}.color.jpg"), 255 - image)
                h5(geometry.with_name(f"{geometry.name}.depth_meters.hdf5"), stored)
                h5(geometry.with_name(f"{geometry.name}.render_entity_id.hdf5"), np.ones(SHAPE, np.int16))
                if exposure:
                    path = base.with_name(f"{base.name}_final_hdf5") / f"frame.{frame:04d}.color.hdf5"
                    linear = (image / 255) ** 2.2
                    h5(path, (exposure * linear).astype(np.float16))
                    bright = np.percentile(linear @ [0.3, 0.59, 0.11], 90)
                    image = np.rint(255 * np.clip(linear * 0.8**2.2 / bright, 0, 1) ** (1 / 2.2)).astype(np.uint8)
                truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False)
                number += 1
    return truths


def write_metadata(folder: Path) -> None:
    """The two tables of the repository, in its columns, with one frame that was never published."""
    folder.mkdir()
    entries = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
    with open(folder / "metadata_camera_parameters.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scene_name", "settings_output_img_height", "camera_physical_fov", *entries])
        writer.writerows([scene, 768.0, "", *matrix] for scene, matrix in SCENES.items() if matrix)
    with open(folder / "metadata_images_split_scene_v1.csv", "w", newline="") as file:
        writer = csv.writer(file)
        columns = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"
        writer.writerow(columns.split(","))
        for scene, split in zip(SCENES, ("train", "val", "test"), strict=True):
            for camera in CAMERAS:
                for frame in (0, 53):
                    public = (scene, camera, frame) != ("ai_021_002", "cam_01", 53)
                    reason = "" if public else "CONTENT FLAGGED FOR REMOVAL"
                    writer.writerow([scene, camera, frame, public, reason, split if public else ""])
