"""Peak memory of one forward pass against what is estimated before it, each in a process of its own.

    python scripts/benchmark_memory.py [--model vits] [--sizes 518 1036 2072]

Random weights, batch 1, square inputs. Measured is how far the resident size of the process grows after the model
is there, without the code that is loaded meanwhile, and its weights (Linux); on a GPU what torch allocated.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from depthany.config.build import build
from depthany.config.launch import compose
from depthany.inference.memory import estimate_bytes
from depthany.inference.predictor import Predictor


def measure(name: str, size: int, precision: str) -> dict[str, Any]:
    """One pass in this process, which has run none before."""
    cfg = compose("train", ["stage=teacher", f"model={name}", "model.pretrained=false"]).model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = Predictor(model=build(cfg), device=device, precision=precision)
    weights = sum(value.nbytes for value in predictor.parameters())
    begun = time.perf_counter()
    estimate = estimate_bytes(predictor.model, batch=1, height=size, width=size, precision=precision)
    told = time.perf_counter() - begun
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    before = _memory()
    begun = time.perf_counter()
    with torch.inference_mode():
        predictor(torch.rand(1, 3, size, size, device=device)).cpu()
    took = time.perf_counter() - begun
    after = _memory()
    peak = after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"]) + weights
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"estimate": estimate, "peak": peak, "told": told, "took": took}


def _memory() -> dict[str, int]:
    """Bytes by name, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vits", help="tiny, vits, vitb, vitl, vitg")
    parser.add_argument("--sizes", type=int, nargs="+", default=[518, 1036, 2072], help="sides in pixels")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="measure here and print JSON")
    flags = parser.parse_args()
    if flags.precision:
        print(json.dumps(measure(flags.model, flags.sizes[0], flags.precision)))
        return
    print("| input | precision | estimate | measured | estimate / measured | telling took | the pass took |")
    print("|---|---|---|---|---|---|---|")
    for size in flags.sizes:
        for precision in ("fp32", "bf16"):
            command = [sys.executable, __file__, "--model", flags.model, "--sizes", str(size), "--precision", precision]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(text.splitlines()[-1])
            print(
                f"| {size} | {precision} | {row['estimate'] / 1e6:.0f} MB | {row['peak'] / 1e6:.0f} MB "
                f"| {row['estimate'] / row['peak']:.2f} | {row['told']:.2f} s | {row['took']:.1f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
