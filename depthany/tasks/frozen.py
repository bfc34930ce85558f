"""Networks that are asked but never taught: frozen by construction."""

from typing import Any

import torch
from torch import Tensor, nn

from depthany.models.depth_model import DepthModel


class Frozen(nn.Module):
    """A model without gradient, always in eval mode.

    A task keeps it outside its own modules (see StudentTask), so it is absent from the optimizer, from checkpoints and
    from averaged copies.
    """

    def __init__(self, model: DepthModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self  # frozen weights need no copy of their own

    @torch.no_grad()
    def disparity(self, image: Tensor, *, precision: str) -> Tensor:
        """(B, 3, H, W) normalised to the model's disparity (B, H, W) float32, as the label job has it."""
        with torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return self.model(image).float()

    @torch.no_grad()
    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to the encoder's final features (B, C, h, w)."""
        return self.model.outputs(image).features
