# SPDX-License-Identifier: Apache-2.0
"""The draws of `torch_utils.randomness` in one Triton launch each, in place of two dozen: the same bits."""

import math

import triton
import triton.language as tl

# 64-bit constants of SplitMix64 as signed numbers, as in torch_utils.randomness.
GOLDEN, MIX_1, MIX_2 = (tl.constexpr(c - 2**64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
TWO_PI = tl.constexpr(2 * math.pi)
FRACTION_MASK, FRACTION = tl.constexpr(2**24 - 1), tl.constexpr(2.0**-24)


@triton.jit
def _shift(x, COUNT: tl.constexpr):
    """Logical shift to the right."""
    return (x >> COUNT) & ((1 << (64 - COUNT)) - 1)


@triton.jit
def _mix(x):
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


@triton.jit
def _fraction(bits, COUNT: tl.constexpr):
    return (_shift(bits, COUNT) & FRACTION_MASK).to(tl.float32) * FRACTION


@triton.jit
def draw_kernel(keys, out, offset, per_sample, NORMAL: tl.constexpr, B: tl.constexpr):
    """Write draws 1 to per_sample of sample program_id(1): uniform in [0, 1), or standard normal (Box and Muller)."""
    sample = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    key = _mix(tl.load(keys + sample) + offset)
    bits = _mix(key + (index + 1) * GOLDEN)
    values = _fraction(bits, 40)
    if NORMAL:
        # 1 - fraction has no rounding: 24 bits.
        values = tl.sqrt(-2.0 * tl.log(1.0 - values)) * tl.cos(TWO_PI * _fraction(bits, 16))
    tl.store(out + sample * per_sample + index, values, mask=index < per_sample)
