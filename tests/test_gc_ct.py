"""gc_ct.py against the published code's numbers (`gc_losses.npz`: thibautissenhuth/consistency_GC; `ect_losses.npz`:
locuslab/ect), Gaussian data whose consistency function is known, and brute force."""
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import gc_ct
import unet
from conftest import Script

GC = np.load(Path(__file__).parent / 'data/gc_losses.npz')
ECT = np.load(Path(__file__).parent / 'data/ect_losses.npz')
STEPS = [0, 50_000, 99_999]
M = gc_ct.SIGMA_MIN
TINY = Script('gc_ct').small


def tensor(golden, name):
    return torch.from_numpy(golden[name])


def toy(scale):
    """The networks of the reference files: online with 0.1, moving average with 0.2."""
    return lambda x_in, c_noise, y=None: torch.tanh(x_in) * torch.cos(c_noise)[:, None, None, None] + scale * x_in


def close(a, b, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def levels(step):
    return torch.tensor(gc_ct.rho_levels(gc_ct.num_levels(step, 100_000) - 1))


# The published mathematics

def test_number_of_levels_is_the_published_one():
    assert [gc_ct.num_levels(int(k), 100_000) for k in GC['steps']] == GC['num_sigmas'].tolist()


@pytest.mark.parametrize('step', STEPS)
def test_pair_probabilities_are_the_published_ones(step):
    sigmas, p = gc_ct.level_table(len(levels(step)), -1.1, 2.0)
    assert torch.equal(sigmas, levels(step))
    close(p[:8], GC[f'{step}:pdf_first8'], atol=1e-7)
    assert abs(p.sum() - 1) < 1e-12 and len(p) == len(levels(step)) - 1


@pytest.mark.parametrize('step', STEPS)
def test_endpoints_are_the_published_ones(step):
    """For those who get one; the others keep their image."""
    index, chosen = tensor(GC, f'{step}:index'), tensor(GC, 'use_gc')
    x_hat = gc_ct.generator_coupling(toy(0.2), tensor(GC, 'x'), tensor(GC, 'z'), levels(step)[index], None, chosen, M)
    close(x_hat[chosen], GC[f'{step}:endpoint'][GC['use_gc']])
    assert torch.equal(x_hat[~chosen], tensor(GC, 'x')[~chosen])


@pytest.mark.parametrize('step', STEPS)
def test_loss_is_the_published_one(step):
    """Endpoints, distance and weight together, from the images and the draws."""
    i, sigmas = tensor(GC, f'{step}:index'), levels(step)
    t, r = sigmas[i + 1], sigmas[i]
    x_hat = gc_ct.generator_coupling(toy(0.2), tensor(GC, 'x'), tensor(GC, 'z'), r, None, tensor(GC, 'use_gc'), M)
    value = gc_ct.loss(toy(0.1), x_hat, tensor(GC, 'z'), t, r, c=0.00054, m=M)
    close(value, GC[f'{step}:weighted'], rtol=2e-4)
    close(value * (t - r), GC[f'{step}:distance'], rtol=2e-4)


def test_level_pairs_follow_the_probabilities():
    """A million draws, against the expected counts (five standard deviations); neighbours in the table."""
    sigmas, p = gc_ct.level_table(21, -1.1, 2.0)
    t, r = gc_ct.level_pair(common.rand((1_000_000,), 'u'), sigmas, p)
    i = torch.searchsorted(sigmas, r)
    assert torch.equal(sigmas[i], r) and torch.equal(sigmas[i + 1], t)
    assert ((i.bincount(minlength=20) - 1e6 * p).abs() < 5 * (1e6 * p).sqrt() + 1).all()
    t, r = gc_ct.level_pair(torch.tensor([0.0, 1.0]), sigmas, p)                # the ends of the unit interval
    close(torch.stack([t, r]), [[sigmas[1], 80], [sigmas[0], sigmas[-2]]])


@pytest.mark.parametrize('name', [name for name in ECT.files if name.startswith('r_q')])
def test_ects_lower_level(name):
    q, k, b, stage = (float(part.lstrip('qkbstage')) for part in name.split('_')[1:])
    close(gc_ct.lower_level(tensor(ECT, 't'), stage, q, k, b), ECT[name])


@pytest.mark.parametrize('stage', [0, 3, 7])
def test_ects_loss(stage):
    name = f'loss_c0.0_stage{stage}'
    t = gc_ct.upper_level(tensor(ECT, f'{name}:randn_t'), -1.1, 2.0)
    close(gc_ct.loss(toy(0.1), tensor(ECT, 'x'), tensor(ECT, f'{name}:eps'), t, gc_ct.lower_level(t, stage)), ECT[name])


def test_generated_endpoints_at_level_zero_are_the_images():
    """ECT's r = 0, where the network is not defined: no NaN either."""
    x0, z, r = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.0, 0.5, 0.0])
    x_hat = gc_ct.generator_coupling(toy(0.1), x0, z, r, None, torch.ones(3, dtype=torch.bool))
    assert torch.equal(x_hat[[0, 2]], x0[[0, 2]]) and x_hat.isfinite().all() and not torch.equal(x_hat[1], x0[1])


def test_boundary_condition():
    x, t = torch.randn(3, 3, 4, 4), torch.tensor([0.002, 1.0, 80.0])
    torch.testing.assert_close(gc_ct.f(toy(0.1), x, t, m=M)[0], x[0])
    near = gc_ct.f(toy(0.1), x, torch.full((3,), 1e-6))
    torch.testing.assert_close(near, x, rtol=0, atol=1e-4)


def test_denoising_loss():
    x0, z, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.5, 3.0])
    u = gc_ct.f(toy(0.1), x0 + t[:, None, None, None] * z, t) - x0
    close(gc_ct.denoising_loss(toy(0.1), x0, z, t), (t ** 2 + 0.25) / (0.5 * t) ** 2 * u.square().mean((1, 2, 3)))


def test_gradients_stop_at_teacher_and_endpoint_and_masks_are_alike():
    seen, scale = [], torch.ones((), requires_grad=True)

    def net(x, c_noise, y):
        seen.append((torch.is_grad_enabled(), torch.rand(1).item()))
        return x * scale
    x, t = torch.randn(4, 1, 2, 2), torch.ones(4)
    assert not gc_ct.generator_coupling(net, x, x, t, None, torch.ones(4, dtype=torch.bool)).requires_grad
    gc_ct.loss(net, x, x, t, t / 2, mask=5).sum().backward()
    assert [grad for grad, _ in seen] == [False, True, False] and seen[1][1] == seen[2][1]
    before, scale.grad = scale.grad.clone(), None
    fixed = lambda x, c_noise, y: x * 1.0           # a teacher of its own: the same values, no gradient
    gc_ct.loss(net, x, x, t, t / 2, mask=5, teacher=fixed).sum().backward()
    assert torch.equal(before, scale.grad) and before != 0


@pytest.mark.parametrize('t', [0.1, 2.0, 80.0])
def test_the_direction_in_the_diagnostics_is_exact(t):
    """Against float64 distances, with and without classes."""
    data = common.shapes(300, 8)
    images, z = common.normalise(data.images), common.randn((16, 3, 8, 8), 'n')
    x_t = (images[:16] + t * z).double().flatten(1)
    for labels in (torch.zeros(300), data.labels):
        logits = -torch.cdist(x_t, images.double().flatten(1)).square() / (2 * t ** 2)
        mean = logits.masked_fill(labels[:16, None] != labels, -torch.inf).softmax(1) @ images.double().flatten(1)
        expected = (z.flatten(1) - (x_t - mean) / t).square().mean()
        results = gc_ct.diagnostics(toy(0.1), images[:16], z, labels[:16], images, labels, t)
        assert abs(results['IC'][1] - expected) < 1e-4 * expected + 1e-8


def test_decay_of_the_moving_average():
    early = [(step, 1 - (step + 1) ** (-2 / 3)) for step in (5, 50, 5000)]
    for step, decay in [(0, 0.0), *early, (1_000_000, 0.9999)]:
        assert abs(gc_ct.ema_warmup(step, 0.9999) - decay) < 1e-12


# Couplings

def test_assignment_is_optimal():
    pytest.importorskip('scipy')
    for seed in range(5):
        x0, z = common.randn((6, 3, 2, 2), seed, 'x'), common.randn((6, 3, 2, 2), seed, 'z')
        cost = lambda order: (x0[list(order)] - 80 * z).square().sum().item()
        best = min(itertools.permutations(range(6)), key=cost)
        assert common.optimal_transport(x0, z).tolist() == list(best)


def test_without_scipy_one_line_says_what_to_install(monkeypatch, refused):
    import sys
    monkeypatch.setitem(sys.modules, 'scipy.optimize', None)
    refused(gc_ct, '--coupling ot --out x', 'pip install scipy')


def exact(x_in, c_noise, y=None):
    """F of the exact consistency function x / sqrt(1 + t²) of N(0, 1), with f(x, 0) = x."""
    t = (4 * c_noise).exp()[:, None, None, None]
    x = x_in * (0.25 + t ** 2).sqrt()
    return (x / (1 + t ** 2).sqrt() - 0.25 / (t ** 2 + 0.25) * x) / (0.5 * t / (t ** 2 + 0.25).sqrt())


def test_generated_pairs_are_nearer_than_independent_ones():
    """The paper's theorem in numbers. For N(0, 1) and the exact endpoint,
    E|x_hat - z|² = 2 - 2 sigma / sqrt(1 + sigma²).
    """
    x0, z, chosen = torch.randn(100_000, 1, 1, 1), torch.randn(100_000, 1, 1, 1), torch.ones(100_000, dtype=torch.bool)
    before = 2.0
    for sigma in gc_ct.rho_levels(10)[1:]:
        x_hat = gc_ct.generator_coupling(exact, x0, z, torch.full((100_000,), sigma), None, chosen)
        ic, gc = (x0 - z).square().mean().item(), (x_hat - z).square().mean().item()
        assert gc < ic and gc <= before + 0.01
        assert abs(gc - (2 - 2 * sigma / math.sqrt(1 + sigma ** 2))) < 0.03
        assert abs(x_hat.square().mean() - 1) < 0.03            # and the endpoints are distributed as the data
        before = gc


def test_diagnostics_on_a_data_set_of_two_points():
    """Images -1 and 1: E[x0 | x_t] = tanh(x_t / t²), and all is known in closed form."""
    images = torch.tensor([-1.0, 1.0])[:, None, None, None]
    x0 = torch.tensor([-1.0, 1.0, 1.0])[:, None, None, None]
    z = torch.tensor([0.5, -0.2, 1.5])[:, None, None, None]
    sigma, order = 0.7, torch.tensor([1, 0, 2])
    net = lambda x, c, y=None: torch.zeros_like(x)                              # x_hat = c_skip x
    results = gc_ct.diagnostics(net, x0, z, torch.zeros(3), images, torch.zeros(2), sigma, 0.0, order)
    x_hat = 0.25 / (sigma ** 2 + 0.25) * (x0 + sigma * z)
    for name, x in (('IC', x0), ('OT', x0[order]), ('GC', x_hat)):
        x_t = x + sigma * z
        v = (x_t - torch.tanh(x_t / sigma ** 2)) / sigma
        close(results[name], [(x - z).square().mean(), (z - v).square().mean()])
    labels, y = torch.tensor([0, 1]), torch.tensor([0, 1, 1])       # a class has one image: its direction is z itself
    assert gc_ct.diagnostics(net, x0, z, y, images, labels, sigma)['IC'][1] < 1e-10


def test_transport_in_the_diagnostics_moves_labels_with_their_images():
    """Each class has one image, so that every pair's direction is its noise, whichever image the noise goes with."""
    images = torch.tensor([-1.0, 1.0])[:, None, None, None]
    z, labels, order = torch.tensor([0.5, -0.2])[:, None, None, None], torch.tensor([0, 1]), torch.tensor([1, 0])
    net = lambda x, c, y=None: torch.zeros_like(x)
    results = gc_ct.diagnostics(net, images, z, labels, images, labels, 0.7, 0.0, order)
    close(results['OT'][0], (images[order] - z).square().mean())
    assert results['OT'][1] < 1e-10


# Lion

def test_lion_is_its_five_lines():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    theirs, momenta = [p.detach().clone() for p in ours], [torch.zeros_like(p) for p in ours]
    optimizer = gc_ct.Lion(ours, lr=0.01, betas=(0.9, 0.99))
    for step in range(20):
        if step == 10:                                                          # saved and brought back
            state = optimizer.state_dict()
            optimizer = gc_ct.Lion(ours, lr=1.0, betas=(0.5, 0.5))
            optimizer.load_state_dict(state)
        for i, p in enumerate(ours):
            p.grad = torch.randn_like(p)
            theirs[i] -= 0.01 * torch.sign(0.9 * momenta[i] + 0.1 * p.grad)
            momenta[i] = momenta[i].lerp(p.grad, 1 - 0.99)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# Oracle

@pytest.mark.parametrize('mu, numbers', [(0.0, 1), (0.5, 768)])
def test_training_approaches_the_exact_consistency_function(mu, numbers):
    """N(0, I) data, a small network, this script's own pairs, endpoints and loss: f -> x / sqrt(1 + t²).

    Error bound: 5 % of the data's deviation, root mean square over x_t and over t from 0.02 to 80. Generated pairs have
    a flow of their own, which a network must tell from that of the data: in 768 numbers it can, by |x|; in one it
    cannot (13 %).
    """
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                 torch.nn.Linear(64, 1))

    def net(x_in, c_noise, y=None):
        c, size = c_noise[:, None], 4 * (x_in.flatten(1).square().mean(1, keepdim=True).sqrt() - 1)
        return x_in * (1 + layers(torch.cat([size, c, c.square()], 1)))[:, :, None, None]
    n = 256 if numbers == 1 else 128                                            # many numbers an image: fewer will do
    steps, optimizer = 2000, torch.optim.Adam(layers.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        x0, z = (common.randn((n, 1, 1, numbers), step, stream) for stream in 'xz')
        table = gc_ct.level_table(gc_ct.num_levels(step, steps, 10, 160), 0.5, 2.0)
        t, r = gc_ct.level_pair(common.rand((n,), step, 't'), *table)
        x_hat = gc_ct.generator_coupling(net, x0, z, r, None, common.rand((n,), step, 'mix') < mu, M)
        optimizer.zero_grad()
        gc_ct.loss(net, x_hat, z, t, r, c=0.00054, m=M).mean().backward()
        optimizer.step()
        schedule.step()
    t = torch.logspace(math.log10(0.02), math.log10(80), 40).repeat_interleave(max(100, 20_000 // numbers))
    x = (1 + t ** 2).sqrt()[:, None, None, None] * torch.randn(len(t), 1, 1, numbers)
    with torch.no_grad():
        error = gc_ct.f(net, x, t, m=M) - x / (1 + t ** 2).sqrt()[:, None, None, None]
    assert error.square().mean().sqrt() < 0.05, error.square().mean().sqrt()


def test_repeated_endpoints_that_fill_a_batch_are_not_written(monkeypatch):
    """On a GPU the batch of endpoints is filled up to 16s; a repeated one may have another dropout mask."""
    x0, z, r = torch.randn(20, 1, 2, 2), torch.randn(20, 1, 2, 2), torch.rand(20)
    chosen, sizes = torch.arange(20) % 7 == 2, []                               # 3 of them
    net = lambda x, c, y=None: (sizes.append(len(x)), x + torch.arange(len(x))[:, None, None, None])[1]
    plain = gc_ct.generator_coupling(net, x0, z, r, None, chosen)
    monkeypatch.setattr(torch.Tensor, 'is_cuda', property(lambda x: True), raising=False)
    assert torch.equal(gc_ct.generator_coupling(net, x0, z, r, None, chosen), plain) and sizes == [3, 16]


# Runs

def run(*flags):
    return common.run(gc_ct.main, [str(flag) for flag in flags])


def weights(out):
    return torch.load(f'{out}/final.pt', weights_only=True)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))


def settings(capsys, *flags):
    assert run(*flags, '--dry-run') == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    draw = common.shapes
    monkeypatch.setattr(common, 'shapes', lambda n=200, resolution=16: draw(n, resolution))


@pytest.mark.parametrize('flags', [
    ['--no-cond'], ['--coupling', 'ic'], ['--coupling', 'ot'], ['--endpoint', 'online'],
    ['--schedule', 'ect', '--pretrain-steps', 2], ['--mults', '1,1,2', '--dropout', '0.2,0,0', '--blocks', '1,2,1'],
    ['--schedule', 'ect', '--pretrain-steps', 0, '--coupling', 'ic', '--precision', 'bf16']])
def test_every_way_to_train(flags):
    if 'ot' in flags:
        pytest.importorskip('scipy')
    assert run(*TINY, '--sample-every', 4, '--eval-every', 4, '--fid-num', 10, *flags) == 0
    lines = [json.loads(line) for line in Path('runs/gc_ct-shapes/metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4]
    assert all(math.isfinite(line.get('loss', 0)) for line in lines)
    assert any(name.startswith('pixel-FD (10 images') for name in lines[-1])


def test_without_generated_endpoints_gc_is_ict_bit_for_bit():
    for out, flags in [('gc', ['--mu', 0]), ('ic', ['--coupling', 'ic']), ('half', [])]:
        assert run(*TINY, *flags, '--out', out) == 0
    assert same('gc', 'ic') and not same('gc', 'half')


@pytest.mark.parametrize('endpoint', ['ema', 'online'])
def test_the_pairs_that_a_run_trains_on(monkeypatch, endpoint):
    """Images, noise, levels and endpoints, as the loop hands them to the loss; mu = 1 uses generated endpoints only."""
    seen, asked = [], []
    plain_loss, plain_coupling = gc_ct.loss, gc_ct.generator_coupling
    monkeypatch.setattr(gc_ct, 'generator_coupling', lambda net, *rest: (
        asked.append((net, rest)), plain_coupling(net, *rest))[1])
    monkeypatch.setattr(gc_ct, 'loss', lambda net, x0, z, t, r, *rest: (
        seen.append((x0, z, t, r)), plain_loss(net, x0, z, t, r, *rest))[1])
    assert run(*TINY, '--batch', 64, '--steps', 3, '--mu', 1, '--endpoint', endpoint, '--no-cond', '--lr', 0) == 0
    data, net = common.shapes(resolution=8), asked[0][0]
    assert len({id(call[0]) for call in asked}) == 1
    for step, (x_hat, z, t, r) in enumerate(seen):
        index = common.batch_indices(200, 64, step, 0)
        assert torch.equal(z, common.randn((64, 3, 8, 8), 0, step, 'noise'))
        x0 = common.normalise(data.images[index])
        assert not (x_hat == x0).flatten(1).all(1).any()
        with torch.no_grad():
            endpoint = gc_ct.f(net, x0 + r[:, None, None, None] * z, r, None, M)
        torch.testing.assert_close(x_hat, endpoint, rtol=1e-4, atol=1e-5)
        sigmas = torch.tensor(gc_ct.rho_levels(gc_ct.num_levels(step, 3, 10, 80) - 1))
        u = common.rand((64,), 0, step, 'level')
        cumulated = gc_ct.level_table(len(sigmas), -1.1, 2.0)[1].cumsum(0).float()
        i = torch.searchsorted(cumulated, u, right=True).clamp(max=len(sigmas) - 2)
        assert torch.equal(t, sigmas[i + 1]) and torch.equal(r, sigmas[i])
        assert asked[step][1][4].all()
    before = asked[0][1]
    assert run(*TINY, '--batch', 64, '--steps', 1, '--mu', 0.5, '--no-cond', '--out', 'half') == 0
    assert torch.equal(asked[-1][1][4], common.rand((64,), 0, 0, 'mix') < 0.5) and before is not None


def test_labels_reach_student_teacher_and_endpoint(monkeypatch):
    seen, plain = [], common.network

    def network(net, precision):
        call = plain(net, precision)
        return lambda x, c, y=None: (seen.append((torch.is_grad_enabled(), y)), call(x, c, y))[1]
    monkeypatch.setattr(common, 'network', network)
    assert run(*TINY, '--schedule', 'ect', '--steps', 2, '--pretrain-steps', 1, '--mu', 1) == 0
    first, second = (torch.arange(200)[common.batch_indices(200, 8, step, 0)] % 10 for step in (0, 1))
    assert [grad for grad, _ in seen[:4]] == [True, False, True, False]         # denoiser; endpoint, student, teacher
    assert all(map(torch.equal, [y for _, y in seen[:4]], (first, second, second, second)))


@pytest.mark.parametrize('schedule, boundary', [('ict', M), ('ect', 0.0)])
def test_the_settings_of_a_run_reach_gap_and_loss(schedule, boundary, monkeypatch):
    """q, k and b of the gap, P_mean and P_std of the levels, c and the boundary of the loss and of the endpoints."""
    ours = dict(P_mean=-0.5, P_std=1.5, c=0.03) | (dict(q=3.0, k=4.0, b=2.0) if schedule == 'ect' else {})
    key = ('shapes', 'ect') if schedule == 'ect' else 'shapes'
    monkeypatch.setitem(gc_ct.PRESETS, key, gc_ct.PRESETS[key] | ours)
    seen, bounds, plain, coupling = [], [], gc_ct.loss, gc_ct.generator_coupling
    monkeypatch.setattr(gc_ct, 'generator_coupling', lambda *inputs: (bounds.append(inputs[6]), coupling(*inputs))[1])
    monkeypatch.setattr(gc_ct, 'loss', lambda net, x0, z, t, r, y, teacher, mask, c, m: (
        seen.append((t, r, c, m)), plain(net, x0, z, t, r, y, teacher, mask, c, m))[1])
    assert run(*TINY, '--schedule', schedule, '--pretrain-steps', 0, '--steps', 1) == 0
    t, r, c, m = seen[0]
    assert (c, m) == (0.03, boundary) and bounds == [boundary]
    if schedule == 'ect':
        assert torch.equal(t, gc_ct.upper_level(common.randn((8,), 0, 0, 'level'), -0.5, 1.5))
        assert torch.equal(r, gc_ct.lower_level(t, 0, 3.0, 4.0, 2.0)) and (r > 0).any()
    else:
        table = gc_ct.level_table(gc_ct.num_levels(0, 1, 10, 80), -0.5, 1.5)
        assert all(map(torch.equal, (t, r), gc_ct.level_pair(common.rand((8,), 0, 0, 'level'), *table)))


@pytest.mark.parametrize('coupling', ['gc', 'ot'])
def test_pretraining_has_edms_levels_and_independent_pairs(coupling, monkeypatch):
    if coupling == 'ot':
        pytest.importorskip('scipy')
    seen, plain = [], gc_ct.denoising_loss
    monkeypatch.setattr(gc_ct, 'denoising_loss', lambda net, x0, z, t, *rest: (
        seen.append((x0, z, t)), plain(net, x0, z, t, *rest))[1])
    assert run(*TINY, '--schedule', 'ect', '--coupling', coupling, '--pretrain-steps', 4) == 0
    data = common.shapes(resolution=8)
    for step, (x0, z, t) in enumerate(seen):
        assert torch.equal(x0, common.normalise(data.images[common.batch_indices(200, 8, step, 0)]))
        assert torch.equal(z, common.randn((8, 3, 8, 8), 0, step, 'noise'))
        assert torch.equal(t, gc_ct.upper_level(common.randn((8,), 0, step, 'level'), -1.2, 1.2))
    assert len(seen) == 4


def test_the_levels_of_tuning(monkeypatch):
    """ECT's pairs, stage by stage, after the steps of the diffusion model, which have no pairs."""
    seen, plain = [], gc_ct.loss
    monkeypatch.setattr(gc_ct, 'loss', lambda net, x0, z, t, r, *rest: (
        seen.append((t, r)), plain(net, x0, z, t, r, *rest))[1])
    assert run(*TINY, '--schedule', 'ect', '--pretrain-steps', 2, '--steps', 6, '--stages', 4) == 0
    assert len(seen) == 4
    for stage, (t, r) in enumerate(seen):
        assert torch.equal(t, gc_ct.upper_level(common.randn((8,), 0, stage + 2, 'level'), -1.1, 2.0))
        assert torch.equal(r, gc_ct.lower_level(t, stage))


def test_when_and_how_the_moving_average_follows(monkeypatch):
    """Every so many steps, from the copy at first; and from the diffusion model's average when tuning begins."""
    decays, plain = [], common.update_ema
    monkeypatch.setattr(common, 'update_ema', lambda ema, net, decay: (decays.append(decay), plain(ema, net, decay))[1])
    assert run(*TINY, '--steps', 7, '--ema-every', 3, '--ema', 0.65) == 0
    close(decays, [0, 1 - 4 ** (-2 / 3), 0.65])
    decays.clear()
    assert run(*TINY, '--steps', 5, '--pretrain-steps', 2, '--schedule', 'ect', '--overwrite') == 0
    close(decays, [1 - (1 + u) ** (-2 / 3) for u in (0, 1, 0, 1, 2)])


def test_tuning_starts_from_the_average_of_the_diffusion_model(monkeypatch):
    seen, plain = [], common.update_ema
    monkeypatch.setattr(common, 'update_ema', lambda ema, net, decay: (seen.append(
        [{k: v.clone() for k, v in module.state_dict().items()} for module in (ema, net)]), plain(ema, net, decay))[1])
    assert run(*TINY, '--steps', 4, '--pretrain-steps', 3, '--schedule', 'ect', '--lr', 0.01, '--ema', 0.9) == 0
    (ema, net), name = seen[3], 'map_layer0.weight'                             # before the first update of tuning
    assert (net[name] - ema[name]).abs().max() < 0.0101                       # one step of Adam away


def test_endpoint_network_is_the_average_or_the_online_one(monkeypatch):
    """After training with a rate the two differ; each run must ask its own. The average has no dropout."""
    for endpoint in ('ema', 'online'):
        networks, plain = [], common.network
        monkeypatch.setattr(common, 'network', lambda net, *rest: (networks.append(net), plain(net, *rest))[1])
        assert run(*TINY, '--endpoint', endpoint, '--out', endpoint, '--sample-every', 100, '--dropout', 0.1) == 0
        monkeypatch.setattr(common, 'network', plain)
        student, teacher, asked = networks[:3]
        assert (asked is student) == (endpoint == 'online') and asked.training == (endpoint == 'online')
    assert not same('ema', 'online')


def test_the_online_endpoints_dropout_is_named_too(monkeypatch):
    """Whatever random numbers were drawn between steps, as in a resumed run: the run is the same."""
    rate = common.learning_rate
    for out in (1, 2):
        monkeypatch.setattr(common, 'learning_rate', lambda *inputs: (torch.manual_seed(out), rate(*inputs)))
        assert run(*TINY, '--endpoint', 'online', '--dropout', 0.5, '--mu', 1, '--lr', 0.01, '--out', out) == 0
    assert same('1', '2')


def test_transport_moves_labels_with_their_images(monkeypatch):
    pytest.importorskip('scipy')
    seen, plain = [], gc_ct.loss
    monkeypatch.setattr(gc_ct, 'loss', lambda net, x0, z, t, r, y, *rest: (
        seen.append((x0, z, y)), plain(net, x0, z, t, r, y, *rest))[1])
    assert run(*TINY, '--batch', 32, '--steps', 1, '--coupling', 'ot') == 0
    x0, z, y = seen[0]
    data, index = common.shapes(resolution=8), common.batch_indices(200, 32, 0, 0)
    label = {tuple(common.normalise(data.images[i]).flatten().tolist()): int(data.labels[i]) for i in index}
    assert [label[tuple(x.flatten().tolist())] for x in x0] == y.tolist()
    plain_cost = (common.normalise(data.images[index]) - z).square().sum()
    assert (x0 - z).square().sum() < plain_cost


def test_settings_that_depend_on_coupling_and_schedule(capsys):
    plain = settings(capsys, '--dataset', 'cifar10')
    assert (plain['dropout'], plain['mu']) == (0, 0.5)
    assert settings(capsys, '--dataset', 'cifar10', '--coupling', 'ic')['dropout'] == 0.3
    assert settings(capsys, '--dataset', 'cifar10', '--coupling', 'ic', '--dropout', 0.1)['dropout'] == 0.1
    tuning = settings(capsys, '--dataset', 'cifar10', '--schedule', 'ect')
    expected = dict(mu=0.3, optimizer='RAdam', c=0, init=unet.URLS['cifar10'], batch=128)
    assert {name: tuning[name] for name in expected} == expected
    assert settings(capsys, '--dataset', 'cifar10', '--schedule', 'ect', '--pretrain-steps', 5)['init'] == 'none'
    assert settings(capsys, '--dataset', 'imagenet32')['blocks'] == [3, 5, 7]
    for name in gc_ct.PRESETS:
        if isinstance(name, str):
            assert settings(capsys, '--dataset', name, '--schedule', 'ect')['q'] == 2
            assert settings(capsys, '--dataset', name)['s1'] > 10


def test_sampling_takes_levels_downwards_with_fresh_noise():
    assert run(*TINY) == 0
    model = gc_ct.load('runs/gc_ct-shapes')
    net, y = common.network(model, 'fp32'), torch.arange(12) % 10
    z = [common.randn((12, 3, 8, 8), 3, i, 'sample') for i in range(3)]
    x = gc_ct.f(net, 80 * z[0], torch.full((12,), 80.0), y, M)
    torch.testing.assert_close(gc_ct.sample(model, 12, seed=3), x.clamp(-1, 1))
    two = gc_ct.f(net, x + 0.821 * z[1], torch.full((12,), 0.821), y, M)
    torch.testing.assert_close(gc_ct.sample(model, 12, 2, seed=3), two.clamp(-1, 1))
    for level, noise in zip(gc_ct.rho_levels(3)[2:0:-1], z[1:]):
        x = gc_ct.f(net, x + level * noise, torch.full((12,), level), y, M)
    torch.testing.assert_close(gc_ct.sample(model, 12, 3, seed=3), x.clamp(-1, 1))


def test_analysis_prints_and_draws(capsys):
    assert run(*TINY) == 0 and run('--analyse', 'runs/gc_ct-shapes') == 0
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines() if line[:8].strip().replace('.', '').replace('e-', '').isdigit()]
    assert len(table) == 24 and float(table[11][0]) == float(table[-1][0]) == 80
    assert all(math.isfinite(float(value)) for row in table for value in row)
    assert Path('runs/gc_ct-shapes/analyse.png').stat().st_size > 5000


@pytest.mark.parametrize('schedule, boundary', [('ict', M), ('ect', 0.0)])
def test_analysis_has_the_boundary_of_training(schedule, boundary, monkeypatch):
    seen, plain = [], gc_ct.f
    assert run(*TINY, '--schedule', schedule, '--pretrain-steps', 0) == 0
    monkeypatch.setattr(gc_ct, 'f', lambda net, x, t, y=None, m=0.0: seen.append(m) or plain(net, x, t, y, m))
    assert run('--analyse', 'runs/gc_ct-shapes') == 0
    assert set(seen) == {boundary}


def test_analysis_prints_means_over_lots_with_noise_of_their_own(monkeypatch, capsys):
    """Of cost and regulariser, each in its own table."""
    noise = []

    def diagnostics(net, x0, z, y, images, labels, sigma, *rest):
        noise.append(z)
        lot = (len(noise) - 1) % 8                                              # 512 images are 8 lots
        return {'IC': (10 * sigma + lot, 20 * sigma + lot)}
    assert run(*TINY) == 0
    monkeypatch.setattr(gc_ct, 'diagnostics', diagnostics)
    capsys.readouterr()
    assert run('--analyse', 'runs/gc_ct-shapes') == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:8].strip()[:1].isdigit()]
    sigmas = np.array(gc_ct.rho_levels(12)[1:])
    close([float(value) for _, value in rows], [*(10 * sigmas + 3.5), *(20 * sigmas + 3.5)])
    assert len(noise) == 8 * 12 and all(not torch.equal(noise[0], z) for z in noise[1:8])
    assert all(map(torch.equal, noise[:8], noise[8:16]))                        # the same at every level


def test_wrong_flags_of_gc(refused):
    refused(gc_ct, '--mu 1.5', '--mu')
    refused(gc_ct, '--schedule ect --q 1e300', '--q 1e+300', 'float32')
    refused(gc_ct, '--s0 20 --s1 10', '--s1 10', '--s0 20')
    assert run('--q', 2, '--dry-run') == 0                  # of no use with iCT's levels, and no harm
    refused(gc_ct, '--blocks 1,2', 'num_blocks [1, 2]', 'one each of 3')
    refused(gc_ct, '--coupling none', '--coupling')
    assert run(*TINY) == 0
    refused(gc_ct, '--resume --mu 0.7', '--mu is 0.7', 'made with 0.3')
    refused(gc_ct, '--resume --coupling ic', '--coupling is ic')
    refused(gc_ct, '--analyse nowhere', 'nowhere')


@pytest.mark.assets
def test_cifar10_trains_and_scores(real, capsys):
    data = real('cifar-10-batches-bin').parent
    cifar = ['--dataset', 'cifar10', '--data-dir', data]
    assert run(*cifar, '--width', 16, '--blocks', 1, '--batch', 16, '--steps', 4) == 0
    assert run('--evaluate', 'runs/gc_ct-cifar10', '--data-dir', data, '--fid-num', 20, '--fid-features', 'pixels') == 0
    assert 'against the 50,000 training images' in capsys.readouterr().out
