"""Extracted DDAD: sparse metres."""

from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.ddad import Ddad
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.ddad import SHAPE, write_ddad


def reader(root: Path) -> Ddad:
    return Ddad(name="ddad", root=str(root), split="all", index_root=None)


def test_every_pixel(tmp_path: Path) -> None:
    truths = write_ddad(tmp_path)
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.METRIC)
    assert all(source.row(i).files == [source.row(i).image, source.row(i).label] for i in range(3))
    assert all(source.read(i)["valid"].mean() < 0.2 for i in range(3))


def test_half_pairs_are_named(tmp_path: Path) -> None:
    write_ddad(tmp_path)
    save_picture(tmp_path / "x_rgb.png", picture(*SHAPE, number=0))
    np.save(tmp_path / "y_depth.npy", np.ones(SHAPE, np.float32))
    assert reasons(reader(tmp_path)) == {
        "ddad/x_rgb.png": "an image without a label",
        "ddad/y_depth.npy": "a label without an image",
    }


def test_repacks_are_refused(tmp_path: Path) -> None:
    write_ddad(tmp_path)
    source = reader(tmp_path)
    np.save(tmp_path / source.row(0).label, np.full(SHAPE, 2000, np.uint16))
    with pytest.raises(DecodeError, match=r"_depth\.npy: it holds uint16, wanted floats in metres"):
        source.read(0)
    np.save(tmp_path / source.row(0).label, np.ones((9, 14), np.float32))
    with pytest.raises(DecodeError, match=r"it is \(9, 14\), wanted \(18, 28\)"):
        source.read(0)
