"""The constructor is the schema: reads the signature and the argument docs of a `_target_` without importing it.

Sources are parsed, not run, so that a wrong option is refused before torch is imported and `--help` is instant.
"""

import ast
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Hydra's blocklist is no boundary, so a config may only build what stands here: our own package, and these names with
# the module that defines them.
FOREIGN_TARGETS = {
    "lightning.pytorch.Trainer": "lightning.pytorch.trainer.trainer.Trainer",
    "lightning.pytorch.loggers.WandbLogger": "lightning.pytorch.loggers.wandb.WandbLogger",
}
OWN_PREFIX = "depthany."


@dataclass(frozen=True)
class Argument:
    """One constructor argument: its annotation as written, whether it may be left out, and its doc."""

    annotation: str
    required: bool
    doc: str


def _source_of(target: str) -> tuple[Path, str]:
    name = FOREIGN_TARGETS.get(target, target)
    module, _, attribute = name.rpartition(".")
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"{target}: the package {package} is not installed")
    base = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path, attribute
    raise LookupError(f"{target}: there is no module {module}")


class _Aliases(ast.NodeTransformer):
    """Writes a module's own `Name = Literal[...]` out wherever an annotation uses the name."""

    def __init__(self) -> None:
        self.known: dict[str, ast.expr] = {}

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        target = node.targets[0]
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Subscript):
            self.known[target.id] = node.value
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        if isinstance(node.annotation, ast.Name):
            node.annotation = self.known.get(node.annotation.id, node.annotation)
        return node


def _docs(text: str | None) -> dict[str, str]:
    """The `Args:` section of a Google docstring as a mapping from name to one line of text."""
    lines = inspect.cleandoc(text or "").split("\n")
    docs: dict[str, str] = {}
    name, inside = "", False
    for line in lines:
        if line.strip() == "Args:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and (match := re.match(r"    (\w+)(?: \([^)]*\))?: (.*)", line)):
            name = match[1]
            docs[name] = match[2].strip()
        elif inside and name and line.strip():
            docs[name] += " " + line.strip()
    return docs


@cache
def arguments_of(target: str) -> Mapping[str, Argument]:
    """The constructor arguments of a class or function named by its dotted path.

    Raises:
        LookupError: the name is not on the allowlist or does not exist.
    """
    named = all(part.isidentifier() for part in target.split("."))
    if not named or (not target.startswith(OWN_PREFIX) and target not in FOREIGN_TARGETS):
        allowed = ", ".join([OWN_PREFIX + "*", *FOREIGN_TARGETS])
        raise LookupError(f"_target_ {target} is not allowed; a config may build {allowed}")
    path, attribute = _source_of(target)
    body = _Aliases().visit(ast.parse(path.read_text(encoding="utf-8"))).body
    found = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute]
    if not found:
        raise LookupError(f"_target_ {target}: {path.name} defines no {attribute}")
    node = found[0]
    docs = _docs(ast.get_docstring(node))
    function: ast.FunctionDef | None = node if isinstance(node, ast.FunctionDef) else None
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                function = item
                docs |= _docs(ast.get_docstring(item))
    if function is not None:
        return _from_function(function, docs)
    assert isinstance(node, ast.ClassDef)
    return {  # a dataclass: its fields are its constructor
        item.target.id: Argument(ast.unparse(item.annotation), item.value is None, docs.get(item.target.id, ""))
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _from_function(function: ast.FunctionDef, docs: Mapping[str, str]) -> dict[str, Argument]:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(spec.defaults))
    pairs = list(zip(positional, defaults + list(spec.defaults), strict=True))
    pairs += list(zip(spec.kwonlyargs, spec.kw_defaults, strict=True))
    return {
        arg.arg: Argument(
            ast.unparse(arg.annotation) if arg.annotation else "Any", default is None, docs.get(arg.arg, "")
        )
        for arg, default in pairs
        if arg.arg != "self"
    }


_NUMBERS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "Path": (str,)}
_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "Path": "a path"}


def mismatch(annotation: str, value: Any) -> str | None:
    """What is wrong with a plain config value for an annotation, in words; None if it fits or cannot be judged."""
    if isinstance(value, Mapping) and "_target_" in value:
        return None
    wanted = list(_alternatives(ast.parse(annotation, mode="eval").body))
    if any(fits is None or fits(value) for _, fits in wanted):
        return None
    return f"must be {' or '.join(dict.fromkeys(word for word, _ in wanted))}, not {value!r}"


def _each(node: ast.expr) -> tuple[Callable[[Any], bool], str]:
    """Whether one item of a container fits its annotation, and in words what an item has to be."""
    annotation = ast.unparse(node)
    known = [words for words, fits in _alternatives(node) if fits is not None]
    words = f" (each {' or '.join(known)})" if known else ""
    return lambda item: mismatch(annotation, item) is None, words


def _alternatives(node: ast.expr) -> Iterator[tuple[str, Any]]:
    """(words, test) for each alternative of an annotation; a test of None accepts everything."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _alternatives(node.left)
        yield from _alternatives(node.right)
    elif isinstance(node, ast.Constant) and node.value is None:
        yield "null", lambda value: value is None
    elif isinstance(node, ast.Name) and node.id in _NUMBERS:
        kinds, is_bool = _NUMBERS[node.id], node.id == "bool"
        yield _WORDS[node.id], lambda value: isinstance(value, kinds) and isinstance(value, bool) == is_bool
    elif isinstance(node, ast.Subscript):
        head = ast.unparse(node.value).rpartition(".")[2]
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if head == "Optional":
            yield "null", lambda value: value is None
            yield from _alternatives(inner[0])
        elif head == "Union":
            for item in inner:
                yield from _alternatives(item)
        elif head == "Literal":
            choices = [ast.literal_eval(item) for item in inner]
            yield "one of " + ", ".join(map(str, choices)), lambda value: value in choices
        elif head in ("Sequence", "list", "List", "tuple"):
            each, words = _each(inner[0])
            yield f"a list{words}", lambda value: isinstance(value, list) and all(map(each, value))
        elif head in ("Mapping", "dict", "Dict"):
            each, words = _each(inner[-1])
            yield f"a mapping{words}", lambda value: isinstance(value, Mapping) and all(map(each, value.values()))
        else:
            yield head, None
    else:
        yield ast.unparse(node), None
