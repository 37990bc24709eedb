# SPDX-License-Identifier: Apache-2.0
"""Textures of random numbers that repeat without a seam, and looking into them."""

import functools

import numpy as np

SIZE = 512  # Side in cells; a power of two, so that a mask wraps indices.


@functools.cache
def texture(seed: int, falloff: float = 1.0, lowest: float = 2.0, stretch: float = 1.0) -> np.ndarray:
    """Return noise [SIZE, SIZE] float32 of mean 0 and deviation 1 that repeats at its edges.

    falloff: power with which amplitudes fall with frequency. lowest: cycles over the side below which there is nothing.
    stretch: above 1, features are that much longer along the rows.
    """
    white = np.random.default_rng(seed).standard_normal((SIZE, SIZE))
    frequency = np.fft.fftfreq(SIZE) * SIZE
    distance = np.hypot(frequency[:, None], frequency[None] * stretch)
    weight = np.where(distance >= lowest, np.maximum(distance, 1) ** -falloff, 0)
    noise = np.fft.ifft2(np.fft.fft2(white) * weight).real
    noise = ((noise - noise.mean()) / noise.std()).astype(np.float32)
    noise.flags.writeable = False
    return noise


def look_up(noise: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the cells of a texture at columns x and rows y, in cells, wrapped; the nearest ones."""
    column, row = x.astype(np.int32) & (SIZE - 1), y.astype(np.int32) & (SIZE - 1)
    return noise.ravel().take(row * SIZE + column)


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """Rise from 0 at `low` to 1 at `high` with a continuous derivative; low > high falls instead."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [..., 3] at length 1; those of no length stay."""
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    length = np.sqrt(x * x + y * y + z * z)[..., None]
    return vectors / np.maximum(length, 1e-12)
