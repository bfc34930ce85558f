"""python -m depthany.evaluate: affine-invariant AbsRel and delta1 of models and trivial predictors on labelled images.

  python -m depthany.evaluate                                       # the newest finished run on the embedded scenes
  python -m depthany.evaluate checkpoint=runs/teacher-seed0 data=real_sample
  python -m depthany.evaluate checkpoint=[runs/teacher-seed0,runs/student-seed0] input_size=112

Scale and shift are fitted per image by least squares in disparity; a negative scale is counted and not accepted.
"""

from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Scores one or more checkpoints."""
    from depthany.config.build import build
    from depthany.runs.find import open_model
    from depthany.runs.scoring import Row, baselines, print_table, score_all

    specs = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else list(cfg.checkpoint)
    opened = [open_model(spec, Path(cfg.paths.runs), device=cfg.device, stage=None) for spec in specs]
    data = build(cfg.data, limit=cfg.limit or cfg.data.limit)
    data.prepare_data()
    data.setup()
    rows: list[Row] = []
    for predictor, name, path in opened:
        print(f"{name}: {path}")
        size = cfg.input_size or predictor.model.input_size
        trivial = baselines(data) if cfg.baselines and not rows else {}
        model = {name: lambda batch, p=predictor: p.model(batch["image"].to(p.device))}
        rows += score_all(trivial | model, data, size=size, multiple=predictor.model.patch_size)
    print_table(rows)


def main() -> None:
    """The command."""
    launch("evaluate", __doc__ or "", run)


if __name__ == "__main__":
    main()
