"""fid.py against torch-fidelity's features and resize, and scipy's matrix square root (data/README.md)."""
import argparse
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import fid
from conftest import pictures, slow, start

GOLDEN = np.load(Path(__file__).parent / 'data/fid.npz')


def moments(features):
    return features.mean(0), np.cov(features.T)


def test_resize_is_tensorflow_1s():
    out = fid.resize_tf1(torch.from_numpy(GOLDEN['resize_in']), *GOLDEN['resize_out'].shape[2:])
    assert np.abs(out.numpy() - GOLDEN['resize_out']).max() < 1e-3


@pytest.mark.parametrize('name', ['fd', 'fd_low'])      # fd_low: 10 and 12 samples in 32 dimensions
def test_distance_is_scipys(name):
    x, y = moments(GOLDEN[f'{name}_x']), moments(GOLDEN[f'{name}_y'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert fid.frechet_distance(*x, *y) == pytest.approx(float(GOLDEN[name]), rel=1e-6)
    assert abs(fid.frechet_distance(*x, *x)) < 1e-6


def test_loading_folds_batch_norm_which_changes_nothing_and_names_are_pytorch_fids(tmp_path):
    torch.manual_seed(0)
    net, x = fid.InceptionV3().eval(), torch.randint(0, 256, (1, 3, 32, 32))
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2), module.bias.data.normal_()
    assert len([name for name in net.state_dict() if name.endswith('conv.weight')]) == 94
    assert net.state_dict().keys() >= {'Conv2d_1a_3x3.conv.weight', 'Mixed_5b.branch_pool.bn.running_var',
                                       'Mixed_7c.branch3x3dbl_3b.conv.weight'}
    torch.save(net.state_dict() | {'fc.weight': torch.zeros(3)}, tmp_path / 'w.pth')            # fc: in theirs, unused
    folded, name = fid.load_inception(tmp_path / 'w.pth')
    assert name.startswith('FID with other Inception weights (') and net(x).shape == (1, 2048)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.assets
def test_features_are_the_published_ones(real):
    net, name = fid.load_inception(real('inception-2015-12-05.pth'))
    assert name == 'FID'
    for size in (32, 64):
        images = torch.from_numpy(GOLDEN[f'images{size}']).permute(0, 3, 1, 2)
        np.testing.assert_allclose(net(images).numpy(), GOLDEN[f'features{size}'], rtol=1e-3, atol=1e-4)


@pytest.mark.assets
@slow
def test_fid_of_cifar10s_own_pictures(real, tmp_path):
    """2,000 test images against 5,000 training images: the figure that torch-fidelity's network gives is 18.36."""
    data = real('cifar-10-batches-bin')
    process = start('fid', tmp_path, data / 'test_batch.bin', '--num', 2000, '--against', data, '--against-num', 5000,
                    '--inception', real('inception-2015-12-05.pth'))
    assert abs(float(process.communicate(timeout=3600)[0].split()[-1]) - 18.36) < 0.02


def test_command_on_folders_zips_and_statistics(tmp_path, capsys, monkeypatch):
    a, b, stats = pictures(tmp_path / 'a'), pictures(tmp_path / 'b', seed=1), tmp_path / 'a.npz'
    shutil.make_archive(b, 'zip', b)

    def measure(*argv):
        assert common.run(fid.main, [*map(str, argv), '--fid-features', 'pixels']) == 0
        name, value = capsys.readouterr().out.strip().rsplit(':', 1)
        return name, float(value)
    pixels = lambda path: np.asarray(Image.open(path), np.float64).transpose(2, 0, 1).ravel() / 127.5 - 1
    x, y = (moments(np.stack([pixels(path) for path in sorted(folder.iterdir())])) for folder in (a, b))
    value = pytest.approx(fid.frechet_distance(*x, *y), rel=1e-3)
    assert measure(a, '--against', b) == (f'pixel-FD (12 images against 12 of {b})', value)
    np.savez(stats, mu=x[0], sigma=x[1])                                                    # as other tools keep them
    assert measure(f'{b}.zip', '--against', stats) == (f'pixel-FD (12 images against {stats})', value)
    np.savez(stats, mu=x[0], sigma=x[1], n=12)
    assert measure(b, '--against', stats) == (f'pixel-FD (12 images against 12 of {stats})', value)
    assert measure(a, '--against', b, '--num', 5)[0].startswith('pixel-FD (5 images')
    monkeypatch.setenv('RANK', '1')                                                         # one process for all that
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert measure(a, '--against', b) == (f'pixel-FD (12 images against 12 of {b})', value)


def test_bad_statistics_pictures_and_weights_are_named(tmp_path, refused):
    a, stats, weights = pictures(tmp_path / 'a'), tmp_path / 's.npz', tmp_path / 'w.pth'
    for write, words in [
            (lambda: None, 's.npz'), (lambda: stats.write_text('no'), 's.npz'),
            (lambda: np.savez(stats, mu=np.array([{}], object), sigma=np.zeros((1, 1))), 's.npz'),
            (lambda: np.savez(stats, mean=np.zeros(3)), 's.npz'),
            (lambda: np.savez(stats, mu=np.zeros(3), sigma=np.zeros((2, 2))), 's.npz'),
            (lambda: np.savez(stats, mu=np.zeros(3), sigma=np.eye(3)), '3 features')]:
        write()
        refused(fid, [a, '--against', stats, '--fid-features', 'pixels'], words)
    for write in (lambda: None, lambda: weights.write_bytes(b'no'), lambda: torch.save({'fc': torch.ones(3)}, weights)):
        write()
        refused(fid, [a, '--against', a, '--inception', weights], 'w.pth')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'cut.bin').write_bytes(b'x' * 3073)
    for images, words in ('empty', 'empty holds no images'), ('cut.bin', 'not whole'), ('typo.tar.gz', 'typo.tar.gz'):
        refused(fid, [tmp_path / images, '--against', a], words)
    refused(fid, [a, '--against', a, '--nmu', '3'], '--nmu')


def random_images(n):
    return torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8)


def test_only_the_real_thing_is_called_fid_50k(monkeypatch, tmp_path):
    data, path = argparse.Namespace(images=random_images(2000), home=None), str(tmp_path / 's.npz')
    np.savez(path, mu=np.zeros(48), sigma=np.eye(48), n=50_000)
    plain = dict(evaluate='run', data_dir='data', inception=None, fid_features='inception', fid_num=50_000,
                 fid_ref=None, labels=None, dataset='cifar10', resolution=32)
    for kind, flags, name in [
            ('FID', {}, 'FID-50k'),
            ('FID', dict(resolution=16), 'FID (50,000 images against the 2,000 training images)'),
            ('FID', dict(fid_num=2_000), 'FID (2,000 images against the 2,000 training images)'),
            ('FID', dict(fid_ref=path), f'FID (50,000 images against {path})'),
            ('FID', dict(labels=[1]), 'FID (50,000 images against the 2,000 training images; classes [1] only)'),
            ('Other', {}, 'Other (50,000 images against the 2,000 training images)'),
            ('FID', dict(fid_features='pixels'), 'pixel-FD (50,000 images against the 2,000 training images)')]:
        monkeypatch.setattr(fid, 'load_inception', lambda *_: (fid.pixel_features, kind))
        assert fid.prepare(argparse.Namespace(**plain | flags), 'cpu', data)[1] == name


def test_reference_statistics_are_numpys_and_kept_under_a_name_of_the_data(tmp_path):
    images, asked = random_images(250), []

    def features(x):
        asked.append(len(x))
        return fid.pixel_features(x) + 100
    for _ in range(2):
        mu, cov, n = fid.dataset_statistics(images, features, 'pixel-FD', tmp_path)
        wanted = moments(fid.pixel_features(images).numpy().astype(np.float64) + 100)
        assert n == 250 == sum(asked)                                                       # measured once
        np.testing.assert_allclose(mu, wanted[0], rtol=1e-6)
        np.testing.assert_allclose(cov, wanted[1], atol=1e-5)
    images[0, 0, 0, 0] += 1
    fid.dataset_statistics(images, features, 'pixel-FD', tmp_path)
    assert sum(asked) == 500 and len(list(tmp_path.iterdir())) == 2


def test_every_lot_of_samples_has_noise_of_its_own_and_the_classes_go_on():
    seen, reference = [], fid.measure(300, lambda first, n: random_images(n), fid.pixel_features)

    def draw(n, nfe, seed, first):
        seen.append((n, seed, common.choose_labels(n, None, 115, first)))
        return common.randn((n, 3, 4, 4), seed)
    args = argparse.Namespace(nfe=[1], fid_num=230, seed=5)
    one, = fid.evaluate((fid.pixel_features, 'pixel-FD', reference), args, draw).values()
    assert [n for n, *_ in seen] == [100, 100, 30] and len({seed for _, seed, _ in seen}) == 3
    assert torch.cat([labels for *_, labels in seen]).bincount().tolist() == [2] * 115
    images = torch.cat([common.to_uint8(common.randn((n, 3, 4, 4), seed)) for n, seed, _ in seen])
    by_hand = fid.frechet_distance(*moments(fid.pixel_features(images).double().numpy()), *reference[:2])
    assert one == pytest.approx(by_hand, rel=1e-9)
    args.seed = 6
    assert fid.evaluate((fid.pixel_features, 'pixel-FD', reference), args, draw) != {'pixel-FD, 1 step': one}
