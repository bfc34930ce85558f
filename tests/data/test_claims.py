"""Claims held by real processes: raced for, killed, stopped and woken."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from depthany.data.claims import BEATS, NAMELESS_S, claim, holder

FORK = multiprocessing.get_context("fork")
STALE_S = 0.4
LONG_S = 60.0  # nobody is late within a test


def child(work: Callable[..., None], *given: object) -> BaseProcess:
    process = FORK.Process(target=work, args=given, daemon=True)
    process.start()
    return process


def hold(path: Path, stale_s: float, told, release) -> None:
    """Claims, tells whether it got it, holds it until told to stop, and tells whether it was still its own."""
    mine = claim(path, stale_s=stale_s)
    told.put(mine is not None)
    if mine:
        release.wait(20)
        told.put(mine.still_mine())
        mine.release()


def holding(path: Path, stale_s: float) -> tuple[BaseProcess, object, object]:
    told, release = FORK.Queue(), FORK.Event()
    process = child(hold, path, stale_s, told, release)
    assert told.get(timeout=20)
    return process, told, release


def kill(process: BaseProcess) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_one_holds_it_and_gives_it_back(tmp_path):
    path = tmp_path / "x.tar"
    with claim(path, stale_s=LONG_S) as mine:
        assert mine.still_mine() and claim(path, stale_s=LONG_S) is None
        assert holder(path, stale_s=LONG_S).pid == os.getpid()
        assert claim(tmp_path / "y.tar", stale_s=LONG_S).still_mine()  # another file is another claim
    assert not mine.still_mine() and holder(path, stale_s=LONG_S) is None
    mine.release()  # twice does no harm
    again = claim(path, stale_s=LONG_S)
    assert again.still_mine() and not mine.still_mine()
    again.release()
    assert not list(tmp_path.glob(".x.tar*"))


def test_a_heartbeat_keeps_it(tmp_path):
    with claim(tmp_path / "x", stale_s=STALE_S) as mine:
        time.sleep(3 * STALE_S)
        assert claim(tmp_path / "x", stale_s=STALE_S) is None and mine.still_mine()


def test_a_killed_owner_is_followed_at_once_and_an_heir_too(tmp_path):
    path = tmp_path / "x"
    for _ in range(3):  # each follows a dead one: the chain grows
        process, *_ = holding(path, LONG_S)
        kill(process)
    assert holder(path, stale_s=LONG_S) is None and len(list(tmp_path.iterdir())) == 3
    with claim(path, stale_s=LONG_S) as mine:
        assert mine.still_mine()
    assert not list(tmp_path.iterdir())


def test_a_killed_owner_that_nobody_has_waited_for_is_dead(tmp_path):
    """A child that its parent has not joined yet keeps its number as a zombie."""
    process, *_ = holding(tmp_path / "x", LONG_S)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert claim(tmp_path / "x", stale_s=LONG_S)


def test_a_stopped_owner_loses_it_and_knows_when_it_wakes(tmp_path):
    path = tmp_path / "x"
    process, told, release = holding(path, STALE_S)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(STALE_S / 4)
    assert claim(path, stale_s=STALE_S) is None  # not at once
    time.sleep(1.5 * STALE_S)
    mine = claim(path, stale_s=STALE_S)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(2 * STALE_S / BEATS)  # it beats again
    release.set()
    assert told.get(timeout=20) is False
    process.join()
    assert mine.still_mine() and claim(path, stale_s=STALE_S) is None  # its release gave nothing away
    mine.release()
    assert not list(tmp_path.iterdir())


def test_an_owner_elsewhere_is_judged_by_its_heartbeat_alone(tmp_path):
    """Another machine's process numbers mean nothing here, and its clock may be wrong: only file times are compared."""
    note = {"host": "elsewhere", "pid": 2**22 + 1, "space": "another boot", "born": "1", "nonce": "abc"}
    file = tmp_path / ".x.claim"
    file.write_text(json.dumps(note))
    assert claim(tmp_path / "x", stale_s=LONG_S) is None
    assert str(holder(tmp_path / "x", stale_s=LONG_S)) == f"process {2**22 + 1} on elsewhere"
    os.utime(file, (time.time() - 2 * LONG_S,) * 2)
    assert claim(tmp_path / "x", stale_s=LONG_S)


def test_an_owner_killed_before_it_could_write_its_name(tmp_path):
    (tmp_path / ".x.claim").touch()
    assert claim(tmp_path / "x", stale_s=LONG_S) is None
    os.utime(tmp_path / ".x.claim", (time.time() - 1.5 * NAMELESS_S,) * 2)
    with claim(tmp_path / "x", stale_s=LONG_S) as mine:
        assert mine.still_mine()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(OSError):
        claim(tmp_path / "missing" / "x", stale_s=LONG_S)


def race(folder: Path, rounds: int, barrier, told) -> None:
    for turn in range(rounds):
        barrier.wait(20)
        told.put((turn, claim(folder / str(turn), stale_s=LONG_S) is not None))
    barrier.wait(20)  # nobody dies before all have tried


@pytest.mark.parametrize("dead", [0, 2], ids=["a free one", "a dead owner's"])
def test_of_rivals_exactly_one_wins(tmp_path, dead):
    rounds, rivals = 20, 3
    for name in range(rounds):
        links = [f".{name}.claim", f".{name}.claim.0"][:dead]
        for depth, link in enumerate(links):  # a dead owner and its dead heir
            note = {"host": "elsewhere", "pid": 1, "space": "another boot", "born": "1", "nonce": str(depth)}
            (tmp_path / link).write_text(json.dumps(note))
            os.utime(tmp_path / link, (time.time() - 2 * LONG_S,) * 2)
    barrier, told = FORK.Barrier(rivals), FORK.Queue()
    processes = [child(race, tmp_path, rounds, barrier, told) for _ in range(rivals)]
    results = [told.get(timeout=20) for _ in range(rounds * rivals)]
    for process in processes:
        process.join()
    assert [sum(won for turn, won in results if turn == number) for number in range(rounds)] == [1] * rounds


def count_up(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    while not path.with_name("enough").exists():
        if mine := claim(path.with_name("x"), stale_s=LONG_S):
            with mine:
                before = path.read_text()
                time.sleep(rng.uniform(0, 0.002))
                beside = path.with_name(str(os.getpid()))
                beside.write_text(f"{int(before) + 1}")
                beside.replace(path)  # a kill leaves a number
                with open(path.with_name("log"), "a") as log:
                    log.write("x")


def test_never_two_at_once_though_owners_are_killed(tmp_path):
    """A counter that is read, then written, loses a count whenever two hold the claim; SIGKILL loses at most one."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    rng = random.Random(0)
    alive, kills = [child(count_up, counter, i) for i in range(3)], 12
    for killed in range(kills):
        time.sleep(rng.uniform(0.02, 0.1))
        kill(alive.pop(0))
        alive.append(child(count_up, counter, 100 + killed))
    time.sleep(0.3)
    (tmp_path / "enough").touch()
    for process in alive:
        process.join()
    counted, logged = int(counter.read_text()), (tmp_path / "log").stat().st_size
    assert 1 <= logged <= counted <= logged + kills
