# SPDX-License-Identifier: Apache-2.0
"""Trains variants of the network on the same data for the same time and measures them: docs/experiments.md.

Every variant is a run of train_next3d.py as a user would start it, then one of calc_metrics.py and of gen_sheets.py.
With --gpus=N so many variants are trained at once, one a GPU. Run again to go on after an interruption.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import queue
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
USUAL = ('--plane-layout=aligned', '--blend-planes=all', '--disc-render=waves')
VARIANTS = {  # What each changes of USUAL.
    'usual': (),
    'layout-next3d': ('--plane-layout=next3d',),
    'blend-front': ('--blend-planes=front',),
    'next3d-front': ('--plane-layout=next3d', '--blend-planes=front'),
    'no-render': ('--disc-render=False',),
    'render-normals': ('--disc-render=True',),
}
METRICS = ('kid5k_mobilenet', 'aed', 'apd', 'follow', 'id', 'depth', 'reprojection', 'animation')


def options():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=pathlib.Path, required=True, help='packed drawn people to train on')
    parser.add_argument('--test-data', type=pathlib.Path, required=True, help='others, for the metrics')
    parser.add_argument('--out', type=pathlib.Path, required=True)
    parser.add_argument('--variants', default=','.join(VARIANTS), help='[default: %(default)s]')
    parser.add_argument('--seeds', default='0', help='a run of each variant for each [default: %(default)s]')
    parser.add_argument('--kimg', type=float, default=80, help='of each run [default: %(default)s]')
    parser.add_argument('--num', type=int, default=1000, help='pictures of each metric [default: %(default)s]')
    parser.add_argument('--metrics', default=','.join(METRICS), help='[default: %(default)s]')
    parser.add_argument('--gpus', type=int, default=0, help='variants trained at once; 0: one, on the CPU')
    parser.add_argument('--cfg', default='demo', help='preset [default: %(default)s]')
    parser.add_argument('train', nargs='*', help='further options of train_next3d.py for all, after --')
    arguments = parser.parse_args()
    unknown = set(arguments.variants.split(',')) - set(VARIANTS)
    if unknown:
        parser.error(f'--variants: expected some of {", ".join(VARIANTS)}, got {", ".join(sorted(unknown))}')
    return arguments


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


def run(variant, seed, arguments, gpu):
    """Train and measure one variant with one seed, or go on with it; return its results by metric."""
    folder = arguments.out / f'{variant}-{seed}'
    folder.mkdir(parents=True, exist_ok=True)
    device = 'cpu' if gpu is None else 'cuda'
    call(
        'train_next3d.py', f'--cfg={arguments.cfg}', f'--data={arguments.data}', f'--outdir={folder}/runs',
        f'--topology-path={arguments.data}/head_template.obj', f'--seed={seed}', f'--kimg={arguments.kimg}',
        '--gen_pose_cond=True', '--mirror=True', f'--device={device}', *USUAL, *VARIANTS[variant], *arguments.train,
        gpu=gpu, log=folder / 'log.txt',
    )  # fmt: skip
    network = f'--network={sorted(folder.glob("runs/0*/network-snapshot-*.pkl"))[-1]}'
    results = folder / 'results.json'
    if not results.exists():
        text = call(
            'calc_metrics.py', network, f'--data={arguments.test_data}', f'--metrics={arguments.metrics}',
            f'--num={arguments.num}', '--batch=16', f'--device={device}', '--verbose=False', gpu=gpu,
            log=folder / 'log.txt',
        )  # fmt: skip
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{')]
        results.write_text(json.dumps({line['metric']: line for line in lines}))
    call('gen_sheets.py', network, '--seeds=0-3', f'--outdir={folder}', f'--device={device}', gpu=gpu,
         log=folder / 'log.txt')  # fmt: skip
    return json.loads(results.read_text())


def table(found):
    """Return results {(variant, seed): {metric: line}} as a table in Markdown, a row for each number, with standard
    errors; what an estimator finds in exact pictures is a column of its own."""
    runs = [{name: value for line in lines.values() for name, value in line['results'].items()}
            for lines in found.values()]  # fmt: skip
    exact = {name.replace('_estimator', '', 1): name for name in runs[0] if '_estimator' in name}
    titles = ['', 'exact pictures', *(f'{variant}, {seed}' for variant, seed in found)]
    rows = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
    for name in runs[0]:
        if not name.endswith('_se') and name not in exact.values():
            cells = [_cell(runs[0], exact[name]) if name in exact else '', *(_cell(run, name) for run in runs)]
            rows.append(f'| `{name}` | {" | ".join(cells)} |')
    return '\n'.join(rows)


def _cell(values, name):
    return f'{_number(values[name])} ± {_number(values.get(f"{name}_se"))}'


def _number(value):
    return '?' if value is None else f'{value:.3g}'


def main():
    """Train and measure all variants, then print the table and write it to table.md."""
    arguments = options()
    jobs = [(variant, int(seed)) for seed in arguments.seeds.split(',') for variant in arguments.variants.split(',')]
    free = queue.Queue()
    for gpu in range(arguments.gpus) if arguments.gpus else [None]:
        free.put(gpu)

    def work(job):
        gpu = free.get()
        try:
            return job, run(*job, arguments, gpu)
        finally:
            free.put(gpu)

    with concurrent.futures.ThreadPoolExecutor(max(arguments.gpus, 1)) as pool:
        found = dict(pool.map(work, jobs))
    text = table(found)
    (arguments.out / 'table.md').write_text(text + '\n')
    print(text)


if __name__ == '__main__':
    main()
