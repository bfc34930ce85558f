"""The wheel works away from the checkout: it brings its configs, shows its help and trains."""

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, python_path: Path | None = None) -> str:
    """What a command prints; fails the test with its output where it ends badly."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(python_path)} if python_path else {}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", *isolation)
    run(*pip, "--wheel-dir", str(folder), str(REPOSITORY), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(*pip, "--target", str(folder), str(wheel), cwd=folder)
    return folder


def test_the_wheel_holds_the_package_its_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    configs = {path.relative_to(REPOSITORY / "configs").as_posix() for path in REPOSITORY.glob("configs/**/*.yaml")}
    shipped = {name.removeprefix("depthany/configs/") for name in names if name.startswith("depthany/configs/")}
    assert "train.yaml" in shipped
    assert shipped == {name for name in configs if not name.startswith("local/")}
    assert all(name.startswith(("depthany/", "depthany-")) for name in names), names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = metadata.splitlines()
    assert "License-Expression: Apache-2.0" in lines
    assert f"Requires-Python: {project['requires-python']}" in lines
    assert not any("@" in line for line in lines if line.startswith("Requires-Dist")), "a dependency by address"


def test_help_and_configs_come_from_the_installed_package(site: Path, tmp_path: Path) -> None:
    groups = {path.parent.name for path in REPOSITORY.glob("configs/*/*.yaml")} - {"hydra", "local", "part"}
    assert {"stage", "model", "data", "loss"} <= groups
    of_others = {"prepare": {"unlabelled", "dataset"}, "audit": {"dataset"}, "sky": {"dataset"}}
    for verb, mine in {"train": groups.difference(*of_others.values()), **of_others}.items():
        shown = run(sys.executable, "-m", f"depthany.{verb}", "--help", cwd=tmp_path, python_path=site)
        listed = {line.split()[0] for line in shown.splitlines() if line.startswith("  ") and line.split()}
        assert mine <= listed, f"{verb} --help does not list {sorted(mine - listed)}"

    program = "from depthany.config.launch import config_dir; print(config_dir())"
    used = run(sys.executable, "-c", program, cwd=tmp_path, python_path=site)
    assert Path(used.strip()) == site.resolve() / "depthany" / "configs"


def test_the_installed_package_trains(site: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    command = ("-m", "depthany.train", "stage=teacher", "debug=smoke", f"paths.runs={runs}")
    run(sys.executable, *command, cwd=tmp_path, python_path=site)
    weights = list(runs.glob("*/model.safetensors"))
    assert len(weights) == 1, sorted(runs.rglob("*"))
    assert weights[0].stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}, "it writes outside paths.runs"
