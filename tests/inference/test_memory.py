"""The estimate against what can be counted by hand, and against what processes really take."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from depthany.inference import memory
from depthany.inference.memory import LIBRARIES, estimate_bytes, free_bytes, require_memory
from depthany.models.encoder import Encoder

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_memory.py"


def activations(model: nn.Module, **options: int | str) -> int:
    weights = sum(value.nbytes for value in model.parameters())
    return estimate_bytes(model, **{"batch": 1, "precision": "fp32", **options}) - weights - LIBRARIES


def test_what_can_be_counted_by_hand() -> None:
    """At the ReLU alive are the image (3 channels), its argument and its result (32 each)."""
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 3, stride=5))
    assert activations(model, height=1000, width=2000) == pytest.approx(4 * 67 * 2_000_000, rel=2e-2)
    assert activations(model, height=1000, width=2000, batch=3) == pytest.approx(3 * 4 * 67 * 2_000_000, rel=2e-2)
    # Under autocast only the image stays float32; the weights' copies in bfloat16 are a few hundred bytes.
    half = activations(model, height=1000, width=2000, precision="bf16")
    assert half == pytest.approx((4 * 3 + 2 * 64) * 2_000_000, rel=2e-2)


def test_convolutions_of_few_channels_work_on_padded_copies() -> None:
    """24 and 12 channels in blocks of 16: 32 and 16, beside the argument; the plain result is made afterwards."""
    for channels, copies in ((24, 32 + 16), (32, 32 + 16)):
        model = nn.Conv2d(channels, 12, 3, padding=1)
        given = nn.Sequential(nn.Conv2d(3, channels, 1), model)
        assert activations(given, height=400, width=500) == 4 * (3 + channels + copies) * 200_000


def test_attention_keeps_no_matrix_of_tokens_and_the_model_stays_as_it_is() -> None:
    arguments = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3, "img_size": 56}
    encoder = Encoder(
        name="vit_tiny_patch16_224", taps=[0, 1], pretrained=False, pos_embed="official", arguments=arguments
    ).eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    small, large = (activations(encoder, height=side, width=side) for side in (512, 2048))
    assert large == pytest.approx(16 * small, rel=0.02)  # 65,536 tokens; their matrix would be 51 GB
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert not any(p.requires_grad and p.grad is not None for p in encoder.parameters())


def test_what_does_not_fit_is_refused_in_words() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1))
    assert free_bytes("cpu") is None or free_bytes("cpu") > 1e8
    require_memory(model, batch=1, height=8, width=8, precision="fp32")
    if free_bytes("cpu"):
        with pytest.raises(ValueError, match=r"input of 2 x 3000000 x 100000 pixels needs about \d+\.\d GB on cpu"):
            require_memory(model, batch=2, height=100_000, width=3_000_000, precision="fp32")


@pytest.mark.skipif(not free_bytes("cpu"), reason="this system does not tell its free memory")
def test_a_container_has_no_more_than_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = free_bytes("cpu")
    assert machine is not None
    (tmp_path / "memory.current").write_text("30000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 10000000\n")
    (tmp_path / "memory.max").write_text("50000000\n")
    assert free_bytes("cpu") == 30_000_000  # the file cache makes room
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu") == pytest.approx(machine, rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident sizes are read from /proc")
@pytest.mark.parametrize("size", [392, 644])
def test_a_real_pass_takes_what_was_told(size: int) -> None:
    command = [sys.executable, SCRIPT, "--model", "vits", "--sizes", str(size), "--precision", "fp32"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = json.loads(printed.splitlines()[-1])
    assert 1 / 1.5 < row["estimate"] / row["peak"] < 1.5, row
