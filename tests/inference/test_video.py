"""Videos with sound, uneven times and turned pictures, made by PyAV."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from depthany.inference.video import Frame, VideoFile, write_video

av = pytest.importorskip("av", reason="needs depthany[video]")
RATE = 22_050  # of the sound
TIMES = [Fraction(number, 25) for number in range(10)] + [Fraction(2, 5) + Fraction(number, 4) for number in range(6)]


def make(path: Path, sound: str, *, early_s: int = 0, rate: int = RATE) -> Path:
    """16 frames of 34 x 48 at uneven `TIMES`, from `early_s` on, and a tone of 3 s."""
    tick = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        picture, tone = container.add_stream("libx264", rate=10), container.add_stream(sound, rate=rate, layout="mono")
        picture.height, picture.width, picture.pix_fmt = 34, 48, "yuv420p"
        picture.codec_context.time_base = tick
        for number, time_s in enumerate(TIMES):
            frame = av.VideoFrame.from_ndarray(np.full((34, 48, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round((time_s + early_s) / tick), tick
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        for start in range(0, 3 * rate, 1024):
            wave = (8000 * np.sin(np.arange(start, start + 1024) / 8)).astype(np.int16)[None]
            samples = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            samples.sample_rate, samples.pts, samples.time_base = rate, start + early_s * rate, Fraction(1, rate)
            container.mux(tone.encode(samples))
        container.mux(tone.encode())
    return path


def copy(path: Path, target: Path) -> None:
    """As predict does, but the picture stays as it is."""
    video = VideoFile(path)
    with write_video(target, video.rate, sound_of=video) as add:
        for frame in video.frames():
            add(frame)


@pytest.mark.parametrize(
    ("name", "sound", "written"),
    [("a.mp4", "aac", "aac"), ("a.mkv", "flac", "flac"), ("a.mov", "pcm_s16le", "aac")],
)
@pytest.mark.parametrize("early_s", [0, 100])
def test_sound_and_the_time_of_each_frame_are_kept(
    tmp_path: Path, name: str, sound: str, written: str, early_s: int
) -> None:
    path, target = make(tmp_path / name, sound, early_s=early_s), tmp_path / "out.mp4"
    copy(path, target)
    with av.open(str(target)) as container:
        assert container.streams.audio[0].codec_context.codec.canonical_name == written
        shown = [float(frame.time) for frame in container.decode(video=0)]
    np.testing.assert_allclose(shown, [float(time_s) for time_s in TIMES], atol=0.06)  # of an AAC frame, by its delay
    assert np.ptp(np.array(shown) - [float(time_s) for time_s in TIMES]) < 2e-3
    with av.open(str(target)) as container:
        heard = [frame.to_ndarray() for frame in container.decode(audio=0)]
    assert 2.9 < sum(frame.shape[1] for frame in heard) / RATE < 3.2 and np.abs(heard[5]).max() > 0
    with av.open(str(target)) as container:  # a player need not seek from one to the other
        kinds = "".join(packet.stream.type[0] for packet in container.demux())
    assert kinds.index("a") < kinds.rindex("v") and kinds.count("v") >= len(TIMES)


@pytest.mark.parametrize("rate", [6_000, 192_000])
def test_sound_of_a_rate_that_aac_has_not_is_resampled(tmp_path: Path, rate: int) -> None:
    copy(make(tmp_path / "a.mkv", "pcm_s16le", rate=rate), tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        heard = [frame for frame in container.decode(audio=0)]
    assert {frame.sample_rate for frame in heard} == {48_000}
    assert 2.9 < sum(frame.samples for frame in heard) / 48_000 < 3.2


def test_a_turned_video_is_written_upright_and_one_without_sound_stays_silent(tmp_path: Path) -> None:
    with (
        av.open(str(make(tmp_path / "a.mp4", "aac"))) as source,
        av.open(str(tmp_path / "turned.mp4"), "w") as turned,
    ):
        stream = turned.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                turned.mux(packet)
    copy(tmp_path / "turned.mp4", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert not container.streams.audio
    assert len(frames) == len(TIMES) and frames[0].shape == (48, 34, 3)


def test_an_interrupted_video_leaves_nothing(tmp_path: Path) -> None:
    video = VideoFile(make(tmp_path / "a.mp4", "aac"))
    with pytest.raises(KeyboardInterrupt), write_video(tmp_path / "out.mp4", video.rate, sound_of=video) as add:
        add(Frame(Fraction(0), np.zeros((34, 48, 3), np.uint8)))
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_not_taken_for_a_damaged_video(tmp_path: Path) -> None:
    video = VideoFile(make(tmp_path / "a.mp4", "aac"))
    rng = np.random.default_rng(0)
    (tmp_path / ".out.part.mp4").symlink_to("/dev/full")
    with (
        pytest.raises(OSError, match="No space left"),
        write_video(tmp_path / "out.mp4", video.rate, sound_of=video) as add,
    ):
        for frame in video.frames():
            add(Frame(frame.time_s, rng.integers(0, 256, (340, 480, 3), np.uint8)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4"]
