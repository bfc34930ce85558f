"""Masked reductions, one value per image: their only owner.

Fill before arithmetic, mask after, never index by a mask: shapes stay fixed, a NaN behind the mask
reaches neither the value nor the gradient, and an image without a valid pixel gives 0 with zero
gradient.

Legend: B batch, N pixels of one image. Every function takes (B, ...) and flattens all axes but the
first.
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid pixels, (B, ...) and bool (B, ...) -> (B,); 0 for an empty mask."""
    x, valid = x.flatten(1), valid.flatten(1)
    return torch.where(valid, x, 0.0).sum(1) / valid.sum(1).clamp(min=1)


def masked_median(x: Tensor, valid: Tensor) -> Tensor:
    """Lower median of the valid pixels, (B, ...) and bool (B, ...) -> (B,); 0 for an empty mask.

    The median is that of the valid pixels alone, not of the map with zeros in its holes as in the
    public MiDaS loss (isl-org/MiDaS#33). The gradient flows to the one selected pixel.
    """
    x, valid = x.flatten(1), valid.flatten(1)
    select = _median_by_sort if x.is_cuda else _median_by_selection
    index = select(x.detach(), valid)
    return torch.where(valid.any(1), x.gather(1, index[:, None])[:, 0], 0.0)


def _median_by_selection(x: Tensor, valid: Tensor) -> Tensor:
    """Index of the lower median, (B, N) -> (B,). Five times faster than sorting on a CPU."""
    return torch.where(valid, x, torch.nan).nanmedian(1).indices


def _median_by_sort(x: Tensor, valid: Tensor) -> Tensor:
    """Same as `_median_by_selection`, for CUDA, whose median has no fixed index."""
    order = torch.where(valid, x, torch.inf).argsort(dim=1, stable=True)
    middle = (valid.sum(1) - 1).clamp(min=0) // 2
    return order.gather(1, middle[:, None])[:, 0]


def masked_min_max(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest valid value, (B, ...) x 2 -> (B,), (B,); 0 for an empty mask."""
    x, valid = x.flatten(1), valid.flatten(1)
    some = valid.any(1)
    low = torch.where(valid, x, torch.inf).amin(1)
    high = torch.where(valid, x, -torch.inf).amax(1)
    return torch.where(some, low, 0.0), torch.where(some, high, 0.0)


@torch.no_grad()
def without_largest(x: Tensor, valid: Tensor, fraction: Tensor) -> Tensor:
    """Valid pixels that remain when each image's largest share is dropped, bool like x.

    The threshold v of an image is its k-th largest valid value, k = round(fraction * valid pixels),
    and only values strictly below v remain (Depth Anything V2, arXiv:2406.09414 section 5.2, as its
    first author explains it in DepthAnything/Depth-Anything-V2#108). Nothing is dropped where k is
    0 or where nothing lies strictly below v.

    Args:
        x: (B, ...) values; those of invalid pixels may be anything.
        valid: (B, ...) bool.
        fraction: (B,) share to drop, in [0, 1].
    """
    flat, mask = x.flatten(1), valid.flatten(1)
    count = mask.sum(1)
    num_dropped = (fraction * count).round().long()
    # torch.quantile refuses more than 16 million values and has no mask: sort, invalid last.
    ordered = torch.where(mask, flat, torch.inf).sort(1).values
    index = (count - num_dropped).clamp(0, flat.shape[1] - 1)
    kept = mask & (flat < ordered.gather(1, index[:, None]))
    keep_all = (num_dropped == 0) | ~kept.any(1)
    return torch.where(keep_all[:, None], mask, kept).view_as(valid)
