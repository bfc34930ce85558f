"""The page on which a photo is uploaded and its depth is seen and downloaded.

Legend: H W pixels of the photo, h w pixels of the network input.
"""

import os
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from depthany.config.check import ConfigError
from depthany.data.files import read_image
from depthany.data.sources.photos import SUFFIXES
from depthany.geometry.resize import resize_image
from depthany.inference.depth_map import DepthMap
from depthany.inference.memory import require_memory
from depthany.inference.predictor import Predictor
from depthany.inference.rendering import paint

if TYPE_CHECKING:
    import gradio as gr

COLOUR_MAPS = ("Spectral_r", "inferno", "viridis", "turbo", "gray")
SHOWN_PX = 1280  # longest side of what is sent to the browser; the downloads have the photo's own size
ABOUT = """# depthany
Upload a photo, then drag the line across it. **{name}**, on {device}.
A larger input size gives finer edges, not a more accurate depth, and costs time with its square.
"""
FILES = """The map has the photo's size. **PNG**: 16 bits, 0 where nothing is known, else
low + (code - 1) / 65534 × (high - low), with both numbers in its text chunk `depthany`. **NPY**: the float32 values."""
STYLE = ".gradio-container {max-width: 1500px !important} footer {display: none !important}"


def sizes(predictor: Predictor) -> range:
    """Input sizes to choose from: multiples of the patch, from a quarter to four times the model's own size."""
    patch, own = predictor.patch_size, predictor.input_size
    smallest = max(patch, own // 4 // patch * patch)
    largest = min(4 * own, int(predictor.max_pixels**0.5)) // patch * patch  # a square photo is within max_pixels
    return range(smallest, max(own, largest) + 1, patch)


def describe(depth: DepthMap, shape: tuple[int, int], seconds: float, *, asked: int) -> str:
    """What was done, in a line; a photo that would have been too much got a smaller input."""
    height, width = depth.valid.shape
    low, high = depth.value_range()
    unit = {"disparity": "Disparity (larger is nearer)", "depth": "Depth", "metric": "Depth in metres"}[depth.space]
    less = f", smaller than {asked} asks for, to stay within --max-pixels" if min(shape) < asked else ""
    return (
        f"{width} × {height} photo, {shape[1]} × {shape[0]} network input{less}, {seconds:.2f} s. "
        f"{unit} from {low:.4g} to {high:.4g}."
    )


def shown(pixels: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8, made smaller where it is larger than a screen."""
    scale = SHOWN_PX / max(pixels.shape[:2])
    height, width = (max(1, round(scale * side)) for side in pixels.shape[:2])
    return resize_image(pixels, (height, width), antialias=True) if scale < 1 else pixels


def build(predictor: Predictor, *, name: str, folder: Path) -> "gr.Blocks":
    """The page.

    Args:
        predictor: its `max_pixels` bounds the network input; the page says where that made it smaller.
        name: of the model, for the heading.
        folder: takes the files that are downloaded.

    Raises:
        ConfigError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError("the page needs pip install 'depthany[demo]'") from error

    def predict(path: str | None, size: int) -> tuple[Any, str, Any, Any]:
        """The photo and its map, a line about them, and the two files."""
        nothing = gr.DownloadButton(value=None, interactive=False)
        if path is None:
            return None, "No photo yet.", nothing, nothing
        try:
            photo = read_image(Path(path).read_bytes())
            asked = None if size == predictor.input_size else size  # as predict without --input-size
            shape = predictor.input_shape(*photo.shape[:2], input_size=asked)
            if size > predictor.input_size:  # the model's own size is taken to fit: telling takes a moment
                height, width = shape
                require_memory(predictor.model, batch=1, height=height, width=width, precision=predictor.precision)
            started = time.perf_counter()
            depth = predictor.predict(photo, input_size=asked)
            seconds = time.perf_counter() - started
        except (ValueError, OSError) as error:  # a DecodeError is a ValueError
            return None, f"⚠ **{Path(path).name}**: {error}", nothing, nothing
        except torch.OutOfMemoryError:
            return None, f"⚠ **{Path(path).name}**: out of memory; choose a smaller input size", nothing, nothing
        target = Path(mkdtemp(dir=folder))
        kind = "disparity" if depth.near_is_large else "depth"  # as in the files of predict
        files = [target / f"{Path(path).stem}{suffix}" for suffix in (f".{kind}16.png", ".npy")]
        for file in files:
            depth.save(file)
        png, npy = (gr.DownloadButton(value=file, interactive=True) for file in files)
        return (photo, depth), describe(depth, shape, seconds, asked=size), png, npy

    def colour(result: tuple[np.ndarray, DepthMap] | None, cmap: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Photo and coloured map, one behind the other."""
        if result is None:
            return None
        photo, depth = result
        return shown(photo), shown(paint(depth, cmap=cmap))

    choice = sizes(predictor)
    with gr.Blocks(title="depthany", analytics_enabled=False) as page:
        gr.Markdown(ABOUT.format(name=name, device=predictor.device))
        result = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo = gr.File(label="Photo", file_types=sorted(SUFFIXES), height=150)
                size = gr.Slider(
                    minimum=choice[0],
                    maximum=choice[-1],
                    value=predictor.input_size,
                    step=choice.step,
                    label="Input size",
                    info="short side in pixels",
                )
                cmap = gr.Dropdown(list(COLOUR_MAPS), value=COLOUR_MAPS[0], label="Colours")
                with gr.Row():
                    png = gr.DownloadButton("16-bit PNG", interactive=False, min_width=100)
                    npy = gr.DownloadButton("NPY", interactive=False, min_width=100)
                gr.Markdown(FILES)
            with gr.Column(scale=3, min_width=480):
                view = gr.ImageSlider(label="Photo | depth", interactive=False, max_height=720, format="jpeg")
                said = gr.Markdown("No photo yet.")
        gr.on(
            [photo.change, size.change],
            predict,
            [photo, size],
            [result, said, png, npy],
            trigger_mode="always_last",  # while the handle is dragged, the last place counts
            show_progress_on=view,
        ).then(colour, [result, cmap], view, show_progress="hidden")
        cmap.change(colour, [result, cmap], view, show_progress="hidden")
    return page


def serve(predictor: Predictor, *, name: str, host: str, port: int, share: bool) -> None:
    """Shows the page until the process is interrupted; uploads and results are deleted when it ends.

    Raises:
        ConfigError: gradio is not installed, or the port is taken.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which gradio takes for the end
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with TemporaryDirectory(prefix="depthany-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(predictor, name=name, folder=Path(folder))
        import gradio as gr

        sans = ("system-ui", "sans-serif")  # nothing is fetched from elsewhere
        theme = gr.themes.Soft(primary_hue="indigo", font=sans, font_mono=("ui-monospace", "monospace"))
        try:
            _, local, public = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                theme=theme,
                css=STYLE,
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
            print(f"page: {public or local} (Ctrl-C ends it)", flush=True)
            page.block_thread()
        except OSError as error:
            raise ConfigError(f"--port {port} of --host {host} is taken or not to be had: name another") from error
