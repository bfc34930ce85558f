"""A run that is told to stop: every rank ends after the same optimizer step, and a checkpoint of that step stays."""

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, Timer

from depthany.callbacks.checkpoint import StepCheckpoint, stop
from depthany.types import GOES_ON, STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP, SIGNALLED = 1, 2


class Preemption(Callback):
    """Stops the run after SIGTERM, SIGUSR1 or a time: exit code 75, no step is lost, no closing validation.

    A signal sets a flag and nothing else. At the end of every optimizer step and validated image the ranks begin to
    compare their flags, on a group of their own, and read what they began one step before: nobody waits, and all read
    the same. Lightning's own handling, which broadcasts inside the handler and at each step, is turned off, and with it
    the requeueing under Slurm.

    Args:
        max_time: of training after which the run stops, as DD:HH:MM:SS; None: no limit.

    Raises:
        ValueError: max_time is written in another way.
    """

    def __init__(self, *, max_time: str | None) -> None:
        try:
            self._seconds = Timer(max_time).time_remaining()
        except Exception as error:  # Lightning's own kind
            raise ValueError(
                f"trainer.max_time={max_time}: write it as DD:HH:MM:SS, 00:12:00:00 for 12 hours"
            ) from error
        self._deadline = float("inf")
        self._signal = ""  # the name of the first that came
        self._fitting, self._main = True, True
        self._group: Any = None
        self._work: Any = None  # the comparison that is under way
        self._flag = torch.zeros((), dtype=torch.int32)
        self._images = 0  # of a validation, on the rank that has the fewest

    def listen(self) -> None:
        """Takes over both signals. They wait until `setup`: ranks that Lightning starts meanwhile inherit that."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._signal = self._signal or signal.Signals(number).name
        if not self._fitting and self._main:  # a run that is scored and reported on has nothing to lose
            self._ignore()
            os.write(1, f"stopped by {self._signal} after training; {GOES_ON}\n".encode())
            raise SystemExit(STOPPED)

    def _ignore(self) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Turns Lightning's handling off, and listens."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")  # on the CPU: a GPU never waits for it
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock starts."""
        if self._seconds is not None:
            self._deadline = time.monotonic() + self._seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the end of a step: saves and stops, if the ranks have agreed to.

        Raises:
            Stopped: so that neither a validation nor another step follows.
        """
        if not trainer.fit_loop._should_accumulate() and (why := self._agreed()):
            for saver in trainer.checkpoint_callbacks:
                if isinstance(saver, StepCheckpoint):
                    saver.save(trainer)
            self._stop(trainer, pl_module, why)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks may have one image more than others: they have to agree as often."""
        images = torch.tensor(sum(trainer.num_val_batches))
        if self._group:
            torch.distributed.all_reduce(images, op=torch.distributed.ReduceOp.MIN, group=self._group)
        self._images = int(images)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """In a validation: stops; the checkpoint of the step was saved before it.

        Raises:
            Stopped: the ranks have agreed to.
        """
        if not trainer.sanity_checking and batch_idx < self._images and (why := self._agreed()):
            self._stop(trainer, pl_module, why)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After the last step, whose checkpoint is there.

        Raises:
            Stopped: a signal came to some rank.
        """
        self._read()
        self._begin()
        if self._read() == SIGNALLED:
            self._stop(trainer, pl_module, SIGNALLED)

    def finish(self, *, main: bool) -> None:
        """Fit is over: from now on a signal ends the main process at once, and others end by themselves."""
        self._fitting, self._main = False, main
        if self._signal:
            self._note(signal.Signals[self._signal], None)

    def _agreed(self) -> int:
        """Why all ranks have to stop now, or 0."""
        if not self._group:
            self._begin()
        if not (why := self._read()):
            self._begin()
        return why

    def _begin(self) -> None:
        mine = SIGNALLED if self._signal else TIME_IS_UP if time.monotonic() >= self._deadline else 0
        self._flag.fill_(mine)
        if self._group:
            largest = torch.distributed.ReduceOp.MAX
            self._work = torch.distributed.all_reduce(self._flag, op=largest, group=self._group, async_op=True)

    def _read(self) -> int:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._flag)

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule, why: int) -> None:
        self._ignore()
        told = f"stopped by {self._signal or 'a signal to another rank'}"
        task: Any = pl_module  # a DepthTask
        text = f"{told if why == SIGNALLED else 'trainer.max_time is over'} at step {trainer.global_step}, "
        text += f"{task.samples_seen} of {task.num_samples} images, with a checkpoint; {GOES_ON}"
        stop(trainer, text, code=STOPPED)
