"""A page in the browser: upload a photo, choose the input size, see its depth, download it.

`python -m depthany.demo --checkpoint X`, then open the address that is printed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the flags; ends the program on a flag that makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m depthany.demo", description=__doc__)
    model = "weights of any layout, a run folder, or a model of the hub; default: the last finished run"
    parser.add_argument("--checkpoint", default="last", help=model)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 shows the page to the network; default: 127.0.0.1")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    share = "yes: a public link, through gradio's hosts; default: no"
    parser.add_argument("--share", choices=["no", "yes"], default="no", help=share)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; default: auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--max-pixels", type=int, default=4_000_000, help="largest network input; default: 4000000")
    flags = parser.parse_args(arguments)
    if flags.max_pixels < 1 or not 0 < flags.port < 65536:
        parser.error("--max-pixels is positive, --port is 1 to 65535")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves the page until it is interrupted; returns 2 where it cannot start."""
    flags = parse(arguments)
    from depthany.config.check import ConfigError
    from depthany.runs.demo import serve
    from depthany.runs.find import find_weights, load_model

    try:
        path = find_weights(flags.checkpoint, Path("runs"), stage=None)
        predictor = load_model(path, device=flags.device, precision=flags.precision)
        predictor.max_pixels = flags.max_pixels
        print(f"model: {path}")
        serve(
            predictor,
            name=f"{path.absolute().parent.name}/{path.name}",
            host=flags.host,
            port=flags.port,
            share=flags.share == "yes",
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
