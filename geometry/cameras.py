# SPDX-License-Identifier: Apache-2.0
"""Cameras of EG3D: look-at poses around the head, normalised intrinsics, and the 25-number label that holds both."""

import math

import numpy as np
import torch
from torch.nn import functional

from geometry.meshes import to_world

FOCAL = 4.2647  # Focal length over image side of FFHQ's aligned photos, and of videos and training.
DIAGONAL = 1.414  # Rounded in the published formula.
FRONTAL = math.pi / 2  # Horizontal and vertical angle of the frontal camera.
CAM2WORLD, INTRINSICS = slice(0, 16), slice(16, 25)


def focal_from_fov(fov_deg: float) -> float:
    """Return the focal length over the image side for a diagonal field of view in degrees, in (0, 180)."""
    if not 0 < fov_deg < 180:
        raise ValueError(f'fov_deg: expected a number between 0 and 180, got {fov_deg}')
    return 1 / (math.tan(math.radians(fov_deg) / 2) * DIAGONAL)


def intrinsics(focal: float = FOCAL, device: torch.device | str = 'cpu') -> torch.Tensor:
    """Return the matrix [3, 3] of a centred camera, in fractions of the image side."""
    return torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]], dtype=torch.float32, device=device)


def look_at_pose(
    horizontal: float | torch.Tensor,
    vertical: float | torch.Tensor,
    pivot=(0.0, 0.0, 0.0),
    radius: float = 2.7,
    horizontal_std: float = 0.0,
    vertical_std: float = 0.0,
    batch: int = 1,
    spread: str = 'normal',
) -> torch.Tensor:
    """Return cam2world matrices [batch, 4, 4] (OpenCV axes) of cameras on a sphere about the origin, looking at pivot.

    horizontal, vertical: angles in radians, π/2 each for the frontal camera at (0, 0, radius); a larger horizontal
    angle moves the camera to +x. *_std: spread of the angles, drawn [batch, 1] each: 'normal' or 'uniform' in ±std.
    """
    if spread not in ('normal', 'uniform'):
        raise ValueError(f"spread: expected 'normal' or 'uniform', got {spread!r}")
    h = horizontal + horizontal_std * _draw(spread, batch)
    v = (vertical + vertical_std * _draw(spread, batch)).clamp(1e-5, math.pi - 1e-5)
    theta, phi = h, torch.arccos(1 - 2 * v / math.pi)
    x = phi.sin() * (math.pi - theta).cos()
    z = phi.sin() * (math.pi - theta).sin()
    origin = radius * torch.cat([x, phi.cos(), z], dim=1)
    forward = functional.normalize(torch.as_tensor(pivot, dtype=torch.float32) - origin, dim=1)
    return cam2world_from_forward(forward, origin)


def cam2world_from_forward(forward: torch.Tensor, origin: torch.Tensor, up=(0.0, 1.0, 0.0)) -> torch.Tensor:
    """Return cam2world [N, 4, 4] of cameras at origin [N, 3] that look along forward [N, 3], pictures' top towards up.

    up: three numbers, not along forward.
    """
    forward = functional.normalize(forward, dim=1)
    up = torch.tensor(up).expand_as(forward)
    right = -functional.normalize(torch.cross(up, forward, dim=1), dim=1)
    down = functional.normalize(torch.cross(forward, right, dim=1), dim=1)
    pose = torch.eye(4).repeat(len(forward), 1, 1)
    pose[:, :3] = torch.stack([right, down, forward, origin], dim=2)
    return pose


def make_label(cam2world: torch.Tensor, intrinsics_matrix: torch.Tensor) -> torch.Tensor:
    """Return labels [N, 25] of poses [N, 4, 4] and intrinsics [3, 3] or [N, 3, 3]."""
    k = intrinsics_matrix.expand(len(cam2world), 3, 3)
    return torch.cat([cam2world.reshape(-1, 16), k.reshape(-1, 9)], dim=1)


def split_label(label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cam2world [N, 4, 4], intrinsics [N, 3, 3]) of labels [N, 25 or more]."""
    return label[:, CAM2WORLD].reshape(-1, 4, 4), label[:, INTRINSICS].reshape(-1, 3, 3)


def project_points(world: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return places [N, M, 2] of world points [N, M, 3] over the picture and their depths [N, M] along the axis.

    label: [N, 25 or more]. Places: x right, y down, [-1, 1] from edge to edge; without meaning where a depth is not
    positive.
    """
    pose, k = split_label(label)
    # A sum of products instead of a matrix product: no TF32 may round places.
    offset = world - pose[:, None, :3, 3]
    x, y, z = (offset[..., :, None] * pose[:, None, :3, :3]).sum(dim=-2).unbind(dim=-1)
    x, y = x / z, y / z
    k = k[:, :, :, None]
    column = k[:, 0, 0] * x + k[:, 0, 1] * y + k[:, 0, 2]
    row = k[:, 1, 1] * y + k[:, 1, 2]
    return torch.stack([2 * column - 1, 2 * row - 1], dim=-1), z


def project_mesh(points: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places [N, 2] of mesh points [N, 3] in picture sides from the corner, and depths [N], in double precision.

    label: [25].
    """
    world, label = to_world(torch.from_numpy(points).double()), torch.from_numpy(label).double()
    places, depth = project_points(world[None], label[None])
    return (places[0].numpy() + 1) / 2, depth[0].numpy()


def camera_rays(
    cam2world: torch.Tensor, intrinsics: torch.Tensor, resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return origins and unit directions [N, resolution², 3] in world units of the rays through all pixel centres.

    cam2world:  [N, 4, 4], OpenCV axes (x right, y down, z forward).
    intrinsics: [N, 3, 3] divided by the image size: focal lengths, skew and centre are fractions of a side.
    Rays are in row-major pixel order.
    """
    directions = local_rays(intrinsics, resolution) @ cam2world[:, :3, :3].transpose(1, 2)
    origins = cam2world[:, None, :3, 3].expand_as(directions)
    return origins, functional.normalize(directions, dim=-1)


def local_rays(intrinsics: torch.Tensor, resolution: int) -> torch.Tensor:
    """Return (x, y, 1) [N, resolution², 3] of the rays through all pixel centres in camera coordinates, row by row."""
    centres = (torch.arange(resolution, dtype=torch.float32, device=intrinsics.device) + 0.5) / resolution
    v, u = torch.meshgrid(centres, centres, indexing='ij')
    u, v = u.reshape(1, -1), v.reshape(1, -1)
    fx, fy, cx, cy, skew = (intrinsics[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2), (0, 1)))
    x = (u - cx + cy * skew / fy - skew * v / fy) / fx
    y = (v - cy) / fy
    return torch.stack([x, y.expand_as(x), torch.ones_like(x)], dim=-1)


def _draw(spread, batch):
    return torch.randn([batch, 1]) if spread == 'normal' else torch.rand([batch, 1]) * 2 - 1
