# SPDX-License-Identifier: Apache-2.0
"""Mirror images of fitted faces: meshes and landmarks exactly, expression codes as nearly as the model can say them."""

import pathlib

import numpy as np

from dataset_preprocessing.ffhq import deca_fit, files
from dataset_preprocessing.ffhq.files import PreprocessError
from geometry.flame import FlameHead
from geometry.meshes import MeshFileError, parse_landmarks, parse_obj_vertices
from geometry.mirror import LANDMARK_MIRROR, mirror_mesh


def vertex_partners(head: FlameHead) -> np.ndarray:
    """Return the left-right partner [V] of each vertex; PreprocessError for a head that is not symmetric."""
    if head.mirror is None:
        raise PreprocessError(
            'the FLAME model: expected a left-right symmetric template to mirror meshes by, found another; '
            'use --mirror=fit'
        )
    return head.mirror.cpu().numpy()


def mirror_files(head: FlameHead, sources: list[pathlib.Path], outputs: list[pathlib.Path]) -> None:
    """Write mirror images of a mesh and its landmarks; sources and outputs: the two files each."""
    try:
        vertices = parse_obj_vertices(sources[0].read_bytes(), str(sources[0]))
        landmarks = parse_landmarks(sources[1].read_bytes(), str(sources[1]))
    except (MeshFileError, FileNotFoundError) as error:
        raise PreprocessError(str(error)) from error
    partner = vertex_partners(head)
    if len(vertices) != len(partner):
        raise PreprocessError(f'{sources[0]}: expected {len(partner)} vertices, found {len(vertices)}')
    mirrored = mirror_mesh(np.concatenate([vertices, landmarks]), partner)
    files.write_text(deca_fit.landmarks_text(mirrored[len(partner) :]), outputs[1])
    files.write_text(deca_fit.mesh_text(head, mirrored[: len(partner)]), outputs[0])


def mirror_points(points: np.ndarray, width: int) -> np.ndarray:
    """Return the 68 landmarks [68, 2] of the mirror image of a picture so wide, in iBUG's order."""
    return (np.array([width - 1, 0]) + points * [-1, 1])[LANDMARK_MIRROR]


def expression_mirror(head: FlameHead) -> tuple[np.ndarray, float]:
    """Return the matrix [E, E] from expression codes to those of mirror images, and the share of motion that it keeps.

    FLAME's expressions are no mirror images of each other: the code is the one whose motion of the vertices is nearest
    to the mirrored motion, by least squares.
    """
    partner = vertex_partners(head)
    motion = head.directions.cpu().numpy().astype(np.float64).reshape(len(partner), 3, -1)[..., head.num_identity :]
    mirrored = motion[partner] * np.array([-1, 1, 1])[:, None]
    basis, wanted = (part.reshape(-1, motion.shape[-1]) for part in (motion, mirrored))
    matrix = np.linalg.lstsq(basis, wanted, rcond=None)[0]
    kept = 1 - np.square(basis @ matrix - wanted).sum() / np.square(wanted).sum()
    return matrix, float(kept)
