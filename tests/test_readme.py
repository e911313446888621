"""What README.md and RESULTS.md promise: their commands, the Python example, files that can be copied, one voice."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import fid
from conftest import ROOT, SCRIPTS, Script, tool

TEXT = '\n\n'.join(path.read_text() for path in (ROOT / 'README.md', ROOT / 'RESULTS.md') if path.exists())
BLOCKS = [re.sub('^    ', '', block.strip('\n'), flags=re.M)
          for block in re.findall(r'(?:^    .*\n(?:\n(?=    ))?)+', TEXT, re.M)]
BLOCKS += re.findall(r'^```(?!python)\w*\n(.*?)^```', TEXT, re.M | re.S)
NOT_OURS = {'python', 'torchrun', 'srun', 'bash', 'sh', 'xargs', 'pip', 'source', '.'}       # recorded instead of run


def commands():
    """Every call of a script in the texts, shell loops and variables resolved by bash. -> [[script, flag, ...]]"""
    shell = ['record() { for word in "$@"; do printf "%s\\0" "$word"; done; printf "\\n\\0"; }',
             *(f'{name}() {{ record "$@"; }}' for name in NOT_OURS)]
    shell += [block for block in BLOCKS if re.search(r'\b(python|torchrun|srun|bash) ', block)]
    shell += re.findall(r'`((?:python|bash) [\w./]+\.(?:py|sh)(?: [^`|]*)?)`', TEXT)
    done = subprocess.run(['bash', '-ec', '\n'.join(shell)], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent / 'data')                   # where no script lies that could be run
    calls = [call.rstrip('\0').split('\0') for call in done.stdout.split('\n\0')[:-1]]
    starts = [next((i for i, word in enumerate(words) if re.search(r'\.(py|sh)$', word)), None) for words in calls]
    return [list(call) for call in dict.fromkeys(tuple(words[i:]) for words, i in zip(calls, starts) if i is not None)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp('runs'))
        draw = common.shapes
        patch.setattr(common, 'shapes', lambda n=100, resolution=16: draw(n, resolution))
        for name in SCRIPTS:
            assert Script(name).train('--steps', 1, '--resolution', 16) == 0
        yield Path.cwd()


def test_each_command_is_understood(runs, monkeypatch, capsys):
    assert {call[0] for call in commands()} >= {'sct.py', 'gc_ct.py', 'vct.py', 'fid.py'} and ['sct.py'] in commands()
    for script, *flags in commands():
        name = script.removesuffix('.py')
        if name not in SCRIPTS:
            assert (ROOT / script).exists(), script
            with monkeypatch.context() as patch:
                patch.setattr(fid, 'read_pictures', lambda *_: exec('raise SystemExit(0)'))
                assert script != 'fid.py' or not flags or common.run(fid.main, flags) == 0, flags
            continue
        flags = [flag.replace('NAME', 'cifar10') for flag in flags if flag != '--help']
        for flag, value in zip(flags, flags[1:]):
            uses = flag in ('--sample', '--evaluate', '--analyse', '--init', '--guide')
            if (uses or flag == '--out' and '--resume' in flags) and value != 'none' and not Path(value).exists():
                Path(value).parent.mkdir(parents=True, exist_ok=True)
                Path(value).symlink_to(runs / f'runs/{name}-shapes')
        if '--resume' in flags and '--out' not in flags:
            flags.remove('--resume')
        if 'ot' in flags and not importlib.util.find_spec('scipy'):             # refused: another test
            continue
        assert Script(name).run(*flags, '--dry-run') == 0, (script, flags, capsys.readouterr().err)
        assert json.loads(capsys.readouterr().out)['script'] == name


def test_the_python_example(runs):
    example, = re.findall(r'^(?:    )?from sct import(?:.*\n)+?(?=\n|```)', TEXT, re.M)
    for name in SCRIPTS:
        space = {}
        exec(re.sub('^    ', '', example, flags=re.M).replace('sct', name), space)
        assert space['images'].shape == (16, 3, 16, 16) and space['images'].abs().max() <= 1


def test_scripts_run_when_copied(few_pictures, tmp_path):
    """unet.py alone, with nothing but torch; all six files together."""
    code = 'import sys, unet\nassert not {"common", "PIL"} & sys.modules.keys()\n' \
           'unet.EDM2UNet(8, 1, 1, model_channels=64, channel_mult=[1]), unet.SongUNet(8, 1, 1)'
    shutil.copy(ROOT / 'unet.py', tmp_path)
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, timeout=120)
    for name in ('common', 'fid', *SCRIPTS):
        shutil.copy(ROOT / f'{name}.py', tmp_path)
    code = 'import sys, json, common, importlib\nfor name, argv in json.loads(sys.argv[1]):\n' \
           '    assert common.run(importlib.import_module(name).main, argv) == 0'
    tasks = [(name, [*few_pictures, *Script(name).small, '--steps', '2']) for name in SCRIPTS]
    done = subprocess.run([sys.executable, '-c', code, json.dumps(tasks)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and len(list(tmp_path.glob('runs/*/final.pt'))) == 3, done.stderr


def test_the_pairs_of_the_figure_are_what_its_panels_say():
    pytest.importorskip('scipy')                                # for optimal transport
    pairs = tool('pairs')
    encoder = pairs.train_encoder(steps=200)
    x0, eps, t, r = pairs.draw(0)
    chosen = {kind: pairs.choose(kind, x0, eps, t, r, encoder) for kind in pairs.PANELS}
    x0, eps, ends, lines = x0.flatten(), eps.flatten(), *({kind: c[i] for kind, c in chosen.items()} for i in (0, 2))
    x_t, x_r = lines['SCT'][[0, -1]]
    torch.testing.assert_close((x_t - x_r) / (t - r), (x_t - (x_t / t ** 2).tanh()) / t, rtol=0, atol=1e-4)
    torch.testing.assert_close(ends['GC'], (x0 + r * eps).sign())                       # an image, and the right one
    assert torch.equal(ends['IC'], x0) and (ends['OT'] - eps).square().sum() < 0.6 * (x0 - eps).square().sum()
    noise = (lines['VC'][0] - x0) / t
    assert (noise * x0).mean() > (eps * x0).mean() + 0.15                               # on the side of its image
    off = {kind: pairs.distance(kind, encoder, 5) for kind in pairs.PANELS}
    assert off['SCT'] < 0.25 * off['IC'] and all(off[kind] < 0.9 * off['IC'] for kind in ('OT', 'GC', 'VC'))


def test_the_comparison_has_mean_deviation_and_paired_differences(tmp_path, monkeypatch, capsys):
    compare = tool('compare')
    monkeypatch.chdir(tmp_path)
    for method, ends in ('iCT', [5, 7, 9]), ('GC', [4, 7]), ('VC', [6]):
        for seed, end in enumerate(ends):
            run = Path(f'runs/compare/shapes-{method}-{seed}')
            run.mkdir(parents=True)
            distances = [dict(step=step, **{'FD, 1 step': d, 'FD, 2 step': d / 2}) for step, d in [(1, 50), (2, end)]]
            (run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, distances)))
            if seed < 2:                                                        # the third has not ended
                (run / 'final.pt').touch()
        run.with_name(f'shapes-{method}-0.log').write_text('0.500 s a step\n0.500 s a step\n9.000 s a step\n')
    compare.table('shapes')
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert rows == ['| iCT | 6.0 ± 1.4 | 3.0 ± 0.7 |  |  | 2 | 0.500 |',
                    '| GC | 5.5 ± 2.1 | 2.8 ± 1.1 | -0.5 ± 0.7 | -0.2 ± 0.4 | 2 | 0.500 |',
                    '| VC | 6.0 | 3.0 | 1.0 | 0.5 | 1 | 0.500 |']
