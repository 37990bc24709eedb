# SPDX-License-Identifier: Apache-2.0
"""Frozen configurations of the networks; saved with the weights, loaded back to the same objects."""

import dataclasses
from dataclasses import dataclass, field

from training.backbone import check_power_of_two
from training.head_raster import PLANE_LAYOUTS
from training.layers import NOISE_MODES
from training.superresolution import FP16_CLAMP, VARIANTS
from training.volume.render import SamplingConfig

EXPRESSION_LENGTH = 50  # Numbers of a face's expression that a label may have after the camera's.
LABEL_LENGTH = 25  # 16 numbers of a cam2world matrix, then 9 of normalised intrinsics.
NEXT3D_PLANE_AXES = ((0, 1), (0, 2), (2, 1))
EG3D_PLANE_AXES = ((0, 1), (0, 2), (2, 0))
BLEND_PLANES = ('all', 'front')


def resolve_clamp(conv_clamp: float | str | None, num_fp16_res: int) -> float | None:
    """Return the limit of activations; 'auto' is that of half precision where some resolutions run in it, else none."""
    if conv_clamp != 'auto':
        return conv_clamp
    return FP16_CLAMP if num_fp16_res > 0 else None


def _tuples(value):
    """Turn the lists that JSON and pickles bring back into the tuples that a frozen config holds."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _build(nested, data):
    if issubclass(nested, Serialisable):
        return nested.from_dict(data)
    return nested(**{name: _tuples(value) for name, value in data.items()})


class Serialisable:
    """Conversion to and from plain data, shared by all configs."""

    def to_dict(self) -> dict:
        """Return nested dicts of plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict):
        """Build from `to_dict`'s result; ValueError names entries that do not exist."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise ValueError(f'{cls.__name__}: unknown entries {", ".join(unknown)}')
        values = {name: _tuples(value) for name, value in data.items()}
        for name, nested in cls._nested().items():
            if name in values:
                values[name] = _build(nested, data[name])
        return cls(**values)

    @classmethod
    def _nested(cls):
        return {}


@dataclass(frozen=True, kw_only=True)
class MappingConfig:
    """Mapping network: number of layers and widths (None: the width of w)."""

    num_layers: int = 2
    embed_features: int | None = None
    layer_features: int | None = None


@dataclass(frozen=True, kw_only=True)
class EG3DConfig(Serialisable):
    """An EG3D generator; `Next3DConfig` adds what the mesh brings.

    Channels of a block at resolution r are min(channel_base/r, channel_max). *_num_fp16_res: how many of the highest
    resolutions run in half precision on CUDA devices. conv_clamp: limit of the backbones' activations; 'auto': 256
    when num_fp16_res is above 0, else none. sr_channels: widths of the two blocks of super-resolution; None: the
    published ones. decoder_hidden: hidden units of the decoder.
    """

    z_dim: int = 512
    c_dim: int = LABEL_LENGTH
    w_dim: int = 512
    channel_base: int = 32768
    channel_max: int = 512
    num_fp16_res: int = 0
    sr_num_fp16_res: int = 4
    conv_clamp: float | str | None = 'auto'
    mapping: MappingConfig = field(default_factory=MappingConfig)
    plane_resolution: int = 256
    plane_channels: int = 32
    decoder_hidden: int = 64
    decoder_lr_mul: float = 1.0
    superresolution: str = 'SuperresolutionHybrid8XDC'
    superresolution_noise_mode: str = 'none'
    sr_antialias: bool = True
    sr_channels: tuple[int, int] | None = None
    neural_rendering_resolution: int = 64
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(plane_axes=EG3D_PLANE_AXES))
    c_scale: float = 1.0
    c_gen_conditioning_zero: bool = False
    avg_camera_radius: float = 2.7
    avg_camera_pivot: tuple[float, float, float] = (0.0, 0.0, 0.2)

    def __post_init__(self):
        if self.superresolution not in VARIANTS:
            raise ValueError(f'superresolution: expected one of {", ".join(VARIANTS)}, got {self.superresolution!r}')
        if self.superresolution_noise_mode not in NOISE_MODES:
            raise ValueError(f'superresolution_noise_mode: expected one of {NOISE_MODES}')
        if self.plane_channels < 3:
            raise ValueError(f'plane_channels: expected at least 3, got {self.plane_channels}')
        check_power_of_two('plane_resolution', self.plane_resolution)

    @property
    def img_resolution(self) -> int:
        """Side of the output picture in pixels."""
        return VARIANTS[self.superresolution].resolution

    @property
    def backbone_clamp(self) -> float | None:
        """The backbones' clamp with 'auto' resolved."""
        return resolve_clamp(self.conv_clamp, self.num_fp16_res)

    @classmethod
    def _nested(cls):
        return {'mapping': MappingConfig, 'sampling': SamplingConfig}


@dataclass(frozen=True, kw_only=True)
class Next3DConfig(EG3DConfig):
    """A Next3D generator.

    texture_resolution: side of the neural texture. mouth_resolution, mouth_lowest: input and lowest resolution of the
    mouth network; blending_lowest: lowest resolution of the blending network, whose input and both outputs have
    plane_resolution. plane_layout: 'next3d' as published, or 'aligned': views lie where the volume reads them.
    blend_planes: which planes the mesh paints, 'all' as published or 'front'. has_unused_mappings: published files
    store a mapping in every backbone though only one is used. orth_scale, orth_shift: mesh units to screen.
    """

    texture_resolution: int = 256
    mouth_resolution: int = 64
    mouth_lowest: int = 4
    blending_lowest: int = 32
    plane_layout: str = 'next3d'
    blend_planes: str = 'all'
    has_unused_mappings: bool = True
    orth_scale: float = 5.0
    orth_shift: tuple[float, float, float] = (0.0, -0.01, -0.01)
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(plane_axes=NEXT3D_PLANE_AXES))

    def __post_init__(self):
        super().__post_init__()
        if self.plane_layout not in PLANE_LAYOUTS:
            raise ValueError(f'plane_layout: expected one of {", ".join(PLANE_LAYOUTS)}, got {self.plane_layout!r}')
        if self.blend_planes not in BLEND_PLANES:
            raise ValueError(f'blend_planes: expected one of {", ".join(BLEND_PLANES)}, got {self.blend_planes!r}')
        for name in ('texture_resolution', 'mouth_resolution', 'mouth_lowest', 'blending_lowest'):
            check_power_of_two(name, getattr(self, name))
        lowest, size, plane = self.mouth_lowest, self.mouth_resolution, self.plane_resolution
        if not lowest < size <= plane:
            raise ValueError(
                f'mouth_lowest, mouth_resolution: expected lowest < resolution <= {plane}, got {lowest}, {size}'
            )
        if not self.blending_lowest < plane:
            raise ValueError(f'blending_lowest: expected below plane_resolution {plane}, got {self.blending_lowest}')


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(Serialisable):
    """A discriminator; kind 'single' sees the picture, 'dual' also the enlarged raw one, 'dual_label' splits the label.

    c_dim: length of the camera label. c2_dim: expression numbers after it ('dual_label' only). render_channels: 3 where
    it also sees a rendering of the mesh, else 0. disc_c_noise: standard deviations of noise on the label.
    """

    kind: str = 'dual'
    c_dim: int = LABEL_LENGTH
    c2_dim: int = 0
    img_resolution: int = 512
    img_channels: int = 3
    render_channels: int = 0
    channel_base: int = 32768
    channel_max: int = 512
    num_fp16_res: int = 4
    conv_clamp: float | str | None = 'auto'
    mbstd_group_size: int = 4
    mbstd_num_channels: int = 1
    disc_c_noise: float = 0.0
    mapping: MappingConfig = field(default_factory=lambda: MappingConfig(num_layers=8))

    def __post_init__(self):
        kinds = ('single', 'dual', 'dual_label')
        if self.kind not in kinds:
            raise ValueError(f'kind: expected one of {", ".join(kinds)}, got {self.kind!r}')
        if (self.kind == 'dual_label') != (self.c2_dim > 0):
            wanted = "expected above 0 for kind 'dual_label' alone"
            raise ValueError(f'c2_dim: {wanted}, got {self.c2_dim} for {self.kind!r}')
        if self.render_channels not in (0, 3):
            raise ValueError(f'render_channels: expected 0 or 3, got {self.render_channels}')
        check_power_of_two('img_resolution', self.img_resolution, minimum=8)

    @property
    def clamp(self) -> float | None:
        """The clamp with 'auto' resolved."""
        return resolve_clamp(self.conv_clamp, self.num_fp16_res)

    @classmethod
    def _nested(cls):
        return {'mapping': MappingConfig}
