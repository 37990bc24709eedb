# SPDX-License-Identifier: Apache-2.0
"""Train the estimator of expression, head pose and identity on drawn people; metrics/estimator.py is its network."""

import json
import math
import pathlib
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import click
import numpy as np
import torch
from torch.nn.functional import avg_pool2d, mse_loss, smooth_l1_loss
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # Run as a script from any folder.

import cli  # noqa: E402  (needs the path above)
from dataset_preprocessing.synthetic import jitter  # noqa: E402
from dnnlib import atomic_path  # noqa: E402
from geometry.head_model import load_embedded_head  # noqa: E402
from geometry.mirror import mirror_label, mirrored_names  # noqa: E402
from metrics import estimator  # noqa: E402
from training.dataset import PackedSource  # noqa: E402
from training.driving import COEFFICIENTS_FILE  # noqa: E402
from training.files import DatasetError  # noqa: E402
from training.run_dir import RunError  # noqa: E402
from training.state import StateError, load_newest, save_state  # noqa: E402

# Attributes that the embedding is trained to tell beside the head's shape: what stays with a person.
ATTRIBUTES = ('tone', 'skin_x', 'skin_y', 'skin_z', 'hair_x', 'hair_y', 'hair_z', 'iris_x', 'iris_y', 'iris_z', 'age',
              'makeup', 'brow_width', 'freckles', 'recession')  # fmt: skip
NAMED = ('style', 'beard', 'glasses', 'hat')  # Each of their words becomes a column of 0 and 1.
VALIDATION = 0.08  # Share of the pictures, the last ones; none of them is trained on.
MAX_VALIDATION = 2000
EXPRESSION_WEIGHT, POSE_WEIGHT, IDENTITY_WEIGHT = 1.0, 0.5, 0.5
SMALLEST_STD = 0.05  # Of an expression: rarer ones count no more than this.
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 2e-3, 0.02, 0.05
LOADED = 256  # Pictures at a time on their way to the device.
STATE_EVERY_S = 60.0
PARITY = 0.99  # How nearly a component of identity equals its own mirror image, or its negative.


class Data(NamedTuple):
    """A set on the device. images: [N, 3, 128, 128] uint8. The rest float32, with its mirror image where it has one."""

    images: torch.Tensor
    expression: torch.Tensor
    labels: torch.Tensor
    person: torch.Tensor


class Mirror(NamedTuple):
    """Of a mirrored picture: which expression takes the place of each, and the signs [P] of a person's numbers."""

    expression: torch.Tensor
    person: torch.Tensor


class Scales(NamedTuple):
    """Means and spreads that targets are standardised by."""

    expression: tuple[torch.Tensor, torch.Tensor]
    pose: tuple[torch.Tensor, torch.Tensor]
    person: tuple[torch.Tensor, torch.Tensor]


def load_data(path: pathlib.Path, device: torch.device, workers: int) -> tuple[Data, Mirror, tuple[str, ...]]:
    """Return all of a packed, drawn data set on the device, what mirroring does to it, and names of expressions."""
    source = PackedSource(path)
    coefficients = path / COEFFICIENTS_FILE
    if not coefficients.exists():
        raise DatasetError(f'{coefficients}: expected the coefficients of make_dataset.py, found no such file')
    try:
        with np.load(coefficients, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if arrays['names'].tolist() != source.names:
            raise ValueError('names that are not those of the pictures, in their order')
        person, signs = person_targets(arrays)
        names = tuple(arrays['expression_names'].tolist())
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f'{coefficients}: expected what make_dataset.py writes, found others: {error}') from None
    numbers = (arrays['expression'], np.asarray(source.labels)[:, :25], person)
    tensors = (torch.from_numpy(np.array(x, dtype=np.float32)).to(device) for x in numbers)
    mirror = Mirror(torch.tensor(mirrored_names(names), device=device), torch.from_numpy(signs).to(device))
    return Data(load_images(source, device, workers), *tensors), mirror, names


def load_images(source: PackedSource, device: torch.device, workers: int) -> torch.Tensor:
    """Return all pictures [N, 3, 128, 128] uint8 on the device, smoothed to that size there."""
    images = torch.empty([len(source.names), 3, estimator.SIDE, estimator.SIDE], dtype=torch.uint8, device=device)
    with ThreadPoolExecutor(workers) as pool:  # Decoding a PNG leaves the interpreter to others.
        for start in tqdm(range(0, len(images), LOADED), 'pictures', delay=2):
            numbers = range(start, min(start + LOADED, len(images)))
            chunk = torch.from_numpy(np.stack(list(pool.map(source.image, numbers)))).to(device)
            factor, rest = divmod(chunk.shape[-1], estimator.SIDE)
            small = estimator.shrunk(chunk) if rest else avg_pool2d(chunk.float(), factor)
            images[start : numbers.stop] = small.round().clamp(0, 255).to(torch.uint8)
    return images


def person_targets(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the embedding has to tell [N, P], and the sign [P] of each number in a mirror image (0: unknown)."""
    columns = [arrays['identity'], *(arrays[f'attribute_{name}'][:, None] for name in ATTRIBUTES)]
    for name in NAMED:
        values = arrays[f'attribute_{name}']
        columns += [(values == word)[:, None] for word in np.unique(values)]
    person = np.concatenate(columns, axis=1).astype(np.float32)
    signs = np.ones(person.shape[1], dtype=np.float32)
    signs[: arrays['identity'].shape[1]] = identity_signs()
    return person, signs


def identity_signs() -> np.ndarray:
    """Return the sign [I] that mirroring gives each component of identity: each is symmetric or antisymmetric."""
    head = load_embedded_head()
    basis = head.identity_basis.view(head.num_identity, -1, 3)
    mirrored = basis[:, head.mirror] * torch.tensor([-1.0, 1.0, 1.0])
    share = (basis * mirrored).sum(dim=(1, 2)) / basis.square().sum(dim=(1, 2))
    return torch.where(share.abs() > PARITY, share.sign(), 0).numpy()


def measure_scales(data: Data) -> Scales:
    """Return the scales of a training set."""
    pose = estimator.pose_of_labels(data.labels)
    floors = (SMALLEST_STD, 1e-3, 1e-3)
    found = zip((data.expression, pose, data.person), floors)
    return Scales(*((x.mean(dim=0), x.std(dim=0).clamp(min=floor)) for x, floor in found))


class Model(torch.nn.Module):
    """The regressor, and the layer that tells a person's numbers from the embedding, which training alone needs."""

    def __init__(self, num_expression: int, num_person: int):
        super().__init__()
        self.regressor = estimator.Regressor(num_expression)
        self.reader = torch.nn.Linear(estimator.NUM_EMBEDDING, num_person)

    def forward(self, x):
        """Return standardised expression, pose and person of pictures [N, 3, 128, 128] in [-1, 1]."""
        expression, pose, embedding = self.regressor(x)
        return expression, pose, self.reader(embedding)


def batch_of(data: Data, mirror: Mirror, scales: Scales, numbers: torch.Tensor, flips: torch.Tensor):
    """Return pictures [N, 3, 128, 128] in [0, 1] and standardised targets; those of `flips` [N] mirrored in all."""
    images = data.images[numbers].float() / 255
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    expression, labels, person = (x[numbers] for x in data[1:])
    expression = torch.where(flips[:, None], expression[:, mirror.expression], expression)
    # geometry.mirror changes the sign of some entries of a label: those that it changes in a label of ones.
    signs = torch.from_numpy(mirror_label(np.ones(labels.shape[1], dtype=np.float32))).to(labels.device)
    labels = torch.where(flips[:, None], labels * signs, labels)
    person = torch.where(flips[:, None], person * mirror.person, person)
    targets = (expression, estimator.pose_of_labels(labels), person)
    return images, [(x - mean) / std for x, (mean, std) in zip(targets, scales)]


def loss_of(model: Model, images: torch.Tensor, targets: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return the loss of pictures in [0, 1]; weight: [P] of a person's numbers, 0 for those not known."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        expression, pose, person = (x.float() for x in model(images * 2 - 1))
    return (
        EXPRESSION_WEIGHT * mse_loss(expression, targets[0]) + POSE_WEIGHT * smooth_l1_loss(pose, targets[1])
        + IDENTITY_WEIGHT * ((person - targets[2]).square() * weight).mean()
    )  # fmt: skip


class Run:
    """Training from its start or newest state to its end. All that is random comes from (seed, step)."""

    def __init__(self, out: pathlib.Path, train: Data, mirror: Mirror, settings: dict):
        self.train, self.mirror, self.settings = train, mirror, settings
        self.folder = out.with_name(out.name + '.run')
        self.scales = measure_scales(train)
        device = train.images.device
        torch.manual_seed(settings['seed'])
        self.model = Model(train.expression.shape[1], train.person.shape[1]).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.step, self.elapsed_s = 0, 0.0
        self.per_epoch = max(1, len(train.images) // settings['batch'])
        self.num_steps = settings['epochs'] * self.per_epoch

    def go_on(self) -> None:
        """Take the newest state of this run, where there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            found = load_newest(self.folder, lambda text: click.echo(f'Warning: {text}', err=True))
        except StateError as error:
            raise RunError(f'{self.folder}: {error}') from error
        if found is None:
            return
        path, state = found
        if state['settings'] != self.settings:
            found = state['settings']
            raise RunError(f'{path}: expected a state of the same settings, found {found}; remove {self.folder}')
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.step, self.elapsed_s = state['step'], state['elapsed_s']
        click.echo(f'Going on from step {self.step} of {self.num_steps}')

    def save(self) -> None:
        """Write a state."""
        save_state(self.folder, self.step, {
            'settings': self.settings, 'step': self.step, 'elapsed_s': self.elapsed_s,
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
        })  # fmt: skip

    def iterate(self) -> None:
        """Train to the end, with a state now and then."""
        begin = saved = time.monotonic()
        before, total = self.elapsed_s, None
        bar = tqdm(range(self.step, self.num_steps), 'steps', initial=self.step, total=self.num_steps, delay=1)
        for self.step in bar:
            loss = self._one_step()
            total = loss if total is None else total.lerp(loss, 0.02)
            now = time.monotonic()
            self.elapsed_s = before + now - begin
            if now - saved > STATE_EVERY_S:
                bar.set_postfix_str(f'loss {float(total):.3f}')
                self.step += 1
                self.save()
                saved = now
        self.step = self.num_steps

    def _one_step(self):
        device, batch = self.train.images.device, self.settings['batch']
        random = torch.Generator(device).manual_seed((self.settings['seed'] << 32) + self.step)
        epoch, place = divmod(self.step, self.per_epoch)
        order = np.random.default_rng([self.settings['seed'], epoch]).permutation(len(self.train.images))
        numbers = torch.from_numpy(order[place * batch : (place + 1) * batch]).to(device)
        flips = torch.rand(len(numbers), generator=random, device=device) < 0.5
        images, targets = batch_of(self.train, self.mirror, self.scales, numbers, flips)
        for group in self.optimizer.param_groups:
            group['lr'] = LEARNING_RATE * rate(self.step / self.num_steps)
        self.model.train()
        loss = loss_of(self.model, jitter.jitter(images, random), targets, self.mirror.person.abs())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def rate(done: float) -> float:
    """Return the factor on the learning rate: up over the first twentieth, then down along a cosine."""
    return min(done / WARM_UP, 1.0) * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def predictions(model: Model, scales: Scales, images: torch.Tensor) -> list[torch.Tensor]:
    """Return expression, pose and person of pictures, and their embeddings [N, 64]."""
    model.eval()
    parts = []
    for chunk in images.split(LOADED):
        expression, pose, embedding = model.regressor(chunk.float() / 127.5 - 1)
        parts.append((expression, pose, model.reader(embedding), embedding))
    *numbers, embedding = (torch.cat(x) for x in zip(*parts))
    return [x * std + mean for x, (mean, std) in zip(numbers, scales)] + [embedding]


def validate(model: Model, scales: Scales, data: Data, names: tuple[str, ...], num_identity: int) -> dict:
    """Return the errors on pictures that were not trained on: aed, apd, those of each expression, R² of shape."""
    expression, pose, person, _ = predictions(model, scales, data.images)
    true_pose = estimator.pose_of_labels(data.labels)
    shape, true_shape = person[:, :num_identity], data.person[:, :num_identity]
    spread = true_shape - true_shape.mean(dim=0)
    by_name = (expression - data.expression).square().mean(dim=0).sqrt()
    correlation = [float(torch.corrcoef(torch.stack([a, b]))[0, 1]) for a, b in zip(expression.T, data.expression.T)]
    errors = {
        'num_pictures': len(data.images),
        'aed': float((expression - data.expression).square().mean(dim=1).sqrt().mean()),
        'aed_of_the_mean': float((data.expression - scales.expression[0]).square().mean(dim=1).sqrt().mean()),
        'apd': float((pose - true_pose).square().mean(dim=1).sqrt().mean()),
        'pose_deg': {name: math.degrees(x) for name, x in
                     zip(estimator.POSE_NAMES, (pose - true_pose).abs().mean(dim=0).tolist(), strict=True)},
        'shape_r2': float(1 - (shape - true_shape).square().sum() / spread.square().sum()),
        'expression_rmse': dict(zip(names, by_name.tolist(), strict=True)),
        'expression_correlation': {name: x if math.isfinite(x) else None for name, x in zip(names, correlation)},
    }  # fmt: skip
    return errors


def write(out: pathlib.Path, run: Run, names: tuple[str, ...], errors: dict) -> None:
    """Write the file of weights."""
    embedding = predictions(run.model, run.scales, run.train.images)[-1]
    numbers = [x.cpu().numpy() for pair in run.scales[:2] for x in pair]
    scaling = estimator.Scaling(*numbers, embedding.mean(dim=0).cpu().numpy())
    about = {
        'name': f'regressor trained on {len(run.train.images)} drawn people', 'expression_names': names,
        'errors': errors, 'settings': run.settings, 'seconds': round(run.elapsed_s, 1),
    }  # fmt: skip
    with atomic_path(out) as temporary, open(temporary, 'wb') as file:
        estimator.save_estimator(file, run.model.regressor, scaling, about)


def table(errors: dict) -> str:
    """Return errors in a few lines."""
    worst = sorted(errors['expression_rmse'], key=errors['expression_rmse'].get, reverse=True)
    shown = ('jawOpen', 'eyeBlinkLeft', 'mouthSmileLeft', 'browInnerUp', 'mouthPucker', *worst[:4])
    lines = [
        f'{errors["num_pictures"]} pictures of other people',
        f'aed   {errors["aed"]:.4f}   (always saying the mean: {errors["aed_of_the_mean"]:.4f})',
        f'apd   {errors["apd"]:.4f} rad; ' + ', '.join(f'{k} {x:.2f} deg' for k, x in errors['pose_deg'].items()),
        f'shape {errors["shape_r2"]:.3f} of the variance',
        f'{"expression":22s}{"rmse":>8s}{"corr":>8s}',
    ]
    for name in dict.fromkeys(shown):
        correlation = errors['expression_correlation'][name]
        lines.append(f'{name:22s}{errors["expression_rmse"][name]:8.3f}'
                     f'{"-" if correlation is None else format(correlation, ".3f"):>8s}')  # fmt: skip
    return '\n'.join(lines)


@click.command(cls=cli.Command)
@cli.option('data', metavar='DIR', type=cli.PathText(), required=True, help='Written by make_dataset.py --packed.')
@cli.option('out', metavar='PATH', type=cli.PathText(), required=True,
            help='Weights to write (.npz); states of the run in PATH.run.')
@cli.option('epochs', metavar='N', type=click.IntRange(1, 10_000), default=60, show_default=True,
            help='How often each picture is seen.')
@cli.option('batch', metavar='N', type=click.IntRange(2, 65536), default=256, show_default=True,
            help='Pictures of a step.')
@cli.option('seed', metavar='N', type=click.IntRange(0, 2**31 - 1), default=0, show_default=True,
            help='Seed of everything random.')
@cli.option('device', metavar='DEVICE', type=cli.Device(), default='auto', show_default=True, help='cpu, cuda, cuda:N.')
@cli.option('workers', metavar='N', type=click.IntRange(1, 256), default=16, show_default=True,
            help='Threads that read pictures.')
def main(data, out, epochs, batch, seed, device, workers):
    """Write an estimator with its errors on the last pictures, which it was not trained on, and print them.

    The same command goes on after an interruption.
    """
    out, path = pathlib.Path(out).expanduser(), pathlib.Path(data).expanduser()
    if out.suffix != '.npz':
        raise click.UsageError(f'--out: expected a name that ends in .npz, got {out}.')
    content, mirror, names = load_data(path, device, workers)
    count = len(content.images)
    held = min(MAX_VALIDATION, max(1, round(count * VALIDATION)))
    if count - held < batch:
        raise click.UsageError(f'--batch={batch}: expected at most the {count - held} pictures that are trained on.')
    train, valid = Data(*(x[: count - held] for x in content)), Data(*(x[count - held :] for x in content))
    manifest = json.loads((path / 'manifest.json').read_text(encoding='utf-8'))
    settings = {'epochs': epochs, 'batch': batch, 'seed': seed, 'data': manifest['sha256']}
    out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(out, train, mirror, settings)
    run.go_on()
    run.iterate()
    run.save()
    errors = validate(run.model, run.scales, valid, names, load_embedded_head().num_identity)
    with cli.naming(out):
        write(out, run, names, errors)
    click.echo(table(errors))
    click.echo(f'Wrote {out} ({out.stat().st_size / 1e6:.1f} MB) after {run.elapsed_s:.0f} s of training')


if __name__ == '__main__':
    main()
