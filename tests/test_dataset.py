# SPDX-License-Identifier: Apache-2.0
"""Training data in the published layout and packed: the same items, and faults told before training."""

import json
import pathlib
import shutil
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from simple_head import simple_head

from dataset_preprocessing import pack, packing
from geometry import cameras
from geometry.meshes import MeshFileError
from geometry.mirror import LANDMARK_MIRROR, mirror_label, mirror_mesh, vertex_mirror
from training import dataset as dataset_module
from training.dataset import (
    DatasetError,
    FolderSource,
    HeadDataset,
    PackedSource,
    has_expressions,
    landmarks_path,
    open_source,
)

COUNT, SIDE = 5, 16


def write_obj(path, vertices, faces):
    lines = ['# a head', *('v {:.6f} {:.6f} {:.6f}'.format(*v) for v in vertices)]
    path.write_text('\n'.join([*lines, *('f {} {} {}'.format(*(f + 1)) for f in faces)]) + '\n')


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A folder with images512x512, meshes512x512 and lms512x512 of five items."""
    root = tmp_path_factory.mktemp('ffhq')
    rng = np.random.RandomState(0)
    folders = {kind: root / f'{kind}512x512' / '00000' for kind in ('images', 'meshes', 'lms')}
    for folder in folders.values():
        folder.mkdir(parents=True)
    labels, expressions = [], []
    for i in range(COUNT):
        head = simple_head(jaw_open=i / COUNT)
        stem = f'img{i:08d}'
        Image.fromarray(rng.randint(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(folders['images'] / f'{stem}.png')
        write_obj(folders['meshes'] / f'{stem}.obj', head.vertices, head.faces)
        np.savetxt(folders['lms'] / f'{stem}.txt', head.landmarks, fmt='%.8f')
        pose = cameras.look_at_pose(1.2 + 0.2 * i, 1.5)
        labels.append([f'00000/{stem}.png', cameras.make_label(pose, cameras.intrinsics())[0].tolist()])
        expressions.append([f'00000/{stem}.png', rng.randn(50).tolist()])
    (root / 'images512x512' / 'dataset.json').write_text(json.dumps({'labels': labels[::-1]}))
    (root / 'images512x512' / 'dataset_exp.json').write_text(json.dumps({'labels': expressions}))
    return root


@pytest.fixture(scope='module')
def packed(published, tmp_path_factory):
    out = tmp_path_factory.mktemp('packed') / 'ffhq'
    run_pack(published, out)
    return out


def run_pack(root, out, *more, code=0):
    arguments = [f'--data={root}/images512x512', f'--rdata={root}/meshes512x512', f'--out={out}', '--workers=1', *more]
    result = CliRunner().invoke(pack.main, arguments)
    assert result.exit_code == code, result.output
    return result.output


def folder_source(root, **kwargs):
    return FolderSource(root / 'images512x512', root / 'meshes512x512', **kwargs)


def test_folder_items(published):
    dataset = HeadDataset(folder_source(published))
    assert len(dataset) == COUNT and dataset.resolution == SIDE and dataset.label_length == 25
    head = simple_head(jaw_open=3 / COUNT)
    item = dataset[3]
    np.testing.assert_allclose(item.mesh, np.concatenate([head.vertices, head.landmarks]), atol=1e-6)
    assert item.image.shape == (3, SIDE, SIDE) and item.image.dtype == np.uint8
    expected = cameras.make_label(cameras.look_at_pose(1.8, 1.5), cameras.intrinsics())[0].numpy()
    np.testing.assert_allclose(item.label, expected, atol=1e-6)  # By name: dataset.json is in another order.


def test_expressions_are_appended(published):
    source = folder_source(published, with_expressions=True)
    assert source.labels.shape == (COUNT, 75)
    assert has_expressions(published / 'images512x512')


def test_packed_items_are_the_same(published, packed):
    folder, fast = HeadDataset(folder_source(published)), HeadDataset(PackedSource(packed))
    assert len(fast) == COUNT
    for a, b in zip((folder[i] for i in range(COUNT)), (fast[i] for i in range(COUNT))):
        for name in a._fields:
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert isinstance(open_source(packed, None), PackedSource)
    assert sorted(p.name for p in packed.iterdir()) == [
        'images.zip', 'labels.npy', 'landmarks.npy', 'manifest.json', 'vertices.npy',
    ]


def test_manifest_tells_counts_shapes_and_hashes(packed):
    manifest = json.loads((packed / 'manifest.json').read_text())
    assert manifest['count'] == COUNT and manifest['resolution'] == SIDE
    assert manifest['shapes']['labels'] == [COUNT, 25]
    for name, digest in manifest['sha256'].items():
        assert packing._hash(packed / name) == digest
    with zipfile.ZipFile(packed / 'images.zip') as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def test_zip_archives_serve_as_folders(published, packed, tmp_path):
    for kind in ('images', 'meshes', 'lms'):
        shutil.make_archive(tmp_path / f'{kind}512x512', 'zip', published / f'{kind}512x512')
    source = FolderSource(tmp_path / 'images512x512.zip', tmp_path / 'meshes512x512.zip')
    assert np.array_equal(HeadDataset(source)[2].mesh, HeadDataset(PackedSource(packed))[2].mesh)


@pytest.mark.parametrize('workers', ['--workers=1', '--workers=2'])
def test_packing_continues_after_a_cut(published, tmp_path, monkeypatch, workers):
    """An item that cannot be read ends the first run; the second does not read the noted ones again."""
    root = tmp_path / 'data'
    shutil.copytree(published, root)
    bad = root / 'meshes512x512' / '00000' / 'img00000003.obj'
    text = bad.read_text()
    bad.write_text(text.replace('v ', 'v nan ', 1))
    monkeypatch.setattr(packing, 'SAVE_EVERY', 1)
    assert 'img00000003.obj' in run_pack(root, tmp_path / 'out', workers, code=1)
    assert not (tmp_path / 'out').exists()
    assert json.loads((tmp_path / 'out.partial' / 'progress.json').read_text())['done'] == 3
    bad.write_text(text)
    (root / 'meshes512x512' / '00000' / 'img00000001.obj').write_text('no mesh any more')
    run_pack(root, tmp_path / 'out', workers)
    assert np.array_equal(PackedSource(tmp_path / 'out').mesh(1), folder_source(published).mesh(1))
    assert 'expected a new folder' in run_pack(root, tmp_path / 'out', code=2)


def test_mirror_flips_picture_camera_and_mesh_together(published):
    template = simple_head()
    dataset = HeadDataset(folder_source(published), partner=vertex_mirror(template.vertices))
    assert len(dataset) == 2 * COUNT
    item, mirrored = dataset[2], dataset[2 + COUNT]
    assert np.array_equal(mirrored.image, item.image[:, :, ::-1])
    np.testing.assert_allclose(mirrored.mesh, item.mesh, atol=2e-6)  # The head is symmetric: the same mesh again.
    # A vertex is seen in the mirrored picture where its partner was, mirrored.
    partner = np.concatenate([dataset.partner, dataset.num_vertices + LANDMARK_MIRROR])
    np.testing.assert_allclose(project(mirrored), project(item)[partner] * [-1, 1], atol=1e-5)
    with pytest.raises(DatasetError, match='expression labels'):
        HeadDataset(folder_source(published, with_expressions=True), partner=dataset.partner)


def project(item):
    """World points of a mesh in the camera of its label, in fractions of the picture from its centre."""
    pose, k = item.label[:16].reshape(4, 4).astype(np.float64), item.label[16:25].reshape(3, 3)
    world = 2.5 * item.mesh + [0, 0.025, 0]
    x, y, z = ((world - pose[:3, 3]) @ pose[:3, :3]).T
    return np.stack([k[0, 0] * x / z, k[1, 1] * y / z], axis=1)


def test_mirror_is_an_involution_and_refused_without_symmetry():
    head = simple_head(jaw_open=0.5)
    partner = vertex_mirror(simple_head().vertices)
    mesh = np.concatenate([head.vertices, head.landmarks])
    assert np.array_equal(mirror_mesh(mirror_mesh(mesh, partner), partner), mesh)
    label = cameras.make_label(cameras.look_at_pose(1.1, 1.4), cameras.intrinsics())[0].numpy()
    assert np.array_equal(mirror_label(mirror_label(label)), label)
    lopsided = head.vertices.copy()
    lopsided[lopsided[:, 0] > 0.02, 1] += 0.02
    with pytest.raises(MeshFileError, match='left-right symmetric'):
        vertex_mirror(lopsided)


def edit_labels(root, change):
    path = root / 'images512x512' / 'dataset.json'
    content = json.loads(path.read_text())
    change(content['labels'])
    path.write_text(json.dumps(content))


FAULTS = {
    'short label': (lambda r: edit_labels(r, lambda x: x[1][1].__delitem__(slice(16, 25))), '25 numbers, found 16'),
    'label missing': (lambda r: edit_labels(r, lambda x: x.pop(0)), 'expected a label of 00000/img00000004.png'),
    'mesh missing': (lambda r: (r / 'meshes512x512/00000/img00000002.obj').unlink(), '02.obj: expected a mesh'),
    'landmarks missing': (lambda r: (r / 'lms512x512/00000/img00000002.txt').unlink(), '02.txt: expected a land'),
    'no labels': (lambda r: (r / 'images512x512/dataset.json').unlink(), 'dataset.json: expected camera labels'),
    'no JSON': (lambda r: (r / 'images512x512/dataset.json').write_text('{'), 'dataset.json: expected {'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_of_a_folder_are_told_when_it_is_opened(published, tmp_path, fault):
    shutil.copytree(published, tmp_path / 'data')
    break_it, message = FAULTS[fault]
    break_it(tmp_path / 'data')
    with pytest.raises(DatasetError) as caught:
        folder_source(tmp_path / 'data')
    assert message in str(caught.value) and '\n' not in str(caught.value)


def test_faults_of_single_items_name_the_file(published, tmp_path):
    shutil.copytree(published, tmp_path / 'data')
    images, meshes = tmp_path / 'data/images512x512/00000', tmp_path / 'data/meshes512x512/00000'
    (images / 'img00000001.png').write_bytes(b'no picture')
    Image.new('RGB', (8, 8)).save(images / 'img00000002.png')
    Image.new('RGB', (16, 8)).save(images / 'img00000003.png')
    (meshes / 'img00000004.obj').write_text('v 0 0 0\nf 1 1 1\n')
    dataset = HeadDataset(folder_source(tmp_path / 'data'))
    for index, message in enumerate(('expected a picture', 'expected 16 pixels, found 8', 'square', '1'), start=1):
        with pytest.raises(DatasetError, match=message) as caught:
            dataset[index]
        assert f'img0000000{index}' in str(caught.value)


@pytest.mark.parametrize('name, content, message', [
    ('manifest.json', b'{', 'expected JSON'),
    ('manifest.json', b'{"format": "other"}', 'expected the manifest'),
    ('vertices.npy', b'garbage', 'expected an array'),
])
def test_damaged_packed_folders(packed, tmp_path, name, content, message):
    shutil.copytree(packed, tmp_path / 'copy')
    (tmp_path / 'copy' / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        PackedSource(tmp_path / 'copy')


def test_landmarks_lie_beside_meshes(tmp_path):
    assert landmarks_path(tmp_path / 'meshes' / 'meshes512x512') == tmp_path / 'meshes' / 'lms512x512'
    with pytest.raises(DatasetError, match="expected a name with 'meshes'"):
        landmarks_path(tmp_path / 'obj')


def test_large_data_sets_are_not_cut(monkeypatch, tmp_path):
    """The published reader leaves out what comes after picture 139 900."""
    count = 139_902
    stems = [f'{i:08d}' for i in range(count)]
    listings = {'images': [f'{s}.png' for s in stems], 'meshes': [f'{s}.obj' for s in stems],
                'lms': [f'{s}.txt' for s in stems]}

    class Listing:
        def __init__(self, path):
            self.path, self.kind = path, pathlib.Path(path).name

        def names(self):
            return listings[self.kind]

        def read(self, _name):
            return json.dumps({'labels': [[name, [0] * 25] for name in listings['images']]})

    monkeypatch.setattr(dataset_module, 'FileSet', Listing)
    source = FolderSource(tmp_path / 'images', tmp_path / 'meshes')
    assert len(source.names) == count and source.labels.shape == (count, 25)
