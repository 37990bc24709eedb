# SPDX-License-Identifier: Apache-2.0
"""Identity and expression coefficients -> HeadMesh, one interface for every head model; the embedded head is here.

Differentiable, batched, on any device. The embedded head comes from data/head/head.npz (origin: data/head/README.md).
"""

import difflib
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from geometry.meshes import NUM_LANDMARKS

DEFAULT_HEAD = Path(__file__).parents[1] / 'data' / 'head' / 'head.npz'
FORMAT = 'next3d-embedded-head-1'
ARKIT_NAMES = (
    'browDownLeft', 'browDownRight', 'browInnerUp', 'browOuterUpLeft', 'browOuterUpRight', 'cheekPuff',
    'cheekSquintLeft', 'cheekSquintRight', 'eyeBlinkLeft', 'eyeBlinkRight', 'eyeLookDownLeft', 'eyeLookDownRight',
    'eyeLookInLeft', 'eyeLookInRight', 'eyeLookOutLeft', 'eyeLookOutRight', 'eyeLookUpLeft', 'eyeLookUpRight',
    'eyeSquintLeft', 'eyeSquintRight', 'eyeWideLeft', 'eyeWideRight', 'jawForward', 'jawLeft', 'jawOpen', 'jawRight',
    'mouthClose', 'mouthDimpleLeft', 'mouthDimpleRight', 'mouthFrownLeft', 'mouthFrownRight', 'mouthFunnel',
    'mouthLeft', 'mouthLowerDownLeft', 'mouthLowerDownRight', 'mouthPressLeft', 'mouthPressRight', 'mouthPucker',
    'mouthRight', 'mouthRollLower', 'mouthRollUpper', 'mouthShrugLower', 'mouthShrugUpper', 'mouthSmileLeft',
    'mouthSmileRight', 'mouthStretchLeft', 'mouthStretchRight', 'mouthUpperUpLeft', 'mouthUpperUpRight',
    'noseSneerLeft', 'noseSneerRight', 'tongueOut',
)  # fmt: skip
# Arrays of the file: dtype and shape, with sizes that have to agree named by letters.
LAYOUT = {
    'mean': (np.float32, 'V3'), 'faces': (np.uint16, 'F3'), 'uvs': (np.float32, 'T2'), 'uv_faces': (np.uint16, 'F3'),
    'mirror': (np.uint16, 'V'), 'identity': (np.int8, 'IV3'), 'identity_scale': (np.float32, 'I'),
    'expression': (np.int16, 'EV3'), 'expression_scale': (np.float32, 'E'),
    'landmark_vertices': (np.uint16, 'L3'), 'landmark_weights': (np.float32, 'L3'), 'regions': (np.bool_, 'RV'),
}  # fmt: skip


class HeadFileError(ValueError):
    """A head model's file that cannot be used; one line that names the file, what was expected and what was found."""


class HeadMesh(NamedTuple):
    """vertices [N, V, 3] and landmarks [N, 68, 3] (iBUG order); metres, x image right, y up, z to the viewer."""

    vertices: torch.Tensor
    landmarks: torch.Tensor

    def stacked(self) -> torch.Tensor:
        """Return the generator's mesh input [N, V + 68, 3]: vertices, then landmarks."""
        return torch.cat([self.vertices, self.landmarks], dim=1)


class HeadModel(torch.nn.Module):
    """Interface of head models; `forward(identity, expression) -> HeadMesh` is theirs to define.

    num_identity: number of identity coefficients I. expression_names: names of the E expression coefficients.
    faces, uv_faces: [F, 3] int64, counter-clockwise seen from outside. uvs: [T, 2] in [0, 1], v up. mirror: [V] int64,
    left-right partner of each vertex, or None.
    """

    def __init__(
        self,
        num_identity: int,
        expression_names: tuple[str, ...],
        faces: torch.Tensor,
        uvs: torch.Tensor,
        uv_faces: torch.Tensor,
        mirror: torch.Tensor | None = None,
    ):
        super().__init__()
        self.num_identity, self.expression_names = num_identity, tuple(expression_names)
        self.register_buffer('faces', torch.as_tensor(faces).long(), persistent=False)
        self.register_buffer('uvs', torch.as_tensor(uvs).float(), persistent=False)
        self.register_buffer('uv_faces', torch.as_tensor(uv_faces).long(), persistent=False)
        self.register_buffer('mirror', None if mirror is None else torch.as_tensor(mirror).long(), persistent=False)

    @property
    def num_expression(self) -> int:
        """Number of expression coefficients E."""
        return len(self.expression_names)

    def expression(self, values: dict[str, float | torch.Tensor] | None = None, **named) -> torch.Tensor:
        """Return coefficients [1, E] of named expressions, the rest 0: `expression(jawOpen=0.5)` or from a dict.

        A value may be a tensor of one element; gradients pass. Raises ValueError for a name the model does not have.
        """
        values = {**(values or {}), **named}
        for name in values:
            if name not in self.expression_names:
                close = difflib.get_close_matches(name, self.expression_names, n=3)
                hint = f"did you mean {' or '.join(close)}?" if close else f'known: {", ".join(self.expression_names)}'
                raise ValueError(f'expression: unknown name {name!r}; {hint}')
        zero = self.uvs.new_zeros([])
        row = [torch.as_tensor(values.get(name, zero)).to(zero).reshape([]) for name in self.expression_names]
        return torch.stack(row)[None]

    def check_coefficients(
        self, identity: torch.Tensor, expression: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return identity [N, I] and expression [N, E] with one batch size; N = 1 broadcasts. ValueError otherwise."""
        for name, value, length in (
            ('identity', identity, self.num_identity), ('expression', expression, self.num_expression)
        ):  # fmt: skip
            if value.ndim != 2 or value.shape[1] != length:
                raise ValueError(f'{name}: expected coefficients [N, {length}], got {list(value.shape)}')
        batch = max(len(identity), len(expression)) if len(identity) and len(expression) else 0
        if {len(identity), len(expression)} - {1, batch}:
            raise ValueError(f'expression: expected a batch of {len(identity)} or 1, got {len(expression)}')
        return identity.expand(batch, -1), expression.expand(batch, -1)

    def forward(self, identity: torch.Tensor, expression: torch.Tensor) -> HeadMesh:
        """Return the HeadMesh of coefficients [N, I] and [N, E]; N = 1 broadcasts."""
        raise NotImplementedError


class EmbeddedHead(HeadModel):
    """The linear head of data/head/head.npz: mean + identity components + ARKit-named expressions.

    identity: [N, I] standard deviations: standard normal coefficients give plausible people. expression: [N, 52]
    weights, 0 to 1. regions: names and meaning in data/head/README.md. Landmarks are points of faces.
    Gradients pass to both coefficients.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        super().__init__(
            len(arrays['identity']), tuple(arrays['expression_names'].tolist()),
            *(torch.from_numpy(arrays[name].astype(np.int64)) if arrays[name].dtype != np.float32
              else torch.from_numpy(arrays[name]) for name in ('faces', 'uvs', 'uv_faces', 'mirror')),
        )  # fmt: skip
        for name in ('identity', 'expression'):
            scale = torch.from_numpy(arrays[f'{name}_scale'])[:, None, None]
            self.register_buffer(f'{name}_basis', (torch.from_numpy(arrays[name]) * scale).flatten(1), persistent=False)
        self.register_buffer('mean', torch.from_numpy(arrays['mean']), persistent=False)
        corners = torch.from_numpy(arrays['landmark_vertices'].astype(np.int64))
        self.register_buffer('landmark_vertices', corners, persistent=False)
        self.register_buffer('landmark_weights', torch.from_numpy(arrays['landmark_weights']), persistent=False)
        self.region_names = tuple(arrays['region_names'].tolist())
        self.register_buffer('region_masks', torch.from_numpy(arrays['regions']), persistent=False)

    @property
    def num_vertices(self) -> int:
        """Number of vertices V."""
        return len(self.mean)

    @property
    def regions(self) -> dict[str, torch.Tensor]:
        """Vertices of each named region, bool [V]."""
        return dict(zip(self.region_names, self.region_masks, strict=True))

    def forward(self, identity: torch.Tensor, expression: torch.Tensor) -> HeadMesh:
        """Return the HeadMesh of coefficients [N, I] and [N, 52]; N = 1 broadcasts."""
        identity, expression = self.check_coefficients(identity, expression)
        expression = self._limit_closing(expression)
        offsets = identity @ self.identity_basis + expression @ self.expression_basis
        vertices = self.mean + offsets.unflatten(1, self.mean.shape)
        return HeadMesh(vertices, self.landmarks(vertices))

    def _limit_closing(self, expression):
        """Limit mouthClose to jawOpen: it closes the lips of an open jaw, and has nothing to close beyond that."""
        closing, opening = self.expression_names.index('mouthClose'), self.expression_names.index('jawOpen')
        limited = torch.minimum(expression[:, closing], expression[:, opening].clamp(min=0))
        return torch.cat([expression[:, :closing], limited[:, None], expression[:, closing + 1 :]], dim=1)

    def landmarks(self, vertices: torch.Tensor) -> torch.Tensor:
        """Return landmarks [N, 68, 3] of vertices [N, V, 3]."""
        return (vertices[:, self.landmark_vertices] * self.landmark_weights[..., None]).sum(dim=2)


def load_embedded_head(path: str | os.PathLike = DEFAULT_HEAD) -> EmbeddedHead:
    """Read the embedded head; FileNotFoundError, or HeadFileError for a file that is broken or of another kind."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files} if isinstance(file, np.lib.npyio.NpzFile) else {}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HeadFileError(f'{path}: expected an embedded head, found none that can be read: {reason}') from None
    _check_arrays(path, arrays)
    return EmbeddedHead(arrays)


def _check_arrays(path, arrays):
    """Raise HeadFileError where arrays are not those of LAYOUT, or refer to vertices that do not exist."""
    if str(arrays.get('format')) != FORMAT:
        raise HeadFileError(f'{path}: expected format {FORMAT!r}, found {str(arrays.get("format"))[:40]!r}')
    names = set(LAYOUT) | {'format', 'expression_names', 'region_names'}
    if set(arrays) != names:
        raise HeadFileError(f'{path}: expected arrays {sorted(names)}, found {sorted(arrays)}')
    sizes = {'3': 3, '2': 2, 'L': NUM_LANDMARKS, 'E': arrays['expression_names'].size, 'R': arrays['region_names'].size}
    for name, (dtype, letters) in LAYOUT.items():
        array = arrays[name]
        if array.dtype != dtype or array.ndim != len(letters):
            found = f'{array.dtype} {array.shape}'
            raise HeadFileError(f'{path}: {name}: expected {dtype.__name__} {letters}, found {found}')
        for letter, size in zip(letters, array.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise HeadFileError(f'{path}: {name}: expected {letter} = {sizes[letter]}, found shape {array.shape}')
    for name, limit in (('faces', 'V'), ('uv_faces', 'T'), ('mirror', 'V'), ('landmark_vertices', 'V')):
        if arrays[name].size and arrays[name].max() >= sizes[limit]:
            raise HeadFileError(f'{path}: {name}: expected indices below {sizes[limit]}, found {arrays[name].max()}')
    if not all(np.isfinite(arrays[name]).all() for name, (dtype, _) in LAYOUT.items() if dtype == np.float32):
        raise HeadFileError(f'{path}: expected finite numbers, found others')
