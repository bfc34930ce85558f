"""python -m depthany.evaluate: accuracy, sharpness and time of models and trivial predictors on labelled images.

  python -m depthany.evaluate                                       # the newest finished run on the embedded scenes
  python -m depthany.evaluate checkpoint=runs/teacher-seed0 data=real_sample
  python -m depthany.evaluate checkpoint=[runs/teacher-seed0,runs/student-seed0] input_size=112
  python -m depthany.evaluate checkpoint=depth_anything_v2_vits.pth sizes=[518,700,1036]     # and a page

Scale and shift are fitted per image by least squares in disparity; a negative scale is counted and not accepted.
Accuracy: AbsRel and delta1. Sharpness where the label is dense: edge F1 (are the depth edges at the same pixels?) and
edge step (which share of their step is made there?). A finer input gives sharper edges, and is often less accurate.
"""

from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Scores one or more checkpoints."""
    from depthany.config.build import build
    from depthany.runs.find import open_model
    from depthany.runs.scoring import Row, baselines, input_sizes, print_table, sweep, write_page
    from depthany.runs.stage import in_words

    specs = [cfg.checkpoint] if isinstance(cfg.checkpoint, str) else list(cfg.checkpoint)
    opened = [open_model(spec, Path(cfg.paths.runs), device=cfg.device, stage=None) for spec in specs]
    sizes = [input_sizes(cfg.input_size, cfg.sizes, predictor) for predictor, _, _ in opened]
    data = build(cfg.data, limit=cfg.limit or cfg.data.limit)
    with in_words():
        data.prepare_data()
        data.setup()
    rows: list[Row] = []
    for (predictor, name, path), each in zip(opened, sizes, strict=True):
        print(f"{name}: {path}")
        trivial = baselines(data) if cfg.baselines and not rows else {}
        rows += sweep(predictor, name, data, sizes=each, trivial=trivial)
    print_table(rows)
    if rows and cfg.sizes is not None:
        models = [(predictor, name) for predictor, name, _ in opened]
        print(f"page: {write_page(Path(cfg.paths.runs), models, data, rows, sizes=sizes[0])}")


def main() -> None:
    """The command."""
    launch("evaluate", __doc__ or "", run)


if __name__ == "__main__":
    main()
