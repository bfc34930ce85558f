"""The ledger: of what was done twice, the last time; of what was undone, nothing."""

import json
from pathlib import Path

import pytest

from depthany.callbacks.ledger import Used, history


def write(run: Path, attempt: int, *steps: tuple[int, int, int, list[list[str]]], torn: str = "") -> None:
    """One attempt: of each batch the step, the cursor before and after it, and the keys of each rank."""
    (run / "ledger").mkdir(exist_ok=True)
    for rank in range(max(len(keys) for *_, keys in steps)):
        lines = [
            {"step": s, "first": f, "seen": e, "labelled": [], "unlabelled": keys[rank], "skipped": []}
            for s, f, e, keys in steps
            if rank < len(keys)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines) + (torn if rank else "")
        (run / "ledger" / f"{attempt:06d}-rank{rank}.jsonl").write_text(text)


def test_the_lineage_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    """Killed after step 3 with a checkpoint of step 1; the next start takes larger batches on one rank."""
    write(
        tmp_path, 1, (1, 0, 4, [["a", "b"], ["c", "d"]]), (2, 4, 8, [["e", "f"], ["g"]]), (3, 8, 9, [["i"]]), torn="{"
    )
    write(tmp_path, 2, (2, 4, 9, [["e", "f", "g", "h", "i"]]))
    assert history(tmp_path) == [
        Used(1, 0, 4, [], ["a", "b", "c", "d"], []),
        Used(2, 4, 9, [], ["e", "f", "g", "h", "i"], []),
    ]


def test_an_attempt_that_wrote_nothing_undoes_nothing(tmp_path: Path) -> None:
    write(tmp_path, 1, (1, 0, 2, [["a", "b"]]))
    (tmp_path / "ledger" / "000002-rank0.jsonl").write_text("")
    (tmp_path / "ledger" / "000003-rank0.jsonl").write_text('{"step": 2')
    write(tmp_path, 10, (2, 2, 4, [["c", "d"]]))  # after 9, not after 1
    assert [key for batch in history(tmp_path) for key in batch.unlabelled] == ["a", "b", "c", "d"]


def test_damage_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1, (1, 0, 2, [["a", "b"]]))
    path = tmp_path / "ledger" / "000001-rank0.jsonl"
    path.write_text("{torn\n" + path.read_text())
    with pytest.raises(ValueError):
        history(tmp_path)


def test_ranks_stand_in_their_order_however_many(tmp_path: Path) -> None:
    write(tmp_path, 1, (1, 0, 12, [[f"{rank:02d}"] for rank in range(12)]))
    (batch,) = history(tmp_path)
    assert batch.unlabelled == sorted(batch.unlabelled) and len(batch.unlabelled) == 12
