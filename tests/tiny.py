"""The model of `model=tiny`, which most tests of whole models take."""

from omegaconf import OmegaConf

from depthany.config.launch import config_dir
from depthany.models.depth_model import DepthModel


def tiny_model() -> DepthModel:
    """With random weights; patches of 8, trained at 56."""
    arguments = OmegaConf.to_container(OmegaConf.load(config_dir() / "model" / "tiny.yaml"))
    return DepthModel(**{name: value for name, value in arguments.items() if name != "_target_"})
