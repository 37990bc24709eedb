# SPDX-License-Identifier: Apache-2.0
"""Time and memory of training iterations, phase by phase, on random data: ffhq512 at full size by default.

On several GPUs: torchrun --nproc-per-node=N benchmarks/bm_training.py --batch=4N
"""

import argparse
import itertools
import json
import pathlib
import statistics
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from bench import SIMPLE_HEAD, where_measured  # noqa: E402  (needs the path above)
from geometry import cameras  # noqa: E402
from geometry.meshes import read_landmarks, read_obj, stack_mesh  # noqa: E402
from torch_utils.distributed import joined  # noqa: E402
from torch_utils.training_stats import Collector  # noqa: E402
from training.feed import Fakes, IterationData, Reals  # noqa: E402
from training.precision import COMPUTE_DTYPES  # noqa: E402
from training.train_config import PRESETS, make_config  # noqa: E402
from training.trainer import LARGEST_GRADIENT, Trainer, new_networks  # noqa: E402

WARM_UP = 5
BUCKET_BYTES = 1 << 26


class Moment:
    """A moment on the device's clock, or the host's."""

    def __init__(self, device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == 'cuda' else None
        if self.event is None:
            self.time = time.perf_counter()
        else:
            self.event.record()

    def ms_until(self, other):
        """Return milliseconds to a later moment; the device has to have passed it."""
        return (other.time - self.time) * 1000 if self.event is None else self.event.elapsed_time(other.event)


class TimedTrainer(Trainer):
    """Notes when each phase, each reduction of gradients and the average begin and end on the device."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.marks = []

    def mark(self, name):
        """Note the moment under a name; '' ends what was begun last."""
        self.marks.append((name, Moment(self.ranks.device)))

    def _run_phase(self, phase, *arguments):
        self.mark(phase.name)
        super()._run_phase(phase, *arguments)
        self.mark('')

    def _reduce_gradients(self, name, parameters):
        self.mark(f'{name} gradients')
        super()._reduce_gradients(name, parameters)
        self.mark('')

    def _average(self):
        self.mark('ema')
        super()._average()
        self.mark('')


class BucketTrainer(TimedTrainer):
    """The alternative to one flat reduction: buckets in the order of backward, each sent when its gradients are final.

    How often a parameter's gradient is added to in a phase is counted in the phase's first run, which reduces flat.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.counts, self.orders, self.seen, self.ready, self.works = {}, {}, {}, [], []
        for network in (self.networks.G, self.networks.D):
            for parameter in network.parameters():
                parameter.requires_grad_(True)
                parameter.register_post_accumulate_grad_hook(self._note)
                parameter.requires_grad_(False)

    def _run_phase(self, phase, *arguments):
        self.phase, self.seen, self.ready, self.works = phase.name, {}, [], []
        super()._run_phase(phase, *arguments)

    def _note(self, parameter):
        self.seen[parameter] = self.seen.get(parameter, 0) + 1
        expected = self.counts.get(self.phase)
        if expected is not None and self.seen[parameter] == expected[parameter]:
            self.ready.append(parameter.grad)
            if sum(g.numel() for g in self.ready) * 4 >= BUCKET_BYTES:
                self._send()

    def _send(self):
        flat = torch.cat([g.reshape(-1) for g in self.ready])
        self.works.append((torch.distributed.all_reduce(flat, async_op=True), flat, self.ready))
        self.ready = []

    def _reduce_gradients(self, name, parameters):
        if name not in self.counts:
            self.counts[name] = dict(self.seen)
            return super()._reduce_gradients(name, parameters)
        self.mark(f'{name} gradients')
        if self.ready:
            self._send()
        for work, flat, gradients in self.works:
            work.wait()
            self.stats.report(f'Gradients/nonfinite/{name}', (~flat.isfinite()).sum())
            torch.nan_to_num(flat, nan=0.0, posinf=LARGEST_GRADIENT, neginf=-LARGEST_GRADIENT, out=flat)
            pieces = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients)])
        self.mark('')


REDUCTIONS = {'flat': TimedTrainer, 'buckets': BucketTrainer}


def random_data(trainer, iteration):
    """Return one process's part of an iteration: the tests' simple head, cameras 0.1 rad apart, noise for pictures."""
    c, count = trainer.config, trainer.plan.num_rounds * trainer.plan.batch_gpu
    mesh = stack_mesh(read_obj(SIMPLE_HEAD / 'demo.obj').vertices, read_landmarks(SIMPLE_HEAD / 'demo_kpt2d.txt'))
    mesh = np.repeat(mesh, count, axis=0)
    poses = torch.cat([cameras.look_at_pose(cameras.FRONTAL + 0.1 * (i % 4), cameras.FRONTAL) for i in range(count)])
    label = cameras.make_label(poses, cameras.intrinsics()).numpy()
    image = np.random.RandomState(0).randint(0, 256, (count, 3, c.resolution, c.resolution), dtype=np.uint8)
    fakes = {name: Fakes(*_loaded((label, mesh))) for name in trainer.intervals}
    return IterationData(iteration, Reals(*_loaded((image, label, mesh))), fakes)


def _loaded(arrays):
    """Return arrays as the loader of a training run gives them."""
    tensors = [torch.from_numpy(np.ascontiguousarray(x)) for x in arrays]
    return [x.pin_memory() for x in tensors] if torch.cuda.is_available() else tensors


def spans(marks):
    """Return milliseconds by name of marks that nest at most once."""
    times, opened = {}, []
    for name, moment in marks:
        if name:
            opened.append((name, moment))
        else:
            begun, start = opened.pop()
            times.setdefault(begun, []).append(start.ms_until(moment))
    return times


def measure(config, ranks, iterations, trainer_class=TimedTrainer):
    """Return medians and quartiles in ms by name, seconds per thousand images and, on a GPU, peak memory in GiB."""
    torch.backends.cudnn.benchmark = config.benchmark
    trainer = trainer_class(config, new_networks(config), ranks, Collector())
    data = random_data(trainer, 0)
    for _ in range(WARM_UP):
        trainer.iteration = 0  # All phases are due.
        trainer.step(data)
    is_cuda = ranks.device.type == 'cuda'
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.marks.clear()
    trainer.iteration = 0
    begin = Moment(ranks.device)
    for _ in range(iterations):
        trainer.step(data)
    end = Moment(ranks.device)
    if is_cuda:
        torch.cuda.synchronize()
    times = spans(trainer.marks)
    medians = {name: statistics.median(values) for name, values in times.items()}
    quartiles = {name: statistics.quantiles(x, n=4, method='inclusive')[::2] for name, x in times.items() if len(x) > 1}
    seconds = begin.ms_until(end) / iterations / config.batch  # A millisecond an image is a second a thousand.
    result = {'median_ms': medians, 'quartiles_ms': quartiles, 's_per_kimg': seconds}
    if is_cuda:
        result['peak_GiB'] = torch.cuda.max_memory_allocated() / 2**30
        result['peak_reserved_GiB'] = torch.cuda.max_memory_reserved() / 2**30
    return result


def main():
    """Print a table; --json writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', choices=PRESETS, default='ffhq512')
    parser.add_argument('--batch', type=int, default=4, help='images of an iteration, over all GPUs')
    parser.add_argument('--rendering', type=int, nargs='+', default=[64], help='sides of the raw picture')
    parser.add_argument('--iterations', type=int, default=40)
    parser.add_argument('--reductions', nargs='+', choices=REDUCTIONS, default=['flat'], help='of gradients')
    parser.add_argument('--nographs', action='store_true', help='no CUDA graphs')
    parser.add_argument('--precision', nargs='+', choices=COMPUTE_DTYPES, default=['fp32'])
    parser.add_argument('--device', choices=['cuda', 'cpu'], default='cuda')
    parser.add_argument('--json', type=pathlib.Path, metavar='PATH', help='write the results to this file')
    parser.add_argument('--compare', type=pathlib.Path, metavar='PATH', help='a file that --json wrote before')
    arguments = parser.parse_args()
    results, before = {}, _read(parser, arguments.compare)
    with joined(arguments.device, 600) as ranks:
        for precision, side, reduction in itertools.product(
            arguments.precision, arguments.rendering, arguments.reductions
        ):
            config = make_config(
                arguments.preset, '', '', batch=arguments.batch, gpus=ranks.size, gen_pose_cond=True, disc_c_noise=1.0,
                neural_rendering_resolution_initial=side, resume='weights', device=arguments.device,
                precision=precision, nographs=arguments.nographs or reduction == 'buckets',
                topology_path=str(SIMPLE_HEAD / 'head_template.obj'),
            )
            key = f'{precision} {side} {reduction}'
            results[key] = measure(config, ranks, arguments.iterations, REDUCTIONS[reduction])
            if ranks.is_first:  # At once: what is measured is not lost with what is not.
                times = ', '.join(f'{name} {value:.1f}' for name, value in results[key]['median_ms'].items())
                memory = f', {results[key]["peak_GiB"]:.1f} GiB' if 'peak_GiB' in results[key] else ''
                print(f'{key}: {results[key]["s_per_kimg"]:.1f} s/kimg{memory}; median ms: {times}', flush=True)
    if ranks.is_first:
        _finish(arguments, {**where_measured(arguments.device), 'gpus': ranks.size}, results, before)


def _read(parser, path):
    """Return seconds per thousand images by name of a file of results; exit with one line where it is none."""
    try:
        results = {} if path is None else json.loads(path.read_text())['results']
        return {name: float(result['s_per_kimg']) for name, result in results.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        parser.error(f'--compare: {path} is not a file that --json wrote: {type(error).__name__}: {error}')


def _finish(arguments, where, results, before):
    """Print where the results come from and how they compare, and write them."""
    print('; '.join(f'{key} {value}' for key, value in where.items()))
    for name in results.keys() & before.keys():
        print(f'old / new time, {name}: {before[name] / results[name]["s_per_kimg"]:.3f}')
    if arguments.json:
        options = {key: value for key, value in vars(arguments).items() if key not in ('json', 'compare')}
        arguments.json.write_text(json.dumps({'where': where, **options, 'results': results}, indent=1) + '\n')


if __name__ == '__main__':
    main()
