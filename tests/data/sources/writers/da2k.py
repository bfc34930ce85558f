"""DA-2K in miniature: points as [row, column], the second closer once, a tie, and a name with an umlaut."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.sources.writers.analytic import picture, save_picture, scene_depth

SHAPE = (18, 40)  # a column is often no row
UMLAUT = "images/outdoor/Müller.jpeg"
PAIRS: dict[str, list[tuple[list[int], list[int], str]]] = {
    "images/indoor/a.jpg": [([17, 39], [4, 3], "point1"), ([17, 39], [2, 30], "point2")],
    UMLAUT: [([5, 20], [16, 22], "point1")],
    "images/non_real/tie.jpg": [([16, 7], [16, 7], "point1")],  # any map is equal there
}


def disparity(number: int) -> np.ndarray:
    """(h, w) of an image's analytic depth; the pairs are right by it, but for the tie."""
    return 1 / scene_depth(*SHAPE, number=number)


def write_da2k(root: Path) -> None:
    """Three images; the name with an umlaut is composed in the annotations and decomposed on the disk."""
    annotations: dict[str, Any] = {}
    for number, (path, pairs) in enumerate(PAIRS.items()):
        save_picture(root / unicodedata.normalize("NFD", path), picture(*SHAPE, number=number))
        annotations[unicodedata.normalize("NFC", path)] = [
            {"point1": first, "point2": second, "closer_point": closer} for first, second, closer in pairs
        ]
    write_annotations(root, annotations)


def write_annotations(root: Path, annotations: object) -> None:
    (root / "annotations.json").write_text(json.dumps(annotations, ensure_ascii=False), encoding="utf-8")
