"""What packing and indexing share: work cut over processes and rivals, and the sums and lists at the end.

A shard is a pure function of what was planned for it: it can be made at any time, by any of several rival jobs, and is
never touched again once its index is there. Copies of one image, wherever they lie, are found by their hashes and
marked in the catalog as not in use.
"""

import csv
import errno
import json
import multiprocessing
import os
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
import numpy as np
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from depthany.data.claims import STALE_S, Claim, claim, holder
from depthany.data.files import DecodeError, image_size, read_image
from depthany.data.plan import Item, Plan
from depthany.data.shards import Shard, ShardError, whole_file
from depthany.data.sources.tree import ImageTree, Listing, NothingFitsError, PackError

PLAN, DROPPED = "plan.jsonl", "dropped.csv"
FULL = (errno.ENOSPC, errno.EDQUOT)
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
    bytes: int = -1  # of the file as it was read; -1: it could not be
    item: Item = ""  # in the plan
    place: int = -1  # in the tar, for one that is there but not used


class Survey(NamedTuple):
    """What is known of a shard that is there."""

    images: int
    hashes: bytes  # 16 for each image; zeros for one that is not used
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
    made: int  # images that this run went through, dropped ones left out
    seconds: float


class Stopped(Exception):
    """The main process has gone or wants to, or a rival has taken over."""


class Preparation:
    """What packing and indexing share: work cut over processes and rivals; duplicates, lists and sums at the end.

    Args:
        source: what is to be prepared.
        out: the folder of the set.
        min_side: images with a shorter side are dropped, in pixels.
        workers: processes; None: one for each core.
    """

    def __init__(self, *, source: ImageTree, out: Path, min_side: int, workers: int | None) -> None:
        self.source, self.out, self.min_side = source, out, min_side
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = workers or cores or 1
        self.problems: dict[str, str] = {}
        self.again: dict[str, int] = {}  # items that were planned again, as JSON: the number of the last shard
        self._known: dict[Path, Survey] = {}
        self._stop: Any = None  # closed, or gone with this process, it stops the workers
        self._pool: ProcessPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pool": None, "_bar": None, "_stop": None, "_known": {}}

    # What the two kinds give

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

    def shard(self, tar: Path) -> Shard:
        """Opens a shard that is there."""
        raise NotImplementedError

    def is_mine(self, tar: Path) -> bool:
        """Whether a tar with an index in the output folder is an image shard of this set."""
        raise NotImplementedError

    def catalog(self, dropped: Mapping[str, Sequence[int]]) -> None:
        """Writes the catalog; `dropped` are the places in each tar that are not used."""
        raise NotImplementedError

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
            if error.errno in FULL:
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
            name=self.source.name,
            out=self.out,
            images=sum(survey.images for survey in surveys.values()) - sum(row.place >= 0 for row in dropped),
            shards=len(surveys),
            bytes=sum(survey.bytes for survey in surveys.values()),
            dropped=Counter(row.reason.partition(":")[0] for row in dropped),
            problems=self.problems,
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

    def _all(self, method: str, arguments: Sequence[Any], note: str) -> Iterator[tuple[int, Any]]:
        """(number of the argument, result) in any order, with a bar."""
        task = self._bar.add_task(note, total=len(arguments), unit="")
        if len(arguments) >= WORTH[method]:
            self._bar.start()
        for done in self._results(method, arguments):
            if done:
                self._bar.advance(task)
                yield done
        self._bar.remove_task(task)

    def look(self, path: str) -> Listing:
        """Looks into a container."""
        return self.source.look(path)

    def listings(self, plan: Plan, paths: Sequence[str]) -> dict[str, int]:
        """The images in each of some containers; those that are known and unchanged are not opened."""
        unknown = [path for path in paths if not plan.is_settled(path, self.source.root / path)]
        found = {path: plan.containers[path][2] for path in paths if path not in set(unknown)}
        looked: dict[int, Listing] = {}
        settled = 0
        for number, listing in self._all("look", unknown, "looking into archives"):
            looked[number] = listing
            while settled in looked:  # in the order of the files, whoever is faster
                path, listing = unknown[settled], looked[settled]
                found[path], settled = listing.images, settled + 1
                if listing.problem:
                    self.problems[path] = listing.problem
                else:
                    plan.settle(path, listing)
        return found

    def nothing(self) -> PackError:
        """Says that there is nothing to prepare, and why."""
        source = self.source
        for path, reason in self.problems.items():
            return PackError(f"nothing in root={source.root} can be used yet: {path}: {reason}")
        others = f"there are {', '.join(source.other)}" if source.other else "it holds no image, tar, LMDB or video"
        return NothingFitsError(f"root={source.root} holds nothing like {source.example} ({source.name}); {others}")

    def _make_all(self, jobs: Sequence[Job]) -> int:
        made, note = 0, f"packing {self.source.name}"
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
        self._known |= {new[number]: survey for number, survey in self._all("survey", new, "counting")}
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
        dropped = [*self.latest(surveys), *self._copies(surveys)]
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

    def _copies(self, surveys: Mapping[Path, Survey]) -> Iterator[tuple[Path, Dropped]]:
        """Every image whose bytes have come before, in the order of the shards."""
        hashes = np.frombuffer(b"".join(survey.hashes for survey in surveys.values()), np.uint64).reshape(-1, 2)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first comes first
        ordered, is_copy = hashes[order], np.zeros(len(order), bool)
        is_copy[1:] = (ordered[1:] == ordered[:-1]).all(1) & ordered[1:].any(1)
        originals = order[np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(order))))]
        pairs = dict(zip(order[is_copy].tolist(), originals[is_copy].tolist(), strict=True))
        named = np.unique([*pairs, *pairs.values()]).astype(np.int64)
        keys, start = dict[int, str](), 0
        rows = list[tuple[int, Path, int]]()
        for tar, survey in surveys.items():
            inside = named[np.searchsorted(named, start) : np.searchsorted(named, start + survey.images)].tolist()
            shard = self.shard(tar) if inside else None
            keys |= {number: shard.keys[number - start] for number in inside if shard}
            rows += [(number, tar, number - start) for number in inside if number in pairs]
            start += survey.images
        for number, tar, place in rows:
            yield tar, Dropped(keys[number], f"duplicate: of {keys[pairs[number]]}", tar.name, place=place)


def measured(data: bytes, *, min_side: int) -> tuple[int, int]:
    """(H, W) of an upright image, by its header.

    Raises:
        DecodeError: no image, or too small.
    """
    try:
        height, width = image_size(data)
    except DecodeError as error:
        raise DecodeError(f"undecodable: {error}") from error
    if min(height, width) < min_side:
        raise DecodeError(f"tiny: {width}x{height} pixels")
    return height, width


def decoded(data: bytes, *, reduce_to: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image that decodes whole, as `read_image`; a reduced JPEG shows the same damage.

    Raises:
        DecodeError: it does not.
    """
    try:
        return read_image(data, reduce_to=reduce_to)
    except DecodeError as error:
        raise DecodeError(f"undecodable: {error}") from error


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
