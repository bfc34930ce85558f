"""Any teacher by one word: run folders, checkpoints, the files and folders of others; errors say what was tried."""

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import depthany
from depthany.config.check import ConfigError
from depthany.inference.predictor import Predictor
from depthany.models.weights import load_weights, save_weights, weights_hash
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
def test_a_smoke_run_is_nobodys_teacher_by_chance(run: Path) -> None:
    for debug, stage in (("smoke", "teacher"), (None, None)):  # a smoke student, or somebody who looks at it
        assert find_weights("last", run.parent, stage=stage, debug=debug) == run / "model.safetensors"
    with pytest.raises(ConfigError, match=r"the only finished teacher under \S+ is teacher-\S+, a debug run"):
        find_weights("last", run.parent, stage="teacher")


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


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """An official file of ViT-S under a small head."""
    torch.save(official_state(**SMALL_HEAD), tmp_path / "depth_anything_v2_vits.pth")
    return tmp_path / "depth_anything_v2_vits.pth"


def test_load_model_gives_a_module_for_images_and_photos(official: Path, tmp_path: Path) -> None:
    model = depthany.load_model(official)
    assert isinstance(model, torch.nn.Module) and not model.training
    images = torch.randn(2, 3, 28, 42)
    expected, _ = open_weights(official)
    with torch.inference_mode():
        assert torch.equal(model(images), expected.eval()(images))
        low = depthany.load_model(str(official), device="cpu", precision="bf16")(images)
    assert low.dtype == torch.float32 and low.shape == (2, 28, 42)
    assert 0 < (low - model(images)).abs().mean() < 0.1 * low.mean()
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    maps = [model.predict(image, input_size=56).disparity for image in (photo, tmp_path / "photo.png")]
    assert maps[0].shape == (40, 60) and np.ptp(maps[0]) > 0 and np.array_equal(*maps)
    with pytest.raises(ConfigError, match=r"device 'cuda:77' cannot be used .*: take auto or cpu"):
        depthany.load_model(official, device="cuda:77")


def test_metric_weights_are_for_use_and_teach_nothing(official: Path) -> None:
    metric = official.with_name("depth_anything_v2_metric_hypersim_vits.pth")
    official.rename(metric)
    model = depthany.load_model(metric)
    metres = model(torch.randn(1, 3, 28, 28))
    assert model.space == "metric" and 0 < metres.min() < metres.max() < 20
    for refuse in (
        lambda: open_weights(metric, relative=True),
        lambda: open_model(str(metric), metric.parent, device="cpu", stage="teacher"),
    ):
        with pytest.raises(ConfigError, match=r"metric model \(its maps are metres\).*take the relative model"):
            refuse()


class Evil:
    """What a malicious file holds: loading it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_load_model_executes_nothing(tmp_path: Path) -> None:
    torch.save({"model": official_state(**TINY), "args": Evil(tmp_path / "canary")}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"evil\.pth is not loaded: it holds posix\.mkdir"):
        depthany.load_model(tmp_path / "evil.pth")
    assert not (tmp_path / "canary").exists()


def test_models_of_the_hub_come_from_its_cache(official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V1's own upload says its version in its name alone; the cache keeps it in a folder's name."""
    cached = tmp_path / "hub" / "models--acme--depth_anything_vits14"
    snapshot = cached / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    (cached / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name)
    official.rename(cached / "blobs" / "a")
    (snapshot / "pytorch_model.bin").symlink_to("../../blobs/a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = depthany.load_model("acme/depth_anything_vits14")
    assert isinstance(model, Predictor) and model.model.config()["taps"] == [8, 9, 10, 11]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as a download asks for, over the files of a folder."""

    folder: Path
    fetched: list[str]

    def do_GET(self) -> None:
        place, name, revision = self.path.partition("?")[0], self.path.rpartition("/")[2], "a" * 40
        names = sorted(file.name for file in self.folder.iterdir())
        said: Any = {"id": "acme/small", "sha": revision, "siblings": [{"rfilename": name} for name in names]}
        if "/tree/" in place:
            said = [{"type": "file", "path": name, "size": 1, "oid": "b" * 40} for name in names]
        content = json.dumps(said).encode() if "/api/" in place else (self.folder / name).read_bytes()
        self.send_response(200)
        headers = {"Content-Length": len(content), "Content-Type": "application/json"}
        for key, value in (headers | {"ETag": f'"{name}"', "X-Repo-Commit": revision}).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.fetched += [] if "/api/" in place else [name]
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def test_models_of_the_hub_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of file of those that are there; afterwards without the network."""
    state = hugging_face_state(official_state(**TINY), transformers=4)
    write_config(tmp_path / "there", hugging_face_config(width=48, depth=4, heads=3, taps=(0, 1, 2, 3)))
    save_file(state, tmp_path / "there" / "model.safetensors")
    (tmp_path / "there" / "pytorch_model.bin").write_bytes(b"not wanted")
    handler = type("Handler", (Hub,), {"folder": tmp_path / "there", "fetched": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        first = depthany.load_model("acme/small")
        server.shutdown()
    assert sorted(handler.fetched) == ["config.json", "model.safetensors"]
    again = depthany.load_model("acme/small")
    assert weights_hash(again.model) == weights_hash(first.model) == weights_hash(load_weights(tmp_path / "there")[0])


def test_a_hub_that_does_not_answer_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its own retries take half a minute, and a machine without a network has none to wait for."""
    asked: list[str] = []

    class Busy(Hub):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_HEAD = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        with pytest.raises(ConfigError, match=r"503.*hf download acme/small"):
            find_weights("acme/small", tmp_path, stage=None)
        server.shutdown()
    assert len(asked) == 1 and "acme/small is not in the hub's cache: asking http" in capsys.readouterr().err


def test_importing_depthany_imports_nothing() -> None:
    code = "import sys, depthany; assert not {'torch', 'numpy', 'hydra'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_models'"):
        _ = depthany.load_models  # type: ignore[attr-defined]


def test_what_is_no_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    told = {
        str(tmp_path / "none"): "neither a file nor a folder.*Hugging Face folder",
        "depth-anything/Depth-Anything-V2-Small-hf": "connect once, or .*hf download depth-anything/Depth",
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
