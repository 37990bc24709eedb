# SPDX-License-Identifier: Apache-2.0
"""Make videos of seeds that turn, morph into each other and move their faces."""

import functools
import pathlib

import click
import numpy as np
import torch

import cli
from geometry import paths
from training import avatar, driving
from training.inference import DTYPES, Synthesizer
from training.video import video_file

FPS = 60
NAME = 'interpolation.mp4'
PIVOTS = {'FFHQ': None, 'Cats': (0.0, 0.0, 0.0)}  # Where cameras look; None: the checkpoint's point.
ORBIT_DEG = 30


@click.command(cls=cli.Command)
@cli.option('network', metavar='PATH|URL', type=cli.PathText(), required=True,
            help='Network file: published pickle or own snapshot.')
@cli.option('seeds', metavar='LIST', type=cli.SeedList(), required=True, help="Seeds such as '0,3,7-9'.")
@cli.option('grid', metavar='WxH', type=cli.Grid(), default='1x1', show_default=True, help='Columns and rows.')
@cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Where to save.')
@cli.option('obj_path', metavar='PATH', type=cli.PathText(), help='Head mesh (.obj) of the topology of the network.')
@cli.option('lms_path', metavar='PATH', type=cli.PathText(), help='Its 68 landmarks: lines of x y z.')
@cli.flag('lms_cond', help='Accepted for the published command lines; landmarks are always read.')
@cli.option('drive', metavar='DIR|NPZ', type=cli.PathText(),
            help='In place of --obj_path: a driving clip, played forwards and backwards.')
@cli.option('retarget', metavar='OBJ', type=cli.PathText(),
            help="With --drive, the heads' own neutral mesh: the clip's coefficients move it, its shape stays.")
@cli.flame_path()
@cli.flag('skip_missing', help='Leave out frames of the clip that lack a file or hold a broken one.')
@cli.option('trunc', metavar='PSI', type=cli.FiniteFloat(), default=1.0, show_default=True, help='Truncation.')
@cli.option('trunc_cutoff', metavar='N', type=click.IntRange(min=0), show_default='14 in published networks',
            help="Truncate this many of the first w vectors; default: all but the texture's.")
@cli.option('shuffle_seed', metavar='N', type=click.IntRange(0, cli.MAX_SEED), help='Shuffle the seeds with this one.')
@cli.option('num_keyframes', metavar='N', type=click.IntRange(1, 10_000),
            help='Seeds that each cell goes through; default: as many as fill the grid.')
@cli.option('w_frames', metavar='N', type=click.IntRange(1, 100_000), default=120, show_default=True,
            help='Frames from one seed to the next.')
@cli.option('cfg', type=click.Choice(list(PIVOTS), case_sensitive=False), default='FFHQ', show_default=True,
            help="Where cameras look: the checkpoint's point, or the origin.")
@cli.option('image_mode', type=click.Choice(avatar.IMAGE_MODES), default='image', show_default=True,
            help='Final picture, rendered one, or its depth (near is white).')
@cli.option('sample_mult', metavar='X', type=cli.FiniteFloat(0, 65), default=2.0, show_default=True,
            help='Multiply the depth samples along a ray.')
@cli.option('nrr', metavar='N', type=click.IntRange(1, 1024), show_default="the checkpoint's",
            help='Side of the rendered picture.')
@cli.option('interpolate', type=bool, default=True, show_default=True, help='False: one video SEED.mp4 for each seed.')
@cli.option('orbit', metavar='DEG', type=cli.FiniteFloat(0, 361), is_flag=False, flag_value=ORBIT_DEG,
            help=f'Swing level, so far to both sides ({ORBIT_DEG} where no angle is given); 180: go round the head.')
@cli.flag('fixed', help='Keep the frontal camera.')
@cli.option('fps', metavar='N', type=cli.FiniteFloat(0, 1000), default=FPS, show_default=True, help='Frames a second.')
@cli.flag('save_frames', help="Also write the frames as PNG, to a folder of the video's name.")
@cli.option('save_root', metavar='DIR', type=cli.PathText(), help='Also write the frames as PNG, below this folder.')
@cli.option('device', type=cli.Device(), default='auto', show_default=True,
            help='cpu, cuda, cuda:N; auto: cuda when present.')
@cli.option('dtype', type=click.Choice(list(DTYPES)), default='fp16', show_default=True,
            help='Arithmetic on a GPU: bf16 where pictures are not finite; a CPU takes fp32.')
@cli.flag('reload_modules', help='Accepted for the published command lines; code in files is never used.')
def main(network, seeds, outdir, obj_path, lms_path, drive, device, **options):
    """Write interpolation.mp4, a grid of seeds that morph along a closed path under a moving camera.

    \b
    python gen_videos_next3d.py --outdir=out --trunc=0.7 --seeds=10720,12374,13393,17099 --grid=2x2 \\
        --network=NETWORK.pkl --obj_path=data/demo/demo.obj --lms_path=data/demo/demo_kpt2d.txt --lms_cond=True
    """
    videos = _videos(seeds, options)
    angles = functools.partial(_angles, options)
    if drive is not None and (obj_path or lms_path):
        raise click.UsageError('--drive: expected none with --obj_path and --lms_path, it brings its own meshes.')
    if drive is None and options['retarget'] is not None:
        raise click.UsageError('--retarget: expected --drive with it, got none.')
    choices = {name: options[name] for name in ('retarget', 'flame_path', 'skip_missing')}
    clip = None if drive is None else cli.open_clip(drive, **choices, needs_labels=False)
    head = cli.read_head(obj_path, lms_path)
    click.echo(f'Loading networks from "{network}"...')
    generator = cli.load_next3d(network, device)
    v = cli.fit_head(generator, head, device) if clip is None else cli.fit_clip(generator, clip, '--drive')
    try:
        generator = avatar.with_sampling(generator, options['sample_mult'])
    except ValueError as error:  # Fewer than a ray needs.
        raise click.UsageError(f'--sample_mult: {error}.') from None
    synthesizer = Synthesizer(generator, options['dtype'])
    folder = cli.make_outdir(outdir)
    for name, keyframes, grid in videos:
        _write_video(synthesizer, folder / name, (keyframes, grid), (v, clip), angles, options)
    click.echo(f'Wrote {", ".join(name for name, *_ in videos[:3])}{", ..." if len(videos) > 3 else ""} to {folder}')


def _videos(seeds, options):
    """Return (file name, seeds of the cells' keyframes [cell][keyframe], grid) of each video."""
    if options['fixed'] and options['orbit'] is not None:
        raise click.UsageError('--fixed: expected none with --orbit.')
    if not options['interpolate']:
        return [(f'{seed}.mp4', [[seed] * (options['num_keyframes'] or 1)], (1, 1)) for seed in dict.fromkeys(seeds)]
    columns, rows = options['grid']
    cells, per_cell = columns * rows, options['num_keyframes']
    if per_cell is None:
        if len(seeds) % cells:
            raise click.UsageError(
                f'--seeds: expected a multiple of the {cells} cells of the grid, got {len(seeds)}; '
                'or give --num-keyframes.'
            )
        per_cell = len(seeds) // cells
    order = [seeds[i % len(seeds)] for i in range(cells * per_cell)]
    if options['shuffle_seed'] is not None:
        np.random.RandomState(options['shuffle_seed']).shuffle(order)
    return [(NAME, [order[i * per_cell : (i + 1) * per_cell] for i in range(cells)], options['grid'])]


def _angles(options, count):
    """Return the camera's angles [count, 2]."""
    if options['fixed']:
        return paths.fixed_path(count)
    return paths.published_path(count) if options['orbit'] is None else paths.orbit_path(count, options['orbit'])


def _write_video(synthesizer, path: pathlib.Path, cells, mesh, angles, options):
    """Write one video; what does not change in it is given to the wall, the rest comes with the frames."""
    (keyframes, (columns, rows)), (v, clip), generator = cells, mesh, synthesizer.generator
    config = generator.config
    pivot = PIVOTS[options['cfg']] or config.avg_camera_pivot
    count = len(keyframes[0]) * options['w_frames']
    labels = paths.path_labels(angles(count), pivot, config.avg_camera_radius)
    frontal = paths.path_labels(paths.fixed_path(1), pivot, config.avg_camera_radius).to(synthesizer.device)
    flat = [seed for cell in keyframes for seed in cell]
    ws = avatar.styles_of_seeds(generator, flat, frontal, options['trunc'], options['trunc_cutoff'])
    loop = avatar.Loop(ws.unflatten(0, (len(keyframes), len(keyframes[0]))).transpose(0, 1))
    meshes = None if clip is None else driving.there_and_back(clip, count, options['fps'])

    def frames():
        for number in range(count):
            styles = None if loop.is_constant else loop.at(number / options['w_frames'])
            mesh = None if meshes is None else torch.from_numpy(next(meshes))[None]
            yield avatar.Frame(labels[number : number + 1], styles, mesh)

    shared = loop.at(0) if loop.is_constant else None
    choices = dict(resolution=options['nrr'], image_mode=options['image_mode'])
    wall = avatar.Wall(synthesizer, len(keyframes), columns, shared, v, **choices)
    pictures = cli.frames_folder(path, options['save_frames'], options['save_root'])
    with cli.naming(path), video_file(path, options['fps'], frames=pictures) as add:
        for drawn in cli.frame_bar(avatar.stream(wall, frames()), count, path.name):
            add(avatar.tile(drawn, columns, rows))


if __name__ == '__main__':
    main()
