# SPDX-License-Identifier: Apache-2.0
"""Shape checks, choice of implementation, and the build cache: concurrent, interrupted and failing builds."""

import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from torch_utils import custom_ops
from torch_utils.custom_ops import check_shape, cpu_backend, cuda_backend, pick_impl, plugin, plugin_problem

ROOT = pathlib.Path(__file__).resolve().parents[1]
CPU = torch.device('cpu')

# The C API alone, so that it compiles in a second.
TINY_SOURCE = '''
#include <Python.h>
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods};
#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&definition); }
'''

# A compiler that logs that it was called, and waits while a file exists.
COMPILER = '''#!/bin/sh
case "$*" in *tiny.cpp*) echo compiled >> {folder}/log; while [ -e {folder}/hold ]; do sleep 0.05; done;; esac
exec c++ "$@"
'''

CALL_PLUGIN = '''
import sys, pathlib
from torch_utils import custom_ops
custom_ops.OPS_FOLDER = pathlib.Path(sys.argv[1])
print(custom_ops.plugin('tiny').answer())
'''


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder with the tiny source, a build folder and a compiler of its own; nothing cached in this process."""
    (tmp_path / 'tiny.cpp').write_text(TINY_SOURCE)
    compiler = tmp_path / 'g++'
    compiler.write_text(COMPILER.format(folder=tmp_path))
    compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setenv(custom_ops.BUILD_DIR_VARIABLE, str(tmp_path / 'build'))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setattr(custom_ops, 'OPS_FOLDER', tmp_path)
    monkeypatch.setattr(custom_ops, '_results', {})
    return tmp_path


@pytest.fixture(scope='module')
def can_build():
    problem = plugin_problem('fill_holes')
    if problem is not None:
        pytest.skip(problem)


def call_plugin(sandbox):
    return subprocess.Popen([sys.executable, '-c', CALL_PLUGIN, str(sandbox)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def libraries(sandbox):
    return sorted((sandbox / 'build').glob('*/*.so'))


def test_check_shape():
    tensor = torch.zeros(2, 3, 4)
    check_shape('alpha', tensor, [2, None, 4])
    for shape in ([None, 1, None, None], [2, 1, 4], []):
        with pytest.raises(ValueError, match='^alpha: expected '):
            check_shape('alpha', tensor, shape)
    with pytest.raises(ValueError) as error:
        check_shape('alpha', tensor, [None, 1, None, None])
    assert str(error.value) == 'alpha: expected [*, 1, *, *], got [2, 3, 4]'


def test_pick_impl_follows_the_device_in_order_of_preference():
    on_cuda = {'cuda': lambda device: None if device.type == 'cuda' else 'no GPU', 'cpp': lambda device: None}
    assert pick_impl('op', None, torch.device('cuda'), on_cuda) == 'cuda'
    assert pick_impl('op', None, CPU, on_cuda) == 'cpp'
    assert pick_impl('op', None, CPU, {'cuda': on_cuda['cuda']}) == 'ref'
    assert pick_impl('op', None, CPU) == 'ref'


def test_pick_impl_obeys_or_refuses_a_name():
    backends = {'cuda': lambda device: f'no GPU, got {device}', 'cpp': lambda device: None}
    assert pick_impl('op', 'ref', CPU, backends) == 'ref'
    assert pick_impl('op', 'cpp', CPU, backends) == 'cpp'
    with pytest.raises(RuntimeError, match="^op: impl 'cuda' cannot be used: no GPU, got cpu$"):
        pick_impl('op', 'cuda', CPU, backends)
    with pytest.raises(ValueError, match="^op: expected impl to be one of 'ref', 'cuda', 'cpp' or None, got 'cud'$"):
        pick_impl('op', 'cud', CPU, backends)


def test_a_plugin_for_the_cpu_refuses_other_devices():
    assert cpu_backend('fill_holes')(torch.device('meta')) == 'it takes CPU tensors, got meta'


def test_no_compiler_means_the_reference_and_no_noise(sandbox, monkeypatch, caplog):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    backends = {'cpp': cpu_backend('tiny')}
    assert pick_impl('op', None, CPU, backends) == 'ref'
    with pytest.raises(RuntimeError, match='^op: .*no C\\+\\+ compiler: no-such-compiler not found'):
        pick_impl('op', 'cpp', CPU, backends)
    assert not caplog.records and not (sandbox / 'build').exists()


def test_no_ninja(sandbox, monkeypatch, caplog):
    monkeypatch.setattr(custom_ops, '_ninja_folder', lambda: None)
    assert plugin_problem('tiny') == 'no ninja found (pip install ninja)'
    with pytest.raises(RuntimeError, match='^tiny: no ninja found'):
        plugin('tiny')
    assert not caplog.records


def test_unknown_plugin(sandbox):
    with pytest.raises(ValueError, match="^name: expected a source among .*, got 'tinny'$"):
        plugin('tinny')


def test_build_folder_that_cannot_be_made(sandbox, monkeypatch, can_build):
    monkeypatch.setenv(custom_ops.BUILD_DIR_VARIABLE, str(sandbox / 'tiny.cpp' / 'build'))
    assert 'tiny.cpp' in plugin_problem('tiny')


def test_kernels_need_a_device_and_their_compiler(sandbox, monkeypatch, caplog, can_build):
    (sandbox / 'tiny.cpp').rename(sandbox / 'tiny_cuda.cpp')
    with pytest.raises(ValueError, match='^name: expected a source'):
        plugin('tiny_cuda')
    (sandbox / 'tiny.cu').touch()
    assert cuda_backend('tiny_cuda')(CPU) == 'it takes CUDA tensors, got cpu'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert plugin_problem('tiny_cuda') == 'no CUDA device' and not caplog.records
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(custom_ops, '_nvcc', lambda: None)
    monkeypatch.setattr(custom_ops, '_results', {})
    device = torch.device('cuda')
    backends = {'cuda': cuda_backend('tiny_cuda')}
    assert pick_impl('op', None, device, backends) == pick_impl('op', None, device, backends) == 'ref'
    message = 'no CUDA compiler: nvcc not found (set CUDA_HOME)'
    assert [record.message for record in caplog.records] == [
        f'tiny_cuda: {message}; without it the reference implementation is used']
    with pytest.raises(RuntimeError, match='^op: .*no CUDA compiler'):
        pick_impl('op', 'cuda', device, backends)


def test_where_libraries_are_kept(sandbox, monkeypatch, can_build):
    sources = [sandbox / 'tiny.cpp']
    assert custom_ops._library_path('tiny', sources).parents[1] == sandbox / 'build'
    monkeypatch.delenv(custom_ops.BUILD_DIR_VARIABLE)
    monkeypatch.setenv('XDG_CACHE_HOME', str(sandbox / 'cache'))
    before = custom_ops._library_path('tiny', sources)
    assert before.parents[1] == sandbox / 'cache' / 'next3d' / 'build'
    monkeypatch.setattr(torch, '__version__', '0.0')
    assert custom_ops._library_path('tiny', sources) != before


def test_failed_compilation_is_named_and_warned_about_once(sandbox, caplog, can_build):
    (sandbox / 'tiny.cpp').write_text('#include "missing.h"\n')
    with caplog.at_level(logging.WARNING):
        problem = plugin_problem('tiny')
        assert plugin_problem('tiny') == problem
    first, *tail = problem.splitlines()
    assert 'error: missing.h: No such file' in first and tail[-1] == 'ninja: build stopped: subcommand failed.'
    assert [record.message for record in caplog.records if 'missing.h' in record.message] == [
        f'tiny: {first}; without it the reference implementation is used']
    with pytest.raises(RuntimeError, match='missing.h'):
        plugin('tiny')
    assert not libraries(sandbox) and not list((sandbox / 'build').glob('*/attempt-*'))


def test_a_changed_source_is_rebuilt_and_an_old_one_found_again(sandbox, monkeypatch, can_build):
    answers = []
    for answer in (42, 7, 42):
        (sandbox / 'tiny.cpp').write_text(TINY_SOURCE.replace('42', str(answer)))
        monkeypatch.setattr(custom_ops, '_results', {})
        answers.append(plugin('tiny').answer())
    assert answers == [42, 7, 42]
    assert len(libraries(sandbox)) == 2 and (sandbox / 'log').read_text().count('compiled') == 2


def test_importing_the_ops_builds_nothing(sandbox):
    code = 'import torch_utils.ops.rasterize, torch_utils.ops.fill_holes'
    subprocess.run([sys.executable, '-c', code], check=True)
    assert not (sandbox / 'build').exists()


def test_of_processes_at_once_one_compiles(sandbox, can_build):
    processes = [call_plugin(sandbox) for _ in range(3)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [out.strip() for out, _ in outputs] == ['42'] * 3, outputs
    assert sum(err.count('Compiling tiny.cpp') for _, err in outputs) == 1
    assert (sandbox / 'log').read_text().count('compiled') == 1 and len(libraries(sandbox)) == 1


def test_a_killed_build_is_swept_up_by_the_next_call(sandbox, can_build):
    (sandbox / 'hold').touch()
    killed = call_plugin(sandbox)
    deadline = time.monotonic() + 60
    while not (sandbox / 'log').exists():  # Until the compiler runs, inside torch's own lock.
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    (leftover,) = (sandbox / 'build').glob('*/attempt-*')
    assert (leftover / 'lock').exists() and not libraries(sandbox)

    (sandbox / 'hold').unlink()
    out, err = call_plugin(sandbox).communicate(timeout=120)
    assert out.strip() == '42', err
    assert len(libraries(sandbox)) == 1 and not list((sandbox / 'build').glob('*/attempt-*'))
