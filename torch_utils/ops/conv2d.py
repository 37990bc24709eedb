# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose second gradients run as fast as the first: R1 (Mescheder et al. 2018) differentiates D twice.

Torch expresses the second gradient with respect to the weights as a convolution with a kernel of the picture's size,
which took 106 of 140 ms of R1 on full-size pictures. Here it is the weight gradient that it is: a convolution is linear
in both arguments, so gradients of any order are convolutions, transposed ones and weight gradients. On a CPU torch's
own gradients are taken: they are a tenth faster on small networks.
"""

from typing import NamedTuple

import torch
from torch.nn import functional


_DEVICE_TYPES = ['cuda']


class _Geometry(NamedTuple):
    stride: int
    padding: tuple[int, int]
    groups: int
    is_transposed: bool
    output_padding: tuple[int, int] = (0, 0)


def conv2d(x: torch.Tensor, w: torch.Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0),
           groups: int = 1) -> torch.Tensor:
    """Return torch's conv2d of x [N, C, H, W] with w [O, C/groups, k, k]; padding: rows, columns on each side.

    Differentiable any number of times.
    """
    return _convolve(x, w, _Geometry(stride, padding, groups, is_transposed=False))


def conv_transpose2d(x: torch.Tensor, w: torch.Tensor, stride: int = 1, padding: tuple[int, int] = (0, 0),
                     groups: int = 1) -> torch.Tensor:
    """Return torch's conv_transpose2d of x [N, C, H, W] with w [C, O/groups, k, k].

    Differentiable any number of times.
    """
    return _convolve(x, w, _Geometry(stride, padding, groups, is_transposed=True))


def _convolve(x, w, geometry):
    needs_graph = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    if needs_graph and x.device.type in _DEVICE_TYPES:
        return _Convolution.apply(x, w, geometry)
    return _forward(x, w, geometry)


def _forward(x, w, geometry):
    arguments = dict(stride=geometry.stride, padding=geometry.padding, groups=geometry.groups)
    if geometry.is_transposed:
        return functional.conv_transpose2d(x, w, output_padding=geometry.output_padding, **arguments)
    return functional.conv2d(x, w, **arguments)


def _turned(geometry, w, of, to):
    """Return the geometry of the adjoint with respect to x, from the size of tensor `of` to that of `to`."""
    if geometry.is_transposed:
        return geometry._replace(is_transposed=False, output_padding=(0, 0))
    reached = [(n - 1) * geometry.stride - 2 * p + k
               for n, p, k in zip(of.shape[2:], geometry.padding, w.shape[2:])]
    missing = tuple(wanted - size for wanted, size in zip(to.shape[2:], reached))
    return geometry._replace(is_transposed=True, output_padding=missing)


class _Convolution(torch.autograd.Function):
    """x and w to their convolution."""

    @staticmethod
    def forward(ctx, x, w, geometry):
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return _forward(x, w, geometry)

    @staticmethod
    def backward(ctx, g):
        (x, w), geometry = ctx.saved_tensors, ctx.geometry
        gx = _convolve(g, w, _turned(geometry, w, g, x)) if ctx.needs_input_grad[0] else None
        gw = _WeightGradient.apply(g, x, w.detach(), geometry) if ctx.needs_input_grad[1] else None
        return gx, gw, None


class _WeightGradient(torch.autograd.Function):
    """The gradient of <g, convolution of x with w> with respect to w: bilinear in g and x, w gives its shape."""

    @staticmethod
    def forward(ctx, g, x, w, geometry):
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        stride, padding, groups, is_transposed, output_padding = geometry
        return torch.ops.aten.convolution_backward(
            g, x, w, None, [stride, stride], padding, [1, 1], is_transposed, output_padding, groups,
            [False, True, False],
        )[1]

    @staticmethod
    def backward(ctx, gw):
        (g, x), geometry = ctx.saved_tensors, ctx.geometry
        gg = _convolve(x, gw, geometry) if ctx.needs_input_grad[0] else None
        gx = _convolve(g, gw, _turned(geometry, gw, g, x)) if ctx.needs_input_grad[1] else None
        return gg, gx, None, None
