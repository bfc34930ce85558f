"""Detail beyond the network's input: overlapping tiles, each brought to the map of the whole photo, then blended.

Legend: H W pixels of the photo, h w pixels of a tile.
"""

import math

import numpy as np
import torch
from torch import Tensor

from depthany.inference.depth_map import DepthMap
from depthany.inference.predictor import Predictor

ROUNDS = 20  # of the fit
EXACT = 0.01  # of the mean deviation of the global map over a tile: smaller residuals weigh no more


def predict_tiled(
    predictor: Predictor,
    image: np.ndarray,
    *,
    input_size: int | None,
    tile: int,
    overlap: float,
    antialias: bool = False,
) -> DepthMap:
    """A map of the photo's own size with the detail of its tiles and the depth order of the whole photo.

    The whole photo is predicted at `input_size`, which gives the global map. Then each tile is predicted as a photo of
    its own at the same `input_size`, so that tiles of half the photo's side show twice the detail. The network knows a
    tile only up to scale and shift: they are fitted to the global map by least absolute deviations, which edges that
    only the tile shows do not move. Tiles are blended with weights that fade to their borders. A tile that says nothing
    of its part (a constant one, or one whose best scale is not positive) leaves the global map there.

    Args:
        predictor: the model.
        image: an array, as for `Predictor.predict`.
        input_size: short side of the network inputs in pixels; None: the size the model was trained at.
        tile: side of a tile in pixels of the photo; with `input_size` pixels the network sees them one to one.
        overlap: smallest share of a tile that the next one covers too, 0 to 0.9.
        antialias: as for `Predictor.predict`.

    Raises:
        ValueError: not such an image, a size that is not positive, or an overlap out of range.
    """
    if tile < 1:
        raise ValueError(f"a tile has at least one pixel, not {tile}")
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"tiles overlap by a share of 0 to 0.9, not {overlap}")
    whole = predictor.predict(image, input_size=input_size, antialias=antialias)
    height, width = whole.valid.shape
    h, w = min(tile, height), min(tile, width)
    if (h, w) == (height, width):
        return whole
    base = torch.from_numpy(np.where(whole.valid, whole.values, np.nan))
    weight = _fade(h, overlap)[:, None] * _fade(w, overlap)
    total, weights = torch.zeros(height, width), torch.zeros(height, width)
    shape = predictor.input_shape(h, w, input_size=input_size)
    for top in _starts(height, h, overlap):
        for left in _starts(width, w, overlap):
            part = slice(top, top + h), slice(left, left + w)
            pixels = predictor.resized(image[part], shape, antialias=antialias)
            seen = predictor.predict_batch([pixels], [(h, w)])[0]
            values = torch.from_numpy(np.where(seen.valid, seen.values, np.nan))
            total[part] += weight * _aligned(values, base[part])
            weights[part] += weight
    blended = (total / weights).clamp(min=min(0.0, whole.value_range()[0])).numpy()
    valid = np.isfinite(blended)
    return DepthMap(np.where(valid, blended, np.float32(0)), valid, whole.space)


def _aligned(values: Tensor, base: Tensor) -> Tensor:
    """`values` (h, w) at the scale and shift of `base` (h, w), which is taken where they say nothing."""
    known = values.isfinite() & base.isfinite()
    guess, target = (torch.where(known, x, 0.0).double() for x in (values, base))
    weight = known.double() / known.sum().clamp(min=1)
    spread = (weight * (target - (weight * target).sum()).abs()).sum()
    for _ in range(ROUNDS):  # least absolute deviations, as least squares with weight 1 / residual
        middle, aim = (weight * guess).sum() / weight.sum(), (weight * target).sum() / weight.sum()
        variance = (weight * (guess - middle) ** 2).sum()
        if not variance > 1e-12 * (weight * guess**2).sum():  # constant, or nothing known
            return base
        scale = (weight * (guess - middle) * (target - aim)).sum() / variance
        residual = (scale * (guess - middle) + aim - target).abs()
        weight = known / residual.clamp(min=EXACT * float(spread) + 1e-12)
    return torch.where(known & (scale > 0), scale * (guess - middle) + aim, base.double()).float()


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Where tiles begin along one side of the photo: the fewest that overlap enough, evenly spread."""
    steps = math.ceil((length - side) / max(side * (1 - overlap), 1))
    return [round(i * (length - side) / max(steps, 1)) for i in range(steps + 1)]


def _fade(side: int, overlap: float) -> Tensor:
    """Weights along one side of a tile: 1 inside, a raised cosine over the overlap, never 0."""
    inside = (torch.arange(side) + 0.5).minimum(side - torch.arange(side) - 0.5)
    return 0.5 - 0.5 * torch.cos(math.pi * (inside / max(side * overlap, 1)).clamp(max=1))
