# SPDX-License-Identifier: Apache-2.0
"""Balancing a data set by pose: pictures of rare yaws count several times in training (EG3D's FFHQ rebalanced)."""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from dnnlib import atomic_write
from geometry.cameras import CAM2WORLD
from training.dataset import (
    LABEL_FILE, LABEL_LENGTH, MANIFEST_FILE, MAX_REPEATS, REPEATS_FILE, DatasetError, PackedSource, is_packed,
    read_labels,
)  # fmt: skip
from training.files import FileSet

NUM_BINS, STRENGTH, MOST = 9, 0.5, 8
FULL_RANGE_DEG = 90.0  # To both sides; pictures beyond count in the outermost bins.


class Balance(NamedTuple):
    """edges [bins + 1] in degrees; counts, factors [bins]: pictures, and how often each counts; repeats [N]."""

    edges: np.ndarray
    counts: np.ndarray
    factors: np.ndarray
    repeats: np.ndarray

    def table(self) -> str:
        """Return the bins as lines of text."""
        lines = ['yaw of the camera    pictures  times  in training']
        for low, high, count, factor in zip(self.edges, self.edges[1:], self.counts, self.factors, strict=False):
            lines.append(f'{low:6.1f}° to {high:6.1f}°  {count:9}  {factor:5}  {count * factor:11}')
        return '\n'.join([*lines, f'{"all":18}  {self.counts.sum():9}         {self.repeats.sum():11}'])


def yaw_deg(labels: np.ndarray) -> np.ndarray:
    """Return the yaw [N] in degrees of labels [N, 25 or more]: 0 from the front, positive towards +x."""
    position = labels[:, CAM2WORLD].reshape(-1, 4, 4)[:, :3, 3].astype(np.float64)
    return np.degrees(np.arctan2(position[:, 0], position[:, 2]))


def balance(labels: np.ndarray, bins: int = NUM_BINS, strength: float = STRENGTH, most: int = MOST) -> Balance:
    """Return how often pictures of labels [N, 25] are to count, by bins of equal width from -90 to 90 degrees of yaw.

    A picture counts (largest bin / its bin)^strength times, rounded, at most `most`: 0 leaves all as they are, 1 makes
    bins equal as far as `most` lets it.
    """
    if not 1 <= most <= MAX_REPEATS:
        raise ValueError(f'most: expected 1 to {MAX_REPEATS}, got {most}')
    edges = np.linspace(-FULL_RANGE_DEG, FULL_RANGE_DEG, bins + 1)
    which = np.digitize(yaw_deg(labels), edges[1:-1])
    counts = np.bincount(which, minlength=bins)
    wanted = (counts.max(initial=1) / np.maximum(counts, 1)) ** strength
    factors = np.where(counts > 0, np.clip(np.rint(wanted), 1, most), 1).astype(np.int64)
    return Balance(edges, counts, factors, factors[which])


def read_poses(data: str) -> tuple[list[str], np.ndarray]:
    """Return names and labels [N, 25 or more] of a data set, packed or a folder of pictures."""
    if is_packed(data):
        source = PackedSource(data)
        return source.names, np.array(source.labels)
    files = FileSet(data)
    if files.is_zip:
        raise DatasetError(f'{data}: expected a folder, found an archive; unpack it, or pack the data set first')
    table = read_labels(files, LABEL_FILE, LABEL_LENGTH)
    if not table:
        raise DatasetError(f'{files.path}/{LABEL_FILE}: expected labels, found none')
    return list(table), np.stack(list(table.values()))


def write_repeats(data: str, names: list[str], repeats: np.ndarray | None) -> pathlib.Path:
    """Note how often each picture counts in a data set's folder, None for once each; return the file.

    A folder of pictures has dataset_repeats.json, a packed one an entry of its manifest. No picture is copied.
    """
    folder = pathlib.Path(data).expanduser()
    if is_packed(data):
        path = folder / MANIFEST_FILE
        manifest = json.loads(path.read_text(encoding='utf-8'))
        manifest.pop('repeats', None)
        content = manifest if repeats is None else {**manifest, 'repeats': repeats.tolist()}
    else:
        path = folder / REPEATS_FILE
        if repeats is None:
            path.unlink(missing_ok=True)
            return path
        several = {name: int(number) for name, number in zip(names, repeats, strict=True) if number > 1}
        content = {'repeats': several}
    with atomic_write(path, 'w') as file:
        json.dump(content, file)
    return path
