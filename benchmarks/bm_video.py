# SPDX-License-Identifier: Apache-2.0
"""Frames a second of videos, files and all: the published way, everything anew for each cell and frame, and ours.

Both are timed in one run, in turns, on a network of random weights.
"""

import pathlib
import statistics
import sys
import tempfile
import time

import imageio_ffmpeg
import numpy as np
import torch
from bench import Benchmark
from bm_inference import inputs, random_generator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from geometry import paths  # noqa: E402  (needs the path above)
from training import avatar  # noqa: E402
from training.inference import DTYPES, Synthesizer  # noqa: E402
from training.pictures import to_uint8  # noqa: E402
from training.train_config import PRESETS  # noqa: E402
from training.video import video_file  # noqa: E402

CASES = {'turn': (), 'talk': ('v',), 'morph': ('ws',), 'morph and talk': ('ws', 'v')}  # What changes with time.
FPS, SEEDS = 60, 4


def scene(generator, cells, count):
    """Return (labels [count, 25], keyframes' curve of all cells, mesh [1, V + 68, 3])."""
    _, _, v = inputs(generator, 1)
    config = generator.config
    labels = paths.path_labels(paths.published_path(count), config.avg_camera_pivot, config.avg_camera_radius)
    ws = avatar.styles_of_seeds(generator, range(cells * SEEDS), labels[:1].to(v.device), 0.7, None)
    return labels, avatar.Loop(ws.unflatten(0, (SEEDS, cells))), v.cpu()


def moving(scene_, count, names):
    """Yield frames that bring what changes: label, ws, mesh."""
    labels, loop, v = scene_
    for number in range(count):
        ws = loop.at(SEEDS * number / count) if 'ws' in names else None
        mesh = v * (1 + 0.02 * np.sin(2 * np.pi * number / count)) if 'v' in names else None
        yield avatar.Frame(labels[number : number + 1], ws, mesh)


def published(generator, scene_, count, names, grid, path):
    """Draw each cell of each frame from its ws, one by one, and encode before going on."""
    (_, loop, v), device = scene_, generator.faces.device
    writer = None
    for frame in moving(scene_, count, names):
        ws, mesh = loop.at(0) if frame.ws is None else frame.ws, v if frame.v is None else frame.v
        cells = []
        for w in ws:
            out = generator.synthesis(w[None].to(device), frame.c.to(device), mesh.to(device))
            cells.append(to_uint8(out['image'])[0])
        sheet = avatar.tile(cells, *grid)
        if writer is None:
            size = sheet.shape[1::-1]
            writer = imageio_ffmpeg.write_frames(str(path), size, fps=FPS, codec='libx264', bitrate='10M')
            writer.send(None)
        writer.send(np.ascontiguousarray(sheet))
    writer.close()


def ours(synthesizer, scene_, count, names, grid, path):
    """Draw as the scripts do, from the beginning: the identity is painted within the time."""
    _, loop, v = scene_
    shared = None if 'ws' in names else loop.at(0)
    wall = avatar.Wall(synthesizer, grid[0] * grid[1], grid[0], shared, None if 'v' in names else v)
    with video_file(path, FPS) as add:
        for drawn in avatar.stream(wall, moving(scene_, count, names)):
            add(avatar.tile(drawn, *grid))


def main():
    """Print frames a second of both, and their ratios."""
    bench = Benchmark(__doc__)
    bench.parser.add_argument('--preset', choices=PRESETS, default='demo')
    bench.parser.add_argument('--dtype', choices=DTYPES, default='fp16')
    bench.parser.add_argument('--grid', type=int, nargs=2, default=[2, 2], help='columns and rows')
    bench.parser.add_argument('--frames', type=int, default=24, help='of each video')
    bench.parser.add_argument('--rounds', type=int, default=3, help='of both in turns; medians are printed')
    bench.parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    args = bench.parse()
    torch.backends.cudnn.benchmark = True
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        generator = random_generator(args.preset, args.device)
        synthesizer = Synthesizer(generator, args.dtype)
        scene_ = scene(generator, args.grid[0] * args.grid[1], args.frames)
        for case in args.cases:
            measure(bench, generator, synthesizer, scene_, case, pathlib.Path(folder) / 'video.mp4')
    bench.finish()


def measure(bench, generator, synthesizer, scene_, case, path):
    """Time one case in turns and note it."""
    args, names, times = bench.args, CASES[case], {'published way': [], 'ours': []}
    for number in range(args.rounds + 1):  # The first round compiles and warms up.
        for name, draw, network in (('published way', published, generator), ('ours', ours, synthesizer)):
            count = min(args.frames, 4) if number == 0 else args.frames
            begin = time.perf_counter()
            draw(network, scene_, count, names, args.grid, path)
            if number:
                times[name].append(time.perf_counter() - begin)
    before, after = (args.frames / statistics.median(seconds) for seconds in times.values())
    rates = f'published way {before:.2f} frames/s, ours {after:.2f} frames/s, ratio {after / before:.2f}'
    print(f'{case}: {rates}', flush=True)
    for name, seconds in times.items():
        per_frame = sorted(1000 * x / args.frames for x in seconds)
        median = statistics.median(per_frame)
        bench.results[f'{case}, {name}'] = {
            'median_ms': median, 'low_ms': per_frame[0], 'high_ms': per_frame[-1], 'frames_per_s': 1000 / median,
        }


if __name__ == '__main__':
    main()
