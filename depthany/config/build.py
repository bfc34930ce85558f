"""Builds what a checked config describes."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig


def build(node: DictConfig | None, **given: Any) -> Any:
    """Instantiates a `_target_` (or a mapping of them) with plain containers; what a verb hands in comes in `given`.

    Given objects bypass Hydra, which would turn dataclasses into dictionaries.
    """
    if node is None or not given:
        return None if node is None else instantiate(node, _convert_="all")
    return instantiate(node, _convert_="all", _partial_=True)(**given)


def run_dir() -> Path:
    """The folder of this run, named by its choices and seed."""
    return Path(HydraConfig.get().runtime.output_dir)


def choice(group: str) -> str | None:
    """Which option of a group was chosen."""
    chosen = HydraConfig.get().runtime.choices.get(group)
    return None if chosen in (None, "null") else str(chosen)


def is_sweep() -> bool:
    """Whether this is a job of a multirun."""
    mode = HydraConfig.get().mode
    return mode is not None and mode.name == "MULTIRUN"
