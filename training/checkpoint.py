# SPDX-License-Identifier: Apache-2.0
"""Networks as plain data and back: the content of this project's snapshot files.

A snapshot is a pickle of dicts, lists, strings, numbers and bytes alone; nothing in it names a class or a function.
"""

import math
import os
import pickle
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dnnlib.util import atomic_write
from training.config import DiscriminatorConfig, EG3DConfig, Next3DConfig
from training.discriminator import Discriminator
from training.generator import EG3DGenerator, Next3DGenerator

FORMAT = 'next3d-snapshot'
VERSION = 1
NETWORK_KEYS = ('G', 'D', 'G_ema')
CONFIGS = {'EG3DGenerator': EG3DConfig, 'Next3DGenerator': Next3DConfig, 'Discriminator': DiscriminatorConfig}
# Buffers that published files may hold and no forward reads: kept when present.
OPTIONAL_BUFFERS = ('dense_faces', 'dataset_label_std')
TOPOLOGY_BUFFERS = ('faces', 'raw_uvcoords', 'uvfaces')
MAX_DIMENSIONS = 64
CONFIG_INTEGERS = -(2**15), 2**31  # Others take endless time where they become exponents or counts.
SPARE_LAYERS = 100  # A mapping may have so many layers more than a file has tensors and still be listed by name.
DTYPES = {str(t).removeprefix('torch.'): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}


# What reading damaged data raises.
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError, MemoryError)


class SnapshotError(ValueError):
    """The content of a network file does not describe a network of this project."""


class _SizeLimit(TorchFunctionMode):
    """While active, a network may not take far more memory than the tensors that it is built for."""

    FACTORIES = (torch.randn, torch.zeros, torch.full)
    SLACK, LEAST = 2**26, 2**12  # Numbers that any network may have, and those that a tensor counts for at least.

    def __init__(self, tensors):
        super().__init__()
        self.left = self.SLACK + 2 * sum(tensor.numel() for tensor in tensors.values())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.FACTORIES:
            size = args[0] if isinstance(args[0], (list, tuple)) else args
            self.left -= max(math.prod(size), self.LEAST)
            if self.left < 0:
                raise SnapshotError('config describes a network that is larger than the tensors in the file')
        return function(*args, **(kwargs or {}))


def save_snapshot(path: str | os.PathLike, networks: dict[str, nn.Module], dtype: torch.dtype | None = None) -> None:
    """Write networks {'G_ema': ..., 'G': ..., 'D': ...} (any of them) to a .pkl file, atomically.

    dtype: store floating-point tensors in it (torch.float16 halves the file); None: as they are. Raises ValueError
    for other keys, OSError where the file cannot be written; then nothing is left behind.
    """
    unknown = sorted(set(networks) - set(NETWORK_KEYS))
    if unknown or not networks:
        raise ValueError(f'networks: expected some of {", ".join(NETWORK_KEYS)}, got {", ".join(unknown) or "none"}')
    content = {'format': FORMAT, 'version': VERSION}
    content.update((key, network_to_data(network, dtype)) for key, network in networks.items())
    with atomic_write(path) as file:
        pickle.dump(content, file, protocol=4)


def network_to_data(network: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return a network as plain data: class name, config, and tensors as (dtype, shape, bytes)."""
    tensors = dict(network.state_dict())
    if isinstance(network, Next3DGenerator):
        tensors['uv_face_mask'] = network.uv_face_mask
    return {
        'class_name': type(network).__name__,
        'config': network.config.to_dict(),
        'tensors': {name: _tensor_to_data(tensor, dtype) for name, tensor in tensors.items()},
    }


def network_from_data(data: dict[str, Any]) -> nn.Module:
    """Build the network that `network_to_data` described; SnapshotError where data are damaged."""
    try:
        config = CONFIGS[data['class_name']].from_dict(data['config'])
        tensors = {_checked_name(name): _tensor_from_data(entry) for name, entry in data['tensors'].items()}
    except DAMAGE as error:
        raise SnapshotError(f'damaged network ({type(error).__name__}: {error})') from error
    return build_network(config, tensors)


def build_network(config: EG3DConfig | DiscriminatorConfig, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Return the network of a config holding the tensors, in eval mode without gradients.

    For Next3D the tensors include `uv_face_mask`. Raises SnapshotError naming every missing, extra and misshapen one,
    or for a config that no network can be built from.
    """
    tensors = dict(tensors)
    _check_plain('config', config.to_dict())
    try:
        if config.mapping.num_layers > len(tensors) + SPARE_LAYERS:
            raise SnapshotError(f'config describes {config.mapping.num_layers} layers, the file holds fewer tensors')
        with _SizeLimit(tensors):
            network = _new_network(config, tensors)
    except SnapshotError:
        raise
    except DAMAGE as error:
        raise SnapshotError(f'config that describes no network ({type(error).__name__}: {error})') from error
    for name in OPTIONAL_BUFFERS:
        if name in tensors:
            network.register_buffer(name, torch.empty_like(tensors[name]))
    load_tensors(network, tensors)
    return network.eval().requires_grad_(False)


def load_tensors(network: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors into a network by name; SnapshotError lists what is missing, extra or of another shape."""
    own = network.state_dict()
    shapes = [
        f'{name} (expected {list(own[name].shape)}, got {list(tensors[name].shape)})'
        for name in own
        if name in tensors and own[name].shape != tensors[name].shape
    ]
    faults = {
        'missing': [name for name in own if name not in tensors],
        'not expected': [name for name in tensors if name not in own],
        'of another shape': shapes,
    }
    found = [f'{kind}: {", ".join(names)}' for kind, names in faults.items() if names]
    if found:
        raise SnapshotError(f'tensors of {type(network).__name__} do not fit; {"; ".join(found)}')
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _check_plain(name, value):
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_plain(f'{name}.{key}', entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_plain(name, entry)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise SnapshotError(f'{name}: expected plain numbers and strings, got {type(value).__name__}')
    elif isinstance(value, int) and not CONFIG_INTEGERS[0] <= value <= CONFIG_INTEGERS[1]:
        raise SnapshotError(f'{name}: expected a number from {CONFIG_INTEGERS[0]} to {CONFIG_INTEGERS[1]}')


def _new_network(config, tensors):
    if isinstance(config, Next3DConfig):
        return _next3d_from_buffers(config, tensors)
    return EG3DGenerator(config) if isinstance(config, EG3DConfig) else Discriminator(config)


def _next3d_from_buffers(config, tensors):
    missing = [name for name in (*TOPOLOGY_BUFFERS, 'uv_face_mask') if name not in tensors]
    if missing:
        raise SnapshotError(f'tensors of Next3DGenerator do not fit; missing: {", ".join(missing)}')
    faces, uvs, uv_faces, mask = (tensors[name] for name in (*TOPOLOGY_BUFFERS, 'uv_face_mask'))
    del tensors['uv_face_mask']
    mask = mask[:, :1] if mask.ndim == 4 else mask  # The first channel of the mask picture.
    are_corners = all(x.ndim == 3 and x.shape[-1] == 3 and not x.is_floating_point() for x in (faces, uv_faces))
    if not are_corners or faces.shape != uv_faces.shape or uvs.shape[-1] != 2 or mask.shape[:2] != (1, 1):
        raise SnapshotError('mesh topology of Next3DGenerator does not fit')
    if min(faces.min(), uv_faces.min()) < 0 or uv_faces.max() >= uvs.shape[1]:
        raise SnapshotError('mesh topology of Next3DGenerator: a face refers to a corner that does not exist')
    return Next3DGenerator(config, faces[0], uvs[0].float(), uv_faces[0], mask)


def _tensor_to_data(tensor, dtype):
    tensor = tensor.detach().cpu().contiguous()
    if dtype is not None and tensor.is_floating_point():
        if tensor.numel() and tensor.abs().max() > torch.finfo(dtype).max:
            raise ValueError(f'dtype: expected one that holds all weights, got {dtype} for {tensor.abs().max():g}')
        tensor = tensor.to(dtype)
    name = str(tensor.dtype).removeprefix('torch.')
    if name not in DTYPES:
        raise ValueError(f'tensor of type {name}: expected one of {", ".join(DTYPES)}')
    return name, list(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b''


def _checked_name(name):
    if not isinstance(name, str):
        raise TypeError(f'name of a tensor: expected a string, got {type(name).__name__}')
    return name


def _tensor_from_data(entry):
    name, shape, data = entry
    dtype = DTYPES[name]
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or not 0 <= n < 2**63 for n in shape):
        raise ValueError('tensor of a shape that cannot be')
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'tensor of shape {shape} with other data')
    flat = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    return flat.view(dtype).reshape(shape)
