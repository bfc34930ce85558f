"""Labels: how pseudo-labels are made, stored, read back, and judged.

Legend: h w pixels of a label.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, TypedDict, TypeGuard

import cv2
import numpy as np

from depthany.data.files import MAX_PIXELS, decode_depth
from depthany.types import DepthKind, DepthSample, ImageSample

# Largest error of a codec as a share of the map's range (max - min).
CODEC_ERROR = {"png16": 0.5 / 65535, "float16": 2.0**-12, "png8": 0.5 / 255}
NEAR_CONSTANT = 0.05  # contrast below which a map says next to nothing


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """How pseudo-labels are made and which of them are used.

    Args:
        mode: offline: the teacher labels the shards once; online: it runs inside the student's step; stored: labels
            that are there already are checked and used.
        teacher: mode stored: whose labels (the name in the label shards' names); null: the only one's; any: each set
            may have another teacher's.
        input_size: short side at the teacher's input in pixels; null: the size that the teacher was trained at.
        precision: of the teacher's forward pass, fp32 or bf16; null in mode stored.
        batch_size: images of one shape that the label job runs at once.
        resolution: of stored labels: full is the size of the network's output, half is half of it on both sides.
        codec: how stored labels are written: png16 (16 bits, the map's range beside it), float16 (compressed) or png8.
        quality: flip: the teacher also sees each image mirrored, flip_scale: and smaller, and each label gets a score
            in [0, 1] by how well the answers agree (2 and 2.6 times the work); none: no score.
        min_quality: labels with a smaller score are left out of training; null: none is.

    Raises:
        ValueError: the options contradict each other.
    """

    mode: Literal["offline", "online", "stored"]
    teacher: str | None
    input_size: int | None
    precision: Literal["fp32", "bf16"] | None
    batch_size: int | None
    resolution: Literal["full", "half"] | None
    codec: Literal["png16", "float16", "png8"] | None
    quality: Literal["none", "flip", "flip_scale"] | None
    min_quality: float | None

    def __post_init__(self) -> None:
        made = {name: getattr(self, name) for name in ("batch_size", "resolution", "codec", "quality")}
        needed = made | {"precision": self.precision} if self.mode == "offline" else {}
        if self.mode == "online":
            needed = {"precision": self.precision}
        for name, value in needed.items():
            if value is None:
                raise ValueError(f"labels={self.mode} needs labels.{name}")
        for name in ("batch_size", "input_size"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"labels.{name}={number}: give a number of at least 1")
        if self.min_quality is not None:
            if not 0 <= self.min_quality <= 1:
                raise ValueError(f"labels.min_quality={self.min_quality}: a score lies between 0 and 1")
            if self.mode == "online" or (self.mode == "offline" and self.quality == "none"):
                raise ValueError("labels.min_quality needs scores: labels.quality=flip, or labels=stored")


class Label(TypedDict):
    """The label part of a DepthSample."""

    disparity: np.ndarray  # (h, w) float32
    valid: np.ndarray  # (h, w) bool
    sky: np.ndarray  # (h, w) bool
    kind: DepthKind


def has_label(sample: ImageSample | DepthSample) -> TypeGuard[DepthSample]:
    """Whether a sample is labelled."""
    return "disparity" in sample


def encode_pseudo(disparity: np.ndarray, codec: str) -> dict[str, bytes]:
    """A teacher's map as shard members. The map's own range is kept, so scale and shift survive.

    Args:
        disparity: (h, w) float.
        codec: png16, png8 or float16; the error is at most CODEC_ERROR[codec] of the range.

    Raises:
        ValueError: a value is not finite.
    """
    low, high = float(disparity.min()), float(disparity.max())
    if not np.isfinite(high - low):
        raise ValueError("the teacher's map is not finite")
    unit = (disparity - low) / (high - low) if high > low else np.zeros_like(disparity)
    note = json.dumps({"kind": "pseudo", "low": low, "high": high}).encode()
    if codec == "float16":
        buffer = BytesIO()
        np.savez_compressed(buffer, disparity=unit.astype(np.float16))
        return {"disparity.npz": buffer.getvalue(), "json": note}
    levels, dtype = (65535, np.uint16) if codec == "png16" else (255, np.uint8)
    return {"disparity.png": _png(np.rint(unit * levels).astype(dtype)), "json": note}


def encode_truth(sample: DepthSample, *, note: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """A measured or rendered label as shard members, without loss: float32, NaN where invalid, -1 where sky.

    Args:
        sample: with the label.
        note: plain values that go into the JSON beside the kind, such as where the sample comes from.
    """
    stored = np.where(sample["sky"], np.float32(-1), np.where(sample["valid"], sample["disparity"], np.float32(np.nan)))
    return {
        "disparity.npy": _npy(stored.astype(np.float32)),
        "json": json.dumps({"kind": str(sample["kind"]), **(note or {})}).encode(),
    }


def decode_label(members: Callable[[str], bytes], suffixes: Mapping[str, Any]) -> Label:
    """The label part of a DepthSample from a sample's members.

    Args:
        members: reads a member by suffix.
        suffixes: the members that are there.

    Raises:
        ValueError: damaged, as are a KeyError, TypeError, EOFError or cv2.error.
    """
    note = json.loads(members("json"))
    kind = DepthKind(note["kind"])
    if "disparity.png" in suffixes:
        stored = _picture(members("disparity.png"))
    elif "disparity.npz" in suffixes:
        stored = decode_depth(members("disparity.npz"), ".npz").astype(np.float32)
    else:
        stored = _read_npy(members("disparity.npy"))
    if kind == DepthKind.PSEUDO:
        disparity = stored * np.float32(note["high"] - note["low"]) + np.float32(note["low"])
        everywhere = np.ones(disparity.shape, bool)
        return {"disparity": disparity, "valid": everywhere, "sky": ~everywhere, "kind": kind}
    sky, valid = stored == -1, stored == stored  # NaN alone is not itself
    return {"disparity": np.where(valid ^ sky, stored, np.float32(0)), "valid": valid, "sky": sky, "kind": kind}


def half(disparity: np.ndarray) -> np.ndarray:
    """The map (h, w) at half the size on both sides, odd ones rounded up: means of 2 x 2 pixels."""
    height, width = disparity.shape
    return cv2.resize(disparity, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA)


def judge(disparity: np.ndarray, others: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How much a teacher's map can be trusted, by its answers to changed views of the same image.

    Each other answer, brought back to the view of the map, is fitted to it by least squares in scale and shift. Its
    *disagreement* is the mean absolute difference that is left, as a share of the map's range (max - min). The *score*
    is the share of the map's variance that the fitted answer explains, 1 - residual / variance, the smallest of all
    answers; it is 0 where an answer fits only with a negative scale, and for a map that is nearly constant: one whose
    *contrast*, the distance from its 5th to its 95th percentile as a share of its largest magnitude, is below
    NEAR_CONSTANT. All four do not change with the scale of the map, and the first two not with its shift.

    Args:
        disparity: (h, w) float.
        others: further answers (h, w) by the name of the view.

    Returns:
        quality (the score in [0, 1]), contrast, and a disagreement by each name, to four decimals.
    """
    low, dark, bright, top = np.percentile(disparity.astype(np.float64), [0, 5, 95, 100])
    magnitude = max(abs(low), abs(top))
    contrast = (bright - dark) / magnitude if magnitude > 0 else 0.0
    score = 1.0 if contrast >= NEAR_CONSTANT else 0.0
    variance = float(np.var(disparity, dtype=np.float64))
    found: dict[str, float] = {}
    for name, other in others.items():
        left, scale = residual(disparity, other)
        found[name] = float(np.mean(np.abs(left))) / (top - low) if top > low else 0.0
        explained = 1 - float(np.mean(left**2)) / variance if variance > 0 and scale > 0 else 0.0
        score = min(score, max(explained, 0.0))
    return {name: round(float(value), 4) for name, value in {"quality": score, "contrast": contrast, **found}.items()}


def residual(disparity: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float]:
    """What is left of a map after another is fitted to it by least squares in scale and shift, and that scale.

    Args:
        disparity: (h, w) float.
        other: (h, w) float; a constant one gets the scale 0.

    Returns:
        (h, w) float64, and the scale.
    """
    target, centred = disparity.astype(np.float64), other.astype(np.float64)
    target -= target.mean()
    centred -= centred.mean()
    spread = float(np.mean(centred**2))
    scale = float(np.mean(centred * target)) / spread if spread > 0 else 0.0
    return target - scale * centred, scale


def _picture(data: bytes) -> np.ndarray:
    """A one-channel PNG in [0, 1], float32."""
    if len(data) >= 24 and np.prod(struct.unpack(">II", data[16:24]), dtype=float) > MAX_PIXELS:
        raise ValueError(f"disparity.png has more than {MAX_PIXELS} pixels")
    raw: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise ValueError("disparity.png is damaged")
    return raw.astype(np.float32) / np.float32(np.iinfo(raw.dtype).max)


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_npy(data: bytes) -> np.ndarray:
    """What `_npy` has written, float32 and read-only: unlike np.load, without a copy of the numbers."""
    buffer = BytesIO(data)
    if np.lib.format.read_magic(buffer) != (1, 0):
        raise ValueError("disparity.npy is of another version than 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
    numbers = np.frombuffer(data, dtype, offset=buffer.tell())
    return numbers.reshape(shape, order="F" if is_fortran else "C").astype(np.float32, copy=False)


def _png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()
