from itertools import product

import cv2
import numpy as np
import pytest

from depthany.geometry.resize import (
    Crop,
    crop_image,
    crop_pixels,
    fit_size,
    lower_bound_size,
    network_input,
    normalised,
    resize_image,
    resize_label,
)
from depthany.inference.predictor import Predictor
from depthany.models.depth_model import DepthModel
from depthany.types import IMAGENET_MEAN, IMAGENET_STD


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [  # network inputs (width, height) of the usual test sets
        (640, 480, 518, (686, 518)),
        (1242, 375, 518, (1722, 518)),
        (1216, 352, 518, (1792, 518)),
        (1216, 352, 1036, (3584, 1036)),
        (1024, 436, 518, (1218, 518)),
        (2048, 1365, 518, (784, 518)),
        (777, 518, 518, (784, 518)),  # 55.5 patches: half to even
        (763, 518, 518, (756, 518)),  # 54.5 patches: half to even
        (6048, 4032, 518, (770, 518)),  # 518 / 4032 * 6048 is 776.9999... in the official code too
        (518, 518, 518, (518, 518)),
        (375, 1242, 518, (518, 1722)),
        (200, 100, 520, (1036, 532)),  # 520 / 14 = 37.1 would fall below: up to 38
    ],
)
def test_official_sizes(width, height, size, expected):
    assert lower_bound_size(height, width, size=size, multiple=14) == expected[::-1]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [(7, 9), (40, 50), (20, 30), (10, 60)])
def test_size_and_dtype(antialias, dtype, size):
    image = (np.random.default_rng(0).random((20, 30, 3)) * 200).astype(dtype)
    out = resize_image(image, size, antialias=antialias)
    assert out.shape == (*size, 3) and out.dtype == dtype
    assert size != (20, 30) or np.array_equal(out, image)


def test_official_rule_is_cubic_and_antialias_averages():
    image = np.random.default_rng(0).random((20, 30, 3)).astype(np.float32)
    cubic = cv2.resize(image, (15, 10), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(resize_image(image, (10, 15), antialias=False), cubic)
    blocks = image.reshape(10, 2, 15, 2, 3).mean((1, 3))
    np.testing.assert_allclose(resize_image(image, (10, 15), antialias=True), blocks, rtol=1e-5)


def plane(height, width):
    """A plane over [0, 24] x [0, 36], sampled at pixel centres."""
    rows = (np.arange(height) + 0.5) * 24 / height
    columns = (np.arange(width) + 0.5) * 36 / width
    grid = 0.01 * rows[:, None] + 0.02 * columns
    return np.repeat(grid[..., None], 3, -1).astype(np.float32)


@pytest.mark.parametrize(
    ("size", "antialias", "tolerance"),
    [
        ((12, 18), True, 1e-6),
        ((8, 9), True, 1e-6),
        # OpenCV's cubic (a = -0.75) bends a ramp by up to a twentieth of a pixel.
        ((48, 72), False, 0.05 * 0.03),
        ((36, 48), False, 0.05 * 0.03),
    ],
)
def test_a_plane_stays_a_plane(size, antialias, tolerance):
    out = resize_image(plane(24, 36), size, antialias=antialias)[4:-4, 4:-4]
    np.testing.assert_allclose(out, plane(*size)[4:-4, 4:-4], atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [(5, 7), (31, 40), (22, 10), (11, 13)])
def test_labels_take_the_pixel_under_the_new_centre(size):
    disparity = np.arange(11 * 13, dtype=np.float32).reshape(11, 13)
    valid = disparity % 3 > 0
    sky = disparity % 7 == 1
    out, out_valid, out_sky = resize_label(disparity, valid, sky, size)
    for i in range(size[0]):
        for j in range(size[1]):
            row, column = int((i + 0.5) * 11 / size[0]), int((j + 0.5) * 13 / size[1])
            assert out[i, j] == disparity[row, column]
    np.testing.assert_array_equal(out_valid, out % 3 > 0)
    np.testing.assert_array_equal(out_sky, out % 7 == 1)
    assert out.dtype == np.float32 and out_valid.dtype == bool


def test_label_flips_with_the_image():
    label = np.random.default_rng(0).random((9, 14)).astype(np.float32)
    mask = label > 0.5
    flipped = resize_label(label[:, ::-1], mask[:, ::-1], mask[:, ::-1], (17, 24))[0]
    np.testing.assert_array_equal(flipped, resize_label(label, mask, mask, (17, 24))[0][:, ::-1])


# Training views


def photo(height, width, seed=0):
    """Edges of full contrast and noise: what shows any shift."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 2, (height // 6 + 1, width // 6 + 1, 3)) * 200
    return (blocks.repeat(6, 0).repeat(6, 1)[:height, :width] + rng.integers(0, 55, (height, width, 3))).astype(
        np.uint8
    )


@pytest.mark.parametrize(("side", "size"), [(40, 40), (40, 20), (40, 80), (40, 60), (48, 36), (300, 30)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_view_is_the_window_of_the_resized_image(side, size, flip):
    """Within 1 grey level, but for two pixels of the image along a side where the window cuts it."""
    step = side // np.gcd(side, size)  # a window that starts there starts at a whole pixel of the resized image
    height, width = side, side + 5 * step
    for transposed, start in product((False, True), range(0, width - side + 1, step)):
        image = photo(height, width)
        image = np.ascontiguousarray(image.swapaxes(0, 1)) if transposed else image
        top, left = (start, 0) if transposed else (0, start)
        view = crop_image(image, Crop(*image.shape[:2], top, left, side, flip), size)
        h, w = (round(n * size / side) for n in image.shape[:2])
        assert h * side == image.shape[0] * size and w * side == image.shape[1] * size  # no rounding of the scale
        first = start * size // side
        window = np.s_[first : first + size, :] if transposed else np.s_[:, first : first + size]
        expected = resize_image(image, (h, w), antialias=False)[window]
        error = np.abs(view.astype(int) - (expected[:, ::-1] if flip else expected))
        near = -(-2 * size // side)
        assert error[near:-near, near:-near].max() <= 1
        if start in (0, width - side):  # one side is the image's own
            error = error[:, ::-1] if flip else error
            error = error.swapaxes(0, 1) if transposed else error
            assert (error[:, :-near] if start == 0 else error[:, near:]).max() <= 1


def cubic(values, size, axis):
    """Bicubic resampling of one axis by the book (a = -0.75), the last pixels repeated beyond the ends."""
    values = np.moveaxis(values, axis, 0)
    centres = (np.arange(size) + 0.5) * len(values) / size - 0.5
    out = np.zeros((size, *values.shape[1:]))
    for tap in range(-1, 3):
        index = np.floor(centres).astype(int) + tap
        x = np.abs(centres - index)
        near = 1.25 * x**3 - 2.25 * x**2 + 1
        far = -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0))
        out += weight[:, None, None] * values[index.clip(0, len(values) - 1)]
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize(("shape", "size"), [((31, 47), 52), ((61, 40), 26), ((33, 33), 32), ((9, 200), 24)])
def test_a_view_of_any_scale_is_exact(shape, size):
    image = photo(*shape)
    side = min(shape)
    for top, left in product({0, shape[0] - side}, {0, 1, shape[1] - side} if shape[1] > side else {0}):
        view = crop_image(image, Crop(*shape, top, left, side, False), size)
        square = image[top : top + side, left : left + side].astype(float)
        expected = cubic(cubic(square, size, 0), size, 1).clip(0, 255)
        assert view.dtype == np.uint8 and np.abs(view - expected).max() <= 1


@pytest.mark.parametrize("shape", [(24, 36), (12, 18), (31, 50), (7, 9)])
@pytest.mark.parametrize("size", [12, 24, 37])
def test_a_label_of_any_size_is_cut_at_the_same_place(shape, size):
    """Each pixel of a view takes the pixel of the label that holds its centre, in the image's field of view."""
    for left, flip in product((0, 5, 12), (False, True)):
        rows, columns = crop_pixels(shape, Crop(24, 36, 0, left, 24, flip), size)
        for i in range(size):
            assert rows[i] == int((i + 0.5) * shape[0] / size)
            j = size - 1 - i if flip else i
            assert columns[i] == int((left + (j + 0.5) * 24 / size) / 36 * shape[1])
        assert rows.flags.c_contiguous and columns.flags.c_contiguous


def test_a_label_as_large_as_the_image_is_untouched_where_nothing_is_resized():
    rows, columns = crop_pixels((24, 36), Crop(24, 36, 0, 7, 24, False), 24)
    assert rows.tolist() == list(range(24)) and columns.tolist() == list(range(7, 31))


def test_the_network_input_is_the_predictors():
    """What an online teacher sees is what the label job shows it."""
    arguments = {"patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 28}
    options = {"features": 8, "out_channels": [8, 8, 8, 8], "hidden": 4, "activation": "relu", "input_size": 28}
    encoder = {"encoder": "vit_tiny_patch16_224", "encoder_arguments": arguments, "taps": [0, 1, 2, 3]}
    model = DepthModel(**encoder, **options, pretrained=False, pos_embed="official")
    predictor = Predictor(model=model, device="cpu", precision="fp32", max_pixels=4000)
    for shape, size in product([(20, 30), (90, 61), (28, 28), (9, 40)], (28, 42)):
        image = photo(*shape)
        given = {"size": size, "multiple": 14, "max_pixels": predictor.max_pixels}
        if lower_bound_size(*shape, size=size, multiple=14)[1] > 4000 // size:
            with pytest.raises(ValueError, match=rf"{shape[1]} x {shape[0]} image .* above 4000 pixels"):
                network_input(image, **given)
            with pytest.raises(ValueError, match="network input"):
                predictor.network_input(image, input_size=size)
        else:
            assert np.array_equal(network_input(image, **given), predictor.network_input(image, input_size=size))


@pytest.mark.parametrize("shape", [(480, 640), (1500, 2000), (90, 61), (252, 336)])
def test_the_input_is_the_official_one(shape):
    """transform.py computes in float64; what OpenCV does elsewhere in the process stays as it was."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    used = cv2.ipp.useIPP()
    official = cv2.resize(image / 255.0, (336, 252), interpolation=cv2.INTER_CUBIC)
    official = (official - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    made = normalised(image, (252, 336), antialias=False)
    assert made.dtype == np.float32 and np.abs(made - official).max() <= 2e-6
    assert cv2.ipp.useIPP() == used


@pytest.mark.parametrize(
    ("height", "width"), [(500, 20000), (20000, 500), (3000, 4000), (518, 518), (1, 10**7), (10**7, 1), (1, 1)]
)
@pytest.mark.parametrize("budget", [196, 300_000, 4_000_000])
def test_a_budget_is_kept_and_so_is_the_shape(height, width, budget):
    official = lower_bound_size(height, width, size=518, multiple=14)
    h, w = fit_size(height, width, size=518, multiple=14, max_pixels=budget)
    assert h * w <= budget and h % 14 == w % 14 == 0 and min(h, w) >= 14
    if official[0] * official[1] <= budget:
        assert (h, w) == official
    elif min(h, w) > 14 * 10:  # sides of many patches: rounding says little
        assert h / w == pytest.approx(height / width, rel=0.1)
        assert h * w > 0.8 * budget
    with pytest.raises(ValueError, match="less than one patch"):
        fit_size(height, width, size=518, multiple=14, max_pixels=195)
