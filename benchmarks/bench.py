# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of single operations share: options, timing, and results as lines and as JSON."""

import argparse
import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 * 2**20  # More than the L2 cache of any GPU so far.
ROOT = pathlib.Path(__file__).resolve().parents[1]
SIMPLE_HEAD = ROOT / 'tests' / 'data' / 'simple_head'  # Measurements keep this head, whatever data/demo holds.


class Result(NamedTuple):
    """Milliseconds of one call: the median and the quartiles."""

    median_ms: float
    low_ms: float
    high_ms: float


class Benchmark:
    """Options, measurements and results of one benchmark script.

    bench = Benchmark(__doc__), then bench.parse(), bench.measure(...) as often as needed, bench.finish(). Options of
    the script's own are added to bench.parser before parsing.
    """

    def __init__(self, description: str):
        self.parser = argparse.ArgumentParser(description=description.splitlines()[0])
        default = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.parser.add_argument('--device', choices=['cuda', 'cpu'], default=default, help='[default: %(default)s]')
        self.parser.add_argument('--repeats', type=_at_least(2), default=20, help='[default: %(default)s]')
        self.parser.add_argument('--warm-up', type=_at_least(0), default=5, help='calls before [default: %(default)s]')
        self.parser.add_argument('--json', type=pathlib.Path, metavar='PATH', help='write the results to this file')
        self.parser.add_argument('--compare', type=pathlib.Path, metavar='PATH', help='a file that --json wrote before')
        self.results = {}

    def parse(self, arguments: list[str] | None = None) -> argparse.Namespace:
        """Return the options; exit with one line and status 2 where they, or the file to compare with, are bad."""
        self.args = self.parser.parse_args(arguments)
        self.before = None if self.args.compare is None else self._read(self.args.compare)
        return self.args

    def measure(self, name: str, function: Callable[[], object], bytes_moved: float | None = None,
                flops: float | None = None, flush: bool = False, **facts) -> Result:
        """Time a function without arguments, print a line and keep the result under the name.

        bytes_moved, flops: of one call; they give GB/s and TFLOP/s.
        flush:              on a GPU, overwrite the L2 cache before each repeat, outside of the timed span.
        facts:              whatever else belongs to the result: shapes, types.
        """
        for _ in range(self.args.warm_up):
            function()
        timer = _cuda_times if self.args.device == 'cuda' else _cpu_times
        low, median, high = statistics.quantiles(timer(function, self.args.repeats, flush), n=4, method='inclusive')
        result = Result(median, low, high)
        rates = {'GB/s': bytes_moved and bytes_moved / median / 1e6, 'TFLOP/s': flops and flops / median / 1e9}
        rates = {unit: rate for unit, rate in rates.items() if rate is not None}
        self.results[name] = {**result._asdict(), **rates, **facts}
        words = [f'{name}: {median:.4f} ms ({low:.4f}..{high:.4f})', *(f'{r:.1f} {unit}' for unit, r in rates.items())]
        print(', '.join([*words, *(f'{key} {value}' for key, value in facts.items())]), flush=True)
        return result

    def finish(self) -> None:
        """Write and compare the results as the options ask."""
        where = where_measured(self.args.device)
        print('; '.join(f'{key} {value}' for key, value in where.items()))
        if self.args.json is not None:
            text = json.dumps({'where': where, 'results': self.results}, indent=1, default=str)
            self.args.json.write_text(text + '\n')
        if self.before is not None:
            self._print_ratios()

    def _read(self, path: pathlib.Path) -> dict[str, float]:
        try:
            results = json.loads(path.read_text())['results']
            return {name: float(result['median_ms']) for name, result in results.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self.parser.error(f'--compare: {path} is not a file that --json wrote: {type(error).__name__}: {error}')

    def _print_ratios(self) -> None:
        shared = [name for name in self.results if name in self.before]
        print(f'old / new time, {self.args.compare}:' if shared else f'{self.args.compare}: no names in common')
        for name in shared:
            print(f'  {name}: {self.before[name] / self.results[name]["median_ms"]:.3f}')


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f'expected at least {least}, got {value}')
        return value
    return number


def _cuda_times(function: Callable[[], object], repeats: int, flush: bool) -> list[float]:
    buffer = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.uint8, device='cuda')
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for begin, end in marks:
        buffer.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def _cpu_times(function: Callable[[], object], repeats: int, _flush: bool) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append((time.perf_counter() - begin) * 1000)
    return times


def where_measured(device: str) -> dict[str, str | None]:
    """Return what results depend on beside the code's own choices: device, versions, commit."""
    name = torch.cuda.get_device_name() if device == 'cuda' else platform.processor() or platform.machine()
    return {'device': name, 'torch': torch.__version__, 'cuda': torch.version.cuda,
            'python': platform.python_version(), 'commit': _commit(), 'platform': platform.platform()}


def _commit() -> str | None:
    try:
        command = ['git', 'rev-parse', '--short', 'HEAD']
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
