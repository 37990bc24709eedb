# SPDX-License-Identifier: Apache-2.0
"""Heads fitted to points whose truth is known, and photographs turned into data; MediaPipe only where it is said."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dataset_preprocessing import check_data, report_page
from dataset_preprocessing.ffhq import (
    alignment, dense_points, faces_file, files, fit_head, fitting, landmarker, preprocess_in_the_wild, solver,
)  # fmt: skip
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.points import IBUG_OF_MESH
from dataset_preprocessing.overlay import draw_overlay
from dataset_preprocessing.synthetic import bake_errors
from dataset_preprocessing.synthetic.expressions import random_expression
from dataset_preprocessing.synthetic.people import camera_label, random_label
from geometry.cameras import project_mesh
from geometry.mirror import LANDMARK_MIRROR
from training.dataset import FolderSource
from training.driving import open_clip
from training.video import video_file

pytestmark = pytest.mark.usefixtures('one_thread')
COUNT = 24
TOLD = ('jawOpen', 'mouthSmileLeft', 'mouthSmileRight', 'eyeBlinkLeft', 'eyeBlinkRight')


@pytest.fixture(scope='module')
def fitter():
    return fitting.HeadFitter()


def seen_points(fitter, identity, expression, labels):
    """Return where the detector's points [N, 478, 2] lie in pictures of 512 pixels, without error."""
    labels, identity, expression = (torch.as_tensor(array).double() for array in (labels, identity, expression))
    pose = labels[:, :16].reshape(-1, 4, 4)
    rotation = pose[:, :3, :3].mT
    points = fitter.model.points(identity, expression)
    place = -(rotation @ pose[:, :3, 3:])[..., 0]
    return (solver.project(solver.see(points, rotation, place)) * 512 - 0.5).numpy()


def angles_between(labels, others):
    """Return the angles [N] in degrees between the cameras' directions."""
    a, b = (x[:, :16].reshape(-1, 4, 4)[:, :3, :3].astype(float) for x in (labels, others))
    turn = np.einsum('nji,njk->nik', a, b)
    return np.degrees(np.arccos(np.clip((np.trace(turn, axis1=1, axis2=2) - 1) / 2, -1, 1)))


@pytest.fixture(scope='module')
def people(fitter):
    """Return identities, expressions and labels of random people."""
    rng, names = np.random.default_rng(4), list(fitter.head.expression_names)
    identity = rng.normal(0, 0.8, [COUNT, 100]).astype(np.float32)
    expression = np.zeros([COUNT, 52], np.float32)
    for row in expression:
        for name, weight in random_expression(rng, names).items():
            row[names.index(name)] = weight
    expression[:, names.index('mouthClose')] = 0
    for side in ('Left', 'Right'):
        expression[::2, names.index(f'eyeBlink{side}')] = rng.uniform(0, 1, COUNT // 2)
    return identity, expression, np.stack([random_label(rng) for _ in range(COUNT)])


def test_truth_is_found_from_exact_points(fitter, people):
    identity, expression, labels = people
    points = seen_points(fitter, identity, expression, labels)
    noise = np.random.default_rng(5)
    scores = np.clip(expression + noise.normal(0, 0.15, expression.shape), 0, 1)  # A detector's are no better.
    fits = fitter.batch(points + noise.normal(0, 0.5, points.shape), scores)
    assert np.median(angles_between(np.stack([f.label for f in fits]), labels)) < 1.5
    assert max(f.error for f in fits) < 0.02
    found = np.stack([f.expression for f in fits])
    for name in TOLD:
        column = fitter.head.expression_names.index(name)
        assert np.corrcoef(found[:, column], expression[:, column])[0, 1] > 0.9, name
    assert found.min() >= 0 and found.max() <= 1
    for fit in fits:
        assert np.linalg.norm(fit.label[[3, 7, 11]]) == pytest.approx(2.7, abs=1e-4)
    turned = np.degrees([f.gaze for f in fits])
    assert np.abs(turned).max() < 26 and turned.std() > 1


def test_one_identity_and_smooth_motion(fitter, people):
    identity, expression, _ = people
    time = np.linspace(0, 1, COUNT)
    weights = expression[:1] * np.sin(np.pi * time)[:, None].astype(np.float32)
    labels = np.stack([camera_label(0.5 * np.sin(3 * t), 0.1 * t, 0.0) for t in time])
    points = seen_points(fitter, identity[:1].repeat(COUNT, 0), weights, labels)
    points += np.random.default_rng(6).normal(0, 1.0, points.shape)
    shared = fitter.shared_identity(points, weights)
    smooth = fitter.batch(points, weights, shared, is_sequence=True)
    alone = fitter.batch(points, weights, shared)
    assert all(np.array_equal(f.identity, shared) for f in smooth)

    def jerk(fits):
        return np.abs(np.diff([f.expression for f in fits], 2, axis=0)).mean()
    assert jerk(smooth) < jerk(alone)
    # What identity leaves in doubt of the pose is the same in all frames: motion is told better than the pose.
    found = np.stack([f.label for f in smooth])
    assert np.median(angles_between(found, labels)) < 2.5
    turned, truly = (angles_between(x, x[:1].repeat(COUNT, 0)) for x in (found, labels))
    assert np.abs(turned - truly).max() < 1
    assert max(f.error for f in smooth) < 0.03


def test_heads_of_any_size_are_found(fitter, people):
    points = seen_points(fitter, *people)[:8]
    scores = people[1][:8]
    plain, small = fitter.batch(points, scores), fitter.batch((points - 255.5) * 0.9 + 255.5, scores)
    table = dense_points.load_dense_points()
    for one, other in zip(plain, small, strict=True):
        assert one.size == pytest.approx(1, abs=0.02) and other.size / one.size == pytest.approx(0.9, abs=0.01)
        assert np.abs(one.expression - other.expression).max() < 0.1
        # What is written lies where the fit says: the surface, but for the detector's mean error.
        surface = table.on(torch.from_numpy(fitter.mesh(other)[0])[None])[0].numpy()
        places = project_mesh(surface + other.size * fitter.model.errors.offset.numpy(), other.label)[0]
        assert np.abs(512 * places - 0.5 - other.reprojected).max() < 0.05
    labels = (np.stack([fit.label for fit in fits]) for fits in (plain, small))
    assert np.median(angles_between(*labels)) < 0.4


def test_pictures_cut_aside_are_seen_by_a_turned_camera(fitter, people):
    points, labels = seen_points(fitter, *people), people[2]
    crop = alignment.Crop(700, 700, -162 - 130, -162 + 100, 1024)  # As large; the middle 2.5° and 1.9° aside.
    turned = np.stack([alignment.label_in_training_picture(label, (512, 512), crop) for label in labels])
    points = np.stack([alignment.points_in_training_picture(each, (512, 512), crop) for each in points])
    found = np.stack([fit.label for fit in fitter.batch(points, people[1])])
    expected, before = (np.median(angles_between(found, truth)) for truth in (turned, labels))
    assert expected < 1 < 0.5 * before


def test_usual_errors_tell_nothing():
    """Products with the inverse of the points' covariance, diag(1/weight) + modes."""
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 5, 2), (2, 10, 4)
    modes, columns = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in sizes)
    weight = 1 + torch.rand(2, 5, generator=generator, dtype=torch.float64)
    root = weight.repeat_interleave(2, dim=1).sqrt()
    inverse = torch.linalg.inv(torch.diag_embed(root**-2) + (solver.FOCAL / solver.RADIUS) ** 2 * (
        modes.flatten(1).mT @ modes.flatten(1)))
    expected = columns.mT @ inverse @ columns
    assert torch.allclose(solver._products(columns * root[..., None], modes, weight), expected)


def test_tables_of_the_detectors_errors(fitter, tmp_path):
    table, errors = dense_points.load_dense_points(), dense_points.load_detector_errors()
    assert (errors.offset[table.mirror] - errors.offset * torch.tensor([-1, 1, 1])).abs().max() < 2e-5
    assert (errors.deviation[table.mirror] / errors.deviation - 1).abs().median() < 0.01
    names = fitter.head.expression_names
    scores = np.zeros(52)
    scores[[names.index(name) for name in ('mouthSmileLeft', 'mouthSmileRight')]] = 0.9
    told = dict(zip(names, errors.expected(scores), strict=True))
    assert min(told.values()) >= 0 and max(told.values()) <= 1
    assert told['mouthSmileLeft'] > 0.6 and abs(told['mouthSmileLeft'] - told['mouthSmileRight']) < 0.02
    assert told['jawOpen'] < 0.3 and told['eyeBlinkLeft'] < 0.3
    with pytest.raises(PreprocessError, match='expected tables of the detector'):
        dense_points.load_detector_errors(dense_points.POINTS_FILE)


def test_errors_that_go_together_are_learned():
    rng = np.random.default_rng(0)
    modes, own = rng.normal(size=[12, 2]) * 0.003, np.full(12, 0.002)
    x = rng.normal(size=[4000, 2]) @ modes.T + rng.normal(size=[4000, 12]) * own
    is_known = rng.random(x.shape) < 0.8
    found, deviation = bake_errors.factors(np.where(is_known, x, 1e3), is_known, 2)
    assert np.corrcoef((found @ found.T).ravel(), (modes @ modes.T).ravel())[0, 1] > 0.99
    assert np.allclose(deviation, own, rtol=0.1)


def test_mean_errors_and_scores_are_learned(fitter, people):
    rng, table, names = np.random.default_rng(1), dense_points.load_dense_points(), list(fitter.head.expression_names)
    identity, expression, labels = (np.repeat(array, 5, axis=0) for array in people)
    head = fitter.head(torch.from_numpy(identity), torch.from_numpy(expression))
    surface = table.on(head.vertices).numpy()
    offset = rng.normal(0, 0.002, [478, 3])
    offset = (offset + offset[table.mirror.numpy()] * [-1, 1, 1]) / 2
    points = np.stack([project_mesh(s + offset, label)[0] for s, label in zip(surface, labels, strict=True)])
    found = bake_errors.Found(points, surface, labels.astype(float), 0.5 * expression, expression.astype(float))
    arrays = bake_errors.learn(found, names, 2)
    core = table.deviation.numpy() < 0.004
    assert np.abs(arrays['offset'] - offset)[core].max() < 3e-4
    jaw = names.index('jawOpen')
    told = bake_errors.score_terms(found.scores) @ arrays['scores']
    assert np.corrcoef(told[:, jaw], expression[:, jaw])[0, 1] > 0.95


def test_chained_systems_are_those_of_one_matrix():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64)
    blocks = blocks @ blocks.mT + 6 * torch.eye(4)
    vectors = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    strength = torch.rand(4, 4, generator=generator, dtype=torch.float64)
    whole = torch.block_diag(*blocks)
    for frame in range(4):
        here, there = (slice(4 * f, 4 * f + 4) for f in (frame, frame + 1))
        whole[here, there] = whole[there, here] = -torch.diag(strength[frame])
    expected = torch.linalg.solve(whole, vectors.ravel()).reshape(5, 4)
    assert torch.allclose(solver._solve_chain(blocks, vectors, strength), expected)


def test_points_of_the_head_are_symmetric_and_near_to_its_landmarks(fitter):
    table = dense_points.load_dense_points()
    mesh = fitter.head(torch.zeros(1, 100), torch.zeros(1, 52))
    points = table.on(mesh.vertices)[0]
    assert torch.allclose(points[table.mirror], points * torch.tensor([-1, 1, 1]), atol=1e-3)
    assert (table.mirror[IBUG_OF_MESH] == torch.from_numpy(IBUG_OF_MESH[LANDMARK_MIRROR])).all()
    distance = (points[IBUG_OF_MESH[27:]] - mesh.landmarks[0, 27:]).norm(dim=1)  # Nose, eyes and lips.
    assert distance.max() < 0.006 and distance.median() < 0.003


def test_overlays_lie_on_the_head(fitter):
    mesh = fitter.head(torch.zeros(1, 100), torch.zeros(1, 52))
    vertices, label = mesh.vertices[0].numpy(), camera_label(0, 0, 0)
    drawn = np.asarray(draw_overlay(Image.new('RGB', (512, 512)), vertices, fitter.head.faces.numpy(), label))
    rows, columns = np.nonzero(drawn.sum(axis=2))
    screen = 512 * project_mesh(vertices[fitter.head.regions['face'].numpy()], label)[0] - 0.5
    inside = (screen[:, 1] < 500) & (screen[:, 1] > 5)
    assert columns.min() <= screen[inside, 0].min() + 2 and columns.max() >= screen[inside, 0].max() - 2
    assert drawn[int(screen[inside, 1].mean()), int(screen[inside, 0].mean()) - 20 :][:40].any()
    assert not drawn[5:60, :40].any()
    # Outer corners of the eyes, docs/conventions.md: 163 and 350.
    eyes = 512 * project_mesh(mesh.landmarks[0].numpy(), label)[0][[36, 45]]
    assert 170 < eyes[1, 0] - eyes[0, 0] < 200


# --- from photographs to data ----------------------------------------------------------------------------------------


class DrawnFaces:
    """Stands in for the detector: faces of a picture by the marks in its first pixels; needs no MediaPipe."""

    def __init__(self, fitter, people):
        self.fitter, self.people = fitter, people

    def __call__(self, image):
        marks = np.asarray(image)[0, :2, 0] // 50
        return [self.face(int(mark) - 1 + 2 * place, place) for place, mark in enumerate(marks) if mark]

    def face(self, person, place):
        """Return a face of 512 pixels, or a smaller one further right."""
        identity, expression, labels = (array[person : person + 1] for array in self.people)
        points = seen_points(self.fitter, identity, expression, labels)[0] * (1, 0.5)[place] + (0, 520)[place]
        named = dict(zip(self.fitter.head.expression_names, expression[0].tolist(), strict=True))
        return landmarker.Face(np.pad(points, [(0, 0), (0, 1)]), named, np.eye(4))

    def close(self):
        """Do nothing."""


@pytest.fixture
def wild(fitter, people, monkeypatch):
    """Return a function that runs the command with drawn faces for the detector."""
    monkeypatch.setattr(preprocess_in_the_wild, 'Landmarker', lambda *_, **__: DrawnFaces(fitter, people))
    monkeypatch.setattr(preprocess_in_the_wild, 'model_path', lambda path: pathlib.Path(path or __file__))

    def run(indir, *flags):
        return CliRunner().invoke(preprocess_in_the_wild.main, [f'--indir={indir}', '--device=cpu', *flags])

    return run


def photograph(*people, size=(640, 560)):
    """Return a picture that DrawnFaces finds these people in."""
    pixels = np.full([*size[::-1], 3], 90, np.uint8)
    pixels[100:400, 100:400] = np.arange(300)[:, None] % 256
    pixels[0, :2] = 0
    for place, person in enumerate(people):
        pixels[0, place] = 50 * (person + 1) + 20
    return Image.fromarray(pixels)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / 'in'
    (folder / 'sub').mkdir(parents=True)
    photograph(0).save(folder / 'one.png')
    photograph(1).save(folder / 'sub' / 'two.png')
    photograph(2, 1).save(folder / 'pair.png')
    photograph().save(folder / 'nobody.png')
    (folder / 'broken.jpg').write_bytes(b'text')
    return folder


def test_photographs_become_data(wild, photos):
    result = wild(photos, '--overlays')
    out = photos / 'processed'
    assert result.exit_code == 0, result.output
    assert 'nobody: no face found' in result.output and 'broken.jpg: expected a picture' in result.output
    assert '3 faces of 5 pictures, 0 faults' in result.output
    names = ['one', 'pair', 'sub-two']
    wanted = {f'{n}{e}' for n in names for e in ('.png', '.obj', '_kpt2d.txt')} | {'dataset.json', 'coefficients.npz'}
    assert set(content(out)) == wanted | {files.WRITTEN}
    assert set(content(photos / 'processed_work' / 'overlays')) == {f'{name}.jpg' for name in names}
    clip, source = open_clip(out), FolderSource(out, out)  # What driving and training read.
    assert clip.names == names and len(source.names) == 3
    assert source.image(0).shape == (3, 512, 512) and np.array_equal(source.mesh(1), clip.mesh(1))
    with np.load(out / 'coefficients.npz') as arrays:
        assert arrays['identity'].shape == (3, 100) and arrays['error'].max() < 0.03
    before = content(photos)
    assert wild(photos, '--overlays').exit_code == 0 and content(photos) == before


def test_the_report_shows_what_there_is(wild, photos, tmp_path):
    assert wild(photos, f'--outdir={tmp_path}/out').exit_code == 0
    with np.load(tmp_path / 'out' / 'coefficients.npz') as arrays:
        worst = arrays['names'][arrays['error'].argmax()]
    for flags in ([f'--driving={tmp_path}/out'], [f'--data={tmp_path}/out', f'--rdata={tmp_path}/out']):
        result = CliRunner().invoke(check_data.main, [*flags, f'--report={tmp_path}/r.html', '--workers=1'])
        assert result.exit_code == 0 and '3 items, no fault' in result.output, result.output
        text = (tmp_path / 'r.html').read_text()
        assert text.count('<figure>') == 6 and 'nobody: no face found' in text and 'src="http' not in text
        after = text.split('The worst 3')[1]
        assert after.index(str(worst)) == min(after.index(f'{name}.png') for name in ('one', 'pair', 'sub-two'))
    (tmp_path / 'out' / 'one.obj').unlink()
    result = CliRunner().invoke(check_data.main, [f'--driving={tmp_path}/out', f'--report={tmp_path}/r.html'])
    assert result.exit_code == 1 and (tmp_path / 'r.html').read_text().count('<figure>') == 4
    assert 'one.obj: expected a mesh' in (tmp_path / 'r.html').read_text()


def test_poses_of_the_report():
    labels = np.stack([camera_label(yaw, pitch, 0.0, (0, 0, 0)) for yaw, pitch in ((0, 0), (0.5, 0), (-0.2, 0.3))])
    assert np.allclose(report_page.angles_deg(labels), np.degrees([(0, 0), (0.5, 0), (-0.2, 0.3)]), atol=1e-3)


def test_results_below_the_photographs_are_no_photographs(wild, photos, tmp_path):
    before = files.list_pictures(photos)
    assert wild(photos, '--overlays').exit_code == 0
    assert (photos / 'processed' / 'one.png').exists() and (photos / 'processed_work' / 'overlays' / 'one.jpg').exists()
    assert files.list_pictures(photos) == before
    assert set(files.list_pictures(photos / 'processed')) >= {'one', 'sub-two'}
    again = wild(photos, f'--outdir={tmp_path}/other')
    assert '3 faces of 5 pictures' in again.output, again.output
    original = (photos / 'one.png').read_bytes()
    result = wild(photos, f'--outdir={photos}')
    assert result.exit_code != 0 and 'another folder than --indir' in result.output
    assert (photos / 'one.png').read_bytes() == original


def test_all_faces_and_one_person(wild, photos, tmp_path):
    result = wild(photos, '--all-faces', '--same-person', f'--outdir={tmp_path}/out')
    assert result.exit_code == 0 and '4 faces of 5 pictures' in result.output, result.output
    assert (tmp_path / 'out' / 'pair-1.png').exists()
    with np.load(tmp_path / 'out' / 'coefficients.npz') as arrays:
        assert arrays['identity'].shape == (100,)


@pytest.mark.parametrize('stage', ['faces_text', 'write_fit', 'save_png', 'write_tables'])
def test_interrupted_runs_end_the_same(wild, photos, tmp_path, monkeypatch, stage):
    assert wild(photos, f'--outdir={tmp_path}/whole').exit_code == 0
    module = {'faces_text': preprocess_in_the_wild, 'write_fit': fitting, 'save_png': files}.get(
        stage, preprocess_in_the_wild.wild_output
    )
    real, calls = getattr(module, stage), []

    def fails(*args):
        calls.append(1)
        if len(calls) == 2 or stage == 'write_tables':
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, fails)
        assert wild(photos, f'--outdir={tmp_path}/halves').exit_code
    assert wild(photos, f'--outdir={tmp_path}/halves').exit_code == 0
    for ending in ('', '_work'):
        assert content(tmp_path / f'whole{ending}') == content(tmp_path / f'halves{ending}')


def test_a_video_becomes_a_clip(wild, people, tmp_path, monkeypatch, fitter):
    folder = tmp_path / 'videos'
    folder.mkdir()
    for name in ('a', 'b'):
        with video_file(folder / f'{name}.mp4', 12.5) as add:
            for _ in range(4):
                add(np.asarray(photograph(0)))
    faces = DrawnFaces(fitter, people)
    faces.__class__ = type('Same', (DrawnFaces,), {'__call__': lambda self, image: [self.face(0, 0)]})
    monkeypatch.setattr(preprocess_in_the_wild, 'Landmarker', lambda *_, **__: faces)
    result = wild(folder, f'--outdir={tmp_path}/out')
    assert result.exit_code == 0 and result.output.count('4 faces of 4 pictures') == 2, result.output
    clip = open_clip(tmp_path / 'out' / 'b', with_coefficients=True)
    assert clip.fps == 12.5 and clip.names == ['00000', '00001', '00002', '00003']
    assert np.allclose(clip.labels, clip.labels[0], atol=1e-3)
    refused = wild(folder, '--all-faces')
    assert refused.exit_code and '--all-faces: expected with photographs only' in refused.output
    photograph(0).save(folder / 'c.png')
    assert 'found both: c.png' in wild(folder).output


def test_crops_of_videos_do_not_jitter(fitter, people):
    points = seen_points(fitter, *(array[:1] for array in people))[0]
    rng = np.random.default_rng(0)
    reference = preprocess_in_the_wild.reference_points(None)
    found = []
    for _ in range(50):
        moved = landmarker.Face(np.pad(points + rng.normal(0, 2, points.shape), [(0, 0), (0, 1)]), {}, np.eye(4))
        found.append(faces_file.FoundFace((600, 600), moved.points[:, :2], moved.five, {}))
    alone, together = (np.array(fitting.crops_of(found, reference, fps)) for fps in (None, 25))
    steps = [np.diff(crops[:, 2:4], axis=0).std(axis=0) for crops in (together, alone)]
    assert steps[0].max() < 0.2 * steps[1].min()


def test_the_fit_command(fitter, people, photos, tmp_path):
    find = DrawnFaces(fitter, people)
    for name in ('one', 'pair', 'nobody'):
        image = files.read_picture(photos / f'{name}.png')
        files.write_text(faces_file.faces_text(find(image), image.size), tmp_path / 'faces' / f'{name}.json')
    arguments = [f'--faces={tmp_path}/faces', f'--out={tmp_path}/fits', '--device=cpu']
    result = CliRunner().invoke(fit_head.main, arguments)
    assert result.exit_code == 0 and 'fits: 2 faces, 1 pictures without a face' in result.output, result.output
    assert fitting.read_fit(tmp_path / 'fits' / 'pair.npz').expression.shape == (52,)
    (tmp_path / 'faces' / 'bad.json').write_text(json.dumps({'format': 'other'}))
    result = CliRunner().invoke(fit_head.main, arguments)
    assert result.exit_code and 'bad.json: expected faces of detect.py' in result.output
    (tmp_path / 'fits' / 'bad.npz').write_bytes(b'text')
    with pytest.raises(PreprocessError, match='bad.npz: expected a fit'):
        fitting.read_fit(tmp_path / 'fits' / 'bad.npz')


def test_bad_inputs_are_told(wild, tmp_path, monkeypatch):
    assert 'expected a folder of photographs or videos' in wild(tmp_path / 'none').output
    (tmp_path / 'empty').mkdir()
    assert 'found none' in wild(tmp_path / 'empty').output
    (tmp_path / 'x.mp4').write_bytes(b'text')
    assert 'expected a video, found none' in wild(tmp_path / 'x.mp4').output
    photograph().save(tmp_path / 'empty' / 'a.png')
    result = wild(tmp_path / 'empty')
    assert result.exit_code == 0 and '0 of 1 pictures used: no face found' in result.output
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, 'mediapipe', None)
    (tmp_path / 'a.task').write_bytes(b'text')
    result = wild(tmp_path / 'empty', f'--model={tmp_path}/a.task')
    assert result.exit_code and 'pip install -r requirements-preprocess.txt' in result.output


# --- with the detector -----------------------------------------------------------------------------------------------


def test_photographs_of_all_kinds(tmp_path):
    pytest.importorskip('mediapipe', reason='mediapipe is not installed (requirements-preprocess.txt)')
    astronaut = Image.fromarray(pytest.importorskip('skimage.data').astronaut())
    folder = tmp_path / 'in'
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    astronaut.save(folder / 'plain.png')
    astronaut.transpose(Image.Transpose.ROTATE_90).save(folder / 'exif.jpg', exif=exif, quality=95)
    astronaut.rotate(20, Image.Resampling.BICUBIC).save(folder / 'rotated.png')
    astronaut.point(lambda value: value // 4).save(folder / 'dark.png')
    astronaut.crop((130, 20, 330, 220)).resize((96, 96)).save(folder / 'tiny.png')
    astronaut.convert('L').save(folder / 'grey.png')
    astronaut.convert('CMYK').save(folder / 'cmyk.jpg', quality=95)
    result = CliRunner().invoke(preprocess_in_the_wild.main, [f'--indir={folder}', '--device=cpu'])
    assert result.exit_code == 0 and '7 faces of 7 pictures, 0 faults' in result.output, result.output
    with np.load(folder / 'processed' / 'coefficients.npz') as arrays:
        errors = dict(zip(arrays['names'].tolist(), arrays['error'].tolist(), strict=True))
        smile = arrays['expression'][:, arrays['expression_names'].tolist().index('mouthSmileLeft')]
    assert errors['plain.png'] < 0.02 and max(errors.values()) < 0.03, errors
    assert smile.min() > 0.4
    fits = {n: fitting.read_fit(folder / 'processed_work' / 'fits' / f'{n}.npz') for n in ('plain', 'exif', 'rotated')}
    assert angles_between(fits['plain'].label[None], fits['exif'].label[None])[0] < 1.5
    # Turned counter-clockwise by 20 degrees: so is what the camera sees.
    assert 15 < angles_between(fits['plain'].label[None], fits['rotated'].label[None])[0] < 25


def test_a_killed_run_ends_as_another(tmp_path):
    """Ended by SIGKILL among found faces, then among written pictures, and started again."""
    pytest.importorskip('mediapipe', reason='mediapipe is not installed (requirements-preprocess.txt)')
    astronaut = Image.fromarray(pytest.importorskip('skimage.data').astronaut())
    folder = tmp_path / 'in'
    folder.mkdir()
    for number in range(20):
        astronaut.rotate(number - 10, Image.Resampling.BICUBIC).save(folder / f'{number:02d}.jpg', quality=90)

    def words(name):
        return [f'--indir={folder}', f'--outdir={tmp_path}/{name}', '--device=cpu']

    result = CliRunner().invoke(preprocess_in_the_wild.main, words('whole'))
    assert result.exit_code == 0, result.output
    for pattern in ('killed_work/faces/*', 'killed/*.png'):
        run = subprocess.Popen([sys.executable, preprocess_in_the_wild.__file__, *words('killed')],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
        while len(list(tmp_path.glob(pattern))) < 3:
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        run.kill()
        assert run.communicate() and run.returncode == -signal.SIGKILL
        assert 3 <= len(list(tmp_path.glob(pattern))) < 20
    result = CliRunner().invoke(preprocess_in_the_wild.main, words('killed'))
    assert result.exit_code == 0, result.output
    for ending in ('', '_work'):
        assert content(tmp_path / f'whole{ending}') == content(tmp_path / f'killed{ending}')
