# SPDX-License-Identifier: Apache-2.0
"""The surface of a person: density of ready planes on a grid, its level set, and the field's colours on it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from geometry import shapes
from training.generator import Planes

POINTS_AT_A_TIME = 1 << 18


class Surface(NamedTuple):
    """vertices [V, 3] in world units, the same in indices of the grid, faces [F, 3], colours [V, 3] uint8."""

    vertices: np.ndarray
    indices: np.ndarray
    faces: np.ndarray
    colours: np.ndarray


def sample_density(
    query: Callable, planes: Planes, side: float, resolution: int, on_slab: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Return `shapes.density_grid` [N, N, N] of planes of one person.

    query: that of a generator. side: of the volume (box_warp). on_slab: called after each of N slabs.
    """
    return shapes.density_grid(
        lambda points: query(planes, points, with_rgb=False)['sigma'], resolution, side, on_slab, planes.planes.device
    )


def coloured_surface(query: Callable, planes: Planes, side: float, grid: np.ndarray) -> Surface:
    """Return the surface in a grid of `sample_density`, other arguments as there; raises `shapes.NoSurfaceError`."""
    indices, faces = shapes.extract_surface(grid)
    world = shapes.grid_to_world(indices, len(grid), side)
    points = torch.from_numpy(np.ascontiguousarray(world, dtype=np.float32)).to(planes.planes.device)
    parts = [query(planes, chunk[None])['rgb'][0, :, :3] for chunk in points.split(POINTS_AT_A_TIME)]
    colours = (torch.cat(parts) * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
    return Surface(world, indices, faces, colours)


def encode_mesh(vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, file_type: str) -> bytes:
    """Return a coloured mesh as the content of a 'ply', 'obj' or 'glb' file."""
    import trimesh  # Here: only shapes need it, and importing it takes most of a second.

    mesh = trimesh.Trimesh(vertices, faces, vertex_colors=colours, process=False)
    content = mesh.export(file_type=file_type)
    return content.encode() if isinstance(content, str) else content
