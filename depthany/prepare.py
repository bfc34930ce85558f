"""python -m depthany.prepare: a downloaded set, of labelled samples or of images, becomes shards that training reads.

  python -m depthany.prepare --list                                     # the sets: licence, size, unit or layout
  python -m depthany.prepare dataset=hypersim root=FOLDER               # labelled: the same samples, read faster
  python -m depthany.prepare dataset=irs root=FOLDER pictures=fast      # PNG as bare pixels: larger, much faster
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
    from depthany.runs.preparing import next_commands, open_set, prepare, print_summary

    job = open_set(cfg, build(cfg.get("unlabelled") or cfg.get("dataset")))
    print_summary(prepare(job), next_commands(job))


def main() -> None:
    """The command."""
    if "--list" in sys.argv[1:]:
        from depthany.runs.preparing import print_sets

        print_sets()
        return
    launch("prepare", __doc__ or "", run)


if __name__ == "__main__":
    main()
