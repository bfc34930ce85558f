"""Images in LMDB folders, as LSUN publishes them: each value is one encoded image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from depthany.data.files import DecodeError

MAGIC = {b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"\x89PNG": "png"}


class Lmdb:
    """The values of one LMDB folder, in the order of their keys.

    Args:
        path: of its `data.mdb`. It is opened read-only and without a lock file.

    Raises:
        ModuleNotFoundError: the package lmdb is not installed.
    """

    def __init__(self, path: Path) -> None:
        import lmdb  # an optional dependency

        self.path, self._lmdb = path, lmdb
        self._environment: Any = None
        self._cursor: Any = None
        self._next = 0  # number of the entry under the cursor

    def _open(self) -> int:
        """Opens the database and gives the number of entries.

        Raises:
            DecodeError: damaged, or shorter than it has to be: reading past its end would end the process.
        """
        try:
            self._environment = self._lmdb.open(
                str(self.path.parent), readonly=True, lock=False, readahead=False, create=False
            )
            status, info = self._environment.stat(), self._environment.info()
        except (self._lmdb.Error, OSError) as error:
            self.close()
            raise DecodeError(f"undecodable: {error}") from error
        if self.path.stat().st_size < (info["last_pgno"] + 1) * status["psize"]:
            self.close()
            raise DecodeError("undecodable: cut short; download it again or let it finish")
        return status["entries"]

    def count(self) -> tuple[int, str]:
        """The number of entries, and why none can be read ("": they can)."""
        try:
            return self._open(), ""
        except DecodeError as error:
            return 0, str(error)
        finally:
            self.close()

    def read(self, first: int, count: int) -> Iterator[tuple[str, bytes | DecodeError]]:
        """(name, bytes) of `count` entries from number `first` on; the way there is walked over the keys alone.

        Raises:
            DecodeError: the database cannot be read any further.
        """
        try:
            if self._cursor is None or first < self._next:
                self.close()
                self._open()
                self._cursor, self._next = self._environment.begin().cursor(), 0
                self._cursor.first()
            while self._next < first and self._cursor.next():
                self._next += 1
            for _ in range(count):
                key = self._cursor.key().decode("ascii", "backslashreplace")
                if not key:
                    raise DecodeError("undecodable: it has fewer entries than before")
                data = bytes(self._cursor.value())
                self._cursor.next()
                self._next += 1
                suffix = next((name for magic, name in MAGIC.items() if data.startswith(magic)), "bin")
                yield f"{key}.{suffix}", data
        except self._lmdb.Error as error:
            self.close()
            raise DecodeError(f"undecodable: {error}") from error

    def close(self) -> None:
        """Closes the database; one process may open a database only once at a time."""
        if self._environment is not None:
            self._environment.close()
        self._environment = self._cursor = None
