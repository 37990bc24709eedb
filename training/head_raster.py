# SPDX-License-Identifier: Apache-2.0
"""Head mesh and neural texture to feature planes: views, coverage, eye mask (Sun et al. 2023, section 3.2)."""

import functools
import math
from typing import NamedTuple

import torch
from torch.nn.functional import grid_sample

from torch_utils.ops import head_planes
from torch_utils.ops.fill_holes import fill_holes
from torch_utils.ops.rasterize import interpolate, rasterize

DEPTH_OFFSET = 10.0  # Keeps every depth positive; only the order of depths matters.
PLANE_LAYOUTS = ('next3d', 'aligned')


class View(NamedTuple):
    """An orthographic view: Euler angles (x, y, z) in degrees, and whether its rows are shifted by `orth_shift`."""

    angles_deg: tuple[float, float, float]
    has_row_shift: bool = True


FRONT, SIDE_A, SIDE_B, TOP = View((0, 0, 0)), View((0, 90, 0)), View((0, -90, 0)), View((90, 0, 0))
TOP_UNSHIFTED = View((90, 0, 0), has_row_shift=False)
VIEWS = {'next3d': (FRONT, SIDE_A, SIDE_B, TOP), 'aligned': (FRONT, SIDE_A, SIDE_B, TOP_UNSHIFTED)}


class Topology(NamedTuple):
    """What the rasteriser needs besides vertices.

    faces: [F, 3] int64. face_uvcoords: [F, 3, 3] of (2u - 1, 1 - 2v, 1) per corner. eye_mask: [1, 1, T, T] in [0, 1],
    the part of the texture that the mesh covers.
    """

    faces: torch.Tensor
    face_uvcoords: torch.Tensor
    eye_mask: torch.Tensor


class ViewCoverage(NamedTuple):
    """Where views see the mesh: uv [N, K, H, W, 2] to sample the texture at, alpha and visible [N, K, H, W]."""

    uv: torch.Tensor
    alpha: torch.Tensor
    visible: torch.Tensor


class HeadPlanes(NamedTuple):
    """Rasterised planes: features [N, 3, C, R, R] and alpha [N, 3, 1, R, R] in [0, 1]."""

    features: torch.Tensor
    alpha: torch.Tensor


def rotation_matrix(angles_deg: tuple[float, float, float]) -> torch.Tensor:
    """Return R = Rz·Ry·Rx [3, 3], right-handed, in float32 throughout: the published planes depend on its rounding."""
    x, y, z = (torch.tensor(math.radians(a), dtype=torch.float32) for a in angles_deg)
    one, zero = torch.ones([]), torch.zeros([])
    rx = torch.stack([one, zero, zero, zero, x.cos(), -x.sin(), zero, x.sin(), x.cos()]).reshape(3, 3)
    ry = torch.stack([y.cos(), zero, y.sin(), zero, one, zero, -y.sin(), zero, y.cos()]).reshape(3, 3)
    rz = torch.stack([z.cos(), -z.sin(), zero, z.sin(), z.cos(), zero, zero, zero, one]).reshape(3, 3)
    return rz @ ry @ rx


def project(points: torch.Tensor, view: View, scale: float, shift: tuple[float, float, float]) -> torch.Tensor:
    """Return screen coordinates [N, M, 3] of mesh points [N, M, 3]: x right, y down in [-1, 1], z away from the viewer.

    scale, shift: `orth_scale` and `orth_shift` of the generator, applied after the rotation of the y-flipped points.
    """
    if not view.has_row_shift:
        shift = (shift[0], 0.0, shift[2])
    flip_y, flip_yz, offset, shift, rotation = _constants(view.angles_deg, tuple(shift), points.device)
    # A sum of products instead of a matrix product: no TF32 may round screen coordinates.
    rotated = ((points * flip_y)[..., :, None] * rotation).sum(dim=-2)
    return (rotated + shift) * scale * flip_yz + offset


@functools.cache  # Without a limit: CUDA graphs go on reading the tensors.
@torch.inference_mode(False)  # Kept for callers in all modes.
def _constants(angles_deg, shift, device):
    """Return what `project` needs on a device: copies from the host would wait for it, and graphs cannot hold them."""
    rows = [[1.0, -1.0, 1.0], [1.0, -1.0, -1.0], [0.0, 0.0, DEPTH_OFFSET], list(shift)]
    return *torch.tensor(rows).to(device).unbind(), rotation_matrix(angles_deg).to(device)


def cover_views(screen: torch.Tensor, topology: Topology, resolution: int, impl: str | None = None) -> ViewCoverage:
    """Rasterise views [N, K, V, 3] of `project` and apply eye mask and hole filling; no gradient."""
    n, k = screen.shape[:2]
    with torch.no_grad():
        result = rasterize(screen.flatten(0, 1).contiguous(), topology.faces, resolution, impl=impl)
        uv = interpolate(result, topology.face_uvcoords[..., :2])
        visible = (result.face >= 0).to(uv.dtype)
        mask = topology.eye_mask.expand(n * k, -1, -1, -1)
        alpha = grid_sample(mask, uv, padding_mode='zeros', align_corners=False) * visible[:, None]
        alpha = fill_holes(alpha)
    return ViewCoverage(*(t.reshape(n, k, *t.shape[1:]) for t in (uv, alpha[:, 0], visible)))


def sample_texture(texture: torch.Tensor, coverage: ViewCoverage) -> torch.Tensor:
    """Return the texture [N, C, T, T] seen in all views [N, K, C, H, W]; differentiable in the texture.

    Pixels without a face read uv (0, 0), the texture's centre, as in the published model.
    """
    if texture.is_cuda and head_planes.problem(texture) is None:
        return head_planes.sample_views(texture, coverage.uv)
    n, k, h, w, _ = coverage.uv.shape
    seen = grid_sample(texture, coverage.uv.reshape(n, k * h, w, 2), padding_mode='zeros', align_corners=False)
    return seen.reshape(n, -1, k, h, w).transpose(1, 2)


def assemble_planes(seen: torch.Tensor, coverage: ViewCoverage, layout: str) -> HeadPlanes:
    """Lay the views (front, side +90, side -90, top) out as planes (xy, xz, zy).

    'next3d': plane 1 is the sum of the side views with the alpha of the first, binarised; plane 2 the top view: what
    published weights expect, though planes 1 and 2 are not read where they are drawn.
    'aligned': each view lies where the volume's lookup reads it: the top view in plane 1 with rows along +z, the side
    views in plane 2 with columns along +z, averaged where both see the mesh.
    """
    front, side_a, side_b, top = seen.unbind(dim=1)
    alpha_front, alpha_a, alpha_b, alpha_top = coverage.alpha[:, :, None].unbind(dim=1)
    if layout == 'next3d':
        features = [front, side_a + side_b, top]
        alpha = [alpha_front, (alpha_a > 0).to(alpha_a.dtype), alpha_top]
    else:
        visible_a, visible_b = coverage.visible[:, 1, None].flip(-1), coverage.visible[:, 2, None]
        side_a, alpha_a = side_a.flip(-1), alpha_a.flip(-1)
        features = [front, top.flip(-2), _mean_of_visible(side_a, side_b, visible_a, visible_b)]
        alpha = [alpha_front, alpha_top.flip(-2), torch.maximum(alpha_a, alpha_b)]
    return HeadPlanes(torch.stack(features, dim=1), torch.stack(alpha, dim=1))


def _mean_of_visible(a, b, visible_a, visible_b):
    """Average two views where both or neither see the mesh, else take the one that does."""
    weight = (1 + visible_a - visible_b) / 2
    return a * weight + b * (1 - weight)
