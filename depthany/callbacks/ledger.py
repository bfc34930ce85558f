"""Which images each step of a run has used, and from that the history of its weights over every stop and restart."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback


class Used(NamedTuple):
    """One batch of all ranks in the history of the weights."""

    step: int  # the optimizer step that it went into, from 1
    first: int  # samples of the run that were used up before it
    seen: int  # and after it
    labelled: list[str]  # keys in the order of the epoch
    unlabelled: list[str]
    skipped: list[str]  # damaged: used up without having been seen


class Ledger(Callback):
    """Notes the keys that each step really used: ledger/<attempt>-rank<rank>.jsonl in the run folder.

    A batch's line is there on every rank before its step can be in a checkpoint, so `history` is never short of one. It
    costs some 60 bytes an image, and on a GPU a wait for the device in each step.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._first = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens a file of its own for each start: nothing is written behind what a kill has torn."""
        folder = Path(trainer.default_root_dir) / "ledger"
        folder.mkdir(parents=True, exist_ok=True)
        attempts = [int(path.name.partition("-")[0]) for path in folder.glob("*-rank*.jsonl")]
        attempt = trainer.strategy.broadcast(max(attempts, default=0) + 1)
        self._file = open(folder / f"{attempt:06d}-rank{trainer.global_rank}.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the cursor before the batch."""
        task: Any = pl_module  # a DepthTask
        self._first = task.samples_seen

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes one line, at once."""
        assert self._file is not None
        task: Any = pl_module
        line: dict[str, Any] = {
            "step": trainer.global_step + trainer.fit_loop._should_accumulate(),
            "first": self._first,
            "seen": task.samples_seen,
            "labelled": [],
            "unlabelled": [],
            "skipped": [skip.key for skip in batch["skipped"]],
        }
        for key, pseudo, weight in zip(batch["key"], batch["pseudo"].tolist(), batch["weight"].tolist(), strict=True):
            if weight:
                line["unlabelled" if pseudo else "labelled"].append(key)
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise RuntimeError(
                f"{self._file.name} cannot be written ({error.strerror}), and the history would have a gap: make room, "
                f"or go on without it (callbacks=default)"
            ) from error

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Every rank's lines are on the disk before the checkpoint is."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        trainer.strategy.barrier("ledger")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


def history(run_dir: Path) -> list[Used]:
    """The batches that made the weights, in order: of what was done twice, the last time.

    An attempt that starts at a cursor undoes what earlier ones did beyond it. Of a run that is not finished, the last
    batches may not be in its newest checkpoint.

    Args:
        run_dir: the run folder.

    Raises:
        ValueError: a line is damaged that is not the last of its file.
    """
    attempts: dict[int, dict[int, list[Used]]] = defaultdict(lambda: defaultdict(list))  # attempt, cursor: each rank's
    for path in sorted(run_dir.glob("ledger/*-rank*.jsonl"), key=_attempt_and_rank):
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # the rest was cut off by a kill
        for line in whole.splitlines():
            used = Used(**json.loads(line))
            attempts[_attempt_and_rank(path)[0]][used.first].append(used)
    made: list[Used] = []
    for _, batches in sorted(attempts.items()):
        made = [used for used in made if used.first < min(batches)]
        for _, ranks in sorted(batches.items()):
            columns = [[key for used in ranks for key in getattr(used, part)] for part in Used._fields[3:]]
            made.append(Used(*ranks[0][:3], *columns))
    return made


def _attempt_and_rank(path: Path) -> tuple[int, int]:
    attempt, _, rank = path.stem.partition("-rank")
    return int(attempt), int(rank)
