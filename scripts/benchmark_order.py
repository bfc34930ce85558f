"""What does the order of a very large set cost? Opening, memory, checkpoint, and its share of a training step.

python scripts/benchmark_order.py

A catalog of 62,000 shards with 1,000 images each (one in a thousand is dropped: 61,938,000 are in use) is written into
a temporary folder, with an empty tar and index for each shard, as opening looks for the files. Printed:

  opening     seconds from nothing to the sample at which a run goes on in the middle of the epoch: the catalog is read
              and compared with the folder, the shards are shuffled, the position is located (aim: 5 s at most)
  memory      of a fresh process that does only that: its peak, of which its imports take the first part (aim: 1 GiB)
  checkpoint  bytes that the order adds to a checkpoint of model=tiny (aim: 1 MB)
  step        time that the order takes in a step, with the change of windows, as a share of a training step of
              model=tiny without loading, medians of rounds that take turns in this run (aim: 1 %)
"""

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def write_catalog(folder: Path, shards: int, samples: int) -> None:
    """A catalog as `depthany.prepare` leaves it, and the names of the files."""
    row = {"samples": samples, "bytes": 0, "sha256": "0" * 64}
    rows = [{"tar": f"set-{i:06d}.tar", **row, "dropped": [i % samples]} for i in range(shards)]
    text = json.dumps({"version": 1, "name": "set", "base": None, "shards": rows})
    (folder / "shards.json").write_text(text, encoding="utf-8")
    for i in range(shards):
        (folder / f"set-{i:06d}.tar").touch()
        (folder / f"set-{i:06d}.json").touch()


def opened(folder: Path, window: int) -> tuple[Any, Any]:
    """The set as a source, and its order, as a run makes them."""
    from depthany.data.module import Part
    from depthany.data.sources.packed import Shards

    source = Shards(name="set", root=str(folder))
    source.prepare()
    source.open()
    return source, Part([source], seed=0, window=window, limit=None)


def resume_in_a_fresh_process(folder: Path, window: int) -> None:
    """What the child prints: images, seconds, memory after the imports, peak memory."""
    import depthany.data.module
    import depthany.data.sources.packed

    assert depthany.data.module and depthany.data.sources.packed
    torch.set_num_threads(1)
    before = peak_mib()
    started = time.perf_counter()
    source, part = opened(folder, window)
    place = source.locate(part.locate(len(part) // 2)[1])
    seconds = time.perf_counter() - started
    print(json.dumps([len(part), place, seconds, before, peak_mib()]))


def peak_mib() -> float:
    """Largest memory that this process has had."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def saved(content: dict[str, Any]) -> int:
    """Bytes of a checkpoint, without the filling between its parts."""
    file = io.BytesIO()
    torch.save(content, file)
    return sum(part.file_size for part in zipfile.ZipFile(file).infolist())


class Steps:
    """Training steps of model=tiny on one batch: forward, loss, backward, clipping, AdamW."""

    def __init__(self, batch_size: int | None) -> None:
        from depthany.config.build import build
        from depthany.config.launch import compose
        from depthany.losses.total import WeightedSum

        cfg = compose("train", ["stage=teacher"])
        self.model, self.loss, plan = build(cfg.model), WeightedSum(terms=build(cfg.loss)), build(cfg.optim)
        self.batch_size = batch_size or cfg.optim.batch_size
        self.optimizer = plan.optimizer(self.model.encoder_parameters(), self.model.head_parameters())
        side = cfg.model.input_size
        self.image, self.target = torch.rand(self.batch_size, 3, side, side), torch.rand(self.batch_size, side, side)

    def __call__(self) -> None:
        """One step."""
        from depthany.types import Target

        valid, pseudo = torch.ones_like(self.target, dtype=torch.bool), torch.zeros(self.batch_size, dtype=torch.bool)
        losses, _ = self.loss(self.model.outputs(self.image), Target(self.target, valid, pseudo), None)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def ordering(source: Any, part: Any, batch_size: int, cursor: int) -> Iterator[None]:
    """What the order does in each step of one process: cuts the batch, finds each image for its key and its pixels."""
    from depthany.data.order import CursorBatches

    batches = CursorBatches(
        cursor=lambda: cursor,
        done=lambda: 0,
        total=len(part),
        size=batch_size,
        labelled=0,
        unlabelled=1,
        rank=0,
        world=1,
    )
    for spots in batches:
        for spot in spots:
            _, index = part.locate(spot.position)
            source.locate(index)
            source.locate(index)
        yield


def main() -> None:
    """Writes the catalog, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=62_000)
    parser.add_argument("--samples", type=int, default=1_000, help="images in each shard")
    parser.add_argument("--window", type=int, default=8, help="shards that are shuffled into each other")
    parser.add_argument("--batch-size", type=int, help="images of a step; by default as configs/optim/tiny.yaml has it")
    parser.add_argument("--threads", type=int, default=1, help="of the training step")
    parser.add_argument("--rounds", type=int, default=10, help="each of 1,000 orders and some steps")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.resume:
        resume_in_a_fresh_process(arguments.resume, arguments.window)
        return
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        write_catalog(Path(name), arguments.shards, arguments.samples)
        command = [sys.executable, __file__, "--resume", name, "--window", str(arguments.window)]
        total, place, seconds, before, peak = json.loads(subprocess.check_output(command))
        print(f"set         {arguments.shards:,} shards of {arguments.samples:,} images, {total:,} in use")
        print(f"opening     {seconds:.2f} s; goes on at shard {place[0]}, image {place[1]}")
        print(f"memory      {peak:.0f} MiB at the peak of a fresh process, {before:.0f} of them for its imports")
        source, part = opened(Path(name), arguments.window)
        steps = Steps(arguments.batch_size)
        steps()
        content = {"state_dict": steps.model.state_dict(), "optimizer_states": [steps.optimizer.state_dict()]}
        without, whole = saved(content), saved(content | {"samples_seen": total // 2})
        print(f"checkpoint  {whole - without} bytes for the cursor, of {whole:,}")
        order = ordering(source, part, steps.batch_size, len(part) // 2)
        rounds: list[tuple[float, float]] = []
        for i in range(arguments.rounds + 1):
            times = []
            for number, act in ((1000, lambda: next(order)), (5, steps)):
                started = time.perf_counter()
                for _ in range(number):
                    act()
                times.append((time.perf_counter() - started) / number)
            rounds += [(times[0], times[1])] if i else []  # the first one warms up
        ours, theirs = (1000 * statistics.median(column) for column in zip(*rounds, strict=True))
        what = f"order {ours:.3f} ms, step of model=tiny {theirs:.1f} ms"
        details = f"batch of {steps.batch_size}, {arguments.threads} threads, window {arguments.window}"
        print(f"step        {100 * statistics.median(a / b for a, b in rounds):.2f} % ({what}; {details})")


if __name__ == "__main__":
    main()
