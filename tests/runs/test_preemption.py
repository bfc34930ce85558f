"""Real runs that are told to stop, killed while they save, or out of disk: what stays, and how they go on."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from depthany.callbacks.checkpoint import AtomicCheckpointIO, damage, newest_checkpoint
from depthany.callbacks.preemption import SIGNALS
from depthany.callbacks.record import read_record
from tests.processes import Group, Zygote

LIMIT_S = 30  # what a scheduler waits between its two signals
TIMINGS = {"images_per_s", "data_wait"}
SMALL = ["depthany.train", "stage=teacher", "optim.batch_size=4", "trainer.log_every_n_steps=1"]
SMALL += ["trainer.limit_val_batches=4", "callbacks.checkpoint.every_steps=100000"]
LONG = [*SMALL, "data.limit=48", "optim.teacher_epochs=50", "trainer.val_check_interval=5"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """Packed once for all runs."""
    return f"paths.shards={tmp_path_factory.mktemp('shards')}"


def start(zygote: Zygote, runs: Path, *arguments: str, world: int = 1, **options) -> Group:
    ranks = ["trainer=ddp_cpu", f"trainer.devices={world}"] if world > 1 else []
    return zygote.start([*arguments, *ranks, f"paths.runs={runs}"], cwd=runs, world=world, **options)


def wait_for(group: Group, text: str) -> None:
    ends = time.monotonic() + 60
    while text not in group.output():
        assert time.monotonic() < ends and None in group.poll(), f"{text!r} was not said:\n{group.output()}"
        time.sleep(0.005)


def only_run(runs: Path) -> Path:
    (folder,) = runs.glob("teacher-*")
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what a clock measured."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v and k not in TIMINGS} for row in csv.DictReader(file)]


def a_worker(group: Group) -> int:
    """A loader worker that has started: it blocks SIGTERM, to hand it on."""
    ends = time.monotonic() + LIMIT_S
    while time.monotonic() < ends:
        for rank in group.pids:
            for child in Path(f"/proc/{rank}/task/{rank}/children").read_text().split():
                blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{child}/status").read_text())
                if blocked and int(blocked[1], 16) >> (signal.SIGTERM - 1) & 1:
                    return int(child)
        time.sleep(0.01)
    raise AssertionError(f"no worker\n{group.output()}")


def tell(group: Group, whom: str, number: int) -> None:
    """A signal to everyone (workers too), to one rank, or to one worker."""
    if whom == "a worker":
        os.kill(a_worker(group), number)
    else:
        group.kill(number, ranks=None if whom == "all" else [int(whom.removeprefix("rank "))])


def stopped_at(group: Group, folder: Path) -> int:
    """The step that a run was stopped at: it ended in time on all ranks, and nothing of that step is missing."""
    codes = group.wait(LIMIT_S)
    assert set(codes) == {75}, f"{codes}\n{group.output()}"
    (said,) = re.findall(
        r"^stopped by .* at step (\d+), (\d+) of \d+ images, with a checkpoint; the same command goes on$",
        group.output(),
        re.MULTILINE,
    )
    step, images = map(int, said)
    newest, damaged = newest_checkpoint(folder / "checkpoints")
    assert newest is not None and newest.name == f"step-{step:08d}.ckpt" and damaged == []
    assert torch.load(newest, weights_only=True)["samples_seen"] == images == step * 4
    assert [int(row["step"]) for row in rows(folder)] == list(range(step))
    assert not list(folder.rglob("*.part"))
    return step


def stop_again_and_again(zygote: Zygote, shards: str, runs: Path, *, turns: int) -> None:
    """Signals at random moments to random subsets of two ranks and their workers; each start goes on from the last."""
    rng, step = random.Random(turns), 0
    for turn in range(turns):
        group = start(zygote, runs, *LONG, shards, world=2)
        wait_for(group, "parameters" if turn % 5 == 1 else "\n  step ")  # fit has begun, or its first step is done
        time.sleep(rng.uniform(0, 0.6))
        tell(group, ("all", "rank 0", "rank 1", "a worker")[turn % 4], SIGNALS[turn // 4 % 2])
        last, step = step, stopped_at(group, only_run(runs))
        assert step >= last  # the same where it was told in the validation that it began with
        assert (f"step-{last:08d}.ckpt" in group.output()) == bool(last)  # went on from it


@pytest.mark.slow
def test_every_rank_stops_after_the_same_step_whoever_is_told(zygote, shards, tmp_path):
    stop_again_and_again(zygote, shards, tmp_path, turns=3)


@pytest.mark.slow
def test_twenty_signals_cost_no_step(zygote, shards, tmp_path):
    stop_again_and_again(zygote, shards, tmp_path / "stopped", turns=20)
    made = rows(only_run(tmp_path / "stopped"))
    group = start(zygote, tmp_path / "whole", *LONG, shards, world=2)
    wait_for(group, "parameters")
    while None in group.poll() and not list((tmp_path / "whole").glob(f"*/checkpoints/*{len(made) // 5 * 5 + 5:08d}*")):
        time.sleep(0.02)
    group.kill(signal.SIGTERM)
    stopped_at(group, only_run(tmp_path / "whole"))
    whole = rows(only_run(tmp_path / "whole"))[: len(made)]
    assert whole[:-1] == made[:-1]  # losses to 8 digits, validations included
    assert whole[-1].items() >= made[-1].items()  # a validation of the last step may have been cut off


@pytest.mark.slow
def test_ranks_with_unequal_shares_of_a_validation_leave_it_together(zygote, shards, tmp_path):
    long = [*LONG, "data.limit=47", "trainer.limit_val_batches=1.0"]  # 94 images: 32, 31 and 31
    for turn in range(2):
        group = start(zygote, tmp_path, *long, shards, world=3)
        wait_for(group, "parameters")
        checkpoint = f"*/checkpoints/step-{5 * turn + 5:08d}.ckpt"
        while None in group.poll() and not list(tmp_path.glob(checkpoint)):  # the validation follows
            time.sleep(0.005)
        time.sleep(0.05)
        group.kill(SIGNALS[turn], ranks=[2])
        assert stopped_at(group, only_run(tmp_path)) == 5 * turn + 5
        assert [i for i, row in enumerate(rows(only_run(tmp_path))) if "val/val_a/abs_rel" in row] == [4][:turn]


@pytest.mark.slow
def test_ranks_that_lightning_starts_stop_too_even_while_they_start(zygote, shards, tmp_path):
    """Lightning kills rank 0 where another rank ends with a code; and it takes seconds to start one."""
    for turn, wait_s in enumerate((0.5, 0)):
        group = start(zygote, tmp_path, *LONG, "trainer=ddp_cpu", shards)
        wait_for(group, "parameters")
        if turn:
            wait_for(group, "\n  step ")
        time.sleep(wait_s)
        group.kill(signal.SIGTERM)
        assert stopped_at(group, only_run(tmp_path)) > turn
        ends = time.monotonic() + LIMIT_S
        while Path(f"/proc/{group.pids[0]}").exists() or alive(group.pids[0]):
            assert time.monotonic() < ends, "a rank is left behind"
            time.sleep(0.05)


def alive(group_id: int) -> bool:
    """Whether a process group has a process left."""
    try:
        os.killpg(group_id, 0)
    except ProcessLookupError:
        return False
    return True


FEW = [*SMALL, "data.limit=10", "optim.teacher_epochs=1", "callbacks.ema=null"]  # steps of 4, 4 and 2 images


@pytest.fixture(scope="module")
def begun(zygote, shards, tmp_path_factory) -> Path:
    """A run whose time was up after one step."""
    runs = tmp_path_factory.mktemp("begun")
    group = start(zygote, runs, *FEW, shards, "trainer.max_time=00:00:00:00")
    assert group.wait(LIMIT_S) == [75]
    assert "trainer.max_time is over at step 1, 4 of 10 images, with a checkpoint; the same command" in group.output()
    return only_run(runs)


def samples_seen(run: Path) -> int:
    newest, _ = newest_checkpoint(run / "checkpoints")
    return int(torch.load(newest, weights_only=True)["samples_seen"]) if newest else 0


def test_every_end_leaves_a_checkpoint_of_the_last_step(begun, zygote, shards, tmp_path):
    assert samples_seen(begun) == 4
    run = shutil.copytree(begun, tmp_path / begun.name)
    group = start(zygote, tmp_path, *FEW, shards)
    assert group.wait(LIMIT_S) == [0], group.output()
    assert "going on from" in group.output() and read_record(run)["facts"]["images seen"] == "10"
    assert samples_seen(run) == 10

    assert start(zygote, tmp_path / "max", *FEW, shards, "trainer.max_steps=2").wait(LIMIT_S) == [0]
    assert samples_seen(only_run(tmp_path / "max")) == 8


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_by_itself(begun, zygote, shards, tmp_path):
    run = shutil.copytree(begun, tmp_path / begun.name)
    (checkpoint,) = (run / "checkpoints").iterdir()
    torn = bytearray(checkpoint.read_bytes())
    torn[len(torn) // 2] ^= 1
    checkpoint.write_bytes(torn)
    group = start(zygote, tmp_path, *FEW, shards)
    assert group.wait(LIMIT_S) == [2]
    assert f"{run / 'checkpoints'}: none of the checkpoints is whole; bring one back, or resume=never" in group.output()
    assert f"damaged checkpoints are passed over: {checkpoint.name}" in group.output()
    assert "Traceback" not in group.output()

    (run / "config.yaml").unlink()
    group = start(zygote, tmp_path, *FEW, shards)
    assert group.wait(LIMIT_S) == [2] and "holds checkpoints, but no config.yaml" in group.output()
    assert checkpoint.read_bytes() == torn

    group = start(zygote, tmp_path, *FEW, shards, "resume=never", "trainer.max_time=00:00:00:00")
    assert group.wait(LIMIT_S) == [75]
    assert (tmp_path / f"{run.name}~1" / "checkpoints" / checkpoint.name).read_bytes() == torn


# A run with a state of 48 MB that saves at every step, so that a kill mostly falls into a save.
SAVES = """
import os, sys
from pathlib import Path
import lightning.pytorch as pl, torch
from torch.utils.data import DataLoader
from depthany.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint, newest_checkpoint
torch.set_num_threads(1)
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4_000_000))
    def training_step(self, batch, batch_idx):
        return (self.weight * float(self.global_step)).sum()
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())
class Said(StepCheckpoint):
    def save(self, trainer):
        super().save(trainer)
        print("saved", trainer.global_step, flush=True)
saver = Said(every_steps=1, keep=2)
saver.dirpath = sys.argv[1]
newest, damaged = newest_checkpoint(Path(sys.argv[1]))
print("from", newest and newest.name, damaged, flush=True)
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[saver], logger=False, plugins=[AtomicCheckpointIO()],
    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Net(), DataLoader(torch.zeros(100_000), batch_size=None), ckpt_path=newest, weights_only=True)
"""


@pytest.mark.slow
def test_a_kill_while_it_saves_leaves_the_best_whole_checkpoint(zygote, tmp_path):
    """20 kills, and more until six of them fell into a save.

    Staging on another disk, as Lightning does, leaves torn files under the final name.
    """
    rng, folder, last, left, kills = random.Random(5), tmp_path / "checkpoints", 0, 0, 0
    while kills < 20 or left <= 5:
        kills += 1
        group = zygote.start(
            ["-c", SAVES, folder], cwd=tmp_path, env={"TMPDIR": os.environ.get("XDG_RUNTIME_DIR", "/dev/shm")}
        )
        wait_for(group, "saved")
        time.sleep(rng.uniform(0, 0.4))
        group.kill()
        began = re.search(r"^from (None|step-(\d+)\.ckpt) \[\]$", group.output(), re.MULTILINE)
        assert began and int(began[2] or 0) >= last, group.output()  # never an older one, never a damaged one
        last = max(int(step) for step in re.findall(r"^saved (\d+)$", group.output(), re.MULTILINE))
        left += len(list(folder.glob(".*.part")))
        files = sorted(folder.glob("*.ckpt"))
        assert int(files[-1].stem.removeprefix("step-")) in (last, last + 1)
        assert all(damage(file) is None for file in files) and len(files) <= 4
        assert kills < 100, f"only {left} kills fell into a save"
    group = zygote.start(["-c", SAVES, folder], cwd=tmp_path)
    wait_for(group, "saved")
    group.kill(signal.SIGSTOP)
    assert len(list(folder.glob(".*.part"))) <= 1  # of this run
    group.kill()


# Full disks


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of 40 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, *, leave_mb: float) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"")
    with open(filler, "wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - int(leave_mb * 1e6))
    return filler


def test_the_oldest_checkpoint_makes_room_but_never_the_newest_good_one(disk, capsys):
    io = AtomicCheckpointIO()

    def save(step: int) -> Path:
        path = disk / f"step-{step:08d}.ckpt"
        io.save_checkpoint({"state_dict": {"a": torch.ones(3_000_000)}}, path)  # 12 MB
        return path

    def there() -> list[str]:
        return sorted(path.name for path in disk.iterdir())

    first, second, third = save(1), save(2), save(3)
    save(4)
    assert there() == [path.name for path in (second, third, disk / "step-00000004.ckpt")]
    assert f"disk full: {first} is deleted to make room" in capsys.readouterr().out

    torn = bytearray((disk / "step-00000004.ckpt").read_bytes())
    torn[6_000_000] ^= 1
    (disk / "step-00000004.ckpt").write_bytes(torn)
    fifth = save(5)
    assert there() == [third.name, "step-00000004.ckpt", fifth.name]
    fifth.unlink()
    fill(disk, leave_mb=5)
    for _ in range(2):  # the damaged one is given up, and that is not enough; then there is nothing to give up
        with pytest.raises(OSError, match="No space"):
            io.save_checkpoint({"state_dict": {"a": torch.ones(8_000_000)}}, disk / "step-00000006.ckpt")
        assert newest_checkpoint(disk)[0] == third and there() == ["filler", third.name]


@pytest.mark.slow
def test_a_full_disk_costs_old_checkpoints_first_and_then_ends_the_run_in_words(zygote, shards, disk):
    """A checkpoint here is 12 MB, two of them stay, and there are two ranks."""
    few = [*SMALL, "callbacks.checkpoint.every_steps=2", "data.limit=24", "optim.teacher_epochs=1", shards]  # 6 steps
    filler = fill(disk, leave_mb=33)
    group = start(zygote, disk, *few, world=2)
    assert group.wait(LIMIT_S) == [0, 0], group.output()
    assert "is deleted to make room for a newer checkpoint" in group.output()
    shutil.rmtree(only_run(disk))

    filler.unlink()
    filler = fill(disk, leave_mb=20)
    group = start(zygote, disk, *few, world=2)
    assert set(group.wait(LIMIT_S)) == {73}, group.output()
    assert "Traceback" not in group.output()
    (said,) = [line for line in group.output().splitlines() if line.startswith("disk full")]
    assert re.match(
        rf"disk full: {only_run(disk)}/checkpoints has \d+ MB free, too little for the checkpoint of step 4", said
    )
    assert "it goes on from step-00000002.ckpt, which is whole" in said
    newest, damaged = newest_checkpoint(only_run(disk) / "checkpoints")
    assert newest is not None and newest.name == "step-00000002.ckpt" and damaged == []
    assert not list(disk.rglob(".step*.part"))

    filler.unlink()
    group = start(zygote, disk, *few, world=2)
    assert group.wait(LIMIT_S) == [0, 0], group.output()
    assert "going on from" in group.output()
    assert [row["step"] for row in rows(only_run(disk))] == ["0", "1", "2", "3", "4", "5"]
