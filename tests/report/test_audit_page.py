"""The page says what is flagged, in words, and shows where the label's edges are."""

from pathlib import Path

import numpy as np
import pytest

from depthany.report.audit_page import RED, Group, Picture, overlay, write_audit_page


def picture(*, height: int = 60, width: int = 80) -> Picture:
    """A step of depth in the middle; the left upper corner is sky, the right upper corner not measured."""
    disparity = np.full((height, width), 0.2, np.float32)
    disparity[:, width // 2 :] = 1.0
    sky, valid = np.zeros((height, width), bool), np.ones((height, width), bool)
    sky[:10, :10] = True
    valid[:10, -10:] = False
    return Picture(
        *("one <&>", "3 <nan>", np.full((height, width, 3), 90, np.uint8)),
        *(np.where(sky, 0, disparity).astype(np.float32), valid, sky),
    )


def test_edges_are_where_the_depth_steps() -> None:
    shown = overlay(picture())
    red = (shown == RED).all(-1)
    assert red[20:, 39:42].any(1).all()
    assert not red[20:, :38].any() and not red[20:, 43:].any()
    assert red[:12, :12].any(), "the border of the sky"
    assert not red[:12, 60:].any(), "a hole has no edge"


@pytest.mark.parametrize("scale", [2, 20])
def test_the_label_may_have_another_size(scale: int) -> None:
    one = picture()
    large = one._replace(image=np.zeros((60 * scale, 80 * scale, 3), np.uint8))
    red = (overlay(large) == RED).all(-1)
    assert min(red.shape) <= 320
    columns = np.flatnonzero(red[red.shape[0] // 2])
    assert abs(columns.mean() / red.shape[1] - 0.5) < 0.03


def test_every_flag_is_said_with_its_evidence(tmp_path: Path) -> None:
    depths = [np.geomspace(0.5, 20, 101), np.geomspace(1, 9, 101)]
    said = [("wrong unit", "flagged", "median 3000 m"), ("misaligned", "clean", "0 px")]
    groups = [
        Group("first", said, {"samples": 2}, depths, "m", [0.1, 50]),
        Group("second", [("wrong unit", "cannot tell", "up to scale")], {"samples": 0}, [], "unknown unit", None),
    ]
    page = write_audit_page(
        tmp_path / "new/page.html",
        title="Audit of <mine>",
        groups=groups,
        worst=[picture()],
        random=[],
        faults=[(f"a/{i}", "2 nan") for i in range(300)],
        skipped=[("b.png", "no label")],
        command="go",
    )
    html = page.read_text(encoding="utf-8")
    assert html.index("2 flagged") < html.index("Correct the metres") < html.index("<img") < html.index("<table")
    assert "2 flagged" in html and "first: wrong unit: median 3000 m." in html
    assert "cannot tell" in html and "the card&#x27;s range" in html and html.count("<svg") == 2
    assert (
        "&lt;mine&gt;" in html
        and "one &lt;&amp;&gt;" in html
        and "3 &lt;nan&gt;" in html
        and "Random samples" not in html
    )
    assert "The first 200 are shown." in html and "no label" in html and html.count("<img") == 3


def test_a_label_without_a_pixel_is_shown() -> None:
    empty = picture()._replace(valid=np.zeros((60, 80), bool))
    assert not (overlay(empty) == RED).all(-1).any()
