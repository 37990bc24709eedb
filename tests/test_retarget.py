# SPDX-License-Identifier: Apache-2.0
"""A clip's expressions on other faces: FLAME's coefficients from the fits to the video, and the viewer's choice."""

import re

import numpy as np
import pytest
import torch
from parity import ROOT, parity_file
from test_flame import folder as random_flame  # noqa: F401  (a fixture: files of FLAME's sizes with random content)
from test_generator import meshes
from video_data import CODEC_ERROR, decode, difference, driving_folder, label, plain, run, tiny_network

import cli
import gen_videos_next3d
import reenact_avatar_next3d
import viewer
from geometry import cameras
from geometry.flame import load_flame_beside
from training import driving, live
from training.files import DatasetError
from training.inference import Synthesizer

pytestmark = pytest.mark.usefixtures('one_thread')
FRONTAL = label(focal=cameras.focal_from_fov(18.837))  # Of the published script.
SIMPLE_MESH = ROOT / 'tests/data/simple_head/demo.obj'  # With landmarks beside it.
FRAMES, SHAPES, EXPRESSIONS = 4, 12, 5
FLOAT_ERROR = 3e-7  # Metres: a few last places of float32 in a sum of a hundred terms.


def fits(seed=3, frames=FRAMES, sizes=(SHAPES, EXPRESSIONS)):
    """Return codes as fit_meshes.py gathers them, of a person who talks and looks around."""
    rng = np.random.default_rng(seed)
    arrays = {'shape': rng.normal(size=[frames, sizes[0]]), 'exp': rng.normal(size=[frames, sizes[1]]),
              'pose': 0.3 * rng.normal(size=[frames, 6]), 'eye_pose': 0.3 * rng.normal(size=[frames, 6])}  # fmt: skip
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def model_mesh(head, codes, row, shape):
    """Return FLAME's mesh [V + 68, 3] of a frame's face on somebody of a shape [1, S]."""
    exp, pose, eyes = (torch.from_numpy(codes[name][row : row + 1]) for name in ('exp', 'pose', 'eye_pose'))
    with torch.no_grad():
        return head(shape, exp, jaw_pose=pose[:, 3:], eye_pose=eyes).stacked()[0].numpy()


def write_own(path, mesh, with_landmarks=True):
    """Write a mesh [V + 68, 3] whose numbers are kept."""
    path.write_text(''.join('v %r %r %r\n' % tuple(v) for v in mesh[:-68].tolist()) + 'f 1 2 3\n')
    if with_landmarks:
        np.savetxt(path.with_name(f'{path.stem}_kpt2d.txt'), mesh[-68:])


@pytest.fixture(params=['published', 'random'])
def flame(request, tmp_path_factory):
    """The folder of a fabricated FLAME: of the published numbers, or random."""
    if request.param == 'random':
        return request.getfixturevalue('random_flame')
    builders, folder = request.getfixturevalue('builders'), tmp_path_factory.mktemp('published')
    builders.build_flame_pkl(folder / 'generic_model.pkl', parity_file('head_template.obj'), ('shapedirs',))
    builders.build_landmark_npy(folder / 'landmark_embedding.npy')
    return folder


@pytest.mark.parametrize('with_landmarks', [True, False])
def test_a_face_keeps_its_shape_codes_and_takes_the_clips_expression(flame, tmp_path, with_landmarks):
    codes, head = fits(), load_flame_beside(flame, num_identity=SHAPES, num_expression=EXPRESSIONS)
    np.savez(tmp_path / 'clip.npz', **codes, fps=25)
    shape = torch.randn(1, SHAPES, generator=torch.Generator().manual_seed(9))
    own = head(shape, torch.zeros(1, EXPRESSIONS)).stacked()[0].numpy()
    write_own(tmp_path / 'own.obj', own, with_landmarks)
    for path in (flame, flame / 'generic_model.pkl'):
        clip = cli.open_clip(tmp_path / 'clip.npz', str(tmp_path / 'own.obj'), needs_labels=False, flame_path=path)
    driver = driving.open_clip(tmp_path / 'clip.npz', needs_labels=False, flame_path=flame)
    assert clip.names == driver.names == ['00000', '00001', '00002', '00003'] and clip.fps == 25
    assert clip.num_vertices == driver.num_vertices == 5023
    for row in range(FRAMES):
        expected = model_mesh(head, codes, row, shape)
        assert np.abs(clip.mesh(row) - expected).max() < FLOAT_ERROR
        theirs = model_mesh(head, codes, row, torch.from_numpy(codes['shape'][row : row + 1]))
        assert np.array_equal(driver.mesh(row), theirs)  # Without another face, the driver's own.
        moved = np.abs(expected - own).max(), np.abs(expected - theirs).max()
        assert min(moved) > 1e3 * FLOAT_ERROR, moved


def test_faces_beyond_the_shape_codes_keep_every_detail(random_flame, tmp_path):  # noqa: F811
    """A scan, which no codes reach: what it differs from FLAME by stays where the face does not move."""
    codes = fits() | {'pose': np.zeros([FRAMES, 6], np.float32), 'eye_pose': np.zeros([FRAMES, 6], np.float32)}
    head = load_flame_beside(random_flame, num_identity=SHAPES, num_expression=EXPRESSIONS)
    rng = np.random.default_rng(5)
    own = head.template.numpy() + 0.01 * rng.normal(size=[5023, 3]).astype(np.float32)
    own = np.concatenate([own, head.landmarks(torch.from_numpy(own)[None])[0].numpy() + np.float32(0.002)])
    np.savez(tmp_path / 'clip.npz', **codes)
    clip = driving.Retargeted(driving.open_clip(tmp_path / 'clip.npz', True, False, flame_path=random_flame), own)
    still = head(torch.zeros(1, SHAPES), torch.zeros(1, EXPRESSIONS)).stacked()[0].numpy()
    for row in range(FRAMES):
        added = model_mesh(head, codes, row, torch.zeros(1, SHAPES)) - still
        assert np.abs(clip.mesh(row) - own - added).max() < FLOAT_ERROR
    codes['exp'][:] = 0
    np.savez(tmp_path / 'clip.npz', **codes)
    clip = driving.Retargeted(driving.open_clip(tmp_path / 'clip.npz', True, False, flame_path=random_flame), own)
    assert np.abs(clip.mesh(0) - own).max() < FLOAT_ERROR


def test_the_shape_may_be_given_once_and_poses_left_out(random_flame, tmp_path):  # noqa: F811
    codes = fits()
    del codes['pose'], codes['eye_pose']
    whole = codes | {'shape': np.tile(codes['shape'][:1], [FRAMES, 1])}
    one = codes | {'shape': codes['shape'][0]}
    none = {'exp': codes['exp']}
    clips = []
    for name, arrays in (('whole', whole), ('one', one), ('none', none)):
        np.savez(tmp_path / f'{name}.npz', **arrays)
        clips.append(driving.open_clip(tmp_path / f'{name}.npz', needs_labels=False, flame_path=random_flame))
    assert np.array_equal(clips[0].mesh(2), clips[1].mesh(2)) and clips[2].mesh(2).shape == (5091, 3)
    assert np.abs(clips[2].mesh(2) - clips[0].mesh(2)).max() > 1e-4


@pytest.mark.parametrize('change, message', [
    (dict(exp=np.zeros([FRAMES, 101])), 'num_expression: expected 1 to 100, got 101'),
    (dict(shape=np.zeros([FRAMES, 301])), 'num_identity: expected 1 to 300, got 301'),
    (dict(shape=np.zeros([3, SHAPES])), 'shape: expected finite numbers [4, 12], found [3, 12]'),
    (dict(exp=np.zeros([FRAMES])), 'exp: expected finite numbers [4, 4], found [4]'),
    (dict(exp=np.float32(1)), 'expected an array expression [T, E]'),
    (dict(exp=np.full([FRAMES, EXPRESSIONS], np.inf)), 'coefficients of 00000: expected finite numbers'),
    (dict(pose=np.zeros([FRAMES, 3])), 'pose: expected finite numbers [4, 6], found [4, 3]'),
    (dict(eye_pose=np.zeros([FRAMES, 5])), 'eye_pose: expected finite numbers [4, 6], found [4, 5]'),
    (dict(exp=np.array(['a'] * FRAMES)), 'exp: expected numbers'),
])
def test_codes_that_cannot_be_used(random_flame, tmp_path, change, message):  # noqa: F811
    np.savez(tmp_path / 'clip.npz', **fits() | change)
    with pytest.raises(DatasetError, match=re.escape(message)):
        driving.open_clip(tmp_path / 'clip.npz', needs_labels=False, flame_path=random_flame)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def video(script, *arguments):
    return run(script.main, *arguments, '--device=cpu', '--seeds=4')


@pytest.mark.parametrize('words, message', [
    (['--flame-path={tmp}'], '{tmp}/generic_model.pkl: no such file; register at https://flame.is.tue.mpg.de'),
    (['--flame_path={tmp}/broken.pkl'], '{tmp}/broken.pkl: expected the FLAME 2020 or 2023 model'),
    (['--flame_path={flame}', '--retarget={own}'], '--retarget: {own}: expected 5023 vertices, found 5144'),
    (['--flame_path={flame}', '--retarget={simple}'], '--retarget: {simple}: expected 5023 vertices, found 5258'),
    (['--flame_path={flame}'], '--drive_root: expected meshes of the 5258 vertices that the network was trained with'),
])
def test_bad_input_is_one_line(random_flame, tmp_path, words, message):  # noqa: F811
    network = tiny_network(tmp_path / 'tiny.pkl')
    np.savez(tmp_path / 'clip.npz', **fits(), labels=np.repeat(label().numpy(), FRAMES, 0))
    (tmp_path / 'broken.pkl').write_text('no model')
    names = dict(tmp=tmp_path, flame=random_flame, own=ROOT / 'data/head/head_template.obj', simple=SIMPLE_MESH)
    words = [word.format(**names) for word in words]
    common = [f'--drive_root={tmp_path}/clip.npz', f'--network={network.path}', f'--outdir={tmp_path}/out']
    result = video(reenact_avatar_next3d, *common, *words)
    assert result.code != 0 and message.format(**names) in result.message and len(result.lines) == 1
    assert not (tmp_path / 'out').exists()


def test_videos_refuse_a_face_without_a_clip(tmp_path):
    result = video(gen_videos_next3d, '--retarget=own.obj', '--network=none.pkl', f'--outdir={tmp_path}/out')
    assert result.message == 'Error: --retarget: expected --drive with it, got none.'


@pytest.mark.parametrize('flame', ['published'], indirect=True)
def test_videos_of_flames_coefficients(flame, tmp_path):
    network = tiny_network(tmp_path / 'tiny.pkl', template=parity_file('head_template.obj'))
    codes, head = fits(frames=2), load_flame_beside(flame, num_identity=SHAPES, num_expression=EXPRESSIONS)
    np.savez(tmp_path / 'clip.npz', **codes, labels=np.repeat(label().numpy(), 2, 0), fps=24)
    shape = torch.randn(1, SHAPES, generator=torch.Generator().manual_seed(9))
    write_own(tmp_path / 'own.obj', head(shape, torch.zeros(1, EXPRESSIONS)).stacked()[0].numpy(), False)
    common = [f'--network={network.path}', f'--outdir={tmp_path}/out', f'--retarget={tmp_path}/own.obj']
    common.append(f'--flame-path={flame}')
    result = video(reenact_avatar_next3d, f'--drive_root={tmp_path}/clip.npz', *common, '--grid=1x1')
    assert result.code == 0, result.output
    frames, facts = decode(tmp_path / 'out/reenactment.mp4')
    assert len(frames) == 2 and facts.fps == 24
    words = ['--fixed', '--w_frames=2', '--sample_mult=1']
    result = video(gen_videos_next3d, f'--drive={tmp_path}/clip.npz', *common, *words)
    assert result.code == 0, result.output
    turns, _ = decode(tmp_path / 'out/interpolation.mp4')
    assert len(turns) == 2
    for row in range(2):
        mesh = model_mesh(head, codes, row, shape)
        assert difference(frames[row], plain(network, 4, label(), mesh, conditioning=FRONTAL)) < CODEC_ERROR
        assert difference(turns[row], plain(network, 4, label(), mesh)) < CODEC_ERROR


# ---------------------------------------------------------------------------------------------------------------------
# The viewer


@pytest.fixture
def drive(tmp_path):
    """A folder of meshes of the simple head, f1, f2 and f10."""
    driving_folder(tmp_path / 'drive')
    return tmp_path / 'drive'


def viewers_clip(drive, num_vertices, flame_path=None):
    options = dict(drive_root=str(drive), skip_missing=False, flame_path=flame_path)
    return viewer._open_clip(options, num_vertices)


def test_the_viewer_plays_meshes_of_heads_that_no_coefficients_are_of(drive, tmp_path, capsys):
    network = tiny_network(tmp_path / 'tiny.pkl')
    clip = viewers_clip(drive, network.generator.num_vertices)
    assert capsys.readouterr().err == ''  # No coefficients, no warning.
    np.savez(drive / 'coefficients.npz', names=['f1', 'f2', 'f10'], expression=np.zeros([3, 52]), fps=12)
    clip = viewers_clip(drive, network.generator.num_vertices)
    told = capsys.readouterr().err
    assert told.count('\n') == 1 and 'coefficients of a head of 5144 vertices, not 5258' in told
    studio = live.Studio(Synthesizer(network.generator), meshes()[0].numpy(), clip, None, 8, 4)
    assert clip.fps == 12 and studio.retargeted is None
    assert np.array_equal(studio.mesh_of(live.View(frame=2, keeps_shape=True))[0], clip.mesh(2))
    assert live.Sitting(studio).draw(live.View(frame=2), False).shape == (128, 128, 3)


@pytest.mark.parametrize('arrays, fault', [
    (dict(names=['f1', 'f2', 'f10'], expression=np.zeros([3, 51])), 'expression: expected finite numbers [3, 52]'),
    (dict(names=['f1', 'f10'], expression=np.zeros([2, 52])), 'missing: coefficients.npz: f2'),
    (dict(expression=np.zeros([3, 52])), 'expected arrays names and expression (or exp, of FLAME), found expression'),
    (dict(names=['f1', 'f2', 'f10'], exp=np.zeros([3, 5])), 'nowhere/generic_model.pkl: no such file'),
])
def test_the_viewer_tells_of_coefficients_that_it_cannot_use(drive, capsys, arrays, fault):
    np.savez(drive / 'coefficients.npz', **arrays)
    clip = viewers_clip(drive, 5258, '/nowhere')
    told = capsys.readouterr().err
    assert told.startswith('Warning: ') and told.count('\n') == 1 and fault in told
    assert "the clip's meshes are played, and cannot keep the avatar's face shape" in told
    assert clip.coefficients is None and len(clip.names) == 3


def test_the_viewer_refuses_clips_whose_coefficients_cannot_be_read(drive, capsys):
    (drive / 'coefficients.npz').write_bytes(b'PK\x03\x04 cut')
    with pytest.raises(DatasetError, match='coefficients.npz: expected an .npz of arrays'):
        viewers_clip(drive, 5258)
    assert capsys.readouterr().err == ''  # The error says it all.


@pytest.mark.parametrize('flame', ['published'], indirect=True)
def test_the_viewer_keeps_the_shape_of_flames_heads(flame, tmp_path):
    network = tiny_network(tmp_path / 'tiny.pkl', template=parity_file('head_template.obj'))
    codes, head = fits(), load_flame_beside(flame, num_identity=SHAPES, num_expression=EXPRESSIONS)
    np.savez(tmp_path / 'clip.npz', **codes)
    clip = viewers_clip(tmp_path / 'clip.npz', 5023, str(flame))
    shape = torch.randn(1, SHAPES, generator=torch.Generator().manual_seed(9))
    own = head(shape, torch.zeros(1, EXPRESSIONS)).stacked()[0].numpy()
    studio = live.Studio(Synthesizer(network.generator), own, clip, None, 8, 4)
    kept = studio.mesh_of(live.View(frame=1, keeps_shape=True))[0].numpy()
    assert np.abs(kept - model_mesh(head, codes, 1, shape)).max() < FLOAT_ERROR
    assert np.array_equal(studio.mesh_of(live.View(frame=1))[0], clip.mesh(1))
