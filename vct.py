"""Consistency training with variational noise coupling (VCT). Gianluigi Silvestri, Luca Ambrogioni, Chieh-Hsin Lai,
Yuhta Takida, Yuki Mitsufuji, 2025, https://arxiv.org/abs/2502.18197

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the
probability flow ODE through x_t ends. Consistency training asks that neighbours on one path agree, at levels r < t:

    x_t = x0 + t eps  (--kernel ve)   or   x_t = (1 - t/sigma_max) x0 + t eps  (--kernel li)
    loss = w(t, r) d( f(x_t, t), stopgrad f(x_r, r) ),   and f(x, m) = x

The image x0 and the noise eps are drawn independently (`--coupling independent`), so that the paths of different pairs
cross and the direction of each is only on average that of the ODE. Here a small encoder, trained with f, learns which
noise goes with which image, as in a variational autoencoder whose latent is the noise (`--coupling vc`):

    eps = mu(x0) + std(x0) n,   n ~ N(0, I)
    loss = w(t, r) d( ... ) + beta w(sigma_max, r_max) KL( N(mu(x0), std(x0)²) || N(0, I) )

where r_max is what sigma_max is paired with (EDM's weight counts as 1 there, as published). The KL term keeps the noise
of all images together near N(0, I), where sampling starts. `--coupling ot` pairs images and noise within each batch at
the least total distance instead (Pooladian et al. 2023, arXiv 2304.14772). Levels, d and w are those of improved
consistency training, which starts from scratch (`--base ict`, Song & Dhariwal 2023, arXiv 2310.14189), or of Easy
Consistency Tuning, which starts from a diffusion model (`--base ecm`, Geng et al. 2024, arXiv 2406.14548).

    python vct.py                                                 # ten shapes, some five minutes on two CPU cores
    python vct.py --dataset cifar10 --gpus 8                      # the paper's setting, from scratch
    python vct.py --dataset cifar10 --base ecm --gpus 8           # tuned from EDM's diffusion model
    python vct.py --sample runs/vct-shapes --nfe 2                # a grid of images
    python vct.py --evaluate runs/vct-cifar10 --nfe 1,2           # FID
    python vct.py --analyse runs/vct-shapes                       # the emitted noise, and its effect on the loss

Where the paper leaves a choice, and where we deviate from it or from the published code:
 1. With `--base ict` the distance is pseudo-Huber of every number, summed, as in the published code; beta = 30 belongs
    to it. iCT's paper takes the vector's (`--huber vector`), and so does the published code with `--base ecm`.
 2. The boundary m is sigma_min = 0.002, but 0 in ECM's training, so that a diffusion model is a valid start; the
    published code has 0.003 in ECM's sampling.
 3. The encoder has the network's multipliers and attention, 32 channels at multiplier 1, and no dropout: our reading.
 4. `--pretrain-steps` trains the diffusion model that ECM starts from in the same run, on independent noise; of the
    encoder's loss there is only the KL term then, so that tuning starts from noise that is independent.
 5. When sampling, noise after the first step is emitted by the encoder from what the step before gave, as in the
    published code; it does so for two steps, we also for more.
 6. `--coupling ot` assigns within the global minibatch, over all processes, and whatever the labels: with --cond the
    noise of a class is then not quite N(0, I).
 7. What is not known of the settings for Fashion-MNIST and FFHQ is as for CIFAR-10.
 8. `vc` clips the gradient at 200 and the others do not, as in the published code; it alone can make the difference.
 9. Sampling adds t z and not sqrt(t² - sigma_min²) z; the levels of more than two steps are spaced by rho 7.
10. No augmentation of the data, not even flips.
"""
import argparse
import copy
import functools
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import common
import fid
from unet import EDM2_WIDTHS, initial_network, make_network

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

VCT = dict(                     # what the two bases share
    arch='songunet', attn_resolutions=[16], dropout_res=None, checkpoint=None, lr_decay=None, ema_std=None,
    s0=10, s1=1280,             # ict: there are s0 pairs of levels at first and s1 in the end
    q=2.0, k=8.0, b=1.0,        # ecm: the gap between t and r, see `lower_level`
    stages=8,                   # ecm: the gap is divided by q so many times over the run
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and deviation (ict: at the levels of the discretisation)
    coupling='vc', encoder='small', kernel='ve', weighting='gap', clip=None,
    t_mid=0.821,                # noise level of the second step when sampling with two
    optimizer='RAdam', betas=(0.9, 0.999), lr=1e-4, ema=0.9999, pretrain_steps=0, cond=False,
    steps=400_000, save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
ICT = VCT | dict(base='ict', beta=30.0, huber='elementwise', c=0.00054)       # c times sqrt(D), for images of D numbers
ECM = VCT | dict(base='ecm', beta=10.0, huber='vector', c=0.0)
EDM_URL = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl'
FFHQ_URL = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-ffhq-64x64-uncond-vp.pkl'
EDM2_URL = 'https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/edm2-img64-s-1073741-0.075.pkl'
DDPMPP = dict(width=128, mults=[2, 2, 2], blocks=4, dropout=0.2, batch=128)
NETWORKS = {                    # and what else both bases have in common on a data set; --dry-run prints all merged
    'shapes': dict(             # built in; ours, sized for two CPU cores
        resolution=16, width=32, mults=[1, 1, 2], blocks=1, attn_resolutions=[], dropout=0.0, cond=True, batch=32,
        steps=1600, optimizer='Adam', lr=1e-3, lr_decay=100, ema=0.998,
        save_every=500, sample_every=200, eval_every=1600, fid_features='pixels', fid_num=2000),
    'fmnist': DDPMPP | dict(resolution=28, width=64, attn_resolutions=[14]),
    'cifar10': DDPMPP | dict(resolution=32),
    'ffhq64': DDPMPP | dict(resolution=64, mults=[1, 2, 2, 2]),
    'imagenet64': dict(         # EDM2-S
        arch='edm2', resolution=64, cond=True, width=EDM2_WIDTHS['S'], mults=[1, 2, 3, 4], blocks=3, batch=128,
        attn_resolutions=[16, 8], dropout=0.4, dropout_res=16, encoder='big', kernel='li', t_mid=1.526, steps=200_000,
        optimizer='Adam', betas=(0.9, 0.99), lr=1e-3, lr_decay=2000, ema_std=0.10),
    'folder': DDPMPP | dict(resolution=None)}                                   # your pictures
PRESETS = {(name, base['base']): base | network for name, network in NETWORKS.items() for base in (ICT, ECM)}
PRESETS['shapes', 'ict'] |= dict(s1=80)
PRESETS['shapes', 'ecm'] |= dict(beta=1.0, stages=3, pretrain_steps=600)
PRESETS['fmnist', 'ict'] |= dict(dropout=0.3)
for name in ('cifar10', 'folder'):
    PRESETS[name, 'ict'] |= dict(dropout=0.3, batch=512)
PRESETS['cifar10', 'ecm'] |= dict(checkpoint=EDM_URL)
PRESETS['ffhq64', 'ecm'] |= dict(checkpoint=FFHQ_URL)
PRESETS['imagenet64', 'ecm'] |= dict(
    beta=90.0, P_mean=-0.8, P_std=1.6, q=4.0, stages=4, c=0.06, weighting='edm', checkpoint=EDM2_URL)
PRESETS |= {name: PRESETS[name, base] for name, base in dict(
    shapes='ecm', fmnist='ict', cifar10='ict', ffhq64='ecm', imagenet64='ecm', folder='ict').items()}


# 2. Noise levels

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


def num_levels(step, steps, s0=10, s1=1280):
    """N(k): how many noise levels there are at a step; their number of gaps doubles from s0 to s1 (iCT Sec. 3.4)."""
    doubling = max(1, math.floor(steps / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (step // doubling), s1) + 1


def rho_levels(n, rho=7):
    """n + 1 levels from sigma_min to sigma_max, evenly spaced in sigma^(1/rho) (EDM Eq. 5)."""
    low, high = SIGMA_MIN ** (1 / rho), SIGMA_MAX ** (1 / rho)
    return [(low + i / n * (high - low)) ** rho for i in range(n + 1)]


def pair_probabilities(sigmas, P_mean, P_std):
    """Of each pair of neighbours: that ln sigma ~ N(P_mean, P_std²) is between them (iCT Sec. 3.5). (N,) -> (N - 1,)"""
    cdf = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))
    return cdf.diff() / (cdf[-1] - cdf[0])


@functools.lru_cache(maxsize=2)             # N changes a few times in a run: no copy to the device in any other step
def level_table(n, P_mean, P_std, device):
    """The n levels, ascending, and the cumulated probabilities of their n - 1 pairs, on the device."""
    sigmas = torch.tensor(rho_levels(n - 1))
    return sigmas.to(device), pair_probabilities(sigmas, P_mean, P_std).cumsum(0).float().to(device)


def level_pair(u, sigmas, cumulated):
    """Neighbours t = sigma_(i+1), r = sigma_i of uniform draws u (B,), by the inverse of `cumulated`. -> (B,) each"""
    i = torch.searchsorted(cumulated, u, right=True).clamp(max=len(sigmas) - 2)
    return sigmas[i + 1], sigmas[i]


def upper_level(normal, P_mean, P_std, kernel='ve'):
    """ECM's t of a standard normal draw: ln t ~ N(P_mean, P_std²), with `li` at most sigma_max. (B,) -> (B,)"""
    return (P_mean + P_std * normal).exp().clamp(max=SIGMA_MAX if kernel == 'li' else math.inf)


def lower_level(t, stage, q=2.0, k=8.0, b=1.0):
    """ECM's r < t of a pair: t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


# 3. Model

def f(net, x, t, y=None, m=0.0, kernel='ve'):
    """The consistency function: c_skip x + c_out F(c_in x, ln(t)/4, y) (EDM Eq. 7). Boundary condition: x at t = m.

    net is any function (x_in, c_noise, y) -> like x_in; x (B, C, H, W), t (B,), y (B,) labels or None -> (B, C, H, W).
    """
    s = SIGMA_DATA
    t4 = t[:, None, None, None]
    a, b = (1.0, 1.0) if kernel == 've' else (1 - t4 / SIGMA_MAX, 1 - (t4 - m) / (SIGMA_MAX - m))   # the share of x0
    c_skip = s ** 2 * b / ((t4 - m) ** 2 + s ** 2 * b ** 2)
    c_out = s * (t4 - m) / (s ** 2 * a ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (s ** 2 * a ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.log() / 4, y)


def add_encoder(net, args):
    """For `vc`, a small U-Net as part of the network: one optimiser, moving average and checkpoint for both. -> net"""
    if args.coupling == 'vc':
        small = dict(arch='songunet', width=32, blocks={'small': 1, 'big': 2}[args.encoder], dropout=0.0)
        net.encoder = make_network(argparse.Namespace(**vars(args) | small), out_channels=2 * args.in_channels)
    return net


# 4. Coupling: which noise goes with which image

def path(x0, eps, t, kernel='ve'):
    """x_t, on the way from image to noise. x0, eps (B, C, H, W), t (B,) -> (B, C, H, W)"""
    t4 = t[:, None, None, None]
    return (x0 if kernel == 've' else (1 - t4 / SIGMA_MAX) * x0) + t4 * eps


def encode(encoder, x0, y=None):
    """mu and std of the noise that goes with images x0 (B, C, H, W) of labels y (B,) or None. -> (B, C, H, W) each"""
    mu, raw = encoder(x0 / SIGMA_DATA, x0.new_zeros(len(x0)), y).chunk(2, dim=1)
    return mu, F.softplus(raw)


def kl_divergence(mu, std):
    """KL( N(mu, std²) || N(0, 1) ) of every number. (B, C, H, W) each -> (B, C, H, W)"""
    return (mu.square() + std.square() - 1) / 2 - std.log()


def emit(encoder, x0, n, y=None):
    """eps = mu + std n for n ~ N(0, I), and its KL divergence from N(0, I). x0, n (B, C, H, W) -> (B, C, H, W), (B,)

    Without an encoder mu is 0 and std is 1: independent noise.
    """
    if encoder is None:
        return n, n.new_zeros(len(n))
    mu, std = encode(encoder, x0, y)
    return mu + std * n, kl_divergence(mu, std).flatten(1).sum(1)


def optimal_transport(x0, z):
    """The order of images x0 (B, ...) whose pairs with z (B, ...) have the least sum of |x0 - sigma_max z|². -> (B,)

    The squares are the same in any order: the scale of z does not matter. The assignment is found on the host.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise common.UserError('--coupling ot needs SciPy: pip install scipy')
    with common.true_float32():
        gain = z.flatten(1) @ x0.flatten(1).T
    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]).to(x0.device)


# 5. Loss

def loss(net, x0, eps, t, r, y=None, teacher=None, mask=0, c=0.0, m=0.0, kernel='ve', huber='vector', weighting='gap'):
    """Consistency loss of each sample (iCT Eq. 7; at r = 0 ECM's, drawn to x0), and its distance alone. -> (B,), (B,)

    `mask` seeds the dropout: both networks drop the same units, so that their difference is not that of two masks.
    """
    r4 = r[:, None, None, None]
    torch.manual_seed(mask)
    student = f(net, path(x0, eps, t, kernel), t, y, m, kernel)
    with torch.no_grad():                                                       # stopgrad
        torch.manual_seed(mask)
        level = torch.where(r > 0, r, SIGMA_MIN)
        target = torch.where(r4 > 0, f(teacher or net, path(x0, eps, r, kernel), level, y, m, kernel), x0)
    distance = pseudo_huber(student - target, c, huber)
    return distance * (1 / (t - r) if weighting == 'gap' else edm_weight(t)), distance


def pseudo_huber(u, c, form='vector'):
    """sqrt(|u|² + c²) - c for u (B, C, H, W), |u| for c = 0; `elementwise` of every number of u, summed. -> (B,)"""
    u = u.flatten(1)
    size = u.abs() if form == 'elementwise' else torch.linalg.vector_norm(u, dim=1, keepdim=True)   # gradient 0 at 0
    return ((size.square() + c ** 2).sqrt() - c if c else size).sum(1)


def loss_settings(args):
    """What the flags say to `loss`. iCT's c grows with the root of an image's numbers (its Sec. 3.3), ECM's not."""
    c, m = (args.c * math.sqrt(args.in_channels) * args.resolution, SIGMA_MIN) if args.base == 'ict' else (args.c, 0.0)
    return dict(c=c, m=m, kernel=args.kernel, huber=args.huber, weighting=args.weighting)


def kl_weight(beta, t, r, weighting='gap'):
    """beta times the consistency loss's weight for the last pair, t = sigma_max and its r; EDM's weight is left out."""
    return beta / (t - r) if weighting == 'gap' else beta


def denoising_loss(net, x0, eps, t, y=None, mask=0, kernel='ve'):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), as a mean over the pixels. -> (B,)"""
    torch.manual_seed(mask)
    return edm_weight(t) * (f(net, path(x0, eps, t, kernel), t, y, kernel=kernel) - x0).square().flatten(1).mean(1)


def edm_weight(t):
    """lambda(t) = (t² + s²) / (t s)² (EDM Table 1). (B,) -> (B,)"""
    return (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2


# 6. Sampling

@torch.inference_mode()
def sample(model: torch.nn.Module, n: int, nfe: int = 1, labels: list[int] | None = None, seed: int = 0,
           first: int = 0) -> torch.Tensor:
    """n images in [-1, 1], (n, C, H, W), of `nfe` network evaluations; labels: classes, in turn from number `first` on.

    One step: f(sigma_max z, sigma_max). Each further one adds noise of a lower level and maps back (CM Alg. 1): fresh
    noise, or with an encoder the noise that it emits for the image so far.
    """
    config, device, images = model.config, next(model.parameters()).device, []
    net, kernel = common.network(model, config['precision'], device), config['kernel']
    encoder = common.network(model.encoder, config['precision'], device) if config['coupling'] == 'vc' else None
    y = common.choose_labels(n, labels, config['label_dim'], first)
    levels = rho_levels(nfe)[:0:-1]                                             # nfe of them, from sigma_max downwards
    if nfe == 2:
        levels[1] = config['t_mid']
    shape = (n, config['in_channels'], config['resolution'], config['resolution'])
    noise = [common.randn(shape, seed, i, 'sample') for i in range(nfe)]
    for part in common.progress(torch.arange(n).split(250), 'samples, 250 at a time'):
        y_part = None if y is None else y[part].to(device)
        x0_hat = 0.0
        for i, (level, z) in enumerate(zip(levels, noise)):
            t, eps = torch.full((len(part),), level, device=device), z[part].to(device)
            if i:
                eps, _ = emit(encoder, x0_hat, eps, y_part)
            x0_hat = f(net, path(x0_hat, eps, t, kernel), t, y_part, SIGMA_MIN, kernel)
        images.append(x0_hat.clamp(-1, 1))
    return torch.cat(images)


def load(path: str | Path, device: str | torch.device = 'cpu') -> torch.nn.Module:
    """The EMA network of a run (its folder, checkpoint.pt or final.pt), for `sample`; its settings are in `.config`."""
    return common.load_network(path, lambda args: add_encoder(make_network(args), args), device, apart=['encoder'])


# 7. Training

def train(args):
    """One run, from data to final.pt."""
    device = common.start(args)
    data = common.load_data(args).to(device)
    common.fit_to_data(args, data)                                      # sets resolution, in_channels, label_dim
    judge = fid.prepare(args, device, data)                             # now: what is missing is to be missed now

    net = add_encoder(initial_network(args, tunes=args.base == 'ecm'), args)
    net = net.to(device, memory_format=torch.channels_last)                     # channels last: convolutions run faster
    net.config = common.config_of(args)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    make_optimizer = lambda: getattr(torch.optim, args.optimizer)(              # foreach: few calls for all parameters
        net.parameters(), lr=args.lr, betas=tuple(args.betas), foreach=True)
    optimizer = make_optimizer()
    start = common.open_run(args, net=net, ema=ema, optimizer=optimizer)
    if args.compile:
        common.compile_in_place(net, *([net.encoder] if args.coupling == 'vc' else []))
    wrapped, clock = common.distributed(net), common.Clock(args, device)
    watch = lambda module, part: clock.watch(common.network(module, args.precision, device), part)
    student, teacher = watch(wrapped, 'student'), watch(net, 'teacher')
    encoder = watch(net.encoder, 'encoder') if args.coupling == 'vc' else None
    mine = common.my_part(args.batch)
    log, draw = common.Log(args, start, device), functools.partial(sample, ema, labels=args.labels)

    if args.benchmark:
        start = args.pretrain_steps                                             # tuning, not its start, is timed
    batches = common.batches(data, args, start, device)
    for step in range(start, start + args.benchmark + 3 if args.benchmark else args.steps):
        if step == args.pretrain_steps > 0:                                     # tuning starts as from a checkpoint
            net.load_state_dict(ema.state_dict())
            optimizer = make_optimizer()

        clock('log')
        if clock.next_step(net.parameters()):
            return

        # Draws. Made for the global batch, so that any number of processes trains on the same ones.
        index, x_all, y_all = next(batches)
        normal = lambda stream, *shape: common.randn((args.batch, *shape), args.seed, step, stream, device=device)
        z_all = normal('noise', *x_all.shape[1:])
        pretraining = step < args.pretrain_steps
        done, total_steps = step - args.pretrain_steps * (not pretraining), args.steps - args.pretrain_steps
        if pretraining:
            t = r = upper_level(normal('level'), -1.2, 1.2, args.kernel)[mine]  # EDM Table 1
        elif args.base == 'ict':
            table = level_table(num_levels(done, total_steps, args.s0, args.s1), args.P_mean, args.P_std, device)
            t, r = level_pair(common.rand((args.batch,), args.seed, step, 'level', device=device)[mine], *table)
            last_pair = table[0][-1], table[0][-2]                      # sigma_max and r_max, for the KL's weight
        else:
            t = upper_level(normal('level'), args.P_mean, args.P_std, args.kernel)[mine]
            stage = min(done * args.stages // max(total_steps, 1), args.stages - 1)
            lower = lambda t: lower_level(t, stage, args.q, args.k, args.b)
            r, last_pair = lower(t), (SIGMA_MAX, lower(torch.tensor(SIGMA_MAX)).item())
        clock('data')

        # Coupling.
        if args.coupling == 'ot' and not pretraining:
            order = optimal_transport(x_all, z_all)
            x_all, y_all = x_all[order], None if y_all is None else y_all[order]    # labels travel with their images
        x0, z, y = x_all[mine], z_all[mine], None if y_all is None else y_all[mine]
        clock('coupling')

        # Loss and gradient.
        total = torch.zeros(3, device=device)
        for i, part in enumerate(common.microbatches(wrapped, len(x0), args.microbatch)):
            mask = common.key(args.seed, step, 'dropout', common.rank(), i)
            y_part = None if y is None else y[part]
            eps, kl = emit(encoder, x0[part], z[part], y_part)
            if pretraining:
                value = distance = denoising_loss(student, x0[part], z[part], t[part], y_part, mask, args.kernel)
                value = value + kl / x0[0].numel()                          # the encoder begins as independent noise
            else:
                value, distance = loss(student, x0[part], eps, t[part], r[part], y_part, teacher, mask,
                                       **loss_settings(args))
                value = value + kl_weight(args.beta, *last_pair, args.weighting) * kl
            clock('loss')
            (value.sum() * common.LOSS_SCALE.get(args.precision, 1.0) / len(x0)).backward()
            total += torch.stack([value, distance, kl]).detach().sum(1) / len(x0)
            clock('backward')

        # Update.
        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        if args.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip, foreach=True)
        common.learning_rate(optimizer, done, args.lr, args.lr_decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock('optimiser')
        common.update_ema(ema, net, common.ema_decay(done + 1, args.ema, args.ema_std))
        clock('EMA')
        log.step(step + 1, loss=total[0], consistency=total[1], kl=total[2], grad_norm=grad_norm)
        if log.due(step + 1, args.eval_every) and log.evaluated(step + 1, fid.evaluate(judge, args, draw)):
            common.save_final(args, ema, 'best', apart=['encoder'])
        if log.due(step + 1, args.sample_every) and common.rank() == 0:
            common.save_progress(args, step + 1, sample(ema, 64, seed=args.seed), log)
        if log.due(step + 1, args.save_every) or log.stop:
            common.save_checkpoint(args, step + 1, net=net, ema=ema, optimizer=optimizer)
        if log.stop:
            return
    common.save_final(args, ema, apart=['encoder'])


# 8. What the encoder does

@torch.inference_mode()
def diagnostics(net, encoder, x0, y, t, r, draws, **settings):
    """The consistency loss with emitted and independent noise, for each pair of levels. -> {name: [(mean, variance)]}

    x0 (B, C, H, W), y (B,) or None; t, r: lists of levels; draws: several tensors n like x0; settings: those of `loss`.
    The variance is over the draws, at a fixed image and pair of levels, and then averaged over the images.
    """
    results = {}
    noise = {'emitted': [emit(encoder, x0, n, y)[0] for n in draws], 'independent': draws}
    for pair in common.progress(list(zip(t, r)), 'noise levels'):
        levels = [x0.new_full((len(x0),), level) for level in pair]
        for name in noise:
            losses = torch.stack([loss(net, x0, eps, *levels, y, **settings)[0] for eps in noise[name]])    # (draws, B)
            results.setdefault(name, []).append((losses.mean().item(), losses.var(0).mean().item()))
    return results


@torch.inference_mode()
def analyse(args, model, device):
    """Prints KL and the loss of 64 images by noise level, and draws what the encoder emits, in `analyse.png`.

    Its rows: images, mu of their noise (0 is grey), std (1 is grey, 2 is white), KL (0 is black, the highest white).
    """
    if args.coupling != 'vc':
        raise common.UserError(f'--analyse {args.use}: that run has no encoder (--coupling vc)')
    data = common.load_data(args).to(device)
    net, encoder = (common.network(module, args.precision, device) for module in (model, model.encoder))
    x0, y = data.at(common.batch_indices(len(data.images), 64, 0, args.seed), device)
    mu, std = encode(encoder, x0, y)
    kl = kl_divergence(mu, std)
    spread = lambda x: x / x.abs().max()
    rows = [x0, spread(mu), (std - 1).clamp(-1, 1), 2 * spread(kl.mean(1, keepdim=True)).expand_as(x0) - 1]
    common.say(f'KL {kl.flatten(1).sum(1).mean():.4g} nats an image, {kl.mean():.4g} a number; '
               f'mu {mu.square().mean().sqrt():.3g} (root mean square), std {std.mean():.3g} (mean)')

    if args.base == 'ict':
        sigmas = rho_levels(num_levels(args.steps, args.steps, args.s0, args.s1) - 1)
        places = [round(share * (len(sigmas) - 2) / 8) for share in range(9)]
        t, r = [sigmas[i + 1] for i in places], [sigmas[i] for i in places]
    else:
        t = rho_levels(9)[1:]
        r = lower_level(torch.tensor(t), args.stages - 1, args.q, args.k, args.b).tolist()
    draws = [common.randn(x0.shape, args.seed, i, 'analyse', device=device) for i in range(8)]
    found = diagnostics(net, encoder, x0, y, t, r, draws, **loss_settings(args))
    common.say(f'{"mean of the loss":>36}{"its variance over noise":>26}')
    common.say('   sigma  ' + 2 * ''.join(f'{name:>13}' for name in found))
    for i, sigma in enumerate(t):
        common.say(f'{sigma:8.4g}  ' + ''.join(f'{found[name][i][which]:13.4g}' for which in (0, 1) for name in found))
    grid = torch.cat([row[:8] for row in rows])
    common.save_picture(args, 'analyse.png', lambda path: common.save_grid(grid, path, columns=8))


# 9. Command line

def add_flags(parser):
    """The flags that are VCT's own."""
    number = common.number
    add = parser.add_argument_group('method', 'python vct.py --base ecm --coupling vc --beta 10').add_argument
    add('--base', choices=['ict', 'ecm'], help='from scratch on ever more levels, or tuning with ever smaller gaps')
    add('--kernel', choices=['ve', 'li'], help='path from image to noise: x0 + t eps, or (1 - t/sigma_max) x0 + t eps')
    add('--coupling', choices=['independent', 'ot', 'vc'], help='of image and noise')
    add('--encoder', choices=['small', 'big'], help='vc: one or two residual blocks per resolution')
    add('--beta', type=number(float, 0), metavar='X', help='vc: weight of the KL term, over the last pair of levels')
    add('--huber', choices=['elementwise', 'vector'], help='pseudo-Huber distance: of every number, or of the vector')
    add('--clip', type=number(float, 0), metavar='X', help='longest gradient, 0: any; 200 for vc if not given')
    add('--s0', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels at first')
    add('--s1', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels in the end')
    add('--q', type=number(float, 1.001), metavar='X', help='ecm: what the gap is divided by from stage to stage')
    add('--stages', type=number(int, 1, 64), metavar='N', help='ecm: stages of the shrinking, over the run')
    add('--ema-std', type=number(float, 0.01, 0.25), metavar='X', help='power-function average of this relative width')
    add('--analyse', metavar='CKPT', help='draw the noise that the encoder emits; print KL and loss by noise level')


def main(argv):
    """`python vct.py`: trains, or with --sample / --evaluate / --analyse uses what was trained."""
    args = common.parse_args('vct', __doc__, PRESETS, add_flags, argv, switch='base')
    if args.clip is None:
        args.clip = 200.0 if args.coupling == 'vc' else 0.0
    if args.s1 < args.s0:
        raise common.UserError(f'--s1 {args.s1} is less than --s0 {args.s0}')
    if args.coupling == 'ot':
        optimal_transport(torch.zeros(1, 1), torch.zeros(1, 1))                 # is SciPy there?
    if args.base == 'ecm' and (args.stages + 1) * math.log(args.q) > math.log(1e6):
        raise common.UserError(f'--q {args.q} --stages {args.stages}: t and r would end up equal in float32')
    args.nfe = args.nfe or [1]
    if args.dry_run:
        return common.say(json.dumps(common.config_of(args), indent=2))
    if not args.use:
        return train(args)
    device = common.start(args)
    model = load(args.use, device)
    model.config['precision'] = args.precision
    draw = functools.partial(sample, model, labels=args.labels)
    if args.analyse:
        return analyse(args, model, device)
    if args.sample:
        return common.save_samples(args, draw)
    fid.evaluate(fid.prepare(args, device), args, draw)


if __name__ == '__main__':
    sys.exit(common.run(main))
