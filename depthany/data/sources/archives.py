"""Images in tars, plain or gzipped: read in the order in which they lie there, into memory; nothing is extracted."""

import gzip
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from depthany.data.files import DecodeError
from depthany.data.sources.photos import SUFFIXES

MAX_BYTES = 256 * 2**20  # an image file that is larger is none
MAX_HEADER = 2**20  # bytes of a long name; more would be read into memory before anybody looks at it
TARS = (".tar", ".tar.gz", ".tgz")
GZIPPED = (".gz", ".tgz")


def is_image_name(name: str) -> bool:
    """Whether a file is called like an image: by its suffix, and not hidden (some systems add "._x.jpg")."""
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and path.name[0] != "."


class _Member(tarfile.TarInfo):
    """Damage is an error: tarfile takes a broken or missing header for the end (python/cpython issue 120740)."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if isinstance(buf, bytes) and len(buf) == 512 and not any(buf):
                raise  # the end mark
            raise tarfile.ReadError("cut short" if len(buf) < 512 else "a damaged header") from error
        long = member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if member.size < 0 or (long and member.size > MAX_HEADER):
            raise tarfile.ReadError("a damaged header")
        return member


class Tar:
    """The images of one tar. What else is in it, such as the masks of SA-1B, is passed over by its suffix.

    Args:
        path: of the tar; whether it is gzipped is seen from its content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._images: Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]] = iter(())
        self._next: int | None = None  # number of the image that `_images` gives next

    def count(self) -> tuple[int, str]:
        """The images that are there whole, and what is wrong with the rest ("": nothing).

        While a tar is still being downloaded, those at its beginning can be used already; their numbers stay.
        """
        whole = pending = 0
        try:
            for _ in self._walk():  # an image is whole once the next one, or the end, is reached
                whole, pending = whole + pending, 1
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            return whole, f"{_reason(error)} after {whole} whole images; download it again or let it finish"
        return whole + pending, ""

    def read(self, first: int, count: int) -> Iterator[tuple[str, bytes | DecodeError]]:
        """(name, bytes) of `count` images from number `first` on; going forward, the tar is read once.

        Raises:
            DecodeError: the tar cannot be read any further.
        """
        try:
            if self._next is None or first < self._next:
                self._images, self._next = self._walk(), 0
            for _ in range(first + count - self._next):
                name, tar, member = next(self._images)
                self._next += 1
                if self._next > first:
                    yield name, _content(tar, member)
        except (tarfile.TarError, OSError, EOFError, zlib.error, StopIteration) as error:
            self._next = None
            raise DecodeError(_reason(error)) from error

    def _walk(self) -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]:
        seen = Counter[int]()  # by the hash of the name: a tar may hold a name twice
        with open(self.path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            plain = gzip.GzipFile(fileobj=file) if gzipped else file
            with tarfile.open(fileobj=plain, mode="r:", tarinfo=_Member) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a million of them
                    name = member.name.removeprefix("./")
                    if is_image_name(name) and not member.isdir():
                        seen[hash(name)] += 1
                        again, path = seen[hash(name)], PurePosixPath(name)
                        yield name if again == 1 else f"{path.with_suffix('')}~{again}{path.suffix}", tar, member
            if gzipped and len(plain.read(MAX_HEADER)) == MAX_HEADER:  # at its end, gzip compares the checksum of all
                raise tarfile.ReadError("much behind the end mark")

    def close(self) -> None:
        """Gives the file back."""
        self._images, self._next = iter(()), None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | DecodeError:
    if not member.isreg():
        return DecodeError("unsafe: a link or device in a tar")
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return DecodeError("unsafe: its name leads out of the tar")
    if member.size > MAX_BYTES:
        return DecodeError(f"undecodable: {member.size} bytes are more than an image has")
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise tarfile.ReadError("cut short")
    return data


def _reason(error: BaseException) -> str:
    """What the disk is to blame for is "unreadable" and may be mended; damage is "undecodable"."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"unreadable: {error.strerror}"
    return f"undecodable: {str(error) if isinstance(error, tarfile.TarError | OSError | zlib.error) else 'cut short'}"
