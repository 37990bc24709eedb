# SPDX-License-Identifier: Apache-2.0
"""Access to the numbers of the published implementation, and the comparison with them."""

import contextlib
import importlib.util
import json
import os
import pathlib
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
# All files: where the project's shared folder lies beside the checkout, or where the variable says.
FULL = pathlib.Path(os.environ.get('NEXT3D_PARITY_DIR', ROOT.parent / 'shared' / 'parity'))
SUBSET = ROOT / 'tests' / 'data' / 'parity'  # What every clone has.

# Largest deviation over the root mean square of the reference: a few times the reference's own noise floor.
# Steps of Adam: entries whose gradients are small, and nearly all rounding, move as far as the others do.
# The last two: what double precision differs by from the record itself, which was summed in single precision. 'sum':
# 1.4e-4 (a weight's gradient over all pixels of four 512² pictures); 'R1 bias': 1.8e-3 for nine of ten, 6.4e-3 at most
# (R1 reaches biases of a discriminator through minibatch std alone), some times that in Adam's steps, which divide by
# the gradient's size. Nearer to the record is luck of the processor.
TOLERANCE = {
    'exact': 0.0, 'op': 2e-6, 'network': 1e-5, 'image': 5e-5, 'gradient': 1e-4, 'step': 5e-4,
    'sum': 3e-4, 'R1 bias': 1e-2,
}  # fmt: skip
deviations: dict[str, tuple[float, str]] = {}


def golden_recipe():
    """Return the module that regenerates weights, inputs and draws of the parity files."""
    path = (FULL if FULL.is_dir() else SUBSET) / 'golden_recipe.py'
    spec = importlib.util.spec_from_file_location('golden_recipe', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = golden_recipe()


def parity_file(name: str) -> pathlib.Path:
    """Return a parity file, from the full set or the subset of the clone; skip the test where neither has it."""
    for folder in (FULL, SUBSET):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f'{name} is not in the subset that a bare clone has (tests/data/parity)')


def load(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Return description and arrays of a parity file."""
    info = json.loads(parity_file(f'{name}.json').read_text())
    with np.load(parity_file(f'{name}.npz')) as arrays:
        return info, dict(arrays)


def rnd(tag, shape, seed, scale=1.0):
    """Return the recipe's input tensor of a tag."""
    return torch.from_numpy(np.asarray(recipe.rnd(tag, tuple(shape), seed, scale)))


def uniform_seq(shape):
    """Return the recipe's stand-in for uniform draws."""
    return torch.from_numpy(recipe.uniform_seq(tuple(shape)))


def normal_seq(shape):
    """Return the recipe's stand-in for normal draws."""
    return torch.from_numpy(recipe.normal_seq(tuple(shape)))


@contextlib.contextmanager
def sequence_draws():
    """Replace torch.rand and torch.randn by the recipe's functions of the shape."""

    def shape_of(args):
        return list(args[0]) if len(args) == 1 and not isinstance(args[0], int) else list(args)

    rand = mock.patch.object(torch, 'rand', lambda *a, **_: uniform_seq(shape_of(a)))
    randn = mock.patch.object(torch, 'randn', lambda *a, **_: normal_seq(shape_of(a)))
    with rand, randn:
        yield


def table_weights(table: list[dict], seed: int) -> dict[str, torch.Tensor]:
    """Return the random tensors of a table of weights by name."""
    return {
        e['name']: torch.from_numpy(recipe.weight(e['name'], e['shape'], e['loc'], e['scale'], seed))
        for e in table
        if e['kind'] != 'derived'
    }


def fill(network: torch.nn.Module, table: list[dict], seed: int, ignore: tuple[str, ...] = ()) -> torch.nn.Module:
    """Give a network the weights of a table; names and shapes must be the same on both sides, `ignore` apart."""
    own = {name: list(t.shape) for name, t in network.state_dict().items() if name not in ignore}
    assert own == {e['name']: e['shape'] for e in table if e['name'] not in ignore}
    network.load_state_dict(table_weights(table, seed), strict=False)
    derived = {e['name']: e['sha256'] for e in table if e['kind'] == 'derived' and e['name'] not in ignore}
    for name, tensor in network.state_dict().items():
        if name in derived:
            assert recipe.sha(tensor.numpy()) == derived[name], name
    return network.requires_grad_(True)


def agrees(part: str, actual, expected, kind: str) -> None:
    """Assert that a tensor equals the reference to the tolerance of its kind, and note the deviation for docs."""
    actual = np.asarray(actual.detach().cpu() if isinstance(actual, torch.Tensor) else actual, dtype=np.float64)
    expected = np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, f'{part}: shape {actual.shape}, expected {expected.shape}'
    scale = max(np.sqrt(np.mean(np.square(expected))), 1e-30)
    deviation = float(np.abs(actual - expected).max(initial=0) / scale)
    allowed = TOLERANCE[kind]
    assert deviation <= allowed, f'{part}: deviates by {deviation:.2e} of its scale, allowed {allowed:.0e}'
    deviations[part] = (max(deviation, deviations.get(part, (0.0, kind))[0]), kind)


def last_bits_moved(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a float32 tensor whose entries are a unit in the last place away, or not; the tensor itself for seed 0."""
    if seed == 0:
        return x
    steps = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(steps == 0, x, torch.nextafter(x, steps * torch.inf))


def agrees_in_some_rounding(check) -> None:
    """Assert that a comparison of gradients holds for the inputs or with their last bits moved: `check` gets the seed.

    One pre-activation that lies within rounding of a leaky ReLU's kink changes the gradients of all pixels it sees by
    up to a percent; on which side it falls depends on the convolution library and the processor. That is no
    disagreement, and moved last bits show it: such a gradient agrees for some of them, a wrong one for none.
    """
    for seed in range(8):
        try:
            return check(seed)
        except AssertionError:
            if seed == 7:
                raise
