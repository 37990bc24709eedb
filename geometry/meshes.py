# SPDX-License-Identifier: Apache-2.0
"""Head meshes as the generator takes them: OBJ files and landmark files, in file order.

Vertex order is what ties a mesh to a network, and general readers split or merge vertices at UV seams, so the two
simple formats are read here.
"""

import os
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import atomic_write

NUM_LANDMARKS = 68
WORLD_SCALE, WORLD_SHIFT = 2.5, (0.0, 0.025, 0.0)  # world = scale·mesh + shift; docs/conventions.md.
LANDMARK_LIMIT = 0.3  # Metres; landmarks in pixels are far above it.
EXCERPT = 60  # Characters of a line that a message quotes.


class MeshFileError(ValueError):
    """A mesh or landmark file that cannot be used; the message names the file, what was expected and what was found."""


class ObjMesh(NamedTuple):
    """vertices [V, 3] and uvs [T, 2] float32; faces and uv_faces [F, 3] int64 (uv_faces None where UVs are missing)."""

    vertices: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    uv_faces: np.ndarray | None


def read_obj(path: str | os.PathLike) -> ObjMesh:
    """Read vertices, UVs and triangles of a Wavefront OBJ file.

    Raises FileNotFoundError, or MeshFileError for lines that are no numbers, faces that are not triangles or refer to
    vertices that do not exist, coordinates that are not finite, and a file without vertices or faces.
    """
    rows = {'v': [], 'vt': [], 'f': []}
    with open(path, encoding='utf-8', errors='replace') as file:
        for number, line in enumerate(file, start=1):
            kind, *words = line.split() or ['']
            if kind in rows:
                rows[kind].append((number, words))
    vertices = _numbers(path, rows['v'], 3)
    uvs = _numbers(path, rows['vt'], 2)
    faces, uv_faces = _corners(path, rows['f'], len(vertices), len(uvs))
    if not len(vertices) or not len(faces):
        raise MeshFileError(f'{path}: expected a triangle mesh, found {len(vertices)} vertices and {len(faces)} faces')
    return ObjMesh(vertices, uvs, faces, uv_faces)


def parse_obj_vertices(data: bytes, where: str) -> np.ndarray:
    """Return just the vertices [V, 3] float32 of the content of an OBJ file; several times faster than `read_obj`.

    where: name of the file for messages. Raises MeshFileError for coordinates that are missing or not finite.
    """
    rows = [line.split()[1:4] for line in data.splitlines() if line.startswith((b'v ', b'v\t'))]
    try:
        vertices = np.array(rows, dtype=np.float32).reshape(len(rows), 3)
    except ValueError:
        vertices = None
    if vertices is None or not len(vertices) or not np.isfinite(vertices).all():
        raise MeshFileError(f'{where}: expected vertices of three finite numbers (lines v x y z)')
    return vertices


def read_landmarks(path: str | os.PathLike) -> np.ndarray:
    """Read a landmark file: 68 lines of x y z in metres -> [68, 3] float32, iBUG order.

    Raises FileNotFoundError, or MeshFileError for another shape, numbers that are not finite, or pixels.
    """
    with open(path, 'rb') as file:
        return parse_landmarks(file.read(), os.fspath(path))


def parse_landmarks(data: bytes, where: str) -> np.ndarray:
    """Return the landmarks [68, 3] of the content of a landmark file; errors as `read_landmarks`, naming `where`."""
    lines = enumerate(data.decode('utf-8', errors='replace').splitlines(), start=1)
    rows = [(number, line.split()) for number, line in lines if line.strip()]
    if len(rows) != NUM_LANDMARKS or any(len(words) != 3 for _, words in rows):
        widths = sorted({len(words) for _, words in rows})
        raise MeshFileError(
            f'{where}: expected {NUM_LANDMARKS} lines of 3 numbers, found {len(rows)} lines of '
            f'{" or ".join(map(str, widths)) or "0"}'
        )
    landmarks = _numbers(where, rows, 3)
    largest = np.abs(landmarks).max()
    if largest >= LANDMARK_LIMIT:
        raise MeshFileError(
            f'{where}: expected 3-D landmarks in metres, all below {LANDMARK_LIMIT}, found {largest:g} (pixels?)'
        )
    return landmarks


def obj_vertices(vertices: np.ndarray, number: str = '%.6f') -> bytes:
    """Return the lines of an OBJ file for vertices [V, 3]; number: how one is printed, '%r' keeps float32 exactly."""
    return (f'v {number} {number} {number}\n' * len(vertices) % tuple(vertices.ravel().tolist())).encode('ascii')


def obj_surface(uvs: np.ndarray, faces: np.ndarray, uv_faces: np.ndarray, number: str = '%.6f') -> bytes:
    """Return the lines after the vertices, UVs [T, 2] and faces [F, 3]: the same for all meshes of a topology."""
    points = f'vt {number} {number}\n' * len(uvs) % tuple(uvs.ravel().tolist())
    corners = np.stack([faces, uv_faces], axis=-1) + 1
    return (points + 'f %d/%d %d/%d %d/%d\n' * len(corners) % tuple(corners.ravel().tolist())).encode('ascii')


def landmark_lines(landmarks: np.ndarray, number: str = '%.6f') -> bytes:
    """Return landmarks [68, 3] as lines of x y z; number: how one is printed."""
    return (f'{number} {number} {number}\n' * len(landmarks) % tuple(landmarks.ravel().tolist())).encode('ascii')


def write_obj(path: str | os.PathLike, mesh: ObjMesh) -> None:
    """Write vertices, UVs and faces as an OBJ file with six decimals; `path` appears only when complete."""
    with atomic_write(path) as file:
        file.write(obj_vertices(mesh.vertices) + obj_surface(mesh.uvs, mesh.faces, mesh.uv_faces))


def write_landmarks(path: str | os.PathLike, landmarks: np.ndarray) -> None:
    """Write landmarks [68, 3] as lines of x y z in metres, eight decimals; `path` appears only when complete."""
    with atomic_write(path) as file:
        file.write(landmark_lines(landmarks, '%.8f'))


def stack_mesh(vertices: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Return the generator's mesh input [1, V + 68, 3] of vertices [V, 3] and landmarks [68, 3]."""
    return np.concatenate([vertices, landmarks])[None].astype(np.float32)


def to_world(points: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Return mesh points [..., 3], an array or a tensor, in world units and of the same type."""
    new = points.new_tensor if isinstance(points, torch.Tensor) else np.asarray(points).dtype.type
    return points * WORLD_SCALE + new(WORLD_SHIFT)


def from_world(points: np.ndarray) -> np.ndarray:
    """Return points [..., 3] of the world in metres, as meshes have them, and of the same type."""
    return (points - points.dtype.type(WORLD_SHIFT)) / WORLD_SCALE


def vertex_normals(vertices: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    """Return unit normals [N, V, 3] of meshes [N, V, 3] with faces [F, 3]: means over faces, weighted by area."""
    a, b, c = (vertices.index_select(1, corner) for corner in faces.unbind(dim=1))
    across = torch.linalg.cross(b - a, c - a)  # Twice the face's area long.
    total = torch.zeros_like(vertices)
    for corner in faces.unbind(dim=1):
        total.index_add_(1, corner, across)
    return torch.nn.functional.normalize(total, dim=-1)


def _numbers(path, rows, count):
    """Return the first `count` numbers of each row as float32 [rows, count]."""
    try:
        with np.errstate(over='ignore'):  # Numbers beyond float32 become infinite, which is told below.
            values = np.array([words[:count] for _, words in rows], dtype=np.float32).reshape(len(rows), count)
    except ValueError:
        number, words = next(row for row in rows if not _are_numbers(row[1][:count], count))
        raise MeshFileError(f'{path}, line {number}: expected {count} numbers, found {_excerpt(words)}') from None
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        number, words = rows[bad[0]]
        raise MeshFileError(f'{path}, line {number}: expected finite numbers, found {_excerpt(words)}')
    return values


def _are_numbers(words, count):
    try:
        return len([float(word) for word in words]) == count
    except ValueError:
        return False


def _excerpt(words):
    """Return the words of a line, cut to what a message can hold."""
    text = ' '.join(words)
    return text if len(text) <= EXCERPT else f'{text[:EXCERPT]}...'


def _corners(path, rows, num_vertices, num_uvs):
    """Return 0-based (faces, uv_faces) of lines `f v/vt v/vt v/vt`; uv_faces None where a corner has no UV."""
    corners = []
    for number, words in rows:
        if len(words) != 3:
            raise MeshFileError(f'{path}, line {number}: expected a triangle, found {len(words)} corners')
        try:
            corners.append([[int(part or 0) for part in (word.split('/') + [''])[:2]] for word in words])
        except ValueError:
            raise MeshFileError(f'{path}, line {number}: expected corners v or v/vt, found {_excerpt(words)}') from None
    try:
        indices = np.array(corners, dtype=np.int64).reshape(len(rows), 3, 2)
    except OverflowError:
        raise MeshFileError(f'{path}: expected vertex numbers up to {num_vertices}, found one beyond 64 bits') from None
    faces, uv_faces = indices[:, :, 0] - 1, indices[:, :, 1] - 1
    for name, values, limit in (('vertex', faces, num_vertices), ('UV', uv_faces, num_uvs)):
        lowest = 0 if name == 'vertex' else -1
        bad = np.flatnonzero(((values < lowest) | (values >= limit)).any(axis=1)) if len(values) else []
        if len(bad):
            number, words = rows[bad[0]]
            raise MeshFileError(
                f'{path}, line {number}: expected {name} numbers from 1 to {limit}, found {_excerpt(words)}'
            )
    return faces, uv_faces if len(faces) and (uv_faces >= 0).all() else None
