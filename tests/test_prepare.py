"""The verb `prepare`: what it asks for, what it tells, and how it ends."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from depthany.config.build import build
from depthany.config.check import ConfigError, check
from depthany.config.launch import compose, config_dir, groups_of, help_text
from depthany.runs.cards import read_cards
from depthany.runs.preparing import next_commands, open_set, sets
from tests.data.sources.test_video import write_video
from tests.data.sources.writers.unlabelled import WRITERS, picture, put, tar_of
from tests.processes import Group, Zygote

REPOSITORY = Path(__file__).resolve().parents[1]
CARD = ["name", "title", "origin", "citation", "licence", "commercial", "kind", "expected", "splits", "defects"]
CARD += ["confidence", "reader", "used_in"]


@pytest.mark.parametrize("name", groups_of()["unlabelled"])
def test_every_choice_composes_and_is_documented(name: str) -> None:
    cfg = compose("prepare", [f"unlabelled={name}", "root=x"])
    check(cfg)
    assert cfg.unlabelled.root == "x"
    lines = help_text("prepare", "", [f"unlabelled={name}"]).split("Options")[1].splitlines()
    options = [line for line in lines if line.startswith("  ") and "=" in line and "hydra" not in line]
    assert len(options) > 10 and all(len(line.split(maxsplit=1)) == 2 for line in options)


def test_every_set_of_the_papers_has_a_card() -> None:
    found = {name: card for name, card, _ in sets()}
    assert found.keys() == WRITERS.keys()
    for name, card in found.items():
        assert list(card) == CARD and card["name"] == name and card["kind"] == "unlabelled"
        config = OmegaConf.load(config_dir() / "unlabelled" / f"{name}.yaml")
        assert (card["reader"], card["name"]) == (config._target_, config.name)
        assert card["expected"]["papers"] > 10**6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "say what to prepare: dataset=NAME or unlabelled=SET, and root=FOLDER"),
        (["dataset=irs", "unlabelled=sa1b", "root=x"], "say one of them: dataset=NAME or unlabelled=SET"),
        (["dataset=irs", "root=x", "pictures=small"], "pictures must be one of keep, fast"),
        (["unlabelled=sa1b"], "say where it lies: root=FOLDER"),
        (["unlabelled=place365", "root=x"], "did you mean places365"),
        (["unlabelled=sa1b", "root=x", "worker=2"], "no option worker; did you mean workers"),
        (["unlabelled=sa1b", "root=x", "min_side=a"], "min_side must be a whole number"),
        (["unlabelled=sa1b", "root=x", "unlabelled.pattern=[a]"], "did you mean unlabelled.patterns"),
    ],
)
def test_bad_options_are_refused_in_words(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as caught:
        check(compose("prepare", options))
    assert "\n" not in str(caught.value)


def say(*options: object) -> list[str]:
    return ["depthany.prepare", *map(str, options)]


def test_a_run_ends_with_what_is_there_and_what_comes_next(zygote: Zygote, tmp_path: Path) -> None:
    put(tmp_path / "raw", {f"{i}.jpg": picture(i, size=(80, 70)) for i in range(5)} | {"x.jpg": b"x"})
    said = zygote.run(say("unlabelled=folder", "root=raw", "unlabelled.name=mine", "workers=1"), cwd=tmp_path)
    for words in ("images in use │ 5", "undecodable 1", "images/s", "runs/_shards/mine/dropped.csv"):
        assert words in said, said
    assert "next:    python -m depthany.pseudo_label teacher=last shards=runs/_shards/mine" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["unlabelled=places365", "root=nowhere"], "root=nowhere is no folder: name the one that holds data_large"),
        (["unlabelled=places365", "root=empty"], "it holds no image, tar, LMDB or video; unlabelled=folder takes any"),
        (["unlabelled=places365", "root=raw"], "there are sa_000000.tar; they look like unlabelled=sa1b"),
        (["unlabelled=folder", "root=raw", "quality=101"], "quality=101 must be between 1 and 100"),
        (["unlabelled=folder", "root=raw", "out=raw/sa_000000.tar/x"], "cannot be written (Not a directory)"),
        (["unlabelled=webdataset", "root=raw", "max_side=512"], "unlabelled=folder packs anew"),
        (["unlabelled=folder", "root=raw", "unlabelled.name=a/b"], "unlabelled.name=a/b cannot name files"),
        (["unlabelled=folder", "root=raw", "pictures=fast"], "pictures=fast is for labelled sets: max_side makes"),
        (["dataset=irs", "root=nowhere"], "root=nowhere is no folder; set `root` to the one that holds"),
        (["dataset=irs", "root=raw"], "source irs: no samples in root=raw, wanted"),
        (["dataset=irs", "root=raw", "max_side=512"], "max_side=512 is for unlabelled sets: the samples of a labelled"),
        (["dataset=irs", "root=raw", "dataset.name=a/b"], "dataset.name=a/b cannot name files"),
        (["dataset=shards", "root=raw"], "dataset=shards is not packed: it is no set of original files"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: list[str], message: str, zygote: Zygote, tmp_path: Path) -> None:
    put(tmp_path / "raw", {"sa_000000.tar": tar_of({"sa_1.jpg": picture(1, size=(80, 70))})})
    (tmp_path / "empty").mkdir()
    said = zygote.run(say(*options, "workers=1"), cwd=tmp_path, code=2)
    assert message in said and said.count("\n") == 1 and said.startswith("depthany: "), said


def test_a_set_of_which_nothing_can_be_used_is_no_success(zygote: Zygote, tmp_path: Path) -> None:
    put(tmp_path / "raw", {f"{i}.jpg": b"x" for i in range(3)})
    said = zygote.run(say("unlabelled=folder", "root=raw", "unlabelled.name=mine", "workers=1"), cwd=tmp_path, code=2)
    assert "undecodable 3" in said
    assert said.endswith("depthany: nothing of mine can be used: runs/_shards/mine/dropped.csv says why of each file\n")


def test_the_list_of_sets(zygote: Zygote, tmp_path: Path) -> None:
    said = zygote.run(say("--list"), cwd=tmp_path)
    for name, card, config in sets():
        assert all(words in said for words in (name, card["title"], card["licence"], config["example"]))
    table = [line.split("  ") for line in said.partition("unlabelled sets")[0].splitlines()]
    rows = {line[0].strip(): " ".join(line) for line in table}
    for name, card in read_cards().items():
        if "quantity" in card:
            words = rows[name].split()
            assert {card["kind"], card["commercial"], card["licence"].split()[0]} <= set(words), (name, words)
            assert card["factor"] is None or f"{card['factor']:g}" in words
            assert not (card["expected"] or {}).get("all") or f"{card['expected']['all']:,}" in words
    assert "11,185,362" in said and "webdataset" in said


@pytest.mark.parametrize(("name", "mixture"), [("irs", "v2_synthetic"), ("hrwsi", "v1_labelled"), ("sintel", None)])
def test_a_packed_set_is_trained_on_by_the_mixture_that_has_it(name: str, mixture: str | None, tmp_path: Path) -> None:
    cfg = compose("prepare", [f"dataset={name}", f"root={tmp_path}"])
    audit, *train = next_commands(open_set(cfg, build(cfg.dataset)))
    check(compose("audit", audit.split()[3:]))
    assert len(train) == (mixture is not None)
    for command in train:
        trained = compose("train", command.split()[3:])
        check(trained)
        assert trained.data.name == mixture and trained.data.sources[name].read == "shards"
        assert Path(trained.data.sources[name].shards) == Path(cfg.paths.shards) / name


NO_OVERRIDE = """
import ctypes  # root may write anywhere: give that right away (capset(2), CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH)
head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
libc = ctypes.CDLL(None)
libc.capget(head, sets)
sets[0] &= ~6
sets[1] &= ~6
libc.capset(head, sets)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="capabilities are Linux's")
def test_a_read_only_output(zygote: Zygote, tmp_path: Path) -> None:
    put(tmp_path / "raw", {"a.jpg": picture(1, size=(80, 70))})
    (tmp_path / "closed").mkdir(mode=0o555)
    for out in ("closed", "closed/new"):
        command = say("unlabelled=folder", "root=raw", f"out={out}", "workers=1")
        said = zygote.run(command, cwd=tmp_path, code=2, before=NO_OVERRIDE)
        assert said == f"depthany: out={out} cannot be written (Permission denied): name another folder\n"
    command = say("unlabelled=folder", "root=../raw", "out=../out", "workers=1")
    said = zygote.run(command, cwd=tmp_path / "closed", code=2, before=NO_OVERRIDE)
    assert said == "depthany: paths.runs=runs cannot be written (Permission denied): name another folder\n"
    (tmp_path / "raw" / "secret").mkdir(mode=0o000)
    said = zygote.run(say("unlabelled=folder", "root=raw", "workers=1"), cwd=tmp_path, before=NO_OVERRIDE)
    assert "not used: secret: unreadable: Permission denied" in said


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures: a second of work, and more bytes than the small disk has."""
    root = tmp_path_factory.mktemp("photos")
    pictures = [picture(i, size=(300, 300), format="PNG") for i in range(10)]
    put(root, {f"{i:03d}.png": pictures[i % 10] + bytes([i]) for i in range(120)})
    return root


def begun(group: Group, out: Path) -> Group:
    """Waits for the first shard."""
    while not list(out.glob("*.json")):
        assert group.poll() == [None], group.output()
        time.sleep(0.01)
    return group


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers", "code"), [(signal.SIGTERM, 2, 75), (signal.SIGINT, 1, 130)])
def test_a_signal_stops_it_and_the_same_command_goes_on(
    number: int, workers: int, code: int, photos: Path, zygote: Zygote, tmp_path: Path
) -> None:
    command = say("unlabelled=folder", f"root={photos}", "out=out", "samples_per_shard=4", f"workers={workers}")
    group = begun(zygote.start(command, cwd=tmp_path), tmp_path / "out")
    group.kill(number)  # to the workers too, as schedulers and terminals do
    assert group.wait(60) == [code], group.output()
    assert group.output().splitlines()[-1].endswith("the same command goes on")
    assert "images in use │ 120" in zygote.run([*command[:-1], "workers=1"], cwd=tmp_path)
    assert not list((tmp_path / "out").glob(".*.part"))


def workers_of(group: Group) -> list[int]:
    """Processes of the group that the main one has not started itself but through its fork server."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, (_, parent, leader) = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()[:3]
            if int(leader) == group.pids[0] and int(parent) != group.pids[0] and pid != group.pids[0]:
                found.append(pid)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["main", "worker"])
def test_no_process_is_left_and_none_waits(victim: str, photos: Path, zygote: Zygote, tmp_path: Path) -> None:
    """The main process is killed, or a worker for want of memory: the others end."""
    command = say("unlabelled=folder", f"root={photos}", "out=out", "samples_per_shard=4", "workers=2")
    group = begun(zygote.start(command, cwd=tmp_path), tmp_path / "out")
    os.kill(group.pids[0] if victim == "main" else workers_of(group)[0], signal.SIGKILL)
    assert group.wait(30) == [-9 if victim == "main" else 2]
    assert victim == "main" or "want of memory: say workers=N" in group.output()
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group.pids[0], 0)
            time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare(1)")
@pytest.mark.parametrize("kind", ["unlabelled", "labelled"])
def test_a_full_disk(kind: str, photos: Path, tmp_path: Path) -> None:
    """One line and exit code 73; what is packed stays and is used when there is room."""
    (tmp_path / "disk").mkdir()
    chosen = f"unlabelled=folder root={photos}"
    if kind == "labelled":
        (tmp_path / "raw/depth").mkdir(parents=True)
        (tmp_path / "raw/images").symlink_to(photos)
        for photo in photos.iterdir():
            np.save(tmp_path / "raw/depth" / f"{photo.stem}.npy", np.ones((100, 100), np.float32))
        chosen = f"dataset=folder_pair root={tmp_path}/raw dataset.name=folder"
    python = f"{sys.executable} -m depthany.prepare {chosen} out={tmp_path}/disk"
    script = f"""
mount -t tmpfs -o size=6m none {tmp_path}/disk || exit 99
{python} samples_per_shard=10 workers=1; echo "code $?"; ls -A {tmp_path}/disk
mount -o remount,size=200m {tmp_path}/disk
{python} samples_per_shard=10 workers=1; echo "code $?"
"""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no disk of its own may be mounted here: {done.stderr.strip()}")
    first, second = done.stdout.split("code 73\n")
    assert done.stderr.count("\n") == 1 and "the disk is full; what is packed stays" in done.stderr, done.stderr
    assert ".part" not in second.partition("code")[0] and "folder-000000.json" in second
    assert "images in use │ 120" in second and second.endswith("code 0\n")
    assert "images in use" not in first


def test_frames_of_videos(zygote: Zygote, tmp_path: Path) -> None:
    """BDD100K: clips beside the stills, two frames a second."""
    pytest.importorskip("av", reason="needs depthany[video]")
    for number in range(3):
        path = tmp_path / "raw/videos/train" / f"0000f77c-0000000{number}.mov"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, [Fraction(i + number, 10) - Fraction(number, 10) for i in range(24)])
    put(tmp_path / "raw", {"images/100k/train/0000f77c-6257be58.jpg": picture(1, size=(80, 70))})
    put(tmp_path / "raw", {"videos/val/0000f77c-00000009.mov": b"no video"})
    command = say("unlabelled=bdd100k", "root=raw", "workers=1", "min_side=48", "samples_per_shard=4")
    said = zygote.run(command, cwd=tmp_path)
    assert "not used: videos/val/0000f77c-00000009.mov: undecodable" in said
    assert "images in use │ 6 " in said and "duplicate 10" in said, said  # 3 clips of the same 5 frames
