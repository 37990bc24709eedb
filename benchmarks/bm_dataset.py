# SPDX-License-Identifier: Apache-2.0
"""Time to get one training item's camera and mesh: published layout against packed, in one run."""

import argparse
import json
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]  # Run as a script from any folder.

from dataset_preprocessing import pack  # noqa: E402  (needs the path above)
from geometry import cameras  # noqa: E402
from geometry.meshes import read_obj, write_landmarks, write_obj  # noqa: E402
from simple_head import simple_head  # noqa: E402
from training.dataset import FolderSource, HeadDataset, PackedSource  # noqa: E402


def make_data(root, count):
    """Write a data set of the published layout with `count` items of the simple head, whose mouth opens."""
    for kind in ('images', 'meshes', 'lms'):
        (root / f'{kind}512x512').mkdir(parents=True)
    labels = []
    for i in range(count):
        head = simple_head(jaw_open=i / count)
        Image.new('RGB', (64, 64), (i % 256, 0, 0)).save(root / 'images512x512' / f'{i:06d}.png')
        write_obj(root / 'meshes512x512' / f'{i:06d}.obj', head)
        write_landmarks(root / 'lms512x512' / f'{i:06d}.txt', head.landmarks)
        label = cameras.make_label(cameras.look_at_pose(1.5, 1.5), cameras.intrinsics())[0].tolist()
        labels.append([f'{i:06d}.png', label])
    (root / 'images512x512' / 'dataset.json').write_text(json.dumps({'labels': labels}))


def median_ms(function, count, repeats):
    """Return the median and the quartiles of the time of function(index) in milliseconds."""
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        function(i % count)
        times.append(1000 * (time.perf_counter() - start))
    return [round(x, 4) for x in (statistics.median(times), *np.quantile(times, [0.25, 0.75]))]


def main():
    """Print medians, quartiles and ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=64, help='items in the data set')
    parser.add_argument('--repeats', type=int, default=200, help='timed accesses')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_data(root, options.count)
        published = (root / 'images512x512', root / 'meshes512x512')
        pack.main([f'--data={published[0]}', f'--rdata={published[1]}', f'--out={root}/packed'], standalone_mode=False)
        folder_set, packed_set = HeadDataset(FolderSource(*published)), HeadDataset(PackedSource(root / 'packed'))
        names = [root / 'meshes512x512' / name.replace('.png', '.obj') for name in folder_set.source.names]
        arguments = options.count, options.repeats
        result = {
            'read_obj_ms': median_ms(lambda i: read_obj(names[i]), *arguments),
            'folder_ms': median_ms(folder_set.camera_and_mesh, *arguments),
            'packed_ms': median_ms(packed_set.camera_and_mesh, *arguments),
        }
    result['ratio_folder_to_packed'] = round(result['folder_ms'][0] / result['packed_ms'][0], 1)
    result.update(vertices=folder_set.num_vertices, processor=platform.processor(), python=platform.python_version())
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
