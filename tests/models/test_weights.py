"""Weight files: round trip, refusals, hash and the official layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from depthany.models.depth_model import DepthModel
from depthany.models.encoder import load_strictly
from depthany.models.weights import (
    from_official,
    load_weights,
    read_metadata,
    save_weights,
    weights_hash,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(tmp_path: Path, tiny: dict[str, Any], dtype: torch.dtype) -> None:
    model = DepthModel(**tiny).to(dtype)
    path = tmp_path / "model.safetensors"
    save_weights(model, path, metadata={"step": "7"})
    random_state = torch.get_rng_state()
    loaded, metadata = load_weights(path)
    assert torch.equal(random_state, torch.get_rng_state())
    assert metadata == read_metadata(path)
    assert metadata["step"] == "7"
    assert loaded.config() == model.config()
    assert weights_hash(loaded) == weights_hash(model)
    image = torch.randn(1, 3, 24, 40, dtype=dtype)
    assert_close(loaded(image), model(image), atol=0, rtol=0)
    assert all(p.requires_grad for p in loaded.parameters())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(DepthModel(**tiny), path, metadata={})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_weights(DepthModel(**tiny), path, metadata={})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_other_files_are_refused(tmp_path: Path, tiny: dict[str, Any]) -> None:
    model = DepthModel(**tiny)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    (tmp_path / "a.pth").rename(tmp_path / "renamed.safetensors")
    torch.save(model, tmp_path / "b.pth")
    for name in ("renamed.safetensors", "b.pth"):
        with pytest.raises(ValueError, match=r"not a \.safetensors file"):
            load_weights(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(tmp_path / "missing.safetensors")
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="not written by depthany"):
        load_weights(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="ending"):
        save_weights(model, tmp_path / "c.pth", metadata={})
    with pytest.raises(ValueError, match="reserved"):
        save_weights(model, tmp_path / "c.safetensors", metadata={"model": "x"})


def test_wrong_keys_are_listed(tmp_path: Path, tiny: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(DepthModel(**tiny), path, metadata={})
    state = load_file(path)
    del state["pretrained.norm.bias"], state["depth_head.projects.0.bias"]
    state["depth_head.other"] = torch.zeros(1)
    save_file(state, path, metadata=read_metadata(path))
    with pytest.raises(ValueError) as error:
        load_weights(path)
    for key in ("pretrained.norm.bias", "depth_head.projects.0.bias", "depth_head.other"):
        assert key in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": "hf-hub:someone/model"},
        {"encoder_arguments": {"checkpoint_path": "x.pth"}},
        {"surprise": 1},
    ],
)
def test_a_files_description_reaches_no_other_file(
    tmp_path: Path, tiny: dict[str, Any], change: dict[str, Any]
) -> None:
    model = DepthModel(**tiny)
    config = {"model": json.dumps(model.config() | change)}
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata=config)
    with pytest.raises(ValueError, match="cannot be built"):
        load_weights(tmp_path / "m.safetensors")


def test_hash_sees_every_bit_and_no_order() -> None:
    state = {"a": torch.randn(3, 4), "b": torch.tensor(2.0)}
    base = weights_hash(state)
    assert base == weights_hash(dict(reversed(state.items())))
    assert base == weights_hash({"a": state["a"].T.contiguous().T, "b": state["b"]})
    flipped = state["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others: list[dict[str, Tensor]] = [
        {**state, "a": flipped},
        {**state, "a": state["a"].reshape(4, 3)},
        {**state, "a": state["a"].view(torch.int32)},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
    ]
    assert len({base, *map(weights_hash, others)}) == 6


@pytest.mark.parametrize("wrapped", [False, True])
def test_official_layout_loads_strictly(tiny: dict[str, Any], wrapped: bool) -> None:
    model, other = DepthModel(**tiny), DepthModel(**tiny)
    official: dict[str, Any] = dict(model.state_dict())
    official["pretrained.mask_token"] = torch.zeros(1, 96)
    for conv in ("conv1", "conv2"):
        unit = f"depth_head.scratch.refinenet4.resConfUnit1.{conv}"
        official |= {f"{unit}.weight": torch.zeros(24, 24, 3, 3), f"{unit}.bias": torch.zeros(24)}
    if wrapped:  # as the official fine-tuning code saves it
        official = {"model": {f"module.{k}": v for k, v in official.items()}, "epoch": 3}
    load_strictly(other, from_official(official), source="official.pth")
    assert weights_hash(other) == weights_hash(model)


def test_official_giant_names() -> None:
    state = {f"pretrained.blocks.0.mlp.{name}.weight": torch.zeros(1) for name in ("w12", "w3")}
    assert set(from_official(state)) == {f"pretrained.blocks.0.mlp.fc{i}.weight" for i in (1, 2)}
