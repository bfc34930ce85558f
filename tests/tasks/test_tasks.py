"""Laws of the two stages, on a model of a few thousand weights and batches made by hand."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from depthany.callbacks.checkpoint import AtomicCheckpointIO
from depthany.callbacks.ema import Ema
from depthany.config.build import build
from depthany.config.launch import compose
from depthany.data.augment import Augment
from depthany.data.files import DecodeError
from depthany.data.labels import CODEC_ERROR, LabelPlan
from depthany.data.module import DepthData, Mix
from depthany.data.sources.packed import Packed
from depthany.geometry.disparity import normalise
from depthany.geometry.resize import Crop, crop_pixels
from depthany.inference.predictor import Predictor
from depthany.losses.affine_invariant import AffineInvariant, affine_invariant
from depthany.losses.feature_alignment import FeatureAlignment, feature_alignment
from depthany.losses.gradient_matching import GradientMatching
from depthany.losses.total import WeightedSum
from depthany.models.depth_model import DepthModel
from depthany.models.weights import weights_hash
from depthany.optim.plan import OptimPlan
from depthany.runs.label_job import label_shards
from depthany.tasks.student import StudentTask, cutmix_boxes, partners
from depthany.tasks.teacher import TeacherTask
from depthany.types import DepthKind, TeacherInput

SIZE = 32
PRECISION = "fp32"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def model(seed: int = 0) -> DepthModel:
    torch.manual_seed(seed)
    return DepthModel(
        encoder="vit_tiny_patch16_224",
        encoder_arguments={"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": SIZE},
        taps=[0, 1, 2, 3],
        pretrained=False,
        pos_embed="official",
        features=8,
        out_channels=[8, 8, 8, 8],
        hidden=4,
        activation="softplus",
        input_size=SIZE,
    )


def plan(**changes) -> OptimPlan:
    settings = {"encoder_lr": 1e-2, "head_lr": 1e-2, "weight_decay": 0.01, "betas": [0.9, 0.999], "warmup": 0.0}
    settings |= {"schedule": "constant", "clip_norm": 1.0, "batch_size": 4, "teacher_epochs": 1, "student_epochs": 1}
    return OptimPlan(**settings | changes)


def loss_of(*names: str) -> WeightedSum:
    terms = {
        "ssi": AffineInvariant(weight=1.0, alignment="median", trim=0.0, drop=0.0),
        "gradient": GradientMatching(weight=2.0, scales=2, alignment="median"),
        "feature": FeatureAlignment(weight=1.0, margin=1.0),
    }
    return WeightedSum(terms={name: terms[name] for name in names})


def batch_of(pseudo: list[bool], *, seed: int = 0, online: bool = False, boxes: bool = True) -> dict:
    """A batch whose parts, labelled and pseudo-labelled, have weights that sum to 1 each."""
    rng = torch.Generator().manual_seed(seed)
    b = len(pseudo)
    flags = torch.tensor(pseudo)
    valid = torch.rand(b, SIZE, SIZE, generator=rng) > 0.1
    if online:
        valid &= ~flags[:, None, None]
    share = torch.where(flags, flags.sum(), (~flags).sum()).float()
    box = torch.tensor([4, 6, 20, 30]) if boxes else torch.zeros(4, dtype=torch.int64)
    wholes = [(i, (32, 48) if i % 2 else (40, 32)) for i in range(b) if pseudo[i]] if online else []
    pixels = {(32, 48): Crop(32, 48, 0, 5, 32, True), (40, 32): Crop(40, 32, 3, 0, 32, False)}
    groups = []
    for shape, crop in pixels.items():
        index = [i for i, whole in wholes if whole == shape]
        cut = (torch.from_numpy(line).expand(len(index), SIZE) for line in crop_pixels(shape, crop, SIZE))
        groups.append(TeacherInput(torch.tensor(index), torch.randn(len(index), 3, *shape, generator=rng), *cut))
    return {
        "image": torch.randn(b, 3, SIZE, SIZE, generator=rng),
        "teacher_input": [group for group in groups if len(group.places)],
        "disparity": normalise(torch.rand(b, SIZE, SIZE, generator=rng), valid),
        "valid": valid,
        "pseudo": flags,
        "weight": 1 / share,
        "kind": [DepthKind.PSEUDO if p else DepthKind.METRIC for p in pseudo],
        "key": [f"set/{seed}-{i}" for i in range(b)],
        "skipped": [],
        "consumed": b,
        "cutmix": box.repeat(b, 1) * flags[:, None],
    }


def student(*names: str, feature_encoder="teacher", teacher: DepthModel | None = None, **changes) -> StudentTask:
    return StudentTask(
        model=model(1),
        loss=loss_of(*names or ("ssi", "gradient", "feature")),
        plan=plan(**changes),
        teacher=teacher or model(0),
        teacher_ckpt="last",
        feature_encoder=feature_encoder,
        precision=PRECISION,
    )


def fit(task, batches: list[dict], *callbacks, **trainer) -> pl.Trainer:
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "max_epochs": 1, "plugins": [AtomicCheckpointIO()]}
    trainer = pl.Trainer(**settings | trainer, callbacks=list(callbacks))
    trainer.fit(task, DataLoader(batches, batch_size=None))
    return trainer


def gradients(task, batch: dict) -> dict[str, torch.Tensor]:
    """Of one step, before clipping and before the weights move."""
    batch = dict(batch)
    task.zero_grad()
    target, regions = task.target(batch)
    losses, _ = task.loss(task.model.outputs(batch["image"]), target, regions)
    (batch["weight"] * losses).sum().backward()
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


# The teacher


@pytest.mark.parametrize("feature_encoder", ["teacher", "initial"])
def test_the_teacher_is_frozen_unsaved_and_not_optimised(feature_encoder, tmp_path):
    teacher = model(0)
    task = student(feature_encoder=feature_encoder, teacher=teacher)
    frozen = [f.model for f in task._frozen.values()]
    before = [weights_hash(f) for f in frozen]
    assert before[0] == weights_hash(model(0))
    steps = [batch_of([False, True, True, True], seed=s, online=True) for s in range(3)]
    trainer = fit(task, steps, Ema(decay=0.5))

    assert [weights_hash(f) for f in frozen] == before
    assert all(p.grad is None and not p.requires_grad for f in frozen for p in f.parameters())
    mine = {id(p) for f in frozen for p in f.parameters()}
    assert not mine & {id(p) for p in task.parameters()}
    assert not mine & {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert set(task.state_dict()) == {f"model.{name}" for name in task.model.state_dict()}

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    tensors = {id(t) for t in saved["state_dict"].values()}
    assert len(tensors) == len(task.model.state_dict())
    size = sum(t.numel() * t.element_size() for t in task.model.state_dict().values())
    # current weights, their average and two moments of Adam: nothing that a teacher would add
    assert (tmp_path / "a.ckpt").stat().st_size < 4.6 * size


def test_the_teacher_stays_in_eval_mode_whatever_is_asked():
    task = student()
    task.train()
    for frozen in task._frozen.values():
        frozen.train()
        assert not any(module.training for module in frozen.modules())
    assert task.model.training


@pytest.mark.parametrize("make", [student, lambda: TeacherTask(model=model(1), loss=loss_of("ssi"), plan=plan())])
def test_every_parameter_of_the_trained_model_gets_a_gradient(make):
    task = make()
    batch = batch_of([True] * 4 if isinstance(task, StudentTask) else [False] * 4)
    found = gradients(task, batch)
    assert set(found) == {name for name, _ in task.named_parameters()}
    assert [name for name, g in found.items() if not g.isfinite().all() or not g.any()] == []


def test_labels_made_online_carry_no_gradient_to_the_teacher():
    task = student("ssi", "gradient")
    target, _ = task.target(batch_of([True, True], online=True))
    assert not target.disparity.requires_grad and target.valid.all()


def test_a_map_that_is_not_finite_is_no_label():
    batch = batch_of([True, True, True], online=True, boxes=False)
    batch["teacher_input"][0].image[:] = torch.nan  # of the images 0 and 2, or 1
    lost = batch["teacher_input"][0].places
    target, _ = student("ssi").target(batch)
    assert target.disparity.isfinite().all() and not target.valid[lost].any() and target.valid.any()


# CutMix


@pytest.mark.parametrize(
    ("pseudo", "expected"),
    [
        ([True, True, True, True], [1, 0, 3, 2]),
        ([True, True, True], [1, 0, 2]),
        ([True, False, True, False, True, True], [2, 1, 0, 3, 5, 4]),
        ([True], [0]),
        ([False, False], [0, 1]),
    ],
)
def test_partners_are_neighbours_among_the_pseudo_labelled(pseudo, expected):
    found = partners(torch.tensor(pseudo))
    assert found.tolist() == expected
    assert torch.equal(found[found], torch.arange(len(pseudo)))  # each is its partner's partner


@pytest.mark.parametrize("online", [False, True])
def test_pasted_pixels_come_from_the_partner_and_target_and_validity_move_with_them(online):
    task = student("ssi")
    batch = batch_of([False, True, True, True, True], online=online)
    plain = batch_of([False, True, True, True, True], online=online, boxes=False)
    unmixed, none = task.target(plain)
    assert none is None
    before = batch["image"].clone()
    target, regions = task.target(batch)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[4:20, 6:30] = True
    partner = {0: 0, 1: 2, 2: 1, 3: 4, 4: 3}
    for i in range(5):
        assert torch.equal(batch["image"][i][:, inside], before[partner[i]][:, inside])
        assert torch.equal(batch["image"][i][:, ~inside], before[i][:, ~inside])
        for mixed, alone in ((target.disparity, unmixed.disparity), (target.valid, unmixed.valid)):
            assert torch.equal(mixed[i][inside], alone[partner[i]][inside])
            assert torch.equal(mixed[i][~inside], alone[i][~inside])
    box, rest = regions
    assert torch.equal(box, ~rest) and not box[0].any()
    assert all(torch.equal(box[i], inside) for i in range(1, 5))


@pytest.mark.parametrize("without_weight", [1, 2])
def test_padding_is_neither_mixed_nor_mixed_in(without_weight):
    task = student("ssi")
    batch = batch_of([True, True, True, True])
    batch["weight"][without_weight] = 0.0
    before = batch["image"].clone()
    _, regions = task.target(batch)
    pair = [0, 1] if without_weight == 1 else [2, 3]
    assert torch.equal(batch["image"][pair], before[pair])
    assert not regions[0][pair].any() and regions[0].any()


def test_labelled_images_are_never_mixed():
    task = student("ssi")
    batch = batch_of([False] * 4)
    batch["cutmix"][:] = torch.tensor([0, 0, SIZE, SIZE])
    before, disparity = batch["image"].clone(), batch["disparity"].clone()
    target, regions = task.target(batch)
    assert regions is None
    assert torch.equal(batch["image"], before) and torch.equal(target.disparity, disparity)


def test_an_empty_box_is_no_cutmix():
    boxes = torch.zeros(2, 4, dtype=torch.int64)
    assert not cutmix_boxes(boxes, torch.tensor([True, True]), torch.tensor([True, True]), (SIZE, SIZE)).any()


# Labels


def quiet(**changes) -> Augment:
    settings = {"size": SIZE, "flip": 0.0, "jitter": 0.0, "brightness": 0.5, "contrast": 0.5, "saturation": 0.5}
    settings |= {"hue": 0.25, "grey": 0.0, "blur": 0.0, "blur_sigma_px": [0.1, 2.0], "noise": 0.0, "cutmix": 0.0}
    return Augment(**settings | changes)


SHAPES = [(40, 64), (90, 52), (33, 33), (150, 61), (48, 49), (20, 30), (64, 40)]


class Pictures:
    """Images of several shapes, none of them the network's; one in eight is damaged where asked."""

    def __init__(self, *, name: str, number: int, labelled: bool = False, damaged: bool = False) -> None:
        self.name, self.number, self.labelled, self.damaged = name, number, labelled, damaged

    def __len__(self) -> int:
        return self.number

    def key(self, index: int) -> str:
        return f"{self.name}/{index:04d}"

    def identity(self) -> dict[str, Any]:
        return vars(self)

    def prepare(self) -> None:
        pass

    def read(self, index: int) -> Any:
        if self.damaged and index % 8 == 3:
            raise DecodeError(f"{self.key(index)}: torn")
        height, width = SHAPES[index % len(SHAPES)]
        rng = np.random.default_rng([index, len(self.name)])
        blocks = rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3), np.uint8)
        sample: dict[str, Any] = {"image": blocks.repeat(5, 0).repeat(5, 1)[:height, :width], "key": self.key(index)}
        if self.labelled:
            disparity = rng.random((height, width)).astype(np.float32)
            everywhere = np.ones_like(disparity, bool)
            maps = {"disparity": disparity, "valid": everywhere, "sky": ~everywhere}
            sample |= {**maps, "kind": DepthKind.METRIC}
        return sample


def packed(root: Path, **options: Any) -> Packed:
    return Packed(source=Pictures(**options), root=str(root), samples_per_shard=6, short_side=None)


def data_of(
    unlabelled: Any, *, mix: Mix, augment: Augment, teacher: DepthModel | None = None, labelled: Any = None
) -> DepthData:
    """Ready to use; with a teacher, labels are made online."""
    data = DepthData(
        name="test",
        sources={"labelled": labelled},
        unlabelled={"unlabelled": unlabelled},
        validation={},
        max_depth={},
        num_workers=0,
        start_method=None,
        reduced_decode=False,
        window=1,
        limit=None,
        skip_limit=0.0,
        mix=mix,
        augment={"labelled": augment, "unlabelled": augment},
        batch_size=6,
        seed=0,
        online=teacher is not None,
    )
    if teacher is not None:
        data.teacher_size, data.teacher_multiple = teacher.input_size, teacher.patch_size
    data.prepare_data()
    data.setup()
    return data


def label_plan(**changes: Any) -> LabelPlan:
    plan = {"mode": "offline", "teacher": None, "input_size": None, "precision": "fp32", "batch_size": 3}
    plan |= {"resolution": "full", "codec": "png16", "quality": "none", "min_quality": None}
    return LabelPlan(**plan | changes)


V1, V2 = Mix(labelled=1, unlabelled=2, epochs=1), Mix(labelled=0, unlabelled=1, epochs=1)


@pytest.mark.parametrize("codec", ["png16", "float16", "png8"])
@pytest.mark.parametrize("mix", [V1, V2], ids=["v1", "v2"])
def test_online_labels_equal_offline_labels_within_the_codec_error(codec, mix, tmp_path):
    """Of whole images of many shapes, cut, flipped and mixed.

    A codec's error e is a share of the whole map's range R. The target is normalised over the crop, whose range is r:
    a pixel, the smallest and the largest one each move by at most e R, which is 2 e R / (r - 2 e R) of the target.
    """
    teacher = model(0)
    source = packed(tmp_path, name="photos", number=14)
    source.prepare()
    predictor = Predictor(model=teacher, device="cpu", precision="fp32")
    labels = label_plan(codec=codec)
    assert not label_shards(predictor, source, teacher="t", plan=labels)
    source.teacher = "t"
    options = {"mix": mix, "augment": quiet(flip=0.5, cutmix=0.5)}
    options["labelled"] = packed(tmp_path, name="truth", number=5, labelled=True) if mix.labelled else None
    offline = data_of(source, **options)
    online = data_of(packed(tmp_path, name="photos", number=14), teacher=teacher, **options)
    task = student("ssi", teacher=teacher)
    worst, images = torch.zeros(2), 0
    for stored, made in zip(offline.train_dataloader(), online.train_dataloader(), strict=True):
        assert stored["key"] == made["key"] and "teacher_input" not in stored
        assert not made["valid"][made["pseudo"]].any()
        bounds = torch.full((len(made["key"]),), 1e-7)
        for i in torch.nonzero(made["pseudo"]).flatten().tolist():
            photo = source.source.read(int(made["key"][i][-4:]))["image"]
            whole = predictor.disparity([predictor.network_input(photo, input_size=None)])
            reach = float(whole.max() - whole.min())
            crop = float(stored["disparity"][i].max() - stored["disparity"][i].min())
            error = CODEC_ERROR[codec] * reach + 2e-6 * float(whole.max())  # and the network's own rounding
            bounds[i] = 2 * error / (crop - 2 * error)
            images += 1
        boxes = made["cutmix"].clone()
        for batch in (stored, made):
            batch["cutmix"] = torch.zeros_like(boxes)
        first, second = (task.target(offline.on_after_batch_transfer(dict(b), 0))[0] for b in (stored, made))
        error = (first.disparity - second.disparity).abs().amax((1, 2))
        assert (error <= bounds).all(), (error, bounds)
        assert torch.equal(first.valid, second.valid)
        worst = max([worst, *torch.stack([error, bounds], 1)], key=lambda pair: pair[0])
        for batch in (stored, made):
            batch["cutmix"] = boxes
        mixed = [task.target(offline.on_after_batch_transfer(dict(b), 0)) for b in (stored, made)]
        assert (mixed[0][0].disparity - mixed[1][0].disparity).abs().max() <= bounds.max()
        assert torch.equal(mixed[0][0].valid, mixed[1][0].valid)
    assert images == 14 and worst[0] > 0.1 * worst[1]  # the bound is of the error's own size
    print(f"{codec}: max |online - offline| = {worst[0]:.2e}, bound of that image {worst[1]:.2e}, {images} images")


def test_an_online_label_is_the_teachers_even_where_the_set_has_its_own(tmp_path):
    """A rendered or measured label of an unlabelled set is nobody's to look at."""
    data = data_of(packed(tmp_path, name="own", number=6, labelled=True), mix=V2, augment=quiet(), teacher=model(0))
    for batch in data.train_dataloader():
        assert not batch["valid"].any() and set(batch["kind"]) == {DepthKind.PSEUDO}
        assert sorted(int(i) for group in batch["teacher_input"] for i in group.places) == list(range(6))


def test_the_teacher_sees_the_whole_clean_image_and_the_student_a_perturbed_crop(tmp_path):
    teacher = model(0)
    source = packed(tmp_path, name="photos", number=6)
    predictor = Predictor(model=teacher, device="cpu", precision="fp32")
    strong = quiet(jitter=1.0, blur=1.0, cutmix=1.0)
    for augment in (quiet(), strong):
        data = data_of(source, mix=V2, augment=augment, teacher=teacher)
        (batch,) = data.train_dataloader()
        batch = data.on_after_batch_transfer(batch, 0)
        asked: list[torch.Tensor] = []
        task = student("ssi", "feature", teacher=teacher)
        hook = teacher.register_forward_pre_hook(lambda _, args, asked=asked: asked.append(args[0]))
        before = batch["image"].clone()
        _, regions = task.target(batch)
        hook.remove()
        assert len(asked) == len(batch["teacher_input"]) > 1  # of several shapes
        for images, group in zip(asked, batch["teacher_input"], strict=True):
            for image, i in zip(images, group.places, strict=True):
                photo = source.source.read(int(batch["key"][i][-4:]))["image"]
                expected = predictor.network_input(photo, input_size=None)
                assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        assert (regions is not None) == (augment is strong)
        assert torch.equal(before, batch["image"]) == (augment is not strong)


def test_damaged_and_oversized_images_have_no_label_and_no_weight(tmp_path):
    """The label job refuses a strip whose network input would be too large; so does the loader."""

    class Strip(Pictures):
        def read(self, index: int) -> Any:
            sample = super().read(index)
            if index == 1:
                sample["image"] = np.zeros((3, 12_000, 3), np.uint8)  # 32 x 128,000 at the teacher's input
            return sample

    source = Strip(name="photos", number=6, damaged=True)
    teacher = model(0)
    (batch,) = data_of(source, mix=V2, augment=quiet(cutmix=1.0), teacher=teacher).train_dataloader()
    assert sorted(skip.key for skip in batch["skipped"]) == ["photos/0001", "photos/0003"]
    assert any("above 4000000 pixels" in skip.reason for skip in batch["skipped"])
    lost = torch.tensor([key in ("photos/0001", "photos/0003") for key in batch["key"]])
    assert torch.equal(batch["weight"] == 0, lost)
    target, _ = student("ssi", teacher=teacher).target(
        data_of(source, mix=V2, augment=quiet(), teacher=teacher).on_after_batch_transfer(batch, 0)
    )
    assert not target.valid[lost].any() and target.valid[~lost].all()


# Feature alignment


def test_features_are_of_the_very_image_that_the_student_sees():
    """An encoder frozen before the first step agrees with the student on every batch, CutMix included."""
    task = student("ssi", "feature", feature_encoder="initial")
    batch = batch_of([False, True, True, True])
    target, regions = task.target(batch)
    output = task.model.outputs(batch["image"])
    assert regions is not None
    assert torch.equal(target.features, output.features)
    assert_close(feature_alignment(output.features, target.features, margin=1.0), torch.zeros(4), atol=1e-6, rtol=0)


def test_the_frozen_encoder_does_not_follow_the_student():
    task = student("ssi", "feature", feature_encoder="initial")
    fit(task, [batch_of([True, True], seed=s) for s in range(2)])
    batch = batch_of([True, True])
    target, _ = task.target(batch)
    assert not torch.allclose(target.features, task.model.outputs(batch["image"]).features, atol=1e-3)


# The step


@pytest.mark.parametrize("online", [False, True])
def test_padding_changes_no_gradient(online):
    whole = batch_of([False, True, True], online=online, boxes=False)
    padded = {
        name: torch.cat([value, value[[1, 0, 2]]]) if isinstance(value, torch.Tensor) else value
        for name, value in whole.items()
    }
    padded["weight"] = torch.cat([whole["weight"], torch.zeros(3)])
    for one, other in zip(gradients(student(), whole).values(), gradients(student(), padded).values(), strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_blank_of_a_damaged_sample_changes_no_gradient():
    whole = batch_of([True, True], boxes=False)
    blank = dict(batch_of([True, True, True], boxes=False))
    for name in ("image", "disparity", "valid"):
        blank[name][:2], blank[name][2] = whole[name], 0
    blank["weight"] = torch.tensor([0.5, 0.5, 0.0])
    for one, other in zip(gradients(student(), whole).values(), gradients(student(), blank).values(), strict=True):
        assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_shares_of_a_batch_on_two_ranks_average_to_its_gradient():
    """What DDP averages: each rank has its items with weight world / n; neighbours stay together."""
    whole = batch_of([True, True, True, True, False, False])
    expected = gradients(student(), whole)
    halves = []
    for rows in ([0, 1, 4], [2, 3, 5]):
        half = {n: v[rows] if isinstance(v, torch.Tensor) else v for n, v in whole.items()}
        half["weight"] = half["weight"] * 2
        halves.append(gradients(student(), half))
    for name, value in expected.items():
        assert_close((halves[0][name] + halves[1][name]) / 2, value, atol=1e-6, rtol=1e-4)


def test_the_v1_student_learns_the_mean_of_its_three_losses():
    """V1 section 3.3 with equations 1, 6-8 and 9, by hand, against configs/loss/student_v1.yaml."""
    terms = build(compose("train", ["stage=student", "recipe=v1"]).loss)
    task = student()
    task.loss = WeightedSum(terms=terms)
    batch = batch_of([True, True, True, True, False, False])  # two labelled, four unlabelled
    target, regions = task.target(batch)
    output = task.model.outputs(batch["image"])
    found, _ = task.loss(output, target, regions)
    found = (batch["weight"] * found).sum()

    def ssi(i: int, region: torch.Tensor) -> torch.Tensor:
        one = slice(i, i + 1)
        mask = target.valid[one] & region
        return affine_invariant(output.disparity[one], target.disparity[one], mask, alignment="median", trim=None)[0]

    inside = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    inside[:, 4:20, 6:30] = True
    area = inside.float().mean()
    labelled = (ssi(4, inside | True) + ssi(5, inside | True)) / 2
    unlabelled = sum(area * ssi(i, inside) + (1 - area) * ssi(i, ~inside) for i in range(4)) / 4
    cosine = torch.cosine_similarity(output.features[:4], target.features[:4], dim=1)
    feature = torch.where(cosine > 0.85, 0.0, 1 - cosine).mean()
    assert feature > 0
    assert_close(found, (labelled + unlabelled + feature) / 3)


# A non-finite gradient


def broken(batch: dict) -> dict:
    return batch | {"image": torch.full_like(batch["image"], torch.nan)}


def test_a_step_with_a_non_finite_gradient_is_as_if_it_had_not_been():
    good = [batch_of([False] * 4, seed=s) for s in range(3)]
    clean, hurt = (TeacherTask(model=model(1), loss=loss_of("ssi"), plan=plan()) for _ in range(2))
    fit(clean, good)
    fit(hurt, [good[0], broken(good[0]), good[1], broken(good[1]), good[2]])
    assert weights_hash(clean.model) == weights_hash(hurt.model)
    assert weights_hash(clean.model) != weights_hash(model(1))


def test_ten_non_finite_gradients_in_a_row_stop_the_run_with_the_weights_as_they_were():
    good = batch_of([False] * 4)
    task = TeacherTask(model=model(1), loss=loss_of("ssi"), plan=plan())
    fit(task, [broken(good)] * 9 + [good] + [broken(good)] * 9)
    trained = weights_hash(task.model)
    task = TeacherTask(model=model(1), loss=loss_of("ssi"), plan=plan())
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        fit(task, [good] + [broken(good)] * 10 + [good])
    assert weights_hash(task.model) == trained != weights_hash(model(1))


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped_to_the_norm_of_the_plan(clip):
    norms = []

    class Watched(TeacherTask):
        def configure_gradient_clipping(self, *args, **kwargs):
            before = torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])
            super().configure_gradient_clipping(*args, **kwargs)
            norms.append((before, torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    fit(Watched(model=model(1), loss=loss_of("ssi"), plan=plan(clip_norm=clip)), [batch_of([False] * 4)])
    before, after = norms[0]
    assert before > 1e-2
    assert_close(after, torch.tensor(clip) if clip else before, rtol=1e-3, atol=1e-7)


# Schedule and cursor


def test_the_rate_of_a_step_is_that_of_the_samples_seen_before_it():
    rates = []

    class Watched(TeacherTask):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            rates.append(optimizer.param_groups[0]["lr"])

    task = Watched(model=model(1), loss=loss_of("ssi"), plan=plan(schedule="linear"))
    task.num_samples = 16
    fit(task, [batch_of([False] * 4, seed=s) for s in range(4)])
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert task.samples_seen == 16
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_the_cursor_is_in_the_checkpoint():
    task = TeacherTask(model=model(1), loss=loss_of("ssi"), plan=plan())
    task.samples_seen = 24
    checkpoint: dict = {}
    task.on_save_checkpoint(checkpoint)
    other = TeacherTask(model=model(1), loss=loss_of("ssi"), plan=plan())
    other.on_load_checkpoint(checkpoint)
    assert other.samples_seen == 24
