# SPDX-License-Identifier: Apache-2.0
"""FLAME as `solver` and `fitting` take it: 68 landmarks and irises, told by MediaPipe's points, and their slopes."""

import os
import pathlib

import numpy as np
import torch
from scipy.optimize import nnls
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dataset_preprocessing.ffhq import assets
from dataset_preprocessing.ffhq.dense_points import FIRST_IRIS, DensePoints
from dataset_preprocessing.ffhq.faces_file import FoundFace
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.points import IRISES
from geometry.flame import NUM_JOINTS, FlameFileError, FlameHead, load_flame, pose_joints, rotation_matrices, skin
from geometry.head_model import EmbeddedHead, HeadMesh
from geometry.meshes import NUM_LANDMARKS, WORLD_SCALE, MeshFileError, to_world, vertex_normals

LEAST_DEVIATION = 0.0010  # Metres, of a point.
EYE_JOINTS = (3, 4)  # Left, right.
NUM_POSE = 7  # Of local coefficients, after the expression: jaw [3]; pitch and yaw of the left, then the right eye.
MAX_CODE = 4.0  # Standard deviations.
JAW_LOWER, JAW_UPPER = (0.0, -0.15, -0.1), (0.7, 0.15, 0.1)  # Radians: opening, sideways, tilting.
JAW_DEVIATION, EYE_DEVIATION, MAX_EYE = (0.2, 0.05, 0.03), 0.3, 0.7
CODE_STEP, JAW_STEP, EYE_STEP = 0.4, 0.1, 0.2  # How much they change from frame to frame.
DEVIATION_SHARE = 0.5  # Of that of single points: a landmark is told by several.
NEAREST = 12  # Points that a landmark may lie between.
SUM_WEIGHT = 10.0  # Metres: far more than the points' distances, so that shares sum to 1.
CHUNK = 16  # Items whose slopes are computed at once.


def load_flame_head(path: str | os.PathLike | None = None) -> FlameHead:
    """Return FLAME of generic_model.pkl, or of its folder; landmark_embedding.npy and head_template.obj lie beside it.

    None: the published place. PreprocessError for files that are missing or others.
    """
    path = assets.ASSETS['flame'].path if path is None else pathlib.Path(path).expanduser()
    model = path / assets.ASSETS['flame'].path.name if path.is_dir() or not path.suffix else path
    beside = {key: str(model.with_name(assets.ASSETS[key].path.name)) for key in ('flame_landmarks', 'flame_template')}
    return read_flame_head(assets.locate(flame=str(model), **beside))


def read_flame_head(paths: dict[str, pathlib.Path]) -> FlameHead:
    """Return FLAME of files `assets.locate` found; PreprocessError for other files."""
    try:
        return load_flame(paths['flame'], paths['flame_landmarks'], paths['flame_template'])
    except (FlameFileError, MeshFileError) as error:
        raise PreprocessError(str(error)) from error


def landmark_shares(embedded: EmbeddedHead, table: DensePoints) -> np.ndarray:
    """Return shares [68, 478] of MediaPipe's points in each landmark: where both lie on the embedded head.

    A landmark lies between the few points that are near to it and move with it, whoever it is and whatever the face
    does: lips that touch are told apart. Shares are not negative, and sum to 1.
    """
    bases = [basis.unflatten(1, (-1, 3)) for basis in (embedded.identity_basis, embedded.expression_basis)]
    still = embedded.mean[None].cpu()
    shapes = torch.cat([still, *(basis.cpu() for basis in bases)])
    points = table.on(shapes).numpy().astype(float)
    landmarks = embedded.landmarks(shapes.to(embedded.mean)).cpu().numpy().astype(float)
    shares = np.zeros([NUM_LANDMARKS, points.shape[1]])
    for row in range(NUM_LANDMARKS):
        distance = np.linalg.norm(points[0, :FIRST_IRIS] - landmarks[0, row], axis=1)
        near = np.argsort(distance, kind='stable')[:NEAREST]
        columns = points[:, near].transpose(0, 2, 1).reshape(-1, NEAREST)
        sums = np.full([1, NEAREST], SUM_WEIGHT)
        found, _ = nnls(np.concatenate([columns, sums]), np.append(landmarks[:, row].ravel(), SUM_WEIGHT))
        shares[row, near] = found / found.sum()
    return shares


class FlamePoints:
    """FLAME's landmarks, as seen from the front, and its irises; local coefficients [57] are the expression, the jaw's
    rotation, and pitch and yaw of both eyes.

    eyes: outer and inner corner of one eye, then of the other, among the points.
    """

    eyes = (36, 39), (42, 45)

    def __init__(self, head: FlameHead, embedded: EmbeddedHead, table: DensePoints, dtype=torch.float64):
        self.head, self.num_identity = head, head.num_identity
        device = head.template.device
        self.shares = np.zeros([NUM_LANDMARKS + 2, len(table.corners)])
        self.shares[:NUM_LANDMARKS] = landmark_shares(embedded, table)
        self.shares[NUM_LANDMARKS, IRISES[1][0]] = self.shares[NUM_LANDMARKS + 1, IRISES[0][0]] = 1  # Left, right.
        irises = _iris_vertices(head).to(device)
        corners = torch.cat([head.contour_corners[0], head.static_corners, irises[:, None].expand(-1, 3)])
        weights = torch.cat([head.contour_weights[0], head.static_weights, head.template.new_full([2, 3], 1 / 3)])
        self._weights = weights.to(dtype)[..., None]
        used, self._corners = corners.unique(return_inverse=True)
        directions = head.directions.unflatten(0, (-1, 3))
        # [vertices used, ...] and, of the joints, [5, ...]: linear in the codes, too.
        self._template, self._directions = head.template[used].to(dtype), directions[used].to(dtype)
        self._pose_directions = head.pose_directions.unflatten(0, (-1, 3))[used].to(dtype)
        self._skinning = head.weights[used].to(dtype)
        regressor = head.regressor.to(dtype)
        self._joints = regressor @ head.template.to(dtype)
        self._joint_directions = torch.einsum('jv,vkc->jkc', regressor, directions.to(dtype))
        deviation = torch.from_numpy(self.shares @ table.deviation.numpy()).to(device, dtype)
        self.modes = self._weights.new_zeros([0, len(self.shares), 2])
        self.deviation = WORLD_SCALE * (DEVIATION_SHARE * deviation).clamp(min=LEAST_DEVIATION)
        normals = vertex_normals(head.template[None], head.faces)[0][corners].to(dtype)
        self.normals = torch.nn.functional.normalize((normals * self._weights).sum(dim=1), dim=1)
        self.normals[NUM_LANDMARKS:] = self.normals.new_tensor([0, 0, 1])  # Eyeballs are seen wherever the eye is.
        self._set_priors(head.num_expression)

    def _set_priors(self, count):
        new = self.deviation.new_tensor
        self.lower = new([*[-MAX_CODE] * count, *JAW_LOWER, *[-MAX_EYE] * 4])
        self.upper = new([*[MAX_CODE] * count, *JAW_UPPER, *[MAX_EYE] * 4])
        self.local_deviation = new([*[1.0] * count, *JAW_DEVIATION, *[EYE_DEVIATION] * 4])
        self.step_deviation = new([*[CODE_STEP] * count, *[JAW_STEP] * 3, *[EYE_STEP] * 4])

    def points(self, identity: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        """Return points [N, 70, 3] in world units."""
        expression, jaw, eyes = self.split(local)
        codes = torch.cat([identity.expand(len(local), -1), expression], dim=1)
        shaped = self._template + torch.einsum('vkc,nc->nvk', self._directions, codes)
        rest = self._joints + torch.einsum('jkc,nc->njk', self._joint_directions, codes)
        turns = torch.cat([local.new_zeros([len(local), 6]), jaw, eyes], dim=1).unflatten(1, (NUM_JOINTS, 3))
        rotations = rotation_matrices(turns)
        bends = (rotations[:, 1:] - torch.eye(3, dtype=local.dtype, device=local.device)).flatten(1)
        shaped = shaped + torch.einsum('vkc,nc->nvk', self._pose_directions, bends)
        vertices = skin(shaped, self._skinning, pose_joints(rest, rotations))
        points = (vertices[:, self._corners] * self._weights).sum(dim=2)
        return to_world(points)

    def jacobians(self, identity: torch.Tensor, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the derivatives [N, 70, 3, I] and [N, 70, 3, L]: rotations make them differ from item to item."""

        def of_one(identity, local):
            return self.points(identity[None], local[None])[0]

        slopes = torch.func.jacfwd(of_one, argnums=(0, 1))
        return torch.func.vmap(slopes, chunk_size=CHUNK)(identity.expand(len(local), -1), local)

    def restrict(self, local: torch.Tensor) -> torch.Tensor:
        """Return local coefficients [N, L] within their bounds."""
        return local.clamp(self.lower, self.upper)

    def split(self, local: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return expression [N, E], jaw_pose [N, 3] and eye_pose [N, 6] of local coefficients."""
        expression, jaw, left, right = local.split([local.shape[1] - NUM_POSE, 3, 2, 2], dim=1)
        still = torch.zeros_like(left[:, :1])
        return expression, jaw, torch.cat([left, still, right, still], dim=1)

    def targets(self, points: np.ndarray) -> np.ndarray:
        """Return what of the detector's points [N, 478, 2] is fitted: landmarks, left and right iris [N, 70, 2]."""
        return self.shares @ points

    def expected(self, face: FoundFace) -> np.ndarray:
        """Return local coefficients [L] before anything is fitted: none, as the detector's scores are not FLAME's."""
        return np.zeros(len(self.lower), np.float32)

    def gaze(self, local: torch.Tensor) -> torch.Tensor:
        """Return pitch and yaw of the person's left and right eye [N, 4], radians, up and picture-right positive."""
        return local[:, -4:] * local.new_tensor([-1, 1, -1, 1])  # About x a positive turn looks down.

    def mesh(self, identity: torch.Tensor, local: torch.Tensor) -> HeadMesh:
        """Return the head, upright, of identity [N, I] and local coefficients [N, L]."""
        expression, jaw, eyes = self.split(local)
        return self.head(identity, expression, jaw_pose=jaw, eye_pose=eyes)

    def drawn_faces(self) -> torch.Tensor:
        """Return the faces [F, 3] of overlays: those before the head's middle."""
        depth = self.head.template[:, 2]
        return self.head.faces[(depth > (depth.min() + depth.max()) / 2)[self.head.faces].all(dim=1)]

    def coefficients(self, identity: np.ndarray, local: np.ndarray) -> dict[str, np.ndarray]:
        """Return what coefficients.npz has of identity [I] or [N, I] and local coefficients [N, L]; docs/videos.md."""
        expression, jaw, eyes = (part.numpy() for part in self.split(torch.from_numpy(local)))
        pose = np.concatenate([np.zeros_like(jaw), jaw], axis=1)  # The head's rotation lives in the camera.
        return {'shape': identity, 'exp': expression, 'pose': pose, 'eye_pose': eyes}


def _iris_vertices(head):
    """Return the frontmost vertex of the left and of the right eyeball [2]: parts of the mesh of their own."""
    faces, template = head.faces.cpu().numpy(), head.template.cpu().numpy()
    ends = faces[:, [0, 1, 2]].ravel(), faces[:, [1, 2, 0]].ravel()
    _, part = connected_components(coo_array((np.ones(len(ends[0])), ends), [len(template)] * 2), directed=False)
    sizes = np.bincount(part)
    middles = np.stack([np.bincount(part, template[:, axis]) for axis in range(3)], axis=1) / sizes[:, None]
    middles[sizes.argmax()] = np.inf  # The skin.
    places = (head.regressor @ head.template)[list(EYE_JOINTS)].cpu().numpy()
    nearest = np.linalg.norm(places[:, None] - middles, axis=2).argmin(axis=1)
    if len(sizes) < len(EYE_JOINTS) + 1 or nearest[0] == nearest[1]:
        raise PreprocessError(f'FLAME: expected eyeballs that are no part of the skin, found {len(sizes)} parts in all')
    depths = np.where(part == nearest[:, None], template[:, 2], -np.inf)
    return torch.from_numpy(depths.argmax(axis=1))
