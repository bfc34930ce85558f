"""The audit of one labelled source: read, measure, judge, and show."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import radians, tan
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from depthany.config.check import ConfigError
from depthany.data.audit import Measured, Verdict, measure, verdicts
from depthany.data.files import DecodeError
from depthany.data.labels import has_label
from depthany.data.shards import ShardError
from depthany.data.sources.packed import Packable, Shards
from depthany.report.audit_page import Group, Picture, write_audit_page
from depthany.runs.cards import read_cards
from depthany.types import DepthKind

COMPARED = 256  # samples of a dataset whose edges are compared with each other
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
        fov_deg: horizontal field of view of every image in degrees; None: unknown.
        range_m: nearest and farthest depth in metres; None: the card's.
        page: where the page goes.
        command: that is shown on it.

    Raises:
        ConfigError: there is nothing to audit.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}; give 1 or more, or null for all")
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
    cards = read_cards()
    card = cards.get(dataset) or cards.get(source.name) or {}
    range_m = range_m or card.get("range_m")
    factor = factor or card.get("factor") or 1.0
    focal = 0.5 / tan(radians(fov_deg / 2)) if fov_deg else None
    count = min(limit or len(source), len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist()
    measured: dict[str, list[tuple[int, Measured]]] = defaultdict(list)
    faults: list[tuple[str, str]] = []
    for index in track(indices, f"auditing {source.name}"):
        try:
            sample = source.read(index)
        except (DecodeError, ShardError, OSError) as error:
            faults.append((source.key(index), str(error)))
            continue
        if not has_label(sample):
            raise ConfigError(f"{source.key(index)} has no label: there is nothing to audit")
        own = getattr(source, "focal_px", None)  # of a folder pair
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
        worst=[_picture(source, index, why) for index, why in _worst(measured.values())],
        random=[_picture(source, all_of[i][0], "") for i in sorted(chosen)],
        faults=faults,
        skipped=[(skip.key, skip.reason) for skip in getattr(source, "skipped", [])],
        command=command,
    )
    return Audit(found, faults, page)


def print_audit(result: Audit) -> None:
    """One line for each dataset and test, then the samples that are wrong by themselves."""
    table = Table("dataset", "test", "says", "evidence")
    for name, found in result.groups.items():
        for verdict in found:
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


def _worst(groups: Iterable[Sequence[tuple[int, Measured]]]) -> Iterator[tuple[int, str]]:
    """The samples with most against them: faults, then flags of single samples, then few valid pixels.

    The worst of every dataset come before the second worst of any.
    """
    ranked = []
    for of in groups:
        judged = []
        for index, numbers in of:
            flags = [v for v in verdicts([numbers], range_m=None) if v.state == "flagged"]
            why = [*numbers.faults, *(f"{v.test}: {v.words}" for v in flags)]
            judged.append((-len(why), numbers.valid, index, "; ".join(why) or f"{numbers.valid:.1%} valid"))
        ranked += [(rank, *rest) for rank, rest in enumerate(sorted(judged))]
    yield from ((index, why) for *_, index, why in sorted(ranked)[:SHOWN])


def _picture(source: Packable, index: int, why: str) -> Picture:
    sample: Any = source.read(index)
    title = f"{sample['key']}: {why}" if why else str(sample["key"])
    return Picture(title, sample["image"], sample["disparity"], sample["valid"], sample["sky"])
