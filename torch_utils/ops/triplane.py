# SPDX-License-Identifier: Apache-2.0
"""Triplane field (Chan et al. 2022, section 4.1 and 4.3) on the GPU: density queries and rays in fused kernels.

The reference is `training.volume`, which calls this where `problem` finds nothing in the way.
"""

from typing import NamedTuple

import torch

from torch_utils.custom_ops import triton_problem

POINTS_PER_PROGRAM = 128
RAYS_PER_PROGRAM = 8  # Of the backward pass: gradients of the decoder are summed in registers over so many.
SMALLEST_DOT, MOST_CHANNELS, MOST_HIDDEN, MOST_SAMPLES = 16, 64, 128, 256


class Decoder(NamedTuple):
    """Effective weights of the two dense layers: w1 [H, C], b1 [H], w2 [1 + C, H], b2 [1 + C]; row 0 is density's."""

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


class Field(NamedTuple):
    """Planes [N, 3, C, H, W] of any strides, float32 or half precision, and how points find their place in them.

    scale: plane coordinate in [-1, 1] per world unit. axes: (column, row) coordinate of each plane.
    """

    planes: torch.Tensor
    decoder: Decoder
    scale: float
    axes: tuple


class Rendered(NamedTuple):
    """Composited rays: features [N, M, C] in 2x-1 scale, depth [N, M, 1] (NaN without weight), total [N, M, 1]."""

    features: torch.Tensor
    depth: torch.Tensor
    total: torch.Tensor


def problem(field: Field, num_samples: int = 1) -> str | None:
    """Return why the kernels cannot take this field, on its device, with so many samples a ray; None where they can."""
    device, channels, hidden = field.planes.device, field.planes.shape[2], field.decoder.w1.shape[0]
    if field.decoder.w2.shape[0] != channels + 1:
        return 'the decoder has other numbers of channels than the planes'
    for name, size, most in (('channels', channels, MOST_CHANNELS), ('hidden units', hidden, MOST_HIDDEN)):
        if size & (size - 1) or not SMALLEST_DOT <= size <= most:
            return f'{name}: expected a power of two from {SMALLEST_DOT} to {most}, got {size}'
    if field.planes.dtype == torch.float64:
        return 'it computes in float32'
    if num_samples > MOST_SAMPLES:
        return f'samples: expected at most {MOST_SAMPLES} a ray, got {num_samples}'
    return triton_problem(device)


def query(field: Field, points: torch.Tensor, with_rgb: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return raw density [N, M, 1] and, unless with_rgb is False, colours [N, M, C] at world points [N, M, 3].

    Both are float32 whatever the planes are. Differentiable once in planes and decoder.
    """
    if points.shape[1] >= field.planes[0, 0, 0].numel():
        field = _with_channels_last(field)
    sigma, rgb = _Query.apply(
        field.planes, *field.decoder, points.detach().float().contiguous(), field.scale, field.axes, with_rgb
    )
    return sigma, rgb if with_rgb else None


def render(field: Field, origins: torch.Tensor, directions: torch.Tensor, depths: torch.Tensor,
           draws: torch.Tensor | None, white_back: bool = False) -> tuple[Rendered, torch.Tensor]:
    """Render rays [N, M, 3] in two passes; return what they show and the depths [N, M, S + F] that were composited.

    depths: [N, M, S] of the first pass, ascending along each ray. draws: [N, M, F] in [0, 1) for the second pass, or
    None for a single pass. Differentiable once in planes and decoder; every pass recomputes what it needs, so that no
    features of points are in memory.
    """
    origins, directions, depths = (x.float().contiguous() for x in (origins, directions, depths))
    field = _with_channels_last(field)
    if draws is not None and depths.numel():
        depths = _add_fine_depths(field, origins, directions, depths, draws)
    features, depth, total = _March.apply(
        field.planes, *field.decoder, origins, directions, depths, field.scale, field.axes, white_back
    )
    return Rendered(features, depth[..., None], total[..., None]), depths


def _with_channels_last(field):
    """Copy planes whose channels are not together: for many samples that costs less than its share of their reads."""
    return field._replace(planes=field.planes.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3))


@torch.no_grad()
def _add_fine_depths(field, origins, directions, depths, draws):
    from torch_utils.ops import triplane_kernels as kernels

    n, m, s = depths.shape
    sigma = torch.empty_like(depths)
    grid = (_blocks(m * s, POINTS_PER_PROGRAM), n)
    kernels.ray_density_kernel[grid](
        field.planes, origins, directions, depths, *_contiguous(field.decoder), sigma, m, s, *_plane_arguments(field),
        **_constants(field), P=POINTS_PER_PROGRAM, num_warps=_warps(POINTS_PER_PROGRAM),
    )
    draws = draws.flatten(0, 1)
    merged = depths.new_empty([n, m, s + draws.shape[1]])
    size = _power_of_two(max(s, draws.shape[1]))
    kernels.importance_kernel[(n * m,)](
        depths, sigma, draws, merged, draws.stride(0), draws.stride(1), s, draws.shape[1],
        S=size, num_warps=1,
    )
    return merged


class _Query(torch.autograd.Function):
    """Decoded points; the gradient recomputes them."""

    @staticmethod
    def forward(ctx, planes, w1, b1, w2, b2, points, scale, axes, with_rgb):
        """Return density [N, M, 1] and colours [N, M, C], or [N, M, 0] without them; nothing of the points is kept."""
        from torch_utils.ops import triplane_kernels as kernels  # Importing Triton takes half a second.

        field = Field(planes, Decoder(*_contiguous((w1, b1, w2, b2))), scale, axes)
        ctx.save_for_backward(planes, *field.decoder, points)
        ctx.scale, ctx.axes = scale, axes
        n, m, _ = points.shape
        sigma = points.new_empty([n, m, 1])
        rgb = points.new_empty([n, m, planes.shape[2] if with_rgb else 0])
        if n * m:
            kernels.query_kernel[(_blocks(m, POINTS_PER_PROGRAM), n)](
                planes, points, *field.decoder, sigma, rgb, m, *_plane_arguments(field), **_constants(field),
                P=POINTS_PER_PROGRAM, WITH_RGB=with_rgb, num_warps=_warps(POINTS_PER_PROGRAM),
            )
        return sigma, rgb

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_sigma, g_rgb):
        """Return gradients of the planes, in their dtype, and of the decoder's four tensors."""
        from torch_utils.ops import triplane_kernels as kernels

        planes, *decoder, points = ctx.saved_tensors
        field = Field(planes, Decoder(*decoder), ctx.scale, ctx.axes)
        n, m, _ = points.shape
        if g_rgb.shape[2] == 0:
            g_rgb = g_rgb.new_zeros([n, m, planes.shape[2]])
        g_planes, g_decoder = _zero_gradients(field)
        if n * m:
            kernels.query_backward_kernel[(_blocks(m, POINTS_PER_PROGRAM), n)](
                planes, points, *decoder, g_sigma.contiguous(), g_rgb.contiguous(), g_planes, *g_decoder, m,
                *_plane_arguments(field), **_constants(field), P=POINTS_PER_PROGRAM,
                num_warps=_warps(POINTS_PER_PROGRAM),
            )
        return _as_planes(g_planes, planes), *g_decoder, *[None] * 4


class _March(torch.autograd.Function):
    """Compositing with the decoder inside: the gradient recomputes the samples."""

    @staticmethod
    def forward(ctx, planes, w1, b1, w2, b2, origins, directions, depths, scale, axes, white_back):
        """Return features [N, M, C], depth [N, M] and total weight [N, M] of rays with depths [N, M, S]."""
        from torch_utils.ops import triplane_kernels as kernels

        field = Field(planes, Decoder(*_contiguous((w1, b1, w2, b2))), scale, axes)
        ctx.save_for_backward(planes, *field.decoder, origins, directions, depths)
        ctx.scale, ctx.axes, ctx.white_back = scale, axes, white_back
        n, m, s = depths.shape
        features = depths.new_empty([n, m, planes.shape[2]])
        depth, total = depths.new_empty([n, m]), depths.new_empty([n, m])
        if n * m:
            kernels.march_kernel[(n * m,)](
                planes, origins, directions, depths, *field.decoder, features, depth, total, m, s,
                *_plane_arguments(field), **_constants(field), S=_power_of_two(s), WHITE_BACK=white_back,
                num_warps=_warps(s),
            )
        return features, depth, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_features, g_depth, g_total):
        """Return gradients of the planes, in their dtype, and of the decoder's four tensors."""
        from torch_utils.ops import triplane_kernels as kernels

        planes, *decoder, origins, directions, depths = ctx.saved_tensors
        field = Field(planes, Decoder(*decoder), ctx.scale, ctx.axes)
        n, m, s = depths.shape
        g_planes, g_decoder = _zero_gradients(field)
        if n * m:
            kernels.march_backward_kernel[(_blocks(n * m, RAYS_PER_PROGRAM),)](
                planes, origins, directions, depths, *decoder, g_features.contiguous(), g_depth.contiguous(),
                g_total.contiguous(), g_planes, *g_decoder, m, s, n * m, *_plane_arguments(field),
                **_constants(field), S=_power_of_two(s), WHITE_BACK=ctx.white_back, RAYS=RAYS_PER_PROGRAM,
                num_warps=_warps(s),
            )
        return _as_planes(g_planes, planes), *g_decoder, *[None] * 6


def _zero_gradients(field):
    """Return zeros for the planes' gradient, [N, 3, H, W, C] float32, and like the decoder's weights."""
    n, planes, c, h, w = field.planes.shape
    return field.planes.new_zeros([n, planes, h, w, c], dtype=torch.float32), [*map(torch.zeros_like, field.decoder)]


def _as_planes(gradient, planes):
    return gradient.permute(0, 1, 4, 2, 3).to(planes.dtype)


def _contiguous(decoder):
    return tuple(x.float().contiguous() for x in decoder)


def _plane_arguments(field):
    n, p, c, h, w = field.planes.stride()
    return n, p, c, h, w, *field.planes.shape[3:], field.scale


def _constants(field):
    import triton.language as tl

    dtype = field.planes.dtype
    dot = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
    # Three TF32 products are as exact as one of float32 and run on the tensor cores.
    precision = 'tf32' if torch.backends.cuda.matmul.allow_tf32 else 'tf32x3'
    axes = tuple(axis for pair in field.axes for axis in pair)
    return dict(AXES=axes, C=field.planes.shape[2], H=field.decoder.w1.shape[0], DOT=dot, PRECISION=precision)


def _warps(points):
    """Return how many warps share a block of points: enough that its features stay in registers, no more."""
    return 8 if _power_of_two(points) >= 128 else 4


def _blocks(count, size):
    return (count + size - 1) // size


def _power_of_two(number):
    return max(1 << (number - 1).bit_length(), SMALLEST_DOT)
