"""Maps of photos and videos, written as they are made.

Legend: H W pixels of a photo, h w pixels of the network input.
"""

import os
import time
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from errno import ENOSPC
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePath
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from depthany.config.check import ConfigError
from depthany.data.files import DecodeError, read_image
from depthany.geometry.resize import lower_bound_size
from depthany.inference.depth_map import DepthMap
from depthany.inference.map_files import in_place
from depthany.inference.memory import require_memory
from depthany.inference.predictor import Predictor
from depthany.inference.rendering import paint, side_by_side
from depthany.inference.tiles import predict_tiled
from depthany.inference.video import Frame, VideoFile, write_stack, write_video
from depthany.runs.find import find_device, find_weights, load_model
from depthany.runs.inputs import (
    FRAMES,
    PICTURE,
    SAVES,
    VIDEO,
    find_inputs,
    is_video,
    name_outputs,
    overwritten,
    spelled,
)

GAP_PX = 50  # white bar between photo and map, as the official run.py
GPU_BATCH = 8
TELL_S = 10.0  # between two lines of progress where there is no terminal for a bar
TILE_OVERLAP = 0.25  # of two neighbours, as a share of their side
RANGE_FRAMES = 32  # of a video, looked at before it is painted
RANGE = (1, 99)  # percentiles of their values: the first and the last colour
RANGE_VALUES = 10_000  # of each of these frames
ENCODERS = {"vits": "vit_small", "vitb": "vit_base", "vitl": "vit_large", "vitg": "vit_giant"}


def open_predictor(
    checkpoint: str | None, encoder: str | None, *, device: str, precision: str, max_pixels: int
) -> tuple[Predictor, str]:
    """The model that `--checkpoint` and `--encoder` name, and what it was called.

    Args:
        checkpoint: as `load_model`; None: the official file of the encoder under checkpoints/, else the last finished
            run.
        encoder: vits, vitb, vitl or vitg; None: any.
        device: as `load_model`.
        precision: fp32 or bf16.
        max_pixels: largest network input.

    Raises:
        ConfigError: there is no such model, or its encoder is another one.
    """
    device = find_device(device)
    official = Path("checkpoints") / f"depth_anything_v2_{encoder}.pth"
    if checkpoint is None and encoder is not None:
        if not official.is_file():
            raise ConfigError(f"--encoder {encoder}: there is no {official}; put the official file there, or give "
                              "--checkpoint")  # fmt: skip
        checkpoint = str(official)
    try:
        name = checkpoint or str(find_weights("last", Path("runs"), stage=None))
        predictor = load_model(name, device=device, precision=precision)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"--checkpoint: {error}") from error
    found = predictor.model.config()["encoder"]
    if encoder is not None and not found.startswith(ENCODERS[encoder]):
        raise ConfigError(f"--encoder {encoder}, but {name} has the encoder {found}: correct one of the two")
    predictor.max_pixels = max_pixels
    return predictor, name


@dataclass(frozen=True, kw_only=True)
class PredictPlan:
    """What is made of each input.

    Args:
        outdir: takes the maps; made where it is missing.
        input_size: short side of the network input in pixels; None: the model's.
        antialias: see `Predictor.network_input`.
        tiles: side in pixels of the tiles that larger photos are cut into, see `predict_tiled`; None: no tiles.
        confidence: also how well the mirrored photo agrees, kept in npz.
        batch_size: photos of one shape, or frames, that the network sees at once; None: 1 on a CPU, else GPU_BATCH.
        pred_only: pictures of the map without the photo.
        grayscale: grey pictures, near is white.
        save: further files of the maps: names of SAVES.
    """

    outdir: Path
    input_size: int | None = None
    antialias: bool = False
    tiles: int | None = None
    confidence: bool = False
    batch_size: int | None = None
    pred_only: bool = False
    grayscale: bool = False
    save: tuple[str, ...] = ()


@dataclass
class _Item:
    """An input on its way."""

    path: Path
    target: Path  # without suffix
    photo: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))
    input: np.ndarray | None = None  # (h, w, 3); None: in tiles
    depth: DepthMap | None = None
    notes: list[str] = field(default_factory=list)
    problem: str | None = None  # why it was skipped


class PredictJob:
    """Predicts many inputs: files are read and written by threads while the network runs.

    Args:
        predictor: the model.
        plan: what is made.
        say: takes a line about an input that is treated specially.
        watch: takes what is being done now, for a progress bar.
    """

    def __init__(
        self,
        predictor: Predictor,
        plan: PredictPlan,
        *,
        say: Callable[[str], None],
        watch: Callable[[str], None] = lambda now: None,
    ) -> None:
        self.predictor, self.plan, self.say, self.watch = predictor, plan, say, watch
        self.batch_size = plan.batch_size or (1 if predictor.device.type == "cpu" else GPU_BATCH)
        self._fits = 0  # pixels of a batch that are known to fit into memory

    def run(self, outputs: dict[Path, PurePath]) -> Iterator[tuple[Path, str | None]]:
        """Each input as it is done, in any order, and why it was skipped (None: it is written).

        Args:
            outputs: for each input its output's name, relative to `outdir` and without suffix.

        Raises:
            OSError: the output cannot be written.
        """
        size, patch = self.plan.input_size or self.predictor.input_size, self.predictor.patch_size
        if size % patch:
            rounded = -(-size // patch) * patch
            self.say(f"--input-size {size} becomes {rounded}, the next multiple of the patch size {patch}")
        items = [_Item(path, self.plan.outdir / name) for path, name in outputs.items()]
        photos = [item for item in items if not is_video(item.path)]
        workers = min(8, os.cpu_count() or 1)
        window = workers + self.batch_size  # inputs and outputs that wait in memory
        with ThreadPoolExecutor(workers) as pool:
            loaded = _ahead(pool, self._load, photos, window)
            for item in _ahead(pool, self._write, self._predicted(loaded), window):
                yield item.path, item.problem
        for item in items:
            if is_video(item.path):
                yield item.path, self._video(item)

    def _load(self, item: _Item) -> _Item:
        if item.path.is_dir():
            item.problem = "a folder without photos or videos"
            return item
        try:
            data = item.path.read_bytes()
            item.photo = read_image(data)
            height, width = item.photo.shape[:2]
            frames = Image.open(BytesIO(data))
            if frames.format != "MPO" and (number := getattr(frames, "n_frames", 1)) > 1:
                item.notes.append(f"{number} frames, the first is taken")
            if self.plan.tiles and max(height, width) > self.plan.tiles:
                return item
            shape, note = self._shape(height, width)
            item.notes += [note] if note else []
            item.input = self.predictor.resized(item.photo, shape, antialias=self.plan.antialias)
        except (DecodeError, OSError, ValueError) as error:
            item.problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return item

    def _shape(self, height: int, width: int) -> tuple[tuple[int, int], str]:
        """(h, w) of the network input, and what is to be said where `max_pixels` made it smaller."""
        shape = self.predictor.input_shape(height, width, input_size=self.plan.input_size)
        if shape == self.predictor.model.input_shape:
            return shape, ""
        size = self.plan.input_size or self.predictor.input_size
        h, w = lower_bound_size(height, width, size=size, multiple=self.predictor.patch_size)
        if shape == (h, w):
            return shape, ""
        tiles = f" (--tiles {size} keeps a photo's detail)" if size < max(height, width) else ""
        return shape, (
            f"{width} x {height} pixels would be a {w} x {h} network input, above --max-pixels "
            f"{self.predictor.max_pixels}; {shape[1]} x {shape[0]} is taken{tiles}"
        )

    def _predicted(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items with their maps: photos of one shape share batches, and few wait for others of their shape."""
        waiting: dict[tuple[int, ...], list[_Item]] = {}
        for item in items:
            for note in item.notes:
                self.say(f"{spelled(item.path)}: {note}")
            if item.problem is None and item.input is not None:
                group = waiting.setdefault(item.input.shape, [])
                group.append(item)
                if len(group) == self.batch_size:
                    yield from self._batch(waiting.pop(item.input.shape))
                elif sum(map(len, waiting.values())) > 4 * self.batch_size:
                    yield from self._batch(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
                continue
            if item.problem is None:
                self._tiled(item)
            yield item
        for group in waiting.values():
            yield from self._batch(group)

    def _batch(self, items: list[_Item]) -> list[_Item]:
        inputs = [item.input for item in items if item.input is not None]
        try:
            self._require(len(inputs), *inputs[0].shape[:2])
            sizes = [item.photo.shape[:2] for item in items]
            for item, depth in zip(
                items, self.predictor.predict_batch(inputs, sizes, confidence=self.plan.confidence), strict=True
            ):
                item.depth = depth
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(items) > 1:  # one at a time, then
                return [done for item in items for done in self._batch([item])]
            items[0].problem = self._too_much(error)
        return items

    def _tiled(self, item: _Item) -> None:
        tile = self.plan.tiles or 0
        try:
            height, width = item.photo.shape[:2]
            for sides in ((height, width), (min(height, tile), min(width, tile))):
                self._require(1, *self.predictor.input_shape(*sides, input_size=self.plan.input_size))
            item.depth = predict_tiled(
                self.predictor,
                item.photo,
                input_size=self.plan.input_size,
                tile=tile,
                overlap=TILE_OVERLAP,
                antialias=self.plan.antialias,
            )
        except (ValueError, torch.OutOfMemoryError) as error:
            item.problem = self._too_much(error)

    def _require(self, batch: int, h: int, w: int) -> None:
        """Refuses a batch that would not fit into memory; one that is larger than all before is estimated."""
        if batch * h * w > self._fits:
            require_memory(self.predictor.model, batch=batch, height=h, width=w, precision=self.predictor.precision)
            self._fits = batch * h * w

    def _too_much(self, error: Exception) -> str:
        told = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
        return f"{told}; lower --input-size or --max-pixels, or cut the photo with --tiles"

    def _write(self, item: _Item) -> _Item:
        if item.depth is None:
            return item
        item.target.parent.mkdir(parents=True, exist_ok=True)
        with in_place(Path(f"{item.target}{PICTURE}")) as draft:
            Image.fromarray(self._picture(item.photo, item.depth)).save(draft)
        space = "disparity" if item.depth.near_is_large else "depth"
        for kind in self.plan.save:
            item.depth.save(Path(f"{item.target}{SAVES[kind].format(space=space)}"))
        item.photo, item.input, item.depth = item.photo[:0], None, None
        return item

    def _picture(
        self, photo: np.ndarray, depth: DepthMap, low: float | None = None, high: float | None = None
    ) -> np.ndarray:
        picture = paint(depth, cmap="gray" if self.plan.grayscale else "Spectral_r", low=low, high=high)
        return picture if self.plan.pred_only else side_by_side([photo, picture], gap=GAP_PX)

    def _video(self, item: _Item) -> str | None:
        """Writes a video of the maps with one range of colours throughout; why it was skipped, or None."""
        try:
            video = VideoFile(item.path)
            every = max(1, video.count // RANGE_FRAMES)
            values: list[np.ndarray] = []
            for name in ("tiles", "confidence"):
                if getattr(self.plan, name):
                    self.say(f"{spelled(item.path)}: --{name} is for photos; its frames are taken without")
            self.watch(f"{item.path.name}: range")
            for frame, depth in self._maps(islice(video.frames(), 0, None, every)):
                if not values and (note := self._shape(*frame.pixels.shape[:2])[1]):
                    self.say(f"{spelled(item.path)}: {note}")
                known = depth.values[depth.valid]
                values.append(known[:: max(1, known.size // RANGE_VALUES)])
            low, high = np.percentile(np.concatenate(values), RANGE) if any(v.size for v in values) else (0.0, 0.0)
            item.target.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as files:
                add = files.enter_context(write_video(Path(f"{item.target}{VIDEO}"), video.rate, sound_of=video))
                if "npz" in self.plan.save:
                    keep = files.enter_context(write_stack(Path(f"{item.target}{SAVES['npz']}"), video.rate))
                for number, (frame, depth) in enumerate(self._maps(video.frames())):
                    self.watch(f"{item.path.name}: {number + 1} of {video.count} frames")
                    picture = self._picture(frame.pixels, depth, float(low), float(high))
                    add(frame._replace(pixels=picture))
                    if "npz" in self.plan.save:
                        keep(depth, frame.time_s)
                    self._save_frame(Path(f"{item.target}{FRAMES}"), number, depth)
        except torch.OutOfMemoryError as error:
            return self._too_much(error)
        except ValueError as error:
            return str(error)
        return None

    def _save_frame(self, folder: Path, number: int, depth: DepthMap) -> None:
        space = "disparity" if depth.near_is_large else "depth"
        for kind in self.plan.save:
            if kind != "npz":
                folder.mkdir(exist_ok=True)
                depth.save(folder / f"{number:06d}{SAVES[kind].format(space=space)}")

    def _maps(self, frames: Iterable[Frame]) -> Iterator[tuple[Frame, DepthMap]]:
        frames = iter(frames)
        while batch := list(islice(frames, self.batch_size)):
            height, width = batch[0].pixels.shape[:2]
            shape, _ = self._shape(height, width)
            inputs = [self.predictor.resized(frame.pixels, shape, antialias=self.plan.antialias) for frame in batch]
            self._require(len(batch), *shape)
            yield from zip(batch, self.predictor.predict_batch(inputs, [(height, width)] * len(batch)), strict=True)


def predict(flags: Namespace) -> int:
    """The verb: predicts what the flags name and reports it; 0 if anything was written, 2 for a bad option, else 1."""
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    written, skipped, failed = 0, [], False
    try:
        outputs = name_outputs(find_inputs(flags.photos, flags.outdir))
        if lost := overwritten(outputs, flags.outdir, flags.save):
            raise ConfigError(f"{lost[0]} would be overwritten by a map; change --outdir")
        with warnings.catch_warnings(record=True) as told:
            predictor, name = open_predictor(
                flags.checkpoint,
                flags.encoder,
                device=flags.device,
                precision=flags.precision,
                max_pixels=flags.max_pixels,
            )
        for warning in told:
            console.print(f"warning: {warning.message}")
        console.print(f"model: {name}")
    except (ValueError, OSError) as error:
        console.print(f"error: {error}")
        return 2
    try:
        tell = time.monotonic() + TELL_S
        plan = PredictPlan(**{option.name: getattr(flags, option.name) for option in fields(PredictPlan)})
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("Predicting", total=len(outputs))
            job = PredictJob(
                predictor, plan, say=console.print, watch=lambda now: progress.update(task, description=now)
            )
            for path, problem in job.run(outputs):
                if problem is None:
                    written += 1
                else:
                    skipped.append(spelled(path.name))
                    console.print(f"skipped {spelled(path)}: {problem}")
                progress.advance(task)
                if not console.is_terminal and time.monotonic() > tell:
                    console.print(f"{written + len(skipped)} of {len(outputs)}")
                    tell = time.monotonic() + TELL_S
    except OSError as error:
        failed = True
        where = error.filename or flags.outdir
        way_out = "make room" if error.errno == ENOSPC else "make it writable"
        console.print(f"error: {where}: {error.strerror or error}; {way_out}, or change --outdir")
    names = f" ({', '.join(skipped)})" if skipped else ""
    print(f"{written} written to {flags.outdir}, {len(skipped)} skipped{names}")
    return 0 if written and not failed else 1


T = TypeVar("T")
R = TypeVar("R")


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], window: int) -> Iterator[R]:
    """`work` of each item, in order, done by threads up to `window` items ahead."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
