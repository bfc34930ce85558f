"""Base of the readers that find the files of a sample by their paths, and may keep to a published list."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from depthany.data.sources.raw import Raw, Row, read_list


class Matched(Raw):
    """Files belong together where the groups of their patterns agree; numbers may be padded with zeros or not.

    A reader sets `parts` and gives `label`.

    Args:
        name: of the source, the first part of every key.
        root: the folder of the dataset, as its authors publish it.
        split: one of `splits`.
        files: a published list of frames, one on a line, image first; null: every frame under root.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.

    Raises:
        ValueError: no such split.
    """

    parts: Mapping[str, str]  # how the paths of "image", "label" and further files end; the groups name the sample
    without: ClassVar[frozenset[str]] = frozenset()  # folders that need not be entered

    def __init__(self, *, name: str, root: str, split: str, files: str | None, index_root: str | None) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)
        self.files = None if files is None else Path(files)

    def check(self) -> None:
        """Also the list of frames."""
        super().check()
        if self.files and not self.files.is_file():
            raise ValueError(
                f"source {self.name}: files={self.files} is no file; give the list of frames, or null for all"
            )

    def contents(self) -> dict[str, Any]:
        """The list of frames."""
        return {"files": hashlib.sha256(self.files.read_bytes()).hexdigest() if self.files else None}

    def scan(self) -> Iterator[Row]:
        """Matches the files; further ones are in `extra` by the name of their part."""
        found: dict[str, dict[str, str]] = {part: {} for part in self.parts}
        for folder, names in self.walk(without=self.without):
            for path in (f"{folder}/{name}" if folder else name for name in names):
                for part, pattern in self.parts.items():
                    if match := re.search(rf"/{pattern}\Z", f"/{path}"):
                        first = found[part].setdefault(_frame(match), path)
                        if first != path:
                            self.skip(path, f"{first} is the same frame and is used")
        images, labels = found.pop("image"), found.pop("label")
        for frame, image, label in self._listed(images, labels) if self.files else self.pairs(images, labels):
            lacking = [part for part, paths in found.items() if frame not in paths]
            if lacking:
                self.skip(image, f"there is no {lacking[0]} for it")
            else:
                more = {part: paths[frame] for part, paths in found.items()}
                yield Row(image, image, label, {"frame": frame.replace("/", " "), **more})

    def frame(self, columns: list[str]) -> str:
        """The frame that a line of a list names.

        Raises:
            ValueError: it is no line of a list of this dataset.
        """
        match = re.search(rf"/{self.parts['image']}\Z", f"/{columns[0]}")
        if match is None:
            raise ValueError(
                f"source {self.name}: files={self.files} has the line {' '.join(columns)!r}, which names no image of "
                f"{self.dataset}: {self.layout}"
            )
        return _frame(match)

    def sized(self, path: str, shape: tuple[int, ...], *, dtype: DTypeLike | None = None) -> np.ndarray:
        """The (h, w) map in a file, as stored; refused where it has another size.

        Args:
            path: relative to the root.
            shape: height and width that it must have.
            dtype: what the file must hold; None: any number.
        """
        values = self.values(path, dtype=dtype)
        if values.shape != shape:
            raise self.damaged(path, f"it is {values.shape}, wanted {shape}")
        return values

    def _listed(self, images: Mapping[str, str], labels: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
        """(frame, image, label) of the list's frames; those that cannot be used are skipped."""
        assert self.files is not None
        for frame, columns in {self.frame(columns): columns for columns in read_list(self.files)}.items():
            if "None" in columns[1:]:
                self.skip(columns[0], "the list names no label for it")
            elif frame not in images:
                self.skip(columns[0], "it is in the list, but not under root")
            elif frame not in labels:
                self.skip(images[frame], "an image without a label")
            else:
                yield frame, images[frame], labels[frame]


def _frame(match: re.Match[str]) -> str:
    return "/".join(str(int(group)) if group.isdecimal() else group for group in match.groups())
