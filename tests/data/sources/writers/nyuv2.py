"""NYU Depth v2 in miniature: exported frames in millimetres, and the labelled file with MATLAB's reversed axes."""

import struct
import zlib
from pathlib import Path

import cv2
import h5py
import numpy as np

from tests.data.sources.writers.analytic import Truth, picture, save_picture, scene_depth, truth

SHAPE = (18, 24)
SCENES = {"bathroom": (45, 507), "study_room": (272,)}
COUNT = 4
SPLITS = {"train": (1, 3), "test": (2, 4)}  # from 1, as in MATLAB


def _depth(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth in metres, what the sensor stores (0 where it sees nothing), and where that is."""
    depth = scene_depth(*SHAPE, number=number, near=0.7)
    holes = ~np.isfinite(depth)
    holes[5:7, :] = True
    return depth, np.where(holes, 0, depth), holes


def write_nyuv2(root: Path) -> dict[str, Truth]:
    """Two scenes, three frames."""
    truths, number = {}, 0
    for scene, frames in SCENES.items():
        for frame in frames:
            depth, stored, holes = _depth(number)
            image = picture(*SHAPE, number=number)
            path = root / scene / f"rgb_{frame:05d}.jpg"
            save_picture(path, image)
            assert cv2.imwrite(str(root / scene / f"sync_depth_{frame:05d}.png"), np.rint(stored * 1000).astype("u2"))
            truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False, invalid=holes)
            number += 1
    return truths


def list_of_paths() -> str:
    """As in Depth Anything's train list: a slash before the paths; one frame of each scene."""
    names = [(scene, frames[0]) for scene, frames in SCENES.items()]
    return "\n".join(f"/{scene}/rgb_{n:05d}.jpg /{scene}/sync_depth_{n:05d}.png 518.8579" for scene, n in names)


def write_labelled(root: Path, *, depth: str) -> dict[str, Truth]:
    """The labelled file; returns the truth by number.

    Args:
        root: of the tree.
        depth: raw or filled, which the truth is of.
    """
    images, raw, filled, truths = [], [], [], {}
    for number in range(COUNT):
        scene, stored, holes = _depth(number)
        whole = np.where(holes, 3.5 + number, scene)
        image = picture(*SHAPE, number=number)
        images.append(image.transpose(2, 1, 0))
        raw.append(stored.T.astype(np.float32))
        filled.append(whole.T.astype(np.float32))
        told = (scene, holes) if depth == "raw" else (whole, None)
        truths[f"{number + 1:04d}"] = truth(told[0], image, factor=1, sky=False, invalid=told[1])
    path = root / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w", userblock_size=512) as file:  # MATLAB's own header stands before the HDF5 part
        for name, array in {"images": images, "rawDepths": raw, "depths": filled}.items():
            file.create_dataset(name, data=np.stack(array), chunks=(1, *np.shape(array)[1:]), compression="gzip")
    with open(path, "r+b") as handle:
        handle.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM")
    return truths


def write_splits(root: Path, *, compressed: bool = True, order: str = "<") -> None:
    """splits.mat of version 5: columns of numbers from 1, in the fewest bytes, as MATLAB stores them."""
    arrays = b""
    for name, numbers in SPLITS.items():
        array = mat5_array(f"{name}Ndxs", np.array(numbers), order=order)
        zipped = zlib.compress(array)
        arrays += struct.pack(f"{order}II", 15, len(zipped)) + zipped if compressed else array
    header = b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124)
    (root / "splits.mat").write_bytes(header + struct.pack(f"{order}H", 0x0100) + (b"IM", b"MI")[order == ">"] + arrays)


def mat5_array(name: str, numbers: np.ndarray, *, order: str) -> bytes:
    """A double column whose values are stored as uint8 (type 2) in the small form where they fit it."""

    def element(kind: int, content: bytes) -> bytes:
        if len(content) <= 4:
            return struct.pack(f"{order}I", len(content) << 16 | kind) + content.ljust(4, b"\0")
        return struct.pack(f"{order}II", kind, len(content)) + content + b"\0" * (-len(content) % 8)

    parts = element(6, struct.pack(f"{order}II", 6, 0))  # class double
    parts += element(5, struct.pack(f"{order}ii", numbers.size, 1))
    parts += element(1, name.encode()) + element(2, numbers.astype(np.uint8).tobytes())
    return element(14, parts)
