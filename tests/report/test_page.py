"""The page stands alone, escapes what it shows and holds the numbers it was given."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from depthany.report.page import LOSSLESS_PX, MAX_POINTS, SMALL_PX, Line, Page, figure, line_chart
from depthany.report.run_page import Panel, headline, read_metrics, smooth, write_run_page

SPACE = "\N{NO-BREAK SPACE}"
VOID = {"meta", "img", "link", "br", "hr"}
OPTIONAL_END = {"tr", "td", "th", "thead", "tbody"}
NASTY = "<script>alert('x')</script> & \"quoted\""


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag:
            assert self.open.pop() in OPTIONAL_END
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def assert_self_contained(html: str, reader: Reader) -> None:
    assert not {"script", "link", "iframe", "base"} & set(reader.tags)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", html)
    assert "@import" not in html and "url(" not in html
    for name, value in reader.attributes:
        assert name not in ("src", "href", "data") or value.startswith("data:")
        assert not name.startswith("on")


METRICS = """epoch,lr,step,train/loss,train/loss/gradient,val/indoor/abs_rel,val/indoor/delta1,\
images_per_s,data_wait
0,0.001,0,0.9,0.3,,,,
0,,9,0.5,0.2,,,41.5,0.25
0,,9,,,0.25,0.61,
1,0.0005,19,nan,0.1,,,42.5,0.25
1,,19,,,0.125,0.86,
1,,9,0.45,,,,
1,,29,0.3x
"""


def row(model: str, source: str, abs_rel: float, negative_scale: float = 0.0) -> dict[str, Any]:
    scores = {"abs_rel": abs_rel, "delta1": 1 - abs_rel, "negative_scale": negative_scale}
    return {"model": model, "source": source, "images": 0 if math.isnan(abs_rel) else 100} | scores


ROWS = [
    row("constant", "indoor", 0.3811),
    row("mean map", "indoor", 0.2500),
    row("mean map", "outdoor", 0.1),
    row("teacher", "indoor", 0.1250, 0.03),
    row("student", "indoor", 0.1375, 0.02),
    row("student", "outdoor", math.nan, math.nan),
]


@pytest.fixture
def page(tmp_path: Path) -> str:
    run = tmp_path / "teacher-<b>0"
    run.mkdir()
    (run / "metrics.csv").write_text(METRICS)
    (run / "config.yaml").write_text("loss:\n  note: '<i>tag</i>'\n")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = write_run_page(
        run,
        models=["teacher", "student"],
        rows=ROWS,
        validation=[
            Panel(f"indoor/{NASTY}", [("image", image), (NASTY, image[..., 0])]),
            Panel("indoor/b", [("image", image)]),
        ],
        pseudo_labels=[Panel("street/c", [("clean", image)])],
        facts={"revision": "abc123", "note": NASTY, "command": "python -m depthany.train a=b"},
        skipped=[
            ("indoor", "indoor/a", "truncated"),
            ("indoor", "indoor/b", "truncated"),
            ("indoor", NASTY, "empty"),
        ],
    )
    assert path == run / "report.html"
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "metrics.csv", "report.html"]
    return path.read_text(encoding="utf-8")


def test_run_page_stands_alone_and_escapes(page: str) -> None:
    reader = Reader(page)
    assert_self_contained(page, reader)
    assert NASTY in "".join(reader.text) and "<i>tag</i>" in "".join(reader.text)


def test_run_page_holds_what_it_was_given_in_reading_order(page: str) -> None:
    text = "\n".join(Reader(page).text)
    assert f"Throughput, median: 42.0 images/s, 25.0{SPACE}% of the time waiting for data." in text
    headings = ("Result", "Validation images", "indoor", "Pseudo-labels", "street", "Training",
                "Loss: weighted sum", "Loss: gradient, unweighted", "Learning rate", "Throughput",
                "Validation", "Skipped samples", "Run facts", "Composed configuration",
                "python -m depthany.train a=b")  # fmt: skip
    places = [text.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    assert page.count("<h3>indoor</h3>") == 1  # the panels of a source together
    assert page.count("data:image/") == 4
    for label in ("loss", "gradient loss", "learning rate", "images/s", "AbsRel ↓", "δ1 ↑"):
        assert f">{label}</text>" in page
    assert page.count("python -m depthany.train") == 1  # in the footer only
    assert '<td>empty</td><td class="number">1</td>' in page
    assert '<td>truncated</td><td class="number">2</td>' in page


def test_the_result_has_a_line_per_model_and_stresses_the_best(page: str) -> None:
    lines = page.split("<tbody>")[1].split("</tbody>")[0].split("<tr")[1:]
    names = ["teacher", "student", "constant", "mean map"]
    assert [next(name for name in names if name in line) for line in lines] == names
    assert ['class="quiet"' in line for line in lines] == [False, False, True, True]
    # one score of a source is no comparison; the negative scale of a constant is none either
    bold = [re.findall("<b>([^<]*)</b>", line) for line in lines]
    assert bold == [["0.1250", "0.8750"], ["0.0200"], [], []]


def test_the_headline_compares_source_by_source() -> None:
    assert headline(ROWS, ["teacher", "student"]) == [
        f"On indoor the student scores AbsRel 0.1375: 10.0{SPACE}% worse than its teacher (0.1250) "
        f"and 45.0{SPACE}% better than the strongest trivial predictor, mean map (0.2500).",
        "On outdoor the student has no score.",
    ]
    assert headline([row("mean map", "a", 0.2), row("teacher", "a", 0.2)], ["teacher"]) == [
        "On a the teacher scores AbsRel 0.2000: level with the strongest trivial predictor, mean map (0.2000)."
    ]
    alone = [row("teacher", "a", 0.2)]
    assert headline(alone, ["teacher"]) == ["On a the teacher scores AbsRel 0.2000."]


def test_an_empty_run_still_has_a_page(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"rows": [], "validation": [], "pseudo_labels": [], "skipped": []}
    html = write_run_page(tmp_path, models=["teacher"], facts={}, **empty).read_text()
    assert_self_contained(html, Reader(html))
    assert "no final evaluation" in html and "No training loss" in html and "<footer" not in html


def test_many_large_pictures_stay_below_a_megabyte(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (18, 18, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((518, 518), Image.Resampling.BICUBIC))
    panels = [Panel(f"a/{i}", [("image", image)] * 5) for i in range(20)]
    none: dict[str, Any] = {"rows": [], "facts": {}, "skipped": []}
    path = write_run_page(tmp_path, models=["student"], validation=panels, pseudo_labels=panels[:4], **none)
    assert path.stat().st_size < 1_000_000


def test_sparse_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(METRICS)
    metrics = read_metrics(tmp_path / "metrics.csv")
    assert metrics["val/indoor/abs_rel"] == ([9.0, 19.0], [0.25, 0.125])
    assert metrics["train/loss"][0] == [0.0, 9.0, 19.0]
    assert metrics["train/loss"][1][:2] == [0.9, 0.45]  # the later row of a step counts
    assert "epoch" not in metrics and "step" not in metrics
    assert read_metrics(tmp_path / "none.csv") == {}


def test_smoothing_keeps_constants_and_skips_gaps() -> None:
    assert smooth([3.0] * 200) == pytest.approx([3.0] * 200)
    values = smooth([1.0, math.nan, 1.0] * 50)
    assert math.isnan(values[1]) and values[-1] == pytest.approx(1.0)
    assert smooth([]) == []


def test_charts_take_anything() -> None:
    assert line_chart("empty", [Line("a", [], []), Line("b", [1], [math.nan])]) == ""
    for chart in (
        line_chart("one point", [Line("a", [5], [2.0])]),
        line_chart("flat", [Line("a", [0, 1], [0.0, 0.0])]),
        line_chart(NASTY, [Line(NASTY, [0, 1, 2, 3], [1.0, math.inf, 2.0, -3.0])]),
    ):
        Reader(chart)
        for number in re.findall(r' (?:cx|cy|x|y)="([^"]*)"', chart):
            assert math.isfinite(float(number))


def test_a_long_curve_is_thinned_but_keeps_its_extremes() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    chart = line_chart("long", [Line("a", range(50_000), values.tolist())])
    assert chart.count("L") <= MAX_POINTS + 2
    drawn = chart.split('class="line"')[1]
    heights = [float(y) for y in re.findall(r"[ML]?[\d.]+ ([\d.]+)", drawn)]
    everything = line_chart("extremes", [Line("a", [0, 1], [values.min(), values.max()])])
    ends = re.findall(r"[\d.]+ ([\d.]+)", everything.split('class="line"')[1].split("/>")[0])
    assert {min(heights), max(heights)} == {float(ends[0]), float(ends[1])}


def test_a_picture_comes_back() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, LOSSLESS_PX, 3), dtype=np.uint8)
    html = figure(image, "a & b", max_side_px=LOSSLESS_PX)
    data = re.search(r"base64,([^\"]*)", html)
    assert data and (np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1])))) == image).all()
    assert "a &amp; b" in html and html.index("<figcaption>") < html.index("<img")
    with pytest.raises(ValueError, match="uint8"):
        figure(image / 255.0, "float", max_side_px=64)


def test_only_small_pictures_show_their_pixels() -> None:
    large = np.zeros((9, SMALL_PX + 1, 3), np.uint8)
    assert 'class="small"' in figure(large[:, 1:], "", max_side_px=640)
    assert 'class="small"' not in figure(large, "", max_side_px=640)


def test_a_table_shows_gaps_as_dashes() -> None:
    page = Page("t")
    page.table({"a": "A", "b": "B"}, [{"a": 1, "b": None}, {"a": math.nan}])
    assert page.html().count("–") == 3
