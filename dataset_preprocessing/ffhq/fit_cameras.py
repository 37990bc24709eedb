# SPDX-License-Identifier: Apache-2.0
"""Run Deep3DFaceRecon's network, from the user's checkpoint, on photographs: 257 coefficients each, for labels.py."""

import pathlib
import sys

import click

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq import assets, deep3d_net, files  # noqa: E402
from dataset_preprocessing.ffhq.cameras_file import write_coefficients  # noqa: E402
from dataset_preprocessing.ffhq.points import FivePoints, reference_points  # noqa: E402


@click.command(cls=cli.Command)
@cli.option('images', metavar='DIR', type=cli.PathText(), required=True, help='Photographs, as given to crop.py.')
@cli.option('points', metavar='DIR|JSON', type=cli.PathText(), required=True, help='Five points, as for crop.py.')
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Where to write coefficients.')
@cli.option('network', metavar='PTH', type=cli.PathText(), help='epoch_20.pth. Default: the published place.')
@cli.option('reference', metavar='MAT', type=cli.PathText(),
            help="BFM's similarity_Lm3D_all.mat. Default: the published place, else the embedded head.")
@cli.option('device', metavar='DEVICE', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N.')
def main(images, points, out, network, reference, device):
    """Write <out>/<name>.npz for each photograph that has points; files that are there already are kept."""
    out = pathlib.Path(out)
    try:
        items = files.list_pictures(pathlib.Path(images))
        five, reference = FivePoints(points), reference_points(reference)
        net = deep3d_net.load_network(assets.locate(deep3d=network)['deep3d'], device)

        def work(name, path):
            found = five(name)
            with files.naming(path):
                seen = deep3d_net.network_input(files.read_picture(path), found, reference)
            write_coefficients(deep3d_net.coefficients(net, seen), out / f'{name}.npz')

        files.run_step('cameras', items, lambda name: [out / f'{name}.npz'], work)
    except files.PreprocessError as error:
        raise click.ClickException(str(error)) from error


if __name__ == '__main__':
    main()
