"""Runs as users start them: real processes, killed, started again, refused. One smoke run is fast; the rest is slow."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_S = 120
FEW = ["data.limit=64", "trainer.limit_val_batches=2", "trainer.val_check_interval=5", "trainer.log_every_n_steps=1"]
FEW += ["callbacks.checkpoint.every_steps=3"]
TEACHER = ["stage=teacher", "optim.teacher_epochs=2", *FEW]
TIMINGS = {"images_per_s", "data_wait"}


def start(verb: str, *arguments: str, runs: Path, **kwargs) -> subprocess.Popen[str]:
    """A verb in a process group of its own, so that its loader workers can be killed with it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "RANK", "LOCAL_RANK", "WORLD"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", f"depthany.{verb}", f"paths.runs={runs}", *arguments]
    pipe = subprocess.PIPE
    runs.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command, cwd=runs, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True, **kwargs
    )


def call(verb: str, *arguments: str, runs: Path, code: int = 0) -> str:
    """The verb's output, standard error included; it ends with `code` in time."""
    process = start(verb, *arguments, runs=runs)
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"{verb} {arguments} did not end in {LIMIT_S} s")
    assert process.returncode == code, out + err
    return out + err


def kill(process: subprocess.Popen[str]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def only_run(runs: Path, stage: str) -> Path:
    (folder,) = runs.glob(f"{stage}-*")
    return folder


def steps(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in folder.glob("checkpoints/step-*.ckpt"))


def killed(*arguments: str, runs: Path, at_step: int, after_s: float) -> None:
    """Starts, waits for the checkpoint of a step, a moment longer, then SIGKILLs the whole group."""
    process = start("train", *arguments, runs=runs)
    stage = next(a for a in arguments if a.startswith("stage=")).removeprefix("stage=")
    ends = time.monotonic() + LIMIT_S
    while process.poll() is None and time.monotonic() < ends:
        found = [s for folder in runs.glob(f"{stage}-*") for s in steps(folder)]
        if found and max(found) >= at_step:
            break
        time.sleep(0.002)
    time.sleep(after_s)
    kill(process)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock measured."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v and k not in TIMINGS} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return f"paths.shards={tmp_path_factory.mktemp('shards')}"


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, shards) -> Path:
    """A finished teacher of TEACHER, never interrupted."""
    runs = tmp_path_factory.mktemp("teacher")
    call("train", *TEACHER, shards, runs=runs)
    return only_run(runs, "teacher")


# Resume


def interrupted_equals_whole(whole: Path, command: list[str], runs: Path, *, seed: int) -> Path:
    rng = random.Random(seed)
    stage = command[0].removeprefix("stage=")
    workers = [f"data.num_workers={n}" for n in rng.sample([0, 1, 0, 1], 3)]
    last = max(steps(whole))
    moments = [rng.randrange(3, last // 2, 3), rng.randrange(last // 2, last)]
    for worker, at_step in zip(workers, moments, strict=False):
        killed(*command, worker, runs=runs, at_step=at_step, after_s=rng.uniform(0, 0.12))
        assert not list(runs.glob(f"{stage}-*/model.safetensors")), "killed too late to prove anything"
    output = call("train", *command, workers[-1], runs=runs)
    assert "going on from" in output
    run = only_run(runs, stage)
    assert same_bits(run, whole)
    assert rows(run) == rows(whole)
    return run


@pytest.mark.slow
def test_a_killed_teacher_goes_on_as_if_nothing_had_been(teacher, shards, tmp_path):
    interrupted_equals_whole(teacher, [*TEACHER, shards], tmp_path, seed=1)
