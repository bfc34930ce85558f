"""A plain ViT from timm with taps, and with the position-embedding rule of the official code.

Legend: B batch, H W pixels, h w patches, N = h * w tokens, C channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

# What `arguments` may set. Weight files carry them, so none may name a file, an address or a class.
ARGUMENTS = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"}
ARGUMENTS |= {"init_values", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"}
UNUSED = frozenset({"mask_token", "head.weight", "head.bias"})  # in public encoder files, never run here
FILES = ("model.safetensors", "pytorch_model.bin")  # of a model folder, by preference


class Encoder(nn.Module):
    """Maps of chosen blocks of a plain ViT, each after the encoder's final norm.

    The parts are timm's own and keep timm's names, so the keys are those of timm and, but for
    `mask_token`, of the official encoder (depth_anything_v2/dinov2.py in
    github.com/DepthAnything/Depth-Anything-V2).

    Args:
        name: a timm ViT, for example `vit_small_patch14_dinov2`.
        taps: 0-based blocks, increasing; the last is the encoder's last, so no parameter is unused.
        pretrained: False: timm's initialisation; True: timm's public weights (needs the network
            once); a path: a local .safetensors / .pth / .bin file, or a folder with one, in timm's
            or DINOv2's layout.
        pos_embed: `official`: bicubic with scale factors ((h + 0.1) / g, (w + 0.1) / g), without
            antialiasing; `timm`: bicubic to the exact size, antialiased. They agree only on the
            stored grid.
        arguments: numbers for timm's constructor (names in `ARGUMENTS`).

    Raises:
        ValueError: an unknown or unsuited encoder, tap, argument or weight file.
    """

    def __init__(
        self,
        *,
        name: str,
        taps: Sequence[int],
        pretrained: bool | str,
        pos_embed: Literal["official", "timm"],
        arguments: Mapping[str, Any],
    ):
        super().__init__()
        if pos_embed not in ("official", "timm"):
            raise ValueError(f"pos_embed={pos_embed!r}: choose 'official' or 'timm'")
        vit = _build(name, arguments, hub=pretrained is True)
        depth = len(vit.blocks)
        taps = tuple(int(tap) for tap in taps)
        if not taps or sorted(set(taps)) != list(taps) or taps[0] < 0 or taps[-1] != depth - 1:
            raise ValueError(
                f"taps={list(taps)}: {name} has blocks 0..{depth - 1}; taps must increase and end "
                f"at {depth - 1}, or the blocks behind the last tap would never be trained "
                "(the argument depth shortens an encoder)"
            )
        self.taps = taps
        self.pos_embed_rule = pos_embed
        self.patch_embed = vit.patch_embed
        assert vit.cls_token is not None and vit.pos_embed is not None  # _build refuses others
        self.cls_token = vit.cls_token
        self.pos_embed = vit.pos_embed
        self.pos_drop = vit.pos_drop
        self.blocks = vit.blocks
        self.norm = vit.norm
        if isinstance(pretrained, str):
            state = rename_swiglu(read_state(pretrained))
            load_strictly(self, {k: v for k, v in state.items() if k not in UNUSED}, source=pretrained)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_embed.patch_size[0]

    @property
    def channels(self) -> int:
        """C of every map."""
        return self.pos_embed.shape[-1]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Normed maps of the tapped blocks; the last one is the final feature map.

        Args:
            image: (B, 3, H, W) ImageNet-normalised RGB; H and W are multiples of the patch size.

        Returns:
            One (B, C, h, w) map per tap.

        Raises:
            ValueError: a side that is no multiple of the patch size.
        """
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise ValueError(
                f"an image of {height} x {width} pixels has no whole number of patches of "
                f"{self.patch_size}: resize or pad both sides to multiples of {self.patch_size}"
            )
        h, w = height // self.patch_size, width // self.patch_size
        x = self.patch_embed(image).flatten(1, 2)  # (B, h, w, C) -> (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + N, C)
        x = self.pos_drop(x + self._positions(h, w))
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.taps:
                tokens = self.norm(x)[:, 1:].transpose(1, 2)  # (B, 1 + N, C) -> (B, C, N)
                maps.append(tokens.unflatten(2, (h, w)))  # (B, C, N) -> (B, C, h, w)
        return maps

    def _positions(self, h: int, w: int) -> Tensor:
        """Position embedding, (1, 1 + h * w, C); the class position comes first, never changed."""
        grid = self.patch_embed.grid_size
        if (h, w) == tuple(grid):
            return self.pos_embed
        if self.pos_embed_rule == "timm":
            return resample_abs_pos_embed(self.pos_embed, new_size=[h, w], old_size=list(grid))
        # interpolate_pos_encoding of the official dinov2.py. Without the 0.1 some grids come out
        # one too small; with it the sampling positions shift, so the published weights need it.
        patches = torch.unflatten(self.pos_embed[:, 1:].float().transpose(1, 2), 2, grid)  # (1, C, *grid)
        patches = F.interpolate(patches, scale_factor=((h + 0.1) / grid[0], (w + 0.1) / grid[1]), mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2)  # (1, C, h, w) -> (1, N, C)
        return torch.cat([self.pos_embed[:, :1], patches.to(self.pos_embed.dtype)], dim=1)


def _build(name: str, arguments: Mapping[str, Any], *, hub: bool) -> VisionTransformer:
    """A timm ViT without a classifier; says in words what does not fit."""
    if not timm.is_model(name):
        raise ValueError(f"encoder {name!r} is no model of timm {timm.__version__}; timm.list_models('vit_*')")
    if unknown := sorted(set(arguments) - ARGUMENTS):
        raise ValueError(f"encoder arguments {unknown} are not known; known: {sorted(ARGUMENTS)}")
    try:
        vit = timm.create_model(name, pretrained=hub, num_classes=0, global_pool="", dynamic_img_size=True, **arguments)
    except (OSError, RuntimeError, TypeError, AssertionError) as err:
        if not hub:
            raise ValueError(f"encoder {name!r} with {dict(arguments)} cannot be built: {err}") from err
        raise ValueError(
            f"the public weights of {name!r} could not be fetched ({err}). Either connect once, "
            "so that the hub's cache holds them, or download them elsewhere and set pretrained to "
            "that file or folder; pretrained=False starts from scratch"
        ) from err
    plain = isinstance(vit, VisionTransformer) and isinstance(vit.norm_pre, nn.Identity)
    if not plain or vit.cls_token is None or vit.pos_embed is None or vit.reg_token is not None:
        raise ValueError(
            f"encoder {name!r} is not a plain ViT (class token, learned positions, no registers, "
            "no norm before the blocks); vit_small_patch14_dinov2 is one"
        )
    return vit


def read_state(path: str | Path) -> dict[str, Tensor]:
    """State dict of a local weight file, or of a folder that holds one; never executes code.

    Wrappers `{"model": ...}`, `{"state_dict": ...}` and the key prefix `module.` are removed.

    Raises:
        ValueError: no such file, several candidates, or no plain state dict inside.
    """
    path = Path(path)
    file = _file_in(path) if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"weight file {path} does not exist. Either correct the path, or set pretrained=true "
            "to fetch timm's public weights over the network"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError, KeyError) as err:
        raise ValueError(f"{file} is no plain weight file (.safetensors, or .pth with tensors only): {err}") from err
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict (names -> tensors)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _file_in(folder: Path) -> Path:
    """The weight file of a folder."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth"))
    if len(files) != 1:
        raise ValueError(f"folder {folder} holds {len(files)} weight files {[p.name for p in files]}: name one")
    return files[0]


def rename_swiglu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's giant MLP (`w12`, `w3`) under timm's names (`fc1`, `fc2`).

    Both compute `fc2(silu(a) * b)` with `a, b` the first and second half of `fc1`'s rows (DINOv2
    layers/swiglu_ffn.py; timm `SwiGLUPacked`, gate_last=False), so no rows move.
    """
    return {k.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for k, v in state.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, source: str, assign: bool = False) -> None:
    """Fills a module from a state dict with exactly its keys and shapes.

    Args:
        module: filled in place.
        state: names -> tensors.
        source: what to call the state in an error, usually its file.
        assign: take the tensors themselves, with their dtype, instead of copying their values.

    Raises:
        ValueError: lists every missing and unexpected key and every wrong shape.
    """
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "wrong shape": [
            f"{key}: {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        words = "; ".join(f"{what} ({len(keys)}): {', '.join(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"{source} does not fit this {type(module).__name__}: {words}")
    module.load_state_dict(state, assign=assign)
