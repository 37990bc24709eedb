# SPDX-License-Identifier: Apache-2.0
"""Run directories: which one a command continues or begins, its options on disk, and its lock."""

import contextlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

from dnnlib.util import atomic_write
from training.report import warn
from training.state import list_states, remove_leftovers
from training.train_config import TrainConfig

try:
    import fcntl
except ImportError:  # Not a POSIX system: runs are not locked there.
    fcntl = None

OPTIONS_FILE, DATA_FILE, LOCK_FILE = 'training_options.json', 'data.json', '.lock'
MAX_DIFFERENCES = 6  # That a message names.


class RunError(ValueError):
    """A run that cannot go on; the message is one line and says why and what remains."""


def open_run(config: TrainConfig, data_digest: str, fresh: bool) -> pathlib.Path:
    """Return the folder to train in: the newest one of the same name and options, or a new one with the next number.

    data_digest: of the data set's names and labels. fresh: always a new one. Raises RunError where --desc names a run
    with a state that was trained with other options or other data, OSError where the folder cannot be made.
    """
    outdir = pathlib.Path(config.outdir).expanduser()
    outdir.mkdir(parents=True, exist_ok=True)
    candidates = [] if fresh else _numbered(outdir, re.escape(config.name))
    for folder in candidates:
        if not _differences(folder, config, data_digest):
            return folder
    for folder in candidates:
        if config.desc and list_states(folder):
            raise RunError(
                f'--desc={config.desc}: {folder} was trained with other options '
                f'({_listed(_differences(folder, config, data_digest))}); give another --desc, or --fresh'
            )
    for folder in candidates[:1]:
        if list_states(folder):
            warn(f'{folder} is left alone, a new run begins: {_listed(_differences(folder, config, data_digest))}')
    return _new_folder(outdir, config, data_digest)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the run against other processes and clear away what killed ones left; RunError where one trains in it."""
    with open(folder / LOCK_FILE, 'a+', encoding='utf-8') as file:
        if not _try_lock(file):
            file.seek(0)
            holder = file.read().strip() or 'unknown'
            raise RunError(f'{folder}: process {holder} trains in it; stop that, or use --fresh') from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        remove_leftovers(folder)
        yield


def _try_lock(file):
    """Tell whether the lock was free; file systems without locks count as free."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Of the process, unlike flock: no child of it holds on.
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        warn(f'{file.name}: cannot be locked ({error.strerror}); make sure that nothing else trains there')
    return True


def abandon(folder: pathlib.Path) -> None:
    """Remove a run in which nothing has been trained; a folder that holds anything else stays."""
    if {path.name for path in folder.iterdir()} <= {OPTIONS_FILE, DATA_FILE, LOCK_FILE}:
        shutil.rmtree(folder)


def load_config(folder: pathlib.Path) -> TrainConfig:
    """Return the options of a run; OSError or ValueError where the file is not there or damaged."""
    return TrainConfig.from_dict(json.loads((folder / OPTIONS_FILE).read_text(encoding='utf-8')))


def _numbered(outdir, name_pattern):
    """Return the numbered folders with a name, newest first."""
    pattern = re.compile(rf'(\d{{5,}})-{name_pattern}')
    found = [(int(match[1]), path) for path in outdir.iterdir() if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _differences(folder, config, data_digest):
    """Return how a run differs from what is asked for, in words; empty: it is the same."""
    try:
        there = _flatten(load_config(folder).identity())
        data = json.loads((folder / DATA_FILE).read_text(encoding='utf-8'))['sha256']
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return ['its options cannot be read']
    here = _flatten(config.identity())
    changed = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    different = [f'{name} {there.get(name)} there, {here.get(name)} now' for name in changed]
    return different + (['other data'] if data != data_digest else [])


def _listed(differences):
    return ', '.join(differences[:MAX_DIFFERENCES]) + (', …' if len(differences) > MAX_DIFFERENCES else '')


def _flatten(data, prefix=''):
    flat = {}
    for name, value in data.items():
        flat.update(_flatten(value, f'{prefix}{name}.') if isinstance(value, dict) else {f'{prefix}{name}': value})
    return flat


def _new_folder(outdir, config, data_digest):
    numbered = _numbered(outdir, '.*')
    number = int(numbered[0].name.split('-')[0]) + 1 if numbered else 0
    while True:
        folder = outdir / f'{number:05d}-{config.name}'
        try:
            folder.mkdir()
            break
        except FileExistsError:  # Another command was quicker.
            number += 1
    for name, content in ((OPTIONS_FILE, config.to_dict()), (DATA_FILE, {'path': config.data, 'sha256': data_digest})):
        with atomic_write(folder / name, 'w') as file:
            json.dump(content, file, indent=1)
    return folder
