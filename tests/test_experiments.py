# SPDX-License-Identifier: Apache-2.0
"""The comparison of planes and renderings: which runs it starts, what it makes of their numbers and sheets."""

import json
import sys

import numpy as np
import pytest
from parity import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / 'benchmarks'))
import experiments  # noqa: E402  (needs the path above)

import train_next3d  # noqa: E402

SIDE = 8


def numbers_of(planes, render, seed):
    """Return made-up results whose effects are known: next3d costs 0.1 and the seed, no rendering costs 1."""
    aed = 1 + 0.1 * (planes == 'next3d') * (1 + seed) + (render == 'none')
    return {'aed_estimator': 0.5, 'aed_estimator_se': 0.01, 'aed': aed, 'aed_se': 0.02, 'depth_mae': None}


@pytest.fixture
def calls(monkeypatch):
    """Stands for the scripts: notes their words and writes what they would leave."""
    noted = []

    def call(script, *words, gpu=None, log=None):
        noted.append((script, words, gpu))
        folder = log.parent
        planes, render, seed = folder.name.split('-')
        if script == 'train_next3d.py':
            (folder / 'runs' / '00000-x').mkdir(parents=True, exist_ok=True)
            kimg = next(float(word.split('=')[1]) for word in words if word.startswith('--kimg='))
            (folder / 'runs' / '00000-x' / f'network-snapshot-{int(kimg):06d}.pkl').touch()
        if script == 'calc_metrics.py':
            results = numbers_of(planes, render, int(seed))
            return '\n'.join(['a line', json.dumps({'metric': 'aed', 'results': results})])
        if script == 'gen_sheets.py':
            shade = 40 * (list(experiments.PLANES).index(planes) + 3 * (render == 'none'))
            height = experiments.HEADING + experiments.PEOPLE * SIDE
            for name in ('cameras', 'expressions'):
                Image.new('RGB', (3 * SIDE, height), (shade, int(seed), 0)).save(folder / f'{name}.png')
        return ''

    monkeypatch.setattr(experiments, 'call', call)
    return noted


def run(monkeypatch, out, *words):
    """Run the script in this process."""
    places = [f'--data={out}/people', f'--test-data={out}/test', f'--out={out}']
    monkeypatch.setattr(sys, 'argv', ['experiments.py', *places, *words])
    experiments.main()


def test_every_combination_is_trained_and_measured_once(calls, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, '--seeds=0,1', '--kimg=20', '--gpus=2', '--share=2', '--', '--batch=16')
    trained = [(set(words), gpu) for script, words, gpu in calls if script == 'train_next3d.py']
    assert len(trained) == 12 and {gpu for _, gpu in trained} <= {0, 1}
    assert all({'--batch=16', '--kimg=20.0', '--cfg=demo128'} <= words for words, _ in trained)
    differing = set.union(*(words for words, _ in trained)) - set.intersection(*(words for words, _ in trained))
    expected = {word for options in (*experiments.PLANES.values(), *experiments.RENDERS.values()) for word in options}
    assert {word for word in differing if not word.startswith('--outdir')} == expected | {'--seed=0', '--seed=1'}
    assert (tmp_path / 'table.md').read_text() == capsys.readouterr().out
    before = len(calls)
    run(monkeypatch, tmp_path, '--seeds=0,1', '--kimg=20', '--gpus=2')
    assert not [script for script, _, _ in calls[before:] if script == 'calc_metrics.py']  # Their results are there.
    run(monkeypatch, tmp_path, '--seeds=0', '--kimg=30', '--gpus=2')
    assert len([script for script, _, _ in calls[before:] if script == 'calc_metrics.py']) == 6


def test_the_words_are_those_of_the_scripts():
    known = {word for option in train_next3d.main.params for word in option.opts}
    words = [word.split('=')[0] for options in (*experiments.PLANES.values(), *experiments.RENDERS.values())
             for word in options]  # fmt: skip
    assert words and set(words) <= known


def test_effects_are_differences_of_runs_that_differ_in_nothing_else():
    found = {(planes, render, seed): numbers_of(planes, render, seed)
             for planes in experiments.PLANES for render in experiments.RENDERS for seed in (0, 1)}  # fmt: skip
    told = experiments.effects(found, 'aed')
    layout, painted, shown = (told[change] for change in experiments.CHANGES)
    assert layout == pytest.approx((0.15, np.std([0.1, 0.1, 0.2, 0.2], ddof=1) / 2))
    assert painted == pytest.approx((0, 0), abs=1e-12) and shown == pytest.approx((1, 0), abs=1e-12)
    assert experiments.effects(found, 'depth_mae') == dict.fromkeys(experiments.CHANGES, (None, None))
    alone = {key: value for key, value in found.items() if key[1:] == ('waves', 0)}
    assert experiments.effects(alone, 'aed')['layout: aligned to next3d'] == (pytest.approx(0.1), None)
    values, changes = (table.splitlines() for table in experiments.tables(found).split('\n\n'))
    assert len(values[0].split('|')) == 12 + 4 and '| `aed` | 0.5 ± 0.01 | 1 ± 0.02 |' in values[2]
    assert '+0.15 ± 0.0289' in changes[2] and changes[3].count('? ± ?') == 3


def test_sheets_are_put_below_each_other(calls, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path, '--seeds=5,6')
    sheet = np.asarray(Image.open(tmp_path / 'cameras.png'))
    rows = sheet[experiments.HEADING :, experiments.MARGIN :]
    assert rows.shape == (6 * experiments.SHOWN * SIDE, 3 * SIDE, 3)
    shades = rows.reshape(6, -1, 3)
    assert (shades == shades[:, :1]).all() and shades[:, 0].tolist() == [[40 * i, 5, 0] for i in range(6)]
    labels = sheet[experiments.HEADING :, : experiments.MARGIN]
    assert (labels < 255).any() and not np.array_equal(labels[: 2 * SIDE], labels[-2 * SIDE :])
