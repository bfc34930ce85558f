"""Weights out: what others would read is what they wrote, and a model that a layout cannot tell is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from depthany.models.depth_model import DepthModel
from depthany.models.layouts import OFFICIAL, Taps, describe, to_ours
from depthany.models.weights import load_weights
from depthany.models.writers import official_name, preprocessor_config, to_hugging_face, to_official
from tests.layouts import SIZES, SMALL_HEAD, TINY, hugging_face_state, official_shapes, official_state, write_config

UNUSED = ("pretrained.mask_token", "depth_head.scratch.refinenet4.resConfUnit1.")


def built(state: dict[str, Tensor], told: Taps | None) -> DepthModel:
    ours, _ = to_ours(state)
    with torch.device("meta"):  # no time for values that are replaced
        model = DepthModel(pretrained=False, **describe(ours, told=told, version="V2", source="x"))
    model.load_state_dict(ours, assign=True)
    return model.eval()


def unused_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key.startswith(UNUSED)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_official_in_and_out_is_the_same_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: value.to(dtype) for key, value in official_state(**SMALL_HEAD | {"hidden": 32}).items()}
    torch.save(state, tmp_path / "depth_anything_v2_vits.pth")
    model, _ = load_weights(tmp_path)
    assert official_name(model) == "depth_anything_v2_vits.pth"
    assert same(to_official(model, unused=unused_of(state)), state)
    without = to_official(model, unused={})
    assert {key: value.shape for key, value in without.items()} == {key: value.shape for key, value in state.items()}
    assert not any(without[key].any() for key in unused_of(state))


@pytest.mark.parametrize("gated", [0, 128])
def test_a_folder_for_transformers_has_the_published_names(gated: int) -> None:
    """Against a writer that was made from the published key tables, also for the giant's MLP."""
    state = official_state(**TINY, gated=gated)
    written, config = to_hugging_face(built(state, Taps([0, 1, 2, 3], 3)), unused=unused_of(state))
    assert same(written, hugging_face_state(state, transformers=4))
    assert config["backbone_config"]["use_swiglu_ffn"] == bool(gated)
    assert config["backbone_config"]["out_indices"] == [1, 2, 3, 4]


def test_the_giants_official_keys() -> None:
    """By shapes alone."""
    with torch.device("meta"):
        model = DepthModel(pretrained=False, **OFFICIAL["vitg"])
    state = to_official(model, unused={})
    assert {key: tuple(value.shape) for key, value in state.items()} == official_shapes(**SIZES["vitg"])
    assert sum(value.numel() for value in state.values()) == 1_258_132_225


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"activation": "softplus"}, "activation=softplus"),
        ({"pos_embed": "timm"}, "pos_embed=timm"),
        ({"encoder": "vit_small_patch14_reg4_dinov2"}, "reg_token"),
        ({"encoder": "vit_small_patch16_224", "input_size": 224}, "no pretrained.blocks.0.ls1.gamma"),
    ],
)
def test_what_a_layout_cannot_tell_is_refused(change: dict[str, Any], why: str) -> None:
    small = {"encoder_arguments": {"depth": 4}, "taps": [0, 1, 2, 3], "features": 8, "out_channels": [8] * 4}
    with torch.device("meta"):
        model = DepthModel(**OFFICIAL["vits"] | {"pretrained": False} | small | change)
    with pytest.raises(ValueError, match=f"{why}.*onnx and torchscript hold every model"):
        to_hugging_face(model, unused={})
    with pytest.raises(ValueError, match=why):
        to_official(model, unused={})


def test_metric_models_say_so() -> None:
    with torch.device("meta"):
        arguments = OFFICIAL["vits"] | {"activation": "sigmoid", "max_depth": 80.0, "pretrained": False}
        model = DepthModel(**arguments)
    _, config = to_hugging_face(model, unused={})
    assert (config["depth_estimation_type"], config["max_depth"]) == ("metric", 80.0)
    assert type(config["max_depth"]) is int  # transformers takes no other number
    assert official_name(model) == "depth_anything_v2_metric_vkitti_vits.pth"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vits", "vitb", "vitl"])
def test_transformers_gives_what_we_give(tmp_path: Path, name: str) -> None:
    """Random weights of sensible magnitude at 518 x 518, where transformers' position rule is the official one.

    The smallest through a folder; the others from memory, without gigabytes written and read.
    """
    from safetensors.torch import save_file
    from transformers import AutoImageProcessor, DepthAnythingConfig, DepthAnythingForDepthEstimation

    model = built(official_state(**SIZES[name]), None)
    state, config = to_hugging_face(model, unused={})
    source: dict[str, Any] = {"config": DepthAnythingConfig.from_dict(config), "state_dict": state}
    folder = None
    if name == "vits":
        folder, source = tmp_path / "hf", {}
        write_config(folder, config)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    theirs, report = DepthAnythingForDepthEstimation.from_pretrained(folder, output_loading_info=True, **source)
    assert not any(report.values()), report
    image = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, other = model(image), theirs.eval()(image).predicted_depth
    spread = ours.std().item()
    assert spread > 0.1  # the head is not dead
    assert_close(other, ours, rtol=0, atol=1e-4 * spread)
    if folder:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(model)))
        processor = AutoImageProcessor.from_pretrained(folder)
        pixels = processor(images=[torch.zeros(3, 480, 640, dtype=torch.uint8)], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 518, 686)
        with torch.inference_mode():  # a weight that is not the same shows
            theirs.head.conv3.weight += 0.01
            assert (theirs(image).predicted_depth - ours).abs().max() > 1e-4 * spread
