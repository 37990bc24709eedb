# SPDX-License-Identifier: Apache-2.0
"""Run DECA's encoder and FLAME, from the user's files, on cropped pictures: a mesh and a landmark file each."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import deca_net, files  # noqa: E402
from dataset_preprocessing.ffhq.deca_fit import gather_codes, load_files, read_gaze, write_fit  # noqa: E402
from dataset_preprocessing.ffhq.files import PreprocessError  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('images', metavar='DIR', type=cli.PathText(), required=True, help='Pictures of crop.py.')
@cli.option('points68', metavar='DIR', type=cli.PathText(), required=True, help='Their landmarks (--out-points68).')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Where to write <name>.obj.')
@cli.option('lms', metavar='DIR', type=cli.PathText(),
            help='Where to write landmarks as <name>.txt, for training. Default: <name>_kpt2d.txt beside the mesh.')
@cli.option('codes', metavar='DIR', type=cli.PathText(), help="Where to write DECA's codes as <name>.npz, too.")
@cli.flag('coefficients', help='With --codes: gather them in coefficients.npz beside the meshes, for driving clips '
          'and their --retarget.')
@cli.option('gaze', metavar='DIR', type=cli.PathText(),
            help='<name>.txt or .npy ending in left pitch, left yaw, right pitch, right yaw; radians. Default: ahead.')
@cli.option('deca', metavar='DIR', type=cli.PathText(), help='Folder of the files of DECA and FLAME. Default: the '
            'published place, deca/data.')
@cli.option('device', metavar='DEVICE', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N.')
def main(images, points68, out, lms, codes, coefficients, gaze, deca, device):
    """Write mesh and landmarks, metres and head upright, for each picture; those that are there already are kept."""
    out = pathlib.Path(out)
    if coefficients and codes is None:
        raise click.UsageError('--coefficients: expected --codes with it, got none.')
    codes, gaze = (None if path is None else pathlib.Path(path) for path in (codes, gaze))
    try:
        items = files.list_pictures(pathlib.Path(images))
        encoder, head = load_files(deca, device)

        def outputs(name):
            beside = out / f'{name}_kpt2d.txt' if lms is None else pathlib.Path(lms) / f'{name}.txt'
            return [out / f'{name}.obj', beside] + ([] if codes is None else [codes / f'{name}.npz'])

        def work(name, path):
            eyes = None if gaze is None else deca_net.flame_eye_pose(read_gaze(gaze, name))
            if not (pathlib.Path(points68) / f'{name}.txt').exists():
                raise files.NoFaceError(f'{name}: no landmarks')
            points = files.read_points(pathlib.Path(points68) / f'{name}.txt', 68)
            with files.naming(path):
                seen = deca_net.encoder_input(files.read_picture(path), deca_net.square_around(points))
            write_fit(encoder, head, seen.to(device), eyes, outputs(name))

        files.run_step('meshes', items, outputs, work)
        if coefficients:
            gather_codes(items, codes, out)
    except PreprocessError as error:
        raise click.ClickException(str(error)) from error


if __name__ == '__main__':
    main()
