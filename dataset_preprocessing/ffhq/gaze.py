# SPDX-License-Identifier: Apache-2.0
"""Where eyes look, by geometry: from the irises seen in a picture to the rotations of a head's eyes.

An eye is a sphere about its joint that carries the iris; the lid's two corners tell where it lies in the picture.
Angles are those of gaze files: left pitch, left yaw, right pitch, right yaw in radians; left is the person's.
"""

import numpy as np

IRIS_RADIUS = 0.0115  # Metres from an eye's centre to its iris: an adult's eye has 12 mm, and the iris lies inside.
LARGEST_SINE = 0.8  # Of an iris that is seen beyond: 53 degrees, the end of what eyes do.


def angles_of_gaze_file(gaze: np.ndarray) -> np.ndarray:
    """Return the angles [..., 4] of gaze files, or back: there, down and the picture's left are positive.

    gaze: [..., 4] as `HeadFit` has it, up and the picture's right positive; the order is the same.
    """
    return -np.asarray(gaze)


def rotation_to(direction: np.ndarray) -> np.ndarray:
    """Return the axis-angle vector [..., 3] without a z part that turns (0, 0, 1) to a direction [..., 3]."""
    x, y, z = np.moveaxis(direction / np.linalg.norm(direction, axis=-1, keepdims=True), -1, 0)
    sine = np.hypot(x, y)
    # θ / sin θ, 1 at zero. ŵ·sin θ = (-y, x, 0): cross product of (0, 0, 1) and the direction.
    factor = np.divide(np.arctan2(sine, z), sine, out=np.ones_like(sine), where=sine > 1e-12)
    return np.stack([-y * factor, x * factor, np.zeros_like(x)], axis=-1)


def gaze_angles(
    irises: np.ndarray, corners: np.ndarray, joints: np.ndarray, lids: np.ndarray, rotation: np.ndarray
) -> np.ndarray:
    """Return gaze angles [4] of a face.

    irises [2, 2]: centres in pixels, the person's left eye first. corners [2, 2, 2]: pixels of the two corners of each
    eye. joints [2, 3], lids [2, 2, 3]: centres of the eyes and the same corners on the head's mesh, metres. rotation
    [3, 3]: the camera's axes (right, down, forward) as columns, in the mesh's frame. The picture is taken as an
    orthographic one near the eyes, of one scale for both.
    """
    around = lids - joints[:, None]  # From each eye's centre.
    flat = (around @ rotation)[..., :2]
    spread, seen = flat - flat.mean(axis=1, keepdims=True), corners - corners.mean(axis=1, keepdims=True)
    scale = (spread * seen).sum() / np.square(spread).sum()
    if not scale > 0:
        raise ValueError('corners: expected those of two eyes, upright, found others')
    centres = corners.mean(axis=1) - scale * flat.mean(axis=1)
    away = (irises - centres) / (scale * IRIS_RADIUS)
    sine = np.linalg.norm(away, axis=1, keepdims=True)
    away = away * np.minimum(1, LARGEST_SINE / np.maximum(sine, 1e-12))
    towards = -np.sqrt(1 - np.square(away).sum(axis=1, keepdims=True))  # The near side of the sphere.
    turns = rotation_to(np.concatenate([away, towards], axis=1) @ rotation.T)
    return np.stack([turns[:, 0], -turns[:, 1]], axis=1).ravel()
