# SPDX-License-Identifier: Apache-2.0
"""Pack a data set of the published layout: pictures in one uncompressed archive, meshes and labels in mapped arrays."""

import os
import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.packing import pack  # noqa: E402
from training.dataset import DatasetError, FolderSource  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('data', metavar='DIR|ZIP', type=cli.PathText(), required=True, help='Pictures with dataset.json.')
@cli.option('rdata', metavar='DIR|ZIP', type=cli.PathText(), required=True, help='Meshes; landmarks beside them.')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Packed folder to write.')
@cli.flag('gen_exp_cond', help='Append the expressions of dataset_exp.json to the labels.')
@cli.option('workers', type=click.IntRange(1, 256), default=os.cpu_count() or 1, show_default='all', help='Processes.')
def main(data, rdata, out, gen_exp_cond, workers):
    """Write DIR with images.zip, vertices.npy, landmarks.npy, labels.npy and manifest.json.

    Work goes to DIR.partial, which takes the name DIR when it is complete. Run again after an interruption: the
    meshes that were read already are kept.
    """
    target = pathlib.Path(out).expanduser()
    if target.exists():
        raise click.UsageError(f'--out: {target}: expected a new folder, found something there already.')
    try:
        source = FolderSource(data, rdata, gen_exp_cond)
        num_vertices = pack(source, target, workers)
    except DatasetError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f'Packed {len(source.names)} items of {num_vertices} vertices to {target}')


if __name__ == '__main__':
    main()
