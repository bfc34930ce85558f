"""Sky masks of one labelled source: which are missing, made batch by batch, and a page to judge them by."""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from inspect import signature
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from rich.progress import track

from depthany.config.check import ConfigError
from depthany.data.files import DecodeError
from depthany.data.sources.packed import Packable
from depthany.data.sources.raw import SKY_FOLDER, SKY_NOTE, Raw, Row, mask_name, write_beside
from depthany.inference.sky import SkyError, SkySegmenter
from depthany.report.sky_page import SkyPicture, write_sky_page
from depthany.runs.ends import ends_in_a_line
from depthany.runs.label_job import num_cores

LOOKED_AT = 1000  # masks whose share of sky is told
SHOWN = 12
PENDING = 4  # batches of decoded images that wait for others of their size
PAGE = "sky.html"

T = TypeVar("T")


class Masks(NamedTuple):
    """What is there after a run."""

    source: Raw
    out: Path
    made: int  # by this run
    there: int  # of the images asked for
    shares: Sequence[tuple[float, Row]]  # how much is sky, of masks spread over the set
    damaged: Sequence[tuple[str, str]]  # image, reason


def open_segmenter(name: str, device: str) -> SkySegmenter:
    """The model on its device.

    Args:
        name: folder, or id of the hub.
        device: auto, cpu, cuda or mps.

    Raises:
        ConfigError: it cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has none that torch can use; set device=cpu")
    try:
        return SkySegmenter(name=name, device=device)
    except SkyError as error:
        raise ConfigError(str(error)) from error


def make_masks(
    source: Packable,
    segmenter: SkySegmenter,
    *,
    out: Path | None,
    limit: int | None,
    batch_size: int,
    redo: bool,
    command: str,
) -> Masks:
    """Makes the masks that are missing, and the page; ends in a line after a signal (75) and Ctrl-C (130).

    Each is a PNG of the image's size, 255 where there is sky and else 0, whole or not there.

    Args:
        source: a reader of original files.
        segmenter: finds the sky.
        out: folder of the masks; None: the one that `sky_masks=beside` means.
        limit: images, spread over the set; None: all.
        batch_size: images of one size at once.
        redo: replaces the masks of another model.
        command: that is shown on the page.

    Raises:
        ConfigError: whatever the user has to change.
    """
    if not isinstance(source, Raw) or "sky_masks" not in signature(type(source)).parameters:
        raise ConfigError(
            f"dataset={source.name} has no option sky_masks, so nothing would read the masks; images of your own go in "
            "as dataset=folder_pair"
        )
    if source.sky_masks:
        raise ConfigError("dataset.sky_masks is for reading: set it to null while masks are made")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}; give 1 or more")
    try:
        source.prepare()
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    rows = [source.row(i) for i in range(len(source))]
    if len({mask_name(row.image) for row in rows}) < len(rows):
        raise ConfigError(f"dataset={source.name}: images in one file, or alike but for the suffix, would share a mask")
    rows = _spread(rows, limit or len(rows))
    folder = out or source.root / SKY_FOLDER
    with ends_in_a_line(
        done="made",
        fault=f"masks cannot be written to {folder}",
        way_out="name another folder with out=",
        refused=(SkyError, DecodeError),
    ):
        facts = segmenter.identity()
        _claim(folder, source.root, segmenter.name, facts, redo=redo)
        missing = [row for row in rows if not (folder / mask_name(row.image)).exists()]
        damaged = _make(source, missing, segmenter, folder, batch_size)
        without = {image for image, _ in damaged}
        there = [row for row in rows if row.image not in without]
        if not there:
            raise ConfigError(f"no image of {source.name} can be read: {', '.join(damaged[0])}")
        masks = Masks(source, folder, len(missing) - len(damaged), len(there), _shares(folder, there), damaged)
        write_sky_page(
            folder / PAGE,
            title=f"Sky in {source.name}",
            facts={
                "segmenter": segmenter.name,
                "weights": facts["weights"],
                "classes": ", ".join(segmenter.classes.values()),
                "network input": ", ".join(f"{name} {value}" for name, value in facts["input"]["size"].items()),
                "masks": masks.there,
                "sky": _in_words(masks.shares),
            },
            pictures=_pictures(masks),
            damaged=damaged,
            command=command,
        )
    return masks


def print_masks(masks: Masks) -> None:
    """What is there, what could not be read, and what comes next."""
    print(f"masks: {masks.out}: {masks.there:,}, of which this run made {masks.made:,}")
    print(f"sky:   {_in_words(masks.shares)}")
    for file, reason in masks.damaged[:5]:
        print(f"no mask: {file}: {reason}")
    if masks.damaged:
        print(f"{len(masks.damaged):,} images cannot be read and have no mask")
    print(f"look:  {masks.out / PAGE}")
    beside = masks.out == masks.source.root / SKY_FOLDER
    print(f"next:  sky_masks={'beside' if beside else masks.out} of dataset {masks.source.dataset}")


def _in_words(shares: Sequence[tuple[float, Row]]) -> str:
    found = np.array([share for share, _ in shares])
    some, mean = (found > 0).mean(), found.mean()
    return f"in {some:.1%} of the images, {mean:.1%} of the pixels on average ({len(found):,} masks looked at)"


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most so many of the items, evenly."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))]


def _shares(folder: Path, rows: Sequence[Row]) -> list[tuple[float, Row]]:
    rows = _spread(rows, LOOKED_AT)
    with ThreadPoolExecutor(num_cores()) as pool:
        return list(zip(pool.map(lambda row: float(_read_mask(folder, row).mean()), rows), rows, strict=True))


def _pictures(masks: Masks) -> list[SkyPicture]:
    """From the image with least sky to that with most."""
    return [
        SkyPicture(row.image, masks.source.image(row), _read_mask(masks.out, row))
        for _, row in _spread(sorted(masks.shares, key=itemgetter(0)), SHOWN)
    ]


def _claim(folder: Path, root: Path, name: str, facts: Mapping[str, Any], *, redo: bool) -> None:
    """Makes the folder one of this model's masks alone."""
    place, data = folder.resolve(), root.resolve()
    hidden = place.is_relative_to(data) and any(part.startswith(".") for part in place.relative_to(data).parts)
    if data.is_relative_to(place) or (place.is_relative_to(data) and not hidden):
        raise ConfigError(f"out={folder} would mix the masks with the data of root={root}: name a folder elsewhere")
    note = folder / SKY_NOTE
    told = {"segmenter": Path(name).name if Path(name).exists() else name, **json.loads(json.dumps(facts))}
    if note.exists():
        old = json.loads(note.read_bytes())
        if {**old, "segmenter": None} == {**told, "segmenter": None}:
            return
        if not redo:
            raise ConfigError(
                f"{folder} holds masks of another model, {old.get('segmenter')}: redo=true replaces them all, "
                "out=FOLDER puts the new ones elsewhere"
            )
        for mask in folder.rglob("*.png"):  # before the note: what a kill leaves is still the other model's
            mask.unlink()
    elif next(folder.rglob("*.png"), None):
        raise ConfigError(
            f"{folder} holds PNG files without {SKY_NOTE}, so they were not made here: name another as out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(note, json.dumps(told, indent=1).encode())


def _make(
    source: Raw, rows: Sequence[Row], segmenter: SkySegmenter, folder: Path, batch_size: int
) -> list[tuple[str, str]]:
    """Writes the masks of the rows; (image, reason) of those that cannot be read."""
    damaged: list[tuple[str, str]] = []
    waiting: dict[tuple[int, ...], list[tuple[Row, np.ndarray]]] = {}
    with ThreadPoolExecutor(num_cores()) as pool:
        writes: deque[Future[None]] = deque()

        def segment(batch: Sequence[tuple[Row, np.ndarray]]) -> None:
            for (row, _), mask in zip(batch, segmenter.masks([image for _, image in batch]), strict=True):
                writes.append(pool.submit(_write_mask, folder / mask_name(row.image), mask))
            while len(writes) > 2 * batch_size:
                writes.popleft().result()

        images = _decoded(source, rows, pool, ahead=2 * num_cores() + batch_size)
        for row, image in track(images, f"sky of {source.name}", len(rows), disable=not rows):
            if not isinstance(image, np.ndarray):
                damaged.append((row.image, str(image)))
                continue
            waiting.setdefault(image.shape, []).append((row, image))
            full = max(waiting, key=lambda shape: len(waiting[shape]))
            if len(waiting[full]) == batch_size or sum(map(len, waiting.values())) > PENDING * batch_size:
                segment(waiting.pop(full))
        for batch in waiting.values():
            segment(batch)
        for write in writes:
            write.result()
    return damaged


def _decoded(
    source: Raw, rows: Sequence[Row], pool: ThreadPoolExecutor, *, ahead: int
) -> Iterator[tuple[Row, np.ndarray | Exception]]:
    """Each row with its image, or with what is wrong with that."""

    def image(row: Row) -> np.ndarray | Exception:
        try:
            return source.image(row)
        except (DecodeError, OSError) as error:
            return error

    pending: deque[tuple[Row, Future[np.ndarray | Exception]]] = deque()
    for row in rows:
        pending.append((row, pool.submit(image, row)))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def _write_mask(path: Path, sky: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, cv2.imencode(".png", sky.astype(np.uint8) * 255)[1].tobytes())


def _read_mask(folder: Path, row: Row) -> np.ndarray:
    path = folder / mask_name(row.image)
    mask = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise ConfigError(f"{path} is damaged: delete it and give the same command again")
    return mask == 255
