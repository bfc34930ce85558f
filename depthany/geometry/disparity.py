"""From what a file stores to disparity: the one place where labels are converted.

Legend: B batch, h w pixels of the label. Disparity = factor / depth; 0 is infinitely far.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from depthany.geometry.alignment import to_map
from depthany.geometry.masked import masked_min_max
from depthany.types import Quantity


def to_disparity(
    values: Tensor | np.ndarray,
    *,
    quantity: Quantity,
    scale: float,
    factor: float,
    invalid: Sequence[float],
    sky: float | None,
    sky_above: float | None,
    rays: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Disparity (h, w) float32 and the bool masks valid and sky (h, w), sky being a part of valid.

    depth = value * scale, depth = value * scale / rays for a distance, disparity = value * scale;
    the result is factor / depth or disparity * factor. Arithmetic is in float32 whatever the file
    holds.

    Invalid are: NaN, infinities, the listed codes, depth <= 0 and disparity < 0. A stored disparity
    of 0 is legal (infinitely far) unless it is listed. Sky is valid with disparity exactly 0. An
    infinite depth is sky only where `sky` says so. A listed invalid code wins over `sky_above`.

    Args:
        values: (h, w) as stored, of any real dtype.
        quantity: what the values are.
        scale: unit of the file: metres (or disparity units) per stored one, > 0.
        factor: numerator of the disparity, > 0: baseline * focal length, or 1.
        invalid: stored codes that mean "no measurement"; NaN may be listed.
        sky: stored code that means "infinitely far" (inf and NaN are possible), or None.
        sky_above: scaled depth or distance from which on a finite value is infinitely far, or None.
        rays: (h, w) from `cameras.ray_norms`; needed for, and only for, a distance.

    Raises:
        ValueError: the options contradict each other or the map.
    """
    quantity = Quantity(quantity)
    _check(quantity, scale=scale, factor=factor, invalid=invalid, sky=sky, sky_above=sky_above)
    if (rays is not None) != (quantity is Quantity.DISTANCE):
        raise ValueError(f"quantity={quantity}: give rays for a distance, and only there")
    if isinstance(values, np.ndarray):
        # A copy: read-only and big-endian arrays are fine.
        values = torch.from_numpy(values.astype(np.float32))
    values = values.float()
    if values.ndim != 2 or (rays is not None and rays.shape != values.shape):
        rays_shape = None if rays is None else tuple(rays.shape)
        raise ValueError(f"a label is (h, w), rays alike; got {tuple(values.shape)}, {rays_shape}")

    coded = torch.zeros_like(values, dtype=torch.bool)
    for code in invalid:
        coded |= _equals(values, code)
    usable = values.isfinite() & ~coded
    is_sky = torch.zeros_like(coded) if sky is None else _equals(values, sky)
    scaled = torch.where(usable, values, 0.0) * scale
    if quantity is Quantity.DISPARITY:
        disparity = scaled * factor
        usable &= disparity >= 0
    else:
        if sky_above is not None:
            is_sky |= usable & (scaled >= sky_above)
        depth = scaled if rays is None else scaled / rays
        usable &= depth > 0
        disparity = factor / torch.where(usable, depth, 1.0)
    valid = usable & disparity.isfinite() | is_sky
    return torch.where(valid & ~is_sky, disparity, 0.0), valid, is_sky


def _equals(values: Tensor, code: float) -> Tensor:
    return values.isnan() if math.isnan(code) else values == code


def _check(
    quantity: Quantity,
    *,
    scale: float,
    factor: float,
    invalid: Sequence[float],
    sky: float | None,
    sky_above: float | None,
) -> None:
    for name, number in (("scale", scale), ("factor", factor)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name} is {number}: give a finite number above 0")
    if sky_above is not None and quantity is Quantity.DISPARITY:
        raise ValueError("sky_above is a depth, but quantity=disparity: name the code as sky=")
    if sky is not None and any(sky == c or (math.isnan(sky) and math.isnan(c)) for c in invalid):
        raise ValueError(f"sky={sky} is also listed as invalid, but sky is valid: drop one")


def normalise(disparity: Tensor, valid: Tensor) -> Tensor:
    """Min-max over the valid pixels of each image, (B, h, w) or (h, w) -> the same, in [0, 1].

    0 where invalid; a constant map, a single valid pixel and an empty mask give 0 everywhere.
    Min-max as in Depth Anything V1, arXiv:2401.10891 section 3.1: the factor of the disparity no
    longer matters.
    """
    if disparity.ndim == 2:
        return normalise(disparity[None], valid[None])[0]
    low, high = (to_map(x, disparity) for x in masked_min_max(disparity, valid))
    span = high - low
    filled = torch.where(valid, disparity, low)
    return (filled - low) / torch.where(span > 0, span, 1.0)
