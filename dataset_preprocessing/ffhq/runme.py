# SPDX-License-Identifier: Apache-2.0
"""From FFHQ's photographs to training data in one command: align, crop, mirror, cameras, meshes, check, pack."""

import os
import pathlib
import sys

import click
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import deep3d_net, ffhq_index, plan  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402
from dataset_preprocessing.ffhq.steps import Options  # noqa: E402

DEFAULT_OUT = pathlib.Path(__file__).resolve().parents[2] / 'data' / 'ffhq'
DOWNLOAD = 'download'  # --landmarks=download.


@click.command(cls=cli.Command)
@cli.option('indir', metavar='DIR', type=cli.PathText(),
            help="FFHQ's photographs (in-the-wild-images), or any others. Default: they are downloaded.")
@cli.option('outdir', metavar='DIR', type=cli.PathText(), help='Data set to write. Default: data/ffhq of this project.')
@cli.option('landmarks', metavar='JSON|download', type=cli.PathText(),
            help='ffhq-dataset-v2.json. Default: with --indir a detector finds landmarks, else it is downloaded.')
@cli.flag('aligned', help="The pictures are FFHQ's aligned ones of 1024 pixels: no margin, so that corners turn black.")
@cli.option('points', metavar='DIR|JSON', type=cli.PathText(),
            help="Five points in the re-aligned pictures: EG3D's cropping_params.json. Default: of the landmarks.")
@cli.option('reference', metavar='MAT', type=cli.PathText(), help='As of crop.py.')
@cli.option('network', metavar='PTH', type=cli.PathText(), help='As of fit_cameras.py.')
@cli.option('deca', metavar='DIR', type=cli.PathText(), help='As of fit_meshes.py.')
@cli.option('model', metavar='TASK', type=cli.PathText(), help='As of detect.py.')
@cli.option('mirror', type=click.Choice(['geometry', 'fit', 'none']), default='geometry', show_default=True,
            help='Meshes of mirror images: the mirrored mesh; their own fit, as published; no mirror images.')
@cli.option('gaze', metavar='none|irises|DIR', default='none', show_default=True, type=cli.PathText(),
            help='Eyes look ahead; follow the irises that the detector finds; as of fit_meshes.py.')
@cli.option('mode', type=click.Choice(deep3d_net.MODES), default='orig', show_default=True, help='As of labels.py.')
@cli.flag('rebalance', help='Let pictures of rare yaws count several times in training, and print the table.')
@cli.option('packed', metavar='DIR', type=cli.PathText(), help='Pack the data set to this folder, too.')
@cli.option('limit', type=click.IntRange(1), help='Use the first so many pictures.')
@cli.option('steps', metavar='LIST', help='Run these alone: names with commas between, as --dry-run lists them.')
@cli.option('workers', type=click.IntRange(1, 256), default=os.cpu_count() or 1, show_default='all', help='Processes.')
@cli.option('device', metavar='DEVICE', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N.')
@cli.flag('dry_run', help='List the steps with inputs, outputs, sizes and times; nothing is written.')
def main(indir, outdir, landmarks, aligned, rebalance, packed, steps, dry_run, workers, device, **others):
    """Write images512x512 with dataset.json and dataset_exp.json, meshes512x512 and lms512x512.

    Run it again after an interruption: what is there is kept. Train with --data=OUTDIR/images512x512
    --rdata=OUTDIR/meshes512x512, or, packed, with --data=DIR. OUTDIR/work may be removed when all is done.
    """
    if aligned and indir is None:
        raise click.UsageError('--aligned: expected --indir, the folder of those pictures.')
    torch.set_num_threads(1 if device.type == 'cpu' else torch.get_num_threads())  # Each process has one picture.
    path = lambda text: None if text is None else pathlib.Path(text).expanduser()  # noqa: E731
    outdir = DEFAULT_OUT if outdir is None else path(outdir)
    try:
        options = Options(
            outdir=outdir, indir=path(indir), index=_index(landmarks, indir, outdir), is_aligned=aligned,
            packed=path(packed), workers=workers, device=device, **others,
        )  # fmt: skip
        chosen = _chosen(plan.plan(options, rebalance), steps)
        if dry_run:
            for line in plan.describe(options, chosen):
                click.echo(line)
            return
        if options.index is not None and not options.index.exists() and landmarks in (None, DOWNLOAD):
            _fetch_index(options.index, outdir / 'work' / 'downloads')
        plan.run(options, chosen)
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error


def _index(landmarks, indir, outdir):
    """Return the path of FFHQ's list, None where landmarks are to be found."""
    if landmarks not in (None, DOWNLOAD):
        return pathlib.Path(landmarks).expanduser()
    return None if landmarks is None and indir is not None else outdir / 'work' / ffhq_index.INDEX_FILE


def _fetch_index(path, cache):
    """Download FFHQ's list; where that fails, tell what to get and where to put it."""
    try:
        ffhq_index.fetch(ffhq_index.INDEX, path, cache)
    except (OSError, PreprocessError) as error:
        place = f'get {path.name} ({ffhq_index.INDEX.size / 1e9:.2f} GB) as {ffhq_index.SOURCE} tells'
        raise PreprocessError(
            f'{error}; {place} and put it to {path}, and the photographs (in-the-wild-images, '
            f'{ffhq_index.IN_THE_WILD_GB} GB) anywhere, named by --indir'
        ) from error


def _chosen(plan_steps, names):
    """Return the steps of a list of names, in the plan's order; all for None."""
    if names is None:
        return plan_steps
    wanted, known = names.split(','), [step.name for step in plan_steps]
    for name in wanted:
        if name not in known:
            raise click.UsageError(f'--steps: expected some of {",".join(known)}, got {name!r}.')
    return [step for step in plan_steps if step.name in wanted]


if __name__ == '__main__':
    main()
