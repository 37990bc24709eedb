# SPDX-License-Identifier: Apache-2.0
"""The estimator of expression, head pose and identity, and its file: plain arrays, its own errors inside."""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn.functional import interpolate, normalize, relu

from geometry.cameras import split_label
from metrics.subject import MetricError
from torch_utils.tf32 import without_tf32

DEFAULT_ESTIMATOR = pathlib.Path(__file__).parents[1] / 'data' / 'estimator' / 'estimator.npz'
VARIABLE = 'NEXT3D_ESTIMATOR'
FORMAT = 'next3d-estimator-1'
SIDE = 128  # Pixels of what the regressor sees.
WIDTHS = (32, 64, 128, 256, 256)  # Channels at 64, 32, 16, 8 and 4 pixels.
SQUEEZED, HIDDEN = 64, 256
NUM_EMBEDDING = 64
POSE_NAMES = ('yaw', 'pitch', 'roll')
TRAIN = 'python dataset_preprocessing/synthetic/train_estimator.py'


class Estimate(NamedTuple):
    """expression: [N, E]. pose: [N, 3] in radians. identity: [N, D]; cosines tell how alike two are."""

    expression: torch.Tensor
    pose: torch.Tensor
    identity: torch.Tensor


class Estimator(Protocol):
    """Re-estimates what drove a picture.

    expression_names: of the E numbers. errors: its own on pictures that it was not trained on, by name. Where those
    names are a data set's, so is the truth, and `pose_of(c)` gives the true poses [N, 3] of labels.
    """

    name: str
    sha256: str
    expression_names: tuple[str, ...]
    errors: dict[str, Any]

    def __call__(self, pictures: torch.Tensor, c: torch.Tensor, v: torch.Tensor) -> Estimate:
        """Return the estimate of pictures [N, 3, R, R] uint8; camera and mesh only tell where the face is."""


class Block(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one; halves the side."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), _plain(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(3))

    def forward(self, x):
        """[N, inputs, R, R] -> [N, outputs, R/2, R/2]."""
        main = self.norms[1](self.second(relu(self.norms[0](self.first(x)))))
        return relu(main + self.norms[2](self.skip(nn.functional.avg_pool2d(x, 2))))


def _plain(channels):
    return nn.Conv2d(channels, channels, 3, 1, 1, bias=False)


class Regressor(nn.Module):
    """Pictures [N, 3, 128, 128] in [-1, 1] -> standardised expression [N, E], pose [N, 3] and an embedding [N, 64].

    The place of what is seen matters, so the last 4x4 positions are not averaged. Expression and pose have a branch of
    their own beside that of the embedding, which is trained to tell identity alone.
    """

    def __init__(self, num_expression: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in zip(WIDTHS, WIDTHS[1:])))
        self.squeeze = nn.Conv2d(WIDTHS[-1], SQUEEZED, 1)
        size = SQUEEZED * (SIDE >> len(WIDTHS)) ** 2
        self.moment = nn.Sequential(nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_expression + 3))
        self.person = nn.Sequential(nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_EMBEDDING))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return standardised expression and pose, and the embedding."""
        x = relu(self.squeeze(self.blocks(self.stem(x)))).flatten(1)
        moment = self.moment(x)
        return moment[:, :-3], moment[:, -3:], self.person(x)


class Scaling(NamedTuple):
    """What the regressor's numbers were standardised by: means and spreads [E] and [3], mean embedding [64]."""

    expression_mean: np.ndarray
    expression_std: np.ndarray
    pose_mean: np.ndarray
    pose_std: np.ndarray
    identity_mean: np.ndarray


class RegressorEstimator:
    """The estimator that `train_estimator.py` writes; an `Estimator`."""

    def __init__(self, regressor: Regressor, scaling: Scaling, about: dict[str, Any], sha256: str):
        self.regressor, self.about, self.sha256, self.name = regressor.eval(), about, sha256, about['name']
        self.expression_names, self.errors = tuple(about['expression_names']), about['errors']
        self._scaling = Scaling(*(torch.from_numpy(np.asarray(x, dtype=np.float32)) for x in scaling))

    def to(self, device: torch.device) -> 'RegressorEstimator':
        """Move to a device."""
        self.regressor.to(device)
        self._scaling = Scaling(*(x.to(device) for x in self._scaling))
        return self

    @torch.no_grad()
    @without_tf32()
    def __call__(self, pictures: torch.Tensor, _c=None, _v=None) -> Estimate:
        """Return the estimate of pictures [N, 3, R, R] uint8; camera and mesh are not looked at."""
        expression, pose, identity = self.regressor(shrunk(pictures) / 127.5 - 1)
        scaling = self._scaling
        return Estimate(
            expression * scaling.expression_std + scaling.expression_mean,
            pose * scaling.pose_std + scaling.pose_mean,
            normalize(identity - scaling.identity_mean, dim=1),
        )

    def pose_of(self, c: torch.Tensor) -> torch.Tensor:
        """Return the true pose [N, 3] of labels."""
        return pose_of_labels(c)


def shrunk(pictures: torch.Tensor) -> torch.Tensor:
    """Return pictures [N, 3, R, R] as float [N, 3, 128, 128], smoothed where they are larger."""
    if pictures.shape[-1] == SIDE:
        return pictures.float()
    return interpolate(pictures.float(), size=SIDE, mode='bilinear', antialias=True)


def pose_of_labels(c: torch.Tensor) -> torch.Tensor:
    """Return yaw, pitch and roll [N, 3] in radians of the cameras of labels [N, 25 or more], about the head.

    yaw > 0: the camera is turned to the head's +x side; pitch > 0: it looks down; roll > 0: clockwise about its axis.
    """
    rotation = split_label(c)[0][:, :3, :3]
    right, forward = rotation[..., 0], rotation[..., 2]
    yaw, pitch = torch.atan2(-forward[:, 0], -forward[:, 2]), torch.asin((-forward[:, 1]).clamp(-1, 1))
    level = torch.stack([yaw.cos(), torch.zeros_like(yaw), -yaw.sin()], dim=1)
    down = torch.linalg.cross(forward, level)
    roll = torch.atan2((right * down).sum(dim=1), (right * level).sum(dim=1))
    return torch.stack([yaw, pitch, roll], dim=1)


def save_estimator(file, regressor: Regressor, scaling: Scaling, about: dict[str, Any]) -> None:
    """Write an estimator to a binary file: an .npz of float16 weights, float32 scaling and JSON."""
    weights = {f'weight.{name}': value.detach().cpu().half().numpy() for name, value in regressor.state_dict().items()
               if not name.endswith('num_batches_tracked')}  # fmt: skip
    scales = {f'scaling.{name}': np.asarray(x, dtype=np.float32) for name, x in scaling._asdict().items()}
    np.savez_compressed(file, about=np.array(json.dumps({'format': FORMAT, **about})), **weights, **scales)


def load_estimator(path: str | os.PathLike | None = None, device: torch.device | str = 'cpu') -> RegressorEstimator:
    """Return the estimator of a file, on a device; None: of the usual place. MetricError for missing or broken ones."""
    path = pathlib.Path(path or os.environ.get(VARIABLE) or DEFAULT_ESTIMATOR).expanduser()
    if not path.is_file():
        raise MetricError(f'estimator: expected weights, found nothing at {path}; {TRAIN} writes them')
    data = path.read_bytes()
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop('about')))
        if about['format'] != FORMAT:
            raise ValueError(f'format {about["format"]!r}')
        regressor = Regressor(len(about['expression_names']))
        own = regressor.state_dict()
        missing = [name for name in own if f'weight.{name}' not in arrays and not name.endswith('num_batches_tracked')]
        if missing:
            raise KeyError(missing[0])
        regressor.load_state_dict(
            {name: torch.from_numpy(arrays[f'weight.{name}']).float() for name in own if f'weight.{name}' in arrays},
            strict=False,
        )
        scaling = Scaling(*(arrays[f'scaling.{name}'] for name in Scaling._fields))
        estimator = RegressorEstimator(regressor, scaling, about, hashlib.sha256(data).hexdigest())
    except (ValueError, KeyError, TypeError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise MetricError(f'{path}: expected an estimator of {FORMAT}, found none that can be read: {error}') from None
    return estimator.to(torch.device(device))


