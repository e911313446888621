"""torch.compile changes no number."""
import os
import shutil
from argparse import Namespace

import pytest
import torch

import common
import sct
import unet
from conftest import named_weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which(os.environ.get('CXX', 'g++')),
                                                   reason='needs a C++ compiler')]


def tiny(dropout):
    net = unet.SongUNet(8, 3, 3, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], dropout=dropout)
    return named_weights(net)                       # the last layers begin near zero: let the dropout be seen


def test_student_and_teacher_drop_the_same_when_compiled(monkeypatch):
    """At r = t both see the same image: with equal masks the loss is 0, with a mask of the teacher's own it is not."""
    plain, net = tiny(0.5), tiny(0.5)
    common.distributed(net, Namespace(compile=True))
    t = torch.tensor([0.5, 1.0, 2.0, 4.0])
    x_t = torch.rand(4, 3, 8, 8) + t[:, None, None, None] * torch.randn(4, 3, 8, 8)
    loss = lambda: sct.loss(common.network(net, 'fp32'), x_t=x_t, t=t, x_r=x_t, r=t, weighting='edm', seed=1)
    value = loss()
    value.sum().backward()
    assert value.max() < 1e-4
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: None)
    assert loss().min() > 0.1

    plain.eval(), net.eval()
    x, labels = torch.randn(4, 3, 8, 8), t.log() / 4
    torch.testing.assert_close(net(x, labels), plain(x, labels), rtol=1e-4, atol=1e-5)


def test_a_benchmark_times_compiled_code(monkeypatch, tmp_path):
    """Its first step, whose operations are counted, is eager; the others are a graph each for student and teacher."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = '--width 8 --mults 1 --blocks 1 --batch 4 --resolution 8 --pretrain-steps 0 --compile --benchmark 1'
    assert common.run(sct.main, flags.split()) == 0
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2
