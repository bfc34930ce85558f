"""Shards on disk: plain tars that others read, whole or not there, every byte of every read checked."""

import io
import json
import multiprocessing
import os
import resource
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset as wds

from depthany.data import storage
from depthany.data.shards import (
    CATALOG,
    OldIndexError,
    Shard,
    ShardError,
    index_tar,
    indexed_tars,
    label_path,
    read_catalog,
    whole_file,
    write_catalog,
    write_index,
    write_shard,
)
from tests.flaky_server import FlakyServer


def samples(count: int = 4) -> list[dict[str, Any]]:
    return [
        {"__key__": f"set/{i:03d}", "jpg": bytes([i]) * (100 + i), "disparity.npy": b"npy" * i, "json": b"{}"}
        for i in range(count)
    ]


def written(folder: Path, count: int = 4, name: str = "set-000000.tar") -> Path:
    write_shard(folder / name, samples(count), facts={"made by": "a test"})
    return folder / name


# --- one shard --------------------------------------------------------------------------------------------------------


def test_others_read_what_we_write(tmp_path: Path) -> None:
    tar = written(tmp_path)
    read = list(wds.WebDataset(str(tar), shardshuffle=False, empty_check=False))
    assert [{k: v for k, v in row.items() if k not in ("__url__", "__local_path__")} for row in read] == samples()


def test_the_index_finds_every_member(tmp_path: Path) -> None:
    shard = Shard(written(tmp_path))
    assert len(shard) == 4 and shard.keys == [row["__key__"] for row in samples()]
    assert shard.facts == {"made by": "a test"}
    for i, row in reversed(list(enumerate(samples()))):
        assert {suffix: shard.read(i, suffix) for suffix in shard.files[i]} == {
            k: v for k, v in row.items() if k != "__key__"
        }
    with pytest.raises(KeyError):
        shard.read(0, "png")
    shard.close()
    assert shard.read(1, "jpg") == samples()[1]["jpg"]  # opened again when needed


def test_a_tar_of_others_is_indexed(tmp_path: Path) -> None:
    """GNU tar writes "./a.jpg"; webdataset puts the folder into the key."""
    path = tmp_path / "x-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("./a.jpg", "deep/er/b.jpg", "deep/er/b.json"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(name[-3:].encode()))
    write_index(path.with_suffix(".json"), index_tar(path))
    shard = Shard(path)
    assert shard.keys == ["a", "deep/er/b"] and set(shard.files[1]) == {"jpg", "json"}
    assert shard.read(1, "jpg") == b"jpg"


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (written(tmp_path / name) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".json").read_bytes() == second.with_suffix(".json").read_bytes()


def failing() -> Iterator[dict[str, Any]]:
    yield from samples(3)
    raise OSError("disk full")


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "set-000000.tar", failing(), facts={})
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_shard_that_was_there(tmp_path: Path) -> None:
    tar = written(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        write_shard(tar, failing(), facts={})
    assert len(Shard(tar)) == 4


def test_a_new_tar_never_stands_beside_an_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = written(tmp_path)
    monkeypatch.setattr(json, "dumps", lambda *_: 1 / 0)  # the machine dies between the tar and its index
    with pytest.raises(ZeroDivisionError):
        write_shard(tar, samples(2), facts={})
    assert not tar.with_suffix(".json").exists()


def write_slowly(folder: Path) -> None:
    def slow() -> Iterator[dict[str, Any]]:
        for i in range(1000):
            yield {"__key__": f"set/{i:03d}", "jpg": bytes(100_000)}
            time.sleep(0.01)

    write_shard(folder / "set-000000.tar", slow(), facts={})


def test_a_killed_writer_leaves_no_final_file(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("fork").Process(target=write_slowly, args=(tmp_path,))
    writer.start()
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob(".*.part")):
        assert time.monotonic() < deadline and writer.is_alive()
        time.sleep(0.01)
    assert writer.pid
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert list(tmp_path.glob("[!.]*")) == []
    assert len(Shard(written(tmp_path))) == 4  # what is left does not stand in the way


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"__key__": "set/../up", "jpg": b""}, "up"),
        ({"__key__": "/root", "jpg": b""}, "/root"),
        ({"__key__": "a.b", "jpg": b""}, "a.b"),
        ({"__key__": "a", "pkl": b""}, "pkl"),
        ({"__key__": "a", "pth": b""}, "pth"),
    ],
)
def test_unsafe_samples_are_not_written(tmp_path: Path, sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        write_shard(tmp_path / "set-000000.tar", [sample], facts={})
    assert list(tmp_path.iterdir()) == []


def test_two_samples_of_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="share a key"):
        write_shard(tmp_path / "set-000000.tar", [*samples(2), samples(1)[0]], facts={})


def no_index(tar: Path) -> None:
    tar.with_suffix(".json").unlink()


def broken_index(tar: Path) -> None:
    tar.with_suffix(".json").write_text('{"samples": [{"key"')


def foreign_index(tar: Path) -> None:
    tar.with_suffix(".json").write_text("[1, 2]")


def cut_tar(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:-600])


def grown_tar(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes() + bytes(512))


def no_tar(tar: Path) -> None:
    tar.unlink()


@pytest.mark.parametrize("damage", [no_index, broken_index, foreign_index, cut_tar, grown_tar, no_tar])
def test_a_damaged_shard_is_not_opened(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    tar = written(tmp_path)
    damage(tar)
    with pytest.raises(ShardError, match=r"set-000000\.(tar|json)"):
        Shard(tar)


def test_a_tar_cut_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    shard = Shard(written(tmp_path))
    os.truncate(shard.tar, 512 + 50)
    with pytest.raises(ShardError, match=r"set-000000\.tar: set/000\.jpg is cut short"):
        shard.read(0, "jpg")


def test_every_cut_of_a_tar_is_noticed(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()
    end = data.rstrip(b"\0")
    whole = (len(end) // 512 + 1) * 512 + 1024  # the last member and the end mark; the rest is filling
    path = tmp_path / "cut-000000.tar"
    for size in [*range(0, whole, 256), whole - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ShardError, match=r"cut-000000\.tar"):
            index_tar(path)
    rubbish = bytearray(data)
    rubbish[512:1024] = b"\xff" * 512  # the second member's header: the first member is empty
    path.write_bytes(rubbish)
    with pytest.raises(ShardError, match=r"cut-000000\.tar"):
        index_tar(path)


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "set-000000.tar"
    with tarfile.open(path, f"w:{compression}") as tar:  # type: ignore[call-overload]  # the mode is put together
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(ShardError, match=r"set-000000\.tar"):
        index_tar(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../a.jpg", tarfile.REGTYPE),
        ("a/../../b.jpg", tarfile.REGTYPE),
        ("/etc/a.jpg", tarfile.REGTYPE),
        ("a.jpg", tarfile.SYMTYPE),
        ("a.jpg", tarfile.LNKTYPE),
        ("a.jpg", tarfile.FIFOTYPE),
        ("folder", tarfile.DIRTYPE),
        ("a.pkl", tarfile.REGTYPE),
        ("a.pth", tarfile.REGTYPE),
        ("a.pt", tarfile.REGTYPE),
        ("a.jpg.exe", tarfile.REGTYPE),
        ("noend", tarfile.REGTYPE),
    ],
)
def test_members_that_are_no_sample_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    path = tmp_path / "set-000000.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ShardError, match=r"set-000000\.tar"):
        index_tar(path)


def test_label_shards_lie_beside(tmp_path: Path) -> None:
    assert label_path(tmp_path / "my.set-000000.tar", "vits-0a1b") == tmp_path / "my.set-000000.vits-0a1b.tar"


# --- every byte is checked --------------------------------------------------------------------------------------------


def photo(seed: int = 0, side: int = 64) -> bytes:
    rng = np.random.default_rng(seed)
    picture = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", picture)[1].tobytes()


def test_every_flipped_bit_of_a_jpeg_is_found(tmp_path: Path) -> None:
    """Decoders take most of them for a good file and give another picture."""
    tar = tmp_path / "set-000000.tar"
    write_shard(tar, [{"__key__": "a", "jpg": photo()}], facts={})
    shard, rng = Shard(tar), np.random.default_rng(0)
    offset, size, _ = shard.files[0]["jpg"]
    whole, good, silent = tar.read_bytes(), cv2.imdecode(np.frombuffer(photo(), np.uint8), 1), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[offset + rng.integers(size)] ^= 1 << int(rng.integers(8))
        with open(tar, "r+b") as file:
            file.write(damaged)
        with pytest.raises(ShardError, match=r"set-000000\.tar: a\.jpg is not what was written .*: copy the tar again"):
            shard.read(0, "jpg")
        taken = cv2.imdecode(np.frombuffer(damaged[offset : offset + size], np.uint8), 1)
        silent += taken is not None and not np.array_equal(taken, good)
    assert silent > 40  # what the check is for


def test_every_flipped_bit_of_an_index_or_a_catalog_is_found(tmp_path: Path) -> None:
    tar = written(tmp_path)
    write_catalog(tmp_path, name="set", dropped={tar.name: [1]})
    sound = Shard(tar).rows
    for path, read in (
        (tar.with_suffix(".json"), lambda: Shard(tar).rows),
        (tmp_path / CATALOG, lambda: read_catalog(str(tmp_path)).dropped.tolist()),
    ):
        whole, wanted = path.read_bytes(), read()
        for bit in range(0, 8 * len(whole), 7):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            try:
                found = read()
            except ShardError as error:
                assert path.name in str(error) and "copy it again" in str(error)
            else:
                assert found == wanted  # in the name or the spaces of the checksum itself
        path.write_bytes(whole)
    assert Shard(tar).rows == sound


def test_rows_may_say_more(tmp_path: Path) -> None:
    rows = [{**row, "__row__": {"hash": "ab" * 16, "width": i}} for i, row in enumerate(samples())]
    write_shard(tmp_path / "set-000000.tar", rows, facts={"skipped": []})
    shard = Shard(tmp_path / "set-000000.tar")
    assert [row["width"] for row in shard.rows] == [0, 1, 2, 3] and shard.rows[2]["key"] == "set/002"
    text = (tmp_path / "set-000000.json").read_text()
    assert json.loads(text)["version"] == 2 and text.index('"facts"') < text.index('"samples"')


def test_an_index_of_an_earlier_version_says_what_to_do(tmp_path: Path) -> None:
    tar = written(tmp_path)
    index = {"version": 1, "bytes": 1, "sha256": "", "samples": [{"key": "a", "files": {"jpg": [0, 1]}}]}
    tar.with_suffix(".json").write_text(json.dumps(index))
    with pytest.raises(OldIndexError, match=r"set-000000\.json is of version 1, .* depthany\.prepare") as caught:
        Shard(tar)
    assert "\n" not in str(caught.value)


def test_an_index_written_by_hand_needs_no_checksum(tmp_path: Path) -> None:
    tar = written(tmp_path)
    tar.with_suffix(".json").write_text(json.dumps(index_tar(tar), indent=1))
    assert Shard(tar).read(3, "jpg") == samples()[3]["jpg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["samples"][0].update(key="../up"), "keys"),
        (lambda index: index["samples"][0].update(key=index["samples"][1]["key"]), "keys"),
        (lambda index: index["samples"][0].update(key=5), "no index of a shard"),
        (lambda index: index["samples"][0].update(files=[1]), "other things than"),
        (lambda index: index["samples"][0]["files"].update(pkl=[0, 1, 2]), "other things than"),
        (lambda index: index.update(samples={}), ""),
        (lambda index: index.update(samples=7), "no index of a shard"),
        (lambda index: index.update(bytes=-1), "number of bytes"),
        (lambda index: index.update(bytes="9"), "number of bytes"),
        (lambda index: index.update(bytes=10**30), "number of bytes"),
        (lambda index: index.update(facts=None), "no index of a shard"),
        (lambda index: index.pop("sha256"), "sha256"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    tar = written(tmp_path)
    index = index_tar(tar)
    change(index)
    write_index(tar.with_suffix(".json"), index)
    if not message:
        assert len(Shard(tar)) == 0
        return
    with pytest.raises(ShardError, match=message) as caught:
        Shard(tar)
    assert "set-000000.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [[0, 10**9, 1], [-512, 5, 1], [0, "5", 1], [0, 5], 7, [1 << 50, 5, 1], [0.5, 1, 1]])
def test_a_wrong_place_is_found_when_it_is_read(tmp_path: Path, place: Any) -> None:
    tar = written(tmp_path)
    index = index_tar(tar)
    index["samples"][1]["files"]["jpg"] = place
    write_index(tar.with_suffix(".json"), index)
    shard = Shard(tar)
    with pytest.raises(ShardError, match=r"set-000000\.tar: set/001\.jpg has no place in the index"):
        shard.read(1, "jpg")
    assert shard.read(0, "jpg") == samples()[0]["jpg"]


def test_a_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    tar = written(tmp_path)
    tar.with_suffix(".json").write_text("[" * 200_000)
    with pytest.raises(ShardError, match="recursion"):
        Shard(tar)


# --- writing beside others --------------------------------------------------------------------------------------------


def hold_open(path: Path, ready: Any) -> None:
    with whole_file(path) as part:
        part.write_bytes(b"half")
        ready.set()
        time.sleep(60)


def test_what_a_dead_writer_left_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    path, ready = tmp_path / "x.json", context.Event()
    writer = context.Process(target=hold_open, args=(path, ready))
    writer.start()
    assert ready.wait(20)
    for _ in range(2):
        with whole_file(path) as part:
            part.write_bytes(b"whole")
        assert path.read_bytes() == b"whole" and len(list(tmp_path.glob(".x.json.*.part"))) == 1
    writer.kill()
    writer.join()
    with whole_file(path) as part:
        part.write_bytes(b"later")
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


# --- tars of others ---------------------------------------------------------------------------------------------------


def tar_of(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_tar_of_others_is_indexed_where_it_lies(tmp_path: Path) -> None:
    """As img2dataset writes them: pictures, their records and captions, and whatever else."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    names = ["000000000", "a.b c", "deep/er/x", "ünï", "n" * 150]
    images = {f"{name}.{['jpg', 'JPEG'][i % 2]}": photo(i) for i, name in enumerate(names)}
    others = [("000000000.json", b"{}"), ("000000000.txt", b"a cat"), ("x.pickle", b"cos\nsystem\n"), ("jpg", b"")]
    others += [("._000000000.jpg", b"what another system puts beside it")]
    tar = tar_of(theirs / "00000.tar", [*images.items(), *others])
    before = {path: path.stat().st_mtime_ns for path in theirs.iterdir()}
    index = index_tar(tar, foreign=True)
    assert index["facts"] == {"ignored": {"json": 1, "txt": 1, "pickle": 1, "": 2}, "skipped": []}
    write_index(ours / "00000.json", index)
    shard = Shard(tar, index=str(ours / "00000.json"))
    assert [shard.read(i, "jpg") for i in range(5)] == list(images.values())
    assert shard.keys[0] == "00000/000000000" and shard.keys[2] == "00000/deep/er/x"
    assert len(set(shard.keys)) == 5 and all(".." not in key and len(key) < 130 for key in shard.keys)
    catalog = write_catalog(ours, name="theirs", base="../theirs")
    assert len(catalog) == 1 and Path(catalog.tar(0)).samefile(tar)
    assert {path: path.stat().st_mtime_ns for path in theirs.iterdir()} == before


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read_as_tarfile_does(tmp_path: Path, format: int) -> None:
    rng = np.random.default_rng(format)
    long = "" if format == tarfile.USTAR_FORMAT else "l" * 90 + "/"
    names = [f"{long}{i}/{'x' * int(rng.integers(1, 60))}.jpg" for i in range(30)]
    members = [(name, rng.bytes(int(rng.integers(0, 3000)))) for name in names]
    tar = tar_of(tmp_path / "x-000000.tar", members, format=format)
    write_index(tar.with_suffix(".json"), index_tar(tar))
    shard = Shard(tar)
    with tarfile.open(tar) as theirs:
        assert [f"{key}.jpg" for key in shard.keys] == theirs.getnames()
        for i, name in enumerate(theirs.getnames()):
            extracted = theirs.extractfile(name)
            assert extracted and shard.read(i, "jpg") == extracted.read() == members[i][1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../a.jpg", tarfile.REGTYPE),
        ("a/../../b.jpg", tarfile.REGTYPE),
        ("/etc/a.jpg", tarfile.REGTYPE),
        ("a.jpg", tarfile.SYMTYPE),
        ("a.jpg", tarfile.LNKTYPE),
        ("a.jpg", tarfile.CHRTYPE),
        ("good.png", tarfile.REGTYPE),
        ("good.jpg", tarfile.REGTYPE),
    ],
)
def test_images_of_others_that_cannot_be_taken_are_listed(tmp_path: Path, name: str, kind: bytes) -> None:
    path = tar_of(tmp_path / "0.tar", [("good.jpg", b"good")])
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    index = index_tar(path, foreign=True)
    assert [row["key"] for row in index["samples"]] == ["0/good"]
    ((_, reason),) = index["facts"]["skipped"]
    assert reason.startswith(f"0.tar: member {name!r} ")


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with open(path, "wb") as file:  # a file with a hole of a gigabyte
        member = tarfile.TarInfo("a.jpg")
        member.size = 1 << 30
        file.write(member.tobuf())
        file.truncate(512 + (1 << 30) + 1024)
    started = time.monotonic()
    with pytest.raises(ShardError, match=r"0\.tar: member 'a\.jpg' has more than 536870912 bytes"):
        index_tar(path)
    assert time.monotonic() - started < 1


# --- catalogs ---------------------------------------------------------------------------------------------------------


def test_a_catalog_counts_what_the_indices_hold(tmp_path: Path) -> None:
    for i, count in enumerate([4, 0, 2]):
        written(tmp_path, count, f"set-{i:06d}.tar")
        write_shard(tmp_path / f"set-{i:06d}.teacher-000001.tar", samples(1), facts={"teacher": "teacher-000001"})
    (tmp_path / "set-000003.tar").write_bytes(b"half")  # no index: it does not count yet
    (tmp_path / "labels.teacher-1.json").write_text("{}")
    made = write_catalog(tmp_path, name="set", dropped={"set-000000.tar": [3, 1, 1], "set-000002.tar": [0]})
    read = read_catalog(str(tmp_path))
    for catalog in (made, read):
        assert catalog.name == "set" and catalog.base == str(tmp_path) and len(catalog) == 3
        assert catalog.tars.tolist() == [b"set-000000.tar", b"set-000001.tar", b"set-000002.tar"]
        assert catalog.samples.tolist() == [4, 0, 2] and catalog.starts.tolist() == [0, 4, 4, 6]
        assert [catalog.dropped_of(i).tolist() for i in range(3)] == [[1, 3], [], [0]]
        shards = [Shard(catalog.tar(i)) for i in range(3)]
        assert [shard.bytes for shard in shards] == catalog.sizes.tolist()
        assert [shard.sha256.encode() for shard in shards] == catalog.sha256.tolist()


def test_names_tell_images_from_labels(tmp_path: Path) -> None:
    for name in ("a-000000", "a-000001", "a-000000.vitl-000001", "b", ".c-000000", "shards", "labels.x"):
        (tmp_path / f"{name}.json").touch()
        (tmp_path / f"{name}.tar").touch()
    assert indexed_tars(tmp_path, foreign=False) == ["a-000000.tar", "a-000001.tar"]
    for name in ("00000", "00000.teacher-1", "data.00001", "data.00001.teacher-1.5"):
        (tmp_path / f"{name}.json").touch()
    assert indexed_tars(tmp_path, foreign=True) == [
        "00000.tar",
        "a-000000.tar",
        "a-000001.tar",
        "b.tar",
        "data.00001.tar",
    ]
    with pytest.raises(ShardError, match="nowhere cannot be read: No such file or directory"):
        indexed_tars(tmp_path / "nowhere", foreign=False)


ROW = {"tar": "x-000000.tar", "samples": 3, "bytes": 9, "sha256": "ab", "dropped": []}


@pytest.mark.parametrize(
    "change",
    [
        {"base": 5},
        {"base": "pipe:touch canary"},
        {"base": "simplecache::http://host"},
        {"shards": 5},
        {"shards": [5]},
        {"shards": [ROW, ROW]},
        {"shards": [ROW | {"tar": "../x-000000.tar"}]},
        {"shards": [ROW | {"tar": "/x-000000.tar"}]},
        {"shards": [ROW | {"tar": "pipe:touch canary.tar"}]},
        {"shards": [ROW | {"tar": "x.pickle"}]},
        {"shards": [ROW | {"samples": -1}]},
        {"shards": [ROW | {"samples": 1.5}]},
        {"shards": [ROW | {"samples": 10**20}]},
        {"shards": [ROW | {"sha256": 5}]},
        {"shards": [ROW | {"dropped": [3]}]},
        {"shards": [ROW | {"dropped": [-1]}]},
        {"shards": [ROW | {"dropped": 1}]},
        {"shards": [ROW | {"skipped": 1}]},
    ],
    ids=str,
)
def test_a_wrong_catalog_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / CATALOG).write_text(json.dumps({"version": 1, "name": "x", "base": None, "shards": [ROW]}))
    assert len(read_catalog(str(tmp_path))) == 1
    (tmp_path / CATALOG).write_text(json.dumps({"version": 1, "name": "x", "base": None, "shards": [ROW]} | change))
    with pytest.raises(ShardError, match=r"shards\.json is no catalog of shards \(.*\): copy it again, or delete"):
        read_catalog(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [CATALOG]


def test_a_catalog_from_the_network_cannot_name_files_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSE_S", 0.001)
    (tmp_path / "a").mkdir()
    with FlakyServer(tmp_path) as server:
        for base, here, there in (
            (None, f"{tmp_path}/a", f"{server.url}/a"),
            ("../b", f"{tmp_path}/a/../b", f"{server.url}/b"),
            ("s3://x", "s3://x", "s3://x"),
            ("/etc", "/etc", None),
            ("../..", f"{tmp_path}/a/../..", None),
        ):
            document = {"version": 1, "name": "x", "base": base, "shards": [ROW]}
            (tmp_path / "a" / CATALOG).write_text(json.dumps(document))
            assert read_catalog(str(tmp_path / "a")).tar(0) == f"{here}/x-000000.tar"
            if there:
                assert read_catalog(f"{server.url}/a").tar(0) == f"{there}/x-000000.tar"
                continue
            with pytest.raises(ShardError, match="base leads away from its server"):
                read_catalog(f"{server.url}/a")


# --- fuzz -------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: bits, bytes, numbers, cuts, blocks that are doubled, moved or filled."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(changed) + 1))
        size = int(rng.choice([1, 3, 12, 100, 512, 2000]))
        match rng.integers(8):
            case 0 if at < len(changed):
                changed[at] ^= 1 << int(rng.integers(8))
            case 1:
                changed[at : at + size] = rng.bytes(len(changed[at : at + size]))
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[at : at + size]
            case 4:
                del changed[at:]
            case 5:
                changed[at : at + size] = bytes([int(rng.choice([0, 32, 48, 55, 128, 255]))]) * size
            case 6:
                words = [b"-1", b"99999999999", b"null", b"[]", b'"', b"../", b"1e999", b"{}", b"\x80\xff" * 6]
                changed[at:at] = words[int(rng.integers(len(words)))]
            case 7:  # a tar header with a field changed and a checksum that fits
                at = at // 512 * 512
                field, end = [(0, 100), (124, 136), (156, 157), (345, 500)][int(rng.integers(4))]
                block = bytearray(changed[at : at + 512].ljust(512, b"\0"))
                values = [
                    b"x",
                    b"L",
                    b"K",
                    b"S",
                    b"g",
                    b"\xff" * 12,
                    b"\x80" + b"\xff" * 11,
                    b"77777777777\0",
                    b"30 a=b\n",
                ]
                block[field:end] = values[int(rng.integers(len(values)))].ljust(end - field, b"\0")[: end - field]
                block[148:156] = b" " * 8
                block[148:156] = b"%06o\0 " % sum(block)
                changed[at : at + 512] = block
    return bytes(changed)


def fuzz(tmp_path: Path, rounds: int) -> dict[str, int]:
    """Damages a tar, its index and the catalog in turn; only our errors may come out, soon and without much memory."""
    seeds = np.random.default_rng(0)
    folder = tmp_path / "set"
    write_shard(folder / "set-000000.tar", [{"__key__": f"a/{i}", "jpg": photo(i, 16)} for i in range(5)], facts={})
    write_catalog(folder, name="set", dropped={"set-000000.tar": [2]})
    long = tar_of(tmp_path / "long.tar", [(f"{'l' * 140}{i}/ü.jpg", b"x" * 700) for i in range(3)])
    gnu = tar_of(tmp_path / "gnu.tar", [(f"{'l' * 140}{i}/u.jpg", b"x") for i in range(3)], format=tarfile.GNU_FORMAT)
    tar, index, catalog = (folder / name for name in ("set-000000.tar", "set-000000.json", CATALOG))
    whole = {path: path.read_bytes() for path in (tar, index, catalog)}
    told: dict[str, int] = {}
    for turn in range(rounds):
        rng = np.random.default_rng(seeds.integers(1 << 60))
        target = [tar, index, catalog][turn % 3]
        started = time.monotonic()
        try:
            if target == tar:
                source = [whole[tar], long.read_bytes(), gnu.read_bytes()][turn // 3 % 3]
                tar.write_bytes(mutated(source, rng))
                index_tar(tar, foreign=bool(turn % 2))
                outcome = "taken"
            else:
                target.write_bytes(mutated(whole[target], rng).replace(b'"crc32"', b'"was"'))  # no help by the checksum
                found = read_catalog(str(folder))
                shard = Shard(tar)
                assert found.dropped_of(0).max(initial=0) <= found.samples[0] if len(found) else True
                outcome = "taken"
                for i in range(len(shard)):
                    for suffix in shard.files[i]:
                        shard.read(i, suffix)
        except ShardError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
            outcome = "refused"
        finally:
            target.write_bytes(whole[target])
        told[f"{target.suffix} {outcome}"] = told.get(f"{target.suffix} {outcome}", 0) + 1
        assert time.monotonic() - started < 5, turn
    return told


def test_damaged_files_give_our_errors_and_no_others(tmp_path: Path) -> None:
    told = fuzz(tmp_path, 500)
    assert told[".tar refused"] > 50 and told[".json refused"] > 100 and told[".tar taken"] > 10, told


def fuzz_in_little_memory(folder: Path, results: Any) -> None:
    before = peak_memory()
    results.put((fuzz(folder, 10_000), peak_memory() - before))


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path: Path) -> None:
    results = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=fuzz_in_little_memory, args=(tmp_path, results))
    process.start()
    told, grown = results.get(timeout=200)
    process.join()
    assert sum(told.values()) == 10_000 and told[".tar refused"] > 1000 and told[".json refused"] > 3000, told
    assert grown < 100 << 20, grown
