"""Preparing unlabelled sets from a config: what there is, how a run ends, and what it prints."""

import signal
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from depthany.config.check import ConfigError
from depthany.config.launch import config_dir
from depthany.data.packing import Indexing, Packing
from depthany.data.preparation import DROPPED, FULL, Preparation, Summary
from depthany.data.shards import ShardError
from depthany.data.sources.tree import ForeignTars, ImageTree, NothingFitsError, PackError

STOPPED, DISK_FULL = 75, 73  # EX_TEMPFAIL and EX_CANTCREAT of sysexits.h
RANGES = {"samples_per_shard": (1, 10**6), "min_side": (1, 10**5), "max_side": (16, 10**5), "quality": (1, 100)}
RANGES |= {"workers": (1, 10**4)}


def open_set(cfg: DictConfig, source: ImageTree) -> Preparation:
    """The job that packs a set, or indexes tars of others.

    Raises:
        ConfigError: an option is out of range, or has no meaning for this set.
    """
    for name, (least, most) in RANGES.items():
        if cfg[name] is not None and not least <= cfg[name] <= most:
            raise ConfigError(f"{name}={cfg[name]} must be between {least} and {most}")
    out = Path(cfg.out) if cfg.out else Path(cfg.paths.shards) / source.name
    if isinstance(source, ForeignTars):
        if cfg.max_side is not None:
            raise ConfigError(f"max_side={cfg.max_side} needs shards of our own: unlabelled=folder packs anew")
        return Indexing(source=source, out=out, min_side=cfg.min_side, workers=cfg.workers)
    options: dict[str, Any] = {name: cfg[name] for name in RANGES}
    return Packing(source=source, out=out, **options)


def prepare(job: Preparation) -> Summary:
    """Runs the job and ends in one line: exit code 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C, 73 for a full disk.

    Raises:
        ConfigError: whatever the user has to change.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(STOPPED)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    try:
        return job.run()
    except NothingFitsError as error:
        raise ConfigError(f"{error}; {_way_out(job.source)}") from error
    except PackError as error:
        raise ConfigError(str(error)) from error
    except ShardError as error:
        if not isinstance(error.__cause__, OSError):
            raise ConfigError(str(error)) from error
        _end_for_disk(error.__cause__, job.out)
    except OSError as error:
        _end_for_disk(error, job.out)
    except KeyboardInterrupt:
        _end(130, "stopped; the same command goes on")
    except SystemExit:
        _end(STOPPED, "stopped by a signal; the same command goes on")


def _end_for_disk(error: OSError, out: Path) -> NoReturn:
    if error.errno in FULL:
        _end(DISK_FULL, f"out={out}: the disk is full; what is packed stays: make room and give the same command again")
    raise ConfigError(f"out={out}: {error}; what is packed stays") from error


def _end(code: int, line: str) -> NoReturn:
    print(f"depthany: {line}", file=sys.stderr)
    raise SystemExit(code)


def _way_out(source: ImageTree) -> str:
    """Which set the files in root look like."""
    paths = [f"{source.root.resolve()}/{path}".lower() for path in source.other]
    for name, _, config in sets():
        if any(fnmatch(path, pattern) for path in paths for pattern in config["patterns"]):
            return f"they look like unlabelled={name}"
    return "unlabelled=folder takes any layout"


def sets() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, card, config) of every unlabelled set that has a card."""
    folder = config_dir() / "unlabelled"
    for file in sorted(folder.glob("*.yaml")):
        card = config_dir().parent / "data_manifests" / file.name
        if card.is_file():
            yield file.stem, _mapping(card), _mapping(file)


def _mapping(file: Path) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # type: ignore[return-value]  # not a list


def print_sets() -> None:
    """What `unlabelled=` can be."""
    for name, card, config in sets():
        counts = ", ".join(f"{part} {count:,}" for part, count in card["expected"].items() if count)
        print(f"{name:<16}{card['title']}; images: {counts}")
        print(f"{'':<16}licence: {card['licence']}; root holds {config['example']}")
    for name, meaning in (
        ("folder", "any folder: images, and tars, LMDB folders and videos of images"),
        ("list", "a text file with one path in each line"),
        ("webdataset", "tars that others made (img2dataset and the like), indexed where they are"),
    ):
        print(f"{name:<16}{meaning}")


def print_summary(summary: Summary) -> None:
    """What is there, what the run did, and what comes next."""
    table = Table(show_header=False)
    table.add_row("set", summary.name)
    table.add_row("folder", str(summary.out))
    table.add_row("images in use", f"{summary.images:,}")
    table.add_row(
        "dropped", ", ".join(f"{kind} {count:,}" for kind, count in sorted(summary.dropped.items())) or "none"
    )
    table.add_row("shards", f"{summary.shards:,}")
    table.add_row("bytes", f"{summary.bytes:,}")
    speed = f", {summary.made / summary.seconds:,.0f} images/s" if summary.made else ""
    table.add_row("this run", f"{summary.made:,} images in {summary.seconds:,.0f} s{speed}")
    Console().print(table)
    for file, reason in list(summary.problems.items())[:5]:
        print(f"not used: {file}: {reason}")
    if len(summary.problems) > 5:
        print(f"and {len(summary.problems) - 5:,} more files")
    if summary.dropped or summary.problems:
        print(f"dropped: {summary.out / DROPPED}")
    print(f"next:    python -m depthany.pseudo_label teacher=last shards={summary.out}")
