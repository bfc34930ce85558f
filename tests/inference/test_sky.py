"""The segmenter's masks are those of transformers; a model that cannot find the sky is refused in words."""

import json
from pathlib import Path

import pytest
import torch
from numpy.testing import assert_array_equal
from torch.nn.functional import interpolate

from depthany.data.scenes import render
from depthany.inference import sky
from depthany.inference.sky import SkyError, SkySegmenter, best_is, sky_classes
from tests.segmenters import reference, write_segmenter

PICTURES = [render(style="a", seed=5, index=i, size=96).image[: 72 + 12 * (i % 2)] for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_segmenter(tmp_path_factory.mktemp("segmenter"), PICTURES, labels=["wall", "sky, clouds", "tree"])


def test_masks_are_the_best_class_at_full_size(folder: Path) -> None:
    segmenter = SkySegmenter(name=str(folder), device="cpu")
    for pictures in (PICTURES[::2], PICTURES[1::2]):
        masks = segmenter.masks(pictures)
        for picture, mask in zip(pictures, masks, strict=True):
            expected = reference(folder, picture, {"sky, clouds"})
            assert mask.shape == picture.shape[:2] and 0.02 < expected.mean() < 0.98
            assert_array_equal(mask, expected)


def test_a_processor_that_cuts_does_not_move_the_mask(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    options = json.loads((folder / "preprocessor_config.json").read_text())
    options |= {"image_processor_type": "BeitImageProcessor", "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options | {"crop_size": {"height": 32, "width": 32}}))
    cutting = SkySegmenter(name=str(tmp_path), device="cpu")
    assert cutting.processor.do_center_crop  # it would
    assert_array_equal(cutting.masks(PICTURES[:1]), SkySegmenter(name=str(folder), device="cpu").masks(PICTURES[:1]))


@pytest.mark.parametrize("held", [1, 2 * 20 * 30 * 3, 10**9])
def test_memory_does_not_change_the_result(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sky, "CHUNK_VALUES", held)
    scores = torch.randn(2, 7, 5, 8, generator=torch.Generator().manual_seed(0))
    best = interpolate(scores, size=(20, 30), mode="bilinear", align_corners=False).argmax(dim=1)
    assert_array_equal(best_is(scores, [1, 6], (20, 30)), (best == 1) | (best == 6))


def test_sky_is_a_word() -> None:
    names = ["skyscraper", "Sky", "sky, clouds", "sky-other-merged", "skylight", "night sky", "LABEL_2"]
    assert [names[i] for i in sky_classes(dict(enumerate(names)))] == [*names[1:4], "night sky"]


def test_what_cannot_be_used_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["road", "skyscraper"]
    roads = write_segmenter(tmp_path / "roads", PICTURES[:1], labels=names)
    with pytest.raises(SkyError, match=r"none of its classes is sky; it has: road, skyscraper"):
        SkySegmenter(name=str(roads), device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SkyError, match=r"empty is no segmentation model that can be used: "):
        SkySegmenter(name=str(tmp_path / "empty"), device="cpu")
    with pytest.raises(SkyError, match=r"there is no such folder"):
        SkySegmenter(name=str(tmp_path / "nothing"), device="cpu")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SkyError, match=r"segmenter=some/model .*connect once, or give a folder"):
        SkySegmenter(name="some/model", device="cpu")
