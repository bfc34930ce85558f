"""The house: who may import whom, which framework enters where, and what is never written.

Every rule is a function from a tree to its violations, and is shown a tree that breaks it.
"""

import ast
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "geometry": {"types"},
    "optim": set(),
    "config": set(),
    "losses": {"types", "geometry"},
    "metrics": {"types", "geometry"},
    "models": {"types", "geometry"},
    "data": {"types", "geometry"},
    "tasks": {"types", "geometry", "losses", "metrics", "models", "optim"},
    "callbacks": {"types", "geometry", "metrics"},
    "inference": {"types", "geometry", "models"},
    "report": {"types", "geometry", "metrics", "inference"},
}
MAY_IMPORT["runs"] = set(MAY_IMPORT)
VERB = "a verb"  # any other module at the top: train.py, predict.py
MAY_IMPORT[VERB] = set(MAY_IMPORT)
MAY_IMPORT["__init__"] = {"runs"}  # load_model, when it is asked for

FRAMEWORKS = {
    "lightning": "lightning",
    "pytorch_lightning": "lightning",
    "lightning_fabric": "lightning",
    "lightning_utilities": "lightning",
    "hydra": "hydra",
    "omegaconf": "hydra",
    "webdataset": "webdataset",
    "timm": "timm",
}
DOORS = {
    "lightning": {"tasks", "callbacks", "data/module.py", "runs", VERB},
    "hydra": {"config", "runs", VERB},
    "webdataset": {"data"},
    "timm": {"models"},
}

# A path of somebody's machine, and the address of a package index; the patterns do not match themselves.
MACHINE_PATH = re.compile(r"(?<![\w.~/$})-])/(?:root|home|Users|work|tmp|opt|scratch)/|\b[A-Z]:\\Users\\|\bfile:/{3}")
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|(?:conda|repo)\.anaconda\.(?:org|com)|registry\.npmjs"
    r"|--(?:extra-)?index[-]url|PIP_(?:EXTRA_)?INDEX[_]URL"
)


class Import(NamedTuple):
    """One import of one file: its place, who imports, and the module's full name."""

    place: str
    room: str
    path: str  # inside depthany/
    module: str


def room_of(path: Path) -> str:
    """The room of a file, given by its path inside depthany/."""
    if len(path.parts) > 1:
        return path.parts[0]
    return path.stem if path.stem in MAY_IMPORT or path.stem == "__init__" else VERB


def sources(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    package = root / "depthany"
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package), ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every import, wherever it stands: in functions, under TYPE_CHECKING, and by name through importlib."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(level=level) if level:
                yield node.lineno, "." * level + (node.module or "")
            case ast.ImportFrom(module="depthany", names=names):
                yield from ((node.lineno, f"depthany.{name.name}") for name in names)
            case ast.ImportFrom(module=str(module)):
                yield node.lineno, module
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


def imports(root: Path) -> Iterator[Import]:
    for path, tree in sources(root):
        for line, module in imported_modules(tree):
            yield Import(f"depthany/{path}:{line}", room_of(path), path.as_posix(), module)


def identifiers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name in the code, and every text that is nothing but a name (as given to getattr)."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                yield node.lineno, name
            case ast.alias(name=name):
                yield from ((node.lineno, part) for part in name.split("."))


def definitions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that the code gives to something."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.alias(name=name, asname=asname):
                yield node.lineno, asname or name


def text_files(root: Path) -> Iterator[Path]:
    """What git tracks or would track; where there is no git (an sdist), everything but environments and leavings."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if (root / ".git").exists() and (listed := subprocess.run(git, capture_output=True, text=True)).returncode == 0:
        yield from (root / name for name in sorted(set(listed.stdout.split("\0"))) if name)
        return
    for folder, inner, names in os.walk(root):
        inner[:] = [
            name
            for name in inner
            if (not name.startswith(".") or name in (".ci", ".github"))
            and name not in ("__pycache__", "runs", "build", "dist")
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        ]
        yield from (Path(folder) / name for name in sorted(names))


def texts(root: Path) -> Iterator[tuple[str, str]]:
    for path in text_files(root):
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            yield path.relative_to(root).as_posix(), content.decode("utf-8", errors="replace")


# The rules


def doors_open_one_way(root: Path) -> Iterator[str]:
    for place, room, _, module in imports(root):
        if module.startswith("."):
            yield f"{place}: relative import; write depthany.…"
        elif module.startswith("depthany."):
            target = module.split(".")[1]
            if target not in MAY_IMPORT:
                yield f"{place}: {target} is no room"
            elif target != room and target not in MAY_IMPORT.get(room, set()):
                yield f"{place}: {room} may not import {target}"


def every_room_is_known(root: Path) -> Iterator[str]:
    rooms = {path.parts[0] for path, _ in sources(root) if len(path.parts) > 1}
    yield from (f"depthany/{room}: no such room in the house" for room in sorted(rooms - set(MAY_IMPORT)))


def frameworks_have_doors(root: Path) -> Iterator[str]:
    for place, room, path, module in imports(root):
        framework = FRAMEWORKS.get(module.split(".")[0])
        if framework and not {room, path} & DOORS[framework]:
            yield f"{place}: {module} may not be imported here, only in {', '.join(sorted(DOORS[framework]))}"


def nothing_is_called_utils(root: Path) -> Iterator[str]:
    banned = {"util", "utils"}
    for top in ("depthany", "tests", "scripts", "configs"):
        for path in sorted((root / top).rglob("*")):
            if path.stem.removeprefix("test_") in banned:
                yield f"{path.relative_to(root)}: name the noun"
    for path, tree in sources(root):
        yield from (f"depthany/{path}:{line}: name the noun" for line, name in definitions(tree) if name in banned)


def steps_are_not_estimated(root: Path) -> Iterator[str]:
    """It loads the data before the cursor is restored, Lightning issue 20550."""
    for path, tree in sources(root):
        for line, name in identifiers(tree):
            if name == "estimated_stepping_batches":
                yield f"depthany/{path}:{line}: {name} breaks the resume; count from max_steps"


def statistics_stay_inside_an_image(root: Path) -> Iterator[str]:
    """Batch statistics would mix the sources of a batch, labelled and unlabelled."""
    for path, tree in sources(root):
        for line, name in identifiers(tree):
            if re.fullmatch(r"\w*BatchNorm\w*", name):
                yield f"depthany/{path}:{line}: {name}"


def files_name_no_machine(root: Path) -> Iterator[str]:
    for path, text in texts(root):
        for number, line in enumerate(text.splitlines(), start=1):
            if found := MACHINE_PATH.search(line) or REGISTRY.search(line):
                yield f"{path}:{number}: {found[0]}"


Rule = Callable[[Path], Iterator[str]]
RULES: list[Rule] = [
    doors_open_one_way,
    every_room_is_known,
    frameworks_have_doors,
    nothing_is_called_utils,
    steps_are_not_estimated,
    statistics_stay_inside_an_image,
    files_name_no_machine,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_is_in_order(rule: Rule) -> None:
    violations = list(rule(REPOSITORY))
    assert not violations, "\n" + "\n".join(violations)


# Each breaks one rule at one place: rule, file, text.
BROKEN: list[tuple[Rule, str, str]] = [
    (doors_open_one_way, "depthany/geometry/a.py", "from depthany.losses.total import WeightedSum"),
    (doors_open_one_way, "depthany/types.py", "import depthany.geometry.masked"),
    (doors_open_one_way, "depthany/optim/a.py", "from depthany.types import Target"),
    (doors_open_one_way, "depthany/config/a.py", "from depthany import types"),
    (doors_open_one_way, "depthany/losses/a.py", "def f():\n    from depthany.models.dpt import DPTHead"),
    (doors_open_one_way, "depthany/metrics/a.py", "if TYPE_CHECKING:\n    from depthany.data.files import read_depth"),
    (doors_open_one_way, "depthany/models/a.py", "import importlib\nimportlib.import_module('depthany.data.files')"),
    (doors_open_one_way, "depthany/data/sources/a.py", "from depthany.models import dpt"),
    (doors_open_one_way, "depthany/tasks/a.py", "from depthany.data.module import DepthData"),
    (doors_open_one_way, "depthany/callbacks/a.py", "from depthany.tasks.base import DepthTask"),
    (doors_open_one_way, "depthany/inference/a.py", "from depthany.data.files import read_image"),
    (doors_open_one_way, "depthany/report/a.py", "from depthany.runs.find import open_model"),
    (doors_open_one_way, "depthany/data/a.py", "from . import files"),
    (doors_open_one_way, "depthany/runs/a.py", "from depthany.train import run"),
    (doors_open_one_way, "depthany/__init__.py", "from depthany.types import Target"),
    (every_room_is_known, "depthany/misc/a.py", ""),
    (frameworks_have_doors, "depthany/data/sources/a.py", "import lightning.pytorch as pl"),
    (frameworks_have_doors, "depthany/models/a.py", "def f():\n    from pytorch_lightning import LightningModule"),
    (frameworks_have_doors, "depthany/config/a.py", "from lightning.pytorch import Trainer"),
    (frameworks_have_doors, "depthany/tasks/a.py", "from hydra.utils import instantiate"),
    (frameworks_have_doors, "depthany/data/module.py", "from omegaconf import DictConfig"),
    (frameworks_have_doors, "depthany/runs/a.py", "import webdataset as wds"),
    (frameworks_have_doors, "depthany/train.py", "import timm"),
    (nothing_is_called_utils, "depthany/data/utils.py", ""),
    (nothing_is_called_utils, "tests/test_utils.py", ""),
    (nothing_is_called_utils, "depthany/data/a.py", "import numpy as utils"),
    (nothing_is_called_utils, "depthany/data/a.py", "class A:\n    def utils(self): ..."),
    (
        steps_are_not_estimated,
        "depthany/tasks/a.py",
        "def f(self):\n    return self.trainer.estimated_stepping_batches",
    ),
    (steps_are_not_estimated, "depthany/tasks/a.py", "getattr(trainer, 'estimated_stepping_batches')"),
    (statistics_stay_inside_an_image, "depthany/models/a.py", "norm = nn.BatchNorm2d(8)"),
    (statistics_stay_inside_an_image, "depthany/models/a.py", "from torch.nn import SyncBatchNorm as Norm"),
    (files_name_no_machine, "docs/a.md", "The data are in /" + "home/someone/data."),
    (files_name_no_machine, "configs/paths/a.yaml", "runs: /" + "root/runs"),
    (files_name_no_machine, "Makefile", "\tpip install --index" + "-url https://example.com/simple x"),
    (files_name_no_machine, "constraints.txt", "a @ https://files.python" + "hosted.org/a.whl"),
]


@pytest.mark.parametrize(("rule", "path", "text"), BROKEN, ids=lambda part: getattr(part, "__name__", None))
def test_a_broken_rule_is_found(rule: Rule, path: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    found = list(rule(tmp_path))
    assert len(found) == 1, found
    assert path.removesuffix("/a.py") in found[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("depthany/geometry/a.py", "from depthany.types import Quantity"),
        ("depthany/data/module.py", "import lightning.pytorch as pl\nfrom torch.utils.data import DataLoader"),
        ("depthany/predict.py", "from depthany import inference\nfrom depthany.data.files import read_image"),
        ("depthany/runs/a.py", "from depthany.tasks.base import fitted\nfrom omegaconf import DictConfig"),
        ("depthany/tasks/a.py", "norm = torch.nn.utils.clip_grad_norm_(p, 1.0)  # no BatchNorm here"),
        (
            "docs/a.md",
            "See https://github.com/some/atwork/issues, ../home/x and $HOME/opt/x; use runs/teacher-seed0.",
        ),
    ],
)
def test_what_is_allowed_passes(path: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    assert [problem for rule in RULES for problem in rule(tmp_path)] == []
