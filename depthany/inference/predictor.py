"""From one photo to a `DepthMap` with the official pre- and post-processing.

Legend: B batch, H W pixels of the photo, h w pixels of the network input.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from depthany.geometry.pictures import upright_rgb
from depthany.geometry.resize import MAX_INPUT_PIXELS, fit_size, lower_bound_size, normalised
from depthany.inference.depth_map import DepthMap
from depthany.models.depth_model import DepthModel
from depthany.types import IMAGENET_MEAN, IMAGENET_STD


class Predictor(nn.Module):
    """A model on its device, ready for photos.

    Resizing and normalisation follow Depth-Anything-V2 `depth_anything_v2/dpt.py` (`infer_image`)
    and `util/transform.py`.

    It stays a module like any other: after `.half()`, `.bfloat16()`, `.double()` or `.to(...)` images are brought to
    the weights' dtype and the network runs in it, whatever `precision` says; the map is float32 all the same.

    Args:
        model: Moved to `device` in float32 and set to evaluation.
        device: Where the network runs.
        precision: bf16 runs the network under autocast; the map is float32 either way.
        max_pixels: Largest network input in pixels. The short side is at least the input size,
            so a thin strip would grow without bound: `predict` gives it a smaller input, `network_input` refuses it.
    """

    def __init__(
        self,
        *,
        model: DepthModel,
        device: torch.device | str,
        precision: Literal["fp32", "bf16"],
        max_pixels: int = MAX_INPUT_PIXELS,
    ) -> None:
        super().__init__()
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is fp32 or bf16, not {precision!r}")
        self.model = model.to(torch.device(device), torch.float32)
        self.eval()
        self.precision = precision
        self.max_pixels = max_pixels

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return next(self.model.parameters()).device

    @property
    def input_size(self) -> int:
        """The short side of the network input in pixels for which the model was trained."""
        return self.model.input_size

    @property
    def patch_size(self) -> int:
        """Both sides of the network input are multiples of this many pixels."""
        return self.model.patch_size

    @property
    def space(self) -> Literal["disparity", "metric"]:
        """What the network's output means: affine-invariant disparity, or metres."""
        return self.model.space

    def forward(self, images: Tensor) -> Tensor:
        """The network's output (B, H, W) float32 of ImageNet-normalised images (B, 3, H, W): see `space`.

        Raises:
            ValueError: Not such images, or sides that are no multiples of the patch.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"the network takes floating, ImageNet-normalised images (B, 3, H, W), not {_described(images)}; "
                "predict() takes photos"
            )
        dtype = next(self.model.parameters()).dtype
        mixed = self.precision == "bf16" and dtype == torch.float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed):
            return self.model(images.to(dtype)).float()

    def input_shape(self, height: int, width: int, *, input_size: int | None) -> tuple[int, int]:
        """(h, w) of the network input of a photo of (H, W) pixels, within `max_pixels`.

        The official rule: the short side is `input_size`, both sides are multiples of the patch. Where that has more
        than `max_pixels`, both sides shrink by one factor: `fit_size`. Metric models of V1 have a shape of their own,
        which every photo gets unless an input size is asked for.

        Args:
            height: Of the photo in pixels.
            width: Of the photo in pixels.
            input_size: Lower bound of the short side in pixels; None: the size the model was trained at.

        Raises:
            ValueError: An input size that is not positive.
        """
        size, own = self._size(input_size), self.model.input_shape
        if input_size is None and own is not None and own[0] * own[1] <= self.max_pixels:
            return own
        return fit_size(height, width, size=size, multiple=self.patch_size, max_pixels=self.max_pixels)

    def network_input(self, image: np.ndarray, *, input_size: int | None, antialias: bool = False) -> np.ndarray:
        """The normalised network input (h, w, 3) float32 of a photo, by the official rule alone.

        Args:
            image: As for `predict`.
            input_size: As in `input_shape`.
            antialias: Average areas where the photo shrinks, instead of the official bicubic sampling.

        Raises:
            ValueError: Not such an image, an input size that is not positive, or a network input above
                `max_pixels`.
        """
        image = _rgb(image)
        height, width = image.shape[:2]
        size = self._size(input_size)
        h, w = lower_bound_size(height, width, size=size, multiple=self.patch_size)
        if h * w > self.max_pixels:
            raise ValueError(
                f"a {width} x {height} image becomes a {w} x {h} network input, above {self.max_pixels} pixels; "
                f"lower --input-size or raise --max-pixels ({self.max_pixels})"
            )
        return normalised(image, (h, w), antialias=antialias)

    def resized(self, image: np.ndarray, shape: tuple[int, int], *, antialias: bool) -> np.ndarray:
        """A photo as the network wants it, (h, w, 3) float32: resized by the rule of the weights.

        Args:
            image: An array, as for `predict`.
            shape: (h, w), from `input_shape`.
            antialias: As in `network_input`.

        Raises:
            ValueError: Not such an image.
        """
        image = _rgb(image)
        if shape != self.model.input_shape or antialias:
            return normalised(image, shape, antialias=antialias)
        # PrepForMidas in metric_depth/zoedepth/models/base_models/depth_anything.py of Depth Anything V1.
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        pixels = interpolate(pixels, shape, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        made: np.ndarray = ((pixels - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).numpy()
        return made

    @torch.inference_mode()
    def disparity(self, inputs: Sequence[np.ndarray]) -> Tensor:
        """Runs the network on inputs (h, w, 3) of one shape: `forward`'s (B, h, w) float32 on the device."""
        # (B, h, w, 3) -> (B, 3, h, w)
        return self(torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).contiguous().to(self.device))

    def predict(
        self,
        image: np.ndarray | Image.Image | Path | str,
        *,
        input_size: int | None = None,
        antialias: bool = False,
        confidence: bool = False,
    ) -> DepthMap:
        """Predicts a map of the photo's own size, whatever that is; `space` says what it holds.

        A photo whose network input would be above `max_pixels` gets a smaller one: `input_shape`.

        Args:
            image: uint8 (H, W, 3) RGB, upright; (H, W) or (H, W, 1) is grey, of (H, W, 4) the alpha is dropped. Or a
                picture of Pillow, or a file.
            input_size: As in `input_shape`.
            antialias: As in `network_input`.
            confidence: Also ask how well the map agrees with that of the mirrored photo, see `predict_batch`.

        Raises:
            ValueError: Not such an image, an input size that is not positive, or a file that cannot be decoded.
        """
        pixels = _rgb(_pixels(image))
        shape = self.input_shape(*pixels.shape[:2], input_size=input_size)
        return self.predict_batch(
            [self.resized(pixels, shape, antialias=antialias)], [pixels.shape[:2]], confidence=confidence
        )[0]

    def predict_batch(
        self, inputs: Sequence[np.ndarray], sizes: Sequence[tuple[int, ...]], *, confidence: bool = False
    ) -> list[DepthMap]:
        """The maps of network inputs (h, w, 3) of one shape, each resized to its photo's (H, W).

        The confidence of a pixel is 1 - |difference| / range, at least 0: the difference to the map of the mirrored
        input, mirrored back and fitted by least squares in scale and shift, as a share of the map's max - min.
        """
        maps = self.disparity(inputs)
        surer: list[Tensor | None] = [None] * len(maps)
        if confidence:
            mirrored = self.disparity([input[:, ::-1] for input in inputs]).flip(-1)
            surer = [_agreement(*pair) for pair in zip(maps, mirrored, strict=True)]
        made = []
        for values, sure, size in zip(maps, surer, sizes, strict=True):
            resized = _resized(values, size)
            valid = np.isfinite(resized)
            if not valid.all():
                resized = np.where(valid, resized, np.float32(0))
            made.append(DepthMap(resized, valid, self.space, None if sure is None else _resized(sure, size)))
        return made

    def _size(self, input_size: int | None) -> int:
        if input_size is None:
            return self.input_size
        if not isinstance(input_size, int | np.integer) or isinstance(input_size, bool) or input_size < 1:
            raise ValueError(f"input_size (--input-size) is a positive whole number of pixels, not {input_size!r}")
        return int(input_size)


def _resized(values: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """(h, w) -> (H, W) as the official code does."""
    return interpolate(values[None, None], size, mode="bilinear", align_corners=True)[0, 0].cpu().numpy()


def _agreement(values: Tensor, other: Tensor) -> Tensor:
    """1 - |difference| / range, at least 0, after `other` is fitted to `values`, both (h, w)."""
    centred, target = other - other.mean(), values - values.mean()
    scale = (centred * target).sum() / centred.square().sum().clamp_min(1e-12)
    spread = (values.max() - values.min()).clamp_min(1e-12)
    return (1 - (target - scale * centred).abs() / spread).clamp_min(0)


def _rgb(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of an array that is a photo; what its values mean is never guessed.

    Raises:
        ValueError: It is none; the message tells how to make it one.
    """
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise ValueError(
            f"a photo is an array (H, W, 3), (H, W, 4) or (H, W) of uint8, not {_described(image)}; values in [0, 1]: "
            "(255 * image).round().astype('uint8'); 16 bits: (image >> 8).astype('uint8'); (3, H, W): "
            "image.transpose(1, 2, 0)"
        )
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3])


def _described(image: object) -> str:
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    return type(image).__name__ if shape is None else f"{type(image).__name__} {tuple(shape)} {dtype}"


def _pixels(image: np.ndarray | Image.Image | Path | str) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if not isinstance(image, Path | str):
        hint = "; of a tensor (3, H, W) in [0, 1]: (255 * t).round().byte().permute(1, 2, 0).cpu().numpy()"
        raise ValueError(
            f"a photo is an array (H, W, 3) uint8, a picture of Pillow or a file, not {_described(image)}"
            f"{hint if isinstance(image, Tensor) else ''}"
        )
    try:
        # From bytes: Pillow maps plain TIFFs into memory and then forgets their orientation.
        return upright_rgb(Image.open(BytesIO(Path(image).read_bytes())))
    except OSError as error:  # Pillow's for damaged files, too
        raise ValueError(f"{image}: {error.strerror or error}") from error
