"""The command line in the user's words: what is refused and how, who beats whom, and the names of run folders."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import pytest

from depthany.config import launch as launching
from depthany.config.check import ConfigError, check, plain
from depthany.config.launch import compose, config_dir, help_text, run_name
from depthany.config.schema import arguments_of, mismatch

REPOSITORY = Path(__file__).resolve().parents[2]


def refusal(*overrides: str, verb: str = "train") -> str:
    """What the user is told."""
    with pytest.raises(ConfigError) as refused:
        check(compose(verb, list(overrides)))
    return str(refused.value)


def accepted(*overrides: str, verb: str = "train") -> dict[str, Any]:
    cfg = compose(verb, list(overrides))
    check(cfg)
    return plain(cfg)


# --- refusals ---------------------------------------------------------------------------------------------------------


# What composition finds, and what ends the check at once: one at a time.
ALONE = [
    ("loss.gradient.wieght=0", ["loss.gradient.wieght", "loss.gradient.weight"]),
    ("losss.gradient.weight=0", ["losss.gradient.weight", "loss.gradient.weight"]),
    ("optim.batchsize=4", ["optim.batchsize", "optim.batch_size"]),
    ("modle=tiny", ["modle", "model"]),
    ("sed=1", ["sed", "seed"]),
    ("model=tinny", ["model=tinny", "tiny"]),
    ("data=embeded", ["data=embeded", "embedded"]),
    ("recipe=v3", ["v3", "v1", "v2"]),
    ("experiment=nothing_like_it", ["experiment=nothing_like_it", "real_sample"]),
    ("model=null", ["model=null", "tiny"]),
    ("loss=null", ["loss=null", "teacher_v2"]),
    ("~model", ["${model}"]),
    ("~model._target_", ["model", "_target_"]),
    ("model.input_size=${nowhere}", ["model.input_size", "nowhere"]),
    ("seed=1,2", ["seed", "-m"]),
    ("seed=[", ["seed=["]),
    ("seed", ["seed"]),
]
# What the check finds: told all at once, each on a line of its own.
TOGETHER = [
    # misspelt
    ("+loss.gradient.wieght=0", ["loss.gradient.wieght", "did you mean weight"]),
    ("+a=1", ["a is no option"]),
    ("+sed=1", ["sed is no option", "seed"]),
    ("+loss.gradiant={weight:0}", ["loss.gradiant", "did you mean loss.gradient"]),
    ("+callbacks.emma={decay:0.9}", ["callbacks.emma", "callbacks.ema"]),
    ("+augment.labeled={size:8}", ["augment.labeled", "augment.labelled"]),
    ("+data.sources.mine={name:x}", ["data.sources.mine", "_target_"]),
    # unknown choices
    ("labels.mode=inline", ["labels.mode", "offline, online", "inline"]),
    ("resume=yes", ["resume", "auto, never"]),
    ("optim.schedule=step", ["optim.schedule", "linear", "cosine", "step"]),
    # wrong types
    ("model.input_size=large", ["model.input_size", "whole number", "large"]),
    ("model.input_size=56.5", ["model.input_size", "whole number", "56.5"]),
    ("model.pretrained=3", ["model.pretrained", "3"]),
    ("model.taps=3", ["model.taps", "a list"]),
    ("model.taps=[0,x]", ["model.taps", "each a whole number"]),
    ("model.encoder_arguments=3", ["model.encoder_arguments", "a mapping"]),
    ("optim.head_lr=fast", ["optim.head_lr", "a number", "fast"]),
    ("optim.head_lr=true", ["optim.head_lr", "a number", "True"]),
    ("optim.head_lr=null", ["optim.head_lr", "a number", "None"]),
    ("data.max_depth.val_a=far", ["data.max_depth", "far"]),
    ("seed=x", ["seed", "whole number"]),
    ("seed=1.5", ["seed", "whole number"]),
    ("paths.real=3", ["paths.real", "text"]),
    ("trainer.max_steps=many", ["trainer.max_steps", "whole number"]),
    ("callbacks.checkpoint.every_steps=often", ["callbacks.checkpoint.every_steps", "whole number"]),
    # left out
    ("~optim.head_lr", ["optim.head_lr is missing"]),
    ("~loss.ssi.drop", ["loss.ssi.drop is missing"]),
    ("loss.gradient=null", ["loss.gradient builds nothing"]),
    # what would build something else
    ("model._target_=os.system", ["model:", "os.system is not allowed"]),
    ("trainer._target_=lightning.pytorch.trainer.trainer.Trainer", ["trainer:", "not allowed"]),
    ("loss.ssi._target_=torch.hub.load", ["loss.ssi:", "torch.hub.load is not allowed"]),
    ("+model.encoder_arguments._target_=os.system", ["model.encoder_arguments:", "os.system is not allowed"]),
    ("+model.encoder_arguments.deep=[{_target_:os.system}]", ["model.encoder_arguments.deep[0]:", "os.system"]),
    ("+paths.here={_target_:os.system}", ["paths.here:", "os.system is not allowed"]),
    ("+_target_=os.system", ["_target_"]),
    ("+model._args_=[1]", ["model._args_ is not allowed"]),
    ("+model._partial_=true", ["model._partial_ is not allowed"]),
    ("+loss.ssi._convert_=none", ["loss.ssi._convert_ is not allowed"]),
    ("+loss._recursive_=false", ["loss._recursive_"]),
]


@pytest.mark.parametrize(("override", "told"), ALONE)
def test_what_cannot_be_composed_is_refused_by_name(override: str, told: list[str]) -> None:
    message = refusal("stage=teacher", override)
    assert len(message.splitlines()) == 1 or "input_size" in message
    for words in told:
        assert words in message
    assert "HYDRA_FULL_ERROR" not in message


def batches(cases: list[tuple[str, list[str]]]) -> list[list[tuple[str, list[str]]]]:
    """Cases that do not stand in each other's way: one word on a part of the config in each batch."""
    made: list[dict[str, tuple[str, list[str]]]] = []
    for override, told in cases:
        key = override.lstrip("+~").partition("=")[0]
        part = key.rpartition(".")[0] if "_target_" in override or "null" in override else key
        free = [batch for batch in made if not any(k.startswith(part) or part.startswith(k) for k in batch)]
        if not free:
            made.append({})
        (free or made[-1:])[0][part] = (override, told)
    return [list(batch.values()) for batch in made]


@pytest.mark.parametrize("cases", batches(TOGETHER), ids=lambda cases: f"{len(cases)} problems")
def test_what_cannot_be_used_is_refused_by_name_all_at_once(cases: list[tuple[str, list[str]]]) -> None:
    lines = refusal("stage=teacher", *(override for override, _ in cases)).splitlines()
    for override, told in cases:
        assert any(all(words in line for words in told) for line in lines), (override, lines)


def test_the_stage_is_asked_for() -> None:
    assert "stage=teacher or stage=student" in refusal()
    assert "student" in refusal("stage=studnt")


def test_what_fits_is_accepted() -> None:
    accepted(
        "stage=teacher",
        "optim.head_lr=1",
        "model.pretrained=weights.pth",
        "data.limit=null",
        "data.max_depth.val_a=null",
        "data.sources.scenes_a=null",
        "callbacks.ema=null",
        "logger=wandb",
        "trainer.devices=[0,1]",
        "trainer.precision=bf16-mixed",
        "+model.encoder_arguments.drop_path_rate=0.1",
        "loss.gradient.weight=0",
        "model.taps=[]",
    )
    accepted("stage=teacher", "optim.head_lr=1e-3", "model.pretrained=true", "~callbacks.ema", "trainer.devices=auto")


@pytest.mark.parametrize("verb", ["evaluate", "pseudo_label"])
def test_the_other_verbs_check_too(verb: str) -> None:
    accepted(verb=verb)
    message = refusal("device=gpu", "data.limit=x", "+devic=cpu", verb=verb)
    for words in ("auto, cpu, cuda, mps", "data.limit", "did you mean device"):
        assert words in message
    accepted("checkpoint=[a,b]", verb="evaluate")
    assert "checkpoint" in refusal("checkpoint=3", verb="evaluate")


@pytest.mark.parametrize(
    ("annotation", "fits", "does_not"),
    [
        ("int", [0, -3], [True, 1.0, "1", None]),
        ("float", [0, 0.5], [True, "x", None]),
        ("bool", [True, False], [0, "true", None]),
        ("str", ["", "x"], [0, None, True]),
        ("int | None", [1, None], ["x", 0.5]),
        ("Optional[int]", [1, None], ["x"]),
        ("Union[int, str]", [1, "x"], [None, 0.5]),
        ("Literal['a', 'b']", ["a"], ["c", None]),
        ("Literal['a'] | None", ["a", None], ["c"]),
        ("Sequence[int]", [[], [1, 2]], [1, "12", ["1"], [[1]], None]),
        ("Mapping[str, float | None]", [{}, {"a": 1, "b": None}], [[], {"a": "x"}]),
        ("Mapping[str, Any]", [{"a": object()}], [[]]),
        ("Any", [1, None, "x"], []),
        ("Something", [1, None, "x"], []),
    ],
)
def test_types(annotation: str, fits: list[Any], does_not: list[Any]) -> None:
    for value in fits:
        assert mismatch(annotation, value) is None, value
    for value in does_not:
        assert mismatch(annotation, value), value


def test_the_schema_is_the_constructor() -> None:
    """What is read from the source is what Python would say."""
    import inspect

    from depthany.data.augment import Augment
    from depthany.data.labels import LabelPlan

    for built in (Augment, LabelPlan):
        read = arguments_of(f"{built.__module__}.{built.__qualname__}")
        parameters = inspect.signature(built).parameters
        assert list(read) == list(parameters)
        for name, argument in read.items():
            assert argument.required == (parameters[name].default is inspect.Parameter.empty)
            assert argument.doc


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("os.system", "not allowed"),
        ("torch.load", "not allowed"),
        ("builtins.eval", "not allowed"),
        ("depthany", "not allowed"),
        ("depthanyx.model.Model", "not allowed"),
        ("depthany./tmp/evil.Model", "not allowed"),
        ("depthany..os.system", "not allowed"),
        ("lightning.pytorch.trainer.trainer.Trainer", "not allowed"),
        ("depthany.data.sources.packed.os.system", "no module depthany.data.sources.packed.os"),
        ("depthany.data.shards.os", "defines no os"),
        ("depthany.data.shards.wds", "defines no wds"),
        ("depthany.models.depth_model.DeptModel", "defines no DeptModel"),
    ],
)
def test_only_what_we_define_is_built(target: str, told: str) -> None:
    """An imported module is no way to what it imports."""
    with pytest.raises(LookupError, match=re.escape(told)):
        arguments_of(target)


# --- who beats whom ---------------------------------------------------------------------------------------------------


@pytest.fixture
def own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the config folder that a test may add to."""
    folder = tmp_path / "configs"
    shutil.copytree(config_dir(), folder)
    monkeypatch.setattr(launching, "config_dir", lambda: folder)
    return folder


def test_the_command_line_beats_an_experiment_which_beats_the_stage(own_configs: Path) -> None:
    (own_configs / "experiment" / "claim.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /augment: strong\n  - override /loss: teacher_v1\n"
        "optim: {teacher_epochs: 77}\nmix: {epochs: 5}\n"
    )
    stage = accepted("stage=teacher")
    assert stage["augment"]["unlabelled"]["jitter"] == 0 and stage["loss"]["gradient"]["weight"] == 2
    claim = accepted("stage=teacher", "experiment=claim")
    assert claim["augment"]["unlabelled"]["jitter"] == 0.8 and claim["loss"]["gradient"]["weight"] == 0
    assert claim["optim"]["teacher_epochs"] == 77 and claim["mix"]["epochs"] == 5
    line = accepted(
        "augment=flip", "loss=teacher_v2", "mix.epochs=6", "optim.teacher_epochs=1", "experiment=claim", "stage=teacher"
    )
    assert line["augment"]["unlabelled"]["jitter"] == 0 and line["loss"]["gradient"]["weight"] == 2
    assert line["optim"]["teacher_epochs"] == 1 and line["mix"]["epochs"] == 6


def test_debug_beats_an_experiment(own_configs: Path) -> None:
    (own_configs / "experiment" / "claim.yaml").write_text("# @package _global_\ntrainer: {max_steps: 1000}\n")
    assert accepted("stage=teacher", "experiment=claim", "debug=smoke")["trainer"]["max_steps"] == 2
    assert (
        accepted("stage=teacher", "experiment=claim", "debug=smoke", "trainer.max_steps=3")["trainer"]["max_steps"] == 3
    )


def test_a_local_file_beats_the_defaults_and_not_the_line(own_configs: Path) -> None:
    (own_configs / "local").mkdir()
    (own_configs / "local" / "default.yaml").write_text("# @package _global_\npaths: {runs: /elsewhere}\n")
    assert accepted("stage=teacher")["paths"]["runs"] == "/elsewhere"
    assert accepted("stage=teacher", "paths.runs=here")["paths"]["shards"] == "here/_shards"


def test_a_misspelt_name_inside_a_file_is_refused(own_configs: Path) -> None:
    """Plain YAML takes any name: this is what the check is for."""
    (own_configs / "experiment" / "claim.yaml").write_text(
        "# @package _global_\n"
        "loss: {gradiant: {weight: 0}, gradient: {wieght: 0}}\n"
        "optm: {head_lr: 1}\n"
        "optim: {head_lr: fast}\n"
        "trainer: {max_step: 2}\n"
        "data: {unlabeled: {}, sources: {mine: {name: x}}}\n"
    )
    lines = refusal("stage=teacher", "experiment=claim").splitlines()
    told = [("loss.gradiant", "loss.gradient"), ("loss.gradient.wieght", "weight"), ("optm", "optim")]
    told += [("optim.head_lr", "fast"), ("trainer.max_step", "max_steps"), ("data.unlabeled", "unlabelled")]
    told += [("data.sources.mine", "_target_")]
    assert len(lines) == len(told)
    for option, words in told:
        assert any(line.startswith(option) and words in line for line in lines)


# --- help -------------------------------------------------------------------------------------------------------------


def leaves(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            if key != "_target_":
                yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path


@pytest.mark.parametrize(
    ("verb", "overrides"),
    [
        ("train", []),
        ("train", ["stage=student", "recipe=v1", "model=vitl", "logger=wandb"]),
        ("evaluate", []),
        ("pseudo_label", []),
    ],
)
def test_help_lists_every_option(verb: str, overrides: list[str]) -> None:
    text = help_text(verb, "what it is about", overrides)
    composed = overrides if overrides or verb != "train" else ["stage=teacher"]
    shown = re.findall(r"^  ([\w.]+)=", text, re.MULTILINE)
    assert sorted(shown) == sorted(leaves(plain(compose(verb, composed))))
    assert text.startswith("what it is about")


def test_help_explains_and_names_the_choices() -> None:
    text = help_text("train", "about", ["stage=student"])
    assert re.search(r"^  model +tiny, vitb, vitg, vitl, vitl_dinov3, vits$", text, re.MULTILINE)
    assert re.search(r"^  stage +student, teacher$", text, re.MULTILINE)
    assert re.search(r"^  experiment +.*real_sample", text, re.MULTILINE)
    assert re.search(r"^  model\.input_size=56 +\S", text, re.MULTILINE)
    undocumented = [line for line in text.splitlines() if re.match(r"  (?!trainer|logger)[\w.]+=\S+$", line)]
    assert not undocumented


# --- run names --------------------------------------------------------------------------------------------------------

CHOICES = [
    "stage=student",
    "recipe=v1",
    "loss.gradient.weight=0",
    "optim.head_lr=1e-4",
    "debug=smoke",
    "data=real_sample",
]


def test_the_same_choices_have_the_same_name_in_any_order() -> None:
    names = {run_name(Random(i).sample(CHOICES, len(CHOICES)), 0) for i in range(30)}
    assert len(names) == 1
    assert run_name([*CHOICES, CHOICES[2]], 0) in names  # said twice


def test_the_last_word_on_an_option_counts() -> None:
    said = run_name(["stage=teacher", "optim.head_lr=1", "optim.head_lr=2"], 0)
    assert said == run_name(["stage=teacher", "optim.head_lr=2"], 0)
    assert said != run_name(["stage=teacher", "optim.head_lr=2", "optim.head_lr=1"], 0)


@pytest.mark.parametrize(
    "other",
    [
        "paths.runs=/elsewhere",
        "paths.real=x",
        "trainer=gpu",
        "trainer.devices=8",
        "trainer.accelerator=cpu",
        "trainer.strategy=ddp",
        "data.num_workers=7",
        "resume=never",
        "logger=wandb",
        "+logger.wandb.name=x",
        "hydra.verbose=true",
    ],
)
def test_places_and_devices_do_not_name_a_run(other: str) -> None:
    assert run_name([*CHOICES, other], 0) == run_name(CHOICES, 0)


def test_choices_and_seeds_name_a_run() -> None:
    one_less = [[c for c in CHOICES if c != left_out] for left_out in CHOICES]
    names = {run_name(choices, seed) for choices in [CHOICES, *one_less] for seed in (0, 1)}
    assert len(names) == 2 * (len(CHOICES) + 1)
    assert run_name(["stage=teacher", "seed=3"], 3) == "teacher-seed3"
    assert run_name(["stage=teacher", "loss.gradient.weight=0"], 0) == "teacher-loss.gradient.weight-0-seed0"


@pytest.mark.parametrize(
    "override",
    [
        "task.teacher_ckpt=/a/b/../c d/model.safetensors",
        "task.teacher_ckpt=../../../etc",
        "+model.encoder_arguments={a:1,b:[2,3]}",
        "data.name='ein Bäumchen 🌳'",
        "optim.betas=[0.9,0.95]",
        "~callbacks.ema",
        "x=" + "y" * 500,
        *(["a=\n\t\0;$(rm)`|<>&*?\"'\\"]),
    ],
    ids=lambda text: text[:20].encode("ascii", "replace").decode(),
)
def test_names_are_safe_folders(override: str, tmp_path: Path) -> None:
    name = run_name(["stage=teacher", override], 0)
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", name) and name.startswith("teacher-") and name.endswith("-seed0")
    assert len(name) < 140
    (tmp_path / name).mkdir()


def test_long_names_stay_distinct() -> None:
    long = [f"loss.a_rather_long_name_of_a_term_{i}.weight=0.3333333333" for i in range(9)]
    names = {run_name([*long, f"x={i}"], 0) for i in range(50)}
    assert len(names) == 50 and all(len(name) < 140 for name in names)


# --- real processes ---------------------------------------------------------------------------------------------------


def call(*arguments: str, cwd: Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_RANK", "HYDRA"))}
    environment["PYTHONPATH"] = str(REPOSITORY)
    program = ["-c", code] if code else ["-m"]
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["depthany.train", "stage=teacher", "+a=1", "optim.head_lr=x", "model._target_=os.system"], 3),
        (["depthany.train", "-m", "stage=teacher", "seed=0,x"], 1),
        pytest.param(["depthany.train", "stage=teacher", "loss.gradient.wieght=0"], 1, marks=pytest.mark.slow),
        pytest.param(["depthany.evaluate", "device=gpu"], 1, marks=pytest.mark.slow),
        pytest.param(["depthany.pseudo_label", "labels=nowhere"], 1, marks=pytest.mark.slow),
    ],
)
def test_a_process_refuses_in_one_line_each(arguments: list[str], lines: int, tmp_path: Path) -> None:
    done = call(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == lines
    assert all(line.startswith("depthany: ") for line in done.stderr.splitlines())
    assert list(tmp_path.iterdir()) == []


LAUNCH = (
    "from depthany.config.launch import launch\nlaunch('{verb}', 'about', lambda cfg: print('ran', cfg.get('seed')))"
)


@pytest.mark.parametrize(
    ("verb", "arguments", "shown"),
    [
        ("train", ["-m", "stage=teacher", "seed=4,5"], "ran 5"),
        ("evaluate", ["checkpoint=[a,b]"], "ran None"),
        ("train", ["stage=teacher", "--cfg", "job", "--package", "loss"], "weight: 2.0"),
        pytest.param("train", ["--help"], "model.input_size=56", marks=pytest.mark.slow),
        pytest.param("train", ["-h", "stage=student"], "task.teacher_ckpt=last", marks=pytest.mark.slow),
        pytest.param("train", ["stage=teacher", "--info", "defaults"], "stage/teacher", marks=pytest.mark.slow),
        pytest.param("evaluate", ["--cfg", "job"], "checkpoint: last", marks=pytest.mark.slow),
        pytest.param("pseudo_label", [], "ran None", marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_end_well(verb: str, arguments: list[str], shown: str, tmp_path: Path) -> None:
    done = call(*arguments, cwd=tmp_path, code=LAUNCH.format(verb=verb))
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    folders = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_dir()}
    if "-m" in arguments:
        assert folders == {"runs", "runs/teacher-seed4", "runs/teacher-seed5"}
    else:
        assert folders <= {"runs"}  # only a training has a folder of its own


def test_refusing_and_helping_do_not_import_torch(tmp_path: Path) -> None:
    told = "import atexit, sys\natexit.register(lambda: print('torch' in sys.modules, 'cv2' in sys.modules))\n"
    code = told + "from depthany.train import main\nmain()"
    for arguments in (["stage=teacher", "+a=1"], ["--help"]):
        assert call(*arguments, cwd=tmp_path, code=code).stdout.splitlines()[-1] == "False False"
