"""Runs that are killed, cut, filled up or called wrongly."""
import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
from conftest import ROOT, SCRIPTS, Script, lines, same, weights


# Killed

def start(name, cwd, *flags):
    return subprocess.Popen([sys.executable, str(ROOT / f'{name}.py'), *map(str, flags)], cwd=cwd, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                            env=dict(os.environ, OMP_NUM_THREADS='1'))


@pytest.mark.slow
@pytest.mark.parametrize('name, gpus, kills', [*((name, 1, 20) for name in SCRIPTS), ('sct', 2, 5)])
def test_a_run_killed_many_times_ends_as_if_it_had_not_been(name, gpus, kills, tmp_path):
    """SIGKILL at random moments, resumed each time: the same weights bit for bit, and every step noted once."""
    flags = [*Script(name).small, '--dropout', 0.1, '--lr', '1e-4', '--steps', 2000, '--pretrain-steps', 100,
             '--save-every', 25, '--sample-every', 500, '--eval-every', 1000, '--device', 'cpu', '--gpus', gpus]
    whole = start(name, tmp_path, *flags, '--out', 'whole')
    assert whole.wait() == 0, whole.stderr.read()
    moments, done = random.Random(name), 0
    for i in range(kills):
        begun = (tmp_path / 'killed/config.json').exists()
        how = ['--resume', '--gpus', gpus] if begun else [*flags, '--overwrite']
        process = start(name, tmp_path, *how, '--out', 'killed')
        path = tmp_path / 'killed/metrics.jsonl'
        before = path.stat().st_mtime_ns if path.exists() else 0
        begin = time.monotonic()                                # some die while starting, most while training
        while i % 4 and time.monotonic() - begin < 30 and not (path.exists() and path.stat().st_mtime_ns > before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.8))
        assert process.poll() in (None, 0), process.stderr.read()
        done += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)                                         # the copies notice that their parent is gone
    assert done > kills / 2
    last = start(name, tmp_path, '--resume', '--out', 'killed', '--gpus', gpus)
    assert last.wait() == 0, last.stderr.read()
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed'))
    steps = [line['step'] for line in lines(tmp_path / 'killed') if 'loss' in line]
    assert steps == list(range(1, 2001)) and lines(tmp_path / 'whole') == lines(tmp_path / 'killed')


def test_a_dead_process_ends_the_others(few_pictures, tmp_path):
    """Within seconds, not after a timeout, and with a code that says so."""
    process = start('sct', tmp_path, *few_pictures, *Script('sct').small, '--steps', 100_000, '--device', 'cpu',
                    '--gpus', 2, '--out', 'run')
    metrics = tmp_path / 'run/metrics.jsonl'
    while not (metrics.exists() and metrics.read_text().count('\n') > 2):
        assert process.poll() is None
        time.sleep(0.1)
    copies = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    os.kill(copies[1], signal.SIGKILL)
    error = process.communicate(timeout=20)[1]
    assert process.returncode not in (0, 2) and 'process 1 of 2' in error and 'Traceback' not in error


def test_resuming_before_the_first_checkpoint_starts_over(script, capsys):
    assert script.train('--steps', 2) == 0
    for path in script.out.glob('*.pt'):
        path.unlink()
    assert script.run('--resume', '--out', script.out) == 0
    assert 'no checkpoint yet' in capsys.readouterr().out and (script.out / 'final.pt').exists()
    assert [line['step'] for line in lines(script.out) if 'loss' in line] == [1, 2]


# Cut

def test_a_cut_checkpoint_falls_back_or_is_refused(script, capsys):
    assert script.train('--save-every', 2, '--mults', 1) == 0               # few tensors: they are read a hundred times
    whole, last = (script.out / 'checkpoint.pt').read_bytes(), weights(script.out, 'checkpoint.pt')['step']
    cuts = random.Random(0)
    for _ in range(50):
        (script.out / 'checkpoint.pt').write_bytes(whole[:cuts.randrange(len(whole))])
        assert common.load_checkpoint(script.out)['step'] == 2 and last == 4
    assert capsys.readouterr().out.count('going back to previous.pt') == 50
    assert script.run('--resume', '--out', script.out) == 0                     # from step 2
    a = torch.load(script.out / 'checkpoint.pt', weights_only=True)
    (script.out / 'previous.pt').unlink()
    (script.out / 'final.pt').unlink()
    for _ in range(50):
        (script.out / 'checkpoint.pt').write_bytes(whole[:cuts.randrange(len(whole))])
        with pytest.raises(common.UserError, match='cannot be read'):
            common.load_checkpoint(script.out)
    (script.out / 'checkpoint.pt').write_bytes(whole)
    assert same(common.load_checkpoint(script.out)['ema'], a['ema'])            # done again, it became the same


def test_a_changed_byte_is_noticed_or_harmless(tmp_path):
    """The archive's checksums: a flipped bit among the weights is refused."""
    path = tmp_path / 'checkpoint.pt'
    torch.save(dict(config={}, ema=dict(w=torch.arange(1000.0))), path)
    whole, flips = path.read_bytes(), random.Random(0)
    good = common.load_checkpoint(path)['ema']['w']
    for _ in range(100):
        data = bytearray(whole)
        data[flips.randrange(len(data))] ^= 1 << flips.randrange(8)
        path.write_bytes(data)
        try:
            assert torch.equal(common.load_checkpoint(path)['ema']['w'], good)
        except (common.UserError, KeyError):
            pass


# Full

def test_training_goes_on_when_the_disk_is_full(script, monkeypatch, capsys):
    """Every write fails from the second checkpoint on, until the last steps: what could not be written is told, and the
    old stays whole.
    """
    plain, step_of = common.write_atomic, []

    def full(path, write, previous=None):
        if 4 <= len(step_of) < 9 and path.suffix in ('.pt', '.png'):
            raise OSError(errno.ENOSPC, 'No space left on device')
        return plain(path, write, previous)
    monkeypatch.setattr(common, 'write_atomic', full)
    log = common.Log.step
    monkeypatch.setattr(common.Log, 'step', lambda self, step, **values: (
        step_of.append(step), log(self, step, **values)))
    states = []
    finish = common.save_checkpoint
    monkeypatch.setattr(common, 'save_checkpoint', lambda *a, **k: (
        finish(*a, **k), states.append(weights(script.out, 'checkpoint.pt')['step'])))
    assert script.train('--steps', 10, '--save-every', 2, '--sample-every', 5) == 0
    out = capsys.readouterr().out
    assert states == [2, 2, 2, 2, 10]
    assert out.count('checkpoint.pt of step') == 3 and 'No space left on device' in out
    assert 'the pictures of step 5' in out
    assert [line['step'] for line in lines(script.out) if 'loss' in line] == list(range(1, 11))


def test_a_checkpoint_that_does_not_fit(tmp_path, capsys):
    """The disk ends at any place of the file: torch's own error is none of ours, and the old checkpoint stays whole."""
    args = common.argparse.Namespace(out=str(tmp_path), benchmark=None)
    net = torch.nn.Linear(100, 100)
    common.save_checkpoint(args, 1, ema=net)
    limit, size = resource.getrlimit(resource.RLIMIT_FSIZE), (tmp_path / 'checkpoint.pt').stat().st_size
    for room in random.Random(0).sample(range(1, size), 60):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        try:
            common.save_checkpoint(args, 2, ema=net)
            common.save_final(args, net, 'best')
            with pytest.raises(common.UserError, match='make room'):
                common.save_final(args, net)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert common.load_checkpoint(tmp_path)['step'] == 1
        assert [p.name for p in tmp_path.iterdir()] == ['checkpoint.pt']
    assert capsys.readouterr().out.count('the run goes on') == 120


def test_a_benchmark_leaves_a_run_alone(script, monkeypatch):
    assert script.train() == 0
    before = {path: path.read_bytes() for path in script.out.rglob('*') if path.is_file()}
    step = common.Log.step
    monkeypatch.setattr(common.Log, 'step', lambda self, done, **values: (
        step(self, done, **values), setattr(self, 'stop', done == 2)))          # Ctrl-C in the second step
    assert script.train('--benchmark', 3) == 0
    assert before == {path: path.read_bytes() for path in script.out.rglob('*') if path.is_file()}


def test_a_resumed_run_evaluates_what_it_did(script):
    """The numbers that decide on best.pt stay comparable."""
    assert script.train('--nfe', '2,1', '--labels', '3', '--eval-every', 2, '--fid-num', 10) == 0
    assert script.run('--resume', '--out', script.out, '--steps', 6) == 0
    names = [[name for name in line if 'pixel-FD' in name] for line in lines(script.out) if 'best' in line]
    assert len(names) == 3 and all(row == names[0] for row in names) and 'classes [3] only), 2 step' in names[0][0]
    values = [line[names[0][0]] for line in lines(script.out) if 'best' in line]
    assert [line['best'] for line in lines(script.out) if 'best' in line] == [min(values[:i]) for i in (1, 2, 3)]


def test_a_run_starts_from_another(script, refused):
    assert script.train('--out', 'first') == 0
    for source in ('first', 'first/checkpoint.pt', 'first/final.pt'):
        assert script.train('--init', source, '--lr', 0, '--overwrite', '--steps', 1) == 0
        assert same(weights('first'), weights(script.out))
    refused(script.module, [*script.small, '--init', 'nowhere', '--out', 'x'], 'nowhere')


def test_lines_of_the_log_that_a_full_disk_refuses_are_kept(tmp_path, monkeypatch, capsys):
    args = common.argparse.Namespace(out=str(tmp_path), resume=False, benchmark=None, save_every=None,
                                     sample_every=None, eval_every=None, steps=100, batch=1, script='sct')
    log = common.Log(args, 0, torch.device('cpu'))
    log.write({'step': 1})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limit[1]))           # a file that may not grow: as a full disk
    try:
        log.write({'step': 2, 'loss': 1.25})
        log.write({'step': 3, 'loss': 1.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert lines(tmp_path) == [{'step': 1}] and 'the run goes on' in capsys.readouterr().out
    log.write({'step': 4})
    assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_small_disk_filled_to_the_brim(tmp_path):
    """A real one: 3 MiB in memory. Needs the right to mount."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('may not mount a file system')
    try:
        process = start('sct', tmp_path, *Script('sct').small, '--steps', 3000, '--save-every', 20,
                        '--sample-every', 100, '--out', disk / 'run')
        while not (disk / 'run/previous.pt').exists():
            time.sleep(0.1)
        with open(disk / 'filler', 'wb', buffering=0) as file:
            try:
                while file.write(b'x' * 4096):
                    pass
            except OSError:
                pass
        before = common.load_checkpoint(disk / 'run')['step']
        time.sleep(5)
        assert process.poll() is None and common.load_checkpoint(disk / 'run')['step'] >= before
        (disk / 'filler').unlink()
        assert process.wait() == 0, process.stderr.read()
        assert [line['step'] for line in lines(disk / 'run') if 'loss' in line] == list(range(1, 3001))
        assert not list((disk / 'run').glob('*.part'))
    finally:
        subprocess.run(['umount', disk])


def test_gradients_that_are_not_finite_are_counted(script, monkeypatch):
    plain, calls = common.finish_gradients, []

    def spoil(params, precision):
        params = list(params)
        calls.append(1)
        if len(calls) in (2, 3):
            params[0].grad[0] = torch.nan
        return plain(params, precision)
    monkeypatch.setattr(common, 'finish_gradients', spoil)
    assert script.train('--steps', 5) == 0
    assert [line.get('nonfinite', 0) for line in lines(script.out) if 'loss' in line] == [0, 1, 2, 2, 2]
    assert all(value.isfinite().all() for value in weights(script.out).values())


# Called wrongly

HOSTILE = ['-1', '0', '1', '2', '7', '0.5', '1e-3', 'nan', 'inf', '-inf', '1e308', str(10 ** 30), str(2 ** 63), 'abc',
           '', ' ', '1,2', '1,2,3,4,5,6,7,8,9', ',', 'None', '../../escape', '/nonexistent/file', '/dev/null', '/',
           'file', 'folder', 'broken.pt', 'http://127.0.0.1:9/x', '\u00fc\u4e2d', '--', '%s']
USES_A_RUN = ['--sample', '--evaluate', '--analyse', '--guide']


@pytest.mark.parametrize('count', [60, pytest.param(500, marks=pytest.mark.slow)])
def test_random_command_lines(script, count, tmp_path, monkeypatch, capsys):
    """Real flags with hostile values: exit code 0 or 2, one line, no traceback, no hang, nothing outside --out."""
    Path('file').write_text('text')
    Path('folder').mkdir()
    Path('broken.pt').write_bytes(b'PK\x03\x04 not really')
    assert script.train('--steps', 1, '--out', 'good') == 0
    flags, parse_args = {}, common.Parser.parse_args

    def note_flags(self, *rest):
        flags.update({action.option_strings[-1]: action.nargs for action in self._actions if action.option_strings})
        return parse_args(self, *rest)
    monkeypatch.setattr(common.Parser, 'parse_args', note_flags)
    script.run('--dry-run')
    names = sorted(set(flags) - {'--help', '-h', '--compile', '--out', '--debug'})
    chance, files = random.Random(script.name), {str(p) for p in Path('.').rglob('*')}
    base = [*script.small, '--steps', '1', '--fid-num', '4', '--n', '4', '--out', 'out', '--overwrite']
    for _ in range(count):
        extra = []
        for name in chance.sample(names, chance.choice([1, 1, 2, 3])):
            extra.append(name)
            if flags[name] != 0:                                                # it takes a value
                extra.append('good' if name in USES_A_RUN and chance.random() < 0.5 else chance.choice(HOSTILE))
        capsys.readouterr()
        begin = time.monotonic()
        try:
            code = script.run(*base, *extra)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            raise AssertionError(f'{extra} ended in {error!r}')
        error = capsys.readouterr().err
        assert code in (0, 2) and error.count('\n') == (code == 2), (extra, code, error)
        assert time.monotonic() - begin < 10, extra
        after = {str(p) for p in Path('.').rglob('*') if p.parts[0] not in ('out', 'good', 'runs')}
        assert after <= files, (extra, after - files)
    assert not (tmp_path.parent / 'escape').exists()
