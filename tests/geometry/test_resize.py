import cv2
import numpy as np
import pytest

from depthany.geometry.resize import lower_bound_size, resize_image, resize_label


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
