# SPDX-License-Identifier: Apache-2.0
"""Each fault of a data set, made in turn, is told with file and number, before training and by check_data.py."""

import json
import os
import pickle
import shutil
import time

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dataset_preprocessing import check_data, pack
from geometry import cameras
from training import data_checks
from training.data_checks import check_before_training, check_items, check_labels
from training.dataset import DatasetError, FolderSource, PackedSource

COUNT, SIDE, VERTICES = 5, 16, 12
# Folders of pictures and meshes, landmark files: the published layout and a driving folder.
PLACES = [('images/0', 'meshes/0', 'lms/0/f{}.txt'), ('driving', 'driving', 'driving/f{}_kpt2d.txt')]


def project(label, landmarks):
    """Pixels [68, 2] of mesh points seen by a label's camera, one at a time: the recipe, not the module's code."""
    pose, k = np.reshape(label[:16], (4, 4)), np.reshape(label[16:25], (3, 3))
    pixels = []
    for point in landmarks:
        world = np.append(2.5 * point + [0, 0.025, 0], 1)
        u, v, w = k @ (np.linalg.inv(pose) @ world)[:3]
        pixels.append([SIDE * u / w, SIDE * v / w])
    return np.array(pixels)


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """Five items with images, meshes, lms, expressions and 2-D points, and a folder 'driving' with the same."""
    root = tmp_path_factory.mktemp('data')
    rng = np.random.RandomState(0)
    for kind in ('images/0', 'meshes/0', 'lms/0', 'points/0', 'driving'):
        (root / kind).mkdir(parents=True)
    labels = {}
    for i in range(COUNT):
        picture = Image.fromarray(rng.randint(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
        vertices, landmarks = rng.uniform(-0.1, 0.1, (VERTICES, 3)), rng.uniform(-0.1, 0.1, (68, 3))
        obj = ''.join('v {:.6f} {:.6f} {:.6f}\n'.format(*v) for v in vertices) + 'f 1 2 3\n'
        for images, meshes, lms in PLACES:
            picture.save(root / images / f'f{i}.png')
            (root / meshes / f'f{i}.obj').write_text(obj)
            np.savetxt(root / lms.format(i), landmarks, fmt='%.8f')
        pose = cameras.look_at_pose(1.2 + 0.2 * i, 1.5)
        labels[f'f{i}.png'] = cameras.make_label(pose, cameras.intrinsics())[0].tolist()
        np.savetxt(root / f'points/0/f{i}.txt', project(labels[f'f{i}.png'], landmarks))
    entries = [[f'0/{name}', numbers] for name, numbers in labels.items()]
    (root / 'images/dataset.json').write_text(json.dumps({'labels': entries[::-1]}))
    (root / 'images/dataset_exp.json').write_text(json.dumps({'labels': [[e[0], [0.5] * 50] for e in entries]}))
    (root / 'driving/dataset.json').write_text(json.dumps({'labels': list(labels.items())}))
    return root


@pytest.fixture(scope='module')
def packed_once(published, tmp_path_factory):
    out = tmp_path_factory.mktemp('packed') / 'out'
    result = CliRunner().invoke(
        pack.main, [f'--data={published}/images', f'--rdata={published}/meshes', f'--out={out}', '--workers=1']
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def root(published, tmp_path):
    return shutil.copytree(published, tmp_path / 'data')


@pytest.fixture
def packed(packed_once, tmp_path):
    return shutil.copytree(packed_once, tmp_path / 'packed')


def run(*arguments):
    result = CliRunner().invoke(check_data.main, [*arguments, '--workers=1'])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output.splitlines()


def check_folder(root, *more, ending=''):
    return run(f'--data={root}/images{ending}', f'--rdata={root}/meshes{ending}', *more)


def open_folder(root):
    return FolderSource(root / 'images', root / 'meshes')


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content['labels'])
    path.write_text(json.dumps(content))


def edit_label(root, change, index=3, file='images/dataset.json'):
    """Change the numbers of picture f<index>."""
    edit_json(root / file, lambda entries: change(next(e for e in entries if f'f{index}.' in e[0])[1]))


def setting(position, value):
    return lambda numbers: numbers.__setitem__(position, value)


def scale(places, factor):
    def change(numbers):
        for i in places:
            numbers[i] *= factor

    return change


def write(name, content):
    return lambda root: (root / name).write_bytes(content)


def remove(name):
    return lambda root: (root / name).unlink()


def replace_text(name, old, new):
    def change(root):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return change


def damage(name, distance_from_end=20):
    """Flip a byte of a file near its end."""

    def change(root):
        content = bytearray((root / name).read_bytes())
        content[-distance_from_end] ^= 255
        (root / name).write_bytes(content)

    return change


def picture(name, size, **options):
    return lambda root: Image.new('RGB', size).save(root / name, **options)


def truncated_jpeg(root):
    """A JPEG under a PNG's name, as careless conversions leave it, cut off."""
    path = root / 'images/0/f3.png'
    Image.open(path).convert('RGB').save(path, format='JPEG')
    path.write_bytes(path.read_bytes()[:-40])


def label(change):
    return lambda root: edit_label(root, change)


DATASET = 'images/dataset.json: 0/f3.png: expected '
# What is changed; what the one line about it says, from the file on.
LABEL_FAULTS = {
    'short': (label(lambda x: x.__delitem__(slice(16, 25))), DATASET + 'a label of 25 numbers, found 16'),
    'text': (label(setting(2, 'x')), DATASET + 'a label of 25 numbers, found something else'),
    'NaN': (label(setting(24, float('nan'))), DATASET + 'finite numbers, found 1 that are not'),
    'too large': (label(setting(3, 1e300)), DATASET + 'finite numbers, found 1 that are not'),
    'skewed': (label(setting(0, 0.5)), DATASET + 'a rotation R with |R^T R - I| < 0.001, found '),
    'mirrored': (label(scale((0, 4, 8), -1)), DATASET + 'a rotation of determinant +1, found -1'),
    'last row': (label(setting(15, 0)), DATASET + "0 0 0 1 within 0.001 as the pose's last row, found 1 off"),
    'far': (label(scale((3, 7, 11), 1.1)), DATASET + 'a camera 2.6 to 2.8 from the origin, found 2.97'),
    'near': (label(scale((3, 7, 11), 0.95)), DATASET + 'a camera 2.6 to 2.8 from the origin, found 2.565'),
    'pixels': (label(setting(16, 2985.29)), 'found 2985.29 (pixels, not normalised?)'),
    'flat': (label(setting(16, 0.1)), DATASET + 'K[0], focal length over side, of 0.5 to 10.0, found 0.1'),
    'pixels in y': (label(setting(20, 512)), 'K[4], focal length over side, of 0.5 to 10.0, found 512 (pixels'),
    'K row': (label(setting(24, 512)), DATASET + '0 0 1 within 0.001 as the last row of K, found 511 off'),
    'twice': (
        lambda root: edit_json(root / 'images/dataset.json', lambda x: x.append(x[1])),
        DATASET + 'one label of a picture, found a second one',
    ),
    'no label': (
        lambda root: edit_json(root / 'images/dataset.json', lambda x: x.__delitem__(1)),
        'images/dataset.json: expected a label of 0/f3.png, found none',
    ),
    'no mesh': (remove('meshes/0/f2.obj'), 'meshes/0/f2.obj: expected a mesh of 0/f2.png, found no such file'),
    'no landmarks': (remove('lms/0/f2.txt'), 'lms/0/f2.txt: expected a landmark file of 0/f2.png, found no such file'),
}
ITEM_FAULTS = {
    'no picture': (write('images/0/f1.png', b'nothing'), 'f1.png: expected a picture, found 7 bytes of no known'),
    'damaged': (damage('images/0/f1.png'), 'f1.png: expected an undamaged picture, found '),
    'cut JPEG': (truncated_jpeg, 'f3.png: expected an undamaged picture, found '),
    'not square': (picture('images/0/f1.png', (16, 8)), 'f1.png: expected a square picture, found 16x8'),
    'other size': (picture('images/0/f1.png', (8, 8)), 'f1.png: expected 16 pixels, found 8'),
    'vertices': (write('meshes/0/f2.obj', b'v 0 0 0\nf 1 1 1\n'), 'f2.obj: expected 12 vertices, found 1'),
    'no number': (replace_text('meshes/0/f2.obj', 'v ', 'v nan '), 'f2.obj: expected vertices of three finite numbers'),
    'landmarks': (write('lms/0/f2.txt', b'0 0 0\n' * 67), 'f2.txt: expected 68 lines of 3 numbers, found 67'),
    'in pixels': (write('lms/0/f2.txt', b'0 9 0\n' * 68), 'f2.txt: expected 3-D landmarks in metres, all below 0.3, f'),
    'words': (replace_text('lms/0/f2.txt', ' ', ' x'), 'f2.txt, line 1: expected 3 numbers, found '),
}


def test_a_clean_set_has_no_fault(published, packed_once):
    assert check_folder(published) == (0, ['5 items, no fault'])
    assert check_folder(published, '--quick') == (0, ['5 items, no fault'])
    more = [f'--points2d={published}/points', '--gen_exp_cond']
    assert check_folder(published, *more) == (0, ['5 items, no fault'])
    assert run(f'--data={packed_once}', f'--points2d={published}/points') == (0, ['5 items, no fault'])
    assert run(f'--driving={published}/driving') == (0, ['5 items, no fault'])


@pytest.mark.parametrize('fault', LABEL_FAULTS)
def test_faults_of_labels_and_names(root, tmp_path, fault):
    change, message = LABEL_FAULTS[fault]
    change(root)
    code, lines = check_folder(root, '--quick')
    assert code == 1 and message in lines[0] and lines[1:] == ['1 fault in 5 items'], lines
    with pytest.raises(DatasetError) as caught:
        check_before_training(open_folder(root), VERTICES, SIDE, cache_dir=tmp_path)
    assert str(caught.value) == lines[0]


@pytest.mark.parametrize('fault', ITEM_FAULTS)
def test_faults_of_items(root, tmp_path, fault):
    change, message = ITEM_FAULTS[fault]
    change(root)
    code, lines = check_folder(root)
    assert code == 1 and message in lines[0] and lines[1:] == ['1 fault in 5 items'], lines
    assert lines[0].startswith(str(root))
    assert check_folder(root, '--quick')[0] == 0
    with pytest.raises(DatasetError) as caught:
        check_before_training(open_folder(root), VERTICES, SIDE, cache_dir=tmp_path)
    assert str(caught.value) == lines[0]


def test_all_faults_are_told_at_once(root, tmp_path):
    for name in ('damaged', 'cut JPEG', 'vertices', 'landmarks'):
        ITEM_FAULTS[name][0](root)
    LABEL_FAULTS['pixels'][0](root)
    (root / 'meshes/0/f4.obj').unlink()
    code, lines = check_folder(root)
    for file in ('dataset.json: 0/f3.png', 'images/0/f1.png', 'f2.obj', 'f2.txt', 'images/0/f3.png', 'f4.obj'):
        assert sum(file in line for line in lines) == 1, file
    assert code == 1 and lines[-1] == '6 faults in 5 items'
    few = check_folder(root, '--limit=2')[1]
    assert few == [*lines[:2], '... and 4 more (--limit=0 prints all)', lines[-1]]
    shutil.copy(root / 'meshes/0/f3.obj', root / 'meshes/0/f4.obj')
    with pytest.raises(DatasetError, match='2985.29'):
        check_before_training(open_folder(root), VERTICES, SIDE, cache_dir=tmp_path)
    edit_label(root, setting(16, 4.2647))
    with pytest.raises(DatasetError, match='f1.png.*and 3 more: run dataset_preprocessing/check_data.py') as caught:
        check_before_training(open_folder(root), VERTICES, SIDE, cache_dir=tmp_path)
    assert '\n' not in str(caught.value)


def test_expressions_topology_radius_and_unused_labels(root):
    edit_label(root, lambda x: x.pop(), file='images/dataset_exp.json')
    assert check_folder(root, '--quick')[0] == 0
    lines = check_folder(root, '--quick', '--gen-exp-cond')[1]
    assert 'dataset_exp.json: 0/f3.png: expected a label of 50 numbers, found 49' in lines[0]
    (root / 'three.obj').write_text('v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n')
    code, lines = check_folder(root, f'--topology_path={root}/three.obj')
    assert code == 1 and 'f0.obj: expected 3 vertices, found 12' in lines[0] and lines[-1] == '5 faults in 5 items'
    code, lines = check_folder(root, '--radius=1.7')
    assert code == 1 and 'expected a camera 1.6 to 1.8 from the origin, found 2.7' in lines[0] and len(lines) == 6
    (root / 'images/0/f0.png').unlink()
    code, lines = check_folder(root)
    assert code == 0 and '1 labels of pictures that do not exist' in lines[0] and lines[1] == '4 items, no fault'


def test_projected_landmarks_must_meet_the_points(root, packed):
    moved = np.loadtxt(root / 'points/0/f3.txt') + [0.2, 0.2]  # 0.28 of 16 pixels is 9 at 512.
    np.savetxt(root / 'points/0/f3.txt', moved)
    near = np.loadtxt(root / 'points/0/f1.txt') + [0.1, 0.2]  # 7.2 at 512.
    np.savetxt(root / 'points/0/f1.txt', near)
    (root / 'points/0/f2.txt').write_text('1 2\n' * 67)
    (root / 'points/0/f4.txt').unlink()
    for form in ([f'--data={root}/images', f'--rdata={root}/meshes'], [f'--data={packed}']):
        code, lines = run(*form, f'--points2d={root}/points')
        assert code == 1 and lines[-1] == '2 faults in 5 items', lines
        assert 'points/0/f2.txt: expected 68 lines of x y, found 67 of 2 numbers' in lines[0]
        assert '/0/f3.png: expected landmarks projected to a median of 0.25 pixels' in lines[1]
        assert lines[1].endswith('found 0.283')
        code, lines = run(*form, f'--points2d={root}/driving')
        assert code == 1 and 'expected 2-D points named as the pictures (0/f0.txt), found 0' in lines[0]


def test_zip_archives(root):
    damage('images/0/f1.png')(root)
    for kind in ('images', 'meshes', 'lms'):
        shutil.make_archive(root / kind, 'zip', root / kind)
    code, lines = check_folder(root, ending='.zip')
    assert code == 1 and 'images.zip/0/f1.png: expected an undamaged picture' in lines[0] and len(lines) == 2
    content = (root / 'meshes.zip').read_bytes()
    at = content.index(b'0/f2.obj') + 40
    (root / 'meshes.zip').write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    lines = check_folder(root, ending='.zip')[1]
    assert 'meshes.zip/0/f2.obj: expected an undamaged entry of the archive' in lines[1] and len(lines) == 3


def edit_array(name, *place, value):
    def change(packed):
        array = np.load(packed / name)
        array[place] = value
        np.save(packed / name, array)

    return change


PACKED_FAULTS = {
    'vertices.npy': (edit_array('vertices.npy', 2, 3, value=np.nan), 'f2.png: expected finite numbers, found 3 that'),
    'landmarks.npy': (edit_array('landmarks.npy', 2, 3, 1, value=300), 'f2.png: expected landmarks in metres, all be'),
    'labels.npy': (edit_array('labels.npy', 2, 16, value=2985), 'f2.png: expected K[0], focal length over side, of'),
    'images.zip': (damage('images.zip', 1500), 'expected an undamaged entry of the archive, Bad CRC-32'),
}


@pytest.mark.parametrize('name', PACKED_FAULTS)
def test_faults_of_a_packed_folder(packed, tmp_path, name):
    change, message = PACKED_FAULTS[name]
    change(packed)
    code, lines = run(f'--data={packed}')
    assert code == 1 and lines[-1] == '2 faults in 5 items', lines
    told = next(line for line in lines if message in line)
    assert f'{packed}/{name}' in told
    digest = next(line for line in lines if 'expected sha256 ' in line)
    assert digest.startswith(f'{packed}/{name}: ')
    assert run(f'--data={packed}', '--quick')[0] == (name == 'labels.npy')
    with pytest.raises(DatasetError) as caught:
        check_before_training(PackedSource(packed), VERTICES, SIDE, cache_dir=tmp_path / 'cache')
    assert str(caught.value) == told


def test_packed_names_and_sizes(packed):
    path = packed / 'manifest.json'
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, 'names': ['0/f0.png', '0/f1.png', '0/f1.png', '0/f3.png', 'x.png']}))
    lines = run(f'--data={packed}', '--quick')[1]
    assert 'manifest.json: 0/f1.png: expected it once' in lines[0]
    assert 'images.zip/x.png: expected a picture' in lines[1] and lines[2] == '2 faults in 5 items'
    path.write_text(json.dumps({**manifest, 'names': manifest['names'][:4]}))
    assert 'vertices.npy: expected float32 [4, 12, 3], found float32 [5, 12, 3]' in run(f'--data={packed}')[1][0]
    path.write_text(json.dumps({**manifest, 'resolution': 32}))
    assert 'expected 32 pixels, found 16' in run(f'--data={packed}')[1][0]
    path.write_text(json.dumps({key: manifest[key] for key in manifest if key != 'names'}))
    assert run(f'--data={packed}') == (1, [f'Error: {path}: expected the entries names, found none'])


def test_packing_refuses_pictures_of_unequal_size(root, tmp_path):
    picture('images/0/f3.png', (8, 8))(root)
    arguments = [f'--data={root}/images', f'--rdata={root}/meshes', f'--out={tmp_path}/out', '--workers=1']
    result = CliRunner().invoke(pack.main, arguments)
    assert result.exit_code == 1 and not (tmp_path / 'out').exists()
    assert '0/f3.png: expected 16 pixels as of the first picture, found 8' in result.output


DRIVING_FAULTS = {
    'mesh': (remove('driving/f2.obj'), 'driving/f2.obj: expected a mesh of f2.png, found no such file'),
    'landmarks': (remove('driving/f2_kpt2d.txt'), 'driving/f2_kpt2d.txt: expected landmarks of f2.png, found no such'),
    'label': (
        lambda root: edit_json(root / 'driving/dataset.json', lambda x: x.__delitem__(2)),
        'driving/dataset.json: expected a label of f2.png, found none',
    ),
    'mirror': (
        lambda root: edit_json(root / 'driving/dataset.json', lambda x: x.append(['f2_mirror.png', x[2][1]])),
        'driving/dataset.json: f2_mirror.png: expected no mirrored frame',
    ),
    'vertices': (write('driving/f2.obj', b'v 0 0 0\n'), 'driving/f2.obj: expected 12 vertices, found 1'),
    'distance': (
        lambda root: edit_label(root, scale((3, 7, 11), 2), file='driving/dataset.json'),
        'driving/dataset.json: f3.png: expected a camera 2.6 to 2.8 from the origin, found 5.4',
    ),
    'length': (
        lambda root: edit_label(root, lambda x: x.pop(), file='driving/dataset.json'),
        'driving/dataset.json: f3.png: expected a label of 25 numbers, found 24',
    ),
    'no labels': (remove('driving/dataset.json'), 'driving/dataset.json: expected camera labels'),
}


@pytest.mark.parametrize('fault', DRIVING_FAULTS)
def test_faults_of_a_driving_folder(root, fault):
    change, message = DRIVING_FAULTS[fault]
    change(root)
    code, lines = run(f'--driving={root}/driving')
    assert code == 1 and message in lines[0] and lines[1:] == ['1 fault in 5 items'], lines


def test_mirrored_frames_and_no_frames(root):
    shutil.copy(root / 'driving/f1.png', root / 'driving/f1_mirror.png')
    lines = run(f'--driving={root}/driving')[1]
    assert 'driving/f1_mirror.png: expected no mirrored frame' in lines[0] and lines[-1] == '4 faults in 6 items'
    (root / 'empty').mkdir()
    assert 'expected frames' in run(f'--driving={root}/empty')[1][0]


@pytest.mark.parametrize('form', ['folder', 'zip', 'packed'])
def test_items_that_passed_are_not_read_again(root, packed, tmp_path, monkeypatch, form):
    if form == 'zip':
        for kind in ('images', 'meshes', 'lms'):
            shutil.make_archive(root / kind, 'zip', root / kind)
        source, touched = FolderSource(root / 'images.zip', root / 'meshes.zip'), root / 'lms.zip'
    elif form == 'packed':
        source, touched = PackedSource(packed), packed / 'vertices.npy'
    else:
        source, touched = open_folder(root), root / 'lms/0/f4.txt'
    reads = []
    monkeypatch.setattr(data_checks, 'check_items', lambda *args, **kwargs: reads.append(1) or [])
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))

    def count_reads(num_vertices=VERTICES, resolution=SIDE, cache_dir=None):
        reads.clear()
        check_before_training(source, num_vertices, resolution, cache_dir=cache_dir)
        return len(reads)

    assert [count_reads(), count_reads()] == [1, 0]
    assert len(list((tmp_path / 'cache/next3d/checked').glob('*.json'))) == 1
    assert [count_reads(num_vertices=VERTICES + 1), count_reads(resolution=32), count_reads()] == [1, 1, 0]
    os.utime(touched, (1, 1))
    assert [count_reads(), count_reads()] == [1, 0]
    (tmp_path / 'file').write_text('')
    assert [count_reads(cache_dir=tmp_path / 'file/below'), count_reads(cache_dir=tmp_path / 'file/below')] == [1, 1]


def test_a_fault_is_not_remembered_as_passed(root, tmp_path):
    ITEM_FAULTS['vertices'][0](root)
    for _ in range(2):
        with pytest.raises(DatasetError, match='expected 12 vertices, found 1'):
            check_before_training(open_folder(root), VERTICES, SIDE, cache_dir=tmp_path)
    # Labels are checked even where the items were before.
    shutil.copy(root / 'meshes/0/f1.obj', root / 'meshes/0/f2.obj')
    check_before_training(open_folder(root), VERTICES, SIDE, cache_dir=tmp_path)
    with pytest.raises(DatasetError, match='expected a camera 1 to 2 from'):
        check_before_training(open_folder(root), VERTICES, SIDE, cache_dir=tmp_path, position=(1, 2))


def test_several_processes_tell_the_same(root, packed, monkeypatch):
    monkeypatch.setattr(data_checks, 'CHUNK', 2)
    for name in ('no picture', 'vertices'):
        ITEM_FAULTS[name][0](root)
    points = root / 'points'
    np.savetxt(points / '0/f3.txt', np.zeros((68, 2)))
    alone = check_items(open_folder(root), points=points)
    assert len(alone) == 3
    assert check_items(open_folder(root), workers=2, points=points) == alone
    sent = pickle.dumps(PackedSource(packed))  # What processes get of a packed folder: where it is, not its content.
    assert len(sent) < 1000 and len(check_items(pickle.loads(sent), points=points)) == 1


def test_labels_of_ffhq_take_no_time(published):
    source = open_folder(published)
    source.labels = np.tile(source.labels, (28_000, 1))
    source.names = [f'{i}.png' for i in range(len(source.labels))]
    source.labels[139_950, 16] = 2985  # Beyond where published code cuts the list.
    start = time.perf_counter()
    (fault,) = check_labels(source)
    assert time.perf_counter() - start < 5
    assert fault.where.endswith('dataset.json: 139950.png')


@pytest.mark.parametrize('arguments, message', [
    ([], 'expected either --data or --driving'),
    (['--data=DATA/images', '--driving=DATA/driving'], 'expected either --data or --driving'),
    (['--data=DATA/images'], '--rdata: expected the meshes of'),
    (['--data=PACKED', '--rdata=DATA/meshes'], '--rdata: expected none with a packed folder'),
    (['--data=PACKED', '--gen_exp_cond'], '--gen_exp_cond: expected none with a packed folder'),
    (['--driving=DATA/driving', '--points2d=DATA/points'], '--points2d: expected none with --driving'),
    (['--data=DATA/images', '--rdata=DATA/meshes', '--quick', '--points2d=DATA/points'], 'none with --quick'),
    (['--data=DATA/none', '--rdata=DATA/meshes'], 'none: No such file or directory'),
    (['--data=DATA/images', '--rdata=DATA/points'], "expected a name with 'meshes'"),
    (['--data=DATA/images/dataset.json', '--rdata=DATA/meshes'], 'dataset.json: expected a folder or a zip archive'),
    (['--data=DATA/meshes', '--rdata=DATA/meshes'], 'expected pictures, found none'),
    (['--driving=DATA/none'], 'none: No such file or directory'),
    (['--data=DATA/images', '--rdata=DATA/meshes', '--topology-path=DATA/none.obj'], 'none.obj: No such file'),
    (['--data=', '--rdata=DATA/meshes'], 'expected a path'),
])
def test_bad_arguments_are_one_line(published, packed_once, arguments, message):
    arguments = [a.replace('DATA', str(published)).replace('PACKED', str(packed_once)) for a in arguments]
    code, lines = run(*arguments)
    assert code != 0 and len(lines) == 1 and message in lines[0], lines
