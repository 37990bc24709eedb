# SPDX-License-Identifier: Apache-2.0
"""The neural texture seen by the head's four views, and its blend with the static planes, in two passes on a GPU.

Only `sample_views` has a gradient, the rest is for inference. The reference is `training.head_raster` with
`Next3DGenerator.blend`.
"""

import torch

from torch_utils.custom_ops import check_shape, triton_problem

PIXELS_PER_PROGRAM = 64


def problem(texture: torch.Tensor) -> str | None:
    """Return why the kernels cannot take textures [N, C, T, T] like this one; None where they can."""
    channels = texture.shape[1]
    if channels & (channels - 1):
        return f'channels: expected a power of two, got {channels}'
    return triton_problem(texture.device)


def sample_views(texture: torch.Tensor, uv: torch.Tensor) -> torch.Tensor:
    """Return the texture [N, C, T, T] that views see, [N, K, C, H, W] with channels last in memory.

    uv: [N, K, H, W, 2] float32 in [-1, 1], bilinear and zero outside. Differentiable once in the texture.
    """
    return _SampleViews.apply(texture, uv.contiguous())


@torch.no_grad()
def sample_front(texture: torch.Tensor, uv: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `sample_views` of the first view alone, [N, C, H, W] channels last in this dtype, without gradient."""
    uv = uv.contiguous()
    h, w = uv.shape[2:4]
    return _sample(texture, uv, h * w, dtype).unflatten(1, (h, w)).permute(0, 3, 1, 2)


def _sample(texture, uv, num_points, dtype):
    """Return the texture at the first points of uv [N, .., 2], [N, num_points, C]."""
    from torch_utils.ops import head_planes_kernels as kernels  # Importing Triton takes half a second.

    n, c = texture.shape[:2]
    check_shape('uv', uv, [n, *[None] * (uv.ndim - 2), 2])
    out = torch.empty([n, num_points, c], dtype=dtype, device=texture.device)
    kernels.sample_kernel[(_blocks(num_points), n)](
        texture, uv, out, num_points, uv.stride(0), *texture.stride(), *texture.shape[2:], C=c, P=PIXELS_PER_PROGRAM
    )
    return out


class _SampleViews(torch.autograd.Function):
    """Linear in the texture; its gradient adds what pixels got to the texels that they read."""

    @staticmethod
    def forward(ctx, texture, uv):
        ctx.save_for_backward(uv)
        ctx.shape, ctx.dtype = texture.shape, texture.dtype
        views = uv.shape[1:4]
        return _sample(texture, uv, views.numel(), texture.dtype).unflatten(1, views).movedim(-1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        from torch_utils.ops import head_planes_kernels as kernels

        (uv,), (n, c, h, w) = ctx.saved_tensors, ctx.shape
        gradient = gradient.movedim(2, -1).contiguous()
        out = torch.zeros([n, h, w, c], device=gradient.device)
        num_points = uv.shape[1:4].numel()
        kernels.sample_backward_kernel[(_blocks(num_points), n)](
            gradient, uv, out, num_points, h, w, C=c, P=PIXELS_PER_PROGRAM
        )
        return out.permute(0, 3, 1, 2).to(ctx.dtype), None


@torch.no_grad()
def blend(
    texture: torch.Tensor, uv: torch.Tensor, alpha: torch.Tensor, visible: torch.Tensor, front: torch.Tensor,
    static: torch.Tensor, layout: str, has_sides: bool, dtype: torch.dtype,
) -> torch.Tensor:
    """Return alpha·dynamic + (1 - alpha)·static [N, 3, C, H, W] in this dtype, channels last within each plane.

    The dynamic planes are `front` [N, C, H, W] and what the other views see of the texture, as `layout` ('next3d' or
    'aligned') puts them; without has_sides, planes 1 and 2 are the static ones. uv: as in `sample_front`. alpha,
    visible: [N, 4, H, W]. static: [N, 3, C, H, W].
    """
    from torch_utils.ops import head_planes_kernels as kernels

    uv, alpha, visible = uv.contiguous(), alpha.contiguous(), visible.contiguous()
    n, _, c, h, w = static.shape
    check_shape('uv', uv, [n, 4, h, w, 2])
    check_shape('front', front, [n, c, h, w])
    out = torch.empty([n, 3, h, w, c], dtype=dtype, device=texture.device)
    kernels.blend_kernel[(_blocks(h * w), 3, n)](
        texture, uv, alpha, visible, front, static, out, h, w, *texture.stride(), *texture.shape[2:], *front.stride(),
        *static.stride(), SIDES=has_sides, ALIGNED=layout == 'aligned', C=c, P=PIXELS_PER_PROGRAM,
    )
    return out.permute(0, 1, 4, 2, 3)


def _blocks(count):
    return (count + PIXELS_PER_PROGRAM - 1) // PIXELS_PER_PROGRAM
