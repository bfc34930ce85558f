"""Multi-scale gradient matching: the edges of the aligned prediction are those of the target.

Legend: B batch, H W pixels. Predictions and targets are disparities (B, H, W), masks bool.
"""

import torch
from torch import Tensor

from depthany.losses.affine_invariant import Alignment, aligned, check_alignment
from depthany.losses.term import Term
from depthany.types import DepthOutput, Target


def gradient_matching(pred: Tensor, target: Tensor, valid: Tensor, *, num_scales: int, alignment: Alignment) -> Tensor:
    """Sum over scales of the mean absolute gradient of the residual, (B, H, W) x 3 -> (B,).

    Scale k keeps every 2^k-th row and column, without a blur; a pair of neighbours counts where
    both are valid; the sum of |dx| + |dy| is divided by the number of valid pixels of that scale
    and image. MiDaS, arXiv:1907.01341 eq. 11, with the constants of its public loss (4 scales,
    summed); Depth Anything V2, arXiv:2406.09414 section 5. Differs from the public loss in one
    point: per image, not over the batch. Not masked by the dropped share of a pseudo-label: no
        source says so.
    """
    pred, target = aligned(pred, target, valid, alignment)
    residual = pred - target
    total = residual.new_zeros(len(residual))
    for k in range(num_scales):
        r, v = residual[:, :: 2**k, :: 2**k], valid[:, :: 2**k, :: 2**k]
        dx = torch.where(v[:, :, 1:] & v[:, :, :-1], r[:, :, 1:] - r[:, :, :-1], 0.0)
        dy = torch.where(v[:, 1:] & v[:, :-1], r[:, 1:] - r[:, :-1], 0.0)
        total = total + (dx.abs().sum((1, 2)) + dy.abs().sum((1, 2))) / v.sum((1, 2)).clamp(min=1)
    return total


class GradientMatching(Term):
    """`gradient_matching` over a pyramid of strides 1, 2, 4, ..."""

    def __init__(self, *, weight: float, scales: int, alignment: Alignment) -> None:
        """Choose the pyramid and the alignment.

        Args:
            weight: applied by the sum only (V2: 2 beside a data term of weight 1).
            scales: number of strides 1, 2, 4, ... (MiDaS: 4; V2 names none).
            alignment: "median" or "least_squares", the same as the data term's.
        """
        super().__init__(weight=weight)
        check_alignment(alignment, option="loss.<gradient>.alignment")
        if scales < 1:
            raise ValueError(f"loss.<gradient>.scales is {scales}: give 1 or more")
        self.scales = scales
        self.alignment: Alignment = alignment

    def per_image(self, output: DepthOutput, target: Target) -> Tensor:
        """(B,)."""
        return gradient_matching(
            output.disparity,
            target.disparity,
            target.valid,
            num_scales=self.scales,
            alignment=self.alignment,
        )
