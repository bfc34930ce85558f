"""Reading wherever files lie: the same bytes or a clear error, in bounded time, over a real server that breaks."""

import hashlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

from depthany.data import storage
from depthany.data.storage import StorageError, fetch, is_remote, read, shown
from tests.flaky_server import FAULTS, FlakyServer

CONTENT = hashlib.shake_128(b"content").digest(3_000_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A served folder with one large and one small file."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "x.tar").write_bytes(CONTENT)
    (served / "x.json").write_text('{"é": 1}', encoding="utf-8")
    return served


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(storage, "PAUSE_S", 0.001)
    monkeypatch.setattr(storage, "SPARE", 0)  # copies are kept however full the disk under the tests is


def checked(offset: int, size: int) -> Callable[[bytes], bytes]:
    """As a reader with a checksum does."""

    def parse(data: bytes) -> bytes:
        if data != CONTENT[offset : offset + size]:
            raise ValueError("wrong bytes")
        return data

    return parse


def is_content(path: Path) -> None:
    if path.read_bytes() != CONTENT:
        raise ValueError("wrong copy")


RANGES = [(0, 1), (0, 5000), (1, 4999), (1_048_575, 3), (700_001, 2_100_000), (2_999_999, 1), (0, 3_000_000)]


# --- the same bytes, whatever breaks ----------------------------------------------------------------------------------


def test_local_bytes(folder: Path) -> None:
    path = str(folder / "x.tar")
    for offset, size in RANGES:
        assert read(path, bytes, offset=offset, size=size) == CONTENT[offset : offset + size]
    assert read(path, bytes) == CONTENT
    assert read(str(folder / "x.json"), bytes.decode) == '{"é": 1}'
    assert read(path, bytes, offset=2_999_990, size=11) == CONTENT[2_999_990:]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.2, pytest.param(0.6, marks=pytest.mark.slow)])
def test_a_server_that_breaks_gives_the_same_bytes(folder: Path, share: float, announced: bool) -> None:
    with FlakyServer(folder, share=share, announced=announced) as server:
        for turn in range(3):
            for offset, size in [*RANGES, *((1000 * turn + i, 100 + i) for i in range(10))]:
                assert read(f"{server.url}/x.tar", checked(offset, size), offset=offset, size=size)
        assert (max(server.requests.values()) > 3) == (share > 0)
        assert storage.read(f"{server.url}/x.json", lambda data: data.decode().index("é")) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_is_broken_is_given_up(folder: Path, fault: str) -> None:
    with FlakyServer(folder, share=1.0, faults=[fault], in_a_row=1000) as server:
        started = time.monotonic()
        with pytest.raises((StorageError, ValueError)) as caught:
            read(f"{server.url}/x.tar", checked(10, 100_000), offset=10, size=100_000)
        assert time.monotonic() - started < storage.TRIES * (storage.TIMEOUT_S + 0.2)
        assert set(server.requests.values()) == {storage.TRIES}
        if fault == "wrong":
            assert str(caught.value) == "wrong bytes"
        else:
            assert str(caught.value).startswith(f"{server.url}/x.tar cannot be read, tried 5 times: ")


def test_a_server_that_is_not_there_is_given_up() -> None:
    with pytest.raises(StorageError, match=r"tried 5 times: .*127\.0\.0\.1"):
        read("http://127.0.0.1:9/x.tar", bytes, size=1)


def test_what_does_not_exist_is_asked_for_once(folder: Path, tmp_path: Path) -> None:
    with FlakyServer(folder) as server:
        with pytest.raises(StorageError, match=r"/y\.tar is missing"):
            read(f"{server.url}/y.tar", bytes, offset=5, size=1)
        assert sum(server.requests.values()) == 1
    with pytest.raises(StorageError, match=r"/y\.tar is missing"):
        read(str(tmp_path / "y.tar"), bytes.decode)
    with pytest.raises(StorageError, match="cannot be read: Is a directory"):
        read(str(tmp_path), bytes)


def test_a_server_without_ranges_needs_the_cache(folder: Path, tmp_path: Path) -> None:
    with FlakyServer(folder, ranges=False) as server:
        assert read(f"{server.url}/x.tar", bytes, size=100) == CONTENT[:100]
        with pytest.raises(StorageError, match="whole files only: set `cache` to a folder"):
            read(f"{server.url}/x.tar", bytes, offset=100, size=100)
        got = fetch(f"{server.url}/x.tar", str(tmp_path / "cache"), size=len(CONTENT), version="", check=is_content)
        assert got.read_bytes() == CONTENT


def test_texts_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_TEXT", 2_000_000)
    with FlakyServer(folder) as server, pytest.raises(StorageError, match="more than 2000000 bytes"):
        read(f"{server.url}/x.tar", bytes)
    with pytest.raises(ValueError, match="more than 2000000 bytes"):
        read(str(folder / "x.tar"), bytes)


def test_a_network_disk_that_fails_for_a_moment(folder: Path) -> None:
    """Real disks cannot be made to fail here: the attempt is a real read after errors that NFS gives."""
    errors = [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]

    def attempt() -> bytes:
        if errors:
            raise errors.pop()
        return (folder / "x.tar").read_bytes()

    assert storage.retry("x.tar", attempt) == CONTENT
    with pytest.raises(StorageError, match=r"x\.tar cannot be read, tried 5 times: Input/output error"):
        storage.retry("x.tar", lambda: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(ZeroDivisionError):  # an error of ours is no failure of the disk
        storage.retry("x.tar", lambda: 1 // 0)


def test_object_stores_are_read_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of every store but HTTP, through a file system of fsspec that needs no network."""
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/x.tar", CONTENT)
    monkeypatch.setattr(storage, "SCHEMES", ("memory",))
    wrapped = AsyncFileSystemWrapper(memory, asynchronous=False)
    monkeypatch.setitem(storage._filesystems, (os.getpid(), "memory"), wrapped)
    for offset, size in RANGES:
        assert read("memory://bucket/x.tar", bytes, offset=offset, size=size) == CONTENT[offset : offset + size]
    assert read("memory://bucket/x.tar", bytes) == CONTENT
    with pytest.raises(StorageError, match="is missing"):
        read("memory://bucket/y.tar", bytes)


def test_a_store_whose_package_is_missing_is_told() -> None:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(StorageError, match=r"s3://bucket/x\.tar: reading s3:// needs another package \(.*s3fs"):
            read("s3://bucket/x.tar", bytes, size=1)
    else:
        pytest.skip("s3fs is installed")


# --- processes --------------------------------------------------------------------------------------------------------


def read_some(url: str, results: Any) -> None:
    for offset, size in RANGES:
        read(url, checked(offset, size), offset=offset, size=size)
    results.put(os.getpid())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_beside_their_parent(folder: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    with FlakyServer(folder, share=0.3 if method == "fork" else 0.0) as server:
        url = f"{server.url}/x.tar"
        read(url, checked(0, 9), size=9)  # the parent has connections open
        children = [context.Process(target=read_some, args=(url, results)) for _ in range(2)]
        for child in children:
            child.start()
        for offset, size in RANGES:
            read(url, checked(offset, size), offset=offset, size=size)
        assert {results.get(timeout=60) for _ in children} == {child.pid for child in children}
        for child in children:
            child.join(20)
            assert child.exitcode == 0
        read(url, checked(0, 9), size=9)


# --- copies -----------------------------------------------------------------------------------------------------------


def copies(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if not path.name.startswith(".")]


def get(url: str, cache: Path, check: Callable[[Path], object] = is_content) -> Path:
    return fetch(url, str(cache), size=len(CONTENT), version="1", check=check)


def get_and_tell(url: str, cache: Path, results: Any) -> None:
    results.put(get(url, cache).name)


def test_one_download_for_all_processes(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with FlakyServer(folder) as server:
        arguments = (f"{server.url}/x.tar", tmp_path / "cache", results)
        children = [context.Process(target=get_and_tell, args=arguments) for _ in range(4)]
        for child in children:
            child.start()
        assert len({results.get(timeout=30) for _ in children}) == 1
        for child in children:
            child.join()
        assert sum(server.requests.values()) == 1
    assert [path.read_bytes() == CONTENT for path in copies(tmp_path / "cache")] == [True]


def test_a_broken_download_goes_on_where_it_broke(folder: Path, tmp_path: Path) -> None:
    with FlakyServer(folder, share=1.0, faults=["reset", "short", "stall"], in_a_row=1) as server:
        assert get(f"{server.url}/x.tar", tmp_path).read_bytes() == CONTENT
        assert len(server.requests) == 2  # two ranges: from the beginning, and from where it broke
        assert server.sent < 1.6 * len(CONTENT)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_copies_are_checked(folder: Path, tmp_path: Path, share: float) -> None:
    with FlakyServer(folder, share=share) as server:
        for i in range(6):
            got = get(f"{server.url}/x.tar?{i}", tmp_path / "cache")
            assert got.read_bytes() == CONTENT
    assert len(copies(tmp_path / "cache")) == 6
    with FlakyServer(folder, share=1.0, faults=["wrong"], in_a_row=1000) as server:
        with pytest.raises(ValueError, match="wrong copy"):
            get(f"{server.url}/x.tar", tmp_path / "cache")
        assert sum(server.requests.values()) == storage.TRIES
    assert len(copies(tmp_path / "cache")) == 6 and not list((tmp_path / "cache").glob(".*.part"))


def test_files_of_one_name_and_versions_of_one_file_are_kept_apart(folder: Path, tmp_path: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "x.tar").write_bytes(b"other")
    with FlakyServer(folder) as server:

        def small(version: str) -> bytes:
            url = f"{server.url}/other/x.tar"
            return fetch(url, str(tmp_path), size=5, version=version, check=lambda _: None).read_bytes()

        get(f"{server.url}/x.tar", tmp_path)
        assert small("1") == b"other"
        (folder / "other" / "x.tar").write_bytes(b"newer")
        assert small("1") == b"other" and small("2") == b"newer"
    assert len([path for path in copies(tmp_path) if path.is_file()]) == 3


@pytest.mark.slow
def test_a_killed_download_leaves_no_copy_and_does_not_stand_in_the_way(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with FlakyServer(folder, share=1.0, faults=["stall"], in_a_row=1) as server:
        for ends in (signal.SIGKILL, signal.SIGSTOP):
            cache = tmp_path / ends.name
            child = context.Process(target=get, args=(f"{server.url}/x.tar?{ends}", cache))
            child.start()
            deadline = time.monotonic() + 20
            while not list(cache.glob(".*.part")) or not next(cache.glob(".*.part")).stat().st_size:
                assert time.monotonic() < deadline
                time.sleep(0.002)
            assert child.pid
            os.kill(child.pid, ends)
            assert copies(cache) == []
            started = time.monotonic()
            assert get(f"{server.url}/x.tar?{ends}", cache).read_bytes() == CONTENT
            assert time.monotonic() - started < 2 * storage.TRIES * storage.TIMEOUT_S + 5
            child.kill()
            child.join()


@pytest.mark.parametrize(("spare", "twentieth"), [(1 << 30, len(CONTENT)), (len(CONTENT), 5 << 40)])
def test_the_longest_unused_copies_make_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spare: int, twentieth: int
) -> None:
    """A twentieth of a small disk stays free, and no more than SPARE of a large one."""
    monkeypatch.setattr(storage, "SPARE", spare)
    cache = tmp_path / "cache"
    (cache / "mine").mkdir(parents=True)
    (cache / "mine.txt").write_text("not a copy")
    with FlakyServer(folder) as server:
        made = [get(f"{server.url}/x.tar?{i}", cache) for i in range(4)]
        for age, path in enumerate(made):
            os.utime(path, (1e9 - age, 1e9 - age))
        assert get(f"{server.url}/x.tar?3", cache) == made[3]  # the oldest one is used now

        def usage(folder: Path) -> Any:  # a disk that is too full until two copies are gone
            free = len(CONTENT) * (5 - len(list(Path(folder).glob("*-x.tar*"))))
            return type("Usage", (), {"total": 20 * twentieth, "free": free})

        monkeypatch.setattr("shutil.disk_usage", usage)
        newest = get(f"{server.url}/x.tar?4", cache)
    assert set(copies(cache)) == {made[0], made[3], newest, cache / "mine", cache / "mine.txt"}
    assert (cache / "mine").is_dir() and (cache / "mine.txt").read_text() == "not a copy"


def get_on_a_small_disk(url: str, cache: Path, results: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        get(url, cache)
    except StorageError as error:
        results.put(str(error))


def test_a_full_disk_is_told(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with FlakyServer(folder) as server:
        child = context.Process(target=get_on_a_small_disk, args=(f"{server.url}/x.tar", tmp_path, results))
        child.start()
        message = results.get(timeout=20)
        child.join()
    assert message == f"cache={tmp_path}: File too large; give it room, or set it to null"
    assert not list(tmp_path.glob(".*.part")) and not list(tmp_path.glob("*-x.tar"))


# --- what is not read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "pipe:touch canary; cat x.tar",
        "pipe://touch canary",
        "http:touch canary",
        "file:" + "///etc/passwd",
        "local:///etc/passwd",
        "ssh://host/x.tar",
        "sftp://host/x.tar",
        "ftp://host/x.tar",
        "github://org:repo@/x.tar",
        "zip://x.tar::http://host/x.zip",
        "simplecache::http://host/x.tar",
        "http://host/x.tar::zip://y",
        "reference://x",
        "dask://x",
        "python:os.system('touch canary')",
    ],
)
def test_nothing_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str) -> None:
    monkeypatch.chdir(tmp_path)
    for attempt in (is_remote, lambda location: read(location, bytes)):
        with pytest.raises(StorageError, match="neither a path nor a URL that is read"):
            attempt(location)
    assert list(tmp_path.iterdir()) == []


def test_paths_are_paths(tmp_path: Path) -> None:
    for path in ("x.tar", "./pipe:x", "/data/a:b/x.tar", "../http://x", "C:\\x", "|touch canary", "$(touch canary)"):
        assert not is_remote(path)
    for url in ("http://h/x", "https://h:8/x?y=1", "s3://b/x", "gs://b/x", "az://c/x", "abfs://c/x"):
        assert is_remote(url)


def test_secrets_are_not_shown(folder: Path) -> None:
    assert shown("https://me:secret@host/a/x.tar?sig=secret&y=1") == "https://...@host/a/x.tar?..."
    assert shown("what?/x@y/z") == "what?/x@y/z"
    with pytest.raises(StorageError) as caught:
        read("http://me:secret@127.0.0.1:9/x.tar?sig=secret", bytes, size=1)
    assert "secret" not in str(caught.value) and "//...@127.0.0.1:9/x.tar?..." in str(caught.value)
