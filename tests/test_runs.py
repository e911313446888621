"""What every script's run does: its folder, resuming, several processes, signals, errors. One test, all scripts."""
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import fid
from conftest import ROOT, SCRIPTS, TINY_NETWORK, all_shapes, lines, same, weights


def test_a_run_writes_its_folder(script):
    assert script.train('--sample-every', 2, '--eval-every', 4, '--fid-num', 10) == 0
    names = {p.name for p in script.out.iterdir()} - {'final-encoder.pt', 'best-encoder.pt'}
    assert names == {'config.json', 'metrics.jsonl', 'samples', 'curves.png', 'checkpoint.pt', 'final.pt', 'best.pt'}
    assert sorted(p.name for p in (script.out / 'samples').iterdir()) == ['0000002.png', '0000004.png']
    steps = [line for line in lines(script.out) if 'loss' in line]
    assert [line['step'] for line in steps] == [1, 2, 3, 4] and all(math.isfinite(line['loss']) for line in steps)
    judged = 'pixel-FD (10 images against the 200 training images), '
    assert any(name.startswith(judged) for name in lines(script.out)[-1])
    assert all(isinstance(value, torch.Tensor) for value in weights(script.out).values())
    assert 'enc.8x8_conv.weight' in weights(script.out)
    assert not any('encoder' in name for name in weights(script.out))


def test_same_seed_same_run_and_resumed_run_bit_for_bit(script, monkeypatch):
    flags = ['--dropout', '0.3', '--steps', '6', '--pretrain-steps', '2', '--save-every', '3', '--lr', '1e-3']
    assert script.train(*flags, '--out', 'a') == script.train(*flags, '--out', 'b') == 0
    assert same(weights('a'), weights('b'))

    class Stop(Exception):
        pass
    original = common.save_checkpoint

    def save_and_stop(*args, **parts):
        original(*args, **parts)
        raise Stop
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(common, 'save_checkpoint', save_and_stop)
        script.train(*flags, '--out', 'c')
    with open('c/metrics.jsonl', 'a') as file:              # steps after the checkpoint are done again, and noted once
        file.write('{"step": 4, "loss": 0.0, "grad_norm": 1.0}\n')
    assert script.run('--resume', '--out', 'c') == 0
    assert same(weights('a'), weights('c')) and lines('a') == lines('c')
    a, c = (torch.load(Path(out) / 'checkpoint.pt', weights_only=True) for out in 'ac')
    assert same(a['ema'], c['ema']) and same(a['net'], c['net'])
    assert script.train(*flags, '--out', 'd', '--seed', 1) == 0
    assert not torch.equal(weights('d')['map_layer0.weight'], weights('a')['map_layer0.weight'])


def test_a_resumed_run_keeps_its_longer_end(script):
    assert script.train() == 0 and script.run('--resume', '--out', script.out, '--steps', 6) == 0
    assert json.loads((script.out / 'config.json').read_text())['steps'] == 6


def test_the_average_of_the_weights(script):
    """After the second step it is d times what it was, and 1 - d times the network."""
    assert script.train('--steps', 2, '--save-every', 1, '--ema', 0.9, '--lr', 0.01) == 0
    before, after = (weights(script.out, name) for name in ('previous.pt', 'checkpoint.pt'))
    assert (before['step'], after['step']) == (1, 2)
    d = min(1 - 2 ** (-2 / 3), 0.9) if script.name == 'gc_ct' else 0.9            # GC's average warms up
    for name, value in after['ema'].items():
        torch.testing.assert_close(value, d * before['ema'][name] + (1 - d) * after['net'][name])


def test_microbatches_equal_the_whole_batch(script):
    assert script.train('--out', 'a') == script.train('--out', 'b', '--microbatch', 3) == 0
    for name, rtol in (('loss', 1e-4), ('grad_norm', 1e-3)):
        a, b = ([line[name] for line in lines(out) if name in line] for out in 'ab')
        np.testing.assert_allclose(a, b, rtol=rtol)


def test_the_optimisers_settings_are_the_presets(script, monkeypatch):
    preset = script.module.PRESETS['shapes'] | dict(lr=3e-4, lr_decay=None, betas=(0.8, 0.95))
    monkeypatch.setitem(script.module.PRESETS, 'shapes', preset)
    assert script.train('--steps', 1) == 0
    group, = weights(script.out, 'checkpoint.pt')['optimizer']['param_groups']
    assert group['lr'] == 3e-4 and tuple(group['betas']) == (0.8, 0.95)


def test_student_and_teacher_are_one_network(script, monkeypatch):
    """The teacher has the student's own weights, not their average."""
    networks, plain = [], common.network
    monkeypatch.setattr(common, 'network', lambda net, precision: (networks.append(net), plain(net, precision))[1])
    assert script.train('--steps', 1) == 0
    student, teacher = networks[:2]
    assert student is teacher and student.training


TUNING = {'gc_ct': ['--schedule', 'ect'], 'vct': ['--base', 'ecm'], 'sct': []}


def test_tuning_starts_from_the_diffusion_models_average_with_a_fresh_optimiser(script, monkeypatch):
    """One step of Adam away from the average; a first one changes every weight by the learning rate."""
    seen, plain, name = [], common.update_ema, 'enc.8x8_conv.weight'
    monkeypatch.setattr(common, 'update_ema', lambda ema, net, decay: (seen.append(
        (net.state_dict()[name] - ema.state_dict()[name]).abs()), plain(ema, net, decay))[1])
    assert script.train(*TUNING[script.name], '--pretrain-steps', 3, '--lr', 0.01, '--ema', 0.9) == 0
    torch.testing.assert_close(seen[3], torch.full_like(seen[3], 0.01), rtol=0, atol=1e-4)
    assert seen[2].max() > 0.011


def test_rate_and_average_count_from_the_start_of_tuning(script, monkeypatch):
    rates, decays, rate, decay = [], [], common.learning_rate, common.ema_decay
    monkeypatch.setattr(common, 'learning_rate', lambda *inputs: (rates.append(inputs[1:]), rate(*inputs))[1])
    monkeypatch.setattr(common, 'ema_decay', lambda *inputs: (decays.append(inputs), decay(*inputs))[1])
    flags = [] if script.name == 'gc_ct' else ['--ema-std', 0.1]                # GC's average is its own: test_gc_ct.py
    assert script.train(*TUNING[script.name], '--steps', 5, '--pretrain-steps', 2, '--lr-decay', 7, '--lr', 0.01,
                        '--ema', 0.9, *flags) == 0
    assert rates == [(done, 0.01, 7) for done in (0, 1, 0, 1, 2)]
    assert decays == ([(done, 0.9, 0.1) for done in (1, 2, 1, 2, 3)] if flags else [])


def test_gradients_of_two_parts_average_to_that_of_the_whole_batch(script, monkeypatch):
    """What several processes rely on: each divides by its own number of images."""
    finish, gradients = common.finish_gradients, []

    def note(params, precision):
        params = list(params)
        gradients.append([p.grad.clone() for p in params])
        return finish(params, precision)
    monkeypatch.setattr(common, 'finish_gradients', note)
    for first, last in ((0, 8), (0, 4), (4, 8)):
        monkeypatch.setattr(common, 'my_part', lambda batch: slice(first, last))
        monkeypatch.setattr(common, 'microbatches', lambda *inputs: [(slice(0, last - first), 0)])
        assert script.train('--steps', 1, '--out', f'{first}-{last}') == 0
    for whole, a, b in zip(*gradients):
        torch.testing.assert_close((a + b) / 2, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


def test_two_processes_equal_one(script, command, monkeypatch, tmp_path):
    """20 steps, dropout 0, gloo: losses and weights agree to rounding."""
    flags = [*script.small, '--steps', 20, '--device', 'cpu', '--lr', '1e-4']
    monkeypatch.setattr(common, 'shapes', all_shapes)               # as many as the command draws
    assert script.run(*flags, '--out', 'one') == 0
    done = command(f'{script.name}.py', *flags, '--out', 'two', '--gpus', 2)
    assert done.returncode == 0, done.stderr
    one, two = ([line['loss'] for line in lines(tmp_path / out)[:20]] for out in ('one', 'two'))
    np.testing.assert_allclose(one, two, rtol=2e-3)
    one, two = (weights(tmp_path / out) for out in ('one', 'two'))
    for name in one:
        # The sign that Lion takes turns where rounding decides it: 20 steps of 1e-4, twice.
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=4e-3 if script.name == 'gc_ct' else 1e-3)


def test_samples_and_evaluation(script, capsys):
    assert script.train() == 0
    model = script.module.load(script.out)
    one = script.module.sample(model, 12, seed=3)
    assert one.shape == (12, 3, 8, 8) and one.abs().max() <= 1
    assert torch.equal(one, script.module.sample(model, 12, seed=3))
    assert not torch.equal(one, script.module.sample(model, 12, seed=4))
    assert not torch.equal(script.module.sample(model, 12, labels=[7], seed=3), one)
    assert torch.equal(one, script.module.sample(script.module.load(script.out / 'final.pt'), 12, seed=3))
    for source in (script.out, script.out / 'checkpoint.pt', script.out / 'final.pt'):
        assert script.run('--sample', source, '--n', 6, '--nfe', '1,4', '--labels', '1,2') == 0
        assert script.run('--sample', source, '--n', 18, '--nfe', 2) == 0
    assert {p.name for p in script.out.glob('*.png')} == {'curves.png', 'sample-1-4-steps.png', 'sample-2-step.png'}
    assert script.run('--sample', script.out, '--n', 18, '--nfe', '1,4') == 0               # strips of 16 and of 2
    strips = np.asarray(Image.open(script.out / 'sample-1-4-steps.png'))
    assert strips.shape[:2] == (4 * 66 + 2, 16 * 66 + 2)
    model_images = [common.to_uint8(script.module.sample(model, 18, nfe)).permute(0, 2, 3, 1).numpy() for nfe in (1, 4)]
    tile = lambda row, column: strips[2 + 66 * row:66 + 66 * row:8, 2 + 66 * column:66 + 66 * column:8]
    for row, column, nfe, i in [(0, 0, 0, 0), (0, 15, 0, 15), (1, 3, 1, 3), (2, 1, 0, 17), (3, 0, 1, 16)]:
        np.testing.assert_array_equal(tile(row, column), model_images[nfe][i])
    assert (tile(3, 2) == 255).all()
    assert script.run('--evaluate', script.out, '--nfe', '1,2', '--fid-num', 50) == 0
    out = capsys.readouterr().out
    assert 'pixel-FD (50 images against the 200 training images), 1 step: ' in out and '2 steps: ' in out


def test_sampling_clips_the_images_at_the_end_alone(script, monkeypatch):
    assert script.train('--steps', 1, *['--coupling', 'independent'] * (script.name == 'vct')) == 0
    model, seen = script.module.load(script.out), []
    monkeypatch.setattr(script.module, 'f', lambda net, x, *rest: (seen.append(x), torch.full_like(x, 3.0))[1])
    assert (script.module.sample(model, 2, nfe=2, seed=3) == 1).all()
    torch.testing.assert_close(seen[1], 3 + 0.821 * common.randn((2, 3, 8, 8), 3, 1, 'sample'))


def test_precision_of_sampling_is_the_flags(script):
    assert script.train('--ema', 0, '--lr', 0.01) == 0
    for precision in ('fp32', 'bf16'):
        assert script.run('--sample', script.out, '--precision', precision, '--out', precision) == 0
    assert Path('fp32/sample-1-step.png').read_bytes() != Path('bf16/sample-1-step.png').read_bytes()


def test_lots_of_samples_go_through_all_classes():
    """150 classes in lots of 100: every class is sampled equally often."""
    labels = torch.cat([common.choose_labels(100, None, 150, first=100 * j) for j in range(3)])
    assert labels.bincount().tolist() == [2] * 150
    asked = []

    def draw(n, nfe, seed, first):
        asked.append(common.choose_labels(n, None, 150, first))
        return torch.zeros(n, 3, 1, 1)
    args = common.argparse.Namespace(seed=0, fid_num=300, nfe=[1])
    features = lambda x: x.flatten(1).double() + torch.rand(len(x), 3)
    fid.evaluate((features, 'pixel-FD', (np.zeros(3), np.eye(3), 9)), args, draw)
    assert torch.cat(asked).bincount().tolist() == [2] * 150


def test_zip_as_data_dir_and_labels_in_the_name(script, capsys, refused, tmp_path):
    for i in range(6):
        Image.fromarray(common.draw_shape(i, 8).transpose(1, 2, 0)).save(tmp_path / f'{i}.png')
    with zipfile.ZipFile(tmp_path / 'p.zip', 'w') as archive:
        for i in range(6):
            archive.write(tmp_path / f'{i}.png', f'class{i % 2}/{i}.png')
    folder = ['--dataset', 'folder', '--data-dir', 'p.zip', *TINY_NETWORK, *SCRIPTS[script.name], '--batch', 8,
              '--steps', 4, '--fid-features', 'pixels', '--fid-num', 9]
    assert script.run(*folder, '--cond', '--out', 'a') == 0 and script.run('--evaluate', 'a', '--labels', 1) == 0
    assert 'classes [1] only' in capsys.readouterr().out
    refused(script.module, [*folder, '--init', 'http://127.0.0.1:9/n.pkl', '--out', 'b'], 'could not be downloaded')


def test_wrong_flags(script, refused, tmp_path):
    module, name = script.module, script.name
    assert script.train() == 0
    refused(module, '--dataset nothing', '--dataset nothing', 'shapes')
    refused(module, script.small, f'runs/{name}-shapes holds a run', '--resume', '--overwrite')
    refused(module, '--resume --out nowhere', 'nowhere holds no run')
    refused(module, '--resume --width 16', '--width is 16', 'made with 8')
    refused(module, '--resume --seed 5', '--seed is 5')
    refused(module, [*script.small, '--eval-every', 4, '--fid-ref', 'nowhere.npz', '--out', 'x'], 'nowhere.npz')
    refused(module, [*script.small, '--labels', 99, '--out', 'x'], '--labels 99')
    refused(module, '--steps 0', '--steps')
    refused(module, '--lr nan', '--lr')
    refused(module, '--stepz 3', '--stepz')
    refused(module, '--pretrain-steps 10 --steps 9 --out x', '--pretrain-steps 10')
    refused(module, '--batch 9 --gpus 2 --device cpu --out x', '--batch 9', '2 processes')
    refused(module, '--dataset cifar10 --data-dir nowhere/at/all --resolution 16 --out x', 'nowhere')
    refused(module, '--sample nowhere', 'nowhere')
    refused(module, f'--sample runs/{name}-shapes --labels 10', '--labels', '10 classes')
    refused(module, ['--sample', __file__], 'test_runs.py', 'cannot be read')
    refused(module, f'--evaluate runs/{name}-shapes --fid-ref nowhere.npz', 'nowhere.npz')
    refused(module, '--mults 1,2,2,2,2,2 --out x', 'cannot be halved')
    refused(module, '--arch edm2 --width 40 --out x', 'channels_per_head')
    Path('file').write_text('')
    refused(module, [*script.small, '--out', 'file'], 'file is a file')
    refused(module, f'--sample runs/{name}-shapes --out file', 'file')
    other = next(other for other in SCRIPTS if other != name)
    refused(importlib.import_module(other), f'--sample runs/{name}-shapes', f'run of {name}.py, not of {other}.py')
    if not torch.cuda.is_available():
        refused(module, '--device cuda --out x', 'no GPU')
        refused(module, '--gpus 8 --out x', '--gpus 8')
    assert not Path('x').exists() and sorted(p.name for p in tmp_path.iterdir()) == ['file', 'runs']


def test_help_shows_the_settings_in_force(script, capsys):
    with pytest.raises(SystemExit):
        script.module.main(['--dataset', 'cifar10', '--help'])
    text = ' '.join(capsys.readouterr().out.split())
    preset = script.module.PRESETS['cifar10']
    assert f'[{preset["steps"]}]' in text and '[128]' in text and 'https://arxiv.org/abs/' in text


def test_dry_run_writes_nothing(script, capsys, tmp_path):
    assert script.run('--dataset', 'cifar10', '--dry-run') == 0
    assert json.loads(capsys.readouterr().out)['batch'] == script.module.PRESETS['cifar10']['batch']
    assert not list(tmp_path.iterdir())


def test_benchmark_accounts_for_the_step(script, capsys, tmp_path):
    assert script.train('--benchmark', 1) == 0
    out = capsys.readouterr().out
    for part in ('img/s', 'data', 'student', 'teacher', 'loss', 'backward', 'optimiser', 'EMA', 'peak memory'):
        assert part in out
    share = float(out.split('TFLOP/s a process, ')[1].split('%')[0])
    assert 0 < share < 110                                      # of the rate of a matrix product in the same run
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number, gpus', [('SIGTERM', 1), ('SIGINT', 2)])
def test_a_signal_ends_the_run_with_a_checkpoint(script, few_pictures, tmp_path, number, gpus):
    endless = [*few_pictures, *script.small, '--steps', '100000', '--device', 'cpu', '--gpus', str(gpus),
               '--out', 'run']
    process = subprocess.Popen([sys.executable, str(ROOT / f'{script.name}.py'), *endless], stdout=subprocess.PIPE,
                               text=True, cwd=tmp_path, start_new_session=True)
    metrics = tmp_path / 'run/metrics.jsonl'
    while not (metrics.exists() and metrics.read_text().count('\n') > 2):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, getattr(signal, number))                             # as a terminal does: to the whole group
    out, _ = process.communicate(timeout=60)
    step = lines(tmp_path / 'run')[-1]['step']
    assert process.returncode == 0 and f'python {script.name}.py --resume --out run' in out
    assert weights(tmp_path / 'run', 'checkpoint.pt')['step'] == step


def test_divergence_stops_the_run(script, capsys):
    assert script.train('--steps', 40, '--lr', '1e30', '--save-every', 5) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '20 steps in a row' in error and not (script.out / 'final.pt').exists()
