"""Checkpoints that are whole or absent, named by their step."""

import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target, syncs, then renames; reads plain data only, so no checkpoint can run code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves whole or not at all.

        Raises:
            ValueError: a weight is not finite: the last good checkpoint stays the newest.
        """
        broken = [k for k, v in checkpoint["state_dict"].items() if v.is_floating_point() and not v.isfinite().all()]
        if broken:
            raise ValueError(f"not saved: {len(broken)} tensors are not finite, {broken[0]} among them")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Loads tensors and plain containers only."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes one file."""
        Path(path).unlink(missing_ok=True)


class StepCheckpoint(ModelCheckpoint):
    """Saves every few optimizer steps and keeps the newest.

    Where a step is validated too, it saves after that: a run that is killed in between validates again.

    Args:
        every_steps: optimizer steps between checkpoints.
        keep: how many stay; at least 2, so that a damaged one is not the only one.
    """

    def __init__(self, *, every_steps: int, keep: int) -> None:
        super().__init__(
            filename="step-{step:08d}",
            auto_insert_metric_name=False,
            monitor="step",
            mode="max",
            save_top_k=max(keep, 2),
            every_n_train_steps=every_steps,
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # a damaged file is replaced; "step-9-v1" would never be found
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time; never between the batches of one accumulated step."""
        if trainer.fit_loop._should_accumulate():
            return
        every = trainer.val_check_batch  # None where Lightning goes by the clock
        validates = trainer.enable_validation and every and (trainer.fit_loop.total_batch_idx + 1) % every == 0
        if validates and trainer.global_step % self._every_n_train_steps == 0:
            self._defer_save_until_validation = True  # saved by on_validation_end
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that can be read, and the names of damaged newer ones."""
    damaged: list[str] = []
    found = [(int(m[1]), p) for p in folder.glob("step-*.ckpt") if (m := re.fullmatch(r"step-(\d+)", p.stem))]
    for _, path in sorted(found, reverse=True):
        try:
            if "state_dict" in torch.load(path, map_location="cpu", weights_only=True, mmap=True):
                return path, damaged
        except Exception:  # a torn file raises anything
            pass
        damaged.append(path.name)
    return None, damaged
