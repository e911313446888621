"""U-Nets of the consistency-model papers, written from the papers, with the published checkpoints' parameter names.

`SongUNet` is the DDPM++ / NCSN++ network of Song et al. 2021 (arXiv 2011.13456, App. H) in the form that Karras et al.
2022 (arXiv 2206.00364, App. C and F.5) train it. `EDM2UNet` is the magnitude-preserving network of Karras et al. 2024
(arXiv 2312.02696, config G). `load_pretrained` and `load_weights` bring published weights into either.

To copy into your own project: the networks (sections 1 and 2) need nothing but torch, the rest also common.py.

    net = SongUNet(img_resolution=32, in_channels=3, out_channels=3, channel_mult=[2, 2, 2])     # DDPM++, CIFAR-10
    F = net(x, t.log() / 4)                                                                      # (B, 3, 32, 32)

    state_dict, about = load_pretrained('edm-cifar10-32x32-uncond-vp.pkl')
    load_weights(net, state_dict, 'edm-cifar10-32x32-uncond-vp.pkl')
"""
import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import namedtuple
from functools import cached_property, partial
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn as nn
import torch.nn.functional as F


# 1. DDPM++ and NCSN++

class Linear(nn.Linear):
    """(B, in_features) -> (B, out_features), Xavier-uniform weights and zero bias."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        nn.init.xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):      # only the time embedding passes here: 16 bits cannot
            return super().forward(x.float())                   # tell levels t and r apart that are near each other


class Conv2d(nn.Module):
    """A convolution, after resampling by 2 with a small FIR filter if `up` or `down` is set.

    x (B, in_channels, H, W) -> (B, out_channels, H', W'), H' = 2H (up), H/2 (down) or H.
    """

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, resample_filter=(1, 1),
                 fused=False,       # down only: convolve first and filter after, in one padding (NCSN++ input pyramid)
                 init_scale=1.0):   # multiplies the initial weights; 1e-5 makes the layer start near zero
        super().__init__()
        self.up, self.down, self.fused = up, down, fused
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight, gain=init_scale)    # its fans count the kernel's taps
        if up or down:
            taps = torch.as_tensor(resample_filter, dtype=torch.float32)
            taps = taps.outer(taps)[None, None]                                               # (1, 1, len, len)
            self.register_buffer('resample_filter', taps / taps.sum())

    def resample(self, x, padding):
        """Depthwise FIR filter with stride 2, down or (transposed, gain 4 to make up for the inserted zeros) up."""
        taps = self.resample_filter.to(x.dtype).expand(x.shape[1], -1, -1, -1)
        convolve, taps = (F.conv_transpose2d, 4 * taps) if self.up else (F.conv2d, taps)
        return convolve(x, taps, stride=2, padding=padding, groups=x.shape[1])

    def forward(self, x):
        weight, bias, pad = self.weight.to(x.dtype), self.bias.to(x.dtype), self.weight.shape[-1] // 2
        if not (self.up or self.down):
            return F.conv2d(x, weight, bias, padding=pad)
        filter_pad = (self.resample_filter.shape[-1] - 1) // 2
        if self.fused:
            return self.resample(F.conv2d(x, weight, padding=pad + filter_pad), 0) + bias[:, None, None]
        return F.conv2d(self.resample(x, filter_pad), weight, bias, padding=pad)


def group_norm(channels):
    """GroupNorm with at most 32 groups and at least 4 channels in each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def drop(x, p, training):
    """F.dropout; on a CPU, whose generator is serial, from 16 random bits a number: saves a twentieth of a step."""
    if not training or not p or x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)[:x.numel()]
    kept = (bits >= round(p * 2 ** 16) - 2 ** 15).as_strided(x.size(), x.stride())          # in the layout of x
    return x * (kept / (1 - p)).to(x.dtype)


class UNetBlock(nn.Module):
    """Residual block with time embedding, optional resampling, and optional single-head self-attention.

    x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W').
    """

    def __init__(self, in_channels, out_channels, emb_channels, up=False, down=False, attention=False, dropout=0.0,
                 resample_filter=(1, 1)):
        super().__init__()
        self.dropout = dropout
        resampling = dict(up=up, down=down, resample_filter=resample_filter)
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resampling)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init_scale=1e-5)
        changes = in_channels != out_channels or up or down
        self.skip = Conv2d(in_channels, out_channels, 1, **resampling) if changes else None
        self.norm2 = group_norm(out_channels) if attention else None
        if attention:
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init_scale=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, init_scale=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = h + self.affine(emb)[:, :, None, None].to(h.dtype)
        h = drop(F.silu(self.norm1(h)), self.dropout, self.training)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is None:
            return x

        # The 3C output channels of `qkv` are q, k, v interleaved: channel 3i + j is component i of the j-th of them.
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).permute(2, 0, 3, 1)[:, :, None]  # each (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)                                        # softmax(q k / sqrt(C)) v
        h = h[:, 0].transpose(1, 2).reshape(B, C, H, W)
        return (x + self.proj(h)) * math.sqrt(0.5)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, channels) = [sin, cos] of t at channels / 2 frequencies.

    They are a Transformer's 10000^(-i / (channels/2 - 1)), or, if `fourier`, 2 pi times random numbers fixed at birth.
    """

    def __init__(self, channels, fourier):
        super().__init__()
        self.half = channels // 2
        self.register_buffer('freqs', 16 * torch.randn(self.half) if fourier else None)

    def forward(self, t):
        if self.freqs is None:
            i = torch.arange(self.half, dtype=torch.float32, device=t.device)
            freqs = (1 / 10000) ** (i / (self.half - 1))
        else:
            freqs = 2 * math.pi * self.freqs
        arg = t.float()[:, None] * freqs
        return torch.cat([arg.sin(), arg.cos()], dim=1)


def per_level(value, levels, name):
    """One number for all resolutions, or a list with one number for each, finest first."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * levels
    if len(values) != levels:
        raise ValueError(f'{name} has {len(values)} entries for {levels} resolutions')
    return values


def u_shape(img_resolution, widths, channels, num_blocks):
    """The blocks of a U-Net in order: (part `enc` or `dec`, level, name, kind, in_channels, out_channels).

    `channels` is what the first convolution gives; blocks of the decoder take the encoder's outputs in reverse order.
    """
    if img_resolution % 2 ** (len(widths) - 1):
        raise ValueError(f'img_resolution {img_resolution} cannot be halved {len(widths) - 1} times')
    skips, sizes = [channels], [f'{img_resolution >> level}x{img_resolution >> level}_' for level in range(len(widths))]
    for level, width in enumerate(widths):
        for kind in ['down'] * (level > 0) + [f'block{i}' for i in range(num_blocks[level])]:
            out = channels if kind == 'down' else width
            yield 'enc', level, sizes[level] + kind, kind, channels, out
            channels = out
            skips.append(channels)
    for level, width in reversed(list(enumerate(widths))):
        for kind in ['in0', 'in1'] if level == len(widths) - 1 else ['up']:
            yield 'dec', level, sizes[level] + kind, kind, channels, channels
        for i in range(num_blocks[level] + 1):
            yield 'dec', level, f'{sizes[level]}block{i}', f'block{i}', channels + skips.pop(), width
            channels = width


class SongUNet(nn.Module):
    """DDPM++ (`standard` encoder, `positional` embedding) or NCSN++ (`residual`, `fourier`) U-Net.

    forward(x, noise_labels, class_labels=None, augment_labels=None) -> (B, out_channels, H, W)
        x (B, in_channels, H, W), H = W = img_resolution; noise_labels (B,) = ln(t) / 4; class_labels (B, label_dim)
        one-hot, or None for no class; augment_labels (B, augment_dim) or None.
    """

    def __init__(self,
                 img_resolution,                # height and width of the images
                 in_channels, out_channels,     # colour channels in and out
                 label_dim=0,                   # number of classes, 0 = unconditional
                 augment_dim=0,                 # size of the augmentation label, 0 = none
                 model_channels=128,            # width at channel_mult 1
                 channel_mult=(1, 2, 2, 2),     # width of each resolution, finest first, in model_channels
                 num_blocks=4,                  # residual blocks per resolution: one number, or one each
                 attn_resolutions=(16,),        # resolutions with self-attention (the bottom of the U has one always)
                 dropout=0.1,                   # dropout within the blocks: one number, or one each resolution
                 embedding_type='positional',   # 'positional' (DDPM++) or 'fourier' (NCSN++)
                 channel_mult_noise=1,          # width of the time embedding: 1 (DDPM++) or 2 (NCSN++)
                 encoder_type='standard',       # 'standard' (DDPM++) or 'residual' (NCSN++: input pyramid)
                 decoder_type='standard',       # the only one that the papers' checkpoints use
                 resample_filter=(1, 1)):       # (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++
        super().__init__()
        for name, value, known in [('embedding_type', embedding_type, ('positional', 'fourier')),
                                   ('encoder_type', encoder_type, ('standard', 'residual')),
                                   ('decoder_type', decoder_type, ('standard',))]:
            if value not in known:
                raise ValueError(f'{name} is {value!r}, not one of {", ".join(known)}')
        levels = len(channel_mult)
        num_blocks, dropout = per_level(num_blocks, levels, 'num_blocks'), per_level(dropout, levels, 'dropout')
        widths = [model_channels * mult for mult in channel_mult]
        self.img_resolution, self.in_channels, self.label_dim = img_resolution, in_channels, label_dim

        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * 4
        self.map_noise = TimeEmbedding(noise_channels, fourier=embedding_type == 'fourier')
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f'{img_resolution}x{img_resolution}_conv'] = Conv2d(in_channels, model_channels, 3)
        aux_channels = in_channels
        for part, level, name, kind, cin, cout in u_shape(img_resolution, widths, model_channels, num_blocks):
            # The decoder has attention in the last block of a level only, and always at the bottom of the U.
            attention = (img_resolution >> level in attn_resolutions and 'block' in kind
                         and (part == 'enc' or kind == f'block{num_blocks[level]}'))
            getattr(self, part)[name] = UNetBlock(
                cin, cout, emb_channels, up=kind == 'up', down=kind == 'down', attention=attention or kind == 'in0',
                dropout=dropout[level], resample_filter=resample_filter)
            if kind == 'down' and encoder_type == 'residual':
                self.enc[name.replace('down', 'aux_residual')] = Conv2d(
                    aux_channels, cout, 3, down=True, resample_filter=resample_filter, fused=True)
                aux_channels = cout
        self.dec[f'{img_resolution}x{img_resolution}_aux_norm'] = group_norm(widths[0])
        self.dec[f'{img_resolution}x{img_resolution}_aux_conv'] = Conv2d(widths[0], out_channels, 3, init_scale=1e-5)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.map_noise(noise_labels)
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels.to(emb.dtype) * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

        skips, pyramid = [], x
        for name, layer in self.enc.items():
            if name.endswith('_aux_residual'):      # NCSN++: the input image, brought down level by level, joins in
                x = pyramid = skips[-1] = (x + layer(pyramid)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        *blocks, (_, norm), (_, conv) = self.dec.items()
        for name, layer in blocks:
            x = layer(torch.cat([x, skips.pop()], dim=1) if '_block' in name else x, emb)
        return conv(F.silu(norm(x)))


# 2. EDM2: every layer keeps the expected magnitude of what flows through it

EDM2_WIDTHS = {'S': 192, 'M': 256, 'L': 320, 'XL': 384}     # model_channels of the paper's sizes


def normalize(x, dim, eps=1e-4):
    """x over its root mean square along `dim` (one axis or several); the norm is float32 whatever x is."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    return x / (eps + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    """SiLU that keeps the magnitude of standard normal input (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """Weighted sum of two uncorrelated tensors that keeps their magnitude (Eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a, b):
    """(B, Ca, H, W), (B, Cb, H, W) -> (B, Ca + Cb, H, W), where both weigh the same however wide they are (Eq. 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / 2)
    return torch.cat([a * (scale / math.sqrt(a.shape[1])), b * (scale / math.sqrt(b.shape[1]))], dim=1)


class MPConv(nn.Module):
    """Convolution, or without `kernel` a linear layer, whose weights have unit magnitude for each output (Eq. 47).

    x (B, in_channels[, H, W]) -> (B, out_channels[, H, W]), times `gain`.
    """

    def __init__(self, in_channels, out_channels, kernel=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *[kernel, kernel][:2 * bool(kernel)]))

    def forward(self, x, gain=1.0):
        if self.weight.ndim == 2 and torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # as in `Linear`: the time embedding
                return self.forward(x.float(), gain)
        dims = tuple(range(1, self.weight.ndim))
        if self.training and torch.is_grad_enabled():       # Eq. 66: stored weights never grow; teachers leave them be
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, dims))
        weight = (normalize(self.weight.float(), dims) * (gain / math.sqrt(self.weight[0].numel()))).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPFourier(nn.Module):
    """Random Fourier features of unit magnitude (Eq. 75): t (B,) -> (B, channels)."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer('freqs', 2 * math.pi * torch.randn(channels))
        self.register_buffer('phases', 2 * math.pi * torch.rand(channels))

    def forward(self, t):
        return math.sqrt(2) * (t.float()[:, None] * self.freqs + self.phases).cos()


class MPBlock(nn.Module):
    """Residual block of EDM2 (Fig. 21): `encoder` blocks normalise each pixel first, decoder blocks do not.

    x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W').
    """

    def __init__(self, in_channels, out_channels, emb_channels, encoder, up=False, down=False, heads=0, dropout=0.0):
        super().__init__()
        self.encoder, self.up, self.down, self.heads, self.dropout = encoder, up, down, heads, dropout
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        if heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x, emb):
        x = F.avg_pool2d(x, 2) if self.down else F.interpolate(x, scale_factor=2) if self.up else x
        if self.encoder:
            x = normalize(self.conv_skip(x), dim=1)
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = self.conv_res0(mp_silu(x))
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv_res1(drop(h, self.dropout, self.training))
        x = mp_sum(x if self.encoder else self.conv_skip(x), h, 0.3)
        if self.heads:
            B, C, H, W = x.shape
            qkv = self.attn_qkv(x).reshape(B, self.heads, C // self.heads, 3, H * W)        # interleaved as in SongUNet
            q, k, v = normalize(qkv, dim=2).permute(3, 0, 1, 4, 2)                       # each (B, heads, HW, C/heads)
            h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W)
            x = mp_sum(x, self.attn_proj(h), 0.3)
        return x.clamp(-256, 256)                                                           # fp16 ends at 65504


class EDM2UNet(nn.Module):
    """The magnitude-preserving U-Net of EDM2 (App. B).

    forward(x, noise_labels, class_labels=None) -> (B, out_channels, H, W), with arguments as SongUNet's.
    """

    def __init__(self,
                 img_resolution,                # height and width of the images
                 in_channels, out_channels,     # colour channels in and out
                 label_dim=0,                   # number of classes, 0 = unconditional
                 model_channels=192,            # width at channel_mult 1: EDM2_WIDTHS
                 channel_mult=(1, 2, 3, 4),     # width of each resolution, finest first, in model_channels
                 num_blocks=3,                  # residual blocks per resolution: one number, or one each
                 attn_resolutions=(16, 8),      # resolutions with self-attention (the bottom of the U has one always)
                 channels_per_head=64,          # width of an attention head
                 dropout=0.0,                   # dropout within the blocks: one number, or one each resolution,
                 dropout_res=None):             # of this and coarser resolutions; None = of all
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        self.img_resolution, self.in_channels, self.label_dim = img_resolution, in_channels, label_dim

        self.emb_fourier = MPFourier(model_channels)
        self.emb_noise = MPConv(model_channels, max(widths))
        self.emb_label = MPConv(label_dim, max(widths)) if label_dim else None
        self.out_gain = nn.Parameter(torch.zeros([]))                   # so that training starts from F = 0

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f'{img_resolution}x{img_resolution}_conv'] = MPConv(in_channels + 1, model_channels, 3)
        num_blocks = per_level(num_blocks, len(widths), 'num_blocks')
        dropout = per_level(dropout, len(widths), 'dropout')
        for part, level, name, kind, cin, cout in u_shape(img_resolution, widths, model_channels, num_blocks):
            res = img_resolution >> level
            attention = kind == 'in0' or res in attn_resolutions and 'block' in kind
            if attention and cout % channels_per_head:
                raise ValueError(f'channels_per_head {channels_per_head} does not divide the {cout} channels of {name}')
            getattr(self, part)[name] = MPBlock(
                cin, cout, max(widths), part == 'enc', up=kind == 'up', down=kind == 'down',
                heads=cout // channels_per_head if attention else 0,
                dropout=dropout[level] if dropout_res is None or res <= dropout_res else 0.0)
        self.out_conv = MPConv(widths[0], out_channels, 3)

    def forward(self, x, noise_labels, class_labels=None):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            labels = emb.new_zeros(len(x), self.label_dim) if class_labels is None else class_labels.to(emb.dtype)
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(self.label_dim)), 0.5)
        emb = mp_silu(emb)

        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []                     # ones stand for a bias
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, MPBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(mp_cat(x, skips.pop()) if '_block' in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)


def make_network(args, **changes):
    """The network of random weights that the flags in `args` describe (--arch, --width, ...), but for `changes`."""
    import common           # here and not above, so that the networks can be copied without it
    config = dict(img_resolution=args.resolution, in_channels=args.in_channels, out_channels=args.in_channels,
                  label_dim=args.label_dim, model_channels=args.width, channel_mult=args.mults, num_blocks=args.blocks,
                  attn_resolutions=args.attn_resolutions, dropout=args.dropout)
    try:
        if args.arch == 'edm2':
            return EDM2UNet(**config | dict(dropout_res=args.dropout_res) | changes)
        return SongUNet(**config | changes)
    except ValueError as error:                                 # widths and resolutions that do not go together
        raise common.UserError(f'--arch {args.arch}: {error}')


def initial_network(args, tunes=False):
    """The network that training starts with: random weights of --seed, or those of --init; tunes: those are wanted."""
    import common
    torch.manual_seed(args.seed)
    net = make_network(args)
    if tunes and args.init == 'none' and not args.pretrain_steps and not args.resume:
        common.say('tuning starts from random weights; --init CKPT or --pretrain-steps N for a diffusion model')
    if args.init != 'none' and not args.resume:
        path = Path(args.init)
        if path.is_dir():                                       # a run's folder
            path = path / ('final.pt' if (path / 'final.pt').exists() else 'checkpoint.pt')
        with common.one_first():
            state = load_pretrained(str(path) if path.exists() else args.init, common.cache_folder(args))[0]
        load_weights(net, {name: value for name, value in state.items() if not name.startswith('encoder.')}, args.init)
    return net


# 3. Published checkpoints

def load_pretrained(path_or_url: str | Path, cache: str | Path = 'data') -> tuple[dict[str, torch.Tensor], dict]:
    """Weights of a published network. -> (state_dict: dict name -> float32 tensor, about: dict of plain values)

    Takes .pkl files of EDM, EDM2, ECT and Sony's codes, checkpoints of this project, and state dicts of torch.save.
    Runs nothing in them; gives the moving average (`ema`) where there is one. http(s):// and file:// addresses go
    through the folder `cache`, and may end in #sha256=<hex> to be checked. `about` is what the file says of itself: its
    `format`, arguments of the network, sigma_data. Raises common.UserError for what cannot be had, read or trusted.
    """
    import common
    path = Path(path_or_url)
    if str(path_or_url).startswith(('https://', 'http://', 'file://')):
        url, _, digest = str(path_or_url).partition('#sha256=')
        # The address is part of the name: many runs have a file network-snapshot-latest.pkl.
        path = Path(cache) / f'{zlib.crc32(url.encode()):08x}-{Path(urlsplit(url).path).name or "checkpoint"}'
        try:
            common.download(url, path, 'sha256', digest.lower() or None)
        except common.UserError as error:
            raise common.UserError(f'{error}; --init PATH takes a file that you have, '
                                   f'--pretrain-steps N trains the start first')
    try:
        return read_checkpoint(path.read_bytes())
    except OSError as error:
        raise common.UserError(f'{path} cannot be read: {error.strerror or error}')
    except EOFError:
        raise common.UserError(f'{path} cannot be read as a checkpoint: it is cut short')
    except Exception as error:          # whatever Python says about a file that is damaged or not a checkpoint
        text = str(error).split('\n')[0][:200] or type(error).__name__
        raise common.UserError(f'{path} cannot be read as a checkpoint: {text}')


def load_weights(net, state_dict, source):
    """Copies a state dict into a network; `source` names it in the common.UserError that any mismatch raises.

    What only training needs may be left over: map_augment.weight (EDM's augmentation) and logvar_* (EDM2's loss).
    """
    import common
    wanted = net.state_dict()
    given = {name: p for name, p in state_dict.items()
             if name in wanted or not (name == 'map_augment.weight' or name.startswith('logvar_'))}
    shape = lambda tensors, name: str(list(tensors[name].shape)) if name in tensors else 'missing'
    wrong = [name for name in [*wanted, *(given.keys() - wanted)] if shape(wanted, name) != shape(given, name)]
    if wrong:
        listed = '; '.join(f'{name} is {shape(given, name)} there, {shape(wanted, name)} here' for name in wrong[:3])
        more = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise common.UserError(f'{source} does not fit this network: {listed}{more}')
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(given[name])


def read_checkpoint(data):
    """The bytes of a checkpoint -> (state_dict, about), as `load_pretrained` gives them."""
    top = read_file(data, left=4 * len(data))
    ema = top['ema'] if type(top) is StoredDict and 'ema' in top else top
    if type(ema) is StoredModule:
        stored, kind = dict(named_tensors(ema, '', set())), 'module'
        about = plain({'class_name': ema.class_name}) | plain(ema.state.get('_init_kwargs', {})) | plain(ema.state)
    elif type(ema) is StoredDict and ema:
        stored, kind = ema, 'state_dict' if ema is top else 'checkpoint'
        about = {} if ema is top else plain(top) | plain(top.get('config', {}))
    else:
        raise ValueError('it holds neither a network nor a state dict')

    views = {str(name): view(value) for name, value in stored.items()}
    if sum(value.numel() for value in views.values()) > 4 * len(data):      # many views may show the same numbers
        raise ValueError('it unpacks to far more than its size')
    tensors = {name: value.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
               for name, value in views.items()}
    for prefix, wrapper in ('model.', 'edm'), ('unet.', 'edm2'):            # the network is part of its preconditioner
        if any(name.startswith(prefix) for name in tensors):
            tensors, kind = {name.removeprefix(prefix): p for name, p in tensors.items()}, wrapper
    return tensors, about | {'format': kind}


def plain(values):
    """The entries of a dict that are text, numbers, or lists of these, without torch's own."""
    simple = lambda value: value is None or type(value) in (str, int, float, bool)
    return {name: value for name, value in values.items() if not str(name).startswith('_') and name != 'training'
            and (simple(value) or type(value) in (list, tuple) and all(map(simple, value)))}


def named_tensors(module, prefix, seen):
    """The tensors of a StoredModule and of its parts, under the names that torch's own state_dict gives them."""
    if id(module) in seen:
        raise ValueError(f'{prefix} is part of the network twice')
    seen.add(id(module))
    for group in '_parameters', '_buffers', '_modules':
        for key, value in module.state.get(group, {}).items():
            name = prefix + key
            if len(name) > 1000:                                # a long name for each of many nested parts adds up
                raise ValueError('a name in it is too long')
            if type(value) is StoredModule:
                yield from named_tensors(value, f'{name}.', seen)
            elif value is not None and key not in module.state.get('_non_persistent_buffers_set', ()):
                yield name, value


def view(stored):
    """StoredTensor -> torch.Tensor that shows it. It may not reach beyond its storage, nor repeat it."""
    if type(stored) is not StoredTensor or type(stored.storage) is not StoredNumbers:
        raise ValueError('there is something among its weights that is no tensor')
    storage, offset, size, stride = stored
    if not (type(size) is type(stride) is tuple and len(size) == len(stride) <= 16
            and all(type(n) is int and 0 <= n <= storage.numel for n in (offset, *size, *stride))):
        raise ValueError('a tensor in it has an impossible shape')
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) > storage.numel or math.prod(size) and last >= storage.numel:
        raise ValueError('a tensor in it reaches beyond its storage')
    return storage.flat.as_strided(size, stride, offset)


# 4. Reading files without running them
#
# A pickle is a program for a small stack machine, and two of its instructions call whatever the file names. `Unpickler`
# is Python's own machine, left with the instructions that checkpoints need and with functions of this file in place of
# the few names that they need. Every other name, and whatever does not add up, is an error. Nothing is imported or
# called by the file's will, and what it can make this program allocate is a small multiple of its own size.

STORAGES = {f'torch.{name}Storage': dtype for name, dtype in dict(
    Float=torch.float32, Double=torch.float64, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool).items()}
NUMBERS = dict(b1='?', i1='b', u1='B', i2='h', u2='H', i4='i', u4='I', i8='q', u8='Q', f2='e', f4='f', f8='d')
INSTRUCTIONS = '''
    PROTO FRAME STOP MARK POP POP_MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS SETITEM SETITEMS
    '''.split()

StoredModule = namedtuple('StoredModule', 'class_name state')               # a network or part of one, its __dict__
StoredTensor = namedtuple('StoredTensor', 'storage offset size stride')     # a part of StoredNumbers


class StoredNumbers:
    """A storage. `read()` gives its bytes, and is called when a tensor in it is wanted: an optimizer's never are."""

    def __init__(self, dtype, numel):
        self.dtype, self.numel, self.read = dtype, numel, bytes

    @cached_property
    def flat(self):
        """Tensor (numel,)."""
        data, self.read = self.read(), None
        if len(data) != self.numel * self.dtype.itemsize:
            raise ValueError('it is cut short: numbers of a tensor are missing')
        return torch.frombuffer(bytearray(data), dtype=self.dtype) if data else torch.empty(0)


class StoredDict(dict):
    """A dict whose keys are text or whole numbers: tuples of tuples could take forever to hash."""

    def __setitem__(self, key, value):
        if type(key) not in (str, int):
            raise ValueError('a dict in it has keys that are neither text nor numbers')
        super().__setitem__(key, value)


class Instructions(dict):
    """Code of a pickle instruction -> the method that follows it."""

    def __missing__(self, code):
        name = getattr(pickletools.code2op.get(chr(code)), 'name', code)
        raise ValueError(f'it uses the pickle instruction {name}, which no checkpoint needs')


class Unpickler(pickle._Unpickler):     # pickle.Unpickler is in C, where one damaged memo index allocates gigabytes
    """Reads one pickle, protocols 2 to 5. The storages that it refers to are collected in the dict `storages`."""

    def __init__(self, file, storages, left):
        super().__init__(file)
        self.storages, self.left = storages, left       # left: how many bytes the calls in it may still take

    def find_class(self, module, name):
        name = f'{module}.{name}'.replace('__builtin__', 'builtins').replace('numpy._core', 'numpy.core')
        if name not in KNOWN:
            raise ValueError(f'it asks for {name[:100]}, which has no place in a checkpoint; nothing of it was run')
        return KNOWN[name]

    def persistent_load(self, pid):
        match pid:
            case 'storage', torch.dtype() as dtype, str(key), _, int(numel), *rest if not any(rest):
                storage = self.storages.setdefault(key, StoredNumbers(dtype, numel))
                if (storage.dtype, storage.numel) == (dtype, numel):
                    return storage
            case 'module', known, *_:                   # a class, in torch.save's old format
                return known
        raise ValueError('it refers to numbers in a way that no checkpoint does')

    def load_reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        if not callable(function) or type(args) is not tuple:           # only what KNOWN has can be called
            raise ValueError('it calls something that is not a name')
        self.left -= sum(len(arg) for arg in args if type(arg) in (str, bytes))
        if self.left < 0:
            raise ValueError('it unpacks to far more than its size')
        self.append(function(*args))

    def load_build(self):
        state = self.stack.pop()
        if type(self.stack[-1]) is StoredModule and type(state) is StoredDict:      # nothing else has attributes here
            self.stack[-1].state.update(state)

    dispatch = Instructions({code: pickle._Unpickler.dispatch[code]
                             for code in [getattr(pickle, name)[0] for name in INSTRUCTIONS]})
    dispatch |= {pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build,
                 pickle.EMPTY_DICT[0]: lambda self: self.append(StoredDict()),
                 pickle.EMPTY_SET[0]: pickle._Unpickler.load_empty_list,            # sets become lists,
                 pickle.ADDITEMS[0]: pickle._Unpickler.load_appends}                # so that nothing in them is hashed


def numpy_dtype(code, *_):
    """The code of a numpy.dtype if it is a kind of number, one of NUMBERS, or ValueError."""
    if type(code) is not str or code not in NUMBERS:
        raise ValueError(f'it has a numpy.dtype {code[:20] if type(code) is str else ""}, which is no number')
    return code


KNOWN = STORAGES | {
    '_codecs.encode': lambda text, _: text.encode('latin1'),                # how protocol 2 writes bytes
    'builtins.getattr': lambda *_: None,                                    # a bound method in ECT's loss
    'builtins.set': lambda items: items,
    'collections.OrderedDict': lambda: StoredDict(),
    'dnnlib.util.EasyDict': lambda: StoredDict(),
    'numpy.dtype': numpy_dtype,
    'numpy.core.multiarray.scalar': lambda code, data: struct.unpack('<' + NUMBERS[numpy_dtype(code)], data)[0],
    'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
    'torch._utils._rebuild_tensor_v2': lambda *args: StoredTensor(*args[:4]),
    'torch.nn.modules.container.ModuleDict': lambda: StoredModule('ModuleDict', StoredDict()),
    'torch.storage._load_from_bytes': lambda data: read_file(data, left=0),
    'torch_utils.persistence._reconstruct_persistent_obj':                  # the program in its module_src stays unread
        lambda meta: StoredModule(meta['class_name'], meta['state'])}


def read_file(data, left):
    """A pickle, or a file of torch.save -> dicts, lists, tuples, numbers, text, bytes, StoredModule, StoredTensor."""
    file, storages = io.BytesIO(data), {}
    if data.startswith(b'PK'):
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > len(data) or any(entry.compress_type for entry in entries):
            raise ValueError('it is compressed, as no checkpoint is, and may unpack to far more than its size')
        main = next((name for name in archive.namelist() if name.endswith('/data.pkl')), 'data.pkl')
        value = Unpickler(io.BytesIO(archive.read(main)), storages, left).load()
        for key, storage in storages.items():
            storage.read = partial(archive.read, f'{main.removesuffix(".pkl")}/{key}')
        return value

    value = Unpickler(file, storages, left).load()
    if value == torch.serialization.MAGIC_NUMBER:               # the old format: version, system, value, keys, storages
        _, _, value, keys = [Unpickler(file, storages, left).load() for _ in range(4)]
        if keys != sorted(storages):
            raise ValueError('it is damaged: its list of storages is not that of its tensors')
        for key in sorted(storages):
            if int.from_bytes(file.read(8), 'little') != storages[key].numel:
                raise ValueError('it is cut short or damaged: a storage has another length than announced')
            storages[key].read = partial(bytes, file.read(storages[key].numel * storages[key].dtype.itemsize))
    return value
