"""Label codecs: a disparity map as the members of a shard sample, and back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal, TypedDict, TypeGuard

import cv2
import numpy as np

from depthany.types import DepthKind, DepthSample, ImageSample

# Largest error of a codec as a share of the map's range (max - min).
CODEC_ERROR = {"png16": 0.5 / 65535, "float16": 2.0**-12, "png8": 0.5 / 255}


@dataclass(frozen=True, kw_only=True)
class LabelPlan:
    """How pseudo-labels are made.

    Args:
        mode: offline: the teacher labels the shards once; online: it runs inside the student's step.
        codec: how stored labels are written: png16 (its range beside it), float16 or png8.
        input_size: short side at the teacher's input in pixels; null: the size that the teacher was trained at.
        batch_size: images of one shape that the label job runs at once.
        precision: of the teacher's forward pass.
    """

    mode: Literal["offline", "online"]
    codec: Literal["png16", "float16", "png8"] | None
    input_size: int | None
    batch_size: int | None
    precision: Literal["fp32", "bf16"]


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
        disparity: (h, w) float, finite.
        codec: png16, png8 or float16; the error is at most CODEC_ERROR[codec] of the range.
    """
    low, high = float(disparity.min()), float(disparity.max())
    unit = (disparity - low) / (high - low) if high > low else np.zeros_like(disparity)
    note = json.dumps({"kind": "pseudo", "low": low, "high": high}).encode()
    if codec == "float16":
        return {"disparity.npy": _npy(unit.astype(np.float16)), "json": note}
    levels, dtype = (65535, np.uint16) if codec == "png16" else (255, np.uint8)
    return {"disparity.png": _png(np.rint(unit * levels).astype(dtype)), "json": note}


def encode_truth(sample: DepthSample) -> dict[str, bytes]:
    """A measured or rendered label as shard members, without loss: float32, NaN where invalid, -1 where sky."""
    stored = np.where(sample["sky"], np.float32(-1), np.where(sample["valid"], sample["disparity"], np.float32(np.nan)))
    return {
        "disparity.npy": _npy(stored.astype(np.float32)),
        "json": json.dumps({"kind": str(sample["kind"])}).encode(),
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
        raw: np.ndarray | None = cv2.imdecode(np.frombuffer(members("disparity.png"), np.uint8), cv2.IMREAD_UNCHANGED)
        if raw is None:
            raise ValueError("disparity.png is damaged")
        stored = raw.astype(np.float32) / np.float32(np.iinfo(raw.dtype).max)
    else:
        stored = np.load(BytesIO(members("disparity.npy")), allow_pickle=False).astype(np.float32)
    if kind == DepthKind.PSEUDO:
        disparity = stored * np.float32(note["high"] - note["low"]) + np.float32(note["low"])
        everywhere = np.ones(disparity.shape, bool)
        return {"disparity": disparity, "valid": everywhere, "sky": ~everywhere, "kind": kind}
    sky, valid = stored == -1, ~np.isnan(stored)
    return {"disparity": np.where(valid & ~sky, stored, np.float32(0)), "valid": valid, "sky": sky, "kind": kind}


def _npy(array: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()
