"""MPI Sintel: .dpt, both passes, and a sky that is only very far."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.sintel import Sintel
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.sintel import SHAPE, SKY, dpt, write_sintel


def reader(root: Path, passes: tuple[str, ...] = ("clean", "final"), sky_above: float | None = 1e4) -> Sintel:
    options = {"name": "sintel", "root": str(root), "split": "all", "index_root": None}
    return Sintel(passes=passes, sky_above=sky_above, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("apart", [False, True])
def test_every_pixel_of_both_passes(tmp_path: Path, apart: bool) -> None:
    truths = write_sintel(tmp_path, apart=apart)
    source = reader(tmp_path)
    assert all(truth.sky.any() for truth in truths.values()) and len(truths) == 8
    assert_reads(source, truths, kind=DepthKind.SCALE)
    assert reasons(source) == {}


def test_one_pass(tmp_path: Path) -> None:
    truths = write_sintel(tmp_path)
    source = reader(tmp_path, ("final",))
    assert_reads(source, {k: v for k, v in truths.items() if "/final/" in k}, kind=DepthKind.SCALE)
    with pytest.raises(ValueError, match=r"passes=\['albedo'\]; give clean, final, or both"):
        reader(tmp_path, ("albedo",))
    with pytest.raises(ValueError, match=r"passes=\[\]; give"):
        reader(tmp_path, ())


def test_two_passes_of_one_root_live_side_by_side(tmp_path: Path) -> None:
    write_sintel(tmp_path)
    copies = [pickle.dumps(reader(tmp_path, (part,))) for part in ("clean", "final")]
    assert [pickle.loads(copy).row(0).extra["pass"] for copy in copies] == ["clean", "final"]


def test_without_a_threshold_the_sky_is_a_far_surface(tmp_path: Path) -> None:
    write_sintel(tmp_path)
    source = reader(tmp_path, ("final",), None)
    for i in range(len(source)):
        sample = source.read(i)
        assert sample["valid"].all() and not sample["sky"].any()
        assert sample["disparity"].min() == pytest.approx(1 / SKY[i % 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dpt(np.ones(SHAPE), tag=struct.pack(">f", 202021.25)), "does not begin with PIEH"),
        (dpt(np.ones(SHAPE), tag=b"PNG\0"), "does not begin with PIEH"),
        (b"PIEH\0", "does not begin with PIEH"),
        (b"", "does not begin with PIEH"),
        (dpt(np.ones((SHAPE[1], SHAPE[0]))), r"the depth is \(42, 18\), the image \(18, 42\)"),
        (dpt(np.ones(SHAPE))[:-4], r"3032 bytes, wanted 3036"),
        (dpt(np.ones(SHAPE)) + b"more", r"3040 bytes, wanted 3036"),
    ],
    ids=["big-endian", "other tag", "header cut", "empty", "exchanged", "cut", "too long"],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_sintel(tmp_path)
    source = reader(tmp_path)
    (tmp_path / source.row(0).label).write_bytes(content)
    with pytest.raises(DecodeError, match=rf"frame_0001\.dpt: .*{message}.*; fetch the file again"):
        source.read(0)


def test_half_pairs_are_named(tmp_path: Path) -> None:
    write_sintel(tmp_path)
    save_picture(tmp_path / "training/final/alley_1/frame_0009.png", picture(*SHAPE, number=0))
    (tmp_path / "training/final/market_2/frame_0002.png").unlink()
    assert reasons(reader(tmp_path, ("final",))) == {
        "sintel/training/final/alley_1/frame_0009.png": "an image without a label",
        "sintel/training/depth/market_2/frame_0002.dpt": "a label without an image",
    }
