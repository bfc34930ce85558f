"""Each fault that a preflight looks for, injected once: it is found, named, and told with the way out."""

import random
import tempfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from depthany.config.build import build
from depthany.config.check import ConfigError
from depthany.config.launch import compose
from depthany.data.module import Mix
from depthany.data.order import global_batch, share_of
from depthany.data.sources.packed import Packed
from depthany.data.sources.scenes import Scenes
from depthany.losses.total import WeightedSum
from depthany.runs.preflight import (
    Finding,
    Preflight,
    check_batch,
    check_checkpoint,
    check_disks,
    check_open_files,
    check_shared_memory,
    check_sources,
    check_temporary,
    check_versions,
    table,
)
from depthany.tasks.base import DepthTask
from tests.layouts import SMALL_HEAD, official_state


def test_versions() -> None:
    def installed(name: str) -> str:
        if name == "absent":
            raise PackageNotFoundError(name)
        return {"torch": "2.15.0+cpu", "lightning": "2.6.2"}[name]

    fine = ["torch>=2.11", "lightning<2.7", "absent>=1; extra == 'hf'"]
    assert check_versions(fine, installed).level == "ok"
    told = check_versions([*fine, "lightning>=2.6.6", "absent>=3"], installed)
    assert told.level == "FAIL"
    assert "lightning 2.6.2 (needs >=2.6.6)" in told.text and "absent none (needs >=3)" in told.text


def padding(size: int, mix: Mix, world: int) -> int:
    batch = global_batch(cursor=0, total=10**9, size=size, labelled=mix.labelled, unlabelled=mix.unlabelled)
    return sum(s.weight == 0 for rank in range(world) for s in share_of(batch, rank=rank, world=world))


def test_batch_and_world() -> None:
    """The padding is that of the order, and the batch that is proposed has none."""
    rng = random.Random(0)
    levels = set()
    for _ in range(200):
        labelled, unlabelled = rng.choice([(1, 0), (0, 1), (1, 2), (1, 1), (2, 3)])
        mix, size, world = (
            Mix(labelled=labelled, unlabelled=unlabelled, epochs=1),
            rng.randint(1, 70),
            rng.randint(1, 12),
        )
        told = check_batch(size=size, mix=mix, world=world, images=10**9)
        wasted = padding(size, mix, world)
        assert (told.level == "ok") == (wasted == 0)
        levels.add(told.level)
        if wasted:
            assert f" {wasted} of " in told.text
            proposed = int(told.text.partition("optim.batch_size=")[2].split()[0])
            assert padding(proposed, mix, world) == 0
    assert levels == {"ok", "warn"}


def test_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(folder: Path) -> Finding:
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setattr(tempfile, "tempdir", None)
        return check_temporary()

    assert told(tmp_path).level == "ok" or len(str(tmp_path)) > 60
    assert told(tmp_path / "missing") == Finding("FAIL", "TMPDIR", told(tmp_path / "missing").text)
    assert "missing cannot be written to" in told(tmp_path / "missing").text
    long = tmp_path / ("x" * 90)
    long.mkdir()
    assert "too long" in told(long).text


def test_limits() -> None:
    assert check_open_files(workers=2, window=8, soft=1024, hard=4096).level == "ok"
    raised = check_open_files(workers=64, window=8, soft=1024, hard=4096)
    assert raised.level == "FAIL" and "ulimit -n 1184" in raised.text
    assert "hard limit (now 1024)" in check_open_files(workers=64, window=8, soft=1024, hard=1024).text
    assert check_shared_memory(need=0, free=None).level == "ok"
    assert check_shared_memory(need=1e6, free=64e6).level == "ok"
    assert check_shared_memory(need=60e6, free=64e6).level == "warn"
    small = check_shared_memory(need=90e6, free=64e6)
    assert small.level == "FAIL" and "64 MB free, 90 MB needed" in small.text and "--shm-size" in small.text


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = check_disks([(tmp_path / "a" / "b", "labels", 1e3), (tmp_path / "c", "checkpoints", 2e3)])
    assert one.level == "ok" and "3 kB needed (labels 1 kB, checkpoints 2 kB)" in one.text
    assert not (tmp_path / "a").exists()
    (full,) = check_disks([(tmp_path / "a", "labels", 1e18)])
    assert full.level == "FAIL" and "make room" in full.text and "1,000,000 TB" in full.text
    monkeypatch.setattr("os.access", lambda *_: False)
    (locked,) = check_disks([(tmp_path, "labels", 1)])
    assert locked.level == "FAIL" and "cannot be written to" in locked.text


def groups(*overrides: str) -> dict[str, Any]:
    data = compose("train", ["stage=student", *overrides]).data
    return {name: data[name] for name in ("sources", "unlabelled", "validation")}


def test_missing_sources_are_named_all_at_once(tmp_path: Path) -> None:
    mine = f"{{_target_:depthany.data.sources.packed.Shards,name:mine,root:{tmp_path / 'no_shards'}}}"
    wrong = ["data=real_sample", f"paths.real={tmp_path / 'no_real'}", f"+data.unlabelled.mine={mine}"]
    _, counts, findings = check_sources(groups(*wrong), limit=None, labels_of=None)
    told = {finding.text.partition(":")[0]: finding.text for finding in findings}
    names = ("sources.real", "unlabelled.photos", "unlabelled.mine", "validation.real_unseen")
    assert set(told) == {f"data.{name}" for name in names}
    assert all("no_" in text and "\n" not in text for text in told.values())
    assert not counts
    built, counts, findings = check_sources(groups(), limit=50, labels_of=None)
    assert [finding.level for finding in findings] == ["ok"]
    assert counts == {"sources.scenes_a": 50, "unlabelled.scenes_b": 50, "validation.val_a": 50, "validation.val_b": 50}
    assert {name for group in built.values() for name in group} == {"scenes_a", "scenes_b", "val_a", "val_b"}


def test_stored_labels_that_are_missing_are_found(tmp_path: Path) -> None:
    packed = Packed(
        source=Scenes(name="s", style="b", num_scenes=4, scene_seed=5, size=64, labelled=False),
        root=str(tmp_path),
        samples_per_shard=4,
        short_side=None,
    )
    packed.prepare()
    mine = f"{{_target_:depthany.data.sources.packed.Shards,name:s,root:{packed.folder}}}"
    some = groups("data.unlabelled.scenes_b=null", f"+data.unlabelled.mine={mine}")
    assert check_sources(some, limit=None, labels_of=None)[1]["unlabelled.mine"] == 4
    _, counts, findings = check_sources(some, limit=None, labels_of="teacher-12345678")
    assert "unlabelled.mine" not in counts
    assert "pseudo_label" in findings[0].text and findings[0].level == "FAIL"
    _, counts, findings = check_sources(groups(f"paths.shards={tmp_path / 'none'}"), limit=None, labels_of="any")
    assert findings[0].level == "FAIL"
    assert findings[0].text.startswith("data.unlabelled.scenes_b: not packed yet")


def stepped_task() -> tuple[DepthTask, torch.optim.Optimizer]:
    cfg = compose("train", ["stage=teacher"])
    optim = build(cfg.optim)
    task = build(cfg.task, model=build(cfg.model), loss=WeightedSum(terms=build(cfg.loss)), plan=optim)
    optimizer = optim.optimizer(task.model.encoder_parameters(), task.model.head_parameters())
    task.model(torch.randn(1, 3, 56, 56)).sum().backward()
    optimizer.step()
    return task, optimizer


@pytest.mark.parametrize("tried", [512_000_000, 1_000_000])
def test_a_checkpoint_makes_the_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: int) -> None:
    """Whole, or a part of it: the size that is told is that of the whole, and nothing stays behind."""
    monkeypatch.setattr("depthany.runs.preflight.ROUND_TRIP", tried)
    task, optimizer = stepped_task()
    told, size = check_checkpoint(task, optimizer, tmp_path / "runs" / "here", averaged=True)
    assert told.level == "ok" and "the same to the bit" in told.text
    assert list(tmp_path.iterdir()) == []
    weights = {f"model.{key}": value for key, value in task.model.state_dict().items()}
    averaged = {key: value.clone() for key, value in weights.items()}
    checkpoint = {"state_dict": weights, "current_model_state": averaged, "optimizer_states": [optimizer.state_dict()]}
    torch.save(checkpoint, tmp_path / "real.ckpt")
    assert size == pytest.approx((tmp_path / "real.ckpt").stat().st_size, rel=0.02)


def test_a_checkpoint_that_cannot_be_written_or_is_not_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, optimizer = stepped_task()
    (tmp_path / "file").touch()
    told, _ = check_checkpoint(task, optimizer, tmp_path / "file", averaged=False)
    assert told.level == "FAIL" and "a dry run in" in told.text
    equal = torch.equal
    monkeypatch.setattr("torch.equal", lambda a, b: equal(a, b) and a.ndim < 3)
    told, _ = check_checkpoint(task, optimizer, tmp_path, averaged=False)
    assert told.level == "FAIL" and "DIFFERENT" in told.text


def preflight(tmp_path: Path, *overrides: str) -> Preflight:
    cfg = compose(
        "preflight", [f"paths.runs={tmp_path / 'runs'}", "probe_seconds=0.3", "data.num_workers=0", *overrides]
    )
    return Preflight(cfg, tmp_path / "runs" / "run", debug=None)


def faults(checked: Preflight) -> dict[str, str]:
    return {finding.what: finding.text for finding in checked.findings if finding.level == "FAIL"}


def test_a_teachers_preflight(tmp_path: Path) -> None:
    checked = preflight(tmp_path, "stage=teacher", "images=1000")
    assert checked.run() == 0
    told = {row.what: row.value for row in checked.cost(1000)}
    assert told["training: device-hours"] and told["loader needs"] and told["a checkpoint"]
    assert not any(what.startswith("labels") for what in told)
    assert checked.probe.images == 32 and checked.probe.image_bytes
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("recipe", ["v1", "v2"])
@pytest.mark.parametrize("labels", ["offline", "online"])
def test_a_students_preflight(tmp_path: Path, recipe: str, labels: str) -> None:
    """With a teacher in a layout of others."""
    teacher = tmp_path / "depth_anything_v2_vits.pth"
    torch.save(official_state(**SMALL_HEAD), teacher)
    options = [f"recipe={recipe}", f"labels={labels}", "labels.input_size=70", f"task.teacher_ckpt={teacher}"]
    options += ["loss.feature.weight=0"]
    checked = preflight(tmp_path, "stage=student", *options)
    assert checked.run() == 0, checked.findings
    assert str(teacher) in checked.probe.teacher_name
    assert checked.probe.step and checked.probe.loader and checked.probe.checkpoint_bytes
    assert bool(checked.probe.label_bytes) == bool(checked.probe.teacher) == (labels == "offline")
    text = table(checked.cost(62_000_000))
    assert ("labels png16 full, as chosen" in text) == (labels == "offline")
    assert "?" not in text


def test_what_is_missing_is_found_and_the_cost_told_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No data, no teacher, no encoder weights, no GPU: each a line; stand-ins are measured and said to be stand-ins."""
    options = ["model.pretrained=no_such_file.pth", "trainer.accelerator=gpu", "data=real_sample", "images=62000000"]
    checked = preflight(tmp_path, "stage=student", f"paths.real={tmp_path / 'nothing'}", *options)
    assert checked.run() == 1
    told = faults(checked)
    assert {"sources", "teacher", "model"} <= set(told)
    assert "no finished teacher" in told["teacher"] and "stands in" in told["teacher"]
    assert "no_such_file.pth" in told["model"]
    if not torch.cuda.is_available():
        assert "no GPU" in told["device"]
    said = capsys.readouterr().out
    assert "procedural scenes of 56 pixels stand in" in said
    rows = {row.what: row.value for row in checked.cost(62_000_000)}
    assert rows["training: device-hours"] and "image shards" not in rows


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    for wrong in ("images=0", "world=-1", "probe_seconds=0"):
        with pytest.raises(ConfigError, match=f"{wrong}.*positive"):
            preflight(tmp_path, "stage=teacher", wrong)


def test_a_step_that_fails_is_found(tmp_path: Path) -> None:
    """V1 aligns features, and those of these two encoders differ in size: train would stop at its first step."""
    torch.save(official_state(**SMALL_HEAD), tmp_path / "v2.pth")
    checked = preflight(tmp_path, "stage=student", "recipe=v1", f"task.teacher_ckpt={tmp_path / 'v2.pth'}")
    assert checked.run() == 1
    assert "loss.feature.weight=0" in faults(checked)["a step"]


def test_too_large_a_model_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthany.runs.preflight.free_bytes", lambda device: 1_000_000)
    checked = preflight(tmp_path, "stage=teacher", "trainer.accelerator=cpu")
    assert checked.run() == 1
    assert "take a smaller model" in faults(checked)["memory"]
    assert checked.probe.step is None
    rows: dict[str, Any] = {row.what: row.value for row in checked.cost(1000)}
    assert rows["training: device-hours"] is None


def test_workers_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("cannot fork")

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", refuse)
    checked = preflight(tmp_path, "stage=teacher", "data.num_workers=2")
    assert checked.run() == 1
    assert "2 workers by" in faults(checked)["start method"] and "cannot fork" in faults(checked)["start method"]
