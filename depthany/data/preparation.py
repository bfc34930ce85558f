"""What packing and indexing share: work cut over processes and rivals, and the sums and lists at the end.

A shard is a pure function of what was planned for it: it can be made at any time, by any of several rival jobs, and is
never touched again once its index is there. What is there but not to be used, such as the second copy of an image, is
marked in the catalog.
"""

import csv
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import cv2
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from depthany.data.claims import STALE_S, Claim, claim, holder
from depthany.data.plan import Item, Plan
from depthany.data.shards import Shard, ShardError, whole_file, write_catalog
from depthany.data.sources.tree import PackError
from depthany.types import NO_ROOM

PLAN, DROPPED = "plan.jsonl", "dropped.csv"
DAMAGE = ("undecodable", "unreadable", "changed")  # kinds of reasons: something is wrong with a file
TICK_S, GRACE_S = 0.5, 10.0
WORTH = {"look": 2, "make": 2, "survey": 200}  # arguments for which it is worth starting processes


class Job(NamedTuple):
    """Shards that one process makes in one go, under one claim."""

    tars: list[Path]  # in the output folder, whether or not they are there
    images: list[int]  # planned for each
    lines: list[int]  # where in the plan each is described
    stream: str | None = None  # the container that they share, where it can only be read from its beginning


class Dropped(NamedTuple):
    """An image that is not used."""

    key: str
    reason: str  # its first word, up to ":", is the kind
    file: str
    stamp: int = -1  # of its files as they were read: their size, or what else changes with them; -1: they could not be
    item: Item = ""  # in the plan
    place: int = -1  # in the tar, for one that is there but not used


class Survey(NamedTuple):
    """What is known of a shard that is there."""

    images: int
    hashes: bytes  # 16 for each image; zeros for one that is not used or not compared
    dropped: list[Dropped]
    bytes: int  # of the tar


@dataclass(frozen=True)
class Summary:
    """What is there after a run, and what the run did."""

    name: str
    out: Path
    images: int  # in use
    shards: int
    bytes: int  # of the tars
    dropped: Mapping[str, int]  # images by kind of reason
    problems: Mapping[str, str]  # files that could not be looked into, with reasons; the next run tries them again
    damaged: Sequence[str]  # the first files that could not be used, each with the reason
    made: int  # images that this run went through, dropped ones left out
    seconds: float


class Stopped(Exception):
    """The main process has gone or wants to, or a rival has taken over."""


class Preparation:
    """What packing and indexing share: work cut over processes and rivals; lists and sums at the end.

    A kind gives `plan` and `write`, and `unused` where it has to. Its tars are its own and lie in the output folder,
    unless it says otherwise with `shard`, `is_mine` and `catalog`.

    Args:
        name: of the set, with which the names of its tars begin.
        out: the folder of the set.
        workers: processes; None: one for each core.
    """

    def __init__(self, *, name: str, out: Path, workers: int | None) -> None:
        self.name, self.out = name, out
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = workers or cores or 1
        self.problems: dict[str, str] = {}
        self.again: dict[str, int] = {}  # items that were planned again, as JSON: the number of the last shard
        self._known: dict[Path, Survey] = {}
        self._stop: Any = None  # closed, or gone with this process, it stops the workers
        self._pool: ProcessPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None, "_bar": None, "_stop": None, "_known": {}}

    # What a kind gives

    def plan(self) -> list[Job]:
        """Finds what is to be prepared; one process at a time."""
        raise NotImplementedError

    def write(self, tar: Path, line: int, mine: Claim) -> int:
        """Makes one shard and says how many images it has.

        Raises:
            ShardError: this one cannot be made.
            Stopped: it must not be made now.
        """
        raise NotImplementedError

    def unused(self, surveys: Mapping[Path, Survey]) -> Iterator[tuple[Path, Dropped]]:
        """What is in the shards but not to be used, beyond what they say themselves."""
        return iter(())

    def shard(self, tar: Path) -> Shard:
        """Opens a shard that is there."""
        return Shard(tar)

    def is_mine(self, tar: Path) -> bool:
        """Whether a tar with an index in the output folder is an image shard of this set, not a teacher's labels."""
        return re.fullmatch(rf"{re.escape(self.name)}-\d{{6,}}", tar.stem) is not None

    def catalog(self, dropped: Mapping[str, Sequence[int]]) -> None:
        """Writes the catalog; `dropped` are the places in each tar that are not used."""
        write_catalog(self.out, name=self.name, dropped=dropped)

    # What a kind uses

    def open_plan(self, terms: Mapping[str, Any]) -> Plan:
        """The plan of this set's own shards; `terms` decide on their bytes.

        Raises:
            PackError: it was made on other terms, or a shard is there that it does not know.
        """
        plan = Plan(self.out / PLAN, terms)
        self.again = plan.again
        for tar in self.tars()[len(plan.shards) :]:
            raise PackError(f"out={self.out} holds {tar.name}, which is not in its {PLAN}: name another folder as out")
        return plan

    def tar(self, number: int) -> Path:
        """Where a shard of the plan goes."""
        return self.out / f"{self.name}-{number:06d}.tar"

    # The run

    def run(self) -> Summary:
        """Prepares what is missing, and says what is there.

        Raises:
            PackError: nothing to prepare, or an output that was made otherwise or cannot be written.
            ShardError: a shard that is there is damaged.
            OSError: the disk is full, or has gone away.
        """
        started = time.monotonic()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            open(self.out / PLAN, "ab").close()
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            raise PackError(f"out={self.out} cannot be written ({error.strerror}): name another folder") from error
        with self._progress() as self._bar, self._processes():
            with self._alone():
                jobs = self.plan()
            made = self._make_all(jobs)
            with self._alone():
                surveys = self.surveys()
                dropped = self._conclude(surveys)
        return Summary(
            name=self.name,
            out=self.out,
            images=sum(survey.images for survey in surveys.values()) - sum(row.place >= 0 for row in dropped),
            shards=len(surveys),
            bytes=sum(survey.bytes for survey in surveys.values()),
            dropped=Counter(row.reason.partition(":")[0] for row in dropped),
            problems=self.problems,
            damaged=list(islice((f"{row.file}: {row.reason}" for row in dropped if row.reason.startswith(DAMAGE)), 3)),
            made=made,
            seconds=time.monotonic() - started,
        )

    @contextmanager
    def _progress(self) -> Iterator[Progress]:
        """A bar that shows when there is something to show: an error is to stay alone on its line."""
        count = TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}")
        bar = Progress(TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
        try:
            yield bar
        finally:
            if bar.live.is_started:
                bar.stop()

    @contextmanager
    def _processes(self) -> Iterator[None]:
        """Worker processes that are started when they are worth it, and end with the block."""
        try:
            yield
        except BrokenProcessPool as error:
            time.sleep(TICK_S)  # a signal to the whole group may have come to the workers first: let it end this too
            fewer = f"say workers=N with N below {self.workers}"
            raise PackError(f"a worker process was killed, perhaps for want of memory: {fewer}") from error
        finally:
            if self._pool:
                self._stop.close()
                self._pool.shutdown(cancel_futures=True)
                self._pool = None

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        ended, self._stop = context.Pipe(duplex=False)  # unlike a lock, no killed process can take it along
        return ProcessPoolExecutor(self.workers, context, _begin, (self, ended))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits until no rival plans or concludes."""
        plan, tries = self.out / PLAN, 0
        while (mine := claim(plan, stale_s=STALE_S)) is None:
            tries += 1
            if tries == 20:
                print(f"waiting for {holder(plan, stale_s=STALE_S)}, which plans or counts the same set")
            time.sleep(TICK_S / 5)
        with mine:
            yield

    def _results(self, method: str, arguments: Sequence[Any]) -> Iterator[tuple[int, Any] | None]:
        """(number of the argument, result) in any order, and None now and then."""
        if self._pool is None and self.workers > 1 and len(arguments) >= WORTH[method]:
            self._pool = self._start()
        if self._pool is None:
            for number, argument in enumerate(arguments):
                yield number, getattr(self, method)(argument)
            return
        queue, pending = iter(enumerate(arguments)), dict[Future[Any], int]()
        while True:
            for number, argument in islice(queue, 3 * self.workers - len(pending)):
                pending[self._pool.submit(_call, method, argument)] = number
            if not pending:
                return
            done, _ = wait(pending, timeout=TICK_S, return_when=FIRST_COMPLETED)
            yield from ((pending.pop(future), future.result()) for future in done)
            yield None

    def all_of(self, method: str, arguments: Sequence[Any], note: str) -> Iterator[tuple[int, Any]]:
        """(number of the argument, result) in any order, with a bar."""
        task = self._bar.add_task(note, total=len(arguments), unit="")
        if len(arguments) >= WORTH[method]:
            self._bar.start()
        for done in self._results(method, arguments):
            if done:
                self._bar.advance(task)
                yield done
        self._bar.remove_task(task)

    def _make_all(self, jobs: Sequence[Job]) -> int:
        made, note = 0, f"packing {self.name}"
        task = self._bar.add_task(note, total=sum(sum(job.images) for job in jobs), unit="images")
        self._bar.start()
        missing = self._missing(jobs)
        while missing:
            busy = []
            for done in self._results("make", missing):
                self._show(task, jobs)
                if done and done[1] is None:
                    busy.append(missing[done[0]])
                elif done:
                    made += done[1][0]
                    self.problems |= done[1][1]
            if missing := self._missing(busy):
                rival = holder(missing[0].tars[0], stale_s=STALE_S)
                self._bar.update(task, description=f"waiting for {rival}" if rival else note)
                time.sleep(TICK_S)
        self._show(task, jobs)
        return made

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        there = self._there()
        return [job for job in jobs if not there.issuperset(tar.stem for tar in job.tars)]

    def _there(self) -> set[str]:
        """Stems of the shards that are made: their indices, which are written last, are there."""
        return {entry.name.removesuffix(".json") for entry in os.scandir(self.out) if entry.name.endswith(".json")}

    def _show(self, task: Any, jobs: Sequence[Job]) -> None:
        there = self._there()
        pairs = ((tar, images) for job in jobs for tar, images in zip(job.tars, job.images, strict=True))
        self._bar.update(task, completed=sum(images for tar, images in pairs if tar.stem in there))

    def make(self, job: Job) -> tuple[int, dict[str, str]] | None:
        """Makes what is missing of a job: images made, and shards that cannot be; None where a rival is at it."""
        mine = claim(job.tars[0], stale_s=STALE_S)
        if mine is None:
            return None
        made, problems = 0, dict[str, str]()
        with mine, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the decoders, about single images
            for tar, line in zip(job.tars, job.lines, strict=True):
                try:
                    made += 0 if tar.with_suffix(".json").exists() else self.write(tar, line, mine)
                except ShardError as error:
                    problems[tar.name] = f"undecodable: {error}"
                except Stopped:
                    return None
        return made, problems

    def go_on(self, mine: Claim | None = None) -> None:
        """Asked between images, and with the claim before a shard takes its name.

        Raises:
            Stopped: the main process is gone or wants to stop, or a rival has taken over.
        """
        if _stopped.is_set() or (mine is not None and not mine.still_mine()):
            raise Stopped

    # The end

    def tars(self) -> list[Path]:
        """The shards that are there, in order."""
        return sorted(tar for tar in (self.out / f"{stem}.tar" for stem in self._there()) if self.is_mine(tar))

    def surveys(self) -> dict[Path, Survey]:
        """What is known of the shards that are there, in their order."""
        tars = self.tars()
        new = [tar for tar in tars if tar not in self._known]
        self._known |= {new[number]: survey for number, survey in self.all_of("survey", new, "counting")}
        return {tar: self._known[tar] for tar in tars}

    def survey(self, tar: Path) -> Survey:
        """What is known of a shard that is there."""
        shard = self.shard(tar)
        origins = shard.facts.get("origins") or [(tar.name, -1, "")] * len(shard.facts["skipped"])
        dropped = [Dropped(*skip, *origin) for skip, origin in zip(shard.facts["skipped"], origins, strict=True)]
        unused = shard.facts["unused"]
        dropped += [Dropped(shard.keys[place], reason, tar.name, place=place) for place, reason in unused]
        hashes = b"".join(bytes.fromhex(row.get("hash", "00" * 16)) for row in shard.rows)
        return Survey(len(shard), hashes, dropped, shard.bytes)

    def latest(self, surveys: Mapping[Path, Survey]) -> list[tuple[Path, Dropped]]:
        """What was dropped, but for what was tried again in a later shard."""
        return [
            (tar, row)
            for tar, survey in surveys.items()
            for row in survey.dropped
            if not self.again or self.again.get(json.dumps(row.item), -1) <= int(tar.stem.rpartition("-")[2])
        ]

    def _conclude(self, surveys: Mapping[Path, Survey]) -> list[Dropped]:
        """Writes the catalog and the list of what is dropped."""
        dropped = [*self.latest(surveys), *self.unused(surveys)]
        places: dict[str, list[int]] = {}
        for tar, row in dropped:
            if row.place >= 0:
                places.setdefault(tar.name, []).append(row.place)
        self.catalog(places)
        with whole_file(self.out / DROPPED) as part, _text(part) as file:
            table = csv.writer(file)
            table.writerow(["key", "file", "reason"])
            table.writerows((row.key, row.file, row.reason) for _, row in dropped)
            table.writerows(("", file, reason) for file, reason in self.problems.items())
        return [row for _, row in dropped]


def _text(path: Path) -> TextIO:
    return open(path, "w", encoding="utf-8", errors="backslashreplace", newline="")


# --- worker processes -------------------------------------------------------------------------------------------------

_preparation: Preparation
_stopped = threading.Event()


def _begin(preparation: Preparation, ended: Connection) -> None:
    global _preparation
    _preparation = preparation
    cv2.setNumThreads(1)
    for number in (signal.SIGINT, signal.SIGUSR1):  # the main process decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(ended,), daemon=True).start()


def _watch(ended: Connection) -> None:
    """Stops this process when the main one wants it, and ends it with that one; files are whole at any moment."""
    ended.poll(None)
    _stopped.set()
    parent = multiprocessing.parent_process()
    if parent is None or parent.is_alive():
        time.sleep(GRACE_S)  # to come to an end
    os._exit(1)


def _call(method: str, argument: Any) -> Any:
    return getattr(_preparation, method)(argument)
