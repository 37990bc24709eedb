# SPDX-License-Identifier: Apache-2.0
"""Starts new networks from trained ones, of EG3D or of Next3D, as the published training script does.

Tensors are matched by name and taken where shapes agree; EG3D's one backbone also starts the three that Next3D adds.
"""

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn

from training.discriminator import Discriminator
from training.generator import Next3DGenerator

SOURCES = {'G': ('G', 'G_ema'), 'G_ema': ('G_ema', 'G'), 'D': ('D',)}  # In order of preference.
NEXT3D_BACKBONES = ('texture_backbone', 'mouth_backbone', 'neural_blending')  # An EG3D has none of these.
TOPOLOGY_BUFFERS = ('faces', 'raw_uvcoords', 'uvcoords', 'uvfaces', 'face_uvcoords', 'dense_faces')

NO_NETWORK = 'the file has none'
NO_TENSOR = 'no such tensor'
OTHER_SHAPE = 'other shape'
CONSTANT = 'constant filter'
OWN_TOPOLOGY = 'own topology'
NEW_CHANNELS = 'new input channels set to zero'


class Transfer(NamedTuple):
    """Where a tensor of a new network comes from.

    source: name in the network of the file; None: kept as initialised, and `note` says why. note: a reason, then
    perhaps a colon and details; for a tensor that was taken mostly empty.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    note: str = ''


def warm_start(networks: dict[str, nn.Module], source: dict[str, nn.Module]) -> dict[str, list[Transfer]]:
    """Copy weights of loaded networks into new ones; return for each new network what became of every tensor.

    networks: {'G', 'G_ema', 'D'} or some of them, changed in place, dtypes and topology kept. source: the same of a
    file (`legacy.load_network_pkl`); G and G_ema stand in for each other, a missing D leaves the new one as it is.
    A first layer of D with more input channels than the file's gets the file's, then zeros. Raises ValueError where
    no generator is in the source or none of its weights fits; then nothing has been changed.
    """
    unknown = sorted(set(networks) - set(SOURCES))
    if unknown or not networks:
        raise ValueError(f'networks: expected some of {", ".join(SOURCES)}, got {", ".join(unknown) or "none"}')
    origins = {key: next((k for k in SOURCES[key] if k in source), None) for key in networks}
    if origins.keys() - {'D'} and not source.keys() & {'G', 'G_ema'}:
        raise ValueError(f'source: expected a generator (G or G_ema), got {", ".join(source) or "no network"}')
    transfers = {
        key: _plan(network, source.get(origins[key]), '' if origins[key] == key else f'of {origins[key]}')
        for key, network in networks.items()
    }
    _check_use(networks, transfers)
    for key, network in networks.items():
        if origins[key] is not None:
            _copy(network, source[origins[key]], transfers[key])
    return transfers


def describe(transfers: dict[str, list[Transfer]], every_tensor: bool = False) -> str:
    """Return lines for people: counts per network and part of it, then each tensor kept as initialised or extended.

    every_tensor: list those that were simply taken, too.
    """
    lines = []
    for key, entries in transfers.items():
        if all(e.note == NO_NETWORK for e in entries):
            lines.append(f'{key} kept as initialised: {NO_NETWORK}')
            continue
        taken = sum(e.source is not None for e in entries)
        lines.append(f'{key}: {taken} of {len(entries)} tensors taken')
        lines += [f'  {line}' for line in _part_lines(entries)]
        listed = [e for e in entries if every_tensor or e.source is None or _reason(e) == NEW_CHANNELS]
        lines += [f'    {_tensor_line(e)}' for e in listed]
    return '\n'.join(lines)


def _plan(network, source, note):
    """Return the transfers of a network; `note` is that of tensors which are simply taken."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if source is None:
        return [Transfer(name, None, shape, NO_NETWORK) for name, shape in own.items()]
    given = {name: tuple(tensor.shape) for name, tensor in source.state_dict().items()}
    return [_transfer(name, shape, source, given, note) for name, shape in own.items()]


def _transfer(name, shape, source, given, note):
    if name in TOPOLOGY_BUFFERS:  # Another head may well have the same shapes.
        return Transfer(name, None, shape, OWN_TOPOLOGY)
    part, _, rest = name.partition('.')
    origin = name
    if part in NEXT3D_BACKBONES and not isinstance(source, Next3DGenerator):
        if name.endswith('resample_filter'):
            return Transfer(name, None, shape, CONSTANT)
        origin = f'backbone.{rest}'
    if origin not in given:
        return Transfer(name, None, shape, NO_TENSOR)
    if given[origin] == shape:
        return Transfer(name, origin, shape, note)
    if isinstance(source, Discriminator) and name.endswith('fromrgb.weight') and _has_more_inputs(shape, given[origin]):
        return Transfer(name, origin, shape, f'{NEW_CHANNELS}: {given[origin][1]} to {shape[1] - 1}')
    return Transfer(name, None, shape, f'{OTHER_SHAPE}: {list(given[origin])}')


def _has_more_inputs(shape, given):
    """Tell whether weights [out, in, ..] differ from the given ones in more inputs alone."""
    return shape[1] > given[1] and (shape[0], *shape[2:]) == (given[0], *given[2:])


def _check_use(networks, transfers):
    """Raise ValueError for generators, or where there is only a D for it, that take no weight.

    Filters, noise pictures and single numbers have the same shape in networks of any width: they do not count.
    """
    weights = {key: {n for n, p in network.named_parameters() if p.ndim > 1} for key, network in networks.items()}
    used = [key for key, entries in transfers.items() if any(e.source and e.name in weights[key] for e in entries)]
    unused = [key for key in networks if key not in used and (key != 'D' or not used)]
    if unused:
        raise ValueError(f'source: no weight has the name and shape of one in the new {" and ".join(unused)}')


def _copy(network, source, transfers):
    own, given = network.state_dict(), source.state_dict()
    with torch.no_grad():
        for transfer in transfers:
            if transfer.source is None:
                continue
            target, tensor = own[transfer.name], given[transfer.source]
            if target.shape != tensor.shape:  # New input channels, which come last.
                # The layer divides by the root of its inputs: scaled up, it begins as the function that it was.
                tensor = tensor * math.sqrt(target.shape[1] / tensor.shape[1])
                target.zero_()
                target = target[:, : tensor.shape[1]]
            target.copy_(tensor)


def _reason(transfer):
    return transfer.note.partition(':')[0]


def _part_lines(transfers):
    """Return one line for each part of a network: how many of its tensors come from which part, or were kept."""
    parts = {}
    for transfer in transfers:
        outcome = ('kept' if transfer.source is None else f'from {_part(transfer.source)}', _reason(transfer))
        parts.setdefault(_part(transfer.name), Counter())[outcome] += 1
    return [
        f'{part}: ' + ', '.join(f'{n} {what}' + (f' ({why})' if why else '') for (what, why), n in counts.items())
        for part, counts in parts.items()
    ]


def _part(name):
    return name.partition('.')[0] if '.' in name else 'buffers'


def _tensor_line(transfer):
    what = 'kept as initialised' if transfer.source is None else f'from {transfer.source}'
    return f'{transfer.name} {list(transfer.shape)} {what}' + (f': {transfer.note}' if transfer.note else '')
