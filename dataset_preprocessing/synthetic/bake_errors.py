# SPDX-License-Identifier: Apache-2.0
"""Learn how MediaPipe errs from drawn people whose truth is known -> data/head/mediapipe_errors.npz.

Run once by `python -m dataset_preprocessing.synthetic.bake_errors --found=FOLDER`, with what
requirements-preprocess.txt names; only its test imports it. FOLDER keeps what was found: run again to go on. The use
is told in docs/preprocessing.md.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset_preprocessing.ffhq.dense_points import ERRORS_FILE, ERRORS_FORMAT, load_dense_points, score_terms
from dataset_preprocessing.ffhq.head_points import point_normals
from dataset_preprocessing.ffhq.landmarker import Landmarker
from dataset_preprocessing.synthetic.anatomy import load_anatomy
from dataset_preprocessing.synthetic.bake_points import SEED, bare_person
from dataset_preprocessing.synthetic.paint import picture
from dataset_preprocessing.synthetic.people import random_person
from dnnlib import atomic_write
from geometry.cameras import FOCAL, project_mesh
from geometry.head_model import load_embedded_head
from geometry.meshes import WORLD_SCALE
from geometry.mirror import mirrored_names

NUM_PEOPLE, SIDE, PIECE = 1600, 512, 200
NUM_MODES, ROUNDS = 48, 15
FACING = 0.2  # Cosine between normal and view from which a point tells something.
OUTLIER = 3.0  # Of the median error, at which an error counts half; none at twice that where modes are learned.
LEAST_DEVIATION = 0.0004  # Metres, of a point by itself.
SCORE_RIDGE = 1.0


class Found(NamedTuple):
    """Of N people: points [N, 478, 2] in sides of the picture from its corner; surface [N, 478, 3], where these lie
    on the drawn head, metres; label [N, 25]; scores and expression [N, E], the detector's and the truth."""

    points: np.ndarray
    surface: np.ndarray
    label: np.ndarray
    scores: np.ndarray
    expression: np.ndarray


def main() -> None:
    """Draw and detect what is missing, learn, write; print what was learned."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--people', type=int, default=NUM_PEOPLE)
    parser.add_argument('--found', type=Path, required=True, help='folder that keeps what was found')
    parser.add_argument('--out', type=Path, default=ERRORS_FILE)
    args = parser.parse_args()
    names, pieces = load_embedded_head().expression_names, []
    for start in range(0, args.people, PIECE):
        path = args.found / f'{start:05d}.npz'
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            found = observe(range(start, min(start + PIECE, args.people)))
            with atomic_write(path) as file:
                np.savez(file, **found._asdict())
        with np.load(path, allow_pickle=False) as content:
            pieces.append(Found(*(content[name].astype(np.float64) for name in Found._fields)))
    found = Found(*map(np.concatenate, zip(*pieces, strict=True)))
    arrays = learn(found, names)
    with atomic_write(args.out) as file:
        np.savez_compressed(file, format=np.array(ERRORS_FORMAT), **arrays)
    offset, deviation = (1000 * arrays[name].astype(float) for name in ('offset', 'deviation'))
    modes = 1000 * np.sqrt((arrays['modes'].astype(float) ** 2).sum(axis=(0, 2)))
    print(f'{len(found.points)} of {args.people} people; medians in mm: offset {median_length(offset):.2f}, '
          f'modes {np.median(modes):.2f}, deviation beside them {np.median(deviation):.2f}')  # fmt: skip


def observe(people: range) -> Found:
    """Draw people and find their faces; those of odd numbers as data sets have them, others from all around, with
    neither glasses nor hats."""
    anatomy, table, find, rows = load_anatomy(), load_dense_points(), Landmarker(), []
    for index in tqdm(people, 'people'):
        person = random_person(anatomy, SEED, index) if index % 2 else bare_person(anatomy, index)
        drawn = picture(anatomy, person, SIDE)
        faces = find(Image.fromarray(drawn.image))
        if faces:
            surface = table.on(torch.from_numpy(drawn.vertices)[None])[0].numpy()
            scores = [faces[0].expressions.get(name, 0.0) for name in anatomy.expression_names]
            truth = anatomy.coefficients(person.expression)
            rows.append(((faces[0].points[:, :2] + 0.5) / SIDE, surface, person.label, scores, truth))
    find.close()
    return Found(*(np.array(column, dtype=np.float32) for column in zip(*rows, strict=True)))


def learn(found: Found, names: list[str], num_modes: int = NUM_MODES) -> dict[str, np.ndarray]:
    """Return the arrays of `DetectorErrors` as they are kept. names: of expressions."""
    head, table = load_embedded_head(), load_dense_points()
    normals = point_normals(head, table).numpy().astype(float)
    rotation = found.label[:, :16].reshape(-1, 4, 4)[:, :3, :3].transpose(0, 2, 1)
    error = np.empty(found.points.shape)  # Across the picture, in metres at the point's depth.
    for row, (points, surface, label) in enumerate(zip(found.points, found.surface, found.label, strict=True)):
        places, depth = project_mesh(surface, label)
        error[row] = (points - places) * depth[:, None] / (FOCAL * WORLD_SCALE)
    shown = -rotation[:, 2] @ normals.T > FACING
    # A mirrored person is a person: tables are symmetric.
    flip, partner = np.diag([-1.0, 1, 1]), table.mirror.numpy()
    rotation = np.concatenate([rotation, flip @ rotation @ flip])
    error = np.concatenate([error, error[:, partner] * [-1, 1]])
    shown = np.concatenate([shown, shown[:, partner]])
    typical = np.array([np.median(np.linalg.norm(error[shown[:, p], p], axis=1)) for p in range(len(partner))])
    offset = _offsets(error, shown / (1 + (np.linalg.norm(error, axis=2) / (OUTLIER * typical)) ** 2), rotation)
    error = error - np.einsum('nra,pa->npr', rotation[:, :2], offset)
    length = np.where(shown, np.linalg.norm(error, axis=2), np.nan)
    near = shown & (length < 2 * OUTLIER * np.nanmedian(length, axis=0))
    modes, deviation = factors(error.reshape(len(error), -1), near.repeat(2, axis=1), num_modes)
    scores, score_deviation = _score_map(found, names)
    return {
        'offset': offset.astype(np.float16),
        'deviation': np.sqrt((deviation.reshape(-1, 2) ** 2).mean(axis=1)).astype(np.float16),
        'modes': modes.T.reshape(num_modes, -1, 2).astype(np.float16),
        'scores': scores.astype(np.float32),
        'score_deviation': score_deviation.astype(np.float32),
    }


def median_length(vectors: np.ndarray) -> float:
    """Return the median length of vectors [N, D]."""
    return float(np.median(np.linalg.norm(vectors, axis=1)))


def _offsets(error, weight, rotation):
    """Return the mean error of each point [478, 3] in the head's frame, of what pictures [N, 478, 2] show of it."""
    across = rotation[:, :2]
    matrix = np.einsum('np,nra,nrb->pab', weight, across, across)
    return np.linalg.solve(matrix, np.einsum('np,nra,npr->pa', weight, across, error)[..., None])[..., 0]


def factors(x: np.ndarray, is_known: np.ndarray, num_modes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return modes [P, K] and deviations [P] of x [N, P]: x = modes @ normal + deviations * normal.

    is_known: [N, P], what of x is. Expectation maximisation (Rubin and Thayer, EM algorithms for ML factor analysis).
    """
    known = is_known.astype(float)
    x = x * known
    counts = known.sum(axis=0).clip(min=1)
    variance = (x**2).sum(axis=0) / counts
    random = np.random.default_rng(0).normal(size=[x.shape[1], num_modes])
    modes, own = 0.7 * random * np.sqrt(variance[:, None] / num_modes), variance / 2
    for _ in range(ROUNDS):
        squares = (modes[:, :, None] * modes[:, None]).reshape(len(modes), -1)
        inner = (known / own @ squares).reshape(len(x), num_modes, num_modes) + np.eye(num_modes)
        spread = np.linalg.inv(inner)
        mean = (spread @ ((x / own) @ modes)[..., None])[..., 0]
        moments = spread + mean[:, :, None] * mean[:, None]
        matrix = (known.T @ moments.reshape(len(x), -1)).reshape(-1, num_modes, num_modes)
        vector = x.T @ mean
        modes = np.linalg.solve(matrix + 1e-3 * np.eye(num_modes), vector[..., None])[..., 0]
        own = (((x**2).sum(axis=0) - (vector * modes).sum(axis=1)) / counts).clip(min=LEAST_DEVIATION**2)
    return modes, np.sqrt(own)


def _score_map(found, names):
    """Return the map of `score_terms` to expressions, least squares with a ridge, and the deviations that it leaves."""
    other = mirrored_names(names)
    scores, truth = (np.concatenate([x, x[:, other]]) for x in (found.scores, found.expression))
    close, jaw = names.index('mouthClose'), names.index('jawOpen')
    truth[:, close] = np.minimum(truth[:, close], truth[:, jaw])  # As the head takes it.
    terms = score_terms(scores)
    ridge = SCORE_RIDGE * np.eye(terms.shape[1])
    ridge[0, 0] = 0
    weights = np.linalg.solve(terms.T @ terms + ridge, terms.T @ truth)
    return weights, np.sqrt(((np.clip(terms @ weights, 0, 1) - truth) ** 2).mean(axis=0))


if __name__ == '__main__':
    main()
