# SPDX-License-Identifier: Apache-2.0
"""FFHQ's own list of its pictures, ffhq-dataset-v2.json: where each comes from, its hash, its 68 landmarks."""

import hashlib
import json
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from dataset_preprocessing.ffhq.files import PreprocessError
from dnnlib import cache_path, open_url

SOURCE = 'https://github.com/NVlabs/ffhq-dataset'
INDEX_FILE = 'ffhq-dataset-v2.json'
NUM_PICTURES = 70_000
IN_THE_WILD_GB, ALIGNED_GB = 955, 89.1  # As the source tells.
WILD, ALIGNED = 'in_the_wild', 'image'  # The entries of a picture: the photograph, its crop of 1024 pixels.


class RemoteFile(NamedTuple):
    """A file to download: URL, bytes, MD5 in hexadecimal."""

    url: str
    size: int
    md5: str


# As the source's download script names it; 0.25 GB.
INDEX = RemoteFile(
    'https://drive.google.com/uc?id=16N0RV4fHI6joBuKbQAoG34V_cQk7vxSA', 267_793_842,
    '425ae20f06a4da1d4dc0f46d40ba5fd6',
)  # fmt: skip


class Entry(NamedTuple):
    """What the list tells of one picture. landmarks [68, 2] in pixels of a picture of size (width, height)."""

    remote: RemoteFile
    size: tuple[int, int]
    landmarks: np.ndarray


def read_index(path: pathlib.Path, kind: str) -> dict[int, Entry]:
    """Return what ffhq-dataset-v2.json tells of each picture by number; kind: WILD or ALIGNED.

    Raises PreprocessError for a file that is missing or another, and for entries that lack something.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        return {int(number): _entry(parts[kind]) for number, parts in content.items()}
    except FileNotFoundError:
        raise PreprocessError(f'{path}: expected {INDEX_FILE} (from {SOURCE}), found no file') from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        found = f'found another file ({type(error).__name__}: {error})'
        raise PreprocessError(f'{path}: expected {INDEX_FILE} with {kind} of each picture, {found}') from error


def _entry(part):
    landmarks = np.array(part['face_landmarks'], dtype=np.float64)
    if landmarks.shape != (68, 2) or not np.isfinite(landmarks).all():
        raise ValueError(f'expected 68 landmarks, found {list(landmarks.shape)}')
    remote = RemoteFile(str(part['file_url']), int(part['file_size']), str(part['file_md5']))
    width, height = part['pixel_size']
    return Entry(remote, (int(width), int(height)), landmarks)


def number_of(name: str) -> int | None:
    """Return the FFHQ number that ends a picture's name, of digits alone or after 'img'; None where there is none."""
    match = re.fullmatch(r'(?:img)?(\d{1,8})', name.rsplit('/', 1)[-1])
    return int(match[1]) if match else None


def item_name(name: str) -> str:
    """Return the name in the training layout: 00000/img00000123 of a numbered picture, other names as they are."""
    number = number_of(name)
    return name if number is None else f'{number // 1000:05d}/img{number:08d}'


def photograph_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Return where a photograph lies, as in FFHQ: <folder>/00000/00123.png."""
    return folder / f'{number // 1000 * 1000:05d}' / f'{number:05d}.png'


def fetch(remote: RemoteFile, path: pathlib.Path, cache: pathlib.Path) -> None:
    """Download a file to its place; what an interrupted call has got lies in `cache`, and is gone on with.

    Raises DownloadError where it cannot be had, PreprocessError where its size or hash is another.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    open_url(remote.url, cache).close()
    found = cache_path(remote.url, cache)
    size, digest = found.stat().st_size, _md5(found)
    if (size, digest) != (remote.size, remote.md5):
        found.unlink()  # Nothing to go on with: the next call starts anew.
        expected = f'expected {remote.size} bytes of MD5 {remote.md5}, found {size} of {digest}'
        raise PreprocessError(f'{remote.url}: {expected}')
    os.replace(found, path)
    found.with_name(f'{found.name}.lock').unlink(missing_ok=True)


def _md5(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'md5').hexdigest()
