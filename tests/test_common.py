"""common.py: data in all its forms and faults, keyed randomness, processes, checkpoints, log, pictures."""
import http.server
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError
from conftest import ROOT, Script


# Randomness

def test_draws_depend_on_their_key_alone():
    a = common.randn((4, 3), 0, 17, 'noise')
    torch.randn(5)
    assert torch.equal(a, common.randn((4, 3), 0, 17, 'noise'))
    others = [common.randn((4, 3), *parts) for parts in [(1, 17, 'noise'), (0, 18, 'noise'), (0, 17, 'level')]]
    assert all(not torch.equal(a, b) for b in others)


@pytest.mark.parametrize('n, batch', [(10, 3), (10, 10), (10, 25), (7, 2)])
def test_every_epoch_is_a_permutation(n, batch):
    stream = torch.cat([common.batch_indices(n, batch, step, seed=5) for step in range(12)])
    epochs = [tuple(epoch.tolist()) for epoch in stream[:len(stream) // n * n].split(n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len(set(epochs)) == len(epochs)
    assert not torch.equal(common.batch_indices(n, n, 0, seed=5), common.batch_indices(n, n, 0, seed=6))


# Data

def test_a_shape_is_a_function_of_its_number():
    assert np.array_equal(common.draw_shape(13), common.draw_shape(13))
    assert not np.array_equal(common.draw_shape(13), common.draw_shape(23))
    data = common.shapes(40, 24)
    assert data.images.shape == (40, 3, 24, 24) and data.images.dtype == torch.uint8 and data.classes == 10
    assert np.array_equal(data.images[13], common.draw_shape(13, 24)) and data.labels[13] == 3


def test_bytes_and_floats():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.normalise(levels)), levels)
    assert common.to_uint8(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]
    for shift in (-0.4, 0.4):                                   # the nearest level: samples are not half a level darker
        assert torch.equal(common.to_uint8((levels[1:-1] + shift) / 127.5 - 1), levels[1:-1])


CPU = torch.device('cpu')


def flags(**values):
    defaults = dict(dataset='folder', data_dir='data', resolution=None, cond=False, labels=None, out='out',
                    benchmark=None)
    return Namespace(**defaults | values)


CIFAR_NAMES = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']


def cifar_bytes(i):
    record = np.full((10_000, 3073), i, np.uint8)
    record[:, 0] = np.arange(10_000) % 10
    record[:, 1:1025], record[7, 1] = 200, 11          # red plane; the first pixel of record 7
    return record.tobytes()


@pytest.fixture(scope='session')
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp('cifar') / 'cifar-10-binary.tar.gz'
    with tarfile.open(path, 'w:gz', compresslevel=1) as tar:
        for i, name in enumerate(CIFAR_NAMES):
            info = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
            info.size = 30_730_000
            tar.addfile(info, io.BytesIO(cifar_bytes(i)))
    import hashlib
    return path, hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def server(tmp_path):
    """Serves a folder on the loopback interface -> (folder, address)."""
    folder = tmp_path / 'served'
    folder.mkdir()
    quiet = type('Quiet', (http.server.SimpleHTTPRequestHandler,), {'log_message': lambda *a: None})
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), lambda *a: quiet(*a, directory=str(folder))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{web.server_port}'
        web.shutdown()


def check_cifar(data):
    assert data.images.shape == (50_000, 3, 32, 32) and data.labels[:11].tolist() == [*range(10), 0]
    assert data.images[7, :, 0, 0].tolist() == [11, 0, 0] and data.images[10_000, :, 3, 3].tolist() == [200, 1, 1]


def test_cifar10_packed_unpacked_and_downloaded(archive, server, tmp_path, monkeypatch):
    path, md5 = archive
    monkeypatch.setattr(common, 'CIFAR10_MD5', md5)
    (server[0] / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(common, 'CIFAR10_URL', f'{server[1]}/{path.name}')
    home = tmp_path / 'new' / 'data'
    check_cifar(common.cifar10(home))                                           # downloaded
    assert [p.name for p in home.iterdir()] == [path.name]
    monkeypatch.setattr(common, 'CIFAR10_URL', 'http://127.0.0.1:9/nothing')
    check_cifar(common.cifar10(home))                                           # found packed
    (home / 'cifar-10-batches-bin').mkdir()
    for i, name in enumerate(CIFAR_NAMES[:5]):
        (home / 'cifar-10-batches-bin' / name).write_bytes(cifar_bytes(i))
    (home / path.name).unlink()
    check_cifar(common.cifar10(home))                                           # found unpacked
    check_cifar(common.cifar10(home / 'cifar-10-batches-bin'))


def test_cifar10_missing_damaged_or_not_to_be_had(archive, server, tmp_path, monkeypatch):
    monkeypatch.setattr(common, 'CIFAR10_URL', 'http://127.0.0.1:9/nothing')
    with pytest.raises(UserError, match='could not be downloaded'):
        common.cifar10(tmp_path / 'a')
    assert not (tmp_path / 'a').exists()
    (server[0] / 'x').write_bytes(b'not the archive')
    monkeypatch.setattr(common, 'CIFAR10_URL', f'{server[1]}/x')
    with pytest.raises(UserError, match='md5'):
        common.cifar10(tmp_path / 'b')
    assert not (tmp_path / 'b').exists()
    (tmp_path / 'c').mkdir()
    (tmp_path / 'c/cifar-10-binary.tar.gz').write_bytes(archive[0].read_bytes()[:5000])
    with pytest.raises(UserError, match='cifar-10-binary.tar.gz has md5'):
        common.cifar10(tmp_path / 'c')
    folder = tmp_path / 'd/cifar-10-batches-bin'
    folder.mkdir(parents=True)
    (folder / 'data_batch_1.bin').write_bytes(b'cut short')
    with pytest.raises(UserError, match='data_batch_2.bin'):
        common.cifar10(tmp_path / 'd')
    for name in CIFAR_NAMES[1:5]:
        (folder / name).write_bytes(cifar_bytes(1))
    with pytest.raises(UserError, match='data_batch_1.bin has 9 bytes'):
        common.cifar10(tmp_path / 'd')


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    class Half(io.BytesIO):
        headers = {'Content-Length': '100'}

        def read(self, n):
            raise ConnectionResetError('gone')
    monkeypatch.setattr(common.urllib.request, 'urlopen', lambda *a, **k: Half())
    with pytest.raises(UserError, match='gone'):
        common.download('http://x/y', tmp_path / 'y', 'md5', 'aa')
    assert not list(tmp_path.iterdir())


def test_a_download_without_known_hash_is_checked_by_its_length(tmp_path, monkeypatch):
    class Source(io.BytesIO):
        headers = {'Content-Length': '100'}
    monkeypatch.setattr(common.urllib.request, 'urlopen', lambda *a, **k: Source(bytes(99)))
    with pytest.raises(UserError, match='only 99 of 100 bytes'):
        common.download('http://x/y', tmp_path / 'y', 'sha256', None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(common.urllib.request, 'urlopen', lambda *a, **k: Source(bytes(100)))
    common.download('http://x/y', tmp_path / 'y', 'sha256', None)
    common.download('http://x/y', tmp_path / 'y', 'sha256', None)
    assert (tmp_path / 'y').read_bytes() == bytes(100)


def picture(path, size=(8, 8), seed=0, mode='RGB', **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **save)


def test_folder_and_zip_with_labels_from_folders(tmp_path):
    for i, name in enumerate(['dog/b.png', 'cat/a.png', 'cat/deep/c.png', 'dog/Ünïcode ø.png']):
        picture(tmp_path / 'set' / name, seed=i)
    (tmp_path / 'set/dog/notes.txt').write_text('no image')
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
        for path in (tmp_path / 'set').rglob('*'):
            archive.write(path, path.relative_to(tmp_path / 'set'))
    a, b = (common.load_data(flags(data_dir=tmp_path / name, cond=True), CPU) for name in ('set', 'set.zip'))
    assert torch.equal(a.images, b.images) and a.images.shape == (4, 3, 8, 8)
    assert a.labels.tolist() == b.labels.tolist() == [0, 0, 1, 1]           # cat/a, cat/deep/c, dog/b, dog/U
    assert a.classes == 2
    assert np.array_equal(a.images[0], np.asarray(Image.open(tmp_path / 'set/cat/a.png')).transpose(2, 0, 1))
    args = flags(data_dir=tmp_path / 'set')
    assert common.load_data(args, CPU).labels.tolist() == [0, 0, 0, 0]
    assert (args.resolution, args.in_channels, args.label_dim) == (8, 3, 0)


def test_labels_from_edms_dataset_json(tmp_path):
    for i in range(3):
        picture(tmp_path / f'00000/img{i}.png', seed=i)
    table = {'labels': [[f'00000/img{i}.png', label] for i, label in enumerate([5, 0, 2])]}
    (tmp_path / 'dataset.json').write_text(json.dumps(table))
    data = common.load_data(flags(data_dir=tmp_path, cond=True), CPU)
    assert data.labels.tolist() == [5, 0, 2] and data.classes == 6
    table['labels'].pop()
    (tmp_path / 'dataset.json').write_text(json.dumps(table))
    with pytest.raises(UserError, match='dataset.json'):
        common.load_data(flags(data_dir=tmp_path, cond=True), CPU)


def test_resolution_crops_the_centre(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    Image.fromarray(wide).save(tmp_path / 'wide.png')
    images = common.image_folder(tmp_path, resolution=4).images
    assert images.shape == (1, 3, 4, 4) and (images == 255).all()


def test_image_formats(tmp_path):
    tall = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # "rotate me by 90 degrees"
    tall.save(tmp_path / 'a.jpg', exif=exif, quality=100, subsampling=0)
    picture(tmp_path / 'b.jpg', mode='CMYK')
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / 'c.png')       # 16 bits
    picture(tmp_path / 'd.png', mode='L')
    picture(tmp_path / 'e.gif', mode='P')
    picture(tmp_path / 'f.png', mode='RGBA')
    images = common.image_folder(tmp_path).images
    assert images.shape == (6, 3, 8, 8) and (images[2] == 100).all()
    upright = np.asarray(tall.rotate(-90)).transpose(2, 0, 1).astype(int)
    assert np.abs(images[0].numpy().astype(int) - upright).mean() < 8
    assert torch.equal(images[3, 0], images[3, 1])


def bomb(path):
    """A PNG that says it is 50,000 x 50,000."""
    picture(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (50_000).to_bytes(4, 'big') * 2
    import zlib
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    path.write_bytes(data)


@pytest.mark.parametrize('fault, words', [
    ('missing', 'no folder or zip'), ('empty', 'holds no images'), ('file', 'no folder or zip'),
    ('mixed', 'b.png is 10x10, not 8x8'), ('oblong', 'a.png is 8x6, not 6x6'),
    ('cut', 'b.png cannot be read'), ('text', 'b.png cannot be read'),
    ('bomb', 'b.png'), ('dataset', 'dataset.json'), ('unlabelled', '--cond')])
def test_bad_images_are_named(tmp_path, fault, words):
    root = tmp_path / 'set'
    if fault != 'missing':
        root.mkdir()
    if fault not in ('missing', 'empty'):
        picture(root / 'a.png', size=(8, 6) if fault == 'oblong' else (8, 8))
        picture(root / 'b.png', size=(10, 10) if fault == 'mixed' else (8, 6) if fault == 'oblong' else (8, 8))
    if fault == 'cut':
        (root / 'b.png').write_bytes((root / 'b.png').read_bytes()[:-60])
    if fault == 'text':
        (root / 'b.png').write_text('not an image')
    if fault == 'bomb':
        bomb(root / 'b.png')
    if fault == 'dataset':
        (root / 'dataset.json').write_text('{')
    with pytest.raises(UserError, match=words) as error:
        common.load_data(flags(data_dir=root / 'a.png' if fault == 'file' else root, cond=fault == 'unlabelled'), CPU)
    assert '\n' not in str(error.value)


def test_zip_entries_never_reach_the_disk(tmp_path):
    picture(tmp_path / 'in/x.png')
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
        archive.write(tmp_path / 'in/x.png', '../../escaped.png')
        archive.write(tmp_path / 'in/x.png', '/absolute.png')
    assert len(common.image_folder(tmp_path / 'z.zip').images) == 2
    assert not list(tmp_path.parent.glob('**/escaped.png')) and not Path('/absolute.png').exists()


def test_links_in_a_zip_and_names_beyond_ascii(tmp_path):
    """A link is its text, no image, and is not followed; any name will do."""
    picture(tmp_path / 'in/x.png')
    with zipfile.ZipFile(tmp_path / 'z.zip', 'w') as archive:
        archive.write(tmp_path / 'in/x.png', 'b\u00e4ume/\u732b.png')
    assert len(common.image_folder(tmp_path / 'z.zip').images) == 1
    link = zipfile.ZipInfo('link.png')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / 'z.zip', 'a') as archive:
        archive.writestr(link, str(tmp_path / 'in/x.png'))
    with pytest.raises(UserError, match='link.png cannot be read'):
        common.image_folder(tmp_path / 'z.zip')
    picture(tmp_path / 'f\u00fcr/\u732b.png')
    assert len(common.image_folder(tmp_path / 'f\u00fcr').images) == 1


# Steps

def test_ema():
    net, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.9 * ema.weight.detach() + 0.1 * net.weight.detach()
    common.update_ema(ema, net, 0.9)
    torch.testing.assert_close(ema.weight.detach(), expected)


def test_power_function_ema():
    """The widths and exponents of EDM2: std 0.05 and 0.10 are gamma 16.97 and 6.94."""
    for std, gamma in [(0.05, 16.97), (0.10, 6.94)]:
        assert abs(np.log(common.ema_decay(1000, None, std)) / np.log(1 - 1 / 1000) - 1 - gamma) < 0.005
    assert common.ema_decay(1, None, 0.1) == 0 and common.ema_decay(7, 0.5) == 0.5
    steps, weights = np.arange(1, 20_001), np.zeros(20_000)                 # what the average is made of, at its end
    for step in steps:
        decay = common.ema_decay(step, None, 0.1)
        weights[:step - 1] *= decay
        weights[step - 1] = 1 - decay
    mean = (weights * steps).sum()
    assert abs(((weights * (steps - mean) ** 2).sum() ** 0.5) / 20_000 - 0.1) < 0.001


def test_learning_rate():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    rate = lambda *a: (common.learning_rate(optimizer, *a), optimizer.param_groups[0]['lr'])[1]
    assert rate(10, 0.5) == 0.5 and rate(2000, 1e-3, 2000) == 1e-3
    assert rate(8000, 1e-3, 2000) == pytest.approx(5e-4)


def test_finish_gradients():
    p = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    p[0].grad, p[1].grad = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 12.0])
    assert common.finish_gradients(p, 'fp32') == 13
    p[0].grad, p[1].grad = torch.tensor([1.0, torch.nan, 2.0]) * 1024, torch.tensor([torch.inf, 1024.0])
    assert not common.finish_gradients(p, 'fp16').isfinite()
    assert p[0].grad.tolist() == [1, 0, 2] and p[1].grad.tolist() == [0, 1]


def test_microbatches_cover_the_batch():
    args = Namespace(batch=8, microbatch=3, seed=0)
    parts, masks = zip(*common.microbatches(None, args, 5))
    assert [range(8)[part] for part in parts] == [range(0, 3), range(3, 6), range(6, 8)] and len(set(masks)) == 3
    args.microbatch = None
    (part, mask), = common.microbatches(None, args, 5)
    assert range(8)[part] == range(8) and mask == masks[0]
    assert mask != next(common.microbatches(None, args, 6))[1]              # another step, other units are dropped


# Runs

def test_atomic_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / 'file'
    common.write_atomic(path, lambda file: file.write(b'old'))

    def fail(file):
        file.write(b'half of the n')
        raise OSError(28, 'No space left on device')
    with pytest.raises(OSError):
        common.write_atomic(path, fail)
    assert path.read_bytes() == b'old' and [p.name for p in tmp_path.iterdir()] == ['file']


@pytest.mark.parametrize('content', [b'', b'random bytes', 'pickle', 'cut'])
def test_bad_checkpoints(tmp_path, content):
    path = tmp_path / 'checkpoint.pt'
    if content == 'pickle':
        torch.save({'config': {}, 'ema': Namespace(a=1)}, path)                 # would have to import a class
    elif content == 'cut':
        torch.save({'config': {}, 'ema': torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1500])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match='checkpoint.pt cannot be read') as error:
        common.load_checkpoint(path)
    assert '\n' not in str(error.value)


def test_log_has_every_step_once_and_averages_nothing_away(tmp_path):
    args = flags(out=tmp_path, steps=7, batch=4, save_every=100, sample_every=None, eval_every=None, resume=False,
                 script='sct')
    log = common.Log(args, 0, torch.device('cpu'))
    log.block = 3
    for step in range(1, 8):
        log.step(step, loss=torch.tensor(step / 2), grad_norm=torch.tensor(1.0))
    rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert rows == [{'step': step, 'loss': step / 2, 'grad_norm': 1.0} for step in range(1, 8)]


def test_pictures(tmp_path):
    x = torch.full((5, 1, 8, 8), -1.0)
    x[3] = 1
    common.save_grid(x, tmp_path / 'grid.png', columns=3)
    grid = Image.open(tmp_path / 'grid.png')
    assert grid.size == (3 * 66 + 2, 2 * 66 + 2)
    assert grid.getpixel((30, 30)) == (0, 0, 0) and grid.getpixel((30, 96)) == (255, 255, 255)
    rows = [{'step': i, 'loss': 10 / i, 'x': 'nan'} for i in range(1, 500)]
    (tmp_path / 'm.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    common.save_curves(tmp_path / 'm.jsonl', tmp_path / 'curves.png')
    curve = np.asarray(Image.open(tmp_path / 'curves.png').convert('RGB')).astype(int)
    blue = np.argwhere((curve[:, :, 2] - curve[:, :, 0] > 100))
    first, last = blue[blue[:, 1] < 90][:, 0].mean(), blue[blue[:, 1] > 680][:, 0].mean()
    assert first < last - 80                                                    # it falls, over most of the panel


# Processes

def test_a_failing_process_ends_the_others(command, tmp_path):
    """Process 1 cannot open its data: both end within seconds, with one line and its exit code."""
    done = command('sct.py', '--gpus', 2, '--device', 'cpu', '--dataset', 'folder', '--data-dir', 'nowhere',
                   '--resolution', 8, timeout=60)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'nowhere' in done.stderr
    assert not (tmp_path / 'runs').exists()


def test_an_error_for_the_user_keeps_its_words(monkeypatch, capsys):
    """Also where several processes run, and the words are those of a lost connection."""
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)

    def fail(error):
        raise error
    assert common.run(lambda argv: fail(UserError('no data: connection refused')), []) == 2
    assert common.run(lambda argv: fail(RuntimeError('Connection closed by peer [127.0.0.1]')), []) == 1
    told = capsys.readouterr().err.splitlines()
    assert told == ['no data: connection refused', 'another process of this run has ended']
    with pytest.raises(RuntimeError, match='shapes'):
        common.run(lambda argv: fail(RuntimeError('shapes do not fit')), [])


def test_torchrun_decides_by_the_environment(few_pictures, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE')}
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    small = [*few_pictures, *Script('sct').small, '--batch', '4', '--steps', '2', '--device', 'cpu', '--out', 'run']
    done = subprocess.run([*torchrun, str(ROOT / 'sct.py'), *small], capture_output=True, text=True, cwd=tmp_path,
                          env=env, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run/final.pt').exists() and (tmp_path / 'run/metrics.jsonl').read_text().count('"loss"') == 2


def test_many_images_are_mapped_from_a_file(tmp_path, monkeypatch):
    """Above a size, decoded images lie in a file, which is found again and follows the folder."""
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for i in range(5):
        Image.fromarray(common.draw_shape(i, 8).transpose(1, 2, 0)).save(folder / f'{i}.png')
    plain = common.image_folder(folder).images
    monkeypatch.setattr(common, 'MAPPED', 900)
    assert torch.equal(common.image_folder(folder).images, plain)
    cache, = tmp_path.glob('pictures-8-*.uint8')
    read, decoded = common.read_image, []
    monkeypatch.setattr(common, 'read_image', lambda data, *rest: decoded.append(data) or read(data, *rest))
    assert torch.equal(common.image_folder(folder).images, plain)
    assert decoded == [(folder / '0.png').read_bytes()]                         # only the first is decoded again
    monkeypatch.undo()
    monkeypatch.setattr(common, 'MAPPED', 900)
    Image.fromarray(common.draw_shape(7, 8).transpose(1, 2, 0)).save(folder / '5.png')
    assert len(common.image_folder(folder).images) == 6
    second, = set(tmp_path.glob('*.uint8')) - {cache}
    cache.write_bytes(cache.read_bytes()[:200])
    (folder / '5.png').unlink()
    with pytest.raises(common.UserError, match='delete it'):
        common.image_folder(folder)
    assert {path.name for path in tmp_path.iterdir()} == {'pictures', cache.name, second.name}


def test_a_disk_that_is_too_small_for_the_mapped_file(tmp_path, monkeypatch):
    """It is noticed while the file is made, and not as a bus error when the images are used."""
    for i in range(5):
        picture(tmp_path / f'pictures/{i}.png')
    monkeypatch.setattr(common, 'MAPPED', 900)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))          # a file that may not grow: as a full disk
    try:
        with pytest.raises(UserError, match='uint8 cannot be used'):
            common.image_folder(tmp_path / 'pictures')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ['pictures']


def test_batches_are_those_of_their_steps():
    data = common.shapes(50, 8)
    args = Namespace(batch=8, seed=3, steps=7, benchmark=None)
    for step, (number, index, images, labels) in enumerate(common.batches(data, args, 4, CPU), 4):
        assert number == step
        assert torch.equal(index, common.batch_indices(50, 8, step, 3)) and torch.equal(labels, data.labels[index])
        assert torch.equal(images, common.normalise(data.images[index]))
    assert step == 6
