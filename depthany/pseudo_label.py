"""python -m depthany.pseudo_label: a teacher labels unlabelled shards; the labels lie beside them as sibling shards.

  python -m depthany.pseudo_label                                  # the last teacher labels the embedded scenes
  python -m depthany.pseudo_label teacher=runs/teacher-seed0 data=real_sample
  python -m depthany.pseudo_label teacher=model.safetensors shards=FOLDER labels.codec=float16 labels.precision=bf16
  python -m depthany.pseudo_label teacher=model.safetensors shards=FOLDER labels.quality=flip   # scores and a page

Labels that are there are checked and kept; what is missing is made. So the job can be stopped and started again, and
the same command can run on any number of machines at once: each shard is labelled by one of them.
"""

from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Labels the unlabelled sets of data, or one set of shards."""
    from depthany.config.build import build
    from depthany.data.sources.packed import Shards
    from depthany.runs.find import open_model
    from depthany.runs.label_devices import device_names, ends, label_on
    from depthany.runs.label_job import teacher_name

    plan, data = build(cfg.labels), build(cfg.data)
    devices = device_names(cfg.device, cfg.devices)
    predictor, _, file = open_model(cfg.teacher, Path(cfg.paths.runs), device=devices[0], stage="teacher")
    teacher = teacher_name(predictor.model)
    print(f"teacher: {file} ({teacher})")
    size = plan.input_size or predictor.model.input_size
    kind = f"{plan.resolution} resolution, {plan.codec}, quality {plan.quality}"
    print(f"plan: input size {size}, {plan.precision}, {kind}; processes on {', '.join(devices)}")
    sources = list(data.unlabelled.values())
    if cfg.shards:
        name = Path(cfg.shards).name
        sources = [Shards(name=name, root=cfg.shards, labels_root=cfg.labels_root, cache=None)]
    with ends():
        for source in sources:
            source.limit = data.limit
            source.prepare()
            damaged = label_on(devices, predictor, source, teacher=teacher, weights=file, plan=plan, redo=cfg.redo)
            files = Path(source.labels_root) / f"labels.{teacher}"
            print(f"{source.name}: labelled; report: {files}.html; {len(damaged)} damaged images: {files}.damaged.csv")


def main() -> None:
    """The command."""
    launch("pseudo_label", __doc__ or "", run)


if __name__ == "__main__":
    main()
