import math

import cv2
import numpy as np
import pytest
import torch

from depthany.metrics.edges import edge_scores


def scene():
    """A sloping floor (no edge) with a box and a disc before it: (1, h, w) disparity in 1/m."""
    rows, columns = np.mgrid[:96, :128].astype(np.float32)
    truth = 0.1 + 0.001 * rows
    truth[20:60, 20:70] = 0.5
    truth[(rows - 60) ** 2 + (columns - 90) ** 2 < 500] = 0.33
    return torch.from_numpy(truth)[None]


def blurred(truth, sigma):
    return torch.from_numpy(cv2.GaussianBlur(truth[0].numpy(), (0, 0), sigma))[None] if sigma else truth


def scores(pred, truth, valid=None):
    valid = torch.ones_like(truth, dtype=torch.bool) if valid is None else valid
    return {k: v.item() for k, v in edge_scores(pred, truth, valid, min_disparity=None).items()}


def depth_pro(pred, truth, t):
    """Precision and recall at one threshold with loops over pixels."""
    hits = found = true = 0
    for r, c in np.ndindex(truth.shape):
        for rr, cc in ((r, c + 1), (r + 1, c), (r, c - 1), (r - 1, c)):
            if 0 <= rr < truth.shape[0] and 0 <= cc < truth.shape[1]:
                ours, theirs = pred[rr, cc] / pred[r, c] > t, truth[rr, cc] / truth[r, c] > t
                hits, found, true = hits + (ours and theirs), found + ours, true + theirs
    return hits / found, hits / true


def test_sharper_is_better_in_any_unit():
    truth = scene()
    values = [scores(3 * blurred(truth, sigma) - 7, 80 * truth) for sigma in (0, 0.6, 1, 2, 4)]
    for name in ("edge_f1", "edge_step"):
        one, *rest = (value[name] for value in values)
        assert one == pytest.approx(1, abs=1e-4)
        assert one > rest[0] > rest[1] > rest[2] > rest[3] >= 0
    assert values[3]["edge_step"] > 0.05


def test_equal_to_loops_over_pixels():
    rng = np.random.default_rng(0)
    truth = rng.choice([0.2, 0.26, 0.4], (9, 11))
    pred = 3 * truth + rng.normal(0, 0.05, truth.shape)
    design = np.stack([pred.ravel(), np.ones(pred.size)], 1)
    fitted = (design @ np.linalg.lstsq(design, truth.ravel(), rcond=None)[0]).reshape(truth.shape)
    f1 = []
    ratios = np.linspace(1.05, 1.25, 10)
    for t in ratios:
        precision, recall = depth_pro(np.maximum(fitted, truth.min()), truth, t)
        f1.append(2 * precision * recall / (precision + recall))
    expected = float(np.average(f1, weights=ratios))
    ones = torch.ones(1, 9, 11, dtype=torch.bool)
    got = edge_scores(torch.from_numpy(pred)[None], torch.from_numpy(truth)[None], ones, min_disparity=None)
    assert got["edge_f1"].item() == pytest.approx(expected, abs=1e-6)


def test_what_shows_no_edge_scores_zero():
    truth = scene()
    moved = torch.roll(truth, 3, dims=2)  # sharp, but elsewhere
    for pred in (-truth, torch.ones_like(truth)):
        assert scores(pred, truth) == {"edge_f1": 0, "edge_step": 0}
    assert scores(moved, truth)["edge_f1"] < 0.5


def test_sparse_truth_and_truth_without_an_edge_are_not_scored():
    truth = scene()
    rng = torch.Generator().manual_seed(0)
    laser = torch.rand(truth.shape, generator=rng) < 0.2
    floor = torch.zeros_like(laser)
    floor[:, 60:, :50] = True
    sky = torch.ones_like(laser)
    sky[:, :15] = False  # a dense label of a part of the image
    for valid in (laser, floor, torch.zeros_like(laser)):
        assert all(math.isnan(value) for value in scores(truth, truth, valid).values())
    assert scores(truth, truth, sky)["edge_f1"] == pytest.approx(1)


def test_every_image_of_a_batch_by_itself():
    truth = torch.cat([scene(), scene().flip(2)])
    pred = torch.cat([blurred(scene(), 1), blurred(scene(), 0)])
    pred[1] = pred[1].flip(1)
    ones = torch.ones_like(truth, dtype=torch.bool)
    both = edge_scores(pred, truth, ones, min_disparity=None)
    for b in range(2):
        one = edge_scores(pred[b : b + 1], truth[b : b + 1], ones[b : b + 1], min_disparity=None)
        for name in one:
            torch.testing.assert_close(both[name][b], one[name][0])
