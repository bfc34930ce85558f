"""depthany: the open training framework for monocular depth in the style of Depth Anything."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthany.runs.find import load_model

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """`depthany.load_model`, imported when it is asked for: importing depthany alone takes no time."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from depthany.runs.find import load_model

    return load_model
