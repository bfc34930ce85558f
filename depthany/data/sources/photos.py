"""Unlabelled photos in a folder."""

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from depthany.data.files import DecodeError, read_image, sample_key
from depthany.types import ImageSample

SUFFIXES = {
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".mpo",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
}
SUFFIXES |= {".pgm", ".ppm"}


class PhotoFolder:
    """The image files under a folder that match a pattern, sorted by path."""

    def __init__(self, *, root: Path | str, pattern: str, name: str) -> None:
        """Nothing is looked at before it is asked for.

        Args:
            root: folder the pattern starts from.
            pattern: glob, such as "**/*"; only files with the suffix of an image count, in upper or
                lower case, and no hidden ones (some systems put "._x.jpg" beside "x.jpg").
            name: of the source, the first part of each key.
        """
        self.name = name
        self.root, self.pattern = Path(root), pattern

    @cached_property
    def _paths(self) -> np.ndarray:
        """Below the root, as bytes: a list of strings is copied into each loader worker."""
        if not self.root.is_dir():
            raise ValueError(f"source {self.name}: root={self.root} is not a folder: correct `root`")
        paths = sorted(
            os.fsencode(path.relative_to(self.root))
            for path in self.root.glob(self.pattern)
            if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()
        )
        if not paths:
            raise ValueError(
                f"source {self.name}: no image matches pattern={self.pattern!r} in root={self.root}; "
                '"**/*" takes all folders below'
            )
        return np.array(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def identity(self) -> dict[str, Any]:
        """What a packed copy depends on: the files and their sizes."""
        digest = hashlib.sha256()
        for i, name in enumerate(self._paths):
            digest.update(name + b" %d\n" % self.path(i).stat().st_size)
        return {"files": digest.hexdigest()}

    def check(self) -> None:
        """Lists the files; none is opened.

        Raises:
            ValueError: no such folder, or no image in it.
        """
        len(self)

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def path(self, index: int) -> Path:
        """Of image `index`, with the root."""
        return self.root / os.fsdecode(self._paths[index])

    def key(self, index: int) -> str:
        """`<name>/<path>` with the suffix as `_jpg`: unique also where only suffixes differ."""
        return sample_key(self.name, Path(os.fsdecode(self._paths[index])))

    def data(self, index: int) -> bytes:
        """The original bytes of the file."""
        return self.path(index).read_bytes()

    def read(self, index: int) -> ImageSample:
        """The decoded image.

        Raises:
            DecodeError: damaged or not an image; the file is named.
            OSError: the file cannot be read at all.
        """
        try:
            return {"image": read_image(self.data(index)), "key": self.key(index)}
        except DecodeError as err:
            raise DecodeError(f"{self.path(index)}: {err}") from err
