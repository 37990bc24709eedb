# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `modulated_bias_act`'s gradient: three sums over one reading of two tensors."""

import triton
import triton.language as tl


@triton.jit
def reduce_kernel(gradient, x, along_scale, along_bias, along_noise, num_pixels, num_channels,
                  WITH_SCALE: tl.constexpr, WITH_NOISE: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
                  TILES: tl.constexpr):
    """Sum gradient, and gradient·x, [N, num_pixels, num_channels] over pixels and gradient over channels.

    along_scale: [N, num_channels] of gradient·x, along_bias: [num_channels], both added to; along_noise: [N, pixels].
    All float32. C: a power of two from num_channels on. TILES of P pixels a program.
    """
    n = tl.program_id(1).to(tl.int64)
    channels = tl.arange(0, C)
    is_channel = channels < num_channels
    sum_scale, sum_bias = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    for tile in range(TILES):
        pixel = (tl.program_id(0) * TILES + tile) * P + tl.arange(0, P)
        mask = (pixel < num_pixels)[:, None] & is_channel[None, :]
        at = (n * num_pixels + pixel)[:, None] * num_channels + channels[None, :]
        g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32)
        sum_bias += tl.sum(g, axis=0)
        if WITH_SCALE:
            sum_scale += tl.sum(g * tl.load(x + at, mask=mask, other=0.0).to(tl.float32), axis=0)
        if WITH_NOISE:
            tl.store(along_noise + n * num_pixels + pixel, tl.sum(g, axis=1), mask=pixel < num_pixels)
    tl.atomic_add(along_bias + channels, sum_bias, mask=is_channel, sem='relaxed')
    if WITH_SCALE:
        tl.atomic_add(along_scale + n * num_channels + channels, sum_scale, mask=is_channel, sem='relaxed')
