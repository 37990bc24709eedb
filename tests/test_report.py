# SPDX-License-Identifier: Apache-2.0
"""What people look at: statistics of a resumed run, events, clocks, lines, and disks that refuse."""

import contextlib
import json
import struct
import sys
import time

import pytest
import torch

from torch_utils.training_stats import Statistic
from training import report
from training.report import LOG_FILE, STATS_FILE, Clock, Reporter, say, status_line, warn

NAN = float('nan')


def read_stats(folder):
    return [json.loads(line) for line in (folder / STATS_FILE).read_text().splitlines()]


def read_events(folder):
    """Return the records of all event files: length, checksum, bytes, checksum of each (TFRecord)."""
    event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
    events = []
    for path in sorted(folder.glob('events.out.tfevents.*')):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = struct.unpack_from('<Q', data, at)[0]
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
        assert at == len(data)
    return events


def test_statistics_are_lines_of_json(tmp_path):
    reporter = Reporter(tmp_path)
    values = {'Loss/G': Statistic(4, 1.5, 0.5, 1), 'Loss/none': Statistic(0, NAN, NAN, 3)}
    reporter.statistics(values, 4000, {'Timing/total_s': 2.0})
    reporter.close()
    line, = read_stats(tmp_path)
    assert line['nimg'] == 4000 and line['Timing/total_s'] == 2.0 and abs(line['timestamp'] - time.time()) < 60
    assert line['Loss/G'] == {'count': 4, 'mean': 1.5, 'std': 0.5, 'num_nonfinite': 1}
    assert line['Loss/none']['mean'] is None and line['Loss/none']['num_nonfinite'] == 3


def test_events_can_be_read(tmp_path):
    reporter = Reporter(tmp_path)
    reporter.statistics({'Loss/G': Statistic(4, 1.5, 0.5, 0), 'Loss/none': Statistic(0, NAN, NAN, 3)}, 4000, {'a': 2.0})
    first, *events = read_events(tmp_path)  # Before the file is closed: viewers watch a run.
    assert first.file_version == 'brain.Event:2'
    found = {value.tag: (value.simple_value, event.step) for event in events for value in event.summary.value}
    assert found == {'a': (2.0, 4000), 'Loss/G': (1.5, 4000)}
    reporter.close()


def test_a_resumed_run_takes_back_what_comes_later(tmp_path):
    reporter = Reporter(tmp_path)
    for nimg in (1000, 2000, 3000, 4000):
        reporter.statistics({}, nimg, {})
    reporter.close()
    with open(tmp_path / STATS_FILE, 'a') as file:
        file.write('{"nimg": 50')  # The process was killed in the middle of a line.
    resumed = Reporter(tmp_path, nimg=2000)
    assert [line['nimg'] for line in read_stats(tmp_path)] == [1000, 2000]
    resumed.statistics({}, 3000, {})
    resumed.close()
    assert [line['nimg'] for line in read_stats(tmp_path)] == [1000, 2000, 3000]
    starts = [event.step for event in read_events(tmp_path) if event.HasField('session_log')]
    assert starts == [2000]
    assert not list(tmp_path.glob('.tmp*'))


def test_a_torn_last_line_is_dropped(tmp_path):
    (tmp_path / STATS_FILE).write_text('{"nimg": 10}\n{"nimg": 20, "a": {"mea')
    Reporter(tmp_path, nimg=1000).statistics({}, 30, {})
    assert [line['nimg'] for line in read_stats(tmp_path)] == [10, 30]


@pytest.mark.parametrize('text', ['[1]\n', '{"a": 1}\n', '\n'])
def test_a_line_of_another_form_is_dropped(tmp_path, text):
    """And no other: a full disk may have broken one line of many."""
    (tmp_path / STATS_FILE).write_text('{"nimg": 10}\n' + text + '{"nimg": 20}\n')
    Reporter(tmp_path, nimg=1000)
    assert [line['nimg'] for line in read_stats(tmp_path)] == [10, 20]


def test_output_that_nobody_takes_is_no_error(monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        monkeypatch.setattr(sys, 'stderr', full)
        say('x' * 10000)
        warn('x' * 10000)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_bytes_that_are_no_text_do_not_end_the_run(tmp_path):
    """A power failure leaves blocks of zeros or of another file's bytes at the end."""
    (tmp_path / STATS_FILE).write_bytes(b'{"nimg": 10}\n\xff\xfe\x00\x00')
    Reporter(tmp_path, nimg=1000).statistics({}, 30, {})
    assert [line['nimg'] for line in read_stats(tmp_path)] == [10, 30]


def test_lines_are_printed_and_logged(tmp_path, capsys):
    reporter = Reporter(tmp_path)
    reporter.say('hello')
    reporter.complain('careful')
    reporter.metric('fid', {'fid50k': 12.5}, 1000, 'network-snapshot-000001.pkl')
    reporter.close()
    out, err = capsys.readouterr()
    assert out == 'hello\nfid: fid50k 12.5\n' and err == 'Warning: careful\n'
    assert (tmp_path / LOG_FILE).read_text() == 'hello\nWarning: careful\nfid: fid50k 12.5\n'
    line = json.loads((tmp_path / 'metric-fid.jsonl').read_text())
    assert (line['results'], line['nimg'], line['snapshot']) == ({'fid50k': 12.5}, 1000, 'network-snapshot-000001.pkl')


def test_metrics_of_later_snapshots_are_taken_back(tmp_path):
    reporter = Reporter(tmp_path)
    for nimg in (1000, 2000, 3000):
        reporter.metric('kid-20', {'kid': nimg / 1e4}, nimg, f'network-snapshot-{nimg // 1000:06d}.pkl')
    reporter.close()
    again = Reporter(tmp_path, nimg=2000)
    assert [again.has_metric('kid-20', nimg) for nimg in (1000, 2000, 3000)] == [True, True, False]


def test_a_folder_that_cannot_be_written_to_is_told_once(tmp_path, capsys):
    folder = tmp_path / 'gone'
    reporter = Reporter(folder)
    for nimg in (1000, 2000):
        reporter.say(f'tick {nimg}')
        reporter.statistics({'a': Statistic(1, 1.0, 0.0, 0)}, nimg, {})
    reporter.close()
    out, err = capsys.readouterr()
    assert out == 'tick 1000\ntick 2000\n'
    assert err.count('cannot be written to: No such file or directory') == 1 and not folder.exists()


def test_a_disk_that_refuses_events_does_not_end_the_run(tmp_path, capsys):
    reporter = Reporter(tmp_path)

    def refuse(*_):
        raise OSError(28, 'No space left on device')

    if reporter._events is not None:
        reporter._events.write = refuse
    reporter.statistics({}, 1, {'a': 1.0})
    reporter.attempt('picture.png', refuse)
    assert 'picture.png: not written: No space left on device' in capsys.readouterr().err


def test_other_errors_are_not_hidden(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Reporter(tmp_path).attempt('x', lambda: 1 / 0)


class FakeTime:
    """A clock that the test sets."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def fake_time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(report, 'time', fake)
    return fake


def test_a_tick_leaves_out_what_is_beside_training(fake_time):
    clock = Clock(elapsed_s=1000.0)
    fake_time.now += 10
    with clock.elsewhere():
        fake_time.now += 3
        with clock.elsewhere():
            fake_time.now += 4
        fake_time.now += 1
    fake_time.now += 2
    assert clock.end_tick() == 12
    assert clock.elapsed_s == 1020
    fake_time.now += 5
    with pytest.raises(OSError), clock.elsewhere():
        fake_time.now += 7
        raise OSError
    assert clock.end_tick() == 5 and clock.elapsed_s == 1032


def test_the_line_of_a_tick(fake_time):
    clock = Clock(elapsed_s=3600.0)
    fake_time.now += 65
    line, numbers = status_line(3, 12_000, 25.0, 4000, 20.0, clock, torch.device('cpu'))
    assert line.startswith('tick 3  kimg 12.000  time 1h 1m  s/kimg 5.00  ETA 1m 5s  CPU ')
    assert numbers['Timing/s_per_kimg'] == 5 and numbers['Timing/total_s'] == 3665
    assert 0.01 < numbers['Resources/cpu_GiB'] < 1000
    assert 'Resources/gpu_GiB' not in numbers
    line, _ = status_line(9, 26_000, 25.0, 0, 20.0, clock, torch.device('cpu'))
    assert 'ETA 0s' in line


@pytest.mark.parametrize('seconds, text', [
    (0, '0s'), (0.6, '1s'), (59.4, '59s'), (59.6, '1m 0s'), (3599, '59m 59s'), (3600, '1h 0m'), (86_399, '23h 59m'),
    (86_400, '1d 0h 0m'), (90_061, '1d 1h 1m'), (864_000 + 7260, '10d 2h 1m'),
])
def test_durations(seconds, text):
    assert report._duration(seconds) == text
