"""The page of a set's labels: it stands alone, escapes what it shows, and its numbers are those that were counted."""

import numpy as np
import pytest

from depthany.report.label_page import BINS, COLUMNS, MAX_DAMAGED_SHOWN, Survey, histogram, write_label_page
from depthany.report.run_page import Panel
from tests.report.test_page import NASTY, Reader, assert_self_contained

FACTS = {"teacher": "teacher-12345678", "input_size": 518, "codec": "png16", "precision": None}


def panel(title: str) -> Panel:
    return Panel(
        title=title, images=[(NASTY, np.full((30, 40, 3), 99, np.uint8)), ("label", np.zeros((6, 8, 3), np.uint8))]
    )


def written(tmp_path, survey: Survey, *, worst=(), chosen=()) -> tuple[str, Reader]:
    path = write_label_page(
        tmp_path / "labels.html", name=NASTY, survey=survey, worst=worst, chosen=chosen, facts=FACTS
    )
    assert [p.name for p in tmp_path.iterdir()] == ["labels.html"]
    html = path.read_text(encoding="utf-8")
    reader = Reader(html)
    assert_self_contained(html, reader)
    return html, reader


def scored(scores: np.ndarray) -> Survey:
    survey = Survey(num_images=len(scores) + 2, num_labels=len(scores), num_bytes=10**9, num_flat=7)
    for column in COLUMNS:
        survey.add(column, scores)
    return survey


def test_counts_do_not_depend_on_how_the_shards_are_cut():
    values = np.random.default_rng(0).random(5000)
    survey = Survey()
    for part in np.array_split(values, 7):
        survey.add("flip", part)
    whole = Survey()
    whole.add("flip", values)
    assert (survey.columns["flip"] == whole.columns["flip"]).all() and survey.columns["flip"].sum() == 5000
    for share in (0.01, 0.5, 0.99):
        assert survey.percentile("flip", share) == pytest.approx(np.quantile(values, share), abs=2 / BINS)
    for value in (0.5, 0.6, 0.9):
        assert survey.share_from("flip", value) == (values >= value).mean()


def test_values_out_of_range_are_counted_at_the_ends():
    survey = Survey()
    survey.add("contrast", [1.7, 1.0, -0.1, 0.0])
    assert survey.columns["contrast"][[0, -1]].tolist() == [2, 2]


def test_a_page_with_scores(tmp_path):
    survey = scored(np.repeat([0.2, 0.95], [25, 75]))
    survey.damaged = [(f"set/{NASTY}{i}", "cut short") for i in range(MAX_DAMAGED_SHOWN + 5)]
    html, reader = written(tmp_path, survey, worst=[panel("set/worst: score 0.010")], chosen=[panel("set/some")])
    text = " ".join(reader.text)
    for told in (
        "100 of 102 images are labelled; 105 are damaged.",
        "The median score is 0.950; 25.00% of the labels score below 0.6",
        "7 maps are nearly constant",
        "mirrored, and smaller",
        "105 images cannot be read and have no label; the first 100 are",
        "set/worst: score 0.010",
        "set/some",
        "1.000 GB, 10,000.0 kB for each label",
        "teacher-12345678",
    ):
        assert told in text, told
    assert html.count("<svg") == 4 and html.count("<img") == 4 and html.count("cut short") == MAX_DAMAGED_SHOWN
    assert "75.00%" in text and "<script>" not in html


def test_a_page_without_scores_or_labels(tmp_path):
    html, reader = written(tmp_path, Survey(num_images=3, num_labels=3, num_bytes=300), chosen=[panel("set/some")])
    assert "<svg" not in html and "score" not in " ".join(reader.text).replace("set/some", "")
    empty = Survey(num_images=2, damaged=[("a", "b"), ("c", "d")])
    assert "0 of 2 images are labelled; 2 are damaged" in written(tmp_path, empty)[0]


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.5], np.linspace(0, 1, 999), [0.0, 1.0], np.linspace(0.3, 0.31, 9)])
def test_the_bars_of_a_histogram_hold_all_labels(values):
    survey = Survey()
    survey.add("flip", values)
    drawing = histogram("flip", survey.columns["flip"], note="note")
    shares = [float(part.partition("%")[0]) for part in drawing.split(": ")[1:] if "%" in part.partition("<")[0]]
    assert sum(shares) == pytest.approx(100, abs=1) and 10 <= len(shares) <= 41
    assert "nan" not in drawing
