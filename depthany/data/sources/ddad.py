"""DDAD, extracted to files as ZoeDepth and Depth Anything read it."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Row, as_label
from depthany.types import DepthKind


class Ddad(Matched):
    """`<name>_rgb.png` with `<name>_depth.npy` at any depth below the root: metres, planar depth, 0 is none, sparse.

    The release itself holds point clouds, which TRI's DGP library projects; this is what is written from it.

    Args:
        name: of the source, the first part of every key.
        root: the folder with the extracted files.
        split: all that was extracted; evaluations take the front camera of the 50 validation scenes.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "ddad"
    layout: ClassVar[str] = "<name>_rgb.png and <name>_depth.npy"
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0
    parts: Mapping[str, str] = {"image": r"(.+)_rgb\.png", "label": r"(.+)_depth\.npy"}

    def __init__(self, *, name: str, root: str, split: Literal["all"], index_root: str | None) -> None:
        super().__init__(name=name, root=root, split=split, files=None, index_root=index_root)

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres."""
        values = self.sized(row.label, image_shape)
        if values.dtype.kind != "f":
            raise self.damaged(row.label, f"it holds {values.dtype}, wanted floats in metres")
        return as_label(values, kind=self.kind, factor=self.factor, invalid=[0])
