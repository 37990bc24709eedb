# SPDX-License-Identifier: Apache-2.0
"""In which arithmetic networks are trained on a GPU; the master weights, the losses and the sums stay float32."""

from collections.abc import Iterable

import torch
from torch import nn

from training.backbone import set_compute_dtype

COMPUTE_DTYPES = {'fp32': None, 'tf32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def set_precision(generators: Iterable[nn.Module], precision: str) -> None:
    """Choose the arithmetic of this process and of the convolutions in generators.

    'fp32': float32 without TF32, with half precision only where configurations ask for it (*_num_fp16_res), as
    published. 'tf32': what is float32 may be rounded to TF32 in convolutions and matrix products. 'bf16', 'fp16': so,
    and all convolutions of the generators run in that type; float16 is finer and ends at 65504. Discriminators keep
    what their configuration says. On a CPU all are float32.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision != 'fp32'
    for generator in generators:
        set_compute_dtype(generator, COMPUTE_DTYPES[precision])
