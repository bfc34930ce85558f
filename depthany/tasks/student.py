"""Stage two: a student on the teacher's pseudo-labels, stored or made online.

Legend: B batch, H W pixels.
"""

from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor

from depthany.geometry.disparity import normalise
from depthany.losses.total import WeightedSum
from depthany.models.depth_model import DepthModel
from depthany.optim.plan import OptimPlan
from depthany.tasks.base import DepthTask
from depthany.tasks.frozen import Frozen
from depthany.types import DepthBatch, Target


class StudentTask(DepthTask):
    """Learns from pseudo-labels under perturbation: CutMix, and feature alignment with a frozen encoder.

    The teacher saw the clean image, the student sees the perturbed one (V1 section 3.2). The frozen encoder sees what
    the student sees, CutMix included, so that patches correspond; the papers do not say.

    Args:
        model: what is trained.
        loss: the weighted sum of named terms.
        plan: optimizer and schedule.
        teacher: of labels made online, or of feature alignment; None where neither is wanted.
        teacher_ckpt: a run folder, weights of any layout, or last: the last finished teacher under paths.runs.
        feature_encoder: whose frozen encoder the features are aligned with. initial: the student's own before training
            (the papers': DINOv2); teacher: the teacher's; auto, which the run resolves: initial where the model is
            pretrained, else teacher.
        precision: of the teacher's forward pass.
    """

    def __init__(
        self,
        *,
        model: DepthModel,
        loss: WeightedSum,
        plan: OptimPlan,
        teacher: DepthModel | None,
        teacher_ckpt: str,
        feature_encoder: Literal["auto", "initial", "teacher"],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        super().__init__(model=model, loss=loss, plan=plan)
        self.precision = precision
        # In plain dicts, not as submodules: absent from the state dict, the optimizer and DDP's buckets.
        self._frozen: dict[str, Frozen] = {"teacher": Frozen(teacher)} if teacher is not None else {}
        if "feature" in loss.terms:
            own = feature_encoder != "teacher"
            self._frozen["feature"] = Frozen(deepcopy(model)) if own else self._frozen["teacher"]

    def on_fit_start(self) -> None:
        """Brings the frozen networks to the device."""
        for frozen in self._frozen.values():
            frozen.to(self.device)

    def target(self, batch: DepthBatch) -> tuple[Target, list[Tensor] | None]:
        """Pseudo-labels, CutMix (in place, in the batch's image) and the frozen encoder's features."""
        pseudo, seen = batch["pseudo"], batch["weight"] > 0
        disparity, valid = self._labels(batch)
        regions = None
        if "cutmix" in batch:
            box = cutmix_boxes(batch["cutmix"], pseudo, seen, valid.shape[-2:])
            if bool(box.any()):
                partner = partners(pseudo)
                batch["image"] = torch.where(box[:, None], batch["image"][partner], batch["image"])
                disparity = torch.where(box, disparity[partner], disparity)
                valid = torch.where(box, valid[partner], valid)
                regions = [box, ~box]
        features = None
        if "feature" in self._frozen:
            features = self._frozen["feature"].features(batch["image"])
        return Target(disparity, valid, pseudo, features), regions

    def _labels(self, batch: DepthBatch) -> tuple[Tensor, Tensor]:
        """Disparity and validity (B, H, W), stored or made now: what the label job would store, cut as it would be."""
        disparity, valid = batch["disparity"], batch["valid"]
        if batch.get("teacher_input"):
            disparity, valid = disparity.clone(), valid.clone()
        for places, image, rows, columns in batch.get("teacher_input", []):
            whole = self._frozen["teacher"].disparity(image, precision=self.precision)
            each = torch.arange(len(places), device=places.device)
            view = whole[each[:, None, None], rows[:, :, None], columns[:, None, :]]
            valid[places] = whole.isfinite().flatten(1).all(1)[:, None, None]  # else no label, as in the label job
            disparity[places] = normalise(view, valid[places])
        return disparity, valid


def partners(pseudo: Tensor) -> Tensor:
    """(B,) bool to (B,) int64: each pseudo-labelled image's CutMix partner, its neighbour 2k <-> 2k + 1 among them.

    An image without a neighbour, and every labelled one, is its own partner.
    """
    index = torch.arange(len(pseudo), device=pseudo.device)
    among = index[pseudo]
    neighbour = torch.arange(len(among), device=pseudo.device) ^ 1
    neighbour = torch.where(neighbour < len(among), neighbour, neighbour - 1)
    return index.scatter(0, among, among[neighbour])


def cutmix_boxes(boxes: Tensor, pseudo: Tensor, seen: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, 4) top, left, bottom, right to masks (B, H, W): where the partner's pixels go.

    No box for labelled images, nor where the image or its partner is padding or damaged.
    """
    row = torch.arange(size[0], device=boxes.device)[None, :, None]
    column = torch.arange(size[1], device=boxes.device)[None, None, :]
    top, left, bottom, right = boxes[:, :, None, None].unbind(1)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    partner = partners(pseudo)
    mixed = pseudo & seen & seen[partner] & (partner != torch.arange(len(pseudo), device=pseudo.device))
    return inside & mixed[:, None, None]
