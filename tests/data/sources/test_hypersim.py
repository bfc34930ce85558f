"""Hypersim: a distance along the ray becomes planar depth, by each scene's own camera."""

import math
from pathlib import Path

import h5py
import numpy as np
import pytest

from depthany.data.files import DecodeError
from depthany.data.sources.hypersim import Hypersim, scene_rays, standard_rays, tone_map
from depthany.types import DepthKind
from tests.data.sources.writers.analytic import assert_reads, picture, reasons, save_picture
from tests.data.sources.writers.hypersim import (
    SCENES,
    SHAPE,
    STANDARD,
    TILTED,
    h5,
    ray_lengths,
    write_hypersim,
    write_metadata,
)

HALF = 1e-3  # relative step of float16


def reader(root: Path, **options: object) -> Hypersim:
    usual = {"split": "all", "image": "tonemap", "metadata": None, "exclude": [], "index_root": None}
    return Hypersim(name="hyper", root=str(root), **usual | options)  # type: ignore[arg-type]


@pytest.fixture
def metadata(tmp_path: Path) -> str:
    write_metadata(tmp_path / "metadata")
    return str(tmp_path / "metadata")


def test_every_pixel_with_each_scene_s_camera(tmp_path: Path, metadata: str) -> None:
    truths = write_hypersim(tmp_path / "set")
    source = reader(tmp_path / "set", metadata=metadata)
    never = "ai_021_002/images/scene_cam_01_final_preview/frame.0053.tonemap.jpg"
    assert reasons(source) == {f"hyper/{never}": "content flagged for removal"}
    del truths[never]
    assert_reads(source, truths, kind=DepthKind.METRIC, rtol=HALF)


def test_every_pixel_with_the_standard_camera(tmp_path: Path) -> None:
    truths = write_hypersim(tmp_path, own_cameras=False)
    assert_reads(reader(tmp_path), truths, kind=DepthKind.METRIC, rtol=HALF)


def test_the_wrong_camera_shows(tmp_path: Path) -> None:
    """The negative control: a tilted scene read with the standard camera is wrong."""
    truths = write_hypersim(tmp_path)
    with pytest.raises(AssertionError, match="above the tolerance"):
        assert_reads(reader(tmp_path), truths, kind=DepthKind.METRIC, rtol=0.05)


def test_hdr_colour_is_tone_mapped_whatever_its_exposure(tmp_path: Path) -> None:
    for exposure in (0.5, 40.0):
        root = tmp_path / str(exposure)
        truths = write_hypersim(root, own_cameras=False, exposure=exposure)
        source = reader(root, image="hdr")
        assert_reads(source, truths, kind=DepthKind.METRIC, rtol=HALF)
        assert source.data(0) == b""
    assert reader(root).data(0).startswith(b"\xff\xd8\xff")


def test_a_wall_in_front_is_flat_only_as_planar_depth(tmp_path: Path) -> None:
    for matrix, rays in ((STANDARD, standard_rays(*SHAPE)), (TILTED, scene_rays(tuple(TILTED), *SHAPE))):
        distance = 3 * ray_lengths(matrix, *SHAPE)
        assert distance.max() / distance.min() > 1.15
        np.testing.assert_allclose(distance / rays.numpy(), 3, rtol=1e-6)


def test_the_standard_camera_is_that_of_depth_anything() -> None:
    rays = standard_rays(768, 1024).numpy()
    x, y = np.linspace(-511.5, 511.5, 1024), np.linspace(-383.5, 383.5, 768)
    focal = 886.81
    np.testing.assert_allclose(1 / rays, focal / np.sqrt(x**2 + y[:, None] ** 2 + focal**2), rtol=1e-5)
    assert 1 / rays.max() == pytest.approx(0.811, abs=1e-3) and rays.min() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(rays, scene_rays(tuple(STANDARD), 768, 1024).numpy(), rtol=1e-6)


def test_splits_are_the_official_ones(tmp_path: Path, metadata: str) -> None:
    write_hypersim(tmp_path / "set")
    for split, scene in zip(("train", "val", "test"), SCENES, strict=True):
        source = reader(tmp_path / "set", split=split, metadata=metadata)
        assert {source.row(i).extra["scene"] for i in range(len(source))} == {scene}
        assert len(source) == (3 if split == "val" else 4)
    with pytest.raises(ValueError, match=r"split=train needs metadata_images_split_scene_v1\.csv: set `metadata`"):
        reader(tmp_path / "set", split="train")
    with pytest.raises(ValueError, match=r"metadata_camera_parameters\.csv is missing: copy it"):
        reader(tmp_path / "set", metadata=str(tmp_path)).prepare()


def test_broken_scenes_cameras_and_frames_are_left_out(tmp_path: Path) -> None:
    write_hypersim(tmp_path)
    exclude = ["ai_001_001", "ai_021_002/cam_01", "ai_021_002/cam_00/0053", "ai_099"]
    source = reader(tmp_path, exclude=exclude)
    assert {source.row(i).extra["frame"] for i in range(len(source))} == {
        "ai_021_002 cam_00 0000",
        *(f"ai_099_001 {camera} {frame}" for camera in ("cam_00", "cam_01") for frame in ("0000", "0053")),
    }
    assert sorted(set(reasons(source).values())) == [f"{name} is in `exclude`" for name in sorted(exclude[:3])]


def test_half_pairs_are_named(tmp_path: Path) -> None:
    write_hypersim(tmp_path, exposure=1.0)
    images = tmp_path / "ai_001_001" / "images"
    (images / "scene_cam_00_geometry_hdf5" / "frame.0000.depth_meters.hdf5").unlink()
    (images / "scene_cam_00_geometry_hdf5" / "frame.0053.render_entity_id.hdf5").unlink()
    (images / "scene_cam_01_final_preview" / "frame.0000.tonemap.jpg").unlink()
    assert {key.rpartition("images/")[2]: reason for key, reason in reasons(reader(tmp_path)).items()} == {
        "scene_cam_00_final_preview/frame.0000.tonemap.jpg": "an image without a label",
        "scene_cam_01_geometry_hdf5/frame.0000.depth_meters.hdf5": "a label without an image",
    }
    assert {key.rpartition("images/")[2]: reason for key, reason in reasons(reader(tmp_path, image="hdr")).items()} == {
        "scene_cam_00_final_hdf5/frame.0000.color.hdf5": "an image without a label",
        "scene_cam_00_final_hdf5/frame.0053.color.hdf5": "the tone map needs its render_entity_id.hdf5",
    }


def test_bad_files_are_told(tmp_path: Path) -> None:
    write_hypersim(tmp_path, exposure=1.0)
    source, hdr = reader(tmp_path), reader(tmp_path, image="hdr")
    label, colour = tmp_path / source.row(0).label, tmp_path / hdr.row(0).image
    h5(label, np.full(SHAPE, np.nan, np.float16))
    with pytest.raises(DecodeError, match="no pixel has a valid value"):
        source.read(0)
    label.write_bytes(label.read_bytes()[:300])
    with pytest.raises(DecodeError, match=r"depth_meters\.hdf5: damaged or not a \.hdf5 file.*; fetch"):
        source.read(0)
    h5(colour, np.ones((9, 12, 3), np.float16))
    with pytest.raises(DecodeError, match=r"colour \(9, 12, 3\) and render_entity_id \(18, 24\) do not fit"):
        hdr.read(0)
    colour.write_bytes(b"")
    with pytest.raises(DecodeError, match=r"color\.hdf5: damaged or not HDF5"):
        hdr.read(0)


def test_the_tone_map_looks_at_surfaces_only_and_ends_black_or_white() -> None:
    colour = np.full((4, 4, 3), 0.5, np.float16)
    colour[0] = 1000  # a window; not a surface
    surface = np.ones((4, 4), bool)
    surface[0] = False
    mapped = tone_map(colour, surface)
    assert (mapped[1:] == round(0.8 * 255)).all() and (mapped[0] == 255).all()
    assert not tone_map(np.zeros((4, 4, 3)), surface).any()
    assert tone_map(np.full((4, 4, 3), np.nan), surface).dtype == np.uint8
    assert (tone_map(np.ones((4, 4, 3)), ~np.ones((4, 4), bool)) == 255).all()  # no surface: as it is


def test_a_real_frame(tmp_path: Path, real_root: Path) -> None:
    """A file of the dataset itself, with a picture put where its preview would be."""
    (tmp_path / "ai_037_002" / "images").mkdir(parents=True)
    geometry = real_root / "labelled" / "hypersim_depth_only" / "ai_037_002" / "images" / "scene_cam_00_geometry_hdf5"
    (tmp_path / "ai_037_002" / "images" / geometry.name).symlink_to(geometry)
    preview = tmp_path / "ai_037_002" / "images" / "scene_cam_00_final_preview" / "frame.0000.tonemap.jpg"
    save_picture(preview, picture(768, 1024, number=0))
    sample = reader(tmp_path).read(0)
    with h5py.File(geometry / "frame.0000.depth_meters.hdf5") as file:
        distance = np.asarray(file["dataset"], np.float64)
    ratio = 1 / sample["disparity"] / distance
    assert sample["valid"].all() and distance.shape == (768, 1024)
    assert ratio.max() == pytest.approx(1, abs=1e-5)
    focal = 512 * math.sqrt(3)
    assert ratio[0, 0] == pytest.approx(focal / math.hypot(511.5, 383.5, focal), rel=1e-6)
