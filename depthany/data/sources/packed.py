"""Sets of shards as sources, and sources that are packed into shards on first use."""

import hashlib
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from rich.progress import track

from depthany.data import storage
from depthany.data.claims import STALE_S, claim, holder
from depthany.data.files import DecodeError, read_image
from depthany.data.labels import decode_label, encode_truth, has_label
from depthany.data.shards import (
    CATALOG,
    IMAGE_SUFFIXES,
    REBUILD,
    Catalog,
    OldIndexError,
    Shard,
    ShardError,
    indexed_tars,
    label_path,
    read_catalog,
    read_index,
    write_catalog,
    write_shard,
)
from depthany.geometry.resize import resize_image, resize_label
from depthany.types import DepthSample, ImageSample, Skip

ANY = "any"
WAIT_S = 0.5
SAID = 3  # images that cannot be used are named on the terminal
NO_SHARDS = "no shards <set>-000000.tar with an index in {}: python -m depthany.prepare makes them"


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


class _Opened:
    """The shards that this process used last, of all sources, and those that it could not open a moment ago."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Shard | tuple[Exception, float]] = OrderedDict()

    def get(self, index: str, make: Callable[[], Shard], *, keep: int) -> Shard:
        """The shard of an index, made where it is not among the last `keep` ones."""
        kept = self._kept.pop(index, None)
        if kept is None or (isinstance(kept, tuple) and time.monotonic() - kept[1] > storage.FORGET_S):
            try:
                kept = make()
            except (ShardError, OSError) as error:
                kept = (error, time.monotonic())
        self._kept[index] = kept
        while len(self._kept) > keep:
            self._kept.popitem(last=False)
        if isinstance(kept, tuple):
            raise kept[0]
        return kept

    def clear(self) -> None:
        """Forgets them."""
        self._kept.clear()


_opened = _Opened()


class Shards:
    """A set of shards as a source; with a teacher's name, its pseudo-labels from the sibling shards.

    Opening reads `shards.json` alone. A shard is opened when one of its samples is read, and the last ones stay open.

    Args:
        name: of the set.
        root: folder or URL that holds `shards.json` and the indices; the tars too, unless `shards.json` says where.
        labels_root: folder or URL of the pseudo-labels; null: the root.
        cache: folder on this machine for copies of remote shards; null: samples are read one by one where they lie.

    Attributes:
        teacher: whose labels are read; None: none, "any": each shard's own, of whichever teacher it has.
        limit: images in use; None: all.
        quality: smallest score of a label; images with a smaller one, or none, are not in use. None: all are.
        reduce_to: short side in pixels that a JPEG may be decoded down to; None: at its own size.
        window: shards that the order shuffles into each other, and that stay open together.
    """

    def __init__(self, *, name: str, root: str, labels_root: str | None = None, cache: str | None = None) -> None:
        self.name, self.cache = name, cache
        self._root, self._labels_root = root, root if labels_root is None else labels_root
        try:
            self._is_remote = storage.is_remote(root), storage.is_remote(self._labels_root)
        except storage.StorageError as error:
            raise ShardError(f"{name}: {error}") from error
        self.teacher: str | None = None
        self.limit: int | None = None
        self.quality: float | None = None
        self.reduce_to: int | None = None
        self.window = 8
        self._catalog: Catalog | None = None
        self._counts = np.zeros(0, np.int64)  # images in use of each shard
        self._teachers: list[str] = []  # whose labels there are, where there are some
        self._whose = np.zeros(0, np.int64)  # which of them, for each shard; -1: nobody's
        self._label_sha256 = np.zeros(0, "S")  # of remote label tars, for each shard
        self._scores: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_scores": {}}  # mapped memory would travel as a copy

    # Finding and opening

    @property
    def root(self) -> str:
        """Folder or URL of the set."""
        return self._root

    @property
    def labels_root(self) -> str:
        """Folder or URL of its pseudo-labels."""
        return self._labels_root

    def check(self) -> None:
        """Looks whether there is a folder; a URL is asked when the set is prepared.

        Raises:
            ShardError: there is none.
        """
        if not self._is_remote[0] and not os.path.isdir(self.root):
            raise ShardError(f"{self.name}: {NO_SHARDS.format(self.root)}")

    def prepare(self) -> None:
        """Makes the catalog of a folder where it is missing, or where shards have come that it does not list.

        Raises:
            ShardError: there are no shards, or an index is damaged or old.
        """
        self.check()
        catalog = read_catalog(self.root) if self._is_remote[0] else self._local_catalog()
        if not len(catalog):
            raise ShardError(f"{self.name}: {NO_SHARDS.format(self.root)}")

    def _local_catalog(self) -> Catalog:
        folder = Path(self.root)
        if not (folder / CATALOG).exists():
            return write_catalog(folder, name=self.name)
        there = read_catalog(self.root)
        names = [tar.decode() for tar in there.tars]
        found = indexed_tars(folder, foreign=there.written_base is not None)
        if set(names) >= set(found):  # listed shards that are gone are for `open` to tell: no set shrinks in silence
            return there
        if gone := sorted(set(names) - set(found)):
            raise ShardError(f"{self.name}: {_several(gone)} not in {self.root}: {_way_out(gone)}")
        dropped = {name: there.dropped_of(i).tolist() for i, name in enumerate(names)}
        return write_catalog(folder, name=there.name, base=there.written_base, dropped=dropped)

    def open(self) -> None:
        """Finds out which images are in use, from the catalog and the names of the files.

        Raises:
            ShardError: shards, labels or scores are missing, or the labels are of other images.
        """
        _opened.clear()
        self._scores.clear()
        catalog = self._catalog = read_catalog(self.root)
        counts = catalog.samples - np.diff(np.searchsorted(catalog.dropped, catalog.starts))
        if (asked := self._asked()) is not None:
            counts = np.minimum(counts[: len(asked)], asked)
        self._find_labels(catalog)
        if self.teacher and self.quality is not None:
            counts = np.minimum(counts, self._count_good(catalog)[: len(counts)])
        if self.limit is not None:
            counts = np.clip(self.limit - (np.cumsum(counts) - counts), 0, counts)
            counts = counts[: 1 + np.searchsorted(np.cumsum(counts), self.limit)]
        self._counts, self._ends = counts, np.cumsum(counts)
        self._check_files(catalog)

    def _asked(self) -> Sequence[int] | None:
        """The largest number of samples of each shard that are wanted; None: all of all shards."""
        return None

    def _check_files(self, catalog: Catalog) -> None:
        """Refuses what is missing from a folder; what is damaged shows when it is read."""
        if not storage.is_remote(catalog.base):
            try:
                there = set(os.listdir(catalog.base))
            except OSError as error:
                raise ShardError(f"{self.name}: {catalog.base} cannot be read: {error.strerror}") from error
            missing = [name for tar in catalog.tars[: self.num_shards] if (name := tar.decode()) not in there]
            if missing:
                raise ShardError(f"{self.name}: {_several(missing)} not in {catalog.base}: {_way_out(missing)}")
        if self.teacher:
            used = np.flatnonzero(self._counts)
            missing = [catalog.tars[i].decode() for i in used if self._whose[i] < 0]
            if missing:
                way_out = "label them with python -m depthany.pseudo_label"
                whose = "any teacher" if self.teacher == ANY else self.teacher
                state = f"without labels of {whose} in {self.labels_root}"
                raise ShardError(f"{self.name}: {_several(missing)} {state}: {way_out}")
            if len(used):
                self._labels(int(used[0]))

    def _find_labels(self, catalog: Catalog) -> None:
        """Whose labels each shard has: the run's teacher's, or with ANY those of the first one by name."""
        self._teachers, self._whose = [], np.full(len(catalog), -1)
        if not self.teacher:
            return
        if self._is_remote[1]:
            if self.teacher == ANY:
                raise ShardError(f"{self.name}: {self.labels_root} cannot be listed: name the teacher (labels.teacher)")
            listed = _label_catalog(self.labels_root, self.teacher)
            tars = [listed.get(images.decode(), "") for images in catalog.sha256]
            self._label_sha256 = np.array([sha256.encode() for sha256 in tars], "S")
            found = {self.teacher: np.flatnonzero(self._label_sha256 != b"")}
        else:
            found = labels_in(Path(self.labels_root), catalog)
        for teacher in sorted(found, reverse=True) if self.teacher == ANY else {self.teacher} & found.keys():
            self._whose[found[teacher]] = len(self._teachers)
            self._teachers.append(teacher)

    def _count_good(self, catalog: Catalog) -> np.ndarray:
        """Images of each shard that are neither dropped nor below the quality."""
        counts = np.zeros(len(catalog), np.int64)
        filled = catalog.samples > 0
        for number, teacher in enumerate(self._teachers):
            good = self._score(teacher) >= self.quality
            good[catalog.dropped] = False
            sums = np.zeros(len(catalog), np.int64)
            sums[filled] = np.add.reduceat(good, catalog.starts[:-1][filled], dtype=np.int64)
            counts = np.where(self._whose == number, sums, counts)
        return counts

    def _score(self, teacher: str) -> np.ndarray:
        """(N,) float32: the score of every image's label, NaN where there is none."""
        if teacher not in self._scores:
            assert self._catalog is not None
            number = int(self._catalog.starts[-1])
            where = os.path.join(self.labels_root, f"labels.{teacher}.quality.npy")
            try:
                if storage.is_remote(where):
                    size = 128 + 4 * number  # of an .npy file with one dimension
                    scores = storage.read(where, lambda data: np.load(BytesIO(data), allow_pickle=False), size=size)
                else:
                    scores = np.load(where, mmap_mode="r", allow_pickle=False)
                if scores.dtype != np.float32 or scores.shape != (number,):
                    raise ValueError(f"it holds {scores.dtype} {scores.shape}, wanted float32 ({number},)")
            except (ValueError, OSError, EOFError) as error:
                way_out = "make the scores again with python -m depthany.pseudo_label labels.quality=flip"
                raise ShardError(f"{storage.shown(where)}: no scores of these labels ({error}); {way_out}") from error
            self._scores[teacher] = scores
        return self._scores[teacher]

    # What a mixture asks for

    @property
    def chunks(self) -> list[int]:
        """Images in use of each shard."""
        return self._counts.tolist()

    @property
    def factor(self) -> float | None:
        """Numerator of the disparity, as the first shard says; None where it does not."""
        return self.shard(0).facts.get("factor") if self.num_shards else None

    @property
    def num_shards(self) -> int:
        """Shards in use: all, or as many as `limit` needs."""
        return len(self._counts)

    @property
    def fingerprint(self) -> str:
        """Which images are in use, and in which order: what the cursor of a run counts. Another set has another one."""
        assert self._catalog is not None
        number, catalog = self.num_shards, self._catalog
        images = catalog.starts[number]
        parts = [catalog.sha256[:number], self._counts, catalog.dropped[catalog.dropped < images]]
        if self.teacher and self.quality is not None:
            parts += [np.array(self.quality), self._whose[:number], *(self._score(t)[:images] for t in self._teachers)]
        return hashlib.sha256(b"".join(hashlib.sha256(part.tobytes()).digest() for part in parts)).hexdigest()

    @property
    def skipped(self) -> list[Skip]:
        """What never became a sample of the shards in use."""
        rows = json.loads(self._catalog.skipped) if self._catalog else []
        return [Skip(self.name, key, reason) for shard, key, reason in rows if shard < self.num_shards]

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.num_shards else 0

    def tar(self, shard: int) -> str:
        """Path or URL of an image shard."""
        assert self._catalog is not None
        return self._catalog.tar(shard)

    def label_file(self, shard: int, teacher: str) -> Path:
        """Where a teacher's labels of a shard lie, or are to be written.

        Raises:
            ShardError: in no folder.
        """
        if self._is_remote[1]:
            raise ShardError(f"{self.name}: labels cannot go to {self.labels_root}: set labels_root to a folder")
        return Path(self._label_tar(shard, teacher))

    def _label_tar(self, shard: int, teacher: str) -> str:
        return os.path.join(self.labels_root, label_path(Path(self.tar(shard)), teacher).name)

    def shard(self, shard: int) -> Shard:
        """An image shard, opened or still open.

        Raises:
            ShardError: it is not what the catalog says.
            storage.StorageError: its index cannot be read.
        """
        assert self._catalog is not None
        tar, catalog = self.tar(shard), self._catalog
        index = os.path.join(self.root, f"{Path(tar).stem}.json")

        def make() -> Shard:
            made = Shard(tar, index=index, cache=self.cache, sha256=catalog.sha256[shard].decode())
            if len(made) != catalog.samples[shard]:
                raise ShardError(f"{storage.shown(index)} has {len(made)} samples, {CATALOG} says otherwise: {REBUILD}")
            return made

        return _opened.get(index, make, keep=4 * self.window)

    def _labels(self, shard: int) -> Shard:
        """The label shard of an image shard."""
        tar = self._label_tar(shard, self._teachers[self._whose[shard]])
        sha256 = self._label_sha256[shard].decode() if self._is_remote[1] else None

        def make() -> Shard:
            images, labels = self.shard(shard), Shard(tar, cache=self.cache, sha256=sha256)
            of_others = labels.facts.get("images", images.sha256) != images.sha256
            if of_others or not set(labels.keys) <= set(images.keys):
                raise ShardError(f"{storage.shown(tar)} has labels of other images: label them again")
            return labels

        return _opened.get(tar, make, keep=4 * self.window)

    def locate(self, index: int) -> tuple[int, int]:
        """(shard, place in the shard) of an image in use."""
        assert self._catalog is not None
        catalog = self._catalog
        shard = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[shard - 1]) if shard else 0)
        dropped = catalog.dropped_of(shard)
        if not self.teacher or self.quality is None:
            return (shard, place) if not len(dropped) else (shard, _nth_other(dropped, place))
        first, last = catalog.starts[shard : shard + 2]
        good = self._score(self._teachers[self._whose[shard]])[first:last] >= self.quality
        good[dropped] = False
        return shard, int(np.flatnonzero(good)[place])

    def key(self, index: int) -> str:
        """The sample's key; its tar and place where the shard cannot be opened, which `read` then tells."""
        shard, place = self.locate(index)
        try:
            return self.shard(shard).keys[place]
        except (ShardError, OSError):
            return f"{self.name}/{Path(self.tar(shard)).stem}:{place}"

    def read(self, index: int) -> ImageSample | DepthSample:
        """The image, with its stored label or the teacher's.

        Raises:
            DecodeError: damaged, not to be read, or without a label of the teacher.
        """
        shard, place = self.locate(index)
        try:
            images = self.shard(shard)
            return _decode(images, self._labels(shard) if self.teacher else None, place, self.reduce_to)
        except (ShardError, OSError) as error:
            raise DecodeError(str(error)) from error
        except Exception as error:  # decoders raise anything on damaged members
            reason = " ".join(str(error if isinstance(error, ValueError) else repr(error)).split())
            raise DecodeError(f"{storage.shown(images.tar)}: {images.keys[place]}: {reason:.300}") from error


def _decode(images: Shard, labels: Shard | None, place: int, reduce_to: int | None) -> ImageSample | DepthSample:
    key, files = images.keys[place], images.files[place]
    suffix = next((s for s in IMAGE_SUFFIXES if s in files), None)
    if suffix is None:
        raise DecodeError(f"no image ({', '.join(IMAGE_SUFFIXES)})")
    image = ImageSample(image=read_image(images.read(place, suffix), reduce_to=reduce_to), key=key)
    if labels is not None:
        if key not in labels.at:
            raise DecodeError(f"{labels.tar} has no label for it")
        place = labels.at[key]
    elif "json" not in files:
        return image
    stored = images if labels is None else labels
    return DepthSample(**image, **decode_label(partial(stored.read, place), stored.files[place]))


def _nth_other(dropped: np.ndarray, place: int) -> int:
    """The place of the n-th sample that is not dropped."""
    return place + int(np.searchsorted(dropped - np.arange(len(dropped)), place, side="right"))


def _several(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more shards are"


def _way_out(missing: Sequence[str]) -> str:
    return f"copy {'it' if len(missing) == 1 else 'them'} there again, or {REBUILD}"


# --- stored labels ----------------------------------------------------------------------------------------------------


class StoredLabels(NamedTuple):
    """Labels that were made alike.

    Attributes:
        teacher: the name in the label shards' names.
        facts: what made them, but for the images.
        shards: which shards of the set have them.
    """

    teacher: str
    facts: dict[str, Any]
    shards: list[int]


def stored_teachers(source: Shards) -> list[StoredLabels]:
    """Whose labels a set has, one entry for each teacher and way of making: more than one entry is a mixture.

    Raises:
        ShardError: the labels lie behind a URL, where nothing can be listed, or an index of theirs is damaged.
    """
    if storage.is_remote(source.labels_root):
        raise ShardError(f"{source.name}: {source.labels_root} cannot be listed: name the teacher (labels.teacher)")
    catalog = read_catalog(source.root)
    stored: dict[str, StoredLabels] = {}
    for teacher, shards in labels_in(Path(source.labels_root), catalog).items():
        for i in shards.tolist():
            stem = catalog.tars[i].decode().removesuffix(".tar")
            index = read_index(os.path.join(source.labels_root, f"{stem}.{teacher}.json"))
            facts = {name: value for name, value in index["facts"].items() if name not in ("images", "damaged")}
            entry = StoredLabels(teacher, facts, [])
            stored.setdefault(json.dumps([teacher, facts], sort_keys=True), entry).shards.append(i)
    return list(stored.values())


def labels_in(folder: Path, catalog: Catalog) -> dict[str, np.ndarray]:
    """The shards of a set that have labels in a folder, by teacher, from the names of the indices."""
    stems = {tar.decode().removesuffix(".tar"): i for i, tar in enumerate(catalog.tars)}
    found: dict[str, list[int]] = {}
    for name in os.listdir(folder) if folder.is_dir() else []:
        for dot in re.finditer(r"\.", name.removesuffix(".json")) if name.endswith(".json") else ():
            if (shard := stems.get(name[: dot.start()])) is not None:
                found.setdefault(name[dot.end() : -len(".json")], []).append(shard)
    return {teacher: np.array(sorted(shards)) for teacher, shards in sorted(found.items())}


def _label_catalog(root: str, teacher: str) -> dict[str, str]:
    """The sha256 of a teacher's label tars by that of the images' tars, from `labels.<teacher>.json`."""
    where = os.path.join(root, f"labels.{teacher}.json")
    try:
        rows = storage.read(where, lambda data: json.loads(data)["shards"])
        return {str(row["images"]): str(row["sha256"]) for row in rows}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ShardError(f"{storage.shown(where)}: no list of a teacher's labels ({error}): copy it again") from error


# --- packing ----------------------------------------------------------------------------------------------------------


class Packed(Shards):
    """A source that is packed into shards on first use and read from them ever after.

    Args:
        source: what to pack.
        root: where the set's folder is made; its name holds a hash of what was packed.
        samples_per_shard: images in each tar.
        short_side: larger images and labels are shrunk to this many pixels on the short side, which makes reading
            several times faster; null: nothing is changed, and JPEG, PNG and WebP keep their bytes.
    """

    root_option = "source.root"

    def __init__(self, *, source: Packable, root: str, samples_per_shard: int, short_side: int | None) -> None:
        self.source, self.samples_per_shard, self.short_side = source, samples_per_shard, short_side
        super().__init__(name=source.name, root=root)

    @cached_property
    def folder(self) -> Path:
        """Where the shards lie; the source is looked at when this is asked for the first time."""
        facts = [self.source.identity(), self.samples_per_shard, self.short_side]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return Path(self._root) / f"{self.name}-{digest[:8]}"

    @property
    def root(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def labels_root(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def factor(self) -> float | None:
        """Numerator of the disparity."""
        return getattr(self.source, "factor", None)

    def check(self) -> None:
        """Looks whether there is what is to be packed.

        Raises:
            ValueError: there is not.
        """
        if hasattr(self.source, "check"):
            self.source.check()

    @property
    def tars(self) -> list[Path]:
        """The image shards, in order; whether or not they are written yet."""
        count = len(self.source) if self.limit is None else min(self.limit, len(self.source))
        return [self.folder / f"{self.name}-{i:06d}.tar" for i in range(-(-count // self.samples_per_shard))]

    def _asked(self) -> list[int]:
        """A set may have been packed longer than it is asked for now."""
        return [len(self._range(i)) for i in range(len(self.tars))]

    def prepare(self) -> None:
        """Packs what is missing, in parallel; a shard that is there and whole is kept.

        Only one process packs a set, on whatever machine; others wait for it.

        Raises:
            ShardError: the folder cannot be written, or a shard was changed since it was packed.
        """
        self.source.prepare()
        told = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._missing():
                held = claim(self.folder / CATALOG, stale_s=STALE_S)
                if held is None:
                    if not told:
                        print(f"{self.name}: {holder(self.folder / CATALOG, stale_s=STALE_S)} is packing it; waiting")
                    told = True
                    time.sleep(WAIT_S)
                    continue
                with held:
                    self._pack(self._missing())
        except OSError as error:
            raise ShardError(f"{self.name}: {self.folder} cannot be written: {error.strerror or error}") from error
        if lost := json.loads(self._local_catalog().skipped):
            print(f"{self.name}: {len(lost):,} of {len(self.source):,} images cannot be used: {self.folder / CATALOG}")
            print("\n".join(f"not used: {key}: {reason}" for _, key, reason in lost[:SAID]))

    def _pack(self, missing: list[int]) -> None:
        workers = min(os.cpu_count() or 1, len(missing))
        note = f"packing {self.name}"
        if workers <= 1:
            for i in track(missing, note, disable=not missing):
                self._write(i)
            return
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)  # here: a forked process that still had OpenCV's threads would wait for them for ever
        try:
            with ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),)) as pool:
                list(track(pool.map(self._write, missing), note, total=len(missing)))
        finally:
            cv2.setNumThreads(threads)

    def _range(self, shard: int) -> range:
        first = shard * self.samples_per_shard
        return range(first, min(first + self.samples_per_shard, len(self.source)))

    def _missing(self) -> list[int]:
        """The shards that are not there, or not whole, or of an earlier version."""
        return [i for i, tar in enumerate(self.tars) if not self._is_whole(i, tar)]

    def _is_whole(self, index: int, tar: Path) -> bool:
        if not tar.with_suffix(".json").exists():
            return False
        try:
            shard = Shard(tar)  # a size that differs from the index's is the user's to decide: an error, not a rewrite
        except OldIndexError:
            return False
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


def _end_with(parent: int) -> None:
    """In a worker: ends it when its parent was killed. It would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WAIT_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
