"""Checkpoints that are whole or absent, named by their step."""

import errno
import os
import re
import shutil
import threading
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import Checkpoint

from depthany.types import DISK_FULL, NO_ROOM


class Stopped(SystemExit):
    """Ends a run on every rank after the same step.

    Args:
        text: why, and how to go on.
        code: the exit code.
    """

    def __init__(self, text: str, *, code: int) -> None:
        super().__init__(code)
        self.text = text


def stop(trainer: pl.Trainer, text: str, *, code: int) -> NoReturn:
    """Ends the run on every rank; each has to call it."""
    for thread in threading.enumerate():  # it kills rank 0 where another rank has ended with a code that is not 0
        if isinstance(thread, _ChildProcessObserver):
            thread._run = lambda: True  # type: ignore[method-assign]
    trainer.strategy.barrier()
    raise Stopped(text, code=code)


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, reads it back, then renames; loads plain data only: no checkpoint can run code.

    On a full disk the oldest checkpoint makes room, as long as the newest good one stays.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves whole or not at all.

        Raises:
            ValueError: a weight is not finite: the last good checkpoint stays the newest.
            OSError: it cannot be written, or what was written cannot be read back.
        """
        weights = checkpoint["state_dict"] | checkpoint.get("current_model_state", {})  # averaged and current ones
        broken = [k for k, v in weights.items() if v.is_floating_point() and not v.isfinite().all()]
        if broken:
            raise ValueError(f"not saved: {len(broken)} tensors are not finite, {broken[0]} among them")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(checkpoint, path)
        except OSError as error:
            if error.errno not in NO_ROOM or not _make_room(path.parent):
                raise
            _write(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Loads tensors and plain containers only."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes one file."""
        Path(path).unlink(missing_ok=True)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if fault := damage(part):
            raise OSError(errno.EIO, f"what was written cannot be read back ({fault})", str(path))
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name outlives a power cut too
        finally:
            os.close(folder)
    except Exception as error:
        part.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch.save cannot end its archive then, and says only that
        raise


def _make_room(folder: Path) -> bool:
    """Deletes damaged files and the oldest checkpoint that is not the newest good one; False where there is none."""
    good, _ = newest_checkpoint(folder)
    oldest = [path for _, path in _checkpoints(folder) if path != good][:1]
    given_up = [*folder.glob("step-*.damaged"), *oldest]
    for path in given_up:
        path.unlink(missing_ok=True)
        print(f"disk full: {path} is deleted to make room for a newer checkpoint", flush=True)
    return bool(given_up)


class StepCheckpoint(Checkpoint):
    """Saves every few optimizer steps, before every validation and after the last step; keeps the newest.

    The metrics of the step go to disk before its checkpoint. A checkpoint that stands before a validation says so:
    a run that goes on from it validates first.

    Args:
        every_steps: optimizer steps between checkpoints.
        keep: how many stay; at least 2, so that a damaged one is not the only one.
    """

    def __init__(self, *, every_steps: int, keep: int) -> None:
        self.every_steps, self.keep = every_steps, max(keep, 2)
        self.dirpath = ""  # set by the run
        self._saved = -1  # the step of the newest

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clears away what a kill cut off, and sets aside what is newer than the start: it was found damaged."""
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            for part in Path(self.dirpath).glob(".step-*.part"):
                part.unlink(missing_ok=True)
            for number, path in _checkpoints(Path(self.dirpath)):
                if number > trainer.global_step:
                    path.replace(path.with_suffix(".damaged"))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time; never between the batches of one accumulated step."""
        loop = trainer.fit_loop.epoch_loop
        due = trainer.global_step % self.every_steps == 0 or loop._is_training_done or _validates(trainer)
        if due and not loop._should_accumulate():
            self.save(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Marks a validation that is still to come in the way in which Lightning marks one that was cut off."""
        if _validates(trainer):
            loops = checkpoint["loops"]["fit_loop"]
            for progress in (loops["epoch_loop.batch_progress"][of] for of in ("total", "current")):
                progress["completed"] = progress["processed"]
            images = loops["epoch_loop.val_loop.batch_progress"]
            images["total"] = images["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def save(self, trainer: pl.Trainer) -> None:
        """Saves the step that has just been taken, once; every rank has to call it, at the end of the step.

        Raises:
            Stopped: the disk is full; what was whole still is.
        """
        step, folder = trainer.global_step, Path(self.dirpath)
        if step == self._saved:
            return
        trainer._logger_connector.update_train_step_metrics()  # Lightning says it again, after the checkpoint
        failure: Exception | None = None
        try:
            trainer.save_checkpoint(folder / f"step-{step:08d}.ckpt", weights_only=False)
        except Exception as error:  # on rank 0, which alone writes: the others wait at the barrier that comes after it
            failure = error
            trainer.strategy.barrier()
        text = ""
        if isinstance(failure, OSError) and failure.errno in NO_ROOM:
            newest, _ = newest_checkpoint(folder)
            text = (
                f"disk full: {folder} has {shutil.disk_usage(folder).free / 1e6:.0f} MB free, too little for the "
                f"checkpoint of step {step}. Make room and give the same command again: it goes on from "
                f"{newest.name if newest else 'the start'}, which is whole"
            )
        text, failure = trainer.strategy.broadcast((text, failure))
        if text:
            stop(trainer, text, code=DISK_FULL)
        if failure:
            raise failure
        self._saved = step
        if trainer.is_global_zero:
            for _, path in _checkpoints(folder)[: -self.keep]:
                path.unlink(missing_ok=True)


def _validates(trainer: pl.Trainer) -> bool:
    """Whether the batch that has just been trained on is followed by a validation."""
    every = trainer.val_check_batch  # None where Lightning goes by the clock
    return bool(trainer.enable_validation and every and (trainer.fit_loop.total_batch_idx + 1) % every == 0)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and files, the oldest first."""
    return sorted((int(m[1]), p) for p in folder.glob("step-*.ckpt") if (m := re.fullmatch(r"step-(\d+)", p.stem)))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, in words; None: every byte is as it was written, and it can be loaded.

    The file is a zip archive with a CRC-32 for each tensor, which torch.load does not look at.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                return "it is compressed, as torch never does"
            if record := archive.testzip():
                return f"{record} does not match its checksum"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a torn file raises anything
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if isinstance(content, dict) and "state_dict" in content else "it holds no weights"


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that is whole, and the names of damaged newer ones."""
    damaged: list[str] = []
    for _, path in reversed(_checkpoints(folder)):
        if damage(path) is None:
            return path, damaged
        damaged.append(path.name)
    return None, damaged
