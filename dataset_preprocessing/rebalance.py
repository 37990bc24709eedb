# SPDX-License-Identifier: Apache-2.0
"""Let pictures of rare poses count several times in training, and print the table of yaws."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing import balancing  # noqa: E402
from training.dataset import MAX_REPEATS, DatasetError  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('data', metavar='DIR', type=cli.PathText(), required=True, help='Pictures with dataset.json, or packed.')
@cli.option('bins', type=click.IntRange(1, 180), default=balancing.NUM_BINS, show_default=True,
            help='Bins of equal width from -90 to 90 degrees of yaw.')
@cli.option('strength', metavar='FLOAT', type=cli.FiniteFloat(-1e-9, 1.000001), default=balancing.STRENGTH,
            show_default=True, help='0: all count once. 1: all bins count the same, as far as --most lets them.')
@cli.option('most', type=click.IntRange(1, MAX_REPEATS), default=balancing.MOST, show_default=True,
            help='A picture counts at most so often.')
@cli.flag('undo', help='All count once again.')
@cli.flag('dry_run', help='Print the table only.')
def main(data, bins, strength, most, undo, dry_run):
    """Note how often each picture counts: (pictures of the largest bin / of its bin)^strength, rounded.

    A folder of pictures gets dataset_repeats.json, a packed one an entry in manifest.json; no file is copied, and
    train_next3d.py honours it. Other tools see each picture once.
    """
    try:
        names, labels = balancing.read_poses(data)
    except DatasetError as error:
        raise click.ClickException(' '.join(str(error).split())) from error
    result = balancing.balance(labels, bins, strength, most)
    if not undo:
        click.echo(result.table())
    if not dry_run:
        path = balancing.write_repeats(data, names, None if undo else result.repeats)
        click.echo(f'{path}: {"each picture counts once" if undo else "written"}')


if __name__ == '__main__':
    main()
