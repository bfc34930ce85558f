"""The data room's door to Lightning: sources, mix and order become batches of depthany.types."""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from depthany.data.augment import Augment, sample_rng
from depthany.data.files import DecodeError
from depthany.data.labels import has_label
from depthany.data.order import CursorBatches, EpochOrder, Spot
from depthany.geometry.disparity import normalise
from depthany.geometry.resize import lower_bound_size, resize_image
from depthany.types import IMAGENET_MEAN, IMAGENET_STD, DepthBatch, DepthKind, DepthSample, EvalBatch, ImageSample, Skip


class Source(Protocol):
    """What the mixture reads from."""

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


class Part:
    """Several sources as one: plain concatenation, each image as often as any other (V1 and V2, section 4.1)."""

    def __init__(self, sources: Sequence[Source], *, seed: int, window: int) -> None:
        self.sources = sources
        self._chunks = [(s, c) for s in sources for c in getattr(s, "chunks", [len(s)])]
        starts: list[int] = []
        for source in sources:
            chunks = getattr(source, "chunks", [len(source)])
            starts += [0, *accumulate(chunks)][:-1]
        self._starts = starts
        self.order = EpochOrder(counts=[count for _, count in self._chunks], seed=seed, window=window)

    def __len__(self) -> int:
        return len(self.order)

    def locate(self, position: int) -> tuple[Source, int]:
        """The source and the index in it of a position of the order."""
        chunk, index = self.order[position]
        return self._chunks[chunk][0], self._starts[chunk] + index


class MixedDataset(Dataset[dict[str, Any]]):
    """Reads the sample of a Spot and makes its training view. A damaged sample counts as used, with weight 0.

    An unlabelled source may hold labels of its own, as the embedded scenes do: only a teacher's are handed on.
    """

    def __init__(self, parts: Mapping[str, Part], augment: Mapping[str, Augment], *, seed: int, online: bool) -> None:
        self.parts, self.augment, self.seed, self.online = parts, augment, seed, online

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
                if not has_label(sample) and not (pseudo and self.online):
                    raise DecodeError(f"{item['key']}: no label")
                view = augment(sample, sample_rng(self.seed, spot.part, spot.position))
                item["kind"] = sample.get("kind", DepthKind.PSEUDO)
        except (DecodeError, OSError) as error:
            item |= {"weight": 0.0, "skipped": [Skip(source.name, item["key"], str(error))]}
        if "disparity" not in view:
            side = view["image"].shape[:2]
            view |= {"disparity": np.zeros(side, np.float32), "valid": np.zeros(side, bool)}
        return item | view


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Items to one batch; images stay uint8 until they are on the device."""

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([item[name] for item in items]))

    valid = stack("valid")
    batch: dict[str, Any] = {
        "image": stack("image"),
        "disparity": normalise(stack("disparity"), valid),  # after the crop, over its valid pixels
        "valid": valid,
        "pseudo": torch.tensor([item["pseudo"] for item in items]),
        "weight": torch.tensor([item["weight"] for item in items], dtype=torch.float32),
        "kind": [item["kind"] for item in items],
        "key": [item["key"] for item in items],
        "skipped": [skip for item in items for skip in item["skipped"]],
        "consumed": items[0]["consumed"],
    }
    if any(item["pseudo"] for item in items):
        batch |= {"clean": stack("clean"), "cutmix": stack("cutmix")}
    return batch


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
        source, i = self.spots[index]
        item = EvalBatch(source=source.name, key=[source.key(i)], skipped=[])
        try:
            sample = source.read(i)
        except (DecodeError, OSError) as error:
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


def start_worker(_: int) -> None:
    """In a loader worker: signals are the main process's business, and one thread is enough."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    cv2.setNumThreads(1)


def _present(sources: Mapping[str, Source | None]) -> dict[str, Source]:
    """Without the sources that a config sets to null."""
    return {name: source for name, source in sources.items() if source is not None}


class DepthData(pl.LightningDataModule):
    """Sources, mix and order as loaders.

    Args:
        name: of the data set as a whole, in run records.
        sources: labelled sources by name.
        unlabelled: unlabelled sources by name.
        validation: labelled sources by name, never trained on.
        max_depth: farther pixels are left out of the metrics, by validation source, in the source's unit; null: none.
        num_workers: loader processes for each rank.
        window: shards that are shuffled into each other.
        limit: images per source; null: all.
        skip_limit: largest share of damaged samples before the run stops.
        mix: what a batch is made of.
        augment: training views by part.
        batch_size: images of all processes together.
        seed: of the order and of every perturbation.
        labels: offline or online pseudo-labels.
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
        window: int,
        limit: int | None,
        skip_limit: float,
        mix: Mix | None = None,
        augment: Mapping[str, Augment] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        online: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.sources, self.unlabelled, self.validation = _present(sources), _present(unlabelled), _present(validation)
        self.max_depth, self.num_workers, self.window, self.limit = max_depth, num_workers, window, limit
        self.skip_limit, self.mix, self.augment = skip_limit, mix, augment or {}
        self.batch_size, self.seed, self.online = batch_size, seed, online
        self.eval_size, self.eval_multiple = 0, 1  # the model's; set by the verb
        self.cursor: Callable[[], int] = lambda: 0
        self._ready = False

    @property
    def used(self) -> list[Source]:
        """Labelled sources (the mean map of the table is theirs), unlabelled ones if the mix has them, validation."""
        unlabelled = self.unlabelled.values() if self.mix and self.mix.unlabelled else ()
        return [*self.sources.values(), *unlabelled, *self.validation.values()]

    def prepare_data(self) -> None:
        """Packs and checks every source; on one process of a machine."""
        for source in self.used:
            if hasattr(source, "limit"):
                source.limit = self.limit
            source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Opens the sources; repeated calls change nothing."""
        if self._ready:
            return
        for source in self.used:
            if hasattr(source, "limit"):
                source.limit = self.limit
            if hasattr(source, "open"):
                source.open()
        self._ready = True

    @property
    def parts(self) -> dict[str, Part]:
        """labelled and unlabelled, as far as the mix has them."""
        assert self.mix is not None
        named = {"labelled": (self.mix.labelled, self.sources), "unlabelled": (self.mix.unlabelled, self.unlabelled)}
        return {
            part: Part(list(sources.values()), seed=self.seed, window=self.window)
            for part, (share, sources) in named.items()
            if share
        }

    @property
    def num_samples(self) -> int:
        """Samples of the whole run: the epoch times mix.epochs."""
        assert self.mix is not None
        counted = self.unlabelled if self.mix.unlabelled else self.sources
        total = sum(sum(getattr(s, "chunks", [len(s)])) for s in counted.values())
        return total * self.mix.epochs

    def train_dataset(self) -> MixedDataset:
        """Training views by Spot."""
        return MixedDataset(self.parts, self.augment, seed=self.seed, online=self.online)

    def first_spots(self, part: str, number: int) -> list[Spot]:
        """The first positions of a part's order, for pictures."""
        return [Spot(part, position, 1.0, 0) for position in range(min(number, len(self.parts[part])))]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches from the cursor on."""
        assert self.mix is not None
        trainer = self.trainer
        batches = CursorBatches(
            cursor=self.cursor,
            total=self.num_samples,
            size=self.batch_size,
            labelled=self.mix.labelled,
            unlabelled=self.mix.unlabelled,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )
        return DataLoader(
            self.train_dataset(),
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            worker_init_fn=start_worker,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """One image at a time; each rank has its own share, none twice."""
        dataset = EvalDataset(
            list(self.validation.values()), size=self.eval_size, multiple=self.eval_multiple, limit=self.limit
        )
        trainer = self.trainer
        mine = range(trainer.global_rank if trainer else 0, len(dataset), trainer.world_size if trainer else 1)
        return DataLoader(dataset, batch_size=None, sampler=mine, num_workers=0)

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> DepthBatch | dict[str, Any]:
        """Normalises on the device: bytes travel, floats do not."""
        for name in ("image", "clean"):
            if name in batch and batch[name].dtype == torch.uint8:
                batch[name] = normalise_image(batch[name])
        return batch

    def skips(self) -> list[Skip]:
        """What packing left out of the sources in use."""
        return [skip for source in self.used for skip in getattr(source, "skipped", [])]
