# SPDX-License-Identifier: Apache-2.0
"""Sheets of people: what is in which cell, compared with the plain forward pass; bad input."""

import math

import numpy as np
import pytest
import torch
import video_data
from PIL import Image

import gen_sheets
from geometry.head_model import load_embedded_head

pytestmark = pytest.mark.usefixtures('one_thread')

SEEDS, TRUNC = [3, 5], 0.6


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return video_data.tiny_network(tmp_path_factory.mktemp('network') / 'network.pkl', is_embedded=True)


@pytest.fixture(scope='module')
def sheets(network, tmp_path_factory):
    out = tmp_path_factory.mktemp('sheets') / 'new'
    result = video_data.run(
        gen_sheets.main, '--network', network.path, '--seeds=3,5', f'--trunc={TRUNC}', '--shape=0.5', '--outdir', out
    )
    assert result.code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ['cameras.png', 'expressions.png']
    return {name: np.asarray(Image.open(out / f'{name}.png')) for name in ('cameras', 'expressions')}


def cell(sheet, row, column):
    side = video_data.SIDE
    y = gen_sheets.HEADING + row * side
    return sheet[y : y + side, column * side : (column + 1) * side].astype(int)


@pytest.mark.parametrize('name, row, column, weights, yaw', [
    ('expressions', 1, 1, {'jawOpen': 0.8}, 0),
    ('expressions', 0, 3, {'eyeBlinkLeft': 1.0, 'eyeBlinkRight': 1.0}, 0),
    ('cameras', 1, 6, {}, 40),
    ('cameras', 0, 0, {}, -40),
])
def test_cells_are_what_the_network_draws(network, sheets, name, row, column, weights, yaw):
    head, side = load_embedded_head(), video_data.SIDE
    columns = {'expressions': len(gen_sheets.EXPRESSIONS), 'cameras': len(gen_sheets.YAWS)}[name]
    assert sheets[name].shape == (gen_sheets.HEADING + 2 * side, columns * side, 3)
    identity = 0.5 * np.random.default_rng(SEEDS[row]).standard_normal([1, head.num_identity])
    v = head(torch.from_numpy(identity).float(), head.expression(weights)).stacked()[0]
    c = video_data.label(math.radians(yaw))
    expected = video_data.plain(network, SEEDS[row], c, v, TRUNC).astype(int)
    assert np.abs(cell(sheets[name], row, column) - expected).max() <= 1
    assert np.abs(cell(sheets[name], row, 2) - expected).max() > 1  # Another column shows something else.
    assert np.abs(cell(sheets[name], 1 - row, column) - expected).max() > 1  # And so does another person.


def test_cameras_stand_where_said(network):
    pose = gen_sheets._labels(network.generator, [-40])[0, :16].reshape(4, 4)
    assert pose[0, 3] < -1 and abs(float(pose[1, 3])) < 1e-5  # On the left of who looks at the face.
    assert float(pose[:3, 3].norm()) == pytest.approx(2.7, abs=1e-5)


@pytest.mark.parametrize('words, message', [
    ('--shape=-1', '--shape'), ('--seeds=x', '--seeds'), ('--network=none.pkl', 'none.pkl'), ('--trunc=nan', '--trunc'),
])
def test_bad_input_is_one_line(network, tmp_path, words, message):
    given = {'--network': network.path, '--seeds': '0', '--outdir': tmp_path / 'out'}
    given.update([words.split('=')])
    result = video_data.run(gen_sheets.main, *(f'{name}={value}' for name, value in given.items()))
    assert result.code != 0 and message in result.message and len(result.lines) == 1
    assert not (tmp_path / 'out').exists()


def test_networks_over_other_heads_are_refused(tmp_path):
    other = video_data.tiny_network(tmp_path / 'other.pkl').path
    result = video_data.run(gen_sheets.main, f'--network={other}', '--seeds=0', f'--outdir={tmp_path}/out')
    assert result.code != 0 and 'embedded head' in result.message and not (tmp_path / 'out').exists()
