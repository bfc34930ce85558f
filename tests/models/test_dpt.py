"""The head against a plain reference, and alive at every seed."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from depthany.models.dpt import DPTHead


def build(**changes: Any) -> DPTHead:
    """A small head."""
    arguments: dict[str, Any] = {
        "in_channels": 12,
        "features": 8,
        "out_channels": (6, 8, 10, 12),
        "hidden": 32,
        "activation": "relu",
    }
    return DPTHead(**{**arguments, **changes})


def reference(state: dict[str, Tensor], taps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The published forward pass as functions on the official names."""

    def conv(name: str, x: Tensor, **kwargs: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **kwargs)

    def up(name: str, x: Tensor, stride: int) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.conv_transpose2d(x, weight, bias, stride=stride)

    def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=True)

    def residual(name: str, x: Tensor) -> Tensor:
        y = conv(f"{name}.conv1", x.clamp(min=0), padding=1)
        return conv(f"{name}.conv2", y.clamp(min=0), padding=1) + x

    maps = [conv(f"projects.{i}", tap) for i, tap in enumerate(taps)]
    maps[0] = up("resize_layers.0", maps[0], 4)
    maps[1] = up("resize_layers.1", maps[1], 2)
    maps[3] = conv("resize_layers.3", maps[3], stride=2, padding=1)
    layers = [conv(f"scratch.layer{i + 1}_rn", x, padding=1) for i, x in enumerate(maps)]
    path = layers[3]
    for level in (4, 3, 2, 1):
        name = f"scratch.refinenet{level}"
        if level < 4:
            path = path + residual(f"{name}.resConfUnit1", layers[level - 1])
        path = residual(f"{name}.resConfUnit2", path)
        h, w = (2 * s for s in path.shape[-2:]) if level == 1 else layers[level - 2].shape[-2:]
        path = conv(f"{name}.out_conv", bilinear(path, (h, w)))
    x = bilinear(conv("scratch.output_conv1", path, padding=1), size)
    x = conv("scratch.output_conv2.0", x, padding=1).clamp(min=0)
    return conv("scratch.output_conv2.2", x).clamp(min=0)[:, 0]


@pytest.mark.parametrize(("h", "w"), [(4, 4), (3, 7), (2, 1)])
def test_head_equals_the_reference(h: int, w: int) -> None:
    head = build().double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.constant_(head.scratch["output_conv2"][2].bias, 1.0)
    taps = [torch.randn(2, 12, h, w, dtype=torch.float64) for _ in range(4)]
    expected = reference(head.state_dict(), taps, (14 * h, 14 * w))
    assert expected.std() > 0
    assert_close(head(taps, (14 * h, 14 * w)), expected, atol=1e-10, rtol=1e-10)


def test_names_and_shapes_are_the_official_ones() -> None:
    head = DPTHead(
        in_channels=384,
        features=64,
        out_channels=(48, 96, 192, 384),
        hidden=32,
        activation="relu",
    )
    expected: dict[str, tuple[int, ...]] = {}
    for i, o in enumerate((48, 96, 192, 384)):
        expected |= {f"projects.{i}.weight": (o, 384, 1, 1), f"projects.{i}.bias": (o,)}
        expected[f"scratch.layer{i + 1}_rn.weight"] = (64, o, 3, 3)
    for i, o, k in ((0, 48, 4), (1, 96, 2), (3, 384, 3)):
        expected |= {f"resize_layers.{i}.weight": (o, o, k, k), f"resize_layers.{i}.bias": (o,)}
    for n in range(1, 5):
        name = f"scratch.refinenet{n}"
        expected |= {f"{name}.out_conv.weight": (64, 64, 1, 1), f"{name}.out_conv.bias": (64,)}
        for unit in (1, 2) if n < 4 else (2,):
            for c in (1, 2):
                expected[f"{name}.resConfUnit{unit}.conv{c}.weight"] = (64, 64, 3, 3)
                expected[f"{name}.resConfUnit{unit}.conv{c}.bias"] = (64,)
    for name, o, i, k in (("1", 32, 64, 3), ("2.0", 32, 32, 3), ("2.2", 1, 32, 1)):
        expected[f"scratch.output_conv{name}.weight"] = (o, i, k, k)
        expected[f"scratch.output_conv{name}.bias"] = (o,)
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == expected


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_no_seed_gives_a_dead_head(activation: str) -> None:
    """The official class is identically zero, with no gradient, for half of all seeds."""
    for seed in range(30):
        torch.manual_seed(seed)
        head = build(activation=activation)
        taps = [F.layer_norm(torch.randn(1, 3, 4, 12), (12,)).movedim(-1, 1) for _ in range(4)]
        y = head(taps, (21, 28))
        assert y.std() > 1e-4, seed
        assert (y > 0).float().mean() > 0.9, seed
        (y * torch.randn_like(y)).sum().backward()
        dead = [n for n, p in head.named_parameters() if not p.grad.abs().max() > 0]
        assert not dead, (seed, dead)


def test_output_keeps_float32_under_autocast() -> None:
    head, taps = build(), [torch.randn(1, 12, 3, 4) for _ in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = head(taps, (21, 28))
    assert y.dtype == torch.float32
    assert_close(y, head(taps, (21, 28)), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "gelu"}, "softplus"),
        ({"features": 7}, "even"),
        ({"out_channels": (1, 2)}, "four"),
    ],
)
def test_unsuited_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**changes)
