import itertools

import pytest
import torch
from torch import nn

from depthany.models.depth_model import DepthModel
from depthany.optim.plan import OptimPlan

SETTINGS = {"encoder_lr": 1e-3, "head_lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.999], "warmup": 0.1}
SETTINGS |= {"schedule": "linear", "clip_norm": 1.0, "batch_size": 8, "teacher_epochs": 2, "student_epochs": 1}
PROGRESS = [i / 200 for i in range(201)]


def plan(**changes):
    return OptimPlan(**SETTINGS | changes)


@pytest.fixture(scope="module")
def model():
    return DepthModel(
        encoder="vit_tiny_patch16_224",
        encoder_arguments={"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32},
        taps=[0, 1, 2, 3],
        pretrained=False,
        pos_embed="official",
        features=8,
        out_channels=[8, 8, 8, 8],
        hidden=4,
        activation="softplus",
        input_size=32,
    )


def optimizer_of(model, **changes):
    return plan(**changes).optimizer(model.encoder_parameters(), model.head_parameters())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.05, 0.1, 0.5])
def test_the_rate_rises_from_0_to_its_peak_in_a_straight_line(schedule, warmup):
    factor = plan(schedule=schedule, warmup=warmup).factor
    assert factor(0.0) == 0
    for progress in PROGRESS:
        if progress < warmup:
            assert factor(progress) == pytest.approx(progress / warmup)
    assert factor(warmup) == 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_linear_and_cosine_fall_to_0_and_never_rise_again(schedule, warmup):
    factor = plan(schedule=schedule, warmup=warmup).factor
    falling = [factor(p) for p in PROGRESS if p >= warmup]
    assert falling[0] == 1 and falling[-1] == pytest.approx(0, abs=1e-12)
    assert all(later <= earlier for earlier, later in itertools.pairwise(falling))
    halfway = warmup + (1 - warmup) / 2
    assert factor(halfway) == pytest.approx(0.5)


def test_linear_is_a_straight_line_and_cosine_is_not():
    linear, cosine = plan(warmup=0.0).factor, plan(warmup=0.0, schedule="cosine").factor
    assert linear(0.25) == pytest.approx(0.75)
    assert cosine(0.25) == pytest.approx(0.5 + 0.5**1.5)


def test_constant_stays_at_its_peak():
    factor = plan(schedule="constant").factor
    assert {factor(p) for p in PROGRESS if p >= 0.1} == {1.0}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_stays_between_0_and_its_peak_even_past_the_end(schedule):
    factor = plan(schedule=schedule).factor
    assert all(0 <= factor(p) <= 1 for p in [*PROGRESS, 1.0 + 1e-9, 1.5])


def test_the_rate_depends_on_samples_only(model):
    """Whatever the batch, and wherever a run was taken up again, the same sample count has the same rates."""
    total = 96
    seen_rates = {}
    for batch, start in ((4, 0), (8, 0), (24, 0), (8, 40)):
        optimizer, schedule = optimizer_of(model), plan()
        for seen in range(start, total, batch):
            schedule.set_rates(optimizer, seen / total)
            rates = [group["lr"] for group in optimizer.param_groups]
            assert seen_rates.setdefault(seen, rates) == rates


def test_set_rates_keeps_the_ratio_of_encoder_and_head(model):
    optimizer, schedule = optimizer_of(model), plan()
    for progress in (0.05, 0.3, 0.9):
        schedule.set_rates(optimizer, progress)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(group["peak_lr"] * schedule.factor(progress))


def test_encoder_and_head_have_their_own_rates(model):
    rate = {id(p): g["lr"] for g in optimizer_of(model).param_groups for p in g["params"]}
    assert {rate[id(p)] for p in model.encoder_parameters()} == {1e-3}
    assert {rate[id(p)] for p in model.head_parameters()} == {1e-2}


def test_vectors_are_not_decayed_and_matrices_are(model):
    decay = {id(p): g["weight_decay"] for g in optimizer_of(model).param_groups for p in g["params"]}
    assert {decay[id(p)] for p in model.parameters() if p.ndim <= 1} == {0.0}
    assert {decay[id(p)] for p in model.parameters() if p.ndim > 1} == {0.1}


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    chosen = [id(p) for g in optimizer_of(model).param_groups for p in g["params"]]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) == {id(p) for p in model.parameters()}


def test_a_frozen_parameter_is_in_no_group():
    encoder, head = nn.Linear(2, 2), nn.Linear(2, 1)
    encoder.weight.requires_grad_(False)
    groups = plan().optimizer(encoder.parameters(), head.parameters()).param_groups
    assert {id(p) for g in groups for p in g["params"]} == {id(encoder.bias), id(head.weight), id(head.bias)}


def test_a_step_at_rate_0_moves_nothing():
    encoder, head = nn.Linear(2, 2), nn.Linear(2, 1)
    optimizer = plan().optimizer(encoder.parameters(), head.parameters())
    before = [p.clone() for p in encoder.parameters()]
    plan().set_rates(optimizer, 0.0)
    head(encoder(torch.ones(1, 2))).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("warmup", -0.1),
        ("warmup", 1.0),
        ("clip_norm", -1.0),
        ("encoder_lr", -1.0),
        ("head_lr", float("nan")),
        ("batch_size", 0),
        ("teacher_epochs", 0),
        ("student_epochs", -1),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"optim.{option}"):
        plan(**{option: value})
