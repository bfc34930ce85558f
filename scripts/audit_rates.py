"""False-alarm and miss rates of the audit's tests: each set as it is, and with each mistake injected.

python scripts/audit_rates.py FOLDER [--scenes N]: FOLDER has an index.csv (docs/data.md); two sets of N procedural
scenes, whose truth is exact and which have a sky, come in addition. A set is judged as a whole, as the audit does; its
pairs count as it is judged. Dense pairs only: at least 30 % of the label is measured.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from depthany.data import audit
from depthany.data.scenes import render
from depthany.data.sources.index_csv import IndexCsv
from depthany.types import DepthKind, DepthSample

DENSE = 0.3
SHIFT = 8 / 240  # of the short side
RANGE_M = (0.1, 200.0)
# Focal lengths in widths of the image, the usual values of these cameras; the others are not known.
FOCAL = {
    **{"kitti_depth": 0.569, "nyuv2": 0.811, "kinect_dining": 0.811, "redwood": 0.82, "sunrgbd": 0.81, "7scenes": 0.82},
    **{"tartanair": 0.5, "ycb_video": 1.666, "sceneflow_flyingthings": 1.094},
}


class Pair(NamedTuple):
    """One labelled image."""

    dataset: str
    focal: float | None
    sample: DepthSample


def pairs(folder: str, scenes: int) -> Iterator[Pair]:
    """All of the index, then the procedural scenes."""
    source = IndexCsv(name="real", root=folder, index="index.csv", include=[], exclude=[])
    for i in range(len(source)):
        yield Pair(source.group(i), FOCAL.get(source.group(i)), source.read(i))
    styles: Sequence = ("a", "b")
    for style in styles:
        for i in range(scenes):
            scene = render(style=style, seed=5, index=i, size=192)
            sky = np.isinf(scene.depth)
            f = np.where(sky, 0, 1 / scene.depth).astype(np.float32)
            valid = np.ones_like(sky)
            sample = DepthSample(
                image=scene.image, key=f"{style}/{i}", disparity=f, valid=valid, sky=sky, kind=DepthKind.METRIC
            )
            yield Pair(f"scenes {style}", 0.5 / np.tan(np.radians(scene.camera["fov_deg"] / 2)), sample)


def inverted(pair: Pair) -> Pair:
    """Depth where disparity is wanted."""
    f = pair.sample["disparity"]
    turned = np.where(f > 0, 1 / np.where(f > 0, f, 1), 0).astype(np.float32)
    return pair._replace(sample={**pair.sample, "disparity": turned})


def along_ray(pair: Pair, *, power: float = 1) -> Pair:
    """Distance where depth is wanted; the reverse with a power of -1."""
    if pair.focal is None:
        return pair
    height, width = pair.sample["disparity"].shape
    x = (np.arange(width) + 0.5 - width / 2) / (pair.focal * width)
    y = (np.arange(height) + 0.5 - height / 2) / (pair.focal * width)
    longer = np.sqrt(1 + np.square(x)[None] + np.square(y)[:, None])
    bent = (pair.sample["disparity"] / longer**power).astype(np.float32)
    return pair._replace(sample={**pair.sample, "disparity": bent})


def off_ray(pair: Pair) -> Pair:
    """Planar depth that was taken for a distance."""
    return along_ray(pair, power=-1)


def scaled(factor: float) -> Callable[[Pair], Pair]:
    """A depth that is `factor` times too large."""
    return lambda pair: pair._replace(
        sample={**pair.sample, "disparity": (pair.sample["disparity"] / factor).astype(np.float32)}
    )


def moved(pair: Pair) -> Pair:
    """The label 8 px to the right, at a short side of 240; what comes in is no measurement."""
    step = round(SHIFT * min(pair.sample["disparity"].shape))
    parts = {}
    for name in ("disparity", "valid", "sky"):
        parts[name] = np.roll(pair.sample[name], step, 1)
        parts[name][:, :step] = 0
    return pair._replace(sample={**pair.sample, **parts})


def walled(pair: Pair) -> Pair:
    """The sky as a surface at twice the farthest depth."""
    sky, f = pair.sample["sky"], pair.sample["disparity"]
    far = f[f > 0].min() / 2
    parts = {"disparity": np.where(sky, far, f).astype(np.float32), "sky": np.zeros_like(sky)}
    return pair._replace(sample={**pair.sample, **parts})


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--scenes", type=int, default=12)
    options = parser.parse_args()
    started = time.perf_counter()
    sets: dict[str, list[Pair]] = defaultdict(list)
    sparse = Counter[str]()
    for pair in pairs(options.folder, options.scenes):
        sets[pair.dataset].append(pair)
        sparse[pair.dataset] += pair.sample["valid"].mean() < DENSE
    numbers = {name: [audit.measure(p.sample, focal=p.focal, factor=1.0) for p in of] for name, of in sets.items()}
    took = time.perf_counter() - started

    def again(name: str, change: Callable[[Pair], Pair]) -> list[audit.Measured]:
        changed = [change(p) for p in sets[name]]
        return [audit.measure(p.sample, focal=p.focal, factor=1.0) for p in changed]

    def unit_of(samples: Sequence[audit.Measured]) -> audit.Verdict:
        return audit.unit(samples, range_m=RANGE_M)

    def next_labels(name: str) -> list[audit.Measured]:
        of = [m for m in numbers[name] if m.label_edges.size]
        return [replace(m, label_edges=of[(i + 1) % len(of)].label_edges) for i, m in enumerate(of)]

    tests: dict[str, tuple[Callable, Callable[[str], list[audit.Measured]]]] = {
        "inverted sign": (audit.sign, lambda name: again(name, inverted)),
        "ray read as planar": (audit.ray, lambda name: again(name, along_ray)),
        "planar read as ray": (audit.ray, lambda name: again(name, off_ray)),
        **{f"unit x {f:g}": (unit_of, lambda name, f=f: again(name, scaled(f))) for f in (1000, 100, 0.01, 0.001)},
        "misaligned": (audit.alignment, lambda name: again(name, moved)),
        "wrong pair": (audit.pair, next_labels),
        "sky as a surface": (audit.sky, lambda name: again(name, walled)),
    }
    rates: dict[tuple[str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
    totals, reasons = Counter[str](), []
    for name, of in sets.items():
        if sparse[name]:
            reasons.append(f"  {name}: {len(of)} sparse pairs, not counted")
            states = [v for v in audit.verdicts(numbers[name], range_m=RANGE_M) if v.state == "flagged"]
            reasons += [f"    flagged as it is: {v.test}: {v.words}" for v in states]
            continue
        part = "scenes" if name.startswith("scenes") else "real"
        totals[part] += len(of)
        for test, (judge, inject) in tests.items():
            before = judge(numbers[name])
            if test == "sky as a surface" and not any(m.sky > 0.02 for m in numbers[name]):
                after = audit.Verdict(test, "cannot tell", np.nan, "no sky to inject the mistake into")
            elif judge is audit.ray and sets[name][0].focal is None:
                after = before  # the mistake cannot be made without a camera either
            else:
                after = judge(inject(name))
            rates[part, test]["as it is", before.state] += len(of)
            rates[part, test]["injected", after.state] += len(of)
            told = before.state == "flagged" or after.state != "flagged"
            if told and "no sky" not in after.words and (not test.startswith("unit") or test == "unit x 1000"):
                words = f"as it is {before.state} ({before.words}); injected {after.state} ({after.words})"
                reasons.append(f"  {name} [{len(of)}], {test}: {words}")
    print("dense pairs:", ", ".join(f"{count} {part}" for part, count in totals.items()))
    print(f"{'':<27} | {'as they are':^26} | {'with the mistake':^26}")
    print(f"{'pairs':<6} {'test':<20} | {'false alarms':>13} {'cannot tell':>12} | {'missed':>13} {'cannot tell':>12}")
    for (part, test), count in rates.items():
        told_of = {kind: totals[part] - count[kind, "cannot tell"] for kind in ("as it is", "injected")}
        wrong = {"as it is": count["as it is", "flagged"], "injected": count["injected", "clean"]}
        cells = []
        for kind, of_kind in told_of.items():
            rate = f"{wrong[kind] / of_kind:.1%} of {of_kind}" if of_kind else "-"
            cells.append(f"{rate:>13} {1 - of_kind / totals[part]:>12.1%}")
        print(f"{part:<6} {test:<20} | {' | '.join(cells)}")
    print("shares are of the pairs that a test can tell; why it cannot, and what went wrong:")
    print("\n".join(reasons))
    print(f"reading and measuring all sets once took {took:.1f} s, everything {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
