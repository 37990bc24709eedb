# SPDX-License-Identifier: Apache-2.0
"""Leaky ReLU between an upsampling and a downsampling filter, without aliasing (Karras et al. 2021, section 3.1)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_utils.custom_ops import check_shape, cuda_backend, pick_impl, plugin
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import filter_size, parse_factor, parse_padding, upfirdn2d

# What the kernel takes; its tiles have to fit into shared memory.
MAX_FACTOR, MAX_TAPS = 4, 32
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_BACKENDS = {'cuda': cuda_backend('filtered_lrelu_cuda')}


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Add a bias, upsample with `fu` (gain up²), apply lrelu with gain and clamp, downsample with `fd`.

    x:       [N, C, H, W]. b: [C] or None. fu, fd: filters as `upfirdn2d` takes them, or None.
    padding: as in `upfirdn2d`, applied to the upsampled signal; nothing is padded between the two filters.
    impl:    'cuda' (compiled, CUDA tensors; fp16, bf16 and fp32, factors up to 4, filters up to 32 taps high and wide;
             all sums are fp32, the result is contiguous), 'ref' (torch operations, any device) or None: 'cuda' where
             it takes the arguments, else 'ref'.
    Returns [N, C, H', W'], H' = (H·up + pads - (taps(fu) - 1) - (taps(fd) - 1) + down - 1) // down.
    Differentiable any number of times with respect to x and b. Raises ValueError for bad arguments and for those that
    a named implementation does not take, RuntimeError if it cannot be used.
    """
    if pick_impl('filtered_lrelu', impl, x.device, _BACKENDS) == 'cuda':
        problem = _kernel_problem(x, fu, fd, up, down)
        if problem is None:
            return _filtered_lrelu_cuda(x, fu, fd, b, up, down, padding, (gain, slope, clamp), flip_filter)
        if impl is not None:
            raise ValueError(f"filtered_lrelu: impl 'cuda' takes {problem}")
    x = bias_act(x, b, impl='ref')
    x = upfirdn2d(x, fu, up=up, padding=padding, gain=up**2, flip_filter=flip_filter, impl='ref')
    x = bias_act(x, act='lrelu', alpha=slope, gain=gain, clamp=clamp, impl='ref')
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter, impl='ref')


def _kernel_problem(x, fu, fd, up, down):
    """Return what the kernel takes where it does not take these arguments, else None."""
    if x.dtype not in KERNEL_DTYPES:
        return f'fp16, bf16 and fp32, got {x.dtype}'
    if max(up, down) > MAX_FACTOR:
        return f'factors up to {MAX_FACTOR}, got up {up} and down {down}'
    taps = max(*filter_size(fu), *filter_size(fd))
    return f'filters of up to {MAX_TAPS} taps, got {taps}' if taps > MAX_TAPS else None


class _Pipeline(NamedTuple):
    """Upsampling with a first filter, something element-wise, downsampling with a second one; pairs are (x, y).

    Two bits per sample between the filters, its signs, say on which piece of the activation it is. With these given,
    the pipeline is linear, and its adjoint is another one: filters, factors and sizes change places.
    """

    up: int
    down: int
    pads: tuple[int, int]  # Before the picture, in upsampled samples.
    sign_offset: tuple[int, int]  # The signs of sample (0, 0) are those at this position.
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    flip_filter: bool
    gains: tuple[float, float]  # Of the first and the second filter.
    activation: tuple[float, float, float]  # Gain, slope and clamp.

    def adjoint(self, first, second):
        """Return the adjoint of the pipeline with these filters; it takes them in the other order."""
        # Its samples include those that the first filter cropped or padded: by so many they begin earlier.
        margins = [taps - 1 - pad for taps, pad in zip(filter_size(first), self.pads)]
        return _Pipeline(
            up=self.down, down=self.up,
            pads=tuple(taps - 1 + margin for taps, margin in zip(filter_size(second), margins)),
            sign_offset=tuple(offset - margin for offset, margin in zip(self.sign_offset, margins)),
            in_size=self.out_size, out_size=self.in_size, flip_filter=not self.flip_filter, gains=self.gains[::-1],
            activation=self.activation,
        )

    def run(self, x, b, signs, first, second, keeps_signs=False):
        """Return the result and, if asked for, the signs; with signs given, apply the linear pipeline of these."""
        return plugin('filtered_lrelu_cuda').run(
            x, b, signs, first, second, self.up, self.down, self.pads, self.sign_offset, self.out_size,
            self.flip_filter, self.gains, self.activation, keeps_signs)


class _FilteredLrelu(torch.autograd.Function):
    """The pipeline with its activation."""

    @staticmethod
    def forward(ctx, x, b, fu, fd, pipeline):
        y, signs = pipeline.run(x, b, None, fu, fd, keeps_signs=True)
        ctx.save_for_backward(signs, fu, fd)
        ctx.pipeline = pipeline
        return y

    @staticmethod
    def backward(ctx, gradient):
        signs, fu, fd = ctx.saved_tensors
        x = _LinearPipeline.apply(gradient, signs, fd, fu, ctx.pipeline.adjoint(fu, fd))
        return x, x.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None, None, None, None


class _LinearPipeline(torch.autograd.Function):
    """The pipeline with given signs."""

    @staticmethod
    def forward(ctx, x, signs, first, second, pipeline):
        ctx.save_for_backward(signs, first, second)
        ctx.pipeline = pipeline
        return pipeline.run(x, None, signs, first, second)[0]

    @staticmethod
    def backward(ctx, gradient):
        signs, first, second = ctx.saved_tensors
        x = _LinearPipeline.apply(gradient, signs, second, first, ctx.pipeline.adjoint(first, second))
        return x, None, None, None, None


def _filtered_lrelu_cuda(x, fu, fd, b, up, down, padding, activation, flip_filter):
    check_shape('x', x, [None] * 4)
    if b is not None:
        check_shape('b', b, [x.shape[1]])
    (up, _), (down, _) = parse_factor('up', up), parse_factor('down', down)
    gain, slope, clamp = activation
    if clamp is not None and not clamp >= 0:
        raise ValueError(f'clamp: expected a number >= 0 or None, got {clamp}')
    pads, in_size = parse_padding(padding), (x.shape[3], x.shape[2])
    sizes = zip(in_size, (sum(pads[:2]), sum(pads[2:])), filter_size(fu), filter_size(fd))
    out_size = tuple((size * up + pad - (taps_u - 1) - taps_d) // down + 1 for size, pad, taps_u, taps_d in sizes)
    if min(out_size) < 1:
        raise ValueError(f'x: upsampled and padded it is smaller than the filters, got {list(x.shape)}')
    pipeline = _Pipeline(
        up, down, (pads[0], pads[2]), (0, 0), in_size, out_size, flip_filter, (up**2, 1),
        (gain, slope, math.inf if clamp is None else clamp))
    if torch.is_grad_enabled() and (x.requires_grad or b is not None and b.requires_grad):
        return _FilteredLrelu.apply(x, b, fu, fd, pipeline)
    return pipeline.run(x, b, None, fu, fd)[0]
