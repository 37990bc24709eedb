# SPDX-License-Identifier: Apache-2.0
"""The one forward of EG3D (Chan et al. 2022) and Next3D (Sun et al. 2023): mapping, planes, render, query."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from geometry import cameras
from torch_utils.custom_ops import check_shape
from torch_utils.ops import triplane
from torch_utils.randomness import uniform
from training import head_raster, mouth
from training.backbone import Backbone, StyleUNetSynthesis, SynthesisNetwork, num_ws_of
from training.config import LABEL_LENGTH, EG3DConfig, Next3DConfig
from training.layers import FullyConnectedLayer
from training.superresolution import Superresolution
from training.volume.render import query, render_rays

NUM_LANDMARKS = 68
RGB_RANGE = 1.002, -0.001  # Widening of the sigmoid so that colours reach 0 and 1 (Barron et al. 2021, appendix).


@dataclass(frozen=True)
class Planes:
    """Triplane of a batch: planes [N, 3, C, R, R], ready for `render` and `query`."""

    planes: torch.Tensor


class Styles(NamedTuple):
    """What ws do to the layers of each network of a Next3D generator: takes the place of ws where pictures are many."""

    static: dict
    texture: dict
    mouth: dict
    blending: dict
    superresolution: tuple


class Decoder(nn.Module):
    """Triplane features [.., C] -> colour features [.., C] in about [0, 1] and raw density [.., 1]."""

    def __init__(self, channels, hidden, lr_multiplier):
        super().__init__()
        self.net = nn.Sequential(
            FullyConnectedLayer(channels, hidden, lr_multiplier=lr_multiplier),
            nn.Softplus(),
            FullyConnectedLayer(hidden, 1 + channels, lr_multiplier=lr_multiplier),
        )

    def dense_weights(self) -> triplane.Decoder:
        """Return the weights as the fused kernels take them: gains applied, density in row 0 of the second layer."""
        first, _, second = self.net
        return triplane.Decoder(
            first.weight * first.weight_gain, first.bias * first.bias_gain,
            second.weight * second.weight_gain, second.bias * second.bias_gain,
        )

    def forward(self, features):
        """Return (rgb, sigma)."""
        x = self.net(features)
        scale, offset = RGB_RANGE
        return torch.sigmoid(x[..., 1:]) * scale + offset, x[..., :1]


class EG3DGenerator(nn.Module):
    """EG3D: a StyleGAN2 paints three planes, which are rendered and upsampled."""

    def __init__(self, config: EG3DConfig):
        super().__init__()
        self.config = config
        self.z_dim, self.c_dim, self.w_dim = config.z_dim, config.c_dim, config.w_dim
        self.img_resolution = config.img_resolution
        self.neural_rendering_resolution = config.neural_rendering_resolution
        self.backbone = self._synthesis_backbone(
            config.plane_resolution, 3 * config.plane_channels, mapping_ws=self._num_mapping_ws()
        )
        self.decoder = Decoder(config.plane_channels, config.decoder_hidden, config.decoder_lr_mul)
        self.superresolution = Superresolution(
            config.superresolution,
            config.plane_channels,
            config.w_dim,
            use_fp16=config.sr_num_fp16_res > 0,
            antialias=config.sr_antialias,
            block_channels=config.sr_channels,
        )

    @property
    def num_ws(self) -> int:
        """How many w's `mapping` returns."""
        return self.backbone.mapping.num_ws

    @property
    def num_style_ws(self) -> int:
        """How many of them, from the first on, drive everything but a texture."""
        return self.backbone.num_ws

    def mapping(self, z, c, truncation_psi=1.0, truncation_cutoff=None):
        """Return ws [N, num_ws, w_dim] of latents z [N, z_dim] and conditioning labels c [N, 25 or more].

        truncation_psi moves the first `truncation_cutoff` w's (None: all) towards the mean. ValueError where z and c
        do not fit.
        """
        return self.backbone.mapping(z, self._conditioning(c), truncation_psi, truncation_cutoff)

    def planes(self, ws, noise_mode='const') -> Planes:
        """Return the triplane of ws [N, num_ws, w_dim]."""
        check_shape('ws', ws, [None, self.num_ws, self.w_dim])
        return Planes(self.static_planes(ws, noise_mode))

    def render(self, planes: Planes, ws, c, neural_rendering_resolution=None, depth_jitter=None) -> dict:
        """Render planes from the cameras of labels c [N, 25 or more].

        neural_rendering_resolution: side of the raw picture; None: the checkpoint's. depth_jitter: 'random', 'center'
        or a callable (see `training.volume.samples`); None: 'random' in training mode, else 'center'.
        Returns image [N, 3, R, R] and image_raw [N, 3, r, r], in about [-1, 1], and image_depth [N, 1, r, r], the
        distance along the ray in world units. Raises ValueError where planes, ws and c do not fit.
        """
        resolution = neural_rendering_resolution
        resolution = self.neural_rendering_resolution if resolution is None else resolution
        self._check_ws(ws, len(planes.planes))
        features, depth = self.volume(planes, c, resolution, depth_jitter)
        raw = features[:, :3]
        noise_mode = self.config.superresolution_noise_mode
        image = self.superresolution(raw, features, self._ws_of('superresolution', ws), noise_mode)
        return {'image': image, 'image_raw': raw, 'image_depth': depth}

    def volume(self, planes: Planes, c, resolution: int, depth_jitter=None):
        """Render features [N, C, r, r] in 2x-1 scale and depth [N, 1, r, r]; arguments as in `render`."""
        if resolution < 1:
            raise ValueError(f'neural_rendering_resolution: expected at least 1, got {resolution}')
        origins, directions = self._rays(c, len(planes.planes), resolution)
        jitter = depth_jitter or ('random' if self.training else 'center')
        if jitter == 'random':
            jitter = functools.partial(uniform, device=c.device)
        rendered = render_rays(planes.planes, self.decoder, origins, directions, self.config.sampling, jitter)
        return tuple(_as_image(x, resolution) for x in (rendered.features, rendered.depth))

    def query(self, planes: Planes, points, with_rgb: bool = True) -> dict:
        """Return sigma [N, M, 1] (raw density) and rgb [N, M, C] at world points [N, M, 3].

        with_rgb: False may leave rgb out, which saves time.
        """
        if points.ndim != 3 or points.shape[-1] != 3 or len(points) != len(planes.planes):
            raise ValueError(f'points: expected [{len(planes.planes)}, M, 3], got {list(points.shape)}')
        return query(planes.planes, self.decoder, points, self.config.sampling, with_rgb)

    def synthesis(self, ws, c, noise_mode='const', neural_rendering_resolution=None, depth_jitter=None) -> dict:
        """Return `render` of `planes`."""
        return self.render(self.planes(ws, noise_mode), ws, c, neural_rendering_resolution, depth_jitter)

    def forward(self, z, c, truncation_psi=1.0, truncation_cutoff=None, **synthesis_kwargs):
        """Return `synthesis` of `mapping`, conditioned on the camera that is rendered."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), c, **synthesis_kwargs)

    def static_planes(self, ws, noise_mode='const'):
        """Return the planes [N, 3, C, R, R] that the static backbone paints."""
        x = self.backbone.synthesis(self._ws_of('static', ws), noise_mode)
        return x.reshape(len(x), 3, -1, *x.shape[2:])

    def _synthesis_backbone(self, resolution, channels, has_mapping=True, mapping_ws=None, **unet):
        config = self.config
        network = StyleUNetSynthesis if unet else SynthesisNetwork
        synthesis = network(
            config.w_dim,
            resolution,
            channels,
            channel_base=config.channel_base,
            channel_max=config.channel_max,
            num_fp16_res=config.num_fp16_res,
            conv_clamp=config.backbone_clamp,
            **unet,
        )
        mapping = vars(config.mapping) if has_mapping else None
        return Backbone(config.z_dim, config.c_dim, config.w_dim, synthesis, mapping_ws, mapping)

    def _conditioning(self, c):
        if c is None or self.c_dim == 0:
            return None
        c = c[..., :LABEL_LENGTH]
        return torch.zeros_like(c) if self.config.c_gen_conditioning_zero else c * self.config.c_scale

    def _num_mapping_ws(self):
        return num_ws_of(self.config.plane_resolution)

    def _ws_of(self, part, ws):
        """Return what a network takes: its styles, or its share of ws."""
        if isinstance(ws, Styles):
            return getattr(ws, part)
        return ws[:, self.num_style_ws :] if part == 'texture' else ws[:, : self.num_style_ws]

    def _check_ws(self, ws, batch):
        if not isinstance(ws, Styles):
            check_shape('ws', ws, [batch, self.num_ws, self.w_dim])

    def _rays(self, c, batch, resolution):
        if c.ndim != 2 or len(c) != batch or c.shape[1] < LABEL_LENGTH:
            raise ValueError(f'c: expected [{batch}, {LABEL_LENGTH} or more], got {list(c.shape)}')
        return cameras.camera_rays(*cameras.split_label(c.float()), resolution)


class Next3DGenerator(EG3DGenerator):
    """Next3D: static planes as EG3D's, over which a head mesh with a painted neural texture is rasterised.

    faces, uv_faces: [F, 3] of the mesh. uvs: [T, 2] in [0, 1], v up. uv_face_mask: [1, 1, S, S] in [0, 1], the part
    of the texture that the mesh covers, S = texture_resolution.
    """

    def __init__(self, config: Next3DConfig, faces, uvs, uv_faces, uv_face_mask):
        super().__init__(config)
        size, channels = config.plane_resolution, config.plane_channels
        others = dict(has_mapping=config.has_unused_mappings)
        self.texture_backbone = self._synthesis_backbone(config.texture_resolution, channels, **others)
        self.mouth_backbone = self._synthesis_backbone(
            size,
            channels,
            in_size=config.mouth_resolution,
            final_size=config.mouth_lowest,
            cond_channels=channels,
            num_cond_res=config.mouth_resolution,
            **others,
        )
        self.neural_blending = self._synthesis_backbone(
            size,
            channels,
            in_size=size,
            final_size=config.blending_lowest,
            cond_channels=channels,
            num_cond_res=size,
            **others,
        )
        self._register_topology(faces, uvs, uv_faces)
        mask = torch.as_tensor(uv_face_mask, dtype=torch.float32).clone()
        self.register_buffer('uv_face_mask', mask, persistent=False)

    @property
    def num_vertices(self) -> int:
        """How many vertices a mesh of this network's topology has."""
        return self._num_vertices

    def planes(self, ws, v, noise_mode='const') -> Planes:
        """Return the blended triplane of ws [N, num_ws, w_dim] and meshes v [N, V + 68, 3].

        v: vertices, then 68 landmarks, in metres, y up, z to the viewer. No gradient flows to v. Raises ValueError
        where ws and v do not fit.
        """
        self._check_ws(ws, None)
        self._check_mesh(v, len(v) if isinstance(ws, Styles) else len(ws))
        static = self.static_planes(ws, noise_mode)
        head = self.rasterize(self.texture(ws, noise_mode), v)
        front = self.complete_mouth(head.features[:, 0], v, ws, noise_mode)
        return self.blend(static, front, head)

    def synthesis(self, ws, c, v, noise_mode='const', neural_rendering_resolution=None, depth_jitter=None) -> dict:
        """Return `render` of `planes`."""
        return self.render(self.planes(ws, v, noise_mode), ws, c, neural_rendering_resolution, depth_jitter)

    def forward(self, z, c, v, truncation_psi=1.0, truncation_cutoff=None, **synthesis_kwargs):
        """Return `synthesis` of `mapping`, conditioned on the camera that is rendered."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), c, v, **synthesis_kwargs)

    def texture(self, ws, noise_mode='const'):
        """Return the neural texture [N, C, T, T] in UV space, row 0 at v = 1."""
        return self.texture_backbone.synthesis(self._ws_of('texture', ws), noise_mode)

    def rasterize(self, texture, v) -> head_raster.HeadPlanes:
        """Return the textured mesh as planes; gradient flows to the texture only."""
        coverage = self.cover(v)
        seen = head_raster.sample_texture(texture, coverage)
        return head_raster.assemble_planes(seen, coverage, self.config.plane_layout)

    def cover(self, v) -> head_raster.ViewCoverage:
        """Return where the four views see the mesh; no gradient."""
        vertices, _ = self._split_mesh(v)
        views = head_raster.VIEWS[self.config.plane_layout]
        screen = torch.stack([self._project(vertices, view) for view in views], dim=1)
        topology = head_raster.Topology(self.faces[0], self.face_uvcoords[0], self.uv_face_mask)
        return head_raster.cover_views(screen, topology, self.config.plane_resolution)

    def complete_mouth(self, front, v, ws, noise_mode='const'):
        """Return the front plane's dynamic feature [N, C, R, R]: the mouth redrawn, then the whole plane refined."""
        boxes = self.mouth_boxes(v)
        condition = mouth.crop_and_resize(front, boxes, self.config.mouth_resolution)
        inner = self.mouth_backbone.synthesis(condition, self._ws_of('mouth', ws), noise_mode)
        stitched = mouth.resize_and_paste(front, inner, boxes)
        return self.neural_blending.synthesis(stitched, self._ws_of('blending', ws), noise_mode)

    def styles(self, ws) -> Styles:
        """Return what ws [N, num_ws, w_dim] do to all layers; methods take it in place of ws."""
        self._check_ws(ws, None)
        style_ws, texture_ws = self._ws_of('static', ws), self._ws_of('texture', ws)
        return Styles(
            self.backbone.synthesis.styles(style_ws),
            self.texture_backbone.synthesis.styles(texture_ws),
            self.mouth_backbone.synthesis.styles(style_ws),
            self.neural_blending.synthesis.styles(style_ws),
            self.superresolution.styles(style_ws),
        )

    def fold(self, styles: Styles) -> Styles:
        """Return styles of a frozen network for many pictures: what can be done to weights once is done."""
        return Styles(
            self.backbone.synthesis.fold(styles.static),
            self.texture_backbone.synthesis.fold(styles.texture),
            self.mouth_backbone.synthesis.fold(styles.mouth),
            self.neural_blending.synthesis.fold(styles.blending),
            self.superresolution.fold(styles.superresolution),
        )

    def mouth_boxes(self, v):
        """Return the mouth's boxes in the front plane [N, 4] (see `training.mouth`)."""
        _, landmarks = self._split_mesh(v)
        return mouth.mouth_boxes(self._project(landmarks, head_raster.FRONT), self.config.plane_resolution)

    def blend(self, static, front, head: head_raster.HeadPlanes) -> Planes:
        """Return alpha·dynamic + (1 - alpha)·static, with the completed front plane in place of the rasterised one."""
        if self.config.blend_planes == 'front':
            alpha = head.alpha[:, 0]
            blended = alpha * front + (1 - alpha) * static[:, 0]
            return Planes(torch.cat([blended[:, None], static[:, 1:]], dim=1))
        dynamic = torch.cat([front[:, None], head.features[:, 1:]], dim=1)
        return Planes(head.alpha * dynamic + (1 - head.alpha) * static)

    def _num_mapping_ws(self):
        return num_ws_of(self.config.plane_resolution) + num_ws_of(self.config.texture_resolution)

    def _project(self, points, view):
        return head_raster.project(points, view, self.config.orth_scale, self.config.orth_shift)

    def _check_mesh(self, v, batch):
        expected = [batch, self.num_vertices + NUM_LANDMARKS, 3]
        if list(v.shape) != expected:
            raise ValueError(
                f'v: expected {expected} ({self.num_vertices} vertices, {NUM_LANDMARKS} landmarks), got {list(v.shape)}'
            )

    def _split_mesh(self, v):
        self._check_mesh(v, len(v))
        v = v.detach().float()
        return v[:, : self.num_vertices], v[:, self.num_vertices :]

    def _register_topology(self, faces, uvs, uv_faces):
        # Copies: loading a checkpoint writes into the buffers, never into the caller's arrays.
        faces, uv_faces = (torch.tensor(np.asarray(x), dtype=torch.int64) for x in (faces, uv_faces))
        uvs = torch.tensor(np.asarray(uvs), dtype=torch.float32)
        scaled = torch.cat([uvs * 2 - 1, torch.ones_like(uvs[:, :1])], dim=1) * uvs.new_tensor([1.0, -1.0, 1.0])
        self._num_vertices = int(faces.max()) + 1
        self.register_buffer('faces', faces[None])
        self.register_buffer('raw_uvcoords', uvs[None])
        self.register_buffer('uvcoords', scaled[None])
        self.register_buffer('uvfaces', uv_faces[None])
        self.register_buffer('face_uvcoords', scaled[uv_faces][None])


def _as_image(x, resolution):
    """[N, R², C] -> [N, C, R, R]."""
    return x.transpose(1, 2).reshape(len(x), x.shape[2], resolution, resolution)
