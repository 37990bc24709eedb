# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of the four training phases against the published implementation, in its published behaviour."""

import contextlib
import copy
import zlib
from unittest import mock

import numpy as np
import parity
import pytest
import torch
from parity import agrees, fill, rnd

from torch_utils.distributed import Ranks
from torch_utils.training_stats import Collector
from training import trainer as trainer_module
from training.config import DiscriminatorConfig, MappingConfig, Next3DConfig
from training.discriminator import Discriminator
from training.feed import Fakes, IterationData, Reals
from training.generator import Next3DGenerator
from training.loss import GeneratorInput, LossConfig, Next3DLoss, RealInput
from training.train_config import TrainConfig
from training.trainer import Networks, Trainer

BATCH = 2
PHASES = {
    'Gmain': 'generator_main',
    'Greg': 'generator_regularisation',
    'Dmain': 'discriminator_main',
    'Dreg': 'discriminator_regularisation',
}
LARGEST_STEP_DEVIATION = 0.01
LARGEST_R1_BIAS_DEVIATION = 0.05  # Double precision differs from the record's gradients by 0.0064.
ABSENT_IN_NEW_NETWORKS = ('dense_faces', 'dataset_label_std')


@pytest.fixture(scope='module')
def networks(topology):
    info, _ = parity.load('train_step')
    g_kwargs, d_kwargs = info['g_kwargs'], info['d_kwargs']
    widths = dict(channel_base=g_kwargs['channel_base'], channel_max=g_kwargs['channel_max'])
    generator = Next3DGenerator(Next3DConfig(sr_num_fp16_res=0, **widths), *topology)
    discriminator = Discriminator(
        DiscriminatorConfig(
            **widths,
            num_fp16_res=0,
            conv_clamp=d_kwargs['conv_clamp'],
            disc_c_noise=1,
            mapping=MappingConfig(num_layers=8),
        )
    )
    return generator, discriminator


def reset(networks, info):
    generator, discriminator = networks
    fill(generator, info['g_state'], info['seed'], ABSENT_IN_NEW_NETWORKS).train()
    fill(discriminator, info['d_state'], info['d_seed']).train()
    for network in networks:
        network.zero_grad(set_to_none=True)


def loss_config(info, variant):
    kwargs = info['loss_kwargs'][variant]
    return LossConfig(
        r1_gamma=kwargs['r1_gamma'],
        density_region='published',
        reg_type='monotonic-fixed' if variant == 'monotonic-fixed' else 'l1',
        gpc_reg_prob=kwargs['gpc_reg_prob'],
        gpc_reg_fade_kimg=kwargs['gpc_reg_fade_kimg'],
        blur_init_sigma=kwargs['blur_init_sigma'],
        blur_fade_kimg=kwargs['blur_fade_kimg'] * 32 / BATCH,
    )


def loss_of(networks, info, variant, report):
    return Next3DLoss(*networks, loss_config(info, variant), BATCH, report=report)


def real_images(seed):
    return rnd('t/real', (BATCH, 3, 512, 512), seed, 0.5).clamp(-1, 1)


def run_phase(loss, phase, info, arrays, meshes, nimg):
    seed = info['seed']
    fake = GeneratorInput(rnd(f't/z/{phase}', (BATCH, 512), seed), torch.from_numpy(arrays['gen_c']), meshes)
    real = RealInput(real_images(seed), torch.from_numpy(arrays['real_c']))
    inputs = {'G': [fake], 'Dmain': [fake, real], 'Dreg': [real]}
    for network, name in ((loss.generator, 'G'), (loss.discriminator, 'D')):
        network.requires_grad_(phase[0] == name)
    with parity.sequence_draws():
        arguments = inputs.get(phase, inputs['G'])
        getattr(loss, PHASES[phase])(*arguments, gain=info['intervals'][phase], nimg=nimg)


CASES = [
    ('resume', 'Gmain'), ('resume', 'Greg'), ('resume', 'Dmain'), ('resume', 'Dreg'),
    ('blur', 'Gmain'), ('blur', 'Dmain'), ('blur', 'Dreg'), ('monotonic-fixed', 'Greg'),
]


@pytest.mark.parametrize('variant, phase', CASES)
def test_phase(networks, demo_meshes, variant, phase):
    info, arrays = parity.load('train_step')
    expected = info['variants'][variant][phase]
    reset(networks, info)
    reports = {}
    loss = loss_of(networks, info, variant, lambda name, values: reports.setdefault(name, values.detach()))
    run_phase(loss, phase, info, arrays, demo_meshes, info['cur_nimg'][variant])
    assert set(reports) == set(expected['reports'])
    for name, values in expected['reports'].items():
        agrees(f'training, {phase}: losses', reports[name].flatten(), values, 'image')
    network = networks[0] if phase[0] == 'G' else networks[1]
    assert {name for name, p in network.named_parameters() if p.grad is None} == set(expected['no_grad'])
    check_gradients(f'training, {phase}: gradients', network, expected, info['seed'], is_r1=phase == 'Dreg')


def check_gradients(label, network, expected, seed, worst=20, is_r1=False):
    """Compare norms, and projections on random directions, of the gradients of all parameters.

    Nine of ten have to agree to the tolerance of gradients, all to `worst` times that: a pre-activation at a leaky
    ReLU's kink, or sums that nearly cancel (noise strengths), multiply rounding in a few of some hundred parameters.
    is_r1: those of a discriminator's penalty, whose biases have a tolerance of their own.
    """
    names = list(expected['grad_norms'])
    gradients = {name: network.get_parameter(name).grad for name in names}
    reference = np.array([expected['grad_norms'][name] for name in names])
    scale = np.maximum(reference, 1e-4 * reference.max())
    norms = np.array([gradients[name].norm().item() for name in names])
    dots = np.array([(gradients[n].double() * rnd('dot/' + n, gradients[n].shape, seed)).sum().item() for n in names])
    projections = np.array([expected['grad_dots'][name] for name in names])
    for deviation in (np.abs(norms - reference) / scale, np.abs(dots - projections) / scale):
        for part, kind, few in kinds_of(names, 'gradient', is_r1):
            agrees(f'{label}{part}, nine of ten', np.quantile(deviation[few], 0.9)[None] + 1, np.ones(1), kind)
            largest = worst * parity.TOLERANCE['gradient'] if kind == 'gradient' else LARGEST_R1_BIAS_DEVIATION
            assert deviation[few].max() < largest, f'{label}{part}: {deviation[few].max()}'


def kinds_of(names, kind, is_r1):
    """Yield what to compare apart: a label, the kind of its tolerance, and which of the names."""
    is_bias = np.array([is_r1 and name.endswith('bias') for name in names])
    yield ' of weights' if is_r1 else '', kind, ~is_bias
    if is_r1:
        yield ' of biases', 'R1 bias', is_bias


@contextlib.contextmanager
def draws_inside(arrays):
    """Make draws those of the second record of Greg, whose points lie inside the volume.

    Its description says that normal draws stay as they were. They did not: the recipe computes them from uniform ones,
    which had been replaced; with these, and not with those, the losses are the recorded ones.
    """

    def uniform(shape):
        shape = tuple(shape)
        tag = 'u/' + 'x'.join(map(str, shape))
        random = np.random.RandomState(zlib.crc32(tag.encode()) & 0x7FFFFFFF)
        return torch.from_numpy(points[shape] if shape in points else random.random_sample(shape).astype(np.float32))

    def normal(shape):
        return (uniform(shape) - 0.5) * float(np.float32(np.sqrt(12.0)))

    points = {value.shape: value for value in arrays.values()}
    with mock.patch.object(torch, 'rand', lambda shape, **_: uniform(shape)):
        with mock.patch.object(torch, 'randn', lambda shape, **_: normal(shape)):
            yield


@pytest.mark.parametrize('variant', ['resume', 'monotonic-fixed'])
def test_density_regularisation_reaches_the_dynamic_planes(networks, demo_meshes, variant):
    info, arrays = parity.load('train_step')
    inside, draws = parity.load('train_greg_inside')
    expected = inside['variants'][variant]['Greg']
    reset(networks, info)
    loss = loss_of(networks, info, variant, lambda name, values: None)
    fake = GeneratorInput(rnd('t/z/Greg', (BATCH, 512), info['seed']), torch.from_numpy(arrays['gen_c']), demo_meshes)
    generator, values = networks[0], []
    for name in ('_monotonicity', '_smoothness'):
        term = getattr(loss, name)
        setattr(loss, name, lambda planes, term=term: values.append(term(planes)) or values[-1])
    gain = info['intervals']['Greg']
    with draws_inside(draws):
        loss.generator_regularisation(fake, gain=gain, nimg=info['cur_nimg'][variant])
    agrees('training, Greg inside the volume: losses', torch.stack(values) * gain, expected['backward_values'], 'image')
    assert {name for name, p in generator.named_parameters() if p.grad is None} == set(expected['no_grad'])
    assert expected['grad_norms']['texture_backbone.synthesis.b4.const'] > 0
    # Beside the networks' kinks the loss has its own: the sign of a difference of densities that is nearly nothing.
    check_gradients('training, Greg inside the volume: gradients', generator, expected, info['seed'], worst=100)


class Recorder:
    """Notes what the phases of an iteration report, and how far each moves each parameter."""

    def __init__(self, trainer):
        self.reports, self.steps, self.norms, self.phase = {}, {}, {}, None
        self._trainer, self._run, self._report = trainer, trainer._run_phase, trainer.loss.report
        trainer._run_phase, trainer.loss.report = self.run_phase, self.report

    def run_phase(self, phase, *arguments):
        self.phase, self.reports[phase.name] = phase.name, {}
        before = {name: p.detach().clone() for name, p in phase.network.named_parameters()}
        self._run(phase, *arguments)
        after = dict(phase.network.named_parameters())
        self.steps[phase.name] = {name: (after[name] - old).norm().item() for name, old in before.items()}
        self.norms[phase.name] = {name: p.norm().item() for name, p in after.items()}

    def report(self, name, values):
        self.reports[self.phase][name] = values.detach().clone()
        self._report(name, values)


def with_noise(c):
    return c + parity.normal_seq(c.shape) * c.std(dim=0)


def iteration_32(networks, info, arrays, meshes):
    """Run the trainer's iteration number 32, all four phases and the average, on the recorded inputs.

    The published discriminator adds its noise to the caller's label, so the record's Dreg got a label with the noise
    of Dmain in it, to which it added its own.
    """
    reset(networks, info)
    generator, discriminator = networks
    config = TrainConfig(
        preset='parity', outdir='', data='', generator=generator.config, discriminator=discriminator.config,
        loss=loss_config(info, 'resume'), batch=BATCH, batch_gpu=BATCH, device='cpu', workers=0,
    )
    trainer = Trainer(config, Networks(generator, discriminator, copy.deepcopy(generator).eval()), Ranks(), Collector())
    trainer.iteration = info['ema']['cur_nimg'] // BATCH
    recorder, dreg = Recorder(trainer), trainer.loss.discriminator_regularisation
    noisy_c = with_noise(torch.from_numpy(arrays['real_c']))
    agrees('training: labels with noise', with_noise(noisy_c), arrays['real_c_after_seq'], 'op')
    trainer.loss.discriminator_regularisation = lambda real, *rest: dreg(real._replace(c=noisy_c), *rest)
    image = real_images(info['seed'])[None]
    trainer._reals_on_device = lambda reals: RealInput(image, torch.from_numpy(reals.label)[None])
    fakes = {phase: Fakes(arrays['gen_c'], meshes.numpy()) for phase in ('Gmain', 'Greg', 'Dmain')}
    latents = {phase: rnd(f't/z/{phase}', (BATCH, 512), info['seed']) for phase in fakes}
    with contextlib.ExitStack() as stack:
        stack.enter_context(parity.sequence_draws())
        stack.enter_context(mock.patch.object(trainer_module, 'keyed_draws', lambda *_: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(trainer_module, 'normal', lambda *_: latents[recorder.phase]))
        trainer.step(IterationData(trainer.iteration, Reals(None, arrays['real_c'], None), fakes))
    return trainer, recorder


def test_iteration(networks, demo_meshes):
    """The trainer's whole iteration; every phase but the first starts from what the ones before it have changed."""
    info, arrays = parity.load('train_step')
    trainer, recorder = iteration_32(networks, info, arrays, demo_meshes)
    assert list(recorder.reports) == list(info['sequence'])
    for phase, expected in info['sequence'].items():
        assert set(recorder.reports[phase]) == set(expected['reports'])
        for name, values in expected['reports'].items():
            agrees(f'training, iteration, {phase}: losses', recorder.reports[phase][name].flatten(), values, 'image')
        steps, is_r1 = recorder.steps[phase], phase == 'Dreg'
        check_norms(f'training, iteration, {phase}: steps', steps, expected['step_norms'], 'step', is_r1)
        check_norms(f'training, iteration, {phase}: weights', recorder.norms[phase], expected['param_norms'], 'op')
    average = {name: p.norm().item() for name, p in trainer.networks.G_ema.named_parameters()}
    check_norms('training, iteration: averaged weights', average, info['ema']['param_norms'], 'op')
    w_avg = arrays['w_avg_after_seq']
    for network in (trainer.networks.G, trainer.networks.G_ema):
        agrees('training, iteration: w_avg', network.backbone.mapping.w_avg, w_avg, 'network')


def check_norms(label, norms, expected, kind, is_r1=False):
    """Compare norms of all parameters, or of the steps that they take; what is 0 has to be 0 in both.

    Nine of ten have to agree to the tolerance, all to a percent: Adam's first step is lr·g/(|g| + eps), its second
    nearly so, whatever the size of g; a gradient that is all rounding moves an entry by up to twice the learning rate.
    """
    assert set(norms) == set(expected)
    actual, reference = (np.array([table[name] for name in expected]) for table in (norms, expected))
    assert ((actual == 0) == (reference == 0)).all()
    deviation = np.abs(actual - reference) / np.maximum(reference, 1e-4 * reference.max())
    for part, its_kind, few in kinds_of(list(expected), kind, is_r1):
        agrees(f'{label}{part}, nine of ten', np.quantile(deviation[few], 0.9)[None] + 1, np.ones(1), its_kind)
        largest = LARGEST_STEP_DEVIATION if its_kind == kind else LARGEST_R1_BIAS_DEVIATION
        assert deviation[few].max() < largest, f'{label}{part}: {deviation[few].max()}'
