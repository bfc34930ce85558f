"""The page of an audit: what the tests say about a set of labels, pictures, and the evidence."""

from collections import Counter
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
WORST, RANDOM = "Samples with most against them", "Random samples"
LEGEND = "Red is near, blue far, dark grey no measurement; on the image, the edges of the label are red."
WAYS_OUT = {  # what a flag means for whoever has to mend it
    "inverted sign": "Near and far are exchanged: the files hold depth where disparity was said, or the reverse.",
    "ray read as planar": "The files hold the distance along the ray where depth along the axis was said.",
    "planar read as ray": "The files hold depth along the axis where the distance along the ray was said.",
    "wrong unit": "Correct the metres per stored unit, or range_m if the scenes are like that.",
    "misaligned": "Image and label are not of one camera or crop, or were resized differently.",
    "wrong pair": "Images and labels are matched in a wrong order.",
    "sky as a surface": "Say the stored value of the sky, or give masks of it (python -m depthany.sky).",
}


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
    why: str
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
        worst: samples that look worst.
        random: samples drawn by chance.
        faults: (key, what is wrong) of samples with values that no label may have, and of unreadable ones.
        skipped: (file, reason) of what the source left out.
        command: that wrote the page.
    """
    page = Page(title)
    flagged = [(group.name, *verdict) for group in groups for verdict in group.verdicts if verdict[1] == "flagged"]
    count = len(flagged) + bool(faults)
    page.paragraph(
        f"{count} flagged: look at the pictures before training." if count else "Nothing is flagged.", style="lead"
    )
    for name, test, _, words in flagged:
        page.paragraph(f"{name}: {test}: {words}. {WAYS_OUT.get(test, '')}")
    if faults:
        key, why = faults[0]
        page.paragraph(f"{len(faults)} samples or files are wrong by themselves, first {key}: {why}.")
    page.paragraph(_in_short(groups), style="note")
    for heading, pictures in ((WORST if count else "Samples with the fewest measured pixels", worst), (RANDOM, random)):
        if pictures:
            page.section(heading)
            page.paragraph(LEGEND, style="note")
        for picture in pictures:
            page.subsection(picture.title)
            page.paragraph(picture.why, style="note")
            page.figures(
                [("image", _shrunk(picture)), ("edges of the label", overlay(picture)), ("label", _coloured(picture))],
                wide=True,
            )
    if len(groups) > 1:
        page.section("Every dataset and test")
        tests = list(dict.fromkeys(test for group in groups for test, *_ in group.verdicts))
        states = [{"name": group.name} | {test: state for test, state, _ in group.verdicts} for group in groups]
        bold = [(i, test) for i, row in enumerate(states) for test in tests if row.get(test) == "flagged"]
        page.table({"name": "Dataset"} | {test: test for test in tests}, states, bold=bold)
    for group in groups:
        page.section(group.name)
        columns = {"test": "Test", "state": "Says", "words": "Evidence"}
        rows = [dict(zip(columns, verdict, strict=True)) for verdict in group.verdicts]
        page.table(columns, rows, bold=[(i, "state") for i, row in enumerate(rows) if row["state"] == "flagged"])
        page.key_values(group.facts)
        page.charts(_histograms(group))
    for heading, lines in (("Samples that are wrong by themselves", faults), ("Left out by the source", skipped)):
        if lines:
            page.section(f"{heading} ({len(lines)})")
            page.table({"key": "Sample", "why": "Why"}, [{"key": key, "why": why} for key, why in lines[:MAX_LINES]])
            if len(lines) > MAX_LINES:
                page.paragraph(f"The first {MAX_LINES} are shown.", style="note")
    page.footer("Made with", command)
    path.parent.mkdir(parents=True, exist_ok=True)
    return page.write(path)


def _in_short(groups: Sequence[Group]) -> str:
    """How many tests say what."""
    states = Counter(state for group in groups for _, state, _ in group.verdicts)
    said = ", ".join(f"{states[state]} {state}" for state in ("flagged", "clean", "cannot tell") if states[state])
    samples = sum(int(group.facts.get("samples", 0)) for group in groups)
    return f"{samples:,} samples were looked at. Tests: {said or 'none'}; the evidence of each is below the pictures."


def _shrunk(picture: Picture) -> np.ndarray:
    height, width = picture.image.shape[:2]
    share = min(1.0, PICTURE_SIDE / min(height, width))
    size = max(round(width * share), 1), max(round(height * share), 1)
    return cv2.resize(picture.image, size, interpolation=cv2.INTER_AREA)


def overlay(picture: Picture) -> np.ndarray:
    """The image, (., ., 3) uint8, with the depth edges of its label in red."""
    shown = _shrunk(picture)
    size = shown.shape[1], shown.shape[0]
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
