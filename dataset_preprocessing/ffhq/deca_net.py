# SPDX-License-Identifier: Apache-2.0
"""FLAME codes by DECA (Feng et al. 2021): its coarse encoder from the user's checkpoint, the picture that it sees."""

import pathlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from skimage import transform
from torch import nn

from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.resnet import NUM_FEATURES, ResNet50, load_part
from geometry.flame import FlameHead
from geometry.head_model import HeadMesh

KIND = "DECA's deca_model.tar"
# The codes in their order: name and length. pose: rotations of the head and of the jaw.
CODES = {'shape': 100, 'tex': 50, 'exp': 50, 'pose': 6, 'cam': 3, 'light': 27}
HIDDEN = 1024
INPUT_SIDE = 224
BOX_FACTOR, CROP_FACTOR = 1.1, 1.25  # Of the landmarks' box: to the head, then with room around it.


class DecaEncoder(nn.Module):
    """Picture -> 236 numbers: shape, texture, expression, pose, camera and light."""

    def __init__(self):
        super().__init__()
        self.encoder = ResNet50()
        self.layers = nn.Sequential(nn.Linear(NUM_FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, sum(CODES.values())))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return codes [N, 236] of RGB images [N, 3, 224, 224] in [0, 1]."""
        return self.layers(self.encoder(images))


class Square(NamedTuple):
    """An upright square of a picture: left and top edge, side; pixels."""

    left: float
    top: float
    side: int


def load_encoder(path: pathlib.Path, device: torch.device | str = 'cpu') -> DecaEncoder:
    """Return the encoder of DECA's file, which is a torch file whatever its name; errors as `resnet.load_part`."""
    return load_part(DecaEncoder(), path, 'E_flame', KIND).to(device)


def square_around(landmarks: np.ndarray) -> Square:
    """Return the square that DECA looks at, of 68 landmarks [68, 2] in pixels."""
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    side = int((high - low).sum() / 2 * BOX_FACTOR * CROP_FACTOR)
    if side < 1:
        raise PreprocessError('expected landmarks of a face, found no extent')
    centre = high - (high - low) / 2.0
    return Square(float(centre[0] - side / 2), float(centre[1] - side / 2), side)


def square_matrix(square: Square) -> np.ndarray:
    """Return the matrix [3, 3] from pixels of the picture to those of the encoder's input."""
    scale = (INPUT_SIDE - 1) / square.side
    return np.array([[scale, 0, -scale * square.left], [0, scale, -scale * square.top], [0, 0, 1]])


def encoder_input(image: Image.Image, square: Square) -> torch.Tensor:
    """Return the square of an RGB picture as [3, 224, 224] in [0, 1]: bilinear, zero outside, not smoothed."""
    inverse = transform.SimilarityTransform(matrix=np.linalg.inv(square_matrix(square)))
    pixels = transform.warp(np.asarray(image) / 255.0, inverse, output_shape=(INPUT_SIDE, INPUT_SIDE))
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))


def split_codes(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the parts [N, length] of codes [N, 236] by name."""
    return dict(zip(CODES, values.split(list(CODES.values()), dim=1), strict=True))


def flame_eye_pose(gaze: np.ndarray) -> np.ndarray:
    """Return FLAME's eye pose [..., 6] of gaze angles [..., 4]: left pitch, left yaw, right pitch, right yaw; radians.

    Axis-angle of the left, then the right eye. The yaw of gaze files grows the other way.
    """
    left_pitch, left_yaw, right_pitch, right_yaw = np.moveaxis(np.asarray(gaze), -1, 0)
    zero = np.zeros_like(left_pitch)
    return np.stack([left_pitch, -left_yaw, zero, right_pitch, -right_yaw, zero], axis=-1)


def decode(head: FlameHead, codes: torch.Tensor, eye_pose: torch.Tensor | None = None) -> HeadMesh:
    """Return the heads of codes [N, 236] and eye poses [N, 6]: the jaw moves, the head is not turned.

    The rotation of the head is left out because poses live in the camera alone.
    """
    parts = split_codes(codes)
    return head(parts['shape'], parts['exp'], jaw_pose=parts['pose'][:, 3:], eye_pose=eye_pose)
