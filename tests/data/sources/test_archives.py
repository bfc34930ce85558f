"""Tars: every whole image once, in order, plain or gzipped; damage is told, nothing leaves the archive."""

import gzip
import io
import random
import resource
import tarfile
import time
from pathlib import Path

import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.archives import MAX_BYTES, Tar, is_image_name
from tests.data.sources.writers.unlabelled import tar_of


def content(i: int) -> bytes:
    return random.Random(i).randbytes(512 * (i % 3) + 100 * (i % 5))  # sizes that are, and are not, whole blocks


FILES = {f"./folder/{i:03d}.jpg" if i % 4 else f"{i:03d}.json": content(i) for i in range(12)}
IMAGES = [(name.removeprefix("./"), data) for name, data in FILES.items() if name.endswith("jpg")]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("packed", [False, True])
def test_images_in_order_from_anywhere(packed: bool, format: int, tmp_path: Path) -> None:
    long = "d" * 120 + "/é.jpg" if format != tarfile.USTAR_FORMAT else "é.jpg"
    data = tar_of(FILES | {long: b"long"}, format=format)
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(data) if packed else data)
    tar, images = Tar(path), [*IMAGES, (long, b"long")]
    assert tar.count() == (len(images), "")
    for first, count in ((0, 3), (3, 2), (7, 2), (1, 1), (0, len(images))):
        assert list(tar.read(first, count)) == images[first : first + count]
    tar.close()


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_tar_gives_its_whole_images_and_their_numbers_stay(packed: bool, tmp_path: Path) -> None:
    data = tar_of(FILES)
    if packed:
        data = gzip.compress(data)
    end = len(data) if packed else len(data.rstrip(b"\0"))
    path, most = tmp_path / "x.tar", 0
    for size in range(1, end, 97):
        path.write_bytes(data[:size])
        number, problem = Tar(path).count()
        assert problem.startswith("undecodable: ") and f"after {number} whole images" in problem
        assert list(Tar(path).read(0, number)) == IMAGES[:number] and number >= most
        with pytest.raises(DecodeError):
            list(Tar(path).read(0, len(IMAGES) + 1))
        most = number
    assert most == len(IMAGES) - 1


def test_damage_is_not_taken_for_the_end(tmp_path: Path) -> None:
    """tarfile ends silently at a broken header."""
    data = bytearray(tar_of(FILES))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        header = tar.getmember("./folder/005.jpg").offset
    path = tmp_path / "x.tar"
    for broken in (data[:header] + b"\xff" * 512 + data[header + 512 :], data[:header] + b"\x01" + data[header + 1 :]):
        path.write_bytes(broken)
        with tarfile.open(path) as silent:
            assert len(list(silent)) == 5
        number, problem = Tar(path).count()
        assert number in (2, 3) and "damaged header" in problem


def test_a_gzip_with_a_wrong_checksum_is_told(tmp_path: Path) -> None:
    """The headers are sound, but some image is not what it was."""
    data = bytearray(gzip.compress(tar_of(FILES)))
    data[len(data) // 2] ^= 255
    (tmp_path / "x.tar.gz").write_bytes(data)
    number, problem = Tar(tmp_path / "x.tar.gz").count()
    assert number < len(IMAGES) and "CRC check failed" in problem


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\x1f\x8b", bytes(100), b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    number, problem = Tar(tmp_path / "x.tar").count()
    assert number == 0 and problem.startswith("undecodable: ")


def test_a_missing_tar_is_unreadable(tmp_path: Path) -> None:
    assert Tar(tmp_path / "x.tar").count()[1].startswith("unreadable: ")
    with pytest.raises(DecodeError, match="unreadable"):
        list(Tar(tmp_path / "x.tar").read(0, 1))


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def test_bombs_cost_nothing(tmp_path: Path) -> None:
    """A long name of gigabytes, a negative size, an image of terabytes: told, without the memory or the time."""
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "x.tar"
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        path.write_bytes(gzip.compress(header("x", 1 << 33, kind) + bytes(1 << 26)))
        assert Tar(path).count() == (
            0,
            "undecodable: a damaged header after 0 whole images; download it again or let it finish",
        )
    negative = bytearray(header("a.jpg", 0))
    negative[124:136] = b"\xff" * 11 + b"\x00"
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:]) + 8 * 32)
    path.write_bytes(bytes(negative) + bytes(2048))
    assert "damaged header" in Tar(path).count()[1]
    path.write_bytes(header("big.jpg", MAX_BYTES + 1) + bytes(2048))
    [(name, error)] = Tar(path).read(0, 1)
    assert name == "big.jpg" and isinstance(error, DecodeError) and "more than an image has" in str(error)
    assert time.monotonic() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


def test_a_name_that_comes_twice_stays_two_images(tmp_path: Path) -> None:
    first, second = tar_of({"a.jpg": b"1", "b.jpg": b"2"}), tar_of({"./a.jpg": b"3", "a.jpg": b"4"})
    (tmp_path / "x.tar").write_bytes(first.rstrip(b"\0").ljust(2048, b"\0") + second)
    wanted = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a~2.jpg", b"3"), ("a~3.jpg", b"4")]
    assert list(Tar(tmp_path / "x.tar").read(0, 4)) == wanted
    assert list(Tar(tmp_path / "x.tar").read(3, 1)) == wanted[3:]


def test_names_of_images() -> None:
    assert all(map(is_image_name, ["a.jpg", "a/b.JPEG", "x.y.png", "n01440764_1.JPEG", "a.webp"]))
    assert not any(map(is_image_name, ["a.json", "._a.jpg", "a/._b.jpg", "jpg", "a.jpg.part", "a.tar"]))
