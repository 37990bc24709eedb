# SPDX-License-Identifier: Apache-2.0
"""Names of expressions for people: groups, labels, search, and the few controls that move several at once."""

import re
from collections.abc import Iterable

# What each group's names begin with; the first that fits counts.
GROUPS = {
    'Brows': ('brow',),
    'Lids': ('eyeBlink', 'eyeSquint', 'eyeWide'),
    'Gaze': ('eyeLook',),
    'Jaw': ('jaw',),
    'Mouth corners': ('mouthSmile', 'mouthFrown', 'mouthDimple', 'mouthStretch'),
    'Lips': ('mouth',),
    'Cheeks, nose, tongue': ('cheek', 'nose', 'tongue'),
}
OTHERS = 'Others'
# Controls and the names that they move: (at positive values, at negative ones).
CONTROLS = {
    'jaw': (('jawOpen',), ()),
    'blink': (('eyeBlinkLeft', 'eyeBlinkRight'), ()),
    'gaze_x': (('eyeLookOutLeft', 'eyeLookInRight'), ('eyeLookInLeft', 'eyeLookOutRight')),
    'gaze_y': (('eyeLookUpLeft', 'eyeLookUpRight'), ('eyeLookDownLeft', 'eyeLookDownRight')),
}


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Return names by group, groups in the order of GROUPS, each name once; groups without any are left out."""
    found = {group: [] for group in (*GROUPS, OTHERS)}
    for name in names:
        fitting = (group for group, beginnings in GROUPS.items() if name.startswith(beginnings))
        found[next(fitting, OTHERS)].append(name)
    return {group: members for group, members in found.items() if members}


def label(name: str) -> str:
    """Return the words of a name: 'mouthSmileLeft' -> 'mouth smile left'."""
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])', ' ', name).lower()


def matches(query: str, name: str) -> bool:
    """Tell whether every word of a query is part of a name, of its label, or of its group; no words: always."""
    group = next(iter(grouped([name])))
    text = f'{name} {label(name)} {group}'.lower()
    return all(word in text for word in query.lower().split())


def control_weights(control: str, value: float) -> dict[str, float]:
    """Return the weights that a control sets at a value from -1 to 1: of all names that it moves, 0 for the others.

    jaw, blink: 0 to 1. gaze_x: 1 is the picture's right, the person's left. gaze_y: 1 is up.
    """
    positive, negative = CONTROLS[control]
    return dict.fromkeys(negative, max(0.0, -value)) | dict.fromkeys(positive, max(0.0, value))


def control_value(control: str, weights: dict[str, float]) -> float:
    """Return the value at which a control shows what weights are: the inverse of `control_weights`, else a mean."""
    positive, negative = (
        sum(weights.get(name, 0.0) for name in names) / max(len(names), 1) for names in CONTROLS[control]
    )
    return positive - negative


def controlled(names: Iterable[str], controls: dict[str, tuple] = CONTROLS) -> list[str]:
    """Return the controls of which all names are among these."""
    known = set(names)
    return [control for control, (positive, negative) in controls.items() if known.issuperset(positive + negative)]
