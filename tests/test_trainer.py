# SPDX-License-Identifier: Apache-2.0
"""Iterations on toy networks: accumulation, gradients that are not finite, averages, Freeze-D, ADA, going on."""

import copy
import dataclasses
import math
import threading

import pytest
import torch
from simple_head import TEMPLATE
from toy_data import make_toy_data

from geometry.head_model import DEFAULT_HEAD, load_embedded_head
from torch_utils.distributed import Ranks
from torch_utils.randomness import sample_draws
from torch_utils.training_stats import Collector
from training import evaluation, schedules
from training.dataset import HeadDataset, open_source
from training.feed import IterationItems
from training.loss import RealInput
from training.mapping import W_AVG_BETA
from training.state import load_newest, save_state
from training.train_config import make_config
from training.trainer import ADA_INTERVAL, LARGEST_GRADIENT, Trainer, layers_to_freeze, new_networks

LATE = 320  # An iteration in which all phases run, and whose average remembers.
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('toy')
    make_toy_data(root, 6)
    return HeadDataset(open_source(root / 'images128x128', root / 'meshes128x128'))


def toy_config(changes=None, **given):
    settings = dict(device='cpu', topology_path=str(TEMPLATE), batch_gpu=4, seed=4)
    return dataclasses.replace(make_config('toy', '', '', **{**settings, **given}), **(changes or {}))


def toy_trainer(changes=None, ranks=None, iteration=0, **given):
    """Return a trainer; `changes` go to the config's fields, the rest to `make_config`."""
    config = toy_config(changes, **given)
    trainer = Trainer(config, new_networks(config), ranks or Ranks(), Collector())
    trainer.iteration = iteration
    return trainer


def run(trainer, data, count=1):
    """Run iterations."""
    with_meshes = trainer.config.disc_render is not None
    items = IterationItems(data, trainer.plan, trainer.config.seed, trainer.intervals, with_meshes)
    for _ in range(count):
        trainer.step(items[trainer.iteration])
    return trainer


def weights(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def after(loss, method, action):
    """Do something after each call of a phase's method."""
    original = getattr(loss, method)

    def call(*arguments):
        original(*arguments)
        action()

    setattr(loss, method, call)


def gradients_of(trainer, phase):
    """Keep the gradients of a phase when its optimiser steps, which then does nothing; return their dict."""
    kept, run_phase = {}, trainer._run_phase

    def run_one(which, *arguments):
        if which.name != phase:
            return run_phase(which, *arguments)
        named = [(name, p) for name, p in which.network.named_parameters()]
        which.optimizer.step = lambda: kept.update((n, p.grad.clone()) for n, p in named if p.grad is not None)
        run_phase(which, *arguments)
        del which.optimizer.step

    trainer._run_phase = run_one
    return kept


@pytest.mark.parametrize('phase, network', [('Gmain', 'G'), ('Greg', 'G'), ('Dmain', 'D'), ('Dreg', 'D')])
def test_gradients_are_means_over_micro_batches(data, phase, network):
    trainer = toy_trainer(gen_pose_cond=True, batch_gpu=2)
    expected, interval = {}, next(x.interval for x in trainer.phases if x.name == phase)
    reference = copy.deepcopy(trainer.networks)
    kept = gradients_of(trainer, phase)
    others = [x for x in trainer.phases if x.name != phase]
    trainer.phases = [x for x in trainer.phases if x.name == phase] + [x for x in others if x.name == 'Dmain']
    items = IterationItems(data, trainer.plan, 4, {'Gmain': 1, 'Greg': 1, 'Dmain': 1}, False)[0]
    trainer.step(items)
    lone = toy_trainer(gen_pose_cond=True, batch_gpu=2)
    getattr(lone.networks, network).load_state_dict(getattr(reference, network).state_dict())
    getattr(lone.networks, network).requires_grad_(True)
    reals = lone._reals_on_device(items.reals)
    fakes = lone._fakes_on_device(items.fakes[phase]) if phase in items.fakes else None
    for number, samples in enumerate([[0, 1], [2, 3]]):
        getattr(lone.networks, network).zero_grad(set_to_none=True)
        with sample_draws(4, phase, samples):
            fake = fakes and lone._generator_input(fakes.label[number], fakes.mesh[number])
            lone._accumulate(phase, fake, RealInput(reals.image[number], reals.c[number]), interval, lone.nimg)
        for name, p in getattr(lone.networks, network).named_parameters():
            if p.grad is not None:
                expected[name] = expected.get(name, 0) + p.grad / 2
    assert kept.keys() == expected.keys() and len(kept) > 20
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-5 * scale.item())


class Thread(threading.Thread):
    """A process of a run as a thread."""

    def __init__(self, work):
        super().__init__()
        self.work, self.error = work, None

    def run(self):
        try:
            torch.set_num_threads(1)
            self.work()
        except BaseException as error:
            self.error = error


class ThreadRanks(Ranks):
    """Processes that are threads and meet at a barrier."""

    def __init__(self, rank, barrier, table):
        super().__init__(rank, 2)
        self.barrier, self.table = barrier, table

    def sum_(self, tensor, what):
        self.table[self.rank] = tensor.clone(), what
        self.barrier.wait(30)
        (a, name), (b, other) = self.table[0], self.table[1]
        assert name == other
        self.barrier.wait(30)
        tensor.copy_(a + b)


def test_two_processes_train_as_one(data):
    alone = run(toy_trainer(aug='ada', batch_gpu=2), data, 2)
    barrier, table = threading.Barrier(2), {}
    pair = [toy_trainer(aug='ada', batch_gpu=2, ranks=ThreadRanks(rank, barrier, table)) for rank in range(2)]
    threads = [Thread(lambda trainer=trainer: run(trainer, data, 2)) for trainer in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert thread.error is None and not thread.is_alive()
    for mine, other in zip(*(trainer.networks for trainer in pair)):
        assert equal(weights(mine), weights(other))
    states = [trainer.stats.state_dict() for trainer in (alone, *pair)]
    for name, moments in states[0].items():
        if name.startswith('Loss/'):
            count, total = (states[1][name][i] + states[2][name][i] for i in (0, 1))
            assert count == moments[0] and total == pytest.approx(moments[1], rel=1e-3, abs=1e-4), name
    for name in ('G', 'D'):  # Adam's steps would hide a wrong scale of the gradients; their squares show it.
        moments = [trainer._optimizers[name].state_dict()['state'].values() for trainer in (alone, pair[0])]
        squares = [sum(x['exp_avg_sq'].sum().item() for x in each) for each in moments]
        assert squares[0] == pytest.approx(squares[1], rel=1e-2)
    signs = [trainer._signs for trainer in (alone, *pair)]
    assert torch.equal(signs[0], signs[1] + signs[2])
    w_avg = [trainer.networks.G.backbone.mapping.w_avg for trainer in (alone, pair[0])]
    torch.testing.assert_close(*w_avg, rtol=1e-3, atol=1e-6)


def test_gradients_that_are_not_finite_are_replaced_and_counted(data):
    trainer = toy_trainer()
    weight = trainer.networks.G.decoder.net[0].weight
    bad = torch.tensor([math.nan, math.inf, -math.inf])

    def poison():
        weight.grad.view(-1)[:3] = bad

    after(trainer.loss, 'generator_main', poison)
    kept = gradients_of(trainer, 'Gmain')
    run(trainer, data)
    found = kept['decoder.net.0.weight'].view(-1)
    assert found[:3].tolist() == [0, LARGEST_GRADIENT, -LARGEST_GRADIENT] and found.isfinite().all()
    statistics = trainer.stats.collect()
    assert statistics['Gradients/nonfinite/Gmain'].mean == 3
    assert all(statistics[f'Gradients/nonfinite/{phase}'].mean == 0 for phase in ('Greg', 'Dmain', 'Dreg'))
    trainer.check_weights()
    assert trainer.bad_iterations == 0  # The losses were finite.


def test_iterations_with_a_bad_loss_are_counted_until_a_good_one(data):
    trainer = toy_trainer(batch_gpu=2)
    is_bad = [True, True, False, True]
    phases = iter(['Dmain', 'Gmain', 'Dmain', 'Dmain'])
    counts, phase = [], None

    def tell(name):
        if is_bad[trainer.iteration] and phase == name:
            trainer.loss.report('Loss/other', torch.tensor([1.0, math.inf if name == 'Dmain' else math.nan]))

    after(trainer.loss, 'discriminator_main', lambda: tell('Dmain'))
    after(trainer.loss, 'generator_main', lambda: tell('Gmain'))
    for phase in phases:
        run(trainer, data)
        counts.append(int(trainer.bad_iterations))
    assert counts == [1, 2, 0, 1]
    assert trainer.stats.collect()['Loss/other'].num_nonfinite == 6  # Three iterations of two micro-batches.


@pytest.mark.parametrize('rampup', [0.05, None])
def test_the_average_follows_by_its_half_life(data, rampup):
    trainer = toy_trainer({'ema_rampup': rampup}, iteration=LATE)
    old = weights(trainer.networks.G_ema)
    run(trainer, data)
    new = weights(trainer.networks.G)
    beta = schedules.ema_beta(LATE * 4, 4, rampup)
    assert 0.9 < beta < 0.999 and (rampup is None) == (beta > 0.99)
    parameters = dict(trainer.networks.G.named_parameters())
    moved = 0
    for name, tensor in trainer.networks.G_ema.state_dict().items():
        if name in parameters:
            torch.testing.assert_close(tensor, new[name] + beta * (old[name] - new[name]), rtol=1e-6, atol=1e-7)
            moved += not torch.equal(tensor, old[name])
        else:
            assert torch.equal(tensor, new[name]), name
    assert moved > 50 and not torch.equal(old['backbone.mapping.w_avg'], new['backbone.mapping.w_avg'])


def test_the_first_average_is_the_network(data):
    trainer = run(toy_trainer(), data)
    assert equal(weights(trainer.networks.G), weights(trainer.networks.G_ema))
    assert trainer.networks.G.training and not trainer.networks.G_ema.training


def test_mean_w_moves_once_an_iteration(data):
    trainer = toy_trainer(batch_gpu=2)
    seen, track = [], trainer.loss.track_w
    trainer.loss.track_w = lambda w: (seen.append(w.clone()), track(w))
    mapping = trainer.networks.G.backbone.mapping
    mapping.w_avg.fill_(0.5)
    run(trainer, data)
    assert [list(w.shape) for w in seen] == [[2, 16], [2, 16]]
    expected = torch.cat(seen).mean(dim=0).lerp(torch.full([16], 0.5), W_AVG_BETA)
    torch.testing.assert_close(mapping.w_avg, expected, rtol=1e-6, atol=1e-7)


def test_frozen_layers_stay(data):
    trainer = toy_trainer(freezed=3)
    D = trainer.networks.D
    first = [f'b128.{name}' for name in ('fromrgb', 'conv0', 'conv1')]
    layers = layers_to_freeze(D, 3)
    assert [dict(D.named_modules())[name] for name in first] == layers
    before = weights(D)
    run(trainer, data, 2)
    moved = {name for name, tensor in D.state_dict().items() if not torch.equal(tensor, before[name])}
    frozen = {name for name, _ in D.named_parameters() if name.startswith(tuple(first))}
    assert frozen and not moved & frozen
    assert moved >= {name for name, _ in D.named_parameters()} - frozen
    assert sum(len(group['params']) for group in trainer._optimizers['D'].param_groups) == len(
        list(D.parameters())
    ) - len(frozen)


def test_more_frozen_layers_than_there_are_is_an_error():
    D = toy_trainer().networks.D
    assert layers_to_freeze(D, 0) == []
    with pytest.raises(ValueError, match=r'freezed: expected at most the \d+ layers of the blocks, got 1000'):
        layers_to_freeze(D, 1000)
    with pytest.raises(ValueError, match='freezed'):
        toy_trainer(freezed=1000)


@pytest.mark.parametrize('bias, start, moved', [(1e4, 0.1, 1), (-1e4, 0.1, -1), (-1e4, 0.0, 0)])
def test_augmentation_follows_the_signs_of_real_pictures(data, bias, start, moved):
    trainer = toy_trainer({'ada_kimg': 0.5}, iteration=ADA_INTERVAL - 1, aug='ada')
    trainer.networks.D.b4.out.bias.fill_(bias)  # All logits have this sign.
    trainer.augment.p = start
    run(trainer, data)
    assert trainer.augment.p == pytest.approx(start + moved * ADA_INTERVAL * 4 / 500)
    assert trainer._signs.tolist() == [0, 0]
    assert trainer.stats.collect()['Progress/augment'].mean == pytest.approx(trainer.augment.p)


def test_augmentation_moves_every_fourth_iteration(data):
    trainer = toy_trainer({'ada_kimg': 0.5}, aug='ada')
    trainer.networks.D.b4.out.bias.fill_(1e4)
    run(trainer, data, ADA_INTERVAL - 1)
    assert trainer.augment.p == 0
    assert trainer._signs.tolist() == [4 * ADA_INTERVAL] * 2  # Dmain's of three iterations, and Dreg's once.
    run(trainer, data)
    assert trainer.augment.p == pytest.approx(ADA_INTERVAL * 4 / 500)


def test_a_fixed_probability_stays(data):
    trainer = toy_trainer(iteration=ADA_INTERVAL - 1, aug='fixed', p=0.3)
    trainer.networks.D.b4.out.bias.fill_(1e4)
    run(trainer, data)
    assert trainer.augment.p == 0.3
    assert toy_trainer().augment is None


@pytest.mark.parametrize('aug', ['noaug', 'ada'])
def test_going_on_from_a_state_changes_nothing(data, tmp_path, aug):
    settings = dict(aug=aug, changes={'ada_kimg': 0.5}, density_reg_every=2)
    whole = run(toy_trainer(**settings), data, 4)
    first = run(toy_trainer(**settings), data, 2)
    first.gather()
    save_state(tmp_path, first.nimg, first.state_dict())
    other = run(toy_trainer(**settings, seed=9), data)  # What it has done before must not matter.
    other.config = first.config
    other.load_state_dict(load_newest(tmp_path, pytest.fail)[1])
    assert other.nimg == 8
    run(other, data, 2)
    for name, network in whole.networks._asdict().items():
        assert equal(weights(network), weights(getattr(other.networks, name))), name
    for name, optimizer in whole._optimizers.items():
        states = [list(x.state_dict()['state'].values()) for x in (optimizer, other._optimizers[name])]
        assert len(states[0]) == len(states[1]) > 0
        assert all(equal(a, b) for a, b in zip(*states))
    assert torch.equal(whole._signs, other._signs) and whole.iteration == other.iteration == 4
    assert aug == 'noaug' or whole.augment.p == other.augment.p


def test_a_state_of_other_networks_is_refused():
    state = toy_trainer().state_dict()
    with pytest.raises((KeyError, RuntimeError)):
        toy_trainer(cmax=4).load_state_dict(state)


@pytest.mark.parametrize('given, names', [
    ({}, ['Gmain', 'Greg', 'Dmain', 'Dreg']),
    ({'density_reg': 0.0}, ['Gmain', 'Dmain', 'Dreg']),
    ({'density_reg_every': 0}, ['Gmain', 'Dmain', 'Dreg']),
    ({'density_reg': 0.0, 'reg_type': 'monotonic-fixed'}, ['Gmain', 'Greg', 'Dmain', 'Dreg']),
    ({'gamma': 0.0}, ['Gmain', 'Greg', 'Dmain']),
    ({'changes': {'r1_every': 0}}, ['Gmain', 'Greg', 'Dmain']),
])
def test_phases_without_weight_do_not_run(given, names):
    trainer = toy_trainer(**given)
    assert [phase.name for phase in trainer.phases] == names
    assert list(trainer.intervals) == [name for name in names if name != 'Dreg']


def test_regularisations_run_at_their_intervals(data):
    trainer, ran = toy_trainer(batch_gpu=2, density_reg_every=2, changes={'r1_every': 3}), []
    for name in ('generator_regularisation', 'discriminator_regularisation'):
        after(trainer.loss, name, lambda name=name: ran.append((trainer.iteration, name[0])))
    run(trainer, data, 4)
    assert sorted(set(ran)) == [(0, 'd'), (0, 'g'), (2, 'g'), (3, 'd')]
    assert len(ran) == 8  # Two micro-batches each.


def test_what_turns_elsewhere_is_the_templates_eyeballs():
    head = load_embedded_head()
    template = str(DEFAULT_HEAD.with_name('head_template.obj'))
    trainer = toy_trainer(topology_path=template, disc_render='waves', disc_gaze=0.5)
    eyes = {tuple(head.regions[name].nonzero()[:, 0].tolist()) for name in ('eye_left', 'eye_right')}
    assert {tuple(indices.tolist()) for indices in trainer.loss.eyeballs} == eyes
    assert trainer.loss.config.gaze_mismatch == 0.5
    assert not toy_trainer(disc_render='waves').loss.eyeballs


def test_weights_start_from_the_seed_alone():
    one, same, other = (new_networks(toy_config(seed=seed)) for seed in (4, 4, 5))
    torch.rand(3)
    for name in ('G', 'D'):
        assert equal(weights(getattr(one, name)), weights(getattr(same, name)))
        assert not equal(weights(getattr(one, name)), weights(getattr(other, name)))
    assert equal(weights(one.G), weights(one.G_ema))


def test_weights_that_are_not_finite_are_found():
    trainer = toy_trainer()
    trainer.check_weights()
    next(trainer.networks.D.parameters()).view(-1)[0] = math.nan
    with pytest.raises(RuntimeError, match='^D: holds weights that are not finite$'):
        trainer.check_weights()


def test_a_discriminator_may_see_renderings(data):
    trainer = run(toy_trainer(disc_render='normal'), data)
    assert trainer.stats.collect()['Loss/D/loss'].num_nonfinite == 0


def test_snapshots_know_the_resolution_of_now():
    trainer = toy_trainer(
        neural_rendering_resolution_initial=16, neural_rendering_resolution_final=32,
        neural_rendering_resolution_fade_kimg=0.04, iteration=5,
    )
    networks = trainer.snapshot()
    assert list(networks) == ['G_ema', 'G', 'D']
    assert networks['G_ema'].config.neural_rendering_resolution == trainer.rendering_resolution == 24


def test_metrics_are_found_by_name(monkeypatch):
    monkeypatch.setattr(evaluation, '_METRICS', {})
    assert evaluation.names() == []

    @evaluation.register('vertices')
    def count(given):
        return {'vertices': given.generator.num_vertices, 'nimg': given.nimg}

    evaluation.register('another')(count)
    given = evaluation.Evaluation(toy_trainer().networks.G_ema, None, Ranks(), 8)
    assert evaluation.names() == ['another', 'vertices']
    assert evaluation.evaluate('vertices', given) == {'vertices': given.generator.num_vertices, 'nimg': 8}
    with pytest.raises(KeyError):
        evaluation.evaluate('fid50k_full', given)
