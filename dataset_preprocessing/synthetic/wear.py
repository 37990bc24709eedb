# SPDX-License-Identifier: Apache-2.0
"""What people wear, and the neck that carries the head: hats, glasses, tops, as triangles around a given head."""

from typing import NamedTuple

import numpy as np

from dataset_preprocessing.synthetic.anatomy import CENTRE, shell_at
from dataset_preprocessing.synthetic.noise import smoothstep, unit

TUBE_SIDES = 6
NUM_AROUND, NUM_UP = 96, 14  # Steps of a hat.
MEAN_FACE_WIDTH = 0.154  # Between landmarks 1 and 15.
RIM_REACH, LARGEST_LIFT = 0.004, 0.011  # Metres of a rim around it, and forwards to clear cheeks and nose.
SHOULDERS = np.array([0.205, 0.0, 0.095])  # Half axes of the ellipse that tops run out to.


class Part(NamedTuple):
    """vertices [n, 3]; faces [m, 3] int64; albedo [n, 3]; gloss: strength of highlights; shade [n]: share of sky."""

    vertices: np.ndarray
    faces: np.ndarray
    albedo: np.ndarray
    gloss: float = 0.0
    shade: np.ndarray | None = None


def hat_rim(kind: str, azimuth: np.ndarray) -> np.ndarray:
    """Return the elevation, seen from CENTRE, of a hat's rim at angles from the front."""
    front, back = (0.40, -0.22) if kind == 'cap' else (0.36, -0.30)
    return back + (front - back) * (0.5 + 0.5 * np.cos(azimuth))


def ceiling_under(kind: str, shell: np.ndarray):
    """Return a function that moves points [..., 3] of hair under a hat."""

    def move(points):
        offset = points - CENTRE
        distance = np.sqrt((offset * offset).sum(axis=-1))
        elevation = np.arcsin(np.clip(offset[..., 1] / np.maximum(distance, 1e-6), -1, 1))
        rim = hat_rim(kind, np.arctan2(offset[..., 0], offset[..., 2]))
        inside = smoothstep(-0.30, 0.05, elevation - rim)
        limit = shell_at(shell, offset) + 0.004 + 0.05 * (1 - inside)
        return CENTRE + offset * np.minimum(limit / np.maximum(distance, 1e-6), 1)[..., None]

    return move


def hat(kind: str, shell: np.ndarray, cloth: np.ndarray, accent: np.ndarray) -> list[Part]:
    """Return a beanie or a cap over the hair."""
    azimuth = np.linspace(-np.pi, np.pi, NUM_AROUND, endpoint=False)
    rise = np.linspace(0, 1, NUM_UP)[:, None]
    elevation = hat_rim(kind, azimuth)[None] * (1 - rise) + np.pi / 2 * rise
    across = np.cos(elevation)
    rays = np.stack([across * np.sin(azimuth), np.sin(elevation), across * np.cos(azimuth)], axis=2)
    thick = 0.012 if kind == 'cap' else 0.013 + 0.004 * (rise < 0.22) + 0.006 * smoothstep(0.5, 1, rise)
    radius = _smooth_around(shell_at(shell, rays)) + thick
    if kind == 'beanie':
        radius = radius + 0.0009 * np.sin(azimuth * 24)[None]
    points = CENTRE + rays * radius[..., None]
    inner = CENTRE + rays[0] * (radius[0] - 0.008)[:, None]
    points = np.concatenate([inner[None], points])
    albedo = np.broadcast_to(cloth, points.shape).copy()
    if kind == 'beanie':
        albedo *= (0.84 + 0.16 * np.sin(azimuth * 24))[None, :, None]
        albedo[1:4] *= np.array(0.9)
    else:
        panel = abs(azimuth) < 0.9
        albedo[:, panel] = 0.5 * albedo[:, panel] + 0.5 * accent
    faces = _grid_faces(len(points), NUM_AROUND, closed=True)
    parts = [Part(points.reshape(-1, 3), faces, albedo.reshape(-1, 3), 0.03)]
    if kind == 'cap':
        parts.append(_brim(points[1], azimuth, accent))
    return parts


def _brim(rim, azimuth, colour):
    front = np.flatnonzero(abs(azimuth) < 1.05)
    share = np.cos(azimuth[front] / 1.05 * np.pi / 2) ** 0.6
    rows = []
    for step in np.linspace(0, 1, 6):
        out = np.stack([0.012 * np.sin(azimuth[front]), -0.022 * step - 0.010 * abs(np.sin(azimuth[front])) * step,
                        0.068 * share], axis=1)  # fmt: skip
        rows.append(rim[front] + out * step)
    top = np.array(rows)
    points = np.concatenate([top, top[::-1] - np.array([0, 0.003, 0])])
    faces = _grid_faces(len(points), len(front), closed=False)
    return Part(points.reshape(-1, 3), _outwards(faces, points.reshape(-1, 3), np.array([0, 1.0, 0])),
                np.broadcast_to(colour, (points.size // 3, 3)).copy(), 0.04)  # fmt: skip


def glasses(
    kind: str, landmarks: np.ndarray, ears: np.ndarray, face: np.ndarray, shell: np.ndarray, colour: np.ndarray
) -> tuple[list[Part], list[Part]]:
    """Return (frames, dark lenses) for landmarks [68, 3]; ears [2, 3]: where they rest, left in the picture first.

    face [n, 3]: points of the face's skin, which frames keep clear of. shell: the head, which temples lie along.
    """
    eyes = np.stack([landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0)])
    half, power = {'round': ((0.0235, 0.0225), 2.0), 'rectangular': ((0.0260, 0.0165), 5.0),
                   'thick': ((0.0265, 0.0195), 3.5), 'sunglasses': ((0.0285, 0.0225), 3.0)}[kind]  # fmt: skip
    # Frames fit the width of the face.
    half = np.array(half) * (landmarks[15, 0] - landmarks[1, 0]) / MEAN_FACE_WIDTH
    thick = 0.0021 if kind in ('thick', 'sunglasses') else 0.0011
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    cos, sin = np.cos(angle), np.sin(angle)
    rim = np.stack([np.sign(x) * abs(x) ** (2 / power) for x in (cos, sin)], axis=1) * half
    loops = []
    for side, eye in zip((-1, 1), eyes, strict=True):
        middle = np.array([side * max(abs(eye[0]), half[0] + 0.008), eye[1] - 0.001])
        loop = np.column_stack([middle + rim, np.zeros(len(rim))])
        loop[:, 2] = -2.2 * np.maximum(abs(loop[:, 0]) - 0.01, 0) ** 2
        loops.append(loop)
    plane = max(landmarks[27, 2] + 0.001, eyes[:, 2].mean() + 0.010)
    needed = max(_least_depth(loop, face) + thick + 0.0005 for loop in loops)
    plane += np.clip(needed - plane, 0, LARGEST_LIFT)
    frames, lenses = [], []
    for side, loop, ear in zip((-1, 1), loops, ears, strict=True):
        loop[:, 2] += plane
        frames.append(_tube(loop, thick, True))
        hinge = loop[np.argmax(side * loop[:, 0] + 0.3 * loop[:, 1])]
        frames.append(_tube(_temple(hinge, ear, side, shell, thick), thick, False))
        if kind == 'sunglasses':
            lenses.append(_disc(loop))
    inner, height = min(abs(loop[:, 0]).min() for loop in loops), landmarks[27, 1]
    nose = np.array([[-inner, height + 0.001, plane], [0, height + 0.0035, plane + 0.001],
                     [inner, height + 0.001, plane]])  # fmt: skip
    frames.append(_tube(nose, thick, False))
    parts = [Part(v, f, np.broadcast_to(colour, v.shape).copy(), 0.5) for v, f in frames]
    dark = [Part(v, f, np.full(v.shape, 0.012), 0.3) for v, f in lenses]
    return parts, dark


def _least_depth(loop, face):
    """Return the z by which a loop [n, 3] has to be moved for no point of the face [m, 3] to lie before it."""
    near = ((face[:, None, :2] - loop[None, :, :2]) ** 2).sum(axis=2) < RIM_REACH**2
    return np.where(near, face[:, None, 2] - loop[None, :, 2], -np.inf).max()


def _temple(hinge, ear, side, shell, thick):
    """Return points [n, 3] from a frame's hinge along the side of the head, over the ear and down behind it."""
    share = np.linspace(0, 1, 9)[:, None]
    back = hinge + (ear + np.array([0, 0.003, 0]) - hinge) * share
    path = np.concatenate([back, ear + np.array([[0, -0.004, -0.010], [0, -0.016, -0.017]])])
    # How far from the middle the skin is at each height and depth.
    low, high = np.zeros(len(path)), np.full(len(path), 0.12)
    for _ in range(14):
        x = (low + high) / 2
        offset = path * (0, 1, 1) + x[:, None] * np.array([side, 0, 0]) - CENTRE
        is_inside = np.linalg.norm(offset, axis=1) < shell_at(shell, offset)
        low, high = np.where(is_inside, x, low), np.where(is_inside, high, x)
    clear = high + thick + 0.001
    along = smoothstep(0.0, 0.7, np.append(share[:, 0], [1, 1]))
    path[:, 0] = side * np.maximum(clear, abs(hinge[0]) + along * (clear - abs(hinge[0])))
    path[0] = hinge
    return path


def top(kind: str, rings: np.ndarray, cloth: np.ndarray, accent: np.ndarray) -> Part:
    """Return a collar around the rings [K, n, 3] of a neck, which runs out to the shoulders."""
    # Level of the ring, from 0 at the highest, and metres from the skin; from the inner edge over the rim outwards.
    rows = {
        'crew': [(3.0, 0.001), (2.9, 0.004), (3.2, 0.006)],
        'turtleneck': [(1.0, 0.001), (0.8, 0.004), (1.2, 0.007), (2.2, 0.008), (3.0, 0.007)],
        'hood': [(2.6, 0.004), (1.5, 0.012), (1.2, 0.020), (1.7, 0.030), (2.8, 0.026)],
        'shirt': [(2.0, 0.001), (1.0, 0.005), (0.9, 0.007), (2.2, 0.013), (2.6, 0.014), (2.7, 0.009)],
    }[kind]
    rows = rows + [(4.0, 0.008), (len(rings) - 1.0, 0.008)]
    middle = np.array([0, 0, rings[..., 2].mean()])
    points = []
    for level, out in rows:
        low = min(int(level), len(rings) - 2)
        ring = rings[low] + (level - low) * (rings[low + 1] - rings[low])
        outward = unit((ring - middle) * (1, 0, 1))
        if kind == 'shirt':  # Open at the front.
            ring = ring - np.array([0, 0.018, 0]) * smoothstep(0.75, 1.0, outward[:, 2:])
        points.append(ring + out * outward)
    angle = np.arctan2(outward[:, 0], outward[:, 2])
    wide = np.stack([SHOULDERS[0] * np.sin(angle), np.zeros_like(angle), SHOULDERS[2] * np.cos(angle) - 0.06], axis=1)
    for share, drop in ((0.5, -0.012), (1.0, -0.04), (1.1, -0.2)):
        row = points[len(rows) - 1] * (1 - share) + share * wide
        row[:, 1] = points[len(rows) - 1][:, 1].mean() * share + points[len(rows) - 1][:, 1] * (1 - share) + drop
        points.append(row)
    points = np.array(points)
    faces = _grid_faces(len(points), points.shape[1], closed=True)
    flat = points.reshape(-1, 3)
    albedo = np.broadcast_to(cloth, points.shape).copy()
    if kind in ('shirt', 'crew'):
        albedo[: 6 if kind == 'shirt' else 3] = accent
    shade = np.full(points.shape[:2], 0.8)
    shade[:1] = 0.35
    return Part(flat, _outwards(faces[::-1], flat, None, middle)[::-1], albedo.reshape(-1, 3), 0.02, shade.ravel())


def _smooth_around(radius):
    for _ in range(3):
        radius = (radius + np.roll(radius, 1, 1) + np.roll(radius, -1, 1)) / 3
    return radius


def _grid_faces(rows, columns, closed):
    """Return faces of a grid of points, row by row; closed: the last column joins the first."""
    column = np.arange(columns if closed else columns - 1)
    row = np.arange(rows - 1)[:, None] * columns
    a, b = row + column, row + (column + 1) % columns
    c, d = b + columns, a + columns
    return np.concatenate([np.stack([a, b, c], axis=-1).reshape(-1, 3), np.stack([a, c, d], axis=-1).reshape(-1, 3)])


def _outwards(faces, points, direction, middle=None):
    """Return faces turned so that the first rows of them look along a direction, or away from a middle."""
    a, b, c = points[faces[: len(faces) // 4]].transpose(1, 0, 2)
    normal = np.cross(b - a, c - a)
    towards = direction if middle is None else (a - middle) * (1, 0, 1)
    return faces if (normal * towards).sum() > 0 else faces[:, ::-1].copy()


def _tube(path, radius, closed):
    """Return (vertices, faces) of a tube along points [n, 3]."""
    tangent = np.roll(path, -1, 0) - np.roll(path, 1, 0) if closed else np.gradient(path, axis=0)
    tangent = unit(tangent)
    side = unit(np.cross(tangent, np.where(abs(tangent[:, 1:2]) > 0.9, [[1.0, 0, 0]], [[0, 1.0, 0]])))
    other = np.cross(tangent, side)
    angle = np.arange(TUBE_SIDES) * 2 * np.pi / TUBE_SIDES
    ring = np.cos(angle)[None, :, None] * side[:, None] + np.sin(angle)[None, :, None] * other[:, None]
    points = path[:, None] + radius * ring
    if closed:
        points = np.concatenate([points, points[:1]])
    vertices = points.reshape(-1, 3)
    faces = _grid_faces(len(points), TUBE_SIDES, closed=True)
    centre = np.repeat(np.concatenate([path, path[:1]]) if closed else path, TUBE_SIDES, axis=0)
    a, b, c = vertices[faces[0]]
    if np.cross(b - a, c - a) @ (a - centre[faces[0, 0]]) < 0:
        faces = faces[:, ::-1].copy()
    return vertices, faces


def _disc(loop):
    """Return (vertices, faces) of a slightly domed disc within a loop, seen from the front."""
    middle = loop.mean(axis=0) + np.array([0, 0, 0.002])
    vertices = np.concatenate([loop, middle[None]])
    index = np.arange(len(loop))
    faces = np.stack([index, np.roll(index, -1), np.full(len(loop), len(loop))], axis=1)
    a, b, c = vertices[faces[0]]
    return vertices, faces if np.cross(b - a, c - a)[2] > 0 else faces[:, ::-1].copy()
