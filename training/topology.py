# SPDX-License-Identifier: Apache-2.0
"""The mesh topology that a new network is built with: faces and UVs of an OBJ file, and a mask of its texture."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from geometry.meshes import MeshFileError, read_obj

MASK_NAME = 'uv_face_mask.png'  # Looked for beside the OBJ file.


class MeshTopology(NamedTuple):
    """Arguments of `Next3DGenerator`: faces and uv_faces [F, 3], uvs [T, 2], uv_face_mask [1, 1, S, S] in [0, 1]."""

    faces: np.ndarray
    uvs: np.ndarray
    uv_faces: np.ndarray
    uv_face_mask: torch.Tensor


def load_topology(
    obj_path: str | os.PathLike, texture_resolution: int, mask_path: str | os.PathLike | None = None
) -> MeshTopology:
    """Read a template mesh and its UV mask, resized to the texture.

    mask_path: None: uv_face_mask.png beside the mesh, and a mask of ones where there is none. Raises
    FileNotFoundError, or MeshFileError for a mesh without UVs and a mask that is no picture.
    """
    mesh = read_obj(obj_path)
    if mesh.uv_faces is None:
        raise MeshFileError(f'{obj_path}: expected a UV-mapped mesh (vt lines, f v/vt), found no UVs')
    beside = pathlib.Path(obj_path).with_name(MASK_NAME)
    if mask_path is None and not beside.exists():
        mask = torch.ones(1, 1, texture_resolution, texture_resolution)
    else:
        mask = _read_mask(mask_path or beside, texture_resolution)
    return MeshTopology(mesh.faces, mesh.uvs, mesh.uv_faces, mask)


def _read_mask(path, size):
    try:
        with Image.open(path) as picture:
            channel = np.asarray(picture.convert('RGB').getchannel(0), dtype=np.float32) / 255
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError) as error:
        raise MeshFileError(f'{path}: expected a picture, found none that can be read: {error}') from error
    mask = torch.from_numpy(channel)[None, None]
    if mask.shape[-2:] == (size, size):
        return mask
    return torch.nn.functional.interpolate(mask, size=(size, size), mode='bilinear', antialias=True)
