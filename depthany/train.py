"""python -m depthany.train: stage one trains a teacher on labelled images, stage two a student on its pseudo-labels.

python -m depthany.train stage=teacher
python -m depthany.train stage=student
python -m depthany.train stage=student recipe=v1 task.teacher_ckpt=runs/teacher-seed0
python -m depthany.train -m stage=teacher loss.gradient.weight=0,0.5,2     # a sweep
python -m depthany.train stage=teacher debug=smoke                        # two steps of everything
python -m depthany.train stage=student --help                             # every option of that stage
python -m depthany.train stage=teacher model=vitl data=embedded trainer=gpu trainer.devices=8
"""

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """One stage: build, go on where it stopped, fit, keep the weights, evaluate, write the page."""
    from depthany.config.build import run_dir
    from depthany.runs.ranks import claimed, join
    from depthany.runs.stage import Stage

    with claimed(run_dir(), main=join(cfg.trainer)) as claim:
        stage = Stage(cfg, run_dir(), claim)
        if stage.is_finished():
            return
        stage.prepare()
        stage.fit()
        stage.keep_weights()
        stage.report()


def main() -> None:
    """The command."""
    launch("train", __doc__ or "", run)


if __name__ == "__main__":
    main()
