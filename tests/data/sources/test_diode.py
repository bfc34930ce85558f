"""DIODE: npy with a trailing axis, and a mask that alone does not make a measurement."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.diode import Diode
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.diode import SHAPE, STEMS, write_diode


def reader(root: Path, split: str = "all", places: tuple[str, ...] = ("indoors", "outdoor")) -> Diode:
    return Diode(name="diode", root=str(root), split=split, places=places, index_root=None)  # type: ignore[arg-type]


def test_every_pixel(tmp_path: Path) -> None:
    assert_reads(reader(tmp_path), write_diode(tmp_path), kind=DepthKind.METRIC)


@pytest.mark.parametrize(
    ("split", "places", "count"),
    [
        ("val", ("indoors",), 1),
        ("val", ("outdoor",), 1),
        ("val", ("outdoor", "indoors"), 2),
        ("train", ("outdoor",), 1),
        ("all", ("outdoor",), 2),
    ],
)
def test_splits_and_places_are_folders(tmp_path: Path, split: str, places: tuple[str, ...], count: int) -> None:
    truths = write_diode(tmp_path)
    wanted = {p: t for p, t in truths.items() if p.split("/")[0] in (split, *["val", "train"] * (split == "all"))}
    wanted = {path: truth for path, truth in wanted.items() if path.split("/")[1] in places}
    assert len(wanted) == count
    assert_reads(reader(tmp_path, split, places), wanted, kind=DepthKind.METRIC)


def test_two_places_of_one_root_live_side_by_side(tmp_path: Path) -> None:
    write_diode(tmp_path)
    copies = [pickle.dumps(reader(tmp_path, "all", places)) for places in (("indoors",), ("outdoor",))]
    assert [len(pickle.loads(copy)) for copy in copies] == [1, 2]


def test_a_wrong_place_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"places=\['outdoors'\]; give indoors, outdoor, or both"):
        reader(tmp_path, "val", ("outdoors",))


def test_what_lacks_a_file_is_named(tmp_path: Path) -> None:
    write_diode(tmp_path)
    folder, stem = next(iter(STEMS.items()))
    save_picture(tmp_path / folder / "alone.png", picture(*SHAPE, number=0))
    (tmp_path / folder / f"{stem}_depth_mask.npy").unlink()
    np.save(tmp_path / folder / "blind_depth.npy", np.ones((*SHAPE, 1), np.float32))
    assert reasons(reader(tmp_path, "val")) == {
        f"diode/{folder}/alone.png": "an image without a label",
        f"diode/{folder}/{stem}.png": "there is no mask for it",
        f"diode/{folder}/blind_depth.npy": "a label without an image",
    }


def test_bad_files_are_told(tmp_path: Path) -> None:
    write_diode(tmp_path)
    source = reader(tmp_path, "val", ("indoors",))
    label, mask = tmp_path / source.row(0).label, tmp_path / source.row(0).extra["mask"]
    np.save(mask, np.ones((9, 12)))
    with pytest.raises(DecodeError, match=r"_depth_mask\.npy: it is \(9, 12\), wanted \(18, 24\)"):
        source.read(0)
    np.save(label, np.ones((*SHAPE, 1), np.float64))
    with pytest.raises(DecodeError, match=r"_depth\.npy: it holds float64, wanted float32"):
        source.read(0)
    label.write_bytes(label.read_bytes()[:300])
    with pytest.raises(DecodeError, match=r"_depth\.npy: damaged"):
        source.read(0)
