# SPDX-License-Identifier: Apache-2.0
"""viewer.py: its camera, controls, turns and clocks; viewers that share a network; and the page in a real browser."""

import asyncio
import contextlib
import io
import itertools
import math
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import browser
import numpy as np
import pytest
import torch
import trimesh
from helpers import HEAD
from parity import ROOT
from PIL import Image
from test_generator import TINY, random_weights, topology
from video_data import difference, label, plain, run, tiny_network

import viewer
from geometry import cameras, expressions, orbit
from geometry.head_model import ARKIT_NAMES, load_embedded_head
from training import avatar, driving, live
from training.checkpoint import save_snapshot
from training.config import Next3DConfig
from training.generator import Next3DGenerator
from training.inference import Synthesizer
from training.mesh_render import MeshRenderer

PIVOT, RADIUS = (0.0, 0.0, 0.2), 2.7
BASE = RADIUS - PIVOT[2]
UP = (0, 1, 0)
SIZE = 960, 640  # Of browsers' windows: small ones are drawn faster.


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    """A tiny network over the embedded head, dense enough for a surface."""
    network = tiny_network(tmp_path_factory.mktemp('network') / 'tiny.pkl', is_embedded=True)
    network.generator.decoder.net[2].weight[0] *= 30
    save_snapshot(network.path, {'G_ema': network.generator})
    return network


@pytest.fixture(scope='module')
def other_network(tmp_path_factory):
    """A tiny network over the demo head."""
    path = tmp_path_factory.mktemp('other') / 'tiny.pkl'
    save_snapshot(path, {'G_ema': random_weights(Next3DGenerator(Next3DConfig(**TINY | HEAD), *topology())).eval()})
    return SimpleNamespace(path=path)


@pytest.fixture(scope='module')
def clip_path(tmp_path_factory):
    """A packed clip of 8 frames that opens its mouth, of somebody with another face."""
    head, path = load_embedded_head(), tmp_path_factory.mktemp('clip') / 'clip.npz'
    identity = np.zeros(head.num_identity, np.float32)
    identity[:3] = 1.5
    weights = torch.cat([head.expression(jawOpen=i / 7) for i in range(8)]).numpy()
    np.savez(path, identity=identity, expression=weights, fps=12.5)
    return path


@pytest.fixture(scope='module')
def studio(network, clip_path):
    clip = driving.open_clip(clip_path, needs_labels=False)
    return live.Studio(Synthesizer(network.generator), None, clip, None, 8, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Camera


def page_camera(yaw, pitch, distance=BASE, pan=(0, 0, 0)):
    look_at = np.array(PIVOT) + pan
    away = [math.sin(yaw) * math.cos(pitch), math.sin(pitch), math.cos(yaw) * math.cos(pitch)]
    return look_at + distance * np.array(away), look_at, UP


def pose_of(c):
    pose, k = cameras.split_label(c)
    return pose[0].double().numpy(), k[0].double().numpy()


def test_start_is_the_frontal_camera():
    c = orbit.orbit_label(*orbit.start_camera(PIVOT, RADIUS), PIVOT, RADIUS)
    torch.testing.assert_close(c, label(), atol=1e-6, rtol=0)


@pytest.mark.parametrize('yaw, pitch', [(0.4, 0), (-1.2, 0.3), (0.1, -0.5), (2.5, 0.2), (0, 1.2)])
@pytest.mark.parametrize('distance', [BASE, BASE * 0.6, BASE * 1.7])
def test_orbits_stay_on_the_sphere_of_training_and_look_at_the_pivot(yaw, pitch, distance):
    pose, k = pose_of(orbit.orbit_label(*page_camera(yaw, pitch, distance), PIVOT, RADIUS))
    position, rotation = pose[:3, 3], pose[:3, :3]
    assert np.linalg.norm(position) == pytest.approx(RADIUS, abs=1e-5)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-6)
    forward = (PIVOT - position) / np.linalg.norm(PIVOT - position)
    np.testing.assert_allclose(rotation[:, 2], forward, atol=1e-5)
    assert abs(rotation[1, 0]) < 1e-6 and rotation[1, 1] < 0  # Right is level, down is down.
    # It is the sampler's camera with the same position.
    h = math.pi - math.atan2(position[2], position[0])
    v = float(math.pi / 2 * (1 - position[1] / RADIUS))
    expected = cameras.look_at_pose(h, torch.tensor([[v]]), PIVOT, RADIUS)[0].double().numpy()
    np.testing.assert_allclose(pose, expected, atol=1e-4)
    assert k[0, 0] == pytest.approx(cameras.FOCAL * BASE / distance, rel=1e-5)


def test_zoom_and_pan_are_bounded():
    for distance, zoom in ((1e-3, orbit.ZOOM_RANGE[1]), (1e3, orbit.ZOOM_RANGE[0])):
        _, k = pose_of(orbit.orbit_label(*page_camera(0.2, 0.1, distance), PIVOT, RADIUS))
        assert k[0, 0] == pytest.approx(cameras.FOCAL * zoom, rel=1e-5)
    nearest, farthest = orbit.distance_range(PIVOT, RADIUS)
    assert (BASE / farthest, BASE / nearest) == pytest.approx(orbit.ZOOM_RANGE)
    straight, _ = pose_of(orbit.orbit_label(*page_camera(0.3, 0), PIVOT, RADIUS))
    for pan in ((0.1, 0.05, 0.0), (50.0, 0.0, 0.0)):
        moved, _ = pose_of(orbit.orbit_label(*page_camera(0.3, 0, pan=pan), PIVOT, RADIUS))
        expected = np.array(pan) * min(1, orbit.FARTHEST_PAN / np.linalg.norm(pan))
        np.testing.assert_allclose(moved[:3, 3] - straight[:3, 3], expected, atol=1e-6)
        np.testing.assert_allclose(moved[:3, :3], straight[:3, :3], atol=1e-6)


@pytest.mark.parametrize('camera', [
    (PIVOT, PIVOT, UP), ((np.nan, 0, 2.7), PIVOT, UP), ((0, np.inf, 2.7), PIVOT, UP), ((0, 5, 0.2), PIVOT, UP),
    ((0, 0, 2.7), PIVOT, (0, 0, 1)), ((0, 0, 2.7), PIVOT, (0, 0, 0)), ((0, 0, 2.7), PIVOT, (0, np.nan, 0)),
])  # fmt: skip
def test_cameras_without_a_direction_are_still_cameras(camera):
    pose, _ = pose_of(orbit.orbit_label(*camera, PIVOT, RADIUS))
    assert np.isfinite(pose).all()
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-6)


def test_a_rolled_page_rolls_the_picture():
    pose, _ = pose_of(orbit.orbit_label((0, 0, 2.7), PIVOT, (1, 0, 0), PIVOT, RADIUS))
    np.testing.assert_allclose(pose[:3, 1], [-1, 0, 0], atol=1e-6)  # The picture's bottom is opposite to up.


@pytest.mark.parametrize('aspect', [0.5, 1.0, 1.7])
def test_square_picture_lies_in_the_middle_of_a_window(aspect):
    picture = np.full([64, 64, 3], 200, np.uint8)
    window = viewer.fit_window(viewer.enlarge(picture), aspect)
    assert window.shape[1] / window.shape[0] == pytest.approx(aspect, rel=0.005)
    rows, columns = np.nonzero((window == 200).all(axis=2))
    assert len(rows) == 256 * 256
    assert abs(rows.min() + rows.max() - window.shape[0] + 1) <= 1
    assert abs(columns.min() + columns.max() - window.shape[1] + 1) <= 1
    # The page's own camera sees of the plane through the pivot what the picture shows.
    width = 2 * math.tan(orbit.view_angle(aspect) / 2) * min(aspect, 1)
    assert width == pytest.approx(1 / cameras.FOCAL, rel=1e-6)


@pytest.mark.parametrize('aspect', [math.nan, 0.0, 1e9, -1.0])
def test_windows_of_no_shape_are_survived(aspect):
    assert viewer.fit_window(np.zeros([8, 8, 3], np.uint8), aspect).size < 1e5


# ---------------------------------------------------------------------------------------------------------------------
# Expressions


def test_groups_hold_all_expressions_once():
    groups = expressions.grouped(ARKIT_NAMES)
    members = [name for names in groups.values() for name in names]
    assert sorted(members) == sorted(ARKIT_NAMES) and len(members) == 52
    assert list(groups) == list(expressions.GROUPS)  # In that order, none empty, none left for 'Others'.
    assert len(groups['Gaze']) == 8 and 'mouthSmileLeft' in groups['Mouth corners'] and 'mouthPucker' in groups['Lips']
    assert expressions.grouped(['E01']) == {expressions.OTHERS: ['E01']}


def test_search_finds_each_expression_by_its_name_and_label():
    for name in ARKIT_NAMES:
        for query in (name, name.upper(), expressions.label(name), f'  {expressions.label(name)[:6]} ', ''):
            assert expressions.matches(query, name), (query, name)
    queries = 'left smile', 'lids', 'xyz'
    found = {query: [x for x in ARKIT_NAMES if expressions.matches(query, x)] for query in queries}
    assert found['left smile'] == ['mouthSmileLeft'] and len(found['lids']) == 6 and not found['xyz']
    labels = {expressions.label(name) for name in ARKIT_NAMES}
    assert len(labels) == 52 and 'mouth smile left' in labels


@pytest.mark.parametrize('control', list(expressions.CONTROLS))
def test_controls_and_sliders_agree(control):
    low = -1 if expressions.CONTROLS[control][1] else 0
    for value in np.linspace(low, 1, 9):
        weights = expressions.control_weights(control, value)
        assert set(weights) <= set(ARKIT_NAMES) and all(0 <= x <= 1 for x in weights.values())
        assert expressions.control_value(control, weights) == pytest.approx(value)
    assert expressions.controlled(ARKIT_NAMES) == list(expressions.CONTROLS)
    assert expressions.controlled(['jawOpen']) == ['jaw']


def test_gaze_turns_both_eyes_where_its_control_says():
    head = load_embedded_head()
    zero = torch.zeros(1, head.num_identity)
    front = head.regions['eyes'] & (head.mean[:, 2] > head.mean[head.regions['eyes'], 2].quantile(0.8))

    def centres(**values):
        weights = {}
        for control, value in values.items():
            weights |= expressions.control_weights(control, value)
        moved = head(zero, head.expression(weights)).vertices[0]
        return torch.stack([moved[front & head.regions[side]].mean(dim=0) for side in ('eye_left', 'eye_right')])

    still = centres()
    assert ((centres(gaze_x=1) - still)[:, 0] > 1e-3).all() and ((centres(gaze_x=-1) - still)[:, 0] < -1e-3).all()
    assert ((centres(gaze_y=1) - still)[:, 1] > 1e-3).all() and ((centres(gaze_y=-1) - still)[:, 1] < -1e-3).all()


# ---------------------------------------------------------------------------------------------------------------------
# Turns and clocks


def test_coarse_at_once_and_full_when_settled():
    turns = live.Schedule()
    turns.add('a')
    assert turns.take(0) is None and turns.wait(0) is None
    turns.touch('a', 10.0)
    assert turns.wait(10.0) == 0 and turns.take(10.0) == ('a', False)
    turns.touch('a', 10.1)  # Still moving: the full picture waits.
    assert turns.take(10.1) == ('a', False)
    assert turns.take(10.1 + 0.9 * live.SETTLED_SECONDS) is None
    assert turns.wait(10.1) == pytest.approx(live.SETTLED_SECONDS)
    assert turns.take(10.1 + live.SETTLED_SECONDS) == ('a', True)
    assert turns.take(99.0) is None and turns.wait(99.0) is None
    turns.remove('a')
    turns.touch('a', 100.0)
    turns.remove('a')
    assert turns.take(101.0) is None


def test_viewers_take_turns_and_coarse_pictures_go_first():
    turns = live.Schedule()
    for key in 'abc':
        turns.add(key)
        turns.touch(key, 0.0)
    assert [turns.take(0.1)[0] for _ in range(3)] == ['a', 'b', 'c']
    turns.touch('b', 0.5)
    assert turns.take(0.5) == ('b', False)  # Though a and c wait for full ones.
    assert [turns.take(1.0) for _ in range(3)] == [('a', True), ('c', True), ('b', True)]


def test_a_clip_keeps_nobody_from_a_full_picture():
    turns, served = live.Schedule(), []
    for key in ('clip', 'still'):
        turns.add(key)
        turns.touch(key, 0.0)
    now = 0.0
    while now < 3:
        key, is_full = turns.take(now) or (None, None)
        served.append((key, is_full))
        if key == 'clip':
            turns.touch('clip', now, settles=False)  # Behind its rate: the next frame is due already.
        now += 0.25
    assert served.count(('still', False)) == 1 and served.count(('still', True)) == 1
    assert ('clip', True) not in served and served.count(('clip', False)) == 10


def test_a_player_keeps_time():
    player = live.Player(10, 5.0)
    assert player.at(3.0) == 0 and player.next_change(3.0) is None
    player.play(10.0)
    assert [player.at(10 + t) for t in (0, 0.19, 0.2, 1.0, 1.99, 2.0, 4.5)] == [0, 0, 1, 5, 9, 0, 2]
    assert player.next_change(10.25) == pytest.approx(10.4)
    player.set_fps(1.0, 11.0)
    assert [player.at(t) for t in (11.0, 12.9, 13.0)] == [5, 6, 7]
    player.pause(13.0)
    assert player.at(50.0) == 7 and not player.is_playing
    player.seek(99, 50.0)
    assert player.at(51.0) == 9
    player.loops = False
    player.play(60.0)  # From the end: from the first.
    assert [player.at(t) for t in (60.0, 69.0, 69.9)] == [0, 9, 9] and player.is_playing
    assert player.at(70.0) == 9 and not player.is_playing and player.next_change(70.0) is None


def test_the_worker_draws_for_all_and_survives_errors():
    drawn, errors, is_done = [], [], threading.Event()

    def draw(key, is_full):
        if key == 'bad':
            raise RuntimeError('no')
        drawn.append((key, is_full))
        if drawn.count(('a', True)) and drawn.count(('b', True)):
            is_done.set()

    worker = live.Worker(draw, lambda key, error: errors.append((key, str(error))))
    for key in ('bad', 'a', 'b'):
        worker.add(key)
    assert is_done.wait(10)
    worker.stop()
    assert sorted(drawn) == [('a', False), ('a', True), ('b', False), ('b', True)] and ('bad', 'no') in errors
    worker.touch('a')
    assert len(drawn) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Several things at once


class Gate:
    """Wraps a function whose first call waits for the end of the second, where that comes; `ended`: which came when."""

    def __init__(self, function):
        self._function, self._numbers, self.ended = function, itertools.count(), []
        self._second, self.is_over = threading.Event(), threading.Event()

    def __call__(self, *args):
        number = next(self._numbers)
        if number == 0:
            self._second.wait(0.5)
        result = self._function(*args)
        self.ended.append(number)
        if number == 1:
            self._second.set()
        if len(self.ended) == 2:
            self.is_over.set()
        return result


@pytest.fixture
def lone_page(studio):
    """A page whose browser shows nothing, on controls of a real server; `changed` counts its wishes for a picture."""
    if 'viser' in (browser.problem() or ''):
        pytest.skip(browser.problem())
    server = viewer._quietly(viewer._server_class(), host='127.0.0.1', port=0, verbose=False)
    position, look_at, up = orbit.start_camera(PIVOT, RADIUS)
    camera = SimpleNamespace(fov=1.0, aspect=1.0, position=position, look_at=look_at, up_direction=up, on_update=id)
    client = SimpleNamespace(gui=server.gui, scene=server.scene, camera=camera, atomic=contextlib.nullcontext,
                             flush=server.flush)  # fmt: skip
    server.gui._resolve_client = lambda _: client
    changed = []
    page = viewer.Page(client, studio, dict(seed=3, trunc=0.7, shape_res=8), lambda: changed.append(1))
    page._sitting.draw = lambda view, is_full: np.zeros([8, 8, 3], np.uint8)
    page.changed = changed
    yield page
    viewer._quietly(server.stop)


def move(page, handle, *values):
    """Move a control as messages of a browser do, one right after the other."""
    from viser._messages import GuiUpdateMessage

    async def messages():
        for value in values:
            await page._gui._handle_gui_updates(0, GuiUpdateMessage(handle._impl.uuid, {'value': value}))

    asyncio.run(messages())


def test_the_last_of_two_changes_has_the_last_word(lone_page):
    player = lone_page._player
    player.seek = gate = Gate(player.seek)
    move(lone_page, lone_page._frame, 2, 5)
    assert gate.is_over.wait(10) and gate.ended == [0, 1] and player.at(0.0) == 5
    assert lone_page._uses_clip.value

    lone_page._client.atomic = gate = Gate(contextlib.nullcontext)  # Of what a search hides.
    move(lone_page, lone_page._search, 'smile', 'jawOpen')
    assert gate.is_over.wait(10) and gate.ended == [0, 1]
    assert [name for name, slider in lone_page._sliders.items() if slider.visible] == ['jawOpen']


def test_a_picture_does_not_move_the_slider_that_somebody_moves(lone_page):
    """From its view to its end: the clip stands still, so frame 6 is where somebody has put it."""
    page, view, draw = lone_page, lone_page.view, lone_page._sitting.draw
    page._uses_clip.value = True

    def put(frame, result):
        page._frame.value = frame
        page._player.seek(frame, time.monotonic())
        return result

    page.view = lambda: put(6, view())
    page.draw(False)
    assert page._frame.value == page._player.at(0.0) == 6
    page.view = view
    page._sitting.draw = lambda *args: put(3, draw(*args))
    page.draw(False)
    assert page._frame.value == page._player.at(0.0) == 3


def test_the_slider_shows_where_a_clip_stops(lone_page):
    page, player = lone_page, lone_page._player
    page._toggle_play()
    assert page._play.label == 'Pause'
    player._since -= 0.2  # 2.5 frames of 1 / 12.5 s have passed.
    page._toggle_play()
    assert page._play.label == 'Play' and page._frame.value == player.at(0.0) in (2, 3, 4, 5, 6, 7)
    player.loops = False
    player.play(time.monotonic() - 100)  # It has come to its end.
    page._play.label = 'Pause'
    wishes = len(page.changed)
    assert page.draw(False) is None
    assert page._play.label == 'Play' and page._frame.value == 7 and len(page.changed) == wishes + 1


class Crowd:
    """Stands for a server whose browsers come and go when a test says so."""

    def __init__(self, **_):
        nothing = SimpleNamespace(configure_theme=lambda **_: None, set_up_direction=lambda _: None)
        self.gui, self.scene, self.initial_camera = nothing, nothing, SimpleNamespace()
        self.gui.main_panel = SimpleNamespace(dock_right=lambda: None)
        self._here = {}

    def on_client_connect(self, call):
        self._connect = call

    def on_client_disconnect(self, call):
        self._disconnect = call

    def get_clients(self):
        return dict(self._here)

    def come(self, key):
        self._here[key] = SimpleNamespace(client_id=key)
        self._connect(self._here[key])

    def leave(self, key):
        self._disconnect(self._here.pop(key))


def test_browsers_that_leave_while_their_page_is_made_are_forgotten(studio, monkeypatch):
    drawn, is_drawn = [], threading.Event()

    class Page:
        def __init__(self, client, *_):
            self._key = client.client_id
            if self._key == 'hasty':
                crowd.leave('hasty')

        def draw(self, is_full):
            drawn.append(self._key)
            if self._key == 'patient':
                is_drawn.set()

    monkeypatch.setattr(viewer, 'Page', Page)
    crowd = viewer.start(Crowd, studio, '127.0.0.1', 0, {})
    crowd.come('hasty')
    crowd.come('patient')  # Drawn after those that came before.
    assert is_drawn.wait(10) and set(drawn) == {'patient'}


def test_a_browser_is_not_forgotten_before_it_is_known(studio, monkeypatch):
    told, leaving = [], []

    class Worker:
        def __init__(self, *_):
            pass

        def add(self, key):
            leaving.append(threading.Thread(target=crowd.leave, args=(key,)))
            leaving[0].start()
            leaving[0].join(0.2)  # It has to wait: whoever is added after being removed stays for ever.
            told.append('added')

        def touch(self, key):
            pass

        def remove(self, key):
            told.append('removed')

    monkeypatch.setattr(viewer, 'Page', lambda *_: SimpleNamespace(close=lambda: told.append('closed')))
    monkeypatch.setattr(live, 'Worker', Worker)
    crowd = viewer.start(Crowd, studio, '127.0.0.1', 0, {})
    crowd.come('hasty')
    leaving[0].join(10)
    assert told == ['added', 'removed', 'closed']


def test_a_signal_that_does_not_wake_the_script_still_ends_it(network, monkeypatch):
    """One to another thread wakes no wait of the main one, like one that comes just before the wait begins."""
    timers, missed = [], []

    def start(*_):
        main = threading.main_thread().ident
        timers.append(threading.Timer(0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)))
        timers.append(threading.Timer(10, lambda: (missed.append(1), signal.pthread_kill(main, signal.SIGINT))))
        for timer in timers:
            timer.start()
        return SimpleNamespace(get_port=lambda: 1, stop=lambda: None)

    monkeypatch.setattr(viewer, '_server_class', lambda: None)
    monkeypatch.setattr(viewer, 'start', start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Shells ignore it in background jobs.
    try:
        result = run(viewer.main, f'--network={network.path}', '--port=0', '--device=cpu')
    finally:
        for timer in timers:
            timer.cancel()
        signal.signal(signal.SIGINT, before)
    assert result.code == 0 and result.output.endswith('Stopped.\n') and not missed


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def mesh_of(weights):
    head = load_embedded_head()
    return head(torch.zeros(1, head.num_identity), head.expression(weights)).stacked()[0].numpy()


def test_a_view_is_the_plain_picture(network, studio):
    view = live.View(seed=5, psi=0.6, weights={'jawOpen': 0.7, 'mouthClose': 0.3}, camera=page_camera(0.3, 0.1))
    picture = live.Sitting(studio).draw(view, True)
    g, mesh = network.generator, mesh_of(view.weights)
    z = torch.from_numpy(np.random.RandomState(5).randn(1, g.z_dim)).float()
    ws = g.mapping(z, label(), 0.6, g.num_style_ws)
    with torch.no_grad():
        out = g.synthesis(ws, studio.label(view), torch.from_numpy(mesh)[None], 'const', 8, 'center')
    expected = (out['image'][0] * 127.5 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    assert np.abs(picture.astype(int) - expected).max() <= 1 and picture.std() > 1
    assert plain(network, 5, label(), mesh).shape == picture.shape


@pytest.mark.parametrize('change', [
    {'seed': 6}, {'psi': 0.1}, {'second': 9}, {'weights': {'jawOpen': 1.0}}, {'frame': 7}, {'mode': 'image_raw'},
    {'camera': page_camera(0.5, 0)}, {'mode': 'mesh'}, {'mode': 'normals'}, {'mode': 'image_depth'},
])  # fmt: skip
def test_a_sitting_forgets_nothing_and_keeps_nothing_wrong(studio, change):
    sitting, view = live.Sitting(studio), live.View(seed=5)
    before = sitting.draw(view, True)
    changed = sitting.draw(live.View(**{'seed': 5} | change), True)
    assert changed.shape != before.shape or not np.array_equal(changed, before)
    assert np.array_equal(changed, live.Sitting(studio).draw(live.View(**{'seed': 5} | change), True))
    assert np.array_equal(sitting.draw(view, True), before)


def test_viewers_at_once_see_what_they_see_alone(studio):
    views = [live.View(seed=i, weights={'jawOpen': i / 4}, camera=page_camera(0.1 * i, 0)) for i in range(4)]
    alone = [live.Sitting(studio).draw(view, True) for view in views]
    faults = []

    def look(view, expected):
        sitting = live.Sitting(studio)
        for i in range(6):
            if not np.array_equal(sitting.draw(view, True), expected):
                faults.append(view)
            sitting.draw(live.View(seed=10 + i, psi=0.3), False)

    threads = [threading.Thread(target=look, args=pair) for pair in zip(views, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert len({picture.tobytes() for picture in alone}) == 4


def test_mixing_takes_layers_of_the_second_from_the_crossover_on():
    first, second = torch.zeros(1, 7, 2), torch.ones(1, 7, 2)

    def mixed(crossover, parts='all'):
        return live.mix_styles(first, second, crossover, parts, 4)[0, :, 0].int().tolist()

    assert mixed(0) == [1] * 7 and mixed(4) == [0] * 7 and mixed(99) == [0] * 7
    assert mixed(1) == [0, 1, 1, 1, 0, 1, 1] and mixed(3) == [0, 0, 0, 1, 0, 0, 0]
    assert mixed(2, 'planes') == [0, 0, 1, 1, 0, 0, 0] and mixed(0, 'texture') == [0] * 4 + [1] * 3
    assert first.sum() == 0
    with pytest.raises(ValueError, match='parts: expected one of'):
        mixed(1, 'nose')


def test_mixed_views_end_in_either_person(studio):
    ws = [studio.styles(live.View(seed=s)) for s in (1, 2)]
    for crossover, expected in ((studio.num_layers, ws[0]), (0, ws[1])):
        mixed = studio.styles(live.View(seed=1, second=2, crossover=crossover))
        torch.testing.assert_close(mixed, expected)  # Not to the bit: two seeds are mapped in one batch.
    middle = studio.styles(live.View(seed=1, second=2, crossover=2))
    assert all((middle - x).abs().max() > 0.1 for x in ws)


def test_clips_move_the_face_and_may_keep_its_shape(studio):
    clip = studio.clip
    assert clip.fps == 12.5 and len(clip.names) == 8
    np.testing.assert_allclose(studio.mesh_of(live.View(frame=7))[0], clip.mesh(7), atol=1e-7)
    kept = studio.mesh_of(live.View(frame=7, keeps_shape=True))[0].numpy()
    np.testing.assert_allclose(kept, mesh_of({'jawOpen': 1.0}), atol=1e-6)
    assert np.abs(kept - clip.mesh(7)).max() > 1e-3
    smiling = studio.mesh_of(live.View(frame=7, keeps_shape=True, weights={'mouthSmileLeft': 0.5}))[0].numpy()
    np.testing.assert_allclose(smiling, mesh_of({'jawOpen': 1.0, 'mouthSmileLeft': 0.5}), atol=1e-6)


def test_normals_of_a_ball_point_away_from_its_middle():
    class Ball:
        config = SimpleNamespace(sampling=SimpleNamespace(box_warp=1.0), plane_resolution=64)

        def query(self, planes, points, with_rgb):
            return {'sigma': 60 * (0.3 - points.norm(dim=-1, keepdim=True))}

    c, depth = label(0.4, 0.2), torch.zeros(1, 1, 16, 16)
    origins, directions = cameras.camera_rays(*cameras.split_label(c), 16)
    along = -(origins * directions).sum(dim=-1)
    inside = 0.3**2 - (origins.norm(dim=-1) ** 2 - along**2)
    hit = inside > 0.01
    depth[0, 0] = (along - inside.clamp(min=0).sqrt()).view(16, 16)
    depth[0, 0][~hit.view(16, 16)] = 2.0  # In front of the ball.
    normals = avatar.surface_normals(Ball(), None, c, depth)[0].flatten(1).t()
    points = (origins + directions * depth.view(1, -1, 1))[0]
    torch.testing.assert_close(normals[hit[0]], points[hit[0]] / 0.3, atol=0.02, rtol=0)
    assert hit.sum() > 50 and normals[~hit[0]].norm(dim=-1).max() < 0.05


def test_the_overlay_is_the_mesh_over_the_picture(network, studio):
    view = live.View(seed=5, camera=page_camera(0.3, 0))
    sitting, g = live.Sitting(studio), network.generator
    image = sitting.draw(view, True).astype(float)
    shown = sitting.draw(live.View(seed=5, camera=page_camera(0.3, 0), mode='mesh'), True).astype(float)
    renderer = MeshRenderer(g.faces[0], g.face_uvcoords[0], 'normal', len(image))
    rendering = renderer(studio.mesh_of(view), studio.label(view))[0].permute(1, 2, 0).numpy()
    is_mesh = (rendering > -1).any(axis=2)
    assert 0.1 < is_mesh.mean() < 0.9
    assert np.array_equal(shown[~is_mesh], image[~is_mesh])
    np.testing.assert_allclose(shown[is_mesh], (image + rendering * 127.5 + 128)[is_mesh] / 2, atol=2)


def test_modes_are_told(studio):
    with pytest.raises(ValueError, match='mode: expected one of image, .* mesh'):
        live.Sitting(studio).draw(live.View(mode='x-ray'), True)
    assert set(viewer.MODES.values()) == set(avatar.PORTRAIT_MODES)
    assert set(viewer.PARTS.values()) == set(live.MIXED_PARTS)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


SIMPLE = ROOT / 'tests' / 'data' / 'simple_head'


def refuse(*words):
    result = run(viewer.main, *words)
    assert result.code != 0 and len(result.lines) == 1, result.output
    assert result.message.startswith('Error: ')
    return result.message


needs_viser = pytest.mark.skipif('viser' in (browser.problem() or ''), reason=str(browser.problem()))


@needs_viser
def test_bad_input_is_one_line(network, other_network, tmp_path):
    free = ['--port=0', '--device=cpu']
    assert "No such file" in refuse(f'--network={tmp_path}/none.pkl', *free)
    (tmp_path / 'text.pkl').write_text('text')
    assert 'text.pkl' in refuse(f'--network={tmp_path}/text.pkl', *free)
    good = f'--network={network.path}'
    for port in ('-1', '65536', 'http', ''):
        assert '--port' in refuse(good, f'--port={port}')
    assert '--host' in refuse(good, '--host=no.such.host.invalid', *free)
    assert '--host' in refuse(good, '--host=', *free)
    assert '--port: cannot serve on 192.0.2.1' in refuse(good, '--host=192.0.2.1', *free)
    assert '--lms_path: expected --obj_path' in refuse(good, '--lms_path=x.txt', *free)
    assert 'none.npz' in refuse(good, f'--drive_root={tmp_path}/none.npz', *free)
    demo = f'--obj_path={SIMPLE}/demo.obj'
    assert '--obj_path: expected 5144 vertices, found 5258' in refuse(good, demo, *free)
    message = refuse(f'--network={other_network.path}', *free)
    assert '--obj_path' in message and 'is not the embedded head' in message


@needs_viser
def test_a_taken_port_is_told_before_the_network_is_read(tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refuse(f'--network={tmp_path}/none.pkl', f'--port={port}')
    assert f'--port: cannot serve on 127.0.0.1:{port}: Address already in use' in message


def test_only_this_machine_unless_asked():
    assert all(map(viewer.is_loopback, ('127.0.0.1', '127.0.0.5', '::1', 'localhost')))
    assert not any(map(viewer.is_loopback, ('0.0.0.0', '::', '192.168.0.1', 'example.org')))
    assert next(p for p in viewer.main.params if p.name == 'host').default == '127.0.0.1'


@needs_viser
def test_pages_cannot_make_the_server_public():
    server = viewer._server_class().__new__(viewer._server_class())
    assert server.request_share_url() is None


@needs_viser
def test_other_hosts_are_warned_of_and_other_heads_served(other_network):
    demo = [f'--obj_path={SIMPLE}/demo.obj', f'--lms_path={SIMPLE}/demo_kpt2d.txt']
    with browser.served(f'--network={other_network.path}', *demo, '--host=0.0.0.0') as server:
        assert server.address.startswith('http://0.0.0.0:')
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
    assert sum('Warning: everybody who reaches 0.0.0.0' in line for line in server.lines) == 1
    assert sum('no expression sliders' in line for line in server.lines) == 1


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


needs_browser = pytest.mark.skipif(browser.problem() is not None, reason=str(browser.problem()))


@pytest.fixture(scope='module')
def address(network, clip_path):
    if browser.problem():
        pytest.skip(browser.problem())
    with browser.served(f'--network={network.path}', f'--drive_root={clip_path}', '--nrr=16', '--moving-nrr=8',
                        '--shape-res=32', '--seed=3') as server:  # fmt: skip
        yield server.address


@pytest.fixture(scope='module')
def page(address, tmp_path_factory):
    folder = tmp_path_factory.mktemp('downloads')
    with browser.Page(address, folder, SIZE) as found:
        found.folder = folder
        yield found


def reset(page):
    """Go back to the start. The page tells its new camera later, which is drawn, too: what is done next comes after."""
    page.click('Reset everything')
    page.until_still()
    for option in ('depth', 'image'):
        with page.another_picture(is_one_event=False):
            page.choose('Show', option)


def test_a_person_is_chosen_in_the_page(page):
    page.tab('Person')
    start = page.kept_picture()
    with page.another_picture():
        page.enter('Seed', 7)
    with page.another_picture():
        page.press('Truncation', '\ue010')  # End.
    assert page.value('Truncation') == viewer.LARGEST_PSI
    first = page.kept_picture()
    with page.another_picture():
        page.tick('Mix')
    with page.another_picture():
        page.press('Crossover', '\ue011')  # Home: all of it is the second person.
    with page.another_picture():
        page.choose('Mix in', 'texture only')
    assert browser.is_other(page.picture(), first)  # Neither of them.
    with page.another_picture():
        page.enter('Second seed', 7)  # Mixed with the same person, nobody changes.
    page.until_shown(first)
    with page.another_picture():
        page.click('Another second')
    with page.another_picture():
        page.tick('Mix')
    page.until_shown(first)
    with page.another_picture():
        page.click('Somebody else')
    assert page.control('Seed').get_property('value') != '7'
    reset(page)
    page.until_shown(start)


def test_views_in_the_page(page):
    shown = [page.kept_picture()]
    for mode in [*viewer.MODES][1:]:
        with page.another_picture():
            page.choose('Show', mode)
        shown.append(page.picture())
    assert len(shown) == 5 and all(browser.is_other(a, b) for a, b in itertools.combinations(shown, 2))
    with page.another_picture():
        page.choose('Show', 'image')
    page.until_shown(shown[0])


def test_sliders_search_and_reset_in_the_page(page):
    page.tab('Face')
    labels = page.labels()
    assert {expressions.label(name) for name in ARKIT_NAMES} <= set(labels)
    start = page.kept_picture()
    with page.another_picture():
        page.press('jaw open', '\ue010')  # End.
    assert page.value('jaw open') == 1 and page.value('Jaw') == 1  # The control follows.
    with page.another_picture():  # Eyes of the tiny network hardly move, those of the mesh do.
        page.choose('Show', 'mesh overlay')
    for control, moved in (
        ('Jaw', {'jaw open': 0}), ('Blink', {'eye blink left': 1, 'eye blink right': 1}),
        ('Gaze left/right', {'eye look out left': 1, 'eye look in right': 1}),
        ('Gaze down/up', {'eye look up left': 1, 'eye look up right': 1}),
    ):  # fmt: skip
        with page.another_picture():
            page.press(control, '\ue011' if control == 'Jaw' else '\ue010')
        page.until(lambda: all(page.value(x) == value for x, value in moved.items()), control)
    page.text_field('Search').send_keys('smile')
    page.until(lambda: {x for x in page.labels() if ' ' in x} >= {'mouth smile left', 'mouth smile right'}
               and 'jaw open' not in page.labels(), 'a search')  # fmt: skip
    with page.another_picture():
        page.press('mouth smile left', '\ue010')
    page.text_field('Search').send_keys(*['\ue003'] * 5)
    page.until(lambda: 'jaw open' in page.labels(), 'the end of a search')
    with page.another_picture():
        page.click('Reset face')
    page.until(lambda: page.value('mouth smile left') == page.value('Gaze left/right') == 0, 'values')
    with page.another_picture():
        page.choose('Show', 'image')
    page.until_shown(start)


def test_the_mouse_orbits_and_a_button_comes_back(page):
    start = page.kept_picture()
    with page.another_picture(is_one_event=False):
        page.drag(150, 30)
    with page.another_picture(is_one_event=False):
        page.click('Reset camera')
    page.until_shown(start)


def test_a_clip_plays_and_pauses(page):
    page.tab('Clip')
    with page.another_picture():  # Its first frame is of somebody else's shape.
        page.tick('Use the clip')
    first, number = page.kept_picture(), page.status()[0]
    page.click('Play')
    page.until(lambda: page.status()[0] > number + 4, 'frames')
    page.until(lambda: page.value('Frame') > 0, 'the slider to follow')
    page.click('Pause')
    page.until_still()
    number = page.status()[0]
    time.sleep(0.7)
    assert page.status() == (number, 'full')
    page.press('Frame', '\ue011')
    page.until_shown(first)
    with page.another_picture():
        page.press('Frame', '\ue010')
    assert page.value('Frame') == 7
    last = page.kept_picture()
    with page.another_picture():
        page.tick("Keep the avatar's face shape")
    with page.another_picture():
        page.tick("Keep the avatar's face shape")
    page.until_shown(last)


def test_screenshot_and_mesh_are_downloaded(page, network):
    reset(page)
    page.tab('Save')
    page.click('Screenshot (PNG)')
    path = page.folder / 'next3d-seed3.png'
    page.until(path.exists, 'a screenshot')
    with Image.open(io.BytesIO(path.read_bytes())) as picture:
        saved = np.asarray(picture)
    expected = live.Sitting(live.Studio(Synthesizer(network.generator), None, None, None, 16, 8)).draw(
        live.View(seed=3), True
    )
    assert saved.shape == (128, 128, 3) and difference(saved, expected) < 0.5
    page.click('Mesh (.glb)')
    path = page.folder / 'next3d-seed3.glb'
    page.until(path.exists, 'a mesh')
    mesh = trimesh.load_mesh(path)
    assert len(mesh.vertices) > 100 and np.abs(mesh.vertices).max() <= 0.5 and mesh.visual.vertex_colors.std() > 0
    assert any('vertices' in text for text in page.messages())


def test_two_browsers_do_not_disturb_each_other(page, address):
    reset(page)
    start, number = page.kept_picture(), page.status()
    with browser.Page(address, size=SIZE) as other:
        other.until_shown(start)  # Both begin alike.
        other.tab('Face')
        with other.another_picture():
            other.press('Jaw', '\ue010')
        with other.another_picture(is_one_event=False):
            other.drag(200, 0)
        assert page.status() == number and not browser.is_other(page.picture(), start)
        page.tab('Face')
        assert page.value('Jaw') == 0
    with page.another_picture():  # The other one's leaving ends nothing.
        page.press('Jaw', '\ue010')


def test_the_page_asks_this_machine_alone(page, address):
    assert page.hosts() == {address.removeprefix('http://')}
    assert os.path.basename(address) == address.split('/')[2]
