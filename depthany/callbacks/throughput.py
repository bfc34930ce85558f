"""How fast it goes, and how long the step waits for data."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar


class Throughput(Callback):
    """Logs images_per_s of all processes, and data_wait: the share of time that a step waits for its batch."""

    def __init__(self) -> None:
        self._ended = self._wait = self._total = 0.0
        self._images = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes how long the batch was waited for."""
        now = time.perf_counter()
        if self._ended:
            self._wait += now - self._ended

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs every few steps."""
        now = time.perf_counter()
        if self._ended:
            self._total += now - self._ended
            self._images += len(batch["key"]) * trainer.world_size
        self._ended = now
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it out of the checker's sight
        if trainer.global_step % every == 0 and self._total:
            pl_module.log("images_per_s", self._images / self._total, prog_bar=True)
            pl_module.log("data_wait", self._wait / self._total)
            self._wait = self._total = 0.0
            self._images = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training time."""
        self._ended = 0.0


class LineProgress(ProgressBar):
    """A plain line every few seconds, where there is no terminal to draw a bar in."""

    def __init__(self) -> None:
        super().__init__()
        self._last = self._first = 0.0

    def disable(self) -> None:
        """Lightning turns the bar off on ranks other than 0."""
        self._off = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints step, loss, speed and time left."""
        now = time.monotonic()
        self._first = self._first or now
        task: Any = pl_module  # a DepthTask
        seen, total = task.samples_seen, task.num_samples
        if trainer.global_rank or (now - self._last < 10 and seen < total):
            return
        self._last = now
        metrics = trainer.callback_metrics
        loss = f"loss {float(metrics['train/loss']):.4f}  " if "train/loss" in metrics else ""
        speed = f"{float(metrics['images_per_s']):.0f} images/s" if "images_per_s" in metrics else ""
        print(f"  step {trainer.global_step}  {seen}/{total} images ({seen / total:.0%})  {loss}{speed}", flush=True)


def progress_bar(*, terminal: bool) -> Callback:
    """A rich bar in a terminal, plain lines elsewhere."""
    return RichProgressBar(leave=True) if terminal else LineProgress()
