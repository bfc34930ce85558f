"""From one photo to a `DepthMap` with the official pre- and post-processing.

Legend: H W pixels of the photo, h w pixels of the network input.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from depthany.geometry.resize import MAX_INPUT_PIXELS, network_input
from depthany.inference.depth_map import DepthMap
from depthany.models.depth_model import DepthModel


class Predictor:
    """A model, frozen, on its device.

    Resizing and normalisation follow Depth-Anything-V2 `depth_anything_v2/dpt.py` (`infer_image`)
    and `util/transform.py`.

    Args:
        model: Moved to `device` in float32 and set to evaluation.
        device: Where the network runs.
        precision: bf16 runs the network under autocast; the map is float32 either way.
        max_pixels: Largest network input in pixels. The short side is at least the input size,
            so a thin strip would grow without bound.
    """

    def __init__(
        self,
        *,
        model: DepthModel,
        device: torch.device | str,
        precision: Literal["fp32", "bf16"],
        max_pixels: int = MAX_INPUT_PIXELS,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is fp32 or bf16, not {precision!r}")
        self.device = torch.device(device)
        self.model = model.to(self.device, torch.float32).eval()
        self.precision = precision
        self.max_pixels = max_pixels

    def network_input(self, image: np.ndarray, *, input_size: int | None) -> np.ndarray:
        """The normalised network input (h, w, 3) float32 of a photo.

        Args:
            image: (H, W, 3) uint8 RGB, upright.
            input_size: Lower bound of the short side in pixels, rounded to the patch size; None: the size the model
                was trained at.

        Raises:
            ValueError: Not an RGB uint8 image, an input size that is not positive, or a network input above
                `max_pixels`.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
        if input_size is None:
            input_size = self.model.input_size
        if input_size < 1:
            raise ValueError(f"--input-size must be positive, not {input_size}")
        multiple = self.model.patch_size
        try:
            return network_input(image, size=input_size, multiple=multiple, max_pixels=self.max_pixels)
        except ValueError as error:
            raise ValueError(f"{error}; lower --input-size or raise --max-pixels ({self.max_pixels})") from error

    @torch.inference_mode()
    def disparity(self, inputs: Sequence[np.ndarray]) -> Tensor:
        """Runs the network on inputs (h, w, 3) of one shape: disparity (B, h, w) float32 on the device."""
        # (B, h, w, 3) -> (B, 3, h, w)
        batch = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).contiguous().to(self.device)
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            return self.model(batch).float()

    def predict(self, image: np.ndarray, *, input_size: int | None) -> DepthMap:
        """Predicts a relative disparity of the photo's own size; arguments and errors as `network_input`."""
        output = self.disparity([self.network_input(image, input_size=input_size)])[:, None]  # (1, 1, h, w)
        output = interpolate(output, image.shape[:2], mode="bilinear", align_corners=True)
        disparity = output[0, 0].cpu().numpy()
        valid = np.isfinite(disparity)
        return DepthMap(np.where(valid, disparity, np.float32(0)), valid)
