"""The weighted sum of the loss terms, per image, with CutMix regions.

Legend: B batch, H W pixels.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from depthany.types import DepthOutput, Target


class WeightedSum(nn.Module):
    """Named terms, each times its weight. A term that is null or has weight 0 is not computed."""

    def __init__(self, *, terms: Mapping[str, nn.Module | None]) -> None:
        """Keep the active terms.

        Args:
            terms: name -> term with the attributes `weight` (float) and `per_pixel` (bool) and
                forward(output, target) -> (B,).

        Raises:
            ValueError: no term is active.
        """
        super().__init__()
        active = {name: term for name, term in terms.items() if term is not None and term.weight}
        if not active:
            raise ValueError(f"loss: all of {', '.join(terms) or 'nothing'} is off: give a weight above 0")
        self.terms = nn.ModuleDict(active)

    def forward(
        self, output: DepthOutput, target: Target, regions: Sequence[Tensor] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total (B,) and the unweighted value (B,) of each active term by name.

        Args:
            output: of the model.
            target: what it should be.
            regions: bool (B, H, W) masks that share out each image (CutMix: the box and the rest),
                or None. A per-pixel term is computed for each region with an alignment of its own,
                and summed with the region's share of the image area (V1, arXiv:2401.10891 eq. 6-8).
                Other terms are computed once.
        """
        parts: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if regions is None or not term.per_pixel:
                parts[name] = term(output, target)
                continue
            parts[name] = torch.stack(
                [
                    region.float().mean((1, 2)) * term(output, target._replace(valid=target.valid & region))
                    for region in regions
                ]
            ).sum(0)
        total = sum(cast(float, self.terms[name].weight) * part for name, part in parts.items())
        return cast(Tensor, total), parts
