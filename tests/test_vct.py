"""vct.py against the losses and the sampler of VCT's published code (`vct_losses.npz`: sony/vct), and data whose exact
consistency function is known."""
import argparse
import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import unet
import vct
from conftest import SCRIPTS, TINY_NETWORK, Script, same

VCT = np.load(Path(__file__).parent / 'data/vct_losses.npz')
TINY = Script('vct').small


def tensor(name):
    return torch.from_numpy(VCT[name])


def toy(x_in, c_noise, y=None):
    """The network of `vct_losses.npz`."""
    return torch.tanh(x_in) * torch.cos(c_noise)[:, None, None, None] + 0.1 * x_in


def toy_encoder(x_in, c_noise, y=None):
    """The encoder of `vct_losses.npz`."""
    assert torch.equal(c_noise, torch.zeros(len(x_in)))
    return torch.cat([0.3 * x_in, 0.5 * x_in - 1.0], 1)


def close(a, b, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


# The published mathematics

CASES = sorted(name.removesuffix(':eps') for name in VCT.files
               if name.endswith(':eps') and not name.startswith('sample'))
PUBLISHED = {'ict': vct.PRESETS['cifar10', 'ict'], 'ecm_cifar': vct.PRESETS['cifar10', 'ecm'],
             'ecm_imagenet': vct.PRESETS['imagenet64', 'ecm'] | dict(beta=10.0)}


def levels(args, name, step):
    """Pairs of levels and the last pair, of the draws of the case `name`."""
    if args.base == 'ict':
        n = vct.num_levels(step, 400_000, args.s0, args.s1)
        assert n == VCT[f'{name}:num_timesteps']
        sigmas, _ = vct.level_table(n, args.P_mean, args.P_std)
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        rounded = (low + torch.arange(n) / (n - 1) * (high - low)) ** 7     # in float32: costs gaps of 1281 levels 1e-4
        close(sigmas, rounded, rtol=1e-5, atol=0)
        return rounded[tensor(f'{name}:index') + 1], rounded[tensor(f'{name}:index')], (rounded[-1], rounded[-2])
    t = vct.upper_level(tensor(f'{name}:randn_t'), args.P_mean, args.P_std, args.kernel)
    lower = lambda t: vct.lower_level(t, step * args.stages // 400_000, args.q, args.k, args.b)
    return t, lower(t), (80.0, lower(torch.tensor(80.0)))


@pytest.mark.parametrize('name', CASES)
def test_losses_are_the_published_ones(name):
    base, kernel, coupling, step = name.rsplit('_', 3)
    args = argparse.Namespace(**PUBLISHED[base] | dict(kernel=kernel, in_channels=3, resolution=8))
    x0 = tensor('x')
    t, r, last = levels(args, name, int(step))
    eps, kl = vct.emit(toy_encoder if coupling == 'vae' else None, x0, tensor(f'{name}:eps'))
    weighted, distance = vct.loss(toy, x0, eps, t, r, **vct.loss_settings(args))
    total = weighted + vct.kl_weight(args.beta, *last, args.weighting) * kl
    close(distance.mean(), VCT[f'{name}:consistency_loss'], rtol=2e-5, atol=0)
    close(total.mean(), VCT[f'{name}:loss'], rtol=2e-5, atol=0)
    if coupling == 'vae':
        close(kl.mean(), VCT[f'{name}:kl_divergence'], atol=0)
    else:
        assert torch.equal(kl, torch.zeros(6))


def test_number_of_levels_and_the_levels_themselves():
    close([vct.num_levels(int(k), 400_000) for k in VCT['ict:steps']], VCT['ict:num_timesteps'])
    close(vct.rho_levels(10), VCT['ict:sigmas_11'], atol=0)
    sigmas = vct.rho_levels(1280)
    close(sigmas[:4] + sigmas[-4:], VCT['ict:sigmas_1281_head_tail'], atol=0)


def model_of(net, encoder=None, **config):
    """A stand-in for a loaded model, with the settings that sampling reads."""
    model = torch.nn.Module()
    model.weight, model.label_dim, model.forward = torch.nn.Parameter(torch.zeros(1)), 0, net
    if encoder:
        model.encoder = torch.nn.Module()
        model.encoder.label_dim, model.encoder.forward = 0, encoder
    model.config = dict(precision='fp32', label_dim=0, coupling='vc' if encoder else 'independent', kernel='ve',
                        t_mid=0.821, in_channels=3, resolution=8) | config
    return model


@pytest.mark.parametrize('kernel', ['ve', 'li'])
@pytest.mark.parametrize('coupling', ['independent', 'vae'])
def test_sampler_is_the_published_one(kernel, coupling, monkeypatch):
    name = f'sample_{kernel}_{coupling}'
    monkeypatch.setattr(common, 'randn', lambda shape, seed, i, stream: tensor(f'{name}:{["z", "eps"][i]}').float())
    monkeypatch.setattr(torch.Tensor, 'clamp', lambda x, *_, **__: x)               # theirs clips when it saves
    images = vct.sample(model_of(toy, toy_encoder if coupling == 'vae' else None, kernel=kernel), 4, nfe=2)
    close(images, VCT[f'{name}:out'])


def test_one_step_needs_no_encoder_and_stays_within_range():
    images = vct.sample(model_of(lambda x, c, y=None: 100 * x, lambda *_: 1 / 0), 6, seed=2)
    assert images.shape == (6, 3, 8, 8) and images.abs().max() == 1


# Properties

@pytest.mark.parametrize('kernel', ['ve', 'li'])
@pytest.mark.parametrize('m', [0.0, 0.002])
def test_boundary_of_the_consistency_function(kernel, m):
    """f(x, m) = x; far from there f is what the preconditioning's definition makes of it, at t = 1 and sigma_max."""
    x, s = torch.randn(2, 3, 4, 4), 0.5
    if m:
        assert torch.equal(vct.f(toy, x, torch.full((2,), m), m=m, kernel=kernel), x)
    else:
        torch.testing.assert_close(vct.f(toy, x, torch.full((2,), 1e-7), m=m, kernel=kernel), x)
    for t in (1.0, 80.0):
        a, b = (1, 1) if kernel == 've' else (1 - t / 80, 1 - (t - m) / (80 - m))
        c_in = (s * s * a * a + t * t) ** -0.5
        c_skip, c_out = s * s * b / ((t - m) ** 2 + s * s * b * b), (t - m) * s * c_in
        by_hand = c_skip * x + c_out * toy(c_in * x, torch.full((2,), math.log(t) / 4))
        torch.testing.assert_close(vct.f(toy, x, torch.full((2,), t), m=m, kernel=kernel), by_hand)


def test_both_paths_lead_from_image_to_noise():
    x0, eps = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    for kernel in ('ve', 'li'):
        assert torch.equal(vct.path(x0, eps, torch.zeros(2), kernel), x0)
    end = torch.full((2,), 80.0)
    assert torch.equal(vct.path(x0, eps, end, 'li'), 80 * eps)
    assert torch.equal(vct.path(x0, eps, end, 've'), x0 + 80 * eps)
    high = torch.full((1,), 9.0)
    assert vct.upper_level(high, -1.1, 2.0, 'li') == 80 < vct.upper_level(high, -1.1, 2.0)


def test_kl_is_the_closed_form():
    mu, std = torch.randn(4, 3, 2, 2), torch.rand(4, 3, 2, 2) + 0.01
    normal = torch.distributions.Normal
    closed_form = torch.distributions.kl_divergence(normal(mu, std), normal(0.0, 1.0))
    torch.testing.assert_close(vct.kl_divergence(mu, std), closed_form)
    encoder = lambda x, c, y: torch.cat([mu, std.expm1().log()], 1)             # inverse of softplus
    eps, kl = vct.emit(encoder, mu, torch.ones_like(mu))
    torch.testing.assert_close(eps, mu + std)
    torch.testing.assert_close(kl, vct.kl_divergence(mu, std).sum((1, 2, 3)))


@pytest.mark.parametrize('c', [0.0, 0.03])
@pytest.mark.parametrize('form', ['elementwise', 'vector'])
def test_distance_and_its_gradient_at_zero(form, c):
    u = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    size = u.abs().flatten(1) if form == 'elementwise' else u.flatten(1).norm(dim=1, keepdim=True)
    x, t = torch.zeros(3, 2, 2, 2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    c_out = 0.5 / (0.25 + 1) ** 0.5                                             # at x = 0 and t = 1, f is c_out F
    student, teacher = (lambda x, c_noise, y: u / c_out), (lambda x, c_noise, y: torch.zeros_like(x))
    distance = vct.loss(student, x, x, t, t / 2, teacher=teacher, c=c, huber=form)[1]
    torch.testing.assert_close(distance, ((size ** 2 + c ** 2) ** 0.5 - c).sum(1))
    scale = torch.zeros((), requires_grad=True)
    vct.loss(lambda x, c_noise, y: scale + 0 * x, x, x, t, t / 2, teacher=teacher, c=c, huber=form)[1].sum().backward()
    assert scale.grad == 0


def test_loss_stops_the_teachers_gradient_and_seeds_both_masks_alike():
    seen, scale = [], torch.ones((), requires_grad=True)

    def net(x, c_noise, y):
        seen.append((torch.is_grad_enabled(), torch.rand(1).item()))
        return x * scale
    x, t = torch.randn(4, 1, 2, 2), torch.ones(4)
    vct.loss(net, x, x, t, t / 2, mask=5)[0].sum().backward()
    assert [grad for grad, _ in seen] == [True, False] and seen[0][1] == seen[1][1]
    before, scale.grad = scale.grad, None
    vct.loss(net, x, x, t, t / 2, mask=5, teacher=lambda x, c, y: x * 1.0)[0].sum().backward()
    assert torch.equal(before, scale.grad)


@pytest.mark.parametrize('kernel', ['ve', 'li'])
def test_denoising_loss(kernel):
    """EDM's weight, the network's own preconditioning, its labels."""
    x0, eps, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.5, 30.0])
    net = lambda x, c, y: toy(x, c) + y[:, None, None, None]
    y, weight = torch.tensor([0.3, -0.2]), (t ** 2 + 0.25) / (0.5 * t) ** 2
    u = vct.f(net, vct.path(x0, eps, t, kernel), t, y, kernel=kernel) - x0
    close(vct.denoising_loss(net, x0, eps, t, y, kernel=kernel), weight * u.square().mean((1, 2, 3)))


def test_optimal_transport_pairs_at_the_least_distance():
    pytest.importorskip('scipy')
    from itertools import permutations
    x0, z = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2)
    cost = lambda order: (x0[torch.as_tensor(order)] - 80 * z).square().sum().item()
    assert cost(common.optimal_transport(x0, z)) == pytest.approx(min(map(cost, permutations(range(6)))), rel=1e-6)


@pytest.mark.parametrize('base, kernel', [('ict', 've'), ('ecm', 've'), ('ecm', 'li')])
def test_training_approaches_the_exact_consistency_function(base, kernel):
    """N(0, 1) data, a small network, this script's own levels and loss: with `ve` f -> x / sqrt(1 + t²).

    With `li` x_t has the deviation sqrt(a² + t²), a = 1 - t / sigma_max, and the flow is linear too. Error bound: 5 %
    of the data's deviation, root mean square over x_t and over t from 0.02 to 80.
    """
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                 torch.nn.Linear(64, 1))

    def net(x_in, c_noise, y=None):
        c = c_noise[:, None]
        return (layers(torch.cat([x_in.flatten(1), c, c.square()], 1)) + x_in.flatten(1))[:, :, None, None]
    args = argparse.Namespace(**vct.PRESETS['cifar10', base] | dict(kernel=kernel, in_channels=1, resolution=1))
    steps, optimizer = 2000, torch.optim.Adam(layers.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        x0, eps = (common.randn((512, 1, 1, 1), step, stream) for stream in 'xe')
        if base == 'ict':
            table = vct.level_table(vct.num_levels(step, steps, 10, 160), 0.5, 2.0)
            t, r = vct.level_pair(common.rand((512,), step, 't'), *table)
        else:
            t = vct.upper_level(common.randn((512,), step, 't'), 0.5, 2.0, kernel)
            r = vct.lower_level(t, step * 8 // steps)
        optimizer.zero_grad()
        vct.loss(net, x0, eps, t, r, **vct.loss_settings(args))[0].mean().backward()
        optimizer.step()
        schedule.step()
    t = torch.logspace(math.log10(0.02), math.log10(80), 40).repeat_interleave(500)
    deviation = ((1 if kernel == 've' else (1 - t / 80) ** 2) + t ** 2).sqrt()[:, None, None, None]
    x = deviation * torch.randn(len(t), 1, 1, 1)
    with torch.no_grad():
        error = vct.f(net, x, t, m=0.0, kernel=kernel) - x / deviation
    assert error.square().mean().sqrt() < 0.05


def test_the_encoder_learns_what_makes_the_pairs_agree():
    """Two images; joint training moves their noise apart, as far as the KL term allows, and lowers the loss."""
    images = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(-1, 1, 2, 2)
    distances, means = {}, {}
    for beta in (0.1, 1e4):
        torch.manual_seed(0)
        mean, width = torch.nn.Parameter(torch.tensor(0.01)), torch.nn.Parameter(torch.tensor(0.5413))
        encoder = lambda x, c, y=None: torch.cat([mean * x, width.expand_as(x)], 1)
        weights = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))
        net = lambda x, c, y=None: weights(torch.cat([x.flatten(1), c[:, None]], 1)).view_as(x)
        optimizer = torch.optim.Adam([mean, width, *weights.parameters()], lr=1e-2)
        for step in range(300):
            x0, n = images.repeat(32, 1, 1, 1), common.randn((64, 1, 2, 2), step)
            t = vct.upper_level(common.randn((64,), step, 't'), 0.0, 1.0)
            eps, kl = vct.emit(encoder, x0, n)
            weighted, distance = vct.loss(net, x0, eps, t, t / 2)
            optimizer.zero_grad()
            (weighted + vct.kl_weight(beta, 80.0, 40.0) * kl).mean().backward()
            optimizer.step()
            distances[beta] = distances.get(beta, 0) + distance.mean().item() * (step >= 250)
        means[beta] = abs(mean.item())
    assert means[0.1] > 0.2 > 0.05 > means[1e4] and distances[0.1] < 0.8 * distances[1e4]


# Runs

def run(*flags):
    return common.run(vct.main, [str(flag) for flag in flags])


def lines(out='runs/vct-shapes'):
    return [json.loads(line) for line in (Path(out) / 'metrics.jsonl').read_text().splitlines()]


def weights(out='runs/vct-shapes', name='final.pt'):
    return torch.load(Path(out) / name, weights_only=True)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    draw = common.shapes
    monkeypatch.setattr(common, 'shapes', lambda n=200, resolution=16: draw(n, resolution))


@pytest.mark.parametrize('flags', [
    ['--base', base, '--kernel', kernel, '--coupling', coupling] for base in ('ict', 'ecm') for kernel in ('ve', 'li')
    for coupling in ('independent', 'ot', 'vc')] + [
    ['--no-cond'], ['--pretrain-steps', '2'], ['--base', 'ecm', '--pretrain-steps', '4'],
    ['--encoder', 'big', '--dropout', '0.2'], ['--huber', 'vector', '--precision', 'bf16', '--microbatch', '3'],
    ['--arch', 'edm2', '--width', '64']])
def test_a_run_writes_its_folder(flags):
    if 'ot' in flags:
        pytest.importorskip('scipy')
    assert run(*TINY, '--sample-every', 2, *flags) == 0
    out = Path('runs/vct-shapes')
    vc = set() if 'independent' in flags or 'ot' in flags else {'final-encoder.pt', 'best-encoder.pt'}
    always = {'config.json', 'metrics.jsonl', 'samples', 'curves.png', 'checkpoint.pt', 'final.pt', 'best.pt'}
    assert {p.name for p in out.iterdir()} == always | vc
    assert sorted(p.name for p in (out / 'samples').iterdir()) == ['0000002.png', '0000004.png']
    steps = [line for line in lines() if 'loss' in line]
    assert [line['step'] for line in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(line[name]) for line in steps for name in ('loss', 'consistency', 'kl', 'grad_norm'))
    assert all((line['kl'] > 0) == bool(vc) for line in steps)
    assert 'enc.8x8_conv.weight' in weights() and not any(name.startswith('encoder') for name in weights())


def test_without_scipy_transport_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'scipy.optimize', None)
    refused(vct, [*TINY, '--coupling', 'ot'], 'pip install scipy')


@pytest.mark.parametrize('base', ['ict', 'ecm'])
def test_noise_of_mean_0_and_deviation_1_is_independent_bit_for_bit(base, monkeypatch):
    assert run(*TINY, '--base', base, '--coupling', 'independent', '--clip', 200, '--out', 'a') == 0
    monkeypatch.setattr(vct, 'encode', lambda encoder, x0, y=None: (torch.zeros_like(x0), torch.ones_like(x0)))
    assert run(*TINY, '--base', base, '--coupling', 'vc', '--out', 'b') == 0
    assert lines('a') == lines('b') and lines('a')[0]['kl'] == 0
    assert same(weights('a'), weights('b'))


@pytest.mark.parametrize('base, kernel, coupling', [
    ('ict', 've', 'vc'), ('ecm', 'li', 'vc'), ('ict', 'li', 'ot'), ('ecm', 've', 'independent')])
def test_the_pairs_that_a_run_trains_on(monkeypatch, base, kernel, coupling):
    """Levels, images, labels, noise, weights, as the loop hands them to the loss, and what it makes of the result."""
    if coupling == 'ot':
        pytest.importorskip('scipy')
    seen, lasts, loss, weight = [], [], vct.loss, vct.kl_weight

    def note(net, *rest, **settings):
        seen.append((rest, settings, loss(net, *rest, **settings)))
        return seen[-1][2]
    monkeypatch.setattr(vct, 'loss', note)
    monkeypatch.setattr(vct, 'kl_weight', lambda *rest: lasts.append(rest) or weight(*rest))
    assert run(*TINY, '--base', base, '--kernel', kernel, '--coupling', coupling, '--batch', 64, '--steps', 5,
               '--pretrain-steps', 1, '--stages', 4, '--s0', 4, '--s1', 16, '--beta', 3, '--cond') == 0
    data = common.shapes(resolution=8)
    for done, ((x0, eps, t, r, y, *_), settings, (weighted, distance)) in enumerate(seen):
        step = done + 1
        index, z = common.batch_indices(200, 64, step, 0), common.randn((64, 3, 8, 8), 0, step, 'noise')
        images = common.normalise(data.images[index])
        order = common.optimal_transport(images, z) if coupling == 'ot' else torch.arange(64)
        assert torch.equal(x0, images[order]) and torch.equal(y, data.labels[index][order])
        assert eps.requires_grad if coupling == 'vc' else torch.equal(eps, z)   # its gradient reaches the encoder
        if base == 'ict':
            sigmas = torch.tensor(vct.rho_levels({0: 4, 1: 8, 2: 16, 3: 16}[done]))
            i = (t[:, None] == sigmas).nonzero()[:, 1]
            assert len(i) == 64 and torch.equal(r, sigmas[i - 1])
            last = sigmas[-1], sigmas[-2]
        else:
            t_expected = vct.upper_level(common.randn((64,), 0, step, 'level'), -1.1, 2.0, kernel)
            assert torch.equal(t, t_expected) and torch.equal(r, vct.lower_level(t, done))
            last = 80.0, vct.lower_level(torch.tensor(80.0), done)
        close(lasts[done][:3], (3.0, *last))
        assert settings['m'] == (0.002 if base == 'ict' else 0.0) and settings['kernel'] == kernel
        line = [line for line in lines() if 'loss' in line][step]
        close(line['consistency'], distance.detach().mean())
        close(line['loss'], weighted.detach().mean() + 3 / (last[0] - last[1]) * line['kl'])
    assert len(seen) == 4


def test_the_settings_of_a_run_reach_the_gap(monkeypatch):
    """q, k and b, for the pairs and for the last pair; P_mean and P_std of the levels."""
    ours, seen, lasts, loss, weight = dict(q=3.0, k=4.0, b=2.0, P_mean=-0.5, P_std=1.5), [], [], vct.loss, vct.kl_weight
    monkeypatch.setitem(vct.PRESETS, 'shapes', vct.PRESETS['shapes'] | ours)
    monkeypatch.setattr(vct, 'loss', lambda net, x0, eps, t, r, *rest, **settings: (
        seen.append((t, r)), loss(net, x0, eps, t, r, *rest, **settings))[1])
    monkeypatch.setattr(vct, 'kl_weight', lambda *inputs: (lasts.append(inputs), weight(*inputs))[1])
    assert run(*TINY, '--steps', 1) == 0
    (t, r), lower = seen[0], lambda t: vct.lower_level(t, 0, 3.0, 4.0, 2.0)
    assert torch.equal(t, vct.upper_level(common.randn((8,), 0, 0, 'level'), -0.5, 1.5))
    assert torch.equal(r, lower(t)) and (r > 0).any()
    close(lasts[0][1:3], (80.0, lower(torch.tensor(80.0))))


@pytest.mark.parametrize('coupling', ['vc', 'ot'])
def test_pretraining_has_edms_levels_and_independent_pairs(coupling, monkeypatch):
    if coupling == 'ot':
        pytest.importorskip('scipy')
    seen, plain = [], vct.denoising_loss
    monkeypatch.setattr(vct, 'denoising_loss', lambda net, x0, eps, t, y, *rest: (
        seen.append((x0, eps, t, y)), plain(net, x0, eps, t, y, *rest))[1])
    assert run(*TINY, '--base', 'ecm', '--coupling', coupling, '--pretrain-steps', 4) == 0
    data = common.shapes(resolution=8)
    for step, (x0, eps, t, y) in enumerate(seen):
        index = common.batch_indices(200, 8, step, 0)
        assert torch.equal(x0, common.normalise(data.images[index])) and torch.equal(y, data.labels[index])
        assert torch.equal(eps, common.randn((8, 3, 8, 8), 0, step, 'noise'))
        assert torch.equal(t, vct.upper_level(common.randn((8,), 0, step, 'level'), -1.2, 1.2))
    assert len(seen) == 4


@pytest.mark.parametrize('weighting', ['gap', 'edm'])
def test_the_weight_of_the_kl_term_in_a_run(weighting, monkeypatch):
    """With EDM's weighting it is beta alone, as published."""
    monkeypatch.setitem(vct.PRESETS, ('shapes', 'ecm'), vct.PRESETS['shapes', 'ecm'] | dict(weighting=weighting))
    monkeypatch.setattr(vct, 'loss', lambda net, x0, *rest, **settings: (x0.new_zeros(len(x0)),) * 2)
    assert run(*TINY, '--base', 'ecm', '--beta', 7, '--steps', 1) == 0
    line = lines()[0]
    gap = 80 - vct.lower_level(torch.tensor(80.0), 0).item()
    close(line['loss'], 7 * line['kl'] / (gap if weighting == 'gap' else 1))


def test_the_weight_of_the_kl_term_in_pretraining():
    """One over the numbers of an image, as the denoiser's loss is a mean over them, and whatever beta is."""
    assert run(*TINY, '--base', 'ecm', '--beta', 7, '--pretrain-steps', 2, '--steps', 2, '--eval-every', 2) == 0
    for line in lines()[:2]:
        close(line['loss'], line['consistency'] + line['kl'] / (3 * 8 * 8))
        assert line['kl'] > 1


def gradients(monkeypatch, *flags):
    """Norm of the whole gradient and of the encoder's, before and after clipping, at each step of a run."""
    seen, finish, rate = [], common.finish_gradients, common.learning_rate
    norm = lambda params: torch.stack([p.grad.norm() for p in params]).norm().item()
    parts = []
    plain = vct.add_encoder
    monkeypatch.setattr(vct, 'add_encoder', lambda net, args: parts.append(plain(net, args)) or parts[-1])
    monkeypatch.setattr(common, 'finish_gradients', lambda params, precision: (
        finish(params, precision), seen.append([norm(parts[0].parameters()), norm(parts[0].encoder.parameters())]))[0])
    monkeypatch.setattr(common, 'learning_rate', lambda *rest: (
        seen[-1].extend([norm(parts[0].parameters()), norm(parts[0].encoder.parameters())]), rate(*rest))[1])
    assert run(*TINY, '--base', 'ict', '--resolution', 16, *flags) == 0         # enough pixels for norms to be clipped
    return np.array(seen).T


def test_the_encoders_gradient_is_there_and_clipped_with_the_rest(monkeypatch):
    before, encoders, after, encoders_after = gradients(monkeypatch)
    assert (encoders > 0).all() and (before > 200).all()
    close(after, np.full(4, 200.0), rtol=1e-3)
    close(encoders_after, encoders * 200 / before, rtol=1e-3)
    close([line['grad_norm'] for line in lines() if 'loss' in line], before)


def test_clipping_is_off_at_0(monkeypatch):
    before, _, after, _ = gradients(monkeypatch, '--clip', 0)
    assert (before > 200).all() and np.array_equal(before, after)


def test_a_gradient_that_is_not_finite_is_zeroed_before_clipping(monkeypatch):
    """One bad number costs its own part of the gradient, not the step."""
    finish = common.finish_gradients

    def spoil(params, precision):
        params = list(params)
        params[0].grad.view(-1)[0] = torch.inf
        return finish(params, precision)
    monkeypatch.setattr(common, 'finish_gradients', spoil)
    assert run(*TINY, '--ema', 0) == run(*TINY, '--lr', 0, '--out', 'start') == 0
    assert all(value.isfinite().all() for value in weights().values())
    assert not torch.equal(*(weights(out)['dec.8x8_aux_conv.weight'] for out in ('start', 'runs/vct-shapes')))


def test_in_pretraining_the_noise_is_independent_and_the_encoder_becomes_so(monkeypatch):
    seen, plain = [], vct.denoising_loss
    monkeypatch.setattr(vct, 'denoising_loss', lambda net, x0, eps, *rest: (
        seen.append(eps), plain(net, x0, eps, *rest))[1])
    assert run(*TINY, '--base', 'ecm', '--steps', 40, '--pretrain-steps', 40, '--eval-every', 40, '--seed', 3) == 0
    assert torch.equal(seen[5], common.randn((8, 3, 8, 8), 3, 5, 'noise'))
    kl = [line['kl'] for line in lines() if 'kl' in line]
    assert kl[-1] < kl[0] / 5


def test_the_encoder_drops_units_by_a_mask_of_its_own(monkeypatch):
    """In training, keyed; student and teacher keep the same one; a run that was cut short goes on bit for bit."""
    masks, plain = [], torch.nn.functional.dropout
    monkeypatch.setattr(unet, 'drop', lambda x, p, training: (
        masks.append((x.shape, torch.get_rng_state())) if training else None, plain(x, p, training))[1])
    flags = [*TINY, '--dropout', 0.5, '--microbatch', 4, '--out']
    assert run(*flags, 'whole') == 0
    net = vct.load('whole')
    blocks = [sum(hasattr(m, 'dropout') for m in part.modules()) for part in (net.encoder, net)]
    n, both = blocks[0], blocks[1] - blocks[0]
    encoder, student, teacher = masks[:n], masks[n:n + both], masks[n + both:n + 2 * both]
    for a, b in zip(student, teacher, strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    assert not torch.equal(encoder[0][1], student[0][1])
    starts = {bytes(state.numpy()) for _, state in masks[::n + 2 * both]}
    assert len(masks) == 4 * 2 * (n + 2 * both) and len(starts) == 8            # anew in each step and part of it
    masks.clear()
    vct.sample(net, 4, nfe=2)
    assert not masks
    monkeypatch.setattr(common.Log, 'step', lambda log, number, step=common.Log.step, **values: (
        setattr(log, 'signal', number == 2), step(log, number, **values))[1])
    assert run(*flags, 'cut') == 0 and len(lines('cut')) == 2
    assert run('--resume', '--out', 'cut') == 0 and same(weights('whole'), weights('cut'))


def test_labels_reach_network_and_encoder(monkeypatch):
    seen, plain = [], common.network

    def network(net, precision):
        call = plain(net, precision)
        return lambda x, c, y=None: (seen.append((net.dec['8x8_aux_conv'].weight.shape[0], y)), call(x, c, y))[1]
    monkeypatch.setattr(common, 'network', network)
    assert run(*TINY, '--steps', 1) == 0
    expected = torch.arange(200)[common.batch_indices(200, 8, 0, 0)] % 10
    assert {channels for channels, _ in seen} == {3, 6}
    assert all(torch.equal(y, expected) for _, y in seen[:3])               # encoder, student, teacher
    seen.clear()
    vct.sample(vct.load('runs/vct-shapes'), 6, nfe=2, labels=[7, 2])
    assert [channels for channels, _ in seen] == [3, 6, 3] and all(y.tolist() == [7, 2, 7, 2, 7, 2] for _, y in seen)


@pytest.mark.parametrize('kernel', ['ve', 'li'])
def test_sampling_and_loading_from_every_source(kernel):
    assert run(*TINY, '--kernel', kernel, '--eval-every', 9) == 0
    out, images = Path('runs/vct-shapes'), []
    for source in (out, out / 'checkpoint.pt', out / 'final.pt'):
        model = vct.load(source)
        images.append(vct.sample(model, 12, nfe=2, seed=3))
        assert torch.equal(images[-1], images[0]) and not model.training
    (out / 'checkpoint.pt').unlink()
    assert torch.equal(vct.sample(vct.load(out), 12, nfe=2, seed=3), images[0])             # final.pt, by its folder
    assert not torch.equal(images[0], vct.sample(model, 12, nfe=2, seed=4)) and images[0].abs().max() <= 1
    assert not torch.equal(vct.sample(model, 12, nfe=2, labels=[7], seed=3), images[0])

    z, y, device = common.randn((12, 3, 8, 8), 3, 0, 'sample'), torch.arange(12) % 10, torch.device('cpu')
    net, encoder = (common.network(part, 'fp32') for part in (model, model.encoder))
    first = vct.f(net, 80 * z, torch.full((12,), 80.0), y, 0.002, kernel)
    torch.testing.assert_close(vct.sample(model, 12, seed=3), first.clamp(-1, 1))
    mu, std = vct.encode(encoder, first, y)
    eps, mid = mu + std * common.randn((12, 3, 8, 8), 3, 1, 'sample'), torch.full((12,), 0.821)
    x = (first if kernel == 've' else (1 - 0.821 / 80) * first) + 0.821 * eps
    torch.testing.assert_close(images[0], vct.f(net, x, mid, y, 0.002, kernel).clamp(-1, 1))

    assert run('--sample', out, '--n', 6, '--nfe', '1,4', '--labels', '1,2') == 0
    assert {p.name for p in out.glob('*.png')} >= {'sample-1-4-steps.png'}


def test_final_without_its_encoder(refused):
    assert run(*TINY) == 0
    out = Path('runs/vct-shapes')
    (out / 'final-encoder.pt').unlink()
    refused(vct, ['--sample', out / 'final.pt'], 'final-encoder.pt', 'no such checkpoint')
    assert run('--sample', out) == 0                                                            # checkpoint.pt has both


def test_where_training_starts(capsys):
    """The published checkpoint for the published network; final.pt of a run, whatever its coupling, for the same one.
    """
    def settings(*flags):
        assert run(*flags, '--dry-run') == 0
        return json.loads(capsys.readouterr().out)
    assert settings('--dataset', 'cifar10')['init'] == settings()['init'] == 'none'
    assert settings('--dataset', 'cifar10', '--base', 'ecm')['init'] == unet.URLS['cifar10']
    assert 'edm2-img64-s' in settings('--dataset', 'imagenet64')['init']
    assert run(*TINY) == 0
    for coupling in ('vc', 'independent'):
        init = ['--init', 'runs/vct-shapes/final.pt']
        assert run(*TINY, '--lr', 0, '--coupling', coupling, *init, '--out', coupling) == 0
        assert same(weights(), weights(coupling))


@pytest.mark.parametrize('dataset, expected', [
    ('shapes', dict(base='ecm', coupling='vc', cond=True, clip=200.0, pretrain_steps=600)),
    ('fmnist', dict(base='ict', width=64, batch=128, beta=30.0, resolution=28)),
    ('cifar10', dict(base='ict', width=128, mults=[2, 2, 2], blocks=4, dropout=0.3, batch=512, steps=400_000, lr=1e-4,
                     beta=30.0)),
    ('cifar10 --base ecm', dict(base='ecm', dropout=0.2, batch=128, beta=10.0, c=0.0, huber='vector')),
    ('cifar10 --coupling independent', dict(clip=0.0)),
    ('ffhq64', dict(base='ecm', mults=[1, 2, 2, 2], beta=10.0, resolution=64)),
    ('imagenet64', dict(base='ecm', kernel='li', arch='edm2', width=192, encoder='big', beta=90.0, steps=200_000,
                        c=0.06, weighting='edm')),
    ('folder', dict(base='ict', resolution=None))])
def test_presets(capsys, dataset, expected):
    assert run('--dataset', *dataset.split(), '--dry-run') == 0
    settings = json.loads(capsys.readouterr().out)
    assert {name: settings[name] for name in expected} == expected
    assert len(vct.PRESETS) == 18
    assert len({frozenset(preset) for preset in vct.PRESETS.values()}) == 1 + 1         # shapes has eval_every


@pytest.mark.parametrize('base', ['ict', 'ecm'])
def test_analyse_draws_the_noise_and_prints_the_loss(base, capsys):
    assert run(*TINY, '--base', base) == 0
    capsys.readouterr()
    assert run('--analyse', 'runs/vct-shapes') == 0
    printed = capsys.readouterr().out.splitlines()
    said = [line for line in printed if not line.startswith('noise levels: ')]          # progress on a slow machine
    first, _, head, *rows, name = said
    assert first.startswith('KL ') and head.split() == ['sigma', 'emitted', 'independent', 'emitted', 'independent']
    table = np.array([row.split() for row in rows], float)
    assert table.shape == (9, 5) and (table > 0).all() and (np.diff(table[:, 0]) > 0).all() and table[-1, 0] == 80
    assert name == 'runs/vct-shapes/analyse.png' and Image.open(name).size == (8 * 66 + 2, 4 * 66 + 2)


def test_analyse_needs_an_encoder(refused):
    assert run(*TINY, '--coupling', 'independent') == 0
    refused(vct, '--analyse runs/vct-shapes', 'no encoder')


@pytest.mark.parametrize('base', ['ict', 'ecm'])
def test_analyse_prints_means_and_variances_over_the_noise(base, capsys):
    """Of the pairs of levels at the end of training, computed here once more."""
    assert run(*TINY, '--base', base, '--s1', 20, '--stages', 3, '--steps', 12) == 0
    model = vct.load('runs/vct-shapes')
    capsys.readouterr()
    assert run('--analyse', 'runs/vct-shapes') == 0
    table = np.array([line.split() for line in capsys.readouterr().out.splitlines()[-10:-1]], float)
    data, index = common.shapes(resolution=8), common.batch_indices(200, 64, 0, 0)
    x0, y = common.normalise(data.images[index]), data.labels[index]
    net, encoder = common.network(model, 'fp32'), common.network(model.encoder, 'fp32')
    high = vct.rho_levels(20)[1::2] + [80.0] if base == 'ict' else vct.rho_levels(9)[1:]
    for t in (high[-1], high[-2] if base == 'ecm' else vct.rho_levels(20)[18]):
        row, = [row for row in table if abs(row[0] / t - 1) < 1e-3]
        low = vct.rho_levels(20)[vct.rho_levels(20).index(t) - 1] if base == 'ict' else vct.lower_level(
            torch.tensor(t), 2).item()
        levels = torch.full((64,), t), torch.full((64,), low)
        draws = [common.randn(x0.shape, 0, i, 'analyse') for i in range(8)]
        args = argparse.Namespace(**model.config)
        for column, noise in ((1, [vct.emit(encoder, x0, n, y)[0] for n in draws]), (2, draws)):
            losses = torch.stack([vct.loss(net, x0, eps, *levels, y, **vct.loss_settings(args))[0] for eps in noise])
            close(row[[column, column + 2]], (losses.mean().item(), losses.var(0).mean().item()), rtol=2e-3)


# Fashion-MNIST

def idx(array):
    shape = b''.join(n.to_bytes(4, 'big') for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.astype(np.uint8).tobytes()


def fashion(folder, images=None, labels=None, pack=False):
    """Tiny idx files of 30 pictures, picture i grey level i, label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.arange(30)[:, None, None] * np.ones((1, 28, 28)) if images is None else images
    for name, array in [('images-idx3', images), ('labels-idx1', np.arange(30) % 10 if labels is None else labels)]:
        data = array if isinstance(array, bytes) else idx(array)
        (folder / f'train-{name}-ubyte{".gz" * pack}').write_bytes(gzip.compress(data) if pack else data)


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('place', ['.', 'fashion-mnist'])
def test_fmnist_is_found(tmp_path, place, pack):
    fashion(tmp_path / place, pack=pack)
    data = common.fmnist(tmp_path)
    assert data.images.shape == (30, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.images[7].unique().tolist() == [7]
    assert data.labels.tolist() == [i % 10 for i in range(30)] and data.classes == 10


def test_fmnist_is_downloaded_and_checked(tmp_path, monkeypatch):
    fashion(tmp_path / 'served', pack=True)
    monkeypatch.setattr(common, 'FMNIST_URL', (tmp_path / 'served').as_uri())
    with pytest.raises(common.UserError, match='train-images-idx3-ubyte.gz has md5'):
        common.fmnist(tmp_path / 'a')
    assert not (tmp_path / 'a').exists()
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted((tmp_path / 'served').iterdir())}
    monkeypatch.setattr(common, 'FMNIST_MD5', md5)
    assert len(common.fmnist(tmp_path / 'a').images) == 30
    assert sorted(path.name for path in (tmp_path / 'a/fashion-mnist').iterdir()) == sorted(md5)


def test_fmnist_that_is_damaged_or_not_to_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'FMNIST_URL', 'http://127.0.0.1:9')
    with pytest.raises(common.UserError, match='could not be downloaded'):
        common.fmnist(tmp_path / 'a')
    good = idx(np.zeros((30, 28, 28)))
    for images, labels in [
            (good[:-1], None), (good + b'x', None), (b'', None), (b'PNG' + good, None), (good, b''), (good, b'x' * 38),
            (idx(np.zeros((30, 28))), None), (good, np.zeros(29)), (good, np.full(30, 10)),
            (idx(np.zeros((30, 27, 28))), None), (idx(np.zeros((0, 28, 28))), np.zeros(0))]:
        fashion(tmp_path / 'c', images, labels)
        with pytest.raises(common.UserError, match='c is not Fashion-MNIST: damaged or cut short'):
            common.fmnist(tmp_path / 'c')
    fashion(tmp_path / 'd', pack=True)
    packed = tmp_path / 'd/train-images-idx3-ubyte.gz'
    for data in (packed.read_bytes()[:-20], b'no gzip', packed.read_bytes()[:40] + bytes(40)):
        packed.write_bytes(data)
        with pytest.raises(common.UserError, match='cannot be read'):
            common.fmnist(tmp_path / 'd')


def test_grey_pictures_train_sample_and_score(tmp_path, capsys, monkeypatch):
    fashion(tmp_path / 'data')
    grey = ['--dataset', 'fmnist', *TINY_NETWORK, *SCRIPTS['vct'], '--batch', 8, '--steps', 4, '--sample-every', 4,
            '--eval-every', 4, '--fid-num', 10, '--fid-features', 'pixels']
    assert run(*grey) == 0
    out = Path('runs/vct-fmnist')
    assert vct.sample(vct.load(out), 3, nfe=2).shape == (3, 1, 28, 28)
    assert run('--analyse', out) == run('--sample', out) == run('--evaluate', out, '--nfe', '1,2') == 0
    assert 'pixel-FD (10 images against the 30 training images), 2 steps: ' in capsys.readouterr().out
    assert Image.open(out / 'samples/0000004.png').size == (8 * 58 + 2, 8 * 58 + 2)
    assert run(*grey, '--cond', '--base', 'ecm', '--overwrite') == 0


@pytest.mark.assets
def test_real_fashion_mnist(real):
    data = common.fmnist(real('fashion-mnist').parent)
    assert data.images.shape == (60_000, 1, 28, 28) and data.labels.bincount().tolist() == [6000] * 10
    assert data.labels[:5].tolist() == [9, 0, 0, 3, 0]      # boot, T-shirt twice, dress, T-shirt
