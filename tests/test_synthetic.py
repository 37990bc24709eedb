# SPDX-License-Identifier: Apache-2.0
"""The data set of drawn people: what an item depends on, agreement of picture and mesh, variety, interrupted runs."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from parity import ROOT
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation

from dataset_preprocessing import check_data
from dataset_preprocessing.synthetic import make_clip, make_dataset, store, wear
from dataset_preprocessing.synthetic.anatomy import CENTRE, load_anatomy, shell_at
from dataset_preprocessing.synthetic.expressions import random_expression
from dataset_preprocessing.synthetic.paint import SUPERSAMPLING, picture
from dataset_preprocessing.synthetic.people import (
    LOOKS,
    RADIUS,
    camera_label,
    random_label,
    random_looks,
    random_person,
)
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT, read_landmarks, read_obj
from training.dataset import HeadDataset, open_source
from training.mesh_render import MeshRenderer, project

COUNT, SIZE = 6, 64
SCRIPT = str(ROOT / 'dataset_preprocessing/synthetic/make_dataset.py')


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Processes are forked here, which threads of the parent would not survive."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def anatomy():
    return load_anatomy()


@pytest.fixture(scope='module')
def crowd(anatomy):
    """Pictures of 40 people."""
    people = [random_person(anatomy, 5, index) for index in range(40)]
    return people, [picture(anatomy, person, SIZE) for person in people]


def run(main, *arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def make(out, *more):
    result = run(make_dataset.main, f'--out={out}', f'--count={COUNT}', f'--resolution={SIZE}', *more)
    assert result.exit_code == 0, result.output
    return out


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp('made') / 'set', '--workers=1')


@pytest.fixture(scope='module')
def packed(tmp_path_factory):
    return make(tmp_path_factory.mktemp('packed') / 'set', '--workers=2', '--packed')


def folders(out):
    return out / f'images{SIZE}x{SIZE}', out / f'meshes{SIZE}x{SIZE}'


# ---- What an item depends on


def test_processes_change_nothing(made, tmp_path):
    assert contents(made) == contents(make(tmp_path / 'two', '--workers=2'))


def test_an_item_depends_on_seed_and_index_alone(anatomy, made, tmp_path):
    run(make_dataset.main, f'--out={tmp_path}/more', f'--count={COUNT - 2}', f'--resolution={SIZE}', '--workers=1')
    for name in (f'images{SIZE}x{SIZE}/00000/img00000003.png', f'meshes{SIZE}x{SIZE}/00000/img00000003.obj'):
        assert (made / name).read_bytes() == (tmp_path / 'more' / name).read_bytes()
    other = picture(anatomy, random_person(anatomy, 1, 3), SIZE).image
    assert (other != picture(anatomy, random_person(anatomy, 0, 3), SIZE).image).any()


def test_looks_do_not_tell_the_expression(anatomy):
    """Two people who draw other looks make the same face; their expressions come from a stream of their own."""
    first = random_looks(np.random.default_rng([0, 3, LOOKS]), anatomy)
    again = random_person(anatomy, 0, 3)
    assert np.array_equal(first['identity'].astype(np.float32), again.identity)
    people = [random_person(anatomy, 2, index) for index in range(300)]
    smile = [person.expression.get('mouthSmileLeft', 0) for person in people]
    tone = [person.tone for person in people]
    assert abs(np.corrcoef(smile, tone)[0, 1]) < 0.15


# ---- Files


def test_pictures_survive_their_files():
    image = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(store.png(image)))), image)


@pytest.mark.parametrize('is_packed', [False, True])
def test_data_passes_the_checks(made, packed, is_packed):
    images, meshes = folders(made)
    arguments = [f'--data={packed}'] if is_packed else [f'--data={images}', f'--rdata={meshes}']
    result = run(check_data.main, *arguments, f'--topology_path={made}/head_template.obj', '--workers=1')
    assert result.output.endswith(f'{COUNT} items, no fault\n'), result.output


def test_packed_and_single_files_hold_the_same(made, packed):
    one, other = HeadDataset(open_source(*folders(made))), HeadDataset(open_source(packed, None))
    for index in range(COUNT):
        for a, b in zip(one[index], other[index], strict=True):
            assert np.array_equal(a, b)


def test_files_hold_the_drawn_mesh(anatomy, made):
    """Not one that is nearly so: what was drawn had been rounded as files are."""
    person = random_person(anatomy, 0, 2)
    result = picture(anatomy, person, SIZE)
    mesh = read_obj(folders(made)[1] / '00000/img00000002.obj')
    assert np.array_equal(mesh.vertices, result.vertices)
    assert np.array_equal(mesh.faces, anatomy.faces) and np.array_equal(mesh.uv_faces, anatomy.uv_faces)
    lms = read_landmarks(made / f'lms{SIZE}x{SIZE}/00000/img00000002.txt')
    assert np.array_equal(lms, result.landmarks)


def test_coefficients_give_the_meshes(anatomy, made):
    with np.load(made / 'coefficients.npz') as table:
        assert list(table['expression_names']) == anatomy.expression_names
        assert {'style', 'tone', 'skin_x', 'glasses'} <= set(table['attribute_names'])
        assert len(table['attribute_style']) == COUNT
        for index, name in enumerate(table['names']):
            vertices, landmarks = anatomy.head(table['identity'][index], table['expression'][index])
            mesh = read_obj(folders(made)[1] / name.replace('png', 'obj'))
            assert np.abs(mesh.vertices - vertices).max() < 2e-6


# ---- Picture, mesh and camera


def test_the_mesh_lies_where_the_picture_shows_it(anatomy, crowd):
    """The head's pixels are those of the mesh under the label, less what hair and clothes cover."""
    uvs = torch.from_numpy(anatomy.uvs[anatomy.uv_faces]).float()
    renderer = MeshRenderer(
        torch.from_numpy(anatomy.faces), torch.cat([uvs, torch.ones_like(uvs[..., :1])], dim=-1),
        resolution=SIZE * SUPERSAMPLING,
    )  # fmt: skip
    shares = []
    for person, result in list(zip(*crowd, strict=True))[:12]:
        view = renderer.look(torch.from_numpy(result.vertices)[None], torch.from_numpy(person.label)[None])
        mesh = (view.face[0] >= 0).numpy()
        assert not (result.head & ~mesh).any()
        assert not (result.head & result.hair).any()
        shares.append(result.head.sum() / mesh.sum())
    assert np.mean(shares) > 0.6 and max(shares) > 0.85


def test_landmarks_lie_on_the_face_in_the_picture(anatomy):
    """Lips are redder than the skin below them, by the label's own projection."""
    redder = 0
    for index in range(30):
        person = random_person(anatomy, 8, index, camera_label(0.0, 0.0, 0.0))
        person.beard, person.expression, person.lip_colour = 'none', {}, person.skin * (1.0, 0.45, 0.5)
        result = picture(anatomy, person, 128)
        lip, chin = (_pixel(result.landmarks[[i]], person.label, 128)[0] for i in (57, 8))
        skin = (lip + chin) // 2
        ratio = [np.divide(*result.image[row, column, :2].astype(float)) for column, row in (lip - (0, 2), skin)]
        redder += ratio[0] > ratio[1]
    assert redder >= 27


def _pixel(points, label, size):
    pose, k = label[:16].reshape(4, 4), label[16:].reshape(3, 3)
    seen = (points * WORLD_SCALE + np.array(WORLD_SHIFT) - pose[:3, 3]) @ pose[:3, :3] @ k.T
    return (seen[:, :2] / seen[:, 2:] * size).astype(int)


def test_hair_sits_on_the_head_and_clothes_below_it(anatomy):
    for index in range(4):
        person = random_person(anatomy, 6, index, camera_label(0.3 * (index - 1.5), 0.0, 0.0))
        person = dataclasses.replace(person, style='crop', beard='none', hat='none', glasses='none', top='turtleneck')
        result = picture(anatomy, person, SIZE)
        (hair, _), (head, _) = (np.argwhere(mask).mean(axis=0) for mask in (result.hair, result.head))
        assert hair < head - 0.15 * SIZE * SUPERSAMPLING
        green = dataclasses.replace(person, cloth=np.float32([0.0, 0.8, 0.0]))
        is_cloth = (picture(anatomy, green, SIZE).image != result.image).any(axis=2)
        assert is_cloth.any() and np.argwhere(is_cloth)[:, 0].min() > 0.6 * SIZE


def test_cameras_are_spread_as_those_of_ffhq():
    labels = np.array([random_label(np.random.default_rng(index)) for index in range(2000)])
    position = labels[:, :16].reshape(-1, 4, 4)[:, :3, 3]
    assert np.abs(np.linalg.norm(position, axis=1) - RADIUS).max() < 1e-4
    yaw = np.arctan2(position[:, 0], position[:, 2])
    pitch = np.arcsin(position[:, 1] / RADIUS)
    assert 0.25 < yaw.std() < 0.42 and 0.7 < abs(yaw).max() < 1.0 and abs(yaw.mean()) < 0.05
    assert 0.1 < pitch.std() < 0.2


def test_expressions_are_weights_and_move_the_face(anatomy):
    rng = np.random.default_rng(0)
    drawn = [random_expression(rng, anatomy.expression_names) for _ in range(3000)]
    rows = np.array([anatomy.coefficients(weights) for weights in drawn])
    assert rows.min() >= 0 and rows.max() <= 1
    assert (rows > 0).any(axis=0).all(), 'a shape that no face ever makes'
    names = anatomy.expression_names
    assert (rows[:, names.index('eyeBlinkLeft')] > 0.9).mean() > 0.02
    assert (rows[:, names.index('jawOpen')] > 0.7).mean() > 0.02
    neutral, shut = anatomy.head(np.zeros(100), {})[1], anatomy.head(np.zeros(100), {'jawOpen': 0.8})[1]
    assert neutral[66, 1] - shut[66, 1] > 0.01


# ---- Teeth

# Shapes that leave lips closed, or move them aside: no tooth shows, or hardly one.
CLOSED = [
    {}, {'mouthLeft': 1}, {'mouthRight': 1}, {'jawLeft': 1}, {'jawRight': 1}, {'mouthLeft': 1, 'jawLeft': 1},
    {'mouthRollLower': 1, 'mouthRollUpper': 1}, {'mouthPucker': 1}, {'cheekPuff': 1},
]  # fmt: skip
VIEW_SIZE, AROUND = 256, 3  # Pixels; how far beside the landmarks' polygon the edges of open lips run.


def _teeth_seen(anatomy, identity, expression, yaw):
    """Return masks [R, R]: where teeth are seen; where they lie before skin; the mouth's opening, a little dilated."""
    label = torch.from_numpy(camera_label(yaw, 0.0, 0.0))[None]
    vertices, landmarks = (torch.from_numpy(x)[None] for x in anatomy.head(identity, expression))
    is_tooth = anatomy.teeth[anatomy.faces].all(axis=1)
    is_inside = is_tooth | anatomy.tongue[anatomy.faces].all(axis=1)
    seen = []
    for faces in (anatomy.faces, anatomy.faces[~is_inside]):
        renderer = MeshRenderer(torch.from_numpy(faces), torch.zeros(len(faces), 3, 3), resolution=VIEW_SIZE)
        seen.append(renderer.look(vertices, label).face[0].numpy())
    teeth = (seen[0] >= 0) & is_tooth[seen[0]]
    skin = (seen[1] >= 0) & anatomy.skin[anatomy.faces[~is_inside]].all(axis=1)[seen[1]]
    inner = project(landmarks * WORLD_SCALE + torch.tensor(WORLD_SHIFT), label)[0, 60:, :2].numpy()
    opening = Image.new('1', (VIEW_SIZE, VIEW_SIZE))
    ImageDraw.Draw(opening).polygon([tuple(point) for point in (inner + 1) * VIEW_SIZE / 2 - 0.5], 1, 1)
    return teeth, teeth & skin, binary_dilation(np.array(opening), np.ones((3, 3)), AROUND)


def test_teeth_are_seen_through_the_mouth_alone(anatomy):
    outside = []
    for index in range(40):
        person = random_person(anatomy, 31, index)
        for yaw in (0.0, 0.6 if index % 2 else -0.6):
            teeth, pierced, opening = _teeth_seen(anatomy, person.identity, person.expression, yaw)
            assert not pierced.any(), (index, yaw)
            outside.append((teeth & ~opening).sum())
    assert np.mean(outside) < 12 and max(outside) < 80, sorted(outside)[-5:]


@pytest.mark.parametrize('expression', CLOSED, ids=lambda weights: '+'.join(weights) or 'neutral')
def test_closed_lips_show_no_teeth_at_their_corners(anatomy, expression):
    seen = []
    for index in range(12):
        identity = random_person(anatomy, 32, index).identity if index else np.zeros(100)
        for yaw in (0.0, 0.5, -0.5):
            teeth, pierced, _ = _teeth_seen(anatomy, identity, expression, yaw)
            assert not pierced.any()
            seen.append(teeth.sum())
    assert np.median(seen) < 3 and np.mean(seen) < 8, seen


# ---- Glasses


@pytest.mark.parametrize('kind', ['round', 'rectangular', 'thick', 'sunglasses'])
def test_glasses_lie_along_the_head_and_keep_clear_of_the_face(anatomy, kind):
    for index in range(25):
        person = random_person(anatomy, 33, index)
        vertices, landmarks = anatomy.head(person.identity, {})
        face, shell = vertices[anatomy.front_face], anatomy.shell(vertices)
        ears = vertices[anatomy.ear_rests].astype(float)
        frames, _ = wear.glasses(kind, landmarks.astype(float), ears, face, shell, np.zeros(3))
        for temple, ear, side in zip((frames[1], frames[3]), ears, (-1, 1), strict=True):
            points = temple.vertices[2 * wear.TUBE_SIDES :]
            distance = np.linalg.norm(points - CENTRE, axis=1) - shell_at(shell, points - CENTRE)
            assert distance.min() > -0.004 and (points[:, 0] * side).min() > 0.04
            # Behind the first half they hug the head, and they end behind the ear.
            assert distance[len(points) // 2 :].max() < 0.010
            assert points[-1, 2] < ear[2] - 0.010 and points[-1, 1] < ear[1]
        for rim in (frames[0], frames[2]):
            near = np.linalg.norm(face[:, None, :2] - rim.vertices[None, :, :2], axis=2) < 0.002
            before = np.where(near, face[:, None, 2] - rim.vertices[None, :, 2], -1).max()
            assert before < 0.004, (index, before)


# ---- People of different kinds


def test_skin_hair_and_backdrops_vary(crowd):
    people, results = crowd
    skin = np.array([result.image.repeat(2, 0).repeat(2, 1)[result.head].mean(axis=0) for result in results])
    hair = np.array([r.image.repeat(2, 0).repeat(2, 1)[r.hair].mean(axis=0) for r in results if r.hair.sum() > 500])
    corner = np.array([result.image[:6, :6].mean(axis=(0, 1)) for result in results])
    assert skin.std(axis=0).min() > 20 and hair.std(axis=0).min() > 25 and corner.std(axis=0).min() > 20
    assert (skin[:, 0] - skin[:, 2]).mean() > 20, 'skin as grey as a mannequin'
    assert len(hair) > 20
    assert len({person.style for person in people}) > 8


def test_jaws_are_narrower_than_the_mean_heads_and_differ(anatomy):
    marks = np.array([anatomy.head(random_person(anatomy, 34, index).identity, {})[1] for index in range(150)])
    width, mean = marks[:, 12, 0] - marks[:, 4, 0], anatomy.landmarks[12, 0] - anatomy.landmarks[4, 0]
    assert 0.90 < width.mean() / mean < 0.96 and width.std() > 0.006


def test_faces_differ_more_than_a_millimetre(anatomy):
    shapes = np.array([anatomy.head(random_person(anatomy, 0, index).identity, {})[1] for index in range(30)])
    assert 0.001 < shapes.std(axis=0).mean() < 0.006


# ---- Runs that end early, and bad input


def test_a_killed_run_goes_on_and_gives_the_same(made, tmp_path):
    out, partial = tmp_path / 'set', tmp_path / 'set.partial'
    command = [sys.executable, SCRIPT, f'--out={out}', f'--count={COUNT}', f'--resolution={SIZE}', '--workers=1']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(partial.rglob('img*.png')) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in partial.rglob('img*.png')}
    assert 0 < len(before) < COUNT and not out.exists()
    (partial / f'meshes{SIZE}x{SIZE}/00000/img00000005.obj{store.TEMPORARY}').write_text('half')
    make(out, '--workers=1')
    after = {path.name: path.stat().st_mtime_ns for path in out.rglob('img*.png')}
    assert before.items() <= after.items(), 'complete items were drawn again'
    assert contents(out) == contents(made) and not partial.exists()


def test_a_complete_set_is_left_alone(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob('*')}
    result = run(make_dataset.main, f'--out={made}', f'--count={COUNT}', f'--resolution={SIZE}')
    assert result.exit_code == 0 and 'is complete' in result.output
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob('*')}


@pytest.mark.parametrize('state', ['complete', 'partial', 'foreign', 'damaged', 'file'])
def test_another_folder_is_refused_in_one_line(made, tmp_path, state):
    out = tmp_path / 'set'
    if state == 'complete':
        shutil.copytree(made, out)
    elif state == 'file':
        out.write_text('something else')
    else:
        partial = tmp_path / 'set.partial'
        partial.mkdir()
        text = {'partial': (made / store.OPTIONS_FILE).read_text(), 'damaged': '{"count"'}.get(state)
        (partial / ('notes.txt' if text is None else store.OPTIONS_FILE)).write_text(text or 'mine')
    before = sorted(tmp_path.rglob('*'))
    result = run(make_dataset.main, f'--out={out}', f'--count={COUNT}', f'--resolution={SIZE}', '--seed=9')
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1, result.output
    expected = {'complete': 'expected seed 9', 'partial': 'expected seed 9', 'damaged': 'found no JSON'}
    assert expected.get(state, 'did not begin') in result.output
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('option', ['--count=0', '--count=many', '--resolution=8', '--seed=-1', '--out='])
def test_bad_options_are_told_in_one_line(tmp_path, option):
    result = run(make_dataset.main, f'--out={tmp_path}/set', option)
    assert result.exit_code == 2 and len(result.output.splitlines()) == 1 and option.split('=')[0] in result.output
    assert not list(tmp_path.iterdir())


def test_no_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    result = run(make_dataset.main, f'--out={tmp_path}/set', '--count=10')
    assert result.exit_code == 1 and len(result.output.splitlines()) == 1
    assert 'expected 8.0 MB of free space, found 0.0 MB' in result.output
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_complete_items_only(tmp_path, monkeypatch):
    write, written = store.pathlib.Path.write_bytes, []

    def full(path, data):
        written.append(path)
        if len(written) > 4:
            write(path, data[:10])
            raise OSError(28, 'No space left on device', str(path))
        return write(path, data)

    monkeypatch.setattr(store.pathlib.Path, 'write_bytes', full)
    arguments = [f'--out={tmp_path}/set', '--count=3', f'--resolution={SIZE}', '--workers=1']
    result = run(make_dataset.main, *arguments)
    assert result.exit_code == 1 and 'No space left on device' in result.output.splitlines()[-1]
    assert not (tmp_path / 'set').exists() and not list(tmp_path.rglob(f'*{store.TEMPORARY}'))
    assert len(list(tmp_path.rglob('img*.png'))) == 1
    monkeypatch.undo()
    assert run(make_dataset.main, *arguments).exit_code == 0


def test_a_disk_that_is_full_at_the_end_is_told_with_what_to_do(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    arguments = [f'--out={tmp_path}/set', '--count=1', f'--resolution={SIZE}', '--workers=1', '--packed']
    monkeypatch.setattr(store.np, 'savez_compressed', full)
    result = run(make_dataset.main, *arguments)
    line = result.output.splitlines()[-1]
    assert result.exit_code == 1 and 'set.partial: cannot be written: No space left on device; ' in line
    assert not (tmp_path / 'set').exists()
    monkeypatch.undo()
    assert run(make_dataset.main, *arguments).exit_code == 0


# ---- The clip


def test_a_clip_is_one_person_who_moves(anatomy, tmp_path):
    arguments = ['--frames=6', '--fps=5', f'--resolution={SIZE}', '--workers=1']
    assert run(make_clip.main, f'--out={tmp_path}/clip', *arguments).exit_code == 0
    result = run(check_data.main, f'--driving={tmp_path}/clip', '--workers=1')
    assert result.output.endswith('6 items, no fault\n'), result.output
    with np.load(tmp_path / 'clip' / 'coefficients.npz') as table:
        assert table['expression'].std(axis=0).max() > 0.02 and table['fps'] == 5
        vertices, _ = anatomy.head(table['identity'], table['expression'][4])
    assert np.abs(read_obj(tmp_path / 'clip' / '00004.obj').vertices - vertices).max() < 2e-6
    labels = json.loads((tmp_path / 'clip' / 'dataset.json').read_text())['labels']
    assert np.ptp([row[3] for _, row in labels]) > 0.01, 'the head does not turn'


def test_frames_depend_on_time_not_on_their_number(anatomy):
    slow, fast = (make_clip.clip_people(anatomy, 1, 4 * rate, 4 * rate) for rate in (1, 5))
    for frame in range(4):
        assert slow[frame].expression == fast[5 * frame].expression
        assert np.array_equal(slow[frame].label, fast[5 * frame].label)
