"""Feature alignment: the student's encoder stays near a frozen one on pseudo-labelled images.

Legend: B batch, C channels, h w patches.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from depthany.losses.term import Term, full_precision
from depthany.types import DepthOutput, Target


def feature_alignment(features: Tensor, frozen: Tensor, *, margin: float) -> Tensor:
    """Mean over patches of 1 - cos, 0 for patches with cos > margin, (B, C, h, w) x 2 -> (B,).

    Depth Anything V1, arXiv:2401.10891 eq. 9. The mean is over all patches, kept or not, as the
    1/HW of that equation reads (the normaliser of the tolerant form is not published): a student
    within tolerance has loss 0.
    """
    cosine = F.cosine_similarity(full_precision(features), full_precision(frozen), dim=1)
    return torch.where(cosine > margin, 0.0, 1 - cosine).flatten(1).mean(1)


class FeatureAlignment(Term):
    """`feature_alignment` on pseudo-labelled images, 0 on labelled ones (V1, table 13)."""

    per_pixel: ClassVar[bool] = False

    def __init__(self, *, weight: float, margin: float) -> None:
        """Choose the tolerance.

        Args:
            weight: applied by the sum only (V1: a plain average of the terms; V2 names none).
            margin: patches with a larger cosine contribute nothing, in [-1, 1] (V1: 0.85; 1: no
                tolerance).
        """
        super().__init__(weight=weight)
        if not -1 <= margin <= 1:
            raise ValueError(f"loss.<feature>.margin is {margin}: a cosine lies in [-1, 1]")
        self.margin = margin

    def per_image(self, output: DepthOutput, target: Target) -> Tensor:
        """(B,).

        Raises:
            ValueError: the target has no features, or features of another size.
        """
        if target.features is None:
            raise ValueError(
                "the feature term needs a frozen encoder: set loss.feature.weight=0, "
                "or name the encoder with task.feature_encoder"
            )
        if target.features.shape != output.features.shape:
            raise ValueError(
                f"the model's features (batch, channels, rows, columns) are "
                f"{tuple(output.features.shape)}, those of the frozen encoder "
                f"{tuple(target.features.shape)}: choose a task.feature_encoder of the same size "
                "and patch as the model, or set loss.feature.weight=0"
            )
        loss = feature_alignment(output.features, target.features, margin=self.margin)
        return torch.where(target.pseudo, loss, 0.0)
