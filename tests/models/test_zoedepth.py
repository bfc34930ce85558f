"""Metric models of V1: read in every nesting, their arithmetic, and written as they were."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.testing import assert_close

from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.weights import load_weights, save_weights, weights_hash
from depthany.models.writers import to_hugging_face, to_official
from tests.layouts import SMALL_HEAD, official_state, zoedepth_state

HEAD = SMALL_HEAD | {"hidden": 32}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """What lies under "model" in the official file, with a small DPT head."""
    return zoedepth_state(official_state(**HEAD))


@pytest.fixture(scope="module")
def file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoedepth") / "depth_anything_metric_depth_indoor.pt"
    torch.save({"model": state, "optimizer": None, "epoch": 4}, path)
    return path


@pytest.fixture(scope="module")
def model(file: Path) -> DepthModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the taps are known: V1's
        made, metadata = load_weights(file)
    assert metadata["layout"] == "official V1" and metadata["copy"] == "model"
    return made.eval()


def test_what_the_file_says(model: DepthModel) -> None:
    assert model.space == "metric" and model.max_depth is None
    assert model.config()["taps"] == [8, 9, 10, 11]
    assert (model.input_shape, model.input_size) == ((392, 518), 392)


@torch.inference_mode()
def test_metres_are_those_of_transformers_head(model: DepthModel) -> None:
    """On the maps that the official code takes by hooks, named as there; bins and attractors are theirs."""
    pytest.importorskip("transformers", reason="pip install 'depthany[hf]'")
    from transformers import ZoeDepthConfig
    from transformers.models.zoedepth.modeling_zoedepth import ZoeDepthMetricDepthEstimationHead

    assert model.metric_head is not None
    config = ZoeDepthConfig(
        bottleneck_features=HEAD["features"],
        fusion_hidden_size=HEAD["features"],
        num_relative_features=32,
        bin_centers_type="softplus",
        attractor_kind="mean",
        num_attractors=[16, 8, 4, 1],
        min_temp=0.0212,
        max_temp=50.0,
        bin_configurations=[{"n_bins": 64, "min_depth": 1e-3, "max_depth": 10.0}],
    )
    theirs = ZoeDepthMetricDepthEstimationHead(config).eval()
    renamed = {
        k.replace("_net.0", "conv1").replace("_net.2", "conv2"): v for k, v in model.metric_head.named_parameters()
    }
    theirs.load_state_dict(renamed)
    seen: dict[str, Tensor] = {}
    layers = {"out_conv": model.depth_head.scratch["output_conv2"][1], "l4_rn": model.depth_head.scratch["layer4_rn"]}
    layers |= {f"r{n}": model.depth_head.scratch[f"refinenet{n}"] for n in (4, 3, 2, 1)}
    layers["rel"] = model.depth_head.scratch["output_conv2"][2]
    hooks = [
        layer.register_forward_hook(lambda _, __, value, name=name: seen.update({name: value}))
        for name, layer in layers.items()
    ]
    ours = model(torch.randn(2, 3, 42, 56))
    for hook in hooks:
        hook.remove()
    rel = seen["rel"].relu().squeeze(1)
    metres, _ = theirs(seen["out_conv"], seen["l4_rn"], [seen[f"r{n}"] for n in (4, 3, 2, 1)], rel)
    assert ours.std() > 1e-3  # not dead
    assert_close(ours, metres.squeeze(1), rtol=0, atol=1e-4 * ours.std().item())
    with torch.autocast("cpu", torch.bfloat16):  # the bins stay in float32
        assert model(torch.zeros(1, 3, 42, 56)).dtype == torch.float32


@torch.inference_mode()
def test_photos_are_stretched_to_one_shape(model: DepthModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthany.models.depth_model.INPUT_SHAPE", (84, 112))  # a smaller one, for speed
    photo = np.random.default_rng(0).integers(0, 256, (50, 120, 3), dtype=np.uint8)
    predictor = Predictor(model=model, device="cpu", precision="fp32")
    image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    metres = model((interpolate(image, (84, 112), mode="bilinear", align_corners=True) - mean) / std)
    metres = interpolate(metres[None], (50, 120), mode="bilinear", align_corners=True)[0, 0]
    depth = predictor.predict(photo)
    assert depth.space == "metric"
    assert_close(depth.values, metres.numpy(), rtol=1e-5, atol=1e-5)
    assert predictor.input_shape(50, 120, input_size=70) == (70, 168)  # asked for: the aspect ratio is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nesting_precision_and_both_layouts_keep_every_bit(
    state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    halved = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"model": {f"module.{key}": value for key, value in halved.items()}}, tmp_path / "x.pt")
    model, metadata = load_weights(tmp_path / "x.pt")
    unused = {
        k.removeprefix("core.core."): v for k, v in halved.items() if k.endswith("mask_token") or "4.resConfUnit1" in k
    }
    assert set(metadata["unused"].split(", ")) == set(unused)
    back = to_official(model, unused=unused)
    assert back.keys() == halved.keys()
    assert all(torch.equal(back[key], halved[key]) and back[key].dtype == halved[key].dtype for key in halved)
    save_weights(model, tmp_path / "x.safetensors", metadata={})
    again, _ = load_weights(tmp_path / "x.safetensors")
    assert weights_hash(again) == weights_hash(model) and again.config() == model.config()


def change(state: dict[str, Tensor], **new: Tensor | None) -> dict[str, Any]:
    return {key: value for key, value in (state | new).items() if value is not None}


def test_what_does_not_fit_is_listed_and_transformers_is_refused(
    state: dict[str, Tensor], model: DepthModel, tmp_path: Path
) -> None:
    wrong = {"conv2.bias": None, "attractors.0._net.2.bias": torch.zeros(32), "patch_transformer.x": torch.zeros(2)}
    torch.save({"model": change(state, **wrong)}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"missing \(1\): metric_head.conv2.bias.*patch_transformer.x.*wrong shape \(1\)"
    ):
        load_weights(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="metric_head=zoedepth, of Depth Anything V1"):
        to_hugging_face(model, unused={})
    with pytest.raises(ValueError, match="metric_head='bins'"):
        DepthModel(**model.config() | {"metric_head": "bins"})
