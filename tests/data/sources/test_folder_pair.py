"""One's own folders: every encoding gives the same depth, and options that cannot be are refused."""

import math
from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import OpenEXR
import pytest
from PIL import Image

from depthany.data.files import DecodeError
from depthany.data.sources.folder_pair import FolderPair
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import Truth, assert_reads, picture, reasons, save_picture, scene_depth, truth
from tests.data.sources.writers.blendedmvs import pfm

SHAPE = (18, 24)
UNIT = 1 / 1000  # metres per stored one, of the whole numbers


def pair(root: Path, **options: object) -> FolderPair:
    usual = {
        "name": "mine",
        "images": "images",
        "depth": "depth",
        "quantity": "depth",
        "scale": 1.0,
        "invalid": [0],
        **dict.fromkeys(["sky", "sky_above", "focal_px", "centre_px", "encoding", "array", "sky_masks", "index_root"]),
    }
    return FolderPair(root=str(root), **usual | options)  # type: ignore[arg-type]


def write(root: Path, suffix: str, save: Callable[[Path, np.ndarray], object], unit: float = 1.0) -> dict[str, Truth]:
    """Two frames, one of them in a folder below; 0 is no measurement."""
    truths = {}
    for number, stem in enumerate(("1", "rooms/a.b c/2")):
        depth = scene_depth(*SHAPE, number=number)
        stored = np.where(np.isfinite(depth), depth, 0) / unit
        image = picture(36, 48, number=number)
        path = root / "images" / f"{stem}.jpg"
        save_picture(path, image)
        label = root / "depth" / f"{stem}{suffix}"
        label.parent.mkdir(parents=True, exist_ok=True)
        save(label, stored)
        truths[str(path.relative_to(root))] = truth(depth, image, factor=1, sky=False)
    return truths


def as_whole(values: np.ndarray, dtype: type) -> np.ndarray:
    return np.rint(values).astype(dtype)


def save_h5(path: Path, values: np.ndarray) -> None:
    with h5py.File(path, "w") as file:
        file["depth"], file["other"] = values.astype(np.float32), values.astype(np.float32) + 1


def save_pgm(path: Path, values: np.ndarray) -> None:
    path.write_bytes(b"P5\n%d %d\n65535\n" % values.shape[::-1] + as_whole(values, np.dtype(">u2")).tobytes())


def save_exr(path: Path, values: np.ndarray) -> None:
    half = values.astype(np.float32)
    OpenEXR.File({"type": OpenEXR.scanlineimage}, {"Z": half, "A": np.ones_like(half)}).write(str(path))


WHOLE = {
    ".png": lambda path, values: cv2.imwrite(str(path), as_whole(values, np.uint16)),
    ".tiff": lambda path, values: cv2.imwrite(str(path), as_whole(values, np.uint16)),
    ".pgm": save_pgm,
}
FLOATS = {
    ".npy": lambda path, values: np.save(path, values.astype(np.float32)),
    ".npz": lambda path, values: np.savez_compressed(path, depth=values.astype(np.float32), other=values),
    ".tif": lambda path, values: Image.fromarray(values.astype(np.float32)).save(path),
    ".exr": save_exr,
    ".pfm": lambda path, values: path.write_bytes(pfm(values, big_endian=True)),
    ".h5": save_h5,
    ".hdf5": save_h5,
}
ARRAY = {".npz": "depth", ".h5": "depth", ".hdf5": "depth", ".exr": "Z"}


@pytest.mark.parametrize("suffix", WHOLE)
def test_whole_numbers(tmp_path: Path, suffix: str) -> None:
    truths = write(tmp_path, suffix, WHOLE[suffix], UNIT)
    assert_reads(pair(tmp_path, scale=UNIT), truths, kind=DepthKind.METRIC, depth_step=UNIT)


def test_eight_bits(tmp_path: Path) -> None:
    truths = write(tmp_path, ".png", lambda path, v: Image.fromarray(as_whole(v, np.uint8)).save(path), 0.025)
    assert_reads(pair(tmp_path, scale=0.025), truths, kind=DepthKind.METRIC, depth_step=0.025)


@pytest.mark.parametrize("suffix", FLOATS)
def test_floats_without_a_unit(tmp_path: Path, suffix: str) -> None:
    truths = write(tmp_path, suffix, FLOATS[suffix])
    assert_reads(pair(tmp_path, scale=None, array=ARRAY.get(suffix)), truths, kind=DepthKind.SCALE)


@pytest.mark.parametrize("suffix", [".png", ".pgm", ".npy", ".exr", ".pfm", ".h5", ".tiff", ".npz"])
def test_the_first_bytes_say_what_it_is_unless_it_is_given(tmp_path: Path, suffix: str) -> None:
    save = (WHOLE | FLOATS)[suffix]
    unit = UNIT if suffix in WHOLE else 1.0
    truths = write(tmp_path, suffix, save, unit)
    options = {"scale": unit, "array": ARRAY.get(suffix)}
    wrong = ".png" if suffix == ".npy" else ".npy"
    for path in list((tmp_path / "depth").rglob(f"*{suffix}")):
        path.rename(path.with_suffix(wrong))
    assert_reads(pair(tmp_path, **options), truths, kind=DepthKind.METRIC, depth_step=unit if suffix in WHOLE else 0)
    for path in list((tmp_path / "depth").rglob(f"*{wrong}")):
        path.rename(path.with_suffix(".bin"))
    encoding = {".h5": "hdf5"}.get(suffix, suffix[1:])
    given = pair(tmp_path, encoding=encoding, **options)
    assert_reads(given, truths, kind=DepthKind.METRIC, depth_step=unit if suffix in WHOLE else 0)
    with pytest.raises(DecodeError, match=r"1\.bin: "):
        pair(tmp_path, encoding="pfm" if encoding != "pfm" else "npy", scale=unit).read(0)


def test_a_distance_needs_its_camera(tmp_path: Path) -> None:
    """Of an image twice the label's size, off the middle."""
    focal, cx, cy = 40.0, 20.0, 21.0
    x, y = np.meshgrid((np.arange(24) + 0.5 - cx / 2) / (focal / 2), (np.arange(18) + 0.5 - cy / 2) / (focal / 2))
    rays = np.sqrt(1 + x**2 + y**2)
    truths = write(tmp_path, ".npy", lambda path, v: np.save(path, (v * rays).astype(np.float32)))
    source = pair(tmp_path, quantity="distance", focal_px=focal, centre_px=[cx, cy])
    assert_reads(source, truths, kind=DepthKind.METRIC)
    with pytest.raises(AssertionError, match="above the tolerance"):
        assert_reads(pair(tmp_path), truths, kind=DepthKind.METRIC, rtol=0.05)
    for options in ({"quantity": "distance"}, {"focal_px": 40.0}):
        with pytest.raises(ValueError, match="give focal_px with quantity=distance, and only there"):
            pair(tmp_path, **options)


def test_a_disparity_is_not_inverted(tmp_path: Path) -> None:
    def save(path: Path, depth: np.ndarray) -> None:
        np.save(path, (1 / np.where(depth == 0, np.inf, depth)).astype(np.float32))

    truths = {path: t._replace(valid=t.valid | True) for path, t in write(tmp_path, ".npy", save).items()}
    assert_reads(pair(tmp_path, quantity="disparity", scale=None, invalid=[]), truths, kind=DepthKind.AFFINE)
    skies = {path: t._replace(sky=t.disparity == 0) for path, t in truths.items()}
    source = pair(tmp_path, quantity="disparity", invalid=[], sky=0.0)
    assert_reads(source, skies, kind=DepthKind.SCALE)
    with pytest.raises(ValueError, match="sky_above is a depth, but quantity=disparity"):
        pair(tmp_path, quantity="disparity", sky_above=10.0)


def test_codes_and_far_values(tmp_path: Path) -> None:
    def save(path: Path, depth: np.ndarray) -> None:
        np.save(path, np.where(depth == 0, 80.0, depth).astype(np.float32))

    truths = {path: t._replace(valid=t.valid | True, sky=~t.valid) for path, t in write(tmp_path, ".npy", save).items()}
    for options in ({"sky": 80.0}, {"sky_above": 80.0}):
        assert_reads(pair(tmp_path, **options), truths, kind=DepthKind.METRIC)
    holes = {path: t._replace(valid=~t.sky, sky=t.sky & False) for path, t in truths.items()}
    assert_reads(pair(tmp_path, invalid=[math.nan, 80]), holes, kind=DepthKind.METRIC)


def test_what_has_no_partner_or_a_double_is_named(tmp_path: Path) -> None:
    write(tmp_path, ".npy", FLOATS[".npy"])
    save_picture(tmp_path / "images" / "1.png", picture(*SHAPE, number=0))
    save_picture(tmp_path / "images" / "lonely.jpg", picture(*SHAPE, number=0))
    (tmp_path / "depth" / "notes.txt").write_text("not a label")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    np.save(tmp_path / "depth" / "blind.npy", np.ones(SHAPE, np.float32))
    source = pair(tmp_path)
    assert len(source) == 2
    assert reasons(source) == {
        "mine/images/1.png": "1.jpg has the same name and is used",
        "mine/images/lonely.jpg": "an image without a label",
        "mine/depth/blind.npy": "a label without an image",
    }


def test_several_pairs_of_folders_have_lists_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, ".npy", FLOATS[".npy"])
    (tmp_path / "val").mkdir()
    for name in ("images", "depth"):
        (tmp_path / "val" / name).symlink_to(tmp_path / name)
    train, val = pair(tmp_path), pair(tmp_path, images="val/images", depth="val/depth")
    assert len(train) == len(val) == 2 and train.index_path != val.index_path
    assert len({train.key(0), train.key(1), val.key(0), val.key(1)}) == 4


def test_the_meaning_is_part_of_the_identity(tmp_path: Path) -> None:
    write(tmp_path, ".npy", FLOATS[".npy"])
    first = pair(tmp_path).identity()
    assert pair(tmp_path).identity() == first
    for options in ({"scale": 2.0}, {"invalid": []}, {"sky_above": 5.0}, {"quantity": "disparity"}):
        assert pair(tmp_path, **options).identity() != first


def test_missing_folders_are_told(tmp_path: Path) -> None:
    write(tmp_path, ".npy", FLOATS[".npy"])
    with pytest.raises(ValueError, match=r"pictures is no folder: correct `root` or `images`"):
        pair(tmp_path, images="pictures").prepare()
    with pytest.raises(ValueError, match=r"labels is no folder: correct `root` or `depth`"):
        pair(tmp_path, depth="labels").prepare()


def test_a_damaged_label_is_told(tmp_path: Path) -> None:
    write(tmp_path, ".npy", FLOATS[".npy"])
    path = tmp_path / "depth" / "1.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DecodeError, match=r"depth/1\.npy: damaged or not a \.npy file.*; fetch the file again"):
        pair(tmp_path).read(0)
