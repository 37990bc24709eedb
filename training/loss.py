# SPDX-License-Identifier: Apache-2.0
"""The four training phases (Sun et al. 2023, section 3.5; Chan et al. 2022, section 5): one method each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import l1_loss, relu, softplus

from geometry.eyeballs import turn_eyeballs
from torch_utils.ops.upfirdn2d import filter2d
from torch_utils.randomness import normal, uniform
from training import schedules
from training.discriminator import Discriminator
from training.generator import Next3DGenerator, Planes
from training.superresolution import resize_antialiased

NUM_POINTS = 1000  # Pairs of points at which density is compared.
NUM_MONOTONIC_POINTS = 2000
MONOTONIC_STEP = 1 / 256  # Of the volume's side.
MONOTONIC_WEIGHT = 10.0
TURN_DEG, PITCH_SHARE = (10.0, 35.0), 0.6  # How far wrong eyes turn, and how much of it where they look up or down.
DENSITY_REGIONS = ('box', 'published')
REG_TYPES = ('l1', 'monotonic-fixed')
Report = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and schedules of the objective.

    r1_gamma: weight of the gradient penalty. density_reg: weight of the density regularisation, whose pairs of points
    are density_reg_p_dist apart and lie in density_region: 'box', the volume, or 'published', [-1, 1]³, most of which
    no camera sees. reg_type: 'l1', or 'monotonic-fixed', which also keeps density from falling with depth.
    gpc_reg_prob: how often the conditioning camera is swapped at the end of the fade; None: no pose conditioning.
    blur_*, rendering_*: see `training.schedules`. style_mixing_prob: how often a second latent takes over at a layer.
    gaze_mismatch: weight of real pictures whose rendering looks elsewhere, as pictures that are not real.
    """

    r1_gamma: float = 4.0
    density_reg: float = 0.25
    density_reg_p_dist: float = 0.004
    density_region: str = 'box'
    reg_type: str = 'l1'
    gpc_reg_prob: float | None = 0.5
    gpc_reg_fade_kimg: float = 1000.0
    blur_init_sigma: float = 10.0
    blur_fade_kimg: float = 200.0
    rendering_resolution_initial: int = 64
    rendering_resolution_final: int | None = None
    rendering_resolution_fade_kimg: float = 1000.0
    style_mixing_prob: float = 0.0
    gaze_mismatch: float = 0.0

    def __post_init__(self):
        if self.density_region not in DENSITY_REGIONS:
            raise ValueError(f'density_region: expected one of {DENSITY_REGIONS}, got {self.density_region!r}')
        if self.reg_type not in REG_TYPES:
            raise ValueError(f'reg_type: expected one of {REG_TYPES}, got {self.reg_type!r}')

    def rendering_resolution(self, nimg: int) -> int:
        """Return the side of raw pictures after so many images."""
        return schedules.rendering_resolution(
            nimg,
            self.rendering_resolution_initial,
            self.rendering_resolution_final,
            self.rendering_resolution_fade_kimg,
        )


class Schedule(NamedTuple):
    """What the objective's schedules say at a moment of training; the last two may be tensors on the device.

    resolution: side of raw pictures. blur_radius: of the blur's kernel, 0: none. swap: probability of conditioning on
    another camera. blur_sigma: in pixels.
    """

    resolution: int
    blur_radius: int
    swap: float | torch.Tensor
    blur_sigma: float | torch.Tensor


class GeneratorInput(NamedTuple):
    """What one fake picture is made of: z [N, z_dim], label c [N, 25 or more], mesh v [N, V + 68, 3]."""

    z: torch.Tensor
    c: torch.Tensor
    v: torch.Tensor


class RealInput(NamedTuple):
    """Real pictures [N, 3, R, R] in [-1, 1] with their labels [N, c_dim] and, for renderings, meshes [N, V + 68, 3]."""

    image: torch.Tensor
    c: torch.Tensor
    v: torch.Tensor | None = None


class Next3DLoss:
    """Computes losses and accumulates gradients with backward(); every phase takes one micro-batch.

    batch: images of a whole iteration, which sets the pace of the blur. augment: image, raw image and, with a renderer,
    rendering as [N, 6 or 9, R, R] -> the same shape, or None. report: called with a name and the values of a statistic.
    renderer: meshes [N, V + 68, 3] and labels -> pictures [N, 3, r, r], for a discriminator with `render_channels`.
    track_w: called with Dmain's w [N, w_dim]; None: the generator's own `track`. eyeballs: vertices [K] of each, for
    `gaze_mismatch`.
    """

    def __init__(
        self,
        generator: Next3DGenerator,
        discriminator: Discriminator,
        config: LossConfig,
        batch: int,
        augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
        report: Report = lambda name, values: None,
        renderer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        track_w: Callable[[torch.Tensor], None] | None = None,
        eyeballs: Sequence[torch.Tensor] = (),
    ):
        if (renderer is None) == (discriminator.config.render_channels > 0):
            raise ValueError('renderer: expected one for a discriminator with render_channels, and for no other')
        if config.gaze_mismatch and (renderer is None or not eyeballs):
            raise ValueError('gaze_mismatch: expected a renderer and eyeballs, which turn in its renderings')
        self.generator, self.discriminator, self.config = generator, discriminator, config
        self.batch, self.augment, self.report, self.renderer = batch, augment, report, renderer
        self.eyeballs = eyeballs
        self.track_w = generator.backbone.mapping.track if track_w is None else track_w

    def schedule(self, nimg: float | Schedule) -> Schedule:
        """Return what the schedules say after so many images; a Schedule is returned as it is."""
        if isinstance(nimg, Schedule):
            return nimg
        c, swap = self.config, 0.0
        if c.gpc_reg_prob is not None:
            swap = schedules.swap_probability(nimg, c.gpc_reg_prob, c.gpc_reg_fade_kimg)
        sigma = schedules.blur_sigma(nimg, c.blur_init_sigma, c.blur_fade_kimg, self.batch)
        return Schedule(c.rendering_resolution(nimg), int(sigma * 3), swap, sigma)

    def generator_main(self, fake: GeneratorInput, gain: float, nimg: int | Schedule) -> None:
        """Gmain: maximise the logits of generated pictures."""
        images = self._generate(fake, nimg)
        logits = self._score(images, fake.c, nimg)
        self._report_scores('fake', logits)
        loss = softplus(-logits)
        self.report('Loss/G/loss', loss)
        (loss.mean() * gain).backward()

    def generator_regularisation(self, fake: GeneratorInput, gain: float, nimg: int | Schedule) -> None:
        """Greg: neighbouring points have similar densities; 'monotonic-fixed' adds that density grows with depth."""
        conditioning = self._swapped_label(fake.c, nimg, per_sample=False)
        ws = self.generator.mapping(fake.z, conditioning)
        planes = self.generator.planes(ws, fake.v, noise_mode='random')
        losses = [self._smoothness]
        if self.config.reg_type == 'monotonic-fixed':
            losses.insert(0, self._monotonicity)
        # One graph of the planes for all terms; each term's own graph is freed as soon as it has been walked.
        leaf = Planes(planes.planes.detach().requires_grad_(True))
        for term in losses:
            (term(leaf) * gain).backward()
        planes.planes.backward(leaf.planes.grad)

    def discriminator_main(self, fake: GeneratorInput, real: RealInput, gain: float, nimg: int | Schedule) -> None:
        """Dmain: minimise the logits of generated, maximise those of real pictures; hands w to `track_w`."""
        with torch.no_grad():
            images = self._generate(fake, nimg, track_w=True)
        logits = self._score(images, fake.c, nimg)
        self._report_scores('fake', logits)
        loss_fake = softplus(logits)
        (loss_fake.mean() * gain).backward()
        images = self._real_images(real, nimg)
        logits = self._score(images, real.c, nimg)
        self._report_scores('real', logits)
        loss_real = softplus(-logits)
        self.report('Loss/D/loss', loss_fake.detach() + loss_real)
        (loss_real.mean() * gain).backward()
        if self.config.gaze_mismatch > 0:
            self._mismatched_gaze(images, real, gain, nimg)

    def discriminator_regularisation(self, real: RealInput, gain: float, nimg: int | Schedule) -> None:
        """Dreg: R1, squared gradients of the logits with respect to the pictures that D finally sees.

        The rendering takes no part: it is a condition like the label.
        """
        images = self._prepare(self._real_images(real, nimg), nimg)
        images = {name: image.detach().requires_grad_(name != 'render') for name, image in images.items()}
        logits = self.discriminator(images, real.c)
        self._report_scores('real', logits)
        seen = ['image'] if self.discriminator.config.kind == 'single' else ['image', 'image_raw']
        gradients = torch.autograd.grad(logits.sum(), [images[name] for name in seen], create_graph=True)
        penalty = sum(g.square().sum(dim=[1, 2, 3]) for g in gradients)
        self.report('Loss/r1_penalty', penalty)
        loss = penalty * (self.config.r1_gamma / 2)
        self.report('Loss/D/reg', loss)
        (loss.mean() * gain).backward()

    def _mismatched_gaze(self, images, real, gain, nimg):
        """Minimise the logits of real pictures beside renderings whose eyes look elsewhere.

        A matching-aware discriminator (Reed et al. 2016, section 4.2): it overlooks small eyes otherwise.
        """
        direction, amount = uniform([len(real.c), 2], real.c.device).unbind(dim=1)
        least, most = (math.radians(degrees) for degrees in TURN_DEG)
        direction, amount = direction * 2 * math.pi, least + amount * (most - least)
        angles = torch.stack([amount * direction.cos(), PITCH_SHARE * amount * direction.sin()], dim=1)
        turned = turn_eyeballs(real.v, self.eyeballs, angles)
        logits = self._score(images | self._rendering(turned, real.c), real.c, nimg)
        self._report_scores('mismatch', logits)
        loss = softplus(logits) * self.config.gaze_mismatch
        self.report('Loss/D/mismatch', loss)
        (loss.mean() * gain).backward()

    def _generate(self, fake, nimg, track_w=False):
        """Return image, image_raw and rendering of a micro-batch, conditioned on swapped labels."""
        conditioning = self._swapped_label(fake.c, nimg, per_sample=True)
        ws = self.generator.mapping(fake.z, conditioning)
        if track_w:
            self.track_w(ws[:, 0])
        ws = self._mix_styles(ws, conditioning)
        resolution = self.schedule(nimg).resolution
        out = self.generator.synthesis(
            ws, fake.c, fake.v, noise_mode='random', neural_rendering_resolution=resolution, depth_jitter='random'
        )
        return {name: out[name] for name in ('image', 'image_raw')} | self._rendering(fake.v, fake.c)

    def _swapped_label(self, c, nimg, per_sample):
        """Return the label that the mapping sees: sample n's, or that of sample n - 1."""
        if self.config.gpc_reg_prob is None:
            return torch.zeros_like(c)
        draw = uniform([len(c), 1] if per_sample else [], c.device)
        return torch.where(draw < self.schedule(nimg).swap, c.roll(1, dims=0), c)

    def _mix_styles(self, ws, conditioning):
        """Replace the w's from a random layer on by those of another latent, in some of the micro-batches."""
        if self.config.style_mixing_prob == 0:
            return ws
        num_ws = ws.shape[1]
        cutoff = 1 + (uniform([], ws.device) * (num_ws - 1)).long()
        cutoff = torch.where(uniform([], ws.device) < self.config.style_mixing_prob, cutoff, num_ws)
        other = self.generator.mapping(normal([len(ws), self.generator.z_dim], ws.device), conditioning)
        return torch.where(torch.arange(num_ws, device=ws.device)[:, None] < cutoff, ws, other)

    def _score(self, images, c, nimg):
        return self.discriminator(self._prepare(images, nimg), c)

    def _prepare(self, images, nimg):
        """Blur and augment as the schedules say: what the discriminator finally sees."""
        images = images | {'image': self._blur(images['image'], nimg)}
        if self.augment is None:
            return images
        image, *others = images.values()
        size, raw_size = image.shape[-1], images['image_raw'].shape[-1]
        joined = self.augment(torch.cat([image, *(resize_antialiased(x, size) for x in others)], dim=1))
        seen = dict(zip(images, joined.split(3, dim=1), strict=True))
        return seen | {'image_raw': resize_antialiased(seen['image_raw'], raw_size)}

    def _rendering(self, v, c):
        """Return the rendering of meshes as an entry beside the pictures; no entry without a renderer."""
        if self.renderer is None:
            return {}
        if v is None:
            raise ValueError('real: expected the meshes v of the pictures for their rendering, got None')
        return {'render': self.renderer(v, c)}

    def _real_images(self, real, nimg):
        resolution = self.schedule(nimg).resolution
        raw = self._blur(resize_antialiased(real.image, resolution), nimg)
        return {'image': real.image, 'image_raw': raw} | self._rendering(real.v, real.c)

    def _blur(self, image, nimg):
        now = self.schedule(nimg)
        if now.blur_radius == 0:
            return image
        offsets = torch.arange(-now.blur_radius, now.blur_radius + 1, device=image.device)
        kernel = (offsets / now.blur_sigma).square().neg().exp2()
        return filter2d(image, kernel / kernel.sum())

    def _smoothness(self, planes):
        """L1 between the densities of random points and of points beside them."""
        if self.config.reg_type == 'monotonic-fixed':
            distance = MONOTONIC_STEP * self.generator.config.sampling.box_warp
        else:
            distance = self.config.density_reg_p_dist
        points = self._random_points(planes, NUM_POINTS)
        beside = points + normal(points.shape, points.device) * distance
        sigma = self.generator.query(planes, torch.cat([points, beside], dim=1), with_rgb=False)['sigma']
        return l1_loss(*sigma.split(NUM_POINTS, dim=1)) * self.config.density_reg

    def _monotonicity(self, planes):
        """How much density falls from a point to the one behind it, away from the frontal camera."""
        points = self._random_points(planes, NUM_MONOTONIC_POINTS)
        step = MONOTONIC_STEP * self.generator.config.sampling.box_warp
        behind = torch.cat([points[..., :2], points[..., 2:] - step], dim=-1)
        sigma = self.generator.query(planes, torch.cat([points, behind], dim=1), with_rgb=False)['sigma']
        front, back = sigma.split(NUM_MONOTONIC_POINTS, dim=1)
        return relu(front - back).mean() * MONOTONIC_WEIGHT

    def _random_points(self, planes, count):
        half = 1.0 if self.config.density_region == 'published' else self.generator.config.sampling.box_warp / 2
        device = planes.planes.device
        return (uniform([len(planes.planes), count, 3], device) * 2 - 1) * half

    def _report_scores(self, kind, logits):
        self.report(f'Loss/scores/{kind}', logits)
        self.report(f'Loss/signs/{kind}', logits.sign())
