# SPDX-License-Identifier: Apache-2.0
"""Reads pickles of networks from strangers: an allow-list decides what a name means, and nothing named is imported or run.

Every global that a pickle may name is answered with a function or class of this file, which checks its arguments and
builds inert data: dicts, `PickledTensor`, `PickledArray`, `PickledObject`. All other names are refused.
"""

import io
import math
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO

import numpy as np
import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # First number of a torch.save stream before the zip format.
LEGACY_PROTOCOL = 1001
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
PERSISTENCE = ('torch_utils.persistence', '_reconstruct_persistent_obj')
TORCH_MODULES = {
    ('torch.nn.modules.container', 'ModuleList'),
    ('torch.nn.modules.container', 'ModuleDict'),
    ('torch.nn.modules.container', 'Sequential'),
    ('torch.nn.modules.activation', 'Softplus'),
}
# Modules that published files pickle without the persistence wrapper, under any module path of the two packages.
PLAIN_MODULES = {'OSGDecoder', 'ImportanceRenderer', 'MipRayMarcher2', 'RaySampler'}
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


def load(file: BinaryIO) -> Any:
    """Return the content of a pickle as inert data; `plain` turns its tensors and arrays into real ones.

    Raises UnsafePickleError naming the first global that is not allowed, pickle.UnpicklingError for a file that is
    truncated or not a pickle.
    """
    return _load(file, _Unpickler)


def plain(value: Any) -> Any:
    """Return a value of a loaded pickle with tensors and arrays, also inside containers, made."""
    if isinstance(value, PickledTensor):
        return value.tensor()
    if isinstance(value, PickledArray):
        return value.array()
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(entry) for entry in value)
    return value


def _load(file, unpickler, *args):
    try:
        return unpickler(file, *args).load()
    except pickle.UnpicklingError:
        raise
    except (EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise pickle.UnpicklingError(f'damaged or not a pickle ({type(error).__name__}: {error})') from error
    except (RecursionError, MemoryError, UnicodeDecodeError) as error:
        raise pickle.UnpicklingError(f'damaged pickle ({type(error).__name__})') from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _ALLOWED[module, name]
        except KeyError:
            pass
        if module == 'torch' and name in STORAGE_DTYPES or (module, name) == ('torch.storage', 'UntypedStorage'):
            return _StorageType(STORAGE_DTYPES[name])
        is_plain = name in PLAIN_MODULES and module.split('.')[0] in PLAIN_MODULE_PACKAGES
        if is_plain or (module, name) in TORCH_MODULES:
            return _object_class(name, module)
        raise UnsafePickleError(f'it names {module}.{name}, which no network file needs; nothing was run')

    def persistent_load(self, pid):
        raise pickle.UnpicklingError('it refers to data outside the file')


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
        if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
            raise pickle.UnpicklingError('tensor with a damaged layout')
        if len(size) != len(stride):
            raise pickle.UnpicklingError('tensor with a damaged layout')
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def __setstate__(self, state):
        raise pickle.UnpicklingError('the file tries to change a tensor')

    def tensor(self) -> torch.Tensor:
        """Return a contiguous copy; UnpicklingError where the layout leaves the storage."""
        numbers = self.storage.numbers
        if numbers is None:
            raise pickle.UnpicklingError('storage without data')
        if not math.prod(self.size):
            return numbers.new_empty(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        if last >= numbers.numel():
            raise pickle.UnpicklingError(f'tensor of shape {list(self.size)} in a storage of {numbers.numel()} numbers')
        return numbers.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


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
    """Return (key, empty storage) of a persistent id ('storage', type, key, location, length, ...)."""
    kind, storage_type, key, _, length = pid[:5]
    if kind != 'storage' or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
        raise pickle.UnpicklingError('damaged reference to a storage')
    if type(length) is not int or length < 0:
        raise pickle.UnpicklingError('damaged reference to a storage')
    return key, _Storage(storage_type.dtype, length)


class _LegacyUnpickler(_Unpickler):
    """The object pickle of a legacy stream: the storages' numbers follow the pickles."""

    def __init__(self, file, storages):
        super().__init__(file)
        self.storages = storages

    def persistent_load(self, pid):
        key, storage = _new_storage(pid)
        return self.storages.setdefault(key, storage)


def _load_legacy(data):
    stream = io.BytesIO(data)
    if _load(stream, _Unpickler) != LEGACY_MAGIC or _load(stream, _Unpickler) != LEGACY_PROTOCOL:
        raise pickle.UnpicklingError('storage in an unknown format')
    system = _load(stream, _Unpickler)
    if not isinstance(system, dict) or not system.get('little_endian', True):
        raise pickle.UnpicklingError('storage in an unknown byte order')
    storages = {}
    loaded = _load(stream, _LegacyUnpickler, storages)
    keys = _load(stream, _Unpickler)
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


class _ZipUnpickler(_Unpickler):
    """The object pickle of torch's zip format: storages are members of the archive."""

    def __init__(self, file, archive, root):
        super().__init__(file)
        self.archive, self.root = archive, root

    def persistent_load(self, pid):
        key, storage = _new_storage(pid)
        return storage.fill(self.archive.read(f'{self.root}data/{key}'))


def _load_zip(data):
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = next((n for n in archive.namelist() if n.endswith('data.pkl')), None)
            if name is None:
                raise pickle.UnpicklingError('storage in an unknown zip format')
            return _load(io.BytesIO(archive.read(name)), _ZipUnpickler, archive, name[: -len('data.pkl')])
    except zipfile.BadZipFile as error:
        raise pickle.UnpicklingError(f'damaged storage ({error})') from error


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
        """Return the array, in C order."""
        _, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, _NumpyDtype) or not isinstance(data, bytes):
            raise pickle.UnpicklingError('damaged numpy array')
        flat = np.frombuffer(data, dtype=dtype.resolve())
        return flat.reshape(shape, order='F' if is_fortran else 'C').copy(order='C')


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


class _EasyDict(dict, metaclass=_Sealed):
    """A dict with attribute access, of which only the dict matters."""

    __slots__ = ()

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)


_REBUILD_TENSOR, _NUMPY_SCALAR = _Function(_rebuild_tensor), _Function(_numpy_scalar)
_NUMPY_RECONSTRUCT, _SET = _Function(_numpy_reconstruct), _Function(lambda items=(): set(items))
_ALLOWED = {
    PERSISTENCE: _Function(_persistent_object),
    ('collections', 'OrderedDict'): OrderedDict,
    ('builtins', 'set'): _SET,
    ('__builtin__', 'set'): _SET,
    ('dnnlib.util', 'EasyDict'): _EasyDict,
    ('numpy', 'dtype'): _Function(_numpy_dtype),
    ('numpy', 'ndarray'): _Function(lambda *_: PickledArray()),
    ('torch._utils', '_rebuild_tensor_v2'): _REBUILD_TENSOR,
    ('torch._utils', '_rebuild_tensor'): _REBUILD_TENSOR,
    ('torch._utils', '_rebuild_parameter'): _Function(_rebuild_parameter),
    ('torch.storage', '_load_from_bytes'): _Function(_storage_from_bytes),
}
for _package in ('numpy.core', 'numpy._core'):
    _ALLOWED[f'{_package}.multiarray', 'scalar'] = _NUMPY_SCALAR
    _ALLOWED[f'{_package}.multiarray', '_reconstruct'] = _NUMPY_RECONSTRUCT
