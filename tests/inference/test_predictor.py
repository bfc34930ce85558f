"""A real small model on photos of any shape."""

import copy
import pickle
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from depthany.data.files import read_image
from depthany.geometry.pictures import EXIF_ORIENTATION
from depthany.geometry.resize import lower_bound_size
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> DepthModel:
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def predictor(model: DepthModel) -> Predictor:
    return Predictor(model=model, device="cpu", precision="fp32")


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (56, 56), (61, 83), (20, 300), (300, 20)])
@pytest.mark.parametrize("input_size", [None, 30])
def test_the_map_has_the_size_of_the_photo(predictor: Predictor, size: tuple[int, int], input_size: int | None) -> None:
    depth = predictor.predict(photo(*size), input_size=input_size)
    assert depth.disparity.shape == size
    assert depth.disparity.dtype == np.float32
    assert depth.valid.all() and np.isfinite(depth.disparity).all()


def test_at_the_network_size_the_map_is_the_plain_output(predictor: Predictor) -> None:
    image = photo(56, 64)
    pixels = (image / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.inference_mode():
        expected = predictor.model(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float())[0]
    depth = predictor.predict(image, input_size=56)
    np.testing.assert_allclose(depth.disparity, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_two_predictions_are_equal_and_leave_no_gradient(predictor: Predictor) -> None:
    image = photo(40, 70)
    first, second = (predictor.predict(image, input_size=None) for _ in range(2))
    assert (first.disparity == second.disparity).all()
    assert all(parameter.grad is None for parameter in predictor.model.parameters())


def test_bf16_is_near_fp32(model: DepthModel, predictor: Predictor) -> None:
    image = photo(60, 60)
    exact = predictor.predict(image, input_size=None).disparity
    half = Predictor(model=model, device="cpu", precision="bf16").predict(image, input_size=None)
    assert half.disparity.dtype == np.float32
    assert np.abs(half.disparity - exact).max() < 0.05 * np.abs(exact).max()


def test_weights_stored_in_half_precision_work(model: DepthModel) -> None:
    stored = DepthModel(**model.config()).half()
    depth = Predictor(model=stored, device="cpu", precision="fp32").predict(photo(56, 56), input_size=None)
    assert depth.valid.all()


def test_a_thin_strip_gets_a_smaller_input(model: DepthModel) -> None:
    h, w = lower_bound_size(10, 500, size=56, multiple=8)
    fits = Predictor(model=model, device="cpu", precision="fp32", max_pixels=h * w)
    assert (
        fits.input_shape(10, 500, input_size=None)
        == (h, w)
        == fits.network_input(photo(10, 500), input_size=None).shape[:2]
    )
    tight = Predictor(model=model, device="cpu", precision="fp32", max_pixels=h * w // 4)
    small = tight.input_shape(10, 500, input_size=None)
    assert 0.8 * h * w / 4 < small[0] * small[1] <= h * w // 4 and small[0] < h
    depth = tight.predict(photo(10, 500))
    assert depth.values.shape == (10, 500) and depth.valid.all()
    with pytest.raises(ValueError, match=r"--input-size .* --max-pixels"):
        tight.network_input(photo(10, 500), input_size=None)


def test_it_is_a_module_with_a_gradient(model: DepthModel) -> None:
    predictor = Predictor(model=DepthModel(**model.config()), device="cpu", precision="fp32")
    assert not predictor.model.training and predictor.device.type == "cpu"
    assert (predictor.input_size, predictor.patch_size, predictor.space) == (56, 8, "disparity")
    images = torch.rand(2, 3, 56, 64, requires_grad=True)
    maps = predictor(images)
    assert maps.shape == (2, 56, 64) and maps.dtype == torch.float32
    maps.sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


ODD: dict[str, Callable[[], Image.Image]] = {
    "grey": lambda: Image.fromarray(photo(30, 40)[..., 0]),
    "16-bit": lambda: Image.fromarray(photo(30, 40)[..., 0].astype(np.uint16) * 257),
    "cmyk": lambda: Image.fromarray(photo(30, 40)).convert("CMYK"),
    "alpha": lambda: Image.fromarray(np.concatenate([photo(30, 40), photo(30, 40)[..., :1]], -1)),
    "palette": lambda: Image.fromarray(photo(30, 40)).quantize(16),
    "bits": lambda: Image.fromarray(photo(30, 40)[..., 0] > 99),
}


@pytest.mark.parametrize("kind", ODD)
def test_arrays_pictures_and_files_are_one(predictor: Predictor, kind: str, tmp_path: Path) -> None:
    picture, path = ODD[kind](), tmp_path / "a.tiff"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture.save(path, exif=exif)
    upright = read_image(path.read_bytes())
    assert upright.shape == (40, 30, 3)
    expected = predictor.predict(upright).values
    assert (predictor.predict(path).values == expected).all()
    assert (predictor.predict(Image.open(BytesIO(path.read_bytes()))).values == expected).all()


def test_files_that_are_no_photos_are_named(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a photo")
    for name in ("gone.jpg", "text.jpg"):
        with pytest.raises(ValueError, match=name):
            predictor.predict(tmp_path / name)


def test_the_official_sampling_and_the_smoother_one(predictor: Predictor) -> None:
    stripes = np.repeat((np.arange(400) % 2 * 255).astype(np.uint8)[None, :, None], 300, axis=0).repeat(3, axis=2)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    official, smooth = (predictor.network_input(stripes, input_size=60, antialias=flag) for flag in (False, True))
    resized = cv2.resize(stripes / 255.0, (80, 64), interpolation=cv2.INTER_CUBIC)  # as infer_image does
    assert official.shape == (64, 80, 3) and np.allclose(official, (resized - mean) / std, atol=1e-5)
    assert np.abs(smooth * std + mean - 0.5).max() < 0.11 < np.abs(official * std + mean - 0.5).max()


def test_maps_do_not_depend_on_their_batch(predictor: Predictor) -> None:
    photos = [photo(40, 70), photo(40, 70)[::-1].copy(), photo(80, 140)]
    inputs = [predictor.network_input(image, input_size=None) for image in photos]
    together = predictor.predict_batch(inputs, [image.shape[:2] for image in photos])
    for image, depth in zip(photos, together, strict=True):
        np.testing.assert_allclose(depth.values, predictor.predict(image).values, rtol=1e-4, atol=1e-5)


def test_the_confidence_is_the_agreement_with_the_mirrored_photo(predictor: Predictor) -> None:
    image = photo(56, 64)
    depth = predictor.predict(image, confidence=True)
    assert depth.confidence is not None and depth.confidence.shape == (56, 64)
    assert 0 <= depth.confidence.min() < depth.confidence.max() <= 1
    other = predictor.predict(image[:, ::-1].copy()).values[:, ::-1]
    scale, shift = np.polyfit(other.ravel(), depth.values.ravel(), 1)
    left = np.abs(depth.values - scale * other - shift) / np.ptp(depth.values)
    np.testing.assert_allclose(depth.confidence, 1 - left, atol=1e-3)
    assert (depth.values == predictor.predict(image).values).all() and predictor.predict(image).confidence is None


def test_grey_arrays_are_repeated_alpha_is_dropped_and_memory_order_says_nothing(predictor: Predictor) -> None:
    image = photo(56, 56)  # the network's own size: nothing is resized
    grey, alpha = image[..., 0], np.dstack([image, image[..., 0]])
    expected = predictor.predict(image).values
    for same in (alpha, np.asfortranarray(image), image[::-1][::-1]):
        assert (predictor.predict(same).values == expected).all()
    assert (predictor.predict(grey).values == predictor.predict(np.dstack([grey] * 3)).values).all()
    assert (predictor.predict(grey[..., None]).values == predictor.predict(grey).values).all()


@pytest.mark.parametrize(
    ("image", "way_out"),
    [
        (np.zeros((4, 4, 3), np.float32), r"\(255 \* image\)"),
        (np.zeros((4, 4), np.uint16), "image >> 8"),
        (np.zeros((3, 40, 60), np.uint8), "transpose"),
        (np.zeros((0, 4, 3), np.uint8), r"not ndarray \(0, 4, 3\) uint8"),
        (torch.zeros(3, 4, 4), r"not Tensor \(3, 4, 4\) torch.float32; .* permute|numpy"),
        (None, "not NoneType"),
    ],
)
def test_what_is_not_a_photo_is_refused_with_a_way_out(predictor: Predictor, image: Any, way_out: str) -> None:
    with pytest.raises(ValueError, match=way_out) as error:
        predictor.predict(image)
    assert "uint8" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_runs_in_the_dtype_it_is_brought_to(
    model: DepthModel, predictor: Predictor, precision: Any, dtype: torch.dtype
) -> None:
    other = Predictor(model=copy.deepcopy(model), device="cpu", precision=precision).to(dtype)
    values, expected = (each.predict(photo(40, 60)).values for each in (other, predictor))
    assert values.dtype == np.float32 and np.abs(values - expected).max() < 0.01 * expected.max()


def test_a_copy_a_pickle_and_loaded_weights_predict_the_same(predictor: Predictor) -> None:
    expected = predictor.predict(photo(40, 60)).values
    fresh = Predictor(model=tiny_model(), device="cpu", precision="fp32")
    assert (fresh.predict(photo(40, 60)).values != expected).any()
    fresh.load_state_dict(predictor.state_dict())
    for same in (fresh, copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert (same.predict(photo(40, 60)).values == expected).all()


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 56, 56), torch.zeros(1, 1, 56, 56), torch.zeros(1, 3, 56, 56).byte()]
)
def test_the_network_takes_normalised_images_alone(predictor: Predictor, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images \(B, 3, H, W\), not Tensor \(.*predict\(\) takes photos"):
        predictor(images)


def test_bad_knobs_are_named(model: DepthModel, predictor: Predictor) -> None:
    for size in (0, -8, "56", 56.0, True, (56, 56)):
        with pytest.raises(ValueError, match="--input-size"):
            predictor.predict(photo(4, 4), input_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision"):
        Predictor(model=model, device="cpu", precision="fp16")  # type: ignore[arg-type]
