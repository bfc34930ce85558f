"""From a sample to a training view: resize, crop, flip, colours; every draw is from the sample's own generator."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from depthany.data.labels import has_label
from depthany.geometry.resize import lower_bound_size, resize_image, resize_label
from depthany.types import DepthSample, ImageSample


def sample_rng(seed: int, part: str, position: int) -> np.random.Generator:
    """The generator of one position of the order: the same draws for any number of ranks and workers."""
    return np.random.default_rng([seed, part == "unlabelled", position])


class Augment:
    """Makes the training view of one image and its label.

    The shorter side is resized to `size`, then a random square is cut (V2 section 7.1). Colour distortion touches the
    image only (V1 section 3.2): brightness, contrast, saturation and hue factors, grey, blur, noise.

    Args:
        size: side of the square crop in pixels.
        flip: probability of a horizontal flip.
        jitter: probability of colour jitter.
        brightness: strength; the factor is drawn from 1 - s to 1 + s.
        contrast: strength; the factor is drawn from 1 - s to 1 + s.
        saturation: strength; the factor is drawn from 1 - s to 1 + s.
        hue: largest turn, as a share of the colour circle.
        grey: probability of a grey image.
        blur: probability of a Gaussian blur.
        blur_sigma_px: smallest and largest sigma in pixels of a crop of 518, scaled with the size.
        noise: largest standard deviation of pixel noise, in grey levels of 255.
        cutmix: probability that a box of the neighbour in the batch is pasted in.
    """

    def __init__(
        self,
        *,
        size: int,
        flip: float,
        jitter: float,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        grey: float,
        blur: float,
        blur_sigma_px: Sequence[float],
        noise: float,
        cutmix: float,
    ) -> None:
        self.size, self.flip, self.jitter = size, flip, jitter
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.grey, self.blur, self.blur_sigma_px, self.noise, self.cutmix = grey, blur, blur_sigma_px, noise, cutmix

    def __call__(self, sample: ImageSample | DepthSample, rng: np.random.Generator) -> dict[str, Any]:
        """image and clean (S, S, 3) uint8; disparity, valid (S, S) where there is a label; cutmix (4,) box."""
        height, width = lower_bound_size(*sample["image"].shape[:2], size=self.size, multiple=1)
        top = int(rng.integers(height - self.size + 1))
        left = int(rng.integers(width - self.size + 1))
        turn = rng.random() < self.flip
        window = np.s_[top : top + self.size, left : left + self.size]

        def crop(array: np.ndarray) -> np.ndarray:
            cut = array[window]
            return np.ascontiguousarray(cut[:, ::-1] if turn else cut)

        clean = crop(resize_image(sample["image"], (height, width), antialias=False))
        view: dict[str, Any] = {"clean": clean, "cutmix": self._box(rng)}
        if has_label(sample):
            disparity, valid, _ = resize_label(sample["disparity"], sample["valid"], sample["sky"], (height, width))
            view |= {"disparity": crop(disparity), "valid": crop(valid)}
        view["image"] = self._distort(clean, rng)
        return view

    def _box(self, rng: np.random.Generator) -> np.ndarray:
        """(top, left, bottom, right); area 2 to 40 % of the crop, aspect 0.3 to 1/0.3 (UniMatch V2, transform.py)."""
        if rng.random() >= self.cutmix:
            return np.zeros(4, np.int64)
        area = rng.uniform(0.02, 0.4) * self.size**2
        aspect = rng.uniform(0.3, 1 / 0.3)
        height = int(np.clip(round(np.sqrt(area * aspect)), 1, self.size))
        width = int(np.clip(round(np.sqrt(area / aspect)), 1, self.size))
        top, left = int(rng.integers(self.size - height + 1)), int(rng.integers(self.size - width + 1))
        return np.array([top, left, top + height, left + width], np.int64)

    def _distort(self, clean: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        jitter, grey, blur = rng.random() < self.jitter, rng.random() < self.grey, rng.random() < self.blur
        if not (jitter or grey or blur or self.noise):
            return clean
        image: np.ndarray = clean.astype(np.float32)
        if jitter:
            image *= rng.uniform(1 - self.brightness, 1 + self.brightness)
            contrast = rng.uniform(1 - self.contrast, 1 + self.contrast)
            mean = float(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).mean())
            image = np.clip((image - mean) * contrast + mean, 0, 255)
            hsv = cv2.cvtColor(image / 255, cv2.COLOR_RGB2HSV)  # H in degrees, S and V in [0, 1]
            hsv[..., 0] = (hsv[..., 0] + 360 * rng.uniform(-self.hue, self.hue)) % 360
            hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(1 - self.saturation, 1 + self.saturation), 0, 1)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255
        if grey:
            image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if blur:
            low, high = self.blur_sigma_px
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(low, high) * self.size / 518)
        if self.noise:
            image = image + rng.normal(0, rng.uniform(0, self.noise), image.shape).astype(np.float32)
        return np.clip(np.rint(image), 0, 255).astype(np.uint8)
