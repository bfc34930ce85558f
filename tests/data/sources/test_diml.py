"""DIML: millimetres, indoors without codes to trust the suffix for, outdoors with a confidence."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthany.data.files import DecodeError
from depthany.data.sources.diml import DimlIndoor, DimlOutdoor
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.diml import SHAPE, write_diml_indoor, write_diml_outdoor


def indoor(root: Path, split: str = "all") -> DimlIndoor:
    return DimlIndoor(name="diml", root=str(root), split=split, index_root=None)  # type: ignore[arg-type]


def outdoor(root: Path, split: str = "all", *, min_confidence: float = 0.6) -> DimlOutdoor:
    options = {"name": "diml", "root": str(root), "split": split, "index_root": None}
    return DimlOutdoor(min_confidence=min_confidence, sky_masks=None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sample", [False, True])
def test_every_pixel_indoors(tmp_path: Path, sample: bool) -> None:
    truths = write_diml_indoor(tmp_path, sample=sample)
    source = indoor(tmp_path)
    assert_reads(source, truths, kind=DepthKind.METRIC, depth_step=0.001)
    assert reasons(source) == {}


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("min_confidence", [0.0, 0.6, 0.9])
def test_every_pixel_outdoors(tmp_path: Path, sample: bool, min_confidence: float) -> None:
    truths = write_diml_outdoor(tmp_path, min_confidence=min_confidence, sample=sample)
    source = outdoor(tmp_path, min_confidence=min_confidence)
    assert_reads(source, truths, kind=DepthKind.METRIC, depth_step=0.001)


def test_held_out_parts(tmp_path: Path) -> None:
    write_diml_indoor(tmp_path)
    write_diml_outdoor(tmp_path, min_confidence=0.6)
    for read, held_out in ((indoor, "16. Billiard Hall"), (outdoor, "170721_C0")):
        val, train = read(tmp_path, "val"), read(tmp_path, "train")
        assert all(held_out in val.row(i).image for i in range(len(val)))
        assert not any(held_out in train.row(i).image for i in range(len(train)))
        assert len(val) + len(train) == len(read(tmp_path))


def test_what_has_no_partner_is_named(tmp_path: Path) -> None:
    write_diml_indoor(tmp_path)
    batch = tmp_path / "indoor" / "1. Bedroom" / "20170101" / "batch 1"
    save_picture(batch / "col" / "x_c.png", picture(*SHAPE, number=0))
    save_picture(batch / "up_png" / "y_ud.png", picture(*SHAPE, number=0)[..., 0])
    save_picture(batch / "up_png" / "in_k_01_ud.png", picture(*SHAPE, number=0)[..., 0])
    save_picture(tmp_path / "indoor" / "2. Hall" / "up_png" / "z_ud.png", picture(*SHAPE, number=0)[..., 0])
    found = {Path(key).name: reason for key, reason in reasons(indoor(tmp_path)).items()}
    assert found == {
        "x_c.png": "an image without a label",
        "y_ud.png": "a label without an image",
        "z_ud.png": "a label without an image",
        "in_k_01_ud.png": "in_k_01_depth_filled.png is a label of the same image and is used",
    }


def test_outdoors_a_confidence_map_is_needed(tmp_path: Path) -> None:
    write_diml_outdoor(tmp_path, min_confidence=0.6)
    (tmp_path / "outdoor" / "160628_A1" / "0001" / "conf" / "7_conf.png").unlink()
    source = outdoor(tmp_path)
    assert set(reasons(source).values()) == {"there is no confidence map for it"}
    conf = tmp_path / source.row(0).extra["confidence"]
    Image.fromarray(np.full((9, 12), 255, np.uint8)).save(conf)
    with pytest.raises(DecodeError, match=r"7_conf\.png: it is \(9, 12\), the depth \(18, 24\)"):
        source.read(0)
    with pytest.raises(ValueError, match=r"min_confidence=1\.5; give a number from 0 to below 1"):
        outdoor(tmp_path, min_confidence=1.5)


def test_eight_bits_are_refused(tmp_path: Path) -> None:
    write_diml_indoor(tmp_path)
    source = indoor(tmp_path)
    Image.fromarray(np.full(SHAPE, 200, np.uint8)).save(tmp_path / source.row(0).label)
    with pytest.raises(DecodeError, match="it holds uint8, wanted uint16"):
        source.read(0)
