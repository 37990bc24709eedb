# SPDX-License-Identifier: Apache-2.0
"""Time of bias_act and modulated_bias_act, the reference against the CUDA kernels, at shapes of the networks."""

import functools
import itertools
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # Run as a script from any folder.

from bench import Benchmark  # noqa: E402  (needs the path above)

from torch_utils.ops.bias_act import bias_act  # noqa: E402
from torch_utils.ops.modulated_bias_act import modulated_bias_act  # noqa: E402

CASES = [
    ([4, 128, 256, 256], torch.float16, torch.channels_last),
    ([4, 128, 256, 256], torch.float16, torch.contiguous_format),
    ([4, 128, 256, 256], torch.float32, torch.contiguous_format),
    ([4, 512, 32, 32], torch.float32, torch.contiguous_format),
]
TAIL = {'act': 'lrelu', 'clamp': 256.0}


def inputs(shape, dtype, layout, device):
    """Return, by operation, the function of `impl` and the tensors that it takes."""
    torch.manual_seed(0)
    n, c, h, w = shape
    x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=layout)
    b, scale = torch.randn(c, device=device, dtype=dtype), torch.rand(n, c, device=device)
    noise = torch.randn(n, 1, h, w, device=device)
    return {'bias_act': (bias_act, [x, b]), 'modulated_bias_act': (modulated_bias_act, [x, scale, noise, b])}


def measure_case(bench, label, function, tensors, impl):
    """Measure forward without a gradient, and forward with backward to all tensors."""
    leaves = [t.detach().requires_grad_(True) for t in tensors]
    g = torch.randn_like(tensors[0])
    run = functools.partial(function, **TAIL, impl=impl)
    facts = {'shape': list(g.shape), 'dtype': str(g.dtype)}
    tensor_bytes = g.numel() * g.element_size()
    # What has to be moved, not what an implementation moves: x and y; then g, gx and x (or a mask of it) as well.
    with torch.no_grad():
        bench.measure(f'{label} forward', lambda: run(*tensors), bytes_moved=2 * tensor_bytes, flush=True, **facts)
    bench.measure(f'{label} forward+backward', lambda: torch.autograd.grad(run(*leaves), leaves, g),
                  bytes_moved=5 * tensor_bytes, flush=True, **facts)


def main():
    """Measure every case; the CUDA kernels only on a GPU."""
    bench = Benchmark(__doc__)
    bench.parser.add_argument('--shrink', type=int, default=1, help='divide heights and widths by this number')
    args = bench.parse()
    impls = ['ref', 'cuda'] if args.device == 'cuda' else ['ref']
    for (shape, dtype, layout), impl in itertools.product(CASES, impls):
        shape = [*shape[:2], *(max(1, size // args.shrink) for size in shape[2:])]
        for name, (function, tensors) in inputs(shape, dtype, layout, args.device).items():
            order = 'NHWC' if layout == torch.channels_last else 'NCHW'
            type_name = str(dtype).removeprefix('torch.')
            label = f'{name} {"x".join(map(str, shape))} {type_name} {order} {impl}'
            measure_case(bench, label, function, tensors, impl)
    bench.finish()


if __name__ == '__main__':
    main()
