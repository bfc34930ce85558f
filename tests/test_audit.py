"""The verb: a right set gives status 0, a wrong one 1, a wrong option 2; every dataset that ships can be asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf

from depthany.config.build import build
from depthany.config.check import ConfigError, check
from depthany.config.launch import compose, groups_of
from depthany.data.scenes import render
from depthany.data.sources.folder_pair import FolderPair
from depthany.data.sources.packed import Packed
from depthany.data.sources.scenes import Scenes
from depthany.data.truth_packing import TruthPacking
from depthany.runs.auditing import Audit, audit
from depthany.types import DepthSample
from tests.data.sources.writers.irs import write_irs


def test_every_dataset_composes_and_has_a_field_of_view() -> None:
    names = groups_of()["dataset"]
    for name in names:
        check(compose("audit", [f"dataset={name}", "root=FOLDER"]))
    assert set(OmegaConf.to_container(compose("audit", []).fov_deg)) == set(names)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "dataset=NAME"),
        (["dataset=hypersim"], "root=FOLDER"),
        (["dataset=hypersim", "root=FOLDER", "range_m=far"], "range_m"),
        (["dataset=hypersim", "root=FOLDER", "fov_deg.hypersim=wide"], "fov_deg.hypersim"),
        (["dataset=folder_pair", "root=FOLDER", "dataset.quantity=length"], "dataset.quantity"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(compose("audit", options))


def write_pairs(root: Path, *, inverted: bool = False) -> None:
    """Eight scenes as two folders, depth in metres."""
    for part in ("images", "depth"):
        (root / part).mkdir(parents=True)
    for i in range(8):
        scene = render(style="a", seed=3, index=i, size=128)
        cv2.imwrite(str(root / f"images/{i}.png"), scene.image[..., ::-1])
        depth = np.where(np.isinf(scene.depth), np.float32(0), scene.depth)
        np.save(root / f"depth/{i}.npy", np.where(inverted & (depth > 0), 4 / np.maximum(depth, 1e-3), depth))


def audited(
    root: Path, page: Path, *, limit: int | None = None, checksums: bool = False, fov_deg: float | None = None
) -> Audit:
    source = FolderPair(
        name="mine",
        root=str(root),
        images="images",
        depth="depth",
        quantity="depth",
        scale=1.0,
        invalid=[0],
        sky=None,
        sky_above=None,
        focal_px=None,
        centre_px=None,
        encoding=None,
        array=None,
        sky_masks=None,
        index_root=None,
    )
    return audit(
        source,
        dataset="folder_pair",
        limit=limit,
        checksums=False,
        fov_deg=fov_deg,
        range_m=None,
        page=page,
        command="the command",
    )


def test_a_right_set_passes_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    write_pairs(tmp_path / "right")
    write_pairs(tmp_path / "wrong", inverted=True)
    right = audited(tmp_path / "right", tmp_path / "right.html")
    assert not right.flagged and "Nothing is flagged." in right.page.read_text(encoding="utf-8")
    wrong = audited(tmp_path / "wrong", tmp_path / "wrong.html")
    assert wrong.flagged
    assert [v.test for v in wrong.groups["folder_pair"] if v.state == "flagged"] == ["inverted sign"]
    html = wrong.page.read_text(encoding="utf-8")
    assert "folder_pair: inverted sign: on " in html and html.count("<img") > 12 and "the command" in html


def test_a_file_that_cannot_be_read_is_flagged_and_named(tmp_path: Path) -> None:
    write_pairs(tmp_path / "set")
    (tmp_path / "set/depth/3.npy").write_bytes(b"\x93NUMPY")
    found = audited(tmp_path / "set", tmp_path / "page.html")
    assert found.flagged and len(found.faults) == 1 and "depth/3.npy" in found.faults[0][1]
    assert all(v.state != "flagged" for v in found.groups["folder_pair"])


def test_a_file_that_rotted_after_packing_is_named_though_its_size_and_time_are_the_same(tmp_path: Path) -> None:
    write_irs(tmp_path / "irs")
    source = build(compose("audit", ["dataset=irs", f"root={tmp_path / 'irs'}"]).dataset)
    TruthPacking(source=source, out=tmp_path / "out", samples_per_shard=9, pictures="keep", workers=1).run()
    options = {"limit": 1, "checksums": True, "fov_deg": None, "range_m": None, "page": tmp_path / "p", "command": ""}
    assert not audit(source, dataset="irs", **options).faults
    file = source.root / source.row(1).label
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    ((key, why),) = audit(source, dataset="irs", **options).faults
    assert key.endswith(source.row(1).label) and f"{file}: its content is not what it was: fetch the file again" in why
    with pytest.raises(ConfigError, match="checksums=true is for sets in their original files"):
        audit(Scenes(name="x", style="a", num_scenes=2, scene_seed=0, size=64, labelled=True), dataset="x", **options)


def test_the_card_gives_the_range_and_limit_the_number(tmp_path: Path) -> None:
    source = Scenes(name="embedded", style="a", num_scenes=9, scene_seed=0, size=64, labelled=True)
    page = tmp_path / "deep/er/page.html"
    audit(source, dataset="embedded", limit=3, checksums=False, fov_deg=60, range_m=None, page=page, command="")
    html = page.read_text(encoding="utf-8")
    assert "0.5 to 50 m" in html and "<th>samples</th><td>3</td>" in html


class Eighty(Scenes):
    """Disparity = 80 / depth, as TartanAir has it."""

    factor = 80.0

    def read(self, index: int) -> DepthSample:
        sample: Any = super().read(index)
        return {**sample, "disparity": sample["disparity"] * 80}


class Half(Scenes):
    """Two datasets, of which the second is upside down."""

    def group(self, index: int) -> str:
        return ("right", "wrong")[index % 2]

    def read(self, index: int) -> DepthSample:
        sample: Any = super().read(index)
        f = sample["disparity"]
        turned = np.where(f > 0, 1 / np.where(f > 0, f, 1), 0).astype(np.float32)
        return {**sample, "disparity": turned if index % 2 else f}


def test_the_page_begins_with_what_is_flagged_and_pictures_of_it(tmp_path: Path) -> None:
    source = Half(name="x", style="a", num_scenes=12, scene_seed=3, size=96, labelled=True)
    options = {"limit": None, "checksums": False, "fov_deg": None, "range_m": None, "command": ""}
    found = audit(source, dataset="x", page=tmp_path / "page.html", **options)
    flagged = {name for name, of in found.groups.items() for verdict in of if verdict.state == "flagged"}
    assert flagged == {"wrong"}
    html = found.page.read_text(encoding="utf-8")
    assert html.index("wrong: inverted sign") < html.index("Near and far are exchanged") < html.index("<img")
    assert html.rindex("<img") < html.index("<table")
    worst = html[html.index("Samples with most against them") : html.index("Random samples")]
    assert [f"<h3>{source.key(i)}</h3>" in worst for i in range(12)] == [False, True] * 6


def test_the_unit_counts_the_factor_of_the_disparity(tmp_path: Path) -> None:
    said = []
    for kind in (Scenes, Eighty):
        source = kind(name="x", style="a", num_scenes=4, scene_seed=0, size=64, labelled=True)
        found = audit(
            source,
            dataset="x",
            limit=None,
            checksums=False,
            fov_deg=None,
            range_m=None,
            page=tmp_path / "p",
            command="",
        )
        said.append(next(v.words for v in found.groups["x"] if v.test == "wrong unit"))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"range_m": [5.0]}, r"range_m=\[5.0\]: give \[nearest, farthest\]"),
        ({"range_m": [5.0, 1.0]}, r"give \[nearest, farthest\]"),
        ({"fov_deg": 200.0}, "fov_deg.x=200 must lie between 0 and 180"),
        ({"page": Path()}, "page=. is a folder: name a file in it, such as page=audit.html"),
        ({"limit": 0}, "limit=0; give 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = Scenes(name="x", style="a", num_scenes=2, scene_seed=0, size=64, labelled=True)
    usual = {"limit": None, "checksums": False, "fov_deg": None, "range_m": None, "page": tmp_path / "p", "command": ""}
    with pytest.raises(ConfigError, match=words):
        audit(source, dataset="x", **usual | options)


def test_a_source_without_labels_is_refused(tmp_path: Path) -> None:
    source = Scenes(name="photos", style="a", num_scenes=2, scene_seed=0, size=64, labelled=False)
    with pytest.raises(ConfigError, match="no label"):
        audit(
            source,
            dataset="x",
            limit=None,
            checksums=False,
            fov_deg=None,
            range_m=None,
            page=tmp_path / "page.html",
            command="",
        )


def test_shards_are_audited_like_their_source(tmp_path: Path) -> None:
    source = Scenes(name="scenes", style="a", num_scenes=6, scene_seed=0, size=96, labelled=True)
    packed = Packed(root=str(tmp_path), source=source, samples_per_shard=4, short_side=None)
    packed.prepare()
    shards = build(compose("audit", ["dataset=shards", f"root={packed.folder}"]).dataset)
    options = {"limit": None, "checksums": False, "fov_deg": 60, "range_m": None, "command": ""}
    raw = audit(source, dataset="embedded", page=tmp_path / "raw.html", **options)
    again = audit(shards, dataset="embedded", page=tmp_path / "again.html", **options)
    assert raw.groups == again.groups and not raw.faults and not again.faults
    with pytest.raises(ConfigError, match=r"page=.* cannot be written"):
        audit(shards, dataset="embedded", page=tmp_path / "raw.html" / "page.html", **options)
    copy = Path(shutil.copytree(packed.folder, tmp_path / "copy"))
    os.truncate(min(copy.glob("*.tar")), 600)
    shards = build(compose("audit", ["dataset=shards", f"root={copy}"]).dataset)
    with pytest.raises(ConfigError, match="its index says"):
        audit(shards, dataset="embedded", page=tmp_path / "again.html", **options)


def test_a_missing_root_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"root=.*none") as error:
        source = build(compose("audit", ["dataset=vkitti2", f"root={tmp_path / 'none'}"]).dataset)
        audit(
            source,
            dataset="vkitti2",
            limit=1,
            checksums=False,
            fov_deg=None,
            range_m=None,
            page=tmp_path / "page.html",
            command="",
        )
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("inverted", "status"), [(False, 0), (True, 1)])
def test_the_status_tells_the_verdict(inverted: bool, status: int, tmp_path: Path) -> None:
    write_pairs(tmp_path / "set", inverted=inverted)
    command = [sys.executable, "-m", "depthany.audit", "dataset=folder_pair", f"root={tmp_path / 'set'}"]
    done = subprocess.run([*command, f"page={tmp_path / 'page.html'}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "page.html").is_file() and str(tmp_path / "page.html") in done.stdout.replace("\n", "")
