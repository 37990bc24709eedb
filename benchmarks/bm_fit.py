# SPDX-License-Identifier: Apache-2.0
"""How well heads and cameras of photographs are found: drawn people and a drawn clip, whose truth is known.

Draws, detects (MediaPipe, requirements-preprocess.txt), crops and fits as preprocess_in_the_wild.py does, and prints
the table of docs/preprocessing.md. People are others than those that bake_points.py and bake_errors.py learn from.
"""

import argparse
import pathlib
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Run as a script from any folder.

from dataset_preprocessing.ffhq import alignment, fitting, solver  # noqa: E402  (needs the path above)
from dataset_preprocessing.ffhq.faces_file import FoundFace  # noqa: E402
from dataset_preprocessing.ffhq.landmarker import Landmarker  # noqa: E402
from dataset_preprocessing.ffhq.points import reference_points  # noqa: E402
from dataset_preprocessing.synthetic.anatomy import load_anatomy  # noqa: E402
from dataset_preprocessing.synthetic.make_clip import clip_people  # noqa: E402
from dataset_preprocessing.synthetic.paint import picture  # noqa: E402
from dataset_preprocessing.synthetic.people import random_person  # noqa: E402
from geometry.cameras import split_label  # noqa: E402

SIDE, FPS, SMALL = 512, 25, 0.01
NOISE_PX = 0.5
TOLD = ('jawOpen', 'mouthSmileLeft', 'mouthSmileRight', 'eyeBlinkLeft', 'eyeBlinkRight')


class Seen(NamedTuple):
    """People whose faces were found: faces and crops; identity [N, 100], expression [N, 52] and label [N, 25], the
    truth, of the pictures as drawn; turned [N, 25]: labels of the crops."""

    faces: list
    crops: list
    identity: np.ndarray
    expression: np.ndarray
    label: np.ndarray
    turned: np.ndarray


def see(people, anatomy, find, fps=None):
    """Draw people and return those whose faces were found."""
    rows = []
    for person in tqdm(people, 'pictures'):
        found = find(Image.fromarray(picture(anatomy, person, SIDE).image))
        if found:
            face = FoundFace(
                (SIDE, SIDE), found[0].points[:, :2], found[0].five, found[0].expressions, found[0].turn
            )  # fmt: skip
            rows.append((face, person.identity, anatomy.coefficients(person.expression), person.label))
    faces, *truth = zip(*rows, strict=True)
    crops = fitting.crops_of(list(faces), reference_points(None), fps)
    identity, expression, labels = map(np.stack, truth)
    turned = [alignment.label_in_training_picture(label, (SIDE, SIDE), crop)
              for label, crop in zip(labels, crops, strict=True)]  # fmt: skip
    return Seen(list(faces), crops, identity, expression, labels, np.stack(turned))


def turns_deg(labels, others):
    """Return how cameras differ [N, 3] in degrees: about their axes right (heads up or down), down (aside), ahead."""
    a, b = (split_label(torch.from_numpy(x).double())[0][:, :3, :3].numpy() for x in (labels, others))
    return Rotation.from_matrix(a.transpose(0, 2, 1) @ b).as_rotvec(degrees=True)


def camera_row(found, truth):
    """Return the words on cameras of labels [N, 25]."""
    turns = turns_deg(found, truth)
    angle, mean, spread = np.linalg.norm(turns, axis=1), turns.mean(axis=0), turns.std(axis=0)
    return (f'median {np.median(angle):.1f}°, nine of ten below {np.quantile(angle, 0.9):.1f}°; '
            f'up and down {mean[0]:+.1f}° ± {spread[0]:.1f}°, sideways {mean[1]:+.1f}° ± {spread[1]:.1f}°')  # fmt: skip


def expression_row(found, truth, names):
    """Return correlation and slope of expressions [N, 52], and of gaze."""
    def sideways(x):
        return x[:, names.index('eyeLookOutLeft')] - x[:, names.index('eyeLookInLeft')]

    def up(x):
        return x[:, names.index('eyeLookUpLeft')] - x[:, names.index('eyeLookDownLeft')]

    pairs = [(name, found[:, names.index(name)], truth[:, names.index(name)]) for name in TOLD]
    pairs += [('gaze sideways', sideways(found), sideways(truth)), ('gaze up', up(found), up(truth))]
    told = [(name, *(np.corrcoef(a, b)[0, 1], np.polyfit(b, a, 1)[0])) for name, a, b in pairs if b.std() > SMALL]
    return ', '.join(f'{name} {r:.2f} ({slope:.2f})' for name, r, slope in told)


def in_crops(seen, places):
    """Return points [N, P, 2] of the pictures in their training pictures."""
    size = (SIDE, SIDE)
    pairs = zip(places, seen.crops, strict=True)
    return np.stack([alignment.points_in_training_picture(points, size, crop) for points, crop in pairs])


def fit_batches(fitter, points, scores, turns=None):
    """Return fits of items by themselves."""
    parts = [slice(start, start + fitting.BATCH) for start in range(0, len(points), fitting.BATCH)]
    turns = turns or [None] * len(points)
    return [fit for part in parts for fit in fitter.batch(points[part], scores[part], turns=turns[part])]


def turned_labels(seen, turns, points):
    """Return labels [N, 25] of cameras as the network of turns tells them, without a fit."""
    poses = np.tile(np.eye(4), [len(points), 1, 1])
    poses[:, :3, :3] = fitting.cameras_of_turns(turns, points)[0].transpose(0, 2, 1)
    return np.concatenate([poses.reshape(-1, 16), seen.label[:, 16:]], axis=1)


def known_shape_labels(fitter, seen, points):
    """Return labels [N, 25] of cameras alone: the head is given."""
    model = fitter.model
    identity, expression = (torch.from_numpy(x).double() for x in (seen.identity, seen.expression))
    usual, model.local_deviation = model.local_deviation, torch.full_like(model.local_deviation, 1e-4)
    targets = torch.from_numpy((points + 0.5) / alignment.OUTPUT_SIDE)
    fit = solver.fit(model, targets, model.restrict(expression), torch.arange(len(points)), identity)
    model.local_deviation = usual
    return np.concatenate([fit.cam2world().flatten(1).numpy(), seen.label[:, 16:]], axis=1)


def exact_points(fitter, seen, rng):
    """Return where the pictures show the heads' points [N, 478, 2], with a little noise."""
    identity, expression, label = (torch.from_numpy(x).double() for x in (seen.identity, seen.expression, seen.label))
    rotation = split_label(label)[0][:, :3, :3].mT
    place = -(rotation @ split_label(label)[0][:, :3, 3:])[..., 0]
    points = fitter.model.points(identity, fitter.model.restrict(expression))
    places = solver.project(solver.see(points, rotation, place)).numpy() * SIDE - 0.5
    return in_crops(seen, places + rng.normal(0, NOISE_PX, places.shape))


def measure_people(fitter, seen):
    """Print the rows of people by themselves."""
    names = list(fitter.head.expression_names)
    points = in_crops(seen, [face.points for face in seen.faces])
    scores = np.stack([fitter.model.expected(face) for face in seen.faces])
    turns = [face.turn for face in seen.faces]
    start = time.perf_counter()
    fits = fit_batches(fitter, points, scores, turns)
    seconds = time.perf_counter() - start
    labels, errors = np.stack([fit.label for fit in fits]), 100 * np.array([fit.error for fit in fits])
    print(f'| {len(fits)} drawn people: error | median {np.median(errors):.1f} %, largest {errors.max():.1f} % |')
    print(f'| camera, against the truth turned to the crop | {camera_row(labels, seen.turned)} |')
    print(f'| camera, against the label as drawn | {camera_row(labels, seen.label)} |')
    found = np.stack([fit.expression for fit in fits])
    print(f'| correlation with the truth (slope) | {expression_row(found, seen.expression, names)} |')
    print(f'| turns alone | {camera_row(turned_labels(seen, turns, points), seen.turned)} |')
    labels = np.stack([fit.label for fit in fit_batches(fitter, points, scores)])
    print(f'| without turns: camera | {camera_row(labels, seen.turned)} |')
    labels = known_shape_labels(fitter, seen, points)
    print(f'| true shape and expression given: camera | {camera_row(labels, seen.turned)} |')
    exact = exact_points(fitter, seen, np.random.default_rng(0))
    labels = np.stack([fit.label for fit in fit_batches(fitter, exact, scores)])
    print(f'| exact points, noise of half a pixel: camera | {camera_row(labels, seen.turned)} |')
    labels = known_shape_labels(fitter, seen, exact)
    print(f'| the same, shape and expression given | {camera_row(labels, seen.turned)} |')
    print(f'| time of the fit | {1000 * seconds / len(fits):.0f} ms a picture, {torch.get_num_threads()} threads |')


def measure_clip(fitter, seen):
    """Print the rows of a clip."""
    points = in_crops(seen, [face.points for face in seen.faces])
    scores = np.stack([fitter.model.expected(face) for face in seen.faces])
    turns = [face.turn for face in seen.faces]
    identity = fitter.shared_identity(points, scores, turns)
    fits = fitter.batch(points, scores, identity, turns, is_sequence=True)
    labels, errors = np.stack([fit.label for fit in fits]), 100 * np.array([fit.error for fit in fits])
    print(f'| a clip of {len(fits)} frames: error | median {np.median(errors):.1f} %, largest {errors.max():.1f} % |')
    print(f'| camera | {camera_row(labels, seen.turned)} |')
    found = np.stack([fit.expression for fit in fits])
    names = list(fitter.head.expression_names)
    print(f'| correlation (slope) | {expression_row(found, seen.expression, names)} |')


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--people', type=int, default=144)
    parser.add_argument('--frames', type=int, default=60, help='of each clip')
    parser.add_argument('--clips', type=int, default=3)
    parser.add_argument('--seed', type=int, default=31)
    options = parser.parse_args()
    anatomy, find, fitter = load_anatomy(), Landmarker(with_turns=True), fitting.HeadFitter()
    print('| | |\n|---|---|')
    measure_people(fitter, see([random_person(anatomy, options.seed, i) for i in range(options.people)], anatomy, find))
    for clip in range(options.clips):
        people = clip_people(anatomy, options.seed + clip, options.frames, FPS)
        measure_clip(fitter, see(people, anatomy, find, FPS))
    find.close()


if __name__ == '__main__':
    main()
