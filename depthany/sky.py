"""python -m depthany.sky: finds the sky in a set whose labels do not know it, and writes a mask for each image.

  python -m depthany.sky dataset=hrwsi root=FOLDER segmenter=nvidia/segformer-b5-finetuned-ade-640-640
  python -m depthany.sky dataset=megadepth root=FOLDER segmenter=FOLDER limit=50          # first look at the page
  python -m depthany.sky dataset=blendedmvs root=FOLDER segmenter=ID out=MASKS            # root is read-only

The segmenter is any semantic segmentation model of transformers that has a class "sky", from the Hugging Face hub or a
folder. Masks that are there are kept, so the same command goes on where it was stopped. A dataset's option
`sky_masks=beside` (or the folder) makes its labels sky where the masks say so. Needs pip install 'depthany[hf]'.
"""

import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from depthany.config.launch import launch


def run(cfg: DictConfig) -> None:
    """Makes the masks of one set."""
    from depthany.config.build import build
    from depthany.runs.sky import make_masks, open_segmenter, print_masks

    print_masks(
        make_masks(
            build(cfg.dataset),
            open_segmenter(cfg.segmenter, cfg.device),
            out=Path(cfg.out) if cfg.out else None,
            limit=cfg.limit,
            batch_size=cfg.batch_size,
            redo=cfg.redo,
            command=f"python -m depthany.sky {shlex.join(sys.argv[1:])}",
        )
    )


def main() -> None:
    """The command."""
    launch("sky", __doc__ or "", run)


if __name__ == "__main__":
    main()
