"""BlendedMVS: planar depth of any scale from PFM, whatever the byte order."""

from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.blendedmvs import BlendedMvs
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, reasons
from tests.data.sources.writers.blendedmvs import SCENES, SHAPE, pfm, write_blendedmvs, write_traps


def reader(root: Path, split: str = "all") -> BlendedMvs:
    return BlendedMvs(name="blendedmvs", root=str(root), split=split, sky_masks=None, index_root=None)  # type: ignore[arg-type]


def test_every_pixel(tmp_path: Path) -> None:
    truths = write_blendedmvs(tmp_path)
    write_traps(tmp_path)
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.SCALE)
    assert reasons(source) == {
        f"blendedmvs/{SCENES[0]}/blended_images/00000007.jpg": "an image without a label",
        f"blendedmvs/{SCENES[0]}/rendered_depth_maps/00000008.pfm": "a label without an image",
    }


def test_splits_share_nothing_and_miss_nothing(tmp_path: Path) -> None:
    truths = write_blendedmvs(tmp_path)
    train, val = ({reader(tmp_path, s).row(i).image for i in range(2)} for s in ("train", "val"))
    assert train | val == truths.keys() and not train & val
    assert all(SCENES[1] in path for path in val)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pfm(np.zeros(SHAPE)), "no pixel has a valid value"),
        (pfm(np.ones(SHAPE))[:-40], "truncated"),
        (b"P6\n24 18\n255\n", "not a PFM"),
    ],
    ids=["empty", "cut", "other format"],
)
def test_bad_files_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    write_blendedmvs(tmp_path)
    path = tmp_path / SCENES[0] / "rendered_depth_maps" / "00000000.pfm"
    path.write_bytes(content)
    with pytest.raises(DecodeError, match=rf"00000000\.pfm: {message}.*; fetch the file again"):
        reader(tmp_path).read(0)
