"""Every preset of every script, value by value, against what the papers and their published code set.

The tables are written down from those, not from PRESETS: networks with their numbers of parameters, dropout by
resolution and coupling, optimiser, average, noise levels, loss, mirroring, sampling. `ours` marks what no paper sets.
"""
import argparse
import json

import pytest
import torch

import unet
import vct
from conftest import SCRIPTS, Script

EDM, EDM2 = (f'https://nvlabs-fi-cdn.nvidia.com/{path}' for path in ('edm/pretrained', 'edm2/posthoc-reconstructions'))
RUN = set('''script dataset data_dir out seed precision compile microbatch gpus device labels inception fid_ref
    eval_every analyse checkpoint guidance'''.split())                         # how it is run; checkpoint: see init

RADAM, ADAM = dict(optimizer='RAdam', betas=[0.9, 0.999]), dict(optimizer='Adam', betas=[0.9, 0.99])
LION = dict(optimizer='Lion', betas=[0.9, 0.99])
COMMON = dict(arch='songunet', width=128, cond=False, flip=False, dropout_res=None, init='none', pretrain_steps=0,
              lr=1e-4, lr_decay=None, ema=0.9999, t_mid=0.821, P_mean=-1.1, P_std=2.0, nfe=[1],
              save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
GAP = dict(q=2.0, k=8.0, b=1.0, stages=8)                       # ECT's: r = t (1 - n(t) / q^(stage + 1)), 8 stages
LEVELS = dict(s0=10, s1=1280)                                   # iCT's: 10 to 1280 pairs of levels
DDPMPP = dict(mults=[2, 2, 2], blocks=4, attn_resolutions=[16])         # EDM's network for CIFAR-10
EDM2_S = dict(arch='edm2', width=192, mults=[1, 2, 3, 4], blocks=3, attn_resolutions=[16, 8], resolution=64, cond=True)
EDM2_RUN = ADAM | dict(lr=1e-3, lr_decay=2000, ema_std=0.1, dropout=0.4, dropout_res=16, t_mid=1.526)
EDM2_ECT = dict(P_mean=-0.8, P_std=1.6, q=4.0, stages=4, c=0.06, weighting='edm')

SHAPES = dict(resolution=16, width=32, mults=[1, 1, 2], blocks=1, attn_resolutions=[], dropout=0.0, cond=True, batch=32,
              optimizer='Adam', betas=[0.9, 0.999], lr=1e-3, lr_decay=100, ema=0.998, save_every=500, sample_every=200,
              fid_features='pixels', fid_num=2000)                                                              # ours

ECT = COMMON | GAP | DDPMPP | RADAM | dict(
    dropout=0.2, c=0.0, weighting='gap', batch=128, steps=400_000, ema_std=None, resolution=32,
    # SCT on top of it
    schedule='smooth', ref_size='all', phases=1, edges=None, eta=1.0, keep_ema=None)
SCT = {
    'shapes': (ECT | SHAPES | dict(steps=2400, pretrain_steps=300, stages=3), 855_299),
    'cifar10': (ECT | dict(init=f'{EDM}/edm-cifar10-32x32-uncond-vp.pkl'), 55_732_739),
    'fmnist': (ECT | dict(resolution=28, width=64, attn_resolutions=[14]), 13_952_897),                         # ours
    'folder': (ECT | dict(resolution=None), 55_732_739),                                                        # ours
    'imagenet64': (ECT | EDM2_S | EDM2_RUN | EDM2_ECT | dict(
        steps=100_000, ref_size='batch', init=f'{EDM2}/edm2-img64-s-1073741-0.075.pkl'), 280_209_253)}
for size, width, lr, count in [
        ('m', 256, 9e-4, 497_803_045), ('l', 320, 8e-4, 777_492_197), ('xl', 384, 7e-4, 1_119_276_709)]:
    SCT[f'imagenet64-{size}'] = SCT['imagenet64'][0] | dict(width=width, lr=lr, dropout=0.5, init='none'), count
for name, flags, changed in [                                   # a given decay wins; a shorter run has a shorter start
        ('imagenet64', '--ema 0.99', dict(ema=0.99, ema_std=None)),
        ('shapes', '--steps 1200', dict(steps=1200, pretrain_steps=150)),
        ('shapes', '--steps 20 --pretrain-steps 7', dict(steps=20, pretrain_steps=7)),
        ('shapes', '--steps 100000', dict(steps=100_000))]:
    SCT[f'{name} {flags}'] = SCT[name][0] | changed, SCT[name][1]

GC_ICT = COMMON | LEVELS | LION | dict(
    schedule='ict', coupling='gc', mu=0.5, endpoint='ema', ema_every=5, c=0.00054, q=None, stages=None, dropout=0.0,
    mults=[1, 2, 2], blocks=3, attn_resolutions=[], batch=512, steps=100_000, resolution=32, dropout_ic=0.3)
GC_ECT = GAP | RADAM | dict(schedule='ect', c=0.0, mu=0.3)
IMAGENET32 = GC_ICT | dict(mults=[1, 1, 2], blocks=[3, 5, 7], attn_resolutions=[16], steps=150_000, lr=8e-5,
                           dropout_ic=[0, 0.2, 0.2])
CELEBA64 = GC_ICT | dict(mults=[1, 2, 2, 2], blocks=[3, 3, 4, 5], steps=150_000, lr=8e-5, batch=128, resolution=64,
                         dropout_ic=[0, 0, 0.2, 0.2])
GC_FMNIST = GC_ICT | dict(resolution=28, width=64, batch=128)                                                   # ours
ECT_CIFAR = GC_ICT | GC_ECT | DDPMPP | dict(dropout=0.2, batch=128, steps=400_000)
GC_SHAPES = GC_ICT | SHAPES | dict(steps=2500, s1=40, mu=0.3, ema_every=1)
GC = {
    'shapes': (GC_SHAPES, 855_299),
    'shapes --schedule ect': (GC_SHAPES | GC_ECT | SHAPES | dict(pretrain_steps=300, stages=3), 855_299),
    'cifar10': (GC_ICT, 34_711_811), 'imagenet32': (IMAGENET32, 39_479_683), 'celeba64': (CELEBA64, 59_582_723),
    'fmnist': (GC_FMNIST, 8_690_561), 'folder': (GC_ICT | dict(resolution=None), 34_711_811),
    'cifar10 --schedule ect': (ECT_CIFAR | dict(init=f'{EDM}/edm-cifar10-32x32-uncond-vp.pkl'), 55_732_739),
    'imagenet32 --schedule ect': (IMAGENET32 | GC_ECT, 39_479_683),                                             # ours
    'celeba64 --schedule ect': (CELEBA64 | GC_ECT, 59_582_723),                                                 # ours
    'fmnist --schedule ect': (GC_FMNIST | GC_ECT, 8_690_561),                                                   # ours
    'folder --schedule ect': (ECT_CIFAR | dict(resolution=None), 55_732_739)}                                   # ours
for coupling in ('ic', 'ot'):                                   # the baselines have dropout, generated pairs none
    for name, dropout in ('cifar10', 0.3), ('imagenet32', [0, 0.2, 0.2]), ('celeba64', [0, 0, 0.2, 0.2]):
        settings, count = GC[name]
        GC[f'{name} --coupling {coupling}'] = settings | dict(coupling=coupling, dropout=dropout), count

VC = COMMON | GAP | LEVELS | RADAM | DDPMPP | dict(
    coupling='vc', encoder='small', encoder_width=32, kernel='ve', weighting='gap', clip=200.0, ema_std=None,
    resolution=32, steps=400_000, batch=128, dropout=0.2)
VC_ICT = VC | dict(base='ict', beta=30.0, huber='elementwise', c=0.00054)
VC_ECM = VC | dict(base='ecm', beta=10.0, huber='vector', c=0.0)
VC_FMNIST = dict(resolution=28, width=64, attn_resolutions=[])
FFHQ = dict(resolution=64, mults=[1, 2, 2, 2])
VC_IMAGENET = EDM2_S | EDM2_RUN | dict(encoder='big', kernel='li', steps=200_000, q=4.0)
VC_SHAPES = SHAPES | dict(steps=2400, encoder_width=16)
VCT = {
    'shapes': (VC_ECM | VC_SHAPES | dict(beta=3.0, stages=4, pretrain_steps=300), 855_299, 216_374),
    'shapes --base ict': (VC_ICT | VC_SHAPES | dict(s1=80), 855_299, 216_374),
    'cifar10': (VC_ICT | dict(dropout=0.3, batch=512, flip=True), 55_732_739, 1_562_246),
    'cifar10 --base ecm': (VC_ECM | dict(flip=True, init=f'{EDM}/edm-cifar10-32x32-uncond-vp.pkl'),
                           55_732_739, 1_562_246),
    'fmnist': (VC_ICT | VC_FMNIST | dict(dropout=0.3), 13_621_377, 1_525_826),
    'fmnist --base ecm': (VC_ECM | VC_FMNIST, 13_621_377, 1_525_826),                                           # ours
    'ffhq64': (VC_ECM | FFHQ | dict(init=f'{EDM}/edm-ffhq-64x64-uncond-vp.pkl'), 61_804_419, 1_772_070),
    'ffhq64 --base ict': (VC_ICT | FFHQ, 61_804_419, 1_772_070),                                                # ours
    'imagenet64': (VC_ECM | VC_IMAGENET | EDM2_ECT | dict(
        beta=90.0, init=f'{EDM2}/edm2-img64-s-1073741-0.075.pkl'), 280_209_253, 6_162_269),
    'imagenet64 --base ict': (VC_ICT | VC_IMAGENET, 280_209_253, 6_162_269),                                    # ours
    'folder': (VC_ICT | dict(dropout=0.3, batch=512, resolution=None), 55_732_739, 1_562_246),                  # ours
    'folder --base ecm': (VC_ECM | dict(resolution=None), 55_732_739, 1_562_246)}                               # ours
for coupling in ('independent', 'ot'):                          # not clipped, no encoder
    for base in ('', ' --base ecm'):
        settings, count, _ = VCT[f'cifar10{base}']
        VCT[f'cifar10{base} --coupling {coupling}'] = settings | dict(coupling=coupling, clip=0.0), count

TABLE = [(script, flags, *values) for script, table in [('sct', SCT), ('gc_ct', GC), ('vct', VCT)]
         for flags, values in table.items()]


def printed(script, flags, capsys):
    """What --dry-run prints, but for what is of the run."""
    assert Script(script).run(*f'--dataset {flags}'.split(), '--dry-run') == 0
    return {name: value for name, value in json.loads(capsys.readouterr().out).items() if name not in RUN}


def networks(script, settings, channels):
    """The network, and VCT's encoder or None, that the settings bring, without memory."""
    labels = (10 if settings['resolution'] == 16 else 1000) if settings['cond'] else 0          # shapes, ImageNet
    args = argparse.Namespace(**settings | dict(in_channels=channels, label_dim=labels,
                                                resolution=settings['resolution'] or 32))
    with torch.device('meta'):
        net = unet.make_network(args)
        return net, getattr(vct.add_encoder(net, args), 'encoder', None) if script == 'vct' else None


def parameters(net, without='encoder.'):
    return sum(p.numel() for name, p in net.named_parameters() if not name.startswith(without))


@pytest.mark.parametrize('script, flags, published, count, encoder', [(*row, None)[:5] for row in TABLE],
                         ids=[f'{row[0]} {row[1]}' for row in TABLE])
def test_preset(script, flags, published, count, encoder, capsys):
    pytest.importorskip('scipy') if 'ot' in flags.split() else None
    settings = printed(script, flags, capsys)
    differ = {name: (settings.get(name), published.get(name)) for name in settings | published
              if settings.get(name) != published.get(name)}
    assert not differ, f'(here, published): {differ}'
    net, small = networks(script, settings, 1 if 'fmnist' in flags else 3)
    assert parameters(net) == count and (small and parameters(small)) == encoder

    dropout, levels = settings['dropout'], len(settings['mults'])
    by_level = dropout if isinstance(dropout, list) else [dropout] * levels
    for part in [net] + [small] * bool(small):                  # by resolution; the encoder's is the network's
        for name, block in [*part.enc.items(), *part.dec.items()]:
            if hasattr(block, 'dropout'):
                res = int(name.split('x')[0])
                level = [part.img_resolution >> i for i in range(levels)].index(res)
                expected = 0.0 if settings['dropout_res'] and res > settings['dropout_res'] else by_level[level]
                assert block.dropout == expected, name


def test_every_preset_is_in_the_table():
    rows = {(script, flags) for script, flags, *_ in TABLE}
    for script in SCRIPTS:
        switch, presets = dict(sct=None, gc_ct='schedule', vct='base')[script], Script(script).module.PRESETS
        for key in presets:
            name, value = key if isinstance(key, tuple) else (key, None)
            usual = value is None or presets[name] == presets[key]
            assert (script, name if usual else f'{name} --{switch} {value}') in rows, (script, key)


def test_heads_have_64_channels_or_a_little_more(capsys):
    nets = networks('vct', printed('vct', 'imagenet64', capsys), 3)
    heads = [{getattr(block, 'heads', 0) for block in [*net.enc.values(), *net.dec.values()]} - {0} for net in nets]
    assert heads == [{9, 12}, {1, 2}] and nets[1].label_dim == 1000     # 576, 768 channels; the encoder's 96, 128
