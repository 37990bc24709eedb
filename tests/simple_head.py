# SPDX-License-Identifier: Apache-2.0
"""A head that is a formula, UV-mapped, closed, with 68 iBUG landmarks; tests/data/simple_head holds its files."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from geometry.meshes import write_landmarks, write_obj

TEMPLATE = Path(__file__).resolve().parent / 'data' / 'simple_head' / 'head_template.obj'
# Metres, x to the image's right, y up, z to the viewer. Only x >= 0 is modelled; the other half is its mirror image.
MOUTH_Y, MOUTH_X = -0.0500, 0.0263  # Height of the line between the lips; half width of the mouth.
POCKET = 0.002  # Rows cast within this distance of MOUTH_Y fold inwards between the lips.
EYE_X, EYE_Y, EYE_WIDTH = 0.0315, 0.0212, 0.0140  # Centre and half width of an eye.
JAW_HINGE = np.array([0.0, 0.0000, -0.0200])  # The jaw turns about the x-parallel through this point.
JAW_ANGLE = np.deg2rad(20.0)  # Turn at jaw_open = 1.
HALF_COLUMNS = 36  # Steps around the head from the front to the back.
MIRROR_X = np.array([-1.0, 1.0, 1.0])


class Blob(NamedTuple):
    """Part of the implicit surface: an ellipsoid, or a capsule if `end` is given; off the midline, a mirrored pair."""

    blend: float  # Distance over which it melts into what is there.
    start: tuple[float, float, float]
    radii: tuple[float, ...]  # Three half axes, or the capsule's radius at its start and at its end.
    end: tuple[float, float, float] | None = None
    is_cut: bool = False  # Carve it out instead of adding it.


BLOBS = (
    Blob(0.020, (0.000, 0.0440, -0.0460), (0.0760, 0.0860, 0.0990)),  # cranium
    Blob(0.030, (0.000, -0.0200, -0.0120), (0.0600, 0.0820, 0.0580)),  # face
    Blob(0.030, (0.040, -0.0020, 0.0040), (0.0250, 0.0220, 0.0220)),  # cheekbone
    Blob(0.030, (0.046, -0.0500, -0.0260), (0.0140, 0.0140), end=(0.010, -0.0930, 0.0140)),  # jaw
    Blob(0.022, (0.000, -0.0930, 0.0190), (0.0190, 0.0145, 0.0170)),  # chin
    Blob(0.025, (0.034, -0.0360, -0.0060), (0.0290, 0.0400, 0.0320)),  # cheek
    Blob(0.025, (0.000, -0.0480, 0.0095), (0.0360, 0.0380, 0.0335)),  # around the mouth
    Blob(0.030, (0.000, -0.0200, -0.0620), (0.0500, 0.0520), end=(0.0, -0.1650, -0.0680)),  # neck
    Blob(0.050, (0.030, -0.1650, -0.0740), (0.0280, 0.0220), end=(0.082, -0.1930, -0.0780)),  # slope of the shoulder
    Blob(0.016, (0.010, 0.0375, 0.0395), (0.0070, 0.0060), end=(0.040, 0.0375, 0.0230)),  # brow ridge
    Blob(0.020, (0.033, 0.0195, 0.0560), (0.0200, 0.0130, 0.0220), is_cut=True),  # eye socket
    Blob(0.016, (0.000, 0.0300, 0.0400), (0.0065, 0.0085), end=(0.0, -0.0010, 0.0610)),  # bridge of the nose
    Blob(0.010, (0.000, -0.0050, 0.0640), (0.0115, 0.0105, 0.0115)),  # tip of the nose
    Blob(0.010, (0.0115, -0.0105, 0.0520), (0.0065, 0.0080, 0.0105)),  # wing of the nose
    Blob(0.012, (0.000, -0.0140, 0.0500), (0.0110, 0.0060, 0.0120)),  # base of the nose
    Blob(0.004, (EYE_X, EYE_Y, 0.0190), (0.0155, 0.0140, 0.0150)),  # eyeball
    Blob(0.005, (0.0045, -0.0452, 0.0462), (0.0060, 0.0038), end=(0.0255, -0.0500, 0.0345)),  # upper lip
    Blob(0.005, (0.0040, -0.0555, 0.0450), (0.0068, 0.0034), end=(0.0250, -0.0505, 0.0345)),  # lower lip
)
NECK_BOTTOM, NECK_EDGE = -0.190, 0.012  # Height of the plane that closes the neck; rounding of its edge.

# Rows of vertices lie where cones of rays leave the surface. Each line: rows since the line before, apex y, apex z,
# elevation of the rays at the front and at the back in degrees, UV height. In between: linear.
ROWS = (
    (0, 0.036, -0.045, 90, 90, 0.985),  # crown
    (7, 0.036, -0.045, 28, 38, 0.860),
    (5, 0.036, -0.042, 0, 15, 0.740),  # brow
    (13, 0.008, -0.040, 0, 5, 0.635),  # below the eye
    (5, -0.010, -0.040, 0, 0, 0.570),
    (6, -0.022, -0.040, 0, -3, 0.530),  # below the nose
    (4, -0.036, -0.040, 0, -6, 0.485),
    (5, -0.048, -0.040, 0, -9, 0.440),  # inner edge of the upper lip
    (4, -0.052, -0.040, 0, -11, 0.425),  # inner edge of the lower lip
    (5, -0.064, -0.040, 0, -15, 0.380),
    (2, -0.075, -0.040, 0, -17, 0.335),
    (5, -0.078, -0.040, -28, -20, 0.225),  # chin
    (2, -0.078, -0.040, -44, -24, 0.190),
    (2, -0.100, -0.055, -28, -14, 0.160),  # throat
    (2, -0.128, -0.066, -4, -4, 0.120),
    (3, -0.165, -0.068, -2, -2, 0.065),
    (2, -0.172, -0.068, -9, -9, 0.042),
    (1, -0.172, -0.068, -22, -22, 0.028),
    (1, -0.172, -0.068, -90, -90, 0.010),  # bottom of the neck
)
UPPER_LIP_ROW, LOWER_LIP_ROW = sum(line[0] for line in ROWS[:8]), sum(line[0] for line in ROWS[:9])
# Fraction of the columns, azimuth from the front in degrees, distance from the middle of the UV square.
COLUMNS = ((0.00, 0, 0.000), (0.42, 36, 0.210), (0.55, 64, 0.330), (0.86, 112, 0.440), (1.00, 180, 0.490))

# Landmarks of the half with x >= 0 where a ray along z leaves the head: index, x, y.
FRONT_LANDMARKS = (
    (22, 0.0100, 0.0405), (23, 0.0210, 0.0440), (24, 0.0330, 0.0450), (25, 0.0450, 0.0420), (26, 0.0560, 0.0330),
    (27, 0.0000, 0.0260), (28, 0.0000, 0.0160), (29, 0.0000, 0.0060), (30, 0.0000, -0.0040),
    (33, 0.0000, -0.0190), (34, 0.0070, -0.0180), (35, 0.0145, -0.0165),
    (42, 0.0180, 0.0205), (43, 0.0265, 0.0268), (44, 0.0365, 0.0268), (45, 0.0450, 0.0217),
    (46, 0.0365, 0.0170), (47, 0.0265, 0.0170),
    (51, 0.0000, -0.0395), (52, 0.0070, -0.0385), (53, 0.0175, -0.0430), (54, 0.0263, -0.0505),
    (55, 0.0185, -0.0590), (56, 0.0090, -0.0625), (57, 0.0000, -0.0635),
)  # fmt: skip
# Azimuth in degrees of landmarks 8 (chin) to 16 (ear) of the contour, each where a horizontal ray from (0, y, -0.03)
# leaves the head; their heights go from the chin's to the ear's like equal steps on a quarter of an ellipse.
CONTOUR_AZIMUTHS = (0, 18, 36, 51, 62, 69, 74, 77, 78)
CHIN_Y, EAR_Y = -0.1060, 0.0180
# Landmarks at the vertex of a lip's inner edge that is nearest to x: index, x, lower lip or not.
LIP_LANDMARKS = ((62, 0.0, False), (63, 0.0085, False), (64, 0.0230, False), (65, 0.0085, True), (66, 0.0, True))
# The usual left-right table of the 68 points.
LANDMARK_MIRROR = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31, 45, 44, 43, 42, 47, 46, 39, 38, 37, 36]
    + [41, 40, 54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)

MASK_SIZE = 256
MASK_OPAQUE_Z, MASK_CLEAR_Z = -0.050, -0.110  # Depths of the neutral head where the UV mask is 255 and 0.
DEMO_HEAD = {'jaw_open': 0.35, 'smile': 0.6, 'width': 0.97, 'chin': 1.03, 'nose': 1.08}


@dataclass(frozen=True)
class SimpleHead:
    """A closed triangle mesh of a head, metres, y up, nose towards +z, triangles counter-clockwise seen from outside.

    vertices:  [V, 3] float32, multiples of 1e-6.
    faces:     [F, 3] int32 into vertices.
    uvs:       [T, 2] float32 in (0, 1), v up; T > V because of the seam at the back.
    uv_faces:  [F, 3] int32 into uvs.
    landmarks: [68, 3] float32 on the surface, iBUG order, starting at the image's left.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    uv_faces: np.ndarray
    landmarks: np.ndarray


class _Grid(NamedTuple):
    """The neutral half: rows from crown to neck, columns from front to back; first and last row are one point each."""

    cast: np.ndarray  # [rows, columns, 3] on the implicit surface
    rest: np.ndarray  # [rows, columns, 3] with lids, ears and lips
    u: np.ndarray  # [columns] distance from the middle of the UV square
    v: np.ndarray  # [rows]


class _Topology(NamedTuple):
    """What no expression changes; landmark numbers[k] (those with x >= 0) is corners[k] weighted by weights[k]."""

    faces: np.ndarray
    uvs: np.ndarray
    uv_faces: np.ndarray
    numbers: np.ndarray
    corners: np.ndarray
    weights: np.ndarray


def simple_head(
    jaw_open: float = 0.0, smile: float = 0.0, width: float = 1.0, chin: float = 1.0, nose: float = 1.0
) -> SimpleHead:
    """Build the head with an expression and an identity; every argument keeps the topology.

    jaw_open: 0 closed to 1, the jaw turned by 20 degrees.
    smile:    0 neutral to 1, the corners of the mouth 5 mm up and out.
    width:    factor on x, 0.5 to 2.
    chin:     factor on the length of the lower face, 0.5 to 2.
    nose:     factor on the length of the nose, 0.5 to 2.
    Raises ValueError for a value outside its range.
    """
    for name, value in (('jaw_open', jaw_open), ('smile', smile)):
        _check_range(name, value, 0.0, 1.0)
    for name, value in (('width', width), ('chin', chin), ('nose', nose)):
        _check_range(name, value, 0.5, 2.0)
    grid, topology = _neutral_grid(), _topology()
    half = grid.rest + _jaw_motion(grid, jaw_open) + _smile_motion(grid, smile) + _identity_motion(grid, chin, nose)
    half[..., 0] *= width
    vertices = _mirrored(_quantised(half, 6))
    landmarks = np.empty((68, 3))
    half_landmarks = (vertices[topology.corners] * topology.weights[..., None]).sum(1)
    landmarks[LANDMARK_MIRROR[topology.numbers]] = half_landmarks * MIRROR_X
    landmarks[topology.numbers] = half_landmarks
    landmarks = _quantised(landmarks, 8)
    return SimpleHead(
        vertices.astype(np.float32), topology.faces, topology.uvs, topology.uv_faces, landmarks.astype(np.float32)
    )


def uv_face_mask() -> np.ndarray:
    """Return the mask [256, 256] uint8 in UV space, first row v = 1: 255 on the face, 0 at the back of the head."""
    grid = _neutral_grid()
    centre = (np.arange(MASK_SIZE) + 0.5) / MASK_SIZE
    row = np.interp(1 - centre, grid.v[::-1], np.arange(len(grid.v))[::-1])
    column = np.interp(abs(centre - 0.5), grid.u, np.arange(len(grid.u)))
    z_rows = np.array([np.interp(column, np.arange(len(grid.u)), z) for z in grid.cast[..., 2]])
    z = np.array([np.interp(row, np.arange(len(grid.v)), z) for z in z_rows.T]).T
    return np.rint(255 * _step(MASK_CLEAR_Z, MASK_OPAQUE_Z, z)).astype(np.uint8)


def write_demo_files(folder: Path) -> None:
    """Write demo.obj, demo_kpt2d.txt, head_template.obj and uv_face_mask.png into `folder`, made where missing."""
    folder.mkdir(parents=True, exist_ok=True)
    demo = simple_head(**DEMO_HEAD)
    write_obj(folder / 'head_template.obj', simple_head())
    write_obj(folder / 'demo.obj', demo)
    write_landmarks(folder / 'demo_kpt2d.txt', demo.landmarks)
    mask = Image.fromarray(uv_face_mask())
    mask.save(folder / 'uv_face_mask.png', optimize=True)


def _check_range(name, value, low, high):
    if not low <= value <= high:
        raise ValueError(f'{name}: expected {low} to {high}, got {value}')


def _step(start, end, x):
    """Rise smoothly from 0 at `start` to 1 at `end`, with two continuous derivatives."""
    t = np.clip((x - start) / (end - start), 0, 1)
    return t**3 * (t * (6 * t - 15) + 10)


def _bump(distance, radius):
    """Fall smoothly from 1 at distance 0 to 0 at `radius`."""
    return np.clip(1 - (distance / radius) ** 2, 0, 1) ** 3


def _quantised(points, decimals):
    return np.round(points, decimals) + 0.0  # No negative zeros: they would show in the files.


# ---- The implicit surface and its sampling


def _distance(blob, points):
    """Return roughly the signed distance to a blob; exact for capsules of one radius."""
    offset = points - np.array(blob.start)
    if blob.end is None:
        radii = np.array(blob.radii)
        scaled = np.linalg.norm(offset / radii, axis=-1)
        return scaled * (scaled - 1) / np.maximum(np.linalg.norm(offset / radii**2, axis=-1), 1e-9)
    axis = np.array(blob.end) - np.array(blob.start)
    along = np.clip(offset @ axis / (axis @ axis), 0, 1)
    radius = blob.radii[0] + along * (blob.radii[1] - blob.radii[0])
    return np.linalg.norm(offset - along[..., None] * axis, axis=-1) - radius


def _union(a, b, blend):
    """Smooth minimum with a cubic blend."""
    return np.minimum(a, b) - np.maximum(blend - abs(a - b), 0) ** 3 / (6 * blend**2)


def _field(points):
    """Return a smooth function [...] of points [..., 3] that is negative inside the head."""
    total = np.full(points.shape[:-1], np.inf)
    for blob in BLOBS:
        part = _distance(blob, points)
        if blob.start[0] > 0:
            part = _union(part, _distance(blob, points * MIRROR_X), blob.blend)
        total = -_union(-total, part, blob.blend) if blob.is_cut else _union(total, part, blob.blend)
    return -_union(-total, points[..., 1] - NECK_BOTTOM, NECK_EDGE)


def _outermost(origin, direction, far=0.24, num_steps=64):
    """Return where rays, followed from `far` towards their origin inside the head, first meet the surface."""
    reach = np.linspace(far, 0, num_steps + 1)
    is_inside = np.stack([_field(origin + t * direction) < 0 for t in reach])
    assert is_inside[-1].all()  # Every apex of ROWS lies in the head.
    first = is_inside.argmax(0)
    inner, outer = reach[first], reach[first - 1]
    for _ in range(34):  # Halves 4 mm to below a picometre.
        middle = (inner + outer) / 2
        hit = _field(origin + middle[..., None] * direction) < 0
        inner, outer = np.where(hit, middle, inner), np.where(hit, outer, middle)
    return origin + inner[..., None] * direction


@functools.cache
def _neutral_grid():
    table = np.array(ROWS, float)
    ends = np.cumsum(table[:, 0])
    apex_y, apex_z, front, back, v = (np.interp(np.arange(ends[-1] + 1), ends, table[:, k]) for k in range(1, 6))
    share, angle, distance = np.array(COLUMNS, float).T
    columns = np.arange(HALF_COLUMNS + 1) / HALF_COLUMNS
    azimuth = np.deg2rad(np.interp(columns, share, angle))
    u = np.interp(columns, share, distance)

    turned = _step(np.deg2rad(30), np.deg2rad(150), azimuth)  # None up to the mouth's corner: rows are level there.
    elevation = np.deg2rad(front[:, None] + (back - front)[:, None] * turned)
    horizontal = np.cos(elevation)
    direction = np.stack([np.sin(azimuth) * horizontal, np.sin(elevation), np.cos(azimuth) * horizontal], -1)
    origin = np.stack([np.zeros_like(apex_y), apex_y, apex_z], -1)[:, None]
    cast = _outermost(origin, direction)
    cast[[0, -1]] = cast[[0, -1], :1]
    cast[:, [0, -1], 0] = cast[[0, -1], :, 0] = 0  # The midline and both poles.
    return _Grid(cast, cast + _lid_offset(cast) + _ear_offset(cast) + _lip_offset(cast), u, v)


def _offset(x=0.0, y=0.0, z=0.0):
    return np.stack(np.broadcast_arrays(x, y, z), -1)


def _lid_offset(cast):
    """Raise the skin around an almond-shaped opening over the eyeball."""
    x, y, z = np.moveaxis(cast, -1, 0)
    across = (x - EYE_X) / EYE_WIDTH
    almond = np.maximum(1 - across**2, -0.6)
    outside = np.where(y > EYE_Y, y - EYE_Y - 0.0062 * almond, EYE_Y - y - 0.0045 * almond)
    lid = _step(-0.0008, 0.0012, outside) * (1 - _step(0.001, 0.009, outside)) * (1 - _step(1.0, 1.5, abs(across)))
    return _offset(z=0.0026 * np.where(z > 0, lid, 0))


def _ear_offset(cast):
    """Pull a tilted oval at the side outwards and back, less at its front edge and in its hollow."""
    x, y, z = np.moveaxis(cast, -1, 0)
    tilt = np.deg2rad(12.0)
    back, up = -(z + 0.036), y - 0.010
    high = (up * np.cos(tilt) + back * np.sin(tilt)) / 0.031
    deep = (back * np.cos(tilt) - up * np.sin(tilt)) / (0.0175 * (1 + 0.18 * np.clip(high, -1, 1)))
    oval = 1 - _step(0.62, 1.12, np.hypot(deep, high))
    hollow = 1 - _step(0.15, 0.75, np.hypot(deep + 0.25, 0.8 * high + 0.05))
    lift = oval * _step(-1.15, 0.5, deep) * (1 - 0.55 * hollow) * (x > 0.03)
    return _offset(x=0.019 * lift * (1 - 0.25 * np.clip(high, -1, 1) ** 2), z=-0.009 * lift)


def _mouth_share(x):
    """1 in the middle of the mouth, 0 from its corners on."""
    return np.sqrt(np.clip(1 - (x / MOUTH_X) ** 2, 0, 1))


def _lip_offset(cast):
    """Close the lips and fold the rows between them into a pocket that opens with the jaw."""
    x, y, z = np.moveaxis(cast, -1, 0)
    above = y - MOUTH_Y
    share = _mouth_share(x) * (z > 0)
    closing = np.sign(above) * np.minimum(abs(above), POCKET) * (1 - _step(POCKET, 0.008, abs(above)))
    depth = np.clip(1 - (above / POCKET) ** 2, 0, 1)
    return _offset(y=-0.9 * share * closing, z=-share * (0.014 * np.sqrt(depth) + 0.002 * _bump(above, 0.004)))


# ---- Motion of the neutral half


def _jaw_motion(grid, jaw_open):
    x, y, z = np.moveaxis(grid.cast, -1, 0)
    band = POCKET + 0.030 * _step(0.6, 2.2, x / MOUTH_X)
    weight = _step(-band, band, MOUTH_Y - y) * _step(-0.050, 0.000, z) * _step(-0.160, -0.112, y)
    turn = JAW_ANGLE * jaw_open
    arm = grid.rest - JAW_HINGE
    down = np.cos(turn) * arm[..., 1] - np.sin(turn) * arm[..., 2]
    ahead = np.sin(turn) * arm[..., 1] + np.cos(turn) * arm[..., 2]
    return weight[..., None] * (_offset(0.0, down, ahead) - arm * np.array([0.0, 1.0, 1.0]))


def _smile_motion(grid, smile):
    x, y, z = np.moveaxis(grid.cast, -1, 0)
    corner = smile * _bump(np.hypot(x - MOUTH_X, y - MOUTH_Y), 0.030) * (z > 0)
    cheek = smile * _bump(np.hypot(x - 0.042, y + 0.014), 0.024) * (z > 0)
    outwards = _step(0.0, 0.020, x) * (0.0050 * corner + 0.0010 * cheek)
    return _offset(outwards, 0.0055 * corner + 0.0020 * cheek, 0.0020 * cheek - 0.0040 * corner)


def _identity_motion(grid, chin, nose):
    x, y, z = np.moveaxis(grid.rest, -1, 0)
    lower = _step(-0.010, -0.090, y) * _step(-0.180, -0.110, y)
    tip = _bump(np.hypot(x, y + 0.004), 0.030) * (z > 0)
    return _offset(y=-0.1 * (chin - 1) * lower, z=0.03 * (nose - 1) * tip)


# ---- Topology


def _mirrored(half):
    """Turn the half grid [rows, columns, 3] into all vertices [V, 3]: crown, rings that start at the back, neck."""
    ring = np.concatenate([half[:, ::-1] * MIRROR_X, half[:, 1:-1]], 1)[1:-1]
    return np.concatenate([half[0, :1], ring.reshape(-1, 3), half[-1, :1]]) + 0.0


def _vertex_index(row, column, num_rows):
    """Return indices into what _mirrored returns; columns count from the front, negative towards the image's left."""
    ring_size = 2 * HALF_COLUMNS
    last = 1 + (num_rows - 2) * ring_size
    index = 1 + (row - 1) * ring_size + (column + HALF_COLUMNS) % ring_size
    return np.where(row == 0, 0, np.where(row == num_rows - 1, last, index))


def _half_triangles(rest):
    """Return [F / 2, 3, 2] row and column of the corners, each cell of the grid cut along its shorter diagonal."""
    num_rows, num_columns = rest.shape[:2]
    row, column = np.mgrid[: num_rows - 1, : num_columns - 1]
    front, back = np.stack([row, column], -1), np.stack([row, column + 1], -1)
    low_front, low_back = front + [1, 0], back + [1, 0]
    to_low_back = np.linalg.norm(rest[:-1, :-1] - rest[1:, 1:], axis=-1)
    to_low_front = np.linalg.norm(rest[:-1, 1:] - rest[1:, :-1], axis=-1)
    cut = (to_low_back < to_low_front - 1e-6)[..., None, None]  # The margin decides ties the same way everywhere.
    cut[0], cut[-1] = True, False  # At a pole the second triangle is empty.
    first = np.stack([front, low_front, np.where(cut[..., 0], low_back, back)], 2)
    second = np.stack([np.where(cut[..., 0], front, back), np.where(cut[..., 0], low_back, low_front)], 2)
    second = np.concatenate([second, np.where(cut, back[:, :, None], low_back[:, :, None])], 2)[1:-1]
    return np.concatenate([first.reshape(-1, 3, 2), second.reshape(-1, 3, 2)])


@functools.cache
def _topology():
    grid = _neutral_grid()
    num_rows = len(grid.v)
    triangles = _half_triangles(grid.rest)
    row, column = np.moveaxis(triangles, -1, 0)
    half_faces = _vertex_index(row, column, num_rows)
    faces = np.concatenate([half_faces, _vertex_index(row, -column, num_rows)[:, ::-1]])

    is_pole = (row == 0) | (row == num_rows - 1)  # A pole has a UV point of its own in the middle of each cell.
    u = np.interp(column + 0.5 * is_pole, np.arange(len(grid.u)), grid.u)
    micro = np.rint(1e6 * np.stack([u, grid.v[row]], -1)).astype(np.int64)
    micro = np.concatenate([micro + [500_000, 0], (micro * [-1, 1] + [500_000, 0])[:, ::-1]])
    uvs, uv_faces = np.unique(micro.reshape(-1, 2), axis=0, return_inverse=True)

    landmarks, corners, weights = _half_landmarks(grid, half_faces)
    constant = faces.astype(np.int32), (uvs / 1e6).astype(np.float32), uv_faces.reshape(-1, 3).astype(np.int32)
    for array in constant:
        array.flags.writeable = False  # All heads share them.
    return _Topology(*constant, landmarks, corners, weights)


def _half_landmarks(grid, half_faces):
    """Return landmark numbers [L], vertices [L, 3] and weights [L, 3] of the landmarks with x >= 0."""
    rays = [(index, (x, y, 0.0), (0.0, 0.0, 1.0)) for index, x, y in FRONT_LANDMARKS]
    for step, azimuth in enumerate(np.deg2rad(CONTOUR_AZIMUTHS)):
        height = CHIN_Y + (EAR_Y - CHIN_Y) * (1 - np.cos(step * np.pi / 16))
        rays.append((8 + step, (0.0, height, -0.03), (np.sin(azimuth), 0.0, np.cos(azimuth))))
    numbers, origins, directions = (np.array(part) for part in zip(*rays, strict=True))
    face, weights = _last_hit(_mirrored(grid.rest)[half_faces], origins, directions)
    corners = half_faces[face]

    for number, x, is_lower in LIP_LANDMARKS:
        row = LOWER_LIP_ROW if is_lower else UPPER_LIP_ROW
        column = abs(grid.rest[row, : HALF_COLUMNS // 2, 0] - x).argmin()
        vertex = _vertex_index(np.array(row), column, len(grid.v))
        numbers, corners = np.append(numbers, number), np.append(corners, [[vertex] * 3], 0)
        weights = np.append(weights, [[1.0, 0.0, 0.0]], 0)
    return numbers, corners, weights


def _last_hit(triangles, origins, directions):
    """Return the triangle [L] and barycentric weights [L, 3] where each ray leaves triangles [F, 3, 3] for good."""
    start, edge_b, edge_c = triangles[:, 0], triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    across = np.cross(directions[:, None], edge_c)
    determinant = (across * edge_b).sum(-1)
    determinant = np.where(abs(determinant) < 1e-15, np.nan, determinant)
    offset = origins[:, None] - start
    turned = np.cross(offset, edge_b)
    weight_b = (offset * across).sum(-1) / determinant
    weight_c = (directions[:, None] * turned).sum(-1) / determinant
    reach = (edge_c * turned).sum(-1) / determinant
    weights = np.stack([1 - weight_b - weight_c, weight_b, weight_c], -1)
    face = np.where((weights >= -1e-9).all(-1), reach, -np.inf).argmax(1)  # Comparisons with NaN are false.
    weights = weights[np.arange(len(face)), face]
    weights = np.where(weights < 1e-9, 0, weights)  # A landmark of the midline must not lean on other vertices.
    return face, weights / weights.sum(-1, keepdims=True)
