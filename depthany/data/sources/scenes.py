"""The embedded data: procedural scenes with exact depth, so that the whole recipe runs without a download."""

from typing import Any, Literal

import numpy as np

from depthany.data.scenes import GENERATOR, render
from depthany.types import DepthKind, DepthSample, ImageSample


class Scenes:
    """Rendered scenes as a labelled source; disparity = 1 / depth in metres, sky valid with 0.

    Args:
        name: of the set, unique in the mixture.
        style: a: plain materials and even light, as synthetic sets look; b: rich textures, shadows, fog and noise.
        num_scenes: how many.
        scene_seed: scenes of different seeds share nothing.
        size: side of the square pictures in pixels.
        labelled: false: pictures only, as an unlabelled set has them.
    """

    def __init__(
        self, *, name: str, style: Literal["a", "b"], num_scenes: int, scene_seed: int, size: int, labelled: bool
    ) -> None:
        self.name, self.style, self.num_scenes = name, style, num_scenes
        self.scene_seed, self.size, self.labelled = scene_seed, size, labelled

    def __len__(self) -> int:
        return self.num_scenes

    def key(self, index: int) -> str:
        """The sample's key."""
        return f"{self.name}/{index:07d}"

    def identity(self) -> dict[str, Any]:
        """What the packed set depends on; not the number, so that a longer set goes on where a shorter one ended."""
        return {
            "generator": GENERATOR,
            "style": self.style,
            "seed": self.scene_seed,
            "size": self.size,
            "labelled": self.labelled,
        }

    def prepare(self) -> None:
        """Nothing to fetch."""

    def read(self, index: int) -> ImageSample | DepthSample:
        """Renders one scene."""
        scene = render(style=self.style, seed=self.scene_seed, index=index, size=self.size)
        if not self.labelled:
            return ImageSample(image=scene.image, key=self.key(index))
        sky = np.isinf(scene.depth)
        disparity = np.where(sky, np.float32(0), 1 / scene.depth).astype(np.float32)
        valid = np.ones_like(sky)
        return DepthSample(
            image=scene.image, key=self.key(index), disparity=disparity, valid=valid, sky=sky, kind=DepthKind.METRIC
        )
