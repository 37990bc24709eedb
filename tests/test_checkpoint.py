# SPDX-License-Identifier: Apache-2.0
"""Snapshots: bit-exact round trips, their content, damaged ones, and disks that refuse them; also tiny networks."""

import dataclasses
import io
import json
import os
import pickle
import pickletools
import random
import subprocess
import sys

import pytest
import torch

import legacy
import training
from geometry import cameras
from legacy import NetworkFileError
from training import checkpoint
from training.checkpoint import SnapshotError, network_from_data, network_to_data, save_snapshot
from training.config import DiscriminatorConfig, EG3DConfig, MappingConfig, Next3DConfig
from training.discriminator import Discriminator
from training.generator import EG3DGenerator, Next3DGenerator
from training.volume.render import SamplingConfig

# --- tiny networks ---------------------------------------------------------------------------------------------------

SMALL = dict(
    z_dim=6,
    w_dim=8,
    channel_base=64,
    channel_max=8,
    plane_resolution=8,
    superresolution='SuperresolutionHybrid2X',
    mapping=MappingConfig(num_layers=2, embed_features=4, layer_features=5),
)
OWN = dict(plane_channels=4, decoder_hidden=6, sr_channels=(4, 4))  # What published files do not vary.
EG3D = EG3DConfig(**SMALL, **OWN, num_fp16_res=2, conv_clamp=100.5, avg_camera_radius=1.5)
NEXT3D = Next3DConfig(
    **SMALL,
    **OWN,
    texture_resolution=16,
    mouth_resolution=8,
    mouth_lowest=4,
    blending_lowest=4,
    plane_layout='aligned',
    blend_planes='front',
    has_unused_mappings=False,
    orth_scale=4.5,
    orth_shift=(0.5, 0.25, -0.125),
    sampling=SamplingConfig(
        near='auto', far='auto', num_depths=5, num_importance=0, plane_axes=((1, 0), (2, 0), (1, 2))
    ),
)
DISCRIMINATORS = {
    'single': DiscriminatorConfig(kind='single', img_resolution=16, channel_base=64, channel_max=8, num_fp16_res=0),
    'dual': DiscriminatorConfig(kind='dual', img_resolution=16, channel_base=64, channel_max=8, disc_c_noise=0.5),
    'dual_label': DiscriminatorConfig(
        kind='dual_label',
        c2_dim=50,
        img_resolution=8,
        channel_base=64,
        channel_max=8,
        mapping=MappingConfig(num_layers=3),
    ),
    'no label': DiscriminatorConfig(c_dim=0, img_resolution=8, channel_base=64, channel_max=8, conv_clamp=None),
}
FACES = [[0, 1, 2], [0, 2, 3]]
UV_FACES = [[0, 1, 2], [3, 4, 5]]
UVS = [[0, 0], [1, 0], [1, 1], [0, 0], [1, 1], [0, 1]]


def randomised(network):
    """Return a network without a constant that could agree by accident, in eval mode."""
    torch.manual_seed(1)
    for name, x in network.state_dict().items():
        if x.is_floating_point() and name not in checkpoint.TOPOLOGY_BUFFERS:
            x.copy_(torch.randn(x.shape))
    return network.eval().requires_grad_(False)


def eg3d(config=EG3D):
    """Return a tiny EG3D generator."""
    return randomised(EG3DGenerator(config))


def next3d(config=NEXT3D):
    """Return a tiny Next3D generator over a quad."""
    mask = torch.linspace(0, 1, config.texture_resolution**2).reshape(1, 1, *2 * [config.texture_resolution])
    return randomised(Next3DGenerator(config, torch.tensor(FACES), torch.tensor(UVS), torch.tensor(UV_FACES), mask))


def discriminator(kind='dual'):
    """Return a tiny discriminator."""
    return randomised(Discriminator(DISCRIMINATORS[kind]))


NETWORKS = {'eg3d': eg3d, 'next3d': next3d}
NETWORKS.update({kind: lambda kind=kind: discriminator(kind) for kind in DISCRIMINATORS})


def assert_same(actual, expected):
    """Assert that two networks have class, config, tensors, mask and output in common, bit for bit."""
    assert type(actual) is type(expected) and actual.config == expected.config
    own, other = actual.state_dict(), expected.state_dict()
    assert list(own) == list(other)
    for name, x in own.items():
        assert x.dtype == other[name].dtype and torch.equal(x, other[name]), name
    if isinstance(actual, Next3DGenerator):
        assert torch.equal(actual.uv_face_mask, expected.uv_face_mask) and actual.num_vertices == expected.num_vertices


def load(data, **kwargs):
    """Return the networks of a file's bytes."""
    return legacy.load_network_pkl(io.BytesIO(data), **kwargs)


def refused(data, match='', **kwargs):
    """Assert that a file is refused in one line that holds `match`; return the line."""
    with pytest.raises(NetworkFileError) as caught:
        load(data, **kwargs)
    message = str(caught.value)
    assert message.isprintable() and match in message, message
    return message


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', NETWORKS)
def test_round_trip_is_exact(kind, tmp_path):
    network = NETWORKS[kind]()
    key = 'D' if isinstance(network, Discriminator) else 'G_ema'
    save_snapshot(tmp_path / 'a.pkl', {key: network})
    loaded = legacy.load_network_pkl(tmp_path / 'a.pkl')
    assert list(loaded) == [key]
    assert_same(loaded[key], network)
    assert not loaded[key].training and not any(x.requires_grad for x in loaded[key].parameters())
    save_snapshot(tmp_path / 'b.pkl', loaded)
    assert (tmp_path / 'b.pkl').read_bytes() == (tmp_path / 'a.pkl').read_bytes()


def test_loaded_networks_give_the_same_pictures(tmp_path):
    save_snapshot(tmp_path / 'a.pkl', {'G': eg3d(), 'G_ema': next3d(), 'D': discriminator()})
    nets = legacy.load_network_pkl(tmp_path / 'a.pkl')
    c = cameras.make_label(cameras.look_at_pose(cameras.FRONTAL, cameras.FRONTAL), cameras.intrinsics())
    z, v = torch.randn(1, 6), torch.randn(1, 4 + 68, 3) * 0.05
    for key, original, mesh in (('G', eg3d(), ()), ('G_ema', next3d(), (v,))):
        results = [g.synthesis(g.mapping(z, c), c, *mesh, neural_rendering_resolution=8) for g in (nets[key], original)]
        assert all(torch.equal(results[0][name], results[1][name]) for name in ('image', 'image_raw', 'image_depth'))
        assert results[0]['image'].std() > 0
    images = {'image': torch.randn(1, 3, 16, 16), 'image_raw': torch.randn(1, 3, 8, 8)}
    assert torch.equal(nets['D'](images, c[:1]), discriminator()(images, c))


def test_loaded_networks_own_their_memory(tmp_path):
    save_snapshot(tmp_path / 'a.pkl', {'G_ema': next3d()})
    file = (tmp_path / 'a.pkl').read_bytes()
    first = load(file)['G_ema']
    for x in [*first.state_dict().values(), first.uv_face_mask]:
        x.fill_(1)
    assert_same(load(file)['G_ema'], next3d())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('kind', ['eg3d', 'next3d', 'dual'])
def test_storage_in_another_precision(kind, dtype, tmp_path):
    network = NETWORKS[kind]()
    save_snapshot(tmp_path / 'a.pkl', {'G': network}, dtype=dtype)
    loaded = legacy.load_network_pkl(tmp_path / 'a.pkl')['G']
    for name, x in loaded.state_dict().items():
        expected = network.state_dict()[name]
        assert x.dtype == expected.dtype
        assert torch.equal(x, expected.to(dtype).float() if x.is_floating_point() else expected), name
    full = pickle.dumps(network_to_data(network))
    assert ((tmp_path / 'a.pkl').stat().st_size < 0.6 * len(full)) == (dtype != torch.float32)


def test_weights_that_a_precision_cannot_hold_are_not_stored(tmp_path):
    network = NETWORKS['eg3d']()
    network.backbone.mapping.fc0.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match='dtype: expected one that holds all weights, got torch.float16 for 100000'):
        save_snapshot(tmp_path / 'a.pkl', {'G': network}, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    save_snapshot(tmp_path / 'a.pkl', {'G': network}, dtype=torch.bfloat16)


CONFIGS = [EG3D, NEXT3D, EG3DConfig(), Next3DConfig(), DiscriminatorConfig(), *DISCRIMINATORS.values()]


@pytest.mark.parametrize('config', CONFIGS)
def test_configs_survive_json(config):
    data = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(data) == type(config).from_dict(config.to_dict()) == config
    assert hash(type(config).from_dict(data)) == hash(config)


def test_all_fields_of_configs_are_stored():
    assert set(NEXT3D.to_dict()) == {field.name for field in dataclasses.fields(Next3DConfig)}
    assert NEXT3D.to_dict()['sampling']['near'] == 'auto' and NEXT3D.to_dict()['mapping']['embed_features'] == 4


# --- what is in a snapshot -------------------------------------------------------------------------------------------

PLAIN_OPCODES = {
    'PROTO', 'FRAME', 'STOP', 'MARK', 'MEMOIZE', 'BINGET', 'LONG_BINGET', 'EMPTY_DICT', 'SETITEM', 'SETITEMS',
    'EMPTY_LIST', 'APPEND', 'APPENDS', 'EMPTY_TUPLE', 'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'NONE', 'NEWTRUE',
    'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINBYTES',
    'SHORT_BINBYTES', 'BINBYTES8',
}  # fmt: skip


def test_snapshots_name_no_class_and_no_function(tmp_path):
    networks = {'G': eg3d(), 'G_ema': next3d(), 'D': discriminator('dual_label')}
    save_snapshot(tmp_path / 'a.pkl', networks)
    data = (tmp_path / 'a.pkl').read_bytes()
    assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= PLAIN_OPCODES
    content = pickle.loads(data)
    assert (content['format'], content['version']) == ('next3d-snapshot', 1)
    assert {key: content[key]['class_name'] for key in networks} == {
        'G': 'EG3DGenerator', 'G_ema': 'Next3DGenerator', 'D': 'Discriminator',
    }  # fmt: skip


def test_only_builds_what_is_asked_for(tmp_path):
    path = tmp_path / 'a.pkl'
    save_snapshot(path, {'G': eg3d(), 'G_ema': eg3d()})
    content = pickle.loads(path.read_bytes())
    content['G'] = {'damaged': True}
    data = pickle.dumps(content)
    assert list(load(data, only=('G_ema',))) == ['G_ema']
    refused(data, 'G: damaged network')
    refused(data, 'holds none of D', only=('D',))


@pytest.mark.parametrize('networks', [{}, {'generator': eg3d}, {'G': eg3d, 'E': eg3d}])
def test_other_keys_are_not_saved(networks, tmp_path):
    with pytest.raises(ValueError, match='^networks: expected some of G, D, G_ema, got'):
        save_snapshot(tmp_path / 'a.pkl', {key: make() for key, make in networks.items()})
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_stored(tmp_path):
    network = eg3d().double()
    with pytest.raises(ValueError, match='tensor of type float64: expected one of float32'):
        save_snapshot(tmp_path / 'a.pkl', {'G': network})
    assert not list(tmp_path.iterdir())


# --- damaged snapshots -----------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def content():
    """The content of a snapshot as bytes, to be changed after pickle.loads."""
    return pickle.dumps(
        {
            'format': 'next3d-snapshot',
            'version': 1,
            'G': network_to_data(next3d()),
            'D': network_to_data(discriminator()),
        }
    )


def set_config(**values):
    """Return a change of G's config."""
    return lambda content: content['G']['config'].update(values)


def set_tensor(name, entry):
    """Return a change of one of G's tensors; entry is a function of (dtype, shape, data)."""
    tensors = lambda content: content['G']['tensors']  # noqa: E731
    return lambda content: tensors(content).update({name: entry(*tensors(content)[name])})


def with_itself(container):
    """Return a container that holds itself."""
    container.update(self=container) if isinstance(container, dict) else container.append(container)
    return container


def laughs(depth=60):
    """Return a list of two lists of two lists ..., sixty levels deep, that takes sixty lists only."""
    made = []
    for _ in range(depth):
        made = [made, made]
    return made


FC = 'backbone.mapping.fc0.weight'
DAMAGED = {
    'another version': (
        lambda c: c.update(version=2),
        'snapshot of another version of this project: expected version 1',
    ),
    'no version': (lambda c: c.pop('version'), 'another version'),
    'huge version': (lambda c: c.update(version=10**5000), 'another version'),
    'endless version': (lambda c: c.update(version=laughs()), 'another version'),
    'unknown class': (lambda c: c['G'].update(class_name='Generator'), "KeyError: 'Generator'"),
    'class of the system': (lambda c: c['G'].update(class_name='os.system'), "KeyError: 'os.system'"),
    'class that is a list': (lambda c: c['G'].update(class_name=[1]), 'G: damaged network'),
    'no class': (lambda c: c['G'].pop('class_name'), "KeyError: 'class_name'"),
    'no config': (lambda c: c['G'].pop('config'), "KeyError: 'config'"),
    'no tensors': (lambda c: c['G'].pop('tensors'), "KeyError: 'tensors'"),
    'network that is a text': (lambda c: c.update(G='text'), 'G: damaged network'),
    'network in itself': (lambda c: with_itself(c['G']), 'nested too deep or repeats itself'),
    'config that is a list': (lambda c: c['G'].update(config=[1, 2]), 'G: damaged network'),
    'unknown entries': (set_config(colour=1, beauty=2), 'Next3DConfig: unknown entries beauty, colour'),
    'unknown entries of a part': (set_config(mapping={'depth': 2}), "'depth'"),
    'part that is a number': (set_config(mapping=7), 'G: damaged network'),
    'part that is missing': (set_config(mapping=None), 'G: damaged network'),
    'unknown layout': (set_config(plane_layout='upside down'), 'plane_layout: expected one of'),
    'odd resolution': (set_config(plane_resolution=9), 'plane_resolution: expected a power of two'),
    'width that is a text': (set_config(w_dim='8'), 'G: config that describes no network'),
    'width that is missing': (set_config(w_dim=None), 'G: '),
    'width that is negative': (set_config(w_dim=-8), 'G: '),
    'width that is zero': (set_config(w_dim=0), 'G: '),
    'width that is a fraction': (set_config(w_dim=8.5), 'G: '),
    'width that is endless': (set_config(w_dim=float('inf')), 'G: '),
    'no channels': (set_config(channel_base=0), 'G: '),
    'huge width': (set_config(w_dim=2**31), 'G: config describes a network that is larger than the tensors'),
    'width beyond measure': (set_config(w_dim=2**40), 'config.w_dim: expected a number from -32768 to 2147483648'),
    'huge exponent': (set_config(num_fp16_res=-(10**12)), 'config.num_fp16_res: expected a number from'),
    'large width': (set_config(w_dim=2**24), 'G: config describes a network that is larger than the tensors'),
    'many channels': (set_config(channel_base=2**30, channel_max=2**20), 'larger than the tensors'),
    'many digits': (set_config(channel_base=10**5000, channel_max=10**5000), 'a number of more than 64 bits'),
    'many layers': (
        set_config(mapping={'num_layers': 10**9, 'layer_features': 1}),
        'config describes 1000000000 layers',
    ),
    'large resolution': (set_config(plane_resolution=2**20), 'G: '),
    'enormous resolution': (set_config(plane_resolution=2**2000), 'a number of more than 64 bits'),
    'endless config': (set_config(orth_shift=laughs()), 'nested too deep or repeats itself'),
    'config in itself': (set_config(orth_shift=with_itself([])), 'nested too deep or repeats itself'),
    'bytes in the config': (
        set_config(orth_scale=b'5'),
        'config.orth_scale: expected plain numbers and strings, got bytes',
    ),
    'bytes deep in the config': (
        set_config(avg_camera_pivot=[0, [b'5'], 0]),
        'config.avg_camera_pivot: expected plain',
    ),
    'another class': (lambda c: c['G'].update(class_name='Discriminator'), 'DiscriminatorConfig: unknown entries'),
    'tensor that is a number': (set_tensor(FC, lambda *_: 7), 'G: damaged network'),
    'tensor without data': (set_tensor(FC, lambda dtype, shape, data: (dtype, shape)), 'G: damaged network'),
    'tensor of an unknown type': (set_tensor(FC, lambda dtype, shape, data: ('quint8', shape, data)), "'quint8'"),
    'tensor type that is a list': (set_tensor(FC, lambda dtype, shape, data: ([], shape, data)), 'G: damaged network'),
    'too little data': (set_tensor(FC, lambda dtype, shape, data: (dtype, shape, data[:-1])), 'with other data'),
    'too much data': (set_tensor(FC, lambda dtype, shape, data: (dtype, shape, data + bytes(4))), 'with other data'),
    'data that is a text': (
        set_tensor(FC, lambda dtype, shape, data: (dtype, shape, 'a' * len(data))),
        'with other data',
    ),
    'data that is a list': (
        set_tensor(FC, lambda dtype, shape, data: (dtype, shape, [0] * len(data))),
        'with other data',
    ),
    'negative shape': (set_tensor(FC, lambda dtype, shape, data: (dtype, [-n for n in shape], data)), 'cannot be'),
    'shape that is a number': (set_tensor(FC, lambda dtype, shape, data: (dtype, 3, data)), 'G: damaged network'),
    'shape of fractions': (
        set_tensor(FC, lambda dtype, shape, data: (dtype, [float(n) for n in shape], data)),
        'cannot be',
    ),
    'shape of texts': (set_tensor(FC, lambda dtype, shape, data: (dtype, ['a', 10**11], data)), 'cannot be'),
    'shape of lists': (set_tensor(FC, lambda dtype, shape, data: (dtype, [[1, 2], 10**11], data)), 'cannot be'),
    'huge shape without data': (set_tensor(FC, lambda dtype, shape, data: (dtype, [0, 2**62, 2**62], b'')), 'G: '),
    'shape beyond 64 bits': (set_tensor(FC, lambda dtype, shape, data: (dtype, [0, 2**80], b'')), 'cannot be'),
    'many dimensions': (set_tensor(FC, lambda dtype, shape, data: (dtype, [2**62] * 100_000, data)), 'cannot be'),
    'tensor name that is no text': (
        lambda c: c['G']['tensors'].update({b'a': ('int64', [0], b'')}),
        'name of a tensor',
    ),
    'tensors that are a list': (lambda c: c['G'].update(tensors=[1]), 'G: damaged network'),
    'corners of fractions': (
        set_tensor('faces', lambda d, shape, data: ('float32', shape, data[::2])),
        'mesh topology',
    ),
    'corner that is negative': (
        set_tensor('faces', lambda d, s, data: (d, s, b'\xff' * len(data))),
        'corner that does not',
    ),
    'corner without a UV': (
        set_tensor('uvfaces', lambda d, s, data: (d, s, b'\x06' + data[1:])),
        'corner that does not',
    ),
    'faces of four corners': (set_tensor('faces', lambda d, shape, data: (d, [1, 1, 6], data)), 'mesh topology'),
    'no faces': (set_tensor('faces', lambda d, *_: (d, [1, 0, 3], b'')), 'G: '),
    'faces without a batch': (set_tensor('faces', lambda d, shape, data: (d, [2, 3], data)), 'mesh topology'),
    'faces that are a number': (set_tensor('faces', lambda d, s, data: (d, [], data[:8])), 'G: '),
    'empty batch of faces': (set_tensor('faces', lambda d, s, data: (d, [0, 2, 3], b'')), 'G: '),
    'UVs that are a number': (set_tensor('raw_uvcoords', lambda d, s, data: (d, [], data[:4])), 'G: '),
    'flat mask': (set_tensor('uv_face_mask', lambda d, shape, data: (d, [256], data)), 'mesh topology'),
    'several masks': (set_tensor('uv_face_mask', lambda d, shape, data: (d, [2, 1, 8, 16], data)), 'mesh topology'),
    'no mask': (lambda c: c['G']['tensors'].pop('uv_face_mask'), 'missing: uv_face_mask'),
}


@pytest.mark.parametrize('case', DAMAGED)
def test_damaged_snapshots_are_refused_in_one_line(case, content):
    change, match = DAMAGED[case]
    changed = pickle.loads(content)
    change(changed)
    refused(pickle.dumps(changed), match)


def test_tensors_that_do_not_fit_are_all_named(content):
    changed = pickle.loads(content)
    tensors = changed['D']['tensors']
    names = list(tensors)
    dtype, shape, data = tensors[names[3]]
    del tensors[names[0]], tensors[names[5]]
    tensors.update(
        {'first.extra': tensors[names[1]], 'second.extra': tensors[names[1]], names[3]: (dtype, [1, *shape], data)}
    )
    message = refused(pickle.dumps(changed), 'D: tensors of Discriminator do not fit')
    assert f'missing: {names[0]}, {names[5]};' in message
    assert 'not expected: first.extra, second.extra;' in message
    assert message.endswith(f'of another shape: {names[3]} (expected {shape}, got {[1, *shape]})')


def test_all_tensors_of_a_stranger_are_named(content):
    changed = pickle.loads(content)
    changed['G']['tensors'] = {name: entry for name, entry in changed['G']['tensors'].items() if name in (
        *checkpoint.TOPOLOGY_BUFFERS, 'uv_face_mask')}  # fmt: skip
    message = refused(pickle.dumps(changed), 'missing: ')
    missing = message.split('missing: ')[1].split(', ')
    assert set(missing) == set(next3d().state_dict()) - set(checkpoint.TOPOLOGY_BUFFERS)


def test_messages_stay_in_one_line(content):
    changed = pickle.loads(content)
    changed['D']['tensors']['two\nlines\x1b[2J\u2028\ud800'] = ('float32', [], bytes(4))
    assert r'not expected: two\nlines\x1b[2J\u2028\ud800' in refused(pickle.dumps(changed))


def test_buffers_that_no_forward_reads_are_kept(content):
    changed = pickle.loads(content)
    extra = torch.arange(6).reshape(1, 2, 3)
    changed['G']['tensors']['dense_faces'] = ('int64', [1, 2, 3], extra.numpy().tobytes())
    g = load(pickle.dumps(changed))['G']
    assert torch.equal(g.dense_faces, extra)
    assert torch.equal(network_from_data(network_to_data(g)).dense_faces, extra)


@pytest.mark.parametrize('data', [None, 7, [], {}, {'class_name': 'EG3DGenerator', 'config': {}, 'tensors': {}}])
def test_network_from_data_raises_its_own_error(data):
    with pytest.raises(SnapshotError):
        network_from_data(data)


def test_truncated_and_damaged_snapshots():
    data = pickle.dumps(
        {'format': 'next3d-snapshot', 'version': 1, 'D': network_to_data(discriminator('dual_label'))}, 4
    )
    assert_same(load(data)['D'], discriminator('dual_label'))
    for i in range(50):
        refused(data[: len(data) * i // 50])
    text = [i for i in range(len(data)) if data[i : i + 1].isalpha()]
    random_bytes, outcomes = random.Random(0), set()
    for i in range(400):
        damaged = bytearray(data)
        # Half of the damage falls on names and numbers of the config, which are a small part of the file.
        where = random_bytes.randrange(600) if i % 2 else random_bytes.choice(text)
        damaged[where] = random_bytes.randrange(256)
        try:
            outcomes.add(list(load(bytes(damaged)))[0])
        except NetworkFileError as error:
            assert str(error).isprintable()
            outcomes.add('refused')
    assert outcomes == {'D', 'refused'}


# --- disks -----------------------------------------------------------------------------------------------------------

SAVE_WITH_LIMIT = """
import resource, signal, sys
sys.path[:0] = sys.argv[2:]
import test_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    test_checkpoint.save_snapshot(sys.argv[1], {'G': test_checkpoint.eg3d()})
except OSError as error:
    sys.exit(f'refused {error.errno}')
"""


@pytest.mark.skipif(sys.platform == 'win32', reason='needs limits of POSIX')
def test_full_disk_leaves_nothing_behind(tmp_path):
    path = tmp_path / 'a.pkl'
    path.write_bytes(b'an older snapshot')
    tests = os.path.dirname(__file__)
    command = [sys.executable, '-c', SAVE_WITH_LIMIT, str(path), tests, os.path.dirname(training.__path__[0])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stderr.strip().endswith('refused 27'), run.stderr
    assert [x.name for x in tmp_path.iterdir()] == ['a.pkl'] and path.read_bytes() == b'an older snapshot'


@pytest.mark.parametrize('path', ['missing/a.pkl', 'file/a.pkl', '.'])
def test_folders_that_cannot_be_written_to(path, tmp_path):
    (tmp_path / 'file').write_text('a file, no folder')
    with pytest.raises((OSError, ValueError)):
        save_snapshot(tmp_path / path, {'D': discriminator()})
    assert [x.name for x in tmp_path.iterdir()] == ['file']


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        save_snapshot(tmp_path / 'a.pkl', {'D': discriminator()})
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())
