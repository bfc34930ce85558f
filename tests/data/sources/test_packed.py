"""Sets of shards as sources: which images are in use, the same samples wherever they lie, and packing."""

import gc
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from depthany.data import storage
from depthany.data.files import DecodeError
from depthany.data.labels import CODEC_ERROR, decode_label, encode_pseudo, encode_truth
from depthany.data.order import EpochOrder
from depthany.data.shards import (
    CATALOG,
    Shard,
    ShardError,
    index_tar,
    read_catalog,
    write_catalog,
    write_index,
    write_shard,
)
from depthany.data.sources import packed as room
from depthany.data.sources.packed import ANY, Packed, Shards, stored_teachers
from depthany.data.sources.photos import PhotoFolder
from depthany.data.sources.scenes import Scenes
from depthany.types import DepthKind, DepthSample
from tests.flaky_server import FlakyServer

TEACHER = "teacher-00000000"


def picture(seed: int, height: int = 12, width: int = 18) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


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


def test_damaged_samples_are_listed_and_the_others_are_kept(tmp_path: Path, capsys: Any) -> None:
    made = packed(tmp_path, Odd())
    said = capsys.readouterr().out
    assert f"odd: 2 of 6 images cannot be used: {made.folder / 'shards.json'}" in said.replace("\n", " ")
    assert "not used: odd/1: odd/1 is torn\nnot used: odd/4: odd/4 is torn\n" in said
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
    with pytest.raises(ShardError, match="delete its index"):
        packed(tmp_path, scenes())


def test_a_limit_packs_a_prefix_of_the_same_bytes(tmp_path: Path) -> None:
    whole = packed(tmp_path / "whole", scenes())
    few = packed(tmp_path / "few", scenes(), limit=5)
    assert few.chunks == [4, 1] and len(few) == 5
    assert [few.key(i) for i in range(5)] == [whole.key(i) for i in range(5)]
    assert [tar.name for tar in sorted(few.folder.glob("*.tar"))] == [tar.name for tar in whole.tars[:2]]
    for tar, same in zip(sorted(few.folder.glob("*.tar")), whole.tars, strict=False):
        assert tar.read_bytes() == same.read_bytes()


def test_a_set_grows_and_shrinks(tmp_path: Path) -> None:
    """Its folder is not named by the number of scenes: a longer set goes on, a shorter one reads what it asks for."""
    first = packed(tmp_path, scenes(6))
    before = times(tmp_path)
    longer = packed(tmp_path, scenes(10))
    assert longer.folder == first.folder and len(longer) == 10
    kept = f"{first.folder.name}/{first.tars[0].name}"
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
    assert len({one.folder, other.folder, smaller.folder}) == 3


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


def pack_and_tell(root: Path, results: Any) -> None:
    cv2.GaussianBlur(picture(0, 900, 900), (0, 0), 3)  # OpenCV's threads are there, as in a process that has trained
    made = packed(root, scenes(40))
    results.put([made.key(i) for i in range(len(made))])


def test_rivals_pack_a_set_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    rivals = [context.Process(target=pack_and_tell, args=(tmp_path, results)) for _ in range(3)]
    for rival in rivals:
        rival.start()
    keys = [results.get(timeout=60) for _ in rivals]
    for rival in rivals:
        rival.join()
        assert rival.exitcode == 0
    assert keys == [[scenes(40).key(i) for i in range(40)]] * 3
    folder = packed(tmp_path, scenes(40)).folder
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_killed_packer_is_taken_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    rival = context.Process(target=packed, args=(tmp_path, scenes(4000)))
    rival.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert rival.pid
    os.kill(rival.pid, signal.SIGKILL)
    rival.join()
    made = packed(tmp_path, scenes(12))
    assert [made.key(i) for i in range(12)] == [scenes(12).key(i) for i in range(12)]


def test_shards_of_an_earlier_version_are_packed_again(tmp_path: Path) -> None:
    made = packed(tmp_path, scenes())
    before = {path: path.read_bytes() for path in made.folder.iterdir()}
    for tar in made.tars[:2]:
        index = index_tar(tar) | {"version": 1, "crc32": 0}
        tar.with_suffix(".json").write_text(json.dumps(index))
    packed(tmp_path, scenes())
    assert {path: path.read_bytes() for path in made.folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"scenes: .*file/scenes-\w+ cannot be written: Not a directory"):
        packed(tmp_path / "file", scenes())


# --- which images are in use ------------------------------------------------------------------------------------------


def opened(root: Path | str, **options: Any) -> Shards:
    attributes = {name: options.pop(name) for name in ("teacher", "limit", "quality", "window") if name in options}
    made = Shards(name="set", root=str(root), **options)
    for name, value in attributes.items():
        setattr(made, name, value)
    made.prepare()
    made.open()
    return made


def write_set(folder: Path, sizes: list[int], *, start: int = 0) -> None:
    for shard, size in enumerate(sizes, start=start):
        rows = [{"__key__": f"set/{shard}-{i}", "png": as_png(picture(100 * shard + i))} for i in range(size)]
        write_shard(folder / f"set-{shard:06d}.tar", rows, facts={})


def keys_of(made: Shards) -> list[str]:
    return [made.key(i) for i in range(len(made))]


def write_labels(
    made: Shards, folder: Path, *, teacher: str = TEACHER, leave_out: tuple[str, ...] = (), facts: Any = None
) -> dict[str, np.ndarray]:
    """Random maps and scores for every image but some, in another order than the images'."""
    maps: dict[str, np.ndarray] = {}
    catalog = read_catalog(made.root)
    scores = np.full(int(catalog.starts[-1]), np.nan, np.float32)
    for i in range(len(catalog)):
        shard = Shard(catalog.tar(i), index=os.path.join(made.root, f"{Path(catalog.tar(i)).stem}.json"))
        rows = []
        for place, key in reversed(list(enumerate(shard.keys))):
            if key not in leave_out:
                maps[key] = np.random.default_rng(len(maps)).random((9, 9))
                scores[catalog.starts[i] + place] = 1 / (1 + len(maps) % 7)
                rows.append({"__key__": key, **encode_pseudo(maps[key], "png16")})
        path = folder / f"{Path(shard.tar).stem}.{teacher}.tar"
        write_shard(path, rows, facts={"images": shard.sha256, "teacher": teacher, **(facts or {})})
    np.save(folder / f"labels.{teacher}.quality.npy", scores)
    return maps


def test_the_catalog_is_made_and_grows_but_never_shrinks_in_silence(tmp_path: Path) -> None:
    write_set(tmp_path, [3, 2])
    assert opened(tmp_path).chunks == [3, 2]
    write_catalog(tmp_path, name="set", dropped={"set-000000.tar": [1]})
    assert opened(tmp_path).chunks == [2, 2]
    before = times(tmp_path)
    opened(tmp_path)
    assert times(tmp_path) == before
    write_set(tmp_path, [4], start=2)
    assert opened(tmp_path).chunks == [2, 2, 4]  # what was dropped stays dropped
    (tmp_path / "set-000001.tar").rename(tmp_path / "elsewhere")
    with pytest.raises(
        ShardError, match=r"set: set-000001\.tar is not in .*: copy it there again, or delete shards\.json"
    ):
        opened(tmp_path)
    write_set(tmp_path, [4], start=3)
    with pytest.raises(
        ShardError, match=r"set: set-000001\.tar is not in .*: copy it there again, or delete shards\.json"
    ):
        opened(tmp_path)
    (tmp_path / CATALOG).unlink()
    assert opened(tmp_path).chunks == [3, 4, 4]


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=rf"set: no shards <set>-000000\.tar with an index in {tmp_path}"):
        opened(tmp_path)
    with pytest.raises(ShardError, match=r"set: no shards <set>-000000\.tar with an index in \S+nowhere"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="set: pipe:x is neither a path nor a URL"):
        opened("pipe:x")


def test_what_is_dropped_or_not_good_enough_is_not_in_use(tmp_path: Path) -> None:
    """Against a plain loop over all images, for every threshold and limit."""
    sizes = [5, 1, 0, 7, 3]
    write_set(tmp_path, sizes)
    dropped = {"set-000000.tar": [0, 4], "set-000001.tar": [0], "set-000003.tar": [1, 2, 3]}
    write_catalog(tmp_path, name="set", dropped=dropped)
    maps = write_labels(opened(tmp_path), tmp_path, leave_out=("set/0-2", "set/4-0"))
    scores = np.load(tmp_path / f"labels.{TEACHER}.quality.npy")
    everything = [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]
    for quality in (None, 0.0, 0.2, 0.4, 1.0, 1.1):
        kept = [
            (shard, i)
            for at, (shard, i) in enumerate(everything)
            if i not in dropped.get(f"set-{shard:06d}.tar", []) and (quality is None or scores[at] >= quality)
        ]
        for limit in (None, 0, 1, 4, 7, 100):
            made = opened(tmp_path, teacher=TEACHER, quality=quality, limit=limit)
            wanted = [f"set/{shard}-{i}" for shard, i in kept[:limit]]
            assert keys_of(made) == wanted and len(made) == len(wanted) == sum(made.chunks)
            counts = [sum(shard == s for shard, _ in kept[:limit]) for s in range(len(sizes))]
            assert made.chunks == counts[: made.num_shards] and not sum(counts[made.num_shards :])
            for i, key in enumerate(wanted):
                if key in maps:
                    np.testing.assert_allclose(made.read(i)["disparity"], maps[key], atol=1e-5)


def test_the_fingerprint_is_that_of_the_images_in_use(tmp_path: Path) -> None:
    write_set(tmp_path / "a", [4, 3, 2])
    write_labels(opened(tmp_path / "a"), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    quality = {"teacher": TEACHER, "quality": 0.2}
    whole = opened(tmp_path / "a").fingerprint
    assert whole == opened(tmp_path / "b").fingerprint == opened(tmp_path / "b", teacher=TEACHER).fingerprint
    others = [opened(tmp_path / "a", limit=8), opened(tmp_path / "a", **quality)]
    others.append(opened(tmp_path / "a", teacher=TEACHER, quality=0.3))
    write_catalog(tmp_path / "a", name="set", dropped={"set-000001.tar": [0]})
    others.append(opened(tmp_path / "a"))
    write_catalog(tmp_path / "a", name="set", dropped={"set-000001.tar": [1]})
    others.append(opened(tmp_path / "a"))
    write_set(tmp_path / "b", [1], start=3)
    others += [opened(tmp_path / "b"), opened(tmp_path / "b", limit=9)]
    prints = [made.fingerprint for made in others]
    assert len({whole, *prints[:-1]}) == len(prints) and prints[-1] == whole  # what is beyond the limit does not count


def test_scores_of_another_set_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, [3])
    write_labels(opened(tmp_path), tmp_path)
    path = tmp_path / f"labels.{TEACHER}.quality.npy"
    for damage in (lambda: np.save(path, np.zeros(4, np.float32)), lambda: np.save(path, np.zeros(3)), path.unlink):
        damage()
        with pytest.raises(ShardError, match=r"quality\.npy: no scores .* make the scores again with python -m"):
            opened(tmp_path, teacher=TEACHER, quality=0.5)
    path.write_bytes(pickle.dumps(np.zeros(3, np.float32)))
    with pytest.raises(ShardError, match="no scores"):
        opened(tmp_path, teacher=TEACHER, quality=0.5)


# --- a teacher's labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_a_teachers_labels_are_found_by_key(tmp_path: Path, apart: bool) -> None:
    write_set(tmp_path / "set", [4, 3])
    folder = tmp_path / ("labels" if apart else "set")
    roots = {"labels_root": str(folder)} if apart else {}
    maps = write_labels(opened(tmp_path / "set"), folder, leave_out=("set/0-2",))
    made = opened(tmp_path / "set", teacher=TEACHER, **roots)
    assert made.label_file(1, TEACHER) == folder / f"set-000001.{TEACHER}.tar"
    for i, key in enumerate(keys_of(made)):
        if key == "set/0-2":
            with pytest.raises(DecodeError, match="has no label for it"):
                made.read(i)
            continue
        sample = made.read(i)
        assert sample["kind"] == DepthKind.PSEUDO and sample["valid"].all() and not sample["sky"].any()
        np.testing.assert_allclose(sample["disparity"], maps[key], atol=1e-5)
        shard, place = map(int, key.removeprefix("set/").split("-"))
        assert_array_equal(sample["image"], picture(100 * shard + place)[..., ::-1])


def test_labels_that_are_missing_are_told_when_the_set_is_opened(tmp_path: Path) -> None:
    write_set(tmp_path, [4, 3])
    with pytest.raises(ShardError, match=rf"set-000000\.tar and 1 more shards are without labels of {TEACHER}"):
        opened(tmp_path, teacher=TEACHER)
    write_labels(opened(tmp_path), tmp_path)
    opened(tmp_path, teacher=TEACHER)
    (tmp_path / f"set-000001.{TEACHER}.json").unlink()
    with pytest.raises(ShardError, match=rf"set-000001\.tar is without labels of {TEACHER}"):
        opened(tmp_path, teacher=TEACHER)
    assert opened(tmp_path, teacher=TEACHER, limit=4).chunks == [4]  # they are not needed


def test_labels_of_other_images_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path, [2, 2])
    write_labels(opened(tmp_path), tmp_path)
    write_set(tmp_path, [3, 2])  # the first shard is another one now
    (tmp_path / CATALOG).unlink()
    with pytest.raises(ShardError, match=rf"set-000000\.{TEACHER}\.tar has labels of other images: label"):
        opened(tmp_path, teacher=TEACHER)
    write_labels(opened(tmp_path), tmp_path)
    write_shard(tmp_path / f"set-000001.{TEACHER}.tar", [{"__key__": "stranger", "json": b"{}"}], facts={})
    made = opened(tmp_path, teacher=TEACHER)  # found when it is come to: the sample is damaged
    assert "disparity" in made.read(0)
    with pytest.raises(DecodeError, match="has labels of other images"):
        made.read(3)


def test_whose_labels_there_are(tmp_path: Path) -> None:
    write_set(tmp_path, [2, 2, 1])
    plain = opened(tmp_path)
    assert stored_teachers(plain) == []
    facts = {"weights": "ab", "codec": "png16"}
    write_labels(plain, tmp_path, teacher="b", facts=facts)
    assert [tuple(found) for found in stored_teachers(plain)] == [("b", {"teacher": "b", **facts}, [0, 1, 2])]
    maps = write_labels(plain, tmp_path, teacher="a.1", facts=facts | {"codec": "png8"})
    for path in (f"set-000000.{TEACHER}", "set-000002.a.1"):
        (tmp_path / f"{path}.json").unlink(missing_ok=True)
    assert {found.teacher: found.shards for found in stored_teachers(plain)} == {"a.1": [0, 1], "b": [0, 1, 2]}
    shard = Shard(tmp_path / "set-000001.b.tar")
    write_index(Path(shard.index), index_tar(Path(shard.tar)) | {"facts": shard.facts | {"codec": "float16"}})
    found = {(stored.teacher, stored.facts["codec"]): stored.shards for stored in stored_teachers(plain)}
    assert found == {("a.1", "png8"): [0, 1], ("b", "png16"): [0, 2], ("b", "float16"): [1]}
    made = opened(tmp_path, teacher=ANY)
    for i, key in enumerate(keys_of(made)):
        if i < 4:  # the first teacher by name
            np.testing.assert_allclose(made.read(i)["disparity"], maps[key], atol=1e-5)
        assert "disparity" in made.read(i)


# --- wherever they lie ------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(storage, "PAUSE_S", 0.001)
    monkeypatch.setattr(storage, "SPARE", 0)  # copies are kept however full the disk under the tests is


def served(folder: Path) -> tuple[dict[str, Any], Path]:
    """A labelled set in a folder, and what it reads as: sample by key."""
    write_set(folder, [6, 5, 4])
    write_catalog(folder, name="set", dropped={"set-000001.tar": [2]})
    local = opened(folder)
    write_labels(local, folder)
    rows = [
        {"images": images.sha256, "sha256": labels.sha256}
        for images, labels in ((local.shard(i), Shard(local.label_file(i, TEACHER))) for i in range(3))
    ]
    (folder / f"labels.{TEACHER}.json").write_text(json.dumps({"version": 1, "teacher": TEACHER, "shards": rows}))
    local = opened(folder, teacher=TEACHER, quality=0.2)
    return {local.key(i): local.read(i) for i in range(len(local))}, folder


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_a_server_that_breaks_gives_the_same_samples(tmp_path: Path, cached: bool, ranges: bool) -> None:
    if not cached and not ranges:
        return
    wanted, folder = served(tmp_path / "set")
    cache = str(tmp_path / "cache") if cached else None
    with FlakyServer(folder, share=0.2, ranges=ranges) as server:
        made = opened(server.url, teacher=TEACHER, quality=0.2, cache=cache)
        assert len(made) == len(wanted)
        for i in np.random.default_rng(0).permutation(len(made)):
            assert_same(made.read(int(i)), wanted[made.key(int(i))])
        assert 1 < max(server.requests.values()) < 15
        if cached:
            before = sum(server.requests.values())
            room._opened.clear()
            assert {made.read(i)["key"] for i in range(len(made))} == set(wanted)
            assert sum(server.requests.values()) == before


@pytest.mark.usefixtures("impatient")
@pytest.mark.slow
def test_a_server_that_is_broken_costs_samples_and_never_hangs(tmp_path: Path) -> None:
    _, folder = served(tmp_path / "set")
    with FlakyServer(folder) as server:
        made = opened(server.url, teacher=TEACHER)
        made.read(0)
        server.share, server.in_a_row, server.faults = 1.0, 10**9, ("stall",)
        started = time.monotonic()
        for i in range(1, len(made)):
            with pytest.raises(DecodeError, match=rf"{server.url}/set-00000\d\..* cannot be read, tried 5 times"):
                made.read(i)
            assert made.key(i)
        waited = storage.TRIES * storage.TIMEOUT_S + 1
        assert time.monotonic() - started < 3 * waited  # once for each shard, not for each sample


@pytest.mark.usefixtures("impatient")
def test_what_a_server_does_not_have_is_told_when_the_set_is_opened(tmp_path: Path) -> None:
    _, folder = served(tmp_path / "set")
    with FlakyServer(folder) as server:
        with pytest.raises(ShardError, match=r"other/shards\.json is missing"):
            opened(f"{server.url}/other")
        with pytest.raises(ShardError, match=r"labels\.nobody\.json: no list of a teacher's labels"):
            opened(server.url, teacher="nobody")
        with pytest.raises(ShardError, match="cannot be listed: name the teacher"):
            opened(server.url, teacher=ANY)
        with pytest.raises(ShardError, match="cannot be listed: name the teacher"):
            stored_teachers(opened(server.url))
        with pytest.raises(ShardError, match="set labels_root to a folder"):
            opened(server.url).label_file(0, TEACHER)
        labels = {"teacher": TEACHER, "labels_root": str(folder)}
        assert "disparity" in opened(server.url, **labels).read(0)


def test_tars_of_others_are_read_where_they_lie(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    for shard in range(2):
        with tarfile.open(theirs / f"{shard:05d}.tar", "w") as tar:
            for i in range(3):
                for kind, data in (("txt", b"a cat"), ("pkl", b"\x80\x04."), ("png", as_png(picture(10 * shard + i)))):
                    member = tarfile.TarInfo(f"{i:09d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        write_index(ours / f"{shard:05d}.json", index_tar(theirs / f"{shard:05d}.tar", foreign=True))
    write_catalog(ours, name="theirs", base=str(theirs))
    made = opened(ours)
    assert keys_of(made) == [f"{shard:05d}/{i:09d}" for shard in range(2) for i in range(3)]
    for i in range(6):
        assert_array_equal(made.read(i)["image"], picture(10 * (i // 3) + i % 3)[..., ::-1])
    write_labels(made, ours)
    assert "disparity" in opened(ours, teacher=TEACHER).read(5)
    with FlakyServer(tmp_path) as server:
        write_catalog(ours, name="theirs", base="../theirs")
        assert keys_of(opened(f"{server.url}/ours")) == keys_of(made)
        write_catalog(ours, name="theirs", base=f"{server.url}/theirs")  # their tars there, our indices here
        assert_array_equal(opened(ours).read(4)["image"], made.read(4)["image"])


# --- damage in the middle of a run ------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def index_of_another(path: Path) -> None:
    shutil.copy(path.with_name("set-000000.json"), path.with_suffix(".json"))


def no_index(path: Path) -> None:
    path.with_suffix(".json").unlink()


def broken_index(path: Path) -> None:
    path.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes()[:-100])


@pytest.mark.parametrize("damage", [Path.unlink, cut, index_of_another, no_index, broken_index])
def test_a_shard_that_is_damaged_meanwhile_costs_its_samples(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_set(tmp_path, [3, 4, 2])
    made = opened(tmp_path)
    keys = keys_of(made)
    made.open()
    damage(tmp_path / "set-000001.tar")
    for i, key in enumerate(keys):
        if key.startswith("set/1-"):
            with pytest.raises(DecodeError, match=r"set-000001\.(tar|json).*(copy|delete)") as caught:
                made.read(i)
            assert "\n" not in str(caught.value)
            assert made.key(i).startswith("set/set-000001:")  # it has a name all the same
        else:
            assert made.key(i) == key and made.read(i)["key"] == key


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bombs = {"png": bytearray(as_png(picture(0))), "jpg": bytearray(cv2.imencode(".jpg", picture(0))[1].tobytes())}
    bombs["png"][16:24] = (9000).to_bytes(4, "big") * 2
    bombs["png"][29:33] = zlib.crc32(bombs["png"][12:29]).to_bytes(4, "big")
    at = bombs["jpg"].index(b"\xff\xc0") + 5
    bombs["jpg"][at : at + 4] = (65_000).to_bytes(2, "big") * 2
    write_shard(tmp_path / "x-000000.tar", [{"__key__": k, k: bytes(v)} for k, v in bombs.items()], facts={})
    made = opened(tmp_path)
    for i, kind in enumerate(bombs):
        started = time.monotonic()
        with pytest.raises(DecodeError, match=rf"x-000000\.tar: {kind}: .* pixels.* limit of"):
            made.read(i)
        assert time.monotonic() - started < 1


class Canary:
    """Whoever unpickles it leaves a file behind."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


@pytest.mark.parametrize("name", ["a.pkl", "a.pickle", "a.pyd", "a.pth", "a.pt", "a.jpg", "a.disparity.npy", "a.json"])
def test_no_member_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    path, danger = tmp_path / "set" / "x-000000.tar", pickle.dumps(Canary())
    with tarfile.open(path, "w") as tar:
        image = as_png(picture(0))
        for member, data in (("a.png", image), ("a.json", b'{"kind": "metric"}'), (name, danger)):
            if member != name or data is danger:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    with pytest.raises((ShardError, DecodeError)) as caught:
        write_index(path.with_suffix(".json"), index_tar(path))
        opened(tmp_path / "set").read(0)
    assert "x-000000.tar" in str(caught.value) and "\n" not in str(caught.value)
    for file in tmp_path.rglob("*.json"):
        file.unlink()
    try:
        write_index(path.with_suffix(".json"), index_tar(path, foreign=True))
        write_catalog(path.parent, name="x", base=".")
        opened(path.parent).read(0)
    except DecodeError as error:
        assert "x-000000.tar" in str(error)
    for other in (path, path.with_suffix(".json"), path.with_name(CATALOG)):
        other.write_bytes(danger)  # and no file of ours is
    with pytest.raises(ShardError):
        opened(path.parent)
    assert not list(tmp_path.rglob("canary"))


# --- memory and processes ---------------------------------------------------------------------------------------------


def big_catalog(folder: Path, shards: int) -> Shards:
    row = {"samples": 1000, "bytes": 10_240, "sha256": "0" * 64}
    rows = [{"tar": f"set-{i:06d}.tar", **row, "dropped": [i % 1000]} for i in range(shards)]
    (folder / CATALOG).write_text(json.dumps({"version": 1, "name": "set", "base": None, "shards": rows}))
    for i in range(shards):
        (folder / f"set-{i:06d}.tar").touch()
        (folder / f"set-{i:06d}.json").touch()
    return opened(folder)


def test_what_workers_copy_is_arrays(tmp_path: Path) -> None:
    """A list of names is copied to every loader worker as soon as it is read, object by object."""
    made = big_catalog(tmp_path, 1000)
    assert len(made) == 1000 * 999 and made.chunks == [999] * 1000
    seen: dict[int, Any] = {}
    pending: list[Any] = [made.__dict__]
    while pending:
        thing = pending.pop()
        if id(thing) not in seen and not isinstance(thing, type | ModuleType | FunctionType):
            seen[id(thing)] = thing
            pending += gc.get_referents(thing)
    assert len(seen) < 300
    assert len(pickle.dumps(made)) < 1000 * 150  # what a spawned worker is sent


def test_a_window_of_shards_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, [4] * 30)
    made = opened(tmp_path, window=3)
    wanted = keys_of(made)
    room._opened.clear()
    seen: list[str] = []
    monkeypatch.setattr(room, "Shard", lambda tar, **options: seen.append(tar) or Shard(tar, **options))
    order = EpochOrder(counts=made.chunks, seed=0, window=3)
    starts = np.cumsum([0, *made.chunks])
    places = [int(starts[chunk] + index) for chunk, index in (order[p] for p in range(len(order)))]
    files = len(os.listdir("/proc/self/fd"))
    assert sorted(made.read(place)["key"] for place in places) == sorted(wanted)
    assert len(seen) == len(set(seen)) == 30  # each is opened once in an epoch
    assert len(os.listdir("/proc/self/fd")) - files <= 12
    room._opened.clear()
    assert len(os.listdir("/proc/self/fd")) <= files


def read_all(made: Shards, results: Any) -> None:
    results.put([(made.key(i), int(made.read(i)["image"].sum())) for i in range(len(made))])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_their_parent_does(tmp_path: Path, method: str) -> None:
    wanted, folder = served(tmp_path)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    with FlakyServer(folder) as server:
        for root in (str(folder), server.url):
            made = opened(root, teacher=TEACHER, quality=0.2)
            made.read(0)  # a shard is open, and with the server a connection
            workers = [context.Process(target=read_all, args=(made, results)) for _ in range(2)]
            for worker in workers:
                worker.start()
            sums = [(key, int(sample["image"].sum())) for key, sample in wanted.items()]
            assert [results.get(timeout=60) for _ in workers] == [sums] * 2
            for worker in workers:
                worker.join()
                assert worker.exitcode == 0


@pytest.mark.slow
def test_the_benchmark_of_the_order_prints_its_four_numbers() -> None:
    script = Path(__file__).parents[3] / "scripts" / "benchmark_order.py"
    command = [sys.executable, str(script), "--shards", "100", "--rounds", "2"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert list(lines) == ["set", "opening", "memory", "checkpoint", "step"]
    assert float(lines["opening"].split()[0]) < 5 and float(lines["memory"].split()[0]) < 1024
    assert 0 < int(lines["checkpoint"].split()[0]) < 1_000_000 and 0 < float(lines["step"].split()[0]) < 5


# --- damaged members --------------------------------------------------------------------------------------------------


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
    made = opened(tmp_path)
    with pytest.raises(DecodeError, match=r"x-000000\.tar: a: "):
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
