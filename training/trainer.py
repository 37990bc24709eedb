# SPDX-License-Identifier: Apache-2.0
"""Networks, optimisers and one training iteration: Gmain, Greg, Dmain, Dreg, then the average (Karras et al. 2020)."""

import copy
import dataclasses
import logging
from typing import Any, NamedTuple

import torch
from torch import nn

from geometry.eyeballs import find_eyeballs
from geometry.meshes import read_obj
from torch_utils.distributed import Ranks
from torch_utils.randomness import keyed_draws, normal, sample_keys
from torch_utils.training_stats import Collector
from training import schedules
from training.augment import AugmentPipe
from training.discriminator import Discriminator
from training.feed import Fakes, IterationData, Plan
from training.generator import Next3DGenerator
from training.layers import Conv2dLayer
from training.loss import GeneratorInput, Next3DLoss, RealInput
from training.mesh_render import MeshRenderer
from training.phase_graphs import PhaseGraphs, Recorded
from training.precision import set_precision
from training.topology import load_topology
from training.train_config import TrainConfig

ADAM_BETAS, ADAM_EPSILON = (0.0, 0.99), 1e-8
LARGEST_GRADIENT = 1e5  # What infinite entries of gradients become.
ADA_INTERVAL = 4  # Iterations between two adjustments of the augmentation probability.
_logger = logging.getLogger(__name__)
CHANNELS = 6  # Colours that augmentation changes: image and raw image.


class Phase(NamedTuple):
    """A phase of an iteration: runs every interval-th time with its loss times the interval."""

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    interval: int


class Networks(NamedTuple):
    """Generator, discriminator and the generator's running average."""

    G: Next3DGenerator
    D: Discriminator
    G_ema: Next3DGenerator


def new_networks(config: TrainConfig) -> Networks:
    """Return networks with random weights, a function of the seed alone, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        topology = load_topology(config.topology_path, config.generator.texture_resolution)
        generator = Next3DGenerator(config.generator, *topology)
        discriminator = Discriminator(config.discriminator)
    return Networks(generator, discriminator, copy.deepcopy(generator).eval())


def layers_to_freeze(discriminator: Discriminator, count: int) -> list[Conv2dLayer]:
    """Return the first layers of the discriminator's blocks, from the picture on (Freeze-D, Mo et al. 2020)."""
    blocks = [getattr(discriminator, f'b{r}') for r in discriminator.block_resolutions]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, Conv2dLayer)]
    if count > len(layers):
        raise ValueError(f'freezed: expected at most the {len(layers)} layers of the blocks, got {count}')
    return layers[:count]


class Trainer:
    """The state of a run on one process, and `step`. Sets the process's TF32 policy (see `training.precision`).

    Every random number is a function of seed, image number and phase, so the same micro-batches give the same losses
    on any number of processes, and nothing but `state_dict` is needed to go on. stats: where statistics go.
    """

    def __init__(self, config: TrainConfig, networks: Networks, ranks: Ranks, stats: Collector):
        self.config, self.ranks, self.stats = config, ranks, stats
        self.networks = Networks(*(network.to(ranks.device) for network in networks))
        self.networks.G.train(), self.networks.D.train()
        set_precision((self.networks.G, self.networks.G_ema), config.precision)
        for network in self.networks:
            network.requires_grad_(False)
        frozen = layers_to_freeze(self.networks.D, config.freezed)
        self._frozen = {id(parameter) for layer in frozen for parameter in layer.parameters()}
        self.plan = Plan(config.batch, config.batch_gpu, ranks.rank, ranks.size)
        self.phases = self._make_phases()
        self.augment = None
        if config.augment != 'noaug':
            self.augment = AugmentPipe(config.augment_p if config.augment == 'fixed' else 0.0, CHANNELS)
        self._w_means: list[torch.Tensor] = []
        self.loss = self._make_loss()
        # Augmentation changes its probability as a Python number.
        can_capture = ranks.device.type == 'cuda' and self.augment is None
        self._graphs = PhaseGraphs() if config.graphs and can_capture else None
        self._recorded: Recorded | None = None
        self.iteration = 0
        # Iterations in a row with a loss that is not finite; sum and count of D's signs since ADA's last adjustment.
        self.bad_iterations = torch.zeros([], device=ranks.device)
        self._is_bad = torch.zeros([], device=ranks.device)
        self._signs = torch.zeros([2], device=ranks.device)

    @property
    def nimg(self) -> int:
        """Real images shown so far."""
        return self.iteration * self.config.batch

    @property
    def intervals(self) -> dict[str, int]:
        """Intervals of the phases that generate pictures, which need labels and meshes."""
        return {phase.name: phase.interval for phase in self.phases if phase.name != 'Dreg'}

    @property
    def rendering_resolution(self) -> int:
        """The side of raw pictures now."""
        return self.config.loss.rendering_resolution(self.nimg)

    def step(self, data: IterationData) -> None:
        """Run the phases that are due on this process's part of an iteration, and the average."""
        samples = self.plan.samples(self.iteration)
        reals = self._reals_on_device(data.reals)
        self._is_bad.zero_()
        for phase in self.phases:
            if self.iteration % phase.interval == 0:
                fakes = data.fakes.get(phase.name)
                self._run_phase(phase, samples, reals, None if fakes is None else self._fakes_on_device(fakes))
                if phase.name == 'Dmain':
                    self._track_w()
        self.bad_iterations.add_(1).mul_(self._is_bad)
        self._average()
        self.iteration += 1
        if self.config.augment == 'ada' and self.iteration % ADA_INTERVAL == 0:
            self._adjust_augmentation()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the numbers of the iterations to come depend on; first `gather`."""
        return {
            'iteration': self.iteration,
            'networks': {name: network.state_dict() for name, network in self.networks._asdict().items()},
            'optimizers': {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            'augment_p': None if self.augment is None else self.augment.p,
            'signs': self._signs.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; KeyError or RuntimeError where it is of another configuration."""
        for name, network in self.networks._asdict().items():
            network.load_state_dict(state['networks'][name])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state['optimizers'][name])
        if self.augment is not None:
            self.augment.p = state['augment_p']
        self._signs.copy_(torch.tensor(state['signs']))
        if not self.ranks.is_first:
            self._signs.zero_()  # The state holds the sum over all processes.
        self.iteration = state['iteration']

    def gather(self) -> None:
        """Move what processes have counted for themselves to the first one; all have to call it together."""
        self.ranks.sum_(self._signs, "the reduction of the discriminator's signs")
        if not self.ranks.is_first:
            self._signs.zero_()

    def check_weights(self) -> None:
        """Raise RuntimeError where processes hold different weights, or weights that are not finite."""
        for name, network in self.networks._asdict().items():
            tensors = list(network.state_dict().values())
            self.ranks.check_equal(name, tensors)
            is_finite = torch.stack([x.isfinite().all() for x in tensors if x.is_floating_point()]).all()
            if not is_finite:
                raise RuntimeError(f'{name}: holds weights that are not finite')

    def snapshot(self) -> dict[str, nn.Module]:
        """Return the networks under the names of snapshot files, their configs at the raw resolution of now."""
        for network in (self.networks.G, self.networks.G_ema):
            network.config = dataclasses.replace(network.config, neural_rendering_resolution=self.rendering_resolution)
        return {'G_ema': self.networks.G_ema, 'G': self.networks.G, 'D': self.networks.D}

    def _make_phases(self):
        c, (G, D, _) = self.config, self.networks
        self._optimizers = {
            'G': self._make_adam(G, c.glr, c.density_reg_every), 'D': self._make_adam(D, c.dlr, c.r1_every),
        }
        has_greg = c.density_reg_every > 0 and (c.loss.density_reg > 0 or c.loss.reg_type != 'l1')
        has_dreg = c.r1_every > 0 and c.loss.r1_gamma > 0
        phases = [Phase('Gmain', G, self._optimizers['G'], 1)]
        phases += [Phase('Greg', G, self._optimizers['G'], c.density_reg_every)] if has_greg else []
        phases += [Phase('Dmain', D, self._optimizers['D'], 1)]
        phases += [Phase('Dreg', D, self._optimizers['D'], c.r1_every)] if has_dreg else []
        return phases

    def _make_adam(self, network, lr, interval):
        lr, betas = schedules.lazy_adam(lr, ADAM_BETAS, interval)
        parameters = [p for p in network.parameters() if id(p) not in self._frozen]
        is_fused = self.ranks.device.type == 'cuda'  # On a CPU it would round differently from the published steps.
        return torch.optim.Adam(parameters, lr=lr, betas=betas, eps=ADAM_EPSILON, fused=is_fused)

    def _make_loss(self):
        G, D, renderer, eyeballs = self.networks.G, self.networks.D, None, []
        if self.config.disc_render is not None:
            renderer = MeshRenderer(G.faces[0], G.face_uvcoords[0], self.config.disc_render)
        if self.config.loss.gaze_mismatch > 0:
            template = read_obj(self.config.topology_path)
            found = find_eyeballs(template.vertices, template.faces)
            eyeballs = [torch.from_numpy(indices).to(self.ranks.device) for indices in found]
        return Next3DLoss(
            G, D, self.config.loss, self.config.batch, self.augment, self._report, renderer,
            track_w=lambda w: self._w_means.append(w.mean(dim=0)), eyeballs=eyeballs,
        )

    def _report(self, name, values):
        if self._recorded is not None:
            self._recorded.reports.append((name, values.detach()))
            return
        self.stats.report(name, values)
        torch.maximum(self._is_bad, (~values.detach().isfinite()).any(), out=self._is_bad)
        if name == 'Loss/signs/real' and self.config.augment == 'ada':
            self._signs += torch.stack([values.detach().sum(), torch.ones_like(values).sum()])

    def _reals_on_device(self, reals):
        image = self._micro_batches(reals.image).to(torch.float32) / 127.5 - 1
        mesh = None if reals.mesh is None else self._micro_batches(reals.mesh)
        return RealInput(image, self._micro_batches(reals.label), mesh)

    def _fakes_on_device(self, fakes):
        return Fakes(*(self._micro_batches(x) for x in fakes))

    def _micro_batches(self, array):
        tensor = torch.as_tensor(array).to(self.ranks.device, non_blocking=True)
        return tensor.reshape(self.plan.num_rounds, self.plan.batch_gpu, *tensor.shape[1:])

    def _run_phase(self, phase, samples, reals, fakes):
        parameters = [p for p in phase.network.parameters() if id(p) not in self._frozen]
        phase.optimizer.zero_grad(set_to_none=True)
        for parameter in parameters:
            parameter.requires_grad_(True)
        gain = phase.interval / (self.plan.num_rounds * self.plan.num_ranks)
        for number, numbers in enumerate(samples):
            real = RealInput(*(None if x is None else x[number] for x in reals))
            fake = None if fakes is None else Fakes(fakes.label[number], fakes.mesh[number])
            run = self._run_eagerly if self._graphs is None else self._run_captured
            run(phase.name, sample_keys(self.config.seed, phase.name, numbers), fake, real, gain, parameters, number)
        phase.network.requires_grad_(False)
        self._reduce_gradients(phase.name, parameters)
        phase.optimizer.step()

    def _run_eagerly(self, name, keys, fake, real, gain, _parameters, _number):
        self._micro_batch(name, keys, fake, real, gain, self.nimg)

    def _run_captured(self, name, keys, fake, real, gain, parameters, number):
        now = self.loss.schedule(self.nimg)
        if number == 1:
            self._graphs.keep_gradients(parameters)
        # A phase reads the pictures of others not at all: no copies, and no graph that waits for them.
        real = None if name in ('Gmain', 'Greg') else real
        pieces = [*(fake or ()), *(x for x in real or () if x is not None)]
        scalars = torch.tensor([now.swap, now.blur_sigma]).pin_memory()

        def body(keys, scalars, *pieces):
            pieces, swap, sigma = list(pieces), *scalars.unbind()
            fakes = None if fake is None else Fakes(*(pieces.pop(0) for _ in fake))
            reals = None if real is None else RealInput(*(None if x is None else pieces.pop(0) for x in real))
            self._recorded = Recorded([], self._w_means)
            self._micro_batch(name, keys, fakes, reals, gain, now._replace(swap=swap, blur_sigma=sigma))
            recorded, self._recorded = Recorded(self._recorded.reports, list(self._w_means)), None
            self._w_means.clear()
            return recorded

        earlier, self._w_means[:] = list(self._w_means), []
        key = () if name == 'Greg' else (now.resolution, now.blur_radius)
        try:
            inputs = [keys.pin_memory(), scalars, *pieces]
            recorded = self._graphs.run(name, key, body, inputs, parameters, number == 0)
        except RuntimeError as error:  # Out of memory too: graphs need more of it.
            recorded, reason = None, str(error).splitlines()[0]
        if recorded is None:  # After the block: the error holds what the attempt had allocated.
            _logger.warning('%s runs without CUDA graphs: %s', name, reason)
            self._graphs, self._recorded, self._w_means[:] = None, None, earlier
            if self.ranks.device.type == 'cuda':
                torch.cuda.empty_cache()
            return self._run_eagerly(name, keys, fake, real, gain, parameters, number)
        self._w_means[:] = earlier + [w.clone() for w in recorded.w_means]
        for report in recorded.reports:
            self._report(*report)

    def _micro_batch(self, name, keys, fake, real, gain, now):
        with keyed_draws(keys):
            fake = None if fake is None else self._generator_input(*fake)
            self._accumulate(name, fake, real, gain, now)

    def _accumulate(self, name, fake, real, gain, now):
        if name == 'Gmain':
            self.loss.generator_main(fake, gain, now)
        elif name == 'Greg':
            self.loss.generator_regularisation(fake, gain, now)
        elif name == 'Dmain':
            self.loss.discriminator_main(fake, real, gain, now)
        else:
            self.loss.discriminator_regularisation(real, gain, now)

    def _generator_input(self, label, mesh):
        z = normal([len(label), self.config.generator.z_dim], label.device)
        return GeneratorInput(z, label, mesh)

    def _reduce_gradients(self, name, parameters):
        """Average over processes in one flat reduction; NaN becomes 0, infinity LARGEST_GRADIENT, both counted.

        With them goes whether a loss was not finite, so that all processes count the same iterations as bad.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([*(g.reshape(-1) for g in gradients), self._is_bad.reshape(1)])
        self.ranks.sum_(flat, f"the reduction of {name}'s gradients")
        flat, is_bad_somewhere = flat[:-1], flat[-1] > 0
        self._is_bad.copy_(is_bad_somewhere)
        self.stats.report(f'Gradients/nonfinite/{name}', (~flat.isfinite()).sum())
        torch.nan_to_num(flat, nan=0.0, posinf=LARGEST_GRADIENT, neginf=-LARGEST_GRADIENT, out=flat)
        pieces = flat.split([g.numel() for g in gradients])
        torch._foreach_copy_(gradients, [piece.view_as(g) for piece, g in zip(pieces, gradients)])

    def _track_w(self):
        """Move w_avg once an iteration, towards the mean over all micro-batches and processes."""
        mean = torch.stack(self._w_means).mean(dim=0) / self.ranks.size
        self.ranks.sum_(mean, "the reduction of w's mean")
        self.networks.G.backbone.mapping.track(mean[None])
        self._w_means.clear()

    @torch.no_grad()
    def _average(self):
        G, average = self.networks.G, self.networks.G_ema
        beta = schedules.ema_beta(self.nimg, self.config.batch, self.config.ema_rampup)
        torch._foreach_lerp_(list(average.parameters()), list(G.parameters()), 1 - beta)
        torch._foreach_copy_(list(average.buffers()), list(G.buffers()))

    def _adjust_augmentation(self):
        self.ranks.sum_(self._signs, "the reduction of the discriminator's signs")
        total, count = self._signs.tolist()
        c = self.config
        self.augment.p = schedules.augment_probability(
            self.augment.p, total / max(count, 1), c.ada_target, ADA_INTERVAL * c.batch, c.ada_kimg
        )
        self._signs.zero_()
        self.stats.report('Progress/augment', self.augment.p)
