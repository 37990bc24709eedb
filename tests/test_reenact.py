# SPDX-License-Identifier: Apache-2.0
"""reenact_avatar_next3d.py: frames by name, smooth cameras, retargeting, sound, memory, and one line for bad input."""

import json
import os
import re
import shutil
import subprocess

import imageio_ffmpeg
import numpy as np
import parity
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from test_generator import meshes
from video_data import (
    CODEC_ERROR,
    SIDE,
    decode,
    difference,
    driving_folder,
    label,
    leftovers,
    needs_proc,
    obj_text,
    peaks_kb,
    plain,
    run,
    tiny_network,
)

import cli
import reenact_avatar_next3d
from geometry import cameras, paths
from geometry.head_model import load_embedded_head
from training import driving
from training.files import DatasetError

pytestmark = pytest.mark.usefixtures('one_thread')
FRONTAL = label(focal=cameras.focal_from_fov(18.837))  # Of the published script.


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return tiny_network(tmp_path_factory.mktemp('network') / 'tiny.pkl')


@pytest.fixture
def content(tmp_path):
    """What `drive` holds, by frame."""
    return driving_folder(tmp_path / 'drive')


@pytest.fixture
def drive(content, tmp_path):
    """A driving folder of frames f1, f2, f10, with mirrored entries."""
    return tmp_path / 'drive'


def reenact(network, drive, out, *arguments):
    words = [f'--drive_root={drive}', f'--network={network.path}', f'--outdir={out}', '--seeds=4', '--device=cpu']
    return run(reenact_avatar_next3d.main, *words, *arguments)


def split(frame, columns):
    return [frame[:SIDE, x * SIDE : (x + 1) * SIDE] for x in range(columns)]


def test_frames_belong_together_by_name(network, drive, content, tmp_path):
    result = reenact(network, drive, tmp_path / 'out', '--smooth_camera=1', '--lms_cond=True', '--trunc=0.7')
    assert result.code == 0, result.output
    assert 'Wrote 3 frames' in result.output and 'frame/s' in result.lines[-1]
    frames, facts = decode(tmp_path / 'out/reenactment.mp4')
    assert frames.shape == (3, SIDE, 2 * SIDE, 3) and facts.fps == 30
    for frame, name in zip(frames, ('f1', 'f2', 'f10'), strict=True):  # All of them, in the order of their numbers.
        expected = content[name]
        shown, avatar = split(frame, 2)
        assert difference(shown, np.broadcast_to(expected.picture[0, 0], shown.shape)) < CODEC_ERROR
        picture = plain(network, 4, expected.label[None], expected.mesh, 0.7, FRONTAL)
        assert difference(avatar, picture) < CODEC_ERROR


def test_several_seeds_a_fixed_camera_and_a_limit(network, drive, content, tmp_path):
    (drive / 'dataset.json').unlink()
    words = ['--fixed_camera', '--seeds=4-6', '--grid=2x2', '--fname=new', '--num_frames=2', '--fps=29.97']
    result = reenact(network, drive, tmp_path / 'out', *words, '--fov-deg=30')
    assert result.code == 0, result.output
    frames, facts = decode(tmp_path / 'out/new.mp4')
    assert frames.shape == (2, 2 * SIDE, 2 * SIDE, 3) and facts.fps == pytest.approx(29.97)
    c = label(focal=cameras.focal_from_fov(30))
    for seed, (y, x) in zip((4, 5, 6), ((0, SIDE), (SIDE, 0), (SIDE, SIDE))):
        expected = plain(network, seed, c, content['f2'].mesh, conditioning=c)
        assert difference(frames[1, y : y + SIDE, x : x + SIDE], expected) < CODEC_ERROR


def test_one_frame_and_avatars_only(network, tmp_path):
    driving_folder(tmp_path / 'drive', names=['only'])
    assert reenact(network, tmp_path / 'drive', tmp_path / 'out', '--grid=1x1', '--smooth_mesh=5').code == 0
    assert decode(tmp_path / 'out/reenactment.mp4')[0].shape == (1, SIDE, SIDE, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Clips with faults


def test_a_gap_is_told_by_name(network, drive, tmp_path):
    (drive / 'f2.obj').unlink()
    (drive / 'f10.png').unlink()
    result = reenact(network, drive, tmp_path / 'out')
    assert result.code == 1 and len(result.lines) == 1
    assert 'missing: f2.obj, f10.png; --skip-missing leaves such frames out' in result.message
    assert not (tmp_path / 'out').exists()
    result = reenact(network, drive, tmp_path / 'out', '--skip-missing')
    assert result.code == 0 and 'Wrote 1 frame to' in result.output


@pytest.mark.parametrize('name, text, message', [
    ('f2.obj', 'v 1 2 x\n', 'f2.obj: expected vertices of three finite numbers'),
    ('f2.obj', 'v 0 0 0\n', 'f2.obj: expected 5258 vertices, found 1'),
    ('f2_kpt2d.txt', '1 2 3\n', 'f2_kpt2d.txt: expected 68 lines of 3 numbers'),
])
def test_broken_files(network, drive, tmp_path, name, text, message):
    (drive / name).write_text(text)
    result = reenact(network, drive, tmp_path / 'out')
    assert result.code == 1 and message in result.message and len(result.lines) == 1
    assert not (tmp_path / 'out').exists()
    assert driving.open_clip(drive, skip_missing=True).names == ['f1', 'f10']


def edit_labels(drive, change):
    table = json.loads((drive / 'dataset.json').read_text())
    change(table['labels'])
    (drive / 'dataset.json').write_text(json.dumps(table))


@pytest.mark.parametrize('change, message', [
    (lambda labels: labels.pop(3), 'missing: dataset.json: f2;'),
    (lambda labels: labels[3][1].pop(), 'dataset.json: f2: expected 25 finite numbers with a rotation'),
    (lambda labels: labels[3][1].__setitem__(0, float('nan')), 'f2: expected 25 finite numbers with a rotation'),
    (lambda labels: labels[3][1].__setitem__(slice(16), [0] * 16), 'f2: expected 25 finite numbers with a rotation'),
    (lambda labels: labels.insert(2, ['f5.png', labels[3][1]]), 'missing: f5.obj, f5_kpt2d.txt, f5.png;'),
])
def test_bad_labels(drive, change, message):
    edit_labels(drive, change)
    with pytest.raises(DatasetError, match=re.escape(message)):
        driving.open_clip(drive)
    assert set(driving.open_clip(drive, skip_missing=True).names) <= {'f1', 'f2', 'f10'}


def test_labels_beyond_the_ends_are_of_a_longer_clip(drive):
    edit_labels(drive, lambda labels: labels.append(['f11.png', labels[1][1]]))
    assert driving.open_clip(drive).names == ['f1', 'f2', 'f10']


@pytest.mark.parametrize('prepare, words, message', [
    (lambda drive: (drive / 'dataset.json').unlink(), [], 'dataset.json: expected camera labels of the pictures'),
    (None, ['--drive_root=/nowhere'], '/nowhere: No such file or directory'),
    (None, ['--smooth-camera=2'], 'expected an odd number of frames'),
    (None, ['--grid=1x1', '--seeds=1,2'], '--grid: expected a cell for each of 2 seeds and the driving frame, got 1'),
    (None, ['--fname=a/b.mp4'], '--fname: expected a name without folders'),
    (None, ['--video=/nowhere.mp4'], '/nowhere.mp4: No such file or directory'),
    (None, [f'--retarget={parity.ROOT}/data/head/head_template.obj'], 'expected coefficients of a head model'),
    (lambda drive: (drive / 'f2.png').write_bytes(b'no picture'), [], 'f2.png: expected a picture'),
])
def test_bad_input_is_one_line(network, drive, tmp_path, prepare, words, message):
    if prepare:
        prepare(drive)
    result = reenact(network, drive, tmp_path / 'out', *words)
    assert result.code != 0 and message in result.message
    assert [name for name in leftovers(tmp_path) if name.endswith('.mp4')] == []


def test_meshes_of_another_topology(network, tmp_path):
    arrays = dict(mesh=np.zeros([2, 80, 3], np.float32), labels=np.repeat(label().numpy(), 2, 0))
    np.savez(tmp_path / 'clip.npz', **arrays)
    result = reenact(network, tmp_path / 'clip.npz', tmp_path / 'out')
    assert result.message.startswith('Error: --drive_root: expected meshes of the 5258 vertices')


# ---------------------------------------------------------------------------------------------------------------------
# Packed clips, coefficients


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_packed_clips_equal_folders(drive, tmp_path, save):
    folder = driving.open_clip(drive)
    mesh = np.stack([folder.mesh(i) for i in range(3)])
    pictures = np.stack([folder.picture(i) for i in range(3)])
    names = np.array(['f1', 'f2_mirror', 'f2', 'f10'])
    rows = [0, 0, 1, 2]
    save(tmp_path / 'c.npz', mesh=mesh[rows], labels=folder.labels[rows], names=names, fps=25, pictures=pictures[rows])
    clip = driving.open_clip(tmp_path / 'c.npz')
    assert clip.names == folder.names and clip.fps == 25 and clip.num_vertices == folder.num_vertices
    assert np.array_equal(clip.labels, folder.labels)
    for i in range(3):
        assert np.array_equal(clip.mesh(i), mesh[i]) and np.array_equal(clip.picture(i), pictures[i])


def test_a_clip_without_pictures_shows_its_meshes(network, tmp_path):
    labels = torch.cat([label(0.3), label(-0.3)]).numpy()
    np.savez(tmp_path / 'clip.npz', mesh=meshes()[:2].numpy(), labels=labels, fps=24)
    result = reenact(network, tmp_path / 'clip.npz', tmp_path / 'out', '--smooth-camera=1')
    assert result.code == 0, result.output
    frames, facts = decode(tmp_path / 'out/reenactment.mp4')
    assert facts.fps == 24
    shown, avatar = split(frames[0], 2)
    assert difference(avatar, plain(network, 4, label(0.3), meshes()[0], conditioning=FRONTAL)) < CODEC_ERROR
    assert shown[0, 0].max() < 30 < shown[SIDE // 2, SIDE // 2].max()  # A head in front of black.


@pytest.mark.parametrize('arrays, message', [
    ({}, 'expected an array expression [T, E] or mesh [T, V + 68, 3], found labels'),
    ({'mesh': np.zeros([2, 70, 2])}, 'mesh: expected float32 [T, V + 68, 3], found [2, 70, 2]'),
    ({'mesh': np.full([2, 70, 3], np.nan)}, 'mesh of 00000: expected finite numbers'),
    ({'mesh': np.zeros([3, 70, 3])}, 'labels: expected finite numbers [3, 25], found [2, 25]'),
    ({'mesh': np.zeros([2, 70, 3]), 'fps': 0}, 'fps: expected a number of frames a second, found 0'),
    ({'expression': np.zeros([2, 51])}, 'expression: expected finite numbers [2, 52], found [2, 51]'),
    ({'mesh': np.array([{}])}, 'expected an .npz of arrays'),
])
def test_bad_packed_clips(tmp_path, arrays, message):
    np.savez(tmp_path / 'clip.npz', labels=np.repeat(label().numpy(), 2, 0), **arrays)
    with pytest.raises(DatasetError, match=re.escape(message)):
        driving.open_clip(tmp_path / 'clip.npz')
    (tmp_path / 'clip.npz').write_bytes(b'PK no archive')
    with pytest.raises(DatasetError, match='expected an .npz of arrays'):
        driving.open_clip(tmp_path / 'clip.npz')


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_packed_frames_that_are_not_finite_are_missing(network, tmp_path, save):
    mesh, labels = meshes()[[0, 1, 2, 0, 1]].numpy(), label().numpy().repeat(5, 0)
    mesh[1, 7, 2], labels[3, 16], mesh[0, 0, 0] = np.nan, np.inf, np.inf
    names = np.array(['a_mirror', 'b', 'c', 'd', 'e'])  # What is ignored may be broken.
    save(tmp_path / 'clip.npz', mesh=mesh, labels=labels, names=names)
    result = reenact(network, tmp_path / 'clip.npz', tmp_path / 'out')
    assert result.code == 1 and len(result.lines) == 1 and not (tmp_path / 'out').exists()
    assert 'clip.npz: mesh of b: expected finite numbers, found others (and 1 more); --skip-missing' in result.message
    result = reenact(network, tmp_path / 'clip.npz', tmp_path / 'out', '--skip-missing')
    assert result.code == 0 and 'Wrote 2 frames' in result.output, result.output
    clip = driving.open_clip(tmp_path / 'clip.npz', skip_missing=True)
    assert clip.names == ['c', 'e'] and len(clip.labels) == 2 and np.array_equal(clip.mesh(1), mesh[4])
    assert driving.open_clip(tmp_path / 'clip.npz', skip_missing=True, limit=1).names == ['c']
    # Cameras of a video's own: the label does not count.
    assert driving.open_clip(tmp_path / 'clip.npz', needs_labels=False, skip_missing=True).names == ['c', 'd', 'e']
    with pytest.raises(DatasetError, match='label of d: expected 25 finite numbers with a rotation'):
        save(tmp_path / 'clip.npz', mesh=mesh[2:], labels=labels[2:], names=names[2:])
        driving.open_clip(tmp_path / 'clip.npz')
    save(tmp_path / 'clip.npz', mesh=mesh[1:2], labels=labels[:1])
    with pytest.raises(DatasetError, match='expected frames with all they need, found 0 of 1'):
        driving.open_clip(tmp_path / 'clip.npz', skip_missing=True)


def test_coefficients_that_are_not_finite_are_missing(talking, tmp_path):
    own = np.random.default_rng(0).normal(size=[5144 + 68, 3]).astype(np.float32)
    with np.load(talking / 'coefficients.npz') as file:
        arrays = dict(file)
    expected = driving.Retargeted(driving.open_clip(talking, True), own).mesh(1)
    arrays['expression'][0, 3], arrays['identity'] = np.nan, np.stack([np.full(100, np.inf), arrays['identity']])
    folder = tmp_path / 'folder'
    shutil.copytree(talking, folder)
    np.savez(folder / 'coefficients.npz', **arrays)
    np.savez(tmp_path / 'clip.npz', **arrays, labels=label().numpy().repeat(2, 0))
    for path, where in ((folder, 'coefficients.npz: 00000'), (tmp_path / 'clip.npz', 'coefficients of 00000')):
        with pytest.raises(DatasetError, match=f'{where}: expected finite numbers, found others; --skip-missing'):
            driving.open_clip(path, True)
        clip = driving.open_clip(path, True, skip_missing=True)
        assert clip.names == ['00001'] and np.isfinite(clip.mesh(0)).all()
        assert np.allclose(driving.Retargeted(clip, own).mesh(0), expected, atol=1e-6)


@pytest.fixture(scope='module')
def talking(tmp_path_factory):
    """A driving folder as the synthetic data set writes it: meshes and coefficients of one person."""
    root, head = tmp_path_factory.mktemp('talking'), load_embedded_head()
    identity = torch.randn(1, head.num_identity, generator=torch.Generator().manual_seed(1))
    expression = torch.cat([head.expression(), head.expression(jawOpen=0.7, mouthSmileLeft=0.6)])
    names = ['00000.png', '00001.png']
    for name, row in zip(names, head(identity, expression).stacked().numpy()):
        (root / name.replace('.png', '.obj')).write_text(obj_text(row[:-68]))
        np.savetxt(root / name.replace('.png', '_kpt2d.txt'), row[-68:], fmt='%.7g')
        Image.new('RGB', (32, 32), 'white').save(root / name)
    (root / 'dataset.json').write_text(json.dumps({'labels': [[n, label()[0].double().tolist()] for n in names]}))
    arrays = dict(names=np.array(names), identity=identity[0].numpy(), expression=expression.numpy(), fps=np.array(25))
    np.savez_compressed(root / 'coefficients.npz', expression_names=np.array(head.expression_names), **arrays)
    return root


def test_retargeting_keeps_the_shape(talking, tmp_path):
    head = load_embedded_head()
    identity = torch.randn(1, head.num_identity, generator=torch.Generator().manual_seed(2))
    own = head(identity, head.expression()).stacked()[0].numpy()
    (tmp_path / 'own.obj').write_text(obj_text(own[:-68]) + 'f 1 2 3\n')
    clip = cli.open_clip(talking, str(tmp_path / 'own.obj'))
    expected = head(identity, head.expression(jawOpen=0.7, mouthSmileLeft=0.6)).stacked()[0].numpy()
    assert clip.fps == 25
    assert np.allclose(clip.mesh(0), own, atol=1e-6) and np.allclose(clip.mesh(1), expected, atol=1e-6)
    driven = driving.open_clip(talking)
    assert np.allclose(driven.mesh(1) - driven.mesh(0), expected - own, atol=2e-6)
    assert np.abs(driven.mesh(1) - expected).max() > 1e-3  # Another face.


def test_coefficients_without_meshes(talking, tmp_path):
    with np.load(talking / 'coefficients.npz') as file:
        np.savez(tmp_path / 'clip.npz', labels=np.repeat(label().numpy(), 2, 0), **file)
    clip, folder = driving.open_clip(tmp_path / 'clip.npz'), driving.open_clip(talking)
    assert clip.names == folder.names == ['00000', '00001'] and clip.fps == folder.fps == 25
    assert np.allclose(clip.mesh(1), folder.mesh(1), atol=1e-6)
    retargeted = driving.Retargeted(clip, folder.mesh(0))
    assert np.allclose(retargeted.mesh(1), folder.mesh(1), atol=1e-6)
    with pytest.raises(DatasetError, match="expected the head model's 5144 vertices, found 12"):
        driving.Retargeted(clip, np.zeros([80, 3]))


def test_retargeted_video(talking, tmp_path):
    network = tiny_network(tmp_path / 'embedded.pkl', is_embedded=True)
    mesh = parity.ROOT / 'data/head/head_template.obj'
    result = reenact(network, talking, tmp_path, f'--retarget={mesh}')
    assert result.code == 0, result.output
    frames, facts = decode(tmp_path / 'reenactment.mp4')
    assert facts.fps == 25 and len(frames) == 2
    own = load_embedded_head()
    expected = own(torch.zeros(1, 100), own.expression(jawOpen=0.7, mouthSmileLeft=0.6)).stacked()[0]
    assert difference(split(frames[1], 2)[1], plain(network, 4, label(), expected, conditioning=FRONTAL)) < CODEC_ERROR


# ---------------------------------------------------------------------------------------------------------------------
# Motion, sound, memory


def test_cameras_are_averaged_as_rotations():
    angles = np.radians([0, 40, 80, 120, 160])
    labels = np.concatenate([label(a - 1.4).numpy() for a in angles])
    smooth = paths.smooth_labels(labels, 3)
    poses = smooth[:, :16].reshape(-1, 4, 4).astype(np.float64)
    rotations = poses[:, :3, :3]
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-6)
    assert np.allclose(np.linalg.norm(poses[:, :3, 3], axis=1), 2.7, atol=1e-5)
    middle = Rotation.from_matrix(labels[1:4, :16].reshape(-1, 4, 4)[:, :3, :3]).mean().as_matrix()
    assert np.allclose(rotations[2], middle, atol=1e-6)
    assert np.allclose(paths.smooth_labels(labels, 1), labels, atol=1e-6)
    assert np.allclose(paths.smooth_labels(labels[:1], 99), labels[:1], atol=1e-6)
    assert np.array_equal(smooth[:, 16:], labels[:, 16:])


def test_meshes_are_averaged_over_a_window(drive):
    clip = driving.open_clip(drive)
    raw = np.stack([clip.mesh(i) for i in range(3)])
    assert np.array_equal(np.stack(list(driving.smooth_meshes(clip, 1))), raw)
    expected = np.stack([raw[:2].mean(axis=0), raw.mean(axis=0), raw[1:].mean(axis=0)])
    assert np.allclose(np.stack(list(driving.smooth_meshes(clip, 3))), expected, atol=1e-6)


@pytest.mark.parametrize('sound', [True, False])
def test_sound_and_rate_of_a_source_video(network, drive, tmp_path, sound):
    source = tmp_path / 'source.mkv'
    command = [imageio_ffmpeg.get_ffmpeg_exe(), '-loglevel', 'error']
    command += ['-f', 'lavfi', '-i', 'testsrc=r=24000/1001:s=64x64']
    command += ['-f', 'lavfi', '-i', 'sine=duration=0.05', '-c:a', 'flac'] if sound else []
    subprocess.run([*command, '-t', '0.5', str(source)], check=True)
    result = reenact(network, drive, tmp_path / 'out', f'--video={source}')
    assert result.code == 0, result.output
    frames, facts = decode(tmp_path / 'out/reenactment.mp4')
    assert len(frames) == 3 and facts.fps == pytest.approx(23.98, abs=0.01)
    assert ('Audio: aac' in facts.report) == sound
    (tmp_path / 'text.mp4').write_text('no video')
    result = reenact(network, drive, tmp_path / 'out', f'--video={tmp_path}/text.mp4')
    assert 'text.mp4: expected a video, found none that ffmpeg can read' in result.message


@needs_proc
def test_memory_does_not_grow_with_length(network, tmp_path):
    driving_folder(tmp_path / 'short', names=[f'{i:03d}' for i in range(30)], side=256)
    os.mkdir(tmp_path / 'long')
    for i in range(300):
        for ending in ('.obj', '.png', '_kpt2d.txt'):
            os.link(tmp_path / f'short/{i % 30:03d}{ending}', tmp_path / f'long/{i:03d}{ending}')
    common = [f'--network={network.path}', f'--outdir={tmp_path}', '--seeds=1', '--fixed_camera', '--nrr=4']
    short, long = peaks_kb('reenact_avatar_next3d', *(
        [f'--drive_root={tmp_path}/{name}', f'--fname={name}', *common] for name in ('short', 'long')
    ))  # fmt: skip
    assert [len(decode(tmp_path / f'{name}.mp4')[0]) for name in ('short', 'long')] == [30, 300]
    assert long < 1.1 * short, (short, long)
