# SPDX-License-Identifier: Apache-2.0
"""Complete states of a run on disk: written whole or not at all, and read back only when every byte is right."""

import hashlib
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any

import torch

KEEP = 2  # The newest states that stay on disk: one could be lost to a bad sector.
TEMPORARY = '.tmp-training-state-'
DIGEST_LETTERS = 16  # Hexadecimal letters of SHA-256 in the name.
NAME = re.compile(r'training-state-(\d{12})-([0-9a-f]{16})\.pt')
_BLOCK_BYTES = 1 << 22
# What reading a damaged file raises.
DAMAGE = (EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)


class StateError(ValueError):
    """No state of a run can be used though there are some."""


def save_state(folder: pathlib.Path, nimg: int, content: dict[str, Any]) -> pathlib.Path:
    """Write a state of tensors and plain data after `nimg` images, then remove all but the newest KEEP.

    The file is written under a temporary name and fsynced; its final name holds a hash of its bytes. Raises OSError
    (a full disk, say): older states are then untouched and nothing is left behind.
    """
    temporary = folder / f'{TEMPORARY}{os.getpid()}'
    try:
        with open(temporary, 'wb') as file:
            writer = _HashingWriter(file)
            try:
                torch.save(content, writer)
            except RuntimeError as error:  # The archive's writer complains of what the disk refused.
                raise writer.error or error from error
            file.flush()
            os.fsync(file.fileno())
        path = folder / f'training-state-{nimg:012d}-{writer.digest.hexdigest()[:DIGEST_LETTERS]}.pt'
        os.replace(temporary, path)
        _sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    for old in list_states(folder)[KEEP:]:
        old.unlink(missing_ok=True)
    return path


def list_states(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the states of a run, newest first."""
    return sorted((path for path in folder.glob('training-state-*.pt') if NAME.fullmatch(path.name)), reverse=True)


def load_newest(folder: pathlib.Path, warn: Callable[[str], None]) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """Return path and content of the newest state that is whole, or None where there are no states.

    Nothing in a file is executed: only tensors and plain data are read. Damaged files that are newer than a whole one
    are renamed to NAME.damaged, and `warn` is told. Raises StateError where all are damaged, OSError where one cannot
    be read for now.
    """
    states = list_states(folder)
    for number, path in enumerate(states):
        try:
            found = _hash_file(path)
            if found != NAME.fullmatch(path.name)[2]:
                raise ValueError(f'its bytes hash to {found}')
            content = torch.load(path, map_location='cpu', weights_only=True)
        except DAMAGE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warn(f'{path.name} is damaged and left aside ({reason})')
            continue
        for damaged in states[:number]:  # Out of the way of the states to come, which are older by their names.
            damaged.rename(damaged.with_name(damaged.name + '.damaged'))
        return path, content
    if states:
        raise StateError(f'{folder}: all {len(states)} states are damaged; --fresh begins anew')
    return None


def remove_leftovers(folder: pathlib.Path) -> None:
    """Remove what killed processes left half-written; only for the process that holds the run's lock."""
    for path in folder.glob('.tmp-*'):
        path.unlink(missing_ok=True)


class _HashingWriter:
    """A file to write to that hashes what passes, and remembers what the disk said."""

    def __init__(self, file):
        self._file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self._file.flush()


def _hash_file(path):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()[:DIGEST_LETTERS]


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
