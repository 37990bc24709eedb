# SPDX-License-Identifier: Apache-2.0
"""Hostile, damaged and old pickles against the unpickler of network files; also the writer that other tests use."""

import collections
import copyreg
import importlib
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

import training
from torch_utils import restricted_pickle
from torch_utils.restricted_pickle import LEGACY_MAGIC, LEGACY_PROTOCOL, PickledObject, UnsafePickleError, plain

# --- a writer of pickles that name what does not exist here ----------------------------------------------------------


@dataclass(eq=False)
class Name:
    """A global, written without looking it up."""

    module: str
    name: str


@dataclass(eq=False)
class Call:
    """function(*args), then dictionary entries, then a state (BUILD); `opcode` REDUCE, or NEWOBJ to make instances."""

    function: Any
    args: tuple = ()
    items: dict = field(default_factory=dict)
    state: Any = None
    opcode: bytes = pickle.REDUCE


@dataclass(eq=False)
class Raw:
    """Opcodes as they are."""

    opcodes: bytes


class Writer(pickle._Pickler):
    """A pickler that also writes Name, Call and Raw."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Raw):
            self.write(obj.opcodes)
        elif not isinstance(obj, (Name, Call)):
            super().save(obj, save_persistent_id)
        elif id(obj) in self.memo:
            self.write(self.get(self.memo[id(obj)][0]))
        else:
            (self._save_name if isinstance(obj, Name) else self._save_call)(obj)

    def _save_name(self, obj):
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f'{obj.module}\n{obj.name}\n'.encode())
        self.memoize(obj)

    def _save_call(self, obj):
        self.save(obj.function)
        self.save(obj.args)
        self.write(obj.opcode)
        self.memoize(obj)
        for entry in obj.items.items():
            for part in entry:
                self.save(part)
            self.write(pickle.SETITEM)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)


def write(content, protocol=4) -> bytes:
    """Return the pickle of a content that may hold Name, Call and Raw."""
    stream = io.BytesIO()
    Writer(stream, protocol).dump(content)
    return stream.getvalue()


FLOAT_STORAGE = Name('torch', 'FloatStorage')


def legacy_stream(parts: dict | None = None, data: bytes = bytes(12), **storage) -> bytes:
    """Return what torch.save wrote of a storage before the zip format; `parts` replaces some of its five pickles."""
    pickles = {
        'magic': LEGACY_MAGIC,
        'protocol': LEGACY_PROTOCOL,
        'system': {'protocol_version': LEGACY_PROTOCOL, 'little_endian': True, 'type_sizes': {'int': 4}},
        'object': persistent_id(**storage),
        'keys': ['7'],
    }
    pickles.update(parts or {})
    length = storage.get('length', 3)
    return b''.join(write(part, protocol=2) for part in pickles.values()) + struct.pack('<q', length) + data


def persistent_id(kind=FLOAT_STORAGE, key='7', length=3, view=(None,)):
    """Return the reference to a storage in a torch.save stream."""
    return Raw(write(('storage', kind, key, 'cpu', length, *view), protocol=2)[2:-1] + pickle.BINPERSID)


def zip_stream(content=None, data=bytes(12), compression=zipfile.ZIP_STORED, **members) -> bytes:
    """Return what torch.save writes of a storage in the zip format."""
    stream = io.BytesIO()
    files = {'data.pkl': write(persistent_id(view=()) if content is None else content, 2), 'data/7': data, **members}
    with zipfile.ZipFile(stream, 'w', compression) as archive:
        for name, content in files.items():
            archive.writestr(f'archive/{name}', content)
    return stream.getvalue()


def storage(stream: bytes) -> Call:
    """Return a torch storage as tensors pickle it."""
    return Call(Name('torch.storage', '_load_from_bytes'), (stream,))


def tensor(size, stride, offset=0, numbers=None, function='_rebuild_tensor_v2') -> Call:
    """Return a float32 tensor in the layout of torch pickles."""
    numbers = np.arange(3) if numbers is None else numbers
    stream = legacy_stream(data=np.asarray(numbers, '<f4').tobytes(), length=len(numbers))
    extra = (False, collections.OrderedDict()) if function == '_rebuild_tensor_v2' else ()
    return Call(Name('torch._utils', function), (storage(stream), offset, size, stride, *extra))


def numpy_dtype(text, order='<') -> Call:
    """Return a numpy dtype as numpy pickles it."""
    return Call(Name('numpy', 'dtype'), (text, False, True), state=(3, order, None, None, None, -1, -1, 0))


def numpy_array(package, shape, dtype, data, is_fortran=False) -> Call:
    """Return a numpy array as NumPy 1 (package numpy.core) and 2 (numpy._core) pickle it."""
    empty = (Name('numpy', 'ndarray'), (0,), b'b')
    state = (1, shape, dtype, is_fortran, data)
    return Call(Name(f'{package}.multiarray', '_reconstruct'), empty, state=state)


def persistent(class_name, state) -> Call:
    """Return an object of a class with the published persistence wrapper, whose source text must not be run."""
    source = 'raise RuntimeError("embedded source must not be executed")'
    meta = {'type': 'class', 'version': 6, 'module_src': source, 'class_name': class_name, 'state': state}
    return Call(Name('torch_utils.persistence', '_reconstruct_persistent_obj'), (meta,))


def module_object(module, name, state) -> Call:
    """Return a module that is pickled by its class."""
    return Call(Name(module, name), state=state, opcode=pickle.NEWOBJ)


def load(data: bytes):
    """Return the content of a pickle, made plain."""
    return plain(restricted_pickle.load(io.BytesIO(data)))


def refused(data: bytes, match: str = '', error=pickle.UnpicklingError):
    """Assert that a pickle is refused with a message that holds `match`, and that nothing else is raised."""
    with pytest.raises(error) as caught:
        load(data)
    assert match in str(caught.value)


# --- names -----------------------------------------------------------------------------------------------------------

FORBIDDEN = [
    'os system', 'posix system', 'nt system', 'os popen', 'subprocess Popen', 'subprocess check_output', 'pty spawn',
    'builtins eval', 'builtins exec', 'builtins getattr', 'builtins __import__', 'builtins open', 'builtins object',
    'builtins dict', 'builtins frozenset', '__builtin__ eval', '__builtin__ apply', 'pickle loads', 'marshal loads',
    'runpy run_path', 'importlib import_module', 'webbrowser open', 'ctypes CDLL', 'types CodeType', 'shutil rmtree',
    'functools partial', 'operator attrgetter', 'operator methodcaller', 'copyreg _reconstructor', 'codecs encode',
    'copy_reg _reconstructor', '_codecs encode', 'collections defaultdict', 'numpy load', 'numpy fromfile',
    'numpy.core.multiarray fromfile', 'numpy._core.multiarray frombuffer', 'numpy.testing._private.utils runstring',
    'torch load', 'torch Tensor', 'torch.hub load', 'torch.serialization load', 'torch.jit load', 'torch.storage load',
    'torch._utils _rebuild_parameter_with_state', 'torch.nn.modules.module Module', 'torch.nn.modules.activation ReLU',
    'torch_utils.persistence persistent_class', 'torch_utils.persistence _src_to_module', 'dnnlib.util open_url',
    'dnnlib.util EasyDict.__init__', 'training os', 'training.evil system', 'training.generator EG3DGenerator',
    'training.triplane OSGDecoder.forward', 'training_evil OSGDecoder', 'evil.training OSGDecoder', 'OSGDecoder a',
    'collections OrderedDict.__init__.__globals__', 'collections OrderedDict.__class__', 'numpy dtype.__class__',
    'torch_utils.restricted_pickle _ALLOWED', 'torch_utils.restricted_pickle PickledObject', 'legacy load_network_pkl',
    'torch.FloatStorage __new__', 'torch FloatStorage.__new__', 'torch.storage _load_from_bytes.__globals__',
]  # fmt: skip


def named(module, name):
    """Return pickles that name a global in every way that pickles have."""
    long = [pickle.BINUNICODE + struct.pack('<I', len(text)) + text.encode() for text in (module, name)]
    return {
        'global': b'\x80\x02' + pickle.GLOBAL + f'{module}\n{name}\n.'.encode(),
        'stack global': b'\x80\x04' + b''.join(long) + pickle.STACK_GLOBAL + b'.',
        'inst': pickle.MARK + pickle.INST + f'{module}\n{name}\n.'.encode(),
        'reduce': write(Call(Name(module, name), ('text',)), 0),
        'in a container': write({'G': [Call(Name(module, name), ('text',), opcode=pickle.NEWOBJ)]}, 5),
    }


@pytest.mark.parametrize('name', FORBIDDEN)
def test_names_outside_the_allow_list_are_refused_by_name(name):
    before = set(sys.modules)
    for data in named(*name.split()).values():
        refused(data, f'names {name.replace(" ", ".")},', UnsafePickleError)
    assert name.split()[0] not in set(sys.modules) - before


INNER = ['magic', 'protocol', 'system', 'object', 'keys']


INNER_FORBIDDEN = ['posix system', 'builtins eval', 'collections OrderedDict', 'torch.storage _load_from_bytes']


@pytest.mark.parametrize('name', INNER_FORBIDDEN)
def test_pickles_inside_storages_may_name_storage_types_alone(name):
    call = Call(Name(*name.split()), ())
    hostile = [legacy_stream({part: call}) for part in INNER]
    hostile += [legacy_stream({part: {'a': [call]}}) for part in INNER]
    hostile += [legacy_stream(kind=call), zip_stream(call), zip_stream(persistent_id(kind=call, view=()))]
    for stream in hostile:
        refused(write(storage(stream)), f'names {name.replace(" ", ".")},', UnsafePickleError)


class Touch:
    """Creates a file or a folder when a careless unpickler reads it."""

    def __init__(self, path, way):
        self.path, self.way = str(path), way

    def __reduce__(self):
        ways = {
            'os.system': (os.system, (f'touch {self.path}',)),
            'exec': (exec, (f'open({self.path!r}, "w").close()',)),
            'mkdir': (os.mkdir, (self.path,)),
            'state': (collections.OrderedDict, (), {'a': Touch(self.path, 'mkdir')}),
            'items': (collections.OrderedDict, (), None, None, iter([('a', Touch(self.path, 'mkdir'))])),
        }
        return ways[self.way]


@pytest.mark.parametrize('way', ['os.system', 'exec', 'mkdir', 'state', 'items'])
def test_nothing_runs(way, tmp_path):
    marker = tmp_path / 'marker'
    hostile = [pickle.dumps({'G': Touch(marker, way)}, protocol) for protocol in range(6)]
    inner = pickle.dumps(Touch(marker, way), 2)[2:-1]
    hostile += [write(storage(legacy_stream({part: Raw(inner)}))) for part in INNER]
    hostile += [write(storage(zip_stream(Raw(inner))))]
    for data in hostile:
        refused(data, error=UnsafePickleError)
        assert not marker.exists()
    pickle.loads(hostile[2])
    assert marker.exists(), 'the pickle is harmless: this test shows nothing'


def test_nothing_is_imported(tmp_path, monkeypatch):
    marker = tmp_path / 'marker'
    (tmp_path / 'evil_probe.py').write_text(f'open({str(marker)!r}, "w").close()\nclass OSGDecoder: pass\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(training, '__path__', [*training.__path__, str(tmp_path)])
    for data in named('evil_probe', 'OSGDecoder').values():
        refused(data, 'evil_probe.OSGDecoder', UnsafePickleError)
    made = load(write(module_object('training.evil_probe', 'OSGDecoder', {'net': 1})))
    assert type(made) is PickledObject and made.state == {'net': 1} and made.class_name == 'OSGDecoder'
    assert not marker.exists() and not {'evil_probe', 'training.evil_probe'} & set(sys.modules)
    importlib.import_module('training.evil_probe')
    del sys.modules['training.evil_probe']
    assert marker.exists(), 'the module is harmless: this test shows nothing'


# --- attempts to change what names mean ------------------------------------------------------------------------------

ALLOWED = {
    'torch_utils.persistence _reconstruct_persistent_obj': ({'class_name': 'A', 'state': {}},),
    'collections OrderedDict': (),
    'builtins set': (),
    '__builtin__ set': ([1, 2],),
    'dnnlib.util EasyDict': (),
    'numpy dtype': ('f4', False, True),
    'numpy ndarray': ((0,),),
    'numpy.core.multiarray scalar': (numpy_dtype('f4'), bytes(4)),
    'numpy._core.multiarray scalar': (numpy_dtype('f4'), bytes(4)),
    'numpy.core.multiarray _reconstruct': (0,),
    'numpy._core.multiarray _reconstruct': (0,),
    'torch._utils _rebuild_tensor_v2': tensor((3,), (1,)).args,
    'torch._utils _rebuild_tensor': tensor((3,), (1,), function='_rebuild_tensor').args,
    'torch._utils _rebuild_parameter': (tensor((3,), (1,)), True, {}),
    'torch.storage _load_from_bytes': (legacy_stream(),),
    'torch FloatStorage': (),
    'torch Size': ([1, 2],),
    'torch.storage UntypedStorage': (),
    'torch.nn.modules.container ModuleList': (),
    'torch.nn.modules.activation Softplus': (),
    'training.triplane OSGDecoder': (),
    'training_avatar_texture.triplane_next3d OSGDecoder': (),
    'training.volumetric_rendering.renderer ImportanceRenderer': (),
}
HIDDEN = (
    '__call__ __class__ __dict__ __init__ __new__ __setstate__ __setattr__ __getattribute__ __bases__ __name__ _call '
    'call get items keys state class_name module dtype length numbers fill storage size stride offset tensor array '
    'text order resolve update __setitem__'
).split()


def good_content():
    """Return one of everything that network files hold."""
    shared = torch.arange(12.0)
    return {
        'tensors': [shared.reshape(3, 4), shared[2:8].reshape(2, 3).t(), torch.nn.Parameter(shared[:2].half())],
        'dicts': [
            collections.OrderedDict(a=1),
            Call(Name('dnnlib.util', 'EasyDict'), opcode=pickle.NEWOBJ, items={'b': 2}),
        ],
        'numpy': [numpy_array('numpy.core', (2,), numpy_dtype('i4'), struct.pack('<2i', 5, 6)), np.float32(0.5)],
        'module': module_object('training.triplane', 'OSGDecoder', {'hidden_dim': 64, 'names': {'x', 'y'}}),
        'network': persistent('MappingNetwork', {'_init_args': (512, 25), '_modules': {}}),
        'shape': torch.Size([2, 3]),
    }


def described(value):
    """Return a loaded content as text that shows every number in it."""
    if isinstance(value, PickledObject):
        return f'{value.class_name} {described(value.state)}'
    if isinstance(value, dict):
        return {key: described(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(entry) for entry in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f'{value.dtype} {value.tolist()}'
    return sorted(value, key=str) if isinstance(value, set) else value


GOOD = write(good_content())
GOOD_LOADED = {
    'tensors': [
        'torch.float32 [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]]',
        'torch.float32 [[2.0, 5.0], [3.0, 6.0], [4.0, 7.0]]',
        'torch.float16 [0.0, 1.0]',
    ],
    'dicts': [{'a': 1}, {'b': 2}],
    'numpy': ['int32 [5, 6]', 0.5],
    'module': "OSGDecoder {'hidden_dim': 64, 'names': ['x', 'y']}",
    'network': "MappingNetwork {'_init_args': [512, 25], '_modules': {}}",
    'shape': [2, 3],
}


@pytest.mark.parametrize('protocol', range(3, 6))
def test_what_network_files_hold_loads(protocol):
    assert described(load(write(good_content(), protocol))) == GOOD_LOADED


def changes(name, args):
    """Return pickles that try to change an allowed global, or an object that it makes."""
    states = [{key: value} for key in HIDDEN for value in (0, Name('builtins', 'set'))]
    states += [(None, state) for state in states] + [({'a': 1}, {'b': 2}), 7, 'text', [1], {}, {1: 2}, (1, 2, 3)]
    for state in states:
        yield [Call(Name(*name), args, state=state)]
        yield [Call(Name(*name), args, state=state, opcode=pickle.NEWOBJ)]
        yield [Name(*name), Raw(write(state, 2)[2:-1] + pickle.BUILD)]
    for follow in (b'K\0K\x01s', b'(K\0K\x01u', b'K\0a', b'(K\0e', b'(K\0\x90', b')}\x92', b')\x81', b'\x85R'):
        for instance in (Name(*name), Call(Name(*name), args)):
            yield [instance, Raw(follow)]
    yield [Raw(pickle.MARK), Name(*name), Raw(b'K\x01' + pickle.OBJ)]


@pytest.mark.parametrize('name', ALLOWED)
def test_files_cannot_change_what_names_mean(name):
    classes = [value for value in vars(restricted_pickle).values() if isinstance(value, type)]
    before = [dict(vars(cls)) for cls in classes]
    table = dict(restricted_pickle._ALLOWED)
    for content in changes(name.split(), ALLOWED[name]):
        try:
            load(b'\x80\x03' + b''.join(write(part, 3)[2:-1] for part in content) + b'.')
        except pickle.UnpicklingError:
            pass
    assert [dict(vars(cls)) for cls in classes] == before and restricted_pickle._ALLOWED == table
    assert described(load(GOOD)) == GOOD_LOADED


CHANGED = {
    'storage': Call(Name('torch.storage', '_load_from_bytes'), (legacy_stream(),), state={'length': 7}),
    'tensor': Call(Name('torch._utils', '_rebuild_tensor_v2'), tensor((3,), (1,)).args, state={'size': (2**40,)}),
    'function': [Name('builtins', 'set'), Raw(b'}' + pickle.BUILD)],
    'storage type': [Name('torch', 'FloatStorage'), Raw(b'N}X\x05\0\0\0dtypeK\x01s\x86' + pickle.BUILD)],
}


@pytest.mark.parametrize('case', CHANGED)
def test_changes_are_refused(case):
    refused(write(CHANGED[case]), f'the file tries to change a {case}')


@pytest.mark.parametrize('state', [7, None, [1], 'text', ({}, {})])
def test_objects_whose_state_is_no_dict(state):
    refused(write(persistent('A', state)), 'state of A: expected a dict')
    if state is not None:
        refused(write(module_object('training.x', 'OSGDecoder', state)), 'state of OSGDecoder: expected a dict')


@pytest.mark.parametrize('meta', [7, {}, {'class_name': 7}, {'class_name': Name('builtins', 'set')}])
def test_objects_without_a_class_name(meta):
    refused(
        write(Call(Name('torch_utils.persistence', '_reconstruct_persistent_obj'), (meta,))), 'without a class name'
    )


def test_sets_of_both_pythons():
    assert (
        load(write([Call(Name(module, 'set'), ([1, 2],)) for module in ('builtins', '__builtin__')], 2)) == [{1, 2}] * 2
    )


def test_numbers():
    assert load(write([2**64 - 1, 1 - 2**64, True, 0.5])) == [2**64 - 1, 1 - 2**64, True, 0.5]
    for number in (2**64, -(2**64), 10**5000):
        refused(write({'a': [number]}), 'a number of more than 64 bits')


OPCODES = {
    'extension of one byte': (b'\x80\x02\x82\xf0)R.', "instruction b'\\x82'"),
    'extension of two bytes': (b'\x80\x02\x83\xf0\x00)R.', "instruction b'\\x83'"),
    'extension of four bytes': (b'\x80\x02\x84\xf0\x00\x00\x00)R.', "instruction b'\\x84'"),
    'persistent id in text': (b'Pstorage\n.', 'outside the file'),
    'persistent id': (b'\x80\x02(X\x07\x00\x00\x00storagetQ.', 'outside the file'),
    'buffer outside the pickle': (b'\x80\x05\x97.', 'out-of-band'),
    'frozen set': (b'\x80\x04(K\x01\x91.', "instruction b'\\x91'"),
    'byte array': (b'\x80\x05\x96' + struct.pack('<Q', 3) + b'abc.', "instruction b'\\x96'"),
    'unknown opcode': (b'\x80\x04\xff.', "instruction b'\\xff'"),
    'protocol of the future': (b'\x80\x63N.', 'protocol'),
    'call of a number': (b'\x80\x02K\x01)R.', 'damaged'),
    'instance of a number': (b'\x80\x02K\x01)\x81.', 'damaged'),
    'instance of an object': (write([persistent('A', {}), Raw(b')\x81')]), 'damaged'),
    'instance with keywords': (
        write([Name('training.triplane', 'OSGDecoder'), Raw(b')}\x8c\x01aK\x01s\x92')]),
        'damaged',
    ),
    'name that is no text': (b'\x80\x04K\x01K\x02\x93.', 'STACK_GLOBAL requires str'),
    'memo that was never set': (b'\x80\x02h\x07.', 'Memo'),
    'stack underflow': (b'\x80\x02R.', 'damaged'),
    'tuple as a key': (b'\x80\x02}K\x01\x85K\x02s.', 'unhashable'),
    'shape as a key': (b'\x80\x02}ctorch\nSize\n]K\x01a\x85RK\x02s.', 'unhashable'),
    'nested tuple in a set': (write(Call(Name('builtins', 'set'), ([((1, 2), 3)],))), 'unhashable'),
}


@pytest.mark.parametrize('case', OPCODES)
def test_opcodes_that_no_network_file_needs(case, monkeypatch):
    # Another library may have registered an extension, and used it.
    monkeypatch.setitem(copyreg._inverted_registry, 240, ('os', 'system'))
    monkeypatch.setitem(copyreg._extension_cache, 240, os.system)
    refused(*OPCODES[case])


# --- bombs: small files that want much memory, time or stack ---------------------------------------------------------


def laughs(first: bytes, again: bytes) -> bytes:
    """Return a pickle in which each of forty objects holds the one before twice."""
    return b'\x80\x04' + first + b''.join(b'q' + bytes([i]) + (again % {b'i': bytes([i])}) for i in range(40)) + b'.'


def module_laughs():
    """Return nested storages: each holds the one before ten times."""
    stream = legacy_stream()
    for _ in range(12):
        call = storage(stream)
        stream = legacy_stream({'system': [call] + [Call(call.function, call.args) for _ in range(9)]})
    return write(storage(stream))


BOMBS = {  # Those that want memory first: what is noted is how much the peak rises.
    'zip bomb': lambda: write(storage(zip_stream(None, bytes(2**27), zipfile.ZIP_DEFLATED))),
    'zip bomb in the pickle': lambda: write(storage(zip_stream(Raw(b'N0' * 2**26), b'', zipfile.ZIP_DEFLATED))),
    'memo number': lambda: b'\x80\x02}r' + struct.pack('<I', 2**32 - 1) + b'.',
    'memo number of two gigabytes': lambda: b'\x80\x02}r' + struct.pack('<I', 2**27) + b'\x85.',
    'memo number in text': lambda: b'}p99999999999\n\x85.',
    'announced bytes': lambda: b'\x80\x04\x8e' + struct.pack('<Q', 2**40) + b'a.',
    'announced text': lambda: b'\x80\x04\x8d' + struct.pack('<Q', 2**40) + b'a.',
    'announced byte array': lambda: b'\x80\x05\x96' + struct.pack('<Q', 2**33) + b'a.',
    'announced frame': lambda: b'\x80\x04\x95' + struct.pack('<Q', 2**40) + b'N.',
    'announced more than there can be': lambda: b'\x80\x04\x8e' + b'\xff' * 8 + b'a.',
    'number of a million digits': lambda: b'I' + b'9' * 1_000_000 + b'\n.',
    'deep key': lambda: b'\x80\x02})' + b'\x85' * 1_000_000 + b'K\x01s.',
    'key of doubled tuples': lambda: b'\x80\x02}' + laughs(b')', b'h%(i)b\x86')[2:-1] + b'K\x01s.',
    'deep list': lambda: b'\x80\x02' + b']' * 500_000 + b'a' * 499_999 + b'.',
    'deep tuple': lambda: b'\x80\x02)' + b'\x85' * 500_000 + b'.',
    'doubled lists': lambda: laughs(b']', b'0](h%(i)bh%(i)be'),
    'doubled tuples': lambda: laughs(b')', b'h%(i)b\x86'),
    'doubled dicts': lambda: laughs(b'}', b'0}(K\x01h%(i)bK\x02h%(i)bu'),
    'list in itself': lambda: b'\x80\x02]q\x00h\x00a.',
    'dict in itself': lambda: b'\x80\x02}q\x00K\x01h\x00s.',
    'storage in storages': module_laughs,
    'expanded tensor': lambda: write(tensor((2**40,), (0,))),
    'expanded tensor of several dimensions': lambda: write(tensor((2**20, 2**20, 2**20), (0, 0, 0))),
    'tensor a little larger than its storage': lambda: write(tensor((2, 2), (1, 1))),
    'tensor without numbers': lambda: write(tensor((0, 2**62, 2**62), (2**62, 2**62, 1), 2**62)),
    'tensor of many dimensions': lambda: write(tensor((1,) * 100_000, (1,) * 100_000)),
    'tensor sizes of many digits': lambda: write(tensor((2**100_000,) * 99, (0,) * 99)),
    'length of a storage': lambda: write(storage(legacy_stream(length=2**40, data=b''))),
    'length of a storage in a zip': lambda: write(storage(zip_stream(persistent_id(length=2**40, view=()), b''))),
    'numpy array': lambda: write(numpy_array('numpy.core', (2**40, 2**40), numpy_dtype('f4'), bytes(4))),
    'many tensors of one storage': lambda: write([tensor((2**20,), (1,), numbers=np.zeros(2**20))] * 50_000),
}  # fmt: skip
HARMLESS = {
    'memo number', 'memo number of two gigabytes', 'memo number in text', 'announced frame', 'tensor without numbers',
    'many tensors of one storage',
}  # fmt: skip
RUN_BOMBS = """
import io, json, pathlib, pickle, re, sys, time
from torch_utils import restricted_pickle
from torch_utils.restricted_pickle import plain
def peak():
    status = pathlib.Path('/proc/self/status')
    return int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) / 1024 if status.exists() else 0
for name, data in pickle.load(open(sys.argv[1], 'rb')).items():
    start, memory = time.process_time(), peak()
    try:
        plain(restricted_pickle.load(io.BytesIO(data)))
        outcome = 'loaded'
    except Exception as error:
        outcome = type(error).__name__
    seconds = time.process_time() - start
    print(json.dumps([name, outcome, seconds, peak() - memory]), flush=True)
"""


def test_bombs(tmp_path):
    # In a process of its own: what fails here crashes, or takes all memory there is.
    bombs = {name: make() for name, make in BOMBS.items()}
    (tmp_path / 'bombs').write_bytes(pickle.dumps(bombs))
    command = [sys.executable, '-c', RUN_BOMBS, str(tmp_path / 'bombs')]
    root = os.path.dirname(training.__path__[0])
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    results = {name: rest for name, *rest in map(json.loads, run.stdout.splitlines())}
    assert list(results) == list(bombs), f'the process ended with {run.returncode} {run.stderr[-500:]}'
    for name, (outcome, seconds, megabytes) in results.items():
        assert outcome in ('UnpicklingError', 'UnsafePickleError') or (name in HARMLESS and outcome == 'loaded'), name
        assert seconds < 10 and megabytes < 100, f'{name} took {seconds:.1f} s and {megabytes:.0f} MB'


# --- tensors ---------------------------------------------------------------------------------------------------------

NUMBERS = np.arange(24, dtype=np.float32)
LAYOUTS = {  # size, stride, offset: what as_strided of a storage of 24 numbers makes of it, or a refusal
    'contiguous': ((2, 3, 4), (12, 4, 1), 0),
    'transposed': ((4, 6), (1, 4), 0),
    'a part of the storage': ((2, 2), (6, 2), 11),
    'the last number': ((1,), (1,), 23),
    'no dimensions': ((), (), 5),
    'no numbers': ((0, 3), (3, 1), 0),
    'no numbers, past the end': ((0, 3), (3, 1), 24),
    'repeated numbers': ((2, 4), (0, 1), 0),
    'overlapping windows': ((4, 5), (3, 1), 2),
    'one number, large stride': ((1, 4), (10**6, 1), 0),
}
BAD_LAYOUTS = {
    'past the end': ((24,), (1,), 1),
    'offset past the end': ((1,), (1,), 24),
    'last row past the end': ((5, 5), (5, 1), 0),
    'stride past the end': ((2,), (24,), 0),
    'negative offset': ((1,), (1,), -1),
    'negative stride': ((2,), (-1,), 1),
    'negative size': ((-1,), (1,), 0),
    'two negative sizes': ((-2, -3), (3, 1), 0),
    'fewer strides than sizes': ((2, 3), (1,), 0),
    'more strides than sizes': ((2,), (3, 1), 0),
    'size that is no number': (('2',), (1,), 0),
    'size that is a fraction': ((2.0,), (1,), 0),
    'size that is a truth value': ((True,), (1,), 0),
    'size that is no list': (3, (1,), 0),
    'stride that is nothing': ((3,), None, 0),
    'size beyond 64 bits': ((2**64 + 1,), (0,), 0),
    'stride beyond 64 bits': ((2,), (2**64,), 0),
    'stride that wraps around': ((3,), (2**63 - 1,), 0),
    'offset that wraps around': ((2,), (1,), 2**63 - 1),
    'more numbers than the storage': ((5, 5), (0, 1), 0),
}


@pytest.mark.parametrize('function', ['_rebuild_tensor_v2', '_rebuild_tensor'])
@pytest.mark.parametrize('case', LAYOUTS)
def test_layouts(case, function):
    size, stride, offset = LAYOUTS[case]
    made = load(write(tensor(size, stride, offset, NUMBERS, function)))
    assert torch.equal(made, torch.from_numpy(NUMBERS).as_strided(size, stride, offset)) and made.dtype == torch.float32


@pytest.mark.parametrize('case', BAD_LAYOUTS)
def test_layouts_that_leave_the_storage(case):
    size, stride, offset = BAD_LAYOUTS[case]
    for content in (tensor(size, stride, offset, NUMBERS), {'a': [tensor(size, stride, offset, NUMBERS)]}):
        is_layout = all(
            type(n) is int and 0 <= n < 2**63 for n in (offset, *(size if isinstance(size, tuple) else 'a'))
        )
        is_layout = is_layout and stride and len(size) == len(stride) and all(0 <= n < 2**63 for n in stride)
        refused(write(content), 'in a storage of 24 numbers' if is_layout else 'damaged')


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_tensors_of_this_torch(dtype, protocol):
    numbers = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    shared = {'all': numbers, 'part': numbers[1:, ::2], 'turned': numbers.t(), 'none': numbers[:0]}
    made = load(pickle.dumps(shared, protocol))
    assert made.keys() == shared.keys()
    assert all(torch.equal(made[key], shared[key]) and made[key].dtype == dtype for key in shared)


def test_parameters_and_dtypes_that_are_not_known():
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    made = load(pickle.dumps(parameter))
    assert torch.equal(made, parameter) and not made.requires_grad
    for dtype in (torch.complex64, torch.uint16):
        with pytest.raises(UnsafePickleError, match='names torch'):
            load(pickle.dumps(torch.zeros(2, dtype=dtype)))
    with pytest.raises(pickle.UnpicklingError, match='parameter that is not a tensor'):
        load(write(Call(Name('torch._utils', '_rebuild_parameter'), (1, True, {}))))


FLOATS = np.array([1, -2, 0.5], dtype='<f4').tobytes()
HALVES = np.array([1, -2, 0.5], dtype='<f2').tobytes()
STREAMS = {
    'torch 0.4 to 1.5': (legacy_stream(data=FLOATS), (1, -2, 0.5)),
    'without view metadata': (legacy_stream(data=FLOATS, view=()), (1, -2, 0.5)),
    'half': (legacy_stream(data=HALVES, kind=Name('torch', 'HalfStorage')), (1, -2, 0.5)),
    'bfloat16': (legacy_stream(data=FLOATS[2:4] * 3, kind=Name('torch', 'BFloat16Storage')), (1, 1, 1)),
    'untyped, torch.storage': (legacy_stream(data=b'\1\2\3', kind=Name('torch.storage', 'UntypedStorage')), (1, 2, 3)),
    'untyped, torch': (legacy_stream(data=b'\1\2\3', kind=Name('torch', 'UntypedStorage')), (1, 2, 3)),
    'no word on byte order': (legacy_stream({'system': {}}, data=FLOATS), (1, -2, 0.5)),
    'zip': (zip_stream(data=FLOATS), (1, -2, 0.5)),
    'zip with byte order': (zip_stream(data=FLOATS, byteorder=b'little'), (1, -2, 0.5)),
}
BAD_STREAMS = {
    'empty': b'',
    'another magic number': legacy_stream({'magic': 1}),
    'another protocol': legacy_stream({'protocol': 1000}),
    'big-endian': legacy_stream({'system': {'little_endian': False}}),
    'no system': legacy_stream({'system': 7}),
    'number instead of a storage': legacy_stream({'object': 7}),
    'list instead of a storage': legacy_stream({'object': [persistent_id()]}),
    'storage without data': legacy_stream({'keys': []}),
    'data of another storage': legacy_stream({'keys': ['8']}),
    'key that is no key': legacy_stream({'keys': [[]]}),
    'keys that are a number': legacy_stream({'keys': 7}),
    'too little data': legacy_stream(data=bytes(11)),
    'another length': legacy_stream(length=2)[:-20] + struct.pack('<q', 3) + bytes(12),
    'negative length': legacy_stream(length=-1),
    'length that is no number': legacy_stream({'object': persistent_id(length='3')}),
    'part of another storage': legacy_stream(view=(('9', 1, 2),)),
    'type that is a text': legacy_stream(kind='FloatStorage'),
    'reference to a module': legacy_stream({'object': Raw(write(('module', 1, 2, 3), 2)[2:-1] + pickle.BINPERSID)}),
    'reference that is a number': legacy_stream({'object': Raw(b'K\x01' + pickle.BINPERSID)}),
    'reference that is a text': legacy_stream({'object': Raw(b'U\x05abcde' + pickle.BINPERSID)}),
    'zip of something else': zip_stream([1, 2]),
    'zip without a pickle': zip_stream().replace(b'data.pkl', b'data.pkk'),
    'zip without the data': zip_stream().replace(b'data/7', b'data/8'),
    'zip with too little data': zip_stream(data=bytes(8)),
    'zip that is big-endian': zip_stream(byteorder=b'big'),
    'zip with a wrong checksum': zip_stream(data=b'checked data').replace(b'checked', b'changed'),
    'zip of several storages': zip_stream([persistent_id(view=())] * 2),
    'zip that is compressed': zip_stream(None, bytes(12), zipfile.ZIP_DEFLATED),
    'zip that is truncated': zip_stream()[:-30],
    'zip of an unknown method': zip_stream().replace(b'PK\1\2\x14\3\x14\0\0\0\0\0', b'PK\1\2\x14\3\x14\0\0\0\x63\0'),
    'zip that is encrypted': zip_stream().replace(b'PK\1\2\x14\3\x14\0\0\0', b'PK\1\2\x14\3\x14\0\1\0'),
    'zip of the future': zip_stream().replace(b'PK\1\2\x14\3\x14\0', b'PK\1\2\x14\3\xff\0'),
}


@pytest.mark.parametrize('case', STREAMS)
def test_storage_layouts(case):
    stream, numbers = STREAMS[case]
    for protocol in (3, 4):
        made = load(write(Call(Name('torch._utils', '_rebuild_tensor_v2'), (storage(stream), 0, (3,), (1,))), protocol))
        assert tuple(made.tolist()) == numbers


@pytest.mark.filterwarnings('ignore:TypedStorage is deprecated')
@pytest.mark.parametrize('compact', [False, True])
def test_storage_as_this_torch_saves_it(compact):
    stream = io.BytesIO()
    torch.save(torch.tensor([1.0, -2.0, 0.5]).storage(), stream, _use_new_zipfile_serialization=compact)
    made = load(write(Call(Name('torch._utils', '_rebuild_tensor_v2'), (storage(stream.getvalue()), 1, (2,), (1,)))))
    assert made.tolist() == [-2, 0.5]


@pytest.mark.parametrize('case', BAD_STREAMS)
def test_damaged_storages(case):
    assert list(BAD_STREAMS.values()).count(BAD_STREAMS[case]) == 1 and BAD_STREAMS[case] != zip_stream()
    refused(write(storage(BAD_STREAMS[case])))


@pytest.mark.parametrize('value', [None, 7, 'text', [1], {}])
def test_storages_that_are_not_bytes(value):
    refused(write(storage(value)), 'storage that is not bytes')


def test_storages_in_a_zip_are_one():
    refused(write(storage(BAD_STREAMS['zip of several storages'])), 'refers to several')


def test_tensors_cannot_share_the_memory_of_others():
    data = write([tensor((3,), (1,)), tensor((3,), (1,), numbers=[7, 8, 9])])
    first, second = load(data)
    again = load(data)
    assert first.tolist() == again[0].tolist() == [0, 1, 2] and second.tolist() == [7, 8, 9]


# --- numpy -----------------------------------------------------------------------------------------------------------

PACKAGES = ['numpy.core', 'numpy._core']


@pytest.mark.parametrize('package', PACKAGES)
@pytest.mark.parametrize('order', '<>|=')
def test_numpy_of_both_versions(package, order):
    mark = '>' if order == '>' else '<'
    numbers = np.arange(6, dtype=f'{mark}i4').reshape(2, 3)
    dtype = numpy_dtype('i4', order)
    made = load(write(numpy_array(package, (2, 3), dtype, numbers.tobytes())))
    assert np.array_equal(made, numbers) and made.shape == (2, 3)
    turned = load(write(numpy_array(package, (3, 2), dtype, numbers.tobytes(), is_fortran=True)))
    assert np.array_equal(turned, numbers.T)
    number = np.array([-5], dtype=f'{mark}i4').tobytes()
    assert load(write(Call(Name(f'{package}.multiarray', 'scalar'), (dtype, number)))) == -5


@pytest.mark.parametrize('dtype', ['f8', 'f4', 'f2', 'i8', 'i1', 'u1', 'b1'])
def test_numpy_of_this_version(dtype):
    numbers = np.array([[0, 1], [2, 3]]).astype(dtype)
    made = load(pickle.dumps([numbers, numbers[0, 1], np.asfortranarray(numbers), np.zeros((0, 3), dtype)], 4))
    assert np.array_equal(made[0], numbers) and np.array_equal(made[2], numbers) and made[3].shape == (0, 3)
    assert made[0].dtype == numbers.dtype and made[1] == numbers[0, 1] and type(made[1]) in (float, int, bool)


@pytest.mark.parametrize('package', PACKAGES)
def test_damaged_numpy(package):
    f4 = numpy_dtype('f4')
    arrays = [((2, 2), f4, bytes(12)), ((3,), f4, bytes(11)), ((2**40,), f4, bytes(12)), ((3,), f4, 'text')]
    arrays += [((3,), f4, [1, 2, 3]), (('3',), f4, bytes(12)), ((3,), 'f4', bytes(12)), ((-1, -1), f4, bytes(12))]
    arrays += [((3,), None, bytes(12)), (None, f4, 7)]
    texts = ['O8', 'V8', 'U2', 'S8', 'M8', 'c8', 'f16', 'f3', '', 'f', 'f\u00b2', 'f4,f4', 'i4\0', '4f']
    arrays += [((1,), numpy_dtype(text), bytes(16)) for text in texts]
    for shape, dtype, data in arrays:
        refused(write(numpy_array(package, shape, dtype, data)), 'numpy')
    scalar = Name(f'{package}.multiarray', 'scalar')
    for args in [(f4, bytes(3)), (f4, b''), (f4, 'text'), ('f4', bytes(4)), (numpy_dtype('O8'), [1]), (f4,), ()]:
        refused(write(Call(scalar, args)))
    for state in ((3,), 7, (3, '!'), (3, None), (3, ['<']), {'order': '>'}):
        refused(write(Call(Name('numpy', 'dtype'), ('f4',), state=state)), 'damaged numpy type')
    refused(write(Call(Name('numpy', 'dtype'), (Name('builtins', 'set'),))), 'damaged numpy type')
    refused(write(Call(Name('numpy', 'ndarray'), ((1,), f4))), 'damaged numpy array')


# --- damage ----------------------------------------------------------------------------------------------------------

NOT_PICKLES = {
    'empty': b'',
    'text': b'This is a readme.\n',
    'html': b'<!DOCTYPE html><html><body>Quota exceeded</body></html>',
    'zip': zip_stream(),
    'png': b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR',
    'gzip': b'\x1f\x8b\x08\0\0\0\0\0',
    'zeros': bytes(1000),
    'git lfs': b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n',
}


@pytest.mark.parametrize('case', NOT_PICKLES)
def test_files_that_are_no_pickles(case):
    refused(NOT_PICKLES[case])


def test_text_files_are_refused(tmp_path):
    (tmp_path / 'text').write_text('text')
    with open(tmp_path / 'text') as file, pytest.raises(pickle.UnpicklingError):
        restricted_pickle.load(file)


def test_truncated_pickles():
    for length in sorted({len(GOOD) * i // 50 for i in range(50)} | set(range(len(GOOD) - 20, len(GOOD)))):
        refused(GOOD[:length])


def test_damaged_pickles_load_or_are_refused():
    random_bytes = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(4000):
        data = bytearray(GOOD)
        for _ in range(random_bytes.choice([1, 1, 2, 10])):
            data[random_bytes.randrange(len(data))] = random_bytes.randrange(256)
        try:
            described(load(bytes(data)))
            outcomes['loaded'] += 1
        except pickle.UnpicklingError as error:
            outcomes[type(error).__name__] += 1
    assert set(outcomes) == {'loaded', 'UnpicklingError', 'UnsafePickleError'}
