# SPDX-License-Identifier: Apache-2.0
"""Times of drawing with a network of random weights, full-size ffhq512 by default: whole pictures and their pieces.

The protocol of the published code's measurements: one head (the tests' simple one) repeated, cameras 0.1 rad apart.
"""

import pathlib
import sys

import torch
from bench import SIMPLE_HEAD, Benchmark

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from geometry import cameras, shapes  # noqa: E402  (needs the path above)
from geometry.meshes import read_landmarks, read_obj, stack_mesh  # noqa: E402
from training.generator import Next3DGenerator  # noqa: E402
from training.inference import DTYPES, CapturedCall, Identity, Synthesizer  # noqa: E402
from training.topology import load_topology  # noqa: E402
from training.train_config import PRESETS, make_config  # noqa: E402



def random_generator(preset, device):
    """Return a generator of random weights on a device, drawn there."""
    config = make_config(preset, '', '').generator
    with torch.device(device):
        torch.manual_seed(0)
        topology = load_topology(SIMPLE_HEAD / 'head_template.obj', config.texture_resolution)
        return Next3DGenerator(config, *topology).eval().requires_grad_(False).to(device)


def inputs(generator, batch):
    """Return ws, labels and meshes of a batch on the generator's device."""
    device = next(generator.parameters()).device
    v = stack_mesh(read_obj(SIMPLE_HEAD / 'demo.obj').vertices, read_landmarks(SIMPLE_HEAD / 'demo_kpt2d.txt'))
    poses = torch.cat([cameras.look_at_pose(cameras.FRONTAL + 0.1 * i, cameras.FRONTAL) for i in range(batch)])
    c = cameras.make_label(poses, cameras.intrinsics()).to(device)
    z = torch.randn(batch, generator.z_dim, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        return generator.mapping(z, c), c, torch.from_numpy(v).to(device).repeat(batch, 1, 1)


def measure_pictures(bench, generator, synthesizer, batch, resolution):
    """Whole pictures: eager as configured, captured in a graph, and with the identity fixed."""
    ws, c, v = inputs(generator, batch)
    facts = dict(batch=batch, raw=resolution)
    key = f'batch {batch}, raw {resolution}'
    if not bench.args.fast:
        bench.measure(f'synthesis, plain, {key}', lambda: generator.synthesis(ws, c, v, 'const', resolution), **facts)
    bench.measure(f'synthesis, {key}', lambda: synthesizer.synthesis(ws, c, v, resolution), **facts)
    avatar = synthesizer.avatar(ws, resolution)
    bench.measure(f'frame of an avatar, {key}', lambda: avatar.render(v, c), **facts)


def measure_pieces(bench, synthesizer, batch):
    """What a picture is made of, each piece in a graph of its own."""
    generator = synthesizer.generator
    ws, c, v = inputs(generator, batch)
    styles = synthesizer._bank.styles(ws)
    texture, static = generator.texture(styles), generator.static_planes(styles)
    front = generator.rasterize(texture, v).features[:, 0].to(synthesizer.dtype)
    front = front.contiguous(memory_format=torch.channels_last)
    identity = Identity(generator.fold(styles), texture, static)
    planes = synthesizer._blend(identity, v)
    pieces = {
        'styles': lambda: _flat(synthesizer._bank.styles(ws)),
        'texture': lambda: generator.texture(styles),
        'static planes': lambda: generator.static_planes(styles),
        'four views and holes': lambda: generator.cover(v).alpha,
        'four views, holes and texture': lambda: generator.rasterize(texture, v).features,
        'mouth and blending networks': lambda: generator.complete_mouth(front, v, identity.styles),
        'planes': lambda: synthesizer._blend(identity, v).planes,
    }
    for resolution in (64, 128):
        pieces[f'rays, {resolution}'] = lambda r=resolution: generator.volume(planes, c, r, 'center')[0]
        pieces[f'render, {resolution}'] = lambda r=resolution: synthesizer._render(planes, identity, c, r)['image']
    for name, piece in pieces.items():
        captured = CapturedCall(lambda _, piece=piece: {'': piece()}, c)
        bench.measure(f'{name}, batch {batch}', lambda captured=captured: captured(c), batch=batch)


def _flat(styles):
    """Return one tensor that depends on all styles."""
    blocks = [block for part in styles for block in (part.values() if isinstance(part, dict) else part)]
    return torch.cat([style.scale.float() for block in blocks for style in block], dim=1)


def measure_shape(bench, synthesizer, resolution):
    """A grid of densities, as `gen_samples.py --shapes` samples it."""
    generator = synthesizer.generator
    ws, _, v = inputs(generator, 1)
    planes = generator.planes(ws, v)
    side = generator.config.sampling.box_warp

    def grid():
        return shapes.density_grid(
            lambda points: generator.query(planes, points, with_rgb=False)['sigma'], resolution, side,
            device=planes.planes.device,
        )

    bench.measure(f'density grid, {resolution}', grid, points=resolution**3)
    points = torch.rand(1, 2**20, 3, device=planes.planes.device) - 0.5
    bench.measure('a million densities', lambda: generator.query(planes, points, with_rgb=False))


def main():
    """Print the times."""
    bench = Benchmark(__doc__)
    bench.parser.add_argument('--preset', choices=PRESETS, default='ffhq512')
    bench.parser.add_argument('--dtype', choices=DTYPES, default='fp16')
    bench.parser.add_argument('--batches', type=int, nargs='+', default=[1, 4])
    bench.parser.add_argument('--rendering', type=int, nargs='+', default=[64, 128], help='sides of the raw picture')
    bench.parser.add_argument('--shape-res', type=int, default=512, help='side of the density grid')
    bench.parser.add_argument('--fast', action='store_true', help='leave the plain forward out')
    args = bench.parse()
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        generator = random_generator(args.preset, args.device)
        synthesizer = Synthesizer(generator, args.dtype)
        for batch in args.batches:
            for resolution in args.rendering:
                measure_pictures(bench, generator, synthesizer, batch, resolution)
            measure_pieces(bench, synthesizer, batch)
        measure_shape(bench, synthesizer, args.shape_res)
    bench.finish()


if __name__ == '__main__':
    main()
