"""python -m depthany.pseudo_label: a teacher labels unlabelled shards; the labels lie beside them as sibling shards.

  python -m depthany.pseudo_label                                  # the last teacher labels the embedded scenes
  python -m depthany.pseudo_label teacher=runs/teacher-seed0 data=real_sample
  python -m depthany.pseudo_label teacher=model.safetensors shards=FOLDER labels.codec=float16

Labels that are there are checked and kept; what is missing is made, so the job can be stopped and started again.
"""

from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Labels the unlabelled sets of data, or a folder of shards."""
    from depthany.config.build import build
    from depthany.data.sources.packed import Shards
    from depthany.runs.find import open_model
    from depthany.runs.label_job import label_shards

    predictor, teacher, found = open_model(cfg.teacher, Path(cfg.paths.runs), device=cfg.device, stage="teacher")
    print(f"teacher: {found} ({teacher})")
    plan = build(cfg.labels)
    data = build(cfg.data)
    sources = [Shards(name="shards", root=cfg.shards)] if cfg.shards else list(data.unlabelled.values())
    for source in sources:
        source.limit = data.limit
        source.prepare()
        damaged = label_shards(predictor, source.tars, teacher=teacher, plan=plan)
        print(f"{source.name}: {len(source.tars)} shards labelled in {source.root}, {len(damaged)} images damaged")
        for line in damaged:
            print(f"  {line}")


def main() -> None:
    """The command."""
    launch("pseudo_label", __doc__ or "", run)


if __name__ == "__main__":
    main()
