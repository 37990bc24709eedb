# SPDX-License-Identifier: Apache-2.0
"""Rewrite a network file, published or of this project, as a snapshot of plain data: smaller, and safe to pass on."""

import os

import click
import torch

import cli
import legacy
from training.checkpoint import NETWORK_KEYS, save_snapshot

DTYPES = {'fp32': None, 'fp16': torch.float16}


@click.command(cls=cli.Command)
@cli.option(
    'source', metavar='PATH|URL', type=cli.PathText(), required=True, help='EG3D or Next3D pickle, or snapshot.'
)
@cli.option('dest', metavar='PATH', type=cli.PathText(), required=True, help='Snapshot to write (.pkl).')
@cli.option(
    'only', metavar='NAME', type=click.Choice(NETWORK_KEYS), multiple=True,
    help='Network to keep, may be repeated; default: all that the file holds.',
)
@cli.option(
    'dtype', metavar='TYPE', type=click.Choice(list(DTYPES)), default='fp32', show_default=True,
    help='In which numbers are stored; networks are float32 again once loaded.',
)
def main(source, dest, only, dtype):
    """Convert SOURCE to DEST; G_ema in fp16 is all that pictures need: --only=G_ema --dtype=fp16."""
    networks = legacy.load_network_pkl(source, only=only or NETWORK_KEYS)
    missing = [name for name in only if name not in networks]
    if missing:
        raise click.UsageError(f'--only: {source} holds {", ".join(networks)}, no {", ".join(missing)}')
    with cli.naming(dest):
        try:
            save_snapshot(dest, networks, DTYPES[dtype])
        except ValueError as error:
            raise click.UsageError(f'--dtype={dtype}: {error}') from error
    click.echo(f'Wrote {dest}: {", ".join(networks)}, {os.path.getsize(dest) / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
