# SPDX-License-Identifier: Apache-2.0
"""What follows a modulated convolution, in one pass: demodulation, noise, bias, activation, gain and clamp."""

import torch
from torch.autograd.function import once_differentiable

from torch_utils.custom_ops import check_shape, pick_impl, plugin, triton_problem
from torch_utils.ops.bias_act import BACKENDS, PLUGIN, bias_act, compute_dtype, make_curve, needs_graph

NUMBERS_PER_TILE, TILES_PER_PROGRAM = 4096, 4  # Of the sums in the gradient.


def modulated_bias_act(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    act: str = 'linear',
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return clamp(gain * act(x * scale[n, c] + noise + b[c])).

    x:     [N, C, H, W] of a floating dtype; the result has its shape, dtype and layout.
    scale: [N, C] of any floating dtype, or None. b: [C] of any floating dtype, or None.
    noise: of any floating dtype and a shape that broadcasts to [N, 1, H, W], or None.
    act, alpha, gain, clamp: as in `bias_act`.
    impl:  'cuda' (CUDA tensors), 'ref' (torch operations in x's dtype, any device) or None: follow the device.
    Differentiable with respect to x, scale, noise and b: 'cuda' once (a second gradient raises RuntimeError), 'ref'
    any number of times. Raises ValueError for arguments that do not fit.

    'cuda' computes in fp32 (fp64 for fp64) and rounds once; for the gradient it keeps its arguments and no more.
    """
    check_shape('x', x, [None] * 4)
    n, c, h, w = x.shape
    if scale is not None:
        check_shape('scale', scale, [n, c])
    if b is not None:
        check_shape('b', b, [c])
    noise = None if noise is None else _broadcast_noise(noise, n, h, w)
    curve = make_curve(act, alpha, gain, clamp)
    chosen = pick_impl('modulated_bias_act', impl, x.device, BACKENDS)
    dtype = x.dtype if chosen == 'ref' else compute_dtype(x)
    terms = [None if term is None else term.to(dtype) for term in (scale, noise, b)]
    if chosen == 'ref':
        return _modulated_bias_act_ref(x, *terms, curve)
    if not needs_graph(x, *terms):
        return plugin(PLUGIN).modulated_forward(x, *terms, *curve)
    return _ModulatedBiasAct.apply(x, *terms, curve)


def _broadcast_noise(noise, n, h, w):
    """Return the noise as [N or 1, 1, H, W]."""
    is_batch = noise.ndim == 4 and noise.shape[0] != 1
    try:
        return noise.expand(n if is_batch else 1, 1, h, w)
    except RuntimeError:
        message = f'noise: expected a shape that broadcasts to [{n}, 1, {h}, {w}], got {list(noise.shape)}'
        raise ValueError(message) from None


def _modulated_bias_act_ref(x, scale, noise, b, curve):
    if scale is not None:
        x = x * scale[:, :, None, None]
    if noise is not None:
        x = x + noise
    return bias_act(x, b, **curve._asdict(), impl='ref')


class _ModulatedBiasAct(torch.autograd.Function):
    """Its gradient recomputes the pre-activation from x, which the gradient of the scale needs anyway."""

    @staticmethod
    def forward(ctx, x, scale, noise, b, curve):
        ctx.save_for_backward(x, scale, noise, b)
        ctx.curve = curve
        return plugin(PLUGIN).modulated_forward(x, scale, noise, b, *curve)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, scale, noise, b = ctx.saved_tensors
        _, needs_scale, needs_noise, needs_b, _ = ctx.needs_input_grad
        needs_gp = needs_scale or needs_noise or needs_b
        gx, gp = plugin(PLUGIN).modulated_backward(g, x, scale, noise, b, *ctx.curve, needs_gp)
        if not needs_gp:
            return gx, None, None, None, None
        is_fused = _is_channels_last(x, gp) and x.dtype != torch.float64 and triton_problem(x.device) is None
        sums = (fused_sums if is_fused else _plain_sums)(gp, x, needs_scale, needs_noise)
        g_noise = sums[1].sum_to_size(noise.shape) if needs_noise else None
        return gx, sums[0], g_noise, sums[2] if needs_b else None, None


def _is_channels_last(*tensors):
    return all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors)


def _plain_sums(gradient, x, with_scale, with_noise):
    """Return the sums of gradient·x over pixels [N, C], and of gradient over channels [N, 1, H, W] and the rest [C].

    The first two are None where they are not asked for.
    """
    dtype = compute_dtype(x)
    along_scale = gradient.to(dtype, copy=True).mul_(x).sum([2, 3]) if with_scale else None
    along_noise = gradient.sum(1, keepdim=True, dtype=dtype) if with_noise else None
    return along_scale, along_noise, gradient.sum([0, 2, 3], dtype=dtype)


def fused_sums(gradient, x, with_scale, with_noise):
    """Return `_plain_sums` of channels-last tensors by one kernel that reads them once."""
    from torch_utils.ops.reduce_kernels import reduce_kernel  # Importing Triton takes half a second.

    n, c, h, w = x.shape
    along_scale, along_bias = (torch.zeros(shape, device=x.device) for shape in ([n, c], [c]))
    along_noise = torch.empty([n, 1, h, w], device=x.device)
    if x.numel():
        width = 1 << (c - 1).bit_length()
        pixels = max(NUMBERS_PER_TILE // width, 1)
        grid = (-(-h * w // (pixels * TILES_PER_PROGRAM)), n)
        reduce_kernel[grid](
            gradient, x, along_scale, along_bias, along_noise, h * w, c, WITH_SCALE=with_scale,
            WITH_NOISE=with_noise, C=width, P=pixels, TILES=TILES_PER_PROGRAM,
        )
    return along_scale if with_scale else None, along_noise if with_noise else None, along_bias
