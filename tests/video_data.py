# SPDX-License-Identifier: Apache-2.0
"""What tests of videos share: tiny networks, driving folders, and reading back what was written."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import HEAD
from parity import ROOT
from PIL import Image
from test_generator import TINY, meshes, random_weights, topology

from geometry import cameras
from training.checkpoint import save_snapshot
from training.config import Next3DConfig
from training.generator import Next3DGenerator
from training.pictures import to_uint8
from training.topology import load_topology

SIDE = 128  # Of a tiny network's pictures.
CODEC_ERROR = 6  # Mean difference of bytes that H.264 may add to these pictures.

MEASURE = """
import importlib, re, sys
import torch
torch.set_num_threads(1)
importlib.import_module(sys.argv[1]).main(sys.argv[2:], standalone_mode=False)
print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])  # ru_maxrss counts parents, too.
"""
needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='reads the peak from /proc')


def tiny_network(path, is_embedded=False, template=None):
    """Save a tiny network over the simple head, the embedded one or a template's; return its path and the generator."""
    template = ROOT / 'data/head/head_template.obj' if is_embedded else template
    parts = topology() if template is None else load_topology(template, 32)
    generator = random_weights(Next3DGenerator(Next3DConfig(**TINY | HEAD), *parts)).eval().requires_grad_(False)
    for block in (generator.superresolution.block0, generator.superresolution.block1):
        block.torgb.weight.mul_(0.05)  # Smooth pictures, which a codec keeps.
    save_snapshot(path, {'G_ema': generator})
    return SimpleNamespace(path=path, generator=generator)


def label(yaw=0.0, pitch=0.0, focal=cameras.FOCAL):
    """Return the label [1, 25] of a camera at angles from the frontal one."""
    pose = cameras.look_at_pose(cameras.FRONTAL + yaw, cameras.FRONTAL + pitch, (0, 0, 0.2), 2.7)
    return cameras.make_label(pose, cameras.intrinsics(focal))


def plain(network, seed, c, mesh, psi=1.0, conditioning=None):
    """Return the picture [R, R, 3] of a seed by the plain forward."""
    g = network.generator
    z = torch.from_numpy(np.random.RandomState(seed).randn(1, g.z_dim)).float()
    ws = g.mapping(z, label() if conditioning is None else conditioning, psi, g.num_style_ws)
    with torch.no_grad():
        out = g.synthesis(ws, c, torch.as_tensor(mesh)[None], depth_jitter='center')
    return to_uint8(out['image'])[0]


def run(main, *arguments):
    """Run a script; return its result, with `message` the last line of its error output."""
    result = CliRunner().invoke(main, [str(x) for x in arguments])
    lines = [line for line in re.split(r'[\r\n]', result.stderr) if line.strip()]
    return SimpleNamespace(code=result.exit_code, output=result.output, message=lines[-1] if lines else '', lines=lines)


def peaks_kb(script, *runs):
    """Return the peak memory in KiB of each run of a script, of which each is a list of arguments; all at once."""
    commands = [[sys.executable, '-c', MEASURE, script, '--device=cpu', *map(str, words)] for words in runs]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for command in commands]
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [int(re.search(r'peak (\d+)', output)[1]) for output, _ in outputs]


def decode(path):
    """Return frames [T, H, W, 3], and what ffmpeg says of the file."""
    reader = imageio_ffmpeg.read_frames(str(path))
    facts = next(reader)
    width, height = facts['size']
    frames = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    report = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), '-i', str(path)], capture_output=True, text=True).stderr
    return np.stack(frames), SimpleNamespace(fps=facts['fps'], report=report)


def difference(a, b):
    """Return the mean difference of two pictures in bytes."""
    return np.abs(a.astype(int) - b.astype(int)).mean()


def leftovers(folder):
    """Return the names of all files below a folder."""
    return sorted(name for _, _, files in os.walk(folder) for name in files)


def obj_text(vertices):
    """Return vertices as an OBJ file."""
    return ''.join('v %.7g %.7g %.7g\n' % tuple(v) for v in vertices.tolist())


def driving_folder(root, names=('f1', 'f2', 'f10'), side=40):
    """Write a driving folder whose frames differ in everything, with mirrored entries; return its content by frame."""
    root.mkdir(parents=True)
    entries, frames = [], {}
    for number, name in enumerate(names):
        mesh = meshes()[number % 3].numpy() * (1 + 0.01 * number)
        c = label(0.15 * number - 0.2, 0.1)[0]
        picture = np.full([side, side, 3], (40 * number % 256, 200, 90), np.uint8)
        (root / f'{name}.obj').write_text(obj_text(mesh[:-68]))
        np.savetxt(root / f'{name}_kpt2d.txt', mesh[-68:], fmt='%.7g')
        Image.fromarray(picture).save(root / f'{name}.png')
        frames[name] = SimpleNamespace(mesh=mesh, label=c, picture=picture)
        entries += [[f'{name}_mirror.png', [0.0] * 25], [f'{name}.png', c.double().tolist()]]
    (root / 'dataset.json').write_text(json.dumps({'labels': entries}))
    return frames
