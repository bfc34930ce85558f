"""The metric head of Depth Anything V1: ZoeDepth's bins on the maps of the DPT head.

Legend: B batch, H W pixels, F features of the DPT head, N bins, E channels of a bin embedding.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BINS, EMBEDDING, ATTRACTORS = 64, 128, (16, 8, 4, 1)  # config_zoedepth.json
TEMPERATURES = (0.0212, 50.0)
STRENGTH = 300.0  # the code never passes the 1000 of its config on to the attractors
INPUT_SHAPE = (392, 518)  # h, w: to this every image is stretched, indoor and outdoor


class MetricBins(nn.Module):
    """Metres of every pixel: the mean of N bin centres, weighted by a binomial distribution.

    Seed centres at the coarsest map are drawn by attractors, map by map, and are unbounded (softplus). Names, shapes
    and arithmetic are those of metric_depth/zoedepth/models/zoedepth/zoedepth_v1.py and ../layers in
    github.com/LiheYoung/Depth-Anything, after ZoeDepth (arXiv:2302.12288), as config_zoedepth.json sets it up and as
    the README there runs both published models.

    Args:
        features: F of the DPT head.
        hidden: channels before its last convolution.
    """

    def __init__(self, *, features: int, hidden: int):
        super().__init__()
        self.conv2 = nn.Conv2d(features, features, 1)
        self.seed_bin_regressor = _mlp(features, 256, BINS, nn.Softplus())
        self.seed_projector = _mlp(features, EMBEDDING, EMBEDDING)
        self.projectors = nn.ModuleList(_mlp(features, EMBEDDING, EMBEDDING) for _ in ATTRACTORS)
        self.attractors = nn.ModuleList(_mlp(EMBEDDING, EMBEDDING, count, nn.Softplus()) for count in ATTRACTORS)
        self.conditional_log_binomial = _LogBinomial(hidden + 1 + EMBEDDING)

    def forward(self, disparity: Tensor, hidden: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Depth in metres (B, H, W), float32 also under autocast: the attractors square differences.

        Args:
            disparity: (B, H, W) of the DPT head.
            hidden: (B, hidden, H, W), what its last convolution takes.
            maps: five (B, F, ., .): the coarsest layer, and the refined maps from coarse to fine.
        """
        with torch.autocast(disparity.device.type, enabled=False):
            dtype = self.conv2.weight.dtype
            coarsest, *refined = (x.to(dtype) for x in maps)
            x = self.conv2(coarsest)
            centres, embedding = self.seed_bin_regressor(x), self.seed_projector(x)  # (B, N, ., .), (B, E, ., .)
            for x, project, attract in zip(refined, self.projectors, self.attractors, strict=True):
                before, embedding = embedding, project(x)
                points = attract(embedding + _resize(before, x))  # (B, A, ., .)
                centres = _resize(centres, x)
                centres = centres + _pull(points, centres)
            beside = torch.cat([hidden.to(dtype), disparity.to(dtype)[:, None], _resize(embedding, hidden)], dim=1)
            return (self.conditional_log_binomial(beside) * _resize(centres, hidden)).sum(1)


def _pull(points: Tensor, centres: Tensor) -> Tensor:
    """How far attractors (B, A, h, w) move bin centres (B, N, h, w): their mean of d / (1 + STRENGTH d^2)."""
    moved = torch.zeros_like(centres)
    for point in points.unbind(1):  # one at a time: A times the memory else
        distance = point[:, None] - centres
        moved = moved + distance / (1 + STRENGTH * distance * distance)
    return moved / points.shape[1]


class _LogBinomial(nn.Module):
    """Probabilities of N bins, (B, C, H, W) -> (B, N, H, W) (`ConditionalLogBinomial`, layers/dist_layers.py)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1), nn.GELU(), nn.Conv2d(channels // 2, 4, 1), nn.Softplus()
        )
        self.log_binomial_transform = nn.Module()  # two constants that the official files hold
        self.log_binomial_transform.register_buffer("k_idx", torch.arange(BINS).view(1, -1, 1, 1))
        self.log_binomial_transform.register_buffer("K_minus_1", torch.tensor([BINS - 1.0]).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        share, warmth = (pair / pair.sum(1, keepdim=True) for pair in (self.mlp(x) + 1e-4).chunk(2, dim=1))
        p, low, high = share[:, :1], *TEMPERATURES  # (B, 1, H, W)
        k = self.log_binomial_transform.get_buffer("k_idx").to(p.dtype)
        n, tiny = BINS - 1 + 1e-7, 1e-7
        k_ = k + tiny
        log_choose = n * math.log(n) - k_ * k_.log() - (n - k_) * (n - k_ + tiny).log()  # Stirling
        log_p, log_not_p = p.clamp_min(1e-4).log(), (1 - p).clamp_min(1e-4).log()
        scores = log_choose + k * log_p + (BINS - 1 - k) * log_not_p
        return torch.softmax(scores / ((high - low) * warmth[:, :1] + low), dim=1)


def _mlp(channels: int, inner: int, out: int, *last: nn.Module) -> nn.Module:
    """Two 1 x 1 convolutions under the official names `_net.0` and `_net.2`."""
    return _Net(nn.Sequential(nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, out, 1), *last))


class _Net(nn.Module):
    def __init__(self, net: nn.Sequential):
        super().__init__()
        self._net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._net(x)
        return y


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear with align_corners=True, to the size of another map."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)
