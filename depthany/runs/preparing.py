"""Preparing sets from a config: what there is, how a run ends, and what it prints."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from depthany.config.check import ConfigError
from depthany.config.launch import config_dir
from depthany.data.packing import ImagePreparation, Indexing, Packing
from depthany.data.preparation import DROPPED, Preparation, Summary
from depthany.data.shards import ShardError
from depthany.data.sources.index_csv import IndexCsv
from depthany.data.sources.raw import Raw
from depthany.data.sources.tree import ForeignTars, ImageTree, NothingFitsError, PackError
from depthany.data.truth_packing import TruthPacking
from depthany.runs.cards import read_cards
from depthany.runs.ends import ends_in_a_line

RANGES = {"samples_per_shard": (1, 10**6), "min_side": (1, 10**5), "max_side": (16, 10**5), "quality": (1, 100)}
RANGES |= {"workers": (1, 10**4)}
OF_IMAGES = ("min_side", "max_side", "quality")  # options that would change what the label of a picture fits to
WIDTH = 150  # columns of the table of sets where no terminal says how many there are


def open_set(cfg: DictConfig, source: Any) -> Preparation:
    """The job that packs a set, or indexes tars of others.

    Raises:
        ConfigError: an option is out of range, or has no meaning for this set.
    """
    for name, (least, most) in RANGES.items():
        if cfg[name] is not None and not least <= cfg[name] <= most:
            raise ConfigError(f"{name}={cfg[name]} must be between {least} and {most}")
    out = Path(cfg.out) if cfg.out else Path(cfg.paths.shards) / source.name
    if cfg.get("dataset") is not None:
        return _open_labelled(cfg, source, out)
    if cfg.pictures != "keep":
        raise ConfigError(
            f"pictures={cfg.pictures} is for labelled sets: max_side makes unlabelled ones faster to read"
        )
    if isinstance(source, ForeignTars):
        if cfg.max_side is not None:
            raise ConfigError(f"max_side={cfg.max_side} needs shards of our own: unlabelled=folder packs anew")
        return Indexing(source=source, out=out, min_side=cfg.min_side, workers=cfg.workers)
    options: dict[str, Any] = {name: cfg[name] for name in RANGES}
    return Packing(source=source, out=out, **options)


def _open_labelled(cfg: DictConfig, source: Any, out: Path) -> Preparation:
    said = [option.lstrip("+") for option in HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
    if unfit := [option for option in said if option.partition("=")[0] in OF_IMAGES]:
        raise ConfigError(
            f"{unfit[0]} is for unlabelled sets: the samples of a labelled one stay as its reader has them"
        )
    if not isinstance(source, Raw | IndexCsv):
        raise ConfigError(f"dataset={source.name} is not packed: it is no set of original files")
    options: dict[str, Any] = {name: cfg[name] for name in ("samples_per_shard", "pictures", "workers")}
    try:
        return TruthPacking(source=source, out=out, **options)
    except PackError as error:
        raise ConfigError(str(error)) from error


def prepare(job: Preparation) -> Summary:
    """Runs the job and ends in one line: exit code 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C, 73 for a full disk.

    Raises:
        ConfigError: whatever the user has to change.
    """
    with ends_in_a_line(
        done="packed",
        fault=f"out={job.out} cannot be written, or what it is made of cannot be read",
        way_out="what is packed stays; mend it and give the same command again",
        refused=(PackError, ShardError),
    ):
        try:
            return job.run()
        except NothingFitsError as error:
            way_out = f"; {_way_out(job.source)}" if isinstance(job, ImagePreparation) else ""
            raise ConfigError(f"{error}{way_out}") from error
        except ShardError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise


def _way_out(source: ImageTree) -> str:
    """Which set the files in root look like."""
    paths = [f"{source.root.resolve()}/{path}".lower() for path in source.other]
    for name, _, config in sets():
        if any(fnmatch(path, pattern) for path in paths for pattern in config["patterns"]):
            return f"they look like unlabelled={name}"
    return "unlabelled=folder takes any layout"


def sets() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, card, config) of every unlabelled set that has a card."""
    folder, cards = config_dir() / "unlabelled", read_cards()
    for file in sorted(folder.glob("*.yaml")):
        if card := cards.get(file.stem):
            config: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            yield file.stem, card, config


def print_sets() -> None:
    """What `dataset=` and `unlabelled=` can be."""
    table = Table(title="labelled sets (dataset=NAME)", title_justify="left", box=None)
    for column in ("name", "kind", "unit", "factor", "samples", "licence", "commercial", "used in"):
        table.add_column(column, overflow="fold", justify="right" if column in ("factor", "samples") else "left")
    for name, card in read_cards().items():
        if "quantity" in card:
            counts = card["expected"] or {}
            count, factor = counts.get("all", sum(filter(None, counts.values()))), card["factor"]
            samples = f"{count:,}" if count else card["count"]
            table.add_row(
                *(name, card["kind"], card["unit"], "-" if factor is None else f"{factor:g}"),
                *(samples, card["licence"], str(card["commercial"]), ", ".join(card["used_in"])),
            )
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
    print("not packed:     da2k, pairs of points, read by depthany.data.sources.da2k alone, and embedded")
    print("folder_pair     your own images and labels in two folders, matched by name")
    print("index_csv       your own, listed in a CSV file that says what each label means")
    print("\nunlabelled sets (unlabelled=NAME)")
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


def next_commands(job: Preparation) -> list[str]:
    """What can be done with what is prepared."""
    if isinstance(job, TruthPacking):
        uses = read_cards().get(getattr(job.source, "dataset", ""), {}).get("used_in", [])
        said = {"v2": "data=v2_synthetic", "v1": "recipe=v1 data=v1_labelled"}
        mixtures = [data for use, data in said.items() if use in uses]
        part = f"data.sources.{job.name}"
        return [
            f"python -m depthany.audit dataset=shards root={job.out} dataset.name={job.name}",
            *(
                f"python -m depthany.train stage=teacher {data} {part}.read=shards {part}.shards={job.out}"
                for data in mixtures[:1]
            ),
        ]
    return [f"python -m depthany.pseudo_label teacher=last shards={job.out}"]


def print_summary(summary: Summary, following: list[str]) -> None:
    """What is there, what the run did, and what comes next.

    Raises:
        ConfigError: nothing of the set can be used.
    """
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
    for line in [*[f"{file}: {reason}" for file, reason in summary.problems.items()][:5], *summary.damaged]:
        print(f"not used: {line}")
    if len(summary.problems) > 5:
        print(f"and {len(summary.problems) - 5:,} more files")
    if summary.dropped or summary.problems:
        print(f"dropped: {summary.out / DROPPED}")
    for number, command in enumerate(following if summary.images else ()):
        print(f"{'or:' if number else 'next:':<9}{command}")
    if not summary.images:
        raise ConfigError(f"nothing of {summary.name} can be used: {summary.out / DROPPED} says why of each file")
