"""One's own images and labels, listed in a CSV file."""

import csv
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from depthany.data.files import DecodeError, read_depth, read_image, sample_key
from depthany.data.sources.raw import Row
from depthany.geometry.cameras import ray_norms
from depthany.geometry.disparity import to_disparity
from depthany.types import DepthKind, DepthSample, Quantity

REQUIRED = ("image", "depth", "dataset", "kind", "scale_to_metres", "invalid")


def _rotate_right_by_3(values: np.ndarray) -> np.ndarray:
    """SUN RGB-D stores its 16 bits rotated left by three."""
    if values.dtype != np.uint16:
        raise DecodeError(f"16 bits are to be rotated, but the file holds {values.dtype}")
    return (values >> 3) | (values << 13)


DECODERS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda values: values,
    "rotate the 16 bits right by 3": _rotate_right_by_3,
}


class _Row(NamedTuple):
    image: Path  # relative to the root
    depth: Path
    dataset: str
    key: str
    quantity: Quantity
    kind: DepthKind
    scale: float
    invalid: tuple[float, ...]  # as stored, after decoding
    sky_above: float | None  # scaled
    decode: str
    focal_px: float | None  # of the image
    centre_px: tuple[float | None, float | None]
    channel: str | None
    array_key: str | None


class IndexCsv:
    """Image and label pairs listed in a CSV file; each row says what its label means.

    Columns:
        image, depth: paths relative to the root.
        dataset: group of the row.
        kind: depth, distance (along the ray) or disparity.
        scale_to_metres: metres per stored one; empty: depth up to scale.
        invalid: stored codes separated by ";", nan and inf included, or "none". "values above N
            are sky" marks sky.

    Optional columns:
        scale_to_pixels: of a disparity.
        decode: a key of `DECODERS`.
        focal_px or fx, cx, cy: in pixels of the image, pixel centres at half integers. A distance
            needs the focal length; the centre is the default for cx, cy.
        channel, array_key: which EXR channel, which array of an NPZ or HDF5 file.
        note: free text.

    A disparity with a Middlebury `calib.txt` beside it gets the offset doffs of that file, because
    depth = baseline * f / (disparity + doffs), and is then known up to scale. Where the note says
    "doffs" but the file is missing, it is affine.
    """

    def __init__(
        self,
        *,
        root: Path | str,
        index: str,
        include: Sequence[str],
        exclude: Sequence[str],
        name: str,
    ) -> None:
        """No file is touched: `check` reads the index, or whatever asks first.

        Args:
            root: folder of the index; its paths start here.
            index: name of the CSV file.
            include: values of the column `dataset` to keep; empty: all.
            exclude: values of the column `dataset` to drop.
            name: of the source.
        """
        self.name = name
        self.root = Path(root)
        self.index = self.root / index
        self.include, self.exclude = include, exclude

    def check(self) -> None:
        """Reads and checks the index; no image is opened.

        Raises:
            ValueError: the file, row and column that is wrong, and the way out.
        """
        len(self)

    @cached_property
    def _rows(self) -> list[_Row]:
        if not self.index.is_file():
            raise ValueError(f"source {self.name}: {self.index} is missing: correct `root` or `index`")
        with self.index.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            try:
                columns = reader.fieldnames or ()
                cells = [(reader.line_num, {k: (v or "").strip() for k, v in row.items() if k}) for row in reader]
            except (UnicodeDecodeError, csv.Error) as err:
                raise ValueError(f"{self.index} is no CSV file in UTF-8 ({err}): save it as one") from err
        missing = [column for column in REQUIRED if column not in columns]
        if missing:
            raise ValueError(f"{self.index}: no column {', '.join(missing)}: add it to the header line")
        datasets = {row["dataset"] for _, row in cells}
        unknown = sorted({*self.include, *self.exclude} - datasets)
        if unknown:
            raise ValueError(
                f"{self.index}: no row has dataset {', '.join(unknown)}; there are "
                f"{', '.join(sorted(datasets))}: correct `include` or `exclude`"
            )
        rows: list[_Row] = []
        seen: dict[str, int] = {}
        for line, row in cells:
            if row["dataset"] in self.exclude or (self.include and row["dataset"] not in self.include):
                continue
            try:
                parsed = _parse(row, self.root)
                if parsed.key in seen:
                    raise ValueError(f"image is the same as in row {seen[parsed.key]}: drop one")
            except ValueError as err:
                raise ValueError(f"{self.index}, row {line}: {err}") from err
            seen[parsed.key] = line
            rows.append(parsed)
        if not rows:
            raise ValueError(f"{self.index}: no rows are left: add some or change `include`")
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """`<dataset>/<path of the image>`, unique."""
        return self._rows[index].key

    def row(self, index: int) -> Row:
        """The sample's files, and what its line says of them."""
        row = self._rows[index]
        said = row._asdict() | {"invalid": [str(code) for code in row.invalid]}  # NaN is no JSON
        extra: dict[str, Any] = {name: value for name, value in said.items() if name not in ("image", "depth", "key")}
        calibration = _calibration(row.depth)
        if row.quantity is Quantity.DISPARITY and (self.root / calibration).is_file():
            return Row(row.key, str(row.image), str(row.depth), {"line": extra, "calibration": f"./{calibration}"})
        return Row(row.key, str(row.image), str(row.depth), {"line": extra})

    def data(self, index: int) -> bytes:
        """The original bytes of the image."""
        return (self.root / self._rows[index].image).read_bytes()

    def group(self, index: int) -> str:
        """The column `dataset`, to split by."""
        return self._rows[index].dataset

    def focal_of(self, index: int) -> float | None:
        """The focal length in pixels of the image, where the row says it."""
        return self._rows[index].focal_px

    def identity(self) -> dict[str, Any]:
        """What a packed copy depends on: the rows in use and the sizes of their files."""
        digest = hashlib.sha256()
        for row in self._rows:
            files = [self.root / path for path in (row.image, row.depth)]
            sizes = [path.stat().st_size if path.exists() else -1 for path in files]
            digest.update(f"{row} {sizes}\n".encode())
        return {"rows": digest.hexdigest()}

    def prepare(self) -> None:
        """Check that all files exist; call once before training.

        Raises:
            ValueError: with the number of missing files and the first of them.
        """
        paths = [self.root / path for row in self._rows for path in (row.image, row.depth)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"{self.index}: {len(missing)} of {len(paths)} files are missing, "
                f"first {missing[0]}: correct the row or `root`, which paths are relative to"
            )

    def read(self, index: int) -> DepthSample:
        """Image and label; the label keeps its own size.

        Disparity is 1 / depth; or in pixels where the file stores disparity.

        Raises:
            DecodeError: a damaged file, which is named.
            OSError: a file cannot be read at all.
        """
        row = self._rows[index]
        try:
            image = read_image((self.root / row.image).read_bytes())
        except DecodeError as err:
            raise DecodeError(f"{self.root / row.image}: {err}") from err
        path = self.root / row.depth
        stored = read_depth(path, channel=row.channel, key=row.array_key)
        try:
            values = DECODERS[row.decode](stored)
            if row.quantity is Quantity.DISPARITY:
                values = _add_offset(values, _disparity_offset(path) / row.scale, row.invalid)
        except DecodeError as err:
            raise DecodeError(f"{path}: {err}") from err
        disparity, valid, sky = to_disparity(
            values,
            quantity=row.quantity,
            scale=row.scale,
            factor=1.0,
            invalid=row.invalid,
            sky=None,
            sky_above=row.sky_above,
            rays=_rays(row, image.shape[:2], values.shape),
        )
        return {
            "image": image,
            "key": row.key,
            "disparity": disparity.numpy(),
            "valid": valid.numpy(),
            "sky": sky.numpy(),
            "kind": row.kind,
        }


def _parse(row: Mapping[str, str], root: Path) -> _Row:
    """Cells to a row; ValueError says which column is wrong."""
    for column in ("image", "depth", "dataset"):
        if not row[column]:
            raise ValueError(f"{column} is empty")
    if row["kind"] not in list(Quantity):
        raise ValueError(f"kind is {row['kind']!r}: write one of {', '.join(Quantity)}")
    quantity = Quantity(row["kind"])
    is_disparity = quantity is Quantity.DISPARITY
    decode = row.get("decode", "")
    if decode not in DECODERS:
        known = "; ".join(filter(None, DECODERS))
        raise ValueError(f"decode is {decode!r}: leave it empty or write one of: {known}")
    metric = _number(row, "scale_to_metres")
    if is_disparity and metric is not None:
        raise ValueError("scale_to_metres is for depth or distance: use scale_to_pixels")
    scale = (_number(row, "scale_to_pixels") if is_disparity else metric) or 1.0
    invalid, sky_above = _codes(row["invalid"])
    if is_disparity and sky_above is not None:
        raise ValueError("invalid marks large values as sky, but large disparities are near")
    focal_px = _number(row, "focal_px") or _number(row, "fx")
    if quantity is Quantity.DISTANCE and focal_px is None:
        raise ValueError("kind distance needs the focal length: add a column focal_px or fx")
    kind = DepthKind.METRIC if metric is not None else DepthKind.SCALE
    image, depth = Path(row["image"]), Path(row["depth"])
    if is_disparity and "doffs" in row.get("note", "") and not _calibration(root / depth).is_file():
        kind = DepthKind.AFFINE
    return _Row(
        image=image,
        depth=depth,
        dataset=row["dataset"],
        key=sample_key(row["dataset"], image),
        quantity=quantity,
        kind=kind,
        scale=scale,
        invalid=invalid,
        sky_above=None if sky_above is None else sky_above * scale,
        decode=decode,
        focal_px=focal_px,
        centre_px=(_number(row, "cx"), _number(row, "cy")),
        channel=row.get("channel") or None,
        array_key=row.get("array_key") or None,
    )


def _number(row: Mapping[str, str], column: str) -> float | None:
    """The positive number in a cell, None where it is empty or the column is missing."""
    text = row.get(column, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{column} is {text!r}: write a number above 0 or leave it empty")
    return number


def _codes(text: str) -> tuple[tuple[float, ...], float | None]:
    """Invalid codes and the stored value above which a depth is sky.

    >>> _codes("none; values above about 1000 are background/sky")
    ((), 1000.0)
    """
    codes: list[float] = []
    sky_above = None
    for part in (part.strip() for part in text.split(";")):
        if part.lower() == "none":
            continue
        sentence = re.search(r"values above\D*?(\d[\d.]*(?:e\d+)?)", part)
        if sentence:
            sky_above = float(sentence[1])
            continue
        try:
            codes.append(float(part))
        except ValueError:
            raise ValueError(f'invalid is {text!r}: write codes such as "0;65535;nan", or "none"') from None
    return tuple(codes), sky_above


def _calibration(path: Path) -> Path:
    return path.with_name("calib.txt")


def _disparity_offset(path: Path) -> float:
    """Middlebury's doffs, pixels between the principal points; 0 without a calibration file."""
    calibration = _calibration(path)
    if not calibration.is_file():
        return 0.0
    found = re.search(r"^doffs=([-+.\deE]+)\s*$", calibration.read_text(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def _add_offset(values: np.ndarray, offset: float, invalid: Sequence[float]) -> np.ndarray:
    """Adds to measured values only, so that invalid codes stay what they are."""
    if offset == 0:
        return values
    return np.where(np.isin(values, invalid), values, values + offset).astype(np.float32)


def _rays(row: _Row, image: tuple[int, ...], label: tuple[int, ...]) -> Tensor | None:
    """(h, w) ray lengths of the label, whose size may differ from the image's."""
    if row.quantity is not Quantity.DISTANCE or row.focal_px is None:
        return None
    (height, width), (h, w) = image, label
    cx, cy = row.centre_px
    return ray_norms(
        h,
        w,
        row.focal_px * w / width,
        w / 2 if cx is None else cx * w / width,
        h / 2 if cy is None else cy * h / height,
    )
