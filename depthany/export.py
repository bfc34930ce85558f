"""python -m depthany.export: a model in the format of others, checked; or what a checkpoint is.

  python -m depthany.export checkpoint=runs/student-seed0 format=onnx out=student.onnx photo=street.jpg
  python -m depthany.export checkpoint=depth_anything_v2_vits.pth format=hf out=FOLDER      # for transformers
  python -m depthany.export checkpoint=FOLDER format=official out=depth_anything_v2_vits.pth
  python -m depthany.export checkpoint=runs/student-seed0 format=info                       # a table; also format=json

Each export is read back, and the largest difference between before and after on a photo is printed: none where weights
are copied, at most 1e-4 of the output's standard deviation where the arithmetic is another's. Else nothing is written
and the exit code is 1. Checkpoints of any layout are taken; nothing in a file is executed.
"""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Writes a checkpoint in another format, or tells what it is."""
    from depthany.config.check import ConfigError
    from depthany.runs.exporting import Different, export
    from depthany.runs.info import checkpoint_info, table

    if not isinstance(cfg.checkpoint, str):
        raise ConfigError("checkpoint: name one, not a list")
    runs = Path(cfg.paths.runs)
    if cfg.format in ("info", "json"):
        if given := [f"{name}={cfg[name]}" for name in ("out", "photo", "size") if cfg[name] is not None]:
            raise ConfigError(f"format={cfg.format} prints and writes nothing: leave out {', '.join(given)}")
        info = checkpoint_info(cfg.checkpoint, runs)
        print(json.dumps(info, indent=1) if cfg.format == "json" else table(info))
        return
    if cfg.out is None:
        raise ConfigError("say where it goes: out=FILE, for format=hf out=FOLDER")
    photo = Path(cfg.photo) if cfg.photo else None
    try:
        for line in export(
            cfg.checkpoint,
            runs=runs,
            form=cfg.format,
            out=Path(cfg.out),
            photo=photo,
            size=cfg.size,
            processing=cfg.processing,
        ):
            print(line, flush=True)
    except Different as error:
        print(f"depthany: {error}", file=sys.stderr)
        sys.exit(1)


def main() -> None:
    """The command."""
    launch("export", __doc__ or "", run)


if __name__ == "__main__":
    main()
