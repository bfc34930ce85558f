"""python -m depthany.audit: looks for wrong labels in any labelled source, and writes a page with the evidence.

  python -m depthany.audit dataset=vkitti2 root=FOLDER dataset.split=train
  python -m depthany.audit dataset=index_csv root=FOLDER limit=null
  python -m depthany.audit dataset=folder_pair root=FOLDER dataset.quantity=disparity fov_deg.folder_pair=60
  python -m depthany.audit dataset=shards root=FOLDER dataset.name=hypersim
  python -m depthany.audit dataset=irs root=FOLDER checksums=true       # every file is as it was

It looks for disparity read as depth, distance read as depth, wrong units, moved and mixed-up labels, and sky read as a
surface; each test may answer that it cannot tell. Status 0: nothing is flagged; 1: something is; 2: a wrong option.
"""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Audits one source."""
    from depthany.config.build import build, choice
    from depthany.runs.auditing import audit, print_audit

    name = choice("dataset")
    if name in (None, "shards"):  # shards are of the set whose name they were given
        name = cfg.dataset.name
    result = audit(
        build(cfg.dataset),
        dataset=name,
        limit=cfg.limit,
        checksums=cfg.checksums,
        fov_deg=cfg.fov_deg.get(name),
        range_m=cfg.range_m,
        page=Path(cfg.page or Path(cfg.paths.runs) / "_audit" / f"{cfg.dataset.name}.html"),
        command=f"python -m depthany.audit {shlex.join(sys.argv[1:])}",
    )
    print_audit(result)
    if result.flagged:
        sys.exit(1)


def main() -> None:
    """The command."""
    launch("audit", __doc__ or "", run)


if __name__ == "__main__":
    main()
