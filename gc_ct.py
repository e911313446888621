"""Consistency training with generator-induced coupling (GC). Thibaut Issenhuth, Sangchul Lee, Ludovic Dos Santos,
Jean-Yves Franceschi, Chansoo Kim, Alain Rakotomamonjy, 2024, https://arxiv.org/abs/2406.09570

A consistency function f(x_t, t) maps a noisy image, at any noise level t, straight to the image at which the
probability flow ODE through x_t ends. Improved consistency training (iCT, Song & Dhariwal 2023, arXiv 2310.14189)
trains it from scratch by asking that neighbours on one path agree, at levels r = sigma_i and t = sigma_(i+1):

    x_t = x0 + t z,   x_r = x0 + r z,   z ~ N(0, I)
    loss = d( f(x_t, t), stopgrad f(x_r, r) ) / (t - r),   and f(x, sigma_min) = x

The image x0 and the noise z are drawn independently (`--coupling ic`), so that the paths of different pairs cross and
the direction z is only on average that of the ODE. Here the model itself says which image goes with the noise. With
probability mu a sample's image is replaced by the end of the path that the model sees from x_r,

    x_hat = stopgrad f_EMA(x0 + r z, r),           x_t = x_hat + t z,   x_r = x_hat + r z

and the loss is the same. By the paper such pairs lie nearer to each other, and their direction is nearer to the ODE's;
--analyse measures both. The other images keep training where no pair is generated. `--coupling ot` pairs images and
noise within each batch at the least total distance instead (Pooladian et al. 2023, arXiv 2304.14772).

    python gc_ct.py                                               # ten shapes, some five minutes on two CPU cores
    python gc_ct.py --dataset cifar10 --gpus 8                    # the paper's setting
    python gc_ct.py --dataset cifar10 --schedule ect --gpus 8     # the same coupling on Easy Consistency Tuning
    python gc_ct.py --sample runs/gc_ct-shapes --nfe 2            # a grid of images
    python gc_ct.py --evaluate runs/gc_ct-cifar10 --nfe 1,2       # FID
    python gc_ct.py --analyse runs/gc_ct-shapes                   # transport cost and regulariser of the couplings

Where the paper leaves a choice, and where we deviate from it or from the published code:
 1. `--mu` is the share of generated endpoints, as in the paper. The published code's mixing number counts the others.
 2. Endpoints are made for the samples that use them; the published code makes them for all and drops the rest.
 3. `--coupling ot` assigns within the global minibatch, over all processes, and whatever the labels: with --cond the
    noise of a class is then not quite N(0, I).
 4. The distance is iCT's pseudo-Huber of the vector, as in the published code (VCT's takes it per number).
 5. Dropout is 0 with generated endpoints and 0.3 without, where a preset has none (CIFAR-10 with ect: 0.2, ECT's).
 6. With `--schedule ect` the optimiser is ECT's RAdam, the boundary m = 0 in training (a diffusion model is a valid
    start), and the moving average GC's: every 5 steps, its decay rising with the step to `--ema`, which 0.9999 reaches
    only after a million updates.
 7. `--cond` (labels for network and endpoints) is ours; the paper is unconditional.
 8. The regulariser's proxy in --analyse takes the ODE's exact direction over the training set, no estimate of it.
 9. `--pretrain-steps` trains the diffusion model that tuning starts from, with the mean over pixels for a loss.
10. Sampling adds t z and not sqrt(t² - sigma_min²) z; the levels of more than two steps are spaced by rho 7.
11. No augmentation of the data, not even flips.
"""
import copy
import functools
import json
import math
import sys
from pathlib import Path

import torch

import common
import fid
from unet import initial_network, make_network

# 1. Presets: what `--dataset NAME` stands for. Every entry that has a flag can be set by it.

ICT = dict(                     # iCT's settings, which GC keeps
    arch='songunet', attn_resolutions=[16], dropout=None, dropout_res=None, checkpoint=None, lr_decay=None,
    schedule='ict',
    P_mean=-1.1, P_std=2.0,     # ln t is normal with this mean and deviation, at the levels of the discretisation
    s0=10, s1=1280,             # there are s0 pairs of levels at first and s1 in the end
    c=0.00054,                  # distance sqrt(|u|² + c² D) - c sqrt(D), for images of D numbers
    coupling='gc', mu=0.5, endpoint='ema',
    t_mid=0.821,                # noise level of the second step when sampling with two
    optimizer='Lion', betas=(0.9, 0.99), lr=1e-4, ema=0.9999, ema_every=5, pretrain_steps=0, cond=False,
    save_every=5000, sample_every=5000, fid_features='inception', fid_num=50_000)
ECT = dict(                     # Easy Consistency Tuning, from EDM's DDPM++
    schedule='ect', q=2.0, k=8.0, b=1.0, stages=8, c=0.0, mu=0.3, optimizer='RAdam', betas=(0.9, 0.999))
EDM_URL = 'https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl'
PRESETS = {
    'shapes': ICT | dict(       # built in; ours, sized for two CPU cores
        resolution=16, width=32, mults=[1, 1, 2], blocks=1, attn_resolutions=[], dropout=0.0, cond=True,
        batch=32, steps=1600, s1=80, lr=1e-4, lr_decay=100, mu=0.3, ema=0.998, ema_every=1,
        save_every=500, sample_every=200, eval_every=1600, fid_features='pixels', fid_num=2000),
    'cifar10': ICT | dict(resolution=32, width=128, mults=[1, 2, 2], blocks=3, batch=512, steps=100_000),
    'imagenet32': ICT | dict(
        resolution=32, width=128, mults=[1, 1, 2], blocks=[3, 5, 7], batch=512, steps=150_000, lr=8e-5),
    'celeba64': ICT | dict(
        resolution=64, width=128, mults=[1, 2, 2, 2], blocks=[3, 3, 4, 5], batch=128, steps=150_000, lr=8e-5)}
PRESETS['fmnist'] = PRESETS['cifar10'] | dict(resolution=28, width=64, attn_resolutions=[14], batch=128)        # ours
PRESETS['folder'] = PRESETS['cifar10'] | dict(resolution=None)                  # your pictures
PRESETS |= {(name, 'ect'): PRESETS[name] | ECT for name in ('imagenet32', 'celeba64', 'fmnist')}
PRESETS['shapes', 'ect'] = PRESETS['shapes'] | ECT | dict(optimizer='Adam', pretrain_steps=600, stages=3, lr=1e-3)
PRESETS['cifar10', 'ect'] = PRESETS['cifar10'] | ECT | dict(
    mults=[2, 2, 2], blocks=4, dropout=0.2, checkpoint=EDM_URL, batch=128, steps=400_000)
PRESETS['folder', 'ect'] = PRESETS['cifar10', 'ect'] | dict(resolution=None, checkpoint=None)


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


def upper_level(normal, P_mean, P_std):
    """ECT's t of a standard normal draw: ln t ~ N(P_mean, P_std²). (B,) -> (B,)"""
    return (P_mean + P_std * normal).exp()


def lower_level(t, stage, q=2.0, k=8.0, b=1.0):
    """ECT's r < t of a pair: t (1 - n(t) / q^(stage + 1)), n(t) = 1 + k sigmoid(-b t), or 0. (B,) -> (B,)"""
    n = 1 + k * torch.sigmoid(-b * t)
    return (t * (1 - n / q ** (stage + 1))).clamp(min=0)


# 3. Model

def f(net, x, t, y=None, m=0.0):
    """The consistency function: c_skip x + c_out F(c_in x, ln(t)/4, y) (EDM Eq. 7). Boundary condition: x at t = m.

    net is any function (x_in, c_noise, y) -> like x_in; x (B, C, H, W), t (B,), y (B,) labels or None -> (B, C, H, W).
    """
    s = SIGMA_DATA
    t4 = t[:, None, None, None]
    c_skip = s ** 2 / ((t4 - m) ** 2 + s ** 2)
    c_out = s * (t4 - m) / (s ** 2 + t4 ** 2).sqrt()
    c_in = 1 / (s ** 2 + t4 ** 2).sqrt()
    return c_skip * x + c_out * net(c_in * x, t.log() / 4, y)


def ema_decay(step, limit):
    """Decay of the moving average after training step 0, 1, ...: it copies at first, then averages ever longer."""
    return min(max(1 - (1 + step) ** (-2 / 3), 0.0), limit)


# 4. Coupling: which image goes with which noise

@torch.no_grad()
def generator_coupling(net, x0, z, r, y, chosen, m=0.0):
    """x_hat = stopgrad f(x0 + r z, r) where `chosen`, else x0 (the paper's Alg. 1). At r = 0 both are the same.

    net: the endpoint network; x0, z (B, C, H, W); r (B,), the lower level of each pair; chosen (B,) bool, on the host,
    so that picking them needs no wait for the device. -> (B, C, H, W)
    """
    i = chosen.nonzero()[:, 0]
    if not len(i):
        return x0
    if x0.is_cuda:          # cuDNN tunes itself for every number of images: let there be few, some endpoints made twice
        i = torch.cat([i, i[:1].expand(-len(i) % 16)])
    i = i.to(x0.device, non_blocking=True)
    level = torch.where(r[i] > 0, r[i], SIGMA_MIN)
    x_hat = f(net, x0[i] + r[i, None, None, None] * z[i], level, None if y is None else y[i], m)
    return x0.index_copy(0, i, torch.where(r[i, None, None, None] > 0, x_hat, x0[i]))


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

def loss(net, x0, z, t, r, y=None, teacher=None, mask=0, c=0.0, m=0.0):
    """Consistency loss of each sample, at x0 + t z and x0 + r z (iCT Eq. 7; at r = 0 ECT's, drawn to x0). -> (B,)

    `mask` seeds the dropout: both networks drop the same units, so that their difference is not that of two masks.
    """
    r4, t4 = r[:, None, None, None], t[:, None, None, None]
    torch.manual_seed(mask)
    student = f(net, x0 + t4 * z, t, y, m)
    with torch.no_grad():                                                       # stopgrad
        torch.manual_seed(mask)
        target = torch.where(r4 > 0, f(teacher or net, x0 + r4 * z, torch.where(r > 0, r, SIGMA_MIN), y, m), x0)
    return pseudo_huber(student - target, c) * (1 / (t - r))


def pseudo_huber(u, c):
    """sqrt(|u|² + c² D) - c sqrt(D) for u (B, C, H, W), D = C H W (iCT Sec. 3.3); the norm |u| for c = 0. -> (B,)"""
    norm = torch.linalg.vector_norm(u.flatten(1), dim=1)            # its gradient at 0 is 0
    c = c * math.sqrt(u[0].numel())
    return (norm.square() + c ** 2).sqrt() - c if c else norm


def denoising_loss(net, x0, z, t, y=None, mask=0):
    """The loss of the diffusion model that tuning starts from (EDM Eq. 8), as a mean over the pixels. -> (B,)"""
    torch.manual_seed(mask)
    return edm_weight(t) * (f(net, x0 + t[:, None, None, None] * z, t, y) - x0).square().flatten(1).mean(1)


def edm_weight(t):
    """lambda(t) = (t² + s²) / (t s)² (EDM Table 1). (B,) -> (B,)"""
    return (t ** 2 + SIGMA_DATA ** 2) / (t * SIGMA_DATA) ** 2


# 6. Sampling

@torch.inference_mode()
def sample(model: torch.nn.Module, n: int, nfe: int = 1, labels: list[int] | None = None, seed: int = 0,
           first: int = 0) -> torch.Tensor:
    """n images in [-1, 1], (n, C, H, W), of `nfe` network evaluations; labels: classes, in turn from number `first` on.

    One step: f(sigma_max z, sigma_max). Each further one adds fresh noise of a lower level and maps back (CM Alg. 1).
    """
    config, device, images = model.config, next(model.parameters()).device, []
    net = common.network(model, config['precision'], device)
    y = common.choose_labels(n, labels, config['label_dim'], first)
    levels = rho_levels(nfe)[:0:-1]                                             # nfe of them, from sigma_max downwards
    if nfe == 2:
        levels[1] = config['t_mid']
    shape = (n, config['in_channels'], config['resolution'], config['resolution'])
    noise = [common.randn(shape, seed, i, 'sample') for i in range(nfe)]
    for part in common.progress(torch.arange(n).split(250), 'samples, 250 at a time'):
        y_part = None if y is None else y[part].to(device)
        x0_hat = 0.0
        for level, z in zip(levels, noise):
            x = x0_hat + level * z[part].to(device)
            x0_hat = f(net, x, torch.full((len(part),), level, device=device), y_part, SIGMA_MIN)
        images.append(x0_hat.clamp(-1, 1))
    return torch.cat(images)


def load(path: str | Path, device: str | torch.device = 'cpu') -> torch.nn.Module:
    """The EMA network of a run (its folder, checkpoint.pt or final.pt), for `sample`; its settings are in `.config`."""
    return common.load_network(path, make_network, device)


# 7. Training

class Lion(torch.optim.Optimizer):
    """Lion without weight decay (Chen et al. 2023, arXiv 2302.06675, Alg. 2): steps of lr along the momentum's sign."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), foreach=True):
        super().__init__(params, dict(lr=lr, betas=betas))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            grads = [p.grad for p in params]
            for p in params:
                if p not in self.state:
                    self.state[p] = dict(exp_avg=torch.zeros_like(p))
            momenta = [self.state[p]['exp_avg'] for p in params]
            updates = torch._foreach_lerp(momenta, grads, 1 - group['betas'][0])        # few calls for all parameters
            torch._foreach_sign_(updates)
            torch._foreach_add_(params, updates, alpha=-group['lr'])
            torch._foreach_lerp_(momenta, grads, 1 - group['betas'][1])


def train(args):
    """One run, from data to final.pt."""
    device = common.start(args)
    data = common.load_data(args).to(device)
    common.fit_to_data(args, data)                                      # sets resolution, in_channels, label_dim
    judge = fid.prepare(args, device, data)                             # now: what is missing is to be missed now

    net = initial_network(args, tunes=args.schedule == 'ect')
    net = net.to(device, memory_format=torch.channels_last)                     # channels last: convolutions run faster
    net.config = common.config_of(args)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    make_optimizer = lambda: (Lion if args.optimizer == 'Lion' else getattr(torch.optim, args.optimizer))(
        net.parameters(), lr=args.lr, betas=tuple(args.betas), foreach=True)    # foreach: few calls for all parameters
    optimizer = make_optimizer()
    start = common.open_run(args, net=net, ema=ema, optimizer=optimizer)
    if args.compile:
        common.compile_in_place(net)
    wrapped, clock = common.distributed(net), common.Clock(args, device)
    watch = lambda module, part: clock.watch(common.network(module, args.precision, device), part)
    student, teacher = watch(wrapped, 'student'), watch(net, 'teacher')
    endpoint = watch(ema if args.endpoint == 'ema' else net, 'endpoint')
    mine = common.my_part(args.batch)
    m = SIGMA_MIN if args.schedule == 'ict' else 0.0                            # boundary condition f(x, m) = x
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
            t = r = upper_level(normal('level'), -1.2, 1.2)[mine]               # EDM Table 1, as its weight
        elif args.schedule == 'ict':
            table = level_table(num_levels(done, total_steps, args.s0, args.s1), args.P_mean, args.P_std, device)
            t, r = level_pair(common.rand((args.batch,), args.seed, step, 'level', device=device)[mine], *table)
        else:
            t = upper_level(normal('level'), args.P_mean, args.P_std)[mine]
            r = lower_level(t, min(done * args.stages // max(total_steps, 1), args.stages - 1), args.q, args.k, args.b)
        clock('data')

        # Coupling.
        if args.coupling == 'ot' and not pretraining:
            order = optimal_transport(x_all, z_all)
            x_all, y_all = x_all[order], None if y_all is None else y_all[order]    # labels travel with their images
        mu = args.mu if args.coupling == 'gc' and not pretraining else 0.0
        chosen = (common.rand((args.batch,), args.seed, step, 'mix') < mu)[mine]
        x0, z, y = x_all[mine], z_all[mine], None if y_all is None else y_all[mine]
        clock('coupling')

        # Loss and gradient.
        total = torch.zeros((), device=device)
        for i, part in enumerate(common.microbatches(wrapped, len(x0), args.microbatch)):
            mask = common.key(args.seed, step, 'dropout', common.rank(), i)
            y_part = None if y is None else y[part]
            torch.manual_seed(mask)
            x_hat = generator_coupling(endpoint, x0[part], z[part], r[part], y_part, chosen[part], m)
            if pretraining:
                value = denoising_loss(student, x0[part], z[part], t[part], y_part, mask)
            else:
                value = loss(student, x_hat, z[part], t[part], r[part], y_part, teacher, mask, args.c, m)
            clock('loss')
            (value.sum() * common.LOSS_SCALE.get(args.precision, 1.0) / len(x0)).backward()
            total += value.detach().sum() / len(x0)
            clock('backward')

        # Update.
        grad_norm = common.finish_gradients(net.parameters(), args.precision)
        common.learning_rate(optimizer, done, args.lr, args.lr_decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock('optimiser')
        if done % args.ema_every == 0:
            common.update_ema(ema, net, ema_decay(done, args.ema))
        clock('EMA')
        log.step(step + 1, loss=total, grad_norm=grad_norm)
        if log.due(step + 1, args.eval_every) and log.evaluated(step + 1, fid.evaluate(judge, args, draw)):
            common.save_final(args, ema, 'best')
        if log.due(step + 1, args.sample_every) and common.rank() == 0:
            common.save_progress(args, step + 1, sample(ema, 64, seed=args.seed), log)
        if log.due(step + 1, args.save_every) or log.stop:
            common.save_checkpoint(args, step + 1, net=net, ema=ema, optimizer=optimizer)
        if log.stop:
            return
    common.save_final(args, ema)


# 8. The paper's diagnostics

def posterior_mean(x_t, t, images, allowed=None):
    """E[x0 | x_t], x0 one of `images` uint8 (N, C, H, W), `allowed` (B, N): softmax of -|x_t - x0|² / (2 t²)."""
    x, pieces = x_t.flatten(1), images.flatten(1).split(4096)
    read = lambda piece: common.normalise(piece.to(x.device))
    with common.true_float32():
        logits = torch.cat([x @ c.T - c.square().sum(1) / 2 for c in map(read, pieces)], 1) / t[:, None] ** 2
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        weights = logits.softmax(1).split(4096, dim=1)
        return sum(w @ c for w, c in zip(weights, map(read, pieces))).view_as(x_t)


@torch.inference_mode()
def diagnostics(net, x0, z, y, images, labels, sigma, m=SIGMA_MIN, order=None):
    """Of each coupling at the level sigma, means over the batch and an image's numbers. -> {name: (cost, proxy)}

    cost: |x - z|² of the pairs (x, z), the transport cost. proxy: |z - v(x_t)|² at x_t = x + sigma z, how far the
    direction that training follows is from the ODE's, v = (x_t - E[x0 | x_t]) / sigma, which distillation follows; the
    term that separates the two objectives grows with it. order: of the images, from `optimal_transport`, or None.
    """
    t = torch.full((len(x0),), sigma, device=x0.device)
    everyone = torch.ones(len(x0), dtype=torch.bool)
    pairs = {'IC': (x0, y), 'GC': (generator_coupling(net, x0, z, t, y, everyone, m), y)}
    if order is not None:
        pairs['OT'] = x0[order], None if y is None else y[order]
    results = {}
    for name, (x, y) in pairs.items():
        x_t = x + sigma * z
        v = (x_t - posterior_mean(x_t, t, images, None if y is None else y[:, None] == labels)) / sigma
        results[name] = (x - z).square().mean().item(), (z - v).square().mean().item()
    return results


def analyse(args, model, device):
    """Prints both diagnostics for 512 images by noise level and draws them, in `analyse.png`."""
    data = common.load_data(args).to(device)
    net, labels = common.network(model, args.precision, device), data.labels_of(slice(None), device)
    batches = common.batch_indices(len(data.images), 512, 0, args.seed).split(64)
    rows, m = {}, SIGMA_MIN if args.schedule == 'ict' else 0.0
    names = ['IC', 'OT', 'GC']
    try:
        optimal_transport(torch.zeros(1, 1), torch.zeros(1, 1))
    except common.UserError as error:
        names.remove('OT')
        common.say(f'without OT: {error}')
    sigmas = rho_levels(12)[1:]
    for i, sigma in enumerate(common.progress(sigmas, 'noise levels')):
        for j, index in enumerate(batches):
            x0, y = data.at(index, device)
            z = common.randn(x0.shape, args.seed, j, 'analyse', device=device)
            order = optimal_transport(x0, z) if 'OT' in names else None
            for name, values in diagnostics(net, x0, z, y, data.images, labels, sigma, m, order).items():
                rows.setdefault((i, name), []).append(values)
    means = {place: torch.tensor(values).mean(0).tolist() for place, values in rows.items()}
    common.say('             transport cost, |x - z|²      regulariser, |z - v|²')
    common.say('   sigma   ' + '  '.join(2 * [''.join(f'{name:>9}' for name in names)]))
    for i, sigma in enumerate(sigmas):
        costs, proxies = (''.join(f'{means[i, name][which]:9.4f}' for name in names) for which in (0, 1))
        common.say(f'{sigma:8.4g}   {costs}  {proxies}')
    curve = lambda which: {name: [(sigma, means[i, name][which]) for i, sigma in enumerate(sigmas)] for name in names}
    panels = {'transport cost: mean square of x - z': curve(0), 'regulariser: mean square of z - v': curve(1)}
    common.save_picture(args, 'analyse.png', lambda path: common.save_plot(panels, path, 'noise level sigma'))


# 9. Command line

def add_flags(parser):
    """The flags that are GC's own."""
    number = common.number
    add = parser.add_argument_group('method', 'python gc_ct.py --schedule ect --coupling gc --mu 0.3').add_argument
    add('--coupling', choices=['ic', 'ot', 'gc'], help='of image and noise: independent, transport, generator-induced')
    add('--mu', type=number(float, 0, 1), metavar='P', help='share of generated endpoints')
    add('--endpoint', choices=['ema', 'online'], help='the network that generates them; online: with dropout')
    add('--schedule', choices=['ict', 'ect'], help='from scratch on ever more levels, or tuning with ever smaller gaps')
    add('--s0', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels at first')
    add('--s1', type=number(int, 1, 10_000), metavar='N', help='ict: pairs of neighbouring levels in the end')
    add('--q', type=number(float, 1.001), metavar='X', help='ect: what the gap is divided by from stage to stage')
    add('--stages', type=number(int, 1, 64), metavar='N', help='ect: stages of the shrinking, over the run')
    add('--ema-every', type=number(int, 1), metavar='N', help='steps between updates of the moving average')
    add('--analyse', metavar='CKPT', help='print and draw transport cost and regulariser by coupling and noise level')


def main(argv):
    """`python gc_ct.py`: trains, or with --sample / --evaluate / --analyse uses what was trained."""
    args = common.parse_args('gc_ct', __doc__, PRESETS, add_flags, argv, switch='schedule')
    if args.dropout is None:
        args.dropout = 0.0 if args.coupling == 'gc' else 0.3
    if args.s1 < args.s0:
        raise common.UserError(f'--s1 {args.s1} is less than --s0 {args.s0}')
    if args.coupling == 'ot':
        optimal_transport(torch.zeros(1, 1), torch.zeros(1, 1))                 # is SciPy there?
    if args.schedule == 'ect' and (args.stages + 1) * math.log(args.q) > math.log(1e6):
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
