"""The pseudo-label job: a teacher labels image shards; its labels lie beside them as sibling shards."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from depthany.data.files import read_image
from depthany.data.labels import LabelPlan, encode_pseudo
from depthany.data.shards import IMAGE_SUFFIXES, Shard, ShardError, label_path, write_shard
from depthany.inference.predictor import Predictor


def label_shards(predictor: Predictor, tars: Sequence[Path], *, teacher: str, plan: LabelPlan) -> list[str]:
    """Labels every image of the shards that has no label of this teacher yet.

    Args:
        predictor: the teacher.
        tars: image shards with their indices.
        teacher: its name in the label shards' names; it ends in a hash of the weights.
        plan: codec, input size, batch size, precision.

    Returns:
        Keys of damaged images, which get no label.
    """
    damaged: list[str] = []

    made = {"teacher": teacher, "input_size": plan.input_size, "codec": plan.codec, "precision": plan.precision}
    missing = [tar for tar in tars if not _is_labelled(Shard(tar), label_path(tar, teacher), made)]
    for tar in track(missing, f"labelling with {teacher}", disable=not missing):
        shard = Shard(tar)
        facts = made | {"images": shard.sha256}
        write_shard(label_path(tar, teacher), _labels(shard, predictor, plan, damaged), facts=facts)
        shard.close()
    return damaged


def _is_labelled(images: Shard, path: Path, made: dict[str, Any]) -> bool:
    """Whether the label shard is whole, made this way, and of these very images (a set that grew is not)."""
    if not path.with_suffix(".json").exists():
        return False
    try:
        there = Shard(path)
    except ShardError:
        return False  # half there after a crash of the machine: made again
    return there.facts == made | {"images": images.sha256}


def _labels(shard: Shard, predictor: Predictor, plan: LabelPlan, damaged: list[str]) -> Iterator[dict[str, Any]]:
    def inputs() -> Iterator[tuple[str, np.ndarray]]:
        for i, key in enumerate(shard.keys):
            try:
                suffix = next(s for s in IMAGE_SUFFIXES if s in shard.files[i])
                yield key, predictor.network_input(read_image(shard.read(i, suffix)), input_size=plan.input_size)
            except (ValueError, StopIteration) as error:
                damaged.append(f"{key}: {error or 'no image'}")

    for _, group in groupby(inputs(), key=lambda pair: pair[1].shape):  # neighbours of one shape share a batch
        rows = list(group)
        for first in range(0, len(rows), plan.batch_size or 1):
            batch = rows[first : first + (plan.batch_size or 1)]
            maps = predictor.disparity([image for _, image in batch]).cpu().numpy()
            for (key, _), disparity in zip(batch, maps, strict=True):
                yield {"__key__": key, **encode_pseudo(disparity, str(plan.codec))}
