"""How fast is the loader? Ratios on one core, measured in one run, against decoding alone and against other pipelines.

python scripts/benchmark_loader.py --images 100 --repeats 7

Every pipeline turns the same JPEGs into batches of random square crops of 518 pixels on one thread. The rounds are
interleaved: each repeats all pipelines in turn, a ratio is taken within a round, and the median over the rounds is
printed with its range. Times are CPU seconds, so that other programs on the machine disturb less.

  ours              shards -> uint8 crops, flipped at random; then with V1's strong perturbation; with stored labels of
                    each codec; with the whole image for a teacher that labels online; with large JPEGs decoded at half
  decoding          the same bytes, from memory, to RGB and no further: the fastest of the decoders that are installed.
                    It keeps freed memory as our workers do (`keep_memory`); the other pipelines run as they come
  webdataset        WebDataset(...).decode("rgb8" or "pil") -> the same resizing (OpenCV) and cropping -> batches
  official          what the published V2 training code does to an image: cv2.imread, cvtColor, / 255 in float64,
                    bicubic to a short side of 518, normalisation, float32, random crop

Labels have the teacher's network size (sides multiples of 14), or half of it: the blurred picture on a ramp. Photos
that EXIF says to turn are left out, for decoding alone does not turn them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import default_collate

from depthany.config.build import build
from depthany.config.launch import compose
from depthany.data.augment import Augment, sample_rng
from depthany.data.files import DecodeError, read_image
from depthany.data.labels import encode_pseudo, half
from depthany.data.module import DepthData, Mix, keep_memory
from depthany.data.scenes import render
from depthany.data.shards import Shard, label_path, write_shard
from depthany.data.sources.packed import Packed
from depthany.data.sources.photos import PhotoFolder
from depthany.geometry.pictures import EXIF_ORIENTATION
from depthany.geometry.resize import crop_image, lower_bound_size, resize_image
from depthany.types import IMAGENET_MEAN, IMAGENET_STD

SIZE, BATCH = 518, 8
PHOTOS = Path(__file__).resolve().parents[2] / "shared/data/real/unlabelled"


def batches(things: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """BATCH of them at a time."""
    return (things[first : first + BATCH] for first in range(0, len(things), BATCH))


def photos(folder: Path, number: int, min_side: int) -> Iterator[bytes]:
    """The bytes of RGB JPEGs that decode, evenly over the folder; rendered scenes where there is no such folder."""
    if not folder.is_dir():
        print(f"no folder {folder}: {number} rendered scenes of 640 x 480 instead")
        for i in range(number):
            scene = render(style="b", seed=0, index=i, size=640).image[:480, :, ::-1]
            yield cv2.imencode(".jpg", scene, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        return
    found = []
    for path in sorted(folder.rglob("*.[jJ][pP]*[gG]")):
        try:
            data = path.read_bytes()
            read_image(data)
        except DecodeError:
            continue
        header = Image.open(BytesIO(data))
        if header.getexif().get(EXIF_ORIENTATION, 1) != 1:
            continue
        if header.format == "JPEG" and header.mode == "RGB" and min(header.size) >= min_side:
            found.append(data)
    yield from (found[i] for i in np.linspace(0, len(found) - 1, min(number, len(found))).round().astype(int))


def write_labels(data: Packed, name: str) -> None:
    """Label shards as the label job would write them, `name` for the teacher's."""
    codec, _, resolution = name.partition("-")
    for tar in data.tars:
        rows = []
        shard = Shard(tar)
        for i, key in enumerate(shard.keys):
            image = read_image(shard.read(i, "jpg"))
            h, w = lower_bound_size(*image.shape[:2], size=SIZE, multiple=14)
            grey = cv2.cvtColor(cv2.resize(image, (w, h)), cv2.COLOR_RGB2GRAY).astype(np.float32)
            ramp = np.linspace(0, 300, h, dtype=np.float32)[:, None]
            disparity = cv2.GaussianBlur(grey, (0, 0), 8) + ramp
            rows.append({"__key__": key, **encode_pseudo(half(disparity) if resolution else disparity, codec)})
        write_shard(label_path(tar, name), rows, facts={"images": shard.sha256})


def decoders(images: list[bytes]) -> dict[str, Callable[[], None]]:
    """Every decoder that is installed, to RGB."""
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    known: dict[str, Callable[[bytes], Any]] = {
        "cv2": lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags),
        "PIL": lambda data: np.array(Image.open(BytesIO(data)).convert("RGB")),
    }
    try:
        import torchvision.io as tv

        known["torchvision"] = lambda data: tv.decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=tv.ImageReadMode.RGB
        )
    except ImportError:
        pass
    try:
        import simplejpeg

        known["simplejpeg"] = simplejpeg.decode_jpeg
    except ImportError:
        pass
    try:
        import turbojpeg

        known["PyTurboJPEG"] = partial(turbojpeg.TurboJPEG().decode, pixel_format=turbojpeg.TJPF_RGB)
    except (ImportError, RuntimeError):  # without its library
        pass

    def run(decode: Callable[[bytes], Any]) -> None:
        for data in images:
            decode(data)

    return {name: partial(run, decode) for name, decode in known.items()}


def ours(
    root: Path, augment: Augment, *, teacher: str | None = None, online: bool = False, reduced: bool = False
) -> DepthData:
    """The loader of a student's run, without processes."""
    source = packed(root)
    source.teacher = teacher
    data = DepthData(
        name="benchmark",
        sources={},
        unlabelled={"photos": source},
        validation={},
        max_depth={},
        num_workers=0,
        start_method=None,
        reduced_decode=reduced,
        window=8,
        limit=None,
        skip_limit=0.0,
        mix=Mix(labelled=0, unlabelled=1, epochs=1),
        augment={"unlabelled": augment},
        batch_size=BATCH,
        online=online,
    )
    data.teacher_size, data.teacher_multiple = SIZE, 14
    data.setup()
    return data


def packed(root: Path) -> Packed:
    """The photos as shards, their bytes unchanged."""
    source = PhotoFolder(root=root / "photos", pattern="*.jpg", name="photos")
    return Packed(source=source, root=str(root), samples_per_shard=32, short_side=None)


def images_only(data: DepthData, augment: Augment) -> None:
    """Batches of crops without any label."""
    part = data.parts["unlabelled"]
    for positions in batches(range(len(part))):
        places = ((*part.locate(position), sample_rng(0, "unlabelled", position)) for position in positions)
        default_collate([augment(source.read(index), rng)["image"] for source, index, rng in places])


def whole_batches(data: DepthData) -> None:
    """Everything that a training step is handed, labels included."""
    for batch in data.train_dataloader():
        assert batch["weight"].all(), batch["skipped"]


def plain_webdataset(tars: list[str], decode: str) -> None:
    """Decode, resize, crop, flip, batch."""
    rng = np.random.default_rng(0)

    def view(image: Any) -> np.ndarray:
        image = np.asarray(image)  # no copy of an array
        h, w = lower_bound_size(*image.shape[:2], size=SIZE, multiple=1)
        top, left = rng.integers(h - SIZE + 1), rng.integers(w - SIZE + 1)
        crop = resize_image(image, (h, w), antialias=False)[top : top + SIZE, left : left + SIZE]
        return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)

    pipeline = wds.WebDataset(tars, shardshuffle=False, empty_check=False).decode(decode)
    for _ in pipeline.to_tuple("jpg").map_tuple(view).batched(BATCH):
        pass


def official(paths: list[Path]) -> None:
    """Depth-Anything-V2 metric_depth, dataset/*.py and dataset/transform.py, the image's part, in its order."""
    rng = np.random.default_rng(0)
    for some in batches(paths):
        views = []
        for path in some:
            image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) / 255.0
            h, w = lower_bound_size(*image.shape[:2], size=SIZE, multiple=14)
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_CUBIC)
            image = (image - IMAGENET_MEAN) / IMAGENET_STD
            image = np.ascontiguousarray(np.transpose(image, (2, 0, 1))).astype(np.float32)
            top, left = rng.integers(h - SIZE + 1), rng.integers(w - SIZE + 1)
            views.append(image[:, top : top + SIZE, left : left + SIZE])
        torch.from_numpy(np.stack(views))


def stages(data: DepthData, augment: Augment) -> dict[str, float]:
    """CPU seconds of the stages of one pass, one after the other."""
    part, clock, taken = data.parts["unlabelled"], time.process_time, dict.fromkeys(STAGES, 0.0)
    for positions in batches(range(len(part))):
        views = []
        for position in positions:
            source, index = part.locate(position)
            rng = sample_rng(0, "unlabelled", position)
            assert isinstance(source, Packed)
            marks = [clock()]
            shard, place = source.locate(index)
            encoded = source.shard(shard).read(place, "jpg")
            marks.append(clock())
            image = read_image(encoded)
            marks.append(clock())
            clean = crop_image(image, augment._crop(*image.shape[:2], rng), SIZE)
            marks.append(clock())
            views.append(augment._distort(clean, rng))
            marks.append(clock())
            for name, start, end in zip(STAGES, marks, marks[1:], strict=False):
                taken[name] += end - start
        start = clock()
        default_collate(views)
        taken["collate"] += clock() - start
    return taken


STAGES = ("read", "decode", "resize", "colour", "collate")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="how many JPEGs")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; the median is printed")
    parser.add_argument("--folder", type=Path, default=PHOTOS, help="JPEGs of any size, in any folders below")
    parser.add_argument("--min-side", type=int, default=1, help="only JPEGs with at least this short side, in pixels")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), flags)


def measure(root: Path, flags: argparse.Namespace) -> None:
    """Prepares shards and labels in a temporary folder, then runs the rounds."""
    (root / "photos").mkdir()
    images = list(photos(flags.folder, flags.images, flags.min_side))
    paths = [root / "photos" / f"{i:05d}.jpg" for i in range(len(images))]
    for path, data in zip(paths, images, strict=True):
        path.write_bytes(data)
    plain = packed(root)
    plain.prepare()
    plain.open()
    for label in LABELS:
        write_labels(plain, label)
    configs = {
        name: compose("train", ["stage=student", "model=vits", f"augment={name}"]) for name in ("flip", "strong")
    }
    augments = {name: build(cfg.augment)["unlabelled"] for name, cfg in configs.items()}
    assert all(augment.size == SIZE for augment in augments.values())
    clean, strong = augments["flip"], augments["strong"]

    arms: dict[str, Callable[[], None]] = {
        "clean": partial(images_only, ours(root, clean), clean),
        "strong": partial(images_only, ours(root, strong), strong),
        **{f"clean, labels {name}": partial(whole_batches, ours(root, clean, teacher=name)) for name in LABELS},
        "clean, labels online": partial(whole_batches, ours(root, clean, online=True)),
        "clean, large JPEGs at half": partial(images_only, ours(root, clean, reduced=True), clean),
    }
    known = decoders(images)
    tars = [str(tar) for tar in plain.tars]
    rivals: dict[str, Callable[[], None]] = {
        **known,
        "webdataset rgb8": partial(plain_webdataset, tars, "rgb8"),
        "webdataset pil": partial(plain_webdataset, tars, "pil"),
        "official": partial(official, paths),
    }
    sizes = np.array([read_image(data).shape[:2] for data in images])
    sides = sizes.min(1)
    print(
        f"{len(images)} JPEGs: {np.mean([len(d) for d in images]) / 1024:.0f} KiB and {sizes.prod(1).mean() / 1e6:.2f} "
        f"megapixels on average, short sides {sides.min()} to {sides.max()}, median {np.median(sides):.0f}"
    )
    everything = arms | rivals
    PIPELINES.update(everything)
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as as_it_comes:
        as_it_comes.submit(seconds_of, "official").result()  # forked before memory is kept here
        keep_memory()
        for repeat in range(flags.repeats + 1):
            for name in everything:
                other = name in rivals and name not in known
                taken = as_it_comes.submit(seconds_of, name).result() if other else seconds_of(name)
                if repeat:  # the first round warms up
                    seconds[name].append(taken)
    report(seconds, list(arms), list(known), len(images))
    for name, augment in (("clean", clean), ("strong", strong)):
        parts = [stages(ours(root, augment), augment) for _ in range(flags.repeats)]
        middle = {stage: statistics.median(part[stage] for part in parts) for stage in STAGES}
        whole = sum(middle.values())
        shares = (f"{stage} {1000 * s / len(images):.2f} ms ({s / whole:.0%})" for stage, s in middle.items())
        print(f"where the time goes, {name}: {', '.join(shares)}")


LABELS = ("png16", "float16", "png8", "png16-half")
PIPELINES: dict[str, Callable[[], None]] = {}


def seconds_of(name: str) -> float:
    """CPU seconds of one pass over all images."""
    start = time.process_time()
    PIPELINES[name]()
    return time.process_time() - start


def report(seconds: dict[str, list[float]], arms: list[str], known: list[str], number: int) -> None:
    """The table of ratios: how many times as fast as each rival, median (smallest to largest round)."""
    fastest = min(known, key=lambda name: statistics.median(seconds[name]))
    times = {name: 1000 * statistics.median(values) / number for name, values in seconds.items()}
    print("CPU ms per image: " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()))
    rivals = [fastest, "webdataset rgb8", "webdataset pil", "official"]
    print(f"\ntimes as fast as   {'':10}" + "".join(f"{name:>24}" for name in [f"decoding ({fastest})", *rivals[1:]]))
    for arm in arms:
        cells = []
        for rival in rivals:
            ratios = [theirs / mine for mine, theirs in zip(seconds[arm], seconds[rival], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"{arm:29}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
