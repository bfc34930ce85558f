"""Scores of models and trivial predictors on the validation sources, at one or several input sizes, and their table."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from depthany.config.check import ConfigError
from depthany.data.files import DecodeError
from depthany.data.labels import has_label
from depthany.data.module import DepthData, EvalDataset, chunks_of
from depthany.geometry.resize import resize_image
from depthany.inference.memory import require_memory
from depthany.inference.predictor import Predictor
from depthany.inference.rendering import colorize
from depthany.metrics.affine import DepthScores
from depthany.metrics.baselines import MeanMap, constant_map, row_ramp
from depthany.metrics.edges import EDGE_SCORES
from depthany.report.run_page import Panel
from depthany.report.sweep_page import findings, write_sweep_page
from depthany.tasks.base import fitted, score, sharpness
from depthany.types import EvalBatch

# model, source, images, abs_rel, delta1, negative_scale; of an evaluation also input_size (None: does not matter),
# edge_f1, edge_step, edge_images (those that have both) and seconds (of an image, the median)
Row = dict[str, Any]
MEAN_OF = 2000  # images
Predict = Callable[[EvalBatch], Tensor]  # disparity (1, H, W) up to scale and shift
COLUMNS = {
    "abs_rel": ("AbsRel", "{:.4f}"),
    "delta1": ("delta1", "{:.3f}"),
    "negative_scale": ("negative scale", "{:.1%}"),
    "edge_f1": ("edge F1", "{:.4f}"),
    "edge_step": ("edge step", "{:.4f}"),
}


def baselines(data: DepthData) -> dict[str, Predict]:
    """The trivial predictors; the mean map is that of the labelled training images, or of MEAN_OF of each large set."""
    mean = MeanMap(size=56)
    for source in data.sources.values():
        count = sum(chunks_of(source, data.limit))
        for i in np.linspace(0, count - 1, min(count, MEAN_OF)).astype(int).tolist():
            try:
                sample = source.read(i)
            except DecodeError:
                continue
            assert has_label(sample), f"{source.key(i)}: no label in a labelled source"
            label = torch.from_numpy(sample["disparity"])[None], torch.from_numpy(sample["valid"])[None]
            mean.update(*label)
    trivial: dict[str, Predict] = {
        "constant": lambda batch: constant_map(*batch["image"].shape[-2:])[None],
        "image row": lambda batch: row_ramp(*batch["image"].shape[-2:])[None],
    }
    return trivial | ({"mean map": lambda batch: mean.map()[None]} if data.sources else {})


def input_sizes(input_size: int | None, sizes: Sequence[int] | None, predictor: Predictor) -> list[int]:
    """The short sides at which a model is scored, in ascending order, in whole patches as the official rule has them.

    Raises:
        ConfigError: both options are given, there is no size, one has no whole patch, or not even a square image of
            one fits into memory.
    """
    if input_size is not None and sizes is not None:
        raise ConfigError("input_size is one size and sizes are several: give one of the two options")
    asked = sorted(set(sizes)) if sizes is not None else [input_size or predictor.input_size]
    if not asked or asked[0] < predictor.patch_size:
        what = f"{asked[0]} has no whole patch" if asked else "the list is empty"
        raise ConfigError(
            f"sizes or input_size: {what}; give pixels, at least {predictor.patch_size}, as sizes=[518,1036]"
        )
    patches = {side: -(-side // predictor.patch_size) * predictor.patch_size for side in asked}
    for side, whole in patches.items():
        if side != whole:
            print(f"size {side} becomes {whole}, a multiple of the patch of {predictor.patch_size}")
    asked = sorted(set(patches.values()))
    if (side := asked[-1]) > predictor.input_size:  # its own size is taken to fit: telling takes a moment
        try:
            require_memory(predictor.model, batch=1, height=side, width=side, precision=predictor.precision)
        except ValueError as error:
            raise ConfigError(f"sizes or input_size: {error}: take smaller ones") from error
    return asked


def disparity_of(predictor: Predictor) -> Predict:
    """What a model says of the image of a batch, as disparity also where it says metres.

    Raises:
        ConfigError: an image would need more memory than is free.
    """
    passed = 0  # pixels of the largest input that fits

    def predict(batch: EvalBatch) -> Tensor:
        nonlocal passed
        height, width = batch["image"].shape[-2:]
        if height * width > passed:
            try:
                require_memory(predictor.model, batch=1, height=height, width=width, precision=predictor.precision)
            except ValueError as error:
                raise ConfigError(f"{batch['key'][0]}: {error}: take a smaller input_size, or smaller sizes") from error
            passed = height * width
        output = predictor(batch["image"].to(predictor.device)).cpu()
        return output if predictor.space == "disparity" else 1 / output.clamp(min=1e-6)

    return predict


def score_all(
    predictors: Mapping[str, Predict], data: DepthData, *, size: int, multiple: int, detail: bool = False
) -> list[Row]:
    """One row for each predictor and validation source.

    Args:
        predictors: by name.
        data: its validation sources are scored, `data.limit` images of each.
        size: short side at the network's input in pixels.
        multiple: the network's patch size.
        detail: also the sharpness at edges and the time.
    """
    sources = list(data.validation.values())
    dataset = EvalDataset(sources, size=size, multiple=multiple, limit=data.limit)
    if not len(dataset):
        return []
    scores = {name: DepthScores(sources=[s.name for s in sources]) for name in predictors}
    more: dict[tuple[str, str], list[list[float]]] = {(n, s.name): [] for n in predictors for s in sources}
    with torch.inference_mode():
        for i in track(range(len(dataset)), f"evaluating at {size}"):
            batch = dataset[i]
            for name, predict in predictors.items() if "image" in batch else ():
                source, cap = batch["source"], data.max_depth.get(batch["source"])
                begun = time.perf_counter()
                pred = predict(batch).cpu()
                took = time.perf_counter() - begun
                scores[name].update([source], score(pred, batch, cap))
                if detail:
                    edges = sharpness(pred, batch, cap)
                    more[name, source].append([*(edges[key].item() for key in EDGE_SCORES), took])
    return [
        {"model": name, "source": source, "images": values["num_images"]}
        | {key: values[key] for key in ("abs_rel", "delta1", "negative_scale")}
        | (_detail(more[name, source]) if detail else {})
        for name, table in scores.items()
        for source, values in table.compute().items()
    ]


def _detail(each: Sequence[Sequence[float]]) -> Row:
    """Means over the images with edges, and the median time: the first image of a run is slow."""
    values = np.array(each, np.float64).reshape(-1, len(EDGE_SCORES) + 1)
    sharp = values[np.isfinite(values[:, 0]), : len(EDGE_SCORES)]
    means = sharp.mean(0) if len(sharp) else np.full(len(EDGE_SCORES), math.nan)
    seconds = float(np.median(values[:, -1])) if len(values) else math.nan
    return {**dict(zip(EDGE_SCORES, map(float, means), strict=True)), "edge_images": len(sharp), "seconds": seconds}


def sweep(
    predictor: Predictor, name: str, data: DepthData, *, sizes: Sequence[int], trivial: Mapping[str, Predict]
) -> list[Row]:
    """Rows of a model at each input size; first those of the trivial predictors, whose size does not matter."""
    model, multiple = {name: disparity_of(predictor)}, predictor.patch_size
    rows: list[Row] = []
    for size in sizes:
        of_size = score_all(
            {**(trivial if size == sizes[0] else {}), **model}, data, size=size, multiple=multiple, detail=True
        )
        for row in of_size:
            own = row["model"] == name
            rows.append(row | {"input_size": size if own else None, "seconds": row["seconds"] if own else None})
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """The rows as a table: one line for each predictor and input size, the scores of each source side by side."""
    if not rows:
        print("no scores: there are no labelled images under data.validation")
        return
    sources = list(dict.fromkeys(row["source"] for row in rows))
    detail = "edge_f1" in rows[0]
    shown = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    table = Table(title="affine-invariant depth: AbsRel (lower is better), delta1 (higher is better)")
    table.add_column("model", no_wrap=True)
    if detail:
        table.add_column("input", justify="right")
    for source in sources:
        for title, _ in shown.values():
            table.add_column(f"{source}\n{title}", justify="right")
        if detail:
            table.add_column(f"{source}\ns", justify="right")
    for model, size in dict.fromkeys((row["model"], row.get("input_size")) for row in rows):
        cells = [model, *([str(size or "")] if detail else [])]
        for source in sources:
            row = next(r for r in rows if (r["model"], r.get("input_size"), r["source"]) == (model, size, source))
            cells += [_cell(row[key], style) for key, (_, style) in shown.items()]
            cells += [_cell(row["seconds"], "{:.3f}")] if detail else []
        table.add_row(*cells)
    Console(width=max(100, 24 + (90 if detail else 34) * len(sources))).print(table)
    if detail:
        _explain(rows)


def _explain(rows: Sequence[Row]) -> None:
    """What the columns of an evaluation mean, on how many images, and where a sweep is at its best."""
    print(
        "edge F1, edge step (higher is sharper): at the depth edges of the truth, does the map have them between the\n"
        "same pixels, and which share of their step? s: median time of an image."
    )
    models = list(dict.fromkeys(row["model"] for row in rows if row["input_size"]))
    sizes = {row["input_size"] for row in rows} - {None}
    for row in rows:
        if (row["model"], row["input_size"]) == (models[0], min(sizes)):
            print(f"{row['source']}: {row['images']} images, {row['edge_images']} of them with a dense label and edges")
    if len(sizes) > 1:
        print("\n".join([*findings(rows, models), "Finer is not more accurate: both are shown."]))


def _cell(value: float | None, style: str) -> str:
    return "-" if value is None or math.isnan(value) else style.format(value)


def panels(predictor: Predictor, data: DepthData, *, sizes: Sequence[int], each: int) -> list[Panel]:
    """Images of each validation source, with the truth and the map at every input size, aligned to it."""
    predict = disparity_of(predictor)
    made = []
    for source in data.validation.values():
        datasets = {
            size: EvalDataset([source], size=size, multiple=predictor.patch_size, limit=data.limit) for size in sizes
        }
        count = len(datasets[sizes[0]])
        for i in np.linspace(0, count - 1, min(each, count)).astype(int):
            images: list[tuple[str, np.ndarray]] = []
            for size, dataset in datasets.items():
                item = dataset[int(i)]
                if "image" not in item:
                    break
                truth, valid = item["disparity"][0].numpy(), item["valid"][0].numpy()
                low, high = (float(v) for v in np.percentile(truth[valid] if valid.any() else np.zeros(1), [1, 99]))
                if not images:
                    shown = resize_image(item["original"], truth.shape, antialias=True)
                    images = [("image", shown), ("truth", colorize(truth, valid=valid, low=low, high=high))]
                with torch.inference_mode():
                    pred = fitted(predict(item), item)[0].numpy()
                images.append((f"input {size}", colorize(pred, low=low, high=high)))
            if images:
                made.append(Panel(title=item["key"][0], images=images))
    return made


def write_page(
    folder: Path, models: Sequence[tuple[Predictor, str]], data: DepthData, rows: Sequence[Row], *, sizes: Sequence[int]
) -> Path:
    """The page of a sweep, with pictures of the last model, in `_evaluate` of the runs' folder."""
    names = [name for _, name in models]
    path = folder / "_evaluate" / f"{'-'.join([*names, str(data.name)])[:120]}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = panels(models[-1][0], data, sizes=sizes, each=4)
    title = f"{', '.join(names)} on {data.name} at input sizes {', '.join(map(str, sizes))}"
    return write_sweep_page(path, title=title, models=names, rows=rows, panels=pictures)
