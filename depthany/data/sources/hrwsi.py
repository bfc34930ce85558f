"""HRWSI (high-resolution web stereo images) in its original files."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import ClassVar, Literal

from depthany.data.labels import Label
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.types import DepthKind, Quantity

JPEG, PNG = r"(.+)\.(?:jpg|jpeg|JPG)", r"(.+)\.png"


class Hrwsi(Raw):
    """`{train,val}/imgs/<stem>.jpg` with `gts/<stem>.png`, a relative disparity, and `valid_masks/<stem>.png`.

    The label is the horizontal part of an optical flow: larger is nearer, scale and shift are unknown. 0 is the
    farthest value and legal; the mask alone says what is valid.

    Args:
        name: of the source, the first part of every key.
        root: the folder that holds `train` and `val`.
        split: train (20,378 images), val (400) or all.
        sky_masks: masks of the sky, which the labels do not know: a folder, or "beside": `<root>/.depthany/sky`, where
            `python -m depthany.sky` puts them; null: none.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.
    """

    dataset: ClassVar[str] = "hrwsi"
    layout: ClassVar[str] = (
        "{train,val}/imgs/<stem>.jpg, {train,val}/gts/<stem>.png, {train,val}/valid_masks/<stem>.png"
    )
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "all")
    kind: ClassVar[DepthKind] = DepthKind.AFFINE
    factor: ClassVar[float] = 1.0

    def __init__(
        self,
        *,
        name: str,
        root: str,
        split: Literal["train", "val", "all"],
        sky_masks: str | None,
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split=split, index_root=index_root, sky_masks=sky_masks)

    def scan(self) -> Iterator[Row]:
        """Matches images, labels and masks by stem."""
        for folder, files in self.siblings("imgs", "gts", "valid_masks"):
            if self.split not in ("all", PurePosixPath(folder).name):
                continue
            images, labels, masks = (
                self.named(paths, pattern) for paths, pattern in zip(files, (JPEG, PNG, PNG), strict=True)
            )
            for stem, image, label in self.pairs(images, labels):
                if stem in masks:
                    yield Row(image, image, label, {"mask": masks[stem]})
                else:
                    self.skip(image, "there is no mask for it in valid_masks")

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """The stored disparity, 8 or 16 bits."""
        values, mask = self.values(row.label), self.values(row.extra["mask"])
        if values.dtype.kind != "u":
            raise self.damaged(row.label, f"it holds {values.dtype}, wanted 8 or 16 bits of grey")
        if mask.shape != values.shape:
            raise self.damaged(row.extra["mask"], f"the mask is {mask.shape}, its label {values.shape}")
        return as_label(values, kind=self.kind, quantity=Quantity.DISPARITY, factor=self.factor, mask=mask > 0)
