"""Contracts between the rooms: samples, batches, targets and outputs, with shape, unit, range and invalid code.

Legend: B batch, H W pixels, h w patches, C channels.
"""

import errno
from enum import StrEnum
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

STOPPED, DISK_FULL = 75, 73  # exit codes, EX_TEMPFAIL and EX_CANTCREAT of sysexits.h: the same command goes on
GOES_ON = "the same command goes on"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Quantity(StrEnum):
    """What a file stores: depth along the optical axis, distance along the ray, or disparity (large is near)."""

    DEPTH = "depth"
    DISTANCE = "distance"
    DISPARITY = "disparity"


class DepthKind(StrEnum):
    """What a disparity map knows."""

    METRIC = "metric"  # disparity = factor / depth in metres, factor known
    SCALE = "scale"  # up to an unknown positive scale: depth is known up to scale
    AFFINE = "affine"  # up to an unknown positive scale and a shift: depth is not recoverable
    PSEUDO = "pseudo"  # made by a teacher: affine


class ImageSample(TypedDict):
    """One image without a label, as a source returns it."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, upright
    key: str  # "<source>/<sample>", unique across the mixture


class DepthSample(ImageSample):
    """One labelled image. The label may have another size than the image, with the same field of view."""

    disparity: np.ndarray  # (h, w) float32, factor / depth; 0 where invalid and where sky
    valid: np.ndarray  # (h, w) bool: takes part in loss and metric
    sky: np.ndarray  # (h, w) bool, a subset of valid: infinitely far, disparity exactly 0
    kind: DepthKind


class Skip(NamedTuple):
    """A sample that could not be used."""

    source: str
    key: str
    reason: str


class TeacherInput(NamedTuple):
    """Images of one shape, whole and clean as the label job sees them, and what of the teacher's maps is the label."""

    places: Tensor  # (n,) int64: where they are in the batch
    image: Tensor  # (n, 3, h, w) float32, ImageNet-normalised, sides multiples of the teacher's patch size
    rows: Tensor  # (n, H) int64: the row of the teacher's map (h, w) under each row of the view
    columns: Tensor  # (n, W) int64: its columns, mirrored where the view is flipped


class DepthBatch(TypedDict):
    """What the data room hands to a task."""

    image: Tensor  # (B, 3, H, W) float32, ImageNet-normalised RGB, perturbed where the recipe says so
    disparity: Tensor  # (B, H, W) float32 in [0, 1], min-max normalised over valid pixels; 0 where invalid
    valid: Tensor  # (B, H, W) bool; all False for padding, damage, and images whose label is made online
    pseudo: Tensor  # (B,) bool: the label is (or will be) a teacher's
    weight: Tensor  # (B,) float32: share in the step's mean; 0 for padding. Its rank average sums to 1 per part
    kind: list[DepthKind]
    key: list[str]
    skipped: list[Skip]
    consumed: int  # samples of the epoch that all ranks together use up in this step
    teacher_input: NotRequired[list[TeacherInput]]  # of the images whose label is made online, one entry per shape
    cutmix: NotRequired[Tensor]  # (B, 4) int64: top, left, bottom, right of the pasted box; an empty box: no CutMix


class EvalBatch(TypedDict):
    """One labelled image for validation: the label keeps its own size. A damaged one has no maps."""

    source: str
    key: list[str]
    skipped: list[Skip]
    factor: NotRequired[float]  # numerator of the disparity: depth = factor / disparity
    image: NotRequired[Tensor]  # (1, 3, H, W) float32, ImageNet-normalised, sides multiples of the patch size
    original: NotRequired[np.ndarray]  # (., ., 3) uint8 RGB, as the source gave it
    disparity: NotRequired[Tensor]  # (1, h, w) float32, factor / depth, not normalised; 0 where invalid
    valid: NotRequired[Tensor]  # (1, h, w) bool; sky is excluded: it has no depth


class DepthOutput(NamedTuple):
    """What a depth model returns."""

    disparity: Tensor  # (B, H, W) affine-invariant, larger is nearer
    features: Tensor  # (B, C, h, w) final encoder features after the encoder's last norm


class Target(NamedTuple):
    """What a loss term compares an output with."""

    disparity: Tensor  # (B, H, W) float32
    valid: Tensor  # (B, H, W) bool
    pseudo: Tensor  # (B,) bool
    features: Tensor | None = None  # (B, C, h, w) of a frozen encoder on the same image, or None
