"""Claims: which one of several processes, on any number of machines, is at work on a file or folder.

A claim is a small file `.<name>.claim` beside what is claimed. Creating it is exclusive, its owner touches it while it
lives, and one that is no longer touched is taken over by creating, exclusively again, the file that is named after the
dead claim: `.<name>.claim.<nonce>`. The last of these files is the owner's, so exactly one heir is possible and nobody
ever removes a claim that may be another's. Nothing but the shared folder is needed: no lock server, no file locks.
"""

import json
import os
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, NamedTuple

STALE_S = 120.0  # more than the minute for which network file systems may show old times
NAMELESS_S = 5.0  # after which a claim without a name counts as dead: its owner was killed before it could write it
BEATS = 6  # heartbeats within the time after which a claim is stale


@dataclass(frozen=True)
class Holder:
    """Who holds a claim."""

    host: str
    pid: int
    here: bool = False  # among the processes of this machine and container, so that it is known to be alive

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class _Link(NamedTuple):
    file: Path
    nonce: str
    note: dict[str, Any]  # empty where the owner was killed before it could write
    touched: float


class Claim:
    """A claim that is held; its heartbeat runs until `release`, which the end of a `with` block calls."""

    def __init__(self, root: Path, nonce: str, fd: int, stale_s: float) -> None:
        self._root, self._nonce, self._fd = root, nonce, fd
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(stale_s / BEATS,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def still_mine(self) -> bool:
        """Whether nobody has taken over, as happens to a process that was stopped for longer than the stale time.

        To be asked before results take their final name.
        """
        links, _ = _chain(self._root)
        return bool(links) and links[-1].nonce == self._nonce

    def release(self) -> None:
        """Gives the claim back; does nothing where it is lost or given back already."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        os.close(self._fd)
        links, _ = _chain(self._root)
        if links and links[-1].nonce == self._nonce:
            for link in links:  # the first one first: what is left after a kill here belongs to no chain
                link.file.unlink(missing_ok=True)

    def _beat(self, every_s: float) -> None:
        while not self._ended.wait(every_s):
            try:
                os.utime(self._fd)  # by descriptor: it can never touch another's claim
            except OSError:  # a file system that is away for a while; the claim is lost or not, still_mine tells
                continue


def claim(path: Path, *, stale_s: float) -> Claim | None:
    """Claims a file or folder that exists or is to be made; None where somebody alive holds it.

    Args:
        path: what is claimed; its folder must exist and be writable.
        stale_s: seconds without a heartbeat after which an owner counts as dead; every rival uses the same. On one
            machine an owner whose process is gone counts as dead at once.

    Raises:
        OSError: the folder cannot be written.
    """
    root = path.with_name(f".{path.name}.claim")
    while True:
        links, free = _chain(root)
        if links and _is_alive(links[-1], stale_s):
            return None
        nonce = secrets.token_hex(8)
        note = {"host": socket.gethostname(), "pid": os.getpid(), "space": _space(), "born": _born(os.getpid())}
        try:
            fd = os.open(free, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue  # another was faster
        try:
            os.write(fd, json.dumps(note | {"nonce": nonce}).encode())
            os.fsync(fd)  # it stays open, and a network file system would keep what is written to itself
        except OSError:  # the disk is full
            os.close(fd)
            free.unlink(missing_ok=True)
            raise
        links, _ = _chain(root)
        if links and links[-1].nonce == nonce:
            return Claim(root, nonce, fd, stale_s)
        os.close(fd)  # what it was to follow has been given back in the meantime
        free.unlink(missing_ok=True)


def holder(path: Path, *, stale_s: float) -> Holder | None:
    """Who holds the claim of a file or folder; None where nobody alive does."""
    links, _ = _chain(path.with_name(f".{path.name}.claim"))
    if not links or not _is_alive(links[-1], stale_s):
        return None
    note = links[-1].note
    here = note.get("space") == _space()
    return Holder(str(note.get("host", "an unknown host")), int(note.get("pid", 0)), here)


def _chain(root: Path) -> tuple[list[_Link], Path]:
    """The claims that follow one another, the owner's last, and the name of the next one."""
    links: list[_Link] = []
    file = root
    while True:
        try:
            with open(file, "rb") as opened:  # opening brings the true times and content from a network file system
                status = os.fstat(opened.fileno())
                text = opened.read()
        except FileNotFoundError:
            return links, file
        try:
            note = json.loads(text)
        except ValueError:
            note = {}
        links.append(_Link(file, note.get("nonce", f"i{status.st_ino}"), note, status.st_mtime))
        file = root.with_name(f"{root.name}.{links[-1].nonce}")


def _is_alive(link: _Link, stale_s: float) -> bool:
    if link.note.get("space") == _space() and _born(link.note["pid"]) != link.note["born"]:
        return False
    with TemporaryFile(dir=link.file.parent) as now:  # the clocks of machines differ: ask the file system's
        patience_s = stale_s if link.note else min(stale_s, NAMELESS_S)
        return os.fstat(now.fileno()).st_mtime - link.touched <= patience_s


def _space() -> str:
    """Where process numbers mean the same: this boot of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _born(pid: int) -> str | None:
    """When a process of this machine was started, so that a number given out again is told apart; None: it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        num_threads, born = rest[16], rest[18]  # fields 20 and 22 of proc_pid_stat(5)
        # Files stay open, and locked, until the last thread is gone, which may be after the first one.
        return None if state in "ZX" and int(num_threads) <= 1 else born
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:  # not Linux: the number alone has to do
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
