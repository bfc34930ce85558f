"""The pseudo-label job: what it writes, what it refuses, and what survives kills, rivals, stops and full disks."""

import csv
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from depthany.config.build import build
from depthany.config.check import ConfigError
from depthany.config.launch import compose
from depthany.data.files import DecodeError
from depthany.data.labels import CODEC_ERROR, LabelPlan, decode_label, half
from depthany.data.shards import Shard, write_catalog, write_shard
from depthany.data.sources.packed import Shards
from depthany.inference.predictor import Predictor
from depthany.models.weights import save_weights
from depthany.runs.label_devices import device_names
from depthany.runs.label_job import LabelJob, label_shards, num_cores, teacher_name
from depthany.runs.stored_labels import check_stored
from tests.processes import Group, Zygote

PLAN = LabelPlan(
    mode="offline",
    teacher=None,
    input_size=56,
    precision="fp32",
    batch_size=4,
    resolution="full",
    codec="png16",
    quality="none",
    min_quality=None,
)
STORED = replace(PLAN, mode="stored", codec=None, batch_size=None, resolution=None, quality=None, precision=None)


def quiet(shard: int, images: int, made: bool) -> None:
    """Told of progress."""


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """A random teacher."""
    torch.manual_seed(0)
    return Predictor(model=build(compose("train", ["stage=teacher"]).model), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def weights(predictor, tmp_path_factory) -> Path:
    """The same teacher as a file."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(predictor.model, path, metadata={"stage": "teacher"})
    return path


def picture(seed: int, height: int, width: int) -> bytes:
    """A PNG that is smooth, but for its noise."""
    rng = np.random.default_rng(seed)
    image = cv2.resize(rng.integers(0, 256, (4, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".png", cv2.add(image, rng.integers(0, 20, image.shape, np.uint8)))[1].tobytes()


def made(folder: Path, *, shards: int = 3, images: int = 6, side: int = 40, name: str = "set") -> Shards:
    """A set of photos in three shapes, the last image of each shard alone in its own."""
    for number in range(shards):
        shapes = [(side, side + side // 2), (side + side // 2, side)] * images
        shapes[images - 1] = (side, side)
        rows = [
            {"__key__": f"{name}/{number}/{i}", "png": picture(1000 * number + i, *shapes[i])} for i in range(images)
        ]
        write_shard(folder / f"{name}-{number:06d}.tar", rows, facts={})
    source = Shards(name=name, root=str(folder))
    source.prepare()
    source.open()
    return source


def labels(folder: Path) -> dict[str, str]:
    """The sha256 of every label file by name: shards, their indices, and what describes the set."""
    files = [p for p in folder.iterdir() if "teacher" in p.name and p.suffix != ".html" and not p.name.startswith(".")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def leavings(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


# What is written


def test_every_image_gets_its_label_and_no_image_is_copied(predictor, tmp_path):
    source = made(tmp_path)
    teacher = teacher_name(predictor.model)
    assert label_shards(predictor, source, teacher=teacher, plan=replace(PLAN, input_size=None)) == []
    for i in range(3):
        images, found = source.shard(i), Shard(source.label_file(i, teacher))
        assert found.tar == str(tmp_path / f"set-{i:06d}.{teacher}.tar")
        assert sorted(found.keys) == sorted(images.keys)
        assert {suffix for files in found.files for suffix in files} == {"disparity.png", "json"}
        assert found.facts == {
            "teacher": teacher,
            "weights": found.facts["weights"],
            "input_size": 56,  # of the model: what was asked for is "the teacher's own"
            "resolution": "full",
            "codec": "png16",
            "precision": "fp32",
            "quality": "none",
            "images": images.sha256,
            "damaged": [],
        }
        assert teacher == f"teacher-{found.facts['weights'][:8]}" and len(found.facts["weights"]) == 64
    listed = json.loads((tmp_path / f"labels.{teacher}.json").read_text())
    assert listed["teacher"] == teacher and [row["images"] for row in listed["shards"]] == [
        source.shard(i).sha256 for i in range(3)
    ]
    assert [row["sha256"] for row in listed["shards"]] == [
        hashlib.sha256((tmp_path / row["tar"]).read_bytes()).hexdigest() for row in listed["shards"]
    ]
    assert not (tmp_path / f"labels.{teacher}.quality.npy").exists() and not leavings(tmp_path)
    source.teacher = teacher
    source.open()
    assert all("disparity" in source.read(i) for i in range(len(source)))


@pytest.mark.parametrize("codec", list(CODEC_ERROR))
@pytest.mark.parametrize("resolution", ["full", "half"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_labels_are_the_teachers_within_the_codecs_error(predictor, tmp_path, codec, resolution, precision):
    source = made(tmp_path, shards=1, images=3)
    plan = replace(PLAN, codec=codec, resolution=resolution, precision=precision, batch_size=1)
    label_shards(predictor, source, teacher="teacher-1", plan=plan)
    images, found = source.shard(0), Shard(source.label_file(0, "teacher-1"))
    same = Predictor(model=predictor.model, device="cpu", precision=precision)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for i, key in enumerate(images.keys):
        pixels = cv2.imdecode(np.frombuffer(images.read(i, "png"), np.uint8), cv2.IMREAD_COLOR_RGB)
        truth = same.disparity([same.network_input(pixels, input_size=56)])[0].numpy()
        truth = half(truth) if resolution == "half" else truth
        place = found.at[key]
        label = decode_label(lambda suffix, place=place: found.read(place, suffix), found.files[place])["disparity"]
        rounding = 4 * np.finfo(np.float32).eps * np.abs(truth).max()
        assert label.shape == truth.shape
        assert np.abs(label - truth).max() <= CODEC_ERROR[codec] * np.ptp(truth) * 1.02 + rounding
    torch.set_num_threads(before)


def test_the_bytes_do_not_depend_on_threads(predictor, tmp_path):
    """More threads for one batch would sum in another order: they work on different batches instead."""
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        source = made(tmp_path / str(threads), side=80)
        torch.set_num_threads(2)
        job = LabelJob(
            predictor, source, teacher="teacher-1", plan=replace(PLAN, quality="flip_scale"), threads=threads
        )
        job.make(quiet)
        assert torch.get_num_threads() == 2  # given back
        found.append(labels(tmp_path / str(threads)))
    torch.set_num_threads(before)
    assert found[0] == found[1] and len(found[0]) == 7


def test_images_of_one_shape_share_batches_over_the_whole_shard(predictor, tmp_path):
    """In the order of the images, however their shapes alternate; the one of a shape of its own goes through alone."""
    seen: list[tuple[int, ...]] = []

    class Watched(Predictor):
        def disparity(self, inputs):
            seen.append((len(inputs), *inputs[0].shape[:2]))
            return super().disparity(inputs)

    job = LabelJob(predictor, made(tmp_path, shards=1, images=12), teacher="teacher-1", plan=PLAN, threads=1)
    job.predictor = Watched(model=predictor.model, device="cpu", precision="fp32")
    job.make(quiet)
    assert seen == [(4, 56, 80), (2, 56, 80), (4, 80, 56), (1, 80, 56), (1, 56, 56)]


def test_a_size_in_the_index_that_is_wrong_does_no_harm(predictor, tmp_path):
    rows = [
        {"__key__": f"set/{i}", "png": picture(i, 40, 60), "__row__": {"height": 60, "width": 40}} for i in range(3)
    ]
    rows[1]["__row__"] = {"height": 40, "width": 60}
    write_shard(tmp_path / "set-000000.tar", rows, facts={})
    source = Shards(name="set", root=str(tmp_path))
    source.prepare()
    assert label_shards(predictor, source, teacher="teacher-1", plan=PLAN) == []
    found = Shard(tmp_path / "set-000000.teacher-1.tar")
    shapes = [
        decode_label(lambda s, i=i: found.read(i, s), found.files[i])["disparity"].shape for i in range(len(found))
    ]
    assert len(found) == 3 and set(shapes) == {(56, 80)}


def test_damaged_images_are_listed_and_get_no_label(predictor, tmp_path):
    good = picture(0, 40, 60)
    rows = [
        {"__key__": "set/good", "png": good},
        {"__key__": "set/cut", "png": good[: len(good) // 2]},
        {"__key__": "set/text", "jpg": b"no picture"},
        {"__key__": "set/alone", "json": b"{}"},
        {"__key__": "set/strip", "png": picture(1, 2, 3000)},  # its network input would be 56 x 84,000
    ]
    write_shard(tmp_path / "set-000000.tar", rows, facts={})
    source = Shards(name="set", root=str(tmp_path))
    source.prepare()
    for _ in range(2):  # the second time from the list
        damaged = label_shards(predictor, source, teacher="teacher-1", plan=replace(PLAN, quality="flip"))
        assert [line.partition(":")[0] for line in damaged] == ["set/alone", "set/cut", "set/strip", "set/text"]
    with open(tmp_path / "labels.teacher-1.damaged.csv", newline="") as file:
        assert [f"{key}: {reason}" for key, reason in list(csv.reader(file))[1:]] == damaged
    assert Shard(tmp_path / "set-000000.teacher-1.tar").keys == ["set/good"]
    scores = np.load(tmp_path / "labels.teacher-1.quality.npy")
    assert scores.dtype == np.float32 and np.isfinite(scores).tolist() == [True, False, False, False, False]
    source.teacher = "teacher-1"
    source.open()
    with pytest.raises(DecodeError, match="truncated"):
        source.read(1)


def test_a_shard_of_nothing_but_damage(predictor, tmp_path):
    write_shard(
        tmp_path / "set-000000.tar", [{"__key__": f"set/{i}", "jpg": b"no picture"} for i in range(3)], facts={}
    )
    source = Shards(name="set", root=str(tmp_path))
    source.prepare()
    plan = replace(PLAN, quality="flip_scale")
    assert len(label_shards(predictor, source, teacher="teacher-1", plan=plan)) == 3
    assert len(Shard(tmp_path / "set-000000.teacher-1.tar")) == 0
    assert np.isnan(np.load(tmp_path / "labels.teacher-1.quality.npy")).all()


def test_a_map_that_is_not_finite_is_no_label(predictor, tmp_path):
    class Broken(Predictor):
        def disparity(self, inputs):
            maps = super().disparity(inputs).clone()
            maps[0, 3, 3] = torch.nan
            return maps

    job = LabelJob(predictor, made(tmp_path, shards=1), teacher="teacher-1", plan=PLAN)
    job.predictor = Broken(model=predictor.model, device="cpu", precision="fp32")
    job.make(quiet)
    found = Shard(tmp_path / "set-000000.teacher-1.tar")
    assert len(found) == 3 and {reason for _, reason in found.facts["damaged"]} == {"the teacher's map is not finite"}


def test_scores_are_in_the_index_the_array_and_the_selection(predictor, tmp_path):
    source = made(tmp_path)
    label_shards(predictor, source, teacher="teacher-1", plan=replace(PLAN, quality="flip_scale"))
    scores = np.load(tmp_path / "labels.teacher-1.quality.npy")
    start = 0
    for i in range(3):
        images, found = source.shard(i), Shard(source.label_file(i, "teacher-1"))
        for row in found.rows:
            assert set(row) == {"key", "files", "quality", "contrast", "flip", "scale"}
            assert scores[start + images.at[row["key"]]] == np.float32(row["quality"])
        start += len(images)
    assert len(scores) == start and np.isfinite(scores).all()
    source.teacher, source.quality = "teacher-1", float(np.median(scores)) + 1e-6
    source.open()
    assert len(source) == (scores >= source.quality).sum() < len(scores)
    page = (tmp_path / "labels.teacher-1.html").read_text()
    assert "flip disagreement" in page and page.count("<h3>set/") == 16


# Done, redone, refused


def test_what_is_done_is_kept_and_what_is_torn_is_made_again(predictor, tmp_path):
    source = made(tmp_path)
    label = lambda: label_shards(predictor, source, teacher="teacher-1", plan=PLAN)  # noqa: E731
    label()
    first, stamps = labels(tmp_path), {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    label()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")} == stamps
    tars = sorted(tmp_path.glob("*.teacher-1.tar"))
    tars[0].unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:700])  # half a tar after a crash of the machine
    tars[2].with_suffix(".json").write_bytes(b"{")
    label()
    assert labels(tmp_path) == first


def test_labels_of_another_plan_are_refused_or_replaced_as_asked(predictor, tmp_path):
    source = made(tmp_path, shards=2)
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    first = labels(tmp_path)
    other = replace(PLAN, codec="png8", input_size=64)
    for file in ("", "labels.teacher-1.json", "labels.teacher-1.plan.json"):  # whatever is there tells
        if file:
            (tmp_path / file).unlink()
        with pytest.raises(ConfigError, match=r"input_size 56, now 64; codec png16, now png8.*redo=true"):
            label_shards(predictor, source, teacher="teacher-1", plan=other)
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert labels(tmp_path) == first
    label_shards(predictor, source, teacher="teacher-1", plan=other, redo=True)
    second = labels(tmp_path)
    assert second.keys() == first.keys() and not set(second.values()) & {
        h for n, h in first.items() if "damaged" not in n
    }
    with pytest.raises(ConfigError, match="codec png8, now png16"):
        label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    label_shards(predictor, source, teacher="teacher-1", plan=replace(other, batch_size=2))  # makes no other labels
    assert labels(tmp_path) == second


def test_a_rival_with_another_plan_stops_before_it_has_made_anything(predictor, tmp_path):
    """Though no shard is labelled yet that could tell it."""
    source = made(tmp_path)
    rival = LabelJob(predictor, source, teacher="teacher-1", plan=replace(PLAN, codec="png8"))

    def begun(shard: int, images: int, made: bool) -> None:
        with pytest.raises(ConfigError, match="codec png16, now png8"):
            rival.make(quiet)

    LabelJob(predictor, source, teacher="teacher-1", plan=PLAN).make(begun)
    assert {Shard(tar).facts["codec"] for tar in tmp_path.glob("*.teacher-1.tar")} == {"png16"}


def test_scores_that_nobody_asks_for_do_no_harm(predictor, tmp_path):
    source = made(tmp_path, shards=2)
    label_shards(predictor, source, teacher="teacher-1", plan=replace(PLAN, quality="flip"))
    first = labels(tmp_path)
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert labels(tmp_path) == first
    with pytest.raises(ConfigError, match="quality flip, now flip_scale"):
        label_shards(predictor, source, teacher="teacher-1", plan=replace(PLAN, quality="flip_scale"))


def test_a_set_that_grew_gets_the_labels_that_it_lacks(predictor, tmp_path):
    label_shards(predictor, made(tmp_path, shards=2), teacher="teacher-1", plan=PLAN)
    first = labels(tmp_path)
    label_shards(predictor, made(tmp_path, shards=3), teacher="teacher-1", plan=PLAN)
    second = labels(tmp_path)
    assert {n for n in second if second[n] != first.get(n)} == {
        "labels.teacher-1.json",
        "set-000002.teacher-1.json",
        "set-000002.teacher-1.tar",
    }
    write_shard(tmp_path / "set-000001.tar", [{"__key__": "set/new", "png": picture(9, 40, 40)}], facts={})
    write_catalog(tmp_path, name="set")
    source = Shards(name="set", root=str(tmp_path))
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert Shard(tmp_path / "set-000001.teacher-1.tar").keys == ["set/new"]


def test_a_limited_set_is_labelled_as_far_as_it_is_used(predictor, tmp_path):
    source = made(tmp_path)
    source.limit = 7  # of 6 in each shard
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert len(list(tmp_path.glob("*.teacher-1.tar"))) == 2
    assert not (tmp_path / "labels.teacher-1.json").exists()  # it lists whole sets
    source.teacher = "teacher-1"
    source.open()
    assert len(source) == 7 and all("disparity" in source.read(i) for i in range(7))


def test_labels_may_lie_elsewhere(predictor, tmp_path):
    made(tmp_path / "images")
    source = Shards(name="set", root=str(tmp_path / "images"), labels_root=str(tmp_path / "labels"))
    before = sorted((tmp_path / "images").iterdir())
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert sorted((tmp_path / "images").iterdir()) == before
    assert len(list((tmp_path / "labels").glob("*.tar"))) == 3
    assert check_stored([source], STORED) == "teacher-1"


def test_a_shard_of_images_that_cannot_be_read_does_not_stop_the_others(predictor, tmp_path):
    source = made(tmp_path)
    tar = tmp_path / "set-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-1024])
    with pytest.raises(ConfigError, match=r"1 of 3 shards cannot be labelled:\n.*set-000001.tar has"):
        label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert len(list(tmp_path.glob("*.teacher-1.tar"))) == 2 and not leavings(tmp_path)
    tar.write_bytes(whole)
    source.open()
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert (tmp_path / "labels.teacher-1.json").exists()


@pytest.mark.parametrize("fails", [RuntimeError("the teacher broke"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_exception_leaves_whole_shards_and_nothing_else(predictor, tmp_path, fails):
    class Failing(Predictor):
        def disparity(self, inputs):
            if (tmp_path / "set-000000.teacher-1.json").exists():
                raise fails
            return super().disparity(inputs)

    job = LabelJob(predictor, made(tmp_path), teacher="teacher-1", plan=PLAN)
    job.predictor = Failing(model=predictor.model, device="cpu", precision="fp32")
    with pytest.raises(type(fails), match=str(fails.args[-1])):
        job.make(quiet)
    whole = {"labels.teacher-1.plan.json", "set-000000.teacher-1.json", "set-000000.teacher-1.tar"}
    assert set(labels(tmp_path)) == whole and not leavings(tmp_path)


# Labels that are there already


def test_stored_labels_of_one_teacher_are_taken(predictor, tmp_path):
    sets = [made(tmp_path / name, name=name) for name in ("a", "b")]
    for source in sets:
        label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    assert check_stored(sets, STORED) == "teacher-1"
    (tmp_path / "b" / "labels.teacher-1.json").unlink()  # the long way
    assert check_stored(sets, STORED) == "teacher-1"
    assert check_stored(sets, replace(STORED, teacher="teacher-1")) == "teacher-1"


def test_a_mixture_of_stored_labels_is_refused_unless_asked_for(predictor, tmp_path):
    sets = [made(tmp_path / name, name=name) for name in ("a", "b")]
    label_shards(predictor, sets[0], teacher="teacher-1", plan=PLAN)
    label_shards(predictor, sets[1], teacher="teacher-1", plan=replace(PLAN, resolution="half"))
    with pytest.raises(ConfigError, match=r"mixture: teacher-1 \(.*full.*\) of a; teacher-1 \(.*half.*\) of b.*=any"):
        check_stored(sets, STORED)
    label_shards(predictor, sets[1], teacher="teacher-2", plan=PLAN)
    with pytest.raises(ConfigError, match="mixture: teacher-1"):
        check_stored(sets, STORED)
    with pytest.raises(ConfigError, match="3 of 3 shards of a have no labels of teacher-2"):
        check_stored(sets, replace(STORED, teacher="teacher-2"))
    assert check_stored(sets, replace(STORED, teacher="any")) == "any"
    assert check_stored(sets[1:], replace(STORED, teacher="teacher-2")) == "teacher-2"


def test_stored_labels_that_do_not_cover_the_images_are_refused(predictor, tmp_path):
    source = made(tmp_path)
    with pytest.raises(ConfigError, match="3 of 3 shards of set have no labels in"):
        check_stored([source], STORED)
    label_shards(predictor, source, teacher="teacher-1", plan=PLAN)
    (tmp_path / "set-000001.teacher-1.json").unlink()
    (tmp_path / "labels.teacher-1.json").unlink()
    for teacher in (None, "teacher-1", "any"):
        with pytest.raises(ConfigError, match=r"1 of 3 shards of set have no labels.*pseudo_label"):
            check_stored([source], replace(STORED, teacher=teacher))


def test_devices(monkeypatch):
    assert device_names("cpu", "auto") == ["cpu"] == device_names("cpu", 1)
    assert device_names("cpu", num_cores()) == ["cpu"] * num_cores()
    for number in (0, num_cores() + 1):
        with pytest.raises(ConfigError, match=f"devices={number}: this machine has {num_cores()} of cpu"):
            device_names("cpu", number)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_names("cuda", "auto") == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert device_names("cuda", 1) == ["cuda"]


# Real processes

# Before the verb: every shard that a process begins to label is written down.
WATCH = """
import os
from depthany.runs import label_job
write = label_job.LabelJob._write
def watched(self, shard, *given):
    with open({log!r}, "a") as file:
        file.write(f"{{os.getpid()}} {{shard}}\\n")
    write(self, shard, *given)
label_job.LabelJob._write = watched
"""


class Jobs:
    """Rival jobs on one set, as their users would start them."""

    def __init__(self, zygote: Zygote, folder: Path, weights: Path, *options: str) -> None:
        self.zygote, self.folder, self.log = zygote, folder, folder.with_name(f"{folder.name}.log")
        self.command = ["depthany.pseudo_label", f"teacher={weights}", f"shards={folder}", "device=cpu", *options]
        self.log.touch()

    def start(self) -> Group:
        return self.zygote.start(self.command, cwd=self.folder.parent / "cwd", before=WATCH.format(log=str(self.log)))

    def begun(self) -> list[tuple[int, int]]:
        """(process, shard) of every shard that was begun."""
        return [(int(pid), int(shard)) for pid, shard in map(str.split, self.log.read_text().splitlines())]

    def at_work(self, job: Group) -> bool:
        return job.poll() == [None] and job.pids[0] in {pid for pid, _ in self.begun()}


def copy_of(folder: Path, name: str) -> Path:
    """The image shards of a set, without labels."""
    other = folder.with_name(name)
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*teacher*", ".*"))
    return other


def alone(predictor: Predictor, folder: Path, options: list[str]) -> dict[str, str]:
    """The label files of one uninterrupted job, here in this process."""
    plan = build(compose("pseudo_label", options).labels)
    source = Shards(name="set", root=str(folder))
    label_shards(predictor, source, teacher=teacher_name(predictor.model), plan=plan)
    return labels(folder)


@pytest.mark.slow
def test_two_jobs_share_the_work(zygote, predictor, weights, tmp_path):
    """Twenty shards, two processes: none twice, none missing, and the bytes of one job alone."""
    options = ["labels.quality=flip"]
    made(tmp_path / "alone", shards=20, images=3)
    rivals = Jobs(zygote, copy_of(tmp_path / "alone", "rivals"), weights, *options)
    both = [rivals.start(), rivals.start()]
    whole = alone(predictor, tmp_path / "alone", options)
    for job in both:
        assert job.wait(60) == [0], job.output()
    assert Counter(shard for _, shard in rivals.begun()) == Counter(range(20))
    assert len({pid for pid, _ in rivals.begun()}) == 2
    assert labels(rivals.folder) == whole and len(whole) == 44 and not leavings(rivals.folder)


def kill_at_random(
    zygote: Zygote, predictor: Predictor, weights: Path, tmp_path: Path, *, kills: int, shards: int
) -> None:
    options = ["labels.quality=flip"]
    made(tmp_path / "whole", shards=shards, images=8, side=60)
    rivals = Jobs(zygote, copy_of(tmp_path / "whole", "killed"), weights, *options)
    rng = random.Random(kills)
    jobs, killed = [rivals.start(), rivals.start()], 0
    while killed < kills:
        ends = time.monotonic() + 60
        while not (busy := [job for job in jobs if rivals.at_work(job)]) and time.monotonic() < ends:
            time.sleep(0.005)
        assert busy, "\n".join(job.output() for job in jobs)
        time.sleep(rng.uniform(0, 0.3))
        for job in [rng.choice(busy)] if rng.random() < 0.3 else jobs:
            if job.poll() == [None]:
                job.kill()
                killed += 1
        jobs = [rivals.start() if job.poll() == [-signal.SIGKILL] else job for job in jobs]
    assert not list(rivals.folder.glob("labels.*.html")), "done before it had been killed often enough"
    for job in jobs:
        assert job.wait(120) == [0], job.output()
    whole = alone(predictor, tmp_path / "whole", options)
    assert labels(rivals.folder) == whole and len(whole) == 2 * shards + 4
    assert not [name for name in leavings(rivals.folder) if name.endswith(".part")]
    begun = Counter(shard for _, shard in rivals.begun())
    assert set(begun) == set(range(shards)) and begun.total() <= shards + killed, (
        "more than one shard was redone for a kill"
    )


def test_killed_three_times(zygote, predictor, weights, tmp_path):
    kill_at_random(zygote, predictor, weights, tmp_path, kills=3, shards=12)


@pytest.mark.slow
def test_killed_twenty_times(zygote, predictor, weights, tmp_path):
    kill_at_random(zygote, predictor, weights, tmp_path, kills=20, shards=60)


STOPPED = """
import sys, time
from pathlib import Path
from depthany.data.sources.packed import Shards
from depthany.inference.predictor import Predictor
from depthany.runs.find import open_model
from depthany.runs.label_job import label_shards
from tests.runs.test_label_job import PLAN

class Slow(Predictor):
    def disparity(self, inputs):
        time.sleep(0.1)
        return super().disparity(inputs)

predictor, _, _ = open_model(sys.argv[1], Path(), device="cpu", stage=None)
import depthany.runs.label_job as job
job.Predictor = Slow
label_shards(predictor, Shards(name="set", root=sys.argv[2]), teacher="teacher-1", plan=PLAN, stale_s=0.5)
"""


@pytest.mark.slow
def test_a_stopped_owner_that_wakes_overwrites_nothing(zygote, weights, tmp_path):
    made(tmp_path / "set", shards=1, images=12)
    command = ["-c", STOPPED, str(weights), str(tmp_path / "set")]
    first = zygote.start(command, cwd=tmp_path)
    ends = time.monotonic() + 30
    while not list((tmp_path / "set").glob(".set-000000.teacher-1.tar.*.part")) and time.monotonic() < ends:
        time.sleep(0.005)
    first.kill(signal.SIGSTOP, ranks=[0])
    zygote.run(command, cwd=tmp_path, timeout=60)
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "set").iterdir() if p.name[0] != "."}
    assert "set-000000.teacher-1.json" in before
    first.kill(signal.SIGCONT, ranks=[0])
    assert first.wait(60) == [0], first.output()
    after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (tmp_path / "set").iterdir()}
    assert after == before  # and no claim, and nothing half


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs more rights than this user has")
    yield folder
    subprocess.run(["mount", "-o", "remount,rw", folder], capture_output=True)
    subprocess.run(["umount", "-l", folder], check=True, capture_output=True)


def one_line(output: str) -> str:
    """The only line that complains."""
    (line,) = [line for line in output.splitlines() if line.startswith("depthany:")]
    assert "Traceback" not in output
    return line


def test_a_full_disk_ends_the_job_in_one_line_and_loses_nothing(zygote, weights, small_disk, tmp_path):
    made(tmp_path / "set", shards=6, images=8, side=60)
    command = Jobs(zygote, tmp_path / "set", weights, f"labels_root={small_disk}").command
    output = zygote.run(command, cwd=tmp_path / "cwd", code=73)
    assert "disk is full" in one_line(output) and "same command" in output
    there = sorted(small_disk.glob("*.tar"))
    assert 1 <= len(there) < 6 and all(len(Shard(tar)) == 8 for tar in there) and not leavings(small_disk)
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    zygote.run(command, cwd=tmp_path / "cwd")
    assert len(list(small_disk.glob("*.tar"))) == 6


def test_a_file_that_may_not_grow_is_a_full_disk_too(zygote, weights, tmp_path):
    """Where nothing can be mounted: the largest size of a file is limited."""
    made(tmp_path / "set", shards=2, images=8, side=60)
    command = Jobs(zygote, tmp_path / "set", weights).command
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))"
    output = zygote.run(command, cwd=tmp_path / "cwd", code=73, before=limit)
    assert "disk is full" in one_line(output)
    assert [name for name in labels(tmp_path / "set") if "plan" not in name] == []
    assert not leavings(tmp_path / "set")


def test_output_that_cannot_be_written_is_told_in_one_line(zygote, weights, small_disk, tmp_path):
    made(tmp_path / "set", shards=1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    command = Jobs(zygote, tmp_path / "set", weights).command
    for root in (small_disk, tmp_path / "cwd" / "file" / "labels"):
        (tmp_path / "cwd").mkdir(exist_ok=True)
        (tmp_path / "cwd" / "file").touch()
        output = zygote.run([*command, f"labels_root={root}"], cwd=tmp_path / "cwd", code=2)
        assert "labels cannot be written" in one_line(output) and str(root) in output


def children(pid: int) -> list[int]:
    """The processes that label for a job."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_process_for_each_device_though_processes_die(zygote, predictor, weights, tmp_path):
    if num_cores() < 2 or not Path("/proc").exists():
        pytest.skip("needs two cores, and /proc")
    options = ["labels.quality=flip"]
    made(tmp_path / "alone", shards=40)
    folder = copy_of(tmp_path / "alone", "devices")
    command = [*Jobs(zygote, folder, weights, *options).command, "devices=2"]
    job = zygote.start(command, cwd=tmp_path / "cwd")
    ends = time.monotonic() + 60
    while len(list(folder.glob("set-*.teacher-*.json"))) < 2 and time.monotonic() < ends:
        time.sleep(0.01)
    first, second = children(job.pids[0])
    os.kill(first, signal.SIGKILL)
    while "died (-9); the others do its work" not in job.output() and time.monotonic() < ends:
        time.sleep(0.01)
    assert job.poll() == [None], job.output()
    job.kill(signal.SIGKILL, ranks=[0])
    while Path(f"/proc/{second}").exists() and time.monotonic() < ends:
        time.sleep(0.01)  # nobody is left behind
    assert not list(folder.glob("labels.*.html"))
    output = zygote.run(command, cwd=tmp_path / "cwd", timeout=120)
    assert "on 2 devices" in output
    assert labels(folder) == alone(predictor, tmp_path / "alone", options)
    assert not [name for name in leavings(folder) if name.endswith(".part")]


# Real photos


def test_the_real_photos_are_labelled(predictor, real_root, tmp_path):
    """All 185, damaged ones among them, as they are."""
    kinds = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}
    files = sorted(p for p in (real_root / "unlabelled").rglob("*") if p.is_file())
    rows = []
    for i, file in enumerate(files):
        data = file.read_bytes()
        suffix = next((kind for magic, kind in kinds.items() if data.startswith(magic)), None)
        if suffix:
            rows.append({"__key__": f"photos/{i:03d}", suffix: data})
    for first in range(0, len(rows), 64):
        write_shard(tmp_path / f"photos-{first // 64:06d}.tar", rows[first : first + 64], facts={})
    source = Shards(name="photos", root=str(tmp_path))
    source.prepare()
    damaged = label_shards(predictor, source, teacher="teacher-1", plan=replace(PLAN, quality="flip"))
    found = [key for tar in tmp_path.glob("*.teacher-1.tar") for key in Shard(tar).keys]
    assert len(rows) >= 180 and len(found) + len(damaged) == len(rows) and 1 <= len(damaged) <= 5
    assert len(set(found)) == len(found)
    assert os.path.getsize(tmp_path / "labels.teacher-1.html") < 3_000_000
