# SPDX-License-Identifier: Apache-2.0
"""Training data: pictures with camera labels, meshes and landmarks, in the published layout or packed."""

import io
import json
import os
import pathlib
import zipfile
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from geometry.meshes import NUM_LANDMARKS, MeshFileError, parse_landmarks, parse_obj_vertices
from geometry.mirror import mirror_label, mirror_mesh
from training.files import FileSet

LABEL_FILE, EXPRESSION_FILE = 'dataset.json', 'dataset_exp.json'
LABEL_LENGTH, EXPRESSION_LENGTH = 25, 50
PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp')
PACKED_FORMAT, PACKED_VERSION = 'next3d-packed', 1
MANIFEST_FILE, PACKED_IMAGES = 'manifest.json', 'images.zip'
PACKED_ARRAYS = {'vertices': 'vertices.npy', 'landmarks': 'landmarks.npy', 'labels': 'labels.npy'}


class DatasetError(ValueError):
    """A data set that cannot be trained on; the message names the file, what was expected and what was found."""


class Item(NamedTuple):
    """image uint8 [3, R, R], label float32 [25 or 75], mesh float32 [V + 68, 3]: vertices, then landmarks."""

    image: np.ndarray
    label: np.ndarray
    mesh: np.ndarray


class Source(Protocol):
    """Where items come from; `names` are those of the pictures, in order."""

    names: list[str]
    labels: np.ndarray

    def image(self, index: int) -> np.ndarray:
        """Return the picture [3, R, R] uint8."""

    def mesh(self, index: int) -> np.ndarray:
        """Return vertices and landmarks [V + 68, 3] float32."""


def landmarks_path(meshes: str | os.PathLike) -> pathlib.Path:
    """Return where landmarks lie beside a mesh folder or archive: meshes512x512 -> lms512x512.

    Only the last part of the path is changed. DatasetError where it does not hold the word 'meshes'.
    """
    path = pathlib.Path(meshes).expanduser()
    if 'meshes' not in path.name:
        raise DatasetError(f"{meshes}: expected a name with 'meshes', beside which landmarks are found under 'lms'")
    return path.with_name(path.name.replace('meshes', 'lms'))


def read_labels(files: FileSet, name: str, length: int) -> dict[str, np.ndarray]:
    """Read {'labels': [[picture name, numbers], ...]} -> name: float32 [length]; DatasetError names the bad entry."""
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
        count = len(numbers) if isinstance(numbers, list) else 0
        if count != length:
            raise DatasetError(f'{where}: {picture}: expected a label of {length} numbers, found {count}')
        labels[picture.replace('\\', '/')] = np.asarray(numbers, dtype=np.float32)
    return labels


class FolderSource:
    """The published layout: pictures with dataset.json, .obj meshes and .txt landmarks of the same names.

    with_expressions: append the 50 numbers of dataset_exp.json to the labels.
    """

    def __init__(self, data: str | os.PathLike, rdata: str | os.PathLike, with_expressions: bool = False):
        self.images, self.meshes = FileSet(data), FileSet(rdata)
        self.landmarks = FileSet(landmarks_path(rdata))
        self.names = [name for name in self.images.names() if name.lower().endswith(PICTURE_ENDINGS)]
        if not self.names:
            raise DatasetError(f'{data}: expected pictures, found none')
        labels = self._labels(LABEL_FILE, LABEL_LENGTH)
        if with_expressions:
            labels = np.concatenate([labels, self._labels(EXPRESSION_FILE, EXPRESSION_LENGTH)], axis=1)
        self.labels = labels
        self._check_names(self.meshes, '.obj', 'mesh')
        self._check_names(self.landmarks, '.txt', 'landmark file')

    @staticmethod
    def has_expressions(data: str | os.PathLike) -> bool:
        """Tell whether a data set has expression labels."""
        return EXPRESSION_FILE in FileSet(data).names()

    def image(self, index):
        name = self.names[index]
        return decode_image(self.images.read(name), f'{self.images.path}/{name}')

    def mesh(self, index):
        stem = os.path.splitext(self.names[index])[0]
        try:
            vertices = parse_obj_vertices(self.meshes.read(f'{stem}.obj'), f'{self.meshes.path}/{stem}.obj')
            landmarks = parse_landmarks(self.landmarks.read(f'{stem}.txt'), f'{self.landmarks.path}/{stem}.txt')
        except MeshFileError as error:
            raise DatasetError(str(error)) from error
        return np.concatenate([vertices, landmarks])

    def _labels(self, file, length):
        by_name = read_labels(self.images, file, length)
        missing = next((name for name in self.names if name not in by_name), None)
        if missing is not None:
            raise DatasetError(f'{self.images.path}/{file}: expected a label of {missing}, found none')
        return np.stack([by_name[name] for name in self.names])

    def _check_names(self, files, ending, kind):
        present = set(files.names())
        for name in self.names:
            wanted = os.path.splitext(name)[0] + ending
            if wanted not in present:
                raise DatasetError(f'{files.path}/{wanted}: expected a {kind} of {name}, found no such file')


class PackedSource:
    """A folder written by dataset_preprocessing/pack.py: pictures in one archive, the rest in memory-mapped arrays."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser()
        self.manifest = read_manifest(self.path)
        self.images = FileSet(self.path / PACKED_IMAGES)
        self.names = self.manifest['names']
        arrays = {name: self._map(name, file) for name, file in PACKED_ARRAYS.items()}
        self.labels, self._vertices, self._landmarks = arrays['labels'], arrays['vertices'], arrays['landmarks']

    def image(self, index):
        name = self.names[index]
        return decode_image(self.images.read(name), f'{self.images.path}/{name}')

    def mesh(self, index):
        return np.concatenate([self._vertices[index], self._landmarks[index]])

    def _map(self, name, file):
        expected = self.manifest['shapes'][name]
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
    return manifest


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Return a square RGB picture [3, R, R] uint8; DatasetError names the file."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture.convert('RGB'))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:
        raise DatasetError(f'{where}: expected a picture, {error}') from None
    if pixels.shape[0] != pixels.shape[1]:
        raise DatasetError(f'{where}: expected a square picture, found {pixels.shape[1]}x{pixels.shape[0]}')
    return pixels.transpose(2, 0, 1)


class HeadDataset:
    """Items of a source, and their mirror images after them when `partner` is given.

    num_vertices, resolution: what every item must have (None: what the first one has). partner: the template's
    `geometry.mirror.vertex_mirror`. Indexing raises DatasetError naming the file of an item that does not fit.
    """

    def __init__(self, source: Source, num_vertices=None, resolution=None, partner: np.ndarray | None = None):
        self.source, self.partner = source, partner
        first = source.mesh(0), source.image(0)
        self.num_vertices = num_vertices or len(first[0]) - NUM_LANDMARKS
        self.resolution = resolution or first[1].shape[-1]
        if partner is not None and self.label_length != LABEL_LENGTH:
            raise DatasetError('mirroring: expression labels of mirrored faces are not known; use labels of 25 numbers')
        if partner is not None and len(partner) != self.num_vertices:
            raise DatasetError(f'mirroring: expected a template of {self.num_vertices} vertices, found {len(partner)}')

    @property
    def label_length(self) -> int:
        """25, or 75 with expressions."""
        return self.source.labels.shape[1]

    def __len__(self):
        return len(self.source.names) * (1 if self.partner is None else 2)

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
        label, mesh = np.array(self.source.labels[raw]), self.source.mesh(raw)
        if len(mesh) != self.num_vertices + NUM_LANDMARKS:
            found = len(mesh) - NUM_LANDMARKS
            name = self.source.names[raw]
            raise DatasetError(f'mesh of {name}: expected {self.num_vertices} vertices, found {found}')
        return (mirror_label(label), mirror_mesh(mesh, self.partner)) if is_mirrored else (label, mesh)

    def _locate(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f'index: expected 0 to {len(self) - 1}, got {index}')
        count = len(self.source.names)
        return index % count, index >= count


def open_source(data: str | os.PathLike, rdata: str | os.PathLike | None, with_expressions: bool = False) -> Source:
    """Return the source of a packed folder, or of the published layout (data: pictures, rdata: meshes)."""
    if is_packed(data):
        return PackedSource(data)
    if rdata is None:
        raise DatasetError(f'{data}: expected a packed data set, or meshes beside the pictures (--rdata)')
    return FolderSource(data, rdata, with_expressions)


def is_packed(path: str | os.PathLike) -> bool:
    """Tell whether a path is a packed data set."""
    return (pathlib.Path(path).expanduser() / MANIFEST_FILE).is_file()
