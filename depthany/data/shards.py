"""Shards: plain webdataset tars with an index beside each, written whole or not at all, read by offset.

A shard `<set>-000000.tar` holds samples `<key>.jpg`, `<key>.disparity.npy`, ... and `<set>-000000.json` says where each
member lies, so the epoch's length and any sample's place are known without reading. Pseudo-labels lie in sibling shards
`<set>-000000.<teacher>.tar` with the same keys.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset as wds

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_+=@/-]{0,199}")
SUFFIXES = {"jpg", "png", "webp", "json", "disparity.png", "disparity.npy"}
IMAGE_SUFFIXES = ("jpg", "png", "webp")
INDEX_VERSION = 1


class ShardError(ValueError):
    """A shard that is not what its index says; the message names the file and the way out."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name only when the block ends well: written whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
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
        samples: mappings with "__key__" and one bytes entry per suffix (jpg, disparity.npy, json, ...).
        facts: plain values stored in the index (what made the shard).

    Returns:
        The number of samples.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with whole_file(path) as part:
        with wds.TarWriter(str(part), encoder=False, mtime=0, user="depthany", group="depthany") as writer:
            for sample in samples:
                _refuse_unsafe(sample)
                writer.write(dict(sample))
                count += 1
        index = index_tar(part) | {"tar": path.name, "facts": dict(facts)}
        if len(index["samples"]) != count:
            raise ShardError(f"{path}: two samples share a key, {count} became {len(index['samples'])}")
        path.with_suffix(".json").unlink(missing_ok=True)  # the old index is not the new tar's
    with whole_file(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(index), encoding="utf-8")
    return count


def _refuse_unsafe(sample: Mapping[str, Any]) -> None:
    if not KEY.fullmatch(sample["__key__"]):
        raise ShardError(f"the key {sample['__key__']!r} cannot name a shard member")
    if unknown := set(sample) - SUFFIXES - {"__key__"}:
        raise ShardError(f"{sample['__key__']}: a shard holds {sorted(SUFFIXES)}, not {sorted(unknown)}")


def index_tar(path: Path) -> dict[str, Any]:
    """The index of a plain tar: bytes, sha256, and for each sample its members' offsets and sizes.

    Raises:
        ShardError: not a plain tar, cut short, or with members that are no files of a sample.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # "r:" refuses compressed tars
            for member in tar:
                key, _, suffix = member.name.removeprefix("./").rpartition("/")[2].partition(".")
                folder = member.name.removeprefix("./").rpartition("/")[0]
                key = f"{folder}/{key}" if folder else key
                if not member.isfile() or suffix not in SUFFIXES or not KEY.fullmatch(key):
                    raise ShardError(f"{path.name}: member {member.name!r} is no image, label or json of a sample")
                samples.setdefault(key, {})[suffix] = (member.offset_data, member.size)
            end = tar.offset
        with open(path, "rb") as file:  # tarfile takes a cut between members, or rubbish there, for the end
            file.seek(end)
            if file.read(1024) != bytes(1024):
                raise ShardError(f"{path}: not a whole tar file (it has no end mark)")
    except tarfile.TarError as error:
        raise ShardError(f"{path}: not a whole tar file ({error})") from error
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = [{"key": key, "files": files} for key, files in samples.items()]
    return {"version": INDEX_VERSION, "bytes": path.stat().st_size, "sha256": digest, "samples": rows}


class Shard:
    """One tar opened by its index.

    Args:
        tar: path of the tar; its index lies beside it as .json.

    Raises:
        ShardError: the index is missing or unreadable, or the tar's size is not the index's.
    """

    def __init__(self, tar: Path) -> None:
        self.tar = tar
        try:
            index = json.loads(tar.with_suffix(".json").read_text(encoding="utf-8"))
            self.keys: list[str] = [row["key"] for row in index["samples"]]
            self.files: list[dict[str, list[int]]] = [row["files"] for row in index["samples"]]
            self.facts: dict[str, Any] = index.get("facts", {})
            self.sha256 = str(index["sha256"])
            size = int(index["bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardError(f"{tar}: its index {tar.with_suffix('.json').name} cannot be read ({error})") from error
        actual = tar.stat().st_size if tar.exists() else -1
        if actual != size:
            found = f"has {actual} bytes" if actual >= 0 else "is missing"
            raise ShardError(f"{tar} {found}, its index says {size}: copy it again, or delete both to rebuild them")
        self._fd: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fd": None}

    def read(self, index: int, suffix: str) -> bytes:
        """The bytes of one member.

        Raises:
            KeyError: the sample has no such member.
            ShardError: the tar ends before the member does.
        """
        offset, size = self.files[index][suffix]
        if self._fd is None or self._fd[1] != os.getpid():  # a descriptor per process, opened when first used
            self._fd = (os.open(self.tar, os.O_RDONLY), os.getpid())
        data = os.pread(self._fd[0], size, offset)
        if len(data) != size:
            raise ShardError(f"{self.tar}: {self.keys[index]}.{suffix} is cut short")
        return data

    def close(self) -> None:
        """Gives the descriptor back."""
        if self._fd is not None and self._fd[1] == os.getpid():
            os.close(self._fd[0])
        self._fd = None


def label_path(tar: Path, teacher: str) -> Path:
    """The sibling shard of a teacher's labels: `<set>-000000.tar` -> `<set>-000000.<teacher>.tar`."""
    return tar.with_name(f"{tar.stem}.{teacher}.tar")


def image_shards(folder: Path, name: str = "*") -> list[Path]:
    """The image shards of a folder in order, label siblings left out."""
    return sorted(p for p in folder.glob(f"{name}-*.tar") if re.fullmatch(r".+-\d{6}", p.stem))
