# SPDX-License-Identifier: Apache-2.0
"""What people look at while a run trains: status lines, log.txt, stats.jsonl, TensorBoard events."""

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torch_utils.training_stats import Statistic

LOG_FILE, STATS_FILE = 'log.txt', 'stats.jsonl'


def say(text: str) -> None:
    """Print a line at once."""
    _print(text, sys.stdout)


def _print(text, stream):
    """Print at once; where the stream's disk is full or its reader gone, training has to go on."""
    with contextlib.suppress(OSError):
        print(text, file=stream, flush=True)


def warn(text: str) -> None:
    """Print a warning at once, on standard error."""
    _print(f'Warning: {text}', sys.stderr)


class Reporter:
    """Writes reports of a run to its folder; a disk that refuses them is told once and ends nothing.

    nimg: images shown when the run goes on; reports of later ones, by a run that was cut off, are taken back.
    """

    def __init__(self, folder: pathlib.Path, nimg: int = 0):
        self.folder, self.has_complained = folder, False
        for path in (folder / STATS_FILE, *folder.glob('metric-*.jsonl')):
            self._guard(functools.partial(_cut_stats, path, nimg))
        self._events = self._open_events(nimg)

    def say(self, text: str) -> None:
        """Print and log a line."""
        say(text)
        self._append(LOG_FILE, text)

    def statistics(self, values: dict[str, Statistic], nimg: int, extra: dict[str, float]) -> None:
        """Write one line of stats.jsonl and the same numbers to TensorBoard."""
        entries = {name: _finite(value._asdict()) for name, value in values.items()}
        self._append(STATS_FILE, json.dumps({'nimg': nimg, 'timestamp': time.time(), **extra, **entries}))
        scalars = {**extra, **{name: value.mean for name, value in values.items() if value.count}}
        self._scalars(scalars, nimg)

    def metric(self, name: str, results: dict[str, Any], nimg: int, snapshot: str) -> None:
        """Write one line of metric-NAME.jsonl and the numbers to TensorBoard; 'about': notes for the line alone."""
        results = dict(results)
        about = results.pop('about', {})
        line = {'metric': name, 'nimg': nimg, 'snapshot': snapshot, 'results': results, 'timestamp': time.time()}
        line = {**about, **line}
        results = {key: value for key, value in results.items() if value is not None}
        self._append(f'metric-{name}.jsonl', json.dumps(line))
        self.say(f'{name}: ' + ', '.join(f'{key} {value:.6g}' for key, value in results.items()))
        num = re.search(r'-\d+$', name)  # The same metric with two numbers of pictures has two curves.
        ending = num[0] if num else ''
        self._scalars({f'Metrics/{key}{ending}': value for key, value in results.items()}, nimg)

    def has_metric(self, name: str, nimg: int) -> bool:
        """Tell whether metric-NAME.jsonl has a line for a number of images."""
        path = self.folder / f'metric-{name}.jsonl'
        return path.exists() and f'"nimg": {nimg},' in path.read_text(encoding='utf-8', errors='replace')

    def attempt(self, what: str, action: Callable[[], Any]) -> None:
        """Do something that writes files; tell of a disk that refuses."""
        try:
            action()
        except OSError as error:
            self.complain(f'{what}: not written: {error.strerror or error}')

    def complain(self, text: str) -> None:
        """Say that something is wrong, on standard error."""
        warn(text)
        self._append(LOG_FILE, f'Warning: {text}')

    def close(self) -> None:
        """Flush the events."""
        if self._events is not None:
            self._guard(self._events.close)

    def _append(self, name, line):
        def write():
            with open(self.folder / name, 'a', encoding='utf-8') as file:
                file.write(line + '\n')

        self._guard(write)

    def _scalars(self, scalars, nimg):
        if self._events is not None:
            self._guard(lambda: self._events.write(scalars, nimg))

    def _open_events(self, nimg):
        try:
            return _EventFile(self.folder, nimg)
        except ImportError:
            self.say('No TensorBoard events: tensorboardX is not installed (pip install tensorboardX)')
        except OSError as error:
            self.complain(f'TensorBoard events: not written: {error.strerror or error}')
        return None

    def _guard(self, write):
        try:
            write()
        except OSError as error:
            if not self.has_complained:
                self.has_complained = True
                warn(f'{self.folder}: cannot be written to: {error.strerror or error}')


class _EventFile:
    """A TensorBoard event file, written at once: the library's own writer has a thread that a full disk blocks."""

    def __init__(self, folder, nimg):
        from tensorboardX.proto import event_pb2  # Optional: training goes on without it.
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self._event, self._scalar = event_pb2.Event, scalar
        self._writer = RecordWriter(str(folder / f'events.out.tfevents.{time.time():.6f}.{os.getpid()}'))
        self._put(event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2'))
        if nimg:  # Viewers drop what an interrupted run wrote after this step.
            log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._put(event_pb2.Event(wall_time=time.time(), step=nimg, session_log=log))

    def write(self, scalars, nimg):
        for name, value in scalars.items():
            self._put(self._event(wall_time=time.time(), step=nimg, summary=self._scalar(name, value)))
        self._writer.flush()

    def close(self):
        self._writer.close()

    def _put(self, event):
        self._writer.write(event.SerializeToString())


class Clock:
    """The time of a run: `elapsed_s` in all, and that of the current tick without what was done beside training."""

    def __init__(self, elapsed_s: float = 0.0):
        self._start = time.monotonic() - elapsed_s
        self._tick_start, self._depth = time.monotonic(), 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run began, those before it was continued included."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Leave the time of the block out of the tick."""
        begin = time.monotonic()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:  # An outer block counts the inner ones.
                self._tick_start += time.monotonic() - begin

    def end_tick(self) -> float:
        """Return the seconds of training in the tick; a new one begins."""
        now = time.monotonic()
        seconds, self._tick_start = now - self._tick_start, now
        return seconds


def status_line(tick: int, nimg: int, total_kimg: float, tick_images: int, tick_s: float, clock: Clock,
                device: torch.device) -> tuple[str, dict[str, float]]:
    """Return the line that a tick prints, and its numbers for the statistics."""
    s_per_kimg = tick_s / max(tick_images / 1000, 1e-9)
    numbers = {'Timing/s_per_kimg': s_per_kimg, 'Timing/total_s': clock.elapsed_s, 'Resources/cpu_GiB': _host_memory()}
    words = [
        f'tick {tick}', f'kimg {nimg / 1000:.3f}', f'time {_duration(clock.elapsed_s)}', f's/kimg {s_per_kimg:.2f}',
        f'ETA {_duration(max(total_kimg - nimg / 1000, 0) * s_per_kimg)}',
        f'CPU {numbers["Resources/cpu_GiB"]:.2f} GiB',
    ]
    if device.type == 'cuda':
        numbers['Resources/gpu_GiB'] = torch.cuda.max_memory_allocated(device) / 2**30
        numbers['Resources/gpu_reserved_GiB'] = torch.cuda.max_memory_reserved(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        words.append(f'GPU {numbers["Resources/gpu_GiB"]:.2f} GiB')
    return '  '.join(words), numbers


def _host_memory():
    """Return the resident memory of this process in GiB, 0 where the system does not tell."""
    try:
        pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0.0
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**30


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f'{days}d'] * (days > 0) + [f'{hours}h'] * (days + hours > 0)
    parts += [f'{minutes}m'] * (days + hours + minutes > 0)
    return ' '.join(parts + [f'{seconds}s'] * (days + hours == 0))


def _finite(numbers):
    """Return numbers by name with None, JSON's null, for those that JSON cannot hold."""
    return {name: number if math.isfinite(number) else None for name, number in numbers.items()}


def _cut_stats(path, nimg):
    """Drop the lines of images after `nimg`, and those that a full disk or a power failure broke."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            if json.loads(line)['nimg'] <= nimg:
                kept.append(line + '\n')
    temporary = path.with_name(f'.tmp-{path.name}')
    temporary.write_text(''.join(kept), encoding='utf-8')
    os.replace(temporary, path)
