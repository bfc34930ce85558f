"""Which image goes into which shard: fixed before any image is read, and only ever added to."""

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depthany.data.sources.tree import Listing, PackError, is_streamed

Item = str | list[Any]  # an image file's path, or [path of a container, number of the first image, how many]


class Line(NamedTuple):
    """A shard's place in the plan."""

    offset: int  # of its line
    images: int
    stream: str | None  # the container that its first images are in, where it can only be read from its beginning


class Plan:
    """`plan.jsonl`, opened under a claim: the terms, then a line for each shard and for each container that is whole.

    Args:
        path: of the file; made where it is missing.
        terms: what decides on the bytes of a shard.

    Raises:
        PackError: the file was made on other terms, or is none.
    """

    def __init__(self, path: Path, terms: Mapping[str, Any]) -> None:
        self.path, self.terms = path, dict(terms)
        self.shards: list[Line] = []
        self.containers: dict[str, list[int]] = {}  # path: bytes, mtime in ns, images
        self.taken: Counter[str] = Counter()  # images of a container that are planned
        self.again: dict[str, int] = {}  # an item that was planned again, as JSON: the number of its last shard
        self._per_shard = int(terms.get("samples_per_shard", 1))
        self._names = array("q")  # hashes of the files that are planned, 8 bytes each
        self._end = 0
        self._pending: list[Item] = []  # of the shard that is being filled
        self._retried: list[Item] = []
        self._images = 0
        self._file = open(path, "a+b")  # noqa: SIM115  # closed by close()
        self._load()
        self._known = np.sort(np.array(self._names, np.int64))

    def _load(self) -> None:
        self._file.seek(0)
        there: dict[str, Any] = {}
        try:
            for line in self._file:
                if not line.endswith(b"\n"):
                    break  # a job was killed while it wrote this line
                row = json.loads(line)
                if self._end:
                    self._note(row)
                else:
                    there = row
                self._end += len(line)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise PackError(f"{self.path} is damaged ({error}): name another folder as out") from error
        terms = {"version": 1, **self.terms}
        if there != terms and not (self.shards or self.containers):
            self._end = 0  # nothing was prepared on other terms
        self._file.truncate(self._end)
        if not self._end:
            self._append(terms)
        elif there != terms:
            asked, made = ({**each, **each.get("options", {})} for each in (self.terms, there))
            other = [name for name in asked if name != "options" and made.get(name) != asked[name]]
            named = other[: 1 if "name" in other else None]
            unlike = ", ".join(_shown(name, made.get(name)) for name in named) or "another version"
            back = "bring that content back" if "content of" in unlike else "say the same again"
            raise PackError(f"out={self.path.parent} was prepared with {unlike}: {back}, or name another folder as out")

    def _note(self, row: Mapping[str, Any]) -> None:
        if "container" in row:
            self.containers[row["container"]] = [row["bytes"], row["mtime_ns"], row["images"]]
            return
        images = 0
        for item in row["items"]:
            if isinstance(item, str):
                self._names.append(hash(item))
                images += 1
            else:
                path, first, count = item
                self.taken[path] = max(self.taken[path], first + count)
                images += count
        for item in row.get("again", ()):
            self.again[json.dumps(item)] = len(self.shards)
        first = row["items"][0]
        stream = first[0] if not isinstance(first, str) and is_streamed(first[0]) else None
        self.shards.append(Line(self._end, images, stream))

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        self._file.write(line)
        if self._end:
            self._note(row)
        self._end += len(line)

    def settle(self, path: str, listing: Listing) -> None:
        """Notes that a container is whole, so that it is looked into again only when it changes."""
        row = {"container": path, "bytes": listing.bytes, "mtime_ns": listing.mtime_ns, "images": listing.images}
        self._append(row)
        self._file.flush()  # looking into a large one takes minutes

    def is_settled(self, path: str, file: Path) -> bool:
        """Whether a container is known and its file unchanged."""
        if path not in self.containers or not file.exists():
            return False
        status = file.stat()
        return self.containers[path][:2] == [status.st_size, status.st_mtime_ns]

    def new(self, paths: Sequence[str]) -> list[str]:
        """Those of some files that were not planned when the plan was opened; names are compared by 64-bit hashes."""
        hashes = np.array([hash(path) for path in paths], np.int64)
        places = np.searchsorted(self._known, hashes)
        known = np.append(self._known, 0)[places] == hashes
        known[places == len(self._known)] = False
        return [path for path, is_known in zip(paths, known, strict=True) if not is_known]

    def add(self, item: Item, *, again: bool = False) -> None:
        """Puts images behind all others, shard by shard."""
        if again:
            self._retried.append(item)
        path, first, count = (item, 0, 1) if isinstance(item, str) else item
        while count > 0:
            number = min(count, self._per_shard - self._images)
            self._pending.append(item if isinstance(item, str) else [path, first, number])
            first, count, self._images = first + number, count - number, self._images + number
            if self._images == self._per_shard:
                self.close_shard()

    def close_shard(self) -> None:
        """Ends the last shard, full or not: it is never changed again."""
        if self._pending:
            self._append({"items": self._pending} | ({"again": self._retried} if self._retried else {}))
        self._clear()

    def _clear(self) -> None:
        self._pending, self._retried, self._images = [], [], 0

    def close(self) -> None:
        """Sees to it that the plan is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _shown(name: str, value: Any) -> str:
    """An option as it was; of a file, such as a list of frames, only the sha256 is known."""
    if value == hashlib.sha256().hexdigest():  # of no file
        value = None
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"another content of {name}=FILE (its sha256 began with {value[:8]})"
    return f"{name}={'null' if value is None else value!s:.80}"


def items_at(path: Path, offset: int) -> list[Item]:
    """What goes into the shard whose line begins at `offset`."""
    with open(path, "rb") as file:
        file.seek(offset)
        items: list[Item] = json.loads(file.readline())["items"]
        return items
