"""Hypersim in its original files."""

import csv
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import h5py
import numpy as np
import torch
from torch import Tensor

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.geometry.cameras import ray_norms
from depthany.types import DepthKind, Quantity

CAMERAS = "metadata_camera_parameters.csv"
SPLITS = "metadata_images_split_scene_v1.csv"
FILE = re.compile(
    r"(?:.*/)?(?P<scene>ai_\d{3}_\d{3})/images/scene_(?P<camera>cam_\d\d)_(?P<folder>final_preview|final_hdf5|geometry_hdf5)/"
    r"frame\.(?P<frame>\d{4})\.(?P<part>tonemap\.jpg|color\.hdf5|depth_meters\.hdf5|render_entity_id\.hdf5)"
)
IMAGES = {"tonemap": "tonemap.jpg", "hdr": "color.hdf5"}


class Hypersim(Raw):
    """`ai_001_001/images/scene_cam_00_final_preview/frame.0000.tonemap.jpg` with its `depth_meters.hdf5`.

    In spite of its name the label is the distance along the ray, in metres (float16, NaN where there is no geometry).
    It becomes planar depth, along the axis of the camera, by the rays of the scene's own camera: many scenes were
    rendered with a shifted or tilted image plane, and the standard focal length is up to 18 % wrong there.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the scenes.
        split: all, or the official split, which needs `metadata`.
        image: tonemap is the preview that comes with the set, hdr the linear colour, tone-mapped as the authors do it.
        metadata: folder with metadata_camera_parameters.csv and metadata_images_split_scene_v1.csv of
            apple/ml-hypersim; null gives every scene the standard camera (886.81 px), as in Depth Anything.
        exclude: what to leave out, such as ai_026_008, ai_004_009/cam_01 or ai_006_001/cam_00/0053.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "hypersim"
    layout: ClassVar[str] = (
        "ai_001_001/images/scene_cam_00_final_preview/frame.0000.tonemap.jpg and "
        "ai_001_001/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5"
    )
    splits: ClassVar[tuple[str, ...]] = ("all", "train", "val", "test")
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all", "train", "val", "test"],
        image: Literal["tonemap", "hdr"],
        metadata: str | None,
        exclude: Sequence[str],
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)
        if metadata is None and split != "all":
            raise ValueError(f"source {name}: split={split} needs {SPLITS}: set `metadata` to its folder, or split=all")
        self.metadata = None if metadata is None else Path(metadata)
        self.options = {"image": image, "exclude": sorted(exclude)}

    def check(self) -> None:
        """Also the metadata."""
        super().check()
        for file in (self.metadata / CAMERAS, self.metadata / SPLITS) if self.metadata else ():
            if not file.is_file():
                raise ValueError(
                    f"source {self.name}: {file} is missing: copy it from apple/ml-hypersim, or set metadata=null"
                )

    def contents(self) -> dict[str, Any]:
        """The metadata."""
        files = (self.metadata / CAMERAS, self.metadata / SPLITS) if self.metadata else ()
        return {"metadata": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()}

    def scan(self) -> Iterator[Row]:
        """Matches image and label by scene, camera and frame, and gives each its camera."""
        found: dict[str, dict[str, str]] = {part: {} for part in (*IMAGES.values(), "depth_meters.hdf5")}
        found["render_entity_id.hdf5"] = {}
        for folder, names in self.walk(without={"_detail"}):
            for match in filter(None, (FILE.fullmatch(f"{folder}/{name}") for name in names)):
                found[match["part"]]["{scene}/{camera}/{frame}".format(**match.groupdict())] = match[0]
        cameras, splits = self._cameras(), self._splits()
        image_part = IMAGES[self.options["image"]]
        for frame, image, label in self.pairs(found[image_part], found["depth_meters.hdf5"]):
            scene = frame.partition("/")[0]
            reason, split = splits.get(frame, ("", None))
            excluded = [name for name in self.options["exclude"] if f"{frame}/".startswith(f"{name}/")]
            extra: dict[str, Any] = {"scene": scene, "frame": frame.replace("/", " "), "camera": cameras.get(scene)}
            if self.options["image"] == "hdr":
                extra["entities"] = found["render_entity_id.hdf5"].get(frame)
            if excluded or reason:
                self.skip(image, f"{excluded[0]} is in `exclude`" if excluded else reason)
            elif extra.get("entities", "") is None:
                self.skip(image, "the tone map needs its render_entity_id.hdf5")
            elif self.split in ("all", split):
                yield Row(image, image, label, extra)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / planar metres."""
        values = self.values(row.label, key="dataset")
        if values.dtype.kind != "f":
            raise self.damaged(row.label, f"it holds {values.dtype}, wanted float16")
        matrix = row.extra["camera"]
        rays = scene_rays(tuple(matrix), *values.shape) if matrix else standard_rays(*values.shape)
        return as_label(values, kind=self.kind, quantity=Quantity.DISTANCE, factor=self.factor, invalid=[0], rays=rays)

    def image(self, row: Row) -> np.ndarray:
        """The preview, or the tone-mapped colour."""
        if self.options["image"] == "tonemap":
            return self.picture(row.image)
        colour, entities = self._array(row.image), self._array(row.extra["entities"])
        if colour.ndim != 3 or colour.shape[2] != 3 or entities.shape != colour.shape[:2]:
            raise self.damaged(row.image, f"colour {colour.shape} and render_entity_id {entities.shape} do not fit")
        return tone_map(colour, entities != -1)

    def data(self, index: int) -> bytes:
        """The preview's bytes; empty for HDR colour."""
        return self.content(self.row(index).image) if self.options["image"] == "tonemap" else b""

    def _array(self, path: str) -> np.ndarray:
        try:
            with h5py.File(self.root / path, "r", locking=False) as file:
                return np.asarray(file["dataset"])
        except (OSError, KeyError) as err:  # what h5py raises on damaged files
            raise self.damaged(path, f"damaged or not HDF5: {err}") from err

    def _cameras(self) -> dict[str, list[float]]:
        """The matrix from (u, v, 1) to the camera's ray, row by row, by scene."""
        if self.metadata is None:
            return {}
        names = [f"M_cam_from_uv_{i}{j}" for i in range(3) for j in range(3)]
        with open(self.metadata / CAMERAS, newline="", encoding="utf-8") as file:
            return {row["scene_name"]: [float(row[name]) for name in names] for row in csv.DictReader(file)}

    def _splits(self) -> dict[str, tuple[str, str]]:
        """Why a frame is not in the public release, or nothing, and its split; by scene/camera/frame."""
        if self.metadata is None:
            return {}
        with open(self.metadata / SPLITS, newline="", encoding="utf-8") as file:
            return {
                f"{row['scene_name']}/{row['camera_name']}/{int(row['frame_id']):04d}": (
                    "" if row["included_in_public_release"] == "True" else row["exclude_reason"].lower(),
                    row["split_partition_name"],
                )
                for row in csv.DictReader(file)
            }


@lru_cache(maxsize=8)
def standard_rays(height: int, width: int) -> Tensor:
    """(height, width) ray lengths at depth 1 of the standard camera: 60 degrees wide, 886.81 px at 1024 px."""
    return ray_norms(height, width, width / 2 / math.tan(math.pi / 6), width / 2, height / 2)


@lru_cache(maxsize=8)
def scene_rays(matrix: tuple[float, ...], height: int, width: int) -> Tensor:
    """(height, width) ray lengths at depth 1, along the camera's axis -z, of a scene's own camera.

    The ray of a pixel is matrix @ (u, v, 1), with u from -1 on the left to 1 on the right and v from 1 at the top to -1
    at the bottom, at pixel centres (apple/ml-hypersim, contrib/mikeroberts3000/jupyter/01_casting_rays….ipynb).

    Args:
        matrix: M_cam_from_uv, row by row.
        height: of the label in pixels.
        width: of the label in pixels.
    """
    u = (torch.arange(width, dtype=torch.float64) + 0.5) / width * 2 - 1
    v = 1 - (torch.arange(height, dtype=torch.float64) + 0.5) / height * 2
    v, u = torch.meshgrid(v, u, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], dim=-1) @ torch.tensor(matrix, dtype=torch.float64).view(3, 3).T
    return (rays.norm(dim=-1) / -rays[..., 2]).float()


def tone_map(colour: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Linear HDR colour to a picture, as apple/ml-hypersim's scene_generate_images_tonemap.py does.

    Args:
        colour: (h, w, 3) linear, unbounded.
        valid: (h, w) bool: the pixels that set the exposure.

    Returns:
        (h, w, 3) uint8: the 90th percentile of the brightness becomes 0.8.
    """
    colour = np.nan_to_num(colour.astype(np.float32), nan=0.0)
    brightness = (colour @ np.array([0.3, 0.59, 0.11], np.float32))[valid]
    current = np.percentile(brightness, 90) if brightness.size else 0.8**2.2
    scale = 0.8**2.2 / current if current >= 1e-4 else 0.0
    return np.rint(np.clip(scale * colour, 0, 1) ** (1 / 2.2) * 255).astype(np.uint8)
