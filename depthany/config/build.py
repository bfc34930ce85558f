"""Builds what a checked config describes."""

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from depthany.config.check import ConfigError


def build(node: DictConfig | None, **given: Any) -> Any:
    """Instantiates a `_target_` (or a mapping of them) with plain containers; what a verb hands in comes in `given`.

    Given objects bypass Hydra, which would turn dataclasses into dictionaries.

    Raises:
        ConfigError: a constructor refuses a value.
    """
    if node is None:
        return None
    try:
        if not given:
            return instantiate(node, _convert_="all")
        return instantiate(node, _convert_="all", _partial_=True)(**given)
    except InstantiationException as error:  # Hydra wraps what a constructor says
        if isinstance(error.__cause__, ValueError):
            raise ConfigError(str(error.__cause__)) from error
        raise


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
