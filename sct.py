"""Stable Consistency Tuning (SCT). Fu-Yun Wang, Zhengyang Geng, Hongsheng Li, 2024, https://arxiv.org/abs/2410.18958

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the
probability flow ODE through x_t ends. Easy Consistency Tuning (ECT, Geng et al. 2024, arXiv 2406.14548) trains it by
asking that two points of one path agree, while the levels t > r of the two draw ever nearer:

    x_t = x0 + t eps,   x_r = x0 + r eps,   eps ~ N(0, I),   ln t ~ N(P_mean, P_std²)
    loss = w(t, r) d( f(x_t, t), stopgrad f(x_r, r) ),   w = 1 / (t - r) or EDM's,   and f(x, 0) = x

The step from x_t to x_r follows -eps, a one-sample estimate of the ODE's direction -(x_t - E[x0 | x_t]) / t. It is
right on average, and its variance makes training slow and unstable. SCT takes the average over references
x^(i) ~ p(x0 | y), x0 among them, instead (Sec. 4.1; the estimator of Xu et al. 2023, arXiv 2302.00670):

    w_i = softmax_i( -|x_t - x^(i)|² / (2 t²) ),   x0_hat = sum_i w_i x^(i)
    eps_hat = (x_t - x0_hat) / t,                  x_r = x0_hat + r eps_hat        and the target is x0_hat where r = 0

Besides, the gap between t and r shrinks smoothly instead of in ECT's stages (`--schedule`); the noise levels may be cut
into phases with a boundary condition each, for a model that samples in a few deterministic steps (`--phases`,
`--edges`), which land just below an edge (edge-skipping, `--eta`); and an earlier average of the run, which is worse,
guides the last (`--keep-ema`, `--guide`).

    python sct.py                                                 # ten shapes, some five minutes on two CPU cores
    python sct.py --dataset cifar10 --gpus 8                      # the paper's setting
    python sct.py --sample runs/sct-shapes --nfe 2                # a grid of images; --evaluate: FID

Where the paper leaves a choice, and where we deviate from it:
 1. References of `--ref-size batch` are the global minibatch, over all processes: our reading of "a batch".
 2. `--ref-size all` takes the whole training set, hence its exact score: beyond the paper, the default of `shapes`.
 3. With labels (`--cond`) an image's references are those of its label among the batch or N, which may leave it alone
    (ImageNet, batch 128: 88 % of the samples); `all` has them all.
 4. `--schedule smooth` lets ECT's stage grow continuously, to one beyond ECT's last: our reading of "smoother".
 5. Phases: edges at rho 7 (EDM Eq. 5); the loss compares the points that two predictions reach at the lower edge s of
    t's phase, x_s = f + s (x_t - f) / t, and r never falls below s: our reading, after Phased Consistency Models
    (Wang et al. 2024, arXiv 2405.18407). Edge-skipping lands at eta times an edge; guidance is by an earlier average.
 6. `--pretrain-steps` first trains the diffusion model that tuning starts from, with EDM's levels and weight, drawn to
    the posterior mean as well, and with the mean over pixels for a loss.
 7. The boundary is m = 0 in training, so that a diffusion model is a valid start, and sigma_min in sampling.
 8. Sampling adds t z, not sqrt(t² - sigma_min²) z; more than two levels are spaced by rho 7. No flips in training.
"""
import copy
import functools
import random
import re
import sys
from pathlib import Path

import torch

import common
import fid
from unet import EDM2_WIDTHS, URLS, initial_network, make_network

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

ECT = dict(                     # ECT's settings for CIFAR-10, which SCT keeps
    arch='songunet', dropout_res=None, checkpoint=None, lr_decay=None, ema_std=None,
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and deviation
    q=2.0, k=8.0, b=1.0,        # the gap between t and r: see `lower_level`
    stages=8, schedule='smooth',    # q^-1 ... q^-8 with ect, q^-1 to q^-9 with smooth: how the gap shrinks over the run
    phases=1, edges=None, eta=1.0, guidance=None, keep_ema=None, flip=False,
    c=0.0, weighting='gap',     # distance sqrt(|u|² + c²) - c; weight 1 / (t - r), 1 / t or EDM's lambda(t)
    t_mid=0.821,                # noise level of the second step when sampling with two
    optimizer='RAdam', betas=(0.9, 0.999), ema=0.9999, ref_size='all', pretrain_steps=0, cond=False,
    save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
PRESETS = {
    'shapes': ECT | dict(       # built in; ours, sized for two CPU cores
        resolution=16, width=32, mults=[1, 1, 2], blocks=1, attn_resolutions=[], dropout=0.0, cond=True,
        batch=32, steps=2400, pretrain_steps=300, stages=3, optimizer='Adam', lr=1e-3, lr_decay=100, ema=0.998,
        save_every=500, sample_every=200, eval_every=2400, fid_features='pixels', fid_num=2000),
    'cifar10': ECT | dict(      # DDPM++
        resolution=32, width=128, mults=[2, 2, 2], blocks=4, attn_resolutions=[16], dropout=0.2,
        checkpoint=URLS['cifar10'], batch=128, steps=400_000, lr=1e-4)}
PRESETS['fmnist'] = PRESETS['cifar10'] | dict(resolution=28, width=64, attn_resolutions=[14], checkpoint=None)  # ours
PRESETS['folder'] = PRESETS['cifar10'] | dict(resolution=None, checkpoint=None)                         # your pictures
for size, lr, dropout in [('S', 1e-3, 0.4), ('M', 9e-4, 0.5), ('L', 8e-4, 0.5), ('XL', 7e-4, 0.5)]:     # ECT's, on EDM2
    PRESETS['imagenet64' if size == 'S' else f'imagenet64-{size.lower()}'] = ECT | dict(
        arch='edm2', resolution=64, cond=True, width=EDM2_WIDTHS[size], mults=[1, 2, 3, 4], blocks=3,
        attn_resolutions=[16, 8], dropout=dropout, dropout_res=16, checkpoint={'S': URLS['imagenet64']}.get(size),
        P_mean=-0.8, P_std=1.6, q=4.0, stages=4, c=0.06, weighting='edm', t_mid=1.526, optimizer='Adam',
        betas=(0.9, 0.99), lr=lr, lr_decay=2000, ema_std=0.10, ref_size='batch', batch=128, steps=100_000)


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
    """r < t of a pair, as in ECT: t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


def stage_at(step, steps, stages, schedule):
    """The stage that `lower_level` takes at a step of tuning: ECT's 0 ... stages - 1, or smoothly 0 to stages."""
    return min(step / steps, 1) * stages if schedule == 'smooth' else min(step * stages // steps, stages - 1)


def phase_edges(phases, edges=None):
    """0 = s_0 < ... < s_M = sigma_max: by rho 7, or s_1 ... s_(M-1) as given in `edges`. -> list of M + 1"""
    return [0.0, *(edges or rho_levels(phases)[1:phases]), SIGMA_MAX]


def phase_floor(t, edges):
    """The lower edge s < t of each level's phase; levels above sigma_max are in the last. (B,), (M + 1,) -> (B,)"""
    return edges[torch.searchsorted(edges[:-1].contiguous(), t) - 1]


# 3. Model

def f(net, x, t, y=None, m=0.0):
    """The consistency function: c_skip x + c_out F(c_in x, ln(t)/4, y) (EDM Eq. 7). Boundary condition: x at t = m.

    net is any function (x_in, c_noise, y) -> like x_in; x (B, C, H, W), t (B,), y (B,) labels or None -> (B, C, H, W).
    """
    s, t4 = SIGMA_DATA, t[:, None, None, None]
    c_skip = s ** 2 / ((t4 - m) ** 2 + s ** 2)
    c_out = s * (t4 - m) / (s ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (s ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.clamp(min=1e-10).log() / 4, y)          # at t = 0, c_out is 0: f is x


# 4. Variance reduction (SCT Sec. 4.1): x0_hat and eps_hat = (x_t - x0_hat) / t, which make x_r, and so the target

def posterior_mean(x_t, t, refs, allowed=None):
    """E[x0 | x_t] if x0 is one of the references (SCT Eq. 14): their mean, weights softmax -|x_t - x^(i)|² / (2 t²).

    x_t (B, C, H, W), t (B,); refs (N, C, H, W) in [-1, 1]; allowed (B, N) bool: who may refer to whom, None for all.
    -> (B, C, H, W). One reference gives itself back: ECT.
    """
    x, x0 = x_t.flatten(1), refs.flatten(1)                                         # (B, D), (N, D)
    with common.true_float32():
        logits = (x @ x0.T - x0.square().sum(1) / 2) / t[:, None] ** 2              # |x|² is the same for all i
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        return (logits.softmax(1) @ x0).view_as(x_t)


CHUNK = 2 ** 23         # how many numbers of the data are float32 at a time: 32 MiB


def posterior_mean_of_all(x_t, t, own, data, members, flip=False):
    """`posterior_mean` over all training images of each sample's class. x_t (B, C, H, W), t (B,) -> (B, C, H, W)

    own (B,): the samples' indices within data; members: of `class_members`; flip: mirror images are data, too. Pieces
    add up by a running maximum and sum (the log-sum-exp of flash attention), so that memory is that of one.
    """
    x, t, labels = x_t.flatten(1), t[:, None], data.labels[own]                             # (B, D), (B, 1), (B,)
    top, total, mean = torch.full_like(t, -1e30), torch.zeros_like(t), torch.zeros_like(x)
    for part in torch.cat([members[c] for c in labels.unique()]).split(max(1, CHUNK // x[0].numel())):
        images = data.at(part, x.device)[0]
        allowed = (labels[:, None] == data.labels[part]).to(x.device, non_blocking=True)    # (B, n)
        for refs in [images, images.flip(3)] if flip else [images]:
            x0 = refs.flatten(1)                                                            # (n, D)
            with common.true_float32():
                logits = (x @ x0.T - x0.square().sum(1) / 2) / t ** 2
                logits = logits.masked_fill(~allowed, -torch.inf)
                new_top = torch.maximum(top, logits.amax(1, keepdim=True))
                weights, shrink = (logits - new_top).exp(), (top - new_top).exp()           # (B, n), (B, 1)
                total = total * shrink + weights.sum(1, keepdim=True)
                mean, top = mean * shrink + weights @ x0, new_top
    return (mean / total).view_as(x_t)


def class_members(data):
    """The indices of each class's images, of all if there are no labels; made once. -> tuple of (n,) int64"""
    return data.labels.argsort(stable=True).split(data.labels.bincount().tolist())


def draw_references(n, own, data, members, *key):
    """n images of each class in the batch, or as many as it has, drawn anew for each `key`: an estimate of p(x0 | y).

    own (B,): the samples' indices within data. -> indices (M,) within data, allowed (B, M) bool: the n of the sample's
    class, but without its own image, which the caller adds, or else without the last. All on the host.
    """
    found = data.labels[own].unique().tolist()
    drawn = [members[c][random.Random(common.key(*key, c)).sample(range(len(members[c])), min(n, len(members[c])))]
             for c in found]                                    # by class: any number of processes draws the same
    index = torch.cat(drawn)
    last = torch.cat([torch.arange(len(part)) == len(part) - 1 for part in drawn])
    of_class, is_own = data.labels[own, None] == data.labels[index], own[:, None] == index
    return index, of_class & ~torch.where(is_own.any(1, keepdim=True), is_own, last)


# 5. Loss: the distance of f(x_t, t) from the target stop-gradient f(x_r, r), weighted

def loss(net, x_t, t, x0_hat, eps_hat, r, y=None, teacher=None, mask=0, weighting='gap', c=0.0, s=None):
    """Consistency loss of each sample (that of ECT, with the target of SCT). -> (B,)

    The student f(x_t, t) is drawn to the teacher f(x_r, r) at x_r = x0_hat + r eps_hat; with phases, the points that
    both predict for the lower edge s (B,) of t's phase are compared. Where r = s that point is x_r: x0_hat if s = 0.
    `mask` seeds the dropout: both networks drop the same units, so that their difference is not that of two masks.
    """
    r4, t4 = r[:, None, None, None], t[:, None, None, None]
    s4 = torch.zeros_like(t4) if s is None else s[:, None, None, None]
    x_r = x0_hat + r4 * eps_hat
    torch.manual_seed(mask)
    student = at_level(f(net, x_t, t, y), x_t, t4, s4)
    with torch.no_grad():                                                       # stop-gradient
        torch.manual_seed(mask)
        target = torch.where(r4 > s4, at_level(f(teacher or net, x_r, r, y), x_r, r4, s4), x_r)
    norm = torch.linalg.vector_norm((student - target).flatten(1), dim=1)           # |u|; its gradient at 0 is 0
    distance = (norm.square() + c ** 2).sqrt() - c if c else norm                   # pseudo-Huber (iCT Sec. 3.3)
    return distance * {'gap': lambda: 1 / (t - r), 't': lambda: 1 / t, 'edm': lambda: edm_weight(t)}[weighting]()


def at_level(x0_hat, x_t, t, s):
    """Where the straight line from x_t at level t to x0_hat at level 0 is at level s: x0_hat + s (x_t - x0_hat) / t."""
    return x0_hat + s * (x_t - x0_hat) / t


def denoising_loss(net, x_t, t, x0_hat, y=None, mask=0):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), as a mean over the pixels. -> (B,)

    Its target is the posterior mean, too.
    """
    torch.manual_seed(mask)
    return edm_weight(t) * (f(net, x_t, t, y) - x0_hat).square().flatten(1).mean(1)


def edm_weight(t):
    """lambda(t) = (t² + sigma_data²) / (t sigma_data)² (EDM Table 1). (B,) -> (B,)"""
    return (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2


# 6. Sampling

@torch.inference_mode()
def sample(model: torch.nn.Module, n: int, nfe: int = 1, labels: list[int] | None = None, seed: int = 0,
           guide: torch.nn.Module | None = None, guidance: float = 1.0, eta: float | None = None,
           first: int = 0) -> torch.Tensor:
    """n images in [-1, 1], (n, C, H, W), of `nfe` network evaluations; labels: classes, in turn from number `first` on.

    One step: f(sigma_max z, sigma_max). Each further one adds fresh noise of a lower level and maps back (CM Alg. 1). A
    model of M phases takes M steps without fresh noise, from edge to edge, each landing at eta times the edge.
    `guide`: a worse model, evaluated as often, from which the prediction is pushed away: f_bad + guidance (f - f_bad).
    """
    config, images = model.config, []
    net, bad = (common.network(one, config['precision']) for one in (model, guide or model))
    edges = phase_edges(config['phases'], config['edges'])
    levels = rho_levels(nfe)[:0:-1]                                             # nfe of them, from sigma_max downwards
    if len(edges) > 2:
        if nfe != len(edges) - 1:
            raise common.UserError(f'--nfe {nfe}: a model of {len(edges) - 1} phases takes as many evaluations')
        levels = [SIGMA_MAX, *((config['eta'] if eta is None else eta) * s for s in edges[-2:0:-1])]
    elif nfe == 2:
        levels[1] = config['t_mid']
    for noise, y in common.sampling_noise(model, n, nfe, labels, seed, first):
        x = SIGMA_MAX * noise[0]
        for i, level in enumerate(levels):
            t = torch.full_like(x[:, 0, 0, 0], level)
            x0_hat = f(net, x, t, y, SIGMA_MIN)
            if guide is not None:
                x0_hat = torch.lerp(f(bad, x, t, y, SIGMA_MIN), x0_hat, guidance)
            if i + 1 < len(levels):
                s = levels[i + 1]
                x = at_level(x0_hat, x, level, s) if len(edges) > 2 else x0_hat + s * noise[i + 1]
        images.append(x0_hat.clamp(-1, 1))
    return torch.cat(images)


def load(path: str | Path, device: str | torch.device = 'cpu') -> torch.nn.Module:
    """The EMA network of a run (its folder, checkpoint.pt or final.pt), for `sample`; its settings are in `.config`."""
    return common.load_network(path, make_network, device)


# 7. Training

def train(args):
    """One run, from data to final.pt."""
    device = common.start(args)
    data = common.load_data(args, device)                               # sets resolution, in_channels, label_dim
    judge = fid.prepare(args, device, data)                             # now: what is missing is to be missed now

    net = initial_network(args, device, tunes=True)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = getattr(torch.optim, args.optimizer)(net.parameters(), args.lr, args.betas, foreach=True)   # fused
    start = common.open_run(args, net=net, ema=ema, optimizer=optimizer)
    wrapped, clock, log = common.distributed(net, args), common.Clock(args, device), common.Log(args, start, device)
    student, teacher = clock.watch(wrapped, 'student'), clock.watch(net, 'teacher')
    draw = functools.partial(sample, ema, labels=args.labels)
    evaluate, mine = functools.partial(fid.evaluate, judge, args, draw), common.my_part(args.batch)
    edges = torch.tensor(phase_edges(args.phases, args.edges), device=device)
    kept = [round(share * args.steps) for share in args.keep_ema or []]
    members = class_members(data)
    fewest = min(n for n in map(len, members) if n)
    if args.ref_size.isdigit() and int(args.ref_size) > fewest:
        common.say(f'--ref-size {args.ref_size}: some class has but {fewest} images, which are all used')

    for step, index, x_all, y_all in clock.steps(common.batches(data, args, start, device), net):
        if step == args.pretrain_steps > 0:                                     # tuning starts as from a checkpoint
            net.load_state_dict(ema.state_dict())
            optimizer.state.clear()

        # Draws: t, r and noise, of the global batch, so that any number of processes trains on the same ones.
        normal = lambda stream, *shape: common.randn((args.batch, *shape), args.seed, step, stream, device=device)[mine]
        x0, y = x_all[mine], y_all[mine]
        pretraining = step < args.pretrain_steps
        levels = (-1.2, 1.2) if pretraining else (args.P_mean, args.P_std)      # EDM Table 1 for the diffusion model
        t = upper_level(normal('level'), *levels)
        done = step - args.pretrain_steps * (not pretraining)
        stage = stage_at(done, max(args.steps - args.pretrain_steps, 1), args.stages, args.schedule)
        s = phase_floor(t, edges)
        r = lower_level(t, stage, args.q, args.k, args.b).maximum(s)
        eps = normal('noise', *x0.shape[1:])
        clock('data')

        # Variance reduction.
        x_t = x0 + t[:, None, None, None] * eps
        if args.ref_size == '1':                                                # ECT, bit for bit
            x0_hat, eps_hat = x0, eps
        else:
            if args.ref_size == 'all':
                x0_hat = posterior_mean_of_all(x_t, t, index[mine], data, members, args.flip)
            elif args.ref_size == 'batch':
                x0_hat = posterior_mean(x_t, t, x_all, y[:, None] == y_all)
            else:
                drawn, allowed = draw_references(int(args.ref_size), index[mine], data, members, args.seed, step, 'refs')
                refs, own = data.at(drawn, device)[0], torch.eye(len(x0), dtype=torch.bool)
                refs = common.mirror(refs, args.seed, step, 'refs') if args.flip else refs
                x0_hat = posterior_mean(x_t, t, torch.cat([refs, x0]), torch.cat([allowed, own], 1).to(device))
            eps_hat = (x_t - x0_hat) / t[:, None, None, None]
        clock('reference mean')

        # Loss and gradient.
        total = torch.zeros((), device=device)
        for part, mask in common.microbatches(wrapped, args, step):
            if pretraining:
                value = denoising_loss(student, x_t[part], t[part], x0_hat[part], y[part], mask)
            else:
                value = loss(student, x_t[part], t[part], x0_hat[part], eps_hat[part], r[part], y[part], teacher, mask,
                             args.weighting, args.c, s[part])
            clock('loss')
            (value.sum() * common.LOSS_SCALE.get(args.precision, 1.0) / len(x0)).backward()
            total += value.detach().sum() / len(x0)
            clock('backward')

        # Update.
        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        common.learning_rate(optimizer, done, args.lr, args.lr_decay)
        optimizer.step()
        optimizer.zero_grad()
        clock('optimiser')
        common.update_ema(ema, net, common.ema_decay(done + 1, args.ema, args.ema_std, ramp=pretraining))
        clock('EMA')
        log.step(step + 1, loss=total, grad_norm=grad_norm)
        if step + 1 in kept:                                                    # a worse self, for --guide
            common.save_final(args, ema, f'ema-{step + 1}')
        if common.keep(args, step + 1, log, evaluate, draw, net=net, ema=ema, optimizer=optimizer):
            return
    common.save_final(args, ema)


# 8. Command line

def add_flags(add, number):
    """The flags that are SCT's own."""
    add('--ref-size', metavar='1|batch|N|all',
        help='references of the posterior mean (Sec. 4.1): 1 is ECT, `batch` the minibatch, N of a class, `all`')
    add('--weighting', choices=['gap', 't', 'edm'], help="of the loss: 1 / (t - r), 1 / t, or EDM's lambda(t)")
    add('--schedule', choices=['smooth', 'ect'], help='how the gap between t and r shrinks: continuously, or in stages')
    add('--q', type=number(float, 1.001), metavar='X', help='what the gap is divided by from stage to stage')
    add('--stages', type=number(int, 1, 64), metavar='N', help='stages of the shrinking, over the run')
    add('--phases', type=number(int, 1, 64), metavar='M', help='segments of the noise levels, one sampling step each')
    add('--edges', type=number(float, SIGMA_MIN, SIGMA_MAX, many=True), metavar='X,X', help='M - 1 levels between them')
    add('--eta', type=number(float, 0.01, 1), metavar='X', help='edge-skipping: sampling lands at eta times an edge')
    add('--keep-ema', type=number(float, 1e-6, 1, many=True), metavar='X,X', help='keep the EMA at these shares')
    add('--ema-std', type=number(float, 0.01, 0.25), metavar='X', help='power-function average of this relative width')
    add('--guide', metavar='CKPT', help='a worse self to be guided by when sampling: twice the evaluations')
    add('--guidance', type=number(float), metavar='W', help='how far: f_bad + w (f - f_bad)')


def main(argv):
    """`python sct.py`: trains, or with --sample / --evaluate uses what was trained."""
    args = common.parse_args('sct', __doc__, PRESETS, add_flags, '--ref-size all --phases 2 --eta 0.9', argv)
    if not re.fullmatch('batch|all|[1-9][0-9]{0,5}', args.ref_size):
        raise common.UserError(f'--ref-size {args.ref_size}: neither batch, all, nor a number below a million')
    if args.edges and (len(args.edges) != args.phases - 1 or sorted(set(args.edges)) != args.edges):
        raise common.UserError(f'--edges: {args.phases} phases have {args.phases - 1} edges between, ascending')
    if args.guide and not args.use:
        raise common.UserError('--guide is for --sample and --evaluate')
    if (args.guide is None) != (args.guidance is None):
        raise common.UserError('--guide and --guidance go together: the worse model, and how far to go from it')
    args.nfe = args.nfe or [args.phases]
    if args.phases > 1 and args.nfe != [args.phases]:
        raise common.UserError(f'--nfe: a model of {args.phases} phases takes {args.phases} evaluations')
    if not args.use:
        return train(args)
    device = common.start(args)
    model, guide = load(args.use, device), load(args.guide, device) if args.guide else None
    model.config['precision'] = args.precision
    if guide and any(guide.config[key] != model.config[key] for key in ('label_dim', 'resolution', 'in_channels')):
        raise common.UserError(f'--guide {args.guide}: of other classes or another size than {args.use}')
    draw = functools.partial(sample, model, labels=args.labels, guide=guide, guidance=args.guidance, eta=args.eta)
    if args.sample:
        return common.save_samples(args, draw)
    fid.evaluate(fid.prepare(args, device), args, draw)


if __name__ == '__main__':
    sys.exit(common.run(main))
