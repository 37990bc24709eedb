# SPDX-License-Identifier: Apache-2.0
"""What all steps share: pictures of any kind read as RGB, names of items, and a loop that resumes and reports."""

import contextlib
import functools
import pathlib
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator

import click
import numpy as np
import scipy.io
from PIL import Image, ImageOps
from scipy.io.matlab import MatReadError

from dataset_preprocessing.parallel import in_processes
from dnnlib import atomic_path
from dnnlib.util import clear_leftovers

WRITTEN = '.written'  # Marks a folder of results.
PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp', '.gif', '.avif')
# Pictures too, of formats that Pillow does not read: told, not passed over in silence.
UNREAD_ENDINGS = ('.heic', '.heif', '.jxl', '.dng', '.raw', '.cr2', '.cr3', '.nef', '.arw', '.orf', '.rw2', '.psd')
MIRROR = '_mirror'  # Ends the name of a mirror image.
FAULTS_SHOWN = 20
DONE, FAULT, FACELESS = 'done', 'fault', 'faceless'  # How the work of an item ends.
# What scipy raises for damaged files besides the usual.
MAT_DAMAGE = (MatReadError, NotImplementedError, zlib.error, struct.error, MemoryError, AssertionError)


class PreprocessError(ValueError):
    """An input that a step cannot use; one line that names it, what was expected and what was found."""


class NoFaceError(PreprocessError):
    """A picture without a face: reported, and no fault of the data."""


def list_files(folder: pathlib.Path, endings: Iterable[str]) -> dict[str, pathlib.Path]:
    """Return the files below a folder by name: relative path without its ending, sorted.

    Folders below it that `mark_written` has marked are left out. Raises PreprocessError where there are none, or two
    that differ in their endings only: outputs would collide.
    """
    if not folder.is_dir():
        raise PreprocessError(f'{folder}: expected a folder, found {"a file" if folder.exists() else "nothing"}')
    found = {}
    for path in _visible(folder, endings):
        name = path.relative_to(folder).with_suffix('').as_posix()
        if name in found:
            raise PreprocessError(f'{folder}: expected one file of a name, found {found[name].name} and {path.name}')
        found[name] = path
    if not found:
        raise PreprocessError(f'{folder}: expected files *{", *".join(endings)}, found none')
    return found


def list_written(folder: pathlib.Path, ending: str) -> dict[str, pathlib.Path]:
    """Return what a step has written to a folder so far by name; empty where there is nothing."""
    found = _visible(folder, (ending,)) if folder.is_dir() else ()
    return {path.relative_to(folder).with_suffix('').as_posix(): path for path in found}


def _visible(folder, endings):
    """Yield the files below a folder, sorted, but for hidden ones and for results."""
    written = {path.parent for path in folder.rglob(WRITTEN)} - {folder}
    for path in sorted(folder.rglob('*')):
        if written and not written.isdisjoint(path.parents):
            continue
        is_hidden = any(part.startswith('.') for part in path.relative_to(folder).parts)
        if not is_hidden and path.suffix.lower() in endings and path.is_file():
            yield path


def list_unread(folder: pathlib.Path) -> dict[str, str]:
    """Return the pictures below a folder whose formats are not read, by relative path, and why."""
    return {path.relative_to(folder).as_posix(): unread_reason(path) for path in _visible(folder, UNREAD_ENDINGS)}


def unread_reason(path: pathlib.Path) -> str:
    """Return why a picture of UNREAD_ENDINGS is not read."""
    return f'expected {", ".join(PICTURE_ENDINGS)}, found {path.suffix}: convert it'


def is_older(paths: list[pathlib.Path], source: pathlib.Path) -> bool:
    """Tell whether one of some files is older than what it was made of; those that are missing are not."""
    return any(path.exists() and path.stat().st_mtime_ns < source.stat().st_mtime_ns for path in paths)


def mark_written(folder: pathlib.Path) -> None:
    """Make a folder whose pictures are results: those who list the photographs around it leave them out.

    What killed runs left half-written in it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    (folder / WRITTEN).touch()


def list_pictures(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return the pictures below a folder by name, as `list_files` does."""
    return list_files(folder, PICTURE_ENDINGS)


def read_picture(path: pathlib.Path) -> Image.Image:
    """Return a picture as 8-bit RGB, upright: grey, palette, CMYK, 16 bits, transparency (dropped), EXIF rotation.

    Raises PreprocessError for a file that is damaged, no picture, or too large to be one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # Large photographs are no attack.
            with Image.open(path) as image:
                image.load()
                upright = ImageOps.exif_transpose(image)
        return _grey_of_16_bits(upright) if upright.mode[0] in 'IF' else upright.convert('RGB')
    except FileNotFoundError:
        raise PreprocessError(f'{path}: expected a picture, found no file') from None
    except Image.UnidentifiedImageError:
        raise PreprocessError(f'{path}: expected a picture, found a file of another kind') from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise PreprocessError(f'{path}: expected a picture, found one that cannot be read: {error}') from error


def _grey_of_16_bits(image):
    """Return RGB of a grey picture of 16 bits, which Pillow's conversion would clip at 255 instead of scaling."""
    values = np.asarray(image)
    if values.dtype.kind == 'f' or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(f'expected 8 or 16 bits a pixel, found mode {image.mode}')
    return Image.fromarray((values.astype(np.uint32) // 256).astype(np.uint8)).convert('RGB')


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Make the errors of a block name the picture that it works on."""
    try:
        yield
    except PreprocessError as error:
        raise error if str(path) in str(error) else type(error)(f'{path}: {error}') from error


def save_png(image: Image.Image, path: pathlib.Path) -> None:
    """Write a picture; its folder is made, and the file appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, format='PNG')


def read_points(path: pathlib.Path, count: int) -> np.ndarray:
    """Return the points [count, 2] of a text file with a line `x y` each, in pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # Of empty files; the shape tells.
            points = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except FileNotFoundError:
        raise PreprocessError(f'{path}: expected {count} points, found no file') from None
    except ValueError as error:
        raise PreprocessError(f'{path}: expected {count} lines of x y, found others: {error}') from error
    if points.shape != (count, 2) or not np.isfinite(points).all():
        found = 'numbers that are not finite' if points.shape == (count, 2) else f'an array {list(points.shape)}'
        raise PreprocessError(f'{path}: expected {count} lines of x y, found {found}')
    return points


def read_mat(path: pathlib.Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """Return arrays of a MATLAB file (not of version 7.3) by name, as finite float64."""
    try:
        content = scipy.io.loadmat(path, variable_names=names)
        arrays = [np.asarray(content[name], dtype=np.float64) for name in names]
    except FileNotFoundError:
        raise PreprocessError(f'{path}: expected a MATLAB file with {", ".join(names)}, found no file') from None
    except (*MAT_DAMAGE, ValueError, TypeError, LookupError, OSError, EOFError) as error:
        found = f'found another ({type(error).__name__}: {error})'
        raise PreprocessError(f'{path}: expected a MATLAB file with {", ".join(names)}, {found}') from error
    if not all(np.isfinite(array).all() for array in arrays):
        raise PreprocessError(f'{path}: expected finite numbers, found others')
    return arrays


def write_points(points: np.ndarray, path: pathlib.Path) -> None:
    """Write points [N, 2] for `read_points`, with thousandths of a pixel."""
    write_text(''.join(f'{x:.3f} {y:.3f}\n' for x, y in points), path)


def write_text(text: str, path: pathlib.Path) -> None:
    """Write a text file; its folder is made, and the file appears only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding='utf-8', newline='\n')


def run_step(
    title: str,
    items: dict[str, pathlib.Path],
    outputs: Callable[[str], list[pathlib.Path]],
    work: Callable[[str, pathlib.Path], None],
    workers: int = 1,
) -> None:
    """Do `work(name, path)` for each item some of whose output files are missing; report; raise where items failed.

    An item that fails does not stop the others. Pictures without a face are told, and are no failure. workers: forked
    processes; 1 works in this one. What killed runs left half-written beside the output files is removed.
    """
    todo = [pair for pair in items.items() if not all(file.exists() for file in outputs(pair[0]))]
    for folder in {file.parent for name, _ in todo for file in outputs(name)}:
        if folder.is_dir():
            clear_leftovers(folder)
    faults, faceless = [], []
    for kind, line in in_processes(functools.partial(_attempt, work), todo, workers, title, len(items)):
        {FAULT: faults, FACELESS: faceless, DONE: []}[kind].append(line)
    for line in (faults + faceless)[:FAULTS_SHOWN]:
        click.echo(line)
    hidden = len(faults) + len(faceless) - FAULTS_SHOWN
    if hidden > 0:
        click.echo(f'... and {hidden} more')
    done = len(todo) - len(faults) - len(faceless)
    click.echo(f'{title}: {done} done, {len(items) - len(todo)} already there, {len(faceless)} without a face')
    if faults:
        raise click.ClickException(f'{title}: {len(faults)} of {len(items)} failed')


def _attempt(work, item):
    """Return how `work` of an item (name, path) ended, and the line to tell."""
    try:
        work(*item)
    except NoFaceError as error:
        return FACELESS, str(error)
    except PreprocessError as error:
        return FAULT, ' '.join(str(error).split())
    return DONE, ''
