"""The page of one run: `report.html` in the run folder."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from depthany.report.page import Line, Page, line_chart

COLUMNS = {
    "model": "Model",
    "source": "Source",
    "abs_rel": "AbsRel ↓",
    "delta1": "δ1 ↑",
    "negative_scale": "Negative scale",
    "images": "Images",
}
MAX_SKIPS_SHOWN = 200
Series = tuple[list[float], list[float]]  # steps, values


@dataclass(frozen=True)
class Panel:
    """Pictures of one sample, shown side by side."""

    title: str
    images: Sequence[tuple[str, np.ndarray]]  # caption, (H, W, 3) uint8


def write_run_page(
    run_dir: Path,
    *,
    panels: Sequence[Panel],
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    skipped: Sequence[tuple[str, str, str]],
) -> Path:
    """Writes `report.html` from the run's `metrics.csv`, its `config.yaml` and what is given.

    Args:
        run_dir: The run folder; either file may be missing, the page then says so.
        panels: Pictures, in reading order.
        rows: The final evaluation: `model`, `source`, `abs_rel`, `delta1`, `negative_scale`
            (share of images that aligned with a negative scale), `images`. NaN: nothing scored.
        facts: The run record: revision, seed, versions, hashes, throughput.
        skipped: (source, key, reason) of samples that could not be used.

    Returns:
        The path of the page.
    """
    metrics = read_metrics(run_dir / "metrics.csv")
    page = Page(f"Run {run_dir.resolve().name}")
    page.paragraph(headline(rows), style="lead")
    if rows:
        page.section("Result")
        page.table(COLUMNS, rows, bold=best_cells(rows))
        page.paragraph(
            "Prediction and truth are aligned by scale and shift in disparity before scoring. "
            "Bold: best of the models on one source.",
            style="note",
        )
    if panels:
        page.section("Pictures")
        for panel in panels:
            page.subsection(panel.title)
            page.figures(panel.images)
    _add_curves(page, metrics)
    page.section("Skipped samples")
    _add_skipped(page, skipped)
    page.section("Run record")
    page.key_values(facts)
    config = run_dir / "config.yaml"
    if config.is_file():
        page.details("Composed configuration", config.read_text(encoding="utf-8"))
    else:
        page.paragraph("The run folder has no config.yaml.", style="note")
    return page.write(run_dir / "report.html")


def read_metrics(path: Path) -> dict[str, Series]:
    """Reads a sparse metrics file: each column's steps and values, empty cells left out.

    Where a step is logged twice (after a resume) the later row counts; cells that are not numbers
    (the last row of a killed run) are left out. Without a file: empty.
    """
    if not path.is_file():
        return {}
    columns: dict[str, dict[float, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, cell in row.items():
                value = _number(cell)
                if value is not None and name not in (None, "step", "epoch"):
                    columns.setdefault(name, {})[step] = value
    return {
        name: (sorted(values), [values[step] for step in sorted(values)])
        for name, values in columns.items()
    }


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a fortieth of the curve, without a bias to the first value.

    Values that are not finite stay in place and do not enter the mean.
    """
    keep = 1 - 1 / max(1.0, len(values) / 40)
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
            value = total / weight
        means.append(value)
    return means


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The result in one sentence per model: the plain mean over its sources with a score."""
    if not rows:
        return "This run has no final evaluation."
    sentences = []
    for model in dict.fromkeys(str(row["model"]) for row in rows):
        own = [row for row in rows if str(row["model"]) == model]
        own = [row for row in own if math.isfinite(row["abs_rel"])]
        if not own:
            sentences.append(f"{model}: no image could be scored.")
            continue
        abs_rel, delta1 = (
            float(np.mean([float(row[name]) for row in own])) for name in ("abs_rel", "delta1")
        )
        num_images = sum(int(row["images"]) for row in own)
        where = (
            f"on {own[0]['source']}" if len(own) == 1 else f"in the mean over {len(own)} sources"
        )
        sentences.append(
            f"{model}: AbsRel {abs_rel:.4f} and δ1 {delta1:.4f} {where} ({num_images} images)."
        )
    return " ".join(sentences)


def best_cells(rows: Sequence[Mapping[str, Any]]) -> set[tuple[int, str]]:
    """(row index, column) of the best value per source, where more than one model is compared."""
    best = set()
    for source in {row["source"] for row in rows}:
        own = [index for index, row in enumerate(rows) if row["source"] == source]
        for name, choose in (("abs_rel", min), ("delta1", max)):
            values = {index: float(rows[index][name]) for index in own}
            finite = [value for value in values.values() if math.isfinite(value)]
            if len(own) > 1 and finite:
                best |= {(i, name) for i, value in values.items() if value == choose(finite)}
    return best


def _add_curves(page: Page, metrics: Mapping[str, Series]) -> None:
    loss = {name: series for name, series in metrics.items() if name.startswith("train/loss")}
    page.section("Training loss")
    if loss:
        charts = []
        for name, (steps, values) in loss.items():
            title = name.removeprefix("train/")
            raw = Line(title, steps, values, faint=True)
            charts.append(line_chart(title, [raw, Line(title, steps, smooth(values))]))
        page.charts(charts)
        page.paragraph("Pale: as logged. Strong: exponential mean.", style="note")
    else:
        page.paragraph("No training loss was logged.", style="note")
    page.section("Validation")
    validation: dict[str, list[Line]] = {}
    for name, series in metrics.items():
        if name.startswith("val/"):
            source, _, metric = name.removeprefix("val/").rpartition("/")
            validation.setdefault(metric, []).append(Line(source or "all", *series))
    if validation:
        titles = {"abs_rel": "AbsRel (lower is better)", "delta1": "δ1 (higher is better)"}
        page.charts([line_chart(titles.get(m, m), lines) for m, lines in validation.items()])
    else:
        page.paragraph("No validation was logged.", style="note")
    page.section("Learning rate and throughput")
    titles = {"images_per_s": "Images per second", "data_wait": "Share of time waiting for data"}
    charts = [
        line_chart(titles[last], [Line(titles[last], *series)])
        for name, series in metrics.items()
        if (last := name.rpartition("/")[2]) in titles
    ]
    rates = [Line(name, *series) for name, series in metrics.items() if name.startswith("lr")]
    if rates:
        charts.insert(0, line_chart("Learning rate", rates))
    if charts:
        page.charts(charts)
    else:
        page.paragraph("Neither was logged.", style="note")


def _add_skipped(page: Page, skipped: Sequence[tuple[str, str, str]]) -> None:
    if not skipped:
        page.paragraph("None: every sample could be used.")
        return
    counts = Counter(source for source, _, _ in skipped)
    columns = {"source": "Source", "skipped": "Skipped"}
    page.table(columns, [{"source": s, "skipped": n} for s, n in sorted(counts.items())])
    lines = [f"{source}  {key}: {reason}" for source, key, reason in sorted(skipped)]
    if len(lines) > MAX_SKIPS_SHOWN:
        lines[MAX_SKIPS_SHOWN:] = [f"and {len(lines) - MAX_SKIPS_SHOWN} more"]
    page.details("Each with its reason", "\n".join(lines))


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
