# SPDX-License-Identifier: Apache-2.0
"""Faults of a data set, told with file and number before training: labels, pictures, meshes, landmarks, frames."""

import hashlib
import io
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from dnnlib import atomic_write
from geometry.cameras import CAM2WORLD, INTRINSICS, project_mesh
from geometry.meshes import (
    LANDMARK_LIMIT,
    NUM_LANDMARKS,
    MeshFileError,
    parse_landmarks,
    parse_obj_vertices,
)
from training.dataset import (
    EXPRESSION_LENGTH,
    LABEL_FILE,
    LABEL_LENGTH,
    MANIFEST_FILE,
    PACKED_ARRAYS,
    PICTURE_ENDINGS,
    PICTURE_ERRORS,
    DatasetError,
    PackedSource,
    Source,
    read_labels,
)
from training.files import FileSet

POSITION = (2.6, 2.8)  # Distance of the cameras from the origin; 2.7 in FFHQ and what follows it.
FOCAL = (0.5, 10.0)  # Over the picture's side; a value in pixels is far above.
TOLERANCE = 1e-3  # Of a rotation and of the rows that are constant.
REPROJECTION_LIMIT, REPROJECTION_SIDE = 8.0, 512  # Pixels at this side of the picture.
MIRROR_ENDING = '_mirror'
SLICE = 256  # Items whose vertices are in memory at once: 15 MB of FLAME's.
CHUNK = 32  # Items that a process takes at once.
CHECK_VERSION = 1  # Raise it with each new check: what passed the older ones is checked again.


class Fault(NamedTuple):
    """where: the file, with the picture's name where it is an entry; message: what was expected and what was found."""

    where: str
    message: str

    def __str__(self):
        return ' '.join(f'{self.where}: {self.message}'.split())


def check_before_training(
    source: Source,
    num_vertices: int,
    resolution: int,
    workers: int = 1,
    cache_dir: str | os.PathLike | None = None,
    position: tuple[float, float] = POSITION,
):
    """Raise DatasetError with the first fault of labels and names, or of any item's files.

    Items that passed are not read again until a file of the data set changes: a note in cache_dir (None:
    next3d/checked in $XDG_CACHE_HOME or ~/.cache) remembers them. Without a place for it they are read each time.
    """
    _raise_first(check_names(source) + check_labels(source, position))
    note = _note_path(source, num_vertices, resolution, cache_dir)
    if os.path.isfile(note):  # False, and no error, in a folder that may not be read.
        return
    _raise_first(check_items(source, num_vertices, resolution, workers, progress=True))
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(note, 'w') as file:
            json.dump({'items': len(source.names), 'images': str(source.images.path.resolve())}, file)
    except OSError:
        pass  # Home folders of clusters are often read-only; the check is then repeated.


def check_names(source: Source) -> list[Fault]:
    """Return the pictures of a packed folder that its archive lacks or that it has twice.

    Names of the published layout are checked when it is opened; its labels are found by name, so that their order is
    of no importance.
    """
    if not isinstance(source, PackedSource):
        return []
    present, seen, faults = set(source.images.names()), set(), []
    for name in source.names:
        if name not in present:
            faults.append(Fault(f'{source.images.path}/{name}', f'expected a picture of {MANIFEST_FILE}, found none'))
        if name in seen:
            faults.append(Fault(f'{source.path / MANIFEST_FILE}: {name}', 'expected it once, found it twice'))
        seen.add(name)
    return faults


def notes(source: Source) -> list[str]:
    """Return what is no fault but good to know: labels of pictures that do not exist."""
    unused = getattr(source, 'unused_labels', 0)
    return [f'{source.images.path}/{LABEL_FILE}: {unused} labels of pictures that do not exist'] if unused else []


# ---------------------------------------------------------------------------------------------------------------------
# Labels


class _Rule(NamedTuple):
    """found [N]: the number that a message quotes; is_bad [N]; expected: text; hint: text after the number."""

    found: np.ndarray
    is_bad: np.ndarray
    expected: str
    hint: str = ''


def check_labels(source: Source, position: tuple[float, float] = POSITION) -> list[Fault]:
    """Return the first fault of each label: length, finite numbers, rotation, distance of the camera, intrinsics.

    position: limits of the camera's distance from the origin.
    """
    is_packed = isinstance(source, PackedSource)
    where = source.path / PACKED_ARRAYS['labels'] if is_packed else f'{source.images.path}/{LABEL_FILE}'
    return _check_label_array(str(where), source.names, source.labels, position)


def _check_label_array(where, names, labels, position):
    lengths = (LABEL_LENGTH, LABEL_LENGTH + EXPRESSION_LENGTH)
    if labels.ndim != 2 or labels.shape[1] not in lengths:
        return [Fault(where, f'expected labels of {lengths[0]} or {lengths[1]} numbers, found {labels.shape[-1]}')]
    faults = {}
    is_told = np.zeros(len(labels), dtype=bool)
    for rule in _label_rules(labels, position):
        for row in np.flatnonzero(rule.is_bad & ~is_told):
            message = f'expected {rule.expected}, found {rule.found[row]:.6g}{rule.hint}'
            faults[row] = Fault(f'{where}: {names[row]}', message)
        is_told |= rule.is_bad
    return [faults[row] for row in sorted(faults)]


def _label_rules(labels, position) -> Iterator[_Rule]:
    num_bad = (~np.isfinite(labels)).sum(axis=1)
    yield _Rule(num_bad, num_bad > 0, 'finite numbers', ' that are not')
    values = np.where(num_bad[:, None] > 0, 0, labels).astype(np.float64)
    pose, k = values[:, CAM2WORLD].reshape(-1, 4, 4), values[:, INTRINSICS].reshape(-1, 3, 3)
    off = np.abs(pose[:, 3] - [0, 0, 0, 1]).max(axis=1)
    yield _Rule(off, off >= TOLERANCE, f"0 0 0 1 within {TOLERANCE} as the pose's last row", ' off')
    rotation = pose[:, :3, :3]
    off = np.linalg.norm(rotation.transpose(0, 2, 1) @ rotation - np.eye(3), axis=(1, 2))
    yield _Rule(off, off >= TOLERANCE, f'a rotation R with |R^T R - I| < {TOLERANCE}')
    determinant = np.linalg.det(rotation)
    yield _Rule(determinant, determinant <= 0, 'a rotation of determinant +1')
    distance = np.linalg.norm(pose[:, :3, 3], axis=1)
    is_bad = (distance < position[0]) | (distance > position[1])
    yield _Rule(distance, is_bad, f'a camera {position[0]:g} to {position[1]:g} from the origin')
    for name, focal in (('K[0]', k[:, 0, 0]), ('K[4]', k[:, 1, 1])):
        expected = f'{name}, focal length over side, of {FOCAL[0]} to {FOCAL[1]}'
        yield _Rule(focal, focal > FOCAL[1], expected, ' (pixels, not normalised?)')
        yield _Rule(focal, focal < FOCAL[0], expected)
    off = np.abs(k[:, 2] - [0, 0, 1]).max(axis=1)
    yield _Rule(off, off >= TOLERANCE, f'0 0 1 within {TOLERANCE} as the last row of K', ' off')


# ---------------------------------------------------------------------------------------------------------------------
# Items


class _Files(NamedTuple):
    """What a process needs to check single items; meshes and landmarks are None where `packed` holds them.

    with_points: the names of the files of `points`.
    """

    names: list[str]
    labels: np.ndarray
    images: FileSet
    meshes: FileSet | None
    landmarks: FileSet | None
    landmark_ending: str = '.txt'
    packed: PackedSource | None = None
    points: FileSet | None = None
    with_points: frozenset[str] = frozenset()


class _Seen(NamedTuple):
    """What one item has: side of the picture, number of vertices; None where it cannot be told."""

    faults: list[Fault]
    side: int | None
    num_vertices: int | None


def check_items(
    source: Source,
    num_vertices: int | None = None,
    resolution: int | None = None,
    workers: int = 1,
    progress: bool = False,
    points: str | os.PathLike | None = None,
) -> list[Fault]:
    """Read every item and return the faults of pictures, meshes and landmarks.

    num_vertices, resolution: what every item must have (None: what the first one has that can be read). workers:
    processes; 1 reads in this one. progress: show a bar. points: folder of 2-D landmarks, <picture name>.txt of 68
    lines of x y in pixels; where an item has them, the median distance of its projected landmarks is checked.
    """
    is_packed, faults = isinstance(source, PackedSource), []
    meshes, landmarks = (None, None) if is_packed else (source.meshes, source.landmarks)
    ending = '.txt' if is_packed else source.landmark_ending
    files = _Files(source.names, np.array(source.labels), source.images, meshes, landmarks, ending)
    if points is not None:
        points = FileSet(points)
        files = files._replace(points=points, with_points=frozenset(points.names()))
        faults += _check_points_names(files)
    if is_packed:
        faults += _check_arrays(source, num_vertices, progress)
        files = files._replace(packed=source)
        num_vertices, resolution = None, resolution or source.manifest['resolution']
    return faults + _check_files(files, num_vertices, resolution, workers, progress)


def _check_points_names(files):
    """Return a fault where a folder of 2-D points has none of any picture: the names do not fit."""
    if not files.names or not files.with_points.isdisjoint(map(_points_name, files.names)):
        return []
    wanted = _points_name(files.names[0])
    return [Fault(str(files.points.path), f'expected 2-D points named as the pictures ({wanted}), found 0')]


def _check_files(files, num_vertices, resolution, workers, progress):
    faults = []
    bar = tqdm(_look_at_all(files, workers), 'checking', total=len(files.names), delay=2, disable=not progress)
    for seen, name in zip(bar, files.names):  # The bar first: it ends, and so do the processes, by being exhausted.
        faults += seen.faults
        resolution, num_vertices = resolution or seen.side, num_vertices or seen.num_vertices
        if seen.side not in (None, resolution):
            faults.append(Fault(f'{files.images.path}/{name}', f'expected {resolution} pixels, found {seen.side}'))
        if seen.num_vertices not in (None, num_vertices):
            where = f'{files.meshes.path}/{_stem(name)}.obj'
            faults.append(Fault(where, f'expected {num_vertices} vertices, found {seen.num_vertices}'))
    return faults


def _look_at_all(files, workers) -> Iterator[_Seen]:
    """Yield what each item has, in order."""
    indices = range(len(files.names))
    if workers == 1:
        yield from (_look_at(files, index) for index in indices)
        return
    workers = max(1, min(workers, -(-len(indices) // CHUNK)))
    # Forked: they only read files, and spawned ones would each import torch anew.
    context = multiprocessing.get_context('fork')
    with ProcessPoolExecutor(workers, context, _set_files, (files,)) as pool:
        try:
            yield from pool.map(_look_at_index, indices, chunksize=CHUNK)
        except BrokenProcessPool:
            raise DatasetError('checking the data: a process was ended (out of memory?)') from None


_files = None


def _set_files(files):
    global _files
    _files = files


def _look_at_index(index):
    return _look_at(_files, index)


def _look_at(files, index) -> _Seen:
    name, faults = files.names[index], []
    side = _parsed(faults, files.images, name, picture_side)
    vertices = landmarks = None
    if files.meshes is not None:
        vertices = _parsed(faults, files.meshes, f'{_stem(name)}.obj', parse_obj_vertices)
        landmarks = _parsed(faults, files.landmarks, f'{_stem(name)}{files.landmark_ending}', parse_landmarks)
    else:
        landmarks = files.packed.arrays['landmarks'][index]
    if files.points is not None and side is not None and landmarks is not None:
        faults += _check_reprojection(files, index, landmarks, side)
    return _Seen(faults, side, None if vertices is None else len(vertices))


def _parsed(faults, files, name, parse):
    """Return parse(content, path) of a file, or None and a new fault."""
    where = f'{files.path}/{name}'
    try:
        return parse(files.read(name), where)
    except (DatasetError, MeshFileError) as error:
        # The message begins with the file, perhaps with a line's number after it.
        line, _, message = str(error).removeprefix(where).partition(': ')
        faults.append(Fault(where + line, message))
    except OSError as error:
        faults.append(Fault(where, f'expected a file that can be read ({error.strerror or error})'))
    return None


def picture_side(data: bytes, where: str) -> int:
    """Return the side of a square picture; DatasetError for another one, or one that is damaged.

    The checksums of a PNG tell of damage without the time it takes to decode; other formats are decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if picture.format == 'PNG':
                picture.verify()
            else:
                picture.load()
    except UnidentifiedImageError:
        raise DatasetError(f'{where}: expected a picture, found {len(data)} bytes of no known format') from None
    except PICTURE_ERRORS as error:
        raise DatasetError(f'{where}: expected an undamaged picture, found {len(data)} bytes ({error})') from None
    if width != height:
        raise DatasetError(f'{where}: expected a square picture, found {width}x{height}')
    return width


def _stem(name):
    return os.path.splitext(name)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Packed folders


def check_hashes(source: PackedSource, progress: bool = False) -> list[Fault]:
    """Return the files of a packed folder that are not those its manifest tells the sha256 of."""
    faults = []
    for name, expected in tqdm(source.manifest['sha256'].items(), 'hashing', delay=2, disable=not progress):
        with open(source.path / name, 'rb') as file:
            found = hashlib.file_digest(file, 'sha256').hexdigest()
        if found != expected:
            faults.append(Fault(str(source.path / name), f'expected sha256 {expected}, found {found}'))
    return faults


def _check_arrays(source, num_vertices, progress):
    """Return the faults of the arrays of vertices and landmarks, read slice by slice."""
    vertices, landmarks = source.arrays['vertices'], source.arrays['landmarks']
    shapes = {'vertices': (num_vertices or vertices.shape[1], 3), 'landmarks': (NUM_LANDMARKS, 3)}
    paths = {name: str(source.path / PACKED_ARRAYS[name]) for name in shapes}
    wrong = {name: source.arrays[name].shape[1:] for name in shapes if source.arrays[name].shape[1:] != shapes[name]}
    if wrong:
        return [Fault(paths[name], f'expected {shapes[name]} of each item, found {wrong[name]}') for name in wrong]
    faults = []
    for start in tqdm(range(0, len(source.names), SLICE), 'meshes', delay=2, disable=not progress):
        part = slice(start, start + SLICE)
        num_bad = (~np.isfinite(vertices[part])).sum(axis=(1, 2))
        largest = np.abs(landmarks[part]).max(axis=(1, 2))
        for row in np.flatnonzero(num_bad):
            message = f'expected finite numbers, found {num_bad[row]} that are not'
            faults.append(Fault(f'{paths["vertices"]}: {source.names[start + row]}', message))
        for row in np.flatnonzero(~(largest < LANDMARK_LIMIT)):
            message = f'expected landmarks in metres, all below {LANDMARK_LIMIT}, found {largest[row]:g}'
            faults.append(Fault(f'{paths["landmarks"]}: {source.names[start + row]}', message))
    return faults


# ---------------------------------------------------------------------------------------------------------------------
# Reprojection


def _points_name(name):
    return f'{_stem(name)}.txt'


def _check_reprojection(files, index, landmarks, side):
    """Return a fault where the landmarks' projections are far from the 2-D points, if the item has some."""
    name, faults = files.names[index], []
    if _points_name(name) not in files.with_points:
        return []
    points = _parsed(faults, files.points, _points_name(name), _parse_points)
    if points is None:
        return faults
    distances = np.linalg.norm(side * project_mesh(landmarks, files.labels[index])[0] - points, axis=1)
    median, limit = np.median(distances), REPROJECTION_LIMIT * side / REPROJECTION_SIDE
    if median < limit:
        return []
    message = f'expected landmarks projected to a median of {limit:g} pixels from the 2-D points, found {median:.3g}'
    return [Fault(f'{files.images.path}/{name}', message)]


def _parse_points(data, where):
    """Return [68, 2] of lines x y."""
    rows = [line.split() for line in data.decode('utf-8', errors='replace').splitlines() if line.strip()]
    try:
        points = np.array(rows, dtype=np.float64).reshape(len(rows), -1)
    except ValueError:
        raise DatasetError(f'{where}: expected {NUM_LANDMARKS} lines of x y, found other text') from None
    if points.shape != (NUM_LANDMARKS, 2):
        found = f'{points.shape[0]} of {points.shape[1]} numbers'
        raise DatasetError(f'{where}: expected {NUM_LANDMARKS} lines of x y, found {found}')
    return points


# ---------------------------------------------------------------------------------------------------------------------
# Driving sequences


def check_driving(
    folder: str | os.PathLike,
    num_vertices: int | None = None,
    workers: int = 1,
    progress: bool = False,
    position: tuple[float, float] = POSITION,
) -> list[Fault]:
    """Return the faults of a folder of frames: <frame>.png, .obj and _kpt2d.txt of each, and dataset.json.

    Labels belong to frames by name, so that mirrored frames (as released scripts write them between the others) are a
    fault. num_vertices: of every mesh (None: that of the first one). Raises FileNotFoundError for no folder.
    """
    files = FileSet(folder)
    present, faults = set(files.names()), []
    frames = driving_frames(files)
    if not frames:
        return [Fault(str(files.path), f'expected frames ({" ".join(PICTURE_ENDINGS)}), found 0')]
    try:
        table = read_labels(files, LABEL_FILE, LABEL_LENGTH, lambda *fault: faults.append(Fault(*fault)))
    except DatasetError as error:
        return [Fault(*str(error).split(': ', 1))]
    for name in sorted({*frames, *table}):
        if _stem(name).endswith(MIRROR_ENDING):
            where = f'{files.path}/{name}' if name in present else f'{files.path}/{LABEL_FILE}: {name}'
            faults.append(Fault(where, 'expected no mirrored frame in a driving folder, found one'))
    complete, missing = _complete_frames(files, frames, table)
    labels = np.array([table[name] for name in complete], dtype=np.float32).reshape(-1, LABEL_LENGTH)
    faults += missing + _check_label_array(f'{files.path}/{LABEL_FILE}', complete, labels, position)
    layout = _Files(complete, labels, files, files, files, '_kpt2d.txt')
    return faults + _check_files(layout, num_vertices, None, workers, progress)


def driving_frames(files: FileSet) -> list[str]:
    """Return the names of the frames of a driving folder, sorted."""
    return [name for name in files.names() if name.lower().endswith(PICTURE_ENDINGS) and '/' not in name]


def _complete_frames(files, frames, table):
    """Return (names of the frames that have all they need, faults of the others)."""
    present, complete, faults = set(files.names()), [], []
    for name in frames:
        wanted = {f'{_stem(name)}.obj': 'a mesh', f'{_stem(name)}_kpt2d.txt': 'landmarks'}
        lacking = [
            Fault(f'{files.path}/{file}', f'expected {kind} of {name}, found no such file')
            for file, kind in wanted.items()
            if file not in present
        ]
        if name not in table:
            lacking.append(Fault(f'{files.path}/{LABEL_FILE}', f'expected a label of {name}, found none'))
        if not lacking and table[name] is not None:
            complete.append(name)
        faults += lacking
    return complete, faults


# ---------------------------------------------------------------------------------------------------------------------
# What was checked before


def _raise_first(faults):
    if not faults:
        return
    more = len(faults) - 1
    hint = f' (and {more} more: run dataset_preprocessing/check_data.py for the full list)' if more else ''
    raise DatasetError(f'{faults[0]}{hint}')


def _note_path(source, num_vertices, resolution, cache_dir):
    """Return where the note lies that this source, in its present state, was checked for these sizes."""
    if isinstance(source, PackedSource):
        stats = [(name, os.stat(source.path / name)) for name in (*source.manifest['sha256'], MANIFEST_FILE)]
        state = [str(source.path.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
    else:
        sets = (source.images, source.meshes, source.landmarks)
        state = [(str(files.path.resolve()), files.states()) for files in sets]
    content = json.dumps([CHECK_VERSION, num_vertices, resolution, state])
    return _cache_folder(cache_dir) / f'{hashlib.sha256(content.encode()).hexdigest()}.json'


def _cache_folder(cache_dir):
    if cache_dir is not None:
        return pathlib.Path(cache_dir).expanduser()
    base = os.environ.get('XDG_CACHE_HOME', '')
    # The XDG specification asks that relative paths be ignored.
    root = base if os.path.isabs(base) else os.path.expanduser('~/.cache')
    return pathlib.Path(root) / 'next3d' / 'checked'
