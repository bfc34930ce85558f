"""The order: every sample once, wherever and however often the run is cut."""

from collections import Counter
from itertools import pairwise, product

import pytest

from depthany.data.order import CursorBatches, EpochOrder, Spot, global_batch, share_of, used_of

COUNTS = [[1], [7], [1] * 9, [5, 3, 8, 1, 1, 4], [100, 100, 37], [0, 4, 0, 6, 0], [2] * 40]
RATIOS = [(1, 0), (0, 1), (1, 2), (1, 1), (2, 1), (3, 5)]


def whole(counts: list[int], *, seed: int = 0, window: int = 2, epoch: int = 0) -> list[tuple[int, int]]:
    order = EpochOrder(counts=counts, seed=seed, window=window)
    return [order[epoch * len(order) + i] for i in range(len(order))]


def batches(*, cursor: int = 0, rank: int = 0, world: int = 1, **shape: int) -> list[list[Spot]]:
    return list(CursorBatches(cursor=lambda: cursor, done=lambda: 0, rank=rank, world=world, **shape))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("window", [1, 2, 3, 8, 1000])
def test_an_epoch_is_a_permutation(counts: list[int], window: int) -> None:
    everything = {(chunk, i) for chunk, count in enumerate(counts) for i in range(count)}
    for epoch in range(3):
        seen = whole(counts, window=window, epoch=epoch)
        assert len(seen) == len(everything) and set(seen) == everything


def test_the_order_is_pure_whatever_was_asked_before() -> None:
    counts, positions = [5, 3, 8, 1, 1, 4], range(66)
    expected = whole(counts) + whole(counts, epoch=1) + whole(counts, epoch=2)
    used = EpochOrder(counts=counts, seed=0, window=2)
    for position in [*positions, *reversed(positions), *(p * 29 % 66 for p in positions)]:
        assert used[position] == expected[position]


def test_seed_and_epoch_change_the_order() -> None:
    counts = [20, 20, 20, 20]
    orders = [tuple(whole(counts, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_samples_of_a_window_are_shuffled_into_each_other() -> None:
    chunks = [chunk for chunk, _ in whole([50, 50, 50, 50], window=4)]
    assert sum(a != b for a, b in pairwise(chunks)) > 100
    assert whole([50], window=1) != sorted(whole([50], window=1))


@pytest.mark.parametrize("window", [1, 3, 4])
def test_reading_is_local(window: int) -> None:
    """A window of positions touches `window` chunks, and an epoch comes to each chunk in one window only."""
    counts = [10] * 11
    seen = whole(counts, window=window)
    windows = [{chunk for chunk, _ in seen[first : first + 10 * window]} for first in range(0, 110, 10 * window)]
    assert all(len(chunks) == window for chunks in windows[:-1])
    assert sum(map(len, windows)) == len(counts)


@pytest.mark.parametrize(("labelled", "unlabelled"), RATIOS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_position_is_used_once_and_every_step_is_a_true_mean(labelled: int, unlabelled: int, world: int) -> None:
    counted = "unlabelled" if unlabelled else "labelled"
    for total, size in product([1, 2, 5, 12, 31], [1, 3, 4, 6, 16]):
        shape = {"total": total, "size": size, "labelled": labelled, "unlabelled": unlabelled}
        ranks = [batches(rank=rank, world=world, **shape) for rank in range(world)]
        used: Counter[tuple[str, int]] = Counter()
        for step in zip(*ranks, strict=True):
            assert len({len(share) for share in step}) == 1 and len(step[0]) > 0  # no rank waits for another
            assert len({spot.consumed for share in step for spot in share}) == 1
            for part in {spot.part for share in step for spot in share}:
                weights = [spot.weight for share in step for spot in share if spot.part == part]
                assert sum(weights) / world == pytest.approx(1)
                assert len({w for w in weights if w}) == 1  # each image counts alike
            used.update((spot.part, spot.position) for share in step for spot in share if spot.weight)
        assert all(times == 1 for times in used.values())
        assert {position for part, position in used if part == counted} == set(range(total))
        assert sum(step[0].consumed for step in ranks[0]) == total
        assert len(ranks[0]) == len(CursorBatches(cursor=lambda: 0, done=lambda: 0, rank=0, world=world, **shape))


@pytest.mark.parametrize("size", [3, 6, 8, 24])
def test_one_labelled_for_two_unlabelled(size: int) -> None:
    """V1, section 4.1: in every whole batch and over the epoch; the labelled order runs on without a gap."""
    steps = batches(total=50, size=size, labelled=1, unlabelled=2)
    for step in steps[:-1]:
        parts = Counter(spot.part for spot in step)
        assert parts["unlabelled"] == 2 * parts["labelled"] == size // 3 * 2
    labelled = [spot.position for step in steps for spot in step if spot.part == "labelled"]
    assert labelled == list(range(25))


def test_the_last_short_batch_is_kept() -> None:
    last = batches(total=11, size=6, labelled=1, unlabelled=2)[-1]
    assert [(spot.part, spot.position, spot.weight) for spot in last] == [
        ("unlabelled", 8, 1 / 3),
        ("unlabelled", 9, 1 / 3),
        ("unlabelled", 10, 1 / 3),
        ("labelled", 4, 1.0),
    ]
    single = batches(total=9, size=6, labelled=1, unlabelled=2)[-1]
    assert [spot.part for spot in single] == ["unlabelled", "labelled"]


@pytest.mark.parametrize(("labelled", "unlabelled"), [(0, 1), (1, 2), (1, 3)])
def test_neighbours_are_the_same_pairs_for_any_number_of_ranks(labelled: int, unlabelled: int) -> None:
    """CutMix partners are neighbours 2k and 2k + 1 among a rank's unlabelled images, both of weight > 0."""

    def pairs(size: int, world: int) -> list[set[tuple[int, int]]]:
        shape = {"total": 37, "size": size, "labelled": labelled, "unlabelled": unlabelled}
        steps = []
        for shares in zip(*(batches(rank=rank, world=world, **shape) for rank in range(world)), strict=True):
            found = set()
            for share in shares:
                mine = [spot for spot in share if spot.part == "unlabelled"]
                couples = zip(mine[::2], mine[1::2], strict=False)
                found |= {(a.position, b.position) for a, b in couples if a.weight and b.weight}
            steps.append(found)
        return steps

    for size in (4, 5, 7, 12):
        assert pairs(size, 1) == pairs(size, 2) == pairs(size, 3)


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_goes_on_with_the_same_batches(world: int) -> None:
    shape = {"total": 29, "size": 6, "labelled": 1, "unlabelled": 2}
    for rank in range(world):
        uninterrupted = batches(rank=rank, world=world, **shape)
        cursor = 0
        for i, step in enumerate(uninterrupted):
            assert batches(cursor=cursor, rank=rank, world=world, **shape) == uninterrupted[i:]
            cursor += step[0].consumed
        assert cursor == 29 and batches(cursor=29, rank=rank, world=world, **shape) == []


def test_the_cursor_is_asked_when_iteration_starts() -> None:
    used = [0]
    shape = {"total": 10, "size": 4, "labelled": 1, "unlabelled": 0}
    sampler = CursorBatches(cursor=lambda: used[0], done=lambda: 0, rank=0, world=1, **shape)
    first = next(iter(sampler))
    used[0] = 4
    assert [s.position for s in first] == [0, 1, 2, 3] and [s.position for s in next(iter(sampler))] == [4, 5, 6, 7]


@pytest.mark.parametrize("before", [1, 3, 6, 8, 100])
def test_the_batch_may_change_on_a_restart(before: int) -> None:
    """Every position still once; the length counts what was done in the old size and what is left in the new one."""
    shape = {"total": 31, "labelled": 1, "unlabelled": 2}
    for done in range(len(batches(size=before, **shape)) + 1):
        first = batches(size=before, **shape)[:done]
        cursor = sum(step[0].consumed for step in first)
        for after in (2, 6, 9, 50):
            rest = batches(cursor=cursor, size=after, **shape)
            used = [s.position for step in first + rest for s in step if s.part == "unlabelled"]
            assert used == list(range(31))
            given = {"cursor": lambda c=cursor: c, "done": lambda d=done: d}
            assert len(CursorBatches(**given, size=after, rank=0, world=1, **shape)) == len(first + rest)


def test_no_stream_of_random_numbers_is_used_twice() -> None:
    """NumPy takes [seed], [seed, 0] and [seed, 0, 0] for one seed: shards and samples were permuted alike."""
    order = EpochOrder(counts=[1], seed=0, window=1)
    keys = [(epoch, stream) for epoch in range(3) for stream in range(5)]
    assert len({order._random(*key).bytes(8) for key in keys}) == len(keys)


def test_padding_has_weight_zero_and_a_real_position() -> None:
    batch = global_batch(cursor=0, total=3, size=3, labelled=0, unlabelled=1)
    shares = [share_of(batch, rank=rank, world=2) for rank in range(2)]
    assert [[(s.position, s.weight > 0) for s in share] for share in shares] == [
        [(0, True), (1, True)],
        [(2, True), (0, False)],
    ]


@pytest.mark.parametrize("counts", [[5, 3, 0, 8, 1], [1], [9, 40]], ids=str)
def test_sources_of_weight_one_change_no_position(counts: list[int]) -> None:
    plain = EpochOrder(counts=counts, seed=3, window=2)
    weighted = EpochOrder(counts=counts, seed=3, window=2, weights=[(1, 1.0), (len(counts) - 1, 1)])
    assert [plain[i] for i in range(3 * len(plain))] == [weighted[i] for i in range(3 * len(plain))]


@pytest.mark.parametrize("weight", [0, 0.001, 0.1, 1 / 3, 0.5, 0.999, 1.75, 2, 2.5, 3])
def test_a_weighted_source_uses_its_images_alike(weight: float) -> None:
    """After any number of epochs no image of it was used more than once more often than another."""
    counts = [4, 4, 5, 3, 0, 8, 1]  # two chunks of a source of weight 1, five of the weighted one
    order = EpochOrder(counts=counts, seed=1, window=3, weights=[(2, 1.0), (5, weight)])
    each = used_of(17, weight)
    assert len(order) == 8 + each and abs(each - 17 * weight) <= (1 if weight < 0.1 else 0.5)
    images = [[(chunk, i) for chunk in chunks for i in range(counts[chunk])] for chunks in (range(2), range(2, 7))]
    used: Counter[tuple[int, int]] = Counter()
    for epoch in range(34):
        seen = [order[epoch * len(order) + i] for i in range(len(order))]
        assert set(seen) <= {*images[0], *images[1]}
        used.update(seen)
        assert {used[image] for image in images[0]} == {epoch + 1}
        times = [used[image] for image in images[1]]
        assert sum(times) == each * (epoch + 1) and max(times) - min(times) <= 1
    assert len(set(times)) == 1  # 34 epochs are twice the 17 images
    asked = EpochOrder(counts=counts, seed=1, window=3, weights=[(2, 1.0), (5, weight)])
    assert [asked[i] for i in reversed(range(len(seen)))] == [order[i] for i in reversed(range(len(seen)))]


def test_the_kept_images_lie_evenly_over_a_source() -> None:
    """Every second frame, not the first half of the scenes."""
    order = EpochOrder(counts=[10] * 6, seed=0, window=2, weights=[(6, 0.5)])
    assert Counter(order[i][0] for i in range(30)) == dict.fromkeys(range(6), 5)
