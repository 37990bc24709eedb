# SPDX-License-Identifier: Apache-2.0
"""Time and memory of training iterations, phase by phase, on random data: ffhq512 at full size by default.

On several GPUs: torchrun --nproc-per-node=N benchmarks/bm_training.py --batch=4N
"""

import argparse
import json
import pathlib
import platform
import statistics
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from geometry import cameras  # noqa: E402  (needs the path above)
from geometry.meshes import read_landmarks, read_obj, stack_mesh  # noqa: E402
from torch_utils.distributed import joined  # noqa: E402
from torch_utils.training_stats import Collector  # noqa: E402
from training.feed import Fakes, IterationData, Reals  # noqa: E402
from training.train_config import PRESETS, make_config  # noqa: E402
from training.trainer import Trainer, new_networks  # noqa: E402

WARM_UP = 5
DEMO = pathlib.Path(__file__).resolve().parents[1] / 'data' / 'demo'


class TimedTrainer(Trainer):
    """Notes when each phase, each reduction of gradients and the average begin and end on the device."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.marks = []

    def mark(self, name):
        """Note the moment under a name."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

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


def random_data(trainer, iteration):
    """Return one process's part of an iteration: the demo head, cameras 0.1 rad apart, noise for pictures."""
    c, count = trainer.config, trainer.plan.num_rounds * trainer.plan.batch_gpu
    mesh = stack_mesh(read_obj(DEMO / 'demo.obj').vertices, read_landmarks(DEMO / 'demo_kpt2d.txt'))
    mesh = np.repeat(mesh, count, axis=0)
    poses = torch.cat([cameras.look_at_pose(cameras.FRONTAL + 0.1 * (i % 4), cameras.FRONTAL) for i in range(count)])
    label = cameras.make_label(poses, cameras.intrinsics()).numpy()
    image = np.random.RandomState(0).randint(0, 256, (count, 3, c.resolution, c.resolution), dtype=np.uint8)
    fakes = {name: Fakes(label, mesh) for name in trainer.intervals}
    return IterationData(iteration, Reals(image, label, mesh), fakes)


def spans(marks):
    """Return milliseconds by name of marks that nest at most once."""
    times, opened = {}, []
    for name, event in marks:
        if name:
            opened.append((name, event))
        else:
            begun, start = opened.pop()
            times.setdefault(begun, []).append(start.elapsed_time(event))
    return times


def measure(config, ranks, iterations):
    """Return medians in ms by name, seconds per thousand images and peak memory in GiB."""
    torch.backends.cudnn.benchmark = config.benchmark
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    trainer = TimedTrainer(config, new_networks(config), ranks, Collector())
    data = random_data(trainer, 0)
    for _ in range(WARM_UP):
        trainer.iteration = 0  # All phases are due.
        trainer.step(data)
    torch.cuda.reset_peak_memory_stats()
    trainer.marks.clear()
    trainer.iteration = 0
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(iterations):
        trainer.step(data)
    end.record()
    torch.cuda.synchronize()
    medians = {name: statistics.median(times) for name, times in spans(trainer.marks).items()}
    return {
        'median_ms': medians,
        's_per_kimg': begin.elapsed_time(end) / iterations / config.batch,
        'peak_GiB': torch.cuda.max_memory_allocated() / 2**30,
        'peak_reserved_GiB': torch.cuda.max_memory_reserved() / 2**30,
    }


def main():
    """Print a table; --json writes the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', choices=PRESETS, default='ffhq512')
    parser.add_argument('--batch', type=int, default=4, help='images of an iteration, over all GPUs')
    parser.add_argument('--rendering', type=int, nargs='+', default=[64], help='sides of the raw picture')
    parser.add_argument('--iterations', type=int, default=40)
    parser.add_argument('--json', type=pathlib.Path)
    arguments = parser.parse_args()
    results = {}
    with joined('cuda', 600) as ranks:
        for side in arguments.rendering:
            config = make_config(
                arguments.preset, '', '', batch=arguments.batch, gpus=ranks.size, gen_pose_cond=True, disc_c_noise=1.0,
                neural_rendering_resolution_initial=side, resume='weights',
                topology_path=str(DEMO / 'head_template.obj'),
            )
            results[side] = measure(config, ranks, arguments.iterations)
            torch.cuda.empty_cache()
    if ranks.is_first:
        where = f'{torch.cuda.get_device_name()} x{ranks.size}, torch {torch.__version__}, {platform.python_version()}'
        print(f'{arguments.preset}, batch {arguments.batch}, {arguments.iterations} iterations; {where}')
        for side, result in results.items():
            times = ', '.join(f'{name} {value:.1f}' for name, value in result['median_ms'].items())
            print(f'{side}: {result["s_per_kimg"]:.1f} s/kimg, {result["peak_GiB"]:.1f} GiB; median ms: {times}')
        if arguments.json:
            arguments.json.write_text(json.dumps({'where': where, **vars(arguments), 'results': results}, default=str))


if __name__ == '__main__':
    main()
