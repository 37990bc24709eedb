# SPDX-License-Identifier: Apache-2.0
"""The FLAME 2020/2023 head (Li et al. 2017) from the user's own licensed files, which are read but never run.

A linear model of identity, expression and pose corrections, skinned to five joints: root, neck, jaw, left eye, right
eye. Rotations are axis-angle vectors in radians. 17 landmarks follow the visible contour, 51 are fixed to the skin.
"""

import copy
import math
import os
import pathlib
import pickle
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from geometry.head_model import HeadMesh, HeadModel
from geometry.meshes import NUM_LANDMARKS, MeshFileError, ObjMesh, read_obj
from geometry.mirror import vertex_mirror
from torch_utils import restricted_pickle
from torch_utils.restricted_pickle import PickledObject, one_line, plain

NUM_VERTICES, NUM_FACES = 5023, 9976
MAX_IDENTITY, MAX_EXPRESSION = 300, 100  # Columns of shapedirs: identity first.
PARENTS = (-1, 0, 1, 1, 1)
NUM_JOINTS = len(PARENTS)
NO_PARENT = (-1, 2**32 - 1)  # What files say of the root: the second is -1 in uint32.
NUM_CONTOUR, MAX_YAW_DEG = 17, 39
NUM_CONTOUR_ROWS = 2 * MAX_YAW_DEG + 1  # 0 to 39 degrees, then -1 to -39.

MODEL_ARRAYS = {  # Entry: (shape, kinds of numbers).
    'v_template': ((NUM_VERTICES, 3), 'f'),
    'f': ((NUM_FACES, 3), 'iu'),
    'shapedirs': ((NUM_VERTICES, 3, MAX_IDENTITY + MAX_EXPRESSION), 'f'),
    'posedirs': ((NUM_VERTICES, 3, 9 * (NUM_JOINTS - 1)), 'f'),
    'J_regressor': ((NUM_JOINTS, NUM_VERTICES), 'f'),
    'kintree_table': ((2, NUM_JOINTS), 'iu'),
    'weights': ((NUM_VERTICES, NUM_JOINTS), 'f'),
}
LANDMARK_ARRAYS = {
    'static_lmk_faces_idx': ((NUM_LANDMARKS - NUM_CONTOUR,), 'iu'),
    'static_lmk_bary_coords': ((NUM_LANDMARKS - NUM_CONTOUR, 3), 'f'),
    'dynamic_lmk_faces_idx': ((NUM_CONTOUR_ROWS, NUM_CONTOUR), 'iu'),
    'dynamic_lmk_bary_coords': ((NUM_CONTOUR_ROWS, NUM_CONTOUR, 3), 'f'),
}
CHUMPY = ('chumpy.ch', 'Ch')
SPARSE = {('scipy.sparse.csc', 'csc_matrix'), ('scipy.sparse._csc', 'csc_matrix')}
MODEL_OBJECTS = frozenset({CHUMPY, *SPARSE})

PUBLISHED_FOLDER = pathlib.Path(__file__).parents[1] / 'dataset_preprocessing' / 'ffhq' / 'deca' / 'data'
MODEL_FILE, LANDMARK_FILE = 'generic_model.pkl', 'landmark_embedding.npy'
MODEL_KIND = 'the FLAME 2020 or 2023 model (generic_model.pkl)'
LANDMARK_KIND = "DECA's landmark_embedding.npy"
WHERE_MODEL = 'register at https://flame.is.tue.mpg.de, download FLAME 2020 and unpack generic_model.pkl'
WHERE_LANDMARKS = 'landmark_embedding.npy comes with DECA, in the folder data of https://github.com/yfeng95/DECA'


class FlameFileError(ValueError):
    """A FLAME file that cannot be used; the message names the file, what was expected and what was found."""


class FlameArrays(NamedTuple):
    """What the head takes from the two files.

    template [V, 3], directions [V, 3, 400], pose_directions [V, 3, 36], regressor [5, V], weights [V, 5]: float32.
    faces [F, 3] int64. Landmarks are weighted corners of triangles: static [51, 3], contour [79, 17, 3] by yaw.
    """

    template: np.ndarray
    faces: np.ndarray
    directions: np.ndarray
    pose_directions: np.ndarray
    regressor: np.ndarray
    weights: np.ndarray
    static_corners: np.ndarray
    static_weights: np.ndarray
    contour_corners: np.ndarray
    contour_weights: np.ndarray


class FlameJoints(NamedTuple):
    """Joints at rest [N, 5, 3], then posed: their rotations in space [N, 5, 3, 3] and positions [N, 5, 3]."""

    rest: torch.Tensor
    rotations: torch.Tensor
    positions: torch.Tensor


# --- the model -------------------------------------------------------------------------------------------------------


class FlameHead(HeadModel):
    """FLAME as a head model: metres, y up, nose towards +z, vertices in FLAME's order.

    faces, uvs and uv_faces are the template's; without a template the model's faces, and no UVs (empty tensors). All
    buffers stay out of the state dict: they are licensed to the user and must not travel in snapshots.
    """

    def __init__(
        self, arrays: FlameArrays, template: ObjMesh | None = None, num_identity: int = 100, num_expression: int = 50
    ):
        _check_count('num_identity', num_identity, MAX_IDENTITY)
        _check_count('num_expression', num_expression, MAX_EXPRESSION)
        buffers = arrays._asdict()
        surface = buffers.pop('faces'), np.zeros([0, 2], np.float32), np.zeros([0, 3], np.int64)
        if template is not None:
            surface = template.faces, template.uvs, template.uv_faces
        names = tuple(f'expression_{i}' for i in range(num_expression))
        super().__init__(num_identity, names, *map(torch.from_numpy, surface), _mirror_or_none(arrays.template))
        columns = [*range(num_identity), *range(MAX_IDENTITY, MAX_IDENTITY + num_expression)]
        buffers['directions'] = arrays.directions[:, :, columns].reshape(3 * NUM_VERTICES, -1)
        buffers['pose_directions'] = arrays.pose_directions.reshape(3 * NUM_VERTICES, -1)
        for name, array in buffers.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array)), persistent=False)

    def forward(
        self,
        identity: torch.Tensor,
        expression: torch.Tensor,
        global_pose: torch.Tensor | None = None,
        neck_pose: torch.Tensor | None = None,
        jaw_pose: torch.Tensor | None = None,
        eye_pose: torch.Tensor | None = None,
        use_frontal_contour: bool = False,
    ) -> HeadMesh:
        """Return the heads of identity [N, num_identity] and expression [N, num_expression], differentiable.

        global_pose, neck_pose, jaw_pose [N, 3], eye_pose [N, 6] (left, right): axis-angle, radians; None for none.
        N = 1 broadcasts, of poses to the batch of the coefficients.
        use_frontal_contour: landmarks 0 to 16 as seen from the front whatever the pose, as landmark files hold them.
        """
        identity, expression = self.check_coefficients(identity, expression)
        shaped = self._shaped(identity, expression)
        rotations = self._rotations(len(identity), global_pose, neck_pose, jaw_pose, eye_pose)
        identity_matrix = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
        correction = (rotations[:, 1:] - identity_matrix).flatten(1) @ self.pose_directions.T
        vertices = skin(shaped + correction.reshape(shaped.shape), self.weights, self._joints(shaped, rotations))
        rows = contour_rows(rotations[:, 0] @ rotations[:, 1])
        if use_frontal_contour:
            rows = torch.zeros_like(rows)
        return HeadMesh(vertices, self._landmarks(vertices, rows))

    @property
    def num_vertices(self) -> int:
        """Number of vertices V."""
        return NUM_VERTICES

    def landmarks(self, vertices: torch.Tensor) -> torch.Tensor:
        """Return landmarks [N, 68, 3] of vertices [N, V, 3], the contour as seen from the front."""
        return self._landmarks(vertices, torch.zeros(len(vertices), dtype=torch.long, device=vertices.device))

    def worn_by(self, neutral: torch.Tensor) -> 'FlameHead':
        """Return this head with a person's neutral mesh [V, 3] as its mean; all other buffers are shared."""
        if neutral.shape != self.template.shape:
            raise ValueError(f'neutral: expected {list(self.template.shape)}, got {list(neutral.shape)}')
        head = copy.copy(self)
        head._buffers = {**self._buffers, 'template': neutral.to(self.template)}
        return head

    def joints(
        self, identity: torch.Tensor, expression: torch.Tensor, global_pose=None, neck_pose=None, jaw_pose=None,
        eye_pose=None,
    ) -> FlameJoints:  # fmt: skip
        """Return the joints of the heads that `forward` returns for the same arguments."""
        identity, expression = self.check_coefficients(identity, expression)
        rotations = self._rotations(len(identity), global_pose, neck_pose, jaw_pose, eye_pose)
        return self._joints(self._shaped(identity, expression), rotations)

    def _shaped(self, identity, expression):
        offsets = torch.cat([identity, expression], dim=1) @ self.directions.T
        return self.template + offsets.reshape(-1, NUM_VERTICES, 3)

    def _rotations(self, batch, global_pose, neck_pose, jaw_pose, eye_pose):
        parts = [('global_pose', global_pose, 3), ('neck_pose', neck_pose, 3), ('jaw_pose', jaw_pose, 3)]
        vectors = []
        for name, vector, length in [*parts, ('eye_pose', eye_pose, 6)]:
            if vector is None:
                vector = self.template.new_zeros([batch, length])
            if vector.ndim != 2 or vector.shape[1] != length or len(vector) not in (1, batch):
                sizes = f'{batch} or 1' if batch != 1 else '1'
                raise ValueError(f'{name}: expected [{sizes}, {length}], got {list(vector.shape)}')
            vectors.append(vector.expand(batch, -1))
        return rotation_matrices(torch.cat(vectors, dim=1).reshape(batch, NUM_JOINTS, 3))

    def _joints(self, shaped, rotations):
        return pose_joints(torch.einsum('jv,nvk->njk', self.regressor, shaped), rotations)

    def _landmarks(self, vertices, rows):
        batch = len(vertices)
        corners = torch.cat([self.contour_corners[rows], self.static_corners.expand(batch, -1, -1)], dim=1)
        weights = torch.cat([self.contour_weights[rows], self.static_weights.expand(batch, -1, -1)], dim=1)
        which = torch.arange(batch, device=vertices.device)[:, None, None]
        return (vertices[which, corners] * weights[..., None]).sum(dim=2)


def rotation_matrices(vectors: torch.Tensor) -> torch.Tensor:
    """Return the rotations [..., 3, 3] of axis-angle vectors [..., 3] in radians (Rodrigues); smooth at zero."""
    # R = 1 + sin(a)/a·K + (1 - cos a)/a²·K², K the cross product with the vector; 1e-16: a root has no slope at zero.
    angle = (vectors.square().sum(dim=-1) + 1e-16).sqrt()[..., None, None]
    x, y, z = vectors.unbind(dim=-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    first = torch.sinc(angle / math.pi)
    second = torch.sinc(angle / (2 * math.pi)).square() / 2
    return torch.eye(3, dtype=vectors.dtype, device=vectors.device) + first * cross + second * (cross @ cross)


def contour_rows(turn: torch.Tensor) -> torch.Tensor:
    """Return the row [N] of the contour table for heads that are turned by rotations [N, 3, 3].

    Rows 0 to 39 are yaws of 0 to 39 degrees, rows 40 to 78 of -1 to -39. Yaw is the angle between the ears' axis and
    the picture plane, at most 90 degrees: the rows of heads turned further come back.
    """
    yaw = torch.atan2(-turn[:, 2, 0], turn[:, :2, 0].norm(dim=1)).rad2deg().nan_to_num()
    degrees = yaw.clamp(-MAX_YAW_DEG, MAX_YAW_DEG).round().long()  # Halves go to the even neighbour.
    return torch.where(degrees >= 0, degrees, MAX_YAW_DEG - degrees)


def pose_joints(rest: torch.Tensor, rotations: torch.Tensor) -> FlameJoints:
    """Return the joints of rest positions [N, 5, 3] and rotations [N, 5, 3, 3] relative to each joint's parent."""
    turns, places = [rotations[:, 0]], [rest[:, 0]]
    for joint, parent in list(enumerate(PARENTS))[1:]:
        bone = (rest[:, joint] - rest[:, parent])[..., None]
        places.append(places[parent] + (turns[parent] @ bone)[..., 0])
        turns.append(turns[parent] @ rotations[:, joint])
    return FlameJoints(rest, torch.stack(turns, dim=1), torch.stack(places, dim=1))


def skin(vertices: torch.Tensor, weights: torch.Tensor, joints: FlameJoints) -> torch.Tensor:
    """Return vertices [N, V, 3] moved by the mean motion, of weights [V, 5], of joints (linear blend skinning)."""
    shift = joints.positions[..., None] - joints.rotations @ joints.rest[..., None]
    motion = torch.cat([joints.rotations, shift], dim=3)
    blended = torch.einsum('vj,njab->nvab', weights, motion)
    return (blended[..., :3] @ vertices[..., None])[..., 0] + blended[..., 3]


def _check_count(name, value, most):
    if not 1 <= value <= most:
        raise ValueError(f'{name}: expected 1 to {most}, got {value}')


def _mirror_or_none(template):
    """Return the left-right partner of each vertex, None for a template that is not symmetric enough."""
    try:
        return torch.from_numpy(vertex_mirror(template))
    except MeshFileError:
        return None


# --- the files -------------------------------------------------------------------------------------------------------


def load_flame(
    model_path: str | os.PathLike,
    landmark_path: str | os.PathLike,
    template_obj: str | os.PathLike | None = None,
    num_identity: int = 100,
    num_expression: int = 50,
) -> FlameHead:
    """Return the head of FLAME's generic_model.pkl and DECA's landmark_embedding.npy.

    template_obj: OBJ file with FLAME's triangles and UVs, where those are needed. The counts, at most 300 and 100, say
    how many coefficients the head takes. Code in the files is never run: they may name arrays and nothing else.
    Raises FileNotFoundError saying where to get a missing file, FlameFileError for a file of another version or kind,
    MeshFileError for a template that is none.
    """
    arrays = _read_model(model_path)
    corners = _read_landmarks(landmark_path, arrays['f'])
    template = None if template_obj is None else _read_template(template_obj, arrays['f'])
    model = FlameArrays(
        template=arrays['v_template'],
        faces=arrays['f'],
        directions=arrays['shapedirs'],
        pose_directions=arrays['posedirs'],
        regressor=arrays['J_regressor'],
        weights=arrays['weights'],
        **corners,
    )
    return FlameHead(model, template, num_identity, num_expression)


def load_flame_beside(path: str | os.PathLike, **options) -> FlameHead:
    """Return `load_flame` of a folder, or of a model file, with landmark_embedding.npy in the same folder."""
    path = pathlib.Path(path).expanduser()
    model = path / MODEL_FILE if path.is_dir() or not path.suffix else path
    return load_flame(model, model.with_name(LANDMARK_FILE), **options)


def _read_model(path):
    content = _read(path, WHERE_MODEL, MODEL_KIND, lambda file: restricted_pickle.load(file, MODEL_OBJECTS, 'latin1'))
    arrays = _take_arrays(path, MODEL_KIND, content, MODEL_ARRAYS)
    parents = tuple(-1 if parent in NO_PARENT else parent for parent in arrays.pop('kintree_table')[0].tolist())
    if parents != PARENTS:
        raise FlameFileError(f'{path}: expected {MODEL_KIND} with parents {PARENTS} of its joints, found {parents}')
    _check_range(path, 'f', arrays['f'], NUM_VERTICES)
    return arrays


def _read_landmarks(path, faces):
    """Return the landmarks as the entries of FlameArrays: vertices of the triangles that they lie in, and weights."""
    content = _read(path, WHERE_LANDMARKS, LANDMARK_KIND, _load_object_npy)
    arrays = _take_arrays(path, LANDMARK_KIND, content, LANDMARK_ARRAYS)
    corners = {}
    for name, key in (('static', 'static_lmk'), ('contour', 'dynamic_lmk')):
        triangles = arrays[f'{key}_faces_idx']
        _check_range(path, f'{key}_faces_idx', triangles, NUM_FACES)
        corners[f'{name}_corners'], corners[f'{name}_weights'] = faces[triangles], arrays[f'{key}_bary_coords']
    return corners


def _read_template(path, faces):
    mesh = read_obj(path)
    if mesh.uv_faces is None:
        raise MeshFileError(f'{path}: expected UVs on all faces (corners v/vt), found faces without')
    if len(mesh.vertices) != NUM_VERTICES or len(mesh.faces) != NUM_FACES:
        raise MeshFileError(
            f"{path}: expected FLAME's {NUM_VERTICES} vertices and {NUM_FACES} faces, "
            f'found {len(mesh.vertices)} and {len(mesh.faces)}'
        )
    own, others = ({tuple(row) for row in np.sort(array, axis=1).tolist()} for array in (faces, mesh.faces))
    if own != others:
        raise MeshFileError(f"{path}: expected FLAME's triangles, found {len(others - own)} others")
    return mesh


def _read(path, where, kind, load):
    """Return what `load` makes of a file; a missing one is told with where to get it."""
    try:
        with open(path, 'rb') as file:
            return load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such file; {where}') from None
    except pickle.UnpicklingError as error:
        raise FlameFileError(f'{path}: expected {kind}, found a file that cannot be read: {one_line(error)}') from error


def _load_object_npy(file: BinaryIO):
    """Return the object in a .npy file that numpy would only read by running its pickle."""
    start = file.read(8)
    if start[:6] != b'\x93NUMPY' or start[6:7] not in (b'\1', b'\2', b'\3'):
        raise pickle.UnpicklingError('not a .npy file')
    length_format = '<H' if start[6] == 1 else '<I'
    try:
        (length,) = struct.unpack(length_format, file.read(struct.calcsize(length_format)))
    except struct.error:
        raise pickle.UnpicklingError('it is cut off') from None
    if b"'|O'" not in file.read(length):
        raise pickle.UnpicklingError('it holds numbers instead of a dict')
    array = restricted_pickle.load(file)
    try:
        (value,) = array.state[4]  # Of an array of objects, numpy pickles the list of them.
    except (AttributeError, TypeError, LookupError, ValueError):
        raise pickle.UnpicklingError('it does not hold one object') from None
    return value


def _take_arrays(path, kind, content, table):
    """Return the entries of a table from a file's dict, as float32 or int64 arrays of their own."""
    if not isinstance(content, dict):
        raise FlameFileError(f'{path}: expected {kind}, a dict of arrays, found something else')
    missing = [key for key in table if key not in content]
    if missing:
        raise FlameFileError(f'{path}: expected {kind}, found a file without {", ".join(missing)}')
    arrays = {}
    for key, (shape, kinds) in table.items():
        try:
            array = _array(content[key], shape, kinds)
        except (pickle.UnpicklingError, ValueError, TypeError, LookupError, AttributeError) as error:
            numbers = f'{"real" if kinds == "f" else "whole"} numbers {list(shape)}'
            raise FlameFileError(f'{path}: expected {kind} with {key}: {numbers}, found {one_line(error)}') from error
        arrays[key] = array.astype(np.float32 if kinds == 'f' else np.int64)
        if not np.isfinite(arrays[key]).all():
            raise FlameFileError(f'{path}: {key}: expected finite numbers, found others')
    return arrays


def _array(value, shape, kinds):
    """Return the array of a pickled value: plain, a torch tensor, chumpy-wrapped or sparse; ValueError for others."""
    if isinstance(value, PickledObject) and (value.module, value.class_name) == CHUMPY:
        value = value.state.get('x')
    if isinstance(value, PickledObject) and (value.module, value.class_name) in SPARSE:
        return _dense(value.state, shape, kinds)
    value = plain(value)
    value = value.numpy() if isinstance(value, torch.Tensor) else value
    if not isinstance(value, np.ndarray):
        raise ValueError('no array')
    if value.shape != shape or value.dtype.kind not in kinds:
        raise ValueError(f'{value.dtype} {list(value.shape)}')
    return value


def _dense(state, shape, kinds):
    """Return the array of a scipy matrix that was pickled by columns."""
    found = plain(state.get('_shape'))
    if found != shape:  # Before anything of that size is made.
        raise ValueError(f'a sparse matrix {found}')
    data, rows, starts = (plain(state.get(name)) for name in ('data', 'indices', 'indptr'))
    if data.dtype.kind not in kinds:
        raise ValueError(f'a sparse matrix of {data.dtype}')
    is_sorted = len(starts) == shape[1] + 1 and starts[0] == 0 and (starts[1:] >= starts[:-1]).all()
    if not is_sorted or not starts[-1] == len(rows) == len(data) or rows.min(initial=0) < 0:
        raise ValueError('a damaged sparse matrix')
    dense = np.zeros(shape)
    np.add.at(dense, (rows, np.repeat(np.arange(shape[1]), np.diff(starts))), data)
    return dense


def _check_range(path, name, indices, limit):
    if indices.min() < 0 or indices.max() >= limit:
        raise FlameFileError(
            f'{path}: {name}: expected numbers from 0 to {limit - 1}, found {indices.min()} to {indices.max()}'
        )
