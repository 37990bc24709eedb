# SPDX-License-Identifier: Apache-2.0
"""Published pickles, built by hand, through legacy.load_network_pkl: translation, refusals, damage, sources."""

import dataclasses
import functools
import http.server
import io
import pickle
import random
import struct
import threading

import numpy as np
import pytest
import torch
from test_checkpoint import SMALL, assert_same, discriminator, eg3d, load, next3d, refused, with_itself
from test_checkpoint import laughs as doubled_lists
from test_restricted_pickle import Call, Name, Raw, module_object, numpy_dtype, persistent, tensor, write
from torch import nn

import legacy
from dnnlib.util import DownloadError
from legacy import NetworkFileError
from training.checkpoint import save_snapshot
from training.config import EG3DConfig, MappingConfig, Next3DConfig
from training.discriminator import Discriminator
from training.volume.render import SamplingConfig

# --- published files, from this project's networks -------------------------------------------------------------------

SAMPLING = SamplingConfig(box_warp=0.7, near=0.25, far=1.5, num_depths=9, num_importance=7, white_back=True)
EG3D = EG3DConfig(**SMALL, sampling=dataclasses.replace(SAMPLING, plane_axes=((0, 1), (0, 2), (2, 0))))
NEXT3D = Next3DConfig(
    **{**SMALL, 'plane_resolution': 16},
    sampling=SAMPLING,
    texture_resolution=8,
    mouth_resolution=16,
    mouth_lowest=8,
    blending_lowest=4,
)
PLANE_AXES = {  # Matrices whose inverse's first two columns pick the coordinates of each plane.
    kind: [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1], [0, 1, 0]], last]
    for kind, last in (
        (Next3DConfig, [[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        (EG3DConfig, [[0, 0, 1], [1, 0, 0], [0, 1, 0]]),
    )
}


def rendering_of(config, package='training', **more):
    """Return rendering_kwargs as published files hold them."""
    sampling = config.sampling
    return {
        'image_resolution': 128,
        'disparity_space_sampling': sampling.use_disparity,
        'clamp_mode': 'softplus',
        'superresolution_module': f'{package}.superresolution.{config.superresolution}',
        'c_gen_conditioning_zero': config.c_gen_conditioning_zero,
        'c_scale': config.c_scale,
        'superresolution_noise_mode': config.superresolution_noise_mode,
        'density_reg': 0.25,
        'decoder_lr_mul': config.decoder_lr_mul,
        'sr_antialias': config.sr_antialias,
        'depth_resolution': sampling.num_depths,
        'depth_resolution_importance': sampling.num_importance,
        'ray_start': sampling.near,
        'ray_end': sampling.far,
        'box_warp': sampling.box_warp,
        'white_back': sampling.white_back,
        'avg_camera_radius': config.avg_camera_radius,
        'avg_camera_pivot': list(config.avg_camera_pivot),
        **more,
    }


def easy_dict(entries):
    """Return the dict with attribute access of published files."""
    return Call(Name('dnnlib.util', 'EasyDict'), opcode=pickle.NEWOBJ, items=entries)


PLAIN_CLASSES = {'decoder': 'OSGDecoder', 'renderer': 'ImportanceRenderer', 'ray_sampler': 'RaySampler'}


def state_of(module, package='training', **attributes):
    """Return a module's state as published files hold it, with the objects of its sub-modules."""
    children = {name: object_of(child, package, name) for name, child in module._modules.items()}
    return {
        'training': False,
        '_parameters': dict(module._parameters),
        '_buffers': dict(module._buffers),
        '_non_persistent_buffers_set': set(module._non_persistent_buffers_set),
        '_forward_hooks': Call(Name('collections', 'OrderedDict')),
        '_modules': children,
        **attributes,
    }


def object_of(module, package, name):
    """Return a sub-module as published files hold it: torch's by class, the decoder by class, others persistent."""
    state = state_of(module, package)
    if name in PLAIN_CLASSES:
        return module_object(f'{package}.triplane', PLAIN_CLASSES[name], state)
    if type(module).__module__.startswith('torch.'):
        return module_object(type(module).__module__, type(module).__name__, state)
    synthesis = getattr(module, 'synthesis', None)
    unet = {n: getattr(synthesis, n) for n in ('in_size', 'final_size', 'num_cond_res') if hasattr(synthesis, n)}
    state.update(_init_args=(), _init_kwargs={**unet, 'img_channels': 32})
    state.update({'img_resolution': synthesis.img_resolution} if synthesis else {})
    return persistent(type(module).__name__, state)


def generator_object(network, package='training', class_name='TriPlaneGenerator', **attributes):
    """Return a generator as published files hold it; attributes replace those of its state."""
    config = network.config
    is_next3d = isinstance(config, Next3DConfig)
    kwargs = {
        'z_dim': config.z_dim,
        'w_dim': config.w_dim,
        'c_dim': 25,
        'img_resolution': config.img_resolution,
        'img_channels': 3,
        'mapping_kwargs': dict(vars(config.mapping)),
        'channel_base': config.channel_base,
        'channel_max': config.channel_max,
        'fused_modconv_default': 'inference_only',
        'rendering_kwargs': rendering_of(config, package),
        'num_fp16_res': config.num_fp16_res,
        'sr_num_fp16_res': config.sr_num_fp16_res,
        'sr_kwargs': {'channel_base': 32768, 'channel_max': 512},
        'conv_clamp': None,
    }
    axes = torch.tensor(PLANE_AXES[type(config)], dtype=torch.float32)
    renderer = {'_parameters': {}, '_buffers': {}, '_modules': {}, 'plane_axes': axes}
    state = state_of(network, package, _init_args=(), _init_kwargs=kwargs)
    path = f'{package}.volumetric_rendering.renderer'
    state['_modules'].update(renderer=module_object(path, 'ImportanceRenderer', renderer), unused=None)
    state.update(rendering_kwargs=easy_dict(rendering_of(config, package)))
    state.update(neural_rendering_resolution=config.neural_rendering_resolution)
    if is_next3d:
        shift = torch.tensor([config.orth_shift])
        state.update(uv_face_mask=network.uv_face_mask, fill_mouth=True, orth_scale=torch.tensor([[config.orth_scale]]))
        state.update(orth_shift=shift, topology_path='no/such/file.obj')
        state['_buffers'].pop('uv_face_mask')
    state.update(attributes)
    return persistent(class_name, state)


DISCRIMINATOR_CLASSES = {'single': 'SingleDiscriminator', 'dual': 'DualDiscriminator', 'no label': 'DualDiscriminator'}
DISCRIMINATOR_CLASSES.update(dual_label='DualLabelDualDiscriminator')


def discriminator_object(network, class_name='DualDiscriminator', **attributes):
    """Return a discriminator as published files hold it; attributes replace those of its state."""
    config = network.config
    kwargs = {
        'c_dim': config.c_dim + config.c2_dim,
        'img_resolution': config.img_resolution,
        'img_channels': config.img_channels,
        'channel_base': config.channel_base,
        'channel_max': config.channel_max,
        'block_kwargs': {'freeze_layers': 0},
        'mapping_kwargs': {} if config.mapping.num_layers == 8 else {'num_layers': config.mapping.num_layers},
        'epilogue_kwargs': {'mbstd_group_size': config.mbstd_group_size},
        'disc_c_noise': config.disc_c_noise,
        'num_fp16_res': config.num_fp16_res,
        'conv_clamp': 256,
    }
    state = state_of(network, _init_args=(), _init_kwargs=kwargs, disc_c_noise=config.disc_c_noise, img_channels=6)
    return persistent(class_name, {**state, **attributes})


def file_of(**networks):
    """Return a published file's bytes."""
    rest = {'training_set_kwargs': {'class_name': 'training.dataset.ImageFolderDataset'}, 'augment_pipe': None}
    return write({'G': None, 'D': None, 'G_ema': None, **rest, **networks})


@functools.cache
def original(kind):
    """Return the network that a published file of a kind holds."""
    return {'eg3d': lambda: eg3d(EG3D), 'next3d': lambda: next3d(NEXT3D)}.get(kind, lambda: discriminator(kind))()


def resolved(network):
    """Return a network whose config says the clamp that published files spell out."""
    clamp = 256 if isinstance(network, Discriminator) else None
    network.config = dataclasses.replace(network.config, conv_clamp=clamp)
    return network


def changed(state=None, kwargs=None, rendering=None, buffers=None, modules=None, kind='next3d', drop=()):
    """Return a published generator's file with entries of its state replaced or dropped."""
    made = generator_object(original(kind))
    meta = made.args[0]
    meta['state']['_init_kwargs'].update(kwargs or {})
    meta['state']['rendering_kwargs'].items.update(rendering or {})
    meta['state']['_buffers'].update(buffers or {})
    meta['state']['_modules'].update(modules or {})
    meta['state'].update(state or {})
    for name in drop:
        for entries in (meta['state'], meta['state']['_init_kwargs'], meta['state']['rendering_kwargs'].items):
            entries.pop(name, None)
    return file_of(G_ema=made)


# --- translation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('package', ['training', 'training_avatar_texture'])
@pytest.mark.parametrize('kind', ['eg3d', 'next3d'])
def test_generators(kind, package):
    data = file_of(G=None, G_ema=generator_object(original(kind), package))
    loaded = load(data)
    assert list(loaded) == ['G_ema']
    assert_same(loaded['G_ema'], resolved(original(kind)))
    assert not loaded['G_ema'].training and not any(x.requires_grad for x in loaded['G_ema'].parameters())


@pytest.mark.parametrize('kind', DISCRIMINATOR_CLASSES)
def test_discriminators(kind):
    made = discriminator_object(original(kind), DISCRIMINATOR_CLASSES[kind])
    assert_same(load(file_of(D=made))['D'], resolved(original(kind)))


def test_loaded_networks_own_their_memory(monkeypatch):
    content = legacy.restricted_pickle.load(io.BytesIO(file_of(G_ema=generator_object(original('next3d')))))
    monkeypatch.setattr(legacy.restricted_pickle, 'load', lambda file: content)
    first = load(b'')['G_ema']
    for x in [*first.state_dict().values(), first.uv_face_mask]:
        x.fill_(1)
    assert_same(load(b'')['G_ema'], resolved(original('next3d')))


def test_older_name_of_the_single_discriminator():
    assert load(file_of(D=discriminator_object(original('single'), 'Discriminator')))['D'].config.kind == 'single'


def test_all_networks_of_a_file_and_some():
    other = eg3d(dataclasses.replace(EG3D, z_dim=5))
    data = file_of(
        G=generator_object(other),
        G_ema=generator_object(original('eg3d')),
        D=discriminator_object(original('dual')),
    )
    nets = load(data)
    assert sorted(nets) == ['D', 'G', 'G_ema'] and (nets['G'].z_dim, nets['G_ema'].z_dim) == (5, 6)
    assert list(load(data, only=('D',))) == ['D'] and sorted(load(data, only=('G', 'G_ema'))) == ['G', 'G_ema']
    assert list(load(data, only='G_ema')) == ['G_ema']
    refused(file_of(D=discriminator_object(original('dual'))), 'holds none of G, G_ema', only=('G', 'G_ema'))


def test_published_networks_become_snapshots(tmp_path):
    data = file_of(G_ema=generator_object(original('next3d')), D=discriminator_object(original('dual')))
    nets = load(data)
    save_snapshot(tmp_path / 'own.pkl', nets)
    own = legacy.load_network_pkl(tmp_path / 'own.pkl')
    assert all(type(own[key]) is type(nets[key]) for key in nets)
    assert_same(own['G_ema'], nets['G_ema'])
    assert_same(own['D'], nets['D'])


def scalar(value, package='numpy.core'):
    """Return a number as NumPy 1 or 2 pickles it."""
    return Call(Name(f'{package}.multiarray', 'scalar'), (numpy_dtype('f8'), struct.pack('<d', value)))


FLIPPED = torch.tensor(PLANE_AXES[EG3DConfig]).float()
WINS = {  # what is changed in a Next3D file, and what config comes of it
    'attribute rendering_kwargs': (dict(rendering={'box_warp': 2}), lambda c: c.sampling.box_warp == 2),
    'rendering_kwargs of the constructor do not count': (
        dict(kwargs={'rendering_kwargs': {'box_warp': 3}}),
        lambda c: c.sampling.box_warp == 0.7,
    ),
    'numpy 1 numbers': (dict(rendering={'box_warp': scalar(2.5)}), lambda c: c.sampling.box_warp == 2.5),
    'numpy 2 numbers': (dict(rendering={'box_warp': scalar(2.5, 'numpy._core')}), lambda c: c.sampling.box_warp == 2.5),
    'numpy numbers of this version': (dict(rendering={'ray_end': np.float64(9)}), lambda c: c.sampling.far == 9),
    'neural_rendering_resolution': (
        dict(state={'neural_rendering_resolution': 32}),
        lambda c: c.neural_rendering_resolution == 32,
    ),
    'no neural_rendering_resolution': (
        dict(drop=['neural_rendering_resolution']),
        lambda c: c.neural_rendering_resolution == 64,
    ),
    'orth_scale, a number': (dict(state={'orth_scale': 4}), lambda c: c.orth_scale == 4),
    'orth_scale, a tensor': (dict(state={'orth_scale': torch.tensor([[4.7]])}), lambda c: c.orth_scale == 4.7),
    'orth_scale, none': (dict(drop=['orth_scale']), lambda c: c.orth_scale == 5),
    'orth_shift, a list': (dict(state={'orth_shift': [1, 2, 3]}), lambda c: c.orth_shift == (1, 2, 3)),
    'orth_shift, a tensor': (
        dict(state={'orth_shift': torch.tensor([[0, -0.3, 0.1]])}),
        lambda c: c.orth_shift == (0, -0.3, 0.1),
    ),
    'orth_shift, none': (dict(drop=['orth_shift']), lambda c: c.orth_shift == (0, -0.01, -0.01)),
    'plane_axes': (
        dict(modules={'renderer': module_object('training.x', 'ImportanceRenderer', {'plane_axes': FLIPPED})}),
        lambda c: c.sampling.plane_axes == ((0, 1), (0, 2), (2, 0)),
    ),
    'positional arguments': (
        dict(drop=['z_dim', 'w_dim'], state={'_init_args': (6, 25, 8)}),
        lambda c: (c.z_dim, c.w_dim) == (6, 8),
    ),
    'no clamp': (dict(drop=['conv_clamp', 'num_fp16_res']), lambda c: (c.conv_clamp, c.num_fp16_res) == (256, 4)),
    'half precision': (
        dict(kwargs={'num_fp16_res': 2, 'sr_num_fp16_res': 0}),
        lambda c: (c.num_fp16_res, c.sr_num_fp16_res) == (2, 0),
    ),
    'disparity': (dict(rendering={'disparity_space_sampling': True}), lambda c: c.sampling.use_disparity),
    'ray limits': (
        dict(rendering={'ray_start': 'auto', 'ray_end': 'auto'}),
        lambda c: c.sampling.near == c.sampling.far == 'auto',
    ),
    'depths': (
        dict(rendering={'depth_resolution': 5, 'depth_resolution_importance': 0}),
        lambda c: c.sampling.num_depths == 5,
    ),
    'density noise': (dict(rendering={'density_noise': 0.5}), lambda c: c.sampling.density_noise == 0.5),
    'camera': (
        dict(rendering={'avg_camera_radius': 1.7, 'avg_camera_pivot': [0, 0.1, 0.3]}),
        lambda c: (c.avg_camera_radius, c.avg_camera_pivot) == (1.7, (0, 0.1, 0.3)),
    ),
    'no camera': (
        dict(drop=['avg_camera_radius', 'avg_camera_pivot']),
        lambda c: (c.avg_camera_radius, c.avg_camera_pivot) == (2.7, (0, 0, 0.2)),
    ),
    'conditioning': (
        dict(rendering={'c_scale': 0.5, 'c_gen_conditioning_zero': True}),
        lambda c: c.c_scale == 0.5 and c.c_gen_conditioning_zero,
    ),
    'superresolution': (
        dict(rendering={'superresolution_noise_mode': 'random', 'sr_antialias': False, 'decoder_lr_mul': 2}),
        lambda c: (c.superresolution_noise_mode, c.sr_antialias, c.decoder_lr_mul) == ('random', False, 2),
    ),
}


@pytest.mark.parametrize('case', WINS)
def test_what_decides_the_config(case):
    change, check = WINS[case]
    assert check(load(changed(**change))['G_ema'].config)


def test_rendering_arguments_of_the_constructor_serve_where_there_is_no_attribute():
    made = generator_object(original('eg3d'))
    state = made.args[0]['state']
    state['_init_kwargs']['rendering_kwargs'] = rendering_of(EG3D, box_warp=3)
    del state['rendering_kwargs']
    assert load(file_of(G=made))['G'].config.sampling.box_warp == 3


def test_mask_and_buffers_come_from_the_file():
    mask = torch.rand(1, 1, 8, 8)
    extra = {'dense_faces': torch.arange(30).reshape(1, 10, 3), 'dataset_label_std': torch.ones(25)}
    g = load(changed(state={'uv_face_mask': mask}, buffers=extra))['G_ema']
    assert torch.equal(g.uv_face_mask, mask)
    assert all(torch.equal(g.state_dict()[name], x) for name, x in extra.items())


def test_mask_that_is_a_buffer_of_several_channels():
    mask = torch.rand(1, 3, 8, 8)
    state = {'_non_persistent_buffers_set': set()}
    g = load(changed(drop=['uv_face_mask'], state=state, buffers={'uv_face_mask': mask}))['G_ema']
    assert torch.equal(g.uv_face_mask, mask[:, :1]) and 'uv_face_mask' not in g.state_dict()


def test_rasteriser_that_is_pickled_by_its_class():
    plain_object = module_object('training_avatar_texture.rasterizer', 'Pytorch3dRasterizer', {'raster_settings': {}})
    assert_same(load(changed(modules={'rasterizer': plain_object}))['G_ema'], resolved(original('next3d')))


def test_files_without_the_networks_asked_for():
    with pytest.raises(legacy.NetworkAbsentError, match='holds none of G_ema'):
        load(file_of(D=discriminator_object(original('dual'))), only=('G_ema',))
    for broken in (write([1]), file_of(G_ema=7)):
        with pytest.raises(NetworkFileError) as caught:
            load(broken, only=('G_ema',))
        assert type(caught.value) is NetworkFileError


def test_buffers_that_are_not_part_of_the_state_are_left_out():
    kept = {'_non_persistent_buffers_set': {'temporary'}}
    g = load(changed(state=kept, buffers={'temporary': torch.ones(3)}))['G_ema']
    assert 'temporary' not in g.state_dict()
    refused(changed(buffers={'temporary': torch.ones(3)}), 'not expected: temporary')


def test_label_noise_of_discriminators():
    made = discriminator_object(original('dual'), disc_c_noise=0.25)
    assert load(file_of(D=made))['D'].config.disc_c_noise == 0.25
    del made.args[0]['state']['disc_c_noise']
    assert load(file_of(D=made))['D'].config.disc_c_noise == 0.5


def test_arguments_of_discriminators():
    made = discriminator_object(original('dual'), _init_args=(25, 16, 3))
    kwargs = made.args[0]['state']['_init_kwargs']
    for name in ('c_dim', 'img_resolution', 'img_channels'):
        del kwargs[name]
    kwargs.update(epilogue_kwargs={'mbstd_group_size': 2, 'mbstd_num_channels': 1})
    config = load(file_of(D=made))['D'].config
    assert (config.img_resolution, config.img_channels, config.c_dim) == (16, 3, 25)
    assert config.mbstd_group_size == 2
    assert config.mapping == MappingConfig(num_layers=8)


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_protocols(protocol):
    content = {'G_ema': generator_object(original('eg3d'))}
    assert_same(load(write(content, protocol))['G_ema'], resolved(original('eg3d')))


def test_arguments_that_published_files_leave_out():
    bare = changed(kind='eg3d', drop=['channel_base', 'channel_max', 'mapping_kwargs'])
    message = refused(bare, 'tensors of EG3DGenerator do not fit')
    assert 'backbone.mapping.fc7.weight' in message and '(expected [512, 512, 3, 3], got [8, 8, 3, 3])' in message


# --- refusals --------------------------------------------------------------------------------------------------------


def empty(class_name, **state):
    """Return a persistent object with almost nothing in it."""
    bare = {'_init_args': (), '_init_kwargs': {}, '_parameters': {}, '_buffers': {}, '_modules': {}}
    return persistent(class_name, {**bare, **state})


def plane_axes(axes):
    """Return a change of a generator's plane axes."""
    return dict(modules={'renderer': module_object('training.x', 'ImportanceRenderer', {'plane_axes': axes})})


def module_with(**state):
    """Return a persistent module."""
    return persistent('FullyConnectedLayer', {'_parameters': {}, '_buffers': {}, '_modules': {}, **state})


def doubled_modules(depth=25):
    """Return modules of which each holds the one before twice."""
    made = module_with()
    for _ in range(depth):
        made = module_with(_modules={'a': made, 'b': made})
    return made


def module_in_itself():
    """Return a module that holds itself."""
    modules = {}
    made = module_object('training.x', 'OSGDecoder', {'_modules': modules})
    modules['again'] = made
    return made


DEEPFP32 = 'training.superresolution.SuperresolutionHybridDeepfp32'
UNSUPPORTED = {
    'nothing': (lambda: write({}), 'holds no network: expected a dict with G, D, G_ema'),
    'no networks': (lambda: file_of(), 'holds no network'),
    'list': (lambda: write([1, 2]), 'holds no network'),
    'number': (lambda: write(7), 'holds no network'),
    'dict without networks': (lambda: write({'state_dict': {}}), 'holds no network'),
    'network that is a number': (lambda: file_of(G=7), 'G: expected a network, got int'),
    'network that is a tensor': (lambda: file_of(G=torch.ones(2)), 'G: expected a network, got PickledTensor'),
    'network that is a dict': (lambda: file_of(G={'a': 1}), 'G: expected a network, got dict'),
    'unknown class': (lambda: file_of(G=empty('StyleGAN')), 'G: class StyleGAN is not a network of EG3D or Next3D'),
    'stylegan2': (lambda: file_of(G_ema=empty('Generator')), 'G_ema: class Generator is not a network'),
    'dummy discriminator': (
        lambda: file_of(D=empty('DummyDualDiscriminator')),
        'D: class DummyDualDiscriminator is not',
    ),
    'deepfp32': (
        lambda: changed(rendering={'superresolution_module': DEEPFP32}),
        "got 'SuperresolutionHybridDeepfp32'",
    ),
    'no mouth': (lambda: changed(state={'fill_mouth': False}), 'networks without mouth filling are not supported'),
    'clamp mode': (
        lambda: changed(rendering={'clamp_mode': 'relu'}),
        "clamp_mode 'relu' is not supported, only softplus",
    ),
    'slanted planes': (lambda: changed(**plane_axes(torch.tensor(PLANE_AXES[EG3DConfig]) * 0.5)), 'along the axes'),
    'flat planes': (lambda: changed(**plane_axes(torch.zeros(3, 3, 3))), 'G_ema: damaged network'),
    'two planes': (lambda: changed(**plane_axes(FLIPPED[:2])), 'plane_axes: expected [3, 3, 3], got [2, 3, 3]'),
    'planes that are a list': (lambda: changed(**plane_axes([1, 2, 3])), 'G_ema: damaged network'),
    'planes that are not a number': (lambda: changed(**plane_axes(FLIPPED * float('nan'))), 'G_ema: '),
    'no renderer': (lambda: changed(modules={'renderer': None}), 'G_ema: damaged network'),
    'no arguments': (
        lambda: file_of(G=persistent('TriPlaneGenerator', {})),
        "G: damaged network (KeyError: '_init_kwargs')",
    ),
    'no state': (lambda: file_of(G=empty('TriPlaneGenerator')), 'G: damaged network'),
    'no backbone': (lambda: changed(modules={'backbone': None}), 'G_ema: damaged network'),
    'no rendering arguments': (lambda: changed(state={'rendering_kwargs': {}}), "KeyError: 'superresolution_module'"),
    'rendering arguments that are a list': (lambda: changed(state={'rendering_kwargs': [1]}), 'G_ema: damaged network'),
    'no mask': (lambda: changed(drop=['uv_face_mask']), "KeyError: 'uv_face_mask'"),
    'mask that is a number': (lambda: changed(state={'uv_face_mask': 7}), 'G_ema: '),
    'unknown mapping': (lambda: changed(kwargs={'mapping_kwargs': {'activation': 'relu'}}), "'activation'"),
    'arguments that are a list': (lambda: changed(state={'_init_kwargs': [1]}), 'G_ema: damaged network'),
    'near behind far': (lambda: changed(rendering={'ray_start': 9}), 'near, far: expected 0 <= near < far'),
    'text as a number': (lambda: changed(rendering={'box_warp': '1'}), 'G_ema: damaged network'),
    'tensor as a number': (
        lambda: changed(rendering={'avg_camera_radius': torch.ones(1)}),
        'config.avg_camera_radius: expected',
    ),
    'array as a number': (
        lambda: changed(rendering={'avg_camera_radius': np.ones(3)}),
        'config.avg_camera_radius: expected',
    ),
    'module as a number': (
        lambda: changed(rendering={'c_scale': empty('A')}),
        'config.c_scale: expected plain numbers',
    ),
    'parameter that is a number': (lambda: changed(state={'_parameters': {'a': 7}}), 'a: expected a tensor, got int'),
    'parameters that are a list': (lambda: changed(state={'_parameters': [7]}), 'G_ema: damaged network'),
    'name that is a number': (lambda: changed(state={'_parameters': {7: torch.ones(1)}}), 'G_ema: damaged network'),
    'modules that are a list': (lambda: changed(state={'_modules': [7]}), 'G_ema: damaged network'),
    'module that is a number': (lambda: changed(modules={'extra': 7}), 'G_ema: damaged network'),
    'module that is a dict': (lambda: changed(modules={'extra': {'state': {}}}), 'G_ema: damaged network'),
    'module in itself': (lambda: changed(modules={'extra': module_in_itself()}), 'extra.again.* is used twice'),
    'doubled modules': (lambda: changed(modules={'extra': doubled_modules()}), 'is used twice'),
    'arguments in themselves': (
        lambda: changed(kwargs={'sr_kwargs': with_itself({})}),
        'nested too deep or repeats itself',
    ),
    'endless arguments': (
        lambda: changed(rendering={'clamp_mode': doubled_lists()}),
        'nested too deep or repeats itself',
    ),
    'huge width': (lambda: changed(kwargs={'w_dim': 2**31}), 'larger than the tensors in the file'),
    'many layers': (
        lambda: changed(kwargs={'mapping_kwargs': {'num_layers': 10**9}}),
        'config describes 1000000000 layers',
    ),
    'width that is a text': (lambda: changed(kwargs={'w_dim': '8'}), 'G_ema: config that describes no network'),
    'expanded tensor': (
        lambda: changed(state={'_parameters': {'a': tensor((2**40,), (0,))}}),
        'in a storage of 3 numbers',
    ),
    'expanded buffer': (
        lambda: changed(buffers={'dense_faces': tensor((1, 2**40, 3), (0, 0, 1))}),
        'in a storage of 3 numbers',
    ),
    'tensor outside its storage': (
        lambda: changed(state={'_parameters': {'a': tensor((9,), (1,))}}),
        'in a storage of 3 numbers',
    ),
    'global': (
        lambda: file_of(G=Call(Name('os', 'system'), ('true',))),
        'it names os.system, which no network file needs',
    ),
    'global in an argument': (lambda: changed(kwargs={'a': Name('builtins', 'eval')}), 'it names builtins.eval, which'),
    'line breaks in a name': (
        lambda: file_of(G=Name('os\n\x1b[31m', 'a\r\u2028b')),
        r'it names os\n\x1b[31m.a\r\u2028b, which',
    ),
    'line breaks in a class': (lambda: file_of(G=empty('A\nB')), r'class A\nB is not'),
}


@pytest.mark.parametrize('case', UNSUPPORTED)
def test_what_is_not_supported_is_refused_in_one_line(case):
    make, match = UNSUPPORTED[case]
    refused(make(), match)


def test_deep_modules():
    # Opcodes by hand: a writer that recurses gives up before the loader does.
    opened = b'ctraining.x\nOSGDecoder\n)\x81}X\x08\0\0\0_modules}X\x01\0\0\0a'
    data = opened * 3000 + b'N' + (pickle.SETITEM * 2 + pickle.BUILD) * 3000
    refused(changed(modules={'extra': Raw(data)}), 'G_ema: damaged network (RecursionError')


def test_a_good_file_loads_after_all_that():
    assert_same(load(file_of(G_ema=generator_object(original('next3d'))))['G_ema'], resolved(original('next3d')))


def test_tensors_that_do_not_fit_are_all_named():
    made = generator_object(original('next3d'))
    modules = made.args[0]['state']['_modules']
    decoder, backbone = modules['decoder'].state, modules['backbone'].args[0]['state']
    mapping = backbone['_modules']['mapping'].args[0]['state']
    mapping['_buffers'] = {'w_avg': torch.ones(9), 'w_max': torch.ones(3)}
    first = decoder['_modules']['net'].state['_modules']['0'].args[0]['state']
    first['_parameters'] = {'bias': nn.Parameter(torch.ones(64)), 'extra': torch.ones(1)}
    message = refused(file_of(G_ema=made), 'G_ema: tensors of Next3DGenerator do not fit')
    assert 'missing: decoder.net.0.weight;' in message
    unexpected = message.split('not expected: ')[1].split(';')[0].split(', ')
    assert set(unexpected) == {'decoder.net.0.extra', 'backbone.mapping.w_max'}
    assert message.endswith('of another shape: backbone.mapping.w_avg (expected [8], got [9])')


def test_missing_topology_is_named():
    made = generator_object(original('next3d'))
    for name in ('faces', 'uvfaces'):
        del made.args[0]['state']['_buffers'][name]
    refused(file_of(G_ema=made), 'missing: faces, uvfaces')


def test_truncated_and_damaged_files():
    network = original('dual_label')
    data = file_of(D=discriminator_object(network, 'DualLabelDualDiscriminator'))
    assert_same(load(data)['D'], resolved(network))
    for i in range(50):
        refused(data[: len(data) * i // 50])
    random_bytes, outcomes = random.Random(0), []
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(random_bytes.choice([1, 1, 5])):
            damaged[random_bytes.randrange(len(data))] = random_bytes.randrange(256)
        try:
            outcomes.append(list(load(bytes(damaged)))[0])
        except NetworkFileError as error:
            assert str(error).isprintable()
            outcomes.append('refused')
    assert set(outcomes) == {'D', 'refused'}


def test_damaged_generators():
    data = file_of(G_ema=generator_object(original('next3d')))
    random_bytes, outcomes = random.Random(1), []
    text = [i for i in range(len(data) - 8) if data[i : i + 4].isalpha()] + list(range(len(data) - 3000, len(data)))
    for _ in range(40):
        damaged = bytearray(data)
        damaged[random_bytes.choice(text)] = random_bytes.randrange(256)
        try:
            outcomes.append(list(load(bytes(damaged)))[0])
        except NetworkFileError as error:
            assert str(error).isprintable()
            outcomes.append('refused')
    assert set(outcomes) == {'G_ema', 'refused'}


# --- kinds of files and of sources -----------------------------------------------------------------------------------


def saved(content, **kwargs):
    """Return the bytes of torch.save."""
    stream = io.BytesIO()
    torch.save(content, stream, **kwargs)
    return stream.getvalue()


OTHER_FILES = {
    'empty': b'',
    'text': b'weights\n',
    'html': b'<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>',
    'zip': b'PK\x03\x04' + bytes(100),
    'state dict': saved(nn.Linear(2, 2).state_dict()),
    'old state dict': saved(nn.Linear(2, 2).state_dict(), _use_new_zipfile_serialization=False),
    'module': pickle.dumps(nn.Linear(2, 2)),
    'numpy': pickle.dumps(np.ones(3), 4),
    'dict': pickle.dumps({'a': 1}),
    'list': pickle.dumps([1, 2], 0),
    'exception': pickle.dumps(ValueError('a')),
}


@pytest.mark.parametrize('case', OTHER_FILES)
def test_other_files_are_refused_by_their_name(case, tmp_path):
    path = tmp_path / 'other.pkl'
    path.write_bytes(OTHER_FILES[case])
    with open(path, 'rb') as file:
        for source in (path, str(path), file):
            with pytest.raises(NetworkFileError) as caught:
                legacy.load_network_pkl(source)
            assert str(caught.value).startswith(f'{path}: ') and str(caught.value).isprintable()


@pytest.mark.parametrize('protocol', range(6))
def test_hostile_protocols(protocol):
    refused(write({'G': Call(Name('posix', 'system'), ('true',))}, protocol), 'it names posix.system, which')
    refused(pickle.dumps({'a': [1, 2.5, 'text', None, (True,)]}, protocol), 'holds no network')


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(IsADirectoryError):
        legacy.load_network_pkl(tmp_path)
    with pytest.raises(FileNotFoundError):
        legacy.load_network_pkl(tmp_path / 'missing.pkl')
    for source in (None, 7, {'G': 1}):
        with pytest.raises(TypeError):
            legacy.load_network_pkl(source)


def test_sources(tmp_path):
    data = file_of(G_ema=generator_object(original('eg3d')))
    path = tmp_path / 'network.pkl'
    path.write_bytes(data)
    with open(path, 'rb') as file:
        for source in (path, str(path), bytes(path), path.as_uri(), file, io.BytesIO(data)):
            assert_same(legacy.load_network_pkl(source)['G_ema'], resolved(original('eg3d')))
    refused(data[:1000], 'network file: cannot be loaded')


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of an HTTP server of the folder tmp_path/served; the cache is tmp_path/cache."""
    (tmp_path / 'served').mkdir()
    monkeypatch.setenv('NEXT3D_CACHE_DIR', str(tmp_path / 'cache'))
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.delenv(name, raising=False)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / 'served'))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, 'log_message', lambda *_: None)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f'http://127.0.0.1:{running.server_address[1]}'
        running.shutdown()
        thread.join()


def test_urls(server, tmp_path):
    served = tmp_path / 'served' / 'network.pkl'
    served.write_bytes(file_of(G_ema=generator_object(original('eg3d'))))
    for _ in range(2):  # The second time from the cache.
        assert_same(legacy.load_network_pkl(f'{server}/network.pkl')['G_ema'], resolved(original('eg3d')))
        served.unlink(missing_ok=True)
    assert [x.name.split('-')[1] for x in (tmp_path / 'cache').rglob('*.pkl')] == ['network.pkl']
    with pytest.raises(DownloadError):
        legacy.load_network_pkl(f'{server}/missing.pkl')


def test_hostile_urls(server, tmp_path):
    (tmp_path / 'served' / 'hostile.pkl').write_bytes(file_of(G=Call(Name('os', 'system'), ('true',))))
    with pytest.raises(NetworkFileError, match=f'^{server}/hostile.pkl: cannot be loaded: it names os.system, which'):
        legacy.load_network_pkl(f'{server}/hostile.pkl')
