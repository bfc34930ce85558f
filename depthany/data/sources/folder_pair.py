"""One's own images and labels in two folders, matched by name."""

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import ClassVar, Literal

from depthany.data.files import DEPTH_SUFFIXES, DecodeError, decode_depth, depth_suffix
from depthany.data.labels import Label
from depthany.data.sources.photos import SUFFIXES
from depthany.data.sources.raw import Raw, Row, as_label
from depthany.geometry.cameras import ray_norms
from depthany.types import DepthKind, Quantity


class FolderPair(Raw):
    """`images/a/1.jpg` with `depth/a/1.png`: the same path but for the suffix; one meaning for all labels.

    What one folder cannot say goes into an `index.csv` (`IndexCsv`). A depth or distance with a scale is metric,
    without one it is known up to scale. A disparity with a scale is in pixels and known up to scale; without one its
    shift is taken to be unknown as well.

    Args:
        name: of the source, the first part of every key.
        root: the folder with both.
        images: folder of the images, below the root.
        depth: folder of the labels, below the root.
        quantity: what the labels hold: depth along the optical axis, distance along the ray, or disparity.
        scale: metres per stored one, or pixels of a disparity; null where it is unknown.
        invalid: stored values without a measurement, such as 0 or 65535; NaN, inf, and depths up to 0 always are.
        sky: stored value that is infinitely far; null: none.
        sky_above: metres, or stored units without a scale, from which on a depth is infinitely far; null: none.
        focal_px: focal length in pixels of the image, which a distance needs; null for the others.
        centre_px: column and row of the principal point in pixels of the image; null: its middle.
        encoding: the format of the labels; every file of the folder is then taken for one. null: told from each file's
            first bytes.
        array: which EXR channel, or which array of an NPZ or HDF5 file, where one holds several; null: the only one.
        sky_masks: masks of the sky, which the labels do not know: a folder, or "beside": `<root>/.depthany/sky`, where
            `python -m depthany.sky` puts them; null: none.
        index_root: folder for the list of samples, where `root` is read-only; null: `<root>/.depthany`.

    Raises:
        ValueError: the options contradict each other.
    """

    dataset: ClassVar[str] = "folder_pair"
    layout: ClassVar[str] = "images/<path>.<any> and depth/<path>.<any>"

    def __init__(
        self,
        *,
        name: str,
        root: str,
        images: str,
        depth: str,
        quantity: Literal["depth", "distance", "disparity"],
        scale: float | None,
        invalid: Sequence[float],
        sky: float | None,
        sky_above: float | None,
        focal_px: float | None,
        centre_px: Sequence[float] | None,
        encoding: Literal["png", "pgm", "tiff", "npy", "npz", "exr", "pfm", "hdf5"] | None,
        array: str | None,
        sky_masks: str | None,
        index_root: str | None,
    ) -> None:
        super().__init__(name=name, root=root, split="all", index_root=index_root, sky_masks=sky_masks)
        if (quantity == "distance") != (focal_px is not None):
            raise ValueError(f"source {name}: give focal_px with quantity=distance, and only there")
        if sky_above is not None and quantity == "disparity":
            raise ValueError(f"source {name}: sky_above is a depth, but quantity=disparity: name the code as sky")
        self.images, self.depth = PurePosixPath(images), PurePosixPath(depth)
        self.quantity, self.scale = Quantity(quantity), scale
        self.invalid = [float(code) for code in invalid if code == code]  # NaN always is, and is no JSON
        self.sky, self.sky_above, self.focal_px, self.centre_px = sky, sky_above, focal_px, centre_px
        self.encoding, self.array = encoding, array
        unscaled = DepthKind.AFFINE if quantity == "disparity" else DepthKind.SCALE
        scaled = DepthKind.SCALE if quantity == "disparity" else DepthKind.METRIC
        self.kind = unscaled if scale is None else scaled
        numbers = {"scale": scale, "sky": sky, "sky_above": sky_above, "focal_px": focal_px}  # 1 and 1.0 are alike
        self.options = {
            **{"images": images, "depth": depth, "quantity": quantity, "encoding": encoding, "array": array},
            **{option: None if value is None else float(value) for option, value in numbers.items()},
            **{"invalid": self.invalid, "centre_px": centre_px and [float(value) for value in centre_px]},
        }

    def check(self) -> None:
        """Also the two folders."""
        super().check()
        for option, folder in (("images", self.images), ("depth", self.depth)):
            if not (self.root / folder).is_dir():
                raise ValueError(f"source {self.name}: {self.root / folder} is no folder: correct `root` or `{option}`")

    def scan(self) -> Iterator[Row]:
        """Matches the paths below the two folders without their suffixes."""
        found: dict[PurePosixPath, dict[str, str]] = {self.images: {}, self.depth: {}}
        suffixes = {self.images: SUFFIXES, self.depth: None if self.encoding else set(DEPTH_SUFFIXES)}
        for folder, names in self.walk():
            for base, paths in found.items():
                for path in (PurePosixPath(folder, name) for name in names):
                    wanted = suffixes[base]
                    if path.is_relative_to(base) and (wanted is None or path.suffix.lower() in wanted):
                        stem = str(path.relative_to(base).with_suffix(""))
                        if stem in paths:
                            self.skip(str(path), f"{PurePosixPath(paths[stem]).name} has the same name and is used")
                        else:
                            paths[stem] = str(path)
        for _, image, label in self.pairs(found[self.images], found[self.depth]):
            yield Row(image, image, label, {})

    def label(self, row: Row, image_shape: tuple[int, int]) -> Label:
        """Disparity is 1 / depth, or in pixels, or as stored."""
        data = self.content(row.label)
        suffix = f".{self.encoding}" if self.encoding else depth_suffix(data) or PurePosixPath(row.label).suffix
        try:
            values = decode_depth(data, suffix, channel=self.array, key=self.array)
        except DecodeError as err:
            raise self.damaged(row.label, err) from err
        rays = None
        if self.focal_px is not None:
            (height, width), (h, w) = image_shape, values.shape
            cx, cy = self.centre_px or (width / 2, height / 2)
            rays = ray_norms(h, w, self.focal_px * w / width, cx * w / width, cy * h / height)
        return as_label(
            values,
            kind=self.kind,
            quantity=self.quantity,
            scale=1.0 if self.scale is None else self.scale,
            invalid=self.invalid,
            sky=self.sky,
            sky_above=self.sky_above,
            rays=rays,
        )
