# SPDX-License-Identifier: Apache-2.0
"""The order of the steps from FFHQ to a data set, what each needs and costs, and the run of those asked for."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dataset_preprocessing.ffhq import assets, ffhq_index, files, steps
from dataset_preprocessing.ffhq.files import MIRROR, PreprocessError
from dataset_preprocessing.ffhq.steps import Options
from training.dataset import EXPRESSION_FILE, LABEL_FILE, REPEATS_FILE

LOCK_FILE, OPTIONS_FILE, LEFTOVERS = 'lock', 'options.json', '.tmp-*'
# What may not change between the runs that make one data set.
KEPT = ('is_aligned', 'mirror', 'gaze_kind', 'mode', 'landmarks_kind')
# Of one picture on one core; docs/ffhq.md tells of which machine and pictures.
SECONDS = {
    'detector': 0.22, 'list': 0.001, 'crops': 9.0, 'aligned': 0.37, 'cameras': 0.18, 'labels': 0.001, 'meshes': 0.28,
    'mirror': 0.16, 'expressions': 0.001, 'check': 0.024, 'pack': 0.03,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step. outputs: files of an item, None for a step that makes tables or none. kilobytes, seconds: of an item on
    one core, of the machine that docs/ffhq.md names; seconds None: not measured.
    """

    name: str
    run: Callable
    reads: str
    writes: str
    outputs: Callable[[str], list[pathlib.Path]] | None = None
    kilobytes: float = 0.0
    seconds: float | None = None


def plan(options: Options, with_rebalance: bool = False) -> list[Step]:
    """Return the steps of a run in their order; those that its options leave out are not among them."""
    work, mesh_files = options.work, steps.mesh_outputs(options)
    factor = 1 if options.mirror == 'none' else 2
    is_fit = options.mirror == 'fit'
    found = 'the detector' if options.index is None else options.index.name
    return [
        *([] if options.indir else [Step(
            name='photographs', run=lambda o, _: steps.download(o), reads='Google Drive',
            writes=str(options.photographs),
            kilobytes=1e6 * ffhq_index.IN_THE_WILD_GB / ffhq_index.NUM_PICTURES,
        )]),
        Step(name='landmarks', run=steps.find_landmarks, reads=f'{options.photographs}, {found}',
             writes=f'{work}/points68', outputs=lambda name: [work / 'points68' / f'{name}.txt'], kilobytes=1.1,
             seconds=SECONDS['detector' if options.index is None else 'list']),
        Step(name='crops', run=steps.cut, reads=f'{options.photographs}, {work}/points68',
             writes=f'{options.images}, {work}/camera224, {work}/points512', outputs=steps.crop_outputs(options),
             kilobytes=80 + 400 * factor, seconds=SECONDS['aligned' if options.is_aligned else 'crops']),
        Step(name='cameras', run=steps.fit_cameras, reads=f'{work}/camera224, {assets.ASSETS["deep3d"].path.name}',
             writes=f'{work}/cameras', outputs=steps.camera_outputs(options), kilobytes=2.4,
             seconds=SECONDS['cameras']),
        Step(name='labels', run=steps.write_labels, reads=f'{work}/cameras', writes=f'{options.images}/{LABEL_FILE}',
             kilobytes=0.6 * factor, seconds=SECONDS['labels']),
        *([] if options.gaze != 'irises' else [Step(
            name='irises', run=steps.find_irises, reads=str(options.images), writes=f'{work}/irises',
            outputs=lambda name: [work / 'irises' / f'{name}.txt'], kilobytes=0.1, seconds=SECONDS['detector'],
        )]),
        Step(name='meshes', run=steps.fit_meshes, reads=f'{options.images}, {work}/points512, deca/data',
             writes=f'{options.meshes}, {options.landmarks}, {work}/codes', kilobytes=860 * (factor if is_fit else 1),
             outputs=lambda name: [p for n in (options.mirrors(name) if is_fit else [name]) for p in mesh_files(n)],
             seconds=SECONDS['meshes'] * (factor if is_fit else 1)),
        *([] if options.mirror != 'geometry' else [Step(
            name='mirror', run=steps.mirror_meshes, reads=f'{options.meshes}, {options.landmarks}',
            writes=f'{options.meshes}, {options.landmarks}', kilobytes=850, seconds=SECONDS['mirror'],
            outputs=lambda name: mesh_files(f'{name}{MIRROR}')[:2],
        )]),
        Step(name='expressions', run=steps.write_expressions, reads=f'{work}/codes',
             writes=f'{options.images}/{EXPRESSION_FILE}', kilobytes=1.1 * factor, seconds=SECONDS['expressions']),
        Step(name='check', run=steps.check, reads=str(options.outdir), writes='nothing',
             seconds=SECONDS['check'] * factor),
        *([] if not with_rebalance else [Step(
            name='rebalance', run=steps.rebalance, reads=f'{options.images}/{LABEL_FILE}',
            writes=f'{options.images}/{REPEATS_FILE}', kilobytes=0.01, seconds=0.0,
        )]),
        *([] if options.packed is None else [Step(
            name='pack', run=steps.pack, reads=str(options.outdir), writes=str(options.packed),
            kilobytes=460 * factor, seconds=SECONDS['pack'] * factor,
        )]),
    ]  # fmt: skip


def run(options: Options, chosen: list[Step]) -> None:
    """Run steps one after the other; raise PreprocessError where the folder was begun with other options, or is used.

    What killed runs left half-written is removed first.
    """
    options.work.mkdir(parents=True, exist_ok=True)
    with _alone(options.work):
        _expect_options(options)
        for path in options.outdir.rglob(LEFTOVERS):
            path.unlink(missing_ok=True)
        for step in chosen:
            items = steps.find_items(options)
            if not items and step.name != 'photographs':
                raise PreprocessError(f'{options.photographs}: expected photographs, found none; the step '
                                      'photographs downloads them, --indir names your own')  # fmt: skip
            step.run(options, items)


@contextlib.contextmanager
def _alone(folder) -> Iterator[None]:
    """Hold a folder against other runs."""
    with open(folder / LOCK_FILE, 'w') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise PreprocessError(f'{folder}: another run works in it; wait for its end, or stop it') from None
        yield


def _expect_options(options):
    """Note the options that may not change, or refuse others than those noted."""
    path = options.work / OPTIONS_FILE
    own = {name: str(getattr(options, name)) for name in KEPT}
    if not path.exists():
        files.write_text(json.dumps(own), path)
        return
    try:
        noted = json.loads(path.read_text(encoding='utf-8'))
        other = next((name for name in KEPT if noted[name] != own[name]), None)
    except (ValueError, TypeError, LookupError) as error:
        raise PreprocessError(f'{path}: expected the options of a run, found others') from error
    if other is not None:
        found = f'{other} {own[other]}, begun with {noted[other]}'
        raise PreprocessError(f'{options.outdir}: expected the options that it was begun with, found {found}; '
                              'use another --outdir')  # fmt: skip


def describe(options: Options, chosen: list[Step]) -> Iterator[str]:
    """Yield the lines of a dry run: each step's inputs, outputs, what is done, sizes and times."""
    items = steps.find_items(options)
    total = len(items) or min(ffhq_index.NUM_PICTURES, options.limit or ffhq_index.NUM_PICTURES)
    yield f'{total} pictures{"" if items else " (none is here yet)"}, {options.workers} processes, {options.device}'
    for step in chosen:
        todo = total
        if step.outputs is not None:
            todo -= sum(all(path.exists() for path in step.outputs(name)) for name in items)
        workers = options.fit_workers if step.name in ('cameras', 'meshes') else options.workers
        cost = f'{_size(step.kilobytes * todo)}, {_time(step, todo, workers, options)}'
        yield f'{step.name}: {todo} of {total} to do, {cost}'
        yield f'    from {step.reads}'
        yield f'    to   {step.writes}'
    yield from _missing(options, chosen)


def _size(kilobytes):
    return f'{kilobytes / 1e6:.1f} GB' if kilobytes >= 1e5 else f'{kilobytes / 1e3:.1f} MB'


def _time(step, todo, workers, options):
    is_network = step.name in ('cameras', 'meshes')
    if step.seconds is None or (is_network and options.device.type != 'cpu'):
        return 'time not measured'
    seconds = step.seconds * todo / (1 if step.name in ONE_PROCESS else workers)
    return f'about {seconds / 3600:.1f} h' if seconds >= 3600 else f'about {seconds / 60:.1f} min'


ONE_PROCESS = ('labels', 'expressions', 'rebalance')  # Steps that use one process whatever --workers.


def _missing(options, chosen):
    """Yield a line for each file that users have to get and that the chosen steps need."""
    names = {step.name for step in chosen}
    wanted = {'deep3d': options.network} if 'cameras' in names else {}
    if names & {'meshes', 'mirror', 'expressions'}:
        for key in ('deca', 'flame', 'flame_landmarks', 'flame_template'):
            file = assets.ASSETS[key].path.name
            wanted[key] = options.deca and str(pathlib.Path(options.deca) / file)
    for key, given in wanted.items():
        path = assets.ASSETS[key].path if given is None else pathlib.Path(given)
        if not path.is_file():
            yield f'missing: {path}: {assets.ASSETS[key].source}'
