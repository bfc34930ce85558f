"""Which weights are meant: a file or folder of any layout, a run folder, or the last finished run."""

import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from depthany.callbacks.checkpoint import newest_checkpoint
from depthany.callbacks.record import WEIGHTS, finished_runs, read_record
from depthany.config.check import ConfigError
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.layouts import weight_file
from depthany.models.weights import load_weights, weights_hash


def find_weights(
    spec: str, runs: Path, *, stage: str | None, data: str | None = None, debug: str | None = None
) -> Path:
    """The weights file that `spec` names: a file, a run folder, a Hugging Face folder, or last.

    Args:
        spec: a path, or last: the last finished run of the stage, one with the same debug choice before others,
            then one on the same data. A run folder without final weights stands for its newest whole checkpoint.
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
            f"no finished {what} under {runs}: run `python -m depthany.train stage={stage or 'teacher'}` first, set "
            f"paths.runs to where it is, or name its weights (task.teacher_ckpt=, teacher= or checkpoint=)"
        )
    like = {
        run: 2 * (record.get("debug") == debug) + (record.get("data") == data)
        for run in found
        if (record := read_record(run))
    }
    return max(like, key=lambda run: like[run]) / WEIGHTS  # the first, which is the last finished, among the most alike


def _file(spec: str) -> Path:
    if Path(spec).is_file():
        return Path(spec)
    hub = ""
    if re.fullmatch(r"[\w-]+/[\w.-]+", spec) and not Path(spec).parent.exists():
        hub = f"; a model of the hub is downloaded first: hf download {spec} --local-dir FOLDER"
    raise ConfigError(
        f"{spec} is neither a file nor a folder: name a run folder, a weights file of any layout (depthany, official, "
        f"Hugging Face), a Hugging Face folder, or last{hub}"
    )


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


def open_weights(path: Path) -> tuple[DepthModel, dict[str, str]]:
    """The model of a weights file of any layout, in float32, and what the file says of itself.

    A training checkpoint gives the weights that a finished run would keep: the averaged ones, where there are any.

    Raises:
        ConfigError: it is no weights file that is known; the message says why.
    """
    run = run_config(path) if path.suffix == ".ckpt" else {}
    model_config = {key: value for key, value in run.get("model", {}).items() if key != "_target_"}
    try:
        model, metadata = load_weights(path, config=model_config or None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "task" in run:
        metadata["stage"] = "student" if run["task"]["_target_"].endswith("StudentTask") else "teacher"
    metadata["precision"] = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    return model.float(), metadata


def open_model(spec: str, runs: Path, *, device: str, stage: str | None) -> tuple[Predictor, str, Path]:
    """A predictor, its name (stage and hash of the weights) and its file."""
    path = find_weights(spec, runs, stage=stage)
    model, metadata = open_weights(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"{metadata.get('stage', 'model')}-{weights_hash(model)[:8]}"
    return Predictor(model=model, device=device, precision="fp32"), name, path
