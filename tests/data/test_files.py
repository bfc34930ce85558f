"""Decoding: every mode becomes upright RGB, every unit survives, nothing damaged gets through."""

import csv
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import h5py
import numpy as np
import OpenEXR
import pytest
from numpy.testing import assert_array_equal
from PIL import Image, ImageOps

from depthany.data.files import DecodeError, decode_depth, read_depth, read_image
from depthany.data.sources.photos import PhotoFolder
from depthany.geometry.pictures import EXIF_ORIENTATION

RNG = np.random.default_rng(0)
DEPTH = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)  # no two rows alike: a missing flip shows
PHOTO = cv2.resize(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8), (80, 60))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\x35\xaf\x06\x1e"


# Images


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    grey = Image.fromarray(PHOTO).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = Image.fromarray(PHOTO).convert(mode)
    pixels = read_image(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert pixels.shape == (60, 80, 3) and pixels.dtype == np.uint8
    assert pixels.flags.writeable and pixels.flags.c_contiguous
    wanted = grey.convert("RGB") if mode == "I;16" else image.convert("RGB")
    assert_array_equal(pixels, np.asarray(wanted))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "MPO"])
def test_the_content_decides_on_the_format(format: str) -> None:
    difference = read_image(encoded(Image.fromarray(PHOTO), format)).astype(int) - PHOTO
    assert np.abs(difference).mean() < 12  # lossy and palette formats


def test_fast_jpeg_path_gives_the_pixels_of_the_slow_one() -> None:
    data = encoded(Image.fromarray(PHOTO), "JPEG", quality=90)
    assert_array_equal(read_image(data), np.asarray(Image.open(BytesIO(data))))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone_as_pillow_does(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PHOTO), format, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
    assert_array_equal(read_image(data), wanted)
    assert wanted.shape[0] == (80 if orientation > 4 else 60)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the decoder, about the damage
def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(Image.fromarray(PHOTO), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffnonsense")
    assert read_image(data).shape == PHOTO.shape


def test_of_several_frames_the_first_counts() -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (10, 200)]
    for format in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert np.abs(read_image(data).astype(int) - 10).max() < 4


BAD_IMAGES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "limit": lambda: png_header(30_000, 30_000),  # a bomb for PIL too
    "more than the limit": lambda: png_header(8_001, 8_000),
    "supported format": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "not an image": lambda: b"this is a text file\n" * 20,
    "float image": lambda: encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"),
    "truncated": lambda: encoded(Image.fromarray(PHOTO), "PNG")[:-2000],
    "damaged": lambda: encoded(Image.fromarray(PHOTO), "WEBP")[:-200],
}


@pytest.mark.parametrize("reason", BAD_IMAGES)
def test_bad_image_is_refused_with_a_reason(reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        read_image(BAD_IMAGES[reason]())


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(("reduce_to", "scale"), [(None, 1), (51, 1), (50, 2), (26, 2), (25, 4), (12, 8), (1, 8)])
def test_a_large_jpeg_may_be_decoded_at_a_fraction(reduce_to: int | None, scale: int, orientation: int) -> None:
    """Never below what is asked for, upright, of the same field of view, and close to the means of the pixels."""
    rows, columns = np.mgrid[:100, :150]
    photo = np.stack([rows, columns, rows // 2 + columns // 3], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encoded(Image.fromarray(photo), "JPEG", quality=98, subsampling=0, exif=exif)
    whole, small = read_image(data), read_image(data, reduce_to=reduce_to)
    assert small.shape == (*(-(-side // scale) for side in whole.shape[:2]), 3)
    assert min(small.shape[:2]) >= (reduce_to or 100)
    means = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - means).max() <= (0 if scale == 1 else 6)  # an odd side is rounded up


def test_other_formats_are_never_reduced() -> None:
    for name in ("PNG", "WEBP"):
        data = encoded(Image.fromarray(PHOTO), name)
        assert_array_equal(read_image(data, reduce_to=1), read_image(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(progressive: bool) -> None:
    data = encoded(Image.fromarray(PHOTO), "JPEG", quality=95, progressive=progressive)
    for keep in [*range(0, len(data), len(data) // 40), len(data) - 2, len(data) - 1]:
        with pytest.raises(DecodeError):
            read_image(data[:keep])


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the decoder, about the damage
def test_damaged_bytes_give_a_picture_or_a_decode_error() -> None:
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"):
        sound = encoded(Image.fromarray(PHOTO), format)
        for _ in range(40):
            data = bytearray(sound)
            for place in RNG.integers(0, min(len(data), 600), 3):
                data[place] = RNG.integers(256)
            try:
                pixels = read_image(bytes(data), max_pixels=100_000)
            except DecodeError:
                continue
            assert pixels.ndim == 3 and pixels.dtype == np.uint8


# Depth


def pfm(values: np.ndarray, scale: str, letters: str = "Pf") -> bytes:
    order = "<f4" if scale.startswith("-") else ">f4"
    header = f"{letters}\n{values.shape[1]} {values.shape[0]} \n{scale}\n".encode()
    return header + values[::-1].astype(order).tobytes()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy(values: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def hdf5(**arrays: np.ndarray) -> bytes:
    buffer = BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(f"a/{name}", data=values, compression="gzip")
    return buffer.getvalue()


def exr(folder: Path, **channels: np.ndarray) -> bytes:
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    path = folder / "written.exr"
    with OpenEXR.File(header, channels) as file:
        file.write(str(path))
    return path.read_bytes()


REAL = (DEPTH / 257.0).astype(np.float32)
SOUND: dict[str, tuple[str, Callable[[], bytes], np.ndarray]] = {
    "png 16": (".png", lambda: encoded(Image.fromarray(DEPTH), "PNG"), DEPTH),
    "png 8": (
        ".PNG",
        lambda: encoded(Image.fromarray((DEPTH >> 8).astype("u1")), "PNG"),
        DEPTH >> 8,
    ),
    "tiff": (".tiff", lambda: encoded(Image.fromarray(REAL), "TIFF"), REAL),
    "pgm 16": (".pgm", lambda: b"P5\n# one\n7 5\n65535\n" + DEPTH.astype(">u2").tobytes(), DEPTH),
    "pgm, maximum": (".pgm", lambda: b"P5 7 5 999\n" + DEPTH.astype(">u2").tobytes(), DEPTH),
    "pfm little": (".pfm", lambda: pfm(REAL, "-1.0"), REAL),
    "pfm big": (".pfm", lambda: pfm(REAL, "1"), REAL),
    "pfm scale 0.5": (".pfm", lambda: pfm(REAL, "-0.5"), REAL),
    "pfm three": (".pfm", lambda: pfm(np.stack([REAL] * 3, -1), "-1", "PF"), REAL),
    "npy": (".npy", lambda: npy(REAL[..., None]), REAL),
    "npy big": (".npy", lambda: npy(REAL.astype(">f4")), REAL),
    "npz": (".npz", lambda: npz(depth=REAL), REAL),
    "hdf5": (".hdf5", lambda: hdf5(dataset=REAL.astype(np.float16)), REAL.astype(np.float16)),
}


@pytest.mark.parametrize("name", SOUND)
def test_depth_survives_in_its_type_and_row_order(name: str) -> None:
    suffix, data, wanted = SOUND[name]
    values = decode_depth(data(), suffix)
    assert_array_equal(values, wanted)
    assert values.dtype == (np.uint8 if name == "png 8" else wanted.dtype)
    assert values.dtype.isnative and values.flags.writeable and values.flags.c_contiguous


def test_exr_channels(tmp_path: Path) -> None:
    half = REAL.astype(np.float16)
    half[0, 0] = np.nan
    assert_array_equal(decode_depth(exr(tmp_path, G=REAL), ".exr"), REAL)
    equal = decode_depth(exr(tmp_path, R=half, G=half, B=half), ".exr")
    assert_array_equal(equal, half)
    assert equal.dtype == np.float16
    differing = exr(tmp_path, Y=half, Z=half + 1)
    assert_array_equal(decode_depth(differing, ".exr", channel="Z"), half + 1)
    with pytest.raises(DecodeError, match="channel="):
        decode_depth(differing, ".exr")
    with pytest.raises(DecodeError, match="damaged"):
        decode_depth(differing[:-20], ".exr")


def test_several_arrays_need_a_key() -> None:
    for suffix, data in ((".npz", npz(a=REAL, b=REAL + 1)), (".h5", hdf5(a=REAL, b=REAL + 1))):
        key = "b" if suffix == ".npz" else "/a/b"
        assert_array_equal(decode_depth(data, suffix, key=key), REAL + 1)
        for wrong in (None, "c"):
            with pytest.raises(DecodeError, match="key="):
                decode_depth(data, suffix, key=wrong)


BAD_DEPTH: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "pickle": (".npy", lambda: npy(np.array([[{}, 1], [2, 3]], dtype=object)), "allow_pickle"),
    "pickle in npz": (".npz", lambda: npz(a=np.array([{}], dtype=object)), "allow_pickle"),
    "structured": (".npy", lambda: npy(np.zeros((2, 2), "f4,f4")), "wanted numbers"),
    "three axes": (".npy", lambda: npy(RNG.random((4, 5, 2))), "single channel"),
    "no pixels": (".npy", lambda: npy(np.zeros((0, 4))), "one \\(h, w\\)"),
    "npy cut": (".npy", lambda: npy(REAL)[:-1], "damaged"),
    "npz cut": (".npz", lambda: npz(a=REAL)[:-30], "damaged"),
    "npz bomb": (".npz", lambda: npz(a=np.zeros(65_000_000)), "unpacks"),
    "hdf5 cut": (".h5", lambda: hdf5(a=REAL)[:-100], "damaged"),
    "pfm cut": (".pfm", lambda: pfm(REAL, "-1")[:-1], "truncated"),
    "pfm bomb": (".pfm", lambda: b"Pf\n99999999 99999999\n-1\n\0\0\0\0", "truncated"),
    "pgm cut": (".pgm", lambda: b"P5 7 5 65535\n\0", "truncated"),
    "png cut": (".png", lambda: encoded(Image.fromarray(DEPTH), "PNG")[:-40], "damaged"),
    "png bomb": (".png", lambda: png_header(8_001, 8_000), "limit"),
    "png colour": (".png", lambda: encoded(Image.fromarray(PHOTO), "PNG"), "one channel"),
    "wrong content": (".png", lambda: npy(REAL), "damaged or not a .png"),
    "empty": (".exr", lambda: b"", "empty"),
    "suffix": (".mat", lambda: b"abc", "not one of"),
}


@pytest.mark.parametrize("name", BAD_DEPTH)
def test_bad_depth_is_refused_with_a_reason(name: str, tmp_path: Path) -> None:
    suffix, data, reason = BAD_DEPTH[name]
    path = tmp_path / f"label{suffix}"
    path.write_bytes(data())
    with pytest.raises(DecodeError, match=reason) as caught:
        read_depth(path)
    assert str(path) in str(caught.value)


# Real files


def test_real_hypersim_distance_is_read_as_stored(real_root: Path) -> None:
    (path,) = real_root.glob("labelled/hypersim_depth_only/**/*.hdf5")
    values = read_depth(path)
    assert values.dtype == np.float16 and values.shape == (768, 1024)
    assert 0 < values.min() < values.max() < 50


def test_of_the_real_photos_only_the_damaged_one_is_refused(real_root: Path) -> None:
    with (real_root / "unlabelled.csv").open() as file:
        facts = {row["image"]: row for row in csv.DictReader(file)}
    photos = PhotoFolder(root=real_root, pattern="unlabelled/**/*", name="photos")
    assert len(photos) == len(facts) == 185
    assert len({photos.key(i) for i in range(len(photos))}) == 185
    refused = []
    for i in range(len(photos)):
        path = photos.path(i).relative_to(real_root).as_posix()
        try:
            image = read_image(photos.data(i))
        except DecodeError:
            refused.append(path)
            with pytest.raises(DecodeError, match=path):
                photos.read(i)
            continue
        size = int(facts[path]["width"]), int(facts[path]["height"])
        turned = facts[path]["exif_orientation"] in ("5", "6", "7", "8")
        assert image.shape == (*(size if turned else size[::-1]), 3), path
        assert image.dtype == np.uint8
    assert refused == [path for path, row in facts.items() if row["decodes"] == "no"]


def test_eight_exif_orientations_show_one_picture(real_root: Path) -> None:
    photos = PhotoFolder(root=real_root / "unlabelled/odd/exif_orientation", pattern="*", name="exif")
    small = [
        cv2.resize(photos.read(i)["image"], (90, 60), interpolation=cv2.INTER_AREA).astype(int)
        for i in range(len(photos))
    ]
    assert len(small) == 8
    for other in small[1:]:
        assert np.abs(other - small[0]).mean() < 3


def test_photo_folder_lists_images_only_in_order_with_unique_keys(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "a.jpg", "a.b.jpg", "a_b.jpg", "._a.jpg", "ä ü.webp", "n.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.jpg").write_bytes(b"y")
    photos = PhotoFolder(root=tmp_path, pattern="**/*", name="mine")
    names = [photos.path(i).relative_to(tmp_path).as_posix() for i in range(len(photos))]
    assert names == sorted(names, key=str.encode) and len(names) == 7
    keys = [photos.key(i) for i in range(len(photos))]
    assert len(set(keys)) == 7
    assert keys[names.index("a.jpg")] == "mine/a_jpg"
    assert keys[names.index("deep/a.jpg")] == "mine/deep/a_jpg"
    assert photos.data(names.index("deep/a.jpg")) == b"y"
    with pytest.raises(ValueError, match="pattern"):
        PhotoFolder(root=tmp_path, pattern="none/*", name="mine").check()
    with pytest.raises(ValueError, match="root"):
        PhotoFolder(root=tmp_path / "none", pattern="*", name="mine").check()
