"""Laws of what a run leaves in its folder: whole files, rows that outlive a kill, a bounded list of skips."""

import csv
import errno
import json
import os
import random
import re
import time
import zipfile
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from depthany.callbacks import checkpoint as checkpoint_module
from depthany.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint, Stopped, damage, newest_checkpoint
from depthany.callbacks.ema import Ema
from depthany.callbacks.record import MetricsCsv, SkipLog, finished_runs, read_record, write_json
from depthany.types import Skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def content(value: float = 1.0, **more) -> dict:
    return {"state_dict": {"a": torch.full((3,), value), "n": torch.tensor(2)}, **more}


class Net(pl.LightningModule):
    """One weight; its gradient is the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.samples_seen = self.num_samples = 0

    def training_step(self, batch, batch_idx):
        self.samples_seen += 1
        self.log("train/loss", float(batch))
        return self.weight * batch

    def validation_step(self, batch, batch_idx):
        self.log("val/a", self.weight.detach())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer(folder, *callbacks, logger=False, **settings) -> pl.Trainer:
    settings = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1} | settings
    for callback in callbacks:
        if isinstance(callback, StepCheckpoint):
            callback.dirpath = str(folder / "checkpoints")
    return pl.Trainer(
        callbacks=list(callbacks),
        logger=logger,
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, StepCheckpoint) for c in callbacks),
        default_root_dir=str(folder),
        **settings,
    )


def loader(count: int = 6) -> DataLoader:
    return DataLoader([torch.tensor(float(i + 1)) for i in range(count)], batch_size=None)


# Checkpoint files


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "step-00000001.ckpt"
    io.save_checkpoint(content(samples_seen=7), path)
    loaded = io.load_checkpoint(path)
    assert loaded["samples_seen"] == 7 and torch.equal(loaded["state_dict"]["a"], torch.ones(3))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)
    assert not path.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_and_the_old_file_stays(value, tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "step-00000001.ckpt"
    io.save_checkpoint(content(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not saved: 1 tensors are not finite, a among them"):
        io.save_checkpoint(content(value), path)
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "step-00000001.ckpt"
    io.save_checkpoint(content(), path)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"pickle|lambda"):
        io.save_checkpoint(content(2.0, callback=lambda: None), path)
    assert path.read_bytes() == before

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint(content(2.0), path)
    assert path.read_bytes() == before
    assert newest_checkpoint(tmp_path) == (path, [])


class Runs:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_runs_no_code(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    torch.save(content(extra=Runs(tmp_path / "ran")), path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert newest_checkpoint(tmp_path) == (None, [path.name])
    assert not (tmp_path / "ran").exists()


def test_the_newest_whole_checkpoint_is_found_and_damaged_newer_ones_are_named(tmp_path):
    io = AtomicCheckpointIO()
    good = [tmp_path / f"step-{step:08d}.ckpt" for step in (3, 12)]
    for path in good:
        io.save_checkpoint(content(float(len(path.name))), path)
    whole = good[1].read_bytes()
    (tmp_path / "step-00000200.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "step-00000030.ckpt").write_bytes(b"")
    (tmp_path / "step-00000099.ckpt").write_bytes(os.urandom(500))
    torch.save({"no": "weights"}, tmp_path / "step-00000015.ckpt")
    torch.save([1, 2], tmp_path / "step-00000016.ckpt")
    (tmp_path / ".step-00000300.ckpt.part").write_bytes(whole)  # a write that was cut off
    (tmp_path / "last.ckpt").write_bytes(whole)
    path, damaged = newest_checkpoint(tmp_path)
    assert path == good[1]
    assert damaged == [f"step-{step:08d}.ckpt" for step in (200, 99, 30, 16, 15)]


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path):
    """torch.load takes most of them for weights."""
    io, older, path = AtomicCheckpointIO(), *(tmp_path / f"step-0000000{n}.ckpt" for n in (1, 2))
    io.save_checkpoint(content(), older)
    io.save_checkpoint({"state_dict": {"a": torch.arange(4096.0)}}, path)
    whole, rng, found = path.read_bytes(), random.Random(0), 0
    for _ in range(100):
        torn = bytearray(whole)
        torn[rng.randrange(len(torn))] ^= 1 << rng.randrange(8)
        path.write_bytes(torn)
        newest, damaged = newest_checkpoint(tmp_path)
        if newest == path:
            assert torch.equal(io.load_checkpoint(path)["state_dict"]["a"], torch.arange(4096.0))
        else:
            assert (newest, damaged) == (older, [path.name])
            found += 1
    assert found > 90


def test_what_was_written_is_read_back_before_it_counts(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "step-00000001.ckpt"
    io.save_checkpoint(content(), path)
    before = path.read_bytes()

    def bad_disk(fd):
        os.pwrite(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY), b"?", 700)

    monkeypatch.setattr(checkpoint_module.os, "fsync", bad_disk)
    with pytest.raises(OSError, match=r"cannot be read back \(.*checksum"):
        io.save_checkpoint({"state_dict": {"a": torch.ones(999)}}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_an_archive_that_unpacks_to_more_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "step-00000001.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(100_000_000))
    assert damage(tmp_path / "step-00000001.ckpt") == "it is compressed, as torch never does"


def test_no_folder_no_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "checkpoints") == (None, [])


# When checkpoints are written


def saved(folder) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in (folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize(("keep", "expected"), [(1, [6, 7]), (2, [6, 7]), (3, [4, 6, 7])])
def test_the_newest_few_are_kept_and_never_less_than_two(keep, expected, tmp_path):
    trainer(tmp_path, StepCheckpoint(every_steps=2, keep=keep)).fit(Net(), loader(7))
    assert saved(tmp_path) == expected


def test_what_a_kill_cut_off_goes_and_what_was_found_damaged_is_set_aside(tmp_path):
    """Else it would be counted among the newest, and the last good one would have to go."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000004.ckpt").write_bytes(b"torn")
    (folder / ".step-00000004.ckpt.part").write_bytes(b"to")
    trainer(tmp_path, StepCheckpoint(every_steps=2, keep=2)).fit(Net(), loader(5))
    assert saved(tmp_path) == [4, 5]
    assert (folder / "step-00000004.damaged").read_bytes() == b"torn" and len(list(folder.iterdir())) == 3
    assert newest_checkpoint(folder) == (folder / "step-00000005.ckpt", [])


def test_a_step_is_saved_before_its_validation_and_the_last_one_always(tmp_path):
    """However long a validation takes, no step is lost in it."""
    events = []

    class Watched(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            events.append(f"save {checkpoint['global_step']}")

    class Net2(Net):
        def on_validation_epoch_end(self):
            events.append(f"validate {self.global_step}")

    checkpoint = StepCheckpoint(every_steps=3, keep=2)
    run = trainer(tmp_path, checkpoint, val_check_interval=4, check_val_every_n_epoch=None)
    run.strategy.checkpoint_io = Watched()
    run.fit(Net2(), loader(10), loader(1))
    assert events == ["save 3", "save 4", "validate 4", "save 6", "save 8", "validate 8", "save 9", "save 10"]


def test_the_row_of_a_step_is_on_disk_before_its_checkpoint(tmp_path):
    """Else a kill between the two would lose it: the step is not taken again."""
    last_row = {}

    class Watched(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            last_row[checkpoint["global_step"]] = table(tmp_path)[-1]

    class Late(Callback):  # logs where the other callbacks do
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("late", float(batch) * 2)

    run = trainer(tmp_path, Late(), StepCheckpoint(every_steps=2, keep=2), logger=MetricsCsv(run_dir=tmp_path))
    run.strategy.checkpoint_io = Watched()
    run.fit(Net(), loader(4))
    assert last_row == {n: {"step": str(n - 1), "train/loss": str(n), "late": str(2 * n)} for n in (2, 4)}
    assert len(table(tmp_path)) == 4


def test_no_checkpoint_between_the_batches_of_an_accumulated_step(tmp_path):
    seen = []

    class Watched(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            seen.append((checkpoint["global_step"], net.samples_seen))
            super().save_checkpoint(checkpoint, path)

    for going_on in (False, True):
        net = Net()
        run = trainer(tmp_path, StepCheckpoint(every_steps=2, keep=2), accumulate_grad_batches=3)
        run.strategy.checkpoint_io = Watched()
        run.fit(net, loader(9), ckpt_path=tmp_path / "checkpoints" / "step-00000002.ckpt" if going_on else None)
    assert seen == [(2, 6), (3, 9), (3, 3)]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_in_words(tmp_path):
    class Full(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            if checkpoint["global_step"] == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().save_checkpoint(checkpoint, path)

    run = trainer(tmp_path, StepCheckpoint(every_steps=2, keep=2))
    run.strategy.checkpoint_io = Full()
    with pytest.raises(Stopped) as stopped:
        run.fit(Net(), loader(6))
    assert stopped.value.code == 73 and saved(tmp_path) == [2]
    words = r"disk full: .*checkpoints has \d+ MB free, .* step 4\. Make room .* same command .* step-00000002\.ckpt"
    assert re.match(words, stopped.value.text) and "\n" not in stopped.value.text


def test_averaged_weights_are_kept_even_where_nothing_was_left_to_train(tmp_path):
    """A run killed after its last checkpoint ends with the same weights as one that was not."""
    whole = Net()
    trainer(tmp_path, Ema(decay=0.5), StepCheckpoint(every_steps=3, keep=2), max_steps=3).fit(whole, loader(6))
    last = torch.load(tmp_path / "checkpoints" / "step-00000003.ckpt", weights_only=True)
    assert float(last["current_model_state"]["weight"]) == -6 != float(whole.weight)
    assert float(last["state_dict"]["weight"]) == float(whole.weight)
    again = Net()
    run = trainer(tmp_path, Ema(decay=0.5), StepCheckpoint(every_steps=3, keep=2), max_steps=3)
    run.fit(again, loader(6), ckpt_path=tmp_path / "checkpoints" / "step-00000003.ckpt", weights_only=True)
    assert float(again.weight) == float(whole.weight)


# metrics.csv


def table(folder) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_every_row_is_on_disk_at_once(tmp_path):
    log = MetricsCsv(run_dir=tmp_path)
    for step in range(4):
        log.log_metrics({"loss": step / 2, "epoch": 0}, step)
        assert len(table(tmp_path)) == step + 1
    assert table(tmp_path)[3] == {"step": "3", "loss": "1.5"}


def test_a_row_grows_and_new_columns_join(tmp_path):
    log = MetricsCsv(run_dir=tmp_path)
    log.log_metrics({"loss": 123456.0}, 0)
    log.log_metrics({"loss": 2.125}, 1)
    log.log_metrics({"loss": 3.0}, 1)  # said again, and shorter
    log.log_metrics({"val/a": 0.5}, 1)
    log.log_metrics({"loss": 4.0, "val/a": 0.25}, 2)
    log.log_metrics({"val/a": 0.75}, 0)  # an older row
    log.log_metrics({"loss": 5.0}, 3)
    expected = [{"loss": "123456", "val/a": "0.75"}, {"loss": "3", "val/a": "0.5"}]
    expected += [{"loss": "4", "val/a": "0.25"}, {"loss": "5"}]
    assert table(tmp_path) == [{"step": str(i)} | row for i, row in enumerate(expected)]
    log.finalize("success")
    assert table(tmp_path) == [{"step": str(i)} | row for i, row in enumerate(expected)]


def test_rows_before_the_checkpoint_are_kept_over_a_resume_and_later_ones_dropped(tmp_path):
    log = MetricsCsv(run_dir=tmp_path)
    for step in range(9):
        log.log_metrics({"loss": step, "old": 1.0} if step < 8 else {"torn": 1.0}, step)
    log = MetricsCsv(run_dir=tmp_path)
    log.resume(6)  # six steps were taken: 0 to 5
    log.log_metrics({"loss": 60}, 6)
    log.log_metrics({"loss": 70}, 7)
    assert [row["loss"] for row in table(tmp_path)] == ["0", "1", "2", "3", "4", "5", "60", "70"]
    assert [row.get("old") for row in table(tmp_path)] == ["1"] * 6 + [None] * 2
    assert not any("torn" in row for row in table(tmp_path))


@pytest.mark.parametrize("tail", ["7,0.", "7", "\x00\x00", '"7'])
def test_a_torn_last_line_does_not_stop_a_resume(tail, tmp_path):
    (tmp_path / "metrics.csv").write_text(f"step,loss\n0,1\n1,2\n{tail}", encoding="utf-8")
    log = MetricsCsv(run_dir=tmp_path)
    log.resume(2)
    log.log_metrics({"loss": 3}, 2)
    assert [row["loss"] for row in table(tmp_path)] == ["1", "2", "3"]


def test_a_resume_without_a_file_starts_one(tmp_path):
    log = MetricsCsv(run_dir=tmp_path)
    log.resume(5)
    log.log_metrics({"loss": 1}, 5)
    assert table(tmp_path) == [{"step": "5", "loss": "1"}]


def test_writing_a_row_does_not_write_the_others_again(tmp_path):
    """Lightning saves after each row: rewriting would take longer with every one."""
    log = MetricsCsv(run_dir=tmp_path)
    began = time.perf_counter()
    for step in range(3000):
        log.log_metrics({f"m{i}": step + i for i in range(8)}, step)
    assert time.perf_counter() - began < 5
    assert len(table(tmp_path)) == 3000


@pytest.mark.parametrize("every", [4, 5])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(every, tmp_path):
    """Through Lightning, from a checkpoint between validations, from one at a validation, and from the last one."""

    def fit(folder, ckpt=None):
        log = MetricsCsv(run_dir=folder)
        if ckpt:
            log.resume(int(ckpt.stem.removeprefix("step-")))
        checkpoint = StepCheckpoint(every_steps=2, keep=9)
        run = trainer(folder, checkpoint, logger=log, val_check_interval=every, check_val_every_n_epoch=None)
        run.fit(Net(), loader(10) if ckpt is None else rest(ckpt), loader(1), ckpt_path=ckpt, weights_only=True)

    def rest(ckpt):
        used = int(ckpt.stem.removeprefix("step-"))

        class Rest(DataLoader):  # as CursorBatches: of the whole length, from the cursor on
            def __len__(self):
                return 10

        return Rest([torch.tensor(float(i + 1)) for i in range(used, 10)], batch_size=None)

    whole = tmp_path / "whole"
    whole.mkdir()
    fit(whole)
    assert len(table(whole)) == 10
    assert [i for i, row in enumerate(table(whole)) if "val/a" in row] == [every - 1, 2 * every - 1]
    for step in saved(whole):
        again = tmp_path / str(step)
        again.mkdir()
        rows = table(whole)[:step]
        rows[-1].pop("val/a", None)  # as killed right after the checkpoint
        with open(again / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(table(whole)[every - 1]))
            writer.writeheader()
            writer.writerows(rows)
        fit(again, whole / "checkpoints" / f"step-{step:08d}.ckpt")
        assert table(again) == table(whole), step


# skipped.csv


def skips(*keys: str, source: str = "photos") -> list[Skip]:
    return [Skip(source, f"{source}/{key}", f"damaged, {key}\nsecond line") for key in keys]


def end_batch(log: SkipLog, skipped: list[Skip], *, used: int) -> dict[str, float]:
    logged: dict[str, float] = {}
    module = SimpleNamespace(samples_seen=used, log=lambda name, value, **_: logged.update({name: value}))
    log.on_train_batch_end(SimpleNamespace(is_global_zero=True, world_size=1), module, None, {"skipped": skipped}, 0)
    return logged


def listed(folder) -> list[list[str]]:
    with open(folder / "skipped.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_each_sample_is_listed_once_and_counted_by_source(tmp_path):
    log = SkipLog(run_dir=tmp_path, limit=1.0, packed=skips("packed"))
    end_batch(log, skips("a", "b"), used=8)
    end_batch(log, skips("a") + skips("a", source="real"), used=16)
    logged = end_batch(log, [], used=24)
    assert logged == {"data/skipped/photos": 3.0, "data/skipped/real": 1.0}  # every row, not just that of the skip
    log.save()
    assert listed(tmp_path)[0] == ["source", "key", "reason"]
    assert [row[1] for row in listed(tmp_path)[1:]] == ["photos/packed", "photos/a", "photos/b", "real/a"]
    assert listed(tmp_path)[2] == list(skips("a")[0])


def test_the_list_is_kept_over_a_resume(tmp_path):
    log = SkipLog(run_dir=tmp_path, limit=1.0, packed=[])
    end_batch(log, skips("a", "b"), used=8)
    log.save()
    again = SkipLog(run_dir=tmp_path, limit=1.0, packed=[])
    end_batch(again, skips("b", "c"), used=16)
    again.save()
    assert [row[1] for row in listed(tmp_path)[1:]] == ["photos/a", "photos/b", "photos/c"]


@pytest.mark.parametrize("torn", ["photos,photos/b", 'photos,photos/b,"damaged', "", "photos,photos/b,x,y\n"])
def test_a_torn_list_does_not_stop_a_resume(torn, tmp_path):
    (tmp_path / "skipped.csv").write_text(f"source,key,reason\nphotos,photos/a,bad\n{torn}", encoding="utf-8")
    log = SkipLog(run_dir=tmp_path, limit=1.0, packed=[])
    assert ("photos", "photos/a") in log.seen


def test_more_than_the_limit_stops_the_run_in_words(tmp_path):
    log = SkipLog(run_dir=tmp_path, limit=0.1, packed=[])
    end_batch(log, skips(*map(str, range(10))), used=10)  # ten are always allowed
    end_batch(log, skips("10"), used=110)  # 11 of 110: not more than a tenth
    words = r"12 of 118 samples .* data\.skip_limit=0\.1; see .*skipped\.csv.*photos/11"
    with pytest.raises(RuntimeError, match=words):
        end_batch(log, skips("11"), used=118)
    assert len(listed(tmp_path)) == 13


def test_the_bound_is_on_samples_seen_and_not_on_what_packing_left_out(tmp_path):
    packed = skips(*(f"packed{i}" for i in range(50)))
    SkipLog(run_dir=tmp_path, limit=0.01, packed=packed).save()
    log = SkipLog(run_dir=tmp_path, limit=0.01, packed=packed)
    end_batch(log, skips("a"), used=8)
    assert len(log.seen) == 51


def test_the_list_goes_to_disk_with_each_checkpoint_and_at_the_end(tmp_path):
    log = SkipLog(run_dir=tmp_path, limit=1.0, packed=[])
    alone = SimpleNamespace(is_global_zero=True, world_size=1)
    end_batch(log, skips("a"), used=8)
    log.on_save_checkpoint(alone, None, {})
    assert len(listed(tmp_path)) == 2
    end_batch(log, skips("b"), used=16)
    log.on_fit_end(alone, None)
    assert len(listed(tmp_path)) == 3


# Records


def test_the_last_finished_run_comes_first(tmp_path):
    def run(name, **record):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "record.json", record)

    run("b-old", stage="teacher", finished="2026-01-02 10:00:00")
    run("a-new", stage="teacher", finished="2026-01-02 10:00:01")
    run("c-student", stage="student", finished="2026-01-02 09:00:00")
    run("d-running", stage="teacher", teacher="x")
    run("e-never", stage="teacher", finished=None)
    (tmp_path / "f-torn").mkdir()
    (tmp_path / "f-torn" / "record.json").write_text('{"stage": "teacher", "finis', encoding="utf-8")
    (tmp_path / "g-none").mkdir()
    assert [p.name for p in finished_runs(tmp_path, stage="teacher")] == ["a-new", "b-old"]
    assert [p.name for p in finished_runs(tmp_path, stage="student")] == ["c-student"]
    assert [p.name for p in finished_runs(tmp_path, stage=None)] == ["a-new", "b-old", "c-student"]
    assert finished_runs(tmp_path / "nowhere", stage=None) == []


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "null", '"text"'])
def test_a_record_that_cannot_be_read_is_no_record(text, tmp_path):
    (tmp_path / "record.json").write_text(text, encoding="utf-8")
    assert read_record(tmp_path) == {}


def test_a_record_is_replaced_whole(tmp_path):
    write_json(tmp_path / "record.json", {"finished": "now", "path": tmp_path})
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["path"] == str(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
