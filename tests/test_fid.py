"""fid.py against torch-fidelity's features and resize, and scipy's matrix square root (`fid.npz`)."""
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

GOLDEN = np.load(Path(__file__).parent / 'data/fid.npz')


def test_resize_is_tensorflow_1s():
    out = fid.resize_tf1(torch.from_numpy(GOLDEN['resize_in']), *GOLDEN['resize_out'].shape[2:])
    assert np.abs(out.numpy() - GOLDEN['resize_out']).max() < 1e-3


@pytest.mark.parametrize('name', ['fd', 'fd_low'])      # fd_low: 10 and 12 samples in 32 dimensions
def test_distance_is_scipys(name):
    stats = [(x.mean(0), np.cov(x.T)) for x in (GOLDEN[f'{name}_x'], GOLDEN[f'{name}_y'])]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        value = fid.frechet_distance(*stats[0], *stats[1])
    assert abs(value / GOLDEN[name] - 1) < 1e-6
    assert abs(fid.frechet_distance(*stats[0], *stats[0])) < 1e-6


def test_distance_of_gaussians_in_closed_form():
    # covariances that share their axes: |mu1 - mu2|² + sum (s1 - s2)²
    s1, s2, mu = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0]), np.array([1.0, 0.0, -2.0])
    axes = np.linalg.qr(np.random.RandomState(0).randn(3, 3))[0]
    value = fid.frechet_distance(mu, axes * s1 ** 2 @ axes.T, 0 * mu, axes * s2 ** 2 @ axes.T)
    assert abs(value - (5 + 4 + 2.25 + 1)) < 1e-9


def test_streaming_statistics_equal_numpys():
    x = torch.randn(500, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    statistics = fid.Statistics()
    for part in x.split(64):
        statistics.update(part)
    mu, cov, n = statistics.result()
    assert n == 500
    np.testing.assert_allclose(mu, x.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T), rtol=1e-8)


def test_loading_folds_batch_norm_which_changes_nothing_and_names_are_pytorch_fids(tmp_path):
    torch.manual_seed(0)
    net = fid.InceptionV3().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2), module.bias.data.normal_()
    names = set(net.state_dict())
    assert {'Conv2d_1a_3x3.conv.weight', 'Mixed_5b.branch_pool.bn.running_var',
            'Mixed_7c.branch3x3dbl_3b.conv.weight'} <= names
    assert len([n for n in names if n.endswith('conv.weight')]) == 94
    torch.save(net.state_dict() | {'fc.weight': torch.zeros(3)}, tmp_path / 'w.pth')            # fc: in theirs, unused
    folded, name = fid.load_inception(tmp_path / 'w.pth')
    assert name.startswith('FID with other Inception weights (')
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    x = torch.randint(0, 256, (1, 3, 32, 32))
    features = net(x)
    assert features.shape == (1, 2048)
    torch.testing.assert_close(folded(x), features, rtol=1e-4, atol=1e-4)


@pytest.mark.assets
def test_features_are_the_published_ones(real):
    net, name = fid.load_inception(real('inception-2015-12-05.pth'))
    assert name == 'FID'
    for size in (32, 64):
        images = torch.from_numpy(GOLDEN[f'images{size}']).permute(0, 3, 1, 2)
        np.testing.assert_allclose(net(images).numpy(), GOLDEN[f'features{size}'], rtol=1e-3, atol=1e-4)


@pytest.mark.assets
@pytest.mark.slow
def test_fid_of_cifar10s_own_pictures(real, command):
    """2,000 test images against 5,000 training images: the figure that torch-fidelity's network gives is 18.36."""
    data = real('cifar-10-batches-bin')
    done = command('fid.py', data / 'test_batch.bin', '--num', 2000, '--against', data, '--against-num', 5000,
                   '--inception', real('inception-2015-12-05.pth'), timeout=3600)
    assert abs(float(done.stdout.split()[-1]) - 18.36) < 0.02


def pictures(folder, n=12, size=8, seed=0):
    folder.mkdir(parents=True)
    for i, x in enumerate(np.random.RandomState(seed).randint(0, 256, (n, size, size, 3), dtype=np.uint8)):
        Image.fromarray(x).save(folder / f'{i:03}.png')
    return folder


def test_command_on_folders_zips_and_statistics(tmp_path, capsys):
    a, b = pictures(tmp_path / 'a'), pictures(tmp_path / 'b', seed=1)
    shutil.make_archive(tmp_path / 'b', 'zip', b)

    def measure(*argv):
        assert common.run(fid.main, [*map(str, argv), '--fid-features', 'pixels']) == 0
        name, value = capsys.readouterr().out.strip().rsplit(':', 1)
        return name, float(value)
    name, value = measure(a, '--against', b)
    pixels = lambda path: np.asarray(Image.open(path), np.float64).transpose(2, 0, 1).ravel() / 127.5 - 1
    x, y = (np.stack([pixels(path) for path in sorted(folder.iterdir())]) for folder in (a, b))
    expected = fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert abs(value - expected) < 1e-3 * expected and name == f'pixel-FD (12 images against 12 of {b})'
    np.savez(tmp_path / 'a.npz', mu=x.mean(0), sigma=np.cov(x.T))                           # as other tools keep them
    name, again = measure(tmp_path / 'b.zip', '--against', tmp_path / 'a.npz')
    assert again == pytest.approx(value, rel=1e-6) and name == f'pixel-FD (12 images against {tmp_path / "a.npz"})'
    np.savez(tmp_path / 'a.npz', mu=x.mean(0), sigma=np.cov(x.T), n=12)
    assert f'12 of {tmp_path / "a.npz"}' in measure(b, '--against', tmp_path / 'a.npz')[0]
    assert measure(a, '--against', b, '--num', 5)[0].startswith('pixel-FD (5 images')


@pytest.mark.parametrize('damage', ['missing', 'text', 'pickle', 'keys', 'shape'])
def test_bad_statistics(tmp_path, refused, damage):
    stats, a = tmp_path / 's.npz', pictures(tmp_path / 'a')
    if damage == 'text':
        stats.write_text('no')
    if damage == 'pickle':
        np.savez(stats, mu=np.array([{}], object), sigma=np.zeros((1, 1)))
    if damage == 'keys':
        np.savez(stats, mean=np.zeros(3))
    if damage == 'shape':
        np.savez(stats, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    refused(fid, [a, '--against', stats, '--fid-features', 'pixels'], 's.npz')


def test_bad_pictures_and_weights(tmp_path, refused):
    a = pictures(tmp_path / 'a')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'cut.bin').write_bytes(b'x' * 3073)
    (tmp_path / 'w.pth').write_bytes(b'no weights')
    torch.save({'fc.weight': torch.zeros(3)}, tmp_path / 'other.pth')
    refused(fid, [a, '--against', tmp_path / 'nothing', '--fid-features', 'pixels'], 'nothing')
    refused(fid, [tmp_path / 'empty', '--against', a], 'empty holds no images')
    refused(fid, [tmp_path / 'cut.bin', '--against', a], 'cut.bin has 3,073 bytes')
    refused(fid, [a, '--against', a, '--inception', tmp_path / 'w.pth'], 'w.pth')
    refused(fid, [a, '--against', a, '--inception', tmp_path / 'other.pth'], 'other.pth')
    refused(fid, [a, '--against', a, '--inception', tmp_path / 'none.pth'], 'none.pth')
    refused(fid, [a, '--against', a, '--nmu', '3'], '--nmu')
    refused(fid, [tmp_path / 'typo.tar.gz', '--against', a], 'typo.tar.gz')
    np.savez(tmp_path / 's.npz', mu=np.zeros(3), sigma=np.eye(3))
    refused(fid, [a, '--against', tmp_path / 's.npz', '--fid-features', 'pixels'], '3 features')


def test_only_the_real_thing_is_called_fid_50k(monkeypatch, tmp_path):
    data = argparse.Namespace(images=torch.randint(0, 256, (2_000, 3, 4, 4), dtype=torch.uint8), home=None)
    np.savez(tmp_path / 's.npz', mu=np.zeros(48), sigma=np.eye(48), n=50_000)

    def name(kind='FID', **flags):
        monkeypatch.setattr(fid, 'load_inception', lambda *_: (fid.pixel_features, kind))
        args = dict(evaluate='run', data_dir='data', inception=None, fid_features='inception', fid_num=50_000,
                    fid_ref=None, labels=None)
        return fid.prepare(argparse.Namespace(**args | flags), 'cpu', data)[1]
    assert name() == 'FID-50k'
    assert name(fid_num=2_000) == 'FID (2,000 images against the 2,000 training images)'
    assert name(fid_ref=str(tmp_path / 's.npz')) == f'FID (50,000 images against {tmp_path / "s.npz"})'
    assert name(labels=[1]) == 'FID (50,000 images against the 2,000 training images; classes [1] only)'
    assert name('FID with other Inception weights').startswith('FID with other Inception weights (50,000 images')
    assert name(fid_features='pixels') == 'pixel-FD (50,000 images against the 2,000 training images)'


def test_reference_statistics_are_kept_under_a_name_of_the_data(tmp_path):
    images = torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8)
    calls = []

    def features(x):
        calls.append(len(x))
        return fid.pixel_features(x)
    first = fid.dataset_statistics(images, features, 'pixel-FD', tmp_path)
    again = fid.dataset_statistics(images, features, 'pixel-FD', tmp_path)
    assert sum(calls) == 30 and np.array_equal(first[1], again[1]) and again[2] == 30
    images[0, 0, 0, 0] += 1
    fid.dataset_statistics(images, features, 'pixel-FD', tmp_path)
    assert sum(calls) == 60 and len(list(tmp_path.iterdir())) == 2


def test_statistics_are_of_all_the_pictures_in_their_lots():
    images = torch.randint(0, 256, (250, 3, 4, 4), dtype=torch.uint8)
    mu, cov, n = fid.dataset_statistics(images, fid.pixel_features, 'pixel-FD', None)
    features = fid.pixel_features(images).double().numpy()
    assert n == 250
    np.testing.assert_allclose(mu, features.mean(0), atol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features, rowvar=False), atol=1e-12)


def test_every_lot_of_samples_has_noise_and_classes_of_its_own():
    """And the same whichever process makes it: a distance of 100 pictures, repeated, would be another one."""
    seen = []

    def draw(n, nfe, seed, first):
        seen.append((n, seed, first))
        return common.randn((n, 3, 4, 4), seed)
    reference = fid.measure(300, lambda first, n: torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8),
                            fid.pixel_features)
    args = argparse.Namespace(nfe=[1], fid_num=230, seed=5)
    one, = fid.evaluate((fid.pixel_features, 'pixel-FD', reference), args, draw).values()
    assert [(n, first) for n, _, first in seen] == [(100, 0), (100, 100), (30, 200)]
    assert len({seed for _, seed, _ in seen}) == 3
    images = torch.cat([common.to_uint8(common.randn((n, 3, 4, 4), seed)) for n, seed, _ in seen])
    features = fid.pixel_features(images).double().numpy()
    by_hand = fid.frechet_distance(features.mean(0), np.cov(features, rowvar=False), *reference[:2])
    assert one == pytest.approx(by_hand, rel=1e-9)
    args.seed = 6
    assert fid.evaluate((fid.pixel_features, 'pixel-FD', reference), args, draw) != {'pixel-FD, 1 step': one}
