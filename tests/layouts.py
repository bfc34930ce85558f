"""Random weights of sensible magnitude in the layouts of others, written from their published key tables.

None of it uses the package, so that a wrong name there shows.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, dict[str, Any]] = {  # depth_anything_v2/dpt.py
    "vits": {"width": 384, "depth": 12, "features": 64, "out_channels": (48, 96, 192, 384)},
    "vitb": {"width": 768, "depth": 12, "features": 128, "out_channels": (96, 192, 384, 768)},
    "vitl": {"width": 1024, "depth": 24, "features": 256, "out_channels": (256, 512, 1024, 1024)},
    "vitg": {"width": 1536, "depth": 40, "features": 384, "out_channels": (1536, 1536, 1536, 1536), "gated": 4096},
}
SMALL_HEAD: dict[str, Any] = {"width": 384, "depth": 12, "features": 8, "out_channels": (8, 8, 8, 8), "hidden": 4}
TINY: dict[str, Any] = {"width": 48, "depth": 4, "features": 16, "out_channels": (8, 16, 24, 24), "grid": 4}


def official_shapes(
    *,
    width: int,
    depth: int,
    features: int,
    out_channels: Sequence[int],
    hidden: int = 32,
    grid: int = 37,
    gated: int = 0,
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an official checkpoint; `gated` is the inner width of the giant's SwiGLU."""
    d, f = width, features
    shapes: dict[str, tuple[int, ...]] = {
        "pretrained.cls_token": (1, 1, d),
        "pretrained.pos_embed": (1, 1 + grid**2, d),
        "pretrained.mask_token": (1, d),
        "pretrained.patch_embed.proj.weight": (d, 3, 14, 14),
        "pretrained.patch_embed.proj.bias": (d,),
    }
    mlp = {"mlp.w12": (2 * gated, d), "mlp.w3": (d, gated)} if gated else {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    for i in range(depth):
        block = f"pretrained.blocks.{i}"
        for name, shape in {"attn.qkv": (3 * d, d), "attn.proj": (d, d), **mlp}.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (d,), f"{block}.{norm}.bias": (d,)}
        shapes |= {f"{block}.ls1.gamma": (d,), f"{block}.ls2.gamma": (d,)}
    shapes |= {"pretrained.norm.weight": (d,), "pretrained.norm.bias": (d,)}
    head: dict[str, tuple[int, ...]] = {}
    for i, o in enumerate(out_channels):
        head |= {f"projects.{i}": (o, d, 1, 1), f"scratch.layer{i + 1}_rn": (f, o, 3, 3)}
    first, second, _, last = out_channels
    head |= {"resize_layers.0": (first, first, 4, 4), "resize_layers.1": (second, second, 2, 2)}
    head |= {"resize_layers.3": (last, last, 3, 3)}
    for n in range(1, 5):
        head[f"scratch.refinenet{n}.out_conv"] = (f, f, 1, 1)
        for unit in (1, 2):
            head |= {f"scratch.refinenet{n}.resConfUnit{unit}.conv{c}": (f, f, 3, 3) for c in (1, 2)}
    head |= {"scratch.output_conv1": (f // 2, f, 3, 3), "scratch.output_conv2.0": (hidden, f // 2, 3, 3)}
    head |= {"scratch.output_conv2.2": (1, hidden, 1, 1)}
    for name, shape in head.items():
        shapes[f"depth_head.{name}.weight"] = shape
        if not name.endswith("_rn"):
            shapes[f"depth_head.{name}.bias"] = shape[:1]
    return shapes


def official_state(*, seed: int = 0, **size: Any) -> dict[str, Tensor]:
    """A state dict as `torch.load("depth_anything_v2_vits.pth")` gives it, with a head that is not dead."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in official_shapes(**size).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "token" not in key and "pos_embed" not in key:
            value /= (value[0].numel() or 1) ** 0.5
        elif ".norm" in key and key.endswith("weight"):
            value = 1 + value / 10
        else:
            value /= 10
        state[key] = value
    last = "depth_head.scratch.output_conv2.2"
    state[f"{last}.weight"].abs_()
    state[f"{last}.bias"].fill_(0.1)
    return state


def zoedepth_state(relative: Mapping[str, Tensor], *, seed: int = 0) -> dict[str, Tensor]:
    """A metric model of V1 as `depth_anything_metric_depth_indoor.pt` holds it under "model", on a relative model."""
    features = relative["depth_head.scratch.output_conv1.weight"].shape[1]
    last = relative["depth_head.scratch.output_conv2.0.weight"].shape[0] + 1 + 128
    nets = {"seed_bin_regressor": (features, 256, 64), "seed_projector": (features, 128, 128)}
    for i, attractors in enumerate((16, 8, 4, 1)):
        nets |= {f"projectors.{i}": (features, 128, 128), f"attractors.{i}": (128, 128, attractors)}
    shapes = {"conv2": (features, features), "conditional_log_binomial.mlp.0": (last // 2, last)}
    shapes["conditional_log_binomial.mlp.2"] = (4, last // 2)
    for name, (first, inner, out) in nets.items():
        shapes |= {f"{name}._net.0": (inner, first), f"{name}._net.2": (out, inner)}
    generator = torch.Generator().manual_seed(seed)
    state = {f"core.core.{key}": value for key, value in relative.items()}
    for name, (out, width) in shapes.items():
        state[f"{name}.weight"] = torch.randn(out, width, 1, 1, generator=generator) * (2 / width) ** 0.5
        state[f"{name}.bias"] = torch.randn(out, generator=generator) / 3
    transform = "conditional_log_binomial.log_binomial_transform"
    return state | {f"{transform}.k_idx": torch.arange(64).view(1, -1, 1, 1), f"{transform}.K_minus_1": K_MINUS_1}


K_MINUS_1 = torch.tensor([63.0]).view(1, -1, 1, 1)


def dinov2_state(*, registers: int, **size: Any) -> dict[str, Tensor]:
    """An encoder's file as facebookresearch/dinov2 publishes it, with registers or without (0)."""
    state = official_state(**size, features=8, out_channels=(8, 8, 8, 8))
    state = {k.removeprefix("pretrained."): v for k, v in state.items() if k.startswith("pretrained.")}
    return state | ({"register_tokens": torch.randn(1, registers, size["width"]) / 10} if registers else {})


def dinov3_state(*, width: int, depth: int) -> dict[str, Tensor]:
    """An encoder's file as facebookresearch/dinov3 publishes it: patches of 16, rotary periods, masked biases."""
    state = dinov2_state(registers=0, width=width, depth=depth)
    del state["pos_embed"]
    state["patch_embed.proj.weight"] = torch.randn(width, 3, 16, 16) / 28
    state |= {"storage_tokens": torch.randn(1, 4, width), "rope_embed.periods": torch.ones(4)}
    for i in range(depth):
        state[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(3 * width)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(3 * width)
    return state


HUGGING_FACE = [  # transformers 4; applied in order
    (r"pretrained\.(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    (r"pretrained\.pos_embed", "backbone.embeddings.position_embeddings"),
    (r"pretrained\.patch_embed\.proj", "backbone.embeddings.patch_embeddings.projection"),
    (r"pretrained\.norm\.", "backbone.layernorm."),
    (r"pretrained\.blocks\.", "backbone.encoder.layer."),
    (r"attn\.proj", "attention.output.dense"),
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
    (r"mlp\.w12", "mlp.weights_in"),
    (r"mlp\.w3", "mlp.weights_out"),
    (r"depth_head\.projects\.(\d)", r"neck.reassemble_stage.layers.\1.projection"),
    (r"depth_head\.resize_layers\.(\d)", r"neck.reassemble_stage.layers.\1.resize"),
    (r"depth_head\.scratch\.layer(\d)_rn", lambda m: f"neck.convs.{int(m[1]) - 1}"),
    (r"depth_head\.scratch\.refinenet(\d)", lambda m: f"neck.fusion_stage.layers.{4 - int(m[1])}"),
    (r"out_conv", "projection"),
    (r"resConfUnit(\d)\.conv", r"residual_layer\1.convolution"),
    (r"depth_head\.scratch\.output_conv1", "head.conv1"),
    (r"depth_head\.scratch\.output_conv2\.0", "head.conv2"),
    (r"depth_head\.scratch\.output_conv2\.2", "head.conv3"),
]


def hugging_face_state(official: Mapping[str, Tensor], *, transformers: int) -> dict[str, Tensor]:
    """The same weights as `DepthAnythingForDepthEstimation` of transformers 4 (and every file) or 5 (in memory)."""
    state: dict[str, Tensor] = {}
    for key, value in official.items():
        for pattern, replacement in HUGGING_FACE:
            key = re.sub(pattern, replacement, key)
        split = {".attn.qkv.": ("attention.attention.query", "attention.attention.key", "attention.attention.value")}
        if transformers == 5:
            split = {".attn.qkv.": ("attention.q_proj", "attention.k_proj", "attention.v_proj")}
            split[".mlp.weights_in."] = ("mlp.gate_proj", "mlp.up_proj")
            key = key.replace("attention.output.dense", "attention.o_proj").replace("weights_out", "down_proj")
        names = next(((old, new) for old, new in split.items() if old in key), None)
        if names is None:
            state[key] = value
            continue
        for name, part in zip(names[1], value.chunk(len(names[1])), strict=True):
            state[key.replace(names[0], f".{name}.")] = part.clone()
    return state


def hugging_face_config(*, width: int, depth: int, heads: int, taps: Sequence[int], **more: Any) -> dict[str, Any]:
    """The parts of a published config.json that say what the weights do not; `more` replaces or adds."""
    backbone = {"model_type": "dinov2", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    backbone |= {"out_indices": [tap + 1 for tap in taps], "reshape_hidden_states": False}
    return {"model_type": "depth_anything", "backbone_config": backbone, "reassemble_factors": [4, 2, 1, 0.5]} | more


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
