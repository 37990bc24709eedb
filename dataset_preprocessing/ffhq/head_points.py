# SPDX-License-Identifier: Apache-2.0
"""The embedded head as `solver` and `fitting` take it: the detector's points, and how they depend on coefficients."""

import numpy as np
import torch

from dataset_preprocessing.ffhq.dense_points import FIRST_IRIS, DensePoints, DetectorErrors
from dataset_preprocessing.ffhq.faces_file import FoundFace
from geometry.head_model import EmbeddedHead, HeadMesh
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT, vertex_normals

LEAST_SCORE_DEVIATION = 0.04  # Of an expression from what scores tell; rare ones hardly differ in drawn people.
# Modes taken at their size give the likeliest head and camera, which leave points where a mode explains them. Meshes
# shall lie on the picture, too: with this share cameras are as good (docs/preprocessing.md).
MODE_SHARE = 0.4
SCORE_STEP, GAZE_STEP = 0.35, 0.35  # How much an expression changes from frame to frame.
GAZE_PREFIX = 'eyeLook'
# Degrees that the embedded head's eyeballs turn at weight 1.
SIDEWAYS_DEG, UP_DEG, DOWN_DEG = 25.0, 18.0, 22.0


def point_normals(head: EmbeddedHead, table: DensePoints) -> torch.Tensor:
    """Return the normals [478, 3] of the neutral head at the detector's points."""
    corners, weights = table.corners.to(head.mean.device), table.weights.to(head.mean)[..., None]
    normals = (vertex_normals(head.mean[None], head.faces)[0][corners] * weights).sum(dim=1)
    # Eyeballs are seen wherever the eye is.
    normals[FIRST_IRIS:] = normals.new_tensor([0, 0, 1])
    return normals


class EmbeddedPoints:
    """MediaPipe's points on the embedded head; local coefficients are its 52 expressions.

    eyes: outer and inner corner of one eye, then of the other, among the points.
    """

    eyes = (33, 133), (362, 263)

    def __init__(self, head: EmbeddedHead, table: DensePoints, errors: DetectorErrors, dtype=torch.float64):
        self.head, self.num_identity, self.errors = head, head.num_identity, errors
        device = head.mean.device
        corners, weights = table.corners.to(device), table.weights.to(device, dtype)[..., None]

        def at_points(basis):
            return WORLD_SCALE * (basis.to(dtype)[:, corners] * weights).sum(dim=2)

        offset = WORLD_SCALE * errors.offset.to(device, dtype)
        self.mean = at_points(head.mean[None])[0] + torch.tensor(WORLD_SHIFT, dtype=dtype, device=device) + offset
        self.identity_basis = at_points(head.identity_basis.unflatten(1, (-1, 3)))
        self.expression_basis = at_points(head.expression_basis.unflatten(1, (-1, 3)))
        self.deviation = WORLD_SCALE * errors.deviation.to(device, dtype)
        self.modes = MODE_SHARE * WORLD_SCALE * errors.modes.to(device, dtype)
        self.normals = point_normals(head, table).to(dtype)
        is_gaze = torch.tensor([name.startswith(GAZE_PREFIX) for name in head.expression_names], device=device)
        ones = self.mean.new_ones(head.num_expression)
        self.lower, self.upper = 0 * ones, ones
        self.local_deviation = errors.score_deviation.to(device, dtype).clamp(min=LEAST_SCORE_DEVIATION)
        self.step_deviation = torch.where(is_gaze, GAZE_STEP, SCORE_STEP).to(dtype)
        self._closing, self._opening = (head.expression_names.index(name) for name in ('mouthClose', 'jawOpen'))
        self._identity_slope = self.identity_basis.permute(1, 2, 0).contiguous()[None]
        self._expression_slope = self.expression_basis.permute(1, 2, 0).contiguous()[None]

    def points(self, identity: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Return points [N, 478, 3] in world units."""
        offset = identity @ self.identity_basis.flatten(1) + local @ self.expression_basis.flatten(1)
        return self.mean + offset.unflatten(1, self.mean.shape)

    def jacobians(self, identity: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the derivatives [1, 478, 3, I] and [1, 478, 3, 52], the same for all."""
        return self._identity_slope, self._expression_slope

    def restrict(self, local: torch.Tensor) -> torch.Tensor:
        """Return expressions [N, 52] from 0 to 1, mouthClose at most jawOpen."""
        local = local.clamp(0, 1)
        local[:, self._closing] = torch.minimum(local[:, self._closing], local[:, self._opening])
        return local

    def targets(self, points: np.ndarray) -> np.ndarray:
        """Return what of the detector's points [N, 478, 2] is fitted: all."""
        return points

    def expected(self, face: FoundFace) -> np.ndarray:
        """Return expressions [52] as the detector's scores tell them."""
        scores = np.array([face.expressions.get(name, 0.0) for name in self.head.expression_names])
        return self.errors.expected(scores).astype(np.float32)

    def gaze(self, local: torch.Tensor) -> torch.Tensor:
        """Return pitch and yaw of the person's left and right eye [N, 4], radians, up and picture-right positive."""
        weight = {name: local[:, column] for column, name in enumerate(self.head.expression_names)}
        angles = []
        for side, outwards in (('Left', 1), ('Right', -1)):  # The person's left eye is on the picture's right.
            angles.append(UP_DEG * weight[f'eyeLookUp{side}'] - DOWN_DEG * weight[f'eyeLookDown{side}'])
            angles.append(outwards * SIDEWAYS_DEG * (weight[f'eyeLookOut{side}'] - weight[f'eyeLookIn{side}']))
        return torch.stack(angles, dim=1).deg2rad()

    def mesh(self, identity: torch.Tensor, local: torch.Tensor) -> HeadMesh:
        """Return the head of identity [N, I] and expressions [N, 52]."""
        return self.head(identity, local)

    def drawn_faces(self) -> torch.Tensor:
        """Return the faces [F, 3] of overlays."""
        skin = self.head.regions['skin'] & ~self.head.regions['scalp'] | self.head.regions['eyes']
        return self.head.faces[skin[self.head.faces].all(dim=1)]

    def coefficients(self, identity: np.ndarray, local: np.ndarray) -> dict[str, np.ndarray]:
        """Return what coefficients.npz holds of identity [100] or [N, 100] and expressions [N, 52]."""
        return {
            'identity': identity, 'expression': local, 'expression_names': np.array(self.head.expression_names)
        }  # fmt: skip
