"""Image and depth files to arrays. What cannot be decoded whole is a DecodeError, never a guess.

Images are told apart by their first bytes, whatever the file is called. Depth formats are told
apart by the suffix, and the content must then agree with it.
"""

import hashlib
import math
import re
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path, PurePath

import cv2
import h5py
import numpy as np
import OpenEXR
from PIL import Image, UnidentifiedImageError

from depthany.geometry.pictures import orientation, upright, upright_rgb

# JPEG includes MPO, a JPEG with further pictures behind it; PPM the netpbm family PBM, PGM, PPM.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 64_000_000  # a header that promises more is taken for a decompression bomb


class DecodeError(ValueError):
    """A file whose content cannot be used; the message is a short reason."""


def sample_key(source: str, path: PurePath) -> str:
    """`<source>/<path>` in the letters of shard keys, at most 200; distinct paths stay distinct.

    The dot of the suffix becomes "_" (a dot ends a key in a tar shard). Where anything else had to
    be replaced or cut, a hash of the whole is appended.
    """
    named = path.with_name(f"{path.stem}_{path.suffix[1:]}").as_posix()
    text = f"{source}/{named}".encode(errors="backslashreplace").decode()  # undecodable file names
    key = re.sub(r"[^A-Za-z0-9_+=@/-]", "_", text)
    if key == text and len(key) <= 200:
        return key
    return f"{key[:180]}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _open(data: bytes, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    """The picture's header, checked; pixels are not decoded yet."""
    if not data:
        raise DecodeError("the file is empty")
    image = Image.open(BytesIO(data), formats=formats)
    if image.width * image.height > max_pixels:
        raise DecodeError(f"{image.width}x{image.height} pixels are more than the limit of {max_pixels}")
    return image


def read_image(data: bytes, *, max_pixels: int = MAX_PIXELS, reduce_to: int | None = None) -> np.ndarray:
    """The picture in an encoded file, (H, W, 3) uint8 RGB, upright.

    JPEG, MPO, PNG, WebP, BMP, TIFF, GIF and netpbm, by content; the first frame of several. EXIF
    orientation is applied; `upright_rgb` says what becomes of grey, palette, CMYK, alpha and 16 bits.

    Args:
        data: the bytes of the file.
        max_pixels: refuse larger pictures before decoding them.
        reduce_to: a JPEG whose short side is twice this or more is decoded at 1/2, 1/4 or 1/8, never below this: in
            half the time, and smoother (libjpeg averages where bicubic resizing skips pixels). None: at its own size.

    Raises:
        DecodeError: another format, damaged, truncated, or too large.
    """
    try:
        image = _open(data, IMAGE_FORMATS, max_pixels)
        pixels = None
        if image.format == "JPEG" and image.mode == "RGB":
            # The same pixels as PIL, faster. None where it gives up: PIL then says why.
            flags = _reduced(min(image.size), reduce_to) | cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        return upright_rgb(image) if pixels is None else upright(pixels, orientation(image))
    except DecodeError:
        raise
    except Exception as err:  # decoders raise anything on damaged bytes
        raise DecodeError(_reason(err)) from err


def _reduced(short_side: int, reduce_to: int | None) -> int:
    """OpenCV's flag for the smallest decoding that is not below `reduce_to`; 0 for the whole."""
    scales = {8: cv2.IMREAD_REDUCED_COLOR_8, 4: cv2.IMREAD_REDUCED_COLOR_4, 2: cv2.IMREAD_REDUCED_COLOR_2}
    flags = (flag & ~cv2.IMREAD_COLOR for scale, flag in scales.items() if short_side >= scale * (reduce_to or np.inf))
    return next(flags, 0)


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of the upright picture in an encoded file, from its header alone.

    Raises:
        DecodeError: another format, or too large.
    """
    try:
        image = _open(data, IMAGE_FORMATS, max_pixels)
        turned = orientation(image) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)
    except DecodeError:
        raise
    except Exception as err:  # decoders raise anything on damaged bytes
        raise DecodeError(_reason(err)) from err


def _reason(err: Exception) -> str:
    if isinstance(err, UnidentifiedImageError):
        return f"not an image of a supported format ({', '.join(IMAGE_FORMATS)})"
    return f"damaged or unsupported: {str(err) or type(err).__name__}"[:200]


def _read_picture(data: bytes) -> np.ndarray:
    """One-channel PNG or TIFF: uint8, uint16, int32 or float32."""
    image = _open(data, ("PNG", "TIFF"), MAX_PIXELS)
    image.load()
    if image.mode not in ("L", "F") and not image.mode.startswith("I"):
        raise DecodeError(f"mode {image.mode}, wanted one channel of 8 or 16 bits, or float32")
    values = np.asarray(image)
    return values.astype(np.uint16) if image.format == "PNG" and image.mode == "I" else values


def _read_pgm(data: bytes) -> np.ndarray:
    """Binary PGM; 16 bits are big-endian by the format.

    PIL rescales by the maximum named in the header, which loses the unit.
    """
    gap = rb"(?:\s+(?:#[^\n]*\n)?)+"
    header = re.match(rb"P5" + (gap + rb"(\d+)") * 3 + rb"\s", data)
    if header is None:
        raise DecodeError("not a binary PGM (P5)")
    width, height, maximum = map(int, header.groups())
    return _raw(data[header.end() :], ">u2" if maximum > 255 else "u1", (height, width))


def _read_pfm(data: bytes) -> np.ndarray:
    """PFM, rows stored bottom-up.

    The sign of the scale is the byte order; its magnitude is ignored, as BlendedMVS readers do
    (naver/dust3r, datasets_preprocess/preprocess_blendedMVS.py).
    """
    header = re.match(rb"P([fF])\s+(\d+)\s+(\d+)\s+([-+]?[\d.eE+-]+)[ \t]*\r?\n", data)
    if header is None:
        raise DecodeError("not a PFM (Pf or PF)")
    letter, width, height, scale = header.groups()
    channels = (3,) if letter == b"F" else ()
    dtype = "<f4" if float(scale) < 0 else ">f4"
    return _raw(data[header.end() :], dtype, (int(height), int(width), *channels))[::-1]


def _raw(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape)
    if len(data) < count * np.dtype(dtype).itemsize:
        raise DecodeError("truncated")
    return np.frombuffer(data, dtype, count).reshape(shape)


def _read_npz(data: bytes, key: str | None) -> np.ndarray:
    with zipfile.ZipFile(BytesIO(data)) as archive:  # sizes first: a small archive may unfold to anything
        if sum(member.file_size for member in archive.infolist()) > 8 * MAX_PIXELS:
            raise DecodeError(f"unpacks to more than {8 * MAX_PIXELS} bytes")
    with np.load(BytesIO(data), allow_pickle=False) as arrays:
        return np.asarray(arrays[_only(list(arrays), key, "key")])


def _read_exr(data: bytes, channel: str | None) -> np.ndarray:
    """One channel, or channels that are all the same; half stays float16."""
    with OpenEXR.File(BytesIO(data), separate_channels=True) as file:
        planes = {name: np.array(plane.pixels) for name, plane in file.channels().items()}
    first = next(iter(planes.values()))
    if channel is None and all(np.array_equal(first, p, equal_nan=True) for p in planes.values()):
        return first
    return planes[_only(list(planes), channel, "channel")]


def _read_hdf5(source: Path | BytesIO, key: str | None) -> np.ndarray:
    with h5py.File(source, "r", locking=False) as file:
        names: list[str] = []
        file.visititems(lambda n, node: names.append(n) if isinstance(node, h5py.Dataset) else None)
        return np.asarray(file[_only(names, key.strip("/") if key else None, "key")])


def _only(names: list[str], wanted: str | None, argument: str) -> str:
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted not in names:
        raise DecodeError(f"holds {names[:20]}: name one of them with {argument}=")
    return wanted


def _plane(values: np.ndarray) -> np.ndarray:
    """A writable native (h, w) array, or DecodeError."""
    if values.dtype.kind not in "uif":
        raise DecodeError(f"values of type {values.dtype}, wanted numbers")
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim == 3 and (values == values[..., :1]).all():  # a grey picture in three channels
        values = values[..., 0]
    if values.ndim != 2 or 0 in values.shape:
        raise DecodeError(f"shape {values.shape}, wanted one (h, w) map: store a single channel")
    return np.array(values, values.dtype.newbyteorder("="))


_READERS: dict[str, Callable[[bytes, str | None, str | None], np.ndarray]] = {
    ".png": lambda data, channel, key: _read_picture(data),
    ".tif": lambda data, channel, key: _read_picture(data),
    ".tiff": lambda data, channel, key: _read_picture(data),
    ".pgm": lambda data, channel, key: _read_pgm(data),
    ".pfm": lambda data, channel, key: _read_pfm(data),
    ".npy": lambda data, channel, key: np.load(BytesIO(data), allow_pickle=False),
    ".npz": lambda data, channel, key: _read_npz(data, key),
    ".exr": lambda data, channel, key: _read_exr(data, channel),
    ".h5": lambda data, channel, key: _read_hdf5(BytesIO(data), key),
    ".hdf5": lambda data, channel, key: _read_hdf5(BytesIO(data), key),
}

DEPTH_SUFFIXES = tuple(_READERS)
_FIRST_BYTES = {
    b"\x89PNG": ".png",
    b"II*\0": ".tiff",
    b"MM\0*": ".tiff",
    b"P5": ".pgm",
    b"Pf": ".pfm",
    b"PF": ".pfm",
    b"\x93NUMPY": ".npy",
    b"PK": ".npz",
    b"v/1\x01": ".exr",
    b"\x89HDF": ".h5",
}


def depth_suffix(data: bytes) -> str | None:
    """The suffix of the depth format that a file begins like, whatever it is called; None for no known one."""
    return next((suffix for first, suffix in _FIRST_BYTES.items() if data.startswith(first)), None)


def decode_depth(data: bytes, suffix: str, *, channel: str | None = None, key: str | None = None) -> np.ndarray:
    """The map in an encoded file, (h, w), in the stored type and unit, top row first.

    PNG (8 or 16 bits), TIFF, PGM, PFM, NPY, NPZ, EXR and HDF5, by suffix. Invalid codes are left
    as they are.

    Args:
        data: the bytes of the file.
        suffix: ".png", ".npy", …; upper and lower case are the same.
        channel: which EXR channel; needed where several differ.
        key: which array of an NPZ or HDF5 file; needed where it holds several.

    Raises:
        DecodeError: unknown suffix, damaged content, or not a single map of numbers.
    """
    reader = _READERS.get(suffix.lower())
    if reader is None:
        raise DecodeError(f"suffix {suffix!r} is not one of {', '.join(_READERS)}")
    if not data:
        raise DecodeError("the file is empty")
    try:
        return _plane(reader(data, channel, key))
    except DecodeError:
        raise
    except Exception as err:  # decoders raise anything on damaged bytes
        raise DecodeError(f"damaged or not a {suffix} file: {err}"[:200]) from err


def read_depth(path: Path, *, channel: str | None = None, key: str | None = None) -> np.ndarray:
    """The map in a file: `decode_depth` of its bytes, with the file named in the error.

    Raises:
        DecodeError: as `decode_depth`.
        OSError: the file cannot be read at all.
    """
    try:
        return decode_depth(path.read_bytes(), path.suffix, channel=channel, key=key)
    except DecodeError as err:
        raise DecodeError(f"{path}: {err}") from err
