# SPDX-License-Identifier: Apache-2.0
"""Test configuration: import path, markers, the published head, the record of parity deviations."""

import importlib.util
import json
import os
import pathlib
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
# Files that take minutes begin, so that no process is left alone with one at the end.
LONGEST = ('test_training_survival.py', 'test_parity_training.py', 'test_viewer.py', 'test_distributed.py')

if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')  # Before any kernel is imported: they run on the CPU, for tests.

import parity  # noqa: E402  (needs the path above)


def pytest_addoption(parser):
    parser.addoption('--fidelity-json', metavar='PATH', help='write the deviations from parity data to this file')


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a CUDA device; skipped without one')
    config.addinivalue_line('markers', 'slow: takes over ten seconds')
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='no CUDA device'))
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_sessionfinish(session):
    path = session.config.getoption('--fidelity-json')
    if path:
        pathlib.Path(path).write_text(json.dumps(parity.deviations, indent=1))


@pytest.fixture(scope='session')
def demo_meshes():
    """Vertices and landmarks [2, 5091, 3] of the demo head and its deformation."""
    vertices, *_ = parity.recipe.load_obj(parity.parity_file('demo.obj'))
    landmarks = np.loadtxt(parity.parity_file('demo_kpt2d.txt'))
    v = np.concatenate([vertices, landmarks])
    return torch.from_numpy(np.stack([v.astype(np.float32), parity.recipe.deform(v)]))


@pytest.fixture(scope='session')
def topology():
    """faces, uvs, uv_faces and the eye mask of the published head."""
    _, uvs, faces, uv_faces = parity.recipe.load_obj(parity.parity_file('head_template.obj'))
    mask = np.asarray(Image.open(parity.parity_file('uv_face_eye_mask.png')))
    mask = torch.tensor(mask if mask.ndim == 2 else mask[..., 0]).float()[None, None] / 255
    return faces, uvs, uv_faces, torch.nn.functional.interpolate(mask, size=(256, 256))


@pytest.fixture(scope='module')
def one_thread():
    """For tests on tiny tensors: on shared cores, threads would spend most of the time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def exact_float32():
    """No TF32 in convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope='module')
def builders():
    """Return the module that rebuilds the fabricated files of the published numbers."""
    spec = importlib.util.spec_from_file_location('prep_builders', parity.parity_file('fits/prep_builders.py'))
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, golden_recipe=parity.recipe):
        spec.loader.exec_module(module)
    return module
