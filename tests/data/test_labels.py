"""Plans that contradict themselves, codecs, half resolution, and the laws of the score."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from depthany.config.build import build
from depthany.config.launch import compose
from depthany.data.labels import CODEC_ERROR, NEAR_CONSTANT, LabelPlan, decode_label, encode_pseudo, half, judge
from depthany.types import DepthKind

OFFLINE = LabelPlan(
    mode="offline",
    teacher=None,
    input_size=None,
    precision="fp32",
    batch_size=4,
    resolution="full",
    codec="png16",
    quality="none",
    min_quality=None,
)


def ramp(height: int = 40, width: int = 60) -> np.ndarray:
    """Near below, far above, with a nearer box."""
    disparity = np.repeat(np.linspace(0, 1, height, dtype=np.float32)[:, None], width, 1)
    disparity[10:20, 30:45] += 0.5
    return disparity


@pytest.mark.parametrize("mode", ["offline", "online", "stored"])
def test_the_plans_of_the_configs_are_built(mode):
    assert build(compose("train", ["stage=student", f"labels={mode}"]).labels).mode == mode


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"codec": None}, "labels=offline needs labels.codec"),
        ({"quality": None}, "labels=offline needs labels.quality"),
        ({"mode": "online", "precision": None}, "labels=online needs labels.precision"),
        ({"batch_size": 0}, "labels.batch_size=0"),
        ({"input_size": -14}, "labels.input_size=-14"),
        ({"quality": "flip", "min_quality": 1.5}, "labels.min_quality=1.5"),
        ({"min_quality": 0.5}, "labels.min_quality needs scores"),
        ({"mode": "online", "min_quality": 0.5}, "labels.min_quality needs scores"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        replace(OFFLINE, **change)


@pytest.mark.parametrize("codec", list(CODEC_ERROR))
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 2), (64, 48)])
def test_what_is_stored_comes_back_within_the_codecs_error(codec, shape):
    disparity = np.random.default_rng(0).normal(3, 2, shape).astype(np.float32)
    members = encode_pseudo(disparity, codec)
    assert set(members) == {"json", "disparity.npz" if codec == "float16" else "disparity.png"}
    assert members == encode_pseudo(disparity, codec)  # the same bytes every time
    label = decode_label(members.__getitem__, members)
    bound = CODEC_ERROR[codec] * np.ptp(disparity) * 1.02 + 4 * np.finfo(np.float32).eps * np.abs(disparity).max()
    assert np.abs(label["disparity"] - disparity).max() <= bound
    assert label["kind"] == DepthKind.PSEUDO and label["valid"].all() and not label["sky"].any()


def test_compression_is_worth_its_name():
    disparity = ramp(200, 300)
    assert len(encode_pseudo(disparity, "float16")["disparity.npz"]) < disparity.size // 2


@pytest.mark.parametrize("codec", list(CODEC_ERROR))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_map_that_is_not_finite_is_no_label(codec, bad):
    disparity = ramp()
    disparity[3, 4] = bad
    with pytest.raises(ValueError, match="not finite"):
        encode_pseudo(disparity, codec)


def test_a_png_that_promises_too_many_pixels_is_not_unpacked():
    members = encode_pseudo(ramp(), "png16")
    png = bytearray(members["disparity.png"])
    png[16:24] = (10**5).to_bytes(4, "big") * 2
    members["disparity.png"] = bytes(png)
    with pytest.raises(ValueError, match="more than 64000000 pixels"):
        decode_label(members.__getitem__, members)


def test_half_is_the_mean_of_four():
    disparity = np.random.default_rng(0).random((6, 8), np.float32)
    assert_allclose(half(disparity), disparity.reshape(3, 2, 4, 2).mean((1, 3)), rtol=1e-6)
    assert half(disparity[:5, :7]).shape == (3, 4)
    assert_array_equal(half(np.full((7, 7), 2.5, np.float32)), np.full((4, 4), 2.5))


# The score


def test_the_same_answer_up_to_scale_and_shift_is_full_agreement():
    found = judge(ramp(), {"flip": 3 * ramp() + 7, "scale": ramp()})
    assert found["quality"] == 1 and found["flip"] == found["scale"] == 0


def test_the_score_is_what_the_other_answer_explains():
    """Against numpy's own correlation, and a residual counted pixel by pixel."""
    rng = np.random.default_rng(0)
    other = ramp() + rng.normal(0, 0.2, ramp().shape)
    found = judge(ramp(), {"flip": other})
    assert found["quality"] == pytest.approx(np.corrcoef(ramp().ravel(), other.ravel())[0, 1] ** 2, abs=1e-4)
    scale, shift = np.polyfit(other.ravel(), ramp().ravel(), 1)
    left = np.abs(scale * other + shift - ramp()).mean() / np.ptp(ramp())
    assert found["flip"] == pytest.approx(left, abs=1e-4) and 0.05 < left < 0.2


@pytest.mark.parametrize("factor", [1e-6, 1, 1e6])
def test_the_score_does_not_know_the_unit(factor):
    other = ramp() + np.random.default_rng(0).normal(0, 0.1, ramp().shape).astype(np.float32)
    assert judge(ramp() * np.float32(factor), {"flip": other}) == judge(ramp(), {"flip": other})


def test_the_worst_answer_counts():
    noisy = ramp() + np.random.default_rng(0).normal(0, 0.5, ramp().shape)
    both = judge(ramp(), {"flip": ramp(), "scale": noisy})
    assert both["quality"] == judge(ramp(), {"scale": noisy})["quality"] < 0.8


def test_contradiction_and_emptiness_score_nothing():
    noise = np.random.default_rng(0).normal(0, 1, ramp().shape)
    assert judge(ramp(), {"flip": -ramp()})["quality"] == 0  # fits with a negative scale only
    assert judge(ramp(), {"flip": np.ones_like(ramp())})["quality"] == 0
    assert judge(ramp(), {"flip": noise})["quality"] < 0.01
    assert judge(noise, {"flip": ramp()})["quality"] < 0.01


@pytest.mark.parametrize("flat", [np.zeros((9, 9)), np.full((9, 9), 3.0), 5 + 0.04 * ramp()], ids=["0", "3", "almost"])
def test_a_nearly_constant_map_scores_nothing_however_well_it_agrees(flat):
    found = judge(flat, {"flip": flat})
    assert found["quality"] == 0 and found["contrast"] < NEAR_CONSTANT and np.isfinite(list(found.values())).all()
    assert judge(ramp(), {"flip": ramp()})["contrast"] > 0.5
