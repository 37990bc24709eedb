# SPDX-License-Identifier: Apache-2.0
"""Fast inference: weights prepared once, convolutions in half precision, CUDA graphs, an identity that stays.

On a CPU the same classes run the plain forward in float32.
"""

import collections
import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from torch_utils.graphs import capturing
from torch_utils.ops import head_planes
from torch_utils.ops.modulated_conv2d import DEMODULATION_EPSILON
from training import head_raster
from training.backbone import freeze, set_compute_dtype
from training.generator import Next3DGenerator, Planes, Styles
from training.layers import Style, SynthesisLayer
from training.pictures import to_bytes

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}
WARM_UP = 3  # Runs before a capture: kernels are compiled and cuDNN chooses its algorithms.
FRAMES_IN_FLIGHT = 3


class CapturedCall:
    """A function of tensors as a CUDA graph: its inputs are copied in, its outputs are overwritten by the next call.

    function: tensors -> dict of tensors; launches no work that depends on values and keeps shapes. On a CPU it is just
    called.
    """

    def __init__(self, function: Callable[..., dict], *examples: torch.Tensor):
        self._function, self._inputs, self._graph = function, [x.clone() for x in examples], None
        if examples[0].is_cuda:
            with torch.cuda.device(examples[0].device):
                self._capture()

    def _capture(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with repeatable():
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with capturing(self._graph):
                self._outputs = self._function(*self._inputs)

    def __call__(self, *inputs: torch.Tensor) -> dict:
        """Run on inputs of the examples' shapes, ValueError for others; on a GPU outputs live until the next call."""
        shapes, expected = ([list(x.shape) for x in tensors] for tensors in (inputs, self._inputs))
        if shapes != expected:
            raise ValueError(f'inputs: expected shapes {expected}, got {shapes}')
        if self._graph is None:
            return self._function(*inputs)
        with torch.cuda.device(self._inputs[0].device):
            for own, new in zip(self._inputs, inputs, strict=True):
                own.copy_(_pinned(new), non_blocking=True)
            self._graph.replay()
        return self._outputs


class Identity(NamedTuple):
    """What does not change with expression and camera: styles, texture [N, C, T, T], static planes [N, 3, C, R, R]."""

    styles: Styles
    texture: torch.Tensor
    static: torch.Tensor


class StyleBank:
    """Styles of all layers of a frozen generator by a few large products in place of hundreds of small ones."""

    def __init__(self, generator: Next3DGenerator):
        self._generator, self._layers, numbers = generator, [], []
        for layer, number in _layers_with_ws(generator):
            self._layers.append(layer)
            numbers.append(number)
        device = generator.faces.device
        sizes = [layer.weight.shape[1] for layer in self._layers]
        repeats = torch.tensor(sizes)
        self._layer_of_row = torch.arange(len(sizes)).repeat_interleave(repeats).to(device)
        self._ws_of_row = torch.tensor(numbers).repeat_interleave(repeats).to(device)
        affine = [_affine(layer) for layer in self._layers]
        self._weight, self._bias = (torch.cat(x) for x in zip(*affine))
        self._starts = [0, *repeats.cumsum(0).tolist()]
        is_limited = [isinstance(x, SynthesisLayer) and x.frozen.weight.dtype == torch.float16 for x in self._layers]
        self._is_limited = torch.tensor(is_limited, device=device)
        self._groups = list(self._demodulated_groups(device))

    def _demodulated_groups(self, device):
        """Yield numbers of layers of one shape, the rows of each, [L·I], and their squared weights [L, I, O]."""
        by_shape = collections.defaultdict(list)
        for number, layer in enumerate(self._layers):
            if isinstance(layer, SynthesisLayer):
                by_shape[tuple(layer.weight.shape[:2])].append(number)
        for numbers in by_shape.values():
            rows = torch.cat([torch.arange(self._starts[i], self._starts[i + 1]) for i in numbers]).to(device)
            yield numbers, rows, torch.stack([self._layers[i].frozen.squared.t() for i in numbers])

    def styles(self, ws: torch.Tensor) -> Styles:
        """Return `Next3DGenerator.styles` of ws [N, num_ws, w_dim]."""
        self._generator._check_ws(ws, None)
        n, num_ws, _ = ws.shape
        every = torch.nn.functional.linear(ws.flatten(0, 1), self._weight).view(n, num_ws, -1)
        rows = every.gather(1, self._ws_of_row.expand(n, 1, -1))[:, 0] + self._bias
        rows = self._limited(rows)
        demodulation = [None] * len(self._layers)
        for numbers, own_rows, squared in self._groups:
            scale = rows.index_select(1, own_rows).view(n, len(numbers), -1).transpose(0, 1)
            values = (torch.bmm(scale.square(), squared) + DEMODULATION_EPSILON).rsqrt()
            for i, value in zip(numbers, values.unbind()):
                demodulation[i] = value
        scales = (rows[:, a:b] for a, b in zip(self._starts, self._starts[1:]))
        found = (Style(*pair) for pair in zip(scales, demodulation))
        return _arranged_like(self._generator, found)

    def _limited(self, rows):
        """Scale the styles of layers in half precision to at most 1, which their demodulation undoes."""
        layers = self._layer_of_row.expand(len(rows), -1)
        largest = rows.new_zeros([len(rows), len(self._layers)]).scatter_reduce_(1, layers, rows.abs(), 'amax')
        divisor = torch.where(self._is_limited, largest.clamp(min=DEMODULATION_EPSILON), 1.0)
        return rows / divisor.gather(1, layers)


def _networks(generator):
    """Return (synthesis network, the numbers of the ws that it takes [1, num_ws, 1]) in the order of Styles."""
    numbers = torch.arange(generator.num_ws)[None, :, None]
    style, texture = numbers[:, :generator.num_style_ws], numbers[:, generator.num_style_ws:]
    networks = (generator.backbone, generator.texture_backbone, generator.mouth_backbone, generator.neural_blending)
    return [(network.synthesis, x) for network, x in zip(networks, (style, texture, style, style), strict=True)]


def _layers_with_ws(generator):
    """Yield every layer that a w drives, with the number of that w, in the order of Styles."""
    for network, numbers in _networks(generator):
        for resolution, block_numbers in network.split(numbers).items():
            block = getattr(network, f'b{resolution}')
            yield from zip([*block.convolutions, block.torgb], block_numbers.flatten().tolist(), strict=True)
    for block in (generator.superresolution.block0, generator.superresolution.block1):
        for layer in [*block.convolutions, block.torgb]:
            yield layer, generator.num_style_ws - 1


def _arranged_like(generator, styles):
    """Return a flat list of styles, in the order of `_layers_with_ws`, as Styles."""
    parts = []
    for network, numbers in _networks(generator):
        blocks = network.split(numbers)
        parts.append({r: [next(styles) for _ in range(x.shape[1])] for r, x in blocks.items()})
    blocks = (generator.superresolution.block0, generator.superresolution.block1)
    return Styles(*parts, tuple([next(styles) for _ in [*block.convolutions, block.torgb]] for block in blocks))


def _affine(layer):
    """Return weight [I, w_dim] and bias [I] from w to a layer's style."""
    affine = layer.affine
    gain = 1.0 if isinstance(layer, SynthesisLayer) else layer.weight_gain
    return affine.weight * (affine.weight_gain * gain), affine.bias * (affine.bias_gain * gain)


class Synthesizer:
    """A private copy of a generator, prepared for inference.

    dtype: in which convolutions run on a GPU, a key of DTYPES. float16 is as fast as bfloat16 and finer, but ends at
    65504: a network that goes beyond shows pictures that are not finite, then take bfloat16. float32, slow,
    follows torch's switches for TF32.
    Not one after another from several threads: graphs share their buffers.
    """

    def __init__(self, generator: Next3DGenerator, dtype: str = 'fp16'):
        if dtype not in DTYPES:
            raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, got {dtype!r}')
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self.device = next(generator.parameters()).device
        self.dtype = DTYPES[dtype] if self.device.type == 'cuda' else torch.float32
        if self.device.type == 'cuda':
            set_compute_dtype(self.generator, self.dtype)
        freeze(self.generator)
        self._bank = StyleBank(self.generator)
        self._beside = torch.cuda.Stream(self.device) if self.device.type == 'cuda' else None
        self._calls = {}

    @torch.no_grad()
    def synthesis(self, ws: torch.Tensor, c: torch.Tensor, v: torch.Tensor,
                  neural_rendering_resolution: int | None = None) -> dict:
        """Return what `Next3DGenerator.synthesis` returns, with constant noise and centred samples.

        The first call of a batch size and resolution captures a graph (seconds); outputs live until the next call.
        """
        resolution = self._resolution(neural_rendering_resolution)
        key = (len(ws), resolution)
        if len(v) != len(ws):
            raise ValueError(f'v: expected {len(ws)} meshes like ws, got {len(v)}')

        def run(ws, c, v):
            return self._draw(self._identity(self._bank.styles(ws)), v, c, resolution)

        call = self._calls.get(key) or CapturedCall(run, *(x.to(self.device) for x in (ws, c, v)))
        out = call(ws, c, v)
        self._calls[key] = call  # Now that it has worked once.
        return out

    @torch.no_grad()
    def avatar(self, ws: torch.Tensor, neural_rendering_resolution: int | None = None) -> 'Avatar':
        """Return an avatar of ws [N, num_ws, w_dim]: N people who are drawn together."""
        self.generator._check_ws(ws, None)
        with repeatable():
            identity = self._identity(self.generator.fold(self._bank.styles(ws.to(self.device))))
        return Avatar(self, identity, self._resolution(neural_rendering_resolution))

    def _identity(self, styles):
        """Paint the texture and the static planes; on a GPU at once, as small pictures leave most of it idle."""
        if self._beside is None:
            return Identity(styles, self.generator.texture(styles), self.generator.static_planes(styles))
        own = torch.cuda.current_stream(self.device)
        self._beside.wait_stream(own)
        with torch.cuda.stream(self._beside):
            static = self.generator.static_planes(styles)
        texture = self.generator.texture(styles)
        own.wait_stream(self._beside)
        static.record_stream(own)
        return Identity(styles, texture, static)

    def _resolution(self, resolution):
        return self.generator.neural_rendering_resolution if resolution is None else resolution

    def _draw(self, identity, v, c, resolution):
        return self._render(self._blend(identity, v), identity, c, resolution)

    def _render(self, planes, identity, c, resolution):
        return self.generator.render(planes, identity.styles, c, resolution, 'center')

    def _blend(self, identity, v, coverage=None):
        """Return the planes of meshes v; coverage: what `cover` returns of them, where it is known already."""
        generator = self.generator
        layout, has_sides = generator.config.plane_layout, generator.config.blend_planes == 'all'
        coverage = generator.cover(v) if coverage is None else coverage
        if self.device.type != 'cuda' or head_planes.problem(identity.texture) is not None:
            seen = head_raster.sample_texture(identity.texture, coverage)
            head = head_raster.assemble_planes(seen, coverage, layout)
            front = generator.complete_mouth(head.features[:, 0], v, identity.styles)
            return Planes(generator.blend(identity.static, front, head).planes.to(self.dtype))
        front = head_planes.sample_front(identity.texture, coverage.uv, self.dtype)
        front = generator.complete_mouth(front, v, identity.styles)
        arguments = (identity.texture, *coverage, front, identity.static, layout, has_sides, self.dtype)
        return Planes(head_planes.blend(*arguments))


class Avatar:
    """N people of one `Synthesizer`, whose expression and camera change from frame to frame."""

    def __init__(self, synthesizer: Synthesizer, identity: Identity, resolution: int):
        self._synthesizer, self._identity, self._resolution, self._calls = synthesizer, identity, resolution, {}
        self.count = len(identity.texture)

    @property
    def device(self) -> torch.device:
        """Where the avatar is drawn."""
        return self._synthesizer.device

    def render(self, v: torch.Tensor, c: torch.Tensor) -> dict:
        """Draw meshes v [N, V + 68, 3] from the cameras of labels c [N, 25].

        Returns image [N, 3, R, R] and image_raw [N, 3, r, r] in about [-1, 1], image_depth [N, 1, r, r] and picture
        [N, R, R, 3] uint8. On a GPU the first call captures a graph (seconds), and the tensors are overwritten by the
        next call. Raises ValueError where v and c do not fit.
        """
        if len(v) != self.count:
            raise ValueError(f'v: expected {self.count} meshes, one of each person, got {len(v)}')
        return self._call('frame', self._frame, v, c)

    def frames(self, driving: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[np.ndarray]:
        """Draw (v, c) after (v, c); yield pictures [N, R, R, 3] uint8 in order.

        On a GPU, copies to and from the host and what the caller does with a picture overlap with the next frames.
        """
        yield from to_host(self.render(v, c)['picture'] for v, c in driving)

    @torch.no_grad()
    def _call(self, name, function, *inputs):
        call = self._calls.get(name) or CapturedCall(function, *(x.to(self.device) for x in inputs))
        out = call(*inputs)
        self._calls[name] = call  # Now that it has worked once.
        return out

    def _frame(self, v, c):
        out = self._synthesizer._draw(self._identity, v, c, self._resolution)
        return out | {'picture': to_bytes(out['image'])}


def to_host(pictures: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    """Yield pictures of one shape from their device as arrays, in order; each may be overwritten by the next one.

    On a GPU, copies and what the caller does with an array overlap with the next pictures.
    """
    waiting, free, copies = collections.deque(), [], None
    for picture in pictures:
        if not picture.is_cuda:
            yield picture.numpy()
            continue
        copies = copies or torch.cuda.Stream(picture.device)
        buffer = free.pop() if free else torch.empty(picture.shape, dtype=picture.dtype, pin_memory=True)
        own = picture.clone()  # The next one overwrites the graph's, perhaps before it has been copied.
        copies.wait_stream(torch.cuda.current_stream(picture.device))
        with torch.cuda.stream(copies):
            buffer.copy_(own, non_blocking=True)
            own.record_stream(copies)
            waiting.append((buffer, copies.record_event()))
        if len(waiting) == FRAMES_IN_FLIGHT:
            yield _arrived(waiting, free)
    while waiting:
        yield _arrived(waiting, free)


@contextlib.contextmanager
def repeatable():
    """Have cuDNN take algorithms with the same bits every time: float32's fastest transposed convolution has not."""
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _pinned(x):
    """Return a tensor that nobody changes before it has been copied: what callers pinned may be filled anew at once."""
    return x if x.is_cuda else (x.clone() if x.is_pinned() else x.contiguous()).pin_memory()


def _arrived(waiting, free):
    """Return a copy of the oldest picture once it is on the host; its buffer may be filled anew."""
    buffer, event = waiting.popleft()
    event.synchronize()
    free.append(buffer)
    return buffer.numpy().copy()
