"""The base of the readers: what the list of samples promises, and what a user is told."""

import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from depthany.data.files import DecodeError
from depthany.data.labels import Label
from depthany.data.sources.packed import Packed
from depthany.data.sources.raw import Raw, Row, as_label, read_list
from depthany.types import DepthKind


class Toy(Raw):
    """<scene>/<frame>.png beside <scene>/<frame>.npy, with one file of the whole scene."""

    dataset: ClassVar[str] = "toy"
    layout: ClassVar[str] = "<scene>/<frame>.png"
    scans: ClassVar[int] = 0

    def __init__(self, *, name: str, root: str, split: str, index_root: str | None, scale: float) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root)
        self.options = {"scale": scale}

    def scan(self) -> Iterator[Row]:
        Toy.scans += 1
        for folder, names in self.walk(without={"other"}):
            found: dict[str, dict[str, str]] = {".png": {}, ".npy": {}, ".txt": {}}
            for name in names:
                found.setdefault(Path(name).suffix, {})[Path(name).stem] = f"{folder}/{name}"
            for stem, image, label in self.pairs(found[".png"], found[".npy"]):
                yield Row(image, image, label, {"camera": f"{folder}/camera.txt", "scene": folder, "frame": int(stem)})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        values = self.values(row.label, dtype=np.float32)
        if values.shape != image_shape:
            raise self.damaged(row.label, f"{values.shape} is not the image's {image_shape}")
        return as_label(values, kind=DepthKind.METRIC, scale=self.options["scale"], invalid=[0])


def toy(root: Path, **options: object) -> Toy:
    arguments: dict[str, object] = {"name": "toy", "root": str(root), "split": "all", "index_root": None, "scale": 1.0}
    return Toy(**arguments | options)


def depth(scene: int, frame: int) -> np.ndarray:
    return np.linspace(1, 2 + scene + frame, 12, dtype=np.float32).reshape(3, 4)


def write(folder: Path, scene: int, frame: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (scene, frame, 7)).save(folder / f"{frame}.png")
    np.save(folder / f"{frame}.npy", depth(scene, frame))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for scene in range(2):
        folder = tmp_path / "toy" / f"scene {scene}"
        for frame in range(3):
            write(folder, scene, frame)
        (folder / "camera.txt").write_text("f 1")
    return tmp_path / "toy"


def test_samples_are_what_the_files_hold(root: Path) -> None:
    source = toy(root, scale=0.5)
    assert len(source) == 6
    assert len({source.key(i) for i in range(6)}) == 6
    for i in range(6):
        sample, row = source.read(i), source.row(i)
        scene, frame = divmod(i, 3)
        assert row.extra == {"camera": f"scene {scene}/camera.txt", "scene": f"scene {scene}", "frame": frame}
        assert row.files == [row.image, row.label, row.extra["camera"]]
        assert sample["key"] == source.key(i)
        assert_array_equal(sample["image"][0, 0], (scene, frame, 7))
        assert_array_equal(sample["disparity"], 1 / (depth(scene, frame) * np.float32(0.5)))
        assert source.data(i) == (root / row.image).read_bytes()


def test_the_list_is_made_once(root: Path) -> None:
    before = toy(root)
    assert (len(before), Toy.scans) == (6, (count := Toy.scans))
    after = toy(root)
    after.prepare()
    assert [after.row(i) for i in range(6)] == [before.row(i) for i in range(6)]
    assert after.identity() == before.identity() and after.skipped == before.skipped
    assert Toy.scans == count


def add_a_pair(root: Path) -> None:
    write(root / "scene 1", 1, 9)


def add_a_scene(root: Path) -> None:
    write(root / "deep" / "scene 7", 1, 9)


def remove_a_file(root: Path) -> None:
    (root / "scene 0" / "0.npy").unlink()


def damage_the_list(root: Path) -> None:
    path = toy(root).index_path
    path.write_bytes(path.read_bytes()[:-20])


def empty_the_list(root: Path) -> None:
    toy(root).index_path.write_bytes(b"[]\n")


@pytest.mark.parametrize("change", [add_a_pair, add_a_scene, remove_a_file, damage_the_list, empty_the_list])
def test_a_change_is_seen(root: Path, change: Callable[[Path], None]) -> None:
    assert len(toy(root)) == 6
    change(root)
    count, again = Toy.scans, toy(root)
    wanted = len([p for p in root.rglob("*.png") if p.with_suffix(".npy").exists()])
    assert len(again) == wanted
    assert Toy.scans == count + 1


def test_a_file_that_grew_in_place_is_seen_by_prepare(root: Path) -> None:
    source = toy(root)
    first = source.identity()
    path = root / source.row(4).image
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"more")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = toy(root)
    assert again.identity() == first  # only folders are looked at before prepare
    again.prepare()
    assert again.identity() != first
    assert toy(root).identity() == again.identity()


def test_other_options_are_another_list_and_identity(root: Path) -> None:
    first, count = toy(root).identity(), Toy.scans
    assert toy(root, scale=2.0).identity() != first
    assert Toy.scans == count + 1  # what an option leaves out is the reader's to say


def test_identity_knows_no_place_and_no_time(root: Path, tmp_path: Path) -> None:
    first = toy(root).identity()
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    assert toy(tmp_path / "copy").identity() == first


def test_what_is_still_being_downloaded_waits_until_it_is_there(root: Path) -> None:
    (root / "scene 0" / "1.npy.aria2").write_bytes(b"")
    source = toy(root)
    assert len(source) == 5
    assert "still being downloaded" in {skip.key: skip.reason for skip in source.skipped}["toy/scene 0/1.npy"]
    (root / "scene 0" / "1.npy.aria2").unlink()
    assert len(toy(root)) == 6


def test_half_pairs_are_named(root: Path) -> None:
    (root / "scene 0" / "1.png").unlink()
    (root / "scene 1" / "2.npy").unlink()
    wanted = {("toy/scene 0/1.npy", "a label without an image"), ("toy/scene 1/2.png", "an image without a label")}
    for _ in range(2):  # scanned, then from the list
        source = toy(root)
        assert len(source) == 4
        assert {(skip.key, skip.reason) for skip in source.skipped} == wanted
        assert {skip.source for skip in source.skipped} == {"toy"}


def test_walks_into_links_but_not_in_circles_nor_hidden_folders(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", 0, 5)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "scene 0" / "up").symlink_to(root)
    write(root / ".hidden", 0, 0)
    write(root / "other", 0, 0)
    (root / "scene 0" / "._0.png").write_bytes(b"leavings of another system")
    assert sorted({toy(root).row(i).extra["scene"] for i in range(7)}) == ["linked", "scene 0", "scene 1"]


def test_the_list_may_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    source = toy(root, index_root=str(tmp_path / "lists"))
    assert len(source) == 6
    assert list((tmp_path / "lists").iterdir()) == [source.index_path]
    assert not (root / ".depthany").exists()


def test_a_root_that_cannot_be_written_points_to_index_root(root: Path) -> None:
    (root / ".depthany").write_text("a file stands in the way, as good as a read-only disk")
    with pytest.raises(ValueError, match=r"cannot write the list .*set `index_root`"):
        len(toy(root))


def test_wrong_options_are_told(root: Path) -> None:
    with pytest.raises(ValueError, match=r"source toy: root=\S+ is no folder; set `root` .*<scene>/<frame>.png"):
        toy(root / "missing").prepare()
    with pytest.raises(ValueError, match=r"split=val is not one of all"):
        toy(root, split="val")


def test_an_empty_root_is_told_with_what_was_left_out(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no samples in root=\S+, wanted <scene>/<frame>.png; it holds nothing$"):
        len(toy(tmp_path / "empty"))
    (tmp_path / "empty" / "scene_1.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"it holds scene_1.zip: unpack the archives first$"):
        len(toy(tmp_path / "empty"))
    for path in root.rglob("*.npy"):
        path.unlink()
    with pytest.raises(ValueError, match=r"left out: 6, first scene 0/0.png: an image without a label"):
        len(toy(root))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:45])


@pytest.mark.parametrize(
    ("break_it", "file"),
    [
        (lambda folder: cut(folder / "0.png"), "0.png"),
        (lambda folder: cut(folder / "0.npy"), "0.npy"),
        (lambda folder: (folder / "0.png").write_bytes(b""), "0.png"),
        (lambda folder: (folder / "0.npy").unlink(), "0.npy"),
        (lambda folder: np.save(folder / "0.npy", depth(0, 0).astype(np.float64)), "0.npy"),
        (lambda folder: np.save(folder / "0.npy", depth(0, 0)[:2]), "0.npy"),
        (lambda folder: np.save(folder / "0.npy", 0 * depth(0, 0)), "0.npy"),
    ],
    ids=["cut image", "cut label", "empty image", "gone label", "wrong type", "wrong size", "nothing valid"],
)
def test_a_bad_file_is_named_with_the_way_out(root: Path, break_it: Callable[[Path], object], file: str) -> None:
    source = toy(root)
    assert len(source) == 6
    break_it(root / "scene 0")
    with pytest.raises(DecodeError) as caught:
        source.read(0)
    message = str(caught.value)
    assert message.startswith(f"{root / 'scene 0' / file}: ") and "\n" not in message
    assert message.count(str(root)) == 1
    assert message.endswith("; fetch the file again, or delete it to leave the sample out")
    assert source.read(1)["valid"].all()


def test_packed_in_processes_it_gives_the_same_samples(root: Path, tmp_path: Path) -> None:
    source = toy(root)
    packed = Packed(source=source, root=str(tmp_path / "shards"), samples_per_shard=3, short_side=None)
    packed.prepare()
    packed.open()
    assert len(packed) == 6
    for i in range(6):
        raw, stored = source.read(i), packed.read(i)
        assert raw.keys() == stored.keys()
        assert all(np.array_equal(raw[name], stored[name]) for name in raw)  # type: ignore[literal-required]


def test_a_copy_in_another_process_has_the_same_list_or_none(root: Path) -> None:
    source = toy(root)
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    copy = pickle.loads(pickled)
    write(root / "scene 1", 1, 9)
    assert [copy.row(i) for i in range(len(copy))] == [source.row(i) for i in range(6)]
    assert len(toy(root)) == 7  # makes a new list
    with pytest.raises(ValueError, match="has changed meanwhile; start again"):
        len(pickle.loads(pickled))


def test_verify_finds_what_size_and_time_do_not_show(root: Path) -> None:
    source = toy(root)
    assert source.verify() == []
    path = root / "scene 0" / "camera.txt"
    status = path.stat()
    path.write_text("f 2")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    for _ in range(2):  # the first checksum stays the measure
        (skip,) = source.verify()
        assert skip.key == "toy/scene 0/camera.txt" and f"{source.index_path.stem}.sha256" in skip.reason


def test_official_lists_are_columns(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf/a.jpg b.png 721.5\r\n\r\n/c.jpg None 1")
    assert read_list(path) == [["a.jpg", "b.png", "721.5"], ["c.jpg", "None", "1"]]
    with pytest.raises(ValueError, match=r"none.txt is missing"):
        read_list(tmp_path / "none.txt")


def test_sources_with_other_options_have_lists_of_their_own(root: Path) -> None:
    one, other = toy(root), toy(root)
    other.options = {**one.options, "exclude": ["scene 0"]}
    assert one.index_path != other.index_path
    assert len(one) and len(other) and one.index_path.exists() and other.index_path.exists()
