"""The page of one teacher's labels of one set: `labels.<teacher>.html` beside the shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from depthany.report.page import BOTTOM, CHART_HEIGHT, CHART_WIDTH, LEFT, RIGHT, TOP, Page
from depthany.report.run_page import Panel

BINS = 1000  # of [0, 1]: fine enough for percentiles, small enough for any number of labels
BARS = 40
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MAX_DAMAGED_SHOWN = 100
PICTURE_PX = 256
LEGEND = (
    "Labels, and the teacher's answers to the mirrored and to the smaller image: red is near, blue far, each map has "
    "its own colour scale. The difference to the fitted answer is black for none, yellow for half of the range."
)
COLUMNS = {  # of an index row: title and meaning
    "quality": ("score", "1: all answers agree; 0: they contradict each other, or the map is nearly constant"),
    "flip": ("flip disagreement", "to the answer for the mirrored image, as a share of the map's range"),
    "scale": ("scale disagreement", "to the answer for a smaller image, as a share of the map's range"),
    "contrast": ("contrast", "5th to 95th percentile of a map, as a share of its largest magnitude"),
}


@dataclass
class Survey:
    """What the label shards of a set hold; `add` counts them one shard after the other."""

    num_images: int = 0
    num_labels: int = 0
    num_bytes: int = 0
    num_flat: int = 0  # labels whose contrast is below that of a map worth using
    damaged: list[tuple[str, str]] = field(default_factory=list)  # key, reason
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # of each quality column: counts (BINS,) over [0, 1]

    def add(self, column: str, values: Sequence[float]) -> None:
        """Counts values of one column; what lies above 1 counts as 1."""
        counts = self.columns.setdefault(column, np.zeros(BINS, np.int64))
        counts += np.histogram(np.clip(values, 0, 1), BINS, (0, 1))[0]

    def percentile(self, column: str, share: float) -> float:
        """The value below which a share of the labels lies, to half a bin."""
        counts = self.columns[column].cumsum()
        return (float(np.searchsorted(counts, share * counts[-1])) + 0.5) / BINS

    def share_from(self, column: str, value: float) -> float:
        """The share of labels of at least this value."""
        counts = self.columns[column]
        return float(counts[round(value * BINS) :].sum() / max(counts.sum(), 1))


def write_label_page(
    path: Path,
    *,
    name: str,
    survey: Survey,
    worst: Sequence[Panel],
    chosen: Sequence[Panel],
    facts: Mapping[str, Any],
) -> Path:
    """Writes the page.

    Args:
        path: the file.
        name: of the set.
        survey: counts.
        worst: the labels with the smallest scores, the worst first.
        chosen: labels chosen at random.
        facts: what the labels are: teacher, weights, input size, codec, ...
    """
    page = Page(f"Pseudo-labels of {name} by {facts['teacher']}")
    page.paragraph(_headline(survey), style="lead")
    if survey.columns and survey.num_labels:
        page.section("How well the teacher agrees with itself")
        page.paragraph(
            "Each image was also shown to the teacher mirrored"
            + (", and smaller" if "scale" in survey.columns else "")
            + ". The answer, brought back to the image, is fitted to the label by scale and shift. The disagreement is "
            "the mean difference that is left, as a share of the label's range; the score is the share of the label's "
            "variance that the fitted answer explains."
        )
        _add_quality(page, survey)
    if worst:
        page.section("The worst labels")
        page.paragraph(LEGEND, style="note")
        _add_panels(page, worst)
    if chosen:
        page.section("Labels chosen at random")
        if not worst:
            page.paragraph(LEGEND, style="note")
        _add_panels(page, chosen)
    page.section("Damaged images")
    if survey.damaged:
        shown = f"; the first {MAX_DAMAGED_SHOWN} are" if len(survey.damaged) > MAX_DAMAGED_SHOWN else ""
        page.paragraph(f"{len(survey.damaged):,} images cannot be read and have no label{shown}:")
        rows = [{"key": key, "reason": reason} for key, reason in survey.damaged[:MAX_DAMAGED_SHOWN]]
        page.table({"key": "image", "reason": "what is wrong"}, rows)
    else:
        page.paragraph("None.")
    page.section("What the labels are")
    each = survey.num_bytes / max(survey.num_labels, 1)
    size = {"storage": f"{survey.num_bytes / 1e9:,.3f} GB, {each / 1e3:,.1f} kB for each label"}
    page.key_values({key: "null" if fact is None else fact for key, fact in facts.items()} | size)
    return page.write(path)


def _headline(survey: Survey) -> str:
    text = f"{survey.num_labels:,} of {survey.num_images:,} images are labelled; {len(survey.damaged):,} are damaged."
    if not survey.columns or not survey.num_labels:
        return text
    median, below = survey.percentile("quality", 0.5), 1 - survey.share_from("quality", 0.6)
    text += f" The median score is {median:.3f}; {below:.2%} of the labels score below 0.6; "
    return text + f"{survey.num_flat:,} maps are nearly constant."


def _add_quality(page: Page, survey: Survey) -> None:
    there = [column for column in COLUMNS if column in survey.columns]
    page.charts([histogram(COLUMNS[c][0], survey.columns[c], note=COLUMNS[c][1]) for c in there])
    page.subsection("In numbers")
    shares = {"0.01": "1 %", "0.05": "5 %", "0.5": "half", "0.95": "95 %", "0.99": "99 %"}
    rows = [
        {"column": COLUMNS[c][0], **{share: f"{survey.percentile(c, float(share)):.3f}" for share in shares}}
        for c in there
    ]
    page.table({"column": "of all labels, this share lies below", **shares}, rows)
    page.subsection("What a threshold keeps")
    kept = {f"{t}": f"{survey.share_from('quality', t):.2%}" for t in THRESHOLDS}
    page.table({"name": "labels.min_quality", **{t: t for t in kept}}, [{"name": "labels kept", **kept}])


def _add_panels(page: Page, panels: Sequence[Panel]) -> None:
    for panel in panels:
        page.subsection(panel.title)
        page.figures(panel.images, max_side_px=PICTURE_PX)


def histogram(title: str, counts: np.ndarray, *, note: str) -> str:
    """Bars of the share of labels over the values that occur, as inline SVG.

    Args:
        title: of the chart.
        counts: (BINS,) over [0, 1].
        note: what the values mean, below the title.
    """
    there = np.flatnonzero(counts)
    width = next(w for w in (5, 10, 25) if w == 25 or (there[-1] // w - there[0] // w) < BARS)  # bins in a bar
    first, last = there[0] // width, there[-1] // width
    if last - first < BARS // 4:  # a few bars are no distribution: show their surroundings
        first = max(0, min(first, BINS // width - BARS // 4))
        last = min(BINS // width - 1, first + BARS // 4)
    shares = counts.reshape(-1, width).sum(1)[first : last + 1] / counts.sum()
    inner_width, inner_height = CHART_WIDTH - LEFT - RIGHT, CHART_HEIGHT - TOP - BOTTOM
    step, ground = inner_width / len(shares), CHART_HEIGHT - BOTTOM
    drawing = []
    for part in (0.5, 1.0):
        y = ground - part * inner_height
        drawing.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{CHART_WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{part * shares.max():.1%}</text>'
        )
    for index, share in enumerate(shares):
        left = (first + index) * width / BINS
        height = share / shares.max() * inner_height
        drawing.append(
            f'<rect x="{LEFT + index * step + 0.5:.1f}" y="{ground - height:.1f}" width="{step - 1:.1f}" '
            f'height="{height:.1f}" fill="var(--c0)">'
            f"<title>{left:.3f} to {left + width / BINS:.3f}: {share:.2%}</title></rect>"
        )
    drawing.append(f'<path class="grid" d="M{LEFT} {ground}H{CHART_WIDTH - RIGHT}"/>')
    low, high = first * width / BINS, (last + 1) * width / BINS
    for tick in MaxNLocator(nbins=5).tick_values(low, high):
        x = LEFT + (tick - low) / (high - low) * inner_width
        if LEFT <= x <= CHART_WIDTH - RIGHT:
            drawing.append(f'<text x="{x:.1f}" y="{ground + 17}" text-anchor="middle">{tick:.5g}</text>')
    middle = (TOP + ground) // 2
    drawing.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">share of labels</text>')
    return (
        f"<figure><h3>{escape(title)}</h3><figcaption>{escape(note)}</figcaption>"
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawing)}</svg></figure>"
    )
