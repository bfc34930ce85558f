"""How fast it goes, and how long the step waits for data."""

import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

SKIPPED = "data/skipped/"  # as SkipLog logs the count of each set


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
            pl_module.log("images_per_s", self._images / self._total)
            pl_module.log("data_wait", self._wait / self._total)
            self._wait = self._total = 0.0
            self._images = 0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is not training time."""
        self._ended = 0.0

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nor is a checkpoint."""
        self._ended = 0.0


class RunProgress(ProgressBar):
    """A run in a line of words: images seen of the epoch, loss, speed, time left, data wait, skipped samples by set."""

    def __init__(self) -> None:
        super().__init__()
        self._begun, self._seen = 0.0, 0  # when this process began to train, and at which image

    def disable(self) -> None:
        """Ranks other than 0 draw nothing anyway."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time left is estimated from here on."""
        task: Any = pl_module  # a DepthTask
        self._begun, self._seen = time.monotonic(), task.samples_seen

    def view(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """The line. Time left counts this process's validations and checkpoints in."""
        task: Any = pl_module
        seen, total, now = task.samples_seen, task.num_samples, trainer.callback_metrics
        words = [f"step {trainer.global_step}", f"{seen:,}/{total:,} images ({seen / total:.1%})"]
        if "train/loss" in now:
            words.append(f"loss {float(now['train/loss']):.4f}")
        if "images_per_s" in now:
            words.append(f"{float(now['images_per_s']):,.0f} images/s")
        if seen > self._seen:
            seconds = (total - seen) * (time.monotonic() - self._begun) / (seen - self._seen)
            words.append(f"{timedelta(seconds=round(seconds))} left")
        if "data_wait" in now:
            words.append(f"data wait {float(now['data_wait']):.0%}")
        skipped = {name: int(n) for name, n in sorted(now.items()) if name.startswith(SKIPPED)}
        if skipped:
            words.append("skipped " + ", ".join(f"{name.removeprefix(SKIPPED)} {n:,}" for name, n in skipped.items()))
        return "  ".join(words)


class LineProgress(RunProgress):
    """A plain line every few seconds, where there is no terminal to draw a bar in."""

    def __init__(self) -> None:
        super().__init__()
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints after the first step, every few seconds, and after the last."""
        now = time.monotonic()
        if trainer.is_global_zero and (now - self._last >= 10 or trainer.fit_loop.epoch_loop._is_training_done):
            self._last = now
            print(f"  {self.view(trainer, pl_module)}", flush=True)


class BarProgress(RunProgress):
    """A bar of the epoch, drawn again twice a second.

    Args:
        console: where; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        words = TextColumn("{task.description}  {task.fields[view]}", markup=False, table_column=Column(no_wrap=False))
        self._bar = Progress(BarColumn(20), words, console=console, refresh_per_second=2)
        self._last = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the bar."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            task: Any = pl_module
            self._id = self._bar.add_task("training", total=task.num_samples, view="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        now = time.monotonic()
        if trainer.is_global_zero and (now - self._last >= 0.5 or trainer.fit_loop.epoch_loop._is_training_done):
            self._last = now
            task: Any = pl_module
            self._bar.update(self._id, completed=task.samples_seen, view=self.view(trainer, pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says that no image is trained on."""
        if self._bar.live.is_started:
            self._bar.update(self._id, description="validating")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on."""
        if self._bar.live.is_started:
            self._bar.update(self._id, description="training")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the bar where it is."""
        self._bar.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the terminal back."""
        self._bar.stop()


def progress_bar(*, terminal: bool) -> RunProgress:
    """A bar in a terminal, plain lines elsewhere."""
    return BarProgress() if terminal else LineProgress()
