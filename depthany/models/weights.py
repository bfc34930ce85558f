"""Weight files: the official layout in, our own .safetensors in and out, and a hash of weights."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from depthany.models.depth_model import DepthModel
from depthany.models.encoder import load_strictly, rename_swiglu

CONFIG_KEY = "model"  # of a file's metadata: the constructor arguments as JSON
UNUSED = (
    "pretrained.mask_token",
    "depth_head.scratch.refinenet4.resConfUnit1.",
)  # official, never run


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
# github.com/DepthAnything/Depth-Anything-V2). V1 files have the same keys, but tap the last four
# blocks.
OFFICIAL: dict[str, dict[str, Any]] = {
    "vits": _official("vit_small_patch14_dinov2", (2, 5, 8, 11), 64, (48, 96, 192, 384)),
    "vitb": _official("vit_base_patch14_dinov2", (2, 5, 8, 11), 128, (96, 192, 384, 768)),
    "vitl": _official("vit_large_patch14_dinov2", (4, 11, 17, 23), 256, (256, 512, 1024, 1024)),
    "vitg": _official("vit_giant_patch14_dinov2", (9, 19, 29, 39), 384, (1536, 1536, 1536, 1536)),
}


def from_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict of an official one.

    Unwraps `{"model": ...}` and the prefix `module.` of fine-tuned files, drops by name the
    parameters that the official code stores and never runs, and renames the giant's MLP. Anything
    else stays, so that a strict load sees it.
    """
    if isinstance(state.get("model"), Mapping):
        state = state["model"]
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return rename_swiglu({key: value for key, value in state.items() if not key.startswith(UNUSED)})


def weights_hash(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over key, dtype, shape and bytes of every tensor, in the order of the keys."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_weights(model: DepthModel, path: str | Path, *, metadata: Mapping[str, str]) -> None:
    """Writes a .safetensors file for `load_weights`; it appears complete or not at all.

    Args:
        model: what to save, weights and constructor arguments.
        path: the file; its folder exists.
        metadata: more facts, text to text.

    Raises:
        ValueError: another suffix, or metadata under the reserved key.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors; change the name's ending")
    if CONFIG_KEY in metadata:
        raise ValueError(f"metadata key {CONFIG_KEY!r} is reserved for the model's constructor arguments")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(state, temporary, metadata={**metadata, CONFIG_KEY: json.dumps(model.config())})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Metadata of a .safetensors file, without reading its weights.

    Raises:
        ValueError: no such file, or not a .safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weight file {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as err:
        raise ValueError(
            f"{path} is not a .safetensors file ({err}); a .pth has to be converted first (from_official)"
        ) from err


def load_weights(path: str | Path) -> tuple[DepthModel, dict[str, str]]:
    """The model of a file written by `save_weights`, and the file's metadata; executes no code.

    The weights are on the CPU, in the dtype they were saved in.

    Raises:
        ValueError: no such file, another format, no model description, or keys that do not fit
            (all listed).
    """
    metadata = read_metadata(path)
    if CONFIG_KEY not in metadata:
        raise ValueError(
            f"{path} has no {CONFIG_KEY!r} in its metadata: it was not written by depthany; "
            "official weights have to be converted first (from_official)"
        )
    try:
        config = json.loads(metadata[CONFIG_KEY])
        with torch.device("meta"):  # no time and no random numbers for values that are replaced
            model = DepthModel(**{**config, "pretrained": False})
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path} describes a model that cannot be built: {err}") from err
    load_strictly(model, load_file(path), source=str(path), assign=True)
    return model, metadata
