"""The data room's door to Lightning: sources, mix and order become batches of depthany.types."""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from depthany.data.augment import Augment, sample_rng
from depthany.data.files import DecodeError
from depthany.data.labels import has_label
from depthany.data.order import CursorBatches, EpochOrder, Spot, used_of
from depthany.data.shards import ShardError
from depthany.data.storage import Unreachable, outage
from depthany.geometry.disparity import normalise
from depthany.geometry.resize import MAX_INPUT_PIXELS, crop_pixels, lower_bound_size, network_input, resize_image
from depthany.types import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DepthBatch,
    DepthKind,
    DepthSample,
    EvalBatch,
    ImageSample,
    Skip,
    TeacherInput,
)

PATHS = "paths.datasets=FOLDER (raw sets), paths.shards=FOLDER (shards), paths.real=FOLDER (index.csv)"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Source(Protocol):
    """What the mixture reads from.

    A source may have more: `check`, which looks without effort whether its files are there; `open`, which follows
    `prepare` on every process; `limit`, `window` and `reduce_to`, which are set before that; `chunks`, `weight`,
    `factor`, `fingerprint` and `skipped`, as `Shards` and `Labelled` describe them.
    """

    name: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's key."""

    def prepare(self) -> None:
        """Fetches, packs or checks what reading needs; on one process of a machine."""

    def read(self, index: int) -> ImageSample | DepthSample:
        """The image, with its label if it has one; a DecodeError where it is damaged."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What a batch is made of and how long the run is.

    Args:
        labelled: parts of labelled images in every batch.
        unlabelled: parts of unlabelled images in every batch.
        epochs: passes over the unlabelled images, or over the labelled ones where there are no unlabelled.
    """

    labelled: int
    unlabelled: int
    epochs: int


def chunks_of(source: Source, limit: int | None) -> list[int]:
    """Samples in use of each shard of a source; a source without shards is one, cut here to `limit`."""
    whole: list[int] = getattr(source, "chunks", [])
    return whole or [len(source) if limit is None else min(len(source), limit)]


def images_per_epoch(source: Source, limit: int | None) -> int:
    """Images of a source that an epoch has; those that its weight repeats are counted as often."""
    return used_of(sum(chunks_of(source, limit)), getattr(source, "weight", 1.0))


class Part:
    """Several sources as one: plain concatenation, each image as often as any other (V1 and V2, section 4.1).

    A source with a `weight` other than 1 is in it that many times.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, window: int, limit: int | None) -> None:
        self.sources = sources
        counts = [np.array(chunks_of(source, limit), np.int64) for source in sources]
        weights = [(len(each), getattr(of, "weight", 1.0)) for of, each in zip(sources, counts, strict=True)]
        # In arrays, which loader workers share: a big set has 62,000 chunks.
        self._source = np.repeat(np.arange(len(sources)), [len(each) for each in counts])
        self._starts = np.concatenate([np.zeros(0, np.int64), *(np.cumsum(each) - each for each in counts)])
        whole = np.concatenate([np.zeros(0, np.int64), *counts])
        self.order = EpochOrder(counts=whole, seed=seed, window=window, weights=weights)

    def __len__(self) -> int:
        return len(self.order)

    def locate(self, position: int) -> tuple[Source, int]:
        """The source and the index in it of a position of the order."""
        chunk, index = self.order[position]
        return self.sources[self._source[chunk]], int(self._starts[chunk]) + index


class MixedDataset(Dataset[dict[str, Any]]):
    """Reads the sample of a Spot and makes its training view. A damaged sample counts as used, with weight 0.

    An unlabelled source may hold labels of its own, as the embedded scenes do: only a teacher's are handed on.

    Args:
        parts: labelled and unlabelled.
        augment: training views by part.
        seed: of the views.
        teacher: short side and patch size of the teacher's input, where labels are made online.
    """

    def __init__(
        self, parts: Mapping[str, Part], augment: Mapping[str, Augment], *, seed: int, teacher: tuple[int, int] | None
    ) -> None:
        self.parts, self.augment, self.seed, self.teacher = parts, augment, seed, teacher

    def __getitem__(self, spot: Spot) -> dict[str, Any]:
        source, index = self.parts[spot.part].locate(spot.position)
        pseudo = spot.part == "unlabelled"
        augment = self.augment[spot.part]
        item: dict[str, Any] = {"key": source.key(index), "pseudo": pseudo, "weight": spot.weight, "skipped": []}
        item |= {"consumed": spot.consumed, "kind": DepthKind.PSEUDO}
        blank = np.zeros((augment.size, augment.size, 3), np.uint8)
        view: dict[str, Any] = {"image": blank, "clean": blank, "cutmix": np.zeros(4, np.int64)}
        try:
            if spot.weight:  # padding is not read
                sample = source.read(index)
                if pseudo and sample.get("kind") != DepthKind.PSEUDO:
                    sample = ImageSample(image=sample["image"], key=sample["key"])
                if not has_label(sample) and not (pseudo and self.teacher):
                    raise DecodeError(f"{item['key']}: no label")
                made = augment(sample, sample_rng(self.seed, spot.part, spot.position))
                if not has_label(sample):
                    made["whole"] = self._whole(sample)
                    made["pixels"] = crop_pixels(made["whole"].shape, made["crop"], augment.size)
                view = made
                item["kind"] = sample.get("kind", DepthKind.PSEUDO)
        except (DecodeError, OSError) as error:
            if lost := outage(error):  # the image is not damaged: it must not be used up
                raise Unreachable(str(lost)) from error
            item |= {"weight": 0.0, "skipped": [Skip(source.name, item["key"], str(error))]}
        if "disparity" not in view:
            side = view["image"].shape[:2]
            view |= {"disparity": np.zeros(side, np.float32), "valid": np.zeros(side, bool)}
        return item | view

    def _whole(self, sample: ImageSample) -> np.ndarray:
        """What the label job would give to the teacher; refused where that would refuse it."""
        assert self.teacher is not None
        size, multiple = self.teacher
        try:
            return network_input(sample["image"], size=size, multiple=multiple, max_pixels=MAX_INPUT_PIXELS)
        except ValueError as error:
            raise DecodeError(f"{sample['key']}: {error}") from error


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items to one batch as it travels: images are uint8 (B, H, W, 3) and labels raw until they are on the device."""

    def stack(name: str) -> Tensor:
        return default_collate([item[name] for item in items])  # in a worker: straight into shared memory

    batch: dict[str, Any] = {name: stack(name) for name in ("image", "disparity", "valid")}
    batch |= {
        "pseudo": torch.tensor([item["pseudo"] for item in items]),
        "weight": torch.tensor([item["weight"] for item in items], dtype=torch.float32),
        "kind": [item["kind"] for item in items],
        "key": [item["key"] for item in items],
        "skipped": [skip for item in items for skip in item["skipped"]],
        "consumed": items[0]["consumed"],
    }
    if any(item["pseudo"] for item in items):
        batch["cutmix"] = stack("cutmix")
    if any("whole" in item for item in items):
        batch["teacher_input"] = _by_shape(items)
    return batch


def _by_shape(items: Sequence[Mapping[str, Any]]) -> list[TeacherInput]:
    """The whole images of the items that have one, (n, h, w, 3) of each shape."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(items):
        if "whole" in item:
            groups.setdefault(item["whole"].shape, []).append(i)
    return [
        TeacherInput(
            places=torch.tensor(index),
            image=default_collate([items[i]["whole"] for i in index]),
            rows=default_collate([items[i]["pixels"][0] for i in index]),
            columns=default_collate([items[i]["pixels"][1] for i in index]),
        )
        for index in groups.values()
    ]


class EvalDataset(Dataset[EvalBatch]):
    """Labelled images for validation: the whole image at the network's size, the label at its own (recipe of V1, V2).

    Args:
        sources: labelled sources.
        size: short side at the network's input in pixels.
        multiple: the network's patch size.
        limit: images per source; None: all.
    """

    def __init__(self, sources: Sequence[Source], *, size: int, multiple: int, limit: int | None) -> None:
        self.size, self.multiple = size, multiple
        self.spots = [(source, i) for source in sources for i in range(min(len(source), limit or len(source)))]

    def __len__(self) -> int:
        return len(self.spots)

    def __getitem__(self, index: int) -> EvalBatch:
        if index >= len(self):  # for a rank that has no image: a loader without a batch stops the run
            return EvalBatch(source="", key=[], skipped=[])
        source, i = self.spots[index]
        item = EvalBatch(source=source.name, key=[source.key(i)], skipped=[])
        try:
            sample = source.read(i)
            item["factor"] = getattr(source, "factor", None) or 1.0
        except (DecodeError, ShardError, OSError) as error:
            item["skipped"] = [Skip(source.name, source.key(i), str(error))]
            return item
        if not has_label(sample):
            raise ValueError(f"{source.key(i)} has no label: sources under data.validation must be labelled")
        sides = lower_bound_size(*sample["image"].shape[:2], size=self.size, multiple=self.multiple)
        image = resize_image(sample["image"].astype(np.float32) / 255, sides, antialias=False)
        item["image"], item["original"] = normalise_image(torch.from_numpy(image)[None]), sample["image"]
        item["disparity"] = torch.from_numpy(sample["disparity"])[None]
        item["valid"] = torch.from_numpy(sample["valid"] & ~sample["sky"])[None]
        return item


def normalise_image(image: Tensor) -> Tensor:
    """(B, H, W, 3) uint8, or float in [0, 1], to (B, 3, H, W) float32 with ImageNet mean and standard deviation."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    mean = torch.tensor(IMAGENET_MEAN, device=image.device)
    std = torch.tensor(IMAGENET_STD, device=image.device)
    return ((image - mean) / std).permute(0, 3, 1, 2).contiguous()


class SignalSafeLoader(DataLoader[dict[str, Any]]):
    """Its workers begin with the stop signals blocked: one that comes before `start_worker` runs waits for it."""

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(_: int) -> None:
    """In a loader worker: a signal to stop is handed to the rank, whose business it is; and one thread is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # for the thread to fetch them
    threading.Thread(target=_hand_on_signals, daemon=True).start()
    one_thread()
    keep_memory()


def keep_memory() -> None:
    """Blocks that are freed are used again: by itself, glibc has the system clear fresh pages for image after image.

    A tenth of the loader's time. Other systems are left as they are.
    """
    with suppress(OSError, AttributeError, TypeError):
        for limit in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
            ctypes.CDLL(None).mallopt(limit, 1 << 30)


def one_thread() -> None:
    """Turns OpenCV's threads off. A fork of a process that has some would wait for them for ever: no second call."""
    if cv2.getNumThreads() > 1:
        cv2.setNumThreads(1)


def _hand_on_signals() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None and rank.pid
    while True:
        told = signal.sigwaitinfo(STOP_SIGNALS)
        if told.si_pid == rank.pid:  # a rank ends its workers with SIGTERM
            os._exit(0)
        os.kill(rank.pid, told.si_signo)


def _present(sources: Mapping[str, Source | None]) -> dict[str, Source]:
    """Without the sources that a config sets to null, or gives no weight."""
    there = {name: source for name, source in sources.items() if source is not None}
    return {name: source for name, source in there.items() if getattr(source, "weight", 1.0) > 0}


class DepthData(pl.LightningDataModule):
    """Sources, mix and order as loaders.

    Args:
        name: of the data set as a whole, in run records.
        read: how the mixture's labelled sources are read, raw or shards, for them to refer to; null: each says it.
        sources: labelled sources by name.
        unlabelled: unlabelled sources by name.
        validation: labelled sources by name, never trained on.
        max_depth: farther pixels are left out of the metrics, by validation source; in metres, or in the unit of a set
            that is not metric; null: none.
        num_workers: loader processes for each rank.
        start_method: how they start; null: as Python does on this system.
        reduced_decode: JPEGs in shards whose short side is twice the crop or more are decoded at 1/2, 1/4 or 1/8: in
            about half the time, but smoother than what the network meets when it predicts. Not where labels are online.
        window: shards that are shuffled into each other.
        limit: images per source; null: all.
        skip_limit: largest share of damaged samples before the run stops; ten are always allowed.
        mix: what a batch is made of.
        augment: training views by part.
        batch_size: images of all processes together.
        seed: of the order and of every perturbation.
        online: whether the teacher labels inside the student's step; what is stored is then not asked for.
    """

    def __init__(
        self,
        *,
        name: str,
        sources: Mapping[str, Source | None],
        unlabelled: Mapping[str, Source | None],
        validation: Mapping[str, Source | None],
        max_depth: Mapping[str, float | None],
        num_workers: int,
        start_method: Literal["fork", "forkserver", "spawn"] | None,
        reduced_decode: bool,
        window: int,
        limit: int | None,
        skip_limit: float,
        mix: Mix | None = None,
        augment: Mapping[str, Augment] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        online: bool = False,
        read: Literal["raw", "shards"] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.sources, self.unlabelled, self.validation = _present(sources), _present(unlabelled), _present(validation)
        self.max_depth = {  # by the name that stands in a batch
            source.name: max_depth.get(name, max_depth.get(source.name)) for name, source in self.validation.items()
        }
        self.num_workers, self.start_method = num_workers, start_method
        self.reduced_decode, self.window, self.limit = reduced_decode, window, limit
        self.skip_limit, self.mix, self.augment = skip_limit, mix, augment or {}
        self.batch_size, self.seed, self.online = batch_size, seed, online
        self.eval_size, self.eval_multiple = 0, 1  # the model's; set by the verb
        self.teacher_size, self.teacher_multiple = 0, 1  # of its input, where labels are made online; set by the verb
        self.cursor: Callable[[], int] = lambda: 0
        self._ready = False

    @property
    def used(self) -> list[Source]:
        """What the run reads, validation last."""
        return list(self._used().values())

    def _used(self) -> dict[str, Source]:
        """By option. Where the mix has no labelled images, the mean map of the table still is theirs."""
        groups = {"sources": self.sources, "unlabelled": self.unlabelled, "validation": self.validation}
        if self.mix and not self.mix.labelled and not self.validation:
            del groups["sources"]
        if not self.mix or not self.mix.unlabelled:
            del groups["unlabelled"]
        return {f"data.{group}.{name}": source for group, of in groups.items() for name, source in of.items()}

    def prepare_data(self) -> None:
        """Looks whether all sources are there, then packs and lists them; on one process of a machine, before `setup`.

        Raises:
            ShardError: sources cannot be used; each is told in a line, and nothing is packed while one is not there.
        """
        if self._ready:  # Lightning asks again, and a look at every file of a big set takes its time
            return
        self.check()
        self._each("prepare")

    def check(self) -> None:
        """Looks whether all sources are there.

        Raises:
            ShardError: some are not; each is told in a line.
        """
        self._each("check")

    def _each(self, step: str) -> None:
        problems = []
        for option, source in self._used().items():
            if hasattr(source, "limit"):
                source.limit = self.limit
            try:
                getattr(source, step, lambda: None)()
            except ValueError as error:
                root = getattr(source, "root_option", "root")
                without = f"{option}.weight=0" if hasattr(source, "weight") else f"{option}=null"
                problems.append(f"{error} ({option}.{root}=FOLDER; {without} leaves the set out)")
        if problems:
            if len(problems) > 1:
                problems.append(f"all at once: {PATHS}")
            raise ShardError("\n".join(problems))

    def setup(self, stage: str | None = None) -> None:
        """Opens the sources; repeated calls change nothing."""
        if self._ready:
            return
        seen = {"labelled": self.sources, "unlabelled": {} if self.online else self.unlabelled}  # a teacher sees all
        for part, sources in seen.items() if self.reduced_decode else ():
            for source in sources.values():
                if hasattr(source, "reduce_to"):
                    source.reduce_to = self.augment[part].size
        for source in self.used:
            if hasattr(source, "limit"):
                source.limit = self.limit
            if hasattr(source, "window"):
                source.window = self.window
            if hasattr(source, "open"):
                source.open()
        self._ready = True

    @property
    def parts(self) -> dict[str, Part]:
        """labelled and unlabelled, as far as the mix has them."""
        assert self.mix is not None
        named = {"labelled": (self.mix.labelled, self.sources), "unlabelled": (self.mix.unlabelled, self.unlabelled)}
        return {
            part: Part(list(sources.values()), seed=self.seed, window=self.window, limit=self.limit)
            for part, (share, sources) in named.items()
            if share
        }

    @property
    def num_samples(self) -> int:
        """Samples of the whole run: the epoch times mix.epochs."""
        assert self.mix is not None
        counted = self.unlabelled if self.mix.unlabelled else self.sources
        return sum(images_per_epoch(source, self.limit) for source in counted.values()) * self.mix.epochs

    def train_dataset(self) -> MixedDataset:
        """Training views by Spot."""
        assert not self.online or self.teacher_size, "labels made online need the size of the teacher's input"
        teacher = (self.teacher_size, self.teacher_multiple) if self.online else None
        return MixedDataset(self.parts, self.augment, seed=self.seed, teacher=teacher)

    def first_spots(self, part: str, number: int) -> list[Spot]:
        """The first positions of a part's order, for pictures."""
        return [Spot(part, position, 1.0, 0) for position in range(min(number, len(self.parts[part])))]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches from the cursor on."""
        assert self.mix is not None
        trainer = self.trainer
        batches = CursorBatches(
            cursor=self.cursor,
            done=lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer else 0,
            total=self.num_samples,
            size=self.batch_size,
            labelled=self.mix.labelled,
            unlabelled=self.mix.unlabelled,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
        one_thread()  # before workers are forked
        return SignalSafeLoader(
            self.train_dataset(),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            multiprocessing_context=self.start_method if self.num_workers else None,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """One image at a time; each rank has its own share, none twice."""
        dataset = EvalDataset(
            list(self.validation.values()), size=self.eval_size, multiple=self.eval_multiple, limit=self.limit
        )
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        mine = range(rank, max(len(dataset), world) if len(dataset) else 0, world)
        return DataLoader(dataset, batch_size=None, sampler=mine, num_workers=0)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> DepthBatch | dict[str, Any]:
        """Normalises images and labels on the device: bytes travel, and the loader's processes are spared."""
        if "image" in batch and batch["image"].dtype == torch.uint8:
            batch["image"] = normalise_image(batch["image"])
            batch["disparity"] = normalise(batch["disparity"], batch["valid"])  # over the crop's valid pixels
            if "teacher_input" in batch:
                batch["teacher_input"] = [
                    group._replace(image=group.image.permute(0, 3, 1, 2).contiguous())
                    for group in batch["teacher_input"]
                ]
        return batch

    def skips(self) -> list[Skip]:
        """What packing left out of the sources in use."""
        return [skip for source in self.used for skip in getattr(source, "skipped", [])]
