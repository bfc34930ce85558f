"""What the readers of original datasets share: the list of samples kept beside the data, and errors that name the file.

A reader gives `scan`, which walks the user's copy, and `label`, which decodes one label. The list that a scan makes is
stored and reused until a folder that it went through, or a file that it lists, has changed.
"""

import hashlib
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from rich.progress import track
from torch import Tensor

from depthany.data.files import DecodeError, decode_depth, read_image, sample_key
from depthany.data.labels import Label
from depthany.geometry.disparity import to_disparity
from depthany.geometry.resize import resize_label
from depthany.types import DepthKind, DepthSample, Quantity, Skip

VERSION = 1  # of the stored list
SETTLED_NS = 20_000_000  # clocks of file systems tick every few milliseconds
RANGE = 1000  # rows checked by one thread at a time
AT_ONCE = 64  # files whose checksums are taken between two looks at the keyboard
LOADING = ".aria2"  # of the file that lies beside one that is still being downloaded, and has its full size already
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".7z", ".rar")
SKY_FOLDER = ".depthany/sky"  # of the masks that `sky_masks=beside` means, below the root
SKY_NOTE = "sky.json"  # among the masks: what made them


class Row(NamedTuple):
    """One sample. Paths are relative to the root, with "/" between the parts."""

    key: str  # a path that names the sample within the set, most often the image's; Raw.key makes it safe
    image: str
    label: str
    extra: dict[str, Any]  # plain values; a text with a "/" in it is one more file of the sample

    @property
    def files(self) -> list[str]:
        """The files of the sample, each once."""
        more = [value for value in self.extra.values() if isinstance(value, str) and "/" in value]
        return list(dict.fromkeys([self.image, self.label, *more]))


class _Listing(NamedTuple):
    """A stored list: one line of JSON says what it is of, every further one is a row."""

    header: dict[str, Any]
    data: bytes
    ends: np.ndarray  # where each line of `data` ends

    @classmethod
    def parse(cls, data: bytes) -> "_Listing":
        """ValueError, KeyError or IndexError where the file is damaged."""
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        header = json.loads(data[: ends[0]])
        if hashlib.sha256(data[ends[0] + 1 :]).hexdigest() != header["sha256"]:
            raise ValueError("the rows are not those of the header")
        return cls(header, data, ends)

    def line(self, index: int) -> list[Any]:
        """[key, image, label, extra, [[bytes, mtime in ns] of each file]]."""
        return json.loads(self.data[self.ends[index] + 1 : self.ends[index + 1]])


class Raw:
    """Base of the readers of datasets in their authors' own files.

    A reader sets `dataset`, `layout` and `splits` and gives `scan` and `label`. An option that changes what is read
    goes into `self.options` as well: lists and packed copies made with other options are then not reused. The
    constructor touches no file: `check` looks at what it was given, when the source is first used.

    Args:
        name: of the source, the first part of every key.
        root: the folder of the dataset, as its authors publish it.
        split: one of `splits`.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
        sky_masks: of readers that offer it: masks of the sky, a folder or "beside": `<root>/.depthany/sky`. The mask
            of an image has its path but for the suffix, .png, its size, and 255 where there is sky, else 0. There the
            label becomes sky, whatever it says.

    Raises:
        ValueError: no such split.
    """

    dataset: ClassVar[str]  # name of the card in data_manifests/
    layout: ClassVar[str]  # what lies under root, for messages
    splits: ClassVar[tuple[str, ...]] = ("all",)

    def __init__(
        self, *, name: str, root: str, split: str, index_root: str | None, sky_masks: str | None = None
    ) -> None:
        if split not in self.splits:
            raise ValueError(f"source {name}: split={split} is not one of {', '.join(self.splits)}")
        self.name, self.root, self.split = name, Path(root), split
        self.options: dict[str, Any] = {}
        self.sky_masks = sky_masks
        self._index_folder = Path(index_root) if index_root else self.root / ".depthany"
        self._listing: _Listing | None = None
        self._pinned: str | None = None  # a copy in another process must see the same list
        self._folders: dict[str, int] = {}
        self._skips: list[tuple[str, str]] = []

    @property
    def index_path(self) -> Path:
        """The list of samples; sources that read one root with different options have lists of their own."""
        note = f"-{hashlib.sha256(json.dumps(self._meaning, sort_keys=True).encode()).hexdigest()[:8]}"
        return self._index_folder / f"{self.dataset}-{self.split}{note if self._meaning else ''}.jsonl"

    @cached_property
    def _meaning(self) -> dict[str, Any]:
        masks = {"sky_masks": self._sky_note()} if self.sky_masks else {}
        return self.options | self.contents() | masks

    # What a reader gives

    def check(self) -> None:
        """Looks whether what the options name is there; a reader that names more than the root adds to it.

        Raises:
            ValueError: no such folder or file.
        """
        if not self.root.is_dir():
            raise ValueError(
                f"source {self.name}: root={self.root} is no folder; set `root` to the one that holds {self.layout}"
            )
        if self.sky_masks and not (masks := self.root / self._sky_folder).is_dir():
            raise ValueError(
                f"source {self.name}: sky_masks={self.sky_masks}, but there is no folder {masks}: make the masks with "
                f"{self._sky_command}, or set sky_masks to null"
            )

    def contents(self) -> dict[str, Any]:
        """Options that stand for the content of a file, such as a digest of it."""
        return {}

    def scan(self) -> Iterator[Row]:
        """Walks the user's copy. What cannot be used is named with `skip`."""
        raise NotImplementedError

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """Decodes the label of a row.

        Args:
            row: the sample.
            image_shape: height and width of its image.
        """
        raise NotImplementedError

    def image(self, row: Row) -> np.ndarray:
        """(H, W, 3) uint8 RGB, upright; the file `row.image` unless a reader says otherwise."""
        return self.picture(row.image)

    # What a mixture asks for

    def __len__(self) -> int:
        return len(self._list().ends) - 1

    def row(self, index: int) -> Row:
        """The sample's files."""
        return Row(*self._list().line(index)[:4])

    def key(self, index: int) -> str:
        """`<name>/<key of the row>` in letters that a shard takes."""
        return sample_key(self.name, PurePosixPath(self.row(index).key))

    @property
    def skipped(self) -> list[Skip]:
        """What the scan left out."""
        return [Skip(self.name, f"{self.name}/{path}", reason) for path, reason in self._list().header["skipped"]]

    def identity(self) -> dict[str, Any]:
        """What a packed copy depends on: the options, and the files with their sizes."""
        return {**self._list().header["scanner"], "rows": self._list().header["identity"]}

    def prepare(self) -> None:
        """Makes the list, or makes it again where a listed file has another size or time than it had.

        Raises:
            ValueError: there is no such folder, there are no samples, or the list cannot be written.
        """
        self.check()
        self._listing = self._list()
        with ThreadPoolExecutor(16) as pool:  # a look at a file on a network disk takes its time
            if not all(pool.map(self._unchanged, range(0, len(self), RANGE))):
                self._listing = self._scan_and_store()

    def data(self, index: int) -> bytes:
        """The original bytes of the image; empty where the reader computes the picture."""
        return self.content(self.row(index).image) if type(self).image is Raw.image else b""

    def read(self, index: int) -> DepthSample:
        """Image and label.

        Raises:
            DecodeError: a damaged, wrong or missing file, named with the way out.
            OSError: a file cannot be read at all.
        """
        row = self.row(index)
        image = self.image(row)
        label = self.label(row, (image.shape[0], image.shape[1]))
        if self.sky_masks:
            label = self._with_sky(label, row, image.shape[:2])
        if not label["valid"].any():
            raise self.damaged(row.label, "no pixel has a valid value")
        return DepthSample(image=image, key=self.key(index), **label)

    @property
    def checksums_path(self) -> Path:
        """Where the sha256 of files is noted, in the format of `sha256sum`, which can check it from the root."""
        return self.index_path.with_suffix(".sha256")

    def checksums(self) -> dict[str, str]:
        """The sha256 that is noted of a file, by its path."""
        note = self.checksums_path
        lines = os.fsdecode(note.read_bytes()).split("\n") if note.exists() else []
        return {match[2]: match[1] for line in lines if (match := re.fullmatch("([0-9a-f]{64})  (.+)", line))}

    def note(self, digests: Mapping[str, str]) -> None:
        """Adds the sha256 of files by path; what is noted of a file already stays.

        Raises:
            ValueError: it cannot be written.
        """
        known = self.checksums()
        if digests.keys() - known:
            lines = [f"{digest}  {path}\n" for path, digest in {**digests, **known}.items()]
            try:
                write_beside(self.checksums_path, os.fsencode("".join(lines)))
            except OSError as err:
                raise self._unwritable(err) from err

    def altered(self, path: str) -> str:
        """What to say of a file that has not the sha256 that is noted of it."""
        meant = f"delete its line in {self.checksums_path} if the new content is meant"
        return f"{self.root / path}: its content is not what it was: fetch the file again, or {meant}"

    def verify(self) -> list[Skip]:
        """Reads every file, with a bar, and compares its sha256 with the one that is noted; the first one is noted.

        Returns:
            files whose content has changed, or that cannot be read.

        Raises:
            ValueError: the checksums cannot be written.
        """
        known = self.checksums()
        found: dict[str, str] = {}
        files = list(dict.fromkeys(path for i in range(len(self)) for path in self.row(i).files))
        wrong: list[Skip] = []
        if not known.keys() >= set(files):
            self._require_writable()  # before hours of reading
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                for start in track(range(0, len(files), AT_ONCE), f"checking the files of {self.name}"):
                    some = files[start : start + AT_ONCE]
                    for path, digest in zip(some, pool.map(self._sha256, some), strict=True):
                        if isinstance(digest, OSError):
                            reason = f"{self.root / path}: it cannot be read ({digest.strerror}): fetch the file again"
                            wrong.append(Skip(self.name, f"{self.name}/{path}", reason))
                            continue
                        found[path] = digest
                        if known.get(path, digest) != digest:
                            wrong.append(Skip(self.name, f"{self.name}/{path}", self.altered(path)))
            finally:  # hours of reading are not lost to Ctrl-C
                self.note(found)
        return wrong

    # What a reader calls

    def walk(self, *, without: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
        """(folder, its file names) of the root, "", and of every folder below, in order; hidden ones are left out.

        Args:
            without: names of folders that need not be entered.
        """
        pending: list[tuple[str, tuple[Any, ...]]] = [("", ())]
        while pending:
            folder, above = pending.pop()
            path = self.root / folder
            status = path.stat()
            if (place := (status.st_dev, status.st_ino)) in above:  # a link that leads back
                continue
            # A file that comes within the same tick of the clock would not be noticed later.
            time.sleep(min(max(0, status.st_mtime_ns + SETTLED_NS - time.time_ns()), SETTLED_NS) / 1e9)
            self._folders[folder] = status.st_mtime_ns
            with os.scandir(path) as entries:
                names = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
            inner = [name for name, is_folder in names if is_folder and name not in without]
            pending += [(f"{folder}/{name}" if folder else name, (*above, place)) for name in reversed(inner)]
            files = [name for name, is_folder in names if not is_folder]
            loading = {name.removesuffix(LOADING) for name in files if name.endswith(LOADING)}
            for name in sorted(loading):
                reason = f"unfinished: {name}{LOADING} says that it is still being downloaded"
                self.skip(f"{folder}/{name}".lstrip("/"), reason)
            yield folder, [name for name in files if name not in loading and not name.endswith(LOADING)]

    def siblings(self, *parts: str, without: Collection[str] = ()) -> Iterator[tuple[str, list[list[str]]]]:
        """(folder, the files in each of its folders `parts`) of every folder that has one of them, in order.

        Args:
            parts: names of folders that lie side by side, such as imgs and depths.
            without: names of folders that need not be entered.
        """
        found: dict[str, dict[str, list[str]]] = {}
        for folder, names in self.walk(without=without):
            base, _, part = folder.rpartition("/")
            if part in parts:
                found.setdefault(base, {})[part] = [f"{folder}/{name}" for name in names]
        for base in sorted(found):
            yield base, [found[base].get(part, []) for part in parts]

    def skip(self, path: str, reason: str) -> None:
        """Names a file or folder that the scan leaves out."""
        self._skips.append((path, reason))

    def named(self, paths: Iterable[str], pattern: str) -> dict[str, str]:
        """The paths whose file name has the pattern, by its first group, which is what image and label share."""
        found: dict[str, str] = {}
        for path in paths:
            if match := re.fullmatch(pattern, PurePosixPath(path).name):
                if match[1] in found:
                    self.skip(path, f"{PurePosixPath(found[match[1]]).name} has the same name and is used")
                else:
                    found[match[1]] = path
        return found

    def pairs(self, images: Mapping[str, str], labels: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
        """(stem, image, label) of the stems in both, in order; the paths of the others are skipped.

        Args:
            images: paths by stem, or by whatever else image and label have in common.
            labels: likewise.
        """
        for stem in sorted({*images, *labels}):
            if stem not in labels:
                self.skip(images[stem], "an image without a label")
            elif stem not in images:
                self.skip(labels[stem], "a label without an image")
            else:
                yield stem, images[stem], labels[stem]

    def content(self, path: str) -> bytes:
        """The bytes of a file."""
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            raise self.damaged(path, "it is gone since the scan") from None

    def picture(self, path: str) -> np.ndarray:
        """(H, W, 3) uint8 RGB from an image file."""
        try:
            return read_image(self.content(path))
        except DecodeError as err:
            raise self.damaged(path, err) from err

    def values(
        self, path: str, *, dtype: DTypeLike | None = None, channel: str | None = None, key: str | None = None
    ) -> np.ndarray:
        """The (h, w) map in a file, as stored.

        Args:
            path: relative to the root.
            dtype: what the file must hold; None: any number.
            channel: of an EXR file.
            key: of an array in HDF5 or NPZ.
        """
        try:
            values = decode_depth(self.content(path), PurePosixPath(path).suffix, channel=channel, key=key)
        except DecodeError as err:
            raise self.damaged(path, err) from err
        if dtype is not None and values.dtype != dtype:
            raise self.damaged(path, f"it holds {values.dtype}, wanted {np.dtype(dtype)}")
        return values

    def damaged(self, path: str, what: object) -> DecodeError:
        """The error that names a file of the dataset, and the way out. For `raise`."""
        what = str(what).removeprefix(f"{self.root / path}: ")
        return DecodeError(f"{self.root / path}: {what}; fetch the file again, or delete it to leave the sample out")

    # The sky of a set whose labels do not know it

    @property
    def _sky_folder(self) -> str:
        """Relative to the root, or absolute."""
        assert self.sky_masks
        return SKY_FOLDER if self.sky_masks == "beside" else os.path.abspath(self.sky_masks)

    @property
    def _sky_command(self) -> str:
        options = {"dataset": self.dataset, "root": self.root, "segmenter": "MODEL"}
        options |= {"dataset.split": self.split} if len(self.splits) > 1 else {}
        options |= {} if self.sky_masks == "beside" else {"out": self.sky_masks}
        return f"python -m depthany.sky {shlex.join(f'{key}={value}' for key, value in options.items())}"

    def _sky_note(self) -> Any:
        """What made the masks; their folder, where they are not of our making."""
        note = self.root / self._sky_folder / SKY_NOTE
        return json.loads(note.read_bytes()) if note.exists() else self._sky_folder

    def _with_sky(self, label: Label, row: Row, image_shape: tuple[int, ...]) -> Label:
        """The label with sky where the mask of the image has it (Depth Anything, arXiv 2401.10891, section 3.1)."""
        path = self.root / row.extra["sky"]
        try:
            mask = decode_depth(path.read_bytes(), ".png")
        except FileNotFoundError:
            raise DecodeError(f"{path}: there is no such sky mask; make it with {self._sky_command}") from None
        except DecodeError as err:
            raise DecodeError(f"{path}: {err}; delete it, and make it again with {self._sky_command}") from err
        if mask.shape != image_shape:
            found = f"the mask is {mask.shape}, its image {image_shape}"
            raise DecodeError(f"{path}: {found}; delete it, and make it again with {self._sky_command}")
        if not np.isin(mask, (0, 255)).all():
            raise DecodeError(f"{path}: it holds other values than 255, sky, and 0: write the mask again")
        _, _, sky = resize_label(mask, mask, mask == 255, label["disparity"].shape)
        return Label(
            disparity=np.where(sky, np.float32(0), label["disparity"]),
            valid=label["valid"] | sky,
            sky=label["sky"] | sky,
            kind=label["kind"],
        )

    # The list

    def _scanner(self) -> dict[str, Any]:
        facts = {"version": VERSION, "dataset": self.dataset, "split": self.split, "options": self._meaning}
        return json.loads(json.dumps(facts))  # as it comes back from the file

    def __getstate__(self) -> dict[str, Any]:
        """Without the list, which other processes read from the file; it must be the same there."""
        pinned = self._list().header["sha256"]
        return self.__dict__ | {"_listing": None, "_pinned": pinned, "_folders": {}, "_skips": []}

    def _list(self) -> _Listing:
        if self._listing is None:
            self.check()
            self._listing = self._stored()
        if self._listing is None:
            if self._pinned:
                raise ValueError(f"source {self.name}: {self.index_path} has changed meanwhile; start again")
            self._listing = self._scan_and_store()
        return self._listing

    def _stored(self) -> _Listing | None:
        """The stored list, if it is whole, was made with the same options, and no folder has changed since."""
        try:
            listing = _Listing.parse(self.index_path.read_bytes())
            header = listing.header
            if self._pinned:
                return listing if header["sha256"] == self._pinned else None
            if header["scanner"] != self._scanner():
                return None
            if any((self.root / path).stat().st_mtime_ns != mtime for path, mtime in header["folders"].items()):
                return None
        except (OSError, ValueError, LookupError, TypeError):  # what a damaged list raises
            return None
        return listing

    def _scan_and_store(self) -> _Listing:
        self._require_writable()  # first of all: a new folder in the root changes the root
        self._folders, self._skips = {}, []
        rows = sorted(self.scan(), key=attrgetter("key"))
        if self.sky_masks:
            masks = [f"{self._sky_folder}/{mask_name(row.image)}" for row in rows]
            rows = [row._replace(extra=row.extra | {"sky": mask}) for row, mask in zip(rows, masks, strict=True)]
        if not rows:
            first = f"; left out: {len(self._skips)}, first {': '.join(self._skips[0])}" if self._skips else ""
            wanted = f"no samples in root={self.root}, wanted {self.layout}; it holds {self._holds()}"
            raise ValueError(f"source {self.name}: {wanted}{first}")
        lines, identity = [], hashlib.sha256()
        for row in rows:
            stats = [self._stat(path) for path in row.files]
            identity.update(json.dumps([*row, [size for size, _ in stats]], sort_keys=True).encode() + b"\n")
            lines.append(json.dumps([*row, stats]))
        body = "".join(f"{line}\n" for line in lines).encode()
        header = {
            "scanner": self._scanner(),
            "count": len(rows),
            "identity": identity.hexdigest(),
            "sha256": hashlib.sha256(body).hexdigest(),
            "skipped": self._skips,
            "folders": self._folders,
        }
        data = json.dumps(header).encode() + b"\n" + body
        try:
            write_beside(self.index_path, data)
        except OSError as err:
            raise self._unwritable(err) from err
        return _Listing.parse(data)

    def _holds(self) -> str:
        """The first names in the root, and what to do where they are archives."""
        names = sorted(name for name in os.listdir(self.root) if not name.startswith("."))
        packed = [name for name in names if name.lower().endswith(ARCHIVES)]
        if packed:
            return f"{packed[0]}: unpack the archives first"
        return ", ".join(names[:3]) + ", ..." * (len(names) > 3) if names else "nothing"

    def _require_writable(self) -> None:
        try:
            self.index_path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.index_path.parent).close()
        except OSError as err:
            raise self._unwritable(err) from err

    def _unwritable(self, err: OSError) -> ValueError:
        where = f"cannot write the list of samples to {self.index_path.parent} ({err.strerror})"
        options = f"dataset.index_root=FOLDER, or data.sources.{self.name}.source.index_root=FOLDER in training"
        return ValueError(f"source {self.name}: {where}; set `index_root` to a folder for it: {options}")

    def _stat(self, path: str) -> tuple[int, int]:
        try:
            status = (self.root / path).stat()
        except OSError:
            return -1, 0
        return status.st_size, status.st_mtime_ns

    def _unchanged(self, start: int) -> bool:
        lines = map(self._list().line, range(start, min(start + RANGE, len(self))))
        return all([list(self._stat(path)) for path in Row(*line[:4]).files] == line[4] for line in lines)

    def _sha256(self, path: str) -> str | OSError:
        try:
            with open(self.root / path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as err:
            return err


def mask_name(image: str) -> str:
    """The path of an image's sky mask in the folder of masks."""
    return str(PurePosixPath(image).with_suffix(".png"))


def write_beside(path: Path, data: bytes) -> None:
    """Writes a file under another name and moves it into place: it is there whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def as_label(
    values: np.ndarray,
    *,
    kind: DepthKind,
    quantity: Quantity = Quantity.DEPTH,
    scale: float = 1.0,
    factor: float = 1.0,
    invalid: Sequence[float] = (),
    sky: float | None = None,
    sky_above: float | None = None,
    rays: Tensor | None = None,
    mask: np.ndarray | None = None,
) -> Label:
    """`to_disparity` as the label part of a sample.

    Args:
        values: (h, w) as stored.
        kind: what the disparity knows.
        quantity: what the values are.
        scale: metres, or units of disparity, per stored one.
        factor: numerator of the disparity.
        invalid: stored codes without a measurement.
        sky: stored code that is infinitely far.
        sky_above: scaled depth from which on a value is infinitely far.
        rays: (h, w) length of the pixels' rays, for a distance.
        mask: (h, w) bool, False where there is no measurement.
    """
    disparity, valid, is_sky = to_disparity(
        values if mask is None else np.where(mask, values.astype(np.float32), np.float32(np.nan)),
        quantity=quantity,
        scale=scale,
        factor=factor,
        invalid=invalid,
        sky=sky,
        sky_above=sky_above,
        rays=rays,
    )
    return {"disparity": disparity.numpy(), "valid": valid.numpy(), "sky": is_sky.numpy(), "kind": kind}


def read_list(path: Path) -> list[list[str]]:
    """The columns of an official file list, without the slash that some paths begin with; empty lines do not count.

    Raises:
        ValueError: there is no such file, or it is no text.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: put the dataset's own list there")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is no text in UTF-8: give the dataset's own list") from err
    return [[word.lstrip("/") for word in line.split()] for line in lines if line.strip()]
