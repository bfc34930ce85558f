"""The DPT head of Depth Anything: four ViT maps to one disparity map.

Legend: B batch, H W pixels, h w patches, C channels, F features.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthany.models.onednn import fast_inference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,  # metric_depth/depth_anything_v2/dpt.py of the official code
}


class DPTHead(nn.Module):
    """Reassembles four maps into a pyramid and fuses it from coarse to fine.

    Names, shapes and arithmetic are those of depth_anything_v2/dpt.py and util/blocks.py in
    github.com/DepthAnything/Depth-Anything-V2 (after DPT, arXiv:2103.13413), except that the
    residual unit that the official code builds in `refinenet4` and never runs is left out.

    Args:
        in_channels: C of the four maps.
        features: F, channels of the fused maps; even.
        out_channels: channels of the four reassembled maps, fine to coarse.
        hidden: channels before the last convolution; 32 in the official models.
        activation: the last one. `relu`: official, here positive at the start; `softplus`: smooth;
            `sigmoid`: of metric models, a share of the largest depth.

    Raises:
        ValueError: an unknown activation, odd features, or not four out_channels.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        features: int,
        out_channels: Sequence[int],
        hidden: int,
        activation: Literal["relu", "softplus", "sigmoid"],
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: choose one of {list(ACTIVATIONS)}")
        if len(out_channels) != 4 or features % 2:
            raise ValueError(
                f"features={features}, out_channels={list(out_channels)}: features must be even and out_channels four"
            )
        self.activation = activation
        self.projects = nn.ModuleList(nn.Conv2d(in_channels, c, 1) for c in out_channels)
        c0, c1, _, c3 = out_channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(c0, c0, 4, stride=4),  # h -> 4h
                nn.ConvTranspose2d(c1, c1, 2, stride=2),  # h -> 2h
                nn.Identity(),
                nn.Conv2d(c3, c3, 3, stride=2, padding=1),  # h -> ceil(h / 2)
            ]
        )
        self.scratch = nn.ModuleDict()
        for level, c in enumerate(out_channels, start=1):
            self.scratch[f"layer{level}_rn"] = nn.Conv2d(c, features, 3, padding=1, bias=False)
        for level in range(1, 5):
            self.scratch[f"refinenet{level}"] = FusionBlock(features=features, skip=level < 4)
        self.scratch["output_conv1"] = nn.Conv2d(features, features // 2, 3, padding=1)
        last = nn.Conv2d(hidden, 1, 1)
        if activation == "relu":
            # With the default initialisation half of all seeds give an output of exactly 0, which
            # never learns (measured on the official class). Weights >= 0 on ReLU features and a
            # positive bias: at least 0.1 at any seed.
            with torch.no_grad():
                last.weight.abs_()
                assert last.bias is not None
                last.bias.fill_(0.1)
        self.scratch["output_conv2"] = nn.Sequential(nn.Conv2d(features // 2, hidden, 3, padding=1), nn.ReLU(), last)

    @fast_inference
    def forward(self, taps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Disparity, affine-invariant, >= 0, larger is nearer; with sigmoid depth in [0, 1], larger is farther.

        Args:
            taps: four (B, C, h, w) maps, shallow to deep.
            size: (H, W) = (patch * h, patch * w).

        Returns:
            (B, H, W), in the dtype of the head's weights, also under autocast.
        """
        for fused in self.fuse(taps):
            finest = fused  # the others are not kept
        return self.last(finest, size)[0]

    def fuse(self, taps: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields the coarsest layer and the refined maps from coarse to fine, (B, F, ., .), the last one at 8h x 8w."""
        layers = [
            self.scratch[f"layer{level}_rn"](resize(project(tap)))  # (B, C, h, w) -> (B, F, ~ 8h / 2^level, ...)
            for level, (tap, project, resize) in enumerate(
                zip(taps, self.projects, self.resize_layers, strict=True), start=1
            )
        ]
        one, two, three = (tuple(layer.shape[-2:]) for layer in layers[:3])
        yield (x := layers[3])
        yield (x := self.scratch["refinenet4"](x, None, size=three))
        yield (x := self.scratch["refinenet3"](x, layers[2], size=two))
        yield (x := self.scratch["refinenet2"](x, layers[1], size=one))
        yield self.scratch["refinenet1"](x, layers[0], size=(2 * one[0], 2 * one[1]))

    def last(self, fused: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`forward`'s map of the finest refined map, and (B, hidden, H, W) that the last convolution takes."""
        x = _resize(self.scratch["output_conv1"](fused), size)  # (B, F / 2, H, W)
        # A Sequential of these.
        conv, relu, last = cast(tuple[nn.Conv2d, nn.ReLU, nn.Conv2d], self.scratch["output_conv2"])
        x = relu(conv(x))  # (B, hidden, H, W)
        # bfloat16 would leave 8 bits to the map that labels and gradients are made of.
        with torch.autocast(x.device.type, enabled=False):
            values = ACTIVATIONS[self.activation](last(x.to(last.weight.dtype)))  # (B, 1, H, W)
        return values.squeeze(1), x


class FusionBlock(nn.Module):
    """Adds a skip map, refines, resizes (`FeatureFusionBlock` of the official util/blocks.py)."""

    def __init__(self, *, features: int, skip: bool):
        super().__init__()
        if skip:
            self.resConfUnit1 = ResidualConvUnit(features=features)
        self.resConfUnit2 = ResidualConvUnit(features=features)
        self.out_conv = nn.Conv2d(features, features, 1)

    def forward(self, x: Tensor, finer: Tensor | None, *, size: tuple[int, int]) -> Tensor:
        """(B, F, a, b), and (B, F, a, b) or None for the coarsest -> (B, F, *size)."""
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        return self.out_conv(_resize(self.resConfUnit2(x), size))


class ResidualConvUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), (B, F, a, b) -> (B, F, a, b)."""

    def __init__(self, *, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with align_corners=True, everywhere in this head."""
    return F.interpolate(x, size, mode="bilinear", align_corners=True)
