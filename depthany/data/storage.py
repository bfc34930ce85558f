"""Bytes of files wherever they lie: disks and network disks by their paths, HTTP and object stores through fsspec.

Every read ends: a piece that does not come within TIMEOUT_S is asked for again, at most TRIES times with growing
pauses, and then there is a StorageError. Nothing is ever read through a shell, and no URL leads to another kind of
store.
"""

import asyncio
import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.asyn import sync

SCHEMES = ("http", "https", "s3", "gs", "az", "abfs")  # fsspec knows many more, some of which start programs
TRIES = 5
TIMEOUT_S = 30.0  # for PIECE bytes
PAUSE_S = 0.5  # before the second try; doubled for each further one
FORGET_S = 60.0  # what could not be read is not asked for again in this time: other samples need not wait for it too
PIECE = 1 << 20
MAX_TEXT = 1 << 28  # bytes of a file whose size is not known beforehand
SPARE = 1 << 30  # bytes of a disk that stay free beside copies; of a small disk a twentieth
ROOM = "give it room, or set it to null"

T = TypeVar("T")
# One for each process and scheme. Those of the parent stay here, unused, in a forked process: closing them there would
# take the parent's connections off the event loop that both share.
_filesystems: dict[tuple[int, str], Any] = {}


class StorageError(OSError):
    """A location that cannot be read; the message is one line that names it."""


class Unreachable(StorageError):
    """A store that does not answer, whatever is asked for: nothing is wrong with the file."""


def outage(error: BaseException | None) -> Unreachable | None:
    """The outage that an error comes from; None where it does not come from one."""
    while error is not None and not isinstance(error, Unreachable):
        error = error.__cause__
    return error


def is_remote(location: str) -> bool:
    """Whether a location is a URL, and not a path.

    Raises:
        StorageError: it is a URL of a kind that is not read (`pipe:`, `file:`, chains with `::`, ...).
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", location)
    if scheme is None:
        return False
    if scheme[1] not in SCHEMES or not location.startswith(f"{scheme[1]}://") or "::" in location:
        kinds = ", ".join(f"{name}://" for name in SCHEMES)
        raise StorageError(f"{shown(location)} is neither a path nor a URL that is read ({kinds})")
    return True


def shown(location: str) -> str:
    """A location as messages show it: without user name, password and signature."""
    return re.sub(r"(://[^?\s]*)\?\S*", r"\1?...", re.sub(r"://[^/@\s]*@", "://...@", location))


def retry(location: str, attempt: Callable[[], T], *, progress: Callable[[], int] = int) -> T:
    """Calls `attempt` until it returns, at most TRIES times in a row without progress, with growing pauses.

    Raises:
        StorageError: it is not there, not allowed, or every try failed.
        ValueError: what came is not what was wanted, every time; of local files at once.
    """
    failures, reached = 0, progress()
    while True:
        try:
            return attempt()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StorageError(f"{shown(location)} is missing: copy it there again, or correct the path") from error
        except (PermissionError, IsADirectoryError) as error:
            raise StorageError(f"{shown(location)} cannot be read: {_reason(error)}") from error
        except StorageError:
            raise
        except Exception as error:  # every store has errors of its own
            if not is_remote(location) and not isinstance(error, OSError):
                raise
            failures, reached = 1 if progress() > reached else failures + 1, progress()
            if failures == TRIES:
                if isinstance(error, ValueError):
                    raise
                kind = Unreachable if is_remote(location) else StorageError
                raise kind(f"{shown(location)} cannot be read, tried {TRIES} times: {_reason(error)}") from error
        time.sleep(PAUSE_S * 2 ** (failures - 1) * random.SystemRandom().uniform(0.5, 1.5))


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(error, asyncio.IncompleteReadError):
        return "the answer ended early"
    return " ".join(shown(str(getattr(error, "strerror", None) or error)).split())[:200] or type(error).__name__


def read(location: str, parse: Callable[[bytes], T], *, offset: int = 0, size: int | None = None) -> T:
    """What `parse` makes of some bytes of a file; of a remote one they are read again where it raises a ValueError.

    Args:
        location: path or URL.
        parse: takes the bytes; fewer than `size` where the file ends.
        offset: of the first byte.
        size: how many; None: all, at most MAX_TEXT.

    Raises:
        StorageError: it cannot be read.
        ValueError: by `parse`.
    """
    if is_remote(location):
        filesystem = _filesystem(location)
        return retry(location, lambda: parse(sync(filesystem.loop, _gather, location, offset, size)))
    return retry(location, lambda: parse(_pread(location, offset, size)))


def _pread(path: str, offset: int, size: int | None) -> bytes:
    with open(path, "rb") as file:
        wanted = os.fstat(file.fileno()).st_size - offset if size is None else size
        if size is None and wanted > MAX_TEXT:
            raise ValueError(f"{path} has more than {MAX_TEXT} bytes")
        return os.pread(file.fileno(), wanted, offset)


def _filesystem(location: str) -> Any:
    scheme = location.partition(":")[0]
    if (os.getpid(), scheme) not in _filesystems:
        try:
            made = fsspec.filesystem(scheme, skip_instance_cache=True)
        except ImportError as error:
            raise StorageError(f"{shown(location)}: reading {scheme}:// needs another package ({error})") from error
        _filesystems[os.getpid(), scheme] = made
    return _filesystems[os.getpid(), scheme]


async def _gather(location: str, offset: int, size: int | None) -> bytes:
    data = bytearray()
    async with aclosing(_pieces(location, offset, None if size is None else offset + size)) as pieces:
        async for at, piece in pieces:
            if at != offset + len(data):
                raise Unreachable(f"{shown(location)}: its server sends whole files only: set `cache` to a folder")
            data += piece
            if size is None and len(data) > MAX_TEXT:
                raise StorageError(f"{shown(location)} has more than {MAX_TEXT} bytes")
    return bytes(data)


async def _pieces(location: str, start: int, stop: int | None) -> AsyncGenerator[tuple[int, bytes], None]:
    """(offset, bytes) from `start` on; from 0 on where a server ignores ranges. Each piece has TIMEOUT_S."""
    filesystem = _filesystem(location)
    if not location.startswith("http"):
        path = filesystem._strip_protocol(location)
        while stop is None or start < stop:
            end = start + PIECE if stop is None else min(start + PIECE, stop)
            piece = await asyncio.wait_for(filesystem._cat_file(path, start=start, end=end), TIMEOUT_S)
            yield start, piece
            start += len(piece)
            if len(piece) < PIECE:
                return
        return
    if start == stop:
        return
    options = dict(filesystem.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    session = await filesystem.set_session()
    request = session.get(filesystem.encode_url(location), **options, headers=headers, timeout=_no_total())
    async with await asyncio.wait_for(request, TIMEOUT_S) as response:
        _check_status(response, location)
        at = start if response.status == 206 else 0
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise ConnectionError(f"the server sent {response.headers.get('Content-Range')} for {headers['Range']}")
        while stop is None or at < stop:
            try:
                wanted = PIECE if stop is None else min(PIECE, stop - at)
                piece = await asyncio.wait_for(response.content.readexactly(wanted), TIMEOUT_S)
            except asyncio.IncompleteReadError as error:
                if stop is not None:
                    raise
                yield at, error.partial
                return
            yield at, piece
            at += len(piece)


def _no_total() -> Any:
    """Instead of aiohttp's five minutes for a whole answer; every piece is timed by itself."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None)


def _check_status(response: Any, location: str) -> None:
    status = response.status
    if status in (404, 410):
        raise FileNotFoundError(location)
    if status in (408, 425, 429) or status >= 500:
        raise ConnectionError(f"the server answered {status}")
    if status not in (200, 206):
        raise StorageError(f"{shown(location)}: the server answered {status}")


def fetch(location: str, cache: str, *, size: int | None, version: str, check: Callable[[Path], object]) -> Path:
    """A local copy of a remote file, downloaded once for all processes of a machine.

    The copy is named by the hash of URL and version and takes that name when it is whole and checked. Where the disk
    is nearly full, the copies that were not used for the longest time make room.

    Args:
        location: URL.
        cache: folder of the copies.
        size: bytes of the file; None: as they come, at most MAX_TEXT.
        version: what tells the file from an older one of the same URL, such as its sha256.
        check: raises a ValueError where the copy is not what it should be.

    Raises:
        StorageError: it cannot be downloaded, or the disk is full.
        ValueError: by `check`, after as many downloads as there are tries.
    """
    name = hashlib.sha256(f"{location}\n{version}".encode()).hexdigest()[:24] + "-" + location.rpartition("/")[2]
    path = Path(cache) / name
    try:
        os.utime(path)  # used now
        return path
    except FileNotFoundError:
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f".{name[:2]}.lock"), "ab") as lock:  # one of 256: nobody ever deletes them
            part = path.with_name(f".{name}.part")
            if not _alone(lock, part):
                part = path.with_name(f".{name}.{os.getpid()}.part")
            if path.exists():  # another process was faster
                return path
            _make_room(path.parent, size or 0)
            try:
                retry(location, lambda: _download(location, part, size, check))
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cache={cache}: {_reason(error)}; {ROOM}") from error
    return path


def _download(location: str, part: Path, size: int | None, check: Callable[[Path], object]) -> None:
    filesystem = _filesystem(location)
    with open(part, "wb") as file:

        async def copy(file: BinaryIO) -> None:
            async with aclosing(_pieces(location, file.tell(), size)) as pieces:
                async for at, piece in pieces:
                    if file.seek(at) + len(piece) > MAX_TEXT and size is None:
                        raise StorageError(f"{shown(location)} has more than {MAX_TEXT} bytes")
                    try:
                        file.write(piece)
                    except OSError as error:  # not the store's
                        raise StorageError(f"cache={part.parent}: {_reason(error)}; {ROOM}") from error

        retry(location, lambda: sync(filesystem.loop, copy, file), progress=file.tell)
        file.flush()
        os.fsync(file.fileno())
    check(part)


def _alone(lock: BinaryIO, part: Path) -> bool:
    """Waits until no other process of this machine downloads; False where one does and its `part` stands still."""
    seen, since = -1, time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as error:  # a file system without locks: two may download, each to a name of its own
            if error.errno == errno.EINTR:
                continue
            return False
        now = part.stat().st_size if part.exists() else 0
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > 2 * TRIES * TIMEOUT_S:
            return False
        time.sleep(0.02)


def _make_room(folder: Path, needed: int) -> None:
    """Deletes copies, those first that were not used for the longest time, until a file fits and SPARE stays free."""
    copies = [path for path in folder.iterdir() if re.match(r"[0-9a-f]{24}-", path.name)]
    used = {path: path.stat().st_mtime for path in copies if path.exists()}
    for path in sorted(used, key=lambda path: used[path]):
        disk = shutil.disk_usage(folder)
        if disk.free - needed > min(SPARE, disk.total // 20):
            return
        path.unlink(missing_ok=True)
