# SPDX-License-Identifier: Apache-2.0
"""Write a small untrained network over the demo head, so that every script has something to run on."""

import click
import torch

import cli
from training.checkpoint import save_snapshot
from training.config import NEXT3D_PLANE_AXES, Next3DConfig
from training.generator import Next3DGenerator
from training.topology import load_topology
from training.volume.render import SamplingConfig

CONFIG = Next3DConfig(
    z_dim=64,
    w_dim=64,
    channel_base=2048,
    channel_max=32,
    sr_num_fp16_res=0,
    sr_channels=(32, 16),
    superresolution='SuperresolutionHybrid2X',
    plane_resolution=64,
    texture_resolution=64,
    mouth_resolution=16,
    blending_lowest=16,
    has_unused_mappings=False,
    neural_rendering_resolution=64,
    sampling=SamplingConfig(num_depths=24, num_importance=24, plane_axes=NEXT3D_PLANE_AXES),
)


@click.command(cls=cli.Command)
@cli.option('out', metavar='PATH', required=True, help='Snapshot to write (.pkl).')
@cli.option('seed', metavar='N', type=click.IntRange(0, cli.MAX_SEED), default=0, show_default=True, help='Of weights.')
@cli.option(
    'topology_path', metavar='PATH', default='data/demo/head_template.obj', show_default=True,
    help='UV-mapped template mesh; uv_face_mask.png beside it is used.',
)
def main(out, seed, topology_path):
    """Initialise the network from a seed and save it as a snapshot with one entry, G_ema."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Next3DGenerator(CONFIG, *load_topology(topology_path, CONFIG.texture_resolution))
    save_snapshot(out, {'G_ema': generator.eval()})
    click.echo(f'Wrote {out} ({sum(p.numel() for p in generator.parameters()) / 1e6:.1f} M untrained parameters)')


if __name__ == '__main__':
    main()
