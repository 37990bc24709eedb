# SPDX-License-Identifier: Apache-2.0
"""Meshes drawn over pictures: the edges that face the camera."""

import numpy as np
from PIL import Image, ImageDraw

from geometry.cameras import CAM2WORLD, INTRINSICS
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT

COLOUR = (70, 255, 120, 90)
POINT_COLOUR = (255, 60, 60, 255)


def project_mesh(vertices: np.ndarray, label: np.ndarray, side: int) -> np.ndarray:
    """Return columns, rows and depths [V, 3] of mesh points [V, 3] under a label [25] in a picture of `side` pixels."""
    pose, k = label[CAM2WORLD].reshape(4, 4).astype(float), label[INTRINSICS].reshape(3, 3).astype(float)
    seen = (WORLD_SCALE * vertices + WORLD_SHIFT - pose[:3, 3]) @ pose[:3, :3]
    screen = seen @ k.T
    return np.concatenate([screen[:, :2] / screen[:, 2:] * side - 0.5, seen[:, 2:]], axis=1)


def draw_overlay(
    picture: Image.Image, vertices: np.ndarray, faces: np.ndarray, label: np.ndarray, points: np.ndarray | None = None
) -> Image.Image:
    """Return a square picture with the edges of a mesh [V, 3], faces [F, 3], over it; points [N, 2] as red dots."""
    picture = picture.convert('RGB')
    screen = project_mesh(vertices, label, picture.width)
    a, b, c = (screen[faces[:, corner], :2] for corner in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    shown = faces[(area < 0) & (screen[faces, 2] > 0).all(axis=1)]  # Rows grow downwards.
    edges = np.unique(np.sort(np.concatenate([shown[:, [0, 1]], shown[:, [1, 2]], shown[:, [2, 0]]]), axis=1), axis=0)
    draw = ImageDraw.Draw(picture, 'RGBA')
    for start, end in screen[edges, :2]:
        draw.line([*start, *end], fill=COLOUR)
    for x, y in () if points is None else points:
        draw.ellipse([x - 1, y - 1, x + 1, y + 1], fill=POINT_COLOUR)
    return picture
