"""The order of an epoch: a pure function of (chunk sizes, weights, seed, epoch), looked up by position.

Ranks and workers are only a way to cut a global batch, so they cannot change what is seen. The only state is how many
samples were used, and that stands in the checkpoint.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np


class Spot(NamedTuple):
    """One item of a batch: which part, which position of its order, and its weight in the step's mean."""

    part: str  # "labelled" or "unlabelled"
    position: int
    weight: float  # 0 for padding
    consumed: int  # samples of the epoch that the whole step uses up


class EpochOrder:
    """A seeded permutation of every sample: chunks (shards) are permuted, then samples within windows of chunks.

    Reading stays local (a window's shards at a time), and finding a position costs one search over windows: 62,000
    chunks take milliseconds when an epoch begins, and a window is shuffled when it is come to.

    A source of weight 2.5 has every chunk in the order twice, and once more with half of its images. Of the N images of
    a source, `kept` are in that half: image i is one of them in epoch e where floor((i + e + 1) kept / N) is larger
    than floor((i + e) kept / N). They lie evenly over the source, and after any number of epochs no image was used
    more than once more often than another.

    Args:
        counts: samples in each chunk.
        seed: of the permutation.
        window: chunks that are shuffled into each other.
        weights: (chunks, weight) of each source in turn: how often an epoch has its images; None: all of them once.
    """

    def __init__(
        self,
        *,
        counts: Sequence[int] | np.ndarray,
        seed: int,
        window: int,
        weights: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.window = seed, window
        # Of each time that a chunk is in the order: the chunk, its first image's place in the source, the source's
        # images, and how many of them are kept. All in arrays, which loader workers share.
        entries, begun = [], 0
        for number, weight in [(len(counts), 1.0)] if weights is None else weights:
            chunks = np.arange(begun, begun + number)
            size, begun = int(counts[chunks].sum()), begun + number
            first = np.cumsum(counts[chunks]) - counts[chunks]
            used = used_of(size, weight)
            rest = used - size * int(weight)
            for kept in [size] * int(weight) + [rest] * (rest > 0):
                entries.append(np.stack(np.broadcast_arrays(chunks, first, max(size, 1), kept)))
        self._chunk, self._first, self._size, self._kept = np.concatenate([np.zeros((4, 0), np.int64), *entries], 1)
        self._count = counts[self._chunk]
        self._length = int(self._in_use(np.arange(len(self._chunk)), 0).sum())
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._windows: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(chunk, index in the chunk) of a position; positions past the end run on into the next epoch's order."""
        epoch, position = divmod(position, self._length)
        _, starts = _kept(self._plans, epoch, self._plan, 2)
        window = int(starts.searchsorted(position, side="right")) - 1
        chunk, index = _kept(self._windows, (epoch, window), self._shuffled, 4)
        offset = position - int(starts[window])
        return int(chunk[offset]), int(index[offset])

    def _random(self, *key: int) -> np.random.Generator:
        """A stream of its own for each key; of a plain list, NumPy takes [seed] and [seed, 0] for the same."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def _in_use(self, entries: np.ndarray, epoch: int) -> np.ndarray:
        """How many images an epoch has of each entry."""
        first, size, kept = self._first[entries] + epoch, self._size[entries], self._kept[entries]
        return (first + self._count[entries]) * kept // size - first * kept // size

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The entries in order, and the first position of each window."""
        entries = self._random(epoch, 0).permutation(len(self._chunk))
        return entries, np.concatenate([[0], np.cumsum(self._in_use(entries, epoch))])[:: self.window]

    def _shuffled(self, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(chunk, index in chunk) of each sample of a window of an epoch, in order."""
        epoch, window = key
        entries, _ = self._plans[epoch]
        mine = entries[window * self.window : (window + 1) * self.window]
        counts = self._in_use(mine, epoch)
        entry = np.repeat(mine, counts)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first, size, kept = self._first[entry] + epoch, self._size[entry], self._kept[entry]
        index = -(-(first * kept // size + 1 + nth) * size // kept) - 1 - first  # of the n-th one in the chunk
        permutation = self._random(epoch, 1 + window).permutation(len(entry))
        return self._chunk[entry][permutation], index[permutation]


def used_of(number: int, weight: float) -> int:
    """How many images an epoch has of a source, repeated ones counted: none of weight 0, else at least one."""
    return max(round(weight * number), 1) if number and weight else 0


def _kept(cache: dict[Any, Any], key: Any, make: Callable[[Any], Any], size: int) -> Any:
    """What the cache holds for a key, made where it is missing; the oldest goes where there are more than `size`."""
    if key not in cache:
        while len(cache) >= size:
            cache.pop(next(iter(cache)))
        cache[key] = make(key)
    return cache[key]


def global_batch(*, cursor: int, total: int, size: int, labelled: int, unlabelled: int) -> list[tuple[str, int]]:
    """The (part, position) pairs of the step that starts when `cursor` samples of the epoch are used.

    The epoch counts unlabelled samples where there are any, labelled ones otherwise. A batch keeps the ratio
    labelled : unlabelled; the last one is cut where the epoch ends, and its labelled part with it.

    Args:
        cursor: samples of the epoch that are used up.
        total: samples of the epoch.
        size: images in a whole batch; rounded down to a multiple of labelled + unlabelled.
        labelled: parts of labelled images.
        unlabelled: parts of unlabelled images.
    """
    unit = max(size // (labelled + unlabelled), 1)
    counted, other = ("unlabelled", "labelled") if unlabelled else ("labelled", "unlabelled")
    per_step = unit * (unlabelled or labelled)
    number = min(per_step, total - cursor)
    batch = [(counted, cursor + i) for i in range(number)]
    if labelled and unlabelled:
        first = cursor * labelled // unlabelled
        last = (cursor + number) * labelled // unlabelled
        batch += [(other, first + i) for i in range(max(last - first, 1))]
    return batch


def share_of(batch: Sequence[tuple[str, int]], *, rank: int, world: int) -> list[Spot]:
    """One rank's part of a global batch: every part is cut evenly, padded with weight 0 where it does not divide.

    Each part's weights sum to 1 after the ranks' gradients are averaged, so a short or padded batch is a true mean.
    Every rank gets the same number of items, at least one: no rank can wait for another.
    """
    spots: list[Spot] = []
    consumed = sum(part == batch[0][0] for part, _ in batch)
    for part in dict.fromkeys(name for name, _ in batch):
        positions = [position for name, position in batch if name == part]
        each = -(-len(positions) // world)
        if part == "unlabelled" and world > 1:
            each += each % 2  # neighbours 2k and 2k + 1 stay on one rank: they are CutMix partners
        mine = positions[rank * each : (rank + 1) * each]
        spots += [Spot(part, position, world / len(positions), consumed) for position in mine]
        spots += [Spot(part, positions[0], 0.0, consumed)] * (each - len(mine))
    return spots


class CursorBatches:
    """A batch sampler that starts at the cursor: no loader state, nothing is read again after a resume.

    Its length is that of the whole run, in batches done and batches left: Lightning counts the done ones too, and they
    may have been of another size.

    Args:
        cursor: called when iteration starts; samples of the epoch that are used up.
        done: called with it; batches that used them up.
        total: samples of the epoch.
        size: images in a global batch.
        labelled: parts of labelled images in it.
        unlabelled: parts of unlabelled images in it.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        *,
        cursor: Callable[[], int],
        done: Callable[[], int],
        total: int,
        size: int,
        labelled: int,
        unlabelled: int,
        rank: int,
        world: int,
    ) -> None:
        self.cursor, self.done, self.total, self.rank, self.world = cursor, done, total, rank, world
        self.shape = {"size": size, "labelled": labelled, "unlabelled": unlabelled}
        self.per_step = max(size // (labelled + unlabelled), 1) * (unlabelled or labelled)

    def __len__(self) -> int:
        return self.done() + -(-(self.total - self.cursor()) // self.per_step)

    def __iter__(self) -> Iterator[list[Spot]]:
        cursor = self.cursor()
        while cursor < self.total:
            batch = global_batch(cursor=cursor, total=self.total, **self.shape)
            yield share_of(batch, rank=self.rank, world=self.world)
            cursor += min(self.per_step, self.total - cursor)
