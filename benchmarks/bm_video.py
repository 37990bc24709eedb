# SPDX-License-Identifier: Apache-2.0
"""Frames a second of videos, files and all: the published way, everything anew for each cell and frame, and ours.

Both are timed in one run, in turns, on network files or presets with random weights.
"""

import pathlib
import statistics
import sys
import tempfile
import time

import imageio_ffmpeg
import numpy as np
import torch
from bench import ROOT, Benchmark
from bm_inference import inputs, random_generator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

import legacy  # noqa: E402  (needs the path above)
from geometry import paths  # noqa: E402
from geometry.head_model import load_embedded_head  # noqa: E402
from geometry.meshes import NUM_LANDMARKS  # noqa: E402
from training import avatar  # noqa: E402
from training.inference import DTYPES, Synthesizer  # noqa: E402
from training.pictures import to_uint8  # noqa: E402
from training.train_config import PRESETS  # noqa: E402
from training.video import video_file  # noqa: E402

CASES = {  # What changes with time, beside the camera.
    'camera': (), 'camera, mesh': ('v',), 'camera, styles': ('ws',), 'all': ('ws', 'v'),
}  # fmt: skip
FPS, SEEDS = 60, 4
DEMO = ROOT / 'data' / 'demo' / 'next3d_demo.pkl'
COLUMNS = '{:<24}{:<6}{:<16}{:>16}{:>12}{:>9}'


def network(name, device):
    """Return the generator of a network file, or of a preset with random weights."""
    if name in PRESETS:
        return random_generator(name, device)
    return legacy.load_network_pkl(name, only=('G_ema',))['G_ema'].eval().requires_grad_(False).to(device)


def mesh_of(generator):
    """Return a mesh [1, V + 68, 3] of the generator's topology: the embedded head, else the tests' simple one."""
    head = load_embedded_head()
    if generator.num_vertices != head.num_vertices:
        v = inputs(generator, 1)[2].cpu()
        if generator.num_vertices + NUM_LANDMARKS != v.shape[1]:
            sys.exit(f'--networks: expected heads that come with the project, found {generator.num_vertices} vertices')
        return v
    with torch.no_grad():
        return head(torch.zeros(1, head.num_identity), head.expression()).stacked()


def scene(generator, cells, count):
    """Return (labels [count, 25], keyframes' curve of all cells, mesh [1, V + 68, 3])."""
    config = generator.config
    labels = paths.path_labels(paths.published_path(count), config.avg_camera_pivot, config.avg_camera_radius)
    device = generator.faces.device
    ws = avatar.styles_of_seeds(generator, range(cells * SEEDS), labels[:1].to(device), 0.7, None)
    return labels, avatar.Loop(ws.unflatten(0, (SEEDS, cells))), mesh_of(generator)


def moving(scene_, count, names):
    """Yield frames that bring what changes: label, ws, mesh."""
    labels, loop, v = scene_
    for number in range(count):
        ws = loop.at(SEEDS * number / count) if 'ws' in names else None
        mesh = v * (1 + 0.02 * np.sin(2 * np.pi * number / count)) if 'v' in names else None
        yield avatar.Frame(labels[number : number + 1], ws, mesh)


def published(generator, scene_, count, names, grid_, path):
    """Draw each cell of each frame from its ws, one by one, and encode before going on."""
    (_, loop, v), device = scene_, generator.faces.device
    writer = None
    for frame in moving(scene_, count, names):
        ws, mesh = loop.at(0) if frame.ws is None else frame.ws, v if frame.v is None else frame.v
        cells = []
        for w in ws:
            out = generator.synthesis(w[None].to(device), frame.c.to(device), mesh.to(device))
            cells.append(to_uint8(out['image'])[0])
        sheet = avatar.tile(cells, *grid_)
        if writer is None:
            size = sheet.shape[1::-1]
            writer = imageio_ffmpeg.write_frames(str(path), size, fps=FPS, codec='libx264', bitrate='10M')
            writer.send(None)
        writer.send(np.ascontiguousarray(sheet))
    writer.close()


def ours(synthesizer, scene_, count, names, grid_, path):
    """Draw as the scripts do, from the beginning: the identity is painted within the time."""
    _, loop, v = scene_
    shared = None if 'ws' in names else loop.at(0)
    wall = avatar.Wall(synthesizer, grid_[0] * grid_[1], grid_[0], shared, None if 'v' in names else v)
    with video_file(path, FPS) as add:
        for drawn in avatar.stream(wall, moving(scene_, count, names)):
            add(avatar.tile(drawn, *grid_))


def grid(text):
    """Return (columns, rows) of '2x2'."""
    columns, rows = (int(part) for part in text.split('x'))
    return columns, rows


def main():
    """Print a table of frames a second of both, and their ratios."""
    bench = Benchmark(__doc__)
    add = bench.parser.add_argument
    add('--networks', nargs='+', default=[str(DEMO)], metavar='NAME', help=f'files, or of {", ".join(PRESETS)}')
    add('--dtype', choices=DTYPES, default='fp16')
    add('--grids', type=grid, nargs='+', default=[(1, 1), (2, 2)], metavar='WxH', help='columns and rows')
    add('--frames', type=int, default=24, help='of each video')
    add('--frames-published', type=int, help='of a video of the published way, where nothing is shared; default: all')
    add('--rounds', type=int, default=3, help='of both in turns; medians are printed')
    add('--cases', nargs='+', choices=CASES, default=list(CASES))
    args = bench.parse()
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False  # As the scripts have it.
    print(COLUMNS.format('network', 'grid', 'what changes', 'published way', 'ours', 'ratio'), flush=True)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            generator = network(name, args.device)
            synthesizer = Synthesizer(generator, args.dtype)
            for grid_ in args.grids:
                for case in args.cases:
                    measure(bench, name, (generator, synthesizer), case, grid_, pathlib.Path(folder) / 'video.mp4')
    bench.finish()


def measure(bench, name, networks, case, grid_, path):
    """Time one case in turns, print its line and note it."""
    args, names = bench.args, CASES[case]
    scene_ = scene(networks[0], grid_[0] * grid_[1], args.frames)
    counts = args.frames_published or args.frames, args.frames
    times = {'published way': [], 'ours': []}
    for number in range(args.rounds + 1):  # The first round compiles and warms up.
        for draw, drawn_by, count, seconds in zip((published, ours), networks, counts, times.values(), strict=True):
            count = min(count, 4) if number == 0 else count
            begin = time.perf_counter()
            draw(drawn_by, scene_, count, names, grid_, path)
            if number:
                seconds.append((time.perf_counter() - begin) / count)
    title, cells = pathlib.Path(name).stem, f'{grid_[0]}x{grid_[1]}'
    before, after = (1 / statistics.median(seconds) for seconds in times.values())
    rates = f'{before:.2f} /s', f'{after:.2f} /s', f'{after / before:.2f}'
    print(COLUMNS.format(title, cells, case, *rates), flush=True)
    for who, seconds in times.items():
        low, median, high = 1000 * min(seconds), 1000 * statistics.median(seconds), 1000 * max(seconds)
        facts = dict(median_ms=median, low_ms=low, high_ms=high, frames_per_s=1000 / median)
        bench.results[f'{title}, {cells}, {case}, {who}'] = facts


if __name__ == '__main__':
    main()
