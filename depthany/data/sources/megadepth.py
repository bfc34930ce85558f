"""MegaDepth v1 in its original files."""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import PurePosixPath
from typing import ClassVar, Literal

import numpy as np
from rich.progress import track

from depthany.data.files import DecodeError
from depthany.data.labels import Label
from depthany.data.sources.photos import SUFFIXES
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind

FEWEST_LEVELS = 10  # a map with fewer positive values is one of classes, not of depth
SAMPLED = 100_000  # positive values looked at for that


class MegaDepth(Raw):
    """`<scene>/dense0/imgs/<name>.jpg` with `<scene>/dense0/depths/<name>.h5`, the array `depth`: planar, 0 is none.

    The scale is that of each reconstruction. Many files hold an ordinal map under the same name instead: any value
    below 0, or only a few levels. They are left out, which takes reading every label once; what was found is kept in
    `megadepth.ordinal.jsonl` beside the list of samples. The folders `phoenix/S6/zl548/MegaDepth_v1` of the archive may
    stay.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the scenes 0000 …, or one above.
        split: all, or as dust3r has it: val is scenes 0015 and 0022, train the others.
        percentiles: depths below the first and above the second percentile are invalid, as in the authors' loader
            (1 and 98) against outliers; null: none.
        sky_masks: masks of the sky, which the labels do not know: a folder, or "beside": `<root>/.depthany/sky`, where
            `python -m depthany.sky` puts them; null: none.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "megadepth"
    layout: ClassVar[str] = "<scene>/dense0/imgs/<name>.jpg and <scene>/dense0/depths/<name>.h5"
    splits: ClassVar[tuple[str, ...]] = ("all", "train", "val")
    kind: ClassVar[DepthKind] = DepthKind.SCALE
    factor: ClassVar[float] = 1.0
    validation: ClassVar[frozenset[str]] = frozenset({"0015", "0022"})

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["all", "train", "val"],
        percentiles: Sequence[float] | None,
        sky_masks: str | None,
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root, sky_masks=sky_masks)
        if percentiles is not None and not (len(percentiles) == 2 and 0 <= percentiles[0] < percentiles[1] <= 100):
            raise ValueError(
                f"source {name}: percentiles={percentiles}; give two rising numbers from 0 to 100, or null"
            )
        self.options = {"percentiles": percentiles}

    def scan(self) -> Iterator[Row]:
        """Pairs by stem and sorts the ordinal maps out."""
        rows = []
        for folder, (images, depths) in self.siblings("imgs", "depths"):
            scene = PurePosixPath(folder).parent.name
            if not re.search(r"(?:^|/)\d{4}/dense\d+$", folder):
                continue
            if self.split != "all" and (scene in self.validation) != (self.split == "val"):
                continue
            pictures = [path for path in images if PurePosixPath(path).suffix.lower() in SUFFIXES]
            for _, image, depth in self.pairs(self.named(pictures, r"(.+)\.\w+"), self.named(depths, r"(.+)\.h5")):
                rows.append(Row(image, image, depth, {"scene": scene}))
        for row, fault in zip(rows, self._faults([row.label for row in rows]), strict=True):
            if fault:
                self.skip(row.label, fault)
            else:
                yield row

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / depth."""
        values = self.values(row.label, key="depth")
        if fault := ordinal(values):
            raise self.damaged(row.label, fault)
        values = values.astype(np.float32)
        mask = values > 0
        if self.options["percentiles"] is not None and mask.any():
            low, high = np.percentile(values[values > 1e-8], self.options["percentiles"])
            mask &= (values >= low) & (values <= high)
        return as_label(values, kind=self.kind, factor=self.factor, mask=mask)

    def _faults(self, paths: list[str]) -> Iterator[str]:
        """Why a label is no depth, or nothing; what was read before is not read again, even after a kill."""
        note = self.index_path.with_name(f"{self.dataset}.ordinal.jsonl")
        known = {}
        for line in note.read_text().splitlines() if note.exists() else []:
            with suppress(ValueError):  # a line that a kill has cut
                path, stat, fault = json.loads(line)
                known[path, *stat] = fault
        unread = [path for path in paths if (path, *self._stat(path)) not in known]
        with ThreadPoolExecutor(8) as pool, open(note, "a") as file:
            found = pool.map(self._fault, unread)
            both = zip(unread, found, strict=True)
            for path, fault in track(both, "looking for ordinal maps", len(unread), disable=not unread):
                known[path, *self._stat(path)] = fault
                file.write("\n" + json.dumps([path, self._stat(path), fault]))
        return (known[path, *self._stat(path)] for path in paths)

    def _fault(self, path: str) -> str:
        try:
            return ordinal(self.values(path, key="depth"))
        except DecodeError:
            return ""  # told when it is read


def ordinal(values: np.ndarray) -> str:
    """Why a map holds no depth, or nothing.

    The rule for negative values is that of the preparation notes of COTR; that for few levels comes from
    zhengqili/MegaDepth issues 16 and 38.
    """
    if (values < 0).any():
        return "an ordinal map (values below 0), no depth"
    positive = values[values > 0]
    if not positive.size:
        return "no depth in it"
    if len(np.unique(positive[:: max(1, positive.size // SAMPLED)])) < FEWEST_LEVELS:
        return f"an ordinal map (fewer than {FEWEST_LEVELS} levels), no depth"
    return ""
