# SPDX-License-Identifier: Apache-2.0
"""Serve a web page with a live avatar: orbit, seeds, expressions, clips, screenshots and meshes; docs/viewer.md."""

import contextlib
import functools
import html
import io
import ipaddress
import random
import socket
import threading
import time

import click
import numpy as np
from PIL import Image

import cli
from geometry import expressions, orbit, shapes
from training import driving, live, surface
from training.inference import DTYPES, Synthesizer

TITLE = 'Next3D'
PORT = 8080
FPS = 30  # Of clips that do not say theirs.
MODES = {'image': 'image', 'raw': 'image_raw', 'depth': 'image_depth', 'normals': 'normals', 'mesh overlay': 'mesh'}
PARTS = {'everything': 'all', 'planes only': 'planes', 'texture only': 'texture'}
CONTROL_LABELS = {'jaw': 'Jaw', 'blink': 'Blink', 'gaze_x': 'Gaze left/right', 'gaze_y': 'Gaze down/up'}
LARGEST_PSI = 1.5
MAX_SHAPE_RES = 512
SMALLEST_PICTURE = 256  # Pixels: smaller ones are enlarged, so that margins are exact to half a percent.
MARGIN = 24  # Grey beside a picture in a window that is not square.
JPEG_QUALITY = 90
SLIDER_STEP = 0.01


@click.command(cls=cli.Command)
@cli.option('network', metavar='PATH|URL', type=cli.PathText(), required=True,
            help='Network file: published pickle or own snapshot.')
@cli.option('obj_path', metavar='PATH', type=cli.PathText(),
            help="Head mesh (.obj) of the network's topology; default: the mean of the embedded head.")
@cli.option('lms_path', metavar='PATH', type=cli.PathText(),
            help='Its 68 landmarks; default: NAME_kpt2d.txt beside it, else those of the embedded head.')
@cli.flag('lms_cond', help='Accepted for the published command lines; landmarks are always read.')
@cli.option('drive_root', metavar='DIR|NPZ', type=cli.PathText(),
            help='Driving clip to play: FRAME.obj and FRAME_kpt2d.txt of each frame, or one .npz.')
@cli.flame_path()
@cli.flag('skip_missing', help='Leave out frames of the clip that lack a file or hold a broken one.')
@cli.option('seed', metavar='N', type=click.IntRange(0, cli.MAX_SEED), default=0, show_default=True,
            help='Who is shown first.')
@cli.option('trunc', metavar='PSI', type=cli.FiniteFloat(), default=0.7, show_default=True,
            help='Truncation at first.')
@cli.option('trunc_cutoff', metavar='N', type=click.IntRange(min=0), show_default='14 in published networks',
            help="Truncate this many of the first w vectors; default: all but the texture's.")
@cli.option('nrr', metavar='N', type=click.IntRange(1, 1024), show_default="the checkpoint's",
            help='Side of the rendered picture when nothing moves.')
@cli.option('moving_nrr', metavar='N', type=click.IntRange(1, 1024), show_default='half of --nrr, on a GPU all',
            help='Side of the rendered picture while something moves.')
@cli.option('shape_res', metavar='N', type=click.IntRange(8, MAX_SHAPE_RES), default=256, show_default=True,
            help='Samples per axis of the grid for .glb files.')
@cli.option('host', metavar='ADDRESS', type=cli.PathText(), default='127.0.0.1', show_default=True,
            help='Address to serve on; by default only this machine reaches the page.')
@cli.option('port', metavar='N', type=click.IntRange(0, 65535), default=PORT, show_default=True,
            help='Port to serve on; 0: any that is free.')
@cli.option('device', type=cli.Device(), default='auto', show_default=True,
            help='cpu, cuda, cuda:N; auto: cuda when present.')
@cli.option('dtype', type=click.Choice(list(DTYPES)), default='fp16', show_default=True,
            help='Arithmetic on a GPU: bf16 where pictures are not finite; a CPU takes fp32.')
def main(network, host, port, device, **options):
    """Serve a page with the avatar of a network until Ctrl-C; it needs requirements-viewer.txt.

    \b
    python viewer.py --network=NETWORK.pkl --drive_root=data/clip --port=8080
    """
    check_free(host, port)
    server_class = _server_class()
    own = _own_mesh(options['obj_path'], options['lms_path'])
    click.echo(f'Loading networks from "{network}"...')
    generator = cli.load_next3d(network, device)
    studio = make_studio(generator, own, options)
    server = start(server_class, studio, host, port, options)
    try:
        if not is_loopback(host):
            click.echo(f'Warning: everybody who reaches {host} can use this page; there is no password.', err=True)
        click.echo(f'Serving http://{_shown(host)}:{server.get_port()} (Ctrl-C ends)')
        while True:  # Not one long wait: a signal that came just before its start would not end it.
            time.sleep(1)
    except KeyboardInterrupt:
        click.echo('Stopped.')
    finally:
        _quietly(server.stop)


def check_free(host: str, port: int) -> None:
    """Raise a usage error where a host is none of this machine's or a port is taken."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise click.UsageError(f"--host: expected an address of this machine, got {host!r}: {reason}.") from None
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise click.UsageError(
                f'--port: cannot serve on {host}:{port}: {error.strerror}; --port=0 takes any port that is free.'
            ) from None


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == 'localhost'


def _shown(host):
    """Return an address as a part of a URL."""
    return f'[{host}]' if ':' in host else host


def _server_class():
    try:
        import viser
    except ImportError:
        raise click.ClickException('viewer.py needs viser: pip install -r requirements-viewer.txt') from None

    class Server(viser.ViserServer):
        """A server that no page can make public: viser's would open a tunnel to the internet when a page asks."""

        def request_share_url(self, verbose=True):
            return None

    return Server


def _own_mesh(obj_path, lms_path):
    if obj_path is not None:
        return cli.read_own_mesh('--obj_path', obj_path, lms_path)
    if lms_path is not None:
        raise click.UsageError('--lms_path: expected --obj_path with it, got none.')
    return None


def make_studio(generator, own: np.ndarray | None, options: dict) -> live.Studio:
    """Return the studio of a network, the avatar's own mesh and the options; refuse what does not fit."""
    head = live.embedded_head_of(generator)
    if own is None and head is None:
        raise click.UsageError(
            f"--obj_path: expected the head's mesh, got none: the network's, of {generator.num_vertices} vertices, is "
            'not the embedded head.'
        )
    found = None if own is None else len(own) - driving.NUM_LANDMARKS
    if found not in (None, generator.num_vertices):
        raise click.UsageError(f'--obj_path: expected {generator.num_vertices} vertices, found {found}.')
    if head is None:
        click.echo("The network's head is not the embedded one: no expression sliders.", err=True)
    clip = _open_clip(options, generator.num_vertices)
    if clip is not None:
        cli.fit_clip(generator, clip, '--drive_root')
    synthesizer = Synthesizer(generator, options['dtype'])
    full, coarse = options['nrr'] or generator.neural_rendering_resolution, options['moving_nrr']
    if coarse is None:
        coarse = max(1, full // 2) if synthesizer.device.type == 'cpu' else full
    return live.Studio(synthesizer, own, clip, options['trunc_cutoff'], full, coarse)


def _open_clip(options, num_vertices):
    """Return the clip, of coefficients where it has some for meshes of the network, else of its meshes.

    Where coefficients cannot be used but meshes can, a warning says why. None: no clip was asked for.
    """
    if options['drive_root'] is None:
        return None
    choices = dict(needs_labels=False, skip_missing=options['skip_missing'], flame_path=options['flame_path'])
    open_clip = functools.partial(driving.open_clip, options['drive_root'], **choices)
    try:
        clip = open_clip(with_coefficients=True)
        if clip.num_vertices == num_vertices:
            return clip
        fault = f'{options["drive_root"]}: coefficients of a head of {clip.num_vertices} vertices, not {num_vertices}'
    except driving.NoCoefficientsError:
        return open_clip()
    except (driving.DatasetError, FileNotFoundError) as error:
        fault = cli.describe(error)
    clip = open_clip()  # Where that has no meshes either, its error is all that is told.
    if clip.num_vertices == num_vertices:
        plays = "the clip's meshes are played, and cannot keep the avatar's face shape"
        click.echo(f'Warning: {fault}; {plays}.', err=True)
    return clip


def start(server_class, studio: live.Studio, host: str, port: int, options: dict):
    """Return a running server with a page for each browser that comes."""
    server = _quietly(server_class, host=host, port=port, label=TITLE, verbose=False)
    if port and server.get_port() != port:  # Somebody took it in the meantime.
        _quietly(server.stop)
        raise click.UsageError(f'--port: cannot serve on {host}:{port}: Address already in use.')
    server.gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False, control_width='large')
    server.gui.main_panel.dock_right()
    server.scene.set_up_direction('+y')
    camera = server.initial_camera
    camera.position, camera.look_at, camera.up = orbit.start_camera(studio.pivot, studio.radius)
    camera.fov = orbit.view_angle(1.0)
    pages, lock = {}, threading.Lock()

    def draw(key, is_full):
        page = pages.get(key)
        return None if page is None else page.draw(is_full)

    def report(key, error):
        page = pages.get(key)
        if page is not None:
            page.tell(f'No picture: {cli.describe(error)}')

    worker = live.Worker(draw, report)

    def connect(client):
        page = Page(client, studio, options, functools.partial(worker.touch, client.client_id))
        with lock:
            if client.client_id in server.get_clients():  # Else it has left while its page was made.
                pages[client.client_id] = page
                worker.add(client.client_id)

    def disconnect(client):
        with lock:
            page = pages.pop(client.client_id, None)
            worker.remove(client.client_id)
        if page is not None:
            page.close()

    server.on_client_connect(connect)
    server.on_client_disconnect(disconnect)
    return server


def _quietly(call, *args, **kwargs):
    """Call what prints a greeting of its own."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Page


class _BrowserLeft(Exception):
    pass


class Page:
    """The controls and the picture of one browser; nothing in it is another's.

    client: viser's. changed: has the picture drawn anew, from any thread.
    """

    def __init__(self, client, studio: live.Studio, options: dict, changed):
        self._client, self._gui, self._studio, self._changed = client, client.gui, studio, changed
        self._options, self._sitting, self._pictures, self._has_left = options, live.Sitting(studio), 0, False
        self._fps = (studio.clip.fps or FPS) if studio.clip else FPS
        self._player = live.Player(len(studio.clip.names), self._fps) if studio.clip else None
        self._sliders, self._folders, self._controls = {}, {}, {}
        nearest, farthest = orbit.distance_range(studio.pivot, studio.radius)
        client.camera.max_orbit_distance, client.camera.min_orbit_distance = farthest, nearest
        with client.atomic():
            self._add_all()
        client.camera.on_update(self._camera_moved)
        self._camera_moved(client.camera)

    def view(self) -> live.View:
        """Return what the controls and the camera say now."""
        camera = self._client.camera
        weights = {name: float(np.clip(slider.value, 0, 1)) for name, slider in self._sliders.items()}
        has_clip = self._player is not None and self._uses_clip.value
        return live.View(
            seed=int(self._seed.value), psi=self._psi.value,
            second=int(self._second.value) if self._mixes.value else None, crossover=int(self._crossover.value),
            parts=PARTS[self._parts.value], weights=weights,
            frame=self._player.at(time.monotonic()) if has_clip else None,
            keeps_shape=has_clip and self._keeps_shape.value, mode=MODES[self._mode.value],
            camera=(camera.position, camera.look_at, camera.up_direction),
        )  # fmt: skip

    def draw(self, is_full: bool) -> float | None:
        """Draw and show the picture; return when a playing clip needs the next one."""
        begin, view = time.monotonic(), self.view()
        if view.frame is not None and self._player.is_playing:  # Standing still, it is where somebody has put it.
            self._frame.value = view.frame
        picture = self._sitting.draw(view, is_full)
        framed = fit_window(enlarge(picture), self._client.camera.aspect)
        kind = {'format': 'png'} if is_full else {'format': 'jpeg', 'jpeg_quality': JPEG_QUALITY}
        self._client.scene.set_background_image(framed, **kind)
        self._pictures += 1
        side = self._studio.resolution if is_full else self._studio.coarse
        seconds = time.monotonic() - begin
        self.tell(f'Picture {self._pictures}: {"full" if is_full else "coarse"}, {side}² rays, {seconds:.2f} s')
        self._client.flush()
        if view.frame is None:
            return None
        if self._play.label != self._play_label():  # It has come to its end.
            self._play.label, self._frame.value = self._play_label(), self._player.at(begin)
            self._changed()
        return self._player.next_change(time.monotonic())

    def close(self) -> None:
        """Stop what still goes on for a browser that has left."""
        self._has_left = True

    def tell(self, text: str) -> None:
        """Show a line above the controls."""
        style = 'margin:0 0.75em 0.5em;opacity:0.7;font-size:0.8em'
        self._status.content = f'<p data-status style="{style}">{html.escape(text)}</p>'

    def _watch(self, handle, before=None):
        """Have the picture drawn anew when somebody moves a control, after `before` has been called.

        Each change is dealt with before the next: in threads of a pool, an older one could have the last word.
        """

        @handle.on_update
        async def _(event):
            if event.client is not None:  # What the page sets by itself is drawn by who sets it.
                if before is not None:
                    before()
                self._changed()

        return handle

    def _button(self, label, act, **kwargs):
        button = self._gui.add_button(label, **kwargs)
        button.on_click(lambda _: act())
        return button

    # -- Controls

    def _add_all(self):
        gui = self._gui
        self._mode = self._watch(gui.add_dropdown('Show', tuple(MODES), hint='What the picture shows.'))
        self._status = gui.add_html('')
        self.tell('...')
        tabs = gui.add_tab_group()
        with tabs.add_tab('Person'):
            self._add_person()
        with tabs.add_tab('Face'):
            self._add_face()
        if self._player is not None:
            with tabs.add_tab('Clip'):
                self._add_clip()
        with tabs.add_tab('Save'):
            self._add_save()
        self._button('Reset camera', self._reset_camera)
        self._button('Reset everything', self._reset)

    def _add_person(self):
        gui, studio, options = self._gui, self._studio, self._options
        self._seed = self._watch(gui.add_number('Seed', options['seed'], min=0, max=cli.MAX_SEED, step=1))
        self._button('Somebody else', functools.partial(self._random_seed, '_seed'))
        psi = options['trunc']
        self._psi = self._watch(gui.add_slider(
            'Truncation', min(0.0, psi), max(LARGEST_PSI, psi), SLIDER_STEP, psi,
            hint='0: the mean person. Above 1: exaggerated.',
        ))
        with gui.add_folder('Mix with a second person'):
            self._mixes = self._watch(gui.add_checkbox('Mix', False))
            self._second = self._watch(gui.add_number('Second seed', 1, min=0, max=cli.MAX_SEED, step=1))
            self._button('Another second', functools.partial(self._random_seed, '_second'))
            self._crossover = self._watch(gui.add_slider(
                'Crossover', 0, studio.num_layers, 1, studio.num_layers // 2,
                hint='Layers below it come from the seed above, from it on from the second: coarse ones come first.',
            ))
            self._parts = self._watch(gui.add_dropdown(
                'Mix in', tuple(PARTS), hint='The static planes with the renderer, the texture of the face, or both.'
            ))

    def _add_face(self):
        gui, names = self._gui, self._studio.expression_names
        if not names:
            gui.add_markdown("The network's head is not the embedded one: expressions come from its mesh or a clip.")
            return
        for control in expressions.controlled(names):
            low = -1.0 if expressions.CONTROLS[control][1] else 0.0
            slider = gui.add_slider(CONTROL_LABELS[control], low, 1.0, SLIDER_STEP, 0.0)
            self._controls[control] = self._watch(slider, functools.partial(self._control_moved, control))
        self._button('Reset face', self._reset_face)
        self._search = gui.add_text('Search', '', hint="Words of an expression's name or group, such as 'smile left'.")

        @self._search.on_update
        async def _(_):
            self._filter()

        for group, members in expressions.grouped(names).items():
            self._folders[group] = gui.add_folder(group)
            with self._folders[group]:
                for name in members:
                    slider = gui.add_slider(expressions.label(name), 0.0, 1.0, SLIDER_STEP, 0.0, hint=name)
                    self._sliders[name] = self._watch(slider, self._expression_moved)

    def _add_clip(self):
        gui, player = self._gui, self._player
        self._uses_clip = self._watch(gui.add_checkbox('Use the clip', False))
        self._play = self._button('Play', self._toggle_play)
        self._frame = self._watch(gui.add_slider('Frame', 0, max(1, player.count - 1), 1, 0), self._frame_moved)
        self._speed = self._watch(gui.add_slider('Frames a second', 1.0, max(60.0, self._fps), 0.5, float(self._fps)),
                                  lambda: player.set_fps(self._speed.value, time.monotonic()))
        self._loops = self._watch(gui.add_checkbox('Loop', True), self._loop_set)
        self._keeps_shape = self._watch(gui.add_checkbox(
            "Keep the avatar's face shape", False, disabled=self._studio.retargeted is None,
            hint="Take only the expression from the clip: for clips with coefficients.",
        ))

    def _add_save(self):
        self._button('Screenshot (PNG)', self._screenshot)
        self._shape_res = self._gui.add_slider(
            'Grid', 8, MAX_SHAPE_RES, 1, self._options['shape_res'], hint='Samples per axis of the mesh.'
        )
        self._export = self._button('Mesh (.glb)', self._save_mesh)

    # -- What they do

    def _camera_moved(self, camera):
        angle = orbit.view_angle(camera.aspect)
        if abs(camera.fov - angle) > 1e-4:
            camera.fov = angle
        self._changed()

    def _random_seed(self, which):
        getattr(self, which).value = random.randint(0, cli.MAX_SEED)
        self._changed()

    def _control_moved(self, control):
        for name, weight in expressions.control_weights(control, self._controls[control].value).items():
            self._sliders[name].value = weight

    def _expression_moved(self):
        weights = {name: slider.value for name, slider in self._sliders.items()}
        for control, slider in self._controls.items():
            slider.value = round(expressions.control_value(control, weights), 4)

    def _filter(self):
        query = self._search.value
        with self._client.atomic():
            for group, members in expressions.grouped(self._sliders).items():
                fitting = {name for name in members if expressions.matches(query, name)}
                self._folders[group].visible = bool(fitting)
                for name in members:
                    self._sliders[name].visible = name in fitting

    def _frame_moved(self):
        self._uses_clip.value = True
        self._player.seek(int(self._frame.value), time.monotonic())

    def _loop_set(self):
        self._player.seek(self._player.at(time.monotonic()), time.monotonic())
        self._player.loops = self._loops.value

    def _toggle_play(self):
        now = time.monotonic()
        self._uses_clip.value = True
        self._player.pause(now) if self._player.is_playing else self._player.play(now)
        self._play.label, self._frame.value = self._play_label(), self._player.at(now)
        self._changed()

    def _play_label(self):
        return 'Pause' if self._player.is_playing else 'Play'

    def _reset_face(self):
        with self._client.atomic():
            for slider in (*self._sliders.values(), *self._controls.values()):
                slider.value = 0.0
        self._changed()

    def _reset_camera(self):
        camera = self._client.camera
        position, look_at, up = orbit.start_camera(self._studio.pivot, self._studio.radius)
        with self._client.atomic():
            camera.up_direction, camera.position = up, position
            camera.look_at = look_at
        self._changed()

    def _reset(self):
        options = self._options
        with self._client.atomic():
            self._mode.value, self._seed.value, self._psi.value = 'image', options['seed'], options['trunc']
            self._mixes.value, self._second.value, self._parts.value = False, 1, 'everything'
            self._crossover.value = self._studio.num_layers // 2
            if self._player is not None:
                self._reset_clip()
            if self._sliders:
                self._search.value = ''
        self._reset_camera()
        self._reset_face()

    def _reset_clip(self):
        now = time.monotonic()
        self._player.pause(now)
        self._player.seek(0, now)
        self._player.set_fps(float(self._fps), now)
        self._player.loops = True
        self._uses_clip.value, self._loops.value, self._keeps_shape.value = False, True, False
        self._frame.value, self._speed.value, self._play.label = 0, float(self._fps), 'Play'

    def _screenshot(self):
        view = self.view()
        data = io.BytesIO()
        Image.fromarray(self._sitting.draw(view, True)).save(data, format='PNG')
        self._client.send_file_download(f'{_file_stem(view)}.png', data.getvalue(), save_immediately=True)

    def _save_mesh(self):
        """Sample, extract and send the surface; other pages' pictures go on between slabs."""
        view, count = self.view(), int(self._shape_res.value)
        self._export.disabled = True
        note = self._client.add_notification('Mesh', 'Sampling the density...', loading=True, with_close_button=False)
        done = 0

        def count_slab():
            nonlocal done
            if self._has_left:
                raise _BrowserLeft
            done += 1
            if done % max(1, count // 20) == 0:
                note.body = f'Sampling the density: {100 * done // count} %'

        try:
            query, side = self._sitting.query, self._studio.synthesizer.generator.config.sampling.box_warp
            planes = self._sitting.planes(view)
            grid = surface.sample_density(query, planes, side, count, count_slab)
            found = surface.coloured_surface(query, planes, side, grid)
            content = surface.encode_mesh(found.vertices, found.faces, found.colours, 'glb')
            self._client.send_file_download(f'{_file_stem(view)}.glb', content, save_immediately=True)
            note.body = f'{len(found.vertices)} vertices, {len(content) / 1e6:.1f} MB'
        except _BrowserLeft:
            return
        except (shapes.NoSurfaceError, MemoryError, RuntimeError) as error:
            note.body = cli.describe(error) or type(error).__name__
        note.loading, note.with_close_button, note.auto_close_seconds = False, True, 10.0
        self._export.disabled = False


def _file_stem(view):
    second = '' if view.second is None else f'-{view.second}'
    return f'next3d-seed{view.seed}{second}'


def enlarge(picture: np.ndarray) -> np.ndarray:
    """Return a picture [R, R, 3] with each pixel repeated where it has fewer than SMALLEST_PICTURE to a side."""
    times = -(-SMALLEST_PICTURE // len(picture))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def fit_window(picture: np.ndarray, aspect: float) -> np.ndarray:
    """Return a square picture [R, R, 3] in the middle of one [H, W, 3] with W / H = aspect, within a pixel."""
    side = len(picture)
    aspect = float(np.clip(aspect, 0.1, 10)) if np.isfinite(aspect) else 1.0
    height, width = (side, max(side, round(side * aspect))) if aspect >= 1 else (round(side / aspect), side)
    window = np.full([height, width, 3], MARGIN, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    window[top : top + side, left : left + side] = picture
    return window


if __name__ == '__main__':
    main()
