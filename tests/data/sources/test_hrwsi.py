"""HRWSI: already a disparity, valid where its mask says so."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthany.data.files import DecodeError
from depthany.data.sources.hrwsi import Hrwsi
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, reasons
from tests.data.sources.writers.hrwsi import STEMS, write_hrwsi, write_traps


def reader(root: Path, split: str = "all") -> Hrwsi:
    return Hrwsi(name="hrwsi", root=str(root), split=split, sky_masks=None, index_root=None)  # type: ignore[arg-type]


def test_every_pixel(tmp_path: Path) -> None:
    truths = write_hrwsi(tmp_path)
    write_traps(tmp_path)
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.AFFINE, disparity_step=1)
    assert reasons(source) == {
        "hrwsi/train/imgs/alone.jpg": "an image without a label",
        "hrwsi/train/imgs/unmasked.jpg": "there is no mask for it in valid_masks",
    }
    for i in range(len(source)):
        sample = source.read(i)
        farthest = sample["valid"] & (sample["disparity"] == 0)
        assert farthest.any() and not sample["sky"].any()  # 0 is the farthest value, not infinitely far


@pytest.mark.parametrize("split", ["train", "val"])
def test_splits_are_the_folders(tmp_path: Path, split: str) -> None:
    write_hrwsi(tmp_path)
    source = reader(tmp_path, split)
    assert len(source) == 1 and source.row(0).image == f"{split}/imgs/{STEMS[split]}.jpg"


def test_bad_files_are_told(tmp_path: Path) -> None:
    write_hrwsi(tmp_path)
    mask = tmp_path / "train" / "valid_masks" / f"{STEMS['train']}.png"
    Image.fromarray(np.ones((9, 12), np.uint8)).save(mask)
    with pytest.raises(DecodeError, match=r"valid_masks\S+: the mask is \(9, 12\), its label \(18, 24\)"):
        reader(tmp_path, "train").read(0)
