"""The pseudo-label job on several devices of one machine: a process for each."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch

from depthany.callbacks.checkpoint import DISK_FULL, NO_ROOM
from depthany.callbacks.preemption import GOES_ON, STOPPED
from depthany.config.check import ConfigError
from depthany.data.labels import LabelPlan
from depthany.data.shards import ShardError
from depthany.data.sources.packed import Shards
from depthany.data.storage import StorageError
from depthany.inference.predictor import Predictor
from depthany.runs.find import open_model
from depthany.runs.label_job import Display, LabelJob, heed, label_shards, num_cores, told_to_stop


def label_on(
    devices: Sequence[str],
    predictor: Predictor,
    source: Shards,
    *,
    teacher: str,
    weights: Path,
    plan: LabelPlan,
    redo: bool,
) -> list[str]:
    """As `label_shards`, with a process for each device.

    Args:
        devices: names; on the CPU, as many times cpu as there are to be processes, which share the cores.
        predictor: the teacher on the first device.
        source: the set.
        teacher: its name.
        weights: its file, which each process opens.
        plan: how the labels are made.
        redo: replaces labels that this teacher has made by another plan.
    """
    if len(devices) == 1:
        return label_shards(predictor, source, teacher=teacher, plan=plan, redo=redo)
    job = LabelJob(predictor, source, teacher=teacher, plan=plan, redo=redo)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    threads = max(num_cores() // len(devices), 1)
    workers: dict[Any, Any] = {}
    for device in devices:
        pipe, theirs = context.Pipe(duplex=False)
        given = (theirs, device, threads, weights, source, teacher, plan, redo)
        workers[pipe] = context.Process(target=_work, args=given, daemon=True)
        workers[pipe].start()
        theirs.close()
    alive = dict(workers)
    try:
        with Display(f"labelling {source.name} on {len(devices)} devices", job.num_images) as display:
            while alive:
                heed()
                for ready in wait(list(alive), timeout=0.5):
                    try:
                        message = ready.recv()  # type: ignore[union-attr, call-arg]  # only pipes were given
                    except EOFError:
                        worker = alive.pop(ready)
                        worker.join()
                        if worker.exitcode:
                            print(f"{worker.name} died ({worker.exitcode}); the others do its work", flush=True)
                        continue
                    if isinstance(message, Exception):
                        raise message
                    display(*message)
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()
    if all(worker.exitcode for worker in workers.values()):
        raise ConfigError("every process has died, killed from outside or for memory: the same command goes on")
    return job.finish()


def _work(
    pipe: "Connection[Any, Any]",
    device: str,
    threads: int,
    weights: Path,
    source: Shards,
    teacher: str,
    plan: LabelPlan,
    redo: bool,
) -> None:
    """One process of `label_on`: sends (shard, images, made), and an exception where it ends with one."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        predictor, _, _ = open_model(str(weights), Path(), device=device, stage=None)
        LabelJob(predictor, source, teacher=teacher, plan=plan, redo=redo, threads=threads).make(
            lambda *message: pipe.send(message)
        )
    except Exception as error:
        if not isinstance(error, ConfigError | OSError):
            traceback.print_exc()
        pipe.send(error)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the main thread may be anywhere; a half-written shard has no name yet


def device_names(device: str, devices: int | Literal["auto"]) -> list[str]:
    """The device of each process.

    Args:
        device: auto, cpu, cuda or mps.
        devices: how many processes; auto: one for each GPU, and one elsewhere.

    Raises:
        ConfigError: there are not so many.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    there = {"cuda": torch.cuda.device_count(), "cpu": num_cores()}.get(device, 1)
    number = (there if device == "cuda" else 1) if devices == "auto" else devices
    if not 1 <= number <= there:
        raise ConfigError(f"devices={devices}: this machine has {there} of {device}; give 1 to {there}, or auto")
    return [f"cuda:{i}" for i in range(number)] if device == "cuda" and number > 1 else [device] * number


@contextmanager
def ends_in_a_line() -> Iterator[None]:
    """Tells what ends the job in one line; exit code 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C, 73 for a full disk.

    Raises:
        ConfigError: anything else that the user has to change.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        """The first signal is heeded between batches, where nothing is left half done; a second one at once."""
        told_to_stop.append(number)
        if len(told_to_stop) > 1:
            heed()

    told_to_stop.clear()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    try:
        yield
    except (ShardError, StorageError) as error:
        raise ConfigError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError("the GPU's memory is too small for a batch: lower labels.batch_size") from error
    except OSError as error:
        if error.errno in NO_ROOM:
            _end(DISK_FULL, f"the disk is full ({error.filename or error.strerror}): make room; {GOES_ON}")
        raise ConfigError(
            f"labels cannot be written ({error.strerror or error}: {error.filename}): set labels_root to another folder"
        ) from error
    except KeyboardInterrupt:
        _end(130, f"stopped; {GOES_ON}")
    except SystemExit:
        _end(STOPPED, f"stopped by a signal; {GOES_ON}")


def _end(code: int, line: str) -> NoReturn:
    print(f"depthany: {line}", file=sys.stderr)
    raise SystemExit(code)
