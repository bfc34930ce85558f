"""DA-2K: pairs of points, one of which is closer. There are no depth maps."""

import json
import unicodedata
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np

from depthany.data.files import DecodeError, read_image, sample_key
from depthany.types import Skip

FILE = "annotations.json"


class PointPairs(NamedTuple):
    """One image and its n pairs."""

    key: str
    scenario: str  # the folder of the image: indoor, outdoor, non_real, ...
    image: np.ndarray  # (H, W, 3) uint8 RGB
    closer: np.ndarray  # (n, 2) int64: row and column of the closer point, in pixels of the image
    farther: np.ndarray  # (n, 2) int64, likewise

    def right(self, disparity: np.ndarray) -> np.ndarray:
        """Which pairs a prediction orders rightly, (n,) bool. A tie is wrong, or a constant map would be perfect.

        Args:
            disparity: (H, W), larger is nearer, resized to the image.

        Raises:
            ValueError: it has another size.
        """
        if disparity.shape != self.image.shape[:2]:
            raise ValueError(f"{self.key}: the map is {disparity.shape}: resize it to {self.image.shape[:2]} first")
        return disparity[tuple(self.closer.T)] > disparity[tuple(self.farther.T)]


class Da2k:
    """`annotations.json` with `images/<scenario>/<file>`; for evaluation only.

    Each pair is two points [row, column] and the name of the closer one, which is read, though it is always the first.

    Args:
        name: of the source, the first part of every key.
        root: the folder DA-2K, which holds annotations.json.

    Raises:
        ValueError: no such folder.
        DecodeError: a damaged annotations.json.
    """

    dataset: ClassVar[str] = "da2k"

    def __init__(self, *, name: str, root: str) -> None:
        self.name, self.root = name, Path(root)
        if not (self.root / FILE).is_file():
            raise ValueError(
                f"source {name}: no {FILE} in root={root}; set `root` to the folder DA-2K, which holds it and "
                "images/<scenario>/<file>"
            )
        self.skipped: list[Skip] = []
        self._rows = self._read()

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """`<name>/<path of the image>` in plain letters."""
        return sample_key(self.name, PurePosixPath(self._rows[index][0]))

    def pairs(self, index: int) -> PointPairs:
        """The image with its pairs.

        Raises:
            DecodeError: a damaged image, or a point outside of it.
            OSError: the image cannot be read at all.
        """
        path, points = self._rows[index]
        file = self._files[path]
        try:
            image = read_image(file.read_bytes())
        except DecodeError as err:
            raise DecodeError(f"{file}: {err}; fetch the file again, or delete it to leave the image out") from err
        if (points < 0).any() or (points >= image.shape[:2]).any():
            raise DecodeError(
                f"{file}: a point of {FILE} lies outside of its {image.shape[:2]} pixels; fetch both again"
            )
        return PointPairs(self.key(index), PurePosixPath(path).parent.name, image, points[:, 0], points[:, 1])

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The files by their path in composed letters: unpacking may decompose an umlaut."""
        files = (path for path in (self.root / "images").rglob("*") if path.is_file())
        return {_composed(path.relative_to(self.root).as_posix()): path for path in files}

    def _read(self) -> list[tuple[str, np.ndarray]]:
        """(path, (n, 2, 2) int64: closer and farther point) of every image that is there."""
        rows = []
        try:
            listed: dict[str, Any] = json.loads((self.root / FILE).read_text(encoding="utf-8"))
            for path, pairs in sorted((_composed(path), pairs) for path, pairs in listed.items()):
                points = np.array([_ordered(pair) for pair in pairs])
                if points.dtype != np.int64 or points.shape[1:] != (2, 2):
                    raise ValueError(f"points of {path} are not [row, column]")
                if path in self._files:
                    rows.append((path, points))
                else:
                    self.skipped.append(Skip(self.name, f"{self.name}/{path}", "an annotation without an image"))
        except (ValueError, LookupError, TypeError, AttributeError) as err:  # what any other JSON raises
            raise DecodeError(f"{self.root / FILE}: damaged or no annotations of DA-2K: {err}; fetch it again") from err
        if not rows:
            raise ValueError(f"source {self.name}: no image of {FILE} is in root={self.root}; unpack images/ beside it")
        return rows


def _ordered(pair: dict[str, Any]) -> list[list[int]]:
    """Closer point, farther point."""
    first, second = pair["point1"], pair["point2"]
    return {"point1": [first, second], "point2": [second, first]}[pair["closer_point"]]


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", path)
