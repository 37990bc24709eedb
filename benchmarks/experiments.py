# SPDX-License-Identifier: Apache-2.0
"""Trains the network with each of three kinds of planes, with and without a rendering of the mesh for the
discriminator, on the same data for as many pictures, and measures what each choice changes: docs/experiments.md.

Every combination is a run of train_next3d.py as a user would start it, then one of calc_metrics.py and one of
gen_sheets.py. With --gpus=N and --share=M, N x M are trained at once. Run again to go on after an interruption, and
with a larger --kimg to train longer.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys

from PIL import Image, ImageDraw, ImageFont

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Run as a script from any folder.

from gen_sheets import HEADING  # noqa: E402  (needs the path above)

MARGIN = 90  # Pixels beside the sheets, for what the rows are.
# The layout decides about the two side views alone, which a mesh that paints the front plane does not have.
PLANES = {
    'aligned': ('--plane-layout=aligned', '--blend-planes=all'),
    'next3d': ('--plane-layout=next3d', '--blend-planes=all'),
    'front': ('--plane-layout=aligned', '--blend-planes=front'),
}
RENDERS = {'waves': ('--disc-render=waves',), 'none': ('--disc-render=False',)}
CHANGES = {
    'layout: aligned to next3d': (0, 'aligned', 'next3d'),
    'painted planes: all (aligned) to front': (0, 'aligned', 'front'),
    'mesh shown to D: waves to none': (1, 'waves', 'none'),
}
PEOPLE, SHOWN = 4, 2  # On the sheets of a run; on those of all runs side by side.
METRICS = ('kid5k_mobilenet', 'aed', 'apd', 'follow', 'id', 'depth', 'reprojection', 'animation')


def options():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n', maxsplit=1)[0].replace('\n', ' '))
    parser.add_argument('--data', type=pathlib.Path, required=True, help='packed drawn people to train on')
    parser.add_argument('--test-data', type=pathlib.Path, required=True, help='others, for the metrics')
    parser.add_argument('--out', type=pathlib.Path, required=True)
    parser.add_argument('--seeds', default='0', help='all combinations for each [default: %(default)s]')
    parser.add_argument('--kimg', type=float, default=60, help='of each run [default: %(default)s]')
    parser.add_argument('--num', type=int, default=1000, help='pictures of each metric [default: %(default)s]')
    parser.add_argument('--metrics', default=','.join(METRICS), help='[default: %(default)s]')
    parser.add_argument('--gpus', type=int, default=0, help='0: the CPU')
    parser.add_argument('--share', type=int, default=1, help='runs at once on each GPU [default: %(default)s]')
    parser.add_argument('--cfg', default='demo128', help='preset [default: %(default)s]')
    parser.add_argument('train', nargs='*', help='further options of train_next3d.py for all, after --')
    return parser.parse_args()


def call(script, *words, gpu=None, log=None):
    """Run a script of the project on one GPU or the CPU and return what it printed; its errors go to the log."""
    env = dict(os.environ, CUDA_VISIBLE_DEVICES='' if gpu is None else str(gpu), OMP_NUM_THREADS='1')
    with open(log, 'a', encoding='utf-8') as file:
        done = subprocess.run([sys.executable, ROOT / script, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                              stderr=file, text=True)  # fmt: skip
        file.write(done.stdout)
    if done.returncode:
        raise SystemExit(f'{script} {" ".join(words)}: exit status {done.returncode}, see {log}')
    return done.stdout


def run(planes, render, seed, arguments, gpu):
    """Train and measure one combination with one seed, or go on with it; return its results {name: number}."""
    folder = arguments.out / f'{planes}-{render}-{seed}'
    folder.mkdir(parents=True, exist_ok=True)
    device = 'cpu' if gpu is None else 'cuda'
    call(
        'train_next3d.py', f'--cfg={arguments.cfg}', f'--data={arguments.data}', f'--outdir={folder}/runs',
        f'--topology-path={arguments.data}/head_template.obj', f'--seed={seed}', f'--kimg={arguments.kimg}',
        '--gen_pose_cond=True', '--mirror=True', f'--device={device}', *PLANES[planes], *RENDERS[render],
        *arguments.train, gpu=gpu, log=folder / 'log.txt',
    )  # fmt: skip
    network = sorted(folder.glob('runs/0*/network-snapshot-*.pkl'))[-1]
    results = folder / f'{network.stem}.json'
    if not results.exists():
        text = call(
            'calc_metrics.py', f'--network={network}', f'--data={arguments.test_data}',
            f'--metrics={arguments.metrics}', f'--num={arguments.num}', '--batch=32', f'--device={device}',
            '--verbose=False', gpu=gpu, log=folder / 'log.txt',
        )  # fmt: skip
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{')]
        results.write_text(json.dumps({line['metric']: line for line in lines}))
    call('gen_sheets.py', f'--network={network}', f'--seeds=0-{PEOPLE - 1}', f'--outdir={folder}', f'--device={device}',
         gpu=gpu, log=folder / 'log.txt')  # fmt: skip
    return {name: value for line in json.loads(results.read_text()).values() for name, value in line['results'].items()}


def effects(found, name):
    """Return {change: (difference, standard error)} of a number in {(planes, render, seed): results}: its mean change
    over the pairs of runs that differ in nothing else. Of one pair, error None; of none, None for both."""
    told = {}
    for change, (at, before, after) in CHANGES.items():
        gaps = []
        for key, results in found.items():
            other = found.get((*key[:at], after, *key[at + 1 :]))
            if key[at] == before and other and None not in (results[name], other[name]):
                gaps.append(other[name] - results[name])
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else None
        told[change] = (statistics.mean(gaps) if gaps else None, error)
    return told


def tables(found):
    """Return results {(planes, render, seed): {name: number}} as two tables in Markdown: a row for each number, its
    value in each run, with what an estimator finds in exact pictures in a column, and what each choice changes."""
    first = next(iter(found.values()))
    exact = {name.replace('_estimator', '', 1): name for name in first if '_estimator' in name}
    names = [name for name in first if not name.endswith('_se') and name not in exact.values()]
    values = [['', 'exact pictures', *(f'{planes}, {render}; {seed}' for planes, render, seed in found)]]
    changes = [['', *CHANGES]]
    for name in names:
        cells = [_cell(first[exact[name]], first.get(f'{exact[name]}_se')) if name in exact else '']
        cells += [_cell(run[name], run.get(f'{name}_se')) for run in found.values()]
        values.append([f'`{name}`', *cells])
        changes.append([f'`{name}`', *(_cell(*change, '+') for change in effects(found, name).values())])
    return '\n\n'.join(_markdown(rows) for rows in (values, changes))


def _markdown(rows):
    lines = [f'| {" | ".join(row)} |' for row in rows]
    return '\n'.join([lines[0], '|---' * len(rows[0]) + '|', *lines[1:]])


def _cell(value, error, sign=''):
    told = ['?' if number is None else f'{number:{how}.3g}' for number, how in ((value, sign), (error, ''))]
    return ' ± '.join(told)


def side_by_side(pictures):
    """Return the first rows of sheets {label: picture} below each other, under one heading."""
    first = next(iter(pictures.values()))
    side = (first.height - HEADING) // PEOPLE
    whole = Image.new('RGB', (MARGIN + first.width, HEADING + len(pictures) * SHOWN * side), 'white')
    whole.paste(first.crop((0, 0, first.width, HEADING)), (MARGIN, 0))
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(16)
    for number, (label, picture) in enumerate(pictures.items()):
        top = HEADING + number * SHOWN * side
        whole.paste(picture.crop((0, HEADING, first.width, HEADING + SHOWN * side)), (MARGIN, top))
        draw.text((MARGIN / 2, top + SHOWN * side / 2), label, 'black', font, anchor='mm', align='center')
    return whole


def main():
    """Train and measure all combinations; print the tables, write them to table.md and sheets of all side by side."""
    arguments = options()
    seeds = [int(seed) for seed in arguments.seeds.split(',')]
    jobs = [(planes, render, seed) for seed in seeds for planes, render in itertools.product(PLANES, RENDERS)]
    free = queue.Queue()
    places = [*range(arguments.gpus)] * arguments.share or [None]
    for gpu in places:
        free.put(gpu)

    def work(job):
        gpu = free.get()
        try:
            return job, run(*job, arguments, gpu)
        finally:
            free.put(gpu)

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        found = dict(pool.map(work, jobs))
    for name in ('cameras.png', 'expressions.png'):
        sheets = {f'{planes}\n{render}': Image.open(arguments.out / f'{planes}-{render}-{seed}' / name)
                  for render, planes in itertools.product(RENDERS, PLANES) for seed in seeds[:1]}  # fmt: skip
        side_by_side(sheets).save(arguments.out / name)
    text = tables(found)
    (arguments.out / 'table.md').write_text(text + '\n')
    print(text)


if __name__ == '__main__':
    main()
