"""Averaged weights by choice: Lightning's exponential moving average."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging


class Ema(EMAWeightAveraging):
    """Validates with, and finally keeps, the exponential moving average of the weights.

    The papers do not say whether they used one (V1#179 unanswered). `callbacks.ema=null` turns it off.

    Args:
        decay: weight of the old average in each step.
    """

    def __init__(self, *, decay: float) -> None:
        super().__init__(decay=decay, use_buffers=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing yet: Lightning leaves this hook out where a run is taken up again after its last step."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The averaged weights become the model's."""
        super().on_train_end(trainer, pl_module)
