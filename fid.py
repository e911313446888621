"""Fréchet Inception distance (Heusel et al. 2017, arXiv 1706.08500), computed as its authors did, in torch alone.

    FID = |mu1 - mu2|² + Tr(C1 + C2 - 2 sqrt(C1 C2))

between the means and covariances of Inception features of two sets of images. What makes it *the* FID: the Inception
graph of 2015-12-05 (average pooling that ignores the padding, one max pooling in its last block), TensorFlow 1's
bilinear resize to 299 (no half-pixel offset, unlike PyTorch's), pixels (x - 128) / 128, features of the last pooling,
float64 statistics, and 50,000 samples against the whole training set. Anything else is printed with what differs.

    python fid.py IMAGES --against IMAGES|STATS.npz [--num N] [--against-num N]

IMAGES: a folder or zip of images, CIFAR-10's folder or archive (its training set), or one of CIFAR-10's .bin files.
"""
import argparse
import hashlib
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import common
from common import UserError

RELEASE = 'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights'
WEIGHTS_URL = f'{RELEASE}/pt_inception-2015-12-05-6726825d.pth'
WEIGHTS_SHA256 = '6726825d'         # how the hash of that file begins
TENSORS_SHA256 = 'c9ce7f36d5ee9536ecde7e5b5b679a59d152a85abff7981e0d6c0e5d706e3557'    # of the tensors, by name


# 1. The Inception network, parameter names as in pytorch-fid's file

class Conv(nn.Module):
    """Convolution, batch norm, ReLU: (B, in, H, W) -> (B, out, H', W'); padding keeps the size unless given."""

    def __init__(self, cin, cout, kernel=1, stride=1, pad=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = tuple(k // 2 for k in kernel) if pad is None else pad
        self.conv = nn.Conv2d(cin, cout, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))

    def fold(self):
        """The batch norm becomes part of the convolution: one pass over memory less."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


class Block(nn.Module):
    """Parallel branches of convolutions, and a pooled one, joined by channels.

    `branches` names each branch's layers with the arguments of `Conv` after the input's width; a branch that ends in a
    list forks there. `pool`: 'avg' (padding not counted), 'max', or 'max2' (stride 2); `pool_width`: of a 1x1
    convolution after it.
    """

    def __init__(self, cin, branches, pool, pool_width=None):
        super().__init__()
        self.paths, self.pool = [], pool
        for branch in branches:
            width, path = cin, []
            for layer in branch:
                for name, *args in layer if isinstance(layer, list) else [layer]:
                    setattr(self, name, Conv(width, *args))
                path.append([name for name, *_ in layer] if isinstance(layer, list) else layer[0])
                width = args[0]
            self.paths.append(path)
        if pool_width:
            self.branch_pool = Conv(cin, pool_width)

    def forward(self, x):
        outs = []
        for path in self.paths:
            y = x
            for name in path:
                fork = isinstance(name, list)
                y = torch.cat([getattr(self, n)(y) for n in name], 1) if fork else getattr(self, name)(y)
            outs.append(y)
        if self.pool == 'avg':
            y = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            y = F.max_pool2d(x, 3, stride=2) if self.pool == 'max2' else F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*outs, self.branch_pool(y) if hasattr(self, 'branch_pool') else y], 1)


def block_a(cin, pool_width):
    """35x35 -> 35x35."""
    double = [('branch3x3dbl_1', 64), ('branch3x3dbl_2', 96, 3), ('branch3x3dbl_3', 96, 3)]
    return Block(cin, [[('branch1x1', 64)], [('branch5x5_1', 48), ('branch5x5_2', 64, 5)], double], 'avg', pool_width)


def block_c(c):
    """17x17 -> 17x17, with 7x7 convolutions in two factors."""
    wide, tall = (1, 7), (7, 1)
    return Block(768, [[('branch1x1', 192)], [('branch7x7_1', c), ('branch7x7_2', c, wide), ('branch7x7_3', 192, tall)],
                       [('branch7x7dbl_1', c), ('branch7x7dbl_2', c, tall), ('branch7x7dbl_3', c, wide),
                        ('branch7x7dbl_4', c, tall), ('branch7x7dbl_5', 192, wide)]], 'avg', 192)


def block_e(cin, pool):
    """8x8 -> 8x8, whose branches fork at their ends."""
    fork = lambda name: [(f'{name}a', 384, (1, 3)), (f'{name}b', 384, (3, 1))]
    return Block(cin, [[('branch1x1', 320)], [('branch3x3_1', 384), fork('branch3x3_2')],
                       [('branch3x3dbl_1', 448), ('branch3x3dbl_2', 384, 3), fork('branch3x3dbl_3')]], pool, 192)


class InceptionV3(nn.Module):
    """The FID network. forward: images (B, 3, H, W), 0..255, any number type -> features (B, 2048), float32."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2, pad=0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Block(288, [[('branch3x3', 384, 3, 2, 0)], [('branch3x3dbl_1', 64), ('branch3x3dbl_2', 96, 3),
                                                                    ('branch3x3dbl_3', 96, 3, 2, 0)]], 'max2')
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (block_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Block(768, [[('branch3x3_1', 192), ('branch3x3_2', 320, 3, 2, 0)],
                                    [('branch7x7x3_1', 192), ('branch7x7x3_2', 192, (1, 7)),
                                     ('branch7x7x3_3', 192, (7, 1)), ('branch7x7x3_4', 192, 3, 2, 0)]], 'max2')
        self.Mixed_7b, self.Mixed_7c = block_e(1280, 'avg'), block_e(2048, 'max')

    def forward(self, images):
        x = (resize_tf1(images.float(), 299, 299) - 128) / 128
        for name, layer in self.named_children():
            if name in ('Conv2d_3b_1x1', 'Mixed_5b'):
                x = F.max_pool2d(x, 3, stride=2)
            x = layer(x)
        return x.mean((2, 3))


def resize_tf1(x, height, width):
    """TensorFlow 1's bilinear resize: output pixel i looks at i * in / out, with no half-pixel offset. x (..., H, W)"""
    for dim, size in [(-1, width), (-2, height)]:
        n = x.shape[dim]
        at = torch.arange(size, dtype=torch.float32, device=x.device) * (n / size)
        low = at.long().clamp(max=n - 1)
        part = at - low if dim == -1 else (at - low)[:, None]
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), part)
    return x


def load_inception(path=None, data_dir='data', device='cpu'):
    """The FID network with its weights. -> (network, 'FID' or, for others than those of 2015, a name that says so)

    `path`: a state dict with pytorch-fid's names. Without it they are looked for in `data_dir`, or downloaded there.
    """
    if path is None:
        with common.one_first():
            found = sorted(Path(data_dir).glob('*inception-2015-12-05*.pth'))
            path = found[0] if found else Path(data_dir) / WEIGHTS_URL.split('/')[-1]
            if not found:
                common.download(WEIGHTS_URL, path, 'sha256', WEIGHTS_SHA256)
    net = InceptionV3()
    wanted = net.state_dict()
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        state = {name: state[name] for name in sorted(wanted) if not name.endswith('num_batches_tracked')}
        digest = hashlib.sha256(b''.join(name.encode() + p.numpy().tobytes() for name, p in state.items())).hexdigest()
        net.load_state_dict(state | {name: p for name, p in wanted.items() if name not in state})
    except FileNotFoundError:
        raise UserError(f'--inception {path}: there is no such file')
    except Exception as error:              # whatever a file that is not one of these makes torch say
        raise UserError(f'{path} does not hold the Inception weights: {error!r}')
    net.eval().requires_grad_(False)
    for module in net.modules():
        if isinstance(module, Conv):
            module.fold()
    name = 'FID' if digest == TENSORS_SHA256 else f'FID with other Inception weights ({digest[:8]})'
    return net.to(device, memory_format=torch.channels_last), name


# 2. Statistics

class Statistics:
    """Mean and covariance of a stream of features, in float64; memory does not grow with their number."""

    def __init__(self):
        self.n, self.sum, self.outer = 0, 0, 0

    def update(self, features):
        """features (B, D)."""
        features = features.double()
        self.n += len(features)
        self.sum = self.sum + features.sum(0)
        self.outer = self.outer + features.T @ features

    def reduce(self):
        """Adds up the statistics of all processes."""
        if dist.is_initialized():
            n = torch.full((), self.n, device=self.sum.device)
            for value in (n, self.sum, self.outer):
                dist.all_reduce(value)
            self.n = int(n)

    def result(self):
        """-> mean (D,), covariance (D, D) as numpy float64, number of features."""
        mu = self.sum / self.n
        cov = (self.outer - self.n * mu.outer(mu)) / max(self.n - 1, 1)
        return mu.cpu().numpy(), cov.cpu().numpy(), self.n


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """|mu1 - mu2|² + Tr(C1 + C2 - 2 sqrt(C1 C2)). mu (D,), cov (D, D) -> float

    C1 C2 has the eigenvalues of sqrt(C1) C2 sqrt(C1), which is symmetric: no complex numbers, no failure where a
    covariance is singular (fewer samples than dimensions).
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    values, vectors = np.linalg.eigh(cov1)
    values[values < values.max() * len(mu1) * np.finfo(np.float64).eps] = 0             # rounding, not variance
    root = vectors * np.sqrt(values) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov2 @ root)
    product[product < product.max() * len(mu1) * np.finfo(np.float64).eps] = 0
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(product).sum())


def load_statistics(path):
    """mu (D,), sigma (D, D), n (0 if the file does not say) from an .npz with keys `mu`, `sigma`, perhaps `n`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = file['mu'].astype(np.float64), file['sigma'].astype(np.float64)
            n = int(file['n']) if 'n' in file else 0
        assert mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and np.isfinite(sigma).all(), 'wrong shapes or values'
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such file of statistics')
    except Exception as error:              # whatever a file that is not one of these makes numpy say
        raise UserError(f'{path} does not hold statistics (.npz with mu and sigma): {error}')
    return mu, sigma, n


def save_statistics(path, mu, sigma, n):
    """Writes what `load_statistics` reads."""
    common.write_atomic(path, lambda file: np.savez(file, mu=mu, sigma=sigma, n=n))


# 3. Measuring

def pixel_features(images):
    """Features that need no weights: the pixels, averaged to 16x16 or less. (B, C, H, W) 0..255 -> (B, D)"""
    size = min(16, images.shape[-1])
    return F.adaptive_avg_pool2d(images.float() / 127.5 - 1, size).flatten(1)


def measure(count, images, features, what, lot=100):
    """Statistics of `count` images; processes share the lots. images(j, n): lot j, n pictures uint8 (n, C, H, W)."""
    statistics = Statistics()
    lots = [(j, min(lot, count - at)) for j, at in enumerate(range(0, count, lot))]
    mine = lots[common.rank()::common.world_size()]
    for j, n in common.progress(mine or lots[:1], f'features of {what}, {lot} images at a time'):
        x = images(j, n).expand(-1, 3, -1, -1)                      # grey pictures become three equal channels
        statistics.update(features(x)[:n if mine else 0])           # a process without a lot still knows their size
    statistics.reduce()
    return statistics.result()


def measure_pictures(images, features, what):
    """Statistics of a whole set of pictures, uint8 (N, C, H, W)."""
    return measure(len(images), lambda j, n: images[100 * j:100 * j + n], features, what)


def feature_network(kind, path, data_dir, device):
    """-> function from uint8 images to features, and how its distance is called if all else is as in the literature."""
    if kind == 'pixels':
        return lambda x: pixel_features(x.to(device)), 'pixel-FD'
    net, name = load_inception(path, data_dir, device)

    @torch.inference_mode()
    def features(x):
        with common.true_float32():
            return net(x.to(device).contiguous(memory_format=torch.channels_last))
    return features, name


def distance_name(kind, n, against, whole):
    """'FID-50k' for what the literature calls so; for anything else a name that says what differs."""
    if kind == 'FID' and n == 50_000 and whole:
        return 'FID-50k'
    return f'{kind} ({n:,} images against {against})'


def dataset_statistics(images, features, kind, home):
    """Statistics of a data set, kept in folder `home` under a name that is a hash of the pictures and the features."""
    digest = hashlib.sha256(f'{kind} {tuple(images.shape)}'.encode())
    digest.update(images.cpu().numpy())
    cache = home and home / f'fid-{digest.hexdigest()[:16]}.npz'
    found = [load_statistics(cache) if cache and common.rank() == 0 and cache.exists() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found)           # one process decides for all whether there is anything to measure
    result = found[0] or measure_pictures(images, features, 'the data')
    if cache and common.rank() == 0 and not found[0]:
        try:
            save_statistics(cache, *result)
        except OSError as error:
            common.say(f'the reference statistics are not kept: {error}')
    return result


class Judge(NamedTuple):
    """What samples are judged by."""
    features: Callable          # uint8 images -> features (B, D)
    kind: str                   # their distance's name
    reference: tuple            # the statistics to compare with,
    against: str                # what they are of,
    whole: bool                 # and whether that is all of the training set


def prepare(args, device, data=None):
    """Judge of samples of a run, against its training set (`data`, if loaded) or --fid-ref; None if none is wanted."""
    if not args.evaluate and (not args.eval_every or args.benchmark):
        return None
    features, kind = feature_network(args.fid_features, args.inception, common.cache_folder(args), device)
    if args.fid_ref:
        return Judge(features, kind, load_statistics(args.fid_ref), args.fid_ref, False)
    data = data or common.load_data(args)
    reference = dataset_statistics(data.images, features, kind, data.home)
    against = f'the {reference[2]:,} training images' + f'; classes {args.labels} only' * bool(args.labels)
    return Judge(features, kind, reference, against, not args.labels)


def evaluate(judge, args, draw):
    """Distances of --fid-num pictures from the judge's, for each of --nfe, printed. -> {name: distance}

    draw(n, nfe, seed=, first=) makes n pictures in [-1, 1]. Each lot of 100 has a seed of its own, whichever process
    makes it, and its classes go on, from number `first`, where those of the lot before end.
    """
    found = {}
    for nfe in args.nfe:
        lot = lambda j, n: common.to_uint8(draw(n, nfe, seed=common.key(args.seed, j), first=100 * j))
        sampled = measure(args.fid_num, lot, judge.features, 'samples')
        name, value = distance_name(judge.kind, sampled[2], judge.against, judge.whole), distance(sampled, judge)
        common.say(f'{name}, {nfe} step{"s" * (nfe > 1)}: {value:.4f}')
        found[f'{name}, {nfe} step'] = value
    return found


def distance(result, judge):
    """frechet_distance of a `Statistics.result` from the judge's, refusing that of other features."""
    if len(result[0]) != len(judge.reference[0]):
        raise UserError(f'{judge.against} has {len(judge.reference[0])} features to a picture, not {len(result[0])}')
    return frechet_distance(*result[:2], *judge.reference[:2])


# 4. Command line

def read_pictures(path, resolution=None):
    """A folder, a zip, CIFAR-10's folder or archive (training set) or one of its .bin files -> uint8 (N, 3, H, W)."""
    path = Path(path)
    if not path.exists():
        raise UserError(f'{path}: there is no such file or folder')
    if path.suffix == '.bin':
        return common.cifar10_records(path.read_bytes(), path)[0]
    if path.name.endswith('.tar.gz') or any((path / n).exists() for n in ('data_batch_1.bin', 'cifar-10-batches-bin')):
        return common.cifar10(path).images
    return common.image_folder(path, resolution).images


def main(argv=None):
    """The command; --help tells its flags."""
    parser = common.Parser(prog='fid.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('images', metavar='IMAGES', help='pictures to judge')
    add('--against', required=True, metavar='IMAGES|STATS.npz', help='pictures, or statistics of them')
    add('--num', type=common.number(int, 2), metavar='N', help='only the first N of IMAGES')
    add('--against-num', type=common.number(int, 2), metavar='N', help='only the first N of --against')
    add('--save', metavar='STATS.npz', help='write the statistics of IMAGES there, for a later --against')
    add('--fid-features', choices=['inception', 'pixels'], default='inception')
    add('--inception', metavar='PATH', help='Inception weights; found in --data-dir or downloaded if not given')
    add('--data-dir', default='data', metavar='PATH', help='where the Inception weights lie or go')
    add('--resolution', type=common.number(int, 4, 1024), metavar='N', help='crop and resize pictures to this')
    add('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--debug', action='store_true', help='show tracebacks')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: this machine has no GPU that torch can use')
    common.keep_freed_memory()
    one = read_pictures(args.images, args.resolution)[:args.num]
    other = None if args.against.endswith('.npz') else read_pictures(args.against, args.resolution)[:args.against_num]
    features, kind = feature_network(args.fid_features, args.inception, args.data_dir, args.device)
    reference = load_statistics(args.against) if other is None else measure_pictures(other, features, args.against)
    result = measure_pictures(one, features, args.images)
    if args.save:
        try:
            save_statistics(Path(args.save), *result)
        except OSError as error:
            raise UserError(f'--save {args.save}: {error.strerror}')
    against = f'{reference[2]:,} of {args.against}' if reference[2] else args.against
    judge = Judge(features, kind, reference, against, False)
    print(f'{distance_name(kind, result[2], against, False)}: {distance(result, judge):.4f}')


if __name__ == '__main__':
    sys.exit(common.run(main))
