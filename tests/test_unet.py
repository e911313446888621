"""unet.py against outputs and gradients of the published networks: SongUNet of EDM, EDM2's U-Net (data/README.md)."""
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import sct
from common import UserError
from conftest import Casts, named_weights, slow
from unet import EDM2UNet, GroupNorm, GroupNormFunction, SongUNet, load_weights, normalize

SMALL = dict(img_resolution=8, in_channels=3, out_channels=3, model_channels=8, channel_mult=[1, 1], num_blocks=1)
TINY = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=4, model_channels=16, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[4])
compiler = pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')), reason='needs a C++ compiler')


def inputs(n=2):
    random = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, 8, 8, generator=random), torch.randn(n, generator=random), torch.eye(4)[:n]


@pytest.mark.parametrize('name, network', [('songunet_ddpmpp', SongUNet), ('songunet_ncsnpp_cond', SongUNet),
                                           ('edm2_unet_cond', EDM2UNet)])
@pytest.mark.parametrize('way', ['plain', 'channels', pytest.param('compiled', marks=[slow, compiler])])
def test_published_numbers(name, network, way):
    golden = np.load(Path(__file__).parent / f'data/{name}.npz')
    net = network(**json.loads(str(golden['config'])))
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == json.loads(str(golden['state_dict']))
    layout = torch.contiguous_format if way == 'plain' else torch.channels_last
    net = named_weights(net).eval().to(memory_format=layout)
    if way == 'compiled':
        common.compile_in_place(SimpleNamespace(compile=True), net)
    x = torch.from_numpy(golden['x']).contiguous(memory_format=layout).requires_grad_()
    labels = torch.from_numpy(golden['class_labels']) if 'class_labels' in golden else None
    out = net(x, torch.from_numpy(golden['noise_labels']), labels)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), golden['out'], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), golden['grad_x'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('network', [SongUNet, EDM2UNet])
def test_the_seed_names_the_dropout_mask(network):
    net, outs = named_weights(network(**TINY | dict(dropout=0.5))), []
    for seed in [1, 1, 2]:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(not outs):                          # student, teacher, other mask
            outs.append(net(*inputs()).detach())
    torch.testing.assert_close(outs[0], outs[1])
    assert (outs[0] - outs[2]).abs().max() > 1e-3


@slow
@compiler
def test_student_and_teacher_drop_the_same_when_compiled(monkeypatch):
    """At r = t both see the same image: with equal masks the loss is 0, with a mask of the teacher's own it is not."""
    torch._dynamo.reset()               # after networks of other sizes it would compile for any size
    net = named_weights(SongUNet(**SMALL | dict(channel_mult=[1], attn_resolutions=[], dropout=0.5)))
    common.compile_in_place(SimpleNamespace(compile=True), net)
    t, x = torch.tensor([0.5, 4.0]), torch.randn(2, 3, 8, 8)
    loss = lambda: sct.loss(common.network(net, 'fp32'), x_t=x, t=t, x_r=x, r=t, weighting='edm', seed=1)
    value = loss()
    value.sum().backward()
    assert value.max() < 1e-4
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: None)
    assert loss().min() > 0.1


def test_initial_output_is_tiny_and_weights_are_xavier():
    torch.manual_seed(0)
    net = SongUNet(16, 3, 3, model_channels=32, channel_mult=[1, 2], num_blocks=1).eval()
    assert net(torch.randn(2, 3, 16, 16), torch.zeros(2)).abs().max() < 1e-3
    for layer, bound in [(net.enc['16x16_block0'].conv0, (6 / (2 * 32 * 9)) ** 0.5),
                         (net.dec['8x8_in0'].qkv, (0.2 * 6 / (64 + 192)) ** 0.5)]:
        assert abs(layer.weight.abs().max().item() / bound - 1) < 0.01


def test_weights_are_normalised_in_place_only_for_the_student():
    torch.manual_seed(0)
    net = EDM2UNet(**TINY, channels_per_head=16)
    assert net.eval()(*inputs()).abs().max() == 0                       # training starts from zero
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3) if p.ndim else p.fill_(0.5)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    net.eval()(*inputs())
    with torch.no_grad():
        teacher = net.train()(*inputs())
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    student = net(*inputs())
    assert (student - teacher).abs().max() < 0.01 * teacher.abs().max()         # the same function, to normalize's eps
    student.square().sum().backward()
    for name, p in net.named_parameters():
        assert torch.equal(before[name], p) == (p.ndim == 0) and p.grad is not None and p.grad.abs().max() > 0, name
        if p.ndim:                                                      # scaling a weight changes nothing
            rms = p.square().flatten(1).mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)


@pytest.mark.parametrize('width', [8, 40, 56])
def test_edm2_takes_any_width_and_a_narrow_block_has_no_attention(width):
    net = named_weights(EDM2UNet(**TINY | dict(model_channels=width, attn_resolutions=[8, 4]), channels_per_head=16))
    heads = [module.heads for module in net.modules() if hasattr(module, 'heads')]
    assert net(*inputs()).isfinite().all() and 0 == min(heads) < max(heads)


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.16), (torch.float16, 0.02)])
def test_edm2_in_low_precision(dtype, tolerance):
    net = named_weights(EDM2UNet(**TINY, channels_per_head=16)).train()
    wanted = net(*inputs()).detach()
    with torch.autocast('cpu', dtype):
        out = net(*inputs())
    assert (out.float() - wanted).abs().max() < tolerance * wanted.abs().max()
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert normalize(torch.full((1, 4), 40000.0, dtype=dtype), dim=1).tolist() == [[1.0] * 4]       # squares: infinite


def test_load_weights_names_what_does_not_fit():
    net, given = SongUNet(**SMALL), named_weights(SongUNet(**SMALL)).state_dict()
    name, before = 'enc.8x8_conv.weight', {name: p.clone() for name, p in net.state_dict().items()}
    for state, words in [
            ({k: p for k, p in given.items() if k != name}, f'{name} is missing there, [8, 3, 3, 3] here'),
            (given | {name: torch.ones(8, 1, 3, 3)}, f'{name} is [8, 1, 3, 3] there, [8, 3, 3, 3] here'),
            (given | {'a.bias': torch.ones(2), 'logvar': torch.ones(1)}, 'a.bias is [2] there, missing here'),
            ({f'module.{k}': p for k, p in given.items()}, 'more'), (EDM2UNet(**TINY).state_dict(), 'more')]:
        with pytest.raises(UserError) as error:
            load_weights(net, state, 'some.pkl')
        text = str(error.value)
        assert text.startswith('some.pkl') and words in text and '\n' not in text and len(text) < 500, text
        assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())       # nothing is half loaded
    with pytest.raises(UserError, match='map_augment.weight is missing there'):
        load_weights(SongUNet(**SMALL | dict(augment_dim=9)), given, 'some.pkl')
    load_weights(net, given | {'map_augment.weight': torch.ones(8, 9), 'logvar_linear.weight': torch.ones(1, 4)}, 'x')
    assert all(torch.equal(given[name], p) for name, p in net.state_dict().items())


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_group_norm_for_gpus_is_group_norm_and_keeps_channels_last(dtype, tolerance, compiled):
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 16, 4, 6) + 1) * torch.tensor([1, 1, 1, 1e-3]).repeat_interleave(4).view(16, 1, 1)
    norm, x = GroupNorm(16), x.to(dtype, memory_format=torch.channels_last)        # eps matters for the last four
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    on_gpus = lambda x: GroupNormFunction.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    found = []
    for call in norm, torch.compile(on_gpus, fullgraph=True, backend='aot_eager') if compiled else on_gpus:
        y = call(x.requires_grad_(True))
        along = torch.sin(torch.arange(768).view(y.shape))
        found.append([y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], along)])
    for a, b in zip(*found):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in found[1][:2])
    with Casts() as casts:
        on_gpus(x).sum().backward()
    whole = [size for _, size in casts.found if size == x.numel()]
    assert len(whole) == (dtype != torch.float32)       # for the variance; results are rounded as they are written
