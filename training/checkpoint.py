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
DTYPES = {str(t).removeprefix('torch.'): t for t in (torch.float32, torch.float16, torch.bfloat16, torch.int64)}


class SnapshotError(ValueError):
    """The content of a network file does not describe a network of this project."""


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
        tensors = {name: _tensor_from_data(entry) for name, entry in data['tensors'].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f'damaged network ({type(error).__name__}: {error})') from error
    return build_network(config, tensors)


def build_network(config: EG3DConfig | DiscriminatorConfig, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Return the network of a config holding the tensors, in eval mode without gradients.

    For Next3D the tensors include `uv_face_mask`. Raises SnapshotError naming every missing, extra and misshapen one.
    """
    tensors = dict(tensors)
    if isinstance(config, Next3DConfig):
        network = _next3d_from_buffers(config, tensors)
    else:
        network = EG3DGenerator(config) if isinstance(config, EG3DConfig) else Discriminator(config)
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


def _next3d_from_buffers(config, tensors):
    missing = [name for name in (*TOPOLOGY_BUFFERS, 'uv_face_mask') if name not in tensors]
    if missing:
        raise SnapshotError(f'tensors of Next3DGenerator do not fit; missing: {", ".join(missing)}')
    faces, uvs, uv_faces = (tensors[name][0] for name in TOPOLOGY_BUFFERS)
    mask = tensors.pop('uv_face_mask').float()
    if mask.ndim != 4 or faces.shape != uv_faces.shape or faces.shape[-1] != 3 or uvs.shape[-1] != 2:
        raise SnapshotError('mesh topology of Next3DGenerator does not fit')
    if min(faces.min(), uv_faces.min()) < 0 or uv_faces.max() >= len(uvs):
        raise SnapshotError('mesh topology of Next3DGenerator: a face refers to a corner that does not exist')
    return Next3DGenerator(config, faces, uvs, uv_faces, mask)


def _tensor_to_data(tensor, dtype):
    tensor = tensor.detach().cpu().contiguous()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    name = str(tensor.dtype).removeprefix('torch.')
    if name not in DTYPES:
        raise ValueError(f'tensor of type {name}: expected one of {", ".join(DTYPES)}')
    return name, list(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b''


def _tensor_from_data(entry):
    name, shape, data = entry
    dtype = DTYPES[name]
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f'tensor of shape {shape} with {len(data)} bytes')
    flat = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
    return flat.view(dtype).reshape(shape)
