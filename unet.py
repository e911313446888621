"""U-Nets of the consistency-model papers, written from the papers, with the parameter names of the published checkpoints.

`SongUNet` is the DDPM++ / NCSN++ network of Song et al. 2021 (arXiv 2011.13456, App. H) in the form that Karras et al.
2022 (arXiv 2206.00364, App. C and F.5) train it. The parameter names and shapes are those of the CIFAR-10, FFHQ and AFHQ
checkpoints of that work, so `load_state_dict` takes them as they are.

To copy into your own project: this file needs nothing but torch.

    net = SongUNet(img_resolution=32, in_channels=3, out_channels=3, channel_mult=[2, 2, 2])     # DDPM++, CIFAR-10
    F = net(x, t.log() / 4)                                                                       # (B, 3, 32, 32)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def xavier_uniform_(weight, scale=1.0):
    """Uniform in +-sqrt(6 / (fan_in + fan_out)), both fans counting the kernel's taps; `scale` multiplies the result."""
    return nn.init.xavier_uniform_(weight, gain=scale)


class Linear(nn.Linear):
    """(B, in_features) -> (B, out_features), Xavier-uniform weights and zero bias."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__(in_features, out_features, bias)
        xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)


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
        xavier_uniform_(self.weight, init_scale)
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
        q, k, v = self.qkv(self.norm2(x)).reshape(B, C, 3, H * W).permute(2, 0, 3, 1)[:, :, None]   # 3 x (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)                                                # softmax(q k / sqrt(C)) v
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


class SongUNet(nn.Module):
    """DDPM++ (`standard` encoder, `positional` embedding) or NCSN++ (`residual`, `fourier`) U-Net.

    forward(x, noise_labels, class_labels=None, augment_labels=None) -> (B, out_channels, H, W)
        x (B, in_channels, H, W), H = W = img_resolution; noise_labels (B,) = ln(t) / 4; class_labels (B, label_dim) one-hot,
        or None for no class; augment_labels (B, augment_dim) or None.
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
        if img_resolution % 2 ** (levels - 1):
            raise ValueError(f'img_resolution {img_resolution} cannot be halved {levels - 1} times')
        num_blocks, dropout = per_level(num_blocks, levels, 'num_blocks'), per_level(dropout, levels, 'dropout')
        resolutions = [img_resolution >> level for level in range(levels)]
        widths = [model_channels * mult for mult in channel_mult]
        self.img_resolution, self.in_channels, self.label_dim = img_resolution, in_channels, label_dim

        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * 4
        self.map_noise = (PositionalEmbedding if embedding_type == 'positional' else FourierEmbedding)(noise_channels)
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        def block(cin, cout, level, **kwargs):
            return UNetBlock(cin, cout, emb_channels, dropout=dropout[level], resample_filter=resample_filter, **kwargs)

        self.enc = nn.ModuleDict()
        self.enc[f'{img_resolution}x{img_resolution}_conv'] = Conv2d(in_channels, model_channels, 3)
        channels, aux_channels, skips = model_channels, in_channels, [model_channels]
        for level, (res, width) in enumerate(zip(resolutions, widths)):
            if level > 0:
                self.enc[f'{res}x{res}_down'] = block(channels, channels, level, down=True)
                if encoder_type == 'residual':
                    self.enc[f'{res}x{res}_aux_residual'] = Conv2d(
                        aux_channels, channels, 3, down=True, resample_filter=resample_filter, fused=True)
                    aux_channels = channels
                skips.append(channels)
            for i in range(num_blocks[level]):
                self.enc[f'{res}x{res}_block{i}'] = block(channels, width, level, attention=res in attn_resolutions)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths)))):
            if level == levels - 1:
                self.dec[f'{res}x{res}_in0'] = block(channels, channels, level, attention=True)
                self.dec[f'{res}x{res}_in1'] = block(channels, channels, level)
            else:
                self.dec[f'{res}x{res}_up'] = block(channels, channels, level, up=True)
            for i in range(num_blocks[level] + 1):
                attention = res in attn_resolutions and i == num_blocks[level]
                self.dec[f'{res}x{res}_block{i}'] = block(channels + skips.pop(), width, level, attention=attention)
                channels = width
        self.dec[f'{img_resolution}x{img_resolution}_aux_norm'] = group_norm(channels)
        self.dec[f'{img_resolution}x{img_resolution}_aux_conv'] = Conv2d(channels, out_channels, 3, init_scale=1e-5)

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
        for name, layer in self.dec.items():
            if name.endswith('_aux_norm'):
                x = F.silu(layer(x))
            elif name.endswith('_aux_conv'):
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if '_block' in name else x, emb)
        return x
