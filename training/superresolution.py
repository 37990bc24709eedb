# SPDX-License-Identifier: Apache-2.0
"""Super-resolution of rendered features by two style blocks (Chan et al. 2022, section 4.4)."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import interpolate

from torch_utils.ops.upfirdn2d import setup_filter
from training.backbone import SynthesisBlock
from training.layers import BINOMIAL_FILTER

FP16_CLAMP = 256  # Limit of activations in parts that may run in half precision.


class Variant(NamedTuple):
    """A row of the table of upsamplers: output and input side in pixels, channels of the two blocks."""

    resolution: int
    input_resolution: int
    channels: tuple[int, int]
    is_first_block_up: bool
    only_enlarges_input: bool = False
    has_root_filter: bool = True


VARIANTS = {
    'SuperresolutionHybrid8XDC': Variant(512, 128, (256, 128), True, has_root_filter=False),
    'SuperresolutionHybrid8X': Variant(512, 128, (128, 64), True),
    'SuperresolutionHybrid4X': Variant(256, 128, (128, 64), False, only_enlarges_input=True),
    'SuperresolutionHybrid2X': Variant(128, 64, (128, 64), False),
}


def resize_antialiased(x: torch.Tensor, size: int, antialias: bool = True) -> torch.Tensor:
    """Resize [N, C, H, W] to size x size, bilinear."""
    return interpolate(x, size=(size, size), mode='bilinear', align_corners=False, antialias=antialias)


class Superresolution(nn.Module):
    """rgb [N, 3, r, r] and features [N, channels, r, r] -> picture [N, 3, R, R], R given by the variant.

    variant: a key of VARIANTS. use_fp16: half precision on CUDA devices; the clamp it needs holds everywhere.
    block_channels: other widths of the two blocks than the published ones, or None.
    """

    def __init__(self, variant, channels, w_dim, use_fp16=False, antialias=True, block_channels=None):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f'superresolution: expected one of {", ".join(VARIANTS)}, got {variant!r}')
        self.variant, self.antialias = VARIANTS[variant], antialias
        widths = block_channels or self.variant.channels
        clamp = FP16_CLAMP if use_fp16 else None
        if self.variant.has_root_filter:
            self.register_buffer('resample_filter', setup_filter(BINOMIAL_FILTER))
        first = self.variant.resolution // 2
        up = 2 if self.variant.is_first_block_up else 1
        self.block0 = SynthesisBlock(channels, widths[0], w_dim, first, 3, up, use_fp16, clamp)
        self.block1 = SynthesisBlock(widths[0], widths[1], w_dim, 2 * first, 3, 2, use_fp16, clamp)

    def forward(self, rgb, features, ws, noise_mode='none'):
        """Upsample with the last of ws [N, num_ws, w_dim] in all layers, or with what `styles` made of it."""
        ws = ws if isinstance(ws, tuple) else (self._repeat(ws),) * 2
        rgb, features = self._resize_input(rgb), self._resize_input(features)
        features, rgb = self.block0(features, rgb, ws[0], noise_mode)
        return self.block1(features, rgb, ws[1], noise_mode)[1]

    def styles(self, ws):
        """Return what the last of ws does to both blocks, for `forward`."""
        ws = self._repeat(ws)
        return self.block0.styles(ws), self.block1.styles(ws)

    def fold(self, styles):
        """Return styles of frozen blocks for many pictures (see `SynthesisBlock.fold`)."""
        return self.block0.fold(styles[0]), self.block1.fold(styles[1])

    def _repeat(self, ws):
        return ws[:, -1:].expand(-1, 3, -1)

    def _resize_input(self, x):
        size = self.variant.input_resolution
        if x.shape[-1] == size or (self.variant.only_enlarges_input and x.shape[-1] > size):
            return x
        return resize_antialiased(x, size, self.antialias)
