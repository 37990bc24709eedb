# SPDX-License-Identifier: Apache-2.0
"""Schedules as functions of the images shown."""

import parity
import pytest

from training import schedules


def test_fades():
    assert schedules.blur_sigma(0, 10, 200, 32) == 10
    assert schedules.blur_sigma(100_000, 10, 200, 32) == pytest.approx(5)
    assert schedules.blur_sigma(5000, 10, 200, 2) == pytest.approx(6)
    assert schedules.blur_sigma(1e9, 10, 200, 32) == schedules.blur_sigma(0, 10, 0, 32) == 0
    assert schedules.swap_probability(0, 0.5, 1000) == 1
    assert schedules.swap_probability(500_000, 0.5, 1000) == pytest.approx(0.75)
    assert schedules.swap_probability(0, 0.5, 0) == schedules.swap_probability(2e6, 0.5, 1000) == 0.5


def test_rendering_resolution_fades_in_whole_pixels():
    sides = [schedules.rendering_resolution(n * 1000, 64, 128, 1000) for n in range(0, 1001, 50)]
    assert sides[0] == 64 and sides[10] == 96 and sides[-1] == 128 and sides == sorted(sides)
    assert schedules.rendering_resolution(10**9, 64, None, 1000) == 64


def test_average_has_the_published_half_life():
    assert schedules.ema_beta(10**9, 32, 0.05) == pytest.approx(0.5 ** (32 / 10_000))
    assert schedules.ema_beta(10**9, 64, None) == schedules.ema_beta(0, 64, None) == pytest.approx(0.5 ** (32 / 10_000))
    assert schedules.ema_beta(0, 32, 0.05) == 0


def test_average_and_adam_are_those_of_the_published_iteration():
    info, _ = parity.load('train_step')
    ema = info['ema']
    assert schedules.ema_beta(ema['cur_nimg'], 2, ema['ema_rampup']) == pytest.approx(ema['beta'])
    for phase, lr, interval in (('Gmain', 0.0025, 4), ('Dmain', 0.002, 16)):
        rate, betas = schedules.lazy_adam(lr, (0.0, 0.99), interval)
        assert rate == pytest.approx(info['sequence'][phase]['lr'])
        assert betas == pytest.approx(info['sequence'][phase]['betas'])
    assert schedules.lazy_adam(0.002, (0, 0.99), None) == (0.002, (0, 0.99))


def test_augmentation_probability_walks_towards_its_target():
    p = schedules.augment_probability(0.2, 0.9, 0.6, 4 * 32, 500)
    assert p == pytest.approx(0.2 + 128 / 500_000)
    assert schedules.augment_probability(0.2, 0.1, 0.6, 4 * 32, 500) == pytest.approx(0.2 - 128 / 500_000)
    assert schedules.augment_probability(0.0, 0.1, 0.6, 128, 500) == 0
    assert schedules.augment_probability(0.2, float('nan'), 0.6, 128, 500) == 0.2
