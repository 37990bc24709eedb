# SPDX-License-Identifier: Apache-2.0
"""Quantities that change during training, as pure functions of the images shown so far."""

import math

EMA_HALF_LIFE_KIMG_PER_32 = 10.0  # Half-life of the averaged generator at a batch of 32.
REFERENCE_BATCH = 32


def _progress(nimg: float, fade_kimg: float) -> float:
    """Return how far a fade from image 0 on has come, 0 to 1; a fade of no length is over at once."""
    return min(nimg / (fade_kimg * 1000), 1.0) if fade_kimg > 0 else 1.0


def blur_sigma(nimg: float, initial: float, fade_kimg: float, batch: int) -> float:
    """Return the standard deviation in pixels of the blur in front of the discriminator.

    It fades from `initial` to 0 over fade_kimg at a batch of 32, in proportion at others.
    """
    return initial * (1 - _progress(nimg, fade_kimg * batch / REFERENCE_BATCH))


def swap_probability(nimg: float, final: float, fade_kimg: float) -> float:
    """Return how often the generator is conditioned on another camera than it renders: 1 fading to `final`."""
    alpha = _progress(nimg, fade_kimg)
    return (1 - alpha) + alpha * final


def rendering_resolution(nimg: float, initial: int, final: int | None, fade_kimg: float) -> int:
    """Return the side of the raw picture, fading from `initial` to `final` (None: no fade), rounded half to even."""
    if final is None:
        return initial
    alpha = _progress(nimg, fade_kimg)
    return round(initial * (1 - alpha) + final * alpha)


def ema_beta(nimg: float, batch: int, rampup: float | None) -> float:
    """Return the weight of the old average in one update of the averaged generator.

    The half-life is 10 kimg at a batch of 32, in proportion at others, and at most rampup·nimg (None: no ramp-up).
    """
    half_life = batch * EMA_HALF_LIFE_KIMG_PER_32 / REFERENCE_BATCH * 1000
    if rampup is not None:
        half_life = min(half_life, nimg * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))


def lazy_adam(lr: float, betas: tuple[float, float], interval: int | None) -> tuple[float, tuple[float, float]]:
    """Return Adam's learning rate and betas for a network whose regularisation runs every `interval` iterations.

    The optimiser takes interval + 1 steps where it would take interval (Karras et al. 2020, appendix B). None or 0:
    no regularisation.
    """
    if not interval:
        return lr, betas
    ratio = interval / (interval + 1)
    return lr * ratio, (betas[0] ** ratio, betas[1] ** ratio)


def augment_probability(p: float, sign: float, target: float, images: int, ada_kimg: float) -> float:
    """Return ADA's next probability: it moves by images/(1000·ada_kimg) towards the target (Karras et al. 2020b).

    sign: mean sign of the discriminator's logits on real images since the last adjustment.
    """
    if not math.isfinite(sign):
        return p
    step = images / (ada_kimg * 1000)
    return max(p + (step if sign > target else -step if sign < target else 0.0), 0.0)
