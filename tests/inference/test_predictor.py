"""A real small model on photos of any shape."""

import numpy as np
import pytest
import torch

from depthany.geometry.resize import lower_bound_size
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel


@pytest.fixture(scope="module")
def model() -> DepthModel:
    torch.manual_seed(0)
    return DepthModel(
        encoder="vit_tiny_patch16_224",
        encoder_arguments={
            "patch_size": 8,
            "embed_dim": 96,
            "depth": 4,
            "num_heads": 3,
            "img_size": 56,
        },
        taps=[0, 1, 2, 3],
        features=24,
        hidden=12,
        out_channels=[24, 48, 96, 96],
        pos_embed="official",
        pretrained=False,
        activation="softplus",
        input_size=56,
    )


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


def test_a_thin_strip_is_refused_with_the_way_out(model: DepthModel) -> None:
    h, w = lower_bound_size(10, 500, size=56, multiple=8)
    fits = Predictor(model=model, device="cpu", precision="fp32", max_pixels=h * w)
    assert fits.predict(photo(10, 500), input_size=None).disparity.shape == (10, 500)
    tight = Predictor(model=model, device="cpu", precision="fp32", max_pixels=h * w - 1)
    with pytest.raises(ValueError, match=r"--input-size .* --max-pixels"):
        tight.predict(photo(10, 500), input_size=None)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_not_a_photo_is_refused(predictor: Predictor, image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        predictor.predict(image, input_size=None)


def test_bad_knobs_are_named(model: DepthModel, predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="--input-size"):
        predictor.predict(photo(4, 4), input_size=0)
    with pytest.raises(ValueError, match="precision"):
        Predictor(model=model, device="cpu", precision="fp16")  # type: ignore[arg-type]
