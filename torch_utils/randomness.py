# SPDX-License-Identifier: Apache-2.0
"""Random numbers that belong to samples: they do not depend on how a batch is split over processes and micro-batches.

Inside `sample_draws` every draw is a function of (seed, phase, number of the sample, number of the draw): a
counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the mixing function
of SplitMix64 (Steele et al. 2014). Elsewhere draws come from torch's generators.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch

from torch_utils.custom_ops import triton_problem

# 64-bit constants of SplitMix64 as signed numbers: torch's integers wrap around.
GOLDEN, MIX_1, MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
FRACTION_BITS = 24  # Of a float32 in [0, 1).
DRAWS_PER_PROGRAM = 1024


class _Stream:
    """Keys of the samples of a micro-batch, and how many draws have been made."""

    def __init__(self, keys):
        self.keys, self.count = keys, 0

    def draw(self, shape, device, is_normal):
        """Return numbers of this shape; the first dimension counts samples, or equal parts of them."""
        samples, device = len(self.keys), torch.device(device)
        if shape and shape[0] % samples:
            raise ValueError(f'shape: expected a multiple of {samples} samples first, got {list(shape)}')
        if self.keys.device.type != device.type:
            self.keys = self.keys.pin_memory().to(device, non_blocking=True)  # Nothing waits for the device.
        keys, per_sample = (self.keys, math.prod(shape) // samples) if shape else (self.keys[:1], 1)
        offset = _wrap(self.count * GOLDEN)
        self.count += 1
        draw = _draw_fused if device.type == 'cuda' and triton_problem(device) is None else _draw
        return draw(keys, offset, per_sample, is_normal).reshape(shape)


def _draw(keys, offset, per_sample, is_normal):
    """Return draws [samples, per_sample] of the samples with these keys."""
    counters = torch.arange(1, per_sample + 1, device=keys.device)
    bits = _mix(_mix(keys + offset)[:, None] + counters * GOLDEN)
    if not is_normal:
        return _fraction(bits, 64 - FRACTION_BITS)
    radius = (-2 * torch.log1p(-_fraction(bits, 64 - FRACTION_BITS))).sqrt()
    return radius * torch.cos(2 * math.pi * _fraction(bits, 64 - 2 * FRACTION_BITS))


def _draw_fused(keys, offset, per_sample, is_normal):
    from torch_utils.ops.draw_kernels import draw_kernel  # Importing Triton takes half a second.

    out = torch.empty([len(keys), per_sample], device=keys.device)
    if out.numel():
        grid = (-(-per_sample // DRAWS_PER_PROGRAM), len(keys))
        draw_kernel[grid](keys, out, offset, per_sample, NORMAL=is_normal, B=DRAWS_PER_PROGRAM)
    return out


_stream: ContextVar[_Stream | None] = ContextVar('stream', default=None)


def sample_keys(seed: int, phase: str, samples: Sequence[int]) -> torch.Tensor:
    """Return the keys [N] int64 of samples by their global numbers, for `keyed_draws`."""
    numbers = torch.as_tensor(samples, dtype=torch.int64)
    start = _mix(torch.tensor(seed, dtype=torch.int64) * GOLDEN + zlib.crc32(phase.encode()))
    return _mix(start + numbers * GOLDEN)


@contextlib.contextmanager
def keyed_draws(keys: torch.Tensor) -> Iterator[None]:
    """Make all draws in the block functions of the samples' keys [N], one per entry of the micro-batch."""
    token = _stream.set(_Stream(keys))
    try:
        yield
    finally:
        _stream.reset(token)


def sample_draws(seed: int, phase: str, samples: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """Make all draws in the block functions of the samples' global numbers, one per entry of the micro-batch."""
    return keyed_draws(sample_keys(seed, phase, samples))


def uniform(shape: Sequence[int], device: torch.device | str = 'cpu') -> torch.Tensor:
    """Return float32 numbers in [0, 1)."""
    stream = _stream.get()
    if stream is None:
        return torch.rand(list(shape), device=device)
    return stream.draw(list(shape), device, is_normal=False)


def normal(shape: Sequence[int], device: torch.device | str = 'cpu') -> torch.Tensor:
    """Return float32 numbers of a standard normal distribution (Box and Muller 1958)."""
    stream = _stream.get()
    if stream is None:
        return torch.randn(list(shape), device=device)
    return stream.draw(list(shape), device, is_normal=True)


def _wrap(number):
    """Return an integer of any size as torch's 64-bit ones wrap around."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(x):
    """SplitMix64's output function on int64 tensors."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _shift(x, count):
    """Logical shift to the right; torch's own copies the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def _fraction(bits, shift):
    return (_shift(bits, shift) & ((1 << FRACTION_BITS) - 1)).to(torch.float32) * 2.0**-FRACTION_BITS
