"""Videos: the frame that is shown at each step, upright; a cut video gives what it has."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from depthany.data.files import DecodeError, read_image

av = pytest.importorskip("av", reason="needs depthany[video]")
from depthany.data.sources.video import Video  # noqa: E402


def write_video(path: Path, times: list[Fraction], *, last_s: Fraction = Fraction(1, 10), offset: int = 0) -> None:
    """A video whose frame i is shown from times[i] on, of brightness 10 + 4 i; its upper left quarter is black."""
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.bit_rate = 64, 48, 4_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate([*times, times[-1] + last_s]):  # a last one gives the one before its duration
            pixels = np.full((48, 64, 3), 10 + 4 * i, np.uint8)
            pixels[:24, :32] = 0
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = int(time * 1000) + offset, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def number_of(data: bytes | DecodeError) -> int:
    assert isinstance(data, bytes)
    return round((float(read_image(data)[30:, 40:].mean()) - 10) / 4)


def test_the_frame_shown_at_each_step(tmp_path: Path) -> None:
    """10 frames a second, one taken every 0.25 s: 0, 0.25, 0.5, ... show frames 0, 2, 5, 7, 10, ..."""
    path = tmp_path / "x.mov"
    write_video(path, [Fraction(i, 10) for i in range(29)])
    video = Video(path, step_s=0.25, quality=95)
    total, problem = video.count()
    assert (total, problem) == (12, "")
    frames = list(video.read(0, total))
    assert [name for name, _ in frames] == [f"{k:06d}.jpg" for k in range(total)]
    assert [number_of(data) for _, data in frames] == [k * 10 // 4 for k in range(total)]
    for first, count in ((3, 2), (5, 4), (1, 1)):  # forward and back
        assert list(video.read(first, count)) == frames[first : first + count]
    video.close()


def test_uneven_times_and_a_late_start(tmp_path: Path) -> None:
    times = [Fraction(0), Fraction(1, 20), Fraction(9, 10), Fraction(1), Fraction(19, 10)]
    path = tmp_path / "x.mov"
    write_video(path, times)
    video = Video(path, step_s=0.5, quality=95)
    assert [number_of(data) for _, data in video.read(0, 4)] == [0, 1, 3, 3]


def turned(data: bytes, matrix: list[int]) -> bytes:
    """Writes a display matrix into the track header, as phones do."""
    at = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 8  # version, times and numbers, reserved, layer to volume
    return data[:at] + b"".join(value.to_bytes(4, "big", signed=True) for value in matrix) + data[at + 36 :]


@pytest.mark.parametrize(("sine", "dark"), [(1, "upper right"), (-1, "lower left")])
def test_frames_are_upright(sine: int, dark: str, tmp_path: Path) -> None:
    """The matrix [0 s; -s 0] turns clockwise on the screen for s = 1: what was upper left is upper right."""
    path, one = tmp_path / "x.mov", 1 << 16
    write_video(path, [Fraction(0), Fraction(1, 10)])
    path.write_bytes(turned(path.read_bytes(), [0, sine * one, 0, -sine * one, 0, 0, 0, 0, 1 << 30]))
    [(_, data)] = Video(path, step_s=1, quality=95).read(0, 1)
    image = read_image(data)  # type: ignore[arg-type]
    assert image.shape == (64, 48, 3)
    quarter = image[4:28, 28:44] if dark == "upper right" else image[36:60, 4:20]
    assert quarter.mean() < 4 and np.sort(image.reshape(-1))[len(image.reshape(-1)) // 2] > 6


def test_a_cut_video_gives_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "x.mov"
    write_video(path, [Fraction(i, 10) for i in range(60)])
    data = path.read_bytes()
    index = data.index(b"moov") - 4
    assert data.index(b"mdat") < index
    path.write_bytes(data[:index])  # the index is written last
    number, problem = Video(path, step_s=0.5, quality=95).count()
    assert number == 0 and problem.startswith("undecodable: ")

    damaged = bytearray(data)
    damaged[index // 2 : index] = bytes(index - index // 2)
    path.write_bytes(damaged)
    video = Video(path, step_s=0.5, quality=95)
    total, problem = video.count()
    assert (total, problem) == (13, "")
    good, reason = 0, ""
    try:
        for _, frame in video.read(0, total):
            reason = str(frame) if isinstance(frame, DecodeError) else reason
            good += not isinstance(frame, DecodeError)
    except DecodeError as error:
        reason = str(error)
    assert 3 <= good < total and reason.startswith("undecodable: ")


def test_what_is_no_video_is_told(tmp_path: Path) -> None:
    for name, data in (("a.mov", b""), ("b.mov", b"no video"), ("c.mp4", bytes(1000))):
        (tmp_path / name).write_bytes(data)
        number, problem = Video(tmp_path / name, step_s=0.5, quality=95).count()
        assert number == 0 and problem.startswith("undecodable: ")
