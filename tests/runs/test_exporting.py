"""Exports: written, read back and compared; in place only if the comparison holds."""

from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file

from depthany.config.check import ConfigError
from depthany.models.depth_model import DepthModel
from depthany.models.weights import load_weights, read_metadata, save_weights
from depthany.runs import exporting
from depthany.runs.exporting import Check, Different, export
from tests.layouts import (
    SIZES,
    SMALL_HEAD,
    TINY,
    hugging_face_config,
    hugging_face_state,
    official_state,
    write_config,
    zoedepth_state,
)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official V1 file in half precision, and a folder for transformers of a tiny metric model."""
    folder = tmp_path_factory.mktemp("given")
    state = official_state(**SMALL_HEAD | {"hidden": 32})
    torch.save({key: value.half() for key, value in state.items()}, folder / "depth_anything_vits14.pth")
    metric = {"depth_estimation_type": "metric", "max_depth": 20}
    write_config(folder / "hf", hugging_face_config(width=48, depth=4, heads=3, taps=(0, 1, 2, 3), **metric))
    save_file(hugging_face_state(official_state(**TINY), transformers=4), folder / "hf" / "model.safetensors")
    return folder


def run(source: Path, out: Path, **options: Any) -> list[str]:
    defaults: dict[str, Any] = {"photo": None, "size": 56, "processing": "none", "runs": out.parent}
    return list(export(str(source), out=out, **defaults | options))


def test_a_round_trip_gives_back_every_bit(given: Path, tmp_path: Path) -> None:
    """Through our own file what nobody runs is lost, and comes back as zeros."""
    source = given / "depth_anything_vits14.pth"
    lines = run(source, tmp_path / "depth_anything_vits14.pth", form="official")
    assert "1 x 56 x 70: largest difference 0, 0 of" in lines[1]
    before, after = (torch.load(folder / source.name, weights_only=True) for folder in (given, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert {value.dtype for value in after.values()} == {torch.float16}

    run(source, tmp_path / "m.safetensors", form="safetensors")
    assert "layout" not in read_metadata(tmp_path / "m.safetensors")
    run(tmp_path / "m.safetensors", tmp_path / "v1.pth", form="official")
    after = torch.load(tmp_path / "v1.pth", weights_only=True)
    lost = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(lost) == 5 and not any(after[key].any() for key in lost)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth_anything_vits14.pth", "m.safetensors", "v1.pth"]


def test_a_name_that_says_other_taps_is_refused(given: Path, tmp_path: Path) -> None:
    for name in ("x.pth", "depth_anything_v2_vits.pth"):
        with pytest.raises(ConfigError, match=r"take depth_anything_vits14\.pth|depth_anything_vits14\.pth would do"):
            run(given / "depth_anything_vits14.pth", tmp_path / name, form="official")
    assert not list(tmp_path.iterdir())


def test_what_differs_is_not_written(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(model: DepthModel, path: Path, **_: Any) -> None:
        model.depth_head.scratch["output_conv1"].weight.data += 1e-3  # type: ignore[union-attr, operator]
        save_weights(model, path, metadata={})
        model.depth_head.scratch["output_conv1"].weight.data -= 1e-3  # type: ignore[union-attr, operator]

    monkeypatch.setattr(exporting, "save_weights", damaged)
    with pytest.raises(Different, match="not"):
        run(given / "hf", tmp_path / "m.safetensors", form="safetensors")
    assert not list(tmp_path.iterdir())


def test_a_constant_output_proves_nothing() -> None:
    assert Check("x", largest=1e-5, spread=1.0, bound=1e-4, rounding=0).holds
    assert not Check("x", largest=2e-4, spread=1.0, bound=1e-4, rounding=0).holds
    assert not Check("x", largest=0.0, spread=0.0, bound=1e-4, rounding=1).holds


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"form": "onnx", "out": "m.pt"}, "ends in .onnx"),
        ({"form": "hf", "out": "."}, "exists: name another"),
        ({"form": "torchscript", "out": "m.pt", "processing": "inside"}, "format=onnx alone"),
        ({"form": "safetensors", "out": "m.safetensors", "size": 0}, "size=0"),
        (
            {"form": "safetensors", "out": "m.safetensors", "photo": Path("no.jpg")},
            "photo=no.jpg cannot be read: No such",
        ),
        ({"form": "official", "out": "depth_anything_v2_vits.pth"}, "cannot hold this model"),
    ],
)
def test_options_that_do_not_fit(given: Path, tmp_path: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run(given / "hf", tmp_path / options.pop("out"), **options)


def test_pictures_that_a_graph_would_not_stretch_are_told(tmp_path: Path) -> None:
    torch.save({"model": zoedepth_state(official_state(**SMALL_HEAD | {"hidden": 32}))}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"every picture as 518 x 392: take processing=none, or say size=392"):
        run(tmp_path / "x.pt", tmp_path / "x.onnx", form="onnx", size=None, processing="inside")


@pytest.mark.slow
def test_every_format_on_a_photo(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny metric model by hf, which transformers opens, torchscript, and onnx with pictures and weights apart."""
    monkeypatch.setattr("depthany.inference.graph.PROTOBUF_LIMIT", 0)
    pixels = torch.randint(0, 255, (12, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), cv2.resize(pixels, (160, 120), interpolation=cv2.INTER_CUBIC))
    for form, name in (("hf", "hf"), ("torchscript", "m.pt")):
        lines = run(given / "hf", tmp_path / name, form=form, photo=photo)
        assert "photo.png" in lines[0] and sum("largest difference" in line for line in lines) == 2, lines
    lines = run(given / "hf", tmp_path / "p.onnx", form="onnx", photo=photo, processing="inside")
    assert "picture of 160 x 120" in lines[1] and "with p.onnx.data, which it needs beside it: onnx" in lines[-1]
    before, after = (load_file(folder / "hf" / "model.safetensors") for folder in (given, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert load_weights(tmp_path / "hf")[0].config() == load_weights(given / "hf")[0].config()


@pytest.mark.slow
def test_onnx_of_vits(tmp_path: Path) -> None:
    """252 x 336 and 126 x 168 of the official model, neither of which is traced."""
    torch.save(official_state(**SIZES["vits"]), tmp_path / "depth_anything_v2_vits.pth")
    lines = run(tmp_path / "depth_anything_v2_vits.pth", tmp_path / "m.onnx", form="onnx", size=252)
    assert [line.split(":")[0] for line in lines[1:3]] == ["ONNX Runtime 1 x 252 x 336", "ONNX Runtime 2 x 126 x 168"]
