"""python -m depthany.export: what a checkpoint is.

  python -m depthany.export checkpoint=runs/student-seed0 format=info       # a table
  python -m depthany.export checkpoint=depth_anything_v2_vits.pth format=json

Stage, encoder, order, images seen, teacher, data sets and their licences, versions: of run folders, training
checkpoints, model.safetensors, official files and Hugging Face folders. Nothing in a file is executed.
"""

import json
from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Tells what a checkpoint is."""
    from depthany.config.check import ConfigError
    from depthany.runs.info import checkpoint_info, table

    if not isinstance(cfg.checkpoint, str):
        raise ConfigError("checkpoint: name one, not a list")
    info = checkpoint_info(cfg.checkpoint, Path(cfg.paths.runs))
    print(json.dumps(info, indent=1) if cfg.format == "json" else table(info))


def main() -> None:
    """The command."""
    launch("export", __doc__ or "", run)


if __name__ == "__main__":
    main()
