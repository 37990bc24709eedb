# SPDX-License-Identifier: Apache-2.0
"""Training data: pictures with camera labels, meshes and landmarks, in the published layout or packed."""

import io
import json
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from geometry.meshes import NUM_LANDMARKS, MeshFileError, parse_landmarks, parse_obj_vertices
from geometry.mirror import mirror_label, mirror_mesh
from training.config import EXPRESSION_LENGTH, LABEL_LENGTH
from training.files import DatasetError, FileSet

LABEL_FILE, EXPRESSION_FILE = 'dataset.json', 'dataset_exp.json'
REPEATS_FILE, MAX_REPEATS = 'dataset_repeats.json', 1000
# What Pillow raises for files that it cannot read; SyntaxError: a broken PNG.
PICTURE_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)
PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp')
PACKED_FORMAT, PACKED_VERSION = 'next3d-packed', 1
MANIFEST_FILE, PACKED_IMAGES = 'manifest.json', 'images.zip'
MANIFEST_KEYS = {'names', 'resolution', 'shapes', 'sha256'}
PACKED_ARRAYS = {'vertices': 'vertices.npy', 'landmarks': 'landmarks.npy', 'labels': 'labels.npy'}


class Item(NamedTuple):
    """image uint8 [3, R, R], label float32 [25 or 75], mesh float32 [V + 68, 3]: vertices, then landmarks."""

    image: np.ndarray
    label: np.ndarray
    mesh: np.ndarray


class Source(Protocol):
    """Where items come from; `names` are those of the pictures, in order. repeats [N]: how often training has each."""

    names: list[str]
    labels: np.ndarray
    repeats: np.ndarray

    def image(self, index: int) -> np.ndarray:
        """Return the picture [3, R, R] uint8."""

    def mesh(self, index: int) -> np.ndarray:
        """Return vertices and landmarks [V + 68, 3] float32."""


MESHES, BESIDE_ENDING = 'meshes', '_kpt2d.txt'


def landmarks_path(meshes: str | os.PathLike) -> pathlib.Path:
    """Return where landmarks lie beside a mesh folder or archive: meshes512x512 -> lms512x512.

    Only the last part of the path is changed. DatasetError where it does not hold the word 'meshes'.
    """
    path = pathlib.Path(meshes).expanduser()
    if MESHES not in path.name:
        raise DatasetError(f"{meshes}: expected a name with 'meshes', beside which landmarks are found under 'lms'")
    return path.with_name(path.name.replace(MESHES, 'lms'))


def raise_fault(where: str, message: str):
    """Raise DatasetError: what opening a data set does with its first fault unless told otherwise."""
    raise DatasetError(f'{where}: {message}')


def read_labels(files: FileSet, name: str, length: int, on_fault: Callable = raise_fault) -> dict:
    """Read {'labels': [[picture name, numbers], ...]} -> name: float32 [length].

    on_fault: called with (where, message) for each bad entry, which the result then has as None, and for each picture
    that has a second label. Raises DatasetError where the file is missing or of another form.
    """
    where = f'{files.path}/{name}'
    try:
        entries = json.loads(files.read(name))['labels']
        pairs = [(entry[0], entry[1]) for entry in entries]
    except FileNotFoundError:
        raise DatasetError(f'{where}: expected camera labels of the pictures, found no such file') from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, IndexError) as error:
        raise DatasetError(f"{where}: expected {{'labels': [[name, numbers], ...]}} ({error})") from None
    labels = {}
    for picture, numbers in pairs:
        picture = str(picture).replace('\\', '/')
        if picture in labels:
            on_fault(f'{where}: {picture}', 'expected one label of a picture, found a second one')
        else:
            labels[picture] = _parse_label(f'{where}: {picture}', numbers, length, on_fault)
    return labels


def _parse_label(where, numbers, length, on_fault):
    """Return float32 [length], or None where on_fault was called."""
    count = len(numbers) if isinstance(numbers, list) else 0
    if count != length:
        on_fault(where, f'expected a label of {length} numbers, found {count}')
        return None
    try:
        with np.errstate(over='ignore'):  # Numbers beyond float32 become infinite, which data_checks.py tells.
            return np.asarray(numbers, dtype=np.float32)
    except (TypeError, ValueError) as error:
        on_fault(where, f'expected a label of {length} numbers, found something else ({error})')
        return None


def read_repeats(files: FileSet, names: list[str]) -> np.ndarray:
    """Return how often each picture counts [N] int64, of dataset_repeats.json: {'repeats': {picture name: number}}.

    Pictures that it does not name count once. Names of other pictures are ignored, as labels are. Raises DatasetError
    for a file of another form, and numbers not from 1 to MAX_REPEATS.
    """
    where = f'{files.path}/{REPEATS_FILE}'
    try:
        table = json.loads(files.read(REPEATS_FILE))['repeats']
        numbers = {name: table.get(name, 1) for name in names}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{where}: expected {{'repeats': {{name: number}}}} ({error})") from None
    _expect_repeats(where, numbers)
    return np.array(list(numbers.values()), dtype=np.int64)


def _expect_repeats(where, numbers):
    for name, number in numbers.items():
        if type(number) is not int or not 1 <= number <= MAX_REPEATS:
            raise DatasetError(f'{where}: {name}: expected a whole number from 1 to {MAX_REPEATS}, found {number!r}')


class FolderSource:
    """The published layout: pictures with dataset.json, .obj meshes and .txt landmarks of the same names.

    Or that of driving: where no folder of meshes is named so, landmarks may lie beside them as <name>_kpt2d.txt.

    with_expressions: append the 50 numbers of dataset_exp.json to the labels. on_fault: called with (where, message)
    for each label, mesh or landmark file that is missing or bad, whose picture is then left out; otherwise the first
    one raises DatasetError. repeats: of dataset_repeats.json. num_pictures: with those left out. unused_labels: how
    many are of no picture.
    """

    def __init__(
        self,
        data: str | os.PathLike,
        rdata: str | os.PathLike,
        with_expressions: bool = False,
        on_fault: Callable = raise_fault,
    ):
        self.images, self.meshes = FileSet(data), FileSet(rdata)
        is_beside = MESHES not in self.meshes.path.name and any(
            name.endswith(BESIDE_ENDING) for name in self.meshes.names()
        )  # fmt: skip
        self.landmarks = self.meshes if is_beside else FileSet(landmarks_path(rdata))
        self.landmark_ending = BESIDE_ENDING if is_beside else '.txt'
        present = self.images.names()
        pictures = [name for name in present if name.lower().endswith(PICTURE_ENDINGS)]
        if not pictures:
            raise DatasetError(f'{data}: expected pictures, found none')
        lengths = {LABEL_FILE: LABEL_LENGTH} | ({EXPRESSION_FILE: EXPRESSION_LENGTH} if with_expressions else {})
        tables = {file: read_labels(self.images, file, length, on_fault) for file, length in lengths.items()}
        complete = self._with_labels(pictures, tables, on_fault)
        complete &= self._with_file(pictures, self.meshes, '.obj', 'mesh', on_fault)
        complete &= self._with_file(pictures, self.landmarks, self.landmark_ending, 'landmark file', on_fault)
        self.names = [name for name in pictures if name in complete]
        rows = [np.concatenate([table[name] for table in tables.values()]) for name in self.names]
        self.labels = np.array(rows, dtype=np.float32).reshape(len(rows), sum(lengths.values()))
        self.repeats = np.ones(len(self.names), dtype=np.int64)
        if REPEATS_FILE in present:
            self.repeats = read_repeats(self.images, self.names)
        self.num_pictures = len(pictures)
        self.unused_labels = len(tables[LABEL_FILE].keys() - set(pictures))

    def image(self, index):
        name = self.names[index]
        return decode_image(self.images.read(name), f'{self.images.path}/{name}')

    def mesh(self, index):
        stem = os.path.splitext(self.names[index])[0]
        try:
            vertices = parse_obj_vertices(self.meshes.read(f'{stem}.obj'), f'{self.meshes.path}/{stem}.obj')
            name = f'{stem}{self.landmark_ending}'
            landmarks = parse_landmarks(self.landmarks.read(name), f'{self.landmarks.path}/{name}')
        except MeshFileError as error:
            raise DatasetError(str(error)) from error
        return np.concatenate([vertices, landmarks])

    def _with_labels(self, pictures, tables, on_fault):
        """Return the set of the pictures that have all their labels."""
        complete = set(pictures)
        for file, by_name in tables.items():
            for name in pictures:
                if name not in by_name:
                    on_fault(f'{self.images.path}/{file}', f'expected a label of {name}, found none')
            complete -= {name for name in pictures if by_name.get(name) is None}
        return complete

    @staticmethod
    def _with_file(pictures, files, ending, kind, on_fault):
        """Return the set of the pictures that have a file of their name with another ending."""
        present, complete = set(files.names()), set(pictures)
        for name in pictures:
            wanted = os.path.splitext(name)[0] + ending
            if wanted not in present:
                on_fault(f'{files.path}/{wanted}', f'expected a {kind} of {name}, found no such file')
                complete.remove(name)
        return complete


class PackedSource:
    """A folder written by dataset_preprocessing/pack.py: pictures in one archive, the rest in memory-mapped arrays.

    Processes that it is sent to map the arrays anew.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser()
        self.manifest = read_manifest(self.path)
        self.images = FileSet(self.path / PACKED_IMAGES)
        self.names = self.manifest['names']
        repeats = self.manifest.get('repeats', [1] * len(self.names))
        if not isinstance(repeats, list) or len(repeats) != len(self.names):
            raise DatasetError(f'{self.path / MANIFEST_FILE}: expected repeats of {len(self.names)} items')
        _expect_repeats(self.path / MANIFEST_FILE, dict(zip(self.names, repeats, strict=True)))
        self.repeats = np.array(repeats, dtype=np.int64)
        arrays = {name: self._map(name, file) for name, file in PACKED_ARRAYS.items()}
        self.labels, self._vertices, self._landmarks = arrays['labels'], arrays['vertices'], arrays['landmarks']

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Return 'vertices' [N, V, 3], 'landmarks' [N, 68, 3] and 'labels' [N, 25 or 75], float32, from the disk."""
        return {'vertices': self._vertices, 'landmarks': self._landmarks, 'labels': self.labels}

    def image(self, index):
        name = self.names[index]
        return decode_image(self.images.read(name), f'{self.images.path}/{name}')

    def mesh(self, index):
        return np.concatenate([self._vertices[index], self._landmarks[index]])

    def __getstate__(self):
        return self.path  # Pickling a mapped array would copy it.

    def __setstate__(self, path):
        self.__init__(path)

    def _map(self, name, file):
        expected = [len(self.names), *self.manifest['shapes'][name][1:]]
        try:
            array = np.load(self.path / file, mmap_mode='r', allow_pickle=False)
        except ValueError as error:
            raise DatasetError(f'{self.path / file}: expected an array, {error}') from None
        if list(array.shape) != expected or array.dtype != np.float32:
            found = f'{array.dtype} {list(array.shape)}'
            raise DatasetError(f'{self.path / file}: expected float32 {expected}, found {found}')
        return array


def read_manifest(path: pathlib.Path) -> dict:
    """Return the manifest of a packed folder; DatasetError where it is not one or of another version."""
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise DatasetError(f'{file}: expected the manifest of a packed data set, found no such file') from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f'{file}: expected JSON, {error}') from None
    if not isinstance(manifest, dict) or manifest.get('format') != PACKED_FORMAT:
        raise DatasetError(f'{file}: expected the manifest of a packed data set')
    if manifest.get('version') != PACKED_VERSION:
        raise DatasetError(f'{file}: expected version {PACKED_VERSION}, found {manifest.get("version")}')
    missing = MANIFEST_KEYS - manifest.keys()
    if missing:
        raise DatasetError(f'{file}: expected the entries {", ".join(sorted(missing))}, found none')
    return manifest


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Return a square RGB picture [3, R, R] uint8; DatasetError names the file."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture.convert('RGB'))
    except PICTURE_ERRORS as error:
        raise DatasetError(f'{where}: expected a picture, {error}') from None
    if pixels.shape[0] != pixels.shape[1]:
        raise DatasetError(f'{where}: expected a square picture, found {pixels.shape[1]}x{pixels.shape[0]}')
    return pixels.transpose(2, 0, 1)


class HeadDataset:
    """Items of a source, each as often as `repeats` [N] says, and their mirror images when `partner` is given.

    Copies of an item follow each other; all mirror images come after all items. repeats: None for once each.
    num_vertices, resolution: what every item must have (None: what the first one has). partner: the template's
    `geometry.mirror.vertex_mirror`. label_length: numbers of a label to use (None: all). Indexing raises DatasetError
    naming the file of an item that does not fit.
    """

    def __init__(
        self, source: Source, num_vertices=None, resolution=None, partner: np.ndarray | None = None, label_length=None,
        repeats: np.ndarray | None = None,
    ):  # fmt: skip
        self.source, self.partner = source, partner
        self._rows = np.repeat(np.arange(len(source.names)), 1 if repeats is None else repeats)
        self.label_length = label_length or source.labels.shape[1]
        first = source.mesh(0), source.image(0)
        self.num_vertices = num_vertices or len(first[0]) - NUM_LANDMARKS
        self.resolution = resolution or first[1].shape[-1]
        if partner is not None and self.label_length != LABEL_LENGTH:
            raise DatasetError('mirroring: expression labels of mirrored faces are not known; use labels of 25 numbers')
        if partner is not None and len(partner) != self.num_vertices:
            raise DatasetError(f'mirroring: expected a template of {self.num_vertices} vertices, found {len(partner)}')

    def __len__(self):
        return len(self._rows) * (1 if self.partner is None else 2)

    def __getitem__(self, index: int) -> Item:
        label, mesh = self.camera_and_mesh(index)
        raw, is_mirrored = self._locate(index)
        image = self.source.image(raw)
        if image.shape[-1] != self.resolution:
            raise DatasetError(f'{self.source.names[raw]}: expected {self.resolution} pixels, found {image.shape[-1]}')
        return Item(np.ascontiguousarray(image[:, :, ::-1]) if is_mirrored else image, label, mesh)

    def camera_and_mesh(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return label and mesh of an item without reading its picture: all that a generated picture needs."""
        raw, is_mirrored = self._locate(index)
        label, mesh = np.array(self.source.labels[raw, : self.label_length]), self.source.mesh(raw)
        if len(mesh) != self.num_vertices + NUM_LANDMARKS:
            found = len(mesh) - NUM_LANDMARKS
            name = self.source.names[raw]
            raise DatasetError(f'mesh of {name}: expected {self.num_vertices} vertices, found {found}')
        return (mirror_label(label), mirror_mesh(mesh, self.partner)) if is_mirrored else (label, mesh)

    def _locate(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f'index: expected 0 to {len(self) - 1}, got {index}')
        count = len(self._rows)
        return int(self._rows[index % count]), index >= count


def open_source(data: str | os.PathLike, rdata: str | os.PathLike | None, with_expressions: bool = False) -> Source:
    """Return the source of a packed folder, or of the published layout (data: pictures, rdata: meshes)."""
    if is_packed(data):
        return PackedSource(data)
    if rdata is None:
        raise DatasetError(f'{data}: expected a packed data set, or meshes beside the pictures (--rdata)')
    return FolderSource(data, rdata, with_expressions)


def has_expressions(data: str | os.PathLike) -> bool:
    """Tell whether a data set, packed or not, has expression labels."""
    if is_packed(data):
        return PackedSource(data).labels.shape[1] > LABEL_LENGTH
    return EXPRESSION_FILE in FileSet(data).names()


def is_packed(path: str | os.PathLike) -> bool:
    """Tell whether a path is a packed data set."""
    return (pathlib.Path(path).expanduser() / MANIFEST_FILE).is_file()
