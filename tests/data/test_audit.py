"""Each test of the audit finds its mistake where the truth is exact, and leaves the truth alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from depthany.data import audit
from depthany.data.audit import Measured, Verdict, measure, verdicts
from depthany.data.scenes import render
from depthany.types import DepthKind, DepthSample

SCENES = 8
Change = Callable[[DepthSample, float], DepthSample]
Pairs = list[tuple[DepthSample, float]]


def scene(index: int, *, size: int = 160) -> tuple[DepthSample, float]:
    """A rendered sample and its focal length in widths."""
    drawn = render(style="a", seed=11, index=index, size=size)
    sky = np.isinf(drawn.depth)
    f = np.where(sky, 0, 1 / drawn.depth).astype(np.float32)
    sample = DepthSample(
        image=drawn.image, key=f"a/{index}", disparity=f, valid=np.ones_like(sky), sky=sky, kind=DepthKind.METRIC
    )
    return sample, 0.5 / float(np.tan(np.radians(drawn.camera["fov_deg"] / 2)))


@pytest.fixture(scope="module")
def samples() -> Pairs:
    return [scene(i) for i in range(SCENES)]


@pytest.fixture(scope="module")
def measured(samples: Pairs) -> list[Measured]:
    return [measure(sample, focal=focal, factor=1.0) for sample, focal in samples]


def changed(sample: DepthSample, **parts: np.ndarray) -> DepthSample:
    return {**sample, **parts}  # type: ignore[typeddict-item]


def inverted(sample: DepthSample, _: float) -> DepthSample:
    f = sample["disparity"]
    return changed(sample, disparity=np.where(f > 0, 1 / np.where(f > 0, f, 1), 0).astype(np.float32))


def along_ray(sample: DepthSample, focal: float, power: float = 1.0) -> DepthSample:
    f = sample["disparity"]
    height, width = f.shape
    x = (np.arange(width) + 0.5 - width / 2) / (focal * width)
    y = (np.arange(height) + 0.5 - height / 2) / (focal * width)
    longer = np.sqrt(1 + x[None] ** 2 + y[:, None] ** 2)
    return changed(sample, disparity=(f / longer**power).astype(np.float32))


def off_ray(sample: DepthSample, focal: float) -> DepthSample:
    return along_ray(sample, focal, power=-1.0)


def in_millimetres(sample: DepthSample, _: float) -> DepthSample:
    return changed(sample, disparity=sample["disparity"] / 1000)


def moved(sample: DepthSample, _: float) -> DepthSample:
    step = 6
    parts = {name: np.roll(sample[name], step, 1) for name in ("disparity", "valid", "sky")}  # type: ignore[literal-required]
    for part in parts.values():
        part[:, :step] = 0
    return changed(sample, **parts)


def walled(sample: DepthSample, _: float) -> DepthSample:
    sky, f = sample["sky"], sample["disparity"]
    return changed(sample, disparity=np.where(sky, f[f > 0].min() / 2, f).astype(np.float32), sky=np.zeros_like(sky))


def judged(found: Sequence[Verdict]) -> dict[str, str]:
    return {verdict.test: verdict.state for verdict in found}


def test_the_truth_passes_every_test(measured: list[Measured]) -> None:
    assert set(judged(verdicts(measured, range_m=(0.2, 1e5))).values()) == {"clean"}
    assert not any(sample.faults for sample in measured)


@pytest.mark.parametrize(
    ("test", "change"),
    [
        ("inverted sign", inverted),
        ("ray read as planar", along_ray),
        ("planar read as ray", off_ray),
        ("wrong unit", in_millimetres),
        ("misaligned", moved),
        ("sky as a surface", walled),
    ],
)
def test_a_mistake_is_found_by_its_test(test: str, change: Change, samples: Pairs) -> None:
    wrong = [measure(change(sample, focal), focal=focal, factor=1.0) for sample, focal in samples]
    found = judged(verdicts(wrong, range_m=None))
    assert found.pop(test) == "flagged"
    if test not in ("inverted sign", "misaligned"):  # the others leave edges and sign as they are
        assert "flagged" not in found.values()


def test_labels_of_other_images_are_found(measured: list[Measured]) -> None:
    wrong = [replace(m, label_edges=measured[(i + 1) % SCENES].label_edges) for i, m in enumerate(measured)]
    assert audit.pair(measured).state == "clean"
    assert audit.pair(wrong).state == "flagged"
    assert audit.pair(measured[:1]).state == "cannot tell"


def test_the_unit_is_checked_against_the_card(measured: list[Measured]) -> None:
    assert audit.unit(measured, range_m=(0.2, 1e5)).state == "clean"
    narrow = audit.unit(measured, range_m=(0.2, 1.0))
    assert narrow.state == "flagged" and "[0.2, 1.0]" in narrow.words


def test_a_bend_that_is_no_larger_than_the_roughness_says_nothing_however_many_samples_have_it(
    measured: list[Measured],
) -> None:
    """As of 3 real pairs of NYU times 100: -0.72, in windows of a weight of 1 to 2."""
    rough, bent = (replace(measured[0], rays=np.array([[-0.9, -0.7, -0.5], [w, w, w]])) for w in (1.5, 10.0))
    assert audit.ray([rough] * 100).state == "cannot tell"
    assert audit.ray([bent] * 100)[:2] == ("planar read as ray", "flagged")


def test_no_test_depends_on_the_scale_of_the_disparity(samples: Pairs) -> None:
    """80 / t is as good as 1 / t."""
    sample, focal = samples[0]
    one = measure(sample, focal=focal, factor=1.0)
    other = measure(changed(sample, disparity=sample["disparity"] * 80), focal=focal, factor=80.0)
    np.testing.assert_allclose(one.planes, other.planes, atol=0.05)
    assert audit.ray([one]).number == pytest.approx(audit.ray([other]).number, abs=0.02)
    np.testing.assert_allclose(one.depth, other.depth, rtol=1e-5)
    assert audit.alignment([one]).number == audit.alignment([other]).number


def test_what_cannot_be_told_is_said(samples: Pairs) -> None:
    sample, _ = samples[0]
    none = changed(sample, valid=np.zeros_like(sample["valid"]), disparity=np.zeros_like(sample["disparity"]))
    empty = measure(none, focal=None, factor=1.0)
    found = verdicts([empty], range_m=None)
    assert {v.state for v in found if v.test != "sky as a surface"} == {"cannot tell"} and all(v.words for v in found)
    assert empty.faults == ["no valid pixel"]
    assert audit.ray([measure(sample, focal=None, factor=1.0)]).state == "cannot tell"
    flat = measure(
        changed(sample, disparity=np.where(sample["sky"], 0, 0.5).astype(np.float32)), focal=None, factor=1.0
    )
    assert flat.constant and audit.sign([flat]).state == "cannot tell"
    assert audit.alignment([flat]).state == "cannot tell"


def test_values_that_no_label_may_have_are_counted(samples: Pairs) -> None:
    sample, _ = samples[0]
    f = sample["disparity"].copy()
    f[3, 4], f[5, 6:8], f[9, 9] = np.nan, np.inf, -1
    damaged = measure(changed(sample, disparity=f), focal=None, factor=1.0)
    assert (damaged.nan, damaged.inf, damaged.negative) == (1, 2, 1)
    assert damaged.faults == ["1 nan", "2 inf", "1 negative"]
    assert np.isfinite(damaged.planes).all() and np.isfinite(damaged.shifts).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (50, 20)])
def test_odd_sizes_are_measured(shape: tuple[int, int]) -> None:
    f = np.linspace(0.1, 1, shape[0] * shape[1], dtype=np.float32).reshape(shape)
    sample = DepthSample(
        image=np.zeros((64, 48, 3), np.uint8),
        key="x",
        disparity=f,
        valid=f > 0,
        sky=f < 0,
        kind=DepthKind.AFFINE,
    )
    assert measure(sample, focal=1.0, factor=1.0).label_shape == shape
