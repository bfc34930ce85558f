"""The mixtures of the papers on miniature sets: raw or packed the same, each image as often as its weight says."""

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from depthany.config.build import build
from depthany.config.check import ConfigError, check
from depthany.config.launch import compose
from depthany.data.module import DepthData, EvalDataset, collate
from depthany.data.shards import ShardError
from depthany.data.sources.labelled import Labelled
from depthany.data.sources.scenes import Scenes
from depthany.metrics.affine import affine_invariant_depth
from depthany.runs.preflight import check_sources
from depthany.runs.preparing import open_set, prepare
from depthany.tasks.base import score
from tests.data.sources.writers.blendedmvs import write_blendedmvs
from tests.data.sources.writers.hypersim import write_hypersim
from tests.data.sources.writers.irs import write_irs
from tests.data.sources.writers.tartanair import write_tartanair
from tests.data.sources.writers.vkitti2 import write_vkitti2
from tests.processes import Zygote

SIZES = {"blendedmvs": 4, "hypersim": 12, "irs": 3, "tartanair": 4, "vkitti2": 4}  # images of the miniature sets
WRITERS: dict[str, Any] = {
    "blendedmvs": write_blendedmvs,
    "hypersim": write_hypersim,
    "irs": write_irs,
    "tartanair": write_tartanair,
    "vkitti2": write_vkitti2,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic sets of V2 as their authors publish them."""
    root = tmp_path_factory.mktemp("sets")
    for name, write in WRITERS.items():
        write(root / name)
    return root


@pytest.fixture(scope="module")
def shards(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, packed by the verb's own job."""
    root = tmp_path_factory.mktemp("shards")
    for name in WRITERS:
        cfg = compose("prepare", [f"dataset={name}", f"root={sets / name}", f"paths.shards={root}", "workers=1"])
        prepare(open_set(cfg, build(cfg.dataset)))
    return root


@cache
def composed() -> DictConfig:
    return compose("train", ["stage=teacher", "data=v2_synthetic", "augment=strong_all"])


def mixture(sets: Path, shards: Path, more: Mapping[str, Any]) -> DepthData:
    """`data=v2_synthetic` of a teacher, as a run builds it; not prepared yet. `more` are options below `data`."""
    cfg = deepcopy(composed())
    for option, value in {"paths.datasets": str(sets), "paths.shards": str(shards)}.items():
        OmegaConf.update(cfg, option, value)
    for option, value in more.items():
        OmegaConf.update(cfg.data, option, value, force_add=True)
    check(cfg)
    parts = {"mix": build(cfg.mix), "augment": build(cfg.augment)}
    data: DepthData = build(cfg.data, batch_size=4, seed=3, online=False, **parts)
    return data


def ready(sets: Path, shards: Path, more: Mapping[str, Any]) -> DepthData:
    data = mixture(sets, shards, more)
    data.prepare_data()
    data.setup()
    return data


def seen(data: DepthData, epoch: int) -> Counter[str]:
    """How often an epoch has each image, by key."""
    part = data.parts["labelled"]
    found = (part.locate(epoch * len(part) + position) for position in range(len(part)))
    return Counter(source.key(index) for source, index in found)


def test_raw_files_and_shards_give_the_same_batches_to_the_bit(sets: Path, shards: Path) -> None:
    """Two epochs of all five sets, each packed into one shard, so that the order is the same too."""
    first, second = (ready(sets, shards, {"read": read}) for read in ("raw", "shards"))
    assert first.num_samples == second.num_samples == sum(SIZES.values()) * first.mix.epochs  # type: ignore[union-attr]
    views = [data.train_dataset() for data in (first, second)]
    spots = first.first_spots("labelled", sum(SIZES.values()))
    for spot in [*spots, *(s._replace(position=s.position + len(spots)) for s in spots)]:
        one, two = (collate([view[spot]]) for view in views)
        assert float(one["weight"]) == 1 and one.keys() == two.keys() and not one["skipped"]
        for name, value in one.items():
            assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name
    for name, source in first.sources.items():
        packed = second.sources[name]
        by_key = {packed.key(i): i for i in range(len(packed))}
        for i in range(len(source)):
            a, b = source.read(i), packed.read(by_key[source.key(i)])
            assert all(np.array_equal(a[k], b[k]) for k in a), source.key(i)  # type: ignore[literal-required]


def test_an_epoch_has_each_image_as_often_as_its_weight_says(sets: Path, shards: Path) -> None:
    weights = {"blendedmvs": 2, "hypersim": 0.5, "irs": 0, "tartanair": 1, "vkitti2": 1.25}
    options: dict[str, Any] = {f"sources.{name}.weight": weight for name, weight in weights.items()}
    options["sources.irs.source.root"] = "nowhere"  # weight 0: nobody asks for it
    data = ready(sets, shards, options)
    epochs = [seen(data, epoch) for epoch in range(4)]
    assert [sum(found.values()) for found in epochs] == [8 + 6 + 4 + 5] * 4
    assert data.num_samples == 23 * data.mix.epochs  # type: ignore[union-attr]
    whole = sum(epochs, Counter())
    for name, weight in weights.items():
        counts = {key: count for key, count in whole.items() if key.startswith(f"{name}/")}
        assert list(counts.values()) == [4 * weight] * (SIZES[name] if weight else 0), name
    assert max(epochs[0][key] for key in whole if key.startswith("hypersim/")) == 1
    cfg = deepcopy(composed())
    for option, value in {"paths.datasets": str(sets), **{f"data.{o}": v for o, v in options.items()}}.items():
        OmegaConf.update(cfg, option, value)
    _, counted, findings = check_sources({"sources": cfg.data.sources}, limit=None, labels_of=None)
    expected = {"sources.blendedmvs": 8, "sources.hypersim": 6, "sources.tartanair": 4, "sources.vkitti2": 5}
    assert counted == expected and [finding.level for finding in findings] == ["ok"]


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    scenes = Scenes(name="mine", style="a", num_scenes=1, scene_seed=0, size=16, labelled=True)
    with pytest.raises(ValueError, match=r"source mine: weight=\S+ must be a number from 0 to 1000: .*0 leaves"):
        Labelled(source=scenes, read="raw", shards="", weight=weight, cache=None)


@pytest.mark.parametrize("read", ["raw", "shards"])
def test_all_that_is_missing_is_named_at_once_before_anything_is_made(sets: Path, tmp_path: Path, read: str) -> None:
    """Labelled, unlabelled and validation sets, each with its option; one that is there is not listed yet."""
    own = tmp_path / "blendedmvs"
    write_blendedmvs(own)
    options = ["recipe=v1", f"paths.datasets={tmp_path / 'a'}", f"paths.shards={tmp_path / 'b'}", f"data.read={read}"]
    options += [f"data.sources.blendedmvs.source.root={own}", "data.sources.blendedmvs.read=raw"]
    options += ["+dataset@data.validation.nyuv2=nyuv2_labelled", "data.validation.nyuv2.root=nowhere"]
    options += ["data.sources.hrwsi.weight=0", "data.unlabelled.sa1b=null"]
    options += ["data.sources.blendedmvs.source.sky_masks=null"]
    cfg = compose("train", ["stage=student", "data=v1_labelled", *options])
    check(cfg)
    data = build(cfg.data, mix=build(cfg.mix))
    with pytest.raises(ShardError) as caught:
        data.prepare_data()
    *lines, common = str(caught.value).splitlines()
    assert "paths.datasets=FOLDER" in common and "paths.shards=FOLDER" in common
    way = {"raw": "source.root", "shards": "shards"}[read]
    labelled = ["diml_indoor", "diml_outdoor", "irs", "megadepth", "tartanair"]
    wanted = [f"data.sources.{n}.{way}=FOLDER; data.sources.{n}.weight=0 leaves" for n in labelled]
    unlabelled = ["bdd100k", "imagenet21k", "landmarks_v2", "lsun", "objects365", "openimages_v7", "places365"]
    wanted += [f"data.unlabelled.{n}.root=FOLDER; data.unlabelled.{n}=null leaves" for n in unlabelled]
    wanted += ["data.validation.nyuv2.root=FOLDER; data.validation.nyuv2=null leaves"]
    assert len(lines) == len(wanted) and all(part in line for part, line in zip(wanted, lines, strict=True))
    assert not (own / ".depthany").exists()


def test_shards_that_were_packed_otherwise_are_refused(sets: Path, shards: Path) -> None:
    """A split, an option of the reader, sky masks: what a mixture asks for is what it gets."""
    asked = {"vkitti2.source.split": "train", "vkitti2.source.cameras": [0, 1], "blendedmvs.source.sky_masks": "beside"}
    for option, value in asked.items():
        name, _, word = option.split(".")
        data = mixture(sets, shards, {"read": "shards", f"sources.{option}": value})
        data.prepare_data()
        with pytest.raises(ShardError, match=rf"{name}: the shards in \S+ were packed with {word}=.*dataset.{word}"):
            data.setup()


def test_another_set_has_another_fingerprint(tmp_path: Path) -> None:
    """What a run refuses to go on with."""
    write_irs(tmp_path / "irs")
    only = {f"sources.{name}.weight": 0 for name in SIZES if name != "irs"}

    def fingerprint(**more: Any) -> str:
        source: Any = ready(tmp_path, tmp_path, only | more).sources["irs"]
        return str(source.fingerprint)

    whole = fingerprint()
    assert whole == fingerprint() != fingerprint(limit=2)
    next((tmp_path / "irs").rglob("d_321.exr")).unlink()
    assert fingerprint() != whole


@pytest.mark.parametrize("read", ["raw", "shards"])
def test_a_cap_in_metres_holds_whatever_the_factor(sets: Path, shards: Path, read: str) -> None:
    """The scores are those of plain 1 / metres: a cap of 20 m is 4 of TartanAir's disparities, and 2.4 of IRS's."""
    data = ready(sets, shards, {"read": read})
    for name, factor in {"tartanair": 80, "irs": 48, "vkitti2": 1}.items():
        labelled: Any = data.sources[name]
        for source in (labelled, labelled.reader):  # the latter as a validation source of its own
            item = EvalDataset([source], size=28, multiple=14, limit=1)[0]
            pred = torch.rand(item["disparity"].shape, generator=torch.Generator().manual_seed(0))
            inverse = item["disparity"] / factor
            cap = float(1.0003 / inverse[item["valid"]].median())  # about half of the pixels are beyond, none at it
            truth = affine_invariant_depth(pred, inverse, item["valid"], min_disparity=1 / cap)
            capped = score(pred, item, cap)
            for key, value in truth.items():
                assert torch.allclose(capped[key].float(), value.float(), atol=1e-3), (name, key)
            assert not torch.allclose(capped["abs_rel"], score(pred, item, None)["abs_rel"], atol=1e-2)


def test_an_own_set_is_three_options(tmp_path: Path) -> None:
    """And a mixture that does not say how its sets are read takes the original files."""
    own = ["+part@data.sources.mine=labelled", "+dataset@data.sources.mine.source=folder_pair"]
    cfg = compose("train", ["stage=teacher", "data=embedded", *own, f"data.sources.mine.source.root={tmp_path}"])
    check(cfg)
    assert (cfg.data.sources.mine.read, cfg.data.sources.mine.weight) == ("raw", 1)
    assert Path(cfg.data.sources.mine.shards) == Path("runs/_shards/folder_pair")
    source = build(cfg.data.sources.mine)
    with pytest.raises(ValueError, match=r"images is no folder: correct `root` or `images`"):
        source.check()
    with pytest.raises(ConfigError, match=r"data\.sources\.mine\.source\.root"):
        check(compose("train", ["stage=teacher", "data=embedded", *own]))


@pytest.mark.slow
def test_a_teacher_learns_from_the_sets_of_v2_raw_and_packed(
    sets: Path, shards: Path, tmp_path: Path, zygote: Zygote
) -> None:
    train = ["depthany.train", "stage=teacher", "data=v2_synthetic", "model=tiny", "debug=smoke", "data.num_workers=1"]
    train += [f"paths.datasets={sets}", f"paths.shards={shards}"]
    raw, packed = (zygote.run([*train, f"data.read={read}"], cwd=tmp_path) for read in ("raw", "shards"))
    assert "tartanair: 4 images; 2 files are left out, first" in raw
    steps = [[line.partition("  0:")[0] for line in out.splitlines() if "loss" in line] for out in (raw, packed)]
    assert len(steps[0]) == 2 and steps[0] == steps[1]  # the same losses
    assert "weights: " in packed
