# SPDX-License-Identifier: Apache-2.0
"""Orthographic rasteriser: which face each pixel centre of a view sees, where on it, and how far away."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import torch

from torch_utils.custom_ops import check_shape, cpu_backend, cuda_backend, pick_impl, plugin

# Twice the area (fp32) below which a face is skipped, and what is added to it before the barycentrics divide by it.
AREA_EPSILON = 1e-8

_MAX_CANDIDATES = 2 ** 20  # Pixels tested at a time by the reference: bounds its memory to some 100 MB.
_NO_BOX = 2 ** 63 - 1
_BACKENDS = {'cuda': cuda_backend('rasterize_cuda'), 'cpp': cpu_backend('rasterize')}


class RasterResult(NamedTuple):
    """What each pixel of B views sees; `face` is -1, `barycentric` and `depth` are 0 where there is nothing."""

    face: torch.Tensor         # [B, H, W] int64, index into faces.
    barycentric: torch.Tensor  # [B, H, W, 3] fp32, weights of the face's corners in file order; their sum is about 1.
    depth: torch.Tensor        # [B, H, W] fp32, z'.


@torch.no_grad()
def rasterize(positions: torch.Tensor, faces: torch.Tensor, resolution: int | tuple[int, int],
              impl: str | None = None) -> RasterResult:
    """Find the nearest front-facing face at every pixel centre of a batch of views of one topology.

    A face is front-facing where its corners, in file order, have a positive signed area in (x', y'). The smallest z'
    wins; of equal ones the lower face index. A face with a coordinate that is not finite covers nothing.

    positions:  [B, V, 3] fp32, (x', y', z') per view: -1 is the left edge and the top row, 1 the right and the bottom;
                z' grows away from the viewer.
    faces:      [F, 3] int64 in [0, V), on the same device. 'cuda' cannot look without waiting for the device: there, a
                face with another index covers nothing.
    resolution: height and width in pixels, or one number for both. Centres are at (i + 0.5) * 2 / size - 1.
    impl:       'cuda' (CUDA tensors), 'cpp' (CPU tensors), 'ref' (any device; same result bit for bit), 'pytorch3d'
                (when installed; only if named), or None: follow the device.
    No gradient flows. 'cuda' never waits for the device, so a CUDA graph can record it after a first call at the same
    resolution. Raises ValueError for bad arguments, RuntimeError if the named implementation cannot be used.
    """
    height, width = _check_arguments(positions, faces, resolution)
    backends = dict(_BACKENDS)
    if impl is not None:
        backends['pytorch3d'] = _pytorch3d_problem
    chosen = pick_impl('rasterize', impl, positions.device, backends)
    if chosen != 'cuda':
        _check_range(faces, positions.shape[1])
    if positions.shape[0] == 0 or faces.shape[0] == 0:
        return _nothing(positions.shape[0], height, width, positions.device)
    if chosen == 'pytorch3d':
        return _rasterize_pytorch3d(positions, faces, height, width)
    rows, columns = _pixel_centres(height, positions.device), _pixel_centres(width, positions.device)
    if chosen == 'ref':
        return _rasterize_ref(positions, faces, rows, columns)
    compiled = plugin('rasterize_cuda' if chosen == 'cuda' else 'rasterize')
    return RasterResult(*compiled.forward(positions, faces, rows, columns, AREA_EPSILON))


def interpolate(result: RasterResult, corner_values: torch.Tensor) -> torch.Tensor:
    """Mix the values of the seen face's corners at every pixel; 0 where no face is seen.

    corner_values: [F, 3, C] fp32, corners in file order, for the F faces that were rasterised; same device.
    Returns [B, H, W, C] fp32. A gradient flows to corner_values, none to the barycentrics.
    Raises ValueError for another shape or type.
    """
    check_shape('corner_values', corner_values, [None, 3, None])
    if corner_values.dtype != torch.float32:
        raise ValueError(f'corner_values: expected torch.float32, got {corner_values.dtype}')
    if corner_values.shape[0] == 0:
        return corner_values.new_zeros([*result.face.shape, corner_values.shape[2]])
    face = result.face.clamp(min=0).flatten()
    values = corner_values.flatten(1).index_select(0, face).view(*result.face.shape, *corner_values.shape[1:])
    mixed = values * result.barycentric[..., None]
    # Without a face the weights are 0, but the values of face 0 may be infinite.
    return torch.where(result.face[..., None] >= 0, _sum_in_order(mixed.unbind(-2)), 0)


def _check_arguments(positions: torch.Tensor, faces: torch.Tensor, resolution: int | tuple[int, int]) -> list[int]:
    check_shape('positions', positions, [None, None, 3])
    check_shape('faces', faces, [None, 3])
    for name, tensor, dtype in [('positions', positions, torch.float32), ('faces', faces, torch.int64)]:
        if tensor.dtype != dtype:
            raise ValueError(f'{name}: expected {dtype}, got {tensor.dtype}')
    if faces.device != positions.device:
        raise ValueError(f'faces: expected to be on {positions.device} like positions, got {faces.device}')
    size = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    if len(size) != 2 or not all(isinstance(pixels, int) and pixels > 0 for pixels in size):
        raise ValueError(f'resolution: expected a positive int or (height, width), got {resolution!r}')
    return size


def _check_range(faces: torch.Tensor, num_vertices: int) -> None:
    if faces.numel() > 0:
        lowest, highest = (int(bound) for bound in torch.aminmax(faces))
        if lowest < 0 or highest >= num_vertices:
            raise ValueError(f'faces: expected indices in [0, {num_vertices}), got {lowest} to {highest}')


def _nothing(num_views: int, height: int, width: int, device: torch.device) -> RasterResult:
    depth = torch.zeros(num_views, height, width, device=device)
    return RasterResult(torch.full_like(depth, -1, dtype=torch.int64), depth[..., None].repeat(1, 1, 1, 3), depth)


@functools.cache  # Without a limit: CUDA graphs that were recorded go on reading the tensors.
def _pixel_centres(size: int, device: torch.device) -> torch.Tensor:
    # Always computed on the CPU in fp64: no device's way of dividing matters, every backend reads the same numbers.
    return ((torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1).to(device, torch.float32)


def _sum_in_order(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add one term per corner (in file order) in the order 0, 2, 1, in which the corners take part everywhere.

    Rounding depends on it, and published networks do on the rounding.
    """
    return terms[0] + terms[2] + terms[1]


def _edge(x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return twice the signed area of the triangles (point, start, end).

    x, y: [N]; start, end: [2 or 3, N]. The result is the same, to the bit, in (x', y') and in (-x', -y').
    """
    return (x - start[0]) * (end[1] - start[1]) - (y - start[1]) * (end[0] - start[0])


def _areas(x: torch.Tensor, y: torch.Tensor, corners: torch.Tensor) -> list[torch.Tensor]:
    """Return the undivided weights, [N] each, of corners [3 (file order), 3 (x', y', z'), N] at points x, y [N]."""
    a, c, b = corners
    return [_edge(x, y, b, c), _edge(x, y, a, b), _edge(x, y, c, a)]


def _area(corners: torch.Tensor) -> torch.Tensor:
    a, c, b = corners
    return _edge(c[0], c[1], a, b)


def _barycentric_and_depth(x: torch.Tensor, y: torch.Tensor,
                           corners: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [3, N] and z' [N] of the points x, y [N] on the faces with these corners [3, 3, N]."""
    weights = torch.stack(_areas(x, y, corners)) / (_area(corners) + AREA_EPSILON)
    return weights, _sum_in_order(weights * corners[:, 2])


class _Boxes(NamedTuple):
    """The K faces that can be seen, of all views, and the box of pixel centres that each can cover."""

    corners: torch.Tensor  # [3 (file order), 3 (x', y', z'), K] fp32.
    face: torch.Tensor     # [K] int64, index into faces, ascending in each view; the rest have this shape too.
    view: torch.Tensor
    top: torch.Tensor
    left: torch.Tensor
    width: torch.Tensor
    area: torch.Tensor     # Pixels in this box.
    end: torch.Tensor      # Pixels in the boxes up to and including this one.


def _find_boxes(positions: torch.Tensor, faces: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> _Boxes:
    num_faces = faces.shape[0]
    corners = positions.permute(2, 0, 1)[:, :, faces.mT].permute(2, 0, 1, 3).reshape(3, 3, -1)
    is_kept = (_area(corners) > AREA_EPSILON) & corners.isfinite().all(0).all(0)
    index = is_kept.nonzero().squeeze(1)

    corners = corners[:, :, index]
    low, high = corners.amin(0), corners.amax(0)
    left, top = torch.searchsorted(columns, low[0]), torch.searchsorted(rows, low[1])
    width = torch.searchsorted(columns, high[0], right=True) - left
    area = width * (torch.searchsorted(rows, high[1], right=True) - top)
    view = index.div(num_faces, rounding_mode='floor')
    return _Boxes(corners, index - view * num_faces, view, top, left, width, area, area.cumsum(0))


def _rasterize_ref(positions: torch.Tensor, faces: torch.Tensor, rows: torch.Tensor,
                   columns: torch.Tensor) -> RasterResult:
    result = _nothing(positions.shape[0], rows.numel(), columns.numel(), positions.device)
    depth = torch.full_like(result.depth.flatten(), torch.inf)
    winner = torch.full_like(result.face.flatten(), _NO_BOX)
    boxes = _find_boxes(positions, faces, rows, columns)
    num_candidates = int(boxes.area.sum())
    for start in range(0, num_candidates, _MAX_CANDIDATES):
        _draw(boxes, range(start, min(start + _MAX_CANDIDATES, num_candidates)), rows, columns, depth, winner)

    pixel = (winner != _NO_BOX).nonzero().squeeze(1)
    _, row, column = torch.unravel_index(pixel, result.face.shape)
    box = winner[pixel]
    weights, z = _barycentric_and_depth(columns[column], rows[row], boxes.corners[..., box])
    result.face.view(-1)[pixel] = boxes.face[box]
    result.barycentric.view(-1, 3)[pixel] = weights.mT
    result.depth.view(-1)[pixel] = z
    return result


def _draw(boxes: _Boxes, candidates: range, rows: torch.Tensor, columns: torch.Tensor, depth: torch.Tensor,
          winner: torch.Tensor) -> None:
    """Test a slice of the list of all boxes' pixels, and update depth and winner (box index), [B * H * W], in place."""
    box, row, column = _locate(boxes, candidates)
    area_a, area_c, area_b = _areas(columns[column], rows[row], boxes.corners[..., box])
    hit = ((area_a > 0) & (area_b > 0) & (area_c > 0)).nonzero().squeeze(1)
    box, row, column = box[hit], row[hit], column[hit]

    # A quotient may have underflowed to 0, a depth overflowed.
    weights, z = _barycentric_and_depth(columns[column], rows[row], boxes.corners[..., box])
    hit = ((weights > 0).all(0) & (z < torch.inf)).nonzero().squeeze(1)
    pixel = ((boxes.view[box] * rows.numel() + row) * columns.numel() + column)[hit]
    z, box = z[hit], box[hit]

    # Nearest first; then, among the candidates at exactly that depth, the lowest index: boxes are in order of faces.
    before = depth.clone()
    depth.scatter_reduce_(0, pixel, z, 'amin')
    winner[depth < before] = _NO_BOX
    nearest = (z == depth[pixel]).nonzero().squeeze(1)
    winner.scatter_reduce_(0, pixel[nearest], box[nearest], 'amin')


def _locate(boxes: _Boxes, candidates: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return box, row and column of each candidate; the slice may begin and end inside a box."""
    begin = boxes.end - boxes.area
    share = boxes.end.clamp(max=candidates.stop) - begin.clamp(min=candidates.start)
    box = torch.repeat_interleave(share.clamp(min=0), output_size=len(candidates))
    cell = torch.arange(candidates.start, candidates.stop, device=box.device) - begin[box]
    row = cell.div(boxes.width[box], rounding_mode='floor')
    return box, boxes.top[box] + row, boxes.left[box] + cell - row * boxes.width[box]


def _pytorch3d_problem(_device: torch.device) -> str | None:
    if importlib.util.find_spec('pytorch3d') is None:
        return 'PyTorch3D is not installed (see its installation notes: the build has to match that of torch)'
    return None


def _rasterize_pytorch3d(positions: torch.Tensor, faces: torch.Tensor, height: int, width: int) -> RasterResult:
    from pytorch3d.renderer.mesh import rasterize_meshes
    from pytorch3d.structures import Meshes
    # Its x grows to the left, its y upwards, and [-1, 1] spans the shorter side of the image.
    scale = positions.new_tensor([-max(1, width / height), -max(1, height / width), 1])
    swapped = faces[:, [0, 2, 1]].expand(positions.shape[0], -1, -1)
    face, depth, weights, _ = rasterize_meshes(
        Meshes(positions * scale, swapped), (height, width), blur_radius=0.0, faces_per_pixel=1,
        perspective_correct=False, clip_barycentric_coords=False, cull_backfaces=True)
    face, depth, weights = face[..., 0], depth[..., 0], weights[..., 0, :]
    is_hit = face >= 0
    return RasterResult(torch.where(is_hit, face % faces.shape[0], -1),
                        torch.where(is_hit[..., None], weights[..., [0, 2, 1]], 0), torch.where(is_hit, depth, 0))
