"""Inference by oneDNN: the same numbers as torch's own kernels, and only where it may be used."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from depthany.models import onednn
from depthany.models.depth_model import DepthModel

pytestmark = pytest.mark.skipif(not onednn.HELPS, reason="no x86 processor with AVX-512: torch's own kernels are kept")
EVA = {"encoder": "vit_small_patch16_dinov3", "pos_embed": "timm"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The more threads, the more tokens it takes until attention is oneDNN's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Calls(TorchDispatchMode):
    """Counts oneDNN's products."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


def both(model: nn.Module, images: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor, int]:
    """The map by torch's own kernels, that by oneDNN, and how many of its products that took."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        own = model(images).detach().float()
        with torch.no_grad(), Calls() as calls:
            return own, model(images).float(), calls.products


@pytest.mark.parametrize("changes", [{}, EVA])
@pytest.mark.parametrize("size", [(48, 64), (208, 240)])  # 49 tokens: attention stays torch's; 781: it does not
def test_maps_differ_by_rounding_alone(tiny, changes, size):
    model = DepthModel(**{**tiny, **changes}).eval()
    images = torch.randn(2, 3, *size)
    own, fast, products = both(model, images, torch.float32)
    assert products and own.std() > 0
    assert (fast - own).abs().max() <= 1e-4 * own.std()


def test_bfloat16_is_as_near_to_float32_as_with_the_own_kernels(tiny):
    model = DepthModel(**tiny).eval()
    images = torch.randn(2, 3, 208, 240)
    exact, _, _ = both(model, images, torch.float32)
    own, fast, products = both(model, images, torch.bfloat16)
    assert products
    assert (fast - exact).square().mean() <= 1.5 * (own - exact).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(dtype, monkeypatch):
    """Against float64, on sharp scores, in slices of which the last is shorter; as exact as torch's own."""
    monkeypatch.setattr(onednn, "SCORES", 0)
    queries, keys, values = (torch.randn(2, 700, 3, 16, dtype=dtype).transpose(1, 2) for _ in range(3))
    exact = F.scaled_dot_product_attention(4 * queries.double(), keys.double(), values.double())
    own = F.scaled_dot_product_attention(4 * queries, keys, values)
    with torch.no_grad(), onednn.OneDNN(), Calls() as calls:
        fast = F.scaled_dot_product_attention(4 * queries, keys, values)
        masked = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    assert calls.products == 2 * 3 * 6 * 2  # images, heads, slices of 128 queries, products
    assert fast.stride() == own.stride() and fast.dtype == dtype
    assert (fast - exact).abs().mean() <= 2 * (own - exact).abs().mean()
    assert_close(masked, F.scaled_dot_product_attention(queries, keys, values, is_causal=True))


def test_training_and_traces_keep_the_own_kernels(tiny):
    model = DepthModel(**tiny)
    with Calls() as calls:
        model(torch.randn(1, 3, 56, 56)).sum().backward()
    assert not calls.products
    with torch.no_grad():
        traced = torch.jit.trace(model.eval(), torch.randn(1, 3, 56, 56), check_trace=False)
        exported = torch.export.export(model, (torch.randn(1, 3, 56, 56),))
    assert "mkldnn" not in str(traced.inlined_graph)
    assert not any("mkldnn" in str(node.target) or "depthany" in str(node.target) for node in exported.graph.nodes)


def test_a_compiled_model_is_one_graph_with_the_same_products(tiny):
    model = DepthModel(**tiny).eval()
    images = torch.randn(1, 3, 48, 64)
    torch.compiler.reset()
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True)  # a break of the graph is an error
        assert_close(compiled(images), model(images), rtol=0, atol=1e-6)
        with Calls() as calls:
            model(images)
    assert calls.products
