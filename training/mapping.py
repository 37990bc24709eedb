# SPDX-License-Identifier: Apache-2.0
"""Mapping network: latent and label to intermediate latents w (Karras et al. 2019, section 2; 2020b for labels)."""

import torch
from torch import nn

from training.layers import FullyConnectedLayer, normalize_second_moment

W_AVG_BETA = 0.998
LR_MULTIPLIER = 0.01


class MappingNetwork(nn.Module):
    """z [N, z_dim] and c [N, c_dim] -> w [N, w_dim], or [N, num_ws, w_dim] where num_ws is given.

    z_dim or c_dim may be 0: that input is then None. With num_ws the network keeps `w_avg`, the running mean of w.
    """

    def __init__(
        self, z_dim, c_dim, w_dim, num_ws=None, num_layers=8, embed_features=None, layer_features=None
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws, self.num_layers = z_dim, c_dim, w_dim, num_ws, num_layers
        embed_features = (embed_features or w_dim) if c_dim else 0
        widths = [z_dim + embed_features] + [layer_features or w_dim] * (num_layers - 1) + [w_dim]
        if c_dim:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        for i in range(num_layers):
            layer = FullyConnectedLayer(widths[i], widths[i + 1], activation='lrelu', lr_multiplier=LR_MULTIPLIER)
            self.add_module(f'fc{i}', layer)
        if num_ws is not None:
            self.register_buffer('w_avg', torch.zeros(w_dim))

    def forward(self, z, c, truncation_psi=1.0, truncation_cutoff=None):
        """Map; with psi below 1 the first `truncation_cutoff` w's (None: all) move towards `w_avg`."""
        x = self._inputs(z, c)
        for i in range(self.num_layers):
            x = getattr(self, f'fc{i}')(x)
        if self.num_ws is None:
            return x
        ws = x[:, None].repeat(1, self.num_ws, 1)  # Own memory for each: callers may write single w's.
        if truncation_psi == 1:
            return ws
        cutoff = self.num_ws if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)

    def track(self, w):
        """Move `w_avg` towards the mean of untruncated w [N, w_dim]; the training loop calls this, no forward does."""
        self.w_avg.copy_(w.detach().mean(dim=0).lerp(self.w_avg, W_AVG_BETA))

    def _inputs(self, z, c):
        parts = []
        if self.z_dim:
            if z is None or list(z.shape[1:]) != [self.z_dim]:
                raise ValueError(f'z: expected [N, {self.z_dim}], got {None if z is None else list(z.shape)}')
            parts.append(normalize_second_moment(z.float()))
        if self.c_dim:
            if c is None or list(c.shape[1:]) != [self.c_dim]:
                raise ValueError(f'c: expected [N, {self.c_dim}], got {None if c is None else list(c.shape)}')
            if parts and len(c) != len(z):
                raise ValueError(f'c: expected [{len(z)}, {self.c_dim}] like z, got {list(c.shape)}')
            parts.append(normalize_second_moment(self.embed(c.float())))
        return torch.cat(parts, dim=1)
