"""U-Nets of the consistency-model papers, written from the papers, with the published checkpoints' parameter names.

`SongUNet` is the DDPM++ / NCSN++ network of Song et al. 2021 (arXiv 2011.13456, App. H) as Karras et al. 2022 train it
(arXiv 2206.00364, App. C and F.5), `EDM2UNet` the magnitude-preserving one of Karras et al. 2024 (arXiv 2312.02696).
To copy into your own project: the networks (sections 1 and 2) need nothing but torch, the rest also common.py.

    net = SongUNet(img_resolution=32, in_channels=3, out_channels=3, channel_mult=[2, 2, 2])     # DDPM++, CIFAR-10
    load_weights(net, load_pretrained(path)[0], path)                                            # optional
    F = net(x, t.log() / 4)                                                                      # (B, 3, 32, 32)
"""
import contextlib
import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

with contextlib.suppress(ModuleNotFoundError):
    import common           # for sections 3 and 4


# 1. DDPM++ and NCSN++

class Linear(nn.Linear):
    """(B, in_features) -> (B, out_features), in float32: 16 bits cannot tell levels t and r apart that are near."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        nn.init.xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Conv2d(nn.Module):
    """(B, in_channels, H, W) -> (B, out_channels, H', W'); `up` and `down` resample by 2 with a small FIR filter."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, resample_filter=(1, 1), fused=False,
                 init_scale=1.0):   # multiplies the initial weights; 1e-5 makes the layer start near zero
        super().__init__()
        self.up, self.down, self.fused, self.filter_pad = up, down, fused, (len(resample_filter) - 1) // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.xavier_uniform_(self.weight, gain=init_scale)
        if up or down:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            taps = taps.outer(taps)[None, None]                                               # (1, 1, len, len)
            self.register_buffer('resample_filter', taps / taps.sum())

    def resample(self, x, padding):
        if self.resample_filter.shape[-1] == 2:         # (1, 1): the same by what is fast, without going to float32
            with torch.autocast(x.device.type, enabled=False):
                return F.interpolate(x, scale_factor=2) if self.up else F.avg_pool2d(x, 2)
        taps = self.resample_filter.expand(x.shape[1], -1, -1, -1)
        if self.up:                                     # 4 makes up for the zeros that go between the pixels
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=x.shape[1])
        return F.conv2d(x, taps, stride=2, padding=padding, groups=x.shape[1])

    def forward(self, x):
        pad = self.weight.shape[-1] // 2
        if self.fused:                                  # all padding comes first
            return self.resample(F.conv2d(x, self.weight, padding=pad + self.filter_pad), 0) + self.bias[:, None, None]
        if self.up or self.down:
            x = self.resample(x, self.filter_pad)
        return F.conv2d(x, self.weight, self.bias, padding=pad)


def place_for(x):
    """Memory like x for a result in float32, which is then rounded as it is written; a compiler sees to that itself."""
    return None if torch.compiler.is_compiling() else torch.empty_like(x)


class GroupNormFunction(torch.autograd.Function):
    """GroupNorm of n groups, in float32, that keeps channels_last; CUDA's ends NCHW, which all convolutions convert."""

    @staticmethod
    def forward(ctx, x, weight, bias, n, eps):
        x = x.unflatten(1, (n, -1))                                                             # (B, n, C/n, H, W)
        var, mean = torch.var_mean(x.float(), (2, 3, 4), correction=0, keepdim=True)
        rstd = (var + eps).rsqrt()
        scale = rstd * weight.view(n, -1, 1, 1)
        ctx.save_for_backward(x, mean, rstd, scale)
        with torch.autocast(x.device.type, enabled=False):      # it would copy x to float32 first
            shift = torch.addcmul(bias.view(n, -1, 1, 1), mean, scale, value=-1)
            y = torch.addcmul(shift, x, scale, out=place_for(x)).to(x.dtype)
        return y.flatten(1, 2)          # as the last, a cast that changes nothing: torch 2.11 compiles gradients of 0

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, mean, rstd, scale = ctx.saved_tensors
        grad, n = grad.unflatten(1, x.shape[1:3]), x[0, 0].numel()
        d_bias = grad.sum((3, 4), keepdim=True, dtype=torch.float32)
        product = torch.addcmul(rstd.new_zeros(1), grad, x).sum((3, 4), keepdim=True)           # in float32 by the zero
        d_weight = rstd * torch.addcmul(product, mean, d_bias, value=-1)
        along = rstd * (scale * d_weight).sum(2, keepdim=True) / n                              # of x - mean
        rest = torch.addcmul(mean * along - (scale * d_bias).sum(2, keepdim=True) / n, x, along, value=-1)
        d_x = torch.addcmul(rest, grad, scale, out=place_for(x)).flatten(1, 2).to(x.dtype)
        return d_x, d_weight.sum(0).flatten(), d_bias.sum(0).flatten(), None, None


class GroupNorm(nn.GroupNorm):
    """GroupNorm with at most 32 groups and at least 4 channels in each."""

    def __init__(self, channels):
        super().__init__(min(32, channels // 4), channels, eps=1e-6)

    def forward(self, x):
        if x.is_cuda:
            return GroupNormFunction.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x).to(x.dtype)


class UNetBlock(nn.Module):
    """Residual block: x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W')."""

    def __init__(self, emb_channels, resample_filter, in_channels, out_channels, up, down, attention, dropout):
        super().__init__()
        self.dropout, self.attention = dropout, attention
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up, down, resample_filter)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init_scale=1e-5)
        same = in_channels == out_channels and not up and not down
        self.skip = nn.Identity() if same else Conv2d(in_channels, out_channels, 1, up, down, resample_filter)
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init_scale=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, init_scale=1e-5)

    def forward(self, x, emb):
        h = self.conv0(F.silu(self.norm0(x)))
        h = h + self.affine(emb)[:, :, None, None].to(h.dtype)
        h = F.dropout(F.silu(self.norm1(h)), self.dropout, self.training)
        x = (self.conv1(h) + self.skip(x)) * math.sqrt(0.5)
        if self.attention:
            qkv = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (1, -1, 3))     # (B, 1, C, 3, HW): interleaved
            q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()             # each (B, 1, HW, C); strided ones are slow
            h = F.scaled_dot_product_attention(q, k, v)                                    # softmax(q k / sqrt(C)) v
            x = (x + self.proj(h.transpose(2, 3).reshape(x.shape))) * math.sqrt(0.5)
        return x


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, channels): sin and cos at a Transformer's frequencies or, if `fourier`, at random ones."""

    def __init__(self, channels, fourier):
        super().__init__()
        self.half = channels // 2
        self.register_buffer('freqs', 16 * torch.randn(self.half) if fourier else None)

    def forward(self, t):
        i = torch.arange(self.half, device=t.device) / (self.half - 1)                                  # 0 to 1
        arg = t.float()[:, None] * ((1 / 10000) ** i if self.freqs is None else 2 * math.pi * self.freqs)
        return torch.cat([arg.sin(), arg.cos()], dim=1)


def u_shape(img_resolution, channels, widths, num_blocks, attn_resolutions, dropout, last_attends):
    """The blocks of a U-Net in order: (`enc` or `dec`, resolution, name, arguments that both kinds of block take)."""
    levels = len(widths)
    num_blocks, dropout = [value if isinstance(value, (list, tuple)) else [value] * levels
                           for value in (num_blocks, dropout)]
    if img_resolution % 2 ** (levels - 1) or not len(num_blocks) == len(dropout) == levels:
        raise ValueError(f'{img_resolution=}, {num_blocks=} or {dropout=} does not go with {levels} resolutions')
    enc, dec, skips = [], [], [channels]
    for level, n in enumerate(num_blocks):
        enc += [('enc', level, kind) for kind in ('down', *[f'block{i}' for i in range(n)])]
        dec = [('dec', level, kind) for kind in ('up', *[f'block{i}' for i in range(n + 1)])] + dec
    bottom = [('dec', levels - 1, 'in0'), ('dec', levels - 1, 'in1')]
    for part, level, kind in enc[1:] + bottom + dec[1:]:        # no `down` to the first level, no `up` to the last
        res = img_resolution >> level
        out_channels = widths[level] if 'block' in kind else channels
        if part == 'dec' and 'block' in kind:                   # takes one of the encoder's outputs, the latest first
            channels += skips.pop()
        attends = part == 'enc' or not last_attends or kind == f'block{num_blocks[level]}'      # the decoder's last
        yield part, res, f'{res}x{res}_{kind}', dict(
            in_channels=channels, out_channels=out_channels, up=kind == 'up', down=kind == 'down',
            attention=kind == 'in0' or 'block' in kind and res in attn_resolutions and attends, dropout=dropout[level])
        channels = out_channels
        if part == 'enc':
            skips.append(channels)


class SongUNet(nn.Module):
    """DDPM++ (the default) or NCSN++: x (B, in_channels, H, W), noise_labels (B,) = ln(t) / 4 -> (B, out, H, W)."""

    def __init__(self,
                 img_resolution,                # height and width of the images
                 in_channels, out_channels,     # colour channels in and out
                 label_dim=0, augment_dim=0,    # widths of the labels for classes (one-hot) and augmentation
                 model_channels=128,            # width at channel_mult 1
                 channel_mult=(1, 2, 2, 2),     # width of each resolution, finest first, in model_channels
                 num_blocks=4,                  # residual blocks per resolution: one number, or one each
                 attn_resolutions=(16,),        # resolutions with self-attention (the bottom of the U has one always)
                 dropout=0.1,                   # dropout within the blocks: one number, or one each resolution
                 embedding_type='positional', channel_mult_noise=1,         # NCSN++: 'fourier', 2
                 encoder_type='standard', decoder_type='standard',          # NCSN++: 'residual' (an input pyramid)
                 resample_filter=(1, 1)):                                   # NCSN++: (1, 3, 3, 1)
        super().__init__()
        if (embedding_type not in ('positional', 'fourier') or encoder_type not in ('standard', 'residual')
                or decoder_type != 'standard'):
            raise ValueError(f'unknown {embedding_type=}, {encoder_type=} or {decoder_type=}')
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
        self.dec[f'{img_resolution}x{img_resolution}_aux_norm'] = GroupNorm(widths[0])
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
    """Convolution, or without `kernel` a linear layer, whose weights have unit magnitude for each output (Eq. 47)."""

    def __init__(self, in_channels, out_channels, kernel=None):
        super().__init__()
        taps = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *taps))

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
    """Residual block (Fig. 21): x (B, in_channels, H, W), emb (B, emb_channels) -> (B, out_channels, H', W')."""

    def __init__(self, emb_channels, per_head, encoder, in_channels, out_channels, up, down, attention, dropout):
        super().__init__()
        self.encoder, self.up, self.down, self.dropout = encoder, up, down, dropout
        heads = [n for n in range(1, out_channels // per_head + 1) if out_channels % n == 0]
        self.heads = max(heads, default=0) if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        if self.heads:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x, emb):
        if self.down:
            x = F.avg_pool2d(x, 2)
        if self.up:
            x = F.interpolate(x, scale_factor=2)
        if self.encoder:
            x = normalize(self.conv_skip(x), dim=1)                                                     # each pixel
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = self.conv_res0(mp_silu(x))
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
        x = mp_sum(x if self.encoder else self.conv_skip(x), h, 0.3)
        if self.heads:
            qkv = self.attn_qkv(x).flatten(2).unflatten(1, (self.heads, -1, 3))           # (B, heads, C/heads, 3, HW)
            q, k, v = normalize(qkv, dim=2).permute(3, 0, 1, 4, 2).contiguous()          # each (B, heads, HW, C/heads)
            h = F.scaled_dot_product_attention(q, k, v)
            x = mp_sum(x, self.attn_proj(h.transpose(2, 3).reshape(x.shape)), 0.3)
        return x.clamp(-256, 256)                                                           # fp16 ends at 65504


class EDM2UNet(nn.Module):
    """The magnitude-preserving U-Net of EDM2 (App. B); arguments that SongUNet has mean the same here."""

    def __init__(self, img_resolution, in_channels, out_channels, label_dim=0,
                 model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(16, 8),  # EDM2_WIDTHS
                 channels_per_head=64,                  # or a little more; a block with fewer channels has no attention
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


# 3. The network of a run, and published checkpoints

def make_network(args, **changes):
    """The network of random weights that the flags in `args` describe (--arch, --width, ...), but for `changes`."""
    config = dict(img_resolution=args.resolution, in_channels=args.in_channels, out_channels=args.in_channels,
                  label_dim=args.label_dim, model_channels=args.width, channel_mult=args.mults, num_blocks=args.blocks,
                  attn_resolutions=args.attn_resolutions, dropout=args.dropout)
    with common.or_refuse(f'--arch {args.arch}'):               # widths and resolutions that do not go together
        if args.arch == 'edm2':
            return EDM2UNet(**config | dict(dropout_res=args.dropout_res) | changes)
        return SongUNet(**config | changes)


def initial_network(args, device, tunes=False):
    """The network that training starts with: random weights of --seed, or those of --init; tunes: those are wanted."""
    torch.manual_seed(args.seed)
    net = make_network(args)
    net.config = common.config_of(args)
    if tunes and args.init == 'none' and not args.pretrain_steps and not args.resume:
        common.print0('tuning starts from random weights; --init CKPT or --pretrain-steps N for a diffusion model')
    rest, constant = args.steps - args.pretrain_steps, vars(args).get('ema_std', 'ramp') is None
    if constant and rest and args.ema ** rest > 0.1 and not args.resume:
        common.print0(f'{args.ema ** rest:.0%} of the average, which is sampled, will be the first weights; see --ema')
    if args.init != 'none' and not args.resume:
        run = Path(args.init)                                   # perhaps a run's folder
        path = next((path for path in (run / 'final.pt', run / 'checkpoint.pt') if path.exists()), args.init)
        with common.one_first():
            load_weights(net, load_pretrained(path, common.cache_folder(args))[0], args.init)
    return net.to(device, memory_format=torch.channels_last)                    # channels last: convolutions run faster


URLS = {    # the diffusion models that the papers tune
    'cifar10': 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl',
    'ffhq64': 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-ffhq-64x64-uncond-vp.pkl',
    'imagenet64': 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-s-1073741-0.075.pkl'}
FORMATS = {'model.': 'edm', 'unet.': 'edm2', '': 'state_dict'}      # by the network's name within its preconditioner


def load_pretrained(path_or_url: str | Path, cache: str | Path = 'data') -> tuple[dict[str, torch.Tensor], dict]:
    """Weights of a published network -> float32 tensors by name, and a dict of what the file says of itself.

    Reads EDM's, EDM2's, ECT's and Sony's files, checkpoints of this project (their moving average) and state dicts, and
    runs nothing in them. An address, which may end in #sha256=<hex>, is downloaded to the folder `cache`.
    """
    path = Path(path_or_url)
    if str(path_or_url).startswith(('https://', 'http://', 'file://')):
        url, _, digest = str(path_or_url).partition('#sha256=')
        path = Path(cache) / f'{zlib.crc32(url.encode()):08x}-{Path(url.partition("?")[0]).name}'      # names repeat
        common.download(url, path, 'sha256', digest.lower() or None)
    with common.or_refuse(f'{path} cannot be read as a checkpoint'):
        top = read(path.read_bytes())
        ema = top.get('ema', top) if isinstance(top, dict) else {}
        weights = dict(named_tensors(ema if '_modules' in ema else {'_parameters': ema}))
        if not weights:
            raise ValueError('it holds neither a network nor a state dict')
        prefix = next(prefix for prefix in FORMATS if any(name.startswith(prefix) for name in weights))
        about = top | top.get('config', {}) | ema.get('_init_kwargs', {}) | ema | {'format': FORMATS[prefix]}
        return ({name.removeprefix(prefix): p for name, p in weights.items() if not name.startswith('encoder.')},
                {name: value for name, value in about.items() if type(value) in (str, int, float, bool, list)})


def named_tensors(module, prefix=''):
    """The tensors of a module, here a dict of its attributes, and of its parts, named as in a state dict, float32."""
    for group in '_parameters', '_buffers', '_modules':
        for name, value in module.pop(group, {}).items():           # pop: 60 parts may refer to each other 2^60 times
            if isinstance(value, Stored):
                (dtype, _, numbers), offset, size, stride = value
                flat = torch.frombuffer(numbers or bytearray(8), dtype=dtype)
                p = flat.narrow(0, offset, len(flat) - offset).as_strided(size, stride)     # refuses what lies outside
                yield prefix + name, p.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            elif isinstance(value, dict):
                yield from named_tensors(value, f'{prefix}{name}.')


def load_weights(net, state_dict, source):
    """Copies a state dict into a network; `source` names it in the common.UserError that any mismatch raises."""
    wanted = {name: list(p.shape) for name, p in net.state_dict().items()}
    unused = 'map_augment.weight', 'logvar_'                        # of EDM's augmentation and EDM2's loss
    given = {name: list(p.shape) for name, p in state_dict.items() if name in wanted or not name.startswith(unused)}
    wrong = [f'{name} is {given.get(name, "missing")} there, {wanted.get(name, "missing")} here'
             for name in wanted | given if given.get(name) != wanted.get(name)]
    if wrong:
        more = f'; and {len(wrong) - 3} more' if len(wrong) > 3 else ''
        raise common.UserError(f'{source} does not fit this network: {"; ".join(wrong[:3])}{more}')
    net.load_state_dict(state_dict, strict=False)


# 4. Reading files without running them: a pickle calls what it names, and here it can name KNOWN alone

Stored = namedtuple('Stored', 'storage offset size stride')             # a tensor; storage: (dtype, numel, bytearray)


class Inert(dict):
    """Stands for the objects of all classes: their items, and the attributes that the file gives them."""

    def __setstate__(self, state):              # a file that sets attributes of this class itself also ends up here
        self.update(state if isinstance(state, dict) else {})


inert = lambda *_: Inert()
KNOWN = {
    'torch.DoubleStorage': torch.float64, 'torch.FloatStorage': torch.float32, 'torch.HalfStorage': torch.float16,
    'torch.BFloat16Storage': torch.bfloat16, 'torch.LongStorage': torch.int64, 'torch.IntStorage': torch.int32,
    'torch.ShortStorage': torch.int16, 'torch.CharStorage': torch.int8, 'torch.ByteStorage': torch.uint8,
    'torch.BoolStorage': torch.bool, 'collections.OrderedDict': Inert, 'dnnlib.util.EasyDict': Inert,
    'torch.nn.modules.container.ModuleDict': Inert, 'numpy.core.multiarray.scalar': inert, 'numpy.dtype': inert,
    'builtins.getattr': inert, 'builtins.set': inert,
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
        return known if isinstance(known, (type, torch.dtype)) else lambda *args: known(*args)

    def persistent_load(self, pid):
        _, dtype, key, _, numel = pid[:5]
        return self.storages.setdefault(key, (dtype, numel, bytearray()))


def read(data):
    """The bytes of a pickle or of a file of torch.save -> what is in it: numbers, text, lists, dicts, Stored."""
    file, storages = io.BytesIO(data), {}
    if data.startswith(b'PK'):
        archive = zipfile.ZipFile(file)
        main = next((name for name in archive.namelist() if name.endswith('data.pkl')), 'data.pkl')
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
