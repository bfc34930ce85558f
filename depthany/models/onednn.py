"""Inference on x86 processors with AVX-512 by oneDNN where torch would call slower kernels.

torch 2.15 on an AMD EPYC, one thread, float32: MKL, which torch takes for `linear`, does 105 GFLOP/s, for it has no
AVX-512 path on AMD's processors; oneDNN, which is part of torch, does 230. torch's attention does 88, in bfloat16 too;
as products by oneDNN it does 150. The results differ by rounding alone.

Legend: B batch, H heads, N tokens, D channels of a head.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

HELPS = torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
SCORES = 700_000  # are in memory at a time, 2.8 MB: with more, large inputs are slower than by torch's attention
ROWS = 128  # queries at a time at least
TOKENS_PER_THREAD = 128  # below, a head is too little work to share, and torch shares out heads instead

Forward = TypeVar("Forward", bound=Callable[..., Any])


def fast_inference(forward: Forward) -> Forward:
    """A module's `forward` that runs in `OneDNN` where no gradient is wanted and its weights are on such a processor.

    Training, exports and other devices are left alone.
    """

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        exported = torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[no-untyped-call]
        cpu = any(weight.device.type == "cpu" for weight in islice(self.parameters(), 1))  # replicas have no weights
        if not (HELPS and cpu) or torch.is_grad_enabled() or exported:
            return forward(self, *args, **kwargs)
        with OneDNN():
            return forward(self, *args, **kwargs)

    return cast(Forward, run)


class OneDNN(TorchFunctionMode):
    """While it is entered, linear layers, 1 x 1 convolutions and attention are products by oneDNN."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What `func` gives, up to rounding."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and _plain_attention(args, kwargs):
            return (_compiled_attention if torch.compiler.is_dynamo_compiling() else _attention)(*args)
        if func is F.linear and not kwargs:
            return _linear(*args)
        if func is torch.conv2d and _pointwise(args, kwargs):
            x, weight, bias = args[:3]
            return _linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias).permute(0, 3, 1, 2)
        return func(*args, **kwargs)


def _pointwise(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """A convolution of 1 x 1 as `nn.Conv2d` calls it: image, weight, bias, stride, padding, dilation, groups."""
    return not kwargs and args[1].shape[2:] == (1, 1) and args[3:] == ((1, 1), (0, 0), (1, 1), 1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)  # torch takes oneDNN for bfloat16
    return (_compiled_product if torch.compiler.is_dynamo_compiling() else _product)(x, weight, bias)


def _plain_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """No mask, no dropout, keys and values as many as queries, in float32 or bfloat16."""
    if len(args) != 3 or any(isinstance(value, Tensor) or value for value in kwargs.values()):
        return False
    queries, keys, values = args
    alike = queries.shape == keys.shape == values.shape and queries.dtype == keys.dtype == values.dtype
    return alike and queries.ndim == 4 and queries.dtype in (torch.float32, torch.bfloat16)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., C), (F, C) and (F,) -> (..., F), contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def _attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """softmax(queries keys^T / sqrt(D)) values, each (B, H, N, D); scores and softmax in float32, as torch has them."""
    batch, heads, tokens, channels = values.shape
    if tokens < TOKENS_PER_THREAD * torch.get_num_threads():
        return F.scaled_dot_product_attention(queries, keys, values)
    made, rows = values.new_empty(batch, tokens, heads, channels), max(ROWS, SCORES // tokens)
    queries = queries.float() * channels**-0.5
    for image in range(batch):
        for head in range(heads):
            key = keys[image, head].float().contiguous()  # (N, D)
            value = values[image, head].T.contiguous()  # (D, N)
            for start in range(0, tokens, rows):
                part = slice(start, start + rows)
                scores = _product(queries[image, head, part], key, None).softmax(-1)  # (rows, N)
                made[image, part, head] = _product(scores.to(value.dtype), value, None)
    return made.transpose(1, 2)


# For torch.compile, which takes oneDNN's product with constant weights only.


@torch.library.custom_op("depthany::product", mutates_args=())
def _compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, bias)


@_compiled_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("depthany::attention", mutates_args=())
def _compiled_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return _attention(queries, keys, values)


@_compiled_attention.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(values.transpose(1, 2).shape).transpose(1, 2)
