"""sct.py against ECT's published losses (`ect_losses.npz`), the published estimator of the posterior mean
(`stf_targets.npz`: Newbeeer/stf), and data whose exact consistency function is known."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import sct
import unet
from conftest import Script, all_shapes

ECT = np.load(Path(__file__).parent / 'data/ect_losses.npz')
STF = np.load(Path(__file__).parent / 'data/stf_targets.npz')
TINY = Script('sct').small
CPU = torch.device('cpu')


def tensor(golden, name):
    return torch.from_numpy(golden[name])


def toy(x_in, c_noise, y=None):
    """The network of `ect_losses.npz`."""
    return torch.tanh(x_in) * torch.cos(c_noise)[:, None, None, None] + 0.1 * x_in


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


# The published mathematics

@pytest.mark.parametrize('name', [name for name in ECT.files if name.startswith('r_q')])
def test_lower_level_is_ects(name):
    q, k, b, stage = (float(part.lstrip('qkbstage')) for part in name.split('_')[1:])
    close(sct.lower_level(tensor(ECT, 't'), stage, q, k, b), ECT[name])


@pytest.mark.parametrize('c', [0.0, 0.03])
@pytest.mark.parametrize('stage', [0, 3, 7])
def test_loss_is_ects(c, stage):
    x0 = tensor(ECT, 'x')
    name = f'loss_c{c}_stage{stage}'
    t = sct.upper_level(tensor(ECT, f'{name}:randn_t'), -1.1, 2.0)
    eps = tensor(ECT, f'{name}:eps')
    x_t = x0 + t[:, None, None, None] * eps
    close(sct.loss(toy, x_t, t, x0, eps, sct.lower_level(t, stage), c=c), ECT[name])


def test_posterior_mean_is_the_published_estimator():
    close(sct.posterior_mean(tensor(STF, 'x_t'), tensor(STF, 't'), tensor(STF, 'ref')), STF['x0_hat'])


def exact_mean(x_t, t, refs, allowed=None):
    x, c = x_t.double().flatten(1), refs.double().flatten(1)
    logits = -torch.cdist(x, c, compute_mode='donot_use_mm_for_euclid_dist').square() / (2 * t.double()[:, None] ** 2)
    if allowed is not None:
        logits[~allowed] = -torch.inf
    return (logits.softmax(1) @ c).view_as(x_t)


@pytest.mark.parametrize('t', [0.002, 0.02, 0.1, 0.5, 2.0, 10.0, 80.0])
@pytest.mark.parametrize('labelled', [False, True])
def test_posterior_mean_over_all_data_is_exact(t, labelled, monkeypatch):
    """In chunks, from uint8, with near twins one grey level apart, against float64; perhaps with mirror images."""
    data = common.shapes(500, 8)
    data.images[1] = data.images[0]
    data.images[1, 0, 0, 0] ^= 1
    x0 = common.normalise(data.images[:16])
    x_t = x0 + t * common.randn(x0.shape, 'noise', t)
    level, own, refs = torch.full((16,), t), torch.arange(16), common.normalise(data.images)
    allowed = data.labels[:16, None] == data.labels if labelled else torch.ones(16, 500, dtype=torch.bool)
    data = data if labelled else data._replace(labels=torch.zeros_like(data.labels))
    members = sct.class_members(data)
    whole = sct.posterior_mean_of_all(x_t, level, own, data, members)
    torch.testing.assert_close(whole.double(), exact_mean(x_t, level, refs, allowed), rtol=0, atol=1e-4)
    torch.testing.assert_close(sct.posterior_mean(x_t, level, refs, allowed), whole, rtol=0, atol=1e-4)
    pieces, at = [], common.Data.at
    monkeypatch.setattr(common.Data, 'at', lambda data, index, device: (pieces.append(index), at(data, index, device))[1])
    monkeypatch.setattr(sct, 'CHUNK', 7 * 192)          # 7 images at a time
    torch.testing.assert_close(sct.posterior_mean_of_all(x_t, level, own, data, members), whole, rtol=0, atol=1e-4)
    assert max(map(len, pieces)) <= 7 and sorted(torch.cat(pieces).tolist()) == list(range(500))
    mirrored = sct.posterior_mean_of_all(x_t, level, own, data, members, flip=True)
    both = exact_mean(x_t, level, torch.cat([refs, refs.flip(3)]), torch.cat([allowed, allowed], 1))
    torch.testing.assert_close(mirrored.double(), both, rtol=0, atol=1e-4)


def test_one_reference_is_ect_bit_for_bit(monkeypatch):
    """What a run of `--ref-size 1` hands to its loss, and the loss, are ECT's."""
    seen, plain = [], sct.loss
    monkeypatch.setattr(sct, 'loss', lambda net, x_t, t, x0, eps, r, y, teacher, mask, *rest: (
        seen.append((x_t, t, x0, eps, r)), plain(net, x_t, t, x0, eps, r, y, teacher, mask, *rest))[1])
    assert run(*TINY, '--ref-size', '1', '--steps', 1) == 0
    x_t, t, x0, eps, r = seen[0]
    assert torch.equal(x0, common.normalise(common.shapes(200, 8).images[common.batch_indices(200, 8, 0, 0)]))
    assert torch.equal(eps, common.randn((8, 3, 8, 8), 0, 0, 'noise'))
    r = sct.lower_level(t, 3)

    def ects(x0, t, r, eps):        # ECT's loss as its paper writes it, in its order of operations
        student = sct.f(toy, x0 + t[:, None, None, None] * eps, t)
        target = sct.f(toy, x0 + r[:, None, None, None] * eps, r.clamp(min=1e-9))
        target[r == 0] = x0[r == 0]
        return torch.linalg.vector_norm((student - target).flatten(1), dim=1) * (1 / (t - r))
    assert torch.equal(plain(toy, x_t, t, x0, eps, r), ects(x0, t, r, eps))


def fake_data(n=40, labels=4):
    images = torch.randint(0, 256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return common.Data(images, torch.arange(n) % max(labels, 1), labels, None)


@pytest.mark.parametrize('n, labels', [(8, 100), (6, 0), (50, 100)])
def test_drawn_references_are_n_of_the_samples_class(n, labels):
    """x0 among them; with fewer in a class all of those. The posterior mean is that over them, by brute force."""
    data = fake_data(1600, labels)                                              # 16 of each class
    own = torch.tensor([3, 8, 103, 203, 8 + 1500, 5, 6, 7])
    members = sct.class_members(data)
    assert [len(part) for part in members] == ([16] * 100 if labels else [1600])
    index, allowed = sct.draw_references(n, own, data, members, 7, 'step')
    x0, refs = data.at(own, CPU)[0], data.at(index, CPU)[0]
    t, whose = torch.linspace(0.5, 40, 8), []
    x_t = x0 + t[:, None, None, None] * common.randn(x0.shape, 'noise')
    for i in range(8):
        used = [*index[allowed[i]].tolist(), int(own[i])]
        assert len(used) == len(set(used)) == (min(n, 16) if labels else n)
        assert not labels or {j % labels for j in used} == {int(own[i]) % labels}
        whose.append(exact_mean(x_t[i:i + 1], t[i:i + 1], data.at(torch.tensor(used), CPU)[0]))
    mean = sct.posterior_mean(x_t, t, torch.cat([refs, x0]), torch.cat([allowed, torch.eye(8, dtype=torch.bool)], 1))
    torch.testing.assert_close(mean.double(), torch.cat(whose), rtol=0, atol=1e-4)
    again, other = (sct.draw_references(n, own, data, members, 7, step)[0] for step in ('step', 'next'))
    assert torch.equal(index, again) and not torch.equal(index, other)
    part, _ = sct.draw_references(n, own[:4], data, members, 7, 'step')         # a process draws what all draw
    assert set(part.tolist()) <= set(index.tolist())


def test_every_image_of_a_class_is_drawn_equally_often():
    data, own = fake_data(30, 3), torch.tensor([0, 4])
    members, counts = sct.class_members(data), torch.zeros(30)
    for step in range(2000):
        index, allowed = sct.draw_references(4, own, data, members, step)
        counts[index[allowed[0]]] += 1
    others = counts[3::3]                                                       # 3 of 9 each time
    assert counts[0] == 0 and counts.sum() == others.sum() == 6000 and (others - 2000 / 3).abs().max() < 110


@pytest.mark.parametrize('ref_size, flip', [('batch', True), ('all', True), ('5', True), ('5', False)])
def test_the_references_of_a_run(ref_size, flip, monkeypatch):
    """Mirrored with the images, of the sample's class; and the points are made of their mean."""
    seen, plain, runs_mean = [], sct.loss, sct.posterior_mean
    monkeypatch.setattr(sct, 'posterior_mean', lambda x_t, t, refs, allowed=None: (
        seen.append((refs, allowed)), runs_mean(x_t, t, refs, allowed))[1])
    monkeypatch.setattr(sct, 'loss', lambda net, *inputs: (seen.append(inputs[:5]), plain(net, *inputs))[1])
    assert run(*TINY, '--ref-size', ref_size, '--steps', 1, *['--flip'] * flip, '--resolution', 8) == 0
    *drawn, (x_t, t, x0_hat, eps_hat, r) = seen
    data, index = common.shapes(200, 8), common.batch_indices(200, 8, 0, 0)
    images, y = common.normalise(data.images), data.labels[index]
    x0 = images[index]
    x0 = common.mirror(x0, 0, 0, 'flip') if flip else x0
    assert not flip or not torch.equal(x0, images[index])
    torch.testing.assert_close(x_t, x0 + t[:, None, None, None] * common.randn(x0.shape, 0, 0, 'noise'))
    if ref_size == 'all':
        refs, allowed = torch.cat([images, images.flip(3)]), (y[:, None] == data.labels).repeat(1, 2)
    else:
        (refs, allowed), = drawn
        either = lambda image: ((images == image) | (images == image.flip(2))).flatten(1).all(1)
        labels = torch.stack([data.labels[either(image)][0] for image in refs])
        assert ((y[:, None] == labels) == allowed).all() or ref_size == '5'
        assert (y[:, None] == labels)[allowed].all() and (ref_size == 'batch' or (allowed.sum(1) == 5).all())
        upright = torch.stack([(images == image).flatten(1).all(1).any() for image in (refs if ref_size == 'batch' else refs[:-8])])
        assert ref_size == 'batch' or upright.all() == (not flip)
    torch.testing.assert_close(x0_hat.double(), exact_mean(x_t, t, refs, allowed), rtol=0, atol=1e-4)
    torch.testing.assert_close(eps_hat, (x_t - x0_hat) / t[:, None, None, None])


def test_more_references_than_a_class_has_are_said_once(capsys):
    assert run(*TINY, '--ref-size', 30) == 0
    assert capsys.readouterr().out.count('--ref-size 30: some class has but 20 images, which are all used') == 1


def test_consistency_function_and_its_boundary():
    x, t = torch.randn(3, 3, 4, 4), torch.tensor([0.002, 1.0, 80.0])
    out = sct.f(toy, x, t, m=0.002)
    torch.testing.assert_close(out[0], x[0])                            # f(x, sigma_min) = x
    s = 0.5                                                             # the others by hand, at t = 1 and m = 0
    F = toy(x[1:2] / math.sqrt(s * s + 1), torch.zeros(1))
    torch.testing.assert_close(sct.f(toy, x, t)[1:2], x[1:2] * s * s / (1 + s * s) + s / math.sqrt(s * s + 1) * F)


def test_loss_stops_the_teachers_gradient_and_seeds_both_masks_alike():
    seen = []

    def net(x, c_noise, y):
        seen.append((torch.is_grad_enabled(), torch.rand(1).item()))
        return x * scale
    scale = torch.ones((), requires_grad=True)
    x, t = torch.randn(4, 1, 2, 2), torch.ones(4)
    sct.loss(net, x, t, x, x, t / 2, mask=5).sum().backward()
    assert [grad for grad, _ in seen] == [True, False] and seen[0][1] == seen[1][1]
    assert scale.grad is not None
    before = scale.grad.clone()
    scale.grad = None
    fixed = lambda x, c_noise, y: x.detach() * 1.0      # a teacher of its own: the same values, no gradient
    sct.loss(net, x, t, x, x, t / 2, mask=5, teacher=fixed).sum().backward()
    assert torch.equal(before, scale.grad)


def test_gradient_is_finite_where_the_loss_is_zero():
    scale = torch.ones((), requires_grad=True)
    x = torch.zeros(2, 1, 2, 2)
    for c in (0.0, 0.1):
        sct.loss(lambda x, n, y: x * scale, x, torch.ones(2), x, x, torch.zeros(2), c=c).sum().backward()
        assert scale.grad.isfinite()


def test_weights():
    x, t, r = torch.randn(2, 1, 4, 4), torch.tensor([0.5, 3.0]), torch.tensor([0.25, 1.0])
    plain = sct.loss(toy, x, t, x, x, r, weighting='gap') * (t - r)
    close(sct.loss(toy, x, t, x, x, r, weighting='edm'), plain * (t ** 2 + 0.25) / (0.5 * t) ** 2)
    close(sct.loss(toy, x, t, x, x, r, weighting='t'), plain / t)
    u = sct.f(toy, x, t) - x
    close(sct.denoising_loss(toy, x, t, x), (t ** 2 + 0.25) / (0.5 * t) ** 2 * u.square().mean((1, 2, 3)))


# Schedule and phases

def test_schedules():
    at = [0, 100, 125, 500, 990, 1500]
    assert [sct.stage_at(step, 1000, 8, 'ect') for step in at] == [0, 0, 1, 4, 7, 7]
    assert [sct.stage_at(step, 1000, 8, 'smooth') for step in at] == [0, 0.8, 1, 4, 7.92, 8]
    t = torch.tensor([0.5])
    smooth, steps = ([sct.lower_level(t, sct.stage_at(i, 800, 8, kind)).item() for i in range(800)]
                     for kind in ('smooth', 'ect'))
    assert smooth == sorted(smooth) and max(np.diff(smooth)) < 0.01 and len(set(steps)) < 9


def test_phase_edges_and_floors():
    assert sct.phase_edges(1) == [0, 80]
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    close(sct.phase_edges(4), [0, *((low + (high - low) * share) ** 7 for share in (0.25, 0.5, 0.75)), 80])
    close(sct.rho_levels(3), [(low + (high - low) * i / 3) ** 7 for i in range(4)])
    edges = torch.tensor(sct.phase_edges(3, [0.8, 10.0]))
    t = torch.tensor([0.001, 0.5, 0.8, 0.81, 10.0, 10.5, 80.0, 200.0])
    close(sct.phase_floor(t, edges), [0, 0, 0, 0.8, 0.8, 10, 10, 10])
    assert (sct.phase_floor(t, edges) < t).all()


def test_one_phase_is_the_plain_loss_bit_for_bit():
    x0, eps, t = torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8), torch.rand(8) * 5
    x_t, r = x0 + t[:, None, None, None] * eps, sct.lower_level(t, 2)
    r4 = r[:, None, None, None]
    plain = sct.f(toy, x_t, t) - torch.where(r4 > 0, sct.f(toy, x0 + r4 * eps, r.clamp(min=1e-9)), x0)
    expected = torch.linalg.vector_norm(plain.flatten(1), dim=1) * (1 / (t - r))
    floor = sct.phase_floor(t, torch.tensor(sct.phase_edges(1)))
    assert torch.equal(sct.loss(toy, x_t, t, x0, eps, r, s=floor), expected)


def gaussian_phase_network(edges, deviation=1.0):
    """F of the exact consistency function per phase for N(0, deviation²): at_level(f, x_t, t, s) ends at the flow's
    x_s.
    """
    def net(x_in, c_noise, y=None):
        t = (4 * c_noise).exp().double()[:, None, None, None]
        s = sct.phase_floor(t.flatten() * (1 - 1e-6), edges.double())[:, None, None, None]
        x = x_in.double() * (0.25 + t ** 2).sqrt()
        x_s = x * ((deviation ** 2 + s ** 2) / (deviation ** 2 + t ** 2)).sqrt()
        return (((x_s - s / t * x) / (1 - s / t) - 0.25 / (t ** 2 + 0.25) * x) / (0.5 * t / (t ** 2 + 0.25).sqrt()))
    return net


@pytest.mark.parametrize('phases', [1, 2, 4])
def test_the_exact_function_per_phase_has_no_loss_in_the_limit(phases):
    """Gaussian data, exact direction eps_hat = x t / (1 + t²): one Euler step from t to r errs by the gap squared."""
    edges = torch.tensor(sct.phase_edges(phases), dtype=torch.float64)
    net = gaussian_phase_network(edges)
    t = torch.logspace(-2, 1.9, 400, dtype=torch.float64)
    x_t = torch.randn(400, 1, 1, 1, dtype=torch.float64) * (1 + t ** 2).sqrt()[:, None, None, None]
    x0_hat = x_t / (1 + t ** 2)[:, None, None, None]
    eps_hat = (x_t - x0_hat) / t[:, None, None, None]
    s = sct.phase_floor(t, edges)
    errors = []
    for gap in (0.1, 0.01, 0.001):
        r = (t * (1 - gap)).maximum(s)
        errors.append((sct.loss(net, x_t, t, x0_hat, eps_hat, r, s=s) * (t - r)).max().item())
    assert errors[0] < 0.1 and errors[1] < errors[0] / 50 and errors[2] < errors[1] / 50


def test_phased_target_at_the_edge_is_the_point_itself():
    """Two points of data: where r = s the teacher's network is not asked, and x_s = x_r = x0_hat + s eps_hat."""
    refs = torch.tensor([-1.0, 1.0])[:, None, None, None]
    t, s = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.0, 0.5, 0.5])
    x_t = torch.tensor([0.3, 0.3, -2.0])[:, None, None, None]
    x0_hat = sct.posterior_mean(x_t, t, refs)
    close(x0_hat.flatten(), torch.tanh(x_t.flatten() / t ** 2))                 # E[x0 | x_t] of two points
    eps_hat = (x_t - x0_hat) / t[:, None, None, None]

    def unasked(*inputs):
        return torch.full_like(inputs[0], torch.nan)
    value = sct.loss(toy, x_t, t, x0_hat, eps_hat, s, s=s, teacher=unasked)
    student = sct.f(toy, x_t, t).flatten()
    x_s = student + s * (x_t.flatten() - student) / t
    close(value, (x_s - (x0_hat + s[:, None, None, None] * eps_hat).flatten()).abs() / (t - s))


def model_of(net, **config):
    """A stand-in for a loaded model: `net` on 1x1 images with the settings that sampling reads."""
    model = torch.nn.Module()
    model.weight, model.label_dim, model.forward = torch.nn.Parameter(torch.zeros(1)), 0, net
    model.config = dict(precision='fp32', label_dim=0, phases=1, edges=None, eta=1.0, t_mid=0.821, in_channels=1,
                        resolution=1) | config
    return model


@pytest.mark.parametrize('phases', [2, 3, 5])
def test_phased_sampling_follows_the_exact_flow(phases):
    """With the exact function per phase, M deterministic steps end where the flow ends: 80 z / sqrt(1 + 80²)."""
    model = model_of(gaussian_phase_network(torch.tensor(sct.phase_edges(phases), dtype=torch.float64)), phases=phases)
    z = common.randn((100, 1, 1, 1), 0, 0, 'sample')
    end = (80 * z / (1 + 80 ** 2) ** 0.5).clamp(-1, 1)
    torch.testing.assert_close(sct.sample(model, 100, phases), end, rtol=0, atol=2e-3)
    asked = []
    model.forward = lambda x, c, y=None: (asked.append((4 * c[0]).exp().item()), torch.zeros_like(x))[1]
    sct.sample(model, 4, phases, eta=0.5)
    close(asked, [80.0, *(0.5 * s for s in sct.phase_edges(phases)[-2:0:-1])])
    with pytest.raises(common.UserError, match='phases'):
        sct.sample(model, 4, phases + 1)


def test_edge_skipping_spares_the_place_where_a_smooth_network_must_fail():
    """A network with a Lipschitz bound cannot jump at an edge. Around the edge s its output ramps between the two
    phases' exact functions, over +-10 % in t; so at t = s itself it is half wrong, and at eta s, eta < 1, less so.
    """
    edges = torch.tensor(sct.phase_edges(2), dtype=torch.float64)
    exact, s = gaussian_phase_network(edges), sct.phase_edges(2)[1]
    one_phase = gaussian_phase_network(torch.tensor([0.0, 80.0], dtype=torch.float64))

    def ramp(x_in, c_noise, y=None):
        t = (4 * c_noise).exp()[:, None, None, None]
        share = ((t / s - 0.9) / 0.2).clamp(0, 1)                               # 0 below the edge, 1 above it
        above = exact(x_in, torch.maximum(c_noise, torch.tensor(math.log(1.1 * s) / 4)))
        return torch.where(t > 1.1 * s, exact(x_in, c_noise), (1 - share) * one_phase(x_in, c_noise) + share * above)
    model = model_of(ramp, phases=2)
    end = (80 * common.randn((500, 1, 1, 1), 0, 0, 'sample') / (1 + 80 ** 2) ** 0.5).clamp(-1, 1)
    error = {eta: (sct.sample(model, 500, 2, eta=eta) - end).square().mean().sqrt().item() for eta in (1.0, 0.95, 0.9)}
    assert error[0.9] < error[0.95] < error[1.0] and error[0.9] < error[1.0] / 2


def test_guidance():
    good, bad = model_of(lambda x, c, y=None: x * 0.1), model_of(lambda x, c, y=None: x * 0.3)
    plain = sct.sample(good, 20)
    assert torch.equal(sct.sample(good, 20, guide=bad, guidance=1.0), plain)
    assert torch.equal(sct.sample(good, 20, guide=bad, guidance=0.0), sct.sample(bad, 20))
    pushed = sct.sample(good, 20, guide=bad, guidance=1.5)
    close(pushed, (plain + 0.5 * (plain - sct.sample(bad, 20))).clamp(-1, 1))
    away, before = ((images - sct.sample(bad, 20)).abs() for images in (pushed, plain))
    assert (away >= before - 1e-6).all() and away.sum() > before.sum()


# Oracles

def test_the_exact_denoiser_is_a_fixed_point_of_pretraining():
    """For N(0, s²) the denoiser is x s² / (s² + t²); its loss is least, so its gradient vanishes on average."""
    s, n = 1.0, 200_000
    x0, t = s * torch.randn(n, 1, 1, 1), torch.full((n,), 0.7)
    x_t = x0 + 0.7 * torch.randn(n, 1, 1, 1)
    gain = torch.tensor(s ** 2 / (s ** 2 + 0.49), requires_grad=True)
    c_skip, c_out, c_in = 0.25 / 0.74, 0.5 * 0.7 / 0.74 ** 0.5, 1 / 0.74 ** 0.5
    net = lambda x_in, c_noise, y: (gain - c_skip) / c_out * x_in / c_in
    sct.denoising_loss(net, x_t, t, x0).mean().backward()
    assert abs(gain.grad) < 0.05
    gain.grad = None
    gain.data += 0.1
    sct.denoising_loss(net, x_t, t, x0).mean().backward()
    assert gain.grad > 1


@pytest.mark.parametrize('ref_size', ['1', 'batch'])
def test_training_approaches_the_exact_consistency_function(ref_size):
    """N(0, 1) data, a small network, this script's own pairs, targets and loss: f -> x / sqrt(1 + t²).

    Error bound: 5 % of the data's deviation, root mean square over x_t and over t from 0.02 to 80.
    """
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                 torch.nn.Linear(64, 1))

    def net(x_in, c_noise, y=None):
        c = c_noise[:, None]
        return (layers(torch.cat([x_in.flatten(1), c, c.square()], 1)) + x_in.flatten(1))[:, :, None, None]
    steps, optimizer = 2000, torch.optim.Adam(layers.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        x0, eps = (common.randn((512, 1, 1, 1), step, stream) for stream in 'xe')
        t = sct.upper_level(common.randn((512,), step, 't'), 0.5, 2.0)
        r = sct.lower_level(t, step * 8 // steps)
        x_t = x0 + t[:, None, None, None] * eps
        x0_hat = x0 if ref_size == '1' else sct.posterior_mean(x_t, t, x0)
        eps_hat = (x_t - x0_hat) / t[:, None, None, None]
        optimizer.zero_grad()
        sct.loss(net, x_t, t, x0_hat, eps_hat, r).mean().backward()
        optimizer.step()
        schedule.step()
    t = torch.logspace(math.log10(0.02), math.log10(80), 40).repeat_interleave(500)
    x = (1 + t ** 2).sqrt()[:, None, None, None] * torch.randn(len(t), 1, 1, 1)
    with torch.no_grad():
        error = sct.f(net, x, t) - x / (1 + t ** 2).sqrt()[:, None, None, None]
    assert error.square().mean().sqrt() < 0.05


# Runs

def run(*flags):
    return common.run(sct.main, [str(flag) for flag in flags])


def lines(out):
    return [json.loads(line) for line in (Path(out) / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    draw = common.shapes
    monkeypatch.setattr(common, 'shapes', lambda n=200, resolution=16: draw(n, resolution))


@pytest.mark.parametrize('flags', [[], ['--no-cond'], ['--ref-size', 'all'], ['--ref-size', '5'], ['--ref-size', '1'],
                                   ['--pretrain-steps', '2'], ['--precision', 'bf16'], ['--dropout', '0.2'],
                                   ['--schedule', 'ect', '--stages', '3'], ['--phases', '3', '--eta', '0.9']])
def test_a_run_writes_its_folder(flags):
    assert run(*TINY, '--sample-every', 2, '--eval-every', 4, '--fid-num', 10, *flags) == 0
    out = Path('runs/sct-shapes')
    assert {p.name for p in out.iterdir()} == {'config.json', 'metrics.jsonl', 'samples', 'curves.png', 'checkpoint.pt',
                                               'final.pt', 'best.pt'}
    assert sorted(p.name for p in (out / 'samples').iterdir()) == ['0000002.png', '0000004.png']
    steps = [line for line in lines(out) if 'loss' in line]
    assert [line['step'] for line in steps] == [1, 2, 3, 4] and all(math.isfinite(line['loss']) for line in steps)
    assert any(name.startswith('pixel-FD (10 images against the 200 training images), ') for name in lines(out)[-1])
    state = torch.load(out / 'final.pt', weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values()) and 'enc.8x8_conv.weight' in state


@pytest.mark.parametrize('schedule, phases', [('ect', 1), ('smooth', 3)])
def test_the_pairs_that_a_run_trains_on(monkeypatch, schedule, phases):
    """Levels, their gap and the points themselves, as the loop hands them to the loss."""
    seen, plain = [], sct.loss
    monkeypatch.setattr(sct, 'loss', lambda net, x_t, t, x0_hat, eps_hat, r, *rest: (
        seen.append((x_t, t, x0_hat, eps_hat, r, rest[-1])), plain(net, x_t, t, x0_hat, eps_hat, r, *rest))[1])
    assert run(*TINY, '--batch', 64, '--steps', 5, '--pretrain-steps', 1, '--schedule', schedule, '--phases', phases,
               '--stages', 4) == 0
    edges = torch.tensor(sct.phase_edges(phases))
    assert len(seen) == 4                                                       # the first step was pretraining
    for step, (x_t, t, x0_hat, eps_hat, r, s) in enumerate(seen):
        assert torch.equal(t, sct.upper_level(common.randn((64,), 0, step + 1, 'level'), -1.1, 2.0))
        assert torch.equal(s, sct.phase_floor(t, edges))
        assert torch.equal(r, torch.maximum(s, sct.lower_level(t, step if schedule == 'ect' else float(step))))
        torch.testing.assert_close(x_t, x0_hat + t[:, None, None, None] * eps_hat)
    assert (seen[-1][4] > seen[-1][5]).any() and (phases == 1 or (seen[-1][4] == seen[-1][5]).any())


def test_the_settings_of_a_run_reach_gap_and_loss(monkeypatch):
    """q, k and b of the gap, P_mean and P_std of the levels, c and the weighting of the loss."""
    ours = dict(q=3.0, k=4.0, b=2.0, P_mean=-0.5, P_std=1.5, c=0.03, weighting='edm')
    monkeypatch.setitem(sct.PRESETS, 'shapes', sct.PRESETS['shapes'] | ours)
    seen, plain = [], sct.loss
    monkeypatch.setattr(sct, 'loss', lambda net, x_t, t, x0_hat, eps_hat, r, y, teacher, *rest: (
        seen.append((t, r, rest)), plain(net, x_t, t, x0_hat, eps_hat, r, y, teacher, *rest))[1])
    assert run(*TINY, '--steps', 1) == 0
    t, r, (_, weighting, c, _) = seen[0]
    assert torch.equal(t, sct.upper_level(common.randn((8,), 0, 0, 'level'), -0.5, 1.5))
    assert torch.equal(r, sct.lower_level(t, 0, 3.0, 4.0, 2.0)) and (r > 0).any()
    assert (weighting, c) == ('edm', 0.03)


def test_noise_and_levels_of_pretraining_and_tuning(monkeypatch):
    """Each of its own stream; the diffusion model has EDM's levels, and the posterior mean for a target too."""
    made, used, mean, denoising_loss = [], [], sct.posterior_mean_of_all, sct.denoising_loss
    monkeypatch.setattr(sct, 'posterior_mean_of_all', lambda x_t, t, *rest: (
        made.append((x_t, t, mean(x_t, t, *rest))), made[-1][-1])[1])
    monkeypatch.setattr(sct, 'denoising_loss', lambda net, x_t, t, x0_hat, *rest: (
        used.append((x_t, t, x0_hat)), denoising_loss(net, x_t, t, x0_hat, *rest))[1])
    assert run(*TINY, '--steps', 2, '--pretrain-steps', 1, '--ref-size', 'all') == 0
    images = common.normalise(common.shapes(200, 8).images)
    for step, (x_t, t, _) in enumerate(made):
        levels = (-1.1, 2.0) if step else (-1.2, 1.2)
        assert torch.equal(t, sct.upper_level(common.randn((8,), 0, step, 'level'), *levels))
        x0, eps = images[common.batch_indices(200, 8, step, 0)], common.randn((8, 3, 8, 8), 0, step, 'noise')
        assert torch.equal(x_t, x0 + t[:, None, None, None] * eps)
    assert len(made) == 2 and all(map(torch.equal, used[0], made[0]))


def test_references_are_drawn_anew_in_every_step(monkeypatch):
    seen, plain = [], sct.draw_references
    monkeypatch.setattr(sct, 'draw_references', lambda *inputs: (seen.append((inputs, plain(*inputs))), seen[-1][1])[1])
    assert run(*TINY, '--seed', 3, '--ref-size', 5) == 0
    for step, ((n, own, *_, seed, number, _), _) in enumerate(seen):
        assert (n, seed, number) == (5, 3, step) and torch.equal(own, common.batch_indices(200, 8, step, 3))
    assert len(seen) == 4 and not torch.equal(seen[0][1][0], seen[1][1][0])


def test_labels_reach_student_teacher_and_guide(monkeypatch):
    seen, plain = [], common.network

    def network(net, precision):
        call = plain(net, precision)
        return lambda x, c, y=None: (seen.append(y), call(x, c, y))[1]
    monkeypatch.setattr(common, 'network', network)
    assert run(*TINY, '--steps', 2, '--pretrain-steps', 1) == 0
    first, second = (torch.arange(200)[common.batch_indices(200, 8, step, 0)] % 10 for step in (0, 1))
    assert all(map(torch.equal, seen[:3], (first, second, second)))             # denoiser; student and teacher
    seen.clear()
    model = sct.load('runs/sct-shapes')
    sct.sample(model, 4, labels=[7, 2], guide=model, guidance=2.0)
    assert [y.tolist() for y in seen] == [[7, 2, 7, 2]] * 2


def test_sampling_lands_at_the_runs_own_eta():
    asked, net = [], lambda x, c, y=None: (asked.append((4 * c[0]).exp().item()), torch.zeros_like(x))[1]
    model = model_of(net, phases=3, eta=0.5)
    sct.sample(model, 4, 3)
    close(asked, [80.0, *(0.5 * s for s in sct.phase_edges(3)[2:0:-1])])


@pytest.mark.parametrize('ref_size', ['batch', 'all'])
def test_two_processes_equal_one(command, monkeypatch, ref_size, tmp_path):
    """20 steps, dropout 0, gloo: losses and weights agree to rounding."""
    flags = [*TINY, '--steps', 20, '--pretrain-steps', 5, '--ref-size', ref_size, '--device', 'cpu']
    monkeypatch.setattr(common, 'shapes', all_shapes)               # as many as the command draws
    assert run(*flags, '--out', 'one') == 0
    done = command('sct.py', *flags, '--out', 'two', '--gpus', 2)
    assert done.returncode == 0, done.stderr
    one, two = ([line['loss'] for line in lines(tmp_path / out)[:20]] for out in ('one', 'two'))
    np.testing.assert_allclose(one, two, rtol=2e-4)
    one, two = (torch.load(tmp_path / out / 'final.pt', weights_only=True) for out in ('one', 'two'))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_sampling():
    assert run(*TINY) == 0
    model = sct.load('runs/sct-shapes')
    one = sct.sample(model, 12, seed=3)
    assert one.shape == (12, 3, 8, 8) and one.abs().max() <= 1
    assert torch.equal(one, sct.sample(model, 12, seed=3)) and not torch.equal(one, sct.sample(model, 12, seed=4))
    z = common.randn((12, 3, 8, 8), 3, 0, 'sample')
    net = common.network(model, 'fp32')
    y = torch.arange(12) % 10
    first = sct.f(net, 80 * z, torch.full((12,), 80.0), y, 0.002)
    torch.testing.assert_close(one, first.clamp(-1, 1))
    mid = torch.full((12,), 0.821)
    second = sct.f(net, first + 0.821 * common.randn((12, 3, 8, 8), 3, 1, 'sample'), mid, y, 0.002)
    torch.testing.assert_close(sct.sample(model, 12, nfe=2, seed=3), second.clamp(-1, 1))
    assert not torch.equal(sct.sample(model, 12, labels=[7], seed=3), one)

    for source in ('runs/sct-shapes', 'runs/sct-shapes/checkpoint.pt', 'runs/sct-shapes/final.pt'):
        assert run('--sample', source, '--n', 6, '--nfe', '1,4', '--labels', '1,2') == 0
    assert {p.name for p in Path('runs/sct-shapes').glob('*.png')} >= {'sample-1-4-steps.png'}


def test_an_earlier_self_is_kept_and_guides(capsys):
    assert run(*TINY, '--keep-ema', '0.25,0.5') == 0
    out = Path('runs/sct-shapes')
    assert {p.name for p in out.glob('ema-*')} == {'ema-1.pt', 'ema-2.pt'}
    for w, name in [(1, 'one'), (2, 'two')]:
        assert run('--sample', out, '--guide', out / 'ema-1.pt', '--guidance', w, '--out', name) == 0
    assert run('--sample', out, '--out', 'plain') == 0
    plain, one, two = ((Path(name) / 'sample-1-step.png').read_bytes() for name in ('plain', 'one', 'two'))
    assert plain == one != two


def test_guides_that_do_not_fit(refused):
    assert run(*TINY) == run(*TINY, '--no-cond', '--out', 'other') == 0
    guide = ['--guide', 'other', '--guidance', 2]
    refused(sct, ['--sample', 'runs/sct-shapes', *guide], '--guide other', 'other classes')
    refused(sct, [*TINY, *guide, '--out', 'x'], '--guide is for --sample')
    refused(sct, '--keep-ema 0 --out x', '--keep-ema')


def settings(capsys, *flags):
    assert run(*flags, '--dry-run') == 0
    return json.loads(capsys.readouterr().out)


def test_where_training_starts(capsys, refused, tmp_path):
    """The published checkpoint for the published network, random weights for any other, and whatever --init names."""
    assert settings(capsys, '--dataset', 'cifar10')['init'] == unet.URLS['cifar10']
    assert 'edm2-img64-s' in settings(capsys, '--dataset', 'imagenet64')['init']
    for flags in (['--width', 16], ['--cond'], ['--pretrain-steps', 10], ['--init', 'none']):
        assert settings(capsys, '--dataset', 'cifar10', *flags)['init'] == 'none'
    assert settings(capsys)['init'] == 'none'

    assert run(*TINY) == 0                                                      # step 0 is the checkpoint's own network
    start = torch.load('runs/sct-shapes/final.pt', weights_only=True)
    assert run(*TINY, '--lr', 0, '--init', 'runs/sct-shapes/final.pt', '--out', 'again') == 0
    again = torch.load('again/final.pt', weights_only=True)
    assert start.keys() == again.keys() and all(torch.equal(start[name], again[name]) for name in start)
    refused(sct, [*TINY, '--width', 16, '--init', 'runs/sct-shapes/final.pt', '--out', 'x'],
            'final.pt does not fit', '[16, ', '[8, ')
    refused(sct, [*TINY, '--init', 'http://127.0.0.1:9/net.pkl', '--out', 'x'],
            '127.0.0.1:9/net.pkl', '--init', '--pretrain-steps')
    assert not Path('x').exists()


def test_a_run_of_diffusion_alone():
    assert run(*TINY, '--pretrain-steps', 4) == 0 and Path('runs/sct-shapes/final.pt').exists()


@pytest.mark.parametrize('size, width', [('', 192), ('-m', 256), ('-l', 320), ('-xl', 384)])
def test_imagenet64_presets(capsys, size, width):
    values = settings(capsys, '--dataset', f'imagenet64{size}')
    expected = dict(arch='edm2', width=width, cond=True, q=4, c=0.06, ema_std=0.1)
    assert {name: values[name] for name in expected} == expected


def test_edm2_trains_and_samples():
    assert run(*TINY, '--arch', 'edm2', '--width', 64, '--dropout', 0.1, '--ema-std', 0.1, '--lr-decay', 2) == 0
    images = sct.sample(sct.load('runs/sct-shapes'), 4, nfe=2)
    assert images.shape == (4, 3, 8, 8) and images.isfinite().all()


@pytest.mark.parametrize('arch', [[], ['--arch', 'edm2', '--width', '64']])
def test_noise_levels_are_float32_in_16_bit_networks(arch):
    """Neighbouring levels t and r differ as they do in float32: their embedding is not rounded to 16 bits."""
    assert run(*TINY, *arch) == 0
    model, outs = sct.load('runs/sct-shapes'), {}
    t = torch.tensor([1.0, 1.0 - 1 / 256])
    name = 'map_layer1' if not arch else 'emb_noise'
    for precision in ('fp32', 'bf16'):
        note = lambda module, x, out: outs.__setitem__(precision, out.float())
        hook = getattr(model, name).register_forward_hook(note)
        net = common.network(model, precision)
        net(torch.zeros(2, 3, 8, 8), t.log() / 4, torch.tensor([0, 0]))
        hook.remove()
    assert torch.equal(outs['fp32'], outs['bf16']) and not torch.equal(*outs['fp32'])


def test_wrong_flags(refused, tmp_path, monkeypatch):
    assert run(*TINY) == 0
    refused(sct, '--dataset nothing', '--dataset nothing', 'shapes')
    refused(sct, TINY, 'runs/sct-shapes holds a run', '--resume', '--overwrite')
    refused(sct, '--resume --out nowhere', 'nowhere holds no run')
    refused(sct, '--resume --width 16', '--width is 16', 'made with 8')
    refused(sct, '--resume --seed 5', '--seed is 5')
    refused(sct, '--phases 2 --edges 3,4', '--edges')
    refused(sct, '--phases 2 --nfe 1', '--nfe')
    refused(sct, '--sample runs/sct-shapes --guide runs/sct-shapes', '--guidance')
    refused(sct, [*TINY, '--eval-every', 4, '--fid-ref', 'nowhere.npz', '--out', 'x'], 'nowhere.npz')
    refused(sct, [*TINY, '--labels', 99, '--out', 'x'], '--labels 99')
    refused(sct, '--phases 3 --edges 4,3', '--edges')
    refused(sct, '--eta 1.5', '--eta')
    refused(sct, '--sample runs/sct-shapes --guide nowhere.pt --guidance 2', 'nowhere.pt')
    refused(sct, '--ref-size some', '--ref-size')
    refused(sct, '--ref-size 0', '--ref-size')
    refused(sct, '--steps 0', '--steps')
    refused(sct, '--lr nan', '--lr')
    refused(sct, '--stepz 3', '--stepz')
    refused(sct, '--pretrain-steps 10 --steps 9 --out x', '--pretrain-steps 10')
    refused(sct, '--batch 9 --gpus 2 --device cpu --out x', '--batch 9', '2 processes')
    refused(sct, '--dataset cifar10 --data-dir nowhere/at/all --resolution 16 --out x', 'nowhere')
    refused(sct, '--sample nowhere', 'nowhere')
    refused(sct, '--sample runs/sct-shapes --labels 10', '--labels', '10 classes')
    refused(sct, ['--sample', __file__], 'test_sct.py', 'cannot be read')
    refused(sct, '--evaluate runs/sct-shapes --fid-ref nowhere.npz', 'nowhere.npz')
    refused(sct, '--mults 1,2,2,2,2,2 --out x', 'cannot be halved')
    refused(sct, '--flip yes --out x', 'yes')
    refused(sct, '--weighting some --out x', '--weighting', 'gap')
    Path('file').write_text('')
    refused(sct, [*TINY, '--out', 'file'], 'file is a file')
    if not torch.cuda.is_available():
        refused(sct, '--device cuda --out x', 'no GPU')
        refused(sct, '--gpus 8 --out x', '--gpus 8')
    assert not Path('x').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['file', 'runs']


@pytest.mark.assets
def test_cifar10_trains_samples_and_scores(real, capsys):
    data = real('cifar-10-batches-bin').parent
    cifar = ['--dataset', 'cifar10', '--data-dir', data]
    assert run(*cifar, '--width', 16, '--blocks', 1, '--batch', 16, '--steps', 6, '--ref-size', 100) == 0
    assert run('--evaluate', 'runs/sct-cifar10', '--data-dir', data, '--fid-num', 20, '--fid-features', 'pixels') == 0
    assert 'against the 50,000 training images' in capsys.readouterr().out
