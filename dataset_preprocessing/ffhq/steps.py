# SPDX-License-Identifier: Apache-2.0
"""The steps from FFHQ's photographs to a data set: what each reads, writes and does; each leaves out what is there."""

import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import click
import numpy as np
import torch
from PIL import Image, ImageOps

from dataset_preprocessing import balancing, packing
from dataset_preprocessing.ffhq import (
    alignment, assets, cameras_file, deca_fit, deca_net, deep3d_net, expression_labels, ffhq_index, files, gaze,
    landmarker, mirroring,
)  # fmt: skip
from dataset_preprocessing.ffhq.files import MIRROR, PreprocessError
from dataset_preprocessing.ffhq.points import FivePoints, reference_points
from geometry.flame import FlameHead
from training import data_checks
from training.dataset import EXPRESSION_FILE, LABEL_FILE, FolderSource

LIDS = ((42, 45), (36, 39))  # Corners of the person's left and right eye among the 68 landmarks.
EYE_JOINTS = (3, 4)
NUM_EYE_POINTS = 6  # A line for each eye's iris, then its corners.
FAULTS_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a run is asked for; paths None: the published places.

    indir: photographs, None to download them. index: ffhq-dataset-v2.json, None to find landmarks instead. is_aligned:
    the pictures are FFHQ's of 1024 pixels. points: five points of the aligned pictures. mirror: none, geometry, fit.
    gaze: none, irises, or a folder of gaze files. limit: use the first so many.
    """

    outdir: pathlib.Path
    indir: pathlib.Path | None = None
    index: pathlib.Path | None = None
    is_aligned: bool = False
    points: str | None = None
    reference: str | None = None
    network: str | None = None
    deca: str | None = None
    model: str | None = None
    mirror: str = 'geometry'
    gaze: str = 'none'
    mode: str = 'orig'
    packed: pathlib.Path | None = None
    limit: int | None = None
    workers: int = 1
    device: torch.device = torch.device('cpu')

    @property
    def work(self) -> pathlib.Path:
        """Folder of what the steps hand on."""
        return self.outdir / 'work'

    @property
    def images(self) -> pathlib.Path:
        """Folder of the pictures, for --data."""
        return self.outdir / 'images512x512'

    @property
    def meshes(self) -> pathlib.Path:
        """Folder of the meshes, for --rdata."""
        return self.outdir / 'meshes512x512'

    @property
    def landmarks(self) -> pathlib.Path:
        """Folder of the landmarks."""
        return self.outdir / 'lms512x512'

    @property
    def photographs(self) -> pathlib.Path:
        """Folder of the photographs."""
        return self.indir or self.work / 'in-the-wild-images'

    @property
    def gaze_kind(self) -> str:
        """none, irises or files."""
        return self.gaze if self.gaze in ('none', 'irises') else 'files'

    @property
    def landmarks_kind(self) -> str:
        """Where landmarks come from: listed or found."""
        return 'found' if self.index is None else 'listed'

    @property
    def fit_workers(self) -> int:
        """Processes of the steps with networks: a CUDA device serves one."""
        return self.workers if self.device.type == 'cpu' else 1

    def mirrors(self, name: str) -> list[str]:
        """Return an item's name and, where wanted, its mirror image's."""
        return [name] if self.mirror == 'none' else [name, f'{name}{MIRROR}']


# --- items -----------------------------------------------------------------------------------------------------------


def find_items(options: Options) -> dict[str, pathlib.Path]:
    """Return the photographs by their names in the training layout, sorted; PreprocessError for two of a name."""
    folder = options.photographs
    if options.indir is None and not folder.is_dir():
        return {}
    items = {}
    for name, path in files.list_pictures(folder).items():
        target = ffhq_index.item_name(name)
        if target in items:
            raise PreprocessError(f'{path}: expected one picture of a number, found {items[target]}, too')
        items[target] = path
    return dict(sorted(items.items())[: options.limit])


def _with(items, folder, ending):
    """Return the items that have a file in a folder of the steps before."""
    return {name: path for name, path in items.items() if (folder / f'{name}{ending}').exists()}


# --- steps -----------------------------------------------------------------------------------------------------------


def download(options: Options) -> None:
    """Fetch the photographs of the list that are missing; sizes and hashes are checked."""
    index = ffhq_index.read_index(options.index, ffhq_index.WILD)
    cache = options.work / 'downloads'
    chosen = sorted(index)[: options.limit]
    items = {str(n): ffhq_index.photograph_path(options.photographs, n) for n in chosen}

    def work(name, path):
        try:
            ffhq_index.fetch(index[int(name)].remote, path, cache)
        except OSError as error:
            raise PreprocessError(str(error)) from error

    try:
        files.run_step('photographs', items, lambda name: [items[name]], work, options.workers)
    except click.ClickException as error:
        where = f'or get them as {ffhq_index.SOURCE} tells and name their folder by --indir'
        raise click.ClickException(f'{error.message}; run again later to go on, {where}') from error


def find_landmarks(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write points68/<name>.txt, 68 landmarks in each photograph: of FFHQ's list, else of the detector."""
    points, faceless = options.work / 'points68', options.work / 'faceless'

    def outputs(name):
        none = faceless / f'{name}.txt'
        return [none if none.exists() else points / f'{name}.txt']

    missing = [name for name in items if not outputs(name)[0].exists()]
    index = None
    if options.index is not None and missing:
        index = ffhq_index.read_index(options.index, ffhq_index.ALIGNED if options.is_aligned else ffhq_index.WILD)
    elif missing:
        landmarker.model_path(options.model)  # Told before any work.

    def work(name, path):
        if index is not None:
            files.write_points(_listed(index, name, path, options.is_aligned), points / f'{name}.txt')
            return
        found = _detector(options.model)(files.read_picture(path))
        if not found:
            files.write_text('no face found\n', faceless / f'{name}.txt')
            raise files.NoFaceError(f'{path}: no face found')
        files.write_points(found[0].landmarks, points / f'{name}.txt')

    files.run_step('landmarks', items, outputs, work, options.workers)


@functools.lru_cache(maxsize=1)
def _detector(model):
    return landmarker.Landmarker(model)  # Made in the process that uses it.


def _listed(index, name, path, is_aligned):
    """Return the landmarks that FFHQ's list has of a picture; its size must be that of the list."""
    entry = index.get(ffhq_index.number_of(name))
    if entry is None:
        raise PreprocessError(f'{path}: expected a picture of {ffhq_index.INDEX_FILE}, found none of its number')
    try:
        with Image.open(path) as image:
            size = image.size
    except OSError as error:
        raise PreprocessError(f'{path}: expected a picture, found another file') from error
    if size != entry.size:
        hint = 'without' if is_aligned else 'with'
        found = f'found {size[0]}x{size[1]} (an aligned picture is used {hint} --aligned)'
        raise PreprocessError(f'{path}: expected {entry.size[0]}x{entry.size[1]} as the list tells, {found}')
    return entry.landmarks


def cut(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write the training pictures and their mirror images, what the camera network sees, and the landmarks in them."""
    work_folder = options.work
    reference = reference_points(options.reference)
    table = None if options.points is None else FivePoints(options.points)

    def work(name, path):
        """Write the files of an item, the picture last."""
        with files.naming(path):
            image, landmarks = files.read_picture(path), files.read_points(work_folder / 'points68' / f'{name}.txt', 68)
            if not options.is_aligned:
                quad = alignment.ffhq_quad(landmarks)
                image, landmarks = alignment.sample_quad(image, quad), alignment.points_in_quad(landmarks, quad)
            five = alignment.five_of_68(landmarks) if table is None else table(name)
            placement = alignment.place_face(five, image.height, reference)
            crop = alignment.crop_of(placement, image.size)
            picture, seen = alignment.training_picture(image, crop), deep3d_net.network_input(image, five, reference)
            moved = alignment.points_in_training_picture(landmarks, image.size, crop)
        files.write_points(moved, work_folder / 'points512' / f'{name}.txt')
        files.save_png(seen, work_folder / 'camera224' / f'{name}.png')
        if options.mirror != 'none':
            files.save_png(ImageOps.mirror(picture), options.images / f'{name}{MIRROR}.png')
        files.save_png(picture, options.images / f'{name}.png')

    items = _with(items, work_folder / 'points68', '.txt')
    files.run_step('crops', items, crop_outputs(options), work, options.workers)


def crop_outputs(options: Options) -> Callable[[str], list[pathlib.Path]]:
    """Return the files that `cut` makes of an item."""
    return lambda name: [
        options.work / 'points512' / f'{name}.txt', options.work / 'camera224' / f'{name}.png',
        *(options.images / f'{each}.png' for each in options.mirrors(name)),
    ]  # fmt: skip


def fit_cameras(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write cameras/<name>.npz: Deep3DFaceRecon's coefficients."""
    net = None

    def work(name, path):
        seen = files.read_picture(options.work / 'camera224' / f'{name}.png')
        values = deep3d_net.coefficients(net, seen)
        cameras_file.write_coefficients(values, options.work / 'cameras' / f'{name}.npz')

    items = _with(items, options.work / 'camera224', '.png')
    if any(not path.exists() for name in items for path in camera_outputs(options)(name)):
        net = deep3d_net.load_network(assets.locate(deep3d=options.network)['deep3d'], options.device)
    files.run_step('cameras', items, camera_outputs(options), work, options.fit_workers)


def camera_outputs(options: Options) -> Callable[[str], list[pathlib.Path]]:
    """Return the file that `fit_cameras` makes of an item."""
    return lambda name: [options.work / 'cameras' / f'{name}.npz']


def write_labels(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write dataset.json of all cameras, mirror images after their pictures, and work/cameras.json."""
    items = _with(items, options.work / 'cameras', '.npz')
    poses = {f'{name}.png': cameras_file.read_pose(options.work / 'cameras' / f'{name}.npz') for name in items}
    text = cameras_file.labels_text(poses, options.mode, options.mirror != 'none')
    _replace(cameras_file.cameras_text(poses), options.work / 'cameras.json')
    _replace(text, options.images / LABEL_FILE)
    click.echo(f'labels: {len(poses)} cameras')


def _replace(text, path):
    """Write a file where it is not the same already."""
    if not path.exists() or path.read_text(encoding='utf-8') != text:
        files.write_text(text, path)


def find_irises(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write irises/<name>.txt, iris and corners of the person's left, then right eye, in the training picture."""
    folder = options.work / 'irises'

    def work(name, path):
        picture = options.images / f'{name}.png'
        found = _detector(options.model)(files.read_picture(picture))
        if not found:
            files.write_text('', folder / f'{name}.txt')
            raise files.NoFaceError(f'{picture}: no face found, its eyes look ahead')
        centres = found[0].irises[::-1, 0]  # The picture's right is the person's left.
        points = [[centre, *found[0].landmarks[list(lids)]] for centre, lids in zip(centres, LIDS, strict=True)]
        files.write_points(np.array(points).reshape(NUM_EYE_POINTS, 2), folder / f'{name}.txt')

    items = {name: path for name, path in items.items() if (options.images / f'{name}.png').exists()}
    if any(not (folder / f'{name}.txt').exists() for name in items):
        landmarker.model_path(options.model)
    files.run_step('irises', items, lambda name: [folder / f'{name}.txt'], work, options.workers)


def fit_meshes(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write meshes, landmarks and codes of DECA; with mirror 'fit' those of the mirror images, too."""
    targets = {}
    for name, path in _with(items, options.work / 'points512', '.txt').items():
        targets |= dict.fromkeys(options.mirrors(name) if options.mirror == 'fit' else [name], path)
    outputs, parts = mesh_outputs(options), None

    def work(name, path):
        original, is_mirror = name.removesuffix(MIRROR), name.endswith(MIRROR) and name not in items
        points = files.read_points(options.work / 'points512' / f'{original}.txt', 68)
        points = mirroring.mirror_points(points, alignment.OUTPUT_SIDE) if is_mirror else points
        with files.naming(path):
            picture = files.read_picture(options.images / f'{name}.png')
            seen = deca_net.encoder_input(picture, deca_net.square_around(points))
            eyes = _eyes(options, parts[1], original, is_mirror)
            deca_fit.write_fit(parts[0], parts[1], seen.to(options.device), eyes, outputs(name))

    if any(not path.exists() for name in targets for path in outputs(name)):
        parts = _deca(options.deca, options.device)
    files.run_step('meshes', targets, outputs, work, options.fit_workers)


@functools.lru_cache(maxsize=1)
def _deca(folder, device):
    return deca_fit.load_files(folder, device)  # For several steps.


def mesh_outputs(options: Options) -> Callable[[str], list[pathlib.Path]]:
    """Return the files that `fit_meshes` makes of an item."""
    return lambda name: [
        options.meshes / f'{name}.obj', options.landmarks / f'{name}.txt', options.work / 'codes' / f'{name}.npz'
    ]  # fmt: skip


def _eyes(options, head, name, is_mirror):
    """Return what `write_fit` takes as eyes: None, an eye pose [6], or a function of the codes."""
    if options.gaze_kind == 'none':
        return None
    if options.gaze_kind == 'files':
        angles = deca_fit.read_gaze(pathlib.Path(options.gaze), name)
        return deca_net.flame_eye_pose(mirror_gaze(angles) if is_mirror else angles)
    path = options.work / 'irises' / f'{name}.txt'
    if not path.read_text().strip():
        return None
    points = files.read_points(path, NUM_EYE_POINTS).reshape(2, 3, 2)
    pose = cameras_file.read_pose(options.work / 'cameras' / f'{name}.npz')
    return lambda codes: _eyes_of_irises(head, codes, points, pose[:3, :3], is_mirror)


def mirror_gaze(angles: np.ndarray) -> np.ndarray:
    """Return the gaze angles [4] of the mirror image: eyes change places, yaws turn round."""
    return angles[[2, 3, 0, 1]] * np.array([1, -1, 1, -1], dtype=angles.dtype)


@torch.no_grad()
def _eyes_of_irises(head: FlameHead, codes, points, rotation, is_mirror):
    """Return the eye pose [6] float32 of codes [1, 236]; points [2, 3, 2] are the picture's, never mirrored."""
    parts = deca_net.split_codes(codes)
    poses = {'jaw_pose': parts['pose'][:, 3:]}
    landmarks = deca_net.decode(head, codes).landmarks[0].cpu().numpy().astype(np.float64)
    joints = head.joints(parts['shape'], parts['exp'], **poses).positions[0, list(EYE_JOINTS)].cpu().numpy()
    lids = landmarks[np.array(LIDS)]
    if is_mirror:  # The points are of the picture: so is the head, turned back.
        joints, lids = joints[::-1] * [-1, 1, 1], lids[::-1, ::-1] * [-1, 1, 1]
    try:
        angles = gaze.gaze_angles(points[:, 0], points[:, 1:], joints, lids, rotation)
    except ValueError as error:
        raise PreprocessError(f'eyes: {error}') from error
    return deca_net.flame_eye_pose(mirror_gaze(angles) if is_mirror else angles).astype(np.float32)


def mirror_meshes(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write the mirror images of meshes and landmarks by the head's symmetry."""
    outputs = mesh_outputs(options)

    def targets(name):
        return outputs(f'{name}{MIRROR}')[:2]

    items, head = _with(items, options.meshes, '.obj'), None
    if any(not path.exists() for name in items for path in targets(name)):
        head = _deca(options.deca, torch.device('cpu'))[1]
        mirroring.vertex_partners(head)
    work = lambda name, path: mirroring.mirror_files(head, outputs(name)[:2], targets(name))  # noqa: E731
    files.run_step('mirror images', items, targets, work, options.workers)


def write_expressions(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write dataset_exp.json of DECA's codes; mirror images take theirs by least squares, or from their own fit."""
    names = _with(items, options.work / 'codes', '.npz')
    matrix = np.eye(deca_net.CODES['exp'])
    if options.mirror == 'geometry':
        matrix, kept = mirroring.expression_mirror(_deca(options.deca, torch.device('cpu'))[1])
        click.echo(f'expressions: codes of mirror images keep {100 * kept:.1f} % of the motion')
    codes = {}
    for name in names:
        code = expression_labels.read_code(options.work / 'codes' / f'{name}.npz')
        codes[f'{name}.png'] = code
        if options.mirror == 'geometry':
            codes[f'{name}{MIRROR}.png'] = matrix @ code
        elif options.mirror == 'fit':
            path = options.work / 'codes' / f'{name}{MIRROR}.npz'
            codes[f'{name}{MIRROR}.png'] = expression_labels.read_code(path)
    _replace(expression_labels.labels_text(codes), options.images / EXPRESSION_FILE)
    click.echo(f'expressions: {len(codes)} pictures')


def check(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Check the data set as check_data.py does; raise where there are faults."""
    faults = []
    source = FolderSource(
        options.images, options.meshes, True, lambda *fault: faults.append(data_checks.Fault(*fault))
    )  # fmt: skip
    faults += data_checks.check_labels(source) + data_checks.check_items(source, workers=options.workers, progress=True)
    for fault in faults[:FAULTS_SHOWN]:
        click.echo(str(fault))
    click.echo(f'check: {source.num_pictures} pictures, {len(faults)} faults')
    if faults:
        raise click.ClickException(f'check: {len(faults)} faults; dataset_preprocessing/check_data.py lists them all')


def rebalance(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Let pictures of rare poses count several times; print the table."""
    names, labels = balancing.read_poses(str(options.images))
    result = balancing.balance(labels)
    click.echo(result.table())
    balancing.write_repeats(str(options.images), names, result.repeats)


def pack(options: Options, items: dict[str, pathlib.Path]) -> None:
    """Write the packed data set, with expressions, where it is not there yet."""
    if options.packed.exists():
        click.echo(f'pack: {options.packed} is there already')
        return
    source = FolderSource(options.images, options.meshes, True)
    options.packed.parent.mkdir(parents=True, exist_ok=True)
    packing.pack(source, options.packed, options.workers)
    click.echo(f'pack: {len(source.names)} items: {options.packed}')
