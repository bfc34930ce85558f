"""The page of sky masks: pictures with the sky tinted, and how much of it there is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from depthany.report.page import Page

TINT = (255, 0, 160)  # of no sky
SIDE_PX = 480
MAX_LINES = 200  # of a list


class SkyPicture(NamedTuple):
    """One image with its mask."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8
    sky: np.ndarray  # (H, W) bool


def write_sky_page(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, Any],
    pictures: Sequence[SkyPicture],
    damaged: Sequence[tuple[str, str]],
    command: str,
) -> Path:
    """Writes the page.

    Args:
        path: of the page.
        title: of the page.
        facts: names and values of its table.
        pictures: what is shown, in order.
        damaged: (file, reason) of images that could not be read.
        command: that wrote the page.
    """
    page = Page(title)
    page.key_values(facts)
    page.section("From least to most sky")
    page.paragraph(
        "What the mask calls sky is tinted pink: a roof, a wall or water there would be taught as infinitely far."
    )
    page.figures([(f"{p.name}: {p.sky.mean():.1%}", tinted(p.image, p.sky)) for p in pictures], max_side_px=SIDE_PX)
    if damaged:
        page.section(f"Images without a mask ({len(damaged)})")
        page.table({"file": "Image", "why": "Why"}, [{"file": file, "why": why} for file, why in damaged[:MAX_LINES]])
    page.footer("Made with", command)
    return page.write(path)


def tinted(image: np.ndarray, sky: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 with its sky (H, W) bool half covered, and a line around it."""
    shown = image.copy()
    shown[sky] = shown[sky] // 2 + np.array(TINT, np.uint8) // 2
    width = max(3, min(sky.shape) // 150)
    edge = cv2.morphologyEx(sky.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((width, width), np.uint8)) > 0
    shown[edge] = TINT
    return shown
