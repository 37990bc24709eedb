# SPDX-License-Identifier: Apache-2.0
"""Generate pictures, depth maps and shapes of seeds with a trained network."""

import dataclasses
import re

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import cli
from dnnlib.util import atomic_path, atomic_write
from geometry import cameras, shapes
from training import surface
from training.generator import EG3DGenerator, Planes
from training.pictures import to_uint8

PUBLISHED_VIEWS = ((0.4, -0.2), (0.0, -0.2), (-0.4, -0.2))  # Yaw and pitch from the frontal camera in radians.
YAW_RANGE, PITCH = 0.4, -0.2
SHAPE_FORMATS = ('.mrc', '.ply', '.obj', '.glb')
MAX_SHAPE_RES = 1024
MAX_PITCH_DEG = 90
BAR_AFTER_SECONDS = 2
MRC_LABEL = 'Raw density'  # The format's usual label holds the time: the same command would write other bytes.


class ViewList(click.ParamType):
    """A number of views, spread over the published yaw range, or 'yaw:pitch,...' in degrees from the frontal camera.

    Pitch is the camera's elevation, positive from above. The samplers' vertical angle is no angle of a sphere: its
    cosine of the polar angle is 1 - 2v/π.
    """

    name = 'views'

    def convert(self, value, param, ctx):
        """Return (horizontal, vertical) pairs of the sampler, relative to the frontal camera."""
        if isinstance(value, tuple):
            return value
        if re.fullmatch(r'\d{1,3}', value) and int(value) > 0:
            count = int(value)
            yaws = np.linspace(YAW_RANGE, -YAW_RANGE, count) if count > 1 else [0.0]
            return tuple((float(yaw), PITCH) for yaw in yaws)
        number = r'\s*(-?\d{1,3}(?:\.\d+)?)\s*'
        pairs = [re.fullmatch(f'{number}:{number}', part) for part in value.split(',')]
        if not all(pairs) or any(abs(float(pair[2])) >= MAX_PITCH_DEG for pair in pairs):
            expected = "a number of views or yaw:pitch pairs in degrees ('30:0,-30:10'), pitch within +-90"
            self.fail(f'expected {expected}, got {value!r}.', param, ctx)
        angles = np.deg2rad([[float(pair[1]), float(pair[2])] for pair in pairs])
        return tuple((float(yaw), float(-cameras.FRONTAL * np.sin(pitch))) for yaw, pitch in angles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """What to write of the density: samples per axis and file format."""

    resolution: int
    file_format: str


@click.command(cls=cli.Command)
@cli.option(
    'network', metavar='PATH|URL', type=cli.PathText(), required=True,
    help='Network file: published pickle or own snapshot.',
)
@cli.option(
    'obj_path', metavar='PATH', type=cli.PathText(),
    help='Head mesh (.obj) of the topology that the network was trained with.',
)
@cli.option('lms_path', metavar='PATH', type=cli.PathText(), help='Its 68 landmarks: lines of x y z.')
@cli.flag('lms_cond', help='Accepted for the published command lines; landmarks are always read.')
@cli.option('seeds', metavar='LIST', type=cli.SeedList(), required=True, help="Seeds such as '0,3,7-9'.")
@cli.option('trunc', metavar='PSI', type=cli.FiniteFloat(), default=1.0, show_default=True, help='Truncation.')
@cli.option(
    'trunc_cutoff', metavar='N', type=click.IntRange(min=0), show_default='14 in published networks',
    help="Truncate this many of the first w vectors; default: all but the texture's.",
)
@cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Where to save.')
@cli.flag('shapes', help='Also write the density or its surface.')
@cli.option(
    'shape_res', metavar='N', type=click.IntRange(2, MAX_SHAPE_RES), default=512, show_default=True,
    help='Samples per axis of the density grid.',
)
@cli.option(
    'shape_format', type=click.Choice(SHAPE_FORMATS), default='.mrc', show_default=True,
    help='.mrc: density; the others: its surface, with colours.',
)
@cli.option(
    'fov_deg', metavar='DEG', type=cli.FiniteFloat(0, 180),
    help='Diagonal field of view; default: the focal length 4.2647 of videos and training (about 18.83).',
)
@cli.option(
    'views', metavar='N|YAW:PITCH,...', type=ViewList(), default=PUBLISHED_VIEWS, show_default='3',
    help='Number of views over yaw +-0.4 rad, or angles in degrees; positive pitch looks from above.',
)
@cli.flag('depth', help='Also write depth maps: a picture (near is white) and the distances as .npy.')
@cli.option(
    'device', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N; auto: cuda when present.'
)
@cli.flag('reload_modules', help='Accepted for the published command lines; code in files is never used.')
def main(network, seeds, outdir, shapes, shape_res, shape_format, device, obj_path, lms_path, **options):
    """Write seedNNNN.png, a strip of views, for each seed; with --depth and --shapes what they ask for.

    \b
    python gen_samples.py --outdir=out --trunc=0.7 --shapes=true --seeds=0-3 --network=NETWORK.pkl \\
        --obj_path=data/demo/demo.obj --lms_path=data/demo/demo_kpt2d.txt --lms_cond=True
    """
    head = cli.read_head(obj_path, lms_path)
    click.echo(f'Loading networks from "{network}"...')
    generator = cli.load_generator(network, device)
    v = cli.fit_head(generator, head, device)
    folder = cli.make_outdir(outdir)
    shape = ShapeOptions(resolution=shape_res, file_format=shape_format) if shapes else None
    steps = 1 + len(options['views']) + bool(shape)
    bar = tqdm(total=len(seeds) * steps, unit='step', delay=BAR_AFTER_SECONDS)
    with torch.no_grad(), bar:
        for seed in seeds:
            bar.set_description(f'seed {seed}', refresh=False)  # A refresh would show the bar before its time.
            planes = _write_pictures(generator, v, folder, seed, options, bar)
            if shape:
                _write_shape(generator, planes, folder / f'seed{seed:04d}{shape.file_format}', shape)
                bar.update()
    click.echo(f'Wrote {len(seeds)} {"seed" if len(seeds) == 1 else "seeds"} to {folder}')


def _write_pictures(generator, v, folder, seed, options, bar) -> Planes:
    """Write the strip of views, and depths where asked for; return the planes for other uses."""
    device = next(generator.parameters()).device
    focal = cameras.FOCAL if options['fov_deg'] is None else cameras.focal_from_fov(options['fov_deg'])
    labels = _labels(generator, [(0.0, 0.0), *options['views']], focal).to(device)
    z = cli.latent(seed, generator.z_dim).to(device)
    cutoff = generator.num_style_ws if options['trunc_cutoff'] is None else options['trunc_cutoff']
    ws = generator.mapping(z, labels[:1], options['trunc'], cutoff)
    planes = generator.planes(ws) if v is None else generator.planes(ws, v)
    bar.update()
    strips = {'image': [], 'image_depth': []}
    for label in labels[1:]:
        out = generator.render(planes, ws, label[None])
        for name, strip in strips.items():
            strip.append(out[name][0])
        bar.update()
    image, depth = (torch.cat(strip, dim=2) for strip in strips.values())
    _save_png(folder / f'seed{seed:04d}.png', to_uint8(image))
    if options['depth']:
        _save_depth(folder, seed, depth[0].cpu().numpy())
    return planes


def _labels(generator: EG3DGenerator, views, focal):
    """Return labels [N, 25] of views given as (yaw, pitch) from the frontal camera of the checkpoint."""
    config = generator.config
    poses = [
        cameras.look_at_pose(
            cameras.FRONTAL + yaw, cameras.FRONTAL + pitch, config.avg_camera_pivot, config.avg_camera_radius
        )
        for yaw, pitch in views
    ]
    return cameras.make_label(torch.cat(poses), cameras.intrinsics(focal))


def _save_png(path, pixels):
    with cli.naming(path), atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format='PNG')


def _save_depth(folder, seed, depth):
    """Write distances along the rays [H, W] in world units, and a picture of them in which near is white."""
    path = folder / f'seed{seed:04d}_depth.npy'
    with cli.naming(path), atomic_write(path) as file:
        np.save(file, depth)
    near, far = float(depth.min()), float(depth.max())
    grey = 255 * (far - depth) / max(far - near, 1e-6)
    _save_png(folder / f'seed{seed:04d}_depth.png', grey.round().astype(np.uint8))


def _write_shape(generator, planes, path, options: ShapeOptions):
    """Write the density grid or its surface; a network without a surface at the published level is no error."""
    side = generator.config.sampling.box_warp
    with tqdm(total=options.resolution, desc=f'density {path.name}', unit='slab', delay=BAR_AFTER_SECONDS) as bar:
        grid = surface.sample_density(generator.query, planes, side, options.resolution, bar.update)
    if options.file_format == '.mrc':
        _save_mrc(path, grid)
        return
    try:
        found = surface.coloured_surface(generator.query, planes, side, grid)
    except shapes.NoSurfaceError as error:
        click.echo(f'{path.name}: {error}', err=True)
        return
    vertices = shapes.grid_to_published_ply(found.indices) if options.file_format == '.ply' else found.vertices
    content = surface.encode_mesh(vertices, found.faces, found.colours, path.suffix[1:])
    with cli.naming(path), atomic_write(path) as file:
        file.write(content)


def _save_mrc(path, grid):
    import mrcfile  # Here: only shapes need it.

    with cli.naming(path), atomic_path(path) as temporary, mrcfile.new(temporary, overwrite=True) as file:
        file.set_data(grid)
        file.header.label[0] = MRC_LABEL.ljust(80)


if __name__ == '__main__':
    main()
