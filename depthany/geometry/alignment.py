"""Closed-form scale and shift between two maps of one image.

Legend: B batch. Maps are (B, ...), masks bool (B, ...), results (B,).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from depthany.geometry.masked import masked_mean


class Moments(NamedTuple):
    """First and second moments over the valid pixels, each (B,); 0 for an empty mask."""

    mean_pred: Tensor
    mean_target: Tensor
    var_pred: Tensor
    var_target: Tensor
    covariance: Tensor


def to_map(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...) with as many axes as `like`."""
    return value.view(-1, *[1] * (like.ndim - 1))


def moments(pred: Tensor, target: Tensor, valid: Tensor) -> Moments:
    """Centred moments of two maps over their valid pixels."""
    pred, target = torch.where(valid, pred, 0.0), torch.where(valid, target, 0.0)
    mean_pred, mean_target = masked_mean(pred, valid), masked_mean(target, valid)
    # Centred sums keep float32 usable where the determinant M * sum(p^2) - sum(p)^2 cancels.
    p = pred - to_map(mean_pred, pred)
    t = target - to_map(mean_target, target)
    return Moments(
        mean_pred,
        mean_target,
        masked_mean(p * p, valid),
        masked_mean(t * t, valid),
        masked_mean(p * t, valid),
    )


def scale_and_shift(pred: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and shift that bring `pred` to `target`, (B, ...) x 3 -> (B,), (B,).

    Minimises sum (scale * pred + shift - target)^2 over the valid pixels of each image. The scale
    may be negative: the caller decides what that means. Where the prediction is constant (up to
    rounding) the problem is degenerate: scale 0 and shift = mean target, the best constant; an
    empty mask gives 0 and 0.
    """
    m = moments(pred, target, valid)
    rounding = (8 * torch.finfo(m.var_pred.dtype).eps * m.mean_pred).square()
    degenerate = m.var_pred <= rounding
    scale = torch.where(degenerate, 0.0, m.covariance / torch.where(degenerate, 1.0, m.var_pred))
    return scale, m.mean_target - scale * m.mean_pred
