"""How a job ends: in one line, with an exit code that says what to do."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import torch

from depthany.config.check import ConfigError
from depthany.types import DISK_FULL, GOES_ON, NO_ROOM, STOPPED


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(STOPPED)


@contextmanager
def ends_in_a_line(
    *,
    done: str,
    fault: str,
    way_out: str,
    refused: tuple[type[Exception], ...],
    stop: Callable[[int, FrameType | None], object] | None = None,
) -> Iterator[None]:
    """Tells what ends the job in one line; exit code 75 after SIGTERM or SIGUSR1, 130 after Ctrl-C, 73 for a full disk.

    Args:
        done: what the job has done with what stays, for example labelled.
        fault: what an error of the system means, for example "labels cannot be written".
        way_out: what to do about it.
        refused: errors that say in their own words what the user has to change.
        stop: handles SIGTERM, SIGUSR1 and SIGINT; None: the first two end the job at once.

    Raises:
        ConfigError: anything else that the user has to change.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, *([signal.SIGINT] if stop else [])):
        signal.signal(number, stop or _stop)
    try:
        yield
    except refused as error:
        raise ConfigError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise ConfigError("the GPU's memory is too small for a batch: lower the batch size") from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in NO_ROOM:
            _end(DISK_FULL, f"{where}the disk is full; what is {done} stays: make room; {GOES_ON}")
        raise ConfigError(f"{where}{fault} ({error.strerror or error}): {way_out}") from error
    except KeyboardInterrupt:
        _end(130, f"stopped; {GOES_ON}")
    except SystemExit:
        _end(STOPPED, f"stopped by a signal; {GOES_ON}")


def _end(code: int, line: str) -> NoReturn:
    print(f"depthany: {line}", file=sys.stderr)
    raise SystemExit(code)
