"""Labels that are there already: whose they are, and whether they may be trained on together."""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from depthany.config.check import ConfigError
from depthany.data import storage
from depthany.data.labels import LabelPlan
from depthany.data.shards import ShardError, read_catalog
from depthany.data.sources.packed import ANY, Shards, StoredLabels, labels_in, stored_teachers


def check_stored(sources: Sequence[Shards], plan: LabelPlan) -> str:
    """Whose stored labels a run is to read, after a look at all of them.

    Args:
        sources: the unlabelled sets, prepared.
        plan: its `teacher` is a name, None for the only one there, or any.

    Returns:
        What goes into `Shards.teacher`: a teacher's name, or any.

    Raises:
        ConfigError: labels are missing, or are a mixture of teachers or plans and that was not asked for.
    """
    ways: dict[str, tuple[StoredLabels, list[str]]] = {}
    for source in sources:
        there = copy.copy(source)
        there.teacher = there.quality = None
        there.open()
        stored = [s for s in _stored(there, plan.teacher) if plan.teacher in (None, ANY, s.teacher)]
        bare = set(range(there.num_shards)) - {shard for labels in stored for shard in labels.shards}
        if bare:
            whose = "" if plan.teacher in (None, ANY) else f" of {plan.teacher}"
            raise ConfigError(
                f"{len(bare)} of {there.num_shards} shards of {source.name} have no labels{whose} in "
                f"{storage.shown(source.labels_root)}: make them with python -m depthany.pseudo_label, or choose "
                f"labels=offline"
            )
        for labels in stored:
            ways.setdefault(json.dumps([labels.teacher, labels.facts]), (labels, []))[1].append(source.name)
    if plan.teacher == ANY:
        return ANY
    if len(ways) > 1:
        told = [f"{labels.teacher} ({_shown(labels.facts)}) of {', '.join(names)}" for labels, names in ways.values()]
        raise ConfigError(
            f"the stored labels are a mixture: {'; '.join(told)}. Name one teacher as labels.teacher, label the rest "
            f"with python -m depthany.pseudo_label, or allow it: labels.teacher=any"
        )
    (labels, _), *_ = ways.values()
    return labels.teacher


def _stored(source: Shards, teacher: str | None) -> list[StoredLabels]:
    """As `stored_teachers`, from the lists of whole sets where there are any: 62,000 indices take minutes."""
    catalog = read_catalog(source.root)
    names = [teacher] if teacher not in (None, ANY) else []
    if not storage.is_remote(source.labels_root):
        names = list(labels_in(Path(source.labels_root), catalog))
    found = []
    for name in names:
        try:
            listed = storage.read(os.path.join(source.labels_root, f"labels.{name}.json"), json.loads)
            if [row["images"].encode() for row in listed["shards"]] == catalog.sha256.tolist():
                found.append(StoredLabels(str(name), listed["facts"], list(range(len(catalog)))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    try:
        return found if len(found) == len(names) and names else stored_teachers(source)
    except ShardError as error:
        raise ConfigError(str(error)) from error


def _shown(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("teacher", "weights"))
