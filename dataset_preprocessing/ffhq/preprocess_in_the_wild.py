# SPDX-License-Identifier: Apache-2.0
"""From a folder of photographs, a video or a folder of videos to data for training and driving."""

import contextlib
import pathlib
import sys
from typing import NamedTuple

import click
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files, fitting, head_turn, reruns, sources, wild_output  # noqa: E402
from dataset_preprocessing.ffhq.faces_file import faces_text, read_faces, reason_text  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402
from dataset_preprocessing.ffhq.head_choice import head_model_options, load_fitter  # noqa: E402
from dataset_preprocessing.ffhq.landmarker import CONFIDENCE, Landmarker, model_path  # noqa: E402
from dataset_preprocessing.ffhq.points import reference_points  # noqa: E402
from training import data_checks  # noqa: E402
from training.video import VideoError  # noqa: E402

REJECTED_FILE = 'rejected.txt'
SHOWN = 20


class Outcome(NamedTuple):
    """What came of a source: lines to tell, a last one that sums up, and the number of faults; None: it failed."""

    told: list[str]
    summary: str
    num_faults: int | None


class Task(NamedTuple):
    """What to do with a source: how its lines begin, where results and work lie, and the choices of the run."""

    title: str
    out: pathlib.Path
    work: pathlib.Path
    all_faces: bool
    same_person: bool
    overlays: bool


@click.command(cls=cli.Command)
@cli.option('indir', metavar='PATH', type=cli.PathText(), required=True,
            help='Folder of photographs, a photograph, a video, or a folder of videos.')
@cli.option('outdir', metavar='DIR', type=cli.PathText(), help='Where to write. Default: INDIR/processed.')
@cli.flag('all_faces', help='Not only the largest face: the others become NAME-1 and so on. Photographs only.')
@cli.flag('same_person', help='All photographs show one person: one identity. Videos always do.')
@cli.flag('overlays', help='Write OUTDIR_work/overlays/NAME.jpg: the mesh over the picture, found points in red.')
@cli.option('confidence', metavar='FLOAT', type=cli.FiniteFloat(0, 1), default=CONFIDENCE, show_default=True,
            help='Of the detector, from which on it is a face.')
@cli.option('model', metavar='TASK', type=cli.PathText(),
            help='face_landmarker.task. Default: that of requirements-preprocess.txt.')
@head_model_options
@cli.option('device', metavar='DEVICE', type=cli.Device(), default='auto', show_default=True,
            help='Of the fit: cpu, cuda, cuda:N.')
def main(indir, outdir, all_faces, same_person, overlays, confidence, model, head_model, flame_path, device):
    """Write NAME.png (512 pixels), NAME.obj, NAME_kpt2d.txt, dataset.json and coefficients.npz.

    Each video of a folder gets a folder of its own. OUTDIR_work keeps faces, fits, overlays and rejected.txt; with it,
    an interrupted run goes on where it was, and a later one does what is new or changed. The exit status is 1 where a
    video could not be read, or the check of what was written found faults. Drive with --drive_root=OUTDIR; train with
    --data=OUTDIR --rdata=OUTDIR --topology-path=data/head/head_template.obj (of FLAME: your head_template.obj).
    """
    source = pathlib.Path(indir).expanduser()
    if outdir is None:
        out = (source.with_name(f'{source.stem}_processed') if source.is_file() else source / 'processed')
    else:
        out = pathlib.Path(outdir).expanduser()
    if out.resolve() == source.resolve():
        raise click.UsageError(f'--outdir: {outdir}: expected another folder than --indir.')
    work = out.with_name(f'{out.name}_work')
    try:
        found = sources.find_sources(source)
        if all_faces and any(isinstance(item, sources.Video) for item in found.values()):
            raise click.UsageError('--all-faces: expected with photographs only, found a video.')
        fitter = load_fitter(device, head_model, flame_path)
        landmarker = Landmarker(model, confidence, with_turns=True)
        find = click.get_current_context().with_resource(contextlib.closing(landmarker))
        choices = {
            '--all-faces': all_faces, '--same-person': same_person, '--confidence': confidence,
            '--model': reruns.digest(model_path(model).read_bytes()), '--head-model': head_model,
            'reference points': reruns.digest(reference_points(None).tobytes()),
            'turns': reruns.digest(head_turn.TURN_FILE.read_bytes()),
            'head': reruns.digest(fitter.head.template if head_model == 'flame' else fitter.head.mean),
        }  # fmt: skip
        reruns.keep_choices(choices, work)
        for folder in (out, work):
            files.mark_written(folder)
        outcomes = []
        for name, item in found.items():
            title = f'{name}: ' if name else ''
            task = Task(title, out / name, work / name, all_faces, same_person, overlays)
            outcomes.append(_process(item, task, fitter, find, is_only=len(found) == 1))
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error
    _tell(outcomes)


def _process(source, task, fitter, find, is_only):
    """Take one source through all steps; one of several that fails is told, and does not end the others."""
    try:
        return _steps(source, task, fitter, find)
    except (PreprocessError, VideoError) as error:
        if is_only:
            raise
        return Outcome([], f'{task.title}failed: {error}', None)


def _steps(source, task, fitter, find):
    title, out, work = task.title, task.out, task.work
    writer = wild_output.ItemWriter(fitter, out, work / 'overlays' if task.overlays else None)

    def forget(name):
        writer.forget(name)
        (work / 'overlays' / f'{name}.jpg').unlink(missing_ok=True)  # Also where this run draws none.

    def forget_faces(path):
        """Remove what came of a file of faces."""
        count = len(read_faces(path).faces) if task.all_faces else 1
        for name in reruns.item_names(path.stem, count):
            forget(name)
            (work / 'fits' / f'{name}.npz').unlink(missing_ok=True)

    count, told = _detect(source, work / 'faces', find, forget_faces, title)
    faces, origins, rejected = _choose(work / 'faces', task.all_faces)
    crops, outside = fitting.crops_inside(faces, reference_points(None), source.fps) if faces else ({}, {})
    rejected |= source.unread | outside
    files.write_text(''.join(f'{name}: {reason}\n' for name, reason in rejected.items()), work / REJECTED_FILE)
    told += [f'{title}{name}: {reason}' for name, reason in rejected.items()]
    if not crops:
        return Outcome(told, f'{title}0 of {count} pictures used: no face found', 0)
    faces = {name: faces[name] for name in crops}
    with tqdm(total=len(faces), desc=f'{title}fits', delay=2) as bar:
        fits = fitting.fit_all(
            fitter, faces, crops, work / 'fits', source.fps, task.same_person, bar.update, forget
        )  # fmt: skip
    _write(source, writer, origins, crops, fits, title)
    wild_output.write_tables(out, fits, fitter, source.fps, task.same_person or source.fps is not None)
    faults = data_checks.check_driving(out, fitter.num_vertices)
    errors = 100 * np.array([fit.error for fit in fits.values()])
    summary = (f"{title}{len(fits)} faces of {count} pictures, {len(faults)} faults; error median "
               f"{np.median(errors):.2f} %, largest {errors.max():.2f} % of the eyes' distance: {out}")  # fmt: skip
    return Outcome([*told, *(f'{title}{fault}' for fault in faults)], summary, len(faults))


def _detect(source, folder, find, forget, title):
    """Write the faces of each picture that lacks them; return the number of pictures, and what is to be told.

    forget: called with files of faces that go.
    """
    stamps = {}

    def is_wanted(name):
        path, stamps[name] = folder / f'{name}.json', source.stamp(name)
        if reruns.is_current(path, stamps[name]):
            return False
        if path.exists():
            forget(path)
        return True

    bar = tqdm(source.pictures(is_wanted), f'{title}faces', total=len(source) or None, delay=2)
    for name, picture in bar:
        if isinstance(picture, Exception):
            text = reason_text(str(picture), stamps[name])
        else:
            text = faces_text(find(picture), picture.size, stamps[name])
        files.write_text(text, folder / f'{name}.json')
    gone = reruns.drop_gone(folder, set(stamps), forget)
    told = [f'{title}{len(gone)} pictures are gone, their results with them: {", ".join(gone[:SHOWN])}'] if gone else []
    return len(stamps) + len(source.unread), told


def _choose(folder, all_faces):
    """Return the faces by item, the picture that each is of, and reasons of the pictures that give none."""
    faces, origins, rejected = {}, {}, {}
    for name, path in files.list_files(folder, ('.json',)).items():
        found, reason, _ = read_faces(path)
        chosen = found if all_faces else found[:1]
        for item, face in zip(reruns.item_names(name, len(chosen)), chosen, strict=True):
            if item in faces:
                raise PreprocessError(
                    f'{item}: expected faces of names of their own, found it for {origins[item]} and {name}: rename one'
                )
            faces[item], origins[item] = face, name
        if not found:
            rejected[name] = reason or 'no face found'
    return faces, origins, rejected


def _write(source, writer, origins, crops, fits, title):
    """Write the items that lack something."""
    items = {}
    for name in fits:
        if not writer.has(name):
            items.setdefault(origins[name], []).append(name)
    for origin, picture in tqdm(source.pictures(items.__contains__), f'{title}items', total=len(items), delay=2):
        if isinstance(picture, Exception):
            raise picture
        for name in items[origin]:
            writer(name, picture, crops[name], fits[name])


def _tell(outcomes):
    """Print lines and sums; raise where there were faults."""
    lines = [line for outcome in outcomes for line in outcome.told]
    for line in lines[:SHOWN]:
        click.echo(line)
    if len(lines) > SHOWN:
        click.echo(f'... and {len(lines) - SHOWN} more lines')
    for outcome in outcomes:
        click.echo(outcome.summary)
    num_failed = sum(outcome.num_faults is None for outcome in outcomes)
    num_faults = sum(outcome.num_faults or 0 for outcome in outcomes)
    if num_failed:
        raise click.ClickException(f'{num_failed} of {len(outcomes)} videos failed')
    if num_faults:
        raise click.ClickException(f'{num_faults} faults; dataset_preprocessing/check_data.py --driving lists them')


if __name__ == '__main__':
    main()
