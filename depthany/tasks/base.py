"""What both stages share: the weighted step, the schedule on samples, validation, and what a checkpoint must hold."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from depthany.geometry.alignment import scale_and_shift
from depthany.losses.total import WeightedSum
from depthany.metrics.affine import DepthScores, affine_invariant_depth
from depthany.metrics.edges import edge_scores
from depthany.models.depth_model import DepthModel
from depthany.optim.plan import OptimPlan
from depthany.types import DepthBatch, EvalBatch, Target


class DepthTask(pl.LightningModule):
    """A model that learns disparity from batches of depthany.types.

    Args:
        model: what is trained.
        loss: the weighted sum of named terms.
        plan: optimizer and schedule.
    """

    def __init__(self, *, model: DepthModel, loss: WeightedSum, plan: OptimPlan) -> None:
        super().__init__()
        self.model, self.loss, self.plan = model, loss, plan
        self.samples_seen = 0  # the cursor: samples of the epoch used up; part of the checkpoint
        self.bad_steps = 0  # steps in a row whose gradient was not finite
        self.num_samples = 1  # of the whole run; set by the verb
        self.facts: dict[str, Any] = {}  # what the run is, plain values; set by the verb
        self.max_depth: Mapping[str, float | None] = {}

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised to disparity (B, H, W)."""
        return self.model(image)

    def target(self, batch: DepthBatch) -> tuple[Target, list[Tensor] | None]:
        """The target of a batch and its CutMix regions; the student adds what a teacher says."""
        return Target(batch["disparity"], batch["valid"], batch["pseudo"]), None

    def training_step(self, batch: DepthBatch, batch_idx: int) -> Tensor:
        """The weighted mean over the global batch, after the ranks' gradients are averaged."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)  # configure_optimizers makes one
        self.plan.set_rates(optimizer.optimizer, self.samples_seen / self.num_samples)
        target, regions = self.target(batch)
        output = self.model.outputs(batch["image"])
        losses, parts = self.loss(output, target, regions)
        weight = batch["weight"]
        loss = (weight * losses).sum()
        share = weight / weight.sum().clamp(min=1e-9)
        self.log_dict(
            {"train/loss": loss, **{f"train/loss/{name}": (share * part).sum() for name, part in parts.items()}}
        )
        self.log("lr", self.plan.head_lr * self.plan.factor(self.samples_seen / self.num_samples))
        self.samples_seen += batch["consumed"]
        self.log("samples_seen", float(self.samples_seen), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Fresh scores for each pass."""
        self.scores = DepthScores(sources=self.validation_sources).to(self.device)

    validation_sources: list[str] = []  # noqa: RUF012  # set by the verb

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Affine-invariant AbsRel and delta1 of one image at its label's size."""
        if "image" not in batch:
            return
        pred = self.model(batch["image"])
        self.scores.update([batch["source"]], score(pred, batch, self.max_depth.get(batch["source"])))

    def on_validation_epoch_end(self) -> None:
        """Logs each source's means as val/<source>/<metric>."""
        for source, values in self.scores.compute().items():
            for name in ("abs_rel", "delta1", "negative_scale"):
                self.log(f"val/{source}/{name}", values[name])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trained model only."""
        return self.plan.optimizer(self.model.encoder_parameters(), self.model.head_parameters())

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Clips to plan.clip_norm. A non-finite gradient moves nothing: the step is dropped, counted, and bounded.

        Raises:
            RuntimeError: ten steps in a row had a non-finite gradient.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.plan.clip_norm or float("inf"))
        if torch.isfinite(norm):  # the ranks' gradients are averaged by now: all decide alike
            self.bad_steps = 0
            return
        self.bad_steps += 1
        optimizer.zero_grad(set_to_none=True)
        if self.bad_steps >= 10:
            raise RuntimeError("10 steps in a row had a non-finite gradient: the weights are as they were before them")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The cursor goes with the weights."""
        checkpoint["samples_seen"] = self.samples_seen
        checkpoint["facts"] = self.facts | {"images": self.num_samples, "model": self.model.config()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The cursor comes with the weights."""
        self.samples_seen = int(checkpoint["samples_seen"])


def at_label_size(pred: Tensor, batch: EvalBatch) -> Tensor:
    """(1, H, W) to the label's (1, h, w), bilinear with aligned corners as the official code resizes its output."""
    return interpolate(pred[:, None].float(), batch["disparity"].shape[-2:], mode="bilinear", align_corners=True)[:, 0]


def score(pred: Tensor, batch: EvalBatch, max_depth: float | None) -> dict[str, Tensor]:
    """Scores of one prediction (1, H, W) against a label (1, h, w), compared at the label's size.

    Pixels beyond `max_depth` are left out; it is in metres, whatever factor the label's disparity has.
    """
    floor = None if max_depth is None else batch["factor"] / max_depth
    return affine_invariant_depth(at_label_size(pred, batch), batch["disparity"], batch["valid"], min_disparity=floor)


def sharpness(pred: Tensor, batch: EvalBatch, max_depth: float | None) -> dict[str, Tensor]:
    """Edge scores of one prediction, arguments as for `score`."""
    floor = None if max_depth is None else batch["factor"] / max_depth
    return edge_scores(at_label_size(pred, batch), batch["disparity"], batch["valid"], min_disparity=floor)


def fitted(pred: Tensor, batch: EvalBatch) -> Tensor:
    """A prediction (1, H, W) at the label's size, with the least-squares scale and shift: for pictures."""
    pred = at_label_size(pred, batch)
    scale, shift = scale_and_shift(pred, batch["disparity"], batch["valid"])
    return scale[:, None, None] * pred + shift[:, None, None]
