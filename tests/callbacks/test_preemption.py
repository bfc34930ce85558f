"""Laws of a run that is told to stop, in one process: what is kept, what is skipped, and how it goes on."""

import csv
import os
import signal
import stat
import time

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from depthany.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint, Stopped, newest_checkpoint
from depthany.callbacks.ema import Ema
from depthany.callbacks.preemption import SIGNALS, Preemption
from depthany.callbacks.record import MetricsCsv

STEPS = 12


@pytest.fixture(autouse=True)
def own_handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    torch.set_num_threads(1)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Net(pl.LightningModule):
    """One weight; its gradient is the batch. Signals itself at the places given."""

    num_samples = STEPS

    def __init__(self, *places: str, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.samples_seen, self.places, self.number = 0, places, number
        self.validated: list[int] = []

    def at(self, place: str) -> None:
        if place in self.places:
            os.kill(os.getpid(), self.number)

    def training_step(self, batch, batch_idx):
        self.samples_seen += 1
        self.at(f"sample {self.samples_seen}")
        self.log("train/loss", float(batch))
        return self.weight * batch

    def validation_step(self, batch, batch_idx):
        self.at(f"validation {self.global_step}, image {batch_idx}")
        self.log("val/a", self.weight.detach() + batch)

    def on_validation_epoch_end(self):
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_save_checkpoint(self, checkpoint):
        self.at(f"saving {self.global_step}")
        checkpoint["samples_seen"] = self.samples_seen

    def on_load_checkpoint(self, checkpoint):
        self.samples_seen = checkpoint["samples_seen"]


class Batches(DataLoader):
    """Of the whole length, from the cursor on, as the data room's."""

    def __init__(self, net: Net) -> None:
        super().__init__([torch.tensor(float(i + 1)) for i in range(STEPS)], batch_size=None)
        self.net = net

    def __len__(self) -> int:
        return STEPS

    def __iter__(self):
        return (torch.tensor(float(i + 1)) for i in range(self.net.samples_seen, STEPS))


def fit(folder, net: Net, *callbacks, max_time=None, accumulate=1, every=100) -> pl.Trainer:
    """From the newest checkpoint, as a run does."""
    checkpoints = StepCheckpoint(every_steps=every, keep=9)
    checkpoints.dirpath = str(folder / "checkpoints")
    newest, damaged = newest_checkpoint(folder / "checkpoints")
    assert damaged == []
    log = MetricsCsv(run_dir=folder)
    if newest:
        log.resume(int(newest.stem.removeprefix("step-")))
    stop = Preemption(max_time=max_time)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        val_check_interval=5 * accumulate,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, checkpoints, stop],
        logger=[log],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    stop.listen()
    images = DataLoader(torch.arange(4.0), batch_size=None)
    trainer.fit(net, Batches(net), images, ckpt_path=newest, weights_only=True)
    stop.finish(main=True)
    return trainer


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def steps(folder) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in (folder / "checkpoints").glob("*.ckpt"))


def stopped(folder, net: Net, *callbacks, **settings) -> str:
    """Runs until it is stopped; what it says."""
    with pytest.raises(Stopped) as stop:
        fit(folder, net, *callbacks, **settings)
    assert stop.value.code == 75
    return stop.value.text


@pytest.fixture
def whole(tmp_path):
    """A run that nothing has stopped."""
    folder = tmp_path / "whole"
    folder.mkdir()
    net = Net()
    fit(folder, net, Ema(decay=0.5))
    assert net.validated == [5, 10]
    return folder, net


# What stops, where it stops, what is validated by the first run and by the one that goes on.
PLACES = [
    ("sample 3", 3, [], [5, 10]),
    ("sample 5", 5, [], [5, 10]),  # the validation of that step is the next run's
    ("validation 5, image 0", 5, [], [5, 10]),
    ("validation 10, image 3", 10, [5], [10]),
    ("saving 10", 10, [5], [10]),
    ("sample 12", 12, [5, 10], []),
]


@pytest.mark.parametrize("number", SIGNALS, ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(("place", "step", "before", "after"), PLACES, ids=[place for place, *_ in PLACES])
def test_a_signal_anywhere_costs_no_step(number, place, step, before, after, whole, tmp_path):
    """The run that goes on ends with the weights and rows of one that was never stopped."""
    net = Net(place, number=number)
    said = stopped(tmp_path, net, Ema(decay=0.5))
    assert f"stopped by {signal.Signals(number).name} at step {step}, {step} of 12 images" in said
    assert "the same command goes on" in said
    assert steps(tmp_path)[-1] == step and net.validated == before

    again = Net()
    fit(tmp_path, again, Ema(decay=0.5))
    folder, uninterrupted = whole
    assert again.validated == after
    assert float(again.weight) == float(uninterrupted.weight)
    assert rows(tmp_path) == rows(folder)


def test_accumulated_batches_are_not_torn_apart(tmp_path):
    assert "at step 2, 8 of 12 images" in stopped(tmp_path, Net("sample 5"), accumulate=4)
    assert steps(tmp_path) == [2]
    again = Net()
    fit(tmp_path, again, accumulate=4)
    whole = Net()
    (tmp_path / "whole").mkdir()
    fit(tmp_path / "whole", whole, accumulate=4)
    assert float(again.weight) == float(whole.weight) and again.samples_seen == 12


def test_more_signals_while_it_saves_change_nothing(tmp_path):
    class Net2(Net):
        def at(self, place):
            super().at(place)
            if place.startswith("saving"):
                for number in (*SIGNALS, *SIGNALS):
                    os.kill(os.getpid(), number)

        def on_exception(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)

    assert "stopped by SIGUSR1 at step 3" in stopped(tmp_path, Net2("sample 3", number=signal.SIGUSR1))
    assert steps(tmp_path) == [3]
    for number in SIGNALS:  # nothing that comes while the process ends can change its exit code
        os.kill(os.getpid(), number)


def test_the_time_is_up(tmp_path):
    said = stopped(tmp_path, Net(), max_time="00:00:00:00")
    assert said.startswith("trainer.max_time is over at step 1, 1 of 12 images")
    said = stopped(tmp_path, Net(), max_time="00:00:00:00")  # each start has the whole time
    assert "at step 2, 2 of 12 images" in said
    net = Net()
    fit(tmp_path, net, max_time="01:00:00:00")
    assert net.samples_seen == 12


@pytest.mark.parametrize("text", ["1h", "12:00:00", "00:12:00", 3600])
def test_a_time_written_in_another_way_is_refused_in_words(text):
    with pytest.raises(ValueError, match=rf"trainer\.max_time={text}: write it as DD:HH:MM:SS"):
        Preemption(max_time=text)


def test_a_signal_before_the_first_step_waits_for_it(tmp_path):
    class Early(Net):
        def setup(self, stage):
            os.kill(os.getpid(), signal.SIGUSR1)

    assert "at step 1," in stopped(tmp_path, Early())
    assert steps(tmp_path) == [1]


def test_after_training_a_signal_ends_the_main_process_at_once_and_no_other(tmp_path, capfd):
    fit(tmp_path, Net())
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert ended.value.code == 75
    assert "stopped by SIGTERM after training; the same command goes on" in capfd.readouterr().out

    other = Preemption(max_time=None)
    other.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    other.finish(main=False)
    os.kill(os.getpid(), signal.SIGTERM)


def test_slurm_requeues_nothing_by_itself(tmp_path, monkeypatch):
    """Lightning's handler would save in the middle of a step and call scontrol."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    alone = {
        "JOB_ID": 1,
        "JOB_NAME": "train",
        "NTASKS": 1,
        "NTASKS_PER_NODE": 1,
        "PROCID": 0,
        "LOCALID": 0,
        "NODEID": 0,
    }
    for name, value in alone.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    stopped(tmp_path, Net("sample 3", number=signal.SIGUSR1))
    assert steps(tmp_path) == [3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin", "checkpoints", "metrics.csv"]
