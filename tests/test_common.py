"""common.py: keyed randomness, steps, data in all its forms and faults, checkpoints, log, pictures, processes."""
import hashlib
import http.server
import io
import json
import os
import resource
import signal
import tarfile
import threading
import time
import zipfile
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import sct
from common import UserError
from conftest import Script, lines

CPU = torch.device('cpu')


def flags(**values):
    defaults = dict(dataset='folder', data_dir='data', resolution=None, cond=False, labels=None, out='out', steps=7,
                    benchmark=None, batch=4, save_every=100, sample_every=None, eval_every=None, resume=False,
                    script='sct')
    return Namespace(**defaults | values)


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


def test_half_of_the_images_are_mirrored_by_their_key():
    images = torch.arange(400.0).view(100, 1, 2, 2)
    out = common.mirror(images, 0, 1)
    flipped = (out == images.flip(3)).flatten(1).all(1)
    assert 30 < flipped.sum() < 70 and torch.equal(out[~flipped], images[~flipped])
    assert torch.equal(out, common.mirror(images, 0, 1)) and not torch.equal(out, common.mirror(images, 0, 2))


# Steps

def test_the_average_moves_towards_the_network():
    net, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.9 * ema.weight.detach() + 0.1 * net.weight.detach()
    common.update_ema(ema, net, 0.9)
    torch.testing.assert_close(ema.weight.detach(), expected)


def test_learning_rate_falls_with_the_root_of_the_step():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=9.0)

    def rate(*settings):
        common.learning_rate(optimizer, *settings)
        return optimizer.param_groups[0]['lr']
    assert rate(10, 0.5) == 0.5 and rate(2000, 1e-3, 2000) == 1e-3 and rate(8000, 1e-3, 2000) == pytest.approx(5e-4)


def test_gradients_that_are_not_finite_become_zero_and_show_in_the_norm():
    p = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
    p[0].grad, p[1].grad = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([0.0, 12.0])
    assert common.finish_gradients(p, 'fp32') == 13
    p[0].grad, p[1].grad = torch.tensor([1.0, torch.nan, 2.0]) * 1024, torch.tensor([torch.inf, 1024.0])
    assert not common.finish_gradients(p, 'fp16').isfinite()
    assert p[0].grad.tolist() == [1, 0, 2] and p[1].grad.tolist() == [0, 1]


def test_microbatches_cover_the_part_of_the_batch_that_is_the_processes_own(monkeypatch):
    args = Namespace(batch=8, microbatch=3, seed=0)
    parts, seeds = zip(*common.microbatches(None, args, 5))
    assert [range(8)[part] for part in parts] == [range(0, 3), range(3, 6), range(6, 8)] and len(set(seeds)) == 3
    args.microbatch = None
    (part, seed), = common.microbatches(None, args, 5)
    assert range(8)[part] == range(8) and seed == seeds[0]
    assert seed != next(iter(common.microbatches(None, args, 6)))[1]            # another step, other units are dropped
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '1')
    (part, other), = common.microbatches(None, args, 5)
    assert range(8)[common.rank_slice(8)][part] == range(4, 8) and other != seed


# Data

def test_a_shape_is_a_function_of_its_number():
    assert np.array_equal(common.draw_shape(13), common.draw_shape(13))
    assert not np.array_equal(common.draw_shape(13), common.draw_shape(23))
    data = common.shapes(40, 24)
    assert data.images.shape == (40, 3, 24, 24) and data.images.dtype == torch.uint8 and data.classes == 10
    assert np.array_equal(data.images[13], common.draw_shape(13, 24)) and data.labels[13] == 3


def test_bytes_become_floats_and_the_nearest_bytes_again():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.normalise(levels)), levels)
    assert common.to_uint8(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]
    for shift in (-0.4, 0.4):                                   # the nearest level: samples are not half a level darker
        assert torch.equal(common.to_uint8((levels[1:-1] + shift) / 127.5 - 1), levels[1:-1])


@pytest.fixture
def server(tmp_path):
    """Serves a folder on the loopback interface -> (folder, address). What is called `cut` breaks off before its end."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def send_header(self, name, value):
            longer = name == 'Content-Length' and 'cut' in self.path
            super().send_header(name, str(int(value) + 1) if longer else value)
    folder = tmp_path / 'served'
    folder.mkdir()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), lambda *a: Handler(*a, directory=str(folder))) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{web.server_port}'
        web.shutdown()


def test_downloads_are_whole_and_checked_or_leave_nothing(server, tmp_path):
    (served, address), target = server, tmp_path / 'new' / 'y'
    for name in ('whole', 'cut'):
        (served / name).write_bytes(bytes(100))
    md5 = hashlib.md5(bytes(100)).hexdigest()
    for url, digest, words in [(f'{address}/cut', None, 'could not be downloaded from'),
                               (f'{address}/none', None, 'could not be downloaded from'),
                               ('http://127.0.0.1:9/x', md5, 'could not be downloaded from'),
                               (f'{address}/whole', 'aa', 'has md5')]:
        with pytest.raises(UserError, match=words) as error:
            common.download(url, target, 'md5', digest)
        assert url in str(error.value) and '\n' not in str(error.value)
        assert {path for path in tmp_path.rglob('*') if path.is_file()} == {served / 'cut', served / 'whole'}
    common.download(f'{address}/whole', target, 'md5', md5[:8])
    common.download('http://127.0.0.1:9/x', target, 'md5', None)                # it is there
    assert target.read_bytes() == bytes(100)
    with pytest.raises(UserError, match=f'{target} has md5'):
        common.download('http://127.0.0.1:9/x', target, 'md5', 'aa')


CIFAR_NAMES = [f'data_batch_{i}.bin' for i in range(1, 6)]


def cifar_bytes(i):
    record = np.full((10_000, 3073), i, np.uint8)
    record[:, 0] = np.arange(10_000) % 10
    record[:, 1:1025], record[7, 1] = 200, 11                   # red plane; the first pixel of record 7
    return record.tobytes()


def test_cifar10_packed_unpacked_and_downloaded(server, tmp_path, monkeypatch):
    (served, address), home = server, tmp_path / 'new' / 'data'
    archive, folder = home / 'cifar-10-binary.tar.gz', home / 'cifar-10-batches-bin'
    with tarfile.open(served / 'archive', 'w:gz', compresslevel=1) as tar:
        for i, name in enumerate(CIFAR_NAMES):
            info = tarfile.TarInfo(f'{folder.name}/{name}')
            info.size = 30_730_000
            tar.addfile(info, io.BytesIO(cifar_bytes(i)))

    def check(root):
        data = common.cifar10(root)
        assert data.images.shape == (50_000, 3, 32, 32) and data.labels[:11].tolist() == [*range(10), 0]
        assert data.images[7, :, 0, 0].tolist() == [11, 0, 0]
        assert data.images[10_000, :, 3, 3].tolist() == [200, 1, 1]
    monkeypatch.setattr(common, 'CIFAR10_MD5', hashlib.md5((served / 'archive').read_bytes()).hexdigest())
    monkeypatch.setattr(common, 'CIFAR10_URL', f'{address}/archive')
    check(home)                                                                 # downloaded
    assert [path for path in home.iterdir()] == [archive]
    monkeypatch.setattr(common, 'CIFAR10_URL', 'http://127.0.0.1:9/nothing')
    check(home)                                                                 # found packed
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(UserError, match='cifar-10-binary.tar.gz has md5'):
        common.cifar10(home)
    archive.unlink()
    with pytest.raises(UserError, match='could not be downloaded'):
        common.cifar10(home)
    folder.mkdir()
    (folder / CIFAR_NAMES[0]).write_bytes(b'cut short')
    with pytest.raises(UserError, match='data_batch_2.bin'):
        common.cifar10(home)
    for i, name in list(enumerate(CIFAR_NAMES))[1:]:
        (folder / name).write_bytes(cifar_bytes(i))
    with pytest.raises(UserError, match='data_batch_1.bin has 9 bytes'):
        common.cifar10(home)
    (folder / CIFAR_NAMES[0]).write_bytes(cifar_bytes(0))
    check(home)                                                                 # found unpacked
    check(folder)


def picture(path, size=(8, 8), seed=0, mode='RGB', **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **save)
    return path


def test_folder_and_zip_with_labels_from_folders(tmp_path):
    for i, name in enumerate(['dog/b.png', 'cat/a.png', 'cat/deep/c.png', 'dog/Ünïcode 猫.png']):
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
    images, labels = b.at(torch.tensor([3, 1]), CPU)
    assert torch.equal(images, common.normalise(a.images[[3, 1]])) and labels.tolist() == [1, 0]


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


def test_image_formats_and_the_central_square(tmp_path):
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
    assert images.shape == (6, 3, 8, 8) and (images[2] == 100).all() and torch.equal(images[3, 0], images[3, 1])
    upright = np.asarray(tall.rotate(-90)).transpose(2, 0, 1).astype(int)
    assert np.abs(images[0].numpy().astype(int) - upright).mean() < 8
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    Image.fromarray(wide).save(tmp_path / 'g.png')
    images = common.image_folder(tmp_path, resolution=4).images
    assert images.shape == (7, 3, 4, 4) and (images[6] == 255).all()


def enormous(path):
    """The PNG says that it is 50,000 x 50,000."""
    data = bytearray(path.read_bytes())
    data[16:24] = (50_000).to_bytes(4, 'big') * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    path.write_bytes(data)


@pytest.mark.parametrize('words, fault', [
    ('b.png is 10x10, not 8x8', lambda b: picture(b, (10, 10))), ('b.png is 8x6, not 8x8', lambda b: picture(b, (8, 6))),
    ('b.png cannot be read', lambda b: b.write_bytes(b.read_bytes()[:-60])),
    ('b.png cannot be read', lambda b: b.write_text('not an image')), ('b.png cannot be read', enormous),
    ('dataset.json', lambda b: (b.parent / 'dataset.json').write_text('{'))])
def test_images_that_cannot_be_used_are_named(tmp_path, words, fault):
    picture(tmp_path / 'a.png')
    fault(picture(tmp_path / 'b.png'))
    with pytest.raises(UserError, match=words) as error:
        common.load_data(flags(data_dir=tmp_path), CPU)
    assert '\n' not in str(error.value)


def test_folders_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / 'empty').mkdir()
    image = picture(tmp_path / 'set/a.png')
    for root, settings, words in [
            ('nowhere', {}, 'no folder or zip'), (image, {}, 'no folder or zip'), ('empty', {}, 'holds no images'),
            ('set', dict(cond=True), '--cond'), ('set', dict(labels=[0, 1]), '--labels 1'),
            ('set', dict(dataset='shapes', resolution=8, cond=True, labels=[10]), '--labels 10')]:
        with pytest.raises(UserError, match=words):
            common.load_data(flags(data_dir=tmp_path / root, **settings), CPU)


def test_zips_write_nothing_and_their_links_are_not_followed(tmp_path):
    image, path = picture(tmp_path / 'in/x.png'), tmp_path / 'z.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.write(image, '../../escaped.png')
        archive.write(image, '/absolute.png')
    assert len(common.image_folder(path).images) == 2
    assert not list(tmp_path.parent.glob('**/escaped.png')) and not Path('/absolute.png').exists()
    link = zipfile.ZipInfo('link.png')
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr(link, str(image))
    with pytest.raises(UserError, match='link.png cannot be read'):
        common.image_folder(path)


def test_many_images_are_mapped_from_a_file(tmp_path, monkeypatch):
    """Above a size, decoded images lie in a file, which is found again and follows the folder."""
    folder = tmp_path / 'pictures'
    for i in range(5):
        picture(folder / f'{i}.png', seed=i)
    plain = common.image_folder(folder).images
    monkeypatch.setattr(common, 'MAPPED', 900)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))          # a file that may not grow: as on a full disk
    try:
        with pytest.raises(UserError, match='uint8 could not be written'):
            common.image_folder(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == [folder]
    assert torch.equal(common.image_folder(folder).images, plain)
    cache, = tmp_path.glob('pictures-8-*.uint8')
    for i in range(1, 5):
        (folder / f'{i}.png').write_bytes(bytes((folder / f'{i}.png').stat().st_size))      # not read again
    assert torch.equal(common.image_folder(folder).images, plain)
    for i in range(1, 6):
        picture(folder / f'{i}.png', seed=i)
    assert len(common.image_folder(folder).images) == 6
    second, = set(tmp_path.glob('*.uint8')) - {cache}
    second.write_bytes(second.read_bytes()[:200])
    with pytest.raises(UserError, match='delete it'):
        common.image_folder(folder)
    assert set(tmp_path.iterdir()) == {folder, cache, second}


# Checkpoints, log, pictures

def test_atomic_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / 'file'
    common.write_atomic(path, lambda file: file.write(b'old'))

    def fail(file):
        file.write(b'half of the n')
        raise OSError(28, 'No space left on device')
    with pytest.raises(UserError, match='file could not be written: .*No space left'):
        common.write_atomic(path, fail)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]
    common.write_atomic(path, lambda file: file.write(b'new'), previous=tmp_path / 'before')
    assert path.read_bytes() == b'new' and (tmp_path / 'before').read_bytes() == b'old'


def test_bad_checkpoints_are_refused(tmp_path):
    path = tmp_path / 'checkpoint.pt'
    torch.save({'config': {}, 'ema': torch.zeros(1000)}, path)
    cut = path.read_bytes()[:1500]
    torch.save({'config': {}, 'ema': Namespace(a=1)}, path)                     # would have to import a class
    for content in (path.read_bytes(), cut, b'', b'random bytes'):
        path.write_bytes(content)
        with pytest.raises(UserError, match='checkpoint.pt cannot be read') as error:
            common.load_checkpoint(path)
        assert '\n' not in str(error.value)


def test_the_log_has_every_step_once_and_averages_nothing_away(tmp_path):
    log = common.Log(flags(out=tmp_path), 0, CPU)
    log.block = 3
    for step in range(1, 8):
        log.step(step, loss=torch.tensor(step / 2), grad_norm=torch.tensor(1.0))
    assert lines(tmp_path) == [{'step': step, 'loss': step / 2, 'grad_norm': 1.0} for step in range(1, 8)]


def test_work_that_takes_long_tells_how_far_it_is(monkeypatch, capsys):
    times = iter(range(0, 100, 3))
    monkeypatch.setattr(time, 'monotonic', lambda: next(times))
    assert list(common.progress('abcd', 'letters')) == list('abcd')
    assert capsys.readouterr().out.splitlines()[0] == 'letters: 1 of 4, 00:09 left'
    assert common.duration(3725.9) == '1:02:05'


def test_grids_and_curves_have_their_pixels(tmp_path):
    x = torch.full((5, 1, 8, 8), -1.0)
    x[3] = 1
    common.save_grid(x, tmp_path / 'grid.png', columns=3)
    grid = Image.open(tmp_path / 'grid.png')
    assert grid.size == (3 * 66 + 2, 2 * 66 + 2)
    assert grid.getpixel((30, 30)) == (0, 0, 0) and grid.getpixel((30, 96)) == (255, 255, 255)
    rows = [{'step': i, 'loss': 10 / i, 'x': 'nan'} for i in range(1, 500)]
    (tmp_path / 'm.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + '{"step": 50')
    common.save_curves(tmp_path / 'm.jsonl', tmp_path / 'curves.png')
    curve = np.asarray(Image.open(tmp_path / 'curves.png').convert('RGB')).astype(int)
    blue = np.argwhere((curve[:, :, 2] - curve[:, :, 0] > 100))
    first, last = blue[blue[:, 1] < 90][:, 0].mean(), blue[blue[:, 1] > 680][:, 0].mean()
    assert first < last - 80                                                    # it falls, over most of the panel


# Processes and errors

def test_errors_are_lines_and_faults_of_the_program_are_not(monkeypatch, capsys):
    """Also where several processes run, and the words are those of a lost connection."""
    def code(error, *argv):
        def fail(_):
            raise error
        return common.run(fail, list(argv))
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    assert code(UserError('no data:\nconnection refused')) == 2
    assert code(UserError('diverged', code=1)) == 1
    assert code(RuntimeError('Connection closed by peer [127.0.0.1]')) == 1
    assert code(torch.OutOfMemoryError('CUDA out of memory. Tried ...')) == 2 and code(KeyboardInterrupt()) == 130
    told = capsys.readouterr().err.splitlines()
    assert told == ['no data: connection refused', 'diverged', 'another process of this run has ended',
                    'out of memory: lower --batch, or split it with --microbatch', 'interrupted']
    for error, argv in [(RuntimeError('shapes do not fit'), ()), (UserError('words'), ('--debug',))]:
        with pytest.raises(type(error), match=str(error)):
            code(error, *argv)
    assert common.run(lambda argv: argv.append(0), []) == 0


COPY = """
import os, sys, time
rank, (case, file) = os.environ['RANK'], sys.argv[-1].split(':')
assert os.environ['WORLD_SIZE'] == '3' and os.environ['LOCAL_RANK'] == rank and os.environ['INIT_METHOD']
open(f'{file}-{os.getpid()}', 'w').close()
if case == 'done' or rank == '1' and case == 'exit':
    sys.exit(3 * (case == 'exit'))
if rank == '1' and case == 'kill':
    os.kill(os.getpid(), 9)
time.sleep(60)
"""


@pytest.mark.parametrize('case, code, words', [
    ('done', 0, ''), ('exit', 3, ''), ('kill', 137, 'process 1 of 3 was ended by SIGKILL'),
    ('signal', 130, 'was ended by SIGINT')])
def test_the_launcher_waits_for_all_copies_and_ends_them_with_the_first_that_fails(
        case, code, words, tmp_path, monkeypatch, capsys):
    """The copies are of a stand-in for the script; a signal to the launcher reaches them."""
    (tmp_path / 'sct.py').write_text(COPY)
    monkeypatch.setattr(common, '__file__', str(tmp_path / 'common.py'))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt():
        while len(list(tmp_path.glob('pid-*'))) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
    if case == 'signal':
        threading.Thread(target=interrupt, daemon=True).start()
    begin = time.monotonic()
    argv = [*Script('sct').small, '--batch', '9', '--gpus', '3', '--device', 'cpu', '--out', str(tmp_path / 'x')]
    try:
        assert common.run(sct.main, [*argv, '--init', f'{case}:{tmp_path}/pid']) == code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    error = capsys.readouterr().err
    assert time.monotonic() - begin < 20 and words in error and error.count('\n') == bool(words)
    assert not any(Path(f'/proc/{path.name[4:]}').exists() for path in tmp_path.glob('pid-*'))


@pytest.mark.parametrize('env, wanted', [
    (dict(RANK='1', LOCAL_RANK='1', WORLD_SIZE='2', MASTER_ADDR='a', MASTER_PORT='1'), ('a', '1')),         # torchrun
    (dict(SLURM_STEP_NUM_TASKS='2', SLURM_PROCID='1', SLURM_LOCALID='0', SLURM_LAUNCH_NODE_IPADDR='b'), ('b', '29500')),
    (dict(SLURM_STEP_NUM_TASKS='1', SLURM_PROCID='0', SLURM_LOCALID='0', SLURM_LAUNCH_NODE_IPADDR='b'), None)])
def test_the_environment_says_which_process_this_is(env, wanted, monkeypatch):
    """That of torchrun or of Slurm's srun; a job of one task is a process alone."""
    joined = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **settings: joined.append(settings))
    monkeypatch.setattr(os, 'environ', env)
    common.start(common.parse_args('sct', '', sct.PRESETS, sct.add_flags, '', ['--device', 'cpu']))
    assert (common.rank(), common.world_size()) == ((1, 2) if wanted else (0, 1))
    assert [(one['rank'], one['world_size'], one['init_method']) for one in joined] == [(1, 2, 'env://')] * bool(wanted)
    assert not wanted or (env['MASTER_ADDR'], env['MASTER_PORT']) == wanted
