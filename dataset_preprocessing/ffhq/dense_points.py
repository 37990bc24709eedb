# SPDX-License-Identifier: Apache-2.0
"""Where MediaPipe's 478 points lie on the embedded head: the table that its fits are made by."""

import pathlib
import zipfile
from typing import NamedTuple

import numpy as np
import torch

from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.points import NUM_MESH_POINTS

POINTS_FILE = pathlib.Path(__file__).parents[2] / 'data' / 'head' / 'mediapipe_points.npz'
FORMAT = 'next3d-mediapipe-points-1'
FIRST_IRIS = 468  # From here on points lie on eyeballs.


class DensePoints(NamedTuple):
    """corners [478, 3] int64, weights [478, 3]: points of the head's faces. deviation [478]: metres, how far the
    detector's points spread about them over drawn people. mirror [478]: partner of the other side."""

    corners: torch.Tensor
    weights: torch.Tensor
    deviation: torch.Tensor
    mirror: torch.Tensor

    def on(self, vertices: torch.Tensor) -> torch.Tensor:
        """Return the points [N, 478, 3] of vertices [N, V, 3]."""
        return (vertices[:, self.corners] * self.weights[..., None]).sum(dim=2)


def load_dense_points(path: pathlib.Path = POINTS_FILE) -> DensePoints:
    """Read the table; PreprocessError for a file that is missing or another."""
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content['format']) != FORMAT or content['corners'].shape != (NUM_MESH_POINTS, 3):
                raise ValueError('another format')
            arrays = [content[name] for name in DensePoints._fields]
    except (OSError, ValueError, LookupError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise PreprocessError(f'{path}: expected points of the embedded head, found none ({error})') from error
    corners, weights, deviation, mirror = (torch.from_numpy(np.array(array)) for array in arrays)
    return DensePoints(corners.long(), weights, deviation, mirror.long())
