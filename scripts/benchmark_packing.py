"""What packing a labelled set costs and gives, as ratios within one run: to a plain copy, and to reading the originals.

    python scripts/benchmark_packing.py [SAMPLES OF EACH KIND] [FOLDER WITH index.csv]

Each kind is written in the encoding of a dataset, with rendered scenes of rich texture: Hypersim (JPEG and HDF5 of
half-float distances), IRS (PNG and EXR), Virtual KITTI 2 (JPEG and 16-bit PNG); a folder of one's own is read through
`dataset=index_csv`. Processor time on one core with every
library's threads set to one and the files in memory; a disk that is slower than that decides instead.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import OpenEXR
import torch
from omegaconf import OmegaConf

from depthany.config.build import build
from depthany.config.launch import config_dir
from depthany.data.scenes import Scene, render
from depthany.data.sources.hypersim import standard_rays
from depthany.data.sources.packed import Shards
from depthany.data.truth_packing import TruthPacking

SCENES, SIDE, ROUNDS = 6, 1280, 3


def hypersim(root: Path, number: int, image: np.ndarray, depth: np.ndarray) -> None:
    """1024x768; no geometry is NaN."""
    base = root / "ai_001_001/images"
    picture = base / f"scene_cam_00_final_preview/frame.{number:04d}.tonemap.jpg"
    label = base / f"scene_cam_00_geometry_hdf5/frame.{number:04d}.depth_meters.hdf5"
    save(picture, image, cv2.IMWRITE_JPEG_QUALITY, 95)
    label.parent.mkdir(parents=True, exist_ok=True)
    distance = np.where(depth > 6e4, np.nan, depth * standard_rays(*depth.shape).numpy())
    with h5py.File(label, "w") as file:
        file.create_dataset("dataset", data=distance.astype(np.float16), compression="gzip")


def irs(root: Path, number: int, image: np.ndarray, depth: np.ndarray) -> None:
    """960x540; pixels of disparity."""
    base = root / "Home/Room"
    save(base / f"l_{number:05d}.png", image)
    header = {"type": OpenEXR.scanlineimage, "compression": OpenEXR.ZIP_COMPRESSION}
    OpenEXR.File(header, {"G": (48 / depth).astype(np.float32)}).write(str(base / f"d_{number:05d}.exr"))


def vkitti2(root: Path, number: int, image: np.ndarray, depth: np.ndarray) -> None:
    """1242x375; centimetres, 65535 is sky."""
    base = root / "Scene01/clone/frames"
    save(base / f"rgb/Camera_0/rgb_{number:05d}.jpg", image, cv2.IMWRITE_JPEG_QUALITY, 95)
    path = base / f"depth/Camera_0/depth_{number:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.minimum(np.rint(depth * 100), 65535).astype(np.uint16))


KINDS: dict[str, tuple[Callable[..., None], tuple[int, int]]] = {
    "hypersim": (hypersim, (768, 1024)),
    "irs": (irs, (540, 960)),
    "vkitti2": (vkitti2, (375, 1242)),
}


def save(path: Path, image: np.ndarray, *options: int) -> None:
    """Writes a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1], options)


def write(root: Path, kind: str, scenes: list[Scene], count: int) -> None:
    """A set of `count` samples, cut from the scenes at different places.

    A relief of half a percent follows the texture: labels that are smoother than real ones would be unusually small.
    """
    writer, (height, width) = KINDS[kind]
    rng = np.random.default_rng(0)
    for number in range(count):
        scene = scenes[number % len(scenes)]
        top, left = rng.integers(0, SIDE - height + 1), rng.integers(0, SIDE - width + 1)
        window = np.s_[top : top + height, left : left + width]
        image = scene.image[window]
        writer(root, number, image, scene.depth[window] * (1 + 0.005 * image.mean(axis=-1) / 255))


def cost(work: Callable[[], object]) -> float:
    """Processor time in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def copy_flat(files: Iterable[Path], folder: Path) -> None:
    """A plain copy."""
    folder.mkdir()
    for number, file in enumerate(files):
        shutil.copyfile(file, folder / str(number))


def measure(folder: Path, kind: str, root: Path) -> None:
    """Prints the rows of one kind."""
    config = OmegaConf.load(config_dir() / "dataset" / f"{kind}.yaml")
    reader: Any = build(OmegaConf.merge({"root": str(root), "dataset": config}).dataset)
    reader.prepare()
    count, files = len(reader), {root / path for i in range(len(reader)) for path in reader.row(i).files}
    copies = [folder / f"copy{i}" for i in range(ROUNDS)]
    copying = min(cost(lambda copy=copy: copy_flat(files, copy)) for copy in copies)  # type: ignore[misc]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"{kind}: {count} samples of {megabytes / count:.2f} MB; a copy runs at {megabytes / copying:,.0f} MB/s")
    readers = {"raw": reader}
    for pictures in ("keep", "fast"):
        out = folder / f"{kind}-{pictures}"
        options: dict[str, Any] = {"samples_per_shard": count, "pictures": pictures, "workers": 1}
        packing = megabytes / cost(TruthPacking(source=reader, out=out, **options).run)
        shards = Shards(name=kind, root=str(out))
        shards.prepare()
        shards.open()
        readers[pictures] = shards
        print(
            f"  pictures={pictures}: packing {packing:4.0f} MB/s, {packing * copying / megabytes:5.3f} of the copy's; "
            f"size {sum(file.stat().st_size for file in out.iterdir()) / 1e6 / megabytes:.2f} of the originals'"
        )
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(ROUNDS):  # in turn, so that a busy machine is busy for all
        for name, source in readers.items():
            times[name] += [cost(lambda i=i, source=source: source.read(i)) for i in range(count)]  # type: ignore[misc]
    for name, seconds in times.items():
        ratio = np.median(times["raw"]) / np.median(seconds)
        print(f"  reading {name:<5}{1e3 * np.median(seconds):6.2f} ms a sample, {ratio:5.2f} times as fast as raw")


def main() -> None:
    """Prints the table."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    OpenEXR.set_global_thread_count(0)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    scenes = [render(style="b", seed=0, index=index, size=SIDE) for index in range(SCENES)]
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:
            write(Path(name) / kind, kind, scenes, count)
            measure(Path(name), kind, Path(name) / kind)
            for folder in Path(name).iterdir():
                shutil.rmtree(folder)
        if len(sys.argv) > 2:
            measure(Path(name), "index_csv", Path(sys.argv[2]))


if __name__ == "__main__":
    main()
