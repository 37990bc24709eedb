# SPDX-License-Identifier: Apache-2.0
"""Adaptive augmentation: matrices worked by hand, their distributions, pictures against torch's own operations."""

import math

import pytest
import torch
from torch.nn.functional import pad

from torch_utils.randomness import sample_draws, uniform
from training import augment
from training.augment import COLOUR_TRANSFORMS, AugmentPipe, Draws, compose, compose_inverse, geometric_transforms

SIZE = 32
EXACT = 1e-5  # Rounding of positions in float32.
KEPT = 4  # Pixels from the edge that mirrored tails of the filter reach noticeably.


@pytest.fixture(autouse=True)
def _serial(one_thread):
    torch.manual_seed(0)


def value(number):
    return torch.tensor([float(number)])


def moved(matrix, *point):
    return (matrix[0] @ torch.tensor([*point, 1.0]))[:-1].tolist()


def waves(wavelength=16.0, size=SIZE):
    """Three different smooth channels without symmetries, [1, 3, size, size]."""
    y, x = torch.meshgrid(*[torch.arange(size) * (2 * math.pi / wavelength)] * 2, indexing='ij')
    return torch.stack([(x + 0.3 * y).sin(), (y - 0.5 * x + 1).cos(), (x + 2).sin() * y.cos()])[None]


def inside(x, margin=KEPT):
    return x[..., margin:-margin, margin:-margin]


def parameters(transforms, p, count=20_000):
    return augment.choose_parameters(transforms, Draws.sample(count, len(transforms)), p)


def test_filter_is_orthonormal_to_its_even_shifts():
    f = torch.tensor(augment.SYM6, dtype=torch.float64)
    assert len(f) == 12 and f.sum().item() == pytest.approx(math.sqrt(2), abs=1e-12)
    products = [(f[2 * n :] * f[: 12 - 2 * n]).sum().item() for n in range(6)]
    assert products == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    taps = torch.arange(12)
    for moment in range(6):  # sym6 has six vanishing moments of its high-pass filter
        assert ((-1.0) ** taps * (taps / 11) ** moment * f).sum().item() == pytest.approx(0, abs=1e-8)
    centre = (f * taps).sum() / f.sum()
    assert centre.item() == pytest.approx(augment.TAPS_BEFORE, abs=0.1)


@pytest.mark.parametrize(
    ('matrix', 'expected'),
    [
        (augment.flip(value(1)), (-2, 3)),
        (augment.quarter_turn(value(1)), (-3, 2)),
        (augment.quarter_turn(value(2)), (-2, -3)),
        (augment.rotate(value(math.pi / 4)), (-1 / math.sqrt(2), 5 / math.sqrt(2))),
        (augment.translate(value(5), value(-7)), (7, -4)),
        (augment.scale(value(1)), (4, 6)),
        (augment.stretch(value(-1)), (1, 6)),
    ],
)
def test_geometric_matrices(matrix, expected):
    assert matrix.shape == (1, 3, 3)
    assert moved(matrix, 2.0, 3.0) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ('matrix', 'expected'),
    [
        (augment.brightness(value(0.25)), (0.35, 0.55, 0.85)),
        (augment.contrast(value(-1)), (0.05, 0.15, 0.3)),
        (augment.luma_flip(value(1)), (0.1 - 2 / 3, 0.3 - 2 / 3, 0.6 - 2 / 3)),
        (augment.luma_flip(value(0)), (0.1, 0.3, 0.6)),
        (augment.hue(value(2 * math.pi / 3)), (0.6, 0.1, 0.3)),
        (augment.hue(value(-2 * math.pi / 3)), (0.3, 0.6, 0.1)),
        (augment.saturation(value(-100)), (1 / 3, 1 / 3, 1 / 3)),
        (augment.saturation(value(1)), (0.2 - 1 / 3, 0.6 - 1 / 3, 1.2 - 1 / 3)),
    ],
)
def test_colour_matrices(matrix, expected):
    assert matrix.shape == (1, 4, 4)
    assert moved(matrix, 0.1, 0.3, 0.6) == pytest.approx(expected, abs=1e-6)


def test_colour_matrices_keep_what_they_should():
    angles = torch.linspace(-3, 3, 7)
    colours = torch.rand(7, 3, 1)
    for matrix in (augment.hue(angles), augment.saturation(angles)):
        torch.testing.assert_close((matrix[:, :3, :3] @ colours).mean(1), colours.mean(1))
    turned = augment.hue(angles)[:, :3, :3]
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand(7, 3, 3))
    twice = augment.luma_flip(torch.ones(1))
    torch.testing.assert_close(twice @ twice, torch.eye(4)[None])


def test_all_parameters_0_are_the_identity():
    for transforms, side in ((geometric_transforms(SIZE), 3), (COLOUR_TRANSFORMS, 4)):
        matrices = compose(transforms, [torch.zeros(2, 2)] * len(transforms))
        torch.testing.assert_close(matrices, torch.eye(side).expand(2, side, side))


def test_order_and_inverse():
    transforms = geometric_transforms(SIZE)
    values = [torch.zeros(1, 2) for _ in transforms]
    values[1][:] = 1  # a quarter turn clockwise, then 5 right and 5 down
    values[2][:] = 5
    assert moved(compose(transforms, values), 2.0, 3.0) == pytest.approx((-3 + 5, 2 + 5), abs=1e-5)
    values = parameters(transforms, 1.0, count=50)
    product = compose(transforms, values) @ compose_inverse(transforms, values)
    torch.testing.assert_close(product, torch.eye(3).expand(50, 3, 3), atol=1e-4, rtol=0)
    brighter_then_contrast = [value(v)[None].expand(1, 2) for v in (0.5, 1, 0, 0, 0)]
    assert moved(compose(COLOUR_TRANSFORMS, brighter_then_contrast), 0.0, 0.1, 0.2) == pytest.approx((1, 1.2, 1.4))


@pytest.mark.parametrize('p', [0.3, 1.0, 1.5])
def test_each_transform_is_applied_with_its_probability(p):
    geometric, often = geometric_transforms(256), min(p, 1)
    rotated = 1 - math.sqrt(1 - often)
    # The identity is one of the two flips and of the four turns.
    expected = [often / 2, often * 3 / 4, often, often, rotated, often, rotated, often]
    values = parameters(geometric, p)
    applied = [(t.matrix(*v.unbind(1)[: t.parameters]) != torch.eye(3)).flatten(1).any(1)
               for t, v in zip(geometric, values, strict=True)]  # fmt: skip
    assert [a.float().mean().item() for a in applied] == pytest.approx(expected, abs=0.015)
    assert (applied[4] | applied[6]).float().mean().item() == pytest.approx(often, abs=0.015)
    values = parameters(COLOUR_TRANSFORMS, p)
    frequencies = [(v[:, 0] != 0).float().mean().item() for v in values]
    assert frequencies == pytest.approx([often, often, often / 2, often, often], abs=0.015)


def test_transforms_are_independent():
    transforms = geometric_transforms(SIZE) + COLOUR_TRANSFORMS
    values = parameters(transforms, 0.5)
    used = torch.cat([v[:, : t.parameters] for t, v in zip(transforms, values, strict=True)], dim=1)
    assert (torch.corrcoef(used.T) - torch.eye(used.shape[1])).abs().max() < 0.04
    assert torch.corrcoef(torch.stack([v[:, 0] != 0 for v in values]).float()).triu(1).abs().max() < 0.04


def test_strengths():
    size = 256
    values = parameters(geometric_transforms(size), 1.0)
    flips, turns, whole, log2, first, stretch, second, shift = values
    assert flips.unique().tolist() == [0, 1] and turns.unique().tolist() == [0, 1, 2, 3]
    assert torch.equal(whole, whole.round()) and whole.abs().max() == size / 8
    assert whole.std().item() == pytest.approx(size / 4 / math.sqrt(12), rel=0.03)
    for angle in (first, second):
        assert angle.abs().max() <= math.pi and angle.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.03)
    for logs in (log2, stretch):
        assert (logs * math.log(2)).std().item() == pytest.approx(0.2 * math.log(2), rel=0.03)
    assert shift.std().item() == pytest.approx(0.125 * size, rel=0.03)
    bright, contrast, _, hue, saturation = parameters(COLOUR_TRANSFORMS, 1.0)
    assert [v.std().item() for v in (bright, contrast, saturation)] == pytest.approx([0.2, 0.5, 1.0], rel=0.03)
    assert hue.abs().max() <= math.pi and hue.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.03)
    for v in (bright, contrast, hue, saturation, shift, log2):
        assert v.mean().abs() < 0.03 * v.std()


def test_the_identity_keeps_pictures():
    noise, source = torch.rand(2, 4, SIZE, SIZE) * 2 - 1, torch.eye(3).expand(2, 3, 3)
    out = augment.resample(noise, source)
    assert out.shape == noise.shape
    assert inside(out - noise, 3).abs().max() < EXACT
    assert (out - noise).abs().max() < 0.6  # the last two pixels see mirrored, so reversed, tails of the filter
    assert (augment.resample(waves(), source[:1]) - waves()).abs().max() < 0.03


@pytest.mark.parametrize(('right', 'down'), [(3, -2), (-4, 0), (1, 4)])
def test_whole_pixels_are_moved_exactly(right, down):
    noise = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    out = augment.resample(noise, augment.translate(value(-right), value(-down)))
    expected = noise.roll((down, right), (2, 3))
    assert inside(out - expected, 8).abs().max() < EXACT
    mirrored = pad(noise, (5,) * 4, mode='reflect')[..., 5 - down :, 5 - right :][..., :SIZE, :SIZE]
    assert (out - mirrored).abs().max() < 0.6  # likewise
    smooth = pad(waves(), (5,) * 4, mode='reflect')[..., 5 - down :, 5 - right :][..., :SIZE, :SIZE]
    out = augment.resample(waves(), augment.translate(value(-right), value(-down)))
    assert (out - smooth).abs().max() < 0.06


# The filter is not quite symmetric: a reversed direction is off by a tenth of a pixel, 0.04 on waves of 16 pixels.
@pytest.mark.parametrize(
    ('matrix', 'operation'),
    [
        (augment.flip(value(1)), lambda x: x.flip(3)),
        (augment.quarter_turn(value(1)), lambda x: x.rot90(-1, (2, 3))),
        (augment.quarter_turn(value(2)), lambda x: x.rot90(2, (2, 3))),
        (augment.quarter_turn(value(3)), lambda x: x.rot90(1, (2, 3))),
    ],
)
def test_flips_and_turns_are_those_of_torch(matrix, operation):
    for wavelength, tolerance in ((16.0, 0.08), (64.0, 0.02)):
        x = waves(wavelength)
        out = augment.resample(x, torch.linalg.inv(matrix))
        assert (out - operation(x)).abs().max() < tolerance
        assert (out - x).abs().max() > 0.5
    noise = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    off = (augment.resample(noise, torch.linalg.inv(matrix)) - operation(noise)).square().mean().sqrt()
    assert off < 0.16  # of 0.58 in the noise


def test_a_rotation_about_the_centre():
    angle = 0.5
    out = augment.resample(waves(), augment.rotate(value(-angle)))
    k, centre = 2 * math.pi / 16, (SIZE - 1) / 2
    y, x = torch.meshgrid(*[torch.arange(SIZE) - centre] * 2, indexing='ij')
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    expected = (k * ((u + centre) + 0.3 * (v + centre))).sin()
    assert inside(out[0, 0] - expected, 10).abs().max() < 0.06


def test_no_place_is_empty_and_constants_stay():
    transforms = geometric_transforms(SIZE)
    sources = compose_inverse(transforms, parameters(transforms, 1.0, count=32))
    out = augment.resample(torch.full([32, 1, SIZE, SIZE], 0.7), sources)
    torch.testing.assert_close(out, torch.full_like(out, 0.7))
    far = augment.translate(value(20.5 * SIZE), value(-1e4)) @ augment.scale(value(5))
    assert augment.resample(waves(), far).abs().max() < 2


def test_probability_0_returns_the_input():
    x = waves().repeat(1, 2, 1, 1)
    assert AugmentPipe()(x) is x
    pipe = AugmentPipe(1.0)
    assert not torch.allclose(pipe(x), x, atol=0.1)
    pipe.p = 0.0
    assert pipe(x) is x


def test_as_many_numbers_are_drawn_at_any_probability():
    following = []
    for p in (0.0, 0.4, 1.0):
        with sample_draws(0, 'Dmain', [7]):
            AugmentPipe(p)(torch.zeros(1, 6, 8, 8))
            following.append(uniform([1, 3]))
    assert torch.equal(following[0], following[1]) and torch.equal(following[0], following[2])


def test_splitting_a_batch_changes_nothing():
    pipe, x = AugmentPipe(0.6), torch.rand(4, 9, SIZE, SIZE)
    with sample_draws(1, 'Gmain', range(4)):
        whole = pipe(x)
    halves = []
    for samples in ([0, 1], [2, 3]):
        with sample_draws(1, 'Gmain', samples):
            halves.append(pipe(x[samples]))
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-6, rtol=0)
    with sample_draws(1, 'Gmain', [2, 3]):
        assert not torch.allclose(pipe(x[:2]), halves[0], atol=0.1)


def test_channels_of_a_sample_change_alike_and_renderings_keep_their_colours():
    x = waves().expand(8, 3, SIZE, SIZE)
    with sample_draws(2, 'Gmain', range(8)):
        out = AugmentPipe(0.5)(torch.cat([x, x, x], dim=1))
    torch.testing.assert_close(out[:, :3], out[:, 3:6])
    transforms = geometric_transforms(SIZE)
    with sample_draws(2, 'Gmain', range(8)):
        draws = Draws.sample(8, len(transforms) + len(COLOUR_TRANSFORMS))
    geometry, colour = draws.split(len(transforms))
    sources = compose_inverse(transforms, augment.choose_parameters(transforms, geometry, 0.5))
    torch.testing.assert_close(out[:, 6:], augment.resample(x, sources))
    matrices = compose(COLOUR_TRANSFORMS, augment.choose_parameters(COLOUR_TRANSFORMS, colour, 0.5))
    pixels = torch.cat([out[:, 6:], torch.ones(8, 1, SIZE, SIZE)], dim=1)
    expected = torch.einsum('nij,njhw->nihw', matrices, pixels)[:, :3]
    torch.testing.assert_close(out[:, :3], expected)
    assert (out[:, :3] - out[:, 6:]).abs().max() > 0.5


def test_samples_change_differently():
    out = AugmentPipe(1.0, colour_channels=3)(waves().expand(4, 3, SIZE, SIZE))
    assert min((out[i] - out[j]).abs().mean() for i in range(4) for j in range(i)) > 0.05


def test_half_precision_is_computed_in_float32():
    pipe, x = AugmentPipe(1.0, colour_channels=3), waves().half()
    outs = []
    for picture in (x, x.float()):
        with sample_draws(0, 'Gmain', [0]):
            outs.append(pipe(picture))
    assert outs[0].dtype == torch.float16 and torch.equal(outs[0], outs[1].half())


def augmented(pictures):
    with sample_draws(3, 'Gmain', [0, 1]):
        return AugmentPipe(1.0)(pictures)


def test_gradients():
    x, direction, weights = torch.randn(3, 2, 6, 16, 16).unbind()
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad((augmented(x) * weights).sum(), x)
    # The pipe is affine in its pictures, so differences are derivatives for steps of any length.
    expected = (weights * (augmented(x + direction) - augmented(x))).sum()
    assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason='older grid_sample has no second derivatives')
def test_gradients_of_gradients():
    x, direction = torch.randn(2, 2, 6, 16, 16).unbind()
    x.requires_grad_(True)

    def gradient(pictures):  # of a squared norm: it is affine in the pictures
        return torch.autograd.grad(augmented(pictures).square().sum(), pictures, create_graph=True)[0]

    (second,) = torch.autograd.grad((gradient(x) * direction).sum(), x)
    torch.testing.assert_close(second, (gradient(x + direction) - gradient(x)).detach(), atol=2e-3, rtol=2e-3)


def test_bad_arguments():
    for channels in (0, 4):
        with pytest.raises(ValueError, match='colour_channels'):
            AugmentPipe(colour_channels=channels)
    for shape in ([1, 3, 8, 8], [1, 6, 8, 16]):
        with pytest.raises(ValueError, match='images'):
            AugmentPipe()(torch.zeros(shape))


@pytest.mark.gpu
def test_the_host_does_not_wait_and_devices_agree():
    x = waves().repeat(2, 2, 1, 1)
    pipe, on_device = AugmentPipe(1.0), x.cuda()
    with sample_draws(0, 'Gmain', [0, 1]):
        expected = pipe(x)
    with sample_draws(0, 'Gmain', [0, 1]):
        torch.testing.assert_close(pipe(on_device).cpu(), expected, atol=1e-3, rtol=0)
    on_device.requires_grad_(True)
    torch.cuda.set_sync_debug_mode('error')
    try:
        pipe(on_device).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert on_device.grad.isfinite().all()
