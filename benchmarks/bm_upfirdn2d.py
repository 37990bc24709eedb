# SPDX-License-Identifier: Apache-2.0
"""Time of upfirdn2d, the reference against the CUDA kernels, at shapes of the networks."""

import functools
import itertools
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from bench import Benchmark  # noqa: E402  (needs the path above)

from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d  # noqa: E402

BINOMIAL = (1, 3, 3, 1)
LONG = tuple(range(1, 13))  # As long as the filter of the augmentation, and separable too.
WRAPPERS = {'filter': filter2d, 'up': upsample2d, 'down': downsample2d}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES = [
    # What follows a transposed convolution, and comes before a strided one.
    ('filter', [4, 128, 256, 256], torch.float16, NHWC, BINOMIAL),
    ('filter', [4, 128, 256, 256], torch.float16, NCHW, BINOMIAL),
    ('filter', [4, 128, 256, 256], torch.float32, NHWC, BINOMIAL),
    ('filter', [4, 128, 256, 256], torch.float32, NCHW, BINOMIAL),
    ('filter', [4, 512, 32, 32], torch.float32, NCHW, BINOMIAL),
    # Of the discriminator's skips.
    ('down', [4, 128, 256, 256], torch.float16, NHWC, BINOMIAL),
    ('down', [4, 128, 256, 256], torch.float32, NCHW, BINOMIAL),
    ('up', [4, 128, 128, 128], torch.float16, NHWC, BINOMIAL),
    ('up', [4, 128, 128, 128], torch.float32, NCHW, BINOMIAL),
    # Of planes and pictures.
    ('up', [4, 96, 128, 128], torch.float32, NCHW, BINOMIAL),
    ('up', [4, 3, 256, 256], torch.float32, NCHW, BINOMIAL),
    ('down', [4, 6, 512, 512], torch.float32, NCHW, BINOMIAL),
    ('up', [4, 6, 512, 512], torch.float32, NCHW, LONG),
    ('down', [4, 6, 1024, 1024], torch.float32, NCHW, LONG),
]


def measure_case(bench, label, run, x):
    """Measure forward without a gradient, and forward with backward."""
    leaf = x.detach().requires_grad_(True)
    with torch.no_grad():
        y = run(x)
    g = torch.randn_like(y)
    facts = {'shape': list(x.shape), 'dtype': str(x.dtype)}
    # What has to be moved, not what an implementation moves: x and y; then g and gx as well.
    once = (x.numel() + y.numel()) * x.element_size()
    with torch.no_grad():
        bench.measure(f'{label} forward', lambda: run(x), bytes_moved=once, flush=True, **facts)
    bench.measure(f'{label} forward+backward', lambda: torch.autograd.grad(run(leaf), leaf, g),
                  bytes_moved=2 * once, flush=True, **facts)


def main():
    """Measure every case; the CUDA kernels only on a GPU."""
    bench = Benchmark(__doc__)
    bench.parser.add_argument('--shrink', type=int, default=1, help='divide heights and widths by this number')
    args = bench.parse()
    torch.manual_seed(0)
    impls = ['ref', 'cuda'] if args.device == 'cuda' else ['ref']
    for (name, shape, dtype, layout, taps), impl in itertools.product(CASES, impls):
        shape = [*shape[:2], *(max(1, size // args.shrink) for size in shape[2:])]
        x = torch.randn(shape, device=args.device, dtype=dtype).contiguous(memory_format=layout)
        run = functools.partial(WRAPPERS[name], f=setup_filter(taps).to(args.device), impl=impl)
        order = 'NHWC' if layout == NHWC else 'NCHW'
        kind = f'{name}{len(taps)}'
        label = f'{kind} {"x".join(map(str, shape))} {str(dtype).removeprefix("torch.")} {order} {impl}'
        measure_case(bench, label, run, x)
    bench.finish()


if __name__ == '__main__':
    main()
