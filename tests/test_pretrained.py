"""unet.load_pretrained: files in the published forms, which are imitated, hostile files, damaged files."""
import copyreg
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import unet
from common import UserError
from conftest import ROOT, named_weights
from unet import EDM2UNet, MPConv, SongUNet, load_pretrained, load_weights

BOTH = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=2, model_channels=8, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[4])
SONG, EDM2 = BOTH | dict(augment_dim=9), BOTH | dict(channels_per_head=8)
OLD = 'torch.save, old format'
WRITERS = {'pickle': pickle.dump, 'pickle protocol 2': lambda obj, file: pickle.dump(obj, file, protocol=2),
           'torch.save': torch.save,
           OLD: lambda obj, file: torch.save(obj, file, _use_new_zipfile_serialization=False)}


def written(writer, obj):
    file = io.BytesIO()
    WRITERS[writer](obj, file)
    return file.getvalue()


EasyDict = type('EasyDict', (dict,), {})


def _reconstruct_persistent_obj(meta):
    raise AssertionError('code named by the file was run')


def reduce(module):
    if type(module) is nn.ModuleDict:
        return copyreg.__newobj__, (nn.ModuleDict,), module.__dict__
    return _reconstruct_persistent_obj, (EasyDict(type='class', version=6, module_src='raise SystemExit("was run")',
                                                  class_name=type(module).__name__, state=module.__dict__),)


def publish(path, top, writer):
    """Pickles networks as the published ones are; modules that they name are stood in for while that lasts. -> bytes"""
    EasyDict.__module__, _reconstruct_persistent_obj.__module__ = 'dnnlib.util', 'torch_utils.persistence'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, '__reduce__', reduce)
        for name in 'dnnlib', 'dnnlib.util', 'torch_utils', 'torch_utils.persistence':
            patch.setitem(sys.modules, name, sys.modules[__name__])
        path.write_bytes(written(writer, top))
    return path.read_bytes()


class Precond(nn.Module):
    def __init__(self, net, name='model', **init):
        super().__init__()
        self._modules[name], self._init_args, self._init_kwargs = net, (), dict(init)
        self.sigma_data, self.sigma_min, self.use_fp16 = 0.5, np.float64(0.002), False
        self.logvar_linear = MPConv(4, 1) if name == 'unet' else None


def same(found, net):
    found = {name: p for name, p in found.items() if not name.startswith('logvar_')}
    assert list(found) == list(net.state_dict()) and all(p.dtype == torch.float32 for p in found.values())
    assert all(torch.equal(found[name], p.float()) for name, p in net.state_dict().items())


@pytest.mark.parametrize('form', ['edm', 'edm2', 'ect'])
@pytest.mark.parametrize('writer, half', [('pickle', True), ('pickle protocol 2', False), ('torch.save', True)])
def test_published_forms(form, writer, half, tmp_path):
    net, loss = named_weights(EDM2UNet(**EDM2) if form == 'edm2' else SongUNet(**SONG)), nn.Identity()
    net, loss.sigmoid = net.half() if half else net, loss.forward         # a bound method: pickled as a call of getattr
    publish(tmp_path / 'x.pkl', {
        'edm': dict(ema=Precond(net, **SONG), loss_fn=nn.Identity(), augment_pipe=None),
        'edm2': EasyDict(encoder=nn.Identity(), dataset_kwargs=EasyDict(path='x'), ema=Precond(net, 'unet', **EDM2)),
        'ect': dict(loss_fn=loss, dataset_kwargs=EasyDict(size=np.int64(5)), ema=Precond(net))}[form], writer)
    tensors, about = load_pretrained(tmp_path / 'x.pkl')
    same(tensors, net)
    assert json.loads(json.dumps(about)) == about and about['format'] == {'ect': 'edm'}.get(form, form)
    assert about.items() >= {**{'edm': SONG, 'edm2': EDM2, 'ect': {}}[form], 'sigma_data': 0.5}.items()
    fresh = EDM2UNet(**EDM2) if form == 'edm2' else SongUNet(**SONG | dict(augment_dim=0))  # no map_augment, logvar_*
    load_weights(fresh, tensors, 'x.pkl')
    assert all(torch.equal(tensors[name], p) for name, p in fresh.state_dict().items())


@pytest.mark.parametrize('writer', WRITERS)
def test_own_checkpoints_and_bare_state_dicts(writer, tmp_path):
    net, encoder = named_weights(SongUNet(**SONG)), {'encoder.enc.conv.weight': torch.ones(2)}          # VCT's
    state, config = net.state_dict(), dict(script='sct', mults=[1, 2], lr=1e-4, cond=True, labels=None)
    checkpoint = dict(step=7, net={'w': torch.ones(1)}, ema=state | encoder, config=config)
    for obj in [checkpoint, state, state | encoder, {f'model.{name}': p for name, p in state.items()}]:
        (tmp_path / 'x.pt').write_bytes(written(writer, obj))
        tensors, about = load_pretrained(str(tmp_path / 'x.pt'))
        same(tensors, net)
        if obj is checkpoint:
            assert about == dict(format='state_dict', step=7, script='sct', mults=[1, 2], lr=1e-4, cond=True)


def test_addresses_are_fetched_once_and_checked(tmp_path):
    net, cache = nn.Linear(3, 2), tmp_path / 'deep' / 'cache'
    publish(tmp_path / 'x.pkl', dict(ema=Precond(net)), 'pickle')
    url, other = (tmp_path / 'x.pkl').as_uri(), tmp_path / 'other' / 'x.pkl'           # same name, another address
    same(load_pretrained(url, cache)[0], net)
    (tmp_path / 'x.pkl').unlink()
    same(load_pretrained(url, cache)[0], net)
    with pytest.raises(UserError, match='has sha256'):
        load_pretrained(f'{url}#sha256=00112233', cache)
    other.parent.mkdir()
    torch.save({'w': torch.ones(1)}, other)
    assert list(load_pretrained(other.as_uri(), cache)[0]) == ['w']
    for url in ('http://127.0.0.1:9/x.pkl', 'file:///nowhere/x.pkl', 'http://127.0.0.1:port/x', 'https://'):
        with pytest.raises(UserError, match='could not be downloaded'):
            load_pretrained(url, tmp_path)


class Calls(tuple):
    """Pickled as a call of its first item with the others."""
    __new__ = lambda cls, *items: tuple.__new__(cls, items)
    __reduce__ = lambda self: (self[0], self[1:])


def refused(path, *words, data=None):
    """The file, which is given the bytes `data`, is refused in one line that contains the words."""
    if data is not None:
        path.write_bytes(data)
    before = set(sys.modules)
    with pytest.raises(UserError) as error:
        load_pretrained(path)
    text = str(error.value)
    assert '\n' not in text and len(text) < 500 and all(word in text for word in (str(path), *words)), text
    assert all(name.startswith('encodings.') for name in sys.modules.keys() - before)


@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('place', ['top', 'ema', 'loss_fn', 'parameter', 'bytes of a storage'])
def test_calls_are_refused_by_name_and_not_made(writer, place, tmp_path):
    marker, code = tmp_path / 'marker', f'open({str(tmp_path / "marker")!r}, "w")'
    for function, args, name in [
            (os.system, (f'touch {marker}',), 'posix.system'), (os.mkdir, (str(marker),), 'posix.mkdir'),
            (eval, (code,), 'builtins.eval'), (exec, (code,), 'builtins.exec'), (Path, (str(marker),), 'pathlib'),
            (__import__, ('this',), 'builtins.__import__'), (nn.Identity, (), 'linear.Identity'),
            (subprocess.check_call, (['touch', str(marker)],), 'check_call'), (np.dtype, ('O',), 'neither'),
            (torch.load, (str(marker),), 'torch.serialization.load'),
            (np.empty(0, object).__reduce__()[0], (np.ndarray, (0,), b'b'), 'multiarray._reconstruct')]:
        evil = Calls(function, *args)
        if place == 'bytes of a storage':
            inner = 'pickle' if function is eval else OLD
            evil = Calls(torch.storage._load_from_bytes, written(inner, evil))
        obj = {'top': evil, 'ema': dict(ema=evil), 'loss_fn': dict(ema={}, loss_fn=evil)}.get(place, {'w': evil})
        refused(tmp_path / 'x.pkl', name, data=written(writer, obj))
        assert not marker.exists() and 'this' not in sys.modules


@pytest.mark.parametrize('program, word', [
    (b'cos\nsystem\n(X\x04\x00\x00\x00truetR.', 'os.system'), (b'(X\x04\x00\x00\x00trueios\nsystem\n.', 'os.system'),
    (b'(cos\nsystem\nX\x04\x00\x00\x00trueo.', 'os.system'), (b'\x80\x04\x8c\x02os\x8c\x06system\x93.', 'os.system'),
    (b'\x80\x04\x8c\x06\x1b[2Jos\x8c\x06system\x93.', r"'\x1b[2Jos.system'"),       # nor is the terminal told anything
    (b'\x80\x04\x8c\x0dtorch.storage\x8c\x1c_load_from_bytes.__globals__\x93.', '_load_from_bytes.__globals__'),
    (b'\x80\x02X\x09\x00\x00\x00os.systemX\x04\x00\x00\x00true\x85R.', 'not callable'),         # text is not a name
    (b'\x80\x02c__builtin__\ngetattr\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R)R.', 'not callable'),   # nor this
    (b'\x80\x02ctorch\nFloatStorage\n)R.', 'not callable'), (b'\x80\x02\x82\x01.', 'EXT1'), (b'P0\n.', 'unpack'),
    (b'\x80\x02}r\xff\xff\xff\xff.', 'LONG_BINPUT'), (b'}p99999999999\n.', 'PUT'), (b'\x80\x04}.', 'neither'),
    (b'\x80\x04N.', 'neither'), (b'\x80\x04]]\x93.', 'str'), (b'\x80\x05\x96' + b'\xff' * 7 + b'\x0f', ''),
    (b'\x80\x04\x95' + b'\xff' * 7 + b'\x7f}.', ''), (b'\x80\x04\x8e' + b'\xff' * 7 + b'\x7f', ''), (b'\x8a' * 3, ''),
    (b'L' + b'9' * 10 ** 5 + b'L\n.', ''), (b'.', ''), (b'', ''), (b'PK\x03\x04' + bytes(100), '')])
def test_raw_programs(program, word, tmp_path):
    refused(tmp_path / 'x.pkl', word, data=program)


def test_files_cannot_change_what_they_are_given(tmp_path):
    """Setting attributes of an allowed function or class must not reach the next file, nor this program."""
    def attributes():
        things = [*unet.KNOWN.values(), torch._utils._rebuild_tensor_v2, torch.storage._load_from_bytes]
        return [(thing, getattr(thing, '__defaults__', None), dict(getattr(thing, '__dict__', {}))) for thing in things]
    before = attributes()
    for name in unet.KNOWN:
        for state in [{'__defaults__': (1,), 'x': 1}, (None, {'__defaults__': (1,), 'update': 1, '__setstate__': 1})]:
            for call in [b'', b')R', b')\x81']:             # attributes of itself, of its result, and of its instance
                start = b'\x80\x02c' + b'\n'.join(name.encode().rsplit(b'.', 1)) + b'\n'
                refused(tmp_path / 'x.pkl', data=start + call + pickle.dumps(state, protocol=2)[2:-1] + b'b.')
                assert attributes() == before


@pytest.mark.parametrize('writer', WRITERS)
def test_tensors_stay_within_their_storage_and_share_none(writer, tmp_path):
    numbers, build = torch.arange(6.0), lambda *args: written(writer, {
        name: Calls(torch._utils._rebuild_tensor_v2, numbers._typed_storage(), *args, False, {}) for name in 'ab'})
    for args in [(0, (2, 3), (3, 1)), (5, (1,), (1,)), (0, (3, 2), (1, 3)), (0, (), ()), (6, (0,), (1,))]:
        (tmp_path / 'x.pkl').write_bytes(build(*args))
        found = load_pretrained(tmp_path / 'x.pkl')[0]
        found['a'].fill_(9)
        assert torch.equal(found['b'], numbers.as_strided(args[1], args[2], args[0])) and found['b'].is_contiguous()
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float64, torch.bfloat16):
        (tmp_path / 'x.pkl').write_bytes(written(writer, {'w': torch.tensor([0, 1], dtype=dtype)}))
        found = load_pretrained(tmp_path / 'x.pkl')[0]['w']
        assert found.dtype == torch.float32 and found.tolist() == [0, 1]
    for args in [(0, (7,), (1,)), (1, (6,), (1,)), (6, (), ()), (0, (3, 2), (4, 1)), (0, (2,), (6,)), (-1, (2,), (1,)),
                 (2 ** 61, (2,), (2 ** 60,)), (0, (5,), (2 ** 62,)), (0, (-2,), (1,)), (0, (2,), (-1,)),
                 (0, (2, 3), (1,)), (0, (2 ** 32, 2 ** 32), (0, 0)), (0.0, (2,), (1,)), (0, None, None)]:
        refused(tmp_path / 'x.pkl', data=build(*args))


def test_damaged_files(tmp_path):
    path = tmp_path / 'x.pkl'
    for writer in WRITERS:
        data = publish(path, dict(ema=Precond(nn.Linear(30, 3))), writer)
        for n in [0, 1, 2, 10, *np.linspace(11, len(data) - 1, 30, dtype=int)]:
            refused(path, data=data[:n])
    archive = zipfile.ZipFile(io.BytesIO(written('torch.save', {'w': torch.arange(100.0)})))
    for end, size in [('/0', 396), ('/0', 399), ('/0', 0), ('data.pkl', 0)]:            # numbers or a part are missing
        with zipfile.ZipFile(path, 'w') as cut:
            for name in archive.namelist():
                cut.writestr(name, archive.read(name)[:size if name.endswith(end) else None])
        refused(path)
    refused(tmp_path, 'directory')
    refused(tmp_path / 'none.pkl', 'No such file')


LOAD_ALL = """
import pathlib, resource, sys
import common, unet
for seed in pathlib.Path().glob('*.seed'):                  # what is imported late is imported now, with the codecs of
    unet.load_pretrained(seed)                              # the oldest texts of pickle and zip
text, counts = 'x'.encode('raw_unicode_escape').decode('cp437'), dict(good=0, bad=0, deep=0)
paths, memory = sorted(pathlib.Path().glob('*.pkl')), int(open('/proc/self/statm').read().split()[0])
watched = ('import', 'exec', 'compile', 'os.', 'subprocess.', 'socket.', 'shutil.', 'ctypes.', 'code.', 'marshal.')
sys.addaudithook(lambda event, args: event.startswith(watched) and print(event, args))
sys.addaudithook(lambda event, args: event == 'open' and not str(args[0]).endswith('.pkl') and print(event, args))
resource.setrlimit(resource.RLIMIT_AS, (memory * resource.getpagesize() + 2 ** 29,) * 2)
for path in paths:
    try:
        assert all(p.dtype == unet.torch.float32 for p in unet.load_pretrained(path)[0].values())
        counts['good'] += 1
    except common.UserError as error:
        assert len(str(error)) < 600
        counts['deep' if path.name.startswith('deep') else 'bad'] += 1
print(*counts.values())
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_deep_files_and_a_thousand_mutations_run_nothing_and_crash_nothing(tmp_path):
    """In a process with half a GiB to spend, whose audit reports what is run."""
    n, module = 60_000, b'ctorch.nn.modules.container\nModuleDict\n)\x81}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00a'
    nested, shared = b'', nn.ModuleDict()
    for i in range(300):
        nested = pickle.dumps(Calls(torch.storage._load_from_bytes, nested))
        shared = nn.ModuleDict({'a': shared, 'b': shared}) if i < 60 else shared            # a network of 2^60 parts
    publish(tmp_path / 'deep.pkl', dict(ema=shared), 'pickle')
    for i, program in enumerate([
            b']' * n + b'a' * (n - 1) + b'.', b'}' + b'X\x01\x00\x00\x00a}' * n + b's' * n + b'.', nested[2:],
            b'})' + b'\x85' * 300_000 + b'K\x01s.', b'})' + b'\x85' * 49_000 + b'K\x01s.', b'(' * n + b't' * n + b'.',
            module * 20_000 + b'N' + b'ssb' * 20_000 + b'.']):            # lists, dicts, tuples, networks in each other
        (tmp_path / f'deep{i}.pkl').write_bytes(b'\x80\x04' + program)

    rng, part, seeds = random.Random(0), nn.ModuleDict({'a': nn.Linear(3, 2), 'b': nn.Linear(2, 2)}), []
    for writer in WRITERS:
        top = dict(ema=Precond(part, width=3), loss_fn=part.forward, options=EasyDict(size=np.int64(5)))
        seeds.append(publish(tmp_path / f'{writer}.seed', part.state_dict() if 'old' in writer else top, writer))
    words = [b'cposix\nsystem\n', b'c__builtin__\neval\n', b'\xff' * 4, b'eval', b'h\x01', b'\x82\x01', b'\x85R',
             *(bytes([code]) for code in b'Rb.(rQ20oi\x81\x93\x96\x8d\x8e\x8b')]
    for i in range(1000):
        mutant = bytearray(seeds[i % 4])
        for _ in range(rng.choice([1, 1, 1, 2, 10])):
            at, start = rng.randrange(len(mutant)), rng.randrange(len(mutant))
            word, other = rng.choice(words), rng.choice(seeds)
            new, old = rng.choice([(bytes([rng.randrange(256)]), 1), (b'', rng.randrange(20)), (word, 0),
                                   (word, len(word)), (other[start:start + rng.randrange(200)], 0)])
            mutant[at:at + old] = new
        (tmp_path / f'{i}.pkl').write_bytes(mutant)
    done = subprocess.run([sys.executable, '-Wignore', '-c', LOAD_ALL], env=os.environ | {'PYTHONPATH': str(ROOT)},
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, '')
    good, bad, deep = map(int, done.stdout.split())
    assert deep == 8 and good + bad == 1000 and good > 20 and bad > 500        # else the mutations test nothing
