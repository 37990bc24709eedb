# SPDX-License-Identifier: Apache-2.0
"""Left-right mirroring of pictures' cameras, head meshes and landmarks (the three have to flip together)."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from geometry.meshes import MeshFileError

# Row of the landmark that takes each row's place in a mirrored face, iBUG 68 order.
LANDMARK_MIRROR = np.array(
    [16 - i for i in range(17)]
    + [26 - i for i in range(10)]
    + [27, 28, 29, 30, 35, 34, 33, 32, 31]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65]
)
MAX_DISTANCE = 0.002  # Metres between a mirrored template vertex and its partner.


def vertex_mirror(template: np.ndarray, max_distance: float = MAX_DISTANCE) -> np.ndarray:
    """Return the left-right partner [V] of each vertex of a neutral template [V, 3] in metres, found by its geometry.

    Each vertex takes the nearest vertex of the x-mirrored template; the pairing has to be mutual and close. Raises
    MeshFileError for a template that is not symmetric enough: mirrored training is then refused.
    """
    centred = template - np.array([(template[:, 0].min() + template[:, 0].max()) / 2, 0, 0], dtype=template.dtype)
    distance, partner = cKDTree(centred * np.array([-1, 1, 1])).query(centred)
    is_mutual = partner[partner] == np.arange(len(partner))
    if distance.max() > max_distance or not is_mutual.all():
        raise MeshFileError(
            f'template: expected a left-right symmetric mesh for mirroring, found vertices up to '
            f'{1000 * distance.max():.2g} mm from a partner, {np.count_nonzero(~is_mutual)} without one'
        )
    return partner


def mirror_mesh(mesh: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """Return the mirror image of vertices followed by landmarks [V + 68, 3], in the order of the same topology."""
    order = np.concatenate([partner, len(partner) + LANDMARK_MIRROR])
    return mesh[order] * np.array([-1, 1, 1], dtype=mesh.dtype)


def mirror_label(label: np.ndarray) -> np.ndarray:
    """Return the label of the mirrored picture: pose' = S·pose·S with S = diag(-1, 1, 1, 1); intrinsics stay."""
    mirrored = label.copy()
    mirrored[[1, 2, 3, 4, 8]] *= -1  # Entries (0,1), (0,2), (0,3), (1,0), (2,0) of the row-major matrix.
    return mirrored


def mirrored_names(names: Sequence[str]) -> list[int]:
    """Return the number of the expression that takes each one's place in a mirror image: left and right change.

    Raises ValueError for a name without its partner.
    """
    swapped = [name.replace('Left', '#').replace('Right', 'Left').replace('#', 'Right') for name in names]
    return [names.index(name) for name in swapped]
