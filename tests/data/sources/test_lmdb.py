"""LMDB folders: every value once, in the order of the keys; a file cut short is told before it is touched."""

from pathlib import Path

import pytest

from depthany.data.files import DecodeError

pytest.importorskip("lmdb", reason="needs depthany[lmdb]")
from depthany.data.sources.lmdb import Lmdb
from tests.data.sources.writers.unlabelled import picture, write_lmdb

VALUES = {f"{seed * 7919 % 101:040x}": picture(seed, format="WEBP" if seed % 2 else "JPEG") for seed in range(20)}
WANTED = [(f"{key}.{'webp' if data[:1] == b'R' else 'jpg'}", data) for key, data in sorted(VALUES.items())]


def test_values_in_order_from_anywhere(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "x_lmdb", VALUES)
    before = sorted(path.name for path in (tmp_path / "x_lmdb").iterdir())
    database = Lmdb(tmp_path / "x_lmdb" / "data.mdb")
    assert database.count() == (20, "")
    for first, count in ((0, 3), (3, 4), (12, 8), (1, 1), (0, 20)):
        assert list(database.read(first, count)) == WANTED[first : first + count]
    with pytest.raises(DecodeError, match="fewer entries"):
        list(database.read(15, 6))
    database.close()
    assert sorted(path.name for path in (tmp_path / "x_lmdb").iterdir()) == before


def test_a_database_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """Reading past the end of a mapped file would end the process without a word."""
    write_lmdb(tmp_path / "x_lmdb", VALUES)
    file = tmp_path / "x_lmdb" / "data.mdb"
    data = file.read_bytes()
    for size in (0, 100, 4096, 8192, 3 * 4096, len(data) // 2, len(data) - 4096):
        file.write_bytes(data[:size])
        number, problem = Lmdb(file).count()
        assert number == 0 and problem.startswith("undecodable: ")
        with pytest.raises(DecodeError):
            list(Lmdb(file).read(0, 1))
    file.unlink()
    assert Lmdb(file).count()[1].startswith("undecodable: ")
