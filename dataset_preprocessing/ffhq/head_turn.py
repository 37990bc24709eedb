# SPDX-License-Identifier: Apache-2.0
"""How a head is turned, by a small network that sees the face and the detector's points; learned from drawn people.

MediaPipe's points of a tilted face err together, by more than what tells a nod: what it brings is told in
docs/preprocessing.md.
"""

import functools
import json
import pathlib
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import nn
from torch.nn.functional import relu

from dataset_preprocessing.ffhq.dense_points import load_dense_points
from dataset_preprocessing.ffhq.files import PreprocessError
from dataset_preprocessing.ffhq.gaze import rotation_to
from dataset_preprocessing.ffhq.points import NUM_MESH_POINTS
from geometry.cameras import FOCAL
from geometry.mirror import mirrored_names
from metrics.estimator import Block

TURN_FILE = pathlib.Path(__file__).parents[2] / 'data' / 'head' / 'head_turn.npz'
FORMAT = 'next3d-head-turn-1'
SIDE = 128  # Pixels of what the network sees.
HALF_SIDE = 1.9  # Of that square, in root mean square distances of the mean face's points from their middle.
WIDTHS = (24, 48, 96, 160, 224)  # Channels at 64, 32, 16, 8 and 4 pixels.
SQUEEZED, HIDDEN, POINTS_HIDDEN = 64, 192, 128
UNIT = 0.3  # Radians of the network's 1.
LOG_DEVIATION, LOG_RANGE = -3.5, (-6.0, 2.0)  # Logarithm of radians at the network's 0, and what it may add.
MIRRORED = np.array([1.0, -1.0, -1.0])  # Signs of a mirrored head's turn: nods stay.
UNSAVED = 'num_batches_tracked'  # Ends the names of counters that are not used.
UPRIGHT = np.diag([1.0, -1.0, -1.0])  # From the world to a camera before the head.


class Turn(NamedTuple):
    """mean [3]: axis-angle, radians, of a head against one that looks upright into the camera, about that camera's
    axes right, down, ahead. It looks at the middle of the points, and is rolled as they are. deviation [3]: radians."""

    mean: np.ndarray
    deviation: np.ndarray


class Frames(NamedTuple):
    """Similarities that take the mean face to points of N pictures. middle [N, 2]. right [N, 2]: what its unit, along
    the eyes, becomes."""

    middle: np.ndarray
    right: np.ndarray

    @property
    def axes(self) -> np.ndarray:
        """Rows right and down [N, 2, 2]."""
        return np.stack([self.right, self.right[:, ::-1] * [-1, 1]], axis=1)


class TurnNet(nn.Module):
    """Faces [N, 3, 128, 128] in [-1, 1], standardised points [N, 478, 3] and scores [N, E] -> turn [N, 3] and the
    logarithm of its deviation [N, 3], radians."""

    def __init__(self, num_scores: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 5, 2, 2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip(WIDTHS, WIDTHS[1:])))
        self.squeeze = nn.Conv2d(WIDTHS[-1], SQUEEZED, 1)
        self.picture = nn.Sequential(
            nn.Dropout(0.1), nn.Linear(SQUEEZED * (SIDE >> len(WIDTHS)) ** 2, HIDDEN), nn.ReLU()
        )  # fmt: skip
        self.points = nn.Sequential(
            nn.Linear(3 * NUM_MESH_POINTS + num_scores, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, POINTS_HIDDEN), nn.ReLU()
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(HIDDEN + POINTS_HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 6))

    def forward(self, x: torch.Tensor, points: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return turns and the logarithms of their deviations."""
        seen = self.picture(relu(self.squeeze(self.blocks(self.stem(x)))).flatten(1))
        told = self.points(torch.cat([points.flatten(1), scores], dim=1))
        turn, log_deviation = self.head(torch.cat([seen, told], dim=1)).float().chunk(2, dim=1)
        return UNIT * turn, LOG_DEVIATION + log_deviation.clamp(*LOG_RANGE)


class HeadTurn:
    """The network of a file with all that it was learned with; PreprocessError for a file that is missing or another.

    A face and its mirror image are both looked at.
    """

    def __init__(self, path: pathlib.Path = TURN_FILE):
        try:
            with np.load(path, allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            about = json.loads(str(arrays.pop('about')))
            if about['format'] != FORMAT:
                raise ValueError(f'format {about["format"]!r}')
            self.names = about['expression_names']
            self.template, self.mean, self.spread = (arrays.pop(name) for name in ('template', 'mean', 'spread'))
            self.net = TurnNet(len(self.names)).eval()
            weights = {name: torch.from_numpy(array).float() for name, array in arrays.items()}
            self.net.load_state_dict({name: weights.get(name, x) if name.endswith(UNSAVED) else weights[name]
                                      for name, x in self.net.state_dict().items()})  # fmt: skip
            if self.template.shape != (NUM_MESH_POINTS, 2) or self.mean.shape != (NUM_MESH_POINTS, 3):
                raise ValueError('other points')
            self.other = mirrored_names(self.names)
        except (OSError, ValueError, LookupError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise PreprocessError(f'{path}: expected the network of head turns, found none ({error})') from error
        self.mirror = load_dense_points().mirror.numpy()

    def __call__(self, image: Image.Image, points: np.ndarray, scores: dict[str, float]) -> Turn:
        """Return the turn of a face of an RGB picture; points [478, 3] and scores are the detector's."""
        square = face_square(image, frames_of(points[None, :, :2], self.template))
        return self.of_square(np.array(square), points, scores)

    @torch.no_grad()
    def of_square(self, square: np.ndarray, points: np.ndarray, scores: dict[str, float]) -> Turn:
        """Return the turn of a face of which the square [128, 128, 3] is known."""
        seen = torch.from_numpy(square.transpose(2, 0, 1)).float() / 127.5 - 1
        told = relative(points[None], frames_of(points[None, :, :2], self.template))
        told = np.concatenate([told, mirrored(told, self.mirror)])
        row = np.array([scores.get(name, 0.0) for name in self.names])
        turn, log_deviation = self.net(
            torch.stack([seen, seen.flip(2)]),
            torch.from_numpy((told - self.mean) / self.spread).float(),
            torch.from_numpy(np.stack([row, row[self.other]])).float(),
        )
        turn = turn.numpy() * [np.ones(3), MIRRORED]
        return Turn(turn.mean(axis=0), np.exp(log_deviation.numpy()).mean(axis=0))


@functools.cache
def load_head_turn(path: pathlib.Path = TURN_FILE) -> HeadTurn:
    """Return the network of a file, read once."""
    return HeadTurn(path)


def mirrored(points: np.ndarray | torch.Tensor, mirror: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Return `relative` points [N, 478, 3] of mirrored faces."""
    points = points[:, mirror]
    points[..., 0] *= -1
    return points


def frames_of(points: np.ndarray, template: np.ndarray) -> Frames:
    """Return the similarities, least squares, that take a template [478, 2] to points [N, 478, 2]; both y down.

    The template's middle is 0 and its root mean square distance from there 1.
    """
    middle = points.mean(axis=1)
    away = points - middle[:, None]
    along = (away * template).sum(axis=2).mean(axis=1)
    across = (away[..., 1] * template[:, 0] - away[..., 0] * template[:, 1]).mean(axis=1)
    return Frames(middle, np.stack([along, across], axis=1))


def relative(points: np.ndarray, frames: Frames) -> np.ndarray:
    """Return points [N, 478, 3] in their frames: units of the template, depth about its mean."""
    size = np.linalg.norm(frames.right, axis=1)[:, None]
    flat = (points[..., :2] - frames.middle[:, None]) @ frames.axes.transpose(0, 2, 1) / size[..., None] ** 2
    depth = points[..., 2] / size
    return np.concatenate([flat, (depth - depth.mean(axis=1, keepdims=True))[..., None]], axis=2)


def face_square(image: Image.Image, frames: Frames, side: int = SIDE, half_side: float = HALF_SIDE) -> Image.Image:
    """Return the square about a face, upright, of a picture; what lies outside is black.

    frames: of one face, in pixels whose centres are whole. half_side: in units of the template.
    """
    right = frames.right[0] * (2 * half_side / side)  # Pixels of the picture along one of the square.
    shrink = max(int(np.linalg.norm(right)), 1)
    down = right[::-1] * [-1, 1]
    corner = frames.middle[0] + 0.5 - (right + down) * (side / 2)
    rows = np.stack([right, down, corner], axis=1) / shrink
    small = image.reduce(shrink) if shrink > 1 else image
    return small.transform((side, side), Image.Transform.AFFINE, tuple(rows.ravel()), Image.Resampling.BICUBIC)


def camera_rotations(frames: Frames) -> np.ndarray:
    """Return rotations [N, 3, 3] to pictures' cameras from those that `Turn` is told by: which look at the middle of
    the points and are rolled with them. frames: in sides of square pictures, from their corner."""
    rays = np.concatenate([(frames.middle - 0.5) / FOCAL, np.ones_like(frames.middle[:, :1])], axis=1)
    aside = np.stack([Rotation.from_rotvec(rotation_to(ray)).as_matrix() for ray in rays])
    roll = np.zeros_like(rays)
    roll[:, 2] = np.arctan2(frames.right[:, 1], frames.right[:, 0])
    return aside @ Rotation.from_rotvec(roll).as_matrix()


def turns_of(rotation: np.ndarray, frames: Frames) -> np.ndarray:
    """Return the mean [N, 3] of Turns of heads that pictures' cameras see by rotations [N, 3, 3] from the world."""
    inwards = camera_rotations(frames).transpose(0, 2, 1)
    return Rotation.from_matrix(inwards @ rotation @ UPRIGHT).as_rotvec()


def rotations_of(turns: np.ndarray, frames: Frames) -> np.ndarray:
    """Return the rotations [N, 3, 3] from the world to pictures' cameras of turns [N, 3]: the inverse of `turns_of`."""
    return camera_rotations(frames) @ Rotation.from_rotvec(turns).as_matrix() @ UPRIGHT


def slopes_of(turns: np.ndarray) -> np.ndarray:
    """Return how turns [N, 3] change [N, 3, 3] with small rotations, about the axes that they are told by, after them.

    The inverse of the left Jacobian of rotations (Sola et al., A micro Lie theory for state estimation in robotics,
    equation 146).
    """
    angle = np.linalg.norm(turns, axis=1)[:, None, None]
    cross = np.cross(turns[:, None], np.eye(3), axisb=1, axisc=1)
    half = np.maximum(angle / 2, 1e-4)  # Below, the factor is 1/12 to all digits.
    return np.eye(3) - cross / 2 + (1 - half / np.tan(half)) / (4 * half**2) * (cross @ cross)
