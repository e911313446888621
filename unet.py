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
import types
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

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
        self.up, self.down, self.fused, self.filter_pad = up, down, fused, (len(resample_filter) - 1) // 2
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
        if self.fused:
            return self.resample(F.conv2d(x, weight, padding=pad + self.filter_pad), 0) + bias[:, None, None]
        if self.up or self.down:
            x = self.resample(x, self.filter_pad)
        return F.conv2d(x, weight, bias, padding=pad)


def group_norm(channels):
    """GroupNorm with at most 32 groups and at least 4 channels in each."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class UNetBlock(nn.Module):
    """Residual block with time embedding, optional resampling, and optional single-head self-attention.

    x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W').
    """

    def __init__(self, emb_channels, resample_filter, in_channels, out_channels, up, down, attention, dropout):
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


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, channels): sin and cos at a Transformer's frequencies or, if `fourier`, at random ones."""

    def __init__(self, channels, fourier):
        super().__init__()
        self.half = channels // 2
        self.register_buffer('freqs', 16 * torch.randn(self.half) if fourier else None)

    def forward(self, t):
        i = torch.arange(self.half, dtype=torch.float32, device=t.device)
        freqs = (1 / 10000) ** (i / (self.half - 1)) if self.freqs is None else 2 * math.pi * self.freqs
        arg = t.float()[:, None] * freqs
        return torch.cat([arg.sin(), arg.cos()], dim=1)


def u_shape(img_resolution, channels, widths, num_blocks, attn_resolutions, dropout, last_attends):
    """The blocks of a U-Net in order: (`enc` or `dec`, resolution, name, arguments that both kinds of block take).

    The first block has `channels` in; those of the decoder also take the encoder's outputs, in reverse order. Attention
    is at the bottom and at attn_resolutions; there, if `last_attends`, only the last block of the decoder has it.
    """
    levels, skips, plan = len(widths), [channels], []
    if img_resolution % 2 ** (levels - 1):
        raise ValueError(f'img_resolution {img_resolution} cannot be halved {levels - 1} times')
    num_blocks, dropout = [value if isinstance(value, (list, tuple)) else [value] * levels
                           for value in (num_blocks, dropout)]
    if not len(num_blocks) == len(dropout) == levels:
        raise ValueError(f'num_blocks {num_blocks} and dropout {dropout} must be one number, or one each of {levels}')
    for level, width in enumerate(widths):
        for kind in ['down'] * (level > 0) + [f'block{i}' for i in range(num_blocks[level])]:
            plan.append(('enc', level, kind, channels, channels if kind == 'down' else width))
            channels = plan[-1][-1]
            skips.append(channels)
    for level, width in reversed(list(enumerate(widths))):
        for kind in ['up'] if level < levels - 1 else ['in0', 'in1']:
            plan.append(('dec', level, kind, channels, channels))
        for i in range(num_blocks[level] + 1):
            plan.append(('dec', level, f'block{i}', channels + skips.pop(), width))
            channels = width

    for part, level, kind, in_channels, out_channels in plan:
        res = img_resolution >> level
        attends = part == 'enc' or not last_attends or kind == f'block{num_blocks[level]}'
        yield part, res, f'{res}x{res}_{kind}', dict(
            in_channels=in_channels, out_channels=out_channels, up=kind == 'up', down=kind == 'down',
            attention=kind == 'in0' or 'block' in kind and res in attn_resolutions and attends, dropout=dropout[level])


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
        for name, value, known in [('embedding_type', embedding_type, 'positional fourier'),
                                   ('encoder_type', encoder_type, 'standard residual'),
                                   ('decoder_type', decoder_type, 'standard')]:
            if value not in known.split():
                raise ValueError(f'{name} is {value!r}, not {known.replace(" ", " or ")}')
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
        for part, _, name, options in u_shape(img_resolution, model_channels, widths, num_blocks, attn_resolutions,
                                              dropout, last_attends=True):
            getattr(self, part)[name] = UNetBlock(emb_channels, resample_filter, **options)
            if options['down'] and encoder_type == 'residual':
                self.enc[name.replace('down', 'aux_residual')] = Conv2d(
                    aux_channels, options['out_channels'], 3, down=True, resample_filter=resample_filter, fused=True)
                aux_channels = options['out_channels']
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
        dims = tuple(range(1, self.weight.ndim))
        if self.training and torch.is_grad_enabled():       # Eq. 66: stored weights never grow; teachers leave them be
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, dims))
        weight = normalize(self.weight.float(), dims) * (gain / math.sqrt(self.weight[0].numel()))
        if weight.ndim == 4:
            return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2)
        with torch.autocast(x.device.type, enabled=False):  # as in `Linear`: the time embedding
            return F.linear(x.float(), weight)


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

    def __init__(self, emb_channels, channels_per_head, encoder,
                 in_channels, out_channels, up, down, attention, dropout):
        super().__init__()
        self.encoder, self.up, self.down, self.dropout = encoder, up, down, dropout
        self.heads = out_channels // channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        if self.heads:
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

    forward(x, noise_labels, class_labels=None) -> (B, out_channels, H, W). What has the name of an argument of SongUNet
    has its meaning; attention is in all blocks of a resolution that has it.
    """

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0,
                 model_channels=192,            # EDM2_WIDTHS
                 channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(16, 8),
                 channels_per_head=64,          # width of an attention head, or a little more; a block with less has none
                 dropout=0.0, dropout_res=None):        # dropout is in resolutions up to dropout_res; None = in all
        super().__init__()
        widths = [model_channels * mult for mult in channel_mult]
        self.img_resolution, self.in_channels, self.label_dim = img_resolution, in_channels, label_dim

        self.emb_fourier = MPFourier(model_channels)
        self.emb_noise = MPConv(model_channels, max(widths))
        self.emb_label = MPConv(label_dim, max(widths)) if label_dim else None
        self.out_gain = nn.Parameter(torch.zeros([]))                   # so that training starts from F = 0

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        self.enc[f'{img_resolution}x{img_resolution}_conv'] = MPConv(in_channels + 1, model_channels, 3)
        for part, res, name, options in u_shape(img_resolution, model_channels, widths, num_blocks, attn_resolutions,
                                                dropout, last_attends=False):
            if dropout_res is not None and res > dropout_res:
                options['dropout'] = 0.0
            getattr(self, part)[name] = MPBlock(max(widths), channels_per_head, encoder=part == 'enc', **options)
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


def initial_network(args, device, tunes=False):
    """The network that training starts with: random weights of --seed, or those of --init; tunes: those are wanted."""
    import common
    torch.manual_seed(args.seed)
    net = make_network(args)
    net.config = common.config_of(args)
    if tunes and args.init == 'none' and not args.pretrain_steps and not args.resume:
        common.print0('tuning starts from random weights; --init CKPT or --pretrain-steps N for a diffusion model')
    if args.init != 'none' and not args.resume:
        run = Path(args.init)                                   # perhaps a run's folder
        path = next((path for path in (run / 'final.pt', run / 'checkpoint.pt') if path.exists()), args.init)
        with common.one_first():
            state = load_pretrained(path, common.cache_folder(args))[0]
        load_weights(net, state, args.init)
    return net.to(device, memory_format=torch.channels_last)                    # channels last: convolutions run faster


# 3. Published checkpoints

NVIDIA = 'https://nvlabs-fi-cdn.nvidia.com'
URLS = {    # the diffusion models that the papers tune
    'cifar10': f'{NVIDIA}/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl',
    'ffhq64': f'{NVIDIA}/edm/pretrained/edm-ffhq-64x64-uncond-vp.pkl',
    'imagenet64': f'{NVIDIA}/edm2/posthoc-reconstructions/edm2-img64-s-1073741-0.075.pkl'}
FORMATS = {'model.': 'edm', 'unet.': 'edm2', '': 'state_dict'}      # by the network's name within its preconditioner


def load_pretrained(path_or_url: str | Path, cache: str | Path = 'data') -> tuple[dict[str, torch.Tensor], dict]:
    """Weights of a published network. -> (state_dict: dict name -> float32 tensor, about: dict of plain values)

    Takes .pkl files of EDM, EDM2, ECT and Sony's codes, checkpoints of this project (of which it gives the moving
    average, without VCT's encoder) and state dicts of torch.save, and runs nothing in them. http(s):// and file://
    addresses go through the folder `cache`, and may end in #sha256=<hex> to be checked. `about` is what the file says
    of itself: `format`, arguments of the network, sigma_data. Raises common.UserError for what cannot be had or read.
    """
    import common
    path = Path(path_or_url)
    if str(path_or_url).startswith(('https://', 'http://', 'file://')):
        url, _, digest = str(path_or_url).partition('#sha256=')
        # The address is part of the name: many runs have a file network-snapshot-latest.pkl.
        path = Path(cache) / f'{zlib.crc32(url.encode()):08x}-{Path(url.partition("?")[0]).name}'
        try:
            common.download(url, path, 'sha256', digest.lower() or None)
        except common.UserError as error:
            raise common.UserError(f'{error}; --init PATH takes a file that you have, --pretrain-steps N needs none')
    try:
        top = read(path.read_bytes())
        ema = top.get('ema', top) if isinstance(top, dict) else {}
        weights = dict(named_tensors(ema if '_modules' in ema else {'_parameters': ema}))
        if not weights:
            raise ValueError('it holds neither a network nor a state dict')
        prefix = next(prefix for prefix in FORMATS if any(name.startswith(prefix) for name in weights))
        about = top | top.get('config', {}) | ema.get('_init_kwargs', {}) | ema | {'format': FORMATS[prefix]}
        return ({name.removeprefix(prefix): dense(p) for name, p in weights.items() if not name.startswith('encoder.')},
                {name: value for name, value in about.items() if type(value) in (str, int, float, bool, list)})
    except Exception as error:          # whatever Python says about a file that is damaged or not a checkpoint
        reason = getattr(error, 'strerror', None) or str(error).split('\n')[0][:200] or type(error).__name__
        raise common.UserError(f'{path} cannot be read as a checkpoint: {reason}')


def load_weights(net, state_dict, source):
    """Copies a state dict into a network; `source` names it in the common.UserError that any mismatch raises.

    What only training needs may be left over: map_augment.weight (EDM's augmentation) and logvar_* (EDM2's loss).
    """
    import common
    wanted = {name: list(p.shape) for name, p in net.state_dict().items()}
    given = {name: list(p.shape) for name, p in state_dict.items()
             if name in wanted or not name.startswith(('map_augment.weight', 'logvar_'))}
    wrong = [f'{name} is {given.get(name, "missing")} there, {wanted.get(name, "missing")} here'
             for name in wanted | given if given.get(name) != wanted.get(name)]
    if wrong:
        more = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise common.UserError(f'{source} does not fit this network: {"; ".join(wrong[:3])}{more}')
    net.load_state_dict(state_dict, strict=False)


def named_tensors(module, prefix=''):
    """The tensors of a module, here a dict of its attributes, and of its parts, named as in a state dict."""
    for group in '_parameters', '_buffers', '_modules':
        for name, value in module.pop(group, {}).items():           # pop: 60 parts may refer to each other 2^60 times
            if isinstance(value, Stored):
                yield prefix + name, value
            elif isinstance(value, dict):
                yield from named_tensors(value, f'{prefix}{name}.')


def dense(stored):
    """Stored -> its float32 tensor, in memory of its own; as_strided refuses what is not within its storage."""
    (dtype, _, numbers), offset, size, stride = stored
    shown = torch.frombuffer(numbers or bytearray(8), dtype=dtype).as_strided(size, stride, offset)
    return shown.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


# 4. Reading files without running them: a pickle calls what it names, and here it can name KNOWN alone

Stored = namedtuple('Stored', 'storage offset size stride')             # a tensor; storage: (dtype, numel, bytearray)


class Inert(dict):
    """Stands for the objects of all classes: their items, and the attributes that the file gives them."""

    def __setstate__(self, state):              # a file that sets attributes of this class itself also ends up here
        self.update(state if isinstance(state, dict) else {})


KNOWN = {f'torch.{name}Storage': getattr(torch, name.lower()) for name in
         'Float Double Half BFloat16 Long Int Short Bool'.split()} | {
    'torch.ByteStorage': torch.uint8, 'torch.CharStorage': torch.int8, 'collections.OrderedDict': Inert,
    'dnnlib.util.EasyDict': Inert, 'torch.nn.modules.container.ModuleDict': Inert,
    'builtins.getattr': lambda *_: Inert(), 'builtins.set': lambda *_: Inert(), 'numpy.dtype': lambda *_: Inert(),
    'numpy.core.multiarray.scalar': lambda *_: Inert(),
    '_codecs.encode': lambda text, _: text.encode('latin1'),            # how protocol 2 writes bytes
    'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
    'torch._utils._rebuild_tensor_v2': lambda *args: Stored(*args[:4]),
    'torch.storage._load_from_bytes': lambda data: read(data),
    'torch_utils.persistence._reconstruct_persistent_obj': lambda meta: meta['state']}


class Unpickler(pickle.Unpickler):
    """Reads the next pickle of a file; the dict `storages` gets the storages that it refers to, still empty."""

    def __init__(self, file, storages):
        super().__init__(file)
        self.storages, begin, tuples = storages, file.tell(), 0
        for instruction, value, _ in pickletools.genops(file):
            tuples += 'TUPLE' in instruction.name                       # hashing tuples in tuples overflows the stack
            if tuples > 50_000 or 'EXT' in instruction.name or 'PUT' in instruction.name and value > 10 ** 6:
                raise ValueError(f'it uses the pickle instruction {instruction.name} as no checkpoint does')
        file.seek(begin)

    def find_class(self, module, name):
        name = f'{module}.{name}'.replace('__builtin__', 'builtins').replace('numpy._core', 'numpy.core')
        if name not in KNOWN:
            raise ValueError(f'it asks for {name!r:.100}, unknown to checkpoints; nothing of it was run')
        known = KNOWN[name]                     # functions are handed out anew: a file can set attributes of its own
        return (lambda *args: known(*args)) if isinstance(known, types.FunctionType) else known

    def persistent_load(self, pid):
        _, dtype, key, _, numel = pid[:5]
        return self.storages.setdefault(key, (dtype, numel, bytearray()))


def read(data):
    """The bytes of a pickle or of a file of torch.save -> what is in it: numbers, text, lists, dicts, Stored."""
    file, storages = io.BytesIO(data), {}
    if data.startswith(b'PK'):
        archive = zipfile.ZipFile(file)
        main = next(name for name in [*archive.namelist(), 'data.pkl'] if name.endswith('data.pkl'))
        top = Unpickler(io.BytesIO(archive.read(main)), storages).load()
        for key, (_, _, numbers) in storages.items():
            numbers.extend(archive.read(f'{main[:-4]}/{key}'))
        return top
    top = Unpickler(file, storages).load()
    if top == torch.serialization.MAGIC_NUMBER:                 # the old format: version, system, value, keys, storages
        _, _, top, keys = [Unpickler(file, storages).load() for _ in range(4)]
        for dtype, numel, numbers in map(storages.get, keys):
            file.read(8)                                                # the number of numbers once more
            numbers.extend(file.read(numel * dtype.itemsize))
    return top
