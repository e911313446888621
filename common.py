"""Plumbing that the scripts share, first what a training loop calls. Nothing in this file knows an algorithm."""
import argparse
import cmath
import colorsys
import concurrent.futures
import contextlib
import ctypes
import datetime
import functools
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode


# 1. Keyed randomness: what is drawn depends on (seed, step, stream) alone, so there is no generator state to save

def key(*parts):
    """A seed below 2^63 made of all `parts`: key(seed, step, 'noise')."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), 'little') >> 1


def generator(*parts, device='cpu'):
    """The random generator named by `parts`."""
    return torch.Generator(device).manual_seed(key(*parts))


def randn(shape, *parts, device='cpu'):
    """Standard normal numbers, keyed by `parts`."""
    return torch.randn(shape, generator=generator(*parts, device=device), device=device)


def rand(shape, *parts, device='cpu'):
    """Uniform numbers in [0, 1), keyed by `parts`."""
    return torch.rand(shape, generator=generator(*parts, device=device), device=device)


@functools.lru_cache(maxsize=2)
def _permutation(n, seed, epoch):
    return torch.randperm(n, generator=generator(seed, epoch, 'order'))


def batch_indices(n, batch, step, seed):
    """Which images make up the global batch of a step: (batch,) int64. Every epoch is a permutation of all n."""
    first, last = step * batch, (step + 1) * batch - 1
    epochs = [_permutation(n, seed, epoch) for epoch in range(first // n, last // n + 1)]
    return torch.cat(epochs)[first % n:first % n + batch]


def mirror(images, *parts):
    """Each of images (B, C, H, W) mirrored left to right with probability 1/2, keyed by `parts`."""
    flips = rand((len(images), 1, 1, 1), *parts, device=images.device) < 0.5
    return torch.where(flips, images.flip(3), images)


# 2. A training step

DTYPES = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
LOSS_SCALE = {'fp16': 32.0}         # keeps gradients within float16's range, large ones of late stages, too


def rank_slice(batch):
    """The part of a global batch that is this process's."""
    share = batch // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def network(net, precision, cached=True):
    """`net` as a function (x, noise_labels, y) -> float32, its layers in `precision`; y (B,): class numbers or None.

    cached: whether weights in 16 bits may be those of the step's other calls.
    """
    dtype, classes = DTYPES[precision], getattr(net, 'module', net).label_dim

    def call(x, noise_labels, y=None):
        y = torch.nn.functional.one_hot(y, classes).float() if classes and y is not None else None
        with torch.autocast(x.device.type, dtype, dtype != torch.float32, cached):
            return net(x.contiguous(memory_format=torch.channels_last), noise_labels, y).float()
    return call


def microbatches(net, args, step, clock):
    """Slices of a process's part of the batch, --microbatch at a time, each with a seed for its dropout masks.

    The loop over them runs under autocast as a whole, so that weights are cast once a step.
    """
    n, dtype, device = args.batch // world_size(), DTYPES[args.precision], next(net.parameters()).device.type
    size = args.microbatch or n
    clock('pairs')
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for i, at in enumerate(range(0, n, size)):
            if isinstance(net, torch.nn.parallel.DistributedDataParallel):
                net.require_backward_grad_sync = at + size >= n     # processes average their gradients in the last one
            yield slice(at, at + size), key(args.seed, step, 'dropout', rank(), i)


@contextlib.contextmanager
def true_float32():
    """Products inside are float32 whatever --precision says: TF32 would round small differences of distances away."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def make_optimizer(args, net, **own):
    """--optimizer over the parameters of net; `own`: the classes of those that torch lacks, by name."""
    kinds = dict(Adam=torch.optim.Adam, RAdam=torch.optim.RAdam) | own
    if len(args.betas) != 2:
        raise UserError('--betas: two numbers')
    params = list(net.parameters())
    few = 'fused' if params[0].is_cuda and args.optimizer == 'Adam' else 'foreach'      # a few kernels for all of them
    return kinds[args.optimizer](params, args.lr, tuple(args.betas), **{few: True})


def backward(values, n, precision, clock):
    """Back-propagates b of n samples' share in the mean loss: values (b,), or row 0 of (k, b). -> shares, () or (k,)"""
    clock('forward')
    with torch.autocast(values.device.type, enabled=False):         # a backward pass has the types of the forward one
        means = values.sum(-1) / n
        (means.view(-1)[0] * LOSS_SCALE.get(precision, 1.0)).backward()
    clock('backward')
    return means.detach()


@torch.no_grad()
def finish_gradients(params, precision):
    """Undoes the loss scale and zeroes what is not finite. -> the gradient's norm before that, 0-dim, on the device"""
    grads = [p.grad for p in params if p.grad is not None]
    if precision in LOSS_SCALE:
        torch._foreach_div_(grads, LOSS_SCALE[precision])
    norm = torch.stack(torch._foreach_norm(grads)).norm()
    for grad in grads:
        torch.nan_to_num_(grad, nan=0.0, posinf=0.0, neginf=0.0)
    return norm


def learning_rate(optimizer, step, lr, decay_steps=None):
    """Sets the rate for a step, counted from 0: lr, or lr / sqrt(max(step / decay_steps, 1)) (EDM2 Eq. 67)."""
    for group in optimizer.param_groups:
        group['lr'] = lr / math.sqrt(max(step / decay_steps, 1)) if decay_steps else lr


def power_function_decay(step, width):
    """Decay after a step, counted from 0, of an average of a constant relative width (EDM2 App. C)."""
    gamma = np.roots([1, 7, 16 - width ** -2, 12 - width ** -2]).real.max()
    return (1 - 1 / (step + 1)) ** (gamma + 1)


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema = decay * ema + (1 - decay) * net, over all parameters in a few calls."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


# 3. Data

class Data(NamedTuple):
    """A data set: images uint8 (N, C, H, W), labels int64 (N,), number of classes, folder where its cache may lie."""
    images: torch.Tensor
    labels: torch.Tensor
    classes: int
    home: Path

    def at(self, index, device):
        """Images in [-1, 1] (B, C, H, W) and labels (B,) of `index` (B,), on `device`."""
        images = self.images[index.to(self.images.device, non_blocking=True)].to(device, non_blocking=True)
        return normalise(images), self.labels[index].to(device, non_blocking=True)


def normalise(images):
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float in [-1, 1] -> uint8 0..255, the nearest; what lies outside is clipped."""
    return (x * 127.5 + 128).clip(0, 255).to(torch.uint8)


def load_data(args, device):
    """The data set of --dataset; sets args.resolution, in_channels, label_dim to its own. Labels 0 without --cond."""
    root = Path(args.data_dir)
    with one_first():
        known = dict(shapes=lambda: shapes(resolution=args.resolution), cifar10=lambda: cifar10(root),
                     fmnist=lambda: fmnist(root))
        data = known.get(args.dataset, lambda: image_folder(root, args.resolution))()
    if args.resolution and args.resolution < data.images.shape[3]:      # shapes and folders are of that size already
        data = data._replace(images=shrink(data.images, args.resolution))
    n, channels, size, _ = data.images.shape
    if args.resolution not in (None, size):
        raise UserError(f'--resolution {args.resolution}: {args.dataset} is {size}x{size}')
    if args.cond and data.labels is None:
        raise UserError(f'--cond: {root} has no labels (class sub-folders or a dataset.json)')
    if not args.cond:
        data = data._replace(labels=torch.zeros(n, dtype=torch.int64), classes=0)
    args.resolution, args.in_channels, args.label_dim = size, channels, data.classes
    found = f'{n} images, {zlib.crc32(data.images[::-(-n // 100)].numpy().tobytes()):08x}'      # of a hundred of them
    if vars(args).setdefault('fingerprint', found) != found:
        raise UserError(f'{root} is not what the run was trained on; to compare samples with other images: --fid-ref')
    choose_labels(1, args.labels, args.label_dim)                   # refuses those that the data have not
    if device.type == 'cuda' and data.images.numel() < torch.cuda.mem_get_info(device)[0] // 4:     # the free memory
        data = data._replace(images=data.images.to(device))
    return data


def shrink(images, size):
    """uint8 images (N, C, H, W), each pixel of (N, C, size, size) the average of those that it covers (box filter)."""
    planes = (Image.fromarray(plane.astype(np.float32)) for plane in images.flatten(0, 1).numpy())     # 8 bits: rounded
    shrunk = np.array([plane.resize((size, size), Image.Resampling.BOX) for plane in planes])           # in between
    return torch.from_numpy(shrunk.round().astype(np.uint8)).view(*images.shape[:2], size, size)


def cache_folder(args):
    """Where downloads go: --data-dir, or the folder of it if it is a zip."""
    return Path(args.data_dir).parent if Path(args.data_dir).is_file() else Path(args.data_dir)


_ARC = [2 * math.pi * i / 60 for i in range(60)]
_CIRCLE = [cmath.rect(1, a) for a in _ARC]
_SQUARE = [-0.9 - 0.9j, 0.9 - 0.9j, 0.9 + 0.9j, -0.9 + 0.9j]
_PLUS = [p * 1j ** turn for turn in range(4) for p in (-0.28 - 1j, 0.28 - 1j, 0.28 - 0.28j)]
SHAPES = {      # name: outline, points x + yj within [-1, 1]², y downwards
    'circle': _CIRCLE, 'ring': _CIRCLE, 'square': _SQUARE, 'frame': _SQUARE, 'triangle': [-1j, 1 + 0.8j, -1 + 0.8j],
    'diamond': [-1.1j, 0.75, 1.1j, -0.75], 'plus': _PLUS, 'cross': [p * cmath.rect(1, math.pi / 4) for p in _PLUS],
    'heart': [complex(math.sin(a) ** 3, (5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a)
                                         - 13 * math.cos(a)) / 16) for a in _ARC],
    'star': [cmath.rect(r, math.pi * i / 5) * -1j for i, r in enumerate([1.15, 0.48] * 5)]}


def draw_shape(i, resolution=16):
    """Picture i, uint8 (3, resolution, resolution), a function of i alone: shape i % 10, coloured, on a dark ground."""
    rng = random.Random(i)
    size = 8 * resolution                               # drawn 8 times too large, then averaged: smooth edges
    colour = lambda s, v: tuple(int(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), s, v))
    ground = colour(0.5, rng.uniform(0.0, 0.25))
    ink = colour(rng.uniform(0.5, 1.0), rng.uniform(0.8, 1.0))
    cx, cy, r = (size * rng.uniform(*span) for span in [(0.45, 0.55), (0.45, 0.55), (0.34, 0.42)])
    image = Image.new('RGB', (size, size), ground)
    name, outline = list(SHAPES.items())[i % len(SHAPES)]
    for scale, fill in [(r, ink), (0.55 * r, ground)] if name in ('ring', 'frame') else [(r, ink)]:
        ImageDraw.Draw(image).polygon([(cx + scale * p.real, cy + scale * p.imag) for p in outline], fill=fill)
    return np.asarray(image.resize((resolution, resolution), Image.Resampling.BOX)).transpose(2, 0, 1)


def shapes(n=10_000, resolution=16):
    """The built-in data set: n pictures of ten shapes, labelled."""
    images = np.array([draw_shape(i, resolution) for i in progress(range(n), 'drawing shapes')])
    return Data(torch.from_numpy(images), torch.arange(n) % len(SHAPES), len(SHAPES), None)


CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
CIFAR10_MD5 = 'c32a1d4ab5d03f1284b67883e8d87530'
FMNIST_URL = 'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com'
FMNIST_MD5 = {'train-images-idx3-ubyte.gz': '8d4fb7e6c68d591d4c3dfef9ec88bf0d',
              'train-labels-idx1-ubyte.gz': '25c81989df183df01b3e8a0aad5dffbe'}


def cifar10(root):
    """CIFAR-10's training set: its binary files, or the archive, in `root` or downloaded to there; or one .bin file."""
    names = [f'data_batch_{i}.bin' for i in range(1, 6)]
    archive = root if root.is_file() else root / 'cifar-10-binary.tar.gz'
    folder = root if (root / names[0]).exists() else archive.parent / 'cifar-10-batches-bin'
    with or_refuse(f'{root} does not hold CIFAR-10, or it is not whole'):
        if root.suffix == '.bin':
            parts = [root.read_bytes()]
        elif folder.exists():
            parts = [(folder / name).read_bytes() for name in names]
        else:
            download(CIFAR10_URL, archive, 'md5', CIFAR10_MD5)
            tar = tarfile.open(archive)                         # read in place: nothing is unpacked
            parts = [tar.extractfile(f'cifar-10-batches-bin/{name}').read() for name in names]
        records = np.concatenate([np.frombuffer(part, np.uint8).reshape(10_000, 3073) for part in parts])
    labels, images = torch.from_numpy(records).split([1, 3072], 1)                  # 1024 red, 1024 green, 1024 blue
    return Data(images.reshape(-1, 3, 32, 32).contiguous(), labels[:, 0].long(), 10, archive.parent)


def fmnist(root):
    """Fashion-MNIST's training set: its two files in root/fashion-mnist, or downloaded."""
    parts = []
    with or_refuse(f'Fashion-MNIST in {root / "fashion-mnist"} cannot be read'):
        for name, md5 in FMNIST_MD5.items():
            path = root / 'fashion-mnist' / name
            if not path.exists():                   # gzip has a checksum of its own, and packings differ in MD5
                download(f'{FMNIST_URL}/{name}', path, 'md5', md5)
            parts.append(torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8))
        images, labels = parts[0][16:], parts[1][8:].long()                                     # after the headers
        assert parts[0][:4].tolist() == [0, 0, 8, 3] and labels.max() <= 9, 'damaged'           # bytes, three axes
        return Data(images.view(len(labels), 1, 28, 28), labels, 10, root)


IMAGE_FILES = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.ppm', '.pgm', '.gif', '.tif', '.tiff')
MAPPED = 2 ** 30        # bytes of decoded images above which they are kept in a file and not in memory


def image_folder(root, resolution=None):
    """All images in a folder or zip, as RGB; with `resolution` cropped to the central square and resized.

    Labels: `dataset.json` (EDM's), or class sub-folders. More than MAPPED bytes go to a file beside the folder.
    """
    if root.is_dir():       # marks: what changes with a file, by name
        paths = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
        marks = {path.relative_to(root).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
                 for path in paths if path.is_file()}
        read = lambda name: (root / name).read_bytes()
    else:
        with or_refuse(f'{root} is no folder or zip of images'):
            archive = zipfile.ZipFile(root)                     # read in place: nothing is unpacked
        marks = {info.filename: (info.file_size, info.CRC) for info in archive.infolist()}
        read = archive.read
    files = sorted(n for n in marks if n.lower().endswith(IMAGE_FILES) and not Path(n).name.startswith('._'))
    if not files:
        raise UserError(f'{root} holds no images ({" ".join(IMAGE_FILES)})')

    with or_refuse(f'{root}: {files[0]} cannot be read'):
        side = resolution or Image.open(io.BytesIO(read(files[0]))).width

    def load(name):
        with or_refuse(f'{root}: {name} cannot be read'):
            image = Image.open(io.BytesIO(read(name)))
            if image.mode.startswith('I'):                                          # 16 bits a pixel
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
            image = ImageOps.exif_transpose(image).convert('RGB')
            w, h = image.size
            if resolution:
                s = min(w, h)
                image = image.crop(((w - s) // 2, (h - s) // 2, (w + s) // 2, (h + s) // 2))
                image = image.resize((side, side), Image.Resampling.LANCZOS)
            assert image.size == (side, side), f'{w}x{h}, not {side}x{side}; --resolution N brings all to one square'
            return np.asarray(image).transpose(2, 0, 1)

    # In threads, as decoding runs outside Python's lock.
    pool, parts = concurrent.futures.ThreadPoolExecutor(), [files[i:i + 4096] for i in range(0, len(files), 4096)]
    decoded = progress((image for part in parts for image in pool.map(load, part)), f'reading {root}', len(files))
    shape = (len(files), 3, side, side)
    if math.prod(shape) <= MAPPED:
        images = np.array(list(decoded))
    else:
        stamp = hashlib.sha256(repr([(name, marks[name]) for name in files]).encode()).hexdigest()[:12]
        path = root.parent / f'{root.name}-{side}-{stamp}.uint8'
        if not path.exists():
            write_atomic(path, lambda file: file.writelines(image.tobytes() for image in decoded))
        with or_refuse(f'{path} cannot be used (delete it and it is made anew)'):
            images = np.memmap(path, np.uint8, 'c', shape=shape)

    labels, folders = None, [name.split('/')[0] for name in files]
    if 'dataset.json' in marks:
        with or_refuse(f'{root}: dataset.json does not give every image a label'):
            table = dict(json.loads(read('dataset.json'))['labels'] or [])
            labels = torch.tensor([int(table[name]) for name in files]) if table else None
            assert labels is None or labels.min() >= 0, 'a label is negative'
    elif all('/' in name for name in files) and len(set(folders)) > 1:
        labels = torch.from_numpy(np.unique(folders, return_inverse=True)[1])
    return Data(torch.from_numpy(images), labels, 0 if labels is None else int(labels.max()) + 1, root.parent)


def download(url, path, algorithm, digest):
    """Fetches `url` to `path` unless it is there; either way its hash must begin with `digest` (hex; None: unknown)."""
    there = path.exists()
    if not there:
        print0(f'downloading {url}')
    with or_refuse(f'{path} cannot be read' if there else f'{path} could not be downloaded from {url}'):
        data = path.read_bytes() if there else urllib.request.urlopen(url, timeout=30).read()   # fails if cut short
    found = hashlib.new(algorithm, data).hexdigest()
    if not found.startswith(digest or ''):
        raise UserError(f'{path if there else url} has {algorithm} {found}, not {digest}')
    if not there:
        write_atomic(path, lambda file: file.write(data))


# 4. Timing and logging

class Clock:
    """Counts the steps of a run and, for --benchmark, times their parts: clock('backward') books what passed since."""

    def __init__(self, args, device):
        self.args, self.device, self.parts, self.last = args, device, {}, None

    def __call__(self, part):
        if self.last is not None:
            if self.device.type == 'cuda':
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.parts[part] = self.parts.get(part, 0.0) + now - self.last
            self.last = now

    def steps(self, start):
        """The numbers of the steps to do. Of those of --benchmark the first counts operations, others warm up."""
        n, batch, precision = self.args.benchmark, self.args.batch, self.args.precision
        cuda, begin = self.device.type == 'cuda', time.perf_counter()
        if not n:
            for step in range(start, self.args.steps):
                yield step
                if self.args.compile and step == start:
                    print0(f'the first step, and compiling for it: {time.perf_counter() - begin:.0f} s')
            return
        with torch.compiler.set_stance('force_eager'), FlopCounterMode(display=False) as counter:
            yield start                                         # eager: the counter does not see into compiled code
        begun = start + (6 if self.args.compile else 2)         # GC's batches of endpoints are compiled by size
        yield from range(start + 1, begun)
        print0(f'the first {begun - start} steps: {time.perf_counter() - begin:.1f} s')
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        for step in range(begun, begun + n):
            self.last = time.perf_counter()
            yield step
            self('update')
        seconds = sum(self.parts.values()) / n
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        print0(f'{batch / seconds:,.1f} img/s, {seconds:.3f} s a step, peak memory {memory / 2 ** 30:.2f} GiB')
        for part, spent in self.parts.items():
            print0(f'  {part:<16} {spent / n:9.4f} s  {spent / n / seconds:6.1%}')
        size = 8192 if cuda else 2048
        a = torch.randn(size, size, device=self.device, dtype=DTYPES[precision])
        torch.set_float32_matmul_precision('high' if precision == 'tf32' else 'highest')
        for part in 'warm-up', 'product':
            for _ in range(10):
                a @ a
            self(part)
        rate, best = counter.get_total_flops() / seconds / 1e12, 2e-11 * size ** 3 / self.parts['product']
        print0(f'{rate:.4g} TFLOP/s a process, {rate / best:.1%} of the {best:.4g} of a matrix product in {precision}')


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts, but for what is damaged or cut short."""
    for line in Path(path).read_text(errors='replace').splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


class Log:
    """metrics.jsonl with a line for every step, and lines of progress; notices Ctrl-C and SIGTERM."""

    def __init__(self, args, start, device):
        self.args, self.start, self.device = args, start, device
        self.path = Path(args.out) / 'metrics.jsonl'
        self.block = 1 if device.type == 'cpu' else 10          # steps read from the device at once: no step waits
        self.pending, self.nonfinite = [], 0                    # steps in a row without finite gradients
        self.signal, self.stop = 0.0, False                     # when one came
        self.begin, self.shown = time.monotonic(), 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if rank() == 0 and args.resume and not args.benchmark and self.path.exists():
            kept = [json.dumps(line) + '\n' for line in read_metrics(self.path) if line['step'] <= start]
            write_atomic(self.path, lambda file: file.write(''.join(kept).encode()))            # the rest is done again

    def _on_signal(self, *_):
        now = time.monotonic()
        if self.signal and now - self.signal > 0.5:             # sooner: the same one, by way of the first process
            raise KeyboardInterrupt
        self.signal = self.signal or now

    def due(self, step, every):
        """Whether step number `step` is one of every so many, or the last; the last alone if the run is to stop."""
        at_end = every and (step % every == 0 or step == self.args.steps)
        return at_end and not self.args.benchmark and (not self.stop or step == self.args.steps)

    def step(self, step, **values):
        """Notes the values (0-dim tensors) of step number `step`, which is done. Now and then this writes them out."""
        values['stop'] = torch.full((), float(self.signal > 0), device=self.device)
        self.pending.append(torch.stack([value.detach().float() for value in values.values()]))
        intervals = self.args.save_every, self.args.sample_every, self.args.eval_every
        if len(self.pending) < self.block and not any(self.due(step, every) for every in intervals):
            return
        rows = torch.stack(self.pending)                        # (steps, values)
        self.pending = []
        if dist.is_initialized():
            dist.all_reduce(rows)
            rows /= world_size()
        for number, row in enumerate(rows.tolist(), step - len(rows) + 1):
            noted = dict(zip(values, row))
            self.stop = noted.pop('stop') > 0 or self.stop
            finite = all(map(math.isfinite, noted.values()))
            self.nonfinite = 0 if finite else self.nonfinite + 1
            text = '  '.join(f'{name} {value:.4g}' for name, value in noted.items())
            self.write({'step': number} | {k: round(v, 6) if math.isfinite(v) else str(v) for k, v in noted.items()})
            if self.nonfinite == 20:
                raise UserError(f'gradients were not finite for 20 steps in a row, up to step {number}. The last '
                                'checkpoint is from before; try a lower --lr or --precision fp32')
        now = time.monotonic()
        if now - self.shown > 10 or step == self.args.steps or self.stop:
            pace = (now - self.begin) / (step - self.start)                             # seconds a step
            left = datetime.timedelta(seconds=int((self.args.steps - step) * pace))
            print0(f'step {step:,}/{self.args.steps:,}  {text}  {self.args.batch / pace:,.0f} img/s  {left} left')
            self.shown = now
        if self.stop and not self.args.benchmark:
            print0(f'stopped after step {step:,}; go on: python {self.args.script}.py --resume --out {self.args.out}')

    def write(self, line):
        """Appends a dict to metrics.jsonl."""
        if rank() == 0 and not self.args.benchmark:
            with or_refuse(f'{self.path} cannot be written'), open(self.path, 'a') as file:
                file.write(json.dumps(line) + '\n')


def after_step(args, step, log, evaluate, sample_fn, **parts):
    """What is due after a step: distances (of evaluate()), pictures, a checkpoint of `parts`. -> whether to stop"""
    if log.due(step, args.eval_every):
        log.write({'step': step, **evaluate()})
    if log.due(step, args.sample_every) and rank() == 0:
        images = sample_fn(64, args.nfe[0], seed=args.seed)     # always of the same noise: one sees them form
        save_grid(images, Path(args.out) / 'samples' / f'{step:07}.png')
        save_curves(log.path, Path(args.out) / 'curves.png')
    if (log.due(step, args.save_every) or log.stop) and rank() == 0 and not args.benchmark:
        state = {name: part.state_dict() for name, part in parts.items()} | dict(step=step, config=config_of(args))
        path = Path(args.out) / 'checkpoint.pt'
        write_atomic(path, lambda file: torch.save(state, file), previous=path.with_name('previous.pt'))
    return log.stop


# 5. Runs: the folder, checkpoints

CHECKPOINTS = 'checkpoint.pt', 'previous.pt', 'final.pt'        # where a run's weights are, the latest first


def open_run(args, **parts):
    """Makes the run's folder with config.json; with --resume, brings back the state of `parts`. -> steps done"""
    out, step = Path(args.out), 0
    if args.resume:
        state = load_checkpoint(out)
        with or_refuse(f'{out} cannot be resumed'):             # holds weights alone, or those of another network
            for name, part in parts.items():
                part.load_state_dict(state[name])
            step = state['step']
    if args.benchmark:
        return args.pretrain_steps % args.steps                 # tuning, not its start, is timed
    if rank() == 0:
        replaces = (out / 'config.json').exists() and not args.resume              # else nothing there is ours
        old = ['*.pt', 'samples/*.png', 'metrics.jsonl'] if replaces else []
        for path in [path for pattern in ['*.part', *old] for path in out.glob(pattern)]:
            path.unlink()
        write_atomic(out / 'config.json', lambda file: file.write(json.dumps(config_of(args), indent=2).encode()))
    return step


def write_atomic(path, write, previous=None):
    """`write(file)` fills a file that then takes the name `path`, whole; the one there before becomes `previous`."""
    part = path.with_name(f'{path.name}.{os.uname().nodename}.{os.getpid()}.part')      # others may make the same file
    with or_refuse(f'{path} could not be written'):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, 'wb') as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.exists():
                os.replace(path, previous)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def save_final(args, model, name='final'):
    """State of the EMA network alone, a plain dict, as NAME.pt in the run's folder."""
    if rank() == 0 and not args.benchmark:
        path = Path(args.out) / f'{name}.pt'
        write_atomic(path, lambda file: torch.save(model.state_dict(), file))
        print0(f'written: {path}')


def load_checkpoint(path):
    """checkpoint.pt, final.pt beside config.json, or a folder: its first of CHECKPOINTS that is whole. -> dict"""
    path = Path(path)
    found = [path / name for name in CHECKPOINTS if (path / name).exists()] or [path]
    for candidate in found:
        try:
            with or_refuse(f'{candidate} cannot be read as a checkpoint'):
                with zipfile.ZipFile(candidate) as archive:             # torch.load does not look at the checksums
                    assert archive.testzip() is None, 'it is damaged'
                state = torch.load(candidate, map_location='cpu', weights_only=True)        # no file can run code
                if 'config' not in state:
                    state = dict(ema=state, config=json.loads((candidate.parent / 'config.json').read_text()))
                assert isinstance(state['config'], dict) and state['ema'], 'there are no weights in it'
                return state
        except UserError as error:
            if candidate == found[-1]:
                raise
            print0(error)


def load_network(make_network, path, device='cpu'):
    """The EMA network of a run (its folder, checkpoint.pt or final.pt), for sampling; its settings are in `.config`."""
    state = load_checkpoint(path)
    model = make_network(argparse.Namespace(**state['config']))
    with or_refuse(f'{path} does not fit this network'):
        model.load_state_dict(state['ema'])
    model.config = state['config']
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)


# 6. Samples and pictures

def choose_labels(n, labels, classes, first=0):
    """`labels` (a list; None: all) in turn from number `first` on, (n,) int64; zeros for a model without classes."""
    if labels and max(labels) >= classes:
        raise UserError(f'--labels {max(labels)}: the model has {classes} classes, counted from 0')
    labels = labels or range(max(classes, 1))
    return torch.tensor([labels[i % len(labels)] for i in range(first, first + n)])


def sampling_noise(model, n, nfe, labels, seed, first):
    """For each up to 250 of n images to sample: noise, nfe times N(0, I) (b, C, H, W), and their labels (b,)."""
    config, device = model.config, next(model.parameters()).device
    shape = (n, config['in_channels'], config['resolution'], config['resolution'])
    noise = [randn(shape, seed, i, 'sample') for i in range(nfe)]
    y = choose_labels(n, labels, config['label_dim'], first)
    for part in progress(torch.arange(n).split(250), 'samples, 250 at a time'):
        yield [z[part].to(device) for z in noise], y[part].to(device)


def save_grid(images, path, columns=None):
    """Images (N, C, H, W) in [-1, 1] -> one PNG, each magnified to about 64 pixels, row by row."""
    images = to_uint8(images.detach().float().cpu()).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    n, height, width, _ = images.shape
    columns, zoom = columns or math.ceil(math.sqrt(n)), max(1, 64 // width)
    across, down = width * zoom + 2, height * zoom + 2              # with a gap
    sheet = Image.new('RGB', (columns * across + 2, math.ceil(n / columns) * down + 2), 'white')
    for i, image in enumerate(images):
        tile = ImageOps.scale(Image.fromarray(image), zoom, Image.Resampling.NEAREST)
        sheet.paste(tile, (2 + i % columns * across, 2 + i // columns * down))
    write_atomic(Path(path), lambda file: sheet.save(file, 'PNG'))


def use_run(args, device, load, sample, analyse):
    """--sample (a grid; of several --nfe, a row of 16 each), --evaluate or --analyse, by a script's functions."""
    import fid                                                  # which imports this file
    model = load(args.use, device)
    model.config['precision'] = args.precision
    compile_in_place(args, model)
    sample_fn = functools.partial(sample, model, labels=args.labels)
    if args.analyse:
        analyse(args, model, device)
    elif args.evaluate:
        fid.evaluate(fid.prepare(args, device), args, sample_fn)
    elif rank() == 0:
        n, columns = (args.n, None) if len(args.nfe) == 1 else (min(args.n, 16), min(args.n, 16))
        path = Path(args.out) / f'sample-{"-".join(map(str, args.nfe))}-steps.png'
        save_grid(torch.cat([sample_fn(n, nfe, seed=args.seed) for nfe in args.nfe]), path, columns)
        print0(f'written: {path}')


def show_panels(args, panels, x_name):
    """--analyse: prints {title: {name of a curve: [(x, y), ...]}} as tables and draws them, in `analyse.png`."""
    for title, curves in panels.items():
        print0(f'{title}\n{x_name:>8} ' + ''.join(f'{name:>13}' for name in curves))
        for points in zip(*curves.values()):
            print0(f'{points[0][0]:8.4g} ' + ''.join(f'{y:13.4g}' for _, y in points))
    save_plot(panels, Path(args.out) / 'analyse.png', x_name)


def save_curves(metrics, path):
    """The columns of a metrics.jsonl against the step, one panel each, as a PNG."""
    panels = {}
    for line in read_metrics(metrics):
        for name, value in line.items():
            if name != 'step' and isinstance(value, (int, float)):
                panels.setdefault(name, {'': []})[''].append((line['step'], value))
    save_plot(panels, path, 'step')


def save_plot(panels, path, x_name):
    """Panels {title: {name of a curve: [(x, y), ...]}} as a PNG, one below the other; of (x, y, d) also y - d to y + d.

    A curve has at most 200 points, means of what there is; y has a log scale where it spans a factor of 8.
    """
    sheet, font = Image.new('RGB', (720, 240 * max(1, len(panels))), 'white'), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    inks = ['#1f5fbf', '#d1541a', '#2a8c3c', '#8a3fa8', '#888888']
    for row, (title, curves) in enumerate(panels.items()):
        parts = {name: np.array_split(points, min(len(points), 200)) for name, points in curves.items()}
        curves = {name: np.array([[*part.mean(0), 0.0][:3] for part in parts[name]]) for name in curves}    # x, y, d
        ends = np.concatenate([c[:, :2] + c[:, 2:] * (0, sign) for c in curves.values() for sign in (-1, 1)])
        low, high = ends.min(0), ends.max(0)
        logs = x_name == 'sigma', bool(low[1] > 0 and high[1] > 8 * low[1])
        scale = lambda v: np.where(logs, np.log(np.maximum(v, 1e-30)), v)
        share = lambda v: (scale(v) - scale(low)) / np.maximum(scale(high) - scale(low), 1e-30)
        left, right, top, bottom = 74, 700, 240 * row + 28, 240 * row + 196
        pixels = lambda v: [tuple(point) for point in share(v) * (right - left, top - bottom) + (left, bottom)]
        draw.rectangle([left, top, right, bottom], outline='#bbbbbb')
        draw.text((left, top - 8), title + ' (log scale)' * logs[1], 'black', font, anchor='ls')
        draw.text((387, bottom + 8), x_name, 'black', font, anchor='ma')
        for x, y, anchor, (x_value, y_value) in ((left, bottom, 'la', low), (right, top, 'ra', high)):
            draw.text((x, bottom + 8), f'{x_value:,.5g}', 'black', font, anchor=anchor)
            draw.text((left - 6, y), f'{y_value:.4g}', 'black', font, anchor='rm')
        for i, (name, curve) in enumerate(curves.items()):
            for x, y, d in curve:
                draw.line(pixels([(x, y - d), (x, y + d)]), inks[i], 1)
            draw.line(pixels(curve[:, :2]), inks[i], 2)
            x, y = pixels(curve[-1:, :2])[0]
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], inks[i])                     # shows a single point, too
            draw.text((right - 94 * (len(curves) - i), top - 8), name, inks[i], font, anchor='ls')
    write_atomic(path, lambda file: sheet.save(file, 'PNG'))


# 7. Processes

def rank():
    """Number of this process among those that train together, from 0."""
    return int(os.environ.get('RANK', 0))


def world_size():
    """How many processes train together."""
    return int(os.environ.get('WORLD_SIZE', 1))


def start(args):
    """Joins the processes of torchrun, Slurm's srun or --gpus, which starts them here. -> this process's device"""
    if args.dry_run:
        print0(json.dumps(config_of(args), indent=2))
        sys.exit()
    env = os.environ
    if 'RANK' not in env and int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
        env.update(RANK=env['SLURM_PROCID'], LOCAL_RANK=env['SLURM_LOCALID'], WORLD_SIZE=env['SLURM_STEP_NUM_TASKS'])
        first = re.match(r'[^,[]+(\[\d+)?', env.get('SLURM_STEP_NODELIST', '127.0.0.1'))[0]        # of n[1-4],m2: n[1
        env.setdefault('MASTER_ADDR', first.replace('[', ''))
        job, part = (int(env.get(f'SLURM_{name}_ID', 0)) for name in ('JOB', 'STEP'))
        env.setdefault('MASTER_PORT', str(20_000 + (job + 997 * part) % 20_000))        # jobs share machines
    gpus = torch.cuda.device_count() if args.device != 'cpu' else 0
    launches = world_size() == 1 and args.gpus > 1
    processes = args.gpus if launches else world_size()
    if gpus < (args.gpus if launches and args.device != 'cpu' else args.device == 'cuda'):
        raise UserError(f'--gpus {args.gpus}: this machine has {gpus or "no"} GPU for torch; --device cpu needs none')
    if args.batch % processes and not args.use:
        raise UserError(f'--batch {args.batch} cannot be shared equally by {processes} processes')
    fresh = rank() == 0 and not (args.benchmark or args.resume or args.overwrite or args.use)
    if fresh and Path(args.out, 'config.json').exists():
        raise UserError(f'{args.out} holds a run: --resume goes on, --overwrite starts over, --out goes elsewhere')
    if launches:
        sys.exit(_start_copies(args))

    if env.get('WATCH_STDIN'):      # the pipe to the process that started this one closes when that one dies
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    torch.set_float32_matmul_precision('highest')           # TF32 is for convolutions: the time embedding stays exact
    torch.backends.cudnn.allow_tf32 = args.precision == 'tf32'
    torch.backends.cudnn.benchmark = True       # shapes hardly change: worth trying all convolution algorithms once
    device = torch.device('cpu')
    if gpus:        # under Slurm with one visible GPU a task, that one is number 0 whatever the local rank
        device = torch.device('cuda', int(env.get('LOCAL_RANK', 0)) % gpus)
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():          # the others wait while the first downloads or decodes
        dist.init_process_group('nccl' if gpus else 'gloo', init_method=env.get('INIT_METHOD', 'env://'),
                                rank=rank(), world_size=world_size(), timeout=datetime.timedelta(hours=12),
                                device_id=device if gpus else None)
    return device


def _start_copies(args):
    """N processes of this command; the first that fails, or a signal to this process, ends them all. -> exit code"""
    command = [sys.executable, str(Path(__file__).with_name(f'{args.script}.py')), *args.argv]
    with tempfile.TemporaryDirectory() as folder:
        env = dict(os.environ, WORLD_SIZE=str(args.gpus), INIT_METHOD=f'file://{folder}/rendezvous', WATCH_STDIN='1')
        for name in 'OMP_NUM_THREADS', 'TORCHINDUCTOR_COMPILE_THREADS':
            env.setdefault(name, str(max(1, torch.get_num_threads() // args.gpus)))
        copies = [subprocess.Popen(command, env=dict(env, RANK=str(i), LOCAL_RANK=str(i)), stdin=subprocess.PIPE,
                                   start_new_session=True) for i in range(args.gpus)]   # Ctrl-C reaches them from here
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: [copy.send_signal(number) for copy in copies])
        codes = [None]
        while None in codes and not any(codes):
            time.sleep(0.05)
            codes = [copy.poll() for copy in copies]
        for copy in copies:
            copy.kill()
            copy.wait()
    code = min(filter(None, codes), default=0)              # one that was killed is the cause, not those that miss it
    if code < 0:
        cause = signal.Signals(-code).name
        print(f'process {codes.index(code)} of {args.gpus} was ended by {cause}; the others with it', file=sys.stderr)
    return code if code >= 0 else 128 - code


def compile_in_place(args, *networks):
    """With --compile: torch.compile, of which the networks' users see nothing but the time of the first calls."""
    if args.compile:
        from torch._functorch import config         # imported here, as that takes seconds
        torch._dynamo.config.optimize_ddp = False   # student and teacher as one graph each: the same dropout masks
        torch._dynamo.config.cache_size_limit = 64  # a graph for each batch size and mode; few sizes occur
        if hasattr(config, 'backward_pass_autocast'):
            config.backward_pass_autocast = 'off'   # as in `backward`; torch 2.6 cannot
        for net in networks:
            for module in net, *([net.encoder] if hasattr(net, 'encoder') else []):
                module.compile(dynamic=False if next(net.parameters()).is_cuda else None)   # for one size: faster


def distributed(net, args):
    """`net`, with several processes wrapped so that backward averages gradients over them."""
    if world_size() > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        net.broadcast_buffers = False               # they are constants
    return net


@contextlib.contextmanager
def one_first():
    """The first process of each machine does this before the others: it downloads, they find."""
    waits = int(os.environ.get('LOCAL_RANK', 0)) > 0
    if dist.is_initialized() and waits:
        dist.barrier()
    yield
    if dist.is_initialized() and not waits:
        dist.barrier()


# 8. Flags

def number(kind=int, low=-math.inf, high=math.inf, many=False):
    """A type for argparse: a finite number; or a list of such with commas; many='perhaps': one stays a number."""
    def flag(text):                     # argparse says: invalid flag value
        values = [kind(part) for part in text.split(',')] if many else [kind(text)]
        if not all(low <= value <= high and abs(value) != math.inf for value in values):
            raise argparse.ArgumentTypeError(f'{text} is not within {low} and {high}')
        return values if many is True or len(values) > 1 else values[0]
    return flag


DEFAULTS = dict(dataset='shapes', data_dir='data', precision='fp32', seed=0, gpus=1, device='auto', n=64)
# Settings that are no part of a run, as they say what this command is to do; those that may change in a resumed one.
NOT_KEPT = set('argv resume overwrite dry_run debug help sample evaluate analyse use benchmark n'.split())
FREE_FLAGS = NOT_KEPT | set('data_dir steps microbatch compile out gpus device save_every sample_every eval_every '
                            'fid_num fid_ref fid_features inception nfe labels'.split())


def parse_args(script, doc, presets, add_flags, argv, switch='arch', free=''):
    """Flags of a script -> Namespace. Defaults come from `presets[dataset]`, or from the run that is resumed or used.

    `presets[dataset, value]` are those for a value of the flag `switch`; free: flags that a resumption may change.
    """
    parser = argparse.ArgumentParser(
        f'{script}.py', f'python {script}.py [FLAGS]', doc, argument_default=argparse.SUPPRESS, add_help=False,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse_flags
    group = lambda title: parser.add_argument_group(title).add_argument
    count, many, boolean = number(int, 1, 10 ** 6), number(int, 1, 10 ** 9), argparse.BooleanOptionalAction
    names = [name for name in presets if isinstance(name, str)]
    add = group('data')
    add('--dataset', choices=names, metavar='NAME', help=f'{", ".join(names)}; sets the defaults of all other flags')
    add('--data-dir', metavar='PATH', help='where data sets lie or go; or a folder or zip of images')
    add('--resolution', type=number(int, 4, 1024), metavar='N', help='height and width; images are cropped, resized')
    add('--flip', action=boolean, help='mirror half of the training images, left to right')
    add = group('network')
    add('--arch', choices=['songunet', 'edm2'], help="DDPM++, or the network of EDM2")
    add('--width', type=number(int, 8, 8192), metavar='N', help='channels at multiplier 1')
    add('--mults', type=number(int, 1, 64, many=True), metavar='N,N', help='width of each resolution, finest first')
    add('--blocks', type=number(int, 1, 64, many='perhaps'), metavar='N', help='residual blocks; N,N: by resolution')
    add('--attn-resolutions', type=number(int, 0, 1024, many=True), metavar='N,N', help='with attention; 0: none')
    add('--dropout', type=number(float, 0, 0.99, many='perhaps'), metavar='P', help='same mask for student and teacher')
    add('--cond', action=boolean, help='condition on the class label')
    add = group('method')
    add_flags(add, number)
    add('--q', type=number(float, 1.001), metavar='X', help='tuning: what the gap is divided by from stage to stage')
    add('--stages', type=number(int, 1, 64), metavar='N', help='tuning: stages of the shrinking, over the run')
    if 's0' in presets['shapes']:
        add('--s0', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels at first')
        add('--s1', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels in the end')
    if 'ema_std' in presets['shapes']:
        add('--ema-std', type=number(float, 0.01, 0.25), metavar='X', help='power-function average of this width')
    add = group('optimisation')
    add('--batch', type=count, metavar='N', help='images per step, over all processes')
    add('--microbatch', type=count, metavar='N', help='images at a time in a process, to save memory')
    add('--steps', type=many, metavar='N', help='training steps, with those of --pretrain-steps')
    add('--init', metavar='CKPT', help="weights to start from: file or URL, ours, EDM's, EDM2's, ECT's; none: random")
    add('--pretrain-steps', type=number(int, 0, 10 ** 9), metavar='N', help='first train as a diffusion model so long')
    optimizers = sorted({preset['optimizer'] for preset in presets.values()})
    add('--optimizer', choices=optimizers, metavar='NAME', help=', '.join(optimizers))
    add('--betas', type=number(float, 0, 0.99999, many=True), metavar='X,X', help="decays of the optimiser's averages")
    add('--lr', type=number(float, 0, 1e30), metavar='X', help='learning rate')
    add('--lr-decay', type=many, metavar='N', help='falls with the inverse root of the step after N')
    add('--ema', type=number(float, 0, 1), metavar='X', help='decay of the moving average of the weights')
    add('--precision', choices=list(DTYPES), help='arithmetic of the network')
    add('--compile', action='store_true', help='torch.compile the network')
    add('--seed', type=number(int, 0, 2 ** 63 - 1), metavar='N', help='of everything random')
    add = group('run')
    add('--out', metavar='DIR', help=f'where the run goes; runs/{script}-<dataset> if not given')
    add('--resume', action='store_true', help='go on from the checkpoint in --out')
    add('--overwrite', action='store_true', help='start over in an --out that holds a run')
    add('--gpus', type=number(int, 1, 1024), metavar='N', help='processes on this machine, one GPU each')
    add('--device', choices=['auto', 'cpu', 'cuda'], help='auto: cuda where there is one')
    add('--save-every', type=many, metavar='N', help='steps between checkpoints')
    add('--sample-every', type=many, metavar='N', help='steps between sample grids')
    add('--eval-every', type=many, metavar='N', help='steps between Fréchet distances')
    add('--benchmark', type=count, metavar='N', help='time N steps, and the operations of one, and write nothing')
    add('--dry-run', action='store_true', help='print the settings and stop')
    add('--debug', action='store_true', help='show tracebacks')
    add('--help', '-h', action='store_true', help='show this and stop')
    use = parser.add_argument_group('sampling and evaluation')
    add = use.add_mutually_exclusive_group().add_argument
    add('--sample', metavar='CKPT', help='write a grid of samples of this checkpoint or run and stop')
    add('--evaluate', metavar='CKPT', help='print the Fréchet distance of this checkpoint or run and stop')
    add('--analyse', metavar='CKPT', help="print the paper's diagnostics of this checkpoint or run and stop")
    add = use.add_argument
    add('--n', type=count, metavar='N', help='images that --sample writes; of several --nfe at most 16')
    add('--nfe', type=number(int, 1, 1000, many=True), metavar='N,N', help='network evaluations; 1, or one a phase')
    add('--labels', type=number(int, 0, 10 ** 6, many=True), metavar='N,N', help='classes of the samples, in turn')
    add('--fid-num', type=number(int, 2, 10 ** 7), metavar='N', help='samples that a Fréchet distance is of')
    add('--fid-ref', metavar='STATS', help='statistics (.npz) to compare with instead of the training set')
    add('--fid-features', choices=['inception', 'pixels'], help='inception: FID; pixels need no weights: pixel-FD')
    add('--inception', metavar='PATH', help='Inception weights; found in --data-dir or downloaded if not given')

    given = vars(parser.parse_args(argv))                       # nothing but what was said
    free, saved = FREE_FLAGS | set(free.split()), {}
    use = next((given[name] for name in ('sample', 'evaluate', 'analyse') if name in given), None)
    beside = use and (use if Path(use).is_dir() else str(Path(use).parent))
    out = given.setdefault('out', beside or f'runs/{script}-{given.get("dataset", "shapes")}')
    if use is not None:
        free |= {'seed', 'precision'}                           # how it was trained is not how it is sampled
        saved = load_checkpoint(use)['config']
        for name in ('gpus', 'device', 'compile', 'microbatch', 'nfe', 'labels'):
            saved.pop(name, None)
    elif 'resume' in given:
        with or_refuse(f'{out} holds no run that can be read'):
            saved = json.loads(Path(out, 'config.json').read_text())
    if saved.get('script', script) != script:
        raise UserError(f'that is a run of {saved["script"]}.py, not of {script}.py')
    for name, value in given.items():
        if name in saved.keys() - free and value != saved[name]:
            raise UserError(f'--{name.replace("_", "-")} is {value}, but the run was made with {saved[name]}')

    known = DEFAULTS | saved | given
    preset = presets.get((known['dataset'], known.get(switch)), presets[known['dataset']])
    flags = {action.dest: False if action.nargs == 0 else None for action in parser._actions}
    args = argparse.Namespace(**flags | DEFAULTS | preset | saved | given, use=use)
    args.script, args.argv = script, list(argv)
    if 'ema' in given and not saved:                            # the flag that is given wins over the preset
        if 'ema_std' in given:
            raise UserError('--ema and --ema-std: one of them')
        args.ema_std = None
    if not saved and 'pretrain_steps' not in given:             # a shorter run has a shorter start, given weights none
        share = min(1, args.steps / preset['steps']) if args.init in (None, 'none') else 0
        args.pretrain_steps = round(args.pretrain_steps * share)
    if args.q and args.stages and (args.stages + 1) * math.log(args.q) > math.log(1e6):
        raise UserError(f'--q {args.q} --stages {args.stages}: two levels would end up equal in float32')
    if vars(args).get('s0') and args.s1 < args.s0:
        raise UserError(f'--s1 {args.s1} is less than --s0 {args.s0}')
    if args.pretrain_steps > args.steps:
        raise UserError(f'--pretrain-steps {args.pretrain_steps} is more than --steps {args.steps}')
    if args.init is None:                                       # the published start is for the published network
        shape = 'arch width mults blocks attn_resolutions cond resolution'.split()
        same = all(getattr(args, name) == preset.get(name) for name in shape)
        args.init = same and not args.pretrain_steps and preset.get('checkpoint') or 'none'
    if args.help:
        for action in parser._actions:
            value = getattr(args, action.dest)
            if value is not None and action.nargs != 0:
                action.help += f' [{str(value).strip("[]")}]'.replace('%', '%%')
        parser.print_help()
        sys.exit()
    if args.resume and not any((Path(args.out) / name).exists() for name in CHECKPOINTS):
        print0(f'{args.out} holds no checkpoint yet: starting from the beginning')
        args.resume, args.overwrite = False, True
    return args


def refuse_flags(message):
    """What argparse says of wrong flags, as one line."""
    message = re.sub(r'invalid \S+ value', 'invalid value', message)        # argparse names Python's function there
    raise UserError(f'{message} (--help lists the flags)')


def config_of(args):
    """The settings of a run as plain values, for config.json and checkpoints."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NOT_KEPT}


# 9. Errors and messages

class UserError(Exception):
    """An error that the user can fix: one line on stderr, and the exit code is 2."""


@contextlib.contextmanager
def or_refuse(what):
    """Whatever goes wrong within becomes a UserError, a line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:          # files, archives, decoders and connections have many words for what is damaged
        raise UserError(f'{what}: {type(error).__name__}: {" ".join(str(error).split())[:300]}')


def run(main, argv=None):
    """Calls `main(argv)` -> exit code. An error that the user can fix is one line on stderr; --debug: a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    code = 0
    with contextlib.suppress(OSError, AttributeError):          # not glibc
        libc = ctypes.CDLL(None)        # on a CPU, faulting freed memory in again takes a fifth of a step: keep it
        libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: take up to 1 GiB from the heap
        libc.mallopt(-1, 2 ** 31 - 1)                           # M_TRIM_THRESHOLD: never shrink the heap
    try:
        main(argv)
    except SystemExit as stop:                  # --help, --dry-run, and the end of processes that were started here
        return stop.code or 0
    except (UserError, KeyboardInterrupt, RuntimeError, OSError) as error:
        code, text = 2, str(error)
        if isinstance(error, KeyboardInterrupt):
            code, text = 130, 'interrupted'
        elif isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:      # of a GPU, of a CPU
            text = 'out of memory: lower --batch, or split it with --microbatch'
        elif isinstance(error, RuntimeError):
            if not dist.is_initialized() or not re.search('connection|gloo|nccl|peer', text, re.IGNORECASE):
                raise
            code, text = 1, f'another process of this run has ended: {text:.200}'
        if '--debug' in argv:
            raise
        time.sleep(2 * bool(rank()))    # what is wrong for all is said by the first, which ends the others meanwhile
        print(' '.join(text.split()), file=sys.stderr)
    if dist.is_initialized() and os.environ.get('WATCH_STDIN'):     # a copy: gloo's threads may abort an orderly exit
        sys.stdout.flush()
        os._exit(code)
    if dist.is_initialized() and code == 0:
        dist.destroy_process_group()            # else NCCL complains
    return code


def print0(text):
    """Prints a line, from the first process only."""
    if rank() == 0:
        print(text, flush=True)


def progress(items, what, total=None):
    """Yields from `items` and, every ten seconds, says how far it is."""
    total = total or len(items)
    begin = shown = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown > 10:
            left = datetime.timedelta(seconds=int((now - begin) / i * (total - i)))
            print0(f'{what}: {i:,} of {total:,}, {left} left')
            shown = now
