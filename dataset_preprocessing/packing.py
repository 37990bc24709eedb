# SPDX-License-Identifier: Apache-2.0
"""A data set of the published layout, packed: pictures in one uncompressed archive, the rest in mapped arrays."""

import hashlib
import json
import os
import pathlib
import zipfile

import numpy as np
from tqdm import tqdm

from dataset_preprocessing.parallel import in_processes
from geometry.meshes import NUM_LANDMARKS
from training.dataset import (
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


def pack(source: FolderSource, target: pathlib.Path, workers: int) -> int:
    """Write the packed folder `target`, which must not exist; return the number of vertices.

    Work goes to <target>.partial, which takes the name when it is complete; what an interrupted call has read is kept.
    Raises DatasetError for items that cannot be read or do not fit.
    """
    partial = target.with_name(target.name + '.partial')
    partial.mkdir(parents=True, exist_ok=True)
    shapes = _write_arrays(source, partial, workers)
    _write_images(source, partial / PACKED_IMAGES)
    _write_manifest(source, partial, shapes)
    os.replace(partial, target)
    return shapes['vertices'][1]


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
    meshes = in_processes(source.mesh, range(done, count), workers, 'meshes', count, chunk=1)  # All up to a bad one.
    for index, mesh in enumerate(meshes, start=done):
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
        **({} if (source.repeats == 1).all() else {'repeats': source.repeats.tolist()}),
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
