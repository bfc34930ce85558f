"""The pseudo-label job on several devices of one machine: a process for each."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from depthany.config.check import ConfigError
from depthany.data.labels import LabelPlan
from depthany.data.shards import ShardError
from depthany.data.sources.packed import Shards
from depthany.data.storage import StorageError
from depthany.inference.predictor import Predictor
from depthany.runs.ends import ends_in_a_line
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
def ends() -> Iterator[None]:
    """Tells in a line what ends the job, see `ends_in_a_line`."""

    def stop(number: int, frame: FrameType | None) -> None:
        """The first signal is heeded between batches, where nothing is left half done; a second one at once."""
        told_to_stop.append(number)
        if len(told_to_stop) > 1:
            heed()

    told_to_stop.clear()
    with ends_in_a_line(
        done="labelled",
        fault="labels cannot be written",
        way_out="set labels_root to another folder",
        refused=(ShardError, StorageError),
        stop=stop,
    ):
        yield
