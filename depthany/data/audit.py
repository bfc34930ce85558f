"""Finds labels that are wrong in one of the classic ways, from nothing but images and labels.

`measure` takes the numbers of one sample, `verdicts` judges a set by them. Every test may answer that it cannot tell.

Legend: H W pixels of the image, h w pixels of the label, n windows, p pixels of a window, f disparity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from depthany.types import DepthKind, DepthSample

State = Literal["clean", "flagged", "cannot tell"]
PLANE_SIDE = 120  # short side in pixels at which windows are compared with planes
WINDOWS = (12, 20, 32)  # their sides there
RAY_WINDOWS = (32, 60)  # the ray bends a plane only slowly
STRONG = 3.0  # power of the bend over that of the rest, from which on it is none of a sensor: NYU reaches 2.1
EDGE_SIDE = 240  # short side in pixels at which edges are compared
REACH = 24  # shifts that are tried there, in pixels each way
FAR_SHIFT = 6.0  # deviations by which a shift must stand out; chance gives 5.4 (scripts/audit_rates.py)
NEAR = 2  # a shift of this many pixels counts as none: sensors are registered no better
FEW = 0.02  # share of samples up to which a plateau is chance
PAIR_SHAPE = (96, 128)  # (h, w) at which labels are compared with the images of other samples
USUAL_NEAR_M = 15.0  # the nearest hundredth of a picture is nearer than this
USUAL_MEDIAN_M = 0.25  # and its middle farther than this, in metres
OUTSIDE = 0.05  # share of pixels that may lie outside the card's range
ALIKE = 0.3  # mean likeness of the labels of a set, from which on they could be mixed up unseen


class Verdict(NamedTuple):
    """What a test says about a set."""

    test: str
    state: State
    number: float  # the evidence; NaN where there is none
    words: str  # the evidence, or why it cannot tell


@dataclass(frozen=True)
class Measured:
    """The numbers of one sample."""

    key: str
    kind: DepthKind
    image_shape: tuple[int, int]
    label_shape: tuple[int, int]
    valid: float  # share of the pixels, sky included
    sky: float  # share of the pixels
    nan: int  # pixels of the disparity, valid or not
    inf: int
    negative: int
    constant: bool  # all measured pixels have one value
    depth: np.ndarray  # (101,) percentiles of factor / disparity where measured; empty where nothing is
    planes: np.ndarray  # (n,) log of (misfit of a plane to 1 / f over that to f); sloped, smooth windows
    row: float  # rank correlation of disparity and row; NaN: too few pixels
    focal: float | None  # in widths of the image; None: unknown
    rays: np.ndarray  # (2, n) share of the ray's bend that the label has (0 planar, 1 ray), and the weight of it
    shifts: np.ndarray  # (2 REACH + 1,) * 2 fit of the label's edges moved by (row, column); empty: no edges
    image_edges: np.ndarray  # (3, *PAIR_SHAPE) float32, sum of squares 1; empty: no edges
    label_edges: np.ndarray  # likewise
    plateau: float  # share of the picture that is one extreme value where the sky would be

    @property
    def faults(self) -> list[str]:
        """What is wrong with the sample by itself."""
        found = [f"{count} {name}" for name in ("nan", "inf", "negative") if (count := getattr(self, name))]
        return found + ["constant"] * self.constant + ["no valid pixel"] * (self.valid == 0)


def measure(sample: DepthSample, *, focal: float | None, factor: float) -> Measured:
    """Takes the numbers of a sample.

    Args:
        sample: with a label.
        focal: focal length in widths of the image, for the test of ray against planar depth; None: unknown.
        factor: depth = factor / disparity.
    """
    f, sky = sample["disparity"], sample["sky"]
    finite = np.isfinite(f)
    usable = sample["valid"] & ~sky & finite & (f > 0)
    values = f[usable]
    small, ok = _shrunk(np.where(usable, f, 0), usable, PLANE_SIDE)
    shifts, image_edges, label_edges = _edges(sample["image"], f, usable)
    return Measured(
        key=sample["key"],
        kind=sample["kind"],
        image_shape=sample["image"].shape[:2],
        label_shape=f.shape,
        valid=float(sample["valid"].mean()),
        sky=float(sky.mean()),
        nan=int(np.isnan(f).sum()),
        inf=int(np.isinf(f).sum()),
        negative=int((f < 0).sum()),
        constant=bool(len(values) > 1 and values.min() == values.max()),
        depth=np.percentile(factor / values.astype(np.float64), range(101)) if len(values) else np.empty(0),
        planes=_planes(small, ok),
        row=_row(f, usable),
        focal=focal,
        rays=_rays(small, ok, focal) if focal else np.empty((2, 0)),
        shifts=shifts,
        image_edges=image_edges,
        label_edges=label_edges,
        plateau=_plateau(sample["image"], f, usable),
    )


def verdicts(samples: Sequence[Measured], *, range_m: Sequence[float] | None) -> list[Verdict]:
    """What each test says about the samples of one set, or about one sample.

    Args:
        samples: of one dataset.
        range_m: nearest and farthest depth in metres that the set can have; None: not known.
    """
    tests: list[Callable[[Sequence[Measured]], Verdict]] = [sign, ray, alignment, pair, sky]
    found = [test(samples) for test in tests]
    return [*found[:2], unit(samples, range_m=range_m), *found[2:]]


def sign(samples: Sequence[Measured]) -> Verdict:
    """Inverted: disparity read as depth, or the reverse.

    On a plane 1 / depth is linear in the pixel coordinates and depth is not (scale-free, without a camera). Where no
    smooth sloped surface is seen, the row speaks: what is low in a picture is near.
    """
    votes = np.concatenate([s.planes for s in samples]) if samples else np.empty(0)
    mean = float(votes.mean()) if len(votes) else np.nan
    if len(votes) >= 8 and abs(mean) * np.sqrt(len(votes)) > 1.2:
        better, other = ("its inverse", "the disparity") if mean < 0 else ("the disparity", "its inverse")
        words = f"on {len(votes)} smooth slopes, planes fit {better} {np.exp(abs(mean)):.1f} times as well as {other}"
        return Verdict("inverted sign", "flagged" if mean < 0 else "clean", mean, words)
    rows = [s.row for s in samples if np.isfinite(s.row)]
    row = float(np.mean(rows)) if rows else np.nan
    if abs(row) > 0.35:
        words = f"no smooth slopes; the disparity grows with the row by rank correlation {row:.2f}"
        return Verdict("inverted sign", "flagged" if row < 0 else "clean", row, words)
    return Verdict("inverted sign", "cannot tell", mean, f"{len(votes)} smooth slopes, and the row says {row:.2f}")


def ray(samples: Sequence[Measured]) -> Verdict:
    """Distance along the ray read as planar depth: planes are bent as much as the rays get longer; or the reverse.

    Planar depth read as distance was divided by the ray once too often, and its planes are bent the other way.
    """
    test = "ray read as planar"
    slopes, weights = np.concatenate([s.rays for s in samples], axis=1) if samples else np.empty((2, 0))
    if not len(slopes):
        known = any(s.focal for s in samples)
        why = "no large smooth surface is seen" if known else "no focal length is known: give fov_deg.NAME=DEGREES"
        return Verdict(test, "cannot tell", np.nan, why)
    value = _weighted_median(slopes, weights)
    error = 3 * _weighted_median(np.abs(slopes - value), weights) * 2 / np.sqrt(len(slopes))  # windows overlap
    words = f"planes have {value:.2f} of the bend of a distance (give or take {error:.2f}; {len(slopes)} windows)"
    if error > 0.35 or len(slopes) < 6:
        return Verdict(test, "cannot tell", value, f"{words}: the view is too narrow or the label too rough")
    if value < -0.5:
        strong = weights > STRONG
        if strong.sum() < 6 or _weighted_median(slopes[strong], weights[strong]) > -0.5:
            return Verdict(test, "cannot tell", value, f"{words}: the label is about as rough as that")
        return Verdict("planar read as ray", "flagged", value, f"{words}: they are bent the other way")
    return Verdict(test, "flagged" if value > 0.5 else "clean", value, words)


def unit(samples: Sequence[Measured], *, range_m: Sequence[float] | None) -> Verdict:
    """Wrong unit: a metric set whose pictures are all too near or too far, or outside the card's range."""
    test = "wrong unit"
    metric = [s.depth for s in samples if s.kind is DepthKind.METRIC and len(s.depth)]
    if not metric:
        return Verdict(test, "cannot tell", np.nan, "depth is known up to scale only")
    near, median = (float(np.median([depth[q] for depth in metric])) for q in (1, 50))
    words = f"median {median:.4g} m, the nearest hundredth within {near:.4g} m"
    if near > USUAL_NEAR_M or median < USUAL_MEDIAN_M:
        usual = f"usual are above {USUAL_MEDIAN_M:g} m and below {USUAL_NEAR_M:g} m"
        return Verdict(test, "flagged", median, f"{words}; {usual}")
    if range_m is not None:
        all_depths = np.concatenate(metric)
        outside = float(((all_depths < range_m[0]) | (all_depths > range_m[1])).mean())
        if outside > OUTSIDE:
            return Verdict(
                test, "flagged", outside, f"{outside:.0%} of the depths are outside {list(range_m)} m; {words}"
            )
    return Verdict(test, "clean", median, words)


def alignment(samples: Sequence[Measured]) -> Verdict:
    """Image and label moved against each other: where do the edges of the label fit those of the image best?"""
    test = "misaligned"
    maps = [s.shifts for s in samples if s.shifts.size]
    if not maps:
        return Verdict(test, "cannot tell", np.nan, "the labels have too few edges")
    total = np.sum(maps, axis=0)
    rows, columns = np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]
    best = np.unravel_index(total.argmax(), total.shape)
    rest = total[np.hypot(rows - rows[best], columns - columns[best]) > 4 * NEAR]
    z = (total - rest.mean()) / max(float(rest.std()), 1e-9)
    away = float(np.hypot(rows[best], columns[best]))
    here = float(z[np.hypot(rows, columns) <= NEAR + 0.5].max())
    words = f"edges fit best {away:.1f} px away (short side {EDGE_SIDE}), {z[best]:.1f} deviations above other shifts"
    if away > NEAR + 0.5 and z[best] > FAR_SHIFT and z[best] > here + 1.5:
        return Verdict(test, "flagged", away, f"{words}: move the label by {rows[best]} rows, {columns[best]} columns")
    if here > 4:
        return Verdict(test, "clean", away, words)
    return Verdict(test, "cannot tell", away, f"{words}: no shift stands out")


def pair(samples: Sequence[Measured]) -> Verdict:
    """Labels of other images: an image's edges fit its own label better than those of others, and so for the set."""
    test = "wrong pair"
    edged = [s for s in samples if s.image_edges.size and s.label_edges.size]
    if len(edged) < 2:
        return Verdict(test, "cannot tell", np.nan, "there are fewer than two samples with edges to compare")
    z = own_scores(edged)
    mean = float(z.mean())
    words = f"own labels fit {mean:.2f} deviations better than those of others ({len(edged)} samples"
    words += f"; right ones more than {3 / np.sqrt(len(edged)):.2f})"
    labels = np.stack([s.label_edges.ravel() for s in edged])
    alike = float((labels @ labels.T)[~np.eye(len(edged), dtype=bool)].mean())
    if mean * np.sqrt(len(edged)) > 3:
        return Verdict(test, "clean", mean, words)
    if len(edged) < 3 or alike > ALIKE:
        return Verdict(
            test, "cannot tell", mean, f"{words}, but there are too few, or too like each other ({alike:.2f})"
        )
    return Verdict(test, "flagged" if mean * np.sqrt(len(edged)) < 2 else "cannot tell", mean, words)


def sky(samples: Sequence[Measured]) -> Verdict:
    """Sky read as a surface: one exact extreme value over a bright smooth area at the top."""
    test = "sky as a surface"
    hit = [s.plateau for s in samples if s.plateau > 0]
    if not samples:
        return Verdict(test, "cannot tell", np.nan, "no samples")
    share = len(hit) / len(samples)
    words = f"{len(hit)} of {len(samples)} samples have one extreme value where the sky would be"
    if hit:
        words += f", on {np.mean(hit):.0%} of the picture"
    return Verdict(test, "flagged" if share > FEW else "clean", share, words)


def own_scores(samples: Sequence[Measured]) -> np.ndarray:
    """How much better each image fits its own label than others', (samples,) in deviations of the others."""
    images = np.stack([s.image_edges for s in samples])
    labels = np.stack([s.label_edges for s in samples])
    count = len(samples)
    fit = np.full((count, count), -np.inf, np.float32)
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            moved = np.roll(labels, (dy, dx), (2, 3)).reshape(count, -1)
            fit = np.maximum(fit, images.reshape(count, -1) @ moved.T)
    others = ~np.eye(count, dtype=bool)
    rest = np.where(others, fit, np.nan)
    return (np.diag(fit) - np.nanmean(rest, 1)) / np.maximum(np.nanstd(rest, 1), 0.01)


# --- numbers of one sample ------------------------------------------------------------------------


def _shrunk(values: np.ndarray, usable: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Values averaged where usable so that the short side has at most `side` pixels, and where half are usable."""
    height, width = values.shape
    share = min(1.0, side / min(height, width))
    size = max(round(width * share), 1), max(round(height * share), 1)
    weight = cv2.resize(usable.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(np.where(usable, values, 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return total / np.maximum(weight, 1e-6), weight > 0.5


@lru_cache
def _basis(side: int) -> np.ndarray:
    """(p, 3): one, column, row, in [-1, 1]."""
    steps = np.linspace(-1, 1, side)
    return np.stack([np.ones(side * side), np.tile(steps, side), np.repeat(steps, side)], 1)


def _cut(values: np.ndarray, side: int, step: int) -> np.ndarray:
    """Windows (n, p) of a map, in float64."""
    return sliding_window_view(values, (side, side))[::step, ::step].reshape(-1, side * side).astype(np.float64)


class _Windows:
    """Windows of a map that are mostly measured, divided by their mean, and planes through them."""

    def __init__(self, f: np.ndarray, ok: np.ndarray, side: int, step: int) -> None:
        weight = _cut(ok, side, step)
        self.kept = weight.mean(1) > 0.7
        self.weight = weight[self.kept]
        self.count = self.weight.sum(1)
        self.basis = _basis(side)
        self.normal = np.einsum("np,pi,pj->nij", self.weight, self.basis, self.basis, optimize=True)
        self.values = self.relative(_cut(f, side, step)[self.kept])

    def relative(self, values: np.ndarray) -> np.ndarray:
        """Divided by the mean of each window."""
        return values / ((self.weight * values).sum(1) / self.count)[:, None]

    def off_plane(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is left of (n, p) beside the best plane of each window, and the slope of that (n,)."""
        fit = np.linalg.solve(self.normal, ((self.weight * values) @ self.basis)[..., None])[..., 0]
        return (values - fit @ self.basis.T) * self.weight, np.hypot(fit[:, 1], fit[:, 2])

    def rms(self, left: np.ndarray) -> np.ndarray:
        """Root mean square (n,) of residuals."""
        return np.sqrt(np.square(left).sum(1) / self.count)


def _planes(f: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Votes (n,) for the disparity against its inverse."""
    votes = [np.empty(0)]
    for side in WINDOWS:
        if min(f.shape) < side:
            continue
        windows = _Windows(f, ok, side, max(side // 3, 1))
        left, slope = windows.off_plane(windows.values)
        turned, _ = windows.off_plane(windows.relative(1 / np.maximum(windows.values, 1e-3)))
        right, wrong = windows.rms(left) + 1e-7, windows.rms(turned) + 1e-7
        # the wrong one of the two is bent by about slope^2: a smooth window has one that is clearly flatter
        use = (np.minimum(right, wrong) < 0.25 * np.minimum(slope, 0.35) ** 2) & (slope > 0.04)
        votes.append(np.clip(np.log(wrong / right), -4, 4)[use])
    return np.concatenate(votes)


def _rays(f: np.ndarray, ok: np.ndarray, focal: float) -> np.ndarray:
    """Shares of the ray's bend and their weights, (2, n)."""
    height, width = f.shape
    x = (np.arange(width) + 0.5 - width / 2) / (focal * width)
    y = (np.arange(height) + 0.5 - height / 2) / (focal * width)
    longer = np.sqrt(1 + np.square(x)[None] + np.square(y)[:, None]) - 1
    found = [np.empty((2, 0))]
    for side in RAY_WINDOWS:
        if min(f.shape) < side:
            continue
        windows = _Windows(f, ok, side, side // 4)
        left, _ = windows.off_plane(windows.values)
        bend, _ = windows.off_plane(windows.values * _cut(longer, side, side // 4)[windows.kept])
        power = np.square(bend).sum(1)
        share = -(left * bend).sum(1) / np.maximum(power, 1e-12)
        rest = windows.rms(left + np.clip(share, -1, 2)[:, None] * bend)
        use = rest < np.sqrt(power / windows.count)  # the bend must be larger than what is neither
        found.append(np.stack([share, power / windows.count / np.maximum(rest, 1e-4) ** 2])[:, use])
    return np.concatenate(found, axis=1)


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = values.argsort()
    total = weights[order].cumsum()
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def _row(f: np.ndarray, usable: np.ndarray) -> float:
    """Rank correlation of disparity and row over at most 4096 pixels."""
    places = np.flatnonzero(usable)
    if len(places) < 200:
        return np.nan
    places = places[:: max(len(places) // 4096, 1)]
    values = f.ravel()[places]
    ordered = np.sort(values)
    ranks = np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right")  # ties share a rank
    rows = places // f.shape[1]
    if ranks.min() == ranks.max() or rows.min() == rows.max():
        return np.nan
    return float(np.corrcoef(ranks, rows)[0, 1])


def _edges(image: np.ndarray, f: np.ndarray, usable: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit by shift, edges of the image and edges of the label; all empty where the label has too few."""
    height, width = image.shape[:2]
    share = EDGE_SIDE / min(height, width)
    size = round(width * share), round(height * share)
    weight = cv2.resize(usable.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    logs = np.log(np.where(usable, f, 1)).astype(np.float32)
    label = cv2.resize(logs, size, interpolation=cv2.INTER_AREA) / np.maximum(weight, 1e-6)
    ok = weight > 0.99
    empty = np.empty(0)
    if ok.mean() < 0.2:
        return empty, empty, empty
    a = _image_tensor(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    b = _label_tensor(label, ok)
    if b[0].sum() + b[1].sum() < 20:
        return empty, empty, empty
    shape = ok.shape[0] + 2 * REACH, ok.shape[1] + 2 * REACH
    weights = np.array([1, 1, 2], np.float32)[:, None, None]
    spectrum = (np.fft.rfft2(a, shape) * np.conj(np.fft.rfft2(b * weights, shape))).sum(0)
    window = slice(0, 2 * REACH + 1)
    fit = np.roll(np.fft.irfft2(spectrum, shape), (REACH, REACH), (0, 1))[window, window]
    fit = fit - cv2.GaussianBlur(fit, (0, 0), 6)  # slow changes are of the layout, not of edges
    fit = fit / max(float(fit.std()), 1e-9)
    return fit, _pairable(a), _pairable(b)


def _pairable(edges: np.ndarray) -> np.ndarray:
    """Edges (3, ., .) at `PAIR_SHAPE`, centred, with a sum of squares of 1."""
    small = np.stack([cv2.resize(part, PAIR_SHAPE[::-1], interpolation=cv2.INTER_AREA) for part in edges])
    small -= cv2.GaussianBlur(small.transpose(1, 2, 0), (0, 0), 6).transpose(2, 0, 1)
    return (small / max(float(np.linalg.norm(small)), 1e-9)).astype(np.float32)


def _image_tensor(image: np.ndarray) -> np.ndarray:
    """Structure tensor (3, h, w) of colour, saturated: xx, yy, xy."""
    lab = cv2.GaussianBlur(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), (0, 0), 1.0)
    gx, gy = cv2.Scharr(lab, cv2.CV_32F, 1, 0) / 32, cv2.Scharr(lab, cv2.CV_32F, 0, 1) / 32
    tensor = np.stack([(gx * gx).sum(2), (gy * gy).sum(2), (gx * gy).sum(2)])
    power = tensor[0] + tensor[1]
    tensor /= power + np.median(power) + 0.5
    tensor[:2] -= tensor[:2].mean((1, 2), keepdims=True)
    return tensor


def _label_tensor(label: np.ndarray, ok: np.ndarray) -> np.ndarray:
    """Likewise of log disparity: its strongest tenth of edges, away from holes."""
    filled = cv2.GaussianBlur(np.where(ok, label, np.median(label[ok])).astype(np.float32), (0, 0), 1.0)
    gx, gy = cv2.Scharr(filled, cv2.CV_32F, 1, 0) / 32, cv2.Scharr(filled, cv2.CV_32F, 0, 1) / 32
    inside = cv2.erode(ok.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    power = np.hypot(gx, gy) * inside
    strong = max(float(np.quantile(power[inside], 0.9)) if inside.any() else 1.0, 0.01)
    weight = np.where(power > 0.3 * strong, np.minimum(power / strong, 1) ** 2, 0) / np.maximum(power, 1e-6) ** 2
    return np.stack([weight * gx * gx, weight * gy * gy, weight * gx * gy])


def _plateau(image: np.ndarray, f: np.ndarray, usable: np.ndarray) -> float:
    """Share of the picture that has the smallest or largest value, reaches the top, and is bright and smooth."""
    if usable.sum() < 100:
        return 0.0
    picture = cv2.resize(image, f.shape[::-1], interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    rough = np.abs(cv2.Laplacian(cv2.GaussianBlur(grey, (0, 0), 1.0), cv2.CV_32F))
    for extreme in (f[usable].min(), f[usable].max()):
        flat = usable & (np.abs(f - extreme) <= 1e-5 * extreme)
        _, parts = cv2.connectedComponents(flat.astype(np.uint8))
        at_top = np.unique(parts[: max(len(f) // 50, 1)])
        flat &= np.isin(parts, at_top[at_top > 0])
        rest = usable & ~flat
        if flat.mean() < 0.02 or not rest.any():
            continue
        if np.median(rough[flat]) <= np.median(rough[rest]) and np.median(grey[flat]) > np.median(grey[rest]):
            return float(flat.mean())
    return 0.0
