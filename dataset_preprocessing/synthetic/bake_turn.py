# SPDX-License-Identifier: Apache-2.0
"""Learn how heads are turned from drawn people whose truth is known -> data/head/head_turn.npz.

Run by `python -m dataset_preprocessing.synthetic.bake_turn --found=FOLDER`, with what requirements-preprocess.txt
names; only its test imports it. FOLDER keeps what was drawn: run again to go on with drawing. What the network is for
is told in docs/preprocessing.md.
"""

import argparse
import copy
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import affine_grid, grid_sample
from tqdm import tqdm

from dataset_preprocessing.ffhq import head_turn
from dataset_preprocessing.ffhq.dense_points import load_dense_points, load_detector_errors
from dataset_preprocessing.ffhq.head_points import EmbeddedPoints
from dataset_preprocessing.ffhq.head_turn import HALF_SIDE, MIRRORED, TURN_FILE, TurnNet
from dataset_preprocessing.ffhq.landmarker import Landmarker
from dataset_preprocessing.parallel import in_processes
from dataset_preprocessing.synthetic.anatomy import load_anatomy
from dataset_preprocessing.synthetic.jitter import jitter
from dataset_preprocessing.synthetic.paint import picture
from dataset_preprocessing.synthetic.people import camera_label, random_person
from dnnlib import atomic_write
from geometry.head_model import load_embedded_head
from geometry.mirror import mirrored_names

SEED, NUM_PEOPLE, PIECE, DRAWN_SIDE = 2027, 50000, 250, 256
WIDE_EVERY, MAX_YAW, MAX_PITCH = 4, 0.9, 0.5  # Every fourth one is seen from all around; radians.
STORED_SIDE = 160  # Pixels that are kept of a face: the network's, with a margin for moves.
HELD_OUT = 1000  # Of the people, the last ones: never learned from.
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 14000, 64, 2e-3, 1e-2, 200
SQUARED_STEPS = 400  # With squared errors, before deviations are learned, too.
AVERAGED = 0.998  # Of the weights' moving average, which is what is kept.
SIZES, ROLL, SHIFT, POINT_NOISE = 0.06, 0.07, 0.04, 0.02  # How faces lie in their squares, and points, at random.
COVERED, COVER = 0.25, (0.06, 0.35)  # Share of the pictures that a box covers in part, and its sides.


class Drawn(NamedTuple):
    """N faces. images [N, 160, 160, 3] uint8: squares. points [N, 478, 3] and label [N, 25]: of the picture, in sides
    from its corner. scores [N, E]: the detector's."""

    images: np.ndarray
    points: np.ndarray
    label: np.ndarray
    scores: np.ndarray


class Faces(NamedTuple):
    """What is learned from: images [N, 3, 160, 160] uint8, standardised points [N, 478, 3], scores [N, E], turns
    [N, 3]."""

    images: torch.Tensor
    points: torch.Tensor
    scores: torch.Tensor
    turns: torch.Tensor


def main() -> None:
    """Draw and detect what is missing, learn, write; print how far turns of others are off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--people', type=int, default=NUM_PEOPLE)
    parser.add_argument('--steps', type=int, default=STEPS)
    parser.add_argument('--held-out', type=int, default=HELD_OUT)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--found', type=Path, required=True, help='folder that keeps what was drawn')
    parser.add_argument('--out', type=Path, default=TURN_FILE)
    args = parser.parse_args()
    args.found.mkdir(parents=True, exist_ok=True)
    parts = [range(start, min(start + PIECE, args.people)) for start in range(0, args.people, PIECE)]
    pieces = [(args.found / f'{part.start:06d}-{part.stop:06d}.npz', part) for part in parts]
    for _ in in_processes(_draw_piece, pieces, args.workers, 'pieces', len(pieces), chunk=1):
        pass
    drawn = Drawn(*map(np.concatenate, zip(*(_read_piece(path) for path, _ in pieces))))
    template, names = mean_face(), load_embedded_head().expression_names
    frames = head_turn.frames_of(drawn.points[..., :2], template)
    turns, told = truth(drawn, frames), head_turn.relative(drawn.points, frames)
    learned = slice(0, len(told) - args.held_out)
    arrays = {'template': template, 'mean': told[learned].mean(axis=0), 'spread': told[learned].std(axis=0).mean()}
    faces = Faces(
        torch.from_numpy(drawn.images).permute(0, 3, 1, 2),
        torch.from_numpy((told - arrays['mean']) / arrays['spread']).float(),
        torch.from_numpy(drawn.scores).float(), torch.from_numpy(turns).float(),
    )  # fmt: skip
    net = learn(Faces(*(x[learned] for x in faces)), Mirror(arrays, names), args.steps)
    with atomic_write(args.out) as file:
        save(file, net, arrays, names)
    print(told_errors(args.out, drawn, turns, len(told) - args.held_out))


def person(anatomy, index: int):
    """Return a person; every fourth one is seen from all around."""
    if index % WIDE_EVERY:
        return random_person(anatomy, SEED, index)
    rng = np.random.default_rng([SEED, index])
    label = camera_label(rng.uniform(-MAX_YAW, MAX_YAW), rng.uniform(-MAX_PITCH, MAX_PITCH), 0.0)
    return random_person(anatomy, SEED, index, label)


def mean_face() -> np.ndarray:
    """Return the points [478, 2] of the mean head as seen from the front, y down, about their middle and of size 1."""
    points = EmbeddedPoints(load_embedded_head(), load_dense_points(), load_detector_errors()).mean.numpy()
    flat = points[:, :2] * [1, -1]
    flat = flat - flat.mean(axis=0)
    return flat / np.sqrt((flat**2).sum(axis=1).mean())


def truth(drawn: Drawn, frames: head_turn.Frames) -> np.ndarray:
    """Return the true turns [N, 3] of drawn people."""
    rotation = drawn.label[:, :16].astype(float).reshape(-1, 4, 4)[:, :3, :3].transpose(0, 2, 1)
    return head_turn.turns_of(rotation, frames)


def _draw_piece(piece):
    path, people = piece
    if not path.exists():
        drawn = draw(people)
        with atomic_write(path) as file:
            np.savez(file, **drawn._asdict())


def _read_piece(path):
    with np.load(path, allow_pickle=False) as content:
        return [content[name] for name in Drawn._fields]


def draw(people: range) -> Drawn:
    """Draw people and find their faces."""
    anatomy, find, template, rows = load_anatomy(), Landmarker(), mean_face(), []
    for index in people:
        someone = person(anatomy, index)
        image = Image.fromarray(picture(anatomy, someone, DRAWN_SIDE).image)
        if faces := find(image):
            points = faces[0].points
            frames = head_turn.frames_of(points[None, :, :2], template)
            square = head_turn.face_square(image, frames, STORED_SIDE, HALF_SIDE * STORED_SIDE / head_turn.SIDE)
            scores = [faces[0].expressions.get(name, 0.0) for name in anatomy.expression_names]
            rows.append((np.asarray(square), (points + [0.5, 0.5, 0]) / DRAWN_SIDE, someone.label, scores))
    find.close()
    images, *numbers = zip(*rows, strict=True)
    return Drawn(np.stack(images), *(np.array(column, dtype=np.float32) for column in numbers))


class Mirror:
    """Mirrors standardised points and scores. arrays: mean [478, 3] and spread of the points; names: of scores."""

    def __init__(self, arrays, names):
        self.mean, self.spread = torch.from_numpy(arrays['mean']).float(), float(arrays['spread'])
        self.partner = load_dense_points().mirror
        self.other = mirrored_names(names)

    def __call__(self, faces: Faces) -> Faces:
        """Return the faces as a mirror shows them."""
        points = head_turn.mirrored(faces.points * self.spread + self.mean, self.partner)
        turns = faces.turns * torch.from_numpy(MIRRORED).float()
        return Faces(faces.images.flip(3), (points - self.mean) / self.spread, faces.scores[:, self.other], turns)


def learn(faces: Faces, mirror: Mirror, steps: int) -> TurnNet:
    """Return the network that tells turns, and how sure it is: Gaussian likelihood, moving average of the weights."""
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    net = TurnNet(faces.scores.shape[1]).to(memory_format=torch.channels_last)
    average = copy.deepcopy(net).eval()
    optimiser = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    bar, order = tqdm(range(steps), 'steps'), torch.empty(0, dtype=torch.long)
    for step in bar:
        rate = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * (1e-3 + 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group['lr'] = rate
        if len(order) < BATCH:
            order = torch.randperm(len(faces.images), generator=random)
        batch, order = order[:BATCH], order[BATCH:]
        seen = _shown(Faces(*(x[batch] for x in faces)), mirror, random)
        with torch.autocast('cpu', torch.bfloat16):
            turn, log_deviation = net(seen.images.contiguous(memory_format=torch.channels_last), *seen[1:3])
        away = turn - seen.turns
        if step < SQUARED_STEPS:
            loss = (away / 0.1).square().mean()
        else:
            loss = (0.5 * (away / log_deviation.exp()).square() + log_deviation).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        with torch.no_grad():
            for kept, new in zip(average.state_dict().values(), net.state_dict().values()):
                kept.copy_(kept.lerp(new, max(1 - AVERAGED, 1 / (step + 2))) if kept.is_floating_point() else new)
        if step % 100 == 0:
            bar.set_postfix_str(f'{math.degrees(float(away.detach().norm(dim=1).median())):.2f}°')
    return average


def _shown(faces, mirror, random):
    """Return faces as the network sees them: mirrored or not, moved, every second one jittered, some covered."""
    count = len(faces.images)
    is_mirrored = torch.rand(count, generator=random) < 0.5
    mixed = zip(faces, mirror(faces))
    faces = Faces(*(torch.where(is_mirrored.view(-1, *[1] * (x.ndim - 1)), y, x) for x, y in mixed))

    def draw(largest):
        return largest * (2 * torch.rand(count, generator=random) - 1)

    size, roll = head_turn.SIDE / STORED_SIDE * (1 + draw(SIZES)), draw(ROLL)
    cosine, sine = size * roll.cos(), size * roll.sin()
    rows = torch.stack([cosine, -sine, draw(SHIFT), sine, cosine, draw(SHIFT)], dim=1).view(-1, 2, 3)
    grid = affine_grid(rows, [count, 3, head_turn.SIDE, head_turn.SIDE], align_corners=False)
    images = grid_sample(faces.images.float() / 255, grid, align_corners=False)
    images[::2] = jitter(images[::2], random)
    images = 2 * _covered(images, random) - 1
    noise = POINT_NOISE * torch.randn(faces.points.shape, generator=random)
    return faces._replace(images=images, points=faces.points + noise)


def _covered(images, random):
    """Return pictures [N, 3, R, R], some of them with a box of one colour over a part."""
    def draw(low, high, *shape):
        return low + (high - low) * torch.rand([len(images), 1, *shape], generator=random)

    place = torch.arange(images.shape[-1]) / images.shape[-1]
    across, down = ((place > (start := draw(0, 1, 1))) & (place < start + draw(*COVER, 1)) for _ in range(2))
    is_covered = across[:, :, None] & down[..., None] & (draw(0, 1, 1, 1) < COVERED)
    return torch.where(is_covered, torch.rand([len(images), 3, 1, 1], generator=random), images)


def save(file, net: TurnNet, arrays: dict[str, np.ndarray], names: list[str]) -> None:
    """Write an .npz: weights in half precision, what they are used with, JSON."""
    weights = {name: value.half().numpy() for name, value in net.state_dict().items()
               if not name.endswith(head_turn.UNSAVED)}  # fmt: skip
    about = json.dumps({'format': head_turn.FORMAT, 'expression_names': list(names)})
    scales = {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()}
    np.savez_compressed(file, about=np.array(about), **scales, **weights)


def told_errors(path: Path, drawn: Drawn, turns: np.ndarray, first: int) -> str:
    """Return the words on how far the network of a file is off, of people from the first on."""
    network, margin = head_turn.HeadTurn(path), (STORED_SIDE - head_turn.SIDE) // 2
    found, deviation = [], []
    for number in tqdm(range(first, len(turns)), 'held out'):
        image = drawn.images[number, margin:-margin, margin:-margin]
        turn = network.of_square(image, drawn.points[number], dict(zip(network.names, drawn.scores[number])))
        found.append(turn.mean)
        deviation.append(turn.deviation)
    away = np.degrees(np.stack(found) - turns[first:])
    angle, ratio = np.linalg.norm(away, axis=1), np.radians(away) / np.stack(deviation)
    return (f'{len(away)} held out: median {np.median(angle):.2f}°, nine of ten below {np.quantile(angle, 0.9):.2f}°; '
            f'deviations {away.std(axis=0).round(2)}°, over what was told {ratio.std(axis=0).round(2)}')  # fmt: skip


if __name__ == '__main__':
    main()
