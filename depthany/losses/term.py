"""What every loss term shares: a weight, full precision under autocast, one value per image."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from depthany.types import DepthOutput, Target


def full_precision(x: Tensor) -> Tensor:
    """Half and bfloat16 become float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Term(nn.Module, ABC):
    """A loss term: one unweighted value per image, and the weight that only the sum applies."""

    per_pixel: ClassVar[bool] = True  # False: the term ignores `valid` and is computed once under CutMix

    def __init__(self, *, weight: float) -> None:
        """Weight 0 takes the term out of the sum: it is not computed."""
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ValueError(f"loss.<term>.weight is {weight}: give 0 (off) or a positive number")
        self.weight = weight

    def forward(self, output: DepthOutput, target: Target) -> Tensor:
        """Unweighted loss (B,), float32 (float64 only for float64 input)."""
        with torch.autocast(output.disparity.device.type, enabled=False):
            return self.per_image(output, target)

    @abstractmethod
    def per_image(self, output: DepthOutput, target: Target) -> Tensor:
        """The term itself, outside autocast: (B,)."""
