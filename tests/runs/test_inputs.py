"""What a user may name, and that no two outputs share a name."""

import os
from io import BytesIO, TextIOWrapper
from pathlib import Path, PurePath

import pytest

from depthany.predict import SAVES as OFFERED
from depthany.runs.inputs import ENDINGS, SAVES, find_inputs, name_outputs, overwritten


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Equal stems in two folders and in one."""
    folder = tmp_path / "photos"
    for name in ("a.jpg", "a.png", "a.mp4", "deep/a.jpg", "broken.jpg", "notes.md"):
        touch(folder / name)
    return folder


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_inputs_of_every_form(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    folder = find_inputs([str(photos)], out)
    assert sorted(p.name for p in folder) == ["a.jpg", "a.jpg", "a.mp4", "a.png", "broken.jpg"]
    assert set(folder.values()) == {photos}
    pattern = find_inputs([str(photos / "**" / "*.jpg")], out)
    assert sorted(p.name for p in pattern) == ["a.jpg", "a.jpg", "broken.jpg"]
    listing = tmp_path / "list.txt"
    listing.write_text(f"{photos}/a.jpg\n\n{photos}/deep/a.jpg\n")
    assert list(find_inputs([str(listing)], out)) == [photos / "a.jpg", photos / "deep" / "a.jpg"]
    assert len(find_inputs([str(photos), str(listing), str(photos / "a.jpg")], out)) == 5
    odd = touch(tmp_path / "odd [1].png")
    assert list(find_inputs([str(odd)], out)) == [odd]
    listing.write_text(f"{photos}/deep\n{photos}/*.png\n~/gone.png\n")  # in a list as on the command line
    named = [str(photos / "deep"), str(photos / "*.png"), os.path.expanduser("~/gone.png")]
    assert find_inputs([str(listing)], out) == find_inputs(named, out)
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(listing.read_bytes())))
    assert find_inputs(["-"], out) == find_inputs(named, out)
    (photos / "link.jpg").symlink_to("nowhere")
    assert photos / "link.jpg" in find_inputs([str(photos)], out)  # so that it is told


def test_earlier_output_inside_the_folder_is_no_input(photos: Path) -> None:
    touch(photos / "maps" / "a.png")
    assert photos / "maps" / "a.png" not in find_inputs([str(photos)], photos / "maps")
    assert photos / "maps" / "a.png" in find_inputs([str(photos)], photos.parent)


def test_names_are_distinct_and_keep_folders() -> None:
    root = Path("/data")
    files = [
        "a.jpg",
        "a.png",
        "a.mov",
        "A.webp",
        "b.png",
        "b.mp4",
        "x/b.png",
        "a.jpg.tif",
        "c.png",
        "c.disparity16.jpg",
    ]
    names = name_outputs({root / name: root for name in files})
    written = [f"{name}{ending}".lower() for name in names.values() for ending in ENDINGS]
    assert len(names) == len(files) and len(set(written)) == len(written)
    assert names[root / "c.png"] == PurePath("c") and names[root / "x/b.png"] == PurePath("x/b")
    single = name_outputs({Path("/data/x/b.png"): Path("/data/x")})
    assert list(single.values()) == [PurePath("b")]
    two = name_outputs({Path("/p/x/b.png"): Path("/p/x"), Path("/p/y/b.png"): Path("/p/y")})
    assert [str(name) for name in two.values()] == [os.path.join("x", "b"), os.path.join("y", "b")]


def test_an_input_that_would_be_replaced_is_found() -> None:
    outputs = {Path("/p/x.tiff"): PurePath("x"), Path("/p/y.mp4"): PurePath("y"), Path("/p/z.jpg"): PurePath("z")}
    assert overwritten(outputs, Path("/p"), ()) == [Path("/p/y.mp4")]
    assert overwritten(outputs, Path("/p"), ("tiff",)) == [Path("/p/x.tiff"), Path("/p/y.mp4")]
    assert overwritten(outputs, Path("/q"), tuple(SAVES)) == []


def test_what_lies_beside_an_input_is_not_overwritten(tmp_path: Path) -> None:
    """Also where nobody named it, and by another way to the folder."""
    for name in ("a.jpg", "a.png"):
        (tmp_path / name).touch()
    (tmp_path / "way").symlink_to(tmp_path)
    outputs = name_outputs({tmp_path / "a.jpg": tmp_path})
    for outdir in (tmp_path, tmp_path / "way"):
        assert overwritten(outputs, outdir, ()) == [tmp_path / "a.png"]
    assert overwritten(outputs, tmp_path / "out", ()) == []


def test_what_is_offered_is_known() -> None:
    assert tuple(SAVES) == OFFERED
