# SPDX-License-Identifier: Apache-2.0
"""A small untrained network over a head, whose random weights were arranged so that the head shows."""

import os

import torch

from training.config import Next3DConfig
from training.generator import Next3DGenerator
from training.topology import load_topology
from training.train_config import make_config

CONFIG = make_config('demo', '', '', gen_pose_cond=True).generator  # What --cfg=demo trains.

MARK = 1.0  # Value of the feature that tells the head (+) from the rest (-), before the mean over three planes.
SURFACE_SHARPNESS = 40.0
BACKGROUND_DENSITY = -15.0


def show_the_head(generator: Next3DGenerator) -> None:
    """Set a few of the random weights so that there is something to see: the mesh's visual hull, painted at random.

    The last plane feature marks where the mesh covers a plane: its colour biases are +MARK in the networks that paint
    the mesh and -MARK in the static one. One hidden unit of the decoder turns the mark's mean into density, large only
    where all three planes are covered. Super-resolution is quieted, so that the picture keeps the rendered colours.
    """
    config = generator.config
    last = config.plane_channels - 1
    for backbone, value in (
        (generator.texture_backbone, MARK),
        (generator.neural_blending, MARK),
        (generator.backbone, -MARK),
    ):
        for block in backbone.synthesis.children():
            if hasattr(block, 'torgb'):
                block.torgb.weight[last :: config.plane_channels] = 0
                block.torgb.bias[last :: config.plane_channels] = 0
        first = getattr(backbone.synthesis, f'b{backbone.synthesis.first_resolution}').torgb
        first.bias[last :: config.plane_channels] = value
    hidden, out = generator.decoder.net[0], generator.decoder.net[2]
    for layer in (hidden, out):
        layer.bias.zero_()
    hidden.weight[:, last] = 0
    hidden.weight[0] = 0
    hidden.weight[0, last] = SURFACE_SHARPNESS / hidden.weight_gain
    hidden.bias[0] = -SURFACE_SHARPNESS * MARK * 2 / 3  # Between two covered planes, mean 1/3, and three, mean 1.
    out.weight[:, 0] = 0
    out.weight[0] = 0
    out.weight[0, 0] = SURFACE_SHARPNESS / 8 / out.weight_gain
    out.bias[0] = BACKGROUND_DENSITY
    for block in (generator.superresolution.block0, generator.superresolution.block1):
        block.torgb.weight.mul_(0.02)


def untrained(topology_path: str | os.PathLike, seed: int = 0, config: Next3DConfig = CONFIG) -> Next3DGenerator:
    """Return a generator over the head of an OBJ file, beside which its mask is, that shows the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Next3DGenerator(config, *load_topology(topology_path, config.texture_resolution))
    with torch.no_grad():
        show_the_head(generator)
    return generator.eval()
