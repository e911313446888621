"""gc_ct.py against the published code's numbers (`gc_losses.npz`: thibautissenhuth/consistency_GC), Gaussian data whose
consistency function is known, and brute force. What is as in the other scripts: test_shared.py."""
import argparse
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import gc_ct
from conftest import Script, all_shapes, analysed, close, draws, exact_mean, same, toy, weights, wide

pytestmark = pytest.mark.usefixtures('few_shapes')
GOLDEN = np.load(Path(__file__).parent / 'data/gc_losses.npz')
X, EPS, CHOSEN = (torch.from_numpy(GOLDEN[name]) for name in ('x', 'z', 'use_gc'))
STEPS = [0, 50_000, 99_999]
M = gc_ct.SIGMA_MIN
GC = Script('gc_ct')


def levels(step):
    """t and r that the reference file has at a step, and all the levels of it."""
    sigmas = torch.tensor(gc_ct.rho_levels(gc_ct.num_levels(step, 100_000) - 1))
    i = torch.from_numpy(GOLDEN[f'{step}:index'])
    return sigmas[i + 1], sigmas[i], sigmas


@pytest.mark.parametrize('step', STEPS)
def test_levels_and_pair_probabilities_are_the_published_ones(step):
    assert [gc_ct.num_levels(int(k), 100_000) for k in GOLDEN['steps']] == GOLDEN['num_sigmas'].tolist()
    sigmas = levels(step)[2]
    p = gc_ct.pair_probabilities(sigmas, -1.1, 2.0)
    close(p[:8], GOLDEN[f'{step}:pdf_first8'], atol=1e-7)
    assert abs(p.sum() - 1) < 1e-12 and len(p) == len(sigmas) - 1
    table, cumulative = gc_ct.level_table(len(sigmas), -1.1, 2.0)
    assert torch.equal(table, sigmas) and torch.equal(cumulative, p.cumsum(0).float())


@pytest.mark.parametrize('step', STEPS)
def test_endpoints_and_losses_are_the_published_ones(step):
    t, r, _ = levels(step)
    x_hat = gc_ct.generator_coupling(functools.partial(toy, scale=0.2), X, EPS, r, None, CHOSEN, M)
    close(x_hat[CHOSEN], GOLDEN[f'{step}:endpoint'][GOLDEN['use_gc']])
    assert torch.equal(x_hat[~CHOSEN], X[~CHOSEN])
    settings = gc_ct.loss_settings(argparse.Namespace(**gc_ct.PRESETS['cifar10'] | dict(in_channels=3, resolution=8)))
    value = gc_ct.loss(toy, x_hat + wide(t) * EPS, t, x_hat + wide(r) * EPS, r, **settings)
    close(value, GOLDEN[f'{step}:weighted'], rtol=2e-4)
    close(value * (t - r), GOLDEN[f'{step}:distance'], rtol=2e-4)


def test_repeated_endpoints_that_fill_a_batch_are_not_written(monkeypatch):
    x0, eps, r = torch.randn(20, 1, 2, 2), torch.randn(20, 1, 2, 2), torch.rand(20)
    chosen, sizes = torch.arange(20) % 5 == 2, []                               # 4 of them
    net = lambda x, c, y=None: (sizes.append(len(x)), x + wide(torch.arange(len(x))))[1]
    plain = gc_ct.generator_coupling(net, x0, eps, r, None, chosen)
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda x: True), raising=False)
    assert torch.equal(gc_ct.generator_coupling(net, x0, eps, r, None, chosen), plain)
    assert sizes == [4, 6]                                                      # an eighth of 20 is 3


@pytest.mark.parametrize('schedule, boundary', [('ict', M), ('ect', 0.0)])
def test_analysis_prints_transport_cost_and_regulariser(schedule, boundary, capsys, monkeypatch):
    pytest.importorskip('scipy')
    monkeypatch.setattr(gc_ct, 'rho_levels', lambda n, plain=gc_ct.rho_levels: plain(n)[::4] if n == 12 else plain(n))
    flags = ['--schedule', schedule, '--pretrain-steps', 0, '--resolution', 4, '--mults', 1]
    assert GC.train(*flags, '--steps', 1) == 0
    table, sigmas, data = analysed(GC, capsys)[0].reshape(2, 3, 4), gc_ct.rho_levels(12)[1:], all_shapes(200, 4)
    net, images, expected = common.network(gc_ct.load(GC.out), 'fp32'), common.normalise(data.images), []
    for sigma in sigmas:
        for j, index in enumerate(common.batch_indices(200, 512, 0, 0).split(64)):
            x0, y, t = images[index], data.labels[index], torch.full((64,), sigma)
            eps = common.randn(x0.shape, 0, j, 'analyse')
            order = gc_ct.optimal_transport(x0, eps)
            x_hat = gc_ct.f(net, x0 + sigma * eps, t, y, boundary)
            for x, labels in ((x0, y), (x_hat, y), (x0[order], y[order])):
                v = (x + sigma * eps - exact_mean(x + sigma * eps, t, images, labels[:, None] == data.labels)) / sigma
                expected.append([(x - eps).square().mean().item(), (eps - v).square().mean().item()])
    means = np.reshape(expected, (3, 8, 3, 2)).mean(1)                          # (sigmas, couplings, quantities)
    close(table[:, :, 0], [sigmas] * 2, rtol=1e-3)
    close(table[:, :, 1:], means.transpose(2, 0, 1), rtol=3e-3, atol=1e-7)


def test_the_analysis_of_many_images_has_each_among_its_references(capsys, monkeypatch):
    """Near the data E[x0 | x_t] is the image itself, so that independent pairs have next to no regulariser."""
    monkeypatch.setattr(gc_ct, 'rho_levels', lambda n, plain=gc_ct.rho_levels: plain(n)[:2] if n == 12 else plain(n))
    images, labels = torch.randint(256, (60_000, 3, 4, 4), dtype=torch.uint8), torch.arange(60_000) // 6_000
    monkeypatch.setattr(common, 'shapes', lambda **_: common.Data(images, labels, 10, None))
    assert GC.train('--resolution', 4, '--mults', 1, '--steps', 1) == 0
    seen, plain = [], gc_ct.diagnostics
    monkeypatch.setattr(gc_ct, 'diagnostics', lambda *args: (seen.extend(args[5].unique()), plain(*args))[1])
    assert 0 <= analysed(GC, capsys)[0][1, 1] < 1e-3 and len(set(map(int, seen))) == 10      # not of the first classes


def test_lion_is_its_five_lines():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    theirs, momenta = [p.detach().clone() for p in ours], [torch.zeros_like(p) for p in ours]
    optimizer = gc_ct.Lion(ours, lr=0.01, betas=(0.9, 0.99))
    for step in range(9):
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            theirs[i] -= 0.01 * torch.sign(0.9 * momenta[i] + 0.1 * p.grad)
            momenta[i] = momenta[i].lerp(p.grad, 1 - 0.99)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_without_generated_endpoints_gc_is_ict_bit_for_bit():
    for out, flags in [('gc', ['--mu', 0]), ('ic', ['--coupling', 'ic']), ('half', [])]:
        assert GC.train('--optimizer', 'Lion', '--betas', '0.9,0.99', *flags, '--out', out) == 0
    assert same(weights('gc'), weights('ic')) and not same(weights('gc'), weights('half'))
    assert weights('gc', 'checkpoint.pt')['optimizer']['state'][0].keys() == {'exp_avg'}


@pytest.mark.parametrize('schedule, boundary', [('ict', M), ('ect', 0.0)])
@pytest.mark.parametrize('mu', [0.4, 1.0])
def test_the_pairs_that_a_run_trains_on(schedule, boundary, mu, spy):
    calls, flags = spy(gc_ct, 'loss'), f'--mu {mu} --schedule {schedule} --lr 0 --pretrain-steps 0 --steps 3'.split()
    assert GC.train(*flags, '--batch', 64, '--microbatch', 48) == 0
    net = common.network(gc_ct.load(GC.out), 'fp32')
    for step in range(3):
        x0, y, eps = draws(step, 64)
        t, r, x_t, x_r = (torch.cat([getattr(call, name) for call in calls[2 * step:2 * step + 2]])
                          for name in ('t', 'r', 'x_t', 'x_r'))
        chosen = common.rand((64,), 0, step, 'mix') < mu
        with torch.no_grad():
            ends = gc_ct.f(net, x0 + wide(r) * eps, r, y, boundary)
        x_hat = torch.where(wide(chosen), ends, x0)
        torch.testing.assert_close(x_t, x_hat + wide(t) * eps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x_r, x_hat + wide(r) * eps, rtol=1e-4, atol=1e-4)
        assert not x_t.requires_grad and (schedule == 'ict' or step or (r == 0).any())


def test_the_endpoints_are_of_the_average_or_of_the_online_network(spy, after_step):
    asked, inputs = spy(gc_ct, 'generator_coupling'), (torch.randn(8, 3, 8, 8), torch.zeros(8), torch.arange(8))
    for out, endpoint in enumerate(['ema', 'online', 'online']):
        after_step(2, lambda: torch.manual_seed(out))
        assert GC.train('--endpoint', endpoint, '--dropout', 0.5, '--mu', 1, '--lr', 0.01, '--out', out) == 0
        average = common.network(gc_ct.load(str(out)), 'fp32')(*inputs)
        assert torch.equal(asked[-1].net(*inputs), average) == (endpoint == 'ema')
    assert same(weights('1'), weights('2')) and not same(weights('0'), weights('1'))


def test_wrong_flags_of_gc(refused):
    for flags in ('--mu 1.5', '--q 1e300 --schedule ect', '--s1 10 --s0 20', '--coupling none', '--analyse nowhere'):
        refused(gc_ct, f'{flags} --out x', flags.split()[1].removesuffix('300'))
    assert GC.run('--q', 2, '--dry-run') == GC.train('--steps', 1) == 0     # of no use with iCT's levels, and no harm
    refused(gc_ct, '--blocks 1,2 --out x', '[1, 2]')
    refused(gc_ct, '--resume --mu 0.7', '--mu is 0.7', 'made with 0.3')
