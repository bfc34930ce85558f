"""Parameter groups and the learning-rate schedule, which runs on samples: it stays right when the batch changes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimPlan:
    """How the weights are moved: AdamW with one rate for the encoder and one for the head.

    Args:
        encoder_lr: peak learning rate of the encoder.
        head_lr: peak learning rate of the DPT head.
        weight_decay: of AdamW, on weight matrices only.
        betas: of AdamW.
        warmup: share of all samples over which the rate rises from 0.
        schedule: how the rate falls after the warm-up: linear (V1 section 4.1), cosine or constant.
        clip_norm: largest gradient norm; 0: no clipping.
        batch_size: images of all processes together; rounded down to a multiple of mix.labelled + mix.unlabelled.
        teacher_epochs: passes over the labelled images in stage one.
        student_epochs: passes over the unlabelled images in stage two.

    Raises:
        ValueError: a number that cannot be meant, by the name of its option.
    """

    encoder_lr: float
    head_lr: float
    weight_decay: float
    betas: Sequence[float]
    warmup: float
    schedule: Literal["linear", "cosine", "constant"]
    clip_norm: float
    batch_size: int
    teacher_epochs: int
    student_epochs: int

    def __post_init__(self) -> None:
        for name in ("encoder_lr", "head_lr", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: give a finite number, 0 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup is {self.warmup}: give a share of all samples in [0, 1)")
        for name in ("batch_size", "teacher_epochs", "student_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: give 1 or more")

    def optimizer(self, encoder: Iterable[nn.Parameter], head: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """AdamW with up to four groups: encoder and head, with and without weight decay (vectors have none)."""
        groups = []
        for parameters, rate in ((list(encoder), self.encoder_lr), (list(head), self.head_lr)):
            for decayed in (True, False):
                chosen = [p for p in parameters if p.requires_grad and (p.ndim > 1) == decayed]
                if chosen:
                    decay = self.weight_decay if decayed else 0.0
                    groups.append({"params": chosen, "lr": rate, "peak_lr": rate, "weight_decay": decay})
        first, second = self.betas
        return torch.optim.AdamW(groups, betas=(first, second), fused=True)

    def factor(self, progress: float) -> float:
        """The rate as a share of its peak when `progress` of all samples (0 to 1) is used."""
        if progress < self.warmup:
            return progress / self.warmup
        left = min(max((progress - self.warmup) / max(1 - self.warmup, 1e-9), 0.0), 1.0)
        if self.schedule == "linear":
            return 1 - left
        return 0.5 * (1 + math.cos(math.pi * left)) if self.schedule == "cosine" else 1.0

    def set_rates(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """Sets the rates of every group for the step that starts at `progress`."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self.factor(progress)
