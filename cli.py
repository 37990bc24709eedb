# SPDX-License-Identifier: Apache-2.0
"""What all command lines share: option types, one-line errors, loading a network and a mesh."""

import contextlib
import math
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

import click
import numpy as np
import torch
from tqdm import tqdm

import legacy
from dnnlib.util import DownloadError
from geometry import meshes
from geometry.head_model import load_embedded_head
from metrics.subject import MetricError
from torch_utils.distributed import LOST_STATUS, RankLostError, ToldElsewhereError
from training import driving
from training.dataset import DatasetError
from training.generator import EG3DGenerator, Next3DGenerator
from training.run_dir import RunError
from training.video import VideoError

MAX_SEED = 2**32 - 1
MAX_SEEDS = 1_000_000  # A slip such as 0-4294967295 must not fill the memory.
BAR_EVERY_SECONDS = 0.5
MAX_GRID = 100  # Cells to a side of a video.
MAX_FLOAT = torch.finfo(torch.float32).max
USER_ERRORS = (
    legacy.NetworkFileError, meshes.MeshFileError, DownloadError, DatasetError, RunError, VideoError, MetricError,
    torch.OutOfMemoryError,
)  # fmt: skip
LESS_MEMORY = 'fewer images at a time (--batch-gpu, --batch, --grid) or --device=cpu need less'
USER_STATUS = 3  # Exit status of a process that has told the user what to mend.
TELLING_S = 2.0  # What another process has to tell is on the screen by then.


class Command(click.Command):
    """A command whose errors are one line and a non-zero exit status."""

    def make_context(self, *args, **kwargs):
        """Parse the command line; a bad one gives its line without the usage text."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            raise _one_line(error.format_message(), error.exit_code) from error

    def invoke(self, ctx):
        """Run the command; errors that users cause, and those of files, become one line."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _one_line(error.format_message(), error.exit_code) from error
        except USER_ERRORS as error:
            raise _one_line(describe(error)) from error
        except OSError as error:
            raise _one_line(describe(error)) from error


def describe(error: Exception) -> str:
    """Return one line for an error that a user causes, with the file where it is one of a file."""
    if isinstance(error, OSError) and not isinstance(error, DownloadError):
        where = f'{error.filename}: ' if error.filename else ''
        return f'{where}{error.strerror or error}'
    if isinstance(error, torch.OutOfMemoryError):
        told = '. '.join(str(error).split('. ')[:2])  # Then a paragraph of advice on the allocator.
        return ' '.join(f'{told}; {LESS_MEMORY}'.split())
    return ' '.join(str(error).split())


def run_rank(work: Callable[[], int], agreed: type[Exception] | tuple[type[Exception], ...]) -> None:
    """Do the work of one of several processes, which returns an exit status; where that is not 0, end the process.

    agreed: errors that all processes raise, and the first one tells.
    """
    status, is_silent = 1, False
    try:
        status = work()
    except ToldElsewhereError:
        status, is_silent = USER_STATUS, True
    except (*USER_ERRORS, OSError, click.ClickException) as error:
        status, is_silent = USER_STATUS, int(os.environ['RANK']) > 0 and isinstance(error, agreed)
        if not is_silent:
            click.echo(f'Error: {describe(error)}', err=True)
    except RankLostError as error:
        click.echo(f'Error: {error}', err=True)
        status = LOST_STATUS
    except Exception:  # A defect: shown here, since the launcher tells the exit status alone.
        traceback.print_exc()
    if is_silent:
        time.sleep(TELLING_S)  # The launcher ends all processes with the first that ends: not before it is told.
    if status:
        # Not sys.exit: an orderly end would wait for processes that may be gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _one_line(message, exit_code=1):
    error = click.ClickException(' '.join(message.split()))
    error.exit_code = exit_code
    return error


def option(name: str, *args, **kwargs):
    """Return click.option for --kebab-name that also accepts --kebab_name; `name` is given with underscores."""
    spellings = dict.fromkeys((f'--{name.replace("_", "-")}', f'--{name}'))
    return click.option(*spellings, name.lower(), *args, **kwargs)


class PathText(click.ParamType):
    """A path that is not empty, as an unset shell variable makes it."""

    name = 'path'

    def convert(self, value, param, ctx):
        """Return the path as it is."""
        if not value:
            self.fail(f'expected a path, got {value!r}.', param, ctx)
        return value


class FiniteFloat(click.ParamType):
    """A float that float32 can hold, neither NaN nor infinite, within (minimum, maximum) where given."""

    name = 'float'

    def __init__(self, minimum: float = -math.inf, maximum: float = math.inf):
        self.minimum, self.maximum = minimum, maximum

    def convert(self, value, param, ctx):
        """Return the float or fail with what was expected."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not abs(number) <= MAX_FLOAT or not self.minimum < number < self.maximum:
            limits = '' if self.minimum == -math.inf else f' between {self.minimum:g} and {self.maximum:g}'
            self.fail(f'expected a finite number{limits}, got {value!r}.', param, ctx)
        return number


class SeedList(click.ParamType):
    """Seeds '0,3,7-9' -> [0, 3, 7, 8, 9]."""

    name = 'list'

    def convert(self, value, param, ctx):
        """Return the seeds in the order given."""
        if isinstance(value, list):
            return value
        seeds = []
        for part in value.split(','):
            match = re.fullmatch(r'\s*(\d{1,10})(?:-(\d{1,10}))?\s*', part)
            if not match:
                self.fail(f"expected numbers and ranges such as '0,3,7-9', got {value!r}.", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last or last > MAX_SEED:
                self.fail(f'expected rising ranges of seeds up to {MAX_SEED}, got {part.strip()!r}.', param, ctx)
            if len(seeds) + last - first >= MAX_SEEDS:
                self.fail(f'expected at most {MAX_SEEDS} seeds, got {value!r}.', param, ctx)
            seeds.extend(range(first, last + 1))
        return seeds


class Grid(click.ParamType):
    """Columns and rows '4x2' -> (4, 2)."""

    name = 'grid'

    def convert(self, value, param, ctx):
        """Return (columns, rows)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r'\s*(\d{1,3})\s*[x,]\s*(\d{1,3})\s*', value)
        if not match or not all(1 <= int(side) <= MAX_GRID for side in match.groups()):
            self.fail(f"expected columns and rows such as '4x2', each 1 to {MAX_GRID}, got {value!r}.", param, ctx)
        return int(match[1]), int(match[2])


class Device(click.ParamType):
    """A torch device that exists; 'auto' is the first CUDA device where there is one, else the CPU."""

    name = 'device'

    def convert(self, value, param, ctx):
        """Return the torch.device."""
        if isinstance(value, torch.device):
            return value
        if value == 'auto':
            return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        if not re.fullmatch(r'cpu|cuda(:\d{1,2})?', value):
            self.fail(f"expected 'cpu', 'cuda' or 'cuda:N', got {value!r}.", param, ctx)
        device = torch.device(value)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.type == 'cuda' and (device.index or 0) >= count:
            self.fail(f'{value!r} asked for, but {count or "no"} CUDA devices were found; use cpu.', param, ctx)
        return device


def flag(name: str, **kwargs):
    """Return an option that takes a bool as the published scripts do (--x=true), or stands alone (--x)."""
    return option(name, type=bool, is_flag=False, flag_value=True, default=False, show_default=True, **kwargs)


def flame_path():
    """Return the option that says where the files of FLAME are."""
    return option(
        'flame_path', metavar='PATH', type=PathText(), show_default='dataset_preprocessing/ffhq/deca/data',
        help="For clips of FLAME's coefficients: generic_model.pkl with landmark_embedding.npy beside it, or the "
             'folder of both.',
    )  # fmt: skip


def load_generator(path: str, device: torch.device) -> EG3DGenerator:
    """Return the averaged generator of a network file (G where it has no G_ema) on a device, in eval mode.

    Single precision means single precision: TF32, which torch otherwise lets convolutions use, is turned off.
    """
    if device.type == 'cuda' and device.index is not None:
        torch.cuda.set_device(device)  # Where kernels are launched.
    torch.backends.cudnn.allow_tf32 = False
    for key in ('G_ema', 'G'):
        try:
            network = legacy.load_network_pkl(path, only=(key,))[key]
        except legacy.NetworkAbsentError:
            continue
        except legacy.NetworkFileError:
            raise
        except ValueError as error:
            raise click.UsageError(f'--network: {error}') from error
        if isinstance(network, EG3DGenerator):
            return network.to(device)
    raise legacy.NetworkFileError(f'{path}: expected a generator as G_ema or G, found none')


def load_next3d(path: str, device: torch.device) -> Next3DGenerator:
    """Return `load_generator` of a network that draws a head mesh; others are refused."""
    generator = load_generator(path, device)
    if not isinstance(generator, Next3DGenerator):
        raise click.UsageError(f'--network: {path}: expected a Next3D network, found one without a head mesh.')
    return generator


class HeadFiles(NamedTuple):
    """What the mesh options name, read: each None where its option was not given."""

    obj_path: str | None
    mesh: meshes.ObjMesh | None
    landmarks: np.ndarray | None


def read_head(obj_path: str | None, lms_path: str | None) -> HeadFiles:
    """Read mesh and landmarks; before a network is loaded, so that a wrong file costs no download."""
    mesh = None if obj_path is None else meshes.read_obj(obj_path)
    if mesh is not None and mesh.uv_faces is None:
        raise click.UsageError(f'--obj_path: {obj_path}: expected a UV-mapped mesh (vt lines, f v/vt), found no UVs.')
    return HeadFiles(obj_path, mesh, None if lms_path is None else meshes.read_landmarks(lms_path))


def fit_head(generator: EG3DGenerator, head: HeadFiles, device: torch.device) -> torch.Tensor | None:
    """Return the mesh input [1, V + 68, 3] that a generator needs, or None for one that needs none (EG3D)."""
    if not isinstance(generator, Next3DGenerator):
        return None
    for name, content in (('obj_path', head.mesh), ('lms_path', head.landmarks)):
        if content is None:
            raise click.UsageError(f'--{name}: expected a file, got none; this network draws a head mesh.')
    if len(head.mesh.vertices) != generator.num_vertices:
        raise click.UsageError(
            f'--obj_path: {head.obj_path}: expected the {generator.num_vertices} vertices of the mesh that the network '
            f'was trained with, found {len(head.mesh.vertices)}.'
        )
    return torch.from_numpy(meshes.stack_mesh(head.mesh.vertices, head.landmarks)).to(device)


def load_mesh(generator: EG3DGenerator, obj_path: str | None, lms_path: str | None, device: torch.device):
    """Return `fit_head` of `read_head`: the mesh input of two files."""
    return fit_head(generator, read_head(obj_path, lms_path), device)


def read_own_mesh(name: str, obj_path: str, lms_path: str | None = None, head=None) -> np.ndarray:
    """Return vertices and landmarks [V + 68, 3] of a mesh file; name: the option that gave it.

    Landmarks are those of lms_path, else of the file beside the mesh, else the head model's for its topology. head:
    a model that the mesh has to be of; None: any mesh, and the embedded head's landmarks.
    """
    vertices = meshes.read_obj(obj_path).vertices
    beside = pathlib.Path(obj_path).with_name(f'{pathlib.Path(obj_path).stem}{driving.LANDMARK_ENDING}')
    has_landmarks = lms_path is not None or beside.exists()
    if head is None and not has_landmarks:
        head = load_embedded_head()
    if head is not None and len(vertices) != head.num_vertices:
        raise click.UsageError(f'{name}: {obj_path}: expected {head.num_vertices} vertices, found {len(vertices)}.')
    if has_landmarks:
        return meshes.stack_mesh(vertices, meshes.read_landmarks(lms_path or beside))[0]
    return meshes.stack_mesh(vertices, head.landmarks(torch.from_numpy(vertices)[None])[0].numpy())[0]


def open_clip(path: str, retarget: str | None = None, **options) -> driving.Clip:
    """Return the clip of --drive-root or --drive, its motion on the neutral mesh --retarget where that is given.

    options: those of `driving.open_clip`.
    """
    clip = driving.open_clip(path, retarget is not None, **options)
    if retarget is None:
        return clip
    return driving.Retargeted(clip, read_own_mesh('--retarget', retarget, head=clip.coefficients.head))


def fit_clip(generator: Next3DGenerator, clip: driving.Clip, name: str) -> None:
    """Refuse a driving clip whose meshes are not of the network's topology; name: the option that gave it."""
    if clip.num_vertices != generator.num_vertices:
        raise click.UsageError(
            f'{name}: expected meshes of the {generator.num_vertices} vertices that the network was trained with, '
            f'found {clip.num_vertices}.'
        )


def frame_bar(frames: Iterable, count: int, name: str) -> Iterable:
    """Return frames behind a progress bar that tells frames a second, however slow, and the time left."""
    form = '{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]'
    return tqdm(frames, name, count, unit='frame', mininterval=BAR_EVERY_SECONDS, bar_format=form)


def frames_folder(video: pathlib.Path, is_wanted: bool, root: str | None = None) -> pathlib.Path | None:
    """Return the folder for a video's frames as pictures: of its name, beside it or below `root`; None: not wanted."""
    if root is None:
        return video.with_suffix('') if is_wanted else None
    return pathlib.Path(os.path.expanduser(root)) / video.stem


def make_outdir(path: str) -> pathlib.Path:
    """Return the output folder, made with its parents where it does not exist."""
    outdir = pathlib.Path(os.path.expanduser(path))
    try:
        outdir.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise click.UsageError(f'--outdir: {path}: expected a folder, found a file.') from None
    return outdir


@contextlib.contextmanager
def naming(path: str | os.PathLike):
    """Make errors of the block that writes a file name that file, not its temporary one or none; each is one line."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise _one_line(f'{path}: expected a regular file or a new name')
    try:
        yield
    except OSError as error:
        raise _one_line(f'{path}: cannot be written: {error.strerror or error}') from error


def latent(seed: int, z_dim: int) -> torch.Tensor:
    """Return the latent [1, z_dim] that a seed stands for in all scripts of this family."""
    return torch.from_numpy(np.random.RandomState(seed).randn(1, z_dim)).float()
