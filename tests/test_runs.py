"""What every script's run does: its folder, resuming, several processes, signals, errors. One test, all scripts."""
import importlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
import sct
import vct
from conftest import ROOT, SCRIPTS, Script, lines, same, weights
from test_common import signals                                                 # noqa: F401: a fixture

TUNING = {'gc_ct': ['--schedule', 'ect'], 'vct': ['--base', 'ecm'], 'sct': []}


def steps(out):
    return [line for line in lines(out) if 'loss' in line]


# Training

def test_a_run_writes_its_folder(script, capsys):
    assert script.train('--sample-every', 2, '--eval-every', 4, '--fid-num', 10) == 0
    assert {path.name for path in script.out.rglob('*')} == {
        'config.json', 'metrics.jsonl', 'samples', 'curves.png', 'checkpoint.pt', 'final.pt', '0000002.png',
        '0000004.png'}
    assert [line['step'] for line in steps(script.out)] == [1, 2, 3, 4]
    assert all(math.isfinite(line['loss']) for line in steps(script.out))
    assert any(name.startswith('pixel-FD (10 images against the 200 training') for name in lines(script.out)[-1])
    final = weights(script.out)
    assert all(isinstance(value, torch.Tensor) for value in final.values()) and 'enc.8x8_conv.weight' in final
    assert any(name.startswith('encoder.') for name in final) == (script.name == 'vct')
    assert re.search(r'^step 4/4  loss .*  grad_norm .* img/s  0:00:00 left$', capsys.readouterr().out, re.M)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(script, monkeypatch):
    flags = ['--dropout', '0.3', '--steps', '6', '--pretrain-steps', '2', '--save-every', '3', '--lr', '1e-3']
    assert script.train(*flags, '--out', 'a') == 0
    plain = common.write_atomic
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(common, 'write_atomic', lambda path, *rest, **previous: (
            plain(path, *rest, **previous), 1 / (path.name != 'checkpoint.pt')))
        script.train(*flags, '--out', 'b')
    with open('b/metrics.jsonl', 'a') as file:              # steps after the checkpoint are done again, and noted once
        file.write('{"step": 4, "loss": 0.0, "grad_norm": 1.0}\n{"step": 5, "lo')
    assert script.run('--resume', '--out', 'b') == 0
    a, b = (weights(out, 'checkpoint.pt') for out in 'ab')
    assert same(a['ema'], b['ema']) and same(a['net'], b['net']) and same(weights('a'), weights('b'))
    assert lines('a') == lines('b')
    assert script.train(*flags, '--out', 'c', '--steps', 2, '--seed', 1) == 0 and lines('c')[0] != lines('a')[0]


def test_a_resumed_run_evaluates_what_it_did_and_may_be_longer(script):
    assert script.train('--nfe', '2,1', '--labels', '3', '--eval-every', 2, '--fid-num', 10) == 0
    assert script.run('--resume', '--out', script.out, '--steps', 6) == 0
    assert json.loads((script.out / 'config.json').read_text())['steps'] == 6
    names = [[name for name in line if 'pixel-FD' in name] for line in lines(script.out) if 'loss' not in line]
    assert len(names) == 3 and all(row == names[0] for row in names) and 'classes [3] only), 2 step' in names[0][0]


def test_the_average_and_the_optimiser_are_those_of_the_settings(script, monkeypatch):
    """After the second step the average is d times what it was, and 1 - d times the network."""
    preset = script.module.PRESETS['shapes'] | dict(lr=3e-3, lr_decay=None, betas=(0.8, 0.95))
    monkeypatch.setitem(script.module.PRESETS, 'shapes', preset)
    assert script.train('--steps', 2, '--pretrain-steps', 0, '--save-every', 1, '--ema', 0.9) == 0
    before, after = (weights(script.out, name) for name in ('previous.pt', 'checkpoint.pt'))
    assert (before['step'], after['step']) == (1, 2)
    d = min(1 - 2 ** (-2 / 3), 0.9) if script.name == 'gc_ct' else 0.9            # GC's average warms up
    for name, value in after['ema'].items():
        torch.testing.assert_close(value, d * before['ema'][name] + (1 - d) * after['net'][name])
    group, = after['optimizer']['param_groups']
    assert group['lr'] == 3e-3 and tuple(group['betas']) == (0.8, 0.95)


@pytest.mark.parametrize('module', [sct, vct])
def test_the_power_function_average(module):
    """The widths and exponents of EDM2: std 0.05 and 0.10 are gamma 16.97 and 6.94. Tuning counts anew."""
    decay = lambda step, ema_std=None, pretrain_steps=0: module.ema_decay(
        Namespace(ema=0.5, ema_std=ema_std, pretrain_steps=pretrain_steps), step)
    for std, gamma in [(0.05, 16.97), (0.10, 6.94)]:
        assert abs(np.log(decay(999, std)) / np.log(1 - 1 / 1000) - 1 - gamma) < 0.005
    assert decay(0, 0.1) == 0 and decay(6) == 0.5 and decay(1050, 0.1, pretrain_steps=50) == decay(1000, 0.1)
    assert decay(9, 0.1, pretrain_steps=10) == pytest.approx(0.25) and decay(99, pretrain_steps=100) == 0.5


def test_microbatches_equal_the_whole_batch(script):
    assert script.train('--out', 'a') == script.train('--out', 'b', '--microbatch', 3) == 0
    for name, rtol in (('loss', 1e-4), ('grad_norm', 1e-3)):
        a, b = ([line[name] for line in steps(out)] for out in 'ab')
        np.testing.assert_allclose(a, b, rtol=rtol)


def test_the_teacher_has_the_students_own_weights_and_not_their_average(script, spy, monkeypatch):
    calls = spy(script.module, 'loss')
    monkeypatch.setattr(common, 'update_ema', lambda *_: None)
    assert script.train('--lr', 0.01) == 0
    with torch.no_grad():
        outs = [getattr(calls[3], name)(calls[3].x_t, calls[3].t, calls[3].y) for name in ('net', 'teacher')]
    assert len(calls) == 4 and torch.equal(*outs)


def test_tuning_continues_from_the_diffusion_models_average_with_a_fresh_optimiser(script, monkeypatch):
    """One step of Adam or Lion away: a first one changes every weight by the learning rate, which counts anew."""
    rates, gaps, update = [], [], common.update_ema
    weight = lambda net: net.state_dict()['enc.8x8_conv.weight']
    monkeypatch.setattr(common, 'update_ema', lambda ema, net, *rest: (
        gaps.append((weight(net) - weight(ema)).abs()), update(ema, net, *rest)))
    monkeypatch.setattr(script.module, 'ema_decay', lambda *_: 0.9)
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]['lr']))
    assert script.train(*TUNING[script.name], '--steps', 6, '--pretrain-steps', 3, '--lr', 0.01, '--lr-decay', 1) == 0
    hook.remove()
    torch.testing.assert_close(gaps[3], torch.full_like(gaps[3], 0.01), rtol=0, atol=1e-4)
    assert gaps[2].max() > 0.011
    np.testing.assert_allclose(rates, [0.01 / max(done, 1) ** 0.5 for done in (0, 1, 2, 0, 1, 2)])


def test_gradients_that_are_not_finite_are_noted_and_change_nothing(script, monkeypatch):
    plain, scales = common.backward, iter([1, math.nan, math.inf, 1, 1])
    monkeypatch.setattr(common, 'backward', lambda values, *rest: plain(values * next(scales), *rest))
    assert script.train('--steps', 5) == 0
    assert [line['grad_norm'] in ('nan', 'inf') for line in steps(script.out)] == [False, True, True, False, False]
    assert all(value.isfinite().all() for value in weights(script.out).values())


def test_divergence_stops_the_run(script, capsys):
    assert script.train('--steps', 40, '--lr', '1e30', '--save-every', 5) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '20 steps in a row' in error and not (script.out / 'final.pt').exists()


# Several processes, signals

TWO_OF_EACH = """
import json, os, sys
import common, fid, gc_ct, sct, vct
draw = common.shapes
common.shapes = lambda n=200, resolution=16: draw(n, resolution)
for name, env, argv in json.loads(sys.argv[1]):
    copies = []
    for rank in '01':
        copies.append(os.fork())
        if not copies[-1]:
            os.environ.update({key: rank if value == 'RANK' else value for key, value in env.items()})
            os._exit(common.run(globals()[name].main, argv))
    assert [os.waitpid(copy, 0)[1] for copy in copies] == [0, 0], name
"""
BOTH = dict(RANK='RANK', LOCAL_RANK='RANK', WORLD_SIZE='2')
LAUNCH = dict(      # what torchrun, srun and --gpus tell the processes
    sct=BOTH | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}'), vct=BOTH | dict(INIT_METHOD='file://{folder}/met'),
    gc_ct=dict(SLURM_STEP_NUM_TASKS='2', SLURM_PROCID='RANK', SLURM_LOCALID='RANK', MASTER_PORT='{port}',
               SLURM_LAUNCH_NODE_IPADDR='127.0.0.1'))
FOR_TWO = ['--steps', '10', '--device', 'cpu', '--lr', '1e-4', '--eval-every', '10', '--fid-num', '120']


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A folder with a run of each script by two processes (gloo)."""
    folder, tasks = tmp_path_factory.mktemp('two'), []
    for name, env in LAUNCH.items():
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            env = {key: value.format(folder=folder, port=free.getsockname()[1]) for key, value in env.items()}
        tasks.append((name, env, [*Script(name).small, *FOR_TWO, '--out', name]))
    done = subprocess.run([sys.executable, '-c', TWO_OF_EACH, json.dumps(tasks)], cwd=folder, capture_output=True,
                          text=True, timeout=250, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_equal_one(script, two, monkeypatch):
    """10 steps: losses, weights and the Fréchet distance agree to rounding. A Slurm job of one task is one process."""
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
    assert script.train(*FOR_TWO, '--out', 'one') == 0
    values = lambda out: [[value for name, value in line.items() if name != 'kl'] for line in lines(out)]
    one, both = values('one'), values(two / script.name)
    np.testing.assert_allclose(one[:10], both[:10], rtol=5e-3)
    np.testing.assert_allclose(one[10], both[10], rtol=1e-3)
    one, both = weights('one'), weights(two / script.name)
    for name in one:
        # The sign that Lion takes turns where rounding decides it: 10 steps of 1e-4, twice.
        torch.testing.assert_close(one[name], both[name], rtol=1e-3, atol=2e-3 if script.name == 'gc_ct' else 1e-3)


@pytest.mark.slow
def test_torchrun_runs_the_script(few_pictures, tmp_path):
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', ROOT / 'sct.py']
    small = [*few_pictures, *Script('sct').small, '--batch', '4', '--steps', '2', '--device', 'cpu', '--out', 'run']
    subprocess.run([*torchrun, *small], cwd=tmp_path, check=True, timeout=200)
    assert (tmp_path / 'run/final.pt').exists() and len(steps(tmp_path / 'run')) == 2


def start(name, cwd, *flags):
    return subprocess.Popen([sys.executable, str(ROOT / f'{name}.py'), *map(str, flags)], cwd=cwd, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def endless(name, gpus, data, cwd):
    """A process that trains until it is stopped, after its first steps."""
    process, metrics = start(name, cwd, *data, *Script(name).small, '--steps', 100_000, '--device', 'cpu', '--gpus',
                             gpus, '--out', 'run'), cwd / 'run/metrics.jsonl'
    while not (metrics.exists() and metrics.read_text().count('\n') > 2):
        assert process.poll() is None
        time.sleep(0.1)
    return process


@pytest.mark.parametrize('name, number, gpus', [('sct', 'SIGINT', 2), ('sct', 'SIGTERM', 1)])
def test_a_signal_ends_the_run(name, number, gpus, few_pictures, tmp_path):
    """With a checkpoint and the command that resumes, for a process alone and for those that --gpus starts."""
    process = endless(name, gpus, few_pictures, tmp_path)
    os.killpg(process.pid, getattr(signal, number))                             # as a terminal does: to the whole group
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == '' and f'python {name}.py --resume --out run' in out
    assert weights(tmp_path / 'run', 'checkpoint.pt')['step'] == lines(tmp_path / 'run')[-1]['step']


def test_a_signal_is_heard_between_steps(script, monkeypatch, capsys, signals):
    plain = common.update_ema
    monkeypatch.setattr(common, 'update_ema', lambda *args: (plain(*args), os.kill(os.getpid(), signal.SIGTERM)))
    assert script.train('--out', 'run') == 0
    assert weights('run', 'checkpoint.pt')['step'] == 1 == len(lines('run')) and not Path('run/final.pt').exists()
    assert f'python {script.name}.py --resume --out run' in capsys.readouterr().out


# What is done with a run

def test_samples_and_evaluation(script, capsys):
    assert script.train('--ema', 0, '--lr', 0.01) == 0
    model = script.module.load(script.out)
    one = script.module.sample(model, 12, seed=3)
    assert one.shape == (12, 3, 8, 8) and one.abs().max() <= 1
    assert torch.equal(one, script.module.sample(model, 12, seed=3))
    assert not torch.equal(one, script.module.sample(model, 12, seed=4))
    assert not torch.equal(script.module.sample(model, 12, labels=[7], seed=3), one)
    for file in ('checkpoint.pt', 'final.pt'):
        assert torch.equal(one, script.module.sample(script.module.load(script.out / file), 12, seed=3))
        assert script.run('--sample', script.out / file, '--n', 6, '--nfe', 2, '--labels', '1,2') == 0
    assert script.run('--sample', script.out, '--n', 18, '--nfe', '1,2') == 0               # a row each
    names = {path.name for path in script.out.glob('*.png')}
    assert names == {'curves.png', 'sample-1-2-steps.png', 'sample-2-steps.png'}
    assert script.run('--sample', script.out, '--n', 6, '--nfe', 2, '--labels', '1,2', '--precision', 'bf16',
                      '--out', 'bf16') == 0
    assert Path('bf16/sample-2-steps.png').read_bytes() != (script.out / 'sample-2-steps.png').read_bytes()
    strips = np.asarray(Image.open(script.out / 'sample-1-2-steps.png'))
    assert strips.shape[:2] == (2 * 66 + 2, 18 * 66 + 2)
    images = [common.to_uint8(script.module.sample(model, 18, nfe)).permute(0, 2, 3, 1).numpy() for nfe in (1, 2)]
    tile = lambda row, column: strips[2 + 66 * row:66 + 66 * row:8, 2 + 66 * column:66 + 66 * column:8]
    for row, column, wanted in [(0, 0, images[0][0]), (0, 17, images[0][17]), (1, 3, images[1][3])]:
        assert (tile(row, column) == wanted).all()
    assert script.run('--evaluate', script.out, '--nfe', '1,2', '--fid-num', 50) == 0
    out = capsys.readouterr().out
    assert 'pixel-FD (50 images against the 200 training images), 1 step: ' in out and '2 steps: ' in out


def test_sampling_clips_the_images_at_the_end_alone(script, monkeypatch):
    assert script.train('--steps', 1, *['--coupling', 'independent'] * (script.name == 'vct')) == 0
    model, seen = script.module.load(script.out), []

    monkeypatch.setattr(script.module, 'f', lambda net, x, *rest: (seen.append(x), torch.full_like(x, 3.0))[1])
    assert (script.module.sample(model, 2, nfe=2, seed=3) == 1).all()
    torch.testing.assert_close(seen[1], 3 + 0.821 * common.randn((2, 3, 8, 8), 3, 1, 'sample'))


def test_a_benchmark_accounts_for_the_step_and_leaves_a_run_alone(script, monkeypatch, capsys):
    assert script.train('--steps', 2) == 0
    files = lambda: {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()}
    before, step = files(), common.Log.step
    assert script.train('--benchmark', 1) == 0 and files() == before
    out = capsys.readouterr().out
    for part in ('img/s', 'Self CPU', 'aten::'):
        assert part in out
    share = float(out.split('TFLOP/s a process, ')[1].split('%')[0])
    assert 0 < share < 110                                      # of the rate of a matrix product in the same run
    monkeypatch.setattr(common.Log, 'step', lambda self, *args, **values: (
        step(self, *args, **values), setattr(self, 'stop', True)))              # Ctrl-C
    assert script.train('--benchmark', 1) == 0 and files() == before


# Flags

def test_wrong_flags_are_refused_in_one_line(script, refused, tmp_path):
    module, name = script.module, script.name
    other = next(other for other in SCRIPTS if other != name)
    assert script.train('--steps', 1) == 0
    Path('file').write_text('')
    Path('file.pt').write_text('no checkpoint')
    run = f'runs/{name}-shapes'
    for flags, *words in [
            ('--dataset nothing', 'nothing', 'shapes'), ('', f'{run} holds a run', '--resume', '--overwrite'),
            ('--resume --out nowhere', 'nowhere holds no run'), ('--resume --width 16', '--width is 16', 'made with 8'),
            ('--resume --seed 5', '--seed is 5'), ('--steps 0 --out x', '--steps'), ('--lr nan --out x', '--lr'),
            ('--stepz 3 --out x', '--stepz'), ('--step 3 --out x', '--step'), ('--steps', '--steps'),
            ('--eval-every 4 --fid-ref nowhere.npz --out x', 'nowhere.npz'), ('--labels 99 --out x', '--labels 99'),
            ('--pretrain-steps 10 --steps 9 --out x', '--pretrain-steps 10'), ('--out file', 'file'),
            ('--batch 9 --gpus 2 --device cpu --out x', '--batch 9', '2 processes'),
            ('--dataset cifar10 --data-dir nowhere/at/all --resolution 16 --out x', 'nowhere'),
            ('--sample nowhere', 'nowhere'), (f'--sample {run} --evaluate {run}', 'one at a time'),
            (f'--sample {run} --labels 10', '--labels', '10 classes'), ('--sample file.pt', 'cannot be read'),
            (f'--evaluate {run} --fid-ref nowhere.npz', 'nowhere.npz'), (f'--sample {run} --out file', 'file'),
            ('--resolution 20 --mults 1,2,2,2 --out x', '--arch', '20'), ('--init nowhere --out x', 'nowhere'),
            ('--init http://127.0.0.1:9/n.pkl --out x', 'could not be downloaded')]:
        free = flags.startswith('--resume') or '--sample' in flags or '--evaluate' in flags
        refused(module, [*([] if free else script.small), *flags.split()], *words)
    refused(importlib.import_module(other), f'--sample {run}', f'run of {name}.py, not of {other}.py')
    if not torch.cuda.is_available():
        refused(module, '--device cuda --out x', 'no GPU')
        refused(module, '--gpus 8 --out x', '--gpus 8')
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'file.pt', 'runs'}


def test_help_shows_the_settings_in_force(script, capsys, tmp_path):
    with pytest.raises(SystemExit):
        script.module.main(['--dataset', 'cifar10', '--batch', '77', '--help'])
    text = capsys.readouterr().out
    assert f'[{script.module.PRESETS["cifar10"]["steps"]}]' in text and '[77]' in text and 'arxiv.org/abs/' in text
    assert re.findall(r'^(\w[\w ]*):$', text, re.M) == [
        'data', 'network', 'method', 'optimisation', 'run', 'sampling and evaluation']
    assert script.run('--dataset', 'cifar10', '--dry-run') == 0
    assert json.loads(capsys.readouterr().out)['batch'] == script.module.PRESETS['cifar10']['batch']
    assert not list(tmp_path.iterdir())
