"""Weight files: our own round trip, every layout of others, strictness, refusals, and a hash."""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close

from depthany.models.depth_model import DepthModel
from depthany.models.layouts import OFFICIAL, describe, find_copy, hugging_face_names, to_ours
from depthany.models.weights import load_weights, read_metadata, save_weights, weights_hash
from tests.layouts import (
    SIZES,
    SMALL_HEAD,
    TINY,
    hugging_face_config,
    hugging_face_state,
    official_shapes,
    official_state,
    write_config,
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
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode  # for others to read, where the umask lets them


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
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):
        load_weights(tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match=r"b\.pth is not loaded: it holds depthany"):
        load_weights(tmp_path / "b.pth")
    with pytest.raises(ValueError, match="does not exist"):
        load_weights(tmp_path / "missing.safetensors")
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"4 blocks of 96 channels.*run folder"):
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


# --- layouts of others ------------------------------------------------------------------------------------------------


def without_unused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names: without what is never run, with timm's names of the giant's MLP."""
    unused = ("pretrained.mask_token", "depth_head.scratch.refinenet4.resConfUnit1")
    renamed = {key.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v for key, v in state.items()}
    return {key: value for key, value in renamed.items() if not key.startswith(unused)}


def same(model: DepthModel, state: Mapping[str, Tensor]) -> bool:
    """Whether a model holds exactly these weights, to the bit."""
    ours, theirs = model.state_dict(), without_unused(state)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """ViT-S under a small head, official layout: the encoder is recognised, the head's widths are read off."""
    return official_state(**SMALL_HEAD)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("version", ["V1", "V2"])
@pytest.mark.parametrize("layout", ["official", 4, 5])
def test_every_size_is_told_by_its_shapes(name: str, version: str, layout: str | int) -> None:
    """Encoder, widths and taps; V1's taps are the last four blocks. Shapes only, so the giant costs nothing."""
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in official_shapes(**SIZES[name]).items()}
        counted = sum(value.numel() for value in state.values())
        if isinstance(layout, int):
            state = hugging_face_state(state, transformers=layout)
        ours, unused = to_ours(state)
    config = describe(ours, told=None, version="V1" if version == "V1" else "V2", source="x")
    depth = SIZES[name]["depth"]
    taps = list(OFFICIAL[name]["taps"]) if version == "V2" else list(range(depth - 4, depth))
    expected = {"taps": taps, "out_channels": list(OFFICIAL[name]["out_channels"])}
    assert config == OFFICIAL[name] | expected
    with torch.device("meta"):
        model = DepthModel(pretrained=False, **config)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ours.items()}
    params = {"vits": 24_785_089, "vitb": 97_470_785, "vitl": 335_315_649, "vitg": 1_258_132_225}
    assert counted == params[name]  # of the official files
    assert len(unused) == 5


NESTINGS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "flat": lambda s: dict(s),
    "model of distributed training": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
    "state_dict of Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}, "global_step": 3},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "several": lambda s: {"checkpoint": {"state_dict": {f"module.model.{k}": v for k, v in s.items()}}},
    "beside an optimizer": lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "averaged copy": lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": {"module": s}},
    "averaged copy with a counter": lambda s: {
        "n_averaged": torch.tensor(7),
        **{f"module.{k}": v for k, v in s.items()},
    },
    "averaged copy by prefix": lambda s: {f"{a}.{k}": v + (a == "net") for k, v in s.items() for a in ("net", "ema")},
    "Lightning's averaging": lambda s: {
        "state_dict": {f"model.{k}": v for k, v in s.items()},
        "current_model_state": {f"model.{k}": v + 1 for k, v in s.items()},
    },
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("layout", ["official", "Hugging Face"])
def test_nesting_is_seen_through(nesting: str, layout: str) -> None:
    state = official_state(**TINY)
    stored = state if layout == "official" else hugging_face_state(state, transformers=4)
    copy = find_copy(NESTINGS[nesting](stored), source="x")
    assert not copy.beside
    ours, _ = to_ours(copy.state)
    expected = without_unused(state)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


def test_an_averaged_model_of_torch_is_read(tmp_path: Path, tiny: dict[str, Any]) -> None:
    averaged = AveragedModel(DepthModel(**tiny))
    averaged.update_parameters(DepthModel(**tiny))
    torch.save(averaged.state_dict(), tmp_path / "ema.pth")
    loaded, metadata = load_weights(tmp_path / "ema.pth", config=tiny)
    assert weights_hash(loaded) == weights_hash(averaged.module)
    assert metadata["copy"] == "module."


def test_two_models_in_one_file_are_not_chosen_between(small: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"several models, under student\., teacher\."):
        find_copy({f"{who}.{k}": v for who in ("student", "teacher") for k, v in small.items()}, source="x")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", "old"])
def test_official_files_load_to_the_bit(tmp_path: Path, small: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"depth_anything_v2_vits{'.pth' if suffix == 'old' else suffix}"
    if suffix == ".safetensors":
        save_file(small, path)
    else:
        torch.save(small, path, _use_new_zipfile_serialization=suffix != "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, metadata = load_weights(path)
    path.unlink()  # nothing of the file is needed any more
    assert same(model, small)
    assert model.config()["taps"] == [2, 5, 8, 11]
    assert metadata["layout"] == "official V2"
    assert metadata["unused"].split(", ")[-1] == "pretrained.mask_token"
    output = model(torch.randn(1, 3, 56, 70))
    assert output.shape == (1, 56, 70)
    assert output.std() > 0.01 * output.mean() > 0


@pytest.mark.parametrize(
    ("name", "taps", "warned"),
    [
        ("depth_anything_v2_vits.pth", [2, 5, 8, 11], False),
        ("depth_anything_vits14.pth", [8, 9, 10, 11], False),
        ("my-V1-small.pth", [8, 9, 10, 11], False),
        ("teacher.pth", [2, 5, 8, 11], True),
        ("conv2.pth", [2, 5, 8, 11], True),
        ("Depth-Anything-V2-Small/weights.pth", [2, 5, 8, 11], False),
        ("depth_anything_vits14/pytorch_model.bin", [8, 9, 10, 11], False),
    ],
)
def test_taps_go_by_the_name(
    tmp_path: Path, small: dict[str, Tensor], name: str, taps: list[int], warned: bool
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    torch.save({key: value.half() for key, value in small.items()}, path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, _ = load_weights(path)
    assert model.config()["taps"] == taps
    assert [("neither v1 nor v2" in str(w.message)) for w in said] == [True] * warned
    assert model.pretrained.pos_embed.dtype == torch.float16


FORMS = ["model.safetensors", "pytorch_model.bin", "in parts", "in memory", "single file"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated", [0, 96])
def test_hugging_face_folders_load_to_the_bit(tmp_path: Path, form: str, gated: int) -> None:
    """Transformers 4 (and the files of 5), the names that 5 has in memory, and SwiGLU as in the giant."""
    official = official_state(**TINY, gated=gated)
    write_config(tmp_path, hugging_face_config(width=48, depth=4, heads=3, taps=(0, 1, 2, 3)))
    state = hugging_face_state(official, transformers=5 if form == "in memory" else 4)
    path = tmp_path
    if form == "in parts":
        keys = sorted(state)
        parts = {"model-1-of-2.safetensors": keys[::2], "model-2-of-2.safetensors": keys[1::2]}
        for name, part in parts.items():
            save_file({key: state[key] for key in part}, tmp_path / name)
        where = {key: name for name, part in parts.items() for key in part}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    elif form == "model.safetensors":
        save_file(state, tmp_path / form, metadata={"format": "pt"})
    else:
        path = tmp_path / "any.pth" if form == "single file" else tmp_path
        torch.save(state, tmp_path / ("any.pth" if form == "single file" else "pytorch_model.bin"))
    model, metadata = load_weights(path)
    assert same(model, official)
    assert model.config()["taps"] == [0, 1, 2, 3]
    assert len(model.pretrained.blocks) == 4 and model.pretrained.blocks[0].attn.num_heads == 3
    assert metadata["layout"] == "Hugging Face"
    output = model(torch.randn(1, 3, 56, 70))
    assert output.std() > 0.01 * output.mean() > 0


def test_the_table_of_names_has_an_entry_for_every_module() -> None:
    """Both ways: what `from_hugging_face` reads, a writer can write; qkv alone is made of three."""
    state = official_state(**TINY)
    names = hugging_face_names(4)
    assert len(set(names.values())) == len(names)
    stems = {key if key in names else key.rpartition(".")[0] for key in state}
    assert {stem for stem in stems if stem not in names} == {f"pretrained.blocks.{i}.attn.qkv" for i in range(4)}
    written = {names.get(k) or f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}" for k in state if "qkv" not in k}
    assert written == {k for k in hugging_face_state(state, transformers=4) if "attention.attention" not in k}


@pytest.mark.parametrize("layout", ["official", "Hugging Face"])
def test_what_is_missing_or_left_over_is_listed(tmp_path: Path, small: dict[str, Tensor], layout: str) -> None:
    official = dict(small)
    missing = ["pretrained.blocks.3.norm1.bias", "depth_head.scratch.refinenet2.out_conv.weight"]
    for key in missing:
        del official[key]
    state = official if layout == "official" else hugging_face_state(official, transformers=4)
    state = {f"module.{k}": v for k, v in state.items()} | {"module.extra.weight": torch.zeros(2)}
    state |= {"module.pretrained.register_tokens": torch.zeros(1), "other": torch.zeros(3), "steps": torch.tensor(3)}
    torch.save({"model": state}, tmp_path / "v2.pth")
    with pytest.raises(ValueError) as error:
        load_weights(tmp_path / "v2.pth")
    left_over = ["module.extra.weight", "pretrained.register_tokens", "other"]
    for words in [*missing, *left_over, "missing (2)", "unexpected (3)"]:
        assert words in str(error.value)
    del state[
        "module.pretrained.pos_embed" if layout == "official" else "module.backbone.embeddings.position_embeddings"
    ]
    torch.save({"model": state}, tmp_path / "v2.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): pretrained\.pos_embed"):
        load_weights(tmp_path / "v2.pth")


def test_metric_models_of_v2_give_metres(tmp_path: Path, small: dict[str, Tensor]) -> None:
    """max_depth * sigmoid, by the file's name or the config; the same keys without either are a relative model."""
    files = {
        "depth_anything_v2_metric_hypersim_vits.pth": 20.0,
        "Depth-Anything-V2-Metric-VKITTI-Small/pytorch_model.bin": 80.0,
        "hf": 42.0,
        "latest-vkitti.pth": 80.0,
        "asymmetric_v2_hypersim.pth": None,
    }
    for name in list(files)[:2] + list(files)[4:]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(small, tmp_path / name)
    torch.save({"model": small, "previous_best": {"d1": 0.9, "silog": 0.1}}, tmp_path / "latest-vkitti.pth")
    config = hugging_face_config(width=384, depth=12, heads=6, taps=(2, 5, 8, 11), depth_estimation_type="metric")
    write_config(tmp_path / "hf", config | {"max_depth": 42})
    save_file(hugging_face_state(small, transformers=4), tmp_path / "hf" / "model.safetensors")
    image = torch.randn(1, 3, 28, 42)
    before: list[Tensor] = []  # what the last activation gets
    for name, max_depth in files.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, _ = load_weights(tmp_path / name)
        assert same(model, small)
        assert model.max_depth == max_depth and model.space == ("metric" if max_depth else "disparity")
        model.depth_head.scratch["output_conv2"][2].register_forward_hook(lambda *args: before.append(args[2][:, 0]))
        output = model(image)
        expected = max_depth / (1 + (-before[-1]).exp()) if max_depth else before[-1].clamp(min=0)
        assert_close(output, expected)
        save_weights(model, tmp_path / "ours.safetensors", metadata={})
        again, _ = load_weights(tmp_path / "ours.safetensors")
        assert torch.equal(again(image), output) and again.config() == model.config()


def test_metric_models_that_cannot_be_used_are_told(tmp_path: Path, small: dict[str, Tensor]) -> None:
    torch.save({"model": small, "previous_best": {"d1": 0.9, "silog": 0.1}}, tmp_path / "latest.pth")
    torch.save(small, tmp_path / "depth_anything_v2_metric_vits.pth")
    told = {
        "latest.pth": r"put hypersim \(20 m\) or vkitti \(80 m\) into it",
        "depth_anything_v2_metric_vits.pth": "does not say up to which depth",
    }
    for name, words in told.items():
        with pytest.raises(ValueError, match=words), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_patch14_reg4_dinov2"])
def test_encoders_of_other_families_round_trip(tmp_path: Path, tiny: dict[str, Any], name: str) -> None:
    """What their files do not hold, rotary periods and buffers, is there again."""
    arguments = {"embed_dim": 48, "num_heads": 3, "depth": 4}
    model = DepthModel(
        **tiny | {"encoder": name, "encoder_arguments": arguments, "input_size": 224, "pos_embed": "auto"}
    )
    save_weights(model, tmp_path / "m.safetensors", metadata={})
    loaded, _ = load_weights(tmp_path / "m.safetensors")
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert loaded.config() == model.config() and loaded.config()["pos_embed"] == "timm"
    image = torch.randn(1, 3, 3 * model.patch_size, 5 * model.patch_size)
    assert_close(loaded(image), model(image), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "dpt"}, "model_type.*dpt"),
        (
            {"backbone_config": {"model_type": "dinov2", "out_indices": [1, 2, 3, 4], "apply_layernorm": False}},
            "layernorm",
        ),
        ({"reassemble_factors": [4, 2, 1, 1]}, "reassemble_factors"),
        ({"backbone_config": {"model_type": "dinov2"}}, "out_features"),
        ({"backbone_config": {"out_indices": [1, 2, 3, 9], "num_attention_heads": 3}}, "taps"),
        ({"backbone_config": {"out_indices": [1, 2, 3, 4], "num_attention_heads": 5}}, "cannot be built"),
        ({"backbone_config": {"out_indices": "1;2", "num_attention_heads": "many"}}, "no config"),
        ([], "no config"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    config = hugging_face_config(width=48, depth=4, heads=3, taps=(0, 1, 2, 3))
    write_config(tmp_path, config | change if isinstance(change, dict) else change)
    save_file(hugging_face_state(official_state(**TINY), transformers=4), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        load_weights(tmp_path)


class Evil:
    """What a malicious file holds: loading it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


def test_no_file_is_executed(tmp_path: Path, small: dict[str, Tensor]) -> None:
    evil = Evil(tmp_path / "canary")
    torch.save({"model": small, "args": evil}, tmp_path / "evil.pth")
    torch.save({"model": evil}, tmp_path / "pytorch_model.bin")
    torch.save(evil, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(evil))
    whole = (tmp_path / "evil.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1")
    torch.save(torch.jit.script(torch.nn.Linear(2, 2)).state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../evil.pth"}}))
    told = {
        "evil.pth": r"it holds posix\.mkdir, which is no plain data",
        "pytorch_model.bin": r"it holds posix\.mkdir",
        "old.pth": r"it holds posix\.mkdir",
        "raw.pth": "no whole weight file",
        "torn.pth": "no whole weight file",
        "empty.pth": "0 bytes",
        "pointer.pth": "git-lfs",
        "other.pth": "no depth model in a known layout.*bias, weight",
        "list.pth": "holds a list",
        "x.safetensors.index.json": "outside its folder",
        "none.pth": "does not exist",
    }
    for name, words in told.items():
        with pytest.raises(ValueError, match=words) as error:
            load_weights(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1 and name in str(error.value)
    assert not (tmp_path / "canary").exists()
    pickle.loads(pickle.dumps(evil))  # it would have worked
    assert (tmp_path / "canary").exists()


def test_an_encoder_alone_is_told_its_place(tmp_path: Path, small: dict[str, Tensor]) -> None:
    encoder = {k.removeprefix("pretrained."): v for k, v in small.items() if k.startswith("pretrained.")}
    torch.save(encoder, tmp_path / "dinov2_vits14_pretrain.pth")
    with pytest.raises(ValueError, match=r"encoder without a depth head.*model\.pretrained=FILE"):
        load_weights(tmp_path / "dinov2_vits14_pretrain.pth")


# --- transformers as writer and oracle --------------------------------------------------------------------------------


def transformers_model(name: str, folder: Path, *, sharded: bool = False, grid: int = 0) -> Any:
    """A random model of transformers, with a head that is not dead, saved by it; with a grid, in half precision."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra hf")
    size = SIZES.get(name, TINY)
    taps = OFFICIAL[name]["taps"] if name in OFFICIAL else (0, 1, 2, 3)
    backbone = transformers.Dinov2Config(
        image_size=(grid or size.get("grid", 37)) * 14,
        hidden_size=size["width"],
        num_hidden_layers=size["depth"],
        num_attention_heads=max(size["width"] // 64, 3),
        out_indices=[tap + 1 for tap in taps],
        use_swiglu_ffn=name == "gated",
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=size["width"],
        neck_hidden_sizes=list(size["out_channels"]),
        fusion_hidden_size=size["features"],
    )
    with torch.device("meta"):  # its own initialisation takes long, and lets next to nothing through to the head
        model = transformers.DepthAnythingForDepthEstimation(config).eval()
    model.to_empty(device="cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = (3 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.uniform_(-spread, spread)
            if parameter.ndim == 1 and not key.endswith("bias"):  # of norms and layer scales
                parameter.add_(1)
        model.head.conv3.weight.abs_()
        model.head.conv3.bias.fill_(0.1)
    model = model.half() if grid else model
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if sharded else {}))
    return model.float()


def agrees(theirs: Any, ours: DepthModel, *, size: int) -> None:
    """To 1e-4 of the output's standard deviation."""
    torch.manual_seed(2)
    image = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected, output = theirs(pixel_values=image).predicted_depth, ours.eval()(image)
    assert expected.std() > 0.01 * expected.mean() > 0
    assert (output - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", ["tiny", "gated"])
def test_transformers_files_and_memory_agree(tmp_path: Path, name: str) -> None:
    theirs = transformers_model(name, tmp_path / "folder")
    transformers_model(name, tmp_path / "parts", sharded=True)
    (tmp_path / "memory").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "memory" / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path / "memory")
    hashes = set()
    for folder in ("folder", "parts", "memory"):
        ours, _ = load_weights(tmp_path / folder)
        agrees(theirs, ours, size=56)
        hashes.add(weights_hash(ours))
    assert len(hashes) == 1
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1


@pytest.mark.slow
def test_transformers_agrees_at_518(tmp_path: Path) -> None:
    theirs = transformers_model("vits", tmp_path)
    ours, _ = load_weights(tmp_path)
    assert ours.config() == official_config("vits")
    agrees(theirs, ours, size=518)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vitb", "vitl"])
def test_transformers_agrees_on_larger_models(tmp_path: Path, name: str) -> None:
    """In half precision, and on a grid of 10 x 10, for the sake of time; 518 x 518 agrees too."""
    theirs = transformers_model(name, tmp_path, grid=10)
    ours, _ = load_weights(tmp_path)
    assert ours.pretrained.pos_embed.dtype == torch.float16
    arguments = ours.config()["encoder_arguments"]
    assert (arguments["img_size"], arguments["embed_dim"]) == (140, SIZES[name]["width"])
    assert ours.config() == official_config(name) | {"encoder_arguments": arguments, "input_size": 140}
    agrees(theirs, ours.float(), size=140)


def official_config(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        return DepthModel(pretrained=False, **OFFICIAL[name]).config()


def test_half_precision_of_encoders_with_a_split_bias(tmp_path: Path) -> None:
    """The zeros that stand for the keys' bias are in no file: they follow the weights."""
    options: dict[str, Any] = {
        "encoder": "vit_small_patch16_dinov3_qkvb",
        "encoder_arguments": {"depth": 4},
        "taps": [0, 1, 2, 3],
    }
    options |= {"pos_embed": "auto", "features": 4, "out_channels": [4] * 4, "hidden": 4, "activation": "relu"}
    model = DepthModel(**options, input_size=224, pretrained=False, max_depth=None)
    save_weights(model.bfloat16(), tmp_path / "m.safetensors", metadata={})
    back, _ = load_weights(tmp_path / "m.safetensors")
    assert back(torch.ones(1, 3, 32, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
