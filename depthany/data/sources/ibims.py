"""iBims-1, the core set in PNG files (ibims1_core_raw)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Row, as_label
from depthany.types import DepthKind


class Ibims(Matched):
    """`rgb/<name>.png` with `depth/<name>.png`, `mask_invalid/<name>.png` and `mask_transp/<name>.png`.

    16 bits, 65535 is 50 m, planar depth. A pixel counts where both masks are not 0 and the depth is not.

    Args:
        name: of the source, the first part of every key.
        root: the folder ibims1_core_raw, or one above.
        split: all 100 images.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "ibims"
    layout: ClassVar[str] = "rgb/<name>.png with the same in depth, mask_invalid and mask_transp"
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    scale: ClassVar[float] = 50 / 65535  # metres per stored one
    parts: Mapping[str, str] = {
        "image": r"rgb/([^/]+)\.png",
        "label": r"depth/([^/]+)\.png",
        "mask_invalid": r"mask_invalid/([^/]+)\.png",
        "mask_transp": r"mask_transp/([^/]+)\.png",
    }

    def __init__(self, *, name: str, root: str, split: Literal["all"], index_root: str | None) -> None:
        super().__init__(name=name, root=root, split=split, files=None, index_root=index_root)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres where neither mask forbids it."""
        values = self.sized(row.label, image_shape, dtype="uint16")
        mask = values > 0
        for path in (row.extra["mask_invalid"], row.extra["mask_transp"]):
            allowed = self.picture(path)[..., 0] > 0  # as a picture: 1 bit or 8
            if allowed.shape != values.shape:
                raise self.damaged(path, f"it is {allowed.shape}, the depth {values.shape}")
            mask &= allowed
        return as_label(values, kind=self.kind, scale=self.scale, factor=self.factor, mask=mask)
