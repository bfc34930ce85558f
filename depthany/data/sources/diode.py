"""DIODE in its original files."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.matched import Matched
from depthany.data.sources.raw import Row, as_label
from depthany.types import DepthKind

PLACES = ("indoors", "outdoor")


class Diode(Matched):
    """`val/indoors/scene_00019/scan_00183/<stem>.png` with `<stem>_depth.npy` and `<stem>_depth_mask.npy`.

    float32 metres of shape (768, 1024, 1), planar depth; the mask is 1 where there is a measurement. The sky is masked
    out.

    Args:
        name: of the source, the first part of every key.
        root: the folder that holds `train` or `val`.
        split: val (771 images), train (25,458) or all.
        places: indoors, outdoor or both; results differ much between them.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "diode"
    layout: ClassVar[str] = (
        "{train,val}/{indoors,outdoor}/scene_00019/scan_00183/<stem>.png, <stem>_depth.npy and <stem>_depth_mask.npy"
    )
    splits: ClassVar[tuple[str, ...]] = ("val", "train", "all")
    kind: ClassVar[DepthKind] = DepthKind.METRIC
    factor: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["val", "train", "all"],
        places: Sequence[Literal["indoors", "outdoor"]],
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, files=None, index_root=index_root)
        if not places or not set(places) <= set(PLACES):
            raise ValueError(f"source {name}: places={list(places)}; give indoors, outdoor, or both")
        wanted = sorted(set(places))
        self.options = {"places": wanted}
        splits = "train|val" if split == "all" else split
        stem = rf"({splits})/({'|'.join(wanted)})/(scene_\d{{5}})/(scan_\d{{5}})/([^/]+)"
        self.parts: Mapping[str, str] = {
            "image": rf"{stem}\.png",
            "label": rf"{stem}_depth\.npy",
            "mask": rf"{stem}_depth_mask\.npy",
        }

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """1 / metres where the mask is 1."""
        values = self.sized(row.label, image_shape, dtype="float32")
        mask = self.sized(row.extra["mask"], image_shape)
        return as_label(values, kind=self.kind, factor=self.factor, mask=mask == 1)
