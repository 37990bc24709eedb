# SPDX-License-Identifier: Apache-2.0
"""What a face does over some seconds: talking, blinking, looking about, and the head's turns."""

import numpy as np
from scipy.ndimage import gaussian_filter1d

from dataset_preprocessing.synthetic.expressions import MOUTHS, drawn, gaze

RATE = 100  # Steps a second in which motion is made; frames are taken from them.
VISEMES = {'say a': 6, 'say e': 4, 'say o': 3, 'say u': 2, 'say m': 3, 'say f': 2, 'rest': 1}
SYLLABLE, PAUSE, PAUSE_SHARE = (0.09, 0.19), (0.3, 0.7), 0.10  # Seconds.
BLINK_EVERY, BLINK_CLOSING, BLINK_OPENING = (1.6, 4.5), 0.08, 0.16
SACCADE_EVERY = (0.7, 2.0)
MOUTH_BLUR, GAZE_BLUR, BROW_BLUR = 0.035, 0.025, 0.25  # Seconds.
YAW, PITCH, ROLL = 0.42, 0.11, 0.045  # Amplitudes of turns, radians.


def expressions(rng: np.random.Generator, names: list[str], duration: float) -> np.ndarray:
    """Return weights [RATE·duration, E] of a talking face."""
    steps = int(np.ceil(duration * RATE)) + 1
    weights = _talk(rng, names, steps) + _brows(rng, names, steps) + _looks(rng, names, steps)
    lids = [names.index('eyeBlinkLeft'), names.index('eyeBlinkRight')]
    weights[:, lids] = np.maximum(weights[:, lids], _blinks(rng, steps)[:, None])
    return np.clip(weights, 0, 1)


def turns(rng: np.random.Generator, duration: float) -> np.ndarray:
    """Return yaw, pitch and roll [RATE·duration, 3] of the head against the camera, in radians."""
    seconds = np.arange(int(np.ceil(duration * RATE)) + 1) / RATE
    phase = rng.uniform(0, 2 * np.pi, (3, 2))
    slow = np.array([[0.16, 0.23, 0.13], [0.41, 0.52, 0.37]])
    parts = [np.sin(2 * np.pi * slow[k] * seconds[:, None] + phase[:, k]) for k in (0, 1)]
    return (0.75 * parts[0] + 0.25 * parts[1]) * (YAW, PITCH, ROLL)


def _row(names, weights):
    row = np.zeros(len(names))
    for name, weight in weights.items():
        row[names.index(name)] = weight
    return row


def _talk(rng, names, steps):
    keys, start = np.zeros((steps, len(names))), 0
    while start < steps:
        rests = rng.random() < PAUSE_SHARE
        end = start + int(RATE * rng.uniform(*(PAUSE if rests else SYLLABLE)))
        shares = np.array(list(VISEMES.values()))
        viseme = 'rest' if rests else rng.choice(list(VISEMES), p=shares / shares.sum())
        keys[start:end] = _row(names, drawn(rng, MOUTHS[viseme], names)) * rng.uniform(0.6, 1)
        start = end
    return gaussian_filter1d(keys, MOUTH_BLUR * RATE, axis=0)


def _brows(rng, names, steps):
    keys = np.zeros((steps, len(names)))
    for start in range(0, steps, RATE):
        raised = rng.uniform(0, 0.7) * (rng.random() < 0.4)
        smile = rng.uniform(0, 0.35)
        keys[start : start + RATE] = _row(names, {
            'browInnerUp': raised, 'browOuterUpLeft': 0.7 * raised, 'browOuterUpRight': 0.7 * raised,
            'mouthSmileLeft': smile, 'mouthSmileRight': smile,
        })  # fmt: skip
    return gaussian_filter1d(keys, BROW_BLUR * RATE, axis=0)


def _looks(rng, names, steps):
    keys, start = np.zeros((steps, len(names))), 0
    while start < steps:
        end = start + int(RATE * rng.uniform(*SACCADE_EVERY))
        ahead = rng.random() < 0.4
        keys[start:end] = _row(names, gaze(*rng.normal(0, (0.3, 0.15)) * (not ahead)))
        start = end
    return gaussian_filter1d(keys, GAZE_BLUR * RATE, axis=0)


def _blinks(rng, steps):
    seconds, closed = np.arange(steps) / RATE, np.zeros(steps)
    moment = rng.uniform(0.5, 1.5)
    while moment < steps / RATE:
        before, after = (moment - seconds) / BLINK_CLOSING, (seconds - moment) / BLINK_OPENING
        closed = np.maximum(closed, np.clip(1.15 - np.maximum(before, after), 0, 1))
        moment += rng.uniform(*BLINK_EVERY)
    return closed
