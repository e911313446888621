"""What the README promises: its commands, its Python example, files that can be copied, one voice in three scripts."""
import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import common
import fid
from conftest import ROOT, SCRIPTS, Script

README = (ROOT / 'README.md').read_text()
INSTALL = 'python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && '     # what CI does
BLOCKS = [re.sub('^    ', '', block.strip('\n'), flags=re.M)
          for block in re.findall(r'(?:^    .*\n(?:\n(?=    ))?)+', README, re.M)]


def commands():
    """Every call of a script in the README, shell loops and variables resolved by bash. -> [[script, flag, ...]]"""
    shell = ['record() { for word in "$@"; do printf "%s\\0" "$word"; done; printf "\\n\\0"; }',
             *(f'{name}() {{ record "$@"; }}' for name in ('python', 'torchrun', 'srun'))]
    shell += [block.replace(INSTALL, '') for block in BLOCKS if re.search(r'\b(python|torchrun|srun) ', block)]
    shell += re.findall(r"`(python (?:\w+)\.py(?: [^`|]*)?)`", README)
    done = subprocess.run(['bash', '-ec', '\n'.join(shell)], capture_output=True, text=True, check=True)
    calls = [call.rstrip('\0').split('\0') for call in done.stdout.split('\n\0')[:-1]]
    found = []
    for words in calls:
        script = next((i for i, word in enumerate(words) if word.endswith('.py')), None)
        if script is None:
            assert words[:2] == ['-m', 'pytest'], words
        elif words[script:] not in found:
            found.append(words[script:])
    return found


def test_the_commands_are_found():
    found = commands()
    assert ['sct.py'] in found and ['vct.py'] in found and ['gc_ct.py'] in found
    assert ['sct.py', '--dataset', 'cifar10', '--gpus', '8'] in found
    assert any(call[0] == 'fid.py' for call in found) and any('S/vc-2' in call for call in found)
    assert {flag for call in found for flag in call} >= {'--analyse', '--evaluate', '--sample', '--resume', '--guide'}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A small run of each script, in the folder that its default run has."""
    folder = tmp_path_factory.mktemp('runs')
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    draw = common.shapes
    patch.setattr(common, 'shapes', lambda n=100, resolution=16: draw(n, resolution))
    for name in SCRIPTS:
        assert Script(name).train('--steps', 2, '--resolution', 16) == 0
    yield folder
    patch.undo()


def test_each_command_is_understood(runs, monkeypatch, capsys):
    """With --dry-run; a run that a command uses and that is not there is one of two steps instead."""
    class Understood(Exception):
        pass

    def stop(*_):
        raise Understood
    for script, *flags in commands():
        flags = [flag.replace('NAME', 'cifar10') for flag in flags]
        name = script.removesuffix('.py')
        if script.startswith('tests/'):
            assert (ROOT / script).exists()
            continue
        if script == 'fid.py':                                  # alone it is but named
            if not flags:
                continue
            with monkeypatch.context() as patch, pytest.raises(Understood):
                patch.setattr(fid, 'read_pictures', stop)
                fid.main(flags)
            continue
        for flag, value in zip(flags, flags[1:]):
            uses = flag in ('--sample', '--evaluate', '--analyse', '--init', '--guide', '--out')
            if uses and not Path(value).exists():
                if value == 'none' or flag == '--out' and '--resume' not in flags:
                    continue
                assert 'cifar10' in value or value.split('/')[0] in 'SCF', value
                Path(value).parent.mkdir(parents=True, exist_ok=True)
                Path(value).symlink_to(runs / f'runs/{name}-shapes')
        if '--resume' in flags and '--out' not in flags:
            flags.remove('--resume')
        if 'ot' in flags and not importlib.util.find_spec('scipy'):             # refused: another test
            continue
        module, settings = importlib.import_module(name), [flag for flag in flags if flag != '--help']
        assert common.run(module.main, [*settings, '--dry-run']) == 0, (script, flags, capsys.readouterr().err)
        assert json.loads(capsys.readouterr().out)['script'] == name


def test_the_python_example(runs, monkeypatch):
    example, = [block for block in BLOCKS if block.startswith('from sct import')]
    for name in SCRIPTS:
        space = {}
        exec(example.replace('sct', name), space)
        assert space['images'].shape == (16, 3, 16, 16) and space['images'].abs().max() <= 1


def test_help_has_groups_with_examples_that_are_understood(runs, capsys):
    for name in SCRIPTS:
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(['--help'])
        text = capsys.readouterr().out
        titles = re.findall(r'^(\w[\w ]*):\n  python (\w+)\.py (.*)$', text, re.M)
        assert [title for title, *_ in titles] == [
            'data', 'network', 'method', 'optimisation', 'run', 'sampling and evaluation']
        for _, script, flags in titles:
            assert script == name
            flags = [flag for flag in shlex.split(flags) if flag != '--resume']
            assert common.run(importlib.import_module(name).main, [*flags, '--dry-run']) == 0, flags
            capsys.readouterr()


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_runs_when_copied(name, tmp_path):
    """With common.py, unet.py and fid.py into an empty folder."""
    for file in (f'{name}.py', 'common.py', 'unet.py', 'fid.py'):
        shutil.copy(ROOT / file, tmp_path)
    flags = [*Script(name).small, '--steps', 2, '--resolution', 8, '--batch', 4, '--eval-every', 2]
    subprocess.run([sys.executable, f'{name}.py', *map(str, flags)], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / f'runs/{name}-shapes/final.pt').exists()


def test_the_scripts_have_one_voice():
    """The same sections in the same order, and functions of one name in the same order."""
    texts = [(ROOT / f'{name}.py').read_text() for name in SCRIPTS]
    sections = [re.findall(r'^# \d\. (\w+)', text, re.M) for text in texts]
    for found in sections:
        assert found[:3] == ['Presets', 'Noise', 'Model'] and found[4:7] == ['Loss', 'Sampling', 'Training']
        assert found[-1] == 'Command'
    # A ninth section, the diagnostics, is each paper's own.
    texts = [re.sub(r'^# 8\..*(?=^# 9\.)', '', text, flags=re.M | re.S) for text in texts]
    names = [re.findall(r'^def (\w+)', text, re.M) for text in texts]
    for one in names:
        for other in names:
            assert [name for name in one if name in other] == [name for name in other if name in one]
        assert {'f', 'loss', 'sample', 'load', 'train', 'add_flags', 'main'} <= set(one)


def test_common_has_nothing_that_one_script_alone_uses():
    used = {}
    for file in (*SCRIPTS, 'fid', 'unet', 'common'):
        tree = ast.parse((ROOT / f'{file}.py').read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'common':
                used.setdefault(node.attr, set()).add(file)
            if file == 'common' and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.setdefault(node.id, set()).add(file)
            if file == 'fid' and isinstance(node, ast.ImportFrom) and node.module == 'common':
                used.setdefault(node.names[0].name, set()).add(file)
    public = [node.name for node in ast.parse((ROOT / 'common.py').read_text()).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for name in public:
        assert len(used.get(name, ())) > 1 or used.get(name) & {'common', 'fid', 'unet'}, (name, used.get(name))


def test_lines_are_no_longer_than_120():
    for path in (*ROOT.glob('*.py'), *ROOT.glob('tests/*.py')):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f'{path.name}:{number}'
