"""One seed for every test, and the arguments of the smallest depth model."""

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Arguments of a DepthModel that runs anywhere, with the official last activation."""
    return {
        "encoder": "vit_tiny_patch16_224",
        "taps": (0, 1, 2, 3),
        "pretrained": False,
        "pos_embed": "official",
        "encoder_arguments": {
            "patch_size": 8,
            "embed_dim": 96,
            "depth": 4,
            "num_heads": 3,
            "img_size": 56,
        },
        "features": 24,
        "out_channels": (24, 24, 48, 96),
        "hidden": 12,
        "activation": "relu",
        "input_size": 56,
    }
