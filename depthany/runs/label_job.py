"""The pseudo-label job: a teacher labels image shards; its labels lie beside them as sibling shards.

Any number of processes on any number of machines may label the same set: a claim on each label shard sorts them out,
and a shard is written whole or not at all. What is written is a function of the images, the teacher and the plan: the
batches of a shard follow from its images, and on the CPU each batch is the work of one thread, several side by side
(more threads for one batch would sum in another order). The same bits can be expected from the same kind of device.
"""

import copy
import csv
import heapq
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn

from depthany.config.check import ConfigError
from depthany.data import storage
from depthany.data.claims import STALE_S, Claim, claim, holder
from depthany.data.files import image_size, read_image
from depthany.data.labels import NEAR_CONSTANT, LabelPlan, encode_pseudo, half, judge, residual
from depthany.data.shards import IMAGE_SUFFIXES, Shard, ShardError, read_catalog, whole_file, write_shard
from depthany.data.sources.packed import Shards
from depthany.geometry.resize import lower_bound_size, resize_image
from depthany.inference.predictor import Predictor
from depthany.inference.rendering import colorize
from depthany.models.depth_model import DepthModel
from depthany.models.weights import weights_hash
from depthany.report.label_page import COLUMNS, Survey, write_label_page
from depthany.report.run_page import Panel
from depthany.types import STOPPED

SMALLER = 0.75  # sides of the smaller view, as a share of the network input's
POLL_S = 1.0  # how often shards that others hold are looked at again
LINE_S = 10.0  # between lines of progress where there is no terminal
PICTURED = 8  # worst labels on the page, and as many at random
CATALOG_VERSION = 1
SCORED = ("none", "flip", "flip_scale")  # each says what the one before it says, and more
_T = TypeVar("_T")
_R = TypeVar("_R")
Told = Callable[[int, int, bool], None]  # shard, images, whether they were labelled now (else found)


class View(NamedTuple):
    """An image as the network gets it."""

    key: str
    image: np.ndarray  # (H, W, 3) uint8
    whole: np.ndarray  # (h, w, 3) float32, normalised
    smaller: np.ndarray | None  # the same, where it is asked for


class _Lost(Exception):
    """Another process has taken the claim over."""


told_to_stop: list[int] = []  # signals that came, for `heed`


def heed() -> None:
    """Ends the job where a signal has told it to; called where nothing is left half done.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: after another signal.
    """
    if told_to_stop:
        raise KeyboardInterrupt if told_to_stop[-1] == signal.SIGINT else SystemExit(STOPPED)


class LabelJob:
    """One teacher's labels of one set.

    Args:
        predictor: the teacher.
        source: the set, prepared.
        teacher: its name in the label shards' names; it ends in a hash of the weights.
        plan: how the labels are made.
        redo: replaces labels that this teacher has made by another plan; else they are refused.
        threads: for reading, writing and, on the CPU, the network; None: one for each core.
        stale_s: seconds without a sign of life after which another process's claim is taken over.
    """

    def __init__(
        self,
        predictor: Predictor,
        source: Shards,
        *,
        teacher: str,
        plan: LabelPlan,
        redo: bool = False,
        threads: int | None = None,
        stale_s: float = STALE_S,
    ) -> None:
        if plan.mode != "offline" or plan.precision is None or plan.quality is None:
            raise ConfigError(f"labels={plan.mode} makes no labels to be stored: use labels=offline")
        self.predictor = Predictor(model=predictor.model, device=predictor.device, precision=plan.precision)
        self.teacher, self.plan, self.redo, self.stale_s = teacher, plan, redo, stale_s
        self.threads = threads or num_cores()
        self.size = plan.input_size or predictor.model.input_size
        self.facts: dict[str, Any] = {
            "teacher": teacher,
            "weights": weights_hash(predictor.model),
            "input_size": self.size,
            "resolution": plan.resolution,
            "codec": plan.codec,
            "precision": plan.precision,
            "quality": plan.quality,
        }
        self.source = copy.copy(source)  # labelling has nothing to do with the labels that a run reads
        self.source.teacher = self.source.quality = None
        self.source.open()
        self.catalog = read_catalog(source.root)
        self.folder = self.source.label_file(0, teacher).parent

    @property
    def num_images(self) -> int:
        """Of the shards in use."""
        return int(self.catalog.starts[self.source.num_shards])

    def file(self, ending: str) -> Path:
        """A file that describes the labels of the whole set."""
        return self.folder / f"labels.{self.teacher}.{ending}"

    def is_done(self, shard: int) -> bool:
        """Whether the label shard is whole, made by this plan, and of these very images (a set that grew is not).

        Raises:
            ConfigError: the same teacher has labelled it by another plan, and `redo` is off.
        """
        path = self.source.label_file(shard, self.teacher)
        if not path.with_suffix(".json").exists():
            return False
        try:
            labels = Shard(path)
        except ShardError:
            return False  # half there after a crash of the machine: made again
        if not self._is_mine(labels.facts, path):
            return False
        return bool(labels.facts.get("images") == self._images_hash(shard))

    def _images_hash(self, shard: int) -> str:
        return str(self.catalog.sha256[shard].decode())

    def _is_mine(self, made: Mapping[str, Any], path: Path) -> bool:
        other = [f"{name} {made.get(name)}, now {fact}" for name, fact in self.facts.items() if made.get(name) != fact]
        if other and not self.redo:
            raise ConfigError(
                f"{path} was made otherwise: {'; '.join(other)}. Give the same options again, name another folder "
                f"for the labels (labels_root), or add redo=true to the command of the label job"
            )
        return not other

    def make(self, told: Told) -> None:
        """Labels the shards that nobody has labelled, and waits for those that others are at work on.

        Raises:
            ConfigError: another plan's labels are there, or shards of images cannot be read: the others are labelled.
            OSError: labels cannot be written.
        """
        if self._is_described():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_plan_down()
        self.file("json").unlink(missing_ok=True)  # it lists what will no longer be there
        broken: list[str] = []
        left, waited_s = list(range(self.source.num_shards)), 0.0
        with self._at_work():
            while left:
                busy = []
                for shard in left:
                    heed()
                    try:
                        if not self._settle(shard, told):
                            busy.append(shard)
                    except (ShardError, storage.StorageError) as error:
                        broken.append(str(error))
                if len(busy) == len(left):
                    waited_s += self._pause(busy, waited_s)
                left = busy
        if broken:
            shown = "\n".join(broken[:5])
            raise ConfigError(f"{len(broken)} of {self.source.num_shards} shards cannot be labelled:\n{shown}")

    def _write_plan_down(self) -> None:
        """Rivals with another plan shall stop before they have made anything."""
        note = self.file("plan.json")
        while (mine := claim(note, stale_s=self.stale_s)) is None:
            time.sleep(POLL_S / 10)
            heed()
        with mine:
            try:
                there = json.loads(note.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                there = None
            for shard in range(self.source.num_shards) if there is None else ():
                self.is_done(shard)  # labels from elsewhere tell as well
            if there is None or not self._is_mine(there, note):
                with whole_file(note) as part:
                    part.write_text(json.dumps(self.facts), encoding="utf-8")

    def _pause(self, busy: Sequence[int], waited_s: float) -> float:
        """Waits for others, and says so once if it takes long."""
        pause_s = min(POLL_S, self.stale_s / 2)
        if waited_s < LINE_S <= waited_s + pause_s:
            who = holder(self.source.label_file(busy[0], self.teacher), stale_s=self.stale_s)
            print(f"{len(busy)} shards are others' work, {who or 'somebody'}'s for one: waiting", flush=True)
        time.sleep(pause_s)
        heed()
        return pause_s

    def _settle(self, shard: int, told: Told) -> bool:
        """Whether the shard is labelled now; false where somebody else is at it."""
        path = self.source.label_file(shard, self.teacher)
        if not self.is_done(shard):
            mine = claim(path, stale_s=self.stale_s)
            if mine is None:
                return False
            with mine:
                if not self.is_done(shard):  # nobody has finished it since
                    try:
                        self._write(shard, path, mine, told)
                    except _Lost:
                        return False
                    return True
        told(shard, int(self.catalog.samples[shard]), False)
        return True

    def _write(self, shard: int, path: Path, mine: Claim, told: Told) -> None:
        images = self.source.shard(shard)
        damaged: list[tuple[str, str]] = []

        def samples() -> Iterator[dict[str, Any]]:
            with suppress(ValueError, IndexError):
                _image_bytes(images, 0)  # one thread opens the tar for all
            batches = self._batches(images, damaged)
            told(shard, len(damaged), True)
            for rows in _in_order(self._networks, partial(self._label, images), batches, ahead=2 * self.threads):
                for key, row in rows:
                    if isinstance(row, str):
                        damaged.append((key, row))
                    else:
                        yield {"__key__": key, **row}
                told(shard, len(rows), True)
                heed()
            damaged.sort()
            if not mine.still_mine():
                raise _Lost

        write_shard(path, samples(), facts=self.facts | {"images": images.sha256, "damaged": damaged})

    def _batches(self, images: Shard, damaged: list[tuple[str, str]]) -> list[list[int]]:
        """Images of one network input size together, over the whole shard, known from their headers."""
        multiple = self.predictor.model.patch_size
        groups: dict[tuple[int, int], list[int]] = {}
        for i, found in enumerate(self._hands.map(partial(_size_of, images), range(len(images)))):
            if isinstance(found, str):
                damaged.append((images.keys[i], found))
            else:
                groups.setdefault(lower_bound_size(*found, size=self.size, multiple=multiple), []).append(i)
        step = self.plan.batch_size or 1
        return [rows[first : first + step] for rows in groups.values() for first in range(0, len(rows), step)]

    def _view(self, images: Shard, row: int) -> View | str:
        """What the network gets, or why there is nothing."""
        try:
            image = read_image(_image_bytes(images, row))
            whole = self.predictor.network_input(image, input_size=self.size)
        except ValueError as error:
            return str(error)
        smaller = None
        if self.plan.quality == "flip_scale":
            patch = self.predictor.model.patch_size
            h, w = (max(round(SMALLER * side / patch), 1) * patch for side in whole.shape[:2])
            smaller = resize_image(whole, (h, w), antialias=True)
        return View(images.keys[row], image, whole, smaller)

    def _label(self, images: Shard, rows: Sequence[int]) -> list[tuple[str, dict[str, Any] | str]]:
        """Each key with the members of its label, or with what is wrong."""
        results: dict[int, dict[str, Any] | str] = {}
        groups: dict[tuple[int, ...], dict[int, View]] = {}  # one, but for headers that lie
        for row, view in zip(rows, self._hands.map(partial(self._view, images), rows), strict=True):
            if isinstance(view, str):
                results[row] = view
            else:
                groups.setdefault(view.whole.shape, {})[row] = view
        for group in groups.values():
            answers = self.answers(list(group.values()))
            results |= dict(zip(group, self._hands.map(self._members, answers), strict=True))
        return [(images.keys[row], results[row]) for row in rows]

    def _members(self, answers: Mapping[str, np.ndarray]) -> dict[str, Any] | str:
        label = answers["label"]
        try:
            members: dict[str, Any] = dict(
                encode_pseudo(half(label) if self.plan.resolution == "half" else label, str(self.plan.codec))
            )
        except ValueError as error:
            return str(error)
        if self.plan.quality != "none":
            members["__row__"] = judge(label, {name: other for name, other in answers.items() if name != "label"})
        return members

    def answers(self, views: Sequence[View]) -> list[dict[str, np.ndarray]]:
        """The teacher's maps (h, w) of images of one input size: label, and those of the changed views, turned back."""
        wholes = [view.whole for view in views]
        maps = {"label": self._run(wholes)}
        if self.plan.quality != "none":
            maps["flip"] = self._run([whole[:, ::-1] for whole in wholes])[:, :, ::-1]
        if self.plan.quality == "flip_scale":
            h, w = wholes[0].shape[:2]
            small = self._run([view.smaller for view in views if view.smaller is not None])
            maps["scale"] = np.stack([cv2.resize(one, (w, h), interpolation=cv2.INTER_LINEAR) for one in small])
        return [dict(zip(maps, row, strict=True)) for row in zip(*maps.values(), strict=True)]

    def _run(self, inputs: Sequence[np.ndarray]) -> np.ndarray:
        with self._gate:
            return self.predictor.disparity(inputs).cpu().numpy()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The threads: hands decode and encode single images, networks carry whole batches through the network."""
        on_cpu = self.predictor.device.type == "cpu"
        networks = self.threads if on_cpu else 4  # of these, one computes and one copies while two decode and encode
        self._gate = threading.BoundedSemaphore(networks if on_cpu else 2)
        before = torch.get_num_threads(), cv2.getNumThreads()
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self._hands, self._networks = ThreadPoolExecutor(self.threads), ThreadPoolExecutor(networks)
        try:
            yield
        finally:
            self._networks.shutdown(cancel_futures=True)
            self._hands.shutdown(cancel_futures=True)
            torch.set_num_threads(before[0])
            cv2.setNumThreads(before[1])

    # The set as a whole

    def finish(self) -> list[str]:
        """Writes what describes the labels of the whole set, where it is not there yet; all shards are labelled.

        Beside the labels: `labels.<teacher>.json` (size, hash and images of each label shard; only once no shard of the
        set is without labels), `.damaged.csv`, `.html`, and with quality `.quality.npy`, (N,) float32: the score of
        each image of the set in its order, NaN where there is no label.

        Returns:
            Images that have no label, as "key: reason".
        """
        while not self._is_described():
            mine = claim(self.file("json"), stale_s=self.stale_s)
            if mine is None:
                time.sleep(min(POLL_S, self.stale_s / 2))
                continue
            with mine:
                self._describe()
            break
        with open(self.file("damaged.csv"), newline="", encoding="utf-8") as file:
            return [f"{key}: {reason}" for key, reason in list(csv.reader(file))[1:]]

    def _is_described(self) -> bool:
        """Whether the list of all label shards is there, of this plan and these images, and true."""
        path = self.file("json")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            version, facts = found["version"], found["facts"]
            rows = [(row["tar"], row["bytes"], row["images"]) for row in found["shards"]]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if facts.get("quality") in SCORED[SCORED.index(self.plan.quality) :]:  # more scores than asked for do no harm
            facts["quality"] = self.plan.quality
        if version != CATALOG_VERSION or not self._is_mine(facts, path):
            return False
        try:
            there = [(tar, os.stat(self.folder / tar).st_size) for tar, _, _ in rows]
        except OSError:
            return False
        same = [images for *_, images in rows] == [self._images_hash(shard) for shard in range(len(self.catalog))]
        return same and there == [tuple(row[:2]) for row in rows] and self.file("damaged.csv").exists()

    def _describe(self) -> None:
        """One walk through the indices."""
        survey, rows, counts = Survey(), [], []
        scores = np.full(int(self.catalog.starts[-1]), np.nan, np.float32)
        worst: list[tuple[float, int, str]] = []  # a heap of (score below 0, shard, key): its first is the least bad
        for shard in range(self.source.num_shards):
            images, labels = self.source.shard(shard), Shard(self.source.label_file(shard, self.teacher))
            rows.append(
                {
                    "tar": Path(labels.tar).name,
                    "samples": len(labels),
                    "bytes": labels.bytes,
                    "sha256": labels.sha256,
                    "images": images.sha256,
                }
            )
            counts.append(len(labels))
            survey.num_images += len(images)
            survey.num_labels += len(labels)
            survey.num_bytes += labels.bytes
            survey.damaged += [(key, reason) for key, reason in labels.facts["damaged"]]
            for column in COLUMNS if self.plan.quality != "none" and len(labels) else ():
                if column in labels.rows[0]:
                    survey.add(column, [row[column] for row in labels.rows])
            if self.plan.quality != "none":
                survey.num_flat += sum(row["contrast"] < NEAR_CONSTANT for row in labels.rows)
                for row in labels.rows:
                    scores[self.catalog.starts[shard] + images.at[row["key"]]] = row["quality"]
                    heapq.heappush(worst, (-row["quality"], shard, row["key"]))
                    if len(worst) > PICTURED:
                        heapq.heappop(worst)
        if self.plan.quality != "none":
            with whole_file(self.file("quality.npy")) as part, open(part, "wb") as file:
                np.save(file, scores)
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows([("image", "reason"), *survey.damaged])
        with whole_file(self.file("damaged.csv")) as part:
            part.write_text(text.getvalue(), encoding="utf-8")
        places = np.random.default_rng(0).permutation(survey.num_labels)[:PICTURED]
        shards = np.searchsorted(np.cumsum(counts), places, side="right")
        chosen = [(int(s), int(p - sum(counts[:s]))) for s, p in zip(shards, places, strict=True)]
        with self._at_work():
            write_label_page(
                self.file("html"),
                name=self.source.name,
                survey=survey,
                worst=[self._panel(shard, key) for _, shard, key in sorted(worst, key=lambda w: (-w[0], *w[1:]))],
                chosen=[self._panel(shard, self._label_shard(shard).keys[place]) for shard, place in chosen],
                facts=self.facts,
            )
        if len(rows) == len(self.catalog):
            with whole_file(self.file("json")) as part:
                document = {"version": CATALOG_VERSION, "teacher": self.teacher, "facts": self.facts, "shards": rows}
                part.write_text(json.dumps(document), encoding="utf-8")

    def _label_shard(self, shard: int) -> Shard:
        return Shard(self.source.label_file(shard, self.teacher))

    def _panel(self, shard: int, key: str) -> Panel:
        """The image, its label and the teacher's further answers, with where they differ."""
        images, labels = self.source.shard(shard), self._label_shard(shard)
        row = labels.rows[labels.at[key]]
        said = [f"{'score' if c == 'quality' else c} {row[c]:.3f}" for c in COLUMNS if c in row]
        view = self._view(images, images.at[key])
        assert not isinstance(view, str), view  # it was read a moment ago
        answers = self.answers([view])[0]
        label = answers["label"]
        pictures = [("image", view.image), ("label", colorize(label))]
        if "flip" in answers:
            away = np.abs(residual(label, answers["flip"])[0]) / max(float(np.ptp(label)), 1e-12)
            pictures.append(("mirrored", colorize(answers["flip"])))
            pictures.append(("difference", colorize(away, cmap="inferno", low=0, high=0.5)))
        if "scale" in answers:
            pictures.append(("smaller", colorize(answers["scale"])))
        return Panel(title=": ".join([key, ", ".join(said)] if said else [key]), images=pictures)


class Display:
    """Progress of all processes of this job: a bar in a terminal, a line every few seconds elsewhere."""

    def __init__(self, note: str, total: int) -> None:
        self._total, self._made, self._found = total, 0, 0
        self._seen: set[int] = set()
        self._began = self._said = time.monotonic()
        columns = (TextColumn(note), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Progress(*columns, transient=True)
        self._task = self._bar.add_task(note, total=total, state="")
        self._note = note

    def __enter__(self) -> "Display":
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()
        if self._made and kind is None:
            seconds = time.monotonic() - self._began
            rate = self._made / seconds
            print(f"{self._note}: {self._made:,} images in {seconds:.0f} s, {rate:.1f} images/s", flush=True)

    def __call__(self, shard: int, images: int, made: bool) -> None:
        """Counts images; a shard that is found labelled counts once, whoever finds it."""
        if made:
            self._made += images
        elif shard not in self._seen:
            self._found += images
        self._seen.add(shard)
        self._bar.update(self._task, completed=self._made + self._found, state=self.state())
        now = time.monotonic()
        if made and not self._bar.console.is_terminal and now - self._said >= LINE_S:
            self._said = now
            print(f"  {self._note}: {self.state()}", flush=True)

    def state(self) -> str:
        """How far, how fast, and how long it will still take."""
        done = self._made + self._found
        seconds = time.monotonic() - self._began
        text = f"{done:,}/{self._total:,} images"
        if not self._made:
            return text
        rate = self._made / seconds
        left = timedelta(seconds=round((self._total - done) / rate))
        return f"{text}, {rate:.1f} images/s, {left} left"


def teacher_name(model: DepthModel) -> str:
    """What a teacher's label shards are called by, whatever file its weights come from."""
    return f"teacher-{weights_hash(model)[:8]}"


def label_shards(
    predictor: Predictor,
    source: Shards,
    *,
    teacher: str,
    plan: LabelPlan,
    redo: bool = False,
    stale_s: float = STALE_S,
) -> list[str]:
    """Labels every image of a set that has no label of this teacher yet, in this process.

    Arguments as `LabelJob`.

    Returns:
        Images that have no label because they are damaged, as "key: reason".

    Raises:
        ConfigError: another plan's labels are there, or shards of images cannot be read: the others are labelled.
        OSError: labels cannot be written.
    """
    job = LabelJob(predictor, source, teacher=teacher, plan=plan, redo=redo, stale_s=stale_s)
    with Display(f"labelling {source.name}", job.num_images) as display:
        job.make(display)
    return job.finish()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Small parts


def _size_of(images: Shard, row: int) -> tuple[int, int] | str:
    """(H, W) of an image, from its row in the index or its header, or what is wrong."""
    try:
        known = images.rows[row]
        if "height" in known and "width" in known:
            return int(known["height"]), int(known["width"])
        return image_size(_image_bytes(images, row))
    except ValueError as error:
        return str(error)


def _image_bytes(images: Shard, row: int) -> bytes:
    suffix = next((s for s in IMAGE_SUFFIXES if s in images.files[row]), None)
    if suffix is None:
        raise ValueError(f"no image ({', '.join(IMAGE_SUFFIXES)})")
    return images.read(row, suffix)


def _in_order(pool: Executor, work: Callable[[_T], _R], items: Iterable[_T], *, ahead: int) -> Iterator[_R]:
    """As `map`, at most `ahead` items ahead of what was taken."""
    waiting: deque[Future[_R]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
