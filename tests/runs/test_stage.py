"""Runs as users start them: real processes, killed, started again, refused. One smoke run is fast; the rest is slow."""

import csv
import json
import random
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from depthany.callbacks.record import read_record, write_json
from depthany.config.check import ConfigError, plain
from depthany.config.launch import compose
from depthany.runs.find import find_weights, open_model
from depthany.runs.stage import MAY_CHANGE, _differences, _learnt
from tests.processes import Group, Zygote

LIMIT_S = 120
FEW = ["data.limit=48", "trainer.limit_val_batches=2", "trainer.val_check_interval=6", "trainer.log_every_n_steps=1"]
FEW += ["callbacks.checkpoint.every_steps=3", "callbacks.checkpoint.keep=99"]
TEACHER = ["stage=teacher", "optim.teacher_epochs=3", *FEW]  # 18 steps
STUDENT_V1 = ["stage=student", "recipe=v1", "optim.student_epochs=2", *FEW]  # 24 steps
STUDENT_V2 = ["stage=student", "optim.student_epochs=3", *FEW]  # 18 steps
TIMINGS = {"images_per_s", "data_wait"}


def start(zygote: Zygote, verb: str, *arguments: str, runs: Path, world: int = 1) -> Group:
    return zygote.start([f"depthany.{verb}", f"paths.runs={runs}", *arguments], cwd=runs, world=world)


def call(zygote: Zygote, verb: str, *arguments: str, runs: Path, code: int = 0, world: int = 1) -> str:
    """The verb's output; it ends with `code`, in time."""
    group = start(zygote, verb, *arguments, runs=runs, world=world)
    assert set(group.wait(LIMIT_S)) == {code}, group.output()
    return group.output()


def only_run(runs: Path, stage: str) -> Path:
    (folder,) = (p for p in runs.glob(f"{stage}-*") if not p.name.startswith("teacher-other"))
    return folder


def steps(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in folder.glob("checkpoints/step-*.ckpt"))


def killed(zygote: Zygote, stage: str, *arguments: str, runs: Path, at_step: int, after_s: float) -> None:
    """Starts, waits for the checkpoint of a step, a moment longer, then SIGKILLs the whole group."""
    group = start(zygote, "train", *arguments, runs=runs)
    ends = time.monotonic() + LIMIT_S
    while group.poll() == [None] and time.monotonic() < ends:
        if any(step >= at_step for folder in runs.glob(f"{stage}-callbacks*") for step in steps(folder)):
            break
        time.sleep(0.002)
    time.sleep(after_s)
    assert group.poll() == [None], group.output()
    group.kill()


def same_bits(one: Path, other: Path) -> bool:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock measured."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v and k not in TIMINGS} for row in csv.DictReader(file)]


def add_teacher(runs: Path, run: Path, name: str, **record: str) -> Path:
    """A copy of a finished teacher among the runs."""
    shutil.copytree(run, runs / name, ignore=shutil.ignore_patterns("checkpoints"))
    write_json(runs / name / "record.json", read_record(run) | record)
    return runs / name


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Packed once for all runs."""
    return f"paths.shards={tmp_path_factory.mktemp('shards')}"


@pytest.fixture(scope="module")
def smoke(zygote, tmp_path_factory, shards) -> Path:
    """A finished teacher of two steps."""
    runs = tmp_path_factory.mktemp("smoke")
    call(zygote, "train", "stage=teacher", "debug=smoke", shards, runs=runs)
    return only_run(runs, "teacher")


@pytest.fixture(scope="module")
def teacher(zygote, tmp_path_factory, shards) -> Path:
    """A finished teacher, never interrupted."""
    runs = tmp_path_factory.mktemp("teacher")
    call(zygote, "train", *TEACHER, shards, runs=runs)
    return only_run(runs, "teacher")


@pytest.fixture(scope="module")
def student(zygote, tmp_path_factory, shards, teacher) -> Path:
    """A finished student of recipe V1 on the teacher's stored labels, never interrupted."""
    runs = tmp_path_factory.mktemp("student")
    call(zygote, "train", *STUDENT_V1, f"task.teacher_ckpt={teacher}", shards, runs=runs)
    return only_run(runs, "student")


def test_a_run_leaves_weights_record_rows_and_page(smoke):
    files = {p.name for p in smoke.iterdir()}
    assert files == {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "model.safetensors",
        "record.json",
        "report.html",
        "skipped.csv",
    }
    record = read_record(smoke)
    assert record["stage"] == "teacher" and record["finished"] and record["facts"]["optimizer steps"] == "2"
    assert {row["model"] for row in record["table"]} == {"constant", "image row", "mean map", "teacher"}
    assert steps(smoke) == [1, 2]


# (a) Resume


def interrupted_equals_whole(
    zygote: Zygote, whole: Path, command: list[str], runs: Path, *, seed: int, kills: int
) -> None:
    """Killed at random moments, with another number of loader workers each time: the same bits and rows."""
    rng = random.Random(seed)
    stage = command[0].removeprefix("stage=")
    last = max(steps(whole))
    for turn in range(kills):
        at_step = rng.randint(1 + turn * last // (2 * kills), (turn + 1) * last // (2 * kills))
        workers = f"data.num_workers={turn % 2}"
        killed(zygote, stage, *command, workers, runs=runs, at_step=at_step, after_s=rng.uniform(0.01, 0.12))
        assert not list(runs.glob(f"{stage}-callbacks*/model.safetensors")), "killed too late to prove anything"
        if stage == "student":  # a newer teacher must not take over in the middle
            add_teacher(runs, next(runs.glob("teacher-first")), f"teacher-other{turn}", finished=f"2099-01-0{turn + 1}")
            shutil.copy(whole / "model.safetensors", runs / f"teacher-other{turn}")
    output = call(zygote, "train", *command, f"data.num_workers={kills % 2}", runs=runs)
    assert "going on from" in output
    run = next(runs.glob(f"{stage}-callbacks*"))
    assert same_bits(run, whole)
    assert rows(run) == rows(whole)


@pytest.mark.slow
def test_a_killed_teacher_ends_as_if_nothing_had_been(zygote, teacher, shards, tmp_path):
    interrupted_equals_whole(zygote, teacher, [*TEACHER, shards], tmp_path, seed=1, kills=2)


@pytest.mark.slow
def test_a_killed_student_ends_as_if_nothing_had_been(zygote, student, teacher, shards, tmp_path):
    add_teacher(tmp_path, teacher, "teacher-first")
    interrupted_equals_whole(zygote, student, [*STUDENT_V1, shards], tmp_path, seed=2, kills=2)


@pytest.mark.slow
def test_so_does_a_student_without_averaged_weights(zygote, teacher, shards, tmp_path):
    command = [*STUDENT_V2, "callbacks.ema=null", shards]
    for runs in (tmp_path / "whole", tmp_path / "killed"):
        runs.mkdir()
        add_teacher(runs, teacher, "teacher-first")
    call(zygote, "train", *command, runs=tmp_path / "whole")
    whole = next((tmp_path / "whole").glob("student-callbacks*"))
    interrupted_equals_whole(zygote, whole, command, tmp_path / "killed", seed=3, kills=1)


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_and_one_with_a_damaged_one_end_alike(zygote, teacher, shards, tmp_path):
    """Both go on by themselves, and the damaged file is named."""
    run = tmp_path / teacher.name
    shutil.copytree(teacher, run)
    for name in ("record.json", "model.safetensors", "report.html"):
        (run / name).unlink()
    newest = run / "checkpoints" / f"step-{max(steps(run)):08d}.ckpt"
    call(zygote, "train", *TEACHER, shards, runs=tmp_path)
    assert same_bits(run, teacher) and rows(run) == rows(teacher)

    (run / "record.json").unlink()
    newest.write_bytes(newest.read_bytes()[:2000])
    output = call(zygote, "train", *TEACHER, shards, runs=tmp_path)
    assert f"damaged checkpoints are passed over: {newest.name}" in output
    assert same_bits(run, teacher) and rows(run) == rows(teacher)


# (b) Seeds


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(zygote, smoke, shards, tmp_path):
    command = ["stage=teacher", "debug=smoke", shards]
    run = tmp_path / smoke.name
    shutil.copytree(smoke, run)
    (run / "mine.txt").write_text("kept")
    output = call(zygote, "train", *command, "resume=never", runs=tmp_path)
    aside = run.with_name(f"{run.name}~1")
    assert f"is kept as {aside}" in output
    assert (aside / "mine.txt").exists() and not (run / "mine.txt").exists()
    assert same_bits(run, aside) and rows(run) == rows(aside)

    call(zygote, "train", *command, "seed=1", runs=tmp_path)
    assert not same_bits(tmp_path / smoke.name.replace("seed0", "seed1"), smoke)


# (c) Two processes


def moved_apart(one: Path, other: Path, step: int) -> tuple[float, float]:
    """The largest and the mean distance of a weight between two runs after a step."""
    a, b = (
        torch.load(run / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)["current_model_state"]
        for run in (one, other)
    )
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    return float(apart.max()), float(apart.mean())


@pytest.mark.slow
def test_two_processes_learn_what_one_does(zygote, teacher, student, shards, tmp_path):
    """The same samples in every step, CutMix partners and feature alignment included.

    Rounding differs, and Adam turns that of a gradient near 0 into a part of its rate: the longer, the more.
    """
    call(zygote, "train", *TEACHER, shards, "trainer=ddp_cpu", runs=tmp_path)  # Lightning starts the other one
    given = f"task.teacher_ckpt={teacher}"
    call(zygote, "train", *STUDENT_V1, given, shards, "trainer=ddp_cpu", runs=tmp_path, world=2)
    for stage, whole in (("teacher", teacher), ("student", student)):
        run = only_run(tmp_path, stage)
        largest, mean = moved_apart(run, whole, 3)
        assert mean < 1e-7 and largest < 2e-4  # other samples: 1e-4 and 4e-3
        assert [row["samples_seen"] for row in rows(run)] == [row["samples_seen"] for row in rows(whole)]
        assert read_record(run)["facts"]["images seen"] == read_record(whole)["facts"]["images seen"]


@pytest.mark.slow
def test_damaged_samples_of_every_process_are_listed(zygote, teacher, shards, tmp_path):
    mine = tmp_path / "shards"
    shutil.copytree(shards.removeprefix("paths.shards="), mine)
    (tar,) = mine.glob("scenes_a-*/scenes_a-000000.tar")
    index = json.loads(tar.with_suffix(".json").read_text(encoding="utf-8"))
    broken = index["samples"][:6]
    with open(tar, "r+b") as file:
        for sample in broken:
            file.seek(sample["files"]["png"][0])
            file.write(b"no image")
    few = ["stage=teacher", "trainer=ddp_cpu", "data.limit=16", "optim.teacher_epochs=1"]
    output = call(zygote, "train", *few, f"paths.shards={mine}", runs=tmp_path / "runs", world=2)
    assert "6 samples could not be used" in output
    with open(only_run(tmp_path / "runs", "teacher") / "skipped.csv", newline="", encoding="utf-8") as file:
        assert {row["key"] for row in csv.DictReader(file)} == {sample["key"] for sample in broken}


# (d) The folder


@pytest.mark.slow
def test_a_folder_belongs_to_one_config(zygote, smoke, shards, tmp_path):
    run = tmp_path / smoke.name
    shutil.copytree(smoke, run)
    command = ["stage=teacher", "debug=smoke", shards]
    output = call(zygote, "train", *command, runs=tmp_path)  # and ends well
    assert "was finished on" in output and "that run had" not in output
    output = call(zygote, "train", *command[:2], f"paths.shards={tmp_path / 'others'}", runs=tmp_path)
    assert "was finished on" in output and f"not {tmp_path / 'others'}" in output

    here = f"hydra.run.dir={run}"
    output = call(zygote, "train", *command, here, "optim.head_lr=0.5", runs=tmp_path, code=2)
    assert "optim.head_lr is 0.5 now, was 0.002" in output and "resume=never" in output


def test_what_is_learnt_may_not_change_and_the_rest_may():
    def learnt(*overrides):
        return _learnt(plain(compose("train", ["stage=teacher", *overrides])))

    before = learnt()
    free = [
        "paths.runs=elsewhere",
        "logger=wandb",
        "callbacks.checkpoint.every_steps=7",
        "callbacks.throughput=null",
        "trainer.max_time=00:01:00:00",
        "trainer.log_every_n_steps=1",
        "trainer=ddp_cpu",
        "trainer.num_nodes=2",
        "data.num_workers=0",
        "data.start_method=spawn",
        "callbacks=ledger",
    ]
    assert _differences(before, learnt(*free)) == []
    for option, old, new in (
        ("optim.head_lr", 0.002, 0.5),
        ("callbacks.ema.decay", 0.99, 0.5),
        ("model.features", 24, 32),
        ("data.limit", None, 8),
        ("trainer.precision", "32-true", "bf16-mixed"),
        ("seed", 0, 1),
    ):
        assert _differences(before, learnt(f"{option}={new}")) == [f"{option} is {new!r} now, was {old!r}"]
    assert "callbacks.ema is None now" in _differences(before, learnt("callbacks.ema=null"))[0]
    restart = ["optim.batch_size=16", "trainer.accumulate_grad_batches=2"]
    assert len(told := _differences(before, learnt(*restart))) == 2 and all(t.startswith(MAY_CHANGE) for t in told)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("model.taps=[0,1]", "taps=[0, 1]"),
        ("model.encoder=no_such_encoder", "no_such_encoder"),
        ("loss.gradient.scales=0", "scales is 0"),
        ("optim.batch_size=0", "optim.batch_size is 0"),
    ],
)
def test_what_cannot_be_built_is_refused_before_data_are_packed(option, told, zygote, tmp_path):
    output = call(zygote, "train", "stage=teacher", "debug=smoke", option, runs=tmp_path, code=2)
    assert told in output and len(output.splitlines()) == 1
    assert not (tmp_path / "_shards").exists()


def test_an_output_that_cannot_be_written_is_told_in_one_line(zygote, tmp_path):
    (tmp_path / "file").touch()
    group = zygote.start(["depthany.train", "stage=teacher", "debug=smoke", "paths.runs=file/runs"], cwd=tmp_path)
    assert group.wait(LIMIT_S) == [2]
    assert group.output() == "depthany: paths.runs=file/runs cannot be written (Not a directory): name another folder\n"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [10, 12])
def test_what_packing_loses_is_bounded_too(broken, zygote, tmp_path):
    """Ten may always be lost; more only up to data.skip_limit."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        image = np.random.default_rng(i).integers(255, size=(64, 64, 3), dtype=np.uint8)
        data = cv2.imencode(".jpg", image)[1].tobytes()
        (photos / f"{i:02d}.jpg").write_bytes(data[:200] if i < broken else data)
    source = f"{{_target_: depthany.data.sources.photos.PhotoFolder, name: photos, root: {photos}, pattern: '*.jpg'}}"
    packed = "{_target_: depthany.data.sources.packed.Packed, root: ${paths.shards}, samples_per_shard: 7"
    unlabelled = f"data.unlabelled.scenes_b={packed}, short_side: null, source: {source}}}"
    command = ["stage=student", "debug=smoke", "labels=online", "~data.unlabelled.scenes_b", f"+{unlabelled}"]
    add_smoke = ["stage=teacher", "debug=smoke"]
    call(zygote, "train", *add_smoke, runs=tmp_path)
    output = call(zygote, "train", *command, runs=tmp_path, code=2 if broken > 10 else 0)
    (skipped,) = tmp_path.glob("student-*/skipped.csv")
    assert len(skipped.read_text().splitlines()) == 1 + broken
    if broken > 10:
        (line,) = (text for text in output.splitlines() if text.startswith("depthany:"))
        assert (
            "photos: 12 of 20 images could not be packed" in line
            and "data.skip_limit=0.01" in line
            and str(skipped) in line
        )


# (e) The teacher of a student


@pytest.mark.slow
def test_a_student_without_a_teacher_is_told_how_to_get_one(zygote, shards, tmp_path):
    output = call(zygote, "train", "stage=student", "debug=smoke", shards, runs=tmp_path, code=2)
    assert "no finished teacher under" in output and "stage=teacher" in output and "task.teacher_ckpt" in output
    assert "Traceback" not in output


def test_the_last_finished_teacher_of_the_same_data_is_taken(tmp_path):
    def finish(name, when, data="embedded", debug=None, stage="teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        write_json(tmp_path / name / "record.json", {"stage": stage, "data": data, "debug": debug, "finished": when})

    finish("first", "2026-01-01 10:00:00")
    finish("second", "2026-01-01 11:00:00")
    finish("real", "2026-01-01 12:00:00", data="real_sample")
    finish("smoke", "2026-01-01 13:00:00", debug="smoke")
    finish("student", "2026-01-01 14:00:00", stage="student")
    (tmp_path / "gone").mkdir()
    write_json(tmp_path / "gone" / "record.json", {"stage": "teacher", "data": "embedded", "finished": "2026-02-01"})

    def found(**wanted):
        return find_weights("last", tmp_path, **{"stage": "teacher", "data": "embedded", "debug": None} | wanted).parent

    assert found().name == "second"
    assert found(data="real_sample").name == "real"
    assert found(debug="smoke").name == "smoke"
    assert found(stage="student").name == "student"
    assert find_weights("last", tmp_path, stage=None).parent.name == "student"
    assert find_weights(str(tmp_path / "first"), tmp_path, stage="teacher").parent.name == "first"


@pytest.mark.parametrize("spec", ["nowhere", "empty", "empty/model.safetensors", "last"])
def test_weights_that_are_not_there_are_named(spec, tmp_path):
    (tmp_path / "empty").mkdir()
    named = spec if spec == "last" else str(tmp_path / spec)
    with pytest.raises(ConfigError, match="no finished teacher" if spec == "last" else spec):
        find_weights(named, tmp_path, stage="teacher")


@pytest.mark.slow
def test_a_student_says_whose_labels_it_learns_from(zygote, smoke, shards, tmp_path):
    add_teacher(tmp_path, smoke, "teacher-first", finished="2026-01-01 10:00:00")
    add_teacher(tmp_path, smoke, "teacher-second", finished="2026-01-01 11:00:00")
    output = call(zygote, "train", "stage=student", "debug=smoke", shards, runs=tmp_path)
    name = f"teacher-{read_record(smoke)['facts']['weights'][:8]}"
    assert f"teacher: {tmp_path / 'teacher-second' / 'model.safetensors'} ({name})" in output.replace("\n", "")
    facts = read_record(only_run_of_student(tmp_path))["facts"]
    assert facts["teacher"] == name


def only_run_of_student(runs: Path) -> Path:
    (run,) = runs.glob("student-*")
    return run


# (f) Evaluation


@pytest.mark.slow
def test_evaluation_takes_run_folders_and_files(zygote, smoke, shards, tmp_path):
    file = shutil.copy(smoke / "model.safetensors", tmp_path / "mine.safetensors")
    output = call(zygote, "evaluate", f"checkpoint=[{smoke},{file}]", "limit=4", shards, runs=tmp_path)
    name = f"teacher-{read_record(smoke)['facts']['weights'][:8]}"
    for word in ("AbsRel", "delta1", "negative scale", "constant", "image row", "mean map", name):
        assert word in output


@pytest.mark.slow
def test_a_missing_checkpoint_is_told_in_words(zygote, shards, tmp_path):
    output = call(zygote, "evaluate", "checkpoint=nowhere", shards, runs=tmp_path, code=2)
    assert "nowhere is neither a file nor a folder" in output and "Traceback" not in output


def test_a_broken_weights_file_is_told_in_words(tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"mine\.safetensors is not a \.safetensors file"):
        open_model(str(tmp_path / "mine.safetensors"), tmp_path, device="cpu", stage=None)


# (g) Every other way


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        ["recipe=v1", "labels=online", "callbacks.ema=null"],
        ["recipe=v1", "trainer.precision=bf16-mixed", "labels.precision=bf16", "paths.shards=../bf16"],
        ["labels=online", "trainer.precision=bf16-mixed"],
        ["logger=wandb", "trainer.accumulate_grad_batches=2", "data.num_workers=0"],
    ],
    ids=lambda choices: " ".join(choices),
)
def test_every_other_way_runs(zygote, choices, smoke, shards, tmp_path):
    add_teacher(tmp_path, smoke, "teacher-first")
    call(zygote, "train", "stage=student", "debug=smoke", shards, *choices, runs=tmp_path)
    run = only_run_of_student(tmp_path)
    assert read_record(run)["finished"] and (run / "model.safetensors").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"teacher-first", run.name}  # nothing beside the run folder
