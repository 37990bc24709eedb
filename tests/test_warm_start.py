# SPDX-License-Identifier: Apache-2.0
"""Warm start: every tensor comes from where the published script takes it, or stays as it was initialised."""

import copy
import functools
import io
import json
import lzma

import parity
import pytest
import torch
from helpers import HEAD, TINY
from simple_head import simple_head, uv_face_mask

import legacy
from training.config import DiscriminatorConfig, EG3DConfig, MappingConfig, Next3DConfig
from training.discriminator import Discriminator
from training.generator import EG3DGenerator, Next3DGenerator
from training.layers import Conv2dLayer
from training.warm_start import TOPOLOGY_BUFFERS, Transfer, describe, warm_start

TINY_D = dict(img_resolution=16, channel_base=64, channel_max=6, num_fp16_res=0, mapping=MappingConfig(num_layers=2))
# Buffers of published files that no network of ours has unless it was loaded from one.
ABSENT = {'dense_faces', 'dataset_label_std'}

pytestmark = pytest.mark.usefixtures('one_thread')


def randomised(network, seed):
    """Give every floating-point tensor but the filters and the topology numbers of its own, those at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not name.endswith('resample_filter') and name not in TOPOLOGY_BUFFERS:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return network


@functools.cache
def topology():
    head = simple_head()
    mask = torch.from_numpy(uv_face_mask()).float()[None, None] / 255
    return head.faces, head.uvs, head.uv_faces, mask


def eg3d(seed, **overrides):
    return randomised(EG3DGenerator(EG3DConfig(**TINY | overrides)), seed)


def next3d(seed, head=None, **overrides):
    return randomised(Next3DGenerator(Next3DConfig(**TINY | HEAD | overrides), *(head or topology())), seed)


def discriminator(seed, render_channels=0, **overrides):
    network = Discriminator(DiscriminatorConfig(**TINY_D | overrides))
    if render_channels:
        old = network.b16.fromrgb.weight
        network.b16.fromrgb = Conv2dLayer(old.shape[1] + render_channels, len(old), 1, activation='lrelu')
    return randomised(network, seed)


def state_of(network):
    """Return copies of all tensors, the mask too."""
    return {name: t.detach().clone() for name, t in (*network.named_parameters(), *network.named_buffers())}


def check_transfers(network, before, source, transfers):
    """Assert that each tensor is bit-equal to its source, or to itself before; extended ones apart."""
    state, given = network.state_dict(), source.state_dict()
    assert [t.name for t in transfers] == list(state)
    for t in transfers:
        assert t.shape == tuple(state[t.name].shape)
        if not t.note.startswith('new input channels'):
            assert torch.equal(state[t.name], before[t.name] if t.source is None else given[t.source]), t
        assert t.note or t.source


def sources(transfers):
    return {t.name: t.source for t in transfers}


def notes(transfers):
    return {t.name: t.note for t in transfers}


# ---- Against the published script


@pytest.fixture(scope='module')
def published():
    """The recorded list, the EG3D file's networks and, started from them, new ones with their first tensors."""
    record = json.loads(parity.parity_file('eg3d_warm_start.json').read_text())
    content = lzma.decompress(parity.parity_file('tiny_eg3d.pkl.xz').read_bytes())
    source = legacy.load_network_pkl(io.BytesIO(content))
    widths = dict(channel_base=2048, channel_max=16)
    mapping = MappingConfig(num_layers=2, embed_features=32, layer_features=32)
    g = Next3DGenerator(Next3DConfig(**widths, mapping=mapping), *topology())
    d = Discriminator(DiscriminatorConfig(**widths))
    networks = {'G': randomised(g, 1), 'G_ema': randomised(copy.deepcopy(g), 2), 'D': randomised(d, 3)}
    before = {key: state_of(network) for key, network in networks.items()}
    return record, source, networks, before, warm_start(networks, source)


def test_tensors_of_an_eg3d_file_are_those_that_the_published_script_takes(published):
    record, source, _, _, transfers = published
    copied = {name: e for name, e in record['copied'].items() if name not in ABSENT}
    kept = {e['name']: e for e in record['kept_random'] if e['name'] not in ABSENT}
    # The record was made by comparing numbers: these two noise strengths happen to equal others of the same file.
    by_chance = {f'superresolution.block{i}.conv0.noise_strength' for i in (0, 1)}
    given = source['G'].state_dict()
    for name in by_chance:
        assert torch.equal(given[name], given[copied[name]['source']])
        copied[name]['source'] = name
    for key in ('G', 'G_ema'):
        taken = {t.name: t for t in transfers[key] if t.source is not None}
        assert {name: t.source for name, t in taken.items()} == {name: e['source'] for name, e in copied.items()}
        assert all(list(t.shape) == copied[name]['shape'] for name, t in taken.items())
        left = {t.name: t for t in transfers[key] if t.source is None}
        assert set(left) == set(kept)
        assert all(list(t.shape) == kept[n]['shape'] for n, t in left.items() if n not in TOPOLOGY_BUFFERS)
        for name, t in left.items():
            if t.note.startswith('other shape'):
                assert t.note == f'other shape: {kept[name]["source_shape"]}'
            elif t.note == 'no such tensor':
                assert kept[name]['source_shape'] is None
            else:
                assert t.note == ('own topology' if name in TOPOLOGY_BUFFERS else 'constant filter')
    assert sources(transfers['D']) == {name: name for name in record['D_copied']} and not record['D_kept']


def test_tensors_of_an_eg3d_file_are_copied_bit_by_bit(published):
    _, source, networks, before, transfers = published
    for key, network in networks.items():
        check_transfers(network, before[key], source[key], transfers[key])
        assert torch.equal(network.uv_face_mask, before[key]['uv_face_mask']) if key != 'D' else True


# ---- From EG3D


def test_eg3d_to_next3d():
    source = {'G': eg3d(1), 'G_ema': eg3d(2), 'D': discriminator(3)}
    networks = {'G': next3d(4), 'G_ema': next3d(5), 'D': discriminator(6)}
    before = {key: state_of(network) for key, network in networks.items()}
    transfers = warm_start(networks, source)
    for key, network in networks.items():
        check_transfers(network, before[key], source[key], transfers[key])
    taken = sources(transfers['G'])
    for name in source['G'].state_dict():
        assert taken[name] == name
    for part in ('texture_backbone', 'mouth_backbone', 'neural_blending'):
        for name in ('synthesis.b32.conv1.noise_const', 'mapping.w_avg', 'mapping.fc0.weight'):
            assert taken[f'{part}.{name}'] == f'backbone.{name}'
        assert taken[f'{part}.synthesis.b8.torgb.weight'] is None
    assert notes(transfers['G'])['texture_backbone.synthesis.b8.torgb.weight'] == 'other shape: [12, 6, 1, 1]'
    assert notes(transfers['G'])['mouth_backbone.synthesis.encoder.0.conv1.weight'] == 'no such tensor'
    assert transfers['G'] == transfers['G_ema']


def test_parts_that_the_source_paints_alone_agree_with_it():
    source, g = eg3d(1), next3d(2)
    warm_start({'G_ema': g}, {'G_ema': source})
    z, c = torch.randn(2, 8), torch.randn(2, 25)
    ws = g.mapping(z, c)
    assert torch.equal(ws[:, : source.num_ws], source.mapping(z, c))
    assert torch.equal(g.static_planes(ws), source.static_planes(source.mapping(z, c)))


def test_without_unused_mappings():
    g = next3d(2, has_unused_mappings=False)
    before = state_of(g)
    source = eg3d(1)
    transfers = warm_start({'G': g}, {'G': source})['G']
    check_transfers(g, before, source, transfers)
    assert {t.name.split('.')[0] for t in transfers if '.mapping.' in t.name} == {'backbone'}
    assert sources(transfers)['texture_backbone.synthesis.b4.const'] == 'backbone.synthesis.b4.const'


@pytest.mark.parametrize('present', ['G', 'G_ema'])
def test_generators_stand_in_for_each_other(present):
    source = {present: eg3d(1)}
    networks = {'G': next3d(2), 'G_ema': next3d(3)}
    before = {key: state_of(network) for key, network in networks.items()}
    transfers = warm_start(networks, source)
    for key, network in networks.items():
        check_transfers(network, before[key], source[present], transfers[key])
        assert {t.note for t in transfers[key] if t.source} == {'' if key == present else f'of {present}'}
    assert f'decoder: 4 from decoder (of {present})' in describe(transfers)


def test_each_generator_takes_from_its_own_and_nothing_is_shared():
    source = {'G': eg3d(1), 'G_ema': eg3d(2)}
    expected = {key: state_of(network) for key, network in source.items()}
    networks = {'G_ema': next3d(3), 'G': next3d(4)}
    warm_start(networks, source)
    for key, network in networks.items():
        assert torch.equal(network.backbone.synthesis.b4.const, expected[key]['backbone.synthesis.b4.const'])
        with torch.no_grad():
            network.backbone.synthesis.b4.const.zero_()
        assert all(torch.equal(t, expected[key][name]) for name, t in state_of(source[key]).items())


def test_parameters_stay_the_same_objects_with_their_dtype_and_gradients():
    source = {'G': eg3d(1).half().requires_grad_(False)}
    g = next3d(2)
    parameters = dict(g.named_parameters())
    warm_start({'G': g}, source)
    for name, parameter in g.named_parameters():
        assert parameter is parameters[name] and parameter.dtype == torch.float32
        assert parameter.requires_grad and parameter.grad is None and parameter.is_leaf
    assert torch.equal(g.decoder.net[0].weight, source['G'].decoder.net[0].weight.float())


# ---- From Next3D


def other_topology():
    """Turn the head's faces and move its UVs: the same shapes, another topology."""
    faces, uvs, uv_faces, mask = topology()
    return faces[::-1].copy(), uvs * 0.5, uv_faces[::-1].copy(), mask * 0.5


def fewer_faces():
    faces, uvs, uv_faces, mask = topology()
    return faces[:-2], uvs, uv_faces[:-2], mask


@pytest.mark.parametrize('head', [other_topology, fewer_faces])
def test_next3d_to_next3d_with_another_topology(head):
    source, g = next3d(1), next3d(2, head())
    before = state_of(g)
    transfers = warm_start({'G': g}, {'G': source})['G']
    check_transfers(g, before, source, transfers)
    kept = {name: note for name, note in notes(transfers).items() if sources(transfers)[name] is None}
    assert kept == dict.fromkeys(('faces', 'raw_uvcoords', 'uvcoords', 'uvfaces', 'face_uvcoords'), 'own topology')
    assert all(source == name for name, source in sources(transfers).items() if source)
    # The mask is no part of the state dict, but of the topology.
    assert torch.equal(g.uv_face_mask, before['uv_face_mask'])


def test_next3d_backbones_come_from_their_own_kind():
    source, g = next3d(1), next3d(2, has_unused_mappings=False)
    warm_start({'G': g}, {'G': source})
    for part in ('backbone', 'texture_backbone', 'mouth_backbone', 'neural_blending'):
        own, given = (getattr(network, part).synthesis.state_dict() for network in (g, source))
        assert all(torch.equal(own[name], given[name]) for name in given)


def test_next3d_without_unused_mappings_gives_none():
    source, g = next3d(1, has_unused_mappings=False), next3d(2)
    before = state_of(g)
    transfers = warm_start({'G': g}, {'G': source})['G']
    check_transfers(g, before, source, transfers)
    assert notes(transfers)['texture_backbone.mapping.w_avg'] == 'no such tensor'


def test_input_channels_of_generators_are_not_extended():
    transfers = warm_start({'G': next3d(1, plane_channels=8)}, {'G': next3d(2)})['G']
    name = 'mouth_backbone.synthesis.encoder.0.fromrgb.weight'
    assert sources(transfers)[name] is None and notes(transfers)[name].startswith('other shape: [')


# ---- Discriminators


def test_new_input_channels_of_the_discriminator_are_zero():
    source, d = discriminator(1), discriminator(2, render_channels=3)
    before = state_of(d)
    transfers = warm_start({'D': d}, {'D': source})['D']
    check_transfers(d, before, source, transfers)
    weight = d.b16.fromrgb.weight
    assert weight.shape[1] == 9 and weight.requires_grad
    assert not weight[:, 6:].any()
    picture = torch.randn(2, 9, 16, 16)
    torch.testing.assert_close(d.b16.fromrgb(picture), source.b16.fromrgb(picture[:, :6]))
    extended = Transfer(
        'b16.fromrgb.weight', 'b16.fromrgb.weight', (4, 9, 1, 1), 'new input channels set to zero: 6 to 8'
    )
    assert [t for t in transfers if t.note] == [extended]
    text = describe({'D': transfers})
    assert '1 from b16 (new input channels set to zero)' in text
    line = 'b16.fromrgb.weight [4, 9, 1, 1] from b16.fromrgb.weight: new input channels set to zero: 6 to 8'
    assert line in text


def test_first_layers_that_differ_in_other_ways_are_kept():
    for source, d in ((discriminator(1, render_channels=3), discriminator(2)), (discriminator(1), wider())):
        before = state_of(d)
        transfers = warm_start({'D': d}, {'D': source})['D']
        check_transfers(d, before, source, transfers)
        assert notes(transfers)['b16.fromrgb.weight'].startswith('other shape: [4, ')


def wider():
    d = discriminator(2)
    d.b16.fromrgb = Conv2dLayer(9, 5, 1)
    return d


def test_another_label_length():
    source, d = discriminator(1), discriminator(2, c_dim=75)
    before = state_of(d)
    transfers = warm_start({'D': d}, {'D': source})['D']
    check_transfers(d, before, source, transfers)
    assert [t for t in transfers if t.source is None] == [
        Transfer('mapping.embed.weight', None, (6, 75), 'other shape: [6, 25]')
    ]
    assert '    mapping.embed.weight [6, 75] kept as initialised: other shape: [6, 25]' in describe({'D': transfers})


def test_missing_discriminator():
    networks = {'G': next3d(1), 'D': discriminator(2)}
    before = state_of(networks['D'])
    transfers = warm_start(networks, {'G_ema': eg3d(3)})
    assert {(t.source, t.note) for t in transfers['D']} == {(None, 'the file has none')}
    assert all(torch.equal(t, before[name]) for name, t in state_of(networks['D']).items())
    assert describe(transfers).endswith('\nD kept as initialised: the file has none')


# ---- Text


def test_description():
    transfers = warm_start({'G': next3d(1)}, {'G': eg3d(2)})
    lines = describe(transfers).split('\n')
    taken = [t for t in transfers['G'] if t.source]
    kept = [t for t in transfers['G'] if not t.source]
    assert lines[0] == f'G: {len(taken)} of {len(taken) + len(kept)} tensors taken'
    count = sum(t.name.startswith('backbone.') for t in taken)
    assert f'  backbone: {count} from backbone' in lines
    (texture,) = (line for line in lines if line.startswith('  texture_backbone:'))
    count = sum(t.name.startswith('texture_backbone.') for t in taken)
    filters = sum(t.name.startswith('texture_backbone.') and t.name.endswith('_filter') for t in kept)
    assert set(texture.split(': ')[1].split(', ')) == {
        f'{count} from backbone',
        '8 kept (other shape)',
        f'{filters} kept (constant filter)',
    }
    assert '  buffers: 5 kept (own topology)' in lines
    assert [line.split()[0] for line in lines if line.startswith('    ')] == [t.name for t in kept]
    every = [line for line in describe(transfers, every_tensor=True).split('\n') if line.startswith('    ')]
    assert [line.split()[0] for line in every] == [t.name for t in transfers['G']]
    assert '    texture_backbone.synthesis.b4.const [6, 4, 4] from backbone.synthesis.b4.const' in every


# ---- Refusals


def small_eg3d(seed):
    return eg3d(seed, w_dim=5, z_dim=5, channel_max=3, plane_channels=3, decoder_hidden=5, sr_channels=(2, 2))


@pytest.mark.parametrize(
    'source, match',
    [
        ({}, r'source: expected a generator \(G or G_ema\), got no network'),
        ({'D': discriminator}, r'source: expected a generator \(G or G_ema\), got D'),
        ({'G': small_eg3d}, 'source: no weight has the name and shape of one in the new G and G_ema'),
        ({'G': small_eg3d, 'D': discriminator}, 'source: no weight has the name and shape of one in the new G and G_'),
        ({'G': eg3d, 'G_ema': small_eg3d}, 'source: no weight has the name and shape of one in the new G_ema$'),
    ],
)
def test_sources_that_give_nothing_change_nothing(source, match):
    networks = {'G': next3d(1), 'G_ema': next3d(2), 'D': discriminator(3)}
    before = {key: state_of(network) for key, network in networks.items()}
    with pytest.raises(ValueError, match=f'^{match}') as caught:
        warm_start(networks, {key: make(9) for key, make in source.items()})
    assert '\n' not in str(caught.value)
    for key, network in networks.items():
        assert all(torch.equal(t, before[key][name]) for name, t in state_of(network).items())


def test_a_discriminator_alone():
    with pytest.raises(ValueError, match='in the new D$'):
        warm_start({'D': discriminator(1)}, {'G': eg3d(2)})
    with pytest.raises(ValueError, match='in the new D$'):
        other = discriminator(2, channel_max=3, channel_base=24, c_dim=5)
        warm_start({'D': discriminator(1)}, {'D': other})


def test_a_discriminator_that_does_not_fit_does_not_stop_the_generator():
    d = discriminator(1, channel_max=3, channel_base=24, c_dim=5)
    before = state_of(d)
    transfers = warm_start({'G': next3d(2), 'D': d}, {'G': eg3d(3), 'D': discriminator(4)})
    assert not any(t.source and t.name.endswith('weight') for t in transfers['D'])
    assert torch.equal(d.b4.fc.weight, before['b4.fc.weight'])


@pytest.mark.parametrize('networks, got', [({}, 'none'), ({'E': None}, 'E')])
def test_unknown_networks(networks, got):
    with pytest.raises(ValueError, match=f'^networks: expected some of G, G_ema, D, got {got}$'):
        warm_start(networks, {'G': None})
