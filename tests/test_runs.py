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

import common
import fid
import sct
import vct
from conftest import ROOT, SCRIPTS, TUNING, Script, all_shapes, endless, lines, same, start, stop, weights


def steps(out):
    return [line for line in lines(out) if 'loss' in line]


def test_a_run_writes_its_folder(script, spy):
    references = spy(fid, 'dataset_statistics')
    assert script.train('--flip', '--sample-every', 2, '--eval-every', 4, '--fid-num', 10) == 0
    assert torch.equal(references[0].images, all_shapes(200, 8).images)         # it is judged by them as they are
    assert {path.name for path in script.out.rglob('*')} == {
        'config.json', 'metrics.jsonl', 'samples', 'curves.png', 'checkpoint.pt', 'final.pt', '0000002.png',
        '0000004.png'}
    assert [line['step'] for line in steps(script.out)] == [1, 2, 3, 4]
    assert all(math.isfinite(line['loss']) for line in steps(script.out))
    assert any(name.startswith('pixel-FD (10 images against the 200 training') for name in lines(script.out)[-1])
    final = weights(script.out)
    assert all(isinstance(value, torch.Tensor) for value in final.values()) and 'enc.8x8_conv.weight' in final
    assert any(name.startswith('encoder.') for name in final) == (script.name == 'vct')


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(script, after_step):
    flags = '--flip --dropout 0.3 --steps 6 --pretrain-steps 2 --save-every 3 --lr 1e-3'.split()
    assert script.train(*flags, '--out', 'a') == 0
    after_step(5, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.train(*flags, '--out', 'b')
    with open('b/metrics.jsonl', 'a') as file:              # steps after the checkpoint are done again, and noted once
        file.write('{"step": 5, "lo')
    assert script.run('--resume', '--out', 'b') == 0
    a, b = (weights(out, 'checkpoint.pt') for out in 'ab')
    assert same(a['ema'], b['ema']) and same(a['net'], b['net']) and same(weights('a'), weights('b'))
    assert lines('a') == lines('b')
    for other in (['--seed', 1], ['--no-flip']):
        assert script.train(*flags, *other, '--steps', 2, '--out', 'c', '--overwrite') == 0
        assert lines('c')[0] != lines('a')[0]


@pytest.mark.parametrize('flags, decay, of_gc', [
    ('--steps 2 --ema 0.9', 0.9, 1 - 2 ** (-2 / 3)), ('--steps 2 --ema 0.3', 0.3, 0.3),
    ('--steps 5 --pretrain-steps 5', 0.5 ** (20 / 5), 1 - 5 ** (-2 / 3)),       # EDM's half-life of 5 % of the images
    ('--steps 5 --pretrain-steps 5 --ema 0.01', 0.01, 0.01), ('--steps 3 --pretrain-steps 2 --ema 0.9', 0.9, 0),
    ('--steps 4 --ema-every 3', 0, 1 - 4 ** (-2 / 3)), ('--steps 3 --ema-every 3', 0, 1),
    ('--steps 3 --pretrain-steps 2 --ema-every 3', 0, 0),
    ('--steps 5 --pretrain-steps 5 --ema-every 3', 0, 1 - 5 ** (-2 / 3))])      # the diffusion model: in every step
def test_the_average_and_the_optimiser_are_those_of_the_settings(script, flags, decay, of_gc, monkeypatch):
    """A step makes of the average d times what it was, and 1 - d times the network."""
    if script.name != 'gc_ct' and '--ema-every' in flags:
        return
    for key, preset in script.module.PRESETS.items():
        monkeypatch.setitem(script.module.PRESETS, key, preset | dict(lr=3e-3, lr_decay=None, betas=(0.8, 0.95)))
    assert script.train(*TUNING[script.name], '--pretrain-steps', 0, '--save-every', 1, *flags.split()) == 0
    before, after = (weights(script.out, name) for name in ('previous.pt', 'checkpoint.pt'))
    d = of_gc if script.name == 'gc_ct' else decay
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


def test_gradients_in_16_bits_are_those_in_32(script):
    online = ['--endpoint', 'online', '--mu', 1] if script.name == 'gc_ct' else []      # it has the student's weights,
    for precision in ('fp32', 'bf16', 'fp16', 'tf32'):                                  # cast without a gradient
        assert script.train(*online, '--precision', precision, '--steps', 1, '--out', precision) == 0
    assert torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == 'highest'    # convolutions alone
    full, *half = (lines(out)[0]['grad_norm'] for out in ('fp32', 'bf16', 'fp16'))
    np.testing.assert_allclose(half, full, rtol=0.1)


def test_the_teacher_has_the_students_own_weights_and_not_their_average(script, spy):
    calls = spy(script.module, 'loss')
    assert script.train('--lr', 0.01) == 0
    with torch.no_grad():
        outs = [getattr(calls[3], name)(calls[3].x_t, calls[3].t, calls[3].y) for name in ('net', 'teacher')]
    assert len(calls) == 4 and torch.equal(*outs)


def test_tuning_continues_from_the_diffusion_models_average_with_a_fresh_optimiser(script, monkeypatch):
    monkeypatch.setattr(script.module, 'ema_decay', lambda *_: 0.9)
    flags = [*TUNING[script.name], '--pretrain-steps', 3, '--lr', 0.01, '--lr-decay', 1, '--save-every', 1]
    for steps, rate in (4, 0.01), (6, 0.01 / 2 ** 0.5):
        assert script.train(*flags, '--steps', steps, '--out', steps) == 0
        assert weights(str(steps), 'checkpoint.pt')['optimizer']['param_groups'][0]['lr'] == pytest.approx(rate)
    before, after = (weights('4', name) for name in ('previous.pt', 'checkpoint.pt'))
    weight = lambda state: state['enc.8x8_conv.weight']
    gap = (weight(after['net']) - weight(before['ema'])).abs()
    torch.testing.assert_close(gap, torch.full_like(gap, 0.01), rtol=0, atol=1e-4)
    assert (weight(before['net']) - weight(before['ema'])).abs().max() > 0.011


def test_gradients_that_are_not_finite_are_noted_and_change_nothing(script, monkeypatch):
    plain, scales = script.module.loss, iter([1, math.nan, math.inf, 1, 1])
    monkeypatch.setattr(script.module, 'loss', lambda *args, **kwargs: plain(*args, **kwargs) * next(scales))
    assert script.train('--steps', 5) == 0
    assert [line['grad_norm'] in ('nan', 'inf') for line in steps(script.out)] == [False, True, True, False, False]
    assert all(value.isfinite().all() for value in weights(script.out).values())


def test_divergence_stops_the_run(script, capsys):
    assert script.train('--steps', 40, '--lr', '1e30', '--save-every', 5) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '20 steps in a row' in error and not (script.out / 'final.pt').exists()


ALL_IN_TWO = """
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
    assert [os.waitpid(copy, 0)[1] for copy in copies] == [0, 0], (name, argv)
"""
BOTH = dict(RANK='RANK', LOCAL_RANK='RANK', WORLD_SIZE='2')
LAUNCH = dict(      # what torchrun, srun and --gpus tell the processes
    sct=BOTH | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='{port}'), vct=BOTH | dict(INIT_METHOD='file://{folder}/met'),
    gc_ct=dict(SLURM_STEP_NUM_TASKS='2', SLURM_PROCID='RANK', SLURM_LOCALID='RANK', MASTER_PORT='{port}',
               SLURM_STEP_NODELIST='127.0.0.1,10.0.0.[7-9]'))
IN_TWO = [('sct', '--ref-size batch'), ('sct', '--ref-size 5'), ('sct', '--ref-size all'), ('gc_ct', ''), ('vct', '')]
FOR_TWO = ['--flip', '--steps', '10', '--device', 'cpu', '--lr', '1e-4', '--eval-every', '10', '--fid-num', '120']


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    folder, tasks = tmp_path_factory.mktemp('two'), []
    for i, (name, flags) in enumerate(IN_TWO):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            env = {key: value.format(folder=folder, port=free.getsockname()[1]) for key, value in LAUNCH[name].items()}
        tasks.append((name, env, [*Script(name).small, *FOR_TWO, *flags.split(), '--out', str(i)]))
    done = subprocess.run([sys.executable, '-c', ALL_IN_TWO, json.dumps(tasks)], cwd=folder, capture_output=True,
                          text=True, timeout=250, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize('name, flags', IN_TWO)
def test_two_processes_equal_one(name, flags, two, few_shapes, monkeypatch):
    """10 steps: losses, weights and the Fréchet distance agree to rounding. A Slurm job of one task is one process."""
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
    assert Script(name).train(*FOR_TWO, *flags.split(), '--out', 'one') == 0
    both = two / str(IN_TWO.index((name, flags)))
    values = lambda out: [[value for name, value in line.items() if name != 'kl'] for line in lines(out)]
    np.testing.assert_allclose(values('one')[:10], values(both)[:10], rtol=5e-3)
    np.testing.assert_allclose(values('one')[10], values(both)[10], rtol=1e-3)
    one, both = weights('one'), weights(both)
    for key in one:
        # The sign that Lion takes turns where rounding decides it: 10 steps of 1e-4, twice.
        torch.testing.assert_close(one[key], both[key], rtol=1e-3, atol=2e-3 if name == 'gc_ct' else 1e-3)


def test_the_steps_of_a_slurm_job_meet_at_ports_of_their_own(script, monkeypatch):
    before, ports = dict(os.environ), []
    slurm = dict(SLURM_STEP_NUM_TASKS='2', SLURM_PROCID='0', SLURM_LOCALID='0', SLURM_JOB_ID='123456')
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *_, **__: ports.append(
        int(os.environ['MASTER_PORT'])) or sys.exit())
    for step in '0', '1', '0':
        monkeypatch.setattr(os, 'environ', before | slurm | dict(SLURM_STEP_ID=step))
        assert script.train('--out', 'x') == 0
    assert ports[0] == ports[2] != ports[1] and all(1024 < port < 65536 for port in ports)


def test_an_error_of_all_processes_is_one_line_and_their_exit_code(few_pictures, tmp_path):
    flags = [*few_pictures, *Script('sct').small, '--resolution', 10, '--mults', '1,1,1']
    process = start('sct', tmp_path, *flags, '--gpus', 2, '--device', 'cpu', '--out', 'x')
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and error.count('\n') == 1 and '--arch' in error, error


def test_the_first_copy_that_fails_ends_the_others(tmp_path, monkeypatch):
    (tmp_path / 'sct.py').write_text('import os, sys, time\ntime.sleep(60 * (os.environ["RANK"] == "0")), sys.exit(3)')
    monkeypatch.setattr(common, '__file__', str(tmp_path / 'common.py'))        # beside which the script is
    begin = time.monotonic()
    assert Script('sct').train('--gpus', 2, '--device', 'cpu', '--out', tmp_path / 'x') == 3
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize('number, gpus', [('SIGINT', 2), ('SIGTERM', 1)])
def test_a_signal_ends_the_run(number, gpus, few_pictures, tmp_path):
    process = endless('sct', gpus, few_pictures, tmp_path)
    os.killpg(process.pid, getattr(signal, number))                             # as a terminal does: to the whole group
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == '' and 'python sct.py --resume --out run' in out
    assert weights(tmp_path / 'run', 'checkpoint.pt')['step'] == lines(tmp_path / 'run')[-1]['step']


def test_a_signal_is_heard_between_steps_and_a_second_one_at_once(script, after_step, capsys):
    after_step(1, lambda: (stop(), stop()))                     # one that came in two ways
    assert script.train('--out', 'run1') == 0
    after_step(1, lambda: (stop(signal.SIGINT), time.sleep(0.6), stop(signal.SIGINT)))
    assert script.train('--out', 'run2') == 130
    after_step(2, stop)
    assert script.train('--out', 'run3', '--steps', 2, '--eval-every', 2) == 0 and ' step' in list(lines('run3')[-1])[1]
    assert weights('run1', 'checkpoint.pt')['step'] == 1 == len(lines('run1')) and not Path('run2/final.pt').exists()
    out, error = capsys.readouterr()
    assert f'python {script.name}.py --resume --out run1' in out and error == 'interrupted\n'


def test_samples_and_evaluation(script, capsys):
    assert script.train('--ema', 0, '--lr', 0.01) == 0
    sample, model = script.module.sample, script.module.load(script.out)
    one = sample(model, 12, seed=3)
    assert one.shape == (12, 3, 8, 8) and one.abs().max() <= 1
    assert not any(torch.equal(one, sample(model, 12, **other)) for other in [dict(seed=4), dict(labels=[7], seed=3)])
    few = ['--n', 6, '--nfe', 2, '--labels', '1,2']
    for file in ('checkpoint.pt', 'final.pt'):
        assert torch.equal(one, sample(script.module.load(script.out / file), 12, seed=3))
        assert script.run('--sample', script.out / file, *few) == 0
    assert script.run('--sample', script.out, '--n', 18, '--nfe', '1,2') == 0               # a row of 16 each
    names = {path.name for path in script.out.glob('*.png')}
    assert names == {'curves.png', 'sample-1-2-steps.png', 'sample-2-steps.png'}
    assert script.run('--sample', script.out, *few, '--precision', 'bf16', '--out', 'bf16') == 0
    assert Path('bf16/sample-2-steps.png').read_bytes() != (script.out / 'sample-2-steps.png').read_bytes()
    strips = np.asarray(Image.open(script.out / 'sample-1-2-steps.png'))[2::66, 2::66]       # a pixel of each picture
    one, two = (common.to_uint8(sample(model, 18, nfe))[:, :, 0, 0].numpy() for nfe in (1, 2))
    assert (strips == [one[:16], two[:16]]).all()
    assert script.run('--evaluate', script.out, '--nfe', '1,2', '--fid-num', 50) == 0
    out = capsys.readouterr().out
    assert 'pixel-FD (50 images against the 200 training images), 1 step: ' in out and '2 steps: ' in out


def test_a_benchmark_accounts_for_the_step_and_leaves_a_run_alone(script, after_step, capsys):
    assert script.train('--steps', 2) == 0
    files = lambda: {path: path.read_bytes() for path in Path().rglob('*') if path.is_file()}
    before = files()
    assert script.train('--benchmark', 1) == 0 and files() == before
    out = capsys.readouterr().out
    for part in ('img/s', 'peak memory', '  pairs  ', '  forward  ', '  backward  ', '  update  '):
        assert part in out
    assert 0 < float(out.split('TFLOP/s a process, ')[1].split('%')[0]) < 110               # of a matrix product's rate
    after_step(1, stop)
    assert script.train('--benchmark', 1) == 0 and files() == before


def test_wrong_flags_are_refused_in_one_line(script, refused, tmp_path, monkeypatch):
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
            ('--step 3 --out x', '--step'), ('--steps', '--steps'),
            ('--eval-every 4 --fid-ref nowhere.npz --out x', 'nowhere.npz'), ('--labels 99 --out x', '--labels 99'),
            ('--pretrain-steps 10 --steps 9 --out x', '--pretrain-steps 10'), ('--out file', 'file'),
            (f'--out {"x" * 300}', 'too long'),
            ('--batch 9 --gpus 2 --device cpu --out x', '--batch 9', '2 processes'),
            ('--dataset cifar10 --data-dir nowhere/at/all --resolution 16 --out x', 'nowhere'),
            ('--sample nowhere', 'nowhere'), (f'--sample {run} --evaluate {run}', 'not allowed with'),
            ('--optimizer SGD --out x', 'SGD'),
            (f'--sample {run} --labels 10', '--labels', '10 classes'), ('--sample file.pt', 'cannot be read'),
            (f'--evaluate {run} --fid-ref nowhere.npz', 'nowhere.npz'), (f'--sample {run} --out file', 'file'),
            ('--resolution 20 --mults 1,2,2,2 --out x', '--arch', '20'), ('--init nowhere --out x', 'nowhere'),
            ('--init http://127.0.0.1:9/n.pkl --out x', 'could not be downloaded')]:
        free = flags.startswith('--resume') or '--sample' in flags or '--evaluate' in flags
        refused(module, [*([] if free else script.small), *flags.split()], *words)
    refused(importlib.import_module(other), f'--sample {run}', f'run of {name}.py, not of {other}.py')
    config = json.loads(Path(run, 'config.json').read_text())
    Path(run, 'config.json').write_text(json.dumps(config | dict(fingerprint='of others')))
    refused(module, '--resume', 'not what the run was trained on')
    if not torch.cuda.is_available():
        refused(module, '--device cuda --out x', 'no GPU')
        refused(module, '--gpus 8 --out x', '--gpus 8')
        monkeypatch.setenv('RANK', '0')                         # as a scheduler may say of one process
        refused(module, '--gpus 8 --out x', '--gpus 8')
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'file.pt', 'runs'}


def test_help_shows_the_settings_in_force(script, capsys):
    assert script.run('--dataset', 'cifar10', '--batch', 77, '--help') == 0
    text = capsys.readouterr().out
    assert f'[{script.module.PRESETS["cifar10"]["steps"]}]' in text and '[77]' in text and 'arxiv.org/abs/' in text
    assert len(re.findall(r'^(\w[\w ]*):$', text, re.M)) == 6
    script.run('--steps', script.module.PRESETS['shapes']['steps'] // 4, '--help')
    assert f'[{round(script.module.PRESETS["shapes"]["pretrain_steps"] / 4)}]' in capsys.readouterr().out


def test_a_resumed_run_may_be_moved_and_longer_evaluates_what_it_did_and_leaves_the_files_of_others(script):
    Path('mine').mkdir()
    Path('mine/mine.pt').write_text('weights')
    assert script.train('--out', 'mine', '--nfe', '2,1', '--labels', '3', '--eval-every', 2, '--fid-num', 10) == 0
    Path('mine').rename('moved')
    assert script.run('--resume', '--out', 'moved', '--steps', 6) == 0 and not Path('mine').exists()
    assert json.loads(Path('moved/config.json').read_text())['steps'] == 6 and Path('moved/mine.pt').exists()
    assert [line['step'] for line in steps('moved')] == [1, 2, 3, 4, 5, 6]
    names = [[name for name in line if 'pixel-FD' in name] for line in lines('moved') if 'loss' not in line]
    assert len(names) == 3 and all(row == names[0] for row in names) and 'classes [3] only), 2 step' in names[0][0]
    assert script.train(*TUNING[script.name], '--pretrain-steps', 4, '--benchmark', 3) == 0     # and beyond its end
