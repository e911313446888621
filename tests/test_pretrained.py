"""unet.load_pretrained: files in the published forms, hostile files, damaged files.

The published files are imitated, not copied: stand-ins for the two modules that their pickles name exist only while a
file is being written, so that reading it proves that neither is needed.
"""
import codecs
import contextlib
import copyreg
import io
import json
import os
import pickle
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import sct
from common import UserError
from conftest import named_weights
from unet import EDM2UNet, MPConv, MPFourier, SongUNet, load_pretrained, load_weights

SONG = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=2, augment_dim=9, model_channels=8,
            channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
EDM2 = dict(img_resolution=8, in_channels=3, out_channels=3, label_dim=2, model_channels=8, channel_mult=[1, 2],
            num_blocks=1, attn_resolutions=[4], channels_per_head=8)
WRITERS = {
    'pickle': lambda obj, file: pickle.dump(obj, file),
    'pickle protocol 2': lambda obj, file: pickle.dump(obj, file, protocol=2),
    'torch.save': lambda obj, file: torch.save(obj, file),
    'torch.save, old format': lambda obj, file: torch.save(obj, file, _use_new_zipfile_serialization=False),
}


@contextlib.contextmanager
def publisher():
    """Inside, networks are pickled as the published ones are; yields the dict class that those codes use."""
    def _reconstruct_persistent_obj(meta):
        raise AssertionError('code named by the file was run')

    class EasyDict(dict):
        pass

    stand_ins = {}
    for name, thing in [('torch_utils.persistence', _reconstruct_persistent_obj), ('dnnlib.util', EasyDict)]:
        module = types.ModuleType(name)
        thing.__module__, thing.__qualname__ = name, thing.__name__
        setattr(module, thing.__name__, thing)
        stand_ins |= {name.split('.')[0]: types.ModuleType(name.split('.')[0]), name: module}

    def reduce(module):
        if type(module) is nn.ModuleDict:
            return copyreg.__newobj__, (nn.ModuleDict,), module.__dict__
        return _reconstruct_persistent_obj, (EasyDict(
            type='class', version=6, module_src='raise SystemExit("module_src was run")',
            class_name=type(module).__name__, state=module.__dict__),)

    nn.Module.__reduce__ = reduce
    sys.modules.update(stand_ins)
    try:
        yield EasyDict
    finally:
        del nn.Module.__reduce__
        for name in stand_ins:
            del sys.modules[name]


class EDMPrecond(nn.Module):
    def __init__(self, net, **init):
        super().__init__()
        self.model, self._init_args, self._init_kwargs = net, (), dict(init)
        self.sigma_data, self.sigma_min, self.use_fp16 = 0.5, np.float64(0.002), False


class Precond(nn.Module):
    def __init__(self, net, **init):
        super().__init__()
        self.unet, self._init_args, self._init_kwargs = net, (), dict(init)
        self.logvar_fourier, self.logvar_linear = MPFourier(4), MPConv(4, 1)
        self.sigma_data = 0.5


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = self.schedule        # a bound method: pickled as a call of getattr

    def schedule(self, t):
        return t


def write(path, form, writer='pickle', half=False):
    """A file of one of the published forms. -> the network that is in it"""
    torch.manual_seed(0)
    net = named_weights(EDM2UNet(**EDM2) if form == 'edm2' else SongUNet(**SONG))
    net = net.half() if half else net
    with publisher() as EasyDict, open(path, 'wb') as file:
        if form == 'edm':
            top = dict(ema=EDMPrecond(net, **SONG), loss_fn=nn.Identity(), augment_pipe=None,
                       dataset_kwargs=EasyDict(path='x'))
        elif form == 'edm2':
            top = EasyDict(encoder=nn.Identity(), dataset_kwargs=EasyDict(), loss_fn=None, ema=Precond(net, **EDM2))
        elif form == 'ect':
            top = dict(loss_fn=Loss(), augment_pipe=None, dataset_kwargs=EasyDict(max_size=np.int64(50000)),
                       ema=EDMPrecond(net))
        WRITERS[writer](top, file)
    assert not {'torch_utils', 'torch_utils.persistence', 'dnnlib', 'dnnlib.util'} & sys.modules.keys()
    return net


def same(found, net):
    wanted = net.state_dict()
    found = {name: p for name, p in found.items() if not name.startswith('logvar_')}
    assert list(found) == list(wanted)
    for name, p in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], p.float()), name


# Published forms

@pytest.mark.parametrize('form', ['edm', 'edm2', 'ect'])
@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('half', [False, True])
def test_published_forms(form, writer, half, tmp_path):
    net = write(tmp_path / 'x.pkl', form, writer, half)
    tensors, about = load_pretrained(tmp_path / 'x.pkl')
    assert type(tensors) is dict
    same(tensors, net)
    assert about['format'] == {'edm': 'edm', 'edm2': 'edm2', 'ect': 'edm'}[form] and about['sigma_data'] == 0.5
    assert json.loads(json.dumps(about)) == about
    if form == 'edm':
        assert about.items() >= dict(SONG, class_name='EDMPrecond', sigma_min=0.002, use_fp16=False).items()
    assert ('logvar_linear.weight' in tensors) == (form == 'edm2')

    fresh = EDM2UNet(**EDM2) if form == 'edm2' else SongUNet(**SONG | dict(augment_dim=0))  # no map_augment, logvar_*
    load_weights(fresh, tensors, 'x.pkl')
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 1.0]), torch.eye(2)
    torch.testing.assert_close(fresh.eval()(x, t, y), net.float().eval()(x, t, y))


def test_weights_do_not_share_memory_and_keep_the_layout_of_the_file_away(tmp_path):
    net = SongUNet(**SONG).to(memory_format=torch.channels_last)
    both = {'a': torch.arange(6.0).view(2, 3).T, 'b': torch.arange(4.0)[1:3]}
    both['c'] = both['a']
    torch.save(net.state_dict() | both, tmp_path / 'x.pt')
    tensors, _ = load_pretrained(tmp_path / 'x.pt')
    assert tensors['a'].tolist() == [[0, 3], [1, 4], [2, 5]] and tensors['b'].tolist() == [1, 2]
    assert all(p.is_contiguous() for p in tensors.values())
    tensors['a'].zero_()
    assert tensors['c'].sum() == 15


@pytest.mark.parametrize('writer', WRITERS)
def test_own_checkpoints_and_bare_state_dicts(writer, tmp_path):
    net, other = named_weights(SongUNet(**SONG)), SongUNet(**SONG)
    optimizer = torch.optim.RAdam(other.parameters())
    other(torch.randn(2, 3, 8, 8), torch.zeros(2)).sum().backward()
    optimizer.step()
    checkpoint = dict(step=7, net=other.state_dict(), ema=net.state_dict(), optimizer=optimizer.state_dict(),
                      config=dict(script='sct', mults=[1, 2], lr=1e-4, cond=True, labels=None))
    wrapped = {f'model.{key}': p for key, p in net.state_dict().items()}
    for name, obj in [('checkpoint.pt', checkpoint), ('final.pt', net.state_dict()), ('wrapped.pt', wrapped)]:
        with open(tmp_path / name, 'wb') as file:
            WRITERS[writer](obj, file)
    tensors, about = load_pretrained(tmp_path / 'checkpoint.pt')
    same(tensors, net)
    assert about == dict(format='checkpoint', step=7, script='sct', mults=[1, 2], lr=1e-4, cond=True, labels=None)
    tensors, about = load_pretrained(str(tmp_path / 'final.pt'))
    same(tensors, net)
    assert about == dict(format='state_dict')
    same(load_pretrained(tmp_path / 'wrapped.pt')[0], net)


def test_a_run_of_sct_can_be_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = '--width 8 --blocks 1 --batch 8 --steps 2 --pretrain-steps 0 --ref-size batch --out run --device cpu'
    assert sct.main(flags.split()) in (None, 0)
    model = sct.load('run')
    for name in ['run/checkpoint.pt', 'run/final.pt']:
        same(load_pretrained(name)[0], model)


def test_denoiser_of_a_loaded_network_is_scts_f(tmp_path):
    write(tmp_path / 'x.pkl', 'edm')
    tensors, about = load_pretrained(tmp_path / 'x.pkl')
    net = SongUNet(**{name: about[name] for name in SONG}).eval()
    load_weights(net, tensors, 'x.pkl')
    t, s, y = torch.tensor([0.002, 0.1, 1.0, 5.0, 80.0]), about['sigma_data'], torch.eye(2)[[0, 1, 1, 0, 1]]
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * (1 + t[:, None, None, None])
    # EDM Table 1: D = c_skip x + c_out F(c_in x, ln(t) / 4)
    with torch.no_grad():
        c_skip, c_out, c_in = s ** 2 / (t ** 2 + s ** 2), t * s / (t ** 2 + s ** 2).sqrt(), 1 / (t ** 2 + s ** 2).sqrt()
        c_skip, c_out, c_in = (c[:, None, None, None] for c in (c_skip, c_out, c_in))
        D = c_skip * x + c_out * net(c_in * x, t.log() / 4, y)
        torch.testing.assert_close(sct.f(net, x, t, y, m=0.0), D, rtol=1e-6, atol=1e-6)
        assert (D - c_skip * x).abs().max() > 0.01      # F is in it


# Addresses

def test_addresses_are_fetched_once_and_checked(tmp_path):
    net = write(tmp_path / 'x.pkl', 'edm')
    url, cache = (tmp_path / 'x.pkl').as_uri(), tmp_path / 'deep' / 'cache'
    same(load_pretrained(url, cache)[0], net)
    cached, = cache.iterdir()
    assert cached.name.endswith('-x.pkl') and cached.read_bytes() == (tmp_path / 'x.pkl').read_bytes()
    (tmp_path / 'x.pkl').unlink()
    same(load_pretrained(url, cache)[0], net)
    with pytest.raises(UserError, match='has sha256'):
        load_pretrained(f'{url}#sha256=00112233', cache)
    other = tmp_path / 'other' / 'x.pkl'
    other.parent.mkdir()
    torch.save({'w': torch.ones(1)}, other)
    assert list(load_pretrained(other.as_uri(), cache)[0]) == ['w']         # same name, another address


@pytest.mark.parametrize('url', ['http://127.0.0.1:9/x.pkl', 'file:///nowhere/x.pkl', 'http://127.0.0.1:port/x',
                                 'https://'])
def test_addresses_that_give_nothing(url, tmp_path):
    with pytest.raises(UserError, match='could not be downloaded'):
        load_pretrained(url, tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


# Hostile files

class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def refused(path, *words):
    """The file is refused in one line that contains the words."""
    modules = lambda: {name for name in sys.modules if not name.startswith('encodings.')}  # Python's text codecs
    before = modules()
    with pytest.raises(UserError) as error:
        load_pretrained(path)
    text = str(error.value)
    assert '\n' not in text and len(text) < 500 and all(word in text for word in (str(path), *words)), text
    assert modules() == before


def storage_bytes(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('place', ['top', 'ema', 'loss_fn', 'parameter', 'bytes of a storage'])
def test_calls_are_refused_by_name_and_not_made(writer, place, tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / 'x.pkl'
    for function, args, name in [
            (os.system, (f'touch {marker}',), 'posix.system'), (eval, (f'open({str(marker)!r}, "w")',), 'eval'),
            (exec, (f'open({str(marker)!r}, "w")',), 'exec'), (getattr(os, 'mkdir'), (str(marker),), 'posix.mkdir'),
            (Path, (str(marker),), 'pathlib'), (subprocess.check_call, (['touch', str(marker)],), 'check_call'),
            (torch.load, (str(marker),), 'torch.serialization.load'), (np.load, (str(marker),), 'numpy.load'),
            (__import__, ('this',), '__import__')]:
        evil = Calls(function, *args)
        if place == 'bytes of a storage':
            raw = pickle.dumps(evil) if function is eval else storage_bytes(evil)
            evil = Calls(torch.storage._load_from_bytes, raw)
            evil = Calls(torch._utils._rebuild_tensor_v2, evil, 0, (1,), (1,), False, OrderedDict())
        obj = {'top': evil, 'ema': dict(ema=evil), 'loss_fn': dict(ema={'w': torch.ones(1)}, loss_fn=evil),
               'parameter': dict(ema={'w': evil})}.get(place, dict(ema={'w': evil}))
        with open(path, 'wb') as file:
            WRITERS[writer](obj, file)
        refused(path, name)
        assert not marker.exists() and 'this' not in sys.modules


@pytest.mark.parametrize('program, word', [
    (b'cos\nsystem\n(X\x04\x00\x00\x00truetR.', 'os.system'),
    (b'(X\x04\x00\x00\x00trueios\nsystem\n.', 'INST'),
    (b'(cos\nsystem\nX\x04\x00\x00\x00trueo.', 'os.system'),
    (b'\x80\x04\x8c\x02os\x8c\x06system\x93.', 'os.system'),
    (b'\x80\x04\x8c\x0btorch.utils\x8c\x0f_pytree.\nsystem\x93.', 'torch.utils'),
    (b'\x80\x04]]\x93.', 'expected str'),
    (b'\x80\x02X\x09\x00\x00\x00os.systemX\x04\x00\x00\x00true\x85R.', 'REDUCE'),               # text is not a name
    # Nor is what getattr gives.
    (b'\x80\x02c__builtin__\ngetattr\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R)R.', 'REDUCE'),
    (b'\x80\x02ctorch\nFloatStorage\n)R.', 'REDUCE'),
    (b'\x80\x02\x82\x01.', 'EXT1'), (b'P0\n.', 'PERSID'), (b'\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f', ''),
    (b'\x80\x02}r\xff\xff\xff\xff.', ''), (b'\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.', ''),
    (b'\x80\x02' + b'('* 100 + b't' * 99 + b'.', ''), (b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.', ''),
    (b'\x8a' * 3, ''), (b'L' + b'9' * 100_000 + b'L\n.', ''), (b'\x80\x04N.', 'neither'), (b'\x80\x04}.', 'neither'),
    (b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f', ''), (b'', ''), (b'PK', ''), (b'PK\x03\x04' + bytes(100), ''),
    (b'.', ''),
])
def test_raw_programs(program, word, tmp_path):
    (tmp_path / 'x.pkl').write_bytes(program)
    refused(tmp_path / 'x.pkl', word)


def test_object_dtypes_are_refused(tmp_path):
    path = tmp_path / 'x.pkl'
    for obj, word in [(np.dtype(object), 'numpy.dtype O8'), (np.dtype('M8[s]'), 'numpy.dtype M8'),
                      (np.dtype('V4'), 'numpy.dtype V4'),
                      (np.array([1, 'x'], dtype=object), 'multiarray._reconstruct'),
                      (Calls(np.float64(1).__reduce__()[0], np.dtype('f8'), b'short'), 'buffer')]:
        path.write_bytes(pickle.dumps(dict(ema={}, n=obj)))
        refused(path, word)


def build(path, writer, *args):
    """A state dict of one tensor that _rebuild_tensor_v2 would make with these arguments of six numbers."""
    with open(path, 'wb') as file:
        numbers = torch.arange(6.0)._typed_storage()
        WRITERS[writer]({'w': Calls(torch._utils._rebuild_tensor_v2, numbers, *args, False, {})}, file)


@pytest.mark.parametrize('writer', WRITERS)
def test_tensors_stay_within_their_storage(writer, tmp_path):
    path = tmp_path / 'x.pkl'
    for args in [(0, (2, 3), (3, 1)), (5, (1,), (1,)), (0, (3, 2), (1, 3)), (0, (), ()), (6, (0,), (1,)),
                 (0, (0, 3), (3, 1)), (0, [2, 3], [3, 1])]:
        build(path, writer, *args)
        assert torch.equal(load_pretrained(path)[0]['w'], torch.arange(6.0).as_strided(args[1], args[2], args[0]))
    for args in [(0, (7,), (1,)), (1, (6,), (1,)), (6, (), ()), (0, (3, 2), (4, 1)), (0, (2,), (6,)),
                 (2 ** 61, (2,), (2 ** 60,)), (0, (5,), (2 ** 62,)), (0, (-2,), (1,))]:
        build(path, writer, *args)
        refused(path, 'torage size')
    for args, word in [((-1, (2,), (1,)), 'offset'), ((0, (2,), (-1,)), 'strides'), ((0, (2, 3), (1,)), 'stride'),
                       ((0, (2 ** 32, 2 ** 32), (0, 0)), 'overflow'), ((0, (2 ** 63,), (0,)), 'verflow'),
                       ((0.0, (2,), (1,)), 'offset'), (('0', (2,), (1,)), 'offset'), ((0, None, None), 'len')]:
        build(path, writer, *args)
        refused(path, word)
    for args in [(0, (10 ** 6, 10 ** 6), (0, 0)), (0, (6, 2), (1, 0)), (0, (1,) * 100, (1,) * 100),
                 (0, (2 ** 62, 0), (1, 1))]:
        build(path, writer, *args)
        refused(path, 'no tensor')


def test_storages_that_are_not_what_they_say(tmp_path):
    path = tmp_path / 'x.pt'
    torch.save({'w': torch.arange(100.0)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    storage = next(name for name in parts if name.endswith('data/0'))
    main = next(name for name in parts if name.endswith('data.pkl'))

    def again(compression=zipfile.ZIP_STORED, **changed):
        with zipfile.ZipFile(path, 'w', compression) as archive:
            for name, data in (parts | changed).items():
                archive.writestr(name, data)
    again()
    assert load_pretrained(path)[0]['w'].sum() == 4950
    again(**{storage: parts[storage][:-1]})
    refused(path, 'cut short')
    again(**{storage: parts[storage] + bytes(4)})
    refused(path, 'cut short')
    again(zipfile.ZIP_DEFLATED, bomb=bytes(10 ** 7))
    refused(path, 'more than its size')
    again(zipfile.ZIP_DEFLATED)                         # what an entry unpacks to is known only once it is unpacked
    refused(path, 'compressed')
    del parts[storage]
    again()
    refused(path, 'data/0')
    del parts[main]
    again()
    refused(path, 'data.pkl')

    old = storage_bytes({'w': torch.arange(100.0)})
    path.write_bytes(old)
    assert load_pretrained(path)[0]['w'].sum() == 4950
    path.write_bytes(old[:-1])
    refused(path, 'cut short')
    path.write_bytes(old[:-408] + b'\xff' * 8 + old[-400:])
    refused(path, 'cut short')


def test_small_files_cannot_become_large_or_slow(tmp_path):
    path, begin = tmp_path / 'x.pkl', time.monotonic()
    weights = torch.zeros(10 ** 6)
    torch.save({f'w{i}': weights for i in range(1000)}, path)                   # 4 MB that would become 4 GB
    refused(path, 'more than its size')

    raw = pickle.dumps(bytes(10 ** 5))
    path.write_bytes(pickle.dumps([Calls(torch.storage._load_from_bytes, raw) for _ in range(1000)]))
    refused(path, 'more than its size')
    text = 'x' * 10 ** 5
    path.write_bytes(pickle.dumps([Calls(codecs.encode, text, 'latin1') for _ in range(1000)]))
    refused(path, 'more than its size')

    pairs = b')' + b''.join(b'q%ch%c\x86' % (i, i) for i in range(60))           # a tuple whose hash takes 2^60 steps
    path.write_bytes(b'\x80\x02}' + pairs + b'K\x01s.')
    refused(path, 'keys')

    path.write_bytes(b'\x80\x02cnumpy\ndtype\n' + pairs + b'\x85R.')
    refused(path, 'numpy.dtype')
    module = b'cdnnlib.util\nEasyDict\n)R(X\x0a\x00\x00\x00class_name]X\x05\x00\x00\x00state]u\x85R.'
    path.write_bytes(b'\x80\x02ctorch_utils.persistence\n_reconstruct_persistent_obj\n' + module)
    refused(path)                                       # neither a name nor a state
    path.write_bytes(b'\x80\x02ctorch.nn.modules.container\nModuleDict\n)\x81](' + pairs + b'K\x01\x86eb.')
    assert load_pretrained(path) == ({}, dict(class_name='ModuleDict', format='module'))       # the state is no dict

    state = b'}(' + b''.join(b'X\x05\x00\x00\x00%05dN' % i for i in range(20_000)) + b'uq\x00'
    module = b'ctorch.nn.modules.container\nModuleDict\nq\x01)q\x02]('
    path.write_bytes(b'\x80\x02' + state + module + b'h\x01h\x02\x81h\x00b' * 50_000 + b'e.')
    refused(path, 'neither')                            # 50 GB if each of the modules had a copy of the state
    call = b'c__builtin__\ngetattr\nq\x01]('
    path.write_bytes(b'\x80\x02(' + b'N' * 300_000 + b'tq\x00' + call + b'h\x01h\x00R' * 300_000 + b'e.')
    refused(path, 'more than its size')

    part = nn.ModuleDict()
    for _ in range(50):
        part = nn.ModuleDict({'x' * 10 ** 6: part})                             # 1 MB, names of 1 GB
    with publisher(), open(path, 'wb') as file:
        pickle.dump(dict(ema=part), file)
    refused(path, 'too long')

    part = nn.ModuleDict()
    for _ in range(60):
        part = nn.ModuleDict({'a': part, 'b': part})                            # a network of 2^60 parts
    with publisher(), open(path, 'wb') as file:
        pickle.dump(dict(ema=part), file)
    refused(path, 'twice')
    assert time.monotonic() - begin < 20


# Damaged files

def test_cut_short_anywhere(tmp_path):
    path = tmp_path / 'x.pkl'
    for writer in WRITERS:
        write(path, 'edm', writer)
        data = path.read_bytes()
        for n in [0, 1, 2, 10, *np.linspace(11, len(data) - 1, 30, dtype=int)]:
            path.write_bytes(data[:n])
            refused(path)


def test_random_bytes(tmp_path):
    path, rng = tmp_path / 'x.pkl', np.random.RandomState(0)
    for start in [b'', b'\x80\x04', b'\x80\x02', b'PK\x03\x04']:
        for _ in range(50):
            path.write_bytes(start + rng.bytes(rng.randint(1, 2000)))
            refused(path)


def test_folders_and_missing_files(tmp_path):
    refused(tmp_path, 'directory')
    refused(tmp_path / 'none.pkl', 'No such file')


MUTATE = """
import json, random, resource, sys, time
sys.path.insert(0, sys.argv[1])
import common, unet
folder, seeds, events = common.Path(sys.argv[2]), sorted(common.Path(sys.argv[2]).glob('*.seed')), []
for seed in seeds:
    unet.load_pretrained(seed)                                      # what is imported late is imported now,
for codec in 'raw_unicode_escape', 'cp437':                     # as are the codecs of pickle's and zip's oldest texts
    'x'.encode(codec)
target = folder / 'mutant'
watched = ('import', 'exec', 'compile', 'os.', 'subprocess.', 'pickle.', 'socket.', 'shutil.', 'ctypes.', 'code.',
           'marshal.')
def audit(event, args):
    if event == 'open' and str(args[0]) == str(target):
        return
    if event == 'open' or event.startswith(watched):
        events.append(f'{event} {str(args)[:100]}')
memory = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (memory + 2 ** 29,) * 2)
rng, results, slowest, begin = random.Random(0), {'loaded': 0, 'refused': 0}, 0, time.monotonic()
words = [b'cposix\\nsystem\\n', b'c__builtin__\\neval\\n', b'R', b'b', b'\\x81', b'\\x93', b'.', b'(',
         b'\\xff\\xff\\xff\\xff', b'\\x96', b'r', b'\\x8d', b'\\x8e', b'\\x8b', b'builtins', b'eval', b'Q', b'h\\x01',
         b'2', b'0', b'o', b'i', b'\\x92', b'\\x82\\x01', b'\\x85R']
data = [seed.read_bytes() for seed in seeds]
sys.addaudithook(audit)
for attempt in range(1000):
    mutant = bytearray(data[attempt % len(data)])
    for _ in range(rng.choice([1, 1, 1, 2, 10])):
        at, kind = rng.randrange(len(mutant) + 1), rng.randrange(5)
        if kind == 0 and at < len(mutant):
            mutant[at] = rng.randrange(256)
        elif kind == 1:
            mutant[at:at + rng.randrange(20)] = b''
        elif kind == 2:
            mutant[at:at] = rng.choice(words)
        elif kind == 3:
            word = rng.choice(words)
            mutant[at:at + len(word)] = word
        else:
            other = rng.choice(data)
            start = rng.randrange(len(other))
            mutant[at:at] = other[start:start + rng.randrange(200)]
    with open(target, 'wb') as file:
        file.write(mutant)
    start = time.monotonic()
    try:
        tensors, about = unet.load_pretrained(target)
        assert all(p.dtype == unet.torch.float32 for p in tensors.values())
        results['loaded'] += 1
    except common.UserError as error:
        assert len(str(error)) < 600 and '\\n' not in str(error)
        results['refused'] += 1
    slowest = max(slowest, time.monotonic() - start)
taken = time.monotonic() - begin
print(json.dumps(dict(results, events=events[:5], slowest=slowest, taken=taken)))
""".replace('\\\\', '\\')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_a_thousand_mutations(tmp_path):
    """In one process with half a GiB to spend: each is loaded or refused; the interpreter's audit sees nothing run."""
    for i, writer in enumerate(WRITERS):
        net = nn.ModuleDict({'a': nn.Linear(3, 2), 'b': nn.Linear(2, 2)})
        with publisher() as EasyDict, open(tmp_path / f'{i}.seed', 'wb') as file:
            top = dict(ema=EDMPrecond(net, width=3), loss_fn=Loss(), options=EasyDict(size=np.int64(5)))
            WRITERS[writer](top, file)
    done = subprocess.run([sys.executable, '-c', MUTATE, str(Path(__file__).parent.parent), str(tmp_path)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result['events'] == [] and result['loaded'] + result['refused'] == 1000
    assert result['loaded'] > 20 and result['refused'] > 500                    # else the mutations test nothing
    assert result['slowest'] < 5 and result['taken'] < 30
