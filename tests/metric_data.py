# SPDX-License-Identifier: Apache-2.0
"""What tests of metrics measure: drawn people, stand-ins for networks and estimators whose numbers are known."""

import dataclasses
import hashlib
import json

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

import measure
from geometry.cameras import local_rays, split_label
from geometry.head_model import load_embedded_head
from metrics import registry
from metrics.estimator import Estimate, pose_of_labels
from metrics.features import FeatureNetwork
from metrics.subject import Drawn
from torch_utils.distributed import joined
from training.dataset import open_source
from training.mesh_render import MeshRenderer

FAR = 3.3


def tiny_network(num_features=12):
    """Return a feature network: colours and contrast of a few fields of the picture, mixed."""
    mix = torch.randn(2 * 3 * 16, num_features, generator=torch.Generator().manual_seed(0))

    def look(pictures):
        x = pictures.float() / 255
        detail = (x[..., 1:] - x[..., :-1]).abs()
        return torch.cat([adaptive_avg_pool2d(each, 4).flatten(1) for each in (x, 4 * detail)], dim=1) @ mix

    return FeatureNetwork('tiny', 'f' * 64, num_features, look)


def measure_in_a_rank(people, out):
    """Measure distributions of a data set against itself in one of several processes; the first writes them."""
    with joined('cpu', 60) as ranks:
        subject = measure.make_subject(None, open_source(people, None), ranks, seed=3, num=12, batch=4)
        subject = dataclasses.replace(subject, network=lambda name: tiny_network())
        lines = list(registry.measure(['kid5k', 'fid5k', 'pr5k'], subject))
        if ranks.is_first:
            out.write_text(json.dumps([line['results'] for line in lines]))


class PictureReader:
    """An estimator that knows the data set's pictures by heart, and says the mean of what it knows of others.

    Between a known picture and noise it goes by how much of the picture is left, so that errors grow with corruption.
    """

    name, sha256, errors = 'reader', '0' * 64, {}

    def __init__(self, dataset, truth, error=0.0):
        self.expression_names, self.error = truth.expression_names, error
        self.pictures = torch.from_numpy(np.stack([dataset[i].image for i in range(len(dataset))])).float()
        self.expression = torch.from_numpy(truth.expression)
        self.pose = pose_of_labels(torch.from_numpy(np.stack([dataset[i].label for i in range(len(dataset))])))

    def __call__(self, pictures, c=None, v=None):
        difference = (pictures.float()[:, None] - self.pictures[None]).abs().mean(dim=(2, 3, 4))
        best = difference.argmin(dim=1)
        share = (difference.min(dim=1).values / 64).clamp(max=1)[:, None]
        expression = self.expression[best].lerp(self.expression.mean(dim=0).expand(len(best), -1), share) + self.error
        return Estimate(expression, self.pose[best] * (1 - share), normalize(pictures.float().mean(dim=(2, 3)), dim=1))

    def pose_of(self, c):
        return pose_of_labels(c)


class MeshDrawer:
    """Draws the driving mesh itself, coloured by the place on the neutral head: perfect depth, views and animation."""

    z_dim = 4

    def __init__(self, resolution):
        self.head = load_embedded_head()
        neutral = self.head.mean.view(-1, 3)
        self.colours = (neutral - neutral.amin(dim=0)) / (neutral.amax(dim=0) - neutral.amin(dim=0))
        self.renderer = head_renderer(resolution)

    def __call__(self, request):
        view = self.renderer.look(request.v, request.c)
        painted = self.renderer.paint(view, self.colours.expand(len(request.v), -1, -1))
        rays = local_rays(split_label(request.c)[1], self.renderer.resolution).norm(dim=-1).view_as(view.depth)
        depth = torch.where(view.face >= 0, view.depth * rays, FAR)
        return Drawn((painted.clamp(0, 1) * 255).to(torch.uint8), depth)


class Corrupted:
    """Another drawer's pictures and depths, spoiled by an amount from 0 to 1; noise depends on the picture alone."""

    def __init__(self, drawer, amount):
        self.drawer, self.amount, self.z_dim = drawer, amount, drawer.z_dim

    def __call__(self, request):
        drawn = self.drawer(request)
        pictures, depths = [], []
        for i, picture in enumerate(drawn.picture):
            seed = int.from_bytes(hashlib.sha256(picture.numpy().tobytes()).digest()[:4], 'big')
            random = torch.Generator().manual_seed(seed)
            noise = torch.rand(picture.shape, generator=random) * 255
            pictures.append(picture.float().lerp(noise, self.amount).to(torch.uint8))
            if drawn.depth is not None:
                noise = torch.randn(drawn.depth[i].shape, generator=random)
                depths.append(drawn.depth[i] + 0.1 * self.amount * (noise + 1))
        return Drawn(torch.stack(pictures), torch.stack(depths) if depths else None)


def head_renderer(resolution):
    """Return a renderer of the embedded head."""
    head = load_embedded_head()
    return MeshRenderer(head.faces, torch.ones(len(head.faces), 3, 3), resolution=resolution)
