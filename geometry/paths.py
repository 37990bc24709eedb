# SPDX-License-Identifier: Apache-2.0
"""Camera paths of videos, and tracked cameras made smooth: rotations are averaged on SO(3), not entry by entry."""

import math

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from geometry import cameras

YAW_SWING, PITCH_SWING, PITCH_OFFSET = 0.35, 0.25, -0.05  # Of the published videos, in radians of the sampler.
PUBLISHED_TURNS = 2  # Rounds of the published path in one video.
FULL_TURN_DEG = 180  # A swing this far to both sides is a turn.


def published_path(count: int) -> np.ndarray:
    """Return (horizontal, vertical) angles [count, 2] of the published videos; frame `count` would be frame 0.

    Deviation: a round takes count/2 frames, not that number rounded down, so that odd counts loop, too.
    """
    phase = 2 * np.pi * PUBLISHED_TURNS * np.arange(count) / count
    return cameras.FRONTAL + np.stack([YAW_SWING * np.sin(phase), PITCH_OFFSET + PITCH_SWING * np.cos(phase)], axis=1)


def orbit_path(count: int, half_angle_deg: float) -> np.ndarray:
    """Return level angles [count, 2] that swing so far to both sides, once; from 180 degrees on, round the head."""
    phase = 2 * np.pi * np.arange(count) / count
    is_turn = half_angle_deg >= FULL_TURN_DEG
    yaw = phase if is_turn else math.radians(half_angle_deg) * np.sin(phase)
    return cameras.FRONTAL + np.stack([yaw, np.zeros(count)], axis=1)


def fixed_path(count: int) -> np.ndarray:
    """Return the frontal angles [count, 2]."""
    return np.full([count, 2], cameras.FRONTAL)


def path_labels(angles: np.ndarray, pivot, radius: float, focal: float = cameras.FOCAL) -> torch.Tensor:
    """Return labels [N, 25] of look-at cameras with (horizontal, vertical) angles [N, 2]."""
    horizontal, vertical = torch.from_numpy(np.asarray(angles)).float().split(1, dim=1)
    poses = cameras.look_at_pose(horizontal, vertical, pivot, radius, batch=len(angles))
    return cameras.make_label(poses, cameras.intrinsics(focal))


def is_pose(label: np.ndarray) -> bool:
    """Tell whether a label [25] is finite and holds something near to a rotation."""
    if not np.isfinite(label).all():
        return False
    rotation = label[cameras.CAM2WORLD].reshape(4, 4)[:3, :3].astype(np.float64)
    return np.linalg.det(rotation) > 0 and np.abs(rotation @ rotation.T - np.eye(3)).max() < 0.1


def smooth_labels(labels: np.ndarray, window: int) -> np.ndarray:
    """Return labels [T, 25] averaged over `window` (odd) frames about each, fewer at the ends; 1 only orthonormalises.

    Rotations: mean on SO(3). Positions: mean, put back to the mean distance from the origin, as the mean of points of
    a sphere lies inside it. Intrinsics: mean. Every label must be one of `is_pose`.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f'window: expected an odd number from 1, got {window}')
    poses = labels[:, cameras.CAM2WORLD].reshape(-1, 4, 4).astype(np.float64)
    rotations, positions = Rotation.from_matrix(poses[:, :3, :3]), poses[:, :3, 3]
    radii = np.linalg.norm(positions, axis=1)
    smooth = labels.astype(np.float64)
    for t in range(len(labels)):
        near = slice(max(0, t - window // 2), t + window // 2 + 1)
        pose = np.eye(4)
        pose[:3, :3] = rotations[near].mean().as_matrix()
        mean = positions[near].mean(axis=0)
        pose[:3, 3] = mean * (radii[near].mean() / max(np.linalg.norm(mean), 1e-12))
        smooth[t, cameras.CAM2WORLD] = pose.ravel()
        smooth[t, cameras.INTRINSICS] = labels[near, cameras.INTRINSICS].mean(axis=0)
    return smooth.astype(np.float32)
