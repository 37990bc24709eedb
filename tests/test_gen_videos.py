# SPDX-License-Identifier: Apache-2.0
"""gen_videos_next3d.py: what the files hold, closed loops, work that is done once, and one line for each bad input."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import imageio_ffmpeg
import numpy as np
import parity
import pytest
import torch
from PIL import Image
from scipy.interpolate import interp1d
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
    peaks_kb,
    plain,
    run,
    tiny_network,
)

import cli
import gen_videos_next3d
import reenact_avatar_next3d
from geometry import cameras, paths
from training import avatar, video
from training.generator import Next3DGenerator
from training.inference import Synthesizer

pytestmark = pytest.mark.usefixtures('one_thread')
DEMO = parity.ROOT / 'tests' / 'data' / 'simple_head'
MESH = [f'--obj_path={DEMO}/demo.obj', f'--lms_path={DEMO}/demo_kpt2d.txt', '--device=cpu']


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return tiny_network(tmp_path_factory.mktemp('network') / 'tiny.pkl')


@pytest.fixture(scope='module')
def demo_mesh():
    vertices = [line.split()[1:4] for line in (DEMO / 'demo.obj').read_text().splitlines() if line.startswith('v ')]
    return np.concatenate([np.array(vertices, np.float32), np.loadtxt(DEMO / 'demo_kpt2d.txt')]).astype(np.float32)


def make(network, out, *arguments, mesh=MESH):
    return run(gen_videos_next3d.main, f'--network={network.path}', f'--outdir={out}', *mesh, *arguments)


def test_published_command(network, demo_mesh, tmp_path):
    words = ['--trunc=0.7', '--seeds=10720,12374,13393,17099', '--grid=2x2', '--lms_cond=True', '--trunc-cutoff=8']
    result = make(network, tmp_path / 'out', *words, '--w-frames=5', '--sample_mult=1', '--reload_modules=True')
    assert result.code == 0, result.output
    assert 'frame/s' in result.lines[-1]
    frames, facts = decode(tmp_path / 'out/interpolation.mp4')
    assert frames.shape == (5, 2 * SIDE, 2 * SIDE, 3) and facts.fps == 60
    assert 'h264' in facts.report and 'yuv420p(tv, bt709' in facts.report
    content = (tmp_path / 'out/interpolation.mp4').read_bytes()
    assert content.index(b'moov') < content.index(b'mdat')
    c = label(0.35 * np.sin(4 * np.pi * 3 / 5), -0.05 + 0.25 * np.cos(4 * np.pi * 3 / 5))
    for cell, seed in enumerate((10720, 12374, 13393, 17099)):
        y, x = cell // 2 * SIDE, cell % 2 * SIDE
        expected = plain(network, seed, c, demo_mesh, psi=0.7)
        assert expected.std() > 5
        assert difference(frames[3, y : y + SIDE, x : x + SIDE], expected) < CODEC_ERROR


def test_a_morph_loops_without_a_jump(network, tmp_path):
    result = make(network, tmp_path, '--seeds=1,2', '--w-frames=8', '--save_root', tmp_path / 'frames', '--nrr=6')
    assert result.code == 0, result.output
    frames, _ = decode(tmp_path / 'interpolation.mp4')
    names = sorted(os.listdir(tmp_path / 'frames/interpolation'))
    assert len(frames) == 16 and names == [f'{i:05d}.png' for i in range(16)]
    exact = np.stack([np.asarray(Image.open(tmp_path / 'frames/interpolation' / name)) for name in names])
    assert difference(exact, frames) < CODEC_ERROR
    steps = [difference(a, b) for a, b in zip(exact, exact[1:])]
    assert min(steps) > 0.05 and difference(exact[-1], exact[0]) < 1.5 * max(steps)
    assert difference(exact[0], exact[8]) > 2 * steps[0]


@pytest.mark.parametrize('count, tolerance', [(1, 0), (2, 0.01), (3, 1e-2), (4, 1e-3), (8, 1e-4)])
def test_the_curve_of_styles(count, tolerance):
    keys = torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(0))
    loop = avatar.Loop(keys)
    assert loop.is_constant == (count == 1)
    times = np.linspace(0, count, 41)
    points = np.stack([loop.at(t).numpy() for t in times])
    assert np.allclose(points[[0, -1]], keys[0], atol=1e-6)
    kind, knots = 'cubic' if count > 1 else 'zero', np.arange(-2 * count, 3 * count)
    copies = interp1d(knots, np.tile(keys, (5, 1, 1)), kind=kind, axis=0)
    assert np.abs(points[:-1] - copies(times[:-1])).max() <= tolerance * 5 + 1e-6  # The published curve.


def test_camera_paths():
    published = paths.published_path(120)
    for frame in (0, 7, 119):
        phase = 2 * np.pi * frame / 60
        expected = np.pi / 2 + np.array([0.35 * np.sin(phase), -0.05 + 0.25 * np.cos(phase)])
        assert np.allclose(published[frame], expected)
    turn = paths.orbit_path(4, 180)
    assert np.allclose(turn[:, 0] - np.pi / 2, [0, np.pi / 2, np.pi, 3 * np.pi / 2])
    assert np.allclose(paths.orbit_path(4, 30)[1, 0] - np.pi / 2, np.radians(30))
    labels = paths.path_labels(turn, (0, 0, 0), 2.7)
    assert np.allclose(labels[2, [3, 7, 11]], [0, 0, -2.7], atol=1e-5)


@pytest.mark.parametrize('words, pivot', [
    ([], (0, 0, 0.2)), (['--cfg=FFHQ'], (0, 0, 0.2)), (['--cfg=Cats'], (0, 0, 0)), (['--cfg=cats'], (0, 0, 0)),
])  # fmt: skip
def test_where_cameras_look(network, demo_mesh, tmp_path, words, pivot):
    words = ['--seeds=5', '--orbit=90', '--w-frames=4', '--sample_mult=1', '--save-frames', *words]
    assert make(network, tmp_path, *words).code == 0
    drawn = np.asarray(Image.open(tmp_path / 'interpolation/00001.png'))  # 90 degrees to a side.
    errors = {}
    for point in ((0, 0, 0.2), (0, 0, 0)):
        pose = cameras.look_at_pose(cameras.FRONTAL + np.radians(90), cameras.FRONTAL, point, 2.7)
        c = cameras.make_label(pose, cameras.intrinsics(cameras.FOCAL))
        errors[point] = difference(drawn, plain(network, 5, c, demo_mesh))
    assert errors.pop(pivot) < 0.1 and min(errors.values()) > 1


PUBLISHED = {
    gen_videos_next3d: (
        'network seeds grid outdir obj_path lms_path lms_cond trunc trunc-cutoff shuffle-seed num-keyframes w-frames '
        'cfg image_mode sample_mult nrr interpolate save_root reload_modules'
    ),
    reenact_avatar_next3d: (
        'drive_root network grid seeds outdir fname trunc trunc-cutoff lms_cond fixed_camera num_frames fov-deg'
    ),
}


@pytest.mark.parametrize('script', PUBLISHED, ids=lambda script: script.__name__)
def test_published_flags_in_both_spellings(script):
    spellings = {name for option in script.main.params for name in option.opts}
    for name in PUBLISHED[script].split():
        assert {f'--{name.replace("-", "_")}', f'--{name.replace("_", "-")}'} <= spellings


def test_slow_frames_are_told_in_frames_a_second(capsys):
    def slow():
        for _ in range(3):
            time.sleep(1.1)
            yield None

    list(cli.frame_bar(slow(), 3, 'a.mp4'))
    last = capsys.readouterr().err.split('\r')[-1]
    assert re.search(r'^a.mp4: 100%.* 3/3 \[00:0[34]<00:00, +0\.\d+frame/s\]', last), last


def test_one_video_for_each_seed(network, tmp_path):
    words = ['--seeds=5,6', '--interpolate=False', '--w_frames=2', '--fixed', '--fps=24', '--save-frames']
    assert make(network, tmp_path, *words).code == 0
    assert leftovers(tmp_path) == ['00000.png'] * 2 + ['00001.png'] * 2 + ['5.mp4', '6.mp4']
    (a, facts), (b, _) = decode(tmp_path / '5.mp4'), decode(tmp_path / '6.mp4')
    assert a.shape == (2, SIDE, SIDE, 3) and facts.fps == 24
    assert difference(a[0], a[1]) < 1 and difference(a, b) > 5
    assert (tmp_path / '5/00000.png').read_bytes() == (tmp_path / '5/00001.png').read_bytes()
    (tmp_path / '5/notes.txt').touch()
    assert make(network, tmp_path, *words, '--w_frames=1').code == 0  # Frames of the longer video would lie between.
    assert leftovers(tmp_path / '5') == ['00000.png', 'notes.txt'] and leftovers(tmp_path / '6') == ['00000.png']


@pytest.mark.parametrize('mode, side', [('image_raw', 5), ('image_depth', 7)])
def test_modes_of_odd_size(network, tmp_path, mode, side):
    words = [f'--image_mode={mode}', f'--nrr={side}', '--grid=3x1', '--w-frames=2', '--orbit=20', '--save-frames']
    assert make(network, tmp_path, '--seeds=1-3', *words).code == 0
    frames, _ = decode(tmp_path / 'interpolation.mp4')
    assert frames.shape == (2, side + 1, 3 * side + 1, 3)
    picture = np.asarray(Image.open(tmp_path / 'interpolation/00000.png'))
    assert picture.shape == (side, 3 * side, 3)
    if mode == 'image_depth':
        assert picture[:, :side].min() == 0 and picture[:, :side].max() == 255
        assert (picture[..., 0] == picture[..., 2]).all()


def test_seeds_fill_cells_and_keyframes():
    defaults = dict(fixed=False, orbit=None, interpolate=True, num_keyframes=None, shuffle_seed=None, grid=(2, 1))
    def videos(**options):
        return gen_videos_next3d._videos([1, 2, 3, 4], defaults | options)

    assert videos() == [('interpolation.mp4', [[1, 2], [3, 4]], (2, 1))]
    assert videos(num_keyframes=3)[0][1] == [[1, 2, 3], [4, 1, 2]]
    order = [1, 2, 3, 4]
    np.random.RandomState(7).shuffle(order)
    assert videos(shuffle_seed=7)[0][1] == [order[:2], order[2:]]


def test_meshes_of_a_clip_go_there_and_back(network, tmp_path):
    frames = driving_folder(tmp_path / 'drive')
    (tmp_path / 'drive/dataset.json').unlink()  # Cameras are the video's own.
    drive = [f'--drive={tmp_path}/drive', '--device=cpu']
    result = make(network, tmp_path / 'out', '--seeds=3', '--w-frames=4', '--fixed', '--fps=2', mesh=drive)
    assert result.code == 0, result.output
    pictures, _ = decode(tmp_path / 'out/interpolation.mp4')
    for number, name in enumerate(('f1', 'f2', 'f10', 'f2')):
        assert difference(pictures[number], plain(network, 3, label(), frames[name].mesh)) < CODEC_ERROR
    assert make(network, tmp_path / 'out', '--seeds=3', *drive).message.startswith('Error: --drive: expected none with')
    (tmp_path / 'drive/f2.obj').write_text('v 1 2 x\n')
    assert 'f2.obj: expected vertices' in make(network, tmp_path / 'out', '--seeds=3', mesh=drive).message
    words = ['--seeds=3', '--w-frames=2', '--fixed', '--fps=2', '--skip-missing']
    assert make(network, tmp_path / 'out', *words, mesh=drive).code == 0
    pictures, _ = decode(tmp_path / 'out/interpolation.mp4')
    assert difference(pictures[1], plain(network, 3, label(), frames['f10'].mesh)) < CODEC_ERROR


def test_what_does_not_change_is_computed_once(network, monkeypatch):
    calls = []
    for name in ('texture', 'static_planes', 'cover', 'complete_mouth', 'render'):
        whole = getattr(Next3DGenerator, name)
        def count(*args, whole=whole, name=name):
            calls.append(name)
            return whole(*args)
        monkeypatch.setattr(Next3DGenerator, name, count)
    synthesizer = Synthesizer(network.generator)
    ws, v, c = torch.randn(2, network.generator.num_ws, 8), meshes()[:1], label()
    for shared, per_frame in (
        (('ws', 'v'), {'render'}),
        (('ws',), {'render', 'cover', 'complete_mouth'}),
        (('v',), {'render', 'texture', 'static_planes', 'complete_mouth'}),
    ):
        wall = avatar.Wall(synthesizer, 2, 2, *(x if n in shared else None for n, x in (('ws', ws), ('v', v))))
        calls.clear()
        assert len(list(avatar.stream(wall, [avatar.Frame(c, ws, v)] * 3))) == 3
        assert {name: calls.count(name) for name in set(calls)} == dict.fromkeys(per_frame, 3)


def test_drawing_goes_on_while_frames_are_encoded(network, tmp_path, monkeypatch):
    begun, in_time, numbers = [threading.Event() for _ in range(5)], [], iter(range(5))
    draw, write = avatar.Wall.draw, video._Encoder._write

    def begin(*args):
        begun[next(numbers)].set()
        return draw(*args)

    def slow(encoder, picture):  # Does not end before the drawing of the next frame has begun.
        in_time.append(begun[min(len(in_time) + 1, 4)].wait(10 if all(in_time) else 0))
        write(encoder, picture)

    monkeypatch.setattr(avatar.Wall, 'draw', begin)
    monkeypatch.setattr(video._Encoder, '_write', slow)
    words = ['--seeds=1', '--w-frames=5', '--nrr=4', '--sample_mult=1', '--image_mode=image_raw']
    assert make(network, tmp_path, *words).code == 0
    assert in_time == [True] * 5


@needs_proc
def test_memory_does_not_grow_with_length(network, tmp_path):
    common = [f'--network={network.path}', *MESH, '--seeds=1,2', '--nrr=4', '--sample_mult=1', '--image_mode=image_raw']
    short, long = peaks_kb('gen_videos_next3d', *(
        [f'--outdir={tmp_path}/{frames}', f'--w-frames={frames}', *common] for frames in (15, 150)
    ))  # fmt: skip
    assert [len(decode(tmp_path / f'{frames}/interpolation.mp4')[0]) for frames in (15, 150)] == [30, 300]
    assert long < 1.1 * short, (short, long)


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize('words, message', [
    (['--seeds=1-3', '--grid=2x2'], '--seeds: expected a multiple of the 4 cells of the grid, got 3; or'),
    (['--seeds=1', '--grid=0x2'], "expected columns and rows such as '4x2', each 1 to 100, got '0x2'"),
    (['--seeds=1', '--fixed', '--orbit=3'], '--fixed: expected none with --orbit'),
    (['--seeds=1', '--cfg=Dogs'], "--cfg': 'Dogs' is not one of 'ffhq', 'cats'"),
    (['--seeds=1', '--fps=0'], 'expected a finite number between 0 and 1000'),
    (['--seeds=1', '--sample_mult=0.01'], '--sample_mult: num_depths, num_importance: expected at least 4 and 0, got'),
    (['--seeds=1', '--drive=/nowhere'], '--drive: expected none with --obj_path'),
    (['--seeds=1', '--network=/nowhere.pkl'], '/nowhere.pkl'),
])
def test_bad_input_is_one_line(network, tmp_path, words, message):
    result = make(network, tmp_path / 'out', *words)
    assert result.code != 0 and message in result.message and len(result.lines) == 1
    assert not (tmp_path / 'out').exists()


def test_meshes_have_to_be_given(network, tmp_path):
    result = make(network, tmp_path / 'out', '--seeds=1', mesh=['--device=cpu'])
    assert result.message == 'Error: --obj_path: expected a file, got none; this network draws a head mesh.'


def test_an_encoder_that_fails_leaves_nothing(network, tmp_path, monkeypatch):
    monkeypatch.setattr(imageio_ffmpeg, 'get_ffmpeg_exe', lambda: '/bin/false')
    result = make(network, tmp_path / 'out', '--seeds=1', '--w-frames=40', '--image_mode=image_raw')
    assert result.code == 1 and 'interpolation.mp4: expected ffmpeg to write the video' in result.message
    assert leftovers(tmp_path / 'out') == []


def test_an_error_while_drawing_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), video.video_file(tmp_path / 'a.mp4', 30) as add:
        for _ in range(20):
            add(np.zeros([64, 64, 3], np.uint8))
        raise KeyError('in the middle')
    with pytest.raises(video.VideoError, match='at least one picture'), video.video_file(tmp_path / 'a.mp4', 30):
        pass
    assert leftovers(tmp_path) == []


def test_errors_of_what_is_read_ahead_arrive():
    def source():
        yield 1
        raise OSError('gone')

    items = avatar.read_ahead(source())
    assert next(items) == 1
    with pytest.raises(OSError, match='gone'):
        next(items)
    endless = avatar.read_ahead(iter(int, 1), count=2)
    assert next(endless) == 0
    endless.close()  # The thread ends, too.


def test_a_killed_run_leaves_no_half_video(network, tmp_path):
    command = [sys.executable, 'gen_videos_next3d.py', f'--network={network.path}', f'--outdir={tmp_path}', *MESH]
    command += ['--seeds=1', '--w-frames=100000', '--image_mode=image_raw']
    process = subprocess.Popen(command, cwd=parity.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if leftovers(tmp_path) or process.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)  # ffmpeg sees the end of its input and ends, too.
    assert 'interpolation.mp4' not in leftovers(tmp_path) and leftovers(tmp_path)[0].startswith('.tmp-')
    result = run(gen_videos_next3d.main, *command[2:-2], '--seeds=1', '--w-frames=2', '--image_mode=image_raw')
    assert result.code == 0 and leftovers(tmp_path) == ['interpolation.mp4']


def test_sizes_of_pictures_are_checked(tmp_path):
    with pytest.raises(ValueError, match='like the first'), video.video_file(tmp_path / 'a.mp4', 30) as add:
        add(np.zeros([8, 8, 3], np.uint8))
        add(np.zeros([8, 10, 3], np.uint8))


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    path, code = tmp_path / 'a.mp4', (
        'import os, signal, sys, time\n'
        'from dnnlib.util import atomic_path\n'
        'with atomic_path(sys.argv[1]) as temporary:\n'
        "    temporary.write_bytes(b'half')\n"
        "    print('written', flush=True)\n"
        '    time.sleep(60)\n'
    )
    options = dict(cwd=parity.ROOT, stdout=subprocess.PIPE, text=True)
    names = path, path, tmp_path / 'b.mp4'
    processes = [subprocess.Popen([sys.executable, '-c', code, name], **options) for name in names]
    try:
        assert all(process.stdout.readline() == 'written\n' for process in processes)
        alive, *killed = processes
        for process in killed:
            process.kill()
            process.wait()
        assert len(leftovers(tmp_path)) == 3
        with video.video_file(path, 30) as add:
            add(np.zeros([16, 16, 3], np.uint8))
        found = leftovers(tmp_path)
        kept = [name for name in found if name.startswith('.tmp-')]
        assert 'a.mp4' in found and len(kept) == 2  # Of the one that runs, and of another file.
        assert sum(f'-{alive.pid}-' in name for name in kept) == 1 and sum('b.mp4' in name for name in kept) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()
