"""From a sample to a training view: resize, crop, flip, colours; every draw is from the sample's own generator."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from depthany.data.labels import has_label
from depthany.geometry.resize import Crop, crop_image, crop_pixels
from depthany.types import DepthSample, ImageSample

LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601), as PIL and torchvision have it


def sample_rng(seed: int, part: str, position: int) -> np.random.Generator:
    """The generator of one position of the order: the same draws for any number of ranks and workers."""
    return np.random.default_rng([seed, part == "unlabelled", position])


class Augment:
    """Makes the training view of one image and its label.

    A random square as wide as the image's short side is resized to `size` (V2 section 7.1: the short side is resized,
    then a square is cut). Colour distortion touches the image only (V1 section 3.2): brightness, contrast, saturation
    and hue, grey, blur, noise, on 8 bits and as torchvision does it, but that the first three are one linear map.

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
        """image and clean (S, S, 3) uint8, crop, cutmix (4,) box; disparity, valid (S, S) where there is a label."""
        height, width = sample["image"].shape[:2]
        crop = self._crop(height, width, rng)
        clean = crop_image(sample["image"], crop, self.size)
        view: dict[str, Any] = {"clean": clean, "crop": crop, "cutmix": self._box(rng)}
        if has_label(sample):
            rows, columns = crop_pixels(sample["disparity"].shape, crop, self.size)
            for name, label in (("disparity", sample["disparity"]), ("valid", sample["valid"])):
                # clip: none is outside, and NumPy need not look; several times as fast as an index of both axes
                view[name] = label.take(rows, 0, mode="clip").take(columns, 1, mode="clip")
        view["image"] = self._distort(clean, rng)
        return view

    def _crop(self, height: int, width: int, rng: np.random.Generator) -> Crop:
        side = min(height, width)
        top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
        return Crop(height, width, top, left, side, bool(rng.random() < self.flip))

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
        image = clean
        if jitter:
            brightness, contrast, saturation = (
                rng.uniform(1 - strength, 1 + strength)
                for strength in (self.brightness, self.contrast, self.saturation)
            )
            image = _scaled(image, brightness, contrast, saturation)
            image = _turned(image, rng.uniform(-self.hue, self.hue))
        if grey:
            image = cv2.transform(image, np.tile(LUMA, (3, 1)))
        if blur:
            low, high = self.blur_sigma_px
            image = cv2.GaussianBlur(image, (0, 0), rng.uniform(low, high) * self.size / 518)
        if self.noise:
            noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0, self.noise))
            image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
        return image


def _scaled(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Brightness, then contrast about the mean grey, then saturation about each pixel's grey: one linear map."""
    mean = float(np.dot(LUMA, cv2.mean(image)[:3]))
    colours = saturation * np.eye(3) + (1 - saturation) * np.tile(LUMA, (3, 1))
    offset = np.full((3, 1), (1 - contrast) * brightness * mean)
    return cv2.transform(image, np.hstack([contrast * brightness * colours, offset]))


def _turned(image: np.ndarray, hue: float) -> np.ndarray:
    """The hue turned by a share of the colour circle, in 256 steps as PIL has it."""
    step = round(hue * 256) % 256
    if not step:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(step)  # wraps around
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
