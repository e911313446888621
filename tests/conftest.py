"""Shared by all tests: the scripts on the path, a command runner, and real data where it is at hand."""
import contextlib
import functools
import importlib.util
import inspect
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

# Before torch starts, here and in the processes that tests start: tiny networks are no slower on one thread, and many
# times faster where the machine has other work, because threads wait for each other after every small operation.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common

DATA = Path(os.environ.get('REAL_DATA', ROOT / 'data'))
slow = pytest.mark.skipif(not os.environ.get('RUN_SLOW'), reason='takes minutes: set RUN_SLOW=1')


def pytest_configure(config):
    config.addinivalue_line('markers', 'assets: needs real data or weights in data/ (or $REAL_DATA); skipped without')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without fsync, and without the stack trace that torch.manual_seed formats at every call where no GPU is."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(os, 'fsync', lambda file: None)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, 'manual_seed', torch.default_generator.manual_seed)
    yield
    for number, handler in before.items():              # a run that is trained here catches them
        signal.signal(number, handler)


@pytest.fixture
def real():
    """real('cifar-10-batches-bin') -> its path, or the test is skipped with the reason."""
    def find(name):
        if not (DATA / name).exists():
            pytest.skip(f'{DATA / name} is not there')
        return DATA / name
    return find


def picture(path, size=(8, 8), seed=0, mode='RGB'):
    """Writes a picture of random pixels. -> path"""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def pictures(folder, n=12, seed=0):
    """Writes n pictures, no two alike. -> folder"""
    for i in range(n):
        picture(folder / f'{i:02}.png', seed=100 * seed + i)
    return folder


@pytest.fixture(scope='session')
def few_pictures(tmp_path_factory):
    """The flags for 40 pictures: processes that train on them need not draw 10,000 shapes before they begin."""
    return ['--dataset', 'folder', '--data-dir', str(pictures(tmp_path_factory.mktemp('pictures'), 40))]


@pytest.fixture
def refused(capsys):
    """refused(module, 'flags', 'words'): the command exits with 2 and one line on stderr that contains the words."""
    def call(module, flags, *words):
        argv = flags.split() if isinstance(flags, str) else [str(flag) for flag in flags]
        try:
            code = common.run(module.main, argv)
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
        assert code == 2 and error.count('\n') == 1, (code, error)
        for word in words:
            assert word in error, error
    return call


def named_weights(net):
    """The weights that both sides make from the parameters' names (the reference files hold none)."""
    for name, p in net.state_dict().items():
        if 'resample_filter' in name:
            continue
        r = np.asarray(np.random.RandomState(zlib.crc32(name.encode())).randn(*p.shape), np.float32)
        scale = 1 / np.sqrt(p[0].numel()) if p.ndim >= 2 else 0.1 if 'norm' in name and name.endswith('weight') else 0.2
        shift = 1 if p.ndim < 2 and 'norm' in name and name.endswith('weight') else 0
        p.copy_(torch.from_numpy(np.asarray(shift + scale * r, dtype=np.float32)))
    return net


SCRIPTS = {     # name: flags that make a run small
    'sct': ['--pretrain-steps', '0', '--ref-size', 'batch'],
    'gc_ct': [],
    'vct': ['--pretrain-steps', '0'],
}
TUNING = {'sct': [], 'gc_ct': ['--schedule', 'ect'], 'vct': ['--base', 'ecm']}          # from a diffusion model
TINY_NETWORK = ['--width', '8', '--mults', '1,1', '--blocks', '1']
SMALL = ['--resolution', '8', *TINY_NETWORK, '--batch', '8', '--steps', '4', '--fid-num', '20']
all_shapes = functools.cache(common.shapes)              # what a command draws; `script` has runs draw but 200


class Script:
    def __init__(self, name):
        self.name, self.module, self.small = name, importlib.import_module(name), [*SMALL, *SCRIPTS[name]]
        self.out = Path(f'runs/{name}-shapes')

    def run(self, *flags):
        return common.run(self.module.main, [str(flag) for flag in flags])

    def train(self, *flags):
        return self.run(*self.small, *flags)


@pytest.fixture
def few_shapes(monkeypatch, tmp_path):
    """An empty folder to run in, where the built-in data set has but 200 pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, 'shapes', lambda n=200, resolution=16, draw=common.shapes: draw(n, resolution))


@pytest.fixture(params=SCRIPTS)
def script(request, few_shapes):
    return Script(request.param)


@pytest.fixture
def after_step():
    """after_step(n, act) calls act() when an optimiser has done its n-th step from now."""
    hooks = []

    def watch(n, act):
        steps = itertools.count(1)
        hooks.append(register_optimizer_step_post_hook(lambda *_: act() if next(steps) == n else None))
    yield watch
    for hook in hooks:
        hook.remove()


def tool(name):
    """A script of .github/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f'.github/{name}.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def stop(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def start(name, cwd, *flags):
    return subprocess.Popen([sys.executable, str(ROOT / f'{name}.py'), *map(str, flags)], cwd=cwd, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def endless(name, gpus, data, cwd):
    process, metrics = start(name, cwd, *data, *Script(name).small, '--steps', 100_000, '--device', 'cpu', '--gpus',
                             gpus, '--out', 'run'), cwd / 'run/metrics.jsonl'
    while not (metrics.exists() and metrics.read_text().count('\n') > 2):
        assert process.poll() is None
        time.sleep(0.1)
    return process


@contextlib.contextmanager
def room(size):
    """No file may grow beyond `size` bytes: as on a disk that is nearly full."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def lines(out):
    return [json.loads(line) for line in (Path(out) / 'metrics.jsonl').read_text().splitlines()]


def weights(out, name='final.pt'):
    return torch.load(Path(out) / name, weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def spy(monkeypatch):
    """spy(module, 'name') -> the list of its calls from now on: call.x is what parameter x was, call.result."""
    def watch(owner, name):
        function, calls = getattr(owner, name), []

        def call(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append(SimpleNamespace(**{**bound.arguments, 'result': function(*args, **kwargs)}))
            return calls[-1].result
        monkeypatch.setattr(owner, name, call)
        return calls
    return watch


class Casts(TorchDispatchMode):
    """Notes the address and size of each tensor that is copied in another type."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.found.append((args[0].data_ptr(), args[0].numel()))
        return function(*args, **kwargs or {})


def close(a, b, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)


def wide(t):
    return t[:, None, None, None]


def toy(x_in, c_noise, y=None, scale=0.1):
    """The network of the reference files; gc_losses.npz has scale 0.2 for its moving average."""
    return torch.tanh(x_in) * torch.cos(wide(c_noise)) + scale * x_in


def draws(step, batch=8, resolution=8, seed=0, flip=False):
    """What a run on 200 pictures draws for a step: its images, labels and noise."""
    data = all_shapes(200, resolution)
    index = common.batch_indices(200, batch, step, seed)
    x0 = common.normalise(data.images[index])
    x0 = common.mirror(x0, seed, step, 'flip') if flip else x0
    return x0, data.labels[index], common.randn(x0.shape, seed, step, 'noise')


def exact_mean(x_t, t, refs, allowed=None):
    """E[x0 | x_t] over the references that are allowed, (B, N) bool, by brute force in float64."""
    x, c = x_t.double().flatten(1), refs.double().flatten(1)
    logits = -torch.cdist(x, c, compute_mode='donot_use_mm_for_euclid_dist').square() / (2 * t.double()[:, None] ** 2)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return (logits.softmax(1) @ c).view_as(x_t)


def model_of(net, encoder=None, **config):
    """A stand-in for a loaded model: `net`, perhaps VCT's encoder, and the settings that sampling reads."""
    model = torch.nn.Module()
    model.weight, model.label_dim, model.forward = torch.nn.Parameter(torch.zeros(1)), 0, net
    if encoder:
        model.encoder = torch.nn.Module()
        model.encoder.label_dim, model.encoder.forward = 0, encoder
    model.config = dict(precision='fp32', label_dim=0, phases=1, edges=None, eta=1.0, t_mid=0.821, kernel='ve',
                        coupling='vc' if encoder else 'independent', in_channels=1, resolution=1) | config
    return model


def analysed(script, capsys):
    """Runs --analyse -> the rows of the tables that it prints, as numbers, and all its lines."""
    capsys.readouterr()
    assert script.run('--analyse', script.out) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith('noise levels: ')]
    return np.array([line.split() for line in lines if line.strip()[:1].isdigit()], float), lines
