"""Weights out in the layouts of others: the official one, and a folder for transformers.

What others store and never run (`layouts.UNUSED`) is given back where the source had it, and is zero elsewhere.

Legend: D encoder width.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from depthany.models.depth_model import DepthModel
from depthany.models.layouts import OFFICIAL, hugging_face_names
from depthany.types import IMAGENET_MEAN, IMAGENET_STD

_RUN, _NEVER_RUN = "depth_head.scratch.refinenet4.resConfUnit2.", "depth_head.scratch.refinenet4.resConfUnit1."
_REQUIRED = (
    "pretrained.cls_token",
    "pretrained.pos_embed",
    "pretrained.blocks.0.ls1.gamma",
    "pretrained.blocks.0.attn.qkv.bias",
)
_BINS = re.compile(r"metric_head\.")
_DROP = {"drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"}  # of training alone


def official_name(model: DepthModel) -> str:
    """The file name that says to official code and to `load_weights` what stands in no weight.

    Raises:
        ValueError: the official code has no such model; the message says why, and which formats have.
    """
    config = model.config()
    problems = _problems(model)
    name = next((n for n, official in OFFICIAL.items() if official["encoder"] == config["encoder"]), None)
    if name is None or set(config["encoder_arguments"]) - _DROP:
        problems += [f"its encoder {config['encoder']} {config['encoder_arguments'] or ''}".strip()]
    if config["hidden"] != 32:
        problems += [f"hidden={config['hidden']} instead of 32"]
    depth = len(model.pretrained.blocks)
    second = name is not None and config["taps"] == list(OFFICIAL[name]["taps"])
    if (model.metric_head or not second) and config["taps"] != list(range(depth - 4, depth)):
        problems += [f"taps={config['taps']}"]
    _refuse("official", "the official code has vits, vitb, vitl and vitg with the taps of V1 or V2", problems)
    if model.metric_head is not None:
        return "depth_anything_metric_depth.pt"
    if model.max_depth is not None:
        return f"depth_anything_v2_metric_{'hypersim' if model.max_depth <= 20 else 'vkitti'}_{name}.pth"
    return f"depth_anything_v2_{name}.pth" if second else f"depth_anything_{name}14.pth"


def to_official(model: DepthModel, *, unused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that `depth_anything_v2/dpt.py` of the official code loads strictly, or V1's for metric models.

    Args:
        model: a model that the official code has.
        unused: tensors under official names that a source had and nobody runs.

    Raises:
        ValueError: as `official_name`.
    """
    official_name(model)
    state = _official_keys(model, unused)
    if model.metric_head is None:
        return state
    return {_BINS.sub("", key) if _BINS.match(key) else f"core.core.{key}": value for key, value in state.items()}


def _official_keys(model: DepthModel, unused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = _with_unused(model, unused)
    if not _is_gated(model):
        return state
    return {k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for k, v in state.items()}


def to_hugging_face(model: DepthModel, *, unused: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and config.json of `DepthAnythingForDepthEstimation`, by the names of every published file.

    transformers resamples the position grid without the official 0.1, so that off the stored grid (518 x 518) its maps
    differ from the official ones; the weights are the same.

    Args:
        model: a plain DINOv2 encoder under a Depth Anything head, of any widths.
        unused: as in `to_official`.

    Raises:
        ValueError: transformers has no such model; the message says why, and which formats have.
    """
    config, encoder = model.config(), model.pretrained
    width, rows = encoder.channels, encoder.patch_embed.grid_size
    hidden = model.state_dict()["pretrained.blocks.0.mlp.fc2.weight"].shape[1]
    gated = _is_gated(model)
    ratio = 4 if gated and hidden == (width * 8 // 3 + 7) // 8 * 8 else hidden // width
    problems = _problems(model)
    if not gated and hidden != ratio * width:
        problems += [f"its MLP of {hidden / width:.2f} times the width"]
    if model.metric_head is not None:
        problems += [f"metric_head={config['metric_head']}, of Depth Anything V1"]
    if rows[0] != rows[1]:
        problems += [f"its position grid of {rows[0]} x {rows[1]}"]
    if model.max_depth is not None and model.max_depth % 1:
        problems += [f"max_depth={model.max_depth}, no whole number"]
    _refuse("hf", "transformers has Depth Anything on a plain DINOv2 encoder", problems)

    names = hugging_face_names(len(encoder.blocks))
    state = {}
    for key, value in _official_keys(model, unused).items():
        stem, _, leaf = key.rpartition(".")
        if stem.endswith("attn.qkv"):
            place = stem.replace("pretrained.blocks.", "backbone.encoder.layer.").replace("qkv", "attention")
            place = place.replace(".attn.", ".attention.")
            for part, rows_of_part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                state[f"{place}.{part}.{leaf}"] = rows_of_part.contiguous()
        else:
            state[names.get(key) or f"{names[stem]}.{leaf}"] = value
    backbone = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": heads(model),
        "mlp_ratio": ratio,
        "use_swiglu_ffn": gated,
        "image_size": rows[0] * model.patch_size,
        "patch_size": model.patch_size,
        "out_indices": [tap + 1 for tap in config["taps"]],
        "apply_layernorm": True,
        "reshape_hidden_states": False,
    }
    metric = {} if model.max_depth is None else {"max_depth": int(model.max_depth)}  # strictly
    return state, {
        "architectures": ["DepthAnythingForDepthEstimation"],
        "model_type": "depth_anything",
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "backbone_config": backbone,
        "patch_size": model.patch_size,
        "reassemble_hidden_size": width,
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": config["out_channels"],
        "fusion_hidden_size": config["features"],
        "head_in_index": -1,
        "head_hidden_size": config["hidden"],
        "depth_estimation_type": "metric" if metric else "relative",
        **metric,
    }


def preprocessor_config(model: DepthModel) -> dict[str, Any]:
    """preprocessor_config.json of a folder for transformers: the official rule, but for Pillow's antialiased cubic."""
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": model.input_size, "width": model.input_size},
        "keep_aspect_ratio": True,
        "ensure_multiple_of": model.patch_size,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_pad": False,
    }


def heads(model: DepthModel) -> int:
    """Attention heads of a block."""
    return int(cast(Any, model.pretrained.blocks[0]).attn.num_heads)


def _is_gated(model: DepthModel) -> bool:
    """Whether the MLP is the giant's SwiGLU."""
    state = model.state_dict()
    return (
        state["pretrained.blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["pretrained.blocks.0.mlp.fc2.weight"].shape[1]
    )


def _problems(model: DepthModel) -> list[str]:
    """What neither the official code nor transformers can be told of a model."""
    config = model.config()
    problems = [f"activation={config['activation']}"] if config["activation"] == "softplus" else []
    if model.pretrained.pos_embed_rule != "official":
        problems += [f"pos_embed={config['pos_embed']}"]
    depth = len(model.pretrained.blocks)
    known = {*hugging_face_names(depth), *(f"pretrained.blocks.{i}.attn.qkv" for i in range(depth))}
    keys = [key for key in model.state_dict() if not key.startswith("metric_head.")]
    if strange := sorted(key for key in keys if key not in known and key.rpartition(".")[0] not in known):
        problems += [f"its part {strange[0]}" + (f" and {len(strange) - 1} more" if strange[1:] else "")]
    problems += [f"no {key}" for key in _REQUIRED if key not in keys]
    return problems


def _refuse(form: str, has: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"format={form} cannot hold this model: {has}; this one has {', '.join(problems)}. "
            "safetensors, onnx and torchscript hold every model"
        )


def _with_unused(model: DepthModel, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    unused = {"pretrained.mask_token": torch.zeros_like(state["pretrained.cls_token"][0])}  # (1, D)
    unused |= {k.replace(_RUN, _NEVER_RUN): torch.zeros_like(v) for k, v in state.items() if k.startswith(_RUN)}
    return state | {key: given.get(key, zeros) for key, zeros in unused.items()}
