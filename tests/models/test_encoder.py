"""Taps, position embedding and weight files of the encoder, for every family of ViTs."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from depthany.models import encoder as encoder_file
from depthany.models.encoder import Encoder, timm_names
from depthany.models.layouts import rename_swiglu
from tests.layouts import SIZES, dinov2_state, dinov3_state, hugging_face_state, official_shapes

SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 40}


def build(**changes: Any) -> Encoder:
    """A very small encoder."""
    arguments: dict[str, Any] = {
        "name": "vit_tiny_patch16_224",
        "taps": (0, 1),
        "pretrained": False,
        "pos_embed": "official",
        "arguments": SMALL,
    }
    return Encoder(**{**arguments, **changes})


def reference_positions(pos_embed: Tensor, h: int, w: int) -> Tensor:
    """Cubic convolution (a = -0.75) as one matrix per axis, in float64, borders repeated.

    Output i reads the input at (i + 0.5) / scale - 0.5 with scale = (size + 0.1) / g.
    """

    def matrix(size: int, g: int) -> Tensor:
        weights = torch.zeros(size, g, dtype=torch.float64)
        for i in range(size):
            position = (i + 0.5) * g / (size + 0.1) - 0.5
            first = math.floor(position)
            for tap in range(first - 1, first + 3):
                t, a = abs(position - tap), -0.75
                near = (a + 2) * t**3 - (a + 3) * t**2 + 1
                far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
                weights[i, min(max(tap, 0), g - 1)] += near if t <= 1 else far
        return weights

    g = math.isqrt(pos_embed.shape[1] - 1)
    if (h, w) == (g, g):
        return pos_embed.double()
    grid = pos_embed[0, 1:].double().reshape(g, g, -1)
    grid = torch.einsum("yg,xk,gkc->yxc", matrix(h, g), matrix(w, g), grid)
    return torch.cat([pos_embed[0, :1].double(), grid.reshape(h * w, -1)])[None]


@pytest.fixture
def wide() -> Encoder:
    """The 37 x 37 grid of DINOv2 with few channels and white noise for positions."""
    encoder = build(arguments={**SMALL, "patch_size": 14, "img_size": 518})
    nn.init.normal_(encoder.pos_embed)
    return encoder


@pytest.mark.parametrize(
    ("height", "width"),
    [(518, 518), (518, 686), (252, 336), (1036, 1036), (518, 1722), (224, 224), (14, 28)],
)
def test_positions_follow_the_official_rule(wide: Encoder, height: int, width: int) -> None:
    h, w = height // 14, width // 14  # 1722 / 14 = 123
    positions = wide._positions(h, w)
    assert positions.shape == (1, 1 + h * w, 24)
    expected = reference_positions(wide.pos_embed, h, w)
    # float32 coordinates cost up to 2e-5; the rule without the 0.1 is off by more than 0.1
    assert_close(positions.double(), expected, atol=1e-4, rtol=0)
    assert_close(positions[:, 0], wide.pos_embed[:, 0], atol=0, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(518, 686), (1036, 1036), (252, 336), (518, 1722)])
def test_maps_follow_the_official_rule(wide: Encoder, height: int, width: int) -> None:
    """A timm ViT that stores the grid itself, filled with the reference positions: what the official code computes."""
    size = {**SMALL, "patch_size": 14, "img_size": (height, width), "depth": 1}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **size).eval()
    encoder = build(arguments={**SMALL, "patch_size": 14, "img_size": 518, "depth": 1}, taps=(0,)).eval()
    encoder.pos_embed = wide.pos_embed
    positions = reference_positions(wide.pos_embed, height // 14, width // 14).float()
    vit.load_state_dict(encoder.state_dict() | {"pos_embed": positions})
    image = torch.randn(1, 3, height, width)
    with torch.inference_mode():
        expected = vit.forward_intermediates(image, indices=[0], norm=True, intermediates_only=True)[0]
        found = encoder(image)[0]
        encoder.pos_embed_rule = "timm"
        other = encoder(image)[0]
    assert_close(found, expected, atol=1e-4, rtol=0)
    assert (other - expected).abs().max() > 0.1


def test_official_positions_are_untouched_only_on_the_stored_grid(wide: Encoder) -> None:
    assert wide._positions(37, 37) is wide.pos_embed
    assert not torch.equal(wide._positions(1, 1369), wide.pos_embed)


def test_every_grid_comes_out_right() -> None:
    encoder = build(arguments={**SMALL, "embed_dim": 3, "patch_size": 14, "img_size": 518})
    for size in range(1, 401):
        assert encoder._positions(1, size).shape[1] == 1 + size


def test_positions_are_float32_under_autocast(wide: Encoder) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(wide._positions(20, 30), wide._positions(20, 30).float(), atol=0, rtol=0)
        low = wide._positions(20, 30)
    assert_close(low, wide._positions(20, 30), atol=0, rtol=0)


@pytest.mark.parametrize(("rule", "size"), [("official", (40, 40)), ("timm", (40, 40)), ("timm", (48, 24))])
def test_taps_equal_timm(rule: str, size: tuple[int, int]) -> None:
    encoder = build(pos_embed=rule).eval()
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, global_pool="", dynamic_img_size=True, **SMALL
    ).eval()
    vit.load_state_dict(encoder.state_dict())
    nn.init.normal_(encoder.norm.weight), nn.init.normal_(encoder.norm.bias)
    vit.norm.load_state_dict(encoder.norm.state_dict())
    image = torch.randn(2, 3, *size)
    expected = vit.forward_intermediates(image, indices=[0, 1], norm=True, intermediates_only=True)
    for ours, theirs in zip(encoder(image), expected, strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


FAMILIES = {  # name: its rule under auto
    "vit_small_patch14_dinov2": "official",
    "vit_small_patch14_reg4_dinov2": "timm",  # DINOv2 itself antialiases with registers, dinov2/hub/backbones.py
    "vit_giant_patch14_reg4_dinov2": "timm",  # SwiGLU
    "vit_small_patch16_dinov3": "timm",  # rotary positions, registers, no learned positions
    "vit_small_patch16_rope_mixed_ape_224": "timm",  # both, and rotary positions of each block's own
    "eva02_tiny_patch14_224": "timm",
    "deit3_small_patch16_224": "timm",  # positions without class token
    "vit_base_patch16_siglip_224": "timm",  # no class token
    "vit_base_patch32_clip_224": "timm",  # a norm before the blocks
    "vit_base_patch16_224": "timm",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_timm(name: str) -> None:
    """To the bit, off the stored grid, with timm's keys, and no parameter unused; timm lacks the official rule."""
    arguments = {"embed_dim": 48, "num_heads": 3, "depth": 2}
    encoder = build(name=name, arguments=arguments, pos_embed="auto").eval()
    assert encoder.pos_embed_rule == FAMILIES[name]
    encoder.pos_embed_rule = "timm"
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    vit = timm.create_model(name, num_classes=0, global_pool="", dynamic_img_size=True, **arguments).eval()
    vit.load_state_dict(encoder.state_dict())
    image = torch.randn(2, 3, 5 * encoder.patch_size, 3 * encoder.patch_size)
    expected = vit.forward_intermediates(image, indices=[0, 1], norm=True, intermediates_only=True)
    for ours, theirs in zip(encoder(image), expected, strict=True):
        assert ours.shape == (2, encoder.channels, 5, 3)
        assert_close(ours, theirs, atol=0, rtol=0)
    (encoder(image)[-1] * torch.randn(2, encoder.channels, 5, 3)).sum().backward()
    assert not [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]


def test_every_tap_passes_the_final_norm() -> None:
    encoder = build()
    nn.init.zeros_(encoder.norm.weight)
    nn.init.constant_(encoder.norm.bias, 3.0)
    for tap in encoder(torch.randn(1, 3, 16, 40)):
        assert_close(tap, torch.full((1, 24, 2, 5), 3.0))


def test_maps_keep_the_image_layout() -> None:
    """A pixel changes the map of the first block most at its own patch."""
    encoder = build().eval()
    image = torch.randn(1, 3, 24, 40)
    other = image.clone()
    other[..., 17:22, 9:14] += 3.0  # row 2, column 1 of 3 x 5 patches
    change = (encoder(other)[0] - encoder(image)[0]).abs().sum(1)[0]
    assert change.argmax() == 2 * 5 + 1


@pytest.mark.parametrize("size", [(41, 40), (40, 39), (4, 40)])
def test_a_side_off_the_patch_grid_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        build()(torch.randn(1, 3, *size))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "vit_nothing"}, "vit_nothing"),
        ({"name": "hf-hub:someone/model"}, "no model of timm"),
        ({"name": "resnet18", "arguments": {}}, "cannot be built.*VisionTransformer and Eva"),
        ({"name": "vit_relpos_small_patch16_224", "arguments": {"depth": 2}}, "VisionTransformer"),
        (
            {"name": "vit_small_patch16_dinov3", "arguments": {"depth": 2}, "pos_embed": "official"},
            "official has no meaning.*rotary: choose auto",
        ),
        ({"taps": (0,)}, "end at 1"),
        ({"taps": (1, 0)}, "increase"),
        ({"taps": (0, 2)}, "blocks 0..1"),
        ({"arguments": {"checkpoint_path": "x.pth"}}, "checkpoint_path"),
        ({"arguments": {**SMALL, "num_heads": 5}}, "cannot be built"),
        ({"pos_embed": "other"}, "official"),
    ],
)
def test_unsuited_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**changes)


def test_without_network_both_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no route")

    monkeypatch.setattr(encoder_file.timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"(?s)connect once.*that file or folder"):
        build(pretrained=True)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "folder"])
@pytest.mark.parametrize("layout", ["timm", "dinov2"])
def test_local_files_load(tmp_path: Path, suffix: str, layout: str) -> None:
    source = build()
    state = dict(source.state_dict())
    if layout == "dinov2":
        state["mask_token"] = torch.zeros(1, 24)
    else:
        state |= {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    path = tmp_path / ("model.safetensors" if suffix == "folder" else f"vit{suffix}")
    if path.suffix == ".pth":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_file(state, path)
    torch.manual_seed(1)
    loaded = build(pretrained=str(tmp_path if suffix == "folder" else path))
    assert_close(dict(loaded.state_dict()), dict(source.state_dict()), atol=0, rtol=0)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)does not exist.*pretrained=true"):
        build(pretrained=str(tmp_path / "missing.pth"))
    with pytest.raises(ValueError, match="0 weight files"):
        build(pretrained=str(tmp_path))
    state = dict(build().state_dict())
    del state["norm.bias"]
    state["norm.extra"] = torch.zeros(1)
    state["cls_token"] = torch.zeros(1, 1, 7)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match=r"(?s)norm\.bias.*norm\.extra.*cls_token.*\(1, 1, 7\)"):
        build(pretrained=str(tmp_path / "wrong.pth"))
    torch.save(build(), tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth is not loaded: it holds depthany"):
        build(pretrained=str(tmp_path / "code.pth"))


def test_giant_mlp_of_dinov2_under_timms_names() -> None:
    """DINOv2 SwiGLUFFN: x1, x2 = chunk(w12(x)); w3(silu(x1) * x2)."""
    with torch.device("meta"):
        block = timm.create_model("vit_giant_patch14_dinov2", depth=1).blocks[0]
    mlp = type(block.mlp)(8, 24, act_layer=nn.SiLU, gate_last=block.mlp.gate_last)
    state = {
        "blocks.0.mlp.w12.weight": torch.randn(24, 8),
        "blocks.0.mlp.w12.bias": torch.randn(24),
        "blocks.0.mlp.w3.weight": torch.randn(8, 12),
        "blocks.0.mlp.w3.bias": torch.randn(8),
    }
    mlp.load_state_dict({k.removeprefix("blocks.0.mlp."): v for k, v in rename_swiglu(state).items()})
    x = torch.randn(5, 8)
    w12, b12, w3, b3 = state.values()
    x1, x2 = (x @ w12.T + b12).chunk(2, dim=-1)
    assert_close(mlp(x), (nn.functional.silu(x1) * x2) @ w3.T + b3)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("registers", [0, 4])
def test_official_dinov2_files_fit_every_size(name: str, registers: int) -> None:
    """Keys and shapes of facebookresearch/dinov2, without and with registers, the giant's SwiGLU too."""
    word = {"vits": "small", "vitb": "base", "vitl": "large", "vitg": "giant"}[name]
    timm_name = f"vit_{word}_patch14_{'reg4_' if registers else ''}dinov2"
    shapes = {k.removeprefix("pretrained."): v for k, v in official_shapes(**SIZES[name]).items() if "head" not in k}
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        state |= {"register_tokens": torch.empty(1, 4, SIZES[name]["width"])} if registers else {}
        encoder = build(name=timm_name, arguments={}, taps=(SIZES[name]["depth"] - 1,), pos_embed="auto")
        vit = timm.create_model(timm_name, num_classes=0, global_pool="", dynamic_img_size=True)
        found = timm_names(state, vit, name=timm_name)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    # Registers add 4 tokens and take the class token's own position away.
    counted = sum(v.numel() for v in state.values()) - SIZES[name]["width"] * (2 if registers else 1)
    assert sum(p.numel() for p in encoder.parameters()) == counted


TINY_DINOV2 = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 56, "init_values": 1.0}


@pytest.mark.parametrize(
    ("form", "registers"),
    [("official", 0), ("official", 4), ("training", 4), ("depth model", 0), ("transformers", 0), ("transformers", 4)],
)
def test_dinov2_files_of_every_origin_give_one_encoder(tmp_path: Path, form: str, registers: int) -> None:
    """The oracle is transformers' Dinov2Model, which keeps the official tokens and positions apart."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the extra hf")
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
    theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    state = dinov2_state(width=48, depth=2, grid=4, registers=registers)
    theirs.load_state_dict(transformers_names(state))
    path = tmp_path / "dinov2.pth"
    if form == "official":
        torch.save(state, path)
    elif form == "training":
        student = {f"backbone.{k}": v + 1 for k, v in state.items()} | {"dino_head.last_layer.weight": torch.zeros(3)}
        torch.save({"student": student, "teacher": {f"backbone.{k}": v for k, v in state.items()}}, path)
    elif form == "depth model":
        torch.save({f"pretrained.{k}": v for k, v in state.items()} | {"depth_head.x": torch.zeros(3)}, path)
    else:
        path = tmp_path / "folder"
        theirs.save_pretrained(path)
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    encoder = build(name=name, arguments=TINY_DINOV2, pretrained=str(path), pos_embed="auto").eval()
    image = torch.randn(1, 3, 56, 56)
    expected = theirs(pixel_values=image).last_hidden_state[:, 1 + registers :]
    assert_close(encoder(image)[-1].flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


def transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's names to those that this transformers has in memory."""
    from transformers import Dinov2Config, Dinov2Model

    five = any("q_proj" in key for key in Dinov2Model(Dinov2Config(num_hidden_layers=1)).state_dict())
    official = {f"pretrained.{key}": value for key, value in state.items()}
    renamed = hugging_face_state(official, transformers=5 if five else 4)
    return {
        k.removeprefix("backbone.").replace("pretrained.register", "embeddings.register"): v for k, v in renamed.items()
    }


def test_official_dinov3_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its distilled models have attention biases of zero, which timm's plain models leave out; others are refused."""
    arguments = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    state = dinov3_state(width=48, depth=2)
    torch.save(state, tmp_path / "dinov3_vits16_pretrain_lvd1689m.pth")
    path = str(tmp_path / "dinov3_vits16_pretrain_lvd1689m.pth")
    names = {"name": "vit_small_patch16_dinov3", "arguments": arguments, "pos_embed": "auto"}
    encoder = build(**names, pretrained=path)
    assert torch.equal(encoder.reg_token, state["storage_tokens"])
    assert torch.equal(encoder.blocks[1].gamma_2, state["blocks.1.ls2.gamma"])
    assert encoder(torch.randn(1, 3, 48, 80))[1].shape == (1, 48, 3, 5)
    state["blocks.1.attn.qkv.bias"][:48] = 0.5
    torch.save(state, path)
    with pytest.raises(ValueError, match="take encoder vit_small_patch16_dinov3_qkvb"):
        build(**names, pretrained=path)
    kept = build(**names | {"name": "vit_small_patch16_dinov3_qkvb"}, pretrained=path)
    assert kept.blocks[1].attn.q_bias.eq(0.5).all()
    assert capsys.readouterr().out == ""
