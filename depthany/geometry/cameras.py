"""Pinhole cameras: how long the ray of a pixel is."""

import torch
from torch import Tensor


def ray_norms(height: int, width: int, focal_px: float, cx: float, cy: float) -> Tensor:
    """Length of the ray through each pixel centre at depth 1, (H, W) float32, at least 1.

    depth = distance / ray_norm. Pixel centres lie at half integers, so the centre of an image is
    (width / 2, height / 2). Same as z = dist * f / sqrt(x^2 + y^2 + f^2) in the Hypersim loader of
    DepthAnything/Depth-Anything-V2 (metric_depth/dataset/hypersim.py: 1024 x 768, f = 886.81 px).

    Args:
        height: of the label in pixels.
        width: of the label in pixels.
        focal_px: focal length in pixels of the label.
        cx: column of the principal point in pixels.
        cy: row of the principal point in pixels.
    """
    if not focal_px > 0:
        raise ValueError(f"focal_px is {focal_px}: give the focal length in pixels, above 0")
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - cx) / focal_px
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - cy) / focal_px
    return (1 + x[None, :].square() + y[:, None].square()).sqrt().float()
