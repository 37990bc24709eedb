# SPDX-License-Identifier: Apache-2.0
"""Test configuration: import path, thread count, and the record of parity deviations for docs/fidelity.md."""

import json
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

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


def pytest_sessionfinish(session):
    path = session.config.getoption('--fidelity-json')
    if path:
        pathlib.Path(path).write_text(json.dumps(parity.deviations, indent=1))
