"""From the command line to a checked config: composition, help, errors in words, run folder names."""

import errno
import hashlib
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from depthany.config.check import ConfigError, check, plain, suggest
from depthany.config.schema import arguments_of

# Choices that do not change what is learnt do not name a run.
UNNAMED: tuple[str, ...] = (
    "paths.",
    "hydra",
    "resume",
    "logger",
    "trainer=",
    "trainer.max_time",
    "trainer.log_every_n_steps",
)
UNNAMED += ("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "trainer.strategy")
UNNAMED += ("data.num_workers", "data.start_method", "callbacks=", "callbacks.throughput", "callbacks.ledger")
UNNAMED += ("images=", "world=", "probe_seconds=")  # of the preflight, which names the run that it is for


# Groups that --help lists before one is chosen.
OTHER_GROUPS = {"prepare": ("dataset", "unlabelled"), "audit": ("dataset",), "sky": ("dataset",)}
OTHER_GROUPS |= dict.fromkeys(("train", "preflight"), ("experiment", "debug", "stage", "logger"))


def config_dir() -> Path:
    """The folder of option groups: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def run_name(overrides: list[str], seed: int) -> str:
    """A folder name made of the choices on the command line and the seed, the same for the same choices.

    Only letters, digits and ._+- occur, so that the name can stand unquoted in another run's options.

    >>> run_name(["stage=student", "paths.runs=x", "loss.gradient.weight=0"], 3)
    'student-loss.gradient.weight-0-seed3'
    """
    said = dict(str(text).lstrip("+~").partition("=")[::2] for text in overrides)  # the last word on an option counts
    stage = said.pop("stage", "run")
    named = {key: value for key, value in said.items() if key != "seed" and not f"{key}=".startswith(UNNAMED)}
    parts = [v if key in ("experiment", "debug") else f"{key}-{v}" for key, v in sorted(named.items())]
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", "-".join([stage, *parts]))
    if len(name) > 120:
        name = name[:111] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name}-seed{seed}"


def _run_folder(overrides: list[str], seed: int | None) -> str:
    """The run folder's name under paths.runs; verbs without a seed have none."""
    return "." if seed is None else run_name(list(overrides), seed)


OmegaConf.register_new_resolver("run_name", _run_folder, replace=True)


def compose(verb: str, overrides: list[str]) -> DictConfig:
    """The composed config of a verb.

    Raises:
        ConfigError: an unknown group, choice or option, in words.
    """
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            return hydra.compose(verb, overrides)
        except (HydraException, ValueError) as error:
            raise ConfigError(_in_words(verb, overrides, error)) from error


def _leaves(node: Any, path: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path


def _in_words(verb: str, overrides: list[str], error: Exception) -> str:
    text = str(error)
    if isinstance(error, OverrideParseException):
        hint = "a value with = , ( ) or spaces needs quotes, for example 'key=\"a=b\"'"
        return f"cannot read the option {error.override}: {hint}"
    if empty := [o for o in overrides if o.partition("=")[0] in groups_of() and o.partition("=")[2] in ("null", "")]:
        group = empty[0].partition("=")[0]
        return f"{empty[0]} is not a choice{suggest('', groups_of()[group])}"
    if match := re.search(r"Ambiguous value for argument '([^'=]+)", text):
        return f"{match[1]} has several values: add -m for a run of each, or write a list as {match[1]}=[a,b]"
    if match := re.search(r"Could not override '([^']+)'", text):
        groups = [o for o in overrides if "." not in o.partition("=")[0] and "/" not in o.partition("=")[0]]
        known = groups_of()
        try:
            cfg = hydra.compose(verb, [o for o in groups if o.partition("=")[0] in known])
        except HydraException:  # a group that this verb has not
            cfg = hydra.compose(verb, [])
        words = {*known, *_leaves(OmegaConf.to_container(cfg, resolve=False))} - {match[1]}
        return f"there is no option {match[1]}{suggest(match[1], words)} (every option: --help)"
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        there = groups_of().get(match[1], [])
        return f"{match[1]}={match[2]} is not a choice{suggest(match[2], there)} (every choice: --help)"
    return "\n".join(line for line in text.splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line)


def groups_of() -> dict[str, list[str]]:
    """Every option group with its choices, as they lie in the config folder."""
    root = config_dir()
    groups: dict[str, list[str]] = {}
    for file in sorted(root.rglob("*.yaml")):
        group = file.parent.relative_to(root).as_posix()
        if group != "." and not group.startswith("hydra"):
            groups.setdefault(group, []).append(file.stem)
    return groups


def _every_combination(arguments: list[str]) -> Iterator[list[str]]:
    """The overrides of each job of a sweep.

    Raises:
        ConfigError: an argument that cannot be read.
    """
    try:
        parsed: list[Override] = OverridesParser.create().parse_overrides(arguments)
    except OverrideParseException as error:
        raise ConfigError(_in_words("", arguments, error)) from error
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line or ""]
        for o in parsed
    ]
    yield from map(list, product(*choices))


def help_text(verb: str, about: str, overrides: list[str]) -> str:
    """Groups, options, their values and what they mean, for the choices given."""
    if verb in ("train", "preflight") and not any(o.startswith("stage=") for o in overrides):
        overrides = [*overrides, "stage=teacher"]
    cfg = plain(compose(verb, overrides))
    lines = [about.strip(), "", "Choices (group=option):"]
    lines += [
        f"  {group:<12} {', '.join(options)}"
        for group, options in groups_of().items()
        if group in cfg or group in OTHER_GROUPS.get(verb, ())
    ]
    lines += ["", f"Options (as composed for: {' '.join(overrides) or 'no overrides'}):"]
    for path, value, doc in _options(cfg, ""):
        line = f"  {path}={_shown(value)}"
        lines.append(f"{line:<52} {doc}" if doc else line)
    lines += ["", "Also: -m a=1,2 runs a sweep; --cfg job --package GROUP prints a group; --info defaults names files."]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


TOP_DOCS = {
    "recipe.name": "which paper's losses, mix and perturbation the stage picks",
    "seed": "of weights, order and every perturbation",
    "resume": "auto: go on where the run of this name stopped; never: start again, the old folder is kept beside",
    "paths.runs": "where run folders go",
    "paths.shards": "where packed sets and pseudo-labels go",
    "paths.datasets": "where labelled datasets lie as their authors publish them, each in a folder of its own",
    "paths.real": "a folder with index.csv and photos, for data=real_sample",
    "paths.mine": "a folder with images/ and depth/, for data=folder_pair",
    "paths.photos": "a folder of photos, for the student of data=folder_pair",
    "teacher": "a run folder, weights of any layout (official, Hugging Face, ...), or last: the last finished teacher",
    "shards": "a folder or URL of image shards; null: the unlabelled sets of data",
    "labels_root": "folder of the labels of `shards`; null: beside the image shards",
    "devices": "processes on this machine; auto: one for each GPU, and one elsewhere",
    "redo": "replace labels that this teacher has made with other options, or another model's masks; else refused",
    "checkpoint": "a run folder, weights of any layout (official, Hugging Face, ...), a list, or last: the newest run",
    "input_size": "short side at the network's input in pixels; null: the size that the model was trained at",
    "sizes": "several of them: a table and a page of accuracy and sharpness against the input size; null: input_size",
    "baselines": "add the trivial predictors (constant, image row, mean map) as rows of the table",
    "device": "auto, cpu, cuda, mps",
    "limit": "images per set; null: all",
    "format": "info, json: what the checkpoint is, for people and programs; else what is written to out",
    "images": "images of the epoch for which the cost is told; null: those that the data have",
    "world": "devices for which the cost is told; null: as many as trainer.devices and trainer.num_nodes say",
    "root": "what is to be prepared or audited, as it was downloaded: a folder; for unlabelled=list a text file",
    "out": "where it goes, a file or folder; null: for prepare a folder of the set's name under paths.shards",
    "photo": "on which an export is compared before and after; null: a scene of the embedded data",
    "size": "short side in pixels of the network input for that and for processing=inside; null: the model's own",
    "processing": "of onnx. none: normalised images in; inside: pictures of any size in, maps of their size out",
    "samples_per_shard": "images in each tar",
    "min_side": "images with a shorter side are dropped, in pixels",
    "max_side": "images with a longer side are shrunk to it and stored as JPEG, in pixels; null: no byte is changed",
    "pictures": "of labelled sets; keep: JPEG, PNG, WebP keep their bytes; fast: what is not JPEG becomes bare pixels",
    "quality": "of the JPEGs that shrunk images and frames of videos become, 1 to 100",
    "checksums": "first read every file of the set and compare its sha256 with the one noted beside the data",
    "page": "where the page goes; null: _audit/<name>.html under paths.runs",
    "range_m": "[nearest, farthest] depth that the set can have, in metres; null: the card's",
    "fov_deg": "horizontal field of view in degrees, for the test of distance against depth; null: unknown",
    "workers": "processes; null: one for each core",
    "segmenter": "semantic segmentation model of transformers with a class sky: an id of the hub, or a folder",
    "batch_size": "images of one size that the network sees at once",
    "probe_seconds": "time for measuring this machine; a step that has begun is finished",
}


def _options(node: Any, path: str, doc: str = "") -> Iterator[tuple[str, Any, str]]:
    if not isinstance(node, Mapping) or not node:
        yield path, node, doc or TOP_DOCS.get(path, "")
        return
    docs: Mapping[str, Any] = {}
    if "_target_" in node:
        docs = arguments_of(str(node["_target_"]))
    for key, value in node.items():
        if key != "_target_":
            inner = (docs[key].doc if key in docs else "") if "_target_" in node else doc or TOP_DOCS.get(path, "")
            yield from _options(value, f"{path}.{key}" if path else str(key), inner)


def launch(verb: str, about: str, run: Callable[[DictConfig], None]) -> None:
    """Runs a verb on the command line's arguments: help and bad options first, then Hydra, then `run`.

    Exits with status 2 and one line for each problem when an option cannot be used, with 73 where the disk is full.
    """
    arguments = sys.argv[1:]
    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if not a.startswith("-")]
    try:
        if "--help" in flags or "-h" in flags:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
            print(help_text(verb, about, overrides))
            return
        if not set(flags) - {"-m", "--multirun"}:
            for combination in _every_combination(overrides) if flags else [overrides]:
                cfg = compose(verb, [o for o in combination if not o.startswith("hydra")])
                check(cfg)
            if verb in ("train", "prepare"):
                _check_output(Path(cfg.paths.runs))
    except ConfigError as error:
        _complain(error)
    except HydraException as error:
        _complain(ConfigError(_in_words(verb, overrides, error)))

    def checked(cfg: DictConfig) -> None:
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # no lines of code
        try:
            check(cfg)
            run(cfg)
        except ConfigError as error:
            _complain(error)
        except KeyboardInterrupt:
            print("depthany: stopped", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"depthany: disk full: {error}; make room and give the same command again", file=sys.stderr)
            sys.exit(73)

    checked.__module__ = run.__module__
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=verb)(checked)()


def _check_output(folder: Path) -> None:
    """Hydra makes the run folder before anything of ours runs, and fails with a traceback."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(f"paths.runs={folder} cannot be written ({error.strerror}): name another folder") from error


def _complain(error: Exception) -> NoReturn:
    print("\n".join(f"depthany: {line}" for line in str(error).splitlines()), file=sys.stderr)
    sys.exit(2)
