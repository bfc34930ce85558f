"""What a run leaves in its folder: config, facts, metrics, skipped samples; and how later runs find it."""

import csv
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
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
    except (OSError, ValueError):
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

    Lightning's own CSV logger deletes the rows of the run that it resumes.
    """

    def __init__(self, *, run_dir: Path) -> None:
        super().__init__()
        self.path = run_dir / "metrics.csv"
        self._rows: dict[int, dict[str, str]] = {}
        self._dirty = 0

    @property
    def name(self) -> str:
        """Of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one per run folder."""
        return ""

    def resume(self, step: int) -> None:
        """Takes over the rows up to a step."""
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = {int(row["step"]): {k: v for k, v in row.items() if v} for row in csv.DictReader(file)}
            self._rows = {at: row for at, row in rows.items() if at <= step}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds to a step's row."""
        row = self._rows.setdefault(step or 0, {"step": str(step or 0)})
        row.update({k: f"{float(v):.8g}" for k, v in metrics.items() if k != "epoch"})
        self._dirty += 1
        if self._dirty >= 20:
            self.save()

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The composed config is in config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Writes every row, beside the target and moved into place."""
        names = list(dict.fromkeys(["step", *sorted({k for row in self._rows.values() for k in row})]))
        part = self.path.with_name(".metrics.csv.part")
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._rows[at] for at in sorted(self._rows))
        os.replace(part, self.path)
        self._dirty = 0

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left."""
        self.save()


class SkipLog(Callback):
    """Counts, lists and bounds the samples that could not be used: skipped.csv of the run folder.

    Args:
        run_dir: the run folder.
        limit: largest share of the samples seen; above it, and above 10 samples, the run stops.
    """

    def __init__(self, *, run_dir: Path, limit: float) -> None:
        self.path, self.limit = run_dir / "skipped.csv", limit
        self.seen: dict[tuple[str, str], Skip] = {}
        if self.path.exists():
            with open(self.path, newline="", encoding="utf-8") as file:
                self.add([Skip(*row) for row in list(csv.reader(file))[1:]])

    def add(self, skips: list[Skip]) -> None:
        """Lists samples once each."""
        self.seen |= {(skip.source, skip.key): skip for skip in skips}

    def save(self) -> None:
        """Writes the list."""
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Skip._fields, *self.seen.values()])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes note of a batch's skips.

        Raises:
            RuntimeError: more than the limit is damaged.
        """
        if not batch["skipped"]:
            return
        self.add(batch["skipped"])
        for source, count in Counter(skip.source for skip in self.seen.values()).items():
            pl_module.log(f"data/skipped/{source}", float(count), rank_zero_only=True)
        if trainer.global_rank == 0:
            self.save()
        used = pl_module.samples_seen  # type: ignore[attr-defined]  # DepthTask has it
        if len(self.seen) > max(10, self.limit * used):
            last = batch["skipped"][-1]
            raise RuntimeError(
                f"{len(self.seen)} of {used} samples could not be used, more than data.skip_limit={self.limit}; "
                f"see {self.path}; the last was {last.key}: {last.reason}"
            )
