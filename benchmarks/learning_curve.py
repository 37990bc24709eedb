# SPDX-License-Identifier: Apache-2.0
"""Trains on the toy heads of the tests and measures how the pictures of each snapshot approach the real ones.

The distance is Fréchet's between Gaussians fitted to thumbnails of 8x8 pixels in RGB: no feature network is needed, and
it sees colours, poses and coarse shapes. It is not comparable with FID. Run again to go on after an interruption.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import numpy as np
import torch
from scipy.linalg import sqrtm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]  # Run as a script from any folder.

import legacy  # noqa: E402  (needs the path above)
import simple_head  # noqa: E402
import toy_data  # noqa: E402
from training.dataset import HeadDataset, open_source  # noqa: E402

THUMBNAIL, BATCH = 8, 64


def gaussian(images):
    """Return mean and covariance of the thumbnails of pictures [N, 3, R, R] in [-1, 1]."""
    x = torch.nn.functional.interpolate(images, size=THUMBNAIL, mode='area').flatten(1).double().cpu().numpy()
    return x.mean(axis=0), np.cov(x, rowvar=False)


def frechet(a, b):
    """Return the squared Fréchet distance of two Gaussians (Dowson and Landau 1982)."""
    root = sqrtm(a[1] @ b[1])
    return float(np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * root.real))


@torch.no_grad()
def fakes(generator, data, device, count):
    """Return pictures [count, 3, R, R] of random latents with the cameras and meshes of items in turn."""
    rng, images = np.random.RandomState(0), []
    for start in range(0, count, BATCH):
        indices = [i % len(data) for i in range(start, min(start + BATCH, count))]
        c, v = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*map(data.camera_and_mesh, indices)))
        z = torch.from_numpy(rng.randn(len(indices), generator.z_dim)).float().to(device)
        images.append(generator.synthesis(generator.mapping(z, c), c, v)['image'])
    return torch.cat(images)


def reals(data, indices):
    """Return pictures [N, 3, R, R] of items."""
    return torch.from_numpy(np.stack([data[i].image for i in indices])).float() / 127.5 - 1


def main():
    """Make data, train, and print the distance of each snapshot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=pathlib.Path, required=True)
    parser.add_argument('--count', type=int, default=2000, help='toy heads')
    parser.add_argument('--workers', type=int, default=2, help='processes that draw them')
    parser.add_argument('--evaluate-only', action='store_true')
    parser.add_argument('--every', type=int, default=1, help='measure each so-manyth snapshot, from the first on')
    parser.add_argument('options', nargs='*', help='further options of train_next3d.py, after --')
    arguments = parser.parse_args()
    data_dir, runs = arguments.out / 'data', arguments.out / 'runs'
    images, packed = data_dir / 'images128x128', arguments.out / 'packed'
    if not (images / 'dataset.json').exists():
        toy_data.make_toy_data(data_dir, arguments.count, workers=arguments.workers)
    if not packed.exists():
        sides = [f'--data={images}', f'--rdata={data_dir / "meshes128x128"}', f'--out={packed}']
        subprocess.run([sys.executable, ROOT / 'dataset_preprocessing' / 'pack.py', *sides], check=True)
    if not arguments.evaluate_only:
        command = [sys.executable, ROOT / 'train_next3d.py', f'--outdir={runs}', f'--data={packed}']
        command += [f'--topology-path={simple_head.TEMPLATE}', *arguments.options]
        subprocess.run(command, check=True, cwd=ROOT)
    evaluate(arguments.out, sorted(runs.iterdir())[-1], HeadDataset(open_source(packed, None)), arguments.every)


def evaluate(out, run, data, every):
    """Write curve.json: the distance of each snapshot, and that of one half of the real pictures to the other."""
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    count = len(data)
    real = gaussian(reals(data, range(count)))
    halves = [gaussian(reals(data, range(k, count, 2))) for k in range(2)]
    curve = {'halves of the real pictures': frechet(*halves), 'snapshots': {}}
    for path in sorted(run.glob('network-snapshot-*.pkl'))[::every]:
        generator = legacy.load_network_pkl(path, only='G_ema')['G_ema'].to(device)
        kimg = int(path.stem.split('-')[-1])
        curve['snapshots'][kimg] = frechet(gaussian(fakes(generator, data, device, count)), real)
        print(f'kimg {kimg}: {curve["snapshots"][kimg]:.3f}', flush=True)
    print(f'halves of the real pictures: {curve["halves of the real pictures"]:.3f}')
    (out / 'curve.json').write_text(json.dumps(curve, indent=1))


if __name__ == '__main__':
    main()
