"""The verb as users call it: what it prints, what it refuses, and with which exit code it ends."""

import json
import signal
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from depthany.config.build import build
from depthany.config.check import ConfigError, check
from depthany.config.launch import compose, help_text
from depthany.data.shards import write_shard
from depthany.models.weights import save_weights, weights_hash
from tests.processes import Zygote


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[Path, str]:
    """A random teacher's file, and what its labels are called by."""
    torch.manual_seed(0)
    model = build(compose("train", ["stage=teacher"]).model)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_weights(model, path, metadata={"stage": "teacher"})
    return path, f"teacher-{weights_hash(model)[:8]}"


def photos(folder: Path, *, shards: int = 2, images: int = 4) -> Path:
    """A folder of shards, one image of which is damaged."""
    rng = np.random.default_rng(0)
    for number in range(shards):
        pictures = [
            cv2.imencode(".jpg", rng.integers(0, 256, (40, 60, 3), np.uint8))[1].tobytes() for _ in range(images)
        ]
        pictures[1] = pictures[1][:100] if number == 0 else pictures[1]
        rows = [{"__key__": f"set/{number}/{i}", "jpg": data} for i, data in enumerate(pictures)]
        write_shard(folder / f"set-{number:06d}.tar", rows, facts={})
    return folder


def test_labels_twice(zygote: Zygote, teacher: tuple[Path, str], tmp_path: Path) -> None:
    path, name = teacher
    folder = photos(tmp_path / "set")
    command = [
        "depthany.pseudo_label",
        f"teacher={path}",
        f"shards={folder}",
        "labels.quality=flip_scale",
        "device=cpu",
    ]
    output = zygote.run(command, cwd=tmp_path)
    for told in (
        f"teacher: {path} ({name})",
        "plan: input size 56, fp32, full resolution, png16, quality flip_scale; processes on cpu",
        "labelling set: 8 images in",
        "images/s",
        f"report: {folder}/labels.{name}.html",
        f"1 damaged images: {folder}/labels.{name}.damaged.csv",
    ):
        assert told in output, output
    listed = (folder / f"labels.{name}.damaged.csv").read_text().splitlines()
    assert listed[0] == "image,reason" and listed[1].startswith("set/0/1,") and len(listed) == 2
    made = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    output = zygote.run(command, cwd=tmp_path)
    assert "1 damaged images" in output and "images/s" not in output
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == made
    output = zygote.run([*command, "labels.codec=png8"], cwd=tmp_path, code=2)
    assert "codec png16, now png8" in output and "redo=true" in output and "Traceback" not in output
    zygote.run([*command, "labels.codec=png8", "redo=true"], cwd=tmp_path)
    assert json.loads((folder / f"labels.{name}.json").read_text())["facts"]["codec"] == "png8"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["teacher=nowhere.safetensors"], "nowhere.safetensors is neither a file nor a folder"),
        ([], "no finished teacher under"),
        (["teacher=TEACHER", "shards=nowhere"], "nowhere"),
        (["teacher=TEACHER", "shards=SET", "labels=online"], "labels=online makes no labels"),
        (["teacher=TEACHER", "shards=SET", "devices=1000", "device=cpu"], "devices=1000: this machine has"),
        (["teacher=TEACHER", "shards=SET", "labels.codec=jpeg"], "labels.codec must be one of png16, float16, png8"),
        (["teacher=TEACHER", "shards=SET", "labels.batch_size=0"], "labels.batch_size=0: give a number of at least 1"),
        (["teacher=TEACHER", "shards=SET", "redo=maybe"], "redo must be true or false"),
        (["teacher=TEACHER", "shards=SET", "labels.qality=flip"], "did you mean labels.quality"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value else None,
)
def test_what_cannot_be_is_told_in_words(
    zygote: Zygote, teacher: tuple[Path, str], tmp_path: Path, options: list[str], told: str
) -> None:
    folder = photos(tmp_path / "set")
    given = [o.replace("TEACHER", str(teacher[0])).replace("SET", str(folder)) for o in options]
    output = zygote.run(["depthany.pseudo_label", *given], cwd=tmp_path, code=2)
    assert told in output and "Traceback" not in output
    assert not list(folder.glob("*teacher*")) and not list(folder.glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_it_between_shards(
    zygote: Zygote, teacher: tuple[Path, str], tmp_path: Path, number: int, code: int
) -> None:
    folder = photos(tmp_path / "set", shards=40)
    job = zygote.start(["depthany.pseudo_label", f"teacher={teacher[0]}", f"shards={folder}"], cwd=tmp_path)
    ends = time.monotonic() + 60
    while not list(folder.glob("set-*.teacher-*.json")) and time.monotonic() < ends:
        time.sleep(0.01)
    job.kill(number, ranks=[0])
    assert job.wait(30) == [code], job.output()
    assert "the same command goes on" in job.output() and "Traceback" not in job.output()
    assert not list(folder.glob(".*"))  # no claim, and nothing half
    assert {p.stem for p in folder.glob("*.teacher-*.tar")} == {p.stem for p in folder.glob("set-*.teacher-*.json")}


@pytest.mark.slow
def test_a_student_learns_from_stored_labels(zygote: Zygote, teacher: tuple[Path, str], tmp_path: Path) -> None:
    """Without the teacher's weights; and a run that would make other labels is refused."""
    options = [f"paths.runs={tmp_path / 'runs'}", f"paths.shards={tmp_path / 'shards'}", "data.limit=24"]
    label = ["depthany.pseudo_label", f"teacher={teacher[0]}", "labels.quality=flip", "device=cpu", *options]
    assert "report:" in zygote.run(label, cwd=tmp_path)
    train = ["depthany.train", "stage=student", "debug=smoke", *options]
    output = zygote.run([*train, "labels=stored"], cwd=tmp_path)
    assert f"teacher: of the stored labels ({teacher[1]})" in output
    for wrong, told in (
        (["labels=stored", "labels.teacher=teacher-0"], "have no labels of teacher-0"),
        (["labels=stored", "recipe=v1"], "feature alignment needs the teacher itself"),
        (["labels.codec=png8", f"task.teacher_ckpt={teacher[0]}"], "codec png16, now png8"),
    ):
        output = zygote.run([*train, *wrong], cwd=tmp_path, code=2)
        assert told in output and "Traceback" not in output
    output = zygote.run([*train, f"task.teacher_ckpt={teacher[0]}"], cwd=tmp_path)  # offline: nothing is left to make
    assert "labelling" not in output


def test_the_options_explain_themselves() -> None:
    text = help_text("pseudo_label", "", [])
    for option in ("teacher", "shards", "labels_root", "device", "devices", "redo", "labels.codec", "labels.quality"):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{option}=")]
        assert len(line.split("  ")[-1]) >= 20, line


@pytest.mark.parametrize("wrong", ["devices=many", "redo=1", "labels_root=3", "labels.resolution=third"])
def test_wrong_values_are_refused_before_anything_is_built(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
        check(compose("pseudo_label", [wrong]))
