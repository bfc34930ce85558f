"""The packing job of a labelled set: the samples of a reader into shards from which training reads the same samples.

Samples whose files arrive later, while a set is still being downloaded, become shards behind the others. So do those
that could not be used, and those that were packed, once their files are others than they were: the latest counts.
"""

import errno
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, lru_cache
from itertools import compress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2

from depthany.data.claims import Claim
from depthany.data.files import DecodeError
from depthany.data.labels import encode_truth
from depthany.data.packing import MAGIC
from depthany.data.plan import Item, items_at
from depthany.data.preparation import PLAN, Dropped, Job, Preparation, Survey
from depthany.data.shards import Shard, write_shard
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
        new = plan.new(keys)
        self._refuse_doubles(new)
        for key in new:
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
        last: dict[str, tuple[int, _Packed | int]] = {}  # number of the shard, what is packed there or its stamp
        for tar, survey in self.surveys().items():
            number, written = int(tar.stem.rpartition("-")[2]), _stat(tar)
            rows = _shard(tar, *written).rows
            last |= {row["key"]: (number, _Packed(tar, written, i, row["hash"])) for i, row in enumerate(rows)}
            last |= {row.key: (number, row.stamp) for row in survey.dropped}
        known = [
            (key, self._places[key], packed)
            for key, (number, packed) in last.items()
            if key in self._places and self.again.get(json.dumps(key), -1) <= number
        ]

        def has_changed(index: int, packed: _Packed | int) -> bool:
            row = self.source.row(index)
            stats = self._stats(row)
            if isinstance(packed, _Packed):
                return meaning(row, stats) != packed.meaning or self._is_rewritten(stats, packed)
            return self._are_readable(row) if packed == UNREADABLE else self._stamp(row, stats) != packed

        with ThreadPoolExecutor(16) as pool:  # a look at a file on a network disk takes its time
            changed = pool.map(lambda sample: has_changed(*sample[1:]), known)
            return [sample[0] for sample in compress(known, changed)]

    def _refuse_doubles(self, new: Sequence[str]) -> None:
        """A root one folder higher or lower gives the same samples other keys, and they would be packed twice.

        Raises:
            PackError: that is so.
        """
        packed = [row["key"] for tar in self.tars() if new for row in _shard(tar, *_stat(tar)).rows]
        gone = {tuple(parts): key for key in packed if key not in self._places for parts in [_parts(key)]}
        deeper = {parts[cut:]: key for parts, key in gone.items() for cut in range(1, len(parts) - 1)}
        for key in new if gone else ():
            parts = tuple(_parts(key))
            tails = (gone.get(parts[cut:]) for cut in range(1, len(parts) - 1))
            if old := deeper.get(parts) or next(filter(None, tails), None):
                raise PackError(
                    f"out={self.out} holds {old}, which seems to be {key} of root={self.source.root}: name the root "
                    "that it was packed from, or another folder as out"
                )

    def _is_rewritten(self, stats: Stats, packed: "_Packed") -> bool:
        """Whether a file was written after the shard, and holds something else; where it is noted, the note says so."""
        if max(time_ns for _, time_ns in stats) <= packed.written[1]:
            return False
        root, noted = self.source.root, self._checksums
        was = packed.digests()
        try:
            return any((noted.get(path) or _sha256(root / path, *_stat(root / path))) != was[path] for path in was)
        except OSError:  # it cannot be read now: what is packed stays
            return False

    def unused(self, surveys: Mapping[Path, Survey]) -> Iterator[tuple[Path, Dropped]]:
        """Samples that were packed again in a later shard."""
        latest = dict[str, Path]()
        for tar in reversed(list(surveys) if self.again else []):
            for place, key in enumerate(self.shard(tar).keys):
                if latest.setdefault(key, tar) != tar:
                    reason = f"replaced: its files have changed, {latest[key].name} has it now"
                    yield tar, Dropped(key, reason, tar.name, place=place)

    def _conclude(self, surveys: Mapping[Path, Survey]) -> list[Dropped]:
        """Also notes the checksums of a published set, which never changes; one's own is there to be improved."""
        dropped = super()._conclude(surveys)
        if isinstance(self.source, Raw) and not isinstance(self.source, FolderPair):
            try:
                self._note(self.source, surveys)
            except ValueError as error:  # somebody else's list, on a disk that cannot be written
                print(f"no checksums are noted: {error}")
        return dropped

    def _note(self, source: Raw, tars: Iterable[Path]) -> None:
        known = source.checksums()
        for tar in reversed(list(tars)):  # what was packed last counts
            written = _stat(tar)
            for place, packed in enumerate(_shard(tar, *written).rows):
                if packed["key"] in self._places:
                    row = source.row(self._places[packed["key"]])
                    files = [path for path in row.files if path != row.extra.get("sky")]  # masks may be made again
                    if not known.keys() >= set(files):
                        digests = _Packed(tar, written, place, packed["hash"]).digests()
                        known |= {path: digests[path] for path in files if path in digests and path not in known}
        source.note(known)

    # A shard

    def write(self, tar: Path, line: int, mine: Claim) -> int:
        """Makes a shard from its line of the plan."""
        skipped: list[tuple[str, str]] = []
        origins: list[tuple[str, int, Item]] = []
        samples = self._samples(items_at(self.out / PLAN, line), skipped, origins, mine)
        facts: dict[str, Any] = {"source": self._origin, "factor": self._factor, "unused": []}
        began_ns = time.time_ns()
        images = write_shard(tar, samples, facts=facts | {"skipped": skipped, "origins": origins})
        with suppress(OSError):  # not every network disk can
            os.utime(tar, ns=(began_ns, began_ns))  # so that a file which was written meanwhile is newer
        return images

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
                if (now := self._stats(row)) != stats:  # what was read need not be what was hashed
                    moved = next(path for path, *two in zip(row.files, stats, now, strict=True) if two[0] != two[1])
                    raise OSError(errno.EBUSY, "it was written meanwhile", moved)
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
        if isinstance(self.source, Raw) and self._checksums.get(path, digest) != digest:
            raise _Changed(f"changed: {self.source.altered(path)}")
        return status.st_size, digest

    # What is known of the files

    @cached_property
    def _places(self) -> dict[str, int]:
        """The place of each key in the reader's list."""
        try:
            return {self.source.key(index): index for index in range(len(self.source))}
        except ValueError as error:  # in a worker: a rival has made a longer list meanwhile
            raise PackError(str(error)) from error

    @cached_property
    def _checksums(self) -> dict[str, str]:
        """What is noted beside the data, by path."""
        return self.source.checksums() if isinstance(self.source, Raw) else {}

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


class _Packed(NamedTuple):
    """A sample that is packed."""

    tar: Path
    written: tuple[int, int]  # its size and time
    place: int  # in it
    meaning: str

    def digests(self) -> dict[str, str]:
        """The sha256 of the files that it was made of, by path."""
        note: dict[str, Any] = json.loads(_shard(self.tar, *self.written).read(self.place, "json"))
        return {path: digest for path, (_, digest) in note["files"].items()}


class _Changed(DecodeError):
    """A file with another checksum than it had."""


def _reason(error: ValueError | OSError) -> str:
    if isinstance(error, OSError):
        return f"unreadable: {error.filename or 'its files'}: {error.strerror}; the next run tries it again"
    return str(error) if isinstance(error, _Changed) else f"undecodable: {error}"


def _parts(key: str) -> list[str]:
    """The folders and the file of a key, without the source and the hash that odd letters of the path brought."""
    return re.sub("_[0-9a-f]{12}$", "", key).split("/")[1:]


def meaning(row: Row, stats: Stats) -> str:
    """A hash of what a sample is made of: the row, and the sizes of its files; times differ from copy to copy."""
    return hashlib.sha256(json.dumps([*row, [size for size, _ in stats]]).encode()).hexdigest()[:32]


def _stat(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)
def _shard(tar: Path, size: int, mtime_ns: int) -> Shard:
    """As it is at that size and time; samples are asked for in order."""
    return Shard(tar)


@lru_cache(maxsize=64)
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Of a file as it is at that size and time; one that holds many samples is read once."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
