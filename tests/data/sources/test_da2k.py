"""DA-2K: which point is closer is read, rows come before columns, and a tie is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.da2k import Da2k, PointPairs
from tests.data.sources.writers.analytic import picture, save_picture
from tests.data.sources.writers.da2k import PAIRS, SHAPE, UMLAUT, disparity, write_annotations, write_da2k


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_da2k(tmp_path)
    return tmp_path


def by_scenario(root: Path) -> dict[str, PointPairs]:
    source = Da2k(name="da2k", root=str(root))
    return {(pairs := source.pairs(i)).scenario: pairs for i in range(len(source))}


def change(root: Path, path: str, value: Any) -> None:
    annotations = json.loads((root / "annotations.json").read_text())
    write_annotations(root, annotations | {path: value})


def test_points_are_those_of_the_file(root: Path) -> None:
    found = by_scenario(root)
    assert found.keys() == {"indoor", "outdoor", "non_real"} and len({pairs.key for pairs in found.values()}) == 3
    for number, (path, pairs) in enumerate(PAIRS.items()):
        read = found[path.split("/")[1]]
        assert np.abs(read.image.astype(int) - picture(*SHAPE, number=number)).max() <= 8
        for i, (first, second, closer) in enumerate(pairs):
            wanted = (first, second) if closer == "point1" else (second, first)
            np.testing.assert_array_equal((read.closer[i], read.farther[i]), wanted)


def test_the_true_map_is_right_but_for_the_tie(root: Path) -> None:
    for number, path in enumerate(PAIRS):
        pairs, truth = by_scenario(root)[path.split("/")[1]], disparity(number)
        assert pairs.right(truth).all() == ("tie" not in path)
        assert not pairs.right(-truth).any()
        assert not pairs.right(np.zeros(SHAPE)).any()  # a constant map orders nothing


def test_always_the_first_point_is_not_always_right(root: Path) -> None:
    """A map that makes point1 the nearest everywhere is wrong where the file says point2."""
    pairs = by_scenario(root)["indoor"]
    first = np.zeros(SHAPE)
    first[17, 39] = 1
    assert pairs.right(first).tolist() == [True, False]


def test_a_map_of_another_size_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"the map is \(40, 18\): resize it to \(18, 40\) first"):
        by_scenario(root)["indoor"].right(disparity(0).T)


def test_an_annotation_without_image_is_named(root: Path) -> None:
    (root / "images" / "indoor" / "a.jpg").unlink()
    source = Da2k(name="da2k", root=str(root))
    assert len(source) == 2
    assert [(skip.key, skip.reason) for skip in source.skipped] == [
        ("da2k/images/indoor/a.jpg", "an annotation without an image")
    ]
    assert any("Mu" in path.name for path in (root / "images" / "outdoor").iterdir())  # decomposed, and found as
    assert any(UMLAUT.split("/")[1] == source.pairs(i).scenario for i in range(2))


PAIR = {"point1": [1, 2], "point2": [3, 4], "closer_point": "point1"}


@pytest.mark.parametrize(
    "value",
    [
        [PAIR | {"closer_point": "point3"}],
        [PAIR | {"point1": [1.5, 2]}],
        [PAIR | {"point1": [1, 2, 3]}],
        [{"point1": [1, 2]}],
        {"point1": [1, 2]},
        [],
        None,
    ],
    ids=["third point", "between pixels", "three numbers", "half", "no list", "empty", "null"],
)
def test_other_annotations_are_refused(root: Path, value: Any) -> None:
    change(root, "images/indoor/a.jpg", value)
    with pytest.raises(DecodeError, match=r"annotations\.json: damaged or no annotations of DA-2K: .*; fetch it again"):
        Da2k(name="da2k", root=str(root))


def test_a_damaged_file_is_named(root: Path) -> None:
    change(root, "images/indoor/a.jpg", [PAIR | {"point2": [2, 40]}])
    with pytest.raises(
        DecodeError, match=r"a\.jpg: a point of annotations\.json lies outside of its \(18, 40\) pixels"
    ):
        by_scenario(root)
    change(root, "images/indoor/a.jpg", [PAIR | {"point2": [-1, 4]}])
    with pytest.raises(DecodeError, match="lies outside"):
        by_scenario(root)
    (root / "images" / "indoor" / "a.jpg").write_bytes(b"\xff\xd8cut")
    with pytest.raises(DecodeError, match=r"a\.jpg: .*; fetch the file again, or delete it"):
        by_scenario(root)
    text = (root / "annotations.json").read_text()
    (root / "annotations.json").write_text(text[:-30])
    with pytest.raises(DecodeError, match=r"annotations\.json: damaged"):
        Da2k(name="da2k", root=str(root))


def test_a_wrong_root_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"source da2k: no annotations\.json in root=\S+; set `root` to the folder DA-2K"
    ):
        Da2k(name="da2k", root=str(tmp_path))
    write_annotations(tmp_path, {"images/indoor/a.jpg": [PAIR]})
    with pytest.raises(ValueError, match=r"no image of annotations\.json is in root=\S+; unpack images/ beside it"):
        Da2k(name="da2k", root=str(tmp_path))
    save_picture(tmp_path / "images" / "indoor" / "a.jpg", picture(*SHAPE, number=0))
    assert len(Da2k(name="da2k", root=str(tmp_path))) == 1
