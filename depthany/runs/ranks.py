"""Which process of a run this is, whoever started it (torchrun, srun or Lightning), and what rank 0 does alone."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig

from depthany.config.check import ConfigError
from depthany.data.claims import STALE_S, Claim, claim, holder


def join(trainer: DictConfig) -> bool:
    """Brings together the processes that torchrun or srun have started; whether this is the main one.

    Under srun, sets the variables that torchrun would have set. Lightning's own launcher starts the other processes
    when rank 0 begins to fit: then there is nobody to meet yet.

    Args:
        trainer: the options of that name.

    Raises:
        ConfigError: as many processes were started as trainer.devices and trainer.num_nodes do not say.
    """
    if "RANK" not in os.environ and SLURMEnvironment.detect():
        try:
            slurm = SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise ConfigError(str(error)) from error
        ranks = {"RANK": slurm.global_rank(), "LOCAL_RANK": slurm.local_rank(), "WORLD_SIZE": slurm.world_size()}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
    asked = f"trainer.devices={trainer.devices} trainer.num_nodes={trainer.num_nodes}"
    if "RANK" not in os.environ:
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"{asked}: start it with torchrun or srun on every machine, which tell them of each other"
            )
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    world = int(os.environ["WORLD_SIZE"])
    if str(trainer.devices).isdigit() and int(trainer.devices) * trainer.num_nodes != world:
        raise ConfigError(f"{asked}, but {world} processes were started: devices x num_nodes has to be {world}")
    if world > 1:  # Lightning takes it over
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    return os.environ["RANK"] == "0"


@contextmanager
def claimed(run_dir: Path, *, main: bool) -> Iterator[Claim | None]:
    """Holds the run folder while the block lasts; the other ranks hold nothing.

    Raises:
        ConfigError: a run that is alive holds it, or it cannot be written.
    """
    if not main:
        yield None
        return
    ends: float | None = None
    while (mine := _claim(run_dir)) is None:
        owner = holder(run_dir, stale_s=STALE_S)
        if owner is None:
            continue  # it has just ended
        if owner.here or (ends is not None and time.monotonic() > ends):
            raise ConfigError(
                f"{run_dir} is in use by {owner}, which is alive: wait for its end, or stop it there "
                f"(kill {owner.pid}); a second run needs another folder: another seed, or paths.runs=DIR"
            )
        if ends is None:  # its machine may be gone
            print(f"{run_dir} is claimed by {owner}: waiting {STALE_S:.0f} s for a sign of life", flush=True)
            ends = time.monotonic() + STALE_S + 1
        time.sleep(1)
    with mine:
        try:
            yield mine
        finally:
            with suppress(OSError):
                run_dir.rmdir()  # what was refused leaves no empty folder


def _claim(run_dir: Path) -> Claim | None:
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        return claim(run_dir, stale_s=STALE_S)
    except OSError as error:
        raise ConfigError(
            f"{run_dir.parent} cannot be written ({error.strerror}): name another as paths.runs"
        ) from error


@contextmanager
def main_first(*, main: bool, checkpoint: Path | None) -> Iterator[Path | None]:
    """Where every rank starts at once, the others wait until rank 0 has packed and labelled, however long.

    Yields:
        The checkpoint of rank 0: other machines may not see the newest file yet.
    """
    if not torch.distributed.is_initialized():
        yield checkpoint
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    if main:
        store.set("checkpoint", str(checkpoint or ""))
    else:
        try:
            store.wait(["prepared"], timedelta(days=7))
        except RuntimeError as error:
            raise SystemExit("rank 0 has ended before it was ready: what it says is the reason") from error
        given = store.get("checkpoint").decode()
        checkpoint = Path(given) if given else None
    yield checkpoint
    if main:
        store.set("prepared", "yes")
