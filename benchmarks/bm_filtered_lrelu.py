# SPDX-License-Identifier: Apache-2.0
"""Time of filtered_lrelu, the reference against the CUDA kernel, at shapes of alias-free networks."""

import functools
import itertools
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from bench import Benchmark  # noqa: E402  (needs the path above)

from torch_utils.ops.filtered_lrelu import filtered_lrelu  # noqa: E402
from torch_utils.ops.upfirdn2d import setup_filter  # noqa: E402

TAPS = tuple(range(1, 13))  # As many per axis as alias-free networks have at two-fold oversampling.
CASES = [  # Shape, type, up, down, padding that keeps the size times up / down.
    ([4, 128, 128, 128], torch.float16, 2, 2, 11),
    ([4, 128, 128, 128], torch.float32, 2, 2, 11),
    ([4, 128, 128, 128], torch.float16, 4, 2, 12),
    ([4, 512, 36, 36], torch.float32, 2, 2, 11),
]


def measure_case(bench, label, run, x, b):
    """Measure forward without a gradient, and forward with backward to x and b."""
    leaves = [tensor.detach().requires_grad_(True) for tensor in (x, b)]
    with torch.no_grad():
        y = run(x, b=b)
    g = torch.randn_like(y)
    facts = {'shape': list(x.shape), 'dtype': str(x.dtype)}
    # What has to be moved, not what an implementation moves: x and y; then g and gx as well.
    once = (x.numel() + y.numel()) * x.element_size()
    with torch.no_grad():
        bench.measure(f'{label} forward', lambda: run(x, b=b), bytes_moved=once, flush=True, **facts)
    bench.measure(f'{label} forward+backward', lambda: torch.autograd.grad(run(leaves[0], b=leaves[1]), leaves, g),
                  bytes_moved=2 * once, flush=True, **facts)


def main():
    """Measure every case; the CUDA kernel only on a GPU."""
    bench = Benchmark(__doc__)
    bench.parser.add_argument('--shrink', type=int, default=1, help='divide heights and widths by this number')
    args = bench.parse()
    torch.manual_seed(0)
    f = setup_filter(TAPS).to(args.device)
    impls = ['ref', 'cuda'] if args.device == 'cuda' else ['ref']
    for (shape, dtype, up, down, padding), impl in itertools.product(CASES, impls):
        shape = [*shape[:2], *(max(1, size // args.shrink) for size in shape[2:])]
        x, b = (torch.randn(size, device=args.device, dtype=dtype) for size in (shape, shape[1]))
        run = functools.partial(filtered_lrelu, fu=f, fd=f, up=up, down=down, padding=padding, clamp=256.0, impl=impl)
        label = f'up{up} down{down} {"x".join(map(str, shape))} {str(dtype).removeprefix("torch.")} {impl}'
        measure_case(bench, label, run, x, b)
    bench.finish()


if __name__ == '__main__':
    main()
