"""What several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Starts real processes in a moment."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def real_root() -> Path:
    """Folder of the real images and labels; tests that need it are skipped where it is missing."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "real"
    root = Path(os.environ.get("DEPTHANY_REAL", beside))
    if not (root / "index.csv").is_file():
        pytest.skip(f"no real data in {root}: name its folder in DEPTHANY_REAL")
    return root
