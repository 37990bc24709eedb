# SPDX-License-Identifier: Apache-2.0
"""From a folder of photographs, a video or a folder of videos to data for training and driving."""

import contextlib
import pathlib
import sys

import click
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import files, fitting, sources, wild_output  # noqa: E402
from dataset_preprocessing.ffhq.faces_file import faces_text, read_faces, reason_text  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402
from dataset_preprocessing.ffhq.head_choice import head_model_options, load_fitter  # noqa: E402
from dataset_preprocessing.ffhq.landmarker import CONFIDENCE, Landmarker  # noqa: E402
from dataset_preprocessing.ffhq.points import reference_points  # noqa: E402
from training import data_checks  # noqa: E402

REJECTED_FILE = 'rejected.txt'
SHOWN = 20
SAME_IDENTITY = 1e-3  # Largest difference of codes, whose standard deviation is 1, that rounding may make.


@click.command(cls=cli.Command)
@cli.option('indir', metavar='PATH', type=cli.PathText(), required=True,
            help='Folder of photographs, a video, or a folder of videos.')
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
    an interrupted run goes on where it was. Drive with --drive_root=OUTDIR; train with --data=OUTDIR --rdata=OUTDIR
    --topology-path=data/head/head_template.obj (of FLAME: your head_template.obj).
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
        if all_faces and any(item.fps is not None for item in found.values()):
            raise click.UsageError('--all-faces: expected with photographs only, found a video.')
        fitter = load_fitter(device, head_model, flame_path)
        find = click.get_current_context().with_resource(contextlib.closing(Landmarker(model, confidence)))
        for folder in (out, work):
            files.mark_written(folder)
        lines = []
        for name, item in found.items():
            lines += _process(item, name, out / name, work / name, find, fitter, all_faces, same_person, overlays)
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error
    _tell(lines)


def _process(source, title, out, work, find, fitter, all_faces, same_person, overlays):
    """Take one source through all steps; return what is to be told."""
    title = f'{title}: ' if title else ''
    count = _detect(source, work / 'faces', find, title)
    faces, origins, rejected = _choose(work / 'faces', all_faces)
    files.write_text(''.join(f'{name}: {reason}\n' for name, reason in rejected.items()), work / REJECTED_FILE)
    told = [f'{title}{name}: {reason}' for name, reason in rejected.items()]
    if not faces:
        return [*told, f'{title}0 of {count} pictures used: no face found']
    crops, outside = _crops(faces, source.fps)
    told += [f'{title}{name}: {reason}' for name, reason in outside.items()]
    faces = {name: faces[name] for name in crops}
    with tqdm(total=len(faces), desc=f'{title}fits', delay=2) as bar:
        fitting.fit_all(fitter, faces, crops, work / 'fits', source.fps, same_person, bar.update)
    fits = {name: fitter.read(work / 'fits' / f'{name}.npz') for name in faces}
    is_one_person = same_person or source.fps is not None
    if is_one_person:
        _check_identity(fits, work / 'fits')
    writer = wild_output.ItemWriter(fitter, out, work / 'overlays' if overlays else None)
    _write(source, writer, origins, crops, fits, title)
    wild_output.write_tables(out, fits, fitter, source.fps, is_one_person)
    faults = data_checks.check_driving(out, fitter.num_vertices)
    errors = 100 * np.array([fit.error for fit in fits.values()])
    return [
        *told, *map(str, faults),
        f"{title}{len(fits)} faces of {count} pictures, {len(faults)} faults; error median {np.median(errors):.2f} %, "
        f"largest {errors.max():.2f} % of the eyes' distance: {out}",
    ]  # fmt: skip


def _detect(source, folder, find, title):
    """Write the faces of each picture that lacks them or could not be read; return the number of pictures."""
    count = 0

    def is_wanted(name):
        nonlocal count
        count += 1
        path = folder / f'{name}.json'
        return not path.exists() or read_faces(path)[1] is not None  # What could not be read may have been mended.

    bar = tqdm(source.pictures(is_wanted), f'{title}faces', total=len(source) or None, delay=2)
    for name, picture in bar:
        text = reason_text(str(picture)) if isinstance(picture, Exception) else faces_text(find(picture), picture.size)
        files.write_text(text, folder / f'{name}.json')
    return count


def _choose(folder, all_faces):
    """Return the faces by item, the picture that each is of, and reasons of the pictures that give none."""
    faces, origins, rejected = {}, {}, {}
    for name, path in files.list_files(folder, ('.json',)).items():
        found, reason = read_faces(path)
        for number, face in enumerate(found if all_faces else found[:1]):
            item = f'{name}-{number}' if number else name
            if item in faces:
                raise PreprocessError(f'{item}: expected names of their own, found two faces of this name')
            faces[item], origins[item] = face, name
        if not found:
            rejected[name] = reason or 'no face found'
    return faces, origins, rejected


def _crops(faces, fps):
    """Return the crop of each face, and reasons of those that have none."""
    reference = reference_points(None)
    if fps is not None:
        return dict(zip(faces, fitting.crops_of(list(faces.values()), reference, fps), strict=True)), {}
    crops, outside = {}, {}
    for name, face in faces.items():
        try:
            crops[name] = fitting.crops_of([face], reference)[0]
        except PreprocessError as error:
            outside[name] = str(error)
    return crops, outside


def _check_identity(fits, folder):
    """Raise PreprocessError unless all fits have one identity: they may be of a run of other options or pictures."""
    first = next(iter(fits.values())).identity
    for name, fit in fits.items():
        if np.abs(fit.identity - first).max() > SAME_IDENTITY:
            raise PreprocessError(
                f'{folder / name}.npz: expected the identity of the other fits, found another, of a run without '
                '--same-person or of fewer pictures: write elsewhere'
            )


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


def _tell(lines):
    for line in lines[:-1][:SHOWN]:
        click.echo(line)
    if len(lines) - 1 > SHOWN:
        click.echo(f'... and {len(lines) - 1 - SHOWN} more lines')
    click.echo(lines[-1])


if __name__ == '__main__':
    main()
