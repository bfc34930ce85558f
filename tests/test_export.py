"""What a checkpoint is: the verb on run folders, checkpoints, final weights, and the files of others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from depthany.config.check import ConfigError, check
from depthany.config.launch import compose
from depthany.models.weights import weights_hash
from depthany.runs.find import open_weights, run_config
from depthany.runs.info import checkpoint_info, find_card, read_cards, table
from tests.layouts import SMALL_HEAD, hugging_face_config, hugging_face_state, official_state, write_config
from tests.processes import Zygote

SMOKE = ["debug=smoke", "data.num_workers=0", "trainer.limit_val_batches=1", "paths.shards=shards"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Path:
    """A teacher and a student of two steps each."""
    folder = tmp_path_factory.mktemp("export")
    for stage in ("teacher", "student"):
        zygote.run(["depthany.train", f"stage={stage}", "seed=3", *SMOKE], cwd=folder)
    return folder / "runs"


def only(runs: Path, stage: str) -> Path:
    (run,) = runs.glob(f"{stage}-*")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run", "weights", "checkpoint"])
def test_a_students_story(runs: Path, what: str) -> None:
    run = only(runs, "student")
    paths = {"run": run, "weights": run / "model.safetensors", "checkpoint": run / "checkpoints" / "step-00000002.ckpt"}
    info = checkpoint_info(str(paths[what]), runs)
    model, _ = open_weights(run / "model.safetensors")
    teacher, _ = open_weights(only(runs, "teacher") / "model.safetensors")
    assert info["checkpoint"]["weights"] == weights_hash(model)
    assert info["checkpoint"]["layout"] == "depthany" + (" training checkpoint" if what == "checkpoint" else "")
    assert info["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert info["run"]["stage"] == "student" and info["run"]["recipe"] == "v2" and "finished" in info["run"]
    assert info["order"]["seed"] == 3 and info["order"]["window"] == 8
    assert info["progress"]["images seen"].startswith("16") and info["progress"]["optimizer steps"] == "2"
    assert info["teacher"]["hash"] == weights_hash(teacher)[:8] and info["teacher"]["labels"] == "offline"
    sets = {row["part"]: row["set"] for row in info["data"]}
    assert sets == {"unlabelled": "scenes_b", "of the teacher: labelled": "scenes_a"}
    assert "torch" in info["software"]["versions"] and info["software"]["revision"]
    for words in ("stage                   student", "recipe                  v2", weights_hash(model)):
        assert words in table(info)


@pytest.mark.slow
def test_the_verb_prints_what_programs_read(runs: Path, zygote: Zygote) -> None:
    """The newest run is the student, which is last."""
    said: dict[str, Any] = json.loads(zygote.run(["depthany.export", "format=json"], cwd=runs.parent))
    told = checkpoint_info("last", runs)
    assert said.pop("checkpoint") | {"file": ""} == told.pop("checkpoint") | {"file": ""}
    assert said["run"].pop("folder") in told["run"].pop("folder")
    assert said == told
    assert "say where it goes: out=" in zygote.run(["depthany.export", "format=onnx"], cwd=runs.parent, code=2)
    assert "format must be one of" in zygote.run(["depthany.export", "format=tflite"], cwd=runs.parent, code=2)


@pytest.mark.slow
def test_a_checkpoint_with_its_facts_tells_them_far_from_its_run(runs: Path, tmp_path: Path) -> None:
    path = only(runs, "student") / "checkpoints" / "step-00000002.ckpt"
    stored, (model, _), config = torch.load(path, weights_only=True), open_weights(path), run_config(path)
    facts = {"stage": "student", "images": 24, "model": model.config(), "config": config, "revision": "abc"}
    torch.save(stored | {"facts": facts}, tmp_path / "alone.ckpt")
    info = checkpoint_info(str(tmp_path / "alone.ckpt"), runs)
    assert info["progress"] == {"images seen": "16 of 24 (66.7%)", "optimizer steps": "2"}
    assert info["order"]["epoch length"] == 24 and info["order"]["seed"] == 3
    assert info["run"]["stage"] == "student" and info["software"] == {"revision": "abc"}
    assert info["checkpoint"]["weights"] == weights_hash(model)
    assert "folder" not in info["run"]


def test_official_files_and_hugging_face_folders(tmp_path: Path) -> None:
    state = official_state(**SMALL_HEAD)
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "depth_anything_vits14.pth")
    write_config(tmp_path / "hf", hugging_face_config(width=384, depth=12, heads=6, taps=(2, 5, 8, 11)))
    save_file(hugging_face_state(state, transformers=4), tmp_path / "hf" / "model.safetensors")
    first = checkpoint_info(str(tmp_path / "depth_anything_vits14.pth"), tmp_path)
    assert first["checkpoint"]["layout"] == "official V1" and first["checkpoint"]["precision"] == "float16"
    assert "pretrained.mask_token" in first["checkpoint"]["left out, never run"]
    second = checkpoint_info(str(tmp_path / "hf"), tmp_path)
    assert second["checkpoint"]["layout"] == "Hugging Face"
    assert second["model"]["encoder"] == "vit_small_patch14_dinov2 (vits)"
    assert second["model"]["taps"] == [2, 5, 8, 11]
    assert second["data"][0]["licence"] == "Apache-2.0"
    assert "run" not in first and "teacher" not in first and "order" not in first  # nothing is made up
    assert "head widths             8, 8, 8, 8, 8" in table(second)


def test_strange_metadata_does_no_harm(tmp_path: Path) -> None:
    for name, text in {"a": "{", "b": "[1]", "c": '{"config": {"optim": {}}}'}.items():
        path = tmp_path / f"{name}_v2.safetensors"
        save_file(official_state(**SMALL_HEAD), path, metadata={"facts": text, "config": text})
        assert checkpoint_info(str(path), tmp_path)["checkpoint"]["layout"] == "official V2"


def test_cards_are_found_by_name() -> None:
    cards = {"bdd100k": {"licence": "x"}, "sa1b": {"licence": "y"}}
    assert find_card(cards, ["bdd100k_frames"]) == {"licence": "x"}
    assert find_card(cards, ["mine", "SA-1B"]) == {"licence": "y"}
    assert find_card(cards, ["bdd", "mine"]) is None
    for name, card in read_cards().items():
        assert {"name", "title", "licence", "commercial"} <= card.keys(), name


def test_formats_that_are_not_there_are_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"format must be one of info, json, .*, not 'tflite'"):
        check(compose("export", ["format=tflite"]))
    check(compose("export", ["format=json", "checkpoint=x.pth"]))
