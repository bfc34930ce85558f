"""Graphs for other runtimes: the model's arithmetic at sizes that were not traced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.testing import assert_close

from depthany.inference.graph import GraphModel, _take_pictures, resampling, write_onnx, write_torchscript
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.layouts import Taps, describe, find_copy, to_ours
from tests.layouts import TINY, official_state, zoedepth_state

STORED = 37


@pytest.fixture(scope="module")
def tiny() -> DepthModel:
    return build(Taps([0, 1, 2, 3], 3), official_state(**TINY))


def build(told: Taps, official: dict[str, Tensor]) -> DepthModel:
    state, _ = to_ours(official)
    model = DepthModel(pretrained=False, **describe(state, told=told, version="V2", source="x"))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("new", [18, 36, 43, 74, 123])
@pytest.mark.parametrize("official", [True, False])
def test_the_matrix_is_torchs_bicubic(new: int, official: bool) -> None:
    grid = torch.randn(1, 3, STORED, STORED, generator=torch.Generator().manual_seed(0))
    length = new + 0.1 if official else new
    matrix = resampling(torch.arange(new), torch.arange(STORED), torch.tensor(STORED / length), antialias=not official)
    if official:
        expected = interpolate(grid, scale_factor=(length / STORED,) * 2, mode="bicubic")
    else:
        expected = interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    assert_close(matrix @ grid @ matrix.T, expected, rtol=0, atol=5e-5)


# The stored grid is 4 x 4 patches of 14; 70 x 98 is what is traced.
SHAPES = [(1, 56, 56), (2, 70, 98), (1, 56, 126), (3, 28, 140), (1, 14, 14)]


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, 3, h, w, generator=generator) for b, h, w in SHAPES]


def assert_same(found: Tensor, model: DepthModel, image: Tensor) -> None:
    expected = model(image)
    assert expected.std() > 0.1
    assert_close(found, expected, rtol=0, atol=1e-4 * expected.std().item())


def test_the_graph_is_the_model_and_leaves_it_alone(tiny: DepthModel) -> None:
    before = type(tiny.pretrained)
    graph = GraphModel(tiny)
    for image in images():
        assert_same(graph(image), tiny, image)
    assert type(tiny.pretrained) is before and graph.model.pretrained.pos_embed is tiny.pretrained.pos_embed


def test_torchscript_at_other_sizes(tiny: DepthModel, tmp_path: Path) -> None:
    write_torchscript(tiny, tmp_path / "m.pt")
    script = torch.jit.load(tmp_path / "m.pt")
    for image in images():
        assert_same(script(image), tiny, image)


@pytest.mark.slow
def test_onnx_at_other_sizes_and_with_pictures(tiny: DepthModel, tmp_path: Path) -> None:
    onnx, onnxruntime = (pytest.importorskip(name, reason="needs depthany[export]") for name in ("onnx", "onnxruntime"))
    write_onnx(tiny, tmp_path / "m.onnx", pictures=None)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for image in images():
        assert_same(torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), tiny, image)

    proto = onnx.load(tmp_path / "m.onnx")  # as write_onnx does with pictures=84, without exporting twice
    _take_pictures(proto, size=84, patch=14, max_pixels=30_000, output="disparity")
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    predictor = Predictor(model=tiny, device="cpu", precision="fp32", max_pixels=30_000)
    sides = ((200, 300), (250, 100), (84, 84), (60, 95))  # ties, both orientations, growing
    strips = ((20, 500), (300, 20), (2, 900))  # above the budget; the last with a side of one patch
    for height, width in (*sides, *strips):
        rows, columns = np.mgrid[:height, :width]
        waves = np.stack([np.sin(rows / 9), np.cos(columns / 7), np.sin((rows + columns) / 11)], axis=-1)
        picture = (127 + 120 * waves).astype(np.uint8)
        (found,) = session.run(None, {"picture": picture[None]})
        expected = predictor.predict(picture, input_size=84).disparity
        assert found.shape == (1, height, width)
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-3 * expected.std())


@pytest.mark.slow
def test_the_bins_of_v1_at_other_sizes(tmp_path: Path) -> None:
    """As above, but for what low temperatures multiply."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs depthany[export]")
    copy = find_copy({"model": zoedepth_state(official_state(**TINY))}, source="x")
    model = build(Taps([0, 1, 2, 3], 3), copy.state)
    write_onnx(model, tmp_path / "m.onnx", pictures=None)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [output.name for output in session.get_outputs()] == ["depth"]
    for image in images():
        found, expected = session.run(None, {"image": image.numpy()})[0], model(image).numpy()
        assert expected.std() > 1e-3
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * expected.std())
