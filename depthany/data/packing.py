"""The packing job: the images of a set into shards of our own, or an index of those that others made.

Files that arrive later, while a set is still being downloaded, become shards behind the others. Each image is read
once: it is checked and hashed while it is packed.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthany.data.claims import Claim
from depthany.data.files import DecodeError, image_size, read_image
from depthany.data.plan import Item, Plan, items_at
from depthany.data.preparation import PLAN, Dropped, Job, Preparation, Survey
from depthany.data.shards import IMAGE_SUFFIXES, TAR, Shard, index_tar, write_catalog, write_index, write_shard
from depthany.data.sources.tree import Container, ImageTree, Listing, NothingFitsError, PackError, is_container
from depthany.geometry.resize import resize_image

MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
BATCH = 4096  # paths that are looked at together


class ImagePreparation(Preparation):
    """What both kinds of unlabelled sets share: looking into containers, and finding copies of one image.

    Args:
        source: the set.
        out: the folder of the set.
        min_side: images with a shorter side are dropped, in pixels.
        workers: processes; None: one for each core.
    """

    def __init__(self, *, source: ImageTree, out: Path, min_side: int, workers: int | None) -> None:
        super().__init__(name=source.name, out=out, workers=workers)
        self.source, self.min_side = source, min_side

    def look(self, path: str) -> Listing:
        """Looks into a container."""
        return self.source.look(path)

    def listings(self, plan: Plan, paths: Sequence[str]) -> dict[str, int]:
        """The images in each of some containers; those that are known and unchanged are not opened."""
        unknown = [path for path in paths if not plan.is_settled(path, self.source.root / path)]
        found = {path: plan.containers[path][2] for path in paths if path not in set(unknown)}
        looked: dict[int, Listing] = {}
        settled = 0
        for number, listing in self.all_of("look", unknown, "looking into archives"):
            looked[number] = listing
            while settled in looked:  # in the order of the files, whoever is faster
                path, listing = unknown[settled], looked[settled]
                found[path], settled = listing.images, settled + 1
                if listing.problem:
                    self.problems[path] = listing.problem
                else:
                    plan.settle(path, listing)
        return found

    def nothing(self) -> PackError:
        """Says that there is nothing to prepare, and why."""
        source = self.source
        for path, reason in self.problems.items():
            return PackError(f"nothing in root={source.root} can be used yet: {path}: {reason}")
        others = f"there are {', '.join(source.other)}" if source.other else "it holds no image, tar, LMDB or video"
        return NothingFitsError(f"root={source.root} holds nothing like {source.example} ({source.name}); {others}")

    def unused(self, surveys: Mapping[Path, Survey]) -> Iterator[tuple[Path, Dropped]]:
        """Every image whose bytes have come before, in the order of the shards."""
        hashes = np.frombuffer(b"".join(survey.hashes for survey in surveys.values()), np.uint64).reshape(-1, 2)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first comes first
        ordered, is_copy = hashes[order], np.zeros(len(order), bool)
        is_copy[1:] = (ordered[1:] == ordered[:-1]).all(1) & ordered[1:].any(1)
        originals = order[np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(order))))]
        pairs = dict(zip(order[is_copy].tolist(), originals[is_copy].tolist(), strict=True))
        named = np.unique([*pairs, *pairs.values()]).astype(np.int64)
        keys, start = dict[int, str](), 0
        rows = list[tuple[int, Path, int]]()
        for tar, survey in surveys.items():
            inside = named[np.searchsorted(named, start) : np.searchsorted(named, start + survey.images)].tolist()
            shard = self.shard(tar) if inside else None
            keys |= {number: shard.keys[number - start] for number in inside if shard}
            rows += [(number, tar, number - start) for number in inside if number in pairs]
            start += survey.images
        for number, tar, place in rows:
            yield tar, Dropped(keys[number], f"duplicate: of {keys[pairs[number]]}", tar.name, place=place)


class Packing(ImagePreparation):
    """Packs the images of a set into tars of our own, `<set>-000000.tar`.

    Args:
        source: the set.
        out: the folder for the shards.
        samples_per_shard: images in each tar.
        min_side: images with a shorter side are dropped, in pixels.
        max_side: images with a longer side are shrunk to this one and stored as JPEG, in pixels; None: all bytes stay
            as they are.
        quality: of these JPEGs, 1 to 100.
        workers: processes; None: one for each core.
    """

    def __init__(
        self,
        *,
        source: ImageTree,
        out: Path,
        samples_per_shard: int,
        min_side: int,
        max_side: int | None,
        quality: int,
        workers: int | None,
    ) -> None:
        super().__init__(source=source, out=out, min_side=min_side, workers=workers)
        self.samples_per_shard, self.max_side, self.quality = samples_per_shard, max_side, quality
        self._opened: tuple[str, Container] | None = None

    def plan(self) -> list[Job]:
        """Plans the images that are not planned yet, and those that could not be used and have changed since."""
        terms = {"name": self.source.name, "samples_per_shard": self.samples_per_shard, "min_side": self.min_side}
        terms |= {"max_side": self.max_side, "quality": self.quality, "frame_step_s": self.source.frame_step_s}
        plan = self.open_plan(terms)
        if plan.shards:
            for _, row in self.latest(self.surveys()):
                if self._has_changed(row):
                    plan.add(row.item, again=True)
        walk = self.source.walk()
        while batch := list(islice(walk, BATCH)):
            images = self.listings(plan, [path for path in batch if is_container(path)])
            files = set(plan.new([path for path in batch if path not in images]))
            for path in batch:
                if path in files:
                    plan.add(path)
                elif images.get(path, 0) > plan.taken[path]:
                    plan.add([path, plan.taken[path], images[path] - plan.taken[path]])
        plan.close_shard()
        plan.close()
        self.problems |= dict(self.source.problems)
        if not plan.shards:
            raise self.nothing()
        jobs: list[Job] = []
        for number, line in enumerate(plan.shards):
            if not (jobs and line.stream and line.stream == jobs[-1].stream):
                jobs.append(Job([], [], [], line.stream))
            jobs[-1].tars.append(self.tar(number))
            jobs[-1].images.append(line.images)
            jobs[-1].lines.append(line.offset)
        return jobs

    def _has_changed(self, row: Dropped) -> bool:
        """Whether a file that could not be used deserves another try."""
        path = self.source.root / (row.item if isinstance(row.item, str) else row.item[0])
        try:
            if row.reason.startswith("unreadable"):
                with open(path, "rb") as file:
                    return bool(file.read(1))
            return isinstance(row.item, str) and row.stamp not in (-1, path.stat().st_size)
        except OSError:
            return False

    def write(self, tar: Path, line: int, mine: Claim) -> int:
        """Makes a shard from its line of the plan."""
        skipped: list[tuple[str, str]] = []
        origins: list[tuple[str, int, Item]] = []
        samples = self._samples(items_at(self.out / PLAN, line), skipped, origins, mine)
        return write_shard(tar, samples, facts={"skipped": skipped, "origins": origins, "unused": []})

    def _samples(
        self, items: Sequence[Item], skipped: list[Any], origins: list[Any], mine: Claim
    ) -> Iterator[dict[str, Any]]:
        for item, member, data in self._contents(items):
            self.go_on()
            path = item if isinstance(item, str) else item[0]
            key = self.source.key(path, member)
            try:
                if isinstance(data, DecodeError):
                    raise data
                yield {"__key__": key, **self._sample(data)}
            except DecodeError as error:
                skipped.append((key, str(error)))
                size = -1 if isinstance(data, DecodeError) else len(data)
                origins.append((path if member is None else f"{path}/{member}", size, item))
        self.go_on(mine)

    def _contents(self, items: Sequence[Item]) -> Iterator[tuple[Item, str | None, bytes | DecodeError]]:
        for item in items:
            if isinstance(item, str):
                try:
                    yield item, None, self.source.read(item)
                except DecodeError as error:
                    yield item, None, error
                continue
            path, number, count = item
            last = number + count
            try:
                for member, data in self._container(path).read(number, count):
                    yield [path, number, 1], member, data
                    number += 1
            except DecodeError as error:
                yield from (([path, rest, 1], f"image {rest}", DecodeError(str(error))) for rest in range(number, last))

    def _container(self, path: str) -> Container:
        if self._opened is None or self._opened[0] != path:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = path, self.source.open(path)
        return self._opened[1]

    def _sample(self, data: bytes) -> dict[str, Any]:
        content = hashlib.sha256(data).hexdigest()[:32]
        size = measured(data, min_side=self.min_side)
        suffix = next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), None)
        if self.max_side and max(size) > self.max_side:
            share = self.max_side / max(size)
            size = max(round(size[0] * share), 1), max(round(size[1] * share), 1)
            image = resize_image(decoded(data, reduce_to=min(size)), size, antialias=True)
            suffix, data = "jpg", _encoded(".jpg", image, cv2.IMWRITE_JPEG_QUALITY, self.quality)
        elif suffix is None:  # BMP, GIF, TIFF and netpbm are not read from shards; nothing is lost
            suffix, data = "png", _encoded(".png", decoded(data), cv2.IMWRITE_PNG_COMPRESSION, 3)
        else:
            decoded(data, reduce_to=1)
        return {suffix: data, "__row__": {"hash": content, "width": size[1], "height": size[0]}}


def measured(data: bytes, *, min_side: int) -> tuple[int, int]:
    """(H, W) of an upright image, by its header.

    Raises:
        DecodeError: no image, or too small.
    """
    try:
        height, width = image_size(data)
    except DecodeError as error:
        raise DecodeError(f"undecodable: {error}") from error
    if min(height, width) < min_side:
        raise DecodeError(f"tiny: {width}x{height} pixels")
    return height, width


def decoded(data: bytes, *, reduce_to: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image that decodes whole, as `read_image`; a reduced JPEG shows the same damage.

    Raises:
        DecodeError: it does not.
    """
    try:
        return read_image(data, reduce_to=reduce_to)
    except DecodeError as error:
        raise DecodeError(f"undecodable: {error}") from error


def _encoded(suffix: str, image: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(suffix, image[..., ::-1], options)[1].tobytes()


class Indexing(ImagePreparation):
    """Indexes the tars of others where they are; `out` gets the catalog and an index for each tar.

    Args:
        source: the tars.
        out: the folder for catalog and indices.
        min_side: images with a shorter side are not used, in pixels.
        workers: processes; None: one for each core.
    """

    def plan(self) -> list[Job]:
        """One job for each tar; the index of a tar that has changed is made again."""
        plan = Plan(self.out / PLAN, {"name": self.source.name, "min_side": self.min_side})
        tars = list(self.source.walk())
        for path in tars:
            if path in plan.containers and not plan.is_settled(path, self.source.root / path):
                (self.out / path).with_suffix(".json").unlink(missing_ok=True)
        images = self.listings(plan, tars)
        plan.close()
        self.problems |= dict(self.source.problems)
        self.problems |= {path: "unsafe: no name for a catalog: rename it" for path in tars if not TAR.fullmatch(path)}
        usable = [path for path in tars if path not in self.problems]
        if not usable:
            raise self.nothing()
        return [Job([self.out / path], [images[path]], [0]) for path in usable]

    def write(self, tar: Path, line: int, mine: Claim) -> int:
        """Writes the index of a tar, with size and hash of each image that can be used."""
        original = self.source.root / tar.name
        index = index_tar(original, foreign=True)
        skipped = [(f"{self.source.name}/{key}", f"unsafe: {why}") for key, why in index["facts"]["skipped"]]
        index["facts"] |= {"skipped": skipped, "unused": []}
        with open(original, "rb") as file:
            for place, row in enumerate(index["samples"]):
                self.go_on()
                row["key"] = f"{self.source.name}/{row['key']}"
                offset, size, _ = next(row["files"][suffix] for suffix in IMAGE_SUFFIXES if suffix in row["files"])
                data = os.pread(file.fileno(), size, offset)
                try:
                    row["height"], row["width"] = measured(data, min_side=self.min_side)
                    decoded(data, reduce_to=1)
                    row["hash"] = hashlib.sha256(data).hexdigest()[:32]
                except DecodeError as error:
                    index["facts"]["unused"].append((place, str(error)))
        self.go_on(mine)
        write_index(tar.with_suffix(".json"), index)
        return len(index["samples"]) - len(index["facts"]["unused"])

    def is_mine(self, tar: Path) -> bool:
        """Whether a tar of others is still there."""
        return (self.source.root / tar.name).exists()

    def shard(self, tar: Path) -> Shard:
        """Its index lies in the output folder."""
        return Shard(self.source.root / tar.name, index=str(tar.with_suffix(".json")))

    def catalog(self, dropped: Mapping[str, Sequence[int]]) -> None:
        """The tars lie in the source's folder."""
        write_catalog(self.out, name=self.source.name, base=str(self.source.root.resolve()), dropped=dropped)
