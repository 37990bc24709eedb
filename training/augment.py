# SPDX-License-Identifier: Apache-2.0
"""Adaptive discriminator augmentation, geometry and colour (Karras et al. 2020b, "Training generative adversarial
networks with limited data", appendix B).

Everything is a list of small transforms: a matrix of one or two numbers that are 0 where nothing happens, the
distribution of these numbers, and how often they are not 0. The matrices of a sample are multiplied, and the picture
is resampled once. Negated numbers give the inverse of every geometric matrix, so none has to be inverted.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upsample2d
from torch_utils.randomness import normal, uniform

MAX_SHIFT = 0.125  # Limit of translation by whole pixels, over the picture's side.
SHIFT_STD = 0.125  # Of translation by fractions of pixels, over the picture's side.
LOG2_SCALE_STD = 0.2
BRIGHTNESS_STD = 0.2
LOG2_CONTRAST_STD = 0.5
LOG2_SATURATION_STD = 1.0
MAX_PARAMETERS = 2  # Of one transform.

# Low-pass filter of the wavelet sym6 (Daubechies 1992, table 6.3). It is orthonormal to its shifts by two taps.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
TAPS_BEFORE, TAPS_AFTER = 5, 6  # The filter's centre is tap 5, to a tenth.
UPSAMPLING_MARGIN = 3  # Pixels outside the picture that the upsampling filter touches.


class Draws(NamedTuple):
    """Random numbers of N samples: gate [N, T] and uniform [N, T, 2] in [0, 1), normal [N, T, 2]; T transforms."""

    gate: Tensor
    uniform: Tensor
    normal: Tensor

    @classmethod
    def sample(cls, count: int, transforms: int, device: torch.device | str = 'cpu') -> 'Draws':
        """Draw for `count` samples and that many transforms."""
        shape = [count, transforms, MAX_PARAMETERS]
        return cls(uniform(shape[:2], device), uniform(shape, device), normal(shape, device))

    def split(self, first: int) -> tuple['Draws', 'Draws']:
        """Return the draws of the first so many transforms, and of the others."""
        return Draws(*(d[:, :first] for d in self)), Draws(*(d[:, first:] for d in self))


class Transform(NamedTuple):
    """One kind of change.

    matrix:       its parameters, [N] each, -> homogeneous matrices [N, d, d]; the identity where they are 0.
    spread:       numbers u uniform in [0, 1) and z normal, both [N, 2] -> parameters [N, 2].
    parameters:   how many of these `matrix` takes.
    probability:  the pipe's p -> how often this transform is applied.
    """

    matrix: Callable[..., Tensor]
    spread: Callable[[Tensor, Tensor], Tensor]
    parameters: int = 1
    probability: Callable[[float], float] = float


def one_of(count: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Spread: one of 0, 1, ..., count - 1."""
    return lambda u, z: (u * count).floor()


def within(limit: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Spread: uniform between -limit and limit."""
    return lambda u, z: (2 * u - 1) * limit


def whole_within(limit: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Spread: uniform between -limit and limit, rounded."""
    return lambda u, z: ((2 * u - 1) * limit).round()


def gaussian(std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Spread: normal with mean 0."""
    return lambda u, z: z * std


def flip(mirrored: Tensor) -> Tensor:
    """x -> -x where mirrored [N] is 1, or -1: [N, 3, 3]."""
    return _matrices([[1 - 2 * mirrored.abs(), 0, 0], [0, 1, 0], [0, 0, 1]])


def rotate(angle: Tensor) -> Tensor:
    """Rotate clockwise (y points down) by radians [N]: [N, 3, 3]."""
    cos, sin = angle.cos(), angle.sin()
    return _matrices([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def quarter_turn(turns: Tensor) -> Tensor:
    """Rotate clockwise by quarter turns [N]: [N, 3, 3]."""
    return rotate(turns * (math.pi / 2))


def translate(x: Tensor, y: Tensor) -> Tensor:
    """Move right by x and down by y, [N] each, in pixels: [N, 3, 3]."""
    return _matrices([[1, 0, x], [0, 1, y], [0, 0, 1]])


def scale(log2: Tensor) -> Tensor:
    """Enlarge by 2^log2, [N]: [N, 3, 3]."""
    return _matrices([[log2.exp2(), 0, 0], [0, log2.exp2(), 0], [0, 0, 1]])


def stretch(log2: Tensor) -> Tensor:
    """Widen by 2^log2 and lower by as much, [N]: [N, 3, 3]."""
    return _matrices([[log2.exp2(), 0, 0], [0, (-log2).exp2(), 0], [0, 0, 1]])


def brightness(shift: Tensor) -> Tensor:
    """c + shift, [N], for every channel c: [N, 4, 4]."""
    return _matrices([[1, 0, 0, shift], [0, 1, 0, shift], [0, 0, 1, shift], [0, 0, 0, 1]])


def contrast(log2: Tensor) -> Tensor:
    """c·2^log2, [N], for every channel c: [N, 4, 4]."""
    return _about_grey(log2.exp2(), log2.exp2(), torch.zeros_like(log2))


def luma_flip(flipped: Tensor) -> Tensor:
    """Reverse luma and keep chroma where flipped [N] is 1: 1 - 2vvᵀ, v = (1, 1, 1)/√3: [N, 4, 4]."""
    return _about_grey(1 - 2 * flipped, torch.ones_like(flipped), torch.zeros_like(flipped))


def hue(angle: Tensor) -> Tensor:
    """Rotate colours about the axis of greys by radians [N]; 2π/3 turns red into green: [N, 4, 4]."""
    return _about_grey(torch.ones_like(angle), angle.cos(), angle.sin())


def saturation(log2: Tensor) -> Tensor:
    """Multiply chroma by 2^log2, [N], and keep luma: [N, 4, 4]."""
    return _about_grey(torch.ones_like(log2), log2.exp2(), torch.zeros_like(log2))


def _about_grey(luma, chroma, turned):
    """luma·vvᵀ + chroma·(1 - vvᵀ) + turned·[v]ₓ, v = (1, 1, 1)/√3: the maps that treat all channels alike."""
    same = (luma + 2 * chroma) / 3
    after = (luma - chroma) / 3 + turned / math.sqrt(3)
    before = (luma - chroma) / 3 - turned / math.sqrt(3)
    rows = [[same, before, after, 0], [after, same, before, 0], [before, after, same, 0], [0, 0, 0, 1]]
    return _matrices(rows)


def _matrices(rows):
    """Stack rows of numbers and of tensors [N] to [N, rows, columns]."""
    like = next(entry for row in rows for entry in row if isinstance(entry, Tensor))
    full = [[entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for entry in row] for row in rows]
    return torch.stack([torch.stack(row, dim=-1) for row in full], dim=-2)


def _one_of_two(p):
    """How often each of two independent rotations is applied for at least one to be with probability p."""
    return 1 - math.sqrt(1 - min(p, 1.0))


def geometric_transforms(size: int) -> tuple[Transform, ...]:
    """Return pixel blitting and general geometry, in order, for pictures of that side in pixels.

    Positions are in pixels from the picture's centre, x to the right and y down.
    """
    return (
        Transform(flip, one_of(2)),
        Transform(quarter_turn, one_of(4)),
        Transform(translate, whole_within(MAX_SHIFT * size), parameters=2),
        Transform(scale, gaussian(LOG2_SCALE_STD)),
        Transform(rotate, within(math.pi), probability=_one_of_two),
        Transform(stretch, gaussian(LOG2_SCALE_STD)),
        Transform(rotate, within(math.pi), probability=_one_of_two),
        Transform(translate, gaussian(SHIFT_STD * size), parameters=2),
    )


# In order; colours are in [-1, 1].
COLOUR_TRANSFORMS = (
    Transform(brightness, gaussian(BRIGHTNESS_STD)),
    Transform(contrast, gaussian(LOG2_CONTRAST_STD)),
    Transform(luma_flip, one_of(2)),
    Transform(hue, within(math.pi)),
    Transform(saturation, gaussian(LOG2_SATURATION_STD)),
)


def choose_parameters(transforms: Sequence[Transform], draws: Draws, p: float) -> list[Tensor]:
    """Return the parameters [N, 2] of every transform: as drawn with the transform's probability, otherwise 0."""
    return [
        t.spread(draws.uniform[:, i], draws.normal[:, i]) * (draws.gate[:, i, None] < t.probability(p))
        for i, t in enumerate(transforms)
    ]


def compose(transforms: Sequence[Transform], parameters: Sequence[Tensor]) -> Tensor:
    """Return the matrices [N, d, d] of all transforms, the first applied first."""
    matrices = [t.matrix(*values.unbind(1)[: t.parameters]) for t, values in zip(transforms, parameters, strict=True)]
    return functools.reduce(lambda done, matrix: matrix @ done, matrices)


def compose_inverse(transforms: Sequence[Transform], parameters: Sequence[Tensor]) -> Tensor:
    """Return the inverse of what `compose` returns, for geometric transforms."""
    return compose(transforms[::-1], [-values for values in parameters[::-1]])


def resample(images: Tensor, sources: Tensor) -> Tensor:
    """Return pictures whose position q shows what the input has at sources·q; outside it is mirrored at its edges.

    images: float32 [N, C, R, R], R >= 4. sources: [N, 3, 3] on pixels from the centre.
    Two-fold upsampling, bilinear interpolation, two-fold downsampling. The low-pass filter's centre is a tap, so
    upsampled pixel j shows position j/2, and the last of 2R - 1 the centre of the last pixel. That is where padding
    mirrors, and `grid_sample` with align_corners=True. The filter and its reverse, which downsamples, are orthonormal:
    where pixels fall on pixels without being mirrored, they are kept.
    """
    size = images.shape[-1]
    lowpass = _lowpass(images.device)
    m = UPSAMPLING_MARGIN
    fine = upsample2d(pad(images, (m,) * 4, mode='reflect'), lowpass, padding=(-2 * m, -2 * m - 1) * 2)
    indices = torch.arange(-TAPS_BEFORE, 2 * size - 1 + TAPS_AFTER, device=images.device)
    line = (indices - (size - 1)) / 2
    right, down, origin = sources[:, None, None, :2].unbind(-1)  # [N, 1, 1, 2]
    grid = (right * line[None, :, None] + down * line[:, None, None] + origin) * (2 / (size - 1))
    warped = grid_sample(fine, grid, padding_mode='reflection', align_corners=True)
    return downsample2d(warped, lowpass, padding=(-TAPS_BEFORE, 1 - TAPS_AFTER) * 2, flip_filter=True)


@functools.cache
def _lowpass(device):
    """The filter on a device: a copy in every call would make the host wait."""
    return setup_filter(SYM6).to(device)


def recolour(images: Tensor, matrices: Tensor) -> Tensor:
    """Map the RGB triples of [N, 3T, H, W] by homogeneous matrices [N, 4, 4]."""
    n, c, h, w = images.shape
    colours = images.reshape(n, c // 3, 3, h * w)
    return (matrices[:, None, :3, :3] @ colours + matrices[:, None, :3, 3:]).reshape(n, c, h, w)


class AugmentPipe:
    """Augment pictures [N, C, R, R] in [-1, 1]: a sample's channels move together; results may leave the range.

    p:                probability of every transform, a float that the training loop moves; from 1 on all are applied.
    colour_channels:  the first so many channels are RGB triples, and all of a sample change alike. Further ones move,
                      but keep their colours.
    Random numbers belong to samples (`torch_utils.randomness`); the same count is drawn whatever p is.
    """

    def __init__(self, p: float = 0.0, colour_channels: int = 6):
        if colour_channels < 3 or colour_channels % 3:
            raise ValueError(f'colour_channels: expected a positive multiple of 3, got {colour_channels}')
        self.p, self.colour_channels = p, colour_channels

    def __call__(self, images: Tensor) -> Tensor:
        """Return pictures of the same shape and dtype, computed in float32; the input itself if p is 0."""
        n, channels, height, width = images.shape
        if height != width or channels < self.colour_channels:
            raise ValueError(
                f'images: expected square pictures of {self.colour_channels} channels or more, got {list(images.shape)}'
            )
        geometric = geometric_transforms(width)
        draws = Draws.sample(n, len(geometric) + len(COLOUR_TRANSFORMS), images.device)
        if self.p <= 0:
            return images
        for_geometry, for_colour = draws.split(len(geometric))
        sources = compose_inverse(geometric, choose_parameters(geometric, for_geometry, self.p))
        colour = compose(COLOUR_TRANSFORMS, choose_parameters(COLOUR_TRANSFORMS, for_colour, self.p))
        moved = resample(images.float(), sources)
        coloured = recolour(moved[:, : self.colour_channels], colour)
        return torch.cat([coloured, moved[:, self.colour_channels :]], dim=1).to(images.dtype)
