"""The switches for speed change no number: torch.compile, the CPU's dropout, 16 bits."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import sct
import unet
from conftest import named_weights

DATA = Path(__file__).parent / 'data'
compiler = pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')), reason='needs a C++ compiler')


def tiny(dropout):
    torch.manual_seed(0)
    net = unet.SongUNet(8, 3, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=dropout)
    for p in net.parameters():                      # the last layers begin near zero: let the dropout be seen
        torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('p', [0.2, 0.5])
def test_dropout_of_the_cpu(p, layout):
    x = torch.ones(7, 33, 32, 32).contiguous(memory_format=layout).requires_grad_()
    torch.manual_seed(3)
    out = unet.drop(x, p, True)
    torch.manual_seed(3)
    assert torch.equal(out, unet.drop(x, p, True)) and not torch.equal(out, unet.drop(x, p, True))
    kept = out > 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    tolerance = 5 * (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.float().mean() - (1 - p)) < tolerance
    for a, b in [(kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])]:
        assert abs((a & b).float().mean() - (1 - p) ** 2) < 2 * tolerance       # neighbours are independent
    out.sum().backward()
    assert torch.equal(x.grad, out.detach()) and unet.drop(x, p, False) is x and unet.drop(x, 0.0, True) is x


@pytest.mark.slow
@compiler
def test_student_and_teacher_drop_the_same_when_compiled(monkeypatch):
    """At r = t both see the same image: with equal masks the loss is 0, with a mask of the teacher's own it is not."""
    plain, net = tiny(0.5), tiny(0.5)
    common.compile_in_place(net)
    x0, eps = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.tensor([0.5, 1.0, 2.0, 4.0])
    call = common.network(net, 'fp32')
    inputs = dict(x_t=x0 + t[:, None, None, None] * eps, t=t, x0_hat=x0, eps_hat=eps, r=t, weighting='edm')
    value = sct.loss(call, **inputs, mask=1)
    value.sum().backward()
    assert value.max() < 1e-4
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: None)
    assert sct.loss(call, **inputs, mask=1).min() > 0.1

    plain.eval(), net.eval()
    x, labels = torch.randn(4, 3, 8, 8), t.log() / 4
    torch.testing.assert_close(net(x, labels), plain(x, labels), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@compiler
def test_a_benchmark_times_compiled_code(monkeypatch, tmp_path):
    """Its first step, whose operations are counted, is eager; the others are a graph each for student and teacher."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = '--width 8 --mults 1 --blocks 1 --batch 4 --resolution 8 --pretrain-steps 0 --compile --benchmark 1'
    assert common.run(sct.main, flags.split()) == 0
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2


@pytest.mark.slow
@compiler
@pytest.mark.parametrize('name, network', [('songunet_ddpmpp', unet.SongUNet), ('songunet_ncsnpp_cond', unet.SongUNet),
                                           ('edm2_unet_cond', unet.EDM2UNet)])
def test_published_numbers_when_compiled(name, network):
    golden = np.load(DATA / f'{name}.npz')
    net = named_weights(network(**json.loads(str(golden['config'])))).eval().to(memory_format=torch.channels_last)
    common.compile_in_place(net)
    x = torch.from_numpy(golden['x']).contiguous(memory_format=torch.channels_last).requires_grad_()
    labels = torch.from_numpy(golden['class_labels']) if 'class_labels' in golden else None
    out = net(x, torch.from_numpy(golden['noise_labels']), labels)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), golden['out'], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), golden['grad_x'], rtol=1e-4, atol=1e-5)
