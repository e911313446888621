"""sct.py against the published estimator of the posterior mean (`stf_targets.npz`: Newbeeer/stf), brute force in
float64, and data whose exact consistency function is known. What is as in the other scripts: test_shared.py."""
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import sct
from conftest import Script, all_shapes, analysed, close, draws, exact_mean, model_of, tool, wide

pytestmark = pytest.mark.usefixtures('few_shapes')
STF = np.load(Path(__file__).parent / 'data/stf_targets.npz')
SCT = Script('sct')


def test_posterior_mean_is_the_published_estimator():
    x_t, t, refs = (torch.from_numpy(STF[name]) for name in ('x_t', 't', 'ref'))
    close(sct.posterior_mean(x_t, t, refs), STF['x0_hat'])


@pytest.mark.parametrize('t', [0.002, 0.02, 0.1, 0.5, 2.0, 10.0, 80.0])
@pytest.mark.parametrize('labelled', [False, True])
def test_posterior_mean_over_all_data_is_exact(t, labelled):
    """In chunks of 7, with near twins one grey level apart, against float64; with mirror images, too."""
    data = common.shapes(500, 8)
    data.images[1] = data.images[0]
    data.images[1, 0, 0, 0] ^= 1
    data = data if labelled else data._replace(labels=torch.zeros_like(data.labels))
    refs, own, level = common.normalise(data.images), torch.arange(16), torch.full((16,), t)
    x_t = refs[:16] + t * common.randn((16, 3, 8, 8), 'noise', t)
    allowed, members = data.labels[:16, None] == data.labels, sct.class_members(data)
    whole = sct.posterior_mean_of_all(x_t, level, own, data, members)
    near = lambda a, b: close(a, b, rtol=0, atol=1e-4)
    near(whole, exact_mean(x_t, level, refs, allowed))
    near(sct.posterior_mean(x_t, level, refs, allowed), whole)
    near(sct.posterior_mean_of_all(x_t, level, own, data, members, chunk=7 * 192), whole)
    mirrored = sct.posterior_mean_of_all(x_t, level, own, data, members, flip=True)
    near(mirrored, exact_mean(x_t, level, torch.cat([refs, refs.flip(3)]), allowed.repeat(1, 2)))


def test_one_reference_is_ect_bit_for_bit(spy):
    calls = spy(sct, 'loss')
    assert SCT.train('--ref-size', 1, '--steps', 1) == 0
    (call,), (x0, _, eps) = calls, draws(0)
    assert torch.equal(call.x_t, x0 + wide(call.t) * eps) and torch.equal(call.x_r, x0 + wide(call.r) * eps)


@pytest.mark.parametrize('n, labels', [(8, 10), (6, 0), (50, 10)])
def test_drawn_references_are_n_of_the_samples_class_and_all_equally_often(n, labels, capsys):
    """Its own image among them, which is added; with fewer in a class all of those. For a key always the same."""
    images, size = torch.zeros(160, 3, 4, 4, dtype=torch.uint8), 16 if labels else 160
    data, own, counts = common.Data(images, torch.arange(160) % max(labels, 1), labels, None), torch.arange(8) * 7, 0
    members = sct.class_members(data, str(n))
    assert ('some class has fewer' in capsys.readouterr().out) == (n > size)
    assert [len(part) for part in members] == [size] * max(labels, 1)
    for step in range(300):
        index, allowed = sct.draw_references(n, own, data, members, 7, step)
        for i in range(8):
            used = {*index[allowed[i]].tolist(), int(own[i])}
            assert len(used) == allowed[i].sum() + 1 == min(n, size) and len({data.labels[j].item() for j in used}) == 1
        counts = counts + index[allowed[0]].bincount(minlength=160)
    mean = 300 * (min(n, size) - 1) / (size - 1)
    assert counts[0] == 0 and (counts[labels or 1::labels or 1] - mean).abs().max() < 5 * mean ** 0.5
    assert torch.equal(index, sct.draw_references(n, own, data, members, 7, step)[0])


@pytest.mark.parametrize('ref_size, flip', [('batch', True), ('all', True), ('5', True), ('5', False)])
def test_the_points_that_a_run_trains_on(ref_size, flip, spy):
    means, denoised, calls = spy(sct, 'posterior_mean'), spy(sct, 'denoising_loss'), spy(sct, 'loss')
    flags = ['--steps', 3, '--pretrain-steps', 1, '--seed', 3]
    assert SCT.train('--ref-size', ref_size, *flags, *['--flip'] * flip) == 0
    data, drawn = all_shapes(200, 8), []
    images = common.normalise(data.images)
    for step, call in enumerate([*denoised, *calls]):
        x0, y, eps = draws(step, seed=3, flip=flip)
        torch.testing.assert_close(call.x_t, x0 + wide(call.t) * eps)
        if ref_size == 'all':
            refs, allowed = torch.cat([images, images.flip(3)]), (y[:, None] == data.labels).repeat(1, 2)
        elif ref_size == 'batch':
            refs, allowed = x0, y[:, None] == y
        else:
            refs, allowed = means[step].refs, means[step].allowed
            upright, mirrored = ((refs[:, None] == of).flatten(2).all(2) for of in (images, images.flip(3)))
            labels = data.labels[(upright | mirrored).int().argmax(1)]
            assert (allowed.sum(1) == 5).all() and (y[:, None] == labels)[allowed].all()
            assert torch.equal(refs[-8:], x0) and allowed[:, -8:].diagonal().all()
            assert (upright | mirrored).any(1).all() and upright[:-8].any(1).all() != flip
            drawn.append(refs[:5])
        x0_hat = exact_mean(call.x_t, call.t, refs, allowed)
        expected = x0_hat if step == 0 else x0_hat + wide(call.r / call.t) * (call.x_t - x0_hat)
        torch.testing.assert_close((call.x_r if step else call.x0_hat).double(), expected, rtol=0, atol=1e-4)
    assert len(calls) == 2 and (ref_size != '5' or not torch.equal(drawn[1], drawn[2]))     # anew in every step


def gaussian_phase_network(edges):
    """F of the exact consistency function per phase for N(0, 1): at_level(f, x_t, t, s) ends at the flow's x_s."""
    def net(x_in, c_noise, y=None):
        t = wide((4 * c_noise).exp().double())
        s = wide(sct.phase_floor(t.flatten() * (1 - 1e-6), edges))
        x = x_in.double() * (0.25 + t ** 2).sqrt()
        x_s = x * ((1 + s ** 2) / (1 + t ** 2)).sqrt()
        return ((x_s - s / t * x) / (1 - s / t) - 0.25 / (t ** 2 + 0.25) * x) / (0.5 * t / (t ** 2 + 0.25).sqrt())
    return net


@pytest.mark.parametrize('phases', [1, 2, 4])
def test_the_exact_function_per_phase_has_no_loss_in_the_limit(phases):
    """Gaussian data, exact direction eps_hat = x t / (1 + t²): one Euler step from t to r errs by the gap squared."""
    edges = sct.phase_edges(phases)
    t = torch.logspace(-2, 1.9, 400, dtype=torch.float64)
    x_t = wide((1 + t ** 2).sqrt()) * torch.randn(400, 1, 1, 1, dtype=torch.float64)
    x0_hat, errors = x_t / wide(1 + t ** 2), []
    for gap in (0.1, 0.01, 0.001):
        r = (t * (1 - gap)).maximum(sct.phase_floor(t, edges))
        x_r = x0_hat + wide(r / t) * (x_t - x0_hat)
        errors.append((sct.loss(gaussian_phase_network(edges), x_t, t, x_r, r, edges=edges) * (t - r)).max().item())
    assert errors[0] < 0.1 and errors[1] < errors[0] / 50 and errors[2] < errors[1] / 50


@pytest.mark.parametrize('phases', [2, 3, 5])
def test_phased_sampling_follows_the_exact_flow(phases):
    """M deterministic steps end where the flow ends: 80 z / sqrt(1 + 80²). Each lands at eta times an edge (rho 7)."""
    model = model_of(gaussian_phase_network(sct.phase_edges(phases)), phases=phases)
    end = 80 * common.randn((100, 1, 1, 1), 0, 0, 'sample') / (1 + 80 ** 2) ** 0.5
    torch.testing.assert_close(sct.sample(model, 100, phases), end.clamp(-1, 1), rtol=0, atol=2e-3)
    asked = []
    model.forward = lambda x, c, y=None: (asked.append((4 * c[0]).exp().item()), torch.zeros_like(x))[1]
    sct.sample(model, 4, phases, eta=0.5)
    model.config['eta'] = 0.7                                                   # the run's own
    sct.sample(model, 4, phases)
    close(asked, [s for eta in (0.5, 0.7) for s in (80, *(eta * edge for edge in sct.rho_levels(phases)[-2:0:-1]))])
    with pytest.raises(common.UserError, match='phases'):
        sct.sample(model, 4, phases + 1)


def test_guidance():
    good, bad = model_of(lambda x, c, y=None: x * 0.1), model_of(lambda x, c, y=None: x * 0.3)
    plain, worse = sct.sample(good, 20), sct.sample(bad, 20)
    assert torch.equal(sct.sample(good, 20, guide=bad, guidance=1.0), plain)
    assert torch.equal(sct.sample(good, 20, guide=bad, guidance=0.0), worse)
    close(sct.sample(good, 20, guide=bad, guidance=1.5), (plain + 0.5 * (plain - worse)).clamp(-1, 1))


def test_an_earlier_average_is_kept_and_guides(refused):
    assert SCT.train('--keep-ema', '0.0001,0.5') == SCT.train('--no-cond', '--steps', 1, '--out', 'other') == 0
    assert SCT.train('--phases', 2, '--steps', 1, '--out', 'phased') == 0
    assert {path.name for path in SCT.out.glob('ema-*')} == {'ema-1.pt', 'ema-2.pt'}
    for w, name in [(1, 'one'), (2, 'two')]:
        assert SCT.run('--sample', SCT.out, '--guide', SCT.out / 'ema-1.pt', '--guidance', w, '--out', name) == 0
    assert SCT.run('--sample', SCT.out, '--out', 'plain') == 0
    plain, one, two = ((Path(name) / 'sample-1-steps.png').read_bytes() for name in ('plain', 'one', 'two'))
    assert plain == one != two
    for other in 'other', 'phased':
        refused(sct, f'--sample {SCT.out} --guide {other} --guidance 2', '--guide', 'same classes, size and phases')
    refused(sct, f'--sample {SCT.out} --guide {SCT.out}', '--guidance')
    refused(sct, f'--sample {SCT.out} --guide nowhere.pt --guidance 2', 'nowhere.pt')
    refused(sct, '--guide other --guidance 2 --out x', '--guide is for --sample')


def test_analysis_prints_the_variance_of_target_and_gradient(monkeypatch, capsys):
    monkeypatch.setattr(sct, 'rho_levels', lambda n, plain=sct.rho_levels: plain(n)[:4] if n == 9 else plain(n))
    assert SCT.train('--resolution', 4, '--mults', 1, '--steps', 1, '--stages', 2, '--save-every', 1) == 0
    table, said = analysed(SCT, capsys)
    table, level = table.reshape(2, 2, 5), sct.rho_levels(9)[3]
    close(table[:, :, 0], [sct.rho_levels(9)[2:]] * 2, rtol=1e-3)
    assert [line.split() for line in said].count(['sigma', '1', 'batch', '256', 'all']) == 2
    model, data, errors, gradients = sct.load(SCT.out).requires_grad_(True), all_shapes(200, 4), [], []
    net, images = common.network(model, 'fp32'), common.normalise(data.images)
    for j in range(8):
        index = common.batch_indices(200, model.config['batch'], j, 0)
        x0, y, t = images[index], data.labels[index], torch.full(index.shape, level)
        x_t = x0 + level * common.randn(x0.shape, 0, j, 'analyse')
        mean = exact_mean(x_t, t, x0, y[:, None] == y).float()
        errors.append((mean - exact_mean(x_t, t, images, y[:, None] == data.labels)).square().mean().item())
        r = sct.lower_level(t, 2)                                               # the end of the smooth schedule
        value = sct.loss(net, x_t, t, mean + wide(r / t) * (x_t - mean), r, y).mean()
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in found if g is not None]))
    products = torch.stack(gradients) @ torch.stack(gradients).T                    # of different draws: the mean's own
    square, mean = products.trace() / 8, (products.sum() - products.trace()) / 56
    close(table[:, 1, 2], [np.mean(errors), ((square - mean) / mean).sqrt()], rtol=3e-3)
    assert table[0, 1, 1] > table[0, 1, 2] and (table[0, :, 3:] < 1e-9).all()
    plain, signs = sct.loss, itertools.cycle([1, -1])                               # a mean that cannot be told from 0
    monkeypatch.setattr(sct, 'loss', lambda *args, **more: next(signs) * plain(*args, **more))
    assert (analysed(SCT, capsys)[0].reshape(2, 2, 5)[1, :, 1:] == 100).all()


def test_wrong_flags_of_sct(refused):
    for flags in ('--edges 3,4 --phases 2', '--edges 4,3 --phases 3', '--edges 80 --phases 2', '--nfe 1 --phases 2',
                  '--eta 1.5', '--keep-ema 0', '--ref-size some', '--ref-size 0', '--q 1e300', '--weighting some',
                  '--ema 0.9 --ema-std 0.1'):
        refused(sct, f'{flags} --out x', flags.split()[0])
    refused(sct, '--ref-size some --out x', 'argument --ref-size: invalid value')
    assert not Path('x').exists()


def test_rounding_over_distance_doubles_with_each_stage(monkeypatch):
    """By the emulation of .github/precision.py, and by the real bfloat16 as by the emulated one."""
    for name in 'conv2d', 'scaled_dot_product_attention':       # to be brought back: the emulation replaces them
        monkeypatch.setattr(torch.nn.functional, name, getattr(torch.nn.functional, name))
    assert SCT.train('--ref-size', 1, '--steps', 20, '--ema', 0) == 0
    precision = tool('precision')
    emulated, real = (np.array(precision.measure(SCT.out, n=64, real=real)['bf16']) for real in (False, True))
    assert (abs(np.log2(emulated[8] / emulated[4]) - 4) < 0.7) and (abs(np.log2(real / emulated)) < 1).all()
