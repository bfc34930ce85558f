"""How fast `prepare` packs, as ratios within one run: against decoding the same images, and planning without images.

    python scripts/benchmark_prepare.py [FOLDER OF PHOTOS]

Processor time on one core; a disk that is slower than that decides instead.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from depthany.data.files import read_image
from depthany.data.packing import Packing
from depthany.data.plan import Plan
from depthany.data.sources.tree import ImageTree

IMAGES, PLANNED = 2000, 1_000_000


def photos(folder: Path, given: Path | None) -> list[Path]:
    """IMAGES different files: given photos, or smooth noise, with a number behind each."""
    files = sorted(given.rglob("*.jpg")) if given else []
    pictures = [file.read_bytes() for file in files[:200]]
    rng = np.random.default_rng(0)
    while len(pictures) < 50:
        image = cv2.resize(rng.integers(0, 256, (48, 64, 3), np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
        pictures.append(cv2.imencode(".jpg", image)[1].tobytes())
    for number in range(IMAGES):
        path = folder / f"{number // 100:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pictures[number % len(pictures)] + number.to_bytes(4, "big"))
    return sorted(folder.rglob("*.jpg"))


def cost(work: Callable[[], object]) -> float:
    """Processor time in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def packing(root: Path, out: Path, max_side: int | None) -> Packing:
    """The job of `unlabelled=folder workers=1`."""
    source = ImageTree(name="set", root=str(root), patterns=["*"], example="", frame_step_s=None, quality=95)
    options = {"samples_per_shard": 1000, "min_side": 16, "quality": 95, "workers": 1}
    return Packing(source=source, out=out, max_side=max_side, **options)


def plan(path: Path) -> int:
    """Plans a million files, as a walk would find them; gives the shards."""
    plan = Plan(path, {"name": "set", "samples_per_shard": 1000})
    for first in range(0, PLANNED, 4000):
        for name in plan.new([f"data_large/a/airfield/{number:08d}.jpg" for number in range(first, first + 4000)]):
            plan.add(name)
    plan.close_shard()
    plan.close()
    return len(plan.shards)


def main() -> None:
    """Prints the table."""
    cv2.setNumThreads(1)
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for what in ("planning a million files", "planning them again: nothing new"):
            seconds = cost(lambda: plan(folder / "plan.jsonl"))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(f"{what:<34}{seconds:>8.1f} s          {grown:.0f} MB more memory")
        files = photos(folder / "raw", given)
        decoding = cost(lambda: [read_image(file.read_bytes()) for file in files])
        print(f"{'decoding alone':<34}{IMAGES / decoding:>8.0f} images/s   1.00")
        for what, work in (
            ("packing, bytes untouched", packing(folder / "raw", folder / "a", None).run),
            ("packing, shrunk to 256", packing(folder / "raw", folder / "b", 256).run),
            ("packing again: nothing to do", packing(folder / "raw", folder / "a", None).run),
        ):
            seconds = cost(work)
            print(f"{what:<34}{IMAGES / seconds:>8.0f} images/s   {decoding / seconds:.2f}")


if __name__ == "__main__":
    main()
