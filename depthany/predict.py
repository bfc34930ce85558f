"""Depth maps of photos: `python -m depthany.predict PHOTOS... --outdir DIR`.

The flags have the names of Depth-Anything-V2 `run.py` where one exists.
"""

import argparse
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

GAP_PX = 50  # white bar between photo and map, as the official run.py
SAVES = {"npy": ".npy", "npz": ".npz", "png16": ".disparity16.png"}
WEIGHTS = "model.safetensors"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags; ends the program on a flag that makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m depthany.predict", description=__doc__)
    photos = "photos, folders (searched recursively), glob patterns, or .txt lists of photos"
    parser.add_argument("photos", nargs="*", metavar="PHOTOS", help=photos)
    parser.add_argument("--img-path", nargs="+", default=[], metavar="PHOTOS", help="the same")
    parser.add_argument("--checkpoint", type=Path, help=f"a {WEIGHTS} or a run folder; default: the newest run")
    parser.add_argument("--outdir", type=Path, default=Path("vis_depth"), help="default: vis_depth")
    parser.add_argument("--input-size", type=int, help="short side in pixels; default: the model's")
    parser.add_argument("--pred-only", action="store_true", help="the map without the photo")
    parser.add_argument("--grayscale", action="store_true", help="grey instead of Spectral_r")
    parser.add_argument("--save", default="", help=f"also raw maps: {','.join(SAVES)}")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--max-pixels", type=int, default=4_000_000, help="largest network input; default: 4000000")
    flags = parser.parse_args(arguments)
    flags.photos += flags.img_path
    flags.save = [name for name in flags.save.split(",") if name]
    if not flags.photos:
        parser.error("name at least one photo, folder, glob pattern or .txt list")
    if unknown := sorted(set(flags.save) - set(SAVES)):
        parser.error(f"--save knows {', '.join(SAVES)}, not {', '.join(unknown)}")
    for name in ("input_size", "max_pixels"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    return flags


def find_photos(names: Sequence[str], outdir: Path) -> dict[Path, Path]:
    """Expands what the user named.

    Photos in a folder are found by suffix; earlier output in an `outdir` inside that folder is
    left out. A name that leads nowhere is kept, so that it is reported when it is read.

    Returns:
        The root of each photo, by absolute path: the folder named or the photo's own.
    """
    from depthany.data.sources.photos import SUFFIXES  # loads numpy and OpenCV: after the flags are parsed

    out = Path(os.path.abspath(outdir))
    roots: dict[Path, Path] = {}

    def add(name: str, root: str) -> None:
        roots.setdefault(Path(os.path.abspath(name)), Path(os.path.abspath(root)))

    for name in names:
        if os.path.isdir(name):
            inside = glob.glob(os.path.join(glob.escape(name), "**", "*"), recursive=True)
            earlier = out if Path(os.path.abspath(name)) in out.parents else None
            found = [
                path
                for path in sorted(inside)
                if os.path.splitext(path)[1].lower() in SUFFIXES
                and os.path.isfile(path)
                and earlier not in Path(os.path.abspath(path)).parents
            ]
            for path in found or [name]:
                add(path, name)
        elif name.lower().endswith(".txt") and os.path.isfile(name):
            for line in Path(name).read_text(encoding="utf-8-sig").splitlines():
                if line.strip():
                    add(line.strip(), os.path.dirname(line.strip()))
        else:
            literal = os.path.exists(name) or not glob.has_magic(name)
            matches = [name] if literal else sorted(glob.glob(name, recursive=True))
            for path in [path for path in matches if os.path.isfile(path)] or [name]:
                add(path, os.path.dirname(path))
    return roots


def name_outputs(roots: dict[Path, Path]) -> dict[Path, PurePath]:
    """Gives each photo its own output name, relative to the output folder and without suffix.

    Sub-folders are kept below the roots' common parent. Photos of one folder that differ only in
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
        while any(f"{stem}{suffix}".casefold() in taken for suffix in (".png", *SAVES.values())):
            stem += "_"
        taken.update(f"{stem}{suffix}".casefold() for suffix in (".png", *SAVES.values()))
        outputs[path] = PurePath(stem)
    return outputs


def find_checkpoint(given: Path | None) -> Path:
    """Returns the weights file: the one given, that of the run given, or that of the newest run.

    Raises:
        ValueError: There is none.
    """
    if given is None:
        runs = sorted(Path("runs").glob(f"*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise ValueError(
                f"no trained model in runs/*/{WEIGHTS}: train one with "
                "`python -m depthany.train stage=teacher`, or give --checkpoint"
            )
        return runs[-1]
    from depthany.runs.find import find_weights

    try:
        return find_weights(str(given), Path("runs"), stage=None)
    except ValueError as error:
        raise ValueError(f"--checkpoint: {error}") from error


def write_all(flags: argparse.Namespace, outputs: dict[Path, PurePath]) -> Iterator[str | None]:
    """Predicts and writes photo by photo; yields None where written, else why it was skipped."""
    import torch
    from PIL import Image

    from depthany.data.files import DecodeError, read_image
    from depthany.inference.predictor import Predictor
    from depthany.inference.rendering import colorize, side_by_side
    from depthany.runs.find import open_weights

    device = flags.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that this torch can use; take --device cpu")
    model, _ = open_weights(flags.checkpoint)
    predictor = Predictor(model=model, device=device, precision=flags.precision, max_pixels=flags.max_pixels)
    for path, name in outputs.items():
        if path.is_dir():
            yield "a folder without photos"
            continue
        try:
            photo = read_image(path.read_bytes())
            depth = predictor.predict(photo, input_size=flags.input_size)
        except (DecodeError, OSError, ValueError) as error:
            yield error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            continue
        except torch.OutOfMemoryError:
            yield "out of memory; lower --input-size or take --device cpu"
            continue
        picture = colorize(depth.disparity, cmap="gray" if flags.grayscale else "Spectral_r", valid=depth.valid)
        if not flags.pred_only:
            picture = side_by_side([photo, picture], gap=GAP_PX)
        target = flags.outdir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(f"{target}.png")
        for kind in flags.save:
            depth.save(Path(f"{target}{SAVES[kind]}"))
        yield None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb; returns 0 if anything was written, else 1."""
    flags = parse(arguments)
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    outputs = name_outputs(find_photos(flags.photos, flags.outdir))
    for name in outputs.values():
        if Path(os.path.abspath(f"{flags.outdir / name}.png")) in outputs:
            console.print(f"error: {name}.png would be overwritten by its map; change --outdir")
            return 1
    skipped = []
    try:
        if flags.checkpoint is None:
            flags.checkpoint = find_checkpoint(None)
            console.print(f"Using the newest run: {flags.checkpoint}")
        flags.checkpoint = find_checkpoint(flags.checkpoint)
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("Predicting", total=len(outputs))
            for path, problem in zip(outputs, write_all(flags, outputs), strict=True):
                if problem is not None:
                    skipped.append(path.name)
                    console.print(f"skipped {path}: {problem}")
                progress.advance(task)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}")
        return 1
    num_written = len(outputs) - len(skipped)
    names = f" ({', '.join(skipped)})" if skipped else ""
    print(f"{num_written} written to {flags.outdir}, {len(skipped)} skipped{names}")
    return 0 if num_written else 1


if __name__ == "__main__":
    raise SystemExit(main())
