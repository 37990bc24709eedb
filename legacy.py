# SPDX-License-Identifier: Apache-2.0
"""Loads network files: published EG3D and Next3D pickles and this project's own snapshots, without running them."""

import dataclasses
import os
import pickle
from typing import Any, BinaryIO

import torch
from torch import nn

import dnnlib.util
from torch_utils import restricted_pickle
from torch_utils.restricted_pickle import PickledObject, PickledTensor, one_line, plain
from training import checkpoint
from training.checkpoint import NETWORK_KEYS, SnapshotError
from training.config import DiscriminatorConfig, EG3DConfig, MappingConfig, Next3DConfig
from training.volume.render import SamplingConfig

GENERATOR_CLASS = 'TriPlaneGenerator'
DISCRIMINATOR_KINDS = {
    'Discriminator': 'single',
    'SingleDiscriminator': 'single',
    'DualDiscriminator': 'dual',
    'DualLabelDualDiscriminator': 'dual_label',
}
GENERATOR_ARGUMENTS = ('z_dim', 'c_dim', 'w_dim', 'img_resolution', 'img_channels')
DISCRIMINATOR_ARGUMENTS = ('c_dim', 'img_resolution', 'img_channels')
# What the published classes take where a file does not say.
DEFAULT_CHANNEL_BASE, DEFAULT_CHANNEL_MAX, DEFAULT_FP16_RES, DEFAULT_CLAMP = 32768, 512, 4, 256
DEFAULT_MAPPING_LAYERS = 8
DEFAULT_RENDERING_RESOLUTION = 64


class _AbsentError(SnapshotError):
    """A file holds none of the networks that were asked for."""


class NetworkFileError(ValueError):
    """A network file that cannot be used; the message names the file and the reason in one line."""


class NetworkAbsentError(NetworkFileError):
    """A network file without any of the networks that were asked for."""


def load_network_pkl(
    source: str | os.PathLike | BinaryIO, only: str | tuple[str, ...] = NETWORK_KEYS
) -> dict[str, nn.Module]:
    """Return the networks of a file: {'G_ema': ..., 'G': ..., 'D': ...}, those that are present.

    source: path, URL (Google Drive share links too; kept in a cache), or an open binary file of a published EG3D or
    Next3D pickle or of a snapshot written by this project. only: build just this one or these, to save time and memory.
    Networks come on the CPU, in float32, in eval mode and without gradients.
    Code in the file is never run: names outside an allow-list are refused. Raises NetworkFileError for files that are
    damaged, hostile or hold something else, OSError where a path cannot be read, and dnnlib.util.DownloadError.
    """
    name = getattr(source, 'name', 'network file') if hasattr(source, 'read') else os.fspath(source)
    try:
        content = _read(source)
        return _networks(content, (only,) if isinstance(only, str) else only)
    except pickle.UnpicklingError as error:
        raise NetworkFileError(f'{name}: cannot be loaded: {one_line(error)}') from error
    except SnapshotError as error:
        kind = NetworkAbsentError if isinstance(error, _AbsentError) else NetworkFileError
        raise kind(f'{name}: {one_line(error)}') from error


def _read(source):
    if hasattr(source, 'read'):
        return restricted_pickle.load(source)
    with dnnlib.util.open_url(source) as file:
        return restricted_pickle.load(file)


def _networks(content, only):
    if not isinstance(content, dict) or not any(content.get(key) is not None for key in NETWORK_KEYS):
        raise SnapshotError(f'holds no network: expected a dict with {", ".join(NETWORK_KEYS)}')
    is_own = content.get('format') == checkpoint.FORMAT
    if is_own and content.get('version') != checkpoint.VERSION:
        raise SnapshotError(f'snapshot of another version of this project: expected version {checkpoint.VERSION}')
    build = _from_snapshot if is_own else _from_published
    networks = {}
    for key in NETWORK_KEYS:
        if key in only and content.get(key) is not None:
            try:
                networks[key] = build(content[key])
            except SnapshotError as error:
                raise SnapshotError(f'{key}: {error}') from error
    if not networks:
        raise _AbsentError(f'holds none of {", ".join(only)}')
    return networks


def _from_snapshot(data) -> nn.Module:
    return checkpoint.network_from_data(plain(data))


def _from_published(pickled) -> nn.Module:
    """Build the network of a published persistent object."""
    if not isinstance(pickled, PickledObject):
        raise SnapshotError(f'expected a network, got {type(pickled).__name__}')
    try:
        tensors = _collect_tensors(pickled)
        if pickled.class_name in DISCRIMINATOR_KINDS:
            config = _discriminator_config(pickled, tensors)
        elif pickled.class_name == GENERATOR_CLASS:
            config = _generator_config(pickled, tensors)
            if isinstance(config, Next3DConfig):
                if 'uv_face_mask' not in tensors:  # A plain attribute, unless a variant registered it.
                    tensors['uv_face_mask'] = plain(pickled.state['uv_face_mask'])
        else:
            raise SnapshotError(f'class {pickled.class_name} is not a network of EG3D or Next3D that is known here')
    except SnapshotError:
        raise
    except ValueError as error:
        raise SnapshotError(f'network that is not supported: {error}') from error
    except checkpoint.DAMAGE as error:
        raise SnapshotError(f'damaged network ({type(error).__name__}: {error})') from error
    return checkpoint.build_network(config, tensors)


def _collect_tensors(pickled, prefix='', seen=None) -> dict[str, torch.Tensor]:
    """Return the state dict: parameters and persistent buffers of an object and of the modules in it."""
    seen = set() if seen is None else seen
    if id(pickled) in seen:
        raise SnapshotError(f'module {prefix}* is used twice')
    seen.add(id(pickled))
    state = pickled.state
    dropped = state.get('_non_persistent_buffers_set', ())
    tensors = {}
    for group in ('_parameters', '_buffers'):
        for name, tensor in state.get(group, {}).items():
            if tensor is None or (group == '_buffers' and name in dropped):
                continue
            if not isinstance(tensor, PickledTensor):
                raise SnapshotError(f'{prefix}{name}: expected a tensor, got {type(tensor).__name__}')
            tensors[prefix + name] = plain(tensor)
    for name, module in state.get('_modules', {}).items():
        if module is not None:
            tensors.update(_collect_tensors(module, f'{prefix}{name}.', seen))
    return tensors


def _init_arguments(pickled, names) -> dict[str, Any]:
    """Return the constructor arguments of a persistent object by name."""
    positional = dict(zip(names, pickled.state.get('_init_args', ())))
    return plain({**positional, **pickled.state['_init_kwargs']})


def _generator_config(pickled, tensors) -> EG3DConfig:
    """Translate constructor arguments and the plain attributes that win over them."""
    kwargs = _init_arguments(pickled, GENERATOR_ARGUMENTS)
    modules = pickled.state['_modules']
    rendering = _attribute(pickled, 'rendering_kwargs', kwargs.get('rendering_kwargs', {}))
    common = dict(
        z_dim=kwargs['z_dim'],
        c_dim=_label_length(tensors, 'backbone.mapping.embed.weight'),
        w_dim=kwargs['w_dim'],
        sr_num_fp16_res=kwargs.get('sr_num_fp16_res', 0),
        mapping=_mapping_config(kwargs.get('mapping_kwargs', {})),
        plane_resolution=_side_of(modules['backbone']),
        superresolution=rendering['superresolution_module'].rsplit('.', 1)[-1],
        superresolution_noise_mode=rendering.get('superresolution_noise_mode', 'none'),
        sr_antialias=rendering.get('sr_antialias', True),
        decoder_lr_mul=rendering.get('decoder_lr_mul', 1),
        neural_rendering_resolution=_attribute(pickled, 'neural_rendering_resolution', DEFAULT_RENDERING_RESOLUTION),
        sampling=_sampling_config(rendering, plain(modules['renderer'].state['plane_axes'])),
        c_scale=rendering.get('c_scale', 1),
        c_gen_conditioning_zero=rendering.get('c_gen_conditioning_zero', False),
        avg_camera_radius=rendering.get('avg_camera_radius', 2.7),
        avg_camera_pivot=tuple(rendering.get('avg_camera_pivot', (0, 0, 0.2))),
        **_width_arguments(kwargs),
    )
    if 'texture_backbone' not in modules:
        return EG3DConfig(**common)
    if not pickled.state.get('fill_mouth', True):
        raise SnapshotError('networks without mouth filling are not supported')
    mouth, blending = (_unet_arguments(modules[name]) for name in ('mouth_backbone', 'neural_blending'))
    return Next3DConfig(
        **common,
        texture_resolution=_side_of(modules['texture_backbone']),
        mouth_resolution=mouth['in_size'],
        mouth_lowest=mouth['final_size'],
        blending_lowest=blending['final_size'],
        has_unused_mappings='texture_backbone.mapping.fc0.weight' in tensors,
        orth_scale=_numbers(pickled.state.get('orth_scale', 5.0))[0],
        orth_shift=tuple(_numbers(pickled.state.get('orth_shift', (0.0, -0.01, -0.01)))),
    )


def _discriminator_config(pickled, tensors) -> DiscriminatorConfig:
    kwargs = _init_arguments(pickled, DISCRIMINATOR_ARGUMENTS)
    epilogue = kwargs.get('epilogue_kwargs', {})
    mapping = {'num_layers': DEFAULT_MAPPING_LAYERS, **kwargs.get('mapping_kwargs', {})}
    kind = DISCRIMINATOR_KINDS[pickled.class_name]
    return DiscriminatorConfig(
        kind=kind,
        c_dim=_label_length(tensors, 'mapping.embed.weight'),
        c2_dim=_label_length(tensors, 'mapping2.embed.weight'),
        img_resolution=kwargs['img_resolution'],
        img_channels=kwargs['img_channels'],
        mbstd_group_size=epilogue.get('mbstd_group_size', 4),
        mbstd_num_channels=epilogue.get('mbstd_num_channels', 1),
        disc_c_noise=_attribute(pickled, 'disc_c_noise', kwargs.get('disc_c_noise', 0)),
        mapping=_mapping_config(mapping),
        **_width_arguments(kwargs),
    )


def _width_arguments(kwargs):
    return dict(
        channel_base=kwargs.get('channel_base', DEFAULT_CHANNEL_BASE),
        channel_max=kwargs.get('channel_max', DEFAULT_CHANNEL_MAX),
        num_fp16_res=kwargs.get('num_fp16_res', DEFAULT_FP16_RES),
        conv_clamp=kwargs.get('conv_clamp', DEFAULT_CLAMP),
    )


def _mapping_config(kwargs):
    unknown = sorted(set(kwargs) - {f.name for f in dataclasses.fields(MappingConfig)})
    if unknown:
        raise SnapshotError(f'mapping option {unknown[0]!r} is not supported')
    return MappingConfig(**{'num_layers': DEFAULT_MAPPING_LAYERS, **kwargs})


def _sampling_config(rendering, plane_axes):
    if rendering.get('clamp_mode', 'softplus') != 'softplus':
        raise SnapshotError(f'clamp_mode {rendering["clamp_mode"]!r} is not supported, only softplus')
    return SamplingConfig(
        box_warp=rendering['box_warp'],
        near=rendering['ray_start'],
        far=rendering['ray_end'],
        num_depths=rendering['depth_resolution'],
        num_importance=rendering['depth_resolution_importance'],
        use_disparity=rendering.get('disparity_space_sampling', False),
        white_back=rendering.get('white_back', False),
        density_noise=rendering.get('density_noise', 0),
        plane_axes=_plane_axes(plane_axes),
    )


def _plane_axes(matrices):
    """Turn stored axes [3, 3, 3] into pairs of coordinates: plane i reads the first two of point·inverse(axes_i)."""
    if matrices.shape != (3, 3, 3):
        raise SnapshotError(f'plane_axes: expected [3, 3, 3], got {list(matrices.shape)}')
    inverse = torch.linalg.inv(matrices.float())[:, :, :2]
    if not torch.equal(inverse, (inverse == 1).float()) or (inverse.sum(dim=1) != 1).any():
        raise SnapshotError('planes that are not along the axes are not supported')
    return tuple(tuple(pair) for pair in inverse.argmax(dim=1).tolist())


def _attribute(pickled, name, default):
    return plain(pickled.state.get(name, default))


def _side_of(backbone):
    return plain(backbone.state['img_resolution'])


def _unet_arguments(backbone):
    return plain(backbone.state['_init_kwargs'])


def _label_length(tensors, name):
    return tensors[name].shape[1] if name in tensors else 0


def _numbers(value):
    """Return a stored number, list or tensor as a list of floats; float32 ones by their shortest decimal."""
    value = plain(value)
    if isinstance(value, torch.Tensor):
        return [float(str(x)) for x in value.float().flatten().numpy()]
    return [float(x) for x in (value if isinstance(value, (list, tuple)) else [value])]
