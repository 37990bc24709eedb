# SPDX-License-Identifier: Apache-2.0
"""DECA, from the user's file, as an estimator of expression, pose and identity: that of the published AED and APD."""

import hashlib
import pathlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from dataset_preprocessing.ffhq import assets, deca_net
from geometry.cameras import project_points
from geometry.meshes import NUM_LANDMARKS, to_world
from metrics.estimator import Estimate
from torch_utils.tf32 import without_tf32


class DecaEstimator:
    """A `metrics.estimator.Estimator`: 50 expression numbers, the head's rotation, shape codes as identity.

    Its own error is not known: no picture has true codes. The square that it looks at is found by the projected
    landmarks of the driving mesh.
    """

    name = 'DECA'
    expression_names = tuple(f'exp{i}' for i in range(deca_net.CODES['exp']))
    errors: dict[str, Any] = {}

    def __init__(self, encoder: deca_net.DecaEncoder, sha256: str):
        self.encoder, self.sha256 = encoder, sha256

    @torch.no_grad()
    @without_tf32()
    def __call__(self, pictures: torch.Tensor, c: torch.Tensor, v: torch.Tensor) -> Estimate:
        """Return the estimate of pictures [N, 3, R, R] uint8 of heads v [N, V + 68, 3] under labels c [N, 25]."""
        place = project_points(to_world(v[:, -NUM_LANDMARKS:]), c)[0].cpu().numpy()
        seen = []
        for picture, points in zip(pictures.cpu().numpy(), (place + 1) / 2 * pictures.shape[-1]):
            image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
            seen.append(deca_net.encoder_input(image, deca_net.square_around(points)))
        parts = deca_net.split_codes(self.encoder(torch.stack(seen).to(pictures.device)))
        return Estimate(parts['exp'], parts['pose'][:, :3], normalize(parts['shape'], dim=1))


def load_deca(folder: str | None, device: torch.device) -> DecaEstimator:
    """Return DECA of a folder laid out as deca/data; None: the published place. PreprocessError where it is missing."""
    path = assets.locate(deca=folder and str(pathlib.Path(folder) / assets.ASSETS['deca'].path.name))['deca']
    with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return DecaEstimator(deca_net.load_encoder(path, device), digest)
