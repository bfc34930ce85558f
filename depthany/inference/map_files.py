"""Files of maps: npy, npz, 16-bit PNG, EXR, PFM and TIFF, each written beside its place and then moved there.

What a map means (`space` and the like) stands in the file where the format has room for it: not in npy and PFM.
Legend: H W pixels.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import OpenEXR
from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEY = "depthany"  # name of the PNG text chunk and of the EXR attribute
PNG_MAX = 65535  # codes 1..65535 span the range, 0 is invalid
TIFF_DESCRIPTION = 270  # the tag ImageDescription
SUFFIXES = (".npy", ".npz", ".png", ".exr", ".pfm", ".tiff")


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """A draft beside `path`, moved there when all went well; after an error neither it nor a half file is left."""
    draft = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_map(path: Path, values: np.ndarray, meaning: Mapping[str, Any], more: Mapping[str, np.ndarray]) -> None:
    """Writes a map; the suffix chooses the format.

    All but PNG hold the float32 values as they are; an npz calls them `disparity` or `depth` and also has the mask
    `valid`. PNG is 16 bit: 0 where invalid, otherwise
    value = low + (code - 1) / 65534 * (high - low), with low and high in the text chunk `depthany` (JSON).

    Args:
        path: With a suffix of SUFFIXES.
        values: (H, W) float32, NaN where invalid.
        meaning: What the file says of the map: `space` and other JSON values.
        more: Further arrays, kept in an npz only.

    Raises:
        ValueError: Another suffix.
    """
    suffix = path.suffix.lower()
    note = json.dumps(meaning)
    with in_place(path) as beside:
        if suffix == ".npy":
            np.save(beside, values)
        elif suffix == ".npz":
            arrays: dict[str, Any] = {_name(meaning): values, "valid": ~np.isnan(values), **more}
            np.savez_compressed(beside, **arrays | {key: np.array(text) for key, text in meaning.items()})
        elif suffix == ".png":
            _write_png16(beside, values, meaning)
        elif suffix == ".exr":
            header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage, KEY: note}
            made = BytesIO()  # OpenEXR opens no file whose name is not UTF-8, and does not say that a disk is full
            OpenEXR.File(header, {"Y": np.ascontiguousarray(values)}).write(made)
            beside.write_bytes(made.getvalue())
        elif suffix == ".pfm":  # rows bottom-up; a negative scale says little-endian
            head = f"Pf\n{values.shape[1]} {values.shape[0]}\n-1.0\n".encode()
            beside.write_bytes(head + values[::-1].astype("<f4").tobytes())
        elif suffix == ".tiff":
            Image.fromarray(values).save(beside, tiffinfo={TIFF_DESCRIPTION: note})
        else:
            raise ValueError(f"{path}: a map is saved as {', '.join(SUFFIXES)}")


def read_map(path: Path) -> tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray]]:
    """What `write_map` wrote: values (H, W) float32 with NaN where invalid, their meaning, further arrays.

    A PNG is exact to (high - low) / 131068.

    Raises:
        ValueError: The file is not a map that `write_map` wrote; it is named.
    """
    readers = {".npy": _read_npy, ".npz": _read_npz, ".png": _read_png16}
    readers |= {".exr": _read_exr, ".pfm": _read_pfm, ".tiff": _read_tiff}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: a map is read from {', '.join(SUFFIXES)}")
    try:
        values, meaning, more = readers[path.suffix.lower()](path)
    except FileNotFoundError:
        raise
    except Exception as error:  # decoders raise anything on what they do not know
        raise ValueError(f"{path}: not a map that depthany saved: {str(error) or type(error).__name__}") from error
    if values.ndim != 2 or values.dtype != np.float32:
        raise ValueError(f"{path}: not a map that depthany saved: {values.shape} {values.dtype}")
    return values, meaning, more


_Found = tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray]]


def _read_npy(path: Path) -> _Found:
    return np.load(path, allow_pickle=False), {}, {}


def _name(meaning: Mapping[str, Any]) -> str:
    """Of the map's array in an npz."""
    return "disparity" if meaning["space"] == "disparity" else "depth"


def _read_npz(path: Path) -> _Found:
    with np.load(path, allow_pickle=False) as arrays:
        found = dict(arrays)
    meaning = {key: found.pop(key).item() for key in list(found) if found[key].ndim == 0}
    del found["valid"]  # the same as NaN, for those who read the file otherwise
    return found.pop(_name(meaning)), meaning, found


def _write_png16(path: Path, values: np.ndarray, meaning: Mapping[str, Any]) -> None:
    valid = ~np.isnan(values)
    low, high = (float(values[valid].min()), float(values[valid].max())) if valid.any() else (0.0, 0.0)
    fraction = (np.where(valid, values, low).astype(np.float64) - low) / (high - low if high > low else 1.0)
    codes = np.where(valid, 1 + np.rint(fraction * (PNG_MAX - 1)), 0).astype(np.uint16)
    text = PngInfo()
    text.add_text(KEY, json.dumps({**meaning, "low": low, "high": high, "invalid": 0}))
    Image.fromarray(codes).save(path, pnginfo=text)


def _read_png16(path: Path) -> _Found:
    with Image.open(path, formats=("PNG",)) as image:
        codes, text = np.asarray(image), getattr(image, "text", {}).get(KEY)
    if text is None:
        raise ValueError(f"no text chunk {KEY!r}, so the range of the map is unknown")
    meaning = json.loads(text)
    low, high = meaning["low"], meaning["high"]
    values = low + (codes.astype(np.float64) - 1) / (PNG_MAX - 1) * (high - low)
    return np.where(codes > 0, values, np.nan).astype(np.float32), meaning, {}


def _read_exr(path: Path) -> _Found:
    with OpenEXR.File(str(path), separate_channels=True) as file:
        return np.array(file.channels()["Y"].pixels), json.loads(file.header()[KEY]), {}


def _read_pfm(path: Path) -> _Found:
    data = path.read_bytes()
    if not (header := re.match(rb"Pf\n(\d+) (\d+)\n-1\.0\n", data)):
        raise ValueError("no header of a little-endian PFM of one channel")
    width, height = map(int, header.groups())
    rows = np.frombuffer(data, "<f4", offset=header.end()).reshape(height, width)[::-1]
    return rows.astype(np.float32), {}, {}


def _read_tiff(path: Path) -> _Found:
    with Image.open(path, formats=("TIFF",)) as image:
        return np.array(image), json.loads(image.tag_v2[TIFF_DESCRIPTION]), {}  # type: ignore[attr-defined]
