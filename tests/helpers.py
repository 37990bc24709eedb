# SPDX-License-Identifier: Apache-2.0
"""What several test files share: the sizes of tiny networks, and the comparison of nested states."""

import torch

TINY = dict(
    z_dim=8,
    w_dim=8,
    channel_base=128,
    channel_max=6,
    plane_resolution=32,
    plane_channels=4,
    decoder_hidden=8,
    superresolution='SuperresolutionHybrid2X',
    sr_channels=(4, 3),
    sr_num_fp16_res=0,
)
HEAD = dict(texture_resolution=32, mouth_resolution=8, mouth_lowest=4, blending_lowest=8)


def assert_same(a, b, where='state'):
    """Compare nested dicts and sequences of tensors and plain data: types, order and every bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f'{where}.{i}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), where
    else:
        assert a == b, where
