"""The page of an audit: what the tests say about a set of labels, with evidence and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from depthany.inference.rendering import colorize
from depthany.report.page import Line, Page, line_chart

PICTURE_SIDE = 320  # short side in pixels
BINS = 48
SPARSE = 0.1  # share of measured pixels below which they are hard to see
RED = (255, 32, 32)
MAX_LINES = 200  # of a list


class Group(NamedTuple):
    """What is said about one dataset."""

    name: str
    verdicts: Sequence[tuple[str, str, str]]  # test, clean or flagged or cannot tell, evidence in words
    facts: Mapping[str, Any]  # counts and shares
    depths: Sequence[np.ndarray]  # (101,) percentiles of the depth of each sample
    unit: str  # of depth: m, or what is known
    range_m: Sequence[float] | None  # of the card


class Picture(NamedTuple):
    """One sample to look at."""

    title: str
    image: np.ndarray  # (H, W, 3) uint8
    disparity: np.ndarray  # (h, w)
    valid: np.ndarray  # (h, w) bool
    sky: np.ndarray  # (h, w) bool


def write_audit_page(
    path: Path,
    *,
    title: str,
    groups: Sequence[Group],
    worst: Sequence[Picture],
    random: Sequence[Picture],
    faults: Sequence[tuple[str, str]],
    skipped: Sequence[tuple[str, str]],
    command: str,
) -> Path:
    """Writes the page.

    Args:
        path: of the page; its folder is made.
        title: of the page.
        groups: one for each dataset.
        worst: samples that look worst, with the reason in their title.
        random: samples drawn by chance.
        faults: (key, what is wrong) of samples with values that no label may have, and of unreadable ones.
        skipped: (file, reason) of what the source left out.
        command: that wrote the page.
    """
    page = Page(title)
    flagged = [(group.name, *verdict) for group in groups for verdict in group.verdicts if verdict[1] == "flagged"]
    count = len(flagged) + bool(faults)
    page.paragraph(f"{count} flagged." if count else "Nothing is flagged.", style="lead")
    for name, test, _, words in flagged:
        page.paragraph(f"{name}: {test}: {words}.")
    if faults:
        page.paragraph(f"{len(faults)} samples hold values that no label may have, or cannot be read.")
    for group in groups:
        page.section(group.name)
        columns = {"test": "Test", "state": "Says", "words": "Evidence"}
        rows = [dict(zip(columns, verdict, strict=True)) for verdict in group.verdicts]
        page.table(columns, rows, bold=[(i, "state") for i, row in enumerate(rows) if row["state"] == "flagged"])
        page.key_values(group.facts)
        page.charts(_histograms(group))
    for heading, pictures in (("Worst samples", worst), ("Random samples", random)):
        if pictures:
            page.section(heading)
            page.paragraph("The label's edges are red on the image. Red is near, blue far, dark grey no measurement.")
        for picture in pictures:
            page.subsection(picture.title)
            page.figures([("image and edges", overlay(picture)), ("disparity", _coloured(picture))])
    for heading, lines in (("Samples that are wrong by themselves", faults), ("Left out by the source", skipped)):
        if lines:
            page.section(f"{heading} ({len(lines)})")
            page.table({"key": "Sample", "why": "Why"}, [{"key": key, "why": why} for key, why in lines[:MAX_LINES]])
            if len(lines) > MAX_LINES:
                page.paragraph(f"The first {MAX_LINES} are shown.", style="note")
    page.footer("Made with", command)
    path.parent.mkdir(parents=True, exist_ok=True)
    return page.write(path)


def overlay(picture: Picture) -> np.ndarray:
    """The image, (., ., 3) uint8, with the depth edges of its label in red."""
    height, width = picture.image.shape[:2]
    share = min(1.0, PICTURE_SIDE / min(height, width))
    size = max(round(width * share), 1), max(round(height * share), 1)
    shown = cv2.resize(picture.image, size, interpolation=cv2.INTER_AREA)
    measured = picture.valid & ~picture.sky & (picture.disparity > 0) & np.isfinite(picture.disparity)
    inside = cv2.resize(measured.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    full = np.log(np.where(measured, picture.disparity, 1)).astype(np.float32)
    logs = cv2.resize(full, size, interpolation=cv2.INTER_NEAREST)
    steps = np.abs(cv2.morphologyEx(logs, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)))
    edges = (steps > 0.1) & (cv2.erode(inside, np.ones((3, 3), np.uint8)) > 0)
    sky = cv2.resize((picture.sky & picture.valid).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    edges |= cv2.morphologyEx(sky, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) > 0
    shown[edges] = RED
    return shown


def _coloured(picture: Picture) -> np.ndarray:
    """The disparity (., ., 3) uint8; single points of a sparse label are drawn larger."""
    valid = picture.valid & np.isfinite(picture.disparity)
    if not valid.any():
        return np.full((*picture.disparity.shape, 3), 48, np.uint8)
    shown = np.where(valid, picture.disparity, 0).astype(np.float32)
    low, high = np.percentile(shown[valid], (0, 99))
    if valid.mean() < SPARSE:
        dot = np.ones((max(3, min(valid.shape) // 120),) * 2, np.uint8)
        dots, drawn = cv2.dilate(shown, dot), cv2.dilate(valid.astype(np.uint8), dot) > 0
        return colorize(dots, valid=drawn, low=float(low), high=float(max(high, low + 1e-12)))
    return colorize(shown, valid=valid, low=float(low), high=float(max(high, low + 1e-12)))


def _histograms(group: Group) -> list[str]:
    """Depth and disparity on logarithmic axes; each sample counts the same."""
    if not group.depths:
        return []
    depths = np.concatenate(group.depths)
    charts = []
    for name, values, unit, limits in (
        ("Depth", depths, group.unit, group.range_m),
        ("Disparity", 1 / depths, f"1/{group.unit}", [1 / x for x in group.range_m] if group.range_m else None),
    ):
        logs = np.log10(values[values > 0])
        low, high = float(logs.min()), float(logs.max())
        counts, ends = np.histogram(logs, BINS, (low, high + max(1e-3, 0.02 * (high - low))))
        share = counts / counts.sum()
        lines = [Line("share of the pixels", ((ends[1:] + ends[:-1]) / 2).tolist(), share.tolist())]
        if limits:
            lines += [Line("the card's range", [np.log10(x)] * 2, [0, float(share.max())]) for x in sorted(limits)]
        charts.append(line_chart(f"{name}, log10 of {unit}", lines, y_label="share", x_label=f"log10 {unit}"))
    return charts
