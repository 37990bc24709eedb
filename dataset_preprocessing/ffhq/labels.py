# SPDX-License-Identifier: Apache-2.0
"""Turn camera coefficients, or a cameras.json, into the labels that training and driving read: dataset.json."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import deep3d_net, files  # noqa: E402
from dataset_preprocessing.ffhq.cameras_file import cameras_text, labels_text, read_cameras, read_pose  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('coeffs', metavar='DIR', type=cli.PathText(), help='Coefficients: .npz of fit_cameras.py, or .mat.')
@cli.option('cameras', metavar='JSON', type=cli.PathText(), help='Instead of --coeffs: a cameras.json.')
@cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Folder for dataset.json.')
@cli.option('mode', type=click.Choice(deep3d_net.MODES), default='orig', show_default=True,
            help='How cameras move to their sphere: as published networks need it; about a point within the head; '
                 'that, upright and looking at it.')
@cli.flag('mirror', help='Labels of mirror images, too (crop.py --mirror). Not for driving frames.')
def main(coeffs, cameras, outdir, mode, mirror):
    """Write <outdir>/dataset.json and, of coefficients, cameras.json: the cameras before they move to their sphere."""
    if (coeffs is None) == (cameras is None):
        raise click.UsageError('expected either --coeffs or --cameras.')
    try:
        if cameras is not None:
            poses = read_cameras(pathlib.Path(cameras))
        else:
            found = files.list_files(pathlib.Path(coeffs), ('.npz', '.mat'))
            poses = {f'{name}.png': read_pose(path) for name, path in found.items()}
        _check_names(poses)
        text = labels_text(poses, mode, mirror)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    outdir = cli.make_outdir(outdir)
    if cameras is None:
        files.write_text(cameras_text(poses), outdir / 'cameras.json')
    files.write_text(text, outdir / 'dataset.json')
    click.echo(f'{len(poses)} cameras{" and their mirror images" if mirror else ""}: {outdir / "dataset.json"}')


def _check_names(poses):
    for name in poses:
        if '.' not in name:
            raise PreprocessError(f'{name}: expected the name of a picture, found no ending')


if __name__ == '__main__':
    main()
