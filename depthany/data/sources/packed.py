"""A source packed into shards: written once in parallel, then read by offset like any other shards."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import cv2
from rich.progress import track

from depthany.data.files import DecodeError, read_image
from depthany.data.labels import decode_label, encode_truth, has_label
from depthany.data.shards import IMAGE_SUFFIXES, Shard, ShardError, image_shards, label_path, write_shard
from depthany.geometry.resize import resize_image, resize_label
from depthany.types import DepthSample, ImageSample, Skip


class Packable(Protocol):
    """What can be packed: a source that names, counts and reads its samples."""

    name: str

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """The sample's key."""

    def identity(self) -> dict[str, Any]:
        """What the packed set depends on, but for the number of samples."""

    def prepare(self) -> None:
        """Fetches or checks what reading needs."""

    def read(self, index: int) -> ImageSample | DepthSample:
        """The image, with its label if it has one."""


class Shards:
    """Image shards of one folder as a source; with a teacher's name, its pseudo-labels from the sibling shards.

    Args:
        name: of the set.
        root: the folder that holds `<set>-000000.tar` and their indices.
    """

    def __init__(self, *, name: str, root: str) -> None:
        self.name, self.root = name, Path(root)
        self.teacher: str | None = None
        self.limit: int | None = None

    def prepare(self) -> None:
        """Refuses a folder without shards.

        Raises:
            ShardError: there are none.
        """
        if not image_shards(self.root):
            raise ShardError(f"{self.name}: no shards <set>-000000.tar in {self.root}")

    @property
    def tars(self) -> list[Path]:
        """The image shards, in order."""
        return image_shards(self.root)

    def open(self) -> None:
        """Opens every index; the label indices too where a teacher is set.

        Raises:
            ShardError: an index is missing, or labels do not cover the images.
        """
        self._shards = [Shard(tar) for tar in self.tars]
        self._labels = [Shard(label_path(tar, self.teacher)) for tar in self.tars] if self.teacher else []
        for images, labels in zip(self._shards, self._labels, strict=False):
            if not set(labels.keys) <= set(images.keys):
                raise ShardError(f"{labels.tar} labels images that {images.tar.name} does not hold: label it again")
        self._at = [{key: i for i, key in enumerate(labels.keys)} for labels in self._labels]
        self._ends = list(accumulate(self.chunks))

    @property
    def chunks(self) -> list[int]:
        """Samples in each shard."""
        counts, left = [], self.limit
        for shard in self._shards:
            counts.append(len(shard) if left is None else min(len(shard), left))
            left = None if left is None else left - counts[-1]
        return counts

    @property
    def skipped(self) -> list[Skip]:
        """What packing left out."""
        return [Skip(self.name, *row) for shard in self._shards for row in shard.facts.get("skipped", [])]

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[int, int]:
        chunk = bisect_right(self._ends, index)
        return chunk, index - (self._ends[chunk - 1] if chunk else 0)

    def key(self, index: int) -> str:
        """The sample's key."""
        chunk, offset = self._locate(index)
        return self._shards[chunk].keys[offset]

    def read(self, index: int) -> ImageSample | DepthSample:
        """The image, with its stored label or the teacher's.

        Raises:
            DecodeError: damaged, or the teacher's label is missing.
        """
        chunk, offset = self._locate(index)
        shard = self._shards[chunk]
        key, files = shard.keys[offset], shard.files[offset]
        suffix = next((s for s in IMAGE_SUFFIXES if s in files), None)
        if suffix is None:
            raise DecodeError(f"{key}: no image ({', '.join(IMAGE_SUFFIXES)}) in {shard.tar.name}")
        try:
            image = ImageSample(image=read_image(shard.read(offset, suffix)), key=key)
            if self.teacher:
                if key not in self._at[chunk]:
                    raise DecodeError(f"{key}: {self._labels[chunk].tar.name} has no label for it")
                shard, offset = self._labels[chunk], self._at[chunk][key]
                files = shard.files[offset]
            elif "json" not in files:
                return image
            return DepthSample(**image, **decode_label(partial(shard.read, offset), files))
        except DecodeError:
            raise
        except (ValueError, KeyError, TypeError, EOFError, cv2.error) as error:  # what damaged members raise
            raise DecodeError(f"{key}: {error}") from error


class Packed(Shards):
    """A source that is packed into shards on first use and read from them ever after.

    Args:
        source: what to pack.
        root: where the set's folder is made; its name holds a hash of what was packed.
        samples_per_shard: images in each tar.
        short_side: larger images and labels are shrunk to this many pixels on the short side, which makes reading
            several times faster; null: nothing is changed, and JPEG, PNG and WebP keep their bytes.
    """

    def __init__(self, *, source: Packable, root: str, samples_per_shard: int, short_side: int | None) -> None:
        self.source, self.samples_per_shard, self.short_side = source, samples_per_shard, short_side
        identity = json.dumps([source.identity(), samples_per_shard, short_side], sort_keys=True, default=str)
        folder = f"{source.name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        super().__init__(name=source.name, root=str(Path(root) / folder))

    @property
    def tars(self) -> list[Path]:
        """The image shards, in order; whether or not they are written yet."""
        count = len(self.source) if self.limit is None else min(self.limit, len(self.source))
        return [self.root / f"{self.name}-{i:06d}.tar" for i in range(-(-count // self.samples_per_shard))]

    @property
    def chunks(self) -> list[int]:
        """Samples in each shard that are in use: a set may have been packed longer than it is asked for now."""
        return [min(count, len(self._range(i))) for i, count in enumerate(super().chunks)]

    def prepare(self) -> None:
        """Packs what is missing, in parallel; a shard that is there and whole is kept."""
        self.source.prepare()
        missing = [i for i, tar in enumerate(self.tars) if not self._is_whole(i, tar)]
        if not missing:
            return
        workers = min(os.cpu_count() or 1, len(missing))
        note = f"packing {self.name}"
        if workers == 1:
            for i in track(missing, note):
                self._write(i)
            return
        with ProcessPoolExecutor(workers) as pool:
            list(track(pool.map(self._write, missing), note, total=len(missing)))

    def _range(self, shard: int) -> range:
        first = shard * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, len(self.source)))

    def _is_whole(self, index: int, tar: Path) -> bool:
        if not tar.with_suffix(".json").exists():
            return False
        shard = Shard(tar)  # a size that differs from the index's is the user's to decide: an error, not a rewrite
        return len(shard) + len(shard.facts.get("skipped", [])) >= len(self._range(index))

    def _write(self, index: int) -> None:
        skipped: list[tuple[str, str]] = []
        facts: dict[str, Any] = {"source": self.source.identity(), "skipped": skipped}
        write_shard(self.tars[index], self._samples(index, skipped), facts=facts)

    def _samples(self, index: int, skipped: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
        for i in self._range(index):
            try:
                sample = self.source.read(i)
                if self.short_side:
                    sample = shrink(sample, self.short_side)
                members = self._image(i, sample)
                if has_label(sample):
                    members |= encode_truth(sample)
                yield {"__key__": sample["key"], **members}
            except (DecodeError, OSError) as error:
                skipped.append((self.source.key(i), str(error)))

    def _image(self, index: int, sample: ImageSample | DepthSample) -> dict[str, bytes]:
        """The original bytes where the source has them in a format that shards hold, else PNG: nothing is lost."""
        if hasattr(self.source, "data") and not self.short_side:
            data: bytes = self.source.data(index)
            for suffix, magic in (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG"), ("webp", b"RIFF")):
                if data.startswith(magic):
                    return {suffix: data}
        return {"png": cv2.imencode(".png", sample["image"][..., ::-1])[1].tobytes()}


def shrink(sample: ImageSample | DepthSample, short_side: int) -> ImageSample | DepthSample:
    """The sample with image and label at most `short_side` pixels on the short side; smaller ones are left alone."""

    def sides(shape: tuple[int, ...]) -> tuple[int, int]:
        share = min(short_side / min(shape[:2]), 1.0)
        return round(shape[0] * share), round(shape[1] * share)

    image = sample["image"]
    small: Any = sample | {"image": resize_image(image, sides(image.shape), antialias=True)}
    if has_label(sample):
        size = sides(sample["disparity"].shape)
        label = resize_label(sample["disparity"], sample["valid"], sample["sky"], size)
        small |= dict(zip(("disparity", "valid", "sky"), label, strict=True))
    return small
