# SPDX-License-Identifier: Apache-2.0
"""Density grids and surfaces of densities that are known everywhere: layout, place, orientation, memory."""

import math
import subprocess
import sys

import numpy as np
import parity
import pytest
import torch
import trimesh

from geometry import shapes
from geometry.shapes import EMPTY, NoSurfaceError, density_grid, extract_surface

CENTRE, RADIUS = (0.08, -0.05, 0.12), 0.15


def ball(points, centre=CENTRE):
    """Density 10 on a sphere off the centre, rising inwards."""
    return 10 + 200 * (RADIUS - (points - torch.tensor(centre)).norm(dim=-1, keepdim=True))


def decimal(points):
    """A density that tells its place."""
    return points @ torch.tensor([[100.0], [10.0], [1.0]])


@pytest.fixture(scope='module')
def ball_surface():
    """Vertices in grid indices and faces of the ball at 64 samples per axis."""
    return extract_surface(density_grid(ball, 64, 1.0))


@pytest.mark.parametrize('resolution, border', [(2, 0), (8, 0), (9, 1), (24, 2), (128, 15), (256, 30), (512, 60)])
def test_border_width_is_that_of_the_published_script(resolution, border):
    assert shapes.border_width(resolution) == border


@pytest.mark.parametrize('resolution, side', [(2, 1.0), (9, 1.0), (24, 2.0)])
def test_samples_lie_where_documented(resolution, side):
    """Axes x (descending), y, z; the first and last samples on the faces of the cube; the border empty."""
    grid = density_grid(decimal, resolution, side)
    assert grid.shape == (resolution,) * 3 and grid.dtype == np.float32 and grid.flags.c_contiguous
    axis = np.linspace(-side / 2, side / 2, resolution)
    x, y, z = np.meshgrid(axis[::-1], axis, axis, indexing='ij')
    expected = 100 * x + 10 * y + z
    border = shapes.border_width(resolution)
    is_inside = np.zeros(grid.shape, bool)
    is_inside[(slice(border, resolution - border),) * 3] = True
    np.testing.assert_allclose(grid[is_inside], expected[is_inside], rtol=1e-5, atol=1e-4)
    assert (grid[~is_inside] == EMPTY).all() and EMPTY == -1000


def test_points_come_in_slabs_of_constant_x_and_none_is_wasted():
    slabs, ticks = [], []

    def query(points):
        assert points.shape[0] == 1 and points.shape[2] == 3 and points.dtype == torch.float32
        slabs.append(points.clone())
        return decimal(points)

    density_grid(query, 24, 1.0, lambda: ticks.append(1))
    assert len(ticks) == 24 and len(slabs) == 20
    assert all(slab.shape[1] == 400 and len(slab[0, :, 0].unique()) == 1 for slab in slabs)
    assert len(torch.cat(slabs, dim=1)[0].unique(dim=0)) == 20**3


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_memory_is_that_of_the_grid():
    """In a process of its own: the peak grows by the grid and little more."""
    code = (
        'import re, torch\n'
        'from geometry.shapes import density_grid\n'
        'def query(points):\n'
        '    return points.norm(dim=-1, keepdim=True)\n'
        'for resolution in (16, 256):\n'
        '    density_grid(query, resolution, 1.0)\n'
        '    print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])\n'
    )
    result = subprocess.run([sys.executable, '-c', code], cwd=parity.ROOT, check=True, capture_output=True, text=True)
    before, after = (int(kilobytes) * 1024 for kilobytes in result.stdout.split())
    grid = 4 * 256**3
    assert grid / 2 < after - before < grid + 16e6


def test_surface_of_a_ball_is_that_ball(ball_surface):
    vertices, faces = ball_surface
    world = shapes.grid_to_world(vertices, 64, 1.0)
    distance = np.linalg.norm(world - CENTRE, axis=1)
    np.testing.assert_allclose(distance, RADIUS, atol=3e-4)
    mesh = trimesh.Trimesh(world, faces, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.01)  # Positive: it faces outwards.
    np.testing.assert_allclose(mesh.center_mass, CENTRE, atol=1e-4)


def test_published_ply_is_the_surface_of_the_transposed_grid(ball_surface):
    vertices, faces = ball_surface
    published = shapes.grid_to_published_ply(vertices)
    x, y, z = CENTRE
    centre = [(z + 0.5) * 63, (y + 0.5) * 63, (0.5 - x) * 63]
    np.testing.assert_allclose(np.linalg.norm(published - centre, axis=1), RADIUS * 63, atol=0.02)
    mesh = trimesh.Trimesh(published, faces, process=False)
    assert mesh.is_watertight and mesh.volume > 0
    from skimage.measure import marching_cubes

    direct, *_ = marching_cubes(np.transpose(density_grid(ball, 64, 1.0), (2, 1, 0)), level=10)
    assert len(direct) == len(published)
    ordered = [points[np.lexsort(np.round(points, 3).T)] for points in (direct, published)]
    np.testing.assert_allclose(*ordered, atol=1e-3)


def test_world_coordinates_of_the_grid_corners():
    corners = np.array([[0, 0, 0], [23, 23, 23], [0, 23, 11.5]], dtype=np.float32)
    world = shapes.grid_to_world(corners, 24, 2.0)
    assert world.dtype == np.float32
    np.testing.assert_allclose(world, [[1, -1, -1], [-1, 1, 1], [1, 1, 0]], atol=1e-6)


def test_the_empty_border_closes_a_body_that_fills_the_volume():
    vertices, faces = extract_surface(density_grid(lambda p: torch.full([1, p.shape[1], 1], 500.0), 32, 1.0))
    mesh = trimesh.Trimesh(shapes.grid_to_world(vertices, 32, 1.0), faces, process=False)
    assert mesh.is_watertight
    side = (32 - 2 * 3 - 1) / 31
    assert mesh.volume == pytest.approx(side**3, rel=0.1)


def test_level_is_the_published_one_unless_given():
    assert shapes.SURFACE_LEVEL == 10
    grid = density_grid(ball, 32, 1.0)
    inner, _ = extract_surface(grid, level=16)
    distance = np.linalg.norm(shapes.grid_to_world(inner, 32, 1.0) - CENTRE, axis=1)
    np.testing.assert_allclose(distance, RADIUS - 6 / 200, atol=2e-3)


def test_a_density_that_never_crosses_the_level_says_so():
    below = density_grid(lambda p: torch.full([1, p.shape[1], 1], 0.25), 16, 1.0)
    with pytest.raises(NoSurfaceError, match=r'never crosses level 10 \(highest: 0.25\)'):
        extract_surface(below)
    above = density_grid(lambda p: torch.full([1, p.shape[1], 1], 40.0), 8, 1.0)  # Too small for a border.
    with pytest.raises(NoSurfaceError, match='never crosses level 10'):
        extract_surface(above)
    with pytest.raises(NoSurfaceError, match='nowhere sampled'):
        extract_surface(np.full([4, 4, 4], EMPTY, dtype=np.float32))
