"""A known answer under a scale and shift that change from call to call, and a real small model."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from depthany.inference.predictor import Predictor
from depthany.inference.tiles import predict_tiled
from depthany.types import IMAGENET_MEAN, IMAGENET_STD
from tests.tiny import tiny_model


class Brightness(nn.Module):
    """Says the brightness of each pixel, at a scale and shift of its own mood."""

    patch_size, input_size, input_shape, space = 8, 64, None, "disparity"

    def __init__(self, lie: Tensor | None = None) -> None:
        super().__init__()
        self.dummy = nn.Parameter(torch.zeros(1))
        self.rng = torch.Generator().manual_seed(0)
        self.lie, self.calls = lie, 0

    def forward(self, images: Tensor) -> Tensor:
        rgb = images * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
        scale, shift = 1 + 5 * torch.rand(2, generator=self.rng)
        self.calls += 1
        answer = rgb.mean(1)
        if self.calls > 1 and self.lie is not None:  # of the tiles
            answer = self.lie(answer)
        return scale * answer + shift


def predictor(module: nn.Module) -> Predictor:
    return Predictor(model=module, device="cpu", precision="fp32")


def scene(height: int = 160, width: int = 232) -> np.ndarray:
    """Smooth, with fine texture and a sharp square."""
    rng = np.random.default_rng(0)
    coarse = cv2.resize(rng.random((6, 8), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    fine = cv2.GaussianBlur(rng.random((height, width), np.float32), (0, 0), 1)
    grey = 0.15 + 0.5 * coarse + 0.15 * fine
    grey[50:90, 100:150] += 0.15
    return np.repeat((grey.clip(0, 1) * 255).astype(np.uint8)[..., None], 3, 2)


def unaffine(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`values` fitted to `truth` by least squares."""
    design = np.stack([values.ravel(), np.ones(values.size)], 1).astype(np.float64)
    return (design @ np.linalg.lstsq(design, truth.ravel(), rcond=None)[0]).reshape(truth.shape)


def error(values: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(unaffine(values, truth) - truth).max())


def test_an_exact_model_is_reproduced_exactly() -> None:
    """At the photo's own size every tile is the truth up to scale and shift, so all of it comes back, seams and all."""
    image = scene()
    module = Brightness()
    made = predict_tiled(predictor(module), image, input_size=160, tile=160, overlap=0.25)
    assert module.calls > 2 and made.valid.all() and made.values.shape == image.shape[:2]
    assert error(made.values, image.mean(2) / 255) < 1e-4


def test_tiles_take_a_photo_of_every_form_that_predict_takes() -> None:
    image = scene()  # grey: its channels are alike
    model = Predictor(model=tiny_model(), device="cpu", precision="fp32")
    options = {"input_size": 56, "tile": 120, "overlap": 0.25}
    expected = predict_tiled(model, image, **options).values
    for same in (image[..., 0], np.dstack([image, image[..., 0]])):
        assert (predict_tiled(model, same, **options).values == expected).all()


@pytest.mark.parametrize("overlap", [0.1, 0.5])
def test_tiles_bring_the_detail_that_the_whole_photo_loses(overlap: float) -> None:
    image, truth = scene(), scene().mean(2) / 255
    module = predictor(Brightness())
    whole = module.predict(image, input_size=40).values
    made = predict_tiled(module, image, input_size=40, tile=40, overlap=overlap).values
    assert np.abs(unaffine(made, truth) - truth).mean() < 0.4 * np.abs(unaffine(whole, truth) - truth).mean()
    jumps = [np.abs(np.diff(unaffine(made, truth) - truth, axis=axis)).max() for axis in (0, 1)]
    assert max(jumps) < 0.03  # of a range of 1: no seam


def test_tiles_that_say_nothing_leave_the_global_map() -> None:
    image = scene()
    for lie in (torch.ones_like, torch.neg, lambda x: torch.full_like(x, torch.nan)):
        whole = predictor(Brightness()).predict(image, input_size=40)
        made = predict_tiled(predictor(Brightness(lie)), image, input_size=40, tile=80, overlap=0.25)
        np.testing.assert_allclose(made.values, whole.values, rtol=1e-5)


def test_a_tile_that_is_wrong_in_a_part_does_not_move_the_rest() -> None:
    def spot(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :20, :40] = 2
        return x

    image = scene()
    made = predict_tiled(predictor(Brightness(spot)), image, input_size=160, tile=160, overlap=0)
    truth = image.mean(2) / 255
    assert error(made.values[30:], truth[30:]) < 1e-3


def test_a_tile_that_is_mostly_sky_is_fitted_by_what_stands_before_it() -> None:
    def haze(x: Tensor) -> Tensor:
        """The sky is not quite constant, and not as in the whole photo."""
        above = torch.linspace(0, 0.02, x.shape[2]).expand_as(x)
        return torch.where(x < 0.01, above, x)

    image = scene()
    image[:110] = 0
    made = predict_tiled(predictor(Brightness(haze)), image, input_size=160, tile=160, overlap=0.25)
    truth = image.mean(2) / 255
    assert error(made.values[115:], truth[115:]) < 0.02


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64), (65, 64)])
def test_any_photo_gives_a_map_of_its_size(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    made = predict_tiled(predictor(Brightness()), image, input_size=None, tile=64, overlap=0.25)
    assert made.values.shape == size and made.valid.all() and made.values.min() >= 0


def test_a_real_model_has_no_seams() -> None:
    """Its tiles differ from each other by more than scale and shift; what it says changes no faster at a border."""
    torch.manual_seed(0)
    model = tiny_model()
    made = predict_tiled(predictor(model), scene(), input_size=56, tile=112, overlap=0.3).values
    step = np.abs(np.diff(made, axis=1)).max(0)  # the steepest of each column; tiles begin at columns 60 and 120
    borders = np.concatenate([step[57:63], step[109:115], step[117:123], step[169:175]])
    assert borders.max() <= step.max() and np.median(borders) < 1.5 * np.median(step)


def test_bad_options_are_refused() -> None:
    for options in ({"tile": 0, "overlap": 0.25}, {"tile": 64, "overlap": 1.0}):
        with pytest.raises(ValueError, match="tile"):
            predict_tiled(predictor(Brightness()), scene(), input_size=40, **options)
