"""Shards: plain webdataset tars with an index beside each, written whole or not at all, read by offset.

A shard `<set>-000000.tar` holds samples `<key>.jpg`, `<key>.disparity.npy`, ... and its index `<set>-000000.json` says
where each member lies and what its checksum is. The catalog `shards.json` counts the samples of every shard, so the
epoch's length and any sample's place are known from that one file. Pseudo-labels lie in sibling shards
`<set>-000000.<teacher>.tar` with the same keys. Tars of others stay where they are: only their indices are ours.
"""

import fcntl
import hashlib
import json
import os
import posixpath
import re
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import webdataset as wds

from depthany.data import storage

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+=@/-]{0,199}")
TAR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,199}\.tar")
SUFFIXES = {"jpg", "png", "webp", "ppm", "json", "disparity.png", "disparity.npy", "disparity.npz"}
IMAGE_SUFFIXES = ("jpg", "png", "webp", "ppm")
CATALOG = "shards.json"
CATALOG_VERSION = 1
INDEX_VERSION = 2
REBUILD = f"delete {CATALOG}: it is made again from the indices, without its list of samples that are dropped"
AGAIN = "copy it again, or delete it and make it again with python -m depthany.prepare"
MAX_MEMBER = 1 << 29  # bytes; the label of the largest image that is read is half of it
SEAL = re.compile(r'\{"version": \d+, "crc32": (\d+), ')


class ShardError(ValueError):
    """A shard that is not what its index says; the message names the file and the way out."""


class OldIndexError(ShardError):
    """An index of an earlier version of depthany."""


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name only when the block ends well: written whole or not at all.

    The block writes into the file that is there. What a killed process left behind is removed by the next one.
    """
    for left in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError), open(left, "rb") as file:  # no lock: its writer is dead
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    part = path.with_name(f".{path.name}.{token_hex(4)}.part")
    with open(part, "xb") as lock:
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        finally:
            part.unlink(missing_ok=True)


def write_shard(path: Path, samples: Iterable[Mapping[str, Any]], *, facts: Mapping[str, Any]) -> int:
    """Writes a tar and its index, each whole or not at all, the index last: a shard counts once its index is there.

    Args:
        path: ends in .tar.
        samples: mappings with "__key__" and one bytes entry per suffix (jpg, disparity.npy, json, ...); "__row__" is a
            mapping of further plain values for the sample's row in the index.
        facts: plain values stored in the index (what made the shard).

    Returns:
        The number of samples.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    more: dict[str, Mapping[str, Any]] = {}
    with whole_file(path) as part:
        with wds.TarWriter(str(part), encoder=False, mtime=0, user="depthany", group="depthany") as writer:
            for sample in samples:
                members = {name: value for name, value in sample.items() if name != "__row__"}
                _refuse_unsafe(members)
                if sample["__key__"] in more:
                    raise ShardError(f"{path}: two samples share a key, {sample['__key__']}")
                writer.write(members)
                more[sample["__key__"]] = sample.get("__row__", {})
        index = index_tar(part) | {"tar": path.name, "facts": dict(facts)}
        index["samples"] = [row | dict(more[row["key"]]) for row in index["samples"]]
        path.with_suffix(".json").unlink(missing_ok=True)  # the old index is not the new tar's
    write_index(path.with_suffix(".json"), index)
    return len(more)


def _refuse_unsafe(sample: Mapping[str, Any]) -> None:
    if not KEY.fullmatch(sample["__key__"]):
        raise ShardError(f"the key {sample['__key__']!r} cannot name a shard member")
    if unknown := set(sample) - SUFFIXES - {"__key__"}:
        raise ShardError(f"{sample['__key__']}: a shard holds {sorted(SUFFIXES)}, not {sorted(unknown)}")


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    """Writes what `index_tar` found, whole or not at all, with a checksum of its own text."""
    with whole_file(path) as part:
        part.write_text(_sealed(index), encoding="utf-8")


def _sealed(document: Mapping[str, Any]) -> str:
    """JSON that begins with its version and the crc32 of the text behind it."""
    rest = json.dumps({name: value for name, value in document.items() if name != "version"})[1:]
    return f'{{"version": {document["version"]}, "crc32": {zlib.crc32(rest.encode())}, {rest}'


def _unsealed(data: bytes, where: str, version: int, way_out: str) -> dict[str, Any]:
    """The document in a sealed text; one without a checksum, written by hand, is taken as it is."""
    try:
        text = data.decode("utf-8")
        seal = SEAL.match(text)
        if seal and zlib.crc32(data[seal.end() :]) != int(seal[1]):
            raise ValueError("its checksum is wrong")
        document = json.loads(text)
        if type(document) is not dict:
            raise ValueError("it holds no table")
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} is damaged ({error!s:.200}): {way_out}") from error
    if document.get("version") != version:
        found = f"{where} is of version {document.get('version')!r:.20}, this depthany reads version {version}"
        raise OldIndexError(f"{found}: {way_out}")
    return document


class _Forward(FileIO):
    """A tar as tarfile reads it, header after header: it can neither be led back nor made to fill the memory."""

    reached = 0

    def read(self, size: int | None = -1, /) -> bytes:
        at = self.tell()
        if size is None or not 0 <= size <= storage.PIECE or (size > 1 and at < self.reached):
            raise tarfile.ReadError(f"a header that no tar has, at byte {at}")
        self.reached = at + size if size > 1 else self.reached  # single bytes are tarfile's look for the end
        return super().read(size) or b""


def index_tar(path: Path, *, foreign: bool = False) -> dict[str, Any]:
    """The index of a plain tar: bytes, sha256, and for each sample its members' offsets, sizes and checksums.

    Args:
        path: the tar.
        foreign: made by others: a key is `<stem of the tar>/<their key>` in the letters of our keys, and members that
            are no images are left out, whatever they hold. They are counted by suffix in facts.ignored; facts.skipped
            lists images that cannot be taken (a link, `..` in the name, one key for two images) with the reason.

    Raises:
        ShardError: not a plain tar, cut short, or with members that are no files of a sample.
    """
    found = _Members(path, foreign)
    try:
        with _Forward(path, "r") as file, tarfile.open(fileobj=file, mode="r:") as tar:  # "r:" refuses compressed tars
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                found.add(member, file.fileno())
            end = tar.offset
        with open(path, "rb") as opened:  # tarfile takes a cut between members, or rubbish there, for the end
            opened.seek(end)
            if opened.read(1024) != bytes(1024):
                raise ShardError(f"{path}: not a whole tar file (it has no end mark)")
            opened.seek(0)
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except ShardError:
        raise
    except FileNotFoundError:
        raise ShardError(f"{path} is missing") from None
    except Exception as error:  # tarfile raises anything on damaged headers
        raise ShardError(f"{path}: not a whole plain tar file ({str(error) or type(error).__name__})") from error
    return {
        "version": INDEX_VERSION,
        "tar": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest,
        "facts": {"ignored": found.ignored, "skipped": found.skipped} if foreign else {},
        "samples": [{"key": key, "files": files} for key, files in found.samples.items()],
    }


class _Members:
    """The samples of a tar, member by member."""

    def __init__(self, path: Path, foreign: bool) -> None:
        self.path, self.foreign = path, foreign
        self.samples: dict[str, dict[str, tuple[int, int, int]]] = {}
        self.ignored: dict[str, int] = {}
        self.skipped: list[tuple[str, str]] = []

    def add(self, member: tarfile.TarInfo, fd: int) -> None:
        name = member.name.removeprefix("./")
        folder, _, base = name.rpartition("/")
        if self.foreign:
            stem, _, suffix = base.rpartition(".")
            suffix = {"jpeg": "jpg"}.get(suffix.lower(), suffix.lower()) if stem and base[0] != "." else ""
            key = _in_our_letters(f"{self.path.stem}/{folder}/{stem}" if folder else f"{self.path.stem}/{stem}")
        else:
            stem, _, suffix = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
        if self.foreign and suffix not in IMAGE_SUFFIXES:
            if member.isfile():
                self.ignored[suffix] = self.ignored.get(suffix, 0) + 1
            return
        if reason := self._refusal(member, name, key, suffix):
            if not self.foreign:
                raise ShardError(f"{self.path}: member {member.name!r} {reason}")
            self.skipped.append((key, f"{self.path.name}: member {member.name!r} {reason}"))
            return
        checksum, at = 0, member.offset_data
        for first in range(at, at + member.size, storage.PIECE):
            piece = os.pread(fd, min(storage.PIECE, at + member.size - first), first)
            checksum = zlib.crc32(piece, checksum)
        self.samples.setdefault(key, {})[suffix] = (at, member.size, checksum)

    def _refusal(self, member: tarfile.TarInfo, name: str, key: str, suffix: str) -> str:
        """Why a member cannot be taken; empty: it can."""
        if not member.isfile() or member.issparse():
            return "is no file but a link, folder or device, or sparse"
        if name.startswith("/") or ".." in name.split("/"):
            return "leads out of the tar"
        if suffix not in SUFFIXES or not KEY.fullmatch(key):
            return "is no image, label or json of a sample"
        if member.size > MAX_MEMBER:
            return f"has more than {MAX_MEMBER} bytes"
        there = self.samples.get(key, {})
        return "shares its key with another one" if suffix in there or (self.foreign and there) else ""


def _in_our_letters(key: str) -> str:
    """A key of others in the letters of ours; where something had to be replaced, a hash keeps two keys apart."""
    ours = re.sub(r"[^A-Za-z0-9_+=@/-]|^[^A-Za-z0-9_]", "_", key)
    if ours == key and len(key) <= 120:  # the set's name comes before it
        return key
    return f"{ours[:100]}_{hashlib.sha256(key.encode(errors='backslashreplace')).hexdigest()[:12]}"


# --- reading ----------------------------------------------------------------------------------------------------------


class Shard:
    """One tar opened by its index. Every read is checked against the length and crc32 in the index.

    Args:
        tar: path or URL.
        index: path or URL of the index; None: beside the tar, as .json.
        cache: folder for local copies of remote files; None: members are read where they are.
        sha256: of the tar, as the catalog has it; None: whatever the index says.

    Attributes:
        keys: of the samples.
        rows: of the index: key, files, and further columns.
        files: by sample: offset, size and crc32 by suffix.
        facts: what made the shard.
        sha256: of the tar.

    Raises:
        ShardError: the index is missing, damaged or not the catalog's, or the tar's size is not the index's.
        OldIndexError: the index is of an older version.
    """

    def __init__(
        self, tar: str | Path, *, index: str | None = None, cache: str | None = None, sha256: str | None = None
    ) -> None:
        self.tar, self.cache = str(tar), cache
        self.index = index or f"{self.tar.removesuffix('.tar')}.json"
        self._fd: int | None = None
        self._failed: tuple[storage.StorageError, float] | None = None
        try:
            found = read_index(self.index, cache=cache, sha256=sha256)
        except storage.StorageError as error:
            raise ShardError(f"{storage.shown(self.tar)}: its index cannot be read: {error}") from error
        self.bytes, self.sha256, self.facts = int(found["bytes"]), str(found["sha256"]), dict(found["facts"])
        self.rows: list[dict[str, Any]] = found["samples"]
        self.keys: list[str] = [row["key"] for row in self.rows]
        self.files: list[dict[str, list[int]]] = [row["files"] for row in self.rows]
        if not storage.is_remote(self.tar):
            actual = os.stat(self.tar).st_size if os.path.exists(self.tar) else -1
            if actual != self.bytes:
                state = f"has {actual} bytes" if actual >= 0 else "is missing"
                way_out = "copy it again, or delete its index to have it made again"
                raise ShardError(f"{self.tar} {state}, its index says {self.bytes}: {way_out}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "at"} | {"_fd": None, "_failed": None}

    @cached_property
    def at(self) -> dict[str, int]:
        """The place of each key."""
        return {key: i for i, key in enumerate(self.keys)}

    def read(self, index: int, suffix: str) -> bytes:
        """The bytes of one member.

        Raises:
            KeyError: the sample has no such member.
            ShardError: the bytes are not those that the index describes.
            storage.StorageError: the tar cannot be read.
        """
        member = f"{storage.shown(self.tar)}: {self.keys[index]}.{suffix}"
        try:
            offset, size, checksum = map(_count, self.files[index][suffix])
            if offset + size > self.bytes or size > MAX_MEMBER:
                raise ValueError("it lies outside of the tar")
        except (ValueError, TypeError) as error:
            raise ShardError(f"{member} has no place in the index ({error}): make the index again") from error

        def whole(data: bytes) -> bytes:
            if len(data) != size:
                raise ShardError(f"{member} is cut short: copy the tar again")
            if zlib.crc32(data) != checksum:
                raise ShardError(f"{member} is not what was written (checksum): copy the tar again")
            return data

        if self._failed and time.monotonic() - self._failed[1] < storage.FORGET_S:
            raise self._failed[0]
        try:
            if storage.is_remote(self.tar) and not self.cache:
                return storage.read(self.tar, whole, offset=offset, size=size)
            return storage.retry(self.tar, lambda: whole(self._pread(size, offset)))
        except storage.StorageError as error:
            self._failed = (error, time.monotonic())
            raise

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            if self._fd is None:  # a descriptor that a fork inherits is as good: pread has no position to share
                self._fd = os.open(self._local(), os.O_RDONLY)
            return os.pread(self._fd, size, offset)
        except OSError:
            self.close()  # a network disk may have lost it: open it again at the next try
            raise

    def _local(self) -> str | Path:
        """The tar on a disk; a remote one is copied into the cache first."""
        if not storage.is_remote(self.tar):
            return self.tar
        assert self.cache
        return storage.fetch(self.tar, self.cache, size=self.bytes, version=self.sha256, check=self._check)

    def _check(self, path: Path) -> None:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise ShardError(f"{storage.shown(self.tar)} is not what its index describes (sha256): copy it again")

    def close(self) -> None:
        """Gives the descriptor back."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()


def read_index(location: str, *, cache: str | None = None, sha256: str | None = None) -> dict[str, Any]:
    """The index of a shard, checked as far as all samples go; the place of a member is checked when it is read.

    Args:
        location: path or URL.
        cache: folder for a local copy of a remote one; None: none.
        sha256: of the tar that it must be of; None: of any.

    Raises:
        ShardError: it is damaged, or of another tar.
        OldIndexError: it is of an older version.
        storage.StorageError: it cannot be read.
    """

    def parse(data: bytes) -> dict[str, Any]:
        where = storage.shown(location)
        index = _unsealed(data, where, INDEX_VERSION, AGAIN)
        try:
            _count(index["bytes"]), dict(index["facts"]), bytes.fromhex(index["sha256"])
            keys = [row["key"] for row in index["samples"]]
            if not all(KEY.fullmatch(key) for key in keys) or len(set(keys)) != len(keys):
                raise ValueError("its keys are none, or not unique")
            if not all(type(row["files"]) is dict and row["files"].keys() <= SUFFIXES for row in index["samples"]):
                raise ValueError(f"its samples hold other things than {sorted(SUFFIXES)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{where} is no index of a shard ({error!r:.200}): {AGAIN}") from error
        if sha256 is not None and index["sha256"] != sha256:
            raise ShardError(f"{where} is not of the tar that {CATALOG} lists: copy it again, or {REBUILD}")
        return index

    if cache and storage.is_remote(location):

        def check(path: Path) -> dict[str, Any]:
            return parse(path.read_bytes())

        return check(storage.fetch(location, cache, size=None, version=sha256 or "", check=check))
    return storage.read(location, parse)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r:.40} is no number of bytes or samples")
    return value


# --- catalogs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Catalog:
    """What is known of every shard of a set without opening any; in arrays, so that loader workers share the memory.

    Attributes:
        name: of the set.
        base: path or URL of the folder of the tars.
        written_base: as the file has it: None where the tars lie beside it.
        tars: (n,) bytes, file names.
        samples: (n,) int64, dropped ones included.
        sizes: (n,) int64, bytes of the tars.
        sha256: (n,) bytes, of the tars.
        dropped: (m,) int64, places of the samples that are not used, counted through the whole set, ascending.
        skipped: JSON of [shard, key, reason] of what never became a sample.
    """

    name: str
    base: str
    written_base: str | None
    tars: np.ndarray
    samples: np.ndarray
    sizes: np.ndarray
    sha256: np.ndarray
    dropped: np.ndarray
    skipped: bytes

    def __len__(self) -> int:
        return len(self.tars)

    def tar(self, shard: int) -> str:
        """Path or URL of a tar."""
        return os.path.join(self.base, self.tars[shard].decode())

    @cached_property
    def starts(self) -> np.ndarray:
        """(n + 1,) int64: samples before each shard, and all of them."""
        return np.concatenate([[0], np.cumsum(self.samples)])

    def dropped_of(self, shard: int) -> np.ndarray:
        """Places in the shard of the samples that are not used, ascending."""
        first, last = np.searchsorted(self.dropped, self.starts[shard : shard + 2])
        return self.dropped[first:last] - self.starts[shard]


def read_catalog(root: str) -> Catalog:
    """The catalog of a set.

    Args:
        root: path or URL of the folder that holds `shards.json`.

    Raises:
        ShardError: there is none, or it is damaged.
    """
    where = os.path.join(root, CATALOG)
    try:
        return storage.read(where, lambda data: _catalog(data, root, storage.shown(where)))
    except storage.StorageError as error:
        raise ShardError(str(error)) from error


def _catalog(data: bytes, root: str, where: str) -> Catalog:
    document = _unsealed(data, where, CATALOG_VERSION, f"copy it again, or {REBUILD}")
    try:
        base = document["base"]
        if base is not None and type(base) is not str:
            raise TypeError("base is no text")
        rows = document["shards"]
        tars = [row["tar"] for row in rows]
        if unfit := [tar for tar in tars if not TAR.fullmatch(tar)]:
            raise ValueError(f"{unfit[0]!r:.200} cannot be the name of a shard")
        if len(set(tars)) != len(tars):
            raise ValueError("two shards share a name")
        samples = np.array([_count(row["samples"]) for row in rows], np.int64)
        starts = np.concatenate([[0], np.cumsum(samples)])
        dropped: list[np.ndarray] = []
        for start, row in zip(starts.tolist(), rows, strict=False):
            if row.get("dropped"):
                places = np.unique(np.array([_count(place) for place in row["dropped"]], np.int64))
                if places[-1] >= row["samples"]:
                    raise ValueError(f"{row['tar']} has no sample {places[-1]} that could be dropped")
                dropped.append(start + places)
        return Catalog(
            name=str(document["name"]),
            base=root if base is None else _resolved(root, base),
            written_base=base,
            tars=np.array([tar.encode() for tar in tars], "S"),
            samples=samples,
            sizes=np.array([_count(row["bytes"]) for row in rows], np.int64),
            sha256=np.array([row["sha256"].encode() for row in rows], "S"),
            dropped=np.concatenate(dropped) if dropped else np.zeros(0, np.int64),
            skipped=json.dumps([[i, *skip] for i, row in enumerate(rows) for skip in row.get("skipped", [])]).encode(),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ShardError(f"{where} is no catalog of shards ({error!r:.200}): copy it again, or {REBUILD}") from error


def _resolved(root: str, base: str) -> str:
    """The folder of the tars; a catalog from the network cannot name one of this machine."""
    if storage.is_remote(base):
        return base
    if not storage.is_remote(root):
        return os.path.join(root, base)
    scheme, _, place = root.partition("://")
    path = posixpath.normpath(f"{place}/{base}")
    if base.startswith("/") or path.partition("/")[0] != place.partition("/")[0]:
        raise ValueError("base leads away from its server")
    return f"{scheme}://{path}"


def write_catalog(
    folder: Path, *, name: str, base: str | None = None, dropped: Mapping[str, Sequence[int]] | None = None
) -> Catalog:
    """Writes `shards.json` from the indices of a folder, those of `indexed_tars`.

    Args:
        folder: of the indices.
        name: of the set.
        base: path (relative to the folder, or absolute) or URL of the folder of the tars; None: they lie here.
        dropped: by tar: places of the samples that are not to be used, such as duplicates.

    Raises:
        ShardError: an index is damaged or old, or it cannot be written.
    """
    rows = []
    for tar in indexed_tars(folder, foreign=base is not None):
        index = read_index(str(folder / f"{tar.removesuffix('.tar')}.json"))
        row = {"tar": tar, "samples": len(index["samples"]), "bytes": index["bytes"], "sha256": index["sha256"]}
        skipped = [list(skip) for skip in index["facts"].get("skipped", [])]
        rows.append(row | {"dropped": sorted(set((dropped or {}).get(tar, []))), "skipped": skipped})
    try:
        write_index(folder / CATALOG, {"version": CATALOG_VERSION, "name": name, "base": base, "shards": rows})
    except OSError as error:
        raise ShardError(f"{folder / CATALOG} cannot be written: {error.strerror}") from error
    return read_catalog(str(folder))


def indexed_tars(folder: Path, *, foreign: bool) -> list[str]:
    """The names of the image tars that have an index in a folder, in order; labels of teachers are left out.

    Args:
        folder: of the indices.
        foreign: the tars lie elsewhere and are called as others called them: every index counts.

    Raises:
        ShardError: there is no such folder.
    """
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise ShardError(f"{folder} cannot be read: {error.strerror}") from error
    stems = {name[:-5] for name in names if re.fullmatch(r"[^.].*\.json", name) and not name.startswith("labels.")}
    stems.discard(CATALOG[:-5])
    if not foreign:
        stems = {stem for stem in stems if re.fullmatch(r".+-\d{6}", stem) and f"{stem}.tar" in names}
    labels = {stem for stem in stems if any(stem[: dot.start()] in stems for dot in re.finditer(r"\.", stem))}
    return sorted(f"{stem}.tar" for stem in stems - labels)


def label_path(tar: Path, teacher: str) -> Path:
    """The sibling shard of a teacher's labels: `<set>-000000.tar` -> `<set>-000000.<teacher>.tar`."""
    return tar.with_name(f"{tar.stem}.{teacher}.tar")
