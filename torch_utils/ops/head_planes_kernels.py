# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `head_planes`: columns of a block are channels, rows pixels; nothing is written but the result."""

import triton
import triton.language as tl

from torch_utils.ops.triplane_kernels import _corner, _pixel, _sample_plane


@triton.jit
def _view(uv, n, view, index, num_pixels, valid):
    """Return where a view's pixels read the texture, u and v [P] in [-1, 1]."""
    at = uv + ((n * 4 + view) * num_pixels + index) * 2
    return tl.load(at, mask=valid, other=0.0), tl.load(at + 1, mask=valid, other=0.0)


@triton.jit
def sample_kernel(texture, uv, out, num_points, stride_uv, stride_n, stride_c, stride_h, stride_w, height, width,
                  C: tl.constexpr, P: tl.constexpr):
    """Write the texture at points: uv [N, num_points, 2], stride_uv numbers from one N to the next -> [N, M, C]."""
    n = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * P + tl.arange(0, P)
    valid = index < num_points
    channels = tl.arange(0, C)
    u = tl.load(uv + n * stride_uv + index * 2, mask=valid, other=0.0)
    v = tl.load(uv + n * stride_uv + index * 2 + 1, mask=valid, other=0.0)
    seen = _sample_plane(texture + n * stride_n, u, v, valid, channels, stride_c, stride_h, stride_w, height, width)
    at = out + (n * num_points + index)[:, None] * C + channels[None, :]
    tl.store(at, seen.to(out.dtype.element_ty), mask=valid[:, None])


@triton.jit
def sample_backward_kernel(gradient, uv, out, num_points, height, width, C: tl.constexpr, P: tl.constexpr):
    """Add the gradient [N, num_points, C] of `sample_kernel` to that of the texture, [N, T, T, C] float32."""
    n = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * P + tl.arange(0, P)
    valid = index < num_points
    channels = tl.arange(0, C)
    column, x_share = _pixel(tl.load(uv + (n * num_points + index) * 2, mask=valid, other=0.0), width)
    row, y_share = _pixel(tl.load(uv + (n * num_points + index) * 2 + 1, mask=valid, other=0.0), height)
    at = gradient + (n * num_points + index)[:, None] * C + channels[None, :]
    values = tl.load(at, mask=valid[:, None], other=0.0).to(tl.float32)
    out += n * height * width * C
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            offset, weight, mask = _corner(column, row, x_share, y_share, dx, dy, width * C, C, height, width, valid)
            tl.atomic_add(out + offset[:, None] + channels[None, :], values * weight[:, None], mask=mask[:, None],
                          sem='relaxed')


@triton.jit
def blend_kernel(texture, uv, alpha, visible, front, static, out, rows, columns,
                 stride_n, stride_c, stride_h, stride_w, height, width, front_n, front_c, front_h, front_w,
                 static_n, static_p, static_c, static_h, static_w,
                 SIDES: tl.constexpr, ALIGNED: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """Write plane program_id(1) of field program_id(2), [N, planes, H, W, C]: alpha·dynamic + (1 - alpha)·static.

    Planes 1 and 2 are laid out as `training.head_raster.assemble_planes` does; without SIDES they are static.
    """
    plane, n = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_pixels = rows * columns
    index = tl.program_id(0) * P + tl.arange(0, P)
    valid = index < num_pixels
    row, column = index // columns, index % columns
    channels = tl.arange(0, C)
    texture += n * stride_n
    alpha += n * 4 * num_pixels
    visible += n * 4 * num_pixels
    if plane == 0:
        at = front + n * front_n + (row * front_h + column * front_w)[:, None] + channels[None, :] * front_c
        seen = tl.load(at, mask=valid[:, None], other=0.0).to(tl.float32)
        share = tl.load(alpha + index, mask=valid, other=0.0)
    elif not SIDES:
        seen = tl.zeros([P, C], tl.float32)
        share = tl.zeros([P], tl.float32)
    elif ALIGNED:
        if plane == 1:
            flipped = (rows - 1 - row) * columns + column
            u, v = _view(uv, n, 3, flipped, num_pixels, valid)
            seen = _sample_plane(texture, u, v, valid, channels, stride_c, stride_h, stride_w, height, width)
            share = tl.load(alpha + 3 * num_pixels + flipped, mask=valid, other=0.0)
        else:
            flipped = row * columns + columns - 1 - column
            sees_a = tl.load(visible + num_pixels + flipped, mask=valid, other=0.0)
            sees_b = tl.load(visible + 2 * num_pixels + index, mask=valid, other=0.0)
            weight = ((1.0 + sees_a - sees_b) * 0.5)[:, None]
            u, v = _view(uv, n, 1, flipped, num_pixels, valid)
            seen = weight * _sample_plane(texture, u, v, valid, channels, stride_c, stride_h, stride_w, height, width)
            u, v = _view(uv, n, 2, index, num_pixels, valid)
            other = _sample_plane(texture, u, v, valid, channels, stride_c, stride_h, stride_w, height, width)
            seen += (1.0 - weight) * other
            share = tl.maximum(tl.load(alpha + num_pixels + flipped, mask=valid, other=0.0),
                               tl.load(alpha + 2 * num_pixels + index, mask=valid, other=0.0))
    else:
        if plane == 1:
            u, v = _view(uv, n, 1, index, num_pixels, valid)
            seen = _sample_plane(texture, u, v, valid, channels, stride_c, stride_h, stride_w, height, width)
            u, v = _view(uv, n, 2, index, num_pixels, valid)
            seen += _sample_plane(texture, u, v, valid, channels, stride_c, stride_h, stride_w, height, width)
            share = (tl.load(alpha + num_pixels + index, mask=valid, other=0.0) > 0).to(tl.float32)
        else:
            u, v = _view(uv, n, 3, index, num_pixels, valid)
            seen = _sample_plane(texture, u, v, valid, channels, stride_c, stride_h, stride_w, height, width)
            share = tl.load(alpha + 3 * num_pixels + index, mask=valid, other=0.0)
    at = static + n * static_n + plane * static_p + (row * static_h + column * static_w)[:, None]
    behind = tl.load(at + channels[None, :] * static_c, mask=valid[:, None], other=0.0).to(tl.float32)
    blended = share[:, None] * seen + (1.0 - share[:, None]) * behind
    at = out + ((n * 3 + plane) * num_pixels + index)[:, None] * C + channels[None, :]
    tl.store(at, blended.to(out.dtype.element_ty), mask=valid[:, None])
