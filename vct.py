"""Consistency training with variational noise coupling (VCT). Gianluigi Silvestri, Luca Ambrogioni, Chieh-Hsin Lai,
Yuhta Takida, Yuki Mitsufuji, 2025, https://arxiv.org/abs/2502.18197

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the
probability flow ODE through x_t ends. Consistency training asks that neighbours on one path agree, at levels r < t:

    x_t = x0 + t eps  (--kernel ve)   or   x_t = (1 - t/sigma_max) x0 + t eps  (--kernel li)
    loss = w(t, r) d( f(x_t, t), stopgrad f(x_r, r) ),   w = 1 / (t - r) or EDM's,   and f(x, m) = x

The image x0 and the noise eps are drawn independently (`--coupling independent`), so that the paths of different pairs
cross and the direction of each is only on average that of the ODE. Here a small encoder, trained with f, learns which
noise goes with which image, as in a variational autoencoder whose latent is the noise (`--coupling vc`):

    eps = mu(x0) + std(x0) n,   n ~ N(0, I)
    loss = w(t, r) d( ... ) + beta w(sigma_max, r_max) KL( N(mu(x0), std(x0)²) || N(0, I) )

where sigma_max is paired with r_max: the noise of all images together stays near N(0, I), where sampling starts. The
levels, d and w are those of improved consistency training, from scratch (`--base ict`, Song & Dhariwal 2023, arXiv
2310.14189), or of Easy Consistency Tuning, from a diffusion model (`--base ecm`, Geng et al. 2024, arXiv 2406.14548).

    python vct.py                                                 # ten shapes, some five minutes on two CPU cores
    python vct.py --dataset cifar10 --gpus 8                      # the paper's, from scratch; --base ecm: tuning
    python vct.py --sample runs/vct-shapes --nfe 2                # or --evaluate (FID), --analyse (variances)

Where the paper leaves a choice, and where we deviate from it or its published code (`[n]` in the code):
[1] As published: with ict pseudo-Huber is of every number (iCT: of the vector), and EDM's weight counts as 1 for KL.
[2] `--coupling ot` (Pooladian et al. 2023, arXiv 2304.14772) pairs images and noise of the global minibatch at the
    least total distance, whatever the labels. The published sampler, unlike this one, so pairs its first output, too.
[3] As published, the encoder is a network of the same kind and settings, dropout included, 32 wide at multiplier 1
    (16 on shapes), and in sampling it emits the noise of every step after the first.
[4] `--pretrain-steps` trains ECM's diffusion model first, with EDM's ramp of the average, and the encoder by KL alone.
[5] The boundary m is 0.002, but 0 in ECM's training (a diffusion model is a valid start); published: 0.003 in sampling,
    which here adds t z, not sqrt(t² - sigma_min²) z; more than two levels are spaced by rho 7.
[6] `vc` clips the gradient at 200 and the others do not, as in the published code; that alone may tell them apart.
[7] ImageNet-64 has the power-function average (EDM2 App. C). The published code has it the wrong way round, so that
    its figures are of practically raw weights: `--ema 0` gives those. The kernel `li` is called `cot` there.
[8] FID is of the last average, rounded, in equal shares of the classes; the published one is the best of the run
    (of two steps), of samples truncated to 8 bits, their classes drawn at random.
"""
import argparse
import copy
import functools
import math
import sys

import torch

import common
import fid
from unet import EDM2_WIDTHS, URLS, initial_network, make_network

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

VCT = dict(                     # what the two bases share; the network is DDPM++
    arch='songunet', width=128, mults=[2, 2, 2], blocks=4, attn_resolutions=[16], dropout=0.2, dropout_res=None,
    coupling='vc', encoder='small', encoder_width=32, kernel='ve', weighting='gap', checkpoint=None, pretrain_steps=0,
    s0=10, s1=1280, q=2.0, k=8.0, b=1.0, stages=8,      # ict: see `num_levels`; ecm: see `lower_level`, `stage_at`
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and standard deviation (ict: at the discrete levels)
    clip=None,                  # longest gradient; None: 200 with vc, any without                                  [6]
    t_mid=0.821,                # noise level of the second step when sampling with two
    optimizer='RAdam', betas=[0.9, 0.999], lr=1e-4, lr_decay=None, ema=0.9999, ema_std=None, batch=128, steps=400_000,
    cond=False, flip=False, nfe=[1], save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
ICT = VCT | dict(base='ict', beta=30.0, huber='elementwise', c=0.00054)   # c times sqrt(D), for images of D numbers [1]
ECM = VCT | dict(base='ecm', beta=10.0, huber='vector', c=0.0)
SHAPES = dict(                  # built in; ours, sized for two CPU cores
    resolution=16, width=32, mults=[1, 1, 2], blocks=1, attn_resolutions=[], dropout=0.0, cond=True, batch=32,
    encoder_width=16, steps=2400, optimizer='Adam', lr=1e-3, lr_decay=100, ema=0.998, save_every=500, sample_every=200,
    eval_every=2400, fid_features='pixels', fid_num=2000)
FMNIST = dict(resolution=28, width=64, attn_resolutions=[])
IMAGENET = dict(                # EDM2-S
    arch='edm2', resolution=64, cond=True, width=EDM2_WIDTHS['S'], mults=[1, 2, 3, 4], blocks=3, encoder='big',
    attn_resolutions=[16, 8], dropout=0.4, dropout_res=16, kernel='li', t_mid=1.526, q=4.0, steps=200_000,
    optimizer='Adam', betas=[0.9, 0.99], lr=1e-3, lr_decay=2000, ema_std=0.10)                                  # [7]
PRESETS = {                     # by data set and base
    ('shapes', 'ict'): ICT | SHAPES | dict(s1=80),
    ('shapes', 'ecm'): ECM | SHAPES | dict(beta=3.0, stages=4, pretrain_steps=300),
    ('fmnist', 'ict'): ICT | FMNIST | dict(dropout=0.3),
    ('fmnist', 'ecm'): ECM | FMNIST,                                                                            # ours
    ('cifar10', 'ict'): ICT | dict(resolution=32, flip=True, dropout=0.3, batch=512),
    ('cifar10', 'ecm'): ECM | dict(resolution=32, flip=True, checkpoint=URLS['cifar10']),
    ('ffhq64', 'ict'): ICT | dict(resolution=64, mults=[1, 2, 2, 2]),                                           # ours
    ('ffhq64', 'ecm'): ECM | dict(resolution=64, mults=[1, 2, 2, 2], checkpoint=URLS['ffhq64']),
    ('imagenet64', 'ict'): ICT | IMAGENET,                                                                      # ours
    ('imagenet64', 'ecm'): ECM | IMAGENET | dict(
        beta=90.0, P_mean=-0.8, P_std=1.6, stages=4, c=0.06, weighting='edm', checkpoint=URLS['imagenet64']),
    ('folder', 'ict'): ICT | dict(resolution=None, dropout=0.3, batch=512),                             # your pictures
    ('folder', 'ecm'): ECM | dict(resolution=None)}
PRESETS |= {name: PRESETS[name, 'ict'] for name in ('fmnist', 'cifar10', 'folder')}             # the usual bases
PRESETS |= {name: PRESETS[name, 'ecm'] for name in ('shapes', 'ffhq64', 'imagenet64')}


# 2. Noise levels: the pair t > r of a sample

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


def num_levels(step, steps, s0=10, s1=1280):
    """N(k): how many noise levels there are at a step; their number of gaps doubles from s0 to s1 (iCT Sec. 3.4)."""
    doubling = max(1, math.floor(steps / (math.log2(s1 // s0) + 1)))
    return min(s0 * 2 ** (step // doubling), s1) + 1


def rho_levels(n, rho=7):
    """n + 1 levels from sigma_min to sigma_max, evenly spaced in sigma^(1/rho) (EDM Eq. 5)."""
    low, high = SIGMA_MIN ** (1 / rho), SIGMA_MAX ** (1 / rho)
    return [(low + i / n * (high - low)) ** rho for i in range(n + 1)]


@functools.lru_cache(maxsize=2)             # N changes a few times in a run: no copy to the device in any other step
def level_table(n, P_mean, P_std, device='cpu'):
    """n levels, ascending, and the cumulative probability of their pairs (n - 1,), on the device."""
    sigmas = torch.tensor(rho_levels(n - 1))
    return sigmas.to(device), pair_probabilities(sigmas, P_mean, P_std).cumsum(0).float().to(device)


def pair_probabilities(sigmas, P_mean, P_std):
    """How often each pair of neighbours is trained on: ln sigma ~ N(P_mean, P_std²) (iCT Sec. 3.5). (n,) -> (n - 1,)"""
    cdf = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))
    return cdf.diff() / (cdf[-1] - cdf[0])


def level_pair(u, sigmas, cumulative):
    """Neighbours t = sigma_(i+1), r = sigma_i for uniform u (B,), by the inverse of their distribution. -> (B,) each"""
    i = torch.searchsorted(cumulative, u, right=True).clamp(max=len(sigmas) - 2)
    return sigmas[i + 1], sigmas[i]


def upper_level(normal, P_mean, P_std, kernel='ve'):
    """ECM's t of a standard normal draw: ln t ~ N(P_mean, P_std²), with `li` at most sigma_max. (B,) -> (B,)"""
    return (P_mean + P_std * normal).exp().clamp(max=SIGMA_MAX if kernel == 'li' else math.inf)


def lower_level(t, stage, q=2.0, k=8.0, b=1.0):
    """ECT's r < t of a pair: t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


def stage_at(step, steps, stages):
    """The stage that `lower_level` takes at a step of tuning: 0 ... stages - 1."""
    return min(step * stages // max(steps, 1), stages - 1)


def level_pairs(args, step, device):
    """t and r of the global batch of a step. -> (B,) each"""
    done, steps = step - args.pretrain_steps, args.steps - args.pretrain_steps
    if args.base == 'ict' and done >= 0:
        table = level_table(num_levels(done, steps, args.s0, args.s1), args.P_mean, args.P_std, device)
        return level_pair(common.rand((args.batch,), args.seed, step, 'level', device=device), *table)
    normal = common.randn((args.batch,), args.seed, step, 'level', device=device)
    if done < 0:
        t = upper_level(normal, -1.2, 1.2, args.kernel)     # EDM Tab. 1 for the diffusion model, which has no pairs
        return t, t
    t = upper_level(normal, args.P_mean, args.P_std, args.kernel)
    return t, lower_level(t, stage_at(done, steps, args.stages), args.q, args.k, args.b)


# 3. Model: the consistency function f, and the encoder

def f(net, x, t, y=None, m=0.0, kernel='ve'):
    """c_skip x + c_out F(c_in x, ln(t)/4, y) (EDM Eq. 7), which is x at t = m. x (B, C, H, W), t, y (B,) -> like x"""
    t4 = t[:, None, None, None]                                         # to go with images
    a, b = 1.0, 1.0                                                     # share of x0 in x_t; the same, but 1 at t = m
    if kernel == 'li':
        a, b = 1 - t4 / SIGMA_MAX, 1 - (t4 - m) / (SIGMA_MAX - m)
    c_skip = SIGMA_DATA ** 2 * b / ((t4 - m) ** 2 + SIGMA_DATA ** 2 * b ** 2)
    c_out = SIGMA_DATA * (t4 - m) / (SIGMA_DATA ** 2 * a ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (SIGMA_DATA ** 2 * a ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.clamp(min=1e-10).log() / 4, y)          # at t = 0, c_out is 0: f is x


def add_encoder(net, args):
    """For `vc`, a U-Net of the same kind and settings, but for width and blocks [3], within net: one EMA for both."""
    if args.coupling == 'vc':
        small = dict(width=args.encoder_width, blocks={'small': 1, 'big': 2}[args.encoder])
        net.encoder = make_network(argparse.Namespace(**vars(args) | small), out_channels=2 * args.in_channels)
    return net


# 4. Coupling: which image goes with which noise

def path(x0, eps, t, kernel='ve'):
    """x_t of the kernel: x0 + t eps, or with `li` (1 - t/sigma_max) x0 + t eps. (B, C, H, W), t (B,) -> (B, C, H, W)"""
    t4 = t[:, None, None, None]
    return (x0 if kernel == 've' else (1 - t4 / SIGMA_MAX) * x0) + t4 * eps


def encode(encoder, x0, y=None):
    """mu and std of the noise that goes with images x0 (B, C, H, W) of labels y (B,) or None. -> (B, C, H, W) each"""
    mu, raw = encoder(x0 / SIGMA_DATA, x0.new_zeros(len(x0)), y).chunk(2, dim=1)
    return mu, torch.nn.functional.softplus(raw)


def kl_divergence(mu, std):
    """KL( N(mu, std²) || N(0, 1) ) of every number. (B, C, H, W) each -> (B, C, H, W)"""
    return (mu.square() + std.square() - 1) / 2 - std.log()


def emit(encoder, x0, n, y=None):
    """eps = mu + std n, n ~ N(0, I) like x0, and its KL divergence (B,); without an encoder n and 0."""
    if encoder is None:
        return n, n.new_zeros(len(n))
    mu, std = encode(encoder, x0, y)
    return mu + std * n, kl_divergence(mu, std).flatten(1).sum(1)


def optimal_transport(x0, eps):
    """The order (B,) of x0 (B, ...) whose pairs with eps (B, ...) have the least sum of |x0 - sigma_max eps|² [2]."""
    with common.or_refuse('--coupling ot needs SciPy: pip install scipy'):
        from scipy.optimize import linear_sum_assignment
    with common.true_float32():
        gain = eps.flatten(1) @ x0.flatten(1).T         # the squares are the same in any order, whatever eps's scale
    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1]).to(x0.device)


# 5. Loss: the distance of f(x_t, t) from the target stop-gradient f(x_r, r), weighted

def edm_weight(t):
    """lambda(t) = (t² + sigma_data²) / (t sigma_data)² (EDM Tab. 1). (B,) -> (B,)"""
    return (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2


def pseudo_huber(u, c, huber='vector'):
    """sqrt(|u|² + c²) - c of each sample (iCT Sec. 3.3), or the sum of every number's own [1]. (B, C, H, W) -> (B,)"""
    u = u.flatten(1)
    size = u.abs() if huber == 'elementwise' else torch.linalg.vector_norm(u, dim=1, keepdim=True)
    return ((size.square() + c ** 2).sqrt() - c if c else size).sum(1)              # the norm's gradient at 0 is 0


def loss(net, x_t, t, x_r, r, y=None, teacher=None, seed=0, c=0.0, m=0.0, kernel='ve', huber='vector', weighting='gap'):
    """Consistency loss of each sample (iCT Eq. 7; with ECM r may be 0 = m). x_t, x_r (B, C, H, W), t, r (B,) -> (B,)"""
    torch.manual_seed(seed)                                             # dropout: the same units in both
    student = f(net, x_t, t, y, m, kernel)
    with torch.no_grad():                                               # stop-gradient: a teacher of the same weights
        torch.manual_seed(seed)
        target = f(teacher or net, x_r, r, y, m, kernel)
    distance = pseudo_huber(student - target, c, huber)
    return distance * (1 / (t - r) if weighting == 'gap' else edm_weight(t))


def loss_settings(args):
    """What the flags say to `loss`: c, in iCT times the root of an image's numbers (its Sec. 3.3), boundary m [5]."""
    settings = dict(c=args.c, m=0.0, kernel=args.kernel, huber=args.huber, weighting=args.weighting)
    if args.base == 'ict':
        settings |= dict(c=args.c * math.sqrt(args.in_channels) * args.resolution, m=SIGMA_MIN)
    return settings


def kl_weight(beta, t, r, weighting='gap'):
    """beta w(sigma_max, r_max), the weight of the KL term: t and r are that last pair; EDM's weight counts as 1 [1]."""
    return beta / (t - r) if weighting == 'gap' else beta


def kl_share(args, step, device):
    """`kl_weight` at a step; in pretraining, as the denoiser's loss, one over an image's numbers [4]."""
    done, steps = step - args.pretrain_steps, args.steps - args.pretrain_steps
    if done < 0:
        return 1 / (args.in_channels * args.resolution ** 2)
    if args.base == 'ict':
        sigmas, _ = level_table(num_levels(done, steps, args.s0, args.s1), args.P_mean, args.P_std, device)
        return kl_weight(args.beta, sigmas[-1], sigmas[-2], args.weighting)
    r_max = lower_level(torch.tensor(SIGMA_MAX), stage_at(done, steps, args.stages), args.q, args.k, args.b).item()
    return kl_weight(args.beta, SIGMA_MAX, r_max, args.weighting)


def denoising_loss(net, x_t, t, x0, y=None, seed=0, kernel='ve'):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), as a mean over the pixels [4]. -> (B,)"""
    torch.manual_seed(seed)
    return edm_weight(t) * (f(net, x_t, t, y, kernel=kernel) - x0).square().flatten(1).mean(1)


# 6. Sampling

@torch.inference_mode()
def sample(model, n, nfe=1, labels=None, seed=0, first=0):
    """n images in [-1, 1], (n, C, H, W), of `nfe` network evaluations; labels: classes, in turn from number `first` on.

    One step: f(sigma_max z, sigma_max). Each further one adds noise of a lower level and maps back (CM Alg. 1): fresh
    noise, or with an encoder the noise that it emits for the image so far [3].
    """
    config, images = model.config, []
    net = common.network(model, config['precision'])
    encoder = common.network(model.encoder, config['precision']) if config['coupling'] == 'vc' else None
    levels = rho_levels(nfe)[nfe:0:-1]                                  # nfe of them, from sigma_max downwards     [5]
    if nfe == 2:
        levels[1] = config['t_mid']
    for noise, y in common.sampling_noise(model, n, nfe, labels, seed, first):                                  # [8]
        x0_hat = torch.zeros_like(noise[0])
        for i, (level, z) in enumerate(zip(levels, noise)):
            t = torch.full_like(z[:, 0, 0, 0], level)
            eps, _ = emit(encoder if i else None, x0_hat, z, y)
            x0_hat = f(net, path(x0_hat, eps, t, config['kernel']), t, y, SIGMA_MIN, config['kernel'])
        images.append(x0_hat.clamp(-1, 1))
    return torch.cat(images)


load = functools.partial(common.load_network, lambda args: add_encoder(make_network(args), args))


# 7. Training

def ema_decay(args, step):
    """Decay of the moving average after a step, counted from 0: --ema, or the power function's of --ema-std."""
    if step < args.pretrain_steps:              # EDM's ramp [4]: a half-life of 5 % of the images so far
        return min(args.ema, 0.5 ** (20 / (step + 1)))
    if args.ema_std is None:
        return args.ema
    return common.power_function_decay(step - args.pretrain_steps, args.ema_std)


def train(args):
    """One run, from data to final.pt."""
    device = common.start(args)
    data = common.load_data(args, device)                               # sets resolution, in_channels, label_dim
    net = initial_network(args, device, tunes=args.base == 'ecm')
    net = add_encoder(net, args).to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    sample_fn = functools.partial(sample, ema, labels=args.labels)
    optimizer = common.make_optimizer(args, net)
    evaluate = functools.partial(fid.evaluate, fid.prepare(args, device, data), args, sample_fn)    # fail early
    start = common.open_run(args, net=net, ema=ema, optimizer=optimizer)
    common.compile_in_place(args, net, ema)
    wrapped = common.distributed(net, args)
    student, teacher = (common.network(one, args.precision) for one in (wrapped, net))
    encoder = common.network(net.encoder, args.precision) if args.coupling == 'vc' else None
    clock, log, mine = common.Clock(args, device), common.Log(args, start, device), common.rank_slice(args.batch)
    settings = loss_settings(args)

    for step in clock.steps(start):
        pretraining = step < args.pretrain_steps
        done = step if pretraining else step - args.pretrain_steps
        if step == args.pretrain_steps and step > 0:                    # continue from the average, fresh optimiser
            net.load_state_dict(ema.state_dict())
            optimizer.state.clear()

        # Draws, of the global batch: the same for any number of processes (but for the dropout masks).
        index = common.batch_indices(len(data.images), args.batch, step, args.seed)
        x_all, y_all = data.at(index, device)
        if args.flip:
            x_all = common.mirror(x_all, args.seed, step, 'flip')
        eps_all = common.randn(x_all.shape, args.seed, step, 'noise', device=device)
        t, r = (level[mine] for level in level_pairs(args, step, device))

        if args.coupling == 'ot' and not pretraining:
            order = optimal_transport(x_all, eps_all)
            x_all, y_all = x_all[order], y_all[order]                   # labels travel with their images
        x0, y, eps = x_all[mine], y_all[mine], eps_all[mine]

        total = torch.zeros(3, device=device)
        for part, seed in common.microbatches(wrapped, args, step, clock):
            torch.manual_seed(common.key(seed, 'encoder'))              # the encoder's own dropout
            emitted, kl = emit(encoder, x0[part], eps[part], y[part])
            noise = eps[part] if pretraining else emitted                                                       # [4]
            x_t, x_r = path(x0[part], noise, t[part], args.kernel), path(x0[part], noise, r[part], args.kernel)
            if pretraining:
                value = denoising_loss(student, x_t, t[part], x0[part], y[part], seed, args.kernel)
            else:
                value = loss(student, x_t, t[part], x_r, r[part], y[part], teacher, seed, **settings)
            values = torch.stack([value + kl_share(args, step, device) * kl, value, kl])
            total += common.backward(values, len(x0), args.precision, clock)

        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip or 1e38, foreach=True)                       # [6]
        common.learning_rate(optimizer, done, args.lr, args.lr_decay)
        optimizer.step()
        optimizer.zero_grad()
        common.update_ema(ema, net, ema_decay(args, step))
        log.step(step + 1, loss=total[0], consistency=total[1], kl=total[2], grad_norm=grad_norm)
        if common.after_step(args, step + 1, log, evaluate, sample_fn, net=net, ema=ema, optimizer=optimizer):
            return
    common.save_final(args, ema)


# 8. What the encoder does

@torch.inference_mode()
def analyse(args, model, device):
    """Prints, by level, the loss's mean over 64 images and its variance over 8 draws of the noise."""
    if args.coupling != 'vc':
        raise common.UserError(f'--analyse {args.use}: that run has no encoder (--coupling vc)')
    data = common.load_data(args, device)
    net, encoder = (common.network(module, args.precision) for module in (model, model.encoder))
    x0, y = data.at(common.batch_indices(len(data.images), 64, 0, args.seed), device)
    t = torch.tensor(rho_levels(9)[1:])
    r = lower_level(t, args.stages - 1, args.q, args.k, args.b)
    if args.base == 'ict':
        sigmas, i = torch.tensor(rho_levels(args.s1)), torch.linspace(0, args.s1 - 1, 9).round().long()
        t, r = sigmas[i + 1], sigmas[i]
    draws = [common.randn(x0.shape, args.seed, i, 'analyse', device=device) for i in range(8)]
    tables = {'mean of the loss': {}, 'its variance over the noise': {}}
    for pair in zip(t.to(device), r.to(device)):
        high, low = (level.expand(len(x0)) for level in pair)
        for name, source in ('emitted', encoder), ('independent', None):
            noises = [emit(source, x0, n, y)[0] for n in draws]
            points = [[path(x0, eps, level, args.kernel) for level in (high, low)] for eps in noises]
            values = torch.stack([loss(net, x_t, high, x_r, low, y, **loss_settings(args)) for x_t, x_r in points])
            for columns, value in zip(tables.values(), (values.mean(), values.var(0).mean())):
                columns.setdefault(name, []).append((pair[0].item(), value.item()))
    common.show_panels(args, tables, 'sigma')


# 9. Command line

def add_flags(add, number):
    """The flags that are VCT's own."""
    add('--base', choices=['ict', 'ecm'], help='from scratch on ever more levels, or tuning with ever smaller gaps')
    add('--kernel', choices=['ve', 'li'], help='path from image to noise: x0 + t eps, or (1 - t/sigma_max) x0 + t eps')
    add('--coupling', choices=['independent', 'ot', 'vc'], help='of image and noise')
    add('--encoder', choices=['small', 'big'], help='vc: one or two residual blocks per resolution')
    add('--encoder-width', type=number(int, 8, 8192), metavar='N', help='vc: its channels at multiplier 1')
    add('--beta', type=number(float, 0), metavar='X', help='vc: weight of the KL term, over the last pair of levels')
    add('--huber', choices=['elementwise', 'vector'], help='pseudo-Huber distance: of every number, or of the vector')
    add('--clip', type=number(float, 0), metavar='X', help='longest gradient, 0: any; 200 for vc if not given')


def main(argv):
    """`python vct.py`: trains, or with --sample / --evaluate / --analyse uses what was trained."""
    args = common.parse_args('vct', __doc__, PRESETS, add_flags, argv, switch='base')
    if args.coupling == 'ot' and not args.use:
        optimal_transport(torch.zeros(1, 1), torch.zeros(1, 1))                 # is SciPy there?
    if args.clip is None:
        args.clip = 200.0 if args.coupling == 'vc' else 0.0
    if not args.use:
        return train(args)
    common.use_run(args, common.start(args), load, sample, analyse)


if __name__ == '__main__':
    sys.exit(common.run(main))
