"""The page of one run: `report.html` in the run folder."""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from depthany.report.page import Line, Page, figure, line_chart

METRICS = {  # title and how to choose the best
    "abs_rel": ("AbsRel ↓", min),
    "delta1": ("δ1 ↑", max),
    "negative_scale": ("negative scale ↓", min),
}
PICTURE_SIDES_PX = (256, 208, 160, 128, 96, 64)  # shown about 200 wide
PICTURES_BYTES = 800_000  # of all together: the page stays below a megabyte
MAX_SKIPS_SHOWN = 200
Series = tuple[list[float], list[float]]  # steps, values


@dataclass(frozen=True)
class Panel:
    """Pictures of one sample, shown side by side."""

    title: str  # "<source>/<sample>"
    images: Sequence[tuple[str, np.ndarray]]  # caption, (H, W, 3) uint8


def write_run_page(
    run_dir: Path,
    *,
    models: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    validation: Sequence[Panel],
    pseudo_labels: Sequence[Panel],
    facts: Mapping[str, str],
    skipped: Sequence[tuple[str, str, str]],
) -> Path:
    """Writes `report.html` from the run's `metrics.csv`, its `config.yaml` and what is given.

    Args:
        run_dir: The run folder; either file may be missing, the page then says so.
        models: The trained models among the rows, the run's own last; the others are trivial.
        rows: The final evaluation: `model`, `source`, `abs_rel`, `delta1`, `negative_scale`
            (share of images that aligned with a negative scale), `images`. NaN: nothing scored.
        validation: Validation images with truth and predictions, the panels of a source together.
        pseudo_labels: Unlabelled images with their labels, likewise.
        facts: The run record: revision, seed, versions, hashes; `command` closes the page.
        skipped: (source, key, reason) of samples that could not be used.

    Returns:
        The path of the page.
    """
    page = Page(f"Run {run_dir.resolve().name}")
    for sentence in headline(rows, models) or ["This run has no final evaluation."]:
        page.paragraph(sentence, style="lead")
    if rows:
        page.section("Result")
        _add_result(page, rows, models)
    side = picture_side([*validation, *pseudo_labels])
    if validation:
        page.section("Validation images")
        page.paragraph(
            "Red is near, blue is far, dark grey has no label (sky, for one). Predictions are "
            "aligned to the truth and share its colour scale."
        )
        add_panels(page, validation, side)
    if pseudo_labels:
        page.section("Pseudo-labels")
        page.paragraph(
            "What the student learns from: red is near, blue is far. Dark grey under “dropped” is "
            "the share of pixels with the largest loss, which the data term ignores as probably "
            "mislabelled. Each map has its own colour scale."
        )
        add_panels(page, pseudo_labels, side)
    _add_curves(page, read_metrics(run_dir / "metrics.csv"))
    page.section("Skipped samples")
    _add_skipped(page, skipped)
    page.section("Run facts")
    page.key_values({name: fact for name, fact in facts.items() if name != "command"})
    config = run_dir / "config.yaml"
    if config.is_file():
        page.details("Composed configuration", config.read_text(encoding="utf-8"))
    else:
        page.paragraph("The run folder has no config.yaml.", style="note")
    if "command" in facts:
        page.footer("Reproduce with", facts["command"])
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
    return {name: (sorted(values), [values[step] for step in sorted(values)]) for name, values in columns.items()}


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


def headline(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """One sentence per source: the run's own model against the others and the best trivial one.

    Args:
        rows: As for `write_run_page`.
        models: Likewise.
    """
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        scores.setdefault(row["source"], {})[row["model"]] = float(row["abs_rel"])
    sentences = []
    for source, of in scores.items():
        own = of.get(models[-1], math.nan)
        if not math.isfinite(own):
            sentences.append(f"On {source} the {models[-1]} has no score.")
            continue
        finite = {name: score for name, score in of.items() if math.isfinite(score)}
        rivals = {f"its {name}": finite[name] for name in models[:-1] if name in finite}
        trivial = {name: score for name, score in finite.items() if name not in models}
        if trivial:
            name = min(trivial, key=trivial.__getitem__)
            rivals[f"the strongest trivial predictor, {name}"] = trivial[name]
        parts = [f"{_compared(own, score)} {name} ({score:.4f})" for name, score in rivals.items()]
        verdict = f": {' and '.join(parts)}" if parts else ""
        sentences.append(f"On {source} the {models[-1]} scores AbsRel {own:.4f}{verdict}.")
    return sentences


def _compared(own: float, other: float) -> str:
    percent = round(100 * (1 - own / other), 1) if other else 0.0
    if not percent:
        return "level with"
    return f"{abs(percent):.1f}\N{NO-BREAK SPACE}% {'better' if percent > 0 else 'worse'} than"


def _add_result(page: Page, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    """One line per model, the trivial ones last; per source one column for each metric."""
    num_images: dict[str, int] = {}
    lines: dict[str, dict[str, Any]] = {name: {"model": name} for name in models}
    for row in rows:
        source, line = row["source"], lines.setdefault(row["model"], {"model": row["model"]})
        num_images[source] = max(num_images.get(source, 0), int(row["images"]))
        line |= {f"{source}/{metric}": float(row[metric]) for metric in METRICS}
    table = list(lines.values())
    columns, bold = {"model": "Model"}, set()
    for source in num_images:
        for metric, (title, choose) in METRICS.items():
            key = f"{source}/{metric}"
            columns[key] = title
            # the sign of a map without detail says little: there the models compete alone
            rivals = table[: len(models)] if metric == "negative_scale" else table
            values = {i: line[key] for i, line in enumerate(rivals) if key in line}
            finite = {value for value in values.values() if math.isfinite(value)}
            if len(finite) > 1:
                bold |= {(i, key) for i, value in values.items() if value == choose(finite)}
    groups = [(f"{source} ({count} images)", len(METRICS)) for source, count in num_images.items()]
    quiet = range(len(models), len(table))
    page.table(columns, table, bold=bold, quiet=quiet, groups=[("", 1), *groups])
    page.paragraph(
        "Prediction and truth are aligned by scale and shift in disparity before scoring; negative "
        "scale is the share of images where that turned the prediction around. Bold: the best of "
        "a column (negative scale: of the models). Grey: trivial predictors, which do not look at "
        "the image.",
        style="note",
    )


def picture_side(panels: Sequence[Panel]) -> int:
    """The largest side with which all pictures together stay within PICTURES_BYTES."""
    images = [image for panel in panels for _, image in panel.images]
    for side in PICTURE_SIDES_PX:
        if sum(len(figure(image, "", max_side_px=side)) for image in images) < PICTURES_BYTES:
            return side
    return PICTURE_SIDES_PX[-1]


def add_panels(page: Page, panels: Sequence[Panel], side: int) -> None:
    """Adds the panels, those of a source below its name, each picture with the given largest side in pixels."""
    for source, group in groupby(panels, key=lambda panel: panel.title.partition("/")[0]):
        page.subsection(source)
        for panel in group:
            page.paragraph(panel.title.partition("/")[2], style="note")
            page.figures(panel.images, max_side_px=side)


def _add_curves(page: Page, metrics: Mapping[str, Series]) -> None:
    page.section("Training")
    charts = []
    for name, (steps, values) in metrics.items():
        if name.startswith("train/loss"):
            part = name.removeprefix("train/loss").strip("/")
            label = f"{part} loss".strip()
            raw, mean = Line(label, steps, values, faint=True), Line(label, steps, smooth(values))
            title = f"Loss: {part}, unweighted" if part else "Loss: weighted sum"
            charts.append(line_chart(title, [raw, mean], y_label=label))
    note = "Loss pale: as logged; strong: mean." if charts else "No training loss was logged."
    rates = [Line(name, *series) for name, series in metrics.items() if name.startswith("lr")]
    speed, wait = (
        next((s for name, s in metrics.items() if name.rpartition("/")[2] == last), ([], []))
        for last in ("images_per_s", "data_wait")
    )
    charts.append(line_chart("Learning rate", rates, y_label="learning rate"))
    charts.append(line_chart("Throughput", [Line("images/s", *speed)], y_label="images/s"))
    page.charts(charts)
    page.paragraph(note, style="note")
    medians = [f"{np.median(speed[1]):.1f} images/s"] if speed[1] else []
    if wait[1]:
        share = 100 * np.median(wait[1])
        medians.append(f"{share:.1f}\N{NO-BREAK SPACE}% of the time waiting for data")
    if medians:
        page.paragraph(f"Throughput, median: {', '.join(medians)}.")
    page.section("Validation")
    validation: dict[str, list[Line]] = {}
    for name, series in metrics.items():
        if name.startswith("val/"):
            source, _, metric = name.removeprefix("val/").rpartition("/")
            validation.setdefault(metric, []).append(Line(source or "all", *series))
    if validation:
        titles = {metric: METRICS.get(metric, (metric,))[0] for metric in validation}
        page.charts([line_chart(titles[m], lines, y_label=titles[m]) for m, lines in validation.items()])
    else:
        page.paragraph("No validation was logged.", style="note")


def _add_skipped(page: Page, skipped: Sequence[tuple[str, str, str]]) -> None:
    if not skipped:
        page.paragraph("None: every sample could be used.")
        return
    counts = Counter((source, reason) for source, _, reason in skipped)
    page.table(
        {"source": "Source", "reason": "Reason", "samples": "Samples"},
        [{"source": s, "reason": r, "samples": n} for (s, r), n in sorted(counts.items())],
    )
    lines = [f"{source}  {key}: {reason}" for source, key, reason in sorted(skipped)]
    if len(lines) > MAX_SKIPS_SHOWN:
        lines[MAX_SKIPS_SHOWN:] = [f"and {len(lines) - MAX_SKIPS_SHOWN} more"]
    page.details("Each sample", "\n".join(lines))


def _number(cell: Any) -> float | None:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None
