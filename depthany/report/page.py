"""Building blocks of one self-contained HTML page: no script, no network, no second file."""

import base64
import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

CHART_WIDTH, CHART_HEIGHT = 640, 260  # SVG units
LEFT, RIGHT, TOP, BOTTOM = 92, 14, 10, 46  # room for axis labels
SMALL_PX = 200  # a picture up to this side is shown with visible pixels
LOSSLESS_PX = 64  # up to this side a picture is PNG: blocks of JPEG would show
MAX_POINTS = 800  # per line; more cannot be seen

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #5b6470; --rule: #dfe3e8;
  --tint: #f5f7f9; --c0: #1f6fc4; --c1: #c4561a; --c2: #1b8a5a; --c3: #7c4dc4; --c4: #a87900;
  --c5: #b8336f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --soft: #9aa4b0;
  --rule: #2e343b; --tint: #1c2026; --c0: #6aaef5; --c1: #f29158; --c2: #52c793; --c3: #b592f0;
  --c4: #dcb23f; --c5: #ee7fae; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; max-width: 46rem; }
p.lead { font-size: 1.15rem; }
p.note, figcaption, footer { color: var(--soft); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .925rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td:first-child, .number { white-space: nowrap; }
.number { text-align: right; }
th[colspan] { text-align: center; color: var(--ink); }
tr.quiet td { color: var(--soft); background: var(--tint); }
tr:not(.quiet) + tr.quiet td { border-top: 2px solid var(--soft); }
.strip { display: grid; gap: .5rem .75rem; margin: 0 0 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(12.5rem, 45%), 1fr)); }
.wide { grid-template-columns: repeat(auto-fit, minmax(min(15rem, 45%), 1fr)); }
.charts { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 3px; }
figure img.small { image-rendering: pixelated; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-bottom: .2rem; }
svg text { fill: var(--soft); font-size: 13px; }
@media (max-width: 40rem) { svg text { font-size: 16px; } }
svg .grid { stroke: var(--rule); }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .faint { opacity: .3; stroke-width: 1; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; font-size: .85rem; margin: .25rem 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }
details { margin-top: 1rem; }
summary { cursor: pointer; }
footer { margin-top: 3rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
code { overflow-wrap: anywhere; }
pre { background: var(--tint); padding: 1rem; border-radius: 4px; overflow-x: auto;
  font-size: .85rem; }
"""


@dataclass(frozen=True)
class Line:
    """One line of a chart; a value that is not finite leaves a gap."""

    name: str  # shown in the legend; lines of one name share a colour and one entry
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False  # drawn thin and pale, below the others


@dataclass
class Page:
    """An HTML page, built from top to bottom. Every text is escaped."""

    title: str
    parts: list[str] = field(default_factory=list)

    def section(self, heading: str) -> None:
        """Starts a section."""
        self.parts.append(f"<h2>{escape(heading)}</h2>")

    def subsection(self, heading: str) -> None:
        """Starts a part of a section."""
        self.parts.append(f"<h3>{escape(heading)}</h3>")

    def paragraph(self, text: str, *, style: str = "") -> None:
        """Adds a paragraph; `style` is "", "lead" or "note"."""
        attribute = f' class="{escape(style)}"' if style else ""
        self.parts.append(f"<p{attribute}>{escape(text)}</p>")

    def table(
        self,
        columns: Mapping[str, str],
        rows: Sequence[Mapping[str, Any]],
        *,
        bold: Collection[tuple[int, str]] = (),
        quiet: Collection[int] = (),
        groups: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Adds a table.

        Args:
            columns: Title by key, in order.
            rows: Values by key; a missing one is a dash.
            bold: (row index, key) of the cells to stress.
            quiet: Indices of the rows to set apart in grey.
            groups: (title, number of columns) of a header above the header, from left to right.
        """
        right = {key for key in columns if any(_is_number(row.get(key)) for row in rows)}
        side = {key: ' class="number"' if key in right else "" for key in columns}
        head = "".join(f"<th{side[key]}>{escape(title)}</th>" for key, title in columns.items())
        if groups:
            above = "".join(f'<th colspan="{size}">{escape(text)}</th>' for text, size in groups)
            head = f"{above}</tr><tr>{head}"
        lines = []
        for index, row in enumerate(rows):
            cells = [
                f"<b>{format_value(row.get(key))}</b>" if (index, key) in bold else format_value(row.get(key))
                for key in columns
            ]
            paired = zip(columns, cells, strict=True)
            line = "".join(f"<td{side[key]}>{c}</td>" for key, c in paired)
            lines.append(f'<tr class="quiet">{line}' if index in quiet else f"<tr>{line}")
        self.parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</thead><tbody>{"".join(lines)}</tbody></table></div>'
        )

    def key_values(self, facts: Mapping[str, Any]) -> None:
        """Adds a table of names and values."""
        lines = [f"<tr><th>{escape(k)}</th><td>{format_value(v)}</td>" for k, v in facts.items()]
        self.parts.append(f'<div class="scroll"><table>{"".join(lines)}</table></div>')

    def figures(self, images: Sequence[tuple[str, np.ndarray]], *, max_side_px: int = 640, wide: bool = False) -> None:
        """Adds captioned pictures side by side, all of one width; `wide` ones fill the page. See `figure`."""
        inside = "".join(figure(image, text, max_side_px=max_side_px) for text, image in images)
        self.parts.append(f'<div class="strip{" wide" * wide}">{inside}</div>')

    def charts(self, charts: Sequence[str]) -> None:
        """Adds charts (from `line_chart`) in a grid."""
        self.parts.append(f'<div class="charts">{"".join(charts)}</div>')

    def details(self, summary: str, text: str) -> None:
        """Adds preformatted text behind a fold."""
        self.parts.append(f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>")

    def footer(self, text: str, code: str) -> None:
        """Adds a closing line: a text and a command."""
        self.parts.append(f"<footer>{escape(text)} <code>{escape(code)}</code></footer>")

    def html(self) -> str:
        """The whole page."""
        title = escape(self.title)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
            + "\n".join(self.parts)
            + "\n</body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Writes the page beside `path` and moves it into place."""
        beside = path.with_name(f".{path.name}.part")
        beside.write_text(self.html(), encoding="utf-8")
        os.replace(beside, path)
        return path


def format_value(value: Any) -> str:
    """A table cell as escaped text: four decimals for a float, a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        number = float(value)
        return f"{number:.4f}" if abs(number) < 1000 else f"{number:.4g}"
    return escape(str(value))


def figure(image: np.ndarray, caption: str, *, max_side_px: int) -> str:
    """A captioned picture as a data URI: PNG up to LOSSLESS_PX, else JPEG with full chroma.

    Args:
        image: (H, W, 3) or (H, W) uint8.
        caption: Shown above, and read out by screen readers.
        max_side_px: Larger pictures are shrunk to this.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"figure {caption!r}: expected uint8 pixels, got {image.dtype}")
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    side, file = max(image.shape[:2]), io.BytesIO()  # a shrunk picture is none of the small ones
    kind = "png" if side <= LOSSLESS_PX else "jpeg"
    picture.save(file, kind, **({} if kind == "png" else {"quality": 82, "subsampling": 0}))
    small = ' class="small"' if side <= SMALL_PX else ""
    data = base64.b64encode(file.getvalue()).decode("ascii")
    text = escape(caption)
    return (
        f'<figure><figcaption>{text}</figcaption><img{small} alt="{text}" '
        f'src="data:image/{kind};base64,{data}" '
        f'width="{picture.width}" height="{picture.height}"></figure>'
    )


def line_chart(title: str, lines: Sequence[Line], *, y_label: str = "", x_label: str = "optimizer step") -> str:
    """A chart with linear axes as inline SVG; empty without a finite point."""
    segments = [(line, _segments(_thin(line))) for line in lines]
    points = [point for _, parts in segments for part in parts for point in part]
    if not points:
        return ""
    x_ticks, x_low, x_high = _axis([x for x, _ in points])
    y_ticks, y_low, y_high = _axis([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return (
            LEFT + across * (CHART_WIDTH - LEFT - RIGHT),
            CHART_HEIGHT - BOTTOM - up * (CHART_HEIGHT - TOP - BOTTOM),
        )

    drawing = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        drawing.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}H{CHART_WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.5g}</text>'
        )
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        label = f"{tick:,.0f}" if tick == int(tick) else f"{tick:g}"
        y = CHART_HEIGHT - BOTTOM + 17
        drawing.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{label}</text>')
    middle = (LEFT + CHART_WIDTH - RIGHT) // 2
    drawing.append(f'<text x="{middle}" y="{CHART_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + CHART_HEIGHT - BOTTOM) // 2
    drawing.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    names = list(dict.fromkeys(line.name for line in lines))
    colors = {name: f"var(--c{index % 6})" for index, name in enumerate(names)}
    for line, parts in sorted(segments, key=lambda pair: not pair[0].faint):
        color, faint = colors[line.name], " faint" if line.faint else ""
        for part in parts:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in part))
            drawing.append(f'<path class="line{faint}" fill="none" stroke="{color}" d="M{path}"/>')
        num_points = sum(len(part) for part in parts)
        if num_points <= 40 and not line.faint:
            drawing += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2" fill="{color}">'
                f"<title>{escape(line.name)}, {escape(x_label)} {x:g}: {y:.5g}</title></circle>"
                for part in parts
                for x, y in part
                for px, py in [place(x, y)]
            ]
    entries = "".join(f'<span><i style="background:{colors[name]}"></i>{escape(name)}</span>' for name in names)
    legend = f'<div class="legend">{entries}</div>' if len(names) > 1 else ""
    return (
        f"<figure><h3>{escape(title)}</h3>{legend}"
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawing)}</svg></figure>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _thin(line: Line) -> list[tuple[float, float]]:
    """At most about MAX_POINTS points: the lowest and the highest of each run of neighbours."""
    points = [(float(x), float(y)) for x, y in zip(line.x, line.y, strict=True)]
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        run = points[start : start + size]
        finite = [point for point in run if math.isfinite(point[1])] or run[:1]
        ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _segments(points: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Cuts a line where a value is not finite."""
    parts: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            parts[-1].append(point)
        elif parts[-1]:
            parts.append([])
    return [part for part in parts if part]


def _axis(values: Sequence[float]) -> tuple[list[float], float, float]:
    """Round ticks inside the range, and the range; a single value gets room on both sides."""
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 0.5
    low, high = low - (margin if low == high else 0), high + (margin if low == high else 0)
    ticks = [float(t) for t in MaxNLocator(nbins=5).tick_values(low, high)]
    room = 0.03 * (high - low)
    return [t for t in ticks if low - room <= t <= high + room], low - room, high + room
