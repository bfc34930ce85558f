"""Scores of models and trivial predictors on the validation sources, and their table."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from depthany.data.files import DecodeError
from depthany.data.labels import has_label
from depthany.data.module import DepthData, EvalDataset, chunks_of
from depthany.metrics.affine import DepthScores
from depthany.metrics.baselines import MeanMap, constant_map, row_ramp
from depthany.tasks.base import score
from depthany.types import EvalBatch

Row = dict[str, Any]  # model, source, abs_rel, delta1, negative_scale, images


def baselines(data: DepthData) -> dict[str, Callable[[EvalBatch], Tensor]]:
    """The trivial predictors; the mean map is that of the labelled training images."""
    mean = MeanMap(size=56)
    for source in data.sources.values():
        for i in range(sum(chunks_of(source, data.limit))):
            try:
                sample = source.read(i)
            except DecodeError:
                continue
            assert has_label(sample), f"{source.key(i)}: no label in a labelled source"
            label = torch.from_numpy(sample["disparity"])[None], torch.from_numpy(sample["valid"])[None]
            mean.update(*label)
    trivial: dict[str, Callable[[EvalBatch], Tensor]] = {
        "constant": lambda batch: constant_map(*batch["image"].shape[-2:])[None],
        "image row": lambda batch: row_ramp(*batch["image"].shape[-2:])[None],
    }
    return trivial | ({"mean map": lambda batch: mean.map()[None]} if data.sources else {})


def score_all(
    predictors: Mapping[str, Callable[[EvalBatch], Tensor]], data: DepthData, *, size: int, multiple: int
) -> list[Row]:
    """One row for each predictor and validation source."""
    sources = list(data.validation.values())
    dataset = EvalDataset(sources, size=size, multiple=multiple, limit=data.limit)
    if not len(dataset):
        return []
    scores = {name: DepthScores(sources=[s.name for s in sources]) for name in predictors}
    with torch.inference_mode():
        for i in track(range(len(dataset)), "evaluating"):
            batch = dataset[i]
            for name, predict in predictors.items() if "image" in batch else ():
                cap = data.max_depth.get(batch["source"])
                scores[name].update([batch["source"]], score(predict(batch).cpu(), batch, cap))
    return [
        {"model": name, "source": source, "images": values["num_images"]}
        | {key: values[key] for key in ("abs_rel", "delta1", "negative_scale")}
        for name, table in scores.items()
        for source, values in table.compute().items()
    ]


def print_table(rows: list[Row]) -> None:
    """The rows as a table: one line for each predictor, the scores of each source side by side."""
    if not rows:
        print("no scores: there are no labelled images under data.validation")
        return
    sources = list(dict.fromkeys(row["source"] for row in rows))
    table = Table(title="affine-invariant depth: AbsRel (lower is better), delta1 (higher is better)")
    table.add_column("model")
    for source in sources:
        for column in ("AbsRel", "delta1", "negative scale"):
            table.add_column(f"{source}\n{column}", justify="right")
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for source in sources:
            row = next(r for r in rows if (r["model"], r["source"]) == (model, source))
            cells += [f"{row['abs_rel']:.4f}", f"{row['delta1']:.3f}", f"{row['negative_scale']:.1%}"]
        table.add_row(model, *cells)
    Console(width=max(100, 24 + 34 * len(sources))).print(table)
