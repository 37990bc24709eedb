# SPDX-License-Identifier: Apache-2.0
"""What the phases hand to the discriminator and to the caller; the numbers are tests/test_parity_training.py's."""

import functools

import pytest
import torch
from helpers import HEAD, TINY
from simple_head import DEMO_HEAD, simple_head, uv_face_mask
from torch.nn.functional import softplus

from geometry import cameras
from torch_utils.randomness import sample_draws
from training.config import DiscriminatorConfig, MappingConfig, Next3DConfig
from training.discriminator import Discriminator
from training.generator import Next3DGenerator
from training.loss import GeneratorInput, LossConfig, Next3DLoss, RealInput
from training.mesh_render import MeshRenderer
from training.superresolution import resize_antialiased
from training.volume.render import SamplingConfig

SIZE, RAW_SIZE, RENDER_SIZE = 128, 6, 32
GENERATOR = dict(
    **TINY, **HEAD, neural_rendering_resolution=RAW_SIZE, sampling=SamplingConfig(num_depths=6, num_importance=5)
)
DISCRIMINATOR = dict(
    img_resolution=SIZE, channel_base=256, channel_max=6, num_fp16_res=0, mapping=MappingConfig(num_layers=2)
)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@functools.cache
def generator():
    head = simple_head()
    mask = torch.from_numpy(uv_face_mask()).float()[None, None] / 255
    return Next3DGenerator(Next3DConfig(**GENERATOR), head.faces, head.uvs, head.uv_faces, mask).train()


@functools.cache
def renderer():
    return MeshRenderer(generator().faces[0], generator().face_uvcoords[0], resolution=RENDER_SIZE)


def make_loss(
    render=True, kind='dual', augment=None, report=lambda name, values: None, track_w=None, eyeballs=(), **config
):
    discriminator = Discriminator(DiscriminatorConfig(**DISCRIMINATOR, kind=kind, render_channels=3 if render else 0))
    config = LossConfig(**dict(rendering_resolution_initial=RAW_SIZE, blur_init_sigma=0.0) | config)
    chosen = renderer() if render else None
    return Next3DLoss(generator(), discriminator, config, 32, augment, report, chosen, track_w, eyeballs)


def inputs():
    """A fake and a real micro-batch of two, whose labels and meshes all differ."""
    poses = torch.cat([cameras.look_at_pose(cameras.FRONTAL + yaw, cameras.FRONTAL) for yaw in (-0.4, -0.1, 0.2, 0.5)])
    c = cameras.make_label(poses, cameras.intrinsics())
    heads = simple_head(), simple_head(jaw_open=1.0), simple_head(**DEMO_HEAD), simple_head(smile=1.0, width=1.2)
    v = torch.stack([torch.cat([torch.tensor(h.vertices), torch.tensor(h.landmarks)]) for h in heads])
    image = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    return GeneratorInput(torch.randn(2, 8), c[:2], v[:2]), RealInput(image, c[2:], v[2:])


def record(loss):
    """Return the list that fills with what the discriminator gets to see."""
    seen = []
    loss.discriminator.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    return seen


# ---- Renderings


def test_everything_is_judged_with_the_rendering_of_its_own_mesh_and_label():
    loss = make_loss()
    seen = record(loss)
    fake, real = inputs()
    loss.generator_main(fake, 1.0, nimg=0)  # At image 0 the generator is conditioned on the other sample's label.
    loss.discriminator_main(fake, real, 1.0, nimg=0)
    loss.discriminator_regularisation(real, 1.0, nimg=0)
    of_fakes, of_reals = renderer()(fake.v, fake.c), renderer()(real.v, real.c)
    for images, expected in zip(seen, (of_fakes, of_fakes, of_reals, of_reals), strict=True):
        assert torch.equal(images['render'], expected) and not images['render'].requires_grad
    assert not torch.equal(of_fakes[0], of_fakes[1])


def test_blur_leaves_the_rendering_sharp():
    loss = make_loss(blur_init_sigma=2.0)
    seen = record(loss)
    fake, real = inputs()
    loss.discriminator_main(fake, real, 1.0, nimg=0)
    assert torch.equal(seen[1]['render'], renderer()(real.v, real.c))
    assert seen[1]['image'].std() < 0.5 * real.image.std()


def test_augmentation_gets_all_pictures_at_one_size():
    received = []

    def augment(pictures):
        received.append(pictures)
        return pictures.flip(-1)

    loss = make_loss(augment=augment)
    seen = record(loss)
    fake, real = inputs()
    loss.discriminator_regularisation(real, 1.0, nimg=0)
    raw, render = resize_antialiased(real.image, RAW_SIZE), renderer()(real.v, real.c)
    expected = torch.cat([real.image, resize_antialiased(raw, SIZE), resize_antialiased(render, SIZE)], dim=1)
    torch.testing.assert_close(received[0], expected)
    assert torch.equal(seen[0]['image'], real.image.flip(-1))
    assert seen[0]['image_raw'].shape == raw.shape
    torch.testing.assert_close(seen[0]['render'], resize_antialiased(render, SIZE).flip(-1))
    loss = make_loss(render=False, augment=augment)
    loss.discriminator_main(fake, real, 1.0, nimg=0)
    assert [x.shape[1] for x in received] == [9, 6, 6]


@pytest.mark.parametrize('kind', ['dual', 'single'])
def test_the_gradient_penalty_leaves_the_rendering_out(kind):
    penalties = []
    loss = make_loss(kind=kind, report=lambda name, x: penalties.append(x) if name == 'Loss/r1_penalty' else None)
    _, real = inputs()
    weight = loss.discriminator.b128.fromrgb.weight
    saved = weight.detach().clone()
    for kept in (slice(None), slice(-3, None)):
        with torch.no_grad():
            weight.zero_()[:, kept] = saved[:, kept]
        loss.discriminator_regularisation(real, 1.0, nimg=0)
    assert (penalties[0] > 0).all() and not penalties[1].any()
    loss.discriminator.zero_grad()
    with torch.no_grad():
        weight.copy_(saved)
    images = {'image': real.image.clone().requires_grad_(True), 'render': renderer()(real.v, real.c)}
    images['image_raw'] = resize_antialiased(real.image, RAW_SIZE).requires_grad_(True)
    names = ['image'] if kind == 'single' else ['image', 'image_raw']
    logits = loss.discriminator(images, real.c)
    gradients = torch.autograd.grad(logits.sum(), [images[name] for name in names])
    torch.testing.assert_close(penalties[0], sum(g.square().sum(dim=[1, 2, 3]) for g in gradients))


def test_a_renderer_and_a_discriminator_that_do_not_belong_together():
    with_render, without = make_loss(), make_loss(render=False)
    for discriminator, chosen in ((with_render.discriminator, None), (without.discriminator, renderer())):
        with pytest.raises(ValueError, match='renderer: expected one for a discriminator with render_channels'):
            Next3DLoss(generator(), discriminator, LossConfig(), 32, renderer=chosen)
    _, real = inputs()
    with pytest.raises(ValueError, match='real: expected the meshes v'):
        with_render.discriminator_regularisation(real._replace(v=None), 1.0, nimg=0)
    without.discriminator_regularisation(real._replace(v=None), 1.0, nimg=0)


# ---- Gaze


def test_real_pictures_are_also_judged_with_eyes_that_look_elsewhere():
    reports = {}
    ball = (torch.from_numpy(simple_head().vertices).norm(dim=1) > 0.1).nonzero()[:, 0]  # Any vertices will do.
    loss = make_loss(report=lambda name, values: reports.setdefault(name, values.detach()), eyeballs=[ball],
                     gaze_mismatch=0.5)  # fmt: skip
    seen, turned = record(loss), []
    loss.renderer = lambda v, c: (turned.append(v), renderer()(v, c))[1]
    fake, real = inputs()
    with sample_draws(0, 'Dmain', [0, 1]):
        loss.discriminator_main(fake, real, 1.0, nimg=0)
    assert len(seen) == 3
    right, wrong = seen[1:]
    assert all(torch.equal(right[name], wrong[name]) for name in ('image', 'image_raw'))
    assert not torch.equal(right['render'], wrong['render'])
    moved = (turned[2] - real.v).norm(dim=-1)
    assert (moved[:, ball].amax(dim=1) > 0.005).all() and moved.count_nonzero() <= 2 * len(ball)
    assert not torch.allclose(moved[0], moved[1])  # Each its own way.
    torch.testing.assert_close(reports['Loss/D/mismatch'], 0.5 * softplus(reports['Loss/scores/mismatch']))


def test_the_mismatch_adds_its_gradient_by_weight():
    fake, real = inputs()
    ball = torch.arange(50)
    gradients = []
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        loss = make_loss(eyeballs=[ball], gaze_mismatch=weight)
        with sample_draws(0, 'Dmain', [0, 1]):
            loss.discriminator_main(fake, real, 1.0, nimg=0)
        gradients.append(torch.cat([p.grad.flatten() for p in loss.discriminator.parameters() if p.grad is not None]))
    without, half, whole = gradients
    assert (half - without).norm() > 0.01 * without.norm()
    torch.testing.assert_close(half - without, (whole - without) / 2, rtol=1e-3, atol=1e-5)


def test_a_mismatch_needs_a_rendering_and_eyeballs():
    for given in (dict(render=False, eyeballs=[torch.arange(9)]), dict()):
        with pytest.raises(ValueError, match='gaze_mismatch: expected a renderer and eyeballs'):
            make_loss(gaze_mismatch=0.5, **given)


# ---- All phases


@pytest.mark.parametrize('render', [False, True])
def test_phases_report_and_leave_gradients(render):
    reports = {}
    loss = make_loss(render, report=lambda name, values: reports.setdefault(name, values.detach()))
    fake, real = inputs()
    for network, phases in {
        loss.generator: (
            lambda: loss.generator_main(fake, 1.0, 0),
            lambda: loss.generator_regularisation(fake, 1.0, 0),
        ),
        loss.discriminator: (
            lambda: loss.discriminator_main(fake, real, 1.0, 0),
            lambda: loss.discriminator_regularisation(real, 1.0, 0),
        ),
    }.items():
        loss.generator.requires_grad_(network is loss.generator)
        loss.discriminator.requires_grad_(network is loss.discriminator)
        for phase in phases:
            network.zero_grad(set_to_none=True)
            phase()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            assert any(g.any() for g in gradients) and all(g.isfinite().all() for g in gradients)
    loss.generator.requires_grad_(True)
    assert set(reports) == {f'Loss/{name}' for name in (
        'scores/fake', 'signs/fake', 'scores/real', 'signs/real', 'G/loss', 'D/loss', 'r1_penalty', 'D/reg'
    )}
    assert all(values.isfinite().all() for values in reports.values())


def test_w_goes_to_the_given_tracker_or_moves_the_average():
    tracked = []
    loss = make_loss(track_w=tracked.append)
    w_avg = generator().backbone.mapping.w_avg
    before = w_avg.clone()
    fake, real = inputs()
    loss.generator_main(fake, 1.0, nimg=0)
    assert not tracked
    loss.discriminator_main(fake, real, 1.0, nimg=0)
    assert [list(w.shape) for w in tracked] == [[2, 8]] and not tracked[0].requires_grad
    assert torch.equal(w_avg, before)
    make_loss().discriminator_main(fake, real, 1.0, nimg=0)
    assert not torch.equal(w_avg, before)
