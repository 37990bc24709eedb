# SPDX-License-Identifier: Apache-2.0
"""Perspective renderings of meshes against hand computations, and the toy data set that is drawn with them."""

import functools
import math

import numpy as np
import pytest
import torch
import toy_data
from simple_head import simple_head

from geometry import cameras
from geometry.head_model import load_embedded_head
from geometry.mirror import mirror_label
from training.dataset import FolderSource, HeadDataset
from training.mesh_render import RENDER_COLOURS, MeshRenderer

SIZE = 64
WORLD = dict(scale=1.0, shift=(0.0, 0.0, 0.0))  # For meshes that are given in world units.


pytestmark = pytest.mark.usefixtures('one_thread')


@functools.cache
def head():
    """faces, face_uvcoords and vertices with landmarks [1, V + 68, 3] of the neutral head."""
    mesh = simple_head()
    uvs = torch.tensor(mesh.uvs[mesh.uv_faces]) * torch.tensor([2.0, -2.0]) + torch.tensor([-1.0, 1.0])
    face_uvcoords = torch.cat([uvs, torch.ones_like(uvs[..., :1])], dim=-1)
    v = torch.cat([torch.tensor(mesh.vertices), torch.tensor(mesh.landmarks)])[None]
    return torch.tensor(mesh.faces).long(), face_uvcoords, v


def head_renderer(colour='normal', resolution=SIZE):
    return MeshRenderer(*head()[:2], colour=colour, resolution=resolution)


def label(yaw=0.0, pitch=0.0, radius=2.7, focal=cameras.FOCAL):
    pose = cameras.look_at_pose(cameras.FRONTAL + yaw, torch.tensor(cameras.FRONTAL + pitch), (0, 0, 0), radius)
    return cameras.make_label(pose, cameras.intrinsics(focal))


def triangles(*corners, colours=None, resolution=SIZE):
    """A renderer of separate triangles in world units, and their corners [1, 3F, 3]."""
    v = torch.tensor(corners, dtype=torch.float32).reshape(1, -1, 3)
    faces = torch.arange(v.shape[1]).reshape(-1, 3)
    colours = torch.zeros(len(faces), 3, 3) if colours is None else torch.tensor(colours).reshape(-1, 3, 3)
    return MeshRenderer(faces, colours, 'uv', resolution, **WORLD), v


def around(x, y, z, radius=0.05):
    """Corners of a small triangle that faces +z, counter-clockwise."""
    angles = np.deg2rad([90, 210, 330])
    return [[x + radius * math.cos(a), y + radius * math.sin(a), z] for a in angles]


# ---- Where things are drawn


@pytest.mark.parametrize('intrinsics, column, row', [
    ((4.2647, 0.0, 0.5, 4.2647, 0.5), 0.5 + 4.2647 * 0.1 / 2.5, 0.5 - 4.2647 * 0.15 / 2.5),
    ((3.0, 0.0, 0.4, 2.0, 0.6), 0.4 + 3.0 * 0.1 / 2.5, 0.6 - 2.0 * 0.15 / 2.5),
    ((3.0, 1.5, 0.5, 3.0, 0.5), 0.5 + 3.0 * 0.1 / 2.5 - 1.5 * 0.15 / 2.5, 0.5 - 3.0 * 0.15 / 2.5),
])
def test_a_marked_triangle_lands_where_computed(intrinsics, column, row):
    renderer, v = triangles(around(0.1, 0.15, 0.2), resolution=256)
    fx, skew, cx, fy, cy = intrinsics
    c = label()
    c[:, 16:] = torch.tensor([fx, skew, cx, 0, fy, cy, 0, 0, 1])
    view = renderer.look(v, c)
    rows, columns = (view.face[0] == 0).nonzero().float().T
    assert len(rows) > 30
    assert abs((columns.mean() + 0.5) / 256 - column) < 0.5 / 256 and abs((rows.mean() + 0.5) / 256 - row) < 0.5 / 256
    torch.testing.assert_close(view.depth[view.face >= 0], torch.full([len(rows)], 2.5))


def test_mesh_units_and_oblique_cameras():
    renderer, c = head_renderer(resolution=256), label(0.4, -0.3)
    index = int(head()[2][0, :, 2].argmax())  # The tip of the nose.
    world = 2.5 * head()[2][0, index].double().numpy() + (0, 0.025, 0)
    pose, k = (x[0].double().numpy() for x in cameras.split_label(c))
    x, y, z = k @ np.linalg.solve(pose, [*world, 1])[:3]
    view = renderer.look(head()[2], c)
    depth = view.depth[0, int(y / z * 256), int(x / z * 256)]
    assert abs(depth - z) < 0.02
    corners = renderer.faces[view.face[0, int(y / z * 256), int(x / z * 256)]]
    assert (head()[2][0, corners] - head()[2][0, index]).norm(dim=-1).max() < 0.01


def test_the_outside_is_drawn():
    renderer, v = triangles(around(0, 0, 0), [x for x in reversed(around(0.2, 0, 0))])
    assert set(renderer.look(v, label()).face.unique().tolist()) == {-1, 0}
    assert set(renderer.look(v, label(math.pi)).face.unique().tolist()) == {-1, 1}


def test_nearest_by_true_depth():
    # Half-way down the screen the slanted face is 20/11 away, though the mean of its corners' depths is 5.5.
    slanted = [[-0.9, 1.0, -1.0], [0.9, 1.0, -1.0], [0.0, -10.0, -10.0]]
    renderer, v = triangles(slanted[::-1], around(0, 0, -3.0, 0.3))
    c = torch.cat([torch.eye(4).flatten(), torch.tensor([0.5, 0, 0.5, 0, 0.5, 0.5, 0, 0, 1])])[None]
    c[:, [5, 10]] = -1  # At the origin, looking along -z.
    view = renderer.look(v, c)
    assert renderer.look(v[:, [0, 2, 1, 3, 4, 5]], c).face[0, SIZE // 2, SIZE // 2] == 1  # The first one turned round.
    assert view.face[0, SIZE // 2, SIZE // 2] == 0
    torch.testing.assert_close(view.depth[0, SIZE // 2, SIZE // 2], torch.tensor(20 / 11), rtol=0.05, atol=0)


# ---- Colours


def test_normals_of_the_head():
    picture = head_renderer(resolution=128)(head()[2], label())[0]
    is_seen = picture[2] != -1
    torch.testing.assert_close(picture[:, is_seen].norm(dim=0), torch.ones(int(is_seen.sum())))
    forehead = picture[:, 40:45, 60:68]
    assert (forehead[2] > 0.9).all()
    assert picture[0, 64, is_seen[64].nonzero()[0]] < -0.6 and picture[0, 64, is_seen[64].nonzero()[-1]] > 0.6
    assert picture[1, is_seen[:, 64].nonzero()[0], 64] > 0.6


def test_waves_show_eyes_that_turn():
    model = load_embedded_head()
    uv = torch.cat([model.uvs * 2 - 1, torch.ones(len(model.uvs), 1)], dim=1) * torch.tensor([1, -1, 1])
    gaze = model.expression(eyeLookOutLeft=0.6, eyeLookInRight=0.6)
    meshes = [model(torch.zeros(1, model.num_identity), e).vertices for e in (model.expression(), gaze)]
    difference = {}
    for colour in RENDER_COLOURS:
        renderer = MeshRenderer(model.faces, uv[model.uv_faces], colour)
        view = renderer.look(meshes[0], label())
        is_eye = model.regions['eyes'][renderer.faces[view.face.clamp(min=0)]].all(dim=-1) & (view.face >= 0)
        straight, aside = (renderer(v, label()) for v in meshes)
        difference[colour] = float((straight - aside).abs().amax(dim=1)[is_eye].mean())
        assert straight.abs().max() < 1 + 1e-6
    assert difference['waves'] > 0.5 and max(difference['uv'], difference['normal']) < 0.15, difference


def test_normals_are_means_weighted_by_area():
    faces, _, v = head()
    vertices = v[0].double().numpy()
    expected = np.zeros_like(vertices)
    for corners in faces.numpy():
        a, b, c = vertices[corners]
        expected[corners] += np.cross(b - a, c - a)
    used = np.unique(faces)
    expected = expected[used] / np.linalg.norm(expected[used], axis=1, keepdims=True)
    actual = head_renderer().normals(v)[0]
    torch.testing.assert_close(actual[used], torch.from_numpy(expected).float(), rtol=0, atol=1e-4)
    assert not actual[len(used) :].any()  # Landmarks.


def test_perspective_correct_colours():
    corners = [[-0.2, -0.1, 1.0], [0.4, -0.2, -6.0], [-0.1, 0.3, 1.2]]
    colours = [[-1.0, -1.0, 1.0], [1.0, 0.0, 1.0], [0.5, 1.0, 1.0]]
    renderer, v = triangles(corners, colours=colours, resolution=512)
    picture = renderer(v, label())[0]
    centre = np.mean(corners, axis=0)
    x, y = centre[:2] / (2.7 - centre[2])
    actual = picture[:, int((0.5 - cameras.FOCAL * y) * 512), int((0.5 + cameras.FOCAL * x) * 512)]
    torch.testing.assert_close(actual, torch.tensor(colours).mean(dim=0), rtol=0, atol=0.03)
    # Weights that are linear on the screen would be far off.
    screen = np.array([[a / (2.7 - c), b / (2.7 - c), 1] for a, b, c in corners])
    linear = np.linalg.solve(screen.T, [x, y, 1]) @ colours
    assert np.abs(linear - np.mean(colours, axis=0)).max() > 0.2


def test_uv_colours_are_those_of_the_faces():
    renderer = head_renderer('uv', 128)
    c = label(0.3)
    picture, view = renderer(head()[2], c), renderer.look(head()[2], c)
    is_seen = view.face >= 0
    corners = renderer.face_uvcoords[view.face[is_seen]]
    seen = picture.permute(0, 2, 3, 1)[is_seen]
    assert (seen >= corners.amin(dim=1) - 1e-5).all() and (seen <= corners.amax(dim=1) + 1e-5).all()
    assert torch.equal(seen[:, 2].round(decimals=5), torch.ones(len(seen)))


def test_background():
    for colour in ('normal', 'uv'):
        renderer = head_renderer(colour)
        view, picture = renderer.look(head()[2], label()), renderer(head()[2], label())
        is_empty = (view.face < 0)[:, None].expand_as(picture)
        assert is_empty[0, 0, 0, 0] and (picture[is_empty] == -1).all() and picture.abs().max() <= 1 + 1e-6
        assert not view.weights[view.face < 0].any() and not view.depth[view.face < 0].any()
        torch.testing.assert_close(view.weights[view.face >= 0].sum(dim=-1), torch.ones(int((view.face >= 0).sum())))


# ---- Symmetry, batches, limits


def test_a_mirrored_camera_gives_the_mirrored_picture():
    renderer, c = head_renderer(), label(0.4, 0.2)
    mirrored = torch.from_numpy(mirror_label(c[0].numpy()))[None]
    picture = renderer(head()[2], c)
    expected = picture.flip(-1) * torch.where(picture.flip(-1) == -1, 1, torch.tensor([-1.0, 1, 1])[:, None, None])
    is_same = (renderer(head()[2], mirrored) - expected).abs().amax(dim=1) < 1e-3
    assert is_same.float().mean() > 0.998  # Pixels on the outline may fall to either side.


def test_a_batch_is_a_loop():
    v = torch.cat([head()[2], head()[2] * 1.1, head()[2] * 0.9])
    c = torch.cat([label(), label(0.5), label(-0.3, 0.2)])
    for colour in ('normal', 'uv'):
        renderer = head_renderer(colour)
        loop = torch.cat([renderer(v[i : i + 1], c[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(renderer(v, c), loop, rtol=0, atol=1e-6)


def test_landmarks_expressions_and_gradients_play_no_part():
    renderer, v = head_renderer(), head()[2].clone().requires_grad_(True)
    c = torch.cat([label(), torch.randn(1, 50)], dim=1)
    picture = renderer(v, c)
    assert torch.equal(picture, renderer(v[:, :-68], c[:, :25])) and not picture.requires_grad


def test_faces_behind_the_camera():
    renderer, v = head_renderer(), head()[2]
    # Beside the right ear, looking backwards: the face lies behind the camera.
    pose = cameras.cam2world_from_forward(torch.tensor([[-0.5, 0.0, -0.85]]), torch.tensor([[0.3, 0.0, 0.0]]))
    beside = cameras.make_label(pose, cameras.intrinsics(0.5))
    view = renderer.look(v, beside)
    assert (view.depth[view.face >= 0] > 0.01).all() and 0.1 < (view.face >= 0).float().mean() < 0.9
    assert renderer(v, beside).isfinite().all()
    away = label()
    away[:, [0, 2, 8, 10]] *= -1  # Turned by half a turn, the whole head behind it.
    assert (renderer(v, away) == -1).all()
    assert renderer(v[:0], away[:0]).shape == (0, 3, SIZE, SIZE)


def test_messages_of_bad_calls():
    faces, face_uvcoords, v = head()
    with pytest.raises(ValueError, match=r"colour: expected one of \('normal', 'uv', 'waves'\), got 'red'"):
        MeshRenderer(faces, face_uvcoords, 'red')
    with pytest.raises(ValueError, match='face_uvcoords: '):
        MeshRenderer(faces, face_uvcoords[1:])
    with pytest.raises(ValueError, match=r'v: expected \[\*, \*, 3\]'):
        head_renderer()(v[0], label())
    for c in (label()[:, :24], label().repeat(2, 1)):
        with pytest.raises(ValueError, match=r'c: expected \[1, 25 or more\]'):
            head_renderer()(v, c)


# ---- The toy data set


def test_toy_data(tmp_path):
    toy_data.make_toy_data(tmp_path / 'a', 3, resolution=32)
    toy_data.make_toy_data(tmp_path / 'b', 2, resolution=32)
    long, short = (
        HeadDataset(FolderSource(tmp_path / name / 'images32x32', tmp_path / name / 'meshes32x32')) for name in 'ab'
    )
    assert len(long) == 3 and long.resolution == 32 and long.num_vertices == len(simple_head().vertices)
    for i in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(long[i], short[i], strict=True))
    image, c, mesh = long[0]
    is_seen = head_renderer(resolution=32).look(torch.tensor(mesh)[None], torch.tensor(c)[None]).face[0].numpy() >= 0
    background = image[:, 0, 0][:, None, None]
    has_ink = np.abs(image.astype(int) - background).max(axis=0) > 8
    assert 0.2 < is_seen.mean() < 0.9 and (has_ink == is_seen).mean() > 0.93
