"""KITTI raw images with the depth of one laser scan: the Eigen protocol on all 697 frames."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal

import numpy as np

from depthany.data.labels import Label
from depthany.data.sources.kitti import DRIVE
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Row, as_label
from depthany.types import DepthKind

CALIBRATION = {"cameras": "calib_cam_to_cam.txt", "laser": "calib_velo_to_cam.txt"}  # in the folder of the date


class KittiRaw(Matched):
    """`<date>/<drive>/image_02/data/0000000005.png` with `<drive>/velodyne_points/data/0000000005.bin`.

    The points of one scan are projected into the left colour image, as nianticlabs/monodepth2 does
    (kitti_utils.py: generate_depth_map): the nearest one counts where several fall on a pixel, and all others have no
    depth. This is another ground truth than the annotated one of `kitti`; the two protocols must not be mixed.

    Args:
        name: of the source, the first part of every key.
        root: the folder of KITTI raw, with the folders of the dates.
        split: all; the splits in use are lists.
        files: a list of paths, or of drive, number and side, such as monodepth2's splits/eigen/test_files.txt: 697
            frames of the left camera; null: every frame with a scan.
        depth: camera is planar depth, along the axis of the camera; laser the forward coordinate of the scanner, which
            monodepth2 and what follows it take for depth (about 0.3 m more).
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "kitti_raw"
    layout: ClassVar[str] = (
        "<date>/<drive>/image_02/data/0000000005.png, <date>/<drive>/velodyne_points/data/0000000005.bin and "
        "<date>/calib_cam_to_cam.txt, calib_velo_to_cam.txt"
    )
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    parts: Mapping[str, str] = {
        "image": rf"{DRIVE}/image_02/data/(\d{{10}})\.(?:png|jpg)",
        "label": rf"{DRIVE}/velodyne_points/data/(\d{{10}})\.bin",
    }
    without: ClassVar[frozenset[str]] = frozenset({"image_00", "image_01", "image_03", "oxts", "proj_depth"})

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all"],
        files: str | None,
        depth: Literal["camera", "laser"],
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, files=files, index_root=index_root)
        self.options = {"depth": depth}

    def frame(self, columns: list[str]) -> str:
        """Of a path, or of drive, number and side."""
        if len(columns) == 3 and columns[2] == "l":
            columns = [f"{columns[0]}/image_02/data/{columns[1].zfill(10)}.png"]
        return super().frame(columns)

    def scan(self) -> Iterator[Row]:
        """Matches images and scans, and gives each the calibration of its date."""
        for row in super().scan():
            date = PurePosixPath(row.label).parents[3]
            files = {part: f"./{date / name}" for part, name in CALIBRATION.items()}
            missing = [path for path in files.values() if not (self.root / path).is_file()]
            if missing:
                self.skip(row.image, f"{missing[0].removeprefix('./')} is missing: fetch the calibration of the date")
            else:
                yield row._replace(extra=row.extra | files)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        data = self.content(row.label)
        if not data or len(data) % 16:
            raise self.damaged(row.label, f"{len(data)} bytes are no whole number of points of four float32")
        try:
            to_image = _to_image(*(_numbers(str(self.root / row.extra[part])) for part in CALIBRATION))
        except (KeyError, ValueError) as error:
            raise self.damaged(row.extra["cameras"], f"no calibration of KITTI ({error!r})") from error
        points = np.frombuffer(data, "<f4").reshape(-1, 4).astype(np.float64)
        values = project(points, to_image, image_shape, laser=self.options["depth"] == "laser")
        return as_label(values, kind=self.kind, factor=self.factor, invalid=[0])


def project(points: np.ndarray, to_image: np.ndarray, shape: tuple[int, int], *, laser: bool) -> np.ndarray:
    """The depth of a scan's points in an image.

    Args:
        points: (N, 4) forward, left, up in metres, and reflectance.
        to_image: (3, 4) from the scanner to (u * z, v * z, z), with the first pixel's centre at (1, 1), as in MATLAB.
        shape: height and width of the image.
        laser: the forward coordinate of the scanner instead of z.

    Returns:
        (h, w) float32 in metres, 0 where there is no point.
    """
    points = points[points[:, 0] >= 0]  # the others are behind the scanner
    u, v, z = to_image @ np.concatenate([points[:, :3], np.ones((len(points), 1))], axis=1).T
    seen = z > 0
    depth = (points[:, 0] if laser else z)[seen]
    columns, rows = (np.rint(x[seen] / z[seen]) - 1 for x in (u, v))
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1]) & (depth > 0)
    nearest = np.full(shape, np.inf, np.float32)
    np.minimum.at(nearest, (rows[inside].astype(int), columns[inside].astype(int)), depth[inside].astype(np.float32))
    return np.where(np.isfinite(nearest), nearest, np.float32(0))


@lru_cache(maxsize=64)
def _numbers(path: str) -> dict[str, np.ndarray]:
    """`name: numbers` of each line of a calibration file; lines with other words are left out."""
    found = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, words = line.partition(":")
        try:
            found[name] = np.array(words.split(), np.float64)
        except ValueError:
            continue
    return found


def _to_image(cameras: Mapping[str, np.ndarray], laser: Mapping[str, np.ndarray]) -> np.ndarray:
    """(3, 4) from the scanner to the left colour image: P_rect_02 R_rect_00 [R | T]."""
    rigid, upright = np.eye(4), np.eye(4)
    rigid[:3] = np.concatenate([laser["R"].reshape(3, 3), laser["T"].reshape(3, 1)], axis=1)
    upright[:3, :3] = cameras["R_rect_00"].reshape(3, 3)
    return cameras["P_rect_02"].reshape(3, 4) @ upright @ rigid
