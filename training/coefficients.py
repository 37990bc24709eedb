# SPDX-License-Identifier: Apache-2.0
"""Coefficients of a driving clip, of the embedded head or of FLAME: meshes of them, and their motion of other faces."""

import os
from collections.abc import Callable

import numpy as np
import torch

from geometry.flame import PUBLISHED_FOLDER, FlameFileError, FlameHead, load_flame_beside
from geometry.head_model import load_embedded_head
from training.data_checks import MIRROR_ENDING
from training.files import DatasetError

POSE_LENGTH = 6  # Of pose: head, then jaw. Of eye_pose: left, then right.


class EmbeddedCoefficients:
    """identity [I], or [T, I] of different people, and expression [T, E] of the embedded head, rows by frame.

    broken: names of frames with numbers that are not finite, here and in `FlameCoefficients`; they are taken for 0.
    """

    def __init__(self, where: str | os.PathLike, arrays: dict[str, np.ndarray]):
        self.rows, count = _rows(arrays)
        head = self.head = load_embedded_head()
        expression = floats(where, 'expression', arrays['expression'], [count, head.num_expression])
        identity = np.atleast_2d(arrays.get('identity', np.zeros(head.num_identity)))
        identity = identity.repeat(count, axis=0) if len(identity) == 1 else identity
        identity = floats(where, 'identity', identity, [count, head.num_identity])
        given = tuple(str(name) for name in arrays.get('expression_names', head.expression_names))
        if given != head.expression_names:
            raise DatasetError(f'{where}: expression_names: expected those of the embedded head, found others')
        self.broken, (self._expression, self._identity) = _finite(self.rows, expression, identity)

    @torch.no_grad()
    def mesh(self, name: str) -> np.ndarray:
        """Return the mesh [V + 68, 3] of a frame."""
        row = slice(self.rows[name], self.rows[name] + 1)
        return self.head(self._identity[row], self._expression[row]).stacked()[0].numpy()

    @torch.no_grad()
    def worn_by(self, neutral: np.ndarray) -> Callable[[str], np.ndarray]:
        """Return `mesh` for another face, whose neutral mesh [V + 68, 3] is given.

        The embedded head is linear: what expressions add does not depend on who makes them.
        """
        still = self.head(self._identity[:1], self.head.expression()).stacked()[0].numpy()

        @torch.no_grad()
        def mesh(name):
            row = self.rows[name]
            moved = self.head(self._identity[:1], self._expression[row : row + 1]).stacked()[0].numpy()
            return (neutral + (moved - still)).astype(np.float32)

        return mesh


class FlameCoefficients:
    """FLAME's shape [T, S] or [S], exp [T, E], pose [T, 6] and eye_pose [T, 6], rows by frame.

    Of pose only the jaw is used: the head's rotation lives in the camera. A missing pose is none.
    """

    def __init__(self, where: str | os.PathLike, arrays: dict[str, np.ndarray], flame_path: str | os.PathLike | None):
        self.rows, count = _rows(arrays)
        sizes = {name: np.shape(arrays[name])[-1:] or (0,) for name in ('shape', 'exp') if name in arrays}
        (num_expression,), (num_identity,) = sizes['exp'], sizes.get('shape', (1,))
        expression = floats(where, 'exp', arrays['exp'], [count, num_expression])
        shape = np.asarray(arrays.get('shape', np.zeros(num_identity)))
        shape = np.tile(shape, [count, 1]) if shape.ndim == 1 else shape
        shape = floats(where, 'shape', shape, [count, num_identity])
        none = np.zeros([count, POSE_LENGTH])
        poses = [floats(where, x, arrays.get(x, none), [count, POSE_LENGTH]) for x in ('pose', 'eye_pose')]
        self.broken, parts = _finite(self.rows, shape, expression, poses[0][:, 3:], poses[1])
        self._shape, self._expression, self._jaw, self._eyes = parts
        try:
            self.head: FlameHead = load_flame_beside(
                flame_path or PUBLISHED_FOLDER, num_identity=num_identity, num_expression=num_expression
            )
        except FlameFileError as error:
            raise DatasetError(str(error)) from error
        except ValueError as error:  # More columns than FLAME has.
            raise DatasetError(f'{where}: {error}') from error

    def mesh(self, name: str) -> np.ndarray:
        """Return the mesh [V + 68, 3] of a frame."""
        row = self.rows[name]
        return self._posed(self.head, self._shape[row : row + 1], name)

    @torch.no_grad()
    def worn_by(self, neutral: np.ndarray) -> Callable[[str], np.ndarray]:
        """Return `mesh` for another face, whose neutral mesh [V + 68, 3] is given.

        Shape codes only add to FLAME's template, and all that follows (expression, joints, corrections, skinning)
        depends on their sum alone: the neutral mesh takes the template's place, whatever its codes are or whether it
        has any. Landmarks are FLAME's, moved by what the given ones differ from FLAME's on the neutral mesh.
        """
        count = self.head.num_vertices
        vertices = torch.from_numpy(np.asarray(neutral[:count], dtype=np.float32))
        head, shape = self.head.worn_by(vertices), torch.zeros(1, self.head.num_identity)
        shift = np.zeros_like(neutral, dtype=np.float32)
        shift[count:] = neutral[count:] - self.head.landmarks(vertices[None])[0].numpy()
        return lambda name: self._posed(head, shape, name) + shift

    @torch.no_grad()
    def _posed(self, head, shape, name):
        row = slice(self.rows[name], self.rows[name] + 1)
        poses = dict(jaw_pose=self._jaw[row], eye_pose=self._eyes[row])
        return head(shape, self._expression[row], **poses).stacked()[0].numpy()


Coefficients = EmbeddedCoefficients | FlameCoefficients


def read_coefficients(where: str | os.PathLike, arrays: dict[str, np.ndarray], flame_path=None) -> Coefficients:
    """Return the coefficients among the arrays of a file, `where`; DatasetError for what cannot be used.

    Arrays: names, and expression (embedded head) or exp (FLAME). flame_path: FLAME's model file or its folder, read
    where it is needed; None: the published place. FileNotFoundError says where to get it.
    """
    if 'names' not in arrays or not has_coefficients(arrays):
        found = ', '.join(sorted(arrays)) or 'none'
        raise DatasetError(f'{where}: expected arrays names and expression (or exp, of FLAME), found {found}')
    if 'expression' in arrays:
        return EmbeddedCoefficients(where, arrays)
    return FlameCoefficients(where, arrays, flame_path)


def has_coefficients(arrays: dict[str, np.ndarray]) -> bool:
    """Tell whether expressions are among arrays."""
    return 'expression' in arrays or 'exp' in arrays


def floats(where: str | os.PathLike, name: str, array, shape: list[int]) -> np.ndarray:
    """Return an array as float32 of a shape, finite or not; DatasetError where it is of another."""
    try:
        array = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError):
        raise DatasetError(f'{where}: {name}: expected numbers {shape}, found {array.dtype}') from None
    if list(array.shape) != shape:
        raise DatasetError(f'{where}: {name}: expected finite numbers {shape}, found {list(array.shape)}')
    return array


def _finite(rows, *arrays):
    """Return the names of frames whose row of an array [T, ...] is not finite, and tensors with 0 in place of that."""
    is_bad = np.any([~np.isfinite(array).all(axis=1) for array in arrays], axis=0)
    filled = [torch.from_numpy(np.where(np.isfinite(array), array, np.float32(0))) for array in arrays]
    return {name for name, row in rows.items() if is_bad[row]}, filled


def _rows(arrays):
    """Return {frame: row} without mirrored frames, and the number of all rows."""
    names = [os.path.splitext(str(name))[0] for name in arrays['names'].reshape(-1)]
    return {name: row for row, name in enumerate(names) if not name.endswith(MIRROR_ENDING)}, len(names)
