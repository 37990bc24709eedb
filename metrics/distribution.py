# SPDX-License-Identifier: Apache-2.0
"""FID, KID, precision and recall of two sets of pictures, from features, with torchmetrics' arithmetic."""

import hashlib
import importlib.util
import json
import os
import warnings

import numpy as np
import torch
from torch import nn

from dnnlib.util import atomic_write
from metrics.features import FeatureNetwork
from metrics.subject import MetricError, Request, Subject

FID_GROUPS = 8  # Of generated pictures: each is left out once for the standard error.
KID_SUBSETS, KID_SUBSET_SIZE, LEAST_KID_SUBSET = 100, 1000, 2
NEIGHBOUR = 3  # Precision and recall: the radius of a picture is the distance to its third neighbour.
ROWS = 4096  # Of distances at a time.
ALONE = {'sync_on_compute': False}  # One process has all features and computes: the others take no part.
CACHE_VERSION = 2


class _Passed(nn.Module):
    """Stands for a network where features are there already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def has_torchmetrics() -> bool:
    """Tell whether FID and KID can be measured here."""
    return importlib.util.find_spec('torchmetrics') is not None


def torchmetrics_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """Return torchmetrics' classes of FID and KID; MetricError where it is not installed."""
    try:
        warnings.filterwarnings('ignore', 'Metric `Kernel Inception Distance` will save', UserWarning)
        from torchmetrics.image import fid, kid  # Optional: the other metrics go without.
    except ModuleNotFoundError:
        raise MetricError('FID and KID: expected torchmetrics; pip install -r requirements-metrics.txt') from None
    return fid.FrechetInceptionDistance, kid.KernelInceptionDistance


def frechet_distance(reals: torch.Tensor, fakes: torch.Tensor) -> tuple[float, float]:
    """Return the Fréchet distance of features [N, D] and [M, D] (Heusel et al. 2017) and its standard error.

    The error is that of the generated pictures alone: a jackknife that leaves out one of eight groups at a time.
    """
    def distance(part):
        metric = torchmetrics_classes()[0](feature=_Passed(reals.shape[1]), **ALONE).to(reals.device)
        metric.update(reals.double(), real=True)
        metric.update(part.double(), real=False)
        return float(metric.compute())

    if min(len(reals), len(fakes)) < 2:
        raise MetricError(f'FID: expected at least 2 pictures of each kind, found {len(reals)} and {len(fakes)}')
    groups = min(FID_GROUPS, len(fakes) // 2)
    numbers = torch.arange(len(fakes), device=fakes.device) % max(groups, 1)
    parts = [distance(fakes[numbers != group]) for group in range(groups)] if groups > 1 else []
    error = float(np.sqrt((groups - 1) / groups * np.sum((np.array(parts) - np.mean(parts)) ** 2))) if parts else np.nan
    return distance(fakes), error


def kernel_distance(reals: torch.Tensor, fakes: torch.Tensor, seed: int) -> tuple[float, float]:
    """Return the kernel distance of features (Binkowski et al. 2018: polynomial of degree 3, unbiased) and its error.

    Means over 100 random subsets of 1000 (a fourth of the pictures where they are fewer). The standard error takes
    subsets that do not overlap as independent: their spread over the root of how many of them there are.
    """
    count = min(len(reals), len(fakes))
    size = min(KID_SUBSET_SIZE, count // 4)
    if size < LEAST_KID_SUBSET:
        raise MetricError(f'KID: expected at least 8 pictures of each kind, found {count}')
    sizes = {'subsets': KID_SUBSETS, 'subset_size': size}
    metric = torchmetrics_classes()[1](feature=_Passed(reals.shape[1]), **sizes, **ALONE).to(reals.device)
    metric.update(reals.double(), real=True)
    metric.update(fakes.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return float(mean), float(spread) * (size / count) ** 0.5


def precision_recall(reals: torch.Tensor, fakes: torch.Tensor) -> dict[str, float]:
    """Return precision and recall of features (Kynkäänniemi et al. 2019) with their binomial standard errors.

    Precision: share of fakes within the radius of a real one, its distance to its third real neighbour; recall: the
    same with the roles exchanged.
    """
    if min(len(reals), len(fakes)) <= NEIGHBOUR:
        raise MetricError(f'precision: expected more than {NEIGHBOUR} pictures, found {min(len(reals), len(fakes))}')
    result = {}
    for name, centres, points in (('precision', reals, fakes), ('recall', fakes, reals)):
        share = _share_within(centres.double(), points.double())
        result |= {name: share, f'{name}_se': (share * (1 - share) / len(points)) ** 0.5}
    return result


def _share_within(centres, points):
    """Return the share of points [M, D] that lie within the radius of one of the centres [N, D]."""
    radii = torch.cat([_distances(part, centres).kthvalue(NEIGHBOUR + 1, dim=1).values for part in centres.split(ROWS)])
    inside = [(_distances(part, centres) <= radii).any(dim=1) for part in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a, b):
    # Not by products of matrices: those round the distance of equal pictures to something above 0.
    return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')


def real_features(subject: Subject, network: FeatureNetwork, count: int) -> torch.Tensor:
    """Return features [count, D] of the first `count` pictures in the seed's order, from the cache where they are."""
    items = subject.items(range(count))
    path = subject.ranks.first_alone(lambda: _cache_file(subject, network, items))
    cached = subject.ranks.first_alone(lambda: path is not None and _is_whole(path, count, network))
    if cached:
        features = torch.zeros([count, network.num_features], device=subject.ranks.device)
        if subject.ranks.is_first:
            features += torch.from_numpy(np.load(path, allow_pickle=False)).to(features)
        subject.ranks.sum_(features, 'the sharing of features')
        return features

    def work(numbers):
        return network.module(subject.pictures(items[numbers.start : numbers.stop]))

    features = subject.rows(count, network.num_features, work, 'features of real pictures')
    if path is not None:
        subject.ranks.first_alone(lambda: _store(path, features))
    return features


def _cache_file(subject, network, items):
    """Return where features of items are kept: a name by the content of pictures and network."""
    if subject.cache is None or subject.content is None:
        return None
    key = [CACHE_VERSION, network.name, network.sha256, items, subject.content(items)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return os.fspath(subject.cache / f'{network.name}-{digest[:32]}.npy')


def _is_whole(path, count, network):
    try:
        return np.load(path, mmap_mode='r', allow_pickle=False).shape == (count, network.num_features)
    except (OSError, ValueError):
        return False


def _store(path, features):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        np.save(file, features.cpu().numpy())


def fake_features(subject: Subject, network: FeatureNetwork, count: int) -> torch.Tensor:
    """Return features [count, D] of generated pictures: each a latent of its own, camera and mesh of one item.

    Items follow, in the seed's order, those of `real_features`, and begin anew where there are no more.
    """

    def work(numbers):
        items = subject.items(count + i for i in numbers)
        c, v = subject.cameras_and_meshes(items)
        return network.module(subject.drawer(Request(subject.latents(numbers), c, c, v, items)).picture)

    return subject.rows(count, network.num_features, work, 'features of generated pictures')


def measure(subject: Subject, kind: str, features: str, count: int) -> tuple[dict[str, float], dict]:
    """Return the values of 'fid', 'kid' or 'pr' with `count` pictures of each kind, and what they were made with."""
    count = subject.num or count
    network = subject.network(features)
    key = features, count
    if key not in subject.memo:
        subject.memo[key] = real_features(subject, network, count), fake_features(subject, network, count)
    reals, fakes = subject.memo[key]
    shared = max(0, 2 * count - len(subject.dataset))  # Items whose picture is compared with one of their own camera.
    about = {'feature_network': network.name, 'feature_sha256': network.sha256, 'num_real': count, 'num_fake': count,
             'num_shared': min(shared, count)}  # fmt: skip
    values = subject.ranks.first_alone(lambda: _values(kind, reals, fakes, subject.seed))
    return values, about


def _values(kind, reals, fakes, seed):
    if kind == 'pr':
        return precision_recall(reals, fakes)
    if kind == 'fid':  # On the CPU: eigenvalues are found there on most machines anyway.
        distance, error = frechet_distance(reals.cpu(), fakes.cpu())
    else:
        distance, error = kernel_distance(reals, fakes, seed)
    return {kind: distance, f'{kind}_se': error}
