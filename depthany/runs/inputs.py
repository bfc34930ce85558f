"""Photos and videos that a user names, and where their maps go."""

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from depthany.data.sources.photos import SUFFIXES as PHOTOS
from depthany.data.sources.video import VIDEOS

# What is written for a photo and for a video, by the name of --save; the picture and the video are always written.
SAVES = {"npy": ".npy", "npz": ".npz", "png16": ".{space}16.png", "exr": ".exr", "pfm": ".pfm", "tiff": ".tiff"}
PICTURE, VIDEO, FRAMES = ".png", ".mp4", ".frames"  # FRAMES: a folder of maps of a video
SPACES = ("disparity", "depth")  # in the names of 16-bit PNGs
ENDINGS = {PICTURE, VIDEO, FRAMES} | {saved.format(space=space) for saved in SAVES.values() for space in SPACES}


def find_inputs(names: Sequence[str], outdir: Path) -> dict[Path, Path]:
    """Expands what the user named: files, folders, glob patterns, and lists of them (.txt, or - for stdin).

    Photos and videos in a folder are found by suffix; earlier output in an `outdir` inside that folder is
    left out. A name that leads nowhere is kept, so that it is reported when it is read.

    Returns:
        The root of each file, by absolute path: the folder named or the file's own.

    Raises:
        ValueError: A list that is no text.
    """
    out = Path(os.path.abspath(outdir))
    roots: dict[Path, Path] = {}

    def add(name: str, root: str) -> None:
        roots.setdefault(Path(os.path.abspath(name)), Path(os.path.abspath(root)))

    for name in _unlisted(names):
        if os.path.isdir(name):
            inside = glob.glob(os.path.join(glob.escape(name), "**", "*"), recursive=True)
            earlier = out if Path(os.path.abspath(name)) in out.parents else None
            found = [
                path
                for path in sorted(inside)
                if os.path.splitext(path)[1].lower() in PHOTOS | set(VIDEOS)
                and not os.path.isdir(path)
                and earlier not in Path(os.path.abspath(path)).parents
            ]
            for path in found or [name]:
                add(path, name)
        else:
            literal = os.path.exists(name) or not glob.has_magic(name)
            matches = [name] if literal else sorted(glob.glob(name, recursive=True))
            for path in [path for path in matches if os.path.isfile(path)] or [name]:
                add(path, os.path.dirname(path))
    return roots


def _unlisted(names: Sequence[str]) -> Iterator[str]:
    """The names, and in place of a list what stands in it."""
    for name in names:
        if name == "-":
            data, name = sys.stdin.buffer.read(), "stdin"
        elif name.lower().endswith(".txt") and os.path.isfile(name):
            data = Path(name).read_bytes()
        else:
            yield name
            continue
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: a list is UTF-8 text with one path a line; {error}") from error
        yield from (os.path.expanduser(line.strip()) for line in lines if line.strip())


def is_video(path: Path) -> bool:
    """Whether a file is taken for a video, by its suffix."""
    return path.suffix.lower() in VIDEOS


def spelled(path: Path | str) -> str:
    """A path in one line that every terminal takes, whatever letters are in it."""
    return str(path).encode(errors="backslashreplace").decode().replace("\n", "\\n")


def name_outputs(roots: dict[Path, Path]) -> dict[Path, PurePath]:
    """Gives each file its own output name, relative to the output folder and without suffix.

    Sub-folders are kept below the roots' common parent. Files of one folder that differ only in
    their suffix keep it (`a.jpg` and `a.png`), so nothing is ever overwritten.
    """
    if not roots:
        return {}
    base = os.path.commonpath(roots.values())
    stems = Counter(str(path.with_suffix("")).casefold() for path in roots)
    taken: set[str] = set()
    outputs = {}
    for path in roots:
        shared = stems[str(path.with_suffix("")).casefold()] > 1
        stem = os.path.relpath(path if shared else path.with_suffix(""), base)
        while any(f"{stem}{ending}".casefold() in taken for ending in ENDINGS):
            stem += "_"
        taken.update(f"{stem}{ending}".casefold() for ending in ENDINGS)
        outputs[path] = PurePath(stem)
    return outputs


def overwritten(outputs: dict[Path, PurePath], outdir: Path, save: Sequence[str]) -> list[Path]:
    """Files that lie beside an input, or are one, and that an output would replace."""
    written: set[Path] = set()
    for path, name in outputs.items():
        if is_video(path):
            endings = [VIDEO, *(SAVES[kind] for kind in save if kind == "npz")]
        else:
            endings = [PICTURE, *(SAVES[kind].format(space=space) for kind in save for space in SPACES)]
        written.update(_place(f"{outdir / name}{ending}") for ending in endings)
    inputs = {_place(path) for path in outputs}
    folders = {path.parent for path in inputs}
    return sorted(p for p in written if p in inputs or (p.parent in folders and os.path.lexists(p)))


def _place(path: Path | str) -> Path:
    """The absolute path of a file, whatever links lead to its folder."""
    return Path(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
