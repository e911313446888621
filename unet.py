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
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple
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
        with torch.autocast(x.device.type, enabled=False):      # only the time embedding passes here: levels t and r are
            return super().forward(x.float())                   # too near each other for 16 bits to tell them apart


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
        channels = x.shape[1]
        taps = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=channels)

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
        self.skip = None
        if in_channels != out_channels or up or down:
            self.skip = Conv2d(in_channels, out_channels, 1, **resampling)
        self.norm2 = None
        if attention:
            self.norm2 = group_norm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init_scale=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, init_scale=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = h + self.affine(emb)[:, :, None, None].to(h.dtype)
        h = F.dropout(F.silu(self.norm1(h)), self.dropout, self.training)
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is None:
            return x

        # The 3C output channels of `qkv` are q, k, v interleaved: channel 3i + j is component i of the j-th of them.
        B, C, H, W = x.shape
        q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).permute(2, 0, 3, 1)[:, :, None]  # each (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)                                        # softmax(q k / sqrt(C)) v
        h = h[:, 0].transpose(1, 2).reshape(B, C, H, W)
        return (x + self.proj(h)) * math.sqrt(0.5)


class PositionalEmbedding(nn.Module):
    """Transformer sinusoids: t (B,) -> (B, channels) = [sin, cos] at frequencies 10000^(-i / (channels/2 - 1))."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, t):
        half = self.channels // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        arg = t.float()[:, None] * (1 / 10000) ** (i / (half - 1))
        return torch.cat([arg.sin(), arg.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features: t (B,) -> (B, channels) = [sin, cos] of 2 pi t times frequencies fixed at birth."""

    def __init__(self, channels, scale=16):
        super().__init__()
        self.register_buffer('freqs', scale * torch.randn(channels // 2))

    def forward(self, t):
        arg = t.float()[:, None] * (2 * math.pi * self.freqs)
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
                 in_channels,                   # colour channels in
                 out_channels,                  # colour channels out
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
        self.map_noise = (PositionalEmbedding if embedding_type == 'positional' else FourierEmbedding)(noise_channels)
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
            with torch.autocast(x.device.type, enabled=False):                              # as in `Linear`: the time embedding
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
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
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
                 in_channels,                   # colour channels in
                 out_channels,                  # colour channels out
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
        num_blocks, dropout = per_level(num_blocks, len(widths), 'num_blocks'), per_level(dropout, len(widths), 'dropout')
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
    """The network of random weights that the flags --arch, --width, ... in `args` describe; `changes` to its arguments."""
    import common           # here and not above, so that the networks can be copied without it
    config = dict(img_resolution=args.resolution, in_channels=args.in_channels, out_channels=args.in_channels,
                  label_dim=args.label_dim, model_channels=args.width, channel_mult=args.mults, num_blocks=args.blocks,
                  attn_resolutions=args.attn_resolutions, dropout=args.dropout)
    try:
        return EDM2UNet(**config | dict(dropout_res=args.dropout_res) | changes) if args.arch == 'edm2' else SongUNet(**config | changes)
    except ValueError as error:                                 # widths and resolutions that do not go together
        raise common.UserError(f'--arch {args.arch}: {error}')


def initial_network(args):
    """The network that training starts with: random weights of --seed, or those of --init."""
    import common
    torch.manual_seed(args.seed)
    net = make_network(args)
    if args.init != 'none' and not args.resume:
        path = Path(args.init)
        if path.is_dir():                                       # a run's folder
            path = path / ('final.pt' if (path / 'final.pt').exists() else 'checkpoint.pt')
        with common.one_first():
            state = load_pretrained(str(path) if path.exists() else args.init, common.cache_folder(args))[0]
        load_weights(net, {name: value for name, value in state.items() if not name.startswith('encoder.')}, args.init)
    return net


# 3. Published checkpoints

def load_pretrained(path_or_url, cache='data'):
    """Weights of a published network. -> (state_dict: dict name -> float32 tensor, about: dict of plain values)

    Takes .pkl files of EDM, EDM2, ECT and Sony's codes, checkpoints of this project, and state dicts of torch.save. Runs
    nothing in them; gives the moving average (`ema`) where there is one. http(s):// and file:// addresses go through the
    folder `cache`, and may end in #sha256=<hex> to be checked. `about` is what the file says of itself: its `format`,
    arguments of the network, sigma_data. Raises common.UserError for what cannot be had, read or trusted.
    """
    import common           # here and not above, so that the networks can be copied without it
    path = Path(path_or_url)
    if str(path_or_url).startswith(('https://', 'http://', 'file://')):
        url, _, digest = str(path_or_url).partition('#sha256=')
        # The address is part of the name: many runs have a file network-snapshot-latest.pkl.
        path = Path(cache) / f'{zlib.crc32(url.encode()):08x}-{Path(urlsplit(url).path).name or "checkpoint"}'
        try:
            common.download(url, path, 'sha256', digest.lower() or None)
        except common.UserError as error:
            raise common.UserError(f'{error}; --init PATH takes a file that you have, --pretrain-steps N trains the start first')
    try:
        return read_checkpoint(path.read_bytes())
    except OSError as error:
        raise common.UserError(f'{path} cannot be read: {error.strerror or error}')
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


# 4. Reading files without running them
#
# A pickle is a program for a small stack machine, and two of its instructions call whatever the file names. What follows
# is that machine without calls. It follows the instructions that build plain data; where a file would call something, the
# name must be one of `KNOWN`, and what the call stands for is put down as data in its place. Every other name, and whatever
# does not add up, is a ValueError. Nothing is imported or called by the file's will, and what it can make this program
# allocate is a small multiple of its own size.

STORAGES = {f'torch.{name}Storage': dtype for name, dtype in dict(
    Float=torch.float32, Double=torch.float64, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool).items()}
NUMBERS = dict(b1='?', i1='b', u1='B', i2='h', u2='H', i4='i', u4='I', i8='q', u8='Q', f2='e', f4='f', f8='d')
KNOWN = STORAGES.keys() | set('''
    collections.OrderedDict dnnlib.util.EasyDict builtins.set __builtin__.set
    torch_utils.persistence._reconstruct_persistent_obj torch.nn.modules.container.ModuleDict
    torch._utils._rebuild_tensor_v2 torch._utils._rebuild_parameter torch.storage._load_from_bytes
    numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray.scalar _codecs.encode
    builtins.getattr __builtin__.getattr'''.split())         # the last: a bound method in ECT's loss; stays a StoredCall
OLD_FORMAT = 0x1950a86a20f9469cfc6c                           # the number that torch.save's old format begins with


def read_checkpoint(data):
    """A checkpoint's bytes -> (state_dict: dict name -> float32 tensor, about: dict of plain values), or ValueError.

    Of a dict with `ema`, that; else the network or state dict that the file is. `about` has `format` and what else is
    said there in plain values: a network's class, arguments and attributes, or a checkpoint's step and settings.
    """
    reader = Reader(data)
    top = reader.read()
    ema = top['ema'] if type(top) is dict and 'ema' in top else top
    if type(ema) is StoredModule:
        tensors, about = reader.state_dict(ema), {'class_name': ema.class_name}
        about |= plain(ema.state.get('_init_kwargs', {})) | plain(ema.state) | {'format': 'module'}
    elif type(ema) is dict and ema:
        tensors = {str(name): reader.tensor(value) for name, value in ema.items()}
        about = {} if ema is top else plain(top) | plain(top.get('config', {}))
        about['format'] = 'state_dict' if ema is top else 'checkpoint'
    else:
        raise ValueError('it holds neither a network nor a state dict')

    # EDM and EDM2 save the network within its preconditioner.
    for prefix, wrapper in ('model.', 'edm'), ('unet.', 'edm2'):
        if any(name.startswith(prefix) for name in tensors):
            tensors, about['format'] = {name.removeprefix(prefix): p for name, p in tensors.items()}, wrapper
    return tensors, about


def plain(values):
    """The entries of a dict that are text, numbers, or lists of these, without torch's own."""
    simple = lambda value: value is None or type(value) in (str, int, float, bool)
    return {name: value for name, value in values.items() if not str(name).startswith('_') and name != 'training'
            and (simple(value) or type(value) in (list, tuple) and all(map(simple, value)))}


class StoredName(NamedTuple):
    """A global that the file names, one of KNOWN."""
    name: str


class StoredCall(NamedTuple):
    """A call that means nothing here and was not made."""
    name: str


class StoredModule(NamedTuple):
    """A network or part of one. `state` is its __dict__: _parameters, _buffers, _modules and its plain attributes."""
    class_name: str
    state: dict


class StoredNumbers:
    """Numbers in a row. Their bytes are `data` (old format) or the zip's `entry`; a tensor, `flat`, once wanted."""

    def __init__(self, dtype, numel):
        self.dtype, self.numel, self.data, self.entry, self.flat = dtype, numel, None, None, None


class StoredTensor(NamedTuple):
    """A view of a storage, known to lie within it."""
    storage: StoredNumbers
    offset: int
    size: tuple
    stride: tuple


class Reader:
    """One file, given as bytes."""

    def __init__(self, data):
        self.data, self.archive = data, None
        self.left = 4 * len(data)           # bytes and numbers that may yet be taken out of it

    def spend(self, amount):
        """No honest file needs its bytes read and its numbers copied four times over."""
        self.left -= amount
        if self.left < 0:
            raise ValueError('it unpacks to far more than its size')

    def read(self):
        """-> what the file holds: dicts, lists, tuples, numbers, text, bytes, StoredModule, StoredTensor, StoredCall."""
        if not self.data.startswith(b'PK'):
            return self.stream(self.data)
        self.archive = zipfile.ZipFile(io.BytesIO(self.data))
        self.spend(sum(entry.file_size for entry in self.archive.infolist()))
        main = next((name for name in self.archive.namelist() if name.endswith('/data.pkl')), 'data.pkl')
        storages = {}
        value = self.machine(io.BytesIO(self.archive.read(main)), storages)
        for key, storage in storages.items():               # read when a tensor is wanted: an optimizer's never are
            storage.entry = f'{main.removesuffix(".pkl")}/{key}'
        return value

    def state_dict(self, module, prefix='', seen=None):
        """Tensors of a module and of what is in it, under the names that torch's own state_dict would give them."""
        seen, tensors, state = set() if seen is None else seen, {}, module.state
        if id(module) in seen:
            raise ValueError(f'{prefix or module.class_name} is part of the network twice')
        seen.add(id(module))
        for name, value in [*state.get('_parameters', {}).items(), *state.get('_buffers', {}).items()]:
            if value is not None and name not in state.get('_non_persistent_buffers_set', ()):
                tensors[prefix + name] = self.tensor(value)
        for name, part in state.get('_modules', {}).items():
            if type(part) is StoredModule:                        # None: a part that this network does without
                tensors |= self.state_dict(part, f'{prefix}{name}.', seen)
        return tensors

    def tensor(self, tensor):
        """StoredTensor -> torch.Tensor, float32, with memory of its own."""
        if type(tensor) is not StoredTensor:
            raise ValueError('there is something among its weights that is no tensor')
        storage = tensor.storage
        if storage.flat is None:
            data = self.archive.read(storage.entry) if storage.entry else storage.data
            if data is None or len(data) != storage.numel * storage.dtype.itemsize:
                raise ValueError('it is cut short: numbers of a tensor are missing')
            storage.flat = torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0)
            storage.data = None
        self.spend(math.prod(tensor.size))
        view = storage.flat.as_strided(tensor.size, tensor.stride, tensor.offset)
        return view.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    # What stands behind the names

    def name(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError('a name in it is not text')
        name = f'{module}.{name}'
        if name not in KNOWN:
            raise ValueError(f'it asks for {name[:100]}, which has no place in a checkpoint; nothing of it was run')
        return StoredName(name)

    def call(self, function, args):
        """What the call of a name stands for."""
        if type(function) is not StoredName or type(args) is not tuple:
            raise ValueError('it calls something that is not a name')
        match function.name.rsplit('.', 1)[1], args:
            case ('OrderedDict' | 'EasyDict'), ():
                return {}
            case 'ModuleDict', ():
                return StoredModule('ModuleDict', {})
            case '_reconstruct_persistent_obj', ({'class_name': str(class_name), 'state': dict(state)},):
                return StoredModule(class_name, state)            # module_src, the text of the class, stays unread
            case '_rebuild_parameter', (data, *_):
                return data
            case '_rebuild_tensor_v2', (storage, offset, size, stride, *_):
                return self.view(storage, offset, size, stride)
            case '_load_from_bytes', (bytes(data),):
                return self.stream(data)
            case 'set', (list(items),):
                return items
            case 'encode', (str(text), 'latin1'):           # how protocol 2 writes bytes
                self.spend(len(text))
                return text.encode('latin1')
            case 'dtype', (str(code), *_):
                if code not in NUMBERS:
                    raise ValueError(f'it has a numpy.dtype {code[:20]}, which is no number')
                return NUMBERS[code]
            case 'scalar', (str(code), bytes(data)) if code in NUMBERS.values():
                return struct.unpack(f'<{code}', data)[0]
            case 'getattr', _:
                return StoredCall(function.name)
        raise ValueError(f'it calls {function.name} in a way that no checkpoint does')

    def view(self, storage, offset, size, stride):
        """A StoredTensor that cannot reach beyond its storage nor repeat what is in it."""
        if not (isinstance(storage, StoredNumbers) and type(size) is type(stride) is tuple and len(size) == len(stride) <= 16
                and all(type(n) is int and 0 <= n <= storage.numel for n in (offset, *size, *stride))):
            raise ValueError('a tensor in it has an impossible shape')
        last = offset + sum((n - 1) * step for n, step in zip(size, stride))
        if math.prod(size) > storage.numel or math.prod(size) and last >= storage.numel:
            raise ValueError('a tensor in it reaches beyond its storage')
        return StoredTensor(storage, offset, size, stride)

    def persistent(self, pid, storages):
        """('storage', type, key, device, numel, ...) -> StoredNumbers; ('module', class, ...) -> class, in the old format."""
        match pid:
            case 'storage', StoredName(kind), str(key), str(), int(numel), *rest if kind in STORAGES and rest in ([], [None]):
                storage = storages.setdefault(key, StoredNumbers(STORAGES[kind], numel))
                if (storage.dtype, storage.numel) == (STORAGES[kind], numel):
                    return storage
            case 'module', StoredName() as name, *_:
                return name
        raise ValueError('it refers to numbers in a way that no checkpoint does')

    # Formats

    def stream(self, data):
        """A pickle; or torch.save's old format: pickles of a number, version, system, data and keys, then storages."""
        self.spend(len(data))
        file, storages = io.BytesIO(data), {}
        value = self.machine(file, storages)
        if type(value) is not int or value != OLD_FORMAT:
            return value
        _, _, value, keys = [self.machine(file, storages) for _ in range(4)]
        for key in keys:
            storage = storages[key]
            if int.from_bytes(file.read(8), 'little') != storage.numel:
                raise ValueError('it is cut short or damaged: a storage has another length than announced')
            storage.data = file.read(min(storage.numel * storage.dtype.itemsize, len(data)))
        return value

    def machine(self, file, storages):
        """Follows one pickle, protocols 2 to 5, from a stream. Sets become lists, so that only keys are ever hashed."""
        stack, marks, memo = [], [], {}

        def pop(n):
            """The n topmost items; n = None: those above the last mark."""
            items = stack[marks.pop() if n is None else len(stack) - n:]
            del stack[len(stack) - len(items):]
            return items

        def fill(items):
            if type(stack[-1]) is not dict or not all(type(key) in (str, int) for key in items[::2]):
                raise ValueError('a dict in it has keys that are neither text nor numbers')
            stack[-1].update(zip(items[::2], items[1::2], strict=True))

        for op, arg, _ in pickletools.genops(file):
            match op.name:
                case 'PROTO' | 'FRAME':
                    pass
                case 'STOP':
                    return stack.pop()
                case 'MARK':
                    marks.append(len(stack))
                case 'POP' | 'POP_MARK':                    # what turned out to contain itself, like ECT's loss
                    pop(1 if op.name == 'POP' else None)
                case 'MEMOIZE':
                    memo[len(memo)] = stack[-1]
                case 'BINPUT' | 'LONG_BINPUT':
                    memo[arg] = stack[-1]
                case 'BINGET' | 'LONG_BINGET':
                    stack.append(memo[arg])
                case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                    stack.append(dict(NONE=None, NEWTRUE=True, NEWFALSE=False)[op.name])
                case 'EMPTY_TUPLE' | 'TUPLE1' | 'TUPLE2' | 'TUPLE3' | 'TUPLE':
                    stack.append(tuple(pop(dict(EMPTY_TUPLE=0, TUPLE1=1, TUPLE2=2, TUPLE3=3).get(op.name))))
                case 'EMPTY_LIST' | 'EMPTY_SET':
                    stack.append([])
                case 'APPEND' | 'APPENDS' | 'ADDITEMS':
                    items = pop(1 if op.name == 'APPEND' else None)
                    stack[-1].extend(items)
                case 'EMPTY_DICT':
                    stack.append({})
                case 'SETITEM' | 'SETITEMS':
                    fill(pop(2 if op.name == 'SETITEM' else None))
                case 'GLOBAL' | 'STACK_GLOBAL':
                    stack.append(self.name(*(arg.split(' ', 1) if arg else pop(2))))
                case 'REDUCE' | 'NEWOBJ':
                    stack.append(self.call(*pop(2)))
                case 'BUILD':                               # sets attributes; only modules have any here
                    state, = pop(1)
                    if type(stack[-1]) is StoredModule and type(state) is dict:
                        stack[-1].state.update(state)
                case 'BINPERSID':
                    stack.append(self.persistent(*pop(1), storages))
                case literal if literal.startswith(('BIN', 'SHORT_BIN', 'LONG')):
                    stack.append(arg)
                case other:
                    raise ValueError(f'it uses the pickle instruction {other}, which no checkpoint needs')
