"""python -m depthany.preflight: what would stop a run, found before its first step, and what the run will cost.

  python -m depthany.preflight stage=student                              # with the options that train would get
  python -m depthany.preflight stage=student model=vits images=62000000 world=128
  python -m depthany.preflight stage=student task.teacher_ckpt=depth_anything_v2_vitl.pth labels.codec=png8

Checks disk, memory, /dev/shm, limits, sources, teacher, batch and a checkpoint's round trip, each in a line of its own:
ok, warn or FAIL. Then measures this machine for a few seconds and multiplies out: device-hours, days, storage, loader.
Exit code 1 where something would stop the run, 2 for an option that cannot be used.
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Checks and estimates."""
    from depthany.config.build import choice
    from depthany.config.launch import run_name
    from depthany.runs.preflight import Preflight

    name = run_name(list(HydraConfig.get().overrides.task), cfg.seed)  # of the run that it is for
    raise SystemExit(Preflight(cfg, Path(cfg.paths.runs) / name, debug=choice("debug")).run())


def main() -> None:
    """The command."""
    launch("preflight", __doc__ or "", run)


if __name__ == "__main__":
    main()
