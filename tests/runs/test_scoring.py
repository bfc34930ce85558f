"""Evaluation on embedded scenes: known answers, several input sizes, and the page of a sweep."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from depthany.config.build import build
from depthany.config.check import ConfigError
from depthany.config.launch import compose
from depthany.data.module import DepthData
from depthany.inference import memory
from depthany.inference.predictor import Predictor
from depthany.runs.scoring import baselines, disparity_of, input_sizes, print_table, score_all, sweep, write_page


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DepthData:
    shards = tmp_path_factory.mktemp("shards")
    few = [f"data.{part}.source.num_scenes=4" for part in ("validation.val_a", "validation.val_b", "sources.scenes_a")]
    cfg = compose("evaluate", [f"paths.shards={shards}", "data.unlabelled.scenes_b=null", *few])
    made = build(cfg.data)
    made.prepare_data()
    made.setup()
    return made


class Answer(nn.Module):
    """Says the red of each pixel, as a disparity or as metres."""

    patch_size, input_size = 8, 56

    def __init__(self, space: str = "disparity") -> None:
        super().__init__()
        self.space = space
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor) -> Tensor:
        near = self.scale * (images[:, 0] + 3)
        return near if self.space == "disparity" else 1 / near


def predictor(space: str = "disparity") -> Predictor:
    return Predictor(model=Answer(space), device="cpu", precision="fp32")


def test_the_truth_is_right_and_sharp_and_a_smooth_map_less_so(data: DepthData) -> None:
    def smooth(batch: dict) -> Tensor:
        return avg_pool2d(batch["disparity"], 5, stride=1, padding=2, count_include_pad=False)

    known = {"truth": lambda batch: batch["disparity"], "smooth": smooth}
    rows = score_all(known, data, size=56, multiple=8, detail=True)
    for source in data.validation:
        truth, smoother = (next(r for r in rows if (r["model"], r["source"]) == (m, source)) for m in known)
        assert truth["abs_rel"] == pytest.approx(0, abs=1e-5) and truth["images"] == 4
        assert truth["edge_images"] > 0 and truth["edge_f1"] == pytest.approx(1) == truth["edge_step"]
        assert smoother["abs_rel"] > truth["abs_rel"] and smoother["seconds"] > 0
        assert smoother["edge_f1"] < 1 and smoother["edge_step"] < 0.9


def test_a_sweep_has_a_row_for_each_size_and_the_trivial_predictors_once(
    data: DepthData, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = predictor()
    rows = sweep(model, "red", data, sizes=[56, 112], trivial=baselines(data))
    sizes = [row["input_size"] for row in rows if row["source"] == "val_a"]
    assert sizes == [None, None, None, 56, 112]
    assert all((row["seconds"] is None) == (row["model"] != "red") for row in rows)
    print_table(rows)
    printed = capsys.readouterr().out
    for word in ("mean map", "edge F1", "edge step", "On val_b, red is most accurate at input", "Finer is not more"):
        assert word in printed
    page = write_page(tmp_path, [(model, "red")], data, rows, sizes=[56, 112]).read_text(encoding="utf-8")
    for row in rows:
        assert f"{row['abs_rel']:.4f}" in page and f"{row['edge_step']:.4f}" in page
    assert page.count("<img") == 2 * 4 * 4  # image, truth and two maps of four scenes of each source
    assert "input 112" in page and not re.search(r"<script|<link|src=\"(?!data:)", page)


def test_metres_are_scored_as_disparity(data: DepthData) -> None:
    one, other = (
        score_all({"red": disparity_of(predictor(space))}, data, size=56, multiple=8)
        for space in ("disparity", "metric")
    )
    for a, b in zip(one, other, strict=True):
        assert a["abs_rel"] == pytest.approx(b["abs_rel"], rel=1e-4)
        assert "edge_f1" not in a


def test_sizes_that_cannot_be_used_are_refused() -> None:
    model = predictor()
    assert input_sizes(None, None, model) == [56]
    assert input_sizes(None, [112, 56, 112], model) == [56, 112]
    for size, sizes, words in [(56, [56], "give one"), (None, [], "empty"), (None, [7, 56], "7 has no whole patch")]:
        with pytest.raises(ConfigError, match=words):
            input_sizes(size, sizes, model)


@pytest.mark.skipif(not memory.free_bytes("cpu"), reason="this system does not tell its free memory")
def test_an_input_that_does_not_fit_is_refused_before_it_runs() -> None:
    image = torch.zeros(1).expand(1, 3, 800_000, 800_000)  # no memory of its own
    with pytest.raises(ConfigError, match=r"wide: a network input .* needs about .* smaller input_size"):
        disparity_of(predictor())({"source": "s", "key": ["wide"], "skipped": [], "image": image})
