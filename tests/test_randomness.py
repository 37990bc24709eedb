# SPDX-License-Identifier: Apache-2.0
"""Draws that belong to samples."""

import pytest
import torch

from torch_utils import randomness
from torch_utils.randomness import normal, sample_draws, uniform


def draw(samples, seed=1, phase='Gmain'):
    with sample_draws(seed, phase, samples):
        return uniform([len(samples), 5, 7]), normal([3 * len(samples), 11]), uniform([len(samples), 1])


def test_splitting_a_batch_changes_nothing():
    whole = draw([4, 5, 6, 7])
    parts = [draw([4, 5]), draw([6, 7])]
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)


def test_draws_differ_by_seed_phase_sample_and_number():
    reference = draw([0, 1])[0]
    assert not torch.equal(reference[0], reference[1])
    for other in (draw([0, 1], seed=2), draw([0, 1], phase='Dmain'), draw([2, 3])):
        assert not torch.equal(other[0], reference)
    with sample_draws(1, 'Gmain', [0]):
        assert not torch.equal(uniform([1, 9]), uniform([1, 9]))


def test_distributions():
    with sample_draws(3, 'x', range(8)):
        u, n = uniform([8, 50_000]).double(), normal([8, 50_000]).double()
    assert 0 <= u.min() and u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=2e-3) and u.var().item() == pytest.approx(1 / 12, abs=1e-3)
    assert n.mean().item() == pytest.approx(0, abs=5e-3) and n.var().item() == pytest.approx(1, abs=1e-2)
    assert (n**4).mean().item() == pytest.approx(3, abs=0.1)
    histogram = torch.histc(u, 64, 0, 1) / u.numel() * 64
    assert (histogram - 1).abs().max() < 0.06
    neighbours = torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]
    samples = torch.corrcoef(u)
    assert neighbours.abs() < 0.01 and (samples - torch.eye(8)).abs().max() < 0.02


def test_scalars_and_bad_shapes():
    with sample_draws(0, 'x', [3, 4]):
        assert uniform([]).shape == ()
        with pytest.raises(ValueError, match='multiple of 2 samples'):
            uniform([3, 2])


def test_outside_the_block_torch_draws():
    torch.manual_seed(5)
    expected = torch.rand([2, 3])
    torch.manual_seed(5)
    assert torch.equal(uniform([2, 3]), expected)


@pytest.mark.parametrize('is_normal', [False, True])
def test_fused_draws_are_the_same_bits(is_normal):
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip('triton')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    keys = torch.tensor([3, -5, 2**62], device=device)
    arguments = (keys, randomness._wrap(7 * randomness.GOLDEN), 1500, is_normal)
    fused, plain = randomness._draw_fused(*arguments), randomness._draw(*arguments)
    assert torch.allclose(fused, plain, rtol=1e-5, atol=1e-6) and fused.std() > 0.2
    assert is_normal or torch.equal(fused, plain)
