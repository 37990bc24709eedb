# SPDX-License-Identifier: Apache-2.0
"""Write items of a data set so that a run may end at any moment: DIR.partial grows item by item, then becomes DIR."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tqdm import tqdm

from dataset_preprocessing.parallel import GO_ON, in_processes
from dataset_preprocessing.synthetic.anatomy import Anatomy
from dnnlib import atomic_write
from geometry.head_model import DEFAULT_HEAD
from geometry.meshes import NUM_LANDMARKS, landmark_lines, obj_surface, obj_vertices
from training.dataset import (
    LABEL_FILE,
    LABEL_LENGTH,
    MANIFEST_FILE,
    PACKED_ARRAYS,
    PACKED_FORMAT,
    PACKED_IMAGES,
    PACKED_VERSION,
)
from training.files import DatasetError
from training.topology import MASK_NAME

OPTIONS_FILE, COEFFICIENTS_FILE, TEMPLATE_FILE = 'synthetic.json', 'coefficients.npz', 'head_template.obj'
VERSION = 3  # Of the drawing: raise it whenever a picture changes, so that no data set is half old, half new.
TEMPORARY = '.unfinished'
PER_FOLDER = 1000  # Pictures of a folder, as in FFHQ.
PNG_LEVEL = 1  # Larger files by a tenth, written three times as fast.
PICTURE_BYTES, OBJ_BYTES = 2.2, 600_000  # A pixel's, and a mesh file's: for the estimate of the space needed.


def begin(out: pathlib.Path, options: dict, num_bytes: int) -> pathlib.Path | None:
    """Return the folder in which the work goes on, or None where `out` is complete already.

    Raises DatasetError where either folder holds something else, or the disk has no room for num_bytes.
    """
    partial = out.with_name(out.name + '.partial')
    options = {'format': 'next3d-synthetic', 'version': VERSION, **options}
    if out.exists():
        _expect_options(out, options)
        return None
    if partial.exists() and any(partial.iterdir()):
        _expect_options(partial, options)
    else:
        _expect_room(out, num_bytes)
        partial.mkdir(parents=True, exist_ok=True)
        with atomic_write(partial / OPTIONS_FILE, 'w') as file:
            json.dump(options, file)
    for path in partial.rglob(f'*{TEMPORARY}'):
        path.unlink()
    return partial


def _expect_options(folder, options):
    file = folder / OPTIONS_FILE
    try:
        found = json.loads(file.read_text(encoding='utf-8'))
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f'{folder}: expected a new folder, found one that this script did not begin') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f'{file}: expected the options of a data set, found no JSON ({error})') from None
    for name, value in options.items():
        if not isinstance(found, dict) or found.get(name) != value:
            other = found.get(name) if isinstance(found, dict) else None
            raise DatasetError(f'{folder}: expected {name} {value} as asked for, found {other}; use another --out')


def _expect_room(out, num_bytes):
    existing = next(parent for parent in out.resolve().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise DatasetError(f'{out}: expected {num_bytes / 1e6:.1f} MB of free space, found {free / 1e6:.1f} MB')


def put(path: pathlib.Path, data: bytes) -> None:
    """Write a file that appears only when complete; flushing is left to the system, as there are thousands."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def png(image: np.ndarray) -> bytes:
    """Return a picture [R, R, 3] uint8 as a PNG file."""
    height, width, _ = image.shape
    # Each row as its difference from the one above, filter 2: as small as trying all filters, in half the time.
    rows = np.full((height, 1 + 3 * width), 2, dtype=np.uint8)
    rows[:, 1:] = image.reshape(height, -1)
    rows[1:, 1:] -= rows[:-1, 1:].copy()
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, not interlaced.
    chunks = ((b'IHDR', header), (b'IDAT', zlib.compress(rows, PNG_LEVEL)), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in chunks
    )


def obj_bytes(anatomy: Anatomy, vertices: np.ndarray) -> bytes:
    """Return vertices with the template's UVs and faces as an OBJ file with six decimals."""
    return obj_vertices(vertices) + _surface(anatomy)


@functools.lru_cache(maxsize=1)
def _surface(anatomy):
    return obj_surface(anatomy.uvs, anatomy.faces, anatomy.uv_faces)


class FolderStore:
    """The published layout below a folder: pictures, meshes and landmarks in folders of 1000.

    An item is there when its picture is: that is written last.
    """

    def __init__(self, folder: pathlib.Path, count: int, resolution: int, anatomy: Anatomy):
        self.folder, self.count, self.anatomy = folder, count, anatomy
        self.folders = {kind: folder / f'{kind}{resolution}x{resolution}' for kind in ('images', 'meshes', 'lms')}
        for path in self.folders.values():
            for number in range(-(-count // PER_FOLDER)):
                (path / f'{number:05d}').mkdir(parents=True, exist_ok=True)

    def has(self, index: int) -> bool:
        """Tell whether an item is complete."""
        return (self.folders['images'] / picture_name(index)).exists()

    def write(self, index: int, image: np.ndarray, vertices: np.ndarray, landmarks: np.ndarray) -> None:
        """Write an item."""
        stem = os.path.splitext(picture_name(index))[0]
        put(self.folders['meshes'] / f'{stem}.obj', obj_bytes(self.anatomy, vertices))
        put(self.folders['lms'] / f'{stem}.txt', landmark_lines(landmarks))
        put(self.folders['images'] / f'{stem}.png', png(image))

    def finish(self, labels: np.ndarray) -> None:
        """Write the labels [N, 25]."""
        entries = [[picture_name(index), row] for index, row in enumerate(labels.astype(float).tolist())]
        with atomic_write(self.folders['images'] / LABEL_FILE, 'w') as file:
            json.dump({'labels': entries}, file)


class PackedStore:
    """What pack.py makes: one archive of pictures, arrays of the rest. Pictures are files until all are there."""

    def __init__(self, folder: pathlib.Path, count: int, resolution: int, anatomy: Anatomy):
        self.folder, self.count, self.resolution = folder, count, resolution
        self.pictures = folder / 'pictures'
        for number in range(-(-count // PER_FOLDER)):
            (self.pictures / f'{number:05d}').mkdir(parents=True, exist_ok=True)
        self.shapes = {
            'vertices': [count, len(anatomy.neutral), 3],
            'landmarks': [count, NUM_LANDMARKS, 3],
            'labels': [count, LABEL_LENGTH],
        }
        for name in ('vertices', 'landmarks'):
            if not (folder / PACKED_ARRAYS[name]).exists():
                _reserve(folder / PACKED_ARRAYS[name], self.shapes[name])
        self._arrays = None

    def has(self, index: int) -> bool:
        """Tell whether an item is complete."""
        return (self.pictures / picture_name(index)).exists()

    def write(self, index: int, image: np.ndarray, vertices: np.ndarray, landmarks: np.ndarray) -> None:
        """Write an item."""
        if self._arrays is None:
            self._arrays = [np.load(self.folder / PACKED_ARRAYS[n], mmap_mode='r+') for n in ('vertices', 'landmarks')]
        self._arrays[0][index], self._arrays[1][index] = vertices, landmarks
        put(self.pictures / picture_name(index), png(image))

    def finish(self, labels: np.ndarray) -> None:
        """Write labels [N, 25], archive and manifest."""
        names = [picture_name(index) for index in range(self.count)]
        np.save(self.folder / PACKED_ARRAYS['labels'], labels.astype(np.float32))
        with zipfile.ZipFile(self.folder / PACKED_IMAGES, 'w', zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name in tqdm(names, 'archive', delay=2):
                archive.writestr(zipfile.ZipInfo(name), (self.pictures / name).read_bytes())
        files = [*PACKED_ARRAYS.values(), PACKED_IMAGES]
        manifest = {
            'format': PACKED_FORMAT,
            'version': PACKED_VERSION,
            'count': self.count,
            'resolution': self.resolution,
            'shapes': self.shapes,
            'sha256': {name: _hash(self.folder / name) for name in files},
            'names': names,
        }
        with atomic_write(self.folder / MANIFEST_FILE, 'w') as file:
            json.dump(manifest, file)
        shutil.rmtree(self.pictures)


def picture_name(index: int) -> str:
    """Return the name of picture `index`, as in FFHQ."""
    return f'{index // PER_FOLDER:05d}/img{index:08d}.png'


def _reserve(path, shape):
    """Make an array of zeros whose space on the disk is taken: a full one is told now, not by a signal later."""
    temporary = path.with_name(path.name + TEMPORARY)
    np.lib.format.open_memmap(temporary, mode='w+', dtype=np.float32, shape=tuple(shape)).flush()
    try:
        with open(temporary, 'rb+') as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == errno.EOPNOTSUPP:
            raise DatasetError(f'{path}: expected a disk that can reserve space; write without --packed') from None
        raise
    os.replace(temporary, path)


def _hash(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def write_all(draw: Callable[[int], tuple], store, indices: Iterable[int], workers: int, total: int) -> None:
    """Draw and write items: draw(index) -> (image, vertices, landmarks). Raises DatasetError where it cannot go on."""
    indices = list(indices)
    with writing(store.folder):
        for _ in in_processes(lambda index: store.write(index, *draw(index)), indices, workers, 'pictures', total):
            pass


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
    """Raise DatasetError, which says how to go on, for what cannot be written below a folder."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise DatasetError(f'{where}: cannot be written: {error.strerror or error}; {GO_ON}') from None


def finish(partial: pathlib.Path, out: pathlib.Path, arrays: dict[str, np.ndarray], with_template: bool = True):
    """Write coefficients.npz, and the template where wanted, beside the items, and give the folder its name.

    A driving folder takes no template: its mask would count as a frame.
    """
    with atomic_write(partial / COEFFICIENTS_FILE) as file:
        np.savez_compressed(file, **arrays)
    for name in (TEMPLATE_FILE, MASK_NAME) if with_template else ():
        put(partial / name, (DEFAULT_HEAD.parent / name).read_bytes())
    os.replace(partial, out)
