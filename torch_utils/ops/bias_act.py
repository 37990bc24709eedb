# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one call: the tail of every StyleGAN2 layer (Karras et al. 2020, section 2)."""

import math
from typing import Callable, NamedTuple

import torch
from torch.nn import functional

from torch_utils.custom_ops import pick_impl


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
    impl:  'ref' (torch operations, any device) or None: follow the device.
    Differentiable any number of times with respect to x and b. Raises ValueError for arguments that do not fit.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f'act: expected one of {", ".join(ACTIVATIONS)}, got {act!r}')
    if clamp is not None and not clamp >= 0:
        raise ValueError(f'clamp: expected a number >= 0 or None, got {clamp}')
    if b is not None and (b.ndim != 1 or not -x.ndim <= dim < x.ndim or b.shape[0] != x.shape[dim]):
        raise ValueError(f'b: expected one number per entry of dimension {dim} of {list(x.shape)}, got {list(b.shape)}')
    if b is not None and b.dtype != x.dtype:
        raise ValueError(f'b: expected {x.dtype} like x, got {b.dtype}')
    pick_impl('bias_act', impl, x.device)
    return _bias_act_ref(x, b, dim, ACTIVATIONS[act], alpha, gain, clamp)


def _bias_act_ref(x, b, dim, activation, alpha, gain, clamp):
    gain = activation.default_gain if gain is None else gain
    # Without a gradient to keep, the later steps may overwrite the result of the first: a third of the memory traffic.
    is_own = b is not None
    if b is not None:
        x = x + b.reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    y = activation.function(x, activation.default_alpha if alpha is None else alpha)
    is_own = not y.requires_grad and (is_own or y is not x)
    if gain != 1:
        y = y.mul_(gain) if is_own else y * gain
        is_own = not y.requires_grad
    if clamp is None:
        return y
    return y.clamp_(-clamp, clamp) if is_own else y.clamp(-clamp, clamp)
