# SPDX-License-Identifier: Apache-2.0
"""One HTML file that shows a data set: meshes over pictures, errors, poses, faults, rejected pictures."""

import base64
import html
import io
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset_preprocessing.overlay import draw_overlay
from geometry.cameras import CAM2WORLD
from training.data_checks import Fault

THUMBNAIL, MAX_THUMBNAILS, NUM_WORST, NUM_BINS = 192, 120, 20, 24
DRAWN_SIDE = 512  # Overlays are drawn at this size, then reduced.
CHART_WIDTH, CHART_HEIGHT = 560, 180
STYLE = (
    'body{font-family:sans-serif;margin:2em;max-width:1300px}figure{display:inline-block;margin:4px;font-size:11px;'
    'width:192px;overflow-wrap:anywhere}figcaption{text-align:center}svg{background:#f4f4f4}td{padding:2px 12px 2px 0}'
)


class ReportItem(NamedTuple):
    """A picture of the set. vertices: [V, 3]; label: [25]."""

    name: str
    picture: Image.Image
    vertices: np.ndarray
    label: np.ndarray


def page(
    title: str,
    names: list[str],
    labels: np.ndarray,
    errors: dict[str, float],
    read: Callable[[int], ReportItem],
    faces: np.ndarray,
    faults: list[Fault],
    rejected: list[str],
) -> str:
    """Return the page of items `names` with labels [N, 25]; read(i) reads one. errors: of those for which it is known,
    over the eyes' distance. faces: [F, 3] of the meshes.

    At most 120 items, spread over all, and the worst 20 are shown.
    """
    shown = np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_THUMBNAILS)).round().astype(int)).tolist()
    worst = sorted((i for i, name in enumerate(names) if name in errors), key=lambda i: -errors[names[i]])[:NUM_WORST]
    pictures = {i: _figure(read(i), faces, errors.get(names[i])) for i in {*shown, *worst}}
    parts = [f'<h1>{html.escape(title)}</h1><p>{len(names)} items, {len(faults)} faults, {len(rejected)} rejected</p>']
    if errors:
        values = 100 * np.array([errors[name] for name in names if name in errors])
        parts.append('<h2>Error</h2><p>Median distance of found and fitted points over the distance of the eyes: '
                     f'median {np.median(values):.2f} %, largest {values.max():.2f} %</p>')  # fmt: skip
        parts.append(_histogram(values))
    parts.append(f'<h2>Poses</h2>{_poses(labels)}')
    if worst:
        parts.append(f'<h2>The worst {len(worst)}</h2>' + ''.join(pictures[i] for i in worst))
    for heading, lines in (('Faults', list(map(str, faults))), ('Rejected', rejected)):
        if lines:
            items = ''.join(f'<li>{html.escape(line)}</li>' for line in lines)
            parts.append(f'<h2>{heading}</h2><ul>{items}</ul>')
    parts.append(f'<h2>Items ({len(shown)} of {len(names)})</h2>' + ''.join(pictures[i] for i in shown))
    return (
        f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<style>{STYLE}</style></head><body>{"".join(parts)}</body></html>\n'
    )


def angles_deg(labels: np.ndarray) -> np.ndarray:
    """Return yaw and pitch [N, 2] in degrees of the cameras of labels [N, 25]: to the picture's right, up."""
    x, y, z = labels[:, CAM2WORLD].reshape(-1, 4, 4)[:, :3, 3].astype(float).T
    return np.degrees(np.stack([np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))], axis=1))


def read_rejected(path: pathlib.Path) -> list[str]:
    """Return the lines of a file of rejected pictures; none where there is no file."""
    return path.read_text(encoding='utf-8').splitlines() if path.is_file() else []


def _figure(item, faces, error):
    picture = item.picture.resize((DRAWN_SIDE, DRAWN_SIDE))
    drawn = draw_overlay(picture, item.vertices, faces, item.label).resize((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    drawn.save(stream, format='JPEG', quality=80)
    code = base64.b64encode(stream.getvalue()).decode('ascii')
    told = '' if error is None else f'<br>{100 * error:.2f} %'
    return (
        f'<figure><img src="data:image/jpeg;base64,{code}" width="{THUMBNAIL}" height="{THUMBNAIL}">'
        f'<figcaption>{html.escape(item.name)}{told}</figcaption></figure>'
    )


def _histogram(values):
    counts, edges = np.histogram(values, NUM_BINS, (0, max(float(values.max()), 1e-6)))
    step = CHART_WIDTH / NUM_BINS
    bars = []
    for number, count in enumerate(counts):
        height = (CHART_HEIGHT - 20) * count / counts.max()
        told = f'{edges[number]:.2f} to {edges[number + 1]:.2f} %: {count}'
        bars.append(f'<rect x="{number * step:.1f}" y="{CHART_HEIGHT - 15 - height:.1f}" width="{step - 1:.1f}" '
                    f'height="{height:.1f}" fill="#47a"><title>{told}</title></rect>')  # fmt: skip
    return _chart(''.join(bars), [f'{edges[0]:.1f} %', f'{edges[-1] / 2:.1f} %', f'{edges[-1]:.1f} %'])


def _poses(labels):
    angles = angles_deg(labels)
    dots = ''.join(
        f'<circle cx="{(yaw + 90) / 180 * CHART_WIDTH:.1f}" cy="{(CHART_HEIGHT - 15) / 2 * (1 - pitch / 45):.1f}" '
        'r="2" fill="#47a" fill-opacity=".5"/>'
        for yaw, pitch in angles
    )  # fmt: skip
    counts, edges = np.histogram(angles[:, 0], np.arange(-90, 91, 15))
    rows = ''.join(
        f'<tr><td>{low:+.0f}&deg; to {low + 15:+.0f}&deg;</td><td>{count}</td></tr>'
        for low, count in zip(edges, counts, strict=False)
        if count
    )
    chart = _chart(dots, ['yaw -90&deg;', '0 (pitch &plusmn;45&deg;)', '+90&deg;'])
    return f'{chart}<table><tr><td>yaw</td><td>items</td></tr>{rows}</table>'


def _chart(content, marks):
    anchors = ('start', 'middle', 'end')
    texts = ''.join(
        f'<text x="{CHART_WIDTH * place / 2}" y="{CHART_HEIGHT - 2}" font-size="11" text-anchor="{anchor}">'
        f'{mark}</text>'
        for place, (mark, anchor) in enumerate(zip(marks, anchors, strict=True))
    )
    return f'<svg width="{CHART_WIDTH}" height="{CHART_HEIGHT}">{content}{texts}</svg>'
