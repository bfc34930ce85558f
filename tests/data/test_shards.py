"""Shards on disk: plain tars that others read, whole or not there, and packed sources that read as the source does."""

import io
import json
import multiprocessing
import os
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
from numpy.testing import assert_array_equal

from depthany.data.files import DecodeError
from depthany.data.labels import CODEC_ERROR, decode_label, encode_pseudo, encode_truth
from depthany.data.shards import Shard, ShardError, image_shards, index_tar, label_path, write_shard
from depthany.data.sources.packed import Packed, Shards
from depthany.data.sources.photos import PhotoFolder
from depthany.data.sources.scenes import Scenes
from depthany.types import DepthKind, DepthSample


def samples(count: int = 4) -> list[dict[str, Any]]:
    return [
        {"__key__": f"set/{i:03d}", "jpg": bytes([i]) * (100 + i), "disparity.npy": b"npy" * i, "json": b"{}"}
        for i in range(count)
    ]


def written(folder: Path, count: int = 4, name: str = "set-000000.tar") -> Path:
    write_shard(folder / name, samples(count), facts={"made by": "a test"})
    return folder / name


def picture(seed: int, height: int = 12, width: int = 18) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


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
    path.with_suffix(".json").write_text(json.dumps(index_tar(path)))
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
    assert list(tmp_path.glob("[!.]*")) == [] and image_shards(tmp_path) == []
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
    with pytest.raises(ShardError, match=r"set-000000\.tar"):
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


def test_label_shards_lie_beside_and_are_no_image_shards(tmp_path: Path) -> None:
    images = [written(tmp_path, name=f"my.set-{i:06d}.tar") for i in (0, 2, 1)]
    labels = [label_path(tar, "teacher-0a1b2c3d") for tar in images]
    assert labels[0] == tmp_path / "my.set-000000.teacher-0a1b2c3d.tar"
    for path in labels:
        write_shard(path, samples(), facts={})
    (tmp_path / ".my.set-000007.tar.1.part").touch()
    (tmp_path / "other.tar").touch()
    assert image_shards(tmp_path) == sorted(images)
    assert image_shards(tmp_path, "my.set") == sorted(images) and image_shards(tmp_path, "set") == []


# --- packed sources ---------------------------------------------------------------------------------------------------


def as_png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def scenes(count: int = 10, name: str = "scenes") -> Scenes:
    return Scenes(name=name, style="b", num_scenes=count, scene_seed=5, size=16, labelled=True)


def packed(root: Path, source: Any, *, limit: int | None = None, short_side: int | None = None) -> Packed:
    made = Packed(source=source, root=str(root), samples_per_shard=4, short_side=short_side)
    made.limit = limit
    made.prepare()
    made.open()
    return made


def times(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def assert_same(a: Any, b: Any) -> None:
    assert set(a) == set(b)
    for name, value in a.items():
        assert_array_equal(value, b[name], strict=True) if isinstance(value, np.ndarray) else None
        assert isinstance(value, np.ndarray) or value == b[name]


class Odd:
    """Labels with everything that a label can have, a damaged sample, and a label of another size."""

    name = "odd"

    def __len__(self) -> int:
        return 6

    def key(self, index: int) -> str:
        return f"odd/{index}"

    def identity(self) -> dict[str, Any]:
        return {"version": 1}

    def prepare(self) -> None: ...

    def read(self, index: int) -> DepthSample:
        if index in (1, 4):
            raise DecodeError(f"{self.key(index)} is torn")
        rng = np.random.default_rng(index)
        disparity = rng.random((5, 7), dtype=np.float32) * np.float32(10.0 ** rng.integers(-9, 9))
        code = rng.integers(0, 4, (5, 7))  # measured, sky, invalid, infinitely far but measured
        return {
            "image": picture(index),
            "key": self.key(index),
            "disparity": np.where(code == 0, disparity, np.float32(0)),
            "valid": code != 2,
            "sky": code == 1,
            "kind": list(DepthKind)[index % 3],
        }


def test_a_packed_set_reads_as_its_source_does(tmp_path: Path) -> None:
    source = scenes()
    made = packed(tmp_path, source)
    assert made.chunks == [4, 4, 2] and len(made) == 10
    assert any(source.read(i)["sky"].any() for i in range(10))
    for i in range(10):
        assert made.key(i) == source.key(i)
        assert_same(made.read(i), source.read(i))


def test_damaged_samples_are_listed_and_the_others_are_kept(tmp_path: Path) -> None:
    made = packed(tmp_path, Odd())
    assert [made.key(i) for i in range(len(made))] == ["odd/0", "odd/2", "odd/3", "odd/5"]
    assert [(skip.source, skip.key, skip.reason) for skip in made.skipped] == [
        ("odd", "odd/1", "odd/1 is torn"),
        ("odd", "odd/4", "odd/4 is torn"),
    ]
    for i, original in enumerate([0, 2, 3, 5]):
        assert_same(made.read(i), Odd().read(original))
    before = times(tmp_path)
    packed(tmp_path, Odd())
    assert times(tmp_path) == before  # what cannot be read is not tried again


def test_packing_happens_once(tmp_path: Path) -> None:
    made = packed(tmp_path, scenes())
    before = times(tmp_path)
    packed(tmp_path, scenes())
    assert times(tmp_path) == before
    tar = made.tars[1]
    content = tar.read_bytes()
    tar.unlink()
    tar.with_suffix(".json").unlink()
    packed(tmp_path, scenes())
    assert tar.read_bytes() == content
    after = times(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        str(path.relative_to(tmp_path)) for path in (tar, tar.with_suffix(".json"))
    }
    tar.with_suffix(".json").unlink()  # a tar counts once its index is there
    packed(tmp_path, scenes())
    assert tar.read_bytes() == content and Shard(tar)


def test_a_shard_that_was_changed_is_the_users_to_decide(tmp_path: Path) -> None:
    made = packed(tmp_path, scenes())
    made.tars[0].write_bytes(made.tars[0].read_bytes()[:-5000])
    with pytest.raises(ShardError, match="delete both"):
        packed(tmp_path, scenes())


def test_a_limit_packs_a_prefix_of_the_same_bytes(tmp_path: Path) -> None:
    whole = packed(tmp_path / "whole", scenes())
    few = packed(tmp_path / "few", scenes(), limit=5)
    assert few.chunks == [4, 1] and len(few) == 5
    assert [few.key(i) for i in range(5)] == [whole.key(i) for i in range(5)]
    assert [tar.name for tar in image_shards(few.root)] == [tar.name for tar in whole.tars[:2]]
    for tar, same in zip(image_shards(few.root), whole.tars, strict=False):
        assert tar.read_bytes() == same.read_bytes()


def test_a_set_grows_and_shrinks(tmp_path: Path) -> None:
    """Its folder is not named by the number of scenes: a longer set goes on, a shorter one reads what it asks for."""
    first = packed(tmp_path, scenes(6))
    before = times(tmp_path)
    longer = packed(tmp_path, scenes(10))
    assert longer.root == first.root and len(longer) == 10
    kept = f"{first.root.name}/{first.tars[0].name}"
    assert times(tmp_path)[kept] == before[kept]
    for i in range(10):
        assert longer.key(i) == scenes(10).key(i)
    before = times(tmp_path)
    shorter = packed(tmp_path, scenes(6))
    assert len(shorter) == 6 and shorter.chunks == [4, 2]
    assert times(tmp_path) == before


def test_another_source_gets_another_folder(tmp_path: Path) -> None:
    one = packed(tmp_path, scenes(3))
    other = packed(tmp_path, Scenes(name="scenes", style="b", num_scenes=3, scene_seed=6, size=16, labelled=True))
    smaller = packed(tmp_path, scenes(3), short_side=8)
    assert len({one.root, other.root, smaller.root}) == 3


def test_photos_keep_their_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, suffix in enumerate(["jpg", "png", "webp", "bmp"]):
        cv2.imwrite(str(folder / f"{i}.{suffix}"), picture(i))
    (folder / "4.jpg").write_bytes((folder / "0.jpg").read_bytes()[:200])
    source = PhotoFolder(root=folder, pattern="**/*", name="photos")
    made = packed(tmp_path / "shards", source)
    assert [skip.key for skip in made.skipped] == [source.key(4)]
    for i in range(4):
        assert_same(made.read(i), source.read(i))
    shards = [Shard(tar) for tar in made.tars]
    assert [[*files] for shard in shards for files in shard.files] == [["jpg"], ["png"], ["webp"], ["png"]]
    assert shards[0].read(0, "jpg") == (folder / "0.jpg").read_bytes()


def test_shrinking_stays_within_the_short_side(tmp_path: Path) -> None:
    made = packed(tmp_path, Odd(), short_side=4)
    for i, original in enumerate([0, 2, 3, 5]):
        sample, whole = made.read(i), Odd().read(original)
        assert sample["image"].shape == (4, 6, 3)
        assert sample["disparity"].shape == sample["valid"].shape == sample["sky"].shape == (4, 6)
        assert set(sample["disparity"].ravel()) <= set(whole["disparity"].ravel())  # no value is invented
        assert not (sample["sky"] & ~sample["valid"]).any()
    assert_same(packed(tmp_path, Odd(), short_side=100).read(0), Odd().read(0))


# --- shards of a folder, and a teacher's labels -----------------------------------------------------------------------


def labelled_folder(root: Path) -> Shards:
    packed(root, scenes())
    made = Shards(name="scenes", root=str(next(root.iterdir())))
    made.prepare()
    made.teacher = "teacher-00000000"
    return made


def write_labels(made: Shards, *, leave_out: str = "") -> dict[str, np.ndarray]:
    maps: dict[str, np.ndarray] = {}
    for tar in made.tars:
        keys = [key for key in reversed(Shard(tar).keys) if key != leave_out]  # another order than the images'
        maps |= {key: np.random.default_rng(len(maps) + i).random((9, 9)) for i, key in enumerate(keys)}
        rows = [{"__key__": key, **encode_pseudo(maps[key], "png16")} for key in keys]
        write_shard(label_path(tar, str(made.teacher)), rows, facts={})
    return maps


def test_a_teachers_labels_are_found_by_key(tmp_path: Path) -> None:
    made = labelled_folder(tmp_path)
    maps = write_labels(made, leave_out="scenes/0000002")
    made.open()
    for i in range(len(made)):
        if made.key(i) == "scenes/0000002":
            with pytest.raises(DecodeError, match="has no label"):
                made.read(i)
            continue
        sample = made.read(i)
        assert sample["kind"] == DepthKind.PSEUDO and sample["valid"].all() and not sample["sky"].any()
        np.testing.assert_allclose(sample["disparity"], maps[made.key(i)], atol=1e-5)
        assert_array_equal(sample["image"], scenes().read(i)["image"])


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    made = labelled_folder(tmp_path)
    with pytest.raises(ShardError, match=r"teacher-00000000\.tar"):
        made.open()  # there are none
    for tar in made.tars:
        rows = [{"__key__": "stranger/0", **encode_pseudo(np.eye(3), "png16")}]
        write_shard(label_path(tar, "teacher-00000000"), rows, facts={})
    with pytest.raises(ShardError, match="label it again"):
        made.open()


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=str(tmp_path)):
        Shards(name="none", root=str(tmp_path)).prepare()


@pytest.mark.parametrize(
    "members",
    [
        {"jpg": b"not an image"},
        {"json": b"{}"},
        {"png": b""},
        {"json": b"not json", "disparity.npy": b""},
        {"json": b"[]", "disparity.npy": b""},
        {"json": b'{"kind": "metric"}'},
        {"json": b'{"kind": "unheard of"}', "disparity.npy": b""},
        {"json": b'{"kind": "metric"}', "disparity.npy": b""},
        {"json": b'{"kind": "metric"}', "disparity.npy": b"\x93NUMPY garbage"},
        {"json": b'{"kind": "pseudo", "low": 0, "high": 1}', "disparity.png": b"garbage"},
        {"json": b'{"kind": "pseudo", "low": 0, "high": 1}', "disparity.png": b""},
        {"json": b'{"kind": "pseudo"}', **{k: v for k, v in encode_pseudo(np.eye(3), "png16").items() if k != "json"}},
    ],
    ids=str,
)
def test_damaged_members_are_a_decode_error(tmp_path: Path, members: dict[str, bytes]) -> None:
    image = {} if members.keys() & {"jpg", "png"} or members == {"json": b"{}"} else {"png": as_png(picture(0))}
    write_shard(tmp_path / "x-000000.tar", [{"__key__": "a", **image, **members}], facts={})
    made = Shards(name="x", root=str(tmp_path))
    made.open()
    with pytest.raises(DecodeError):
        made.read(0)


# --- label codecs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", list(CODEC_ERROR))
@pytest.mark.parametrize(
    "disparity",
    [
        np.linspace(0, 1, 5000).reshape(50, 100),
        np.random.default_rng(0).normal(3, 2, (31, 7)),
        np.random.default_rng(1).random((31, 7)) * 1e-6,
        -np.random.default_rng(2).random((31, 7)) * 1e6,
        np.random.default_rng(3).random((31, 7)) + 100,
        np.full((4, 5), 3.25),
        np.zeros((4, 5)),
        np.array([[7.5]]),
    ],
    ids=["ramp", "normal", "tiny", "negative", "far from zero", "constant", "zero", "one pixel"],
)
def test_codecs_keep_their_error(codec: str, disparity: np.ndarray) -> None:
    disparity = disparity.astype(np.float32)
    members = encode_pseudo(disparity, codec)
    back = decode_label(members.__getitem__, members)
    rounding = 4 * np.finfo(np.float32).eps * float(np.abs(disparity).max())
    bound = CODEC_ERROR[codec] * float(np.ptp(disparity)) * (1 + 2**-6) + rounding
    assert back["disparity"].dtype == np.float32 and back["disparity"].shape == disparity.shape
    assert np.abs(back["disparity"] - disparity).max() <= bound
    assert back["kind"] == DepthKind.PSEUDO and back["valid"].all() and not back["sky"].any()
    if np.ptp(disparity) == 0:
        assert_array_equal(back["disparity"], disparity)


def test_a_measured_label_survives_bit_for_bit() -> None:
    for index in (0, 2, 3, 5):
        sample = Odd().read(index)
        members = encode_truth(sample)
        label = {name: sample[name] for name in ("disparity", "valid", "sky", "kind")}  # type: ignore[literal-required]
        assert_same(decode_label(members.__getitem__, members), label)
