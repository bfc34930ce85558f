"""Sky masks of the five readers that take them: where the mask says sky the label is sky, elsewhere it is as before."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from depthany.config.build import build
from depthany.config.launch import compose
from depthany.data.files import DecodeError
from depthany.data.sources.packed import Packed
from depthany.data.sources.raw import SKY_FOLDER, SKY_NOTE, Raw, mask_name
from tests.data.sources.writers.analytic import picture, save_picture
from tests.data.sources.writers.blendedmvs import write_blendedmvs
from tests.data.sources.writers.diml import write_diml_outdoor
from tests.data.sources.writers.hrwsi import write_hrwsi
from tests.data.sources.writers.megadepth import write_megadepth


def write_pair(root: Path) -> None:
    """A label of another size than its image."""
    save_picture(root / "images/a/1.jpg", picture(30, 44, number=1))
    (root / "depth/a").mkdir(parents=True)
    np.save(root / "depth/a/1.npy", np.linspace(0, 9, 15 * 17, dtype=np.float32).reshape(15, 17))


WRITERS: dict[str, Callable[[Path], object]] = {
    "blendedmvs": write_blendedmvs,
    "diml_outdoor": lambda root: write_diml_outdoor(root, min_confidence=0.6),
    "hrwsi": write_hrwsi,
    "megadepth": lambda root: write_megadepth(root, outliers=False),
    "folder_pair": write_pair,
}


def reader(dataset: str, root: Path, sky_masks: str | None) -> Raw:
    """As the config of the dataset builds it."""
    options = [f"dataset={dataset}", f"root='{root}'", f"dataset.sky_masks={sky_masks or 'null'}"]
    split = [] if dataset == "folder_pair" else ["dataset.split=all"]
    return build(compose("audit", options + split).dataset)


def write_masks(source: Raw, folder: Path) -> list[np.ndarray]:
    """Random blocks of sky, of the size of each image."""
    masks, random = [], np.random.default_rng(0)
    for i in range(len(source)):
        height, width = source.image(source.row(i)).shape[:2]
        blocks = random.random((-(-height // 3), -(-width // 4))) < 0.4
        masks.append(np.repeat(np.repeat(blocks, 3, axis=0), 4, axis=1)[:height, :width])
        path = folder / mask_name(source.row(i).image)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(masks[-1].astype(np.uint8) * 255).save(path)
    return masks


@pytest.mark.parametrize("dataset", WRITERS)
def test_the_mask_beats_the_label(dataset: str, tmp_path: Path) -> None:
    WRITERS[dataset](tmp_path / "set")
    plain = reader(dataset, tmp_path / "set", None)
    masks = write_masks(plain, tmp_path / "set" / SKY_FOLDER)
    source = reader(dataset, tmp_path / "set", "beside")
    source.prepare()
    assert len(source) == len(plain) > 0
    for i, mask in enumerate(masks):
        before, after = plain.read(i), source.read(i)
        h, w = before["disparity"].shape
        rows = np.floor((np.arange(h) + 0.5) * mask.shape[0] / h).astype(int)
        columns = np.floor((np.arange(w) + 0.5) * mask.shape[1] / w).astype(int)
        sky = mask[rows][:, columns]
        assert 0.1 < sky.mean() < 0.9
        assert_array_equal(after["sky"], before["sky"] | sky)
        assert_array_equal(after["valid"], before["valid"] | sky)
        assert_array_equal(after["disparity"], np.where(sky, 0, before["disparity"]))
        assert_array_equal(after["image"], before["image"])
        assert after["disparity"].dtype == np.float32 and after["kind"] == before["kind"]
        assert after["key"] == before["key"]


def test_lists_and_packed_copies_know_the_masks(tmp_path: Path) -> None:
    root, folder = tmp_path / "set", tmp_path / "set" / SKY_FOLDER
    write_hrwsi(root)
    plain = reader("hrwsi", root, None)
    assert plain.index_path.name == "hrwsi-all.jsonl"  # as it was before there were masks
    write_masks(plain, folder)

    def identities() -> list[object]:
        return [reader("hrwsi", root, masks).identity() for masks in (None, "beside", str(folder))]

    first = identities()
    assert first[0] != first[1] != first[2]
    (folder / SKY_NOTE).write_text('{"weights": "one"}')
    (one := reader("hrwsi", root, "beside")).prepare()
    (folder / SKY_NOTE).write_text('{"weights": "two"}')
    (two := reader("hrwsi", root, "beside")).prepare()
    assert one.identity() != two.identity() and reader("hrwsi", root, None).identity() == first[0]
    packed = Packed(root=str(tmp_path / "packed"), source=two, samples_per_shard=2, short_side=None)
    packed.prepare()
    packed.open()
    for i in range(len(two)):
        assert_array_equal(packed.read(i)["sky"], two.read(i)["sky"])  # type: ignore[typeddict-item]
        assert two.read(i)["sky"].any()


def test_a_wrong_mask_is_told(tmp_path: Path) -> None:
    write_hrwsi(tmp_path)
    with pytest.raises(
        ValueError, match=r"there is no folder .*: make the masks with python -m depthany.sky dataset=h"
    ):
        reader("hrwsi", tmp_path, "beside").prepare()
    write_masks(reader("hrwsi", tmp_path, None), tmp_path / SKY_FOLDER)
    source = reader("hrwsi", tmp_path, "beside")
    mask = tmp_path / SKY_FOLDER / mask_name(source.row(0).image)
    for content, words in (
        (np.full((9, 12), 255, np.uint8), r"the mask is \(9, 12\), its image \(36, 48\); delete it"),
        (np.full((36, 48), 1, np.uint8), "it holds other values than 255, sky, and 0"),
        (
            None,
            "there is no such sky mask; make it with python -m depthany.sky dataset=hrwsi root=.* dataset.split=all",
        ),
    ):
        mask.unlink()
        if content is not None:
            Image.fromarray(content).save(mask)
        with pytest.raises(DecodeError, match=f"{mask.name}: {words}"):
            source.read(0)
