"""Sizes, shapes, gradients and parameter groups of the whole model."""

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from depthany.models.depth_model import DepthModel
from depthany.models.layouts import OFFICIAL

COUNTS = {  # name: (encoder, head, state-dict entries) of the official models
    "vits": (22_056_576, 2_728_513, 239),
    "vitb": (86_580_480, 10_890_305, 239),
    "vitl": (304_368_640, 30_947_009, 407),
    "vitg": (1_136_480_768, 121_651_457, 631),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_official_ones_less_what_is_never_run(name: str) -> None:
    with torch.device("meta"):
        model = DepthModel(pretrained=False, **OFFICIAL[name])
    encoder, head, entries = COUNTS[name]
    mask_token = model.pretrained.channels
    features = OFFICIAL[name]["features"]
    unused_unit = 2 * (9 * features**2 + features)
    assert sum(p.numel() for p in model.encoder_parameters()) + mask_token == encoder
    assert sum(p.numel() for p in model.head_parameters()) + unused_unit == head
    assert len(model.state_dict()) + 1 + 4 == entries
    assert model.patch_size == 14


@pytest.mark.parametrize("size", [(56, 56), (8, 24), (40, 56), (72, 8)])
def test_output_has_the_size_of_the_image(tiny: dict[str, Any], size: tuple[int, int]) -> None:
    model = DepthModel(**tiny)
    image = torch.randn(2, 3, *size)
    output = model.outputs(image)
    assert output.disparity.shape == (2, *size)
    assert output.features.shape == (2, 96, size[0] // 8, size[1] // 8)
    assert_close(model(image), output.disparity, atol=0, rtol=0)
    assert_close(output.features, model.pretrained(image)[-1], atol=0, rtol=0)


def test_images_of_a_batch_do_not_meet(tiny: dict[str, Any]) -> None:
    model = DepthModel(**tiny)
    image = torch.randn(3, 3, 24, 40)
    assert_close(model(image)[1:2], model(image[1:2]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["tiny", "tiny softplus", "vits"])
def test_every_parameter_gets_a_gradient(tiny: dict[str, Any], name: str) -> None:
    if name == "vits":
        model = DepthModel(pretrained=False, **OFFICIAL["vits"])
    else:
        model = DepthModel(**tiny | {"activation": name.partition(" ")[2] or "relu"})
    y = model(torch.randn(2, 3, 2 * model.patch_size, 3 * model.patch_size))
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.requires_grad for p in model.parameters())
    unused = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


def test_groups_partition_the_parameters(tiny: dict[str, Any]) -> None:
    model = DepthModel(**tiny)
    groups = [*model.encoder_parameters(), *model.head_parameters()]
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()}
    assert len(groups) == len(list(model.parameters()))


def test_config_rebuilds_the_model(tiny: dict[str, Any]) -> None:
    model = DepthModel(**tiny)
    config = json.loads(json.dumps(model.config()))
    other = DepthModel(**config)
    assert config["pretrained"] is False
    assert other.config() == model.config()
    other.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 16, 24)
    assert_close(other(image), model(image), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"input_size": 60}, "input_size=60"), ({"taps": (1, 2, 3)}, "four")],
)
def test_unsuited_arguments_are_named(tiny: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DepthModel(**tiny | changes)
