"""Any teacher by one word: run folders, checkpoints, the files and folders of others; errors say what was tried."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from depthany.config.check import ConfigError
from depthany.models.weights import save_weights, weights_hash
from depthany.runs.find import find_weights, open_model, open_weights, run_config
from tests.layouts import SMALL_HEAD, TINY, hugging_face_config, hugging_face_state, official_state, write_config
from tests.processes import Zygote

SMOKE = ["depthany.train", "stage=teacher", "debug=smoke", "data.num_workers=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """A finished teacher of two steps, with two checkpoints."""
    folder = tmp_path_factory.mktemp("find")
    zygote.run(SMOKE, cwd=folder)
    (run,) = (folder / "runs").glob("teacher-*")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


@pytest.mark.slow
def test_a_run_under_way_stands_for_its_newest_checkpoint(run: Path) -> None:
    """Its weights are those that the finished run keeps: the averaged ones, if there are any."""
    kept = load_file(run / "model.safetensors")
    assert find_weights(str(run), run.parent, stage=None) == run / "model.safetensors"
    (run / "model.safetensors").unlink()
    newest = run / "checkpoints" / "step-00000002.ckpt"
    for spec in (run, run / "checkpoints", newest):
        assert find_weights(str(spec), run.parent, stage=None) == newest
    model, said = open_weights(newest)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert said["layout"] == "depthany training checkpoint" and said["stage"] == "teacher"
    assert said["optimizer steps"] == "2"
    predictor, name, path = open_model(str(run), run.parent, device="cpu", stage=None)
    assert name == f"teacher-{weights_hash(kept)[:8]}" and path == newest
    assert predictor.model.config() == model.config()
    stored = torch.load(newest, weights_only=True)
    current = {key.removeprefix("model."): value for key, value in stored.pop("current_model_state").items()}
    assert not all(torch.equal(value, kept[key]) for key, value in current.items())
    stored["state_dict"] = {f"model.{key}": value for key, value in current.items()}  # a run without averaged weights
    torch.save(stored, newest)
    assert weights_hash(open_weights(newest)[0]) == weights_hash(current)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(run: Path) -> None:
    (run / "model.safetensors").unlink()
    newest, older = (run / "checkpoints" / f"step-0000000{step}.ckpt" for step in (2, 1))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert find_weights(str(run), run.parent, stage=None) == older
    older.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"Tried: model\.safetensors.*step-\*\.ckpt.*damaged: step-00000002"):
        find_weights(str(run), run.parent, stage=None)


@pytest.mark.slow
def test_a_checkpoint_far_from_its_run_asks_for_it(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone" / "step-00000002.ckpt"
    alone.parent.mkdir()
    shutil.copy(run / "checkpoints" / alone.name, alone)
    stored = torch.load(alone, weights_only=True)
    stored.pop("facts", None)
    torch.save(stored, alone)
    with pytest.raises(ConfigError, match="run folder"):
        open_weights(alone)
    (run / "config.yaml").write_text("model: [unclosed")
    with pytest.raises(ConfigError, match=r"config\.yaml is no config of a run"):
        open_weights(run / "checkpoints" / alone.name)
    assert run_config(alone) == {}


def test_weights_of_others_are_teachers(tmp_path: Path) -> None:
    """A file or a folder, in whatever precision: one name for the same weights."""
    state = official_state(**SMALL_HEAD)
    torch.save({"model": {f"module.{k}": v.half() for k, v in state.items()}}, tmp_path / "depth_anything_v2_vits.pth")
    folder = tmp_path / "hf"
    write_config(folder, hugging_face_config(width=384, depth=12, heads=6, taps=(2, 5, 8, 11)))
    halves = {k: v.half().float() for k, v in state.items()}
    save_file(hugging_face_state(halves, transformers=4), folder / "model.safetensors")
    names = set()
    for spec in (tmp_path / "depth_anything_v2_vits.pth", folder, folder / "model.safetensors"):
        predictor, name, path = open_model(str(spec), tmp_path, device="cpu", stage="teacher")
        names.add(name)
        assert path.is_file()
        assert {p.dtype for p in predictor.model.parameters()} == {torch.float32}
    model, _ = open_weights(folder / "model.safetensors")
    save_weights(model, tmp_path / "ours.safetensors", metadata={})
    names.add(open_model(str(tmp_path / "ours.safetensors"), tmp_path, device="cpu", stage=None)[1])
    assert len(names) == 1


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    told = {
        str(tmp_path / "none"): "neither a file nor a folder.*Hugging Face folder",
        "depth-anything/Depth-Anything-V2-Small-hf": "hf download depth-anything/Depth-Anything-V2-Small-hf",
        str(tmp_path): "holds no weights. Tried: model.safetensors .*checkpoints.*0 weight files",
        "last": "no finished run under",
    }
    for spec, words in told.items():
        with pytest.raises(ConfigError, match=words) as error:
            find_weights(spec, tmp_path, stage=None)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_the_label_job_takes_a_hugging_face_folder(tmp_path: Path, zygote: Zygote) -> None:
    write_config(tmp_path / "hf", hugging_face_config(width=48, depth=4, heads=3, taps=(0, 1, 2, 3)))
    save_file(hugging_face_state(official_state(**TINY), transformers=4), tmp_path / "hf" / "model.safetensors")
    said = zygote.run(["depthany.pseudo_label", "teacher=hf", "data.limit=24"], cwd=tmp_path)
    _, name, _ = open_model(str(tmp_path / "hf"), tmp_path, device="cpu", stage="teacher")
    assert name.rpartition("-")[2] in said
    assert len(list(tmp_path.rglob(f"*-{name.rpartition('-')[2]}.tar"))) == 1
    said = zygote.run(["depthany.evaluate", "checkpoint=hf", "limit=2", "baselines=false"], cwd=tmp_path)
    assert "val_b" in said
