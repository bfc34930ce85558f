"""Laws of the procedural scenes: reproducible, exact depth, two styles."""

from math import cos, hypot, inf, isinf, radians, sin, sqrt, tan

import numpy as np
import pytest

from depthany.data.scenes import Primitive, Scene, render

STYLES = ("a", "b")


def _draw(style: str, index: int, size: int = 56, seed: int = 3) -> Scene:
    return render(style=style, seed=seed, index=index, size=size)


@pytest.fixture(scope="module")
def many() -> dict[str, list[Scene]]:
    return {style: [_draw(style, index) for index in range(60)] for style in STYLES}


def _ray(camera: dict[str, float], size: int, row: int, column: int) -> tuple[float, float, float]:
    """World direction of a pixel centre with camera z = 1: roll, then pitch."""
    half = tan(radians(camera["fov_deg"]) / 2)
    x = ((column + 0.5) / size * 2 - 1) * half
    y = (1 - (row + 0.5) / size * 2) * half
    roll, pitch = radians(camera["roll_deg"]), radians(camera["pitch_deg"])
    x, y = x * cos(roll) - y * sin(roll), x * sin(roll) + y * cos(roll)
    return x, y * cos(pitch) + sin(pitch), cos(pitch) - y * sin(pitch)


def _first_hit(body: Primitive, eye: tuple[float, ...], ray: tuple[float, ...]) -> float:
    """Smallest positive ray parameter on the surface, by face planes and the quadratic formula."""
    c, s = cos(body.yaw_rad), sin(body.yaw_rad)
    o = [e - m for e, m in zip(eye, body.center, strict=True)]
    d = list(ray)
    o[0], o[2] = c * o[0] - s * o[2], s * o[0] + c * o[2]
    d[0], d[2] = c * d[0] - s * d[2], s * d[0] + c * d[2]
    found = []

    def on_plane(axis: int, at: float) -> None:
        if d[axis] == 0:
            return
        t = (at - o[axis]) / d[axis]
        p = [oo + t * dd for oo, dd in zip(o, d, strict=True)]
        if body.kind == "cylinder":
            inside = hypot(p[0], p[2]) <= body.half[0]
        else:
            inside = all(abs(p[k]) <= body.half[k] for k in range(3) if k != axis)
        if inside and t > 0:
            found.append(t)

    def on_round(axes: tuple[int, ...]) -> None:
        qa = sum(d[k] ** 2 for k in axes)
        qb = sum(o[k] * d[k] for k in axes)
        root = qb**2 - qa * (sum(o[k] ** 2 for k in axes) - body.half[0] ** 2)
        if root < 0:
            return
        for t in ((-qb - sqrt(root)) / qa, (-qb + sqrt(root)) / qa):
            if t > 0 and (len(axes) == 3 or abs(o[1] + t * d[1]) <= body.half[1]):
                found.append(t)

    if body.kind == "ground":
        on_plane(1, 0.0)
    elif body.kind == "sphere":
        on_round((0, 1, 2))
    elif body.kind == "cylinder":
        on_round((0, 2))
        for at in (-body.half[1], body.half[1]):
            on_plane(1, at)
    else:
        for axis in range(3):
            for at in (-body.half[axis], body.half[axis]):
                on_plane(axis, at)
    return min(found, default=inf)


@pytest.mark.parametrize("style", STYLES)
def test_depth_is_the_first_hit_and_sky_is_where_nothing_is_hit(style: str) -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for index in range(12):
        scene = _draw(style, index)
        eye = (0.0, scene.camera["height_m"], 0.0)
        for row, column in rng.integers(56, size=(60, 2)).tolist():
            ray = _ray(scene.camera, 56, row, column)
            hits = [_first_hit(body, eye, ray) for body in scene.primitives]
            expected, found = min(hits), float(scene.depth[row, column])
            assert isinf(expected) == isinf(found)
            if not isinf(expected):
                assert found == pytest.approx(expected, rel=1e-4)
                seen.add(scene.primitives[hits.index(expected)].kind)
    assert seen == {"ground", "room", "box", "sphere", "cylinder"}


@pytest.mark.parametrize("style", STYLES)
def test_same_arguments_give_the_same_bits_in_any_order(style: str) -> None:
    first = _draw(style, 5)
    others = [_draw(style, index) for index in (4, 6)] + [_draw(style, 5, seed=4)]
    again = _draw(style, 5)
    assert first.camera == again.camera and first.primitives == again.primitives
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.depth, again.depth)
    for other in others:
        assert first.primitives != other.primitives
        assert not np.array_equal(first.image, other.image)


def test_the_styles_of_one_index_are_different_scenes() -> None:
    assert _draw("a", 5).primitives != _draw("b", 5).primitives


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [32, 56, 112])
def test_size_changes_the_sampling_and_not_the_scene(style: str, size: int) -> None:
    scene, reference = _draw(style, 7, size), _draw(style, 7)
    assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
    assert scene.depth.shape == (size, size) and scene.depth.dtype == np.float32
    assert scene.camera == reference.camera and scene.primitives == reference.primitives


@pytest.mark.parametrize("style", STYLES)
def test_values_are_in_range(style: str, many: dict[str, list[Scene]]) -> None:
    depth = np.stack([scene.depth for scene in many[style]])
    assert depth.dtype == np.float32
    assert not np.isnan(depth).any() and (depth > 0).all()
    usual = (depth > 0.5) & (depth < 60)
    assert usual[np.isfinite(depth)].mean() > 0.95
    low, high = (40, 90) if style == "b" else (50, 75)
    assert all(low <= scene.camera["fov_deg"] <= high for scene in many[style])
    assert all(image.std() > 4 for image in (scene.image for scene in many[style]))


@pytest.mark.parametrize("style", STYLES)
def test_some_images_have_sky_and_some_have_none(style: str, many: dict[str, list[Scene]]) -> None:
    sky = [np.isinf(scene.depth).any() for scene in many[style]]
    assert 0.2 < np.mean(sky) < 0.8


@pytest.mark.parametrize("style", STYLES)
def test_objects_fill_a_good_part_of_the_view(style: str, many: dict[str, list[Scene]]) -> None:
    shares = []
    for scene in many[style]:
        bare = scene.primitives[:1]
        eye = (0.0, scene.camera["height_m"], 0.0)
        pixels = [(row, column) for row in range(3, 56, 7) for column in range(3, 56, 7)]
        empty = [_first_hit(bare[0], eye, _ray(scene.camera, 56, row, column)) for row, column in pixels]
        full = [scene.depth[pixel] for pixel in pixels]
        shares.append(np.mean([f < 0.999 * e for f, e in zip(full, empty, strict=True)]))
    assert np.median(shares) > 0.1 and np.mean(np.array(shares) > 0.02) > 0.9


@pytest.mark.parametrize("style", STYLES)
def test_the_camera_is_inside_the_room_and_outside_everything_else(style: str, many: dict[str, list[Scene]]) -> None:
    for scene in many[style]:
        shell, *bodies = scene.primitives
        height_m = scene.camera["height_m"]
        assert height_m > 0
        if shell.kind == "room":
            c, s = cos(shell.yaw_rad), sin(shell.yaw_rad)
            x, z = -shell.center[0], -shell.center[2]
            assert abs(c * x - s * z) < shell.half[0] and abs(s * x + c * z) < shell.half[2]
            assert height_m < 2 * shell.half[1]
        for body in bodies:
            wide = body.half[0] if body.kind != "box" else hypot(body.half[0], body.half[2])
            assert hypot(body.center[0], body.center[2]) > wide


def test_the_styles_look_different(many: dict[str, list[Scene]]) -> None:
    def looks(style: str) -> tuple[float, float, float]:
        images = np.stack([scene.image for scene in many[style]]) / 255.0
        grain = np.median(np.abs(np.diff(images, 2, axis=2)))
        spread = images.max(-1) - images.min(-1)
        return float(images.mean()), float(grain), float(np.median(spread))

    (light_a, grain_a, _), (light_b, grain_b, _) = looks("a"), looks("b")
    assert light_a > light_b
    assert grain_b > 3 * grain_a


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"style": "c"}, "style"),
        ({"seed": -1}, "seed"),
        ({"index": -1}, "index"),
        ({"size": 4}, "size"),
    ],
)
def test_arguments_out_of_range_are_named(change: dict[str, object], named: str) -> None:
    arguments = {"style": "a", "seed": 0, "index": 0, "size": 32, **change}
    with pytest.raises(ValueError, match=named):
        render(**arguments)
