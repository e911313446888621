"""unet.py against outputs and gradients of the published networks (`songunet_*.npz`: NVlabs/edm's SongUNet)."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from unet import SongUNet

DATA = Path(__file__).parent / 'data'


def named_weights(net):
    """The weights that both sides make from the parameters' names (the reference files hold none)."""
    for name, p in net.state_dict().items():
        if 'resample_filter' in name:
            continue
        r = np.random.RandomState(zlib.crc32(name.encode())).randn(*p.shape).astype(np.float32)
        scale = 1 / np.sqrt(p[0].numel()) if p.ndim >= 2 else 0.1 if 'norm' in name and name.endswith('weight') else 0.2
        shift = 1 if p.ndim < 2 and 'norm' in name and name.endswith('weight') else 0
        p.copy_(torch.from_numpy(np.asarray(shift + scale * r, dtype=np.float32)))
    return net


@pytest.mark.parametrize('name', ['songunet_ddpmpp', 'songunet_ncsnpp_cond'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_published_numbers(name, memory_format):
    golden = np.load(DATA / f'{name}.npz')
    net = SongUNet(**json.loads(str(golden['config'])))
    shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
    assert shapes == json.loads(str(golden['state_dict']))

    net = named_weights(net).eval().to(memory_format=memory_format)
    x = torch.from_numpy(golden['x']).to(memory_format=memory_format).requires_grad_()
    labels = torch.from_numpy(golden['class_labels']) if 'class_labels' in golden else None
    out = net(x, torch.from_numpy(golden['noise_labels']), labels)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), golden['out'], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), golden['grad_x'], rtol=1e-4, atol=1e-5)


def test_settings_per_resolution():
    net = SongUNet(8, 1, 1, model_channels=8, channel_mult=[1, 2], num_blocks=[1, 3], dropout=[0.0, 0.5], attn_resolutions=[])
    assert sorted(k for k in net.enc if 'block' in k) == ['4x4_block0', '4x4_block1', '4x4_block2', '8x8_block0']
    assert sorted(k for k in net.dec if '8x8_block' in k) == ['8x8_block0', '8x8_block1']
    assert {net.enc[k].dropout for k in net.enc if '8x8_block' in k} == {0.0}
    assert {net.enc[k].dropout for k in net.enc if '4x4_block' in k} == {0.5}
    assert [k for part in (net.enc, net.dec) for k, m in part.items() if getattr(m, 'norm2', None)] == ['4x4_in0']
    assert net(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


def test_augment_labels_enter_without_bias():
    net = named_weights(SongUNet(8, 3, 3, augment_dim=9, model_channels=8, channel_mult=[1], num_blocks=1)).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.zeros(2)
    torch.testing.assert_close(net(x, t), net(x, t, augment_labels=torch.zeros(2, 9)))
    assert (net(x, t) - net(x, t, augment_labels=torch.ones(2, 9))).abs().max() > 1e-3


def test_initial_output_is_tiny_and_weights_are_xavier():
    torch.manual_seed(0)
    net = SongUNet(16, 3, 3, model_channels=32, channel_mult=[1, 2], num_blocks=1).eval()
    assert net(torch.randn(2, 3, 16, 16), torch.zeros(2)).abs().max() < 1e-3
    w = net.enc['16x16_block0'].conv0.weight
    assert abs(w.abs().max().item() / (6 / (2 * 32 * 9)) ** 0.5 - 1) < 0.01
    w = net.dec['8x8_in0'].qkv.weight
    assert abs(w.abs().max().item() / (0.2 * 6 / (64 + 192)) ** 0.5 - 1) < 0.01


def test_same_seed_same_dropout_mask():
    net = named_weights(SongUNet(8, 3, 3, model_channels=8, channel_mult=[1, 1], num_blocks=1, dropout=0.5))
    x, t = torch.randn(2, 3, 8, 8), torch.zeros(2)
    outs = []
    for seed in [1, 1, 2]:
        torch.manual_seed(seed)
        outs.append(net(x, t))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize('bad', [dict(encoder_type='x'), dict(decoder_type='skip'), dict(embedding_type='x'),
                                 dict(num_blocks=[1, 2, 3]), dict(img_resolution=15)])
def test_wrong_settings_are_named(bad):
    config = dict(img_resolution=16, in_channels=3, out_channels=3, channel_mult=[1, 2], model_channels=8) | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        SongUNet(**config)


@pytest.mark.parametrize('augment_dim, size', [(9, 55_733_891), (0, 55_732_739)])     # published with, trained here without
def test_cifar10_network_has_the_published_size(augment_dim, size):
    with torch.device('meta'):
        net = SongUNet(32, 3, 3, augment_dim=augment_dim, channel_mult=[2, 2, 2])
    assert sum(p.numel() for p in net.parameters()) == size
