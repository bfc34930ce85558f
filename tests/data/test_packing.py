"""Packing: every image of a set is in a shard with its own bytes, or dropped with a reason, whatever interrupts it."""

import csv
import io
import json
import os
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from depthany.config.build import build
from depthany.config.check import check
from depthany.config.launch import compose
from depthany.data.files import read_image
from depthany.data.packing import Indexing, Packing, decoded
from depthany.data.preparation import PLAN
from depthany.data.shards import Shard, ShardError, read_catalog
from depthany.data.sources.packed import Shards
from depthany.data.sources.tree import ForeignTars, ImageTree, PackError
from tests.data.sources.writers.unlabelled import WRITERS, picture, put, tar_of
from tests.processes import Zygote


def packing(root: Path, out: Path, **options: Any) -> Packing:
    source = ImageTree(name="set", root=str(root), patterns=["*"], example="images", frame_step_s=0.5, quality=95)
    terms: dict[str, Any] = {"samples_per_shard": 5, "min_side": 16, "max_side": None, "quality": 95, "workers": 1}
    return Packing(source=source, out=out, **terms | options)


def images(count: int, start: int = 0) -> dict[str, bytes]:
    return {f"{i:04d}.jpg": picture(i) for i in range(start, start + count)}


def members(out: Path, name: str = "set") -> dict[str, bytes]:
    """{key: bytes} of all shards, as any tar reader sees them, but for what the catalog drops."""
    found: dict[str, bytes] = {}
    for row in json.loads((out / "shards.json").read_text())["shards"]:
        with tarfile.open(out / row["tar"]) as tar:
            for place, member in enumerate(tar):
                if place not in row["dropped"]:
                    key = member.name.rpartition(".")[0]
                    assert key not in found
                    found[key] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def dropped(out: Path) -> dict[str, str]:
    with open(out / "dropped.csv", newline="") as file:
        return {row["key"]: row["reason"] for row in csv.DictReader(file)}


def visible(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name[0] != "."}


# --- the sets of the papers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_every_set_in_its_original_form(name: str, tmp_path: Path) -> None:
    """Composed as the verb does it: every image is there with its own bytes under one key, the rest has a reason."""
    if name == "lsun":
        pytest.importorskip("lmdb", reason="needs depthany[lmdb]")
    keys, reasons = WRITERS[name](tmp_path / "raw")
    options = [f"root={tmp_path / 'raw'}", f"out={tmp_path / 'out'}", "samples_per_shard=3", "min_side=16", "workers=1"]
    cfg = compose("prepare", [f"unlabelled={name}", *options])
    check(cfg)
    from depthany.runs.preparing import open_set

    summary = open_set(cfg, build(cfg.unlabelled)).run()
    assert members(tmp_path / "out") == keys
    told = {key: reason.partition(":")[0] for key, reason in dropped(tmp_path / "out").items()}
    assert told == reasons and summary.dropped == Counter(reasons.values())
    assert (summary.images, summary.problems) == (len(keys), {})
    catalog = read_catalog(str(tmp_path / "out"))
    assert catalog.samples.tolist() == [3] * (summary.shards - 1) + [catalog.samples[-1]] or name != "landmarks_v2"
    assert all(path.name.startswith(f"{name}-0000") for path in (tmp_path / "out").glob("*.tar"))


def test_training_reads_what_is_packed(tmp_path: Path) -> None:
    """Through the catalog: duplicates are not there, and every row knows its image."""
    put(tmp_path / "raw", images(7) | {"copy.jpg": picture(3), "odd.png": picture(50, format="PNG", mode="P")})
    summary = packing(tmp_path / "raw", tmp_path / "out").run()
    source = Shards(name="set", root=str(tmp_path / "out"), labels_root=None, cache=None)
    source.prepare()
    source.open()
    assert len(source) == summary.images == 8
    for i in range(len(source)):
        sample = source.read(i)
        name = sample["key"].removeprefix("set/").replace("_", ".")
        wanted = read_image((tmp_path / "raw" / name).read_bytes())
        np.testing.assert_array_equal(sample["image"], wanted)
    rows = [row for tar in sorted((tmp_path / "out").glob("*.tar")) for row in Shard(tar).rows]
    assert all((row["width"], row["height"], len(row["hash"])) == (40, 30, 32) for row in rows)


def test_the_real_photos(real_root: Path, tmp_path: Path) -> None:
    """185 photos: the README names one that is broken on purpose and three that are tiny."""
    root = real_root / "unlabelled"
    with open(real_root / "unlabelled.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    tiny = {row["image"] for row in rows if min(int(row["width"]), int(row["height"])) < 64}
    broken = {row["image"] for row in rows if row["decodes"] != "yes"}
    summary = packing(root, tmp_path, samples_per_shard=50, min_side=64).run()
    assert (len(rows), len(tiny), len(broken)) == (185, 3, 1)
    assert (summary.images, summary.shards) == (181, 4)
    assert summary.dropped == {"tiny": len(tiny), "undecodable": len(broken)}
    source = ImageTree(name="set", root=str(root), patterns=["*"], example="", frame_step_s=None, quality=95)
    used = {row["image"].removeprefix("unlabelled/") for row in rows if row["image"] not in tiny | broken}
    assert members(tmp_path) == {source.key(path): (root / path).read_bytes() for path in used}


# --- what is dropped, and what is changed -----------------------------------------------------------------------------


def test_bad_files_are_dropped_with_a_reason(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    bomb = bytearray(picture(1, format="PNG"))
    bomb[16:24] = (20000).to_bytes(4, "big") * 2  # a header of 400 million pixels
    jpeg = bytearray(picture(1))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"  # 65535x65535
    put(
        root,
        {
            "good.jpg": picture(1),
            "cut.jpg": picture(2)[:-20],
            "eps.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "bomb.png": bytes(bomb),
            "bomb.jpg": bytes(jpeg),
            "empty.jpg": b"",
            "tiny.jpg": picture(3, size=(15, 40)),
            "text.txt": b"passed over",
        },
    )
    put(tmp_path, {"outside.jpg": picture(4)})
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "inside.jpg").symlink_to("good.jpg")
    (root / "broken.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    (root / "folder.jpg").mkdir()
    packing(root, tmp_path / "out").run()
    assert members(tmp_path / "out") == {"set/good_jpg": picture(1)}
    kinds = {key.removeprefix("set/"): reason.partition(":")[0] for key, reason in dropped(tmp_path / "out").items()}
    assert kinds == {
        "cut_jpg": "undecodable",
        "eps_jpg": "undecodable",
        "bomb_png": "undecodable",
        "bomb_jpg": "undecodable",
        "empty_jpg": "undecodable",
        "tiny_jpg": "tiny",
        "link_jpg": "unsafe",
        "inside_jpg": "duplicate",
        "broken_jpg": "unreadable",
        "pipe_jpg": "unsafe",
    }


def test_bad_members_are_dropped_with_a_reason(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (
            ("a.jpg", tarfile.REGTYPE),
            ("../b.jpg", tarfile.REGTYPE),
            ("/etc/c.jpg", tarfile.REGTYPE),
            ("d.jpg", tarfile.SYMTYPE),
            ("e.jpg", tarfile.LNKTYPE),
            ("f.jpg", tarfile.FIFOTYPE),
            ("._a.jpg", tarfile.REGTYPE),
            ("x.pkl", tarfile.REGTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, data = kind, "/etc/passwd", picture(1)
            member.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(data))
    put(tmp_path / "raw", {"x.tar": buffer.getvalue()})
    summary = packing(tmp_path / "raw", tmp_path / "out").run()
    assert members(tmp_path / "out") == {"set/x_tar/a_jpg": picture(1)}
    assert summary.dropped == {"unsafe": 5}


def test_duplicates_are_found_across_shards_and_the_first_stays(tmp_path: Path) -> None:
    rng = random.Random(0)
    files = {f"{i:03d}.jpg": picture(rng.randrange(12)) for i in range(40)}
    put(tmp_path / "raw", files)
    summary = packing(tmp_path / "raw", tmp_path / "out", samples_per_shard=7).run()
    first = {data: f"set/{name[:3]}_jpg" for name, data in reversed(files.items())}
    assert members(tmp_path / "out") == {key: data for data, key in first.items()}
    assert summary.dropped == {"duplicate": 40 - len(first)}
    for key, reason in dropped(tmp_path / "out").items():
        assert reason == f"duplicate: of {first[files[key[4:7] + '.jpg']]}"


def test_only_larger_images_are_shrunk(tmp_path: Path) -> None:
    put(tmp_path / "raw", {"a.jpg": picture(1, size=(200, 100)), "b.jpg": picture(2, size=(80, 64))})
    put(tmp_path / "raw", {"c.png": picture(3, size=(64, 321), format="PNG"), "d.gif": picture(4, format="GIF")})
    packing(tmp_path / "raw", tmp_path / "out", max_side=80).run()
    shard = Shard(tmp_path / "out" / "set-000000.tar")
    found = {
        key[4:]: (*files, row["width"], row["height"])
        for key, files, row in zip(shard.keys, shard.files, shard.rows, strict=True)
    }
    wanted = {"a_jpg": ("jpg", 80, 40), "b_jpg": ("jpg", 80, 64), "c_png": ("jpg", 16, 80), "d_gif": ("png", 40, 30)}
    assert found == wanted
    assert shard.read(1, "jpg") == picture(2, size=(80, 64))
    np.testing.assert_array_equal(read_image(shard.read(3, "png")), read_image(picture(4, format="GIF")))
    small, large = read_image(shard.read(0, "jpg")), read_image(picture(1, size=(200, 100)))
    assert np.abs(small.astype(int) - cv2.resize(large, (80, 40), interpolation=cv2.INTER_AREA)).mean() < 3
    assert Image.open(io.BytesIO(shard.read(0, "jpg"))).quantization  # type: ignore[attr-defined]  # of JPEG files


def test_a_jpeg_at_an_eighth_shows_the_damage_of_the_whole() -> None:
    """The cheap check of packing against reading as training does, on every kind of damage."""
    rng, data = random.Random(0), picture(1, size=(96, 80))
    verdicts = Counter[tuple[bool, bool]]()
    for _ in range(400):
        broken = bytearray(data)
        at = rng.randrange(len(broken))
        match rng.randrange(3):
            case 0:
                broken = broken[:at]
            case 1:
                broken[at] ^= 1 << rng.randrange(8)
            case 2:
                broken[at : at + 16] = bytes(len(broken[at : at + 16]))
        verdicts[accepts(partial(decoded, reduce_to=1), bytes(broken)), accepts(read_image, bytes(broken))] += 1
    assert (
        verdicts[True, False] == verdicts[False, True] == 0 and min(verdicts[True, True], verdicts[False, False]) > 50
    )


def accepts(read: Any, data: bytes) -> bool:
    try:
        read(data)
    except ValueError:
        return False
    return True


# --- going on ---------------------------------------------------------------------------------------------------------


def test_new_files_become_new_shards_and_old_ones_never_change(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    put(root, images(12) | {"t/x.tar": tar_of(images(4, 100))})
    packing(root, out).run()
    before = visible(out)
    put(root, {"0000a.jpg": picture(60), "new/1.jpg": picture(61), "copy.jpg": picture(1)})
    put(root, {"t/x.tar": tar_of(images(9, 100)), "t/y.tar": tar_of(images(3, 200))})
    summary = packing(root, out).run()
    after = visible(out)
    assert {name: after[name] for name in before if name.startswith("set-")} == {
        name: data for name, data in before.items() if name.startswith("set-")
    }
    assert after[PLAN].startswith(before[PLAN])
    assert summary.made == 3 + 5 + 3 and summary.dropped == {"duplicate": 1}
    assert len(members(out)) == 12 + 9 + 3 + 2
    assert packing(root, out).run().made == 0 and visible(out) == after


def test_what_was_being_downloaded_is_taken_when_it_is_there(tmp_path: Path) -> None:
    """A half-written file is dropped, a cut tar gives its whole images; the next run takes the rest."""
    root, out = tmp_path / "raw", tmp_path / "out"
    whole = tar_of(images(6, 10))
    put(
        root,
        {
            "a.jpg": picture(1),
            "b.jpg": picture(2)[:100],
            "x.tar": whole[: len(whole) // 2],
            "y.tar": tar_of(images(3, 50)),
        },
    )
    put(root, {"y.tar.aria2": b""})
    first = packing(root, out).run()
    taken = first.images - 1
    assert 0 < taken < 6 and first.dropped == {"undecodable": 1}
    assert {file: reason.partition(":")[0] for file, reason in first.problems.items()} == {
        "x.tar": "undecodable",
        "y.tar": "unfinished",
    }
    put(root, {"b.jpg": picture(2)[:200]})  # some more of it, but not all
    assert packing(root, out).run().dropped == {"undecodable": 1}
    put(root, {"b.jpg": picture(2), "x.tar": whole})
    (root / "y.tar.aria2").unlink()
    second = packing(root, out).run()
    assert (second.images, second.dropped, second.problems) == (11, {}, {})
    assert set(members(out).values()) == {picture(i) for i in (1, 2, *range(10, 16), *range(50, 53))}
    third = packing(root, out).run()
    assert (third.made, third.shards) == (0, second.shards)


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    put(root, images(3))
    (root / "late.jpg").symlink_to("there.jpg")
    assert packing(root, out).run().dropped == {"unreadable": 1}
    assert packing(root, out).run().shards == 1
    put(root, {"there.jpg": picture(9)})
    summary = packing(root, out).run()
    assert summary.dropped == {"duplicate": 1} and summary.images == 4


def test_other_terms_are_refused_in_one_line(tmp_path: Path) -> None:
    put(tmp_path / "raw", images(2))
    packing(tmp_path / "raw", tmp_path / "out").run()
    with pytest.raises(PackError, match=r"min_side=16.*another folder") as caught:
        packing(tmp_path / "raw", tmp_path / "out", min_side=17).run()
    assert "\n" not in str(caught.value)
    with pytest.raises(PackError, match="holds a prepared set already"):
        packing(tmp_path / "out", tmp_path / "other")
    (tmp_path / "out" / PLAN).unlink()  # or shards that something else has made
    with pytest.raises(PackError, match=r"set-000000\.tar, which is not in its plan"):
        packing(tmp_path / "raw", tmp_path / "out").run()


def test_a_run_that_found_nothing_binds_nobody(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(PackError):
        packing(tmp_path / "raw", tmp_path / "out", min_side=20).run()
    put(tmp_path / "raw", images(2))
    assert packing(tmp_path / "raw", tmp_path / "out").run().images == 2


def test_a_damaged_shard_is_told_and_made_again_when_it_is_deleted(tmp_path: Path) -> None:
    put(tmp_path / "raw", images(12))
    packing(tmp_path / "raw", tmp_path / "out").run()
    before = visible(tmp_path / "out")
    tar = tmp_path / "out" / "set-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-600])
    with pytest.raises(ShardError, match=r"set-000001\.tar.*delete its index"):
        packing(tmp_path / "raw", tmp_path / "out").run()
    tar.unlink()
    tar.with_suffix(".json").unlink()
    assert packing(tmp_path / "raw", tmp_path / "out").run().made == 5
    assert visible(tmp_path / "out") == before


def test_a_plan_cut_by_a_kill_is_mended(tmp_path: Path) -> None:
    """Whatever part of the plan was written, the result is that of an uninterrupted run."""
    put(tmp_path / "raw", images(8) | {"x.tar": tar_of(images(7, 20)), "z.jpg": picture(90)})
    packing(tmp_path / "raw", tmp_path / "whole").run()
    plan = (tmp_path / "whole" / PLAN).read_bytes()
    wanted = visible(tmp_path / "whole")
    for size in range(0, len(plan), 71):
        out = tmp_path / "cut"
        shutil.rmtree(out, ignore_errors=True)
        put(out, {PLAN: plan[:size]})
        packing(tmp_path / "raw", out).run()
        found = visible(out)
        assert {k: v for k, v in found.items() if k != PLAN} == {k: v for k, v in wanted.items() if k != PLAN}


def test_a_root_of_another_set_is_told(tmp_path: Path) -> None:
    put(tmp_path / "raw", {"notes.txt": b""})
    with pytest.raises(PackError, match="holds no image"):
        packing(tmp_path / "raw", tmp_path / "out").run()
    with pytest.raises(PackError, match="no folder"):
        packing(tmp_path / "nowhere", tmp_path / "out")
    put(tmp_path / "raw", {"x.tar": tar_of({"inner.tar": b""})})
    with pytest.raises(PackError, match=r"x\.tar: .*unpacked first"):
        packing(tmp_path / "raw", tmp_path / "out").run()


# --- tars of others ---------------------------------------------------------------------------------------------------


def indexing(root: Path, out: Path) -> Indexing:
    return Indexing(source=ForeignTars(name="web", root=str(root), patterns=["*"]), out=out, min_side=16, workers=1)


def test_tars_of_others_are_indexed_in_place(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    samples = {f"{i:09d}": picture(i, format="WEBP" if i == 3 else "JPEG") for i in range(9)}
    samples |= {"000000007": picture(1), "000000008": picture(8)[:-40]}  # a duplicate in the other tar, a damaged one
    samples["000000009"] = b"no image"
    for number in range(2):
        files: dict[str, bytes] = {}
        for key, data in list(samples.items())[number * 5 : number * 5 + 5]:
            files |= {
                f"{key}.{'webp' if data[:1] == b'R' else 'jpg'}": data,
                f"{key}.json": b"{}",
                f"{key}.txt": b"cat",
            }
        put(root, {f"{number:05d}.tar": tar_of(files | {"evil.pkl": b"cos\nsystem\n"})})
    put(root, {"00000_stats.json": b"{}", "00000.parquet": b"PAR1"})
    before = {path.name: path.stat().st_mtime_ns for path in root.iterdir()}
    summary = indexing(root, out).run()
    assert {path.name: path.stat().st_mtime_ns for path in root.iterdir()} == before
    assert (summary.images, summary.shards, summary.dropped) == (7, 2, {"duplicate": 1, "undecodable": 2})
    source = Shards(name="web", root=str(out), labels_root=str(tmp_path), cache=None)
    source.prepare()
    source.open()
    read = {source.key(i): source.read(i)["image"] for i in range(len(source))}
    assert read.keys() == {f"web/{int(key) // 5:05d}/{key}" for key in samples if int(key) < 7}
    for key, image in read.items():
        np.testing.assert_array_equal(image, read_image(samples[key[-9:]]))
    assert not list(out.glob("*.tar")) and indexing(root, out).run().made == 0

    put(root, {"00002.tar": tar_of({"a.jpg": picture(70)}), "00003.tar": tar_of(images(4, 80))[:3000]})
    put(root, {"00001.tar": tar_of({"other.jpg": picture(60)})})  # replaced: indexed again
    summary = indexing(root, out).run()
    assert (summary.images, summary.shards, summary.made) == (7, 3, 2) and list(summary.problems) == ["00003.tar"]


# --- kills and rivals -------------------------------------------------------------------------------------------------


def command(root: Path, out: Path, *options: str) -> list[str]:
    given = [f"root={root}", f"out={out}", "samples_per_shard=5", "min_side=16", *options]
    return ["depthany.prepare", "unlabelled=folder", "unlabelled.name=set", *given]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """200 files and 60 images in tars, 12 duplicates and 6 damaged ones among them; and how they look when packed."""
    folder = tmp_path_factory.mktemp("tree")
    files = {f"{i % 7}/{i:04d}.jpg": picture(i if i % 20 else i // 3) for i in range(200)}
    files |= {f"3/{i:04d}x.jpg": picture(i)[:-30] for i in range(6)}
    put(folder / "raw", files | {f"{n}.tar": tar_of(images(20, 1000 * n)) for n in (1, 2, 3)})
    packing(folder / "raw", folder / "out").run()
    return folder / "raw", visible(folder / "out")


@pytest.mark.slow
def test_killed_runs_end_as_an_uninterrupted_one(
    zygote: Zygote, tree: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    root, wanted = tree
    rng, out = random.Random(0), tmp_path / "out"
    for number in range(6):
        group = zygote.start(command(root, out, "workers=1"), cwd=tmp_path)
        before, more = len(list(out.glob("set-*.json"))), rng.randrange(1, 6) if number else 0
        while len(list(out.glob("set-*.json"))) < before + more or not (out / PLAN).exists():
            assert group.poll() == [None], group.output()
        time.sleep(rng.uniform(0, 0.03))
        group.kill(signal.SIGKILL)
        for index in out.glob("set-*.json"):
            tar = index.with_suffix(".tar")
            assert (tar.read_bytes(), index.read_bytes()) == (wanted[tar.name], wanted[index.name])
    assert 0 < len(list(out.glob("set-*.json"))) < len(wanted) // 2 - 2
    zygote.run(command(root, out, "workers=1"), cwd=tmp_path)
    assert visible(out) == wanted
    assert not list(out.glob(".*.part"))


@pytest.mark.slow
def test_rivals_on_one_output(zygote: Zygote, tree: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    """Three jobs at once, one killed on the way: the others do its work, and all is as if one had run."""
    root, wanted = tree
    out = tmp_path / "out"
    groups = [zygote.start(command(root, out, "workers=1"), cwd=tmp_path) for _ in range(3)]
    while not list(out.glob("set-*.json")):
        time.sleep(0.01)
    groups[0].kill(signal.SIGKILL)
    assert [group.wait(60) for group in groups[1:]] == [[0], [0]], [group.output() for group in groups]
    assert visible(out) == wanted


@pytest.mark.slow
def test_workers_give_the_same_bytes(tree: tuple[Path, dict[str, bytes]], tmp_path: Path) -> None:
    root, wanted = tree
    job = packing(root, tmp_path / "out", workers=2)
    summary = job.run()
    assert visible(tmp_path / "out") == wanted
    assert summary.made == summary.images + summary.dropped["duplicate"]
