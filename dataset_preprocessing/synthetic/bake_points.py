# SPDX-License-Identifier: Apache-2.0
"""Find where MediaPipe's 478 points lie on the embedded head -> data/head/mediapipe_points.npz.

Run once by `python -m dataset_preprocessing.synthetic.bake_points`, with what requirements-preprocess.txt names;
nothing imports it. Drawn people, whose surface is known at each pixel, are shown to the detector.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from tqdm import tqdm

from dataset_preprocessing.ffhq.dense_points import FIRST_IRIS, FORMAT, POINTS_FILE
from dataset_preprocessing.ffhq.landmarker import Landmarker
from dataset_preprocessing.ffhq.points import NUM_MESH_POINTS
from dataset_preprocessing.synthetic.anatomy import Anatomy, load_anatomy
from dataset_preprocessing.synthetic.paint import picture
from dataset_preprocessing.synthetic.people import Person, camera_label, random_person
from dnnlib import atomic_write
from geometry.meshes import WORLD_SCALE, WORLD_SHIFT, to_world
from training.mesh_render import MeshRenderer, project

SEED, NUM_PEOPLE, SIDE = 77, 400, 512
MAX_YAW, MAX_PITCH = 0.75, 0.35  # Radians; uniform.
INNER_LIPS = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 95, 88, 178, 87, 14, 317, 402, 318, 324)
OPEN_LIPS_PX = 6  # Closed lips tell nothing of which lip a point between them is on.
MAX_SNAP_PX = 12  # From a point to the nearest pixel of the kind of surface that it belongs to.
MIN_FACING = 0.45  # Cosine between the normal and the ray: grazing views magnify errors.
MIN_VIEWS = 25
OUTLIER = 2.5  # Of the median distance from the median.
SUBDIVISION = 12  # Steps along a triangle's side where the nearest point is searched.


def main() -> None:
    """Draw, detect, average, symmetrise, write; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--people', type=int, default=NUM_PEOPLE)
    parser.add_argument('--out', type=Path, default=POINTS_FILE)
    args = parser.parse_args()
    anatomy, find = load_anatomy(), Landmarker()
    spread = _Spread(anatomy)
    hits, weights, screens = [], [], []
    for index in tqdm(range(args.people), 'people'):
        found = _observe(anatomy, spread, find, index)
        if found is not None:
            for rows, row in zip((hits, weights, screens), found, strict=True):
                rows.append(row)
    hits, weights = np.stack(hits), np.stack(weights)
    partner = _partners(np.stack(screens))
    places, deviation, counts = _averages(hits, weights, partner)
    corners, shares = _on_surface(anatomy, spread, places)
    corners, shares = _symmetric(anatomy, corners, shares, partner)
    with atomic_write(args.out) as file:
        np.savez_compressed(
            file, format=np.array(FORMAT), corners=corners.astype(np.uint16), weights=shares.astype(np.float32),
            deviation=deviation.astype(np.float32), mirror=partner.astype(np.uint16),
        )  # fmt: skip
    print(f'{len(hits)} of {args.people} people; views a point {counts.min()} to {counts.max()}; '
          f'deviation median {1000 * np.median(deviation):.2f}, largest {1000 * deviation.max():.2f} mm')  # fmt: skip


class _Spread:
    """The template on which places are averaged: lips and lids apart, so that each point of space is on one of them."""

    def __init__(self, anatomy: Anatomy):
        self.vertices, _ = anatomy.head(np.zeros(anatomy.model.num_identity), {'jawOpen': 0.5})
        self.is_eye = anatomy.eyes[anatomy.faces].all(axis=1)
        self.is_skin = anatomy.regions['face'][anatomy.faces].all(axis=1)
        self.renderer = MeshRenderer(anatomy.model.faces, torch.zeros(len(anatomy.faces), 3, 3), resolution=SIDE)


def bare_person(anatomy: Anatomy, index: int) -> Person:
    """Return a person with neither glasses nor hat, seen from anywhere before the face."""
    rng = np.random.default_rng([SEED, index])
    label = camera_label(rng.uniform(-MAX_YAW, MAX_YAW), rng.uniform(-MAX_PITCH, MAX_PITCH), 0.0)
    return dataclasses.replace(random_person(anatomy, SEED, index, label), glasses='none', hat='none')


def _observe(anatomy, spread, find, index):
    """Return places [478, 3] on the spread template, weights [478] and places in the picture [478, 2] of one person."""
    person = bare_person(anatomy, index)
    label = person.label
    drawn = picture(anatomy, person, SIDE)
    faces = find(Image.fromarray(drawn.image))
    if not faces:
        return None
    points = faces[0].points[:, :2]
    vertices, camera = torch.from_numpy(drawn.vertices)[None], torch.from_numpy(label)[None]
    view = spread.renderer.look(vertices, camera)
    face, shares = view.face[0].numpy(), view.weights[0].numpy()
    normals = anatomy.normals(drawn.vertices)
    eye = (label[:16].reshape(4, 4)[:3, 3] - np.array(WORLD_SHIFT)) / WORLD_SCALE
    places, weights = np.zeros([NUM_MESH_POINTS, 3]), np.zeros(NUM_MESH_POINTS)
    for part, kind in ((slice(FIRST_IRIS), spread.is_skin), (slice(FIRST_IRIS, None), spread.is_eye)):
        shown = (face >= 0) & kind[face.clip(min=0)]
        away, nearest = distance_transform_edt(~shown, return_indices=True)
        column, row = np.rint(points[part]).astype(int).clip(0, SIDE - 1).T
        hit = nearest[:, row, column]
        # The renderer's faces have two corners swapped.
        corners = spread.renderer.faces.numpy()[face[hit[0], hit[1]]]
        mix = shares[hit[0], hit[1]][..., None]
        places[part] = (spread.vertices[corners] * mix).sum(axis=1)
        ray = eye - (drawn.vertices[corners] * mix).sum(axis=1)
        facing = ((normals[corners] * mix).sum(axis=1) * ray).sum(axis=1) / np.linalg.norm(ray, axis=1)
        weights[part] = np.where((away[row, column] < MAX_SNAP_PX) & (facing > MIN_FACING), facing, 0)
    lips = project(to_world(torch.from_numpy(drawn.landmarks))[None], camera)[0]
    if (lips[66, 1] - lips[62, 1]) * SIDE / 2 < OPEN_LIPS_PX:
        weights[list(INNER_LIPS)] = 0
    # On the drawn head's own plane: pairs of points are found by where they are in frontal pictures.
    return places, weights, points - points.mean(axis=0)


def _partners(screens):
    """Return the point [478] that takes each one's place in a mirrored face."""
    mean = screens.mean(axis=0)
    distance = np.linalg.norm(mean[:, None] * [-1, 1] - mean[None], axis=2)
    _, partner = linear_sum_assignment(distance + distance.T)
    if not (partner[partner] == np.arange(len(partner))).all():
        raise ValueError('expected pairs of points, found a longer cycle')
    return partner


def _averages(hits, weights, partner):
    """Return symmetric places [478, 3], deviations [478] in metres and counts of views; outliers are left out."""
    places, deviation, counts = np.zeros(hits.shape[1:]), np.zeros(len(partner)), np.zeros(len(partner), int)
    for point, other in enumerate(partner):
        both = np.concatenate([hits[:, point], hits[:, other] * [-1, 1, 1]])
        share = np.concatenate([weights[:, point], weights[:, other]])
        both, share = both[share > 0], share[share > 0]
        if len(both) < MIN_VIEWS:
            raise ValueError(f'point {point}: expected {MIN_VIEWS} views, found {len(both)}')
        distance = np.linalg.norm(both - np.median(both, axis=0), axis=1)
        near = distance < OUTLIER * np.median(distance)
        places[point] = np.average(both[near], axis=0, weights=share[near])
        deviation[point] = np.sqrt((np.linalg.norm(both - places[point], axis=1)[near] ** 2).mean())
        counts[point] = len(both)
    return places, deviation, counts


def _on_surface(anatomy, spread, places):
    """Return corners and weights [478, 3] of the nearest points of skin and eyeballs."""
    grid = np.array([(i, j, SUBDIVISION - i - j) for i in range(SUBDIVISION + 1) for j in range(SUBDIVISION + 1 - i)])
    grid = grid / SUBDIVISION
    corners, shares = np.zeros([len(places), 3], int), np.zeros([len(places), 3])
    for part, kind in ((slice(FIRST_IRIS), spread.is_skin), (slice(FIRST_IRIS, None), spread.is_eye)):
        faces = anatomy.faces[kind]
        samples = np.einsum('gk,fkc->fgc', grid, spread.vertices[faces]).reshape(-1, 3)
        _, nearest = cKDTree(samples).query(places[part])
        corners[part], shares[part] = faces[nearest // len(grid)], grid[nearest % len(grid)]
    return corners, shares


def _symmetric(anatomy, corners, shares, partner):
    """Return corners and weights whose left half is the mirror image of the right one."""
    mirror = anatomy.model.mirror.numpy()
    corners, shares = corners.copy(), shares.copy()
    for point, other in enumerate(partner):
        if point < other:
            corners[other], shares[other] = mirror[corners[point]], shares[point]
    return corners, shares


if __name__ == '__main__':
    main()
