# SPDX-License-Identifier: Apache-2.0
"""Density grids of a volume and the surfaces in them, in the layout of the published shape files."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

SURFACE_LEVEL = 10.0  # Raw density at which the published scripts put the surface.
BORDER = 30 / 256  # Share of the grid on each side that is emptied, so that surfaces are closed.
EMPTY = -1000.0


class NoSurfaceError(ValueError):
    """The density does not cross the level anywhere."""


def border_width(resolution: int) -> int:
    """Return how many samples of a grid are emptied on each side."""
    return int(BORDER * resolution)


def density_grid(
    query_sigma: Callable[[torch.Tensor], torch.Tensor],
    resolution: int,
    side: float,
    on_slab: Callable[[], None] = lambda: None,
    device: torch.device | str = 'cpu',
) -> np.ndarray:
    """Sample raw density on a grid over the centred cube: [N, N, N] float32, axes x, y, z, z fastest, x descending.

    query_sigma: world points [1, M, 3] on the device -> density [1, M, 1]; called with a slab of constant x at a time,
    so that memory is that of the result and one slab. The first and the last sample of each axis lie on the cube's
    faces. The border holds EMPTY. on_slab: called after each slab, for progress bars.
    """
    pad = border_width(resolution)
    inside = slice(pad, resolution - pad)
    axis = torch.linspace(-side / 2, side / 2, resolution)
    y, z = torch.meshgrid(axis[inside], axis[inside], indexing='ij')
    points = torch.stack([torch.empty_like(y), y, z], dim=-1).reshape(1, -1, 3).to(device)

    def slab(x):
        points[..., 0] = x
        return query_sigma(points).reshape(y.shape)

    grid = torch.full([resolution] * 3, EMPTY)  # By torch, whose threads share the first touch of a large grid.
    slabs = _on_host(slab(x) for x in axis[inside].tolist())
    for i in range(resolution):
        if pad <= i < resolution - pad:
            grid[resolution - 1 - i, inside, inside] = next(slabs)
        on_slab()
    return grid.numpy()


def _on_host(slabs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield tensors of one shape in host memory; from a GPU each while the next is computed, good until the next."""
    buffers, waiting = [], None
    for number, slab in enumerate(slabs):
        if not slab.is_cuda:
            yield slab.cpu()
            continue
        if len(buffers) < 2:
            buffers.append(torch.empty_like(slab, device='cpu', pin_memory=True))
        arriving = buffers[number % 2].copy_(slab, non_blocking=True), torch.cuda.current_stream().record_event()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = arriving
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(buffer, event):
    event.synchronize()
    return buffer


def extract_surface(grid: np.ndarray, level: float = SURFACE_LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices [V, 3] in grid indices and faces [F, 3] of the level set of a `density_grid`.

    Faces look outwards in the world and in published .ply files; grid indices are their mirror image. Raises
    NoSurfaceError where the density stays on one side of the level.
    """
    from skimage.measure import marching_cubes  # Here: importing it takes most of a second.

    if not grid.min() < level < grid.max():
        inner = grid[grid > EMPTY]
        highest = f'{inner.max():.3g}' if inner.size else 'nowhere sampled'
        raise NoSurfaceError(f'the density never crosses level {level:g} (highest: {highest}): no surface')
    vertices, faces, _, _ = marching_cubes(grid, level=level)
    return vertices, faces


def grid_to_world(vertices: np.ndarray, resolution: int, side: float) -> np.ndarray:
    """Return world coordinates of points given in indices of a `density_grid`."""
    world = vertices * (side / (resolution - 1)) - side / 2
    return world * np.array([-1, 1, 1], dtype=world.dtype)


def grid_to_published_ply(vertices: np.ndarray) -> np.ndarray:
    """Return points given in indices of a `density_grid` as published .ply files hold them: of the grid's transpose."""
    return vertices[:, ::-1]
