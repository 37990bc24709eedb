# SPDX-License-Identifier: Apache-2.0
"""How heads are turned: frames, squares and angles, the network that tells them, and what fits make of it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from test_fit_head import angles_between, fitter, people, seen_points  # noqa: F401  (fixtures)

from dataset_preprocessing.ffhq import dense_points, faces_file, fitting, head_turn, landmarker, solver
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.head_turn import Frames, Turn
from dataset_preprocessing.synthetic import bake_turn
from dataset_preprocessing.synthetic.anatomy import load_anatomy
from dataset_preprocessing.synthetic.paint import picture
from dataset_preprocessing.synthetic.people import camera_label

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def template():
    return head_turn.load_head_turn().template


def placed(template, angle, size, middle):
    """Return the template as it lies turned clockwise by an angle, enlarged and moved."""
    cosine, sine = size * np.cos(angle), size * np.sin(angle)
    return template @ np.array([[cosine, sine], [-sine, cosine]]) + middle


# --- frames, squares and angles --------------------------------------------------------------------------------------


def test_frames_are_found_again(template):
    assert np.allclose(template.mean(axis=0), 0, atol=1e-6)
    assert np.square(template).sum(axis=1).mean() == pytest.approx(1, abs=1e-5)
    points = np.stack([placed(template, 0.3, 40.0, [100, 200]), placed(template, -2.0, 3.0, [5, 7])])
    frames = head_turn.frames_of(points, template)
    assert np.allclose(frames.middle, [[100, 200], [5, 7]], atol=1e-4)
    assert np.allclose(frames.right[0], [40 * np.cos(0.3), 40 * np.sin(0.3)], atol=1e-4)
    assert np.allclose(np.arctan2(*frames.right[1, ::-1]), -2.0, atol=1e-6)
    depth = np.linspace(3, 9, 478)
    solid = np.concatenate([points[:1], depth[None, :, None]], axis=2)
    told = head_turn.relative(solid, Frames(*(x[:1] for x in frames)))
    assert np.allclose(told[0, :, :2], template, atol=1e-5)
    assert np.allclose(told[0, :, 2], (depth - depth.mean()) / 40, atol=1e-6)


@pytest.mark.parametrize('size', [30.0, 400.0])
def test_squares_hold_the_face_upright(template, size):
    """A white spot at a point of the face lies where the frame says, also in squares that are reduced."""
    points = placed(template, 0.4, size, [4.6 * size, 4 * size])
    canvas = np.zeros([round(8 * size), round(9 * size), 3], np.uint8)
    nose, radius = points[1], 0.08 * size
    rows, columns = np.mgrid[: canvas.shape[0], : canvas.shape[1]]
    canvas[np.hypot(columns - nose[0], rows - nose[1]) < radius] = 255
    square = np.asarray(head_turn.face_square(Image.fromarray(canvas), head_turn.frames_of(points[None], template)))
    assert square.shape == (128, 128, 3)
    weight = square[..., 0].astype(float)
    seen = np.array([(weight * place).sum() / weight.sum() for place in np.mgrid[:128, :128]])[::-1]
    assert np.abs(seen - (64 + template[1] * 64 / head_turn.HALF_SIDE - 0.5)).max() < 0.15
    assert weight.sum() / 255 == pytest.approx(np.pi * (0.08 * 64 / head_turn.HALF_SIDE) ** 2, rel=0.15)


def rotation_of(label):
    """Return the rotation [3, 3] from the world to a label's camera."""
    return label[:16].reshape(4, 4)[:3, :3].T.astype(float)


def test_turns_are_told_against_a_camera_that_looks_at_the_face():
    frames = Frames(np.array([[0.5, 0.5]]), np.array([[0.1, 0.0]]))
    # What the signs mean: heads up, and aside to the picture's right.
    for turned, nose in (([0, 0, 0], [0, 0, -1]), ([0.2, 0, 0], [0, 1, -5]), ([0, 0.3, 0], [-1, 0, -3])):
        rotation = head_turn.rotations_of(np.array([turned]), frames)[0]
        seen = rotation @ [0, 0, 1]  # Where the nose points, in the camera's axes right, down, ahead.
        assert (np.sign(seen.round(6)) == np.sign(nose)).all() and seen[2] < -0.9, (turned, seen)
    for label in (camera_label(0.3, 0.0, 0.0), camera_label(0.0, 0.2, 0.0)):
        turn = head_turn.turns_of(rotation_of(label)[None], frames)
        assert np.allclose(head_turn.rotations_of(turn, frames)[0], rotation_of(label), atol=1e-6)
        assert np.abs(turn).max() > 0.19
    rng = np.random.default_rng(0)
    rotation = Rotation.from_rotvec(rng.uniform(-0.5, 0.5, [20, 3])).as_matrix() @ head_turn.UPRIGHT
    frames = Frames(rng.uniform(0.2, 0.8, [20, 2]), rng.normal(size=[20, 2]))
    turns = head_turn.turns_of(rotation, frames)
    assert np.allclose(head_turn.rotations_of(turns, frames), rotation)
    # A picture that is turned about its middle has heads, cameras and frames turned with it: the same turns.
    about = Rotation.from_rotvec([0, 0, 0.7]).as_matrix()
    turned = Frames((frames.middle - 0.5) @ about[:2, :2].T + 0.5, frames.right @ about[:2, :2].T)
    assert np.allclose(head_turn.turns_of(about @ rotation, turned), turns)


def test_a_head_aside_that_looks_into_the_camera_is_not_turned():
    middle = np.array([[0.8, 0.3]])
    ray = np.array([*(middle[0] - 0.5) / 4.2647, 1.0])
    rotation = head_turn.UPRIGHT.copy()
    rotation = Rotation.from_rotvec(head_turn.rotation_to(ray)).as_matrix() @ rotation
    frames = Frames(middle, np.array([[0.1, 0.0]]))
    assert np.allclose(head_turn.turns_of(rotation[None], frames), 0, atol=1e-12)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def drawn():
    pytest.importorskip('mediapipe', reason='mediapipe is not installed (requirements-preprocess.txt)')
    return bake_turn.draw(range(900000, 900016))


def test_mirrored_faces_are_turned_the_other_way(drawn):
    network, names = head_turn.load_head_turn(), head_turn.load_head_turn().names
    mirror, other = network.mirror, network.other
    for square, points, scores in zip(drawn.images[:4, 16:-16, 16:-16], drawn.points, drawn.scores):
        turn = network.of_square(square, points, dict(zip(names, scores)))
        swapped = points[mirror] * [-1, 1, 1] + [1, 0, 0]
        back = network.of_square(square[:, ::-1].copy(), swapped, dict(zip(names, scores[other])))
        assert np.allclose(back.mean, turn.mean * [1, -1, -1], atol=1e-4)
        assert np.allclose(back.deviation, turn.deviation, atol=1e-4)


def test_turns_of_people_are_found(drawn):
    """Of people that were not learned from; docs/preprocessing.md has the numbers of many."""
    network, frames = head_turn.load_head_turn(), head_turn.frames_of(drawn.points[..., :2], bake_turn.mean_face())
    assert np.allclose(network.template, bake_turn.mean_face(), atol=1e-6)
    turns = bake_turn.truth(drawn, frames)
    squares = drawn.images[:, 16:-16, 16:-16]
    found = np.stack([network.of_square(*x[:2], dict(zip(network.names, x[2]))).mean
                      for x in zip(squares, drawn.points, drawn.scores)])  # fmt: skip
    away = np.degrees(np.linalg.norm(found - turns, axis=1))
    assert np.median(away) < 2 and away.max() < 8 and np.degrees(np.linalg.norm(turns, axis=1)).max() > 30


def test_what_is_learned_from_a_mirror_image_is_true(drawn):
    """The turns of mirrored faces are those of mirrored cameras."""
    frames = head_turn.frames_of(drawn.points[..., :2], bake_turn.mean_face())
    told, turns = head_turn.relative(drawn.points, frames), bake_turn.truth(drawn, frames)
    arrays = {'mean': told.mean(axis=0), 'spread': told.std()}
    names = head_turn.load_head_turn().names
    points = torch.from_numpy((told - arrays['mean']) / arrays['spread']).float()
    images = torch.from_numpy(drawn.images).permute(0, 3, 1, 2)
    faces = bake_turn.Faces(images, points, torch.from_numpy(drawn.scores), torch.from_numpy(turns).float())
    mirror = bake_turn.Mirror(arrays, names)
    once, partner = mirror(faces), dense_points.load_dense_points().mirror.numpy()
    flip = np.diag([-1.0, 1, 1])
    rotation = drawn.label[:, :16].reshape(-1, 4, 4)[:, :3, :3].transpose(0, 2, 1).astype(float)
    places = drawn.points[:, partner] * [-1, 1, 1] + [1, 0, 0]
    mirrored_frames = head_turn.frames_of(places[..., :2], bake_turn.mean_face())
    assert np.allclose(once.turns, head_turn.turns_of(flip @ rotation @ flip, mirrored_frames), atol=2e-3)
    expected = (head_turn.relative(places, mirrored_frames) - arrays['mean']) / arrays['spread']
    assert np.allclose(once.points, expected, atol=2e-3)
    for x, y in zip(mirror(once), faces):
        assert torch.allclose(x.float(), y.float(), atol=1e-5)


def test_a_network_is_learned_and_kept(drawn, tmp_path, monkeypatch, capsys):
    """The whole script on few people and steps: going on with what is drawn, a file that reads, errors told."""
    monkeypatch.setattr(bake_turn, 'PIECE', 8)
    words = [f'--found={tmp_path}/found', f'--out={tmp_path}/turn.npz', '--people=16', '--steps=40', '--held-out=4']
    monkeypatch.setattr(sys, 'argv', ['bake_turn', *words, '--workers=1'])
    bake_turn.main()
    assert '4 held out: median' in capsys.readouterr().out
    network = head_turn.HeadTurn(tmp_path / 'turn.npz')
    assert not network.net.training and len(list((tmp_path / 'found').glob('*.npz'))) == 2
    before = (tmp_path / 'found' / '000008-000016.npz').stat().st_mtime_ns
    bake_turn.main()
    assert (tmp_path / 'found' / '000008-000016.npz').stat().st_mtime_ns == before


def test_files_that_hold_no_network_are_told(tmp_path):
    with pytest.raises(PreprocessError, match='a.npz: expected the network of head turns, found none'):
        head_turn.HeadTurn(tmp_path / 'a.npz')
    with np.load(head_turn.TURN_FILE) as content:
        arrays = {name: content[name] for name in content.files}
    about = json.loads(str(arrays['about']))
    about['expression_names'][0] = 'noSuchLeft'
    changes = ({'about': np.array('{"format": "other"}')}, {'about': np.array(json.dumps(about))},
               {'stem.0.weight': np.zeros([2, 2])}, {'head.2.bias': None}, {'template': np.zeros([3, 2])})  # fmt: skip
    for change in changes:
        kept = {name: array for name, array in (arrays | change).items() if array is not None}
        np.savez(tmp_path / 'a.npz', **kept)
        with pytest.raises(PreprocessError, match='expected the network of head turns'):
            head_turn.HeadTurn(tmp_path / 'a.npz')


# --- what fits make of it --------------------------------------------------------------------------------------------


def turns_of_people(points, labels, deviation):
    """Return the true turns of people whose points [N, 478, 2] pictures of 512 pixels show."""
    frames = head_turn.frames_of((points + 0.5) / 512, head_turn.load_head_turn().template)
    rotation = np.stack([rotation_of(label) for label in labels])
    return [Turn(mean, np.full(3, deviation)) for mean in head_turn.turns_of(rotation, frames)]


def nodded(label, angle):
    """Return the label [25] of a camera that goes about the world's origin, as if the head nodded."""
    label = label.copy()
    pose = label[:16].reshape(4, 4)
    pose[:3] = Rotation.from_rotvec(angle * pose[:3, 0]).as_matrix() @ pose[:3]
    return label


def test_turns_lead_the_fit_unless_they_are_far_off(fitter, people):  # noqa: F811
    """Points that are found as if the head nodded, as the detector's are, do not move a camera that is known."""
    identity, expression, labels = people
    points = seen_points(fitter, identity, expression, labels)
    nods = np.stack([nodded(label, 0.04) for label in labels])
    bent = seen_points(fitter, identity, expression, nods)
    alone = angles_between(np.stack([fit.label for fit in fitter.batch(bent, expression)]), labels)
    turns = turns_of_people(points, labels, 0.01)
    led = fitter.batch(bent, expression, turns=turns)
    away = angles_between(np.stack([fit.label for fit in led]), labels)
    assert np.median(alone) > 2 and np.median(away) < 0.5 * np.median(alone)
    assert max(fit.error for fit in led) < 0.04
    # One that is wrong by much is not believed; one that is not known leaves the others as they are.
    wrong = [Turn(turns[0].mean + [0.6, 0.3, 0.0], turns[0].deviation), None, *turns[2:]]
    found = np.stack([fit.label for fit in fitter.batch(points, expression, turns=wrong)])
    plain = np.stack([fit.label for fit in fitter.batch(points, expression)])
    assert angles_between(found, labels)[0] < 3
    assert angles_between(found, plain)[1] < 1e-3


def test_slopes_of_turns_are_those_of_differences():
    turns = np.array([[0.1, 0.9, 0.05], [1e-6, 0, 2e-6], [-0.5, 0.2, 0.3]])
    found, step = head_turn.slopes_of(turns), 1e-6
    for axis in range(3):
        moved = Rotation.from_rotvec(step * np.eye(3)[axis]) * Rotation.from_rotvec(turns)
        assert np.allclose((moved.as_rotvec() - turns) / step, found[:, :, axis], atol=1e-5)


def test_precision_is_of_small_turns_about_the_axes_of_the_picture(fitter, people):  # noqa: F811
    """The squared distance of a slightly turned camera from what was told, in deviations of that."""
    points = seen_points(fitter, *people)[:3]
    means = [0.1, 0.9, 0.05], [0, 0, 0], [0.3, -0.5, 0.2]
    turns = [Turn(np.array(mean), np.array([0.05, 0.02, 0.01])) for mean in means]
    rotation, precision = fitting.cameras_of_turns(turns, points)
    frames = head_turn.frames_of((points + 0.5) / 512, head_turn.load_head_turn().template)
    step = 1e-4 * np.array([0.3, -0.7, 0.5])
    moved = Rotation.from_rotvec(step).as_matrix() @ rotation
    away = (head_turn.turns_of(moved, frames) - [turn.mean for turn in turns]) / turns[0].deviation
    expected = fitting.TURN_SHARE * (away**2).sum(axis=1)
    assert np.allclose(np.einsum('i,nij,j->n', step, precision, step), expected, rtol=1e-3)
    nobody = fitting.cameras_of_turns([None, *turns[1:]], points)[1]
    assert np.abs(nobody[0]).max() == 0 and np.allclose(nobody[1:], precision[1:])


def test_the_pull_of_turns_is_a_gradient(fitter, people):  # noqa: F811
    """Of half the squared distance, for turns about each axis of the camera."""
    rng = np.random.default_rng(3)
    rotation = torch.from_numpy(Rotation.from_rotvec(rng.normal(size=[4, 3])).as_matrix())
    other = torch.from_numpy(Rotation.from_rotvec(rng.normal(size=[4, 3]) * 1e-4).as_matrix()) @ rotation
    factor = torch.from_numpy(rng.normal(size=[4, 3, 3])) * 100
    known = solver.Turned(rotation, factor @ factor.mT)
    matrix, vector = torch.zeros(4, 8, 8, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)
    solver._add_turned(matrix, vector, known, other)
    step = torch.linalg.solve(matrix[:, 2:5, 2:5], vector[:, 2:5])
    moved = torch.from_numpy(Rotation.from_rotvec(step.numpy()).as_matrix()) @ other
    assert torch.allclose(moved, rotation, atol=1e-7)
    assert matrix[:, :2].abs().max() == 0 and matrix[:, 5:].abs().max() == 0


def test_turns_are_kept_in_faces_files(tmp_path):
    points, path = np.random.default_rng(0).uniform(0, 99, [478, 3]), tmp_path / 'a.json'
    turn = Turn(np.array([0.1, -0.2, 0.3]), np.array([0.01, 0.02, 0.03]))
    face = landmarker.Face(points, {'jawOpen': 0.5}, np.eye(4), turn)
    path.write_text(faces_file.faces_text([face, face._replace(turn=None)], (99, 99)))
    read = faces_file.read_faces(path).faces
    assert np.array_equal(read[0].turn.mean, turn.mean) and np.array_equal(read[0].turn.deviation, turn.deviation)
    assert read[1].turn is None
    for bad in ('"deviation": [0.01, 0.02, 0.0]', '"deviation": [0.01]', '"deviation": [0.01, 0.02, NaN]'):
        path.write_text(faces_file.faces_text([face], (99, 99)).replace('"deviation": [0.01, 0.02, 0.03]', bad))
        with pytest.raises(PreprocessError, match='expected faces of detect.py'):
            faces_file.read_faces(path)
    path.write_text(faces_file.faces_text([face], (99, 99)).replace('"turn"', '"earlier"'))
    assert faces_file.read_faces(path).faces[0].turn is None


def test_the_detector_tells_turns_where_asked(tmp_path):
    pytest.importorskip('mediapipe', reason='mediapipe is not installed (requirements-preprocess.txt)')
    anatomy = load_anatomy()
    image = Image.fromarray(picture(anatomy, bake_turn.person(anatomy, 900001), 256).image)
    plain, told = landmarker.Landmarker()(image), landmarker.Landmarker(with_turns=True)(image)
    assert plain[0].turn is None and told[0].turn.mean.shape == (3,)
