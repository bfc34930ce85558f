"""The verb: every image gets its mask, what is there is kept, and what would mix two things is refused."""

import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from depthany.config.build import build
from depthany.config.check import ConfigError, check
from depthany.config.launch import compose
from depthany.data.scenes import render
from depthany.data.sources.raw import SKY_FOLDER, SKY_NOTE
from depthany.inference.sky import SkySegmenter
from depthany.runs.sky import PAGE, Masks, make_masks
from tests.processes import Zygote
from tests.segmenters import reference, write_segmenter

PICTURES = [render(style="a", seed=5, index=i, size=96).image[: 72 + 12 * (i % 2)] for i in range(5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmenter(tmp_path_factory.mktemp("models") / "one", PICTURES)


def write_set(root: Path, copies: int = 1) -> None:
    """Images of two sizes, in folders, with labels that know no sky."""
    for i, picture in enumerate(PICTURES * copies):
        for part, suffix in (("images", "png"), ("depth", "png")):
            file = root / part / f"{i // 2}" / f"{i}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            shown = picture[..., ::-1] if part == "images" else np.full(picture.shape[:2], 7, np.uint16)
            cv2.imwrite(str(file), shown)


def masks_of(root: Path, model: Path, *, out: Path | None = None, redo: bool = False, batch_size: int = 2) -> Masks:
    source = build(compose("sky", ["dataset=folder_pair", f"root='{root}'"]).dataset)
    segmenter = SkySegmenter(name=str(model), device="cpu")
    return make_masks(source, segmenter, out=out, limit=None, batch_size=batch_size, redo=redo, command="the command")


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def test_what_is_missing_is_asked_for() -> None:
    check(compose("sky", ["dataset=hrwsi", "root=FOLDER", "segmenter=ID"]))
    for options in ([], ["dataset=hrwsi", "root=FOLDER"], ["dataset=hrwsi", "segmenter=ID"]):
        with pytest.raises(ConfigError, match="dataset=NAME root=FOLDER segmenter=FOLDER_OR_ID"):
            check(compose("sky", options))


def test_from_masks_to_labels(tmp_path: Path, model: Path) -> None:
    root = tmp_path / "set"
    write_set(root)
    (root / "images/1/3.png").write_bytes((root / "images/1/3.png").read_bytes()[:99])
    folder = root / SKY_FOLDER
    found = masks_of(root, model)
    assert (found.made, found.there, len(found.shares)) == (4, 4, 4)
    assert [file for file, _ in found.damaged] == ["images/1/3.png"]
    expected = {i: reference(model, PICTURES[i], {"sky"}) for i in (0, 1, 2, 4)}
    for i, sky in expected.items():
        mask = read(folder / f"images/{i // 2}/{i}.png")
        assert mask.dtype == np.uint8 and 0 < sky.mean() < 1
        assert_array_equal(mask, np.where(sky, 255, 0))
    assert_array_equal([share for share, _ in found.shares], [sky.mean() for sky in expected.values()])
    html = (folder / PAGE).read_text(encoding="utf-8")
    assert html.count("<img") == 4 and "the command" in html and "images/1/3.png" in html
    source = build(compose("audit", ["dataset=folder_pair", f"root='{root}'", "dataset.sky_masks=beside"]).dataset)
    source.prepare()
    assert_array_equal(source.read(4)["sky"], expected[4])
    assert_array_equal(source.read(4)["disparity"] == 0, expected[4])


def test_what_is_there_is_kept(tmp_path: Path, model: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "masks"
    write_set(root)
    masks_of(root, model, out=out)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(out.rglob("*.png"))}
    assert len(before) == 5
    gone = sorted(before)[2]
    gone.unlink()
    again = masks_of(root, model, out=out, batch_size=8)
    assert (again.made, again.there) == (1, 5)
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == {
        path: data for path, (data, _) in before.items()
    }
    assert all(path.stat().st_mtime_ns == at for path, (_, at) in before.items() if path != gone)


def test_masks_of_two_models_never_lie_together(tmp_path: Path, model: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "masks"
    write_set(root)
    masks_of(root, model, out=out)
    other = write_segmenter(tmp_path / "other", PICTURES, seed=1)
    with pytest.raises(ConfigError, match=r"masks of another model, one: redo=true replaces them all, out=FOLDER"):
        masks_of(root, other, out=out)
    (root / "images/0/0.png").unlink()  # its mask must go as well
    assert masks_of(root, other, out=out, redo=True).made == 4 == len(list(out.rglob("*.png")))
    assert_array_equal(read(out / "images/1/2.png") == 255, reference(other, PICTURES[2], {"sky"}))
    (out / SKY_NOTE).unlink()
    with pytest.raises(ConfigError, match=r"holds PNG files without sky.json"):
        masks_of(root, model, out=out, redo=True)


@pytest.mark.parametrize("out", [".", "set", "set/images", "set/masks"])
def test_masks_are_kept_out_of_the_data(out: str, tmp_path: Path, model: Path) -> None:
    write_set(tmp_path / "set")
    before = sorted((tmp_path / "set").rglob("*.png"))
    with pytest.raises(ConfigError, match=r"would mix the masks with the data"):
        masks_of(tmp_path / "set", model, out=tmp_path / out, redo=True)
    assert sorted((tmp_path / "set").rglob("*.png")) == before


def test_a_source_without_files_is_refused(model: Path) -> None:
    source = build(compose("sky", ["dataset=embedded"]).dataset)
    segmenter = SkySegmenter(name=str(model), device="cpu")
    with pytest.raises(ConfigError, match="has no option sky_masks"):
        make_masks(source, segmenter, out=None, limit=None, batch_size=1, redo=False, command="")


@pytest.mark.slow
def test_a_kill_loses_nothing(zygote: Zygote, tmp_path: Path, model: Path) -> None:
    root, count = tmp_path / "set", 400
    write_set(root, copies=count // len(PICTURES))
    folder, environment = root / SKY_FOLDER, {"HF_HUB_OFFLINE": "1"}
    command = ["depthany.sky", "dataset=folder_pair", f"root={root}", "batch_size=1", "device=cpu"]

    def there() -> list[Path]:
        return [path for path in folder.rglob("*.png")]

    for number, code in ((9, -9), (15, 75)):
        already = len(there())
        group = zygote.start([*command, f"segmenter={model}"], cwd=tmp_path, env=environment)
        ends = time.monotonic() + 60
        while len(there()) <= already and time.monotonic() < ends:
            time.sleep(0.002)
        group.kill(number)
        assert group.wait(30) == [code], group.output()
        assert already < len(there()) < count, group.output()
        assert all(set(np.unique(read(path))) <= {0, 255} for path in there())  # each is whole
    assert "stopped by a signal; the same command goes on" in group.output()
    missing = count - len(there())
    output = zygote.run([*command, f"segmenter={model}"], cwd=tmp_path, env=environment)
    assert f"{count}, of which this run made {missing}" in output
    for i, picture in enumerate(PICTURES):
        sky = reference(model, picture, {"sky"})
        for j in range(i, count, len(PICTURES)):
            assert_array_equal(read(folder / f"images/{j // 2}/{j}.png") == 255, sky)
    output = zygote.run([*command, "segmenter=some/model"], cwd=tmp_path, env=environment, code=2)
    assert output.count("\n") == 1 and "connect once, or give a folder" in output
