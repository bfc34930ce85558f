"""Which weights are meant: a file or folder of any layout, a run folder, a hub's model, or the last finished run."""

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from depthany.callbacks.checkpoint import newest_checkpoint
from depthany.callbacks.record import WEIGHTS, finished_runs, read_record
from depthany.config.check import ConfigError
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.layouts import SUFFIXES, weight_file
from depthany.models.weights import load_weights, weights_hash

HUB_WAITS_S = 5.0  # for the hub's first answer; a machine that cannot reach it is told so at once


def load_model(
    path_or_name: str | Path,
    *,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Predictor:
    """A model for use, from weights of any layout: a module that maps images to disparity, and photos to maps.

    Encoder size, tap layers and head are read off the weights, see `depthany.models.weights.load_weights`. Nothing in a
    file is executed.

    Args:
        path_or_name: a run folder, a weights file of any layout (depthany, official V1 and V2, Hugging Face), a Hugging
            Face folder, the name of a model of the hub (`depth-anything/Depth-Anything-V2-Small-hf`), taken from the
            hub's cache or else fetched, or `last`: the newest finished run under `runs/`.
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.
        precision: of the network's arithmetic; the output is float32 either way.

    Returns:
        A `Predictor`, in evaluation. `model(images)` maps ImageNet-normalised images (B, 3, H, W), sides multiples of
        `patch_size`, to (B, H, W): disparity, or metres where `space` is metric. `model.predict(image)` takes a photo.

    Raises:
        ConfigError: no such weights, none that are known, or no such device; the message tells the way out.
    """
    model, _ = open_weights(find_weights(str(path_or_name), Path("runs"), stage=None))
    return Predictor(model=model, device=find_device(device), precision=precision)


def find_weights(
    spec: str, runs: Path, *, stage: str | None, data: str | None = None, debug: str | None = None
) -> Path:
    """The weights file that `spec` names: a file, a run folder, a Hugging Face folder, a model of the hub, or last.

    Args:
        spec: a path, the name of a model of the hub (from its cache, else fetched), or last: the last finished run of
            the stage, one with the same debug choice before others, then one on the same data. A run folder without
            final weights stands for its newest whole checkpoint.
        runs: where run folders are.
        stage: teacher, student, or None for either.
        data: name of the data set to prefer.
        debug: debug choice to prefer, so that a smoke run is no one's teacher by chance.

    Raises:
        ConfigError: there is none; the message says what was tried and how to get one.
    """
    if spec != "last":
        return _in_folder(Path(spec)) if Path(spec).is_dir() else _file(spec)
    found = [run for run in finished_runs(runs, stage=stage) if (run / WEIGHTS).is_file()]
    if not found:
        what = stage or "run"
        raise ConfigError(
            f"no finished {what} under {runs}: run `python -m depthany.train stage={stage or 'teacher'}` first, "
            f"set paths.runs to where it is, or name its weights (task.teacher_ckpt, teacher, checkpoint, --checkpoint)"
        )
    like = {
        run: 2 * (record.get("debug") == debug) + (record.get("data") == data)
        for run in found
        if (record := read_record(run))
    }
    if stage == "teacher" and debug is None and all(read_record(run).get("debug") for run in found):
        raise ConfigError(
            f"the only finished teacher under {runs} is {found[0].name}, a debug run of a few steps: train one with "
            f"`python -m depthany.train stage=teacher`, or name that one as task.teacher_ckpt or teacher"
        )
    return max(like, key=lambda run: like[run]) / WEIGHTS  # the first, which is the last finished, among the most alike


def _file(spec: str) -> Path:
    if Path(spec).is_file():
        return Path(spec)
    told = ""
    if re.fullmatch(r"[\w-]+/[\w.-]+", spec) and not Path(spec).parent.exists():
        try:
            return _from_hub(spec)
        except Exception as error:  # a network raises anything
            told = f"; as a model of the hub it could not be had ({str(error).splitlines()[0].rstrip('.')}): connect "
            told += f"once, or fetch it elsewhere (hf download {spec} --local-dir FOLDER) and name that folder"
    raise ConfigError(
        f"{spec} is neither a file nor a folder: name a run folder, a weights file of any layout (depthany, official, "
        f"Hugging Face), a Hugging Face folder, or last{told}"
    )


def _from_hub(name: str) -> Path:
    """The weights file of a model of the hub, from the hub's cache where it is there."""
    from huggingface_hub import constants, model_info, snapshot_download

    def get(kind: str, *, cached: bool) -> Path:
        wanted = ["*.json", f"*{kind}"]
        return weight_file(Path(snapshot_download(name, allow_patterns=wanted, local_files_only=cached)))

    for kind in SUFFIXES:
        with suppress(OSError, ValueError):  # not there, or not whole
            if kind in (file := get(kind, cached=True)).name:
                return file
    print(f"{name} is not in the hub's cache: asking {constants.ENDPOINT}", file=sys.stderr, flush=True)
    told = model_info(name, timeout=HUB_WAITS_S)  # one try; other calls of the hub take five, with pauses
    there = [file.rfilename for file in told.siblings or ()]
    return get(next((kind for kind in SUFFIXES if any(file.endswith(kind) for file in there)), ""), cached=False)


def _in_folder(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    newest, damaged = newest_checkpoint(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
    if newest:
        return newest
    try:
        return weight_file(folder)
    except ValueError as error:
        broken = f"; damaged: {', '.join(damaged)}" if damaged else ""
        raise ConfigError(
            f"{folder} holds no weights. Tried: {WEIGHTS} of a finished run, checkpoints/step-*.ckpt of one that is "
            f"under way, the files of a Hugging Face folder ({error}){broken}"
        ) from error


def run_config(path: Path) -> dict[str, Any]:
    """The composed config of the run that a weights file or checkpoint lies in; empty where it lies in none.

    Raises:
        ConfigError: the run's config.yaml cannot be read.
    """
    if path.name != WEIGHTS and path.suffix != ".ckpt":
        return {}
    file = (path.parent.parent if path.suffix == ".ckpt" else path.parent) / "config.yaml"
    try:
        return dict(OmegaConf.to_container(OmegaConf.load(file))) if file.is_file() else {}  # type: ignore[arg-type]
    except (YAMLError, ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{file} is no config of a run: {error}") from error


def open_weights(path: Path, *, relative: bool = False) -> tuple[DepthModel, dict[str, str]]:
    """The model of a weights file of any layout, in float32, and what the file says of itself.

    A training checkpoint gives the weights that a finished run would keep: the averaged ones, where there are any.

    Args:
        path: the file.
        relative: refuse a metric model, for whom the output must be disparity: labels, training, scores.

    Raises:
        ConfigError: it is no weights file that is known; the message says why.
    """
    run = run_config(path) if path.suffix == ".ckpt" else {}
    model_config = {key: value for key, value in run.get("model", {}).items() if key != "_target_"}
    try:
        model, metadata = load_weights(path, config=model_config or None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if relative and model.space == "metric":
        raise ConfigError(
            f"{path} is a metric model (its maps are metres), and labels, training and scores are of disparity: "
            "take the relative model. predict and export take this one"
        )
    if "task" in run:
        metadata["stage"] = "student" if run["task"]["_target_"].endswith("StudentTask") else "teacher"
    metadata["precision"] = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    return model.float(), metadata


def open_model(spec: str, runs: Path, *, device: str, stage: str | None) -> tuple[Predictor, str, Path]:
    """A predictor of disparity, its name (stage and hash of the weights) and its file."""
    path = find_weights(spec, runs, stage=stage)
    model, metadata = open_weights(path, relative=True)
    name = f"{metadata.get('stage', 'model')}-{weights_hash(model)[:8]}"
    return Predictor(model=model, device=find_device(device), precision="fp32"), name, path


def find_device(device: str) -> str:
    """A device of torch; auto: a GPU where there is one.

    Raises:
        ConfigError: this machine or this torch has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        told = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used ({told}): take auto or cpu") from error
    return device
