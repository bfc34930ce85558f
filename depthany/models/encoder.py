"""A ViT from timm with taps, and with the position-embedding rule of the official code.

Legend: B batch, H W pixels, h w patches, N = h * w tokens, P prefix tokens (class, registers), C channels.
"""

from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import eva, vision_transformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from depthany.models.layouts import find_encoder, read_plain, weight_file
from depthany.models.onednn import fast_inference

# What `arguments` may set. Weight files carry them, so none may name a file, an address or a class.
ARGUMENTS = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"}
ARGUMENTS |= {"init_values", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate"}
UNUSED = ("mask_token", "head.", "fc_norm.", "attn_pool.")  # in public encoder files, never run here


class Encoder(nn.Module):
    """Maps of chosen blocks of a ViT, each after the encoder's final norm.

    The parts are timm's own and keep timm's names, so the keys are those of timm and, for DINOv2 without registers, of
    the official encoder (depth_anything_v2/dinov2.py in github.com/DepthAnything/Depth-Anything-V2) but for its
    `mask_token`. The arithmetic is that of timm's `forward_intermediates(..., indices=taps, norm=True)`.

    Images are ImageNet-normalised, as for DINOv2 and DINOv3, whatever an encoder was trained with.

    Args:
        name: a ViT of timm's classes VisionTransformer (DINOv2 with and without registers, AugReg, DeiT III, SigLIP,
            CLIP) or Eva (DINOv3, EVA-02 and others with rotary positions), for example `vit_small_patch14_dinov2`,
            `vit_large_patch14_reg4_dinov2` or `vit_base_patch16_dinov3`.
        taps: 0-based blocks, increasing; the last is the encoder's last, so no parameter is unused.
        pretrained: False: timm's initialisation; True: timm's public weights (needs the network once); a path: a local
            .safetensors / .pth / .bin file, or a folder with one, in the layout of timm, DINOv2, DINOv3, `Dinov2Model`
            of transformers, or whatever else timm converts; of a depth model the encoder is taken. Positions of another
            grid and patches of another size are resampled, as timm does with public weights.
        pos_embed: the rule for learned positions on other grids than the stored one. `official`: bicubic with scale
            factors ((h + 0.1) / g, (w + 0.1) / g), without antialiasing, as in Depth Anything and DINOv2 without
            registers; `timm`: bicubic to the exact size, antialiased, as in DINOv2 with registers; `auto`: official
            for DINOv2 without registers, timm for every other. They agree only on the stored grid.
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
        pos_embed: Literal["auto", "official", "timm"],
        arguments: Mapping[str, Any],
    ):
        super().__init__()
        if pos_embed not in ("auto", "official", "timm"):
            raise ValueError(f"pos_embed={pos_embed!r}: choose 'auto', 'official' or 'timm'")
        vit = _build(name, arguments, hub=pretrained is True)
        depth = len(vit.blocks)
        taps = tuple(int(tap) for tap in taps)
        if not taps or sorted(set(taps)) != list(taps) or taps[0] < 0 or taps[-1] != depth - 1:
            raise ValueError(
                f"taps={list(taps)}: {name} has blocks 0..{depth - 1}; taps must increase and end "
                f"at {depth - 1}, or the blocks behind the last tap would never be trained "
                "(the argument depth shortens an encoder)"
            )
        if vit.pos_embed is None and pos_embed == "official":
            raise ValueError(f"pos_embed=official has no meaning for {name}, whose positions are rotary: choose auto")
        if pos_embed == "auto":
            dinov2 = name.partition(".")[0].endswith("_dinov2") and vit.reg_token is None
            pos_embed = "official" if dinov2 else "timm"
        self.taps = taps
        self.pos_embed_rule = pos_embed
        self.channels: int = vit.embed_dim  # C of every map
        self.patch_embed = vit.patch_embed
        self.cls_token = vit.cls_token  # (1, 1, C) or None
        self.reg_token = vit.reg_token  # (1, P - 1, C) or None
        self.pos_embed = vit.pos_embed  # (1, P + N, C), (1, N, C) or None
        self.pos_drop = vit.pos_drop
        self.rope = getattr(vit, "rope", None)
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = vit.norm
        self._prefix = vit.num_prefix_tokens
        self._embedded_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        self._rope_per_block = getattr(vit, "rope_mixed", False)
        if isinstance(pretrained, str):
            load_strictly(self, read_encoder(pretrained, vit, name=name), source=pretrained)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.patch_embed.patch_size[0]

    @fast_inference
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
        positions = None if self.pos_embed is None else self._positions(h, w)
        if positions is not None and not self._embedded_prefix:
            x = x + positions
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], dim=1)  # (B, P + N, C)
        if positions is not None and self._embedded_prefix:
            x = x + positions
        x = self.norm_pre(self.pos_drop(x))
        rope = None if self.rope is None else self.rope.get_embed(shape=[h, w])
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x) if rope is None else block(x, rope=rope[index] if self._rope_per_block else rope)
            if index in self.taps:
                tokens = self.norm(x)[:, self._prefix :].transpose(1, 2)  # (B, P + N, C) -> (B, C, N)
                maps.append(tokens.unflatten(2, (h, w)))  # (B, C, N) -> (B, C, h, w)
        return maps

    def _positions(self, h: int, w: int) -> Tensor:
        """Learned positions, (1, P + h * w, C) or (1, h * w, C); those of prefix tokens come first, never changed."""
        assert self.pos_embed is not None
        grid, prefix = self.patch_embed.grid_size, self._embedded_prefix
        if (h, w) == tuple(grid):
            return self.pos_embed
        if self.pos_embed_rule == "timm":
            return resample_abs_pos_embed(
                self.pos_embed, new_size=[h, w], old_size=list(grid), num_prefix_tokens=prefix
            )
        # interpolate_pos_encoding of the official dinov2.py. Without the 0.1 some grids come out
        # one too small; with it the sampling positions shift, so the published weights need it.
        patches = torch.unflatten(self.pos_embed[:, prefix:].float().transpose(1, 2), 2, grid)  # (1, C, *grid)
        patches = F.interpolate(patches, scale_factor=((h + 0.1) / grid[0], (w + 0.1) / grid[1]), mode="bicubic")
        patches = patches.flatten(2).transpose(1, 2)  # (1, C, h, w) -> (1, N, C)
        return torch.cat([self.pos_embed[:, :prefix], patches.to(self.pos_embed.dtype)], dim=1)


def _build(name: str, arguments: Mapping[str, Any], *, hub: bool) -> VisionTransformer | Eva:
    """A timm ViT without a classifier; says in words what does not fit."""
    if not timm.is_model(name):
        raise ValueError(f"encoder {name!r} is no model of timm {timm.__version__}; timm.list_models('vit_*')")
    if unknown := sorted(set(arguments) - ARGUMENTS):
        raise ValueError(f"encoder arguments {unknown} are not known; known: {sorted(ARGUMENTS)}")
    try:
        vit = timm.create_model(name, pretrained=hub, num_classes=0, global_pool="", dynamic_img_size=True, **arguments)
    except (OSError, RuntimeError, TypeError, AssertionError) as err:
        if not hub:
            raise ValueError(
                f"encoder {name!r} with {dict(arguments)} cannot be built: {err}. Encoders are of timm's classes "
                "VisionTransformer and Eva"
            ) from err
        raise ValueError(
            f"the public weights of {name!r} could not be fetched ({err}). Either connect once, "
            "so that the hub's cache holds them, or download them elsewhere and set pretrained to "
            "that file or folder; pretrained=False starts from scratch"
        ) from err
    if type(vit) not in (VisionTransformer, Eva) or isinstance(vit.norm, nn.Identity):
        raise ValueError(
            f"encoder {name!r} is no ViT with taps that is known: one of timm's classes VisionTransformer or Eva with "
            f"a final norm, such as vit_small_patch14_dinov2, vit_base_patch16_dinov3 or vit_base_patch16_siglip_224; "
            f"it is a {type(vit).__name__}"
        )
    assert isinstance(vit, VisionTransformer | Eva)
    return vit


def read_encoder(path: str, vit: VisionTransformer | Eva, *, name: str) -> dict[str, Tensor]:
    """The weights of a local file or folder under the names of a timm ViT; never executes code.

    Raises:
        ValueError: no such file, no plain weight file, or biases for which the encoder has no place.
    """
    if not Path(path).exists():
        raise ValueError(
            f"weight file {path} does not exist. Either correct the path, or set pretrained=true "
            "to fetch timm's public weights over the network"
        )
    file = weight_file(Path(path)) if Path(path).is_dir() else Path(path)
    return timm_names(find_encoder(read_plain(file), source=str(file)), vit, name=name)


def timm_names(state: Mapping[str, Tensor], vit: VisionTransformer | Eva, *, name: str) -> dict[str, Tensor]:
    """An encoder's public state dict under the names of a timm ViT, less what is never run; timm knows the layouts.

    Raises:
        ValueError: biases for which the encoder has no place.
    """
    if isinstance(vit, VisionTransformer):  # by the mask token timm tells DINOv2's names, and drops it
        state = {"mask_token": torch.empty(0), **state}
        state = vision_transformer.checkpoint_filter_fn(state, vit, adapt_layer_scale=True)
    else:
        own = vit.state_dict().keys()
        biases = [k for k, v in state.items() if k.endswith(".attn.qkv.bias") and k.replace("qkv.", "q_") not in own]
        if any(state[key].any() for key in biases):
            raise ValueError(f"{name} has no attention biases, and these weights have: take encoder {name}_qkvb")
        with redirect_stdout(StringIO()):  # timm prints each zero bias that it leaves out
            state = eva.checkpoint_filter_fn(dict(state), vit)
    return {key: value for key, value in state.items() if not key.startswith(UNUSED)}


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
