"""Unlabelled sets as they were downloaded: image files, tars, LMDB folders and videos under one folder."""

import os
import re
import stat
from collections.abc import Iterator
from fnmatch import translate
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple, Protocol

from depthany.data.files import DecodeError, sample_key
from depthany.data.sources.archives import GZIPPED, MAX_BYTES, TARS, Tar, is_image_name
from depthany.data.sources.lmdb import Lmdb
from depthany.data.sources.video import VIDEOS, Video

LMDB = "data.mdb"
PREPARED = ("plan.jsonl", "shards.json")  # a folder with one of these holds what was packed, not what is to be packed


class PackError(ValueError):
    """What the user has to change, in one line."""


class NothingFitsError(PackError):
    """Root holds no file of the set."""


class Listing(NamedTuple):
    """What was found in a container."""

    bytes: int
    mtime_ns: int
    images: int  # that can be read
    problem: str  # why it, or its rest, cannot be used; empty: nothing


class Container(Protocol):
    """One file with many images in a fixed order."""

    def count(self) -> tuple[int, str]:
        """The images that can be read, and what is wrong with the rest ("": nothing)."""

    def read(self, first: int, count: int) -> Iterator[tuple[str, bytes | DecodeError]]:
        """(name, bytes) of `count` images from number `first` on.

        Raises:
            DecodeError: the container cannot be read any further.
        """

    def close(self) -> None:
        """Gives the file back."""


class ImageTree:
    """A set of unlabelled images in the form in which it is published.

    Args:
        name: of the set: the first part of every key and of the shards' names.
        root: the folder it was downloaded to.
        patterns: shell patterns over the whole path, in any case, of what belongs to the set; * also crosses folders.
        example: how its files are called, for messages.
        frame_step_s: seconds between the frames that are taken of a video; null: the set has no videos.
        quality: of the JPEGs that frames become, 1 to 100.

    Raises:
        PackError: no such folder, or the name cannot stand in a file's name.
    """

    may_be_prepared: ClassVar[bool] = False  # whether root may hold the catalog of a prepared set

    def __init__(
        self, *, name: str, root: str, patterns: list[str], example: str, frame_step_s: float | None, quality: int
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", name):
            raise PackError(f"unlabelled.name={name} cannot name files: use letters, digits, _ . + -")
        if not patterns:
            raise PackError('unlabelled.patterns=[] takes nothing: "*" takes every image')
        if frame_step_s is not None and frame_step_s <= 0:
            raise PackError(f"unlabelled.frame_step_s={frame_step_s} must be more than 0 seconds")
        self.name, self.root, self.example = name, Path(root), example
        self.frame_step_s, self.quality = frame_step_s, quality
        self._belongs = re.compile("|".join(translate(pattern.lower()) for pattern in patterns)).match
        self.other: list[str] = []  # some images and containers that belong to no pattern
        self.problems: list[tuple[str, str]] = []  # (path, reason) of what the last walk could not enter
        self._check()
        self._inside = self.root.resolve()

    def _check(self) -> None:
        if not self.root.is_dir():
            raise PackError(f"root={self.root} is no folder: name the one that holds {self.example}")
        try:
            os.scandir(self.root).close()
        except OSError as error:
            raise PackError(f"root={self.root} cannot be read ({error.strerror}): mend its permissions") from error
        if not self.may_be_prepared and any((self.root / name).exists() for name in PREPARED):
            raise PackError(f"root={self.root} holds a prepared set already; name the folder of the original images")

    def walk(self) -> Iterator[str]:
        """The paths of the set's files below root, always in the same order; a link to a folder is not followed."""
        self.problems = []
        above = self._inside.as_posix().lower().rstrip("/")

        def unreadable(error: OSError) -> None:
            self.problems.append((self._relative(error.filename), f"unreadable: {error.strerror}"))

        for folder, inner, names in os.walk(self.root, onerror=unreadable):
            if not set(PREPARED).isdisjoint(names) and folder != str(self.root):
                inner[:] = []
                continue
            inner[:] = sorted(name for name in inner if name[0] != ".")
            for name in inner:
                if os.path.islink(os.path.join(folder, name)):
                    reason = "unsafe: a link to a folder is not followed; name that folder as root"
                    self.problems.append((self._relative(os.path.join(folder, name)), reason))
            here = self._relative(folder)
            loading = {name.removesuffix(".aria2") for name in names if name.endswith(".aria2")}
            for name in sorted(names):
                if not (is_image_name(name) or is_container(name)):
                    continue
                path = f"{here}/{name}" if here != "." else name
                if not self._belongs(f"{above}/{path}".lower()):
                    self.other += [path] if len(self.other) < 3 else []
                elif name in loading:
                    self.problems.append((path, f"unfinished: {name}.aria2 says that it is still being downloaded"))
                else:
                    yield path

    def _relative(self, path: str) -> str:
        return PurePosixPath(os.path.relpath(path, self.root)).as_posix()

    def open(self, path: str) -> Container:
        """The container at a path that `is_container`.

        Raises:
            DecodeError: a link that leads out of root.
            PackError: reading it needs an optional package that is not installed.
        """
        self._refuse_link(self.root / path)
        try:
            if path.lower().endswith(TARS):
                return Tar(self.root / path)
            if path.lower().endswith(VIDEOS):
                if self.frame_step_s is None:
                    raise PackError(f"{path} is a video: say unlabelled.frame_step_s=SECONDS between its frames")
                return Video(self.root / path, step_s=self.frame_step_s, quality=self.quality)
            return Lmdb(self.root / path)
        except ModuleNotFoundError as error:
            extra = "video" if error.name == "av" else "lmdb"
            raise PackError(f"{path} needs the package {error.name}: pip install 'depthany[{extra}]'") from error

    def look(self, path: str) -> Listing:
        """How many images a container holds; the tar headers of a gzipped one are reached by unpacking it once.

        Raises:
            PackError: as `open`.
        """
        try:
            status = (self.root / path).stat()
            container = self.open(path)
        except (DecodeError, OSError) as error:
            reason = f"unreadable: {error.strerror}" if isinstance(error, OSError) else str(error)
            return Listing(0, 0, 0, reason)
        images, problem = container.count()
        if not images and not problem:
            problem = "undecodable: no image in it; archives that it may hold have to be unpacked first"
        return Listing(status.st_size, status.st_mtime_ns, images, problem)

    def read(self, path: str) -> bytes:
        """The bytes of an image file.

        Raises:
            DecodeError: no plain file, a link that leads out of root, or it cannot be read.
        """
        file = self.root / path
        try:
            self._refuse_link(file)
            with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:  # a pipe must not stop the job
                status = os.fstat(opened.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise DecodeError("unsafe: not a plain file")
                if status.st_size > MAX_BYTES:
                    raise DecodeError(f"undecodable: {status.st_size} bytes are more than an image has")
                return opened.read()
        except OSError as error:
            raise DecodeError(f"unreadable: {error.strerror}") from error

    def _refuse_link(self, file: Path) -> None:
        if os.path.islink(file) and not file.resolve().is_relative_to(self._inside):
            raise DecodeError("unsafe: a link that leads out of root")

    def key(self, path: str, member: str | None = None) -> str:
        """The key of an image file, or of a member of a container; unique and, for one layout, always the same."""
        file = PurePosixPath(path if member is None else _as_folder(path), (member or "").lstrip("/"))
        return sample_key(self.name, PurePosixPath(f"={file}") if file.is_absolute() else file)


class ImageList(ImageTree):
    """The files that a text file lists, one path in each line, relative to its own folder or absolute.

    Args:
        name: of the set: the first part of every key and of the shards' names.
        root: the text file.
        patterns: shell patterns over the whole path of what is taken; * also crosses folders.
        example: how the list looks, for messages.
        frame_step_s: seconds between the frames that are taken of a video; null: there are no videos.
        quality: of the JPEGs that frames become, 1 to 100.

    Raises:
        PackError: no such file.
    """

    def __init__(
        self, *, name: str, root: str, patterns: list[str], example: str, frame_step_s: float | None, quality: int
    ) -> None:
        self.file = Path(root)
        folder = str(self.file.parent)
        super().__init__(
            name=name, root=folder, patterns=patterns, example=example, frame_step_s=frame_step_s, quality=quality
        )
        self._inside = Path("/")  # whoever lists a link means it

    def _check(self) -> None:
        if not self.file.is_file():
            raise PackError(f"root={self.file} is no file: name {self.example}")

    def walk(self) -> Iterator[str]:
        """The lines, each once; an absolute path stays absolute."""
        self.problems = []
        seen: set[str] = set()
        with open(self.file, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                path = line.rstrip("\r\n")
                if not path or path in seen:
                    continue
                seen.add(path)
                if ".." in PurePosixPath(path).parts:
                    self.problems.append((path, "unsafe: .. in a path"))
                elif not (is_image_name(path) or is_container(path)):
                    self.problems.append((path, "undecodable: its name is not that of an image, tar, LMDB or video"))
                elif self._belongs(f"{self.file.parent.resolve().joinpath(path)}".lower()):
                    yield path


class ForeignTars(ImageTree):
    """Shards that others made, such as img2dataset's: indexed where they are, not copied.

    Args:
        name: of the set: the first part of every key.
        root: the folder of the tars.
        patterns: shell patterns over the whole path of the tars.

    Raises:
        PackError: no such folder, or the name cannot stand in a file's name.
    """

    may_be_prepared = True

    def __init__(self, *, name: str, root: str, patterns: list[str]) -> None:
        super().__init__(name=name, root=root, patterns=patterns, example="00000.tar", frame_step_s=None, quality=95)

    def walk(self) -> Iterator[str]:
        """The plain tars in root itself."""
        for path in super().walk():
            if "/" not in path and path.lower().endswith(".tar"):
                yield path
            elif len(self.other) < 3:
                self.other.append(path)


def is_container(path: str) -> bool:
    """Whether a file is called like a tar, the data file of an LMDB, or a video."""
    name = PurePosixPath(path).name.lower()
    return not name.startswith(".") and (name == LMDB or name.endswith((*TARS, *VIDEOS)))


def is_streamed(path: str) -> bool:
    """Whether the images of a container can only be reached by decoding all that is before them."""
    return path.lower().endswith((*GZIPPED, *VIDEOS))


def _as_folder(path: str) -> str:
    """The path of a container as a folder of a key: the dot of its suffix becomes "_"; an LMDB is a folder already."""
    if PurePosixPath(path).name.lower() == LMDB:
        return str(PurePosixPath(path).parent)
    end = max((len(suffix) for suffix in (*TARS, *VIDEOS) if path.lower().endswith(suffix)), default=0)
    return path[: len(path) - end] + path[len(path) - end :].replace(".", "_")
