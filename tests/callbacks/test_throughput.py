"""Laws of the view of a run: every number is there, true, and drawn on one process only."""

import re
import time
from io import StringIO

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from depthany.callbacks.record import SkipLog
from depthany.callbacks.throughput import BarProgress, LineProgress, RunProgress, Throughput, progress_bar
from depthany.types import Skip

FACTS = [r"step 6", r"24/24 images \(100\.0%\)", r"loss 0\.5000", r"\d+ images/s", r"0:00:00 left", r"data wait \d+%"]
FACTS += [r"skipped lsun 2, sa1b 1"]


class Net(pl.LightningModule):
    """Steps of four images and a fixed loss."""

    num_samples = 24

    def __init__(self, work_s: float) -> None:
        super().__init__()
        self.work_s = work_s
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.samples_seen = 0

    def training_step(self, batch, batch_idx):
        time.sleep(self.work_s)
        self.samples_seen += 4
        self.log("train/loss", 0.5)
        return self.weight

    def validation_step(self, batch, batch_idx):
        time.sleep(0.01)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Slow(DataLoader):
    """Six batches, each a while in coming; three samples are damaged."""

    def __init__(self, wait_s: float = 0.01) -> None:
        super().__init__(range(6), batch_size=None)
        self.wait_s = wait_s

    def __iter__(self):
        for i in range(6):
            time.sleep(self.wait_s)
            skips = {1: [Skip("lsun", "a", "torn")], 2: [Skip("lsun", "b", "torn"), Skip("sa1b", "c", "torn")]}
            yield {"key": list("wxyz"), "skipped": skips.get(i, [])}


def fit(tmp_path, progress: RunProgress, *callbacks, wait_s: float = 0.01, work_s: float = 0.0) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        callbacks=[Throughput(), SkipLog(run_dir=tmp_path, limit=1.0, packed=[]), progress, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    trainer.fit(Net(work_s), Slow(wait_s), DataLoader([0] * 2, batch_size=None))
    return trainer


def test_a_line_says_everything_and_lines_are_few(tmp_path, capsys):
    fit(tmp_path, LineProgress())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("  step 1  4/24 images (16.7%)")
    for fact in FACTS:
        assert re.search(rf"  {fact}(  |$)", lines[1]), (fact, lines[1])


def test_a_bar_says_the_same_and_gives_the_terminal_back(tmp_path):
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    fit(tmp_path, BarProgress(console))
    last = " ".join(re.sub(r"\x1b\[[\d;]*[A-Zm]", "", screen.getvalue().rpartition("\r")[2]).split()) + " "
    for fact in FACTS:
        assert re.search(f" {fact} ", last), (fact, last)
    assert "\x1b[?25l" in screen.getvalue() and screen.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back

    class Breaks(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            raise RuntimeError("torn")

    screen = StringIO()
    with pytest.raises(RuntimeError, match="torn"):
        fit(tmp_path, BarProgress(Console(file=screen, force_terminal=True, width=80)), Breaks())
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")
    assert "validating" in screen.getvalue()


def test_waiting_for_data_is_told_from_working(tmp_path):
    """Nor is a validation a wait."""
    waits = fit(tmp_path, LineProgress(), wait_s=0.05, work_s=0.01).callback_metrics
    works = fit(tmp_path, LineProgress(), wait_s=0.0, work_s=0.05).callback_metrics
    assert waits["data_wait"] > 0.6 and works["data_wait"] < 0.3
    assert waits["images_per_s"] < 4 / 0.06


def test_a_terminal_gets_the_bar():
    assert isinstance(progress_bar(terminal=True), BarProgress)
    assert isinstance(progress_bar(terminal=False), LineProgress)
