# SPDX-License-Identifier: Apache-2.0
"""Synthesis networks: which w drives which layer, the RGB skip, and what of the condition enters a StyleUNet where."""

import pytest
import torch
from torch import nn

from torch_utils.ops.upfirdn2d import upsample2d
from training.backbone import (
    Backbone,
    StyleUNetSynthesis,
    SynthesisBlock,
    SynthesisNetwork,
    check_power_of_two,
    fp16_from_resolution,
    num_ws_of,
)
from training.layers import SynthesisLayer, ToRGBLayer

W_DIM = 4
WIDTHS = dict(channel_base=32, channel_max=6)


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def synthesis(resolution=16, channels=3, **overrides):
    return SynthesisNetwork(W_DIM, resolution, channels, **WIDTHS | overrides).eval()


def unet(resolution=32, in_size=16, final_size=4, num_cond_res=16, channels=3):
    sizes = dict(in_size=in_size, final_size=final_size, cond_channels=2, num_cond_res=num_cond_res)
    return StyleUNetSynthesis(W_DIM, resolution, channels, **WIDTHS, **sizes).eval()


def numbered_ws(network):
    """w's whose entries all are their own index."""
    return torch.arange(network.num_ws).float()[None, :, None].expand(1, -1, W_DIM)


def record(network, kind):
    """Note inputs and output of all layers of a kind, by name, in the order in which they run."""
    calls = {}
    for name, module in network.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda m, x, y, name=name: calls.update({name: (x, y)}))
    return calls


def test_counts_and_resolutions():
    assert [num_ws_of(r) for r in (4, 8, 64, 256, 1024)] == [2, 4, 10, 14, 18]
    assert [check_power_of_two('r', r) for r in (4, 256)] == [2, 8]
    for bad in (0, 2, 48, -8, 8.0, True, '8'):
        with pytest.raises(ValueError, match='plane_resolution: expected a power of two >= 4, got'):
            check_power_of_two('plane_resolution', bad)
    # The four highest of 4, 8, ..., 256 are 32, 64, 128, 256; none in half precision below 8.
    table = {(256, 0): 512, (256, 1): 256, (256, 4): 32, (256, 7): 8, (256, 9): 8}
    assert {key: fp16_from_resolution(*key) for key in table} == table


def test_channels_halve_from_the_resolution_where_they_reach_their_maximum():
    network = SynthesisNetwork(W_DIM, 64, 3, channel_base=256, channel_max=20)
    assert network.channels == {4: 20, 8: 20, 16: 16, 32: 8, 64: 4}


# ---- StyleGAN2


def test_each_layer_gets_its_w_and_torgb_shares_the_next_blocks_first():
    network = synthesis(16)
    calls = record(network, (SynthesisLayer, ToRGBLayer))
    network(numbered_ws(network))
    drives = {name: int(inputs[1].unique()) for name, (inputs, _) in calls.items()}
    expected = {'b4.conv1': 0, 'b4.torgb': 1, 'b8.conv0': 1, 'b8.conv1': 2, 'b8.torgb': 3}
    expected |= {'b16.conv0': 3, 'b16.conv1': 4, 'b16.torgb': 5}
    assert drives == expected and list(drives) == list(expected)


def test_picture_is_the_sum_of_upsampled_torgbs():
    network = synthesis(16)
    calls = record(network, ToRGBLayer)
    image = network(torch.randn(2, network.num_ws, W_DIM))
    total = None
    for resolution in (4, 8, 16):
        block = getattr(network, f'b{resolution}')
        rgb = calls[f'b{resolution}.torgb'][1]
        total = rgb if total is None else rgb + upsample2d(total, block.resample_filter)
    assert image.shape == (2, 3, 16, 16) and image.dtype == torch.float32
    torch.testing.assert_close(image, total)


@pytest.mark.parametrize('build', [synthesis, unet])
def test_batch_equals_loop_and_training_equals_inference(build):
    network = build()
    inputs = [torch.randn(3, network.num_ws, W_DIM)]
    if build is unet:
        inputs.insert(0, torch.randn(3, 2, 16, 16))
    batch = network(*inputs)
    for i in range(3):
        torch.testing.assert_close(network(*(x[i : i + 1] for x in inputs)), batch[i : i + 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.train()(*inputs), batch, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('build', [synthesis, unet])
def test_noise_modes_reach_every_layer(build):
    network = build()
    for module in network.modules():
        if isinstance(module, SynthesisLayer):
            nn.init.ones_(module.noise_strength)
    inputs = [torch.randn(1, network.num_ws, W_DIM)]
    if build is unet:
        inputs.insert(0, torch.randn(1, 2, 16, 16))
    assert torch.equal(network(*inputs, 'const'), network(*inputs))
    assert not torch.equal(network(*inputs, 'random'), network(*inputs, 'random'))
    assert not torch.allclose(network(*inputs, 'none'), network(*inputs, 'const'))
    calls = record(network, SynthesisLayer)
    network(*inputs, 'none')
    assert {inputs[2] for inputs, _ in calls.values()} == {'none'}
    with pytest.raises(ValueError, match='noise_mode'):
        network(*inputs, 'constant')


def test_half_precision_is_for_cuda_devices_only():
    full, half = synthesis(16), synthesis(16, num_fp16_res=2)
    half.load_state_dict(full.state_dict())
    assert [half.b4.use_fp16, half.b8.use_fp16, half.b16.use_fp16] == [False, True, True]
    ws = torch.randn(1, full.num_ws, W_DIM)
    assert torch.equal(half(ws), full(ws))


def test_clamp_reaches_every_layer():
    free, clamped = synthesis(16), synthesis(16, conv_clamp=0.01)
    ws = torch.randn(1, free.num_ws, W_DIM)
    for network, is_clamped in ((free, False), (clamped, True)):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.mul_(100 if 'torgb.weight' in name else 1)
                parameter.add_(1 if name.endswith('.bias') else 0)
        calls = record(network, (SynthesisLayer, ToRGBLayer))
        network(ws)
        assert len(calls) == 8
        assert all((y.abs().max() == torch.tensor(0.01)) == is_clamped for _, y in calls.values())


def test_a_block_may_stay_at_its_inputs_resolution():
    block = SynthesisBlock(3, 5, W_DIM, 8, 2, up=1).eval()
    calls = record(block, ToRGBLayer)
    x, img, ws = torch.randn(1, 3, 8, 8), torch.randn(1, 2, 8, 8), torch.randn(1, 3, W_DIM)
    features, rgb = block(x, img, ws, 'none')
    assert features.shape == (1, 5, 8, 8)
    torch.testing.assert_close(rgb, img + calls['torgb'][1])
    torch.testing.assert_close(block(x, None, ws, 'none')[1], calls['torgb'][1])


@pytest.mark.parametrize('shape', [(1, 5, W_DIM), (1, 7, W_DIM), (1, 6, W_DIM + 1), (6, W_DIM)])
def test_ws_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf'ws: expected \[N, 6, {W_DIM}\], got \[{", ".join(map(str, shape))}\]'):
        synthesis(16)(torch.zeros(shape))


# ---- StyleUNet

# Sizes (output, input, lowest, limit) -> sides of the encoder's outputs, fusion layers that run, blocks that run.
UNETS = {
    (32, 16, 4, 16): ([8, 4], [0, 1], [8, 16, 32]),
    (32, 16, 4, 8): ([8, 4], [0], [8, 16, 32]),
    (32, 32, 4, 32): ([16, 8, 4], [0, 1, 2], [8, 16, 32]),
    (32, 32, 4, 64): ([16, 8, 4], [0, 1, 2], [8, 16, 32]),
    (32, 32, 16, 32): ([16], [0], [32]),
    (32, 32, 8, 16): ([16, 8], [0], [16, 32]),
    (16, 8, 4, 4): ([4], [0], [8, 16]),
}


@pytest.mark.parametrize('sizes', UNETS)
def test_what_of_a_styleunet_runs(sizes):
    resolution, in_size, final_size, limit = sizes
    encoded, fused, blocks = UNETS[sizes]
    network = unet(*sizes)
    condition = torch.randn(2, 2, in_size, in_size)
    assert [x.shape[-1] for x in network.encode(condition)] == encoded
    fusion_calls, style_calls = record(network.fusion, nn.Module), record(network, (SynthesisLayer, ToRGBLayer))
    image = network(condition, numbered_ws(network).expand(2, -1, -1))
    assert image.shape == (2, 3, resolution, resolution)
    assert [int(name) for name in fusion_calls if name] == fused
    drives = {name: int(inputs[1].unique()) for name, (inputs, _) in style_calls.items()}
    expected = {}
    for r in blocks:  # The w's that plain synthesis gives these blocks.
        first = num_ws_of(r) - 3
        expected |= {f'b{r}.conv0': first, f'b{r}.conv1': first + 1, f'b{r}.torgb': first + 2}
    assert drives == expected
    # Each fusion reads the encoder's output of its size, the deepest alone, later ones after the features so far.
    outputs = {x.shape[-1]: x for x in network.encode(condition)}
    for i in fused:
        (x,), _ = fusion_calls[str(i)]
        torch.testing.assert_close(x[:, -network.channels[final_size << i] :], outputs[final_size << i])
        assert x.shape[1] == network.channels[final_size << i] * (2 if i else 1)


def test_condition_enters_every_encoder_stage():
    network = unet(32, 32, 4, 32)
    calls = record(network.encoder, nn.Module)
    condition = torch.randn(1, 2, 32, 32)
    network.encode(condition)
    first, second = calls['0.fromrgb'][0][0], calls['1.fromrgb'][0][0]
    assert torch.equal(first, condition) and second.shape == (1, 2, 16, 16)
    inner = (..., slice(2, -2), slice(2, -2))
    means = torch.nn.functional.avg_pool2d(condition, 2)
    assert torch.corrcoef(torch.stack([second[inner].flatten(), means[inner].flatten()]))[0, 1] > 0.8
    x = calls['1.fromrgb'][1] + calls['0.conv2'][1]
    torch.testing.assert_close(calls['1.conv1'][0][0], x)


def test_no_condition_above_the_limit_but_gradient_to_all_of_it():
    network = unet(32, 32, 4, 8)
    condition = torch.randn(1, 2, 32, 32, requires_grad=True)
    network(condition, torch.randn(1, network.num_ws, W_DIM)).sum().backward()
    assert condition.grad.abs().min() > 0
    assert network.fusion[0].weight.grad is not None
    assert all(layer.weight.grad is None for layer in list(network.fusion)[1:])


BAD_SIZES = {
    'in_size: expected a power of two >= 8, got 4': (32, 4, 4, 16),
    'in_size: expected a power of two >= 8, got 24': (32, 24, 4, 16),
    'in_size: expected above 4, at most 32, got 64': (32, 64, 4, 16),
    'in_size: expected above 16, at most 32, got 16': (32, 16, 16, 16),
    'final_size: expected a power of two >= 4, got 2': (32, 16, 2, 16),
    'img_resolution: expected a power of two >= 4, got 30': (30, 16, 4, 16),
}


@pytest.mark.parametrize('message', BAD_SIZES)
def test_messages_of_bad_sizes(message):
    with pytest.raises(ValueError, match=message):
        unet(*BAD_SIZES[message])


@pytest.mark.parametrize('shape', [(1, 2, 32, 32), (1, 2, 8, 8), (1, 3, 16, 16), (2, 2, 16, 16), (2, 16, 16)])
def test_conditions_of_another_shape_are_refused(shape):
    network = unet()
    with pytest.raises(ValueError, match=r'condition: expected \[1, 2, 16, 16\], got'):
        network(torch.zeros(shape), torch.zeros(1, network.num_ws, W_DIM))


def test_backbone_holds_a_mapping_only_where_asked():
    options = dict(num_layers=1, embed_features=None, layer_features=None)
    whole = Backbone(5, 25, W_DIM, synthesis(16), mapping_ws=9, mapping_kwargs=options)
    assert whole.mapping(torch.randn(1, 5), torch.randn(1, 25)).shape == (1, 9, W_DIM) and whole.num_ws == 6
    assert Backbone(5, 25, W_DIM, synthesis(16), mapping_kwargs=options).mapping.num_ws == 6
    assert {name.split('.')[0] for name in Backbone(5, 25, W_DIM, synthesis(16)).state_dict()} == {'synthesis'}
