"""The estimate: linear in images and in 1 / world, and made of sizes and times that real files and steps have."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from depthany.data.labels import CODEC_ERROR, LabelPlan, decode_label
from depthany.data.module import Mix
from depthany.data.shards import write_shard
from depthany.data.sources.packed import Packed, Shards
from depthany.data.sources.scenes import Scenes
from depthany.runs.cost import Pace, Probe, cost, hold, label_bytes, pace_of, shard_bytes

PLAN = LabelPlan(
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
ONLINE = replace(PLAN, mode="online", batch_size=None, resolution=None, codec=None, quality=None)
PROBE = Probe(
    device="x",
    step=Pace(0.037, 8),
    teacher=Pace(0.011, 16),
    loader=0.0031,
    image_bytes=123_456.7,
    read_bytes=122_222.2,
    label_bytes={("png16", "full"): 345.6, ("png8", "half"): 78.9},
    checkpoint_bytes=12345,
)
V1, V2 = Mix(labelled=1, unlabelled=2, epochs=1), Mix(labelled=0, unlabelled=1, epochs=1)


def values(
    probe: Probe = PROBE, *, images: int, world: int, mix: Mix = V2, plan: LabelPlan | None = PLAN
) -> dict[str, float]:
    rows = cost(probe, images=images, world=world, mix=mix, plan=plan, keep=2)
    return {row.what: row.value for row in rows if row.value is not None}


@pytest.mark.parametrize("mix", [V1, V2])
@pytest.mark.parametrize("plan", [PLAN, ONLINE, None])
def test_the_cost_is_exactly_linear_in_images_and_in_devices(mix: Mix, plan: LabelPlan | None) -> None:
    """To the bit for powers of two, else to rounding."""
    base = values(images=1_000_003, world=3, mix=mix, plan=plan)
    assert len(base) >= 10
    for factor, exact in ((64, True), (62, False)):
        more = values(images=1_000_003 * factor, world=3, mix=mix, plan=plan)
        wide = values(images=1_000_003, world=3 * factor, mix=mix, plan=plan)
        for what, value in base.items():
            of_images = 1 if what.startswith(("loader", "a checkpoint", "2 checkpoints")) else factor
            of_world = 1 / factor if what.endswith("days") else factor if what.startswith("loader") else 1
            tolerance = 0 if exact else 1e-12
            assert more[what] == pytest.approx(value * of_images, rel=tolerance, abs=0)
            assert wide[what] == pytest.approx(value * of_world, rel=tolerance, abs=0)


def test_the_numbers_are_those_of_arithmetic() -> None:
    """62 M images at 11 ms and 37 ms, on 128 devices; V1 adds half as many labelled views."""
    told = values(images=62_000_000, world=128)
    assert told["labels by the teacher: device-hours"] == pytest.approx(62e6 * 0.011 / 3600)
    assert told["training: device-hours"] == pytest.approx(62e6 * 0.037 / 3600)
    assert told["training: days"] == pytest.approx(62e6 * 0.037 / 86400 / 128)
    assert told["image shards"] == pytest.approx(62e6 * 123_456.7 / 1e9)
    assert told["labels png16 full, as chosen"] == pytest.approx(62e6 * 345.6 / 1e9)
    assert told["loader must read"] == pytest.approx(128 / 0.037 * 122_222.2 / 1e6)
    assert told["loader needs"] == pytest.approx(128 / 0.037 * 0.0031)
    assert values(images=62_000_000, world=1, mix=V1)["training: device-hours"] == pytest.approx(93e6 * 0.037 / 3600)
    scored = values(images=1000, world=1, plan=replace(PLAN, quality="flip_scale"))
    assert scored["labels by the teacher: device-hours"] == pytest.approx(2.6 * 1000 * 0.011 / 3600)
    online = values(images=1000, world=1, plan=ONLINE)
    assert "labels by the teacher: device-hours" not in online and "training with the teacher inside: days" in online
    assert "training: days" not in values(Probe(device="x"), images=10, world=1)


@pytest.mark.parametrize(
    ("each_s", "most", "seconds"), [(0.002, 8, 0.4), (0.002, 1, 0.3), (0.05, 64, 0.4), (0.3, 8, 0.1)]
)
def test_the_pace_is_that_of_the_largest_batch_in_time(each_s: float, most: int, seconds: float) -> None:
    """A first run that is slow, as a first run is, does not count where there is time for another."""
    ran: list[int] = []

    def prepare(number: int) -> Callable[[], int]:
        def run() -> int:
            time.sleep(each_s * number + (0.05 if not ran and each_s < 0.1 else 0))
            ran.append(number)
            return number

        return run

    begun = time.perf_counter()
    pace = pace_of(prepare, most=most, seconds=seconds, device=torch.device("cpu"))
    took = time.perf_counter() - begun
    assert pace.seconds == pytest.approx(each_s, rel=0.5)
    assert pace.batch == max(ran) <= most
    assert took < seconds + 2 * each_s * max(ran) + 0.2
    if each_s * most * 3 < seconds / 2:
        assert pace.batch == most
    if each_s > seconds:
        assert ran == [1]


def test_the_pace_steps_back_where_memory_ends() -> None:
    def prepare(number: int) -> Callable[[], int]:
        def run() -> int:
            if number > 4:
                raise torch.OutOfMemoryError("x")
            time.sleep(0.002)
            return number

        return run

    assert pace_of(prepare, most=64, seconds=0.3, device=torch.device("cpu")).batch == 4


def scenes(number: int, *, labelled: bool) -> Scenes:
    return Scenes(name="s", style="b", num_scenes=number, scene_seed=5, size=64, labelled=labelled)


@pytest.mark.parametrize("labelled", [False, True])
def test_held_samples_are_those_of_the_set(tmp_path: Path, labelled: bool) -> None:
    """Packed or not yet packed, or a plain set of shards: the same bytes, spread over the images in use."""
    packed = Packed(
        source=scenes(20, labelled=labelled), root=str(tmp_path / "set"), samples_per_shard=6, short_side=None
    )
    early = hold(packed, count=15, number=5, folder=tmp_path / "tmp")
    assert not packed.folder.exists()
    packed.limit = 15
    packed.prepare()
    packed.open()
    for i, place in enumerate(np.linspace(0, 14, 5).astype(int)):
        held, stored = early.read(i), packed.read(int(place))
        assert held.keys() == stored.keys() and ("disparity" in held) == labelled
        assert all(np.array_equal(held[k], stored[k]) for k in held if k != "key")  # type: ignore[literal-required]
    shards = Shards(name="s", root=str(packed.folder))
    shards.prepare()
    late = hold(shards, count=15, number=6, folder=tmp_path)
    assert len(late.members) == 6 and set(late.members[0]) == set(early.members[0])
    real = sum(p.stat().st_size for p in packed.folder.glob("s-*"))
    every = hold(shards, count=15, number=100, folder=tmp_path).members
    assert len(every) == 15 or len(every) == 18  # the last shard is in use in part
    assert shard_bytes(every, tmp_path) == pytest.approx(real / len(every), rel=0.2)  # shards of 6 end in padding


def maps(number: int) -> list[np.ndarray]:
    """Disparities with an edge and a little noise, of two shapes."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(number):
        y, x = np.mgrid[0 : 210 if i % 2 else 280, 0:280] / 280
        a, b, c = rng.uniform(0.5, 3, 3)
        smooth = np.sin(a * 3 * x) + np.cos(b * 5 * y) + c * (x > y)
        made.append((smooth + rng.normal(0, 0.05, smooth.shape)).astype(np.float32))
    return made


def test_label_sizes_are_those_of_real_shards(tmp_path: Path) -> None:
    """Within 2 % for every codec and resolution, end of the tar and index included."""
    from depthany.data.labels import encode_pseudo, half

    sizes = label_bytes(maps(48), tmp_path)
    assert set(sizes) == {(codec, resolution) for codec in CODEC_ERROR for resolution in ("full", "half")}
    for (codec, resolution), size in sizes.items():
        stored = [encode_pseudo(half(m) if resolution == "half" else m, codec) for m in maps(48)]
        tar = tmp_path / f"{codec}-{resolution}" / "set-000000.teacher-12345678.tar"
        write_shard(tar, [{"__key__": f"set/{i:09d}"} | s for i, s in enumerate(stored)], facts={"teacher": "x"})
        real = tar.stat().st_size + tar.with_suffix(".json").stat().st_size
        assert size * 48 == pytest.approx(real, rel=0.02)
        assert json.loads(stored[0]["json"])["kind"] == "pseudo"
        assert decode_label(stored[0].__getitem__, stored[0])["disparity"].shape in ((280, 280), (140, 140))
    assert sizes["png16", "full"] > sizes["png16", "half"] > sizes["png8", "half"]
