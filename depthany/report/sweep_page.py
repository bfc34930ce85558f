"""The page of a resolution sweep: accuracy, sharpness and time against the size of the network's input."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthany.report.page import Line, Page, line_chart
from depthany.report.run_page import Panel, add_panels, picture_side

COLUMNS = {
    "model": "Model",
    "input_size": "Input",
    "abs_rel": "AbsRel ↓",
    "delta1": "δ1 ↑",
    "negative_scale": "negative scale ↓",
    "edge_f1": "edge F1 ↑",
    "edge_step": "edge step ↑",
    "seconds": "s / image ↓",
}
CHARTS = ("abs_rel", "delta1", "edge_f1", "edge_step", "seconds")


def write_sweep_page(
    path: Path, *, title: str, models: Sequence[str], rows: Sequence[Mapping[str, Any]], panels: Sequence[Panel]
) -> Path:
    """Writes the page.

    Args:
        path: where it goes; its folder exists.
        title: of the page.
        models: the models among the rows; the others are trivial predictors.
        rows: `source`, `images`, `edge_images` and the keys of `COLUMNS`; `input_size` None: it does not matter.
        panels: image, truth and the maps at each size.

    Returns:
        The path.
    """
    page = Page(title)
    for sentence in findings(rows, models):
        page.paragraph(sentence, style="lead")
    for source in dict.fromkeys(row["source"] for row in rows):
        own = [row for row in rows if row["source"] == source]
        page.section(f"{source} ({own[0]['images']} images, {own[0]['edge_images']} with edges)")
        page.charts([chart for key in CHARTS if (chart := _chart(key, own, models))])
        quiet = [i for i, row in enumerate(own) if row["model"] not in models]
        page.table(COLUMNS, own, quiet=quiet)
    page.paragraph(
        "Prediction and truth are aligned by scale and shift in disparity at every input size anew. Edges lie between "
        "neighbouring pixels whose true depths differ by more than 5 %, in dense labels. Edge F1: whether the map has "
        "them between the same pixels, averaged over steps of 5 to 25 %. Edge step: which share of the true step it "
        "makes there. Seconds: median of an image.",
        style="note",
    )
    if panels:
        page.section("Images")
        page.paragraph(
            f"Maps of {models[-1]}, aligned to the truth and on its colour scale: red is near, blue is far, dark grey "
            "has no label."
        )
        add_panels(page, panels, picture_side(panels))
    return page.write(path)


def findings(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> list[str]:
    """For each source and model a sentence: at which size it is most accurate, and at which it is sharpest."""
    sentences = []
    for source in dict.fromkeys(row["source"] for row in rows):
        for model in models:
            own = [r for r in rows if (r["source"], r["model"]) == (source, model)]
            known = {key: [r for r in own if math.isfinite(r[key])] for key in ("abs_rel", "edge_f1")}
            if not known["abs_rel"]:
                continue
            best = min(known["abs_rel"], key=lambda r: r["abs_rel"])
            text = f"On {source}, {model} is most accurate at input {best['input_size']} (AbsRel {best['abs_rel']:.4f})"
            sharp = max(known["edge_f1"], key=lambda r: r["edge_f1"], default={"edge_f1": 0.0})
            if sharp["edge_f1"] > 0:
                at = sharp["input_size"]
                text += f" and sharpest at {at} (edge F1 {sharp['edge_f1']:.3g}"
                text += f", AbsRel {sharp['abs_rel']:.4f})" if at != best["input_size"] else ")"
            sentences.append(f"{text}.")
    return sentences


def _chart(key: str, rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    lines = []
    for model in models:
        own = [row for row in rows if row["model"] == model]
        lines.append(Line(model, [row["input_size"] for row in own], [row[key] for row in own]))
    return line_chart(COLUMNS[key], lines, x_label="short side at the network's input")
