"""One scene through every dataset's encoding: the training target is the same, whatever the unit, code and factor."""

from collections.abc import Callable
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from depthany.data.sources.blendedmvs import BlendedMvs
from depthany.data.sources.ddad import Ddad
from depthany.data.sources.diml import DimlIndoor, DimlOutdoor
from depthany.data.sources.diode import Diode
from depthany.data.sources.eth3d import Eth3d
from depthany.data.sources.folder_pair import FolderPair
from depthany.data.sources.hypersim import Hypersim
from depthany.data.sources.ibims import Ibims
from depthany.data.sources.irs import Irs
from depthany.data.sources.kitti import Kitti
from depthany.data.sources.megadepth import MegaDepth
from depthany.data.sources.nyuv2 import NyuV2, NyuV2Labelled
from depthany.data.sources.raw import Raw, as_label
from depthany.data.sources.scannet import ScanNet
from depthany.data.sources.sintel import Sintel
from depthany.data.sources.tartanair import TartanAir, TartanAirV2
from depthany.data.sources.vkitti2 import VirtualKitti2
from depthany.geometry.disparity import normalise
from depthany.types import DepthKind, Quantity
from tests.data.sources.writers import hypersim as hypersim_tree
from tests.data.sources.writers import megadepth as megadepth_tree
from tests.data.sources.writers.analytic import picture, save_picture
from tests.data.sources.writers.blendedmvs import pfm
from tests.data.sources.writers.irs import exr
from tests.data.sources.writers.sintel import dpt

SHAPE = (36, 48)
SCENE = "5b7a3890fc8fcf6781e2593a"


def depth() -> np.ndarray:
    """A near square on a far wall that leans: metres, and no pixel without."""
    wall = np.broadcast_to(np.linspace(15, 40, SHAPE[1]), SHAPE).copy()
    wall[8:24, 10:30] = 3.0
    return wall


def target(disparity: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """What a loss sees."""
    return normalise(torch.from_numpy(disparity), torch.from_numpy(valid)).numpy()


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def blendedmvs(root: Path) -> Raw:
    save_picture(root / SCENE / "blended_images" / "00000000.jpg", picture(*SHAPE, number=0))
    label = root / SCENE / "rendered_depth_maps" / "00000000.pfm"
    label.parent.mkdir()
    label.write_bytes(pfm(depth() / 7.3, big_endian=True))  # scale of the reconstruction
    return BlendedMvs(name="x", root=str(root), split="all", sky_masks=None, index_root=None)


def megadepth(root: Path) -> Raw:
    save_picture(root / "0000" / "dense0" / "imgs" / "a.jpg", picture(*SHAPE, number=0))
    megadepth_tree.h5(root / "0000" / "dense0" / "depths" / "a.h5", (depth() * 0.02).astype(np.float32))
    return MegaDepth(name="x", root=str(root), split="all", percentiles=None, sky_masks=None, index_root=None)


def irs(root: Path) -> Raw:
    save_picture(root / "Home" / "a" / "l_1.png", picture(*SHAPE, number=0))
    exr(root / "Home" / "a" / "d_1.exr", G=(48 / depth()).astype(np.float32))
    return Irs(name="x", root=str(root), split="all", index_root=None)


def tartanair(root: Path) -> Raw:
    base = root / "hospital" / "Easy" / "P000"
    save_picture(base / "image_left" / "000000_left.png", picture(*SHAPE, number=0))
    save(base / "depth_left" / "000000_left_depth.npy", depth().astype(np.float32))
    return TartanAir(name="x", root=str(root), split="all", sky_above=1000.0, exclude=[], index_root=None)


def tartanair_v2(root: Path) -> Raw:
    base = root / "House" / "Data_hard" / "P000"
    save_picture(base / "image_lcam_front" / "000000_lcam_front.png", picture(*SHAPE, number=0))
    (base / "depth_lcam_front").mkdir()
    packed = depth().astype("<f4").view(np.uint8).reshape(*SHAPE, 4)
    cv2.imwrite(str(base / "depth_lcam_front" / "000000_lcam_front_depth.png"), packed)
    return TartanAirV2(name="x", root=str(root), split="all", sky_above=1000.0, exclude=[], index_root=None)


def hypersim(root: Path) -> Raw:
    base = root / "ai_001_001" / "images"
    save_picture(base / "scene_cam_00_final_preview" / "frame.0000.tonemap.jpg", picture(*SHAPE, number=0))
    distance = depth() * hypersim_tree.ray_lengths(None, *SHAPE)
    hypersim_tree.h5(base / "scene_cam_00_geometry_hdf5" / "frame.0000.depth_meters.hdf5", distance.astype(np.float16))
    options = {"split": "all", "image": "tonemap", "metadata": None, "exclude": [], "index_root": None}
    return Hypersim(name="x", root=str(root), **options)  # type: ignore[arg-type]


def vkitti2(root: Path) -> Raw:
    base = root / "Scene01" / "clone" / "frames"
    save_picture(base / "rgb" / "Camera_0" / "rgb_00000.jpg", picture(*SHAPE, number=0))
    save(base / "depth" / "Camera_0" / "depth_00000.png", np.rint(depth() * 100).astype(np.uint16))
    return VirtualKitti2(name="x", root=str(root), split="all", cameras=[0], index_root=None)


def diml_indoor(root: Path) -> Raw:
    save_picture(root / "1. Room" / "col" / "a_c.png", picture(*SHAPE, number=0))
    save(root / "1. Room" / "up_png" / "a_ud.png", np.rint(depth() * 1000).astype(np.uint16))
    return DimlIndoor(name="x", root=str(root), split="all", index_root=None)


def diml_outdoor(root: Path) -> Raw:
    save_picture(root / "outleft" / "a.png", picture(*SHAPE, number=0))
    save(root / "depthmap" / "a.png", np.rint(depth() * 1000).astype(np.uint16))
    save(root / "confidencemap" / "a.png", np.full(SHAPE, 255, np.uint8))
    return DimlOutdoor(name="x", root=str(root), split="all", min_confidence=0.6, sky_masks=None, index_root=None)


def folder_pair(root: Path) -> Raw:
    save_picture(root / "images" / "a.png", picture(*SHAPE, number=0))
    save(root / "depth" / "a.npy", (1000 / depth()).astype(np.float32))
    nothing = dict.fromkeys(
        ["sky", "sky_above", "focal_px", "centre_px", "encoding", "array", "sky_masks", "index_root"]
    )
    options = {"quantity": "disparity", "scale": None, "invalid": [], "images": "images", "depth": "depth"}
    return FolderPair(name="x", root=str(root), **options, **nothing)  # type: ignore[arg-type]


def kitti(root: Path) -> Raw:
    drive = "2011_09_26_drive_0002_sync"
    save_picture(root / "2011_09_26" / drive / "image_02" / "data" / "0000000069.png", picture(*SHAPE, number=0))
    label = root / drive / "proj_depth" / "groundtruth" / "image_02" / "0000000069.png"
    save(label, np.rint(depth() * 256).astype(np.uint16))
    return Kitti(name="x", root=str(root), split="all", files=None, index_root=None)


def nyuv2(root: Path) -> Raw:
    save_picture(root / "bathroom" / "rgb_00045.jpg", picture(*SHAPE, number=0))
    save(root / "bathroom" / "sync_depth_00045.png", np.rint(depth() * 1000).astype(np.uint16))
    return NyuV2(name="x", root=str(root), split="all", files=None, index_root=None)


def nyuv2_labelled(root: Path) -> Raw:
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = picture(*SHAPE, number=0).transpose(2, 1, 0)[None]
        file["rawDepths"] = depth().T.astype(np.float32)[None]
    return NyuV2Labelled(name="x", root=str(root), split="all", depth="raw", index_root=None)


def sintel(root: Path) -> Raw:
    save_picture(root / "training" / "final" / "alley_1" / "frame_0001.png", picture(*SHAPE, number=0))
    label = root / "training" / "depth" / "alley_1" / "frame_0001.dpt"
    label.parent.mkdir(parents=True)
    label.write_bytes(dpt(depth() / 2.5))  # whatever the unit is
    return Sintel(name="x", root=str(root), split="all", passes=["final"], sky_above=1000.0, index_root=None)


def eth3d(root: Path) -> Raw:
    save_picture(root / "office" / "images" / "dslr_images" / "DSC_0219.JPG", picture(*SHAPE, number=0))
    label = root / "office" / "ground_truth_depth" / "dslr_images" / "DSC_0219.JPG"
    label.parent.mkdir(parents=True)
    label.write_bytes(depth().astype("<f4").tobytes())
    return Eth3d(name="x", root=str(root), split="all", index_root=None)


def diode(root: Path) -> Raw:
    stem = root / "val" / "outdoor" / "scene_00022" / "scan_00193" / "a"
    save_picture(stem.with_suffix(".png"), picture(*SHAPE, number=0))
    save(stem.with_name("a_depth.npy"), depth()[..., None].astype(np.float32))
    save(stem.with_name("a_depth_mask.npy"), np.ones(SHAPE))
    return Diode(name="x", root=str(root), split="val", places=["outdoor"], index_root=None)


def ddad(root: Path) -> Raw:
    save_picture(root / "a_rgb.png", picture(*SHAPE, number=0))
    save(root / "a_depth.npy", depth())
    return Ddad(name="x", root=str(root), split="all", index_root=None)


def scannet(root: Path) -> Raw:
    save_picture(root / "scene0000_00" / "color" / "000000.jpg", picture(*SHAPE, number=0))
    save(root / "scene0000_00" / "depth" / "000000.png", np.rint(depth() * 1000).astype(np.uint16))
    return ScanNet(name="x", root=str(root), split="all", files=None, index_root=None)


def ibims(root: Path) -> Raw:
    save_picture(root / "rgb" / "a.png", picture(*SHAPE, number=0))
    save(root / "depth" / "a.png", np.rint(depth() * 65535 / 50).astype(np.uint16))
    for mask in ("mask_invalid", "mask_transp"):
        save(root / mask / "a.png", np.full(SHAPE, 255, np.uint8))
    return Ibims(name="x", root=str(root), split="all", index_root=None)


# The relative error of the stored depth, and with it that of the target: half a step at 3 m, or of half floats.
READERS: dict[Callable[[Path], Raw], float] = {
    blendedmvs: 1e-6,
    megadepth: 1e-6,
    irs: 1e-6,
    tartanair: 1e-6,
    tartanair_v2: 1e-6,
    hypersim: 1e-3,
    vkitti2: 0.005 / 3,
    diml_indoor: 0.0005 / 3,
    diml_outdoor: 0.0005 / 3,
    folder_pair: 1e-6,
    kitti: 0.5 / 256 / 3,
    nyuv2: 0.0005 / 3,
    nyuv2_labelled: 1e-6,
    sintel: 1e-6,
    eth3d: 1e-6,
    diode: 1e-6,
    ddad: 1e-6,
    scannet: 0.0005 / 3,
    ibims: 25 / 65535 / 3,
}


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_the_target_is_the_same(make: Callable[[Path], Raw], tmp_path: Path) -> None:
    sample = make(tmp_path).read(0)
    assert sample["valid"].all() and not sample["sky"].any()
    wanted = target((1 / depth()).astype(np.float32), np.ones(SHAPE, bool))
    np.testing.assert_allclose(target(sample["disparity"], sample["valid"]), wanted, atol=3 * READERS[make])


@pytest.mark.parametrize("factor", [1e-3, 0.1, 80, 386.2, 1e5])
def test_no_positive_factor_matters(factor: float) -> None:
    """1 / t and 80 / t are the same target, to float rounding."""
    far = depth()
    far[0, :5] = [0, np.nan, -1, np.inf, 65535]
    one, other = (
        as_label(far, kind=DepthKind.METRIC, factor=f, invalid=[0], sky=np.inf, sky_above=1000) for f in (1, factor)
    )
    np.testing.assert_array_equal(one["valid"], other["valid"])
    np.testing.assert_array_equal(one["sky"], other["sky"])
    targets = [target(label["disparity"], label["valid"]) for label in (one, other)]
    np.testing.assert_allclose(*targets, atol=2e-7)


def test_no_unit_matters_but_the_quantity_does(tmp_path: Path) -> None:
    """Centimetres for metres cancel; a ray taken for a depth, or a depth for a disparity, does not."""
    right = target((1 / depth()).astype(np.float32), np.ones(SHAPE, bool))
    metres = as_label(depth(), kind=DepthKind.METRIC, scale=0.01)
    np.testing.assert_allclose(target(metres["disparity"], metres["valid"]), right, atol=1e-6)
    source = hypersim(tmp_path)
    ray = as_label(source.values(source.row(0).label, key="dataset"), kind=DepthKind.METRIC)
    assert np.abs(target(ray["disparity"], ray["valid"]) - right).max() > 0.02
    inverse = as_label(depth(), kind=DepthKind.AFFINE, quantity=Quantity.DISPARITY)
    assert np.abs(target(inverse["disparity"], inverse["valid"]) - right).max() > 0.9
