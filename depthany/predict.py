"""Depth maps of photos and videos: `python -m depthany.predict PHOTOS... --outdir DIR`.

The flags have the names of Depth-Anything-V2 `run.py` where one exists.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

SAVES = ("npy", "npz", "png16", "exr", "pfm", "tiff")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags; ends the program on a flag that makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m depthany.predict", description=__doc__)
    photos = "photos, videos, folders (searched recursively), glob patterns, or lists of them: .txt, - for stdin"
    parser.add_argument("photos", nargs="*", metavar="PHOTOS", help=photos)
    parser.add_argument("--img-path", nargs="+", default=[], metavar="PHOTOS", help="the same")
    encoder = "take checkpoints/depth_anything_v2_ENCODER.pth; with --checkpoint: refuse another encoder"
    parser.add_argument("--encoder", choices=["vits", "vitb", "vitl", "vitg"], help=encoder)
    weights = "weights of any layout, a run folder or a model of the Hugging Face hub; default: the last finished run"
    parser.add_argument("--checkpoint", help=weights)
    parser.add_argument("--outdir", type=Path, default=Path("vis_depth"), help="default: vis_depth")
    size = "short side of the network input in pixels, raised to a multiple of the patch size; default: the model's"
    parser.add_argument("--input-size", type=int, help=size)
    smooth = "average areas where a photo shrinks, instead of the official bicubic sampling"
    parser.add_argument("--antialias", action="store_true", help=smooth)
    tiles = "cut larger photos into overlapping tiles of SIDE x SIDE photo pixels, fitted to the whole photo's map"
    parser.add_argument("--tiles", type=int, metavar="SIDE", help=tiles)
    parser.add_argument("--pred-only", action="store_true", help="the map without the photo")
    parser.add_argument("--grayscale", action="store_true", help="grey instead of Spectral_r; near is white")
    save = f"also the maps themselves, at the photo's size: any of {','.join(SAVES)}; of a video: npz holds all frames"
    parser.add_argument("--save", default="", metavar="KINDS", help=save)
    sure = "of photos: also ask how well the map of the mirrored photo agrees; kept in npz alone"
    parser.add_argument("--confidence", action="store_true", help=sure)
    batch = "photos of one shape, or frames, at once; default: 1 on a CPU, else 8"
    parser.add_argument("--batch-size", type=int, help=batch)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    pixels = "largest network input; a photo that would be above gets a smaller one; default: 4000000"
    parser.add_argument("--max-pixels", type=int, default=4_000_000, help=pixels)
    flags = parser.parse_args(arguments)
    flags.photos += flags.img_path
    flags.save = tuple(name.strip().lower() for name in flags.save.split(",") if name.strip())
    if not flags.photos:
        parser.error("name at least one photo, video, folder, glob pattern or .txt list")
    if unknown := sorted(set(flags.save) - set(SAVES)):
        parser.error(f"--save knows {', '.join(SAVES)}, not {', '.join(unknown)}")
    for name in ("input_size", "max_pixels", "tiles", "batch_size"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    if flags.confidence and flags.tiles:
        parser.error("--confidence looks at whole photos: leave out --tiles")
    if flags.confidence and "npz" not in flags.save:
        parser.error("--confidence is kept in npz alone: add --save npz")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the verb; 0 if anything was written and no writing failed, 2 for a bad option, 130 for Ctrl-C, else 1."""
    flags = parse(arguments)
    try:
        from depthany.runs.predicting import predict

        return predict(flags)
    except KeyboardInterrupt:
        print("interrupted: what is written is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
