# SPDX-License-Identifier: Apache-2.0
"""What follows a modulated convolution, in one pass: demodulation, noise, bias, activation, gain and clamp."""

import torch
from torch.autograd.function import once_differentiable

from torch_utils.custom_ops import check_shape, pick_impl, plugin
from torch_utils.ops.bias_act import BACKENDS, PLUGIN, bias_act, compute_dtype, make_curve, needs_graph


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
        dtype = compute_dtype(x)
        g_scale = gp.to(dtype, copy=True).mul_(x).sum([2, 3]) if needs_scale else None
        g_noise = gp.sum(1, keepdim=True, dtype=dtype).sum_to_size(noise.shape) if needs_noise else None
        g_b = gp.sum([0, 2, 3], dtype=dtype) if needs_b else None
        return gx, g_scale, g_noise, g_b, None
