"""The verb as a user runs it, and its rules for names."""

import csv
import json
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from depthany.geometry.pictures import EXIF_ORIENTATION
from depthany.inference.depth_map import load_map
from depthany.inference.predictor import Predictor
from depthany.inference.video import Frame, VideoFile, write_video
from depthany.models.depth_model import DepthModel
from depthany.models.weights import load_weights, save_weights
from depthany.predict import main, parse
from tests.processes import Zygote

av = pytest.importorskip("av", reason="needs depthany[video]")
ROOT = Path(__file__).resolve().parents[1]


def small_model(**more: object) -> DepthModel:
    torch.manual_seed(0)
    options = {"encoder": "vit_tiny_patch16_224", "taps": [0, 1, 2, 3], "pos_embed": "official", "pretrained": False}
    options |= {"features": 24, "hidden": 12, "out_channels": [24, 48, 96, 96], "activation": "softplus"}
    small = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 56}
    return DepthModel(**options | {"encoder_arguments": small, "input_size": 56} | more)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_weights(small_model(), path, metadata={})
    return path


def write_photo(path: Path, height: int = 30, width: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Equal stems in two folders and in one, and a damaged file."""
    folder = tmp_path / "photos"
    write_photo(folder / "a.jpg")
    write_photo(folder / "a.png", 20, 50)
    write_photo(folder / "deep" / "a.jpg", 50, 20)
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:300])
    (folder / "notes.md").write_text("not a photo")
    return folder


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "depthany.predict", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_folder_with_a_damaged_file(photos: Path, weights: Path, tmp_path: Path) -> None:
    done = run(
        "photos", "--checkpoint", weights.parent, "--outdir", "out", "--device", "cpu",
        "--save", "npy,npz,png16,exr,pfm,tiff", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3 written to out, 1 skipped (broken.jpg)"
    assert "broken.jpg: " in done.stderr and "Traceback" not in done.stderr
    endings = (".disparity16.png", ".exr", ".npy", ".npz", ".pfm", ".png", ".tiff")
    stems = ("a.jpg", "a.png", "deep/a")
    out = tmp_path / "out"
    assert files_in(out) == sorted(stem + ending for stem in stems for ending in endings)

    picture = np.asarray(Image.open(out / "a.png.png"))  # photo, 50 white pixels, map
    assert picture.shape == (20, 50 + 50 + 50, 3)
    assert (picture[:, :50] == np.asarray(Image.open(photos / "a.png"))).all()
    assert (picture[:, 50:100] == 255).all()

    model, _ = load_weights(weights)
    predictor = Predictor(model=model, device="cpu", precision="fp32")
    pixels = np.asarray(Image.open(photos / "a.png"))
    expected = predictor.predict(pixels, input_size=None).disparity
    saved = np.load(out / "a.png.npy")
    np.testing.assert_allclose(saved, expected, rtol=1e-4, atol=1e-5)
    span = saved.max() - saved.min()
    read_back = load_map(out / "a.png.disparity16.png").disparity
    assert np.abs(read_back - saved).max() <= span / 131068 * 1.01 + 1e-6


def predict(weights: Path, *arguments: str | Path) -> int:
    return main([*map(str, arguments), "--checkpoint", str(weights), "--device", "cpu"])


def test_only_the_map_in_grey_of_the_last_run(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, finished in (("new", "2026-02-02"), ("old", "2026-01-01")):
        target = tmp_path / "runs" / name / "model.safetensors"
        target.parent.mkdir(parents=True)
        target.write_bytes(weights.read_bytes())
        (target.parent / "record.json").write_text(json.dumps({"stage": "teacher", "finished": finished}))
    write_photo(tmp_path / "x.png", 30, 40)
    assert main(["--img-path", "x.png", "--pred-only", "--grayscale", "--outdir", "out"]) == 0
    assert "runs/new/model.safetensors" in capsys.readouterr().err
    picture = np.asarray(Image.open(tmp_path / "out" / "x.png"))
    assert picture.shape == (30, 40, 3)
    assert (picture == picture[..., :1]).all() and np.ptp(picture) == 255


def test_odd_photos_are_what_they_show(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Orientation, colour modes, 16 bits, several frames, one pixel; and no more of it depends on the batch."""
    folder = tmp_path / "photos"
    pixels = np.asarray(Image.open(write_photo(folder / "rgb.png")))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # shown turned right
    Image.fromarray(np.rot90(pixels)).save(folder / "turned.png", exif=exif)
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(folder / "alpha.png")
    Image.fromarray(pixels).convert("CMYK").save(folder / "cmyk.jpg")
    grey = pixels[..., 0]
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) << 8).save(folder / "grey16.png")
    Image.fromarray(grey).quantize(256).save(folder / "palette.png")
    frames = [Image.fromarray(image) for image in (grey, 255 - grey)]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.fromarray(pixels[:1, :1]).save(folder / "one.png")
    (folder / "damaged.png").write_bytes((folder / "rgb.png").read_bytes()[:900])
    for batch in (1, 4):
        assert (
            predict(weights, folder, "--outdir", tmp_path / f"out{batch}", "--save", "npy", "--batch-size", batch) == 0
        )
        printed = capsys.readouterr()
        assert printed.out.strip().endswith(
            "9 written to " + str(tmp_path / f"out{batch}") + ", 1 skipped (damaged.png)"
        )
        assert "moving.webp: 2 frames, the first is taken" in printed.err and "damaged.png: damaged" in printed.err
    maps = {path.stem: np.load(path) for path in (tmp_path / "out1").glob("*.npy")}
    for name, values in maps.items():
        np.testing.assert_allclose(np.load(tmp_path / "out4" / f"{name}.npy"), values, rtol=1e-4, atol=1e-5)
    same = [("turned", "rgb"), ("alpha", "rgb"), ("grey16", "grey"), ("palette", "grey"), ("moving", "grey")]
    for name, other in same:  # what only the container differs in has one map
        np.testing.assert_allclose(maps[name], maps[other], rtol=1e-4, atol=1e-5, err_msg=name)
    assert maps["cmyk"].shape == (30, 40) and maps["one"].shape == (1, 1) and np.isfinite(maps["one"]).all()


def test_names_of_any_letters(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "photos"
    for name in ("with space", "100%d [1]", "日本", os.fsdecode(b"no utf-8 \xff")):
        write_photo(folder / f"{name}.png")
    (folder / os.fsdecode(b"two\nlines \xff.png")).write_bytes(b"no photo")
    kinds = "npy,npz,png16,exr,pfm,tiff"
    assert predict(weights, folder, "--outdir", tmp_path / "out", "--save", kinds) == 0
    printed = capsys.readouterr()
    assert "4 written" in printed.out and r"two\nlines \udcff.png" in printed.out
    assert r"two\nlines \udcff.png: not an image" in printed.err
    assert len(files_in(tmp_path / "out")) == 4 * 7


@pytest.mark.slow
def test_an_interruption_is_one_line_and_leaves_whole_files(weights: Path, tmp_path: Path, zygote: Zygote) -> None:
    for number in range(40):
        write_photo(tmp_path / "photos" / f"{number}.png", 200, 300)
    flags = ["--checkpoint", str(weights), "--outdir", "out", "--save", "npz", "--input-size", "224", "--device", "cpu"]
    group = zygote.start(["depthany.predict", "photos", *flags], cwd=tmp_path)
    try:
        while not list(tmp_path.glob("out/*.npz")):
            assert group.poll() == [None], group.output()
            time.sleep(0.02)
        group.kill(2)
        assert group.wait(60) == [130], group.output()
    finally:
        group.kill()
    assert "interrupted: what is written is whole" in group.output() and "Traceback" not in group.output()
    written = files_in(tmp_path / "out")
    assert 0 < len(written) < 80 and not [name for name in written if name.startswith(".")]
    for name in written:
        if name.endswith(".npz"):
            assert load_map(tmp_path / "out" / name).values.shape == (200, 300)


def test_a_metric_model_gives_metres(tmp_path: Path) -> None:
    model = small_model(activation="sigmoid", max_depth=20.0)
    save_weights(model, tmp_path / "metric.safetensors", metadata={})
    photo = write_photo(tmp_path / "x.jpg")
    options = ["--outdir", tmp_path / "out", "--save", "png16,exr", "--pred-only", "--grayscale"]
    assert predict(tmp_path / "metric.safetensors", photo, *options) == 0
    assert files_in(tmp_path / "out") == ["x.depth16.png", "x.exr", "x.png"]
    depth = load_map(tmp_path / "out" / "x.exr")
    assert depth.space == load_map(tmp_path / "out" / "x.depth16.png").space == "metric"
    assert (depth.to_depth() == depth.values).all() and 0 < depth.values.min() < depth.values.max() < 20
    grey = np.asarray(Image.open(tmp_path / "out" / "x.png"))[..., 0]
    assert grey[np.unravel_index(depth.values.argmin(), grey.shape)] == 255  # near is white


def test_a_panorama_is_made_smaller_or_cut_into_tiles(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wide = write_photo(tmp_path / "wide.png", 20, 800)
    options = ["--outdir", tmp_path / "out", "--save", "npy", "--max-pixels", 20_000]
    assert predict(weights, wide, *options) == 0
    said = "wide.png: 800 x 20 pixels would be a 2240 x 56 network input, above --max-pixels 20000; "
    assert said + "888 x 16 is taken (--tiles 56 keeps a photo's detail)" in capsys.readouterr().err.replace("\n", "")
    whole = np.load(tmp_path / "out" / "wide.npy")
    assert predict(weights, wide, *options, "--tiles", 56, "--input-size", 50) == 0
    assert "--input-size 50 becomes 56, the next multiple of the patch size 8" in capsys.readouterr().err
    tiled = np.load(tmp_path / "out" / "wide.npy")
    assert whole.shape == tiled.shape == (20, 800) and np.isfinite(tiled).all() and (tiled != whole).any()


def test_what_does_not_fit_into_memory_is_told_before(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_photo(tmp_path / "x.jpg")
    monkeypatch.setattr("depthany.inference.memory.free_bytes", lambda device: 10_000_000)
    assert predict(weights, tmp_path / "x.jpg", "--outdir", tmp_path / "out", "--input-size", 560) == 1
    assert "0.0 GB are free; lower --input-size" in capsys.readouterr().err


def test_nothing_written_is_an_error(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    names = [tmp_path / name for name in ("gone.jpg", "gone.mov", "empty", "cut.mp4")]
    assert predict(weights, *names, "--outdir", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "0 written" in printed.out and "4 skipped" in printed.out
    for reason in (
        "gone.jpg: No such file",
        "gone.mov: No such file",
        "without photos",
        "cut.mp4: damaged or no video",
    ):
        assert reason in printed.err
    assert not (tmp_path / "out").exists()


def test_a_photo_is_never_overwritten(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photo = write_photo(tmp_path / "x.png")
    before = photo.read_bytes()
    assert predict(weights, photo, "--outdir", tmp_path) == 2
    assert "--outdir" in capsys.readouterr().err and photo.read_bytes() == before


def test_without_a_model_the_message_says_what_to_do(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "x.png")
    assert main(["x.png"]) == 2
    assert "train" in (error := capsys.readouterr().err) and "--checkpoint" in error
    assert main(["x.png", "--encoder", "vits"]) == 2
    assert "depth_anything_v2_vits.pth" in (error := capsys.readouterr().err) and "--checkpoint" in error
    assert predict(weights, "x.png", "--encoder", "vits") == 2
    assert "--encoder vits, but" in (error := capsys.readouterr().err) and "vit_tiny_patch16_224" in error


def video_frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_video_keeps_its_size_its_rate_and_one_range(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A still scene, then a bright flash: were each frame painted alone, the still frames would all look alike."""
    scene = np.random.default_rng(1).integers(0, 120, (36, 48, 3), np.uint8)
    with write_video(tmp_path / "clip.mp4", Fraction(12)) as add:
        for number in range(8):
            add(Frame(Fraction(number, 12), scene if number < 6 else scene * 2))
    write_photo(tmp_path / "clip.jpg")
    inputs = [tmp_path / "clip.mp4", tmp_path / "clip.jpg"]
    options = ["--outdir", tmp_path / "out", "--pred-only", "--grayscale", "--save", "npz,exr", "--batch-size", 3]
    assert predict(weights, *inputs, *options) == 0
    out = tmp_path / "out"
    saved = [f"clip.mp4.frames/{i:06d}.exr" for i in range(8)]
    photo = [f"clip.jpg{ending}" for ending in (".exr", ".npz", ".png")]
    assert files_in(out) == sorted([*photo, *saved, "clip.mp4.mp4", "clip.mp4.npz"])
    shown = video_frames(out / "clip.mp4.mp4")
    with av.open(str(out / "clip.mp4.mp4")) as container:
        assert container.streams.video[0].average_rate == 12
    with np.load(out / "clip.mp4.npz") as arrays:
        meaning = json.loads(str(arrays["meaning"]))
        maps = [arrays[f"{i:06d}"].astype(np.float32) for i in range(8)]
    assert meaning == {"space": "disparity", "near_is_large": True, "fps": 12.0}
    assert len(shown) == 8 and shown[0].shape == (36, 48, 3) and maps[0].dtype == np.float32
    exact = load_map(out / saved[3]).values
    np.testing.assert_allclose(maps[3], exact, rtol=1e-3)
    low, high = np.percentile(np.stack(maps), (1, 99))
    for frame, values in zip(shown, maps, strict=True):  # one linear grey for all, but for what the codec loses
        grey = ((values - low) / (high - low)).clip(0, 1) * 255
        assert np.abs(frame[..., 0] - grey).mean() < 6


def test_a_damaged_video_is_named_and_leaves_nothing(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(2)
    with write_video(tmp_path / "clip.mp4", Fraction(5)) as add:
        for number in range(30):
            add(Frame(Fraction(number, 5), rng.integers(0, 256, (24, 32, 3), np.uint8)))
    data = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "headless.mp4").write_bytes(data[:-400])  # an MP4's table of frames stands at its end
    third = len(data) // 3
    (tmp_path / "spoilt.mp4").write_bytes(data[:third] + bytes(range(255, 0, -1)) * 12 + data[third + 255 * 12 :])
    with av.open(str(tmp_path / "clip.mp4")) as source, av.open(str(tmp_path / "whole.mkv"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "half.mkv").write_bytes(whole[: len(whole) // 2])
    assert len(list(VideoFile(tmp_path / "whole.mkv").frames())) == 30
    names = ("headless.mp4", "spoilt.mp4", "half.mkv")
    options = ["--outdir", tmp_path / "out", "--save", "npz", "--pred-only"]
    assert predict(weights, *(tmp_path / name for name in names), *options) == 1
    printed = capsys.readouterr().err
    assert all(f"{name}: damaged" in printed for name in names), printed
    assert files_in(tmp_path / "out") == []


@pytest.mark.slow
def test_real_photos_of_every_kind(
    weights: Path, real_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """What cannot be decoded is named, all else is written at its own size; all 185 take a minute (docs)."""
    with (real_root / "unlabelled.csv").open(newline="") as file:
        facts = list(csv.DictReader(file))
    kinds = {(row["mode"], row["format"], row["exif_orientation"], row["decodes"]): row for row in facts}
    some = list({row["image"]: row for row in [*kinds.values(), *facts[::12]]}.values())
    (tmp_path / "some.txt").write_text("".join(f"{real_root / row['image']}\n" for row in some))
    options = ["--outdir", tmp_path / "out", "--save", "npy", "--pred-only", "--max-pixels", 100_000]
    assert predict(weights, tmp_path / "some.txt", *options) == 0
    printed = capsys.readouterr()
    for row in some:
        shape = int(row["height"]), int(row["width"])
        name = Path(row["image"])
        written = [*(tmp_path / "out").rglob(f"{name.stem}.npy"), *(tmp_path / "out").rglob(f"{name.name}.npy")]
        if row["decodes"] == "no":
            assert f"{name.name}: " in printed.err and not written
        else:
            turned = row["exif_orientation"] in ("5", "6", "7", "8")
            assert [np.load(path).shape for path in written] == [shape[::-1] if turned else shape], name
    assert f"{sum(row['decodes'] == 'yes' for row in some)} written" in printed.out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom depthany.predict import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'cv2', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--img-path", "--outdir", "--input-size", "--pred-only", "--grayscale", "--save", "--encoder"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one photo"),
        (["x.png", "--save", "npy,jpg"], "not jpg"),
        (["x.png", "--input-size", "0"], "--input-size"),
        (["x.png", "--max-pixels", "-1"], "--max-pixels"),
        (["x.png", "--tiles", "0"], "--tiles"),
        (["x.png", "--tiles", "9", "--confidence"], "--tiles"),
    ],
)
def test_flags_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_the_pixel_budget_is_the_predictors() -> None:
    default = Predictor.__init__.__kwdefaults__["max_pixels"]
    assert parse(["x.png"]).max_pixels == default
