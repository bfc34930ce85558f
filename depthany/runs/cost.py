"""What a run costs: a few seconds of measuring on this machine, multiplied out to any number of images and devices."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor

from depthany.data.files import read_image
from depthany.data.labels import LabelPlan, decode_label, encode_pseudo, half
from depthany.data.module import DepthData, Mix, Source
from depthany.data.shards import IMAGE_SUFFIXES, Shard, write_shard
from depthany.data.sources.labelled import Labelled
from depthany.data.sources.packed import Packed, Shards
from depthany.inference.predictor import Predictor
from depthany.optim.plan import OptimPlan
from depthany.tasks.base import DepthTask
from depthany.types import DepthSample, ImageSample

SAMPLES = 32  # images read for the measurements
CODECS = ("png16", "float16", "png8")
RESOLUTIONS = ("full", "half")
PASSES = {None: 1.0, "none": 1.0, "flip": 2.0, "flip_scale": 2.6}  # the teacher's work for each label, by quality
Members = dict[str, bytes]


class Pace(NamedTuple):
    """How fast something goes on one device."""

    seconds: float  # for each image
    batch: int  # images at once


@dataclass(kw_only=True)
class Probe:
    """What was measured on this machine; None where it could not be."""

    device: str
    step: Pace | None = None  # of training: forward, backward, optimizer, frozen networks; of one process
    teacher: Pace | None = None
    teacher_name: str = "a stand-in with random weights"
    loader: float | None = None  # seconds of one core for each training view: decode, augment, collate
    batch_bytes: float | None = None  # for each view, as it travels
    read_bytes: float | None = None  # for each view, in files
    image_bytes: float | None = None  # of an image in its shard, with tar headers and index; of a pair where labelled
    images: int = 0  # that this is the mean of
    label_bytes: dict[tuple[str, str], float] = field(default_factory=dict)  # by codec and resolution, likewise
    labels: int = 0
    checkpoint_bytes: int | None = None


class Row(NamedTuple):
    """One line of the estimate."""

    what: str
    value: float | None  # in the unit; None: not measured
    unit: str
    how: str


def cost(probe: Probe, *, images: int, world: int, mix: Mix, plan: LabelPlan | None, keep: int) -> list[Row]:
    """The cost of labelling and training; exactly linear in images, and in 1 / world.

    Args:
        probe: what was measured.
        images: of one epoch, those that the epoch counts: unlabelled ones where the mix has some.
        world: devices, each as fast as the probe's.
        mix: parts of a batch, and epochs.
        plan: how labels are made; None: no pseudo-labels.
        keep: checkpoints that stay on the disk.
    """
    views = images * mix.epochs * (mix.labelled + mix.unlabelled) / (mix.unlabelled or mix.labelled)
    rows: list[Row] = []

    def add(what: str, pace: Pace | None, number: float, how: str) -> None:
        hours = None if pace is None else pace.seconds * number / 3600
        measured = f"measured {_seconds(pace.seconds)}, batch {pace.batch}, {how}" if pace else "not measured"
        rows.append(Row(f"{what}: device-hours", hours, "h", measured))
        rows.append(Row(f"{what}: days", hours and hours / 24 / world, "d", f"on {world} device(s)"))

    chosen: tuple[str, str] | None = None
    if plan and plan.mode == "offline":
        chosen, passes = (str(plan.codec), str(plan.resolution)), PASSES[plan.quality]
        add("labels by the teacher", probe.teacher, passes * images, f"x {passes:g} passes x {images:,} images")
    inside = " with the teacher inside" if plan and plan.mode == "online" else ""
    add(f"training{inside}", probe.step, views, f"x {views:,.0f} views")
    if probe.image_bytes is not None:
        how = f"measured {probe.image_bytes / 1e3:.1f} kB, the mean of {probe.images} files, x images"
        rows.append(Row("image shards", probe.image_bytes * images / 1e9, "GB", how))
    for kind, size in probe.label_bytes.items():
        mark = ", as chosen" if kind == chosen else ""
        how = f"measured {size / 1e3:.1f} kB, the mean of {probe.labels} labels, x images"
        rows.append(Row(f"labels {' '.join(kind)}{mark}", size * images / 1e9, "GB", how))
    rate = probe.step and world / probe.step.seconds
    read = rate * probe.read_bytes / 1e6 if rate and probe.read_bytes else None
    cores = rate * probe.loader if rate and probe.loader else None
    rows.append(Row("loader must deliver", rate, "views/s", "x devices, to keep them busy"))
    rows.append(Row("loader must read", read, "MB/s", "x measured bytes of image and label"))
    spent = f"x measured {_seconds(probe.loader)} of one core, files in memory" if probe.loader else "not measured"
    rows.append(Row("loader needs", cores, "cores", spent))
    each = probe.checkpoint_bytes
    rows.append(Row("a checkpoint", each and each / 1e9, "GB", "measured: weights, moments and averages"))
    rows.append(Row(f"{keep} checkpoints and one being written", each and each * (keep + 1) / 1e9, "GB", "x files"))
    return rows


def _seconds(number: float) -> str:
    return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"


# --- measuring --------------------------------------------------------------------------------------------------------


def pace_of(prepare: Callable[[int], Callable[[], int]], *, most: int, seconds: float, device: torch.device) -> Pace:
    """How long an image takes, in the largest batch that the time and the memory allow.

    Batches grow from 1 by doubling. The first run is a warm-up, and counts only where there is no time for another.

    Args:
        prepare: makes a batch of about so many images ready; what it returns runs it, is timed, and says how many they
            were.
        most: largest batch.
        seconds: time for this; a batch that has begun is finished.
        device: waited for.

    Raises:
        torch.OutOfMemoryError: one image is too much.
    """

    def timed(batch: int) -> tuple[float, int]:
        run = prepare(batch)
        begun = time.perf_counter()
        number = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun, number

    ends, batch = time.perf_counter() + seconds, 1
    took, number = timed(batch)
    runs = {number: [took]} if time.perf_counter() + took > ends else {}
    while not runs or time.perf_counter() + took < ends:
        try:
            took, number = timed(batch)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            most = batch = batch // 2
            continue
        runs.setdefault(number, []).append(took)
        if batch < most and time.perf_counter() + 3 * took < ends:
            batch = min(2 * batch, most)
    largest = max(runs)
    return Pace(median(runs[largest]) / largest, largest)


class Held:
    """A few samples, as their shards hold them, in memory: a source of any length that reads without a disk.

    Args:
        name: of the source.
        members: of each sample.
    """

    def __init__(self, name: str, members: Sequence[Members]) -> None:
        self.name, self.members = name, list(members)
        self.reduce_to: int | None = None  # as of `Shards`; set by the data room

    def __len__(self) -> int:
        return 1_000_000

    def key(self, index: int) -> str:
        """The sample's key."""
        return f"{self.name}/{index % len(self.members)}"

    def prepare(self) -> None:
        """Nothing to do."""

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 RGB."""
        members = self.members[index % len(self.members)]
        data = next(members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members)
        return read_image(data, reduce_to=self.reduce_to)

    def read(self, index: int) -> ImageSample | DepthSample:
        """The image, with its label if it has one."""
        members = self.members[index % len(self.members)]
        image = ImageSample(image=self.image(index), key=self.key(index))
        return DepthSample(**image, **decode_label(members.__getitem__, members)) if "json" in members else image


class Spread:
    """Some images of a source, evenly spread over its first `count`, as something to pack."""

    def __init__(self, source: Any, count: int, number: int) -> None:
        self.source, self.name = source, source.name
        self.places = _few(count, number)
        if hasattr(source, "data"):
            self.data = lambda index: source.data(self.places[index])

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        """The sample's key."""
        return str(self.source.key(self.places[index]))

    def identity(self) -> dict[str, Any]:
        """Not asked again: the packed folder is temporary."""
        return {}

    def prepare(self) -> None:
        """It is prepared."""

    def read(self, index: int) -> ImageSample | DepthSample:
        """The image, with its label if it has one."""
        return self.source.read(self.places[index])


def hold(source: Source, *, count: int, number: int, folder: Path) -> Held:
    """Some samples of a prepared source as their shards hold them; packed into `folder` where they are not in shards.

    Args:
        source: any; a `Packed` one need not be packed yet.
        count: images of the source that are in use.
        number: of samples, spread over them.
        folder: temporary.

    Raises:
        ValueError: nothing can be read.
    """
    source = source.reader if isinstance(source, Labelled) else source
    shards = source if isinstance(source, Shards) and not isinstance(source, Packed) else None
    if shards is None:
        original = getattr(source, "source", source)
        spread = Spread(original, min(count, len(original)), number)
        short_side = getattr(source, "short_side", None)
        shards = Packed(source=spread, root=str(folder), samples_per_shard=len(spread), short_side=short_side)
        shards.prepare()
    shards.open()
    chosen = [shard for shard in _few(shards.num_shards, number) if shards.chunks[shard]]
    members = []
    for shard in chosen:
        opened = shards.shard(shard)
        for place in _few(shards.chunks[shard], -(-number // len(chosen))):
            members.append({suffix: opened.read(place, suffix) for suffix in opened.files[place]})
    if not members:
        raise ValueError(f"{source.name}: no image of it can be read")
    return Held(source.name, members)


def _few(count: int, number: int) -> list[int]:
    """At most `number` of the places 0..count - 1, evenly spread."""
    return np.linspace(0, count - 1, min(number, count)).astype(int).tolist()


def shard_bytes(samples: Sequence[Members], folder: Path) -> float:
    """Bytes of each sample in a shard that is written here: tar members with their headers, and the index."""
    tar = folder / "probe-000000.tar"
    write_shard(tar, [{"__key__": f"probe/{i:06d}"} | sample for i, sample in enumerate(samples)], facts={})
    shard = Shard(tar)
    ends = [offset + -(-size // 512) * 512 for files in shard.files for offset, size, *_ in files.values()]
    return (max(ends) + tar.with_suffix(".json").stat().st_size) / len(samples)


def label_bytes(maps: Sequence[np.ndarray], folder: Path) -> dict[tuple[str, str], float]:
    """Bytes of a stored label by codec and resolution, the mean over maps (h, w) that a teacher made."""
    sizes = {}
    for codec in CODECS:
        for resolution in RESOLUTIONS:
            samples = [encode_pseudo(half(m) if resolution == "half" else m, codec) for m in maps]
            sizes[codec, resolution] = shard_bytes(samples, folder)
    return sizes


def ask_teacher(predictor: Predictor, held: Held, plan: LabelPlan, *, seconds: float) -> tuple[Pace, list[np.ndarray]]:
    """The teacher's pace on an input of mean size, and its maps (h, w): of one image, or more as the time allows."""
    ends = time.perf_counter() + seconds
    inputs = [predictor.network_input(held.image(i), input_size=plan.input_size) for i in range(len(held.members))]
    mean = fmean(image.size for image in inputs)
    typical = min(inputs, key=lambda image: abs(image.size - mean))

    def prepare(number: int) -> Callable[[], int]:
        return lambda: len(predictor.disparity([typical] * number))

    pace = pace_of(prepare, most=plan.batch_size or 1, seconds=seconds / 2, device=predictor.device)
    maps = []
    for image in inputs:
        maps.append(predictor.disparity([image])[0].cpu().numpy())
        if time.perf_counter() > ends:
            break
    return pace, maps


class Views:
    """Training batches of held samples, by the run's own data room, with any number of images.

    Args:
        data: of the run; it is not changed.
        held: what stands in for the sources of its parts, labelled and unlabelled.
    """

    def __init__(self, data: DepthData, held: Mapping[str, Held]) -> None:
        self.data = copy.copy(data)
        self.data.sources, self.data.unlabelled, self.data.validation = {}, {}, {}
        for part, sources in (("labelled", self.data.sources), ("unlabelled", self.data.unlabelled)):
            sources |= {part: held[part]} if part in held else {}
        self.data.limit, self.data._ready = None, False
        self.used = 0
        self.data.cursor = lambda: self.used
        self.data.setup()
        self.dataset = self.data.train_dataset()

    def collated(self, number: int) -> tuple[dict[str, Any], float]:
        """A batch of about `number` images as it travels, and the seconds that one core needed for each."""
        self.data.batch_size = number
        loader = self.data.train_dataloader()
        assert loader.batch_sampler is not None and loader.collate_fn is not None
        spots = next(iter(loader.batch_sampler))
        threads, begun = cv2.getNumThreads(), time.perf_counter()
        cv2.setNumThreads(1)
        batch = loader.collate_fn([self.dataset[spot] for spot in spots])
        cv2.setNumThreads(threads)
        self.used += batch["consumed"]
        return batch, (time.perf_counter() - begun) / len(spots)

    def pace(self, *, most: int, seconds: float) -> tuple[float, float]:
        """Seconds of one core for each view, and its bytes; in batches of up to `most`."""
        self.collated(1)  # the first one draws the order
        ends, number = time.perf_counter() + seconds, 1
        spent: list[float] = []
        while not spent or time.perf_counter() < ends:
            batch, each = self.collated(number)
            spent.append(each)
            number = min(2 * number, most)
        return median(spent[-5:]), sum(t.nbytes for t in _tensors(batch)) / len(batch["key"])

    def on(self, device: torch.device, number: int) -> dict[str, Any]:
        """A batch on the device, normalised as a step gets it."""
        batch, _ = self.collated(number)
        return dict(self.data.on_after_batch_transfer(move_data_to_device(batch, device), 0))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in _tensors(item)]


def step_pace(
    task: DepthTask, views: Views, optim: OptimPlan, *, precision: str, device: torch.device, most: int, seconds: float
) -> tuple[Pace, torch.optim.Optimizer]:
    """The pace of training steps, frozen networks included, without the loader and without other processes."""
    task.to(device).train()
    task.on_fit_start()
    optimizer = optim.optimizer(task.model.encoder_parameters(), task.model.head_parameters())

    def prepare(number: int) -> Callable[[], int]:
        batch: Any = views.on(device, number)

        def run() -> int:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16")):
                target, regions = task.target(batch)
                losses, _ = task.loss(task.model.outputs(batch["image"]), target, regions)
            (batch["weight"] * losses).sum().backward()
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), optim.clip_norm or inf)
            optimizer.step()
            optimizer.zero_grad()
            return len(batch["key"])

        return run

    return pace_of(prepare, most=most, seconds=seconds, device=device), optimizer
