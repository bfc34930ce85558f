"""Videos in and out, frame by frame (PyAV, the extra `video`).

Legend: H W pixels.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from depthany.inference.depth_map import DepthMap
from depthany.inference.map_files import in_place

QUALITY = "18"  # x264's constant rate factor: no loss that is seen


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
        with self._open() as container:
            stream = container.streams.video[0]
            self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
            duration_s = Fraction(stream.duration or 0) * Fraction(stream.time_base or 0)
            if not duration_s and len(container.streams) == 1:  # sound may last longer
                duration_s = Fraction(container.duration or 0, av.time_base)
            packets = sum(packet.size > 0 for packet in container.demux(stream))
            # A file that was cut off promises more than it has.
            self.count = max(packets, stream.frames, int(duration_s * self.rate))

    def frames(self) -> Iterator[np.ndarray]:
        """Each frame (H, W, 3) uint8 RGB, upright.

        Raises:
            ValueError: A frame cannot be decoded or has another size, or the video ends a second too early.
        """
        number, shape = 0, None
        with self._open() as container:
            for frame in container.decode(container.streams.video[0]):
                pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))
                if (shape := shape or pixels.shape) != pixels.shape:
                    raise ValueError(f"frame {number} has another size than the first")
                yield pixels
                number += 1
        if self.count - number > self.rate or not number:
            raise ValueError(f"damaged: it ends after {number} of {self.count} frames")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with self._av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise ValueError("no picture in it")
                yield container
        except self._av.FFmpegError as error:
            what = "" if isinstance(error, FileNotFoundError | PermissionError) else "damaged or no video: "
            raise ValueError(f"{what}{error.strerror}") from error


@contextmanager
def write_video(path: Path, rate: Fraction) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that adds a frame (H, W, 3) uint8 RGB to an H.264 video without sound.

    The video is written beside `path` (.mp4) and moved into place when all went well. Odd sides are kept by not
    halving the colours (4:4:4), which few browsers show.
    """
    import av

    with in_place(path) as beside, av.open(str(beside), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": QUALITY})

        def add(frame: np.ndarray) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
            try:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            except av.ExternalError as error:
                raise ValueError(f"H.264 takes no frames of {stream.width} x {stream.height} pixels") from error

        yield add
        container.mux(stream.encode())


@contextmanager
def write_stack(path: Path, rate: Fraction) -> Iterator[Callable[[DepthMap], None]]:
    """A function that adds a map to an npz: arrays `000000`, `000001`, … (H, W) float16, NaN where invalid.

    `meaning` (JSON) holds space, near_is_large and fps. One frame is in memory at a time.
    """
    with in_place(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED) as archive:

        def store(name: str, array: np.ndarray) -> None:
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue())

        number = 0

        def add(depth: DepthMap) -> None:
            nonlocal number
            if not number:
                meaning = {"space": depth.space, "near_is_large": depth.near_is_large, "fps": float(rate)}
                store("meaning", np.array(json.dumps(meaning)))
            store(f"{number:06d}", np.where(depth.valid, depth.values, np.nan).astype(np.float16))
            number += 1

        yield add
