# SPDX-License-Identifier: Apache-2.0
"""The camera of a page that orbits a point, as a label of EG3D: on the sphere of training, zoom as focal length."""

import math

import numpy as np
import torch

from geometry import cameras

ZOOM_RANGE = 0.5, 4.0  # Focal lengths over the starting one.
FARTHEST_PAN = 0.3  # World units that the point looked at may be moved: the face stays in the volume.
UP = np.array([0.0, 1.0, 0.0])


def start_camera(pivot, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return position, point looked at and up [3] of the frontal camera on the sphere about the origin."""
    return np.array([0.0, 0.0, radius]), np.array(pivot, dtype=float), UP.copy()


def distance_range(pivot, radius: float) -> tuple[float, float]:
    """Return the distances from the pivot at which a page's camera has the largest and the smallest zoom."""
    base = _base_distance(pivot, radius)
    return base / ZOOM_RANGE[1], base / ZOOM_RANGE[0]


def view_angle(aspect: float, focal: float = cameras.FOCAL) -> float:
    """Return the vertical angle in radians of a window, width/height = aspect, in which a square picture fits whole."""
    return 2 * math.atan(0.5 / (focal * min(max(aspect, 1e-3), 1.0)))


def orbit_label(position, look_at, up, pivot, radius: float, focal: float = cameras.FOCAL) -> torch.Tensor:
    """Return the label [1, 25] of a page's camera at position [3] that looks at a point [3].

    The direction is kept; the camera lies on the sphere of `radius` about the origin, as in training, so that depths
    fit the volume; distance becomes the focal length within ZOOM_RANGE; a moved point moves the camera, at most
    FARTHEST_PAN from the pivot. What is not finite or has no direction counts as the frontal camera.
    """
    position, look_at, up = (np.asarray(x, dtype=float) for x in (position, look_at, up))
    start, pivot, _ = start_camera(pivot, radius)
    offset = position - look_at
    distance = np.linalg.norm(offset)
    if not np.isfinite([*position, *look_at, *up]).all() or distance < 1e-9:
        offset, look_at, up, distance = start - pivot, pivot, UP, np.linalg.norm(start - pivot)
    backward = offset / distance
    zoom = np.clip(_base_distance(pivot, radius) / distance, *ZOOM_RANGE)
    pan = look_at - pivot
    pan *= min(1.0, FARTHEST_PAN / max(np.linalg.norm(pan), 1e-9))
    origin = pivot + _to_sphere(pivot, backward, radius) * backward + pan
    forward, origin = (torch.from_numpy(x).float()[None] for x in (-backward, origin))
    pose = cameras.cam2world_from_forward(forward, origin, _usable_up(up, backward))
    return cameras.make_label(pose, cameras.intrinsics(focal * float(zoom)))


def _base_distance(pivot, radius):
    return float(np.linalg.norm(np.array([0.0, 0.0, radius]) - np.asarray(pivot, dtype=float)))


def _to_sphere(start, direction, radius):
    """Return how far from a point inside it the sphere about the origin lies along a unit direction."""
    along = start @ direction
    return -along + math.sqrt(along**2 + radius**2 - start @ start)


def _usable_up(up, backward):
    """Return a direction that is not the one looked along: up, or where it is, the axis that is farthest from it."""
    if np.linalg.norm(np.cross(up, backward)) > 1e-6 * max(np.linalg.norm(up), 1e-9):
        return tuple(up.tolist())
    return tuple(np.eye(3)[np.abs(backward).argmin()].tolist())
