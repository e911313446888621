"""common.py: keyed randomness, steps, data in all its forms and faults, files, log, pictures, errors."""
import collections
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

import common
import sct
import unet
from common import UserError
from conftest import Casts, lines, picture, room

CPU = torch.device('cpu')


def flags(**values):
    defaults = sct.PRESETS['folder'] | dict(dataset='folder', labels=None, benchmark=None, resume=False, script='sct')
    return Namespace(**defaults | dict(sample_every=None, eval_every=None) | values)


def test_draws_depend_on_their_key_alone():
    a = common.randn((4, 3), 0, 17, 'noise')
    torch.randn(5)
    assert torch.equal(a, common.randn((4, 3), 0, 17, 'noise'))
    for parts in [(1, 17, 'noise'), (0, 18, 'noise'), (0, 17, 'level')]:
        assert not torch.equal(a, common.randn((4, 3), *parts))
    images = torch.arange(8000.0).view(2000, 1, 2, 2)
    out = common.mirror(images, 0, 1)
    flipped = (out == images.flip(3)).flatten(1).all(1)
    assert 900 < flipped.sum() < 1100 and torch.equal(out[~flipped], images[~flipped])
    assert torch.equal(out, common.mirror(images, 0, 1)) and not torch.equal(out, common.mirror(images, 0, 2))


@pytest.mark.parametrize('n, batch', [(10, 3), (10, 10), (10, 25), (7, 2)])
def test_every_epoch_is_a_permutation(n, batch):
    stream = torch.cat([common.batch_indices(n, batch, step, seed=5) for step in range(12)])
    epochs = [tuple(epoch.tolist()) for epoch in stream[:len(stream) // n * n].split(n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len(set(epochs)) == len(epochs)
    assert not torch.equal(common.batch_indices(n, n, 0, seed=5), common.batch_indices(n, n, 0, seed=6))


def test_each_process_has_dropout_masks_of_its_own_in_each_step(monkeypatch):
    args = Namespace(batch=8, microbatch=None, seed=0, precision='fp32')
    seeds = lambda step: [seed for _, seed in common.microbatches(torch.nn.Linear(1, 1), args, step, id)]
    found = seeds(5) + seeds(6)
    monkeypatch.setenv('RANK', '1')
    assert len({*found, *seeds(5)}) == 3


def test_a_shape_is_a_function_of_its_number_and_its_label_says_which():
    data, names = common.shapes(40, 24), list(common.SHAPES)
    assert all(np.array_equal(image, common.draw_shape(i, 24)) for i, image in enumerate(data.images))
    hollow = [names[label] for x, label in zip(data.images, data.labels) if torch.equal(x[:, 12, 12], x[:, 0, 0])]
    assert hollow == ['ring', 'frame'] * 4                                      # in the middle as in the corner


def test_bytes_become_floats_and_the_nearest_bytes_again():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(common.to_uint8(common.normalise(levels)), levels)
    assert common.to_uint8(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]
    for shift in (-0.4, 0.4):                                   # the nearest level: samples are not half a level darker
        assert torch.equal(common.to_uint8((levels[1:-1] + shift) / 127.5 - 1), levels[1:-1])
    assert common.shrink(torch.tensor([[[[9, 2], [0, 4]]]], dtype=torch.uint8), 1).item() == 4      # of 3.75


def test_downloads_are_whole_and_checked_or_leave_nothing(tmp_path):
    source, target, md5 = tmp_path / 'x', tmp_path / 'new' / 'y', hashlib.md5(bytes(100)).hexdigest()
    source.write_bytes(bytes(100))
    cut_short = type('CutShort', (http.server.BaseHTTPRequestHandler,), dict(do_GET=lambda self: self.wfile.write(
        b'HTTP/1.0 200 OK\r\nContent-Length: 101\r\n\r\n' + bytes(100))))
    with http.server.HTTPServer(('127.0.0.1', 0), cut_short) as web:
        threading.Thread(target=web.handle_request, daemon=True).start()
        for url, digest, words in [
                (f'http://127.0.0.1:{web.server_port}/x', None, 'could not be'), ('file:///no', None, 'could not be'),
                ('http://127.0.0.1:9/x', md5, 'could not be'), (source.as_uri(), 'aa', 'has md5')]:
            with pytest.raises(UserError, match=words) as error:
                common.download(url, target, 'md5', digest)
            assert url in str(error.value) and list(tmp_path.rglob('*')) == [source]
    common.download(source.as_uri(), target, 'md5', md5[:8])
    common.download('http://127.0.0.1:9/x', target, 'md5', None)                # it is there
    assert target.read_bytes() == bytes(100)
    with pytest.raises(UserError, match=f'{target} has md5'):
        common.download('http://127.0.0.1:9/x', target, 'md5', 'aa')


def test_cifar10_downloaded_packed_unpacked_and_damaged(tmp_path, monkeypatch):
    served, home = tmp_path / 'served', tmp_path / 'data'
    archive, folder = home / 'cifar-10-binary.tar.gz', home / 'cifar-10-batches-bin'
    files = {folder / f'data_batch_{i + 1}.bin': np.full((10_000, 3073), i, np.uint8) for i in range(5)}
    with tarfile.open(served, 'w:gz', compresslevel=1) as tar:
        for path, record in files.items():
            record[:, 0] = np.arange(10_000) % 10
            record[:, 1:1025], record[7, 2] = 200, 11                   # red plane; the second pixel of record 7
            info = tarfile.TarInfo(f'{folder.name}/{path.name}')
            info.size = record.size
            tar.addfile(info, io.BytesIO(record.tobytes()))
    monkeypatch.setattr(common, 'CIFAR10_MD5', hashlib.md5(served.read_bytes()).hexdigest())
    monkeypatch.setattr(common, 'CIFAR10_URL', served.as_uri())

    def check(root):
        data = common.cifar10(root)
        assert data.images.shape == (50_000, 3, 32, 32) and data.labels[:11].tolist() == [*range(10), 0]
        assert data.images[[7, 10_000], :, 0, 1].tolist() == [[11, 0, 0], [200, 1, 1]]
    check(home)
    served.unlink()
    check(archive)
    for damage, words in [(lambda: archive.write_bytes(b'cut'), 'cifar-10-binary.tar.gz has md5'),
                          (archive.unlink, 'could not be downloaded'), (folder.mkdir, 'data_batch_1.bin'),
                          (lambda: [path.write_bytes(record.tobytes()[path.name == 'data_batch_2.bin':])
                                    for path, record in files.items()], 'is not whole')]:
        damage()
        with pytest.raises(UserError, match=words):
            common.cifar10(home)
    (folder / 'data_batch_2.bin').write_bytes([*files.values()][1].tobytes())
    check(folder)


def test_folder_and_zip_with_labels_from_folders(tmp_path):
    for i, name in enumerate(['dog/b.png', 'cat/a.png', 'cat/deep/c.png', 'dog/Ünïcode 猫.png']):
        picture(tmp_path / 'set' / name, seed=i)
    (tmp_path / 'set/dog/notes.txt').write_text('no image')
    with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
        for path in (tmp_path / 'set').rglob('*'):
            archive.write(path, '../..' / path.relative_to(tmp_path))           # names that nothing is written to
    a, b = (common.load_data(flags(data_dir=tmp_path / name, cond=name == 'set'), CPU) for name in ('set', 'set.zip'))
    assert torch.equal(a.images, b.images) and a.images.shape == (4, 3, 8, 8) and b.labels.tolist() == [0] * 4
    assert a.labels.tolist() == [0, 0, 1, 1] and a.classes == 2                 # cat/a, cat/deep/c, dog/b, dog/U
    (tmp_path / 'links').mkdir()
    for name in 'cat', 'dog':                                                   # how subsets are often made
        (tmp_path / 'links' / name).symlink_to(tmp_path / 'set' / name)
    assert torch.equal(common.image_folder(tmp_path / 'links').images, a.images)
    assert np.array_equal(a.images[0], np.asarray(Image.open(tmp_path / 'set/cat/a.png')).transpose(2, 0, 1))
    images, labels = a.at(torch.tensor([3, 1]), CPU)
    assert torch.equal(images, common.normalise(a.images[[3, 1]])) and labels.tolist() == [1, 0]
    assert common.cache_folder(flags(data_dir=tmp_path / 'set.zip')) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {'set', 'set.zip', 'links'}


def test_all_of_many_images_are_read_in_order(tmp_path):
    with zipfile.ZipFile(tmp_path / 'many.zip', 'w') as archive:
        for i in range(4100):                                                   # decoded 4096 at a time
            archive.writestr(f'{i:05}.ppm', b'P6 1 1 255 ' + bytes([i % 256, i // 256, 0]))
    images = common.image_folder(tmp_path / 'many.zip').images
    assert torch.equal(images[:, 0, 0, 0] + 256 * images[:, 1, 0, 0].int(), torch.arange(4100, dtype=torch.int32))


def test_labels_from_edms_dataset_json(tmp_path):
    labels = [[f'00000/img{i}.png', label] for i, label in enumerate([5, 0, 2])]
    for name, _ in labels:
        picture(tmp_path / name)
    args = flags(data_dir=tmp_path, cond=True)
    (tmp_path / 'dataset.json').write_text(json.dumps({'labels': labels}))
    assert common.load_data(args, CPU).labels.tolist() == [5, 0, 2]
    assert (args.resolution, args.in_channels, args.label_dim) == (8, 3, 6)
    picture(tmp_path / labels[0][0], seed=1)
    with pytest.raises(UserError, match='not what the run was trained on'):
        common.load_data(args, CPU)
    for wrong in labels[:2], [[name, label - 1] for name, label in labels]:
        (tmp_path / 'dataset.json').write_text(json.dumps({'labels': wrong}))
        with pytest.raises(UserError, match='dataset.json'):
            common.load_data(args, CPU)


def test_image_formats_and_the_central_square(tmp_path):
    tall, exif = Image.open(picture(tmp_path / 'a.png')), Image.Exif()
    exif[0x0112] = 6                                                            # "rotate me by 90 degrees"
    tall.save(tmp_path / 'a.jpg', exif=exif, quality=100, subsampling=0)
    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / 'c.png')       # 16 bits
    for name, mode in [('b.jpg', 'CMYK'), ('d.png', 'L'), ('e.gif', 'P'), ('f.png', 'RGBA')]:
        picture(tmp_path / name, mode=mode)
    images = common.image_folder(tmp_path).images.int()
    assert images.shape == (7, 3, 8, 8) and (images[3] == 100).all() and torch.equal(images[4, 0], images[4, 1])
    assert (images[0] - images[1].rot90(-1, (1, 2))).abs().float().mean() < 8
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 255
    Image.fromarray(wide).save(tmp_path / 'g.png')
    images = common.image_folder(tmp_path, resolution=4).images
    assert images.shape == (8, 3, 4, 4) and (images[7] == 255).all()


@pytest.mark.parametrize('words, fault, root, settings', [
    ('b.png cannot be read.* 8x6, not 8x8', lambda b: picture(b, (8, 6)), 'set', {}),
    ('b.png cannot be read', lambda b: b.write_bytes(b.read_bytes()[:-60]), 'set', {}),
    ('b.png cannot be read', lambda b: b.write_text('not an image'), 'set', {}),
    ('dataset.json', lambda b: (b.parent / 'dataset.json').write_text('{'), 'set', {}),
    ('no folder or zip', id, 'nowhere', {}), ('no folder or zip', id, 'set/a.png', {}),
    ('holds no images', lambda b: (b.parent / 'sub').mkdir(), 'set/sub', {}),
    ('--cond', id, 'set', dict(cond=True)), ('--labels 1', id, 'set', dict(labels=[0, 1])),
    ('--labels 10', id, '', dict(dataset='shapes', resolution=8, cond=True, labels=[10]))])
def test_data_that_cannot_be_used_are_named(tmp_path, words, fault, root, settings):
    picture(tmp_path / 'set/a.png')
    fault(picture(tmp_path / 'set/b.png'))
    with pytest.raises(UserError, match=words) as error:
        common.load_data(flags(data_dir=tmp_path / root, **settings), CPU)
    assert '\n' not in str(error.value)


@pytest.mark.assets
@pytest.mark.parametrize('name, read, size, first', [('cifar-10-batches-bin', common.cifar10, 50_000, [6, 9, 9, 4, 1]),
                                                     ('fashion-mnist', common.fmnist, 60_000, [9, 0, 0, 3, 0])])
def test_real_data_sets(name, read, size, first, real):
    data = read(real(name).parent)
    assert len(data.images) == size and data.labels.bincount().tolist() == [size // 10] * 10
    assert data.labels[:5].tolist() == first and 60 < data.images[:1000].float().mean() < 130


def test_many_images_are_mapped_from_a_file_which_follows_the_folder(tmp_path, monkeypatch):
    folder = tmp_path / 'pictures'
    paths = [picture(folder / f'{i}.png', seed=i) for i in range(5)]
    plain = common.image_folder(folder).images
    monkeypatch.setattr(common, 'MAPPED', 900)
    with room(500), pytest.raises(UserError, match='uint8 could not be written'):
        common.image_folder(folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert torch.equal(common.image_folder(folder).images, plain)
    cache, = tmp_path.glob('pictures-8-*.uint8')
    for path in paths[1:]:
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))                                   # is not read again
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert torch.equal(common.image_folder(folder).images, plain)
    for i in range(1, 6):
        picture(folder / f'{i}.png', seed=i)
    assert len(common.image_folder(folder).images) == 6
    second, = set(tmp_path.glob('*.uint8')) - {cache}
    second.write_bytes(second.read_bytes()[:200])
    with pytest.raises(UserError, match='delete it'):
        common.image_folder(folder)
    assert set(tmp_path.iterdir()) == {folder, cache, second}
    for grey in b'\x20', b'\xe0':                                               # other contents of the same size
        with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as archive:
            archive.writestr('a.ppm', b'P6 20 20 255 ' + 1200 * grey)
        assert common.image_folder(tmp_path / 'set.zip').images.unique().tolist() == list(grey)


def test_the_log_has_every_step_once_and_averages_nothing_away(tmp_path):
    log = common.Log(flags(out=tmp_path, steps=7), 0, CPU)
    log.block = 3
    for step in range(1, 8):
        log.step(step, loss=torch.tensor(step / 2), grad_norm=torch.tensor(1.0))
    assert lines(tmp_path) == [{'step': step, 'loss': step / 2, 'grad_norm': 1.0} for step in range(1, 8)]


def test_errors_are_lines_and_faults_of_the_program_are_not(monkeypatch, capsys):
    def code(error, *argv):
        return common.run(lambda _: (_ for _ in ()).throw(error), list(argv))
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    assert code(UserError('no data:\nconnection refused')) == 2
    assert code(RuntimeError('Connection closed by peer [127.0.0.1]')) == 1
    assert code(torch.OutOfMemoryError('CUDA out of memory. Tried ...')) == 2 and code(KeyboardInterrupt()) == 130
    assert code(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")) == 2
    assert capsys.readouterr().err.splitlines() == [
        'no data: connection refused', 'another process of this run has ended: Connection closed by peer [127.0.0.1]',
        'out of memory: lower --batch, or split it with --microbatch', 'interrupted',
        'out of memory: lower --batch, or split it with --microbatch']
    for error, argv in [(RuntimeError('shapes do not fit'), ()), (UserError('words'), ('--debug',))]:
        with pytest.raises(type(error), match=str(error)):
            code(error, *argv)


def test_weights_are_cast_once_a_step():
    """However many parts the batch has, and for the teacher, too; and the gradient is that of uncached casts."""
    torch.manual_seed(0)
    net = unet.SongUNet(8, 3, 3, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    args, x, t = Namespace(batch=8, microbatch=2, seed=0, precision='bf16'), torch.randn(8, 3, 8, 8), torch.rand(8) + 1
    weights, grads = {p.data_ptr() for p in net.parameters() if p.ndim == 4}, []
    for cached in (True, False):
        call = common.network(net, 'bf16', cached)
        with Casts() as casts:
            for part, _ in common.microbatches(net, args, 0, id):
                common.backward(sct.loss(call, x[part], t[part], x[part] / 2, t[part] / 2), 8, 'bf16', id)
        counts = collections.Counter(pointer for pointer, _ in casts.found if pointer in weights)
        assert set(counts.values()) == {1 if cached else 8} and counts.keys() == weights
        grads.append([p.grad for p in net.parameters()])
        net.zero_grad()
    torch.testing.assert_close(*grads, rtol=0.05, atol=1e-3)
