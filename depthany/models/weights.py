"""Weights in from every layout, out as our own .safetensors, and a hash of weights."""

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from depthany.models.depth_model import DepthModel
from depthany.models.encoder import load_strictly
from depthany.models.layouts import (
    describe,
    find_copy,
    is_hugging_face,
    is_zoedepth,
    max_depth_in_name,
    read_config,
    read_plain,
    to_ours,
    version_in_name,
    weight_file,
)

CONFIG_KEY = "model"  # of a file's metadata: the constructor arguments as JSON


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
        OSError: it cannot be written, ENOSPC where the disk is full.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors; change the name's ending")
    if CONFIG_KEY in metadata:
        raise ValueError(f"metadata key {CONFIG_KEY!r} is reserved for the model's constructor arguments")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_safetensors(state, temporary, metadata={**metadata, CONFIG_KEY: json.dumps(model.config())})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:  # it has no errno
        full = "os error 28" in str(error) or "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(state: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """A .safetensors file with the mode of the umask; the library alone makes it its owner's."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(state), path, metadata=dict(metadata))
    path.chmod(mode)


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
        raise ValueError(f"{path} is not a .safetensors file ({err})") from err


def load_weights(path: str | Path, *, config: Mapping[str, Any] | None = None) -> tuple[DepthModel, dict[str, str]]:
    """The model of a weight file of any known layout, and what the file says of itself; executes no code.

    Known are depthany's .safetensors and training checkpoints, the official files of Depth Anything V1 and V2 (relative
    and metric), and `DepthAnythingForDepthEstimation` of transformers 4 and 5, as a folder or a single
    file, each as .safetensors or torch file, under any wrapper (`{"model": ...}`) and prefix (`module.`), with averaged
    copies (taken rather than the others) and in any precision. Encoder, widths and taps are read off the file. Official
    files do not say their taps: they go by the name (`depth_anything_v2_*`, `depth_anything_vits14`), and are V2's,
    with a warning, where it says neither. The range of a metric file goes by its name too (`_metric_hypersim_`: 20 m,
    `_metric_vkitti_`: 80 m).

    The weights are on the CPU, in the dtype they were saved in.

    Args:
        path: a file, or a folder that holds one.
        config: arguments of DepthModel, where the file itself may not say them (a training checkpoint); else None.

    Returns:
        The model, and the file's metadata, text to text: of ours what `save_weights` was given; of others `layout`,
        `unused` (keys left out, which no model runs), and of a training checkpoint `images seen`, `optimizer steps` and
        `facts`.

    Raises:
        ValueError: no such file, another layout, a metric model of V2 of unknown range, keys that do not fit (all
            listed), or content that would have to be executed.
    """
    file = weight_file(Path(path)) if Path(path).is_dir() else Path(path)
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    content = read_plain(file)
    if CONFIG_KEY in metadata:
        return _build(metadata[CONFIG_KEY], content, source=file), metadata
    copy = find_copy(content, source=str(file))
    state, unused = to_ours(copy.state)
    state |= dict.fromkeys(copy.beside, torch.empty(0))  # listed by the strict load
    facts = content.get("facts")
    facts = facts if isinstance(facts, Mapping) else {}
    config = config or facts.get("model")
    if "samples_seen" in content:
        layout = "depthany training checkpoint"
        metadata |= {"images seen": str(content["samples_seen"]), "optimizer steps": str(content.get("global_step"))}
        metadata |= {"facts": json.dumps(facts, default=str)} | {
            key: str(facts[key]) for key in ("stage",) if key in facts
        }
    else:
        layout = "Hugging Face" if is_hugging_face(copy.state) else "official"
    if config is None:
        told = read_config(file) if layout == "Hugging Face" else None
        version = "V1" if is_zoedepth(state) else version_in_name(file)
        max_depth = max_depth_in_name(file, content) if told is None and not is_zoedepth(state) else None
        config = describe(state, told=told, version=version or "V2", source=str(file), max_depth=max_depth)
        if told is None and version is None:
            warnings.warn(
                f"{file} does not say its tap layers and its name says neither v1 nor v2: those of V2 are taken, "
                f"{list(config['taps'])}",
                stacklevel=2,
            )
        layout += f" {version or 'V2'}" if layout == "official" else ""
    model = _build(config, {key: value.clone() for key, value in state.items()}, source=file)
    metadata |= {"layout": layout, "copy": copy.where, "unused": ", ".join(unused)}
    return model, metadata


def _build(config: Mapping[str, Any] | str, state: Mapping[str, Tensor], *, source: Path) -> DepthModel:
    try:
        arguments = json.loads(config) if isinstance(config, str) else config
        with torch.device("meta"):  # no time and no random numbers for values that are replaced
            model = DepthModel(**{**arguments, "pretrained": False})
    except (TypeError, ValueError, RuntimeError) as err:
        raise ValueError(f"{source} describes a model that cannot be built: {err}") from err
    for module in model.modules():  # what no file stores, as the periods of rotary positions, is computed
        if hasattr(module, "init_non_persistent_buffers") and any(b.is_meta for b in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.init_non_persistent_buffers()  # type: ignore[operator]  # timm's
    load_strictly(model, state, source=str(source), assign=True)
    for module in model.modules():  # zeros beside weights, as the bias of keys, in their precision; periods stay exact
        for weight in islice(module.parameters(recurse=False), 1):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(weight.dtype))
    return model
