"""What the three scripts have in common: texts, equations, what their runs train on, how they sample."""
import argparse
import difflib
import inspect
import itertools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import gc_ct
import sct
import unet
import vct
from conftest import TUNING, Script, close, draws, lines, same, toy, weights, wide

ECT = np.load(Path(__file__).parent / 'data/ect_losses.npz')
MODULES = dict(sct=sct, gc_ct=gc_ct, vct=vct)
every = pytest.mark.parametrize('module', MODULES.values(), ids=MODULES)
two = pytest.mark.parametrize('module', [gc_ct, vct], ids=['gc_ct', 'vct'])
OF_A_PAPER = set('''loss loss_settings level_pairs denoising_loss upper_level stage_at ema_decay sample load train
    analyse add_flags check_flags main'''.split())


def functions(module):
    return {name: re.sub(r' +\[\d+\]', '', inspect.getsource(value)) for name, value in vars(module).items()
            if inspect.isroutine(inspect.unwrap(value)) and inspect.getmodule(inspect.unwrap(value)) is module}


@pytest.mark.parametrize('a, b', list(itertools.combinations(MODULES, 2)))
def test_functions_of_one_name_are_letter_by_letter_the_same_and_the_loops_alike(a, b):
    ours, theirs = functions(MODULES[a]), functions(MODULES[b])
    both = (ours.keys() & theirs.keys()) - OF_A_PAPER - ({'f'} if b == 'vct' else set())       # which has a kernel
    assert len(both) >= 3 and [name for name in both if ours[name] != theirs[name]] == []
    changed = sum(line[0] in '+-' for line in difflib.ndiff(*(of['train'].splitlines() for of in (ours, theirs))))
    assert changed <= dict(sct=dict(gc_ct=32, vct=42), gc_ct=dict(vct=30))[a][b]


@every
def test_sections_are_in_order_and_every_deviation_has_its_place_in_the_code(module):
    listed = re.findall(r'^ ?\[(\d)\] ', module.__doc__, re.MULTILINE)
    code = inspect.getsource(module).split('"""', 2)[2]
    heads = re.findall(r'^# \d\. (\w+)', code, re.MULTILINE)
    assert [*heads[:3], *heads[4:7], heads[-1]] == 'Presets Noise Model Loss Sampling Training Command'.split()
    assert sorted(set(re.findall(r' \[(\d)\]', code))) == listed == [str(i + 1) for i in range(len(listed))]


@every
@pytest.mark.parametrize('name', [name for name in ECT.files if name.startswith('r_q')])
def test_lower_level_is_ects(module, name):
    q, k, b, stage = (float(part.lstrip('qkbstage')) for part in name.split('_')[1:])
    close(module.lower_level(torch.from_numpy(ECT['t']), stage, q=q, k=k, b=b), ECT[name])


@every
@pytest.mark.parametrize('c', [0.0, 0.03])
@pytest.mark.parametrize('stage', [0, 3, 7])
def test_loss_is_ects(module, c, stage):
    name = f'loss_c{c}_stage{stage}'
    x0, eps, normal = (torch.from_numpy(ECT[part]) for part in ('x', f'{name}:eps', f'{name}:randn_t'))
    t = module.upper_level(normal, -1.1, 2.0)
    r = module.lower_level(t, stage)
    close(module.loss(toy, x0 + wide(t) * eps, t, x0 + wide(r) * eps, r, c=c), ECT[name])


@every
def test_loss_stops_the_teachers_gradient_and_seeds_both_masks_alike(module):
    seen, scale = [], torch.ones((), requires_grad=True)

    def net(x, c_noise, y):
        seen.append((torch.is_grad_enabled(), torch.rand(1).item(), y))
        return x * scale
    x, t, y = torch.randn(4, 1, 2, 2), torch.ones(4), torch.arange(4)
    module.loss(net, x, t, x, t / 2, y, seed=5).sum().backward()
    assert [grad for grad, *_ in seen] == [True, False] and seen[0][1] == seen[1][1]
    assert all(torch.equal(labels, y) for *_, labels in seen)
    fixed = lambda x, c_noise, y: x * 1.0                   # a teacher of its own: the same values, no gradient
    again, = torch.autograd.grad(module.loss(net, x, t, x, t / 2, y, fixed, seed=6).sum(), scale)
    assert torch.equal(again, scale.grad) and again != 0 and seen[2][1] != seen[0][1]


@every
@pytest.mark.parametrize('c', [0.0, 0.1])
def test_the_gradient_is_finite_where_the_loss_is_zero(module, c):
    scale, x, t = torch.ones((), requires_grad=True), torch.zeros(2, 1, 2, 2), torch.ones(2)
    module.loss(lambda x, c_noise, y: x * scale, x, t, x, t / 2, c=c).sum().backward()
    assert scale.grad.isfinite()


@pytest.mark.parametrize('module, weighting', [(sct, 'edm'), (sct, 't'), (vct, 'edm')])
def test_the_weights_of_the_loss(module, weighting):
    x, t, r = torch.randn(2, 1, 4, 4), torch.tensor([0.5, 3.0]), torch.tensor([0.25, 1.0])
    weight = 1 / t if weighting == 't' else (t ** 2 + 0.25) / (0.5 * t) ** 2
    gap, other = (module.loss(toy, x, t, 2 * x, r, weighting=kind) for kind in ('gap', weighting))
    close(other, gap * (t - r) * weight)


@every
def test_denoising_loss(module):
    x_t, x0, t, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.5, 30.0]), torch.tensor([1, -2])
    net = lambda x, c_noise, y: toy(x, c_noise) + wide(y) * torch.rand(1)
    for kernel in [{}, dict(kernel='li')] if module is vct else [{}]:
        torch.manual_seed(7)
        u = module.f(net, x_t, t, y, **kernel) - x0
        close(module.denoising_loss(net, x_t, t, x0, y, seed=7, **kernel),
              (t ** 2 + 0.25) / (0.5 * t) ** 2 * u.square().mean((1, 2, 3)))


@two
def test_the_ends_of_the_draw_are_the_ends_of_the_levels(module):
    ends = module.level_pair(torch.tensor([0.0, 1.0]), *module.level_table(21, -1.1, 2.0))
    close(torch.stack(ends), [[module.rho_levels(20)[1], 80], [0.002, module.rho_levels(20)[-2]]])


@two
def test_transport_is_optimal(module):
    pytest.importorskip('scipy')
    for seed in range(5):
        x0, eps = common.randn((6, 3, 2, 2), seed, 'x'), common.randn((6, 3, 2, 2), seed, 'z')
        cost = lambda order: (x0[list(order)] - 80 * eps).square().sum().item()
        best = min(itertools.permutations(range(6)), key=cost)
        assert module.optimal_transport(x0, eps).tolist() == list(best)


@two
def test_without_scipy_one_line_says_what_to_install_and_sampling_needs_none(module, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    run = Script(module.__name__)
    run.train('--steps', 1, '--coupling', 'ic' if module is gc_ct else 'independent')
    config = json.loads((run.out / 'config.json').read_text())
    (run.out / 'config.json').write_text(json.dumps(config | dict(coupling='ot')))
    monkeypatch.setitem(sys.modules, 'scipy.optimize', None)
    assert run.run('--sample', run.out / 'final.pt', '--n', 1) == 0
    refused(module, '--coupling ot --out x', 'pip install scipy')


@pytest.mark.parametrize('module, settings, numbers, steps, batch, lr', [
    (sct, dict(schedule='ect'), 1, 1000, 256, 6e-3),
    (gc_ct, dict(mu=0.0, s1=160), 1, 1000, 256, 6e-3), (gc_ct, dict(mu=0.5, s1=160), 768, 1500, 128, 2e-3),
    (vct, dict(base='ecm', kernel='li'), 1, 1000, 256, 6e-3)])
def test_training_approaches_the_exact_consistency_function(module, settings, numbers, steps, batch, lr):
    """N(0, I) data: f -> x / sqrt(a² + t²), a = 1, or with `li` 1 - t / sigma_max, but for 5 % of their deviation.

    GC's pairs have a flow of their own; a network tells it from that of the data by |x| in 768 numbers, not in one.
    """
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(),
                                 torch.nn.Linear(64, 1))

    def net(x_in, c_noise, y=None):
        x, c = x_in.flatten(1), c_noise[:, None]
        size = x if numbers == 1 else 4 * (x.square().mean(1, keepdim=True).sqrt() - 1)
        return x_in + (1 if numbers == 1 else x_in) * wide(layers(torch.cat([size, c, c.square()], 1))[:, 0])

    preset = module.PRESETS['cifar10', 'ecm'] if module is vct else module.PRESETS['cifar10']
    args = argparse.Namespace(**preset | settings | dict(
        P_mean=0.5, seed=0, pretrain_steps=0, steps=steps, batch=batch, in_channels=numbers, resolution=1))
    m, kind = 0.002 if module is gc_ct else 0.0, dict(kernel='li') if module is vct else {}
    optimizer = torch.optim.Adam(layers.parameters(), lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        x0, eps = (common.randn((batch, 1, 1, numbers), step, stream) for stream in 'xe')
        t, r = module.level_pairs(args, step, torch.device('cpu'))
        if module is gc_ct:
            x0 = gc_ct.generator_coupling(net, x0, eps, r, None, common.rand((batch,), step, 'mix') < args.mu, m)
        x_t, x_r = (module.path(x0, eps, level, 'li') if kind else x0 + wide(level) * eps for level in (t, r))
        optimizer.zero_grad()
        module.loss(net, x_t, t, x_r, r, **module.loss_settings(args)).mean().backward()
        optimizer.step()
        rate.step()
    t = torch.logspace(math.log10(0.02), math.log10(80), 40).repeat_interleave(max(100, 20_000 // numbers))
    deviation = wide(((1 - t / 80 if kind else torch.ones_like(t)) ** 2 + t ** 2).sqrt())
    x = deviation * torch.randn(len(t), 1, 1, numbers)
    with torch.no_grad():
        assert (module.f(net, x, t, m=m, **kind) - x / deviation).square().mean().sqrt() < 0.05


@pytest.mark.parametrize('name, flags', [
    ('sct', '--schedule ect'), ('sct', '--schedule smooth --phases 3 --edges 0.3,2'),
    ('gc_ct', '--schedule ict --s0 4 --s1 16'), ('gc_ct', '--schedule ect'),
    ('vct', '--base ict --s0 4 --s1 16'), ('vct', '--base ecm'), ('vct', '--base ecm --kernel li')])
def test_the_levels_and_settings_that_a_run_trains_with(name, flags, few_shapes, spy, monkeypatch):
    script, tunes = Script(name), 'ict' not in flags
    own = dict(q=3.0, k=4.0, b=2.0, P_mean=-0.5, P_std=4.0, c=0.03) | ({} if name == 'gc_ct' else dict(weighting='edm'))
    for key, preset in script.module.PRESETS.items():
        monkeypatch.setitem(script.module.PRESETS, key, preset | own)
    calls = spy(script.module, 'loss')
    assert script.train('--batch', 64, '--steps', 5, '--pretrain-steps', 1, '--stages', 3, *flags.split()) == 0
    for done, call in enumerate(calls):
        if tunes:
            t = (-0.5 + 4 * common.randn((64,), 0, done + 1, 'level')).exp()
            t = t.clamp(max=80) if 'kernel' in flags else t
            stage = done / 4 * 3 if 'smooth' in flags else [0, 0, 1, 2][done]
            r = (t * (1 - (1 + 4 * torch.sigmoid(-2 * t)) / 3 ** (stage + 1))).clamp(min=0)
            if 'phases' in flags:
                r = r.maximum(torch.tensor([0, 0.3, 2])[(t > 0.3).long() + (t > 2).long()])
                assert done or (r == 2).any() and (r == torch.tensor(0.3)).any()
                close(call.edges, [0, 0.3, 2, 80])
        else:
            sigmas = torch.tensor(script.module.rho_levels([4, 8, 16, 16][done]))
            p = script.module.pair_probabilities(sigmas, -0.5, 4.0).cumsum(0)
            i = torch.searchsorted(p, common.rand((64,), 0, done + 1, 'level').double(), right=True)
            t, r = sigmas[i + 1], sigmas[i]
        torch.testing.assert_close(torch.stack([call.t, call.r]), torch.stack([t, r]))
        assert call.c == pytest.approx(0.03 if tunes else 0.03 * math.sqrt(3 * 8 * 8))
        assert name == 'gc_ct' or call.weighting == 'edm'
        assert name == 'sct' or call.m == (0.0 if tunes else 0.002)
    logged = [line['consistency' if name == 'vct' else 'loss'] for line in lines(script.out) if 'loss' in line]
    close(logged[1:], [call.result.mean().item() for call in calls])


@pytest.mark.parametrize('name, flags', [('sct', '--ref-size 1'), ('gc_ct', ''), ('gc_ct', '--coupling ot'),
                                         ('vct', ''), ('vct', '--coupling ot --kernel li')])
def test_pretraining_has_edms_levels_and_independent_pairs(name, flags, few_shapes, spy):
    pytest.importorskip('scipy') if 'ot' in flags else None
    script, calls = Script(name), spy(MODULES[name], 'denoising_loss')
    assert script.train(*TUNING[name], *flags.split(), '--steps', 3, '--pretrain-steps', 3, '--seed', 5) == 0
    for step, call in enumerate(calls):
        x0, y, eps = draws(step, seed=5)
        torch.testing.assert_close(call.t, (-1.2 + 1.2 * common.randn((8,), 5, step, 'level')).exp())
        share = wide(1 - call.t / 80) if 'kernel li' in flags else 1
        torch.testing.assert_close(call.x_t, share * x0 + wide(call.t) * eps)
        assert torch.equal(call.x0_hat if name == 'sct' else call.x0, x0) and torch.equal(call.y, y)
    assert len(calls) == 3 and (script.out / 'final.pt').exists()


@pytest.mark.parametrize('name', ['gc_ct', 'vct'])
def test_transport_moves_labels_with_their_images(name, few_shapes, spy):
    pytest.importorskip('scipy')
    calls = spy(MODULES[name], 'loss')
    assert Script(name).train('--batch', 32, '--steps', 1, '--coupling', 'ot') == 0
    (x0, y, eps), (call,) = draws(0, 32), calls
    order = MODULES[name].optimal_transport(x0, eps)
    assert sorted(order.tolist()) == list(range(32)) and order.tolist() != list(range(32))
    for x, level in ((call.x_t, call.t), (call.x_r, call.r)):
        torch.testing.assert_close(x, x0[order] + wide(level) * eps)
    assert torch.equal(call.y, y[order])


def test_labels_reach_every_network(script, spy):
    calls = spy(unet.SongUNet, 'forward')
    gc = ['--mu', 1] if script.name == 'gc_ct' else []
    assert script.train(*TUNING[script.name], '--steps', 2, '--pretrain-steps', 1, *gc) == 0
    asked = [call.class_labels for call in calls if len(call.x) == 8]
    first, second = (torch.nn.functional.one_hot(draws(step)[1], 10).float() for step in (0, 1))
    pretraining = dict(sct=1, gc_ct=1, vct=2)[script.name]              # an encoder is asked in both
    assert len(asked) == pretraining + dict(sct=2, gc_ct=3, vct=3)[script.name]
    assert all(torch.equal(y, first if i < pretraining else second) for i, y in enumerate(asked))
    calls.clear()
    script.module.sample(script.module.load(script.out), 4, nfe=2, labels=[7, 2])
    assert [call.class_labels.argmax(1).tolist() for call in calls] == [[7, 2, 7, 2]] * (2 + (script.name == 'vct'))


@pytest.mark.parametrize('name, flags', [(name, flags) for name, ways in {
    'sct': ['--no-cond', '--ref-size all', '--ref-size 5 --flip', '--ref-size 1 --dropout 0.2', '--pretrain-steps 1',
            '--precision bf16', '--phases 3 --eta 0.9', '--arch edm2 --dropout 0.1 --ema-std 0.1 --lr-decay 2'],
    'gc_ct': ['--no-cond', '--coupling ic', '--coupling ot', '--endpoint online', '--schedule ect --pretrain-steps 1',
              '--mults 1,1,2 --dropout 0.2,0,0 --blocks 1,2,1', '--schedule ect --coupling ic --precision bf16'],
    'vct': ['--no-cond', '--pretrain-steps 1', '--encoder big --dropout 0.2', '--arch edm2',
            '--huber vector --precision bf16 --microbatch 3', *(
                f'--base {base} --kernel {kernel} --coupling {coupling}' for base in ('ict', 'ecm')
                for kernel in ('ve', 'li') for coupling in ('independent', 'ot', 'vc'))]}.items() for flags in ways])
def test_every_way_to_train_and_sample(name, flags, few_shapes):
    pytest.importorskip('scipy') if 'ot' in flags else None
    script = Script(name)
    assert script.train('--steps', 2, '--sample-every', 2, '--eval-every', 2, '--fid-num', 10, *flags.split()) == 0
    *steps, judged = lines(script.out)
    assert [line['step'] for line in steps] == [1, 2] and any('pixel-FD' in name for name in judged)
    assert all(math.isfinite(value) for line in steps for value in line.values())
    encoder = name == 'vct' and 'independent' not in flags and 'ot' not in flags
    assert any(key.startswith('encoder.') for key in weights(script.out)) == encoder == (steps[0].get('kl', 0) > 0)
    images = script.module.sample(script.module.load(script.out / 'final.pt'), 4, nfe=3)
    assert images.shape == (4, 3, 8, 8) and images.isfinite().all()


@pytest.mark.parametrize('name, flags', [('sct', ''), ('gc_ct', ''), ('vct', '--kernel li --coupling independent'),
                                         ('vct', '--kernel ve'), ('vct', '--kernel li')])
def test_sampling_goes_down_the_levels_and_adds_noise(name, flags, few_shapes):
    """One step, two with the level of the settings in between, three by rho 7; with an encoder the noise it emits."""
    script = Script(name)
    assert script.train('--steps', 1, '--lr', 1, '--ema', 0, *flags.split()) == 0           # it ends beyond [-1, 1]
    module, model = script.module, script.module.load(script.out)
    net, y, low, high = common.network(model, 'fp32'), torch.arange(12) % 10, 0.002 ** (1 / 7), 80 ** (1 / 7)
    for sigmas in [80], [80, 0.821], [(low + i / 3 * (high - low)) ** 7 for i in (3, 2, 1)]:
        x = torch.zeros(12, 3, 8, 8)
        for i, sigma in enumerate(sigmas):
            eps = common.randn((12, 3, 8, 8), 3, i, 'sample')
            if i and hasattr(model, 'encoder'):
                mu, std = module.encode(common.network(model.encoder, 'fp32'), x, y)
                eps = mu + std * eps
            x_t = x * (1 - sigma / 80 if 'kernel li' in flags else 1) + sigma * eps
            kind = dict(kernel=model.config['kernel']) if name == 'vct' else {}
            x = module.f(net, x_t, torch.full((12,), float(sigma)), y, 0.002, **kind)
        torch.testing.assert_close(module.sample(model, 12, len(sigmas), seed=3), x.clamp(-1, 1), rtol=1e-4, atol=1e-4)
        assert x.abs().max() > 1


def test_the_published_start_is_for_the_published_network(script, capsys):
    for flags in '', '--width 16', '--attn-resolutions 8', '--cond', '--pretrain-steps 10', '--init none':
        assert script.run('--dataset', 'cifar10', *TUNING[script.name], *flags.split(), '--dry-run') == 0
        assert f'"init": "{"none" if flags else unet.URLS["cifar10"]}"' in capsys.readouterr().out
    assert script.run(*TUNING[script.name], '--init', 'mine.pt', '--dry-run') == 0
    assert '"pretrain_steps": 0' in capsys.readouterr().out                         # it would be trained away


def test_training_starts_from_the_networks_of_another_run(script, refused, capsys):
    assert script.train('--steps', 2, '--lr', 0.01) == 0
    init = ['--init', script.out / 'final.pt']
    assert script.train('--steps', 2, '--lr', 0, *init, '--out', 'again') == 0
    assert ('of the average' in capsys.readouterr().out) == (script.name != 'gc_ct')        # whose average is ramped
    start, again = ({name: value for name, value in weights(out).items() if not name.startswith('encoder.')}
                    for out in (script.out, 'again'))
    assert same(start, again)
    refused(script.module, [*script.small, '--width', 16, *init, '--out', 'x'], 'final.pt does not fit', '16', '8')
    assert not Path('x').exists()


@pytest.mark.parametrize('network, layer', [(unet.SongUNet, 'map_layer1'), (unet.EDM2UNet, 'emb_noise')])
def test_noise_levels_are_float32_in_16_bit_networks(network, layer):
    torch.manual_seed(0)
    model, outs = network(8, 3, 3, model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[]).eval(), []
    getattr(model, layer).register_forward_hook(lambda module, x, out: outs.append(out.float()))
    t = torch.tensor([1.0, 1.0 - 1 / 256])
    for precision in ('fp32', 'bf16'):
        common.network(model, precision)(torch.zeros(2, 3, 8, 8), t.log() / 4)
    assert torch.equal(*outs) and not torch.equal(*outs[0])
