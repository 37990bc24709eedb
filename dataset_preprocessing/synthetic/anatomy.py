# SPDX-License-Identifier: Apache-2.0
"""Where things are on the head's template: hairline, beard, brows, lips, ears, neck; the same for all people."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree

from dataset_preprocessing.synthetic.noise import smoothstep, unit
from geometry.head_model import EmbeddedHead, load_embedded_head
from torch_utils.ops.rasterize import rasterize

CENTRE = np.array([0.0, 0.035, -0.050], dtype=np.float32)  # Of the skull: hair grows away from it.
# Height of the hairline over the angle from the front, in degrees: forehead, temple, sideburn, ear, nape.
HAIRLINE = np.array([
    (0, 0.092), (18, 0.093), (34, 0.089), (46, 0.076), (56, 0.060), (65, 0.040), (73, 0.010), (82, -0.004), (92, 0.020),
    (108, 0.016), (118, -0.025), (140, -0.056), (180, -0.062),
])  # fmt: skip
NUM_AZIMUTHS, NUM_ELEVATIONS = 64, 40
LOWEST_ELEVATION = -1.35
NECK_RADIUS = 0.062
# Rings around the neck: height of the first at the sides, distances, and how much lower the front is.
NECK_TOP, NECK_STEP, NECK_TILT, NECK_Z, NECK_LEVELS, NECK_STEPS = -0.100, 0.010, 0.022, -0.060, 6, 40
NUM_ROOTS, NUM_BEARD_ROOTS, NUM_GUIDES = 5200, 2600, 420
MAP_SIZE, MAP_EXTENT = 512, 0.2  # Cells and metres of the map of the brows, which is centred on x = 0, y = 0.
BROW_REACH = 0.011  # Metres from a brow's axis.
EAR_SIDES = (-0.082, 0.082)  # Metres from the middle.
NUM_AO_VIEWS, AO_SIZE, AO_BIAS = 64, 160, 0.0025
OCCLUSION_RADIUS = 0.3  # Half side of what a view of occlusion or a light sees, metres.


class Roots(NamedTuple):
    """Points of the skin from which hair grows: corners [N, 3] int64, weights [N, 3], margin [N] metres.

    margin: how far inside of its area a point is; roots are in random order, each a fair sample of the area with the
    ones before. guide [N]: number of the nearest of the first NUM_GUIDES roots.
    """

    corners: np.ndarray
    weights: np.ndarray
    margin: np.ndarray
    guide: np.ndarray
    template: np.ndarray

    def on(self, vertices: np.ndarray, count: int | slice | np.ndarray) -> np.ndarray:
        """Return values [n, C] at the roots chosen, of values [V, C] at vertices."""
        corners, weights = self.corners[count], self.weights[count]
        return (vertices[corners] * weights[..., None]).sum(axis=1)


class Anatomy:
    """Constants of the head's topology: faces, areas as numbers per vertex, roots of hair, occlusion.

    All arrays float32 unless told otherwise; V vertices. neutral: [V, 3]. landmarks: [68, 3]. faces: [F, 3] int64.
    """

    def __init__(self, model: EmbeddedHead):
        self.model = model
        self.faces = np.ascontiguousarray(np.asarray(model.faces), dtype=np.int64)
        self.uvs, self.uv_faces = np.asarray(model.uvs), np.asarray(model.uv_faces)
        self.expression_names = list(model.expression_names)
        self.neutral, self.landmarks = self.head(np.zeros(model.num_identity), {})
        self.regions = {name: np.asarray(mask, dtype=bool) for name, mask in model.regions.items()}
        self.feminine, self.narrow = self._leanings()
        self._incidence, self.average = _operators(self.faces, len(self.neutral))
        self._name_areas()
        self.scalp_margin = _scalp_margin(self.neutral) * ~self.ears + -0.05 * self.ears
        self.beard = self._beard_area()
        self.roots = self._roots(self.scalp_margin, NUM_ROOTS, -0.012, 1)
        self.beard_roots = self._roots(np.where(self.beard > 0.3, self.beard, -1), NUM_BEARD_ROOTS, 0.0, 2)
        self._neck = _neck_rings(self.neutral, self._faces_of('neck', 'skin'))
        self._shell = _Shell(self.neutral, self.faces[~(self.ears[self.faces].any(axis=1)) & self._is_skin_face()])
        self.occlusion = self._occlusion()
        self.brow_map = _brow_map(self.landmarks)

    def coefficients(self, weights: dict[str, float]) -> np.ndarray:
        """Return the expression [E] of weights by name."""
        row = np.zeros(len(self.expression_names), dtype=np.float32)
        for name, weight in weights.items():
            row[self.expression_names.index(name)] = weight
        return row

    def head(self, identity: np.ndarray, expression: dict[str, float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return vertices [V, 3] and landmarks [68, 3] as files hold them: rounded to six decimals."""
        if isinstance(expression, dict):
            expression = self.coefficients(expression)
        with torch.no_grad():
            rows = (torch.as_tensor(np.asarray(x), dtype=torch.float32)[None] for x in (identity, expression))
            mesh = self.model(*rows)
        return tuple((np.round(x[0].numpy().astype(np.float64), 6) + 0.0).astype(np.float32) for x in mesh[:2])

    def _leanings(self):
        """Return unit directions [I] of identities: smaller jaws and noses, fuller lips, larger eyes; narrower jaws."""
        count = self.model.num_identity
        with torch.no_grad():
            moved = self.model(torch.eye(count), torch.zeros(count, len(self.expression_names))).landmarks.numpy()
        change = moved - self.landmarks

        def grows(high, low, axis):
            return change[:, high, axis] - change[:, low, axis]

        measures = (
            -1.0 * grows(12, 4, 0) - 1.0 * grows(10, 6, 0) - 0.5 * grows(27, 8, 1) - 1.2 * grows(35, 31, 0)
            + 1.5 * grows(51, 57, 1) + 2.5 * (grows(38, 40, 1) + grows(43, 47, 1)) + 1.0 * grows(19, 37, 1)
        )  # fmt: skip
        narrow = -grows(13, 3, 0) - grows(12, 4, 0) - grows(11, 5, 0)
        return tuple((x / np.linalg.norm(x)).astype(np.float32) for x in (measures, narrow))

    def normals(self, vertices: np.ndarray) -> np.ndarray:
        """Return outward unit normals [V, 3] of vertices [V, 3]."""
        a, b, c = (vertices[self.faces[:, corner]] for corner in range(3))
        return unit(self._incidence @ _cross(b - a, c - a))

    def shell(self, vertices: np.ndarray) -> np.ndarray:
        """Return the distance [elevations, azimuths] from CENTRE to the skin of a head."""
        return self._shell.radius(vertices)

    def neck(self, vertices: np.ndarray) -> np.ndarray:
        """Return rings [NECK_LEVELS, NECK_STEPS, 3] around the neck of a head."""
        corners, weights = self._neck
        return (vertices[corners] * weights[..., None]).sum(axis=2)

    def _faces_of(self, *names):
        return self.faces[np.all([self.regions[name][self.faces].all(axis=1) for name in names], axis=0)]

    def _is_skin_face(self):
        return self.skin[self.faces].all(axis=1)

    def _region(self, *names):
        return np.any([self.regions.get(name, np.zeros(len(self.neutral), dtype=bool)) for name in names], axis=0)

    def _name_areas(self):
        """Set areas [V]: bool for parts of the mesh, 0 to 1 for what fades on the skin."""
        x, y, z = self.neutral.T
        self.eyes, self.teeth = self._region('eyes'), self._region('teeth')
        self.tongue, self.lashes = self._region('tongue'), self._region('lashes')
        self.skin = self._region('skin')
        self.eye_sides = [self._region('eye_left'), self._region('eye_right')]
        self.mouth_bag = self._region('mouth_bag')
        # Less and less light comes to teeth at the sides and to the root of the tongue: mouths end in the dark.
        deep = np.where(self.teeth, smoothstep(0.014, 0.030, abs(x)), smoothstep(0.050, 0.010, z))
        self.in_mouth = np.where(self.teeth | self.tongue, 1 - 0.8 * deep, 1).astype(np.float32)
        self.ears = self._region('ears')
        # Where glasses rest on the ears: left in the picture, right.
        self.ear_rests = [np.linalg.norm(self.neutral - (side, 0.013, -0.042), axis=1).argmin() for side in EAR_SIDES]
        self.front_face = np.flatnonzero(self._region('face') & (z > 0) & (y > -0.05) & (y < 0.06))
        soft = self.average @ self._region('lips').astype(np.float32)
        self.lips = np.where(self.skin, np.maximum(soft, 0.8 * self._region('lips')), 0).astype(np.float32)
        cheek = np.hypot((abs(x) - 0.042) / 0.024, (y + 0.018) / 0.020)
        nose = np.hypot(x / 0.016, (y + 0.016) / 0.018)
        front = self.skin & (z > 0)
        self.blush = np.maximum(np.exp(-cheek**2) * 0.8, np.exp(-nose**2)) * front + 0.9 * self.ears
        eye_y = self.landmarks[36:48, 1].mean()
        lid = np.hypot((abs(x) - 0.032) / 0.021, (y - eye_y - 0.003) / 0.014)
        self.eyelids = np.exp(-lid**4) * front

    def _beard_area(self):
        """Return 0 to 1 [V]: upper lip, chin, jaw, and a strip up to the sideburns."""
        x, y, z = self.neutral.T
        nose_base, corner = self.landmarks[33, 1], self.landmarks[54]
        chin = self.landmarks[8, 1]
        cheek_line = corner[1] + 0.002 + 0.85 * np.maximum(abs(x) - corner[0] - 0.004, 0)
        under = smoothstep(0.006, -0.006, y - cheek_line)
        moustache = smoothstep(0.010, 0.004, abs(x) - 0.021) * smoothstep(-0.001, -0.005, y - nose_base)
        area = np.maximum(under, moustache) * smoothstep(chin - 0.032, chin - 0.018, y)
        area = area * smoothstep(-0.062, -0.045, z) * (1 - self.lips) * self.skin * ~self.mouth_bag * ~self.ears
        return area.astype(np.float32)

    def _roots(self, margin, count, lowest, seed):
        """Return roots where the margin of the area is above `lowest`."""
        faces = self.faces[self._is_skin_face() & (margin[self.faces].min(axis=1) > lowest - 0.02)]
        rng = np.random.default_rng(seed)
        a, b, c = (self.neutral[faces[:, corner]] for corner in range(3))
        areas = np.linalg.norm(np.cross(b - a, c - a), axis=1)
        # Many candidates, of which each next one taken is kept only if none before it is near.
        chosen = rng.choice(len(faces), 12 * count, p=areas / areas.sum())
        u, v = np.sort(rng.random((2, len(chosen))), axis=0)
        weights = np.stack([u, v - u, 1 - v], axis=1).astype(np.float32)
        inside = (margin[faces[chosen]] * weights).sum(axis=1)
        is_kept = inside > lowest
        corners, weights, inside = faces[chosen][is_kept], weights[is_kept], inside[is_kept]
        points = (self.neutral[corners] * weights[..., None]).sum(axis=1)
        order = _spread_order(points, count)
        points, corners, weights = points[order], corners[order], weights[order]
        guide = cKDTree(points[:NUM_GUIDES]).query(points)[1]
        return Roots(corners, weights, inside[order].astype(np.float32), guide, points)

    def _occlusion(self):
        """Return the share [V] of the sky that a vertex sees; of the mouth's inside, when it is open."""
        closed = self._sky_seen(self.neutral)
        opened = self._sky_seen(self.head(np.zeros(self.model.num_identity), {'jawOpen': 0.7})[0])
        inside = self.teeth | self.tongue | self.mouth_bag
        seen = np.where(inside, 0.25 * closed + 0.75 * opened, closed)
        seen = np.where(self.eyes, 0.35 + 0.65 * seen, np.where(self.teeth, 0.4 + 0.6 * seen, seen))
        least = np.where(inside, 0.10, 0.03)  # Inside, light comes through the cheeks.
        return np.clip(1.25 * (self.average @ seen.astype(np.float32)), least, 1).astype(np.float32)

    def _sky_seen(self, vertices):
        index = np.arange(NUM_AO_VIEWS) + 0.5
        height, angle = 1 - 2 * index / NUM_AO_VIEWS, np.pi * (1 + 5**0.5) * index
        ring = np.sqrt(1 - height**2)
        directions = np.stack([ring * np.cos(angle), height, ring * np.sin(angle)], axis=1)
        normals, total, seen = self.normals(vertices), 0, 0
        faces = torch.from_numpy(self.faces[:, [0, 2, 1]])
        for direction in directions.astype(np.float32):
            light = DepthMap(vertices, faces, direction, AO_SIZE)
            cosine = np.maximum(normals @ direction, 0)
            total, seen = total + cosine, seen + cosine * (light.depth_behind(light.place(vertices)) < AO_BIAS)
        return seen / np.maximum(total, 1e-6)


class DepthMap:
    """What light from a direction meets first: parallel rays, a square of 2·OCCLUSION_RADIUS about CENTRE.

    faces: [F, 3] int64, clockwise seen from outside.
    """

    def __init__(self, vertices: np.ndarray, faces: torch.Tensor, direction: np.ndarray, size: int):
        side = np.array([0, 0, 1]) if abs(direction[1]) > 0.9 else np.array([0, 1, 0])
        right = unit(np.cross(side, direction))
        up = np.cross(direction, right)
        self.axes = (np.stack([right, -up, -direction]) / OCCLUSION_RADIUS).astype(np.float32)
        self.size = size
        screen = torch.from_numpy(self._project(vertices))[None]
        result = rasterize(screen, faces, size)
        self.depth = torch.where(result.face >= 0, result.depth, 9.0)[0].numpy()

    def _project(self, points):
        return np.ascontiguousarray((points - CENTRE) @ self.axes.T, dtype=np.float32)

    def place(self, points: np.ndarray) -> np.ndarray:
        """Return points [n, 3] of the mesh as `depth_behind` takes them: columns and rows in cells, depths [3, n]."""
        x, y, z = self._project(points).T
        return np.stack([(x + 1) * np.float32(self.size / 2), (y + 1) * np.float32(self.size / 2), z])

    def depth_behind(self, placed: np.ndarray, offset=(0.0, 0.0)) -> np.ndarray:
        """Return how far [n], in metres, points lie behind what the light meets first, looked up `offset` cells off."""
        column, row = (np.clip(placed[k] + np.float32(offset[k]), 0, self.size - 1).astype(np.int32) for k in (0, 1))
        return (placed[2] - self.depth.ravel().take(row * self.size + column)) * np.float32(OCCLUSION_RADIUS)


class _Shell:
    """The skin as a distance from CENTRE over directions; found once on the template, then followed on each head."""

    def __init__(self, neutral, faces):
        elevations = np.linspace(LOWEST_ELEVATION, np.pi / 2, NUM_ELEVATIONS)
        azimuths = np.linspace(-np.pi, np.pi, NUM_AZIMUTHS, endpoint=False)
        self.elevations = elevations
        elevation, azimuth = (grid.ravel() for grid in np.meshgrid(elevations, azimuths, indexing='ij'))
        rays = np.stack([
            np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)
        ], axis=1)  # fmt: skip
        face, self.weights, self.is_hit = _last_hits(neutral - CENTRE, faces, rays)
        self.corners, self.rays = faces[face], rays.astype(np.float32)
        cylinder = NECK_RADIUS / np.maximum(np.cos(elevation), 0.25)
        # Rays that leave through ears or the neck's cut take the mean of what is around them.
        found = np.flatnonzero(self.is_hit)
        nearest = cKDTree(rays[found]).query(rays, k=3)[1]
        self.nearest = found[nearest]
        self.below = np.where(elevation < -0.75, cylinder, np.inf).astype(np.float32)

    def radius(self, vertices):
        points = (vertices[self.corners] * self.weights[..., None]).sum(axis=1) - CENTRE
        distance = np.sqrt((points * points).sum(axis=1))
        distance = np.where(self.is_hit, distance, np.minimum(distance[self.nearest].mean(axis=1), self.below))
        return distance.reshape(NUM_ELEVATIONS, NUM_AZIMUTHS).astype(np.float32)


def shell_at(shell: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the skin's distance [...] from CENTRE in the directions of offsets [..., 3] from it."""
    x, y, z = offsets[..., 0], offsets[..., 1], offsets[..., 2]
    row = np.arctan2(y, np.sqrt(x * x + z * z) + 1e-9)
    row = np.clip((row - LOWEST_ELEVATION) * ((NUM_ELEVATIONS - 1) / (np.pi / 2 - LOWEST_ELEVATION)), 0, None)
    column = (np.arctan2(x, z) + np.pi) * (NUM_AZIMUTHS / (2 * np.pi))
    top, left = np.minimum(row.astype(np.int32), NUM_ELEVATIONS - 2), column.astype(np.int32)
    down, along = row - top, column - left
    first = top * NUM_AZIMUTHS + (left & (NUM_AZIMUTHS - 1))
    second = top * NUM_AZIMUTHS + ((left + 1) & (NUM_AZIMUTHS - 1))
    flat = shell.ravel()
    upper = flat.take(first) * (1 - along) + flat.take(second) * along
    lower = flat.take(first + NUM_AZIMUTHS) * (1 - along) + flat.take(second + NUM_AZIMUTHS) * along
    return upper * (1 - down) + lower * down


@functools.cache
def load_anatomy() -> Anatomy:
    """Return the anatomy of the embedded head; the first call takes a few seconds."""
    return Anatomy(load_embedded_head())


def _cross(a, b):
    """Return cross products [N, 3]; several times faster than np.cross."""
    return np.stack([
        a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1], a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2],
        a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0],
    ], axis=1)  # fmt: skip


def _operators(faces, num_vertices):
    """Return sparse (faces to vertices [V, F], mean over neighbours and itself [V, V])."""
    count = len(faces)
    ones = np.ones(3 * count, dtype=np.float32)
    incidence = sparse.csr_matrix((ones, (faces.ravel(), np.repeat(np.arange(count), 3))), (num_vertices, count))
    start, end = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    links = sparse.csr_matrix((ones, (start, end)), (num_vertices, num_vertices))
    links = ((links + links.T) > 0).astype(np.float32) + sparse.identity(num_vertices, dtype=np.float32)
    return incidence, sparse.diags(1 / np.asarray(links.sum(axis=1)).ravel()).astype(np.float32) @ links.tocsr()


def _scalp_margin(points):
    """Return how far [N], in metres, points are above the hairline; negative on the face and the neck."""
    x, y, z = points.T
    azimuth = np.degrees(np.arctan2(abs(x), z - CENTRE[2]))
    return (y - np.interp(azimuth, HAIRLINE[:, 0], HAIRLINE[:, 1])).astype(np.float32)


def _spread_order(points, count):
    """Return an order of `count` points such that the first ones are far from one another, the rest fill gaps."""
    order, is_free = [], np.ones(len(points), dtype=bool)
    radius = 0.02
    while len(order) < count:
        tree = cKDTree(points)
        for index in np.flatnonzero(is_free):
            if is_free[index]:
                order.append(index)
                is_free[tree.query_ball_point(points[index], radius)] = False
        is_free[:] = True
        is_free[order] = False
        taken = cKDTree(points[order])
        radius *= 0.62
        is_free &= taken.query(points)[0] > radius
        if radius < 1e-4:
            break
    return np.array(order[:count])


def _neck_rings(neutral, faces):
    """Return (corners [K, NECK_STEPS, 3], weights): rings around the neck from NECK_TOP down, lower at the front."""
    angle = np.linspace(-np.pi, np.pi, NECK_STEPS, endpoint=False) + 0.01  # No ray along the seam in the middle.
    rays = np.stack([np.sin(angle), np.zeros_like(angle), np.cos(angle)], axis=1)
    corners, weights = [], []
    for level in range(NECK_LEVELS):
        ring = []
        for ray in rays:
            start = np.array([0, NECK_TOP - NECK_STEP * level - NECK_TILT * ray[2], NECK_Z])
            face, weight, _ = _last_hits(neutral - start, faces, ray[None])
            ring.append((faces[face[0]], weight[0]))
        corners.append([corner for corner, _ in ring])
        weights.append([weight for _, weight in ring])
    return np.array(corners), np.array(weights)


def _last_hits(vertices, faces, rays):
    """Return face [R], weights [R, 3] and whether [R] for where rays from the origin leave a mesh for good."""
    a, b, c = (vertices[faces[:, corner]].astype(np.float64) for corner in range(3))
    normal = np.cross(b - a, c - a)
    reach = (normal * a).sum(axis=1)
    best_face, best_weights = np.zeros(len(rays), dtype=np.int64), np.zeros((len(rays), 3), dtype=np.float32)
    is_hit = np.zeros(len(rays), dtype=bool)
    edges = [np.cross(b, c), np.cross(c, a), np.cross(a, b)]
    for index, ray in enumerate(rays):
        volumes = np.stack([edge @ ray for edge in edges])
        inside = np.flatnonzero((volumes > 0).all(axis=0))
        if len(inside):
            distance = reach[inside] / (normal[inside] @ ray)
            chosen = inside[distance.argmax()]
            best_face[index], is_hit[index] = chosen, True
            best_weights[index] = volumes[:, chosen] / volumes[:, chosen].sum()
    return best_face, best_weights, is_hit


def _brow_map(landmarks):
    """Return [2, MAP_SIZE, MAP_SIZE]: along a brow from its inner end (0) to the outer (1), and metres above its axis.

    Row 0 is the lowest; columns grow with x. Far from a brow the second is 1.
    """
    axis = (landmarks[22:27] + landmarks[17:22][::-1] * np.array([-1, 1, 1])) / 2
    axis = axis[:, :2].astype(np.float64)
    centres = ((np.arange(MAP_SIZE) + 0.5) / MAP_SIZE - 0.5) * MAP_EXTENT
    x, y = np.meshgrid(abs(centres), centres)
    along, above = np.zeros_like(x), np.full_like(x, 1.0)
    best = np.full_like(x, np.inf)
    lengths = np.linalg.norm(np.diff(axis, axis=0), axis=1)
    ends = np.concatenate([[0], lengths.cumsum()]) / lengths.sum()
    for number, (start, end) in enumerate(zip(axis[:-1], axis[1:], strict=True)):
        step = end - start
        share = ((x - start[0]) * step[0] + (y - start[1]) * step[1]) / (step @ step)
        low, high = -0.4 if number == 0 else 0, 1.4 if number == 3 else 1
        share = np.clip(share, low, high)
        dx, dy = x - start[0] - share * step[0], y - start[1] - share * step[1]
        distance = np.hypot(dx, dy)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        along = np.where(nearer, ends[number] + share * (ends[number + 1] - ends[number]), along)
        above = np.where(nearer, np.sign(dy) * distance, above)
    above = np.where(best < BROW_REACH, above, 1.0)
    return np.stack([along, above]).astype(np.float32)
