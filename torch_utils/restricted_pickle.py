# SPDX-License-Identifier: Apache-2.0
"""Reads pickles of networks from strangers: an allow-list decides what a name means; nothing named is imported or run.

Every global that a pickle may name is answered with a function or class of this file, which checks its arguments and
builds inert data: dicts, `PickledTensor`, `PickledArray`, `PickledObject`. All other names are refused.
"""

import io
import math
import pickle
import struct
import warnings
import zipfile
from typing import Any, BinaryIO

import numpy as np
import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # First number of a torch.save stream before the zip format.
LEGACY_PROTOCOL = 1001
MAX_DIMENSIONS = 64
MAX_VALUES, MAX_DEPTH = 200_000, 50  # Of one structure: what a file may nest in few bytes has no other limit.
STORAGE_DTYPES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'UntypedStorage': torch.uint8,
}
NUMPY_KINDS = 'biuf'
NUMPY_ITEM_SIZES = (1, 2, 4, 8)
# What a damaged pickle raises while it is read.
DAMAGE = (EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError, AssertionError, struct.error)
DAMAGE += (RecursionError, MemoryError)
PERSISTENCE = ('torch_utils.persistence', '_reconstruct_persistent_obj')
TORCH_MODULES = {
    ('torch.nn.modules.container', 'ModuleList'),
    ('torch.nn.modules.container', 'ModuleDict'),
    ('torch.nn.modules.container', 'Sequential'),
    ('torch.nn.modules.activation', 'Softplus'),
}
# Modules that published files pickle without the persistence wrapper, under any module path of the two packages.
PLAIN_MODULES = {'OSGDecoder', 'ImportanceRenderer', 'MipRayMarcher2', 'RaySampler', 'Pytorch3dRasterizer'}
PLAIN_MODULE_PACKAGES = {'training', 'training_avatar_texture'}


class UnsafePickleError(pickle.UnpicklingError):
    """The pickle names something outside the allow-list; nothing of it has run."""


class PickledObject:
    """An object of a class that is known by name only: its class name, module and pickled state."""

    def __init__(self, class_name: str = '', module: str = ''):
        self.class_name, self.module, self.state = class_name, module, {}

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f'state of {self.class_name}: expected a dict, got {type(state).__name__}')
        self.state = state


class _Sealed(type):
    """Metaclass of the classes a pickle can reach: their attributes cannot be set."""

    def __setattr__(cls, name, value):
        raise pickle.UnpicklingError(f'the file tries to change {cls.__name__}.{name}')


class _Function:
    """A callable that a pickle can reach: it has no attributes to set."""

    __slots__ = ('_call',)

    def __init__(self, call):
        object.__setattr__(self, '_call', call)

    def __call__(self, *args):
        return self._call(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f'the file tries to change a function ({name})')

    def __setstate__(self, state):
        raise pickle.UnpicklingError('the file tries to change a function')


class _StorageType:
    """A torch storage class named in a pickle."""

    __slots__ = ('dtype',)

    def __init__(self, dtype):
        object.__setattr__(self, 'dtype', dtype)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError(f'the file tries to change a storage type ({name})')


def load(file: BinaryIO, objects: frozenset[tuple[str, str]] = frozenset(), encoding: str = 'ASCII') -> Any:
    """Return the content of a pickle as inert data; `plain` turns its tensors and arrays into real ones.

    objects: further classes (module, name) that the file may name; their instances come as `PickledObject`, and the
    forms in which older protocols write objects and bytes are read too. encoding: of the strings of Python 2, among
    them the bytes of its arrays; those need 'latin1'.
    Containers may hold themselves, or one another many times over: `plain` refuses those. Raises UnsafePickleError
    naming the first global that is not allowed, pickle.UnpicklingError for a file that is truncated or not a pickle.
    """
    return _load(file, _Unpickler, objects, encoding)


def one_line(error: Exception) -> str:
    """Return a message with the line breaks and control characters that a file may put into it escaped."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(error))


def plain(value: Any) -> Any:
    """Return a value of a loaded pickle as a tree, with tensors and arrays, also inside containers, made.

    Tensors and arrays are views of what was read: copy them before writing to them. Raises pickle.UnpicklingError for
    structures that hold themselves or are too large.
    """
    return _plain(value, iter(range(MAX_VALUES)), MAX_DEPTH)


def _plain(value, budget, depth):
    if next(budget, None) is None or depth == 0:
        raise pickle.UnpicklingError('a structure that is nested too deep or repeats itself')
    if isinstance(value, int) and abs(value) >= 2**64:  # Python refuses to print the longest ones.
        raise pickle.UnpicklingError('a number of more than 64 bits')
    if isinstance(value, PickledTensor):
        return value.tensor()
    if isinstance(value, PickledArray):
        return value.array()
    if isinstance(value, dict):
        return {key: _plain(entry, budget, depth - 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_plain(entry, budget, depth - 1) for entry in value]
        return entries if isinstance(value, list) else tuple(entries)
    return value


def _load(file, unpickler, *args):
    try:
        return unpickler(file, *args).load()
    except pickle.UnpicklingError:
        raise
    except DAMAGE as error:
        raise pickle.UnpicklingError(f'damaged or not a pickle ({type(error).__name__}: {error})') from error


class _Tuple(tuple):
    """A tuple that cannot be a key: hashing nested ones takes the C stack, or time exponential in their number."""

    __slots__ = ()
    __hash__ = None


class _Opcodes(dict):
    """The instructions of a pickle; those that no network file needs are refused."""

    def __missing__(self, code):
        raise pickle.UnpicklingError(f'damaged or not a pickle (instruction {bytes([code])!r})')


def _sealing(load_tuple):
    def load_sealed_tuple(unpickler):
        load_tuple(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return load_sealed_tuple


_OPCODES = _Opcodes(pickle._Unpickler.dispatch)
for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _OPCODES[_code[0]] = _sealing(_OPCODES[_code[0]])
for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.FROZENSET, pickle.BYTEARRAY8):
    del _OPCODES[_code[0]]


class _StorageUnpickler(pickle._Unpickler):
    """Reads pickles that may name storage types and nothing else: those inside a storage.

    The unpickler in Python is the base because the one in C takes memory for memo numbers that a file makes up.
    """

    dispatch = _OPCODES

    def find_class(self, module, name):
        if module == 'torch' and name in STORAGE_DTYPES or (module, name) == ('torch.storage', 'UntypedStorage'):
            return _StorageType(STORAGE_DTYPES[name])
        raise UnsafePickleError(f'it names {module}.{name}, which no network file needs; nothing was run')

    def persistent_load(self, pid):
        raise pickle.UnpicklingError('it refers to data outside the file')


class _Unpickler(_StorageUnpickler):
    """Reads the pickle of a file; `objects` are classes that it may name besides those of network files."""

    def __init__(self, file, objects=frozenset(), encoding='ASCII'):
        super().__init__(file, encoding=encoding)
        self.objects = objects

    def find_class(self, module, name):
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if self.objects and (module, name) in _OLD_FORMS:
            return _OLD_FORMS[module, name]
        is_plain = name in PLAIN_MODULES and module.split('.')[0] in PLAIN_MODULE_PACKAGES
        if is_plain or (module, name) in TORCH_MODULES or (module, name) in self.objects:
            return _object_class(name, module)
        return super().find_class(module, name)


def _object_class(name, module):
    """Return a class for objects pickled by their class: the pickle makes it with __new__ and gives it its state."""

    def new(cls, *args):
        return PickledObject(name, module)

    return _Sealed(name, (), {'__new__': new, '__slots__': ()})


def _persistent_object(meta):
    """Stand in for a published persistent object: keep class name, module name and state, ignore its source text."""
    if not isinstance(meta, dict) or not isinstance(meta.get('class_name'), str):
        raise pickle.UnpicklingError('persistent object without a class name')
    made = PickledObject(meta['class_name'], PERSISTENCE[0])
    made.__setstate__(meta.get('state', {}))
    return made


# --- torch -----------------------------------------------------------------------------------------------------------


class _Storage:
    """The numbers of a storage: in a torch.save stream they follow the pickle that names it."""

    def __init__(self, dtype, length):
        self.dtype, self.length, self.numbers = dtype, length, None

    def __setstate__(self, state):
        raise pickle.UnpicklingError('the file tries to change a storage')

    def fill(self, data):
        """Take the numbers from bytes without copying them; nothing writes to them."""
        if len(data) != self.length * self.dtype.itemsize:
            raise pickle.UnpicklingError(f'storage of {len(data)} bytes, expected {self.length * self.dtype.itemsize}')
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='The given buffer is not writable')
            self.numbers = torch.frombuffer(data, dtype=self.dtype) if self.length else torch.empty(0, dtype=self.dtype)
        return self


class PickledTensor:
    """A pickled tensor or parameter; `tensor` makes it."""

    def __init__(self, storage, offset, size, stride):
        numbers = [offset, *size, *stride]
        if not isinstance(storage, _Storage) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise pickle.UnpicklingError('tensor with a damaged layout')
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise pickle.UnpicklingError('tensor with a damaged layout')
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def __setstate__(self, state):
        raise pickle.UnpicklingError('the file tries to change a tensor')

    def tensor(self) -> torch.Tensor:
        """Return a view of the storage; UnpicklingError where the layout leaves it or repeats its numbers."""
        numbers = self.storage.numbers
        if numbers is None:
            raise pickle.UnpicklingError('storage without data')
        count = math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        if count > numbers.numel() or (count and last >= numbers.numel()):
            raise pickle.UnpicklingError(f'tensor of shape {list(self.size)} in a storage of {numbers.numel()} numbers')
        try:
            return numbers.as_strided(self.size, self.stride, self.offset)
        except RuntimeError as error:  # Strides of dimensions that hold one number or none may be absurd.
            raise pickle.UnpicklingError('tensor with a damaged layout') from error


def _rebuild_tensor(storage, offset, size, stride, *_):
    return PickledTensor(storage, offset, size, stride)


def _rebuild_parameter(data, *_):
    if not isinstance(data, PickledTensor):
        raise pickle.UnpicklingError('parameter that is not a tensor')
    return data


def _storage_from_bytes(data):
    """Return the storage in what torch.save wrote for it (zip or legacy stream)."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError('storage that is not bytes')
    loaded = _load_zip(data) if data[:2] == b'PK' else _load_legacy(data)
    if not isinstance(loaded, _Storage) or loaded.numbers is None:
        raise pickle.UnpicklingError('storage that holds something else')
    return loaded


def _new_storage(pid):
    """Return (key, empty storage) of a persistent id ('storage', type, key, location, length[, None])."""
    kind, storage_type, key, _, length, *view = pid
    if any(part is not None for part in view):
        raise pickle.UnpicklingError('storage that is a part of another')
    if kind != 'storage' or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
        raise pickle.UnpicklingError('damaged reference to a storage')
    if type(length) is not int or length < 0:
        raise pickle.UnpicklingError('damaged reference to a storage')
    return key, _Storage(storage_type.dtype, length)


class _LegacyUnpickler(_StorageUnpickler):
    """The object pickle of a legacy stream: the storages' numbers follow the pickles."""

    def __init__(self, file, storages):
        super().__init__(file)
        self.storages = storages

    def persistent_load(self, pid):
        key, storage = _new_storage(pid)
        return self.storages.setdefault(key, storage)


def _load_legacy(data):
    stream = io.BytesIO(data)
    if [_load(stream, _StorageUnpickler) for _ in range(2)] != [LEGACY_MAGIC, LEGACY_PROTOCOL]:
        raise pickle.UnpicklingError('storage in an unknown format')
    system = _load(stream, _StorageUnpickler)
    if not isinstance(system, dict) or not system.get('little_endian', True):
        raise pickle.UnpicklingError('storage in an unknown byte order')
    storages = {}
    loaded = _load(stream, _LegacyUnpickler, storages)
    keys = _load(stream, _StorageUnpickler)
    position = stream.tell()
    for key in keys:
        if key not in storages:
            raise pickle.UnpicklingError('storage data without a storage')
        storage = storages[key]
        (length,) = struct.unpack_from('<q', data, position)
        if length != storage.length:
            raise pickle.UnpicklingError('storage of another length than announced')
        start, position = position + 8, position + 8 + length * storage.dtype.itemsize
        storage.fill(memoryview(data)[start:position])
    return loaded


class _ZipUnpickler(_StorageUnpickler):
    """The object pickle of torch's zip format: the storage is a member of the archive."""

    def __init__(self, file, archive, root):
        super().__init__(file)
        self.archive, self.root, self.has_read = archive, root, False

    def persistent_load(self, pid):
        key, storage = _new_storage(pid)
        if self.has_read:
            raise pickle.UnpicklingError('storage that refers to several')
        self.has_read = True
        return storage.fill(_zip_member(self.archive, f'{self.root}data/{key}'))


def _load_zip(data):
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = next((n for n in archive.namelist() if n.endswith('data.pkl')), None)
            if name is None:
                raise pickle.UnpicklingError('storage in an unknown zip format')
            root = name.removesuffix('data.pkl')
            if f'{root}byteorder' in archive.namelist() and _zip_member(archive, f'{root}byteorder') != b'little':
                raise pickle.UnpicklingError('storage in an unknown byte order')
            return _load(io.BytesIO(_zip_member(archive, name)), _ZipUnpickler, archive, root)
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise pickle.UnpicklingError(f'damaged storage ({error})') from error


def _zip_member(archive, name):
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise pickle.UnpicklingError('compressed or encrypted storage')
    return archive.read(info)


# --- numpy -----------------------------------------------------------------------------------------------------------


class _NumpyDtype:
    """numpy.dtype by its string; the pickled state only sets the byte order."""

    def __init__(self, text):
        self.text, self.order = text, '<'

    def __setstate__(self, state):
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ('<', '>', '=', '|'):
            raise pickle.UnpicklingError('damaged numpy type')
        self.order = state[1]

    def resolve(self):
        kind, size = self.text[:1], self.text[1:]
        if kind not in NUMPY_KINDS or not size.isdigit() or int(size) not in NUMPY_ITEM_SIZES:
            raise pickle.UnpicklingError(f'numpy type {self.text!r}')
        return np.dtype(self.order.replace('|', '<') + self.text)


class PickledArray:
    """A pickled numpy array; `array` makes it."""

    def __init__(self):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def array(self) -> np.ndarray:
        """Return the array, read-only."""
        try:
            _, shape, dtype, is_fortran, data = self.state
            data = data.encode('latin1') if isinstance(data, str) else data  # Python 2's bytes are strings.
            return np.frombuffer(data, dtype=dtype.resolve()).reshape(shape, order='F' if is_fortran else 'C')
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise pickle.UnpicklingError(f'damaged numpy array ({error})') from error


def _numpy_dtype(text, *_):
    if not isinstance(text, str):
        raise pickle.UnpicklingError('damaged numpy type')
    return _NumpyDtype(text)


def _numpy_scalar(dtype, data):
    if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError('damaged numpy number')
    return np.frombuffer(data, dtype=dtype.resolve(), count=1)[0].item()


def _numpy_reconstruct(*_):
    return PickledArray()


# --- the rest --------------------------------------------------------------------------------------------------------


def _object_of_old_protocol(kind, *_):
    """Stand in for copy_reg._reconstructor, by which protocols 0 and 1 make objects."""
    if not isinstance(kind, _Sealed) or issubclass(kind, dict):
        raise pickle.UnpicklingError('damaged object')
    return kind()


def _bytes_of_old_protocol(text, encoding='latin1'):
    """Stand in for _codecs.encode, by which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise pickle.UnpicklingError('damaged bytes')
    return text.encode('latin1')


class _Dict(dict, metaclass=_Sealed):
    """A dict of another class, of which only the entries matter: attributes could hide its methods."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


_REBUILD_TENSOR, _NUMPY_SCALAR = _Function(_rebuild_tensor), _Function(_numpy_scalar)
_NUMPY_RECONSTRUCT, _SET = _Function(_numpy_reconstruct), _Function(lambda items=(): set(items))
_ALLOWED = {
    PERSISTENCE: _Function(_persistent_object),
    ('collections', 'OrderedDict'): _Dict,
    ('builtins', 'set'): _SET,
    ('__builtin__', 'set'): _SET,
    ('dnnlib.util', 'EasyDict'): _Dict,
    ('numpy', 'dtype'): _Function(_numpy_dtype),
    ('numpy', 'ndarray'): _Function(lambda *_: PickledArray()),
    ('torch', 'Size'): _Function(lambda sizes=(): _Tuple(sizes)),
    ('torch._utils', '_rebuild_tensor_v2'): _REBUILD_TENSOR,
    ('torch._utils', '_rebuild_tensor'): _REBUILD_TENSOR,
    ('torch._utils', '_rebuild_parameter'): _Function(_rebuild_parameter),
    ('torch.storage', '_load_from_bytes'): _Function(_storage_from_bytes),
}
for _package in ('numpy.core', 'numpy._core'):
    _ALLOWED[f'{_package}.multiarray', 'scalar'] = _NUMPY_SCALAR
    _ALLOWED[f'{_package}.multiarray', '_reconstruct'] = _NUMPY_RECONSTRUCT
_OLD_FORMS = {
    ('copy_reg', '_reconstructor'): _Function(_object_of_old_protocol),
    ('__builtin__', 'object'): _object_class('object', '__builtin__'),
    ('_codecs', 'encode'): _Function(_bytes_of_old_protocol),
}
