"""The data room as a task sees it: real batches, the same for any number of workers and ranks."""

import multiprocessing
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from depthany.config.build import build
from depthany.config.launch import compose
from depthany.data import storage
from depthany.data.augment import Augment
from depthany.data.files import DecodeError
from depthany.data.labels import encode_pseudo
from depthany.data.module import DepthData, EvalDataset, Mix, MixedDataset, Part, collate, normalise_image
from depthany.data.order import Spot
from depthany.data.shards import Shard, label_path, write_shard
from depthany.data.sources.packed import Packed, Shards
from depthany.data.sources.photos import PhotoFolder
from depthany.data.sources.scenes import Scenes
from depthany.types import IMAGENET_MEAN, IMAGENET_STD, DepthKind, DepthSample, Skip
from tests.flaky_server import FlakyServer

TEACHER = "teacher-00000000"
SIZES = {"a": 6, "b": 5, "d": 2, "c": 13}  # labelled a, b and d, unlabelled c


def scenes(name: str) -> Scenes:
    return Scenes(name=name, style="b", num_scenes=SIZES[name], scene_seed=ord(name), size=24, labelled=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed sets, and a teacher's labels for the unlabelled one."""
    folder = tmp_path_factory.mktemp("shards")
    for name in SIZES:
        made = packed(name, folder)
        made.prepare()
    for tar in made.tars:
        keys = Shard(tar).keys
        maps = [np.random.default_rng(int(key[-3:])).random((24, 24)) for key in keys]
        rows = [{"__key__": key, **encode_pseudo(m, "png16")} for key, m in zip(keys, maps, strict=True)]
        write_shard(label_path(tar, TEACHER), rows, facts={})
    return folder


def packed(name: str, root: Path) -> Packed:
    return Packed(source=scenes(name), root=str(root), samples_per_shard=4, short_side=None)


def augment(**changes: float) -> Augment:
    strong = {"flip": 0.5, "jitter": 0.8, "grey": 0.2, "blur": 0.5, "noise": 0.0, "cutmix": 0.5}
    fixed: dict[str, Any] = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.25}
    return Augment(size=16, blur_sigma_px=(0.1, 2.0), **{**fixed, **strong, **changes})


def data(root: Path, *, unlabelled: int = 2, labelled: int = 1, teacher: str | None = TEACHER, **changes: Any) -> Any:
    """A DepthData that is ready to use."""
    target = packed("c", root)
    target.teacher = teacher
    options: dict[str, Any] = {
        "name": "test",
        "sources": {"a": packed("a", root), "b": packed("b", root)},
        "unlabelled": {"c": target},
        "validation": {"a": packed("a", root)},
        "max_depth": {"a": None},
        "num_workers": 0,
        "start_method": None,
        "reduced_decode": False,
        "window": 2,
        "limit": None,
        "skip_limit": 0.1,
        "mix": Mix(labelled=labelled, unlabelled=unlabelled, epochs=1),
        "augment": {"labelled": augment(), "unlabelled": augment()},
        "batch_size": 6,
        "seed": 0,
        "online": False,
    }
    made = DepthData(**{**options, **changes})
    made.prepare_data()
    made.setup()
    return made


def online_data(root: Path, **changes: Any) -> Any:
    """A DepthData whose unlabelled images go to a teacher of 28 pixels whole."""
    made = data(root, teacher=None, online=True, **changes)
    made.teacher_size, made.teacher_multiple = 28, 14
    return made


def assert_same(first: list[Any], second: list[Any]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if name == "teacher_input":
                for group, other in zip(value, b[name], strict=True):
                    assert all(torch.equal(x, y) for x, y in zip(group, other, strict=True))
            else:
                assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def process(rank: int, world: int) -> Any:
    """What a loader asks of a trainer at the start of a run."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(global_rank=rank, world_size=world, fit_loop=loop)


def keys(batches: list[Any], *, pseudo: bool) -> list[str]:
    """Of the samples that count, in order."""
    rows = [zip(b["key"], b["pseudo"], b["weight"], strict=True) for b in batches]
    return [key for row in rows for key, p, weight in row if bool(p) == pseudo and weight > 0]


def test_a_batch_keeps_the_contract(root: Path) -> None:
    for batch in data(root).train_dataloader():
        count = len(batch["key"])
        assert batch["image"].shape == (count, 16, 16, 3) and batch["image"].dtype == torch.uint8
        assert batch["disparity"].shape == batch["valid"].shape == (count, 16, 16)
        assert batch["disparity"].dtype == torch.float32 and batch["valid"].dtype == torch.bool
        assert batch["pseudo"].dtype == torch.bool and batch["weight"].dtype == torch.float32
        assert batch["cutmix"].shape == (count, 4)
        for kind, key, pseudo in zip(batch["kind"], batch["key"], batch["pseudo"], strict=True):
            assert pseudo == key.startswith("c/")
            assert kind == (DepthKind.PSEUDO if pseudo else DepthKind.METRIC)
        for part in (True, False):
            assert batch["weight"][batch["pseudo"] == part].sum() == pytest.approx(1)


def test_disparity_is_normalised_per_image_after_the_crop(root: Path) -> None:
    made = data(root)
    for batch in made.train_dataloader():
        made.on_after_batch_transfer(batch, 0)
        for disparity, valid in zip(batch["disparity"], batch["valid"], strict=True):
            assert not disparity[~valid].any()
            assert disparity[valid].min() == 0 and disparity[valid].max() == 1


def test_an_epoch_is_every_image_once_at_one_to_two(root: Path) -> None:
    made = data(root)
    batches = list(made.train_dataloader())
    assert made.num_samples == 13 and len(batches) == len(made.train_dataloader()) == 4
    assert Counter(keys(batches, pseudo=True)) == Counter(scenes("c").key(i) for i in range(13))
    for batch in batches[:-1]:
        assert batch["pseudo"].sum() == 4 and (~batch["pseudo"]).sum() == 2
    assert len(keys(batches, pseudo=False)) == len(set(keys(batches, pseudo=False))) == 7  # of 11: 6, and 1 at the end
    assert sum(batch["consumed"] for batch in batches) == 13


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("recipe", ["v1", "v2"])
def test_the_papers_mixes(root: Path, recipe: str, world: int) -> None:
    """From their configs: V1 one labelled to two pseudo-labelled in every batch, V2 pseudo-labelled only.

    The unlabelled images are an epoch of 13, each once; the two labelled ones are used again and again, as often as
    each other and never in the same view.
    """
    mix = build(compose("train", ["stage=student", f"recipe={recipe}"]).mix)
    ranks = []
    for rank in range(world):
        always = {"labelled": augment(jitter=1.0), "unlabelled": augment()}
        made = data(root, mix=mix, sources={"d": packed("d", root)}, augment=always)
        made.trainer = process(rank, world)
        ranks.append(list(made.train_dataloader()))
    steps = list(zip(*ranks, strict=True))
    assert made.num_samples == 13 == sum(step[0]["consumed"] for step in steps)
    assert Counter(keys([b for step in steps for b in step], pseudo=True)) == dict.fromkeys(
        (scenes("c").key(i) for i in range(13)), 1
    )
    for number, step in enumerate(steps):
        pseudo, labelled = (keys(list(step), pseudo=p) for p in (True, False))
        if number < len(steps) - 1:
            assert (len(labelled), len(pseudo)) == ((2, 4) if recipe == "v1" else (0, 6))
            assert {len(keys([b], pseudo=False)) for b in step} == {len(labelled) / world}
        for part in (True, False) if recipe == "v1" else (True,):
            weight = sum(float(b["weight"][b["pseudo"] == part].sum()) for b in step) / world
            assert weight == pytest.approx(1)  # a true mean of each part over all ranks
        assert all(step[0]["consumed"] == b["consumed"] == len(pseudo) for b in step)
    recycled = [(b["key"][i], b["image"][i]) for step in steps for b in step for i in torch.nonzero(~b["pseudo"])[:, 0]]
    used = Counter(keys([b for step in steps for b in step], pseudo=False))
    if recipe == "v1":
        assert set(used) == {scenes("d").key(0), scenes("d").key(1)} and sorted(used.values()) == [3, 4]
        for key in used:
            views = [image.numpy().tobytes() for other, image in recycled if other == key and image.any()]
            assert len(set(views)) == len(views) == used[key]
    else:
        assert not used and not recycled


def test_labelled_epochs_are_every_image_as_often(root: Path) -> None:
    made = data(root, unlabelled=0, mix=Mix(labelled=1, unlabelled=0, epochs=3), batch_size=4)
    batches = list(made.train_dataloader())
    everything = [scenes(name).key(i) for name in "ab" for i in range(SIZES[name])]
    seen = keys(batches, pseudo=False)
    assert made.num_samples == 33 and len(batches) == 9
    assert Counter(seen) == dict.fromkeys(everything, 3)
    assert all(Counter(seen[i : i + 11]) == Counter(everything) for i in (0, 11, 22))
    assert "teacher_input" not in batches[0] and "cutmix" not in batches[0]


@pytest.mark.parametrize("labels", ["offline", "online"])
def test_workers_change_nothing(root: Path, labels: str) -> None:
    make = data if labels == "offline" else online_data
    alone = list(make(root).train_dataloader())
    for num_workers in (1, 2):
        assert_same(alone, list(make(root, num_workers=num_workers).train_dataloader()))


def test_the_dataset_travels_to_another_process(root: Path) -> None:
    dataset = data(root).train_dataset()
    spots = [Spot("unlabelled", i, 1.0, 1) for i in range(3)] + [Spot("labelled", 0, 1.0, 1)]
    before = collate([dataset[spot] for spot in spots])
    assert_same([before], [collate([pickle.loads(pickle.dumps(dataset))[spot] for spot in spots])])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_start_methods_change_nothing(root: Path, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"{method} is not of this system")
    started = data(root, num_workers=1, start_method=method).train_dataloader()
    assert started.multiprocessing_context.get_start_method() == method  # type: ignore[union-attr]
    assert_same(list(data(root).train_dataloader()), list(started))


def teacher_inputs(batch: Any) -> dict[str, list[torch.Tensor]]:
    """Whole image, rows and columns of each image whose label is made online."""
    groups = batch.get("teacher_input", [])
    return {batch["key"][i]: rest for group in groups for i, *rest in zip(*group, strict=True)}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("labels", ["offline", "online"])
def test_ranks_share_the_same_images_and_views(root: Path, labels: str, world: int) -> None:
    make = data if labels == "offline" else online_data
    alone = list(make(root).train_dataloader())
    shares = []
    for rank in range(world):
        made = make(root)
        made.trainer = process(rank, world)
        shares.append(list(made.train_dataloader()))
    for whole, *parts in zip(alone, *shares, strict=True):
        assert len({len(part["key"]) for part in parts}) == 1
        images = {key: i for i, key in enumerate(whole["key"])}
        used = Counter(key for part in parts for key in keys([part], pseudo=True) + keys([part], pseudo=False))
        assert used == dict.fromkeys(images, 1)
        wholes = teacher_inputs(whole)
        assert sorted(wholes) == sorted(key for part in parts for key in teacher_inputs(part))
        assert len(wholes) == (int(whole["pseudo"].sum()) if labels == "online" else 0)
        for key, mine in ((key, mine) for part in parts for key, mine in teacher_inputs(part).items()):
            assert all(torch.equal(a, b) for a, b in zip(wholes[key], mine, strict=True))
        for part in parts:
            for i, key in enumerate(part["key"]):
                if part["weight"][i] > 0:
                    for name in ("image", "disparity", "cutmix"):
                        assert torch.equal(part[name][i], whole[name][images[key]])
                else:
                    assert not part["valid"][i].any()  # padding


def test_the_loader_starts_at_the_cursor(root: Path) -> None:
    made = data(root)
    uninterrupted = list(made.train_dataloader())
    made.cursor = lambda: 8
    assert_same(uninterrupted[2:], list(made.train_dataloader()))


def test_another_seed_is_another_order_and_other_views(root: Path) -> None:
    first, second = (list(data(root, seed=seed).train_dataloader()) for seed in (0, 1))
    assert keys(first, pseudo=True) != keys(second, pseudo=True)


# --- damage -----------------------------------------------------------------------------------------------------------


class Torn:
    """A source of which some samples cannot be read."""

    def __init__(self, source: Any, *, torn: dict[int, Exception]) -> None:
        self.source, self.torn, self.name = source, torn, source.name
        self.key, self.prepare = source.key, source.prepare

    def __len__(self) -> int:
        return len(self.source)

    def identity(self) -> dict[str, Any]:
        return {"torn": sorted(self.torn)}

    def read(self, index: int) -> Any:
        if index in self.torn:
            raise self.torn[index]
        return self.source.read(index)


def test_a_damaged_sample_counts_as_used_and_changes_no_other(root: Path) -> None:
    torn = {2: DecodeError("torn"), 4: OSError("gone")}
    options: dict[str, Any] = {"unlabelled": 0, "mix": Mix(labelled=1, unlabelled=0, epochs=1), "batch_size": 4}
    whole, damaged = (
        list(data(root, sources={"a": Torn(scenes("a"), torn=which)}, **options).train_dataloader())
        for which in ({}, torn)
    )
    skips = [skip for batch in damaged for skip in batch["skipped"]]
    assert sorted(skips) == [Skip("a", scenes("a").key(2), "torn"), Skip("a", scenes("a").key(4), "gone")]
    lost = {skip.key for skip in skips}
    for a, b in zip(whole, damaged, strict=True):
        assert a["key"] == b["key"] and a["consumed"] == b["consumed"]
        for i, key in enumerate(a["key"]):
            if key in lost:
                assert b["weight"][i] == 0 and not b["valid"][i].any() and not b["disparity"][i].any()
            else:
                for name in ("image", "disparity", "valid", "weight"):
                    assert torch.equal(a[name][i], b[name][i])


def test_an_error_of_ours_is_not_taken_for_damage(root: Path) -> None:
    made = data(root, unlabelled=0, sources={"a": Torn(scenes("a"), torn={0: ZeroDivisionError()})})
    with pytest.raises(ZeroDivisionError):
        list(made.train_dataloader())


def test_what_packing_left_out_is_told(root: Path, tmp_path: Path) -> None:
    source = Torn(scenes("a"), torn={2: DecodeError("torn")})
    made = data(
        root,
        unlabelled=0,
        sources={"a": Packed(source=source, root=str(tmp_path), samples_per_shard=4, short_side=None)},
    )
    assert made.skips() == [Skip("a", scenes("a").key(2), "torn")]
    assert made.num_samples == 5 and len(keys(list(made.train_dataloader()), pseudo=False)) == 5


# --- whose labels -----------------------------------------------------------------------------------------------------


def test_the_truth_of_an_unlabelled_source_is_never_handed_on(root: Path) -> None:
    """A source may know the depth of its pictures: a student that saw it would beat every teacher."""
    online = list(online_data(root).train_dataloader())
    for batch in online:
        assert not batch["valid"][batch["pseudo"]].any() and not batch["disparity"][batch["pseudo"]].any()
        assert all(kind == DepthKind.PSEUDO for kind, p in zip(batch["kind"], batch["pseudo"], strict=True) if p)
        assert batch["valid"][~batch["pseudo"]].any() and (batch["weight"] > 0).all()
    offline = list(data(root, teacher=None).train_dataloader())
    assert keys(offline, pseudo=True) == []
    assert {skip.reason for batch in offline for skip in batch["skipped"]} == {
        f"{scenes('c').key(i)}: no label" for i in range(13)
    }


def test_online_and_offline_labels_are_for_the_same_views(root: Path) -> None:
    for a, b in zip(data(root).train_dataloader(), online_data(root).train_dataloader(), strict=True):
        assert a["key"] == b["key"]
        for name in ("image", "cutmix", "weight"):
            assert torch.equal(a[name], b[name])


# --- decoding at a fraction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
def test_large_jpegs_are_decoded_at_half_where_asked_but_whole_for_a_teacher(
    root: Path, tmp_path: Path, reduced: bool, online: bool
) -> None:
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.full((33, 49, 3), 90 * i, np.uint8))
    photos = PhotoFolder(root=tmp_path, pattern="*.jpg", name="photos")
    shards = Packed(source=photos, root=str(tmp_path), samples_per_shard=2, short_side=None)
    made = online_data(root, mix=Mix(labelled=0, unlabelled=1, epochs=1), reduced_decode=reduced)
    made.unlabelled, made.online, made._ready = {"photos": shards}, online, False
    made.prepare_data()
    made.setup()
    half = reduced and not online  # 33 is twice the crop of 16
    assert shards.read(0)["image"].shape == ((17, 25, 3) if half else (33, 49, 3))
    assert all(source.read(0)["image"].shape == (24, 24, 3) for source in made.sources.values())  # PNG
    batches = list(made.train_dataloader())
    assert all(batch["weight"].all() for batch in batches) == online  # there are no stored labels


# --- limits and validation --------------------------------------------------------------------------------------------


def test_a_limit_is_for_each_source(root: Path) -> None:
    made = data(root, limit=3)
    batches = list(made.train_dataloader())
    assert made.num_samples == 3 and len(set(keys(batches, pseudo=True))) == 3
    assert len(made.parts["labelled"]) == 6
    made.eval_size, made.eval_multiple = 16, 8
    assert len(list(made.val_dataloader())) == 3


def test_a_limit_holds_for_sources_that_are_not_packed(root: Path) -> None:
    made = data(
        root, limit=3, sources={"a": scenes("a"), "b": packed("b", root)}, mix=Mix(labelled=1, unlabelled=0, epochs=2)
    )
    batches = list(made.train_dataloader())
    assert made.num_samples == 12 and len(made.parts["labelled"]) == 6
    assert Counter(keys(batches, pseudo=False)) == dict.fromkeys((scenes(n).key(i) for n in "ab" for i in range(3)), 2)
    made = online_data(root, limit=4)
    made.unlabelled = {"c": scenes("c")}
    assert made.num_samples == 4
    assert set(keys(list(made.train_dataloader()), pseudo=True)) == {scenes("c").key(i) for i in range(4)}
    made.limit = 99
    assert made.num_samples == 13


def test_validation_shows_the_whole_image_and_keeps_the_label(root: Path) -> None:
    class Wide:
        name = "wide"

        def __len__(self) -> int:
            return 2

        def key(self, index: int) -> str:
            return f"wide/{index}"

        def read(self, index: int) -> DepthSample:
            if index:
                raise DecodeError("torn")
            sky = np.zeros((10, 23), bool)
            sky[:3] = True
            disparity = np.where(sky, np.float32(0), np.float32(7))
            valid = np.ones_like(sky)
            valid[:, 0] = False
            sky &= valid
            disparity[:, 0] = 0
            image = np.full((20, 46, 3), 128, np.uint8)
            kind = DepthKind.METRIC
            return {
                "image": image,
                "key": "wide/0",
                "disparity": disparity,
                "valid": valid,
                "sky": sky,
                "kind": kind,
            }

    item, torn = (EvalDataset([Wide()], size=28, multiple=14, limit=None)[i] for i in range(2))  # type: ignore[list-item]
    assert item["image"].shape == (1, 3, 28, 70) and item["image"].dtype == torch.float32
    assert item["disparity"].shape == item["valid"].shape == (1, 10, 23)
    assert not item["valid"][0, :3].any() and not item["valid"][0, :, 0].any() and item["valid"][0, 3:, 1:].all()
    assert (item["disparity"][item["valid"]] == 7).all()  # not normalised
    assert item["key"] == ["wide/0"] and item["skipped"] == []
    assert "image" not in torn and torn["skipped"] == [Skip("wide", "wide/1", "torn")]


def test_ranks_validate_each_image_once(root: Path) -> None:
    seen: list[str] = []
    for rank in range(4):
        made = data(root)
        made.eval_size, made.eval_multiple = 16, 8
        made.trainer = process(rank, 4)
        seen += [item["key"][0] for item in made.val_dataloader()]
    assert sorted(seen) == [scenes("a").key(i) for i in range(6)]


def test_bytes_are_normalised_on_the_device(root: Path) -> None:
    made = data(root)
    batch = next(iter(made.train_dataloader()))
    raw = batch["image"]
    moved = made.on_after_batch_transfer(dict(batch), 0)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(moved["image"], (raw.permute(0, 3, 1, 2) / 255 - mean) / std)
    torch.testing.assert_close(normalise_image(raw.float() / 255), moved["image"])
    assert made.on_after_batch_transfer(moved, 0)["image"] is moved["image"]  # once


def test_an_outage_uses_no_image_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer says nothing of its images: the run has to stop, and a missing one is damage."""
    monkeypatch.setattr(storage, "PAUSE_S", 0.001)
    monkeypatch.setattr(storage, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(storage, "FORGET_S", 0.0)
    target = packed("c", tmp_path / "shards")
    target.prepare()
    augments = {"unlabelled": augment()}
    with FlakyServer(target.folder) as server:
        remote = Shards(name="c", root=server.url, labels_root=None, cache=None)
        remote.open()
        part = Part([remote], seed=0, window=1, limit=None)
        dataset = MixedDataset({"unlabelled": part}, augments, seed=0, teacher=(28, 14))
        assert not dataset[Spot("unlabelled", 0, 1.0, 1)]["skipped"]
        for tar in target.folder.glob("*.tar"):
            tar.rename(tar.with_suffix(".away"))
        assert "is missing" in dataset[Spot("unlabelled", 1, 1.0, 1)]["skipped"][0].reason
        for tar in target.folder.glob("*.away"):
            tar.rename(tar.with_suffix(".tar"))
        assert not dataset[Spot("unlabelled", 1, 1.0, 1)]["skipped"]
        server.share, server.faults, server.in_a_row = 1.0, ["unavailable"], 1000
        with pytest.raises(storage.Unreachable, match="answered 503"):
            dataset[Spot("unlabelled", 2, 1.0, 1)]
    with pytest.raises(storage.Unreachable, match="cannot be read, tried 5 times"):
        dataset[Spot("unlabelled", 2, 1.0, 1)]
