"""Training views: image, label and validity move together, and only the image is distorted."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from depthany.data.augment import Augment, _turned, sample_rng
from depthany.types import DepthKind, DepthSample

AT_518 = 518 / 24  # a sigma is given for a crop of 518 and shrinks with it; crops here have 24
SHAPES = [(40, 40), (40, 60), (60, 40), (17, 90), (12, 9), (24, 24), (24, 31)]


def augment(**changes: Any) -> Augment:
    """The strong perturbation on crops of 24 pixels, or only what is named."""
    off = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "noise": 0.0, "cutmix": 0.0}
    strength = {
        "brightness": 0.5,
        "contrast": 0.5,
        "saturation": 0.5,
        "hue": 0.25,
        "blur_sigma_px": (0.1 * AT_518, 2.0 * AT_518),
    }
    return Augment(**{"size": 24, **off, **strength, **changes})


def strong(**changes: Any) -> Augment:
    return augment(**{"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5, "noise": 5.0, "cutmix": 0.5, **changes})


def positions(height: int, width: int) -> DepthSample:
    """Red is the column, green the row, blue a pattern; the label says the same of its pixels."""
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([column * 2, row * 2, (row // 4 + column // 4) % 2 * 255], axis=-1).astype(np.uint8)
    sky = column > 0.9 * width
    valid = (row > height // 3) | sky
    disparity = np.where(valid & ~sky, (row + 1000 * column).astype(np.float32), np.float32(0))
    return {
        "image": image,
        "key": "s/0",
        "disparity": disparity,
        "valid": valid,
        "sky": sky,
        "kind": DepthKind.METRIC,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_generator_gives_the_same_view(shape: tuple[int, int]) -> None:
    sample = positions(*shape)
    for position in range(5):
        views = [strong()(sample, sample_rng(3, "unlabelled", position)) for _ in range(2)]
        assert views[0].keys() == views[1].keys()
        for name, value in views[0].items():
            assert_array_equal(value, views[1][name], strict=True)


def test_positions_parts_and_seeds_draw_differently() -> None:
    draws = {
        sample_rng(seed, part, position).random()
        for seed in range(3)
        for part in ("labelled", "unlabelled")
        for position in range(3)
    }
    assert len(draws) == 18


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_and_types(shape: tuple[int, int]) -> None:
    sample = positions(*shape)
    for position in range(10):
        view = strong()(sample, sample_rng(0, "labelled", position))
        assert view["image"].shape == view["clean"].shape == (24, 24, 3)
        assert view["image"].dtype == view["clean"].dtype == np.uint8
        assert view["disparity"].shape == view["valid"].shape == (24, 24)
        assert view["disparity"].dtype == np.float32 and view["valid"].dtype == np.bool_
        assert view["cutmix"].shape == (4,) and view["cutmix"].dtype == np.int64
        assert all(value.flags.c_contiguous for value in view.values() if isinstance(value, np.ndarray))


def test_an_image_without_a_label_gives_none() -> None:
    view = strong()({"image": positions(40, 30)["image"], "key": "s/0"}, sample_rng(0, "unlabelled", 0))
    assert set(view) == {"image", "clean", "crop", "cutmix"}


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (24, 24)], ids=str)
def test_image_and_label_move_together(shape: tuple[int, int]) -> None:
    """No resize: each pixel of the view still says where it came from, in the image and in the label."""
    sample = positions(*shape)
    corners = set()
    for position in range(40):
        view = augment(flip=0.5)(sample, sample_rng(0, "labelled", position))
        column, row = view["clean"][..., 0] // 2, view["clean"][..., 1] // 2
        assert_array_equal(view["valid"], sample["valid"][row, column])
        assert_array_equal(view["disparity"], sample["disparity"][row, column])
        step = int(column[0, 1]) - int(column[0, 0])
        assert step in (-1, 1) and (np.diff(column.astype(int), axis=1) == step).all()
        assert (np.diff(row.astype(int), axis=0) == 1).all()
        corners.add((int(row[0, 0]), int(column.min()), step))
    assert {step for *_, step in corners} == {-1, 1}
    slack = max(shape) - 24
    assert len({corner[:2] for corner in corners}) > min(slack, 10)
    assert max(max(corner[:2]) for corner in corners) <= slack


def test_crops_reach_every_border() -> None:
    views = [augment()(positions(24, 26), sample_rng(0, "labelled", i)) for i in range(60)]
    assert {int(view["clean"][0, 0, 0]) // 2 for view in views} == {0, 1, 2}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_resized_label_stays_on_the_image(shape: tuple[int, int]) -> None:
    sample = positions(*shape)
    scale = 24 / min(shape)
    for position in range(10):
        view = augment(flip=0.5)(sample, sample_rng(1, "labelled", position))
        seen = view["valid"] & (view["disparity"] > 0)
        column, row = view["disparity"][seen] // 1000, view["disparity"][seen] % 1000
        tolerance = 1.5 + 1 / scale  # cubic interpolation at borders, and a source pixel's size
        assert np.abs(view["clean"][seen][:, 0] / 2 - column).max() < tolerance
        assert np.abs(view["clean"][seen][:, 1] / 2 - row).max() < tolerance
        assert not view["disparity"][~view["valid"]].any()


def test_a_label_of_another_size_is_cut_at_the_same_place() -> None:
    image = positions(48, 96)["image"]
    half = positions(24, 48)
    sample: DepthSample = {**half, "image": image}
    for position in range(10):
        view = augment(flip=0.5)(sample, sample_rng(1, "labelled", position))
        seen = view["valid"] & (view["disparity"] > 0)
        assert np.abs(view["clean"][seen][:, 0] / 4 - view["disparity"][seen] // 1000).max() < 2
        assert np.abs(view["clean"][seen][:, 1] / 4 - view["disparity"][seen] % 1000).max() < 2


@pytest.mark.parametrize("name", ["jitter", "grey", "blur", "noise"])
def test_distortion_touches_the_image_only(name: str) -> None:
    sample = positions(40, 60)
    untouched = {key: np.array(value) for key, value in sample.items() if isinstance(value, np.ndarray)}
    for position in range(5):
        distorted = augment(**{name: 5.0 if name == "noise" else 1.0})(sample, sample_rng(0, "labelled", position))
        plain = augment()(sample, sample_rng(0, "labelled", position))
        assert (distorted["image"] != plain["image"]).any()
        for other in ("clean", "disparity", "valid", "cutmix"):
            assert_array_equal(distorted[other], plain[other])
        assert_array_equal(plain["image"], plain["clean"])
    for key, value in untouched.items():
        assert_array_equal(sample[key], value)  # type: ignore[literal-required]


def test_strengths_of_zero_and_probabilities() -> None:
    sample = positions(24, 24)
    still = augment(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    view = still(sample, sample_rng(0, "labelled", 0))
    assert np.abs(view["image"].astype(int) - view["clean"]).max() <= 1  # a turn through HSV
    grey = augment(grey=1.0)(sample, sample_rng(0, "labelled", 0))["image"]
    assert (np.ptp(grey, axis=2) == 0).all()
    often = augment(flip=0.25)
    first = [often(sample, sample_rng(0, "labelled", i))["clean"][0, 0, 0] for i in range(800)]
    assert 0.2 < np.mean(np.array(first) > 0) < 0.3


LUMA = np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("position", range(6))
def test_jitter_is_brightness_then_contrast_then_saturation(position: int) -> None:
    """As torchvision defines them: a factor, a blend with the mean grey, a blend with each pixel's own grey."""
    sample = positions(24, 24)
    view = augment(jitter=1.0, hue=0.0)(sample, sample_rng(0, "labelled", position))
    rng = sample_rng(0, "labelled", position)
    rng.integers(1), rng.integers(1), rng.random(), rng.random()  # crop, flip, CutMix
    assert rng.random() < 1 and rng.random() > 0 and rng.random() > 0  # jitter, grey, blur
    brightness, contrast, saturation = (rng.uniform(0.5, 1.5) for _ in range(3))
    expected = view["clean"].astype(float) * brightness
    expected = contrast * expected + (1 - contrast) * (expected @ LUMA).mean()
    expected = saturation * expected + (1 - saturation) * (expected @ LUMA)[..., None]
    assert np.abs(view["image"] - expected.clip(0, 255)).max() <= 1.5  # one rounding, and that of OpenCV's factors


def test_hue_turns_colours_and_leaves_greys() -> None:
    red, green, blue = np.eye(3, dtype=np.uint8) * 200
    row = np.stack([red, green, blue, *np.repeat([[0], [90], [255]], 3, 1)]).astype(np.uint8)
    image = row[None].repeat(6, 0)
    np.testing.assert_allclose(_turned(image, 1 / 3)[0, :3], [green, blue, red], atol=6)  # a step is 1.4 degrees
    np.testing.assert_allclose(_turned(image, -1 / 3)[0, :3], [blue, red, green], atol=6)
    assert_array_equal(_turned(image, 0.2)[0, 3:], row[3:])
    assert_array_equal(_turned(image, 0.001), image)  # less than a step


def test_blur_keeps_the_mean_and_lowers_the_contrast() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    view = augment(blur=1.0, blur_sigma_px=(2.0 * AT_518, 2.0 * AT_518))(
        {"image": image, "key": "s/0"}, sample_rng(0, "labelled", 0)
    )
    assert abs(view["image"].mean() - view["clean"].mean()) < 5
    assert view["image"].std() < 0.4 * view["clean"].std()


@pytest.mark.parametrize("size", [24, 56, 518])
def test_cutmix_boxes(size: int) -> None:
    """Area of 2 to 40 % but for whole pixels, inside the crop, and as often as asked."""
    maker = augment(size=size, cutmix=1.0)
    boxes = np.array([maker._box(sample_rng(0, "unlabelled", i)) for i in range(2000)])
    top, left, bottom, right = boxes.T
    assert (boxes >= 0).all() and (boxes <= size).all()
    assert (bottom > top).all() and (right > left).all()
    height, width = bottom - top, right - left
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * size**2).all()
    assert ((height - 0.5) * (width - 0.5) <= 0.4 * size**2).all()
    assert height.min() < 0.25 * size and height.max() > 0.9 * size
    seldom = augment(size=size, cutmix=0.5)
    empty = [not seldom._box(sample_rng(0, "unlabelled", i)).any() for i in range(1000)]
    assert 0.45 < np.mean(empty) < 0.55
    assert not augment(size=size)._box(sample_rng(0, "unlabelled", 0)).any()
