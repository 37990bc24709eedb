# SPDX-License-Identifier: Apache-2.0
"""List the files that users download themselves for preprocessing, and where to get those that are missing."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq.assets import ASSETS  # noqa: E402


@click.command(cls=cli.Command)
def main():
    """Tell which of the files that you download yourself are there, and where to get the others."""
    for asset in ASSETS.values():
        state = 'found  ' if asset.path.is_file() else 'missing'
        where = '' if asset.path.is_file() else f'\n        from {asset.source}'
        click.echo(f'{state} {asset.path}\n        for {asset.purpose}{where}')


if __name__ == '__main__':
    main()
