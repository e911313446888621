"""Fréchet Inception distance (Heusel et al. 2017, arXiv 1706.08500), computed as its authors did, in torch alone.

    FID = |mu1 - mu2|² + Tr(C1 + C2 - 2 sqrt(C1 C2))

of the means and covariances of two sets' Inception features. What makes it *the* FID: the Inception graph of 2015-12-05
(average pooling that ignores the padding), TensorFlow 1's bilinear resize to 299 (no half-pixel offset, unlike
PyTorch's), float64 statistics, 50,000 samples against the training set. All else is printed with what differs.

    python fid.py IMAGES --against IMAGES|STATS.npz [--num N] [--against-num N]
"""
import argparse
import hashlib
import os
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import common

URL = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth'
TENSORS_SHA256 = 'c9ce7f36d5ee9536ecde7e5b5b679a59d152a85abff7981e0d6c0e5d706e3557'    # of what is in it, by name
LOT = 100                           # pictures at a time; each lot of samples has a seed of its own


# 1. The Inception network, parameter names as in pytorch-fid's file

class Conv(nn.Sequential):
    """Convolution, batch norm, ReLU: (B, in, H, W) -> (B, out, H', W')."""

    def __init__(self, cin, cout, kernel, stride=1, padding='same'):
        conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        bn = nn.BatchNorm2d(cout, eps=0.001)
        super().__init__(OrderedDict(conv=conv, bn=bn, relu=nn.ReLU(inplace=True)))


class Block(nn.Module):
    """Branches of convolutions, and one of pooling, joined by channels: (B, in, H, W) -> (B, out, H', W')."""

    def __init__(self, cin, pool, branches, pooled=None):
        super().__init__()
        self.pool, self.branches = pool, []
        self.branch_pool = Conv(cin, pooled, 1) if pooled else nn.Identity()
        for branch, layers in branches.items():
            width, steps = cin, []
            for i, layer in enumerate(layers, 1):       # `Conv`'s arguments after the first, or a dict of two such
                name = f'{branch}_{i}' if len(layers) > 1 else branch
                fork = layer if isinstance(layer, dict) else {'': layer}
                for letter, (cout, *rest) in fork.items():
                    self.add_module(name + letter, Conv(width, cout, *rest))
                steps.append([name + letter for letter in fork])
                width = cout
            self.branches.append(steps)

    def forward(self, x):
        outs = []
        for steps in self.branches:
            y = [x]
            for names in steps:
                y = [getattr(self, name)(y[0]) for name in names]
            outs += y
        return torch.cat([*outs, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Sequential):
    """The FID network. forward: images (B, 3, H, W), 0..255, any number type -> features (B, 2048), float32."""

    def __init__(self):
        avg, half = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 2)
        wide, tall = (1, 7), (7, 1)                                     # a 7x7 convolution in two factors
        fork = dict(a=(384, (1, 3)), b=(384, (3, 1)))
        # branches of the blocks at 35x35, 17x17 and 8x8 pixels, and of those that lead to the next size
        at35 = dict(branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        at17 = lambda c: dict(branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, wide), (192, tall)],
                              branch7x7dbl=[(c, 1), (c, tall), (c, wide), (c, tall), (192, wide)])
        at8 = dict(branch1x1=[(320, 1)], branch3x3=[(384, 1), fork], branch3x3dbl=[(448, 1), (384, 3), fork])
        to17 = dict(branch3x3=[(384, 3, 2, 0)], branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)])
        to8 = dict(branch3x3=[(192, 1), (320, 3, 2, 0)],
                   branch7x7x3=[(192, 1), (192, wide), (192, tall), (192, 3, 2, 0)])
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=Conv(3, 32, 3, 2, 0), Conv2d_2a_3x3=Conv(32, 32, 3, 1, 0), Conv2d_2b_3x3=Conv(32, 64, 3),
            pool1=half, Conv2d_3b_1x1=Conv(64, 80, 1), Conv2d_4a_3x3=Conv(80, 192, 3, 1, 0), pool2=half,
            Mixed_5b=Block(192, avg, at35, 32), Mixed_5c=Block(256, avg, at35, 64), Mixed_5d=Block(288, avg, at35, 64),
            Mixed_6a=Block(288, half, to17),
            Mixed_6b=Block(768, avg, at17(128), 192), Mixed_6c=Block(768, avg, at17(160), 192),
            Mixed_6d=Block(768, avg, at17(160), 192), Mixed_6e=Block(768, avg, at17(192), 192),
            Mixed_7a=Block(768, half, to8),
            Mixed_7b=Block(1280, avg, at8, 192), Mixed_7c=Block(2048, nn.MaxPool2d(3, 1, 1), at8, 192)))

    @torch.inference_mode()
    @common.true_float32()                                              # whatever --precision says
    def forward(self, images):
        return super().forward((resize_tf1(images.float(), 299, 299) - 128) / 128).mean((2, 3))


def resize_tf1(x, height, width):
    """TensorFlow 1's bilinear resize: output pixel i looks at i * in / out, with no half-pixel offset. x (..., H, W)"""
    for size in (width, height):
        x = x.mT                                            # brings the axis to where whole rows are read
        n = x.shape[-2]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = at.long().clamp(max=n - 1)
        x = torch.lerp(x[..., low, :], x[..., (low + 1).clamp(max=n - 1), :], (at - low)[:, None])
    return x


def load_inception(path=None, data_dir='data', device='cpu'):
    """The FID network, weights from `path`, else found in or downloaded to `data_dir`. -> network, name of distance"""
    if path is None:
        with common.one_first():
            path = min(Path(data_dir).glob('*inception-2015-12-05*.pth'), default=Path(data_dir, URL.split('/')[-1]))
            if not path.exists():
                common.download(URL, path, 'sha256', '6726825d')
    net = InceptionV3()
    with common.or_refuse(f'{path} does not hold the Inception weights'):
        state = torch.load(path, map_location='cpu', weights_only=True)
        state = {name: state[name] for name in sorted(net.state_dict()) if not name.endswith('num_batches_tracked')}
        net.load_state_dict(state)
        digest = hashlib.sha256(b''.join(name.encode() + p.numpy().tobytes() for name, p in state.items())).hexdigest()
    net.eval().requires_grad_(False)
    for module in net.modules():            # the batch norm becomes part of the convolution: one pass over memory less
        if isinstance(module, Conv):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    name = 'FID' if digest == TENSORS_SHA256 else f'FID with other Inception weights ({digest[:8]})'
    return net.to(device, memory_format=torch.channels_last), name


# 2. Statistics

class Statistics:
    """Mean and covariance of a stream of features, in float64; memory does not grow with their number."""
    total = 0       # sum of x xᵀ over features x with a 1 before them (1 + D, 1 + D): their number, sum and products

    def update(self, features):
        x = F.pad(features.double(), (1, 0), value=1)                                               # (B, 1 + D)
        self.total = self.total + x.T @ x

    def result(self):
        """-> mean (D,), covariance (D, D) as numpy float64, number of features."""
        total = self.total.cpu().numpy()
        n = int(total[0, 0])
        mu = total[0, 1:] / n
        return mu, (total[1:, 1:] - n * np.outer(mu, mu)) / max(n - 1, 1), n


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|² + Tr(C1 + C2 - 2 sqrt(C1 C2)). mu (D,), cov (D, D), which may be singular -> float"""
    if len(mu1) != len(mu2):
        raise common.UserError(f'the reference has {len(mu2)} features to a picture, not {len(mu1)}: --fid-features?')
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    rounding = len(mu1) * np.finfo(np.float64).eps          # smaller shares of the largest eigenvalue are no variance
    values, vectors = np.linalg.eigh(cov1)
    values[values < values.max() * rounding] = 0
    root = vectors * np.sqrt(values) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov2 @ root)        # those of C1 C2, without complex numbers: it is symmetric
    product[product < product.max() * rounding] = 0
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(product).sum())


def load_statistics(path):
    """mu (D,), sigma (D, D), n (0 if the file does not say) from an .npz with keys `mu`, `sigma`, perhaps `n`."""
    with common.or_refuse(f'{path} does not hold statistics (mu, sigma)'), np.load(path, allow_pickle=False) as file:
        mu, sigma, n = file['mu'].astype(np.float64), file['sigma'].astype(np.float64), int(file.get('n', 0))
        assert mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and np.isfinite(sigma).all(), 'wrong shapes or values'
        return mu, sigma, n


def measure(count, images, features):
    """`Statistics.result` of `count` images; processes share the lots. images(first, n): uint8 (n, C, H, W)."""
    statistics = Statistics()
    rank, size = (common.rank(), common.world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank * LOT, count, size * LOT)
    for first in common.progress(mine, f'features of {count:,} images, {LOT} at a time'):
        statistics.update(features(images(first, min(LOT, count - first))))
    if not mine:                                    # a process without a lot learns how many features there are
        statistics.update(features(images(0, 1))[:0])
    if dist.is_initialized():
        dist.all_reduce(statistics.total)
    return statistics.result()


def dataset_statistics(images, features, kind, home):
    """Statistics of images uint8 (N, C, H, W), kept in folder `home` under a name that is a hash of them and `kind`."""
    cache, found = None, [None]
    if home and common.rank() == 0:
        digest = hashlib.sha256(f'{kind} {tuple(images.shape)}'.encode())
        for part in images.split(10_000):
            digest.update(part.cpu().numpy())
        cache = home / f'fid-{digest.hexdigest()[:16]}.npz'
        found = [load_statistics(cache) if cache.exists() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)           # one process decides for all whether there is anything to measure
    mu, cov, n = found[0] or measure(len(images), lambda first, n: images[first:first + n], features)
    if cache and not found[0] and os.access(home, os.W_OK):          # data may lie where nobody may write
        common.write_atomic(cache, lambda file: np.savez(file, mu=mu, sigma=cov, n=n))
    return mu, cov, n


# 3. Judging

def pixel_features(images):
    """Features that need no weights: the pixels, averaged to 16x16 or less. (B, C, H, W) 0..255 -> (B, D)"""
    return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, min(16, images.shape[-1])).flatten(1)


def load_features(args, device):
    """--fid-features as a function, uint8 images (B, C, H, W) -> (B, D), and the name of the distance."""
    net, kind = pixel_features, 'pixel-FD'
    if args.fid_features == 'inception':
        net, kind = load_inception(args.inception, common.cache_folder(args), device)
    return lambda images: net(images.to(device).expand(-1, 3, -1, -1)), kind        # grey becomes three equal channels


def prepare(args, device, data=None):
    """-> features, name of their distance, statistics of --fid-ref or the training set (`data`, if loaded); or None."""
    if not args.evaluate and (not args.eval_every or args.benchmark):
        return None
    features, kind = load_features(args, device)
    if args.fid_ref:
        reference, against = load_statistics(args.fid_ref), args.fid_ref
    else:
        data = data or common.load_data(args, device)
        reference = dataset_statistics(data.images, features, kind, data.home)
        against = f'the {reference[2]:,} training images'
    whole = args.resolution == dict(cifar10=32, fmnist=28).get(args.dataset, args.resolution)   # not shrunk
    if kind == 'FID' and args.fid_num == 50_000 and whole and not args.fid_ref and not args.labels:
        return features, 'FID-50k', reference           # what the literature calls so; other names say what differs
    classes = f'; classes {args.labels} only' if args.labels else ''
    return features, f'{kind} ({args.fid_num:,} images against {against}{classes})', reference


def evaluate(fid_reference, args, sample_fn):
    """Prints the distances of --fid-num images sample_fn(n, nfe, seed, first), by --nfe. -> {name: distance}"""
    (features, name, reference), found = fid_reference, {}
    for nfe in args.nfe:        # each lot has a seed, whichever process makes it, and classes from number `first` on
        images = lambda i, n: common.to_uint8(sample_fn(n, nfe, seed=common.key(args.seed, i // LOT), first=i))
        value = frechet_distance(*measure(args.fid_num, images, features)[:2], *reference[:2])
        common.print0(f'{name}, {nfe} step{"s" * (nfe > 1)}: {value:.4f}')
        found[f'{name}, {nfe} step'] = value
    return found


# 4. Command line

def read_pictures(path, resolution=None):
    """A folder, a zip, CIFAR-10's folder or archive (training set) or one of its .bin files -> uint8 (N, 3, H, W)."""
    path = Path(path)
    if not path.exists():
        raise common.UserError(f'{path}: there is no such file or folder')
    here = any((path / name).exists() for name in ('data_batch_1.bin', 'cifar-10-batches-bin'))
    if here or path.name.endswith(('.bin', '.tar.gz')):
        return common.cifar10(path).images
    return common.image_folder(path, resolution).images


def main(argv=None):
    """The command; --help tells its flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = common.refuse_flags
    add = parser.add_argument
    add('images', metavar='IMAGES', help="folder or zip; CIFAR-10's folder or archive (training set) or a .bin file")
    add('--against', required=True, metavar='IMAGES|STATS.npz', help='the same, or statistics (mu and sigma)')
    add('--num', type=common.number(int, 2), metavar='N', help='only the first N of IMAGES')
    add('--against-num', type=common.number(int, 2), metavar='N', help='only the first N of --against')
    add('--fid-features', choices=['inception', 'pixels'], default='inception')
    add('--inception', metavar='PATH', help='Inception weights; found in --data-dir or downloaded if not given')
    add('--data-dir', default='data', metavar='PATH', help='where the Inception weights lie or go')
    add('--resolution', type=common.number(int, 4, 1024), metavar='N', help='crop and resize pictures to this')
    add('--debug', action='store_true', help='show tracebacks')
    args = parser.parse_args(argv)
    images = read_pictures(args.images, args.resolution)[:args.num]
    features, kind = load_features(args, 'cuda' if torch.cuda.is_available() else 'cpu')
    if args.against.endswith('.npz'):
        mu, cov, n = load_statistics(args.against)
    else:
        others = read_pictures(args.against, args.resolution)[:args.against_num]
        mu, cov, n = dataset_statistics(others, features, kind, None)
    value = frechet_distance(*dataset_statistics(images, features, kind, None)[:2], mu, cov)
    print(f'{kind} ({len(images):,} images against {f"{n:,} of " if n else ""}{args.against}): {value:.4f}')


if __name__ == '__main__':
    sys.exit(common.run(main))
