"""Predictions without a model: what a depth network has to beat.

Legend: B batch, h w pixels, S side of the mean map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from depthany.geometry.disparity import normalise


def constant_map(height: int, width: int) -> Tensor:
    """Ones, (h, w) float32: everything equally far."""
    return torch.ones(height, width)


def row_ramp(height: int, width: int) -> Tensor:
    """Disparity that grows linearly from 0 (top row) to 1 (bottom row), (h, w) float32."""
    return torch.linspace(0, 1, height)[:, None].expand(height, width).contiguous()


class MeanMap:
    """Mean of the normalised disparity maps of a set: the best guess without an image."""

    def __init__(self, *, size: int) -> None:
        """Start empty with a map of (size, size)."""
        self._total = torch.zeros(size, size)
        self._weight = torch.zeros(size, size)

    def update(self, disparity: Tensor, valid: Tensor) -> None:
        """Add maps (B, h, w) with bool masks, each min-max normalised over its valid pixels."""
        size = (len(self._total), len(self._total))
        seen = valid.float().cpu()
        value = normalise(disparity.float(), valid).cpu()  # 0 where invalid or the constant map
        self._total += F.adaptive_avg_pool2d(value * seen, size).sum(0)
        self._weight += F.adaptive_avg_pool2d(seen, size).sum(0)

    def map(self) -> Tensor:
        """(S, S) float32 in [0, 1]: mean over valid pixels, 0 where none was ever valid."""
        return self._total / self._weight.clamp(min=torch.finfo(torch.float32).tiny)
