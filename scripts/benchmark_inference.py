"""Is inference as fast as that of transformers, with the same weights on the same machine?

python scripts/benchmark_inference.py                      everything, vits, one thread: some 12 minutes, 25 at most
python scripts/benchmark_inference.py --photos FOLDER      the whole path on your own photos
python scripts/benchmark_inference.py --parts forward --precisions fp32 --modes eager

Random weights of one official model, run here and, exported by `depthany.export format=hf`, by transformers. Both sides
take turns round by round; a ratio is the median over the rounds of their time over ours: above 1 we are faster.

  forward  a batch of normalised images to maps, fp32 and bf16, eager and torch.compile. "best batch" compares the two
           sides at the batch at which each is fastest, and names it. bf16 is Predictor(precision="bf16") here and
           from_pretrained(dtype=torch.bfloat16) there, the usual way of each; "off" is the root mean square
           difference to our fp32 map, as a share of that map's standard deviation.
  path     a folder of photos to arrays of the photos' size: here with reading threads and batches by shape, as
           `depthany.predict` does, there transformers.pipeline("depth-estimation"). "beside the network" is the path
           less a forward of each of its inputs, batch 1, timed in the same rounds; below 0 where batches save more
           than the rest costs.

Without --photos, JPEGs of four shapes are made from the scenes of the package. Photos whose short side is below the
input size get larger inputs here than there, as transformers resizes as little as it can: the pixels are printed.

Rows are printed as they come, so a run that is killed keeps what it had. Each group of rows (forward: a precision and a
mode; path: a precision and a size) has --minutes; what did not fit is named, with fewer rounds or without a row.
"""

import argparse
import math
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import transformers

from depthany.data.files import read_image
from depthany.data.scenes import render
from depthany.geometry.resize import normalised
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.layouts import OFFICIAL
from depthany.models.weights import save_weights
from depthany.runs.exporting import export
from depthany.runs.find import find_device, load_model

SHAPES = ((600, 800), (1080, 1920), (2400, 3200), (1536, 1024))  # of the photos that are made, taken in turn
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OutOfTimeError(Exception):
    """A group of rows has used its minutes."""


def interleaved(
    acts: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock, until: float = math.inf
) -> dict[str, np.ndarray]:
    """Seconds of acts that take turns, by round, after a turn that warms up; fewer rounds where the time is up.

    Raises:
        OutOfTimeError: it is up (`until`, of `time.monotonic`) before a round was measured.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        if time.monotonic() > until:
            if number < 2:
                raise OutOfTimeError
            print(f"  out of time: {number - 1} of {rounds} rounds in the next row")
            break
        for name, act in acts.items():
            started = clock()
            act()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name] += [clock() - started] if number else []
    return {name: np.array(seconds) for name, seconds in times.items()}


def row(what: str, ours: np.ndarray, theirs: np.ndarray) -> str:
    """A line of the table, from seconds of an image by round."""
    ratio = f"{statistics.median(theirs / ours):6.2f}" if (ours > 0).all() else "     -"
    return f"{what:<42}{1000 * statistics.median(ours):10.1f}{1000 * statistics.median(theirs):14.1f}{ratio:>8}"


class Sides:
    """The same random weights on both sides.

    Args:
        name: of the official model.
        folder: takes the files of both.
        device: where both run.
        clock: what tells seconds.
    """

    def __init__(self, name: str, folder: Path, device: str, clock: Clock) -> None:
        torch.manual_seed(0)
        ours, self.hf = folder / "model.safetensors", folder / "hf"
        self.device, self.clock = device, clock
        save_weights(DepthModel(**OFFICIAL[name], pretrained=False), ours, metadata={})
        lines = export(str(ours), runs=folder, form="hf", out=self.hf, photo=None, size=None, processing="none")
        print("\n".join(lines))
        self.ours = ours

    def predictor(self, precision: str) -> Predictor:
        """Ours."""
        return load_model(self.ours, device=self.device, precision=precision)

    def theirs(self, precision: str) -> Any:
        """The model of transformers."""
        model = transformers.AutoModelForDepthEstimation.from_pretrained(self.hf, dtype=DTYPES[precision])
        return model.to(self.device).eval()

    def pipeline(self, precision: str, size: int) -> Any:
        """The pipeline of transformers at an input size: a photo's file to a dictionary with `predicted_depth`."""
        sides = {"height": size, "width": size}
        processor = transformers.AutoImageProcessor.from_pretrained(self.hf, size=sides)
        model = self.theirs(precision)
        # The pipeline turns the map into a NumPy array, which stops on bfloat16.
        model.register_forward_hook(lambda _, __, out: type(out)(predicted_depth=out.predicted_depth.float()))
        return transformers.pipeline("depth-estimation", model=model, image_processor=processor, device=self.device)


def forward(
    sides: Sides, precision: str, mode: str, batches: Sequence[int], *, size: int, rounds: int, seconds: float
) -> None:
    """Prints the rows of the network alone, of one precision and mode."""
    until = time.monotonic() + seconds
    what = f"forward {size} {precision} {mode}"
    ours, theirs = sides.predictor(precision), sides.theirs(precision)
    own, other = ours.forward, theirs.forward
    if mode == "compile":  # each shape for itself on both sides
        own, other = torch.compile(own, dynamic=False), torch.compile(other, dynamic=False)
    best: dict[str, tuple[np.ndarray, int]] = {}
    measured = 0
    for batch in batches:
        images = torch.randn(batch, 3, size, size, device=sides.device)
        cast = images.to(DTYPES[precision])
        acts = {"ours": lambda: own(images), "theirs": lambda: other(pixel_values=cast)}  # noqa: B023
        try:
            with torch.inference_mode():
                times = interleaved(acts, rounds, sides.clock, until)
        except OutOfTimeError:
            print(f"{what}: out of time, batch {batch} and more are not measured", flush=True)
            break
        except RuntimeError as error:  # no C++ compiler, say
            if mode == "eager":
                raise
            print(f"{what}: not to be had here: {str(error).splitlines()[0]}", flush=True)
            break
        each = {name: taken / batch for name, taken in times.items()}
        print(row(f"{what}, batch {batch}", **each), flush=True)
        measured += 1
        for name, taken in each.items():
            best[name] = min(best.get(name, (taken, batch)), (taken, batch), key=lambda pair: float(np.median(pair[0])))
    if not measured:
        return
    if measured > 1:
        (fast, ours_at), (slow, theirs_at) = best["ours"], best["theirs"]
        print(row(f"{what}, best batch ({ours_at}, {theirs_at})", fast, slow))
    with torch.inference_mode():
        image = torch.randn(1, 3, size, size, device=sides.device)
        exact = sides.predictor("fp32")(image)
        maps = (own(image), other(pixel_values=image.to(DTYPES[precision])).predicted_depth.float())
        off = [float(((each - exact).square().mean().sqrt() / exact.std()).cpu()) for each in maps]
    print(f"  off: ours {off[0]:.1e}, theirs {off[1]:.1e}", flush=True)


def write_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of several shapes, with the grain that a camera leaves."""
    files = []
    for i in range(count):
        height, width = SHAPES[i % len(SHAPES)]
        scene = render(style="b", seed=0, index=i, size=320).image
        photo = cv2.resize(scene, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        grain = np.random.default_rng(i).integers(-6, 7, photo.shape, np.int16)
        files.append(folder / f"{i:02d}.jpg")
        cv2.imwrite(str(files[-1]), (photo + grain).clip(0, 255).astype(np.uint8)[..., ::-1])
    return files


def arrays(predictor: Predictor, files: Sequence[Path], *, size: int, batch: int, readers: int) -> list[np.ndarray]:
    """Photos to maps of their size: read in threads, predicted in batches of one shape."""

    def read(file: Path) -> tuple[np.ndarray, tuple[int, ...]]:
        photo = read_image(file.read_bytes())
        shape = predictor.input_shape(*photo.shape[:2], input_size=size)
        return normalised(photo, shape, antialias=False), photo.shape[:2]

    made: list[np.ndarray] = []
    waiting: dict[tuple[int, ...], list[tuple[np.ndarray, tuple[int, ...]]]] = defaultdict(list)
    with ThreadPoolExecutor(max_workers=readers) as pool:
        for inputs, shape in pool.map(read, files):
            waiting[inputs.shape].append((inputs, shape))
            if len(waiting[inputs.shape]) == batch:
                made += [each.values for each in predictor.predict_batch(*zip(*waiting.pop(inputs.shape), strict=True))]
    for rest in waiting.values():
        made += [each.values for each in predictor.predict_batch(*zip(*rest, strict=True))]
    return made


def path(
    sides: Sides,
    precision: str,
    files: Sequence[Path],
    *,
    size: int,
    batch: int,
    readers: int,
    rounds: int,
    seconds: float,
) -> None:
    """Prints the rows of the whole path, of one precision and input size."""
    until = time.monotonic() + seconds
    ours, pipeline = sides.predictor(precision), sides.pipeline(precision, size)
    names = [str(file) for file in files]
    photos = [read_image(file.read_bytes()) for file in files]
    shapes = [ours.input_shape(*photo.shape[:2], input_size=size) for photo in photos]
    inputs = [torch.zeros(1, 3, *shape, device=sides.device) for shape in shapes]
    others = [pipeline.preprocess(name)["pixel_values"].to(sides.device, DTYPES[precision]) for name in names]
    pixels = [sum(image[0, 0].numel() for image in images) / len(files) / 1000 for images in (inputs, others)]
    made: dict[str, list[np.ndarray]] = {}

    def our_path() -> None:
        made["ours"] = arrays(ours, files, size=size, batch=batch, readers=readers)

    def their_path() -> None:
        made["theirs"] = [result["predicted_depth"].cpu().numpy() for result in pipeline(names)]

    acts: dict[str, Callable[[], Any]] = {
        "ours": our_path,
        "theirs": their_path,
        "our forward": lambda: [ours(image) for image in inputs],
        "their forward": lambda: [pipeline.model(image) for image in others],
    }
    what = f"path {size} {precision} eager"
    try:
        with torch.inference_mode():
            times = {name: taken / len(files) for name, taken in interleaved(acts, rounds, sides.clock, until).items()}
    except OutOfTimeError:
        print(f"{what}: out of time, not measured; fewer photos: --count", flush=True)
        return
    wanted = sorted(photo.shape[:2] for photo in photos)
    assert all(sorted(values.shape for values in each) == wanted for each in made.values())
    print(row(f"{what}, batches of {batch}", times["ours"], times["theirs"]))
    print(row("  its forwards, batch 1", times["our forward"], times["their forward"]))
    print(row("  beside the network", *(times[a] - times[f] for a, f in PARTS)))
    print(f"  network inputs of {pixels[0]:.0f} and {pixels[1]:.0f} thousand pixels a photo", flush=True)


PARTS = (("ours", "our forward"), ("theirs", "their forward"))


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=list(OFFICIAL), default="vits")
    parser.add_argument("--size", type=int, default=518, help="of forward: both sides in pixels, a multiple of 14")
    sizes = "of path: input sizes in pixels, multiples of 14"
    parser.add_argument("--path-sizes", nargs="+", type=int, default=[252, 518], help=sizes)
    parser.add_argument("--parts", nargs="+", choices=["forward", "path"], default=["forward", "path"])
    parser.add_argument("--precisions", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compile"], default=["eager", "compile"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--photos", type=Path, help="a folder of JPEG or PNG photos; default: made")
    parser.add_argument("--count", type=int, default=4, help="of the photos that are made, or at most read")
    parser.add_argument(
        "--path-batch", type=int, default=1, help="of the whole path, ours; theirs takes one shape only"
    )
    parser.add_argument("--readers", type=int, default=2, help="reading threads of ours")
    parser.add_argument("--rounds", type=int, default=3, help="that are measured, after one that warms up")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each group of rows, of which there are 8")
    parser.add_argument("--threads", type=int, default=1, help="of torch and OpenCV on either side")
    parser.add_argument("--device", default="auto")
    clock = "cpu: processor time of all threads, for a machine that others use; what threads hide is not seen then"
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=clock)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    cv2.setNumThreads(flags.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = find_device(flags.device)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{cpu_name()}, {flags.threads} threads"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{where}; {versions}; {flags.encoder}, {flags.clock} time")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = Sides(flags.encoder, folder, device, CLOCKS[flags.clock])
        print(f"\n{'ms per image, medians of ' + str(flags.rounds):<42}{'ours':>10}{'transformers':>14}{'ratio':>8}")
        limits = {"rounds": flags.rounds, "seconds": 60 * flags.minutes}
        if "path" in flags.parts:
            if flags.photos:
                files = sorted(p for p in flags.photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
            else:
                files = write_photos(folder, flags.count)
            how = {"batch": flags.path_batch, "readers": flags.readers, **limits}
            for size, precision in product(flags.path_sizes, flags.precisions):
                path(sides, precision, files[: flags.count], size=size, **how)
        if "forward" in flags.parts:
            for mode, precision in product(flags.modes, flags.precisions):
                forward(sides, precision, mode, flags.batches, size=flags.size, **limits)


def cpu_name() -> str:
    """What the system calls the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
