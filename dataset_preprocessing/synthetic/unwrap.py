# SPDX-License-Identifier: Apache-2.0
"""Lay the embedded head out in the UV square: one symmetric island for the skin, the face largest; small parts below.

Each island starts as a Tutte embedding, which cannot fold over, and then descends the symmetric Dirichlet energy (Smith
and Schaefer 2015), which is infinite where a triangle would flip: so no island overlaps itself locally.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.sparse import coo_array, csc_array
from scipy.sparse.linalg import splu

FACE_FRONT, FACE_BACK = -0.015, -0.065  # Depths (m) where the skin is drawn at full size and at BACK_SIZE.
FACE_LOW, NECK_LOW = -0.105, -0.140  # Heights (m) likewise, for the neck.
BACK_SIZE = 0.20  # Size of the scalp's and neck's triangles over the face's.
SEAM_DEPTH = -0.055  # The skin's middle line is cut behind this depth (m): from the crown down the nape.
FACE_HOLD = 6.0  # How much more a face triangle's distortion counts than one at the back.
ITERATIONS = 400
BACK_OF_EYE = 0.003  # Metres behind an eyeball's middle where its back begins; the iris is painted on the front.

# Left, bottom, width, height in the UV square of each part; the skin has the rest.
CELLS = {
    'skin': (0.0, 0.16, 1.0, 0.84),
    'mouth_bag': (0.0, 0.0, 0.16, 0.16),
    'eye_right': (0.20, 0.0, 0.15, 0.15), 'eye_left': (0.35, 0.0, 0.15, 0.15),
    'eye_back_right': (0.16, 0.0, 0.04, 0.05), 'eye_back_left': (0.16, 0.05, 0.04, 0.05),
    'tongue_right': (0.50, 0.0, 0.07, 0.15), 'tongue_left': (0.57, 0.0, 0.07, 0.15),
    'teeth_upper': (0.64, 0.0, 0.16, 0.075), 'teeth_lower': (0.64, 0.075, 0.16, 0.075),
    'socket_right': (0.80, 0.0, 0.10, 0.10), 'socket_left': (0.90, 0.0, 0.10, 0.10),
    'lashes_0': (0.80, 0.10, 0.10, 0.03), 'lashes_1': (0.90, 0.10, 0.10, 0.03),
    'lashes_2': (0.80, 0.13, 0.10, 0.03), 'lashes_3': (0.90, 0.13, 0.10, 0.03),
}  # fmt: skip
MARGIN = 1.5 / 256  # Around each cell's content: two islands are 3 pixels of a 256² texture apart.
MASK_SIZE = 256


class Island(NamedTuple):
    """faces [F] rows of the mesh; corners [F, 3] into uvs [T, 2], in metres and not yet placed."""

    faces: np.ndarray
    corners: np.ndarray
    uvs: np.ndarray


def lay_out(
    mean: np.ndarray, faces: np.ndarray, partner: np.ndarray, part: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return uvs [T, 2] in [0, 1] and uv_faces [F, 3] of a symmetric mesh [V, 3], [F, 3] with named parts [F]."""
    uvs, uv_faces, count = [], np.zeros_like(faces), 0
    for name, island in _islands(mean, faces, partner, part).items():
        assert (_signed_areas(island.uvs[island.corners]) > 0).all(), name
        placed = _fit(island.uvs, CELLS[name], name in ('eye_left', 'eye_right'), may_turn=name != 'skin')
        uv_faces[island.faces] = island.corners + count
        uvs.append(placed)
        count += len(placed)
    return np.concatenate(uvs), uv_faces


def _islands(mean, faces, partner, part):
    islands = {'skin': _skin(mean, faces, partner, np.flatnonzero(part == 'skin'))}
    for side, sign in (('right', -1), ('left', 1)):
        rows = np.flatnonzero(part == f'eye_{side}')
        islands[f'eye_{side}'] = _eyeball(mean, faces, rows, is_front=True)
        islands[f'eye_back_{side}'] = _eyeball(mean, faces, rows, is_front=False)
        is_half = (part == 'tongue') & (sign * mean[faces][..., 0] >= -1e-6).all(axis=1)
        islands[f'tongue_{side}'] = _disk(mean, faces, np.flatnonzero(is_half))
    for name in ('mouth_bag', 'teeth_upper', 'teeth_lower', 'socket_right', 'socket_left'):
        islands[name] = _disk(mean, faces, np.flatnonzero(part == name))
    for number, rows in enumerate(_components(faces, np.flatnonzero(part == 'lashes'))):
        islands[f'lashes_{number}'] = _disk(mean, faces, rows)
    return islands


def _components(faces, rows):
    """Return the connected pieces of the faces in `rows`, as lists of rows, ordered by their first face."""
    label = np.arange(faces.max() + 1)
    while True:
        before = label.copy()
        np.minimum.at(label, faces[rows], label[faces[rows]].min(axis=1, keepdims=True))
        label = label[label]
        if np.array_equal(label, before):
            return [rows[label[faces[rows, 0]] == one] for one in np.unique(label[faces[rows, 0]])]


def _fit(uvs, cell, is_centred, may_turn):
    """Return uvs [T, 2] scaled into a cell: the longer side along the cell's if it may turn, or the origin centred."""
    left, bottom, width, height = cell
    extent = np.ptp(uvs, axis=0)
    if is_centred:
        extent = 2 * abs(uvs).max(axis=0)
    elif may_turn and (extent[0] > extent[1]) != (width >= height) and width != height:
        uvs, extent = uvs[:, ::-1] * [1, -1], extent[::-1]
    room = np.array([width, height]) - 2 * MARGIN
    middle = 0 if is_centred else (uvs.min(axis=0) + uvs.max(axis=0)) / 2
    return (uvs - middle) * (room / extent).min() + [left + width / 2, bottom + height / 2]


# ---- Islands


def _skin(mean, faces, partner, rows):
    """Unwrap the half with x >= 0, its front middle line held straight, and mirror it."""
    half = rows[(mean[faces[rows]][..., 0] > -1e-6).all(axis=1)]
    used, corners = np.unique(faces[half], return_inverse=True)
    corners, points = corners.reshape(-1, 3), mean[used]
    loops = sorted(_boundary_loops(corners), key=len)
    outer, eye = loops[-1], loops[0]
    middle, back = abs(points[:, 0]) < 1e-6, points[:, 2] < SEAM_DEPTH
    front = middle & ~back
    gap = _mouth_gap(points, outer, middle)
    centres = np.array([points[eye].mean(axis=0), points[gap].mean(axis=0) * [0, 1, 1]])
    points, first = np.concatenate([points, centres]), len(points)
    patches = [_fan(eye, first), _fan(gap, first + 1, is_closed=False)]
    filled = np.concatenate([corners, *patches])
    front = np.append(front, [False, True])
    start = _convex_start(points, filled, front)
    share = _size(points[filled].mean(axis=1))
    share[len(corners):] = 0.7  # The openings need little texture, but they must not close.
    uvs = _relax(points, filled, start, size=share, weight=1 + (FACE_HOLD - 1) * (share > 0.95), fixed_u=front)
    uvs = uvs[:first]

    is_seam = ~front[:first]  # Or in the half's inside: a UV point of its own on either side.
    number = {vertex: index for index, vertex in enumerate(used)}
    other = np.arange(first, 2 * first)
    other[~is_seam] = np.flatnonzero(~is_seam)
    mirrored_rows, mirrored_corners = _mirror_faces(faces, rows, half, partner, number, other)
    both = np.concatenate([uvs, uvs * [-1, 1]])
    kept, all_corners = np.unique(np.concatenate([corners, mirrored_corners]), return_inverse=True)
    return Island(np.concatenate([half, mirrored_rows]), all_corners.reshape(-1, 3), both[kept])


def _mirror_faces(faces, rows, half, partner, number, other):
    """Return the rows of the other half's faces and their corners: the UV point of each corner's partner, mirrored."""
    rest = np.setdiff1d(rows, half)
    corners = np.array([[other[number[vertex]] for vertex in row] for row in partner[faces[rest]]])
    return rest, corners


def _mouth_gap(points, outer, middle):
    """Return the stretch of the half's outer loop along the lips, from middle line to middle line."""
    loop = np.roll(outer, -int(np.flatnonzero(middle[outer])[0]))
    on = np.append(np.flatnonzero(middle[loop]), len(loop))
    stretches = [np.append(loop, loop[0])[a : b + 1] for a, b in zip(on, on[1:], strict=False) if b - a > 1]
    assert len(stretches) == 2  # The lips, and the neck's edge, which is lower.
    return max(stretches, key=lambda stretch: points[stretch, 1].mean())


def _fan(loop, centre, is_closed=True):
    """Return triangles [K, 3] that close a hole: `loop` runs along the mesh's faces, so the fan runs against it."""
    following = np.roll(loop, -1) if is_closed else loop[1:]
    loop = loop if is_closed else loop[:-1]
    return np.stack([following, loop, np.full(len(loop), centre)], axis=1)


def _convex_start(points, corners, front):
    """Return a Tutte embedding whose boundary is the front middle line, straight at u = 0, and half a circle."""
    (loop,) = _boundary_loops(corners)
    is_front = front[loop]
    # Start the loop at the first vertex of the straight stretch.
    start = int(np.flatnonzero(is_front & ~np.roll(is_front, 1))[0])
    loop, is_front = np.roll(loop, -start), np.roll(is_front, -start)
    count = int(is_front.sum())
    assert is_front[:count].all()
    length = np.linalg.norm(points[np.roll(loop, -1)] - points[loop], axis=1)
    along = np.concatenate([[0], np.cumsum(length)])
    straight = along[:count] / along[count - 1]
    angle = np.pi * (along[count:-1] - along[count - 1]) / (along[-1] - along[count - 1])
    upwards = points[loop[count - 1], 1] > points[loop[0], 1]
    line = np.stack([np.zeros(count), 2 * straight - 1], axis=1)
    arc = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    fixed = np.concatenate([line, arc]) * [1, 1 if upwards else -1]
    uvs = _tutte(len(points), corners, loop, fixed)
    return uvs * np.sqrt(_areas(points[corners]).sum() / abs(_signed_areas(uvs[corners])).sum())


def _disk(mean, faces, rows):
    """Unwrap a disk, with a free boundary."""
    used, corners = np.unique(faces[rows], return_inverse=True)
    corners, points = corners.reshape(-1, 3), mean[used]
    (loop,) = _boundary_loops(corners)
    along = np.cumsum(np.linalg.norm(np.roll(points[loop], -1, axis=0) - points[loop], axis=1))
    angle = 2 * np.pi * along / along[-1]
    start = _tutte(len(points), corners, loop, np.stack([np.cos(angle), np.sin(angle)], axis=1))
    start *= np.sqrt(_areas(points[corners]).sum() / _signed_areas(start[corners]).sum())
    return Island(rows, corners, _relax(points, corners, start))


def _eyeball(mean, faces, rows, is_front):
    """Map the front or back of an eyeball around its gaze (+z): distance from the middle is the angle to the axis.

    In the front island the pupil is the origin; the back, which is never seen, is seen from behind.
    """
    points = mean[faces[rows]]
    centre = (points.max(axis=(0, 1)) + points.min(axis=(0, 1))) / 2
    chosen = (points.mean(axis=1)[:, 2] > centre[2] - BACK_OF_EYE) == is_front
    used, corners = np.unique(faces[rows[chosen]], return_inverse=True)
    direction = (mean[used] - centre) / np.linalg.norm(mean[used] - centre, axis=1, keepdims=True)
    if not is_front:
        direction = direction * [-1, 1, -1]
    flat = direction[:, :2] / np.maximum(np.linalg.norm(direction[:, :2], axis=1, keepdims=True), 1e-9)
    angle = np.arccos(direction[:, 2:].clip(-1, 1))
    return Island(rows[chosen], corners.reshape(-1, 3), flat * angle)


def _size(points):
    """Return how large triangles at points [F, 3] of the skin are drawn: 1 on the face, BACK_SIZE behind and below."""
    depth = np.clip((points[:, 2] - FACE_BACK) / (FACE_FRONT - FACE_BACK), 0, 1)
    height = np.clip((points[:, 1] - NECK_LOW) / (FACE_LOW - NECK_LOW), 0, 1)
    share = np.minimum(depth, height)
    return BACK_SIZE + (1 - BACK_SIZE) * share**2 * (3 - 2 * share)


# ---- Embedding


def _boundary_loops(corners):
    """Return the loops of vertices around holes and rim of triangles [F, 3], each along its faces' direction."""
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    known = set(map(tuple, edges.tolist()))
    following = {a: b for a, b in edges.tolist() if (b, a) not in known}
    loops = []
    while following:
        loop = [min(following)]
        while loop[-1] in following:
            loop.append(following.pop(loop[-1]))
        loops.append(np.array(loop[:-1]))
    return loops


def _tutte(num_points, corners, loop, fixed):
    """Return points [V, 2] each of which is the mean of its neighbours, the loop's being fixed (convex) [L, 2]."""
    edges = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    edges = np.unique(np.sort(edges, axis=1), axis=0)
    both = np.concatenate([edges, edges[:, ::-1]]).T
    graph = csc_array((np.ones(both.shape[1]), tuple(both)), shape=(num_points, num_points))
    inner = np.setdiff1d(np.arange(num_points), loop)
    uvs = np.zeros((num_points, 2))
    uvs[loop] = fixed
    degree = np.bincount(both[0], minlength=num_points)
    system = csc_array((degree[inner].astype(float), (np.arange(len(inner)),) * 2)) - graph[inner][:, inner]
    uvs[inner] = splu(system.tocsc()).solve((graph @ uvs)[inner])
    return uvs


def _relax(points, corners, start, size=None, weight=None, fixed_u=None):
    """Lower the symmetric Dirichlet energy of uvs `start` [V, 2]; vertices of `fixed_u` stay at their u.

    size, weight: [F] wanted size over the true one, and how much a triangle counts; 1 each where None.
    """
    size = np.ones(len(corners)) if size is None else size
    weight = np.ones(len(corners)) if weight is None else weight
    inverse, area = _rest_frames(points[corners] * size[:, None, None])
    energy = _dirichlet(corners, inverse, area * weight / (area * weight).sum(), len(points))
    free = np.ones((len(points), 2), dtype=bool)
    free[:, 0] = True if fixed_u is None else ~fixed_u
    solve = _smoother(points, corners, area * weight / (area * weight).sum(), inverse, free)
    uvs, (value, gradient) = start.copy(), energy(start)
    previous, step = None, None
    for _ in range(ITERATIONS):
        descent = solve(np.where(free, -gradient, 0))
        slope = (gradient * descent).sum()
        if previous is not None:  # Polak and Ribiere's conjugate direction, restarted where it does not descend.
            beta = max(((gradient - previous[0]) * -descent).sum() / previous[1], 0)
            trial = descent + beta * step
            direction = trial if (gradient * trial).sum() < 0 else descent
        else:
            direction = descent
        length, size_before = 1.0, value
        while length > 1e-9:
            value, following = energy(uvs + length * direction)
            if value < size_before + 1e-4 * length * (gradient * direction).sum():
                break
            length /= 2
        else:
            break
        uvs, previous, step, gradient = uvs + length * direction, (gradient, -slope), direction, following
        if size_before - value < 1e-7 * value:
            break
    return uvs


def _rest_frames(triangles):
    """Return the inverse [F, 2, 2] of each triangle's edges, laid flat, and its area [F]."""
    first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    length = np.maximum(np.linalg.norm(first, axis=1), 1e-7)
    along = (second * first).sum(axis=1) / length
    high = np.sqrt(np.maximum((second**2).sum(axis=1) - along**2, 0))
    high = np.maximum(high, 0.05 * length)  # Slivers of the mesh must not blow up.
    zero = np.zeros_like(length)
    inverse = np.stack([1 / length, -along / (length * high), zero, 1 / high], axis=1).reshape(-1, 2, 2)
    return inverse, length * high / 2


def _dirichlet(corners, inverse, share, num_points) -> Callable:
    """Return uvs -> (energy, gradient [V, 2]); the energy is infinite where a triangle is flipped."""

    def evaluate(uvs):
        """Return the energy and its gradient [V, 2] at uvs [V, 2]."""
        triangle = uvs[corners]
        edges = np.stack([triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0]], axis=-1)
        jacobian = edges @ inverse
        (a, b), (c, d) = jacobian[:, 0].T, jacobian[:, 1].T
        det = a * d - b * c
        if det.min() <= 0:
            return np.inf, None
        square = (jacobian**2).sum(axis=(1, 2))
        cofactor = np.stack([d, -c, -b, a], axis=1).reshape(-1, 2, 2)
        slope = 2 * jacobian * (1 + det**-2)[:, None, None] - cofactor * (2 * square * det**-3)[:, None, None]
        slope = share[:, None, None] * slope @ inverse.transpose(0, 2, 1)
        gradient = np.zeros((num_points, 2))
        np.add.at(gradient, corners[:, 1], slope[..., 0])
        np.add.at(gradient, corners[:, 2], slope[..., 1])
        np.add.at(gradient, corners[:, 0], -slope.sum(axis=-1))
        return (share * square * (1 + det**-2)).sum(), gradient

    return evaluate


def _smoother(points, corners, share, inverse, free):
    """Return gradient -> Sobolev gradient: the inverse of the triangles' Laplacian on the free coordinates."""
    tip = np.stack([-inverse.sum(axis=1), inverse[:, 0], inverse[:, 1]], axis=1)  # Gradients of the hat functions.
    local = (tip @ tip.transpose(0, 2, 1)) * share[:, None, None] * 4
    index = np.broadcast_to(corners[:, :, None], local.shape), np.broadcast_to(corners[:, None], local.shape)
    full = coo_array((local.ravel(), (index[0].ravel(), index[1].ravel())), shape=(len(points),) * 2).tocsc()
    full = full + csc_array((np.full(len(points), 1e-9 * full.diagonal().mean()), (np.arange(len(points)),) * 2))
    factors = [splu(full[free[:, k]][:, free[:, k]].tocsc()) for k in (0, 1)]

    def solve(gradient):
        out = np.zeros_like(gradient)
        for k in (0, 1):
            out[free[:, k], k] = factors[k].solve(np.ascontiguousarray(gradient[free[:, k], k]))
        return out

    return solve


def _areas(triangles):
    return np.linalg.norm(np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]), axis=1) / 2


def _signed_areas(triangles):
    first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    return (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2


# ---- Mask


def uv_mask(uvs: np.ndarray, uv_faces: np.ndarray, faces: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return values [V] in [0, 1] drawn in UV space as uint8 [256, 256], first row v = 1, grown into the margins."""
    drawn = np.full((MASK_SIZE, MASK_SIZE), np.nan)
    pixels = uvs * [1, -1] * MASK_SIZE + [0, MASK_SIZE] - 0.5
    for corners, vertices in zip(pixels[uv_faces], values[faces], strict=True):
        low, high = np.ceil(corners.min(axis=0)).astype(int), np.floor(corners.max(axis=0)).astype(int)
        row, column = np.mgrid[low[1] : high[1] + 1, low[0] : high[0] + 1]
        if not row.size:
            continue
        edges = np.stack([corners[1] - corners[0], corners[2] - corners[0]], axis=1)
        offset = np.stack([column - corners[0, 0], row - corners[0, 1]], axis=-1)
        second, third = np.moveaxis(offset @ np.linalg.inv(edges).T, -1, 0)
        weights = np.stack([1 - second - third, second, third], axis=-1)
        inside = (weights >= -1e-9).all(axis=-1)
        drawn[row[inside], column[inside]] = weights[inside] @ vertices
    nearest = distance_transform_edt(np.isnan(drawn), return_distances=False, return_indices=True)
    return np.rint(255 * drawn[tuple(nearest)]).astype(np.uint8)
