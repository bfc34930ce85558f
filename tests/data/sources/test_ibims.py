"""iBims-1: 65535 is 50 m, and two masks."""

from pathlib import Path

import pytest
from PIL import Image

from depthany.data.files import DecodeError
from depthany.data.sources.ibims import Ibims
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, reasons
from tests.data.sources.writers.ibims import NAMES, write_ibims


def reader(root: Path) -> Ibims:
    return Ibims(name="ibims", root=str(root), split="all", index_root=None)


@pytest.mark.parametrize("below", ["", "ibims1_core_raw"])
def test_every_pixel(tmp_path: Path, below: str) -> None:
    truths = write_ibims(tmp_path)
    wanted = {path.removeprefix(f"{below}/" if below else ""): truth for path, truth in truths.items()}
    assert_reads(reader(tmp_path / below), wanted, kind=DepthKind.METRIC, depth_step=50 / 65535)


def test_without_a_mask_an_image_is_not_read(tmp_path: Path) -> None:
    write_ibims(tmp_path)
    (tmp_path / "ibims1_core_raw" / "mask_transp" / f"{NAMES[0]}.png").unlink()
    source = reader(tmp_path)
    assert len(source) == 1
    assert reasons(source) == {f"ibims/ibims1_core_raw/rgb/{NAMES[0]}.png": "there is no mask_transp for it"}


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    write_ibims(tmp_path)
    source = reader(tmp_path)
    Image.new("L", (12, 9), 255).save(tmp_path / source.row(0).extra["mask_invalid"])
    with pytest.raises(DecodeError, match=r"mask_invalid/corridor_01\.png: it is \(9, 12\), the depth \(18, 24\)"):
        source.read(0)
