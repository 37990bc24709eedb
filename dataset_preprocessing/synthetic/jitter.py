# SPDX-License-Identifier: Apache-2.0
"""What happens to pictures on their way to an estimator: light, colour, blur, blocks of compression, noise."""

import functools
import math

import torch
from torch.nn.functional import conv2d

BRIGHTNESS, CONTRAST, COLOUR, SATURATION = 0.15, 0.25, 0.08, 0.4
BLUR_SHARE, MAX_BLUR = 0.6, 1.6  # Of pictures, and pixels at 128.
BLOCK_SHARE, MAX_STEP = 0.4, 0.16  # Of pictures, and the coarsest quantisation.
NOISE_SHARE, MAX_NOISE = 0.4, 0.04
TAPS = 4  # On each side of a blur's middle.
BLOCK = 8


def jitter(images: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return pictures [N, 3, R, R] in [0, 1] changed at random, each by itself; R divisible by 8."""
    def draw(low, high, *shape):
        return low + (high - low) * torch.rand([len(images), *shape], generator=random, device=images.device)

    def some(share):
        return (draw(0, 1) < share).float()

    x = _recolour(images, draw)
    x = _blur(x, some(BLUR_SHARE) * draw(0, MAX_BLUR))
    x = _quantise(x, some(BLOCK_SHARE) * draw(0.01, MAX_STEP))
    level = (some(NOISE_SHARE) * draw(0, MAX_NOISE))[:, None, None, None]
    noise = torch.randn(x.shape, generator=random, device=x.device)
    return (x + level * noise).clamp(0, 1)


def _recolour(x, draw):
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * draw(1 - SATURATION, 1 + SATURATION, 1, 1, 1)
    middle = x.mean(dim=(1, 2, 3), keepdim=True)
    x = middle + (x - middle) * draw(1 - CONTRAST, 1 + CONTRAST, 1, 1, 1)
    return x * draw(1 - COLOUR, 1 + COLOUR, 3, 1, 1) + draw(-BRIGHTNESS, BRIGHTNESS, 1, 1, 1)


def _blur(x, sigma):
    """Blur each picture by a Gaussian of its own sigma [N] in pixels; 0 leaves it."""
    place = torch.arange(-TAPS, TAPS + 1, device=x.device)
    kernel = torch.exp(-0.5 * (place / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    n, c, h, w = x.shape
    flat = torch.nn.functional.pad(x, [TAPS] * 4, mode='replicate').flatten(0, 1)[None]
    flat = conv2d(flat, kernel[:, None, None, :], groups=n * c)
    return conv2d(flat, kernel[:, None, :, None], groups=n * c).view(n, c, h, w)


def _quantise(x, step):
    """Round the cosines of 8x8 blocks to multiples of a step [N], coarser for finer detail, as JPEG does."""
    basis, growth = _cosines(x.device)
    n, c, h, w = x.shape
    blocks = x.view(n, c, h // BLOCK, BLOCK, w // BLOCK, BLOCK).permute(0, 1, 2, 4, 3, 5)
    steps = (step[:, None, None] * growth)[:, None, None, None].clamp(min=1e-6)
    rounded = ((basis @ blocks @ basis.T) / steps).round() * steps
    back = (basis.T @ rounded @ basis).permute(0, 1, 2, 4, 3, 5).reshape(n, c, h, w)
    return torch.where((step > 0)[:, None, None, None], back, x)


@functools.lru_cache(maxsize=2)
def _cosines(device):
    """Return the orthonormal cosine transform [8, 8] and how much coarser each coefficient is rounded [8, 8]."""
    k = torch.arange(BLOCK, device=device, dtype=torch.float32)
    basis = torch.cos(math.pi / BLOCK * (k + 0.5) * k[:, None]) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    return basis, 1 + (k + k[:, None]) / 2
