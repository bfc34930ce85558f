"""depthany: the open training framework for monocular depth in the style of Depth Anything."""

__version__ = "0.1.0"
