"""Averaged weights by choice: Lightning's exponential moving average."""

from lightning.pytorch.callbacks import EMAWeightAveraging


class Ema(EMAWeightAveraging):
    """Validates with, and finally keeps, the exponential moving average of the weights.

    The papers do not say whether they used one (V1#179 unanswered). `callbacks.ema=null` turns it off.

    Args:
        decay: weight of the old average in each step.
    """

    def __init__(self, *, decay: float) -> None:
        super().__init__(decay=decay, use_buffers=False)
