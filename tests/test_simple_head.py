# SPDX-License-Identifier: Apache-2.0
"""The generated head: closed, symmetric, cleanly unwrapped, landmarks on its surface, files equal to the kept ones."""

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

import simple_head as module
from simple_head import DEMO_HEAD, LANDMARK_MIRROR, SimpleHead, simple_head, uv_face_mask, write_demo_files

DEMO = Path(__file__).resolve().parent / 'data' / 'simple_head'
TEXT_FILES = ('demo.obj', 'head_template.obj', 'demo_kpt2d.txt')
FILES = (*TEXT_FILES, 'uv_face_mask.png')
MIRROR_X = np.array([-1, 1, 1], np.float32)
HEADS = {
    'neutral': {},
    'demo': DEMO_HEAD,
    'extreme': {'jaw_open': 1.0, 'smile': 1.0, 'width': 1.2, 'chin': 1.2, 'nose': 0.7},
}


@pytest.fixture(params=HEADS, scope='module')
def head(request) -> SimpleHead:
    return simple_head(**HEADS[request.param])


@pytest.fixture(scope='module')
def neutral() -> SimpleHead:
    return simple_head()


def signed_areas(triangles):
    """Twice the signed area of triangles [F, 3, 2]; positive where counter-clockwise with the second axis up."""
    b, c = (triangles[:, 1:].astype(np.float64) - triangles[:, :1]).transpose(1, 0, 2)
    return b[:, 0] * c[:, 1] - b[:, 1] * c[:, 0]


def read_obj(path):
    rows = [line.split() for line in path.read_text(encoding='ascii').splitlines()]
    points = {key: np.array([row[1:] for row in rows if row[0] == key], np.float32) for key in ('v', 'vt')}
    corners = np.array([[corner.split('/') for corner in row[1:]] for row in rows if row[0] == 'f'], np.int32) - 1
    assert {row[0] for row in rows} == {'v', 'vt', 'f'}
    return points['v'], points['vt'], corners[..., 0], corners[..., 1]


def pixels(points):
    """Project mesh points to a 512 image of the frontal camera: position (0, 0, 2.7), focal length 4.2647."""
    world = 2.5 * points.astype(np.float64) + [0, 0.025, 0]
    return 256 + 4.2647 * 512 * world[:, :2] * [1, -1] / (2.7 - world[:, 2:])


def test_shapes_and_types(head):
    assert head.vertices.shape[1:] == head.faces.shape[1:] == (3,) and head.uvs.shape[1:] == (2,)
    assert head.landmarks.shape == (68, 3) and head.uv_faces.shape == head.faces.shape
    assert {array.dtype for array in (head.vertices, head.uvs, head.landmarks)} == {np.dtype(np.float32)}
    assert head.faces.dtype == head.uv_faces.dtype == np.int32
    assert 4500 <= len(head.vertices) <= 6000 and len(head.uvs) > len(head.vertices)
    assert np.array_equal(np.unique(head.faces), np.arange(len(head.vertices)))
    assert np.array_equal(np.unique(head.uv_faces), np.arange(len(head.uvs)))


def test_one_closed_surface_facing_outwards(head):
    mesh = trimesh.Trimesh(head.vertices, head.faces, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.euler_number == 2 and mesh.body_count == 1
    assert mesh.volume > 0.003 and mesh.area_faces.min() > 1e-8


def test_front_faces_have_positive_area_where_the_rasteriser_keeps_them(neutral):
    """Columns grow with x and plane rows with y, as 5x and 5y + 0.05: what faces the viewer is positive there."""
    screen = neutral.vertices[:, :2] * 5 + [0, 0.05]
    area = signed_areas(screen[neutral.faces])
    tip = neutral.vertices[:, 2].argmax()
    assert (area[(neutral.faces == tip).any(1)] > 0).all()
    assert (area[(neutral.vertices[neutral.faces, 2] < -0.13).all(1)] < 0).all()


def test_vertices_and_faces_are_exactly_symmetric(head):
    index = {vertex.tobytes(): i for i, vertex in enumerate(head.vertices)}
    assert len(index) == len(head.vertices)
    permutation = np.array([index[vertex.tobytes()] for vertex in head.vertices * MIRROR_X + np.float32(0)])
    assert np.array_equal(permutation[permutation], np.arange(len(permutation)))

    def cycles(faces):
        return {tuple(np.roll(face, -face.argmin())) for face in faces}

    assert cycles(permutation[head.faces][:, ::-1]) == cycles(head.faces)


def test_uvs_are_inside_symmetric_unflipped_and_disjoint(neutral):
    uvs, triangles = neutral.uvs, neutral.uvs[neutral.uv_faces]
    assert 0 < uvs.min() and uvs.max() < 1
    micro = {tuple(uv) for uv in np.rint(1e6 * uvs.astype(np.float64)).astype(int)}
    assert {(1_000_000 - u, v) for u, v in micro} == micro
    area = signed_areas(triangles)
    assert area.min() > 1e-7

    points = np.random.default_rng(0).random((600, 2))
    start, end = triangles.astype(np.float64), np.roll(triangles, -1, 1).astype(np.float64)
    edge = end - start
    normal = np.stack([-edge[..., 1], edge[..., 0]], -1)
    side = [points @ normal[:, k].T - (normal[:, k] * start[:, k]).sum(-1) for k in range(3)]
    cover = (np.minimum.reduce(side) > 0).sum(1)
    assert cover.max() == 1
    assert abs(cover.mean() - area.sum() / 2) < 0.03


def test_seam_is_at_the_back(neutral):
    vertex_uvs = {}
    for vertices, uv_vertices in zip(neutral.faces, neutral.uv_faces, strict=True):
        for vertex, uv_vertex in zip(vertices, uv_vertices, strict=True):
            vertex_uvs.setdefault(vertex, set()).add(uv_vertex)
    poles = {neutral.vertices[:, 1].argmax(), len(neutral.vertices) - 1}
    doubled = [vertex for vertex, uvs in vertex_uvs.items() if len(uvs) > 1 and vertex not in poles]
    assert len(doubled) > 50
    assert (neutral.vertices[doubled, 0] == 0).all() and (neutral.vertices[doubled, 2] < -0.05).all()


def test_face_gets_a_large_share_of_the_uv_square(neutral):
    centre = neutral.vertices[neutral.faces].mean(1)
    is_face = (abs(centre[:, 0]) < 0.07) & (abs(centre[:, 1] + 0.02) < 0.09) & (centre[:, 2] > -0.01)
    uv = neutral.uvs[neutral.uv_faces]
    assert signed_areas(uv[is_face]).sum() / 2 > 0.25
    assert abs(uv[is_face].mean((0, 1)) - 0.5).max() < 0.1


def test_landmarks_are_symmetric(head):
    assert np.array_equal(LANDMARK_MIRROR[LANDMARK_MIRROR], np.arange(68))
    assert np.array_equal(head.landmarks[LANDMARK_MIRROR] * MIRROR_X + np.float32(0), head.landmarks)
    assert (head.landmarks[[8, 27, 28, 29, 30, 33, 51, 57, 62, 66], 0] == 0).all()
    assert (head.landmarks[[0, 17, 36, 48], 0] < 0).all()  # The person's right is the image's left.


def test_landmarks_lie_on_the_surface(head):
    triangles = head.vertices[head.faces] * np.float64(1000)  # Millimetres: trimesh has absolute tolerances.
    for landmark in head.landmarks * np.float64(1000):
        near = triangles[np.linalg.norm(triangles.mean(1) - landmark, axis=1) < 20]
        closest = trimesh.triangles.closest_point(near, np.tile(landmark, (len(near), 1)))
        assert np.linalg.norm(closest - landmark, axis=1).min() < 1e-3


def test_landmark_order(neutral):
    points = neutral.landmarks
    assert abs(points).max() < 0.3
    for run in (range(17), range(17, 27), range(31, 36), range(36, 40), range(42, 46), range(48, 55), range(60, 65)):
        assert (np.diff(points[run, 0]) > 0).all()
    assert points[:17, 1].argmin() == 8 and points[:, 2].argmax() == 30
    assert (np.diff(points[27:31, 1]) < 0).all() and (np.diff(points[27:31, 2]) > 0).all()
    parts = range(17, 27), range(36, 48), range(30, 36), range(48, 68)
    brow, eye, nose, mouth = (points[part, 1].mean() for part in parts)
    assert brow > eye > nose > mouth > points[8, 1]
    assert 0 < points[62, 1] - points[66, 1] < 0.001  # Closed lips.


def test_placement(neutral):
    low, high = (2.5 * neutral.vertices + [0, 0.025, 0]).min(0), (2.5 * neutral.vertices + [0, 0.025, 0]).max(0)
    assert np.abs(low - [-0.27, -0.45, -0.37]).max() < 0.02 and np.abs(high - [0.27, 0.35, 0.20]).max() < 0.02
    expected = [[162.5, 190], [349.5, 190], [256, 243], [201, 341], [311, 341], [256, 456]]
    assert np.abs(pixels(neutral.landmarks[[36, 45, 30, 48, 54, 8]]) - expected).max() < 1


def test_jaw_and_smile_move_the_mouth_only():
    rest, jaw, smile = (simple_head(**change).landmarks for change in ({}, {'jaw_open': 0.5}, {'smile': 1.0}))
    brow_and_eyes = [*range(17, 31), *range(36, 48)]
    for moved in (jaw, smile):
        assert np.array_equal(moved[brow_and_eyes], rest[brow_and_eyes])
    assert (rest - jaw)[[57, 65, 66, 67], 1].min() > 0.010 and (rest - jaw)[8, 1] > 0.005
    assert np.array_equal(jaw[[50, 51, 52, 61, 62, 63]], rest[[50, 51, 52, 61, 62, 63]])
    assert (smile - rest)[[48, 54], 1].min() > 0.004 and (smile - rest)[54, 0] > 0.004


@pytest.mark.parametrize('name', ['jaw_open', 'smile', 'width', 'chin', 'nose'])
@pytest.mark.parametrize('value', [-0.1, 2.1, float('nan')])
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f'^{name}: expected .* to .*, got {value}'):
        simple_head(**{name: value})


def test_mask_is_opaque_in_front_and_clear_behind(neutral):
    mask = uv_face_mask()
    assert mask.shape == (256, 256) and mask.dtype == np.uint8
    assert np.array_equal(mask, mask[:, ::-1])
    assert max(abs(np.diff(mask.astype(int), axis=axis)).max() for axis in (0, 1)) < 100

    pixel = (neutral.uvs[neutral.uv_faces].astype(np.float64).mean(1) * 256).astype(int)
    value, z = mask[255 - pixel[:, 1], pixel[:, 0]], neutral.vertices[neutral.faces, 2]
    assert (value[(z > -0.03).all(1)] == 255).all() and (value[(z < -0.12).all(1)] == 0).all()


def test_files_regenerate_byte_for_byte(tmp_path):
    write_demo_files(tmp_path / 'first' / 'demo')
    module._neutral_grid.cache_clear()
    module._topology.cache_clear()
    write_demo_files(tmp_path / 'second')
    first, second = tmp_path / 'first' / 'demo', tmp_path / 'second'
    assert sorted(path.name for path in second.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in TEXT_FILES:
        assert (second / name).read_bytes() == (DEMO / name).read_bytes(), name
    # The picture's compressed bytes follow the zlib inside Pillow; its pixels do not.
    with Image.open(second / 'uv_face_mask.png') as new, Image.open(DEMO / 'uv_face_mask.png') as kept:
        assert kept.mode == 'L' and np.array_equal(new, kept)


@pytest.mark.parametrize(('name', 'change'), [('head_template.obj', {}), ('demo.obj', DEMO_HEAD)])
def test_obj_holds_exactly_the_head(name, change):
    expected = simple_head(**change)
    vertices, uvs, faces, uv_faces = read_obj(DEMO / name)
    assert np.array_equal(vertices, expected.vertices) and np.array_equal(faces, expected.faces)
    assert np.array_equal(uvs, expected.uvs) and np.array_equal(uv_faces, expected.uv_faces)


def test_landmark_file_holds_the_demo_landmarks(neutral):
    landmarks = np.loadtxt(DEMO / 'demo_kpt2d.txt')
    assert landmarks.shape == (68, 3)
    assert abs(landmarks - simple_head(**DEMO_HEAD).landmarks).max() < 1e-8
    assert np.linalg.norm(landmarks - neutral.landmarks, axis=1).max() > 0.005  # Visibly another face.
