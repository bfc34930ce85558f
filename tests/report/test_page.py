"""The page stands alone, escapes what it shows and holds the numbers it was given."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthany.report.page import MAX_POINTS, Line, Page, figure, line_chart
from depthany.report.run_page import Panel, read_metrics, smooth, write_run_page

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
images_per_s
0,0.001,0,0.9,0.3,,,
0,,9,0.5,0.2,,,41.5
0,,9,,,0.25,0.61,
1,0.0005,19,nan,0.1,,,42.5
1,,19,,,0.125,0.86,
1,,9,0.45,,,,
1,,29,0.3x
"""


@pytest.fixture
def page(tmp_path: Path) -> str:
    run = tmp_path / "teacher-<b>0"
    run.mkdir()
    (run / "metrics.csv").write_text(METRICS)
    (run / "config.yaml").write_text("loss:\n  note: '<i>tag</i>'\n")
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = write_run_page(
        run,
        panels=[Panel(f"sample {NASTY}", [("image", image), (NASTY, image[..., 0])])],
        rows=[
            {"model": "teacher", "source": "indoor", "abs_rel": 0.1250, "delta1": 0.8601,
             "negative_scale": 0, "images": 100},
            {"model": "student", "source": "indoor", "abs_rel": 0.1377, "delta1": 0.8402,
             "negative_scale": 0.02, "images": 100},
            {"model": "student", "source": "outdoor", "abs_rel": math.nan, "delta1": 0.7003,
             "negative_scale": math.nan, "images": 0},
        ],
        facts={"revision": "abc123", "note": NASTY},
        skipped=[("indoor", "indoor/a", "truncated"), ("indoor", NASTY, "empty")],
    )  # fmt: skip
    assert path == run / "report.html"
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "metrics.csv", "report.html"]
    return path.read_text(encoding="utf-8")


def test_run_page_stands_alone_and_escapes(page: str) -> None:
    reader = Reader(page)
    assert_self_contained(page, reader)
    assert NASTY in "".join(reader.text) and "<i>tag</i>" in "".join(reader.text)


def test_run_page_holds_what_it_was_given_in_reading_order(page: str) -> None:
    text = "\n".join(Reader(page).text)
    assert "teacher: AbsRel 0.1250 and δ1 0.8601 on indoor (100 images)." in text
    for value in ("0.1377", "0.8402", "0.7003", "abc123", "truncated", "42.5"):
        assert value in text
    places = [
        text.index(f"\n{heading}\n")
        for heading in ("Result", "Pictures", "Training loss", "Validation",
                        "Learning rate and throughput", "Skipped samples", "Run record",
                        "Composed configuration")
    ]  # fmt: skip
    assert places == sorted(places)
    assert page.count("data:image/") == 2
    assert "<b>0.1250</b>" in page and "<b>0.1377</b>" not in page and "<b>0.7003</b>" not in page


def test_an_empty_run_still_has_a_page(tmp_path: Path) -> None:
    html = write_run_page(tmp_path, panels=[], rows=[], facts={}, skipped=[]).read_text()
    assert_self_contained(html, Reader(html))
    assert "no final evaluation" in html and "No training loss" in html


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
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    html = figure(image, "a & b", max_side_px=64, lossless=True)
    data = re.search(r"base64,([^\"]*)", html)
    assert data and (np.asarray(Image.open(io.BytesIO(base64.b64decode(data[1])))) == image).all()
    assert "a &amp; b" in html
    with pytest.raises(ValueError, match="uint8"):
        figure(image / 255.0, "float", max_side_px=64)


def test_a_table_shows_gaps_as_dashes() -> None:
    page = Page("t")
    page.table({"a": "A", "b": "B"}, [{"a": 1, "b": None}, {"a": math.nan}])
    assert page.html().count("–") == 3
