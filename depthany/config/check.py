"""The check that every verb runs first: each option is bound to the constructor that will get it."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from depthany.config.schema import arguments_of, mismatch

# What is only values: annotation by key, a trailing * for a whole group.
PLAIN = {
    "seed": "int",
    "resume": "Literal['auto', 'never']",
    "paths.*": "str",
    "recipe.*": "str",
    "device": "Literal['auto', 'cpu', 'cuda', 'mps']",
    "teacher": "str",
    "shards": "str | None",
    "labels_root": "str | None",
    "devices": "int | Literal['auto']",
    "redo": "bool",
    "checksums": "bool",
    "checkpoint": "str | list[str]",
    "input_size": "int | None",
    "sizes": "Sequence[int] | None",
    "baselines": "bool",
    "limit": "int | None",
    "format": "Literal['info', 'json', 'safetensors', 'official', 'hf', 'onnx', 'torchscript']",
    "photo": "str | None",
    "size": "int | None",
    "processing": "Literal['none', 'inside']",
    "images": "int | None",
    "world": "int | None",
    "probe_seconds": "float",
    "root": "str | None",
    "out": "str | None",
    "samples_per_shard": "int",
    "min_side": "int",
    "max_side": "int | None",
    "quality": "int",
    "workers": "int | None",
    "pictures": "Literal['keep', 'fast']",
    "page": "str | None",
    "range_m": "Sequence[float] | None",
    "fov_deg.*": "float | None",
    "segmenter": "str | None",
    "batch_size": "int",
}
GROUPS = (
    *("model", "optim", "data", "mix", "loss", "augment", "task", "labels", "trainer", "callbacks", "logger"),
    *("unlabelled", "dataset"),
)
NAMED = ("loss", "augment", "callbacks", "logger")  # mappings of named parts; the other groups are one part each
NAMED_IN_DATA = ("data.sources", "data.unlabelled", "data.validation")
MAY_LACK = ("callbacks", "logger", "unlabelled", "dataset", *NAMED_IN_DATA)  # null switches it off, or one of its parts
# Arguments that the verbs hand in themselves: not in a config file.
GIVEN = {"model", "loss", "plan", "mix", "augment", "labels", "teacher", "seed", "batch_size", "precision", "run_dir"}


class ConfigError(ValueError):
    """A config that cannot be run, told in the user's words: which option, what is wrong, the way out."""


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain containers with every interpolation resolved.

    Raises:
        ConfigError: an interpolation leads nowhere.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]  # a DictConfig gives a dict
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def check(cfg: DictConfig) -> None:
    """Refuses unknown options, wrong types, unknown choices and forbidden targets, all at once.

    Raises:
        ConfigError: one line for each problem.
    """
    tree = plain(cfg)
    if "resume" in tree and not tree.get("task"):
        raise ConfigError("say which stage to run: stage=teacher or stage=student")
    if "samples_per_shard" in tree and bool(tree.get("unlabelled")) == bool(tree.get("dataset")):
        one = "one of them" if tree.get("dataset") else "what to prepare"
        raise ConfigError(f"say {one}: dataset=NAME or unlabelled=SET, and root=FOLDER (--list shows the sets)")
    if "samples_per_shard" in tree and not tree["root"]:
        raise ConfigError("say where it lies: root=FOLDER")
    if "fov_deg" in tree and not tree.get("dataset"):
        raise ConfigError("say what to audit: dataset=NAME root=FOLDER (--help shows the names)")
    if "fov_deg" in tree and not tree["root"] and "root" in tree["dataset"]:
        raise ConfigError("say where it lies: root=FOLDER")
    if "segmenter" in tree and not (tree.get("dataset") and tree["root"] and tree["segmenter"]):
        raise ConfigError("say whose sky, and what finds it: dataset=NAME root=FOLDER segmenter=FOLDER_OR_ID")
    known = {*GROUPS, *(key.partition(".")[0] for key in PLAIN)}
    problems = [f"{key} is no option{suggest(str(key), known)}" for key in tree if key not in known]
    if "task" in tree:
        needed = [group for group in GROUPS if group not in MAY_LACK and not tree.get(group)]
        problems += [f"{group} is missing: choose one as {group}=NAME" for group in needed]
    _check_parts(tree, problems)
    _walk(tree, "", problems)
    if problems:
        raise ConfigError("\n".join(problems))


def _check_parts(tree: Mapping[str, Any], problems: list[str]) -> None:
    """A name misspelt inside a file makes a part of its own, and that has no `_target_`."""
    for group in (*GROUPS, *NAMED_IN_DATA):
        node: Any = tree
        for key in group.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is None:
            continue
        named = group in (*NAMED, *NAMED_IN_DATA) and isinstance(node, Mapping)
        parts = {f"{group}.{name}": part for name, part in node.items()} if named else {group: node}
        built = [path for path, part in parts.items() if isinstance(part, Mapping) and "_target_" in part]
        for path, part in parts.items():
            if path not in built and not (part is None and group in MAY_LACK):
                problems.append(f"{path} builds nothing: it has no _target_{suggest(path, built)}")


def _walk(node: Any, path: str, problems: list[str]) -> None:
    if isinstance(node, list):
        if (annotation := PLAIN.get(path)) and (wrong := mismatch(annotation, node)):
            problems.append(f"{path} {wrong}")
        for index, item in enumerate(node):
            _walk(item, f"{path}[{index}]", problems)
        return
    if not isinstance(node, Mapping):
        annotation = PLAIN.get(path) or PLAIN.get(path.partition(".")[0] + ".*")
        if annotation and (wrong := mismatch(annotation, node)):
            problems.append(f"{path} {wrong}")
        return
    if "_target_" in node:
        _bind(node, path, problems)
    for key, value in node.items():
        _walk(value, f"{path}.{key}" if path else str(key), problems)


def _bind(node: Mapping[str, Any], path: str, problems: list[str]) -> None:
    try:
        arguments = arguments_of(str(node["_target_"]))
    except LookupError as error:
        problems.append(f"{path}: {error}")
        return
    for key, value in node.items():
        if key == "_target_":
            continue
        if str(key).startswith("_"):  # _partial_, _args_ and the like change what is built
            problems.append(f"{path}.{key} is not allowed")
        elif key not in arguments:
            problems.append(f"{path}.{key} is no option of {node['_target_']}{suggest(key, arguments)}")
        elif wrong := mismatch(arguments[key].annotation, value):
            problems.append(f"{path}.{key} {wrong}")
    missing = [n for n, a in arguments.items() if a.required and n not in node and n not in GIVEN]
    problems += [f"{path}.{name} is missing" for name in missing]


def suggest(word: str, among: Any) -> str:
    """'; did you mean a or b?' for close names, else '; there are: ...' for a short list, else nothing."""
    names = sorted(map(str, among))
    close = get_close_matches(word, names, n=3, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; there are: {', '.join(names)}" if names and len(names) <= 12 else ""
