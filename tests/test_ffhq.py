# SPDX-License-Identifier: Apache-2.0
"""From FFHQ's photographs to a data set by runme.py, on fabricated pictures and checkpoints; gaze, expressions."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from parity import ROOT
from PIL import Image
from scipy.spatial.transform import Rotation
from test_dnnlib_util import File, site  # noqa: F401  (a fixture)
from test_flame import MODEL, landmark_file, model_entries, python2, write_template
from test_preprocess import refused
from test_preprocess import run as invoke

from dataset_preprocessing.ffhq import (
    alignment, deca_fit, deca_net, deep3d_net, expression_labels, ffhq_index, files, gaze, mirroring, runme, steps,
    write_expressions,
)  # fmt: skip
from dataset_preprocessing.ffhq.files import PreprocessError
from geometry.cameras import FRONTAL, look_at_pose
from geometry.head_model import ARKIT_NAMES, load_embedded_head
from geometry.meshes import parse_landmarks, parse_obj_vertices
from geometry.mirror import mirror_label, mirror_mesh
from training.dataset import FolderSource, HeadDataset, PackedSource

pytestmark = pytest.mark.usefixtures('one_thread')
COUNT, WIDTH, HEIGHT = 3, 400, 360


@pytest.fixture(scope='module')
def fabricated(tmp_path_factory):
    """Options that name fabricated checkpoints; nothing in them comes from the real ones."""
    folder = tmp_path_factory.mktemp('assets')
    torch.manual_seed(0)
    torch.save({'net_recon': deep3d_net.Deep3DNet().state_dict()}, folder / 'epoch_20.pth')
    torch.save({'E_flame': deca_net.DecaEncoder().state_dict()}, folder / 'deca_model.tar')
    (folder / 'generic_model.pkl').write_bytes(python2(model_entries()))
    (folder / 'landmark_embedding.npy').write_bytes(landmark_file())
    write_template(folder / 'head_template.obj', MODEL['f'].astype(np.int64))
    return {'network': folder / 'epoch_20.pth', 'deca': folder, 'workers': 1, 'device': 'cpu'}


@pytest.fixture(scope='module')
def head(fabricated):
    return deca_fit.load_files(str(fabricated['deca']), torch.device('cpu'))[1]


@pytest.fixture(scope='module')
def ffhq(tmp_path_factory):
    """A folder with in-the-wild-images and ffhq-dataset-v2.json; the aligned entries are of the same pictures."""
    root, entries = tmp_path_factory.mktemp('ffhq'), {}
    model = load_embedded_head()
    face = model(torch.zeros(1, model.num_identity), model.expression()).landmarks[0].numpy()[:, :2]
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, [HEIGHT // 16, WIDTH // 16, 3]).astype(np.uint8)
        path = root / 'in-the-wild-images' / '00000' / f'{number:05d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path)
        turn = Rotation.from_euler('z', 0.15 * number).as_matrix()[:2, :2]
        points = (face - face.mean(axis=0)) * [800, -800] @ turn + [190 + 5 * number, 180]
        part = {
            'file_url': f'http://127.0.0.1:9/{number}', 'file_size': path.stat().st_size,
            'file_md5': hashlib.md5(path.read_bytes()).hexdigest(), 'pixel_size': [WIDTH, HEIGHT],
            'face_landmarks': points.tolist(),
        }  # fmt: skip
        entries[str(number)] = {'in_the_wild': part, 'image': part}
    (root / 'index.json').write_text(json.dumps(entries))
    return {'indir': root / 'in-the-wild-images', 'landmarks': root / 'index.json'}


@pytest.fixture
def small_samples(monkeypatch):
    """Re-aligned pictures of fewer pixels, in a hundredth of the time."""
    monkeypatch.setattr(alignment.sample_quad, '__defaults__', (375, 750))
    monkeypatch.setattr(alignment.points_in_quad, '__defaults__', (375,))


def contents(folder):
    """Return hash by name of a data set's files."""
    paths = (path for path in folder.rglob('*') if path.is_file() and path.name != 'lock')
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# --- runme.py --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def aligned(fabricated, ffhq, tmp_path_factory):
    """A complete run on aligned pictures."""
    out = tmp_path_factory.mktemp('aligned') / 'out'
    result = invoke(runme, **ffhq, **fabricated, outdir=out, aligned=True)
    assert result.exit_code == 0, result.output
    return out


def test_a_run_from_photographs_to_a_packed_set(fabricated, ffhq, head, small_samples, tmp_path):
    out, packed = tmp_path / 'out', tmp_path / 'packed'
    result = invoke(runme, **ffhq, **fabricated, outdir=out, packed=packed, rebalance=True)
    assert result.exit_code == 0, result.output
    assert 'check: 6 pictures, 0 faults' in result.output and 'yaw of the camera' in result.output
    source = FolderSource(out / 'images512x512', out / 'meshes512x512', with_expressions=True)
    assert source.names == [f'00000/img0000000{i}{end}.png' for i in range(COUNT) for end in ('', '_mirror')]
    matrix, _ = mirroring.expression_mirror(head)
    for i in range(0, 2 * COUNT, 2):
        assert source.image(i).shape == (3, 512, 512)
        assert np.array_equal(source.image(i + 1), source.image(i)[:, :, ::-1])
        assert np.array_equal(source.labels[i + 1][:25], mirror_label(source.labels[i][:25]))
        assert np.array_equal(source.mesh(i + 1), mirror_mesh(source.mesh(i), head.mirror.numpy()))
        assert np.allclose(source.labels[i + 1][25:], matrix @ source.labels[i][25:], atol=1e-5)
    fast, slow = HeadDataset(PackedSource(packed)), HeadDataset(source)
    assert all(np.array_equal(a, b) for i in range(len(fast)) for a, b in zip(fast[i], slow[i], strict=True))
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*') if path.is_file() and path.name != 'lock'}
    result = invoke(runme, **ffhq, **fabricated, outdir=out, packed=packed)
    assert result.exit_code == 0 and f'meshes: 0 done, {COUNT} already there' in result.output
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_landmarks_move_with_the_picture():
    pixels = np.zeros([300, 400, 3], np.uint8)
    pixels[149:152, 219:222] = 255
    quad = np.array([[100.0, 80], [60, 220], [200, 260], [240, 120]])
    sampled = np.asarray(alignment.sample_quad(Image.fromarray(pixels), quad, 200, 400))[..., 0].astype(float)
    rows, columns = np.indices(sampled.shape)
    seen = np.array([(columns * sampled).sum(), (rows * sampled).sum()]) / sampled.sum()
    assert np.allclose(alignment.points_in_quad(np.array([[220.0, 150]]), quad, 200)[0], seen, atol=0.3)
    assert np.allclose(alignment.points_in_quad(quad, quad, 200) + 0.5, [[0, 0], [0, 200], [200, 200], [200, 0]])


def test_a_killed_run_goes_on_and_ends_the_same(aligned, fabricated, ffhq, tmp_path):
    out, script = tmp_path / 'out', ROOT / 'dataset_preprocessing' / 'ffhq' / 'runme.py'
    options = {**ffhq, **fabricated, 'outdir': out, 'aligned': 'true'}
    words = [f'--{name}={value}' for name, value in {**options, 'workers': 2}.items()]
    process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((out / 'work' / 'cameras').rglob('*.npz')) and time.monotonic() < deadline:
        time.sleep(0.005)
    children = pathlib.Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*.png')}
    assert len(before) == 3 * COUNT and not (out / 'images512x512' / 'dataset_exp.json').exists()
    while any(pathlib.Path(f'/proc/{pid}/stat').exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children and not any(pathlib.Path(f'/proc/{pid}/stat').exists() for pid in children), 'processes were left'
    (out / 'images512x512' / '00000' / '.tmp-0-0-img00000009.png').write_bytes(b'half')
    result = invoke(runme, **options)
    assert result.exit_code == 0, result.output
    assert contents(out) == contents(aligned)
    assert before == {path: path.stat().st_mtime_ns for path in before}, 'pictures were made again'


def test_a_dry_run_lists_steps_and_writes_nothing(fabricated, ffhq, tmp_path):
    options = {**fabricated, 'outdir': tmp_path / 'out', 'dry_run': True}
    told = invoke(runme, **ffhq, **options, packed=tmp_path / 'packed', rebalance=True).output
    names = [line.split(':')[0] for line in told.splitlines()[1:] if not line.startswith(' ')]
    assert names == ['landmarks', 'crops', 'cameras', 'labels', 'meshes', 'mirror', 'expressions', 'check',
                     'rebalance', 'pack']  # fmt: skip
    assert told.startswith(f'{COUNT} pictures, 1 processes, cpu\n') and f'crops: {COUNT} of {COUNT} to do' in told
    assert f'    to   {tmp_path}/out/images512x512' in told
    told = invoke(runme, **{**options, 'deca': tmp_path / 'none'}, mirror='fit', gaze='irises').output
    assert told.startswith('70000 pictures (none is here yet)')
    assert 'photographs: 70000 of 70000 to do, 955.0 GB, time not measured' in told
    assert 'irises: ' in told and 'mirror:' not in told
    assert f'missing: {tmp_path}/none/generic_model.pkl: FLAME 2020 from https://' in told
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_what_is_there(aligned, fabricated, ffhq):
    told = invoke(runme, **ffhq, **fabricated, outdir=aligned, aligned=True, dry_run=True).output
    assert f'meshes: 0 of {COUNT} to do' in told and f'mirror: 0 of {COUNT} to do' in told


def test_steps_one_by_one(fabricated, ffhq, tmp_path):
    options = {**ffhq, **fabricated, 'outdir': tmp_path / 'out', 'aligned': True, 'limit': 1, 'mirror': 'none'}
    assert invoke(runme, **options, steps='crops,landmarks').exit_code == 0
    assert [path.name for path in (tmp_path / 'out' / 'images512x512').rglob('*.png')] == ['img00000000.png']
    assert not (tmp_path / 'out' / 'work' / 'cameras').exists()
    refused(runme, "--steps: expected some of landmarks,crops", **options, steps='crop')


class FakeDetector:
    """Finds the same face in each picture, and none in dark ones."""

    def __init__(self, *_):
        pass

    def __call__(self, image):
        if np.asarray(image).max() < 10:
            return []
        side = image.width
        model = load_embedded_head()
        face = model(torch.zeros(1, model.num_identity), model.expression()).landmarks[0].numpy()[:, :2]
        landmarks = side / 2 + (face - face.mean(axis=0)) * [2 * side, -2 * side]
        eyes = [landmarks[36:42].mean(axis=0), landmarks[42:48].mean(axis=0) + [2, 1]]
        return [types.SimpleNamespace(landmarks=landmarks, irises=np.tile(np.array(eyes)[:, None], [1, 5, 1]))]


@pytest.fixture
def detector(monkeypatch):
    steps._detector.cache_clear()
    monkeypatch.setattr(steps.landmarker, 'Landmarker', FakeDetector)
    monkeypatch.setattr(steps.landmarker, 'model_path', lambda path: path)
    yield
    steps._detector.cache_clear()


def test_found_landmarks_own_fits_of_mirror_images_and_gaze(fabricated, detector, small_samples, tmp_path):
    (tmp_path / 'in').mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, [400, 400, 3]).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'in' / 'b.png')
    Image.new('RGB', (400, 400)).save(tmp_path / 'in' / 'dark.png')
    options = dict(indir=tmp_path / 'in', **fabricated, outdir=tmp_path / 'out', mirror='fit', gaze='irises')
    result = invoke(runme, **options)
    assert result.exit_code == 0 and 'dark.png: no face found' in result.output, result.output
    codes = [np.load(tmp_path / 'out' / 'work' / 'codes' / f'b{end}.npz') for end in ('', '_mirror')]
    assert all(np.abs(code['eye_pose']).max() > 0.01 and code['eye_pose'].shape == (6,) for code in codes)
    assert not np.array_equal(codes[0]['exp'], codes[1]['exp'])
    expressions = json.loads((tmp_path / 'out' / 'images512x512' / 'dataset_exp.json').read_text())['labels']
    assert [name for name, _ in expressions] == ['b.png', 'b_mirror.png']
    assert np.allclose(expressions[1][1], codes[1]['exp'])
    assert 'landmarks: 0 done, 2 already there' in invoke(runme, **options).output


def test_gaze_of_files(fabricated, ffhq, tmp_path):
    files.write_text('0.1 0.2 0.3 0.4', tmp_path / 'gaze' / '00000' / 'img00000000.txt')
    options = {**ffhq, **fabricated, 'outdir': tmp_path / 'out', 'aligned': True, 'limit': 1, 'mirror': 'fit'}
    assert invoke(runme, **options, gaze=tmp_path / 'gaze').exit_code == 0
    codes = tmp_path / 'out' / 'work' / 'codes' / '00000'
    plain, mirrored = (np.load(codes / f'img00000000{end}.npz')['eye_pose'] for end in ('', '_mirror'))
    assert np.allclose(plain, [0.1, -0.2, 0, 0.3, -0.4, 0]) and np.allclose(mirrored, [0.3, 0.4, 0, 0.1, 0.2, 0])


def test_bad_input_of_a_run_is_one_line(aligned, fabricated, ffhq, tmp_path):
    options = {**ffhq, **fabricated, 'outdir': tmp_path / 'out'}
    refused(runme, '--aligned: expected --indir', **fabricated, outdir=tmp_path / 'out', aligned=True)
    refused(runme, 'found nothing', **{**options, 'indir': tmp_path / 'none'})
    refused(runme, 'found no file', **{**options, 'landmarks': tmp_path / 'none.json'})
    (tmp_path / 'bad.json').write_text('{"0": {"image": {}}}')
    refused(runme, 'expected ffhq-dataset-v2.json', **{**options, 'landmarks': tmp_path / 'bad.json'})
    refused(runme, 'begun with geometry', **{**options, 'outdir': aligned}, aligned=True, mirror='fit')
    (aligned / 'work' / 'options.json').replace(tmp_path / 'noted.json')
    (aligned / 'work' / 'options.json').write_text('[]')
    refused(runme, 'options.json: expected the options of a run', **{**options, 'outdir': aligned}, aligned=True)
    (tmp_path / 'noted.json').replace(aligned / 'work' / 'options.json')


def test_missing_checkpoints_are_told_with_their_source(aligned, fabricated, ffhq, tmp_path):
    options = {**ffhq, **fabricated, 'aligned': True, 'limit': 1, 'outdir': tmp_path / 'out'}
    assert invoke(runme, **options, steps='landmarks,crops').exit_code == 0
    refused(runme, 'epoch_20.pth (the', **{**options, 'network': tmp_path / 'none' / 'epoch_20.pth'}, steps='cameras')
    refused(runme, 'generic_model.pkl (FLAME', **{**options, 'deca': tmp_path / 'none'}, steps='meshes')


def test_pictures_of_another_size_are_told(fabricated, ffhq, tmp_path):
    folder = tmp_path / 'in'
    folder.mkdir()
    Image.new('RGB', (32, 32)).save(folder / '00001.png')
    Image.new('RGB', (32, 32)).save(folder / '00099.png')
    result = invoke(runme, **{**ffhq, **fabricated, 'indir': folder, 'outdir': tmp_path / 'out'})
    assert result.exit_code and '2 of 2 failed' in result.output
    assert f'expected {WIDTH}x{HEIGHT} as the list tells, found 32x32' in result.output
    assert '00099.png: expected a picture of ffhq-dataset-v2.json' in result.output
    (folder / 'a').mkdir()
    Image.new('RGB', (32, 32)).save(folder / 'a' / '00001.png')
    options = {**ffhq, **fabricated, 'indir': folder, 'outdir': tmp_path / 'o'}
    refused(runme, 'expected one picture of a number', **options)


def test_two_runs_at_once_are_refused(fabricated, ffhq, tmp_path):
    (tmp_path / 'out' / 'work').mkdir(parents=True)
    hold = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()'
    holder = subprocess.Popen([sys.executable, '-c', hold, tmp_path / 'out/work/lock'], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)  # fmt: skip
    try:
        holder.stdout.readline()
        refused(runme, 'another run works in it', **ffhq, **fabricated, outdir=tmp_path / 'out')
    finally:
        holder.kill()
        holder.communicate()


def test_names():
    assert ffhq_index.item_name('00000/00123') == ffhq_index.item_name('img00000123') == '00000/img00000123'
    assert ffhq_index.item_name('61000/61005') == '00061/img00061005' and ffhq_index.item_name('a/me') == 'a/me'
    assert ffhq_index.photograph_path(pathlib.Path('f'), 61005) == pathlib.Path('f/61000/61005.png')


# --- downloads -------------------------------------------------------------------------------------------------------


def test_downloads_resume_and_are_checked(site, ffhq, tmp_path):
    source = ffhq['indir'] / '00000' / '00001.png'
    body = source.read_bytes()
    site.routes['/a'] = File(body, cuts=[len(body) // 2])
    good = ffhq_index.RemoteFile(f'{site.url}/a', len(body), hashlib.md5(body).hexdigest())
    ffhq_index.fetch(good, tmp_path / 'x' / 'a.png', tmp_path / 'cache')
    assert (tmp_path / 'x' / 'a.png').read_bytes() == body and site.ranges() == [None, f'bytes={len(body) // 2}-']
    site.routes['/b'] = File(body)
    with pytest.raises(PreprocessError, match='of MD5 0, found'):
        ffhq_index.fetch(good._replace(url=f'{site.url}/b', md5='0'), tmp_path / 'b.png', tmp_path / 'cache')
    assert not (tmp_path / 'b.png').exists()


def test_photographs_are_downloaded(site, fabricated, ffhq, tmp_path):
    entries = json.loads(ffhq['landmarks'].read_text())
    for number, parts in entries.items():
        parts['in_the_wild']['file_url'] = f'{site.url}/{number}'
        site.routes[f'/{number}'] = File((ffhq['indir'] / '00000' / f'0000{number}.png').read_bytes())
    (tmp_path / 'index.json').write_text(json.dumps(entries))
    options = dict(landmarks=tmp_path / 'index.json', outdir=tmp_path / 'out', steps='photographs', **fabricated)
    assert invoke(runme, **options, limit=2).exit_code == 0
    folder = tmp_path / 'out' / 'work' / 'in-the-wild-images' / '00000'
    assert sorted(path.name for path in folder.iterdir()) == ['00000.png', '00001.png']
    assert (folder / '00001.png').read_bytes() == (ffhq['indir'] / '00000' / '00001.png').read_bytes()
    del site.routes['/2']
    site.routes['/2'] = lambda handler: handler.send_error(404)
    result = invoke(runme, **options)
    assert result.exit_code and '1 of 3 failed; run again later to go on, or get them as https://' in result.output
    assert len(site.requests) == 3, 'what was there was asked for again'


def test_a_list_that_cannot_be_had_is_told_with_its_place(fabricated, monkeypatch, tmp_path):
    monkeypatch.setattr(ffhq_index, 'INDEX', ffhq_index.RemoteFile('ftp://none/x', 267_793_842, '0'))
    monkeypatch.setattr(ffhq_index, 'open_url', lambda *_: (_ for _ in ()).throw(OSError('no network')))
    told = refused(runme, 'no network; get ffhq-dataset-v2.json (0.27 GB)', **fabricated, outdir=tmp_path / 'out')
    assert f'put it to {tmp_path}/out/work/ffhq-dataset-v2.json' in told and '--indir' in told


# --- mirror images and expressions -----------------------------------------------------------------------------------


def test_mirror_images_of_points():
    points = np.random.default_rng(0).uniform(0, 511, [68, 2])
    mirrored = mirroring.mirror_points(points, 512)
    assert np.allclose(mirroring.mirror_points(mirrored, 512), points)
    assert np.allclose(mirrored[36], [511 - points[45, 0], points[45, 1]])


def test_expressions_of_a_symmetric_basis_are_mirrored_exactly():
    rng, partner = np.random.default_rng(0), np.array([1, 0, 2, 4, 3])
    left = rng.normal(size=[5, 3])
    right = left[partner] * [-1, 1, 1]
    both = rng.normal(size=[5, 3])
    both = both + both[partner] * [-1, 1, 1]
    basis = np.stack([np.zeros([5, 3]), left, right, both], axis=-1).reshape(15, 4)
    model = types.SimpleNamespace(mirror=torch.from_numpy(partner), directions=torch.from_numpy(basis), num_identity=1)
    matrix, kept = mirroring.expression_mirror(model)
    assert np.allclose(matrix, [[0, 1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-9) and np.isclose(kept, 1)
    model.mirror = None
    with pytest.raises(PreprocessError, match='--mirror=fit'):
        mirroring.expression_mirror(model)


def test_mirrored_files_of_bad_meshes_are_told(head, tmp_path):
    (tmp_path / 'a.obj').write_text('v 0 0 0\n')
    np.savetxt(tmp_path / 'a.txt', np.zeros([68, 3]))
    paths = [tmp_path / 'a.obj', tmp_path / 'a.txt']
    with pytest.raises(PreprocessError, match='a.obj: expected 5023 vertices, found 1'):
        mirroring.mirror_files(head, paths, [tmp_path / 'b.obj', tmp_path / 'b.txt'])
    assert not (tmp_path / 'b.txt').exists()


def test_mirrored_files_read_back(aligned, head):
    name = '00000/img00000001'
    mesh, points = (
        [parse((aligned / f'{kind}512x512' / f'{name}{end}').read_bytes(), '') for end in ends]
        for kind, parse, ends in (
            ('meshes', parse_obj_vertices, ('.obj', '_mirror.obj')), ('lms', parse_landmarks, ('.txt', '_mirror.txt'))
        )
    )  # fmt: skip
    assert np.array_equal(mesh[1][head.mirror], mesh[0] * np.float32([-1, 1, 1]))
    assert np.array_equal(points[1][16], points[0][0] * np.float32([-1, 1, 1]))


def test_expression_labels_of_codes(aligned, tmp_path):
    result = invoke(write_expressions, codes=aligned / 'work' / 'codes', outdir=tmp_path)
    assert result.exit_code == 0
    written = dict(json.loads((tmp_path / 'dataset_exp.json').read_text())['labels'])
    steps_wrote = dict(json.loads((aligned / 'images512x512' / 'dataset_exp.json').read_text())['labels'])
    assert len(written) == COUNT and all(steps_wrote[name] == code for name, code in written.items())


def test_expression_labels_of_coefficients(tmp_path):
    names = np.array(ARKIT_NAMES)[::-1]
    values = np.arange(104, dtype=np.float32).reshape(2, 52) / 104
    arrays = dict(names=np.array(['a.png', 'b.png']), expression=values, expression_names=names)
    np.savez(tmp_path / 'coefficients.npz', **arrays)
    assert invoke(write_expressions, coefficients=tmp_path / 'coefficients.npz', outdir=tmp_path).exit_code == 0
    written = dict(json.loads((tmp_path / 'dataset_exp.json').read_text())['labels'])
    column = dict(zip(names.tolist(), values[1].tolist(), strict=True))
    assert len(written['b.png']) == 50
    label = dict(zip(expression_labels.ARKIT_LABEL_NAMES, written['b.png'], strict=True))
    assert np.isclose(label['jawLeft'], column['jawLeft'] - column['jawRight'])
    assert np.isclose(label['mouthLeft'], column['mouthLeft'] - column['mouthRight'])
    assert all(np.isclose(label[name], column[name]) for name in label if name not in expression_labels.OPPOSITES)
    for change in (dict(expression_names=names[:50]), dict(expression=values[:1]), dict(expression=values * np.nan)):
        np.savez(tmp_path / 'bad.npz', **{**arrays, **change})
        refused(write_expressions, 'bad.npz: expected', coefficients=tmp_path / 'bad.npz', outdir=tmp_path / 'o')
    (tmp_path / 'c').mkdir()
    np.savez(tmp_path / 'c' / 'a.npz', exp=np.zeros(49))
    refused(write_expressions, 'a.npz: expected exp of 50', codes=tmp_path / 'c', outdir=tmp_path / 'o')
    refused(write_expressions, 'expected either', outdir=tmp_path / 'o')
    assert not (tmp_path / 'o').exists()


# --- gaze ------------------------------------------------------------------------------------------------------------


def test_rotations_turn_ahead_to_the_direction():
    directions = np.random.default_rng(0).normal(size=[200, 3]) + [0, 0, 2]
    turned = Rotation.from_rotvec(gaze.rotation_to(directions)).apply([0, 0, 1])
    assert np.allclose(turned, directions / np.linalg.norm(directions, axis=1, keepdims=True))
    assert np.array_equal(gaze.rotation_to(np.array([0.0, 0, 1])), np.zeros(3))


JOINTS = np.array([[0.031, 0.035, 0.02], [-0.031, 0.035, 0.02]])
INNER, OUTER = np.array([0.013, -0.002, 0.008]), np.array([0.013, 0.001, 0.002])
LIDS = JOINTS[:, None] + np.array([[INNER * [-1, 1, 1], OUTER], [OUTER * [-1, 1, 1], INNER]])


def seen(points, pose):
    """Return pixels of mesh points under a camera, in perspective, of a picture of 512."""
    local = (2.5 * points + [0, 0.025, 0] - pose[:3, 3]) @ pose[:3, :3]
    return local[..., :2] / local[..., 2:] * 4.2647 * 512 + 256


@pytest.mark.parametrize('yaw, pitch', [(0, 0), (0.4, 0.1), (-0.5, -0.2)])
def test_gaze_is_recovered_from_irises_in_perspective(yaw, pitch):
    pose = look_at_pose(FRONTAL + yaw, FRONTAL + pitch)[0].numpy().astype(np.float64)
    for angles in np.random.default_rng(1).uniform(-0.35, 0.35, [20, 4]):
        turns = Rotation.from_rotvec(deca_net.flame_eye_pose(angles).reshape(2, 3))
        irises = JOINTS + turns.apply([0, 0, gaze.IRIS_RADIUS])
        found = gaze.gaze_angles(seen(irises, pose), seen(LIDS, pose), JOINTS, LIDS, pose[:3, :3])
        assert np.abs(found - angles).max() < np.radians(3)


def test_gaze_of_the_mirror_image_is_mirrored():
    pose = look_at_pose(FRONTAL + 0.3, FRONTAL + 0.1)[0].numpy().astype(np.float64)
    irises = seen(JOINTS + [0.004, 0.002, 0.01], pose)
    found = gaze.gaze_angles(irises, seen(LIDS, pose), JOINTS, LIDS, pose[:3, :3])
    flip, turn = np.array([-1, 1]), pose[:3, :3] * np.outer([-1, 1, 1], [-1, 1, 1])
    other = gaze.gaze_angles(
        (irises * flip)[::-1], (seen(LIDS, pose) * flip)[::-1, ::-1], JOINTS[::-1] * [-1, 1, 1],
        LIDS[::-1, ::-1] * [-1, 1, 1], turn,
    )  # fmt: skip
    assert np.allclose(other, steps.mirror_gaze(found))


def test_irises_out_of_reach_and_eyes_upside_down():
    corners = LIDS[..., :2] * [1000, -1000]
    turn = np.diag([1.0, -1, -1])
    far = gaze.gaze_angles(JOINTS[:, :2] * [1000, -1000] + [40, 0], corners, JOINTS, LIDS, turn)
    assert np.allclose(np.abs(far), [0, np.arcsin(gaze.LARGEST_SINE)] * 2, atol=0.02)
    with pytest.raises(ValueError, match='corners: expected'):
        gaze.gaze_angles(np.zeros([2, 2]), -corners, JOINTS, LIDS, turn)
