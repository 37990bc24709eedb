# SPDX-License-Identifier: Apache-2.0
"""Expressions as weights of the 52 ARKit shapes: faces people make, mixed, lopsided, and each shape on its own."""

import numpy as np

# Ranges of weights; a name without Left or Right that ARKit has for both sides stands for both.
MOUTHS = {
    'neutral': {},
    'rest': {'mouthSmile': (0, 0.15), 'mouthPress': (0, 0.2), 'jawOpen': (0, 0.04)},
    'smile': {'mouthSmile': (0.35, 0.75), 'cheekSquint': (0.1, 0.5), 'mouthDimple': (0, 0.3)},
    'grin': {'mouthSmile': (0.6, 1), 'mouthUpperUp': (0.3, 0.7), 'mouthLowerDown': (0.1, 0.4), 'jawOpen': (0.02, 0.15),
             'cheekSquint': (0.3, 0.9)},
    'laugh': {'mouthSmile': (0.6, 1), 'mouthUpperUp': (0.2, 0.5), 'jawOpen': (0.25, 0.6), 'cheekSquint': (0.4, 1)},
    'say a': {'jawOpen': (0.2, 0.6), 'mouthLowerDown': (0, 0.3)},
    'say e': {'jawOpen': (0.05, 0.2), 'mouthStretch': (0.2, 0.6), 'mouthLowerDown': (0.2, 0.5),
              'mouthSmile': (0, 0.3)},
    'say o': {'jawOpen': (0.1, 0.4), 'mouthFunnel': (0.4, 0.9), 'mouthPucker': (0.1, 0.4)},
    'say u': {'jawOpen': (0.02, 0.12), 'mouthPucker': (0.5, 1), 'mouthFunnel': (0.1, 0.5)},
    'say m': {'mouthPress': (0.3, 0.8), 'mouthRollLower': (0.1, 0.5), 'mouthRollUpper': (0.1, 0.5)},
    'say f': {'mouthRollLower': (0.4, 0.8), 'mouthUpperUp': (0.2, 0.5), 'jawOpen': (0.02, 0.1)},
    'wide open': {'jawOpen': (0.75, 1), 'mouthStretch': (0, 0.4), 'mouthFunnel': (0, 0.3)},
    'frown': {'mouthFrown': (0.4, 1), 'mouthShrugLower': (0.1, 0.6), 'mouthPress': (0, 0.3)},
    'disgust': {'noseSneer': (0.5, 1), 'mouthUpperUp': (0.2, 0.6), 'mouthShrugUpper': (0, 0.4)},
    'puff': {'cheekPuff': (0.5, 1), 'mouthPress': (0.1, 0.4)},
    'kiss': {'mouthPucker': (0.7, 1)},
    'aside': {'jawLeft': (0, 0.6), 'mouthLeft': (0.1, 0.6)},
    'aside too': {'jawRight': (0, 0.6), 'mouthRight': (0.1, 0.6)},
}
MOUTH_SHARES = {
    'neutral': 10, 'rest': 12, 'smile': 20, 'grin': 20, 'laugh': 9, 'say a': 9, 'say e': 5, 'say o': 5, 'say u': 4,
    'say m': 4, 'say f': 3, 'wide open': 6, 'frown': 4, 'disgust': 2, 'puff': 1.5, 'kiss': 1.5, 'aside': 1.5,
    'aside too': 1.5,
}  # fmt: skip
BROWS = [
    (0.55, {}),
    (0.15, {'browInnerUp': (0.1, 0.6)}),
    (0.10, {'browInnerUp': (0.3, 0.9), 'browOuterUp': (0.4, 1)}),
    (0.13, {'browDown': (0.2, 0.9)}),
    (0.07, {'browInnerUp': (0.4, 1), 'browDown': (0, 0.3)}),
]
LIDS = [
    (0.62, {}),
    (0.07, {'eyeBlink': (0.92, 1)}),
    (0.08, {'eyeBlink': (0.3, 0.8)}),
    (0.13, {'eyeSquint': (0.2, 0.9)}),
    (0.08, {'eyeWide': (0.3, 1)}),
    (0.01, {'eyeBlinkLeft': (0.9, 1)}),
    (0.01, {'eyeBlinkRight': (0.9, 1)}),
]
LOPSIDED, SINGLE = 0.3, 0.2  # Shares of faces whose sides differ, and of those with a shape drawn on its own.
GAZE_YAW, GAZE_PITCH, GAZE_AHEAD = 0.38, 0.28, 0.35  # Spread over the shapes' full turn; share that looks ahead.


def random_expression(rng: np.random.Generator, names: list[str]) -> dict[str, float]:
    """Return weights in (0, 1] of an expression that people may make, by ARKit name."""
    mouth = list(MOUTH_SHARES)[_choose(rng, MOUTH_SHARES.values())]
    weights = {}
    for ranges in (MOUTHS[mouth], *(table[_choose(rng, [share for share, _ in table])][1] for table in (BROWS, LIDS))):
        _add(weights, drawn(rng, ranges, names))
    if rng.random() > GAZE_AHEAD:
        _add(weights, gaze(*rng.normal(0, (GAZE_YAW, GAZE_PITCH))))
    if rng.random() < LOPSIDED:
        left, right = rng.uniform(0.3, 1, 2)
        weights = {name: w * (left if 'Left' in name else right if 'Right' in name else 1)
                   for name, w in weights.items()}  # fmt: skip
    if rng.random() < SINGLE:
        _add(weights, {names[rng.integers(len(names))]: rng.uniform(0.2, 1)})
    return {name: float(np.clip(weight, 0, 1)) for name, weight in weights.items() if name in names}


def drawn(rng: np.random.Generator, ranges: dict, names: list[str]) -> dict[str, float]:
    """Return a weight within each range; both sides of a pair are nearly equal."""
    weights = {}
    for name, (low, high) in ranges.items():
        value = rng.uniform(low, high)
        if name in names:
            weights[name] = value
        else:
            weights |= {f'{name}{side}': value * rng.uniform(0.9, 1) for side in ('Left', 'Right')}
    return weights


def gaze(yaw: float, pitch: float) -> dict[str, float]:
    """Return weights of eyes turned to the picture's right (yaw > 0) and up (pitch > 0), with lids that follow.

    1 is the full turn of the shapes. The subject's left eye is on the picture's right.
    """
    out, inwards = ('Left', 'Right') if yaw > 0 else ('Right', 'Left')
    weights = {f'eyeLookOut{out}': abs(yaw), f'eyeLookIn{inwards}': abs(yaw)}
    for side in ('Left', 'Right'):
        if pitch > 0:
            weights |= {f'eyeLookUp{side}': pitch, f'eyeWide{side}': 0.3 * pitch}
        else:
            weights |= {f'eyeLookDown{side}': -pitch, f'eyeBlink{side}': -0.35 * pitch}
    return weights


def _add(weights, more):
    for name, weight in more.items():
        weights[name] = weights.get(name, 0) + weight


def _choose(rng, shares):
    shares = np.array(list(shares), dtype=float)
    return int(rng.choice(len(shares), p=shares / shares.sum()))
