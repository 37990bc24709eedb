# SPDX-License-Identifier: Apache-2.0
"""Check a data set, or a folder of driving frames, and name file and number of each fault."""

import os
import pathlib
import sys
import zipfile

import click
import numpy as np
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing import report_page  # noqa: E402
from dnnlib import atomic_write  # noqa: E402
from geometry.meshes import NUM_LANDMARKS, MeshFileError, read_obj  # noqa: E402
from training import data_checks  # noqa: E402
from training.dataset import DatasetError, FolderSource, PackedSource, is_packed  # noqa: E402
from training.driving import open_clip  # noqa: E402
from training.files import FileSet  # noqa: E402

RADIUS, RADIUS_TOLERANCE = 2.7, 0.1
FAULTS_SHOWN = 100


@click.command(cls=cli.Command)
@cli.option('data', metavar='DIR|ZIP', type=cli.PathText(), help='Pictures with dataset.json, or a packed folder.')
@cli.option('rdata', metavar='DIR|ZIP', type=cli.PathText(), help='Meshes; landmarks beside them. Not when packed.')
@cli.option('driving', metavar='DIR', type=cli.PathText(), help='Instead of --data: frames, meshes and labels.')
@cli.option('points2d', metavar='DIR', type=cli.PathText(), help='2-D landmarks: 68 lines of x y for each picture.')
@cli.flag('gen_exp_cond', help='Check the expressions of dataset_exp.json, too.')
@cli.option('topology_path', metavar='OBJ', type=cli.PathText(), help='Mesh of the right number of vertices.')
@cli.option('radius', metavar='FLOAT', type=cli.FiniteFloat(0, 1e6), default=RADIUS, show_default=True,
            help=f"Distance of the cameras from the origin, within {RADIUS_TOLERANCE}.")
@cli.option('workers', type=click.IntRange(1, 256), default=os.cpu_count() or 1, show_default='all', help='Processes.')
@cli.flag('quick', help='Check labels and names only: reads no picture and no mesh.')
@cli.option('limit', type=click.IntRange(0), default=FAULTS_SHOWN, show_default=True,
            help='Faults to print; further ones are counted. 0: all.')
@cli.option('report', metavar='HTML', type=cli.PathText(),
            help='Write a page of meshes over pictures, errors, poses, faults and rejected pictures. Not when packed.')
def main(data, rdata, driving, points2d, gen_exp_cond, topology_path, radius, workers, quick, limit, report):
    """Check labels, pictures, meshes and landmarks; print a line for each fault and one that sums up.

    The exit status is 1 where there are faults. Without --topology_path all meshes must have as many vertices as the
    first. --points2d: files <picture's name>.txt, in pixels; landmarks projected by the label must be near to them.
    """
    if report is not None and data is not None and is_packed(data):
        raise click.UsageError('--report: expected none with a packed folder.')
    _refuse_misfits(data, rdata, driving, {'points2d': points2d, 'gen_exp_cond': gen_exp_cond, 'quick': quick})
    num_vertices = None if topology_path is None else len(read_obj(topology_path).vertices)
    position = (radius - RADIUS_TOLERANCE, radius + RADIUS_TOLERANCE)
    try:
        if driving is not None:
            count = len(data_checks.driving_frames(FileSet(driving)))
            faults = data_checks.check_driving(driving, num_vertices, workers, True, position)
        else:
            source, count, faults = _open(data, rdata, gen_exp_cond)
            faults += data_checks.check_names(source) + data_checks.check_labels(source, position)
            if not quick:
                faults += _check_content(source, num_vertices, workers, points2d)
        if report is not None:
            _write_page(report, driving or data, rdata, driving is not None, faults)
    except (DatasetError, MeshFileError) as error:
        raise click.ClickException(' '.join(str(error).split())) from error
    _report(faults, count, limit)


def _write_page(report, folder, rdata, is_driving, faults):
    """Write the page of a set whose faults are known; items that cannot be read are not in it."""
    source = open_clip(folder, skip_missing=True) if is_driving else FolderSource(folder, rdata, False, _ignore)
    if not source.names:
        raise DatasetError(f'{folder}: expected items without faults for --report, found none')
    folder = pathlib.Path(folder).expanduser()
    errors = _errors(folder / 'coefficients.npz')
    names = [f'{name}.png' if is_driving else name for name in source.names]
    meshes = FileSet(folder if is_driving else rdata)
    faces = read_obj(meshes.path / f'{os.path.splitext(names[0])[0]}.obj').faces if not meshes.is_zip else None
    if faces is None:
        raise DatasetError(f'{rdata}: expected a folder of meshes for --report, found an archive')

    def read(index):
        pixels = source.picture(index) if is_driving else source.image(index).transpose(1, 2, 0)
        mesh = source.mesh(index)[:-NUM_LANDMARKS]
        return report_page.ReportItem(names[index], Image.fromarray(pixels), mesh, source.labels[index])

    rejected = report_page.read_rejected(folder.with_name(f'{folder.name}_work') / 'rejected.txt')
    text = report_page.page(str(folder), names, source.labels, errors, read, faces, faults, rejected)
    with atomic_write(report, 'w') as file:
        file.write(text)
    click.echo(f'Report: {report}')


def _ignore(*_fault):
    """Leave an item out: its fault is told already."""


def _errors(path):
    """Return the errors of a coefficients.npz by picture; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if 'error' not in arrays:
                return {}
            return dict(zip(arrays['names'].tolist(), arrays['error'].tolist(), strict=True))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f'{path}: expected coefficients with names and error, found others ({error})') from error


def _refuse_misfits(data, rdata, driving, others):
    """Raise UsageError for options that do not go together."""
    if (data is None) == (driving is None):
        raise click.UsageError('expected either --data or --driving.')
    if driving is not None:
        for name, value in {'rdata': rdata, **others}.items():
            if value:
                raise click.UsageError(f'--{name}: expected none with --driving.')
        return
    packed = is_packed(data)
    if packed and (rdata is not None or others['gen_exp_cond']):
        name = 'gen_exp_cond' if rdata is None else 'rdata'
        raise click.UsageError(f'--{name}: expected none with a packed folder, which has its meshes and labels.')
    if not packed and rdata is None:
        raise click.UsageError(f'--rdata: expected the meshes of {data}, got none.')
    if others['quick'] and others['points2d']:
        raise click.UsageError('--points2d: expected none with --quick, which reads no landmarks.')


def _open(data, rdata, gen_exp_cond):
    """Return (source, number of its pictures, faults of names)."""
    if is_packed(data):
        source = PackedSource(data)
        return source, len(source.names), []
    faults = []
    source = FolderSource(data, rdata, gen_exp_cond, lambda *fault: faults.append(data_checks.Fault(*fault)))
    for note in data_checks.notes(source):
        click.echo(f'Note: {note}')
    return source, source.num_pictures, faults


def _check_content(source, num_vertices, workers, points2d):
    faults = data_checks.check_hashes(source, progress=True) if isinstance(source, PackedSource) else []
    return faults + data_checks.check_items(source, num_vertices, None, workers, True, points2d)


def _report(faults, count, limit):
    """Print the faults and the sum; exit with status 1 where there are faults."""
    shown = faults[:limit] if limit else faults
    for fault in shown:
        click.echo(str(fault))
    if len(faults) > len(shown):
        click.echo(f'... and {len(faults) - len(shown)} more (--limit=0 prints all)')
    items = f'{count} item{"" if count == 1 else "s"}'
    if not faults:
        click.echo(f'{items}, no fault')
        return
    click.echo(f'{len(faults)} fault{"" if len(faults) == 1 else "s"} in {items}')
    sys.exit(1)


if __name__ == '__main__':
    main()
