"""Which weights are meant: a file, a run folder, or the last finished run."""

from pathlib import Path

import torch

from depthany.callbacks.record import WEIGHTS, finished_runs, read_record
from depthany.config.check import ConfigError
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.weights import load_weights, weights_hash


def find_weights(
    spec: str, runs: Path, *, stage: str | None, data: str | None = None, debug: str | None = None
) -> Path:
    """The weights file that `spec` names: a file, a run folder, or last.

    Args:
        spec: a path, or last: the last finished run of the stage, one with the same debug choice before others,
            then one on the same data.
        runs: where run folders are.
        stage: teacher, student, or None for either.
        data: name of the data set to prefer.
        debug: debug choice to prefer, so that a smoke run is no one's teacher by chance.

    Raises:
        ConfigError: there is none; the message says how to get one.
    """
    if spec != "last":
        path = Path(spec)
        path = path / WEIGHTS if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"{spec} is neither a weights file nor a run folder with a finished {WEIGHTS}")
        return path
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


def open_weights(path: Path) -> tuple[DepthModel, dict[str, str]]:
    """The model of a weights file, and the file's metadata.

    Raises:
        ConfigError: it is no weights file of ours.
    """
    try:
        return load_weights(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def open_model(spec: str, runs: Path, *, device: str, stage: str | None) -> tuple[Predictor, str, Path]:
    """A predictor, its name (stage and hash of the weights) and its file."""
    path = find_weights(spec, runs, stage=stage)
    model, metadata = open_weights(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"{metadata.get('stage', 'model')}-{weights_hash(model)[:8]}"
    return Predictor(model=model, device=device, precision="fp32"), name, path
