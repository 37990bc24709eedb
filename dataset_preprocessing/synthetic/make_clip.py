# SPDX-License-Identifier: Apache-2.0
"""Draw a driving clip of one person who talks, blinks and turns, in the layout that reenactment reads."""

import dataclasses
import json
import os
import pathlib
import sys

import click
import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.synthetic import motion, store  # noqa: E402
from dataset_preprocessing.synthetic.anatomy import load_anatomy  # noqa: E402
from dataset_preprocessing.synthetic.paint import picture  # noqa: E402
from dataset_preprocessing.synthetic.people import camera_label, random_person  # noqa: E402
from dnnlib import atomic_write  # noqa: E402
from geometry.meshes import landmark_lines  # noqa: E402
from training.dataset import LABEL_FILE  # noqa: E402

MOTION_PART = 5  # Random numbers of the motion; 0 to 4 are those of a person's picture.
MAX_FRAMES = 100_000


class ClipStore:
    """Frames <number>.png, .obj and _kpt2d.txt in one folder; a frame is there when its picture is."""

    def __init__(self, folder, anatomy):
        self.folder, self.anatomy = folder, anatomy

    def has(self, index: int) -> bool:
        """Tell whether a frame is complete."""
        return (self.folder / f'{index:05d}.png').exists()

    def write(self, index: int, image: np.ndarray, vertices: np.ndarray, landmarks: np.ndarray) -> None:
        """Write a frame."""
        store.put(self.folder / f'{index:05d}.obj', store.obj_bytes(self.anatomy, vertices))
        store.put(self.folder / f'{index:05d}_kpt2d.txt', landmark_lines(landmarks))
        store.put(self.folder / f'{index:05d}.png', store.png(image))


@click.command(cls=cli.Command)
@cli.option('out', metavar='DIR', type=cli.PathText(), required=True, help='Folder to write.')
@cli.option('frames', metavar='INTEGER', type=click.IntRange(1, MAX_FRAMES), default=250, show_default=True,
            help='Frames of the clip.')
@cli.option('fps', metavar='INTEGER', type=click.IntRange(1, 240), default=25, show_default=True,
            help='Frames a second: how far apart they are in the motion.')
@cli.option('seed', metavar='INTEGER', type=click.IntRange(0, cli.MAX_SEED), default=0, show_default=True,
            help='Person and motion; no person of a data set.')
@cli.option('resolution', metavar='INTEGER', type=click.IntRange(32, 1024), default=256, show_default=True,
            help='Side of a frame in pixels.')
@cli.option('workers', type=click.IntRange(1, 256), default=os.cpu_count() or 1, show_default='all', help='Processes.')
def main(out, frames, fps, seed, resolution, workers):
    """Write DIR with frames 00000.png, 00000.obj and 00000_kpt2d.txt, dataset.json and coefficients.npz.

    The pose is in the camera: meshes stay centred while the head, seen from the camera, turns. Work goes to
    DIR.partial, which takes the name DIR when it is complete; run again after an interruption to go on.
    """
    torch.set_num_threads(1)  # Forked processes must not inherit threads.
    target = pathlib.Path(out).expanduser()
    options = {'frames': frames, 'fps': fps, 'resolution': resolution, 'seed': seed}
    needed = int(frames * (store.PICTURE_BYTES * resolution**2 + store.OBJ_BYTES))
    partial = store.begin(target, options, needed)
    if partial is None:
        click.echo(f'{target} is complete: {frames} frames')
        return
    anatomy = load_anatomy()
    people = clip_people(anatomy, seed, frames, fps)
    items = ClipStore(partial, anatomy)
    missing = [index for index in range(frames) if not items.has(index)]
    picture(anatomy, people[0], 32)  # Builds tables and the rasteriser once, for all processes.

    def draw(index):
        result = picture(anatomy, people[index], resolution)
        return result.image, result.vertices, result.landmarks

    store.write_all(draw, items, missing, workers, frames)
    labels = [[f'{index:05d}.png', person.label.astype(float).tolist()] for index, person in enumerate(people)]
    arrays = {
        'names': np.array([name for name, _ in labels]),
        'identity': people[0].identity.astype(np.float32),
        'expression': np.array([anatomy.coefficients(person.expression) for person in people]),
        'expression_names': np.array(anatomy.expression_names),
        'fps': np.array(fps),
    }
    with store.writing(partial):
        with atomic_write(partial / LABEL_FILE, 'w') as file:
            json.dump({'labels': labels}, file)
        store.finish(partial, target, arrays, with_template=False)
    click.echo(f'Wrote {frames} frames of {len(anatomy.neutral)} vertices to {target}')


def clip_people(anatomy, seed: int, frames: int, fps: float) -> list:
    """Return the person of each frame: one identity, light that stays with the camera."""
    first = random_person(anatomy, seed, clip_index(seed))
    rng = first.rng(MOTION_PART)
    duration = frames / fps
    weights = motion.expressions(rng, anatomy.expression_names, duration)
    turns = motion.turns(rng, duration)
    people = []
    for frame in range(frames):
        step = int(frame * motion.RATE / fps)
        yaw, pitch, roll = turns[step]
        label = camera_label(yaw, pitch, roll)
        columns = label[:16].reshape(4, 4)[:3, :3] * (1, -1, -1)
        named = {name: float(w) for name, w in zip(anatomy.expression_names, weights[step], strict=True) if w > 0}
        light = (columns @ first.light).astype(np.float32)
        people.append(dataclasses.replace(first, expression=named, label=label, light=light))
    return people


def clip_index(seed: int) -> int:
    """Return the index of a clip's person: beyond those of data sets."""
    return 2**31 + seed % 2**20


if __name__ == '__main__':
    main()
