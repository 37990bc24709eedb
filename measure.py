# SPDX-License-Identifier: Apache-2.0
"""What metrics are given, made of this project's networks, data sets and estimators; calc_metrics.py and training."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dnnlib.util import cache_root, open_url
from geometry.head_model import load_embedded_head
from geometry.meshes import NUM_LANDMARKS
from geometry.paths import fixed_path, path_labels
from metrics import avatar, distribution, estimator, features, registry
from metrics.subject import Drawn, MetricError, Request, Subject, Truth
from torch_utils.distributed import Ranks
from training import evaluation
from training.config import Next3DConfig
from training.dataset import HeadDataset, PackedSource, Source
from training.driving import COEFFICIENTS_FILE
from training.generator import Next3DGenerator
from training.mesh_render import MeshRenderer
from training.pictures import to_bytes

DECA = 'deca'
TRAINING_BATCH = 4  # Pictures at a time beside a run's own memory.


class Files(NamedTuple):
    """Files of weights that users name; None: the usual places. estimator: a file, or 'deca' for DECA's."""

    inception: str | None = None
    mobilenet: str | None = None
    estimator: str | None = None
    deca: str | None = None


class NetworkDrawer:
    """A generator as a `metrics.subject.Drawer`: constant noise, centred samples.

    resolution: side of the raw pictures, None: the network's.
    """

    def __init__(self, generator: Next3DGenerator, resolution: int | None = None):
        self.generator, self.z_dim, self.resolution = generator, generator.z_dim, resolution

    @torch.no_grad()
    def __call__(self, request: Request) -> Drawn:
        """Return the pictures of a request."""
        ws = self.generator.mapping(request.z, request.conditioning)
        out = self.generator.synthesis(ws, request.c, request.v, 'const', self.resolution)
        return Drawn(to_bytes(out['image']).movedim(-1, -3), out['image_depth'][:, 0])


class RealDrawer:
    """Shows the data set's own pictures: distances are then those of two halves, errors the estimator's own."""

    z_dim = 1

    def __init__(self, dataset: HeadDataset, device: torch.device):
        self.dataset, self.device = dataset, device

    def __call__(self, request: Request) -> Drawn:
        """Return the pictures of the request's items."""
        pictures = np.stack([self.dataset[int(item)].image for item in request.items])
        return Drawn(torch.from_numpy(pictures).to(self.device), None)


def make_subject(
    generator: Next3DGenerator | None, source: Source, ranks: Ranks, files: Files = Files(), **settings
) -> Subject:
    """Return what metrics of a generator against a data set are given; None for the data set against itself.

    settings: fields of Subject. Raises DatasetError where pictures or meshes are not those that the network draws, and
    MetricError where coefficients.npz is there but broken.
    """
    limits = (None, None) if generator is None else (generator.num_vertices, generator.img_resolution)
    dataset = HeadDataset(source, *limits)
    dataset[0]  # Of another size or topology: told before anything is drawn.
    truth = read_truth(source)
    head = _head(dataset.num_vertices, truth)
    drawer = RealDrawer(dataset, ranks.device) if generator is None else NetworkDrawer(generator)
    return Subject(
        drawer=drawer,
        dataset=dataset,
        ranks=ranks,
        network=functools.cache(lambda name: features.load_network(name, getattr(files, name), ranks.device)),
        estimator=functools.cache(lambda: load_estimator(files, ranks.device)),
        renderer=None if generator is None else functools.cache(lambda resolution: MeshRenderer(
            generator.faces[0], generator.face_uvcoords[0], resolution=resolution)),
        truth=truth,
        head=None if head is None else head.to(ranks.device),
        conditioning=_frontal_label(Next3DConfig() if generator is None else generator.config),
        content=functools.partial(content_digest, source),
        **settings,
    )  # fmt: skip


def _frontal_label(config):
    label = path_labels(fixed_path(1), config.avg_camera_pivot, config.avg_camera_radius)
    return label.numpy()


def load_estimator(files: Files, device: torch.device):
    """Return the estimator that files name; MetricError where there is none."""
    if files.estimator != DECA:
        return estimator.load_estimator(files.estimator, device)
    # Here: what reads photographs takes a second to import, which no run of training should wait for.
    from dataset_preprocessing.ffhq.deca_estimator import load_deca
    from dataset_preprocessing.ffhq.files import PreprocessError

    try:
        return load_deca(files.deca, device)
    except PreprocessError as error:
        raise MetricError(str(error)) from error


def _head(num_vertices, truth):
    """Return the embedded head where it is that of the data set's coefficients."""
    if truth is None:
        return None
    head = load_embedded_head()
    fits = truth.identity.shape[1] == head.num_identity and truth.expression_names == head.expression_names
    return head if fits and len(head.mean) == num_vertices else None


def read_truth(source: Source) -> Truth | None:
    """Return the coefficients beside a data set, by its items; None where there are none, or fits of FLAME."""
    folder = source.path if isinstance(source, PackedSource) else pathlib.Path(source.images.path).expanduser().parent
    path = pathlib.Path(folder) / COEFFICIENTS_FILE
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            if 'exp' in file.files:  # FLAME's, for driving: fitted, not known.
                return None
            rows = {name: i for i, name in enumerate(file['names'].tolist())}
            order = [rows[name] for name in source.names]
            names = tuple(file['expression_names'].tolist())
            truth = Truth(file['identity'][order], file['expression'][order], names)
        if truth.identity.ndim != 2 or truth.expression.shape != (len(order), len(names)):
            found = f'{list(truth.identity.shape)} and {list(truth.expression.shape)}'
            raise ValueError(f'identity [N, I] and expression [N, {len(names)}], as many as names, not {found}')
        return truth
    except (ValueError, KeyError, OSError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise MetricError(f'{path}: expected coefficients of the data set, found others: {error}') from None


def content_digest(source: Source, items: Sequence[int]) -> str:
    """Return a hash of the content of items' pictures."""
    names = [source.names[int(i)] for i in items]
    if isinstance(source, PackedSource):  # An archive tells the checksum of each picture.
        with zipfile.ZipFile(source.images.path) as archive:
            entries = [archive.getinfo(name) for name in names]
        content = [[entry.filename, entry.CRC, entry.file_size] for entry in entries]
        return hashlib.sha256(json.dumps([source.manifest['sha256'], content]).encode()).hexdigest()
    digest = hashlib.sha256()
    for name in names:
        digest.update(hashlib.sha256(source.images.read(name)).digest())
    return digest.hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file or URL."""
    with open_url(path) as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def feature_cache(folder: str | None = None) -> pathlib.Path:
    """Return where features of real pictures are kept: below the given folder or the project's cache."""
    return cache_root(folder) / 'features'


def expect_files(names: Sequence[str], files: Files = Files()) -> None:
    """Raise MetricError for unknown metrics, and for the first file or package that one lacks or that is another."""
    registry.expect_names(list(names))
    if any(name.startswith(('fid', 'kid')) for name in names):
        distribution.torchmetrics_classes()
    for need in dict.fromkeys(registry.METRICS[name].needs for name in names):
        if need == 'estimator':
            load_estimator(files, torch.device('cpu'))
        elif need is not None:
            features.load_network(need, getattr(files, need), torch.device('cpu'))


def expect_data(requests: Sequence[tuple[str, int | None]], source: Source, of_reals: bool = False) -> None:
    """Raise MetricError where a data set cannot serve metrics, each with a number of pictures (None: its own).

    Nothing is drawn for one metric before another is found to be impossible, and no run ends at its first snapshot.
    of_reals: the data set's pictures are measured themselves.
    """
    for name, num in requests:
        registry.expect_items(name, num, len(source.names), of_reals)
    truth = read_truth(source)
    if any(name == 'animation' for name, _ in requests):
        avatar.expect_truth(truth, _head(source.mesh(0).shape[0] - NUM_LANDMARKS, truth))


def _evaluate(name: str, given: evaluation.Evaluation) -> dict[str, Any]:
    """Measure one metric of a run's averaged generator; the metric of `training.evaluation`."""
    of_run = given.generator, given.dataset.source, given.ranks
    try:
        subject = _subject_of_snapshot(*of_run, given.nimg, given.rendering_resolution, given.num)
        line = next(registry.measure([name], subject))
    except MetricError as error:
        raise evaluation.EvaluationError(str(error)) from error
    sha256 = given.ranks.first_alone(lambda: _digest_if_there(given.snapshot))
    about = {'snapshot_sha256': sha256, 'rendering_resolution': given.rendering_resolution}
    return {**line.pop('results'), 'about': {**line, **about}}


@functools.lru_cache(maxsize=1)  # Features of many pictures are not kept beyond the next snapshot's.
def _subject_of_snapshot(generator, source, ranks, nimg, resolution, num):
    """Metrics of one snapshot share pictures and features; the same weights are others at another nimg."""
    del nimg
    drawer = NetworkDrawer(generator, resolution)
    return dataclasses.replace(_subject_of_run(generator, source, ranks), drawer=drawer, num=num)


@functools.lru_cache(maxsize=1)
def _subject_of_run(generator, source, ranks):
    """Feature networks and estimators stay loaded from snapshot to snapshot."""
    return make_subject(generator, source, ranks, batch=TRAINING_BATCH, cache=feature_cache())


def _digest_if_there(path):
    return file_digest(path) if path is not None and path.exists() else None


def register() -> None:
    """Make all metrics known to training."""
    for name in registry.METRICS:
        evaluation.register(name)(functools.partial(_evaluate, name))
