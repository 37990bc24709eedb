# SPDX-License-Identifier: Apache-2.0
"""Meshes drawn over pictures: the edges that face the camera."""

import numpy as np
from PIL import Image, ImageDraw

from geometry.cameras import project_mesh

COLOUR = (70, 255, 120, 90)
POINT_COLOUR = (255, 60, 60, 255)


def draw_overlay(
    picture: Image.Image, vertices: np.ndarray, faces: np.ndarray, label: np.ndarray, points: np.ndarray | None = None
) -> Image.Image:
    """Return a square picture with the edges of a mesh [V, 3], faces [F, 3], over it; points [N, 2] as red dots."""
    picture = picture.convert('RGB')
    places, depth = project_mesh(vertices, label)
    screen = places * picture.width - 0.5
    a, b, c = (screen[faces[:, corner]] for corner in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    shown = faces[(area < 0) & (depth[faces] > 0).all(axis=1)]  # Rows grow downwards.
    edges = np.unique(np.sort(np.concatenate([shown[:, [0, 1]], shown[:, [1, 2]], shown[:, [2, 0]]]), axis=1), axis=0)
    draw = ImageDraw.Draw(picture, 'RGBA')
    for start, end in screen[edges]:
        draw.line([*start, *end], fill=COLOUR)
    for x, y in () if points is None else points:
        draw.ellipse([x - 1, y - 1, x + 1, y + 1], fill=POINT_COLOUR)
    return picture
