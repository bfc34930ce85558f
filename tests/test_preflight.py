"""The verb: its exit codes, that it names the run that it is for, and that it leaves nothing behind."""

from pathlib import Path

import pytest
import torch

from depthany.config.build import build
from depthany.config.check import ConfigError, check
from depthany.config.launch import compose, help_text
from depthany.data.shards import Shard
from depthany.models.weights import save_weights
from depthany.runs.preflight import Preflight
from tests.processes import Zygote


def test_its_options_are_documented_and_checked() -> None:
    shown = help_text("preflight", "x", ["stage=student"])
    for option in ("images=null", "world=null", "probe_seconds=20", "optim.batch_size=8"):
        (line,) = (line for line in shown.splitlines() if line.strip().startswith(option))
        assert len(line.split()) > 3, line
    with pytest.raises(ConfigError, match="images must be a whole number or null, not 'many'"):
        check(compose("preflight", ["stage=student", "images=many"]))
    with pytest.raises(ConfigError, match="say which stage"):
        check(compose("preflight", []))


@pytest.mark.slow
def test_the_verb_leaves_a_word_and_nothing_else(tmp_path: Path, zygote: Zygote) -> None:
    """Exit code 1 without a teacher, 0 with one, 2 for an option that cannot be used."""
    ask = [
        "depthany.preflight",
        "stage=student",
        "probe_seconds=0.3",
        "world=4",
        "images=62000000",
        "optim.batch_size=16",
    ]
    without = zygote.start(ask, cwd=tmp_path)
    wrong = zygote.start([*ask, "images=x"], cwd=tmp_path)
    assert (without.wait(60), wrong.wait(60)) == ([1], [2]), without.output() + wrong.output()
    assert "FAIL  teacher" in without.output() and "1 would stop the run" in without.output()
    with torch.random.fork_rng():
        save_weights(build(compose("train", ["stage=teacher"]).model), tmp_path / "t.safetensors", metadata={})
    before = sorted(tmp_path.rglob("*"))
    said = zygote.run([*ask, "task.teacher_ckpt=t.safetensors"], cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before and all(path.is_dir() for path in before if path.suffix == "")
    assert "run folder    runs/student-optim.batch_size-16-task.teacher_ckpt-t.safetensors-seed0, new" in said
    assert "ok    world, batch  16 images over 4 device(s): 4 each, no padding" in said
    assert "62,000,000 images, 1 epoch(s), 4 device(s)" in said and "on 4 device(s)" in said


@pytest.mark.slow
def test_the_labels_have_the_sizes_that_were_told(tmp_path: Path, zygote: Zygote) -> None:
    """Within 2 %, end of the tar and index included."""
    options = ["data.limit=8", "labels.input_size=168"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weights(build(compose("train", ["stage=teacher"]).model), tmp_path / "t.safetensors", metadata={})
    runs = f"paths.runs={tmp_path / 'runs'}"
    asked = ["stage=student", f"task.teacher_ckpt={tmp_path / 't.safetensors'}", "probe_seconds=5", runs, *options]
    checked = Preflight(compose("preflight", asked), tmp_path / "runs" / "x", debug=None)
    assert checked.run() == 0
    assert checked.probe.labels == 8
    zygote.run(["depthany.pseudo_label", f"teacher={tmp_path / 't.safetensors'}", runs, *options], cwd=tmp_path)
    (tar,) = tmp_path.rglob("scenes_b-*.teacher-*.tar")
    real = (tar.stat().st_size + tar.with_suffix(".json").stat().st_size) / len(Shard(tar))
    assert checked.probe.label_bytes["png16", "full"] == pytest.approx(real, rel=0.02)
