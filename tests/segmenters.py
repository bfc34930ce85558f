"""A small segmentation model in the files of transformers, whose classes all occur on the pictures given."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

ADE = ["wall", "sky", "tree"]


def write_segmenter(
    folder: Path, pictures: Sequence[np.ndarray], *, labels: Sequence[str] = ADE, seed: int = 0
) -> Path:
    """A random SegFormer; each class is the best one somewhere on each of the pictures."""
    transformers = pytest.importorskip("transformers", reason="needs pip install 'depthany[hf]'")
    torch.manual_seed(seed)
    model = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[4, 2],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            id2label=dict(enumerate(labels)),
        )
    ).eval()
    processor = transformers.SegformerImageProcessor(size={"height": 64, "width": 64})
    with torch.no_grad():
        scores = [model(**processor(images=[p], return_tensors="pt")).logits[0].flatten(1) for p in pictures]
        model.decode_head.classifier.bias -= torch.cat(scores, dim=1).median(dim=1).values
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def reference(folder: Path, picture: np.ndarray, wanted: set[str]) -> np.ndarray:
    """(H, W) bool by the means of transformers alone."""
    transformers = pytest.importorskip("transformers", reason="needs depthany[hf]")
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        output = model(**processor(images=[picture], return_tensors="pt"))
    best = processor.post_process_semantic_segmentation(output, target_sizes=[picture.shape[:2]])[0].numpy()
    return np.isin(best, [i for i, label in model.config.id2label.items() if label in wanted])
