"""Weight files of every layout: what lies in them, and the same weights under our names, which are the official ones.

Nothing in a file is executed: safetensors, JSON, or torch files with tensors and plain containers only.

Legend: D encoder width.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from depthany.models.zoedepth import INPUT_SHAPE

FILES = (  # of a model folder, by preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Stored by the official code and by transformers, never run, and not in our models: the only keys that are let go.
UNUSED = ("pretrained.mask_token", "depth_head.scratch.refinenet4.resConfUnit1.")


def _official(encoder: str, taps: tuple[int, ...], features: int, out_channels: tuple[int, ...]) -> dict[str, Any]:
    return {
        "encoder": encoder,
        "taps": taps,
        "pos_embed": "official",
        "encoder_arguments": {},
        "features": features,
        "out_channels": out_channels,
        "hidden": 32,
        "activation": "relu",
        "input_size": 518,
    }


# Arguments of DepthModel, less `pretrained`, for the V2 models (depth_anything_v2/dpt.py in
# github.com/DepthAnything/Depth-Anything-V2). V1 files have the same keys, but tap the last four blocks.
OFFICIAL: dict[str, dict[str, Any]] = {
    "vits": _official("vit_small_patch14_dinov2", (2, 5, 8, 11), 64, (48, 96, 192, 384)),
    "vitb": _official("vit_base_patch14_dinov2", (2, 5, 8, 11), 128, (96, 192, 384, 768)),
    "vitl": _official("vit_large_patch14_dinov2", (4, 11, 17, 23), 256, (256, 512, 1024, 1024)),
    "vitg": _official("vit_giant_patch14_dinov2", (9, 19, 29, 39), 384, (1536, 1536, 1536, 1536)),
}
# D: the name, blocks and rows of the first MLP layer of the four encoders; a head is 64 wide in each.
ENCODERS = {384: ("vits", 12, 1536), 768: ("vitb", 12, 3072), 1024: ("vitl", 24, 4096), 1536: ("vitg", 40, 8192)}


def weight_file(folder: Path) -> Path:
    """The weight file of a folder: one of `FILES`, or the only file that ends in one of `SUFFIXES`.

    Raises:
        ValueError: none, or several.
    """
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    if len(files) != 1:
        raise ValueError(f"folder {folder} holds {len(files)} weight files {[p.name for p in files]}: name one")
    return files[0]


def read_plain(file: Path) -> dict[str, Any]:
    """The content of a weight file, or of the files that a `*.index.json` lists; runs nothing of it.

    Raises:
        ValueError: no such file, another format, or content that loading would have to run.
    """
    if not file.is_file():
        raise ValueError(f"weight file {file} does not exist")
    if file.name.endswith(".index.json"):
        try:
            names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file} is no index of weight files: {error!r}") from error
        if strange := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{file} names files outside its folder: {strange}")
        return {key: value for name in names for key, value in read_plain(file.with_name(name)).items()}
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a .safetensors file ({error})") from error
    try:
        content = _torch_load(file)
    except Exception as error:  # a torn file raises anything
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{file} is not loaded: it holds {found[1]}, which is no plain data and could run code. If you trust "
                "it, open it where it was made and save its state dict alone"
            ) from error
        with open(file, "rb") as torn:
            begin = torn.read(24)
        raise ValueError(
            f"{file} is no whole weight file: neither .safetensors nor torch's with tensors and plain containers only; "
            f"{file.stat().st_size} bytes, beginning with {begin!r}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, no state dict (names -> tensors)")
    return content


def _torch_load(file: Path) -> Any:
    """Maps the file into memory where torch can, so that optimizer states beside the weights cost nothing."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(file, map_location="cpu", weights_only=True)  # a file of before torch 1.6


class Copy(NamedTuple):
    """A depth model's state dict inside a file: where it lies there, and what lies beside it unaccounted for."""

    where: str  # for example "state_dict: model."
    state: dict[str, Tensor]  # keys begin with pretrained. and depth_head., or with backbone., neck. and head.
    beside: list[str]


# Nesting, and a part of a model.
_ROOT = re.compile(r"((?:[^.]+\.)*?)(pretrained|depth_head|metric_head|backbone|neck|head)\.")
_CORE = re.compile(r"((?:[^.]+\.)*?)core\.core\.")
_BINS = re.compile(
    r"((?:[^.]+\.)*?)(conv2|seed_bin_regressor|seed_projector|projectors|attractors|conditional_log_binomial)\."
)


def find_copy(content: Mapping[str, Any], *, source: str) -> Copy:
    """The depth model in a file's content, under any wrapper (`{"model": ...}`) and any prefix (`module.`, `model.`).

    Of several copies the averaged one (ema) is taken, and Lightning's `state_dict` rather than `current_model_state`.
    One-element integer tensors (`n_averaged`) are counters, not weights.

    Raises:
        ValueError: none, or several; the message says what was found instead.
    """
    copies: list[Copy] = []
    loose: list[str] = []
    for name, entries in _mappings(content):
        entries = _from_zoedepth(entries)
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in entries.items():
            match = _ROOT.match(key)
            if not isinstance(value, Tensor) or (value.numel() == 1 and not value.is_floating_point()):
                continue
            groups[match[1] if match else ""][key[len(match[1]) :] if match else key] = value
        whole = {prefix: state for prefix, state in groups.items() if _is_whole(state)}
        beside = [prefix + key for prefix, state in groups.items() if prefix not in whole for key in state]
        copies += [Copy(f"{name}: {p}".strip(": "), state, beside) for p, state in whole.items()]
        loose += beside
    averaged = [copy for copy in copies if {"ema", "averaged"} & set(re.split(r"[^a-z]+", copy.where.lower()))]
    found = averaged or [copy for copy in copies if not copy.where.startswith("current_model_state")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source} holds several models, under {', '.join(c.where for c in found)}: save one alone")
    if any(key.endswith(("pos_embed", "position_embeddings")) for key in loose):
        raise ValueError(
            f"{source} holds an encoder without a depth head: a model starts from it by model.pretrained=FILE"
        )
    roots = sorted({key.partition(".")[0] for key in loose})
    raise ValueError(
        f"{source} holds no depth model in a known layout (depthany, official Depth Anything V1 or V2, "
        f"DepthAnythingForDepthEstimation of transformers); its names begin with: {', '.join(roots[:8]) or 'nothing'}"
    )


_PATCHES = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")  # timm's and DINOv2's; theirs


def find_encoder(content: Mapping[str, Any], *, source: str) -> dict[str, Tensor]:
    """The ViT in a file's content, under any wrapper and prefix: an encoder's own file, or a part of a larger model.

    Of several the averaged one is taken (DINOv2's training calls it teacher). Names of transformers become DINOv2's.
    What is recognised by neither name is handed on as it lies there, for timm to know.

    Raises:
        ValueError: no state dict, or several encoders.
    """
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, entries in _mappings(content):
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        whole = whole or {key.removeprefix("module."): value for key, value in tensors.items()}
        for key in tensors:
            if suffix := next((patches for patches in _PATCHES if key.endswith(patches)), None):
                prefix = key.removesuffix(suffix)
                place = f"{name}: {prefix}".strip(": ")
                found[place] = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if not whole:
        raise ValueError(f"{source} holds no state dict (names -> tensors)")
    averaged = [place for place in found if {"ema", "averaged", "teacher"} & set(re.split(r"[^a-z]+", place.lower()))]
    places = averaged or [place for place in found if not place.startswith("current_model_state")]
    if len(places) > 1:
        raise ValueError(f"{source} holds several encoders, under {', '.join(places)}: save one alone")
    state = found[places[0]] if places else whole
    if _PATCHES[1] in state:
        state = from_hugging_face({f"backbone.{key}": value for key, value in state.items()})
        state = {key.removeprefix("pretrained.").removeprefix("backbone."): value for key, value in state.items()}
    return state


def _mappings(content: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping in a file's content that has tensors, with its place; optimizers have none by name."""
    if any(isinstance(value, Tensor) and isinstance(key, str) for key, value in content.items()):
        yield ".".join(path), {key: value for key, value in content.items() if isinstance(key, str)}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and len(path) < 3:
            yield from _mappings(value, (*path, key))


def _from_zoedepth(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metric models of V1 under our names: the relative model lies in `core.core`, its bins beside that."""
    if not any(map(_CORE.match, entries)):
        return entries
    return {
        _CORE.sub(r"\1", key, count=1) if _CORE.match(key) else _BINS.sub(r"\1metric_head.\2.", key, count=1): value
        for key, value in entries.items()
    }


def is_zoedepth(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict under our names is that of a metric model of V1."""
    return any(key.startswith("metric_head.") for key in state)


def _is_whole(state: Mapping[str, Tensor]) -> bool:
    roots = {key.partition(".")[0] for key in state}
    return bool(roots & {"pretrained", "backbone"}) and bool(roots & {"depth_head", "neck"})


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of transformers."""
    return any(key.startswith(("backbone.", "neck.")) for key in state)


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict under our names, and the keys of `UNUSED` that it had.

    What is known by neither name stays as it is, so that a strict load sees it.
    """
    state = from_hugging_face(state) if is_hugging_face(state) else state
    kept = {key: value for key, value in state.items() if not key.startswith(UNUSED)}
    return rename_swiglu(kept), sorted(state.keys() - kept.keys())


def rename_swiglu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's giant MLP (`w12`, `w3`) under timm's names (`fc1`, `fc2`).

    Both compute `fc2(silu(a) * b)` with `a, b` the first and second half of `fc1`'s rows (DINOv2
    layers/swiglu_ffn.py; timm `SwiGLUPacked`, gate_last=False), so no rows move.
    """
    return {k.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for k, v in state.items()}


def hugging_face_names(depth: int) -> dict[str, str]:
    """The names of `DepthAnythingForDepthEstimation` (transformers 4, and every published file), by ours.

    Names of modules without their `.weight` or `.bias`, and of bare parameters. `attn.qkv` is missing: transformers
    keeps its rows in three parts (`from_hugging_face`).

    Args:
        depth: blocks of the encoder.
    """
    names = {f"pretrained.{ours}": f"backbone.{theirs}" for ours, theirs in _ENCODER.items()}
    for i in range(depth):
        ours, theirs = f"pretrained.blocks.{i}", f"backbone.encoder.layer.{i}"
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in _BLOCK.items()}
    for i in range(4):
        names[f"depth_head.projects.{i}"] = f"neck.reassemble_stage.layers.{i}.projection"
        names[f"depth_head.resize_layers.{i}"] = f"neck.reassemble_stage.layers.{i}.resize"
        names[f"depth_head.scratch.layer{i + 1}_rn"] = f"neck.convs.{i}"
        ours, theirs = f"depth_head.scratch.refinenet{4 - i}", f"neck.fusion_stage.layers.{i}"
        names[f"{ours}.out_conv"] = f"{theirs}.projection"
        for unit in (1, 2):
            for conv in (1, 2):
                place = f"{theirs}.residual_layer{unit}.convolution{conv}"
                names[f"{ours}.resConfUnit{unit}.conv{conv}"] = place
    for ours, theirs in {"output_conv1": "conv1", "output_conv2.0": "conv2", "output_conv2.2": "conv3"}.items():
        names[f"depth_head.scratch.{ours}"] = f"head.{theirs}"
    return names


_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
# Names that transformers 5 has in memory, and those of its files and of transformers 4.
_FIVE_TO_FOUR = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.down_proj.": ".mlp.weights_out.",
}


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `DepthAnythingForDepthEstimation` (transformers 4 or 5) under the official names.

    The rows of query, key and value become one `qkv`; those of `gate_proj` and `up_proj` (giant) one `w12`.
    """
    state = dict(state)
    for key in list(state):
        for five, four in _FIVE_TO_FOUR.items():
            if five in key:
                state[key.replace(five, four)] = state.pop(key)
    depth = _depth(state, "backbone.encoder.layer.")
    for i in range(depth):
        block = f"backbone.encoder.layer.{i}"
        for leaf in ("weight", "bias"):
            qkv = [f"{block}.attention.attention.{part}.{leaf}" for part in ("query", "key", "value")]
            _merge(state, qkv, f"pretrained.blocks.{i}.attn.qkv.{leaf}")
            gated = [f"{block}.mlp.{part}.{leaf}" for part in ("gate_proj", "up_proj")]
            _merge(state, gated, f"pretrained.blocks.{i}.mlp.w12.{leaf}")
    ours = {theirs: name for name, theirs in hugging_face_names(depth).items()}
    renamed = {}
    for key, value in state.items():
        stem, _, leaf = key.rpartition(".")
        renamed[ours.get(key) or (f"{ours[stem]}.{leaf}" if stem in ours else key)] = value
    return renamed


def _merge(state: dict[str, Tensor], parts: list[str], whole: str) -> None:
    if all(part in state for part in parts):
        state[whole] = torch.cat([state.pop(part) for part in parts])


def _depth(state: Mapping[str, Tensor], stem: str) -> int:
    found = (key.removeprefix(stem).partition(".")[0] for key in state if key.startswith(stem))
    return max((int(number) for number in found if number.isdigit()), default=-1) + 1


class Taps(NamedTuple):
    """What stands in no weight: 0-based tap layers, attention heads, and of a metric model its largest depth."""

    taps: list[int]
    heads: int
    max_depth: float | None = None  # metres; None: relative


def read_config(file: Path) -> Taps | None:
    """What the Hugging Face config.json beside a weight file says, read as data; None where there is none.

    Raises:
        ValueError: not such a config, or of a model whose arithmetic is not Depth Anything's.
    """
    path = file.with_name("config.json")
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        backbone = config.get("backbone_config") or {}
        told = {  # with transformers' defaults
            "model_type": config.get("model_type"),
            "backbone_config.model_type": backbone.get("model_type", "dinov2"),
            "backbone_config.apply_layernorm": backbone.get("apply_layernorm", True),
            "backbone_config.layer_norm_eps": backbone.get("layer_norm_eps", 1e-6),
            "reassemble_factors": config.get("reassemble_factors", [4, 2, 1, 0.5]),
        }
        stages = backbone.get("out_indices") or [stage.removeprefix("stage") for stage in backbone["out_features"]]
        metric = config.get("depth_estimation_type", "relative") == "metric"
        max_depth = float(config.get("max_depth") or 1) if metric else None
        taps = Taps([int(stage) - 1 for stage in stages], int(backbone.get("num_attention_heads", 12)), max_depth)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no config of DepthAnythingForDepthEstimation: {error!r}") from error
    wanted = ("depth_anything", "dinov2", True, 1e-6, [4, 2, 1, 0.5])
    if other := {key: value for (key, value), want in zip(told.items(), wanted, strict=True) if value != want}:
        raise ValueError(f"{path} describes another model than DepthAnythingForDepthEstimation on DINOv2: {other}")
    return taps


def _names(file: Path) -> list[str]:
    """A file's own name, its folder's, and in the hub's cache (models--OWNER--NAME/snapshots/REVISION/) its model's."""
    model = [file.parts[-4]] if len(file.parts) > 3 and file.parts[-4].startswith("models--") else []
    return [name.lower() for name in (file.name, file.parent.name, *model)]


def version_in_name(file: Path) -> Literal["V1", "V2"] | None:
    """Which Depth Anything a file says it is, by its own name or its folder's."""
    for name in _names(file):
        if re.search(r"(?<![a-z0-9])v2(?![0-9])", name):
            return "V2"
        if re.search(r"(?<![a-z0-9])v1(?![0-9])|depth[_-]anything[_-](vit[sbl]14|small|base|large)", name):
            return "V1"
    return None


# The metric models of V2 (metric_depth/README.md of the official code), whose sigmoid ends at so many metres.
MAX_DEPTHS = {"hypersim": 20.0, "indoor": 20.0, "vkitti": 80.0, "outdoor": 80.0}


def max_depth_in_name(file: Path, content: Mapping[str, Any]) -> float | None:
    """The largest depth in metres of a metric model of V2; None for a relative model.

    Both have the same names and shapes: file name and training leavings tell them apart, and the name the range.

    Raises:
        ValueError: a metric model whose name does not say its largest depth.
    """
    best = content.get("previous_best")  # what metric_depth/train.py of the official code stores beside its weights
    metric = isinstance(best, Mapping) and "silog" in best
    for name in _names(file):
        words = set(re.split(r"[^a-z]+", name))
        depths = {depth for word, depth in MAX_DEPTHS.items() if word in words}
        metric |= name == file.name.lower() and "metric" in words
        if len(depths) == 1 and (metric or "metric" in words):
            return depths.pop()
    if metric:
        raise ValueError(
            f"{file} is a metric model of Depth Anything V2, and its name does not say up to which depth: put hypersim "
            f"(20 m) or vkitti (80 m) into it, or name its Hugging Face folder, whose config.json says max_depth"
        )
    return None


def describe(
    state: Mapping[str, Tensor],
    *,
    told: Taps | None,
    version: Literal["V1", "V2"],
    source: str,
    max_depth: float | None = None,
) -> dict[str, Any]:
    """Arguments of DepthModel, less `pretrained`, read off the shapes of a state dict under our names.

    Args:
        state: as `to_ours` gives it.
        told: tap layers and heads, where a config says them.
        version: the taps where none does: V1 the last four blocks, V2 as in `OFFICIAL`.
        source: what to call the state in an error.
        max_depth: metres at which a metric model ends, where no config says it; None: relative.

    Raises:
        ValueError: keys that tell a size are missing or of another rank (all listed), or an encoder of which only a
            config could tell the heads.
    """
    places = {"pos_embed": ("pretrained.pos_embed", 3), "patch": ("pretrained.patch_embed.proj.weight", 4)}
    places |= {f"fc{i}": (f"pretrained.blocks.0.mlp.fc{i}.weight", 2) for i in (1, 2)}
    places |= {f"project{i}": (f"depth_head.projects.{i}.weight", 4) for i in range(4)}
    places |= {"fused": ("depth_head.scratch.layer1_rn.weight", 4)}
    places |= {"hidden": ("depth_head.scratch.output_conv2.0.weight", 4)}
    if missing := sorted(key for key, rank in places.values() if key not in state or state[key].ndim != rank):
        raise ValueError(f"{source} does not fit a depth model: missing ({len(missing)}): {', '.join(missing)}")
    shape = {name: tuple(state[key].shape) for name, (key, _) in places.items()}
    width, patch, depth = shape["pos_embed"][-1], shape["patch"][-1], _depth(state, "pretrained.blocks.")
    size = isqrt(shape["pos_embed"][1] - 1) * patch
    name, known_depth, known_mlp = ENCODERS.get(width, ("", 0, 0))
    if told is None and depth != known_depth:
        raise ValueError(
            f"{source} has an encoder of {depth} blocks of {width} channels, which is none of {', '.join(OFFICIAL)}: "
            "its heads and taps stand nowhere in it. Name its run folder, its model.safetensors, or its folder with "
            "config.json"
        )
    bins = is_zoedepth(state)
    if told is None:
        last_four = list(range(depth - 4, depth))
        told = Taps(list(OFFICIAL[name]["taps"]) if version == "V2" else last_four, width // 64, max_depth)
    if (depth, shape["fc1"][0]) != (known_depth, known_mlp):
        name = "vitg" if shape["fc1"][0] == 2 * shape["fc2"][1] else "vits"  # whose MLP it has
    same_encoder = (depth, shape["fc1"][0], width) == (known_depth, known_mlp, told.heads * 64)
    standard = same_encoder and (patch, size) == (14, 518)
    arguments = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": width,
        "depth": depth,
        "num_heads": told.heads,
        "mlp_ratio": (shape["fc1"][0] + 0.5) / width,  # timm rounds down
        "qkv_bias": "pretrained.blocks.0.attn.qkv.bias" in state,
        "init_values": 1.0 if "pretrained.blocks.0.ls1.gamma" in state else None,
    }
    return OFFICIAL[name] | {
        "taps": told.taps,
        "encoder_arguments": {} if standard else arguments,
        "features": shape["fused"][0],
        "out_channels": [shape[f"project{i}"][0] for i in range(4)],
        "hidden": shape["hidden"][0],
        "input_size": min(INPUT_SHAPE) if bins else size,
        **({"metric_head": "zoedepth"} if bins else {}),
        **({} if told.max_depth is None else {"activation": "sigmoid", "max_depth": told.max_depth}),
    }
