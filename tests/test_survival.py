"""Runs that are killed, cut, out of disk space or called wrongly."""
import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import common
from conftest import SCRIPTS, Script, endless, lines, room, same, slow, start, stop, weights


@slow
@pytest.mark.parametrize('name, gpus, kills', [*((name, 1, 20) for name in SCRIPTS), ('sct', 2, 5)])
def test_a_run_killed_many_times_ends_as_if_it_had_not_been(name, gpus, kills, tmp_path):
    """SIGKILL at random moments, resumed each time: the same weights bit for bit, and every step noted once."""
    flags = [*Script(name).small, '--dropout', 0.1, '--lr', '1e-4', '--steps', 2000, '--pretrain-steps', 100,
             '--save-every', 25, '--sample-every', 500, '--eval-every', 1000, '--device', 'cpu', '--gpus', gpus]
    assert start(name, tmp_path, *flags, '--out', 'whole').wait() == 0
    moments, path, done = random.Random(name), tmp_path / 'killed/metrics.jsonl', 0
    written = lambda: path.exists() and path.stat().st_mtime_ns
    for i in range(kills):
        how = ['--resume', '--gpus', gpus] if (tmp_path / 'killed/config.json').exists() else [*flags, '--overwrite']
        before, end = written(), time.monotonic() + 30
        process = start(name, tmp_path, *how, '--out', 'killed')
        while i % 4 and time.monotonic() < end and written() in (False, before):    # some die while starting, most
            time.sleep(0.01)                                                        # while training
        time.sleep(moments.uniform(0, 0.8))
        assert process.poll() in (None, 0), process.stderr.read()
        done += process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.3)                                         # the copies notice that their parent is gone
    assert done > kills / 2
    assert start(name, tmp_path, '--resume', '--out', 'killed', '--gpus', gpus).wait() == 0
    assert same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed'))
    steps = [line['step'] for line in lines(tmp_path / 'killed') if 'loss' in line]
    assert steps == list(range(1, 2001)) and lines(tmp_path / 'whole') == lines(tmp_path / 'killed')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('victim', ['a copy', 'the launcher'])
def test_a_dead_process_ends_the_others(victim, few_pictures, tmp_path):
    process = endless('sct', 2, few_pictures, tmp_path)
    copies = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    os.kill(copies[1] if victim == 'a copy' else process.pid, signal.SIGKILL)
    error = process.communicate(timeout=20)[1]
    assert 'Traceback' not in error and process.returncode == (-9 if victim == 'the launcher' else 137)
    assert victim == 'the launcher' or 'process 1 of 2 was ended by SIGKILL' in error
    end = time.monotonic() + 20
    while any(Path(f'/proc/{copy}/exe').exists() for copy in copies) and time.monotonic() < end:
        time.sleep(0.1)
    assert time.monotonic() < end


def test_a_damaged_checkpoint_falls_back_or_is_refused_and_without_one_a_run_starts_over(script, capsys):
    """Cut short, or with a changed bit, which the archive's checksums tell where it does harm."""
    assert script.train('--save-every', 2, '--mults', 1) == 0                   # few tensors: they are read many times
    path, chance = script.out / 'checkpoint.pt', random.Random(0)
    whole, states = path.read_bytes(), [weights(script.out, name)['ema'] for name in ('previous.pt', 'checkpoint.pt')]
    cuts = [whole[:chance.randrange(len(whole))] for _ in range(10)]
    flips = [[chance.randrange(len(whole)), 1 << chance.randrange(8)] for _ in range(20)]
    for content in [*cuts, *(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:] for at, bit in flips)]:
        path.write_bytes(content)
        found = common.load_checkpoint(script.out)
        assert same(found['ema'], states[found['step'] == 4]) and (content not in cuts or found['step'] == 2)
    path.write_bytes(cuts[0])
    assert script.run('--resume', '--out', script.out) == 0                     # from step 2
    assert 'checkpoint.pt cannot be read as a checkpoint' in capsys.readouterr().out
    assert same(weights(script.out, 'checkpoint.pt')['ema'], states[1])
    (script.out / 'previous.pt').unlink()
    (script.out / 'final.pt').unlink()
    torch.save({'config': {}, 'ema': argparse.Namespace(a=1)}, 'code.pt')       # would have to import a class
    for content in (Path('code.pt').read_bytes(), b'', b'random', *cuts[:3]):
        path.write_bytes(content)
        with pytest.raises(common.UserError, match='checkpoint.pt cannot be read'):
            common.load_checkpoint(script.out)
    path.unlink()
    assert script.run('--resume', '--out', script.out) == 0 and 'no checkpoint yet' in capsys.readouterr().out
    assert [line['step'] for line in lines(script.out)] == [1, 2, 3, 4, 4] and (script.out / 'final.pt').exists()


def test_a_full_disk_ends_the_run_with_a_line_and_it_can_be_resumed(script, after_step, capsys):
    assert script.train('--save-every', 2, '--mults', 1, '--out', 'whole') == 0
    after_step(2, stop)
    assert script.train('--save-every', 2, '--mults', 1, '--out', 'full') == 0
    size, log = Path('whole/checkpoint.pt').stat().st_size, Path('full/metrics.jsonl')
    log.write_text(json.dumps({'step': 1, 'loss': 0.0, 'padding': 'x' * 5000}) + '\n')       # larger than config.json
    capsys.readouterr()
    for bytes_left, name in [(size // 4, 'checkpoint.pt'), (size - 1, 'checkpoint.pt'), (5100, 'metrics.jsonl')]:
        with room(bytes_left):
            assert script.run('--resume', '--out', 'full') == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and name in error, error
        assert common.load_checkpoint('full')['step'] == 2 and not list(Path('full').glob('*.part'))
    assert script.run('--resume', '--out', 'full') == 0
    assert lines('whole')[2:] == lines('full')[1:] and same(weights('whole'), weights('full'))


HOSTILE = ['-1', '0', '1', '2', '7', '0.5', '1e-3', 'nan', 'inf', '-inf', '1e308', str(10 ** 30), str(2 ** 63), 'abc',
           '', ' ', '1,2', '1,2,3,4,5,6,7,8,9', ',', 'None', '../../escape', '/nonexistent/file', '/dev/null', '/',
           'file', 'folder', 'broken.pt', 'http://127.0.0.1:9/x', '\u00fc\u4e2d', '--', '%s']


@pytest.mark.parametrize('count', [40, pytest.param(500, marks=slow)])
def test_random_command_lines(script, count, tmp_path, capsys):
    """Real flags with hostile values: exit code 0 or 2, one line, no traceback, no hang, nothing outside --out."""
    Path('file').write_text('text')
    Path('folder').mkdir()
    Path('broken.pt').write_bytes(b'PK\x03\x04 not really')
    assert script.train('--steps', 1, '--out', 'good') == 0
    script.run('--help')
    flags = dict(re.findall(r'^  (--[\w-]+)(?:, --\S+)?(?: (\S+))?', capsys.readouterr().out, re.M))
    names = sorted(set(flags) - {'--help', '--compile', '--out', '--debug'})
    assert len(names) > 30
    chance, files = random.Random(script.name), {str(path) for path in Path('.').rglob('*')}
    base = [*script.small, '--steps', '1', '--fid-num', '4', '--n', '4', '--out', 'out', '--overwrite']
    for _ in range(count):
        extra = []
        for name in chance.sample(names, chance.choice([1, 1, 2, 3])):
            uses_a_run = name in ('--sample', '--evaluate', '--guide') and chance.random() < 0.5
            extra += [name, 'good' if uses_a_run else chance.choice(HOSTILE)][:2 if flags[name] else 1]
        begin = time.monotonic()
        code, error = script.run(*base, *extra), capsys.readouterr().err
        assert code in (0, 2) and error.count('\n') == (code == 2), (extra, code, error)
        assert time.monotonic() - begin < 10, extra
        after = {str(path) for path in Path('.').rglob('*') if path.parts[0] not in ('out', 'good', 'runs')}
        assert after <= files, (extra, after - files)
    assert not (tmp_path.parent / 'escape').exists()
