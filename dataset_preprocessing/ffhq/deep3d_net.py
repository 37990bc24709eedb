# SPDX-License-Identifier: Apache-2.0
"""Cameras by Deep3DFaceRecon (Deng et al. 2019): its network from the user's checkpoint, coefficients to poses.

A face model's pose in front of a fixed camera is turned into a camera around EG3D's fixed head. Poses are cam2world
[4, 4] with OpenCV's axes.
"""

import pathlib

import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import nn

from dataset_preprocessing.ffhq.alignment import (
    BFM_SHIFT, CAMERA_SCALE, CAMERA_SIDE, CENTRE_SIDE, DECIMETRE, PICTURE_SIDE, crop_of, place_face, take_crop,
)  # fmt: skip
from dataset_preprocessing.ffhq.resnet import NUM_FEATURES, ResNet50, load_part
from geometry.cameras import cam2world_from_forward

KIND = "Deep3DFaceRecon's checkpoint (epoch_20.pth)"
# The coefficients in their order: name and length.
COEFFICIENTS = {'id': 80, 'exp': 64, 'tex': 80, 'angle': 3, 'gamma': 27, 'trans': 3}
NUM_COEFFICIENTS = sum(COEFFICIENTS.values())
HEADS = (80, 64, 80, 3, 27, 2, 1)  # The translation comes from two layers.
CAMERA_DISTANCE = 10.0  # Decimetres from the model's origin to the network's camera.
RADIUS = 2.7
PIVOT = (0.0, 0.0, 0.175)  # Centre of the sphere of cameras in the modes `cor` and `simplify`.
FOCAL_PX = 2985.29  # In the crop of 1024: 1015 · 1024 / 224 · 300 / 466.285.
MODES = ('orig', 'cor', 'simplify')


class Deep3DNet(nn.Module):
    """Picture -> 257 coefficients."""

    def __init__(self):
        super().__init__()
        self.backbone = ResNet50()
        self.final_layers = nn.ModuleList(nn.Conv2d(NUM_FEATURES, length, 1) for length in HEADS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return coefficients [N, 257] of RGB images [N, 3, 224, 224] in [0, 1]."""
        features = self.backbone(images)[:, :, None, None]
        return torch.cat([layer(features) for layer in self.final_layers], dim=1).flatten(1)


def load_network(path: pathlib.Path, device: torch.device | str = 'cpu') -> Deep3DNet:
    """Return the network of Deep3DFaceRecon's checkpoint; errors as `resnet.load_part`."""
    return load_part(Deep3DNet(), path, 'net_recon', KIND).to(device)


def network_input(image: Image.Image, points: np.ndarray, reference: np.ndarray) -> Image.Image:
    """Return the crop of 224 pixels that the network sees, of an RGB photograph and five points [5, 2] in it."""
    placement = place_face(points, image.height, reference)
    return take_crop(image, crop_of(placement, image.size, CAMERA_SCALE, CAMERA_SIDE))


@torch.no_grad()
def coefficients(network: Deep3DNet, image: Image.Image) -> np.ndarray:
    """Return the coefficients [257] float32 of a `network_input`."""
    pixels = torch.from_numpy(np.array(image)).to(next(network.parameters()).device)
    return network(pixels.permute(2, 0, 1)[None] / 255)[0].cpu().numpy()


def split_coefficients(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the parts [..., length] of coefficients [..., 257] by name."""
    ends = np.cumsum(list(COEFFICIENTS.values()))
    return dict(zip(COEFFICIENTS, np.split(values, ends[:-1], axis=-1), strict=True))


def raw_pose(angle: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Return the pose [4, 4] of angles [3] in radians and a translation [3] in decimetres; the distance is as found."""
    # (Rz·Ry·Rx)^T takes points of the face, as columns, to the network's camera; c = -R·t is where that camera is.
    rotation = Rotation.from_euler('xyz', np.asarray(angle, dtype=np.float64)).as_matrix().T
    moved = np.asarray(translation, dtype=np.float64) - [0, 0, CAMERA_DISTANCE]
    pose = np.eye(4)
    pose[:3, :3] = rotation * [1, -1, -1]
    pose[:3, 3] = DECIMETRE * (-rotation @ moved) + BFM_SHIFT
    return pose


def normalised_pose(pose: np.ndarray, mode: str = 'orig') -> np.ndarray:
    """Return a raw pose [4, 4] moved to the sphere of cameras.

    mode: 'orig', 2.7 from the origin, as published networks were trained; 'cor', 2.7 from a point within the head;
    'simplify', as 'cor', upright and looking at that point. Raises ValueError for another one.
    """
    if mode not in MODES:
        raise ValueError(f'mode: expected {", ".join(MODES)}, got {mode!r}')
    pivot = np.zeros(3) if mode == 'orig' else np.array(PIVOT)
    away = pose[:3, 3] - pivot
    distance = np.linalg.norm(away)
    if not distance > 1e-6:
        raise ValueError('pose: expected a camera away from the head, got one in its middle')
    result = np.array(pose, dtype=np.float64)
    result[:3, 3] = pivot + RADIUS * away / distance
    if mode == 'simplify':
        forward, origin = (torch.from_numpy(vector)[None].float() for vector in (-away, result[:3, 3]))
        result[:3, :3] = cam2world_from_forward(forward, origin)[0, :3, :3].numpy()
    return result


def pixel_intrinsics() -> np.ndarray:
    """Return the intrinsics [3, 3] in pixels of the crop of 1024, as cameras.json holds them."""
    return np.array([[FOCAL_PX, 0, PICTURE_SIDE / 2], [0, FOCAL_PX, PICTURE_SIDE / 2], [0, 0, 1]])


def label(pose: np.ndarray) -> np.ndarray:
    """Return the label [25] of a normalised pose [4, 4]: pose, and intrinsics over the side of the training picture."""
    focal = FOCAL_PX / CENTRE_SIDE
    return np.concatenate([pose.ravel(), [focal, 0, 0.5, 0, focal, 0.5, 0, 0, 1]])
