"""Videos in and out, frame by frame (PyAV, the extra `video`).

Legend: H W pixels.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from depthany.inference.depth_map import DepthMap
from depthany.inference.map_files import in_place

QUALITY = "18"  # x264's constant rate factor: no loss that is seen
TICK = Fraction(1, 90_000)  # of a written video's clock: whole for 24, 25, 30 and 30000/1001 frames a second
WRONG = 0.02  # a stated rate that is off by more is not believed: some copies state the clock's
SOUND = ("aac", "ac3", "alac", "eac3", "flac", "mp3", "opus")  # what players take in an MP4: copied; any other: AAC


class Frame(NamedTuple):
    """A picture of a video."""

    time_s: Fraction  # when it is shown, counted from the start of the file
    pixels: np.ndarray  # (H, W, 3) uint8 RGB, upright


class VideoFile:
    """The pictures of one video.

    Args:
        path: Of the video.

    Attributes:
        count: Number of frames, or how many the file promises where that is more.
        rate: Frames per second, the mean where they are uneven.

    Raises:
        ValueError: It cannot be read, has no picture, or the package av is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError as error:
            raise ValueError("videos need pip install 'depthany[video]'") from error
        self.path, self._av = path, av
        with self.open() as container:
            stream = container.streams.video[0]
            self.start_s = Fraction(container.start_time or 0, av.time_base)
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            times = [packet.pts for packet in container.demux(stream) if packet.size]
            told = [time for time in times if time is not None]
            if len(told) > 1 and (span_s := (max(told) - min(told)) * Fraction(stream.time_base or 0)):
                mean = (len(told) - 1) / span_s
                if abs(mean / self.rate - 1) > WRONG:
                    self.rate = mean.limit_denominator(1_000_000)
            duration_s = Fraction(stream.duration or 0) * Fraction(stream.time_base or 0)
            if not duration_s and len(container.streams) == 1:  # sound may last longer
                duration_s = Fraction(container.duration or 0, av.time_base)
            # A file that was cut off promises more than it has.
            self.count = max(len(times), stream.frames, int(duration_s * self.rate))

    def frames(self) -> Iterator[Frame]:
        """Each frame, at the time that the file tells; one that it tells nothing of, or too late, at the mean rate.

        Raises:
            ValueError: A frame cannot be decoded or has another size, or the video ends a second too early.
        """
        number, shape, time_s = 0, None, Fraction(-1)
        with self.open() as container:
            for frame in container.decode(container.streams.video[0]):
                told_s = None if frame.pts is None else frame.pts * frame.time_base - self.start_s
                follows_s = time_s + 1 / self.rate if number else Fraction(0)
                time_s = told_s if told_s is not None and told_s > time_s else follows_s
                pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                if (shape := shape or pixels.shape) != pixels.shape:
                    raise ValueError(f"frame {number} has another size than the first")
                yield Frame(time_s, pixels)
                number += 1
        if self.count - number > self.rate or not number:
            raise ValueError(f"damaged: it ends after {number} of {self.count} frames")

    @contextmanager
    def open(self) -> Iterator[Any]:
        """The container of PyAV.

        Raises:
            ValueError: It cannot be read, or has no picture; also while it is open.
        """
        try:
            with self._av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError("no picture in it")
                yield container
        except self._av.FFmpegError as error:
            about = Path(getattr(error, "filename", None) or self.path)  # or the name of a function
            if about != self.path and about.exists():
                raise  # of another file: what is written meanwhile
            what = "" if isinstance(error, FileNotFoundError | PermissionError) else "damaged or no video: "
            raise ValueError(f"{what}{error.strerror}") from error


@contextmanager
def write_video(path: Path, rate: Fraction, *, sound_of: VideoFile | None = None) -> Iterator[Callable[[Frame], None]]:
    """A function that adds a frame to an H.264 video, shown at the frame's time.

    The video is written beside `path` (.mp4) and moved into place when all went well. Odd sides are kept by not
    halving the colours (4:4:4), which few browsers show.

    Args:
        path: of the video.
        rate: frames per second, the mean where they are uneven.
        sound_of: its first sound that can be decoded is copied, or becomes AAC where players want that; None: no sound.

    Raises:
        ValueError: the frames' size is none for H.264, or the sound is damaged.
    """
    import av

    with in_place(path) as beside, av.open(str(beside), "w") as container, ExitStack() as opened:
        stream = container.add_stream("libx264", rate=rate, options={"crf": QUALITY})
        stream.codec_context.time_base = TICK
        sound = opened.enter_context(_sound(sound_of, container)) if sound_of else iter(())
        waiting = next(sound, None)  # the next packets of sound and their time
        tick = -1

        def listen(until_s: Fraction | None) -> None:
            nonlocal waiting
            while waiting is not None and (until_s is None or waiting[0] <= until_s):
                container.mux(waiting[1])
                waiting = next(sound, None)

        def add(frame: Frame) -> None:
            nonlocal tick
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.pixels.shape[:2]
                stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
            listen(frame.time_s)
            picture = av.VideoFrame.from_ndarray(frame.pixels, format="rgb24")
            picture.pts = tick = max(round(frame.time_s / TICK), tick + 1)
            picture.time_base, picture.duration = TICK, round(1 / rate / TICK)
            try:
                container.mux(stream.encode(picture))
            except av.ExternalError as error:
                raise ValueError(f"H.264 takes no frames of {stream.width} x {stream.height} pixels") from error

        yield add
        container.mux(stream.encode())
        listen(None)


@contextmanager
def _sound(video: VideoFile, target: Any) -> Iterator[Iterator[tuple[Fraction, list[Any]]]]:
    """The sound of a video as packets for another one, with the time of each; nothing where it has none."""
    import av

    with video.open() as source:
        streams = [stream for stream in source.streams.audio if stream.codec_context is not None]
        if not streams:
            yield iter(())
            return
        heard, copied = streams[0], streams[0].codec_context.codec.canonical_name in SOUND
        if copied:
            written = target.add_stream_from_template(heard)
        else:  # AAC has few rates: others are resampled
            known = heard.rate in (av.Codec("aac", "w").audio_rates or ())
            written = target.add_stream("aac", rate=heard.rate if known else 48_000)

        def packets() -> Iterator[tuple[Fraction, list[Any]]]:
            time_s = Fraction(0)
            for packet in source.demux(heard):  # the last one is empty: a decoder gives what it still has
                if packet.pts is not None and packet.dts is not None:
                    early = round(video.start_s / packet.time_base)
                    packet.pts, packet.dts = packet.pts - early, packet.dts - early
                    time_s = packet.pts * packet.time_base
                if not copied:
                    yield time_s, [made for frame in packet.decode() for made in written.encode(frame)]
                elif packet.size:
                    packet.stream = written
                    yield time_s, [packet]
            if not copied:
                yield time_s, written.encode()

        yield packets()


@contextmanager
def write_stack(path: Path, rate: Fraction) -> Iterator[Callable[[DepthMap, Fraction], None]]:
    """A function that adds a map to an npz: arrays `000000`, `000001`, … (H, W) float16, NaN where invalid.

    `meaning` (JSON) holds space, near_is_large and fps, `times_s` (N,) when each frame is shown. One frame is in memory
    at a time.
    """
    with in_place(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:

        def store(name: str, array: np.ndarray) -> None:
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue())

        times_s: list[float] = []

        def add(depth: DepthMap, time_s: Fraction) -> None:
            if not times_s:
                meaning = {"space": depth.space, "near_is_large": depth.near_is_large, "fps": float(rate)}
                store("meaning", np.array(json.dumps(meaning)))
            store(f"{len(times_s):06d}", np.where(depth.valid, depth.values, np.nan).astype(np.float16))
            times_s.append(float(time_s))

        yield add
        store("times_s", np.array(times_s))
