"""The packing job of a labelled set: the samples of a reader into shards from which training reads the same samples.

Samples whose files arrive later, while a set is still being downloaded, become shards behind the others. So do those
that could not be used, and those that were packed, once their files are others than they were: the latest counts.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import cv2

from depthany.data.claims import Claim
from depthany.data.files import DecodeError
from depthany.data.labels import encode_truth
from depthany.data.packing import MAGIC
from depthany.data.plan import Item, items_at
from depthany.data.preparation import PLAN, Dropped, Job, Preparation, Survey
from depthany.data.shards import write_shard
from depthany.data.sources.folder_pair import FolderPair
from depthany.data.sources.index_csv import IndexCsv
from depthany.data.sources.raw import Raw, Row
from depthany.data.sources.tree import PackError
from depthany.types import DepthSample

UNREADABLE = -1  # the stamp of a sample whose files could not be read

Stats = list[tuple[int, int]]  # bytes and time in ns of each file of a sample; -1, 0: it is not there


class TruthPacking(Preparation):
    """Packs a labelled set into tars of our own, `<set>-000000.tar`.

    A sample holds the picture, the label as float32 without loss, and a JSON: the kind of depth, where it comes from,
    and the size and sha256 of every file it was made of.

    Args:
        source: the reader of the set.
        out: the folder for the shards.
        samples_per_shard: samples in each tar.
        pictures: keep: JPEG, PNG and WebP keep their bytes, others become PNG; fast: what is not JPEG is stored as bare
            pixels, which are read some 20 times as fast as a PNG and take up to twice its room.
        workers: processes; None: one for each core.

    Raises:
        PackError: the name of the source cannot stand in a file's name.
    """

    def __init__(
        self,
        *,
        source: Raw | IndexCsv,
        out: Path,
        samples_per_shard: int,
        pictures: Literal["keep", "fast"],
        workers: int | None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", source.name):
            raise PackError(f"dataset.name={source.name} cannot name files: use letters, digits, _ . + -")
        super().__init__(name=source.name, out=out, workers=workers)
        self.source, self.samples_per_shard, self.pictures = source, samples_per_shard, pictures

    def plan(self) -> list[Job]:
        """Plans the samples that are not planned yet, and those whose files have changed since they were read."""
        keys = self._scan()
        terms: dict[str, Any] = {"samples_per_shard": self.samples_per_shard, "pictures": self.pictures}
        if isinstance(self.source, FolderPair | IndexCsv):  # one's own: another root is another set
            terms["root"] = str(self.source.root.resolve())
        plan = self.open_plan({"name": self.name} | self._origin | terms)
        if plan.shards:
            for key in self._changed():
                plan.add(key, again=True)
        for key in plan.new(keys):
            plan.add(key)
        plan.close_shard()
        plan.close()
        return [Job([self.tar(n)], [line.images], [line.offset]) for n, line in enumerate(plan.shards)]

    def _scan(self) -> list[str]:
        """The keys of the samples that are there now."""
        for known in ("_places", "_checksums", "_origin"):  # by an earlier run of this process
            self.__dict__.pop(known, None)
        try:
            if isinstance(self.source, Raw):
                self.source.prepare()
                for skip in self.source.skipped:
                    path = skip.key.removeprefix(f"{self.name}/")
                    self.problems[path] = f"left out: {skip.reason}"
            return list(self._places)
        except OSError as error:
            where, why = error.filename or self.source.root, error.strerror or error
            raise PackError(f"{where} cannot be read ({why}): the samples are listed from it") from error
        except ValueError as error:
            raise PackError(str(error)) from error

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """What decides on the content of every sample."""
        identity = {key: value for key, value in self.source.identity().items() if key not in ("rows", "version")}
        return {"dataset": "index_csv"} | identity

    def _changed(self) -> list[str]:
        """Keys of samples whose files or row are others than when they were dropped or packed."""
        last: dict[str, tuple[int, str | None, int]] = {}  # number of the shard, hash, stamp
        for tar, survey in self.surveys().items():
            number = int(tar.stem.rpartition("-")[2])
            last |= {row["key"]: (number, row["hash"], 0) for row in self.shard(tar).rows}
            last |= {row.key: (number, None, row.stamp) for row in survey.dropped}
        known = [
            (key, self._places[key], packed, stamp)
            for key, (number, packed, stamp) in last.items()
            if key in self._places and self.again.get(json.dumps(key), -1) <= number
        ]

        def has_changed(index: int, packed: str | None, stamp: int) -> bool:
            row = self.source.row(index)
            stats = self._stats(row)
            if packed is not None:
                return meaning(row, stats) != packed
            return self._are_readable(row) if stamp == UNREADABLE else self._stamp(row, stats) != stamp

        with ThreadPoolExecutor(16) as pool:  # a look at a file on a network disk takes its time
            changed = pool.map(lambda sample: has_changed(*sample[1:]), known)
            return [sample[0] for sample in compress(known, changed)]

    def unused(self, surveys: Mapping[Path, Survey]) -> Iterator[tuple[Path, Dropped]]:
        """Samples that were packed again in a later shard."""
        latest = dict[str, Path]()
        for tar in reversed(list(surveys) if self.again else []):
            for place, key in enumerate(self.shard(tar).keys):
                if latest.setdefault(key, tar) != tar:
                    reason = f"replaced: its files have changed, {latest[key].name} has it now"
                    yield tar, Dropped(key, reason, tar.name, place=place)

    # A shard

    def write(self, tar: Path, line: int, mine: Claim) -> int:
        """Makes a shard from its line of the plan."""
        skipped: list[tuple[str, str]] = []
        origins: list[tuple[str, int, Item]] = []
        samples = self._samples(items_at(self.out / PLAN, line), skipped, origins, mine)
        facts: dict[str, Any] = {"source": self._origin, "factor": self._factor, "unused": []}
        return write_shard(tar, samples, facts=facts | {"skipped": skipped, "origins": origins})

    def _samples(
        self, keys: Sequence[Item], skipped: list[Any], origins: list[Any], mine: Claim
    ) -> Iterator[dict[str, Any]]:
        for key in map(str, keys):
            self.go_on()
            if key not in self._places:  # its files were deleted since they were planned
                skipped.append((key, "unreadable: its files are gone"))
                origins.append(("", UNREADABLE, key))
                continue
            row = self.source.row(self._places[key])
            stats = self._stats(row)
            try:
                sample = self._sample(self._places[key], row)
            except (ValueError, OSError) as error:
                skipped.append((key, _reason(error)))
                stamp = UNREADABLE if isinstance(error, OSError) else self._stamp(row, stats)
                origins.append((row.image, stamp, key))
            else:
                yield {"__key__": key, **sample, "__row__": {"hash": meaning(row, stats)}}
        self.go_on(mine)

    def _sample(self, index: int, row: Row) -> dict[str, bytes]:
        sample = self.source.read(index)
        files = {path: self._noted(path) for path in row.files}
        extra = {name: value for name, value in row.extra.items() if value not in row.files}
        note = {"source": self._origin, "factor": self._factor, "files": files, "extra": extra}
        return self._picture(index, sample) | encode_truth(sample, note=note)

    def _picture(self, index: int, sample: DepthSample) -> dict[str, bytes]:
        """The original bytes where the picture is a file that shards can hold, else without loss."""
        data = self.source.data(index)
        suffix = next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), None)
        if suffix == "jpg" or (suffix and self.pictures == "keep"):
            return {suffix: data}
        suffix = "png" if self.pictures == "keep" else "ppm"
        return {suffix: cv2.imencode(f".{suffix}", sample["image"][..., ::-1])[1].tobytes()}

    @property
    def _factor(self) -> float | None:
        """Of the disparity."""
        return getattr(self.source, "factor", None)

    def _noted(self, path: str) -> tuple[int, str]:
        """Bytes and sha256 of a file, which is read whole.

        Raises:
            DecodeError: its content is not what it was when the checksums of the set were taken.
        """
        file = self.source.root / path
        status = file.stat()
        digest = _sha256(file, status.st_size, status.st_mtime_ns)
        if self._checksums.get(path, digest) != digest:
            reason = f"its content is not what {self._checksums_file} says: fetch it again, or delete that list"
            raise _Changed(f"changed: {file}: {reason}")
        return status.st_size, digest

    # What is known of the files

    @cached_property
    def _places(self) -> dict[str, int]:
        """The place of each key in the reader's list."""
        try:
            return {self.source.key(index): index for index in range(len(self.source))}
        except ValueError as error:  # in a worker: a rival has made a longer list meanwhile
            raise PackError(str(error)) from error

    @property
    def _checksums_file(self) -> Path | None:
        return self.source.index_path.with_suffix(".sha256") if isinstance(self.source, Raw) else None

    @cached_property
    def _checksums(self) -> dict[str, str]:
        """What `Raw.verify` has noted, by path."""
        file = self._checksums_file
        lines = file.read_text(errors="surrogateescape").splitlines() if file and file.exists() else []
        return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}

    def _stats(self, row: Row) -> Stats:
        return [_stat(self.source.root / path) for path in row.files]

    def _stamp(self, row: Row, stats: Stats) -> int:
        """A number that changes when a sample that could not be used deserves another try."""
        return zlib.crc32(json.dumps([*row, stats, [self._checksums.get(path) for path in row.files]]).encode())

    def _are_readable(self, row: Row) -> bool:
        """Whether the files of a sample can be read now; that they could not need not have been their fault."""
        try:
            for path in row.files:
                with open(self.source.root / path, "rb") as file:
                    file.read(1)
        except OSError:
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("_places", "_checksums")}


class _Changed(DecodeError):
    """A file with another checksum than it had."""


def _reason(error: ValueError | OSError) -> str:
    if isinstance(error, OSError):
        return f"unreadable: {error.filename or 'its files'}: {error.strerror}; the next run tries it again"
    return str(error) if isinstance(error, _Changed) else f"undecodable: {error}"


def meaning(row: Row, stats: Stats) -> str:
    """A hash of what a sample is made of: the row, and the sizes of its files; times differ from copy to copy."""
    return hashlib.sha256(json.dumps([*row, [size for size, _ in stats]]).encode()).hexdigest()[:32]


def _stat(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Of a file as it is at that size and time; one that holds many samples is read once."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
