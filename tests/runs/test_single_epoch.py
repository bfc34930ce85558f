"""The single epoch: whatever is killed, and however it goes on, each image is used once. Real processes, real kills."""

import csv
import json
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from depthany.callbacks.ledger import Used, history
from depthany.callbacks.record import read_record
from depthany.config.build import build
from depthany.config.launch import compose
from depthany.data.order import global_batch, share_of
from depthany.data.shards import read_catalog, write_catalog
from tests.processes import Group, Zygote

IMAGES, PER_STEP = 250, 6  # 42 steps, the last one of 4 images
LIMIT_S = 120
ENCODER, LABELLED, UNLABELLED, VALIDATION = (
    "model.encoder_arguments",
    "data.sources.scenes_a.source",
    "data.unlabelled.scenes_b.source",
    "data.validation.val_a.source",
)
TINY = [f"{ENCODER}.embed_dim=24", f"{ENCODER}.num_heads=2", f"{ENCODER}.img_size=32", "model.input_size=32"]
TINY += ["model.features=8", "model.out_channels=[8,8,8,8]", "model.hidden=8"]
# A bias of the keys does nothing behind a softmax: its gradient is rounding alone, which Adam turns into whole steps.
TINY += [f"+{ENCODER}.qkv_bias=false"]
DATA = [
    f"{LABELLED}.num_scenes=60",
    f"{LABELLED}.size=40",
    f"{UNLABELLED}.num_scenes={IMAGES}",
    f"{UNLABELLED}.size=40",
]
DATA += ["data.unlabelled.scenes_b.samples_per_shard=30", "data.validation.val_b=null", "data.skip_limit=0.5"]
DATA += [f"{VALIDATION}.num_scenes=2", f"{VALIDATION}.size=32"]
STUDENT = ["stage=student", "recipe=v1", "optim.batch_size=9", "callbacks=ledger", "callbacks.checkpoint.every_steps=1"]
STUDENT += ["callbacks.checkpoint.keep=99", "trainer.log_every_n_steps=1", "trainer.val_check_interval=9"]
# The weights of two worlds are compared in double precision, where rounding has no part in the difference.
DOUBLE = """
from depthany.models.depth_model import DepthModel
single = DepthModel.outputs
DepthModel.outputs = lambda self, image: single(self, image.to(next(self.parameters()).dtype))
"""
# The loss of each step and rank, with every bit; the last time that a step was made counts.
LOSSES = """
from depthany.tasks.base import DepthTask
step = DepthTask.training_step
def noted(self, batch, batch_idx):
    cursor, loss = self.samples_seen, step(self, batch, batch_idx)
    with open(f"losses-rank{self.global_rank}", "a") as file:
        print(cursor, float(loss).hex(), file=file)
    return loss
DepthTask.training_step = noted
"""
# While it trains, every read of an image goes to a file of the process that reads.
WATCHED = """
import os
from depthany.data.sources.packed import Shards
from depthany.runs.stage import Stage
read, keep = Shards.read, Stage.keep_weights
def noted(self, index):
    with open(f"reads/{os.getpid()}", "a") as file:
        print(self.key(index), file=file)
    return read(self, index)
def over(self):
    Shards.read = read
    keep(self)
Shards.read, Stage.keep_weights = noted, over
os.makedirs("reads", exist_ok=True)
"""


class Way(NamedTuple):
    """How a run is started."""

    world: int
    workers: int
    nodes: int = 1
    start_method: str = "null"


ALONE = Way(1, 0)


class Set(NamedTuple):
    """Packed and labelled data, some of them damaged, and what trained on them."""

    folder: Path
    teacher: Path
    keys: list[str]  # of the unlabelled images, in the order of the epoch
    damaged: set[str]

    @property
    def good(self) -> list[str]:
        return [key for key in self.keys if key not in self.damaged]


def start(
    zygote: Zygote, data: Set, runs: Path, *options: str, way: Way = ALONE, before: str = "", to_watch: bool = False
) -> Group:
    arguments = [*TINY, *DATA, *STUDENT, f"task.teacher_ckpt={data.teacher}", f"paths.shards={data.folder / 'shards'}"]
    arguments += [f"hydra.run.dir={runs / 'run'}", f"paths.runs={runs}", f"data.num_workers={way.workers}"]
    arguments += [f"data.start_method={way.start_method}", f"trainer.devices={way.world // way.nodes}"]
    arguments += [f"trainer.num_nodes={way.nodes}", f"trainer.strategy={'ddp' if way.world > 1 else 'auto'}", *options]
    before += WATCHED if to_watch else ""
    return zygote.start(["depthany.train", *arguments], cwd=runs, world=way.world, nodes=way.nodes, before=before)


def finish(group: Group) -> str:
    codes = group.wait(LIMIT_S)
    assert set(codes) == {0}, f"{codes}\n{group.output()}"
    return group.output()


def newest(runs: Path) -> int:
    return max((int(p.stem.removeprefix("step-")) for p in runs.glob("run/checkpoints/step-*.ckpt")), default=0)


def reach(group: Group, runs: Path, step: int) -> None:
    """Waits for the checkpoint of a step."""
    ends = time.monotonic() + LIMIT_S
    while newest(runs) < step and group.poll()[0] is None and time.monotonic() < ends:
        time.sleep(0.005)
    assert group.poll()[0] is None and newest(runs) >= step, group.output()


def checkpoint(runs: Path, step: int) -> dict:
    return torch.load(runs / "run" / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)


def rows(runs: Path) -> list[dict[str, str]]:
    """metrics.csv without what a clock has measured."""
    timings = {"images_per_s", "data_wait", "time_left_s"}
    with open(runs / "run" / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v and k not in timings} for row in csv.DictReader(file)]


def apart(one: Path, other: Path) -> float:
    """The largest distance of a weight after the last step, averaged or not."""
    return max(
        float((a[name] - b[name]).abs().max())
        for state in ("state_dict", "current_model_state")
        for a, b in [[checkpoint(runs, newest(runs))[state] for runs in (one, other)]]
        for name in a.keys() | b.keys()
    )


def used(batches: Sequence[Used]) -> list[str]:
    return [key for batch in batches for key in batch.unlabelled]


def each_once(runs: Path, data: Set) -> list[Used]:
    """The history of a finished run: the epoch in its order, each image once, the damaged ones once too."""
    batches = history(runs / "run")
    assert used(batches) == data.good
    assert Counter(key for batch in batches for key in batch.skipped) == Counter(data.damaged)
    assert [batch.first for batch in batches] == [0, *(batch.seen for batch in batches[:-1])]
    assert batches[-1].seen == len(data.keys) == len(set(data.keys))
    record = read_record(runs / "run")
    assert record["finished"] and int(record["facts"]["images seen"]) == len(data.keys)
    with open(runs / "run" / "skipped.csv", newline="", encoding="utf-8") as file:
        assert {row["key"] for row in csv.DictReader(file)} == data.damaged
    return batches


def kill_often(
    zygote: Zygote, data: Set, runs: Path, ways: Iterator[Way], *options: str, kills: int, seed: int, before: str = ""
) -> Counter[Way]:
    """Starts and SIGKILLs the whole group `kills` times at random moments, each time in another way; then lets it end.

    No start reads an image of the epoch from before the cursor of the checkpoint that it goes on from.
    """
    rng, last = random.Random(seed), -(-IMAGES // PER_STEP)
    positions = {key: i for i, key in enumerate(data.keys)}
    taken: Counter[Way] = Counter()
    for turn in range(kills + 1):
        way, begun = next(ways), newest(runs)
        cursor = checkpoint(runs, begun)["samples_seen"] if begun else 0
        for file in runs.glob("reads/*"):
            file.unlink()
        group = start(zygote, data, runs, *options, way=way, before=before, to_watch=True)
        taken[way] += 1
        if turn == kills:
            assert ("going on from" in finish(group)) == (begun > 0)
        else:
            # A third at any moment from the start on, the others in training; far enough from the end to be before it.
            if turn % 3 < 2:
                reach(group, runs, min(max(begun + 1, turn * last // (2 * kills)), last - 12))
            time.sleep(rng.uniform(0, 0.05 if turn % 3 < 2 else 0.6))
            codes = group.poll()
            assert set(codes) == {None}, f"too late to prove anything: {codes}\n{group.output()}"
            group.kill()
        read = [positions[key] for f in runs.glob("reads/*") for key in f.read_text().split() if key in positions]
        assert min(read, default=cursor) >= cursor, "what had been used was read again"
        assert max(Counter(read).values(), default=1) == 1, "something was read twice"
    return taken


@pytest.fixture(scope="module")
def data(zygote, tmp_path_factory) -> Set:
    """Packed, labelled by a teacher of two steps, then damaged: bytes of images overwritten, two in a row."""
    folder = tmp_path_factory.mktemp("epoch")
    common = [*DATA, f"paths.shards={folder / 'shards'}", f"paths.runs={folder}"]
    teacher = folder / "teacher"
    zygote.run(
        ["depthany.train", "stage=teacher", "debug=smoke", *TINY, *common, f"hydra.run.dir={teacher}"], cwd=folder
    )
    zygote.run(["depthany.pseudo_label", f"teacher={teacher}", *common], cwd=folder)
    keys = order(common)
    damaged = {keys[i] for i in (0, 40, 41, 77, 103, 150, len(keys) - 1)}
    damage(folder, damaged)
    return Set(folder, teacher, keys, damaged)


def order(options: Sequence[str]) -> list[str]:
    """The keys of the unlabelled images as the epoch has them: a permutation of what the indices list."""
    cfg = compose("train", ["stage=student", "recipe=v1", *TINY, *options])
    parts = build(cfg.data, mix=build(cfg.mix), augment=build(cfg.augment), seed=cfg.seed)
    parts.setup()
    part = parts.parts["unlabelled"]
    keys = [source.key(index) for source, index in map(part.locate, range(len(part)))]
    listed = [s["key"] for index in indices(Path(cfg.paths.shards)) for s in json.loads(index.read_text())["samples"]]
    assert sorted(keys) == sorted(listed) and len(keys) == IMAGES
    return keys


def indices(shards: Path) -> list[Path]:
    return sorted(p for p in shards.glob("scenes_b-*/scenes_b-*.json") if ".teacher-" not in p.name)


def damage(folder: Path, keys: set[str]) -> None:
    left = set(keys)
    for index in indices(folder / "shards"):
        with open(index.with_suffix(".tar"), "r+b") as tar:
            for sample in json.loads(index.read_text())["samples"]:
                if sample["key"] in left:
                    offset, size, *_ = sample["files"]["png"]
                    tar.seek(offset + size // 2)
                    tar.write(b"damaged!")
                    left.discard(sample["key"])
    assert not left


@pytest.fixture(scope="module")
def whole(zygote, data, tmp_path_factory) -> dict[str, Path]:
    """Runs that nothing has interrupted, made when asked for: in double precision, and with 1 and 2 processes."""

    class Runs(dict):
        def __missing__(self, name: str) -> Path:
            runs = self[name] = tmp_path_factory.mktemp(name)
            way = Way(2 if name == "two" else 1, 0)
            double = name == "double"
            precision = ["trainer.precision=64-true"] if double else []
            finish(start(zygote, data, runs, *precision, way=way, before=DOUBLE if double else LOSSES))
            return runs

    return Runs()


# Ranks 1 -> 2 -> 3 -> 1, on one machine and on several, 0 to 3 workers.
WAYS = [Way(1, 2), Way(2, 1), Way(3, 0), Way(1, 3), Way(2, 0, nodes=2), Way(1, 1), Way(3, 2), Way(2, 3), Way(1, 0)]
WAYS += [Way(3, 1, nodes=3), Way(2, 2)]
STARTED = [Way(1, 1, start_method="forkserver"), Way(1, 1, start_method="spawn")]  # seconds each: once


@pytest.mark.slow
def test_killed_and_taken_up_by_other_numbers_of_processes(zygote, data, whole, tmp_path, capsys):
    """Ordered ids exactly the epoch; weights those of one process that was left alone."""
    began, kills = time.monotonic(), 20
    ways = chain(STARTED, cycle(WAYS))
    double = ["trainer.precision=64-true"]
    taken = kill_often(zygote, data, tmp_path, ways, *double, kills=kills, seed=kills, before=DOUBLE)
    batches = each_once(tmp_path, data)
    distance = apart(tmp_path, whole["double"])
    assert [b._replace(skipped=sorted(b.skipped)) for b in batches] == [
        b._replace(skipped=sorted(b.skipped)) for b in history(whole["double"] / "run")
    ]
    worlds = sorted(Counter(way.world for way in taken.elements()).items())
    with capsys.disabled():
        print(
            f"\n{kills} kills; starts by number of processes {dict(worlds)}, workers "
            f"{sorted({way.workers for way in taken})}, up to {max(way.nodes for way in taken)} machines; "
            f"{len(batches)} steps, {len(used(batches))} images once each, {len(data.damaged)} damaged, 0 lost, "
            f"0 repeated; weights within {distance:.1e} ({time.monotonic() - began:.0f} s)"
        )
    assert distance < 1e-6


@pytest.mark.parametrize(
    ("world", "kills"), [pytest.param(1, 5, marks=pytest.mark.slow), pytest.param(2, 5, marks=pytest.mark.slow)]
)
def test_killed_and_taken_up_by_as_many_processes(world, kills, zygote, data, whole, tmp_path, capsys):
    """Every bit: of the weights, of the optimizer's state and of each step's loss."""
    began = time.monotonic()
    undisturbed = whole["one" if world == 1 else "two"]
    ways = cycle([Way(world, workers) for workers in (1, 0, 3, 2)])
    kill_often(zygote, data, tmp_path, ways, kills=kills, seed=world, before=LOSSES)
    batches = each_once(tmp_path, data)
    final, expected = (load_file(runs / "run" / "model.safetensors") for runs in (tmp_path, undisturbed))
    assert final.keys() == expected.keys() and all(torch.equal(final[name], expected[name]) for name in final)
    assert rows(tmp_path) == rows(undisturbed)
    for rank in range(world):
        one, other = ((runs / f"losses-rank{rank}").read_text() for runs in (tmp_path, undisturbed))
        assert dict(map(str.split, one.splitlines())) == dict(map(str.split, other.splitlines()))
        assert len(other.splitlines()) == len(batches)
    ours, theirs = (checkpoint(runs, newest(runs)) for runs in (tmp_path, undisturbed))
    for part in ("state_dict", "current_model_state", "optimizer_states"):
        one, other = (list(tensors(state[part])) for state in (ours, theirs))
        assert len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with capsys.disabled():
        print(
            f"\n{kills} kills, {world} process(es); {len(batches)} steps; all weights, optimizer states and losses "
            f"equal to the bit ({time.monotonic() - began:.0f} s)"
        )


def damaged_copy(data: Set, folder: Path, damaged: set[str]) -> Set:
    """The same set with other damages, and labels of its own."""
    shutil.copytree(data.folder / "shards", folder / "shards")
    damage(folder, damaged - data.damaged)
    return data._replace(folder=folder, damaged=data.damaged | damaged)


@pytest.mark.slow
def test_batch_and_accumulation_may_change_on_a_restart(zygote, data, tmp_path):
    """Each image once, in steps of another size, at the learning rate of its place in the epoch."""
    stops = [(Way(1, 1), ["optim.batch_size=9"], 5)]
    stops += [(Way(2, 0), ["optim.batch_size=6", "trainer.accumulate_grad_batches=2"], 9)]
    for way, options, step in stops:
        group = start(zygote, data, tmp_path, *options, way=way)
        reach(group, tmp_path, step)
        group.kill()
    changed = newest(tmp_path)
    output = finish(start(zygote, data, tmp_path, "optim.batch_size=15", way=Way(3, 2)))
    assert "optim.batch_size is 15 now, was 6: every image is still used once" in output
    assert "trainer.accumulate_grad_batches is 1 now, was 2: every image is still used once" in output
    batches = each_once(tmp_path, data)
    sizes = Counter(batch.seen - batch.first for batch in batches)
    assert {6, 4, 10} <= set(sizes), sizes  # unlabelled images of a batch: two parts of three
    left = len(data.keys) - checkpoint(tmp_path, changed)["samples_seen"]
    assert newest(tmp_path) == batches[-1].step == changed + -(-left // 10)
    plan = build(compose("train", [*STUDENT]).optim)
    first = {batch.seen: batch.first for batch in batches}
    for row in rows(tmp_path):
        if "samples_seen" in row:
            progress = first[int(float(row["samples_seen"]))] / len(data.keys)
            assert float(row["lr"]) == pytest.approx(plan.head_lr * plan.factor(progress), rel=1e-5)


@pytest.mark.slow
def test_a_rank_whose_whole_share_is_damaged_holds_nobody_up(zygote, data, whole, tmp_path):
    """Five batches in which rank 1 has nothing to learn from."""
    shares = [
        share_of(global_batch(cursor=step * PER_STEP, total=IMAGES, size=9, labelled=1, unlabelled=2), rank=1, world=2)
        for step in range(8, 13)
    ]
    lost = {data.keys[spot.position] for share in shares for spot in share if spot.part == "unlabelled" and spot.weight}
    mine = damaged_copy(data, tmp_path / "data", lost)
    assert len(lost) == 10
    finish(start(zygote, mine, tmp_path, way=Way(2, 2)))
    batches = each_once(tmp_path, mine)
    assert {b.step for b in batches} == {b.step for b in history(whole["two"] / "run")}
    assert apart(tmp_path, whole["two"]) > 1e-4  # ten images less can be seen in the weights


@pytest.mark.slow
def test_a_shard_that_is_deleted_while_the_run_is_on_its_way(zygote, data, tmp_path):
    """Its images count as used and are listed; every other image is used once; no rank waits."""
    one = "data.window=1"  # shard by shard, and only a few of them open
    mine = damaged_copy(data, tmp_path / "data", set())
    keys = order([*DATA, f"paths.shards={mine.folder / 'shards'}", one])
    (last,) = (i for i in indices(mine.folder / "shards") if keys[-1] in i.read_text())
    gone = {sample["key"] for sample in json.loads(last.read_text())["samples"]}
    group = start(zygote, mine, tmp_path, one, way=Way(2, 1))
    reach(group, tmp_path, 2)
    last.with_suffix(".tar").unlink()
    output = finish(group)
    batches = history(tmp_path / "run")
    assert used(batches) == [key for key in keys if key not in gone and key not in mine.damaged]
    skipped = {key for batch in batches for key in batch.skipped}
    assert len(skipped) == len(gone | mine.damaged) and batches[-1].seen == IMAGES
    assert f"{len(skipped)} samples could not be used" in output


@pytest.mark.slow
def test_a_folder_in_use_is_refused_in_one_line_until_its_run_is_dead(zygote, data, tmp_path):
    first = start(zygote, data, tmp_path)
    reach(first, tmp_path, 1)
    first.kill(signal.SIGSTOP)  # alive, if not well
    output = zygote_output(start(zygote, data, tmp_path), code=2)
    (line,) = output.splitlines()
    host = socket.gethostname()
    assert f"{tmp_path / 'run'} is in use by process {first.pids[0]} on {host}, which is alive" in line
    assert f"kill {first.pids[0]}" in line and "paths.runs" in line
    assert "is in use by" in zygote_output(start(zygote, data, tmp_path, way=Way(2, 0)), code=None)
    first.kill()
    began = time.monotonic()
    assert "going on from" in finish(start(zygote, data, tmp_path))
    assert time.monotonic() - began < LIMIT_S / 2 and not list(tmp_path.glob(".*claim*"))
    each_once(tmp_path, data)


@pytest.mark.slow
def test_a_run_does_not_go_on_in_a_set_that_has_changed(zygote, data, tmp_path):
    """One image less, and every later position would be another image: some would be used twice and some never."""
    mine = damaged_copy(data, tmp_path / "data", set())
    group = start(zygote, mine, tmp_path)
    reach(group, tmp_path, 2)
    group.kill()
    (folder,) = {index.parent for index in indices(mine.folder / "shards")}
    there = read_catalog(str(folder))
    write_catalog(folder, name=there.name, dropped={there.tars[0].decode(): [0]})
    output = zygote_output(start(zygote, mine, tmp_path), code=2)
    assert "scenes_b changed since the run began" in output and "resume=never" in output
    write_catalog(folder, name=there.name)
    finish(start(zygote, mine, tmp_path))
    each_once(tmp_path, mine)


def zygote_output(group: Group, *, code: int | None) -> str:
    codes = group.wait(LIMIT_S)
    assert codes[0] == 2 and (code is None or set(codes) == {code}), group.output()
    return group.output()


@pytest.mark.slow
def test_a_run_that_was_given_up_stops_before_it_writes_again(zygote, data, tmp_path):
    """As after hours of sleep: another has taken the folder over in the meantime."""
    group = start(zygote, data, tmp_path)
    reach(group, tmp_path, 2)
    group.kill(signal.SIGSTOP)
    before = newest(tmp_path)
    (claim,) = tmp_path.glob(".run.claim")
    note = json.loads(claim.read_text())
    claim.with_name(f".run.claim.{note['nonce']}").write_text(json.dumps(note | {"nonce": "another"}))
    group.kill(signal.SIGCONT)
    assert group.wait(LIMIT_S) == [1]
    assert "was taken over by another run" in group.output()
    assert newest(tmp_path) <= before + 1 and not (tmp_path / "run" / "model.safetensors").exists()


def tensors(state: object) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for inner in state.values() if isinstance(state, dict) else state:
            yield from tensors(inner)
