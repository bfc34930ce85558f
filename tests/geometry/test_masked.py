import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from depthany.geometry import masked

B, N = 4, 37
REDUCTIONS = [
    masked.masked_mean,
    masked.masked_median,
    lambda x, v: masked.masked_min_max(x, v)[0],
    lambda x, v: masked.masked_min_max(x, v)[1],
]


def draw(dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(B, N, generator=rng, dtype=dtype)
    valid = torch.rand(B, N, generator=rng) > 0.4
    return x, valid


def test_equal_to_slow_loops():
    x, valid = draw()
    for b in range(B):
        values = sorted(x[b, i].item() for i in range(N) if valid[b, i])
        assert_close(masked.masked_mean(x, valid)[b].item(), sum(values) / len(values))
        assert masked.masked_median(x, valid)[b].item() == values[(len(values) - 1) // 2]
        assert masked.masked_min_max(x, valid)[0][b].item() == values[0]
        assert masked.masked_min_max(x, valid)[1][b].item() == values[-1]


def test_the_median_ignores_the_holes():
    x = torch.full((1, 100), 5.0)
    valid = torch.arange(100)[None] < 10  # the median with zeros in the holes would be 0
    assert masked.masked_median(x, valid).item() == 5


def test_both_median_selections_agree():
    x, valid = draw()
    valid[0, :] = True
    a, b = masked._median_by_selection(x, valid), masked._median_by_sort(x, valid)
    assert_close(x.gather(1, a[:, None]), x.gather(1, b[:, None]))
    valid[1] = False
    assert masked._median_by_sort(x, valid).shape == (B,)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_empty_mask_gives_zero_and_zero_gradient(reduce):
    x = torch.full((2, 3, 5), torch.nan, requires_grad=True)
    value = reduce(x, torch.zeros(2, 3, 5, dtype=torch.bool))
    value.sum().backward()
    assert value.tolist() == [0, 0]
    assert not x.grad.any()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_gradients(reduce):
    x, valid = draw()
    assert gradcheck(lambda y: reduce(y, valid), x.requires_grad_())


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_hides_behind_the_mask_reaches_neither_value_nor_gradient(reduce, poison):
    x, valid = draw()
    x.requires_grad_()
    clean = reduce(x, valid)
    poisoned = reduce(torch.where(valid, x, poison), valid)
    assert_close(clean, poisoned)
    (gradient,) = torch.autograd.grad(poisoned.sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[~valid].any()


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.5])
def test_the_largest_share_is_dropped_per_image(fraction):
    x, valid = draw()
    kept = masked.without_largest(x, valid, torch.full((B,), fraction))
    assert not (kept & ~valid).any()
    for b in range(B):
        count = int(valid[b].sum())
        assert int(kept[b].sum()) == count - round(fraction * count)
        dropped = valid[b] & ~kept[b]
        assert not dropped.any() or x[b][dropped].min() > x[b][kept[b]].max()


def test_shares_differ_between_images_and_ties_are_kept_whole():
    x, valid = draw()
    x[2] = 7.0
    kept = masked.without_largest(x, valid, torch.tensor([0.0, 0.5, 0.5, 1.0]))
    assert kept[0].equal(valid[0])
    assert kept[1].sum() < valid[1].sum()
    assert kept[2].equal(valid[2])  # nothing lies strictly below: keep all
    assert kept[3].equal(valid[3])


def test_dropping_from_an_empty_mask():
    valid = torch.zeros(1, 8, dtype=torch.bool)
    assert not masked.without_largest(torch.rand(1, 8), valid, torch.tensor([0.1])).any()
