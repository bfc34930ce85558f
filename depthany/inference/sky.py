"""Sky in photos, found by any semantic segmentation model of transformers whose classes name it.

The labels of the real V1 sets say nothing of the sky, so V1 finds it with "a pre-trained semantic segmentation model"
and sets its disparity to 0 (Depth Anything, arXiv 2401.10891, section 3.1).

Legend: B images, C classes, H W pixels of an image, h w pixels of the network's output.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from depthany.models.weights import weights_hash

CHUNK_VALUES = 32_000_000  # scores at full size that are held at once, 128 MB: of 150 classes that would be gigabytes


class SkyError(ValueError):
    """A model that cannot be used, with the way out."""


class SkySegmenter:
    """A segmentation model on its device, ready for photos.

    Args:
        name: folder that `save_pretrained` has written (model and image processor), or an id on the Hugging Face hub.
            No code that comes with a model is run.
        device: where the network runs.

    Raises:
        SkyError: transformers is not installed, there is no such model, or none of its classes is sky.
    """

    def __init__(self, *, name: str, device: torch.device | str) -> None:
        self.name, self.device = name, torch.device(device)
        self.processor, self.model = _load(name)
        self.model.to(self.device, torch.float32).eval()
        self.classes = sky_classes(self.model.config.id2label)
        if not self.classes:
            labels = ", ".join(map(str, self.model.config.id2label.values()))
            raise SkyError(f"segmenter={name}: none of its classes is sky; it has: {labels}")

    def identity(self) -> dict[str, Any]:
        """What masks depend on: a hash of the weights, the classes that are sky, and how an image is prepared."""
        size = dict(getattr(self.processor, "size", None) or {})
        prepared: dict[str, Any] = {"size": {k: v for k, v in size.items() if v is not None}}
        for key in ("image_mean", "image_std"):
            prepared[key] = list(getattr(self.processor, key, None) or [])
        return {"weights": weights_hash(self.model), "classes": self.classes, "input": prepared}

    @torch.inference_mode()
    def masks(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(B, H, W) bool, True where the best class is sky, of images (H, W, 3) uint8 RGB of one size.

        The scores are resized to the image, bilinear, before the best class is taken, as
        `post_process_semantic_segmentation` of transformers does.

        Raises:
            SkyError: the network's output is not one score for each class and pixel.
        """
        # Cut or padded borders would move the mask against the image.
        whole = {key: False for key in ("do_center_crop", "do_pad") if getattr(self.processor, key, None)}
        inputs = self.processor(images=list(images), return_tensors="pt", input_data_format="channels_last", **whole)
        scores = getattr(self.model(pixel_values=inputs["pixel_values"].to(self.device)), "logits", None)
        if scores is None or scores.ndim != 4 or scores.shape[1] != len(self.model.config.id2label):
            raise SkyError(f"segmenter={self.name}: its output is no map of {len(self.model.config.id2label)} classes")
        height, width = images[0].shape[:2]
        return best_is(scores.float(), list(self.classes), (height, width)).cpu().numpy()


def best_is(scores: Tensor, classes: Sequence[int], size: tuple[int, int]) -> Tensor:
    """(B, H, W) bool: one of `classes` has the highest of the scores (B, C, h, w), resized to (H, W).

    The same as the argmax of all classes at full size, in memory that does not grow with their number.
    """
    wanted = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    wanted[list(classes)] = True
    step = max(1, CHUNK_VALUES // (scores.shape[0] * size[0] * size[1]))
    best, found = None, None
    for first in range(0, scores.shape[1], step):
        part = interpolate(scores[:, first : first + step], size=size, mode="bilinear", align_corners=False)
        values, indices = part.max(dim=1)
        hit = wanted[indices + first]
        if best is None or found is None:
            best, found = values, hit
        else:
            found = torch.where(values > best, hit, found)
            best = torch.maximum(values, best)
    assert found is not None  # there is a class
    return found


def sky_classes(labels: Mapping[int, str]) -> dict[int, str]:
    """The classes with the word "sky" in their name: "sky", "Sky", "sky, clouds", "sky-other-merged".

    >>> sky_classes({0: "skyscraper", 1: "Sky", 2: "sky-other"})
    {1: 'Sky', 2: 'sky-other'}
    """
    return {int(i): str(label) for i, label in labels.items() if "sky" in re.split(r"[^a-z]+", str(label).lower())}


def _load(name: str) -> tuple[Any, Any]:
    """(image processor, model) of transformers."""
    try:
        import transformers
        from huggingface_hub import HfApi
    except ImportError:
        raise SkyError(f"segmenter={name} needs pip install 'depthany[hf]'") from None
    transformers.utils.logging.disable_progress_bar()

    def opened(where: str, **options: Any) -> tuple[Any, Any]:
        processor = transformers.AutoImageProcessor.from_pretrained(where, trust_remote_code=False, **options)
        model = transformers.AutoModelForSemanticSegmentation.from_pretrained(where, trust_remote_code=False, **options)
        return processor, model

    folder = Path(name).expanduser()
    is_folder = folder.is_dir()
    if not is_folder and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SkyError(f"segmenter={name}: there is no such folder; give one with config.json, or an id of the hub")
    try:
        return opened(str(folder)) if is_folder else opened(name, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if is_folder or not isinstance(error, OSError):  # for an id: it is not in the cache
            raise SkyError(f"segmenter={name} is no segmentation model that can be used: {_reason(error)}") from error
    try:
        HfApi().model_info(name, timeout=10)  # without a connection, from_pretrained would try for minutes
        return opened(name)
    except Exception as error:  # of the hub's own classes, of which each version has others
        raise SkyError(
            f"segmenter={name} is no folder, not in the hub's cache and not to be had from the hub ({_reason(error)}): "
            "connect once, or give a folder with the model and its image processor (save_pretrained)"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence."""
    return re.split(r"\.?(?:\n|\.\s|$)", str(error).strip())[0] or type(error).__name__
