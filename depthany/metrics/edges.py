"""How sharp a predicted map is where the truth has an edge: what a finer input buys, and what averages hide.

Legend: B batch, h w pixels of the label, P pairs of neighbours, T thresholds.
"""

import torch
from torch import Tensor

from depthany.geometry.masked import masked_mean
from depthany.metrics.affine import fit_to_truth

RATIOS = torch.linspace(1.05, 1.25, 10)  # of depth between two neighbours, from where on they are an edge
DENSE = 0.8  # smallest share of neighbours that are compared too; points of a laser have none beside them
EDGE_SCORES = ("edge_f1", "edge_step")


@torch.no_grad()
def edge_scores(pred: Tensor, disparity: Tensor, valid: Tensor, *, min_disparity: float | None) -> dict[str, Tensor]:
    """Sharpness of each image at the edges of its truth, (B, h, w) x 3 -> (B,) each, from 0 to 1.

    An edge lies between two pixels side by side whose depths have a ratio above t. `edge_f1` is the harmonic mean of
    precision and recall of the predicted edges, which count only between the same two pixels and with the same one in
    front, averaged over ten t from 1.05 to 1.25 with weight t: "Scale-Invariant Boundary F1" of Depth Pro
    (arXiv:2410.02073, apple/ml-depth-pro `eval/boundary_metrics.py`), but that the four directions are counted together
    and a t without a true edge is left out, so that the truth itself always scores 1. `edge_step` is kinder to a smooth
    map: the share of the true step in log depth that the prediction makes between the same two pixels, cut to
    [0, 1], averaged over the edges at t = 1.05.

    Args:
        pred: disparity up to scale and shift, at the label's size; fitted as for `affine_invariant_depth`.
        disparity: truth, factor / depth in any unit.
        valid: bool, sky excluded.
        min_disparity: cap of the protocol, see `affine_invariant_depth`.

    Returns:
        edge_f1 and edge_step; NaN where the truth has no edge, or is sparse: fewer than 0.8 of its neighbours compared.
    """
    fit = fit_to_truth(pred, disparity, valid, min_disparity=min_disparity)
    found, true = _steps(fit.fitted.log()), _steps(fit.truth.log())  # (B, P)
    pairs = torch.cat(
        [
            (fit.compared[:, :, 1:] & fit.compared[:, :, :-1]).flatten(1),
            (fit.compared[:, 1:] & fit.compared[:, :-1]).flatten(1),
        ],
        1,
    )
    true_level, level = (_level(step).where(pairs, 0) for step in (true, found))
    hit_level = torch.minimum(true_level, level).where(true * found > 0, 0)
    num_true, num_found, num_hit = (_count(x) for x in (true_level, level, hit_level))  # (B, T)
    weight = RATIOS.to(true) * (num_true > 0)
    f1 = (weight * 2 * num_hit / (num_true + num_found).clamp(min=1)).sum(1) / weight.sum(1).clamp(min=1)
    edge = true_level > 0
    step = masked_mean((found / torch.where(edge, true, 1.0)).clamp(0, 1), edge)
    scored = edge.any(1) & (pairs.sum(1) >= DENSE * 2 * fit.compared.flatten(1).sum(1))
    return {"edge_f1": torch.where(scored, f1, torch.nan), "edge_step": torch.where(scored, step, torch.nan)}


def _steps(x: Tensor) -> Tensor:
    """Differences to the right and downwards, (B, h, w) -> (B, P)."""
    return torch.cat([x.diff(dim=2).flatten(1), x.diff(dim=1).flatten(1)], 1)


def _level(step: Tensor) -> Tensor:
    """How many thresholds a step in log depth exceeds, (B, P) -> (B, P) from 0 to T."""
    return torch.bucketize(step.abs(), RATIOS.to(step).log())


def _count(level: Tensor) -> Tensor:
    """Pairs above each threshold, (B, P) -> (B, T)."""
    bins = len(RATIOS) + 1
    rows = torch.arange(len(level), device=level.device)[:, None] * bins
    counts = torch.bincount((rows + level).flatten(), minlength=len(level) * bins).view(-1, bins)
    return counts.flip(1).cumsum(1).flip(1)[:, 1:]
