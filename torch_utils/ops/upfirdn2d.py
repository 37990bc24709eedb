# SPDX-License-Identifier: Apache-2.0
"""Upsample, pad, filter, downsample: the resampling of StyleGAN2 (Karras et al. 2020, appendix B), and its wrappers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from torch_utils.custom_ops import cuda_backend, pick_impl, plugin

SEPARABLE_FROM_TAPS = 8  # 1-D filters of fewer taps are stored as their outer product.

_BACKENDS = {'cuda': cuda_backend('upfirdn2d_cuda')}


def setup_filter(
    f: torch.Tensor | Sequence | None,
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
) -> torch.Tensor:
    """Return the float32 FIR filter that `upfirdn2d` takes: [fh, fw], or [taps] for a separable one.

    f:          taps, 1-D or 2-D; None stands for the identity [1].
    normalize:  divide by the sum. gain: factor of the 2-D response. flip_filter: reverse the taps.
    separable:  keep a 1-D filter 1-D; None: from 8 taps on.
    """
    f = torch.as_tensor([1.0] if f is None else f, dtype=torch.float32)
    if f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f'f: expected a 1-D or 2-D filter with at least one tap, got shape {list(f.shape)}')
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= SEPARABLE_FROM_TAPS
    if f.ndim == 1 and not separable:
        f = f.ger(f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    impl: str | None = None,
) -> torch.Tensor:
    """Put zeros after every sample, pad, convolve with the filter times gain, keep every down-th sample from 0 on.

    x:            [N, C, H, W] of any floating dtype.
    f:            float32 [fh, fw], [taps] (separable), or None for the identity.
    up, down:     factors, an int or (x, y).
    padding:      an int, (x, y) or (x_before, x_after, y_before, y_after) in upsampled pixels; negative crops.
    flip_filter:  False: convolution; True: correlation.
    impl:         'cuda' (compiled, CUDA tensors; sums of half types are fp32, the layout of x is kept), 'ref' (torch
                  operations, any device) or None: follow the device.
    Returns [N, C, (H·up + pads - fh) // down + 1, likewise W]. Differentiable any number of times with respect to x,
    with the same implementation. Raises ValueError for bad arguments, RuntimeError if `impl` cannot be used.
    """
    if x.ndim != 4:
        raise ValueError(f'x: expected [N, C, H, W], got {list(x.shape)}')
    if f is not None and (f.ndim not in (1, 2) or f.numel() == 0):
        raise ValueError(f'f: expected [fh, fw], [taps] or None, got {list(f.shape)}')
    up, down, padding = parse_factor('up', up), parse_factor('down', down), parse_padding(padding)
    fw, fh = filter_size(f)
    if x.shape[3] * up[0] + sum(padding[:2]) < fw or x.shape[2] * up[1] + sum(padding[2:]) < fh:
        raise ValueError(f'x: upsampled and padded it is smaller than the filter [{fh}, {fw}], got {list(x.shape)}')
    implementation = _IMPLEMENTATIONS[pick_impl('upfirdn2d', impl, x.device, _BACKENDS)]
    if torch.is_grad_enabled() and x.requires_grad:
        return _Upfirdn2d.apply(x, f, implementation, up, down, padding, flip_filter, gain)
    return implementation(x, f, up, down, padding, flip_filter, gain)


class _Upfirdn2d(torch.autograd.Function):
    """Linear in x, so its gradient is its adjoint: another upfirdn2d with the filter and the factors turned round.

    Torch's own second gradient of a depthwise convolution runs channel by channel: a hundred times slower on a GPU.
    """

    @staticmethod
    def forward(ctx, x, f, implementation, *arguments):
        ctx.save_for_backward(f)
        ctx.size, ctx.implementation, ctx.arguments = x.shape[2:], implementation, arguments
        return implementation(x, f, *arguments)

    @staticmethod
    def backward(ctx, gradient):
        (f,) = ctx.saved_tensors
        up, down, (px0, _, py0, _), flip_filter, gain = ctx.arguments
        (fw, fh), (h, w) = filter_size(f), ctx.size
        padding = (
            fw - 1 - px0, w * up[0] - gradient.shape[3] * down[0] + px0 - up[0] + 1,
            fh - 1 - py0, h * up[1] - gradient.shape[2] * down[1] + py0 - up[1] + 1,
        )
        x = _Upfirdn2d.apply(gradient, f, ctx.implementation, down, up, padding, not flip_filter, gain)
        return x, None, None, None, None, None, None, None


def _upfirdn2d_cuda(x, f, up, down, padding, flip_filter, gain):
    return plugin('upfirdn2d_cuda').forward(x, f, up, down, padding, flip_filter, gain)


def _upfirdn2d_ref(x, f, up, down, padding, flip_filter, gain):
    x = _insert_zeros(x, up)
    if f is None:
        x = functional.pad(x, padding) if any(padding) else x
        return (x * gain if gain != 1 else x)[:, :, :: down[1], :: down[0]]
    f = f.to(x.dtype) * gain ** (f.ndim / 2)
    if not flip_filter:
        f = f.flip(list(range(f.ndim)))
    if f.ndim == 2:
        return _filter(x, f, down, padding)
    x = _filter(x, f[None, :], (down[0], 1), (*padding[:2], 0, 0))
    return _filter(x, f[:, None], (1, down[1]), (0, 0, *padding[2:]))


def _insert_zeros(x, up):
    if up == (1, 1):
        return x
    n, c, h, w = x.shape
    x = functional.pad(x.reshape(n, c, h, 1, w, 1), (0, up[0] - 1, 0, 0, 0, up[1] - 1))
    return x.reshape(n, c, h * up[1], w * up[0])


def _filter(x, f, stride, padding):
    """Pad, and correlate every channel with the same [fh, fw] filter, as a depthwise convolution."""
    inner = (0, 0)
    if padding[0] == padding[1] >= 0 and padding[2] == padding[3] >= 0:
        inner = (padding[2], padding[0])  # The convolution pads without a copy of the picture.
    else:
        x = functional.pad(x, padding)
    c = x.shape[1]
    f = f.expand(c, 1, *f.shape)
    return functional.conv2d(x, f, stride=(stride[1], stride[0]), padding=inner, groups=c)


_IMPLEMENTATIONS = {'ref': _upfirdn2d_ref, 'cuda': _upfirdn2d_cuda}


def filter2d(x, f, padding=0, flip_filter=False, gain=1.0, impl=None):
    """Filter [N, C, H, W] at its own size (plus padding); arguments as in `upfirdn2d`."""
    (fw, fh), (px0, px1, py0, py1) = filter_size(f), parse_padding(padding)
    pads = [px0 + fw // 2, px1 + (fw - 1) // 2, py0 + fh // 2, py1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1.0, impl=None):
    """Upsample [N, C, H, W] by `up` with the filter, keeping the mean; arguments as in `upfirdn2d`."""
    (ux, uy), (fw, fh), (px0, px1, py0, py1) = parse_factor('up', up), filter_size(f), parse_padding(padding)
    pads = [px0 + (fw + ux - 1) // 2, px1 + (fw - ux) // 2, py0 + (fh + uy - 1) // 2, py1 + (fh - uy) // 2]
    return upfirdn2d(x, f, up=(ux, uy), padding=pads, flip_filter=flip_filter, gain=gain * ux * uy, impl=impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1.0, impl=None):
    """Filter and downsample [N, C, H, W] by `down`; arguments as in `upfirdn2d`."""
    (dx, dy), (fw, fh), (px0, px1, py0, py1) = parse_factor('down', down), filter_size(f), parse_padding(padding)
    pads = [px0 + (fw - dx + 1) // 2, px1 + (fw - dx) // 2, py0 + (fh - dy + 1) // 2, py1 + (fh - dy) // 2]
    return upfirdn2d(x, f, down=(dx, dy), padding=pads, flip_filter=flip_filter, gain=gain, impl=impl)


def filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """Return (width, height) in taps of a filter as `upfirdn2d` takes it; (1, 1) for None."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def _as_tuple(value, repeats):
    """Repeat an int; make a tuple of a sequence, an empty one of anything else."""
    if isinstance(value, (int, np.integer)):
        return (value,) * repeats
    return tuple(value) if np.iterable(value) else ()


def parse_factor(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return an int or (x, y) as (x, y), both at least 1; `name` is used in the error."""
    pair = _as_tuple(value, 2)
    if len(pair) != 2 or any(int(v) != v or v < 1 for v in pair):
        raise ValueError(f'{name}: expected an int >= 1 or two of them, got {value!r}')
    return int(pair[0]), int(pair[1])


def parse_padding(value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """Return an int, (x, y) or (x_before, x_after, y_before, y_after) as the last of these."""
    pads = _as_tuple(value, 4)
    if len(pads) == 2:
        pads = (pads[0], pads[0], pads[1], pads[1])
    if len(pads) != 4 or any(int(p) != p for p in pads):
        raise ValueError(f'padding: expected 1, 2 or 4 ints, got {value!r}')
    return tuple(int(p) for p in pads)
