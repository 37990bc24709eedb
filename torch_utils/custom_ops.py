# SPDX-License-Identifier: Apache-2.0
"""What every op shares: shape checks, the choice of an implementation, and the build cache of the compiled ones."""

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType

import torch

OPS_FOLDER = Path(__file__).parent / 'ops'
BUILD_DIR_VARIABLE = 'NEXT3D_BUILD_DIR'

# No -march=native: a home directory, and the cache in it, is shared by unlike machines. No contraction into fused
# multiply-adds and no fast math: results equal the reference bit for bit. OpenMP is not linked: its symbols are those
# that torch has loaded already, so both share one thread pool.
CXX_FLAGS = ('-O3', '-ffp-contract=off', '-fopenmp')
CUDA_FLAGS = ('-O3', '--fmad=false')
CUDA_SUFFIX = '_cuda'  # Plugin NAME_cuda is made of NAME_cuda.cpp, checks and bindings, and NAME.cu, the kernels.
OLDEST_FOR_TRITON = (8, 0)  # Compute capability of its tensor core code.
COMPILER_LINES = 5  # How many of the compiler's last lines an error quotes.

_logger = logging.getLogger(__name__)
_results: dict[str, ModuleType | str] = {}  # Per plugin: the loaded module, or the reason why there is none.
_results_lock = threading.Lock()


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError, naming the argument, unless `tensor` has this shape; None in `shape` stands for any size."""
    if tensor.ndim != len(shape) or any(size not in (None, actual) for size, actual in zip(shape, tensor.shape)):
        expected = ', '.join('*' if size is None else str(size) for size in shape)
        raise ValueError(f'{name}: expected [{expected}], got {list(tensor.shape)}')


def pick_impl(op: str, impl: str | None, device: torch.device,
              backends: Mapping[str, Callable[[torch.device], str | None]] = MappingProxyType({})) -> str:
    """Choose the implementation of an op; a named one is obeyed or refused, never swapped.

    op:       name of the op, for messages.
    impl:     'ref', a name in `backends`, or None: the first usable backend, else 'ref'.
    device:   where the op's tensors are.
    backends: compiled backends in order of preference; each function returns None where its backend is usable on a
              device, else the reason in words.
    Raises RuntimeError if the named backend is not usable, ValueError if there is no such name.
    """
    if impl is None:
        return next((name for name, problem in backends.items() if problem(device) is None), 'ref')
    if impl == 'ref':
        return impl
    if impl not in backends:
        names = ', '.join(repr(name) for name in ['ref', *backends])
        raise ValueError(f'{op}: expected impl to be one of {names} or None, got {impl!r}')
    reason = backends[impl](device)
    if reason is not None:
        raise RuntimeError(f'{op}: impl {impl!r} cannot be used: {reason}')
    return impl


def cpu_backend(name: str) -> Callable[[torch.device], str | None]:
    """Return the usability function, as `pick_impl` takes it, of a backend that is a plugin for CPU tensors."""
    def problem(device: torch.device) -> str | None:
        return plugin_problem(name) if device.type == 'cpu' else f'it takes CPU tensors, got {device.type}'
    return problem


def cuda_backend(name: str) -> Callable[[torch.device], str | None]:
    """Return the usability function, as `pick_impl` takes it, of a backend that is a plugin for CUDA tensors."""
    def problem(device: torch.device) -> str | None:
        return plugin_problem(name) if device.type == 'cuda' else f'it takes CUDA tensors, got {device.type}'
    return problem


def triton_problem(device: torch.device) -> str | None:
    """Return why Triton's kernels cannot run on a device; None where they can."""
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed'
    if is_interpreted():
        return None
    if device.type != 'cuda':
        return f'it takes CUDA tensors, got {device.type}'
    if torch.cuda.get_device_capability(device) < OLDEST_FOR_TRITON:
        return 'it needs compute capability 8.0'
    return None


def is_interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, which takes CPU tensors: for tests."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def plugin(name: str) -> ModuleType:
    """Return the compiled module of torch_utils/ops/NAME.cpp, building it where the cache has none.

    NAME_cuda has its kernels in NAME.cu beside NAME_cuda.cpp and needs a CUDA device and its compiler.

    Raises RuntimeError with the reason of `plugin_problem`, ValueError if there is no such source.
    """
    problem = plugin_problem(name)
    if problem is not None:
        raise RuntimeError(f'{name}: {problem}')
    return _results[name]


def plugin_problem(name: str) -> str | None:
    """Return why `plugin(name)` cannot work here, or None; the first call builds, later ones remember the answer.

    Where compilation failed, the first line is the error and the compiler's last lines follow.
    """
    with _results_lock:
        if name not in _results:
            _results[name] = _load_or_explain(name)
        result = _results[name]
    return result if isinstance(result, str) else None


def _load_or_explain(name: str) -> ModuleType | str:
    sources = _sources(name)
    if os.name != 'posix':
        return 'compiled ops need a POSIX system'
    if shutil.which(_compiler()[0]) is None:
        return f'no C++ compiler: {_compiler()[0]} not found (set CXX)'
    if _is_cuda(sources) and not torch.cuda.is_available():
        return 'no CUDA device'
    try:
        if _is_cuda(sources) and _nvcc() is None:
            raise RuntimeError('no CUDA compiler: nvcc not found (set CUDA_HOME)')
        library = _library_path(name, sources)
        if not library.exists() and _ninja_folder() is None:
            return 'no ninja found (pip install ninja)'
        return _import_library(library) if library.exists() else _build_locked(library, sources)
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        problem, tail = _explain(str(error))
        _logger.warning('%s: %s; without it the reference implementation is used', name, problem)
        _logger.debug('%s', error)
        return '\n'.join([problem, *tail])


def _sources(name: str) -> list[Path]:
    paths = [OPS_FOLDER / f'{name}.cpp']
    if name.endswith(CUDA_SUFFIX):
        paths.append(OPS_FOLDER / f'{name.removesuffix(CUDA_SUFFIX)}.cu')
    if not all(path.exists() for path in paths):
        raise ValueError(f'name: expected a source among {OPS_FOLDER}/*.cpp, got {name!r}')
    return paths


def _nvcc() -> str | None:
    folders = [os.environ.get('PATH', ''), os.path.join(os.environ.get('CUDA_HOME', '/usr/local/cuda'), 'bin')]
    return shutil.which('nvcc', path=os.pathsep.join(folders))


def _compiler() -> list[str]:
    return shlex.split(os.environ.get('CXX', '')) or ['c++']


def _ninja_folder() -> str | None:
    # The wheel puts ninja beside python, a folder that is not on PATH where the environment is not activated.
    program = shutil.which('ninja') or shutil.which('ninja', path=sysconfig.get_path('scripts'))
    return program and os.path.dirname(program)


def _library_path(name: str, sources: list[Path]) -> Path:
    """Name the cached library after everything that its content depends on, so that a stale one is never found."""
    version = subprocess.run([*_compiler(), '--version'], capture_output=True, text=True, check=True).stdout
    facts = [*_compiler(), version, *CXX_FLAGS, sysconfig.get_config_var('EXT_SUFFIX'), torch.__version__,
             torch.version.git_version]
    if _is_cuda(sources):
        facts += [*CUDA_FLAGS, torch.version.cuda, str(torch.cuda.get_device_capability()),
                  os.environ.get('TORCH_CUDA_ARCH_LIST', '')]
    headers = sorted(path for path in OPS_FOLDER.iterdir() if path.suffix in ('.h', '.cuh'))
    facts += [text for path in [*sources, *headers] for text in (path.name, path.read_text())]
    key = f'{name}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}'
    return _build_root() / key / f'{key}.so'


def _is_cuda(sources: list[Path]) -> bool:
    return any(path.suffix == '.cu' for path in sources)


def _build_root() -> Path:
    cache = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(os.environ.get(BUILD_DIR_VARIABLE) or Path(cache, 'next3d', 'build')).absolute()


def _build_locked(library: Path, sources: list[Path]) -> ModuleType:
    """Compile in one process at a time; a process that waited loads what the first one made.

    Each attempt has a folder of its own, and the finished library is renamed out of it: where the library is, it is
    complete. What a killed process leaves (half-written files, torch's own lock file) is in the attempt's folder,
    which the next holder of the lock removes; the lock itself dies with its process.
    """
    library.parent.mkdir(parents=True, exist_ok=True)
    with _file_lock(library.parent / 'lock'):
        if library.exists():
            return _import_library(library)
        for leftover in library.parent.glob('attempt-*'):
            shutil.rmtree(leftover, ignore_errors=True)
        attempt = Path(tempfile.mkdtemp(prefix='attempt-', dir=library.parent))
        try:
            module = _compile(library.stem, sources, attempt)
            os.replace(attempt / library.name, library)
            return module
        finally:
            shutil.rmtree(attempt, ignore_errors=True)


def _compile(module_name: str, sources: list[Path], folder: Path) -> ModuleType:
    from torch.utils import cpp_extension  # Takes half a second to import: only where something is compiled.
    _logger.warning('Compiling %s, once; this takes up to a minute', ', '.join(path.name for path in sources))
    with _on_path(_ninja_folder()):
        return cpp_extension.load(
            module_name, [str(path) for path in sources], extra_cflags=list(CXX_FLAGS),
            extra_cuda_cflags=list(CUDA_FLAGS), build_directory=str(folder))


def _import_library(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl  # POSIX only, and this module is imported everywhere.
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _on_path(folder: str) -> Iterator[None]:
    before = os.environ.get('PATH', '')
    os.environ['PATH'] = os.pathsep.join([before, folder])
    try:
        yield
    finally:
        os.environ['PATH'] = before


def _explain(message: str) -> tuple[str, list[str]]:
    """Return the line of a failure's message that names it, and the last lines of a longer one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r'\berror\s?:', line)]
    return (errors or lines or ['unknown error'])[0], lines[-COMPILER_LINES:] if errors else []
