"""Affine-invariant data term: absolute error after an alignment per image.

Legend: B batch, H W pixels. Predictions and targets are disparities (B, H, W), masks bool.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from depthany.geometry.alignment import moments, to_map
from depthany.geometry.masked import masked_mean, masked_median, without_largest
from depthany.losses.term import Term, full_precision
from depthany.types import DepthOutput, Target

Alignment = Literal["median", "least_squares"]

EPS = 1e-6  # floor of a spread; the papers name none, MiDaS' public loss clamps its MAD here


def check_alignment(alignment: str, *, option: str) -> None:
    """Raise ValueError, naming the option, for anything that is not an `Alignment`."""
    if alignment not in get_args(Alignment):
        raise ValueError(f"{option} is {alignment!r}: choose one of {', '.join(get_args(Alignment))}")


def normalise_median_mad(disparity: Tensor, valid: Tensor, eps: float = EPS) -> Tensor:
    """(d - median) / max(mean |d - median|, eps) over valid pixels, (B, H, W) -> (B, H, W).

    Depth Anything V1, arXiv:2401.10891 eq. 2-3. Finite where invalid too.
    """
    disparity = torch.where(valid, disparity, 0.0)
    centred = disparity - to_map(masked_median(disparity, valid), disparity)
    spread = masked_mean(centred.abs(), valid).clamp(min=eps)
    return centred / to_map(spread, centred)


def aligned(pred: Tensor, target: Tensor, valid: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """The prediction brought to the normalised target, and that target: two maps (B, H, W).

    The target is always normalised by median and MAD. "median" does the same to the prediction (V1,
    eq. 2-3); "least_squares" fits scale and shift in closed form (the MiDaS loss the V2 authors
    name in DepthAnything/Depth-Anything-V2#137). A least-squares scale may come out negative, and
    then the loss would pull an inverted prediction further: there the scale is the ratio of
    standard deviations, which is positive, so that inversion costs and the gradient turns the
    prediction round.
    """
    pred = torch.where(valid, full_precision(pred), 0.0)
    target = normalise_median_mad(full_precision(target), valid)
    if alignment == "median":
        return normalise_median_mad(pred, valid), target
    m = moments(pred, target, valid)
    var_pred = m.var_pred.clamp(min=EPS**2)  # a constant prediction: finite, and so is its gradient
    scale = m.covariance / var_pred
    ratio = m.var_target.clamp(min=EPS**2).sqrt() / var_pred.sqrt()
    scale = torch.where(scale <= 0, ratio, scale)
    centred = pred - to_map(m.mean_pred, pred)
    return to_map(scale, pred) * centred + to_map(m.mean_target, pred), target


def kept_mask(pred: Tensor, target: Tensor, valid: Tensor, alignment: Alignment, fraction: float | Tensor) -> Tensor:
    """Valid pixels left without the `fraction` (number or (B,)) of largest residuals, (B, H, W)."""
    with torch.no_grad():
        pred, target = aligned(pred, target, valid, alignment)
        share = torch.as_tensor(fraction, dtype=pred.dtype, device=pred.device).expand(len(pred))
        return without_largest((pred - target).abs(), valid, share)


def affine_invariant(
    pred: Tensor, target: Tensor, valid: Tensor, *, alignment: Alignment, trim: Tensor | None
) -> Tensor:
    """Mean absolute error after alignment, (B, H, W) x 3 -> (B,). V1, arXiv:2401.10891 eq. 1.

    The mean is over the kept pixels, without MiDaS' factor 1/2. Zero, with zero gradient, for an
    empty mask.

    Args:
        pred: any finite disparity; half precision is cast up.
        target: disparity; anything where invalid.
        valid: bool.
        alignment: how the prediction is brought to the target.
        trim: (B,) share of the largest residuals left out (see `without_largest`); None leaves out
            nothing.
    """
    pred, target = aligned(pred, target, valid, alignment)
    residual = (pred - target).abs()
    kept = valid if trim is None else without_largest(residual, valid, trim)
    return masked_mean(residual, kept)


class AffineInvariant(Term):
    """`affine_invariant` with a share left out of labelled, another of pseudo-labelled images."""

    def __init__(self, *, weight: float, alignment: Alignment, trim: float, drop: float) -> None:
        """Choose the alignment and what is left out.

        Args:
            weight: applied by the sum only.
            alignment: "median" or "least_squares", see `aligned`.
            trim: share of the largest residuals left out of labelled images (MiDaS: 0.2).
            drop: the same for pseudo-labelled images (V2, arXiv:2406.09414 section 5.2: 0.1).
        """
        super().__init__(weight=weight)
        check_alignment(alignment, option="loss.<data term>.alignment")
        for name, share in (("trim", trim), ("drop", drop)):
            if not 0 <= share < 1:
                raise ValueError(f"loss.<data term>.{name} is {share}: give a share in [0, 1)")
        self.alignment: Alignment = alignment
        self.trim = trim
        self.drop = drop

    def per_image(self, output: DepthOutput, target: Target) -> Tensor:
        """(B,)."""
        share = None
        if self.trim or self.drop:
            share = target.pseudo * self.drop + ~target.pseudo * self.trim
        return affine_invariant(output.disparity, target.disparity, target.valid, alignment=self.alignment, trim=share)
