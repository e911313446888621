"""Stable Consistency Tuning (SCT). Fu-Yun Wang, Zhengyang Geng, Hongsheng Li, 2024, https://arxiv.org/abs/2410.18958

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the
probability flow ODE through x_t ends. Easy Consistency Tuning (ECT, Geng et al. 2024, arXiv 2406.14548) trains it by
asking that two points of one path agree, while their levels t > r draw ever nearer:

    x_t = x0 + t eps,   x_r = x0 + r eps,   eps ~ N(0, I),   ln t ~ N(P_mean, P_std²)
    loss = w(t, r) d( f(x_t, t), stopgrad f(x_r, r) ),   w = 1 / (t - r) or EDM's,   and f(x, 0) = x

The step from x_t to x_r follows -eps, a noisy estimate of the ODE's direction -(x_t - E[x0 | x_t]) / t from one sample.
SCT averages over references x^(i) ~ p(x0 | y), x0 among them, instead (Sec. 4.1; Xu et al. 2023, arXiv 2302.00670):

    w_i = softmax_i( -|x_t - x^(i)|² / (2 t²) ),   x0_hat = sum_i w_i x^(i)
    eps_hat = (x_t - x0_hat) / t,                  x_r = x0_hat + r eps_hat        and the target is x0_hat where r = 0

The rest: a smooth schedule of the gap [2], phases with edge-skipping [3], guidance by an earlier, weaker average.

    python sct.py                                                 # ten shapes, some five minutes on two CPU cores
    python sct.py --dataset cifar10 --gpus 8                      # the paper's setting
    python sct.py --sample runs/sct-shapes --nfe 2                # or --evaluate (FID), --analyse (variances)

Where the paper leaves a choice, and where we deviate from it or from ECT's published code (`[n]` in the code):
[1] References: `all`, the training set (best in the paper's Fig. 4); `batch`, the global minibatch; or N, drawn anew in
    each step. With labels, of the image's own class: in ImageNet's batches of 128, 88 % are alone, which is ECT.
[2] Our readings: of "smoother", that ECT's stage grows continuously, to one beyond its last; of its weighting, 1 / t.
[3] Phases, our reading, after Wang et al. 2024 (arXiv 2405.18407): edges at rho 7 (EDM Eq. 5); r >= s, the lower edge
    of t's phase; the loss compares the points x_s = f + s (x_t - f) / t that two predictions reach there.
[4] `--pretrain-steps` first trains the diffusion model to be tuned: EDM's levels, weight and averaging, towards x0_hat.
[5] The boundary is m = 0 in training, so that a diffusion model is a valid start, and 0.002 in sampling (ECT: 0.003,
    ImageNet 0), which adds t z, not sqrt(t² - sigma_min²) z; more than two levels are spaced by rho 7.
[6] ImageNet-64: fp32 and one average, of width 0.10; ECT: TF32, four. FID of equal shares of classes; ECT: random.
"""
import copy
import functools
import random
import sys

import torch

import common
import fid
from unet import EDM2_WIDTHS, URLS, initial_network, make_network

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

ECT = dict(                     # ECT's settings for CIFAR-10, which SCT keeps, on DDPM++
    arch='songunet', dropout_res=None, cond=False, flip=False, checkpoint=None, pretrain_steps=0,
    ref_size='all', phases=1, edges=None, eta=1.0, guidance=None, keep_ema=None,
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and standard deviation
    q=2.0, k=8.0, b=1.0, stages=8, schedule='smooth',       # the gap between t and r: see `lower_level`, `stage_at`
    c=0.0, weighting='gap',     # distance sqrt(|u|² + c²) - c; weight 1 / (t - r), 1 / t or EDM's lambda(t)
    t_mid=0.821,                # noise level of the second step when sampling with two
    optimizer='RAdam', betas=[0.9, 0.999], lr=1e-4, lr_decay=None, ema=0.9999, ema_std=None, batch=128, steps=400_000,
    save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
PRESETS = {
    'shapes': ECT | dict(       # built in; ours, sized for two CPU cores
        resolution=16, width=32, mults=[1, 1, 2], blocks=1, attn_resolutions=[], dropout=0.0, cond=True,
        batch=32, steps=2400, pretrain_steps=300, stages=3, optimizer='Adam', lr=1e-3, lr_decay=100, ema=0.998,
        save_every=500, sample_every=200, eval_every=2400, fid_features='pixels', fid_num=2000),
    'cifar10': ECT | dict(resolution=32, width=128, mults=[2, 2, 2], blocks=4, attn_resolutions=[16], dropout=0.2,
                          checkpoint=URLS['cifar10'])}
PRESETS['fmnist'] = PRESETS['cifar10'] | dict(resolution=28, width=64, attn_resolutions=[14], checkpoint=None)  # ours
PRESETS['folder'] = PRESETS['cifar10'] | dict(resolution=None, checkpoint=None)                         # your pictures
for size, lr, dropout in [('S', 1e-3, 0.4), ('M', 9e-4, 0.5), ('L', 8e-4, 0.5), ('XL', 7e-4, 0.5)]:     # ECT's, on EDM2
    PRESETS['imagenet64' if size == 'S' else f'imagenet64-{size.lower()}'] = ECT | dict(                        # [6]
        arch='edm2', resolution=64, cond=True, width=EDM2_WIDTHS[size], mults=[1, 2, 3, 4], blocks=3,
        attn_resolutions=[16, 8], dropout=dropout, dropout_res=16, checkpoint={'S': URLS['imagenet64']}.get(size),
        P_mean=-0.8, P_std=1.6, q=4.0, stages=4, c=0.06, weighting='edm', t_mid=1.526, optimizer='Adam',
        betas=[0.9, 0.99], lr=lr, lr_decay=2000, ema_std=0.10, ref_size='batch', steps=100_000)


# 2. Noise levels: the pair t > r of a sample

SIGMA_MIN, SIGMA_MAX, SIGMA_DATA = 0.002, 80.0, 0.5


def rho_levels(n, rho=7):
    """n + 1 levels from sigma_min to sigma_max, evenly spaced in sigma^(1/rho) (EDM Eq. 5)."""
    low, high = SIGMA_MIN ** (1 / rho), SIGMA_MAX ** (1 / rho)
    return [(low + i / n * (high - low)) ** rho for i in range(n + 1)]


def upper_level(normal, P_mean, P_std):
    """t of a standard normal draw: ln t ~ N(P_mean, P_std²). (B,) -> (B,)"""
    return (P_mean + P_std * normal).exp()


def lower_level(t, stage, q=2.0, k=8.0, b=1.0):
    """ECT's r < t of a pair: t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


def stage_at(step, steps, stages, schedule='ect'):
    """The stage that `lower_level` takes at a step of tuning: ECT's 0 ... stages - 1, or smoothly 0 to stages [2]."""
    return min(step / steps, 1) * stages if schedule == 'smooth' else min(step * stages // steps, stages - 1)


def phase_edges(phases, edges=None):
    """0 = s_0 < ... < s_M = sigma_max: by rho 7, or s_1 ... s_(M-1) as given in `edges` [3]. -> list of M + 1"""
    return [0.0, *(edges or rho_levels(phases)[1:phases]), SIGMA_MAX]


def phase_floor(t, edges):
    """The lower edge s < t of each level's phase; levels above sigma_max are in the last. (B,) -> (B,)"""
    s = torch.zeros_like(t)
    for edge in edges[1:-1]:
        s = torch.where(t > edge, edge, s)
    return s


def level_pairs(args, step, device):
    """t and r of the global batch of a step. -> (B,) each"""
    normal = common.randn((args.batch,), args.seed, step, 'level', device=device)
    if step < args.pretrain_steps:
        t = upper_level(normal, -1.2, 1.2)                              # EDM Tab. 1 for the diffusion model [4], which
        return t, t                                                     # has no pairs
    t = upper_level(normal, args.P_mean, args.P_std)
    stage = stage_at(step - args.pretrain_steps, max(1, args.steps - args.pretrain_steps), args.stages, args.schedule)
    r = lower_level(t, stage, args.q, args.k, args.b)
    return t, r.maximum(phase_floor(t, phase_edges(args.phases, args.edges)))


# 3. Model: the consistency function f

def f(net, x, t, y=None, m=0.0):
    """c_skip x + c_out F(c_in x, ln(t)/4, y) (EDM Eq. 7), which is x at t = m. x (B, C, H, W), t, y (B,) -> like x"""
    t4 = t[:, None, None, None]                                         # to go with images
    c_skip = SIGMA_DATA ** 2 / ((t4 - m) ** 2 + SIGMA_DATA ** 2)
    c_out = SIGMA_DATA * (t4 - m) / (SIGMA_DATA ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (SIGMA_DATA ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.clamp(min=1e-10).log() / 4, y)          # at t = 0, c_out is 0: f is x


# 4. Target: variance reduction (SCT Sec. 4.1) by x0_hat and eps_hat = (x_t - x0_hat) / t, which make x_r

def posterior_mean(x_t, t, refs, allowed=None):
    """E[x0 | x_t] if x0 is one of the references (SCT Eq. 14): their mean, weights softmax -|x_t - x^(i)|² / (2 t²).

    x_t (B, C, H, W), t (B,); refs (N, C, H, W); allowed (B, N) bool, None: all -> like x_t. One reference: ECT.
    """
    x, x0 = x_t.flatten(1), refs.flatten(1)                                         # (B, D), (N, D)
    with common.true_float32():
        logits = (x @ x0.T - x0.square().sum(1) / 2) / t[:, None] ** 2              # |x|² is the same for all i
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        return (logits.softmax(1) @ x0).view_as(x_t)


def posterior_mean_of_all(x_t, t, own, data, members, flip=False, chunk=2 ** 23):
    """`posterior_mean` over all training images of a sample's class, mirrored ones too if `flip`. -> like x_t

    own (B,): the samples' indices in data; members: `class_members`; chunk: numbers at a time, on a GPU 16 times that.
    """
    x, t, classes = x_t.flatten(1), t[:, None], data.labels[own]                            # (B, D), (B, 1), (B,)
    labels = classes.to(x.device, non_blocking=True)[:, None]
    top, total, mean = torch.full_like(t, -1e30), torch.zeros_like(t), torch.zeros_like(x)
    size = max(1, chunk * (16 if x.is_cuda else 1) // x[0].numel())
    for part in torch.cat([members[c] for c in classes.unique()]).split(size):
        images, of_images = data.at(part, x.device)
        allowed = labels == of_images                                                       # (B, n)
        for refs in [images, images.flip(3)] if flip else [images]:
            x0 = refs.flatten(1)                                                            # (n, D)
            with common.true_float32():
                logits = ((x @ x0.T - x0.square().sum(1) / 2) / t ** 2).masked_fill(~allowed, -torch.inf)
                new_top = torch.maximum(top, logits.amax(1, keepdim=True))
                weights, shrink = (logits - new_top).exp(), (top - new_top).exp()           # (B, n), (B, 1)
                total = total * shrink + weights.sum(1, keepdim=True)
                mean = mean * shrink + weights @ x0
                top = new_top
    return (mean / total).view_as(x_t)


def class_members(data, ref_size='all'):
    """The indices of each class's images, of all if there are no labels; made once. -> tuple of (n,) int64"""
    members = data.labels.argsort(stable=True).split(data.labels.bincount().tolist())
    if ref_size.isdigit() and int(ref_size) > min(len(part) for part in members if len(part)):
        common.print0(f'--ref-size {ref_size}: some class has fewer images, which are all used')
    return members


def draw_references(n, own, data, members, *key):
    """n images of each class in the batch, if it has them, drawn anew for each `key`: indices (M,), allowed (B, M)."""
    drawn = []
    for c in data.labels[own].unique().tolist():                # by class: any number of processes draws the same
        size, rng = len(members[c]), random.Random(common.key(*key, c))
        drawn.append(members[c][rng.sample(range(size), min(n, size))])
    index = torch.cat(drawn)
    last = torch.cat([torch.arange(len(part)) == len(part) - 1 for part in drawn])
    of_class, is_own = data.labels[own, None] == data.labels[index], own[:, None] == index
    return index, of_class & ~torch.where(is_own.any(1, keepdim=True), is_own, last)        # leaves room for its own


def estimate_x0(args, step, data, members, index, x_all, x_t, t):
    """x0_hat by --ref-size [1]. index (B,), x_all: the global batch; x_t, t: this process's part. -> like x_t"""
    mine = common.rank_slice(args.batch)
    x0, own = x_all[mine], index[mine]
    if args.ref_size == '1':
        return x0                                                       # ECT
    if args.ref_size == 'all':
        return posterior_mean_of_all(x_t, t, own, data, members, args.flip)
    refs, allowed = x_all, data.labels[own, None] == data.labels[index]
    if args.ref_size != 'batch':
        drawn, allowed = draw_references(int(args.ref_size), own, data, members, args.seed, step, 'refs')
        refs = data.at(drawn, x_t.device)[0]
        if args.flip:                           # by number, as each process draws for its own classes alone
            flips = common.rand((len(data.images),), args.seed, step, 'refs')[drawn] < 0.5
            refs = torch.where(flips[:, None, None, None].to(refs.device, non_blocking=True), refs.flip(3), refs)
        refs = torch.cat([refs, x0])                                    # and each sample's own image
        allowed = torch.cat([allowed, torch.eye(len(own), dtype=torch.bool)], 1)
    return posterior_mean(x_t, t, refs, allowed.to(x_t.device, non_blocking=True))


# 5. Loss: the distance of f(x_t, t) from the target stop-gradient f(x_r, r), weighted

def at_level(x0_hat, x_t, t, s):
    """Where the straight line from x_t at level t to x0_hat at level 0 is at level s [3]. -> like x_t"""
    return x0_hat + s * (x_t - x0_hat) / t


def edm_weight(t):
    """lambda(t) = (t² + sigma_data²) / (t sigma_data)² (EDM Tab. 1). (B,) -> (B,)"""
    return (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2


def loss(net, x_t, t, x_r, r, y=None, teacher=None, seed=0, c=0.0, weighting='gap', edges=(0.0, SIGMA_MAX)):
    """Consistency loss of each sample: ECT's, with the target of SCT. x_t, x_r (B, C, H, W), t, r (B,) -> (B,)

    Compared is what both predict for the lower edge s of t's phase (0 without phases); where r = s the target is x_r.
    """
    t4, r4, s4 = (level[:, None, None, None] for level in (t, r, phase_floor(t, edges)))
    torch.manual_seed(seed)                                             # dropout: the same units in both
    student = at_level(f(net, x_t, t, y), x_t, t4, s4)                                                          # [5]
    with torch.no_grad():                                               # stop-gradient: a teacher of the same weights
        torch.manual_seed(seed)
        target = torch.where(r4 > s4, at_level(f(teacher or net, x_r, r, y), x_r, r4, s4), x_r)
    norm = torch.linalg.vector_norm((student - target).flatten(1), dim=1)           # |u|; its gradient at 0 is 0
    distance = (norm.square() + c ** 2).sqrt() - c if c else norm                   # pseudo-Huber (iCT Sec. 3.3)
    return distance * {'gap': 1 / (t - r), 't': 1 / t, 'edm': edm_weight(t)}[weighting]                         # [2]


def loss_settings(args):
    """What the flags say to `loss`."""
    return dict(c=args.c, weighting=args.weighting, edges=phase_edges(args.phases, args.edges))


def denoising_loss(net, x_t, t, x0_hat, y=None, seed=0):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), as a mean over the pixels [4]. -> (B,)"""
    torch.manual_seed(seed)
    return edm_weight(t) * (f(net, x_t, t, y) - x0_hat).square().flatten(1).mean(1)


# 6. Sampling

@torch.inference_mode()
def sample(model, n, nfe=1, labels=None, seed=0, guide=None, guidance=1.0, eta=None, first=0):
    """n images in [-1, 1], (n, C, H, W), of `nfe` network evaluations; labels: classes, in turn from number `first` on.

    One step: f(sigma_max z, sigma_max). Each further one adds fresh noise of a lower level and maps back (CM Alg. 1);
    with phases it lands, without noise, at eta times an edge. guide: a weaker model: f_bad + guidance (f - f_bad).
    """
    config, images = model.config, []
    net, bad = (common.network(one, config['precision']) for one in (model, guide or model))
    same = 'script', 'label_dim', 'resolution', 'in_channels', 'phases', 'edges'
    if guide and any(guide.config.get(name) != config.get(name) for name in same):
        raise common.UserError('--guide: not a model of sct.py of the same classes, size and phases')
    edges = phase_edges(config['phases'], config['edges'])
    levels = rho_levels(nfe)[nfe:0:-1]                                  # nfe of them, from sigma_max downwards     [5]
    if config['phases'] not in (1, nfe):
        raise common.UserError(f'--nfe {nfe}: a model of {config["phases"]} phases takes as many evaluations')
    if config['phases'] > 1:
        levels = [SIGMA_MAX, *((config['eta'] if eta is None else eta) * s for s in edges[-2:0:-1])]
    elif nfe == 2:
        levels[1] = config['t_mid']
    for noise, y in common.sampling_noise(model, n, nfe, labels, seed, first):                                  # [6]
        x = SIGMA_MAX * noise[0]
        for i, level in enumerate(levels):
            t = torch.full_like(x[:, 0, 0, 0], level)
            x0_hat = f(net, x, t, y, SIGMA_MIN)
            if guide is not None:
                x0_hat = torch.lerp(f(bad, x, t, y, SIGMA_MIN), x0_hat, guidance)
            if i + 1 < len(levels):
                low = levels[i + 1]
                x = at_level(x0_hat, x, level, low) if config['phases'] > 1 else x0_hat + low * noise[i + 1]
        images.append(x0_hat.clamp(-1, 1))
    return torch.cat(images)


load = functools.partial(common.load_network, make_network)


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
    net = initial_network(args, device, tunes=True)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    sample_fn = functools.partial(sample, ema, labels=args.labels)
    optimizer = common.make_optimizer(args, net)
    evaluate = functools.partial(fid.evaluate, fid.prepare(args, device, data), args, sample_fn)    # fail early
    start = common.open_run(args, net=net, ema=ema, optimizer=optimizer)
    common.compile_in_place(args, net, ema)
    wrapped = common.distributed(net, args)
    student, teacher = (common.network(one, args.precision) for one in (wrapped, net))
    members = class_members(data, args.ref_size)
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

        # Target (Sec. 4.1): both points lie on the line through x_t and x0_hat.
        x0, y, eps = x_all[mine], y_all[mine], eps_all[mine]
        t4, r4 = t[:, None, None, None], r[:, None, None, None]
        x_t = x0 + t4 * eps
        x0_hat = estimate_x0(args, step, data, members, index, x_all, x_t, t)
        eps_hat = eps if args.ref_size == '1' else (x_t - x0_hat) / t4          # ECT, bit for bit
        x_r = x0_hat + r4 * eps_hat

        total = torch.zeros((), device=device)
        for part, seed in common.microbatches(wrapped, args, step, clock):
            if pretraining:
                value = denoising_loss(student, x_t[part], t[part], x0_hat[part], y[part], seed)
            else:
                value = loss(student, x_t[part], t[part], x_r[part], r[part], y[part], teacher, seed, **settings)
            total += common.backward(value, len(x0), args.precision, clock)

        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        common.learning_rate(optimizer, done, args.lr, args.lr_decay)
        optimizer.step()
        optimizer.zero_grad()
        common.update_ema(ema, net, ema_decay(args, step))
        log.step(step + 1, loss=total, grad_norm=grad_norm)
        if step + 1 in [max(1, round(share * args.steps)) for share in args.keep_ema or []]:    # for --guide
            common.save_final(args, ema, f'ema-{step + 1}')
        if common.after_step(args, step + 1, log, evaluate, sample_fn, net=net, ema=ema, optimizer=optimizer):
            return
    common.save_final(args, ema)


# 8. The variance that SCT is about

def analyse(args, model, device):
    """Prints, by level and references: mean square of x0_hat - E[x0 | x_t], and the gradient's noise over its mean."""
    data = common.load_data(args, device)
    members = class_members(data)
    net = common.network(model.requires_grad_(True), args.precision)
    tables = {'target: mean square error': {}, 'gradient: noise over mean': {}}
    for level in common.progress(rho_levels(9)[2:], 'noise levels'):
        for size in ('1', 'batch', '256', 'all'):
            args.ref_size = size
            error, gradients = 0.0, []
            for j in range(8):
                index = common.batch_indices(len(data.images), args.batch, j, args.seed)
                x0, y = data.at(index, device)
                t = torch.full_like(x0[:, 0, 0, 0], level)
                r = lower_level(t, stage_at(1, 1, args.stages, args.schedule), args.q, args.k, args.b)
                r = r.maximum(phase_floor(t, phase_edges(args.phases, args.edges)))
                x_t = x0 + level * common.randn(x0.shape, args.seed, j, 'analyse', device=device)
                x0_hat = estimate_x0(args, j, data, members, index, x0, x_t, t)
                error += (x0_hat - posterior_mean_of_all(x_t, t, index, data, members, args.flip)).square().mean()
                value = loss(net, x_t, t, at_level(x0_hat, x_t, level, r[0]), r, y, **loss_settings(args)).mean()
                found = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
                gradients.append(torch.cat([g.flatten() for g in found]))
            var, mean = torch.var_mean(torch.stack(gradients), 0)       # var / 8 is that of this mean
            ratio = var.sum() / (mean.square() - var / 8).sum().clamp(min=1e-4 * var.sum())
            for columns, value in zip(tables.values(), (error.item() / 8, ratio.sqrt().item())):
                columns.setdefault(size, []).append((level, value))
    common.show_panels(args, tables, 'sigma')


# 9. Command line

def add_flags(add, number):
    """The flags that are SCT's own."""
    add('--ref-size', metavar='1|batch|N|all', type=lambda x: x if x in ('batch', 'all') else str(number(int, 1)(x)),
        help='references of the posterior mean (Sec. 4.1): 1 is ECT, `batch` the minibatch, N of a class, `all`')
    add('--weighting', choices=['gap', 't', 'edm'], help="of the loss: 1 / (t - r), 1 / t, or EDM's lambda(t)")
    add('--schedule', choices=['smooth', 'ect'], help='how the gap between t and r shrinks: continuously, or in stages')
    add('--phases', type=number(int, 1, 64), metavar='M', help='segments of the noise levels, one sampling step each')
    add('--edges', type=number(float, SIGMA_MIN, SIGMA_MAX, many=True), metavar='X,X', help='M - 1 levels between them')
    add('--eta', type=number(float, 0.01, 1), metavar='X', help='edge-skipping: sampling lands at eta times an edge')
    add('--keep-ema', type=number(float, 1e-6, 1, many=True), metavar='X,X', help='keep the EMA at these shares')
    add('--guide', metavar='CKPT', help='a weaker model to be guided by when sampling: twice the evaluations')
    add('--guidance', type=number(float), metavar='W', help='how far: f_bad + w (f - f_bad)')


def main(argv):
    """`python sct.py`: trains, or with --sample / --evaluate / --analyse uses what was trained."""
    args = common.parse_args('sct', __doc__, PRESETS, add_flags, argv, free='eta guide guidance keep_ema')
    args.nfe = args.nfe or [args.phases]
    if args.phases > 1 and args.nfe != [args.phases]:
        raise common.UserError(f'--nfe: a model of {args.phases} phases takes {args.phases} evaluations')
    if args.edges and (len(args.edges) != args.phases - 1 or sorted({*args.edges, SIGMA_MAX})[:-1] != args.edges):
        raise common.UserError(f'--edges: {args.phases} phases have {args.phases - 1} between, ascending, below 80')
    if (args.guide is None) != (args.guidance is None) or args.guide and not (args.sample or args.evaluate):
        raise common.UserError('--guide is for --sample and --evaluate, with --guidance: how far to go from that model')
    if not args.use:
        return train(args)
    device = common.start(args)
    guide = load(args.guide, device) if args.guide else None
    sample_fn = functools.partial(sample, guide=guide, guidance=args.guidance, eta=args.eta)
    common.use_run(args, device, load, sample_fn, analyse)


if __name__ == '__main__':
    sys.exit(common.run(main))
