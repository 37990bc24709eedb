# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one call: the tail of every StyleGAN2 layer (Karras et al. 2020, section 2)."""

import math
from typing import Callable, NamedTuple

import torch
from torch.nn import functional

from torch_utils.custom_ops import cuda_backend, pick_impl, plugin


class Activation(NamedTuple):
    """An element-wise function with the gain that keeps the variance of a unit normal input about one."""

    function: Callable[[torch.Tensor, float], torch.Tensor]
    default_gain: float
    default_alpha: float = 0.0


ACTIVATIONS = {
    'linear': Activation(lambda x, alpha: x, 1.0),
    'relu': Activation(lambda x, alpha: functional.relu(x), math.sqrt(2)),
    'lrelu': Activation(functional.leaky_relu, math.sqrt(2), 0.2),
    'tanh': Activation(lambda x, alpha: torch.tanh(x), 1.0),
    'sigmoid': Activation(lambda x, alpha: torch.sigmoid(x), 1.0),
    'elu': Activation(lambda x, alpha: functional.elu(x), 1.0),
    'selu': Activation(lambda x, alpha: functional.selu(x), 1.0),
    'softplus': Activation(lambda x, alpha: functional.softplus(x), 1.0),
    'swish': Activation(lambda x, alpha: x * torch.sigmoid(x), math.sqrt(2)),
}
PIECEWISE_LINEAR = ('linear', 'relu', 'lrelu')
PLUGIN = 'bias_act_cuda'
BACKENDS = {'cuda': cuda_backend(PLUGIN)}


class Curve(NamedTuple):
    """The function p -> clamp(gain * act(p)), in the order in which the compiled module takes it."""

    act: str
    alpha: float
    gain: float
    clamp: float | None


def make_curve(act: str, alpha: float | None, gain: float | None, clamp: float | None) -> Curve:
    """Fill in the activation's defaults for None; raise ValueError for arguments that do not fit."""
    if act not in ACTIVATIONS:
        raise ValueError(f'act: expected one of {", ".join(ACTIVATIONS)}, got {act!r}')
    if clamp is not None and not clamp >= 0:
        raise ValueError(f'clamp: expected a number >= 0 or None, got {clamp}')
    activation = ACTIVATIONS[act]
    alpha = activation.default_alpha if alpha is None else alpha
    return Curve(act, alpha, activation.default_gain if gain is None else gain, clamp)


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = 'linear',
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """Return clamp(gain * act(x + b)).

    x:     tensor of any shape and floating dtype; the result has its shape, dtype and layout.
    b:     bias [x.shape[dim]] of x's dtype, added along `dim`, or None.
    act:   a key of ACTIVATIONS. alpha: negative slope of 'lrelu', without effect on the others; None: the default.
    gain:  factor after the activation; None: the activation's default. clamp: limit of the absolute value, or None.
    impl:  'cuda' (CUDA tensors), 'ref' (torch operations, any device) or None: follow the device.
    Differentiable any number of times with respect to x and b. Raises ValueError for arguments that do not fit,
    RuntimeError if the named implementation cannot be used.

    'cuda' computes in fp32 (fp64 for fp64) and rounds once, 'ref' rounds half types after every step: they agree to
    the tolerance of the type. For the first gradient 'cuda' keeps two bits per element where `act` is linear, relu or
    lrelu, and x otherwise. What lies at a kink or at the limit of the clamp has torch's gradient; in half types, what
    'ref' would round to such a place counts as where it was before.
    """
    curve = make_curve(act, alpha, gain, clamp)
    if b is not None and (b.ndim != 1 or not -x.ndim <= dim < x.ndim or b.shape[0] != x.shape[dim]):
        raise ValueError(f'b: expected one number per entry of dimension {dim} of {list(x.shape)}, got {list(b.shape)}')
    if b is not None and b.dtype != x.dtype:
        raise ValueError(f'b: expected {x.dtype} like x, got {b.dtype}')
    if pick_impl('bias_act', impl, x.device, BACKENDS) == 'ref':
        return _bias_act_ref(x, b, dim, curve)
    return _bias_act_cuda(x, b, 0 if b is None else dim % x.ndim, curve)


def _add_bias(x, b, dim):
    return x if b is None else x + b.reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])


def _bias_act_ref(x, b, dim, curve):
    # Without a gradient to keep, the later steps may overwrite the result of the first: a third of the memory traffic.
    is_own = b is not None
    x = _add_bias(x, b, dim)
    y = ACTIVATIONS[curve.act].function(x, curve.alpha)
    is_own = not y.requires_grad and (is_own or y is not x)
    if curve.gain != 1:
        y = y.mul_(curve.gain) if is_own else y * curve.gain
        is_own = not y.requires_grad
    if curve.clamp is None:
        return y
    return y.clamp_(-curve.clamp, curve.clamp) if is_own else y.clamp(-curve.clamp, curve.clamp)


def needs_graph(*tensors: torch.Tensor | None) -> bool:
    """Tell whether a function of these tensors has to be recorded for a gradient."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _bias_act_cuda(x, b, dim, curve):
    if b is None and curve.act == 'linear' and curve.gain == 1 and curve.clamp is None:
        return x
    if not needs_graph(x, b):
        return plugin(PLUGIN).forward(x, b, dim, *curve, False)[0]
    function = _PiecewiseLinear if curve.act in PIECEWISE_LINEAR else _Smooth
    return function.apply(x, b, dim, curve)


def _bias_gradient(gx, dim):
    return gx.movedim(dim, -1).sum_to_size(gx.shape[dim])


class _PiecewiseLinear(torch.autograd.Function):
    """linear, relu and lrelu: the derivative has three values, which the forward kernel writes down."""

    @staticmethod
    def forward(ctx, x, b, dim, curve):
        is_constant = curve.act == 'linear' and curve.clamp is None
        y, mask = plugin(PLUGIN).forward(x, b, dim, *curve, not is_constant)
        ctx.save_for_backward(mask)
        ctx.strides, ctx.dim, ctx.curve = y.stride(), dim, curve
        return y

    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        gx = g * ctx.curve.gain if mask is None else _MaskedGradient.apply(g, mask, ctx.strides, ctx.curve)
        return gx, _bias_gradient(gx, ctx.dim) if ctx.needs_input_grad[1] else None, None, None


class _MaskedGradient(torch.autograd.Function):
    """Linear in g and its own transpose, hence its own gradient."""

    @staticmethod
    def forward(ctx, g, mask, strides, curve):
        ctx.save_for_backward(mask)
        ctx.strides, ctx.curve = strides, curve
        return plugin(PLUGIN).masked_gradient(g, mask, strides, *curve)

    @staticmethod
    def backward(ctx, gg):
        return _MaskedGradient.apply(gg, *ctx.saved_tensors, ctx.strides, ctx.curve), None, None, None


class _Smooth(torch.autograd.Function):
    """The other activations: the derivative is computed anew from x and b."""

    @staticmethod
    def forward(ctx, x, b, dim, curve):
        ctx.save_for_backward(x, b)
        ctx.dim, ctx.curve = dim, curve
        return plugin(PLUGIN).forward(x, b, dim, *curve, False)[0]

    @staticmethod
    def backward(ctx, g):
        gx = _SmoothGradient.apply(g, *ctx.saved_tensors, ctx.dim, ctx.curve)
        return gx, _bias_gradient(gx, ctx.dim) if ctx.needs_input_grad[1] else None, None, None


class _SmoothGradient(torch.autograd.Function):
    """g * f'(x + b); linear in g. What the curvature f'' adds to the second gradient is left to torch."""

    @staticmethod
    def forward(ctx, g, x, b, dim, curve):
        ctx.save_for_backward(g, x, b)
        ctx.dim, ctx.curve = dim, curve
        return plugin(PLUGIN).smooth_gradient(g, x, b, dim, *curve)

    @staticmethod
    def backward(ctx, gg):
        g, x, b = ctx.saved_tensors
        _, needs_x, needs_b, *_ = ctx.needs_input_grad
        along = _SmoothGradient.apply(gg, x, b, ctx.dim, ctx.curve) if ctx.needs_input_grad[0] else None
        if not (needs_x or needs_b):
            return along, None, None, None, None
        gx = (_second_derivative(x, b, ctx.dim, ctx.curve) * gg * g).to(x.dtype)
        return along, gx, _bias_gradient(gx, ctx.dim) if needs_b else None, None, None


def _second_derivative(x, b, dim, curve):
    """Return f''(x + b) in fp32 (fp64 for fp64), with a graph where the caller wants one."""
    has_graph, dtype = torch.is_grad_enabled(), compute_dtype(x)
    with torch.enable_grad():
        p = _add_bias(x.to(dtype), None if b is None else b.to(dtype), dim)
        p = p if has_graph else p.detach().requires_grad_(True)
        y = _bias_act_ref(p, None, dim, curve)
        (first,) = torch.autograd.grad(y, p, torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(first, p, torch.ones_like(first), create_graph=has_graph)[0]


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which the kernels compute for x, and in which they take factors and noise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
