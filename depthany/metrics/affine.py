"""Affine-invariant depth scores: least squares in disparity, comparison in depth, mean over images.

Legend: B batch, h w pixels of the label.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torchmetrics
from torch import Tensor

from depthany.geometry.alignment import scale_and_shift, to_map
from depthany.geometry.masked import masked_mean, masked_min_max

MIN_PIXELS = 10  # fewer valid pixels are not scored (metric_depth/train.py of the official V2 code)
SCORES = ("abs_rel", "delta1", "negative_scale")


class Fit(NamedTuple):
    """A prediction brought to the truth; where nothing is compared, both are 1."""

    fitted: Tensor  # (B, h, w) disparity in the truth's unit, positive
    truth: Tensor  # (B, h, w)
    compared: Tensor  # (B, h, w) bool
    negative: Tensor  # (B,) bool


def fit_to_truth(pred: Tensor, disparity: Tensor, valid: Tensor, *, min_disparity: float | None) -> Fit:
    """Scale and shift by least squares in disparity over the compared pixels, floored so that it can be inverted.

    The floor is the smallest true disparity among the compared pixels (microsoft/MoGe: 1 / largest depth). A negative
    scale, that of an inverted prediction, is not accepted: the best constant, the mean true disparity, stands instead.
    Arguments as in `affine_invariant_depth`.
    """
    pred, disparity = (x if x.dtype == torch.float64 else x.float() for x in (pred, disparity))
    compared = valid & (disparity > 0)
    if min_disparity is not None:
        compared &= disparity >= min_disparity
    truth = torch.where(compared, disparity, 1.0)
    pred = torch.where(compared, pred, 0.0)
    scale, shift = scale_and_shift(pred, truth, compared)
    negative = scale < 0
    scale = torch.where(negative, 0.0, scale)
    shift = torch.where(negative, masked_mean(truth, compared), shift)
    floor, _ = masked_min_max(truth, compared)
    fitted = to_map(scale, pred) * pred + to_map(shift, pred)
    fitted = torch.where(compared, torch.maximum(fitted, to_map(floor, pred)), 1.0)
    return Fit(fitted, truth, compared, negative)


@torch.no_grad()
def affine_invariant_depth(
    pred: Tensor, disparity: Tensor, valid: Tensor, *, min_disparity: float | None
) -> dict[str, Tensor]:
    """Scores of each image, (B, h, w) x 3 -> (B,) each.

    The prediction is fitted (`fit_to_truth`), and both are inverted. `abs_rel` = mean |z - z*| / z*, `delta1` = share
    of pixels with max(z / z*, z* / z) < 1.25 (V1, arXiv:2401.10891 suppl. 6); `negative_scale` = 1 where the fitted
    scale is negative.

    Args:
        pred: disparity up to scale and shift, at the label's size; (1, h, w) serves every image.
        disparity: truth, factor / depth in any unit: the scores are ratios.
        valid: bool, sky excluded; pixels without a positive disparity have no depth and are left
            out.
        min_disparity: cap of the protocol in the label's unit: pixels farther than 1 /
            min_disparity are left out.

    Returns:
        abs_rel, delta1, negative_scale as floats, NaN for an image with fewer than 10 compared
        pixels; scored as bool.
    """
    fit = fit_to_truth(pred, disparity, valid, min_disparity=min_disparity)
    ratio = fit.truth / fit.fitted  # z / z*
    scored = fit.compared.flatten(1).sum(1) >= MIN_PIXELS
    scores = {
        "abs_rel": masked_mean((ratio - 1).abs(), fit.compared),
        "delta1": masked_mean((torch.maximum(ratio, 1 / ratio) < 1.25).to(ratio), fit.compared),
        "negative_scale": fit.negative.to(ratio),
    }
    return {k: torch.where(scored, v, torch.nan) for k, v in scores.items()} | {"scored": scored}


class DepthScores(torchmetrics.Metric):
    """Mean over images of `affine_invariant_depth`, by source, summed over ranks."""

    full_state_update: bool | None = False
    totals: Tensor  # (S, 3) sums of abs_rel, delta1, negative_scale over scored images
    num_images: Tensor  # (S,) scored images
    num_unscored: Tensor  # (S,) images with too few pixels

    def __init__(self, *, sources: Sequence[str]) -> None:
        """Start at zero for a fixed list of sources, the same on every rank."""
        super().__init__()
        self.sources = tuple(sources)
        num = len(self.sources)
        self.add_state("totals", torch.zeros(num, len(SCORES)), dist_reduce_fx="sum")
        self.add_state("num_images", torch.zeros(num, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("num_unscored", torch.zeros(num, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, sources: Sequence[str], scores: Mapping[str, Tensor]) -> None:
        """Add images.

        Args:
            sources: name of each image's source, B of them.
            scores: from `affine_invariant_depth`.

        Raises:
            ValueError: a source is not in the constructor's list.
        """
        unknown = set(sources) - set(self.sources)
        if unknown:
            raise ValueError(f"no such source: {sorted(unknown)}; known: {', '.join(self.sources)}")
        row = torch.tensor([self.sources.index(s) for s in sources], device=self.totals.device)
        scored = scores["scored"].to(row.device)
        values = torch.stack([scores[name].to(self.totals) for name in SCORES], 1)  # (B, 3)
        self.totals.index_add_(0, row, torch.where(scored[:, None], values, 0.0))
        self.num_images.index_add_(0, row, scored.long())
        self.num_unscored.index_add_(0, row, (~scored).long())

    def compute(self) -> dict[str, dict[str, float]]:
        """Source -> SCORES (NaN without a scored image), num_images, num_unscored."""
        means = (self.totals / self.num_images[:, None]).tolist()
        counts = zip(self.num_images.tolist(), self.num_unscored.tolist(), strict=True)
        return {
            source: dict(zip(SCORES, mean, strict=True)) | {"num_images": n, "num_unscored": u}
            for source, mean, (n, u) in zip(self.sources, means, counts, strict=True)
        }
