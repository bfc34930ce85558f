"""Procedural scenes with exact depth: cast rays at a few convex bodies and shade what they hit.

World frame: x right, y up, z forward, metres; the floor is y = 0 and the camera stands at
(0, height_m, 0). A ray direction keeps camera z = 1, so the ray parameter is the planar depth.
The two styles share a family of geometry and differ in looks, as clean synthetic ("a") and
photo-like ("b") images do.

Legend: H W pixels, N pixels in a flat list, M materials.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, cos, exp, hypot, inf, pi, radians, sin, sqrt, tan
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Style = Literal["a", "b"]
Vec3 = tuple[float, float, float]
Range = tuple[float, float]
Array = NDArray[Any]  # float32
Xyz = Sequence[Any]  # three coordinates, each an Array (N,) or a number

TEXTURES = ("flat", "checker", "stripes", "waves", "noise", "bricks", "marble")
NOISE_CELLS = 64  # side of the periodic value-noise lattice
GENERATOR = 2  # raised with every change that alters a picture: packed sets carry it
CLEARANCE_M = 0.5  # no body is nearer to the camera than this, measured on the floor plan


@dataclass(frozen=True)
class Primitive:
    """One exact body, upright and turned about the vertical.

    `ground` is the plane y = 0. `room` is a box seen from inside. `sphere` and `cylinder` have
    radius `half[0]`. The local coordinates of an offset (x, y, z) from `center` are
    (c x - s z, y, s x + c z), with c and s the cosine and sine of `yaw_rad`.
    """

    kind: Literal["ground", "room", "box", "sphere", "cylinder"]
    center: Vec3  # metres
    half: Vec3  # half extents along the local axes, metres
    yaw_rad: float


@dataclass(frozen=True)
class Scene:
    """A rendered image with its exact label and the geometry that it was made from."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    depth: NDArray[np.float32]  # (H, W) planar depth in metres, > 0; +inf where sky
    camera: dict[str, float]  # fov_deg (horizontal), height_m, pitch_deg (up), roll_deg
    primitives: tuple[Primitive, ...]  # the first one is the ground or the room


@dataclass(frozen=True)
class _Look:
    """The ranges in which a style is drawn, and the shares of its optional effects."""

    fov_deg: Range
    pitch_deg: Range
    roll_deg: float
    num_objects: tuple[int, int]
    num_backdrops: tuple[int, int]  # buildings outdoors, things on the walls indoors
    object_size_m: Range
    textures: tuple[str, ...]
    saturation: Range
    value: Range
    ambient: Range
    light: Range
    light_tint: float
    shadow_share: float
    photo: bool  # dirt, fog, white balance, gamma, vignette, blur and sensor noise


_LOOKS: dict[str, _Look] = {
    "a": _Look(
        fov_deg=(50, 75),
        pitch_deg=(-15, 3),
        roll_deg=0,
        num_objects=(3, 8),
        num_backdrops=(0, 3),
        object_size_m=(0.5, 1.4),
        textures=("flat", "checker", "stripes"),
        saturation=(0.35, 0.85),
        value=(0.45, 1.0),
        ambient=(0.45, 0.7),
        light=(0.3, 0.6),
        light_tint=0.0,
        shadow_share=0.0,
        photo=False,
    ),
    "b": _Look(
        fov_deg=(45, 80),
        pitch_deg=(-20, 5),
        roll_deg=4,
        num_objects=(5, 10),
        num_backdrops=(1, 5),
        object_size_m=(0.35, 1.6),
        textures=("checker", "stripes", "waves", "noise", "noise", "bricks", "marble"),
        saturation=(0.15, 0.65),
        value=(0.35, 1.0),
        ambient=(0.15, 0.45),
        light=(0.6, 1.3),
        light_tint=0.5,
        shadow_share=0.9,
        photo=True,
    ),
}


def render(*, style: Style, seed: int, index: int, size: int) -> Scene:
    """Draw scene number `index` of an endless, reproducible collection.

    Everything but the sensor noise is independent of `size`; no state is kept between calls.

    Args:
        style: "a" is clean and evenly lit, "b" cluttered, textured, shadowed and photographed.
        seed: Collection, >= 0.
        index: Number in the collection, >= 0.
        size: Side of the square image in pixels, >= 8.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if style not in _LOOKS:
        raise ValueError(f"style is {style!r}: choose 'a' or 'b'")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed={seed}, index={index}")
    if size < 8:
        raise ValueError(f"size is {size}: an image needs at least 8 pixels a side")
    look = _LOOKS[style]
    rng = np.random.Generator(np.random.PCG64([seed, index, ord(style)]))
    camera, bodies = _layout(rng, look)
    ray = _rays(camera, size)
    eye = (0.0, camera["height_m"], 0.0)
    depth, body = _cast(bodies, eye, ray)
    image = _shade(rng, look, bodies, camera, ray, depth, body).reshape(size, size, 3)
    if look.photo:
        image = _photograph(rng, image)
    return Scene(
        image=(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8),
        depth=depth.reshape(size, size),
        camera=camera,
        primitives=tuple(bodies),
    )


# --- layout: camera and bodies --------------------------------------------------------------------


def _layout(rng: np.random.Generator, look: _Look) -> tuple[dict[str, float], list[Primitive]]:
    """Camera, and bodies that stand on the floor in its view, after the ground or the room."""
    indoor = rng.random() < 0.5
    camera = {
        "fov_deg": rng.uniform(*look.fov_deg),
        "height_m": rng.uniform(1.0, 1.9) if indoor else exp(rng.uniform(0.1, 1.2)),
        "pitch_deg": rng.uniform(*look.pitch_deg),
        "roll_deg": rng.uniform(-look.roll_deg, look.roll_deg),
    }
    num_backdrops = int(rng.integers(*look.num_backdrops, endpoint=True))
    if indoor:
        shell = _room(rng)
        bodies = [
            shell,
            *_wall_things(rng, shell, num_backdrops),
        ]
        near_m, far_m = 1.6, 1.6 * max(shell.half[0], shell.half[2])
    else:
        yaw = rng.uniform(-pi, pi)
        shell = Primitive("ground", (0.0, 0.0, 0.0), (inf, 0.0, inf), yaw)
        bodies = [shell, *_buildings(rng, camera, num_backdrops)]
        near_m, far_m = 2.5, 30.0
    # the lowest ray down the middle is at half a metre there: nearer bodies are out of sight
    floor_deg = max(camera["fov_deg"] / 2 - camera["pitch_deg"], 5.0)
    floor_m = (camera["height_m"] - 0.5) / tan(radians(min(floor_deg, 80.0)))
    near_m = min(max(near_m, floor_m), 0.6 * far_m)
    half_width = tan(radians(camera["fov_deg"] / 2))
    for _ in range(rng.integers(*look.num_objects, endpoint=True)):
        shrink = 1.0
        while True:
            z = near_m * shrink * (far_m / near_m) ** rng.random()
            x = rng.uniform(-0.85, 0.85) * half_width * z
            grow = 1.0 if indoor else min(max(z / 4, 1.0), 3.5)
            thing = _thing(rng, x, z, rng.uniform(*look.object_size_m) * grow * shrink, indoor)
            if all(_fits(part, shell) for part in thing):
                break
            shrink *= 0.97
        bodies += thing
    return camera, bodies


def _room(rng: np.random.Generator) -> Primitive:
    """A room around the camera, which stands towards the back and looks in."""
    half_x, half_z = rng.uniform(1.8, 5.0), rng.uniform(2.0, 6.0)
    half_y = rng.uniform(1.2, 1.9)
    yaw = rng.uniform(-pi, pi)
    # forward is (-sin, cos) in local coordinates: the middle of the room lies that way
    local_x = (rng.uniform(-0.15, 0.15) - 0.55 * sin(yaw)) * half_x
    local_z = (rng.uniform(-0.15, 0.15) + 0.55 * cos(yaw)) * half_z
    x, z = _turn(local_x, local_z, -yaw)
    return Primitive("room", (x, half_y, z), (half_x, half_y, half_z), yaw)


def _wall_things(rng: np.random.Generator, room: Primitive, count: int) -> list[Primitive]:
    """Pictures, windows and cupboards on the two walls that the camera faces."""
    things: list[Primitive] = []
    forward = _turn(0.0, 1.0, room.yaw_rad)
    for _ in range(count):
        axis = int(rng.random() ** 2 * abs(forward[0]) > rng.random() ** 2 * abs(forward[1])) ^ 1
        span = room.half[2 if axis == 0 else 0]
        width = rng.uniform(0.15, 0.3) * span
        if rng.random() < 0.35:  # a cupboard on the floor
            thick, height = rng.uniform(0.15, 0.3), rng.uniform(0.3, 0.9) * room.half[1]
            middle = height
        else:
            thick, height = 0.03, rng.uniform(0.2, 0.45) * room.half[1]
            middle = rng.uniform(1.0, 1.3) * room.half[1]
        depth = (room.half[2 * axis] - thick) * copysign(1.0, forward[axis])
        along = rng.uniform(-1, 1) * (span - width)
        local = (depth, along) if axis == 0 else (along, depth)
        x, z = _turn(*local, -room.yaw_rad)
        half = (thick, height, width) if axis == 0 else (width, height, thick)
        center = (room.center[0] + x, middle, room.center[2] + z)
        part = Primitive("box", center, half, room.yaw_rad)
        if hypot(center[0], center[2]) - hypot(half[0], half[2]) > CLEARANCE_M:
            things.append(part)
    return things


def _buildings(rng: np.random.Generator, camera: dict[str, float], count: int) -> list[Primitive]:
    """Large boxes at the end of the view."""
    bodies = []
    for _ in range(count):
        z = rng.uniform(22, 60)
        x = rng.uniform(-1, 1) * tan(radians(camera["fov_deg"] / 2)) * z
        half = (rng.uniform(2, 8), rng.uniform(1.5, 9), rng.uniform(2, 8))
        bodies.append(Primitive("box", (x, half[1], z), half, rng.uniform(-0.6, 0.6)))
    return bodies


def _thing(rng: np.random.Generator, x: float, z: float, size_m: float, indoor: bool) -> list[Primitive]:
    """One object of about `size_m` that stands on the floor at (x, z)."""
    s = 0.5 * size_m
    yaw = rng.uniform(-pi, pi)
    a, b, c = (s * rng.uniform(0.5, 1.1, 3)).tolist()
    choice = rng.choice(6, p=(0.3, 0.14, 0.16, 0.14, 0.14, 0.12))
    if choice == 0:
        return [Primitive("box", (x, b, z), (a, b, c), yaw)]
    if choice == 1:
        return [Primitive("sphere", (x, s, z), (s, s, s), yaw)]
    if choice == 2:
        r = 0.6 * a
        return [Primitive("cylinder", (x, 1.3 * b, z), (r, 1.3 * b, r), yaw)]
    if choice == 3:  # something on a box
        r = 0.8 * min(a, c)
        top = Primitive("sphere", (x, 2 * b + r, z), (r, r, r), yaw)
        if rng.random() < 0.5:
            top = Primitive("cylinder", (x, 2 * b + r, z), (0.7 * r, r, 0.7 * r), yaw)
        return [Primitive("box", (x, b, z), (a, b, c), yaw), top]
    if choice == 4:  # a tree, or a lamp
        r, trunk = (0.5 * a, 1.4 * s) if indoor else (1.2 * a, 1.6 * s)
        return [
            Primitive("cylinder", (x, trunk, z), (0.14 * s, trunk, 0.14 * s), yaw),
            Primitive("sphere", (x, 2 * trunk + 0.5 * r, z), (r, r, r), yaw),
        ]
    dx, dz = _turn(0.8 * a, 0.0, -yaw)  # a table on two panels
    return [
        Primitive("box", (x, 2 * b, z), (1.2 * a, 0.08 * s, c), yaw),
        Primitive("box", (x - dx, b, z - dz), (0.06 * s, b, 0.8 * c), yaw),
        Primitive("box", (x + dx, b, z + dz), (0.06 * s, b, 0.8 * c), yaw),
    ]


def _fits(body: Primitive, shell: Primitive) -> bool:
    """Whether a body leaves the camera free and stays inside the room, if there is one."""
    x, y, z = body.center
    radius = body.half[0] if body.kind != "box" else hypot(body.half[0], body.half[2])
    if hypot(x, z) - radius < CLEARANCE_M:
        return False
    if shell.kind == "ground":
        return True
    local = _turn(x - shell.center[0], z - shell.center[2], shell.yaw_rad)
    inside = abs(local[0]) + radius < shell.half[0] and abs(local[1]) + radius < shell.half[2]
    return inside and y + body.half[1] < 2 * shell.half[1] - 0.05


# --- geometry: rays and hits ----------------------------------------------------------------------


def _turn(x: Any, z: Any, yaw_rad: float) -> tuple[Any, Any]:
    """World (x, z), numbers or arrays, in a frame turned by `yaw_rad`; `-yaw_rad` turns back."""
    c, s = cos(yaw_rad), sin(yaw_rad)
    return c * x - s * z, s * x + c * z


def _rays(camera: dict[str, float], size: int) -> tuple[Array, Array, Array]:
    """World directions (N,) x 3 of all pixel centres, row by row, with camera z = 1."""
    steps = (2 * (np.arange(size) + 0.5) / size - 1) * tan(radians(camera["fov_deg"] / 2))
    x, y = np.tile(steps, size), -np.repeat(steps, size)
    pitch, roll = radians(camera["pitch_deg"]), radians(camera["roll_deg"])
    x, y = cos(roll) * x - sin(roll) * y, sin(roll) * x + cos(roll) * y
    y, z = cos(pitch) * y + sin(pitch), cos(pitch) - sin(pitch) * y
    # in float64 until here: near the horizon the depth is as exact as the small y
    return x.astype(np.float32), y.astype(np.float32), z.astype(np.float32)


def _cast(bodies: Sequence[Primitive], eye: Xyz, ray: Xyz) -> tuple[Array, NDArray[np.int16]]:
    """Depth (N,), +inf without a hit, and the number of the body hit (N,), -1 without a hit."""
    shell = bodies[0]
    if shell.kind == "ground":
        below = ray[1] < 0
        depth = np.full(below.shape, np.inf, np.float32)
        np.divide(-np.float32(eye[1]), ray[1], out=depth, where=below)
    else:
        depth = _span(shell, eye, ray)[1]
    body = np.where(np.isfinite(depth), 0, -1).astype(np.int16)
    for number, primitive in enumerate(bodies[1:], start=1):
        near, far = _span(primitive, eye, ray)
        closer = (near < far) & (near > 0) & (near < depth)
        np.copyto(depth, near, where=closer)
        np.copyto(body, number, where=closer)
    return depth, body


def _span(body: Primitive, origin: Xyz, ray: Xyz) -> tuple[Array, Array]:
    """Ray parameters (N,) where a line enters and leaves a convex body; out of order for a miss.

    Boxes: the slab method (Kay and Kajiya 1986). Round bodies: half chord around the foot of the
    perpendicular, which does not cancel in float32 as b^2 - 4ac does (Haines et al., Ray Tracing
    Gems, 2019, chapter 7).
    """
    oy = origin[1] - body.center[1]
    ox, oz = origin[0] - body.center[0], origin[2] - body.center[2]
    dx, dy, dz = ray
    if body.kind in ("box", "room"):
        ox, oz = _turn(ox, oz, body.yaw_rad)
        dx, dz = _turn(dx, dz, body.yaw_rad)
        near_x, far_x = _slab(ox, dx, body.half[0])
        near_z, far_z = _slab(oz, dz, body.half[2])
        near_y, far_y = _slab(oy, dy, body.half[1])
        near = np.maximum(np.maximum(near_x, near_z), near_y)
        return near, np.minimum(np.minimum(far_x, far_z), far_y)
    upright = body.kind == "cylinder"
    squared = dx * dx + dz * dz
    dot = ox * dx + oz * dz
    if not upright:
        squared = squared + dy * dy
        dot = dot + oy * dy
    foot = -dot / squared
    px, pz = ox + foot * dx, oz + foot * dz
    rest = body.half[0] ** 2 - px * px - pz * pz
    if not upright:
        py = oy + foot * dy
        rest -= py * py
    chord = np.sqrt(np.maximum(rest, 0) / squared)
    if not upright:
        return foot - chord, foot + chord
    near, far = _slab(oy, dy, body.half[1])
    return np.maximum(near, foot - chord), np.minimum(far, foot + chord)


def _slab(origin: Array | float, ray: Array, half: float) -> tuple[Array, Array]:
    """Ray parameters between the planes -half and +half."""
    inverse = 1 / (ray + np.float32(1e-9))  # a ray along the slab: a large number in place of infinity
    middle = -origin * inverse
    reach = np.abs(inverse) * np.float32(half)
    return middle - reach, middle + reach


# --- looks: surfaces, textures, light -------------------------------------------------------------


def _shade(
    rng: np.random.Generator,
    look: _Look,
    bodies: Sequence[Primitive],
    camera: dict[str, float],
    ray: tuple[Array, Array, Array],
    depth: Array,
    body: NDArray[np.int16],
) -> Array:
    """Linear colour (N, 3) of every pixel, before the camera's own faults."""
    indoor = bodies[0].kind == "room"
    lattice = rng.random((NOISE_CELLS + 1, NOISE_CELLS + 1), dtype=np.float32)
    lattice[-1], lattice[:, -1] = lattice[0], lattice[:, 0]
    materials = _materials(rng, look, bodies)
    tint = 1 + look.light_tint * (rng.random(3, dtype=np.float32) - 0.6)
    ambient = rng.uniform(*look.ambient) * (1 + 0.4 * look.light_tint * (rng.random(3) - 0.5))
    strength = rng.uniform(*look.light)
    shadows = rng.random() < look.shadow_share
    sun, lamp = _light(rng, look, bodies[0])
    fog = look.photo and rng.random() < 0.3
    fog_per_m = rng.uniform(0.02, 0.07) * (1.5 if indoor else 1)
    sky_colors = _sky_colors(rng, look)
    clouds = rng.random() < (0.8 if look.photo else 0.4)

    color = np.empty((depth.size, 3), np.float32)
    hit = np.flatnonzero(body >= 0)
    dx, dy, dz = (component[hit] for component in ray)
    t = depth[hit]
    point = (t * dx, camera["height_m"] + t * dy, t * dz)
    normal, u, v, material = _surface(bodies, point, body[hit])
    slant = np.abs(normal[0] * dx + normal[1] * dy + normal[2] * dz) / np.sqrt(dx * dx + dy * dy + dz * dz)
    width = 2 * tan(radians(camera["fov_deg"] / 2))
    pixel_m = t * np.float32(width / np.sqrt(depth.size))
    footprint_m = pixel_m / np.maximum(np.sqrt(slant), 0.05)
    albedo = _albedo(materials, material, u, v, footprint_m, lattice)
    if look.photo:  # dirt
        albedo *= (0.6 + 0.8 * _octaves(0.7 * u + material, 0.7 * v, lattice, 2))[:, None]

    to_light: Xyz = sun
    if lamp is not None:
        to_light = [place - p for place, p in zip(lamp, point, strict=True)]
    facing = np.maximum(sum(n * to for n, to in zip(normal, to_light, strict=True)), 0)
    if lamp is not None:
        squared = sum(to * to for to in to_light)
        facing *= 8 / (np.sqrt(squared) * (2 + squared))
    if shadows:
        lit = np.flatnonzero((facing > 0) & (t < 150))
        bias = 2e-3 * (1 + t[lit])
        start = [p[lit] + bias * n[lit] for p, n in zip(point, normal, strict=True)]
        target = to_light if lamp is None else [to[lit] for to in to_light]
        facing[lit[_blocked(bodies[1:], start, target, lamp is not None)]] = 0
    above = 0.8 + 0.2 * normal[1]
    color[hit] = albedo * (above[:, None] * ambient.astype(np.float32) + (strength * facing)[:, None] * tint)
    open_sky = np.flatnonzero(body < 0)
    sky_ray = tuple(component[open_sky] for component in ray)
    color[open_sky] = _sky(sky_ray, sky_colors, clouds, lattice)
    if fog:
        veil = 1 - np.exp(-fog_per_m * np.minimum(depth, 1e4))
        veil[open_sky] *= 0.7
        gray = (0.3 + 0.7 * sky_colors[1]) * (0.6 if indoor else 1)
        color += veil[:, None] * (gray - color)
    return color


def _surface(
    bodies: Sequence[Primitive], point: tuple[Array, Array, Array], body: NDArray[np.int16]
) -> tuple[tuple[Array, Array, Array], Array, Array, NDArray[np.int16]]:
    """Unit normals (N,) x 3, surface coordinates u, v (N,) in metres, material numbers (N,)."""
    nx, ny, nz, u, v = np.zeros((5, body.size), np.float32)
    material = body + np.int16(2)  # 0, 1, 2 are floor, ceiling, walls
    for number, primitive in enumerate(bodies):
        pick = np.flatnonzero(body == number)
        if not pick.size:
            continue
        x, y, z = (p[pick] - c for p, c in zip(point, primitive.center, strict=True))
        x, z = _turn(x, z, primitive.yaw_rad)
        radius, half_y = primitive.half[:2]
        if primitive.kind == "ground":
            ny[pick], material[pick] = 1, 0
            u[pick], v[pick] = np.clip(x, -1e4, 1e4), np.clip(z, -1e4, 1e4)
            continue
        if primitive.kind == "sphere":
            mx, my, mz = x / radius, y / radius, z / radius
            u[pick], v[pick] = np.arctan2(z, x) * radius, np.arcsin(np.clip(my, -1, 1)) * radius
        elif primitive.kind == "cylinder":
            cap = (x * x + z * z) / radius**2 < (y / half_y) ** 2
            side = ~cap
            mx, my, mz = side * x / radius, cap * np.sign(y), side * z / radius
            u[pick] = np.where(cap, x, np.arctan2(z, x) * radius)
            v[pick] = np.where(cap, z, y)
        else:
            ex, ey, ez = (np.abs(q) / h for q, h in zip((x, y, z), primitive.half, strict=True))
            on_x = (ex > ey) & (ex > ez)
            on_y = (ey > ez) & ~on_x
            outward = -1 if primitive.kind == "room" else 1
            mx, my = outward * on_x * np.sign(x), outward * on_y * np.sign(y)
            mz = outward * ~(on_x | on_y) * np.sign(z)
            u[pick], v[pick] = np.where(on_x, z, x), np.where(on_y, z, y)
            if primitive.kind == "room":
                material[pick] = np.where(on_y, np.where(y < 0, 0, 1), 2)
        nx[pick], nz[pick] = _turn(mx, mz, -primitive.yaw_rad)
        ny[pick] = my
    return (nx, ny, nz), u, v, material


@dataclass(frozen=True)
class _Materials:
    """Tables over materials."""

    texture: NDArray[np.int8]  # (M,) number in TEXTURES
    colors: Array  # (M, 2, 3) linear colours that the texture blends
    per_m: Array  # (M,) texture cells per metre
    angle_rad: Array  # (M,) direction of the texture on its surface


def _materials(rng: np.random.Generator, look: _Look, bodies: Sequence[Primitive]) -> _Materials:
    """Floor, ceiling, walls, then one material for each further body."""
    m = len(bodies) + 2
    names = [TEXTURES.index(name) for name in look.textures]
    texture = rng.choice(names, m).astype(np.int8)
    hue, saturation = rng.random((m, 2)), rng.uniform(*look.saturation, (m, 2))
    value = rng.uniform(*look.value, (m, 2))
    hue[:, 1] = np.where(rng.random(m) < 0.6, hue[:, 0] + 0.05, hue[:, 1])
    value[:, 1] = np.where(rng.random(m) < 0.6, 0.6 * value[:, 0], value[:, 1])
    saturation[:3] *= 0.5
    per_m = np.array([1.0, 1.0, 1.0, *(1 / max(body.half) for body in bodies[1:])])
    per_m *= rng.uniform(1.2, 4.0, m)
    if bodies[0].kind == "ground":
        hue[0] = rng.uniform(0.07, 0.33) + np.array([0, 0.02])  # earth to grass
        per_m[0] *= 0.4
    if not look.photo:  # a tidy model: pale ceiling and walls
        texture[1], value[1:3] = 0, np.clip(value[1:3] + 0.2, 0.75, 1)
        saturation[1:3] *= 0.5
    angle = rng.choice([0.0, np.pi / 2, np.pi / 4, 0.3], m)
    angle[texture == TEXTURES.index("bricks")] = 0
    return _Materials(texture, _hsv(hue, saturation, value), per_m.astype(np.float32), angle.astype(np.float32))


def _hsv(hue: NDArray[np.float64], saturation: NDArray[np.float64], value: NDArray[np.float64]) -> Array:
    """RGB (..., 3) of hue (turns), saturation and value (0..1), each (...)."""
    phase = (6 * hue[..., None] + np.array([0.0, 4.0, 2.0])) % 6
    pure = np.clip(np.abs(phase - 3) - 1, 0, 1)
    return (value[..., None] * (1 - saturation[..., None] * (1 - pure))).astype(np.float32)


def _albedo(
    materials: _Materials,
    material: NDArray[np.int16],
    u: Array,
    v: Array,
    footprint_m: Array,
    lattice: Array,
) -> Array:
    """Colours (N, 3); a texture fades to its mean where a cell is smaller than a pixel."""
    per_m, angle = materials.per_m[material], materials.angle_rad[material]
    c, s = np.cos(angle), np.sin(angle)
    u, v = per_m * (c * u - s * v), per_m * (s * u + c * v)
    blend = np.zeros_like(u)
    texture = materials.texture[material]
    for number in np.unique(materials.texture):
        pick = np.flatnonzero(texture == number)
        if number and pick.size:  # "flat" stays 0
            blend[pick] = _texture(TEXTURES[number], u[pick], v[pick], lattice)
    sharp = np.clip(1.6 - 1.5 * per_m * footprint_m, 0, 1)
    blend = np.where(texture > 0, 0.5 + sharp * (blend - 0.5), 0)
    colors = materials.colors
    first, second = colors[material, 0], colors[material, 1]
    return first + blend[:, None] * (second - first)


def _texture(name: str, u: Array, v: Array, lattice: Array) -> Array:
    """Blend factor (N,) in [0, 1] at surface coordinates in cells."""
    if name == "checker":
        return ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    if name == "stripes":
        return (np.floor(u) % 2).astype(np.float32)
    if name == "waves":
        return 0.5 + 0.5 * np.sin(4 * u + 2 * np.sin(1.7 * v) + 1.3 * np.sin(2.9 * v + u))
    if name == "noise":
        return np.clip(3 * _octaves(2 * u, 2 * v, lattice, 3) - 1, 0, 1)
    if name == "bricks":
        row = np.floor(3 * v)
        along = 1.5 * u + 0.5 * (row % 2)
        mortar = (along % 1 < 0.07) | ((3 * v) % 1 < 0.14)
        cell = (np.floor(along).astype(np.int32) * 7 + row.astype(np.int32) * 13) % NOISE_CELLS
        return np.where(mortar, np.float32(1), 0.5 * lattice[cell, 5])
    return 0.5 + 0.5 * np.sin(6 * (u + 1.5 * _octaves(u, v, lattice, 3)))  # marble


def _octaves(u: Array, v: Array, lattice: Array, num_octaves: int) -> Array:
    """Value noise (N,) in [0, 1]; each octave doubles the frequency and halves the height."""
    total = np.zeros_like(u)
    flat = lattice.ravel()
    for octave in range(num_octaves):
        scale = np.float32(2**octave)
        x, y = u * scale + 17 * octave, v * scale + 31 * octave
        floor_x, floor_y = np.floor(x), np.floor(y)
        x, y = x - floor_x, y - floor_y
        x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
        i, j = floor_x.astype(np.int32) % NOISE_CELLS, floor_y.astype(np.int32) % NOISE_CELLS
        corner = i * (NOISE_CELLS + 1) + j
        low = flat[corner]
        low += y * (flat[corner + 1] - low)
        corner += NOISE_CELLS + 1
        high = flat[corner]
        high += y * (flat[corner + 1] - high)
        total += (low + x * (high - low)) / scale
    return total / np.float32(2 - 2.0 ** (1 - num_octaves))


def _light(rng: np.random.Generator, look: _Look, shell: Primitive) -> tuple[Vec3, Vec3 | None]:
    """Unit direction to the sun, and the place of the lamp that a photo-like room has."""
    azimuth = rng.uniform(-pi, pi)
    height = rng.uniform(0.35, 0.95) if look.photo else rng.uniform(0.7, 0.9)
    flat = sqrt(1 - height**2)
    sun = (flat * sin(azimuth), height, flat * cos(azimuth))
    if shell.kind == "ground" or not look.photo:
        return sun, None
    local_x, local_z = (rng.uniform(-0.7, 0.7) * half for half in (shell.half[0], shell.half[2]))
    x, z = _turn(local_x, local_z, -shell.yaw_rad)
    return sun, (shell.center[0] + x, shell.half[1] * rng.uniform(1.5, 1.9), shell.center[2] + z)


def _blocked(bodies: Sequence[Primitive], start: Xyz, target: Xyz, lamp: bool) -> NDArray[np.bool_]:
    """Whether a body lies between the starts (N,) x 3 and the sun, or the lamp at parameter 1."""
    blocked = np.zeros(len(start[0]), np.bool_)
    for body in bodies:
        near, far = _span(body, start, target)
        shade = (near < far) & (far > 0)
        blocked |= shade & (near < 1) if lamp else shade
    return blocked


def _sky_colors(rng: np.random.Generator, look: _Look) -> Array:
    """Colours (3, 3): zenith, horizon, clouds."""
    if not look.photo:
        return np.array([[0.35, 0.58, 0.95], [0.8, 0.9, 1.0], [1, 1, 1]], np.float32)
    palettes = (  # overcast, sunset, night, pale blue
        ((0.5, 0.53, 0.56), (0.72, 0.73, 0.72), (0.4, 0.42, 0.45)),
        ((0.3, 0.3, 0.5), (0.95, 0.6, 0.35), (0.55, 0.35, 0.4)),
        ((0.04, 0.06, 0.14), (0.2, 0.2, 0.28), (0.12, 0.13, 0.2)),
        ((0.25, 0.4, 0.62), (0.62, 0.7, 0.74), (0.85, 0.84, 0.8)),
    )
    return np.array(palettes[rng.integers(len(palettes))], np.float32) * np.float32(rng.uniform(0.7, 1.1))


def _sky(ray: Sequence[Array], colors: Array, clouds: bool, lattice: Array) -> Array:
    """Colours (N, 3) of a gradient from horizon to zenith with clouds on a plane overhead."""
    x, y, z = ray
    up = np.maximum(y, 0) / np.sqrt(x * x + y * y + z * z)
    color = colors[1] + np.sqrt(up)[:, None] * (colors[0] - colors[1])
    if clouds:
        away = 2.5 / (up + 0.15)
        cover = np.clip(4 * _octaves(away * x, away * z, lattice, 3) - 2, 0, 1) * np.clip(6 * up, 0, 1)
        color += cover[:, None] * (colors[2] - color)
    return color


def _photograph(rng: np.random.Generator, image: Array) -> Array:
    """Exposure, white balance, vignette, blur, gamma and sensor noise on an image (H, W, 3)."""
    size = len(image)
    exposure = np.clip(rng.uniform(0.3, 0.5) / (image.mean() + 1e-3), 0.5, 4.0)
    image = image * (exposure * rng.uniform(0.9, 1.1, 3)).astype(np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32) ** 2
    image *= (1 - np.float32(rng.uniform(0, 0.2)) * (ramp[:, None] + ramp))[..., None]
    side = np.float32(rng.uniform(0, 0.2))
    image[1:-1] += side * (image[2:] + image[:-2] - 2 * image[1:-1])
    image[:, 1:-1] += side * (image[:, 2:] + image[:, :-2] - 2 * image[:, 1:-1])
    image = np.maximum(image, 0) ** np.float32(rng.uniform(0.7, 1.1))
    grain = np.float32(rng.uniform(0.004, 0.014))
    return image + grain * rng.standard_normal(image.shape, dtype=np.float32)
