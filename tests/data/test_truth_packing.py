"""Packing a labelled set: training reads from the shards what the reader gives, whatever interrupts or is damaged."""

import csv
import errno
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from depthany.config.build import build
from depthany.config.launch import config_dir
from depthany.data.shards import Shard, ShardError
from depthany.data.sources.folder_pair import FolderPair
from depthany.data.sources.packed import Shards
from depthany.data.sources.tree import PackError
from depthany.data.truth_packing import TruthPacking
from depthany.types import DepthSample
from tests.data.sources.writers.analytic import picture, save_picture, scene_depth
from tests.data.sources.writers.blendedmvs import write_blendedmvs
from tests.data.sources.writers.ddad import write_ddad
from tests.data.sources.writers.diml import write_diml_indoor, write_diml_outdoor
from tests.data.sources.writers.diode import write_diode
from tests.data.sources.writers.eth3d import write_eth3d
from tests.data.sources.writers.hrwsi import write_hrwsi
from tests.data.sources.writers.hypersim import write_hypersim, write_metadata
from tests.data.sources.writers.ibims import write_ibims
from tests.data.sources.writers.irs import write_irs
from tests.data.sources.writers.kitti import write_kitti
from tests.data.sources.writers.kitti_raw import write_kitti_raw
from tests.data.sources.writers.megadepth import write_megadepth
from tests.data.sources.writers.nyuv2 import write_labelled, write_nyuv2
from tests.data.sources.writers.scannet import write_scannet
from tests.data.sources.writers.sintel import write_sintel
from tests.data.sources.writers.tartanair import write_tartanair, write_tartanair_v2
from tests.data.sources.writers.vkitti2 import write_vkitti2
from tests.processes import Zygote

SHAPE = (18, 24)


def reader(name: str, root: Path, **options: Any) -> Any:
    """As the verb builds it from configs/dataset."""
    node = OmegaConf.load(config_dir() / "dataset" / f"{name}.yaml")
    return build(OmegaConf.merge({"root": str(root), "dataset": node}, {"dataset": options}).dataset)


def packing(source: Any, out: Path, **options: Any) -> TruthPacking:
    return TruthPacking(source=source, out=out, **{"samples_per_shard": 3, "pictures": "keep", "workers": 1} | options)


def packed(out: Path, name: str) -> dict[str, DepthSample]:
    """What training reads, by key."""
    source = Shards(name=name, root=str(out), labels_root=None, cache=None)
    source.prepare()
    source.open()
    samples = [source.read(i) for i in range(len(source))]
    assert len({sample["key"] for sample in samples}) == len(samples)
    return {sample["key"]: sample for sample in samples}  # type: ignore[misc]  # all are labelled


def raw(source: Any) -> dict[str, DepthSample]:
    return {source.key(i): source.read(i) for i in range(len(source))}


def assert_equal(found: dict[str, DepthSample], wanted: dict[str, DepthSample]) -> None:
    """Bit for bit, -0.0 and 0.0 told apart."""
    assert found.keys() == wanted.keys()
    for key, sample in wanted.items():
        assert found[key]["kind"] == sample["kind"]
        for part in ("image", "disparity", "valid", "sky"):
            one, other = found[key][part], sample[part]  # type: ignore[literal-required]
            assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), (key, part)


def dropped(out: Path) -> dict[str, str]:
    with open(out / "dropped.csv", newline="") as file:
        return {row["key"] or row["file"]: row["reason"] for row in csv.DictReader(file)}


def write_folder_pair(root: Path, numbers: Any = range(4)) -> None:
    for number in numbers:
        save_picture(root / "images" / f"{number}.{'jpg' if number % 2 else 'png'}", picture(*SHAPE, number=number))
        (root / "depth").mkdir(exist_ok=True)
        np.save(root / "depth" / f"{number}.npy", scene_depth(*SHAPE, number=number).astype(np.float32))


def write_index_csv(root: Path, scale: float = 1.0) -> None:
    write_folder_pair(root)
    rows = [f"images/{n}.{'jpg' if n % 2 else 'png'},depth/{n}.npy,own,depth,{scale},nan;inf" for n in range(4)]
    text = "\n".join(["image,depth,dataset,kind,scale_to_metres,invalid", *rows])
    (root / "index.csv").write_text(text)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "blendedmvs": write_blendedmvs,
    "ddad": write_ddad,
    "diml_indoor": write_diml_indoor,
    "diml_outdoor": lambda root: write_diml_outdoor(root, min_confidence=0.6),
    "diode": write_diode,
    "eth3d": write_eth3d,
    "folder_pair": write_folder_pair,
    "hrwsi": write_hrwsi,
    "hypersim": write_hypersim,
    "ibims": write_ibims,
    "index_csv": write_index_csv,
    "irs": write_irs,
    "kitti": write_kitti,
    "kitti_raw": write_kitti_raw,
    "megadepth": lambda root: write_megadepth(root, outliers=False),
    "nyuv2": write_nyuv2,
    "nyuv2_labelled": lambda root: write_labelled(root, depth="raw"),
    "scannet": write_scannet,
    "sintel": write_sintel,
    "tartanair": write_tartanair,
    "tartanair_v2": write_tartanair_v2,
    "vkitti2": write_vkitti2,
}


def test_every_labelled_set_is_written_in_miniature() -> None:
    names = {path.stem for path in (config_dir() / "dataset").glob("*.yaml")}
    assert names - {"embedded", "shards"} == WRITERS.keys()


@pytest.mark.parametrize("name", [*WRITERS, "hypersim hdr"])
def test_every_set_gives_the_same_samples_from_shards(name: str, tmp_path: Path) -> None:
    root, options = tmp_path / "raw", dict[str, Any]()
    root.mkdir()
    if name == "hypersim hdr":  # colour that the reader computes, and cameras of the scenes
        write_metadata(tmp_path / "metadata")
        name, options = "hypersim", {"image": "hdr", "metadata": str(tmp_path / "metadata")}
        write_hypersim(root, exposure=3.0)
    else:
        WRITERS[name](root)
    source = reader(name, root, **options | ({"split": "all"} if name == "nyuv2_labelled" else {}))
    for pictures, suffixes in (("keep", {"jpg", "png"}), ("fast", {"jpg", "ppm"})):
        out = tmp_path / pictures
        summary = packing(source, out, pictures=pictures).run()
        wanted = raw(source)
        assert summary.images == len(wanted) > 0 and not summary.dropped
        assert_equal(packed(out, source.name), wanted)
        for tar in out.glob("*.tar"):
            shard = Shard(tar)
            for place, key in enumerate(shard.keys):
                row, note = source.row(list(wanted).index(key)), json.loads(shard.read(place, "json"))
                sizes = {path: size for path, (size, _) in note["files"].items()}
                assert sizes == {path: os.path.getsize(source.root / path) for path in row.files}
                assert note["factor"] == getattr(source, "factor", None) and note["source"]["dataset"]
                assert not options or note["extra"]["camera"] == row.extra["camera"]
                assert shard.files[place].keys() - {"disparity.npy", "json"} < suffixes
                if "jpg" in shard.files[place]:
                    assert shard.read(place, "jpg") == (source.root / row.image).read_bytes()


# --- a download that goes on, and files that change -------------------------------------------------------------------


def pair(root: Path, **options: Any) -> FolderPair:
    return reader("folder_pair", root, quantity="depth", scale=1.0, **options)  # type: ignore[no-any-return]


def test_only_what_is_missing_is_done_and_damage_is_tried_again_once_it_has_changed(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    write_folder_pair(root, range(5))
    whole = {path: (root / path).read_bytes() for path in ("depth/1.npy", "images/2.png", "depth/3.npy")}
    (root / "depth/1.npy").write_bytes(whole["depth/1.npy"][:200])
    (root / "images/2.png").write_bytes(b"")
    np.save(root / "depth/3.npy", np.full(SHAPE, np.nan, np.float32))
    save_picture(root / "images/alone.png", picture(*SHAPE, number=1))

    summary = packing(pair(root), out).run()
    assert (summary.images, summary.shards, summary.dropped) == (2, 2, {"undecodable": 3})
    assert_equal(packed(out, "folder_pair"), {_key(i): pair(root).read(i) for i in (0, 4)})
    reasons = dropped(out)
    assert str(root / "depth/1.npy") in reasons[_key(1)] and "fetch the file again" in reasons[_key(1)]
    assert f"{root}/images/2.png: the file is empty" in reasons[_key(2)]
    assert "no pixel has a valid value" in reasons[_key(3)]
    assert reasons["images/alone.png"] == "left out: an image without a label"
    assert packing(pair(root), out).run().made == 0  # nothing has changed: the damaged ones are not read again

    tars = {path: path.read_bytes() for path in out.glob("*.tar")}
    for path, data in whole.items():
        (root / path).write_bytes(data)
    write_folder_pair(root, range(5, 7))  # has been downloaded since
    summary = packing(pair(root), out).run()
    assert (summary.made, summary.images, summary.dropped) == (5, 7, {})
    assert_equal(packed(out, "folder_pair"), raw(pair(root)))
    assert all(path.read_bytes() == data for path, data in tars.items())
    assert packing(pair(root), out).run().made == 0


def _key(number: int) -> str:
    return f"folder_pair/images/{number}_{'jpg' if number % 2 else 'png'}"


def test_a_file_that_a_disk_did_not_give_is_tried_again_although_it_has_not_changed(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    write_folder_pair(root)
    source = pair(root)

    def content(path: str) -> bytes:
        if path == "depth/1.npy":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return (root / path).read_bytes()

    source.content = content  # type: ignore[method-assign]
    summary = packing(source, out).run()
    assert summary.dropped == {"unreadable": 1} and "Input/output error" in summary.damaged[0]
    assert packing(pair(root), out).run().dropped == {}
    assert_equal(packed(out, "folder_pair"), raw(pair(root)))


def test_a_sample_whose_files_or_row_changed_is_replaced(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    write_index_csv(root)
    packing(reader("index_csv", root), out).run()
    np.save(root / "depth/2.npy", scene_depth(9, 12, number=7).astype(np.float32))
    summary = packing(reader("index_csv", root), out).run()
    assert (summary.made, summary.images, summary.dropped) == (1, 4, {"replaced": 1})
    assert_equal(packed(out, "index_csv"), raw(reader("index_csv", root)))
    write_index_csv(root, scale=0.001)  # the same files mean something else
    packing(reader("index_csv", root), out).run()
    assert_equal(packed(out, "index_csv"), raw(reader("index_csv", root)))


def test_a_label_rewritten_at_its_size_is_packed_again_and_a_copied_one_is_not(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    write_folder_pair(root)
    packing(pair(root), out).run()
    np.save(root / "depth/2.npy", scene_depth(*SHAPE, number=9).astype(np.float32))
    os.utime(root / "depth/1.npy")
    summary = packing(pair(root), out).run()
    assert (summary.made, summary.images, summary.dropped) == (1, 4, {"replaced": 1})
    assert_equal(packed(out, "folder_pair"), raw(pair(root)))


def test_labels_rewritten_while_they_are_packed_are_packed_again(tmp_path: Path, monkeypatch: Any) -> None:
    root, out, read = tmp_path / "raw", tmp_path / "out", FolderPair.read
    write_folder_pair(root)

    def read_and_rewrite(source: FolderPair, index: int) -> Any:
        sample = read(source, index)
        for number in (0, 2) if index == 2 else ():  # one that is in the shard, and the one that was just read
            np.save(root / f"depth/{number}.npy", scene_depth(*SHAPE, number=9).astype(np.float32))
        return sample

    monkeypatch.setattr(FolderPair, "read", read_and_rewrite)
    assert packing(pair(root), out).run().dropped == {"unreadable": 1}
    assert "depth/2.npy: it was written meanwhile; the next run" in (out / "dropped.csv").read_text()
    monkeypatch.undo()
    summary = packing(pair(root), out).run()
    assert (summary.images, summary.dropped) == (4, {"replaced": 1})
    assert_equal(packed(out, "folder_pair"), raw(pair(root)))


def test_packing_notes_the_checksums_of_a_published_set_and_holds_to_them(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    write_irs(root)
    source = reader("irs", root)
    packing(source, out).run()
    files = {path for i in range(len(source)) for path in source.row(i).files}
    assert source.checksums() == {path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in files}
    good = (root / source.row(0).label).read_bytes()
    (root / source.row(0).label).write_bytes(good + b"more")
    assert packing(reader("irs", root), out).run().dropped == {"changed": 1}
    kept = packed(out, "irs")
    note = source.checksums_path.read_text().splitlines(keepends=True)
    source.checksums_path.write_text("".join(line for line in note if source.row(0).label not in line))
    assert packing(reader("irs", root), out).run().dropped == {"replaced": 1}  # it was meant
    assert_equal(packed(out, "irs"), kept)
    assert source.checksums()[source.row(0).label] == hashlib.sha256(good + b"more").hexdigest()


def test_a_list_of_somebody_else_on_a_read_only_disk_is_used_without_noting_checksums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "raw"
    write_irs(root)
    source = reader("irs", root)
    source.prepare()
    source.checksums_path.with_name(f"{source.checksums_path.name}.{os.getpid()}.part").mkdir()  # as good as read-only
    assert packing(source, tmp_path / "out").run().images == 3
    assert "no checksums are noted: source irs: cannot write" in capsys.readouterr().out


def test_a_root_one_folder_higher_or_lower_does_not_double_the_set(tmp_path: Path) -> None:
    roots = [tmp_path / "sets", tmp_path / "sets/irs", tmp_path / "sets/irs/Home"]
    write_irs(roots[1])
    for number, first in enumerate(roots):
        out = tmp_path / f"out {number}"
        assert packing(reader("irs", first), out).run().images == 3
        for other in roots:
            if other != first:
                with pytest.raises(PackError, match=r"seems to be .*: name the root that it was packed from"):
                    packing(reader("irs", other), out).run()
        assert packing(reader("irs", first), out).run().made == 0


def test_a_file_with_another_checksum_is_not_packed(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    write_folder_pair(root)
    source = pair(root)
    source.prepare()
    assert source.verify() == []  # notes the checksums
    good = (root / "depth/1.npy").read_bytes()
    (root / "depth/1.npy").write_bytes(good[:-1] + b"\x40")  # of the same size
    assert packing(pair(root), out).run().dropped == {"changed": 1}
    assert f"{root}/depth/1.npy: its content is not what" in dropped(out)[_key(1)]
    assert packing(pair(root), out).run().made == 0
    (root / "depth/1.npy").write_bytes(good)
    assert packing(pair(root), out).run().dropped == {}
    assert_equal(packed(out, "folder_pair"), raw(pair(root)))


def test_bad_input_is_one_line_that_names_the_way_out(tmp_path: Path) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    with pytest.raises(PackError, match=r"root=\S+ is no folder; set `root`"):
        packing(pair(root), out).run()
    write_folder_pair(root)
    packing(pair(root), out).run()
    with pytest.raises(
        PackError, match=r"was prepared with invalid=\[0.0\]: say the same again, or name another folder"
    ):
        packing(pair(root, invalid=[7]), out).run()
    write_folder_pair(tmp_path / "other")
    with pytest.raises(PackError, match=r"was prepared with root=\S+raw: say the same again, or name another folder"):
        packing(pair(tmp_path / "other"), out).run()
    write_kitti(tmp_path / "kitti")
    frames = tmp_path / "frames.txt"
    listed = [reader("kitti", tmp_path / "kitti").row(i) for i in range(2)]
    for rows in (listed, listed[:1]):
        frames.write_text("\n".join(f"{row.image} {row.label} 721.5" for row in rows))
        kitti = packing(reader("kitti", tmp_path / "kitti", files=str(frames)), tmp_path / "out of kitti")
        if rows is listed:
            assert kitti.run().images == 2
    with pytest.raises(PackError, match=r"another content of files=FILE .*: bring that content back, or name another"):
        kitti.run()
    tar = out / "folder_pair-000000.tar"
    os.truncate(tar, 5000)
    with pytest.raises(
        ShardError, match=r"folder_pair-000000.tar has 5000 bytes, its index says .*: copy it again, or"
    ):
        packing(pair(root), out).run()
    tar.unlink()
    tar.with_suffix(".json").unlink()
    assert packing(pair(root), out).run().made == 3
    assert_equal(packed(out, "folder_pair"), raw(pair(root)))


# --- real processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs of which one is cut short."""
    root = tmp_path_factory.mktemp("tree") / "raw"
    write_folder_pair(root, range(40))
    os.truncate(root / "depth/17.npy", 300)
    return root


def command(root: Path, out: Path, workers: int) -> list[str]:
    said = ["dataset=folder_pair", f"root={root}", f"out={out}", "samples_per_shard=4", "dataset.scale=1.0"]
    return ["depthany.prepare", *said, f"workers={workers}"]


@pytest.mark.slow
def test_rivals_and_kills_end_as_one_run(zygote: Zygote, tree: Path, tmp_path: Path) -> None:
    """A job with two workers and a rival; the first is killed, the rival and a second run do the rest."""
    packing(pair(tree), tmp_path / "one", samples_per_shard=4).run()
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir() if path.name[0] != "."}
    out = tmp_path / "out"
    first, rival = (zygote.start(command(tree, out, workers), cwd=tmp_path) for workers in (2, 1))
    while not list(out.glob("folder_pair-*.json")):
        assert None in (*first.poll(), *rival.poll()), first.output() + rival.output()
        time.sleep(0.005)
    first.kill(signal.SIGKILL)
    assert rival.wait(60) == [0], rival.output()
    for name in ("folder_pair-000003.tar", "folder_pair-000003.json"):
        (out / name).unlink()
    said = zygote.run(command(tree, out, 1), cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."} == wanted
    assert not list(out.glob(".*.part"))
    for words in ("images in use │ 39", "undecodable 1", "this run      │ 4 images", "depthany.audit dataset=shards"):
        assert words in said, said
