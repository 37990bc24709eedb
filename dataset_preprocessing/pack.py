# SPDX-License-Identifier: Apache-2.0
"""Pack a data set of the published layout: pictures in one uncompressed archive, meshes and labels in mapped arrays."""

import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import zipfile

import click
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from geometry.meshes import NUM_LANDMARKS  # noqa: E402
from training.dataset import (  # noqa: E402
    MANIFEST_FILE,
    PACKED_ARRAYS,
    PACKED_FORMAT,
    PACKED_IMAGES,
    PACKED_VERSION,
    DatasetError,
    FolderSource,
)

PROGRESS_FILE = 'progress.json'
SAVE_EVERY = 512  # Items between two notes of how far the arrays are.


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
        partial = target.with_name(target.name + '.partial')
        partial.mkdir(parents=True, exist_ok=True)
        shapes = _write_arrays(source, partial, workers)
        _write_images(source, partial / PACKED_IMAGES)
    except DatasetError as error:
        raise click.ClickException(str(error)) from error
    _write_manifest(source, partial, shapes)
    os.replace(partial, target)
    click.echo(f'Packed {len(source.names)} items of {shapes["vertices"][1]} vertices to {target}')


def _write_arrays(source, folder, workers):
    """Write labels, vertices and landmarks; return their shapes. Continues where an earlier run was cut off."""
    count = len(source.names)
    num_vertices = len(source.mesh(0)) - NUM_LANDMARKS
    shapes = {
        'vertices': [count, num_vertices, 3],
        'landmarks': [count, NUM_LANDMARKS, 3],
        'labels': list(source.labels.shape),
    }
    identity = hashlib.sha256(json.dumps([source.names, shapes]).encode()).hexdigest()
    done = _progress(folder, identity)
    mode = 'r+' if done else 'w+'
    arrays = {name: _open_array(folder / file, mode, shapes[name]) for name, file in PACKED_ARRAYS.items()}
    arrays['labels'][:] = source.labels
    # Forked: they only read files, and spawned ones would each import torch anew.
    with multiprocessing.get_context('fork').Pool(workers, _set_source, [source]) as pool:
        meshes = pool.imap(_read_mesh, range(done, count))
        for index, mesh in enumerate(tqdm(meshes, 'meshes', total=count, initial=done, delay=2), start=done):
            if len(mesh) != num_vertices + NUM_LANDMARKS:
                found = len(mesh) - NUM_LANDMARKS
                raise DatasetError(f'{source.names[index]}: expected {num_vertices} vertices, found {found}')
            arrays['vertices'][index], arrays['landmarks'][index] = mesh[:num_vertices], mesh[num_vertices:]
            if (index + 1) % SAVE_EVERY == 0 or index + 1 == count:
                _save_progress(folder, identity, index + 1, arrays.values())
    return shapes


def _progress(folder, identity):
    """Return how many items of the same data set an earlier run has written."""
    try:
        noted = json.loads((folder / PROGRESS_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0
    return noted['done'] if noted.get('identity') == identity else 0


def _save_progress(folder, identity, done, arrays):
    for array in arrays:
        array.flush()
    temporary = folder / f'{PROGRESS_FILE}.new'
    temporary.write_text(json.dumps({'identity': identity, 'done': done}))
    os.replace(temporary, folder / PROGRESS_FILE)


def _open_array(path, mode, shape):
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=tuple(shape))


_source = None


def _set_source(source):
    global _source
    _source = source


def _read_mesh(index):
    return _source.mesh(index)


def _write_images(source, path):
    """Copy the picture files as they are: the archive is not compressed, the pictures in it are."""
    resolution = source.image(0).shape[-1]
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
        for index, name in enumerate(tqdm(source.names, 'pictures', delay=2)):
            found = source.image(index).shape[-1]  # A picture that cannot be read is found here, not in training.
            if found != resolution:
                where = f'{source.images.path}/{name}'
                raise DatasetError(f'{where}: expected {resolution} pixels as of the first picture, found {found}')
            archive.writestr(zipfile.ZipInfo(name), source.images.read(name))


def _write_manifest(source, folder, shapes):
    files = [*PACKED_ARRAYS.values(), PACKED_IMAGES]
    manifest = {
        'format': PACKED_FORMAT,
        'version': PACKED_VERSION,
        'count': len(source.names),
        'resolution': int(source.image(0).shape[-1]),
        'shapes': shapes,
        'sha256': {name: _hash(folder / name) for name in files},
        'names': source.names,
    }
    (folder / PROGRESS_FILE).unlink()
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    for name in (*files, MANIFEST_FILE):
        with open(folder / name, 'rb+') as file:
            os.fsync(file.fileno())


def _hash(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == '__main__':
    main()
