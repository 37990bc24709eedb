# SPDX-License-Identifier: Apache-2.0
"""Single precision that means single precision."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Leave products and convolutions in float32 in the block, or, as a decorator, in the function.

    What is kept and compared later must not depend on what a process has chosen for its training.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
