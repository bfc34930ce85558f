"""The verb as a user runs it, and its rules for names."""

import os
import subprocess
import sys
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from PIL import Image

from depthany.inference.depth_map import load_png16
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.models.weights import load_weights, save_weights
from depthany.predict import find_checkpoint, find_photos, main, name_outputs, parse

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 56}
    model = DepthModel(
        encoder="vit_tiny_patch16_224",
        encoder_arguments=small,
        taps=[0, 1, 2, 3],
        features=24,
        hidden=12,
        out_channels=[24, 48, 96, 96],
        pos_embed="official",
        pretrained=False,
        activation="softplus",
        input_size=56,
    )
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_weights(model, path, metadata={})
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
        "--save", "npy,npz,png16", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3 written to out, 1 skipped (broken.jpg)"
    assert "broken.jpg: " in done.stderr and "Traceback" not in done.stderr
    endings = (".disparity16.png", ".npy", ".npz", ".png")
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
    read_back = load_png16(out / "a.png.disparity16.png").disparity
    assert np.abs(read_back - saved).max() <= span / 131068 * 1.01 + 1e-6


def test_only_the_map_in_grey_of_the_newest_run(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, age_s in (("old", 100), ("new", 0)):
        target = tmp_path / "runs" / name / "model.safetensors"
        target.parent.mkdir(parents=True)
        target.write_bytes(weights.read_bytes())
        os.utime(target, (1e9 - age_s, 1e9 - age_s))
    write_photo(tmp_path / "x.png", 30, 40)
    assert main(["--img-path", "x.png", "--pred-only", "--grayscale", "--outdir", "out"]) == 0
    assert "runs/new/model.safetensors" in capsys.readouterr().err
    picture = np.asarray(Image.open(tmp_path / "out" / "x.png"))
    assert picture.shape == (30, 40, 3)
    assert (picture == picture[..., :1]).all() and np.ptp(picture) == 255


def test_nothing_written_is_an_error(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    thin = write_photo(tmp_path / "thin.png", 2, 900)
    (tmp_path / "empty").mkdir()
    names = [str(thin), str(tmp_path / "gone.jpg"), str(tmp_path / "empty")]
    arguments = [*names, "--checkpoint", str(weights), "--outdir", str(tmp_path / "out")]
    assert main([*arguments, "--max-pixels", "10000"]) == 1
    printed = capsys.readouterr()
    assert "0 written" in printed.out and "3 skipped" in printed.out
    for reason in ("raise --max-pixels (10000)", "gone.jpg: No such file", "without photos"):
        assert reason in printed.err


def test_a_photo_is_never_overwritten(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photo = write_photo(tmp_path / "x.png")
    before = photo.read_bytes()
    assert main([str(photo), "--checkpoint", str(weights), "--outdir", str(tmp_path)]) == 1
    assert "--outdir" in capsys.readouterr().err and photo.read_bytes() == before


def test_without_a_model_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "x.png")
    assert main(["x.png"]) == 1
    assert "train" in (error := capsys.readouterr().err) and "--checkpoint" in error
    with pytest.raises(ValueError, match=r"--checkpoint.*model\.safetensors"):
        find_checkpoint(tmp_path)


def test_inputs_of_every_form(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = find_photos([str(photos)], out)
    assert sorted(p.name for p in folder) == ["a.jpg", "a.jpg", "a.png", "broken.jpg"]
    assert set(folder.values()) == {photos}
    pattern = find_photos([str(photos / "**" / "*.jpg")], out)
    assert sorted(p.name for p in pattern) == ["a.jpg", "a.jpg", "broken.jpg"]
    listing = tmp_path / "list.txt"
    listing.write_text(f"{photos}/a.jpg\n\n{photos}/deep/a.jpg\n")
    assert list(find_photos([str(listing)], out)) == [photos / "a.jpg", photos / "deep" / "a.jpg"]
    assert len(find_photos([str(photos), str(listing), str(photos / "a.jpg")], out)) == 4
    odd = write_photo(tmp_path / "odd [1].png")
    assert list(find_photos([str(odd)], out)) == [odd]


def test_earlier_output_inside_the_folder_is_no_input(photos: Path) -> None:
    write_photo(photos / "maps" / "a.png")
    assert photos / "maps" / "a.png" not in find_photos([str(photos)], photos / "maps")
    assert photos / "maps" / "a.png" in find_photos([str(photos)], photos.parent)


def test_names_are_distinct_and_keep_folders() -> None:
    root = Path("/data")
    files = ["a.jpg", "a.png", "A.webp", "b.png", "x/b.png", "a.jpg.tif", "b.disparity16.jpg"]
    names = name_outputs({root / name: root for name in files})
    written = [f"{n}{s}".lower() for n in names.values() for s in (".png", ".disparity16.png")]
    assert len(set(written)) == len(written)
    assert names[root / "b.png"] == PurePath("b") and names[root / "x/b.png"] == PurePath("x/b")
    single = name_outputs({Path("/data/x/b.png"): Path("/data/x")})
    assert list(single.values()) == [PurePath("b")]
    two = name_outputs({Path("/p/x/b.png"): Path("/p/x"), Path("/p/y/b.png"): Path("/p/y")})
    assert [str(name) for name in two.values()] == [os.path.join("x", "b"), os.path.join("y", "b")]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom depthany.predict import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'cv2', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("--img-path", "--outdir", "--input-size", "--pred-only", "--grayscale", "--save"):
        assert flag in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least one photo"),
        (["x.png", "--save", "npy,exr"], "exr"),
        (["x.png", "--input-size", "0"], "--input-size"),
        (["x.png", "--max-pixels", "-1"], "--max-pixels"),
    ],
)
def test_flags_that_make_no_sense(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_the_pixel_budget_is_the_predictors() -> None:
    default = Predictor.__init__.__kwdefaults__["max_pixels"]
    assert parse(["x.png"]).max_pixels == default
