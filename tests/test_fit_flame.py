# SPDX-License-Identifier: Apache-2.0
"""FLAME fitted to points whose truth is known: a fabricated model of FLAME's sizes and structure, with the embedded
head's surface and shapes, and a jaw and eyes on joints. Nothing in it comes from FLAME."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_fit_head import (  # noqa: F401  (fixtures)
    COUNT, DrawnFaces, angles_between, content, fitter, people, photos, wild,
)
from test_flame import F, V, chumpy, numpy_array, numpy_dtype, npy, object_array, pickled, python2, sparse
from test_restricted_pickle import write

from dataset_preprocessing.ffhq import faces_file, files, fit_head, fitting, flame_points, solver
from dataset_preprocessing.ffhq.dense_points import load_dense_points
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.points import IBUG_OF_MESH
from geometry.flame import NUM_CONTOUR_ROWS
from geometry.head_model import load_embedded_head
from geometry.meshes import from_world, to_world
from geometry.mirror import LANDMARK_MIRROR
from training.dataset import FolderSource
from training.driving import open_clip

pytestmark = pytest.mark.usefixtures('one_thread')
JAW, EYES = 50, (53, 54, 55, 56)  # Columns of local coefficients.
EXPRESSION_SHARE = 0.35  # A standard deviation of a code, of the embedded head's expression.


def kept_vertices(embedded):
    """Return which vertices [V] of the embedded head FLAME's stand for: no lashes, and idle ones at the end."""
    kept = (~embedded.regions['lashes']).nonzero()[:, 0].numpy()
    return np.concatenate([kept, np.zeros(V - len(kept), int)]), len(kept)


def fabricated(embedded):
    """Return the arrays of generic_model.pkl and landmark_embedding.npy, and where the embedded head's vertices are."""
    rng, (kept, count) = np.random.default_rng(0), kept_vertices(embedded)
    place = np.full(len(embedded.mean), -1)
    place[kept[:count]] = np.arange(count)
    template = embedded.mean.numpy()[kept]
    faces = place[embedded.faces.numpy()]
    faces = faces[(faces >= 0).all(axis=1)]
    faces = np.resize(faces, [F, 3])  # Repeated to fill.
    shapes = np.zeros([V, 3, 400])
    shapes[:, :, :100] = embedded.identity_basis.numpy().reshape(100, -1, 3)[:, kept].transpose(1, 2, 0)
    named = [i for i, name in enumerate(embedded.expression_names) if not name.startswith(('eyeLook', 'jaw'))]
    basis = embedded.expression_basis.numpy().reshape(52, -1, 3)[named][:, kept].transpose(1, 2, 0)
    shapes[:, :, 300 : 300 + len(named)] = EXPRESSION_SHARE * basis
    eyes = [embedded.regions[f'eye_{side}'].numpy()[kept] for side in ('left', 'right')]
    jaw = 1 / (1 + np.exp((template[:, 1] + 0.045) / 0.008)) / (1 + np.exp(-template[:, 2] / 0.01))
    jaw[eyes[0] | eyes[1]] = 0
    weights = np.stack([np.zeros(V), 1 - jaw, jaw, *np.zeros([2, V])], axis=1)
    for joint, eye in enumerate(eyes, start=3):
        weights[eye] = np.eye(5)[joint]
    parts = [embedded.regions[name].numpy()[kept] for name in ('neck', 'neck', 'ears')]
    regressor = np.stack([part / part.sum() for part in (*parts, *eyes)])
    model = {
        'f': faces.astype(np.uint32), 'v_template': template.astype(float), 'shapedirs': shapes,
        'posedirs': rng.normal(0, 2e-4, [V, 3, 36]), 'weights': weights, 'J_regressor': regressor,
        'kintree_table': np.array([[2**32 - 1, 0, 1, 1, 1], range(5)], np.uint32),
    }  # fmt: skip
    return model, landmark_arrays(embedded, faces, place), place


def landmark_arrays(embedded, faces, place):
    """Return the embedded head's landmarks as DECA's file holds them."""
    corners, weights = place[embedded.landmark_vertices.numpy()], embedded.landmark_weights.numpy()
    triangles, shares = [], np.zeros([len(corners), 3], np.float32)
    for row, (three, share) in enumerate(zip(corners, weights, strict=True)):
        used = three[share > 0]
        triangles.append(np.flatnonzero((faces[..., None] == used).any(1).all(1))[0])
        for corner, part in zip(three, share, strict=True):  # Some lie at a vertex, and name it thrice.
            shares[row] += part * (faces[triangles[-1]] == corner)
    triangles = np.array(triangles)
    return {
        'static_lmk_faces_idx': triangles[17:], 'static_lmk_bary_coords': shares[17:],
        'dynamic_lmk_faces_idx': np.tile(triangles[:17], [NUM_CONTOUR_ROWS, 1]),
        'dynamic_lmk_bary_coords': np.tile(shares[:17], [NUM_CONTOUR_ROWS, 1, 1]),
    }  # fmt: skip


@pytest.fixture(scope='module')
def flame(tmp_path_factory):
    """The folder of the fabricated files, and the vertices [478, 3] of MediaPipe's points."""
    folder, embedded = tmp_path_factory.mktemp('flame'), load_embedded_head()
    model, landmarks, place = fabricated(embedded)
    entries = {name: pickled(array) for name, array in model.items()}
    entries.update(shapedirs=chumpy(entries['shapedirs']), J_regressor=sparse(model['J_regressor']))
    (folder / 'generic_model.pkl').write_bytes(python2(entries))
    arrays = {key: numpy_array('numpy.core', a.shape, numpy_dtype(a.dtype.str[1:]), a.tobytes())
              for key, a in landmarks.items()}  # fmt: skip
    (folder / 'landmark_embedding.npy').write_bytes(npy(write(object_array(arrays), 3)))
    lines = ['v %.9g %.9g %.9g' % tuple(vertex) for vertex in model['v_template']] + ['vt 0 0', 'vt 1 0', 'vt 0 1']
    lines += ['f {}/1 {}/2 {}/3'.format(*face) for face in (model['f'] + 1).tolist()]
    (folder / 'head_template.obj').write_text('\n'.join(lines) + '\n')
    corners = place[load_dense_points().corners.numpy()]
    assert corners.min() >= 0
    return folder, torch.from_numpy(corners)


@pytest.fixture(scope='module')
def flame_fitter(flame):
    return fitting.HeadFitter(head_model='flame', flame_path=str(flame[0]))


@pytest.fixture(scope='module')
def known(flame_fitter, people):  # noqa: F811
    """Return identity [N, 100], local coefficients [N, 57] and labels [N, 25] of random people."""
    rng = np.random.default_rng(7)
    identity = rng.normal(0, 0.6, [COUNT, 100])
    local = np.zeros([COUNT, 57])
    local[:, :43] = rng.normal(0, 0.6, [COUNT, 43])
    local[:, 50] = rng.uniform(0, 0.35, COUNT)
    gaze = rng.uniform(-0.3, 0.3, [COUNT, 2])
    local[:, 53:] = np.concatenate([gaze, gaze], axis=1)
    return identity.astype(np.float32), local.astype(np.float32), people[2]


def seen_dense(fitter, corners, identity, local, labels):  # noqa: F811
    """Return where MediaPipe's points [N, 478, 2] of FLAME's heads lie in pictures of 512 pixels."""
    mesh = fitter.model.mesh(torch.from_numpy(identity), torch.from_numpy(local))
    weights = load_dense_points().weights
    world = 2.5 * (mesh.vertices[:, corners] * weights[..., None]).sum(dim=2).double() + torch.tensor([0, 0.025, 0])
    pose = torch.from_numpy(labels[:, :16]).double().reshape(-1, 4, 4)
    rotation = pose[:, :3, :3].mT
    return (solver.project(solver.see(world, rotation, -(rotation @ pose[:, :3, 3:])[..., 0])) * 512 - 0.5).numpy()


def test_truth_is_found_from_exact_landmarks(flame_fitter, known):
    model, (identity, local, labels) = flame_fitter.model, (torch.from_numpy(array).double() for array in known)
    pose = labels[:, :16].reshape(-1, 4, 4)
    rotation = pose[:, :3, :3].mT
    world = model.points(identity, local)
    landmarks = 2.5 * model.mesh(*map(torch.from_numpy, known[:2])).landmarks + torch.tensor([0, 0.025, 0])
    assert (world[:, :68] - landmarks).abs().max() < 1e-6
    targets = solver.project(solver.see(world, rotation, -(rotation @ pose[:, :3, 3:])[..., 0]))
    fit = solver.fit(model, targets, torch.zeros_like(local), torch.arange(COUNT))
    pose = torch.cat([fit.cam2world().flatten(1), labels[:, 16:]], dim=1)
    assert np.median(angles_between(pose.numpy(), known[2])) < 1.5
    found = solver.project(solver.see(model.points(fit.identity, fit.local), fit.rotation, fit.place))
    eyes = (targets[:, [36, 39]].mean(dim=1) - targets[:, [42, 45]].mean(dim=1)).norm(dim=1)
    errors = (found - targets).norm(dim=2).median(dim=1).values / eyes
    assert errors.median() < 0.005 and errors.max() < 0.01


def test_truth_is_found_from_the_detectors_points(flame, flame_fitter, known):
    identity, local, labels = known
    points = seen_dense(flame_fitter, flame[1], identity, local, labels)
    fits = flame_fitter.batch(points + np.random.default_rng(8).normal(0, 0.5, points.shape), np.zeros_like(local))
    assert np.median(angles_between(np.stack([fit.label for fit in fits]), labels)) < 2.5
    assert np.median([fit.error for fit in fits]) < 0.008 and max(fit.error for fit in fits) < 0.02
    found = np.stack([fit.expression for fit in fits])
    for column in (JAW, *EYES):
        assert np.corrcoef(found[:, column], local[:, column])[0, 1] > 0.97, column
    gaze = np.stack([fit.gaze for fit in fits])
    assert np.corrcoef(gaze[:, 0], -local[:, EYES[0]])[0, 1] > 0.97  # About x a positive turn looks down.
    assert np.corrcoef(gaze[:, 3], local[:, EYES[3]])[0, 1] > 0.97
    assert (found >= flame_fitter.model.lower.numpy() - 1e-6).all() and found[:, JAW].min() >= 0


def test_slopes_are_those_of_the_points(flame_fitter):
    model, generator = flame_fitter.model, torch.Generator().manual_seed(1)
    identity, local, towards = (torch.randn(2, n, generator=generator, dtype=torch.float64) for n in (100, 57, 157))
    local[:, 50:] *= 0.2
    local[1, 50:] = 0  # Rotations have a slope at zero, too.
    slopes = torch.cat(model.jacobians(identity, local), dim=3)
    ends = [model.points(identity + s * towards[:, :100], local + s * towards[:, 100:]) for s in (-1e-5, 1e-5)]
    assert torch.allclose((slopes @ towards[:, None, :, None])[..., 0], (ends[1] - ends[0]) / 2e-5, atol=1e-6)


def test_landmarks_lie_between_the_points_near_them(flame_fitter):
    embedded, table = load_embedded_head(), load_dense_points()
    shares = flame_points.landmark_shares(embedded, table)
    assert shares.min() >= 0 and np.allclose(shares.sum(axis=1), 1)
    assert np.allclose(shares[LANDMARK_MIRROR][:, table.mirror.numpy()], shares, atol=0.05)
    mesh = embedded(torch.zeros(1, 100), embedded.expression(jawOpen=0.8))
    away = shares @ table.on(mesh.vertices)[0].numpy() - mesh.landmarks[0].numpy()
    alone = table.on(mesh.vertices)[0, IBUG_OF_MESH].numpy() - mesh.landmarks[0].numpy()
    away, alone = (np.linalg.norm(offset, axis=1)[17:] for offset in (away, alone))
    assert np.median(away) < 0.7 * np.median(alone) and away.max() < 0.006


def test_photographs_become_data_of_flame(wild, photos, flame, tmp_path):  # noqa: F811
    flags = ['--head-model=flame', f'--flame-path={flame[0]}', '--overlays', f'--outdir={tmp_path}/out']
    result = wild(photos, *flags)
    assert result.exit_code == 0 and '3 faces of 5 pictures, 0 faults' in result.output, result.output
    clip, source = open_clip(tmp_path / 'out'), FolderSource(tmp_path / 'out', tmp_path / 'out')
    assert clip.num_vertices == V and source.mesh(1).shape == (V + 68, 3)
    head = flame_points.load_flame_head(flame[0] / 'generic_model.pkl')
    with np.load(tmp_path / 'out' / 'coefficients.npz') as arrays:
        x = {name: torch.from_numpy(arrays[name]) for name in ('shape', 'exp', 'pose', 'eye_pose')}
        sizes = arrays['size']
        assert arrays['error'].max() < 0.03 and x['exp'].shape == (3, 50) and not x['pose'][:, :3].any()
    mesh = head(x['shape'], x['exp'], jaw_pose=x['pose'][:, 3:], eye_pose=x['eye_pose']).stacked().numpy()
    for row in range(3):
        sized = from_world(sizes[row] * to_world(mesh[row]))
        assert np.abs(clip.mesh(row) - sized).max() < 2e-6
    before = content(tmp_path)
    assert wild(photos, *flags).exit_code == 0 and content(tmp_path) == before
    result = wild(photos, f'--outdir={tmp_path}/out')
    assert result.exit_code == 1 and 'results of --head-model "embedded", found those of "flame"' in result.output
    assert content(tmp_path) == before
    result = wild(photos, *flags[:2], '--same-person', f'--outdir={tmp_path}/one')
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / 'one' / 'coefficients.npz') as arrays:
        assert arrays['shape'].shape == (100,)


def test_the_fit_command_takes_flame(fitter, people, photos, flame, tmp_path):  # noqa: F811
    image = files.read_picture(photos / 'one.png')
    faces = faces_file.faces_text(DrawnFaces(fitter, people)(image), image.size)
    files.write_text(faces, tmp_path / 'faces' / 'one.json')
    arguments = [f'--faces={tmp_path}/faces', f'--out={tmp_path}/fits', '--device=cpu']
    result = CliRunner().invoke(fit_head.main, [*arguments, '--head-model=flame', f'--flame_path={flame[0]}'])
    assert result.exit_code == 0 and 'fits: 1 faces' in result.output, result.output
    assert fitting.read_fit(tmp_path / 'fits' / 'one.npz').expression.shape == (57,)


@pytest.mark.parametrize('words, message', [
    (['--flame-path={flame}'], '--flame-path: expected --head-model=flame with it'),
    (['--head-model=flame', '--flame-path={tmp}'], '{tmp}/generic_model.pkl (FLAME 2020 from https://flame.is.tue'),
    (['--head-model=flame', '--flame-path={tmp}/a.pkl'], '{tmp}/a.pkl: expected the FLAME 2020 or 2023 model'),
    (['--head-model=other'], "'other' is not one of 'embedded', 'flame'"),
])  # fmt: skip
def test_wrong_files_are_one_line(wild, photos, flame, tmp_path, words, message):  # noqa: F811
    for name in ('landmark_embedding.npy', 'head_template.obj'):
        (tmp_path / name).write_bytes((flame[0] / name).read_bytes())
    (tmp_path / 'a.pkl').write_bytes(b'text')
    names = dict(tmp=tmp_path, flame=flame[0])
    result = wild(photos, *(word.format(**names) for word in words))
    assert result.exit_code and message.format(**names) in result.output, result.output
    assert '\nError' not in result.output.split('Error: ', 1)[1] and not (photos / 'processed').exists()


def test_eyeballs_are_parts_of_their_own(flame):
    head = flame_points.load_flame_head(flame[0])
    head.faces = (torch.arange(3 * F) % V).reshape(F, 3)  # All in one piece.
    with pytest.raises(PreprocessError, match='FLAME: expected eyeballs that are no part of the skin, found'):
        flame_points.FlamePoints(head, load_embedded_head(), load_dense_points())
