"""The audit of one labelled source: read, measure, judge, and show."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import radians, tan
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple, get_args

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from depthany.config.check import ConfigError
from depthany.data.audit import Measured, State, Verdict, measure, own_scores, verdicts
from depthany.data.files import DecodeError
from depthany.data.labels import has_label
from depthany.data.shards import ShardError
from depthany.data.sources.index_csv import IndexCsv
from depthany.data.sources.packed import Packable, Shards
from depthany.data.sources.raw import Raw
from depthany.report.audit_page import Group, Picture, write_audit_page
from depthany.runs.cards import read_cards
from depthany.types import DepthKind

COMPARED = 256  # samples of a dataset whose edges are compared with each other
FEW = 3  # datasets whose every verdict is printed
SHOWN = 6  # pictures of the worst, and of random samples


class Audit(NamedTuple):
    """What was found."""

    groups: Mapping[str, Sequence[Verdict]]  # of each dataset
    faults: Sequence[tuple[str, str]]  # key, what is wrong with the sample by itself
    page: Path

    @property
    def flagged(self) -> bool:
        """Whether somebody should look."""
        return bool(self.faults) or any(v.state == "flagged" for found in self.groups.values() for v in found)


def audit(
    source: Packable,
    *,
    dataset: str,
    limit: int | None,
    checksums: bool,
    fov_deg: float | None,
    range_m: Sequence[float] | None,
    page: Path,
    command: str,
) -> Audit:
    """Audits a source and writes the page.

    Args:
        source: with labels; one that has `group` is judged group by group.
        dataset: name of the card; where there is none, that of the source counts.
        limit: samples that are read, spread over the source; None: all.
        checksums: read every file of the source first and compare it with the sha256 noted beside the data.
        fov_deg: horizontal field of view of every image in degrees; None: unknown.
        range_m: nearest and farthest depth in metres; None: the card's.
        page: where the page goes.
        command: that is shown on it.

    Raises:
        ConfigError: there is nothing to audit.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}; give 1 or more, or null for all")
    if range_m is not None and not (len(range_m) == 2 and 0 <= range_m[0] < range_m[1]):
        raise ConfigError(f"range_m={list(range_m)}: give [nearest, farthest] in metres, or null for the card's")
    if fov_deg is not None and not 0 < fov_deg < 180:
        raise ConfigError(f"fov_deg.{dataset}={fov_deg:g} must lie between 0 and 180 degrees; null: unknown")
    if page.is_dir():
        raise ConfigError(f"page={page} is a folder: name a file in it, such as page={page / 'audit.html'}")
    try:
        source.prepare()
        if isinstance(source, Shards):
            source.open()
        factor = getattr(source, "factor", None)  # shards are opened for it
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=page.parent).close()
    except OSError as error:
        raise ConfigError(f"page={page} cannot be written ({error.strerror}): name another file") from error
    if not len(source):
        raise ConfigError(f"{source.name} has no samples: correct root")
    faults = _verified(source) if checksums else []
    cards = read_cards()
    card = cards.get(dataset) or cards.get(source.name) or {}
    range_m = range_m or card.get("range_m")
    factor = factor or card.get("factor") or 1.0
    focal = 0.5 / tan(radians(fov_deg / 2)) if fov_deg else None
    count = min(limit or len(source), len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist()
    measured: dict[str, list[tuple[int, Measured]]] = defaultdict(list)
    for index in track(indices, f"auditing {source.name}"):
        try:
            sample = source.read(index)
        except (DecodeError, ShardError, OSError) as error:
            faults.append((source.key(index), str(error)))
            continue
        if not has_label(sample):
            raise ConfigError(f"{source.key(index)} has no label: there is nothing to audit")
        own = source.focal_of(index) if isinstance(source, IndexCsv) else getattr(source, "focal_px", None)
        numbers = measure(sample, focal=own / sample["image"].shape[1] if own else focal, factor=float(factor))
        group = source.group(index) if hasattr(source, "group") else dataset
        if len(measured[group]) >= COMPARED:
            numbers = replace(numbers, image_edges=np.empty(0), label_edges=np.empty(0))
        measured[group].append((index, numbers))
        if numbers.faults:
            faults.append((numbers.key, ", ".join(numbers.faults)))
    found = {name: verdicts([m for _, m in of], range_m=range_m) for name, of in measured.items()}
    all_of = [pair for of in measured.values() for pair in of]
    chosen = np.random.default_rng(0).permutation(len(all_of))[:SHOWN]
    write_audit_page(
        page,
        title=f"Audit of {source.name}",
        groups=[_group(name, [m for _, m in measured[name]], found[name], range_m) for name in found],
        worst=[_picture(source, index, why) for index, why in _worst(measured, found, range_m)],
        random=[_picture(source, all_of[i][0], f"{all_of[i][1].valid:.1%} valid") for i in sorted(chosen)],
        faults=faults,
        skipped=[(skip.key, skip.reason) for skip in getattr(source, "skipped", [])],
        command=command,
    )
    return Audit(found, faults, page)


def _verified(source: Packable) -> list[tuple[str, str]]:
    """Files whose content is not what it was when its checksum was noted: (key, what to do)."""
    if not isinstance(source, Raw):
        raise ConfigError(
            f"checksums=true is for sets in their original files, and {source.name} is none: leave it out (every read "
            "of a shard is checked as it is)"
        )
    try:
        found = source.verify()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"{len(found):,} of {len(source.checksums()):,} files are not what they were: {source.checksums_path}")
    return [(skip.key, skip.reason) for skip in found]


def print_audit(result: Audit) -> None:
    """What each test says of each dataset, of many in numbers; then the samples that are wrong by themselves."""
    rows = [(name, verdict) for name, found in result.groups.items() for verdict in found]
    if len(result.groups) > FEW:
        counts = Table(f"of {len(result.groups)} datasets", *get_args(State), caption="the evidence is on the page")
        for test in dict.fromkeys(verdict.test for _, verdict in rows):
            states = Counter(verdict.state for _, verdict in rows if verdict.test == test)
            counts.add_row(test, *(str(states[state]) for state in get_args(State)))
        Console().print(counts)
        rows = [(name, verdict) for name, verdict in rows if verdict.state == "flagged"]
    if rows:
        table = Table("dataset", "test", "says", "evidence")
        for name, verdict in rows:
            table.add_row(name, verdict.test, verdict.state, verdict.words)
        Console(width=150).print(table)
    for key, why in result.faults[:10]:
        print(f"{key}: {why}")
    if len(result.faults) > 10:
        print(f"… and {len(result.faults) - 10} more samples: see the page")
    print(f"{'flagged: look at' if result.flagged else 'nothing is flagged:'} {result.page}")


def _group(name: str, of: Sequence[Measured], found: Sequence[Verdict], range_m: Sequence[float] | None) -> Group:
    sizes = sorted({f"{m.image_shape[1]}x{m.image_shape[0]}" for m in of})
    labels = sorted({f"{m.label_shape[1]}x{m.label_shape[0]}" for m in of})
    metric = all(m.kind is DepthKind.METRIC for m in of)
    facts = {
        "samples": len(of),
        "kind": ", ".join(sorted({str(m.kind.value) for m in of})),
        "image sizes": ", ".join(sizes[:20]),
        "label sizes": ", ".join(labels[:20]),
        "valid pixels": f"{np.mean([m.valid for m in of]):.1%} (least {min(m.valid for m in of):.1%})",
        "sky": f"{np.mean([m.sky for m in of]):.1%}",
        **{f"samples with {what}": sum(bool(getattr(m, what)) for m in of) for what in ("nan", "inf", "negative")},
        "constant samples": sum(m.constant for m in of),
        "the card's range": f"{range_m[0]:g} to {range_m[1]:g} m" if range_m else "none",
    }
    depths = [m.depth for m in of if len(m.depth)]
    rows = [(v.test, v.state, v.words) for v in found]
    return Group(name, rows, facts, depths, "m" if metric else "unknown unit", range_m if metric else None)


def _worst(
    groups: Mapping[str, Sequence[tuple[int, Measured]]],
    found: Mapping[str, Sequence[Verdict]],
    range_m: Sequence[float] | None,
) -> Iterator[tuple[int, str]]:
    """The samples with most against them: faults, then what their dataset is flagged for, then few valid pixels.

    The worst of every dataset come before the second worst of any; a flagged dataset comes before the others.
    """
    ranked = []
    for name, of in groups.items():
        flagged = {v.test for v in found[name] if v.state == "flagged"}
        edged = [n for _, n in of if n.image_edges.size and n.label_edges.size]
        mixed = "wrong pair" in flagged  # no sample alone can tell
        fits = {n.key: float(z) for n, z in zip(edged, own_scores(edged), strict=True)} if mixed else {}
        judged = []
        for index, numbers in of:
            told = [v for v in verdicts([numbers], range_m=range_m) if v.state == "flagged"]
            why = [*numbers.faults, *(f"{v.test}: {v.words}" for v in told)]
            fit = fits.get(numbers.key, 0.0)
            why += [f"wrong pair: its label fits {-fit:.1f} deviations worse than those of others"] if fit < 0 else []
            alike = sum(v.test in flagged for v in told) + (fit < 0)
            rank = -bool(numbers.faults), -alike, -len(why), fit, numbers.valid
            judged.append((*rank, index, "; ".join(why) or f"{numbers.valid:.1%} valid"))
        ranked += [
            (not flagged and not rest[2], number, not flagged, *rest) for number, rest in enumerate(sorted(judged))
        ]
    if ranked and not min(ranked)[0]:  # where something is against some, those against whom nothing is stay away
        ranked = [rank for rank in ranked if not rank[0]]
    yield from ((index, why) for *_, index, why in sorted(ranked)[:SHOWN])


def _picture(source: Packable, index: int, why: str) -> Picture:
    sample: Any = source.read(index)
    return Picture(str(sample["key"]), why, sample["image"], sample["disparity"], sample["valid"], sample["sky"])
