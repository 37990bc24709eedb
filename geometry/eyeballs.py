# SPDX-License-Identifier: Apache-2.0
"""The eyeballs of a head mesh: found by their shape, and turned on the spot."""

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from geometry.flame import rotation_matrices

ROUNDNESS = 0.06  # Of the radius: how far vertices of an eyeball, cornea included, may lie from its sphere.
SPAN = 1.5  # Radii that an eyeball measures at least along each axis; lids and lashes are parts of a sphere too.
FEWEST = 12  # Vertices.


def find_eyeballs(vertices: np.ndarray, faces: np.ndarray) -> list[np.ndarray]:
    """Return the vertices [K] int64 of each separate part of a mesh that is a ball, in the order of their first vertex.

    vertices: [V, 3]. faces: [F, 3]. Both eyes of the embedded head and of FLAME are such parts.
    """
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    graph = coo_matrix((np.ones(len(edges), dtype=bool), edges.T), (len(vertices), len(vertices)))
    count, part = connected_components(graph, directed=False)
    parts = (np.flatnonzero(part == number) for number in range(count))
    return [indices for indices in parts if _is_ball(vertices[indices].astype(np.float64))]


def _is_ball(points):
    if len(points) < FEWEST:
        return False
    # |p - c|² = r² is linear in c and |c|² - r².
    system = np.concatenate([2 * points, np.ones([len(points), 1])], axis=1)
    *centre, rest = np.linalg.lstsq(system, (points**2).sum(axis=1), rcond=None)[0]
    radius = np.sqrt(max(rest + np.dot(centre, centre), 0))
    distance = np.linalg.norm(points - centre, axis=1)
    return np.abs(distance - radius).max() < ROUNDNESS * radius and np.ptp(points, axis=0).min() > SPAN * radius


def turn_eyeballs(v: torch.Tensor, eyeballs: list[torch.Tensor], angles: torch.Tensor) -> torch.Tensor:
    """Return meshes v [N, M, 3] with their eyeballs turned about their middles; the rest stays.

    eyeballs: vertices [K] of each. angles: [N, 2] in radians: to the picture's right (about y), then up (about -x).
    """
    (aside, up), zero = angles.unbind(dim=1), torch.zeros_like(angles[:, 0])
    about_y, about_x = (torch.stack(vector, dim=1) for vector in ((zero, aside, zero), (-up, zero, zero)))
    rotation = rotation_matrices(about_x) @ rotation_matrices(about_y)
    out = v.clone()
    for indices in eyeballs:
        ball = v[:, indices]
        middle = (ball.amax(dim=1, keepdim=True) + ball.amin(dim=1, keepdim=True)) / 2
        out[:, indices] = (ball - middle) @ rotation.mT + middle
    return out
