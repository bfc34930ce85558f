"""python -m depthany.prepare: a downloaded set of unlabelled images becomes shards that training reads.

  python -m depthany.prepare --list                                     # the sets: licence, size, layout
  python -m depthany.prepare unlabelled=places365 root=FOLDER
  python -m depthany.prepare unlabelled=sa1b root=FOLDER max_side=1024 workers=16
  python -m depthany.prepare unlabelled=folder root=FOLDER unlabelled.name=mine unlabelled.patterns='["*.jpg"]'
  python -m depthany.prepare unlabelled=list root=FILE unlabelled.name=mine
  python -m depthany.prepare unlabelled=webdataset root=FOLDER          # tars of others, indexed where they are

The same command goes on where it was stopped, and adds what has been downloaded since. Several may run at once.
"""

import sys

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Packs or indexes one set."""
    from depthany.config.build import build
    from depthany.runs.unlabelled import open_set, prepare, print_summary

    print_summary(prepare(open_set(cfg, build(cfg.unlabelled))))


def main() -> None:
    """The command."""
    if sys.argv[1:] == ["--list"]:
        from depthany.runs.unlabelled import print_sets

        print_sets()
        return
    launch("prepare", __doc__ or "", run)


if __name__ == "__main__":
    main()
