"""The model for other runtimes: ONNX with free batch and size, pictures in and out if wanted, and TorchScript.

Legend: B batch, H W pixels, h w patches, C channels.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from depthany.geometry.resize import MAX_INPUT_PIXELS
from depthany.models.depth_model import DepthModel
from depthany.models.encoder import Encoder
from depthany.types import IMAGENET_MEAN, IMAGENET_STD

OPSET = 18  # the oldest whose Resize has all that is needed here, so the most runtimes
PROTOBUF_LIMIT = 1_900_000_000  # bytes; above it the weights lie in a second file, NAME.onnx.data
EXAMPLE = (2, 3, 5, 7)  # B, 3, h, w of the image that is traced: sides that nothing else has


class GraphModel(nn.Module):
    """Disparity (B, H, W) of normalised images (B, 3, H, W), written so that tracing fixes no size.

    The arithmetic is the model's own. Only the resampling of its position grid is written as a product with matrices
    that the graph makes from the size: `interpolate` by a scale factor needs a number before the graph runs.

    Args:
        model: on the CPU; its weights are shared, not copied.
    """

    def __init__(self, model: DepthModel):
        super().__init__()
        encoder = copy.copy(model.pretrained)
        encoder.__class__ = _GraphEncoder
        self.model = copy.copy(model)
        self.model._modules = {**model._modules, "pretrained": encoder}
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H, W)."""
        return self.model(image)


class _GraphEncoder(Encoder):
    def _positions(self, h: int, w: int) -> Tensor:
        assert self.pos_embed is not None
        (rows, columns), prefix = self.patch_embed.grid_size, self._embedded_prefix
        grid = self.pos_embed[:, prefix:].float().unflatten(1, (rows, columns))  # (1, rows * columns, C)
        new = [_count(side, grid) for side in (h, w)]
        sides = [numbers[-1] + 1 for numbers in new]  # h and w as tensors
        official = self.pos_embed_rule == "official"
        if official:  # the stored grid is taken as it is, any other gets the 0.1
            stored = (sides[0] == rows) & (sides[1] == columns)
            sides = [side + 0.1 * ~stored for side in sides]
        down, across = (
            resampling(numbers, _count(old, grid), old / side, antialias=not official)
            for numbers, old, side in zip(new, (rows, columns), sides, strict=True)
        )
        patches = torch.einsum("hr,brkc,wk->bhwc", down, grid, across).flatten(1, 2)  # (1, h * w, C)
        return torch.cat([self.pos_embed[:, :prefix], patches.to(self.pos_embed.dtype)], dim=1)


def _count(length: int, like: Tensor) -> Tensor:
    """0, 1, ... (length,) float32, on the device where the graph runs; a trace fixes that of `arange`."""
    return torch.ones_like(like.flatten()[:1]).expand(length).cumsum(0) - 1


def resampling(new: Tensor, old: Tensor, step: Tensor, *, antialias: bool) -> Tensor:
    """The matrix (new, old) float32 that resamples a line of `old` values as torch's bicubic `interpolate` does.

    Args:
        new: 0, 1, ... for each value that comes out.
        old: 0, 1, ... for each value that goes in.
        step: (), distance of two new values on the old line.
        antialias: `interpolate`'s, which also changes its kernel.
    """
    centre = ((new + 0.5) * step - 0.5)[:, None]  # (new, 1)
    if antialias:
        weights = _cubic((old - centre) / step.clamp(min=1), -0.5)
        return weights / weights.sum(1, keepdim=True)
    taps = centre.floor() + _count(4, old) - 1  # (new, 4); beyond the border its value goes on
    places = taps.clamp(0, len(old) - 1)[:, :, None] == old  # (new, 4, old)
    return (_cubic(centre - taps, -0.75)[:, :, None] * places).sum(1)


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' kernel (1981), 0 from distance 2 on."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def write_onnx(model: DepthModel, path: Path, *, pictures: int | None) -> None:
    """Writes an ONNX file for any batch and size.

    Without `pictures`: `image` (B, 3, H, W) float32, ImageNet-normalised, sides multiples of the patch size, gives
    `disparity` (B, H, W), of a metric model `depth` in metres. With it: `picture` (B, H, W, 3) uint8 RGB of any size
    gives a map of its size, by the official rules: cubic resize to a short side of at least `pictures`, sides rounded
    to the patch size, within MAX_INPUT_PIXELS as `geometry.resize.fit_size` has it, and the map bilinear back to the
    picture's size.

    Args:
        model: on the CPU, in float32.
        path: the file; its folder exists.
        pictures: short side in pixels, or None.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
    """
    import onnx
    import onnxscript  # noqa: F401  # the exporter's, named here so that its absence is known before the work

    patch, output = model.patch_size, "disparity" if model.space == "disparity" else "depth"
    batch, h, w = (torch.export.Dim(name, min=1) for name in ("batch", "h", "w"))
    image = torch.zeros(*EXAMPLE[:2], *(patch * side for side in EXAMPLE[2:]))
    large = sum(value.nbytes for value in model.state_dict().values()) > PROTOBUF_LIMIT
    with _quiet():
        torch.onnx.export(
            GraphModel(model),
            (image,),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=[output],
            dynamic_shapes={"image": {0: batch, 2: patch * h, 3: patch * w}},
            external_data=large,
            verbose=False,
        )
    proto = onnx.load(path, load_external_data=False)
    if pictures is not None:
        _take_pictures(proto, size=pictures, patch=patch, max_pixels=MAX_INPUT_PIXELS, output=output)
    facts = {"model": json.dumps(model.config()), "space": model.space, "patch_size": str(patch)}
    onnx.helper.set_model_props(proto, facts)
    onnx.save(proto, path)


def _take_pictures(
    proto: "onnx.ModelProto",  # type: ignore[name-defined]  # noqa: F821
    *,
    size: int,
    patch: int,
    max_pixels: int,
    output: str,
) -> None:
    """Puts the official pre- and post-processing around a network's graph.

    The numbers are float64 and ties go to the even side, as in NumPy, which the official code uses.
    """
    from onnx import parser

    def vector(values: tuple[float, ...]) -> str:
        return f"<value = float[3, 1, 1] {{{', '.join(map(str, values))}}}>"

    before = parser.parse_graph(f"""
        before (uint8[batch, height, width, 3] picture) => (float[batch, 3, h, w] image) {{
            pre_count = Shape <start = 0, end = 1> (picture)
            pre_whole = Shape <start = 1, end = 3> (picture)
            pre_sides = Cast <to = 11> (pre_whole)
            pre_size = Constant <value = double {{{size}}}> ()
            pre_patch = Constant <value = double {{{patch}}}> ()
            pre_scales = Div (pre_size, pre_sides)
            pre_scale = ReduceMax <keepdims = 1> (pre_scales)
            pre_wanted = Mul (pre_scale, pre_sides)
            pre_patches = Div (pre_wanted, pre_patch)
            pre_near = Round (pre_patches)
            pre_up = Ceil (pre_patches)
            pre_side = Mul (pre_near, pre_patch)
            pre_short = Less (pre_side, pre_size)
            pre_number = Where (pre_short, pre_up, pre_near)
            pre_exact = Mul (pre_number, pre_patch)
            pre_most = Constant <value = double {{{max_pixels}}}> ()
            pre_turn = Constant <value = int64[2] {{1, 0}}> ()
            pre_other = Gather (pre_exact, pre_turn)
            pre_area = Mul (pre_exact, pre_other)
            pre_share = Div (pre_most, pre_area)
            pre_factor = Sqrt (pre_share)
            pre_shrunk = Mul (pre_exact, pre_factor)
            pre_both = Min (pre_exact, pre_other)
            pre_less = Mul (pre_both, pre_factor)
            pre_parts = Div (pre_less, pre_patch)
            pre_whole_parts = Floor (pre_parts)
            pre_rounded = Mul (pre_whole_parts, pre_patch)
            pre_shorter = Max (pre_rounded, pre_patch)
            pre_left = Div (pre_most, pre_shorter)
            pre_within = Min (pre_shrunk, pre_left)
            pre_counts = Div (pre_within, pre_patch)
            pre_whole_counts = Floor (pre_counts)
            pre_down = Mul (pre_whole_counts, pre_patch)
            pre_fitted = Max (pre_down, pre_patch)
            pre_over = Greater (pre_area, pre_most)
            pre_final = Where (pre_over, pre_fitted, pre_exact)
            pre_new = Cast <to = 7> (pre_final)
            pre_three = Constant <value = int64[1] {{3}}> ()
            pre_shape = Concat <axis = 0> (pre_count, pre_three, pre_new)
            pre_bytes = Transpose <perm = [0, 3, 1, 2]> (picture)
            pre_float = Cast <to = 1> (pre_bytes)
            pre_full = Constant <value = float {{255.0}}> ()
            pre_unit = Div (pre_float, pre_full)
            pre_resized = Resize <mode = "cubic", cubic_coeff_a = -0.75> (pre_unit, , , pre_shape)
            pre_mean = Constant {vector(IMAGENET_MEAN)} ()
            pre_std = Constant {vector(IMAGENET_STD)} ()
            pre_centred = Sub (pre_resized, pre_mean)
            image = Div (pre_centred, pre_std)
        }}""")
    after = parser.parse_graph(f"""
        after (float[batch, h, w] network_map) => (float[batch, height, width] {output}) {{
            post_one = Constant <value = int64[1] {{1}}> ()
            post_map = Unsqueeze (network_map, post_one)
            post_shape = Concat <axis = 0> (pre_count, post_one, pre_whole)
            post_resized = Resize <mode = "linear", coordinate_transformation_mode = "align_corners">
                (post_map, , , post_shape)
            {output} = Squeeze (post_resized, post_one)
        }}""")
    graph = proto.graph
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = ["network_map" if name == output else name for name in names]
    nodes = [*before.node, *graph.node, *after.node]
    for field, values in (("node", nodes), ("input", before.input), ("output", after.output)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def write_torchscript(model: DepthModel, path: Path) -> None:
    """Writes a TorchScript file (B, 3, H, W) -> (B, H, W) for any batch and any size of whole patches.

    Args:
        model: on the CPU, in float32.
        path: the file; its folder exists.
    """
    image = torch.zeros(*EXAMPLE[:2], *(model.patch_size * side for side in EXAMPLE[2:]))
    with _quiet():
        torch.jit.trace(GraphModel(model), (image,), check_trace=False).save(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of their own insides, on every channel; their errors are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
