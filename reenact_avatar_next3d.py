# SPDX-License-Identifier: Apache-2.0
"""Reenact: avatars of seeds with the face and the camera of a driving clip."""

import collections
import math
import pathlib

import click
import numpy as np
import torch
from PIL import Image, ImageOps

import cli
from geometry import cameras, paths
from training import avatar, driving, video
from training.inference import DTYPES, Synthesizer
from training.mesh_render import MeshRenderer
from training.pictures import to_bytes

FOV_DEG = 18.837  # Of the published script; 0.03 % from the focal length of training.
FPS = 30  # Where nothing says what the clip has, as published.
NAME = 'reenactment.mp4'
CAMERA_WINDOW = 3  # The published script took the mean of so many.
WIDEST_ROW = 4


class Window(click.ParamType):
    """An odd number of frames."""

    name = 'window'

    def convert(self, value, param, ctx):
        """Return the number."""
        text = str(value)
        if not text.isdecimal() or not 1 <= int(text) <= 999 or int(text) % 2 == 0:
            self.fail(f'expected an odd number of frames from 1 to 999, got {text!r}.', param, ctx)
        return int(text)


@click.command(cls=cli.Command)
@cli.option('drive_root', metavar='DIR|NPZ', type=cli.PathText(), required=True,
            help='Driving clip: FRAME.png, FRAME.obj, FRAME_kpt2d.txt and dataset.json, or one .npz.')
@cli.option('network', metavar='PATH|URL', type=cli.PathText(), required=True,
            help='Network file: published pickle or own snapshot.')
@cli.option('grid', metavar='WxH', type=cli.Grid(),
            help='Columns and rows: the driving frame, then the avatars; with a cell for each seed, avatars only. '
                 'Default: a row, several from five cells on.')
@cli.option('seeds', metavar='LIST', type=cli.SeedList(), required=True, help="Seeds such as '0,3,7-9'.")
@cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Where to save.')
@cli.option('fname', metavar='NAME', type=cli.PathText(), default=NAME, show_default=True, help='Name of the video.')
@cli.option('trunc', metavar='PSI', type=cli.FiniteFloat(), default=1.0, show_default=True, help='Truncation.')
@cli.option('trunc_cutoff', metavar='N', type=click.IntRange(min=0), show_default='14 in published networks',
            help="Truncate this many of the first w vectors; default: all but the texture's.")
@cli.flag('lms_cond', help='Accepted for the published command lines; landmarks are always read.')
@cli.flag('fixed_camera', help="Keep the frontal camera instead of the clip's; dataset.json is then not read.")
@cli.option('num_frames', metavar='N', type=click.IntRange(min=1), show_default='all', help='At most so many frames.')
@cli.option('fov_deg', metavar='DEG', type=cli.FiniteFloat(0, 180), default=FOV_DEG, show_default=True,
            help='Diagonal field of view of the frontal camera.')
@cli.option('retarget', metavar='OBJ', type=cli.PathText(),
            help="The avatars' own neutral mesh: the clip's coefficients move it, its shape stays.")
@cli.flame_path()
@cli.option('smooth_camera', type=Window(), default=CAMERA_WINDOW, show_default=True,
            help='Average cameras over so many frames; 1: none.')
@cli.option('smooth_mesh', type=Window(), default=1, show_default=True, help='Average meshes over so many frames.')
@cli.flag('skip_missing', help='Leave out frames that lack a file or hold a broken one.')
@cli.option('fps', metavar='N', type=cli.FiniteFloat(0, 1000),
            help=f"Frames a second; default: the video's, else the clip's, else {FPS}.")
@cli.option('video', metavar='PATH', type=cli.PathText(), help='Source video of the clip: its sound and rate are kept.')
@cli.option('nrr', metavar='N', type=click.IntRange(1, 1024), show_default="the checkpoint's",
            help='Side of the rendered picture.')
@cli.flag('save_frames', help="Also write the frames as PNG, to a folder of the video's name.")
@cli.option('device', type=cli.Device(), default='auto', show_default=True,
            help='cpu, cuda, cuda:N; auto: cuda when present.')
@cli.option('dtype', type=click.Choice(list(DTYPES)), default='fp16', show_default=True,
            help='Arithmetic on a GPU: bf16 where pictures are not finite; a CPU takes fp32.')
def main(drive_root, network, outdir, seeds, device, **options):
    """Write a video of avatars that do what a driving clip does, beside its frames.

    \b
    python reenact_avatar_next3d.py --drive_root=data/driving --network=NETWORK.pkl --grid=2x1 --seeds=166 \\
        --outdir=out --fname=reenact.mp4 --trunc=0.7 --lms_cond=True
    """
    name = _file_name(options['fname'])
    grid, shows_driving = _grid(options['grid'], len(seeds))
    source = None if options['video'] is None else video.probe(options['video'])
    choices = {name: options[name] for name in ('retarget', 'skip_missing', 'flame_path')}
    clip = cli.open_clip(drive_root, **choices, needs_labels=not options['fixed_camera'], limit=options['num_frames'])
    rate = options['fps'] or (source and source.fps) or clip.fps or FPS
    click.echo(f'Loading networks from "{network}"...')
    generator = cli.load_next3d(network, device)
    cli.fit_clip(generator, clip, '--drive_root')
    synthesizer = Synthesizer(generator, options['dtype'])
    path = cli.make_outdir(outdir) / name
    audio = options['video'] if source and source.has_audio else None
    pictures = cli.frames_folder(path, options['save_frames'])
    with cli.naming(path), video.video_file(path, rate, audio, pictures) as add:
        _draw(synthesizer, clip, seeds, (grid, shows_driving), options, path, add)
    click.echo(f'Wrote {len(clip.names)} {"frame" if len(clip.names) == 1 else "frames"} to {path}')


def _file_name(fname):
    if pathlib.PurePath(fname).name != fname:
        raise click.UsageError(f'--fname: expected a name without folders, got {fname!r}; --outdir says where.')
    return fname if fname.lower().endswith('.mp4') else f'{fname}.mp4'


def _grid(grid, count):
    """Return ((columns, rows), whether the first cell shows the driving frame)."""
    if grid is None:
        columns = count + 1 if count < WIDEST_ROW else math.ceil(math.sqrt(count + 1))
        return (columns, math.ceil((count + 1) / columns)), True
    cells = grid[0] * grid[1]
    if cells < count:
        raise click.UsageError(f'--grid: expected a cell for each of {count} seeds and the driving frame, got {cells}.')
    return grid, cells > count


def _draw(synthesizer, clip, seeds, layout, options, path, add):
    """Draw all frames, read ahead, and add them to the video."""
    ((columns, rows), shows_driving), generator, config = layout, synthesizer.generator, synthesizer.generator.config
    focal = cameras.focal_from_fov(options['fov_deg'])
    frontal = paths.path_labels(paths.fixed_path(1), config.avg_camera_pivot, config.avg_camera_radius, focal)
    ws = avatar.styles_of_seeds(
        generator, seeds, frontal.to(synthesizer.device), options['trunc'], options['trunc_cutoff']
    )
    labels = [frontal] * len(clip.names)
    if clip.labels is not None:
        labels = torch.from_numpy(paths.smooth_labels(clip.labels, options['smooth_camera'])).split(1)
    wall = avatar.Wall(synthesizer, len(seeds), columns, ws, None, resolution=options['nrr'])
    side, shown = generator.img_resolution, collections.deque()
    mesh_picture = _mesh_drawer(generator) if shows_driving and clip.picture(0) is None else None

    def frames():
        for number, mesh in enumerate(driving.smooth_meshes(clip, options['smooth_mesh'])):
            if shows_driving and mesh_picture is None:
                shown.append(_fitted(clip.picture(number), side))
            yield avatar.Frame(labels[number], None, torch.from_numpy(mesh)[None])

    drawn_frames = avatar.stream(wall, frames(), mesh_picture)
    for drawn in cli.frame_bar(drawn_frames, len(clip.names), path.name):
        add(avatar.tile([shown.popleft(), *drawn] if shown else drawn, columns, rows))


def _mesh_drawer(generator):
    """Return a function that draws a frame's mesh: what is shown of clips without pictures."""
    renderer = MeshRenderer(generator.faces[0], generator.face_uvcoords[0], 'normal', generator.img_resolution)
    device = generator.faces.device

    def draw(frame):
        return to_bytes(renderer(frame.v.to(device), frame.c.to(device)))

    return draw


def _fitted(picture, side):
    """Return a picture as [side, side, 3], whole, black where it is not square."""
    return np.asarray(ImageOps.pad(Image.fromarray(picture), (side, side), Image.Resampling.LANCZOS))


if __name__ == '__main__':
    main()
