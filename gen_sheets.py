# SPDX-License-Identifier: Apache-2.0
"""Sheets of people in rows: expressions in columns, then cameras in columns; for networks over the embedded head."""

import click
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import cli
from dnnlib.util import atomic_write
from geometry import cameras, paths
from geometry.head_model import EmbeddedHead, load_embedded_head
from training import avatar
from training.generator import Next3DGenerator
from training.inference import Synthesizer

EXPRESSIONS = {
    'neutral': {},
    'jaw open': {'jawOpen': 0.8},
    'smile': {'mouthSmile': 0.8, 'cheekSquint': 0.5, 'mouthUpperUp': 0.2},
    'blink': {'eyeBlink': 1.0},
    'brows up': {'browInnerUp': 0.8, 'browOuterUp': 0.9},
    'gaze left': {'eyeLookOutLeft': 0.6, 'eyeLookInRight': 0.6},
}
YAWS = (-40, -27, -13, 0, 13, 27, 40)  # Degrees; where the camera stands, seen from the head's front.
HEADING = 24  # Pixels above the pictures, for what the columns show.


@click.command(cls=cli.Command)
@cli.option(
    'network', metavar='PATH|URL', type=cli.PathText(), required=True, help='Network trained over the embedded head.'
)
@cli.option('seeds', metavar='LIST', type=cli.SeedList(), required=True, help="Seeds such as '0,3,7-9', one a row.")
@cli.option('trunc', metavar='PSI', type=cli.FiniteFloat(), default=0.7, show_default=True, help='Truncation.')
@cli.option(
    'shape', metavar='STD', type=cli.FiniteFloat(-1e-9, 3), default=0.7, show_default=True,
    help="Spread of the seeds' head shapes in standard deviations; 0: the mean head for all.",
)
@cli.option('outdir', metavar='DIR', type=cli.PathText(), required=True, help='Where to save.')
@cli.option(
    'device', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N; auto: cuda when present.'
)
def main(network, seeds, trunc, shape, outdir, device):
    """Write expressions.png and cameras.png: the same people, then with other faces, then from other sides.

    \b
    python gen_sheets.py --network=data/demo/next3d_demo.pkl --seeds=0-3 --outdir=out
    """
    click.echo(f'Loading networks from "{network}"...')
    generator = cli.load_next3d(network, device)
    head = load_embedded_head()
    if generator.num_vertices != len(head.mean):
        raise click.UsageError(
            f'--network: {network}: expected one over the {len(head.mean)} vertices of the embedded head, found '
            f'{generator.num_vertices}.'
        )
    folder = cli.make_outdir(outdir)
    sheets = {'expressions': [], 'cameras': []}
    with tqdm(total=2 * len(seeds), unit='row', delay=2) as bar:
        synthesizer = Synthesizer(generator, 'fp32')
        for seed in seeds:
            for name, row in zip(sheets, (_expressions, _cameras), strict=True):
                sheets[name] += row(synthesizer, head, seed, trunc, shape)
                bar.update()
    for name, headings in (('expressions', list(EXPRESSIONS)), ('cameras', [f'{yaw}°' for yaw in YAWS])):
        path = folder / f'{name}.png'
        with cli.naming(path), atomic_write(path) as file:
            _sheet(sheets[name], headings).save(file, format='PNG')
    click.echo(f'Wrote expressions.png and cameras.png of {len(seeds)} people to {folder}')


def _expressions(synthesizer, head, seed, trunc, shape):
    """Return a person's pictures [R, R, 3] with each expression, from the front; the texture is painted once."""
    c = _labels(synthesizer.generator, [0])
    film = avatar.Film(synthesizer, ws=_styles(synthesizer, seed, trunc))
    return [_draw(film, c, _mesh(head, seed, shape, EXPRESSIONS[name])) for name in EXPRESSIONS]


def _cameras(synthesizer, head, seed, trunc, shape):
    """Return a person's neutral pictures [R, R, 3] from each side; the planes are computed once."""
    film = avatar.Film(synthesizer, ws=_styles(synthesizer, seed, trunc), v=_mesh(head, seed, shape, {}))
    return [_draw(film, c[None]) for c in _labels(synthesizer.generator, YAWS)]


def _draw(film, c, v=None):
    return film.draw(avatar.Frame(c, v=v), 1)[0].cpu().numpy()


def _styles(synthesizer, seed, trunc):
    label = _labels(synthesizer.generator, [0]).to(synthesizer.device)
    return avatar.styles_of_seeds(synthesizer.generator, [seed], label, trunc, None)


def _labels(generator: Next3DGenerator, yaws) -> torch.Tensor:
    """Return labels [N, 25] of level cameras so many degrees from the front."""
    angles = cameras.FRONTAL + np.stack([np.deg2rad(yaws), np.zeros(len(yaws))], axis=1)
    return paths.path_labels(angles, generator.config.avg_camera_pivot, generator.config.avg_camera_radius)


def _mesh(head: EmbeddedHead, seed: int, shape: float, weights: dict[str, float]) -> torch.Tensor:
    """Return a seed's head [1, V + 68, 3] with an expression; a name without its side stands for both sides."""
    identity = shape * np.random.default_rng(seed).standard_normal([1, head.num_identity])
    sides = {
        name: weight
        for stem, weight in weights.items()
        for name in ([stem] if stem in head.expression_names else [stem + 'Left', stem + 'Right'])
    }
    return head(torch.from_numpy(identity).float(), head.expression(sides)).stacked()


def _sheet(pictures, headings):
    """Return pictures row by row under one line of headings."""
    tiles = avatar.tile(pictures, len(headings), len(pictures) // len(headings))
    sheet = Image.new('RGB', (tiles.shape[1], tiles.shape[0] + HEADING), 'white')
    sheet.paste(Image.fromarray(tiles), (0, HEADING))
    draw, font, side = ImageDraw.Draw(sheet), ImageFont.load_default(16), pictures[0].shape[1]
    for number, heading in enumerate(headings):
        draw.text(((number + 0.5) * side, HEADING / 2), heading, 'black', font, anchor='mm')
    return sheet


if __name__ == '__main__':
    main()
