# SPDX-License-Identifier: Apache-2.0
"""The harness of the benchmarks, on the CPU: JSON, comparison, messages, and that the scripts which use it run."""

import json
import re
import subprocess
import sys
import time

import pytest
from parity import ROOT
from video_data import tiny_network

sys.path.insert(0, str(ROOT / 'benchmarks'))

from bench import Benchmark  # noqa: E402  (needs the path above)

OPTIONS = ['--device=cpu', '--repeats=3', '--warm-up=1']


def new_benchmark(*options):
    bench = Benchmark('About.\n\nMore.')
    bench.parse([*OPTIONS, *options])
    return bench


def test_measurements_are_printed_returned_and_written(tmp_path, capsys):
    bench, calls = new_benchmark(f'--json={tmp_path}/new.json'), []
    result = bench.measure('nap', lambda: calls.append(time.sleep(0.01)), bytes_moved=1e6, flops=1e9, size=[2, 3])
    assert len(calls) == 4 and 10 <= result.low_ms <= result.median_ms <= result.high_ms
    line = capsys.readouterr().out
    assert line.startswith(f'nap: {result.median_ms:.4f} ms ({result.low_ms:.4f}..{result.high_ms:.4f}), ')
    assert line.endswith(' GB/s, 0.1 TFLOP/s, size [2, 3]\n')
    bench.finish()
    written = json.loads((tmp_path / 'new.json').read_text())
    assert set(written['where']) == {'device', 'torch', 'cuda', 'python', 'commit', 'platform'}
    nap = written['results']['nap']
    assert nap['median_ms'] == result.median_ms and nap['size'] == [2, 3]
    assert nap['GB/s'] == pytest.approx(1 / result.median_ms)


def test_comparison_prints_the_ratio_of_common_names(tmp_path, capsys):
    old = new_benchmark(f'--json={tmp_path}/old.json')
    for name in ('kept', 'gone'):
        old.measure(name, lambda: None)
    old.results['kept']['median_ms'] = 3.0
    old.finish()
    new = new_benchmark(f'--compare={tmp_path}/old.json')
    for name in ('kept', 'added'):
        new.measure(name, lambda: None)
    new.results['kept']['median_ms'] = 2.0
    capsys.readouterr()
    new.finish()
    assert capsys.readouterr().out.splitlines()[1:] == [f'old / new time, {tmp_path}/old.json:', '  kept: 1.500']


@pytest.mark.parametrize('text', [None, 'not JSON', '[]', '{}', '{"results": {"a": {}}}', '{"results": [1]}'])
def test_a_bad_file_to_compare_with_is_one_line(tmp_path, capsys, text):
    path = tmp_path / 'old.json'
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as exit_info:
        new_benchmark(f'--compare={path}')
    assert exit_info.value.code != 0
    assert f'error: --compare: {path} is not a file that --json wrote: ' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('option', ['--repeats=1', '--warm-up=-1', '--repeats=many'])
def test_bad_numbers_are_refused(option):
    with pytest.raises(SystemExit):
        new_benchmark(option)


def test_bm_bias_act_runs(tmp_path):
    command = [sys.executable, ROOT / 'benchmarks' / 'bm_bias_act.py', *OPTIONS, '--shrink=64', '--json=new.json']
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    results = json.loads((tmp_path / 'new.json').read_text())['results']
    assert 'bias_act 4x128x4x4 float16 NHWC ref forward+backward' in results and len(results) == 16


def test_bm_video_runs(tmp_path):
    tiny_network(tmp_path / 'tiny.pkl')
    words = ['--networks', 'tiny.pkl', '--grids', '2x1', '--cases', 'camera, mesh', '--frames=3', '--rounds=1']
    words += ['--frames-published=2', '--device=cpu', '--json=v.json']
    command = [sys.executable, ROOT / 'benchmarks' / 'bm_video.py', *words]
    shown = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120, text=True).stdout
    assert re.match(r'network +grid.*\ntiny +2x1 +camera, mesh +[\d.]+ /s +[\d.]+ /s +[\d.]+\n', shown), shown
    results = json.loads((tmp_path / 'v.json').read_text())['results']
    assert set(results) == {f'tiny, 2x1, camera, mesh, {who}' for who in ('published way', 'ours')}
    assert all(result['frames_per_s'] > 0 for result in results.values())
