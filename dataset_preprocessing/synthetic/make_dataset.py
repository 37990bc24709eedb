# SPDX-License-Identifier: Apache-2.0
"""Draw a training data set of people who do not exist: pictures with exact cameras, meshes and landmarks."""

import os
import pathlib
import sys

import click
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.parallel import in_processes  # noqa: E402
from dataset_preprocessing.synthetic import store  # noqa: E402
from dataset_preprocessing.synthetic.anatomy import load_anatomy  # noqa: E402
from dataset_preprocessing.synthetic.paint import picture  # noqa: E402
from dataset_preprocessing.synthetic.people import random_person  # noqa: E402

MAX_COUNT = 1_000_000


@click.command(cls=cli.Command)
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Folder to write.')
@cli.option('count', metavar='INTEGER', type=click.IntRange(1, MAX_COUNT), default=20_000, show_default=True,
            help='Pictures, each of another person.')
@cli.option('resolution', metavar='INTEGER', type=click.IntRange(32, 1024), default=256, show_default=True,
            help='Side of a picture in pixels.')
@cli.option('seed', metavar='INTEGER', type=click.IntRange(0, cli.MAX_SEED), default=0, show_default=True,
            help='Picture i depends on the seed and on i alone.')
@cli.flag('packed', help='Write what pack.py makes instead of single files: a tenth of the space.')
@cli.option('workers', type=click.IntRange(1, 256), default=os.cpu_count() or 1, show_default='all', help='Processes.')
def main(out, count, resolution, seed, packed, workers):
    """Write DIR with imagesRxR, meshesRxR and lmsRxR, dataset.json, coefficients.npz and head_template.obj.

    Work goes to DIR.partial, which takes the name DIR when it is complete. Run again after an interruption: items that
    are complete are kept. Train with --data=DIR/imagesRxR --rdata=DIR/meshesRxR --topology-path=DIR/head_template.obj,
    or, packed, with --data=DIR.
    """
    torch.set_num_threads(1)  # Each process has one picture at a time; forked ones must not inherit threads.
    target = pathlib.Path(out).expanduser()
    options = {'count': count, 'resolution': resolution, 'seed': seed, 'packed': packed}
    partial = store.begin(target, options, _bytes_needed(count, resolution, packed))
    if partial is None:
        click.echo(f'{target} is complete: {count} items')
        return
    anatomy = load_anatomy()
    kind = store.PackedStore if packed else store.FolderStore
    items = kind(partial, count, resolution, anatomy)
    missing = [index for index in range(count) if not items.has(index)]
    if missing:
        picture(anatomy, random_person(anatomy, seed, missing[0]), 32)  # Builds tables and rasteriser once.
    store.write_all(lambda index: _draw(anatomy, seed, resolution, index), items, missing, workers, count)
    labels, arrays = _tables(anatomy, seed, count, workers)
    with store.writing(partial):
        items.finish(labels)
        store.finish(partial, target, arrays)
    click.echo(f'Wrote {count} items of {len(anatomy.neutral)} vertices to {target}')


def _draw(anatomy, seed, resolution, index):
    result = picture(anatomy, random_person(anatomy, seed, index), resolution)
    return result.image, result.vertices, result.landmarks


def _bytes_needed(count, resolution, packed):
    pictures = store.PICTURE_BYTES * resolution**2
    each = pictures * 2 + 70_000 if packed else pictures + store.OBJ_BYTES
    return int(count * each + store.OBJ_BYTES)  # And the template.


def _tables(anatomy, seed, count, workers):
    """Return labels [N, 25] and the arrays of coefficients.npz: drawn again, so that no run has to remember them."""
    people = list(in_processes(
        lambda index: random_person(anatomy, seed, index), range(count), workers, 'coefficients', count
    ))  # fmt: skip
    rows = [person.attributes() for person in people]
    arrays = {
        'names': np.array([store.picture_name(index) for index in range(count)]),
        'identity': np.array([person.identity for person in people], dtype=np.float32),
        'expression': np.array([anatomy.coefficients(person.expression) for person in people]),
        'expression_names': np.array(anatomy.expression_names),
        'attribute_names': np.array(list(rows[0])),
        **{f'attribute_{name}': np.array([row[name] for row in rows]) for name in rows[0]},
    }
    return np.array([person.label for person in people]), arrays


if __name__ == '__main__':
    main()
