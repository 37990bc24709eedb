# SPDX-License-Identifier: Apache-2.0
"""Driving clips: frames of a folder or of one .npz, matched by name and read one at a time; format: docs/videos.md."""

import functools
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from PIL import Image

from geometry import paths
from geometry.meshes import NUM_LANDMARKS, MeshFileError, parse_landmarks, parse_obj_vertices
from training.coefficients import floats, has_coefficients, read_coefficients
from training.config import LABEL_LENGTH
from training.data_checks import MIRROR_ENDING
from training.dataset import LABEL_FILE, PICTURE_ENDINGS, PICTURE_ERRORS, read_labels
from training.files import DatasetError, FileSet

MESH_ENDING, LANDMARK_ENDING = '.obj', '_kpt2d.txt'
COEFFICIENTS_FILE = 'coefficients.npz'
FAULTS_TOLD = 5
NOT_FINITE = 'expected finite numbers, found others'


class NoCoefficientsError(DatasetError):
    """A clip without coefficients, where they were asked for."""


class Clip(Protocol):
    """What drives avatars. labels: float32 [T, 25], None where there are none. fps: None where it is not known."""

    names: list[str]
    labels: np.ndarray | None
    fps: float | None
    num_vertices: int

    def mesh(self, index: int) -> np.ndarray:
        """Return vertices and landmarks [V + 68, 3] float32 of a frame."""

    def picture(self, index: int) -> np.ndarray | None:
        """Return the picture [H, W, 3] uint8 of a frame, or None where the clip has none."""


def open_clip(
    path: str | os.PathLike,
    with_coefficients: bool = False,
    needs_labels: bool = True,
    skip_missing: bool = False,
    limit: int | None = None,
    flame_path: str | os.PathLike | None = None,
) -> Clip:
    """Return the clip of a folder, or of an .npz file.

    with_coefficients: make the meshes from coefficients of a head model, even where the clip has some; a clip without
    meshes is made so anyway. NoCoefficientsError where it has none. needs_labels: whether cameras are used.
    skip_missing: leave frames out that lack something or whose numbers are not finite; otherwise the first of them
    raise DatasetError, which names the files or the frames. limit: use at most so many frames. flame_path: FLAME's
    model file or its folder, for its coefficients; None: the published place.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix.lower() == '.npz':
        return PackedClip(path, with_coefficients, needs_labels, skip_missing, limit, flame_path)
    return FolderClip(path, with_coefficients, needs_labels, skip_missing, limit, flame_path)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


class FolderClip:
    """<frame>.png, <frame>.obj, <frame>_kpt2d.txt of each frame, dataset.json and, where it exists, coefficients.npz.

    Names decide what belongs together, mirrored copies are ignored, and numbers in names count as numbers.
    coefficients.npz takes the place of meshes where asked for. Arguments as those of `open_clip`.
    """

    def __init__(self, path, with_coefficients, needs_labels, skip_missing, limit, flame_path=None):
        self._files = FileSet(path)
        self._present = {name for name in self._files.names() if '/' not in name}
        self.coefficients, self.fps, self._num_points = None, None, None
        if COEFFICIENTS_FILE in self._present:
            where = self._files.path / COEFFICIENTS_FILE
            arrays = _load_npz(where)
            self.fps = _fps(where, arrays)
            self.coefficients = read_coefficients(where, arrays, flame_path) if with_coefficients else None
        elif with_coefficients:
            where = f'{path}/{COEFFICIENTS_FILE}'
            raise NoCoefficientsError(f'{where}: expected coefficients of a head model, found no such file')
        table = self._labels() if needs_labels else {}
        frames = self._frames(table)
        self.names = _whole(path, frames, lambda stem: self._faults(stem, table, needs_labels), skip_missing, limit)
        self.labels = np.stack([table[stem] for stem in self.names]) if needs_labels else None
        self.num_vertices = len(self.mesh(0)) - NUM_LANDMARKS

    def mesh(self, index):
        stem = self.names[index]
        return self._read_mesh(stem) if self.coefficients is None else self.coefficients.mesh(stem)

    def picture(self, index):
        name = self._pictures.get(self.names[index])
        if name is None:
            return None
        try:
            with Image.open(self._files.path / name) as picture:
                return np.asarray(picture.convert('RGB'))
        except PICTURE_ERRORS as error:
            raise DatasetError(f'{self._files.path}/{name}: expected a picture, {error}') from None

    def _labels(self):
        """Return {frame: label} of dataset.json, without mirrored frames."""
        table = read_labels(self._files, LABEL_FILE, LABEL_LENGTH, lambda *_: None)  # None where bad: told by frame.
        return {_stem(name): label for name, label in table.items() if not _stem(name).endswith(MIRROR_ENDING)}

    def _frames(self, table):
        """Return the names of frames, whole or not, in order; find their pictures."""
        pictures = [name for name in self._present if name.lower().endswith(PICTURE_ENDINGS)]
        self._pictures = {_stem(name): name for name in sorted(pictures, reverse=True)}
        stems = set(self._pictures)
        if self.coefficients is None:
            stems |= {x.removesuffix(e) for x in self._present for e in (MESH_ENDING, LANDMARK_ENDING) if x.endswith(e)}
        else:
            stems |= set(self.coefficients.rows)
        frames = sorted((stem for stem in stems if not stem.endswith(MIRROR_ENDING)), key=_natural)
        if not frames:
            raise DatasetError(f'{self._files.path}: expected frames ({MESH_ENDING}, {LANDMARK_ENDING}, .png), found 0')
        # A label without any file is a gap where it lies between frames; at the ends somebody cut the clip.
        ends = _natural(frames[0]), _natural(frames[-1])
        gaps = {stem for stem in table if '/' not in stem and ends[0] < _natural(stem) < ends[1]}
        return sorted(gaps.union(frames), key=_natural)

    def _faults(self, stem, table, needs_labels) -> Iterator[str]:
        """Yield what a frame lacks, and what of it cannot be used."""
        if self.coefficients is not None:
            if stem not in self.coefficients.rows:
                yield f'{COEFFICIENTS_FILE}: {stem}'
            elif stem in self.coefficients.broken:
                yield f'{self._files.path}/{COEFFICIENTS_FILE}: {stem}: {NOT_FINITE}'
        else:
            absent = [stem + ending for ending in (MESH_ENDING, LANDMARK_ENDING) if stem + ending not in self._present]
            yield from absent
            if not absent:
                try:
                    count = len(self._read_mesh(stem)) - NUM_LANDMARKS
                    self._num_points = self._num_points or count
                    if count != self._num_points:
                        where = f'{self._files.path}/{stem}{MESH_ENDING}'
                        yield f'{where}: expected {self._num_points} vertices, found {count}'
                except MeshFileError as error:
                    yield str(error)
        yield from self._picture_faults(stem)
        if needs_labels and stem not in table:
            yield f'{LABEL_FILE}: {stem}'
        elif needs_labels and (table[stem] is None or not paths.is_pose(table[stem])):
            yield f'{self._files.path}/{LABEL_FILE}: {stem}: expected {LABEL_LENGTH} finite numbers with a rotation'

    def _picture_faults(self, stem):
        if self._pictures and stem not in self._pictures:
            yield f'{stem}.png'
        elif self._pictures:
            path = self._files.path / self._pictures[stem]
            try:
                with Image.open(path):  # Reads the header: pixels are decoded when they are shown.
                    pass
            except PICTURE_ERRORS as error:
                yield f'{path}: expected a picture, {error}'

    def _read_mesh(self, stem):
        mesh, landmarks = stem + MESH_ENDING, stem + LANDMARK_ENDING
        vertices = parse_obj_vertices(self._files.read(mesh), f'{self._files.path}/{mesh}')
        points = parse_landmarks(self._files.read(landmarks), f'{self._files.path}/{landmarks}')
        return np.concatenate([vertices, points])


def _whole(path, frames, faults_of, skip_missing, limit):
    """Return the frames without faults, at most `limit`; DatasetError where others may not be skipped, or for none."""
    faults, whole = [], []
    for frame in frames:
        found = list(faults_of(frame))
        faults += found
        if not found:
            whole.append(frame)
        if limit is not None and len(whole) == limit:
            break
    if faults and not skip_missing:
        raise DatasetError(_summary(path, faults))
    if not whole:
        raise DatasetError(f'{path}: expected frames with all they need, found 0 of {len(frames)}')
    return whole


def _summary(folder, faults):
    """Return one line of the first faults: messages as they are, names of files that are missing."""
    missing = [fault for fault in faults if ': expected' not in fault]
    if not missing:
        more = f' (and {len(faults) - 1} more)' if len(faults) > 1 else ''
        return f'{faults[0]}{more}; --skip-missing leaves such frames out'
    more = f' and {len(missing) - FAULTS_TOLD} more' if len(missing) > FAULTS_TOLD else ''
    names = ', '.join(missing[:FAULTS_TOLD])
    return f'{folder}: expected all files of the frames, missing: {names}{more}; --skip-missing leaves such frames out'


def _stem(name):
    return os.path.splitext(name)[0]


def _natural(stem):
    """Return a key that sorts frame2 before frame10."""
    return [(1, int(part), '') if part.isdigit() else (0, 0, part) for part in re.split(r'([0-9]+)', stem)], stem


# ---------------------------------------------------------------------------------------------------------------------
# Another face


class Retargeted:
    """A clip's expressions on another head: neutral mesh [V + 68, 3], which the clip's coefficients move.

    The clip has to have been opened with_coefficients.
    """

    def __init__(self, clip: Clip, mesh: np.ndarray):
        expected, found = clip.coefficients.head.num_vertices, len(mesh) - NUM_LANDMARKS
        if found != expected:
            raise DatasetError(f"mesh to retarget to: expected the head model's {expected} vertices, found {found}")
        self._mesh_of = clip.coefficients.worn_by(mesh)
        self.names, self.labels, self.fps, self.num_vertices = clip.names, clip.labels, clip.fps, clip.num_vertices
        self.picture = clip.picture

    def mesh(self, index):
        return self._mesh_of(self.names[index])


# ---------------------------------------------------------------------------------------------------------------------
# Packed clips


class PackedClip:
    """One .npz: names [T], labels [T, 25], fps, and either mesh [T, V + 68, 3] or coefficients; arguments: `open_clip`.

    Meshes that np.savez stored stay on the disk; those of np.savez_compressed are taken into memory. A frame lacks
    something where its mesh, coefficients or label are not finite, or its label holds no rotation.
    """

    def __init__(self, path: pathlib.Path, with_coefficients, needs_labels, skip_missing, limit, flame_path=None):
        arrays = _load_npz(path, leave={'mesh', 'pictures'})
        shapes = {name: value.shape for name, value in arrays.items()}
        expression = 'expression' if 'expression' in arrays else 'exp'
        main = expression if with_coefficients or 'mesh' not in arrays else 'mesh'
        if not shapes.get(main):
            wanted = 'expression [T, E]' + ('' if with_coefficients else f' or mesh [T, V + {NUM_LANDMARKS}, 3]')
            kind = NoCoefficientsError if not has_coefficients(arrays) else DatasetError
            raise kind(f'{path}: expected an array {wanted}, found {", ".join(sorted(shapes)) or "none"}')
        count = shapes[main][0]
        arrays.setdefault('names', np.array([f'{i:05d}' for i in range(count)]))
        names = [_stem(str(name)) for name in arrays['names'].reshape(-1)]
        if len(names) != count or not count:
            raise DatasetError(f'{path}: expected names of {count} frames, at least 1, found {len(names)}')
        self.coefficients = None if main == 'mesh' else read_coefficients(path, arrays, flame_path)
        self.fps = _fps(path, arrays)
        labels = self._all_labels(path, arrays, count) if needs_labels else None
        self._mesh, self._pictures = arrays.get('mesh'), arrays.get('pictures')
        mesh = shapes[main] if main == 'mesh' else None
        if mesh is not None and (len(mesh) != 3 or mesh[2] != 3 or mesh[1] <= NUM_LANDMARKS):
            raise DatasetError(f'{path}: mesh: expected float32 [T, V + {NUM_LANDMARKS}, 3], found {list(mesh)}')
        if self._pictures is not None and (len(shapes['pictures']) != 4 or shapes['pictures'][::3] != (count, 3)):
            raise DatasetError(f'{path}: pictures: expected uint8 [{count}, H, W, 3], found {list(shapes["pictures"])}')
        frames = [(row, name) for row, name in enumerate(names) if not name.endswith(MIRROR_ENDING)]
        whole = _whole(path, frames, lambda frame: self._faults(path, *frame, labels), skip_missing, limit)
        self._rows, self.names = [row for row, _ in whole], [name for _, name in whole]
        self.labels = None if labels is None else labels[self._rows]
        self.num_vertices = len(self.mesh(0)) - NUM_LANDMARKS

    def mesh(self, index):
        if self.coefficients is not None:
            return self.coefficients.mesh(self.names[index])
        return self._mesh[self._rows[index]].astype(np.float32)

    def picture(self, index):
        return None if self._pictures is None else np.array(self._pictures[self._rows[index]], dtype=np.uint8)

    def _faults(self, path, row, name, labels) -> Iterator[str]:
        """Yield what of a frame cannot be used."""
        if self.coefficients is not None and name in self.coefficients.broken:
            yield f'{path}: coefficients of {name}: {NOT_FINITE}'
        elif self.coefficients is None and not np.isfinite(self._mesh[row].astype(np.float32)).all():
            yield f'{path}: mesh of {name}: {NOT_FINITE}'
        if labels is not None and not paths.is_pose(labels[row]):
            yield f'{path}: label of {name}: expected {LABEL_LENGTH} finite numbers with a rotation'

    @staticmethod
    def _all_labels(path, arrays, count):
        if 'labels' not in arrays:
            raise DatasetError(f'{path}: expected an array labels [{count}, {LABEL_LENGTH}], or --fixed-camera')
        return floats(path, 'labels', arrays['labels'], [count, LABEL_LENGTH])


class _Stored:
    """An array of a zip archive that is stored as it is: rows are read from the disk when asked for."""

    def __init__(self, path, info):
        self._file = open(path, 'rb')  # Closed with this object.
        self._file.seek(info.header_offset)
        header = self._file.read(30)  # Local header of a zip entry: lengths of name and extra field end it.
        self._file.seek(int.from_bytes(header[26:28], 'little') + int.from_bytes(header[28:30], 'little'), os.SEEK_CUR)
        version = np.lib.format.read_magic(self._file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, is_fortran, self.dtype = read(self._file)
        if is_fortran or self.dtype.hasobject:
            raise ValueError('expected rows of plain numbers')
        self._start = self._file.tell()

    def __getitem__(self, row):
        size = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        data = os.pread(self._file.fileno(), size, self._start + row * size)
        if len(data) != size:
            raise DatasetError(f'{self._file.name}: expected {self.shape[0]} frames, the file ends in frame {row}')
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])


def _load_npz(path, leave=()):
    """Return the arrays of an .npz; of those in `leave`, stored ones stay on the disk."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError('a single array')
            infos = {info.filename.removesuffix('.npy'): info for info in file.zip.infolist()}
            left = {n: i for n, i in infos.items() if n in leave and i.compress_type == zipfile.ZIP_STORED}
            arrays = {name: file[name] for name in file.files if name not in left}
        return arrays | {name: _Stored(path, info) for name, info in left.items()}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DatasetError(f'{path}: expected an .npz of arrays, found none that can be read: {reason}') from None


def _fps(where, arrays):
    if 'fps' not in arrays:
        return None
    try:
        fps = float(arrays['fps'])
    except (TypeError, ValueError):
        fps = 0.0
    if not 0 < fps <= 1000:
        raise DatasetError(f'{where}: fps: expected a number of frames a second, found {arrays["fps"]}')
    return fps


# ---------------------------------------------------------------------------------------------------------------------
# Motion


def smooth_meshes(clip: Clip, window: int) -> Iterator[np.ndarray]:
    """Yield meshes [V + 68, 3] averaged over `window` (odd) frames about each, fewer at the ends; reads each once."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f'window: expected an odd number from 1, got {window}')
    count, near = len(clip.names), {}
    for index in range(count):
        first, last = max(0, index - window // 2), min(count - 1, index + window // 2)
        for other in range(max(near, default=-1) + 1, last + 1):
            near[other] = clip.mesh(other)
        near = {other: mesh for other, mesh in near.items() if other >= first}
        yield np.mean(list(near.values()), axis=0, dtype=np.float32) if window > 1 else near[index]


def there_and_back(clip: Clip, count: int, fps: float) -> Iterator[np.ndarray]:
    """Yield `count` meshes [V + 68, 3] that play a clip forwards and backwards at about its own speed, and loop.

    fps: of the frames that are yielded; between the clip's own they are linear.
    """
    last = len(clip.names) - 1
    read = functools.lru_cache(maxsize=4)(clip.mesh)
    seconds = count / fps
    rounds = max(1, round(seconds / (2 * max(last, 1) / (clip.fps or fps))))
    for index in range(count):
        phase = rounds * index / count % 1
        position = last * (1 - abs(2 * phase - 1))
        before = min(int(position), max(last - 1, 0))
        share = position - before
        yield ((1 - share) * read(before) + share * read(min(before + 1, last))).astype(np.float32)
