"""What a run leaves in its folder: config, facts, metrics, skipped samples; and how later runs find it."""

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from depthany.types import Skip

RECORD = "record.json"
WEIGHTS = "model.safetensors"


def write_text(path: Path, text: str) -> None:
    """Writes beside the target and moves into place."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes beside the target and moves into place."""
    write_text(path, json.dumps(content, indent=1, default=str))


def read_record(run: Path) -> dict[str, Any]:
    """A run's record; empty where there is none that can be read."""
    try:
        return dict(json.loads((run / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def finished_runs(runs: Path, *, stage: str | None) -> list[Path]:
    """Run folders with a finished record (of a stage), the last finished first."""
    found = [(read_record(path.parent), path.parent) for path in runs.glob(f"*/{RECORD}")]
    done = [(r["finished"], p) for r, p in found if r.get("finished") and stage in (None, r.get("stage"))]
    return [path for _, path in sorted(done, reverse=True)]


def facts() -> dict[str, str]:
    """Revision of the code, versions and machine, for the record."""
    package = Path(__file__).resolve().parents[1]
    names = ("torch", "lightning", "timm", "hydra-core", "webdataset", "numpy")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "revision": _git(package, "rev-parse", "HEAD") or "not a checkout",
        "changed files": str(len(_git(package, "status", "--porcelain").splitlines())),
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
        "device": device,
        "command": shlex.join(["python", "-m", "depthany.train", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        call = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return call.stdout.strip() if call.returncode == 0 else ""


class MetricsCsv(Logger):
    """metrics.csv in the run folder: one row for each logged step, kept over a resume.

    Lightning's own CSV logger deletes the rows of the run that it resumes. A disk that is full does not stop training:
    rows are kept in memory and written as soon as they can be.
    """

    def __init__(self, *, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self._rows: dict[int, dict[str, str]] = {}
        self._columns: list[str] = []
        self._last = 0  # byte at which the last row begins
        self._kept = False  # in memory only

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one per run folder."""
        return ""

    def resume(self, step: int) -> None:
        """Takes over the rows of the first `step` steps; they are numbered from 0."""
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [{k: v for k, v in row.items() if k and v} for row in csv.DictReader(file)]
            self._rows = {int(r["step"]): r for r in rows if r.get("step", "").isdigit() and int(r["step"]) < step}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds to a step's row, and to the file at once: what stands before a checkpoint outlives a kill."""
        at = step or 0
        is_next = not self._rows or at > next(reversed(self._rows))
        row = self._rows.setdefault(at, {"step": str(at)})
        row.update({k: f"{float(v):.8g}" for k, v in metrics.items() if k != "epoch"})
        known = set(row) <= set(self._columns) and at == next(reversed(self._rows)) and self.path.exists()
        if self._kept or not known:
            self._write_all()
            return
        try:
            with open(self.path, "r+", newline="", encoding="utf-8") as file:  # Lightning saves after every row
                self._last = file.seek(0, os.SEEK_END) if is_next else file.seek(self._last)
                csv.DictWriter(file, self._columns).writerow(row)
                file.truncate()
        except OSError as error:
            self._keep(error)

    def _keep(self, error: OSError) -> None:
        if not self._kept:
            print(f"{self.path} cannot be written ({error.strerror}): its rows wait in memory", flush=True)
        self._kept = True

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The composed config is in config.yaml."""

    def _write_all(self) -> None:
        """Writes every row, beside the target and moved into place."""
        self._rows = dict(sorted(self._rows.items()))
        self._columns = list(dict.fromkeys(["step", *sorted({k for row in self._rows.values() for k in row})]))
        part = self.path.with_name(".metrics.csv.part")
        try:
            with open(part, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                for row in self._rows.values():
                    self._last = file.tell()
                    writer.writerow(row)
            os.replace(part, self.path)
        except OSError as error:
            self._keep(error)
        else:
            self._kept = False

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes every row; the file is there even where nothing was logged."""
        self._write_all()


class TooManySkips(RuntimeError):
    """More samples could not be used than data.skip_limit allows."""


class SkipLog(Callback):
    """Counts, lists and bounds the samples that could not be used: skipped.csv of the run folder.

    The list goes to disk with each checkpoint: what a killed run had met since then, it meets again.

    Args:
        run_dir: the run folder.
        limit: largest share of the samples seen; above it, and above 10 samples, the run stops.
        packed: what packing left out; listed, but not among the samples seen.
    """

    def __init__(self, *, run_dir: Path, limit: float, packed: Iterable[Skip]) -> None:
        self.path, self.limit = run_dir / "skipped.csv", limit
        self.seen: dict[tuple[str, str], Skip] = {}
        self.counts: Counter[str] = Counter()  # of each source
        self.add(packed)
        self.num_packed = len(self.seen)
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self.add(Skip(*row) for row in list(csv.reader(file))[1:] if len(row) == len(Skip._fields))

    def add(self, skips: Iterable[Skip]) -> None:
        """Lists samples once each."""
        for skip in skips:
            if (skip.source, skip.key) not in self.seen:
                self.seen[skip.source, skip.key] = skip
                self.counts[skip.source] += 1

    def save(self) -> None:
        """Writes the list, beside the target and moved into place; where it cannot, training goes on."""
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([Skip._fields, *self.seen.values()])
        try:
            write_text(self.path, text.getvalue())
        except OSError as error:
            print(f"{self.path} cannot be written ({error.strerror}); the next checkpoint tries again", flush=True)

    def gather(self, trainer: pl.Trainer) -> None:
        """Makes the ranks' lists one, and writes it; every rank has to call it."""
        if trainer.world_size > 1:
            lists: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(lists, list(self.seen.values()))
            for skips in lists:
                self.add(skips)
        if trainer.is_global_zero:
            self.save()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The list goes before the checkpoint."""
        self.gather(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The whole list."""
        self.gather(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes note of a batch's skips.

        Raises:
            TooManySkips: more than the limit is damaged.
        """
        self.add(batch["skipped"])
        for source, count in self.counts.items():
            pl_module.log(f"data/skipped/{source}", float(count), rank_zero_only=True)
        task: Any = pl_module  # a DepthTask
        used, met = task.samples_seen, len(self.seen) - self.num_packed
        if batch["skipped"] and met > max(10, self.limit * used):
            if trainer.is_global_zero:
                self.save()
            last = batch["skipped"][-1]
            raise TooManySkips(
                f"{met} of {used} samples could not be used, more than data.skip_limit={self.limit}; "
                f"see {self.path}; the last was {last.key}: {last.reason}"
            )
