"""Sets on the disk: what belongs to one is found in one order and under one key each; nothing outside of root is."""

import os
from pathlib import Path

import pytest

from depthany.data.files import DecodeError
from depthany.data.shards import KEY
from depthany.data.sources.tree import ForeignTars, ImageList, ImageTree, PackError, is_container, is_streamed
from tests.data.sources.writers.unlabelled import picture, put, tar_of


def tree(root: Path, *patterns: str, name: str = "set", step_s: float | None = None) -> ImageTree:
    return ImageTree(
        name=name, root=str(root), patterns=list(patterns or ["*"]), example="a.jpg", frame_step_s=step_s, quality=95
    )


def test_patterns_choose_and_the_order_is_that_of_names(tmp_path: Path) -> None:
    files = [
        "b.jpg",
        "a.JPG",
        "x/2.png",
        "x/10.png",
        "w/y/z.webp",
        "x.tar",
        "v/data.mdb",
        "v/lock.mdb",
        "m.MOV",
        "t.txt",
    ]
    put(tmp_path, dict.fromkeys([*files, ".hidden/a.jpg", "x/.b.jpg", "x/._2.png"], b""))
    everything = ["a.JPG", "b.jpg", "m.MOV", "x.tar", "v/data.mdb", "w/y/z.webp", "x/10.png", "x/2.png"]
    assert list(tree(tmp_path).walk()) == everything
    assert list(tree(tmp_path, "*.jpg", "*/y/*").walk()) == ["a.JPG", "b.jpg", "w/y/z.webp"]
    assert list(tree(tmp_path / "w" / "y", "*/w/y/*.webp").walk()) == ["z.webp"]  # root may lie anywhere in the layout
    source = tree(tmp_path, "*.gif")
    assert list(source.walk()) == [] and source.other == everything[:3]


def test_keys_are_safe_and_unique(tmp_path: Path) -> None:
    source = tree(tmp_path)
    files = [
        "a.jpg",
        "a.png",
        "a_jpg",
        "a b.jpg",
        "a%b.jpg",
        "ä.jpg",
        "x.tar/a.jpg",
        os.fsdecode(b"\xff.jpg"),
        "n" * 300 + ".jpg",
    ]
    named = [(path, None) for path in files]
    named += [(path, "a.jpg") for path in ("x.tar", "x.tar.gz", "x.tgz", "y/x.tar", "x.mov", "my.x.tar", "my_x.tar")]
    named += [("x_lmdb/data.mdb", "00ff.webp"), ("x_lmdb/data.mdb", "00ff.jpg"), ("data.mdb", "00ff.jpg")]
    keys = [source.key(*pair) for pair in named]
    assert len(set(keys)) == len(keys) and all(KEY.fullmatch(key) and key.startswith("set/") for key in keys)
    assert source.key("train/x.tar.gz", "./in/b.JPEG") == "set/train/x_tar_gz/in/b_JPEG"
    assert source.key("bedroom_train_lmdb/data.mdb", "00ff.webp") == "set/bedroom_train_lmdb/00ff_webp"
    assert source.key("videos/train/x.mov", "000012.jpg") == "set/videos/train/x_mov/000012_jpg"


def test_links_lead_nowhere_outside(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    put(root, {"a.jpg": b"a", "in/b.jpg": b"b"})
    put(tmp_path, {"out/c.jpg": b"c", "out/x.tar": tar_of({"d.jpg": b"d"})})
    (root / "inside.jpg").symlink_to("in/b.jpg")
    (root / "outside.jpg").symlink_to(tmp_path / "out" / "c.jpg")
    (root / "x.tar").symlink_to(tmp_path / "out" / "x.tar")
    (root / "folder").symlink_to(tmp_path / "out")
    (tmp_path / "alias").symlink_to(root)  # root itself may be a link
    for place in (root, tmp_path / "alias"):
        source = tree(place)
        assert list(source.walk()) == ["a.jpg", "inside.jpg", "outside.jpg", "x.tar", "in/b.jpg"]
        assert source.problems == [("folder", "unsafe: a link to a folder is not followed; name that folder as root")]
        assert source.read("inside.jpg") == b"b"
        with pytest.raises(DecodeError, match="leads out of root"):
            source.read("outside.jpg")
        assert "leads out of root" in source.look("x.tar").problem


def test_prepared_sets_and_downloads_are_left_alone(tmp_path: Path) -> None:
    put(tmp_path, {"a.jpg": b"", "a.jpg.aria2": b"", "b.jpg.part": b"", "c.jpg": b""})
    put(
        tmp_path,
        {
            "shards/set/plan.jsonl": b"",
            "shards/set/set-000000.tar": b"",
            "other/shards.json": b"{}",
            "other/d.jpg": b"",
        },
    )
    source = tree(tmp_path)
    assert list(source.walk()) == ["c.jpg"]
    assert [path for path, _ in source.problems] == ["a.jpg"]
    with pytest.raises(PackError, match="prepared set already"):
        tree(tmp_path / "shards" / "set")
    assert list(ForeignTars(name="set", root=str(tmp_path / "shards" / "set"), patterns=["*"]).walk()) == [
        "set-000000.tar"
    ]


def test_a_list_file(tmp_path: Path) -> None:
    put(tmp_path, {"in/a.jpg": b"a", "in/my photo.jpg": b"p", "far/b.jpg": b"b", "in/x.tar": tar_of({"c.jpg": b"c"})})
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "far" / "b.jpg")
    lines = [
        "a.jpg",
        "my photo.jpg",
        "",
        str(tmp_path / "far/b.jpg"),
        "x.tar",
        "link.jpg",
        "a.jpg",
        "../far/b.jpg",
        "notes.txt",
    ]
    put(tmp_path, {"in/list.txt": "\r\n".join(lines).encode()})
    source = ImageList(
        name="set", root=str(tmp_path / "in/list.txt"), patterns=["*"], example="", frame_step_s=None, quality=95
    )
    found = list(source.walk())
    assert found == ["a.jpg", "my photo.jpg", str(tmp_path / "far/b.jpg"), "x.tar", "link.jpg"]
    assert [source.read(path) for path in found if path != "x.tar"] == [b"a", b"p", b"b", b"b"]
    assert list(source.open("x.tar").read(0, 1)) == [("c.jpg", b"c")]
    assert [path for path, _ in source.problems] == ["../far/b.jpg", "notes.txt"]
    assert len({source.key(path) for path in found}) == len(found)
    assert source.key(f"{tmp_path}/far/b.jpg") != source.key(f"{tmp_path}/far/b.jpg".lstrip("/"))


def test_bad_options_are_told_in_one_line(tmp_path: Path) -> None:
    put(tmp_path, {"v.mp4": b""})
    for made, message in (
        (lambda: tree(tmp_path, name="a/b"), "cannot name files"),
        (lambda: tree(tmp_path / "no"), "no folder"),
        (lambda: tree(tmp_path, step_s=0), "more than 0 seconds"),
        (lambda: tree(tmp_path).look("v.mp4"), "frame_step_s"),
        (
            lambda: ImageTree(name="a", root=".", patterns=[], example="", frame_step_s=None, quality=95),
            "takes nothing",
        ),
    ):
        with pytest.raises(PackError, match=message) as caught:
            made()
        assert "\n" not in str(caught.value)


def test_kinds_of_files() -> None:
    assert all(map(is_container, ["a.tar", "a/b.TAR.GZ", "x.tgz", "x_lmdb/data.mdb", "v.mov", "v.MP4"]))
    assert not any(map(is_container, ["a.jpg", "lock.mdb", "._a.tar", "x.tar.part", "x.zip", "tar"]))
    assert is_streamed("a.tar.gz") and is_streamed("a.mov") and not is_streamed("a.tar") and not is_streamed("data.mdb")


def test_reading_never_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    put(tmp_path, {"a.jpg": picture(1)})
    with pytest.raises(DecodeError, match="not a plain file"):
        tree(tmp_path).read("pipe.jpg")
    assert tree(tmp_path).read("a.jpg") == picture(1)
    with pytest.raises(DecodeError, match="unreadable: "):
        tree(tmp_path).read("b.jpg")
