"""Frames of videos, decoded at a stated step by PyAV."""

from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthany.data.files import DecodeError

VIDEOS = (".mov", ".mp4", ".avi", ".mkv", ".webm", ".m4v")


class Video:
    """The frames shown at 0, `step_s`, 2 `step_s`, ... of one video, each as a JPEG.

    Args:
        path: of the video.
        step_s: seconds between two frames.
        quality: of the JPEGs, 1 to 100.

    Raises:
        ModuleNotFoundError: the package av is not installed.
    """

    def __init__(self, path: Path, *, step_s: float, quality: int) -> None:
        import av  # an optional dependency

        self.path, self._av, self.quality = path, av, quality
        self.step = Fraction(str(step_s))
        self._frames: Iterator[np.ndarray | DecodeError] = iter(())
        self._next: int | None = None  # number of the frame that `_frames` gives next

    def count(self) -> tuple[int, str]:
        """The number of frames at this step by the header's duration, and why none can be read ("": they can)."""
        try:
            with self._av.open(str(self.path)) as container:
                return ceil(self._duration(container) / self.step), ""
        except (self._av.FFmpegError, DecodeError) as error:
            return 0, f"undecodable: {error}; download it again or let it finish"

    def read(self, first: int, count: int) -> Iterator[tuple[str, bytes | DecodeError]]:
        """(name, bytes) of `count` frames from number `first` on; going forward, the video is decoded once.

        Raises:
            DecodeError: the video cannot be decoded any further.
        """
        try:
            if self._next is None or first < self._next:
                self._frames, self._next = self._decode(), 0
            for _ in range(first + count - self._next):
                number, frame = self._next, next(self._frames)
                self._next += 1
                if number >= first:
                    yield f"{number:06d}.jpg", frame if isinstance(frame, DecodeError) else self._jpeg(frame)
        except (self._av.FFmpegError, DecodeError, StopIteration) as error:
            self._next = None
            raise DecodeError(f"undecodable: {error or 'the video ends early'}") from error

    def _duration(self, container: Any) -> Fraction:
        """In seconds.

        Raises:
            DecodeError: there is no picture, or its duration is not stated.
        """
        if not container.streams.video:
            raise DecodeError("no picture in it")
        stream = container.streams.video[0]
        if stream.duration:
            return stream.duration * stream.time_base
        if container.duration:
            return Fraction(container.duration, self._av.time_base)
        raise DecodeError("its duration is not stated")

    def _decode(self) -> Iterator[np.ndarray | DecodeError]:
        """(H, W, 3) uint8 BGR, upright, for each step in turn."""
        with self._av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # many videos are decoded side by side
            number, total = 0, ceil(self._duration(container) / self.step)
            shown: Any = None
            shown_s, tick_s = Fraction(0), Fraction(stream.time_base or 0)
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                time_s = (frame.pts - (stream.start_time or 0)) * tick_s
                while shown is not None and number < total and number * self.step < time_s:
                    yield _upright(shown)
                    number += 1
                shown, shown_s = frame, time_s
            while number < total:
                late = shown is None or number * self.step - shown_s > self.step
                yield DecodeError(f"undecodable: the video ends at {float(shown_s):.1f} s") if late else _upright(shown)
                number += 1

    def _jpeg(self, frame: np.ndarray) -> bytes:
        return cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1].tobytes()

    def close(self) -> None:
        """Gives the decoder back."""
        self._frames, self._next = iter(()), None


def _upright(frame: Any) -> np.ndarray:
    """The display matrix, by which phones store how they were held, says how far to turn counterclockwise."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="bgr24"), round(frame.rotation / 90)))
