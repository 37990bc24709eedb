# SPDX-License-Identifier: Apache-2.0
"""A training run from its first to its last iteration: data, networks, ticks, snapshots, stopping and going on."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import signal
import time
from collections.abc import Iterator

import numpy as np
import torch

import legacy
from geometry.eyeballs import find_eyeballs
from geometry.meshes import read_obj
from geometry.mirror import vertex_mirror
from torch_utils import custom_ops
from torch_utils.distributed import RankLostError, Ranks, ToldElsewhereError, is_launched
from torch_utils.training_stats import Collector
from training import checkpoint, evaluation
from training.data_checks import check_before_training
from training.dataset import DatasetError, HeadDataset, open_source
from training.feed import IterationItems, iterations
from training.pictures import SheetMaker, save_sheet
from training.report import Clock, Reporter, status_line, warn
from training.run_dir import RunError, abandon, locked, open_run
from training.state import StateError, list_states, load_newest, save_state
from training.topology import MASK_NAME
from training.train_config import TrainConfig
from training.trainer import Trainer, new_networks
from training.warm_start import describe, warm_start

POSITION_MARGIN = 0.1  # Of the distance of cameras from the origin.
CHECK_EVERY = 16  # Iterations between two looks at the device's count of bad iterations: a look waits for it.
STATE_FORMAT, STATE_VERSION = 'next3d-training-state', 1
PLUGINS = ('rasterize', 'fill_holes')


class StopRequest:
    """Holds the signal that the run is to stop by: SIGTERM or SIGINT, or SIGTERM when its launcher is gone; else 0."""

    def __init__(self):
        self._signal = 0
        # Alone, the parent may be a login shell that ends with the session: no reason to stop.
        self._parent = os.getppid() if is_launched() else None

    @contextlib.contextmanager
    def listening(self) -> Iterator['StopRequest']:
        """Take over the two signals in the block; only in the main thread."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def signal(self) -> int:
        """The number of the signal, or 0."""
        is_orphan = self._parent is not None and os.getppid() != self._parent
        return self._signal or (int(signal.SIGTERM) if is_orphan else 0)

    def _note(self, number, _frame):
        self._signal = int(number)


class ReadError(DatasetError):
    """Data that could be read at the start could not be read later; told by the process that it happened to."""


def available_cores() -> int:
    """Return how many cores this process may use: in containers fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def compile_plugins() -> None:
    """Compile what is not in the cache of compiled operations."""
    for name in PLUGINS:
        custom_ops.plugin_problem(name)


def train(config: TrainConfig, ranks: Ranks, fresh: bool = False) -> int:
    """Train as configured, in all processes of a run together; go on where an earlier run of it was cut off.

    fresh: begin anew. Returns 0 at the end of the run, or the number of the signal that stopped it before. Raises
    DatasetError, RunError, legacy.NetworkFileError, geometry.meshes.MeshFileError or OSError for what users can mend,
    ToldElsewhereError where another process does so, RankLostError where one is gone.
    """
    torch.backends.cudnn.benchmark = config.benchmark
    ranks.first_alone(compile_plugins)
    data, data_digest = _open_data(config, ranks)
    folder = pathlib.Path(ranks.first_alone(lambda: str(open_run(config, data_digest, fresh))))
    with contextlib.ExitStack() as stack:
        ranks.first_alone(lambda: stack.enter_context(locked(folder)))
        stop = stack.enter_context(StopRequest().listening())
        return Session(config, ranks, data, folder, stop).run()


class Session:
    """One process's part in a run, from its start or continuation to its end or interruption."""

    def __init__(self, config: TrainConfig, ranks: Ranks, data: HeadDataset, folder: pathlib.Path, stop: StopRequest):
        self.config, self.ranks, self.data, self.folder, self.stop = config, ranks, data, folder, stop
        self.stats = Collector()
        self.reporter = self.sheets = None
        self.clock, self.snapshot_nimg = Clock(), 0
        self._start = None  # What the first process found to start from, until all have it.
        self.trainer = Trainer(config, new_networks(config), ranks, self.stats)
        origin = ranks.first_alone(self._starting_point)
        self._restore(ranks.share(self._start))
        self._start = None
        self.tick_nimg, self.last_save = self.trainer.nimg, time.monotonic()
        if ranks.is_first:
            self.reporter = Reporter(folder, self.trainer.nimg)
            self.sheets = SheetMaker(data, config.generator.z_dim, config.seed, config.batch_gpu, ranks.device)
        ranks.first_alone(functools.partial(self._introduce, origin))

    def run(self) -> int:
        """Train until the configured number of images, a signal, or a fault; the state is saved in each case."""
        if self.snapshot_nimg == self.trainer.nimg > 0:
            self._evaluate()  # The run may have been cut off while it did.
        try:
            with self._feed() as feed:
                number = self._iterate(feed)
        except RuntimeError as error:
            if 'DataLoader worker' not in str(error):
                raise
            # Its death interrupts whatever runs: the iteration is lost, not the run.
            reason = str(error).splitlines()[0].strip()
            raise ReadError(f'a process that loads data was ended ({reason}); {self._what_is_kept()}') from error
        kimg = self.trainer.nimg / 1000
        if number:
            name = signal.Signals(number).name
            self._say(f'Stopped at kimg {kimg:.3f} by {name}; the same command goes on from the newest state')
            return number
        if self.tick_nimg < self.trainer.nimg:
            self._end_tick()
        if self.snapshot_nimg < self.trainer.nimg:
            self._snapshot(is_last=True)
        self._say(f'Finished at kimg {kimg:.3f}: {self.folder}')
        return 0

    def _feed(self):
        config, trainer = self.config, self.trainer
        items = IterationItems(self.data, trainer.plan, config.seed, trainer.intervals, config.disc_render is not None)
        workers = min(config.workers, available_cores())
        is_pinned = self.ranks.device.type == 'cuda'
        return iterations(items, trainer.iteration, config.num_iterations, workers, is_pinned)

    def _iterate(self, feed):
        """Run the iterations that are left; return the signal to stop by, or 0 at their end."""
        while True:
            data, fault = _next(feed)
            if data is None and fault is None:
                return 0  # In all processes: they take the same number of iterations.
            number = self._agree(fault)
            if number:
                return number
            self.trainer.step(data)
            before, now = self._num_ticks(self.tick_nimg), self._num_ticks(self.trainer.nimg)
            if now > before:
                self._end_tick()
                if now // self.config.snap > before // self.config.snap:
                    self._snapshot()

    def _agree(self, fault):
        """Let all processes agree, before an iteration, on saving and stopping; return the signal to stop by, or 0."""
        minutes = (time.monotonic() - self.last_save) / 60
        is_due = self.ranks.is_first and 0 < self.config.save_minutes <= minutes
        number, faults, is_due = self.ranks.agree([self.stop.signal, fault is not None, is_due])
        if self.trainer.iteration % CHECK_EVERY == 0:
            bad = int(self.trainer.bad_iterations)  # Equal in all processes.
            if bad >= self.config.patience:
                raise RunError(f'the loss was not finite in the last {bad} iterations; {self._what_is_kept()}')
        if number or faults or is_due:
            self._save_state(must_succeed=bool(number or faults))
        if fault is not None:
            raise fault
        if faults:
            raise ToldElsewhereError('another process could not read its data')
        return int(number)

    def _num_ticks(self, nimg):
        """Return how many ticks have ended after so many images."""
        return int(nimg / (self.config.tick_kimg * 1000) + 1e-9)

    def _end_tick(self):
        """Report on the tick: one reduction of all statistics."""
        nimg = self.trainer.nimg
        statistics = self.stats.collect(self._sum_statistics)
        seconds = self.clock.end_tick()
        if self.ranks.is_first:
            tick, images = self._num_ticks(nimg), nimg - self.tick_nimg
            line, numbers = status_line(
                tick, nimg, self.config.kimg, images, seconds, self.clock, self.ranks.device
            )
            if self.trainer.augment is not None:
                line += f'  augment {self.trainer.augment.p:.3f}'
            numbers['Progress/rendering_resolution'] = self.trainer.rendering_resolution
            self.reporter.say(line)
            self.reporter.statistics(statistics, nimg, numbers)
        self.tick_nimg = nimg

    def _sum_statistics(self, moments):
        on_device = moments.to(self.ranks.device)
        self.ranks.sum_(on_device, 'the reduction of statistics')
        moments.copy_(on_device)

    def _snapshot(self, is_last=False):
        """Write the networks, pictures and the state, and evaluate the metrics."""
        with self.clock.elsewhere():
            self._check_weights()
            self.snapshot_nimg = self.trainer.nimg
            self.ranks.first_alone(self._write_snapshot)
            self._save_state(must_succeed=is_last)
            self._evaluate()

    def _write_snapshot(self):
        path = self._snapshot_path()
        self.reporter.attempt(path.name, lambda: checkpoint.save_snapshot(path, self.trainer.snapshot()))
        self._draw(f'fakes{self.snapshot_nimg // 1000:06d}')

    def _snapshot_path(self):
        return self.folder / f'network-snapshot-{self.snapshot_nimg // 1000:06d}.pkl'

    def _evaluate(self):
        """Evaluate the metrics that the run's files do not have for this snapshot."""
        nimg, names = self.trainer.nimg, self.config.metrics
        missing = self.ranks.first_alone(lambda: [name for name in names if not self.reporter.has_metric(name, nimg)])
        for name in missing:
            given = evaluation.Evaluation(
                self.trainer.networks.G_ema, self.data, self.ranks, nimg, self.trainer.rendering_resolution,
                self._snapshot_path(),
            )
            try:
                results = evaluation.evaluate(name, given)
            except (evaluation.EvaluationError, ToldElsewhereError) as error:  # What was learned is worth more.
                if self.ranks.is_first:
                    self.reporter.complain(f'{name}: not measured: {error}')
                continue
            if self.ranks.is_first:
                self.reporter.metric(name, results, nimg, self._snapshot_path().name)

    def _draw(self, name):
        sheets = self.sheets.fakes(self.trainer.networks.G_ema, self.trainer.rendering_resolution)
        for ending, sheet in sheets.items():
            path = self.folder / f'{name}{ending}.png'
            self.reporter.attempt(path.name, functools.partial(save_sheet, path, sheet))

    def _check_weights(self):
        try:
            self.trainer.check_weights()
        except RankLostError:
            raise
        except RuntimeError as error:
            raise RunError(f'{error}; {self._what_is_kept()}') from error

    def _save_state(self, must_succeed):
        """Write the state, unless the loss is not finite just now: then the one before is worth more."""
        with self.clock.elsewhere():
            self._check_weights()
            self.trainer.gather()
            self.stats.gather(self._sum_statistics, self.ranks.is_first)
            self.last_save = time.monotonic()
            if int(self.trainer.bad_iterations) == 0:
                self.ranks.first_alone(functools.partial(self._write_state, must_succeed))
            elif self.ranks.is_first:
                self.reporter.complain(f'state not saved: the loss is not finite; {self._what_is_kept()}')

    def _write_state(self, must_succeed):
        """A disk that refuses the state ends the run only where the run ends anyway."""
        try:
            save_state(self.folder, self.trainer.nimg, self._state())
        except OSError as error:
            kimg, why = self.trainer.nimg / 1000, error.strerror or error
            text = f'the state at kimg {kimg:.3f} could not be saved ({why})'
            if must_succeed:
                raise RunError(f'{text}; {self._what_is_kept()}') from error
            self.reporter.complain(f'{text}; training goes on, {self._what_is_kept()}')

    def _what_is_kept(self):
        states = list_states(self.folder)
        return f'the last good state is kept: {states[0]}' if states else 'no state had been saved before'

    def _state(self):
        return {
            'format': STATE_FORMAT,
            'version': STATE_VERSION,
            'options': self.config.digest(),
            'elapsed_s': self.clock.elapsed_s,
            'snapshot_nimg': self.snapshot_nimg,
            'stats': self.stats.state_dict(),
            'trainer': self.trainer.state_dict(),
        }

    def _starting_point(self):
        """Find the state to start from, in the first process; return what to say of it."""
        try:
            found = load_newest(self.folder, warn)
        except StateError as error:
            raise RunError(str(error)) from error
        if found is not None:
            path, self._start = found
            if (self._start.get('format'), self._start.get('version')) != (STATE_FORMAT, STATE_VERSION):
                raise RunError(f'{path}: expected a state of this version of the project; use --fresh')
            if self._start['options'] != self.config.digest():  # Options that the folder's file lacks have been added.
                warn(f'{path.name} was written by another version of the project')
            return f'Going on from {path.name}'
        text = 'Starting from random weights'
        if self.config.resume is not None:
            text = f'Starting from {self.config.resume}\n{self._warm_start()}'
        self._start = self._state()
        return text

    def _warm_start(self):
        """Take the weights that --resume names; return what was taken. Where that fails, no run has begun."""
        try:
            source = legacy.load_network_pkl(self.config.resume)
            return describe(warm_start(self.trainer.networks._asdict(), source))
        except (ValueError, OSError) as error:
            abandon(self.folder)
            if isinstance(error, (legacy.NetworkFileError, OSError)):
                raise
            raise RunError(f'--resume: {self.config.resume}: {error}') from error

    def _restore(self, state):
        self.trainer.load_state_dict(state['trainer'])
        self.clock = Clock(state['elapsed_s'])
        self.snapshot_nimg = state['snapshot_nimg']
        self.stats.load_state_dict(state['stats'], self.ranks.is_first)

    def _introduce(self, origin):
        config, networks = self.config, self.trainer.networks
        sizes = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
        self.reporter.say(f'Run {self.folder}')
        self.reporter.say(
            f'{config.preset}: G {sizes[0]:.1f} M, D {sizes[1]:.1f} M parameters; {len(self.data)} pictures of '
            f'{self.data.resolution} pixels; batch {config.batch} in micro-batches of {config.batch_gpu} on '
            f'{self.ranks.size} {config.device} process{"es" * (self.ranks.size > 1)}'
        )
        self.reporter.say(origin)
        if self.trainer.nimg == 0:
            path = self.folder / 'reals.png'
            self.reporter.attempt(path.name, lambda: save_sheet(path, self.sheets.reals()))
            self._draw('fakes_init')

    def _say(self, text):
        if self.ranks.is_first:
            self.reporter.say(text)


def _next(feed):
    """Return (the next iteration's data, None), (None, None) at the end, or (None, the error that came instead)."""
    try:
        return next(feed), None
    except StopIteration:
        return None, None
    except (DatasetError, OSError, RuntimeError) as error:  # RuntimeError: a worker process was killed.
        last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]  # Workers put a traceback before it.
        return None, ReadError(f'reading data failed: {last_line}')


def _open_data(config, ranks):
    """Check and open the data set; return it with a hash of its names and labels."""
    template = read_obj(config.topology_path)
    num_vertices = len(template.vertices)
    if config.loss.gaze_mismatch > 0 and not find_eyeballs(template.vertices, template.faces):
        raise RunError(f'--disc_gaze: expected eyeballs as separate parts of {config.topology_path}, found none')
    source = open_source(config.data, config.rdata, config.with_expressions)
    radius = config.generator.avg_camera_radius
    check = functools.partial(
        check_before_training, source, num_vertices, config.resolution, available_cores(),
        position=(radius - POSITION_MARGIN, radius + POSITION_MARGIN),
    )
    ranks.first_alone(check)
    partner = vertex_mirror(template.vertices) if config.mirror else None
    data = HeadDataset(source, num_vertices, config.resolution, partner, config.label_length, source.repeats)
    digest = _digest(config, source)
    try:
        ranks.check_same(f'{config.data} and {config.topology_path}', digest)
    except RankLostError:
        raise
    except RuntimeError as error:
        raise RunError(str(error)) from error
    return data, digest


def _digest(config, source):
    """Return a hash of what a run takes from files: names, labels, repeats, the template and its mask."""
    template = pathlib.Path(config.topology_path)
    digest = hashlib.sha256(json.dumps(source.names).encode())
    digest.update(np.ascontiguousarray(source.labels).tobytes())
    if (source.repeats > 1).any():
        digest.update(source.repeats.tobytes())
    for path in (template, template.with_name(MASK_NAME)):
        digest.update(path.read_bytes() if path.exists() else b'none')
    return digest.hexdigest()
