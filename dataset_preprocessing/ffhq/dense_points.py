# SPDX-License-Identifier: Apache-2.0
"""Where MediaPipe's 478 points lie on the embedded head, and how it errs: the tables that fits are made by."""

import pathlib
import zipfile
from typing import NamedTuple

import numpy as np
import torch

from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.points import NUM_MESH_POINTS

POINTS_FILE = pathlib.Path(__file__).parents[2] / 'data' / 'head' / 'mediapipe_points.npz'
FORMAT = 'next3d-mediapipe-points-1'
ERRORS_FILE = POINTS_FILE.with_name('mediapipe_errors.npz')
ERRORS_FORMAT = 'next3d-mediapipe-errors-1'
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


class DetectorErrors(NamedTuple):
    """What the detector's answers mean, learned from drawn people whose truth is known; metres.

    offset [478, 3]: of points from the head's surface, mean. deviation [478]: of each point by itself, beside modes
    [K, 478, 2]: errors across the picture that go together. scores [1 + 2E, E]: expressions of 1, its scores and their
    squares. score_deviation [E]: of these expressions from the truth.
    """

    offset: torch.Tensor
    deviation: torch.Tensor
    modes: torch.Tensor
    scores: torch.Tensor
    score_deviation: torch.Tensor

    def expected(self, scores: np.ndarray) -> np.ndarray:
        """Return expressions [..., E], 0 to 1, of the detector's scores [..., E]."""
        return np.clip(score_terms(scores) @ self.scores.numpy(), 0, 1)


def score_terms(scores: np.ndarray) -> np.ndarray:
    """Return what expressions are told by [..., 1 + 2E] of scores [..., E]."""
    return np.concatenate([np.ones_like(scores[..., :1]), scores, scores**2], axis=-1)


def load_detector_errors(path: pathlib.Path = ERRORS_FILE) -> DetectorErrors:
    """Read the table; PreprocessError for a file that is missing or another."""
    arrays = _read(path, ERRORS_FORMAT, DetectorErrors._fields, 'deviation')
    return DetectorErrors(*(torch.from_numpy(array.astype(np.float64)) for array in arrays))


def load_dense_points(path: pathlib.Path = POINTS_FILE) -> DensePoints:
    """Read the table; PreprocessError for a file that is missing or another."""
    arrays = _read(path, FORMAT, DensePoints._fields, 'corners')
    corners, weights, deviation, mirror = map(torch.from_numpy, arrays)
    return DensePoints(corners.long(), weights, deviation, mirror.long())


def _read(path, version, names, per_point):
    """Return arrays of a file; the one called per_point has a row for each point."""
    try:
        with np.load(path, allow_pickle=False) as content:
            if str(content['format']) != version or len(content[per_point]) != NUM_MESH_POINTS:
                raise ValueError('another format')
            return [np.array(content[name]) for name in names]
    except (OSError, ValueError, LookupError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise PreprocessError(f'{path}: expected tables of the detector\'s points, found none ({error})') from error
