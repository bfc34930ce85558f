"""How much memory a forward pass takes, told before it runs, and how much there is.

The pass is played on fake tensors (shapes without values) of the same model, so that every encoder is covered and
nothing has to be kept in step with its code.
"""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

LIBRARIES = 64 << 20  # code, thread stacks and scratch that the kernels take at the first pass (measured on CPU)
BLOCK = 16  # oneDNN, the CPU's convolutions, works on copies whose channels are padded to multiples of this
CGROUP = Path("/sys/fs/cgroup")  # limits of a container


def estimate_bytes(model: nn.Module, *, batch: int, height: int, width: int, precision: Literal["fp32", "bf16"]) -> int:
    """Bytes of the weights and of the most activations that are alive at one time, without a gradient.

    Attention is taken to be fused (flash or memory-efficient, as on CPU and CUDA): no tokens x tokens matrix. The
    copies of a CPU's convolutions are counted, other scratch of single kernels is not known; measured peaks above
    200 MB are within 1.5 of the estimate (docs/benchmarks.md).

    Args:
        model: maps (B, 3, H, W) to a tensor; its weights stay as they are.
        batch: images at a time.
        height: of the network input in pixels, a multiple of the patch.
        width: likewise.
        precision: bf16: under autocast, the weights stay float32.
    """
    fake = FakeTensorMode()
    held = [*model.named_parameters(), *model.named_buffers()]
    state: dict[str, Tensor] = {name: fake.from_tensor(value.detach()) for name, value in held}
    device, dtype = ((first := next(iter(state.values()))).device, first.dtype)
    # Nothing here requires a gradient. Were it off, layers would take loops that are slow to play (models/onednn.py).
    with fake, torch.enable_grad(), _Alive(state.values()) as alive:
        image = torch.empty(batch, 3, height, width, device=device, dtype=dtype)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            torch.func.functional_call(model, state, (image,))
    return LIBRARIES + sum(value.nbytes for _, value in held) + alive.peak


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make and that nothing has dropped yet; `peak` is the most of it."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}  # weights: views of them are no news

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and result.device.type == "cpu":
            self.peak = max(self.peak, self.now + _copies(args[0], args[1], result))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._dropped, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _dropped(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


def _copies(image: Tensor, weight: Tensor, result: Tensor) -> int:
    """Bytes that a convolution on the CPU takes while it runs: argument and result in blocks of channels.

    A picture of three channels is read as it lies. Single-threaded 1 x 1 ones in float32 are products: of a copy where
    that is faster (models/onednn.py), of the argument itself elsewhere. All of this was measured.
    """
    if weight.shape[2:].numel() == 1 and image.dtype == torch.float32 and torch.get_num_threads() == 1:
        return image.nbytes + result.nbytes
    padded = [-(-x.shape[1] // BLOCK) * BLOCK * (x.nbytes // x.shape[1]) for x in (image, result)]
    return padded[1] + (padded[0] if image.shape[1] > 3 else 0)


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that may still be taken on a device, None where the system does not tell.

    On a GPU with what this process holds and does not use; in a container the smaller of its limit and the machine's.
    """
    device = torch.device(device)
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used, stat = (
            (CGROUP / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current", "memory.stat")
        )
        cached = next(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))
        return free if limit.strip() == "max" else min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError, StopIteration):
        return free


def require_memory(
    model: nn.Module, *, batch: int, height: int, width: int, precision: Literal["fp32", "bf16"]
) -> None:
    """Refuses a pass that would not fit beside the weights, which are there already.

    Raises:
        ValueError: says how much it needs and how much is free.
    """
    device = next(model.parameters()).device
    free = free_bytes(device)
    need = estimate_bytes(model, batch=batch, height=height, width=width, precision=precision)
    need -= sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    if free is not None and need > free:
        times = f"{batch} x " if batch > 1 else ""
        raise ValueError(
            f"a network input of {times}{width} x {height} pixels needs about {need / 1e9:.1f} GB on {device}, "
            f"{free / 1e9:.1f} GB are free"
        )
