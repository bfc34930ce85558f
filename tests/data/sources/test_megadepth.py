"""MegaDepth: depth of any scale, and no ordinal map taken for one."""

from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.megadepth import MegaDepth
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.megadepth import PREFIX, SHAPE, h5, write_megadepth, write_ordinal


def reader(root: Path, split: str = "all", percentiles: list[float] | None = None) -> MegaDepth:
    options = {"name": "mega", "root": str(root), "split": split, "index_root": None}
    return MegaDepth(percentiles=percentiles, sky_masks=None, **options)  # type: ignore[arg-type]


def test_every_pixel_without_the_ordinal_maps(tmp_path: Path) -> None:
    truths = write_megadepth(tmp_path, outliers=False)
    left_out = write_ordinal(tmp_path)
    source = reader(tmp_path)
    assert_reads(source, truths, kind=DepthKind.SCALE)
    assert reasons(source) == {f"mega/{path}": reason for path, reason in left_out.items()}


def test_percentiles_take_the_outliers_and_not_much_more(tmp_path: Path) -> None:
    truths = write_megadepth(tmp_path, outliers=True)
    source, plain = reader(tmp_path, percentiles=[1, 98]), reader(tmp_path)
    for i in range(len(source)):
        truth, sample = truths[source.row(i).image], source.read(i)
        assert plain.read(i)["valid"][7, 7] and not sample["valid"][7, 7]
        assert not (sample["valid"] & ~truth.valid).any()
        assert (truth.valid & ~sample["valid"]).sum() <= 0.04 * truth.valid.size
        kept = sample["valid"]
        np.testing.assert_allclose(sample["disparity"][kept], truth.disparity[kept], rtol=1e-6)
    with pytest.raises(ValueError, match=r"percentiles=\[98, 1\]; give two rising numbers"):
        reader(tmp_path, percentiles=[98, 1])


def test_each_label_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_megadepth(tmp_path, outliers=False)
    write_ordinal(tmp_path)
    looked: list[str] = []
    original = MegaDepth.values
    monkeypatch.setattr(MegaDepth, "values", lambda self, path, **kw: looked.append(path) or original(self, path, **kw))
    assert len(reader(tmp_path)) == 4 and len(looked) == 7
    folder = tmp_path / PREFIX / "0162" / "dense0"
    save_picture(folder / "imgs" / "new.jpg", picture(*SHAPE, number=0))
    h5(folder / "depths" / "new.h5", np.linspace(1, 9, SHAPE[0] * SHAPE[1], dtype=np.float32).reshape(SHAPE))
    h5(folder / "depths" / "nothing.h5", np.linspace(1, 9, SHAPE[0] * SHAPE[1], dtype=np.float32).reshape(SHAPE))
    note = tmp_path / ".depthany" / "megadepth.ordinal.jsonl"
    note.write_text(note.read_text() + '\n["cut by a ki')  # the last line of a scan that was killed
    assert len(reader(tmp_path)) == 6
    assert sorted(Path(path).name for path in looked[7:]) == ["new.h5", "nothing.h5"]
    assert len(reader(tmp_path, "val")) == 2 and len(looked) == 9  # the splits share what was found
    next((tmp_path / ".depthany").glob("megadepth-all-*.jsonl")).unlink()
    assert len(reader(tmp_path)) == 6 and len(looked) == 9


def test_an_ordinal_map_that_comes_later_is_refused(tmp_path: Path) -> None:
    write_megadepth(tmp_path, outliers=False)
    source = reader(tmp_path)
    path = tmp_path / source.row(0).label
    h5(path, np.full(SHAPE, -1, np.float32))
    with pytest.raises(DecodeError, match=r"\.h5: an ordinal map \(values below 0\), no depth; fetch"):
        source.read(0)
    h5(path, np.ones(SHAPE, np.float32), key="other")
    with pytest.raises(DecodeError, match=r"\.h5: holds \['other'\]"):
        source.read(0)


def test_splits_are_scenes(tmp_path: Path) -> None:
    write_megadepth(tmp_path, outliers=False)
    val, train = reader(tmp_path, "val"), reader(tmp_path, "train")
    assert {val.row(i).extra["scene"] for i in range(len(val))} == {"0015"}
    assert {train.row(i).extra["scene"] for i in range(len(train))} == {"0162"}


def test_half_pairs_and_doubles_are_named(tmp_path: Path) -> None:
    write_megadepth(tmp_path, outliers=False)
    folder = tmp_path / PREFIX / "0015" / "dense0"
    save_picture(folder / "imgs" / "0_o.png", picture(*SHAPE, number=0))
    save_picture(folder / "imgs" / "x.jpg", picture(*SHAPE, number=0))
    h5(folder / "depths" / "y.h5", np.ones(SHAPE))
    found = {Path(key).name: reason for key, reason in reasons(reader(tmp_path)).items()}
    assert found == {
        "0_o.png": "0_o.jpg has the same name and is used",
        "x.jpg": "an image without a label",
        "y.h5": "a label without an image",
    }
